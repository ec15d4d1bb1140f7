"""Checkpoints of `fit`: a folder with one file, from which a run that was killed goes on as if nothing had happened."""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnn import check, files, lowering, tree
from fnn.core import as_spec
from fnn.training import saving
from fnn.training.batches import checksum
from fnn.training.run import Run, joined
from fnn.training.step import TrainState, TrainStep

VERSIONS = ("jax", "jaxlib", "optax", "flax")
FIRST = {
    "first parameters": lambda state: state.params,
    "first statistics of the net": lambda state: state.net_state,
    "first optimizer state": lambda state: state.opt_state,
}
"""Parts of the state from which a run begins, which are compared by their values."""


class Checkpoint:
    """Save a run in a folder while it goes on, and restore it.

    `every` = n epochs, or (n, "steps"). A file is written by a thread of its own, from a copy of the state; a save that is
    due while the last is still being written is left out, except the one at the end.
    """

    def __init__(self, folder: str | os.PathLike[str], every: Any, epochs: int):
        self.path = Path(folder) / saving.FOLDER_FILE
        by_steps = isinstance(every, tuple | list) and len(every) == 2 and every[1] == "steps"
        period: Any = every[0] if by_steps else every
        check.positive("fit", save_every=period)
        self.steps, self.epochs = (int(period), None) if by_steps else (None, int(period))
        self.asked = int(epochs)
        self.about: dict[str, Any] = {}
        self._position: Callable[[], dict[str, Any]] = dict
        self._writer = ThreadPoolExecutor(1, "fnn-checkpoint")  # its thread starts with the first save
        self._writing: Future[None] | None = None
        self.before_save: Callable[[Run], None] = lambda run: None
        self._saved: Any = None
        self._best: tuple[int | None, Any] = (None, None)
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise ValueError(f"fit: checkpoint must be a folder, got the file {folder}; choose another name")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        others = [name for name in names if not re.fullmatch(rf"\.{self.path.name}\.\d+\.part", name)]
        if others and self.path.name not in others:
            raise ValueError(
                f"fit: checkpoint must be a new folder or one that fit wrote, got {folder}, which holds {others[0]!r}; choose "
                "another"
            )

    def begin(self, run: Run, step: TrainStep, feed: Any, options: dict[str, Any]) -> None:
        """Take the run to where the folder's file left it, if there is one.

        Errors: ValueError for a file of another run (net, optimiser, dtype, data, key, `options`), naming the first difference.
        """
        self._position = feed.position
        batch = feed.example(run)
        text, metrics = program(step, run.state, batch)
        self.about = options | about(run.state) | {"program": text}
        if not os.path.lexists(self.path):
            return
        content, header = saving.read(self.path, "fit")
        if "about" not in header:
            raise ValueError(f"fit: {self.path} must be a file of fit, got one of fnn.save; choose another folder")
        kept, who = header["run"], "fit: checkpoint"
        self._compare(header["about"], [name for name in self.about if name not in ("program", *FIRST)])
        state = saving.decode(who, run.state, content, "state/")
        best = saving.decode(who, run.state, content, "best/") if kept["best"] else None
        self._compare(header["about"], [*FIRST, "program"])
        done, n = len(kept["lengths"]) - kept["within"], sum(kept["lengths"])
        if done > self.asked:
            raise ValueError(
                f"fit: the run in {self.path.parent} has {done} epochs, got epochs={self.asked}; ask for as many, or choose "
                "another folder"
            )

        def rows_of(entries, a):  # those of single examples are as wide as the largest batch was
            written = content.arrays.get(f"metrics/{tree.path(entries)}")
            shape = a.shape if written is None or written.ndim != len(a.shape) + 1 else written.shape[1:]
            return np.broadcast_to(np.zeros((), a.dtype), (n, *shape))

        rows = jax.tree_util.tree_map_with_path(rows_of, metrics) if n else {}
        run.restore(kept, state, best, saving.decode(who, rows, content, "metrics/"))
        if self.asked > header["epochs"]:
            # A run that a hook ended goes on if more is asked for; one out of patience would not have gone on.
            run.stopped = run.is_out_of_patience(options["patience"])
        else:
            self._saved = self._mark(run)
        if not run.is_done(self.asked):
            feed.resume(run, header["position"])
        files.sweep(self.path.parent)

    def after_steps(self, run: Run) -> None:
        """Save if that is due after this step."""
        if self.steps is not None and run.step % self.steps == 0:
            self.save(run)

    def after_epoch(self, run: Run) -> None:
        """Save if that is due after this epoch."""
        if self.epochs is not None and len(run.lengths) % self.epochs == 0:
            self.save(run)

    def save(self, run: Run, last: bool = False) -> None:
        """Begin to write the run as it is now; the `last` time wait until it is written."""
        if self._writing is not None and (last or jax.process_count() > 1 or self._writing.done()):
            self._wait()
        if self._writing is None and self._saved != (mark := self._mark(run)):
            self.before_save(run)
            host = {"state": saving.to_host(run.state, copy=True)}
            if run.best is not None:
                if self._best[0] != run.best_epoch:
                    self._best = run.best_epoch, saving.to_host(run.best, copy=True)
                host["best"] = self._best[1]
            header = {"about": self.about, "epochs": self.asked, "run": run.kept(), "position": self._position()}
            self._writing = self._writer.submit(self._write, host, run.records(), header)
            self._saved = mark
        if last:
            self._wait()

    def _wait(self) -> None:
        """Wait for the file that is being written. Errors: OSError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._wait()
        except OSError:
            if kind is None:  # or it would hide the error that ends the run
                raise
        finally:
            self._writer.shutdown()

    def _write(self, host: dict[str, Any], records: list[Any], header: dict[str, Any]) -> None:
        if records:
            host["metrics"] = joined(records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        saving.write(self.path, saving.encode("fit", host), header, "fit")

    def _mark(self, run: Run) -> Any:
        return run.step, len(run.lengths), run.within, run.stopped, self.asked

    def _compare(self, before: dict[str, Any], names: list[str]) -> None:
        """Refuse another run than this, naming what differs."""
        for name in names:
            was, now = before.get(name), self.about[name]
            if name in FIRST:
                where = None if was is None else _moved(was, now)  # an older file may hold less
                same, name, was, now = where is None, f"{name}, at {where}", "with other values", "these"
            elif name == "program":  # other versions write other programs
                same = was == now or before.get("versions") != self.about["versions"]
                name, was, now = "the step (net, loss or the optimizer's settings)", "of another program", "this"
            else:
                same = was == now or name == "versions"
            if not same:
                raise ValueError(
                    f"fit: checkpoint: {name} must be as in the run in {self.path.parent}, {was}, got {now}; pass the same, "
                    "choose another folder, or begin a new run from its state: fnn.load(folder, state)"
                )


def program(step: TrainStep, state: TrainState, batch: Any) -> tuple[str, Any]:
    """Name what a step computes by the text of its program and the values in it; return the metrics' shapes too."""
    traced = jax.jit(step.pure).trace(as_spec(state), as_spec(batch))
    text = re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr))
    return hashlib.sha256((text + checksum(_constants(traced.jaxpr))).encode()).hexdigest()[:16], traced.out_info[1]


def _constants(jaxpr: Any) -> list[np.ndarray]:
    """List the values in a program, and in the programs that it calls: their text does not show them."""
    inner = (p for equation in jaxpr.eqns for p in jax.tree.leaves(equation.params) if hasattr(p, "eqns"))
    own: Any = saving.to_host(list(getattr(jaxpr, "consts", ())))
    return [_numbers(a) for a in own] + [a for program in inner for a in _constants(program)]


def about(state: TrainState) -> dict[str, Any]:
    """Say, as JSON, from where a run begins."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS} | {"platform": lowering.platform()}
    return {
        "the state's key": key_numbers(state.key),
        "the state's step": int(state.step),
        "versions": versions,
    } | {name: _sizes(part(state)) for name, part in FIRST.items()}


def _sizes(part: Any) -> dict[str, tuple[float, float]]:
    """Return the norm of each array and its product with cos(0), cos(1), ..., which tells arrays of one norm apart."""
    found = {}
    for path, a in tree.rows(saving.to_host(part), is_leaf=lambda node: isinstance(node, saving.HostKey)):
        a = _numbers(a).ravel()
        a = a.view(f"f{a.itemsize // 2}") if np.iscomplexobj(a) else a.astype(np.float64)
        found[path] = float(np.linalg.norm(a)), float(a @ np.cos(np.arange(a.size)))
    return found


def _numbers(a: Any) -> np.ndarray:
    return np.asarray(a.data if isinstance(a, saving.HostKey) else a)


def key_numbers(key: Any) -> list[int] | None:
    """Return a key's numbers."""
    return None if key is None else np.asarray(jax.random.key_data(key)).tolist()


def _moved(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Name the first array with other values; machines may draw numbers that differ in the last bits."""
    for path, sizes in now.items():
        before = np.ravel(was.get(path, -1.0))  # in an older file the norm alone
        near = np.isclose(before, sizes[: before.size], rtol=1e-3, atol=1e-3 * abs(sizes[0]), equal_nan=True)
        if not near.all():
            return path
    return None
