"""Curvature, Jacobians and kernels where parts meet: frameworks, transforms, dtypes, scales, NaN, and nothing at all."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started
from flax import nnx
from jax.flatten_util import ravel_pytree

import fnn

X, W = np.random.default_rng(0).normal(size=(5, 3)), np.random.default_rng(1).normal(size=(3, 3))


@pytest.fixture
def rng():
    """Its own for each test: the same numbers in any order."""
    return np.random.default_rng(0)


def linen(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2 * params["s"]) + params["s"] ** 3 + jnp.sum(params["none"])


def equinox():
    params, static = eqx.partition(
        eqx.nn.MLP(3, 2, 3, 1, key=jax.random.key(0), dtype=jnp.float64), eqx.is_inexact_array
    )
    return (lambda p, x: jnp.mean(jax.vmap(eqx.combine(p, static))(x) ** 4)), params


def of_nnx():
    graph, params, rest = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64), nnx.Param, ...)
    return (lambda p, x: jnp.mean(jnp.sin(nnx.merge(graph, p, rest, copy=True)(x)) ** 3)), params


CASES = {
    "dict with a scalar and nothing": (linen, {"w": W[:, :2], "s": np.float64(1.5), "none": np.zeros((0, 3))}),
    "tuple": (lambda p, x: jnp.mean((x @ p[0]) ** 4) + p[1][0] ** 2 * p[0][0], (W[0], [np.float64(2)])),
    "tied": (lambda p, x: jnp.mean((jnp.tanh(x @ p) @ p.T - x) ** 2), W[:, :2]),
    "scan": (
        lambda p, x: jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0] ** 2),
        np.stack([W] * 3),
    ),
    "remat": (lambda p, x: jnp.mean(jax.checkpoint(lambda h: jnp.tanh(h @ p) ** 3)(x)), W),
    "cond": (lambda p, x: jax.lax.cond(p[0, 0] > 0, lambda p: jnp.sum(p**4), lambda p: jnp.mean((x @ p) ** 3), p), W),
    "linear": (lambda p, x: jnp.sum(x @ p), W),
    "constant": (lambda p, x: jnp.sum(x), W),
    "one example": (lambda p, x: jnp.mean(jnp.tanh(x[:1] @ p) ** 2), W),
    "equinox": equinox,
    "nnx": of_nnx,
}


REPEATS = ("tuple", "remat", "linear", "one example", "nnx")
"""Dicts, scans, a constant loss and Equinox say the same."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in REPEATS)) for name in CASES])
def test_all_eigenvalues_and_the_trace_are_those_of_the_dense_hessian(name, x64):
    found = CASES[name]
    loss, params = found() if callable(found) else found
    params, x = jax.tree.map(as_jax, params), as_jax(X)
    vector, unravel = ravel_pytree(params)
    H = np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v), x)))(vector))
    c = fnn.curvature(loss)(params, x)
    size = max(np.abs(H).max(), 1e-300)
    pairs = c.hessian.eigenvalues(len(H), tolerance=1e-9)
    np.testing.assert_allclose(pairs.values / size, np.linalg.eigvalsh(H)[::-1] / size, atol=1e-9)
    traces = c.hessian.trace(len(H))
    np.testing.assert_allclose(traces.trace.value / size, np.trace(H) / size, atol=1e-9)
    np.testing.assert_allclose(traces.norm.value / size, np.linalg.norm(H) / size, atol=1e-9)


def test_dropout_is_one_mask(x64, rng):
    net = fnn.serial(fnn.dense(4), fnn.activation("tanh"), fnn.dropout(0.5), fnn.dense(2))
    x, y, key = as_jax(X), jnp.arange(5) % 2, jax.random.key(5)
    params, state = started(net.init, x)
    vector, unravel = ravel_pytree(params)

    def loss(v):
        outputs, _ = net.apply(unravel(v), state, x, key=key, train=True)
        return jnp.mean(fnn.losses.cross_entropy(outputs, y))

    c = fnn.curvature(fnn.losses.cross_entropy, outputs=net)((params, state), (x, y), key)
    v = as_jax(rng.normal(size=vector.shape))
    wanted = np.asarray(jax.jit(jax.hessian(loss))(vector)) @ v
    np.testing.assert_allclose(ravel_pytree(c.hessian.product(unravel(v)))[0], wanted, rtol=1e-8, atol=1e-10)


def half(params, scale):
    return 0.5 * scale * jnp.sum(jnp.arange(1.0, 41) * params**2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_numbers_at_any_scale_are_those_near_one(scale, rng):
    """Of a quadratic, a Jacobian and a kernel whose squares leave float32."""
    c = fnn.curvature(half)(jnp.ones(40), scale)
    h = np.arange(1, 41)
    np.testing.assert_allclose(c.along_gradient() / scale, np.sum(h**3) / np.sum(h**2), rtol=1e-5)
    for near in (None, 1.0):
        found = c.critical(near=near)
        np.testing.assert_allclose(found.sharpness / scale, np.sum(h**3) / np.sum(h**2), rtol=1e-3)
        assert found.low <= found.rate <= found.high <= 1.002 * found.low
    for probes in (4, 64):
        np.testing.assert_allclose(c.hessian.trace(probes).norm.value / scale, np.linalg.norm(h), rtol=1e-5)
    a = as_jax(rng.normal(size=(40, 40)), jnp.float32)
    plain, scaled = (fnn.jacobian(lambda x, s=s: a @ x * s)(jnp.ones(40)) for s in (1.0, scale))
    for probes in (4, 64):
        found, wanted = scaled.moments(probes=probes).log10, plain.moments(probes=probes).log10
        np.testing.assert_allclose(found, wanted + np.array([2, 4]) * np.log10(scale), atol=1e-4)
    x, y = as_jax(X, jnp.float32), jnp.arange(5) % 2
    plain, scaled = (fnn.kernel(lambda p, x, s=s: s * jnp.tanh(x @ p))(as_jax(W, jnp.float32), x) for s in (1.0, scale))
    for name, arguments in (("condition", ()), ("effective_rank", ()), ("alignment", (y,))):
        np.testing.assert_allclose(getattr(scaled, name)(*arguments), getattr(plain, name)(*arguments), rtol=1e-3)


def test_errors_of_traces_do_not_underflow(rng):
    rotated = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    a = as_jax(rotated * np.arange(30) @ rotated.T, jnp.float32)
    plain, scaled = (
        fnn.curvature(lambda p, s: 0.5 * s * p @ (a @ p))(jnp.ones(30), s).hessian.trace(8) for s in (1.0, 1e-28)
    )
    np.testing.assert_allclose(scaled.trace.error / 1e-28, plain.trace.error, rtol=1e-3)
    np.testing.assert_allclose(scaled.norm.error / 1e-28, plain.norm.error, rtol=1e-3)
    assert plain.trace.error > 1


@pytest.mark.parametrize(
    ("loss", "start", "near", "wanted"),
    [
        (jnp.cosh, 3.0, 10.0, 6 / np.sinh(3)),
        (lambda p: p**2 + (p / 2) ** 200, 1.5, 10.0, 1.0),  # infinite at the first rates
        (lambda p: p**2 + jnp.where(p < -1, jnp.inf, 0), 1.5, 10.0, 2.5 / 3),  # a wall
        (lambda p: p**2 + 1e4, 1.5, None, 1.0),
        (lambda p: p**2 + 1e8, 1.5, None, np.nan),  # below the loss's rounding
        (lambda p: p, 1.5, None, np.nan),
        (lambda p: 0 * p, 1.5, None, np.nan),
        (lambda p: p * jnp.nan, 1.5, None, np.nan),
    ],
)
def test_critical_rates_are_bracketed_or_nan(loss, start, near, wanted):
    found = fnn.curvature(loss)(start).critical(near=near)
    np.testing.assert_allclose(found.rate, wanted, rtol=1e-3)
    assert np.isnan(wanted) or found.low <= wanted * (1 + 1e-6) <= found.high * (1 + 2e-6)


def test_a_loss_of_nan_has_a_curvature_of_nan():
    """Of an empty batch's mean JAX's derivatives are finite where the rest of the loss is."""

    def loss(p, x):
        return jnp.mean(x * p) + p**2

    empty = fnn.curvature(loss)(jnp.ones(()), jnp.zeros(0))
    with pytest.warns(UserWarning, match="the matrix has NaN"):
        assert np.isnan(empty.hessian.eigenvalues().values[0])
    assert np.isnan(empty.hessian.trace().trace.value) and np.isnan(empty.critical().rate)
    split = fnn.curvature(lambda z, x: jnp.sum(z[:1] ** 2), outputs=lambda p, x: x * p)(
        jnp.ones(()), jnp.array([1, np.nan])
    )
    assert np.isnan(split.gauss_newton.product(jnp.ones(())))
    assert np.isnan(fnn.jacobian(lambda x: x + jnp.nan)(jnp.ones(2)).singular_values()).all()
    fine = fnn.curvature(loss)(jnp.ones(()), jnp.ones(1)).hessian
    with pytest.warns(UserWarning):
        lost = empty.hessian.eigenvalues()
    np.testing.assert_allclose(fine.eigenvalues(start=lost).values, [2])  # the next step recovers


@jax.custom_vjp
def wrong(x):
    return jnp.sin(x[0]) * x[1]


wrong.defvjp(lambda x: (jnp.sin(x[0]) * x[1], x), lambda x, g: (g * jnp.stack([3 * x[1], x[0]]),))


def test_a_matrix_that_is_not_symmetric_is_not_converged(x64):
    """The derivative of a rule that is no gradient: its residual says so."""
    with pytest.warns(UserWarning, match="not known to 0.01"):
        found = fnn.curvature(wrong)(jnp.ones(2)).hessian.eigenvalues(2)
    assert np.all(found.residuals > 0.5)


def test_residuals_count_the_rounding_of_the_dtype_that_computes(rng):
    """bfloat16 parameters, or a cast inside the loss: the eigenvalue of exact numbers lies within the residual."""
    a = rng.normal(size=(20, 20))
    a = as_jax(a + a.T, jnp.bfloat16)
    exact = np.linalg.eigvalsh(np.asarray(a, np.float64))[-1]
    p = jnp.ones(20, jnp.bfloat16)
    inside = fnn.curvature(lambda p: (0.5 * p.astype(jnp.bfloat16) @ (a @ p.astype(jnp.bfloat16))).astype(jnp.float32))
    for c in (
        fnn.curvature(lambda p: 0.5 * p @ (a @ p))(p),
        inside(p.astype(jnp.float32)),
    ):
        found = c.hessian.eigenvalues(tolerance=1e-4)
        assert abs(float(found.values[0]) - exact) <= found.residuals[0]
        assert found.residuals[0] > 0.02 * exact
    J = fnn.jacobian(lambda x: 2 * x)(jnp.ones(3, jnp.bfloat16)).extremes()
    assert abs(J.largest[0] - 2) <= J.largest_residuals[0]


def test_products_through_depth_in_bfloat16_of_zeros_and_of_nothing():
    found = fnn.jacobian(lambda h, w: w * h).through(jnp.full(3, 2, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    np.testing.assert_allclose(found.log10_singular, 3 * np.log10(2), rtol=1e-2)
    zero = fnn.jacobian(lambda h, w: w * h).through(jnp.zeros(3), jnp.ones(3))
    assert np.all(zero.log10_singular == -np.inf) and zero.change == 0
    for call, words in (
        (lambda: fnn.jacobian(lambda h, w: h[:2]).through(jnp.zeros(3), jnp.ones(3)), "must keep the shape and dtype"),
        (
            lambda: fnn.jacobian(lambda h, w: h).through((jnp.zeros(3), jnp.zeros(2)), jnp.ones(3)),
            "must share a leading axis",
        ),
        (lambda: fnn.kernel(lambda p, x: p * x)(jnp.ones(3), jnp.zeros((0, 3))), "must hold at least one example"),
        (
            lambda: fnn.curvature(lambda p: jnp.sum(p) + 1)(jnp.zeros(0)).hessian.density(),
            "needs at least one parameter",
        ),
        (lambda: fnn.curvature(lambda p: (p**2, p))(1.0).gradient(), "wrap it to return the first alone"),
        (lambda: fnn.curvature(lambda p: jnp.real(p))(jnp.ones((), complex)), "must be real floating arrays"),
        (lambda: fnn.curvature(lambda p: p[0] ** 2)((1.0, jnp.arange(3))), "must be real floating arrays"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_kernels_of_zeros_have_no_ratios():
    found = fnn.kernel(lambda p, x: 0 * jnp.sum(p * x))(jnp.ones(3), as_jax(X, jnp.float32))
    assert np.isnan([found.condition(), found.effective_rank(), found.alignment(jnp.arange(5))]).all()
    assert np.all(found.matrix == 0)


def classifier(phi, rng):
    net = fnn.serial(fnn.dense(16), fnn.activation(phi), fnn.dense(16), fnn.activation(phi), fnn.dense(5))
    x, y = rng.normal(size=(40, 20)), np.arange(40) % 5
    with jax.enable_x64(True):
        params, state = started(net.init, as_jax(x, jnp.float32))
    return net, params, state, x, y


@pytest.mark.parametrize(
    ("dtype", "phi"),
    [
        (np.float32, "tanh"),
        (np.float64, "relu"),
        pytest.param(np.float32, "relu", marks=pytest.mark.slow),
        pytest.param(np.float64, "tanh", marks=pytest.mark.slow),
    ],
)
def test_tight_tolerances_are_proved(phi, dtype):
    """Down to rounding, whatever the batch: the chance of a missed eigenvalue goes down too, and `limit` says of what."""
    tolerances, rounding = ((1e-3, 1e-5), 4e-4) if dtype == np.float32 else ((1e-5, 1e-7, 1e-9), 4e-12)
    for seed in range(8):
        net, *arrays, y = classifier(phi, np.random.default_rng(seed))
        with jax.enable_x64(dtype == np.float64):
            params, state, x = jax.tree.map(lambda a: as_jax(a, dtype), tuple(arrays))
            hessian = fnn.curvature(fnn.losses.cross_entropy, outputs=net)((params, state), (x, y)).hessian
            for tolerance in tolerances:
                top = hessian.eigenvalues(tolerance=tolerance, max_products=80)
                assert top.converged and top.missed <= 0.005 and top.products <= 60
                assert top.residuals[0] <= max(tolerance, 5e-7) * top.values[0]
                assert tolerance * 0.9 <= top.limit / top.values[0] - 1 <= 1.1 * max(tolerance, rounding)


@pytest.mark.parametrize("phi", ["tanh", pytest.param("relu", marks=pytest.mark.slow)])
def test_float32_is_near_float64(phi, rng):
    """The tolerances that `Operator` states."""
    net, params, state, x, y = classifier(phi, rng)
    with jax.enable_x64(True):
        v = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), params)
    found = {}
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            given = jax.tree.map(lambda a, d=dtype: as_jax(a, d), (params, state, x, v))
            c = fnn.curvature(fnn.losses.cross_entropy, outputs=net)(given[:2], (given[2], y))
            top = c.hessian.eigenvalues(tolerance=1e-5 if dtype == np.float32 else 1e-9, max_products=200)
            product = ravel_pytree(c.hessian.product(given[3]))[0]
            found[dtype] = [np.asarray(a, np.float64) for a in (product, top.values, top.residuals)]
    (product, values, residuals), (exact, top, _) = found[np.float32], found[np.float64]
    assert np.linalg.norm(product - exact) <= 2e-6 * np.linalg.norm(exact)
    np.testing.assert_allclose(values, top, rtol=2e-6)
    assert np.abs(values - top) <= residuals
