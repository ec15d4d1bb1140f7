"""`fnn study`."""

import errno
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fnn import check
from fnn.cli.terminal import console, plain_warnings, printable

AXES = (
    *("activation", "norm", "depth", "width", "residual", "init", "batch_size", "optimizer", "clip"),
    *("sigma_w", "sigma_b", "learning_rate", "clip_threshold"),
)
LATEST = "studies/latest"
MOST_ROWS = 60
"""Networks in the printed table."""


@dataclass(frozen=True)
class Study:
    """Measure how gradients vanish or explode with depth, at initialisation and during training, next to theory.

    Each axis takes one value, a list (tanh,relu), or a range: 0.5:2.5:9 is nine values at equal distances, and
    1e-4:1e-1:4:log four at equal ratios. The study measures all combinations. It prints a table and writes one Parquet
    file for each combination, and study.png. After an interruption, the same command goes on where it stopped.
    """

    depth: str = "4,16,64,128,256"
    """number of hidden layers"""
    activation: str = "sigmoid,tanh,relu"
    """sigmoid, tanh, relu, leaky_relu, elu, selu, gelu, gelu_tanh, silu, softplus, erf, identity"""
    norm: str = "none,batch_norm"
    """none, batch_norm, layer_norm, rms_norm"""
    width: str = "64"
    """units in each hidden layer"""
    residual: str = "false"
    """true: add each hidden layer's input to its output (from the second layer on)"""
    init: str = "scaled"
    """scaled (sigma_w sets the scale), or any initialiser: he_normal, orthogonal, "normal(0.01)", ..."""
    sigma_w: str = "1.0"
    """with init scaled, weights are drawn from N(0, sigma_w²/fan_in)"""
    sigma_b: str = "0.0"
    """biases are drawn from N(0, sigma_b²)"""
    batch_size: str = "32"
    """examples in a training step, and in the batch on which gradients are measured"""
    optimizer: str = "adam"
    """sgd, momentum, adam, adamw, rmsprop, lamb"""
    learning_rate: str = "0.001"
    """learning rate of the optimizer"""
    clip: str = "global_norm"
    """how gradients are clipped: none, value, from_above, global_norm, block_norm, adaptive"""
    clip_threshold: str = "1.0"
    """threshold of the clipping"""
    zip: str = ""
    """axes that advance together (first value with first value) instead of in all combinations: depth,width"""
    file: str = ""
    """read the grid from a TOML file, and any options that are not given here"""
    seeds: int = 8
    """random initialisations of each network, trained side by side"""
    epochs: int = 3
    """passes over the training data; numbers are recorded after each one. 0: at initialisation only"""
    steps: str = ""
    """record at these training steps instead of after each epoch: 0,10,100. 0: at initialisation only"""
    quantities: str = ""
    """which numbers to keep: log_error,loss,...; by default all except peak"""
    data: str = "digits"
    """digits, clusters, spirals, a folder of IDX files, or a .npz file"""
    chunk: int = 0
    """how many runs to compute at once; 0: as many as fit into the device's memory"""
    workers: int = 0
    """number of processes; 0: one per core, if there are at least four combinations"""
    cache: str = ""
    """folder for compiled programs, which later studies use again; by default in your cache folder"""
    out: str = ""
    """folder for the results; by default a new one in studies/, with a link to it at studies/latest"""


def run(options: Study) -> int:
    """Do `fnn study`."""

    from fnn import files, lowering
    from fnn.study import figures, study
    from fnn.study.summary import summarize
    from fnn.study.workers import Interrupted

    described = _described(options)
    description = described.describe()
    folder = Path(options.out) if options.out else _folder(description)
    cells = len(description["cells"])
    runs = sum(len(cell["runs"]) for cell in description["cells"])
    steps = ", ".join(map(str, description["steps"][:6])) + (", ..." if len(description["steps"]) > 6 else "")
    print(f"{cells} cells, {runs} runs, recorded at step {steps}; results in {folder}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with plain_warnings():
        try:
            found = described.run(
                folder,
                workers=options.workers or (1 if lowering.one_process(cells) else cores),
                cache=options.cache or _cache(),
                progress=True,
            )
            stopped = False
        except Interrupted as stop:
            print(
                f"study: stopped; finished cells are in {folder}, the same command resumes",
                file=sys.stderr,
                flush=True,
            )
            found, stopped = stop.results, True
            if stop.at_once or not found.finished:
                return 130
        if not options.out:
            _link(folder)
        table = found.table()
    summary = summarize(table.filter(quantity="log_error", step=0))
    figure = ""
    if (drawn := figures.gradient(summary)) is not None:  # log_error is among the quantities
        _print_summary(summary)
        try:
            files.save_figure(drawn, folder / "study.png", 110, "study")
            figure = ", and study.png"
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            print(error, file=sys.stderr)  # the folder is read-only, so the study was finished before: go on
    for sentence in filter(None, (study.widened(table), study.left_range(table))):
        print(sentence, file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    print(
        printable(f"{folder}: {table.height:,} rows in cells/*.parquet{figure}; fnn report {folder} draws all figures")
    )
    print(f"{seconds:.1f} s on {lowering.platform()}")
    return 130 if stopped else 0


def _described(options: Study) -> Any:
    from fnn.study import grid, study

    given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    if options.file:
        if axes := [name for name in (*AXES, "zip") if name in given]:
            raise ValueError(
                f"study: with --file the grid is that of {options.file}, got --{axes[0]} too; write it there"
            )
        points, arguments = grid.from_toml(options.file)
        for name in arguments:
            check.choice("study", ("seeds", "epochs", "steps", "quantities", "data", "chunk", "traced"), option=name)
    else:
        lists = {name: grid.span(getattr(options, name)) for name in AXES}
        points, arguments = grid.from_axes(lists, [word for word in options.zip.split(",") if word]), {}
    arguments |= {name: given[name] for name in ("seeds", "epochs", "data", "chunk") if name in given}
    if options.steps:
        arguments["steps"] = grid.span(options.steps)
    if options.quantities:
        arguments["quantities"] = tuple(word.strip() for word in options.quantities.split(","))
    return study.Study(points, **arguments)


def _folder(description: dict[str, Any]) -> Path:
    from fnn.study import results

    return Path("studies") / results.key(description)[:10]


def _link(folder: Path) -> None:
    """Point studies/latest at a folder, if the system has links and nothing else has that name."""
    link = Path(LATEST)
    try:
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
    except OSError:
        pass


def _cache() -> str | None:
    """Choose a folder for compiled programs, unless the user has chosen one."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(root) / "fnn" / "xla")


def _print_summary(summary: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title="log10 |dL/dh| at initialisation, medians over seeds",
        caption="growth: change of log10 |dL/dh| per layer towards the input; outside: share of the values outside the band "
        "in which theory expects 19 of 20 seeds",
    )
    names = summary.shown()
    for name in (*names, "at layer 1", "last", "growth", "10 %", "90 %", "theory", "outside"):
        table.add_column(name, justify="left" if name in ("activation", "norm") else "right")
    rows = summary.networks.head(MOST_ROWS).iter_rows(named=True)
    growths = [f"log10_growth{end}" for end in ("", "_low", "_high", "_predicted")]
    for row in (summary.fixed | row for row in rows):
        known = row["log10_growth"] is not None  # without, the signal itself has vanished from float32
        table.add_row(
            *(escape(str(row[name])) for name in names),
            *("" if row[name] is None else f"{row[name]:.2f}" for name in ("log10_first", "log10_last")),
            *(f"{row[name]:+.4f}" if known and row[name] is not None else "" for name in growths),
            "" if row["outside"] is None else f"{row['outside']:.0%}",
        )
    console().print(table)
    if (more := summary.networks.height - MOST_ROWS) > 0:
        print(f"and {more} more networks, which fnn report shows")
