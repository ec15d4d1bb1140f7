"""The suite `saving`: what a checkpoint after every epoch and a logger add to `fit`."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fnn
from bench import problem, timing
from bench.problem import Row
from bench.report import Section

ABOUT = """\
`fnn.fit` on the net of the suite `step`, alone, with a checkpoint after every epoch, with a CSV file of its metrics, and with
both. All calls end with the same losses. `ms/step` is the whole call divided by its steps, `later epochs` the same from the end of the
first epoch to that of the last; the difference is what a call does once: it names the program and the data, and waits for the last file.
`CPU` is the time of all threads of the process. Rounds are interleaved; medians, and `x fit` is the median of the ratios
within each round, of `ms/step`, `later epochs` and `CPU`."""

COLUMNS = ("fit", "ms/step", "x fit", "later epochs", "x fit", "CPU, ms/step", "x fit")
NAMES = {"fnn": "fnn.fit with checkpoint= and log="}
WAYS = {"alone": (), "checkpoint": ("checkpoint",), "log": ("log",), "checkpoint and log": ("checkpoint", "log")}
ROWS, STEPS, EPOCHS = (Row(256, 8, 128),), 128, 5


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Time the ways in turn; yield a row's table."""
    rounds = options.rounds or (2 if options.quick else 11)
    epochs = 2 if options.quick else EPOCHS
    for row in options.rows or ROWS:
        once, (losses, notes) = _caller(row, epochs), ({}, [])
        taken: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
        for i in range(rounds + 1):
            say(f"  {row}: round {i} of {rounds}")
            for way in [*list(WAYS)[i % 4 :], *list(WAYS)[: i % 4]]:
                numbers, losses[way] = once(WAYS[way])
                if i:
                    taken[way].append(numbers)
        if not all(np.array_equal(a, losses["alone"]) for a in losses.values()):
            notes.append("warning: the losses differ")
        times = {way: [timing.Times(column) for column in zip(*rows, strict=True)] for way, rows in taken.items()}
        cells = []
        for way, columns in times.items():
            pairs = [
                (f"{t.median:.3f}", f"{timing.ratio(t, base).median:.3f}")
                for t, base in zip(columns, times["alone"], strict=True)
            ]
            cells.append((way, *(text for pair in pairs for text in pair)))
        notes.append(f"{epochs} epochs of {STEPS} steps x {rounds} rounds; a row of metrics every 50 steps")
        data = {"row": str(row), "ms": {way: [t.rounds for t in columns] for way, columns in times.items()}}
        yield Section(f"{row}, batch {row.batch}", COLUMNS, cells, notes, data)


def _caller(row: Row, epochs: int) -> Callable[[tuple[str, ...]], tuple[tuple[float, ...], Any]]:
    """Make a function that runs `fit` once: milliseconds a step of the call, of its later epochs and of the CPU; losses."""
    work = problem.make(row, STEPS)
    data = tuple(part.reshape(-1, *part.shape[2:]) for part in (work.xs, work.ys))
    net, optimizer, state = problem.fnn_start(row)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)

    def once(way):
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            given = {"checkpoint": Path(folder) / "run", "log": fnn.log.csv(Path(folder) / "log.csv")}
            begun = time.perf_counter(), time.process_time()
            final, history = fnn.fit(
                step,
                state,
                data,
                epochs=epochs,
                batch_size=row.batch,
                key=jax.random.key(2),
                progress=False,
                on_epoch=lambda report: ends.append(time.perf_counter()),
                **{name: given[name] for name in way},
            )
            jax.block_until_ready(final)
            wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
        later = (ends[-1] - ends[0]) / (epochs - 1)
        return tuple(1e3 * t / STEPS for t in (wall / epochs, later, cpu / epochs)), history.train["loss"]

    return once
