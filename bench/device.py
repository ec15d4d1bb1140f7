"""What the device is and can do, what fnn chooses for it, and what the compiler makes of that: parts of `bench/accelerator.py`."""

import inspect
import re
import subprocess
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from bench import limit, problem
from bench.emitter import batch, start
from bench.problem import Row
from bench.report import Section, describe_error
from fnn import lowering
from fnn.training.step import METRICS

CHOICES: dict[str, Callable[[], Any]] = {
    name: function
    for name, function in vars(lowering).items()
    if inspect.isfunction(function) and not inspect.signature(function).parameters
} | {
    "convolution 3x3 of 32 channels": lambda: lowering.convolution(False, 1, 32, 2, 288, 1 << 24),
    "lanes_budget": lambda: f"{lowering.lanes_budget(jax.devices()[0]) / 2**20:.0f} MiB",
    "one process for 8 cells": lambda: lowering.one_process(8),
}


def facts(options: Namespace, emit: Any) -> None:
    """List the device, fnn's choices for it, and what the compiler made of attention and of a train step."""
    start(options, emit)
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
    text = ready.jitted.lower(state, batch(Row(64, 8, 32))).compile().as_text()
    called = _custom_calls(text)
    host = sum(map(text.count, (" outfeed(", " infeed(", " send(", " recv(", "S(5)")))
    counts = (text.count(" conditional("), text.count(" while("), sum("callback" in name for name in called), host)
    return (*map(str, (*counts, text.count(" fusion("))), ", ".join(called) or "none")


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
    start(options, emit)
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
    shown = [f"{name} {data[f'{SQUARE}: {name}'] / 1e12:.2f}" for name in RATES]
    emit.note(headline=f"{', '.join(shown)} TFLOP/s; {moved / 1e9:.0f} GB/s")
