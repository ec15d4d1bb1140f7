"""`loss_scaled`: training in float16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import optimizers
from fnn.training import loss_scale

X = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
Y = np.arange(32) % 3
NET = fnn.serial(fnn.dense(4), fnn.repeat(fnn.serial(fnn.dense(4), fnn.batch_norm(), fnn.activation("tanh")), 2))


def small(outputs, y):
    """A loss whose gradients are below 6e-8, where float16 ends."""
    return 1e-8 * jnp.sum((outputs - jax.nn.one_hot(y, 4)) ** 2, axis=-1)


def run(tx, steps, loss=small, **options):
    state = fnn.TrainState.create(NET, tx, jax.random.key(0), X)
    step, found = fnn.train_step(NET, loss, tx, **options), []
    for x in steps:
        state, metrics = step(state, (X * x, Y))
        found.append(
            jax.device_get((jax.tree.map(jnp.copy, (state.params, state.net_state, state.opt_state)), metrics))
        )
    return found


def test_gradients_that_float16_loses_are_those_of_float32():
    tx = optimizers.loss_scaled(optax.sgd(1.0), 2.0**15)
    wide, lost, found = (
        run(t, [1.0], compute_dtype=d)[0][1]["grad_norm"]
        for t, d in ((optax.sgd(1.0), None), (optax.sgd(1.0), jnp.float16), (tx, jnp.float16))
    )
    assert found == pytest.approx(wide, rel=5e-3)
    assert abs(lost - wide) > 0.1 * wide


def test_in_float32_a_scale_changes_nothing():
    for loss in (fnn.losses.cross_entropy, small):
        plain, scaled = (run(t, [1.0] * 3, loss) for t in (optax.adam(0.1), optimizers.loss_scaled(optax.adam(0.1))))
        for (a, _, _), b in zip(*[[(r[0][0], r[0][1], r[1]) for r in rows] for rows in (plain, scaled)], strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b[0])
        jax.tree.map(np.testing.assert_array_equal, plain[-1][1], scaled[-1][1])


def test_a_step_that_is_not_finite_is_skipped_and_halves_the_scale():
    tx = optimizers.loss_scaled(optax.adam(0.1), 8, period=2)
    rows = run(tx, [1.0, np.nan, 1.0, 1.0, 1.0, np.inf])
    scales = [float(optimizers.scale_of(opt_state)) for (_, _, opt_state), _ in rows]
    assert scales == [8, 4, 4, 8, 8, 4]
    for before, after in ((0, 1), (4, 5)):
        (params, net_state, opt_state), _ = rows[before]
        (new_params, new_net_state, new_opt_state), metrics = rows[after]
        kept = (params, net_state, opt_state.inner), (new_params, new_net_state, new_opt_state.inner)
        jax.tree.map(np.testing.assert_array_equal, *kept)
        assert metrics["update_ratio"] == 0 and not np.isfinite(metrics["grad_norm"])
    assert rows[2][0][2].inner[0].count == 2


def test_a_run_without_gradients_keeps_a_scale_that_works():
    tx = optimizers.loss_scaled(optax.sgd(0.1), 2.0**22, period=1)
    rows = run(tx, [1.0] * 8, lambda outputs, y: jnp.zeros(len(y)))
    assert [float(np.log2(optimizers.scale_of(opt_state))) for (_, _, opt_state), _ in rows] == [23] + [24] * 7


def test_a_scale_that_float16_does_not_hold_divides_float16_gradients():
    grads = {"w": jnp.array([1024.0, -512.0], jnp.float16)}
    found = jax.jit(loss_scale.unscaled)(grads, jnp.float32(2.0**18))
    assert found["w"].dtype == jnp.float16
    np.testing.assert_array_equal(found["w"], np.float16([2.0**-8, -(2.0**-9)]))


def test_an_overflow_of_float16_finds_its_scale():
    tx = optimizers.loss_scaled(optax.sgd(0.1), 2.0**40)
    rows = run(tx, [1.0] * 40, lambda outputs, y: 1e8 * small(outputs, y), compute_dtype=jnp.float16)
    ends = [bool(np.isfinite(metrics["grad_norm"])) for _, metrics in rows]
    assert not any(ends[:15]) and sum(ends[-10:]) >= 8
    assert float(optimizers.scale_of(rows[-1][0][2])) == 2.0 ** (40 - ends.count(False))


def test_what_does_not_go_with_a_scale_is_refused():
    with pytest.raises(
        ValueError, match=r"optimizers\.loss_scaled: initial must be a power of two, at least 1, got 1000"
    ):
        optimizers.loss_scaled(optax.sgd(0.1), 1000)
    tx = optimizers.loss_scaled(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match="train_step: per_example must be None with optimizers.loss_scaled, got 'norms'"
    ):
        run(tx, [1.0], fnn.losses.cross_entropy, per_example="norms")
    with pytest.raises(ValueError, match=r"optimizers\.loss_scaled: an optimiser must hold one of it, got 2"):
        run(optax.chain(tx, tx), [1.0])
