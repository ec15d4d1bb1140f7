"""The program that a cell compiles: draw a net, measure it, train it.

The program loops over the recorded steps. Each turn trains up to that step and then measures, so gradient and optimiser
are compiled once, however many steps are recorded.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import check, tree
from fnn.core import as_spec
from fnn.datasets.data import Dataset
from fnn.gradients import powers, reductions
from fnn.layers import activations
from fnn.rows import Rows
from fnn.study import axes, nets, spectral
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


LEAST = 1e-28
"""A plain float32 gradient's norm, below which it may have lost part of it, and has no direction."""


class Cell(NamedTuple):
    """What one compiled program does."""

    static: dict[str, Any]
    runs: tuple[dict[str, Any], ...]
    """A value of every traced axis for each run."""
    steps: tuple[int, ...]
    """The recorded ones, 0 first."""
    chunk: int = 1
    """How many runs are lanes of one `vmap`; the others follow, chunk after chunk, through the same program."""

    def settled(self) -> "Cell":
        """Make traced axes that are 0 in all runs static, so that biases of zero are not drawn."""
        zeros = {
            name: type(self.runs[0][name])(0)
            for name in self.runs[0]
            if name != "seed" and not any(run[name] for run in self.runs)
        }
        runs = tuple({name: value for name, value in run.items() if name not in zeros} for run in self.runs)
        return self._replace(static=self.static | zeros, runs=runs)


class Setup(NamedTuple):
    """What all cells share."""

    build: Callable[..., Any]
    loss: Callable[[Any, Any], Any]
    measure: dict[str, Callable[..., Any]]
    train: Dataset
    test: Dataset
    quantities: Sequence[str] | None = None
    activations: tuple[str, ...] = ()
    """If not empty, cells that differ in nothing but their activation, one of these, share a program: it takes a number."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["vectors"], meta_fields=["structure", "kinds"])
@dataclass(frozen=True)
class Packed:
    """A tree of arrays as one vector for each of their types: a loop that stacks it stacks a few arrays, not a hundred."""

    vectors: tuple[Any, ...]
    structure: Any
    kinds: tuple[tuple[tuple[int, ...], str], ...]
    """Shape and type of each array."""

    @classmethod
    def of(cls, values: Any) -> "Packed":
        """Join the arrays of a tree."""
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, values))
        kinds = tuple((a.shape, str(a.dtype)) for a in leaves)
        types = dict.fromkeys(kind for _, kind in kinds)
        return cls(tuple(jnp.concatenate([a.ravel() for a in leaves if a.dtype == t]) for t in types), structure, kinds)

    def tree(self) -> Any:
        """Take the arrays apart again, on the host; the vectors may have leading axes."""
        types = dict.fromkeys(kind for _, kind in self.kinds)
        rest = dict(zip(types, map(np.asarray, self.vectors), strict=True))
        leaves = []
        for shape, kind in self.kinds:
            size, vector = math.prod(shape), rest[kind]
            leaves.append(vector[..., :size].reshape(*vector.shape[:-1], *shape))
            rest[kind] = vector[..., size:]
        return jax.tree.unflatten(self.structure, leaves)


def network(setup: Setup, static: Mapping[str, Any], run: Mapping[str, Any]) -> nets.Net:
    """Build the net of a cell; the values of `run` may be traced, and may hold the number of its activation."""
    values = {"classes": classes(setup.train), **static, **run}
    if setup.activations:
        some = [activations.TABLE[name] for name in setup.activations]
        values["activation"] = activations.chosen(some, run.get("activation", 0))
    built = setup.build(**{name: values[name] for name in axes.parameters(setup.build) if name in values})
    return nets.made(built, setup.loss, setup.quantities)


def optimizer(static: Mapping[str, Any], run: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build a cell's optimiser from the names of its clip and optimiser."""
    kind, name = static["clip"], static["optimizer"]
    check.choice("study", ["none", *CLIPS], clip=kind)
    check.choice("study", OPTIMIZERS, optimizer=name)
    clips = [] if kind == "none" else [CLIPS[kind](run["clip_threshold"])]
    return per_depth(optax.chain(*clips, OPTIMIZERS[name](run["learning_rate"])))


def unclipped(static: Mapping[str, Any], run: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build a cell's optimiser without its clip."""
    return per_depth(OPTIMIZERS[static["optimizer"]](run["learning_rate"]))


def is_x64() -> bool:
    """Whether JAX's default float is float64, here and now."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def draw(setup: Setup, static: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[Any, Any]:
    """Draw a run's parameters and state. Under x64 they are drawn in float32 and cast up, so that the net is the same."""
    x = setup.train.x
    first = np.asarray(x[: int(static["batch_size"])], np.float32 if x.dtype == np.float64 else x.dtype)
    made = network(setup, static, run).init(jax.random.key(2 * run["seed"]), first)
    # With bfloat16 inputs the user has asked for less than float32: nothing is cast up.
    wide = is_x64() and not (jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4)
    return jax.tree.map(lambda a: a.astype(np.float64) if wide and a.dtype == np.float32 else a, made)


def one_run(setup: Setup, cell: Cell, run: Any, drawn: Any, order: Any, data: Any) -> Any:
    """Measure a run at every recorded step and train in between; return the records, `Packed`, and the traces of training.

    The records are what the net measured, its numbers on held-out examples, and the user's own measurements.
    `drawn` are its parameters and state, `order` int[steps, batch] the examples of each step, `data` those of `shared_data`.
    """
    (x, y, test_x, test_y, more), (params, state), (static, _, steps, _) = data, drawn, cell
    run = run | more
    net, probe, key = measured_net(setup, cell, run, x, y)
    trains, rows = len(steps) > 1, Rows.of(params)
    watched = spectral.asked(setup.quantities)
    tx = optimizer(static, run) if trains or watched else optax.identity()
    names = [*net.metrics(params, probe), "grad_norm"]
    names += ["clip_fraction", "clip_removed"] if static["clip"] != "none" else []
    step = net.step(tx, names)

    def advance(t, carry):
        at, traces = carry
        new, metrics = step(at, (x[order[t]], y[order[t]]))
        if (reports := clip.reports(new.opt_state)) and not is_x64():  # reports are float32
            metrics["grad_norm"] = reports[0].before  # the same number, from the clip, which has to take it anyway
        return new, {name: trace.at[t].set(metrics[name]) for name, trace in traces.items()}

    def observe(at, before):
        results, gradient = net.measure(at.params, at.net_state, probe, key)
        if trains or watched:
            true = jax.tree.map(reductions.rounded, gradient, is_leaf=lambda node: isinstance(node, powers.Scaled))
            updates, _ = tx.update(true, at.opt_state, at.params)
        if watched:
            step = spectral.Step(updates, run["learning_rate"], unclipped(static, run), at.opt_state[-1])
            results["spectra"] = spectral.measure(watched, net, at, probe, key, step)
        if trains:
            u, w = ([tree.length(m, 1) for m in rows.join(part)] for part in (updates, at.params))
            results["update_ratio"] = rows.numbers(
                [a / jnp.where(b > 0, b, jnp.nan) for a, b in zip(u, w, strict=True)]
            )
            if "flow" in results:  # directions of single arrays: their exponents drop out
                gradient = jax.tree.map(lambda _, g: g.value, at.params, gradient)
                sizes = [jnp.exp(log) for log in rows.join_numbers(results["flow"]["logs"])]
            else:
                sizes = [tree.length(m, 1) for m in rows.join(gradient)]
                sizes = [jnp.where(n > LEAST, n, jnp.nan) for n in sizes]
            gradient = [m / n[:, None] for m, n in zip(rows.join(gradient), sizes, strict=True)]
            results["cosine"] = rows.numbers([jnp.sum(a * b, axis=1) for a, b in zip(gradient, before, strict=True)])
        extra = {name: function(at.params, at.net_state, probe) for name, function in setup.measure.items()}
        extra = jax.tree.map(jnp.asarray, extra)
        return Packed.of((results, net.heldout(at.params, at.net_state, test_x, test_y), extra)), gradient

    at = stepping.TrainState(params, state, tx.init(params), key, jnp.zeros((), jnp.int32))
    if not trains:
        record, _ = observe(at, None)
        return jax.tree.map(lambda a: a[None], record), {}
    traces = {name: jnp.zeros(steps[-1]) for name in names}

    def turn(carry, bounds):
        at, before, traces = carry
        # How many steps a turn has is known at run time only: it compiles once for all turns. On a GPU the host then looks
        # once a step whether to go on, a copy of one byte.
        at, traces = jax.lax.fori_loop(bounds[0], bounds[1], advance, (at, traces))
        record, gradient = observe(at, before)
        return (at, gradient, traces), record

    bounds = jnp.stack([jnp.array((0, *steps[:-1])), jnp.array(steps)], axis=1)
    carry = at, [jnp.zeros_like(m) for m in rows.join(params)], traces
    (_, _, traces), records = jax.lax.scan(turn, carry, bounds)
    return records, traces


def shared_data(setup: Setup, cell: Cell) -> tuple[Any, ...]:
    """Give what all lanes of a cell's program take: training and held-out examples, and numbers of what it chooses."""
    of_cell = {}
    if setup.activations:
        of_cell["activation"] = np.int32(setup.activations.index(cell.static["activation"]))
    return (*setup.train, *setup.test, of_cell)


def program_key(setup: Setup, cell: Cell) -> tuple[Any, ...] | None:
    """Name a cell's program by all that it depends on but JAX's settings and devices; None where no other cell shares it."""
    if not setup.activations:
        return None
    static = tuple((name, value) for name, value in cell.static.items() if name != "activation")
    run = tuple((name, str(number(value).dtype)) for name, value in cell.runs[0].items())
    data = tuple((a.shape, str(a.dtype)) for a in (*setup.train, *setup.test))
    functions = setup.build, repr(setup.loss), setup.quantities, setup.activations  # the loss is one of fnn's own
    return static, run, cell.steps, cell.chunk, data, classes(setup.train), functions


def measured_net(setup: Setup, cell: Cell, run: Any, x: Any, y: Any) -> tuple[nets.Net, Any, Any]:
    """Return a run's net, the batch on which it is measured, and the key of its noise."""
    size = int(cell.static["batch_size"])
    return network(setup, cell.static, run), (x[:size], y[:size]), jax.random.key(2 * run["seed"] + 1)


def in_float64(setup: Setup, cell: Cell, run: Any, drawn: Any, data: Any) -> Any:
    """Measure a run at initialisation once more, in float64: for `jax.enable_x64`, around what it is given as it is.

    Returns what `measure` does, and whether this platform has float64's range.
    """
    x, y, *_, more = data
    net, probe, key = measured_net(setup, cell, run | more, x, y)
    params, state = drawn
    return net.wide(params, state, probe, key)


def aligned(per_array: Any, a: Any) -> Any:
    """Add axes to one number per array of a stack, so that it broadcasts against the arrays."""
    return per_array.reshape(per_array.shape + (1,) * (a.ndim - per_array.ndim))


def classes(data: Dataset) -> int:
    y = np.asarray(data.y)
    return int(y.max()) + 1 if np.issubdtype(y.dtype, np.integer) else int(np.prod(y.shape[1:]))


def specs(setup: Setup, cell: Cell) -> tuple[Any, Any, dict[str, Any]]:
    """Trace the shapes and types of a cell's parameters and state, and of its runs' traced axes."""
    runs = {name: as_spec(number(value)) for name, value in cell.runs[0].items()}
    return (*jax.eval_shape(functools.partial(draw, setup, cell.static), runs), runs)


def number(value: Any) -> np.ndarray:
    """Write the value of a traced axis as the array that a program takes."""
    kind = {bool: np.bool_, int: np.int32}.get(type(value), jax.dtypes.canonicalize_dtype(np.float64))
    return np.asarray(value, kind)
