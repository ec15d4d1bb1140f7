"""What can be known of the gradients of a batch of examples from their factors, without storing them.

One class for each form in which the gradients of one parameter array may be held: `Pair` (a product of two factors),
`Rows` (rows scattered into an embedding), `Full` (the gradients themselves). Arrays are laid out as
`[depth..., batch, time..., array]`: depth for loops whose turns have parameters of their own, time for loops that use one
parameter in every turn. All sums are in at least float32. `squares` gives every example's squared norm, `weighted` the
sum over examples, with weights float[depth..., batch] or without, `gram` all inner products.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fnn import mapped
from fnn.factors import Convolution, Lookup, Move, Term
from fnn.tree import statistics_dtype

GRAM_SHARE = 0.25
"""|G|² is taken from Gram matrices over positions below this share of the cost of G: they cancel badly in float32."""
STORED_SHARE = 0.5
"""From this share on, at which G is at most twice its factors, sums come from the G that |G|² has made already."""
CHUNK = 2**21
"""How many numbers of all the examples' G are held at a time, where only norms are asked for."""


def arrange(terms: Sequence[Term], arrays: Sequence[tuple[Any, Any]]) -> tuple[jax.Array, jax.Array]:
    """Arrange one example's factors, the positions of all terms in a row."""
    pairs = [term.factors(*pair) for term, pair in zip(terms, arrays, strict=True)]
    axis = 0 if isinstance(terms[0].kind, Lookup) else 1
    a, d = ([p[i] for p in pairs] for i in range(2))
    return (jnp.concatenate(a, axis), jnp.concatenate(d, axis)) if len(pairs) > 1 else pairs[0]


def squared_norm(terms: Sequence[Term], arrays: Sequence[tuple[Any, Any]], examples: int) -> jax.Array:
    """Take |sum_t a_t d_tᵀ|² of one example, `examples` of which are at work at a time.

    One position: |a|²·|d|², 2(m + n) operations. Many: of G itself, in chunks, 2tmn operations; or from the Gram matrices
    over positions, 2t²(m + n), where that is much less.
    """
    a, d = arrange(terms, arrays)
    if isinstance(terms[0].kind, Lookup):
        return _lookup_square(a, d)
    (_, t, m), n = a.shape, d.shape[-1]
    if t == 1:
        return jnp.sum(_square(a) * _square(d))
    if t * (m + n) < GRAM_SHARE * m * n:
        grams = [_dot(x, x, ((2,), (2,)), ((0,), (0,))) for x in (a, d)]
        return jnp.maximum(jnp.sum(grams[0] * grams[1]), 0)
    return sum((_square(part, 0) for part in _outer(a, d, examples)), start=jnp.zeros(()))


@flax.struct.dataclass
class Full:
    """The gradients themselves: value float[depth..., batch, ...]."""

    value: jax.Array
    square: Any
    """Squared norms, where they are known already: float[depth..., batch]."""
    lead: int = flax.struct.field(pytree_node=False)
    """How many depth axes there are."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Sizes of the depth axes."""
        return self.value.shape[: self.lead]

    def squares(self) -> jax.Array:
        if self.square is not None:
            return self.square
        return _square(self.value, self.lead + 1)

    def weighted(self, w: jax.Array | None) -> jax.Array:
        return _depth(_combined, self.lead)(w, self.value)

    def gram(self) -> jax.Array:
        value = jnp.moveaxis(self.value, self.lead, 0).reshape(self.value.shape[self.lead], -1)
        return _dot(value, value, ((1,), (1,)), ((), ()))

    def materialize(self) -> jax.Array:
        return jnp.moveaxis(self.value, self.lead, 0)


@flax.struct.dataclass
class Zero:
    """No gradient at all: the loss does not depend on the parameter."""

    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    batch: int = flax.struct.field(pytree_node=False)
    lead: int = flax.struct.field(pytree_node=False)

    @property
    def levels(self) -> tuple[int, ...]:
        return self.shape[: self.lead]

    def squares(self) -> jax.Array:
        return jnp.zeros((*self.levels, self.batch))

    def weighted(self, w: jax.Array | None) -> jax.Array:
        return jnp.zeros(self.shape)

    def gram(self) -> jax.Array:
        return jnp.zeros((self.batch, self.batch))

    def materialize(self) -> jax.Array:
        return jnp.zeros((self.batch, *self.shape))


@flax.struct.dataclass
class Pair:
    """Products: one pair (a, d) for each term, arranged by `arrange` to a float[groups, t, m], d float[groups, t, n]."""

    arrays: tuple[tuple[Any, Any], ...]
    square: Any
    lead: int = flax.struct.field(pytree_node=False)
    terms: tuple[Term, ...] = flax.struct.field(pytree_node=False)
    moves: tuple[Move, ...] = flax.struct.field(pytree_node=False)

    @property
    def levels(self) -> tuple[int, ...]:
        return self.arrays[0][0].shape[: self.lead]

    def squares(self) -> jax.Array:
        if self.square is not None:
            return self.square
        batch = self.arrays[0][0].shape[self.lead]
        one = jax.vmap(lambda arrays: squared_norm(self.terms, arrays, batch))
        # One depth at a time, so that as much is held as for a single layer.
        for _ in range(self.lead):
            one = functools.partial(_mapped, one)
        return one(self.arrays)

    def weighted(self, w: jax.Array | None) -> jax.Array:
        if self._stored():
            batch, (_, m, _) = self.arrays[0][0].shape[0], self.terms[0].kind.shape
            parts = jax.vmap(lambda arrays: _outer(*arrange(self.terms, arrays), batch))(self.arrays)
            g = jnp.concatenate([_combined(w, part) for part in parts], axis=-1)
            return self._moved(g if g.shape[1] == m else g.swapaxes(1, 2))
        if isinstance(self.terms[0].kind, Convolution) and len(self.terms) == 1 and not self.terms[0].times:
            one = self._convolved
            for _ in range(self.lead):  # a loop: XLA would make one slow grouped convolution of them
                one = functools.partial(_mapped, one)
            return one(w, *self.arrays[0])
        return self._moved(_depth(self._weighted, self.lead)(w, self.arrays))

    def gram(self) -> jax.Array:
        def one(arrays):
            a, d = self._arranged(arrays)
            (batch, groups, t, _), n = a.shape, d.shape[-1]
            if t == 1:
                a, d = (x.reshape(batch, groups, -1).swapaxes(0, 1) for x in (a, d))
                products = [_dot(x, x, ((2,), (2,)), ((0,), (0,))) for x in (a, d)]
                return jnp.sum(products[0] * products[1], axis=0)

            total = jnp.zeros((batch, batch))
            for part in _parts(a, CHUNK // (batch * groups * n)):
                g = _dot(part, d, ((2,), (2,)), ((0, 1), (0, 1))).reshape(batch, -1)
                total += _dot(g, g, ((1,), (1,)), ((), ()))
            return total

        for _ in range(self.lead):
            one = _summed(one)
        return one(self.arrays)

    def materialize(self) -> jax.Array:
        def one(arrays):
            return _dot(*arrange(self.terms, arrays), ((1,), (1,)), ((0,), (0,)))

        one = jax.vmap(_depth(one, self.lead), in_axes=self.lead)
        return jax.vmap(self._moved)(one(self.arrays))

    def _stored(self) -> bool:
        """Whether a sum comes from every example's G: 2mn operations, where the factors would take 2tmn once more.

        `squares` needs the same products, and XLA computes them once. Not below `repeat`, where norms are taken inside
        the loop: stacking G there took more memory and no less time.
        """
        if self.lead:
            return False
        a, d = jax.eval_shape(self._arranged, self.arrays)
        (_, _, t, m), n = a.shape, d.shape[-1]
        return t > 1 and t * (m + n) >= STORED_SHARE * m * n

    def _arranged(self, arrays: Any) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda arrays: arrange(self.terms, arrays))(arrays)

    def _weighted(self, w: jax.Array | None, arrays: Any) -> jax.Array:
        a, d = self._arranged(arrays)
        if w is not None:
            d = (_widened(d) * w[:, None, None, None]).astype(d.dtype)
        if a.shape[1] == 1:  # one group: a plain matrix product
            a, d = (x.reshape(-1, x.shape[-1]) for x in (a, d))
            return _dot(a, d, ((0,), (0,)), ((), ()))[None]
        return _dot(a, d, ((0, 2), (0, 2)), ((1,), (1,)))

    def _convolved(self, w: jax.Array | None, x: jax.Array, d: jax.Array) -> jax.Array:
        if w is not None:
            d = (_widened(d) * w.reshape(-1, *(1,) * (d.ndim - 1))).astype(d.dtype)
        kind = self.terms[0].kind
        assert isinstance(kind, Convolution)
        return kind.weighted(x, d)

    def _moved(self, g: jax.Array) -> jax.Array:
        for move in self.moves:
            g = move(g)
        return g


@flax.struct.dataclass
class Rows:
    """Rows d float[t, n] added into a table at ids int[t]: the gradient of an embedding."""

    arrays: tuple[tuple[Any, Any], ...]
    square: Any
    lead: int = flax.struct.field(pytree_node=False)
    terms: tuple[Term, ...] = flax.struct.field(pytree_node=False)
    moves: tuple[Move, ...] = flax.struct.field(pytree_node=False)

    def squares(self) -> jax.Array:
        if self.square is not None:
            return self.square
        one = jax.vmap(lambda arrays: squared_norm(self.terms, arrays, 1))
        return _depth(one, self.lead)(self.arrays)

    def weighted(self, w: jax.Array | None) -> jax.Array:
        def one(w, arrays):
            ids, d = jax.vmap(lambda arrays: arrange(self.terms, arrays))(arrays)
            d = _widened(d) if w is None else _widened(d) * w[:, None, None]
            return self._table(ids.reshape(-1), d.reshape(-1, d.shape[-1]))

        return self._moved(_depth(one, self.lead)(w, self.arrays))

    def gram(self) -> jax.Array:
        def one(arrays):
            ids, d = jax.vmap(lambda arrays: arrange(self.terms, arrays))(arrays)
            batch, t, n = d.shape
            flat_ids, flat = ids.reshape(-1), d.reshape(-1, n)

            def row(example):  # all pairs of positions of one example with those of all others
                ids, d = example
                products = _dot(d, flat, ((1,), (1,)), ((), ())) * (ids[:, None] == flat_ids)
                return jnp.sum(products.reshape(t, batch, t), axis=(0, 2))

            return jax.lax.map(row, (ids, d))

        for _ in range(self.lead):
            one = _summed(one)
        return one(self.arrays)

    def materialize(self) -> jax.Array:
        def one(arrays):
            ids, d = arrange(self.terms, arrays)
            return self._table(ids, _widened(d))

        return jax.vmap(self._moved)(jax.vmap(_depth(one, self.lead), in_axes=self.lead)(self.arrays))

    def _table(self, ids: jax.Array, d: jax.Array) -> jax.Array:
        return jnp.zeros((self.terms[0].kind.shape[1], d.shape[-1]), d.dtype).at[ids].add(d, mode="drop")[None]

    levels = Pair.levels
    _moved = Pair._moved


def _lookup_square(ids: jax.Array, d: jax.Array) -> jax.Array:
    """Sum the squares of the rows, those with equal ids added first: sort, and add neighbours; never vocabulary × width."""
    order = jnp.argsort(ids)
    ids, d = ids[order], _widened(d)[order]
    segment = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]]).astype(jnp.int32))
    rows = jax.ops.segment_sum(d, segment, num_segments=ids.size, indices_are_sorted=True)
    return jnp.sum(jnp.square(rows))


def _outer(a: jax.Array, d: jax.Array, examples: int) -> list[jax.Array]:
    """Make G of one example in parts of its longer side, which comes last: the better matrix product."""
    if a.shape[-1] > d.shape[-1]:
        a, d = d, a
    parts = _parts(d, CHUNK // (examples * a.shape[0] * a.shape[-1]))
    return [_dot(a, part, ((1,), (1,)), ((0,), (0,))) for part in parts]


def _combined(w: jax.Array | None, g: jax.Array) -> jax.Array:
    """Take sum_i w_i g_i, with weights of 1 for None: as a product too, since XLA adds up examples slowly on CPUs."""
    g = _widened(g)
    w = jnp.ones(g.shape[0], g.dtype) if w is None else w.astype(g.dtype)
    return jax.lax.dot_general(w, g, (((0,), (0,)), ((), ())), precision="highest")


def _parts(a: jax.Array, size: int) -> list[jax.Array]:
    """Cut the last axis into parts of about `size`, 16 at most."""
    count = min(16, -(-a.shape[-1] // max(1, size)))
    return jnp.array_split(a, count, axis=-1)


def _square(x: jax.Array, kept: int = 1) -> jax.Array:
    """Sum squares over all but the leading axes. As a product: XLA would store the squares before it sums them."""
    summed, batched = tuple(range(kept, x.ndim)), tuple(range(kept))
    contract = functools.partial(jax.lax.dot_general, preferred_element_type=_wide(x), precision="highest")
    return contract(x, x, ((summed, summed), (batched, batched)))


def _dot(a: jax.Array, b: jax.Array, contracted: Any, batched: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, (contracted, batched), preferred_element_type=_wide(a, b))


def _wide(*arrays: jax.Array) -> Any:
    return statistics_dtype(jnp.result_type(*arrays))


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(statistics_dtype(x.dtype))


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
