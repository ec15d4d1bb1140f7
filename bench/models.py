"""The suite `models`: milliseconds per training step of conv nets, transformers and recurrent nets, against their peers."""

import functools
import gc
import importlib.util
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

import fnn
from bench import remote, timing
from bench.libraries import linen_run
from bench.nets import LARGE
from bench.problem import MAX_NORM, RATE, on_device
from bench.registry import Skip
from bench.remote import Remote
from bench.report import Section, describe_error
from bench.rows import MODELS, Model
from bench.timing import Run

ABOUT = """\
Milliseconds per training step of some models, with cross entropy, clipping by the global norm at 1 and Adam; float32, or
where the row says bfloat16 with parameters, statistics and Adam in float32. All peers are the same net from the same
weights; before timing, the losses of steps 1 and 3 agreed with the median of all peers' (1e-4, and 1e-3 relative; 5e-2
where products round their factors). Rounds are interleaved; the median round, with the fastest and the slowest.
`fnn-stretch`, `linen-steps` and `jax-steps` scan over the steps inside one program; the others are loops of jitted steps
in Python. PyTorch runs in a process of its own."""

COLUMNS = ("peer", "ms/step", "[min..max]", "first call, s", "x best")
NAMES = {
    "fnn-loop": "fnn.train_step in a Python loop",
    "fnn-stretch": "what fnn.fit runs: steps inside lax.scan",
    "jax": "plain JAX, one jitted step in a Python loop",
    "jax-steps": "plain JAX, the same step inside lax.scan",
    "linen": "Flax Linen, one jitted step in a Python loop",
    "linen-steps": "Flax Linen, the same step inside lax.scan",
    "nnx": "Flax NNX, one jitted step in a Python loop",
    "equinox": "Equinox, one jitted step in a Python loop",
    "torch": "PyTorch eager, fused Adam",
    "torch-compile": "PyTorch with torch.compile, fused Adam",
}
REMOTE = ("torch", "torch-compile")
AGREE_FIRST, AGREE_THIRD, AGREE_ROUNDED = 1e-4, 1e-3, 5e-2


def select(text: str) -> list[str]:
    """Parse `transformer,conv`: names of rows, or beginnings that only one row has; ValueError for others."""
    return [_named(part) for part in text.split(",")]


def _named(part: str) -> str:
    fitting = [part] if part in MODELS else [name for name in MODELS if part and name.startswith(part)]
    if len(fitting) != 1:
        raise ValueError(f"{part!r}: must be one of {', '.join(MODELS)}")
    return fitting[0]


def row(name: str, quick: bool) -> Model:
    """Look a row up; with `quick` a large one is tiny. On an accelerator, where steps are short, rounds have more of them."""
    model = MODELS[name]
    if quick:
        return model.small() if model.small is not None else model
    on_cpu = (remote.platform or jax.devices()[0].platform) == "cpu"
    return model if on_cpu or model.size is LARGE else replace(model, steps=8 * model.steps)


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the models; yield each one's section as soon as it is done."""
    names = [_named(part) for part in options.rows or ()]
    on_cpu = jax.devices()[0].platform == "cpu"
    names = names or [name for name in MODELS if options.quick or not on_cpu or MODELS[name].small is None]
    for name in names:
        yield _row(name, options, say)
        gc.collect()
        jax.clear_caches()


def _row(name: str, options: Namespace, say: Callable[[str], None]) -> Section:
    model = row(name, options.quick)
    say(f"\n{name}: {model.about}")
    peers = [peer for peer in NAMES if peer in (options.peers or NAMES)]
    end = time.monotonic() + (getattr(options, "seconds", None) or math.inf)
    # The other process begins at once, except on a CPU, where both would share the cores.
    early = jax.devices()[0].platform != "cpu"
    runs: dict[str, Any] = {}
    begun = {peer: _remote(name, peer, options.quick) for peer in peers if early and peer in REMOTE and _has_torch()}
    first, losses, out = {}, {}, {}
    for peer in peers:
        if time.monotonic() > end:
            out[peer] = ("skipped", "the time for this row was over")
            continue
        try:
            if peer in REMOTE:
                runs[peer] = begun.get(peer) or _remote(name, peer, options.quick)
            else:
                runs[peer] = BUILDERS[peer](model.kind or name, model)
            first[peer], losses[peer] = runs[peer].first_round()
            say(f"  {peer}: first call {first[peer]:.1f} s")
        except Exception as error:
            skipped = isinstance(error, Skip)
            out[peer] = ("skipped", str(error)) if skipped else ("failed", describe_error(error))
            say(f"  {peer}: {', '.join(out[peer])}")
    if losses:
        reference = np.nanmedian([ours[:3] for ours in losses.values()], axis=0)
        for peer, ours in losses.items():
            if complaint := _disagreement(model, ours, reference):
                out[peer] = ("failed", complaint)
                say(f"  {peer}: {complaint}")
    ready = {peer: runs[peer] for peer in losses if peer not in out}
    times: dict[str, timing.Times] = {}
    if ready:
        rounds, failed = options.rounds or (3 if options.quick else 11), {}

        def on_round(i):
            if i % 5 == 0:
                say(f"  round {i}")

        times = timing.interleave(ready, rounds, model.steps, on_round, failed, end)
        out |= {peer: ("failed", describe_error(error)) for peer, error in failed.items()}
    items = {peer: len(run.items) for peer, run in runs.items()}
    for run in {**begun, **runs}.values():
        if isinstance(run, Remote):
            run.close()
    section = _section(name, model, times, {peer: (first[peer], items[peer]) for peer in times}, out)
    section.data["losses"] = {peer: [float(loss) for loss in ours[:3]] for peer, ours in losses.items()}
    return section


def _section(
    name: str,
    model: Model,
    times: dict[str, timing.Times],
    first: dict[str, tuple[float, int]],
    out: dict[str, tuple[str, str]],
) -> Section:
    best = min(times.values(), key=lambda t: t.median, default=None)
    cells, records = [], []
    for peer, t in times.items():
        ratio = timing.ratio(t, best)
        shown = f"{'~' if ratio.unsure and t is not best else ''}{ratio.median:.2f}"
        # The first call also ran the steps of its item: one for a loop, all of them for a scan.
        seconds = max(0.0, first[peer][0] - t.median / 1e3 * model.steps / first[peer][1])
        cells.append((peer, f"{t.median:.3f}", f"[{t.low:.3f}..{t.high:.3f}]", f"{seconds:.2f}", shown))
        record = {"name": peer, "outcome": "timed", "ms": t.rounds, "ratio": ratio._asdict(), "first_s": seconds}
        records.append(record)
    for peer, (outcome, reason) in out.items():
        cells.append((peer, outcome, "", "", ""))
        records.append({"name": peer, "outcome": outcome, "reason": reason})
    notes = [model.about, *(f"{peer}: {NAMES[peer]}" for peer in times)]
    notes += [f"{peer}: {outcome}: {reason}" for peer, (outcome, reason) in out.items()]
    data = {"model": name, "dtype": model.dtype, "steps_per_round": model.steps, "peers": records}
    if flops := _transformer_flops(name, model):
        data["flops"] = flops
        notes.insert(1, f"{flops:.3g} FLOP a step in matrix products")
    return Section(name, COLUMNS, cells, notes, data)


def _transformer_flops(name: str, model: Model) -> int | None:
    """Count a decoder's matrix products, forward and twice that back; attention as if nothing were masked."""
    if (model.kind or name) != "transformer":
        return None
    s, tokens = model.size, model.size.batch * model.size.length
    weights = 12 * s.layers * s.width**2 + s.vocabulary * s.width
    return 6 * tokens * (weights + 2 * s.layers * s.length * s.width)


def _disagreement(model: Model, losses: np.ndarray, reference: np.ndarray) -> str | None:
    exact = jax.devices()[0].platform == "cpu" or jax.config.jax_default_matmul_precision == "highest"
    rounded = model.dtype != "float32" or not exact
    first, third = (AGREE_ROUNDED, AGREE_ROUNDED) if rounded else (AGREE_FIRST, AGREE_THIRD)
    off = np.abs(losses[:3] - reference)
    if off[0] <= first and off[2] <= third * abs(reference[2]):  # False for NaN
        return None
    return f"losses {losses[0]:.5f}, {losses[2]:.5f} on steps 1, 3, not {reference[0]:.5f}, {reference[2]:.5f}"


def _start(model: Model) -> tuple[fnn.Layer, Any, fnn.TrainState]:
    net = model.net()
    optimizer = fnn.optimizers.packed(optax.chain(fnn.clip.by_global_norm(MAX_NORM), optax.adam(RATE)))
    return net, optimizer, fnn.TrainState.create(net, optimizer, jax.random.key(0), model.specs())


def weights(model: Model) -> dict[str, Any]:
    """Draw fnn's starting weights, and name them as Linen does; those of the latest model are kept for all its peers."""
    if not _latest or _latest[0] is not model:
        params, _ = model.net().init(jax.random.split(jax.random.key(0))[0], model.specs())  # as `TrainState.create`
        _latest[:] = [model, model.weights(jax.device_get(params))]
    return _latest[1]


_latest: list[Any] = []


def _fnn(model: Model, loop: bool) -> Run:
    net, optimizer, state = _start(model)
    dtype = None if model.dtype == "float32" else model.dtype
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",), compute_dtype=dtype)
    xs, ys = model.batches()
    items, call = (_apart(xs, ys), step) if loop else ([(xs, ys)], step.stretch)
    return Run(call, state, items, lambda metrics: metrics["loss"])


def _linen(model: Model, loop: bool) -> Run:
    params = on_device(weights(model))
    xs, ys = model.batches()
    ready = linen_run(model.linen(), params, _apart(xs, ys))
    return ready if loop else _scan(ready.call, ready.state, xs, ys)


def _plain(name: str, model: Model, loop: bool) -> Run:
    from bench.plain_nets import NETS

    _written(name, NETS)
    xs, ys = model.batches()
    step, state = NETS[name](weights(model), model.size, model.dtype)
    return Run(jax.jit(step, donate_argnums=0), state, _apart(xs, ys)) if loop else _scan(step, state, xs, ys)


def _nnx(name: str, model: Model) -> Run:
    from bench import nnx_nets
    from bench.libraries import nnx_run

    _written(name, nnx_nets.NETS)
    return nnx_run(nnx_nets.net(name, weights(model), model.size, model.dtype), _apart(*model.batches()))


def _equinox(name: str, model: Model) -> Run:
    if importlib.util.find_spec("equinox") is None:
        raise Skip("equinox is not installed")
    import equinox as eqx

    from bench.equinox_nets import NETS
    from bench.libraries import eqx_run

    _written(name, NETS)
    net, state = eqx.nn.make_with_state(NETS[name])(weights(model), model.size)
    return eqx_run(net, state, _apart(*model.batches()), model.dtype)


def torch_build(name: str, compiled: bool, quick: bool) -> Run:
    """Build PyTorch's peer of a row; called in the process that `Remote` keeps."""
    from bench.torch_nets import NETS
    from bench.torch_peers import torch_run

    model = row(name, quick)
    net = NETS[model.kind or name](weights(model), model.size)
    return torch_run(net, *model.batches(), compiled, model.dtype)


def _remote(name: str, peer: str, quick: bool) -> Remote:
    if not _has_torch():
        raise Skip("torch is not installed")
    return Remote(torch_build, name, peer == "torch-compile", quick)


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _written(name: str, table: dict[str, Any]) -> None:
    if name not in table:
        raise Skip(f"there is no {name} in this library here")


def _scan(step: Callable[..., Any], state: Any, xs: Any, ys: jax.Array) -> Run:
    return Run(jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0), state, [(xs, ys)])


def _apart(xs: Any, ys: jax.Array) -> list[tuple[Any, jax.Array]]:
    return [(jax.tree.map(lambda a, i=i: a[i], xs), y) for i, y in enumerate(ys)]


BUILDERS = {
    "fnn-loop": lambda name, model: _fnn(model, True),
    "fnn-stretch": lambda name, model: _fnn(model, False),
    "jax": lambda name, model: _plain(name, model, True),
    "jax-steps": lambda name, model: _plain(name, model, False),
    "linen": lambda name, model: _linen(model, True),
    "linen-steps": lambda name, model: _linen(model, False),
    "nnx": _nnx,
    "equinox": _equinox,
}
