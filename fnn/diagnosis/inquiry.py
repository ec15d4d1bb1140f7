"""A diagnosis in progress: what was measured, which changes were trained, and how much time is left."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from fnn import tree
from fnn.arrays import first_line
from fnn.diagnosis import data_symptoms, run_symptoms, start, symptoms
from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.causes import LEAST, STAGE, WEAK, Evidence, Trial, shown
from fnn.diagnosis.change import Change
from fnn.diagnosis.changes import changes, unreached
from fnn.diagnosis.reads import Reads
from fnn.diagnosis.trial import Outcome, Runner
from fnn.gradients.operations import Unreadable

DONE = 0.95
"""The share of the way from chance to the best score behind which there is nothing left to gain."""
SETTLED = "a repair that leaves nothing to gain was found before"
RISES = 0.1
"""More steps must raise the score by so much for still more to be tried."""
NOTHING = Change("nothing changed", (), lambda plan: plan, "")


@dataclass(frozen=True)
class Tried:
    """A change, its plan, and what came out."""

    change: Change
    plan: Plan
    outcome: Outcome
    scores: tuple[float, ...]
    """On data that were not learnt, of each seed."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def single(self) -> bool:
        """Whether one thing was changed, not several together."""
        return not self.change.together

    def trial(self, cause: str, checked: Sequence[float] | np.ndarray = ()) -> Trial:
        """Say it as the report does, with the scores of fresh seeds if it was checked."""
        names = tuple(change.name for change in self.change.together)
        return Trial(self.change.name, cause, self.scores, tuple(map(float, checked)), self.outcome.seconds, names)


@dataclass
class Inquiry:
    """Train changes while the budget lasts."""

    runner: Runner
    budget: float
    say: Callable[[str], None]
    tried: dict[str, Tried] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Changes that were not trained, and why."""
    evidence: list[Evidence] = field(default_factory=list)
    learnable: str = ""
    idle: list[str] = field(default_factory=list)
    """Kernels that the loss does not depend on."""
    idle_share: float = 0.0
    """How much of all parameters they are."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def case(self) -> Case:
        return self.runner.case

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    @property
    def begun(self) -> start.Start:
        """What was measured before the first step of the training as it is."""
        return self._begun[Plan()]

    @property
    def base(self) -> Tried:
        return self.tried[NOTHING.name]

    def broken(self, trained: bool) -> str:
        """Say which operation loses the numbers of the training as it is, with its first or its trained parameters; or ""."""
        losses = self.base.outcome.losses
        return self.begun.bad or ("" if np.isfinite(losses).all() else start.breaks(self.runner, losses, trained))

    def tell(self, text: str) -> None:
        """Print a line of progress."""
        self.say(f"[{self.spent:5.1f} s] {text}")

    def measure(self) -> None:
        """Measure the data, the net before its first step, and the run as it is."""
        case, plan = self.case, Plan()
        program = self.runner.prepare(plan)
        self.runner.listen()
        self.evidence = data_symptoms.symptoms(case)
        self.learnable = data_symptoms.learnable(case)
        for line in [e.text for e in self.evidence] + [self.learnable] * bool(self.learnable):
            self.tell(line)
        begun = self.begin(plan)
        found = symptoms.start_symptoms(case, plan, begun)
        program.result()
        for e in found:
            self.tell(e.text)
        outcome = self.train(NOTHING, plan).outcome
        self.evidence += found + run_symptoms.run_symptoms(case, plan, begun, outcome, self.runner.response)
        middle = jax.tree.map(lambda a: a[0], outcome.middle)
        if all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(middle[0])):
            then = start.measured(self.runner, plan, *middle)
            self.idle = run_symptoms.never_used(begun, then)
            params = self.runner.draw(plan, 0)[0]
            sizes = [(path.removesuffix("/value"), np.size(a)) for path, a in tree.rows(params)]
            idle = sum(size for path, size in sizes if path in self.idle)
            self.idle_share = idle / max(1, sum(size for _, size in sizes))
            later = run_symptoms.middle_symptoms(case, begun, then)
            for e in later:
                self.tell(e.text)
            self.evidence += later
        self.evidence.sort(key=lambda e: STAGE[e.cause])

    def attempt(self, change: Change, plan: Plan) -> Tried | None:
        """Train a changed plan; None for a change that this net does not take, which is listed as not tried."""
        try:
            return self.train(change, plan)
        except (
            ValueError,
            TypeError,
            Unreadable,
        ) as error:  # a knob that goes with another one, a score of unknown form
            self.skipped[change.name] = f"refused: {first_line(error):.60}"
            return None

    def train(self, change: Change, plan: Plan) -> Tried:
        """Train a plan and keep what comes out."""
        outcome = self.runner.run(plan, range(self.case.seeds))
        scores = outcome.chooses if plan.learn == "train" else outcome.checks
        done = Tried(change, plan, outcome, tuple(map(float, scores)))
        self.tried[change.name] = done
        self.skipped.pop(change.name, None)
        what = "as it is" if change is NOTHING else change.name
        self.tell(f"{what}: {self.case.task.score} {' '.join(map(shown, done.scores))}")
        return done

    def costs(self, change: Change, plan: Plan) -> float:
        """Foresee the seconds that a change takes: its steps, and a program unless there is one."""
        compiling = 0.0 if self.runner.known(plan) else float(np.mean(self.runner.compiled))
        return self.base.outcome.seconds * change.costs + compiling

    def affords(self, change: Change, plan: Plan) -> bool:
        """Whether the budget allows a change and, after it, to check a repair; otherwise it is listed as not tried."""
        seconds = self.costs(change, plan)
        if self.spent + seconds + 3 * self.base.outcome.seconds <= self.budget:
            return True
        self.skipped[change.name] = f"about {seconds:.0f} s"
        return False

    def search(self, all_of_them: bool = False) -> None:
        """Train every change that the budget allows: those of the present program first, then those of suspects.

        Once a suspect's repair leaves nothing to gain, changes with programs of their own that repair no earlier one cannot
        alter what is named first; they are trained only with `all_of_them`.
        """
        suspects = {e.cause for e in self.evidence}
        every = [
            c for c in changes(self.case, self.runner.response) if "steps" not in c.causes and c.name not in self.tried
        ]
        every = [c for c in every if not c.on_suspicion or suspects & set(c.causes)]
        every.sort(key=lambda c: (c.own_program, not suspects & set(c.causes), c.costs))
        plans, order = {change.name: change.apply(Plan()) for change in every}, list(every)

        def needless(change):
            stages = [STAGE[cause] for cause in suspects & set(change.causes)]
            return not all_of_them and change.own_program and min(stages, default=len(STAGE)) > self.settled(suspects)

        def rank(change):  # a suspect's repair whose program is there first; others run while programs are compiled
            ready, suspect = (
                not change.own_program or self.runner.known(plans[change.name]),
                suspects & set(change.causes),
            )
            stage = min(map(STAGE.__getitem__, change.causes))
            return not (suspect and ready), not ready, not suspect, stage, order.index(change)

        while every:
            every.remove(change := min(every, key=rank))
            if needless(change):
                self.skipped[change.name] = SETTLED
            elif self.affords(change, plans[change.name]):
                self.attempt(change, plans[change.name])
            for later in sorted(every, key=rank):  # compiled by the other thread, while this one trains
                if self.runner.waiting >= 2:
                    break
                costs = 2 * self.costs(later, plans[later.name])
                if later.own_program and not needless(later) and self.spent + costs < self.budget:
                    with contextlib.suppress(ValueError, TypeError, Unreadable):  # it is told when its turn comes
                        self.runner.prepare(plans[later.name])
        self.skipped |= unreached(self.case)

    def lengthen(self) -> None:
        """Train more steps, the dearest change, where no suspect's repair helps."""
        if self.helped():
            self.skipped |= {c.name: "something else helps" for c in changes(self.case) if "steps" in c.causes}
            return
        chance, enough = self.case.task.chance, False
        for change in changes(self.case):
            if "steps" not in change.causes or enough or not self.affords(change, change.apply(Plan())):
                continue
            done = self.attempt(change, change.apply(Plan()))
            rise = 0.0 if done is None else done.mean - self.base.mean
            enough = rise < RISES or self.base.mean + rise > chance + DONE * (1 - chance)

    def helped(self) -> bool:
        """Whether the repair of some suspect, alone or with others, raises the score."""
        strong = {e.cause for e in self.evidence} - WEAK
        most = max((t.mean for t in self.tried.values() if strong & set(t.change.causes)), default=-1.0)
        return most > self.base.mean + margin(self.base.scores)

    def settled(self, suspects: set[str]) -> int:
        """Give the stage of the earliest suspect whose repair comes so close to the best score that none can count for more.

        Without one: a number beyond all stages.
        """
        chance, base = self.case.task.chance, self.base.mean
        if base > chance + 0.8 * (1 - chance):  # another change's rise may be much larger than one that begins there
            return len(STAGE)
        able = [t for t in self.tried.values() if t.mean > chance + DONE * (1 - chance)]
        causes = {cause for t in able for cause in t.change.causes} & (suspects - WEAK)
        return min((STAGE[cause] for cause in causes), default=len(STAGE))

    def best(self) -> float:
        """Give the best mean score of all single changes of the same length."""
        return max(t.mean for t in self.tried.values() if "steps" not in t.change.causes and t.single)

    def together(self, parts: Iterable[Change]) -> Tried | None:
        """Train several changes at once; None where the budget does not allow it."""
        parts = tuple(parts)
        plan = Plan()
        for part in parts:
            plan = part.apply(plan)
        name = " + ".join(part.name for part in parts)
        if name in self.tried:
            return self.tried[name]
        causes = tuple(dict.fromkeys(c for part in parts for c in part.causes))
        costs = float(np.prod([part.costs for part in parts]))
        change = Change(
            name, causes, lambda _: plan, "\n".join(part.code for part in parts), costs=costs, together=parts
        )
        return self.attempt(change, plan) if self.affords(change, plan) else None

    def again(self, plan: Plan) -> Outcome:
        """Train a plan with fresh seeds."""
        if (known := self._fresh.get(plan)) is None:
            known = self._fresh[plan] = self.runner.run(plan, range(self.case.seeds, 2 * self.case.seeds))
        return known

    def begin(self, plan: Plan) -> start.Start:
        """Measure a plan before its first step."""
        if plan not in self._begun:
            self._begun[plan] = start.start(self.runner, plan)
        return self._begun[plan]

    def begun_of(self, plan: Plan) -> start.Start | None:
        """Give what was measured of a plan before its first step, if it was."""
        return self._begun.get(plan)

    _fresh: dict[Plan, Outcome] = field(default_factory=dict)
    _begun: dict[Plan, start.Start] = field(default_factory=dict)

    def shows(self, cause: str, plan: Plan, outcome: Outcome) -> bool:
        """Whether a plan shows the abnormality of a cause."""
        case = self.runner.changed(plan)
        if plan.learn == "held out" and cause in ("label_encoding", "split_mismatch"):
            return False  # one part alone is left
        of_data = cause in ("input_scale", "input_empty", "target_scale", "label_encoding", "split_mismatch")
        if of_data and any(e.cause == cause for e in data_symptoms.symptoms(case)):
            return True
        if cause in STARTS or (cause in ("label_encoding", "loss") and self.begun.reads != Reads()):
            found = self.begin(plan)
            return any(e.cause == cause for e in symptoms.start_symptoms(case, plan, found))
        if cause == "numerics" or (cause == "lr_high" and not np.isfinite(self.base.outcome.losses).all()):
            return not np.isfinite(outcome.losses).all()
        return False


STARTS = {
    "init_symmetric",
    "dead_units",
    "init_small",
    "init_large",
    "head",
    "activation",
    "depth_norm",
    "blocked_gradient",
}
"""Causes that show before the first step."""


def margin(scores: tuple[float, ...]) -> float:
    """Return by how much a score must rise to count; seeds that disagree widely are no yardstick."""
    spread = float(np.std(scores))
    return max(LEAST, 2 * spread) if spread < 0.1 else LEAST
