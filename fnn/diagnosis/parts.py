"""Whether training and held-out data fit together: what is learnt from equally few examples of either of them."""

from dataclasses import replace

import numpy as np

from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.causes import Evidence, shown
from fnn.diagnosis.inquiry import Inquiry, Tried, margin
from fnn.diagnosis.repeats import different

CLEAR = 0.15
"""A score must be higher by so much to be clearly better."""
SAID = {"labels", "label_encoding", "split_mismatch", "order"}
"""Causes by which held-out data alone teach more; one that was measured needs no other proof."""


def judged(inquiry: Inquiry) -> list[Evidence]:
    """Put what sets training and held-out data apart in place of too little data, where fewer held-out examples teach more.

    A net that learns m held-out examples is scored on the rest of them. Where it does clearly better than one that learns
    the n > m training examples, and better than one that learns m of these, no lack of examples explains that. If m training
    examples teach the others of their own part, the two parts differ; if they do not, training labels are wrong.
    """
    case, evidence = inquiry.case, inquiry.evidence
    alone = next((t for t in inquiry.tried.values() if t.plan == Plan(learn="held out")), None)
    few = any(e.cause == "too_little_data" for e in evidence)
    if alone is None or not few or not case.held_out or case.chooses.size >= different(case.train.x):
        return evidence
    before, after = (float(np.mean(t.outcome.checks)) for t in (inquiry.base, alone))
    if after - max(before, case.task.chance) <= max(CLEAR, margin(inquiry.base.scores)):
        return evidence
    across, within, more = taught(inquiry, alone)
    if not more:
        return evidence
    rest = [e for e in evidence if e.cause != "too_little_data"]
    if SAID & {e.cause for e in rest}:
        return rest
    text = (
        f"score on held-out examples {shown(after)} by learning {case.chooses.size} others of them, {shown(before)} by learning "
        f"{case.train.size} training examples; on training examples {shown(within)} by learning as few others of them"
    )
    fits = within >= across + 0.5 * (after - across)
    return [Evidence("split_mismatch" if fits else "labels", text), *rest]


def taught(inquiry: Inquiry, alone: Tried) -> tuple[float, float, bool]:
    """Learn as few training examples as `alone` learns held-out ones: the scores on held-out and on training examples.

    The last is whether held-out examples teach clearly more than they do with any seed; else it is their number that helps, or
    how often each is seen.
    """
    case = inquiry.case
    same = inquiry.runner.run(Plan(data=(fewer,), shuffle=True), range(case.seeds))
    across, within = float(np.mean(same.checks)), float(np.mean(same.chooses))
    after = float(np.mean(alone.outcome.checks))
    best = max(float(np.max(same.checks)), case.task.chance)
    return across, within, after - best > max(CLEAR, margin(inquiry.base.scores))


def fewer(case: Case) -> Case:
    """Learn as few training examples as there are held-out ones to choose with, and choose with others of them; sizes stay."""
    n, m = case.train.size, case.chooses.size
    rows = np.random.default_rng(0).permutation(n)
    cut = min(m, n // 2)
    train, chooses = (case.train.take(np.resize(part, size)) for part, size in ((rows[:cut], n), (rows[cut:], m)))
    return replace(case, train=train, chooses=chooses).with_x(lambda part, a: a)  # and what a guess costs
