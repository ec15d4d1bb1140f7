"""Arrays with a power of two beside each: value · 2**exponent, which no number of products can push out of range.

An exponent belongs to a whole array, or to each entry of its leading axes, as in what a loop stacks. Within one array an
entry that is smaller than the largest by more than the range of the dtype rounds to zero, as it would in a sum of the two.

`normal` brings the largest entry to a fixed place, 2**30 in float32. It costs a pass over the array, so that every array
knows, without a look at its numbers, how far it may have moved since: its `slack`. A rule normalises only where the slack
would grow too large. The place is above 1 since a product that is too small becomes zero, which nobody sees: from there an
array may be multiplied by the smallest float of all, and a few constants, and still be in range.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

LOWEST = -(2**28)
"""The exponent of an array of zeros: in any sum the other one is larger."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "exponent"], meta_fields=["slack"])
@dataclass(frozen=True)
class Scaled:
    """The numbers value · 2**exponent; the exponent is an int32 with the shape of value's leading axes, often ()."""

    value: jax.Array
    exponent: jax.Array
    slack: float = 0.0
    """By how many binary orders value's largest entry may have moved since it was normal; it may have become zero, too, where
    this is more than `FEW`. Static."""

    def log_norm(self, axes: int = 0) -> jax.Array:
        """Natural log of the Frobenius norm over all axes behind the first `axes`; -inf for zeros, float[...].

        Rows that have no exponents of their own are -inf, too, where they lie below the range of the largest.
        """
        x = unit(normal(rows(merged(self, axes, apart=False), axes)))
        wide = jnp.abs(x.value).astype(jnp.promote_types(jnp.finfo(x.value.dtype).dtype, jnp.float32))
        square = jnp.sum(wide**2, axis=range(axes, wide.ndim))
        square = jnp.where(jnp.isinf(square), jnp.nan, square)
        return jnp.where(square == 0, -jnp.inf, 0.5 * jnp.log(square) + x.exponent.astype(wide.dtype) * math.log(2))


FEW = 4
"""A slack that a few sums, or small factors, leave: it hides no zeros, except where numbers cancel to the last bit."""


def place(dtype: Any) -> int:
    """The binary order of the largest entry of a normal array: 30 in float32."""
    return int(jnp.finfo(dtype).maxexp) // 4 - 2


def reach(dtype: Any) -> float:
    """By how many binary orders a plain array may move a value, in one product: 126 in float32."""
    return -float(jnp.finfo(dtype).minexp)


def room(dtype: Any) -> float:
    """How many binary orders a value may move by, all in all, before it is normalised: 156 in float32."""
    return reach(dtype) + place(dtype)


def scaled(x: Any) -> Scaled:
    """Put an exponent beside a plain array; an array of zeros gets the lowest."""
    if isinstance(x, Scaled):
        return x
    x = jnp.asarray(x)
    return normal(Scaled(x, jnp.zeros((), jnp.int32), room(x.dtype)))


def normal(x: Scaled) -> Scaled:
    """Bring the largest entry, of each array that has an exponent, to its place."""
    return Scaled(*_normal(x.value, x.exponent))


def tidy(x: Scaled) -> Scaled:
    """Normalise what may have moved."""
    return normal(x) if x.slack else x


def merged(x: Scaled, axes: int = 0, *, apart: bool = True) -> Scaled:
    """Leave exponents to the entries of at most `axes` leading axes; the largest counts.

    What lies too far below it becomes NaN; where entries are about to be added (`apart=False`) zero, which is rounding.
    """
    if x.exponent.ndim <= axes:
        return x
    x = tidy(x)
    highest = jnp.max(x.exponent, axis=range(axes, x.exponent.ndim), keepdims=True, initial=LOWEST)
    value = shift(x.value, x.exponent - highest)
    if apart:
        lost = (x.exponent - highest < jnp.finfo(value.dtype).minexp) & (x.exponent > LOWEST // 2)
        value = jnp.where(against(lost, value.ndim), jnp.nan, value)
    return Scaled(value, highest.reshape(highest.shape[:axes]))


def rows(x: Any, axes: int) -> Scaled:
    """Give each entry of `axes` leading axes an exponent."""
    x = merged(scaled(x), axes)
    if x.exponent.ndim == axes:
        return x
    lead = x.value.shape[:axes]
    # One of several rows may be far smaller than the whole, or zero.
    slack = max(x.slack, reach(x.value.dtype)) if math.prod(lead) > x.exponent.size else x.slack
    return Scaled(x.value, jnp.broadcast_to(against(x.exponent, axes), lead), slack)


def plain(x: Any) -> tuple[Any, Any]:
    """Undo the exponent: the numbers, NaN where they leave the range of the dtype; and which ones do."""
    if not isinstance(x, Scaled):
        return x, jnp.zeros((), bool)
    x = tidy(x)
    info = jnp.finfo(x.value.dtype)
    order = x.exponent + place(x.value.dtype)
    lost = (order > info.maxexp) | ((order <= info.minexp) & (x.exponent > LOWEST // 2))
    half = jnp.clip(x.exponent, 2 * info.minexp, info.maxexp) >> 1  # one power of two alone may be out of range
    value = shift(opaque(shift(x.value, half)), x.exponent - half)
    lost = against(lost, value.ndim) | jnp.isinf(value)
    return jnp.where(lost, jnp.nan, value), lost


def aligned(
    inputs: Sequence[Any], axes: int | None, zero: Callable[[Any], bool], tidy: Callable[[Scaled], Scaled]
) -> tuple[list[Any], jax.Array, float]:
    """Give all floating inputs one exponent (for each entry of `axes` leading axes): (values, exponent, slack).

    Integers, and what is known to be `zero`, stay as they are. Inputs with the same exponent are not touched.
    """
    some = [x for x in inputs if isinstance(x, Scaled)]
    axes = max(x.exponent.ndim for x in some) if axes is None else axes
    first = some[0].exponent
    bare = [isinstance(x, Scaled) or not is_float(x) or zero(x) for x in inputs]
    if all(bare) and first.ndim <= axes and all(x.exponent is first for x in some):
        return [getattr(x, "value", x) for x in inputs], first, max(x.slack for x in some)
    parts = [
        x if b and not isinstance(x, Scaled) else merged(scaled(x), axes) for x, b in zip(inputs, bare, strict=True)
    ]
    # What counts is the largest entry of each, which a slack hides: an array of zeros has none. The values are shifted only
    # once: the normalised ones are for others to use.
    normal = [tidy(p) if isinstance(p, Scaled) and p.slack > FEW else p for p in parts]
    exponents = [against(n.exponent, axes) for n in normal if isinstance(n, Scaled)]
    highest = functools.reduce(jnp.maximum, exponents)
    values = [shift(p.value, against(p.exponent, axes) - highest) if isinstance(p, Scaled) else p for p in parts]
    slack = max(n.slack for n in normal if isinstance(n, Scaled))
    # With one exponent for all the shapes need not fit, as those of a scatter's operands.
    lead = jnp.broadcast_shapes(*(jnp.shape(v) for v in values))[:axes] if axes else ()
    return values, jnp.broadcast_to(highest, lead), slack


def against(a: jax.Array, ndim: int) -> jax.Array:
    """Give an array of leading axes trailing axes of size one."""
    return a.reshape(a.shape + (1,) * (ndim - a.ndim)) if a.ndim < ndim else a


def shift(x: jax.Array, by: jax.Array) -> jax.Array:
    """x · 2**by: exact in range, zero where 2**by is below the dtype's range; `by` must not be above it."""
    return _shift(x, by)


def opaque(x: jax.Array) -> jax.Array:
    """Hide from XLA that an array is one number repeated, c.

    It reorders products of such: (c · x) · 2**by becomes (c · 2**by) · x, where the brackets may leave the range.
    """
    return jax.lax.optimization_barrier(x)


def is_float(x: Any) -> bool:
    """Whether a value can have an exponent."""
    return isinstance(x, Scaled) or jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def unit(x: Scaled) -> Scaled:
    """Bring the largest entry to [1/2, 1), for powers and the like."""
    x, by = tidy(x), place(x.value.dtype)
    return Scaled(shift(x.value, jnp.full_like(x.exponent, -by)), jnp.maximum(x.exponent + by, LOWEST), x.slack + by)


@jax.jit
def _normal(value: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    size, axes = jnp.abs(value), exponent.ndim
    if size.size and size.ndim > axes + 1:
        size = jnp.max(size, axis=axes)  # on a CPU faster than all axes at once, and without a copy of |value|
    # An initial value costs a kernel of its own, which only an empty array needs.
    peak = jnp.max(size, axis=range(axes, size.ndim), initial=None if value.size else 0)
    if peak.dtype.itemsize < 4:
        peak = peak.astype(jnp.float32)
    info = jnp.finfo(peak.dtype)
    # peak = f · 2**order, f in [1/2, 1): its bits say so. One factor 2**by must do, also for what is almost out of range.
    bits = jax.lax.bitcast_convert_type(peak, _integers(peak.dtype))
    order = (bits >> info.nmant).astype(jnp.int32) + info.minexp
    by = jnp.minimum(place(value.dtype) - order, int(jnp.finfo(value.dtype).maxexp) - 1)
    return _shift(value, by), _kept(jnp.where(peak == 0, LOWEST, exponent - by))


def _kept(exponent: jax.Array) -> jax.Array:
    """Keep XLA from computing an exponent anew wherever it is used, together with all that it was computed from.

    XLA joins cheap operations with each of their users, but not a sum over an axis.
    """
    first = jnp.arange(2) == 0
    return jnp.sum(jnp.where(against(first, exponent.ndim + 1), exponent, 0), axis=0, dtype=exponent.dtype)


@jax.jit
def _shift(x: jax.Array, by: jax.Array) -> jax.Array:
    dtype = jnp.finfo(x.dtype).dtype  # of its real part, where x is complex
    wide = dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    info = jnp.finfo(wide)
    most = int(jnp.finfo(dtype).maxexp) - info.minexp
    bits = jnp.minimum(jnp.maximum(by + (1 - info.minexp), 0), most).astype(_integers(wide)) << info.nmant
    power = jax.lax.bitcast_convert_type(bits, wide).astype(dtype)
    power = against(power, x.ndim).astype(x.dtype)
    return x * power


def _integers(dtype: Any) -> Any:
    return jnp.int64 if dtype.itemsize == 8 else jnp.int32
