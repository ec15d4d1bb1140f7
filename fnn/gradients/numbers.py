"""What `flow.measure` returned, as labelled numbers: layers counted, numbers that the forward pass spoiled marked."""

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import tree
from fnn.layers import taps
from fnn.tree import DEPTH

Order = tuple[tuple[int, str], ...]
"""A place in a net, which sorts in forward order: an index is (index, ""), a name (-1, name)."""


class Label(NamedTuple):
    """What one number is."""

    layer: int
    """Counted from the input, 1 being the first; 0 is in front of it."""
    path: str
    quantity: str
    role: str
    """Of a tap: see `taps.tap`; "" for parameters."""
    place: Order


class Numbers(NamedTuple):
    """Measured numbers in forward order, in float64: the last axis of each array is that of the labels.

    `values` and `peaks` are float64[lead..., n]; the leading axes are those of `vmap`.
    """

    labels: list[Label]
    values: np.ndarray
    peaks: np.ndarray
    """Of a statistic of the forward pass the log of the largest number at its tap; NaN for gradients and error signals."""
    backward: np.ndarray
    """Which are logs of gradients and error signals: bool[n]."""
    weights: tuple[str, ...]
    """The quantities that belong to a layer's weights: `log10_kernel`, ..."""


class Verdict(NamedTuple):
    """How a measurement lay in the range of its float type: bool[lead...] each."""

    strained: np.ndarray
    """A number is zero, not finite, or near an end of the range: worth measuring again in a wider type."""
    lost: np.ndarray
    """The forward pass left the range, so that every gradient is unknown."""
    left: np.ndarray
    """Some number was set to NaN."""
    first: Label | None
    """Where the forward pass first left the range, or else where gradients did, on the way back."""


class _Where(NamedTuple):
    place: Order
    path: str
    name: str


class _Column(NamedTuple):
    where: _Where
    quantity: str
    value: Any
    peak: Any = None
    role: str = ""


def resolve(measured: dict[str, Any], params: Any) -> Numbers:
    """Join logs and exponents to log10, in float64; `measured` may carry leading axes, `params` (or their specs) must not."""
    lead, columns = np.ndim(measured["loss"]), []
    sizes = tree.map_depth(lambda k, a: 0.5 * np.log10(max(1, np.prod(a.shape[k:]))), params)
    logs = jax.tree.map(_joined, measured["logs"], measured["exponents"])
    for where, log, rms in _entries(lead, logs, jax.tree.map(np.subtract, logs, sizes)):
        columns += [_Column(where, f"log10_{where.name}", log), _Column(where, f"log10_{where.name}_rms", rms)]
    for (keys, tap), error in zip(taps.listed(measured["state"]), measured["errors"], strict=True):
        for where, log, forward in _blocks(lead, keys, _joined(*error), tap.forward):
            with np.errstate(divide="ignore"):
                peak = np.log(np.asarray(forward["peak"], np.float64))
            columns.append(_Column(where, "log10_error", log, role=tap.role))
            columns += [_Column(where, name, value, peak, tap.role) for name, value in forward.items()]
    columns.sort(key=lambda column: column.where.place)
    layers, weights = _layers(params)
    labels = [
        Label(bisect.bisect(layers, c.where.place), c.where.path, c.quantity, c.role, c.where.place) for c in columns
    ]
    values = np.stack([np.asarray(c.value, np.float64) for c in columns], -1)
    peaks = np.stack([np.full(values.shape[:-1], np.nan) if c.peak is None else c.peak for c in columns], -1)
    return Numbers(labels, values, peaks, np.array([c.peak is None for c in columns], bool), weights)


def settle(
    measured: dict[str, Any], params: Any, *, dtype: Any = None, smooth: bool = False, squares: bool = True
) -> tuple[Numbers, Verdict]:
    """Do `resolve`, and set to NaN what the range of the float type has spoiled: a wrong number never passes for one.

    The forward pass has left the range where the largest number at a tap is not finite, or so small that part of the
    signal is flushed to zero (below tiny/eps); or where a tap holds zeros alone and the signal was on its way there
    (below the root of that); or where the loss is not finite. Zeros after a signal of normal size (a dead layer, a
    weight of zero) are zeros. Then every gradient is NaN, and every statistic from that tap on. With `squares`, what a
    norm layer takes, signals above the root of the largest number count as left too.

    `smooth` says that phi'(0) is not zero and has no jump there, so that error signals are right though the signal itself is
    lost, and gradients of biases too; then NaN are only those of arrays that the lost signal is multiplied with.

    The backward pass has a range of its own, without end. If nothing reaches the first tap, though no tap holds zeros
    alone, a signal too small for float32 may have been lost between two taps: zeros are then NaN. `dtype` is the type that
    the net computes in (by default the loss's).
    """
    loss = np.asarray(measured["loss"])
    info = jnp.finfo(dtype or loss.dtype)
    numbers = resolve(measured, params)
    labels, values, peaks, backward, _ = numbers

    def some(mask):
        return np.any(mask, axis=-1)

    def those(which):
        return np.array([which(label) for label in labels], bool)

    low, high = float(np.log(float(info.tiny) / float(info.eps))), float(np.log(float(info.max)))
    zero, near = peaks == -np.inf, np.isfinite(peaks) & (peaks < low)
    large = ~backward & ~(peaks < (high / 2 if squares else np.inf))
    small = some(near) | (some(zero) & some(np.isfinite(peaks) & (peaks < low / 2)))
    bad = large | near | (zero & small[..., None])
    lost = ~np.isfinite(loss) | some(large) | (small & (not smooth))
    behind = np.logical_or.accumulate(bad, axis=-1) & lost[..., None] & ~backward
    errors, nothing = those(lambda label: label.quantity == "log10_error"), backward & (values == -np.inf)
    first = nothing[..., np.flatnonzero(errors)[0]] if some(errors) else np.zeros_like(lost)
    gone = first & ~some(zero) & (info.bits < 64)  # float64 reaches further than the blocks between two taps
    last = np.maximum.accumulate(np.where(backward, 0, np.arange(len(labels))))  # the tap in front of an array
    multiplied = backward & ~errors & ~those(lambda label: label.path.endswith("bias"))
    faint = (nothing & (small | gone)[..., None]) | (multiplied & bad[..., last]) | (backward & np.isnan(values))
    square = those(lambda label: label.quantity == "second_moment")
    outside = square & np.isfinite(peaks) & ~((values > float(info.tiny) / float(info.eps)) & np.isfinite(values))
    marked = (backward & lost[..., None]) | faint | bad | behind | outside
    steady = np.isfinite(np.where(backward, values, peaks)) & (backward | (np.abs(peaks) < -low / 2))
    forward, back = (np.nonzero(np.any(mask.reshape(-1, mask.shape[-1]), axis=0))[0] for mask in (bad, faint))
    where = [*forward[:1], *back[-1:]]
    verdict = Verdict(
        ~np.isfinite(loss) | ~np.all(steady, axis=-1),
        lost,
        lost | some(marked & ~square),
        labels[where[0]] if where else None,
    )
    return numbers._replace(values=np.where(marked, np.nan, values)), verdict


def _layers(params: Any) -> tuple[list[Order], tuple[str, ...]]:
    """List the places of the layers, and the quantities of their weights.

    A layer is a group of arrays side by side (of one dict) that holds a weight: an array of two axes or more after
    depth, which is not called bias or scale. So kernel and bias are one layer, and an LSTM's two kernels; a norm or a
    gain is none, and belongs to the layer before it. Arrays that stand in a tuple are groups of their own.
    """
    axes = tree.map_depth(lambda k, a: np.full(a.shape[:k], len(a.shape) - k), params)
    weights = [where for where, n in _entries(0, axes) if n >= 2 and where.name not in ("bias", "scale")]
    return sorted({_group(where.place) for where in weights}), tuple({f"log10_{w.name}": None for w in weights})


def _group(place: Order) -> Order:
    return place[:-1] if place and place[-1][1] else place


def _entries(lead: int, tree: Any, *rest: Any) -> Iterator[tuple[Any, ...]]:
    """Yield (where, leaf, ...) of trees of one form, every depth axis written out."""
    others = [jax.tree.leaves(other) for other in rest]
    for (keys, leaf), *more in zip(jax.tree_util.tree_leaves_with_path(tree), *others, strict=True):
        yield from _blocks(lead, keys, leaf, *more)


def _blocks(lead: int, keys: Any, *parts: Any) -> Iterator[tuple[Any, ...]]:
    """Yield (where, part, ...) for each block of a stack; the arrays of each part have its depth axes."""
    shape = np.shape(jax.tree.leaves(parts)[0])[lead:]
    for index in np.ndindex(shape[: list(keys).count(DEPTH)]):
        at = (slice(None),) * lead + index
        yield _where(keys, index), *(jax.tree.map(lambda a, at=at: np.asarray(a)[at], part) for part in parts)


def _where(keys: Any, index: tuple[int, ...]) -> _Where:
    numbers = iter(index)
    place: list[tuple[int, str]] = []
    for key in keys:
        number = next(numbers) if key == DEPTH else getattr(key, "idx", None)
        place.append((-1, tree.path((key,))) if number is None else (number, ""))
    parts = [f"[{n}]" if key == DEPTH else tree.path((key,)) for key, (n, _) in zip(keys, place, strict=True)]
    return _Where(tuple(place), "/".join(parts), parts[-1] if parts else "")


def _joined(log: Any, exponent: Any) -> np.ndarray:
    """log10 of exp(log) * 2^exponent."""
    return (np.asarray(log, np.float64) + np.log(2) * np.asarray(exponent, np.float64)) / np.log(10)
