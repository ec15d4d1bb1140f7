"""Extreme eigenvalues from products: how many it takes, and that the largest is not missed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import fnn
from fnn.spectra import krylov


def quadratic(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return as_jax(q * eigenvalues @ q.T), q


def half(params, A):
    return 0.5 * params["x"] @ A @ params["x"]


@functools.partial(jax.jit, static_argnums=(2, 3))
def searched(A, start, k, options):
    """Search a matrix of which nothing is known: one program for all matrices of a size."""
    return krylov.eigenpairs(lambda v: A @ v, start, krylov.unknown(start), jax.random.key(0), k, options)


def test_multiple_eigenvalues_zero_matrices_and_short_spectra(x64):
    for values in (np.zeros(8), np.ones(8), np.r_[3, 3, 3, np.zeros(5)], np.r_[-2.0, np.zeros(7)], np.arange(3.0)):
        A, _ = quadratic(values)
        c = fnn.curvature(half)({"x": jnp.ones(len(values))}, A)
        np.testing.assert_allclose(c.hessian.eigenvalues(3).values, np.sort(values)[::-1][:3], atol=1e-8)
        if len(values) == 8:
            np.testing.assert_allclose(c.hessian.eigenvalues(3, end="bottom").values, np.sort(values)[:3], atol=1e-8)
    zero = fnn.curvature(lambda p: jnp.sum(p["x"]))({"x": jnp.ones(5)})
    assert zero.hessian.density().mean(np.square) == (0, 0)


@pytest.mark.parametrize(
    ("k", "end"),
    [(1, "top"), (2, "bottom"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "top"), (1, "bottom")))],
)
def test_large_matrices_of_zeros_and_of_low_rank(k, end, recwarn):
    for values in (np.zeros(300), np.r_[np.linspace(1, 2, 10), np.zeros(290)]):
        A, _ = quadratic(values)
        found = fnn.curvature(half)({"x": jnp.ones(300)}, A).hessian.eigenvalues(k, end=end)
        wanted = np.sort(values)[::-1][:k] if end == "top" else np.zeros(k)
        np.testing.assert_allclose(found.values, wanted, rtol=0.01, atol=1e-5)
        assert found.converged and found.products <= 30
    assert not recwarn.list


def test_thirty_products_from_nothing_and_three_from_the_last_step(x64):
    """A spectrum like a classifier's: a bulk, and as many outliers as classes, the largest at the edge of stability."""
    rng = np.random.default_rng(0)
    values = np.r_[10, 6, 5.5, 4.8, 4.2, 3.7, 3.2, 2.8, 2.3, 1.9, rng.normal(size=390) * 0.2]
    A, q = quadratic(values)
    c = fnn.curvature(half)({"x": jnp.ones(400)}, A)
    cold = [c.hessian.eigenvalues(key=jax.random.key(i)) for i in range(5)]
    assert max(int(found.products) for found in cold) <= 30
    for _ in range(5):
        other = q[:, 1:] @ rng.normal(size=399)
        start = 0.9 * q[:, 0] + np.sqrt(1 - 0.81) * other / np.linalg.norm(other)
        warm = c.hessian.eigenvalues(start=cold[0]._replace(vectors=as_jax(start)[None]))
        assert warm.products <= 3 and warm.converged
        assert abs(warm.values[0] - 10) <= warm.residuals[0] <= 0.1
    with pytest.warns(UserWarning, match="the eigenvalues are not known to 1e-06, after 3 products"):
        assert not c.hessian.eigenvalues(tolerance=1e-6, max_products=3).converged


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_eigenvalues_at_any_scale(scale):
    """A matrix of tiny or huge numbers, whose squares leave float32, has the digits of the same matrix near 1."""
    lam = np.concatenate([[10, 7, -5], np.linspace(0, 1, 30)])
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(33, 33)))[0]
    a = as_jax((q * lam) @ q.T * scale, jnp.float32)
    start = jax.random.normal(jax.random.key(1), (2, 33))
    for sign, wanted in ((1, 10), (-1, 5)):
        found = searched(sign * a, start, 2, (40, 1, 0.01, 0.02))
        assert np.all(np.abs(found.values[:1] / scale - wanted) <= found.residuals[:1] / scale + 1e-4)
        assert found.converged and found.residuals[0] <= 0.01 * abs(found.values[0])


def test_a_largest_eigenvalue_that_another_passes_is_found_again():
    """Eigenvectors stay and eigenvalues cross: from the last vector alone the new largest would never be seen."""
    make = fnn.curvature(lambda p, h: 0.5 * jnp.sum(h * p**2))
    bulk, top, products = jnp.linspace(0, 4, 60), None, []
    for record in range(12):
        h = jnp.concatenate([jnp.array([10.0, 9 + 0.3 * record, 7.0]), bulk])
        top = make(jnp.ones(63), h).hessian.eigenvalues(start=top)
        products.append(int(top.products))
        np.testing.assert_allclose(top.values[0], h.max(), rtol=0.01)
        assert top.converged
    assert max(products[1:]) <= 8 < products[0]


def test_residuals_alone_track_in_four_products(x64):
    """Where a whole matrix turns, all that is known of it is of the last; the certain search of the same costs more."""
    rng = np.random.default_rng(0)
    values = np.r_[10, 6, 5.5, 4.8, 4.2, 3.7, 3.2, 2.8, 2.3, 1.9, rng.normal(size=140) * 0.2]
    q, found, products, overlaps = np.linalg.qr(rng.normal(size=(150, 150)))[0], None, [], []
    for _ in range(25):
        q, old = turned(q, 0.35, rng), q
        hessian = fnn.curvature(half)({"x": jnp.ones(150)}, as_jax((q * values) @ q.T)).hessian
        found = hessian.eigenvalues(start=found, missed=1)
        np.testing.assert_allclose(found.values, [10], rtol=0.01)
        assert found.converged and found.missed == 1 and found.limit == np.inf
        products.append(int(found.products))
        overlaps.append(abs(q[:, 0] @ old[:, 0]))
    assert 0.85 < np.median(overlaps) < 0.95
    assert np.median(products[1:]) <= 4 and max(products[1:]) <= 5 < products[0]
    sure = hessian.eigenvalues(start=found)
    assert sure.missed <= 0.02 and abs(sure.limit - 1.01 * sure.values[0]) <= 1e-3 * sure.values[0]
    for wrong in (0, 1.1):
        with pytest.raises(ValueError, match="missed must be between 1e-06 and 1"):
            hessian.eigenvalues(missed=wrong)


def turned(q, angle, rng):
    """q times a random rotation by about this angle in each plane."""
    a = rng.normal(size=q.shape) * angle / np.sqrt(len(q))
    return np.linalg.qr(q + q @ (a - a.T))[0]


@pytest.mark.parametrize("angle", [0.0, 0.02, 0.3])
@pytest.mark.parametrize(("k", "end"), [(1, "top"), (2, "top"), (1, "bottom")])
def test_no_record_misses_an_eigenvalue_that_has_passed_the_others(k, end, angle, x64):
    """Eigenvalues move at random, those of the bulk too, and any of them may be the largest from one record to the next."""
    rng, n = np.random.default_rng(k), 80
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = np.r_[3.0, 2.9, 2.5, 2, 1.5, rng.normal(size=n - 5) * 0.3]
    sign, found, leaders = (1 if end == "top" else -1), None, []
    for _ in range(25):
        values = values * np.where(rng.random(n) < 0.3, 0.9, 1.02)
        values[rng.integers(n)] = 1 + 2.5 * rng.random()  # one jumps
        q = turned(q, angle, rng)
        A = as_jax(sign * (q * values) @ q.T)
        found = fnn.curvature(half)({"x": jnp.ones(n)}, A).hessian.eigenvalues(k, end=end, start=found)
        wanted = np.sort(values)[::-1][:k]
        np.testing.assert_allclose(sign * np.asarray(found.values), wanted, rtol=0.01)
        assert found.converged and found.missed <= 0.02
        leaders.append(np.argmax(values))
    assert np.sum(np.diff(leaders) != 0) >= 4


def test_the_chance_of_a_missed_eigenvalue_counts_what_the_random_vector_has_of_it(x64):
    """A vector that has almost nothing of the largest eigenvalue's hides it, and says how likely such a vector is."""
    rng, n = np.random.default_rng(0), 60
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    A = as_jax((q * np.r_[1.1, 1.0, 0.6, rng.normal(size=n - 3) * 0.1]) @ q.T)
    draw = rng.normal(size=n)
    for part in (1e-5, 1e-4, 0.1):
        start = as_jax(draw - q[:, 0] * (q[:, 0] @ draw) + part * q[:, 0])
        found = searched(A, start[None], 1, (30, 1, 0.01, 0.02))
        missed = abs(found.values[0] - 1.1) > 0.011
        assert not missed or found.missed >= np.sqrt(2 / np.pi) * part
        assert bool(missed) == (part < 0.1)


@pytest.mark.parametrize(("missed", "median", "most"), [(0.02, 6, 10), (1, 2, 3)])
def test_tracking_the_sharpness_of_digits_costs_few_products(missed, median, most):
    """Every step of gradient descent below the edge: the price of a record, certain and by residuals alone."""
    images, labels = load_digits(return_X_y=True)
    x, y = as_jax(images[:256] / 16, jnp.float32), as_jax(labels[:256])
    net = fnn.serial(fnn.dense(32), fnn.activation("tanh"), fnn.dense(32), fnn.activation("tanh"), fnn.dense(10))
    params, state = started(net.init, x)
    make, found, products = fnn.curvature(fnn.losses.cross_entropy, outputs=net), None, []
    for _ in range(30):
        c = make((params, state), (x, y))
        found = c.hessian.eigenvalues(start=found, missed=missed)
        assert found.converged
        products.append(int(found.products))
        params = jax.tree.map(lambda p, g: p - np.float32(0.1) * np.asarray(g), params, c.gradient())
    np.testing.assert_allclose(found.values, c.hessian.eigenvalues(tolerance=1e-3).values, rtol=0.01)
    assert np.median(products[1:]) <= median and max(products[1:]) <= most


def test_sharpness_of_a_net_at_the_edge_of_stability_is_that_of_the_dense_hessian():
    """Recorded so rarely that eigenvectors have turned, among eigenvalues that lie together."""
    rng = np.random.default_rng(0)
    x, y = (as_jax(rng.normal(size=size), jnp.float32) for size in ((30, 5), (30, 3)))

    def loss(p, x, y):
        return 0.5 * jnp.mean(jnp.sum(jnp.square(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] - y), axis=1))

    p = {
        name: as_jax(rng.normal(size=s), jnp.float32) / 2
        for name, s in zip("abc", ((5, 8), (8, 8), (8, 3)), strict=True)
    }
    flat, fill = ravel_pytree(p)
    rate, every = 0.4, 25

    @jax.jit
    def some(v):
        v = jax.lax.fori_loop(0, every, lambda _, v: v - rate * jax.grad(lambda v: loss(fill(v), x, y))(v), v)
        return v, jnp.linalg.eigvalsh(jax.hessian(lambda v: loss(fill(v), x, y))(v))[-1]

    make, found, ratios = fnn.curvature(loss), None, []
    for _ in range(40):
        flat, wanted = some(flat)
        found = make(fill(flat), x, y).hessian.eigenvalues(start=found)
        np.testing.assert_allclose(found.values[0], wanted, rtol=0.01)
        ratios.append(float(wanted) * rate / 2)
    assert 0.9 < np.median(ratios[10:]) < 1.3
