"""The suite `ward`: how often `fnn.diagnose` names the cause of trainings whose fault is known, and of healthy ones none."""

import json
import math
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.report import Section, commit, describe_error
from fnn.diagnosis.case import Case, Plan, case_of
from fnn.diagnosis.causes import STAGE, WEAK
from fnn.diagnosis.changes import changes
from fnn.diagnosis.inquiry import margin
from fnn.diagnosis.trial import Runner
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
OURS, AUTOTRAINER = "fnn", "AUTOTRAINER's rules"
COLUMNS = ("top-1", "top-3", "false alarms", "sick called healthy")


@dataclass
class Record:
    """What was found of one patient or control."""

    name: str
    group: str
    right: list[list[str]] | None
    """Right causes, a list for each fault; None of a control."""
    causes: list[str]
    healthy: bool
    two_faults: bool
    """Whether the diagnosis says so."""
    seconds: float
    base: list[float]
    repaired: list[float]
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Of simpler rules, the first guess first."""
    alarms: dict[str, bool] = field(default_factory=dict)
    holds: bool | None = None
    """Whether the printed remedy reproduces on three fresh seeds; None where there is none, or it was not tried."""
    commit: str = ""
    report: str = ""
    """What was said, of a wrong answer; or the error."""
    trials: dict[str, float] = field(default_factory=dict)
    """The mean score of each change, of a wrong answer."""

    @property
    def ok(self) -> bool:
        if self.right is None:
            return self.healthy
        if len(self.right) > 1:
            return len(self.causes) > 1 and all(set(self.causes[:2]) & set(part) for part in self.right)
        return bool(self.causes) and self.causes[0] in self.right[0]


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Diagnose every patient and control that `--peers` names: groups, or single ones; in an order drawn by chance.

    The tables are given anew after each. With `--resume` those of an earlier file are taken over instead of run again.
    """
    chosen = options.peers or (["public"] if options.quick else list(GROUPS))
    people = [(p.name, p, None) for p in (*ward.PATIENTS, *ward.CONTROLS) if p.name in chosen or _group(p) in chosen]
    if "frameworks" in chosen:
        people += [(f"{n}, {f}", p, f) for n, p in frameworks.REACHED.items() for f in frameworks.NETS]
    random.Random(0).shuffle(people)
    known = {record.name: record for record in earlier(options.resume)}
    records, every = list(known.values()), len(known.keys() | {name for name, *_ in people})
    begun = time.perf_counter()
    for name, person, framework in people:
        if name in known or (options.seconds and time.perf_counter() - begun > options.seconds):
            continue
        try:
            record = written(name, person, framework, options.slack) if framework else diagnosed(person, options.slack)
        except Exception as error:  # it counts as wrong
            group = framework or _group(person)
            record = Record(name, group, _right(person), [], False, False, 0.0, [], [], report=describe_error(error))
        records.append(record)
        say(f"{name}: {_top(record)} ({record.seconds:.0f} s){'' if record.ok else ', wrong'}")
        jax.clear_caches()
        yield from sections(records, every, False)
    yield from sections(records, every, True)


def earlier(path: Path | None) -> list[Record]:
    """Read the records of a file that this suite has written."""
    if path is None:
        return []
    return [Record(**record) for row in json.loads(path.read_text())["rows"] for record in row.get("records", [])]


def sections(records: list[Record], people: int, done: bool) -> Iterator[Section]:
    """Make the tables of some records."""
    data = {"records": [asdict(record) for record in records]}
    said = [f"{len(records)} of {people} were run"] if len(records) < people else []
    yield Section(
        "each",
        ("patient", "top", "right", "seconds", "score as it is", "repaired"),
        list(map(_row, records)),
        said,
        data,
        done,
    )
    yield Section("rules", ("group", "rule", *COLUMNS), _rules(records), [], {}, done)
    others = []
    for group in dict.fromkeys(r.group for r in records):
        if both := [r.ok for r in records if r.group == group and r.right and len(r.right) > 1]:
            others.append((f"{group}, two faults: both named", *_rate(both)))
    if held := [r.holds for r in records if r.holds is not None]:
        others.append(("remedies that hold on three fresh seeds", *_rate(held)))
    seconds = sorted(r.seconds for r in records)
    others.append(("seconds: median, longest", f"{np.median(seconds):.0f}, {seconds[-1]:.0f}", "", ""))
    yield Section("more", ("what", "of", "rate", "95 %"), others, [], {}, done)


def _group(person: Any) -> str:
    return "own" if person in (*ward.OWN_PATIENTS, *ward.OWN_CONTROLS) else "public"


def diagnosed(person: Any, slack: float = 1.0) -> Record:
    """Diagnose one, with `slack` times its budget."""
    case, started = person.make(0), time.perf_counter()
    found = case.diagnose(budget=slack * getattr(person, "budget", 60.0))
    record = _record(person.name, _group(person), person, found, time.perf_counter() - started)
    if record.right is None or len(record.right) == 1:
        problem = autotrainer.answer(case)
        record.answers = simpler(found) | {AUTOTRAINER: sorted(autotrainer.FITS.get(problem or "", set()))}
        record.alarms = _alarms(found) | {AUTOTRAINER: problem is not None}
    if found.causes and found.causes[0].repair is not None:
        record.holds = holds(case, found)
    return record


def written(name: str, person: Any, framework: str, slack: float = 1.0) -> Record:
    """Diagnose the loss of one that is written in a framework."""
    started = time.perf_counter()
    found = frameworks.written(person, framework).diagnose(budget=slack * getattr(person, "budget", 60.0))
    return _record(name, framework, person, found, time.perf_counter() - started)


def _record(name: str, group: str, person: Any, found: Any, seconds: float) -> Record:
    repair = found.causes[0].repair if found.causes else None
    record = Record(
        name, group, _right(person), [cause.name for cause in found.causes], found.healthy, found.two_faults, round(seconds, 1),
        [round(s, 3) for s in found.base.scores], [round(s, 3) for s in repair.scores] if repair else [], commit=commit(),
    )  # fmt: skip
    if not record.ok:
        record.report, record.trials = repr(found), {trial.change: round(trial.mean, 3) for trial in found.trials}
    return record


def _right(person: Any) -> list[list[str]] | None:
    right = getattr(person, "causes", None)
    return None if right is None else list(map(sorted, right if isinstance(right, tuple) else [right]))


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


def _top(record: Record) -> str:
    if record.two_faults:
        return " + ".join(record.causes[:2])
    return record.causes[0] if record.causes else "healthy" if record.healthy else "none found"


def _row(record: Record) -> tuple[str, ...]:
    before, after = (" ".join(f"{s:.2f}" for s in scores) for scores in (record.base, record.repaired))
    right = "healthy" if record.right is None else " + ".join(map(", ".join, record.right))
    return record.name, _top(record), right, f"{record.seconds:.0f}", before, after


def _rules(records: list[Record]) -> list[tuple[str, ...]]:
    """Make a row for each group and rule: k of n, and Wilson's interval, in each column."""
    tally: dict[tuple[str, str], dict[str, list[bool]]] = {}
    for r in records:
        if r.right is not None and len(r.right) > 1:
            tally.setdefault((r.group, OURS), {}).setdefault("sick called healthy", []).append(r.healthy)
            continue
        for rule, said in {OURS: r.causes, **r.answers}.items():
            alarm = not r.healthy if rule == OURS else r.alarms[rule]
            first = set(said) if rule.startswith(("AUTOTRAINER", "always")) else set(said[:1])
            facts = {"false alarms": alarm}
            if r.right is not None:
                three = first | set(said[:3])
                facts = {
                    "top-1": bool(first & set(r.right[0])),
                    "top-3": bool(three & set(r.right[0])),
                    "sick called healthy": not alarm,
                }
            if r.right is not None and rule == OURS:
                facts["sick called healthy"] = r.healthy
            for column, holding in facts.items():
                tally.setdefault((r.group, rule), {}).setdefault(column, []).append(holding)
    rows = []
    for who, columns in tally.items():
        cells = [_rate(columns[c]) if c in columns else ("", "", "") for c in COLUMNS]
        rows.append((*who, *(f"{of} ({interval})" if of else "" for of, _, interval in cells)))
    return rows


def _rate(found: list[bool]) -> tuple[str, str, str]:
    """Return "k of n", the rate, and Wilson's interval."""
    k, n, z = sum(found), len(found), 1.96
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return f"{k} of {n}", f"{k / n:.2f}", f"{max(0, middle - half):.2f} to {min(1, middle + half):.2f}"
