"""`fnn study`."""

import errno
import os
import shlex
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from fnn import check
from fnn.cli.networks_table import print_networks
from fnn.cli.recipes import Activation, Norm
from fnn.cli.terminal import plain_warnings, printable, told
from fnn.study import program

LATEST = "studies/latest"
PLACES = ("out", "workers", "cache")
"""Options that change where and how, not what is measured."""


@dataclass(frozen=True)
class Networks:
    """Axes of the grid. Each takes one value, a list (tanh,relu), or a range (0.5:2.5:9)."""

    depth: str = "4,16,64,128,256"
    """number of hidden layers"""
    activation: Activation = "sigmoid,tanh,relu"
    norm: Norm = "none,batch_norm"
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


@dataclass(frozen=True)
class Training:
    """Axes of the grid, too."""

    batch_size: str = "32"
    """examples in a training step, and in the batch on which gradients are measured"""
    optimizer: Annotated[str, told(", ".join(program.OPTIMIZERS))] = "adam"
    learning_rate: str = "0.001"
    """learning rate of the optimizer"""
    clip: Annotated[str, told(f"how gradients are clipped: none, {', '.join(program.CLIPS)}")] = "global_norm"
    clip_threshold: str = "1.0"
    """threshold of the clipping"""


@dataclass(frozen=True)
class Measured:
    """What is measured, and how often."""

    seeds: int = 8
    """random initialisations of each network, trained side by side"""
    epochs: str = ""
    """passes over the training data; numbers are recorded after each one. 0: at initialisation only. By default 3"""
    steps: str = ""
    """record at these training steps instead of after each epoch: 0,10,100. 0: at initialisation only"""
    quantities: str = ""
    """which numbers to keep: log10_error,loss,...; by default all except peak, and without spectra, which are measured only if
    named: sharpness, preconditioned_sharpness, lambda_c, hessian_trace, log10_singular, ntk_condition"""
    data: str = "digits"
    """digits, clusters, spirals, a folder of IDX files, or a .npz file"""
    zip: str = ""
    """axes that advance together (first value with first value) instead of in all combinations: depth,width"""
    file: str = ""
    """read the grid from a TOML file, and any options that are not given here"""


@dataclass(frozen=True)
class Running:
    """Where it runs, and where the results go."""

    out: str = ""
    """folder for the results; by default a new one in studies/, with a link to it at studies/latest"""
    workers: int = 0
    """number of processes; 0: one per core, if there are at least four combinations"""
    chunk: int = 0
    """how many runs to compute at once; 0: as many as fit into the device's memory"""
    cache: str = ""
    """folder for compiled programs, which later studies use again; by default in your cache folder"""


@dataclass(frozen=True)
class Study:
    """Measure how gradients vanish or explode with depth, at initialisation and during training, next to theory.

    Each axis takes one value, a list (tanh,relu), or a range: 0.5:2.5:9 is nine values at equal distances, and
    1e-4:1e-1:4:log four at equal ratios. The study measures all combinations. It prints a table and what it found, and
    writes one Parquet file for each combination, and study.png. After an interruption, the same command goes on where it
    stopped. fnn study --check width 64:1024 does a coordinate check instead; fnn study --check --help lists its options.
    """

    network: Networks = field(default_factory=Networks)
    training: Training = field(default_factory=Training)
    measurement: Measured = field(default_factory=Measured)
    run: Running = field(default_factory=Running)
    typed: frozenset[str] = field(default=frozenset(), init=False)
    """The options of the command line, set by `main`: one that has the value of its default is given, too."""

    def given(self) -> dict[str, Any]:
        """List the options that were given, or differ from their defaults."""
        parts = (self.network, self.training, self.measurement, self.run)
        every = {f.name: (getattr(p, f.name), f.default) for p in parts for f in fields(p)}
        return {name: value for name, (value, default) in every.items() if name in self.typed or value != default}

    def command(self) -> str:
        """Write the command that measures the same again, defaults written out; a file of the grid is quoted below it."""
        from fnn.study import study
        from fnn.study.provenance import settings, variables

        file, given = self.measurement.file, self.given()
        if not file:
            axes = (
                vars(self.network)
                | vars(self.training)
                | {"seeds": self.measurement.seeds, "data": self.measurement.data}
            )
            recorded = {} if {"epochs", "steps"} & set(given) else {"epochs": study.Study.epochs}
            given = axes | recorded | given
        words = [
            f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
            for name, value in given.items()
            if name not in PLACES
        ]
        lines = [" ".join([*filter(None, [variables(settings())]), "fnn study", *words])]
        if file:
            lines += [f"# {file}:", *Path(file).read_text(errors="replace").splitlines()]
        return "\n".join(lines)


AXES = (
    *("activation", "norm", "depth", "width", "residual", "init", "batch_size", "optimizer", "clip"),
    *("sigma_w", "sigma_b", "learning_rate", "clip_threshold"),
)
"""In the order in which they are combined."""


def run(options: Study) -> int:
    """Do `fnn study`."""
    from fnn import lowering
    from fnn.study import methods, study
    from fnn.study.words import count
    from fnn.study.workers import Interrupted

    started = time.perf_counter()
    described, running = _described(options), options.run
    description = described.describe()
    folder = Path(running.out) if running.out else _folder(description)
    cells = len(description["cells"])
    runs = sum(len(cell["runs"]) for cell in description["cells"])
    steps = ", ".join(map(str, description["steps"][:6])) + (", ..." if len(description["steps"]) > 6 else "")
    what = f"{count(cells, 'cell')}, {count(runs, 'run')}, recorded at step {steps}"
    _say(f"{what}; results in {folder}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with plain_warnings():
        try:
            found = described.run(
                folder,
                workers=running.workers or (1 if lowering.one_process(cells) else cores),
                cache=running.cache or _cache(),
                progress=True,
            )
            stopped = False
        except Interrupted as stop:
            found, stopped = stop.results, True
            there = len(found.finished)
            _say(f"study: stopped; {count(there, 'cell')} of {cells} finished, in {folder}; the same command resumes")
            if not there:
                return 130
        if not running.out:
            _link(folder)
        table = found.table()
    figure = _drawn(folder, table, methods.chance(found), description["steps"][-1])
    _kept(lambda: methods.remember(folder, options.command()), quiet=True)
    for sentence in study.facts(table):
        _say(sentence)
    seconds = time.perf_counter() - started
    print(
        printable(f"{table.height:,} rows in {folder}/cells{figure}; fnn report {folder} draws all figures and a page")
    )
    print(printable(f"in Python: import fnn; table = fnn.results.read({str(folder)!r}).table()"))
    print(f"{seconds:.1f} s on {lowering.platform()}")
    return 130 if stopped else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _drawn(folder: Path, table: Any, chance: float | None, last: int) -> str:
    """Print the table of networks and what was found, and draw the figure; return what to say of it."""
    import polars as pl

    from fnn import files
    from fnn.study import figures, verdict
    from fnn.study.summary import summarize

    shown = ((pl.col("quantity") == "log10_error") & (pl.col("step") == 0)) | pl.col("quantity").is_in(
        ["accuracy", "diverged"]
    )
    summary = summarize(table.filter(shown))
    drawn = figures.gradient(summary)
    if drawn is None:  # log10_error is not among the quantities
        return ""
    print_networks(summary, chance, last > 0)
    for sentence in verdict.sentences(summary, chance, last):
        print(printable(sentence))
    return ", figure study.png" if _kept(lambda: files.save_figure(drawn, folder / "study.png", 110, "study")) else ""


def _kept(write: Any, quiet: bool = False) -> bool:
    """Write into the study's folder, if it is not read-only: then the study was finished before."""
    try:
        write()
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        if not quiet:
            _say(str(error))
        return False
    return True


def _described(options: Study) -> Any:
    from fnn.study import grid, study

    given = options.given()
    file = options.measurement.file
    if file:
        if axes := [name for name in (*AXES, "zip") if name in given]:
            raise ValueError(f"study: with --file the grid is that of {file}, got --{axes[0]} too; write it there")
        points, arguments = grid.from_toml(file)
        for name in arguments:
            check.choice("study", ("seeds", "epochs", "steps", "quantities", "data", "chunk", "traced"), option=name)
    else:
        values = vars(options.network) | vars(options.training)
        lists = {name: grid.span(values[name]) for name in AXES}
        points, arguments = grid.from_axes(lists, [word for word in options.measurement.zip.split(",") if word]), {}
    if {"epochs", "steps"} & set(given):
        arguments = {name: value for name, value in arguments.items() if name not in ("epochs", "steps")}
    arguments |= {name: given[name] for name in ("seeds", "data") if name in given}
    arguments |= {"chunk": given["chunk"] or None} if "chunk" in given else {}
    arguments |= grid.words({name: given[name] for name in ("epochs", "steps", "quantities") if name in given})
    if {"epochs", "steps"} <= set(arguments):
        got = f"epochs {arguments['epochs']} and steps {arguments['steps']}"
        raise ValueError(f"study: epochs or steps say what is recorded, got {got}; leave one of them out")
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
