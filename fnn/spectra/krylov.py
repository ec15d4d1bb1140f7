"""Extreme eigenvalues of a symmetric matrix from products with vectors: Lanczos, and Davidson's method from a last result.

The space starts from given vectors, random ones or those of the last step, and grows by one product at a time until the
wanted eigenvalues are known well enough: in the direction of the worst residual r. That is Lanczos. With approximate pairs
of a similar matrix, B = V θ Vᵀ, it grows in the direction of (B - λ)⁻¹ r, which is Davidson's method. With p vectors at the
start, an eigenvalue is seen up to p times.

A search ends when residuals are small, and when it is as good as sure that no eigenvalue was missed: see `proof`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import compiled, mapped, tree
from fnn.spectra import products, rows
from fnn.spectra import proof as proofs
from fnn.spectra.rows import dot, symmetric

Matvec = Callable[[jax.Array], jax.Array]
KEPT = 7
"""How many approximate pairs are kept for the next search, besides the wanted ones."""
APART = 0.1
"""Eigenvalues of B count as this far from λ at least, relative to it: they are those of another matrix."""


class Known(NamedTuple):
    """Approximate pairs of the wanted end, for the search on a similar matrix."""

    values: jax.Array
    """float[m]"""
    vectors: jax.Array
    """Orthonormal, or zero where there are none; float[m, n]."""
    probe: jax.Array
    """The random vector g of `proof`, zero where there is none yet; float[n]."""
    solution: jax.Array
    """Its z, up to a factor; zero where there is none. float[n]"""


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
    missed: jax.Array
    """The chance, over random vectors, that the k-th eigenvalue lies beyond `limit`: at most so much. 0 where the search saw
    the whole space, 1 where it was not asked for, or not known yet. float[]"""
    limit: jax.Array
    """The last value and the tolerance; with a tolerance near rounding, a little more (see `proof.NEAR`). Infinite where
    nothing is known. float[]"""
    converged: jax.Array
    """Whether all residuals are within the tolerance, or within rounding of the largest eigenvalue, and `missed` is at most
    what was allowed; bool[]."""
    known: Known

    def __repr__(self) -> str:
        if compiled.traced(self):
            return "Pairs(traced)"
        found = ", ".join(f"{v:.6g} ± {e:.1g}" for v, e in zip(self.values, self.residuals, strict=True))
        rest = "" if self.converged else ", not converged"
        return (
            f"Pairs({found}; {int(self.products)} products, chance of a missed one <= {float(self.missed):.1g}{rest})"
        )


class _Space(NamedTuple):
    count: Any
    """Products so far."""
    basis: Any
    """Orthonormal rows; those not yet made are zero. float[most, n]"""
    images: Any
    """basis · A, times the sign; float[most, n]"""
    matrix: Any
    """basis · imagesᵀ, the upper triangle. float[most, most]"""
    unit: Any
    """All these are in units of it, the largest number of the first image that is not zero: squares have digits then."""
    key: Any
    pairs: Any
    """Those of the wanted end."""
    next: Any
    """The direction in which it grows; float[n]."""
    proof: Any
    done: Any


def unknown(start: jax.Array) -> Known:
    """Make what is known of a matrix before the first search, from standard normal vectors; start: float[k, n].

    A single one also serves as the g of `proof`.
    """
    k, n = start.shape
    m, zero = min(k + KEPT, n), jnp.zeros_like(start[0])
    return Known(zero[:m], jnp.zeros((m, n), start.dtype), start[0] if k == 1 else zero, zero)


def eigenpairs(
    matvec: Matvec, start: jax.Array, known: Known, key: Any, k: int, options: tuple[int, int, Any, Any]
) -> Pairs:
    """Find k eigenvalues at the top of the spectrum (sign 1) or at its bottom (-1); start: float[p, n].

    `options` are (most products, sign, tolerance relative to each value, the chance that one may be missed: with 1 none is
    looked for); `known` may be `unknown`. A start vector that is
    zero or not finite, or lies in the space already, is replaced by a random one, and so is the next direction where there is
    none or the space is invariant. Source: Davidson 1975. Its arguments are those of one search.
    """
    most, sign, tolerance, chance = options
    p, n = start.shape
    p = min(p, n)
    most = max(min(most, n), p, k)
    dtype = start.dtype
    eps = max(float(jnp.finfo(dtype).eps), products.rounding(matvec, start[0]))
    start = jnp.where(jnp.all(jnp.isfinite(start), axis=1, keepdims=True), start, 0)
    key, draw = jax.random.split(key)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in known]))
    old_values, old, probe, solution = (
        jnp.where(finite, a, 0).astype(dtype) for a in (sign * known.values, known.vectors, known.probe, known.solution)
    )
    probe = jnp.where(jnp.any(probe != 0), probe, jax.random.normal(draw, (n,), dtype))
    zero = mapped.varying(jnp.zeros((), dtype), like=start)

    def fresh(count, basis, w, key):
        """Make w orthogonal to the basis: (what is left as a unit vector, key)."""
        key, draw = jax.random.split(key)

        def orthogonal(w):
            """Project, and again if much was taken: (a unit vector, whether more than rounding was left)."""
            w = w / tree.divisor(jnp.max(jnp.abs(w)))
            before = tree.length(w)
            w = rows.without(count, basis, w)
            left = tree.length(w)
            w = w / tree.divisor(left)
            again = jax.lax.cond(left > 0.7 * before, lambda: w, lambda: rows.without(count, basis, w))
            rest = tree.length(again)
            return again / tree.divisor(rest), (left > 10 * jnp.finfo(dtype).eps * before) & (rest > 0.5)

        unit, good = orthogonal(w)

        def replaced():
            other, good = orthogonal(jax.random.normal(draw, (n,), dtype))
            return jnp.where(good, other, 0)  # where the basis spans everything, only rounding is left

        return jax.lax.cond(good, lambda: unit, replaced), key

    def wanted(space):
        count, square = space.count, symmetric(space.matrix)
        far = 4 * jnp.sum(jnp.abs(square)) + 1
        values, coefficients = rows.eigh(square, jnp.arange(len(square)) < count, far)
        rounding = 4 * eps * jnp.max(jnp.where(values > -far / 2, jnp.abs(values), 0))
        values, coefficients = values[::-1][:k], coefficients[:, ::-1][:, :k]
        left = rows.mixed(count, (coefficients, space.images), (-values * coefficients, space.basis))
        residuals = jnp.maximum(tree.length(left, 1), rounding)
        bounds = jnp.maximum(tolerance * jnp.abs(values), rounding)
        good = jnp.all(residuals <= bounds) & (count >= max(k, p))
        worst = jnp.argmax(jnp.where(jnp.arange(k) < count, residuals / bounds, 0))
        pairs = proofs.Pairs(values, coefficients, residuals, bounds)

        def improve():
            return space.proof._replace(missed=zero + 1), _corrected(
                left[worst], values[worst], old_values / space.unit, old
            )

        def prove():
            parts = count, space.basis, space.images, square
            after, rest = proofs.judged(space.proof, parts, pairs, eps, jax.random.fold_in(space.key, 1))
            return after, jnp.where(space.proof.warm & (space.proof.rounds == 0), solution, rest)

        proof, follow = jax.lax.cond(good & (chance < 1), prove, improve)
        follow = jnp.where(count < p, start[jnp.minimum(count, p - 1)], follow)
        # The whole space leaves rounding alone, if the matrix is symmetric.
        complete = (count >= n) & jnp.all(residuals <= jnp.maximum(bounds, 30 * rounding))
        enough = (chance >= 1) | proofs.accepted(proof, chance)
        proof = proof._replace(
            missed=jnp.where(complete, 0, proof.missed),
            limit=jnp.where(complete, values[-1] + bounds[-1], proof.limit),
        )
        return space._replace(pairs=pairs, next=follow, proof=proof, done=complete | (good & enough))

    def grow(space):
        j = space.count
        direction, key = fresh(j, space.basis, space.next, space.key)
        w = sign * matvec(direction)
        largest = jnp.max(jnp.abs(w))
        unit = jnp.where((space.unit == 1) & (largest > 0), largest, space.unit)
        basis, images = space.basis.at[j].set(direction), space.images.at[j].set(w / unit)
        matrix = space.matrix.at[:, j].set(rows.times(j + 1, basis, w / unit))
        space = space._replace(count=j + 1, basis=basis, images=images, matrix=matrix, unit=unit, key=key)
        return wanted(space)

    room = rows.room(most)
    empty = jnp.zeros((room, n), dtype) + zero
    few, no = jnp.zeros(k, dtype) + zero, mapped.varying(jnp.array(False), like=start)
    space = _Space(
        count=mapped.varying(jnp.int32(0), like=start),
        basis=empty,
        images=empty,
        matrix=jnp.zeros((room, room), dtype) + zero,
        unit=zero + 1,
        key=mapped.varying(key, like=start),
        pairs=proofs.Pairs(few, empty[:, :1] + few, few + jnp.inf, few),
        next=start[0],
        proof=proofs.begun(probe + zero, room, k, no | jnp.any(solution != 0)),
        done=no,
    )
    space = jax.lax.while_loop(lambda s: (s.count < most) & ~s.done & ~jnp.any(jnp.isnan(s.matrix)), grow, space)
    values, coefficients, residuals, _ = space.pairs
    unit, proof = space.unit, space.proof
    z = proof.solution - dot(
        coefficients, dot(proof.solution, coefficients)
    )  # the next search has the wanted part anew
    merged, kept = _merged(space, old_values / unit, old, min(k + KEPT, n))
    vectors = rows.mixed(space.count, (jnp.column_stack([coefficients, z]), space.basis))
    unused = proof.warm & (proof.rounds == 0)
    known = Known(sign * unit * merged, kept, proof.probe, jnp.where(unused, solution, vectors[k]))
    return Pairs(
        sign * unit * values,
        vectors[:k],
        unit * residuals,
        space.count,
        proof.missed,
        sign * unit * proof.limit,
        space.done,
        known,
    )


def _corrected(r: jax.Array, value: jax.Array, old_values: jax.Array, old: jax.Array) -> jax.Array:
    """(B - value)⁻¹ r for B = oldᵀ diag(old_values) old; without old ones a multiple of r."""

    def below(gap):
        gap = jnp.minimum(gap, -APART * jnp.abs(value))
        return jnp.where(gap < 0, gap, -1)

    along = dot(old, r)
    return r / below(-value) + dot(along / below(old_values - value) - along / below(-value), old)


def _merged(space: _Space, old_values: jax.Array, old: jax.Array, many: int) -> tuple[jax.Array, jax.Array]:
    """Take approximate pairs over the space and what the old vectors have beside it, where A is as B was."""
    count, basis = space.count, space.basis
    rest = old - rows.mixed(count, (rows.times(count, basis, old), basis))
    lengths, rotation = jnp.linalg.eigh(dot(rest, rest.T))
    good = lengths > APART
    rest = dot((rotation * jnp.where(good, 1 / jnp.sqrt(jnp.where(good, lengths, 1)), 0)).T, rest)
    among = dot(rest, old.T)
    among = dot(among * old_values, among.T)
    across = rows.times(count, space.images, rest)
    whole = jnp.block([[symmetric(space.matrix), across], [across.T, among]])
    used = jnp.concatenate([jnp.arange(len(basis)) < count, good])
    whole = jnp.where(used[:, None] & used, whole, 0)
    far = 4 * jnp.sum(jnp.abs(whole)) + 1
    values, coefficients = jnp.linalg.eigh(whole - jnp.diag(jnp.where(used, 0, far)), symmetrize_input=False)
    values, coefficients = values[::-1][:many], jnp.where(used[:, None], coefficients[:, ::-1][:, :many], 0)
    vectors = rows.mixed(count, (coefficients, basis)) + dot(coefficients[len(basis) :].T, rest)
    missing = many - len(values)
    return jnp.pad(jnp.where(values > -far / 2, values, 0), (0, missing)), jnp.pad(vectors, ((0, missing), (0, 0)))
