"""The curves of a run."""

from dataclasses import dataclass

import jax
import numpy as np

from fnn.training.metrics import CLIPPING
from fnn.tree import PyTree


@dataclass(frozen=True)
class History:
    """What `fit` recorded, as NumPy arrays."""

    train: dict[str, PyTree]
    """Metrics of every step, each with a leading axis of steps."""
    validation: dict[str, np.ndarray]
    """`loss` (and `accuracy`) after every epoch, float[epochs]; empty without validation data."""
    steps_per_epoch: tuple[int, ...]
    best_epoch: int | None
    """Index of the epoch with the lowest validation loss."""
    stopped_early: bool
    """Whether patience, a hook or parameters that are not finite ended the run before all its epochs."""
    nonfinite_step: int | None = None
    """Where the parameters ceased to be finite: `state.step` at the first step from which on no loss (and no gradient norm, of
    those in `train`) is finite, or else at the step that made them so."""

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {curve[-1]:.4g}" for name, curve in self.validation.items() if len(curve))
        steps = f"{len(self.steps_per_epoch)} epochs, {sum(self.steps_per_epoch)} steps"
        best = f"; best_epoch={self.best_epoch}, stopped_early={self.stopped_early}"
        return f"History({steps}; train {', '.join(self.train):.200}; validation {last or 'none'}{best})"

    def __str__(self) -> str:
        rows, names = [], dict.fromkeys(("loss", "accuracy", *self.validation))
        for epoch in range(len(self.steps_per_epoch)):
            train = {f"train {name}": self.by_epoch(name)[epoch] for name in names if name in self.train}
            held_out = {f"validation {name}": v[epoch] for name, v in self.validation.items() if epoch < len(v)}
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in (train | held_out).items())
            rows.append(f"epoch {epoch + 1}: {numbers}{' (best)' * (epoch == self.best_epoch)}")
        rows = rows if len(rows) <= 24 else [*rows[:12], f"... {len(rows) - 24} more", *rows[-12:]]
        return "\n".join([*rows, *(["stopped early"] if self.stopped_early else [])])

    def by_epoch(self, name: str) -> PyTree:
        """Average a metric of the training steps over each epoch, to lay beside `validation`.

        Reports of clips are averaged over the steps that have one (not those that only accumulate, or are skipped), norms of
        single examples over the examples that a batch has. A metric that is a tree gives a tree.
        """
        ends = np.cumsum(self.steps_per_epoch)

        def average(values):
            parts = np.split(np.asarray(values), ends[:-1])
            if name in CLIPPING:
                parts = [part[~np.isnan(part)] for part in parts]
            elif name.startswith("per_example_norms"):  # NaN where a batch was smaller
                parts = [part[~np.isnan(part)] if not n.any() else part for part, n in zip(parts, lost, strict=True)]
            return np.array([np.mean(part) if len(part) else np.nan for part in parts])

        lost = np.split(
            np.asarray(self.train.get("examples_nonfinite", np.zeros(sum(self.steps_per_epoch)))), ends[:-1]
        )
        return jax.tree.map(average, self.train[name])
