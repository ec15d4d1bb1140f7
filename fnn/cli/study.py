"""The command line of studies: `fnn study`, `fnn compare`, `fnn report`."""

import errno
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

AXES = (
    *("activation", "norm", "depth", "width", "residual", "init", "batch_size", "optimizer", "clip"),
    *("sigma_w", "sigma_b", "learning_rate", "clip_threshold"),
)
LATEST = "studies/latest"


@dataclass(frozen=True)
class Study:
    """Measure how gradients vanish or explode with depth, at initialisation and in training, beside the theory.

    Every axis takes one value, several (tanh,relu), or a range (0.5:2.5:9 is nine values; 1e-4:1e-1:4:log by equal
    ratios); the grid is their product. Prints a table and writes one Parquet file for each finished cell, and
    study.png. The same command again resumes.
    """

    depth: str = "4,16,64,128,256"
    """hidden layers behind the input layer"""
    activation: str = "sigmoid,tanh,relu"
    """sigmoid, tanh, relu, leaky_relu, elu, selu, gelu, gelu_tanh, silu, softplus, erf, identity"""
    norm: str = "none,batch_norm"
    """none, batch_norm, layer_norm, rms_norm"""
    width: str = "64"
    """units of a hidden layer"""
    residual: str = "false"
    """false, true: add each hidden layer to its input"""
    init: str = "scaled"
    """scaled (weights N(0, sigma_w²/fan_in)), or any initialiser: he_normal, orthogonal, "normal(0.01)", ..."""
    sigma_w: str = "1.0"
    """weights are drawn from N(0, sigma_w²/fan_in)"""
    sigma_b: str = "0.0"
    """biases are drawn from N(0, sigma_b²)"""
    batch_size: str = "32"
    """training examples of a step, and of the measured batch"""
    optimizer: str = "adam"
    """sgd, momentum, adam, adamw, rmsprop, lamb"""
    learning_rate: str = "0.001"
    """of the optimiser"""
    clip: str = "global_norm"
    """none, value, from_above, global_norm, block_norm, adaptive"""
    clip_threshold: str = "1.0"
    """of the clip"""
    zip: str = ""
    """axes that advance together instead of multiplying: depth,width"""
    file: str = ""
    """take the grid, and options that are not given here, from a TOML file"""
    seeds: int = 8
    """random initialisations of each network, run at once"""
    epochs: int = 3
    """passes over the training data, each recorded; 0 measures the initialisation alone"""
    steps: str = ""
    """the recorded steps instead: 0,10,100; 0 for the initialisation alone"""
    quantities: str = ""
    """which to keep: log_error,loss,...; all by default"""
    data: str = "digits"
    """digits, clusters, spirals, a folder of IDX files, or a .npz file"""
    chunk: int = 0
    """runs that share one vmap; 0 chooses it from the device's memory"""
    workers: int = 0
    """processes; 0 takes one for each core where there are cells enough"""
    cache: str = ""
    """folder for compiled programs, which the next study finds there; by default in the user's cache folder"""
    out: str = ""
    """folder for the results; by default one under studies/ for each different study, and studies/latest a link to it"""


@dataclass(frozen=True)
class Compare:
    """Show where two studies differ by more than their seeds do."""

    a: str
    """folder of a study"""
    b: str
    """folder of another one"""
    rows: int = 20
    """how many rows to show"""


@dataclass(frozen=True)
class Report:
    """Write a study's figures and its page, which opens in a browser without a network."""

    folder: str
    """folder of the study, such as studies/latest"""


def run_study(options: Study) -> int:
    """Do `fnn study`."""
    import jax

    from fnn import lowering, plot
    from fnn.study import study
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
    with _plain_warnings():
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
                f"study: stopped; finished cells are in {folder}, the same command resumes", file=sys.stderr, flush=True
            )
            found, stopped = stop.results, True
            if stop.at_once or not found.finished:
                return 130
        if not options.out:
            _link(folder)
        table = found.table()
    summary = study.summarize(table)
    figure = ""
    if summary.height:  # log_error is among the quantities
        _print_summary(summary)
        try:
            plot.study(table, path=folder / "study.png")
            figure = ", and study.png"
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            print(
                error, file=sys.stderr
            )  # the folder is read-only, so it was finished before: the table is what counts
    if sentence := study.left_range(table):
        print(sentence, file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    print(_shown(f"{folder}: {table.height:,} rows in cells/*.parquet{figure}; fnn report {folder} draws the rest"))
    print(f"{seconds:.1f} s on {jax.devices()[0].platform}")
    return 130 if stopped else 0


def run_compare(options: Compare) -> int:
    """Do `fnn compare`."""
    import polars as pl
    from rich.table import Table
    from rich.text import Text

    from fnn import check
    from fnn.study import results
    from fnn.study.compare import compare, different_axes

    check.positive("compare", rows=options.rows)
    with _plain_warnings():
        left, right = (results.read(folder).table() for folder in (options.a, options.b))
    for name, (ours, theirs) in different_axes(left, right).items():
        print(_shown(f"{name} is {ours} in {options.a}, {theirs} in {options.b}"))
    joined = compare(left, right)
    beyond = joined.filter(pl.col("beyond"))
    print(f"{beyond.height:,} of {joined.height:,} shared rows differ by more than the bands over seeds (10 to 90 %)")
    counts = joined.group_by("quantity").agg(pl.len(), pl.col("beyond").sum()).filter(pl.col("beyond") > 0)
    for quantity, total, number in counts.sort("beyond", descending=True).iter_rows():
        print(_shown(f"  {quantity}: {number:,} of {total:,}"))
    axes = joined.columns[: joined.columns.index("step")]
    shown = [name for name in axes if joined[name].n_unique() > 1] + ["step", "layer", "path", "quantity"]
    table = Table(title=Text(_shown(f"the largest differences, b - a, of {options.b} from {options.a}")))
    for name in (*shown, "a [10 %, 90 %]", "b [10 %, 90 %]", "b - a"):
        table.add_column(Text(name))
    for row in beyond.head(options.rows).iter_rows(named=True):
        bands = [f"{row[n]:.4g} [{row[f'{n}_low']:.4g}, {row[f'{n}_high']:.4g}]" for n in ("a", "b")]
        words = (*(str(row[name]) for name in shown), *bands, f"{row['difference']:+.4g}")
        table.add_row(*(Text(_shown(word)) for word in words))
    if beyond.height:
        _console().print(table)
    return 0


def run_report(options: Report) -> int:
    """Do `fnn report`."""
    from fnn.study.report import report

    with _plain_warnings():
        written = report(options.folder)
    names = ", ".join(path.name for path in written)
    print(_shown(f"wrote {names} to {options.folder}; open {written[-1]} in a browser"))
    return 0


def _described(options: Study) -> Any:
    from fnn import check
    from fnn.study import grid, study

    given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    if options.file:
        if axes := [name for name in (*AXES, "zip") if name in given]:
            raise ValueError(f"study: the grid stands in {options.file}, got --{axes[0]} too; write it there")
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


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print the warnings about cells that are left out as sentences, without a line of the program."""
    from fnn.study.results import LeftOut

    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, LeftOut):
                print(message, file=sys.stderr, flush=True)
            else:
                before(message, category, *rest, **more)

        warnings.simplefilter("always", LeftOut)
        warnings.showwarning = show
        yield


def _shown(text: str) -> str:
    """Write a text of somebody else's so that it cannot steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _folder(description: dict[str, Any]) -> Path:
    from fnn.study import results

    return Path("studies") / results.key(description)[:10]


def _link(folder: Path) -> None:
    """Point studies/latest at a folder, where the system has links and nothing else is in the way."""
    link = Path(LATEST)
    try:
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
    except OSError:
        pass


def _cache() -> str | None:
    """Choose a folder for compiled programs, unless the user has."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(root) / "fnn" / "xla")


def _print_summary(summary: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title="log |dL/dh| at initialisation, medians over runs",
        caption="slope: change of log |dL/dh| for one layer towards the input (natural log); outside: share of "
        "numbers outside the predicted band of 19 seeds in 20",
    )
    place = summary.columns.index("first")
    static = [name for name in summary.columns[1:place] if summary[name].n_unique() > 1] or ["activation", "depth"]
    static = [name for name in static if name in summary.columns]
    for name in (*static, "at layer 1", "at the last hidden", "slope [10 %, 90 %]", "predicted", "outside"):
        table.add_column(name, justify="left" if name in ("activation", "norm") else "right")
    for row in summary.iter_rows(named=True):
        predicted, outside = row["predicted_slope"], row["outside"]
        slopes = [row["slope"], row["slope_low"], row["slope_high"]]
        if row["first"] == row["last"] == -math.inf:  # the signal itself has vanished from float32
            slopes = predicted = None
        table.add_row(
            *(escape(str(row[name])) for name in static),
            f"{row['first']:.2f}",
            f"{row['last']:.2f}",
            "" if slopes is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*slopes),
            "" if predicted is None else f"{predicted:+.3f}",
            "" if outside is None else f"{outside:.0%}",
        )
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)
