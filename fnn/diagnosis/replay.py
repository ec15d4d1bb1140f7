"""`replay`: take the steps around a spike of the loss again, with one thing changed, and see whether it comes."""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fnn import arrays, check
from fnn.diagnosis.again import Change, Suspect, Trial
from fnn.training.recorder import Recording

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True, repr=False)
class Replay:
    """What `replay` found. `print` shows it; `table()` lists the changes."""

    spike: int
    """The step at which the spike begins: its loss is the first of it."""
    first: int
    """The first step that was replayed."""
    before: float
    """Median loss of the up to 50 steps before the spike."""
    at: float
    peak: float
    """The control's highest loss from the spike on, NaN if one of them is not finite."""
    after: float
    """Its loss in the last step that was replayed."""
    limit: float
    """A change removes the spike if no loss from the spike on is higher."""
    recorded: np.ndarray
    control: np.ndarray
    """Losses of the same steps, with nothing changed, in the same program as the changes."""
    reproduced: bool
    """Whether the spike came in the control too, and with updates times 1.0001."""
    exact: bool
    """Whether the programs of `fit` gave the recorded losses again, bit for bit."""
    changes: tuple[Change, ...]
    not_tried: dict[str, str]
    suspects: tuple[Suspect, ...]

    @property
    def removed_by(self) -> tuple[str, ...]:
        """Names of the changes that remove the spike."""
        return tuple(change.name for change in self.changes if change.removes)

    def table(self) -> "polars.DataFrame":
        """Give every change as a polars table: change, detail, peak, relative, removes; the control first."""
        import polars as pl

        rows = [("control", "", self.peak, 1.0 if np.isfinite(self.peak) else np.nan, False)]
        rows += [(c.name, c.detail, c.peak, c.relative, c.removes) for c in self.changes]
        return pl.DataFrame(rows, schema=["change", "detail", "peak", "relative", "removes"], orient="row")

    def __repr__(self) -> str:
        lines = [
            f"The loss jumps at step {self.spike}: {_say(self.before)} before (median), {_say(self.at)} there, "
            f"peak {_say(self.peak)}, {_say(self.after)} at step {self.first + len(self.control) - 1}"
        ]
        if not self.exact:
            lines.append("Taken again, the recorded steps gave losses that differ by rounding or more.")
        if not self.reproduced:
            lines.append(
                "The spike does not come in the control, or not with updates times 1.0001: chance decides whether it comes, "
                "and no change is judged."
            )
        groups = {"REMOVED BY": [], "NOT REMOVED BY": []}
        for c in self.changes:
            share = "" if np.isnan(c.relative) else f", {max(0.0, c.relative):.2g} of the rise"
            text = f"{c.name} ({c.detail}; peak {_say(c.peak)}{share})"
            groups["REMOVED BY" if c.removes else "NOT REMOVED BY"].append(text)
        groups["NOT TRIED"] = [f"{name}: {why}" for name, why in self.not_tried.items()]
        if not self.reproduced:
            groups = {"CHANGED": groups["NOT REMOVED BY"], "NOT TRIED": groups["NOT TRIED"]}
        elif not self.removed_by:
            groups["REMOVED BY"] = ["nothing that was tried"]
        for title, texts in groups.items():
            for i, text in enumerate(texts):
                lead = f"{title if not i else '':<16}"
                lines += textwrap.wrap(text, 110, initial_indent=lead, subsequent_indent=" " * 16)
        return "\n".join(lines)


def replay(recording: Recording, spike: int | None = None) -> Replay:
    """Take the steps around a spike of the loss again, each time with one thing changed, and say what removes it.

    `recording` is `step.recording` after `fit(..., recorder=K)`. The spike begins where the loss is not finite, or exceeds
    the median of the up to 50 steps before it by 5 spreads; among the first 10 steps, where it is ten times the largest before
    it. A spread is the MAD or half of what the 90th percentile is above the median, whichever is larger, and at least 1 % of
    the median. Of several the highest counts. `spike` names another step, by `state.step` before it is taken.

    - suspects weighted 0: examples of the spike's batch, or of the one before, whose gradient's norm exceeds the batch's
      median by 10 MADs, if they are few (two, or a sixteenth of the batch). Another example stands in their place, so that a
      NaN is gone too;
    - second moment reset: Adam's moments and their count begin anew, 1, 3 or 10 steps before the spike, or with the first
      step that is replayed, whichever is best;
    - from K steps before the spike on, or from where the recording begins: gradient clipped at its median norm before the
      spike; rate halved (every update times 1/2), and times 0.1 if that is not enough; β₂ = 0.95 (in a state of
      `optax.inject_hyperparams`); float32 (instead of a lower `compute_dtype`, in a program of its own).

    A change removes the spike if no loss from the spike on, in K steps at most, exceeds `limit`: the median before the spike
    plus twice the larger of 5 spreads and what any loss before exceeds it by, but not more than half of the spike's rise (or
    5 spreads). Where the control shows no spike, or where a change that should do nothing, updates times 1.0001, removes it,
    chance decides whether it comes, and no change is judged. A change that removes a spike need not be its cause: read all.

    The cost is that of the replayed steps, 2 K at most, about eight times over, in single calls of a step, two or three
    compiles, and room for up to six more states. Guarantee: what is not changed is the same: data, order, dropout masks.
    Errors: TypeError for what is no recording; ValueError for a recording without steps or without a spike, and for a step
    outside of it, or its first.
    """
    at = _found(recording, spike)
    first = max(recording.first, at - recording.steps)
    end = min(recording.end, at + recording.steps)
    state, _ = recording.rerun(first)
    _, again = recording.rerun(recording.end)
    trial = Trial(recording, first, end, at, state)
    changes, not_tried = trial.changes()
    return Replay(
        spike=at,
        first=first,
        before=trial.before,
        at=float(trial.control[at - first]),
        peak=trial.peak(trial.control),
        after=float(trial.control[-1]),
        limit=trial.limit,
        recorded=recording.losses[first - recording.first : end - recording.first],
        control=trial.control,
        reproduced=trial.reproduced,
        exact=bool(np.array_equal(again, recording.losses, equal_nan=True)),
        changes=tuple(changes),
        not_tried=not_tried,
        suspects=tuple(trial.suspects),
    )


def _found(recording: Recording, spike: int | None) -> int:
    if not isinstance(recording, Recording):
        got = arrays.brief(recording)
        raise TypeError(
            f"replay: recording must be step.recording after fit(..., recorder=K), got {got}; pass recorder=100 to fit"
        )
    if not len(recording.losses):
        raise ValueError("replay: the recording must have steps, got none; train on with recorder=K")
    if spike is None:
        found = recording.spike()
        if found is None:
            raise ValueError(
                f"replay: the recording must have a spike, got none in steps {recording.first} to {recording.end - 1}; name "
                "a step: replay(recording, spike=s)"
            )
        return recording.first + found.index
    check.non_negative("replay", spike=spike)
    if not recording.first < spike < recording.end:
        raise ValueError(
            f"replay: spike must be a recorded step with one before it, {recording.first + 1} to {recording.end - 1}, got "
            f"{spike}; choose one"
        )
    return int(spike)


def _say(loss: float) -> str:
    return f"{loss:.4g}" if np.isfinite(loss) else "not finite"
