"""What can be known of the gradients of a batch of examples from their factors, without storing them.

One class for each form in which the gradients of one parameter array may be held: `Pair` (a product of two factors),
`Rows` (rows scattered into an embedding), `Full` (the gradients themselves). Arrays are laid out as
`[depth..., batch, time..., array]`: depth for loops whose turns have parameters of their own, time for loops that use one
parameter in every turn. All sums are in at least float32, and all results right at any scale: `norms` of every example,
`weighted`, the sum over examples with weights float[depth..., batch] or without, `balanced`, the same for weights and
factors far from 1, `bounds` on an example's numbers up to a factor, and `gram(scale)`, all <g_i/scale_i, g_j/scale_j>.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fnn import lowering, mapped, tree
from fnn.gradients.factors import Convolution, Move, Product, Term
from fnn.gradients.squares import (
    AXIS,
    Examples,
    arrange,
    dot,
    exact_dot,
    in_units,
    norm,
    norm_of_whole,
    normalized,
    split,
    widened,
)
from fnn.tree import divisor


@flax.struct.dataclass
class Full:
    """The gradients themselves: value float[depth..., batch, ...]."""

    value: jax.Array
    norm: Any
    """Norms, where they are known already: float[depth..., batch]."""
    lead: int = flax.struct.field(pytree_node=False)
    """How many depth axes there are."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Sizes of the depth axes."""
        return self.value.shape[: self.lead]

    def norms(self) -> jax.Array:
        if self.norm is not None:
            return self.norm
        examples = Examples(self.value.shape[self.lead], loop=False)
        one = jax.vmap(lambda value: norm_of_whole(value, examples), axis_name=AXIS)
        for _ in range(self.lead):
            one = functools.partial(_mapped, one)
        return one(self.value)

    def weighted(self, w: jax.Array | None) -> jax.Array:
        return _depth(_combined, self.lead)(w, self.value)

    def balanced(self, w: jax.Array) -> jax.Array:
        def one(w, value):
            peak = _peak(value, 1)
            w, common = _relative(w * tree.bound(peak))
            return common * _combined(w, value / _spread(divisor(peak), value))

        return _depth(one, self.lead)(w, self.value)

    def bounds(self) -> jax.Array:
        return tree.bound(_peak(self.value, self.lead + 1))

    def gram(self, scale: jax.Array) -> jax.Array:
        value = jnp.moveaxis(self.value, self.lead, 0).reshape(self.value.shape[self.lead], -1)
        peak = _peak(value, 1)
        value = value / divisor(peak)[:, None] * (tree.bound(peak) / scale)[:, None]
        return exact_dot(value, value, ((1,), (1,)), ((), ()))

    def materialize(self) -> jax.Array:
        return jnp.moveaxis(self.value, self.lead, 0)


@flax.struct.dataclass
class Pair:
    """Products: one pair (a, d) for each term, arranged by `arrange` to a float[groups, t, m], d float[groups, t, n]."""

    arrays: tuple[tuple[Any, Any], ...]
    norm: Any
    lead: int = flax.struct.field(pytree_node=False)
    terms: tuple[Term, ...] = flax.struct.field(pytree_node=False)
    moves: tuple[Move, ...] = flax.struct.field(pytree_node=False)

    @property
    def levels(self) -> tuple[int, ...]:
        return self.arrays[0][0].shape[: self.lead]

    def norms(self) -> jax.Array:
        if self.norm is not None:
            return self.norm
        examples = Examples(self.arrays[0][0].shape[self.lead], loop=self.lead > 0)
        # One depth at a time, so that as much is held as for a single layer.
        return self._in_turn(jax.vmap(lambda arrays: norm(self.terms, arrays, examples), axis_name=AXIS))(self.arrays)

    def weighted(self, w: jax.Array | None) -> jax.Array:
        if self._stored():
            batch, (_, m, _) = self.arrays[0][0].shape[0], self.terms[0].kind.shape
            parts, peak = jax.vmap(lambda arrays: in_units(self.terms, arrays, batch))(self.arrays)
            g = jnp.concatenate([_combined(peak if w is None else w * peak, part) for part in parts], axis=-1)
            return self._moved(g if g.shape[1] == m else g.swapaxes(1, 2))
        kind = self.terms[0].kind
        if isinstance(kind, Convolution) and len(self.terms) == 1 and not self.terms[0].times:
            # A loop over depth: XLA would make one slow grouped convolution of them.
            return self._in_turn(lambda w, x, d: kind.weighted(*_shared(w, x, d)))(w, *self.arrays[0])
        return self._moved(_depth(self._weighted, self.lead)(w, self.arrays))

    def balanced(self, w: jax.Array) -> jax.Array:
        def one(w, arrays):
            a, d, bound = self._normalized(arrays)
            w, common = _relative(w * bound)
            return common * self._contracted(a, d * _spread(w, d))

        return self._moved(_depth(one, self.lead)(w, self.arrays))

    def bounds(self) -> jax.Array:
        return _depth(lambda arrays: self._normalized(arrays)[2], self.lead)(self.arrays)

    def gram(self, scale: jax.Array) -> jax.Array:
        def one(arrays):
            a, d, bound = self._normalized(arrays)
            return self._inner_products(a, d * _spread(bound / scale, d))

        for _ in range(self.lead):
            one = _summed(one)
        return one(self.arrays)

    def materialize(self) -> jax.Array:
        g = _depth(lambda arrays: self._each(*self._arranged(arrays)), self.lead)(self.arrays)
        return jax.vmap(self._moved, in_axes=self.lead)(g)

    def _stored(self) -> bool:
        """Whether a sum comes from every example's G: 2mn operations, where the factors would take 2tmn once more.

        `norms` needs the same products, and XLA computes them once. Not below `repeat`, where norms are taken inside
        the loop: stacking G there took more memory and no less time.
        """
        if self.lead:
            return False
        a, d = jax.eval_shape(self._arranged, self.arrays)
        (_, _, t, m), n = a.shape, d.shape[-1]
        return t > 1 and t * (m + n) >= lowering.STORED_SHARE * m * n

    def _in_turn(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Loop over the depths; weights of None are the same for all."""
        for _ in range(self.lead):
            function = functools.partial(_mapped, function)
        return function

    def _arranged(self, arrays: Any) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda arrays: arrange(self.terms, arrays))(arrays)

    def _normalized(self, arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jax.vmap(functools.partial(normalized, isinstance(self, Rows)))(*self._arranged(arrays))

    def _weighted(self, w: jax.Array | None, arrays: Any) -> jax.Array:
        return self._contracted(*_shared(w, *self._arranged(arrays)))

    def _contracted(self, a: jax.Array, d: jax.Array) -> jax.Array:
        """Take sum_it a_it d_itᵀ: float[batch, groups, t, m] and float[batch, groups, t, n] -> float[groups, m, n]."""
        if a.shape[1] == 1:  # one group: a plain matrix product
            a, d = (x.reshape(-1, x.shape[-1]) for x in (a, d))
            return dot(a, d, ((0,), (0,)), ((), ()))[None]
        return dot(a, d, ((0, 2), (0, 2)), ((1,), (1,)))

    def _each(self, a: jax.Array, d: jax.Array) -> jax.Array:
        return dot(a, d, ((2,), (2,)), ((0, 1), (0, 1)))

    def _inner_products(self, a: jax.Array, d: jax.Array) -> jax.Array:
        (batch, groups, t, _), n = a.shape, d.shape[-1]
        if t == 1:
            a, d = (x.reshape(batch, groups, -1).swapaxes(0, 1) for x in (a, d))
            products = [exact_dot(x, x, ((2,), (2,)), ((0,), (0,))) for x in (a, d)]
            return jnp.sum(products[0] * products[1], axis=0)
        total = jnp.zeros((batch, batch))
        for part in split(a, lowering.chunk() // (batch * groups * n)):
            g = self._each(part, d).reshape(batch, -1)
            total += exact_dot(g, g, ((1,), (1,)), ((), ()))
        return total

    def _moved(self, g: jax.Array) -> jax.Array:
        for move in self.moves:
            g = move(g)
        return g


@flax.struct.dataclass
class Rows(Pair):
    """Rows d float[t, n] added into a table at ids int[t]: the gradient of an embedding."""

    def _stored(self) -> bool:
        return False

    def _weighted(self, w: jax.Array | None, arrays: Any) -> jax.Array:
        ids, d = self._arranged(arrays)
        return self._contracted(ids, widened(d) if w is None else widened(d) * _spread(w, d))

    def _contracted(self, ids: jax.Array, d: jax.Array) -> jax.Array:
        ids, d = ids.reshape(-1), d.reshape(-1, d.shape[-1])
        return jnp.zeros((self.terms[0].kind.shape[1], d.shape[-1]), d.dtype).at[ids].add(d, mode="drop")[None]

    def _each(self, ids: jax.Array, d: jax.Array) -> jax.Array:
        return jax.vmap(self._contracted)(ids, widened(d))

    def _inner_products(self, ids: jax.Array, d: jax.Array) -> jax.Array:
        batch, t, n = d.shape
        flat_ids, flat = ids.reshape(-1), d.reshape(-1, n)

        def row(example):  # all pairs of positions of one example with those of all others
            ids, d = example
            products = exact_dot(d, flat, ((1,), (1,)), ((), ())) * (ids[:, None] == flat_ids)
            return jnp.sum(products.reshape(t, batch, t), axis=(0, 2))

        return jax.lax.map(row, (ids, d))


def zero(shape: tuple[int, ...], batch: int, lead: int) -> Pair:
    """Hold no gradient at all, where the loss does not depend on the parameter: a product over no positions."""
    kind = Product((0, math.prod(shape[lead:])), (0, 1), ((0,), (0,)), ((), ()))
    a, d = (jnp.zeros((*shape[:lead], batch, *side)) for side in (kind.left, kind.right))
    return Pair(((a, d),), None, lead, (Term(kind),), (Move("reshape", shape[lead:], lead),))


def _combined(w: jax.Array | None, g: jax.Array) -> jax.Array:
    """Take sum_i w_i g_i, with weights of 1 for None: as a product too, since XLA adds up examples slowly on CPUs."""
    g = widened(g)
    w = jnp.ones(g.shape[0], g.dtype) if w is None else w.astype(g.dtype)
    return jax.lax.dot_general(w, g, (((0,), (0,)), ((), ())), precision="highest")


def _shared(w: jax.Array | None, a: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Let both factors take their part of the weights, so that neither leaves the range: a power of two, and the rest."""
    if w is None:
        return a, d
    root = jnp.exp2((jnp.frexp(jax.lax.stop_gradient(w))[1] // 2).astype(w.dtype))

    def times(x, w):
        x, dtype = widened(x) * _spread(w, x), x.dtype
        return x if jnp.finfo(dtype).maxexp < 100 else x.astype(dtype)  # float16 has no room for weights

    return times(a, root), times(d, w / root)


def _relative(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide weights by the largest."""
    common = divisor(jnp.max(jnp.abs(w)))
    return w / common, common


def _peak(a: jax.Array, kept: int) -> jax.Array:
    return jnp.max(jnp.abs(widened(a)), axis=tuple(range(kept, a.ndim)), initial=0)


def _spread(w: jax.Array, x: jax.Array) -> jax.Array:
    """Lay weights of examples out against an array: [batch] -> [batch, 1, ...]."""
    return w.reshape(-1, *(1,) * (x.ndim - 1))


def _depth(function: Callable[..., Any], lead: int) -> Callable[..., Any]:
    """Map over depth axes; weights of None are the same for all."""
    for _ in range(lead):
        function = jax.vmap(function)
    return function


def _mapped(function: Callable[..., Any], *args: Any) -> Any:
    return jax.lax.map(lambda args: function(*args), args)


def _summed(function: Callable[..., Any]) -> Callable[..., Any]:
    def total(arrays):
        first = jax.eval_shape(function, jax.tree.map(lambda a: a[0], arrays))
        zero = mapped.varying(jnp.zeros(first.shape, first.dtype), like=arrays)
        return jax.lax.scan(lambda total, part: (total + function(part), None), zero, arrays)[0]

    return total
