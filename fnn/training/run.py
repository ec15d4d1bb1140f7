"""What a run of `fit` has finished: its state, the metrics of its steps, its curves."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fnn import check
from fnn.training.history import History
from fnn.training.step import TrainState


class Run:
    """Keep what a run has finished: its state, the metrics of its steps, its curves."""

    def __init__(self, state: TrainState):
        self.state, self.lengths, self.curves = state, [], []
        self.first = int(state.step)
        self.best_epoch: int | None = None
        self._records: list[Any] = []
        self._fetched = 0

    def advance(self, function: Callable[..., Any], *args: Any, steps: int | None = None) -> None:
        """Run a stretch of steps (a single one without `steps`): replace the state, and keep the metrics.

        Ctrl-C waits until the call returns: meanwhile the old state is gone and the new one not yet there.
        """
        with _uninterrupted():
            self.state, metrics = function(self.state, *args)
            self._records.append((metrics, steps))
            self.lengths[-1] += 1 if steps is None else steps

    def fetch(self) -> float:
        """Bring the metrics of the epoch to the host; return its mean loss."""
        for i in range(self._fetched, len(self._records)):
            metrics, steps = self._records[i]
            metrics = jax.device_get(metrics)
            self._records[i] = metrics if steps is not None else jax.tree.map(lambda m: np.asarray(m)[None], metrics), 0
        fetched, self._fetched = self._records[self._fetched :], len(self._records)
        return float(np.mean(np.concatenate([metrics["loss"] for metrics, _ in fetched])))

    @property
    def step(self) -> int:
        """Steps that the state has taken."""
        return self.first + sum(self.lengths)

    def metrics(self, steps: int) -> dict[str, Any]:
        """Return the metrics of the last steps, with a leading axis of steps."""
        return jax.tree.map(lambda a: a[len(a) - steps :], self.history().train)

    def history(self, stopped: bool = False) -> History:
        records = [metrics for metrics, _ in self._records]
        return History(
            jax.tree.map(lambda *parts: np.concatenate(parts), *records) if records else {},
            {name: np.array([c[name] for c in self.curves]) for name in self.curves[0]} if self.curves else {},
            tuple(n for n in self.lengths if n),
            self.best_epoch,
            stopped,
        )

    def keeps_state(self) -> bool:
        """Say, after an error, whether the state is still there, and keep the metrics that are."""
        try:
            jax.block_until_ready(self.state)
            check.alive("fit", self.state)
            if self._fetched < len(self._records):
                self.fetch()
        except Exception:
            if self.lengths:
                self.lengths[-1] = 0
            del self._records[self._fetched :]
            return False
        return True


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
