"""One side of a comparison: the layers of a loss with their weights, inputs, outputs and gradients as arrays.

Layers are the places of the traced loss, in forward order. Loops over layers are written out; loops over time become an
axis of positions. Uses of one weight that follow each other (a recurrent net written out) are one layer, stacked.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fnn import check, tree
from fnn.gradients import operations, places, program
from fnn.gradients.operations import Hooks, Loop, Op, Program
from fnn.gradients.places import Place
from fnn.gradients.program import equations

MARK = "fnn.weight."
WHOLE = "norm of the whole gradient"
EACH = "whole gradients"
"""Of each parameter, all its uses added up: a list in the order of `Side.names`."""


@dataclass(frozen=True, eq=False)
class Block:
    """An array whose `units` are its axes of units, in an order that all layouts share; None where not known."""

    array: np.ndarray
    units: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class LayerOf:
    """One layer of one side."""

    path: str
    form: tuple[Any, ...]
    """What must agree for two layers to be a pair: sizes of the weight by role, whatever their order."""
    fan_in: int
    eps: float
    """The coarsest rounding of its arrays."""
    weight: Block
    gradient: Block
    input: Block | None
    output: Block


@dataclass(frozen=True, eq=False)
class Side:
    """A traced loss and its layers."""

    names: list[str]
    alone: list[str]
    """Parameters that are no factor of a product."""
    run: Callable[..., Any]
    layers: Callable[[Any], list[LayerOf]]


def side(who: str, loss: Callable[..., Any], params: Any, rest: Any, *, backward: bool = True) -> Side:
    """Trace a loss; `run(params, rest)` gives its numbers, and `layers(numbers)` the layers of them.

    Without `backward` gradients are not taken, and those of the layers are zeros.
    """

    def call(params, *rest):
        with check.foreign("diff"):
            return check.scalar_loss("diff", loss(params, *rest), None, who)

    names = [name.removesuffix("/value") for name in tree.paths(params)]
    forward = program.read(program.trace(call, params, *rest)[0], forward=True)
    found = [place for place in places.find(forward, len(names)).places if _kernel(forward, place) is not None]
    used = {place.parameter for place in found}
    run = _run(forward, found, params, rest) if backward else _seen(forward, found)
    alone = [name for i, name in enumerate(names) if i not in used]
    return Side(names, alone, run, functools.partial(_layers, forward, found, names))


def _home(part: Program, place: Place) -> Program:
    """Find the body in which a place stands."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if any(op is place.op for op in part.ops):
            return part
        waiting += [op.body for op in part.ops if isinstance(op, Loop | operations.Remat)]
    raise operations.Unreadable("a place that stands nowhere")


def _kernel(forward: Program, place: Place) -> int | None:
    """Find the variable that holds the weight, as it is multiplied."""
    home = _home(forward, place)
    others = [a for a in place.op.inputs if isinstance(a, int) and a != place.input]
    others = [a for a in others if jnp.issubdtype(home.spec(a).dtype, jnp.floating)]
    return max(others, key=lambda a: math.prod(home.spec(a).shape), default=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mark(name: str, x: jax.Array) -> jax.Array:
    """Do nothing, and give the cotangent a name in the program of the gradient."""
    return x


_mark.defvjp(lambda name, x: (x, None), lambda name, _, d: (checkpoint_name(d, name),))


def _hooks(forward: Program, found: Sequence[Place]) -> Hooks:
    """Note the values of inputs, outputs and weights."""
    values = {v for place in found for v in (place.input, place.output, _kernel(forward, place)) if v is not None}
    return {v: functools.partial(_see, f"value.{v}") for v in values}


def _seen(forward: Program, found: Sequence[Place]) -> Callable[..., Any]:
    """Make the function that gives the loss and the values of all layers."""
    hooks = _hooks(forward, found)

    def run(params, rest):
        seen: dict[str, Any] = {}
        (value,) = operations.execute(forward, jax.tree.leaves((params, rest)), hooks, seen)
        return value, seen

    return run


def _run(forward: Program, found: Sequence[Place], params: Any, rest: Any) -> Callable[..., Any]:
    """Make the function that gives the loss, the values of all layers, and the gradient of each use of a weight."""
    for i, place in enumerate(found):
        place.op.call = _marking(f"{MARK}{i}", place.op, _kernel(forward, place))
    hooks = _hooks(forward, found)

    def marked(params, rest):
        seen: dict[str, Any] = {}
        (value,) = operations.execute(forward, jax.tree.leaves((params, rest)), hooks, seen)
        return value, seen

    def seeded(params, rest):
        value, pull, seen = jax.vjp(lambda p: marked(p, rest), params, has_aux=True)
        return value, seen, pull(jnp.ones_like(value))

    closed, specs = program.trace(seeded, params, rest)
    backward = program.read(closed)
    marks = list(_marked(backward))
    shown = {v: functools.partial(_see, f"{name}.{v}") for v, name in marks}

    def run(params, rest):
        # not as one compiled program: operation by operation it takes far less time to compile
        gradients: dict[str, Any] = {}
        outs = operations.execute(backward, jax.tree.leaves((params, rest)), shown, gradients)
        value, seen, grads = jax.tree.unflatten(jax.tree.structure(specs), outs)
        seen[WHOLE], seen[EACH] = tree.norm(grads), jax.tree.leaves(grads)
        for v, name in marks:
            seen[name] = seen.get(name, 0) + gradients[f"{name}.{v}"]
        return value, seen

    return run


def _see(name: str, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    return x, {name: jax.lax.stop_gradient(x)}


def _marking(name: str, op: Op, kernel: int | None) -> Callable[..., Sequence[Any]]:
    """Run an operation with its weight marked: a variable may be the weight of several."""
    call, inputs = op.call, op.inputs
    return lambda *values: call(*(_mark(name, x) if a == kernel else x for a, x in zip(inputs, values, strict=True)))


def _marked(part: Program) -> Iterator[tuple[int, str]]:
    """Find the named gradients of a program, inside its loops too."""
    for op in part.ops:
        name = op.params.get("name", "") if op.name == "name" else ""
        if name.startswith(MARK):
            yield op.outputs[0], name
        elif isinstance(op, Loop):
            yield from _marked(op.body)


# Arrays of layers --------------------------------------------------------------------------------------------------------


def _layers(forward: Program, found: Sequence[Place], names: Sequence[str], seen: dict[str, Any]) -> list[LayerOf]:
    uses: dict[Any, list[tuple[Any, LayerOf]]] = {}
    for place in found:
        gradient = seen.get(f"{MARK}{found.index(place)}")
        for turns in itertools.product(*(range(turn.length) if turn.depth else [None] for turn in place.turns)):
            layer, time = _layer(forward, place, names, seen | {MARK: gradient}, turns), _time(place, turns)
            key = (layer.path, layer.form, layer.output.array.shape, layer.output.units, layer.weight.array.shape)
            uses.setdefault(key, []).append((time, layer))
    merged = [(min(time for time, _ in group), _stacked([layer for _, layer in group])) for group in uses.values()]
    return [layer for _, layer in sorted(merged, key=lambda pair: pair[0])]


def _time(place: Place, turns: Sequence[int | None]) -> tuple[int, ...]:
    """Give a key that sorts layers by when they run."""
    numbers = iter(zip(turns, place.turns, strict=True))
    key = []
    for number in place.order:
        if number is None:
            turn, loop = next(numbers)
            number = 0 if turn is None else loop.length - 1 - turn if loop.backwards else turn
        key.append(number)
    return tuple(key)


def _layer(
    forward: Program, place: Place, names: Sequence[str], seen: dict[str, Any], turns: Sequence[int | None]
) -> LayerOf:
    """Take one turn's arrays of a place; axes of time stay, in front."""
    kernel, path = _kernel(forward, place), names[place.parameter]
    rows = [*place.rows, *(turn for turn in turns if turn is not None)]
    for row in rows:
        path = path.replace("[:]", f"[{row}]", 1) if "[:]" in path else f"{path}[{row}]"
    index = tuple(slice(None) if turn is None else turn for turn in turns)
    time = sum(turn is None for turn in turns)

    def taken(name):
        return np.asarray(seen[name])[index]

    weight = taken(f"value.{kernel}")
    shape = weight.shape[time:]
    gradient = taken(MARK) if seen[MARK] is not None else np.zeros_like(weight)
    form, order, fan_in, units = _roles(_home(forward, place), place, shape)
    weight = weight[(0,) * time].transpose(order)
    gradient = gradient.sum(tuple(range(time)), dtype=_wide(gradient.dtype)).transpose(order)
    roles = tuple(range(weight.ndim)) if units is not None else None
    inward, outward = units or place.units
    output = Block(taken(f"value.{place.output}"), None if outward is None else tuple(axis + time for axis in outward))
    data = None
    if place.input is not None:
        axes = None if inward is None else tuple(axis + time for axis in sorted(inward))
        data = Block(taken(f"value.{place.input}"), axes)
    arrays = [weight, output.array, *([] if data is None else [data.array])]
    eps = max(float(jnp.finfo(a.dtype).eps) for a in arrays)
    return LayerOf(path, form, fan_in, eps, Block(weight, roles), Block(gradient, roles), data, output)


def _roles(home: Program, place: Place, shape: tuple[int, ...]) -> tuple[Any, Any, int, Any]:
    """Read a product: (form, order of the weight's axes by role, fan-in, axes of units of input and output)."""
    op, params, name = place.op, place.op.params, place.op.name
    axes = tuple(range(len(shape)))
    if name == "gather":
        return (1, 1, shape[0], math.prod(shape[1:])), axes, 1, place.units
    if name == "dot_general":
        assert place.input is not None
        data = op.inputs.index(place.input)
        contracted, batched = params["dimension_numbers"]
        pairs = sorted(zip(contracted[data], contracted[1 - data], strict=True))
        inside, batch = tuple(axis for _, axis in pairs), tuple(batched[1 - data])
        free = tuple(axis for axis in axes if axis not in inside + batch)
        sizes = [math.prod(shape[axis] for axis in part) for part in (batch, inside, free)]
        return (1, *sizes), (*batch, *inside, *free), sizes[1], place.units
    inner = next((p for n, p in equations(op) if n == "conv_general_dilated"), None)
    if inner is None or len(inner["dimension_numbers"].rhs_spec) != len(shape):
        return ("custom", *shape), axes, math.prod(shape), None
    numbers = inner["dimension_numbers"]
    out, into, *space = numbers.rhs_spec
    positions = math.prod(shape[axis] for axis in space)
    units = ((numbers.lhs_spec[1],), (numbers.out_spec[1],)) if name != "conv_general_dilated" else place.units
    form = (inner["batch_group_count"], positions, shape[into], shape[out])
    return form, (*space, into, out), positions * shape[into], units


def _stacked(group: Sequence[LayerOf]) -> LayerOf:
    """Make one layer of several uses of a weight."""
    first = group[0]
    if len(group) == 1:
        return first

    def joined(blocks):
        if any(b is None for b in blocks):
            return None
        units = blocks[0].units
        array = np.stack([b.array for b in blocks])
        return Block(array, None if units is None else tuple(axis + 1 for axis in units))

    output = joined([layer.output for layer in group])
    assert output is not None
    total = replace(first.gradient, array=functools.reduce(np.add, [layer.gradient.array for layer in group]))
    return replace(first, gradient=total, input=joined([layer.input for layer in group]), output=output)


def _wide(dtype: Any) -> Any:
    return np.promote_types(np.float32, dtype) if dtype.kind == "f" else np.float32
