"""Every test starts from JAX's defaults: float32, one CPU device."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def x64():
    """Compute in float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


def randomized(tree, key):
    """Move every floating leaf off its initial value, so that zeros and ones hide nothing."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(1, len(leaves)))
    return treedef.unflatten(
        leaf + 0.1 * jax.random.normal(k, jnp.shape(leaf), leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    )
