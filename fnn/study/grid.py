"""Grids of a study: a point is a dict of axis values; grids can be chained (+) and multiplied (*).

product(depth=[4, 16], activation=["tanh", "relu"])            four points
zip(depth=[4, 16], learning_rate=[1e-2, 1e-3])                 two points: the axes advance together
chain(product(norm=["none"], ...), product(norm=["batch_norm"], ...))      the points of both, one after the other
zip(depth=[4, 16], width=[64, 32]) * product(sigma_w=span("0.5:2.5:9"))    every pair of points, merged
"""

import builtins
import itertools
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

Value = str | int | float | bool | None
Point = dict[str, Value]
T = TypeVar("T")
MOST = 1_000_000
"""Points of a grid, or values of an axis. More are refused before any list is made."""


@dataclass(frozen=True, eq=False, repr=False)
class Grid:
    """Hold the points of a study in order: an immutable sequence of {axis: value}.

    `a * b` merges every point of a with every one of b (they may not share an axis); `a + b` appends b's points to a's. A
    point that comes twice is kept once. 1 and 1.0 are the same value, 1 and true are not.

    Errors: ValueError for more than `MOST` points, before any list is made.
    """

    points: Sequence[Point]

    def __post_init__(self):
        object.__setattr__(self, "points", tuple({_key(point): dict(point) for point in self.points}.values()))

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and list(map(_key, self)) == list(map(_key, other))

    def __hash__(self) -> int:
        return hash(tuple(map(_key, self)))

    def __mul__(self, other: "Grid") -> "Grid":
        shared = sorted(set(self.axes) & set(other.axes))
        if shared:
            raise ValueError(f"grid: a product needs axes that differ, got {', '.join(shared)} twice; use + or zip")
        _bounded(len(self) * len(other))
        return Grid([{**a, **b} for a in self.points for b in other.points])

    def __add__(self, other: "Grid") -> "Grid":
        _bounded(len(self) + len(other))
        return Grid((*self.points, *other.points))

    @property
    def axes(self) -> list[str]:
        """Names of all axes, in order of appearance."""
        return list(dict.fromkeys(name for point in self.points for name in point))

    def __repr__(self) -> str:
        return f"Grid({len(self)} points over {', '.join(self.axes) or 'no axis'})"


def product(**axes: Iterable[Value] | Value) -> Grid:
    """Make a point of every combination of values; the last axis varies fastest. A single value is an axis of one.

    Errors: ValueError for an empty axis, or more than `MOST` points; TypeError for a value that is no string, number or
    bool.
    """
    lists = {name: _values(name, values) for name, values in axes.items()}
    _bounded(math.prod(map(len, lists.values())))
    return Grid([dict(builtins.zip(lists, values, strict=True)) for values in itertools.product(*lists.values())])


def zip(**axes: Iterable[Value]) -> Grid:
    """Let axes advance together: the i-th point holds the i-th value of each.

    Errors: ValueError for axes of different length, and as in `product`.
    """
    lists = {name: _values(name, values) for name, values in axes.items()}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise ValueError(
            f"grid: zipped axes must have the same number of values, got {got}; use product for every pair"
        )
    return Grid([dict(builtins.zip(lists, row, strict=True)) for row in builtins.zip(*lists.values(), strict=True)])


def chain(*grids: Grid) -> Grid:
    """Join grids one after the other; a point that comes twice is kept once."""
    return sum(grids, start=Grid(()))


def span(text: str) -> list[Value]:
    """Read the values of an axis: `4,16,64`, `tanh,relu`, `0.5:2.5:9` (evenly spaced, ends included), or a mix.

    `1e-4:1e-1:4:log` spaces them by equal ratios. Numbers become int or float, `true` and `false` bool.
    Errors: ValueError for a malformed range, or more than `MOST` values.
    """
    values: list[Value] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        values += _range(word) if ":" in word else [_number(word)]
        _bounded(len(values), "an axis", "values")
    return values


class Recipe(NamedTuple):
    """A study read from a TOML file."""

    grid: Grid
    options: dict[str, Any]
    """Everything at the top level: seeds, epochs, steps, data, ..."""


def from_toml(path: str | Path) -> Recipe:
    """Read a study from a TOML file: options at the top, and a `[[grid]]` table for each grid of a chain.

        seeds = 8
        epochs = 3
        [[grid]]
        depth = [4, 16]
        activation = "tanh,relu"
        sigma_w = "0.5:2.5:9"
        [[grid]]
        depth = [32, 64]
        width = [64, 32]
        zip = ["depth", "width"]

    Axes named in `zip` advance together, the others multiply; strings are read as on the command line (`span`).
    Errors: FileNotFoundError; ValueError for bad TOML, an empty axis, or a `zip` of unknown axes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"study: the file must exist, got {str(path)!r}; check its spelling")
    try:
        options = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"study: {path} must be TOML, got an error: {error}; correct it there") from None
    tables = options.pop("grid", [])
    tables = [tables] if isinstance(tables, dict) else tables
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"study: grid in {path} must be [[grid]] tables of axes, got {tables!r}")
    return Recipe(chain(*(_table(table) for table in tables)), words(options))


def words(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the words of a study's options besides its axes: lists of epochs, steps and quantities."""
    found = dict(options)
    for name in ("epochs", "steps"):
        if isinstance(found.get(name), str):
            values = span(found[name])
            found[name] = values[0] if len(values) == 1 else values
    if isinstance(names := found.get("quantities"), str):
        found["quantities"] = tuple(name.strip() for name in names.split(","))
    return found


def from_axes(axes: Mapping[str, Sequence[Value]], zipped: Sequence[str] = ()) -> Grid:
    """Make the product of axes, where those named in `zipped` advance together."""
    if not all(isinstance(name, str) for name in zipped):
        raise TypeError(f"grid: zip must name axes, got {zipped!r}; write their names as strings")
    if unknown := [name for name in zipped if name not in axes]:
        raise ValueError(
            f"grid: zip must name axes of this grid, got {', '.join(unknown)}; there are {', '.join(axes)}"
        )
    free = product(**{name: values for name, values in axes.items() if name not in zipped})
    return free * zip(**{name: axes[name] for name in zipped}) if zipped else free


def _table(table: dict[str, Any]) -> Grid:
    zipped = table.pop("zip", [])
    zipped = [zipped] if isinstance(zipped, str) else zipped
    axes = {name: span(values) if isinstance(values, str) else values for name, values in table.items()}
    return from_axes({name: _values(name, values) for name, values in axes.items()}, zipped)


def _values(name: str, values: Any) -> list[Value]:
    single = isinstance(values, str | Mapping) or not isinstance(values, Iterable) or getattr(values, "shape", 1) == ()
    values = [values] if single else listed(name, values)
    if not values:
        raise ValueError(f"study: {name} must name at least one value, got none; give values such as {name}=[...]")
    return [_plain(name, value) for value in values]


def listed(name: str, values: Iterable[T]) -> list[T]:
    """Make a list of the values of an axis or option, and refuse more than `MOST` before there is one."""
    _bounded(len(values) if isinstance(values, Sized) else 0, name, "values")
    values = list(itertools.islice(values, MOST + 1))
    _bounded(len(values), name, "values")
    return values


def _bounded(count: int, what: str = "a grid", unit: str = "points") -> None:
    if count > MOST:
        got = f"{count:,}" if count < 10**15 else "far more"
        raise ValueError(
            f"study: {what} must have at most {MOST:,} {unit}, got {got}; choose fewer, or split the study"
        )


def _key(point: Mapping[str, Value]) -> tuple[Any, ...]:
    """Tell points apart whatever their order; Python takes true for 1."""
    return tuple(sorted((name, isinstance(value, bool), value) for name, value in point.items()))


def _plain(name: str, value: Any) -> Value:
    value = value.item() if getattr(value, "shape", None) == () else value  # of NumPy or JAX
    if not isinstance(value, str | bool | int | float | None):
        raise TypeError(
            f"study: a value of {name} must be a string, number or bool, got {type(value).__name__}; "
            "give it a name, and let build= look it up"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"study: {name} must be finite, got {value}; choose a finite value")
    return value


def _range(word: str) -> list[Value]:
    parts = word.split(":")
    try:
        if len(parts) not in (3, 4) or parts[3:] not in ([], ["log"]):
            raise ValueError
        low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
        if count < 1 or not (math.isfinite(low) and math.isfinite(high)) or (parts[3:] and min(low, high) <= 0):
            raise ValueError
    except ValueError:
        raise ValueError(f"study: a range must read low:high:count or low:high:count:log, got {word[:80]!r}") from None
    _bounded(count, f"the range {word[:80]!r}", "values")
    space = np.geomspace if parts[3:] else np.linspace
    # Twelve digits: 0.5:2.5:9 gives 1.1, not 1.1000000000000001, which would be another study.
    points = [float(f"{value:.12g}") for value in space(low, high, count)]
    whole = all(point.is_integer() for point in points) and not {".", "e"} & set(word.lower())
    return [int(point) if whole else point for point in points]


def _number(word: str) -> Value:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
