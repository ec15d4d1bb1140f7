"""What a run of `fit` has finished: its state, the metrics of its steps, its curves."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check
from fnn.training.history import History
from fnn.training.step import TrainState


class Run:
    """Keep what a run has finished.

    `first` is the state's number of steps at the start, `lengths` the steps of every epoch, of which the last is unfinished
    while the run is `within` it. `best` is the best epoch's state, with patience.
    """

    def __init__(self, state: TrainState):
        self.state, self.first = state, int(state.step)
        self.lengths: list[int] = []
        self.within = False
        self.curves: list[dict[str, float]] = []
        self.best: TrainState | None = None
        self.best_epoch: int | None = None
        self.stopped = False
        self.nonfinite_step: int | None = None
        self._records: list[Any] = []
        self._fetched = 0
        self._flags: list[tuple[int, Any]] = []

    @property
    def step(self) -> int:
        """Steps that the state has taken."""
        return self.first + sum(self.lengths)

    def is_done(self, epochs: int) -> bool:
        """Say whether nothing is left to do."""
        return self.stopped or (not self.within and len(self.lengths) >= epochs)

    def advance(self, function: Callable[[TrainState], tuple[TrainState, Any]], steps: int | None = None) -> None:
        """Run a stretch of steps (a single one without `steps`): replace the state, and keep the metrics.

        Of the metrics' leading axis the first `steps` count. Ctrl-C waits until the call returns: meanwhile the old state
        is gone and the new one not yet there.
        """
        with _uninterrupted():
            self.state, metrics = function(self.state)
            self._records.append((metrics, steps))
            self.lengths[-1] += 1 if steps is None else steps

    def flag(self, step: int, finite: jax.Array) -> None:
        """Keep the answer to whether the parameters are finite after a step, without waiting for it."""
        self._flags.append((step, finite))

    def is_finite(self, wait: bool) -> bool:
        """Read the answers; unless told to wait, leave the newest, so that the device has work while the host reads on."""
        while len(self._flags) > (not wait):
            step, finite = self._flags.pop(0)
            if self.nonfinite_step is None and not bool(finite):
                self.nonfinite_step = self._first_bad(step)
        return self.nonfinite_step is None

    def _first_bad(self, step: int) -> int:
        """Find the first of the last steps before `step` whose loss or gradient is not finite; else the step before it."""
        metrics = self.metrics(self.step - self.first)
        good = np.isfinite(metrics["loss"]) & np.isfinite(metrics.get("grad_norm", 0.0))
        good = good[: step - self.first]
        after = np.nonzero(good)[0][-1] + 1 if good.any() else 0
        return self.first + min(int(after), len(good) - 1)

    def fetch(self) -> None:
        """Bring the metrics to the host."""
        for i in range(self._fetched, len(self._records)):
            metrics, steps = self._records[i]
            metrics = jax.device_get(metrics)
            take = (lambda m: np.asarray(m)[None]) if steps is None else (lambda m, n=steps: m[:n])
            self._records[i] = jax.tree.map(take, metrics), 1 if steps is None else steps
            self._fetched = i + 1

    def metrics(self, steps: int) -> dict[str, Any]:
        """Return the metrics of the last steps, with a leading axis of steps."""
        self.fetch()
        parts, missing = [], steps
        for metrics, n in reversed(self._records):
            if missing <= 0:
                break
            begin = n - min(n, missing)
            parts.append(jax.tree.map(lambda m, begin=begin: m[begin:], metrics))
            missing -= n
        return joined(parts[::-1])

    def keep_scores(self, scores: dict[str, float], with_state: bool) -> None:
        """Add an epoch's validation to the curves; if it is the best so far, keep a copy of the state as asked."""
        best = min((c["loss"] for c in self.curves if not np.isnan(c["loss"])), default=np.inf)
        self.curves.append(scores)
        if scores["loss"] < best:
            self.best_epoch = len(self.lengths) - 1
            if with_state:
                self.best = jax.tree.map(jnp.copy, self.state)

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Say whether the validation loss has not fallen for that many epochs."""
        best = -1 if self.best_epoch is None else self.best_epoch
        return patience is not None and len(self.lengths) - 1 - best >= patience

    def history(self) -> History:
        """Return what has been recorded."""
        return History(
            self.metrics(self.step - self.first),
            {name: np.array([c[name] for c in self.curves]) for name in self.curves[0]} if self.curves else {},
            tuple(n for n in self.lengths if n),
            self.best_epoch,
            self.stopped,
            self.nonfinite_step,
        )

    def records(self) -> list[dict[str, Any]]:
        """Return the metrics of all steps, stretch by stretch, on the host."""
        self.fetch()
        return [metrics for metrics, _ in self._records]

    def kept(self) -> dict[str, Any]:
        """Return, as JSON, all but states and metrics."""
        return {
            "first": self.first,
            "lengths": list(self.lengths),
            "within": self.within,
            "curves": list(self.curves),
            "best_epoch": self.best_epoch,
            "best": self.best is not None,
            "stopped": self.stopped,
        }

    def restore(
        self, kept: dict[str, Any], state: TrainState, best: TrainState | None, metrics: dict[str, Any]
    ) -> None:
        """Go back to where `kept` was returned."""
        self.state, self.best = state, best
        self.first, self.lengths, self.within = kept["first"], kept["lengths"], kept["within"]
        self.curves, self.best_epoch, self.stopped = kept["curves"], kept["best_epoch"], kept["stopped"]
        n = sum(self.lengths)
        self._records, self._fetched = ([(metrics, n)], 1) if n else ([], 0)

    def keeps_state(self) -> bool:
        """Say, after an error, whether the state is still there, and keep the metrics that are."""
        try:
            jax.block_until_ready(self.state)
            check.alive("fit", self.state)
            self.fetch()
        except Exception:
            lost = sum(1 if n is None else n for _, n in self._records[self._fetched :])
            del self._records[self._fetched :]
            while lost:
                lost, self.lengths[-1] = max(0, lost - self.lengths[-1]), max(0, self.lengths[-1] - lost)
                if lost:
                    self.lengths.pop()
            return False
        return True


def joined(parts: list[Any]) -> Any:
    """Join metrics along the axis of steps. Those of single examples are filled up with NaN where a batch is smaller."""

    def join(*rows):
        shape = np.max([row.shape[1:] for row in rows], axis=0).astype(int)
        wide = [
            np.pad(
                row, [(0, 0), *((0, n - m) for n, m in zip(shape, row.shape[1:], strict=True))], constant_values=np.nan
            )
            if row.shape[1:] != tuple(shape)
            else row
            for row in rows
        ]
        return np.concatenate(wide)

    return jax.tree.map(join, *parts) if parts else {}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back."""
    if threading.current_thread() is not threading.main_thread() or not callable(
        before := signal.getsignal(signal.SIGINT)
    ):
        yield
        return
    pending: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        before(*pending[0])
