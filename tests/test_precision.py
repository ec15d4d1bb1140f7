"""Computing in bfloat16: which products are in it, that sums, statistics and losses are not, one computation for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ON_CPU, as_jax, begun, started

import fnn
from fnn import losses, models

KEY = jax.random.key(0)
TOKENS = as_jax(np.random.default_rng(0).integers(1, 9, (4, 5)))
CLASSES = jnp.array([0, 1, 2, 0])
BOTH = {"source": TOKENS, "target": TOKENS[:, ::-1]}
OPTIMIZER = optax.sgd(0.0)
BF16 = jnp.bfloat16


def grouped():
    return fnn.serial(fnn.embed(9, 8), fnn.attention(4, kv_heads=2), fnn.global_avg_pool(), fnn.dense(3))


def mixed():
    image = fnn.serial(fnn.conv(4, 2), fnn.batch_norm(), fnn.global_avg_pool())
    words = fnn.serial(fnn.embed(9, 4), fnn.repeat(fnn.gru(4), 2), fnn.take_last())
    return fnn.serial(fnn.branches({"image": image, "words": words}), fnn.sum_inputs(), fnn.dense(3))


def table():
    """A layer of tokens that knows nothing of fnn's: its table has another name."""

    def draw(key, spec):
        return {"vectors": jax.random.normal(key, (9, 4))}

    return fnn.serial(fnn.stateless(draw, lambda p, x: p["vectors"][x]), fnn.gru(4), fnn.take_last(), fnn.dense(3))


NETS = {
    "decoder": (models.decoder(9, 2, 8, models.Block(heads=2), padding=0), TOKENS, TOKENS),
    "decoder_scanned": (
        models.decoder(9, 2, 8, models.Block(2, positions="learned", longest=5, norm_position="post", unroll=1)),
        TOKENS,
        TOKENS,
    ),
    "encoder": (models.encoder(9, 1, 8, models.Block(heads=2), outputs=3, padding=0), TOKENS, CLASSES),
    "encoder_decoder": (models.translator(9, 1, 8, models.Block(heads=2), padding=0), BOTH, TOKENS),
    "rnn": (models.rnn(2, 8, 3, cell="rnn", vocabulary=9, padding=0), TOKENS, CLASSES),
    "gru": (models.rnn(2, 8, 3, cell="gru", vocabulary=9, bidirectional=True), TOKENS, CLASSES),
    "lstm": (models.rnn(1, 8, 9, cell="lstm", vocabulary=9, every_step=True), TOKENS, TOKENS),
    "grouped_heads": (grouped(), TOKENS, CLASSES),
    "table_of_ones_own": (table(), TOKENS, CLASSES),
    "mixed_inputs": (mixed(), {"image": jnp.ones((4, 3, 3, 2)), "words": TOKENS}, CLASSES),
}


def loss_of(y):
    return losses.cross_entropy if y.ndim == 1 else losses.sequence_cross_entropy


def products(jaxpr):
    """Dtypes of the operands of every matrix product and convolution, inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield {str(v.aval.dtype) for v in equation.invars}
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
        )
        for value in inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from products(value)


@pytest.mark.parametrize("name", NETS)
def test_every_product_of_a_step_is_in_the_compute_dtype(name):
    net, x, y = NETS[name]
    state = jax.eval_shape(lambda: fnn.TrainState.create(net, OPTIMIZER, KEY, x))
    step = fnn.train_step(net, loss_of(y), OPTIMIZER, compute_dtype=BF16)
    traced, (after, metrics) = jax.make_jaxpr(step.pure, return_shape=True)(state, (x, y))
    found = list(products(traced.jaxpr))
    assert len(found) >= 6 and all(operands == {"bfloat16"} for operands in found)
    assert fnn.core.same_spec(after, state) and metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize("name", ["gru", "grouped_heads"])
def test_gradients_are_near_those_of_float32(name):
    net, x, y = NETS[name]
    params, state = started(net.init, x)

    @jax.jit
    def both(params):
        return [
            jax.value_and_grad(lambda p, n=n: jnp.mean(loss_of(y)(n.apply(p, state, x)[0], y)))(params)
            for n in (fnn.compute_in(net, BF16), net)
        ]

    (narrow, got), (wide, want) = both(params)
    assert 0 < abs(float(narrow - wide)) < 0.03
    difference = fnn.tree.norm(jax.tree.map(np.subtract, *jax.device_get((got, want))))
    assert 0 < float(difference) < 0.05 * float(fnn.tree.norm(want))


def test_training_evaluation_and_measurements_do_the_same_computation():
    x, y, loss = TOKENS, CLASSES, losses.cross_entropy
    net = fnn.serial(fnn.embed(9, 8, padding=0), fnn.attention(2), fnn.tap(), fnn.global_avg_pool(), fnn.dense(3))
    step = fnn.train_step(net, loss, OPTIMIZER, compute_dtype=BF16, per_layer=True, per_example="norms")
    state = begun(net, OPTIMIZER, x)
    _, metrics = step(jax.tree.map(jnp.copy, state), (x, y))
    narrow = fnn.evaluate(net, state, (x, y), loss=loss, compute_dtype=BF16)
    wide = fnn.evaluate(net, state, (x, y), loss=loss)
    assert narrow["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6) != pytest.approx(wide["loss"], rel=1e-6)
    _, history = fnn.fit(step, state, (x, y), epochs=1, batch_size=4, key=KEY, validation=(x, y))
    assert history.validation["loss"][0] == pytest.approx(narrow["loss"], rel=1e-6)
    of_example = fnn.example_loss(net, state, loss=loss, compute_dtype=BF16)
    norms = fnn.per_example(of_example)(state.params, (x, y)).norms()
    # On an accelerator XLA leaves out roundings to bfloat16 between operations that it fuses, in each program others.
    np.testing.assert_allclose(norms, metrics["per_example_norms"], rtol=1e-6 if ON_CPU else 1e-2)
    flow = fnn.gradient_flow(net, state, (x, y), loss=loss, compute_dtype=BF16)
    assert flow.loss == pytest.approx(float(metrics["loss"]), rel=1e-6)
    logs = {row.path: row.value for row in flow.rows if row.quantity in ("log10_kernel", "log10_embedding")}
    for path, norm in zip(fnn.tree.paths(metrics["grad_norms"]), jax.tree.leaves(metrics["grad_norms"]), strict=True):
        if path in logs:
            # An error signal times a power of two rounds as before; per-example sums add up in another order.
            assert logs[path] == pytest.approx(float(jnp.log10(norm)), abs=0.005)


def test_the_gradient_of_an_embedding_is_summed_in_float32():
    net = fnn.compute_in(fnn.embed(3, 2), BF16)
    tokens = jnp.zeros((1, 3000), int).at[0, 0].set(1)
    params, state = net.init(KEY, tokens)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, state, tokens)[0])))(params)["embedding"]
    assert slope.dtype == jnp.float32
    np.testing.assert_allclose(slope, [[2999, 2999], [1, 1], [0, 0]], rtol=2**-8)  # in bfloat16: 256


def test_statistics_stay_wide_and_losses_of_ones_own_see_float32():
    seen = []

    def mine(outputs, y):
        seen.append(outputs.dtype)
        return jnp.sum(jnp.square(outputs), axis=-1)

    net, x, y = NETS["mixed_inputs"]
    state = begun(net, OPTIMIZER, x)
    after, _ = fnn.train_step(net, mine, OPTIMIZER, compute_dtype=BF16)(jax.tree.map(jnp.copy, state), (x, y))
    assert set(seen) == {jnp.dtype(jnp.float32)} and fnn.core.same_spec(after, state)
    h = as_jax(np.random.default_rng(0).normal(100, 1, (64, 3)), BF16)
    norm = fnn.compute_in(fnn.batch_norm(), BF16)
    _, moments = norm.apply(*norm.init(KEY, h), h, train=True)
    np.testing.assert_allclose(moments["var"] / moments["weight"], np.asarray(h, np.float64).var(0), rtol=1e-4)


def test_the_same_net_and_dtype_give_the_same_layer_and_a_wrong_dtype_is_refused():
    net = fnn.dense(3)
    assert fnn.compute_in(net, BF16) is fnn.compute_in(net, "bfloat16") and fnn.compute_in(net, None) is net
    for wrong in (jnp.int8, "bfloat", complex):
        with pytest.raises(TypeError, match="compute_in: the dtype must be floating, got .*; pass jnp.bfloat16"):
            fnn.compute_in(net, wrong)


def test_norms_of_examples_in_float16_do_not_depend_on_the_size_of_the_batch():
    """A share of the mean would fall among float16's subnormals."""
    rng = np.random.default_rng(0)
    params = {"w": np.float16(rng.normal(size=(8, 6))), "v": np.float16(rng.normal(size=(6, 3)) * 1e-2)}
    x = np.float16(rng.normal(size=(512, 8)))
    found = jax.jit(fnn.per_example(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"])))
    np.testing.assert_allclose(found(params, x).norms()[:4], found(params, x[:4]).norms(), rtol=1e-3)


def test_gradients_of_float32_parameters_are_measured_in_float32_under_x64(x64):
    """Else a condition number takes float64's rounding for theirs."""
    w, x = jnp.ones((3, 2), jnp.float32), np.float32(np.random.default_rng(0).normal(size=(5, 3)))
    g = fnn.per_example(lambda p, x: jnp.sum(jnp.square(x @ p)))(w, x)
    found = g.norms(), g.gram(), g.variance(), g.mean(), g.clipped_mean(1.0).bias
    assert {a.dtype for a in found} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_moments_of_half_precision_parameters_are_those_of_unrounded_gradients(dtype):
    """The mean is rounded only when it is returned: |mean|² is a thousand times the variance here."""
    rng = np.random.default_rng(0)
    w = as_jax(rng.normal(size=(6, 4))).astype(dtype)
    x = as_jax(1 + 0.02 * rng.normal(size=(16, 6)))
    g = fnn.per_example(lambda p, x: jnp.sum(jnp.square(x @ p.astype(jnp.float32))))(w, x)
    inputs = np.asarray(x, np.float64)
    each = 2 * inputs[:, :, None] * (inputs @ np.asarray(w, np.float64))[:, None]
    mean = each.mean(0)
    variance = np.sum((each - mean) ** 2) / 15
    np.testing.assert_allclose(g.variance(), variance, rtol=0.01)
    np.testing.assert_allclose(g.signal_to_noise(), np.sum(mean**2) / variance - 1 / 16, rtol=0.01)
    norms = np.linalg.norm(each.reshape(16, -1), axis=1)
    limit = 0.999 * norms.max()
    clipped = g.clipped_mean(limit)
    kept = np.mean(each * np.minimum(1, limit / norms)[:, None, None], 0)
    np.testing.assert_allclose(clipped.bias, np.linalg.norm(kept - mean), rtol=0.05)
    assert clipped.mean.dtype == g.mean().dtype == g.weighted_sum(jnp.ones(16)).dtype == dtype
    np.testing.assert_allclose(np.asarray(g.mean(), np.float64), mean, rtol=0.01)
