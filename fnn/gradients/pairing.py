"""Pair the layers of two sides, and compare two arrays whatever the order of their axes."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fnn.gradients.sides import Block, LayerOf


class Distance(NamedTuple):
    """How far two arrays are apart."""

    value: float
    """|a - b| / max(|a|, |b|), in the layout in which they agree best."""
    sorted: float
    """The same of their sorted entries, which no order of axes or units can change."""


def distance(a: Block, b: Block, near: float) -> Distance:
    """Compare two arrays in the layouts that are possible; stops at one in which they are within `near`."""
    x, y = (as_float64(block.array) for block in (a, b))
    best = math.inf
    if x.size == y.size:
        if x.shape == y.shape and a.units == b.units:
            best = relative(x, y)
        for p, q in _layouts(a, b) if best > near else ():
            best = min(best, relative(p, q))
            if best <= near:
                break
    # arrays of different sizes have no entries in common: what is left are their root mean squares
    alike = relative(np.sort(x, axis=None), np.sort(y, axis=None)) if x.size == y.size else _scale(x, y)
    return Distance(min(best, alike) if math.isinf(best) else best, alike)


def relative(x: np.ndarray, y: np.ndarray) -> float:
    """|x - y| / max(|x|, |y|), Frobenius; 0 where both are 0, infinity where one alone is not finite in some place."""
    x, y = x.ravel(), y.ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        difference = np.where(same, 0, x - y)
        scale = max(_norm(np.where(same & ~np.isfinite(x), 0, a)) for a in (x, y))
        if not np.all(np.isfinite(difference)):
            return math.inf
        return 0.0 if same.all() else _norm(difference) / scale


def _norm(x: np.ndarray) -> float:
    x = x.ravel()
    peak = float(np.max(np.abs(x), initial=0))
    return peak * float(np.linalg.norm(x / peak)) if 0 < peak < math.inf else peak


def _scale(x: np.ndarray, y: np.ndarray) -> float:
    sizes = [_norm(a.ravel()) / math.sqrt(max(1, a.size)) for a in (x, y)]
    return abs(sizes[0] - sizes[1]) / max(*sizes, 1e-300)


def as_float64(array: Any) -> np.ndarray:
    """Take an array to the host in float64."""
    return np.asarray(array, np.float64)


def _layouts(a: Block, b: Block) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Write both arrays as lists in all pairs of layouts that may fit: positions in any order, then units."""
    for one, other, swapped in ((a, b, False), (b, a, True)):
        if one.units is None or other.units is None:
            one, other = Block(one.array, ()), Block(other.array, ())
        assert one.units is not None and other.units is not None
        if _units(one) != _units(other):
            return
        fixed = _written(one, sorted(set(range(one.array.ndim)) - set(one.units)))
        free = [axis for axis in range(other.array.ndim) if axis not in other.units]
        wide = [axis for axis in free if other.array.shape[axis] > 1]
        if len(wide) > 5:
            return
        for order in itertools.permutations(wide):
            moved = _written(other, [*(axis for axis in free if axis not in wide), *order])
            yield (moved, fixed) if swapped else (fixed, moved)


def _units(block: Block) -> int:
    return math.prod(block.array.shape[axis] for axis in block.units or ())


def _written(block: Block, positions: Sequence[int]) -> np.ndarray:
    return as_float64(block.array.transpose(*positions, *(block.units or ())).reshape(-1))


def role(layer: LayerOf) -> tuple[object, ...]:
    """Give what two layers of a pair have in common; a convolution may be written as a product of patches."""
    kind, *sizes = layer.form
    return layer.form if kind == "custom" else (kind, sizes[0] * sizes[1], sizes[2])


def paired(
    a: Sequence[LayerOf], b: Sequence[LayerOf], chosen: dict[int, int], near: float
) -> list[tuple[list[int], list[int]]]:
    """Pair layers by the order of equal forms, as many as possible; parallel layers (of one input) whose weights are each other's are swapped.

    `chosen` are the pairs that are given.
    """
    left = [i for i in range(len(a)) if i not in chosen]
    right = [j for j in range(len(b)) if j not in chosen.values()]
    sizes = [{i: _norm(as_float64(side[i].weight.array)) for i in part} for side, part in ((a, left), (b, right))]
    scores = np.zeros((len(left), len(right)))
    for (m, i), (n, j) in itertools.product(enumerate(left), enumerate(right)):
        if role(a[i]) == role(b[j]):
            # equal weights decide only which of several pairings with as many pairs is taken
            scores[m, n] = 1 + math.isclose(sizes[0][i], sizes[1][j], rel_tol=1e-4) / (1 + len(left) + len(right))
    found = chosen | {left[i]: right[j] for i, j in _aligned(scores)}

    def near_by(one, other):
        return one is not None and other is not None and distance(one, other, near).value <= near

    odd = [i for i in found if i not in chosen and not near_by(a[i].weight, b[found[i]].weight)]
    partner = {found[i]: i for i in odd}
    wanted = {}
    for i, j in itertools.product(odd, partner):
        # parallel on both sides: layers that follow each other were swapped by someone, not by the order of tracing
        parallel = near_by(a[i].input, a[partner[j]].input) and near_by(b[j].input, b[found[i]].input)
        if a[i].form == b[j].form and parallel and near_by(a[i].weight, b[j].weight):
            wanted.setdefault(i, j)
    while wanted and set(wanted.values()) != {found[i] for i in wanted}:
        taken = set(wanted.values())
        wanted = {i: j for i, j in wanted.items() if found[i] in taken and j in {found[k] for k in wanted}}
    pairs = [([i], [j]) for i, j in (found | wanted).items()]
    left = [i for i in left if i not in found]
    right = [j for j in right if j not in found.values()]
    for i, group in _fused(a, left, b, right, near_by):
        pairs.append(([i], group))
        right = [j for j in right if j not in group]
    for j, group in _fused(b, right, a, left, near_by):
        pairs.append((group, [j]))
    return sorted(pairs)


def _fused(
    wide: Sequence[LayerOf], one: Sequence[int], narrow: Sequence[LayerOf], several: Sequence[int], near_by: Any
) -> Iterator[tuple[int, list[int]]]:
    """Find layers that are written as several with one input on the other side: queries, keys and values, gates of an LSTM."""
    several = list(several)
    for i in one:
        kind, *sizes = wide[i].form
        fits = [j for j in several if kind != "custom" and narrow[j].form[:-1] == (kind, *sizes[:-1])]
        for start in range(len(fits)):
            first = narrow[fits[start]]
            group = [j for j in fits[start:] if first.input is not None and near_by(first.input, narrow[j].input)]
            ends = list(itertools.accumulate(narrow[j].form[-1] for j in group))
            if sizes[-1] in ends[1:] and all(narrow[j].output.units is not None for j in group):
                group = group[: ends.index(sizes[-1]) + 1]
                several = [j for j in several if j not in group]
                # the order in which they stand side by side is the one in which the weights agree best
                yield i, _ordered(wide[i], narrow, group)
                break


def _ordered(layer: LayerOf, narrow: Sequence[LayerOf], group: list[int]) -> list[int]:
    orders = itertools.permutations(group) if len(group) < 6 else [tuple(group)]

    def apart(order):
        return distance(layer.weight, beside([narrow[j] for j in order]).weight, 0).value

    return list(min(orders, key=apart))


def beside(group: Sequence[LayerOf]) -> LayerOf:
    """Make one layer of several with the same input."""
    first = group[0]
    if len(group) == 1:
        return first

    def matrices(name):
        arrays = [getattr(layer, name).array.reshape(layer.form[1:]) for layer in group]
        return Block(np.concatenate(arrays, -1), tuple(range(arrays[0].ndim)))

    outputs = []
    for block in (layer.output for layer in group):
        free = [axis for axis in range(block.array.ndim) if axis not in (block.units or ())]
        moved = block.array.transpose(*free, *(block.units or ()))
        outputs.append(moved.reshape(*moved.shape[: len(free)], -1))
    return replace(
        first,
        path=" + ".join(layer.path for layer in group),
        form=(*first.form[:-1], sum(layer.form[-1] for layer in group)),
        weight=matrices("weight"),
        gradient=matrices("gradient"),
        output=Block(np.concatenate(outputs, -1), (outputs[0].ndim - 1,)),
    )


def _aligned(scores: np.ndarray) -> list[tuple[int, int]]:
    """Pair the entries of two lists in order, so that the sum of the pairs' scores is as large as possible; 0 is no pair."""
    rows, columns = scores.shape
    best = np.zeros((rows + 1, columns + 1))
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            both = best[i + 1, j + 1] + scores[i, j] if scores[i, j] else 0
            best[i, j] = max(both, best[i + 1, j], best[i, j + 1])
    i, j, found = 0, 0, []
    while i < rows and j < columns:
        if scores[i, j] and best[i, j] == best[i + 1, j + 1] + scores[i, j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i, j] == best[i + 1, j]:
            i += 1
        else:
            j += 1
    return found
