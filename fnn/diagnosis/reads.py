"""Which targets a loss reads, found by giving it others: numbers that are no classes, classes without a gradient, masks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fnn.diagnosis.causes import Evidence

MOST = 6
"""How many different labels are looked at, the commonest first."""
FEW = 2
"""How many numbers may mark what is no class."""
SHARE = 0.3
"""The share of the targets that a loss must leave out to be suspected."""


class Reads(NamedTuple):
    """What a loss makes of integer targets, or of zeros and ones, on one batch."""

    strange: tuple[int, ...] = ()
    """Numbers that are no classes, though the loss counts them."""
    silent: tuple[int, ...] = ()
    """Labels whose examples have no gradient."""
    ignored: tuple[int, ...] = ()
    """Labels that may be any other one without a change of the loss, where it reads a single one."""


def strange(y: np.ndarray) -> list[int]:
    """List the labels that no class has: negative ones, and those far above others that are numbered 0, 1, 2, ...

    More than `FEW` of them are ids with gaps, as of words.
    """
    if not np.issubdtype(y.dtype, np.integer):
        return []
    values = np.unique(y)
    numbered = values[values >= 0]
    classes = int(np.argmin(np.append(numbered == np.arange(len(numbered)), False)))  # 0 to classes - 1 are there
    found = values[(values < 0) | (values > 2 * classes + 8)]
    return [int(v) for v in found] if classes > 1 and len(found) <= FEW else []


def plain(y: np.ndarray) -> np.ndarray:
    """Put the commonest class in the place of labels that are no classes."""
    odd = np.isin(y, strange(y))
    if not odd.any() or odd.all():
        return y
    values, counts = np.unique(y[~odd], return_counts=True)
    return np.where(odd, values[np.argmax(counts)], y).astype(y.dtype)


def reads(
    numbers: Callable[[np.ndarray], np.ndarray], moves: Callable[[np.ndarray], bool], y: Any, every: Any
) -> Reads:
    """Ask a loss about the targets `y` of a batch.

    `numbers(other)` gives its value with other targets, and log10 of the gradients that are not zero. `moves(rows)` says
    whether some examples have a gradient; `every` are all training targets, from which the rows are. Nothing is asked about
    targets that are no labels.
    """
    if not (isinstance(y, np.ndarray) and _labels(every)):
        return Reads()
    odd, now = strange(every), numbers(y)

    def differs(value, by):
        return not _same(numbers(_with(y, value, by)), now)

    common = _commonest(y[~np.isin(y, odd)])
    if len(common) < 2:
        return Reads()
    counted = tuple(v for v in odd if (y == v).any() and _counts(numbers, now, v, y, common[0]))
    if not np.isfinite(now[0]):
        return Reads(counted)
    read = [value for value in common if differs(value, common[int(value == common[0])])]
    left = tuple(int(value) for value in common if value not in read)
    ignored = left if len(read) == 1 and np.isin(y, left).mean() >= SHARE else ()
    column, silent = every.reshape(len(every), -1), ()
    if column.shape[1] == 1:
        rows = {value: np.resize(np.flatnonzero(column[:, 0] == value), len(y)) for value in common}
        silent = tuple(int(value) for value in common if not moves(rows[value]))
    return Reads(counted, silent if len(silent) < len(common) else (), ignored)


def evidence(found: Reads, y: np.ndarray) -> list[Evidence]:
    """Say what is abnormal."""
    said = []
    for value in found.strange[:2]:
        share = float(np.mean(y == value))
        said.append(Evidence("label_encoding", f"{share:.2%} of the labels are {value}, which is no class, and the loss counts them"))  # fmt: skip
    if found.silent:
        which = " and ".join(map(str, found.silent))
        said.append(Evidence("label_encoding", f"examples with label {which} have no gradient: the loss does not read it"))  # fmt: skip
    if found.ignored:
        which, share = ", ".join(map(str, found.ignored)), float(np.mean(np.isin(y, found.ignored)))
        said.append(Evidence("loss", f"the loss is the same whatever stands in the place of the labels {which}, {share:.0%} of all"))  # fmt: skip
    return said


def _counts(numbers: Any, now: np.ndarray, value: int, y: np.ndarray, by: Any) -> bool:
    """Whether a label that is no class takes part: without it a loss is finite, or where it stands alone there is a gradient."""
    if not np.isfinite(now[0]):
        return bool(np.isfinite(numbers(_with(y, value, by))[0]))
    alone = numbers(np.full_like(y, value))
    return bool(np.isfinite(alone[0]) and len(alone) > 1)


def _with(y: np.ndarray, value: Any, by: Any) -> np.ndarray:
    return np.where(y == value, by, y).astype(y.dtype)


def _labels(y: np.ndarray) -> bool:
    return np.issubdtype(y.dtype, np.integer) or (y.size == len(y) and set(np.unique(y)) == {0, 1})


def _commonest(y: np.ndarray) -> list[Any]:
    values, counts = np.unique(y, return_counts=True)
    return [values[i] for i in np.argsort(-counts, kind="stable")[:MOST]]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether numbers are equal but for rounding; where the first is not finite, whether the other's is not either."""
    if not (np.isfinite(a[0]) and np.isfinite(b[0])):
        return not (np.isfinite(a[0]) or np.isfinite(b[0]))
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-5, atol=1e-5)
