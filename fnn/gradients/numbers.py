"""What `flow.measure` returned, as labelled numbers: scales undone, layers counted, numbers that left the range marked."""

import bisect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import tree
from fnn.layers import taps
from fnn.layers.taps import TapState

Order = tuple[tuple[int, str], ...]


class Numbers(NamedTuple):
    """Measured numbers as trees of float64[lead..., depth...]; the leading axes are those of `vmap`."""

    params: dict[str, Any]
    """Trees like params, by the pattern of their quantity: `log_{}` becomes `log_kernel`."""
    taps: Any
    """Like the net's state; for every tap a dict of quantities."""
    layers: list[Order]
    """The place of every layer in the net, in order."""
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
    first: tuple[int, str] | None
    """(layer, path) where the forward pass first left the range, or else where gradients did, on the way back."""
    rows: list[tuple[int, str, str, int]]
    """The numbers' labels, as `label` gives them."""


def resolve(measured: dict[str, Any], params: Any) -> Numbers:
    """Undo the scales in float64; `measured` may carry leading axes, `params` (or their specs) must not."""
    logs = jax.tree.map(_unscale, measured["logs"], measured["exponents"])
    sizes = tree.map_depth(lambda k, a: 0.5 * np.log(max(1, np.prod(a.shape[k:]))), params)

    def one(path, new, old):
        if new.rescale and np.any(old.backward.uses > 1):
            raise ValueError(
                f"gradient_flow: tap {path} was passed {int(np.max(old.backward.uses))} times on the way back, so a "
                "weight is used on both sides of it and one scale cannot be undone; move the tap out of the part that "
                "is reused"
            )
        log = _unscale(taps.log_error(old.backward), old.backward.exponent)
        return {"log_error": log} | {name: np.asarray(value, np.float64) for name, value in new.forward.items()}

    by_quantity = {"log_{}": logs, "log_{}_rms": jax.tree.map(np.subtract, logs, sizes)}
    return Numbers(by_quantity, _at_taps(one, measured), *_layers(params))


def settle(
    measured: dict[str, Any], params: Any, *, dtype: Any = None, smooth: bool = False, squares: bool = True
) -> tuple[Numbers, Verdict]:
    """Do `resolve`, and set to NaN what the range of the float type has spoiled: a wrong number never passes for one.

    The forward pass has left the range where the largest number at a tap is not finite, or so small that part of the
    signal is flushed to zero (below tiny/eps); or where a tap holds zeros alone and the signal was on its way there
    (below the root of that); or where the loss is not finite. Zeros behind a signal of normal size (a dead layer, a
    weight of zero) are zeros. Then every gradient is NaN, and every statistic from that tap on. With `squares`, what a
    norm layer takes, signals above the root of the largest number count as left too. `smooth` says that phi'(0) is not
    zero and has no jump there, so that error signals are right though the signal itself is lost: then only those logs
    are NaN that vanished themselves.

    A gradient that vanished on the way back because there were too few taps is NaN as well. `dtype` is the type that the net
    computes in (the loss's by default).
    """
    loss = np.asarray(measured["loss"])
    lead, info = loss.ndim, jnp.finfo(dtype or loss.dtype)
    numbers = resolve(measured, params)
    rows = label(numbers, lead)
    index, quantities = [place for *_, place in rows], np.array([quantity for _, _, quantity, _ in rows])
    every = flat(numbers, lead)
    values, sizes = every[..., index], flat(_held(measured, numbers), lead)[..., index]
    backward = np.char.startswith(quantities, "log_")
    trunk = {path for path, tap in taps.find(jax.tree.map(lambda a: a[(0,) * lead], measured["state"])) if tap.rescale}
    errors = np.array([quantity == "log_error" and path in trunk for _, path, quantity, _ in rows], bool)

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
    gone = some(errors & zero) & ~some(zero & ~backward) & (info.bits < 64)
    faint = backward & (zero | near) & (small | gone | some(backward & near))[..., None]
    behind = np.logical_or.accumulate(bad, axis=-1) & lost[..., None] & ~backward
    square = quantities == "second_moment"
    outside = square & np.isfinite(sizes) & ~((values > float(info.tiny) / float(info.eps)) & np.isfinite(values))
    marked = (backward & lost[..., None]) | faint | bad | behind | outside
    steady = np.where(backward, sizes > low, np.abs(sizes) < -low / 2) & np.isfinite(sizes)
    every[..., index] = np.where(marked, np.nan, values)
    verdict = Verdict(
        ~np.isfinite(loss) | ~np.all(steady, axis=-1),
        lost,
        lost | some(marked & ~square),
        _first(rows, bad, faint),
        rows,
    )
    return _filled(numbers, every, lead), verdict


def disagreement(first: tuple[dict[str, Any], Numbers], again: tuple[dict[str, Any], Numbers]) -> str | None:
    """Name the last array or tap, in forward order, whose log is not the same in two measurements with other scales.

    The scales are powers of two, so that they drop out exactly unless paths of different scales meet. Left out are logs
    that are not finite, or near the end of the range; and arrays that are small beside others of their layer: they may
    be rounding errors, which differ from run to run on some devices.
    """
    values, others = flat(first[1]), flat(again[1])
    held = np.minimum(*(flat(_held(measured, numbers)) for measured, numbers in (first, again)))
    info = jnp.finfo(np.asarray(first[0]["loss"]).dtype)
    usable = np.isfinite(values) & np.isfinite(others) & (held > np.log(float(info.tiny) / float(info.eps)) + 10)
    differ = usable & (np.abs(np.where(usable, values, 0) - np.where(usable, others, 0)) > 1e-3)
    if not differ.any():
        return None
    logs = [(path, i) for _, path, quantity, i in label(first[1]) if quantity.startswith("log_")]
    largest: dict[str, float] = {}
    for path, i in logs:
        largest[_group(path)] = max(largest.get(_group(path), -np.inf), values[i])
    found = [path for path, i in logs if differ[i] and values[i] > largest[_group(path)] - 9]
    return found[-1] if found else None


def flat(numbers: Numbers, lead: int = 0) -> np.ndarray:
    """Lay all numbers in a row: float64[lead..., n], to be indexed by the positions of `label`."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(numbers[:2])]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], axis=-1)


def label(numbers: Numbers, lead: int = 0) -> list[tuple[int, str, str, int]]:
    """List (layer, path, quantity, position in `flat`) in forward order.

    A layer is a group of arrays side by side (of one dict) that holds a weight: an array of two axes or more behind
    depth, which is not called bias or scale. So kernel and bias are one layer, and an LSTM's two kernels; a norm or a
    gain is none, and belongs to the layer before it. Arrays that stand in a tuple are groups of their own.
    """
    leaves, treedef = jax.tree.flatten(numbers[:2])
    shapes = [np.shape(leaf)[lead:] for leaf in leaves]
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    places = [np.arange(int(np.prod(s))).reshape(s) + start for s, start in zip(shapes, starts, strict=False)]
    params, tapped = treedef.unflatten(places)
    found: list[tuple[str, str, int]] = []
    for rows in zip(*(tree.rows(t) for t in params.values()), strict=True):
        for pattern, (path, place) in zip(params, rows, strict=True):
            found.append((path, pattern.format(path.rpartition("/")[2]), int(place)))
    for full, place in tree.rows(tapped):
        path, _, quantity = full.rpartition("/")
        found.append((path, quantity, int(place)))
    ordered = sorted(((_order(path), path, quantity, place) for path, quantity, place in found), key=lambda row: row[0])
    return [(bisect.bisect(numbers.layers, order), path, quantity, place) for order, path, quantity, place in ordered]


def _layers(params: Any) -> tuple[list[Order], tuple[str, ...]]:
    """List the places of the layers, and the quantities of their weights; see `label`."""
    axes = tree.map_depth(lambda k, a: np.full(a.shape[:k], len(a.shape) - k), params)
    names = [(path, path.rpartition("/")[2], n) for path, n in tree.rows(axes)]
    weights = [(path, name) for path, name, n in names if n >= 2 and name not in ("bias", "scale")]
    return sorted({_order(_group(path)) for path, _ in weights}), tuple({f"log_{name}": None for _, name in weights})


def _group(path: str) -> str:
    parent, _, name = path.rpartition("/")
    return path if name.strip("[]").isdecimal() else parent


def _held(measured: dict[str, Any], like: Numbers) -> Numbers:
    """Give, in the place of every number, the log of what the device held for it.

    For a gradient its norm as the taps rescaled it, for an error signal its norm as it arrived at the tap, for the
    statistics of the forward pass the largest number at the tap.
    """

    def one(path, new, old):
        with np.errstate(divide="ignore"):
            peak = np.log(np.asarray(new.forward["peak"], np.float64))
        return {"log_error": taps.log_error(old.backward)} | dict.fromkeys(new.forward, peak)

    return like._replace(params=dict.fromkeys(like.params, measured["logs"]), taps=_at_taps(one, measured))


def _at_taps(function: Callable[[str, TapState, TapState], Any], measured: dict[str, Any]) -> Any:
    """Map `function(path, state, its cotangent)` over the taps of a net's state; the rest becomes ()."""

    def one(entries, new, old):
        return function(tree.path(entries), new, old) if isinstance(new, TapState) else ()

    is_tap = lambda node: isinstance(node, TapState)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, measured["state"], measured["taps"], is_leaf=is_tap)


def _first(rows: list[tuple[int, str, str, int]], bad: np.ndarray, faint: np.ndarray) -> tuple[int, str] | None:
    forward, backward = (np.nonzero(np.any(mask.reshape(-1, len(rows)), axis=0))[0] for mask in (bad, faint))
    where = forward[:1] if len(forward) else backward[-1:]
    return rows[where[0]][:2] if len(where) else None


def _filled(numbers: Numbers, every: np.ndarray, lead: int) -> Numbers:
    """Undo `flat`."""
    leaves, treedef = jax.tree.flatten(numbers[:2])

    def parts() -> Iterator[np.ndarray]:
        start = 0
        for leaf in leaves:
            size = int(np.prod(np.shape(leaf)[lead:]))
            yield every[..., start : start + size].reshape(np.shape(leaf))
            start += size

    params, tapped = treedef.unflatten(parts())
    return numbers._replace(params=params, taps=tapped)


def _unscale(log: Any, exponent: Any) -> np.ndarray:
    return np.asarray(log, np.float64) + np.log(2) * np.asarray(exponent, np.float64)


def _order(path: str) -> Order:
    """Order paths by their place in the net: numbers count; names, which only branches have beside others, by letter."""
    parts = (part.strip("[]") for part in path.split("/"))
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
