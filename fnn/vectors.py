"""Small arrays joined into vectors, so that many of them cost one operation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import lowering


def pack(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Join the small arrays of a list into one vector for each dtype, after the large ones; `unpack` undoes it."""
    groups = _small(leaves).values()
    return [a for a in leaves if not _is_small(a)] + [jnp.concatenate([jnp.ravel(a) for a in g]) for g in groups]


def unpack(packed: Sequence[jax.Array], like: Sequence[jax.Array]) -> list[jax.Array]:
    """Split what `pack` joined into arrays of the shapes and dtypes of `like`."""
    rest = iter(packed)
    large = [None if _is_small(a) else next(rest) for a in like]
    parts = {
        dtype: iter(jnp.split(next(rest), np.cumsum([a.size for a in group])[:-1]))
        for dtype, group in _small(like).items()
    }
    return [next(parts[b.dtype]).reshape(b.shape) if a is None else a for a, b in zip(large, like, strict=True)]


def _is_small(a: Any) -> bool:
    return jnp.size(a) <= lowering.SMALL


def _small(leaves: Sequence[Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for a in filter(_is_small, leaves):
        groups.setdefault(a.dtype, []).append(a)
    return groups


def summed(parts: Sequence[jax.Array], over: Sequence[int], peaks: bool = False) -> tuple[jax.Array, ...]:
    """Sum several arrays over the same axes in one operation; with `peaks` take the maximum of the first."""

    def combine(a, b):
        pairs = list(zip(a, b, strict=True))
        return tuple(jnp.maximum(u, v) if peaks and not i else u + v for i, (u, v) in enumerate(pairs))

    zero = np.zeros((), parts[0].dtype)
    return tuple(jax.lax.reduce(tuple(parts), (zero,) * len(parts), combine, tuple(over)))
