"""`summary`: what a net consists of, layer by layer, without drawing a parameter or computing a number."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from fnn import admission, check, tree
from fnn.core import Layer
from fnn.gradients import program
from fnn.inside import WATCHER
from fnn.masks import Masked

if TYPE_CHECKING:
    import polars

WIDTH = 80
_NUMBER = itertools.count()
"""Of the scopes that say, in a traced program, which layer an operation belongs to."""


class Row(NamedTuple):
    """One layer of a net."""

    path: str
    """Where its parameters are; `[:]` stands for all blocks of a `repeat`."""
    layer: str
    output: str
    """Shape and dtype; of one block."""
    parameters: int
    """Of all blocks, as are bytes and FLOPs."""
    bytes: int
    flops: float
    times: int
    """Number of blocks that the row stands for."""
    again: bool
    """Whether the same layer object stands in another place too, with parameters of its own there."""


@dataclass(frozen=True, repr=False)
class Summary:
    """What `summary` found: `rows`, a `Row` for each layer, and totals. `print` shows a table, `table()` makes one of polars."""

    rows: list[Row]
    input: str
    output: str
    parameters: int
    bytes: int
    flops: float
    state: int
    """Numbers in the net's state: running statistics, taps."""
    again: list[tuple[str, list[str]]]
    """Layer objects with parameters that stand in several places outside of `[block] * n`: (layer, paths)."""

    def table(self) -> "polars.DataFrame":
        """Make a polars DataFrame with the fields of `Row` as columns; where polars is not installed, a list of dicts."""
        rows = [row._asdict() for row in self.rows]
        try:
            import polars
        except ImportError:
            return rows  # pyright: ignore[reportReturnType]
        return polars.DataFrame(rows)

    def __repr__(self) -> str:
        return (
            f"Summary({len(self.rows)} layers, {self.input} -> {self.output}, {self.parameters:,} parameters, "
            f"{self.bytes:,} bytes, {_short(self.flops)} FLOPs)"
        )

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("path", "layer", "output", "parameters", "bytes", "FLOPs")]
        for row in self.rows:
            name = f"{row.times}× " * (row.times > 1) + row.layer
            numbers = map(_short, (row.parameters, row.bytes, row.flops))
            lines.append((row.path + "*" * row.again, name, _plain(row.output), *numbers))
        totals = map(_short, (self.parameters, self.bytes, self.flops))
        lines.append(("total", "", _plain(self.output), *totals))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        widths[:3] = _fitted(widths[:3], WIDTH - sum(widths[3:]) - 2 * 5)
        shown = ["  ".join(_cells(line, widths)).rstrip() for line in lines]
        rule = "-" * max(map(len, shown))
        said = [f"input {self.input}; state {self.state:,} numbers", _COUNTED]
        for layer, paths in self.again:
            said.append(f"* {_cut(layer, 30)}: one object, parameters of its own in each place")
            said.append(f"  {_cut(', '.join(paths), 51)}; see fnn.shared")
        return "\n".join([shown[0], rule, *shown[1:-1], rule, shown[-1], *(_cut(line, WIDTH) for line in said)])


_COUNTED = "FLOPs: one forward pass, 2 for each multiply-add of products and convolutions"


def summary(net: Layer, spec: tree.PyTree) -> Summary:
    """List a net's layers: path, layer, output, parameters, their bytes, and FLOPs; nothing is drawn or computed.

        print(fnn.summary(net, train.x[:64]))

    `spec` is an example batch or its `jax.ShapeDtypeStruct`: an array, a dict of several inputs, `Masked`. FLOPs are those
    of one forward pass of that batch in eval mode, counted in the traced program: 2 for each multiply-add of matrix
    products and convolutions, with the zeros that pad a convolution; sums, norms and activations are not counted. A loop
    counts once for each turn, a `repeat` of n blocks n times; NaN is a loop whose turns are not known.

    Rows are the layers that combinators of fnn hold; a combinator of your own is one row. Parameters that a combinator
    itself has (`tied`, `shared`) are a row with its path. So rows add up to the totals. A layer object with parameters
    that stands in several places, other than in a row as in `[block] * n`, is marked: each place has parameters of its
    own (`fnn.shared` ties them). Errors: those of the net.
    """
    admission.net("summary", net)
    spec = admission.example("summary", spec)
    params, state = jax.eval_shape(lambda key: net.init(key, spec), jax.random.key(0))
    recorder = _Recorder()

    def apply(params, state, x):
        with recorder("", net, params, x, 1) as seen:
            y, new = net.apply(params, state, x)
            seen(y)
        return y, new

    token = WATCHER.set(recorder)
    try:
        closed, _ = program.trace(apply, params, state, spec)
    finally:
        WATCHER.reset(token)
    recorder.count(program.flops(closed))
    root, again = recorder.visits[0], recorder.again()
    return Summary(
        list(recorder.rows({path for _, paths in again for path in paths})),
        _shape(spec),
        root.output,
        tree.size(params),
        _bytes(params),
        sum(visit.flops for visit in recorder.visits),
        tree.size(state),
        again,
    )


@dataclass
class _Visit:
    """One application of a layer inside the net."""

    number: int
    path: str
    layer: Layer
    parent: "_Visit | None"
    parameters: int
    bytes: int
    times: int
    output: str = ""
    flops: float = 0.0
    children: dict[str, "_Visit"] = field(default_factory=dict)


class _Recorder:
    """Sees each layer as it is applied, and marks its operations by a scope."""

    def __init__(self):
        self.visits: list[_Visit] = []
        self._inside: list[_Visit] = []

    @contextmanager
    def __call__(self, name: str, layer: Layer, params: Any, x: Any, times: int) -> Iterator[Callable[[Any], None]]:
        parent = self._inside[-1] if self._inside else None
        path = name if parent is None or not parent.path else f"{parent.path}/{name}"
        times *= parent.times if parent else 1
        size, memory = tree.size(params) * times, _bytes(params) * times
        visit = _Visit(next(_NUMBER), path, layer, parent, size, memory, times)
        self.visits.append(visit)
        self._inside.append(visit)
        if parent is not None:
            parent.children.setdefault(path, visit)

        def seen(y):
            visit.output = _shape(y)

        try:
            with jax.named_scope(f"fnn#{visit.number}"):
                yield seen
        finally:
            self._inside.pop()

    def count(self, found: Iterator[tuple[str, float]]) -> None:
        """Give the FLOPs of every product to the layer in whose scope it is."""
        visits = {visit.number: visit for visit in self.visits}
        for where, n in found:
            numbers = [int(number) for number in re.findall(r"fnn#(\d+)", where)]
            visits[next((number for number in reversed(numbers) if number in visits), self.visits[0].number)].flops += n

    def rows(self, again: set[str]) -> Iterator[Row]:
        """Yield a row for each layer without layers inside, and for each other one with something of its own."""
        first: dict[str, _Visit] = {}
        flops: dict[str, float] = {}
        for visit in self.visits:
            first.setdefault(visit.path, visit)
            flops[visit.path] = flops.get(visit.path, 0) + visit.flops
        for path, visit in first.items():
            inner = visit.children.values()
            parameters = visit.parameters - sum(child.parameters for child in inner)
            memory = visit.bytes - sum(child.bytes for child in inner)
            if not inner or parameters or flops[path]:
                name = repr(visit.layer)
                yield Row(path, name, visit.output, parameters, memory, flops[path], visit.times, path in again)

    def again(self) -> list[tuple[str, list[str]]]:
        """Find layer objects with parameters in several places; of a block that is in a row, `[block] * n`, the first counts."""
        places: dict[int, list[_Visit]] = {}
        before: dict[str, _Visit] = {}  # the newest layer inside each
        known: set[int] = set()
        for visit in self.visits:
            around = visit.parent.path if visit.parent else ""
            last, before[around] = before.get(around), visit
            row = last is not None and last.parent is visit.parent and last.layer.init is visit.layer.init
            if row or (visit.parent and visit.parent.number in known):
                known.add(visit.number)
                continue
            found = places.setdefault(id(visit.layer.init), [])
            if visit.parameters and visit.path not in [other.path for other in found]:
                known.update([visit.number] if found else [])  # what is inside it is there again too
                found.append(visit)
        return [(repr(found[0].layer), [v.path for v in found]) for found in places.values() if len(found) > 1]


def _shape(x: Any) -> str:
    if isinstance(x, Masked):
        return f"{check.describe(x.values)} masked"
    return check.describe(jax.tree.map(lambda a: a, x, is_leaf=lambda a: isinstance(a, Masked)))


def _bytes(params: Any) -> int:
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(params))


def _short(n: float) -> str:
    """Write a number in at most seven signs."""
    if math.isnan(n):
        return "?"
    if n < 1e5:
        return f"{n:,.0f}"
    for unit, size in (("K", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if n < 999.95 * size:
            return f"{n / size:.4g}{unit}"
    return f"{n:.4g}"


def _plain(shape: str) -> str:
    return shape.replace("float32[", "[")


def _fitted(widths: list[int], room: int) -> list[int]:
    """Narrow columns until all fit into the room: first the layer, then the output, then the path."""
    path, layer, output = widths
    layer = max(min(layer, 20), min(layer, room - path - output))
    output = max(min(output, 14), min(output, room - path - layer))
    return [min(path, room - layer - output), layer, output]


def _cells(line: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
        kept = cell if len(cell) <= width else f"…{cell[1 - width :]}" if i == 0 else _cut(cell, width)
        yield kept.ljust(width) if i < 3 else kept.rjust(width)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
