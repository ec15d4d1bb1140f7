"""Examples that share one input, though their targets differ: rows that a join, a reader or a crop has left empty."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np

from fnn.diagnosis.case import Case
from fnn.diagnosis.causes import Evidence

LEAST = 0.25
"""The share of all examples that must have the same input."""
SAME = 0.8
"""How varied their targets must be, against those of all examples."""


def repeat_symptoms(case: Case) -> list[Evidence]:
    """Many training examples with equal inputs, whose targets are about as varied as those of all. Not if all are equal."""
    rows, y = _rows(case.train.x), case.y
    usual = _usual(rows)
    share = float(np.mean(rows == usual))
    if not LEAST <= share < 1 or not _variety(y[rows == usual]) >= SAME * _variety(y) > 0:
        return []
    what = "all 0" if not any(usual) else "the same numbers"
    text = f"{share:.0%} of the examples have the same inputs, {what}, and targets as different as those of all"
    return [Evidence("input_empty", text, partial=True)]


def distinct(case: Case) -> Case:
    """Leave out the examples with the commonest input, and put others of the same part in their place."""
    usual = _usual(_rows(case.train.x))

    def clean(part):
        rows = np.flatnonzero(_rows(part.x) != usual)
        return part.take(rows[np.arange(part.size) % len(rows)] if len(rows) else np.arange(part.size))

    return replace(case, **{name: clean(getattr(case, name)) for name in ("train", "chooses", "checks")})


def _rows(x: object) -> np.ndarray:
    """Write each example's inputs as bytes: object[n]."""
    leaves = [np.ascontiguousarray(a) for a in jax.tree.leaves(x)]
    found = np.empty(len(leaves[0]), object)
    found[:] = [b"".join(a[i].tobytes() for a in leaves) for i in range(len(found))]
    return found


def _usual(rows: np.ndarray) -> bytes:
    return Counter(rows.tolist()).most_common(1)[0][0]


def _variety(y: np.ndarray) -> float:
    """Entropy of labels, variance of numbers: one column after the other, added up."""
    y = y.reshape(len(y), -1)
    if np.issubdtype(y.dtype, np.floating) and len(np.unique(y)) > 2:
        return float(y.var(0).sum())
    shares = (np.unique(column, return_counts=True)[1] / len(y) for column in y.T)
    return float(sum(-(p * np.log(p)).sum() for p in shares))
