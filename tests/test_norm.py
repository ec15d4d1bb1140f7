"""Normalisation against NumPy and against Flax on the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn


def batch(seed, mean=0.0, std=1.0, shape=(64, 5)):
    return (mean + std * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def test_batch_norm_in_eval_mode_is_right_after_1_10_and_100_steps():
    """Eval uses sum_k w_k m_k / sum_k w_k, w_k = (1 - decay) decay^(n - k): the debiased average, written out."""
    layer, decay = fnn.batch_norm(decay=0.9), 0.9
    params, state = layer.init(jax.random.key(0), batch(0))
    step = jax.jit(lambda state, x: layer.apply(params, state, x, train=True))
    evaluate = jax.jit(lambda state, x: layer.apply(params, state, x)[0])
    probe = batch(999)
    np.testing.assert_array_equal(evaluate(state, probe), probe)  # the identity before the first step
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
    x, t = (jnp.asarray(batch(seed, mean=1.0), jnp.float64) for seed in (4, 5))
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
    for f in (lambda f: jax.jvp(f, (params, x), direction)[1], lambda f: jax.vjp(f, params, x)[1](f(params, x))):
        for a, b in zip(jax.tree.leaves(f(ours)), jax.tree.leaves(f(formula)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_statistics_of_bfloat16_inputs_are_float32():
    x = jnp.asarray(batch(1, mean=100.0), jnp.bfloat16)
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
        x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(4, 3, 6)))
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
