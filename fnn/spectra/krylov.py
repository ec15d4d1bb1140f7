"""Extreme eigenvalues of a symmetric matrix from products with vectors: block Lanczos with full reorthogonalisation.

The space is started from given vectors, random ones or those of the last step, and grows by one product at a time until
the wanted eigenvalues are known well enough. With p vectors at the start, an eigenvalue is seen up to p times.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import compiled, mapped, tree

Matvec = Callable[[jax.Array], jax.Array]


class Pairs(NamedTuple):
    """Eigenvalues and eigenvectors at one end of a spectrum, from the end inwards."""

    values: jax.Array
    """float[k]"""
    vectors: jax.Array
    """Unit vectors, float[k, n]."""
    residuals: jax.Array
    """|A v - value v|, rounding included: an eigenvalue lies within this distance of each value, surely. float[k]"""
    products: jax.Array
    """How many products it took; int32[]."""
    converged: jax.Array
    """Whether all residuals are within the tolerance; bool[]."""

    def __repr__(self) -> str:
        if compiled.traced(self):
            return "Pairs(traced)"
        found = ", ".join(f"{v:.6g} ± {e:.1g}" for v, e in zip(self.values, self.residuals, strict=True))
        known = "" if self.converged else ", not converged"
        return f"Pairs({found}; {int(self.products)} products{known})"


class _Space(NamedTuple):
    count: Any
    """Products so far."""
    basis: Any
    """Orthonormal rows; those not yet made are zero. float[most + p, n]"""
    matrix: Any
    """basis · A · basisᵀ, a column for each product. float[most + p, most]"""
    key: Any
    pairs: Any
    """(values, coefficients, residuals) of the wanted end."""
    done: Any


def eigenpairs(matvec: Matvec, start: jax.Array, key: Any, k: int, options: tuple[int, float, int]) -> Pairs:
    """Find k eigenvalues at the top of the spectrum (sign 1) or at its bottom (-1); start: float[p, n].

    `options` are (most products, tolerance relative to each value, sign). A start vector that is zero, or lies in the space
    already, is replaced by a random one, and so is the next direction where the space is invariant.
    """
    most, tolerance, sign = options
    p, n = start.shape
    p = min(p, n)
    most = max(min(most, n), p, k)
    dtype, eps = start.dtype, jnp.finfo(start.dtype).eps

    def fresh(basis, w, key, scale):
        """Make w orthogonal to the basis: (coefficients, what is left as a unit vector, its length, key)."""
        first = _dot(basis, w)
        w = w - _dot(basis.T, first)
        second = _dot(basis, w)
        w = w - _dot(basis.T, second)
        length = tree.length(w)
        key, draw = jax.random.split(key)

        def replaced():
            other = jax.random.normal(draw, (n,), dtype)
            for _ in range(2):
                other = other / jnp.sqrt(jnp.sum(jnp.square(other)))
                other = other - _dot(basis.T, _dot(basis, other))
            left = jnp.sqrt(jnp.sum(jnp.square(other)))
            # Where the basis spans everything, only rounding is left.
            return jnp.where(left > 100 * eps, other / left, 0), jnp.zeros((), dtype)

        lost = length <= 10 * eps * scale
        unit, length = jax.lax.cond(lost, replaced, lambda: (w / jnp.where(lost, 1, length), length))
        return first + second, unit, length, key

    def begin(i, carry):
        basis, key = carry
        w = start[i]
        _, unit, _, key = fresh(basis, w, key, tree.length(w))
        return basis.at[i].set(unit), key

    basis = mapped.varying(jnp.zeros((most + p, n), dtype), like=start)
    basis, key = jax.lax.fori_loop(0, p, begin, (basis, mapped.varying(key, like=start)))

    def wanted(space):
        used = jnp.arange(most) < space.count
        # In units of the largest number: a matrix of any scale has its own digits, beside the rows that are not used.
        peak = tree.divisor(jnp.max(jnp.abs(space.matrix)))
        matrix = space.matrix / peak
        square = jnp.where(used[:, None] & used, sign * 0.5 * (matrix[:most] + matrix[:most].T), 0)
        far = 4 * jnp.sum(jnp.abs(square)) + 1
        values, coefficients = jnp.linalg.eigh(square - jnp.diag(jnp.where(used, 0, far)), symmetrize_input=False)
        values, coefficients = values[::-1] * peak, coefficients[:, ::-1]
        beyond = jnp.arange(most + p)[:, None] >= space.count
        residuals = peak * tree.length(_dot(jnp.where(beyond, matrix, 0), coefficients), 0)
        rounding = 4 * eps * jnp.max(jnp.where(used, jnp.abs(values), 0))
        residuals = jnp.maximum(residuals[:k], rounding)
        good = residuals <= jnp.maximum(tolerance * jnp.abs(values[:k]), rounding)
        done = (jnp.all(good) & (space.count >= max(k, p))) | (space.count >= n)
        return space._replace(pairs=(values[:k], coefficients[:, :k], residuals), done=done)

    def grow(space):
        j = space.count
        w = matvec(space.basis[j])
        scale = jnp.maximum(jnp.max(jnp.abs(space.matrix)), tree.length(w))
        coefficients, unit, length, key = fresh(space.basis, w, space.key, scale)
        matrix = space.matrix.at[:, j].set(coefficients.at[j + p].set(length))
        return wanted(space._replace(count=j + 1, basis=space.basis.at[j + p].set(unit), matrix=matrix, key=key))

    zero = mapped.varying(jnp.zeros((), dtype), like=start)
    nothing = (jnp.zeros(k, dtype) + zero, jnp.zeros((most, k), dtype) + zero, jnp.full(k, jnp.inf) + zero)
    space = _Space(
        mapped.varying(jnp.int32(0), like=start),
        basis,
        jnp.zeros((most + p, most), dtype) + zero,
        key,
        nothing,
        mapped.varying(jnp.array(False), like=start),
    )
    space = jax.lax.while_loop(lambda s: (s.count < most) & ~s.done & ~jnp.any(jnp.isnan(s.matrix)), grow, space)
    values, coefficients, residuals = space.pairs
    return Pairs(sign * values, _dot(coefficients.T, space.basis[:most]), residuals, space.count, space.done)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
