"""What the parts of `bench/accelerator.py` are made of: their description, and how they write what they measure."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench import limit, problem, report
from bench.report import Section


class Emitter:
    """What a part writes with: every table at once, in one file of its process."""

    def __init__(self, name: str, folder: Path):
        self.path = folder / f"{name}.json"
        self.result: dict[str, Any] = {"environment": None, "headline": "", "error": "", "sections": []}
        self._write()

    def __call__(self, section: Section, replace: bool = False) -> None:
        """Add a table, or replace the latest."""
        if replace and self.result["sections"]:
            self.result["sections"].pop()
        self.result["sections"].append(asdict(section))
        self._write()

    def note(self, **values: Any) -> None:
        """Set the environment, the headline or the error."""
        self.result |= values
        self._write()

    def _write(self) -> None:
        report.replace(self.path, json.dumps(self.result, default=str))


class Part(NamedTuple):
    """One part: what it asks, its time limit, how it is done."""

    about: str
    seconds: int
    run: Callable[[Namespace, Any], None]
    precision: str | None = "highest"
    """Of float32 products: true float32, or "default", the accelerator's own choice (TF32 on a GPU)."""
    shared: bool = False
    """Whether other processes, or PyTorch, need memory of the device too."""
    cached: bool = False
    """Whether compiled programs may come from a cache."""


def suite_options(options: Namespace, **values: Any) -> Namespace:
    """Make the options of a suite: 5 rounds, or 2 with --quick."""
    basic = {"rows": None, "peers": None, "all": False, "rounds": 2 if options.quick else 5, "trace": None}
    return Namespace(**basic | {"quick": options.quick, "precision": "default"} | values)


def say(text: str) -> None:
    """Print at once: the last lines are all that is left of a process that dies."""
    print(text, flush=True)


def start(options: Namespace, emit: Any) -> None:
    """Write down the machine. A quick run on a CPU is only to see that it runs: it compiles without optimisations."""
    emit.note(environment=report.environment() | {"platform": jax.devices()[0].platform})
    if options.quick and limit.on_cpu():
        jax.config.update("jax_disable_most_optimizations", True)


def batch(row: problem.Row) -> tuple[jax.Array, jax.Array]:
    """Draw a batch of a row's net."""
    x = jax.random.normal(jax.random.key(1), (row.batch, problem.FEATURES))
    return x, jax.random.randint(jax.random.key(2), (row.batch,), 0, problem.CLASSES)
