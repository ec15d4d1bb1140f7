"""Reports of clips: by hand, in chains, and of clips that see a part of the gradient, or not every step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax

import fnn
from fnn.training import clip
from fnn.tree import Stacked


def steps_of(tx, targets, batch=8):
    """Metrics of steps of a linear net on targets of several sizes; a NaN target makes the gradient NaN."""
    net = fnn.serial(fnn.dense(5), fnn.dense(2))
    x = as_jax(np.random.default_rng(1).normal(size=(batch, 4)), jnp.float32)
    state = fnn.TrainState.create(net, tx, jax.random.key(0), x)
    step = fnn.train_step(net, lambda y, t: jnp.sum((y - t) ** 2, axis=1), tx)
    found, grads = [], []

    @jax.jit
    @jax.grad
    def gradient(p, t, s=state.net_state):
        return jnp.mean(jnp.sum((net.apply(p, s, x)[0] - t) ** 2, axis=1))

    for target in targets:
        t = np.full((batch, 2), target, np.float32)
        grads.append(jax.device_get(gradient(state.params, t)))
        state, metrics = step(state, (x, t))
        found.append(jax.device_get(metrics))
    return found, grads


def norm64(tree):
    return math.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(tree)))


def scaled(node, limit):
    norm = norm64(node)
    return jax.tree.map(lambda a: a * min(1, limit / norm), node)


def test_reports_by_hand():
    g = {"a": np.array([0.5, 2.0, -3.0], np.float32), "b": np.array([[3.0, 0.0], [4.0, 0.5]], np.float32)}
    w = {"a": np.array([1.0, 2.0, 2.0], np.float32), "b": np.array([[0.0, 0.0], [2.0, 0.0]], np.float32)}
    before = math.sqrt(0.25 + 4 + 9 + 9 + 16 + 0.25)
    wanted = {
        # 2, -3, 3 and 4 of seven numbers
        clip.by_value(1.0): (4 / 7, before, math.sqrt(0.25 + 1 + 1 + 1 + 1 + 0.25)),
        # -3 stays
        clip.from_above(1.0): (3 / 7, before, math.sqrt(0.25 + 1 + 9 + 1 + 1 + 0.25)),
        clip.by_global_norm(2.0): (1, before, 2),
        clip.by_global_norm(10.0): (0, before, before),
        # |a| = 3.64, |b| = 5.02
        clip.by_block_norm(4.0): (1 / 2, before, math.sqrt(13.25 + 16)),
        # units: a (|w| 3, |g| 3.64) clipped to 3; column (2, 5) clipped to 2; column (eps 1e-3, ½) clipped to 1e-3
        clip.adaptive(1.0): (1, before, math.sqrt(9 + 4 + 1e-6)),
        clip.adaptive(1.5): (2 / 3, before, math.sqrt(13.25 + 9 + 2.25e-6)),
    }

    @jax.jit
    def run(g, w):
        return [tx.update(g, tx.init(w), w)[1] for tx in wanted]

    for report, numbers in zip(run(g, w), wanted.values(), strict=True):
        np.testing.assert_allclose(report[:3], numbers, rtol=1e-6)
        assert {leaf.dtype for leaf in report[:3]} == {jnp.dtype("float32")}


def test_reports_are_found_in_chains_and_per_depth_gives_scalars():
    inner = optax.chain(clip.by_value(1.0), optax.trace(0.9))
    transformation = optax.chain(
        inner, clip.by_global_norm(2.0), fnn.optimizers.per_depth(clip.by_block_norm(0.5)), optax.sgd(0.1)
    )
    g = {"out": np.array([3.0, 4.0], np.float32), "in": Stacked(np.array([[0.1, 0], [0.6, 0.8]], np.float32))}
    state = transformation.init(g)
    assert [type(r) for r in clip.reports(state)] == [clip.ClipState] * 3
    _, state = jax.jit(transformation.update)(g, state)
    by_value, by_norm, by_block = clip.reports({"optimizer": [state]})
    after = math.sqrt(1 + 1 + 0.01 + 1)
    np.testing.assert_allclose(by_value[:3], [2 / 6, math.sqrt(25 + 0.01 + 1), after], rtol=1e-6)
    np.testing.assert_allclose(by_norm[:3], [0, after, after], rtol=1e-6)
    # two of three blocks, of norms sqrt 2 and 1, to a half each
    np.testing.assert_allclose(by_block[:3], [2 / 3, after, math.sqrt(0.25 + 0.01 + 0.25)], rtol=1e-6)
    assert clip.reports(optax.adam(0.1).init(g)) == [] and clip.reports(()) == []


def test_clip_reports_of_parts_are_over_all_arrays():
    """masked, multi_transform, and both in a row, against the arrays clipped by hand."""

    def kernels(params):
        return jax.tree.map(lambda a: a.ndim > 1, params)

    def labels(params):
        return jax.tree.map(lambda a: "k" if a.ndim > 1 else "b", params)

    def parts(g):
        return [g[0]["kernel"], g[1]["kernel"]], [g[0]["bias"], g[1]["bias"]]

    one, other = clip.by_global_norm(0.01), clip.by_global_norm(0.3)
    cases = {
        "masked": (optax.masked(one, kernels), lambda k, b: (scaled(k, 0.01), b)),
        "multi": (
            optax.multi_transform({"k": one, "b": other}, labels),
            lambda k, b: (scaled(k, 0.01), scaled(b, 0.3)),
        ),
        "part_then_all": (
            optax.chain(optax.masked(one, kernels), other),
            lambda k, b: scaled((scaled(k, 0.01), b), 0.3),
        ),
        "all_then_part": (
            optax.chain(other, optax.masked(one, kernels)),
            lambda k, b: (lambda both: (scaled(both[0], 0.01), both[1]))(scaled((k, b), 0.3)),
        ),
        "frozen": (fnn.optimizers.freeze(one, "*/bias"), lambda k, b: (scaled(k, 0.01), b)),
        "packed": (fnn.optimizers.packed(one), lambda k, b: scaled((k, b), 0.01)),
    }
    for tx, by_hand in cases.values():
        (metrics,), (g,) = steps_of(optax.chain(tx, optax.sgd(0.1)), [3.0])
        before, after = norm64(g), norm64(by_hand(*parts(g)))
        np.testing.assert_allclose(metrics["grad_norm"], before, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm_clipped"], after, rtol=1e-4)
        np.testing.assert_allclose(metrics["clip_removed"], 1 - after / before, rtol=1e-4)
        assert 0 < metrics["clip_fraction"] <= 1


def test_a_zero_gradient_has_nothing_removed():
    net = fnn.dense(2)
    x = jnp.ones((4, 3))
    tx = optax.chain(clip.by_global_norm(1.0), optax.sgd(0.1))
    state = fnn.TrainState.create(net, tx, jax.random.key(0), x)
    _, metrics = fnn.train_step(net, lambda y, t: 0 * y[:, 0], tx)(state, (x, jnp.zeros(4)))
    assert abs(metrics["clip_removed"]) < 1e-6 and metrics["grad_norm_clipped"] == 0


@pytest.mark.parametrize("stacked", [False, True])
def test_skipped_and_accumulating_steps_report_nan(stacked):
    inner = optax.chain(clip.by_global_norm(0.5), optax.sgd(0.01))
    wrap = fnn.optimizers.per_depth if stacked else (lambda tx: tx)
    found, _ = steps_of(wrap(optax.MultiSteps(inner, 3)), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert [bool(np.isnan(m["clip_removed"])) for m in found] == [True, True, False] * 2
    assert [bool(np.isnan(m["grad_norm_clipped"])) for m in found] == [True, True, False] * 2
    found, _ = steps_of(wrap(optax.apply_if_finite(inner, 5)), [1.0, np.nan, 2.0])
    assert [bool(np.isnan(m["clip_removed"])) for m in found] == [False, True, False]
    assert found[2]["grad_norm_clipped"] == pytest.approx(0.5)


def test_history_averages_over_the_reports_that_there_are():
    train = {"clip_removed": np.array([np.nan, 0.5, np.nan, 0.7]), "loss": np.array([1.0, np.nan, 2.0, 4.0])}
    history = fnn.History(train, {}, (2, 2), None, False)
    np.testing.assert_array_equal(history.by_epoch("clip_removed"), [0.5, 0.7])
    np.testing.assert_array_equal(history.by_epoch("loss"), [np.nan, 3.0])  # a loss that is NaN stays visible


def test_an_infinite_gradient_has_no_norm_after_clipping():
    g = {"a": jnp.array([jnp.inf, 1.0])}
    tx = clip.by_global_norm(1.0)
    updates, report = tx.update(g, tx.init(g))
    assert jnp.isnan(updates["a"][0]) and jnp.isnan(report.after) and report.before == jnp.inf


def test_a_clip_of_the_gradient_and_one_of_the_update_have_one_unit():
    """What is between them, here a factor of 100 or Adam, is no part of what was clipped."""
    (_,), (g,) = steps_of(optax.sgd(0.1), [3.0])
    size = norm64(g)
    for first, second, kept in ((2.0, 200.0, 1), (0.5, 200.0, 0.5), (2.0, 25.0, 0.25), (0.5, 25.0, 0.25)):
        tx = optax.chain(
            clip.by_global_norm(first * size), optax.scale(100.0), clip.by_global_norm(second * size), optax.sgd(0.1)
        )
        (metrics,), _ = steps_of(tx, [3.0])
        np.testing.assert_allclose(metrics["grad_norm_clipped"], kept * size, rtol=1e-5)
        np.testing.assert_allclose(metrics["clip_removed"], 1 - kept, rtol=1e-5, atol=1e-6)
    adam = optax.chain(clip.by_global_norm(1e9), optax.adam(1e-3), clip.by_global_norm(1e9))
    (metrics,), _ = steps_of(adam, [3.0])
    assert abs(metrics["clip_removed"]) < 1e-6 and metrics["grad_norm_clipped"] == pytest.approx(size, rel=1e-5)
