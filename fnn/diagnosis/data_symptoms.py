"""What can be said of the data before anything is trained: scale, information, labels, split, order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.diagnosis.case import Case
from fnn.diagnosis.causes import Evidence
from fnn.diagnosis.ids import id_symptoms
from fnn.diagnosis.repeats import repeat_symptoms
from fnn.diagnosis.split import MOST, flat, sampled, split_symptoms

FAR = 20
"""Interquartile ranges from the median, beyond which a number does not belong to the others."""
NEIGHBOURS = 5
EMPTY = 0.5
"""The share of constant features from which on they are said to be abnormal."""


def symptoms(case: Case) -> list[Evidence]:
    """List what is abnormal in the data of a case."""
    found = [*repeat_symptoms(case), *input_symptoms(case), *target_symptoms(case), *encoding_symptoms(case)]
    if case.held_out:
        found += [*split_symptoms(case), *label_symptoms(case)]
    return [*found, *order_symptoms(case)]


def input_symptoms(case: Case) -> list[Evidence]:
    """Inputs that are constant, not finite, or of abnormal scale, as a whole or feature by feature."""
    if case.x is None:
        return id_symptoms(case)
    x = flat(case.x)
    if not np.isfinite(x).all():
        return [Evidence("numerics", f"{np.mean(~np.isfinite(x)):.2%} of the inputs are NaN or infinite")]
    std, mean = x.std(0), x.mean(0)
    constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    if constant.all():
        return [Evidence("input_empty", "every input feature is the same for all examples")]
    rms = float(np.sqrt(np.mean(x**2)))
    found = []
    if constant.mean() > EMPTY:
        text = f"{constant.sum()} of {len(constant)} input features are the same for all examples"
        found.append(Evidence("input_empty", text, partial=True))
    if not 0.1 <= rms <= 5:
        found.append(Evidence("input_scale", f"RMS of x = {rms:.3g} (healthy 0.1 to 5)"))
    elif x.shape[1] > 1:
        size = np.sqrt(np.mean(x**2, 0))
        usual = float(np.median(size[size > 0]))
        if size.max() > 20 * usual:
            found.append(
                Evidence(
                    "input_scale",
                    f"RMS of one feature is {size.max() / usual:.3g} times the usual one (healthy up to 20)",
                )
            )
    if (far := outlying(x, x)).any():
        value = x[far][0]
        text = f"{far.mean():.2%} of the inputs lie more than {FAR} times as far out as the middle half, such as {value:.6g}"
        found.append(Evidence("input_scale", f"{text} (healthy: none)"))
    scaled = all(e.cause == "input_empty" for e in found)
    if scaled and (far := float(np.median(np.abs(mean[std > 0]) / std[std > 0]))) > 5:
        found.append(Evidence("input_scale", f"mean of a feature is {far:.3g} times its std (healthy up to 5)"))
    return found


def outlying(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Mark numbers far from the median of their feature in `like`: bool[n, features], as of a code for a missing value.

    Far means `FAR` interquartile ranges, of the feature or of all features' numbers about their medians, which is larger;
    of n examples at least sqrt(n), how far a rare value can lie in a feature that is constant else and was standardised.
    """
    some = sampled(like)
    low, median, high = np.percentile(some, (25, 50, 75), axis=0)
    away = np.abs(some - median)
    usual = float(np.median(away[away > 0])) if away.any() else 0.0
    return np.abs(x - median) > max(FAR, len(like) ** 0.5) * np.maximum(high - low, 2 * usual)


def target_symptoms(case: Case) -> list[Evidence]:
    """Targets of a regression far from mean 0 and variance 1."""
    if case.task.kind != "regression":
        return []
    y = flat(case.y)
    if not np.isfinite(y).all():
        return [Evidence("numerics", f"{np.mean(~np.isfinite(y)):.2%} of the targets are NaN or infinite")]
    std, mean = float(y.std(0).mean()), float(np.abs(y.mean(0)).max())
    if not 0.1 <= std <= 10 or mean > 10 * max(std, 0.1):
        return [
            Evidence("target_scale", f"targets have std {std:.3g} and mean up to {mean:.3g} (healthy: std 0.1 to 10)")
        ]
    return []


def encoding_symptoms(case: Case) -> list[Evidence]:
    """Labels that are not 0..classes-1, or not 0 and 1."""
    y = np.unique(case.y) if case.task.kind in ("classes", "binary") else np.array([])
    if case.task.kind == "binary" and set(y) != {0, 1}:
        return [Evidence("label_encoding", f"the two labels are {y[0]:g} and {y[1]:g}, not 0 and 1")]
    if case.task.kind == "classes" and (
        y.min() < 0 or y.max() >= len(y) + max(2, len(y) // 2) or (y.min() > 0 and len(y) > 1)
    ):
        return [
            Evidence("label_encoding", f"the {len(y)} labels run from {y.min()} to {y.max()}, not 0 to {len(y) - 1}")
        ]
    return []


def agreement(
    x: np.ndarray, y: np.ndarray, others: np.ndarray, of_others: np.ndarray, same: bool
) -> tuple[float, float, float]:
    """Say how far the nearest neighbours of x among `others` have y's targets: (agreement, chance, std by chance).

    For labels the share of neighbours with the same label; for numbers R² of the neighbours' mean, averaged over the columns
    that vary.
    """
    rng = np.random.default_rng(0)
    near = _near(x, others, same)
    labels = np.issubdtype(y.dtype, np.integer)
    varied = np.atleast_1d(y.var(0)) > 1e-12 * np.atleast_1d(np.mean(np.square(y, dtype=np.float64), 0))
    spread = np.atleast_1d(y.var(0))[varied]

    def agree(of_others):
        if labels:
            return float(np.mean(of_others[near] == y[:, None]))
        return (
            float(np.mean(1 - np.mean((of_others[near].mean(1) - y)[:, varied] ** 2, axis=0) / spread))
            if varied.any()
            else 0.0
        )

    by_chance = [agree(of_others[rng.permutation(len(of_others))]) for _ in range(8)]
    return agree(of_others), float(np.mean(by_chance)), float(np.std(by_chance))


def _near(x: np.ndarray, others: np.ndarray, same: bool = False) -> np.ndarray:
    """Find the nearest neighbours of each x among others: int[n, NEIGHBOURS]."""
    mean, std = others.mean(0), others.std(0)
    std = np.where(std > 0, std, 1)
    a, b = (np.nan_to_num((part - mean) / std) for part in (x, others))
    far = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]
    if same:
        np.fill_diagonal(far, np.inf)
    return np.argpartition(far, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]


def within_reach(case: Case) -> float:
    """Give a score that a trained net should reach, since the nearest training examples do: -inf where they cannot be asked.

    It is the share of neighbours with the right label, averaged over the classes, or R² of their mean. A user's score of
    labels is taken for an accuracy.
    """
    parts = _compared(case)
    counts = case.task.kind in ("classes", "multi_label") and case.task.chance > 0
    squares = case.task.target == "square" and not case.task.users  # then the score is R²
    if not parts or (case.task.name and not counts and not squares):  # of another kind
        return -np.inf
    x, y, held, of_held = parts
    if np.issubdtype(y.dtype, np.integer):
        right = (y[_near(held, x)] == of_held[:, None]).mean(1)
        return float(np.mean([right[of_held == label].mean() for label in np.unique(of_held)]))
    return agreement(held, of_held, x, y, False)[0]


def renamed(x: np.ndarray, y: np.ndarray, others: np.ndarray, of_others: np.ndarray) -> float:
    """Give the highest share of neighbours that agree once each of their labels may stand for another one."""
    said, truth = of_others[_near(x, others)].ravel(), np.repeat(y, NEIGHBOURS)
    return float(
        sum(np.unique(truth[said == label], return_counts=True)[1].max() for label in np.unique(said)) / len(said)
    )


def information(case: Case, alike: bool = False) -> dict[str, tuple[float, float, float]]:
    """Give `agreement` within the training data, within the held-out ones, and of the held-out ones with the training data.

    With `alike` the larger part is cut to the size of the other one: among few examples neighbours are far, and agree less.
    Empty where neighbours cannot be found: inputs that are no floats, few examples.
    """
    parts = _compared(case)
    if parts and alike:
        n = min(len(parts[0]), len(parts[2]))
        parts = tuple(a[:n] for a in parts)  # they are in an order drawn by chance
    if not parts:
        return {}
    x, y, held, of_held = parts
    return {
        "train": agreement(x, y, x, y, True),
        "held out": agreement(held, of_held, held, of_held, True),
        "across": agreement(held, of_held, x, y, False),
    }


def _compared(case: Case) -> tuple[np.ndarray, ...]:
    """Take some training and held-out inputs and targets; nothing where neighbours cannot be found."""
    if case.task.kind == "exact" or not case.held_out or not _floats(case.train.x):
        return ()
    rng = np.random.default_rng(0)
    x, y = _flat(case.train.x), _targets(case, case.y)
    held = np.concatenate([_flat(case.chooses.x), _flat(case.checks.x)])
    of_held = _targets(case, np.concatenate([case.chooses.y, case.checks.y]))
    some, some_held = (rng.permutation(n)[:MOST] for n in (len(x), len(held)))
    x, y, held, of_held = x[some], y[some], held[some_held], of_held[some_held]
    if min(len(x), len(held)) < 4 * NEIGHBOURS or not (np.isfinite(x).all() and np.isfinite(held).all()):
        return ()
    return x, y, held, of_held


def _floats(x: Any) -> list[np.ndarray]:
    """List the floating arrays of inputs, which may be a tree: others are masks, numbers of tokens, or random keys."""
    return [a for a in jax.tree.leaves(x) if isinstance(a, np.ndarray) and jnp.issubdtype(a.dtype, jnp.floating)]


def _flat(x: Any) -> np.ndarray:
    """Write each example as one row of its floats."""
    return np.concatenate([flat(a) for a in _floats(x)], axis=1)


def _targets(case: Case, y: np.ndarray) -> np.ndarray:
    if case.task.kind == "one_hot":
        return y.argmax(-1).astype(np.int64)
    if case.task.kind == "multi_label":  # each pattern of labels is a class
        y = y.reshape(len(y), -1)[:, :30]
        return (y > 0.5) @ (1 << np.arange(y.shape[1]))
    if case.task.kind in ("classes", "binary"):
        return np.round(y.reshape(len(y), -1)[:, 0]).astype(np.int64)
    return y.reshape(len(y), -1)[:, :30].astype(np.float64)


def label_symptoms(case: Case) -> list[Evidence]:
    """Training labels about which their neighbours say little, where held-out ones have neighbours that agree."""
    found = information(case, alike=True)
    if not found:
        return []
    (train, chance, _), (held, level, noise), (across, _, _) = found["train"], found["held out"], found["across"]
    power = held - level
    if power < max(4 * noise, 0.1):
        return []
    if train - chance < 0.35 * power:
        text = f"{NEIGHBOURS} nearest neighbours agree on {train:.2f} of the training labels and {held:.2f} of as many held-out ones"
        return [Evidence("labels", f"{text} (chance {chance:.2f})")]
    if across - chance < 0.5 * min(power, train - chance) and not split_symptoms(case):
        text = f"training neighbours agree on {across:.2f} of the held-out labels, held-out ones on {held:.2f}"
        x, y, others, of_others = _compared(case)
        if np.issubdtype(y.dtype, np.integer) and renamed(others, of_others, x, y) < 0.75 * held:
            return [Evidence("split_mismatch", f"{text}, whatever the classes are called: the inputs differ")]
        return [Evidence("label_encoding", f"{text}: the two parts do not name their classes alike")]
    return []


def order_symptoms(case: Case) -> list[Evidence]:
    """Batches, in the order in which they come, that hold far less of the targets' variety than drawn ones."""
    if case.shuffle or case.task.kind == "exact":
        return []
    y, size = _targets(case, case.y), case.batch_size
    n = len(y) // size
    if n < 2:
        return []

    def variety(y):
        batches = y[: n * size].reshape(n, size, *y.shape[1:])
        if np.issubdtype(y.dtype, np.integer):
            return float(np.mean([_entropy(batch) for batch in batches]))
        return float(np.mean(batches.var(1) / np.maximum(y.var(0), 1e-30)))

    rng = np.random.default_rng(0)
    drawn = [variety(rng.permutation(y)) for _ in range(8)]
    if (own := variety(y)) < 0.8 * np.mean(drawn) - 4 * np.std(drawn):
        what = "entropy of the labels" if np.issubdtype(y.dtype, np.integer) else "share of the targets' variance"
        return [Evidence("order", f"{what} in a batch is {own:.3g} on average, {np.mean(drawn):.3g} in shuffled ones")]
    return []


def _entropy(labels: np.ndarray) -> float:
    p = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(p * np.log(p)).sum())


def learnable(case: Case) -> str:
    """Say in one sentence whether neighbours know the answer; empty where they have no power."""
    found = information(case)
    if not found:
        return ""
    share, chance, noise = found["held out"]
    if share - chance < max(4 * noise, 0.05):
        return ""
    what = "labels" if case.task.kind != "regression" else "the variance of the targets"
    return f"Data are learnable: {NEIGHBOURS} nearest neighbours agree on {share:.2f} of {what} (chance {max(chance, 0):.2f})."
