"""What fit refuses: states, optimisers, nets and losses that do not belong together, and models of other libraries."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_fit import KEY, NET, OPTIMIZER, OPTIONS, STATE, STEP, TEST, TRAIN, X, Y, copy

import fnn

OTHER_NETS = {
    "wider": fnn.models.mlp(2, 8, 3, norm="batch_norm"),
    "deeper": fnn.models.mlp(3, 4, 3, norm="batch_norm"),
    "plain": fnn.models.mlp(2, 4, 3),
    "layer_norm": fnn.models.mlp(2, 4, 3, norm="layer_norm"),
}


@pytest.mark.parametrize("name", OTHER_NETS)
def test_the_state_of_another_net_is_refused(name):
    """A wider net's parameters would train in silence: a dense layer takes whatever kernel it is given."""
    other = fnn.TrainState.create(OTHER_NETS[name], OPTIMIZER, KEY, X)
    rule = "the (parameters|state) must be this net's, got "
    for who, call in (
        ("fit", lambda: fnn.fit(STEP, other, (X, Y), **OPTIONS)),
        ("train_step", lambda: STEP(copy(other), (X, Y))),
        ("train_step", lambda: fnn.train_step(NET, STEP.loss, OPTIMIZER)(copy(other), (X, Y))),  # its first batch
        ("train_step", lambda: STEP.jitted(copy(other), (X, Y))),
        ("evaluate", lambda: fnn.evaluate(NET, other, (X, Y))),
    ):
        with pytest.raises(ValueError, match=f"^{who}: {rule}"):
            call()


def test_a_state_that_create_did_not_make_is_admitted_if_it_fits():
    net = fnn.models.mlp(2, 4, 3, norm="batch_norm")  # never created
    assert fnn.evaluate(net, (STATE.params, STATE.net_state), (X, Y)) == fnn.evaluate(NET, STATE, (X, Y))


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (optax.adam(0.1), optax.sgd(0.1)),
        (optax.sgd(0.1), optax.adam(0.1)),
        (optax.adam(0.1), optax.adamw(0.1)),
        (optax.sgd(0.1, momentum=0.9), optax.rmsprop(0.1)),
        (optax.chain(fnn.clip.by_global_norm(1.0), optax.adam(0.1)), optax.adam(0.1)),
    ],
)
def test_the_state_of_another_optimiser_is_refused(made, used):
    """Adam's state would pass through SGD's step unused."""
    step, state = fnn.train_step(NET, fnn.losses.cross_entropy, used), fnn.TrainState.create(NET, made, KEY, X)
    for call in (lambda: step(copy(state), (X, Y)), lambda: fnn.fit(step, state, (X, Y), **OPTIONS)):
        with pytest.raises(ValueError, match="train_step: the optimizer's state must be that of the step's optimizer"):
            call()


def needs():
    """An optimiser of one's own that needs what no step has."""

    def update(g, s, p=None, *, hessian_fn, **extra):
        return g, s

    return optax.GradientTransformationExtraArgs(lambda p: (), update)


ASK_IN_VAIN = {
    "one's own": (needs, "hessian_fn"),
    "lbfgs inside": (lambda: optax.MultiSteps(optax.lbfgs(), 2), "value, grad, value_fn"),
    "polyak inside": (lambda: optax.chain(optax.MultiSteps(optax.polyak_sgd(), 2)), "value"),
}


@pytest.mark.parametrize("name", ASK_IN_VAIN)
def test_optimisers_that_need_what_they_cannot_have_are_refused_in_a_sentence(name):
    make, asked = ASK_IN_VAIN[name]
    with pytest.raises(
        ValueError,
        match=f"train_step: the optimizer must need only what it is offered .*, got one that asks for {asked};",
    ) as error:
        state = fnn.TrainState.create(NET, make(), KEY, X)
        fnn.train_step(NET, fnn.losses.cross_entropy, make())(state, (X, Y))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, wrap",
    [("loss_scaled", fnn.optimizers.loss_scaled), ("apply_if_finite", lambda tx: optax.apply_if_finite(tx, 5))],
)
def test_what_skips_bad_gradients_belongs_around_their_accumulation(name, wrap):
    """Inside of it the sum stays NaN after one of them, and nothing is trained any more; around it, training goes on."""
    inside, around = (
        optax.MultiSteps(wrap(optax.sgd(0.1)), 2),
        wrap(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()),
    )
    with pytest.raises(ValueError, match=f"train_step: {name} must be around optax.MultiSteps, got it inside"):
        fnn.train_step(NET, fnn.losses.cross_entropy, inside)(fnn.TrainState.create(NET, inside, KEY, X), (X, Y))
    step, state = fnn.train_step(NET, fnn.losses.cross_entropy, around), fnn.TrainState.create(NET, around, KEY, X)
    seen = []
    for n in range(6):
        state, _ = step(state, (X * np.float32(np.inf) if n == 1 else X, Y))
        seen.append(np.asarray(jax.tree.leaves(state.params)[0]))
    assert not np.array_equal(seen[2], seen[-1])
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.params))


NOT_OPTIMIZERS = [(None, "None"), ("adam", "'adam'"), (optax.adam, "adam; call it: adam(...)"), (3, "3")]


@pytest.mark.parametrize(("given", "got"), NOT_OPTIMIZERS, ids=[got for _, got in NOT_OPTIMIZERS])
def test_what_is_no_optimiser(given, got):
    for who, call in (
        ("TrainState.create", lambda: fnn.TrainState.create(NET, given, KEY, X)),
        ("train_step", lambda: fnn.train_step(NET, fnn.losses.cross_entropy, given)),
    ):
        with pytest.raises(TypeError, match=re.escape(f"{who}: optimizer must be an optax transformation, got {got}")):
            call()


def test_an_optimiser_that_fails_under_jit_says_so():
    bad = optax.sgd(lambda count: 0.1 if count > 3 else 0.2)
    with pytest.raises(
        ValueError, match="train_step: the optimizer must turn these gradients into updates, under jit, got TracerBool"
    ) as e:
        fnn.train_step(NET, fnn.losses.cross_entropy, bad)(fnn.TrainState.create(NET, bad, KEY, X), (X, Y))
    assert "\n" not in str(e.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Whole:
    """A model as Equinox's: one pytree of its arrays and its functions."""

    kernel: Any
    activation: Any

    def __call__(self, x):
        return self.activation(x @ self.kernel)


WHOLE = Whole(jnp.ones((4, 3)), jax.nn.relu)


@pytest.mark.parametrize(
    "net", [None, lambda x: x, "mlp", fnn.dense, NET.apply, tuple(NET), WHOLE], ids=lambda n: type(n).__name__
)
def test_what_is_no_net(net):
    for who, call in (
        ("train_step", lambda: fnn.train_step(net, fnn.losses.cross_entropy, OPTIMIZER)),
        ("TrainState.create", lambda: fnn.TrainState.create(net, OPTIMIZER, KEY, X)),
        ("evaluate", lambda: fnn.evaluate(net, STATE, (X, Y))),
        ("gradient_flow", lambda: fnn.gradient_flow(net, STATE, (X, Y))),
        ("example_loss", lambda: fnn.example_loss(net, ((), ()), loss=fnn.losses.cross_entropy)),
    ):
        with pytest.raises(TypeError, match=f"^{who}: net must be a Layer, a pair of init"):
            call()


NOT_LOSSES = {
    "cross_entropy": ("cross_entropy", TypeError, "got 'cross_entropy'; pass fnn.losses.cross_entropy"),
    "mse": ("mse", TypeError, "got 'mse'; pass fnn.losses.mse"),
    "none": (None, TypeError, "got None; pass fnn.losses.cross_entropy"),
    "scalar": (
        lambda o, y: jnp.mean(o),
        ValueError,
        r"the loss must return float\[batch\], one number .*, got float32\[\]",
    ),
    "units": (lambda o, y: o, ValueError, r"the loss must return float\[batch\], one number .*, got float32\[48,3\]"),
    "other": (
        lambda o, y: o[:3, 0],
        ValueError,
        r"the loss must return float\[batch\], one number .*, got float32\[3\]",
    ),
    "nothing": (lambda o, y: None, ValueError, r"the loss must return float\[batch\], one number .*, got None"),
    "numpy": (
        lambda o, y: np.mean(np.square(o), 1),
        TypeError,
        "the loss must be one that jit can trace, got one that",
    ),
    "if": (lambda o, y: o[:, 0] if o[0, 0] > 0 else o[:, 1], TypeError, "the loss must be one that jit can trace"),
}


@pytest.mark.parametrize("name", NOT_LOSSES)
def test_what_is_no_loss(name):
    loss, kind, sentence = NOT_LOSSES[name]
    for call in (
        lambda: fnn.train_step(NET, loss, OPTIMIZER)(copy(), (X, Y)),
        lambda: fnn.evaluate(NET, STATE, (X, Y), loss=loss),
    ):
        with pytest.raises(kind, match=sentence) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_state_that_a_step_took_over_is_refused():
    state = copy()
    STEP(state, (X, Y))
    rule = r"the state must still have its arrays, got one that was donated to an earlier step"
    for call in (
        lambda: STEP(state, (X, Y)),
        lambda: fnn.fit(STEP, state, (X, Y), **OPTIONS),
        lambda: fnn.evaluate(NET, state, (X, Y)),
        lambda: fnn.gradient_flow(NET, state, (X, Y)),
        lambda: fnn.per_example(lambda p, x: jnp.sum(p[1]["kernel"]))(state.params, X),
    ):
        with pytest.raises(ValueError, match=rule):
            call()
    for call in (
        lambda: fnn.fit(STEP.pure, STATE, (X, Y), **OPTIONS),
        lambda: fnn.fit(STEP, (STATE.params, STATE.net_state), (X, Y), **OPTIONS),
        lambda: STEP(STATE.params, (X, Y)),
        lambda: fnn.evaluate(NET, STATE.params, (X, Y)),
    ):
        with pytest.raises(TypeError, match="must be what train_step returns|must be a TrainState"):
            call()


@pytest.mark.parametrize("spec", [None, (1, 4), [1, 4], 4, {}], ids=repr)
def test_what_is_no_example(spec):
    with pytest.raises(
        TypeError, match="TrainState.create: spec must be an example batch or its jax.ShapeDtypeStruct, got"
    ):
        fnn.TrainState.create(NET, OPTIMIZER, KEY, spec)


def test_validation_data_are_named_in_what_is_wrong_with_them():
    for bad, sentence in (
        ((X, Y + 1), r"fit: validation: cross_entropy: labels must lie in 0..2, got 1..3"),
        ((X * np.nan, Y), "fit: validation: x must be finite"),
        ([X, Y], "fit: validation: data in memory must be a tuple"),
        ("test", "fit: validation: data must be a pair"),
        ((TRAIN, TEST), "fit: validation: data must be one pair of arrays"),
        ([], "fit: validation: the iterable of batches must not be empty"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            fnn.fit(STEP, STATE, (X, Y), validation=bad, **OPTIONS)
    with pytest.raises(ValueError, match=r"dense: the input must be float32\[batch, ..., 4\], as at init"):
        fnn.fit(STEP, STATE, (X, Y), validation=(X[:, :3], Y), **OPTIONS)


class Counting(nnx.Module):
    """It changes variables when it is called: batch norm's statistics, dropout's counts."""

    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_a_model_passed_whole_is_refused_and_its_arrays_are_taken():
    def loss(model, example):
        return jnp.sum(model(example) ** 2)

    rule = "per_example: params must be real floating arrays, got relu at activation; split .*equinox.partition"
    with pytest.raises(TypeError, match=rule):
        fnn.per_example(loss)(WHOLE, X)
    norms = fnn.per_example(lambda p, x: loss(Whole(p, jnp.square), x))(WHOLE.kernel, X).norms()
    plain = jax.jit(jax.vmap(jax.grad(lambda p, x: loss(Whole(p, jnp.square), x)), (None, 0)))(WHOLE.kernel, X)
    np.testing.assert_allclose(norms, np.linalg.norm(plain.reshape(48, -1), axis=1), rtol=1e-5)


def test_nnx_modules_are_merged_as_copies():
    graphdef, params, rest = nnx.split(Counting(nnx.Rngs(0)), nnx.Param, ...)

    def loss(copy):
        return lambda p, x: jnp.sum(nnx.merge(graphdef, p, rest, copy=copy)(x[None]) ** 2)

    with pytest.raises(ValueError, match=r"per_example: the function must not change variables .*copy=True\)"):
        fnn.per_example(loss(False))(params, X)
    with pytest.warns(UserWarning, match="statistic"):  # its batch norm sees batches of one
        assert fnn.per_example(loss(True))(params, X).norms().shape == (48,)
    layer = fnn.Layer(
        lambda key, spec: (params, ()),
        lambda p, s, x, *, key=None, train=False, axis_name=None: (nnx.merge(graphdef, p, rest)(x), s),
    )
    state = fnn.TrainState.create(layer, OPTIMIZER, KEY, X)
    with pytest.raises(ValueError, match=r"net: the function must not change variables .*copy=True\)"):
        fnn.train_step(layer, fnn.losses.cross_entropy, OPTIMIZER)(state, (X, Y))


def test_an_empty_batch_says_so():
    empty = X[:0], Y[:0]
    with pytest.raises(ValueError, match="train_step: a batch must hold at least one example, got none"):
        STEP(copy(), empty)
    with pytest.raises(ValueError, match="train_step: a batch must hold at least one example, got none"):
        STEP.jitted(copy(), empty)
    with pytest.raises(ValueError, match="per_example: .* hold at least one, got none: .*skip an empty batch"):
        fnn.per_example(lambda p, e: jnp.sum(p * e[0]))(jnp.ones(4), empty)


@pytest.mark.parametrize(
    ("who", "make"),
    [
        ("mlp", lambda norm: fnn.models.mlp(2, 4, 3, norm=norm)),
        ("convnet", lambda norm: fnn.models.convnet([4], 3, norm=norm)),
        ("resnet", lambda norm: fnn.models.resnet([1], 3, norm=norm)),
        ("decoder", lambda norm: fnn.models.decoder(5, 1, 4, fnn.models.Block(norm=norm))),
        ("encoder", lambda norm: fnn.models.encoder(5, 1, 4, fnn.models.Block(norm=norm), outputs=2)),
        ("translator", lambda norm: fnn.models.translator(5, 1, 4, fnn.models.Block(norm=norm))),
    ],
)
def test_a_wrong_norm_is_named_by_its_model(who, make):
    with pytest.raises(ValueError, match=f"^{who}: unknown norm 'batchnorm'; did you mean 'batch_norm'"):
        make("batchnorm")
