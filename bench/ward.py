"""The suite `ward`: how often `fnn.diagnose` names the cause of trainings whose fault is known, and of healthy ones none."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bench.report import Section
from fnn.diagnosis.case import Case, Plan, case_of
from fnn.diagnosis.causes import STAGE
from fnn.diagnosis.changes import changes
from fnn.diagnosis.inquiry import margin
from fnn.diagnosis.trial import Runner
from fnn.diagnosis.verdict import WEAK
from tests import ward
from tests.ward import autotrainer, frameworks

ABOUT = """\
Each patient differs from a healthy training in one thing (two, where two causes stand in its row), and is diagnosed with its
budget. `top` is the first cause named; right are the causes that `tests/ward` lists. `top-1`: the first cause named is right;
`top-3`: one of the first three is. `false alarm`: a cause named, or doubt raised, of a healthy control. `sick called healthy`:
nothing said of a patient. Simpler rules stand beside it, on the same measurements: the earliest abnormality without any
repair (measuring alone), the change with the largest gain (intervening alone), always the learning rate, the best rate of a
sweep; and the rules of AUTOTRAINER, with the thresholds of its paper, whose five problems count as right if one of the causes
that they fit is. `remedies`: the printed one raises the score on each of three seeds that neither chose nor checked it.
Intervals are Wilson's, 95 %."""
GROUPS = {
    "public": "the published patients and controls",
    "own": "patients and controls that were written before the diagnosis was tuned",
    "frameworks": "those of them that `fnn.diagnose_loss` can reach, in plain JAX, Equinox and NNX",
}
NAMES = GROUPS | {p.name: "patient" for p in ward.PATIENTS} | {c.name: "healthy control" for c in ward.CONTROLS}
OURS = "fnn"
COLUMNS = ("top-1", "top-3", "false alarms", "sick called healthy")

Tally = dict[tuple[str, str, str], list[bool]]
"""(group, rule, column) -> what held, of each."""


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Diagnose every patient and control that `--peers` names: groups, or single ones."""
    chosen = options.peers or (["public"] if options.quick else list(GROUPS))
    people = [p for p in (*ward.PATIENTS, *ward.CONTROLS) if p.name in chosen or _group(p) in chosen]
    rows, tally, more = [], {}, {}
    for person in people:
        row = diagnosed(person, tally, more)
        say(f"{person.name}: {row[1]} ({row[3]} s)")
        rows.append(row)
    if "frameworks" in chosen:
        for name, person in frameworks.REACHED.items():
            for framework in frameworks.NETS:
                row = written(name, person, framework, tally)
                say(f"{row[0]}: {row[1]} ({row[3]} s)")
                rows.append(row)
    yield Section("each", ("patient", "top", "right", "seconds", "score as it is", "repaired"), rows, [])
    yield Section("rules", ("group", "rule", *COLUMNS), _rules(tally), [])
    others = [(name, *_rate(found)) for name, found in more.items()]
    seconds = sorted(float(row[3]) for row in rows)
    others.append(("seconds: median, longest", f"{np.median(seconds):.0f}, {seconds[-1]:.0f}", "", ""))
    yield Section("more", ("what", "of", "rate", "95 %"), others, [])


def _group(person: Any) -> str:
    return "own" if person in (*ward.OWN_PATIENTS, *ward.OWN_CONTROLS) else "public"


def diagnosed(person: Any, tally: Tally, more: dict[str, list[bool]]) -> tuple[str, ...]:
    """Diagnose one; return its row, and count what holds of it."""
    case, started = person.make(0), time.perf_counter()
    found = case.diagnose(budget=getattr(person, "budget", 60.0))
    seconds = time.perf_counter() - started
    right, group, names = getattr(person, "causes", None), _group(person), [cause.name for cause in found.causes]
    if isinstance(right, tuple):
        both = len(names) > 1 and all(set(names[:2]) & part for part in right)
        more.setdefault(f"{group}, two faults: both named", []).append(both)
        tally.setdefault((group, OURS, "sick called healthy"), []).append(found.healthy)
    else:
        alarms = {OURS: not found.healthy, **_alarms(found)}
        answers = {OURS: names, **simpler(found)}
        problem = autotrainer.answer(case)
        answers["AUTOTRAINER's rules"] = sorted(autotrainer.FITS.get(problem, set()))
        alarms["AUTOTRAINER's rules"] = problem is not None
        for rule, said in answers.items():
            first = set(said) if rule.startswith(("AUTOTRAINER", "always")) else set(said[:1])
            _count(tally, (group, rule), right, (first, set(said[:3]) | first), alarms[rule])
    if found.causes and found.causes[0].repair is not None:
        more.setdefault("remedies that hold on three fresh seeds", []).append(holds(case, found))
    return _row(person.name, found, right, seconds)


def written(name: str, person: Any, framework: str, tally: Tally) -> tuple[str, ...]:
    """Diagnose the loss of one that is written in a framework; return its row."""
    started = time.perf_counter()
    found = frameworks.written(person, framework).diagnose(budget=getattr(person, "budget", 60.0))
    right, names = getattr(person, "causes", None), [cause.name for cause in found.causes]
    _count(tally, (framework, OURS), right, (set(names[:1]), set(names[:3])), not found.healthy)
    return _row(f"{name}, {framework}", found, right, time.perf_counter() - started)


def _count(tally: Tally, who: tuple[str, str], right: Any, said: tuple[set[str], set[str]], alarm: bool) -> None:
    facts = {"false alarms": alarm}
    if right is not None:
        facts = {"top-1": bool(said[0] & right), "top-3": bool(said[1] & right), "sick called healthy": not alarm}
    for column, holding in facts.items():
        tally.setdefault((*who, column), []).append(holding)


def holds(case: Any, found: Any) -> bool:
    """Whether the repair raises the score on each of three seeds that were not used yet, on the half of the data that checks."""
    given = case_of(
        case.build, case.loss, case.optimizer, case.train, case.validation, batch_size=case.batch_size, steps=case.steps,
        seeds=3, shuffle=case.shuffle,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as thread:
        runner = Runner(given, thread)
        sick, cured = (runner.run(plan, range(100, 103)).checks for plan in (Plan(), repaired(given, found)))
    return bool(np.min(cured) > np.mean(sick) + margin(tuple(map(float, sick))))


def repaired(case: Case, found: Any) -> Plan:
    """Make the plan that the repair of a diagnosis names."""
    known, plan = {change.name: change for change in changes(case)}, Plan()
    for name in found.causes[0].repair.change.split(" + "):
        plan = known[name].apply(plan)
    return plan


def simpler(found: Any) -> dict[str, list[str]]:
    """What simpler rules would say of the same measurements, the first guess first."""
    single = [t for t in found.trials if " + " not in t.change]
    rates = sorted((t for t in single if t.change.startswith("rate")), key=lambda t: -t.mean)
    gains = sorted(single, key=lambda t: -t.mean)
    measured = sorted({e.cause for e in found.evidence}, key=lambda cause: (cause in WEAK, STAGE[cause]))
    risen = [t for t in rates if t.mean > found.base.mean + margin(found.base.scores)]
    return {
        "measuring alone": measured,
        "intervening alone": list(dict.fromkeys(t.cause for t in gains)),
        "always the learning rate": ["lr_high", "lr_low"],
        "best of a rate sweep": list(dict.fromkeys(t.cause for t in risen)),
    }


def _alarms(found: Any) -> dict[str, bool]:
    """Whether the simpler rules say that something is wrong."""
    best = max((t.mean for t in found.trials if " + " not in t.change), default=-1.0)
    return {
        "measuring alone": bool({e.cause for e in found.evidence} - WEAK),
        "intervening alone": best > found.base.mean + margin(found.base.scores),
        "always the learning rate": True,
        "best of a rate sweep": bool(simpler(found)["best of a rate sweep"]),
    }


def _row(name: str, found: Any, right: Any, seconds: float) -> tuple[str, ...]:
    names = [cause.name for cause in found.causes]
    top = (
        " + ".join(names[:2])
        if found.two_faults
        else names[0]
        if names
        else "healthy"
        if found.healthy
        else "none found"
    )
    repair = found.causes[0].repair if found.causes else None
    before, after = (
        " ".join(f"{s:.2f}" for s in scores) for scores in (found.base.scores, repair.scores if repair else ())
    )
    return name, top, "healthy" if right is None else _said(right), f"{seconds:.0f}", before, after


def _said(right: Any) -> str:
    return " + ".join(map(_said, right)) if isinstance(right, tuple) else ", ".join(sorted(right))


def _rules(tally: Tally) -> list[tuple[str, ...]]:
    rows = []
    for group, rule in dict.fromkeys(key[:2] for key in tally):
        cells = [_rate(tally[group, rule, c]) if (group, rule, c) in tally else ("", "", "") for c in COLUMNS]
        rows.append((group, rule, *(f"{of} ({interval})" if of else "" for of, _, interval in cells)))
    return rows


def _rate(found: list[bool]) -> tuple[str, str, str]:
    """Return "k of n", the rate, and Wilson's interval."""
    k, n, z = sum(found), len(found), 1.96
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return f"{k} of {n}", f"{k / n:.2f}", f"{max(0, middle - half):.2f} to {min(1, middle + half):.2f}"
