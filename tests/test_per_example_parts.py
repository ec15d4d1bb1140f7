"""Gradients of single examples where a parameter is used in parts, or is one part of a larger array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn

RNG = np.random.default_rng(0)
FIVE, TWELVE = (RNG.normal(size=(6, n)).astype(np.float32) for n in (5, 12))


def drawn(*shape):
    return np.float32(RNG.normal(size=shape) / 2)


def looped(p, x):
    for i in range(2):
        x = jnp.tanh(x @ p["w"][i])
    return x


def joined(p, axis=1):
    return jnp.concatenate([p["a"], p["b"]], axis)


CASES = {
    "rows of a stack": (looped, {"w": drawn(2, 5, 5)}, FIVE),
    "one of a stack": (lambda p, x: x @ p["w"][1], {"w": drawn(2, 5, 3)}, FIVE),
    "cropped, then reshaped": (lambda p, x: x @ p["w"][:, :4].reshape(12, 4), {"w": drawn(3, 8, 4)}, TWELVE),
    "heads side by side": (lambda p, x: x @ joined(p).reshape(5, -1), {"a": drawn(5, 2, 3), "b": drawn(5, 2, 3)}, FIVE),
    "parts of a square": (
        lambda p, x: x @ joined(p).reshape(12, 4),
        {"a": drawn(3, 2, 4), "b": drawn(3, 2, 4)},
        TWELVE,
    ),
    "cropped": (lambda p, x: x @ p["w"][:, 1:4], {"w": drawn(5, 5)}, FIVE),
    "cropped and turned": (lambda p, x: x @ p["w"].T[:, 1:4], {"w": drawn(5, 5)}, FIVE),
    "columns side by side": (lambda p, x: x @ joined(p), {"a": drawn(5, 5), "b": drawn(5, 2)}, FIVE),
    "rows one under the other": (lambda p, x: x @ joined(p, 0), {"a": drawn(7, 4), "b": drawn(5, 4)}, TWELVE),
}
FACTORED = ("cropped", "cropped and turned", "columns side by side", "rows one under the other")


@pytest.mark.parametrize("name", CASES)
def test_parts_of_arrays_are_those_of_vmap_grad(name):
    outputs, params, x = CASES[name]

    def loss(p, x):
        return jnp.sum(jnp.tanh(outputs(p, x)) ** 2)

    @jax.jit
    def both(p, x):
        found, whole = fnn.per_example(loss)(p, x), jax.vmap(jax.grad(loss), (None, 0))(p, x)
        got = {"norms": found.norms(), "gram": found.gram(), "mean": found.mean(), "every": found.materialize()}
        flat = jnp.concatenate([g.reshape(len(x), -1) for g in jax.tree.leaves(whole)], axis=1)
        mean = jax.tree.map(lambda g: jnp.mean(g, 0), whole)
        return got, {"norms": jnp.linalg.norm(flat, axis=1), "gram": flat @ flat.T, "mean": mean, "every": whole}

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *both(params, x))
    assert all(
        (route.route != "stored in full") == (name in FACTORED) for route in fnn.per_example(loss)(params, x).routes
    )


@pytest.mark.parametrize("error_first", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-39, 1e-30, 1.0])
def test_one_factor_is_zero_or_tiny_and_the_other_large(error_first, size):
    """A parameter that is used twice, at one position: neither factor may leave float32 when the other is made larger."""

    def loss(p, x):
        products = [jnp.einsum("b,ab->a", x, w) if error_first else x @ w.T for w in (p, 2 * p)]
        return size * sum(map(jnp.sum, products))

    x = np.float32([[100, 200, -300], [0, 0, 0], [1e5, 1, 1]])
    params = np.ones((2, 3), np.float32)
    found = jax.jit(lambda p, x: (g := fnn.per_example(loss)(p, x)) and (g.norms(), g.mean(), g.gram()))(params, x)
    wide = 3 * size * np.float64(x)
    norms = np.sqrt(2) * np.linalg.norm(wide, axis=1)
    for got, want in zip(found, (norms, np.stack([wide.mean(0)] * 2), 2 * wide @ wide.T), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5 if size > 1e-38 else 1, atol=1e-37)
