"""Results: tables in the terminal, Markdown and JSON under `bench/results/`. No path of the machine enters a file."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.markup import escape
from rich.table import Table as RichTable

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "equinox", "dm-haiku", "torch", "numpy")


@dataclass
class Section:
    """What a suite reports about one of its rows: a table for people, and the numbers behind it."""

    title: str
    columns: tuple[str, ...]
    cells: list[tuple[str, ...]]
    notes: list[str]
    data: dict[str, Any] = field(default_factory=dict)
    done: bool = True
    """Whether it is whole; one of the same title takes its place otherwise."""

    def rich(self) -> RichTable:
        """Make a table for the terminal."""
        table = RichTable(
            title=self.title, title_justify="left", caption=escape("\n".join(self.notes)), caption_justify="left"
        )
        for i, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if i else "left", no_wrap=True)
        for row in self.cells:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """Make a section of a Markdown file."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.cells]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"## {self.title}", "", *table, "", *(f"- {note}" for note in self.notes)])


def environment() -> dict[str, Any]:
    """Describe the machine and the versions, so that a number can be understood a year later."""
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "precision": str(jax.config.jax_default_matmul_precision or "default"),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def lines(machine: dict[str, Any]) -> Iterable[str]:
    """Write the environment as a list."""
    for name, value in machine.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        yield f"- {name}: {text}"


def write(
    folder: Path, stem: str, suite: str, about: str, machine: dict[str, Any], sections: list[Section]
) -> list[Path]:
    """Write `stem.json` and `stem.md`, each whole or not at all.

    Called after every row, so that an interrupted run keeps what it measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.{kind}" for kind in ("json", "md")]
    data = {"suite": suite, "environment": machine, "rows": [section.data for section in sections]}
    replace(paths[0], json.dumps(data, indent=1) + "\n")
    head = [f"# {suite}", "", about, "", *lines(machine)]
    replace(paths[1], "\n\n".join(["\n".join(head), *(section.markdown() for section in sections)]) + "\n")
    return paths


def replace(path: Path, text: str) -> None:
    """Write a file in one move, so that whoever reads it, or comes after a crash, finds the old or the new text."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


def describe_error(error: BaseException) -> str:
    """Put an exception into one line without paths."""
    first = str(error).strip().splitlines()[:1]
    return without_paths(f"{type(error).__name__}: {' '.join(first)}")[:200]


def without_paths(text: str) -> str:
    """Put dots in place of absolute paths."""
    return re.sub(r"(?<!\w)~?/[^\s'\",:)]+", "...", text)


def spread(values: Iterable[float], digits: int) -> str:
    """Write the least and the greatest of some numbers."""
    values = list(values)
    return f"[{min(values):.{digits}f}..{max(values):.{digits}f}]"


def shown(path: Path) -> str:
    """Show a result's path relative to the repository, if it lies inside."""
    return str(path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def commit() -> str:
    """Name the commit of this code."""

    def git(*args):
        return subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../fnn", ".", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
