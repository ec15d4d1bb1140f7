"""Depth studies: a grid of networks in; gradients, activations and training out, beside the theory, in one tidy table."""

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from fnn import cell, check, data, losses, results, table
from fnn.cell import Cell
from fnn.grid import Grid, product
from fnn.provenance import digest, function_name, kind_of, session
from fnn.table import TRACED, left_range, summarize
from fnn.workers import Interrupted, Progress, check_executor, compilation_cache, drive, pool

TRAINING = {
    "batch_size": 32,
    "optimizer": "adam",
    "clip": "global_norm",
    "learning_rate": 1e-3,
    "clip_threshold": 1.0,
    "seed": 0,
}
"""Axes that every study has, whatever its `build=`, and their defaults."""
DEFAULT = product(activation=["sigmoid", "tanh", "relu"], norm=["none", "batch_norm"], depth=[4, 16, 64, 128, 256])

__all__ = ["DEFAULT", "TRACED", "TRAINING", "Study", "left_range", "summarize"]


class Task(NamedTuple):
    """What a worker needs to measure a cell: no more than can be sent to another machine."""

    study: "Study"
    number: int
    cell: Cell
    axes: dict[str, str]
    identity: str


@dataclass(frozen=True)
class Study:
    """Describe a grid of networks to be measured at initialisation and at steps of training; `run` measures it.

    Axes of the grid (`fnn.grid`: product, zip, chain) are the arguments of `build` and those of `TRAINING`. Static ones
    (depth, width, activation, norm, residual, init, batch_size, optimizer, clip) make a cell each: one compiled
    program. Traced ones (seed, sigma_w, sigma_b, learning_rate, clip_threshold, and what `traced` names) run inside it.

    Measured on the first `batch_size` training examples in train mode, before the first step and after those that
    `steps` or `epochs` ask for; evaluated on all held-out examples. Quantities and columns: `fnn.results`.

    Guarantees: the same study gives the same numbers, bit for bit, on the same machine, devices and kind of executor,
    whatever is interrupted and resumed; a run that diverges ends its own record and changes no other.
    Errors: ValueError and TypeError, before anything runs, for an empty or unknown axis or value or quantity.
    """

    grid: Grid = DEFAULT
    _: KW_ONLY
    seeds: int | Sequence[int] = 8
    """How many seeds, from 0; or which. A `seed` axis in the grid wins."""
    epochs: int = 3
    """Passes over the training data, each recorded; 0 measures the initialisation alone."""
    steps: int | Sequence[int] | None = None
    """The recorded steps instead, 0 always among them."""
    data: Any = "digits"
    """A name or path for `data.load`, a pair (x, y), or a pair of such pairs: training and held-out examples."""
    build: Callable[..., Any] = cell.mlp
    """Any function from axes (and `classes`, if it asks) to a Layer; traced axes reach it as tracers."""
    loss: Callable[[Any, Any], Any] = losses.cross_entropy
    measure: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Measurements of one's own, by name: (params, state, batch) -> any tree of numbers, run inside the program."""
    quantities: Sequence[str] | None = None
    """Which to keep; all by default."""
    traced: Sequence[str] = ()
    """Further axes of `build` that do not change the program."""
    chunk: int | None = None
    """Runs that share one `vmap`; by default chosen from the device's memory, once, and kept with the results."""

    def __post_init__(self):
        if isinstance(self.grid, Mapping):
            object.__setattr__(self, "grid", product(**self.grid))
        if not isinstance(self.grid, Grid):
            raise TypeError(f"study: grid must be a Grid or a dict of axes, got {type(self.grid).__name__}")
        for name in ("quantities", "traced"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else value and tuple(value))
        _check_options(self)

    def cells(self) -> list[Cell]:
        """Lay out the cells in the grid's order, each with its runs, and check every value; chunks are not chosen."""
        loaded = _load(self.data)
        defaults, traced = self._axes()
        if not len(self.grid):
            raise ValueError("study: the grid must hold at least one point, got none; give every axis a value")
        for name in self.grid.axes:
            check.choice("study", defaults, axis=name)
        seeds = {} if "seed" in self.grid.axes else {"seed": self._seeds()}
        found: dict[tuple[Any, ...], tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        for point in self.grid * product(**seeds):
            values = defaults | point
            missing = [name for name, value in values.items() if value is inspect.Parameter.empty]
            if missing:
                raise ValueError(f"study: build needs {', '.join(missing)}, got no such axis; add it to the grid")
            static = {name: value for name, value in values.items() if name not in traced}
            run = {name: values[name] for name in traced}
            found.setdefault(tuple(static.values()), (static, []))[1].append(run)
        cells = []
        for static, runs in found.values():
            _check_cell(self, static, runs, loaded)
            cells.append(Cell(static, tuple(runs), self._steps(static, loaded[0].size)))
        _check_quantities(self, cells[0])
        return cells

    def describe(self) -> dict[str, Any]:
        """Describe the study as JSON will hold it; chunks are 0 where they are yet to be chosen."""
        cells = self.cells()
        names = list(dict.fromkeys((*cells[0].static, *cells[0].runs[0])))
        values = {n: [c.static[n] if n in c.static else r[n] for c in cells for r in c.runs] for n in names}
        loaded = _load(self.data)
        return {
            "format": results.FORMAT,
            "axes": {"static": list(cells[0].static), "traced": list(cells[0].runs[0])},
            "types": {name: kind_of(name, column) for name, column in values.items()},
            "steps": sorted({step for c in cells for step in c.steps}),
            "data": [check.describe(part.x) for part in loaded] + [digest(loaded)],
            "build": function_name(self.build),
            "loss": function_name(self.loss),
            "measure": {name: function_name(function) for name, function in self.measure.items()},
            "quantities": None if self.quantities is None else list(self.quantities),
            "cells": [
                {"static": c.static, "runs": list(c.runs), "steps": list(c.steps), "chunk": self.chunk or 0}
                for c in cells
            ],
        }

    def run(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        executor: Executor | None = None,
        workers: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> results.Results:
        """Measure what the folder does not hold yet; return all results. Without a folder they stay in memory.

        Cells run here one after the other; in `workers` spawned processes; or on any `concurrent.futures.Executor`
        (Dask: `client.get_executor()`). `cache` is a folder for JAX's compiled programs. `progress` shows cells done,
        running and left on standard error, by default on a terminal only.

        Each finished cell is written at once, whole; run again, the study goes on where it was. Errors: those of the
        study; ValueError for a folder with another study (and how it differs), for a damaged description, a pool of
        forked processes; OSError for a folder that cannot be written: what is finished stays. A cell's file that is
        damaged or foreign is set aside, with a warning, and the cell is measured again. Ctrl-C raises
        KeyboardInterrupt when the cells in flight are finished; one that runs here is not waited for. What is raised
        while cells run has `.results`, those that are finished.
        """
        if executor is not None:
            check_executor(executor)
        if workers is not None:
            check.positive("study", workers=workers)
        kind = (
            type(executor).__name__ if executor is not None else f"{workers} processes" if (workers or 1) > 1 else None
        )
        show = sys.stderr.isatty() if progress is None else progress
        with (
            compilation_cache(cache),
            results.opened(folder, self.describe(), self._with_chunks, session(kind), self.chunk is not None) as found,
        ):
            identity, axes = results.key(found.description), found.description["types"]
            finished = set(found.finished)
            tasks = [
                Task(self, number, Cell(c["static"], tuple(c["runs"]), tuple(c["steps"]), c["chunk"]), axes, identity)
                for number, c in enumerate(found.description["cells"])
                if number not in finished
            ]

            def done(task: Task, result: tuple[bytes, dict[str, float]]) -> None:
                found.store(task.number, result[0])
                bar.finish(_name(found.description, task.number), result[1])

            own = executor is None and workers is not None and workers > 1 and len(tasks) > 1
            with (
                Progress(len(found.description["cells"]), len(finished), show) as bar,
                pool(min(workers or 1, len(tasks))) if own else nullcontext(executor) as used,
            ):
                try:
                    drive(tasks, work, done, used, bar.set_running)
                except (Exception, Interrupted) as stop:
                    stop.results = found  # pyright: ignore[reportAttributeAccessIssue]
                    raise
            return found

    def table(self) -> Any:
        """Run the study in memory and return its table: polars; `.to_pandas()` makes it pandas.

        Warns where numbers are NaN because a signal left the range of the float type.
        """
        frame = self.run().table()
        if sentence := left_range(frame):
            warnings.warn(sentence, stacklevel=2)
        return frame

    def _axes(self) -> tuple[dict[str, Any], list[str]]:
        """Return the defaults of all axes in column order, and the names of the traced ones."""
        build = {name: default for name, default in cell.accepts(self.build).items() if name != "classes"}
        own = {name: default for name, default in build.items() if default is not inspect.Parameter.empty}
        defaults = build | TRAINING | own
        if unknown := [name for name in self.traced if name not in build]:
            raise ValueError(f"study: traced must name arguments of build, got {', '.join(unknown)}")
        traced = [name for name in ("seed", *defaults) if name in (*TRACED, *self.traced) and name in defaults]
        return defaults, list(dict.fromkeys(traced))

    def _seeds(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    def _steps(self, static: Mapping[str, Any], examples: int) -> tuple[int, ...]:
        if self.steps is None:
            per_epoch = examples // int(static["batch_size"])
            return tuple(epoch * per_epoch for epoch in range(self.epochs + 1))
        steps = [self.steps] if isinstance(self.steps, int) else self.steps
        return tuple(sorted({0, *steps}))

    def _with_chunks(self, description: dict[str, Any]) -> dict[str, Any]:
        """Choose the chunks that are yet to be chosen."""
        setup, cells = self._setup(), []
        for c in description["cells"]:
            chunk = c["chunk"] or cell.chunk_size(setup, Cell(c["static"], tuple(c["runs"]), tuple(c["steps"])))
            cells.append({**c, "chunk": chunk})
        return {**description, "cells": cells}

    def _setup(self) -> cell.Setup:
        return cell.Setup(self.build, self.loss, dict(self.measure), *_load(self.data))


def work(task: Task) -> tuple[bytes, dict[str, float]]:
    """Measure a cell, in whatever process this is: the bytes of its Parquet file, and the seconds that it took."""
    study = task.study
    try:
        setup = study._setup()
        measured = cell.measure(setup, task.cell)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(
            f"study: cell {task.number} must fit into the device's memory, got {task.cell.chunk} runs at once; use a "
            "smaller chunk or batch size"
        ) from None
    frame = table.build(
        task.number,
        task.cell,
        measured,
        axes=task.axes,
        quantities=study.quantities,
        inputs=np.asarray(setup.train.x[: task.cell.static["batch_size"]]) if study.build is cell.mlp else None,
    )
    note = {"study": task.identity, "cell": task.number, "seconds": measured.seconds}
    return results.pack(frame, note), measured.seconds


def _check_options(study: Study) -> None:
    if isinstance(study.seeds, int):
        check.positive("study", seeds=study.seeds)
    check.non_negative("study", epochs=study.epochs)
    steps = [study.steps] if isinstance(study.steps, int) else study.steps or []
    for step in steps:
        check.non_negative("study", steps=step)
    if study.chunk is not None:
        check.positive("study", chunk=study.chunk)
    if taken := [name for name in study.measure if name in table.QUANTITIES]:
        raise ValueError(f"study: a measurement needs a name of its own, got {taken[0]!r}; choose another")


def _check_quantities(study: Study, first: Cell) -> None:
    known = {*table.QUANTITIES, *study.measure}
    if study.quantities and not known.issuperset(study.quantities):  # the net may have parameters of other names
        names = cell.parameter_names(study._setup(), first)
        known |= {pattern.format(name) for name in names for pattern in ("log_{}", "log_{}_rms")}
        for quantity in study.quantities:
            check.choice("study", sorted(known), quantity=quantity)


def _check_cell(study: Study, static: dict[str, Any], runs: Sequence[dict[str, Any]], loaded: Any) -> None:
    train = loaded[0]
    check.positive("study", batch_size=static["batch_size"])
    if static["batch_size"] > train.size:
        got = static["batch_size"]
        raise ValueError(f"study: batch_size must be at most the {train.size} training examples, got {got}")
    for run in runs:
        check.non_negative("study", seed=run["seed"])
        check.above_zero("study", learning_rate=run["learning_rate"], clip_threshold=run["clip_threshold"])
        for name in ("sigma_w", "sigma_b"):
            if name in run and not (isinstance(run[name], int | float) and 0 <= run[name] < np.inf):
                raise ValueError(f"study: {name} must be finite and at least 0, got {run[name]!r}")
    setup = cell.Setup(study.build, study.loss, {}, *loaded)
    cell.network(setup, static, runs[0])
    cell.optimizer(static, runs[0])


@functools.lru_cache(maxsize=4)
def _named(name: str) -> tuple[data.Dataset, data.Dataset]:
    return data.load(name, key=jax.random.key(0))


def _load(source: Any) -> tuple[data.Dataset, data.Dataset]:
    """Return training and held-out examples; a lone pair (x, y) is both."""
    if isinstance(source, str | os.PathLike):
        parts = _named(os.fspath(source))
    else:
        try:
            first, second = source
            parts = (source, source) if hasattr(first, "shape") else (first, second)
            parts = tuple(data.Dataset(*pair) for pair in parts)
        except (TypeError, ValueError):
            raise TypeError(
                f"study: data must be a name, a pair (x, y), or ((x, y), (x, y)), got {type(source).__name__}"
            ) from None
    for part in parts:
        data.check_dataset("study", *part)
    return parts[0], parts[1]


def _name(description: dict[str, Any], number: int) -> str:
    """Name a cell by the axes that vary."""
    cells = description["cells"]
    static = cells[number]["static"]
    varying = [name for name in static if len({str(c["static"][name]) for c in cells}) > 1] or list(static)[:3]
    words = (static[n] if isinstance(static[n], str) else f"{n.replace('_', ' ')} {static[n]}" for n in varying)
    return ", ".join(words)
