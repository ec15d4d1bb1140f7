"""The tasks of a study, one a cell: what a worker needs, which of them share a program, and what it does with one."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fnn import losses
from fnn.layers.activations import TABLE
from fnn.study import budget, cell, expected, nets, program, results, table
from fnn.study.cell import Cell, Setup
from fnn.study.provenance import configured

PARTS = {
    "draw": "drawing weights",
    "compile": "compiling",
    "run": "training and measuring",
    "tables": "making tables",
}
"""What a cell's seconds go to."""


class Task(NamedTuple):
    """What a worker needs to measure a cell; it can be pickled and sent to another machine."""

    study: Any
    """For executors without its grid, and with the name of a file in place of its arrays."""
    number: int
    cell: Cell
    activations: tuple[str, ...]
    """Those that share this cell's program; see `program.Setup`."""
    axes: dict[str, str]
    identity: str
    settings: dict[str, Any]
    """JAX's, as the study's description holds them."""
    kind: str | None = None
    """Tasks of one kind share a program; None for a task that shares it with none."""


def listed(
    setup: Setup, study: Any, description: Mapping[str, Any], numbers: Sequence[int], settings: dict[str, Any]
) -> list[Task]:
    """Make the tasks of some cells of a study; `study` is what they carry, and `setup` that of the study in this process."""
    identity, types, tasks = results.key(dict(description)), description["types"], []
    for number in numbers:
        one = cell_of(description["cells"][number])
        sharing = together(setup, description, one.static)
        key = program.program_key(setup._replace(activations=sharing), one)
        kind = None if key is None else hashlib.sha256(repr(key).encode()).hexdigest()[:12]
        tasks.append(Task(study, number, one, sharing, types, identity, settings, kind))
    return tasks


def chunked(setup: Setup, description: dict[str, Any]) -> dict[str, Any]:
    """Choose the chunks that are yet to be chosen; cells that share a program have the same."""
    cells: list[dict[str, Any]] = []
    chunks: dict[Any, int] = {}
    for described in description["cells"]:
        one = cell_of(described)
        shared = setup._replace(activations=together(setup, description, one.static))
        key = program.program_key(shared, one) or len(cells), len(one.runs)
        if not one.chunk and key not in chunks:
            chunks[key] = budget.chunk_size(shared, one)
        cells.append({**described, "chunk": one.chunk or chunks[key]})
    return {**description, "cells": cells}


def together(setup: Setup, description: Mapping[str, Any], static: Mapping[str, Any]) -> tuple[str, ...]:
    """List the activations whose cells may share a program with a cell: of fnn's own net and losses, where there are several.

    All of the study count, so that a cell has the same program whichever others are left to measure.
    """
    own = any(setup.loss is loss for loss in vars(losses).values())
    if setup.build is not cell.mlp or not own or setup.measure or nets.beside_taps(nets.watched(setup.quantities)):
        return ()
    there = {described["static"]["activation"] for described in description["cells"]}
    names = sorted(name for name in there if TABLE[name].elementwise)
    return tuple(names) if len(names) > 1 and static["activation"] in names else ()


def cell_of(described: Mapping[str, Any]) -> Cell:
    """Read a cell of a description."""
    return Cell(described["static"], tuple(described["runs"]), tuple(described["steps"]), described["chunk"])


def work(task: Task) -> tuple[bytes, dict[str, float]]:
    """Measure a cell in whatever process this is; return the bytes of its Parquet file, and the seconds that it took."""
    study = task.study
    try:
        with configured(task.settings):
            setup = study._setup()._replace(activations=task.activations)
            measured = cell.run_cell(setup, task.cell)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(
            f"study: cell {task.number} must fit into the device's memory, got {task.cell.chunk} runs at once; use a "
            "smaller chunk or batch size"
        ) from None
    theory = expected.of(setup) if study.build is cell.mlp else None
    options = {"axes": task.axes, "quantities": study.quantities, "theory": theory}
    begun = time.perf_counter()
    frame = table.build(task.number, task.cell, measured, **options)
    seconds = measured.seconds | {"tables": measured.seconds["tables"] + time.perf_counter() - begun}
    note = {"study": task.identity, "cell": task.number, "seconds": seconds}
    return results.pack(frame, note), seconds


def named(description: dict[str, Any], number: int) -> str:
    """Name a cell by the axes that vary."""
    cells = description["cells"]
    static = cells[number]["static"]
    varying = [name for name in static if len({str(c["static"][name]) for c in cells}) > 1] or list(static)[:3]
    words = (static[n] if isinstance(static[n], str) else f"{n.replace('_', ' ')} {static[n]}" for n in varying)
    return ", ".join(words)
