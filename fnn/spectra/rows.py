"""Products with the first rows of a large array, of which the others are neither used nor read yet.

Rows are read in blocks, as few as hold the first `count`; unused ones of the last block are zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import mapped

BLOCK = 4


def room(count: int) -> int:
    """Say how many rows to make room for."""
    return -(-count // BLOCK) * BLOCK


def times(count: Any, rows: jax.Array, vectors: jax.Array) -> jax.Array:
    """Multiply rows · vectorsᵀ: float[most, n], float[..., n] -> float[most, ...], zero for rows that are not used."""
    vectors = vectors.T

    def body(at, out):
        found = dot(jax.lax.dynamic_slice_in_dim(rows, at, BLOCK), vectors)
        return jax.lax.dynamic_update_slice_in_dim(out, found, at, 0)

    return _each(count, body, jnp.zeros((len(rows), *vectors.shape[1:]), rows.dtype), (rows, vectors))


def mixed(count: Any, *terms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Add up coefficientsᵀ · rows over terms: float[most, ...], float[most, n] -> float[..., n]."""

    def body(at, out):
        for coefficients, rows in terms:
            part, block = (jax.lax.dynamic_slice_in_dim(a, at, BLOCK) for a in (coefficients, rows))
            out = out + dot(part.T, block)
        return out

    coefficients, rows = terms[0]
    return _each(count, body, jnp.zeros((*coefficients.shape[1:], rows.shape[1]), rows.dtype), terms)


def without(count: Any, rows: jax.Array, w: jax.Array) -> jax.Array:
    """Take from w what orthonormal rows have of it, one block after the other: float[n]."""

    def body(at, w):
        block = jax.lax.dynamic_slice_in_dim(rows, at, BLOCK)
        return w - dot(dot(block, w), block)

    return _each(count, body, w, rows)


def _each(count: Any, body: Callable[[Any, Any], Any], start: Any, like: Any) -> Any:
    start = mapped.varying(start, like=(count, like))
    return jax.lax.fori_loop(0, (count + BLOCK - 1) // BLOCK, lambda i, carry: body(i * BLOCK, carry), start)


def eigh(matrix: jax.Array, used: jax.Array, far: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decompose the part of a symmetric matrix that is used, of its first rows: (ascending values, columns).

    The others have the value -far, which is to be below all, and come first.
    """
    most, sizes = len(matrix), []
    while not sizes or sizes[-1] < most:
        sizes.append(min(most, 4 * sizes[-1] if sizes else 16))
    matrix = jnp.where(used[:, None] & used, matrix, 0) - jnp.diag(jnp.where(used, 0, far))

    def part(size):
        values, columns = jnp.linalg.eigh(matrix[:size, :size], symmetrize_input=False)
        rest = most - size
        return jnp.concatenate([jnp.broadcast_to(-far, rest), values]), jnp.pad(columns, ((0, rest), (rest, 0)))

    values, columns = jax.lax.switch(
        jnp.searchsorted(jnp.array(sizes), jnp.sum(used)), [lambda s=s: part(s) for s in sizes]
    )
    return values, jnp.where(used[:, None] & (values > -far / 2), columns, 0)


def symmetric(upper: jax.Array) -> jax.Array:
    """Fill the lower triangle."""
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply in full precision."""
    return jnp.matmul(a, b, precision="highest")
