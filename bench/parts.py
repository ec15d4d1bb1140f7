"""The parts of `bench/accelerator.py`, in order of worth. A part is a function (options, emit): it hands over each table as
soon as it has it, `emit(section)`, and says the outcome in one line, `emit.note(headline=...)`."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from bench import depth, limit, models, per_example, problem, report, step, sweep, timing
from bench.problem import Row
from bench.report import Section, describe_error
from bench.timing import Run
from fnn import lowering
from fnn.training.step import METRICS


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


def start(emit: Any) -> None:
    """Write down the machine."""
    emit.note(environment=report.environment() | {"platform": jax.devices()[0].platform})


# Facts ----------------------------------------------------------------------------------------------------------------

CHOICES: dict[str, Callable[[], Any]] = {
    "platform": lambda: lowering.platform(),
    "conditionals": lambda: lowering.conditionals(),
    "convolution 3x3 of 32 channels": lambda: lowering.convolution(False, 1, 32, 2, 288, 1 << 24),
    "attention written out, float32": lambda: lowering.written_out_attention(False, False),
    "attention written out, bfloat16": lambda: lowering.written_out_attention(True, False),
    "lanes_budget": lambda: f"{lowering.lanes_budget(jax.devices()[0]) / 2**20:.0f} MiB",
    "one process for 8 cells": lambda: lowering.one_process(8),
}


def facts(options: Namespace, emit: Any) -> None:
    """List the device, fnn's choices for it, and what the compiler made of attention and of a train step."""
    start(emit)
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    rows = [("device", f"{device.device_kind}, {device.platform}, {len(jax.devices())} of them")]
    rows += [(name, f"{value / 2**30:.2f} GiB") for name, value in memory.items() if "limit" in name]
    rows += [("nvidia-smi", _driver())]
    rows += [(f"lowering: {name}", _attempt(choice)) for name, choice in CHOICES.items()]
    emit(_listing("device and choices", rows))
    found = {f"attention, {name}": _attempt(lambda t=t: _attention(t)) for name, t in ATTENTIONS.items()}
    emit(_listing("device and choices", rows + list(found.items())), replace=True)
    emit.note(headline=f"{device.device_kind}; attention in bfloat16: {found['attention, causal, bfloat16'][:40]}")
    counts = [("step of 64x8, loss alone", *_step_counts(("loss",))), ("the same, all metrics", *_step_counts(METRICS))]
    columns = ("program", "conditionals", "loops", "callbacks", "copies to the host", "fusions", "custom calls")
    emit(Section("what the compiler made", columns, counts, [], {"counts": counts}))


ATTENTIONS = {
    "causal, bfloat16": (jnp.bfloat16, True),
    "bfloat16": (jnp.bfloat16, False),
    "float32": (jnp.float32, True),
}


def _attention(case: tuple[Any, bool]) -> str:
    """Say which implementation computes attention and its gradient."""
    dtype, causal = case
    net = fnn.compute_in(fnn.attention(8, causal=causal), dtype)
    x = jax.random.normal(jax.random.key(0), (4, 256, 512))
    params, state = net.init(jax.random.key(0), x)
    text = _compiled(jax.grad(lambda p: jnp.sum(net.apply(p, state, x)[0])), params)
    called = _custom_calls(text)
    fused = [name for name in called if re.search("fmha|flash|attention|cudnn.*sdpa", name)]
    return f"{'cudnn' if any('cudnn' in name for name in fused) else 'xla'} ({', '.join(called) or 'no custom calls'})"


def _step_counts(metrics: tuple[str, ...]) -> tuple[str, ...]:
    net, optimizer, state = problem.fnn_start(Row(64, 8, 32))
    ready = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=metrics)
    text = ready.jitted.lower(state, _batch(Row(64, 8, 32))).compile().as_text()
    called = _custom_calls(text)
    host = sum(map(text.count, (" outfeed(", " infeed(", " send(", " recv(", "S(5)")))
    counts = (text.count(" conditional("), text.count(" while("), sum("callback" in name for name in called), host)
    return (*map(str, (*counts, text.count(" fusion("))), ", ".join(called) or "none")


def _batch(row: Row) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (row.batch, problem.FEATURES))
    return x, jax.random.randint(jax.random.key(2), (row.batch,), 0, problem.CLASSES)


def _compiled(function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text() or ""


def _custom_calls(text: str) -> list[str]:
    return sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))


def _driver() -> str:
    query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"none ({type(error).__name__})"


def _attempt(ask: Callable[[], Any]) -> str:
    try:
        return str(ask())
    except Exception as error:
        return describe_error(error)


def _listing(title: str, rows: list[tuple[str, str]]) -> Section:
    return Section(title, ("what", "value"), rows, [], dict(rows))


# Rates ----------------------------------------------------------------------------------------------------------------

RATES = {
    "bfloat16": (jnp.bfloat16, "default"),
    "float32, default precision": (jnp.float32, "default"),
    "float32, highest precision": (jnp.float32, "highest"),
}
SQUARE, WIDE = "square", "8192 examples, width 4096"


def rates(options: Namespace, emit: Any) -> None:
    """Measure the rate of matrix products in each precision, and the bandwidth."""
    start(emit)
    small = options.quick or limit.on_cpu()
    shapes = {SQUARE: (512,) * 3 if small else (8192,) * 3, WIDE: (256, 128, 128) if small else (8192, 4096, 4096)}
    tries, queued = (3, 2) if small else (10, 8)
    cells, data = [], {}
    for kind, shape in shapes.items():
        for name, (dtype, precision) in RATES.items():
            seconds = limit.product_seconds(shape, dtype, precision, tries, queued)
            data[f"{kind}: {name}"] = rate = 2 * np.prod(shape, dtype=float) / seconds
            cells.append((name, " x ".join(map(str, shape)), f"{seconds * 1e3:.3f}", f"{rate / 1e12:.2f} TFLOP/s"))
            emit(Section("rates", ("what", "size", "ms", "rate"), cells, [], {"rates": data}), replace=len(cells) > 1)
    data["bandwidth"] = moved = limit.bandwidth(tries, 1 if small else 8)
    cells.append(("x + 1 in place", "float32", "", f"{moved / 1e9:.0f} GB/s"))
    emit(Section("rates", ("what", "size", "ms", "rate"), cells, [], {"rates": data}), replace=True)
    shown = [f"{name.split(' ')[0 if 'b' in name else 1]} {data[f'{SQUARE}: {name}'] / 1e12:.1f}" for name in RATES]
    emit.note(headline=f"{', '.join(shown)} TFLOP/s; {moved / 1e9:.0f} GB/s")


# Steps ----------------------------------------------------------------------------------------------------------------

WRITTEN_OUT = ("fnn-fit", "fnn-loop", "jax-unrolled", "jax-steps-unrolled", "linen", "nnx", "equinox", "torch")
SCANNED = ("fnn-fit", "fnn-loop", "jax-scanned", "jax-steps", "linen-scan", "nnx-scan", "equinox-scan", "torch")


class Work(NamedTuple):
    """One row: the suite that measures it, and how."""

    suite: Any
    row: Any
    peers: tuple[str, ...]
    precision: str = "default"


def works(quick: bool) -> dict[str, Work]:
    """List the rows in order of worth."""
    named = {str(row): row for row in problem.ROWS.values()} | problem.ROWS
    found = {
        "mlp bf16": Work(step, Row(64, 4, 64) if quick else Row(4096, 8, 8192), WRITTEN_OUT, "bf16"),
        "1024x4": Work(step, Row(128, 4, 64) if quick else named["1024x4"], WRITTEN_OUT),
        "64x256": Work(step, Row(32, 16, 32) if quick else named["64x256"], SCANNED),
    }
    order = ("mlp bf16", "transformer-100m", "1024x4", "convnet", "lstm", "64x256", "resnet")
    nets = {name: Work(models, name, tuple(models.NAMES)) for name in order if name in models.MODELS}
    if quick:
        nets = {name: nets[name] for name in ("convnet", "lstm")}
    found |= nets
    return {name: found[name] for name in order if name in found}


def steps(options: Namespace, emit: Any) -> None:
    """Time training steps of all rows, then each against compiled PyTorch, which takes long to compile."""
    start(emit)
    if not limit.on_cpu():  # rounds of at least 20 ms
        longer = {name: dataclasses.replace(model, steps=8 * model.steps) for name, model in models.MODELS.items()}
        models.MODELS.update(longer)
    done = []
    for compiled in (False, True):
        if compiled and importlib.util.find_spec("torch") is None:
            continue
        for name, work in works(options.quick).items():
            names = [peer for peer in work.peers if peer in work.suite.NAMES and "compile" not in peer]
            if compiled:
                names = [peer for peer in work.suite.NAMES if peer in ("fnn-fit", "fnn-stretch", "torch-compile")]
                if "torch-compile" not in names:
                    continue
            title = f"{name}, against compiled PyTorch" if compiled else name
            began = time.perf_counter()
            try:
                with _alarm(60):
                    for section in _rows(work, names, options):
                        section.title = title
                        emit(section)
                        if name == "mlp bf16":
                            emit(_share(section, Path(options.out), title))
            except Exception as error:
                _end_children()
                emit(
                    Section(
                        title, ("outcome",), [("failed",)], [describe_error(error)], {"error": describe_error(error)}
                    )
                )
            done.append(f"{name} {time.perf_counter() - began:.0f} s")
            emit.note(headline="; ".join(done))


def _rows(work: Work, peers: list[str], options: Namespace) -> Iterator[Section]:
    return work.suite.run(suite_options(options, rows=[work.row], peers=peers, precision=work.precision), say)


def _share(section: Section, folder: Path, title: str) -> Section:
    """Lay the operations of a step against the device's measured rate."""
    width, _, batch = (section.data["row"][key] for key in ("width", "depth", "batch"))
    known = folder / "rates.json"
    text = known.read_text() if known.exists() else ""
    rate = re.search(rf'"{SQUARE}: bfloat16": ([\d.e+]+)', text)
    best = float(rate[1]) if rate else 2 * width**2 * batch / limit.product_seconds((batch, width, width), jnp.bfloat16)
    cells, data = [], {}
    for peer in section.data["peers"]:
        if peer["times"]:
            data[peer["name"]] = share = section.data["flops"] / (peer["times"]["median_ms"] / 1e3) / best
            cells.append((peer["name"], f"{100 * share:.1f} %"))
    notes = [f"{section.data['flops']:.4g} FLOP a step in matrix products, against {best / 1e12:.1f} TFLOP/s"]
    return Section(f"{title}: share of the rate", ("peer", "of the bf16 rate"), cells, notes, {"share": data})


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when the time is over, as soon as Python runs again."""

    def ring(*_):
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _end_children() -> None:
    import multiprocessing

    for process in multiprocessing.active_children():
        process.kill()


# Tests ----------------------------------------------------------------------------------------------------------------


class Recorder:
    """A plugin of pytest that writes down outcomes as they come."""

    def __init__(self, emit: Any):
        self.emit, self.counts, self.failures, self.slow, self.written = emit, {}, [], [], 0.0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test's outcome; keep the last lines of a failure."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
            self.slow.append((report.duration, report.nodeid))
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
            self.failures.append((report.nodeid, [strip(line)[:200] for line in lines[-6:]]))
        if report.failed or time.monotonic() - self.written > 2:
            self.write()

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        """Write the rest."""
        self.write()

    def write(self) -> None:
        """Hand over the table as it is now."""
        self.written = time.monotonic()
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items()))
        cells = [(name, " / ".join(lines[-3:])[:300]) for name, lines in self.failures]
        slow = [f"{seconds:.1f} s {name}" for seconds, name in sorted(self.slow, reverse=True)[:5]]
        data = {"counts": self.counts, "failures": self.failures, "slowest": slow}
        title = f"tests: {counts or 'none'}"
        self.emit(Section(title, ("failed", "last lines"), cells, ["slowest: " + "; ".join(slow)], data), replace=True)
        self.emit.note(headline=counts)


def strip(line: str) -> str:
    """Take a line of a report without paths."""
    return report.without_paths(line)


def tests(options: Namespace, emit: Any) -> None:
    """Run the tests marked `accelerator` on the default backend, in several processes."""
    import pytest

    recorder = Recorder(emit)
    arguments = ["-m", "accelerator", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", "2" if options.quick else str(min(8, os.cpu_count() or 1))]
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


def seeds(options: Namespace, emit: Any) -> None:
    """Train 64 seeds in one program, and one after the other."""
    start(emit)
    row, count = (Row(16, 3, 8), 4) if options.quick else (Row(64, 8, 32), 64)
    lengths = {"seeds": count, "steps": 8 if limit.on_cpu() else 32}
    for section in sweep.run(suite_options(options, rows=[row], peers=list(sweep.NAMES), **lengths), say):
        emit(section)
        ratios = {v["name"]: v["ratio"]["median"] for v in section.data["variants"]}
        emit.note(headline=", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()) + " x fnn-sweep")


def deep(options: Namespace, emit: Any) -> None:
    """Trace, lower, compile and run a train step of 10,000 layers in `repeat`."""
    start(emit)
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

    net, optimizer, state = clock("init", lambda: jax.block_until_ready(problem.fnn_start(row, unroll=1)))
    ready = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
    state, batch = jax.tree.map(jnp.copy, state), _batch(row)
    traced = clock("trace", lambda: ready.jitted.trace(state, batch))
    lowered = clock("lower", traced.lower)
    compiled = clock("compile", lowered.compile)
    call = Run(compiled, state, [batch] * (2 if options.quick else 4), lambda metrics: metrics["loss"])
    clock("first step", lambda: call.advance([batch]))
    rounds = [clock(f"round {i}", lambda: call.advance(call.items))[0] for i in range(2 if options.quick else 5)]
    ms = 1e3 * float(np.median(rounds)) / len(call.items)
    losses = call.last_losses()
    total = sum(taken[name] for name in ("trace", "lower", "compile"))
    emit.note(headline=f"first call {total:.1f} s, {ms:.1f} ms a step, loss {losses[-1]:.4f}")
    if not np.isfinite(losses).all():
        raise ValueError(f"depth {row.depth}: the losses are {losses}")


# Gradients of examples, memory, study, watch --------------------------------------------------------------------------


def examples(options: Namespace, emit: Any) -> None:
    """Time norms, sums and clipped sums of gradients: in true float32, then the mlp in the default precision."""
    start(emit)
    names = ["conv"] if options.quick else list(per_example.WORK)
    lines = []
    for precision in ("highest", "default"):
        jax.config.update("jax_default_matmul_precision", precision)
        for name in names if precision == "highest" else names[:1]:
            try:
                for section in per_example.run(suite_options(options, peers=[name]), say):
                    section.title += f", precision {precision}"
                    emit(section)
                    ratios = [f"{v['ratio']['median']:.2f}" for v in section.data["variants"][1:4]]
                    lines.append(f"{name}, {precision}: {', '.join(ratios)}")
            except (AssertionError, jax.errors.JaxRuntimeError) as error:
                lines.append(f"{name}, {precision}: failed")
                emit(
                    Section(f"{name}, precision {precision}", ("outcome",), [("failed",)], [describe_error(error)], {})
                )
            emit.note(headline="; ".join(lines))


def memory(options: Namespace, emit: Any) -> None:
    """Compare XLA's temporary memory of a step with the device's peak, with and without recomputation."""
    start(emit)
    rows = (Row(128, 4, 64), Row(64, 64, 64)) if options.quick else (Row(1024, 4, 512), Row(64, 1000, 256))
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
    start(emit)
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
    """Compare `fnn.watch` with a plain gradient."""
    start(emit)
    if not hasattr(fnn, "watch"):
        emit.note(headline="not there yet")
        return
    net = fnn.models.mlp(depth=8, width=64 if options.quick else 512, classes=10)
    batch = _batch(Row(64, 8, 256))
    params, state = net.init(jax.random.key(0), batch[0])

    def loss(p, batch):
        return jnp.mean(fnn.losses.cross_entropy(net.apply(p, state, batch[0])[0], batch[1]))

    functions = {"plain gradient": jax.jit(jax.grad(loss)), "watch": jax.jit(fnn.watch(loss))}
    runs = {
        name: Run(lambda p, b, f=f: (p, f(p, b)), params, [batch] * (4 if options.quick else 64))
        for name, f in functions.items()
    }
    times = timing.interleave(runs, 2 if options.quick else 5, len(runs["watch"].items), lambda _: None)
    more = timing.ratio(times["watch"], times["plain gradient"]).median
    cells = [(name, f"{t.median:.3f}") for name, t in times.items()]
    emit(
        Section(
            "watch of an mlp", ("what", "ms"), cells, [], {"ratio": more, "ms": {n: t.rounds for n, t in times.items()}}
        )
    )
    emit.note(headline=f"{more:.2f} x the plain gradient")


PARTS = {
    "facts": Part("device, versions, fnn's choices, what the compiler made", 30, facts),
    "rates": Part("matrix products in bf16, TF32 and float32, bandwidth", 30, rates),
    "steps": Part("training steps of all rows against all peers", 190, steps, "default", shared=True),
    "tests": Part("pytest -m accelerator", 150, tests, None, shared=True, cached=True),
    "seeds": Part("64 seeds in one program against one by one", 40, seeds),
    "depth": Part("a step of 10,000 layers", 40, deep),
    "per_example": Part("norms and clipped means of single examples' gradients", 60, examples),
    "memory": Part("temporary and peak memory", 25, memory),
    "study": Part("one cell of a study, cold and warm", 40, study, None),
    "watch": Part("fnn.watch against a plain gradient", 20, watch),
}
