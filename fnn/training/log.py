"""Loggers: files of a run's numbers, `fit(..., log=fnn.log.csv("run.csv"))`.

A logger is anything with `.log(dict, step=)`: a run of wandb, the modules trackio and swanlab, or one of the three here,
which write files. `step` is `state.step`: the number of updates made so far, so that the first step's metrics have step 1.
`log(flow.flat(), step=step)` logs what `fnn.watch` found under the same names.

The three also have `flush()`, which `fit` calls before each checkpoint and at the end, and `resume(step)`, which it calls
before the first step: rows beyond that step are dropped, for the run will write them again. So a run that was killed and
resumed has each row once. A run that starts at step 0 moves older files aside, to a free name that ends in `.aside`.
"""

import atexit
import csv as _csv
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from fnn import arrays, check, files, tree
from fnn.layers import taps
from fnn.tree import PyTree

HEADER = ("step", "name", "value")
SECONDS, PART = 5.0, 30_000
"""How often Parquet and TensorBoard files are written, and how many rows a Parquet file has at most."""


class Logger(Protocol):
    """Anything that takes numbers by name, and the step that they belong to."""

    def log(self, metrics: dict[str, float], /, *, step: int) -> object: ...


def csv(path: str | os.PathLike[str]) -> "Csv":
    """Log to a CSV file with the columns step, name, value; each row is in the file once it is logged.

    polars.read_csv(path).pivot("name", index="step", values="value") has a column for each name. Errors: ValueError for
    a file with other columns.
    """
    return Csv(Path(path))


def parquet(path: str | os.PathLike[str]) -> "Parquet":
    """Log to Parquet files in a folder, each written whole or not at all: `polars.read_parquet(path)`, columns as in `csv`.

    They are written every five seconds, at each checkpoint and at the end: a crash loses at most what came in between, and
    nothing that a checkpoint has seen. Errors: ImportError without polars.
    """
    return Parquet(Path(path))


def tensorboard(folder: str | os.PathLike[str]) -> "TensorBoard":
    """Log scalars to an event file in a folder, for TensorBoard; written as often as `parquet` does.

    A run that goes on begins a file of its own, with the mark from which TensorBoard drops older rows. Errors: ImportError
    without tensorboardX (`fnn[log]`).
    """
    return TensorBoard(Path(folder))


def flat(metrics: Mapping[str, PyTree]) -> dict[str, float]:
    """Flatten metrics to one number for each name: a tree's leaves by their paths, `grad_norms/2/[3]/kernel`.

    Numbers of taps are those of `fnn.taps.read`. Arrays of more than one number are left out.
    """
    return dict(_flat(jax.device_get(dict(metrics))))


def _flat(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    if (passed := metrics.pop("taps", None)) is not None:
        yield from ((f"taps/{row.path}/{row.quantity}", row.value) for row in taps.read(*passed))
    for name, leaf in tree.rows(metrics):
        if np.ndim(leaf) == 0 and not isinstance(leaf, str):
            yield name, float(leaf)


class Csv:
    """See `csv`."""

    def __init__(self, path: Path):
        self.path = path
        self._ready = False

    def log(self, metrics: Mapping[str, PyTree], step: int) -> None:
        """Append a row for each number."""
        if not self._ready:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(_read_csv(self.path) or [HEADER])
            self._ready = True
        with open(self.path, "a", newline="") as file:
            file.write(_lines((int(step), name, value) for name, value in flat(metrics).items()))

    def resume(self, step: int) -> None:
        """Drop the rows beyond a step; at step 0 move the file aside."""
        rows = _read_csv(self.path)
        self._ready = False
        if step == 0 and len(rows) > 1:
            files.set_aside(self.path)
        elif rows:
            self._rewrite([HEADER, *(row for row in rows[1:] if int(row[0]) <= step)])

    def flush(self) -> None:
        """Do nothing: every row is in the file already."""

    close = flush

    def _rewrite(self, rows: Sequence[Sequence[Any]]) -> None:
        content = _lines(rows).encode()
        if not self.path.exists() or self.path.read_bytes() != content:
            files.write(self.path, content, "log.csv", "make room, or choose another path")


class Parquet:
    """See `parquet`."""

    def __init__(self, folder: Path):
        self._polars = _needs("polars", "parquet", "study")
        self.folder = folder
        self._new: list[tuple[int, str, float]] = []
        self._part: tuple[Path, Any] | None = None
        self._time = time.monotonic()
        atexit.register(self.close)

    def log(self, metrics: Mapping[str, PyTree], step: int) -> None:
        """Take a row for each number."""
        self._new += [(int(step), name, value) for name, value in flat(metrics).items()]
        if time.monotonic() > self._time + SECONDS:
            self.flush()

    def resume(self, step: int) -> None:
        """Drop the rows beyond a step; at step 0 move the folder aside."""
        self.close()
        parts = self._parts()
        if step == 0 and parts:
            files.set_aside(self.folder)
            return
        for part in parts:
            frame = self._polars.read_parquet(part)
            kept = frame.filter(self._polars.col("step") <= step)
            if not len(kept):
                part.unlink()
            elif len(kept) < len(frame):
                self._write(part, kept)

    def flush(self) -> None:
        """Write all rows."""
        if self._new:
            schema = {"step": self._polars.Int64, "name": self._polars.String, "value": self._polars.Float64}
            frame = self._polars.DataFrame(self._new, schema=schema, orient="row")
            if self._part is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                number = max((int(part.stem) for part in self._parts()), default=-1) + 1
                self._part = self.folder / f"{number:05d}.parquet", frame
            else:
                self._part = self._part[0], self._polars.concat([self._part[1], frame])
            self._write(*self._part)
            self._new = []
            if len(self._part[1]) >= PART:
                self._part = None
        self._time = time.monotonic()

    def close(self) -> None:
        """Write all rows; the next one begins a new file."""
        self.flush()
        self._part = None

    def _parts(self) -> list[Path]:
        return sorted(part for part in self.folder.glob("*.parquet") if part.stem.isdecimal())

    def _write(self, part: Path, frame: Any) -> None:
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        files.write(part, buffer.getvalue(), "log.parquet")


class TensorBoard:
    """See `tensorboard`."""

    def __init__(self, folder: Path):
        _needs("tensorboardX", "tensorboard", "log")
        self.folder = folder
        self._writer: Any = None
        self._time = time.monotonic()
        atexit.register(self.close)

    def log(self, metrics: Mapping[str, PyTree], step: int) -> None:
        """Write a scalar for each number."""
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=name, simple_value=value) for name, value in flat(metrics).items()]
        self._write(int(step), summary=Summary(value=values))
        if time.monotonic() > self._time + SECONDS:
            self.flush()

    def resume(self, step: int) -> None:
        """Begin a new file, with the mark that drops the rows of older ones beyond a step."""
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self.close()
        if any(self.folder.glob("*.tfevents.*")):
            self._write(step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))
            self.flush()

    def flush(self) -> None:
        """Bring all rows to the file."""
        if self._writer is not None:
            self._writer.flush()
        self._time = time.monotonic()

    def close(self) -> None:
        """Close the file; the next row begins a new one."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # With a name of its own: two runs may begin in the same second.
            self._writer = EventsWriter(str(self.folder / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


class Loggers:
    """What `fit` does with its loggers: a row for every step whose number `every` divides, and one for each validation.

    Of several processes (`jax.distributed`) the first one logs.
    """

    def __init__(self, given: Logger | Sequence[Logger] | None, every: int):
        loggers: tuple[Any, ...] = (
            () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
        )
        for logger in loggers:
            if isinstance(logger, type) or not callable(getattr(logger, "log", None)):
                raise TypeError(
                    f"fit: a logger must have .log(dict, step=), got {arrays.brief(logger)}; pass fnn.log.csv(path), a run of "
                    "wandb, or a list of loggers"
                )
        check.positive("fit", log_every=every)
        self.loggers, self.every = loggers if loggers and jax.process_index() == 0 else (), every
        self._logged, self._time = 0, 0.0

    def check_outside(self, folder: str | os.PathLike[str]) -> None:
        """Refuse files in a checkpoint's folder: a run that is killed before its first save would find them there alone."""
        for logger in self.loggers:
            if isinstance(logger, Csv | Parquet | TensorBoard):
                path = logger.path if isinstance(logger, Csv) else logger.folder
                if path.resolve().is_relative_to(Path(folder).resolve()):
                    raise ValueError(
                        f"fit: a checkpoint's folder must hold nothing else, got {folder} with the log {path} in it; put one "
                        "beside the other: run/state and run/log.csv"
                    )

    def begin(self, step: int, within: bool = False) -> None:
        """Say from which step a run starts or goes on; within an epoch its last step may have to be validated again."""
        self._logged = max(0, step - within)
        self._files("resume", self._logged)

    def catch_up(self, run: Any, now: bool = True) -> None:
        """Log the steps that a run has finished since; without `now` only every five seconds.

        A run has `step`, the number of its steps, and `metrics(n)`, those of its last n steps on the host.
        """
        if not self.loggers or (not now and time.monotonic() < self._time + SECONDS):
            return
        if (n := run.step - self._logged) > 0:
            metrics, before = run.metrics(n), self._logged
            for step in range(before + self.every - before % self.every, run.step + 1, self.every):
                self._row(jax.tree.map(lambda a, i=step - before - 1: a[i], metrics), step)
        self._logged, self._time = run.step, time.monotonic()

    def epoch(self, run: Any, scores: Mapping[str, float]) -> None:
        """Log what an epoch's validation gave, as `validation/loss`, ..."""
        self.catch_up(run)
        if scores and self.loggers:
            self._row({"validation": scores}, run.step)

    def before_save(self, run: Any) -> None:
        """Bring all rows to their files: a checkpoint must not know of steps that they do not have."""
        self.catch_up(run)
        self._files("flush")

    def close(self) -> None:
        """Write and close fnn's own files."""
        self._files("close")

    def _row(self, metrics: Mapping[str, PyTree], step: int) -> None:
        numbers = flat(metrics)
        for logger in self.loggers:
            logger.log(numbers, step=step)

    def _files(self, method: str, *arguments: Any) -> None:
        for logger in self.loggers:
            if isinstance(logger, Csv | Parquet | TensorBoard):  # runs of services are the caller's to close
                getattr(logger, method)(*arguments)


def _needs(module: str, who: str, extra: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise ImportError(f"log.{who}: needs {module}; install fnn[{extra}]") from error


def _lines(rows: Any) -> str:
    text = io.StringIO()
    rows = [["NaN" if isinstance(a, float) and a != a else a for a in row] for row in rows]  # polars reads no "nan"
    _csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read_csv(path: Path) -> list[list[str]]:
    """Read all whole lines of a log; without a file, none."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    # The last line may be half of one: its process was killed.
    rows = list(_csv.reader(io.StringIO(text[: text.rfind(b"\n") + 1].decode())))
    if rows and (tuple(rows[0]) != HEADER or any(len(row) != 3 or not row[0].isdecimal() for row in rows[1:])):
        raise ValueError(
            f"log.csv: {path} must hold the columns {', '.join(HEADER)}, got {', '.join(rows[0])}; choose another path"
        )
    return rows
