"""The suite `sweep`: many seeds in one compiled program, against loops over the seeds."""

import functools
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import fnn
from bench import handwritten, limit, problem, timing
from bench.problem import MAX_NORM, Problem, Row
from bench.report import Section
from bench.timing import Run

ABOUT = """\
Milliseconds for one step of one run, when many seeds are trained (the net of the suite `step`, each seed from weights
of its own, all on the same batches). `fnn-sweep` maps one train step over the seeds with `vmap` and scans over the
steps: one program, in which learning rate and clipping threshold are traced, so that they may differ as well. The
others go through the seeds in a Python loop. Before timing, the losses of every seed agreed on the first step (1e-4)
and on the third (1e-3 relative). Rounds are interleaved; medians, with the fastest and the slowest round.

`fnn-study` is `fnn.Study` itself on the first row: the same net with taps, batches drawn anew in each epoch, all
quantities measured before the first and after the last step, the held-out loss, a Parquet file; `the whole` adds its
compilation (anew in every round) and all that `Study.run` does around it. Beside it the Python loop of hand-written
steps over as many seeds and steps, which measures nothing."""

COLUMNS = ("variant", "ms per run and step", "[min..max]", "first call, s", "x fnn-sweep")
NAMES = {
    "fnn-sweep": "vmap over seeds inside scan over steps, one program",
    "fnn-loop": "a Python loop over seeds; for each fnn's scan over steps",
    "jax-steps": "a Python loop over seeds; for each a hand-written scan over steps",
    "jax-loop": "a Python loop over seeds and steps, around a hand-written jitted step",
}
ROWS, QUICK_ROWS = ((Row(64, 3, 32), 32), (Row(64, 8, 32), 64), (Row(256, 8, 128), 8)), ((Row(64, 3, 32), 4),)


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the rows; yield each one's section as soon as it is done."""
    wanted, steps = getattr(options, "seeds", 32), getattr(options, "steps", 8)
    rows = [(row, wanted) for row in options.rows] if options.rows else QUICK_ROWS if options.quick else ROWS
    for row, seeds in rows:
        works = [problem.make(row, steps, key=jax.random.key(seed)) for seed in range(seeds)]
        say(f"\n{row}, batch {row.batch}: {seeds} seeds")
        runs, first, reference = {}, {}, None
        for name in options.peers or NAMES:
            runs[name] = BUILDERS[name](works)
            first[name], losses = runs[name].first_round()
            losses = losses.reshape(seeds, steps)
            reference = losses if reference is None else reference
            off = np.abs(losses - reference)
            first_off, third_off = (1e-4, 1e-3) if limit.exact_products() else (5e-2, 5e-2)
            if not (off[:, 0].max() <= first_off and (off[:, 2] / reference[:, 2]).max() <= third_off):
                raise ValueError(f"sweep: {name} is off by {off[:, 0].max():.1e}, {off[:, 2].max():.1e} on steps 1, 3")
            say(f"  {name}: first call {first[name]:.1f} s")
        rounds = options.rounds or (3 if options.quick else 11)
        times = timing.interleave(runs, rounds, steps * seeds, lambda i: say(f"  round {i}") if i % 5 == 0 else None)
        base, cells, records = next(iter(times.values())), [], []
        for name, t in times.items():
            ratio = timing.ratio(t, base)
            cells.append(
                (name, f"{t.median:.3f}", f"[{t.low:.3f}..{t.high:.3f}]", f"{first[name]:.2f}", f"{ratio.median:.2f}")
            )
            records.append({"name": name, "ms": t.rounds, "ratio": ratio._asdict(), "first_s": first[name]})
        notes = [f"{name}: {NAMES[name]}" for name in times]
        yield Section(
            f"{row}, batch {row.batch}, {seeds} seeds", COLUMNS, cells, notes, {"row": str(row), "variants": records}
        )
        jax.clear_caches()
    if not options.peers:
        say("\nfnn.Study")
        yield _study(
            rows[0][0], rows[0][1], 16 if options.quick else 512, options.rounds or (2 if options.quick else 7)
        )


def _study(row: Row, seeds: int, steps: int, rounds: int) -> Section:
    """Time a study of some seeds, as its users run it, and the loop of hand-written steps."""
    works = [problem.make(row, 8, key=jax.random.key(seed)) for seed in range(seeds)]
    loop = _each(_jax_loop)(works)
    loop.advance(loop.items)
    x, y = (np.asarray(a).reshape(-1, *a.shape[2:]) for a in (works[0].xs, works[0].ys))
    grid = fnn.grid.product(
        depth=row.depth,
        width=row.width,
        activation="relu",
        norm="batch_norm",
        init="orthogonal",
        batch_size=row.batch,
        optimizer="adam",
        learning_rate=problem.RATE,
        clip="global_norm",
        clip_threshold=MAX_NORM,
    )
    study = fnn.Study(grid, seeds=seeds, steps=steps, data=((x, y), (x, y)))
    taken: dict[str, list[float]] = {"fnn-study": [], "fnn-study, the whole": [], "jax-loop": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = study.run(f"{folder}/study", progress=False)
            taken["fnn-study, the whole"].append(time.perf_counter() - start)
            taken["fnn-study"].append(float(done.times()["run"].sum()))
        repeats = -(-steps // len(works[0].batches))
        seconds = sum(loop.advance(loop.items)[0] for _ in range(repeats))
        taken["jax-loop"].append(seconds * steps / (repeats * len(works[0].batches)))
    times = {name: timing.Times(tuple(1e3 * s / steps / seeds for s in took)) for name, took in taken.items()}
    base, cells, records = times["fnn-study"], [], []
    for name, t in times.items():
        ratio = timing.ratio(t, base)
        cells.append((name, f"{t.median:.3f}", f"[{t.low:.3f}..{t.high:.3f}]", f"{ratio.median:.2f}"))
        records.append({"name": name, "ms": t.rounds, "ratio": ratio._asdict()})
    columns = ("variant", "ms per run and step", "[min..max]", "x fnn-study")
    notes = [f"{steps} steps, {rounds} rounds"]
    title = f"fnn.Study: {row}, batch {row.batch}, {seeds} seeds"
    return Section(title, columns, cells, notes, {"row": str(row), "steps": steps, "variants": records})


def _sweep(works: list[Problem]) -> Run:
    starts = [problem.fnn_start(work.row, key=jax.random.key(seed)) for seed, work in enumerate(works)]
    states = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *(state for *_, state in starts))
    net = starts[0][0]

    def one(state, settings, batches):
        limit, rate = settings
        optimizer = fnn.optimizers.packed(optax.chain(fnn.clip.by_global_norm(limit), optax.adam(rate)))
        step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
        return jax.lax.scan(step.pure, state, batches)

    mapped = jax.jit(jax.vmap(one, in_axes=(0, 0, None)), donate_argnums=0)
    settings = tuple(jax.numpy.full(len(works), value) for value in (MAX_NORM, problem.RATE))
    batches = (works[0].xs, works[0].ys)
    return Run(lambda s, b: mapped(s, settings, b), states, [batches], lambda metrics: np.ravel(metrics["loss"]))


def _each(build: Callable[[Problem], tuple[Callable[..., Any], Any, list[Any]]]) -> Callable[[list[Problem]], Run]:
    """Run one peer for all seeds, in a Python loop: its state is the list of their states."""

    def several(works):
        call, _, items = build(works[0])
        states = [build(work)[1] for work in works]

        def every(states, _):
            outs = []
            for i, state in enumerate(states):
                for item in items:
                    state, out = call(state, item)
                    outs.append(out)
                states[i] = state
            return states, outs

        return Run(every, states, [None], lambda outs: np.concatenate([np.atleast_1d(o) for o in jax.device_get(outs)]))

    return several


def _fnn_loop(work: Problem) -> tuple[Callable[..., Any], Any, list[Any]]:
    net, optimizer, state = problem.fnn_start(work.row, key=work.key)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))

    def call(state, item):
        state, metrics = step.stretch(state, item)
        return state, metrics["loss"]

    return call, state, [(work.xs, work.ys)]


def _jax_steps(work: Problem) -> tuple[Callable[..., Any], Any, list[Any]]:
    step, state = handwritten.unrolled(work)
    return jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0), state, [(work.xs, work.ys)]


def _jax_loop(work: Problem) -> tuple[Callable[..., Any], Any, list[Any]]:
    step, state = handwritten.unrolled(work)
    return jax.jit(step, donate_argnums=0), state, work.batches


BUILDERS = {
    "fnn-sweep": _sweep,
    "fnn-loop": _each(_fnn_loop),
    "jax-steps": _each(_jax_steps),
    "jax-loop": _each(_jax_loop),
}
