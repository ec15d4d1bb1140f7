"""How sure it is that a search has missed no eigenvalue: from one equation with a random right side, solved in its space.

A small residual proves an eigenvalue, not the largest one. So take g standard normal, μ just above the wanted eigenvalues,
and solve (μ - A) z = g in the space of the search, by Galerkin's method; r = g - (μ - A) z is left. An eigenvector u of μ has
uᵀg = uᵀr, so |uᵀg| <= |r|: the chance of a normal number so small is √(2/π) |r| at most, and for larger eigenvalues it is
smaller still. The space grows along r, which is a Lanczos method for the equation, until that chance is small.

Where the wanted vectors Y are known already, to a small residual, P (μ - A) P z = P g with P = 1 - Y Yᵀ says the same of all
others. It needs Y that were made without g: they are held from the moment on when g is first used. A search on a similar
matrix takes over g and z: one product then tells whether any eigenvalue has passed the wanted ones.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import tree
from fnn.spectra import rows
from fnn.spectra.rows import dot

NEAR = 1000
"""μ lies at least so many roundings of A above the last value, times what g has of vectors whose values are that near, if it is
more than 1; in bfloat16 half of A. Nearer to it z would be so large that the rounding of A z hides r."""


class Pairs(NamedTuple):
    """What a search has found of the wanted end, which is the top of sign · A."""

    values: jax.Array
    """float[k]"""
    coefficients: jax.Array
    """Over the basis; float[most, k]."""
    residuals: jax.Array
    """float[k]"""
    bounds: jax.Array
    """What the residuals are to be at most; float[k]."""


class Proof(NamedTuple):
    """The equation, beside a basis that grows; rows not yet made are zero."""

    probe: Any
    """g; float[n]."""
    held: Any
    """Coefficients of Y; float[most, k], zero where there is none."""
    last: Any
    """Value and residual of the last of Y, as it is held; float[2]."""
    warm: Any
    """Whether g and z come from the last search, and no other g had to be drawn; bool[]."""
    rounds: Any
    """How often the equation was solved; int32[]."""
    solution: Any
    """Coefficients of z; float[most]."""
    missed: Any
    """The chance that the k-th eigenvalue lies beyond `limit`; float[]."""
    limit: Any
    """Infinite before the first round; float[]."""


def begun(probe: jax.Array, most: int, k: int, warm: jax.Array) -> Proof:
    """Begin with an empty space."""
    zero = 0 * probe[0]
    numbers = jnp.zeros(most, probe.dtype) + zero
    held, last = jnp.zeros((most, k), probe.dtype) + zero, jnp.zeros(2, probe.dtype) + zero
    return Proof(probe, held, last, warm, jnp.int32(0 * warm), numbers, zero + 1, zero + jnp.inf)


def judged(proof: Proof, space: Any, pairs: Pairs, eps: float, key: Any) -> tuple[Proof, jax.Array]:
    """Solve the equation, for pairs whose residuals are within their bounds: (proof, the direction in which to grow).

    `space` is (count, basis, images, basis · imagesᵀ), with the sign. `key` draws another g where Y must be held anew.
    """
    count, basis, images, square = space
    k, first = len(pairs.values), proof.rounds <= proof.warm
    hold = proof.warm | (k > 1)
    here = jnp.stack([pairs.values[-1], pairs.residuals[-1]])
    held, last = (
        jnp.where(hold, jnp.where(first, new, old), 0)
        for new, old in ((pairs.coefficients, proof.held), (here, proof.last))
    )
    other = jnp.eye(len(basis), dtype=basis.dtype) - dot(held, held.T)
    far = 4 * jnp.sum(jnp.abs(square)) + 1
    lowered = dot(other, dot(square, other)) - far * dot(held, held.T)
    values, vectors = rows.eigh((lowered + lowered.T) / 2, jnp.arange(len(basis)) < count, far)
    others = values > -far / 2
    along = rows.times(count, basis, proof.probe)
    parts = dot(vectors.T, along)
    # With Y's own residual: λ <= (θ + μ)/2 + √(((μ - θ)/2)² + residual²), which is to be `limit`.
    top, tiny = pairs.values[-1], float(jnp.finfo(basis.dtype).tiny) ** 0.5
    limit = top + pairs.bounds[-1]
    shift = limit - last[1] * jnp.where(hold, last[1] / jnp.maximum(limit - last[0], tiny), 0)
    # A matrix of zeros needs some distance too; a multiple eigenvalue a larger one, since more of g is along its vectors.
    near = jnp.maximum(min(NEAR * eps, 0.5) * jnp.max(jnp.abs(square)), tiny)
    reach = tree.length(jnp.where(others, parts / (1 + jnp.maximum(top - values, 0) / near), 0))
    shift = jnp.maximum(shift, top + near * jnp.maximum(reach, 1))
    limit = shift + last[1] * jnp.where(hold, last[1] / jnp.maximum(shift - last[0], tiny), 0)
    # Galerkin's method: r is made of what g has beside the space, and of what A z has there. No large numbers cancel.
    z = dot(vectors, parts / jnp.where(others, shift - values, 1))
    rest = proof.probe + rows.mixed(count, (z, images), (-along - dot(square, z), basis))
    passed = jnp.any(others & (values >= shift))
    missed = jnp.where(passed, 1, jnp.minimum(math.sqrt(2 / math.pi) * tree.length(rest), 1))
    proof = proof._replace(held=held, last=last, rounds=proof.rounds + 1, solution=z, missed=missed, limit=limit)
    if k == 1:
        return proof, rest

    def anew():
        probe = jax.random.normal(key, rest.shape, rest.dtype)
        return proof._replace(
            probe=probe, warm=proof.warm & False, rounds=0 * proof.rounds, missed=0 * missed + 1
        ), probe

    return jax.lax.cond(passed, anew, lambda: (proof, rest))


def accepted(proof: Proof, chance: Any) -> jax.Array:
    """Whether the chance is small enough, where the z of a similar matrix says so by itself; or a quarter of it, where a search
    has worked for it: then a few products more make it much smaller."""
    return proof.missed <= jnp.where(proof.warm & (proof.rounds <= 2), chance, chance / 4)
