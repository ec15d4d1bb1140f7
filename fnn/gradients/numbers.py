"""What `flow.measure` returned, as labelled numbers: scales undone, layers counted, numbers that left the range marked."""

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import tree
from fnn.layers import taps
from fnn.layers.taps import TapState
from fnn.tree import DEPTH, UNNAMED

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

    `values` and `held` are float64[lead..., n]; the leading axes are those of `vmap`.
    """

    labels: list[Label]
    values: np.ndarray
    held: np.ndarray
    """The log of what the device held for each number: of a gradient its norm as the taps rescaled it, of an error signal
    its norm as it arrived at the tap, of the statistics of the forward pass the largest number at the tap."""
    backward: np.ndarray
    """Which are logs of gradients and error signals: bool[n]."""
    rescaled: np.ndarray
    """Which are error signals at taps that rescale: bool[n]."""
    weights: tuple[str, ...]
    """The quantities that belong to a layer's weights: `log_kernel`, ..."""


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
    held: Any
    backward: Any = False
    rescaled: Any = False
    role: str = ""


def resolve(measured: dict[str, Any], params: Any) -> Numbers:
    """Undo the scales in float64; `measured` may carry leading axes, `params` (or their specs) must not."""
    lead, columns = np.ndim(measured["loss"]), []
    sizes = tree.map_depth(lambda k, a: 0.5 * np.log(max(1, np.prod(a.shape[k:]))), params)
    logs = jax.tree.map(_unscale, measured["logs"], measured["exponents"])
    for where, log, rms, held in _entries(lead, logs, jax.tree.map(np.subtract, logs, sizes), measured["logs"]):
        columns += [
            _Column(where, f"log_{where.name}", log, held, True),
            _Column(where, f"log_{where.name}_rms", rms, held, True),
        ]
    for where, new, old in _entries(lead, measured["state"], measured["taps"]):
        if not isinstance(new, TapState):
            continue
        if new.rescale and np.any(old.backward.uses > 1):
            raise ValueError(
                f"gradient_flow: tap {where.path} was passed {int(np.max(old.backward.uses))} times on the way back, so a "
                "weight is used on both sides of it and one scale cannot be undone; move the tap out of the part that "
                "is reused"
            )
        held = taps.log_error(old.backward)
        log = _unscale(held, old.backward.exponent)
        columns.append(_Column(where, "log_error", log, held, True, new.rescale, new.role))
        with np.errstate(divide="ignore"):
            peak = np.log(np.asarray(new.forward["peak"], np.float64))
        columns += [_Column(where, name, value, peak, role=new.role) for name, value in new.forward.items()]
    columns.sort(key=lambda column: column.where.place)
    layers, weights = _layers(params)
    labels = [
        Label(bisect.bisect(layers, c.where.place), c.where.path, c.quantity, c.role, c.where.place) for c in columns
    ]
    arrays = [np.stack([np.asarray(column[i], np.float64) for column in columns], -1) for i in (2, 3)]
    flags = [np.array([column[i] for column in columns], bool) for i in (4, 5)]
    return Numbers(labels, arrays[0], arrays[1], flags[0], flags[1], weights)


def settle(
    measured: dict[str, Any], params: Any, *, dtype: Any = None, smooth: bool = False, squares: bool = True
) -> tuple[Numbers, Verdict]:
    """Do `resolve`, and set to NaN what the range of the float type has spoiled: a wrong number never passes for one.

    The forward pass has left the range where the largest number at a tap is not finite, or so small that part of the
    signal is flushed to zero (below tiny/eps); or where a tap holds zeros alone and the signal was on its way there
    (below the root of that); or where the loss is not finite. Zeros after a signal of normal size (a dead layer, a
    weight of zero) are zeros. Then every gradient is NaN, and every statistic from that tap on. With `squares`, what a
    norm layer takes, signals above the root of the largest number count as left too. `smooth` says that phi'(0) is not
    zero and has no jump there, so that error signals are right though the signal itself is lost: then only those logs
    are NaN that vanished themselves.

    A gradient that vanished on the way back because there were too few taps is NaN as well. `dtype` is the type that the
    net computes in (by default the loss's).
    """
    loss = np.asarray(measured["loss"])
    info = jnp.finfo(dtype or loss.dtype)
    numbers = resolve(measured, params)
    values, sizes, backward = numbers.values, numbers.held, numbers.backward

    def some(mask):
        return np.any(mask, axis=-1)

    low, high = float(np.log(float(info.tiny) / float(info.eps))), float(np.log(float(info.max)))
    zero, near = sizes == -np.inf, np.isfinite(sizes) & (sizes < low)
    large = ~backward & ~(sizes < (high / 2 if squares else np.inf))
    fading = ~backward & np.isfinite(sizes) & (sizes < low / 2)
    small = some(near & ~backward) | (some(zero & ~backward) & some(fading))
    bad = ~backward & (large | near | (zero & small[..., None]))
    unbounded = ~np.isfinite(loss) | some(large)
    lost = unbounded | (small & (not smooth))
    # In float32 the signal may vanish between two taps without a trace; float64 reaches further than a net's blocks.
    gone = some(numbers.rescaled & zero) & ~some(zero & ~backward) & (info.bits < 64)
    faint = backward & (zero | near) & (small | gone | some(backward & near))[..., None]
    behind = np.logical_or.accumulate(bad, axis=-1) & lost[..., None] & ~backward
    square = np.array([label.quantity == "second_moment" for label in numbers.labels], bool)
    outside = square & np.isfinite(sizes) & ~((values > float(info.tiny) / float(info.eps)) & np.isfinite(values))
    marked = (backward & lost[..., None]) | faint | bad | behind | outside
    steady = np.where(backward, sizes > low, np.abs(sizes) < -low / 2) & np.isfinite(sizes)
    forward, back = (np.nonzero(np.any(mask.reshape(-1, mask.shape[-1]), axis=0))[0] for mask in (bad, faint))
    where = [*forward[:1], *back[-1:]]
    verdict = Verdict(
        ~np.isfinite(loss) | ~np.all(steady, axis=-1),
        lost,
        lost | some(marked & ~square),
        numbers.labels[where[0]] if where else None,
    )
    return numbers._replace(values=np.where(marked, np.nan, values)), verdict


def disagreement(first: Numbers, again: Numbers, dtype: Any) -> str | None:
    """Name the last array or tap, in forward order, whose log is not the same in two measurements with other scales.

    The scales are powers of two, so that they drop out exactly unless paths of different scales meet. Left out are logs
    that are not finite, or near the end of the range of `dtype`; and arrays that are small beside others of their layer:
    they may be rounding errors, which differ from run to run on some devices.
    """
    values, others, info = first.values, again.values, jnp.finfo(dtype)
    held = np.minimum(first.held, again.held)
    usable = np.isfinite(values) & np.isfinite(others) & (held > np.log(float(info.tiny) / float(info.eps)) + 10)
    differ = usable & (np.abs(np.where(usable, values, 0) - np.where(usable, others, 0)) > 1e-3)
    largest: dict[Order, float] = {}
    for label, value in zip(first.labels, np.where(first.backward, values, -np.inf), strict=True):
        group = _group(label.place)
        largest[group] = max(largest.get(group, -np.inf), value)
    rows = zip(first.labels, differ & first.backward, values, strict=True)
    found = [label.path for label, differs, value in rows if differs and value > largest[_group(label.place)] - 9]
    return found[-1] if found else None


def _layers(params: Any) -> tuple[list[Order], tuple[str, ...]]:
    """List the places of the layers, and the quantities of their weights.

    A layer is a group of arrays side by side (of one dict) that holds a weight: an array of two axes or more after
    depth, which is not called bias or scale. So kernel and bias are one layer, and an LSTM's two kernels; a norm or a
    gain is none, and belongs to the layer before it. Arrays that stand in a tuple are groups of their own.
    """
    axes = tree.map_depth(lambda k, a: np.full(a.shape[:k], len(a.shape) - k), params)
    weights = [where for where, n in _entries(0, axes) if n >= 2 and where.name not in ("bias", "scale")]
    return sorted({_group(where.place) for where in weights}), tuple({f"log_{w.name}": None for w in weights})


def _group(place: Order) -> Order:
    return place[:-1] if place and place[-1][1] else place


def _entries(lead: int, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """Yield (where, leaf, ...) of trees of one form, a tap being one leaf, every depth axis written out."""
    flat = [jax.tree_util.tree_leaves_with_path(t, is_leaf=lambda node: isinstance(node, TapState)) for t in trees]
    for rows in zip(*flat, strict=True):
        keys, leaves = (
            [key for key in rows[0][0] if key != UNNAMED],
            [jax.tree.map(np.asarray, leaf) for _, leaf in rows],
        )
        shape = jax.tree.leaves(leaves[0])[0].shape[lead:]
        for index in np.ndindex(shape[: keys.count(DEPTH)]):
            at = (slice(None),) * lead + index
            yield _where(keys, index), *(jax.tree.map(lambda a, at=at: a[at], leaf) for leaf in leaves)


def _where(keys: Any, index: tuple[int, ...]) -> _Where:
    numbers = iter(index)
    place: list[tuple[int, str]] = []
    for key in keys:
        number = next(numbers) if key == DEPTH else getattr(key, "idx", None)
        place.append((-1, tree.path((key,))) if number is None else (number, ""))
    parts = [f"[{n}]" if key == DEPTH else tree.path((key,)) for key, (n, _) in zip(keys, place, strict=True)]
    return _Where(tuple(place), "/".join(parts), parts[-1] if parts else "")


def _unscale(log: Any, exponent: Any) -> np.ndarray:
    return np.asarray(log, np.float64) + np.log(2) * np.asarray(exponent, np.float64)
