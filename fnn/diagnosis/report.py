"""What a diagnosis found, as an object and as text."""

import os
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fnn.diagnosis import unproved
from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.causes import LEAST, Cause, Evidence, Trial, shown
from fnn.diagnosis.changes import changes
from fnn.diagnosis.inquiry import NOTHING, Inquiry, Tried
from fnn.diagnosis.start import Start
from fnn.theory import meanfield

if TYPE_CHECKING:
    import polars

WIDTH = 100
UNTESTED = {
    "input_empty": "no change of the net or the training can tell equal examples apart",
    "labels": "no change of the net or the training can put inputs and targets together",
    "label_encoding": "the score, too, would have to read other labels",
    "loss": "the loss is known as a whole alone, and cannot be taken apart",
    "head": "the net itself has to leave out what follows its last layer",
    "blocked_gradient": "the net itself has to do without the operation that has no gradient",
    "positions": "the net itself has to be given the positions",
    "numerics": "the formula itself has to be changed",
    "split_mismatch": "the repair of the first cause learns held-out data, and so hides this one",
}
"""Why a cause that was measured has no repair that proves it."""


@dataclass(frozen=True)
class Profile:
    """What `watch` measured before the first step, layer by layer: as it is, and repaired."""

    paths: tuple[str, ...]
    log10_error: np.ndarray
    output_second_moment: np.ndarray
    theory: np.ndarray
    """Mean-field theory of log10_error in the hidden layers, through the last of them: the typical curve at this width, and the
    ends of the band in which 19 seeds of 20 lie, float[3, layers]; NaN where theory has no band. Empty where there is no
    theory."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found. `print` shows it; `table()` lists the trials; `html(path)` writes the page."""

    causes: tuple[Cause, ...]
    """The cause first; of two faults both. Others behind it are proved too, but come later in training."""
    healthy: bool
    score: str
    """balanced accuracy, R², accuracy"""
    chance: float
    held_out: bool
    """Whether scores are those of held-out data."""
    base: Trial
    """The training as it is."""
    trials: tuple[Trial, ...]
    """Every change that was trained."""
    working: tuple[str, ...]
    """Names of the trials that raise the score enough."""
    evidence: tuple[Evidence, ...]
    """All that was measured to be abnormal, in the order of stages; not each is a cause."""
    learnable: str
    not_tried: dict[str, str]
    """Changes that were not trained, and why."""
    unfinished: bool
    """Whether more steps alone raise the score."""
    two_faults: bool
    curves: dict[str, np.ndarray]
    """Training loss by step of each seed, float[seeds, steps]: "as it is", and "repaired" if there is a repair."""
    profiles: dict[str, Profile]
    seconds: float
    target: float | None = None
    adds: dict[str, float] = field(default_factory=dict)
    """By how much another change that works raises the score once the cause is repaired, for those that were tried so."""
    others: tuple[str, ...] = ()
    """Names of those in `working` that remove the named cause in another way."""
    ill: bool = False
    """Whether the scores themselves show a fault, be its cause known or not."""
    doubt: str = ""
    """What keeps a training without a cause from being called healthy."""

    @property
    def remedies(self) -> tuple[str, ...]:
        """Code to paste, one piece for each cause; causes with the same remedy share one."""
        return tuple(dict.fromkeys(cause.remedy for cause in self.causes))

    def table(self) -> "polars.DataFrame":
        """Give every trial as a polars table: change, cause, seed, score, checked (NaN where it was not checked)."""
        import polars as pl

        rows = [
            (trial.change, trial.cause, seed, score, trial.checked[seed] if trial.checked else float("nan"))
            for trial in (self.base, *self.trials)
            for seed, score in enumerate(trial.scores)
        ]
        return pl.DataFrame(rows, schema=["change", "cause", "seed", "score", "checked"], orient="row")

    def html(self, path: str | os.PathLike[str]) -> None:
        """Write the page: one file that needs no network. Errors: OSError where it cannot be written."""
        from fnn.diagnosis import page

        page.write(self, path)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        scores = " ".join(map(shown, self.base.scores))
        word = "HEALTHY" if self.healthy else "DOES NOT TRAIN" if self._low() else "COULD TRAIN BETTER"
        word = word if self.healthy or self.causes or self.ill else "UNDECIDED"
        lines = [
            f"{word}   {self.score} {scores} (chance {self.chance:.2f})"
            + ("" if self._finite() else "; loss not finite")
        ]
        if not self.held_out:
            lines.append("Scored on the training data: no held-out data were given, so a gap to them cannot be seen.")
        if self.learnable:
            lines.append(self.learnable)
        if self.two_faults:
            alone = (
                "one was measured, and could not be tested"
                if self.causes[1].repair is None
                else "neither repair is enough alone"
            )
            lines.append(f"Two faults: {alone}.")
        first = self.causes[:2] if self.two_faults else self.causes[:1]
        for number, cause in enumerate(first, 1):
            lines += self._cause(number, cause)
        lines += self._rest(first)
        if self.healthy and self.unfinished:
            lines.append("NOT FINISHED  more steps alone raise the score")
        if not self.healthy and not self.causes:
            short = " in this budget" if any(why.startswith("about ") for why in self.not_tried.values()) else ""
            worked = "not all repairs were tried" if short else "no repair worked"
            if self.doubt and not self.ill:
                lines += _wrapped(f"NOT HEALTHY FOR SURE  {self.doubt}", [])
            lines.append(f"NO CAUSE FOUND{short}" + (f": suspected, but {worked}:" if self.evidence else ""))
            for e in self.evidence:
                lines += _wrapped(f"  {e.cause:<16} {e.text}", [], " " * 19)
        lines.append(f"{len(self.trials) + 1} trainings of {len(self.base.scores)} seeds in {self.seconds:.0f} s")
        return lines

    def _cause(self, number: int, cause: Cause) -> list[str]:
        lines = [f"CAUSE {number}  {cause.meaning} [{cause.name}]"]
        measured = [e.text for e in cause.evidence] or ["nothing abnormal; but the repair works"]
        for text in measured:
            lines += _wrapped(f"  measured     {text}", [], "               ")
        if (repair := cause.repair) is not None:
            low, high = min(self.base.scores), max(self.base.scores)
            before = shown(low) if high - low < 0.005 else f"{shown(low)} to {shown(high)}"
            more = "nothing else changed" if not repair.together else "both at once"
            lines.append(f"  intervened   {repair.change}, {more}   {before} → {' '.join(map(shown, repair.scores))}")
            data = "other held-out data" if self.held_out else "the same data"
            lines.append(
                f"  checked      {len(repair.checked)} fresh seeds, {data}: {' '.join(map(shown, repair.checked))}"
            )
        else:
            lines += _wrapped(f"  not tested   {UNTESTED[cause.name]}", [], "               ")
        return lines + [f"  {'remedy' * (not i):<12} {line}" for i, line in enumerate(cause.remedy.splitlines())]

    def _rest(self, first: tuple[Cause, ...]) -> list[str]:
        named = {part for c in first if c.repair for part in (c.repair.change, *c.repair.together)}
        singles = [t for t in self.trials if not t.together and t.change not in named]
        works = sorted((t for t in singles if t.change in self.working), key=lambda t: -t.mean)
        lines = []
        if first and (same := [f"{t.change} {shown(t.mean)}" for t in works if t.change in self.others]):
            lines += _wrapped("REMOVES THE CAUSE TOO: ", same)
            works = [t for t in works if t.change not in self.others]
        if works and first:
            said = [
                f"{t.change} {shown(t.mean)}"
                + (f" ({self.adds[t.change]:+.2f} on top of the remedy)" if t.change in self.adds else "")
                for t in works
            ]
            lines += _wrapped("ALSO REPAIRS, but treats the symptom: ", said)
        if out := [t.change for t in singles if t.change not in self.working]:
            lines += _wrapped("RULED OUT  " if not self.healthy else "TRIED, no better  ", out)
        if self.not_tried:
            reasons = dict.fromkeys(self.not_tried.values())
            alike = [([name for name in self.not_tried if self.not_tried[name] == why], why) for why in reasons]
            lines += _wrapped("NOT TRIED  ", [f"{' · '.join(names)} ({why})" for names, why in alike])
        return lines

    def _low(self) -> bool:
        return min(self.base.scores) < self.chance + 0.5 * (1 - self.chance) or not self._finite()

    def _finite(self) -> bool:
        return bool(np.isfinite(self.curves["as it is"]).all())


def _wrapped(head: str, items: list[str], indent: str = "  ") -> list[str]:
    return textwrap.wrap(head + " · ".join(items), WIDTH, subsequent_indent=indent, break_on_hyphens=False)


@dataclass(frozen=True)
class Verdict:
    """What was made of an inquiry."""

    causes: list[Cause]
    working: list[Tried]
    adds: dict[str, float]
    ill: bool


def diagnosis_of(inquiry: Inquiry, verdict: Verdict, target: float | None) -> Diagnosis:
    """Put together what an inquiry found."""
    causes, working = verdict.causes, verdict.working

    def trial(tried: Tried) -> Trial:
        proved = {c.repair.change: c.repair.checked for c in causes if c.repair}
        cause = tried.change.causes[0] if tried.change.causes else ""
        return tried.trial(cause, proved.get(tried.change.name, ()))

    profiles, curves = {"as it is": _profile(inquiry, Plan(), inquiry.begun)}, {"as it is": inquiry.base.outcome.losses}
    two = len(causes) > 1 and (causes[1].repair is None or bool(causes[1].repair.together))
    if causes and causes[0].repair is not None:
        best = inquiry.tried[causes[0].repair.change]
        curves["repaired"] = best.outcome.losses
        if (found := inquiry.begun_of(best.plan)) is not None:
            profiles["repaired"] = _profile(inquiry, best.plan, found)
    steps = [t for t in working if "steps" in t.change.causes]
    repaired = {c.name for c in causes[: 1 + two] if c.repair}
    named = {c.repair.change for c in causes[: 1 + two] if c.repair}
    others = tuple(t.change.name for t in working if repaired & set(t.change.causes) and t.change.name not in named)
    task = inquiry.case.task
    everything = [trial(t) for t in inquiry.tried.values() if t.change is not NOTHING]
    doubt = doubtful(inquiry)
    return Diagnosis(
        tuple(causes), not verdict.ill and not causes and decided(inquiry) and not doubt, task.score, task.chance, inquiry.case.held_out, trial(inquiry.base),
        tuple(everything), tuple(t.change.name for t in working), tuple(inquiry.evidence), inquiry.learnable,
        dict(inquiry.skipped), bool(steps), two, curves, profiles, inquiry.spent, target, verdict.adds, others, verdict.ill, doubt,
    )  # fmt: skip


def doubtful(inquiry: Inquiry) -> str:
    """Say what may be a fault, and may be none, where the score is low: no gain by training, unused weights, no order."""
    base, chance = inquiry.base, inquiry.case.task.chance
    began = base.outcome.began
    if began is not None and base.mean <= float(np.mean(began)) + LEAST and base.mean < chance + 0.8 * (1 - chance):
        return f"training does not raise the score, {shown(float(np.mean(began)))} at the start: it is at its best, or learns nothing"
    if unproved.short(inquiry) and inquiry.idle:
        return "the score is low, and weights are not used"
    if unproved.short(inquiry) and inquiry.begun.blind:
        return "the score is low, and the net sees no order: whether the task has one is not known"
    return ""


def decided(inquiry: Inquiry) -> bool:
    """Whether at least everything was tried that needs no program of its own, and no suspicion."""
    cheap = [change.name for change in changes(inquiry.case) if not (change.own_program or change.on_suspicion)]
    return all(name in inquiry.tried for name in cheap)


def _profile(inquiry: Inquiry, plan: Plan, begun: Start) -> Profile:
    nothing = np.full(len(begun.paths), np.nan)
    error = begun.layers.get("log10_error", nothing)
    moment = begun.layers.get("output_second_moment", nothing)
    return Profile(tuple(begun.paths), error, moment, _theory(inquiry.case, plan, begun, error))


def _theory(case: Case, plan: Plan, begun: Start, error: np.ndarray) -> np.ndarray:
    """Predict the error signal of a plain or batch-normed mlp, from the size of its weights; nothing for other nets."""
    value, n = case.value, len(error) - 1
    norm, name = value(plan, "norm") or "none", value(plan, "activation")
    hidden = np.concatenate([g for _, g in begun.gains] or [np.ones(0)])
    known = isinstance(name, str) and name != "softmax" and norm in ("none", "batch_norm") and value(plan, "depth") == n
    if (
        not known
        or value(plan, "residual")
        or value(plan, "dropout")
        or n < 2
        or not (hidden > 0).all()
        or not np.isfinite(error[n - 1])
    ):
        return np.zeros((3, 0))
    width = value(plan, "width")
    options: dict[str, Any] = {"width": width} if isinstance(width, int) else {}
    if norm == "batch_norm":
        options |= {"norm": norm, "batch": float(plan.batch_size or case.batch_size)}
    try:
        gain = float(np.exp(np.log(hidden).mean()))
        found = meanfield.predict(n, activation=name, sigma_w=gain, sigma_b=0.0, **options)
    except (ValueError, ArithmeticError):  # no fixed point, or batches too small for theory
        return np.zeros((3, 0))
    typical = np.where(np.isnan(found.mean_log_error), found.log_error, found.mean_log_error)
    return np.stack([typical, found.low, found.high]) / np.log(10) + error[n - 1]
