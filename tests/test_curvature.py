"""Curvature of any loss against dense Hessians, closed forms, and the recursions of optimisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, started
from jax.flatten_util import ravel_pytree

import fnn

ENTROPY = fnn.losses.cross_entropy


def block():
    return fnn.serial(fnn.dense(3), fnn.activation("tanh"))


NETS = {
    "mlp": (fnn.serial(fnn.dense(3), fnn.activation("tanh"), fnn.repeat(block(), 3), fnn.dense(3)), (6, 4)),
    "conv": (fnn.serial(fnn.conv(2, 3), fnn.activation("softplus"), fnn.global_avg_pool(), fnn.dense(3)), (4, 5, 5, 2)),
    "attention": (
        fnn.serial(fnn.residual(fnn.attention(2)), fnn.layer_norm(), fnn.take_last(), fnn.dense(3)),
        (4, 3, 4),
    ),
    "lstm": (fnn.serial(fnn.lstm(2), fnn.take_last(), fnn.dense(3)), (4, 3, 2)),
    "batch_norm": (fnn.serial(fnn.dense(3), fnn.batch_norm(), fnn.activation("tanh"), fnn.dense(3)), (6, 4)),
}


@functools.cache
def case(name, seed=0):
    """(net, state, batch) in float64, moved off zero biases."""
    net, shape = NETS[name]
    rng = np.random.default_rng(seed)
    x = as_jax(rng.normal(size=shape))
    state = jax.tree.map(lambda a: as_jax(a, np.float64), started(net.init, x, seed=seed))
    return net, state, (x, as_jax(rng.integers(0, 3, shape[0])))


@functools.cache
def dense(name, train=True):
    """(Hessian, Gauss-Newton matrix, vector -> params), by JAX's own dense derivatives."""
    net, state, batch = case(name)
    vector, unravel = ravel_pytree(state[0])

    def outputs(p):
        return net.apply(unravel(p), state[1], batch[0], train=train)[0]

    def loss(z):
        return jnp.mean(ENTROPY(z, batch[1]))

    def matrices(p):
        J, H_L = jax.jacrev(outputs)(p), jax.hessian(loss)(outputs(p))
        J, H_L = J.reshape(-1, p.size), H_L.reshape(len(J) * J.shape[1], -1)
        return jax.hessian(lambda p: loss(outputs(p)))(p), J.T @ H_L @ J

    return *map(np.asarray, jax.jit(matrices)(vector)), vector, unravel


@pytest.mark.parametrize("name", NETS)
def test_products_equal_dense_matrices(name, x64):
    net, state, batch = case(name)
    for train in (True, False) if name == "batch_norm" else (True,):
        H, G, vector, unravel = dense(name, train)
        c = fnn.curvature(ENTROPY, outputs=net, train=train)(state, batch)
        v = np.random.default_rng(1).normal(size=vector.shape)
        for operator, matrix in ((c.hessian, H), (c.gauss_newton, G)):
            found = ravel_pytree(operator.product(unravel(as_jax(v))))[0]
            np.testing.assert_allclose(found, matrix @ v, rtol=0, atol=1e-8 * np.abs(matrix @ v).max())
            assert np.abs(matrix).max() > 1e-3


def test_a_plain_loss_has_the_same_hessian_and_a_split_one_both(x64):
    net, state, batch = case("mlp")
    H, G, vector, unravel = dense("mlp")

    def outputs(params, x, y):
        z = net.apply(params, state[1], x, train=True)[0]
        return {"classes": jnp.argmax(z, axis=-1), "z": z}  # integers have no derivative

    def loss(found, x, y):
        return jnp.mean(ENTROPY(found["z"], y) + 0 * found["classes"])

    v = unravel(as_jax(np.random.default_rng(1).normal(size=vector.shape)))
    bare = fnn.curvature(lambda p, x, y: loss(outputs(p, x, y), x, y))(state[0], *batch)
    both = fnn.curvature(loss, outputs=outputs)(state[0], *batch)
    flat = ravel_pytree(v)[0]
    for found, matrix in ((bare.hessian, H), (both.hessian, H), (both.gauss_newton, G)):
        np.testing.assert_allclose(ravel_pytree(found.product(v))[0], matrix @ flat, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="curvature: a Gauss-Newton matrix needs a loss split in two, got a bare loss"):
        bare.gauss_newton  # noqa: B018


def test_eigenvalues_traces_and_gradient_against_the_dense_hessian(x64):
    net, state, batch = case("mlp")
    H, *_ = dense("mlp")
    c = fnn.curvature(ENTROPY, outputs=net)(state, batch)
    exact = np.linalg.eigvalsh(H)
    found = c.hessian.eigenvalues(3)
    assert found.converged
    np.testing.assert_array_less(np.abs(found.values - exact[::-1][:3]), found.residuals + 1e-12)
    vectors = np.stack([ravel_pytree(c.hessian.eigenvector(found, i))[0] for i in range(3)])
    misses = np.linalg.norm(vectors @ H - np.asarray(found.values)[:, None] * vectors, axis=1)
    np.testing.assert_allclose(misses, found.residuals, atol=1e-10)
    all_of_it = c.hessian.trace(probes=len(H))
    np.testing.assert_allclose(all_of_it.trace.value, np.trace(H), rtol=1e-10)
    np.testing.assert_allclose(all_of_it.square.value, np.sum(H * H), rtol=1e-10)
    assert all_of_it.trace.error == 0
    g = np.asarray(ravel_pytree(c.gradient())[0])
    np.testing.assert_allclose(c.along_gradient(), g @ H @ g / (g @ g), rtol=1e-10)


def test_blocks_of_layers_and_of_repeat(x64):
    net, state, batch = case("mlp")
    H, _, vector, unravel = dense("mlp")
    c = fnn.curvature(ENTROPY, outputs=net)(state, batch)
    places = unravel(jnp.arange(len(vector), dtype=jnp.float64))  # each number knows its place in the vector
    paths = [*c.hessian.layers()]
    assert paths == ["0", "2/0/0", "2/1/0", "2/2/0", "3"]
    for path, rows in {
        "2/1/0": jax.tree.leaves(jax.tree.map(lambda a: a[1], places[2].blocks)),
        "3": jax.tree.leaves(places[3]),
    }.items():
        i = np.concatenate([np.ravel(a) for a in rows]).astype(int)
        wanted = np.linalg.eigvalsh(H[np.ix_(i, i)])[-1]
        found = c.hessian.layers()[path].eigenvalues(tolerance=1e-8)
        np.testing.assert_allclose(found.values[0], wanted, rtol=1e-8)
    same = c.hessian.at("2/[1]/*").eigenvalues(tolerance=1e-8).values
    np.testing.assert_allclose(same, c.hessian.layers()["2/1/0"].eigenvalues(tolerance=1e-8).values, rtol=1e-10)
    assert c.hessian.at("2/[:]/*/kernel").size == 27
    with pytest.raises(ValueError, match="curvature: only must match a parameter's path, got '7/\\*'"):
        c.hessian.at("7/*")


def quadratic(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return as_jax(q * eigenvalues @ q.T), q


def half(params, A):
    return 0.5 * params["x"] @ A @ params["x"]


def test_the_standard_error_of_a_trace_is_the_true_one(x64):
    net, state, batch = case("mlp")
    H, *_ = dense("mlp")
    run = fnn.curvature(ENTROPY, outputs=net)(state, batch).hessian
    found = jax.vmap(lambda key: run.trace(16, key=key))(jax.random.split(jax.random.key(3), 100))
    for part, exact in ((found.trace, np.trace(H)), (found.square, np.sum(H * H))):
        z = (np.asarray(part.value) - exact) / np.asarray(part.error)
        assert abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.35  # t with 15 degrees of freedom: 1.07
    probes = np.asarray(found.trace.value)
    assert 0.85 < np.sqrt(np.mean(np.square(found.trace.error))) / probes.std(ddof=1) < 1.2


def test_density_of_marchenko_and_pastur(x64):
    d, n = 100, 400
    x = np.random.default_rng(0).normal(size=(n, d))
    c = fnn.curvature(lambda p, x: 0.5 * jnp.mean(jnp.square(x @ p["w"])))({"w": jnp.zeros(d)}, as_jax(x))
    density = c.hessian.density(error=0.03, width=0.15)
    assert density.relative_error <= 0.04 and density.probes < 64
    low, high = (1 - np.sqrt(d / n)) ** 2, (1 + np.sqrt(d / n)) ** 2
    t = np.linspace(low, high, 4000)
    closed = np.sqrt((high - t) * (t - low)) / (2 * np.pi * d / n * t)
    bumps = np.exp(-0.5 * ((density.grid[:, None] - t) / 0.15) ** 2) / (0.15 * np.sqrt(2 * np.pi))
    wanted = np.trapezoid(bumps * closed, t, axis=1)
    assert np.sqrt(np.mean((density.values - wanted) ** 2) / np.mean(wanted**2)) < 0.05
    mean, error = density.mean(lambda v: v)
    assert abs(mean - np.sum(x**2) / n / d) < 4 * error


def test_softmax_regression_at_zero_has_its_closed_form(x64):
    x = np.random.default_rng(0).normal(size=(30, 4))
    y = np.arange(30) % 3

    def loss(params, x, y):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ params["w"], y))

    c = fnn.curvature(loss)({"w": jnp.zeros((4, 3))}, x, y)
    pca = np.linalg.eigvalsh(x.T @ x / 30)[::-1]
    np.testing.assert_allclose(c.hessian.eigenvalues(4).values, np.repeat(pca / 3, 2)[:4], rtol=1e-10)
    np.testing.assert_allclose(c.hessian.trace(12).trace.value, 2 / 3 * np.sum(x * x) / 30, rtol=1e-10)


@pytest.mark.parametrize("near", [1e-3, 1.0, 50.0])
def test_critical_rate_of_a_quadratic_in_few_passes(near, x64):
    A, _ = quadratic(np.array([4.0, 1.0, 0.3]))
    c = fnn.curvature(half)({"x": jnp.array([1.0, 2.0, -1.0])}, A)
    g = np.asarray(c.gradient()["x"])
    step = np.array([1.0, 0.5, 0.2]) * g
    for direction, given in ((g, None), (step, {"x": as_jax(step)})):
        found = c.critical(given, near=near)
        np.testing.assert_allclose(found.sharpness, direction @ A @ direction / (g @ direction), rtol=1e-3)
        assert found.passes < 10 and found.low <= found.rate * 1.001 and found.high >= found.rate * 0.999
    assert np.isnan(c.critical({"x": -as_jax(g)}).rate)  # uphill


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_critical_rate_of_a_loss_in_less_than_the_params_type(dtype, x64):
    w = jnp.array([1.0, -2.0])
    found = fnn.curvature(lambda w: (0.5 * jnp.sum(w**2)).astype(dtype))(w).critical()
    assert abs(float(found.rate) / 2 - 1) < (1e-3 if dtype == jnp.float32 else 0.05)  # |w - r w| = |w| at r = 2


def test_critical_rate_of_a_net_is_where_its_loss_first_rises(x64):
    net, state, batch = case("mlp")
    c = fnn.curvature(ENTROPY, outputs=net)(state, batch)
    found, g = c.critical(), c.gradient()

    @jax.jit
    def rise(rate):
        moved = jax.tree.map(lambda p, s: p - rate * s, state[0], g)
        value = [
            jnp.mean(ENTROPY(net.apply(p, state[1], batch[0], train=True)[0], batch[1])) for p in (moved, state[0])
        ]
        return value[0] - value[1]

    assert rise(found.rate * 0.998) < 0 < rise(found.rate * 1.002)
    assert all(rise(found.rate * share) < 0 for share in np.linspace(0.05, 0.95, 10))


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_vjp
def fused(x):
    return jnp.sin(x)


def fused_backward(x, g):
    return (jax.pure_callback(lambda x, g: np.cos(x) * g, jax.ShapeDtypeStruct(x.shape, x.dtype), x, g),)


fused.defvjp(lambda x: (jnp.sin(x), x), fused_backward)


def test_rules_for_the_backward_pass_alone(x64):
    params, x = {"w": as_jax(np.random.default_rng(0).normal(size=(3, 2)))}, jnp.arange(6.0).reshape(2, 3)

    def split(f):
        return fnn.curvature(lambda z, x: jnp.sum(z**4), outputs=lambda p, x: f(x @ p["w"]))(params, x)

    v = jax.tree.map(lambda a: a[::-1] + 1, params)
    for name in ("hessian", "gauss_newton"):
        found, wanted = (getattr(split(f), name).product(v)["w"] for f in (sine, jnp.sin))
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
    words = r"curvature: H v needs a function whose derivative JAX can differentiate again, got one where it cannot, "
    with pytest.raises(ValueError, match=words + r"pure_callback in .* at test_curvature.py:\d+"):
        split(fused).hessian.product(v)


class Counter:
    count = 0


def test_one_program_serves_all_steps_and_equal_losses():
    params, batch = {"x": jnp.ones(4)}, jnp.eye(4)
    traced = Counter()

    def loss(params, A):
        traced.count += 1
        return half(params, A)

    make = fnn.curvature(loss)
    for step in range(3):
        c = make({"x": params["x"] + step}, batch * (1 + step))
        found = c.hessian.eigenvalues(start=None if step == 0 else found)  # noqa: F821
        np.testing.assert_allclose(found.values[0], 1 + step, rtol=1e-5)
        first = first if step else traced.count  # noqa: F821
    assert traced.count == first


def test_under_jit_and_vmap_over_seeds():
    def top(scale):
        c = fnn.curvature(half)({"x": jnp.ones(4)}, scale * jnp.diag(jnp.arange(1.0, 5)))
        return c.hessian.eigenvalues(tolerance=1e-4).values[0], c.critical().sharpness

    values, sharpness = jax.jit(jax.vmap(top))(jnp.arange(1.0, 4))
    np.testing.assert_allclose(values, [4, 8, 12], rtol=1e-3)
    np.testing.assert_allclose(sharpness, np.arange(1, 4) * 100 / 30, rtol=2e-3)


def test_bad_arguments_are_refused():
    for call, words in (
        (lambda: fnn.curvature(3), "curvature: loss must be a function"),
        (lambda: fnn.curvature(NETS["mlp"][0]), "got a net; pass curvature"),
        (lambda: fnn.curvature(half)({"x": jnp.arange(3)}, jnp.eye(3)), "params must be real floating arrays"),
        (
            lambda: fnn.curvature(lambda p: p["x"])({"x": jnp.ones(3)}).gradient(),
            "curvature: the loss must be one float",
        ),
        (lambda: fnn.curvature(half)({"x": jnp.ones(3)}, jnp.eye(3)).hessian.eigenvalues(4), "k must be at most the 3"),
        (
            lambda: fnn.curvature(half)({"x": jnp.ones(3)}, jnp.eye(3)).hessian.eigenvalues(end="to"),
            "did you mean 'top'",
        ),
        (
            lambda: fnn.curvature(half)({"x": jnp.ones(3)}, jnp.eye(3)).hessian.product(jnp.ones(3)),
            "a tree like params",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


@pytest.mark.parametrize("scale", [1e-28, 1e25])
def test_densities_at_any_scale(scale):
    a = jnp.diag(jnp.linspace(1.0, 10.0, 40))
    plain, scaled = (
        fnn.curvature(lambda p, b, s=s: 0.5 * s * b * p @ (a @ p))(jnp.ones(40), 1.0).hessian.density()
        for s in (1.0, scale)
    )
    np.testing.assert_allclose(scaled.grid / scale, plain.grid, rtol=1e-3, atol=1e-3)


def test_ten_products_hold_what_one_does_and_some_vectors():
    """XLA takes nothing out of the loop, as it would of a linearised loss; the bound is 2.5 gradients, with JAX 0.10.

    With JAX 0.12 a product held 2.92 gradients of this net, and so did `jvp(grad(loss))` written by hand: XLA's schedule.
    """
    bound = 2.5 if jax.__version_info__ < (0, 11) else 3.0
    net = fnn.models.mlp(3, 64, 10, activation="tanh", norm=None)
    x, y = jnp.ones((512, 64)), jnp.zeros(512, int)
    state = started(net.init, x)
    c = fnn.curvature(ENTROPY, outputs=net)(state, (x, y))
    plain, one, ten, _ = c.price(rounds=1).rows
    vector = 4e-6 * c.hessian.size
    assert one.megabytes <= bound * plain.megabytes + vector
    assert ten.megabytes <= one.megabytes + 3 * vector
    search = jax.jit(lambda s: fnn.curvature(ENTROPY, outputs=net)(s, (x, y)).hessian.eigenvalues(max_products=20))
    kept = search.lower(state).compile().memory_analysis().temp_size_in_bytes / 1e6
    assert kept <= one.megabytes + (2 * 20 + 50) * vector
