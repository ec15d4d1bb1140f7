"""Changes of the data of a case: maps of inputs and targets, and which of them a diagnosis tries."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.change import Change, setting
from fnn.diagnosis.data_symptoms import input_symptoms, outlying
from fnn.diagnosis.reads import plain, strange
from fnn.diagnosis.repeats import distinct, repeat_symptoms


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


def signed(case: Case) -> Case:
    """Map targets of 0 and 1 to -1 and 1."""
    return case.with_y(lambda part, a: (2 * a - 1).astype(a.dtype))


def classes_alone(case: Case) -> Case:
    """Put the commonest class in the place of labels that are no classes."""
    return case.with_y(lambda part, a: plain(a))


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


def of_data(case: Case) -> list[Change]:
    """List what can be tried on the data of a case."""
    found = []
    if repeat_symptoms(case):
        code = "# look at how x is read: many examples got the same inputs; until then leave them out"
        found.append(Change("leave out the examples with equal inputs", ("input_empty",), _data(distinct), code))
    if case.x is not None:
        code = "x = (x - x_train.mean(0)) / x_train.std(0)  # of every batch"
        code = code if case.task.name else "train, test = fnn.data.standardize(train, test)"
        found.append(Change("standardise x", ("input_scale",), _data(standardized), code))
        x = np.asarray(case.x, np.float64).reshape(len(case.x), -1)
        if np.isfinite(x).all() and (far := outlying(x, x)).any():
            name, steps, code = "replace far-out x by medians", (tamed,), _without_codes(x, far)
            if input_symptoms(tamed(case)):  # what they have squashed, when all were standardised together
                name, steps = f"{name}, standardise", (tamed, standardized)
                code += "\ntrain, test = fnn.data.standardize(train, test)"
            found.append(Change(name, ("input_scale",), _data(*steps), code))
        if not all(np.isfinite(np.asarray(part.x)).all() for part in (case.train, case.chooses, case.checks)):
            found.append(
                Change(
                    "leave out examples with NaN",
                    ("numerics", "split_mismatch"),
                    _data(finite),
                    "keep = np.isfinite(x).all(-1); x, y = x[keep], y[keep]",
                )
            )
        if case.held_out:
            found.append(
                Change("scale held-out x like training x", ("split_mismatch",), _data(matched),
                       "# prepare x_test as x_train was; here: x_test = (x_test - x_test.mean(0)) / x_test.std(0) * x_train.std(0) + x_train.mean(0)")
            )  # fmt: skip
    if case.task.kind == "regression":
        code = "y = (y - y_train.mean(0)) / y_train.std(0)"
        found.append(Change("standardise y", ("target_scale",), _data(standard_targets), code))
    if case.task.target == "linear" and (case.y.min() < 0 or case.y.max() > 1):
        found.append(
            Change(
                "targets from 0 to 1",
                ("label_encoding",),
                _data(unit_targets),
                f"y = (y - {case.y.min():g}) / {np.ptp(case.y):g}  # 0 to 1, as the loss reads them; in the score too",
                on_suspicion=True,
            )
        )
    y = np.asarray(case.y)
    signs = y.dtype.kind in "if"  # others hold no -1
    if signs and case.task.kind not in ("regression", "classes") and y.size == len(y) and set(np.unique(y)) == {0, 1}:
        code = "y = 2 * y - 1  # -1 and 1 for 0 and 1: the loss multiplies by the target"
        found.append(Change("targets -1 and 1", ("label_encoding",), _data(signed), code, on_suspicion=True))
    if odd := strange(y):
        which = " and ".join(map(str, odd))
        code = f"# {which} is no class: leave it out of the loss, weights = ~np.isin(y, {odd}), and put a class in its place"
        found.append(
            Change("the commonest class for labels that are none", ("label_encoding",), _data(classes_alone), code, on_suspicion=True)
        )  # fmt: skip
    if case.task.kind in ("classes", "binary"):
        values = np.unique(case.y)
        if not np.array_equal(values, np.arange(len(values))):
            found.append(
                Change(
                    "renumber labels",
                    ("label_encoding",),
                    _data(renumbered),
                    "y = np.searchsorted(np.unique(y_train), y)",
                )
            )
    if case.held_out:
        found.append(
            Change("learn half of the held-out data alone", ("labels", "label_encoding", "split_mismatch"), setting(learn="held out"),
                   "# look at single examples: training labels are wrong, or the two parts were not prepared alike")
        )  # fmt: skip
        found.append(
            Change(
                "learn half of the held-out data as well",
                ("too_little_data",),
                setting(learn="both"),
                "# collect more training examples, or augment them",
            )
        )
    if not case.shuffle:
        found.append(
            Change(
                "shuffle",
                ("order",),
                setting(shuffle=True),
                "fnn.fit(..., key=key)  # shuffles each epoch; or shuffle before batching",
            )
        )
    return found


def _without_codes(x: np.ndarray, far: np.ndarray) -> str:
    """Write what takes the marked numbers out: by one bound, where the nearest of them is farther than all others."""
    away = np.abs(x - np.median(x, axis=0))
    nearest, others = float(away[far].min()), float(away[~far].max())
    if nearest <= others:
        return (
            "# some numbers, far from all others of their feature, are codes or errors: put the feature's median there"
        )
    bound = (nearest * max(others, nearest / 100)) ** 0.5
    return f"median = np.median(x_train, axis=0); x = np.where(np.abs(x - median) > {bound:.3g}, median, x)"


def _data(*steps: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, data=(*plan.data, *steps))
