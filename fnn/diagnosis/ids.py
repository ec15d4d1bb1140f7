"""Whether ids, inputs that are whole numbers, hold anything that tells examples apart."""

import jax
import numpy as np

from fnn.diagnosis.case import Case
from fnn.diagnosis.causes import Evidence
from fnn.diagnosis.split import sampled

EACH = 5
"""So many examples of each form of the inputs must there be on average, to see whether the form says anything."""
DRAWS = 100
"""Permutations of the targets."""


def id_symptoms(case: Case) -> list[Evidence]:
    """Inputs that are all equal, or that differ in nothing but how often one id occurs, which says nothing of the targets.

    The latter is what is left where every word is unknown: texts differ by their padding alone. Silent where targets depend
    on it, in the training data or in the held-out ones, and with fewer than `EACH` examples of each number.
    """
    x = _rows(case.train.x)
    if x is None:
        return []
    if (x == x[:1]).all():
        return [Evidence("input_empty", "all inputs are equal")]
    parts = [(x, np.asarray(case.train.y))]
    if case.held_out:
        held = [(_rows(part.x), part.y) for part in (case.chooses, case.checks)]
        rows, y = (np.concatenate([np.asarray(a) for a in both]) for both in zip(*held, strict=True))
        parts.append((rows, y))
    symbol = _counted(x)
    if symbol is None or case.task.kind == "exact":
        return []
    for i, (rows, y) in enumerate(parts):
        if i and _counted(rows) != symbol:  # held-out inputs hold more, or are too few
            continue
        if _depend((rows == symbol).sum(1), _columns(case, y)):
            return []
    counts = np.unique((x == symbol).sum(1))
    text = f"inputs differ in nothing but how often {symbol} occurs, {counts[0]} to {counts[-1]} times in {x.shape[1]}"
    return [Evidence("input_empty", f"{text}, and that says nothing of the targets")]


def _rows(x: object) -> np.ndarray | None:
    """Write all that an example holds in one row: int[n, numbers]; None if some of it is no whole number."""
    leaves = [np.asarray(a) for a in jax.tree.leaves(x)]
    if not leaves or any(a.dtype.kind not in "iub" for a in leaves):
        return None
    return np.concatenate([a.reshape(len(a), -1).astype(np.int64) for a in leaves], axis=1)


def _counted(x: np.ndarray) -> int | None:
    """Find an id whose number of occurrences determines the whole row; None if there is none, or too few rows to judge."""
    forms = x
    for rows in (sampled(x), x):  # most inputs are told apart by some of them
        forms = np.unique(rows, axis=0)
        if len(forms) > min(x.shape[1] + 1, len(rows) / EACH):
            return None
    symbols, often = np.unique(x, return_counts=True)
    for symbol in symbols[np.argsort(often)]:
        if len(np.unique((forms == symbol).sum(1))) == len(forms):
            return int(symbol)
    return None


def _columns(case: Case, y: np.ndarray) -> np.ndarray:
    """Write targets as columns of mean 0 and variance 1, a class as a column of its own; columns that never differ are left out."""
    if case.task.kind in ("classes", "binary"):
        y = np.unique(y, return_inverse=True)[1].reshape(len(y))
        y = np.eye(y.max() + 1)[y]
    y = np.asarray(y, np.float64).reshape(len(y), -1)
    y = y[:, np.ptp(y, axis=0) > 0]
    return (y - y.mean(0)) / y.std(0)


def _depend(groups: np.ndarray, y: np.ndarray) -> bool:
    """Whether the groups' means of y differ by more than those of permuted y; True where y says nothing itself."""
    if not y.size or not np.isfinite(y).all():
        return True
    member = groups[None] == np.unique(groups)[:, None]
    member = member / np.sqrt(member.sum(1, keepdims=True))
    rng = np.random.default_rng(0)
    chance = [np.sum((member @ rng.permutation(y)) ** 2) for _ in range(DRAWS)]
    return bool(np.sum((member @ y) ** 2) > np.mean(chance) + 3 * np.std(chance))
