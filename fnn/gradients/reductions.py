"""What `watch` reduces values to, where they are made: moments, dead units, norms, ranks, attention. All safe at any scale.

Numbers come as pairs (m, e), which stand for m · 2^e: float32[...] and int32[...]. A pair holds the square of 1e-30, and the
norm of a gradient at any depth. Forward values are averaged over `axis_name`, if there is one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fnn import lowering, mapped, tree
from fnn.gradients import powers
from fnn.tree import statistics_dtype
from fnn.vectors import summed

Pair = tuple[jax.Array, jax.Array]
LOWEST = -(2**28)
"""The exponent of zero: in a sum the other one counts."""


@dataclass(frozen=True)
class Sums:
    """Sums over an array, all from one pass: `first` Σx and `second` Σx², over all axes behind some leading ones."""

    first: Pair
    second: Pair
    peaks: jax.Array
    """The largest |x| over the first of the axes alone: one number for each entry of the others."""
    count: int


def sums(x: jax.Array, held: bool) -> Sums:
    """Sum an array and its squares, at any scale; `held` says that the array is in memory anyway.

    All sums come from one reduction over the first axis, several results at a time: on a CPU each pass counts. A
    condition needs the array in memory, where a reduction alone is fused with what makes it.
    """
    wide = x.astype(statistics_dtype(x.dtype))

    def plain(wide):
        peaks, first, second = _reduced((jnp.abs(wide), wide, wide * wide), 0, peaks=True)
        return ((first, _exponent(0)), (second, _exponent(0)), peaks), tree.safe(second)

    def everywhere(wide):
        power = _power(wide.dtype)
        parts = jnp.abs(wide), wide, wide / power, *_squares(wide)
        peaks, first, scaled, *three = _reduced(parts, 0, peaks=True)
        over = ~jnp.isfinite(first)
        mean = jnp.where(over, scaled, first), jnp.where(over, _exponent(math.log2(power)), 0)
        return mean, _in_range(*three), peaks

    mean, second, peaks = _guarded(plain, everywhere, wide) if held else everywhere(wide)
    return Sums(mean, second, peaks, wide.size)


def square(x: jax.Array, axes: int = 0) -> Pair:
    """Sum the squares of an array over all axes behind the first `axes`, at any scale."""
    wide = x.astype(statistics_dtype(x.dtype))
    wide = wide if wide.ndim > axes else wide[..., None]

    def plain(wide):
        (m,) = _reduced((wide * wide,), axes)
        return (m, jnp.broadcast_to(_exponent(0), m.shape)), tree.safe(m)

    return _guarded(plain, lambda wide: _in_range(*_reduced(_squares(wide), axes)), wide)


def _guarded(plain: Callable[..., Any], everywhere: Callable[..., Any], wide: jax.Array) -> Any:
    """Take plain sums where they hold, if the array is large enough for that to be worth a condition."""
    return everywhere(wide) if wide.size <= lowering.SMALL else tree.guarded(plain, everywhere, wide)


def _exponent(e: float) -> jax.Array:
    return jnp.asarray(int(e), jnp.int32)


def _squares(wide: jax.Array) -> tuple[jax.Array, ...]:
    """Square medium, large and small numbers, each where the squares are floats: one of the three sums is right."""
    size, power, info = jnp.abs(wide), _power(wide.dtype), jnp.finfo(wide.dtype)
    # The bounds are never reached where the sum counts; without them XLA may write (a·s)² as a²·s², and s² is infinite.
    large, small = jnp.minimum(size / power, info.max), jnp.minimum(size * power, 2.0 ** (info.maxexp // 2 - 2))
    return wide * wide, large * large, small * small


def _in_range(medium: jax.Array, large: jax.Array, small: jax.Array) -> Pair:
    """Choose among the sums of three ranges."""
    info, order = jnp.finfo(medium.dtype), 2 * int(math.log2(_power(medium.dtype)))
    # Where the medium sum is not above this bound, it may have lost numbers that count; NaN stays NaN.
    low, high = medium <= info.tiny / info.eps**2, medium > info.max
    m = jnp.where(low, small, jnp.where(high, large, medium))
    return m, jnp.where(low, -order, jnp.where(high, order, 0)).astype(jnp.int32)


def _power(dtype: Any) -> float:
    return 2.0 ** (jnp.finfo(dtype).maxexp * 25 // 32)


def _reduced(parts: tuple[jax.Array, ...], axes: int, peaks: bool = False) -> tuple[jax.Array, ...]:
    """Sum arrays over all axes behind the first `axes`; with `peaks` the first by its maximum, over one axis only."""
    if lowering.folds():
        for _ in range(2):
            parts = _folded(parts, axes, peaks)
        top = (jnp.max(parts[0], axis=axes),) if peaks else ()
        return (*top, *(jnp.sum(part, axis=range(axes, part.ndim)) for part in parts[len(top) :]))
    if not peaks:
        return summed(parts, range(axes, parts[0].ndim))
    # Three at a time: of six XLA for a GPU makes a kernel that needs more shared memory than there is.
    top, *sums = (a for n in range(0, len(parts), 3) for a in summed(parts[n : n + 3], [axes], peaks and n == 0))
    return top, *(a for n in range(0, len(sums), 3) for a in summed(sums[n : n + 3], range(axes, top.ndim)))


def moments(x: jax.Array, units: Sequence[int] | None, axis_name: Any, held: bool = False) -> dict[str, Any]:
    """Take E[x] and E[x²] of an array, and which units are zero at every example and position: float32[units].

    `held` is that of `sums`.
    """
    if not x.ndim:
        x = x[None]
    found = sums(x, held)
    one = jnp.float32(1 / found.count)
    first, second = (joined_over((m * one, e), axis_name) for m, e in (found.first, found.second))
    taken: dict[str, Any] = {"mean": first, "second_moment": second}
    if units is not None:
        by_peak = 0 not in units and x.ndim > 1
        zero = (found.peaks if by_peak else x) == 0
        units = [axis - 1 for axis in units] if by_peak else units
        zero = jnp.all(zero, axis=[axis for axis in range(zero.ndim) if axis not in units])
        dead = mapped.reduce(jax.lax.pmin, zero.reshape(-1).astype(jnp.float32), axis_name)
        taken["dead"] = jnp.where(jnp.isnan(second[0]), jnp.nan, dead)
    return taken


def joined_over(pair: Pair, axis_name: Any) -> Pair:
    """Average a pair over a mapped axis."""
    if axis_name is None:
        return pair
    m, e = pair
    top = mapped.reduce(jax.lax.pmax, jnp.where(m == 0, LOWEST, e), axis_name)
    return mapped.mean(m * jnp.exp2(jnp.maximum(e - top, -2000).astype(m.dtype)), axis_name), top


def _folded(parts: tuple[jax.Array, ...], axis: int, peaks: bool) -> tuple[jax.Array, ...]:
    """Sum some entries of an axis at a time, of several arrays; with `peaks` take the maximum of the first.

    Measured on a CPU: eight at a time take no longer than two sums would, where a reduction of the whole axis takes as long
    as ten. Sixteen of up to three arrays are as fast and leave half as much; of six arrays they are slower.
    """
    shape = parts[0].shape
    n = shape[axis]
    if n < 16:
        return parts
    fold = next((k for k in (16, 8, 7, 6, 5, 4)[len(parts) > 3 :] if n % k == 0), 0)
    if not fold:
        fold = 8
        edges = [(0, -n % fold if i == axis else 0, 0) for i in range(len(shape))]
        parts = tuple(jax.lax.pad(part, jnp.zeros((), part.dtype), edges) for part in parts)
    parts = tuple(part.reshape(*shape[:axis], fold, -1, *shape[axis + 1 :]) for part in parts)

    return summed(parts, [axis], peaks)


def saturated(x: jax.Array, bounds: tuple[float, float], axis_name: Any) -> jax.Array:
    """Take the fraction of numbers within 1 % of the distance between two bounds of one of them."""
    low, high = bounds
    margin = 0.01 * (high - low)
    outside = (x < low + margin) | (x > high - margin)
    return mapped.mean(jnp.mean(outside.astype(jnp.float32)), axis_name)


def central(x: jax.Array, axis_name: Any) -> tuple[jax.Array, jax.Array]:
    """Take mean and central moments of an array: (float32[4] of mean, m2, m3, m4 in units of 2^k, k)."""
    r, k = _scaled(x, axis_name)
    mean = mapped.mean(jnp.mean(r), axis_name)
    d = r - mean
    return jnp.stack([mean, *mapped.mean([jnp.mean(d**n) for n in (2, 3, 4)], axis_name)]), k


def kurtosis(parts: jax.Array, k: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Join central moments over some leading axes: E[(x - mean)^4] / E[(x - mean)²]², 3 for a Gaussian."""
    top = jnp.max(k, axis=axes, keepdims=True)
    unit = jnp.exp2((k - top).astype(parts.dtype))
    mean, m2, m3, m4 = (parts[..., n] * unit ** (n + 1) for n in range(4))
    d = mean - jnp.mean(mean, axis=axes, keepdims=True)
    second, fourth = m2 + d**2, m4 + 4 * d * m3 + 6 * d**2 * m2 + d**4
    return jnp.mean(fourth, axis=axes) / jnp.mean(second, axis=axes) ** 2


def rank(x: jax.Array, units: Sequence[int], axis_name: Any) -> jax.Array:
    """Take the participation ratio (tr G)² / tr G² of the Gram matrix of all positions over units: 1 to min(both)."""
    r, _ = _scaled(x, axis_name)
    others = [axis for axis in range(x.ndim) if axis not in units]
    r = r.transpose(*others, *units).reshape(-1, max(1, _count(x, units)))
    by_units = axis_name is not None or r.shape[1] <= r.shape[0]
    # The smaller of the two matrices: both have the same eigenvalues. Exact products, since the ratio may be near 1.
    g = jnp.matmul(r.T, r, precision="highest") if by_units else jnp.matmul(r, r.T, precision="highest")
    g = mapped.mean(g, axis_name)
    total = jnp.trace(g)
    return total**2 / jnp.sum(g * g)


def attention(logits: jax.Array, axis: int, heads: Sequence[int], axis_name: Any) -> dict[str, jax.Array]:
    """Take by head the largest logit, and the mean entropy of the weights in nats: float32[heads] each."""
    wide = logits.astype(statistics_dtype(logits.dtype))
    others = [a for a in range(wide.ndim) if a not in heads]
    largest = jnp.max(wide, axis=others).reshape(-1)
    log = jax.nn.log_softmax(wide, axis=axis)
    entropy = -jnp.sum(jnp.where(log > -1e30, jnp.exp(log) * log, 0), axis=axis, keepdims=True)
    entropy = jnp.mean(entropy, axis=others).reshape(-1)
    return {
        "largest": mapped.reduce(jax.lax.pmax, largest, axis_name),
        "entropy": mapped.mean(entropy, axis_name),
    }


def norm(x: Any, axes: int = 0) -> Pair:
    """Take the Frobenius norm of an array, or of a `Scaled`, over all axes behind the first `axes`: float32[...] and exponents."""
    if not isinstance(x, powers.Scaled):
        x = powers.Scaled(x, jnp.zeros((), jnp.int32))
    x = powers.merged(x, axes)
    m, e = square(x.value, axes)
    return jnp.sqrt(m), e // 2 + jnp.broadcast_to(powers.against(x.exponent, axes), e.shape)


def root_mean(pair: Pair, axis_name: Any) -> Pair:
    """Take the root of the mean of squares over a mapped axis."""
    m, e = pair
    top = mapped.reduce(jax.lax.pmax, jnp.where(m == 0, LOWEST, e), axis_name)
    m = m * jnp.exp2(jnp.maximum(e - top, -2000).astype(m.dtype))
    return jnp.sqrt(mapped.mean(m * m, axis_name)), top


def mean_of(x: Any, axis_name: Any) -> powers.Scaled:
    """Average a gradient over a mapped axis."""
    x = powers.unit(powers.scaled(x))
    top = mapped.reduce(jax.lax.pmax, x.exponent, axis_name)
    return powers.Scaled(
        mapped.mean(powers.shift(x.value, x.exponent - top), axis_name), top, powers.reach(x.value.dtype)
    )


def dot(g: Any, w: Any, axes: int) -> Pair:
    """Take the inner product of a gradient and its array over all axes behind the first `axes`."""
    a, b = (powers.unit(powers.normal(powers.rows(x, axes))) for x in (g, w))
    wide = statistics_dtype(a.value.dtype)
    product = jnp.sum(a.value.astype(wide) * b.value.astype(wide), axis=range(axes, a.value.ndim))
    return product, a.exponent + b.exponent


def rounded(x: Any) -> Any:
    """Undo the exponent as a float would: zero below the dtype's range, infinity above it."""
    if not isinstance(x, powers.Scaled):
        return x
    one = powers.unit(x)
    most = int(jnp.finfo(one.value.dtype).maxexp)
    by = jnp.clip(one.exponent, -3 * most, 2 * (most - 1))
    half = by >> 1
    return powers.shift(powers.shift(one.value, half), by - half)


def joined(pair: Pair, axes: Sequence[int], power: int = 1) -> Pair:
    """Average pairs over some axes; with power 2 take the root of the sum of squares (of norms over time)."""
    if not axes:
        return pair
    m, e = pair
    top = jnp.max(jnp.where(m == 0, LOWEST, e), axis=axes, keepdims=True)
    m = m * jnp.exp2(jnp.maximum(e - top, -2000).astype(m.dtype))
    total = jnp.sqrt(jnp.sum(m * m, axis=axes)) if power == 2 else jnp.mean(m, axis=axes)
    return total, top.reshape(total.shape)


def _scaled(x: jax.Array, axis_name: Any) -> Pair:
    """Divide an array by a power of two to a largest number in [1/2, 1): no square of it leaves float32."""
    wide = x.astype(statistics_dtype(x.dtype))
    r = powers.unit(powers.normal(powers.Scaled(wide, jnp.zeros((), jnp.int32))))
    if axis_name is None:
        return r.value, r.exponent
    k = mapped.reduce(jax.lax.pmax, r.exponent, axis_name)
    return powers.shift(r.value, r.exponent - k), k


def _count(x: jax.Array, axes: Sequence[int]) -> int:
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return count
