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
