"""Normalisation against NumPy and against Flax on the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, assert_same

import fnn

pytestmark = pytest.mark.usefixtures("optimised")


def batch(seed, mean=0.0, std=1.0, shape=(64, 5)):
    return (mean + std * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def test_batch_norm_in_eval_mode_is_right_after_1_10_and_100_steps():
    """Eval uses sum_k w_k m_k / sum_k w_k, w_k = (1 - decay) decay^(n - k): the debiased average, written out."""
    layer, decay = fnn.batch_norm(decay=0.9), 0.9
    params, state = layer.init(jax.random.key(0), batch(0))
    step = jax.jit(lambda state, x: layer.apply(params, state, x, train=True))
    evaluate = jax.jit(lambda state, x: layer.apply(params, state, x)[0])
    probe = batch(999)
    assert_same(evaluate(state, probe), probe)  # the identity before the first step
    means, variances = [], []
    for n in range(1, 101):
        x = batch(n, mean=3.0, std=2.0)
        y, state = step(state, x)
        wide = x.astype(np.float64)
        means.append(wide.mean(0))
        variances.append(wide.var(0))
        if n in (1, 10, 100):
            np.testing.assert_allclose(y, (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5), atol=2e-5)
            weights = (1 - decay) * decay ** np.arange(n - 1, -1, -1)
            mean, var = (np.tensordot(weights, m, 1) / weights.sum() for m in (means, variances))
            expected = (probe - mean) / np.sqrt(var + 1e-5)
            np.testing.assert_allclose(evaluate(state, probe), expected, atol=2e-5)


def test_batch_norm_at_mean_1000_and_std_one_hundredth():
    """float32 holds 1000 ± 0.01 to 6e-5 (its rounding at 1000), so that 0.4 % of a standard deviation is what can be had
    of the input itself; E[x²]-E[x]² gives NaN or noise here."""
    x = batch(3, mean=1000.0, std=0.01, shape=(512, 5))
    layer = fnn.batch_norm(eps=1e-10)
    params, state = layer.init(jax.random.key(0), x)
    y, state = jax.jit(lambda x: layer.apply(params, state, x, train=True))(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, (wide - wide.mean(0)) / wide.std(0), atol=0.02)
    np.testing.assert_allclose(np.std(np.asarray(y, np.float64), 0), 1, atol=2e-3)
    np.testing.assert_allclose(state["var"] / state["weight"], wide.var(0), rtol=5e-3)
    z, _ = layer.apply(params, state, x)
    np.testing.assert_allclose(z, y, atol=0.02)


def test_derivative_of_batch_norm_equals_that_of_its_formula_in_both_modes(x64):
    """The derivative is written by hand; the formula's own, by autodiff in float64, is its judge, for all inputs."""
    x, t = (as_jax(batch(seed, mean=1.0), jnp.float64) for seed in (4, 5))
    params = {"scale": jnp.linspace(0.5, 2, 5), "bias": jnp.linspace(-1, 1, 5)}
    layer = fnn.batch_norm()
    state = layer.init(jax.random.key(0), x)[1]

    def ours(params, x):
        y, new = layer.apply(params, state, x, train=True)
        return jnp.sin(y), new["mean"], new["var"]

    def formula(params, x):
        mean, var = jnp.mean(x, 0), jnp.mean((x - jnp.mean(x, 0)) ** 2, 0)
        y = params["scale"] * (x - mean) / jnp.sqrt(var + 1e-5) + params["bias"]
        return jnp.sin(y), 0.1 * mean, 0.1 * var

    direction = (jax.tree.map(lambda p: jnp.cos(7 * p), params), t)

    @jax.jit
    def derivatives(params, x):
        ahead = [jax.jvp(f, (params, x), direction)[1] for f in (ours, formula)]
        back = [jax.vjp(f, params, x)[1](f(params, x)) for f in (ours, formula)]
        return list(zip(ahead, back, strict=True))

    both = derivatives(params, x)
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_statistics_of_bfloat16_inputs_are_float32():
    x = as_jax(batch(1, mean=100.0), jnp.bfloat16)
    layer = fnn.batch_norm(decay=0.0)
    params, state = layer.init(jax.random.key(0), x)
    _, state = layer.apply(params, state, x, train=True)
    np.testing.assert_allclose(state["mean"], np.asarray(x, np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(state["var"], np.asarray(x, np.float64).var(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (fnn.layer_norm(), nn.LayerNorm(use_fast_variance=False)),
        (fnn.rms_norm(), nn.RMSNorm()),
        (fnn.group_norm(2), nn.GroupNorm(2, use_fast_variance=False)),
        (fnn.batch_norm(), nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False)),
    ],
    ids=["layer_norm", "rms_norm", "group_norm", "batch_norm"],
)
def test_norms_equal_flax_in_float64(layer, module):
    with jax.enable_x64(True):
        x = as_jax(np.random.default_rng(0).normal(2, 3, size=(4, 3, 6)))
        params, state = layer.init(jax.random.key(0), x)
        params = jax.tree.map(lambda a: a + jnp.arange(a.size, dtype=a.dtype) / 7, params)
        variables = {"params": params}
        if isinstance(module, nn.BatchNorm):
            module = module.clone(dtype=jnp.float64, param_dtype=jnp.float64)
            variables["batch_stats"] = {"mean": jnp.zeros(6), "var": jnp.ones(6)}
        y, _ = layer.apply(params, state, x, train=True)
        expected, _ = module.apply(variables, x, mutable=["batch_stats"])
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


def test_a_batch_of_one_is_refused_in_train_mode():
    layer = fnn.serial(fnn.batch_norm())
    params, state = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="batch_norm: train mode needs at least two values per unit"):
        layer.apply(params, state, jnp.ones((1, 3)), train=True)
    layer.apply(params, state, jnp.ones((1, 3)))  # eval mode is fine


def masked_sequences():
    """Padding on either side and a hole, filled with numbers that must not matter; and the real positions, packed."""
    rng = np.random.default_rng(6)
    x = as_jax(rng.normal(2, 3, size=(4, 5, 3)))
    mask = jnp.arange(5) < jnp.array([5, 1, 3, 0])[:, None]
    mask = mask.at[0, 2].set(False).at[2].set(mask[2, ::-1])
    return x, mask, [jnp.where(mask[..., None], x, fill) for fill in (1e30, -7.0)], x[mask]


@pytest.mark.parametrize("mapped", [False, True], ids=["batch", "axis_name"])
def test_batch_norm_of_a_masked_sequence_equals_that_of_its_real_positions(mapped, x64):
    _, mask, (x, other), packed = masked_sequences()
    layer = fnn.batch_norm()
    params, state = layer.init(jax.random.key(0), fnn.Masked(x, mask))
    params = {"scale": jnp.linspace(0.5, 2, 3), "bias": jnp.linspace(-1, 1, 3)}
    weight = jnp.cos(jnp.arange(packed.size)).reshape(packed.shape)

    def ours(params, state, x, train):
        def one(x, mask):
            return layer.apply(params, state, fnn.Masked(x, mask), train=train, axis_name="batch" if mapped else None)

        if mapped:
            y, new = jax.vmap(lambda x, m: one(x[None], m[None]), axis_name="batch", out_axes=(0, None))(x, mask)
            y = jax.tree.map(lambda a: a[:, 0], y)
        else:
            y, new = one(x, mask)
        scalar = jnp.sum(jnp.sin(y.values[mask]) * weight) + sum(jnp.sum(jnp.sin(a)) for a in new.values())
        return scalar, (y.values, new, y.mask)

    def reference(params, state, x, train):
        y, new = layer.apply(params, state, x, train=train)
        return jnp.sum(jnp.sin(y) * weight) + sum(jnp.sum(jnp.sin(a)) for a in new.values()), (y, new)

    gradients = [jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True) for f in (ours, reference)]
    both = [jax.jit(f, static_argnums=3) for f in gradients]
    for train in (True, True, False):
        found = jax.device_get(both[0](params, state, x, train))
        (value, (y, new, passed)), (*slopes, slope_x) = found
        (want, (y_packed, new_packed)), (*slopes_packed, slope_packed) = both[1](params, state, packed, train)
        got = (value, y[mask], new, slopes, slope_x[mask])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13),
            got,
            (want, y_packed, new_packed, slopes_packed, slope_packed),
        )
        np.testing.assert_array_equal(passed, mask)
        assert not np.any(y[~mask]) and not np.any(slope_x[~mask])
        again = both[0](params, state, other, train)
        assert_same(again, ((value, (y, new, passed)), (*slopes, slope_x)))
        state = new


def test_batch_norm_of_fewer_than_two_real_positions_leaves_the_running_moments():
    layer, x = fnn.batch_norm(), jnp.ones((2, 3, 4)).at[0].set(jnp.nan)
    full = fnn.Masked(as_jax(batch(0, shape=(2, 3, 4))), jnp.ones((2, 3), bool))
    params, state = layer.init(jax.random.key(0), full)
    _, state = layer.apply(params, state, full, train=True)
    none = jnp.zeros((2, 3), bool)
    for mask in (none, none.at[1, 0].set(True)):
        y, new = layer.apply(params, state, fnn.Masked(x, mask), train=True)
        np.testing.assert_array_equal(y.values, 0)
        jax.tree.map(np.testing.assert_array_equal, new, state)
    with pytest.raises(ValueError, match="train mode needs at least two values per unit"):
        layer.apply(params, state, fnn.Masked(x[:1, :1], none[:1, :1]), train=True)
    with pytest.raises(ValueError, match=r"batch_norm: the input must be a sequence float\[batch, time, d\]"):
        layer.init(jax.random.key(0), fnn.Masked(x[..., 0], none))
