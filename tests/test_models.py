"""Models: convolutional nets in Flax on the same weights, residual nets that start as the identity, depth, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, by_layer, randomized

import fnn
from fnn.study import summary

pl = pytest.importorskip("polars")

KEY = jax.random.key(0)


def image(dtype=jnp.float64):
    return as_jax(np.random.default_rng(0).normal(size=(4, 5, 6, 2)), dtype)


class Weights:
    """Apply Flax's layers with our arrays, one after another."""

    def __init__(self, params):
        self.left = by_layer(zip(fnn.tree.paths(params), jax.tree.leaves(params), strict=True))

    def take(self, module, x):
        params = self.left.pop(0)
        return module.apply({"params": params}, x)

    def conv(self, x, n, window=3, stride=1, bias=False):
        return self.take(nn.Conv(n, (window, window), stride, use_bias=bias, dtype=x.dtype), x)

    def norm(self, x):
        stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
        module = nn.BatchNorm(use_running_average=False, use_fast_variance=False, dtype=x.dtype)
        y, _ = module.apply({"params": self.left.pop(0), "batch_stats": stats}, x, mutable="batch_stats")
        return nn.relu(y)

    def dense(self, x, n):
        return self.take(nn.Dense(n, dtype=x.dtype), x)


def compare(net, x, reference):
    params, state = jax.jit(net.init)(KEY, x)
    params = randomized(params)

    @jax.jit
    def both(params):
        expected, theirs = reference(params)
        assert not theirs.left
        return net.apply(params, state, x, train=True)[0], expected

    np.testing.assert_allclose(*both(params), atol=1e-10)


def test_convnet_equals_flax(x64):
    x, net = image(), fnn.models.convnet([3, 4], 5, convs=2)

    def reference(params):
        theirs, h = Weights(params), x
        for stage, n in enumerate((3, 4)):
            for _ in range(2):
                h = theirs.norm(theirs.conv(h, n))
            h = nn.max_pool(h, (2, 2), (2, 2), "SAME") if stage == 0 else h
        return theirs.dense(h.reshape(4, -1), 5), theirs

    compare(net, x, reference)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_equals_flax(block, x64):
    x, net = image(), fnn.models.resnet([2, 1], 5, width=3, block=block)

    def reference(params):
        theirs = Weights(params)

        def branch(h, n, stride):
            if block == "basic":
                return theirs.conv(theirs.norm(theirs.conv(h, n, stride=stride)), n)
            h = theirs.norm(theirs.conv(h, n, 1))
            return theirs.conv(theirs.norm(theirs.conv(h, n, 3, stride)), 4 * n, 1)

        def changing(h, n, stride):
            h = theirs.norm(h)
            return theirs.conv(h, n if block == "basic" else 4 * n, 1, stride) + branch(h, n, stride)

        h = theirs.conv(x, 3)
        h = h + branch(theirs.norm(h), 3, 1) if block == "basic" else changing(h, 3, 1)
        h = h + branch(theirs.norm(h), 3, 1)
        h = theirs.norm(changing(h, 6, 2))
        assert h.shape[1:3] == (3, 3)
        return theirs.dense(h.mean((1, 2)), 5), theirs

    compare(net, x, reference)


def test_skip_init_and_fixup_start_as_the_identity():
    x = image(jnp.float32)
    net = fnn.models.resnet([3], 5, width=4, norm=None, scaling="skip_init", activation="relu")
    params, state = jax.jit(net.init)(KEY, x)
    stem, _ = fnn.conv(4, 3, bias=False).apply(params[0], (), x)
    h = jax.nn.relu(stem).mean((1, 2))
    expected = h @ params[-1]["kernel"] + params[-1]["bias"]
    np.testing.assert_allclose(jax.jit(net.apply)(params, state, x)[0], expected, atol=1e-5)
    net = fnn.models.resnet([3], 5, width=64, norm=None, scaling="fixup")
    params, state = jax.jit(net.init)(KEY, x)
    np.testing.assert_array_equal(jax.jit(net.apply)(params, state, x)[0], 0)
    kernels = [leaf for leaf in jax.tree.leaves(params[1]) if leaf.ndim >= 4]
    stds = [float(np.std(kernel)) for kernel in kernels]
    # He's std times L^(-1/2), L = 3 branches of m = 2 convs; the last conv of each starts at zero. 36,864 draws: the
    # standard error of a std is 0.4 % of it.
    he = np.sqrt(2 / (9 * 64))
    np.testing.assert_allclose([s for s in stds if s > 0], he / np.sqrt(3), rtol=0.03)
    assert stds.count(0.0) == len(stds) / 2


def test_normless_resnet_trains_at_depth_64():
    x = image(jnp.float32)
    net = fnn.models.resnet([64], 5, width=4, norm=None, scaling="skip_init")
    params, state = jax.jit(net.init)(KEY, x)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, state, x)[0])))(params)
    # Every branch's gain has a gradient of the order of the features, whatever the depth.
    gains = [leaf for path, leaf in zip(fnn.tree.paths(grads), jax.tree.leaves(grads), strict=True) if "scale" in path]
    values = np.abs(np.concatenate([np.ravel(g) for g in gains]))
    assert values.shape == (64,) and np.isfinite(values).all() and 0.01 < np.median(values) < 100


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: fnn.models.convnet([2], 4, convs=2, taps=True), 3),
        (lambda: fnn.models.rnn(1, 4, 4, vocabulary=9, taps=True), 1),
        # test_cross_attention measures a transformer, and convnet has what a resnet's taps are behind
        pytest.param(lambda: fnn.models.resnet([1, 1], 4, width=2, taps=True), 2, marks=pytest.mark.slow),
        pytest.param(
            lambda: fnn.models.encoder(9, 1, 8, fnn.models.Block(heads=2, taps=True), outputs=4),
            2,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["convnet", "rnn", "resnet", "encoder"],
)
def test_models_report_gradient_flow(make, least, request):
    of_images = request.node.callspec.id in ("convnet", "resnet")
    x = image(jnp.float32) if of_images else as_jax(np.random.default_rng(0).integers(0, 9, (4, 6)))
    net = make()
    flow = fnn.gradient_flow(net, jax.jit(net.init)(KEY, x), (x, jnp.array([0, 1, 2, 3])))
    errors = [row for row in flow.rows if row.quantity == "log10_error"]
    assert len(errors) >= least and np.isfinite([row.value for row in errors]).all()


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_resnet_has_a_tap_in_every_block(block):
    net = fnn.models.resnet([2, 1], 4, width=2, block=block, taps=True)
    _, state = jax.eval_shape(net.init, KEY, image(jnp.float32))
    roles = [tap.role for _, tap in fnn.taps.listed(state)]
    assert roles.count("sum") == 3 and {"preactivation", "activation"} < set(roles)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: fnn.models.convnet([], 3), "convnet: stages must be a positive integer, got 0"),
        (
            lambda: fnn.models.resnet([1], 3, norm=None),
            "branches need either a norm, or scaling='skip_init' or 'fixup'",
        ),
        (lambda: fnn.models.resnet([1], 3, scaling="fixup"), "got norm='batch_norm', scaling='fixup'"),
        (lambda: fnn.models.resnet([1], 3, block="bottle"), "did you mean 'bottleneck'?"),
        (lambda: fnn.models.rnn(1, 3, 2, bidirectional=True), "needs an even width, got 3"),
        (lambda: fnn.models.rnn(1, 3, 2, cell="lstn"), "did you mean 'lstm'?"),
        (
            lambda: fnn.models.decoder(5, 1, 4, fnn.models.Block(2, positions="learned")),
            "decoder: learned positions, and only they, need longest=, got 'learned' and None",
        ),
        (lambda: fnn.models.encoder(None, 1, 4), "encoder: without a vocabulary it needs outputs="),
        (
            lambda: fnn.models.translator(5, 1, 4, fnn.models.Block(norm_position="last")),
            "translator: unknown norm_position 'last'",
        ),
        (lambda: fnn.models.translator(5, 1, 4, encoder_depth=0), "encoder_depth must be a positive integer, got 0"),
        (lambda: fnn.models.decoder(5, 1, 4, fnn.models.Block(norm=None)), "decoder: blocks need a norm, got None"),
        (lambda: fnn.scalar_affine(None), "scalar_affine: needs a scale or a bias"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(ValueError) as refusal:
        make()
    assert sentence in str(refusal.value)


def test_depth_is_the_number_of_hidden_layers_where_theory_stands_beside_measurement():
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(16, 20)).astype(np.float32), rng.integers(0, 3, 16))
    grid = fnn.grid.product(depth=[1, 3], width=512, activation="tanh", norm="none", sigma_w=1.5, batch_size=16)
    table = (
        fnn.Study(grid, seeds=6, steps=0, data=(data, data), quantities=("log10_error", "second_moment")).run().table()
    )
    before = table.filter(pl.col("path").str.ends_with("preactivation"))
    for depth in (1, 3):
        net = fnn.models.mlp(depth, 512, 3)
        kernels = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(net.init, KEY, data[0])[0]) if leaf.ndim == 2]
        assert kernels == [(20, 512), *[(512, 512)] * (depth - 1), (512, 3)]
        rows = before.filter((pl.col("depth") == depth) & (pl.col("quantity") == "log10_error")).sort("seed", "layer")
        measured, predicted = (rows[name].to_numpy().reshape(6, depth + 1) for name in ("value", "predicted"))
        # Theory speaks of the layers 1 to depth, and goes through the last of them; the output layer is one more.
        assert np.isnan(predicted[:, depth]).all() and np.isfinite(predicted[:, :depth]).all()
        np.testing.assert_allclose(predicted[:, depth - 1], measured[:, depth - 1], rtol=1e-12)
        first = before.filter(
            (pl.col("depth") == depth) & (pl.col("quantity") == "second_moment") & (pl.col("layer") == 1)
        )
        setting = {"activation": "tanh", "sigma_w": 1.5, "sigma_b": 0.0, "width": 512, "q0": first["value"].median()}
        curve = fnn.meanfield.predict(depth, **setting).mean_log_error
        # Theory draws 32 nets with this batch: the mean of one example to 0.01 a layer.
        np.testing.assert_allclose(
            predicted[:, :depth] - predicted[:, depth - 1 : depth], np.tile(curve / np.log(10), (6, 1)), atol=0.015
        )
        # Six seeds at width 512: a layer adds a spread of about 0.43/sqrt(6 · 512) = 0.01; it adds 0.04 and more to the curve.
        np.testing.assert_allclose((measured - predicted)[:, :depth].mean(axis=0), 0, atol=0.025)
    # One hidden layer has no growth: neither measured nor predicted.
    network = summary.summarize(table).networks.row(0, named=True)
    assert network["depth"] == 1 and network["log10_growth"] is None and network["log10_growth_predicted"] is None


def test_a_head_is_an_activation_behind_the_output_layer():
    x = jnp.ones((3, 4))
    plain, with_head = (fnn.models.mlp(1, 5, 6, head=head) for head in ("identity", "softmax"))
    (params, state), (more, with_state) = plain.init(KEY, x), with_head.init(KEY, x)
    logits, probabilities = plain.apply(params, state, x)[0], with_head.apply(more, with_state, x)[0]
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-6)
