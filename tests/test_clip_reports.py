"""Reports of clips that see a part of the gradient, or not every step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn.training import clip


def steps_of(tx, targets, batch=8):
    """Metrics of steps of a linear net on targets of several sizes; a NaN target makes the gradient NaN."""
    net = fnn.serial(fnn.dense(5), fnn.dense(2))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, 4)), jnp.float32)
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
    assert metrics["clip_removed"] == 0 and metrics["grad_norm_clipped"] == 0


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
