"""The suite `watch`: what `fnn.watch` adds to a plain gradient, and what the same readings cost with other libraries' means."""

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import fnn
from bench import limit, timing, watching
from bench.remote import Remote
from bench.report import Section, describe_error
from bench.timing import Run
from fnn.gradients.labels import DEFAULT, GROUPS
from fnn.gradients.price import clock

ABOUT = """\
Milliseconds, XLA's temporary memory and seconds to compile of `fnn.watch(loss).value_and_grad`, which gives loss, gradient and
readings, beside the plain `jax.value_and_grad` of the same loss. Gradients of all variants agreed before anything was timed.
`default` reads of every layer the error signal, the gradient's norm, and mean, second moment and dead fraction of input and
output; `default and kurtosis` one group more. `exact gradient alone` reads nothing: its gradients hold at any size. `a step in
between` is one of the 49 of `every=50` that are not measured, called from Python. Rounds are interleaved; the median round,
with the fastest and the slowest; `x plain` are medians of ratios within a round. `bar` is the most that they may be. The last
table is about the readings of the default set with other means; its readings agreed with fnn's before anything was timed."""

COLUMNS = ("variant", "ms", "[min..max]", "x plain", "bar", "temporary MB", "x memory", "bar ", "compile, s")
WORK = {
    "mlp": "8 hidden layers of 512, batch 256",
    "transformer": "4 blocks of width 128, 64 positions, batch 32",
    "scan": "64 tanh layers of width 128, in `scan`, batch 128",
}
OTHERS = {
    "jax": "zeros added by hand to each output of the mlp, in plain JAX",
    "nnx": "`sow`, `perturb` and `capture` of Flax NNX on the mlp",
    "equinox": "a `filter_custom_vjp` in each layer of the mlp",
    "torch": "hooks of PyTorch on the mlp's layers and outputs, in a process of its own",
}
NAMES = WORK | OTHERS
PLAIN, EXACT, SET, BETWEEN = "plain gradient", "exact gradient alone", "default", "a step in between"
FIRST = (PLAIN, SET, EXACT, BETWEEN)
"""What `bench/accelerator.py` measures, in its limit of time."""
BARS = {SET: (1.15, 1.1), EXACT: (2, None), BETWEEN: (None, 1)}


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the nets, then the other means; yield each section as soon as it is done."""
    names = options.peers or NAMES
    for name in (n for n in WORK if n in names):
        yield _section(name, options, say)
        gc.collect()
        jax.clear_caches()
    if others := [n for n in names if n in OTHERS]:
        yield _others(others, options, say)


def variants(p: watching.Problem) -> dict[str, Callable[[Any, Any], Any]]:
    """Write each as a function of parameters and batch that returns (loss, gradient) first."""
    sets: dict[str, tuple[str, ...]] = {SET: DEFAULT, EXACT: ()}
    sets |= {f"{SET} and {group}": (*DEFAULT, group) for group in GROUPS if group not in DEFAULT}
    sets["all groups"] = GROUPS
    functions = {name: fnn.watch(p.loss, groups=groups).value_and_grad for name, groups in sets.items()}
    between = fnn.watch(p.loss, every=50)
    functions[BETWEEN] = lambda params, batch: between.value_and_grad(params, batch, step=1)
    return {PLAIN: lambda params, batch: (jax.value_and_grad(p.loss)(params, batch),), **functions}


def _section(name: str, options: Namespace, say: Callable[[str], None]) -> Section:
    """Check, time and tabulate the variants of one net."""
    title = f"{name}: {'a small one' if options.quick else WORK[name]}"
    say(f"\n{title}")
    p, wanted = watching.problem(name, options.quick), getattr(options, "variants", None)
    runs, memory, seconds = {}, {}, {}
    for variant, function in variants(p).items():
        if wanted and variant not in wanted:
            continue
        program, memory[variant], seconds[variant] = _compiled(jax.jit(function), p)
        say(f"  {variant}: {seconds[variant]:.1f} s to compile")
        runs[variant] = _run(function if variant == BETWEEN else program, p)
    plain = jax.tree.leaves(runs[PLAIN].call(p.params, p.batch)[1])
    rtol, largest = 1e-3 if limit.exact_products() else 0.1, max(float(np.max(np.abs(b))) for b in plain[1:])
    for run in runs.values():
        found = jax.tree.leaves(run.call(p.params, p.batch)[1][0])
        for a, b in zip(found, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10 * largest)
    times = _interleave(runs, options)
    cells, records = [], []
    for variant, t in times.items():
        ratio, bars = timing.ratio(t, times[PLAIN]), BARS.get(variant, (None, None))
        more = memory[variant] / memory[PLAIN] if memory[PLAIN] else float("nan")
        shown = (f"{t.median:.3f}", f"[{t.low:.3f}..{t.high:.3f}]", f"{ratio.median:.2f}", _bar(bars[0]))
        room = (f"{memory[variant]:.2f}", f"{more:.2f}", _bar(bars[1]), f"{seconds[variant]:.2f}")
        cells.append((variant, *shown, *room))
        record = {"name": variant, "ms": t.rounds, "ratio": ratio._asdict(), "memory_mb": memory[variant]}
        records.append(record | {"compile_s": seconds[variant]})
    return Section(title, COLUMNS, cells, [], {"row": name, "variants": records})


def _compiled(jitted: Any, p: watching.Problem) -> tuple[Any, float, float]:
    """Trace and compile: the program, its temporary MB, and the seconds that it took."""
    with clock() as seconds:  # as without a cache on disk
        program = jitted.lower(p.params, p.batch).compile()
    analysis = program.memory_analysis()
    return program, (analysis.temp_size_in_bytes / 1e6 if analysis else float("nan")), sum(seconds)


def _others(names: list[str], options: Namespace, say: Callable[[str], None]) -> Section:
    """Time the same readings with other means, each beside its own plain gradient."""
    say("\nother means on the mlp")
    p = watching.problem("mlp", options.quick)
    every, room = variants(p), {}

    def ready(variant: str, function: Any) -> Run:
        program, *room[variant] = _compiled(jax.jit(function), p)
        return _run(program, p)

    runs: dict[str, Any] = {f"fnn, {name}": ready(f"fnn, {name}", every[name]) for name in (PLAIN, SET)}
    expected = watching.flat(watching.of_flow(runs[f"fnn, {SET}"].call(p.params, p.batch)[1][1]))
    bases, skipped = dict.fromkeys(runs, f"fnn, {PLAIN}"), []
    remote: list[Remote] = []
    for name in names:
        base, watched = f"{name}, {PLAIN}", f"{name}, readings"
        try:
            if name == "torch":
                pair = [Remote(watching.torch_run, flag, options.quick, 4) for flag in (False, True)]
                remote += pair
                built: dict[str, Any] = dict(zip((base, watched), pair, strict=True))
                found = [other.first_round()[1] for other in pair][1][: expected.size]
            else:
                pair = watching.JAX_PEERS[name](p)
                built = {
                    variant: ready(variant, function) for variant, function in zip((base, watched), pair, strict=True)
                }
                found = watching.flat(built[watched].call(p.params, p.batch)[1][1])
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)
        except Exception as error:
            skipped.append(f"{name}: skipped, {describe_error(error)}")
            continue
        runs |= built
        bases |= dict.fromkeys(built, base)
    times = _interleave(runs, options, 4)
    for other in remote:
        other.close()
    cells, records = [], []
    for variant, t in times.items():
        ratio = timing.ratio(t, times[bases[variant]])
        mb, seconds = room.get(variant, (None, None))
        shown = (f"{t.median:.3f}", f"[{t.low:.3f}..{t.high:.3f}]", f"{ratio.median:.2f}", bases[variant])
        cells.append((variant, *shown, *("" if number is None else f"{number:.2f}" for number in (mb, seconds))))
        record = {"name": variant, "ms": t.rounds, "base": bases[variant], "ratio": ratio._asdict()}
        records.append(record | {"memory_mb": mb, "compile_s": seconds})
    columns = ("variant", "ms", "[min..max]", "x its plain", "its plain", "temporary MB", "compile, s")
    return Section(
        "other means on the mlp" + (", a small one" if options.quick else ""),
        columns,
        cells,
        skipped,
        {"row": "others", "variants": records},
    )


def _run(function: Callable[[Any, Any], Any], p: watching.Problem) -> Run:
    return Run(lambda params, batch: (params, function(params, batch)), p.params, [p.batch] * 4)


def _interleave(runs: dict[str, Any], options: Namespace, calls: int | None = None) -> dict[str, timing.Times]:
    """Time all in rounds of `calls`; without that, of 4, or more where 4 plain gradients take less than 20 ms."""
    plain = next(iter(runs.values()))
    plain.advance(plain.items)
    if calls is None:
        calls = int(np.clip(0.02 / (plain.advance(plain.items)[0] / 4), 4, 64))
        for run in runs.values():
            run.items = list(run.items[:1]) * calls
    return timing.interleave(runs, options.rounds or (3 if options.quick else 15), calls, lambda _: None)


def _bar(bar: float | None) -> str:
    return "" if bar is None else f"{bar:g}"
