"""The suite `compile`: seconds from Python to a runnable train step, against depth."""

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from bench import problem
from bench.peers import PEERS, Skip
from bench.problem import Row
from bench.report import Section, describe_error, spread

ABOUT = """\
Seconds to trace and to compile one train step, width 64, batch 64 (the net of the suite `step`), against depth; and
XLA's temporary memory of the compiled step. Every try starts from empty caches; the median of the tries, with the
fastest and the slowest. `build` is drawing and laying out the parameters, once. Nothing is cached on disk."""

COLUMNS = ("peer", "trace, s", "compile, s", "[min..max]", "build, s", "temporary MB")
NAMES = {name: PEERS[name].about for name in ("fnn-loop", "jax-scanned", "linen-scan", "jax-unrolled", "linen")}
DEPTHS, QUICK_DEPTHS = (8, 64, 256, 1000, 10_000), (8, 256)


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the depths; yield each one's section as soon as it is done."""
    rows = options.rows or [Row(64, depth, 64) for depth in (QUICK_DEPTHS if options.quick else DEPTHS)]
    for row in rows:
        say(f"\n{row}, batch {row.batch}")
        work, records = problem.make(row, 1, unroll=1), []
        for name in options.peers or NAMES:
            record = {"name": name} | _measure(name, work, options)
            records.append(record)
            say(f"  {name}: " + (record.get("reason") or f"{record['total_s'][1]:.2f} s"))
            gc.collect()
            jax.clear_caches()
        notes = [f"{r['name']}: {r['outcome']}: {r['reason']}" for r in records if "reason" in r]
        cells = [_cells(record) for record in records]
        yield Section(f"{row}, batch {row.batch}", COLUMNS, cells, notes, {"row": str(row), "peers": records})


def _measure(name: str, work: problem.Problem, options: Namespace) -> dict[str, Any]:
    if refusal := PEERS[name].refusal(work.row.depth, options.all):
        return {"outcome": "skipped", "reason": refusal}
    tries = options.rounds or (1 if options.quick or work.row.depth > 1000 else 3)
    traced, compiled = [], []
    try:
        start = time.perf_counter()
        ready = PEERS[name].build(work)
        jax.block_until_ready(ready.state)
        built = time.perf_counter() - start
        for _ in range(tries):
            jax.clear_caches()
            start = time.perf_counter()
            lowered = ready.call.lower(ready.state, ready.items[0])
            traced.append(time.perf_counter() - start)
            executable = lowered.compile()
            compiled.append(time.perf_counter() - start - traced[-1])
    except Skip as skip:
        return {"outcome": "skipped", "reason": str(skip)}
    except Exception as error:
        return {"outcome": "failed", "reason": describe_error(error)}
    memory = executable.memory_analysis()
    return {
        "outcome": "timed",
        "trace_s": _three(traced),
        "compile_s": _three(compiled),
        "total_s": _three(np.add(traced, compiled)),
        "build_s": built,
        "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
    }


def _three(values: Any) -> tuple[float, float, float]:
    return float(np.min(values)), float(np.median(values)), float(np.max(values))


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    if record["outcome"] != "timed":
        return (record["name"], record["outcome"], "", "", "", "")
    memory = record["temporary_mb"]
    return (
        record["name"],
        f"{record['trace_s'][1]:.2f}",
        f"{record['compile_s'][1]:.2f}",
        spread(record["compile_s"], 2),
        f"{record['build_s']:.2f}",
        "" if memory is None else f"{memory:.1f}",
    )
