"""Extreme eigenvalues of a symmetric matrix from products with vectors: Lanczos, and Davidson's method from a last result.

The space starts from given vectors, random ones or those of the last step, and grows by one product at a time until the
wanted eigenvalues are known well enough: in the direction of the worst residual r. That is Lanczos. With approximate pairs
of a similar matrix, B = V θ Vᵀ, it grows in the direction of (B - λ)⁻¹ r, which is Davidson's method. With p vectors at the
start, an eigenvalue is seen up to p times.

A small residual proves an eigenvalue, not the largest one. For that the search also solves (μ - A) z = g in the space, with
g standard normal and μ just above the wanted eigenvalues, and grows by what is left, r = g - (μ - A) z. An eigenvector u of
μ would have uᵀg = uᵀr, so |uᵀg| <= |r|: a normal number that small has chance √(2/π) |r| at most. Larger eigenvalues leave
even less. The z of a similar matrix is a good start: one product then tells whether any eigenvalue has passed the wanted ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import compiled, mapped, tree
from fnn.spectra import products

Matvec = Callable[[jax.Array], jax.Array]
KEPT = 7
"""How many approximate pairs are kept for the next search, besides the wanted ones."""
CHANCE, AIM = 0.01, 0.001
"""The chance that an eigenvalue was missed is at most the first. A search that must bring it down goes on to the second, so
that its z serves the next search too."""
APART = 0.1
"""Eigenvalues of B count as this far from λ at least, relative to it: they are those of another matrix."""


class Known(NamedTuple):
    """Approximate pairs of the wanted end, for the search on a similar matrix."""

    values: jax.Array
    """float[m]"""
    vectors: jax.Array
    """Orthonormal, or zero where there are none; float[m, n]."""
    probe: jax.Array
    """The random vector g; float[n]."""
    solution: jax.Array
    """z with (μ - A) z = g, μ just above the wanted values, up to a factor; zero where there is none. float[n]"""


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
    """The chance, over random vectors, that more than k eigenvalues lie beyond the last value and the tolerance: at most so
    much. 0 where the search saw the whole space, 1 where it stopped before it knew. float[]"""
    converged: jax.Array
    """Whether all residuals are within the tolerance, or within rounding of the largest eigenvalue, and `missed` is at most
    `CHANCE`; bool[]."""
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
    """basis · A; float[most, n]"""
    matrix: Any
    """basis · A · basisᵀ, the upper triangle. float[most, most]"""
    gram: Any
    """images · imagesᵀ in units of `unit`². float[most, most]"""
    unit: Any
    """The largest number of the images."""
    along: Any
    """(basis · g, images · g); float[most] each."""
    key: Any
    pairs: Any
    """(values, coefficients, residuals) of the wanted end."""
    next: Any
    """The direction in which it grows; float[n]."""
    solution: Any
    """Coefficients of z over the basis; float[most]."""
    missed: Any
    proofs: Any
    """How often `missed` was found; after the first time the z of the last search comes into the space."""
    done: Any


def unknown(k: int, probe: jax.Array) -> Known:
    """Make what is known of a matrix before the first search for k pairs; probe: standard normal numbers, float[n]."""
    m = min(k + KEPT, len(probe))
    zero = jnp.zeros_like(probe)
    return Known(zero[:m], jnp.zeros((m, len(probe)), probe.dtype), probe, zero)


def eigenpairs(
    matvec: Matvec, start: jax.Array, known: Known, key: Any, k: int, options: tuple[int, float, int]
) -> Pairs:
    """Find k eigenvalues at the top of the spectrum (sign 1) or at its bottom (-1); start: float[p, n].

    `options` are (most products, tolerance relative to each value, sign); `known` may be `unknown`. A start vector that is
    zero or not finite, or lies in the space already, is replaced by a random one, and so is the next direction where there is
    none or the space is invariant. Source: Davidson 1975. Its arguments are those of one search.
    """
    most, tolerance, sign = options
    p, n = start.shape
    p = min(p, n)
    most = max(min(most, n), p, k)
    dtype = start.dtype
    eps = max(float(jnp.finfo(dtype).eps), products.rounding(matvec, start[0]))
    start = jnp.where(jnp.all(jnp.isfinite(start), axis=1, keepdims=True), start, 0)
    key, draw = jax.random.split(key)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in known])) & jnp.any(known.probe != 0)
    old_values, old, solution = (
        jnp.where(finite, a, 0).astype(dtype) for a in (sign * known.values, known.vectors, known.solution)
    )
    probe = jnp.where(finite, known.probe, jax.random.normal(draw, (n,), dtype)).astype(dtype)
    warm = jnp.any(solution != 0)

    zero = mapped.varying(jnp.zeros((), dtype), like=start)
    numbers = jnp.zeros(most, dtype) + zero

    def fresh(basis, w, key):
        """Make w orthogonal to the basis: (what is left as a unit vector, key)."""
        key, draw = jax.random.split(key)

        def orthogonal(w):
            """Project twice, which is enough: (a unit vector, whether more than rounding was left)."""
            w = w / tree.divisor(jnp.max(jnp.abs(w)))
            before, left = tree.length(w), []
            for _ in range(2):
                w = w - _dot(basis.T, _dot(basis, w))
                left.append(tree.length(w))
                w = w / tree.divisor(left[-1])
            return w, (left[0] > 10 * jnp.finfo(dtype).eps * before) & (left[1] > 0.5)

        unit, good = orthogonal(w)

        def replaced():
            other, good = orthogonal(jax.random.normal(draw, (n,), dtype))
            return jnp.where(good, other, 0)  # where the basis spans everything, only rounding is left

        return jax.lax.cond(good, lambda: unit, replaced), key

    def wanted(space):
        used = jnp.arange(most) < space.count
        # In units of the largest number: a matrix of any scale has its own digits, beside the rows that are not used.
        peak = tree.divisor(jnp.max(jnp.abs(space.matrix)))
        square = _symmetric(sign * space.matrix / peak)
        far = 4 * jnp.sum(jnp.abs(square)) + 1
        values, coefficients = jnp.linalg.eigh(square - jnp.diag(jnp.where(used, 0, far)), symmetrize_input=False)
        values, coefficients = values[::-1] * peak, coefficients[:, ::-1]
        rounding = 4 * eps * jnp.max(jnp.where(used, jnp.abs(values), 0))
        coefficients = jnp.where(used[:, None], coefficients, 0)
        left = sign * _dot(coefficients[:, :k].T, space.images) - values[:k, None] * _dot(
            coefficients[:, :k].T, space.basis
        )
        residuals = jnp.maximum(tree.length(left, 1), rounding)
        bounds = jnp.maximum(tolerance * jnp.abs(values[:k]), rounding)
        good = jnp.all(residuals <= bounds) & (space.count >= max(k, p))
        worst = jnp.argmax(jnp.where(jnp.arange(k) < space.count, residuals / bounds, 0))

        def improve():
            return zero + 1, numbers, _corrected(left[worst], values[worst], old_values, old)

        def prove():
            # Within the bound with the last value's own residual: λ <= (θ + μ)/2 + √(((μ - θ)/2)² + residual²).
            gap = bounds[-1] - jnp.square(residuals[-1] / bounds[-1]) * bounds[-1]
            gap = jnp.maximum(gap, 8 * math.sqrt(eps) * jnp.max(jnp.abs(values) * used))
            size, z, rest = _solve(space, (values, coefficients), values[k - 1] + gap, (sign, k), probe)
            rest = jnp.where((space.proofs == 0) & warm, solution, rest)
            return jnp.minimum(math.sqrt(2 / math.pi) * size, 1), z, rest

        missed, found, follow = jax.lax.cond(good, prove, improve)
        follow = jnp.where(space.count < p, start[jnp.minimum(space.count, p - 1)], follow)
        # The whole space leaves rounding alone, if the matrix is symmetric.
        complete = (space.count >= n) & jnp.all(residuals <= jnp.maximum(bounds, 30 * rounding))
        missed = jnp.where(complete, 0, missed)
        return space._replace(
            pairs=(values[:k], coefficients[:, :k], residuals),
            next=follow,
            solution=found,
            missed=missed,
            proofs=space.proofs + good,
            done=(good & (missed <= jnp.where(warm & (space.proofs < 2), CHANCE, AIM))) | complete,
        )

    def grow(space):
        j = space.count
        direction, key = fresh(space.basis, space.next, space.key)
        w = matvec(direction)
        basis, images = space.basis.at[j].set(direction), space.images.at[j].set(w)
        matrix = space.matrix.at[:, j].set(_dot(basis, w))
        unit = tree.divisor(jnp.maximum(space.unit, jnp.max(jnp.abs(w))))
        row = _dot(images, w / unit) / unit
        gram = (space.gram * jnp.square(space.unit / unit)).at[:, j].set(row).at[j].set(row)
        along = space.along[0].at[j].set(_dot(direction, probe)), space.along[1].at[j].set(_dot(w, probe))
        space = space._replace(count=j + 1, basis=basis, images=images, matrix=matrix, key=key)
        return wanted(space._replace(gram=gram, unit=unit, along=along))

    nothing = (jnp.zeros(k, dtype) + zero, jnp.zeros((most, k), dtype) + zero, jnp.full(k, jnp.inf) + zero)
    empty = jnp.zeros((most, n), dtype) + zero
    count, no = mapped.varying((jnp.int32(0), jnp.array(False)), like=start)
    space = _Space(
        count=count,
        basis=empty,
        images=empty,
        matrix=jnp.zeros((most, most), dtype) + zero,
        gram=jnp.zeros((most, most), dtype) + zero,
        unit=zero,
        along=(numbers, numbers),
        key=mapped.varying(key, like=start),
        pairs=nothing,
        next=start[0],
        solution=numbers,
        missed=zero + 1,
        proofs=count,
        done=no,
    )
    space = jax.lax.while_loop(lambda s: (s.count < most) & ~s.done & ~jnp.any(jnp.isnan(s.matrix)), grow, space)
    values, coefficients, residuals = space.pairs
    found = _merged(space, sign, old_values, old, min(k + KEPT, n))
    after = _dot(space.solution, space.basis)
    found = Known(sign * found[0], found[1], probe, jnp.where(jnp.any(after != 0), after, solution))
    vectors = _dot(coefficients.T, space.basis)
    return Pairs(sign * values, vectors, residuals, space.count, space.missed, space.done, found)


def _solve(
    space: _Space, pairs: Any, shift: jax.Array, kind: tuple[int, int], probe: jax.Array
) -> tuple[Any, Any, Any]:
    """Solve (shift - A) z = g beside the k wanted vectors by least squares over the space: (|r|, coefficients of z, r).

    In the basis of the other approximate vectors, each over its distance from the shift, the normal matrix is 1 + E with
    small errors in E >= 0. One refinement takes them out; r is that of the z that is returned, whatever it is.
    """
    (values, coefficients), (sign, k) = pairs, kind
    unit = tree.divisor(space.unit)
    shift, values = shift / unit, values / unit
    others = (jnp.arange(len(values)) >= k) & (jnp.arange(len(values)) < space.count)
    scaled = coefficients * jnp.where(others, 1 / jnp.where(others, shift - values, 1), 0)
    square = _symmetric(space.matrix / unit)
    beside = _dot(scaled.T, _dot(space.gram - _dot(square, square), scaled))
    sizes, rotation = jnp.linalg.eigh((beside + beside.T) / 2, symmetrize_input=False)
    sizes = 1 + jnp.maximum(sizes, 0)
    wanted = _dot(coefficients[:, :k].T, space.basis)
    target = probe - _dot(_dot(wanted, probe), wanted)

    def solved(along_basis, along_images):
        right = _dot(scaled.T, shift * along_basis - sign * along_images / unit)
        return _dot(rotation, _dot(rotation.T, right) / sizes)

    def rest(found):
        z = _dot(scaled, found)
        return target - (shift * _dot(z, space.basis) - sign * _dot(z, space.images) / unit)

    found = solved(*space.along)
    left = rest(found)
    found = found + solved(_dot(space.basis, left), _dot(space.images, left))
    left = rest(found)
    return tree.length(left), _dot(scaled, found), left


def _corrected(r: jax.Array, value: jax.Array, old_values: jax.Array, old: jax.Array) -> jax.Array:
    """(B - value)⁻¹ r for B = oldᵀ diag(old_values) old; without old ones a multiple of r."""

    def below(gap):
        gap = jnp.minimum(gap, -APART * jnp.abs(value))
        return jnp.where(gap < 0, gap, -1)

    along = _dot(old, r)
    return _dot(old.T, along / below(old_values - value)) + (r - _dot(old.T, along)) / below(-value)


def _merged(space: _Space, sign: int, old_values: jax.Array, old: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Take approximate pairs over the space and what the old vectors have beside it, where A is as B was."""
    rest = old - _dot(_dot(old, space.basis.T), space.basis)
    lengths, rotation = jnp.linalg.eigh(_dot(rest, rest.T))
    good = lengths > APART
    rest = _dot((rotation * jnp.where(good, 1 / jnp.sqrt(jnp.where(good, lengths, 1)), 0)).T, rest)
    among = _dot(rest, old.T)
    among = _dot(among * old_values, among.T)
    across = sign * _dot(rest, space.images.T)
    whole = jnp.block([[sign * _symmetric(space.matrix), across.T], [across, among]])
    used = jnp.concatenate([jnp.arange(len(space.basis)) < space.count, good])
    peak = tree.divisor(jnp.max(jnp.abs(whole)))
    whole = jnp.where(used[:, None] & used, whole / peak, 0)
    far = 4 * jnp.sum(jnp.abs(whole)) + 1
    values, coefficients = jnp.linalg.eigh(whole - jnp.diag(jnp.where(used, 0, far)), symmetrize_input=False)
    values, coefficients = values[::-1][:count], coefficients[:, ::-1][:, :count]
    vectors = _dot(jnp.where(used[:, None], coefficients, 0).T, jnp.concatenate([space.basis, rest]))
    missing = count - len(values)
    return (
        jnp.pad(jnp.where(values > -far / 2, values * peak, 0), (0, missing)),
        jnp.pad(vectors, ((0, missing), (0, 0))),
    )


def _symmetric(upper: jax.Array) -> jax.Array:
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
