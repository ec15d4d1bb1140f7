"""The rules of AUTOTRAINER, for comparison: written anew, with the thresholds that its authors published with their code.

Zhang, Zhai, Ma, Shen: AUTOTRAINER: An Automatic DNN Training Problem Detection and Repair System, ICSE 2021. Every third epoch
the gradients of a batch and the course of the scores are looked at; the first problem that is found is the answer.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

from . import check
from .recipes import Case

VANISH, SMALL, EXPLODE = 1e-3, 1e-4, 70
"""Norm of the first kernel's gradient: below VANISH times the last one's and below SMALL, or above EXPLODE times."""
ZEROS = 0.7
"""Share of the gradient's numbers that are 0."""
SWING, SWINGS = 0.03, 0.2
"""A swing of the score, and how many there may be for each epoch."""
SLOW = 0.01
"""Highest rise of the score from one epoch to the next."""
GOOD = 0.7
"""A score with which nothing is wrong."""
JUDGED = 0.3
"""The share of the epochs before which scores say nothing."""
FITS = {
    "vanishing gradient": {"activation", "init_small", "depth_norm"},
    "exploding gradient": {"init_large", "lr_high", "depth_norm", "numerics"},
    "dying ReLU": {"dead_units", "init_symmetric", "activation"},
    "oscillating loss": {"lr_high", "batch_size", "optimizer"},
    "slow convergence": {"lr_low", "optimizer", "init_small"},
}
"""Causes that a problem fits, generously: those that its repairs remove."""


@dataclass
class Course:
    """What was recorded after each epoch."""

    loss: list[float]
    train: list[float]
    test: list[float]
    ratio: list[float]
    """Norm of the first kernel's gradient over that of the last one; `first` is the former."""
    first: list[float]
    zeros: list[float]


def problem(course: Course, epochs: int) -> str | None:
    """Name the problem that the rules see after the epochs so far; None for none."""
    if not np.isfinite([course.loss, course.first]).all():
        return "exploding gradient"
    if len(course.loss) < JUDGED * epochs:
        return None
    slow = all(max(np.diff(s), default=0) < SLOW for s in (course.train, course.test))
    if slow or min(max(course.train), max(course.test)) < GOOD:
        if course.zeros[-1] >= ZEROS:
            return "dying ReLU"
        if course.ratio[-1] > EXPLODE:
            return "exploding gradient"
        if course.ratio[-1] < VANISH and course.first[-1] < SMALL:
            return "vanishing gradient"
        return "slow convergence" if slow else None
    return "oscillating loss" if swings(course.train) >= SWINGS * len(course.train) else None


def swings(scores: list[float]) -> int:
    """Count pairs of a local maximum and a local minimum that lie more than SWING apart."""
    inner = range(1, len(scores) - 1)
    high = [scores[i] for i in inner if scores[i] >= max(scores[i - 1], scores[i + 1])]
    low = [scores[i] for i in inner if scores[i] <= min(scores[i - 1], scores[i + 1])]
    return sum(a - b >= SWING for a, b in zip(high, low, strict=False))


def answer(case: Case) -> str | None:
    """Train a case with one seed, and give the first problem that the rules see."""
    net, tx, (x, y) = case.build(), case.optimizer(), case.train
    n, size = len(x), min(case.batch_size, len(x))
    per = max(1, min(n // size, case.steps // 10))
    epochs = case.steps // per
    rows = check.batches(n, case, 0, case.shuffle)[: epochs * per].reshape(epochs, per, -1)

    def value(params, state, batch, key):
        out, state = net.apply(params, state, x[batch], key=key, train=True)
        return jnp.mean(case.loss(out, y[batch])), state

    @jax.jit
    def epoch(carry, rows, key):
        def step(carry, now):
            params, state, opt = carry
            (loss, state), grads = jax.value_and_grad(value, has_aux=True)(params, state, now[0], now[1])
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), state, opt), loss

        carry, losses = jax.lax.scan(step, carry, (rows, jax.random.split(key, len(rows))))
        params, state, _ = carry
        grads = jax.grad(lambda p: value(p, state, rows[0], key)[0])(params)
        outputs = [net.apply(params, state, part)[0] for part in (x, case.validation[0])]
        return carry, (jnp.mean(losses), grads, outputs)

    params, state = net.init(jax.random.key(0), x[:size])
    carry = params, state, tx.init(params)
    course = Course([], [], [], [], [], [])
    for i in range(epochs):
        carry, (loss, grads, outputs) = epoch(carry, jnp.asarray(rows[i]), jax.random.key(i))
        seen(
            course,
            loss,
            grads,
            [check.score(case.loss, o, t) for o, t in zip(outputs, (y, case.validation[1]), strict=True)],
        )
        if (i % 3 == 2 or i == epochs - 1) and (found := problem(course, epochs)) is not None:
            return found
    return None


def seen(course: Course, loss: Any, grads: Any, scores: list[float]) -> None:
    """Add an epoch to a course."""
    arrays = [np.asarray(a, np.float64) for _, a in fnn.tree.rows(grads)]
    norms = [float(np.linalg.norm(a)) for a in arrays if a.ndim > 1]
    size = sum(a.size for a in arrays)
    with np.errstate(all="ignore"):
        ratio = float(np.float64(norms[0]) / norms[-1])
    for name, number in {
        "loss": float(loss),
        "train": scores[0],
        "test": scores[1],
        "ratio": ratio,
        "first": norms[0],
        "zeros": sum(int(np.sum(a == 0)) for a in arrays) / size,
    }.items():
        getattr(course, name).append(number)
