"""The norm of one example's gradient from its factors, at any scale that float32 can hold.

Squares leave float32's range long before norms do. So factors are divided by their largest numbers first. Where that
costs more than a few per cent, in loops and for many positions, the squares are taken plainly, and once more from divided
factors if one of them, of any example, left the range.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import lowering
from fnn.gradients.factors import Convolution, Lookup, Term
from fnn.tree import bound, divisor, guarded, length, safe, safe_sqrt, statistics_dtype

AXIS = "fnn's examples"
"""Names the axis of examples where a loss does not."""


class Examples(NamedTuple):
    """How many examples are at work at a time, under `vmap` with which axis name."""

    count: int
    axis_name: Any = AXIS
    loop: bool = True
    """Whether that happens inside a loop, where each further operation shows."""


def arrange(terms: Sequence[Term], arrays: Sequence[tuple[Any, Any]]) -> tuple[jax.Array, jax.Array]:
    """Arrange one example's factors, the positions of all terms in a row."""
    pairs = [term.factors(*pair) for term, pair in zip(terms, arrays, strict=True)]
    axis = 0 if isinstance(terms[0].kind, Lookup) else 1
    a, d = ([p[i] for p in pairs] for i in range(2))
    return (jnp.concatenate(a, axis), jnp.concatenate(d, axis)) if len(pairs) > 1 else pairs[0]


def norm(terms: Sequence[Term], arrays: Sequence[tuple[Any, Any]], examples: Examples) -> jax.Array:
    """Take |sum_t a_t d_tᵀ| of one example.

    One position: |a|·|d|, 2(m + n) operations. Many: of G itself, in chunks, 2tmn operations; or from the Gram matrices
    over positions, 2t²(m + n), where that is much less.
    """
    lookup, factors = isinstance(terms[0].kind, Lookup), arrange(terms, arrays)
    if not lookup and _made(*factors):
        if not examples.loop:
            parts, peak = in_units(terms, arrays, examples.count)
            return peak * safe_sqrt(sum((square(part, 0) for part in parts), start=jnp.zeros((), jnp.float32)))
        return length(jnp.stack([norm_of_whole(part, examples) for part in outer(*factors, examples.count)]))
    if not lookup and not examples.loop and _single(factors[0]):
        lengths = [jax.vmap(length)(x.reshape(x.shape[0], -1)) for x in factors]
        return jnp.sum(lengths[0] * lengths[1]) if len(lengths[0]) == 1 else length(lengths[0] * lengths[1])

    def plain(*factors):
        total, bound = _square(lookup, *factors)
        return safe_sqrt(total), safe(total, bound)

    def relative(*factors):
        *factors, peak = normalized(lookup, *factors)
        return peak * safe_sqrt(_square(lookup, *factors)[0])

    if lookup and not examples.loop:
        return relative(*factors)
    return guarded(plain, relative, *factors, axis_name=examples.axis_name)


def normalized(lookup: bool, a: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divide one example's gradient by a bound on its numbers: (a, d, bound), where no number of a and d is above 4.

    Every position has peaks of its own: one may hold a large input and a small error signal, the next the reverse.
    """
    d = widened(d)
    q = jnp.max(jnp.abs(d), axis=-1, keepdims=True, initial=0)
    if lookup:
        peak = jnp.max(q, initial=0)
        return a, d / divisor(peak), bound(peak)
    a = widened(a)
    p = jnp.max(jnp.abs(a), axis=-1, keepdims=True, initial=0)
    products = p * q
    peak = jnp.max(products, initial=0)
    return a / divisor(p), d / divisor(q) * jax.lax.stop_gradient(products / divisor(peak)), bound(peak)


def norm_of_whole(a: jax.Array, examples: Examples) -> jax.Array:
    """Take |a| of one example's gradient that is stored in full."""

    def plain(a):
        total = square(a, 0)
        return safe_sqrt(total), safe(total)

    if not examples.loop:
        return length(a)
    return guarded(plain, length, a, axis_name=examples.axis_name)


def _single(a: jax.Array) -> bool:
    return a.shape[1] == 1


def _made(a: jax.Array, d: jax.Array) -> bool:
    """Whether the norm is that of G, written out."""
    (_, t, m), n = a.shape, d.shape[-1]
    return t > 1 and t * (m + n) >= lowering.GRAM_SHARE * m * n


def _square(lookup: bool, a: jax.Array, d: jax.Array) -> tuple[jax.Array, Any]:
    """Take |sum_t a_t d_tᵀ|² from rows, one position or Gram matrices, and a bound for `safe`."""
    if lookup:
        return _lookup_square(a, d), 1
    if _single(a):
        squares = square(a), square(d)
        return jnp.sum(squares[0] * squares[1]), _bound(*squares)
    grams = [exact_dot(x, x, ((2,), (2,)), ((0,), (0,))) for x in (a, d)]
    diagonals = (jnp.diagonal(gram, axis1=1, axis2=2) for gram in grams)
    return jnp.maximum(jnp.sum(grams[0] * grams[1]), 0), _bound(*diagonals)


def _bound(a: jax.Array, d: jax.Array) -> jax.Array:
    return 1 + jnp.max(a, initial=0) + jnp.max(d, initial=0)


def _lookup_square(ids: jax.Array, d: jax.Array) -> jax.Array:
    """Sum the squares of the rows, those with equal ids added first: sort, and add neighbours; never vocabulary × width."""
    order = jnp.argsort(ids)
    ids, d = ids[order], widened(d)[order]
    segment = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]]).astype(jnp.int32))
    rows = jax.ops.segment_sum(d, segment, num_segments=ids.size, indices_are_sorted=True)
    return jnp.sum(jnp.square(rows))


def outer(a: jax.Array, d: jax.Array, examples: int) -> list[jax.Array]:
    """Make G of one example in parts of its longer side, which comes last: the better matrix product."""
    if a.shape[-1] > d.shape[-1]:
        a, d = d, a
    parts = split(d, lowering.chunk() // (examples * a.shape[0] * a.shape[-1]))
    return [dot(a, part, ((1,), (1,)), ((0,), (0,))) for part in parts]


def in_units(
    terms: Sequence[Term], arrays: Sequence[tuple[Any, Any]], examples: int
) -> tuple[list[jax.Array], jax.Array]:
    """Make G of one example, divided by its largest product |a_ti||d_tj|, and return that: (parts as of `outer`, peak).

    So its squares stay in range, without another look at G or at patches, which are larger than what they are made of.
    """
    a, d = map(widened, arrange(terms, arrays))
    products, largest = (jnp.max(jnp.stack(found)) for found in zip(*map(_largest, terms, arrays), strict=True))
    peak = divisor(products)
    # Where the first factor is zero, or subnormal, the second must not become infinite: its largest over `peak` is at most 1/tiny.
    peak = jnp.maximum(peak, jax.lax.stop_gradient(largest) * jnp.finfo(peak.dtype).tiny)
    return outer(a, d * (1 / peak), examples), peak


def _largest(term: Term, pair: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    """Take the largest |a_ti||d_tj| and the largest |d_tj|; of a convolution with one channel each, the largest of all."""
    x, d = (jnp.abs(widened(x)) for x in pair)
    if isinstance(term.kind, Convolution):
        x, d = (
            jnp.max(a, axis=axes[0] + term.times, keepdims=True)
            for a, axes in zip((x, d), term.kind.specs[:2], strict=True)
        )
        term = replace(term, kind=replace(term.kind, groups=1))
    p, q = (jnp.max(a, axis=-1, initial=0) for a in term.factors(x, d))
    return jnp.max(p * q, initial=0), jnp.max(q, initial=0)


def split(a: jax.Array, size: int) -> list[jax.Array]:
    """Cut the last axis into parts of about `size`, 16 at most."""
    count = min(16, -(-a.shape[-1] // max(1, size)))
    return jnp.array_split(a, count, axis=-1)


def square(x: jax.Array, kept: int = 1) -> jax.Array:
    """Sum squares over all but the leading axes. As a product: XLA would store the squares before it sums them."""
    summed, batched = tuple(range(kept, x.ndim)), tuple(range(kept))
    contract = functools.partial(jax.lax.dot_general, preferred_element_type=_wide(x), precision="highest")
    return contract(x, x, ((summed, summed), (batched, batched)))


def dot(a: jax.Array, b: jax.Array, contracted: Any, batched: Any) -> jax.Array:
    """Take a `dot_general` in at least float32, with the precision that JAX uses by default, as in any gradient."""
    return jax.lax.dot_general(a, b, (contracted, batched), preferred_element_type=_wide(a, b))


def exact_dot(a: jax.Array, b: jax.Array, contracted: Any, batched: Any) -> jax.Array:
    """Take a `dot_general` of inner products, with all bits of its dtype.

    What is summed of them later cancels: a GPU's default, TF32 with 10 bits, could leave no right digit of the sum.
    """
    wide = _wide(a, b)
    return jax.lax.dot_general(a, b, (contracted, batched), precision="highest", preferred_element_type=wide)


def widened(x: jax.Array) -> jax.Array:
    """Cast to at least float32."""
    return x.astype(statistics_dtype(x.dtype))


def _wide(*arrays: jax.Array) -> Any:
    return statistics_dtype(jnp.result_type(*arrays))
