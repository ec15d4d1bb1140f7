"""The parts of `bench/accelerator.py`, in order of worth. A part is a function (options, emit): it hands over each table as
soon as it has it, `emit(section)`, and says the outcome in one line, `emit.note(headline=...)`."""

import importlib.util
import os
import tempfile
import time
from argparse import Namespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from bench import depth, limit, per_example, problem, sweep
from bench import watch as suite
from bench.device import facts, rates
from bench.emitter import Part, batch, say, start, suite_options
from bench.problem import Row
from bench.report import Section, describe_error, without_paths
from bench.timing import Run
from bench.training import steps

# Tests ----------------------------------------------------------------------------------------------------------------


class Recorder:
    """A plugin of pytest that writes down outcomes as they come."""

    def __init__(self, emit: Any):
        self.emit, self.counts, self.failures, self.slow, self.written = emit, {}, [], [], 0.0
        self.chosen = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test's outcome; keep the last lines of a failure."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
            self.slow.append((report.duration, report.nodeid))
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
            self.failures.append((report.nodeid, [without_paths(line)[:200] for line in lines[-6:]]))
        if report.failed or time.monotonic() - self.written > 2:
            self.write()

    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Learn from a process how many tests there are."""
        self.chosen = len(ids)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        """Write the rest."""
        self.write()

    def write(self) -> None:
        """Hand over the table as it is now."""
        self.written = time.monotonic()
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items()))
        left = self.chosen - sum(self.counts.values())
        counts += f", {left} not run" if left > 0 else ""
        cells = [(name, " / ".join(lines[-3:])[:300]) for name, lines in self.failures]
        slow = [f"{seconds:.1f} s {name}" for seconds, name in sorted(self.slow, reverse=True)[:5]]
        data = {"counts": self.counts, "failures": self.failures, "slowest": slow}
        title = f"tests: {counts or 'none'}"
        self.emit(Section(title, ("failed", "last lines"), cells, ["slowest: " + "; ".join(slow)], data), replace=True)
        self.emit.note(headline=counts)


def tests(options: Namespace, emit: Any) -> None:
    """Run the tests marked `accelerator` on the default backend, in several processes."""
    import pytest

    pytest.hookimpl(optionalhook=True)(Recorder.pytest_xdist_node_collection_finished)
    recorder = Recorder(emit)
    arguments = ["-m", "accelerator", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", "2" if options.quick else str(min(14, os.cpu_count() or 1))]
    if options.quick:
        arguments += ["-k", "test_norm or test_lowering"]
    status = pytest.main(arguments, plugins=[recorder])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        emit.note(headline="no test carries the marker `accelerator`")
    elif status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}")
    if recorder.failures:
        raise RuntimeError(
            f"{len(recorder.failures)} tests failed: {', '.join(name for name, _ in recorder.failures)}"[:400]
        )


# Seeds, depth ---------------------------------------------------------------------------------------------------------


SEED_PEERS = ("fnn-sweep", "fnn-loop", "jax-loop")


def seeds(options: Namespace, emit: Any) -> None:
    """Train 64 seeds in one program, and one after the other."""
    start(options, emit)
    row, count = (Row(16, 3, 8), 4) if options.quick else (Row(64, 8, 32), 64)
    lengths = {"seeds": count, "steps": 8 if limit.on_cpu() else 32}
    for section in sweep.run(suite_options(options, rows=[row], peers=SEED_PEERS, **lengths), say):
        emit(section)
        ratios = {v["name"]: v["ratio"]["median"] for v in section.data["variants"]}
        emit.note(headline=", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()) + " x fnn-sweep")


def deep(options: Namespace, emit: Any) -> None:
    """Trace, lower, compile and run a train step of 10,000 layers in `repeat`."""
    start(options, emit)
    row = Row(64, 1_000 if options.quick else 10_000, 64)
    taken: dict[str, float] = {}

    def clock(name, work):
        begin = time.perf_counter()
        result = work()
        taken[name] = time.perf_counter() - begin
        cells = [(key, f"{value:.3f}") for key, value in taken.items()]
        emit(Section(f"depth {row.depth}", ("what", "seconds"), cells, [], dict(taken)), replace=len(taken) > 1)
        say(f"{name}: {taken[name]:.2f} s")
        return result

    built: list[Any] = []  # compiling needs shapes alone, and comes first: drawing the parameters takes longer
    shapes = jax.eval_shape(lambda: built.append(problem.fnn_start(row, unroll=1)) or built[-1][2])
    net, optimizer, _ = built[-1]
    ready = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
    examples = batch(row)
    traced = clock("trace", lambda: ready.jitted.trace(shapes, examples))
    lowered = clock("lower", traced.lower)
    compiled = clock("compile", lowered.compile)
    state = clock("init", lambda: jax.block_until_ready(problem.fnn_start(row, unroll=1)[2]))
    state = jax.tree.map(jnp.copy, state)
    call = Run(compiled, state, [examples] * (2 if options.quick else 4), lambda metrics: metrics["loss"])
    clock("first step", lambda: call.advance([examples]))
    rounds = [clock(f"round {i}", lambda: call.advance(call.items))[0] for i in range(2 if options.quick else 5)]
    ms = 1e3 * float(np.median(rounds)) / len(call.items)
    losses = call.last_losses()
    total = sum(taken[name] for name in ("trace", "lower", "compile"))
    emit.note(headline=f"first call {total:.1f} s, {ms:.1f} ms a step, loss {losses[-1]:.4f}")
    if not np.isfinite(losses).all():
        raise ValueError(f"depth {row.depth}: the losses are {losses}")


# Gradients of examples, memory, study, watch --------------------------------------------------------------------------


def examples(options: Namespace, emit: Any) -> None:
    """Time norms, sums and clipped sums of gradients: in true float32, the mlp in the default precision too."""
    start(options, emit)
    first, *others = per_example.WORK
    tasks = [(first, "highest"), (first, "default"), *((name, "highest") for name in others)]
    lines = []
    for name, precision in [("lstm", "highest")] if options.quick else tasks:
        jax.config.update("jax_default_matmul_precision", precision)
        rounds = 1 if options.quick else 5
        try:
            for section in per_example.run(suite_options(options, peers=[name], rounds=rounds), say):
                section.title += f", precision {precision}"
                emit(section)
                ratios = [f"{v['ratio']['median']:.2f}" for v in section.data["variants"][1:4]]
                lines.append(f"{name}, {precision}: {', '.join(ratios)}")
        except (AssertionError, jax.errors.JaxRuntimeError) as error:
            lines.append(f"{name}, {precision}: failed")
            emit(Section(f"{name}, precision {precision}", ("outcome",), [("failed",)], [describe_error(error)], {}))
        emit.note(headline="; ".join(lines))


def memory(options: Namespace, emit: Any) -> None:
    """Compare XLA's temporary memory of a step with the device's peak, with and without recomputation."""
    start(options, emit)
    rows = (Row(64, 12, 64),) if options.quick else (Row(1024, 4, 512), Row(64, 1000, 256))
    lines = []
    for row in rows:
        for section in depth.run(suite_options(options, rows=[row], peers=["fnn", "fnn-groups"]), say):
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            shown = "not known" if peak is None else f"{peak / 1e6:.0f} MB"
            section.notes.append(f"the process's peak so far: {shown}")
            section.data["peak_bytes"] = peak
            emit(section)
            found = [f"{v['name']} {v['temporary_mb']:.0f} MB" for v in section.data["variants"]]
            lines.append(f"{row}: {', '.join(found)}")
            emit.note(headline="; ".join(lines))


def study(options: Namespace, emit: Any) -> None:
    """Run one cell of a study twice with a cache of compiled programs: cold, then warm."""
    start(options, emit)
    x = np.random.default_rng(0).normal(size=(1024, 64)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 10, 1024)
    grid = fnn.grid.product(depth=4 if options.quick else 16, width=64, activation="tanh", norm="none", batch_size=32)
    asked = fnn.Study(grid, seeds=2 if options.quick else 8, steps=16 if options.quick else 512, data=((x, y), (x, y)))
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            begin = time.perf_counter()
            done = asked.run(f"{folder}/{name}", cache=f"{folder}/cache", progress=False)
            whole, times = time.perf_counter() - begin, done.times()
            cells.append((name, *(f"{s:.2f}" for s in (times["compile"].sum(), times["run"].sum(), whole))))
            data = {"seeds": asked.seeds, "steps": asked.steps, "cells": cells}
            emit(
                Section("study of one cell", ("run", "compile, s", "run, s", "the whole, s"), cells, [], data),
                replace=len(cells) > 1,
            )
    emit.note(headline=", ".join(f"{name} {whole} s" for name, *_, whole in cells))


def watch(options: Namespace, emit: Any) -> None:
    """Compare `fnn.watch` with a plain gradient: the first rows of the suite, as many nets as the time allows."""
    start(options, emit)
    lines = []
    for name in suite.WORK:
        for section in suite.run(suite_options(options, peers=[name], variants=suite.FIRST), say):
            emit(section)
            found = {v["name"]: v["ratio"]["median"] for v in section.data["variants"]}
            lines.append(f"{name}: default {found[suite.SET]:.2f}, exact alone {found[suite.EXACT]:.2f} x plain")
            emit.note(headline="; ".join(lines))


PARTS = {
    "facts": Part("device, versions, fnn's choices, what the compiler made", 60, facts),
    "rates": Part("matrix products in bf16, TF32 and float32, bandwidth", 40, rates),
    "steps": Part("training steps of all rows against all peers", 190, steps, "default", shared=True),
    "tests": Part("pytest -m accelerator", 180, tests, None, shared=True, cached=True),
    "seeds": Part("64 seeds in one program against one by one", 60, seeds),
    "depth": Part("a step of 10,000 layers", 60, deep),
    "per_example": Part("norms and clipped means of single examples' gradients", 150, examples),
    "memory": Part("temporary and peak memory", 25, memory),
    "study": Part("one cell of a study, cold and warm", 40, study, None),
    "watch": Part("fnn.watch against a plain gradient", 75, watch),
}
