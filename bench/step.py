"""The suite `step`: milliseconds per training step, fnn against its peers."""

import gc
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from bench import limit, problem, timing
from bench.handwritten import reference_losses
from bench.peers import PEERS, Skip
from bench.problem import Problem, Row
from bench.remote import Remote, step_run
from bench.report import Section, describe_error
from bench.timing import Ratio, Run, Times
from bench.trace import record

ABOUT = """\
Milliseconds per training step of a multilayer perceptron with batch norm after every hidden layer and ReLU: mean cross
entropy, clipping by the global norm at 1, Adam, running statistics updated; float32, or where the row says `bf16` with
products in bfloat16 and the rest in float32. A row is width x depth, the number of hidden layers. All peers start from the same weights, and their losses on the first and the third step
agreed with a float64 reference before anything was timed; all return the loss alone, except `fnn-fit-metrics`. Rounds are interleaved, in a random order each; `ms/step` is the median round. `first call` is tracing and
compiling, without the steps that ran in it. `x best` is the median of the ratios within each round; `~` marks peers
whose difference from the best the spread swallows (1 lies between the quartiles). `of floor` is the least time that the
step needs, as a share of the step: its matrix products at the measured rate, or its optimiser's bytes at the measured
bandwidth, whichever is longer."""

NAMES = {name: peer.about for name, peer in PEERS.items()}
COLUMNS = ("peer", "ms/step", "[min..max]", "first call, s", "x best", "of floor")
QUICK_ROWS = ("64x3", "256x8")
AGREE_FIRST, AGREE_THIRD, AGREE_THIRD_SHALLOW, AGREE_ROUNDED = 1e-4, 1e-3, 3e-5, 5e-2
"""How far the loss may lie from the reference: absolute on step 1; relative on step 3, less for the shallow nets, which
do not amplify rounding, so that a wrong rate, decay or clip shows; either, where products round their factors."""
SHALLOW = 8
LATE = "the time for this row was over"


@dataclass
class Entry:
    """What came of one peer in one row."""

    name: str
    outcome: str = "timed"
    """`timed`, `skipped` or `failed`, the last two with a reason."""
    reason: str = ""
    first_seconds: float | None = None
    losses: list[float] | None = None
    times: Times | None = None
    ratio: Ratio | None = None


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Measure the device, then row by row; yield each row's section as soon as it is done."""
    rows = options.rows or [problem.ROWS[name] for name in QUICK_ROWS if options.quick] or _default_rows()
    measured = {}
    for row in rows:
        if row.dtype not in measured:
            limits = measured[row.dtype] = limit.measure(options.quick, row.dtype)
            say(f"{row.dtype} matrix product of {limits.product}³: {limits.flops / 1e9:.0f} GFLOP/s")
            say(f"memory: {limits.bandwidth / 1e9:.1f} GB/s")
        limits = measured[row.dtype]
        yield _row(row, limits, options, say)
        gc.collect()
        jax.clear_caches()


def _default_rows() -> list[Row]:
    """All rows, but on a CPU only those in float32: 4096x8 in bfloat16 takes minutes a step there."""
    return [row for row in problem.ROWS.values() if row.dtype == "float32" or not _on_cpu()]


def steps_per_round(row: Row, quick: bool) -> int:
    """Choose how many steps make a round: many for short steps, few for long ones; on accelerators more of both."""
    operations, most = (2e10, 64) if limit.on_cpu() else (4e12, 256)
    fitting = min(operations / limit.step_flops(row), 4000 / row.depth)
    return int(np.clip(fitting, 6, 8 if quick else most))


def _row(row: Row, limits: limit.Limits, options: Namespace, say: Callable[[str], None]) -> Section:
    rounds = options.rounds or (3 if options.quick else 15)
    work = problem.make(row, steps_per_round(row, options.quick))
    say(f"\n{row}, batch {row.batch}: {work.steps} steps x {rounds} rounds")
    names = options.peers or [name for name, peer in PEERS.items() if peer.default]
    end = time.monotonic() + (getattr(options, "seconds", None) or math.inf)
    begun = {} if _on_cpu() else _begin(names, work, options.all)
    reference = _reference(work)
    entries, runs = [], {}
    for name in names:
        if time.monotonic() > end:
            entries.append(Entry(name, "skipped", LATE))
            continue
        entry, ready = _prepare(name, begun.get(name), work, reference, options.all)
        entries.append(entry)
        if ready is not None:
            runs[name] = ready
        say(
            f"  {name}: " + (f"first call {entry.first_seconds:.1f} s" if ready else f"{entry.outcome}, {entry.reason}")
        )
    if runs:
        _time(entries, runs, (rounds, work.steps, end), say)
    if options.trace and (traced := runs.get("fnn-fit")):
        say("\n".join(record(lambda: traced.advance(traced.items), options.trace / str(row), work.steps)))
    for ready in {**begun, **runs}.values():
        if isinstance(ready, Remote):
            ready.close()
    # Of a row in a hurry XLA's count is not asked: it takes a compilation.
    counted = _counted(work) if end == math.inf else {}
    return _section(row, work, (rounds, limits, counted), reference, entries)


def _begin(names: list[str], work: Problem, lift_limits: bool) -> dict[str, Remote]:
    """Let the other process build and compile its peers while this one does; on a CPU the two would share cores."""
    wanted = [
        name for name in names if PEERS[name].own_process and not PEERS[name].refusal(work.row.depth, lift_limits)
    ]
    return {name: Remote(step_run, name, work.row, work.steps) for name in wanted}


def _prepare(
    name: str, begun: Remote | None, work: Problem, reference: np.ndarray, lift_limits: bool
) -> tuple[Entry, Run | Remote | None]:
    """Build a peer, make its first call and check its losses; what goes wrong is reported, not raised."""
    peer = PEERS[name]
    if refusal := peer.refusal(work.row.depth, lift_limits):
        return Entry(name, "skipped", refusal), None
    try:
        remote = begun or (Remote(step_run, name, work.row, work.steps) if peer.own_process else None)
        ready = remote or peer.build(work)
        seconds, losses = ready.first_round()
    except Skip as skip:
        return Entry(name, "skipped", str(skip)), None
    except Exception as error:
        return Entry(name, "failed", describe_error(error)), None
    entry = Entry(name, first_seconds=seconds, losses=[float(loss) for loss in losses[:3]])
    if complaint := _disagreement(work.row, losses, reference):
        entry.outcome, entry.reason = "failed", complaint
        if isinstance(ready, Remote):
            ready.close()
        return entry, None
    return entry, ready


def _disagreement(row: Row, losses: np.ndarray, reference: np.ndarray) -> str | None:
    first, third = AGREE_FIRST, AGREE_THIRD_SHALLOW if row.depth <= SHALLOW else AGREE_THIRD
    if row.dtype != "float32" or not _exact_products():
        first = third = AGREE_ROUNDED
    off = np.abs(losses[:3] - reference)
    if off[0] <= first and off[2] <= third * abs(reference[2]):  # False for NaN
        return None
    return f"losses {losses[0]:.5f}, {losses[2]:.5f} on steps 1, 3, not {reference[0]:.5f}, {reference[2]:.5f}"


def _exact_products() -> bool:
    """Whether matrix products are true float32; accelerators by default round the factors to 11 bits or 8."""
    return _on_cpu() or jax.config.jax_default_matmul_precision == "highest"


def _on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def _reference(work: Problem) -> np.ndarray:
    """Compute the losses in float64, once for a row."""
    key = work.row, work.steps
    if key not in _references:
        _references[key] = reference_losses(work)
    return _references[key]


_references: dict[tuple[Row, int], np.ndarray] = {}


def _time(
    entries: list[Entry], runs: dict[str, Run], lengths: tuple[int, int, float], say: Callable[[str], None]
) -> None:
    """Fill in the times and ratios of the entries that are ready; `lengths`: rounds, steps of each, when to end."""
    rounds, steps, end = lengths
    failed: dict[str, Exception] = {}

    def on_round(i):
        if i % 5 == 0:
            say(f"  round {i} of {rounds}")

    times = timing.interleave(runs, rounds, steps, on_round, failed, end)
    best = min(times.values(), key=lambda t: t.median, default=None)
    for entry in entries:
        if entry.name in failed:
            entry.outcome, entry.reason = "failed", describe_error(failed[entry.name])
        if entry.name in times:
            entry.times, entry.ratio = times[entry.name], timing.ratio(times[entry.name], best)
            # The first call also ran the steps of its item: one for a loop, all of them for a scan.
            ran = steps / len(runs[entry.name].items)
            entry.first_seconds = max(0.0, entry.first_seconds - ran * entry.times.median / 1e3)
            if not np.isfinite(runs[entry.name].last_losses()).all():
                entry.reason = "the loss was no longer finite at the end"


def _section(
    row: Row, work: Problem, measured: tuple[int, limit.Limits, dict[str, float]], reference: Any, entries: list[Entry]
) -> Section:
    rounds, limits, counted = measured
    steps, floor = work.steps, limit.floor(row, limits)
    notes = [
        f"{steps} steps x {rounds} rounds; {limit.step_flops(row):.3g} FLOP a step in matrix products, "
        f"{_ms(floor.matmul)} ms at {limits.flops / 1e9:.0f} GFLOP/s; optimiser {limit.step_bytes(row):.3g} bytes, "
        f"{_ms(floor.memory)} ms at {limits.bandwidth / 1e9:.1f} GB/s unless they stay in a cache",
        *_warnings(entries),
    ]
    if counted:
        kernels = f"{counted['flops']:.3g} FLOP, {counted['bytes']:.3g} bytes in and out of kernels"
        notes.insert(1, f"XLA's own count of fnn's step: {kernels}")
    cells = [_cells(entry, floor) for entry in entries]
    data = {
        "row": row._asdict() | {"name": str(row)},
        "steps_per_round": steps,
        "limits": limits._asdict(),
        "flops": limit.step_flops(row),
        "xla_counts": counted,
        "floor_ms": floor._asdict(),
        "reference_losses": [float(loss) for loss in reference],
        "peers": [_record(entry, floor) for entry in entries],
    }
    return Section(f"{row}, batch {row.batch}", COLUMNS, cells, notes, data)


def _counted(work: Problem) -> dict[str, float]:
    """Ask XLA what fnn's step computes and moves, to lay beside the counts from shapes; NaN where it does not say."""
    try:
        ready = PEERS["fnn-loop"].build(work)
        analysis = ready.call.lower(ready.state, ready.items[0]).compile().cost_analysis() or {}
    except Exception:  # the peer's own row says what is wrong with it
        analysis = {}
    return {"flops": analysis.get("flops", float("nan")), "bytes": analysis.get("bytes accessed", float("nan"))}


def _cells(entry: Entry, floor: limit.Floor) -> tuple[str, ...]:
    if entry.times is None:
        return (entry.name, entry.outcome, "", "", "", "")
    t, best = entry.times, entry.ratio == Ratio(1, 1, 1)
    return (
        entry.name,
        _ms(t.median),
        f"[{_ms(t.low)}..{_ms(t.high)}]",
        f"{entry.first_seconds:.2f}",
        f"{'~' if entry.ratio.unsure and not best else ''}{entry.ratio.median:.2f}",
        f"{100 * max(floor) / t.median:.0f} %",
    )


def _warnings(entries: list[Entry]) -> list[str]:
    timed = [entry for entry in entries if entry.ratio is not None]
    best = next((entry.name for entry in timed if entry.ratio == Ratio(1, 1, 1)), "")
    unsure = [entry.name for entry in timed if entry.ratio.unsure and entry.name != best]
    spread = [f"warning: the spread swallows the difference between {best} and {', '.join(unsure)}"] if unsure else []
    return spread + [f"{entry.name}: {entry.outcome}: {entry.reason}" for entry in entries if entry.reason]


def _record(entry: Entry, floor: limit.Floor) -> dict[str, Any]:
    record = asdict(entry) | {"about": PEERS[entry.name].about, "times": None, "ratio": None}
    if entry.times is not None:
        t = entry.times
        record["times"] = {"median_ms": t.median, "min_ms": t.low, "max_ms": t.high, "rounds_ms": list(t.rounds)}
        record["ratio"] = entry.ratio._asdict()
        record["share_of_floor"] = max(floor) / t.median
        record["share_of_matmul"] = floor.matmul / t.median
    return record


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
