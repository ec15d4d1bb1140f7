"""The door for data: what other libraries hand over becomes the same arrays, and nothing changes its value on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

import fnn
from fnn import arrays

NET = fnn.models.mlp(2, 4, 3)
OPTIMIZER = optax.sgd(0.1)
STEP = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 2)).astype(np.float32), np.arange(24) % 3
KEY = jax.random.key(0)
STATE = fnn.TrainState.create(NET, OPTIMIZER, KEY, X)
OPTIONS = {"epochs": 1, "batch_size": 8, "key": KEY}


class Tensor:
    """A tensor as PyTorch's that takes part in autograd: NumPy may read it only once it is detached."""

    def __init__(self, a, grad=True):
        self.a, self.grad, self.shape, self.dtype = a, grad, a.shape, f"torch.{a.dtype}"

    def detach(self):
        return Tensor(self.a, grad=False)

    def __array__(self, dtype=None, copy=None):
        if self.grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.a if dtype is None else self.a.astype(dtype)


class Frame:
    """A frame as pandas': columns, a shape, no dtype of its own."""

    def __init__(self, a):
        self.a, self.shape = a, a.shape

    def __array__(self, dtype=None, copy=None):
        return np.array(self.a, dtype)


class Capsule:
    """Nothing but DLPack."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


class OnDevice:
    """A tensor on a device that the host cannot read."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")


class Loader:
    """A DataLoader: batches are lists of two tensors, read anew in each epoch."""

    def __len__(self):
        return 3

    def __iter__(self):
        for i in range(0, 24, 8):
            yield [Tensor(X[i : i + 8], grad=False), Tensor(Y[i : i + 8], grad=False)]


FORMS = {
    "numpy": lambda a: a,
    "float64": lambda a: a.astype(np.float64) if a.dtype == np.float32 else a,
    "jax": jnp.asarray,
    "tensor": Tensor,
    "frame": Frame,
    "polars": lambda a: pl.DataFrame(a) if a.ndim == 2 else pl.Series(a),
    "dlpack": Capsule,
    "lists": lambda a: a.tolist(),
    "rows": lambda a: [row.tolist() for row in a],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_data_trains_and_evaluates_alike(form):
    pair = FORMS[form](X), FORMS[form](Y)
    expected, _ = fnn.fit(STEP, STATE, (jnp.asarray(X), jnp.asarray(Y)), **OPTIONS)
    state, _ = fnn.fit(STEP, STATE, pair, **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    assert fnn.evaluate(NET, STATE, pair) == fnn.evaluate(NET, STATE, (X, Y))
    one, _ = STEP(jax.tree.map(jnp.copy, STATE), pair)
    two, _ = STEP(jax.tree.map(jnp.copy, STATE), (X, Y))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    made = fnn.TrainState.create(NET, OPTIMIZER, KEY, pair[0])
    jax.tree.map(np.testing.assert_array_equal, made.params, STATE.params)
    train, test = fnn.data.split(*pair, key=KEY)
    whole = np.concatenate([train.x, test.x])
    np.testing.assert_array_equal(np.sort(whole, axis=0), np.sort(X, axis=0))


def test_a_loader_of_tensors_trains_and_validates():
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 24, 8)]
    one, history = fnn.fit(STEP, STATE, Loader(), epochs=2, validation=Loader())
    two, _ = fnn.fit(STEP, STATE, batches, epochs=2)
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert history.validation["loss"][-1] == pytest.approx(fnn.evaluate(NET, one, (X, Y))["loss"], rel=1e-6)


WIDE = {
    "int64": Y.astype(np.int64) + 2**32,
    "one of many": np.where(np.arange(24) == 7, 2**31, Y),
    "negative": Y.astype(np.int64) - 2**32,
    "uint64": Y.astype(np.uint64) + np.uint64(2**32),
    "uint32": Y.astype(np.uint32) + np.uint32(2**31),
    "polars": pl.Series(Y + 2**32),
    "list": (Y + 2**32).tolist(),
    "dlpack": Capsule(Y + 2**32),
    "tensor": Tensor(Y + 2**32),
}


@pytest.mark.parametrize("name", WIDE)
def test_integers_that_would_wrap_are_refused_wherever_data_enter(name):
    """2^32 + k is k in int32: as a label it would train on the wrong class without a word."""
    pair = X, WIDE[name]
    rule = r"y must fit in int32, got values from"
    with pytest.raises(ValueError, match=rule):
        fnn.fit(STEP, STATE, pair, **OPTIONS)
    with pytest.raises(ValueError, match=rule):
        fnn.fit(STEP, STATE, [pair] * 40, epochs=1)
    with pytest.raises(ValueError, match="fit: validation: data: " + rule):
        fnn.fit(STEP, STATE, (X, Y), validation=pair, **OPTIONS)
    with pytest.raises(ValueError, match="evaluate: data: " + rule):
        fnn.evaluate(NET, STATE, pair)
    with pytest.raises(ValueError, match="train_step: the batch: " + rule):
        STEP(jax.tree.map(jnp.copy, STATE), pair)
    with pytest.raises(ValueError, match="data.split: " + rule):
        fnn.data.split(*pair, key=KEY)


def test_arrays_of_another_byte_order_are_turned_wherever_they_enter():
    """A program that is compiled already reads their bytes as its own; so the plain arrays go first."""

    def loss(params, batch):
        return jnp.mean(fnn.losses.cross_entropy(batch[0] @ params, batch[1]))

    w, other = np.ones((X.shape[1], 3), np.float32), (X.astype(">f4"), (Y % 3).astype(">i4"))
    for call in (
        lambda batch: fnn.watch(loss)(w, batch).loss,
        lambda batch: fnn.per_example(loss)(w, jax.tree.map(lambda a: a[:, None], batch)).norms(),
        lambda batch: fnn.evaluate(NET, STATE, batch)["loss"],
        lambda batch: fnn.tree.norm(batch[0]),
        lambda batch: jnp.stack(jax.tree.leaves(fnn.tree.norms(batch))),
    ):
        np.testing.assert_array_equal(call((X.astype(np.float32), np.int32(Y % 3))), call(other))
    with pytest.raises(ValueError, match="watch: params must be in this machine's byte order, got >f4"):
        fnn.watch(loss)(w.astype(">f4"), other)


def test_integers_that_would_wrap_are_refused_by_hand_too():
    for loss, y in (
        ("cross_entropy", Y),
        ("sequence_cross_entropy", Y[:, None]),
        ("mse", Y[:, None]),
        ("binary_cross_entropy", Y),
    ):
        outputs = jnp.zeros((24, 1, 3)) if "sequence" in loss else jnp.zeros((24, 3 if loss == "cross_entropy" else 1))
        with pytest.raises(ValueError, match=f"{loss}: targets must fit in int32, got values from 4294967296"):
            getattr(fnn.losses, loss)(outputs, y + 2**32)
    net = fnn.models.decoder(7, 1, 4, fnn.models.Block(heads=2))
    tokens = np.arange(8).reshape(2, 4) % 7
    params, state = net.init(KEY, tokens)
    with pytest.raises(ValueError, match="net: x must fit in int32"):
        net.apply(params, state, tokens + 2**32)
    with pytest.raises(ValueError, match="generate: the prompt must fit in int32"):
        fnn.generate(net, params, state, tokens + 2**32, 2)


def test_tokens_that_would_wrap_are_refused_too():
    net = fnn.serial(fnn.embed(7, 4), fnn.flatten(), fnn.dense(3))
    tokens = np.arange(48).reshape(24, 2) % 7
    state = fnn.TrainState.create(net, OPTIMIZER, KEY, tokens)
    assert fnn.evaluate(net, state, (tokens, Y))["loss"] > 0
    for bad in (tokens + 2**32, fnn.Masked(tokens + 2**33, np.ones((24, 2), bool))):
        with pytest.raises(ValueError, match="evaluate: data: x must fit in int32, got values from"):
            fnn.evaluate(net, state, (bad, Y))


REFUSED = {
    "text": (np.array(list("abc"))[Y], r"y must hold numbers, got <U1\[24\]; np.unique"),
    "a list of text": (["abc"[i] for i in Y], "y must hold numbers, got list of <U1; np.unique"),
    "objects": (Y.astype(object), r"y must hold numbers, got object\[24\]"),
    "dates": (Y.astype("datetime64[s]"), r"y must hold numbers, got datetime64\[s\]\[24\]"),
    "complex": (Y + 1j, r"y must be real, got complex128\[24\]"),
    "complex on a device": (jnp.asarray(Y + 1j, jnp.complex64), r"y must be real, got complex64\[24\]"),
    "masked": (np.ma.masked_equal(Y, 1), "y must have no masked entries, got 8; fill or drop them"),
    "keys": (jax.random.split(KEY, 24), r"y must hold numbers, got key<fry>\[24\]"),
    "ragged": ([[1], [2, 3]], "y must be an array that NumPy can read, got list"),
    "elsewhere": (OnDevice(), r"y must be an array that NumPy can read, got OnDevice \(can't convert cuda:0"),
    "a module": (np, "y must hold numbers, got module of object"),
    "a generator": ((i for i in range(24)), "y must hold numbers, got generator of object"),
    "nothing": (None, "y must hold numbers, got NoneType of object|targets must be one array, got None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_real_numbers_is_refused_by_name(name):
    y, sentence = REFUSED[name]
    for call in (
        lambda: fnn.fit(STEP, STATE, (X, y), **OPTIONS),
        lambda: fnn.evaluate(NET, STATE, (X, y)),
        lambda: STEP(jax.tree.map(jnp.copy, STATE), (X, y)),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence) as error:
            call()
        assert "\n" not in str(error.value)


def test_arrays_that_are_fine_pass_as_they_are():
    for a in (X, Y, jnp.asarray(X), X.astype(np.float64), jnp.asarray(X, jnp.bfloat16), Y.astype(np.uint8)):
        assert arrays.array("me", "x", a) is a
    assert arrays.array("me", "x", X.astype(np.longdouble)).dtype == np.float64
    with jax.enable_x64(True):
        wide = Y + 2**40
        assert arrays.array("me", "y", wide) is wide


def test_complex_parameters_are_refused_by_name():
    layer = fnn.stateless(lambda key, spec: {"w": jnp.ones(2, jnp.complex64)}, lambda p, x: jnp.real(x @ p["w"]))
    with pytest.raises(
        TypeError, match=r"TrainState.create: params must be real floating arrays, got complex64\[2\] at w"
    ):
        fnn.TrainState.create(layer, OPTIMIZER, KEY, X)
    with pytest.raises(TypeError, match="evaluate: params must be real"):
        fnn.evaluate(layer, layer.init(KEY, X), (X, X[:, 0]), loss=fnn.losses.mse)
    params = {"w": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match="per_example: params must be real"):
        fnn.per_example(lambda p, x: jnp.real(x @ p["w"]))(params, X)
    for function in (fnn.tree.norm, fnn.tree.norms, fnn.tree.log_norms):
        with pytest.raises(TypeError, match="tree: arrays must be real, got complex64"):
            function(params)
