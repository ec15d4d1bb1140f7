"""The gradient noise scale against exact values and formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from fnn.gradients import noise


def regression(groups=None, steps=400, batch=32, seed=0):
    """Estimate trace and signal on x ~ N(0, I), loss ½(w·x - w*·x - noise)², where both are known exactly."""
    d, distance, sigma = 10, 1.5, 0.7
    w = jnp.zeros(d).at[0].set(distance)

    def one(key):
        x_key, e_key = jax.random.split(key)
        data = (jax.random.normal(x_key, (batch, d)), sigma * jax.random.normal(e_key, (batch,)))

        def loss(w, example):
            x, e = example
            return 0.5 * jnp.mean(jnp.square(x @ w - e))

        if groups is None:
            return noise.moments(fnn.per_example(loss)(w, data))
        return noise.moments(fnn.per_example(loss)(w, noise.groups(data, groups)), group=groups)

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(seed), steps))


@pytest.mark.parametrize("groups", [None, 4])
def test_noise_scale_of_a_regression_is_exact(groups):
    """n = 400 batches of 32; each of three means may miss by 4 standard errors: wrong in one run of 5,000 by chance."""
    trace, signal = (np.asarray(a, np.float64) for a in regression(groups))
    d, squared, sigma = 10, 1.5**2, 0.7
    exact = (d + 1) * squared + d * sigma**2
    assert exact == pytest.approx(29.65)
    for estimates, value in ((trace, exact), (signal, squared)):
        assert abs(estimates.mean() - value) < 4 * estimates.std(ddof=1) / np.sqrt(len(estimates))
    found = noise.scale(trace, signal)
    assert abs(found.value - 13.178) < 4 * found.error
    assert 0.01 < found.error / found.value < 0.2


def test_jackknife_against_its_formula_and_in_blocks():
    rng = np.random.default_rng(0)
    trace, signal = rng.normal(30, 3, 12), rng.normal(2, 0.3, 12)
    without = [np.delete(trace, i).mean() / np.delete(signal, i).mean() for i in range(12)]
    found = noise.scale(trace, signal)
    np.testing.assert_allclose(found.value, trace.mean() / signal.mean())
    np.testing.assert_allclose(found.error, np.sqrt(11 / 12 * np.sum((without - np.mean(without)) ** 2)))
    blocks = noise.scale(trace.reshape(4, 3).mean(1), signal.reshape(4, 3).mean(1))
    np.testing.assert_allclose(noise.scale(trace, signal, block=3), blocks)
    assert np.isnan(noise.scale(trace, signal, block=12).error)
    assert noise.scale(np.ones((5, 3)), np.ones((5, 3))).value.shape == (3,)
    with pytest.raises(ValueError, match="noise.scale: needs trace and signal"):
        noise.scale(trace, signal[:3])
    with pytest.raises(ValueError, match="noise.groups: size must divide the batch"):
        noise.groups(jnp.ones((6, 2)), 4)
