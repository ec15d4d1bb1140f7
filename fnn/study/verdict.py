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
GRADIENTS = ("vanishes", "explodes", "keeps its size")
TRAININGS = ("trains", "learns little", "does not learn")


def growth(row: Mapping[str, Any], name: str = "rate") -> float | None:
    """Give the growth of log10 |dL/dh| per layer towards the input; a summary holds the natural log of the square."""
    return None if row.get(name) is None else row[name] / (2 * words.LN10)


def change(row: Mapping[str, Any]) -> float | None:
    """Give log10 of |dL/dh| at layer 1 over that at the last hidden layer; -inf where it is zero there, None if unknown."""
    first, last = row.get("first"), row.get("last")
    if first is None or last is None or math.isnan(first) or not math.isfinite(last):
        return None
    return (first - last) / words.LN10


def gradient(row: Mapping[str, Any]) -> str | None:
    """Judge a network's gradients: one of `GRADIENTS`, or None where they are not known."""
    total = change(row)
    if total is None:
        return None
    return GRADIENTS[2] if abs(total) <= HEALTHY else GRADIENTS[0] if total < 0 else GRADIENTS[1]


def training(accuracy: float | None, chance: float | None) -> str | None:
    """Judge an accuracy against chance: it trains if it comes halfway from chance to 1, and learns little below a tenth."""
    if accuracy is None or chance is None or not 0 < chance < 1:
        return None
    way = (accuracy - chance) / (1 - chance)
    return TRAININGS[0] if way >= 0.5 else TRAININGS[1] if way >= 0.1 else TRAININGS[2]


def heading(s: Summary) -> str:
    """Say what was asked: `Gradients by depth, activation and norm`."""
    axes = [words.axis(name) for name in s.axes]
    return f"Gradients by {words.listed(axes, 6)}" if axes else f"Gradients of {name_of(s, s.networks.row(0, named=True))}"


def sentences(s: Summary, chance: float | None, last: int) -> list[str]:
    """Say what came out, a sentence each: gradients at initialisation, training up to step `last`, runs that diverged, theory."""
    rows = list(s.networks.iter_rows(named=True))
    found = [_gradients(s, rows), *([_trainings(s, rows, chance, last)] if last else []), outside(s)]
    return [sentence for sentence in found if sentence]


def _gradients(s: Summary, rows: Sequence[dict[str, Any]]) -> str:
    kinds = [gradient(row) for row in rows]
    if not any(kinds):
        return "The error signal |dL/dh| was not recorded, or not in two layers, so nothing is said of its growth."
    parts = [
        f"{kind} in {_which(s, rows, [k == kind for k in kinds])}" for kind in GRADIENTS if kind in kinds
    ]
    unknown = kinds.count(None)
    more = f" Of {words.count(unknown, 'network')} it is not known." if unknown else ""
    return (
        f"At initialisation the error signal |dL/dh|, from the last hidden layer to the first, {_semicolons(parts)}. "
        f"(It vanishes or explodes where the median changes more than tenfold.){more}"
    )


def _trainings(s: Summary, rows: Sequence[dict[str, Any]], chance: float | None, last: int) -> str:
    after = f"After {words.count(last, 'step')}"
    kinds = [training(row.get("accuracy"), chance) for row in rows]
    said = ""
    if chance is not None and any(kinds):
        half = (1 + chance) / 2
        verbs = {
            "trains": f"a median held-out accuracy of {half:.2f}, halfway from chance ({chance:.2f}) to 1, is reached by",
            "learns little": "less, but more than a tenth of that way from chance to 1, by",
            "does not learn": "no more than a tenth of that way by",
        }
        parts = [f"{verbs[k]} {_which(s, rows, [kind == k for kind in kinds])}" for k in TRAININGS if k in kinds]
        said = f"{after} {_semicolons(parts)}."
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


def outside(s: Summary) -> str:
    """Say whose numbers lie outside of theory's band more often than 1 in 20; nothing where there is no theory."""
    rows = [row for row in s.networks.iter_rows(named=True) if row.get("outside") is not None]
    if not rows:
        return ""
    off = sorted((row for row in rows if row["outside"] > EXPECTED), key=lambda row: -row["outside"])
    if not off:
        return (
            f"No network with a theory ({len(rows)} of {s.networks.height}) is outside of its band more often than the "
            "expected 5 %."
        )
    names = words.listed([f"{name_of(s, row)} ({row['outside']:.0%})" for row in off])
    return f"Outside of theory's band more often than the expected 5 %: {names}."


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


def _which(s: Summary, rows: Sequence[dict[str, Any]], chosen: Sequence[bool]) -> str:
    """Name some networks, those that differ in depth alone together: `2 of 8 networks (relu, no norm, depth 4 and 32)`."""
    some = [row for row, yes in zip(rows, chosen, strict=True) if yes]
    if len(rows) == 1:
        return "the only network"
    if len(some) == len(rows):
        return f"all {len(rows)} networks"
    groups: dict[str, list[str]] = {}
    rest = [name for name in s.axes if name != "depth"]
    for row in some:
        key = name_of(s, row, rest) if rest else ""
        groups.setdefault(key, []).extend([words.value(row["depth"])] if "depth" in s.axes else [])
    names = [
        ", ".join(filter(None, [key, f"depth {words.listed(depths, 9)}" if depths else ""]))
        for key, depths in groups.items()
    ]
    if len(names) > 5:
        names = [*names[:4], f"{len(names) - 4} more kinds"]
    return f"{len(some)} of {len(rows)} networks ({'; '.join(names)})"


def _semicolons(parts: Sequence[str]) -> str:
    return "; ".join(parts)

