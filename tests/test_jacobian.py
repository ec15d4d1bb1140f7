"""Jacobians against dense ones, NumPy's singular values, and closed forms of random matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax
from scipy.special import digamma

import fnn

RNG = np.random.default_rng(0)


def matrix(rows, columns):
    return as_jax(np.random.default_rng(rows).normal(size=(rows, columns)) / np.sqrt(columns))


def test_singular_values_moments_and_isometry_are_numpys(x64):
    A, x = matrix(7, 5), jnp.linspace(-1, 1, 5)
    J = fnn.jacobian(lambda x: jnp.tanh(A @ x).reshape(1, 7))(x)
    dense = np.asarray((1 - jnp.tanh(A @ x) ** 2)[:, None] * A)
    s = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(J.singular_values(), s, rtol=1e-10)
    assert J.shape == (7, 5)
    np.testing.assert_allclose(J.product(jnp.arange(5.0))[0], dense @ np.arange(5), rtol=1e-10)
    np.testing.assert_allclose(J.moments(3).value, [np.sum(s ** (2 * k)) for k in (1, 2, 3)], rtol=1e-10)
    np.testing.assert_allclose(J.isometry(), np.sum(s**2) ** 2 / 5 / np.sum(s**4), rtol=1e-10)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
def test_extremes_are_numpys_and_know_how_good_they_are(shape, x64):
    A = matrix(*shape)
    J = fnn.jacobian(lambda x: A @ x)(jnp.zeros(shape[1]))
    s = np.linalg.svd(A, compute_uv=False)
    found = J.extremes(2)
    np.testing.assert_allclose(found.largest, s[:2], rtol=1e-8)
    np.testing.assert_allclose(found.smallest, s[::-1][:2], rtol=1e-6)
    few = J.extremes(2, steps=12)
    nearest = np.min(np.abs(s - np.asarray(few.largest)[:, None]), axis=1)
    assert np.all(nearest <= few.largest_residuals) and np.all(few.largest_residuals < 0.2 * s[0])
    zero = fnn.jacobian(lambda x: 0 * x)(jnp.ones(30)).extremes()
    assert zero.largest[0] == zero.smallest[0] == 0


def test_stochastic_moments_have_true_standard_errors(x64):
    A = matrix(50, 64)
    J = fnn.jacobian(lambda x: A @ x)(jnp.zeros(64))
    found = jax.jit(jax.vmap(lambda key: J.moments(3, probes=16, key=key)))(jax.random.split(jax.random.key(0), 100))
    s = np.linalg.svd(A, compute_uv=False)
    z = (np.asarray(found.value) - [np.sum(s ** (2 * k)) for k in (1, 2, 3)]) / np.asarray(found.error)
    assert np.all(np.abs(z.mean(0)) < 0.4) and np.all((z.std(0) > 0.8) & (z.std(0) < 1.4))


def test_nets_of_orthogonal_and_of_gaussian_layers():
    """Orthogonal linear nets are isometries; of wide Gaussian ones tr (JJᵀ)²/n is L + 1."""
    width, depth = 200, 5
    x = jnp.zeros(width)
    for scheme, isometry in (("orthogonal", 1.0), ("lecun_normal", 1 / (depth + 1))):
        net = fnn.serial(*[fnn.dense(width, kernel_init=scheme)] * depth)
        J = fnn.jacobian(net)(net.init(jax.random.key(0), x[None]), x)
        np.testing.assert_allclose(J.isometry(probes=width), isometry, rtol=1e-5 if scheme == "orthogonal" else 0.06)


def test_a_thousand_layers_without_underflow(x64):
    n, depth = 6, 1000
    W = as_jax(RNG.normal(size=(depth, n, n)) / np.sqrt(n))
    found = fnn.jacobian(lambda h, w: 0.1 * w @ h).through(W, jnp.ones(n))
    exact = (0.5 * (digamma((n - np.arange(n)) / 2) + np.log(2 / n))) / np.log(10) - 1  # Newman 1986
    np.testing.assert_allclose(found.lyapunov, exact, atol=0.04)
    assert found.log10_singular[0] < -1000 and found.change < 1e-6
    np.testing.assert_allclose(found.log10_stretch.sum(0), found.log10_singular, rtol=1e-10)


def test_a_product_of_few_layers_has_numpys_singular_values(x64):
    W = as_jax(RNG.normal(size=(6, 6, 6)) / np.sqrt(6))
    h = jnp.linspace(0, 1, 6)

    def step(h, w):
        return jnp.tanh(w @ h)

    found = fnn.jacobian(step).through(W, h, sweeps=600)  # values that lie near each other take many
    whole = jax.jacobian(lambda h: jax.lax.scan(lambda h, w: (step(h, w), None), h, W)[0])(h)
    np.testing.assert_allclose(found.log10_singular, np.log10(np.linalg.svd(whole, compute_uv=False)), atol=1e-6)
    top = fnn.jacobian(step).through(W, h, k=2, sweeps=600).log10_singular
    np.testing.assert_allclose(top, found.log10_singular[:2], atol=1e-6)


def test_blocks_of_repeat(x64):
    block = fnn.serial(fnn.dense(5), fnn.batch_norm(), fnn.activation("tanh"))
    net = fnn.repeat(block, 4)
    x = as_jax(RNG.normal(size=5))
    state = jax.tree.map(lambda a: as_jax(a, jnp.float64), net.init(jax.random.key(0), x[None]))
    found = fnn.jacobian(block).through(state, x, sweeps=40)
    whole = fnn.jacobian(net)(state, x).singular_values()
    np.testing.assert_allclose(found.log10_singular, np.log10(whole), atol=1e-6)
    with pytest.raises(ValueError, match=r"jacobian.through: needs \(params, state\) of repeat"):
        fnn.jacobian(block).through(block.init(jax.random.key(0), x[None]), x)


def test_without_forward_mode_and_under_vmap(x64):
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    A, xs = matrix(4, 3), as_jax(RNG.normal(size=(2, 3)))
    found = jax.vmap(lambda x: fnn.jacobian(lambda x: sine(A @ x))(x).singular_values())(xs)
    wanted = [np.linalg.svd(jnp.cos(A @ x)[:, None] * A, compute_uv=False) for x in xs]
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_bad_arguments_are_refused():
    x = jnp.ones(3)
    for call, words in (
        (lambda: fnn.jacobian(3), "jacobian: needs a function x -> y or a net, got int"),
        (lambda: fnn.jacobian(jnp.sin)(x, x), r"jacobian: the call takes \(x\), got 2 arguments"),
        (lambda: fnn.jacobian(jnp.sin)(jnp.arange(3)), "jacobian: x must be one floating array"),
        (lambda: fnn.jacobian(lambda x: (x, x))(x).singular_values(), "must return one floating array"),
        (lambda: fnn.jacobian(jnp.sin)(jnp.ones(3000)).singular_values(), "use extremes"),
        (lambda: fnn.jacobian(jnp.sin)(x).extremes(4), "k must be at most 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


@pytest.mark.parametrize("scale", [1e-28, 1e28])
@pytest.mark.parametrize("probes", [4, 64])
def test_isometry_and_extremes_at_any_scale(scale, probes):
    """A Jacobian of tiny or huge numbers, whose squares leave float32, is as isometric as the same one near 1."""
    a = as_jax(np.random.default_rng(0).normal(size=(40, 40)), jnp.float32)
    plain, scaled = (fnn.jacobian(lambda x, s=s: (a @ x) * s)(jnp.ones(40)) for s in (1.0, scale))
    np.testing.assert_allclose(scaled.isometry(probes=probes), plain.isometry(probes=probes), rtol=1e-4)
    for one, other in zip(scaled.extremes(), plain.extremes(), strict=True):
        np.testing.assert_allclose(one / scale, other, rtol=1e-3, atol=1e-4)
