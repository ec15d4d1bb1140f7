"""One cell of a study: a single compiled program that draws, measures and trains many runs at once.

A cell is one value of every static axis; its runs differ in traced axes alone (seed, sigma_w, learning rate, ...), so
that they are lanes of one `vmap`. The program is a loop over recorded steps, each turn first training up to that step
and then measuring, so that gradient and optimiser are compiled once however many steps are recorded.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fnn import check, losses, models, tree
from fnn.core import Layer, as_spec
from fnn.datasets.data import Dataset
from fnn.gradients import flow
from fnn.layers import activations, initializers, taps
from fnn.study import axes
from fnn.theory import gaussian
from fnn.training import clip
from fnn.training import step as stepping
from fnn.training.optimizers import per_depth

CLIPS: dict[str, Callable[[Any], Any]] = {
    "value": clip.by_value,
    "from_above": clip.from_above,
    "global_norm": clip.by_global_norm,
    "block_norm": clip.by_block_norm,
    "adaptive": clip.adaptive,
}
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "lamb": optax.lamb,
}
CPU_BUDGET = 12 << 20
"""Bytes that the lanes of one `vmap` may touch on a CPU: about a core's cache. At depth 256 one lane after the other was
measured twice as fast as eight at once, at depth 4 half as fast."""


class Cell(NamedTuple):
    """What one compiled program does."""

    static: dict[str, Any]
    runs: tuple[dict[str, Any], ...]
    """A value of every traced axis for each run."""
    steps: tuple[int, ...]
    """The recorded ones, 0 first."""
    chunk: int = 1
    """How many runs are lanes of one `vmap`; the rest follow in turn, through the same program."""

    def settled(self) -> "Cell":
        """Move traced axes that are 0 throughout to the static ones: biases of zero are not drawn."""
        zeros = {name: 0.0 for name in self.runs[0] if name != "seed" and not any(run[name] for run in self.runs)}
        runs = tuple({name: value for name, value in run.items() if name not in zeros} for run in self.runs)
        return self._replace(static=self.static | zeros, runs=runs)


class Setup(NamedTuple):
    """What all cells share."""

    build: Callable[..., Layer]
    loss: Callable[[Any, Any], Any]
    measure: dict[str, Callable[..., Any]]
    train: Dataset
    test: Dataset


class Measured(NamedTuple):
    """What a cell's program returned, on the host: every leaf has the axes [runs, records, ...]."""

    numbers: flow.Numbers
    losses: dict[str, np.ndarray]
    """loss and accuracy on held-out examples."""
    extra: dict[str, Any]
    """`update_ratio`, `cosine`, and the user's own measurements."""
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
    sigma_w: Any = 1.0,
    sigma_b: Any = 0.0,
    classes: int = 10,
) -> Layer:
    """Build the net that a study measures by default: `models.mlp` with taps, always scanned, weights by sigma_w.

    Weights are drawn from N(0, sigma_w²/fan_in), biases from N(0, sigma_b²); with another `init` than "scaled",
    sigma_w counts for nothing.
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


def network(setup: Setup, static: Mapping[str, Any], run: Mapping[str, Any]) -> Layer:
    """Build the net of a cell; the values of `run` may be traced."""
    values = {"classes": _classes(setup.train), **static, **run}
    net = setup.build(**{name: values[name] for name in axes.parameters(setup.build) if name in values})
    if not isinstance(net, Layer):
        raise TypeError(f"study: build must return a Layer, got {type(net).__name__}; return fnn.serial(...)")
    return net


def optimizer(static: Mapping[str, Any], run: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build a cell's optimiser: the clip by its name, then the optimiser by its."""
    kind, name = static["clip"], static["optimizer"]
    check.choice("study", ["none", *CLIPS], clip=kind)
    check.choice("study", OPTIMIZERS, optimizer=name)
    clips = [] if kind == "none" else [CLIPS[kind](run["clip_threshold"])]
    return per_depth(optax.chain(*clips, OPTIMIZERS[name](run["learning_rate"])))


def measure(setup: Setup, cell: Cell) -> Measured:
    """Run a cell: compile its program once, feed it chunk after chunk, bring the numbers to the host."""
    devices, cell = jax.local_devices(), cell.settled()
    chunk = min(cell.chunk, len(cell.runs))
    lanes = -(-chunk // len(devices))
    devices = devices[: -(-chunk // lanes)]
    size = lanes * len(devices)
    draw, measure_chunk = _program(setup, cell, lanes)
    orders = _orders(setup, cell)
    data = (*setup.train, *setup.test)
    if len(devices) > 1:
        mesh = Mesh(np.array(devices), ("runs",))
        split, same = PartitionSpec("runs"), PartitionSpec()
        draw = jax.shard_map(draw, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        specs = (split, split, split, same)
        measure_chunk = jax.shard_map(measure_chunk, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        data = jax.device_put(data, NamedSharding(mesh, same))
    else:
        data = jax.device_put(data, devices[0])
    seconds = {"compile": 0.0, "run": 0.0}
    compiled: dict[str, Any] = {}

    def call(name, function, *args):
        start = time.perf_counter()
        if name not in compiled:
            compiled[name] = jax.jit(function).lower(*args).compile()
            seconds["compile"] += time.perf_counter() - start
            start = time.perf_counter()
        result = compiled[name](*args)
        jax.block_until_ready(result)
        seconds["run"] += time.perf_counter() - start
        return result

    chunks: list[Any] = []
    for start in range(0, len(cell.runs), size):
        # The last chunk repeats its last run until it is full: one program, one shape.
        index = np.minimum(np.arange(start, start + size), len(cell.runs) - 1)
        runs = {name: np.stack([_number(cell.runs[i][name]) for i in index]) for name in cell.runs[0]}
        drawn = call("draw", draw, runs)
        if start == 0 and setup.build is not mlp:
            _check_scales(setup, cell, drawn)
        result = jax.device_get(call("measure", measure_chunk, runs, drawn, orders[index], data))
        chunks.append(result)
    n = len(cell.runs)
    whole: Any = jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *chunks)
    numbers, heldout, extra, traces = whole
    params = jax.eval_shape(functools.partial(_drawn, setup, cell.static), _specs(cell))[0]
    resolved, verdict = flow.settle(numbers["flow"], params, **_range(setup, cell.static))
    more = {name: numbers[name] for name in ("update_ratio", "cosine") if name in numbers}
    if "cosine" in more:  # of two directions
        lost = verdict.lost | np.roll(verdict.lost, 1, axis=1)
        more["cosine"] = jax.tree.map(lambda a: np.where(_behind(lost, a), np.nan, a), more["cosine"])
    return Measured(resolved, heldout, more | extra, traces, numbers["flow"]["loss"], seconds)


def _check_scales(setup: Setup, cell: Cell, drawn: Any) -> None:
    """Refuse a net of one's own in which cotangents of different scales meet, by its first run."""
    run, (params, state) = cell.runs[0], jax.tree.map(lambda a: a[0], drawn)
    size = int(cell.static["batch_size"])
    net, key = network(setup, cell.static, run), jax.random.key(2 * run["seed"] + 1)
    flow.check_scales(net, setup.loss, True, params, state, setup.train.x[:size], setup.train.y[:size], key)


def _range(setup: Setup, static: Mapping[str, Any]) -> dict[str, bool]:
    """Say of the built-in nets what `flow.settle` may rely on: a smooth phi, no norm that takes squares."""
    if setup.build is not mlp:
        return {}
    phi, squares = activations.get(static["activation"]), static["norm"] != "none"
    if not phi.elementwise:
        return {"squares": squares}
    above, below = gaussian.evaluate(phi, np.array([1e-9, -1e-9]))[1]
    return {"smooth": bool(abs(above - below) < 1e-6 < abs(above)), "squares": squares}


def traced(setup: Setup, cell: Cell) -> tuple[Any, Any, Any, Any]:
    """Trace a cell's net: the specs of its parameters, state, outputs in train mode, and measured batch."""
    cell = cell.settled()
    size, specs = int(cell.static["batch_size"]), _specs(cell)
    params, state = jax.eval_shape(functools.partial(_drawn, setup, cell.static), specs)
    probe = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), tuple(setup.train))

    def outputs(params, state, x, run):
        net = network(setup, cell.static, run)
        return net.apply(params, state, x, key=jax.random.key(0), train=True)[0]

    return params, state, jax.eval_shape(outputs, params, state, probe[0], specs), probe


def is_x64() -> bool:
    """Whether JAX's default float is float64, here and now."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def widened(data: Dataset) -> Dataset:
    """Cast float32 to float64 under x64, so that a study really measures in it."""
    if not is_x64():
        return data
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if a.dtype == np.float32 else a, data)


def parameter_names(setup: Setup, cell: Cell) -> set[str]:
    """Name the kinds of parameters that a cell's net has: kernel, bias, ..."""
    cell = cell.settled()
    params = jax.eval_shape(functools.partial(_drawn, setup, cell.static), _specs(cell))[0]
    return {path.rpartition("/")[2] for path in tree.paths(params)}


def chunk_size(setup: Setup, cell: Cell) -> int:
    """Choose how many runs are lanes of one `vmap`, from the device's memory and the bytes that one run touches.

    A run touches its parameters, their gradients (this one, and that of the recorded step before), the optimiser's
    state, and what the forward pass keeps for the backward one. On a CPU the bound is the cache, elsewhere half of the
    memory. The chunks are made equal.
    """
    cell = cell.settled()
    static, runs = cell.static, cell.runs
    size = int(static["batch_size"])
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), tuple(setup.train))
    params, state = jax.eval_shape(functools.partial(_drawn, setup, static), _specs(cell))

    def kept(params, state, x, y, run):
        net = network(setup, static, run)
        return jax.vjp(lambda p: _objective(net, setup.loss, p, state, x, y), params)[1]

    residuals = jax.eval_shape(kept, params, state, *batch, _specs(cell))
    moments = jax.eval_shape(lambda p, run: optimizer(static, run).init(p), params, _specs(cell))
    training = 2 if len(cell.steps) > 1 else 1
    touched = (1 + training) * _bytes(params) + _bytes(residuals) + (_bytes(moments) if training == 2 else 0)
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        budget = CPU_BUDGET
    else:
        budget = ((devices[0].memory_stats() or {}).get("bytes_limit", 8 << 30)) // 2
    most = max(1, budget // max(1, touched)) * len(devices)
    return -(-len(runs) // -(-len(runs) // most))


def _program(setup: Setup, cell: Cell, lanes: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `draw(runs)` and `measure(runs, drawn, orders, data)` over some lanes."""
    draw = functools.partial(_drawn, setup, cell.static)
    one = functools.partial(_one_run, setup, cell.static, cell.steps)
    if lanes > 1:
        # A loop over lanes: the generator compiles three times as fast for one key as under vmap.
        return lambda runs: jax.lax.map(draw, runs), jax.vmap(one, in_axes=(0, 0, 0, None))

    def alone(function):  # one lane is not mapped at all: a batched matrix product of one is slower on a CPU
        def call(*args):
            mapped, rest = jax.tree.map(lambda a: a[0], args[:3]), args[3:]
            return jax.tree.map(lambda a: a[None], function(*mapped, *rest))

        return call

    return alone(draw), alone(one)


def _drawn(setup: Setup, static: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[Any, Any]:
    """Draw parameters and state; under x64 too in float32, and cast up: the same net."""
    x = setup.train.x
    dtype = np.float32 if x.dtype == np.float64 else x.dtype
    spec = jax.ShapeDtypeStruct((int(static["batch_size"]), *x.shape[1:]), dtype)
    drawn = network(setup, static, run).init(jax.random.key(2 * run["seed"]), spec)
    # bfloat16 inputs are asked for by those who want less.
    wide = is_x64() and not (jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4)
    return jax.tree.map(lambda a: a.astype(np.float64) if wide and a.dtype == np.float32 else a, drawn)


def _one_run(
    setup: Setup, static: Mapping[str, Any], steps: tuple[int, ...], run: Any, drawn: Any, order: Any, data: Any
) -> Any:
    """Measure a run at every recorded step and train in between; leaves of the result have a leading axis of records."""
    (x, y, test_x, test_y), (params, state) = data, drawn
    net, key = network(setup, static, run), jax.random.key(2 * run["seed"] + 1)
    probe = x[: int(static["batch_size"])], y[: int(static["batch_size"])]
    trains = len(steps) > 1
    tx = optimizer(static, run) if trains else optax.identity()
    names = ["loss", *(["accuracy"] if losses.correct(setup.loss) else []), "grad_norm"]
    names += ["clip_fraction", "clip_removed"] if static["clip"] != "none" else []
    step = stepping.train_step(net, setup.loss, tx, metrics=names)

    def advance(t, carry):
        at, traces = carry
        new, metrics = step.pure(at, (x[order[t]], y[order[t]]))
        if (reports := clip.reports(new.opt_state)) and not is_x64():  # reports are float32
            metrics["grad_norm"] = reports[0].before  # the same number, from the clip, which has to take it anyway
        return new, {name: trace.at[t].set(metrics[name]) for name, trace in traces.items()}

    def observe(at, before):
        measured, gradient = flow.differentiate(net, setup.loss, True, at.params, at.net_state, *probe, key)
        results: dict[str, Any] = {"flow": measured}
        if trains:
            true = jax.tree.map(_unscaled, gradient, measured["exponents"])
            updates, _ = tx.update(true, at.opt_state, at.params)
            results["update_ratio"] = jax.tree.map(
                lambda u, w: u / jnp.where(w > 0, w, jnp.nan), tree.norms(updates), tree.norms(at.params)
            )
            # Directions of single arrays: the scales of the taps, which differ by layer, drop out.
            gradient = jax.tree.map(_direction, gradient, measured["logs"])
            results["cosine"] = tree.map_depth(
                lambda k, a, b: jnp.sum(a * b, axis=tuple(range(k, a.ndim))), gradient, before
            )
        extra = {name: function(at.params, at.net_state, probe) for name, function in setup.measure.items()}
        extra = jax.tree.map(jnp.asarray, extra)
        heldout = stepping.means(net, setup.loss, min(1024, test_x.shape[0]), at.params, at.net_state, test_x, test_y)
        return (results, heldout, extra), gradient

    at = stepping.TrainState(params, state, tx.init(params), key, jnp.zeros((), jnp.int32))
    if not trains:
        record, _ = observe(at, None)
        return (*jax.tree.map(lambda a: a[None], record), {})
    traces = {name: jnp.zeros(steps[-1]) for name in names}

    def turn(carry, bounds):
        at, before, traces = carry
        at, traces = jax.lax.fori_loop(bounds[0], bounds[1], advance, (at, traces))
        record, gradient = observe(at, before)
        return (at, gradient, traces), record

    bounds = jnp.stack([jnp.array((0, *steps[:-1])), jnp.array(steps)], axis=1)
    carry = at, jax.tree.map(jnp.zeros_like, params), traces
    (_, _, traces), records = jax.lax.scan(turn, carry, bounds)
    return (*records, traces)


def _objective(net: Layer, loss: Any, params: Any, state: Any, x: Any, y: Any) -> Any:
    return jnp.mean(loss(net.apply(params, state, x, key=jax.random.key(0), train=True)[0], y))


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


def _unscaled(a: jax.Array, exponent: jax.Array) -> jax.Array:
    return taps.ldexp(a, _behind(exponent, a).astype(jnp.int32))


def _direction(a: jax.Array, log: jax.Array) -> jax.Array:
    return a * _behind(jnp.exp(-log), a).astype(a.dtype)


def _behind(per_array: Any, a: Any) -> Any:
    """Give a number for each array of a stack the axes that broadcast against the arrays."""
    return per_array.reshape(per_array.shape + (1,) * (a.ndim - per_array.ndim))


def _specs(cell: Cell) -> dict[str, Any]:
    return {name: as_spec(_number(value)) for name, value in cell.runs[0].items()}


def _number(value: Any) -> np.ndarray:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return np.asarray(value, np.int32 if whole else jax.dtypes.canonicalize_dtype(np.float64))


def _classes(data: Dataset) -> int:
    y = np.asarray(data.y)
    return int(y.max()) + 1 if np.issubdtype(y.dtype, np.integer) else int(np.prod(y.shape[1:]))


def _bytes(values: Any) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(values) if hasattr(a, "dtype"))
