"""The suite `ward`: how often `fnn.diagnose` names the cause of trainings whose fault is known, and of healthy ones none."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.report import Section
from fnn.diagnosis.causes import STAGE
from tests import ward

ABOUT = """\
Each patient differs from a healthy training in one thing (two, where two causes stand in its row), and is diagnosed with its
budget. `top` is the first cause named; right are the causes that `tests/ward` lists. `top-3`: a right cause is among the
first three. `remedy`: on the fresh seeds of the check, the repaired score beats the sick one on each. Beside it stand simpler
rules on the same measurements: the earliest abnormality without any repair (measuring), the change with the largest gain
(intervening), always the learning rate, and the best rate of a sweep. Intervals are Wilson's, 95 %."""
GROUPS = {
    "public": "the published patients and controls",
    "own": "patients and controls that were written before the diagnosis was tuned",
}
NAMES = GROUPS | {p.name: "patient" for p in ward.PATIENTS} | {c.name: "healthy control" for c in ward.CONTROLS}


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Diagnose every patient and control that `--peers` names: groups, or single ones."""
    chosen = options.peers or (["public"] if options.quick else list(GROUPS))
    people = [p for p in (*ward.PATIENTS, *ward.CONTROLS) if p.name in chosen or _group(p) in chosen]
    rows, tallies = [], {}
    for person in people:
        row, facts = diagnosed(person)
        say(f"{person.name}: {row[1]} ({row[3]} s)")
        rows.append(row)
        for name, holds in facts.items():
            tallies.setdefault(name, []).append(holds)
    yield Section("each", ("patient", "top", "right", "seconds", "score as it is", "repaired"), rows, [])
    yield Section("rates", ("what", "of", "rate", "95 %"), [_rate(name, found) for name, found in tallies.items()], [])


def _group(person: Any) -> str:
    return "own" if person in (*ward.OWN_PATIENTS, *ward.OWN_CONTROLS) else "public"


def diagnosed(person: Any) -> tuple[tuple[str, ...], dict[str, bool]]:
    """Diagnose one; return its row, and what holds of it by name of the tally."""
    case, started = person.make(0), time.perf_counter()
    found = case.diagnose(budget=getattr(person, "budget", 60.0))
    seconds = time.perf_counter() - started
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
    right, group = getattr(person, "causes", None), _group(person)
    repair = found.causes[0].repair if found.causes else None
    facts: dict[str, bool] = {}
    if right is None:
        facts[f"{group} controls: false alarm"] = not found.healthy
    elif isinstance(right, tuple):
        facts[f"{group}, two faults: both named"] = len(names) > 1 and all(set(names[:2]) & part for part in right)
    else:
        simple = simpler(found)
        facts[f"{group}: top-1"] = bool(names) and names[0] in right
        facts[f"{group}: top-3"] = bool(set(names[:3]) & right)
        facts |= {f"{group}: {name}": bool(set(said) & right) for name, said in simple.items()}
    if right is not None:
        facts[f"{group}: sick and called healthy"] = found.healthy
    if repair is not None:
        facts["remedies that hold on all fresh seeds"] = min(repair.checked) > np.mean(found.base.scores)
    said = "healthy" if right is None else _said(right)
    scores = (
        " ".join(f"{s:.2f}" for s in found.base.scores),
        " ".join(f"{s:.2f}" for s in repair.scores) if repair else "",
    )
    return (person.name, top, said, f"{seconds:.0f}", *scores), facts


def simpler(found: Any) -> dict[str, list[str]]:
    """What simpler rules would say of the same measurements."""
    rates = [t for t in found.trials if t.change.startswith("rate")]
    best = max(rates, key=lambda t: t.mean, default=None)
    gain = max(found.trials, key=lambda t: t.mean, default=None)
    measured = sorted({e.cause for e in found.evidence}, key=lambda cause: STAGE[cause])
    return {
        "measuring alone": measured[:1],
        "intervening alone": [gain.cause] if gain is not None else [],
        "always the learning rate": ["lr_high", "lr_low"],
        "best of a rate sweep": [best.cause] if best is not None and best.mean > found.base.mean + 0.03 else [],
    }


def _said(right: Any) -> str:
    return " + ".join(map(_said, right)) if isinstance(right, tuple) else ", ".join(sorted(right))


def _rate(name: str, found: list[bool]) -> tuple[str, ...]:
    k, n, z = sum(found), len(found), 1.96
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return name, f"{k} of {n}", f"{k / n:.2f}", f"{max(0, middle - half):.2f} to {min(1, middle + half):.2f}"
