"""What a study found, in sentences: whose gradients vanish or explode, who trains, where theory is off.

The terminal and the page print these same sentences.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fnn.study import words
from fnn.study.summary import Summary

HEALTHY = 1.0
"""log10: an error signal that changes by less than a factor of 10 over the hidden layers keeps its size."""
EXPECTED = 0.05
"""Share of numbers outside of a band that holds 19 of 20."""
GRADIENTS = ("vanishes", "explodes", "keeps its size", "is zero")
TRAININGS = ("trains", "learns little", "does not learn", "diverges")


def change(row: Mapping[str, Any]) -> float | None:
    """Give log10 of |dL/dh| at layer 1 over that at the last hidden layer; -inf where it is zero there, None if unknown."""
    first, last = row.get("log10_first"), row.get("log10_last")
    if first is None or last is None or math.isnan(first) or not math.isfinite(last):
        return None
    return first - last


def gradient(row: Mapping[str, Any]) -> str | None:
    """Judge a network's gradients: one of `GRADIENTS`, or None where they are not known."""
    if row.get("log10_last") == -math.inf:  # in the layer from which it comes
        return GRADIENTS[3]
    total = change(row)
    if total is None:
        return None
    return GRADIENTS[2] if abs(total) <= HEALTHY else GRADIENTS[0] if total < 0 else GRADIENTS[1]


def training(row: Mapping[str, Any], chance: float | None) -> str | None:
    """Judge a network's training: one of `TRAININGS`, or None where there is no accuracy to compare with chance.

    It diverges if more than half of its runs end in what is not finite; it trains if its accuracy comes halfway from chance
    to 1, and does not learn below a tenth of that way.
    """
    if 2 * (row.get("diverged") or 0) > row["seeds"]:
        return TRAININGS[3]
    accuracy = row.get("accuracy")
    if accuracy is None or chance is None or not 0 < chance < 1:
        return None
    way = (accuracy - chance) / (1 - chance)
    return TRAININGS[0] if way >= 0.5 else TRAININGS[1] if way >= 0.1 else TRAININGS[2]


def heading(s: Summary) -> str:
    """Say what was asked: `Gradients by depth, activation and norm`."""
    axes = [words.axis(name) for name in s.axes]
    return (
        f"Gradients by {words.listed(axes, 9)}" if axes else f"Gradients of {name_of(s, s.networks.row(0, named=True))}"
    )


def sentences(s: Summary, chance: float | None, last: int) -> list[str]:
    """Say what came out, a sentence each: gradients at initialisation, training up to step `last`, runs that diverged, theory."""
    rows = list(s.networks.iter_rows(named=True))
    found = [_gradients(s, rows), *([_trainings(s, rows, chance, last)] if last else []), outside(s)]
    return [sentence for sentence in found if sentence]


def _gradients(s: Summary, rows: Sequence[dict[str, Any]]) -> str:
    kinds = [gradient(row) for row in rows]
    if not any(kinds):
        return "The error signal |dL/dh| was not recorded, or not in two layers, so nothing is said of its growth."
    parts = _counted(s, rows, kinds, [(kind, f"{kind} in {{}}", f"{kind} in {{}}") for kind in GRADIENTS])
    unknown = kinds.count(None)
    more = f" Of {words.count(unknown, 'network')} it is not known." if unknown else ""
    return (
        f"At initialisation the error signal |dL/dh|, from the last hidden layer to the first, {parts}. (It vanishes or "
        f"explodes where its median changes more than tenfold.){more}"
    )


def _trainings(s: Summary, rows: Sequence[dict[str, Any]], chance: float | None, last: int) -> str:
    after = f"After {words.count(last, 'step')}"
    kinds = [training(row, chance) for row in rows]
    said = ""
    if chance is not None and any(kinds):
        verbs = [("trains", "{} train", "{} trains"), ("learns little", "{} learn little", "{} learns little")]
        verbs += [("does not learn", "{} do not learn", "{} does not learn"), ("diverges", "{} diverge", "{} diverges")]
        half, tenth = (chance + share * (1 - chance) for share in (0.5, 0.1))
        said = (
            f"{after} {_counted(s, rows, kinds, verbs)}. (It trains: its median held-out accuracy is at least {half:.2f}, "
            f"halfway from chance, {chance:.2f}, to 1. It does not learn: less than {tenth:.2f}, a tenth of the way.)"
        )
    return " ".join(filter(None, [said, diverged(s)]))


def diverged(s: Summary) -> str:
    """Say which runs ended because loss or gradient was not finite; nothing where that was not recorded."""
    rows = [row for row in s.networks.iter_rows(named=True) if row.get("diverged") is not None]
    bad = [row for row in rows if row["diverged"]]
    if not bad:
        return "No run ended in a loss or gradient that is not finite." if rows else ""
    runs = sum(row["diverged"] for row in bad)
    names = words.listed([f"{name_of(s, row)} ({row['diverged']} of {row['seeds']})" for row in bad])
    return f"{words.count(runs, 'run')} ended in a loss or gradient that is not finite: {names}."


def percent(row: dict[str, Any]) -> str:
    """Write which share of a network's numbers lies outside of theory's band, `12%`; "" where there is no theory."""
    return "" if row["outside"] is None else f"{row['outside']:.0%}"


def outside(s: Summary) -> str:
    """Say whose numbers lie outside of theory's band more often than 1 in 20; nothing where there is no theory.

    A seed's numbers lie outside together, so that some networks are among these by chance: how many, if all numbers of a
    seed did so, is said too.
    """
    from scipy.special import bdtr

    rows = [row for row in s.networks.iter_rows(named=True) if row.get("outside") is not None]
    if not rows:
        return ""
    off = sorted((row for row in rows if row["outside"] > EXPECTED), key=lambda row: -row["outside"])
    if not off:
        has = "the only network" if s.networks.height == 1 else f"{len(rows)} of {s.networks.height} networks"
        return f"Theory has a band for {has}; none lies outside of it more often than the expected 5%."
    names = words.listed([f"{name_of(s, row)} ({percent(row)})" for row in off])
    # P(more than floor(seeds/20) of the seeds lie outside), which is what it takes.
    chance = sum(1 - bdtr(math.floor(EXPECTED * row["seeds"]), row["seeds"], EXPECTED) for row in rows)
    return (
        f"Outside of theory's band more often than the expected 5%: {names}; {len(off)} of {len(rows)}. By chance one "
        f"expects up to {round(chance)}, in clusters, since networks share their seeds."
    )


def name_of(s: Summary, row: Mapping[str, Any], axes: Iterable[str] | None = None) -> str:
    """Name a network by the axes that vary: `tanh, batch norm, depth 64`."""
    names = list(s.shown() if axes is None else axes)
    whole = s.fixed | dict(row)
    return ", ".join(label(name, whole[name]) for name in names) or "the network"


def label(name: str, value: Any) -> str:
    """Name one value of an axis: `tanh`, `batch norm`, `no norm`, `depth 64`, `not residual`."""
    if value is None or (name, value) == ("norm", "none"):
        return f"no {words.axis(name)}"
    if isinstance(value, bool):
        return words.axis(name) if value else f"not {words.axis(name)}"
    if isinstance(value, str) and name in ("activation", "norm", "optimizer"):
        return words.value(value)
    return f"{words.axis(name)} {words.value(value)}"


def _counted(
    s: Summary, rows: Sequence[dict[str, Any]], kinds: Sequence[str | None], phrases: Sequence[tuple[str, str, str]]
) -> str:
    """Count networks of each kind, and name them: `vanishes in 1 of 8 networks (relu, depth 32); explodes in 2 (...)`.

    `phrases` are (kind, in the plural, in the singular). The largest kind has no names where all others have.
    """
    there = [phrase for phrase in phrases if phrase[0] in kinds]
    largest = max(there, key=lambda phrase: kinds.count(phrase[0]))[0]
    parts = []
    for i, (kind, plural, singular) in enumerate(there):
        some = [row for row, k in zip(rows, kinds, strict=True) if k == kind]
        n, total = len(some), len(rows)
        phrase = singular if n == 1 else plural
        if n == total:
            return phrase.format("the only network" if n == 1 else "both networks" if n == 2 else f"all {n} networks")
        number = f"{n} of {total} networks" if i == 0 else f"{n}"
        unnamed = kind == largest and n > 3 and None not in kinds
        if unnamed and i == len(there) - 1:
            number = f"the other {n}"
        parts.append(phrase.format(number) + ("" if unnamed else f" ({_names(s, some)})"))
    return "; ".join(parts)


def _names(s: Summary, some: Sequence[dict[str, Any]]) -> str:
    """Name some networks, those that differ in depth alone together: `relu, no norm, depth 4 and 32; tanh, depth 4`."""
    groups: dict[str, list[str]] = {}
    rest = [name for name in s.axes if name != "depth"]
    for row in some:
        key = name_of(s, row, rest) if rest else ""
        groups.setdefault(key, []).extend([words.value(row["depth"])] if "depth" in s.axes else [])
    names = [
        ", ".join(filter(None, [key, f"depth {words.listed(depths, 9)}" if depths else ""]))
        for key, depths in groups.items()
    ]
    return "; ".join(names if len(names) <= 5 else [*names[:4], f"and {len(names) - 4} more kinds"])
