"""Activations that are known by their values at some points."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KNOWN: dict[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "leaky_relu": jax.nn.leaky_relu,
    "identity": lambda x: x,
}
"""Activations that are known by their values."""
POINTS = np.array([*np.linspace(-3, 3, 25), -8, 8])
FEWEST = 4
"""Of an array with fewer numbers no activation is known by its values."""


def named(got: np.ndarray, at: np.ndarray) -> str | None:
    """Recognise an activation by its values."""
    if got.dtype == bool or not np.isfinite(got.astype(np.float64)).all():
        return None
    eps = min(float(jnp.finfo(got.dtype).eps), 2.0**-7) if jnp.issubdtype(got.dtype, jnp.floating) else 0.0
    rtol, atol, y = max(1e-5, 2 * eps), max(2e-3, 2 * eps), got.astype(np.float64).ravel()
    for name in KNOWN:
        if name != "identity" and np.allclose(y, _values(name, at.size), rtol, atol):
            return name
    return None


def points(size: int) -> np.ndarray:
    """Spread points over an array, from one end of their range to the other."""
    if size < len(POINTS):
        return np.sort(POINTS)[np.linspace(0, len(POINTS) - 1, size).astype(int)]
    return np.resize(POINTS, size)


@functools.cache
def _values(name: str, size: int) -> np.ndarray:
    return np.asarray(KNOWN[name](jnp.asarray(points(size), jnp.float32)), np.float64)
