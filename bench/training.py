"""The part of `bench/accelerator.py` that times training steps: rows of the suites `step` and `models`, the most wanted first."""

import contextlib
import gc
import importlib.util
import json
import multiprocessing
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import limit, models, remote, step
from bench.device import SQUARE
from bench.emitter import say, start, suite_options
from bench.problem import ROWS, Row
from bench.report import Section, describe_error

WRITTEN_OUT = ("fnn-fit", "fnn-loop", "jax-unrolled", "jax-steps-unrolled", "linen", "nnx", "equinox", "torch")
SCANNED = ("fnn-fit", "fnn-loop", "jax-scanned", "jax-steps", "linen-scan", "torch")
NETS = ("fnn-stretch", "fnn-loop", "jax", "jax-steps", "linen-steps", "nnx", "equinox", "torch")
LARGE = ("fnn-stretch", "jax", "linen", "nnx", "equinox", "torch")
"""Peers of a row: each library in the ways that have been fastest; a net that is large runs as fast in a loop."""
COMPILED = ("fnn-fit", "fnn-stretch", "torch-compile")
SECONDS, AT_MOST = 40, 75
"""For one row: peers that would begin later are skipped; the row is given up. PyTorch's compiler may take as long as all
others together, so that it has runs of its own, later."""
ORDER = ("mlp-bf16", "transformer-100m", "1024x4", "convnet", "lstm", "64x256", "resnet")


class Work(NamedTuple):
    """One row of a suite, and the peers that take part."""

    suite: Any
    row: Any
    peers: tuple[str, ...]


def works(quick: bool) -> dict[str, Work]:
    """List the rows that there are, in order of worth."""
    small = {"mlp-bf16": (64, 4, 64), "1024x4": (128, 4, 64), "64x256": (16, 8, 32)}
    named = {str(row): row for row in ROWS.values()}
    found = {
        "1024x4": Work(step, named["1024x4"], WRITTEN_OUT),
        "64x256": Work(step, named["64x256"], SCANNED),
    }
    if "dtype" in Row._fields:
        found["mlp-bf16"] = Work(step, Row(4096, 8, 8192, "bfloat16"), WRITTEN_OUT)
    if quick:
        found = {name: w._replace(row=Row(*small[name], *w.row[3:]), peers=w.peers[::2]) for name, w in found.items()}
    nets = [name for name in models.MODELS if name in ORDER and not (quick and name != "transformer-100m")]
    found |= {
        name: Work(models, name, LARGE[::2] if quick else LARGE if name == "transformer-100m" else NETS)
        for name in nets
    }
    return {name: found[name] for name in ORDER if name in found}


def steps(options: Namespace, emit: Any) -> None:
    """Time training steps of all rows, then each against compiled PyTorch."""
    start(options, emit)
    rows, done = works(options.quick), []
    if options.rows:
        rows = {name: work for name, work in rows.items() if name in options.rows}
    tasks = [(name, False) for name in rows]
    if importlib.util.find_spec("torch") and not options.peers:
        tasks += [(name, True) for name, work in rows.items() if "torch-compile" in work.suite.NAMES]
    for name, compiled in tasks:
        work = rows[name]
        asked = options.peers or (COMPILED if compiled else work.peers)
        peers = [peer for peer in asked if peer in work.suite.NAMES]
        title, began = f"{name}, against compiled PyTorch" if compiled else name, time.perf_counter()
        say(f"\n{title}: {', '.join(peers)}")
        line = ""
        try:
            asked = suite_options(options, rows=[work.row], peers=peers, seconds=SECONDS)
            with _alarm(AT_MOST):
                for section in work.suite.run(asked, say):
                    section.title = title
                    if "flops" in section.data and (name == "mlp-bf16" or section.data.get("dtype") == "bfloat16"):
                        _add_share(section, Path(options.out))
                    emit(section)
                    line = _in_one_line(section)
        except Exception as error:
            _clear_up()
            line = describe_error(error)
            emit(Section(title, ("outcome",), [("failed",)], [line], {"error": line}))
        done.append(f"{title} ({time.perf_counter() - began:.0f} s): {line}")
        emit.note(headline="; ".join(done))
    if missing := [name for name in ORDER if name not in rows and not (options.rows or options.quick)]:
        emit.note(headline="; ".join([*done, f"not there yet: {', '.join(missing)}"]))


def _medians(section: Section) -> dict[str, float]:
    """Read milliseconds off what either suite writes."""
    rounds = {
        peer["name"]: (peer.get("times") or {}).get("rounds_ms", peer.get("ms")) for peer in section.data["peers"]
    }
    return {name: float(np.median(ms)) for name, ms in rounds.items() if ms}


def _in_one_line(section: Section) -> str:
    times = sorted(_medians(section).items(), key=lambda item: item[1])
    return ", ".join(f"{name} {ms:.3g}" for name, ms in times) + " ms" if times else "nobody was timed"


def _add_share(section: Section, folder: Path) -> None:
    """Add what share of the device's measured bfloat16 rate each peer's products reach."""
    flops, best = section.data["flops"], _bfloat16_rate(folder)
    shares = {name: flops / (ms / 1e3) / best for name, ms in _medians(section).items()}
    shown = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    section.notes.insert(0, f"of {best / 1e12:.1f} TFLOP/s in bfloat16 ({flops:.4g} FLOP a step): {shown}")
    section.data |= {"share_of_bfloat16_rate": shares, "bfloat16_rate": best}


def _bfloat16_rate(folder: Path) -> float:
    """Take the rate that the part `rates` has measured, or measure it."""
    with contextlib.suppress(OSError, KeyError, IndexError):
        return json.loads((folder / "rates.json").read_text())["sections"][0]["data"]["rates"][f"{SQUARE}: bfloat16"]
    n = 512 if limit.on_cpu() else 8192
    return 2 * n**3 / limit.product_seconds((n, n, n), jnp.bfloat16, queued=8)


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


def _clear_up() -> None:
    """Free what a row that was cut short holds, and end PyTorch's process; the next row starts another."""
    for process in multiprocessing.active_children():
        process.kill()
    for server in getattr(remote, "_servers", ()):
        server.alive = False
    gc.unfreeze()
    gc.collect()
    jax.clear_caches()
