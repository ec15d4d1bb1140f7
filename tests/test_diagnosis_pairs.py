"""Two faults at once: which changes are tried together, and what counts as a proof; scores are given, nothing is trained."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from diagnosed import TEST, TRAIN, case

import fnn
from fnn.diagnosis import data_changes, diagnose, parts, report, run_symptoms, start, trial, verdict
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import Evidence
from fnn.diagnosis.changes import changes
from fnn.diagnosis.inquiry import NOTHING, SETTLED, Inquiry
from fnn.diagnosis.reads import Reads

CASE = case(steps=5, seeds=2)
ARRAYS = 6
BEGUN = start.Start(
    {},
    [],
    [],
    [],
    np.zeros(0),
    1.0,
    False,
    False,
    False,
    [],
    False,
    [],
    Reads(),
    False,
    {},
    1e-7,
    0.0,
    "",
    1.0,
    {},
    None,
)


class Scripted(trial.Runner):
    """Runs nothing: `score(plan, seed)` says what comes out; `plans` lists what was asked for, in order."""

    def __init__(self, made, thread, score):
        super().__init__(made, thread)
        self.score, self.plans, self.compiled = score, [], [0.0]

    def known(self, plan):
        return True

    def prepare(self, plan):
        done = Future()
        done.set_result(None)
        return done

    def run(self, plan, seeds, middle=False):
        self.plans.append(plan)
        scores = np.array([self.score(plan, seed) for seed in seeds])
        lines = np.ones((len(scores), 5)) - scores[:, None] * np.linspace(0, 1, 5)
        middle = ({"w": np.full((1, 2), np.nan)}, {})  # nothing is measured of it
        return trial.Outcome(
            scores, scores, scores, lines, lines, 1e-3 * lines, np.ones((len(scores), ARRAYS)), np.ones(len(scores)), 0.0,
            None, middle,
        )  # fmt: skip


def scaled(plan):
    return data_changes.standardized in plan.data


def inquiry_of(score, *suspects):
    """An inquiry whose single changes have all been tried."""
    with ThreadPoolExecutor(1) as thread:
        made = Inquiry(Scripted(CASE, thread, score), 600.0, lambda text: None)
    made.evidence = [Evidence(cause, "seen") for cause in suspects]
    made.train(NOTHING, Plan())
    for change in changes(CASE):
        if "steps" not in change.causes:
            made.train(change, change.apply(Plan()))
    return made


@pytest.mark.parametrize("needed, cause", [(1000.0, "lr_low"), (0.01, "lr_high")])
def test_how_far_a_rate_is_off_shows_once_the_other_fault_is_repaired(needed, cause):
    """Alone the rate nearest to the given one is the best."""

    def score(plan, seed):
        if scaled(plan):
            return 0.95 if plan.rate == needed else 0.12
        return 0.3 if plan.rate in (10.0, 0.1) and (plan.rate > 1) == (needed > 1) else 0.1

    found = verdict.both(inquiry_of(score, "input_scale", cause))
    assert [c.name for c in found] == ["input_scale", cause]
    assert found[1].remedy == f"learning_rate={0.1 * needed:g}"
    assert f"rate × {needed:g}" in found[0].repair.change and found[0].repair.checked == (0.95, 0.95)


def test_of_two_suspects_the_one_that_is_needed_is_named_alone():
    def score(plan, seed):
        return {(True, 1.0): 0.5, (True, 100.0): 0.9}.get((scaled(plan), plan.rate), 0.1)

    found = verdict.both(inquiry_of(score, "input_scale", "lr_low"))
    assert [c.name for c in found] == ["input_scale", "lr_low"]
    assert not verdict.both(inquiry_of(lambda plan, seed: 0.9 if plan.rate == 10 else 0.1, "input_scale", "lr_low"))


@pytest.mark.parametrize("alone, names", [(0.7, ["input_scale", "lr_low"]), (0.88, [])])
def test_a_repair_that_is_nearly_enough_alone_is_no_half_of_a_pair(alone, names):
    """Chance is 0.1, and both together reach 0.94."""

    def score(plan, seed):
        return {(True, 1.0): alone, (True, 10.0): 0.94}.get((scaled(plan), plan.rate), 0.1)

    assert [c.name for c in verdict.both(inquiry_of(score, "input_scale", "lr_low"))] == names


@pytest.mark.parametrize("few, named", [(0.9, []), (0.1, ["labels"])])
def test_held_out_examples_that_teach_more_only_because_they_are_few_are_no_fault_of_the_labels(few, named):
    """Where nothing was measured: as few training examples must teach less."""

    def score(plan, seed):
        return 0.9 if plan.learn == "held out" else few if parts.fewer in plan.data else 0.1

    made = inquiry_of(score)
    made._begun[Plan()] = BEGUN
    assert [c.name for c in verdict.causes(made, True)] == named


def test_a_single_change_is_one_whatever_it_is_called():
    """The change "depth + 2" was once taken for two changes at once, and never named."""
    made = case(net=lambda depth=1: fnn.models.mlp(depth, 8, 10), steps=5, seeds=2)

    def score(plan, seed):
        return 0.9 if dict(plan.knobs).get("depth") == 3 else 0.3

    with ThreadPoolExecutor(1) as thread:
        asked = Inquiry(Scripted(made, thread, score), 600.0, lambda text: None)
        asked.evidence = [Evidence("capacity", "seen")]
        for change in (NOTHING, *changes(made)):
            asked.train(change, change.apply(Plan()))
        assert all(t.single for t in asked.tried.values())
        asked._begun[Plan()] = BEGUN
        (found,) = verdict.causes(asked, True)
        both = asked.together([changes(made)[0], changes(made)[1]])
    assert (found.name, found.repair.change, found.repair.together) == ("capacity", "depth + 2", ())
    assert not both.single and both.trial("steps").together == tuple(c.name for c in changes(made)[:2])


@pytest.mark.parametrize("before, fresh, holds", [(0.1, 0.9, True), (0.1, 0.12, False), (0.02, 0.13, False)])
def test_a_pair_must_end_above_chance_on_fresh_seeds_too(before, fresh, holds):
    """Chance is 0.1: what rises to it from below is no cure."""

    def score(plan, seed):
        cured = scaled(plan) and plan.rate == 10
        return (0.9 if seed < CASE.seeds else fresh) if cured else before

    assert bool(verdict.both(inquiry_of(score, "input_scale", "lr_low"))) is holds


def test_what_is_tried_on_suspicion_alone_leaves_no_doubt():
    labels = [part._replace(y=(np.asarray(part.y) > 4).astype(np.float32)[:, None]) for part in (TRAIN, TEST)]
    made = case(*labels, fnn.losses.binary_cross_entropy, lambda: fnn.models.mlp(1, 8, 1), steps=5, seeds=2)
    with ThreadPoolExecutor(1) as thread:
        asked = Inquiry(Scripted(made, thread, lambda plan, seed: 0.99), 600.0, lambda text: None)
    asked.train(NOTHING, Plan())
    asked.search()
    assert "targets -1 and 1" in {c.name for c in changes(made)} - asked.tried.keys() and report.decided(asked)
    del asked.tried["rate × 10"]
    assert not report.decided(asked)


SPOILT = [part._replace(x=300 * part.x) for part in (CASE.train, CASE.chooses)]


@pytest.fixture
def found(monkeypatch):
    """A whole diagnosis of inputs that are far too large, with given scores: (scores) -> (Diagnosis, the plans it ran)."""

    def diagnosed(score):
        ran = []

        def runner(made, thread):
            ran.append(Scripted(made, thread, score))
            return ran[0]

        monkeypatch.setattr(diagnose, "Runner", runner)
        monkeypatch.setattr(run_symptoms, "run_symptoms", lambda *_: [Evidence("lr_low", "slow")])
        return diagnose._found(case(*SPOILT, steps=5, seeds=2), 600.0, None, False), ran[0].plans

    return diagnosed


@pytest.mark.parametrize("fresh", [0.97, 0.1])
def test_programs_that_cannot_alter_the_verdict_are_run_only_if_the_proof_fails(fresh, found):
    """On fresh seeds; what needs a program of its own comes behind the inputs' scale, whose repair leaves nothing to gain."""

    def score(plan, seed):
        return (0.97 if seed < CASE.seeds else fresh) if scaled(plan) else 0.1

    diagnosis, plans = found(score)
    assert [c.name for c in diagnosis.causes] == ["input_scale"] * (fresh > 0.9)
    skipped = {name for name, why in diagnosis.not_tried.items() if why == SETTLED}
    own = [plan for plan in plans if plan.optimizer is not None or plan.knobs]
    assert bool(skipped) == (fresh > 0.9) == (not own)


def test_pairs_come_before_more_steps(found):
    """More steps, the dearest change, are trained only where no pair of repairs helps."""

    def pair(plan, seed):
        return 0.9 if scaled(plan) and plan.rate == 100 else 0.1

    def longer(plan, seed):
        return 0.9 if scaled(plan) and plan.steps else 0.1

    diagnosis, plans = found(pair)
    assert {c.name for c in diagnosis.causes} == {"input_scale", "lr_low"}
    assert not any(plan.steps for plan in plans)
    plans = found(longer)[1]
    first = next(i for i, plan in enumerate(plans) if plan.steps)
    assert any(scaled(plan) and plan.rate > 1 for plan in plans[:first])
