"""`shared`: one set of parameters in several places, against the same net written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import started

import fnn
from fnn import compiled, tree

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (16, 8))
Y = jnp.arange(16) % 3


def net(n=3, unroll=1):
    def build(use):
        block = fnn.serial(use(), fnn.batch_norm(), fnn.activation("tanh"), fnn.tap())
        back = use(lambda params, x: x @ params["kernel"].T)
        return fnn.serial(use(), fnn.activation("tanh"), fnn.repeat(block, n, unroll=unroll), back, fnn.dense(3))

    return fnn.shared(fnn.dense(8), build)


def by_hand(params, x, n=3):
    """The same, for weights w, b and one (scale, bias) for each block."""
    w, b = params["shared"]["kernel"], params["shared"]["bias"]
    norm, out = params["rest"][2].blocks[1], params["rest"][4]
    x = jnp.tanh(x @ w + b)
    for i in range(n):
        z = x @ w + b
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)
        x = jnp.tanh(z * norm["scale"][i] + norm["bias"][i])
    return x @ w.T @ out["kernel"] + out["bias"]


def loss_of(function):
    return lambda params: jnp.mean(fnn.losses.cross_entropy(function(params, X), Y))


def test_values_and_gradients_are_those_of_a_net_written_by_hand():
    layer = net()
    params, state = layer.init(KEY, X)
    assert set(params) == set(state) == {"shared", "rest"}
    assert tree.size(params) == 72 + 3 * 16 + 27 and tree.paths(params)[-2:] == ["shared/bias", "shared/kernel"]

    def apply(params, x):
        return layer.apply(params, state, x, train=True)[0]

    np.testing.assert_allclose(apply(params, X), by_hand(params, X), rtol=1e-5, atol=1e-6)
    found, expected = (jax.jit(jax.grad(loss_of(f)))(params) for f in (apply, by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_a_gradient_is_the_sum_over_uses():
    """Against the same net with weights of its own in each place, all equal."""
    one = fnn.shared(fnn.dense(8), lambda use: fnn.serial(use(), fnn.activation("tanh"), use(), fnn.dense(3)))
    three = fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.dense(8), fnn.dense(3))
    params, state = one.init(KEY, X)
    own, last = params["shared"], params["rest"][3]
    found = jax.jit(jax.grad(loss_of(lambda p, x: one.apply(p, state, x)[0])))(params)
    apart = jax.jit(jax.grad(loss_of(lambda p, x: three.apply(p, ((),) * 4, x)[0])))((own, (), own, last))
    total = jax.tree.map(jnp.add, apart[0], apart[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found["shared"], total)
    jax.tree.map(np.testing.assert_array_equal, found["rest"][3], apart[3])


def test_each_use_has_a_state_of_its_own():
    layer = fnn.shared(
        fnn.batch_norm(), lambda use: fnn.serial(use(), fnn.activation("relu"), use(), fnn.repeat(use(), 2))
    )
    params, state = layer.init(KEY, X)
    assert tree.size(params) == 16 and tree.size(state) == 4 * 17
    params["shared"]["scale"] = params["shared"]["scale"] + 1
    y, new = layer.apply(params, state, X, train=True)
    first, _, second, rest = new["rest"]
    np.testing.assert_allclose(first["mean"], 0.1 * X.mean(0), rtol=1e-4, atol=1e-7)
    h = jax.nn.relu(2 * (X - X.mean(0)) / jnp.sqrt(X.var(0) + 1e-5))
    np.testing.assert_allclose(second["mean"], 0.1 * h.mean(0), rtol=1e-4, atol=1e-6)
    assert rest.blocks["mean"].shape == (2, 8) and y.shape == X.shape


def test_dropout_draws_another_mask_for_each_use():
    layer = fnn.shared(fnn.dropout(0.5), lambda use: fnn.parallel(use(), use()))
    params, state = layer.init(KEY, X)
    (a, b), _ = layer.apply(params, state, X, train=True, key=KEY)
    assert 0.3 < np.mean((np.asarray(a) == 0) == (np.asarray(b) == 0)) < 0.7


@pytest.mark.parametrize("make", [optax.adam, optax.lamb, optax.contrib.muon], ids=lambda make: make.__name__)
def test_a_scan_and_blocks_written_out_train_alike(make):
    states = []
    for unroll in (1, True):
        layer, optimizer = net(3, unroll), make(1e-2)
        step = fnn.train_step(layer, fnn.losses.cross_entropy, optimizer)
        state = fnn.TrainState.create(layer, optimizer, KEY, X)
        for _ in range(10):
            state, _ = step(state, (X, Y))
        states.append(state)
    for name in ("kernel", "bias"):
        a, b = (state.params["shared"][name] for state in states)
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_single_examples_flow_and_packed_optimizers():
    layer = fnn.shared(
        fnn.dense(8),
        lambda use: fnn.serial(fnn.repeat(fnn.serial(use(), fnn.activation("tanh"), fnn.tap()), 4), fnn.dense(3)),
    )
    params, state = started(layer.init, X)
    example_loss = fnn.example_loss(layer, (params, state))
    norms = fnn.per_example(example_loss)(params, (X, Y)).norms()
    grads = jax.jit(jax.vmap(jax.grad(example_loss), (None, 0)))(params, (X, Y))
    squares = sum(np.square(g).reshape(16, -1).sum(1) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-5)
    flow = fnn.gradient_flow(layer, (params, state), (X, Y))
    grads = jax.jit(jax.grad(loss_of(lambda p, x: layer.apply(p, state, x, train=True)[0])))(params)
    (row,) = (row for row in flow.rows if row.path == "shared/kernel" and row.quantity == "log10_kernel")
    assert row.value == pytest.approx(np.log10(np.linalg.norm(grads["shared"]["kernel"])), abs=1e-5)

    def loss(params, batch):
        return jnp.mean(fnn.losses.cross_entropy(layer.apply(params, state, batch[0])[0], batch[1]))

    watched = fnn.watch(loss)(params, (X, Y))
    assert watched.flat()["shared/kernel/log10_gradient"] == pytest.approx(row.value, abs=1e-5)
    optimizer = fnn.optimizers.packed(optax.adam(1e-2))
    step = fnn.train_step(layer, fnn.losses.cross_entropy, optimizer, compute_dtype=jnp.bfloat16)
    before = fnn.TrainState.create(layer, optimizer, KEY, X)
    after, metrics = step(jax.tree.map(jnp.copy, before), (X, Y))
    assert float(metrics["loss"]) == pytest.approx(float(loss(before.params, (X, Y))), rel=1e-2)
    moved = np.abs(np.asarray(after.params["shared"]["kernel"] - before.params["shared"]["kernel"]))
    np.testing.assert_allclose(moved, 1e-2, rtol=1e-2)  # Adam's first step: each number once, by its rate


def test_embeddings_masks_and_shared_layers_inside_one_another():
    tokens = np.array([[3, 1, 0], [2, 0, 0]])

    def build(use):
        out = use(lambda params, x: x @ params["embedding"].T)
        return fnn.serial(use(), fnn.gru(4), fnn.take_last(), out)

    layer = fnn.shared(fnn.embed(5, 4, padding=0), build)
    params, state = started(layer.init, tokens)
    embedded = fnn.serial(fnn.embed(5, 4, padding=0), fnn.gru(4), fnn.take_last())
    parts = (params["shared"], *params["rest"][1:3]), ((), *state["rest"][1:3])
    inner = np.asarray(jax.jit(embedded.apply)(*parts, tokens)[0])
    want = inner @ np.asarray(params["shared"]["embedding"]).T
    np.testing.assert_allclose(jax.jit(layer.apply)(params, state, tokens)[0], want, rtol=1e-6, atol=1e-6)

    def twice(a):
        return fnn.shared(fnn.serial(a(), fnn.dense(8)), lambda b: fnn.serial(a(), b(), b()))

    nested = fnn.shared(fnn.dense(8), twice)
    params, state = started(nested.init, X)
    w, v = jax.device_get((params["shared"], params["rest"]["shared"][1]))
    assert tree.size(params) == 2 * 72

    def affine(p, x):
        return x @ p["kernel"] + p["bias"]

    expected = affine(v, affine(w, affine(v, affine(w, affine(w, np.asarray(X))))))
    np.testing.assert_allclose(jax.jit(nested.apply)(params, state, X)[0], expected, rtol=1e-4, atol=1e-5)


def test_one_block_of_attention_in_every_layer_decodes_as_it_predicts():
    """Each use has a cache of its own."""
    block = fnn.serial(fnn.residual(fnn.attention(2, causal=True, rotary=True)), fnn.layer_norm())
    body = fnn.shared(block, lambda use: fnn.repeat(use(), 3))
    layer = fnn.tied(11, 8, body)
    prompt = np.array([[1, 2, 3], [4, 5, 6]])
    params, state = started(layer.init, prompt)
    assert tree.size(params["body"]["shared"]) == 4 * 72 + 16
    found = fnn.generate(layer, params, state, prompt, 4)
    tokens, predict = np.zeros((2, 7), np.int32), jax.jit(layer.apply)  # nothing before sees the zeros behind
    tokens[:, :3] = prompt
    for i in range(3, 7):
        tokens[:, i] = np.argmax(predict(params, state, tokens)[0], axis=-1)[:, i - 1]
    np.testing.assert_array_equal(found, tokens[:, 3:])


def test_equal_nets_share_a_program_and_others_do_not():
    def key(build):
        return compiled.key((fnn.shared(fnn.dense(8), build),))

    assert key(lambda use: fnn.serial(use(), use())) == key(lambda use: fnn.serial(use(), use()))
    assert key(lambda use: fnn.serial(use(), use())) != key(lambda use: fnn.serial(use(), fnn.dense(8)))
    first, second = net(), net()
    params, state = first.init(KEY, X)
    assert fnn.evaluate(first, (params, state), (X, Y)) == fnn.evaluate(second, (params, state), (X, Y))
    again, _ = jax.jit(lambda key: second.init(key, X))(KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, again)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"shared: the net must use the layer, got no use\(\) in it"):
        fnn.shared(fnn.dense(8), lambda use: fnn.dense(3)).init(KEY, X)
    with pytest.raises(ValueError, match=r"shared: the net must use the layer"):
        fnn.shared(fnn.dense(8), lambda use: use(lambda params, x: x)).init(KEY, X)
    early = fnn.shared(fnn.dense(8), lambda use: fnn.serial(use(lambda params, x: x @ params["kernel"].T), use()))
    with pytest.raises(ValueError, match=r"the first use must be use\(\)"):
        early.init(KEY, X)
    with pytest.raises(
        TypeError, match=r"shared: needs a Layer and a function use -> net, got dense\(8\) and dense\(3\)"
    ):
        fnn.shared(fnn.dense(8), fnn.dense(3))
    with pytest.raises(TypeError, match="shared: build must return a Layer, got function"):
        fnn.shared(fnn.dense(8), lambda use: use)
    outside = []
    fnn.shared(fnn.dense(8), lambda use: outside.append(use()) or use())
    with pytest.raises(ValueError, match=r"shared: a use\(\) must stand inside the net that build returns"):
        outside[0].init(KEY, X)
    with pytest.raises(ValueError, match="dense: the input must be") as error:
        fnn.shared(fnn.dense(5), lambda use: fnn.serial(use(), use())).init(KEY, X)
    assert error.value.__notes__[0] == "in layer rest/1, input float32[16,5]"
