"""Measure all there is to know of fnn on an accelerator in one go: `python -m bench --accelerator`, also `python -m
bench.accelerator`.

Each part of `bench/parts.py` runs in a process of its own, with a time limit, and keeps what it has measured after every
row. This process starts them in order of worth, gathers their tables in one Markdown and one JSON file after each, and
never touches the device. A quick run on a CPU is there to see that everything runs; its numbers mean nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import report
from bench.emitter import Emitter, Part
from bench.parts import PARTS
from bench.report import Section
from bench.training import ORDER

ABOUT = """\
What fnn does on an accelerator, part by part, each in a process of its own under a time limit; a part that was stopped
keeps the rows that it had. Times are medians, of work that was queued before one wait."""
LEAST = 12
"""Seconds below which no part is begun: it would only just have imported JAX."""
POLL = 0.2


@dataclass
class Outcome:
    """What came of one part."""

    name: str
    outcome: str = "not run"
    """`not run`, `running`, `done`, `failed`, `stopped` (at its limit)."""
    seconds: float = 0.0
    limit: float = 0.0
    headline: str = ""
    error: str = ""
    """Its last lines."""
    environment: dict[str, Any] | None = None
    sections: list[Section] = field(default_factory=list)


def parse(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    listing = "\n".join(f"  {name:14}{part.seconds:4} s  {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        "python -m bench --accelerator",
        description=__doc__,
        epilog=f"parts:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--accelerator", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=480, help="for everything; 480 by default")
    parser.add_argument("--parts", type=lambda text: text.split(","), help="comma-separated; all by default")
    parser.add_argument("--rows", type=lambda text: text.split(","), help=f"of the part steps: {','.join(ORDER)}")
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), help="of the part steps; those of each row by default"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to try it out on a CPU")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the JSON and the Markdown")
    parser.add_argument("--commit", help="what the files say was measured, where there is no git to ask")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.rows or [] if name not in ORDER]:
        parser.error(f"the part steps has no row {', '.join(unknown)}; there are {', '.join(ORDER)}")
    asked = [options.part] if options.part else options.parts or []
    if unknown := [name for name in asked if name not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, or the one that a child process is asked for; the exit status is 1 if any did not get done."""
    options = parse(arguments)
    if options.part:
        return child(options.part, options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that the running part is ended, too
    command = [sys.executable, "-m", "bench.accelerator", *(["--quick"] if options.quick else [])]
    for name in ("rows", "peers"):
        command += [f"--{name}", ",".join(getattr(options, name))] if getattr(options, name) else []
    parts = {name: part for name, part in PARTS.items() if not options.parts or name in options.parts}
    outcomes = run(parts, command, options)
    return 0 if all(outcome.outcome == "done" for outcome in outcomes) else 1


def child(name: str, options: Namespace) -> int:
    """Run one part in this process; what goes wrong is written as well."""
    options.out.mkdir(parents=True, exist_ok=True)
    emit = Emitter(name, options.out)
    try:
        PARTS[name].run(options, emit)
    except Exception as error:
        frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        emit.note(
            error="\n".join([*frames[-4:], report.without_paths(str(error))[-600:], report.describe_error(error)])
        )
        traceback.print_exc()
        return 1
    return 0


def run(parts: dict[str, Part], command: list[str], options: Namespace) -> list[Outcome]:
    """Run `command --part NAME --out FOLDER` for one part after the other; write all results after each change."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    end = time.monotonic() + options.seconds
    outcomes = [Outcome(name, limit=part.seconds) for name, part in parts.items()]
    book = _Book(outcomes, options)
    with tempfile.TemporaryDirectory() as folder:
        for outcome, part in zip(outcomes, parts.values(), strict=True):
            left = end - time.monotonic()
            if left < min(LEAST, part.seconds):
                outcome.error = f"{max(0, left):.0f} s were left"
            else:
                outcome.limit = min(part.seconds, left)
                _supervise(outcome, part, command, Path(folder), book.write)
            book.write()
            shown = f"{outcome.name}: {outcome.outcome} after {outcome.seconds:.0f} s. {outcome.headline}"
            console.print(shown, markup=False)
            if outcome.error:
                console.print("\n".join(f"    {line}" for line in outcome.error.splitlines()[-6:]), markup=False)
    for outcome in outcomes:
        for section in outcome.sections:
            console.print("\n" + _compact(section), markup=False, soft_wrap=True)
    console.print("\n" + _compact(summary(outcomes)), markup=False, soft_wrap=True)
    console.print("written: " + ", ".join(report.shown(path) for path in book.paths), markup=False)
    return outcomes


def summary(outcomes: list[Outcome]) -> Section:
    """Make the table of all parts; its data are all that the parts have written."""
    columns = ("part", "outcome", "seconds", "limit", "precision", "in one line")
    cells = [
        (
            o.name,
            o.outcome,
            f"{o.seconds:.1f}",
            f"{o.limit:.0f}",
            (o.environment or {}).get("precision", ""),
            o.headline,
        )
        for o in outcomes
    ]
    notes = [f"{o.name}: {o.outcome}: {' / '.join(o.error.splitlines()[-8:])}" for o in outcomes if o.error]
    return Section("Parts", columns, cells, notes, {"parts": [asdict(o) | {"sections": None} for o in outcomes]})


class _Book:
    """The two files; their name has the platform in it, once a part has said which it is."""

    def __init__(self, outcomes: list[Outcome], options: Namespace):
        self.outcomes, self.options, self.paths = outcomes, options, []
        self.started = time.strftime("%Y%m%dT%H%M%S")

    def write(self) -> None:
        known = next((o.environment for o in self.outcomes if o.environment), None) or {"device": "unknown"}
        machine = {name: value for name, value in known.items() if name != "precision"}  # each part has its own
        machine |= {"commit": self.options.commit} if self.options.commit else {}
        kind = "-quick" if self.options.quick else ""
        stem = f"accelerator-{known.get('platform', 'unknown')}{kind}-{self.started}"
        sections = [summary(self.outcomes)]
        for outcome in self.outcomes:
            for section in outcome.sections:
                data = {"part": outcome.name} | section.data
                sections.append(Section(f"{outcome.name}: {section.title}", *_middle(section), data))
        paths = report.write(self.options.out, stem, "accelerator", ABOUT, machine, sections)
        for old in set(self.paths) - set(paths):
            old.unlink()
        self.paths = paths


def _middle(section: Section) -> tuple[Any, Any, Any]:
    return section.columns, section.cells, section.notes


def _supervise(outcome: Outcome, part: Part, command: list[str], folder: Path, changed: Callable[[], None]) -> None:
    """Run one part until it ends or its limit is over, and read what it wrote, while it runs as well."""
    written, log, start = folder / f"{outcome.name}.json", folder / f"{outcome.name}.log", time.monotonic()
    outcome.outcome, seen = "running", None
    with (
        log.open("wb") as output,
        _started(part, [*command, "--part", outcome.name, "--out", str(folder)], output) as process,
    ):
        while process.poll() is None and time.monotonic() - start < outcome.limit:
            time.sleep(POLL)
            outcome.seconds = time.monotonic() - start
            if written.exists() and (now := written.stat().st_mtime_ns) != seen:
                seen = now
                _read(outcome, written)
                changed()
        status = process.poll()
    outcome.seconds = time.monotonic() - start
    _read(outcome, written)
    outcome.outcome = "stopped" if status is None else "failed" if status else "done"
    if outcome.outcome != "done" and not outcome.error:
        why = f"over its limit of {outcome.limit:.0f} s" if status is None else f"exit status {status}"
        outcome.error = "\n".join([*_last_lines(log), why])


@contextlib.contextmanager
def _started(part: Part, command: list[str], output: Any) -> Iterator[subprocess.Popen]:
    """Start a process and at the end kill it with all that it has started."""
    process = subprocess.Popen(
        command,
        cwd=report.HERE.parent,
        env=_environment(part),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(part: Part) -> dict[str, str]:
    """Take this process's environment, without a cache of compiled programs: compiling is timed."""
    names = {name: value for name, value in os.environ.items() if part.cached or name != "JAX_COMPILATION_CACHE_DIR"}
    paths = [str(report.HERE.parent), *filter(None, [names.get("PYTHONPATH")])]
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if part.shared else {}
    precision = {"JAX_DEFAULT_MATMUL_PRECISION": part.precision} if part.precision else {}
    return names | {"PYTHONPATH": os.pathsep.join(paths)} | shared | precision


def _read(outcome: Outcome, path: Path) -> None:
    if path.exists():
        result = json.loads(path.read_text())
        outcome.environment, outcome.headline, outcome.error = (
            result[key] for key in ("environment", "headline", "error")
        )
        outcome.sections = [Section(**section) for section in result["sections"]]


def _last_lines(log: Path, most: int = 8) -> list[str]:
    with contextlib.suppress(OSError):
        text = report.without_paths(log.read_text(errors="replace"))
        return [line[:300] for line in text.splitlines() if line.strip()][-most:]
    return []


def _compact(section: Section) -> str:
    """Set a table in as few characters as can be read."""
    rows = [section.columns, *section.cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(section.columns))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [section.title, *(f"  {line}" for line in lines), *(f"  - {note[:200]}" for note in section.notes)]
    )


if __name__ == "__main__":
    sys.exit(main())
