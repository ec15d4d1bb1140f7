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
    same = np.array([row == usual for row in rows])
    if not LEAST <= same.mean() < 1 or not _variety(y[same]) >= SAME * _variety(y) > 0:
        return []
    what = "all 0" if not any(usual) else "the same numbers"
    text = f"{same.mean():.0%} of the examples have the same inputs, {what}, and targets as different as those of all"
    return [Evidence("input_empty", text, partial=True)]


def distinct(case: Case) -> Case:
    """Leave out the examples with the commonest input, and put others of the same part in their place."""
    usual = _usual(_rows(case.train.x))

    def clean(part):
        rows = [i for i, row in enumerate(_rows(part.x)) if row != usual] or range(part.size)
        return part.take(np.resize(rows, part.size))

    return replace(case, **{name: clean(getattr(case, name)) for name in ("train", "chooses", "checks")})


def different(x: object) -> int:
    """Count the inputs that differ: copies teach nothing more."""
    return len(set(_rows(x)))


def _rows(x: object) -> list[bytes]:
    """Write each example's inputs as bytes."""
    leaves = [np.ascontiguousarray(a) + np.zeros((), a.dtype) for a in jax.tree.leaves(x)]  # -0.0 becomes 0.0
    return [b"".join(a[i].tobytes() for a in leaves) for i in range(len(leaves[0]))]


def _usual(rows: list[bytes]) -> bytes:
    return Counter(rows).most_common(1)[0][0]


def _variety(y: np.ndarray) -> float:
    """Entropy of labels, variance of numbers: one column after the other, added up."""
    y = y.reshape(len(y), -1)
    if np.issubdtype(y.dtype, np.floating) and len(np.unique(y)) > 2:
        return float(y.var(0).sum())
    shares = (np.unique(column, return_counts=True)[1] / len(y) for column in y.T)
    return float(sum(-(p * np.log(p)).sum() for p in shares))
