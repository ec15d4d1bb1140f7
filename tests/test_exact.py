"""Exact gradients, rule by rule: those of `jax.grad` where float32 holds them, and of a far smaller seed where it does not."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax

from fnn.gradients import exact, powers

RNG = np.random.default_rng(0)
SMALL = jnp.float32(2.0**-100)


def drawn(*shape, dtype=jnp.float32):
    return as_jax(RNG.normal(size=shape), dtype)


def is_scaled(node):
    return isinstance(node, powers.Scaled)


@jax.jit
def values(found):
    return jax.tree.map(lambda x: powers.plain(x)[0], found, is_leaf=is_scaled)


@jax.jit
def by_layer(found):
    return found.log_norm(1)


def leaves(found):
    return jax.tree.leaves(found, is_leaf=is_scaled)


X, W, TOKENS = drawn(6, 4), drawn(4, 4), jnp.array([[1, 0, 2, 1], [3, 1, 1, 0]])
SEQUENCE, IMAGES = drawn(5, 2, 4), drawn(2, 4, 4, 3)


def lstm(p):
    def cell(carry, x):
        h, c = carry
        i, f, o, g = jnp.split(x @ p["x"] + h @ p["h"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((2, 4))
    return jax.lax.scan(cell, (zeros, zeros), SEQUENCE)[1]


def nested(p):
    def outer(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], x

    x, seen = jax.lax.scan(outer, X, p, reverse=True, unroll=2)
    return x, seen


def with_rule(backward):
    """The identity, with a rule for its cotangent."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, x), lambda x, g: (backward(x, g),))
    return identity


sign_of_gradient = with_rule(lambda x, g: jnp.sign(g) * jnp.abs(g))
normalised = with_rule(lambda x, g: g * jax.lax.rsqrt(jnp.sum(g**2)) * jnp.sum(jnp.abs(g)) + jnp.maximum(g, 0.0) / 2)
ratios = with_rule(lambda x, g: g * (1.0 / (3.0 * jnp.max(jnp.abs(g)))) * g + jnp.prod(g[:2, 0]) / g[0, 0])
steps = with_rule(lambda x, g: jax.lax.while_loop(lambda s: s[1] < 3, lambda s: (s[0] * x, s[1] + 1), (g, 0))[0])
sorts = with_rule(lambda x, g: jnp.sort(g, axis=0) + jnp.where(g > jnp.mean(g), g, -g) + jnp.clip(g, 0.0, jnp.max(g)))


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvp(lambda primals, tangents: (cubed(*primals), 3 * primals[0] ** 2 * tangents[0]))


def attention(p):
    q, k, v = (X @ p[i] for i in range(3))
    return jax.nn.softmax(q @ k.T / 2) @ v


def conv(p):
    y = jax.lax.conv_general_dilated(IMAGES, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.lax.reduce_window(jax.nn.gelu(y), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")


LOSSES = {
    "dense": (lambda p: jnp.tanh(X @ p) @ p, W),
    "relu, selu, gelu, softplus": (lambda p: jax.nn.softplus(jax.nn.gelu(jax.nn.selu(jax.nn.relu(X @ p) @ p) @ p)), W),
    "layer norm": (lambda p: (p - p.mean(0)) / jnp.sqrt(p.var(0) + 1e-5) * p[0], W),
    "logsumexp": (lambda p: jax.nn.logsumexp(X @ p, axis=-1), W),
    "softmax": (attention, drawn(3, 4, 4)),
    "embedding": (lambda p: jnp.cumsum(p[TOKENS], axis=1) ** 2, W),
    "pieces": (lambda p: jnp.concatenate([jnp.roll(p, 1), p[::-1, :2].T @ p, jnp.pad(p, 1)[1:5, 1:5]]) ** 3, W),
    "stacked": (lambda p: jnp.stack([p * 2, p.T, jnp.flip(p)]).reshape(6, -1).sum(0) ** 2, W),
    "unstacked": (lambda p: sum(row * i for i, row in enumerate(jnp.unstack(p))) + jnp.tile(p[0], 3)[:4], W),
    "sorted": (lambda p: jnp.sort(p, axis=0) * jnp.arange(4.0)[:, None] + jnp.max(p, axis=1), W),
    "quantile": (lambda p: jnp.quantile(X @ p, 0.3, axis=0), W),
    "indexed": (lambda p: p.at[1].set(p[0] ** 2).at[:, 2].add(p[3]) ** 2, W),
    "dynamic": (lambda p: jax.lax.dynamic_slice(p, (TOKENS[0, 0], 0), (2, 4)) ** 2, W),
    "permuted stack": (lambda p: jnp.stack([p, 2 * p, p.T])[jnp.array([2, 0, 0])] ** 2, W),
    "conv and pools": (conv, drawn(3, 3, 3, 5)),
    "lstm": (lstm, {"x": drawn(4, 16), "h": drawn(4, 16)}),
    "nested scans": (nested, drawn(6, 4, 4)),
    "remat": (lambda p: jax.checkpoint(lambda p: jnp.sin(X @ p))(p) @ p, W),
    "remat in scan": (
        lambda p: jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), X, p)[0],
        drawn(6, 4, 4),
    ),
    "cond": (lambda p: jax.lax.cond(p[0, 0] > 0, lambda p: p**2, lambda p: p**3, p), W),
    "switch in scan": (
        lambda p: jax.lax.scan(lambda x, i: (jax.lax.switch(i, [jnp.sin, jnp.cos], x @ p), None), X, TOKENS[0] % 2)[0],
        W,
    ),
    "vmap": (lambda p: jax.vmap(lambda x: jnp.tanh(x @ p) * x)(X), W),
    "jit": (jax.jit(lambda p: jnp.where(p > 0, p, 0.1 * p) / (1 + p**2)), W),
    "solve": (lambda p: jnp.linalg.solve(p @ p.T + 4 * jnp.eye(4), X.T), W),
    "fft": (lambda p: jnp.abs(jnp.fft.rfft(p)) ** 2, W),
    "gradient penalty": (lambda p: jax.grad(lambda p: jnp.sum(jnp.tanh(X @ p) ** 2))(p) ** 2, W),
    "custom_jvp": (lambda p: cubed(jax.nn.relu(X @ p)), W),
    "own rules, homogeneous": (lambda p: ratios(normalised(sign_of_gradient(jnp.tanh(X @ p)))) @ p, W),
    "own rules, while, sort, where": (lambda p: steps(sorts(jnp.tanh(X @ p))), W),
    "einsum": (lambda p: jnp.einsum("bi,ij,jk->bk", X, p["a"], p["b"]), {"a": W, "b": drawn(4, 5), "unused": W}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_plain_gradient_and_keeps_its_digits_when_the_seed_leaves_float32(name):
    function, params = LOSSES[name]

    def loss(p, scale):
        outputs = jax.tree.leaves(function(p))
        # The scale multiplies each time: 2**-300 is no float32.
        return sum(jnp.mean(out * jnp.cos(1.0 + out)) for out in outputs) * scale * scale * scale

    compiled = jax.jit(exact.gradient(loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, found = compiled(params, jnp.float32(1))
    want_value, want = jax.jit(jax.value_and_grad(loss))(params, jnp.float32(1))
    np.testing.assert_allclose(value, want_value, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(values(found)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6 * float(jnp.abs(theirs).max(initial=0)))
    _, far = compiled(params, SMALL)
    for near, away in zip(leaves(found), leaves(far), strict=True):
        near, away = (powers.normal(powers.merged(x)) for x in (near, away))
        assert away.exponent == near.exponent - 300 or not jnp.any(near.value)
        np.testing.assert_allclose(away.value, near.value, rtol=1e-6, atol=1e-30)


LAYERS = 24


def by_index(p):
    x = X.astype(p.dtype)
    for i in range(LAYERS):
        x = jax.nn.sigmoid(x @ p[i])
    return x


def by_traced_index(p):
    return jax.lax.fori_loop(0, LAYERS, lambda i, x: jax.nn.sigmoid(x @ p[i]), X.astype(p.dtype))


def by_rows(p):
    x = X.astype(p.dtype)
    for i in range(LAYERS):
        x = jax.nn.sigmoid(x @ p[jnp.array([i])][0])
    return x


def by_scan(p):
    return jax.lax.scan(lambda x, w: (jax.nn.sigmoid(x @ w), None), X.astype(p.dtype), p)[0]


def written_out(p):
    return functools.reduce(lambda x, w: jax.nn.sigmoid(x @ w), jnp.unstack(p), X.astype(p.dtype))


def by_two_scans(p):
    x = jax.lax.scan(lambda x, w: (jax.nn.sigmoid(x @ w), None), X.astype(p.dtype), p[:13])[0]
    return jax.lax.scan(lambda x, w: (jax.nn.sigmoid(x @ w), None), x, jnp.concatenate([p[13:20], p[20:]]))[0]


def flattened(p):
    return by_scan(
        jnp.concatenate([p.reshape(-1), jnp.zeros(3, p.dtype)])[: 16 * LAYERS]
        .reshape(4 * LAYERS, 4)
        .reshape(LAYERS, 4, 4)
    )


@functools.cache
def many_layers():
    """Their weights, and the log norms of the gradients of a sum of squares in float64."""
    params = np.random.default_rng(3).normal(size=(LAYERS, 4, 4)) / 400
    with jax.enable_x64(True):
        gradient = np.asarray(jax.jit(jax.grad(lambda p: jnp.mean(by_scan(p) ** 2)))(as_jax(params)))
    want = np.log(np.linalg.norm(gradient.reshape(LAYERS, -1), axis=1))
    assert want.min() < -150
    return params, want


@pytest.mark.parametrize(
    "function", [by_index, by_traced_index, by_rows, by_scan, written_out, by_two_scans, flattened]
)
def test_layers_of_one_array_keep_their_logs_however_they_are_taken_from_it(function):
    params, want = many_layers()
    found = jax.jit(exact.gradient(lambda p: jnp.mean(function(p) ** 2)))(as_jax(params, jnp.float32))[1]
    np.testing.assert_allclose(by_layer(found), want, atol=2e-5)


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 0.3), ("float16", 0.05), ("float64", 1e-11)])
def test_other_floats(dtype, close):
    params, want = many_layers()
    with jax.enable_x64(dtype == "float64"):
        found = jax.jit(exact.gradient(lambda p: jnp.mean(by_scan(p) ** 2)))(as_jax(params, dtype))[1]
        assert found.value.dtype == dtype
        np.testing.assert_allclose(np.asarray(by_layer(found), np.float64), want, atol=close)


@pytest.mark.parametrize(("outer", "inner", "close"), [("float32", "float16", 0.05), ("float64", "float32", 2e-5)])
def test_mixed_floats(outer, inner, close):
    params, want = many_layers()

    def loss(p):
        def layer(x, w):
            return jax.nn.sigmoid(jnp.matmul(x.astype(inner), w.astype(inner), preferred_element_type=outer)), None

        return jnp.mean(jax.lax.scan(layer, X.astype(outer), p)[0] ** 2)

    with jax.enable_x64(outer == "float64"):
        found = jax.jit(exact.gradient(loss))(as_jax(params, outer))[1]
        np.testing.assert_allclose(np.asarray(by_layer(found), np.float64), want, atol=close)


def test_complex_numbers():
    params = as_jax(RNG.normal(size=(12, 4, 4)) + 1j * RNG.normal(size=(12, 4, 4)), jnp.complex64)

    def loss(p, scale):
        x = functools.reduce(lambda x, w: 1 + jnp.tanh(x @ (scale * w)), jnp.unstack(p), X.astype(p.dtype))
        return jnp.sum(jnp.abs(x) ** 2)

    compiled = jax.jit(exact.gradient(loss))
    np.testing.assert_allclose(
        values(compiled(params, 0.3)[1]), jax.jit(jax.grad(loss))(params, 0.3), rtol=1e-4, atol=1e-8
    )
    with jax.enable_x64(True):
        want = np.asarray(jax.jit(jax.grad(loss))(params.astype(jnp.complex128), 1e-6)).reshape(12, -1)
    np.testing.assert_allclose(by_layer(compiled(params, 1e-6)[1]), np.log(np.linalg.norm(want, axis=1)), atol=1e-4)
