"""From evidence and trials to causes: the earliest stage with a measured abnormality whose repair works."""

import numpy as np

from fnn.diagnosis import data_symptoms, run_symptoms, unproved
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import LEAST, STAGE, WEAK, Cause
from fnn.diagnosis.change import Change
from fnn.diagnosis.inquiry import DONE, NOTHING, Inquiry, Tried, margin
from fnn.diagnosis.parts import taught
from fnn.diagnosis.unproved import evidence_of, low

SHARE = 0.7
"""The share of the best rise that a repair must reach."""
FIRST = 3
"""So many suspects are repaired for good, to try all others on top."""
MOST = 4
"""So many changes are tried on top of a repair."""
NEARLY = 0.9
"""A single repair that reaches so much of what a pair does is enough."""
CLOSE = 0.1
"""Of repairs where nothing abnormal was measured, those whose scores differ by less are equally good."""
CLEAR = 0.3
"""The share of the way from the sick score to 1 by which a repair must lift it where nothing abnormal was measured."""
SHORT = 0.2
"""A net whose score is by so much lower than that of nearest neighbours is not healthy."""
FAR = 0.15
"""More steps alone must raise the score by so much to be a cause of their own; less is "not finished"."""


def causes(inquiry: Inquiry, ill: bool) -> list[Cause]:
    """Rank the causes that a repair proves; two faults stand side by side, each with the repair of both."""
    if empty := unproved.named(inquiry, ill, [unproved.empty_inputs]):
        return empty
    working = works(inquiry)
    if not ill:
        near = inquiry.base.mean + FAR
        working = [t for t in working if "steps" not in t.change.causes or t.mean > near]
    found: list[Cause] = []
    for cause in suspects(inquiry):
        able = [t for t in working if cause in t.change.causes]
        # A change tried only where its own fault was measured comes first; to learn held-out data says least of what is wrong.
        able.sort(key=lambda t: (t.plan.learn == "held out", not t.change.on_suspicion))
        for tried in able[:3]:
            if (proved := proof(inquiry, cause, tried)) is not None:
                found.append(proved)
                break
        if len(found) == 3:
            break
    if (
        found
        and found[0].name == "labels"
        and found[0].repair is not None
        and inquiry.tried[found[0].repair.change].plan.learn == "held out"
    ):
        found[1:] = [*_hidden(inquiry), *(c for c in found[1:] if c.name != "split_mismatch")]
    if pair := both(inquiry) or second(inquiry):
        return pair
    if not found and (said := unproved.named(inquiry, ill, unproved.EARLY)):
        return said
    if not found:  # a repair that works, though nothing abnormal was measured
        # A score that is good as it is must rise by more than luck.
        clear = -np.inf if ill else inquiry.base.mean + 2 * margin(inquiry.base.scores)
        able = [t for t in working if t.mean > clear and (t.plan.learn != "held out" or taught(inquiry, t)[2])]
        able = [t for t in able if t.mean >= max(a.mean for a in able) - CLOSE]
        for cause, tried in sorted(((main(inquiry, t), t) for t in able), key=lambda pair: STAGE[pair[0]]):
            if (proved := proof(inquiry, cause, tried)) is not None:
                return [proved]
    return found or unproved.named(inquiry, ill, unproved.LATE)


def main(inquiry: Inquiry, tried: Tried) -> str:
    """Name the cause that a repair stands for where nothing abnormal was measured: the first of its list.

    What redrawn weights repair is named by their size, since equal or dead units would have been measured.
    """
    if tried.plan.gain is None:
        return tried.change.causes[0]
    sizes = np.concatenate([g for _, g in inquiry.begun.gains] or [np.ones(0)])
    return "init_large" if np.mean(sizes > inquiry.case.gain(Plan())) > 0.5 else "init_small"


def _hidden(inquiry: Inquiry) -> list[Cause]:
    """Name held-out data that differ from the training data, which a repair that learns held-out data cannot test."""
    evidence = evidence_of(inquiry, "split_mismatch")
    code = next(
        (t.change.code for t in inquiry.tried.values() if t.plan.data and "split_mismatch" in t.change.causes), ""
    )
    return [Cause("split_mismatch", evidence, None, code, 0.0)] if evidence else []


def suspects(inquiry: Inquiry) -> list[str]:
    """List the causes of which something abnormal was measured, in the order of stages."""
    named = {e.cause for e in inquiry.evidence}
    stage: dict[str, float] = {**STAGE}
    rates = [t.mean for t in _rates(inquiry)]
    adam = [t.mean for t in inquiry.tried.values() if "optimizer" in t.change.causes]
    if any(e.cause == "optimizer" and e != run_symptoms.NO_RATE for e in inquiry.evidence):
        stage["optimizer"] = STAGE["lr_low"] - 0.5  # what a large ε takes from the steps, a larger rate gives back
    elif adam and rates and max(rates) > max(adam) - 0.05:
        named.discard("optimizer")
    longer, larger = (
        [t.mean for t in inquiry.tried.values() if cause in t.change.causes] for cause in ("steps", "capacity")
    )
    if longer and larger and max(longer) > max(larger) - 0.05:  # a larger net learns faster
        named.discard("capacity")
    return sorted(named, key=lambda cause: stage[cause])


def _rates(inquiry: Inquiry) -> list[Tried]:
    """List the trainings in which the rate alone was another one."""
    return [
        t
        for t in inquiry.tried.values()
        if t.single and t.plan.rate != 1 and {"lr_high", "lr_low"} & {*t.change.causes}
    ]


def works(inquiry: Inquiry) -> list[Tried]:
    """List the single changes that raise the score enough, and above chance, the surest first."""
    base, top = inquiry.base, inquiry.best()
    least, floor = margin(base.scores), low(inquiry.case.task.chance)
    if base.outcome.began is not None:
        # A net that is trained less far may only be less spoilt; one that is back where it began is cured.
        spoilt = run_symptoms.spoilt(base.outcome)
        floor = max(floor, float(np.mean(base.outcome.began)) + (-LEAST if spoilt else LEAST))
    found = []
    for tried in inquiry.tried.values():
        rise = tried.mean - base.mean
        enough = max(top, tried.mean) - base.mean
        if (
            tried.change is not NOTHING
            and tried.single
            and rise > least
            and rise >= SHARE * enough
            and tried.mean > floor
        ):
            found.append(tried)
    return sorted(found, key=lambda t: -(min(t.scores) + 0.1 * t.mean))


def proof(inquiry: Inquiry, cause: str, tried: Tried) -> Cause | None:
    """Check a repair with fresh seeds, on data that did not choose it; None if it does not hold, or treats a symptom."""
    sick, cured = inquiry.again(inquiry.base.plan), inquiry.again(tried.plan)
    before = float(np.mean(sick.checks))
    least = margin(tuple(map(float, sick.checks)))
    lifted = float(np.mean(cured.checks > before + least))
    if float(np.mean(cured.checks)) - before <= least or lifted < 0.6:
        return None
    if not evidence_of(inquiry, cause) and (
        lifted < 1  # luck of some seeds
        or min(tried.scores) <= inquiry.base.mean
        or tried.mean - inquiry.base.mean < CLEAR * (1 - inquiry.base.mean)
        or float(np.mean(cured.checks)) - before < CLEAR * (1 - before)
    ):
        return None
    if inquiry.shows(cause, tried.plan, cured):
        return None
    return Cause(cause, evidence_of(inquiry, cause), tried.trial(cause, cured.checks), tried.change.code, lifted)


def both(inquiry: Inquiry) -> list[Cause]:
    """Repair all suspects together; if that is better than each alone, put back one after the other, and name those needed."""
    base, top = inquiry.base, inquiry.best()
    if top > inquiry.case.task.chance + DONE * (1 - inquiry.case.task.chance):
        return []
    strong = [c for c in suspects(inquiry) if c not in WEAK]
    parts: dict[str, Change] = {}
    for cause in strong:
        able = [t for t in inquiry.tried.values() if cause in t.change.causes and t.single]
        if able and not any(p.name == max(able, key=lambda t: t.mean).change.name for p in parts.values()):
            parts[cause] = max(able, key=lambda t: t.mean).change
    rates = _rates(inquiry)
    if {"lr_high", "lr_low"} <= parts.keys():  # they undo each other
        up, down = (max(t.mean for t in rates if cause in t.change.causes) for cause in ("lr_low", "lr_high"))
        for cause, other in (("lr_low", up - down), ("lr_high", down - up)):
            if other < LEAST:
                del parts[cause]
    if len(parts) < 2:
        return []
    whole = inquiry.together(parts.values())
    least = max(top, base.mean) + margin(base.scores)
    rated = {"lr_high", "lr_low"} & parts.keys()
    if whole is not None and len(rated) == 1:  # how far the rate is off shows once the others are repaired
        cause = rated.pop()
        for other in (t.change for t in rates if cause in t.change.causes):
            again = inquiry.together((parts | {cause: other}).values())
            if again is not None and again.mean > whole.mean:
                whole, parts = again, parts | {cause: other}
    if whole is None or whole.mean < least:
        return []
    floor = max(base.mean, inquiry.case.task.chance)
    if top - floor > NEARLY * (whole.mean - floor):
        return []
    for cause in reversed(list(parts)):  # what comes late in training is put back first, and stays if nothing is lost
        rest = {other: part for other, part in parts.items() if other != cause}
        less = inquiry.together(rest.values()) if len(rest) > 1 else None
        if less is not None and less.mean >= max(least, whole.mean - margin(whole.scores)):
            whole, parts = less, rest
    return _proved(inquiry, whole, parts)


def second(inquiry: Inquiry) -> list[Cause]:
    """Repair the first suspect for good, and try the repairs of all the others on top, where nothing alone is nearly enough.

    It is for a first fault that hides the second one: with inputs that are too small no width helps.
    """
    base, task = inquiry.base, inquiry.case.task
    if inquiry.best() > task.chance + 0.7 * (1 - task.chance):
        return []
    every = suspects(inquiry)
    singles = [t for t in inquiry.tried.values() if t.change is not NOTHING and t.single]
    begun = 0
    for cause in [c for c in every if c not in WEAK]:
        able = [t for t in singles if cause in t.change.causes]
        able = [t for t in able if not inquiry.shows(cause, t.plan, t.outcome)]
        if not able or begun == FIRST:
            continue
        first, pairs, begun = max(able, key=lambda t: t.mean), [], begun + 1
        for other in singles:
            if set(other.change.causes) & set(every) and not set(other.change.causes) & set(first.change.causes):
                whole = inquiry.together((first.change, other.change))
                pairs += [(whole, other)] if whole is not None else []
        whole, other = max(pairs, key=lambda pair: pair[0].mean, default=(None, None))
        least = margin(base.scores) if whole is None else max(margin(base.scores), margin(whole.scores))
        if whole is None or other is None or whole.mean < max(first.mean, other.mean, base.mean) + least:
            continue
        named = min(set(other.change.causes) & set(every), key=lambda c: STAGE[c])
        parts = {cause: first.change, named: other.change}
        if found := _proved(inquiry, whole, dict(sorted(parts.items(), key=lambda part: STAGE[part[0]]))):
            return found
    return []


def _proved(inquiry: Inquiry, whole: Tried, parts: dict[str, Change]) -> list[Cause]:
    """Check a repair of several causes with fresh seeds; nothing if it does not hold."""
    sick, cured = inquiry.again(inquiry.base.plan), inquiry.again(whole.plan)
    least = margin(tuple(map(float, sick.checks)))
    after = float(np.mean(cured.checks))
    if after - float(np.mean(sick.checks)) <= least or after <= low(inquiry.case.task.chance):
        return []
    lifted = float(np.mean(cured.checks > np.mean(sick.checks) + least))
    trial = whole.trial(next(iter(parts)), cured.checks)
    return [Cause(cause, evidence_of(inquiry, cause), trial, part.code, lifted) for cause, part in parts.items()]


def adds(inquiry: Inquiry, found: list[Cause], working: list[Tried]) -> dict[str, float]:
    """Measure what the other changes that work add to the score once the cause is repaired; those without a new program."""
    if not found or found[0].repair is None:
        return {}
    cured, gained = inquiry.tried[found[0].repair.change], {}
    for tried in sorted(working, key=lambda t: -t.mean):
        plan = tried.change.apply(cured.plan)
        new = not set(tried.change.causes) & set(cured.change.causes) and inquiry.runner.known(plan)
        if new and len(gained) < MOST and inquiry.spent + tried.outcome.seconds < inquiry.budget:
            more = inquiry.together((*_parts(inquiry, cured), tried.change))
            if more is not None:
                gained[tried.change.name] = more.mean - cured.mean
    return gained


def _parts(inquiry: Inquiry, tried: Tried) -> list[Change]:
    return list(tried.change.together) or [tried.change]


def sick(inquiry: Inquiry, target: float | None) -> bool:
    """Whether the scores themselves show a fault: at chance, below what neighbours know, below the target, or seeds disagree."""
    scores, chance = inquiry.base.scores, inquiry.case.task.chance
    return (
        float(np.mean(scores)) < data_symptoms.within_reach(inquiry.case) - SHORT
        or min(scores) <= low(chance)
        or run_symptoms.spoilt(inquiry.base.outcome)
        or bool(inquiry.begun.unread)
        or run_symptoms.endless(inquiry.base.outcome.losses)
        or bool(inquiry.begun.reads.ignored)
        or (inquiry.begun.unpaired and float(np.mean(scores)) < chance + 0.8 * (1 - chance))
        or not np.isfinite(inquiry.base.outcome.losses[:, -1]).all()
        or float(np.std(scores)) > 0.1
        or (target is not None and float(np.mean(scores)) < target)
    )
