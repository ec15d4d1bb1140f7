"""Gradients of any size that float32 can hold: the same directions, cosines, clipped means and ratios as those near 1."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, begun
from subjects import SUBJECTS, B, draw, flat

import fnn
from fnn import tree
from fnn.gradients import noise
from fnn.training import clip

POWERS = (-96, -64, 0, 63, 110)
"""Down to -96 only: error signals lie 2^-30 below the loss, and XLA flushes what is below 2^-126 to zero."""
KINDS = (
    *("depth", "nested", "sequences", "recurrent", "layers_inside_time", "tied", "embedding"),
    *("conv_groups", "parts", "unknown"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv", "linen")),  # of parts that are all above
)
THOROUGH = {"nested", "embedding"}


def close(got, want, scale=1.0, rounding=1e-5):
    """Compare trees, each up to rounding of its largest number."""
    for parts in zip(got, want, strict=True) if isinstance(got, list | tuple) else [(got, want)]:
        ours, theirs = ([np.asarray(a, np.float64) for a in jax.tree.leaves(part)] for part in parts)
        largest = max(np.max(np.abs(a), initial=0) for a in theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a / scale, b, rtol=0, atol=rounding * max(1e-30, largest))


@pytest.mark.parametrize("name", KINDS)
def test_every_form_of_gradient_at_every_scale(name):
    """The loss of every example times 2^k, one program for all k: loss, error signals and gradients from 1e-29 to 1e33."""
    subject = SUBJECTS[name]()

    @jax.jit
    def run(scales, max_norm):
        def loss(p, example):
            return example[1] * subject.loss(p, example[0])

        g = fnn.per_example(loss)(subject.params, (subject.batch, scales))
        clipped = g.clipped_mean(max_norm)
        fixed = [g.cosines(), clipped.fraction, clipped.nonfinite]
        grown = [g.norms(), clipped.mean, clipped.bias]
        estimates = []
        if name in THOROUGH:
            w = jnp.linspace(0.5, 2, B)
            estimates = [g.signal_to_noise(), g.signal_to_noise(per_leaf=True), noise.moments(g, unit=max_norm)]
            grown += [
                g.mean(),
                g.norms(per_leaf=True),
                g.weighted_sum(w),
                g.clipped_mean(max_norm, per_layer=True).mean,
            ]
            back = 1 / jnp.maximum(max_norm, 1e-30)  # about as far from 1 as the gradients, the other way
            grown += [jax.tree.map(lambda a: a * max_norm, g.weighted_sum(w * back))]
        return fixed, grown, estimates

    norms = np.asarray(run(jnp.ones(B), jnp.float32(1))[1][0], np.float64)
    limit = np.median(norms)
    fixed, grown, estimates = run(jnp.ones(B), jnp.float32(limit))
    for k in POWERS:
        a, b, c = run(jnp.full(B, 2.0**k, jnp.float32), jnp.float32(limit * 2.0**k))
        close(a, fixed)
        close(b, grown, 2.0**k)
        close(c, estimates, rounding=3e-4)  # differences of squares
    # Every example at a size of its own.
    powers = np.resize(POWERS, B)
    a, b, _ = run(as_jax(2.0**powers, jnp.float32), jnp.float32(1))
    np.testing.assert_allclose(a[0], fixed[0], atol=1e-5)
    np.testing.assert_allclose(np.asarray(b[0], np.float64) / 2.0**powers, norms, rtol=1e-5)


def products(form, x, d):
    """The gradients of `sum(d * (x @ w))`, with respect to w, in float64."""
    x, d = np.asarray(x, np.float64), np.asarray(d, np.float64)
    return np.einsum({"one": "bm,bn->bmn"}.get(form, "btm,btn->bmn"), x, d)


@pytest.mark.parametrize("form", ["one", "made", "gram", "growing"])
def test_a_large_factor_beside_a_small_one(form):
    """Inputs times 2^k, error signals times 2^(j-k): their squares leave the range where the gradient is near 2^j.

    `growing`: within one example inputs grow with time while error signals fall, as in a linear recurrent net.
    """
    m, n, t = {"one": (7, 5, 0), "made": (4, 3, 6), "gram": (60, 50, 2), "growing": (4, 3, 6)}[form]
    x, d = draw(B, *(t,) * bool(t), m), draw(B, *(t,) * bool(t), n, seed=1)
    if form == "growing":
        slope = 2.0 ** (30 * (np.arange(t) - t / 2))[:, None]
        x, d = x * slope, d / slope
    want = products(form, x, d).reshape(B, -1)
    norms = np.linalg.norm(want, axis=1)

    @jax.jit
    def run(p, batch, max_norm, w):
        g = fnn.per_example(lambda p, e: jnp.sum(e[1] * (e[0] @ p)))(p, batch)
        return g.norms(), g.clipped_mean(max_norm).mean, g.cosines(), g.weighted_sum(w), g.signal_to_noise()

    def expected(w):
        return np.tensordot(w, want, 1).reshape(m, n)

    trace = np.sum(np.var(want, axis=0, ddof=1))
    ratio = (np.sum(want.mean(0) ** 2) - trace / B) / trace
    for k, j in ((0, 0), (100, 0), (-100, 0), (100, 100), (-60, -110), (0, 100)) if form != "growing" else ((0, 0),):
        batch = (x * jnp.float32(2.0**k), d * jnp.float32(2.0 ** (j - k)))
        for limit in (0.7 * np.median(norms), 2.0**-j):
            weights = np.linspace(0.5, 2, B) * 2.0 ** (-j / 2)
            got = run(jnp.zeros((m, n)), batch, jnp.float32(limit * 2.0**j), as_jax(weights, jnp.float32))
            close(got[0], norms, 2.0**j)
            close(got[1], expected(np.minimum(1, limit / norms) / B), 2.0**j)
            np.testing.assert_allclose(got[2], want @ want.T / np.outer(norms, norms), atol=1e-5)
            close(got[3], expected(weights), 2.0**j)
            np.testing.assert_allclose(got[4], ratio, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "depth", "init"), [("relu", 61, fnn.initializers.scaled(3.0)), ("sigmoid", 29, "glorot_uniform")]
)
def test_exploding_and_vanishing_nets(activation, depth, init):
    layer = fnn.models.mlp(depth, 16, 3, activation=activation, init=init)
    x, y = draw(B, 16), jnp.arange(B) % 3
    params, state = layer.init(jax.random.key(1), x)
    loss = fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy)

    @jax.jit
    def both(params):
        g = fnn.per_example(loss)(params, (x, y))
        first = g[1]
        clipped = g.clipped_mean(1.0)
        oracle = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, (x, y))
        layers = g.norms(per_leaf=True), g.signal_to_noise(per_leaf=True)
        return oracle, (g.norms(), first.norms(), first.cosines(), first.signal_to_noise(), clipped), layers

    oracle, (norms, first, cosines, ratio, clipped), layers = both(params)
    vectors = flat(oracle)
    exact = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(norms, exact, rtol=1e-5)
    mean = np.mean(vectors * np.minimum(1, 1 / np.maximum(exact, 1e-30))[:, None], axis=0)
    assert 0.01 < np.linalg.norm(mean) <= 1
    np.testing.assert_allclose(tree.norm(clipped.mean), np.linalg.norm(mean), rtol=1e-5)
    assert clipped.zero == np.sum(exact == 0) and clipped.nonfinite == 0
    below = flat(oracle[1])
    sizes = np.linalg.norm(below, axis=1)
    assert not np.any((sizes > 1e-15) & (sizes < 1e15))
    seen = sizes > 0
    np.testing.assert_allclose(first, sizes, rtol=1e-5)
    with np.errstate(invalid="ignore", divide="ignore"):
        want = below @ below.T / np.outer(sizes, sizes)
    np.testing.assert_allclose(cosines, np.where(np.outer(seen, seen), want, 0), atol=1e-5)
    trace = np.sum(np.var(below, axis=0, ddof=1))
    np.testing.assert_allclose(ratio, (np.sum(below.mean(0) ** 2) - trace / B) / trace, rtol=1e-3, atol=1e-5)
    by_depth = tree.map_depth(
        lambda k, a: np.moveaxis(
            np.sqrt(np.sum(np.asarray(a, np.float64) ** 2, axis=tuple(range(1 + k, a.ndim)))), 0, -1
        ),
        oracle,
    )
    for a, b in zip(*map(jax.tree.leaves, (layers[0], by_depth)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(layers[1]))


def tree_of(k, like):
    return jax.tree.map(lambda a: a * jnp.float32(2.0**k), like)


def test_trees_at_every_scale():
    like = {"a": draw(3, 4), "b": tree.Stacked(draw(2, 5, seed=1)), "zero": jnp.zeros(2)}

    @jax.jit
    def run(a):
        largest = jnp.max(jnp.abs(a["a"]))
        pull = jax.grad(lambda a: sum(map(jnp.sum, jax.tree.leaves(tree.norms(a)))))(a)
        return [tree.norm(a), tree.norms(a), largest], [pull, jax.grad(tree.norm)(a)]

    grown, fixed = run(like)
    np.testing.assert_allclose(
        grown[1]["b"].blocks, np.linalg.norm(np.asarray(like["b"].blocks, np.float64), axis=1), rtol=1e-6
    )
    for k in range(-110, 111, 10):
        a, b = run(tree_of(k, like))
        close(a, grown, 2.0**k, 1e-6)
        close(b, fixed, rounding=1e-6)
    rows = jax.jit(jax.vmap(tree.norms))(jnp.stack([draw(5) * jnp.float32(2.0**k) for k in POWERS]))
    np.testing.assert_allclose(np.asarray(rows, np.float64) / 2.0 ** np.array(POWERS), np.full(5, rows[2]), rtol=1e-6)
    assert tree.norms({"a": jnp.float32(1e-25) * jnp.ones(4)})["a"] == pytest.approx(2e-25)
    for function in (tree.norm, tree.norms, tree.log_norms):
        with pytest.raises(TypeError, match="arrays must be real, got complex64"):
            function({"w": jnp.ones(3, jnp.complex64)})


CLIPS = {
    "by_global_norm": clip.by_global_norm,
    "by_block_norm": clip.by_block_norm,
    "by_value": clip.by_value,
    "adaptive": lambda limit: clip.adaptive(limit, eps=1.0),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips_at_every_scale(name):
    """Gradient and limit times 2^k: the clipped gradient is too, and the share that was clipped stays."""
    grads, params = {"a": draw(3, 4), "b": draw(5, seed=1)}, {"a": jnp.zeros((3, 4)), "b": jnp.zeros(5)}

    @jax.jit
    def run(grads, limit):
        transformation = CLIPS[name](limit)
        return transformation.update(grads, transformation.init(params), params)

    want, report = run(grads, jnp.float32(0.6))
    assert report.fraction > 0
    for k in POWERS:
        got, scaled = run(tree_of(k, grads), jnp.float32(0.6 * 2.0**k))
        close((got, scaled.before, scaled.after), (want, report.before, report.after), 2.0**k, 1e-6)
        np.testing.assert_allclose(scaled.fraction, report.fraction)


def test_one_example_far_larger_than_the_others():
    """Its squares overflow, and zeros beside it made NaN of them: the norms of all others are what they were."""
    p, x = draw(8, 4), draw(B, 8).at[1].set(0)

    def loss(p, example):
        return jnp.sum(example[1] * jnp.tanh(example[0] @ p))

    scales = jnp.ones(B).at[jnp.array([1, 2])].set(1e19)
    g = fnn.per_example(loss)(p, (x, scales))
    exact = np.linalg.norm(flat(jax.vmap(jax.grad(loss), in_axes=(None, 0))(p, (x, scales))), axis=1)
    assert exact[1] == 0 and exact[2] > 1e18
    np.testing.assert_allclose(g.norms(), exact, rtol=1e-5)
    clipped = g.clipped_mean(1.0)
    assert clipped.zero == 1 and clipped.nonfinite == 0


def bad_label(p, example):
    x, y = example
    return (
        jnp.where(y < 3, 1.0, jnp.nan)
        * fnn.losses.cross_entropy((x @ p["w"] + p["b"])[None], jnp.clip(y, 0, 2)[None])[0]
    )


@jax.jit
def norms_and_clipped(params, batch):
    """Norms, and clipped means by `per_layer` and `skip_nonfinite`."""
    g = fnn.per_example(bad_label)(params, batch)
    every = itertools.product((False, True), repeat=2)
    return g.norms(), {(a, b): g.clipped_mean(0.5, per_layer=a, skip_nonfinite=b) for a, b in every}


@pytest.mark.parametrize("bad", ["label", "input", "inf"])
def test_an_example_that_is_not_finite_is_seen_counted_and_skipped_if_asked(bad):
    params = {"w": draw(4, 3), "b": draw(3)}
    x, y = draw(B, 4), jnp.arange(B) % 3
    batch = {
        "label": (x, y.at[2].set(7)),
        "input": (x.at[2, 1].set(jnp.nan), y),
        "inf": (x.at[2, 1].set(jnp.inf), y),
    }[bad]
    good = np.arange(B) != 2
    norms, found = norms_and_clipped(params, batch)
    _, wanted = norms_and_clipped(params, jax.tree.map(lambda a: np.asarray(a)[good], batch))
    norms = np.asarray(norms)
    assert not np.isfinite(norms[2]) and np.isfinite(norms[good]).all()
    for per_layer in (False, True):
        clipped, skipped, want = found[per_layer, False], found[per_layer, True], wanted[per_layer, False]
        assert clipped.nonfinite == skipped.nonfinite == 1 and np.isnan(clipped.bias)
        assert np.isnan(sum(np.sum(a) for a in jax.tree.leaves(clipped.mean)))
        # The sum of the others, divided by all.
        for a, b in zip(*map(jax.tree.leaves, (skipped.mean, want.mean)), strict=True):
            np.testing.assert_allclose(a, b * (B - 1) / B, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(skipped.bias, want.bias * (B - 1) / B, rtol=1e-5)


def test_a_gradient_beyond_the_range_is_never_a_zero():
    """A finite gradient whose norm overflows, and one that the limit is 2^126 times below, are counted as not finite."""
    g = fnn.per_example(lambda p, x: jnp.sum(x * p))(jnp.zeros(100), jnp.full((2, 100), 2e38))
    assert np.isinf(g.norms()).all()
    clipped = g.clipped_mean(1.0)
    assert np.isnan(clipped.mean).all() and clipped.nonfinite == 2
    g = fnn.per_example(lambda p, x: jnp.sum(x * p))(jnp.zeros(4), jnp.array([[1e38, 0, 0, 0], [0, 1, 0, 0]]))
    clipped = g.clipped_mean(0.1)
    assert np.isnan(clipped.mean[0]) and clipped.nonfinite == 1


def test_train_step_at_every_scale_and_with_a_bad_example():
    layer = fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.dense(3))
    x, y = draw(B, 5), jnp.arange(B) % 3
    optimizer = optax.sgd(1e-3)
    state = begun(layer, optimizer, x)

    def loss(outputs, targets):
        y, scale = targets
        return scale * fnn.losses.cross_entropy(outputs, y)

    @functools.cache
    def compiled(**options):
        return jax.jit(fnn.train_step(layer, loss, optimizer, **options).pure)

    def run(scales, **options):
        return compiled(**options)(state, (x, (y, scales)))

    plain = run(jnp.ones(B), per_example="norms")[1]
    for k in (-100, 100):
        metrics = run(jnp.full(B, 2.0**k), per_example="norms")[1]
        np.testing.assert_allclose(metrics["signal_to_noise"], plain["signal_to_noise"], rtol=1e-4)
        for name in ("per_example_norms", "per_example_quantiles", "grad_norm"):
            np.testing.assert_allclose(np.asarray(metrics[name], np.float64) / 2.0**k, plain[name], rtol=1e-5)
        assert metrics["noise_trace"] == (0 if k < 0 else np.inf)
    np.testing.assert_allclose(plain["noise_signal"] / plain["noise_trace"], plain["signal_to_noise"], rtol=1e-5)
    assert plain["examples_nonfinite"] == plain["examples_zero"] == 0
    new, metrics = run(jnp.ones(B).at[0].set(jnp.nan).at[1].set(0.0), per_example="clip", max_norm=1.0)
    assert metrics["examples_nonfinite"] == metrics["examples_zero"] == 1 and np.isnan(metrics["grad_norm"])
    options = {"per_example": "clip", "max_norm": 1.0, "skip_nonfinite": True}
    new, metrics = run(jnp.ones(B).at[0].set(jnp.nan), **options)
    assert metrics["examples_nonfinite"] == 1 and np.isfinite(metrics["clip_bias"])
    zeroed, _ = run(jnp.ones(B).at[0].set(0.0), **options)
    for a, b in zip(*map(jax.tree.leaves, (new.params, zeroed.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="skip_nonfinite belongs to per_example='clip'"):
        run(jnp.ones(B), skip_nonfinite=True)
