"""What `fit(..., recorder=K)` keeps of its last steps, so that they can be run again."""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check
from fnn.datasets.dataset import shuffled
from fnn.training.batches import FromBatches
from fnn.training.feed import InMemory
from fnn.training.run import Run
from fnn.training.step import TrainState, TrainStep
from fnn.training.stretches import jitted_finite

BEFORE = 50
"""A loss is compared with those of as many steps before it, where there are so many."""
FEWEST = 10
"""Fewer steps before it say little: then a loss is a spike that exceeds the largest of them tenfold."""
SPREADS = 5.0
HELD = 10.0
"""Spreads of a spike that is kept while the run goes on: noise reaches 5 of them now and then."""
CALM = 10


@dataclass(frozen=True)
class Spike:
    """A loss that is not finite, or exceeds `limit`, `median` plus 5 spreads; `height` counts spreads at its peak."""

    index: int
    median: float
    limit: float
    height: float


def level(a: np.ndarray) -> tuple[float, float]:
    """Return the median of the finite numbers, and their MAD, at least 1 % of the median's size; NaN without any.

    The MAD is the median distance to the median, which a few outliers do not change.
    """
    a = a[np.isfinite(a)]
    if not a.size:
        return np.nan, np.nan
    median = float(np.median(a))
    return median, max(float(np.median(np.abs(a - median))), 0.01 * abs(median), 1e-12)


def spread(losses: np.ndarray) -> tuple[float, float]:
    """Return median and spread: the MAD, or, if that is more, half of what the 90th percentile is above the median.

    For normal noise both are about two thirds of its standard deviation. Losses near 0 often have a longer tail above.
    """
    median, mad = level(losses)
    losses = losses[np.isfinite(losses)]
    return median, max(mad, (float(np.quantile(losses, 0.9)) - median) / 2) if losses.size else mad


def find(losses: np.ndarray, known: int = 0) -> Spike | None:
    """Find the highest spike among losses float[steps], by its first step; of several that are not finite the first.

    A spike begins where a loss exceeds the median of the up to 50 steps before it by more than 5 spreads, and ends where 10
    losses in a row do not exceed that limit. Steps before `known` begin none.
    """
    found, open_, calm = [], None, 0
    for i, loss in enumerate(losses):
        calm = calm + 1 if open_ is not None and loss <= open_.limit else 0
        if open_ is None or calm >= CALM:
            before = losses[max(0, i - BEFORE) : i]
            median, size = spread(before)
            limit = median + SPREADS * size if i >= FEWEST or not i else 10 * float(np.max(np.abs(before)))
            open_ = Spike(i, median, limit, 0.0) if loss > limit or not np.isfinite(loss) else None
        if open_ is not None:
            height = (loss - open_.median) / (open_.limit - open_.median) * SPREADS if np.isfinite(loss) else np.inf
            height = np.inf if np.isnan(height) else float(height)
            found.append(Spike(open_.index, open_.median, open_.limit, height))
    found = [spike for spike in found if spike.index >= known]
    return max(found, key=lambda spike: spike.height, default=None)


class Recording:
    """Hold the state after step `first` of a run, and all that `fit` needs to take the steps from there to `end` again.

    `losses: float[end - first]` are those of the run, `earlier` the up to 50 before them. `step.recording` is one after `fit(..., recorder=K)`; give it to
    `fnn.replay`. It keeps data in memory alive, and of batches from outside those that were read.
    """

    def __init__(self, recorder: "Recorder", source: Any, state: TrainState, first: int, losses: Any):
        self.step, self.steps = recorder.step, recorder.steps
        self.source, self.state, self.first = source, state, first
        self.earlier, self.losses = losses

    @property
    def end(self) -> int:
        """Steps that the run had taken at the end of the recording."""
        return self.first + len(self.losses)

    def __repr__(self) -> str:
        spike = self.spike()
        seen = "no spike" if spike is None else f"a spike at step {self.first + spike.index}"
        return f"Recording(steps {self.first} to {self.end - 1}; {seen})"

    def spike(self, known: int = 0, steps: int | None = None) -> Spike | None:
        """Find the highest spike that begins in the recorded steps, of which the first `known` and those from `steps` on do not
        count; its `index` counts from `first`."""
        n = len(self.earlier)
        spike = find(np.concatenate([self.earlier, self.losses[:steps]]), n + known)
        return spike and replace(spike, index=spike.index - n)

    def before(self, step: int) -> np.ndarray:
        """Return the up to 50 losses before a step."""
        return np.concatenate([self.earlier, self.losses[: step - self.first]])[-BEFORE:]

    def rerun(self, until: int) -> tuple[TrainState, np.ndarray]:
        """Take the steps again by the programs that `fit` ran; return the state after `until` steps, and the losses.

        Guarantee: until=end gives the recorded losses, on a CPU bit for bit.
        """
        run = Run(jax.tree.map(jnp.copy, self.state))
        self.source.walk(run, until)
        return run.state, np.asarray(run.metrics(run.step - run.first).get("loss", np.zeros(0)))

    def batch(self, step: int) -> tuple[Any, Any]:
        """Return the batch (x, y) of a step."""
        return self.source.batch(step)

    def row(self, step: int, index: int) -> int | None:
        """Say which row of data in memory an example of a step's batch is; None for batches from outside."""
        return self.source.row(step, index)


class Drawn:
    """The batches of data in memory: epoch and position say which rows they are."""

    def __init__(self, feed: InMemory):
        self.feed = feed
        self._orders: dict[int, np.ndarray] = {}

    def walk(self, run: Run, until: int) -> None:
        """Take the run to a step, as `fit` did."""
        self.feed.order = jnp.zeros(self.feed.data.size, jnp.int32)  # an error may have destroyed the old one
        while run.step < until:
            if not run.lengths or run.step % self.feed.steps == 0:
                run.lengths.append(0)
            for _ in self.feed.stretches(run, len(run.lengths) - 1, [until]):  # ends there: no smaller multiple of it
                if run.step >= until:
                    break

    def batch(self, step: int) -> tuple[Any, Any]:
        """Return the batch of a step."""
        return self.feed.rows(self._rows(step))

    def row(self, step: int, index: int) -> int | None:
        """Return the row of the data that an example is."""
        return int(self._rows(step)[index])

    def _rows(self, step: int) -> np.ndarray:
        number, at = divmod(step, self.feed.steps)
        if number not in self._orders:
            key = jax.random.fold_in(self.feed.key, number)
            self._orders = {number: np.asarray(shuffled(key, self.feed.data.size), np.int32)}
        return self._orders[number][at * self.feed.batch_size :][: self.feed.batch_size]


class Read:
    """Batches from outside, in the groups in which they were run."""

    def __init__(self, feed: FromBatches, groups: list[tuple[int, list[Any]]]):
        self.feed, self.groups = feed, groups

    def walk(self, run: Run, until: int) -> None:
        """Take the run to a step, as `fit` did; a group that goes beyond it is taken batch by batch."""
        run.lengths.append(0)
        for first, group in self.groups:
            self.feed.run(run, group[run.step - first : until - first] if run.step < until else [])

    def batch(self, step: int) -> tuple[Any, Any]:
        """Return the batch of a step."""
        return next(group[step - first] for first, group in self.groups if first <= step < first + len(group))

    def row(self, step: int, index: int) -> int | None:
        """Return None: nothing is known of where a batch comes from."""
        return None


class Recorder:
    """Keep a copy of the state at least `steps` steps back, and the batches since then, while a run goes on.

    Two copies are kept in turn, taken at ends of stretches. Where a spike is seen before the older one is given up, what is
    kept of it stays, until one comes that is as high (in spreads; what is not finite is the highest).
    """

    def __init__(self, steps: Any, step: TrainStep, feed: Any):
        check.positive("fit", recorder=steps)
        if not step.given:
            raise TypeError(
                f"fit: recorder= needs a step that train_step made, got {step!r}; make it so, or leave it out"
            )
        self.steps, self.step, self.feed = int(steps), step, feed
        self._states: deque[tuple[int, TrainState]] = deque()
        self._groups: list[tuple[int, list[Any]]] = []
        self._held: Recording | None = None
        self._end: int | None = None

    def begin(self, run: Run) -> None:
        """Keep the first state."""
        self._states.append((run.step, jax.tree.map(jnp.copy, run.state)))

    def after_stretch(self, run: Run) -> None:
        """Keep what the stretch was made of; give up what is older than need be."""
        if self._end is not None:
            return
        if isinstance(self.feed, FromBatches):
            self._groups.append((run.step - len(self.feed.group), self.feed.group))
        if run.step - self._states[-1][0] < self.steps:
            return
        if not bool(jitted_finite(run.state.params)):
            self._end = run.step  # all that follows is not finite either
            return
        if len(self._states) == 2:
            now = self._now(run)
            # Half of the steps must have come after a spike, or it is found with more of them the next time.
            if self._is_higher(now, len(now.losses) - self.steps // 2, HELD):
                self._held = now
            self._states.popleft()
            self._groups = [group for group in self._groups if group[0] >= self._states[0][0]]
        self._states.append((run.step, jax.tree.map(jnp.copy, run.state)))

    def recording(self, run: Run) -> Recording:
        """Return what is kept: of the highest spike, or, where there was none, of the last steps."""
        now = self._now(run)
        return now if self._held is None or self._is_higher(now, len(now.losses), SPREADS) else self._held

    def _is_higher(self, now: Recording, steps: int, height: float) -> bool:
        """Say whether a spike begins in the first steps of a recording, after those that are held, as high as theirs."""
        if self._held is not None and (held := self._held.spike()) is not None:
            height = max(height, held.height)
        spike = now.spike(0 if self._held is None else max(0, self._held.end - now.first), steps)
        return spike is not None and spike.height >= height

    def _now(self, run: Run) -> Recording:
        first, state = self._states[0]
        n = min(BEFORE, first - run.first)
        losses = np.asarray(run.metrics(run.step - first + n).get("loss", np.zeros(0)))
        losses, earlier = losses[n:][: None if self._end is None else self._end - first], losses[:n]
        if isinstance(self.feed, InMemory):
            return Recording(self, Drawn(self.feed), state, first, (earlier, losses))
        source = Read(self.feed, list(self._groups))
        losses = losses[: sum(len(group) for _, group in self._groups)]  # Ctrl-C may have come before the last was kept
        return Recording(self, source, state, first, (earlier, losses))
