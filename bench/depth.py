"""The suite `depth`: time and memory of a step against depth, with and without recomputing blocks."""

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator

import jax

import fnn
from bench import problem, timing
from bench.peers import PEERS
from bench.problem import Row
from bench.report import Section
from bench.timing import Run

ABOUT = """\
Milliseconds and XLA's temporary memory of a train step (the net of the suite `step`), against depth, width 64, batch
256. `fnn` keeps every block's activations for the backward pass; `fnn, groups of g` is `repeat(..., checkpoint=g)`,
which keeps every g-th block's input and computes the rest again; `jax-scanned` is written by hand. Rounds are
interleaved; the median round, with the fastest and the slowest; `x fnn` are medians of ratios within a round."""

COLUMNS = ("variant", "ms/step", "[min..max]", "x fnn", "temporary MB", "x fnn ")
GROUPS = (10, 20, 32)
NAMES = {
    "fnn": "no recomputation",
    "fnn-groups": "repeat(..., checkpoint=g)",
    "jax-scanned": PEERS["jax-scanned"].about,
}
DEPTHS, QUICK_DEPTHS = (8, 64, 256, 1000), (64,)


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the depths; yield each one's section as soon as it is done."""
    names = options.peers or NAMES
    for row in options.rows or [Row(64, depth, 256) for depth in (QUICK_DEPTHS if options.quick else DEPTHS)]:
        say(f"\n{row}, batch {row.batch}")
        steps = 4 if options.quick else max(4, min(64, 2000 // row.depth))
        work, runs = problem.make(row, steps, unroll=1), {}
        if "fnn" in names:
            runs["fnn"] = _fnn(work, None)
        if "fnn-groups" in names:
            runs |= {f"fnn, groups of {g}": _fnn(work, g) for g in GROUPS if g < row.depth}
        if "jax-scanned" in names:
            runs["jax-scanned"] = PEERS["jax-scanned"].build(work)
        memory = {}
        for name, ready in runs.items():
            analysis = ready.call.lower(ready.state, ready.items[0]).compile().memory_analysis()
            memory[name] = analysis.temp_size_in_bytes / 1e6 if analysis else float("nan")
            ready.first_round()
        times = timing.interleave(
            runs, options.rounds or (3 if options.quick else 9), steps, lambda i: say(f"  round {i}")
        )
        base = next(iter(runs))
        cells, records = [], []
        for name, t in times.items():
            ratio = timing.ratio(t, times[base])
            cells.append(
                (
                    name,
                    f"{t.median:.2f}",
                    f"[{t.low:.2f}..{t.high:.2f}]",
                    f"{ratio.median:.2f}",
                    f"{memory[name]:.1f}",
                    f"{memory[name] / memory[base]:.3f}",
                )
            )
            records.append({"name": name, "ms": t.rounds, "ratio": ratio._asdict(), "temporary_mb": memory[name]})
        yield Section(f"{row}, batch {row.batch}", COLUMNS, cells, [], {"row": str(row), "variants": records})
        gc.collect()
        jax.clear_caches()


def _fnn(work: problem.Problem, group: int | None) -> Run:
    net, optimizer, state = problem.fnn_start(work.row, unroll=1, checkpoint=group)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
    return Run(step.jitted, state, work.batches, lambda metrics: metrics["loss"])
