"""What the targets ask for, and the held-out score that goes with it: balanced accuracy, accuracy, R², or minus the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, losses


@dataclass(frozen=True)
class Task:
    """A kind of task, and how it is scored."""

    kind: str
    """classes (integer labels), one_hot, binary (one unit), multi_label (a 0 or 1 for each unit), regression, exact
    (the loss, or the user's score, knows what is right)."""
    classes: int = 0
    threshold: float = 0.0
    """Of binary tasks: the output above which the answer is the larger label."""
    positive: float = 1.0
    """Of binary tasks: the larger label."""
    correct: Callable[[Any, Any], Any] | None = None
    own: Callable[[Any, Any], Any] | None = None
    """(outputs, y) -> the user's score, where `diagnose` was given one."""
    chance: float = 0.0
    name: str = ""
    target: str = ""
    """How a loss that is known as a whole alone depends on its targets, see `in_targets`; "" where a user gives the score."""

    @property
    def score(self) -> str:
        """Name the score."""
        usual = {"regression": "R²", "exact": "accuracy"}.get(self.kind, "balanced accuracy")
        return "score" if self.users else self.name or usual

    @property
    def users(self) -> bool:
        """Whether the user gave the score."""
        return self.own is not None or self.name == "score"

    @property
    def loss(self) -> Callable[[Any, Any], Any] | None:
        """The usual loss for this task, on outputs without a head."""
        return {
            "classes": losses.cross_entropy,
            "one_hot": one_hot_cross_entropy,
            "binary": losses.binary_cross_entropy if self.positive == 1 else None,
            "regression": losses.mse,
        }.get(self.kind)

    def __call__(self, outputs: Any, y: Any) -> jax.Array:
        """Score outputs against targets: one number. Outputs that are not finite are wrong; R² ends at -1."""
        outputs = jnp.asarray(outputs)
        good = jnp.all(jnp.isfinite(outputs.reshape(outputs.shape[0], -1)), axis=1)
        if self.own is not None:
            try:
                score = jnp.asarray(self.own(outputs, y))
            except jax.errors.TracerArrayConversionError:
                raise TypeError(
                    "diagnose: score must be computed by jax.numpy, got one that takes NumPy arrays"
                ) from None
            if score.shape not in ((), (len(y),)):
                raise ValueError(
                    "diagnose: score must return one number, or one for each example, higher for better outputs, got "
                    f"{check.describe(score)}"
                )
            score = jnp.mean(score.astype(jnp.float32))
            return jnp.where(jnp.all(good) & jnp.isfinite(score), score, 0.0)  # as in diagnose_loss
        if self.correct is not None:
            return jnp.mean(jnp.where(good, self.correct(outputs, y), 0))
        if self.kind == "regression":
            outputs, y = outputs.reshape(len(outputs), -1).astype(jnp.float32), y.reshape(len(y), -1)
            middle = jnp.mean(y, axis=0)
            # Divided by the size of each target first: squares may leave float32.
            size = jnp.max(jnp.abs(y - middle), axis=0)
            varies = size > 4 * jnp.finfo(jnp.float32).eps * jnp.max(jnp.abs(y), axis=0)  # else it says nothing
            size = jnp.where(varies, size, 1)
            left, whole = (jnp.mean(jnp.square((a - y) / size), axis=0) for a in (outputs, middle))
            r2 = jnp.sum(jnp.where(varies, 1 - left / jnp.where(varies, whole, 1), 0)) / jnp.maximum(1, varies.sum())
            return jnp.where(jnp.isfinite(r2), jnp.clip(r2, -1, 1), -1.0)
        if self.kind == "binary":
            answer = (outputs.reshape(len(outputs)) > self.threshold).astype(jnp.int32)
            truth, classes = (y.reshape(len(y)) >= self.positive).astype(jnp.int32), 2
        else:
            answer, classes = jnp.argmax(outputs, axis=-1), self.classes
            truth = jnp.argmax(y, axis=-1) if self.kind == "one_hot" else y.reshape(len(y))
        member = jax.nn.one_hot(truth, classes)
        hits = jnp.where(good & (answer == truth), 1.0, 0.0) @ member
        there = jnp.sum(member, axis=0)
        return jnp.sum(hits / jnp.maximum(there, 1)) / jnp.maximum(1, jnp.sum(there > 0))


LARGE = 10_000
"""Numbers in the outputs of one example beyond which no loss is asked about them."""


def in_targets(loss: Callable[[np.ndarray], float], y: np.ndarray) -> str:
    """Say how a loss depends on targets of floats: "linear", as an entropy does, "square", as the mean of (z - y)² does, or "".

    By differences along two random directions.
    """
    if not np.issubdtype(y.dtype, np.floating) or not np.ptp(y) > 0:
        return ""
    found = []
    for seed in (0, 1):
        d = np.random.default_rng(seed).normal(size=y.shape) * y.std()
        back, here, ahead, far = (loss((y + t * d).astype(y.dtype)) for t in (-1, 0, 1, 2))
        second, third = ahead - 2 * here + back, far - 3 * ahead + 3 * here - back
        least = 1e-5 * max(map(abs, (back, here, ahead, far)))
        if not np.isfinite(second) or not np.isfinite(third) or abs(third) > max(0.02 * abs(second), least):
            return ""
        found.append((second / np.mean(d**2), abs(second) <= max(1e-3 * abs(ahead - back), least)))
    (a, straight), (b, also) = found
    return "linear" if straight and also else "square" if a > 0 and abs(a - b) < 0.05 * a else ""


def one_hot_cross_entropy(outputs: Any, y: Any) -> jax.Array:
    """Evaluate -sum over classes of y log softmax(outputs), per example."""
    return -jnp.sum(y * jax.nn.log_softmax(outputs), axis=-1)


def task_of(loss: Callable[[Any, Any], Any], y: np.ndarray, shape: tuple[int, ...], score: Any = None) -> Task:
    """Find out what the targets ask for; `shape` is that of the outputs, batch axis first, `score` the user's."""
    if score is not None:
        if not callable(score):
            raise TypeError(f"diagnose: score must be a function (outputs, y), got {type(score).__name__}")
        return Task("exact", own=score)
    units = int(np.prod(shape[1:], dtype=int))
    column = y.size == len(y)
    values = np.unique(y) if column or y.ndim == 2 else np.array([])
    if np.issubdtype(y.dtype, np.integer) and column and units > 1 and len(shape) == 2:
        return Task("classes", max(units, int(values.max()) + 1), chance=1 / max(2, len(values)))
    if column and units == 1 and len(values) == 2:
        low, high = map(float, values)
        return Task("binary", 2, _crossing(loss, shape, y, low, high), positive=high, chance=0.5)
    if y.ndim == 2 and y.shape[1] == units > 1 and set(values) <= {0, 1} and (y.sum(1) == 1).all():
        return Task("one_hot", units, chance=1 / units)
    if (
        y.ndim == 2
        and y.shape[1] == units > 1
        and len(shape) == 2
        and set(values) == {0, 1}
        and not losses.correct(loss)
    ):
        return Task("multi_label", units, correct=_hits(_crossing(loss, shape, y, 0.0, 1.0), y), chance=0.5)
    if (np.issubdtype(y.dtype, np.floating) and y.shape[1:] == shape[1:]) or (column and units == 1):
        if len(pairs := least_at(loss, y, shape)) > 2 and _bent(pairs):
            (c, o), (far, there) = pairs[1], pairs[-1]
            raise ValueError(
                f"diagnose: R² compares outputs with targets, but this loss is least at outputs of {o:.3g} for targets of "
                f"{c:.3g}, and of {there:.3g} for {far:.3g}; pass score=, a function (outputs, y) that is higher for better outputs"
            )
        return Task("regression")
    if (correct := losses.correct(loss)) is not None:
        return Task("exact", correct=correct)
    raise ValueError(
        f"diagnose: targets must be labels, one-hot rows or numbers shaped as the outputs, got {y.dtype}{list(y.shape)} "
        f"for outputs {list(shape)}; or a loss of fnn that counts what is right"
    )


def least_at(loss: Callable[[Any, Any], Any], y: np.ndarray, shape: tuple[int, ...]) -> list[tuple[float, float]]:
    """Pair targets with the output at which the loss of each is least; () if an output equal to the target is as good."""
    y = np.asarray(y)
    middle, spread = float(np.median(y)), float(np.std(y))
    if not np.isfinite(spread) or spread == 0 or np.prod(shape[1:], dtype=int) > LARGE:
        return []

    def alone(output, target):  # a loss may compare examples with each other
        return jnp.mean(loss(output[None], target[None]))

    steps = np.concatenate([[0.0], np.geomspace(1e-2, 30, 160)])
    steps = np.concatenate([-steps[:0:-1], steps]).astype(np.float64)
    found, off = [], False
    for c in np.unique(np.quantile(y, (0.1, 0.3, 0.5, 0.7, 0.9), method="nearest")):
        tried = np.unique(np.concatenate([c + spread * steps, middle + spread * steps, steps, [c]])).astype(np.float32)
        z = jnp.broadcast_to(jnp.asarray(tried).reshape(-1, *[1] * (len(shape) - 1)), (len(tried), *shape[1:]))
        with np.errstate(all="ignore"):
            costs = np.asarray(jax.vmap(alone)(z, jnp.full((len(tried), *y.shape[1:]), c, y.dtype)), np.float64)
        own = float(costs[np.argmin(np.abs(tried - c))])
        near = np.abs(tried - c) <= spread
        if not np.isfinite(own) or not np.isfinite(costs[near]).all():
            return []
        costs = np.where(np.isfinite(costs), costs, np.inf)
        around = costs[(np.abs(tried - c) <= 3 * spread) & np.isfinite(costs)]
        off |= own - costs.min() > max(0.02 * np.ptp(costs[near]), 1e-6 * np.abs(around).max())  # not by rounding
        found.append((float(c), float(tried[np.argmin(costs)])))
    return found if off else []


def _bent(pairs: list[tuple[float, float]]) -> bool:
    """Whether the best outputs rise with the targets, but not along a line: outputs are another function of what is asked."""
    targets, outputs = np.array(pairs).T
    slopes = np.diff(outputs) / np.diff(targets)
    return bool((slopes > 0).all() and slopes.max() > 1.2 * slopes.min())


def _hits(threshold: float, y: np.ndarray) -> Callable[[Any, Any], Any]:
    """Make the score of one example of several labels: its mean over examples is balanced accuracy, averaged over labels.

    A label counts by how seldom its value is in `y`; one that never differs counts for nothing.
    """
    share = y.mean(0)
    varies = (share > 0) & (share < 1)
    weight = np.stack([np.where(varies, 0.5 / np.where(varies, part, 1), 0) for part in (1 - share, share)])
    weight = jnp.asarray(weight / max(1, varies.sum()), jnp.float32)

    def hits(outputs, y):
        right = (outputs > threshold) == (y > 0.5)
        return jnp.sum(jnp.where(right, jnp.where(y > 0.5, weight[1], weight[0]), 0), axis=-1)

    return hits


def _crossing(loss: Any, shape: tuple[int, ...], y: np.ndarray, low: float, high: float) -> float:
    """Find the output at which a binary loss costs the same for both labels: 0 for logits, 0.5 for probabilities."""
    outputs = np.concatenate([np.linspace(0.02, 0.98, 49), np.linspace(-4, 4, 81)]).astype(np.float32)
    outputs = np.unique(outputs)
    z = jnp.broadcast_to(outputs.reshape(-1, *[1] * (len(shape) - 1)), (len(outputs), *shape[1:]))
    with np.errstate(all="ignore"):
        costs = [
            np.asarray(loss(z, np.full((len(outputs), *y.shape[1:]), value, y.dtype)), np.float64)
            .reshape(len(outputs), -1)
            .mean(1)
            for value in (low, high)
        ]
    gap = costs[0] - costs[1]  # rises with the output
    ok = np.isfinite(gap)
    signs = np.flatnonzero(np.diff(np.sign(gap[ok])) > 0)
    if not ok.any() or not len(signs):
        return (low + high) / 2
    where = outputs[ok][signs[0] : signs[0] + 2]
    heights = gap[ok][signs[0] : signs[0] + 2]
    return float(where[0] + (where[1] - where[0]) * (0 - heights[0]) / (heights[1] - heights[0]))
