"""Run one cell of a study: a single compiled program that draws, measures and trains many runs at once.

A cell is one value of every static axis. Its runs differ only in traced axes (seed, sigma_w, learning rate, ...), so they
are lanes of one `vmap`.
"""

import collections
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from fnn import lowering, models, tree
from fnn.core import Layer
from fnn.datasets.data import Dataset
from fnn.gradients import flow
from fnn.gradients.operations import Unreadable
from fnn.layers import activations, initializers
from fnn.study import nets
from fnn.study.program import (
    Cell,
    Setup,
    aligned,
    draw,
    in_float64,
    is_x64,
    network,
    number,
    one_run,
    program_key,
    shared_data,
    specs,
)
from fnn.study.provenance import settings
from fnn.theory import gaussian

VERSION = 3
"""Of the programs: raise it when numbers differ in their last digits, or rows are added, since the study is another one then."""


class Measured(NamedTuple):
    """What a cell's program returned, on the host: every leaf has the axes [runs, records, ...]."""

    labels: list[flow.Label]
    values: np.ndarray
    """Of the labels: float64[runs, records, labels]."""
    wide: np.ndarray
    """Which runs were measured in float64 at initialisation, since their signal left the range of their own float type:
    bool[runs]."""
    losses: dict[str, np.ndarray]
    """loss and accuracy on held-out examples."""
    extra: dict[str, Any]
    """`update_ratio`, `cosine`, those of `spectral`, and the user's own measurements."""
    traces: dict[str, np.ndarray]
    """By step of training: float32[runs, steps]."""
    probe: np.ndarray
    """Loss on the batch that is measured: float32[runs, records]."""
    seconds: dict[str, float]


def mlp(
    depth: int = 16,
    width: int = 64,
    activation: str = "tanh",
    norm: str = "none",
    residual: bool = False,
    init: str = "scaled",
    sigma_w: ArrayLike = 1.0,
    sigma_b: ArrayLike = 0.0,
    classes: int = 10,
) -> Layer:
    """Build the net that a study measures by default: `models.mlp` with taps, always scanned, weights by sigma_w.

    Its arguments are axes of the study. Weights are drawn from N(0, sigma_w²/fan_in), biases from N(0, sigma_b²); with an
    `init` other than "scaled", sigma_w is ignored.
    """
    if not isinstance(residual, bool):
        raise TypeError(f"study: residual must be true or false, got {residual!r}")
    return models.mlp(
        depth,
        width,
        classes,
        activation=activation,
        norm=norm,
        init=initializers.scaled(sigma_w) if init == "scaled" else init,
        bias_init="zeros" if isinstance(sigma_b, int | float) and sigma_b == 0 else initializers.normal(sigma_b),
        residual=residual,
        taps=True,
        unroll=1,  # one small program whatever the depth: a study pays more for compiling than for running
    )


def run_cell(setup: Setup, cell: Cell) -> Measured:
    """Run a cell: compile its program once, run it on chunk after chunk, and bring the numbers to the host.

    A program that another cell of this process has compiled is used again. Runs are spread over all devices of this host;
    with `jax_default_device` they run on that one.
    """
    devices, cell = lowering.devices(), cell.settled()
    chunk = min(cell.chunk, len(cell.runs))
    lanes = -(-chunk // len(devices))
    devices = devices[: -(-chunk // lanes)]
    size = lanes * len(devices)
    draw_chunk, run_chunk, wide_chunk = _program(setup, cell, lanes)
    orders = _orders(setup, cell)
    data = shared_data(setup, cell)
    if len(devices) > 1:
        mesh = Mesh(np.array(devices), ("runs",))
        split, same = PartitionSpec("runs"), PartitionSpec()
        draw_chunk = jax.shard_map(draw_chunk, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        places = (split, split, split, same)
        run_chunk = jax.shard_map(run_chunk, mesh=mesh, in_specs=places, out_specs=split, check_vma=False)
        places = (split, split, same)
        wide_chunk = jax.shard_map(wide_chunk, mesh=mesh, in_specs=places, out_specs=split, check_vma=False)
        data = jax.device_put(data, NamedSharding(mesh, same))
    else:
        data = jax.device_put(data, devices[0])
    seconds = {"draw": 0.0, "compile": 0.0, "run": 0.0, "tables": 0.0}
    compiled = _compiled(setup, cell, lanes, devices)

    def call(name, function, *args):
        start = time.perf_counter()
        if name not in compiled:
            compiled[name] = jax.jit(function).lower(*args).compile(lowering.compiler_options())
            seconds["compile"] += time.perf_counter() - start
            start = time.perf_counter()
        result = compiled[name](*args)
        jax.block_until_ready(result)
        seconds["draw" if name == "draw" else "run"] += time.perf_counter() - start
        return result

    def drawn(start):
        # The last chunk repeats its last run until it is full: one program, one shape.
        index = np.minimum(np.arange(start, start + size), len(cell.runs) - 1)
        runs = {name: np.stack([number(cell.runs[i][name]) for i in index]) for name in cell.runs[0]}
        return index, runs, call("draw", draw_chunk, runs)

    n, parts = len(cell.runs), []
    for start in range(0, n, size):
        index, runs, nets_drawn = drawn(start)
        records, traces = jax.device_get(call("run", run_chunk, runs, nets_drawn, orders[index], data))
        parts.append((*records.tree(), traces))
    begun = time.perf_counter()
    whole: Any = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:n], *parts)
    numbers, heldout, extra, traces = whole
    read = functools.partial(_read, setup, cell, specs(setup, cell)[0])
    found, again = read(numbers), np.zeros(n, bool)
    seconds["tables"] = time.perf_counter() - begun
    for start in range(0, n, size) if not is_x64() else ():
        rows = slice(start, min(start + size, n))
        if found.left[rows, 0].any():
            _, runs, nets_drawn = drawn(start)
            wide = _in_float64(functools.partial(call, "float64", wide_chunk), runs, nets_drawn, data, read)
            if wide is not None:
                which = np.flatnonzero(found.left[rows, 0] & wide[1][: rows.stop - start])
                again[start + which] = True
                found.values[start + which, 0] = wide[0].values[which, 0]
    more = {name: numbers[name] for name in ("update_ratio", "cosine") if name in numbers}
    if "cosine" in more:  # of two directions
        lost = found.lost | np.roll(found.lost, 1, axis=1)
        more["cosine"] = jax.tree.map(lambda a: np.where(aligned(lost, a), np.nan, a), more["cosine"])
    more |= numbers.get("spectra", {})
    return Measured(found.labels, found.values, again, heldout, more | extra, traces, nets.loss_of(numbers), seconds)


_PROGRAMS: collections.OrderedDict[Any, dict[str, Any]] = collections.OrderedDict()
MOST_PROGRAMS = 8
"""Cells whose programs a process keeps."""


def _compiled(setup: Setup, cell: Cell, lanes: int, devices: Sequence[Any]) -> dict[str, Any]:
    """Give what is compiled of a cell's program so far, by name."""
    key = program_key(setup, cell)
    if key is None:
        return {}
    key = key, lanes, tuple(map(str, devices)), tuple(sorted(settings().items()))
    found = _PROGRAMS.setdefault(key, {})
    _PROGRAMS.move_to_end(key)
    while len(_PROGRAMS) > MOST_PROGRAMS:
        _PROGRAMS.popitem(last=False)
    return found


def _read(setup: Setup, cell: Cell, params: Any, numbers: Any) -> nets.Read:
    """Label a chunk's numbers, without those that only the activations have with which this one shares its program."""
    found = nets.read(numbers, params, **_range(setup, cell.static))
    if not setup.activations or all(map(np.isfinite, activations.TABLE[cell.static["activation"]].bounds)):
        return found
    keep = [i for i, label in enumerate(found.labels) if label.quantity != "saturated"]
    return found._replace(labels=[found.labels[i] for i in keep], values=found.values[..., keep])


def _in_float64(
    measure: Callable[..., Any], runs: Any, drawn: Any, data: Any, read: Callable[[Any], nets.Read]
) -> tuple[nets.Read, np.ndarray] | None:
    """Measure a chunk at initialisation in float64: what was read, and of which runs it holds. None if the net cannot be."""
    try:
        with jax.enable_x64(True):
            found, holds = jax.device_get(measure(runs, drawn, data))
    except (Unreadable, TypeError, ValueError, NotImplementedError):
        return None  # a net that asks for float32 by itself
    found = jax.tree.map(lambda a: a[:, None], found)  # one record
    return read(found), holds & np.isfinite(nets.loss_of(found)[:, 0])


def _range(setup: Setup, static: Mapping[str, Any]) -> dict[str, bool]:
    """Say what `flow.settle` may assume about the built-in nets: a smooth phi, no norm that takes squares."""
    if setup.build is not mlp:
        return {}
    phi, squares = activations.get(static["activation"]), static["norm"] != "none"
    if not phi.elementwise:
        return {"squares": squares}
    above, below = gaussian.evaluate(phi, np.array([1e-9, -1e-9]))[1]
    return {"smooth": bool(abs(above - below) < 1e-6 < abs(above)), "squares": squares}


def traced(setup: Setup, cell: Cell) -> tuple[Any, Any, Any, Any]:
    """Trace a cell's net; return the specs of its parameters, state, outputs in train mode, and measured batch.

    A pair (init, loss) has no outputs but the loss.
    """
    cell = cell.settled()
    (params, state, runs), probe = specs(setup, cell), probe_spec(setup, cell)

    def outputs(params, state, batch, run):
        net = network(setup, cell.static, run)
        if isinstance(net, nets.OfPair):
            return net.judged(params, batch)[0]
        return net.net.apply(params, state, batch[0], key=jax.random.key(0), train=True)[0]

    return params, state, jax.eval_shape(outputs, params, state, probe, runs), probe


def widened(data: Dataset) -> Dataset:
    """Cast float32 to float64 under x64, so that the study computes in float64."""
    if not is_x64():
        return data
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if a.dtype == np.float32 else a, data)


def parameter_names(setup: Setup, cell: Cell) -> set[str]:
    """Name the kinds of parameters that a cell's net has: kernel, bias, ..."""
    return {path.rpartition("/")[2] for path in tree.paths(specs(setup, cell.settled())[0])}


def _program(setup: Setup, cell: Cell, lanes: int) -> tuple[Callable[..., Any], ...]:
    """Return `draw(runs)`, `run(runs, drawn, orders, data)`, and `in_float64(runs, drawn, data)`, over some lanes."""
    draw_one = functools.partial(draw, setup, cell.static)
    one = functools.partial(one_run, setup, cell)
    wide = functools.partial(in_float64, setup, cell)
    if lanes > 1:
        # A loop over lanes: the generator compiles three times as fast for one key as under vmap.
        over = (0, 0, 0, None)
        return lambda runs: jax.lax.map(draw_one, runs), jax.vmap(one, over), jax.vmap(wide, over[1:])

    def alone(function, mapped):  # one lane is not mapped at all: a batched matrix product of one is slower on a CPU
        def call(*args):
            first = jax.tree.map(lambda a: a[0], args[:mapped])
            return jax.tree.map(lambda a: a[None], function(*first, *args[mapped:]))

        return call

    return alone(draw_one, 1), alone(one, 3), alone(wide, 2)


def probe_spec(setup: Setup, cell: Cell) -> tuple[Any, ...]:
    """Give the specs of the batch that is measured."""
    size = int(cell.static["batch_size"])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), tuple(setup.train))


def _orders(setup: Setup, cell: Cell) -> np.ndarray:
    """Draw each run's batches, int32[runs, steps, batch]: every epoch a new permutation, a partial batch dropped."""
    n, size, steps = setup.train.size, int(cell.static["batch_size"]), cell.steps[-1]
    per_epoch = n // size

    def order(seed):
        epochs = [
            np.random.default_rng((seed, epoch)).permutation(n)[: per_epoch * size].reshape(per_epoch, size)
            for epoch in range(-(-steps // per_epoch))
        ]
        return np.concatenate([np.zeros((0, size), np.int64), *epochs])[:steps].astype(np.int32)

    by_seed = {seed: order(seed) for seed in {run["seed"] for run in cell.runs}}
    return np.stack([by_seed[run["seed"]] for run in cell.runs])
