"""Which operations make the gradient of one example as a product of small factors, and how to arrange the factors.

The gradient of a kernel for one example is G = sum_t a_t d_tᵀ over its positions t, from layer inputs a and error
signals d. A `Term` says how a `dot_general`, a convolution or a scatter is such a product: `factors` arranges its
operands as a: float[groups, t, m] and d: float[groups, t, n], and `moves` reindex G: float[groups, m, n] into its result.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fnn.gradients.operations import reading
from fnn.tree import statistics_dtype


@dataclass(frozen=True)
class Move:
    """One reindexing on the way from [depth..., groups, m, n] to the parameter's shape, behind `lead` axes."""

    kind: str
    """`reshape` or `transpose`."""
    arg: tuple[int, ...]
    lead: int = 0

    def __call__(self, g: jax.Array) -> jax.Array:
        if self.kind == "reshape":
            return g.reshape(*g.shape[: self.lead], *self.arg)
        return g.transpose(*range(self.lead), *(self.lead + axis for axis in self.arg))


@dataclass(frozen=True)
class Product:
    """A `dot_general`: contracted axes are positions, batch axes groups."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]
    swapped: bool = False

    @property
    def free(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        used = [(*c, *b) for c, b in zip(self.contracted, self.batched, strict=True)]
        shapes = (self.left, self.right)
        m, n = (tuple(s[i] for i in range(len(s)) if i not in u) for s, u in zip(shapes, used, strict=True))
        return m, n

    @property
    def shape(self) -> tuple[int, int, int]:
        m, n = map(math.prod, self.free)
        groups = math.prod(self.left[i] for i in self.batched[0])
        return (groups, n, m) if self.swapped else (groups, m, n)

    @property
    def moves(self) -> tuple[Move, ...]:
        return (Move("reshape", (*(self.left[i] for i in self.batched[0]), *self.free[0], *self.free[1])),)

    @property
    def result(self) -> tuple[int, ...]:
        """Shape in which each axis comes from one axis of an operand: groups, then the free axes of the two sides."""
        first, second = self.free[::-1] if self.swapped else self.free
        return (*(self.left[i] for i in self.batched[0]), *first, *second)

    def side(self, axis: int) -> tuple[int, int] | None:
        """Say which operand, and which of its axes, an axis of the result comes from; None for groups."""
        free = [
            [(side, i) for i in range(len(shape)) if i not in contracted and i not in batched]
            for side, (shape, contracted, batched) in enumerate(
                zip((self.left, self.right), self.contracted, self.batched, strict=True)
            )
        ]
        order = [None] * len(self.batched[0]) + (free[1] + free[0] if self.swapped else free[0] + free[1])
        return order[axis]

    def factors(self, a: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        def arranged(x, contracted, batched):
            free = [i for i in range(x.ndim) if i not in contracted and i not in batched]
            sizes = [math.prod(x.shape[i] for i in axes) for axes in (batched, contracted, free)]
            return x.transpose(*batched, *contracted, *free).reshape(sizes)

        pair = tuple(map(arranged, (a, d), self.contracted, self.batched))
        return pair[::-1] if self.swapped else pair


@dataclass(frozen=True)
class Convolution:
    """A convolution that makes a kernel's gradient: G[k, c, o] = sum over positions of x[position + k, c]·d[position, o].

    Its window is the error signal, its batch axis the input channels, its feature axis the examples of the forward
    pass, and it has as many batch groups as the forward pass has feature groups.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    out: tuple[int, ...]
    specs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilations: tuple[tuple[int, ...], tuple[int, ...]]
    groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        kernel = math.prod(self.out[i] for i in self.specs[2][2:])
        return self.groups, kernel * self.out[self.specs[2][0]], self.out[self.specs[2][1]] // self.groups

    @property
    def moves(self) -> tuple[Move, ...]:
        batch, feature, *spatial = self.specs[2]
        sizes = [self.out[i] for i in spatial]
        split = (self.groups, *sizes, self.out[batch], self.out[feature] // self.groups)
        parts = {feature: (0, len(split) - 1), batch: (len(split) - 2,)} | {s: (i + 1,) for i, s in enumerate(spatial)}
        order = [axis for place in range(len(self.out)) for axis in parts[place]]
        return Move("reshape", split), Move("transpose", tuple(order)), Move("reshape", self.out)

    def factors(self, x: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, feature, *spatial = self.specs[0]
        x = x.transpose(feature, *spatial, batch)
        inner = [(low, high, gap - 1) for (low, high), gap in zip(self.padding, self.dilations[0], strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])
        out_feature, in_feature, *window = self.specs[1]
        d = d.transpose(in_feature, *window, out_feature)
        positions, steps = d.shape[1:-1], self.dilations[1]
        patches = []
        for offset in itertools.product(*(range(self.out[i]) for i in self.specs[2][2:])):
            start = [o * s for o, s in zip(offset, self.strides, strict=True)]
            stop = [b + (p - 1) * s + 1 for b, p, s in zip(start, positions, steps, strict=True)]
            patches.append(jax.lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *steps, 1)))
        a = jnp.concatenate(patches, axis=-1)
        count = math.prod(a.shape[:-1])
        a = a.reshape(count, len(patches), self.groups, -1).transpose(2, 0, 1, 3).reshape(self.groups, count, -1)
        return a, d.reshape(count, self.groups, -1).swapaxes(0, 1)

    def weighted(self, x: jax.Array, d: jax.Array) -> jax.Array:
        """Convolve all examples at once: the batch joins the contracted axis."""

        def merged(a, axis):
            a = jnp.moveaxis(a, 0, axis)
            return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])

        return jax.lax.conv_general_dilated(
            merged(x, self.specs[0][1]),
            merged(d, self.specs[1][1]),
            self.strides,
            self.padding,
            *self.dilations,
            dimension_numbers=jax.lax.ConvDimensionNumbers(*self.specs),
            batch_group_count=self.groups,
            preferred_element_type=statistics_dtype(jnp.result_type(x, d)),
        )


@dataclass(frozen=True)
class Lookup:
    """A scatter-add of rows into zeros, as the gradient of an embedding: row `ids[t]` receives d_t."""

    out: tuple[int, ...]
    mode: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.out[0], math.prod(self.out[1:])

    @property
    def moves(self) -> tuple[Move, ...]:
        return (Move("reshape", self.out),)

    def factors(self, ids: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = ids.reshape(-1)
        if self.mode == "CLIP":
            ids = jnp.clip(ids, 0, self.out[0] - 1)
        inside = (ids >= 0) & (ids < self.out[0])
        d = d.reshape(ids.size, -1)
        return jnp.where(inside, ids, self.out[0]), jnp.where(inside[:, None], d, jnp.zeros((), d.dtype))


@dataclass(frozen=True)
class Term:
    """One product in a gradient: what made it, and in how many loops that use the parameter in every turn."""

    kind: "Kind"
    times: int = 0

    def factors(self, a: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Arrange one example's arrays: a float[groups, t, m], d float[groups, t, n]; of a lookup int[t], float[t, n]."""
        function: Callable[..., Any] = self.kind.factors
        for _ in range(self.times):
            function = jax.vmap(function)
        axis = 0 if isinstance(self.kind, Lookup) else 1

        def merged(x):
            if axis:
                x = jnp.moveaxis(x, self.times, 0)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + self.times + 1 :])

        a, d = function(a, d)
        return (merged(a), merged(d)) if self.times else (a, d)


Kind = Product | Convolution | Lookup


def recognise(name: str, params: dict[str, Any], specs: Sequence[Any], out: Any) -> Kind | None:
    """Read the equation that makes a gradient as a product of its last two operands; None if it is no such product.

    Of a scatter this holds only if its first operand is zero, which the caller checks. Errors: Unreadable.
    """
    with reading(name):
        return _recognised(name, params, specs, out)


def _recognised(name: str, params: dict[str, Any], specs: Sequence[Any], out: Any) -> Kind | None:
    if name == "dot_general":
        contracted, batched = params["dimension_numbers"]
        left, right = (tuple(spec.shape) for spec in specs)
        (c, other_c), (b, other_b) = contracted, batched
        return Product(left, right, (tuple(c), tuple(other_c)), (tuple(b), tuple(other_b)))
    if name == "conv_general_dilated" and params["feature_group_count"] == 1:
        numbers = params["dimension_numbers"]
        return Convolution(
            left=tuple(specs[0].shape),
            right=tuple(specs[1].shape),
            out=tuple(out.shape),
            specs=(tuple(numbers.lhs_spec), tuple(numbers.rhs_spec), tuple(numbers.out_spec)),
            strides=tuple(params["window_strides"]),
            padding=tuple((low, high) for low, high in params["padding"]),
            dilations=(tuple(params["lhs_dilation"]), tuple(params["rhs_dilation"])),
            groups=params["batch_group_count"],
        )
    if name == "scatter-add":
        n, mode = params["dimension_numbers"], getattr(params["mode"], "name", str(params["mode"]))
        rank = len(out.shape)
        rows = tuple(range(len(specs[2].shape) - rank + 1, len(specs[2].shape)))
        plain = not (n.operand_batching_dims or n.scatter_indices_batching_dims)
        whole = specs[2].shape[len(specs[2].shape) - rank + 1 :] == out.shape[1:]
        if (
            plain
            and whole
            and rank
            and specs[1].shape[-1:] == (1,)
            and tuple(n.inserted_window_dims) == tuple(n.scatter_dims_to_operand_dims) == (0,)
            and tuple(n.update_window_dims) == rows
        ):
            return Lookup(tuple(out.shape), mode)
    return None
