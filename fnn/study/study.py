"""Depth studies: measure gradients, activations and training of a grid of networks, with theory beside them in one table."""

import collections
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fnn import check, losses
from fnn.gradients.price import Price
from fnn.progress import Progress
from fnn.study import axes, budget, cell, results, spectral
from fnn.study.cell import Cell
from fnn.study.grid import Grid, product
from fnn.study.identity import identify
from fnn.study.nets import Built
from fnn.study.options import Source, about_data, arrays, check_cell, check_functions, check_options, in_files, one_line
from fnn.study.provenance import hash_arrays, session, settings
from fnn.study.spawning import check_spawning
from fnn.study.table import TRACED, facts, left_range, rounded, widened
from fnn.study.task import PARTS, Task, chunked, listed, named, work
from fnn.study.workers import Interrupted, check_executor, compilation_cache, drive, pool, shared
from fnn.tasks import ExampleFunction
from fnn.tree import PyTree

if TYPE_CHECKING:
    import polars

TRAINING = {
    "batch_size": 32,
    "optimizer": "adam",
    "clip": "global_norm",
    "learning_rate": 1e-3,
    "clip_threshold": 1.0,
    "seed": 0,
}
"""Axes that every study has, whatever its `build=`, and their defaults."""
MOST_EXAMPLES = 2**28
"""Examples that a run may train on: their order is drawn beforehand, in 4 bytes each."""
DEFAULT = product(activation=["sigmoid", "tanh", "relu"], norm=["none", "batch_norm"], depth=[4, 16, 64, 128, 256])

__all__ = ["DEFAULT", "TRACED", "TRAINING", "Study", "facts", "left_range", "widened"]


@dataclass(frozen=True)
class Study:
    """Describe a grid of networks and how each is trained; `run` measures them at initialisation and during training.

    The axes of the grid (made with `fnn.grid`: product, zip, chain) are the arguments of `build` and those of `TRAINING`.
    Each combination of static axes (depth, width, activation, norm, residual, init, batch_size, optimizer, clip) is a
    cell: one compiled program, which cells of fnn's own net that differ in their activation share. Traced axes (seed, sigma_w, sigma_b, learning_rate, clip_threshold, and those that `traced`
    names) vary inside the program.

    Networks are measured in train mode on the first `batch_size` training examples, before the first step and at the
    steps that `steps` or `epochs` ask for, and evaluated on all held-out examples. `fnn.results` lists all quantities and
    columns.

    Every axis has one type. Whole numbers and decimals together are floats; traced axes are floats unless their argument
    has an int as default or annotation. Under x64 a study computes in float64, from the same initial weights and data.
    Without, a run whose signal leaves float32 at initialisation is measured there in float64, by a second program; the
    column `float64` says so. What is lost after training steps is NaN.

    Guarantees: the same study gives the same numbers, on CPUs bit for bit, on the same machine, devices and kind of
    executor, also when it is interrupted and resumed (on a GPU last bits may differ: see `train_step`). A run that diverges
    ends only its own record and changes no other run.
    Errors: ValueError and TypeError, before anything runs, for an empty or unknown axis, value or quantity, an argument
    of `build` that has the name of a column, more than a million runs, and functions that return something else than they
    should.
    """

    grid: Grid = DEFAULT
    _: KW_ONLY
    seeds: int | Sequence[int] = 8
    """How many seeds, counted from 0, or a list of seeds. A `seed` axis in the grid is used instead."""
    epochs: int = 3
    """Passes over the training data, each recorded; 0 measures the initialisation alone."""
    steps: int | Sequence[int] | None = None
    """Steps to record, instead of `epochs`; 0 is always among them."""
    data: Source = "digits"
    """A name or path for `data.load`, a pair (x, y) of arrays, frames or lists, or two such pairs: training and held-out
    examples."""
    build: Callable[..., Built] = cell.mlp
    """Any function of axes (and of `classes`, if it has that argument) that returns a Layer, or a pair of functions
    `(init, loss)` of any framework: `init(key, x) -> params`, a tree of floating arrays, x being the measured batch's;
    `loss(params, (x, y)) -> float[]`, the mean over the batch, or `(float[], aux)`. Accuracy is known if aux is a dict that
    holds `accuracy`. A pair has no state and no keys for noise, and held-out examples are judged by the same loss. Traced
    axes are tracers."""
    loss: ExampleFunction = losses.cross_entropy
    """Of single examples; a pair has its own."""
    measure: Mapping[str, Callable[..., PyTree]] = field(default_factory=dict)
    """Your own measurements by name: functions (params, state, batch) -> any tree of numbers, compiled into the
    program. The state is that from before the measured forward pass, and taps in it are as they were at the start: what
    they see is among the study's own quantities. That of a pair is ()."""
    quantities: Sequence[str] | None = None
    """Which quantities to keep, those of `measure` too; by default all except `peak`. `fnn.results` lists them. Those of
    `watch` are measured for Layers too if they are named here. Spectra (sharpness, lambda_c, hessian_trace,
    log10_singular, ntk_condition, ...) are measured only if they are named; `cost` says what they take."""
    traced: Sequence[str] = ()
    """More axes of `build` that do not change the program, only numbers in it."""
    chunk: int | None = None
    """How many runs share one `vmap`; by default chosen from the device's memory, once, and kept with the results."""

    def __post_init__(self):
        if isinstance(self.grid, Mapping):
            object.__setattr__(self, "grid", product(**self.grid))
        if not isinstance(self.grid, Grid):
            raise TypeError(f"study: grid must be a Grid or a dict of axes, got {type(self.grid).__name__}")
        check_options(self)

    def __repr__(self) -> str:
        return one_line(self)

    def cells(self) -> list[Cell]:
        """List the cells in the grid's order, each with its runs, and check every value; chunks are not chosen yet."""
        return self._laid_out()[0]

    def _laid_out(self) -> tuple[list[Cell], dict[str, str]]:
        """Return the cells, and the type of every axis."""
        loaded = arrays(self.data)
        defaults, traced = self._axes()
        if not len(self.grid):
            raise ValueError("study: the grid must hold at least one point, got none; give every axis a value")
        for name in self.grid.axes:
            check.choice("study", defaults, axis=name)
        seeds = (
            {}
            if "seed" in self.grid.axes
            else {"seed": range(self.seeds) if isinstance(self.seeds, int) else self.seeds}
        )
        points = [defaults | point for point in self.grid * product(**seeds)]
        missing = {name: None for point in points for name, v in point.items() if v is inspect.Parameter.empty}
        if missing:
            raise ValueError(f"study: build needs {', '.join(missing)}, got no such axis; add it to the grid")
        hints = axes.hints(self.build) | {"batch_size": int}
        types = {
            name: axes.kind_of(name, (point[name] for point in points), hints.get(name), name in traced)
            for name in defaults
        }
        found: dict[tuple[Any, ...], tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        for point in points:
            # Where a whole number is expected and decimals are among the values (depth 1 and 2.5), `build` gets what was given.
            values = {
                name: value
                if types[name] == "float" and hints.get(name) is int and name not in traced
                else axes.convert(types[name], value)
                for name, value in point.items()
            }
            static = {name: value for name, value in values.items() if name not in traced}
            run = {name: values[name] for name in traced}
            found.setdefault(tuple(static.values()), (static, []))[1].append(run)
        cells = []
        for static, runs in found.values():
            check_cell(self, static, runs, loaded)
            cells.append(Cell(static, tuple(runs), self._steps(static, loaded[0].size)))
        check_functions(self, self._setup(), cells)
        return cells, {name: types[name] for name in (*cells[0].static, *cells[0].runs[0])}

    def describe(self) -> dict[str, Any]:
        """Describe the study as `study.json` will hold it; chunks are 0 where they are not chosen yet."""
        cells, types = self._laid_out()
        loaded = arrays(self.data)
        named = {"build": identify(self.build), "loss": identify(self.loss)}
        measured = {name: identify(function) for name, function in self.measure.items()}
        doubts = {**named, **{f"measure {name}": found for name, found in measured.items()}}
        return {
            "format": results.FORMAT,
            "program": cell.VERSION,
            "axes": {"static": list(cells[0].static), "traced": list(cells[0].runs[0])},
            "types": types,
            "steps": sorted({step for c in cells for step in c.steps}),
            "data": [check.describe(part.x) for part in loaded] + [hash_arrays(loaded)],
            **{name: found.name for name, found in named.items()},
            "measure": {name: found.name for name, found in measured.items()},
            "unpromised": [f"{name} reaches {what}" for name, found in doubts.items() for what in found.doubts],
            **settings(),
            "quantities": None if self.quantities is None else list(self.quantities),
            "cells": [
                {"static": c.static, "runs": list(c.runs), "steps": list(c.steps), "chunk": self.chunk or 0}
                for c in cells
            ],
        }

    def cost(self) -> str | None:
        """Say about how many gradients the spectral quantities take, counted, not measured; None where none is asked for."""
        setup = self._setup()
        return spectral.sentence([(budget.cost(setup, c), len(c.runs) * len(c.steps)) for c in self.cells()])

    def price(self, rounds: int = 5) -> Price:
        """Measure here what each spectral quantity costs beside a gradient of the measured batch, in the first cell's first run.

        See `Price`. Each quantity is compiled on its own, which takes seconds. Errors: ValueError where none is asked for.
        """
        return budget.price(self._setup(), self.cells()[0], rounds)

    def run(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        executor: Executor | None = None,
        workers: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> results.Results:
        """Measure the cells that the folder does not hold yet; return all results. Without a folder they stay in memory.

        Cells run in this process one after the other, in `workers` spawned processes, or on any
        `concurrent.futures.Executor` (Dask: `client.get_executor()`). Tasks name the data's file, in the folder or in the
        system's temporary one, and each worker reads it once; a worker on a machine that cannot read it is sent the data.
        `cache` is a folder for JAX's compiled programs. `progress` shows on standard error how many cells are done,
        running and left; by default only on a terminal.

        Each finished cell is written at once. Running the study again resumes it. A cell's file that is damaged, or belongs
        to another study, is moved aside with a warning, and the cell is measured again. Ctrl-C raises KeyboardInterrupt
        once the cells that workers have begun are finished; a cell that runs in this process is not waited for. Whatever
        is raised while cells run has `.results`, those of the finished cells.

        Errors: those of the study; ValueError for a folder with another study (and how it differs), a damaged description,
        a study to be resumed whose functions have content that cannot be compared, a pool of forked processes, functions
        that worker processes cannot import, and a script without a guard; OSError for a folder that cannot be written.
        """
        if executor is not None:
            check_executor(executor)
        if workers is not None:
            check.positive("study", workers=workers)
        kind = f"{workers} processes" if (workers or 1) > 1 else None
        note = session(kind if executor is None else type(executor).__name__) | about_data(self.data)
        described = self.describe()
        functions = {"build": self.build, "loss": self.loss} | {f"measure {n}": f for n, f in self.measure.items()}
        check_spawning(executor, workers or 1 if len(described["cells"]) > 1 else 1, functions)
        with (
            Progress("cell", len(described["cells"]), progress, first="compiling") as bar,
            compilation_cache(cache),
            results.opened(folder, described, self._with_chunks, note, self.chunk is not None) as found,
        ):
            config = {name: found.description[name] for name in settings()}
            finished = set(found.finished)
            left = [number for number in range(len(found.description["cells"])) if number not in finished]

            if left and (told := self.cost()):
                bar.say(told)
            spent: collections.Counter[str] = collections.Counter()

            def done(task: Task, result: tuple[bytes, dict[str, float]]) -> None:
                found.store(task.number, result[0])
                spent.update(result[1])
                took = "compiled in {compile:.1f} s, ran {run:.1f} s".format(**result[1])
                bar.finish(f"{named(found.description, task.number)}; {took}")

            own = executor is None and workers is not None and workers > 1 and len(left) > 1
            with (
                pool(min(workers or 1, len(left))) if own else nullcontext(executor) as used,
                self._sent(folder, used if left else None) as sent,
            ):
                bar.resume(len(finished))
                if finished:
                    bar.say(
                        f"{len(finished)} of {bar.total} {'cell is' if bar.total == 1 else 'cells are'} there already"
                    )
                tasks = listed(self._setup(), sent, found.description, left, config)
                try:
                    drive(tasks, work, done, used, bar.set_running, lambda task: task._replace(study=self))
                except (Exception, Interrupted) as stop:
                    stop.results = found  # pyright: ignore[reportAttributeAccessIssue]
                    raise
                if spent:
                    bar.say(f"time in all: {', '.join(f'{PARTS[name]} {spent[name]:.1f} s' for name in PARTS)}")
            return found

    @contextmanager
    def _sent(self, folder: str | os.PathLike[str] | None, executor: Executor | None) -> Iterator["Study"]:
        """Make the study that tasks hold: for an executor without its grid, and with the data's arrays in a file."""
        if executor is None:
            yield self
            return
        named = isinstance(self.data, str | os.PathLike) and not in_files(self.data)  # a file may change meanwhile
        with nullcontext(self.data) if named else shared(arrays(self.data), folder) as data:
            yield replace(self, grid=Grid(()), data=data)

    def table(self) -> "polars.DataFrame":
        """Run the study in memory and return its table, a polars frame (`.to_pandas()` makes it one of pandas).

        Warns where numbers are NaN because a signal left the range of the float type, and where rounding grows to its size.
        """
        frame = self.run().table()
        for sentence in filter(None, (left_range(frame), rounded(frame))):
            warnings.warn(sentence, stacklevel=2)
        return frame

    def _axes(self) -> tuple[dict[str, Any], list[str]]:
        """Return the defaults of all axes in column order, and the names of the traced ones."""
        build = axes.arguments(self.build, self.grid.axes)
        own = {name: default for name, default in build.items() if default is not inspect.Parameter.empty}
        defaults = build | TRAINING | own
        if unknown := [name for name in self.traced if name not in build]:
            raise ValueError(f"study: traced must name arguments of build, got {', '.join(unknown)}")
        traced = [name for name in ("seed", *defaults) if name in (*TRACED, *self.traced) and name in defaults]
        return defaults, list(dict.fromkeys(traced))

    def _steps(self, static: Mapping[str, Any], examples: int) -> tuple[int, ...]:
        size = int(static["batch_size"])
        if self.steps is None:
            per_epoch = examples // size
            steps = range(0, (self.epochs + 1) * per_epoch, per_epoch)
        else:
            steps = sorted({0, *([self.steps] if isinstance(self.steps, int) else self.steps)})
        if steps[-1] * size > MOST_EXAMPLES:
            raise ValueError(
                f"study: steps times batch_size must be at most {MOST_EXAMPLES:,}, got {steps[-1]:,} times {size}; choose "
                "fewer steps"
            )
        return tuple(steps)

    def _with_chunks(self, description: dict[str, Any]) -> dict[str, Any]:
        return chunked(self._setup(), description)

    def _setup(self) -> cell.Setup:
        parts = map(cell.widened, arrays(self.data))
        return cell.Setup(self.build, self.loss, dict(self.measure), *parts, quantities=self.quantities)
