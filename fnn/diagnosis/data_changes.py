"""Changes of the data of a case: maps of inputs and targets that a diagnosis tries."""

from dataclasses import replace

import numpy as np

from fnn.diagnosis.case import Case
from fnn.diagnosis.data_symptoms import outlying


def standardized(case: Case) -> Case:
    """Centre each input feature and divide it by its std, by the moments of the training part."""
    x = np.asarray(case.train.x, np.float64)
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-6 * max(float(std.max()), 1e-30), std, 1.0 if std.max() == 0 else float(std.max()))
    return case.with_x(lambda part, a: ((np.asarray(a, np.float64) - mean) / std).astype(a.dtype))


def matched(case: Case) -> Case:
    """Give the held-out features the mean and std that they have in the training part."""
    x = np.asarray(case.train.x, np.float64)
    held = np.concatenate([case.chooses.x, case.checks.x]).astype(np.float64)
    std, of_held = x.std(0), held.std(0)
    scale = np.where(of_held > 1e-6 * max(float(of_held.max()), 1e-30), std / np.maximum(of_held, 1e-30), 1.0)

    def move(part, a):
        if part == "train":
            return a
        return ((np.asarray(a, np.float64) - held.mean(0)) * scale + x.mean(0)).astype(a.dtype)

    return case.with_x(move)


def standard_targets(case: Case) -> Case:
    """Centre the targets and divide them by their std."""
    y = np.asarray(case.train.y, np.float64)
    mean, std = y.mean(0), np.maximum(y.std(0), 1e-30)
    return case.with_y(lambda part, a: ((np.asarray(a, np.float64) - mean) / std).astype(a.dtype))


def unit_targets(case: Case) -> Case:
    """Map the targets to 0..1."""
    y = np.asarray(case.train.y, np.float64)
    low, span = y.min(), max(float(np.ptp(y)), 1e-30)
    return case.with_y(lambda part, a: ((np.asarray(a, np.float64) - low) / span).astype(a.dtype))


def renumbered(case: Case) -> Case:
    """Number the labels 0, 1, 2, ... in their order."""
    values = np.unique(np.concatenate([np.ravel(part.y) for part in (case.train, case.chooses, case.checks)]))
    mapped = case.with_y(lambda part, a: np.searchsorted(values, a).astype(a.dtype))
    task = replace(case.task, positive=1.0, classes=max(2, min(case.task.classes, len(values))))
    return replace(mapped, task=task)


def finite(case: Case) -> Case:
    """Leave out examples whose inputs or targets are not finite, and put others of the same part in their place."""

    def clean(part):
        x, y = (np.asarray(a, np.float64).reshape(part.size, -1) for a in part)
        rows = np.flatnonzero(np.isfinite(x).all(1) & np.isfinite(y).all(1))
        return part.take(rows[np.arange(part.size) % len(rows)] if len(rows) else np.arange(part.size))

    parts = {name: clean(getattr(case, name)) for name in ("train", "chooses", "checks")}
    return replace(case, **parts).with_x(lambda part, a: np.nan_to_num(a, posinf=0, neginf=0))


def tamed(case: Case) -> Case:
    """Put the training median of its feature in place of each number that lies far from all others."""
    x = np.asarray(case.train.x, np.float64)
    like, median = x.reshape(len(x), -1), np.median(x, axis=0)

    def replaced(part, a):
        far = outlying(np.asarray(a, np.float64).reshape(len(a), -1), like).reshape(a.shape)
        return np.where(far, median, a).astype(a.dtype)

    return case.with_x(replaced)
