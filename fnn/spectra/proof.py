"""How sure it is that a search has missed no eigenvalue: from one equation with a random right side, solved in its space.

A small residual proves an eigenvalue, not the largest one. So take g standard normal, μ just above the wanted eigenvalues,
and solve (μ - A) z = g as well as the space of the search allows; r = g - (μ - A) z is left. An eigenvector u of μ has
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

CHANCE, AIM = 0.02, 0.005
"""The chance that an eigenvalue was missed is at most the first where the z of a similar matrix says so by itself. Searches
that must bring it down go on to the second."""


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
    along: Any
    """(basis · g, images · g); float[most] each."""
    gram: Any
    """images · imagesᵀ in units of `unit`²; float[most, most]."""
    unit: Any
    """The largest number of the images."""
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
    """The chance; float[]."""


def begun(probe: jax.Array, most: int, k: int, warm: jax.Array) -> Proof:
    """Begin with an empty space."""
    zero = 0 * probe[0]
    numbers = jnp.zeros(most, probe.dtype) + zero
    square = numbers[:, None] + numbers
    held, last = jnp.zeros((most, k), probe.dtype) + zero, jnp.zeros(2, probe.dtype) + zero
    return Proof(probe, (numbers, numbers), square, zero, held, last, warm, jnp.int32(0 * warm), numbers, zero + 1)


def grown(proof: Proof, j: jax.Array, direction: jax.Array, w: jax.Array, images: jax.Array) -> Proof:
    """Add the j-th direction, whose image is w = A direction; images holds it already."""
    unit = tree.divisor(jnp.maximum(proof.unit, jnp.max(jnp.abs(w))))
    row = dot(images, w / unit) / unit
    gram = (proof.gram * jnp.square(proof.unit / unit)).at[:, j].set(row).at[j].set(row)
    along = proof.along[0].at[j].set(dot(direction, proof.probe)), proof.along[1].at[j].set(dot(w, proof.probe))
    return proof._replace(along=along, gram=gram, unit=unit)


def judged(proof: Proof, space: Any, pairs: Pairs, sign: int, eps: float, key: Any) -> tuple[Proof, jax.Array]:
    """Solve the equation, for pairs whose residuals are within their bounds: (proof, r, the direction in which to grow).

    `space` is (count, basis, images, basis · A · basisᵀ); `key` draws another g where Y must be held anew.
    """
    k, first = len(pairs.values), proof.rounds <= proof.warm
    hold = proof.warm | (k > 1)
    here = jnp.stack([pairs.values[-1], pairs.residuals[-1]])
    held, last = (
        jnp.where(hold, jnp.where(first, new, old), 0)
        for new, old in ((pairs.coefficients, proof.held), (here, proof.last))
    )
    # With Y's own residual: λ <= (θ + μ)/2 + √(((μ - θ)/2)² + residual²), which is to be `bound`.
    bound, tiny = pairs.values[-1] + pairs.bounds[-1], jnp.finfo(pairs.values.dtype).tiny
    shift = bound - last[1] * jnp.where(hold, last[1] / jnp.maximum(bound - last[0], tiny), 0)
    # Nearer to the values the squares in `gram` would have no digits; a matrix of zeros needs some distance too.
    near = 8 * math.sqrt(eps) * jnp.max(jnp.abs(space[3]))
    shift = jnp.maximum(shift, pairs.values[-1] + jnp.maximum(near, tiny))
    missed, solution, rest, passed = _solved(proof, space, held, shift, sign)
    proof = proof._replace(held=held, last=last, rounds=proof.rounds + 1, solution=solution, missed=missed)
    if k == 1:
        return proof, rest

    def anew():
        probe = jax.random.normal(key, rest.shape, rest.dtype)
        along = dot(space[1], probe), dot(space[2], probe)
        return proof._replace(
            probe=probe, along=along, warm=proof.warm & False, rounds=0 * proof.rounds, missed=0 * missed + 1
        ), probe

    return jax.lax.cond(passed, anew, lambda: (proof, rest))


def accepted(proof: Proof) -> jax.Array:
    """Whether the chance is small enough."""
    return proof.missed <= jnp.where(proof.warm & (proof.rounds <= 2), CHANCE, AIM)


def _solved(proof: Proof, space: Any, held: jax.Array, shift: jax.Array, sign: int) -> tuple[Any, Any, Any, Any]:
    """Solve by least squares over the space: (chance, coefficients of z, r, whether an approximate value is beyond μ).

    In the basis of the approximate vectors beside Y, each over its distance from μ, the normal matrix is 1 + E, E >= 0 with
    small errors. One refinement takes them out; r is that of the z that is returned, whatever it is.
    """
    count, basis, images, square = space
    unit = tree.divisor(proof.unit)
    shift, square = shift / unit, sign * square / unit
    used, beside = jnp.arange(len(basis)) < count, jnp.eye(len(basis), dtype=basis.dtype) - dot(held, held.T)
    inner = dot(beside, dot(square, beside))
    far = 4 * jnp.sum(jnp.abs(square)) + 4 * jnp.abs(shift) + 1
    lowered = inner - far * dot(held, held.T) - jnp.diag(jnp.where(used, 0, far))
    values, vectors = jnp.linalg.eigh((lowered + lowered.T) / 2, symmetrize_input=False)
    others = values > -far / 2
    scaled = jnp.where(used[:, None], vectors, 0) * jnp.where(others, 1 / jnp.where(others, shift - values, 1), 0)
    error = dot(scaled.T, dot(proof.gram - dot(square, square), scaled))
    sizes, rotation = jnp.linalg.eigh((error + error.T) / 2, symmetrize_input=False)
    wanted = dot(held.T, basis)

    def solved(along_basis, along_images):
        right = dot(scaled.T, shift * along_basis - sign * along_images / unit)
        return dot(scaled, dot(rotation, dot(rotation.T, right) / (1 + jnp.maximum(sizes, 0))))

    def rest(z):
        left = proof.probe - (shift * dot(z, basis) - sign * dot(z, images) / unit)
        return left - dot(dot(wanted, left), wanted)

    z = solved(*proof.along)
    left = rest(z)
    z = z + solved(dot(basis, left), dot(images, left))
    left = rest(z)
    passed = jnp.any(others & (values >= shift))
    chance = jnp.minimum(math.sqrt(2 / math.pi) * tree.length(left), 1)
    return jnp.where(passed, 1, chance), z, left, passed


def symmetric(upper: jax.Array) -> jax.Array:
    """Fill the lower triangle."""
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply in full precision."""
    return jnp.matmul(a, b, precision="highest")
