"""Replace the activations of any traced loss: those between two layers, and those behind the last one."""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.gradients import places
from fnn.gradients.by_values import FEWEST, KNOWN, named, points
from fnn.gradients.operations import Loop, Op, Program, Remat, execute, rebuilt
from fnn.gradients.program import equations, read, trace
from fnn.gradients.softmax import normalized

PRODUCTS = {"mul", "div"}
LINEAR = {"add", "add_any", "sub", "neg", "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "copy"} | {
    "convert_element_type", "reduce_precision", "stop_gradient"
}  # fmt: skip
"""What may stand between two layers that together are one linear map."""
STOP = "stop_gradient"


@dataclass(frozen=True)
class Activation:
    """One activation of a program."""

    name: str
    role: str
    """hidden (between two layers), last (behind the last layer), gate (multiplied with other data: left alone), loss (of
    outputs that the loss also reads without it, as in softplus(z) - y z, or in which the batch takes part: left alone)."""
    input: int
    output: int
    """The variables that it takes and makes."""


def activations(program: Program, parameters: int) -> list[Activation]:
    """Find the activations of a loss's forward program, whose first inputs are the parameters; those in loops too.

    An activation is a function of each number of a layer's output by itself, by one operation or several, that has the
    values of a known one; or a softmax behind the last layer, or between two.
    """
    layers = places.find(program, parameters).places
    products, inputs = ({getattr(place, which) for place in layers} for which in ("product", "input"))
    walk = _Walk(products)
    # In a thread of its own nothing is being traced, whatever the caller does: operations run on points, and give numbers.
    wide = bool(jax.config.read("jax_enable_x64"))  # it may hold for this thread alone

    def walked():
        with jax.enable_x64(wide):
            walk.forward(program, set())

    with ThreadPoolExecutor(1) as thread:
        thread.submit(walked).result()
    walk.backward(program, set())
    found = []
    for output, (name, root) in walk.names.items():
        if output in walk.partial & walk.used:
            continue  # of a function between two layers that is none of the known ones as a whole: mish has a softplus in it
        role = "gate" if output in walk.gates else "hidden" if output in walk.used else "last"
        found.append(Activation(name, role, root, output))
    for op in program.ops:
        taken = normalized(program, op)
        out = op.outputs[0]
        if taken is None or not isinstance(taken[0], int) or out in walk.gates:
            continue
        if out not in walk.used:
            found.append(Activation("softmax", "last", taken[0], out))
        elif out in inputs and sum(out in other.inputs for other in program.ops) == 1:
            # A layer alone takes it: attention multiplies data with it.
            found.append(Activation("softmax", "hidden", taken[0], out))
    batch = _of_batch(program, parameters, products)
    passed = _passed(program, [a for a in found if a.role == "last"])
    return [replace(a, role="loss") if a.role == "last" and a.input in batch | passed else a for a in found]


def _of_batch(program: Program, parameters: int, products: set[int]) -> set[int]:
    """List what comes after a layer, and reads the batch besides."""
    given, after, mixed = set(program.inputs[parameters:]), set(products), set()
    for op in program.ops:
        inputs = {a for a in op.inputs if isinstance(a, int)}
        if products & set(op.outputs):  # a layer reads what it likes
            continue
        if inputs & after:
            after.update(op.outputs)
            mixed.update(op.outputs if inputs & (given | mixed) else ())
        elif inputs & given:
            given.update(op.outputs)
    return mixed


def _passed(program: Program, last: list[Activation]) -> set[int]:
    """List what last activations take, if it is made with another one, or the outputs depend on it by another way as well."""
    passed = _behind(program, last)
    for root in {a.input for a in last}:
        ends, reached = {a.output: a.name for a in last if a.input == root}, {root}
        for op in program.ops:
            if reached & {a for a in op.inputs if isinstance(a, int)}:
                reached.update(set(op.outputs) - set(ends))
        if len(set(ends.values())) > 1 or reached & {a for a in program.outputs if isinstance(a, int)}:
            passed.add(root)
    return passed


def _behind(program: Program, last: list[Activation]) -> set[int]:
    """List what last activations take that others have made, as in max(softmax(z), 1e-6)."""
    made = {a.output for a in last}
    for op in program.ops:
        if made & {a for a in op.inputs if isinstance(a, int)}:
            made.update(op.outputs)
    return {a.input for a in last if a.input in made}


class _Walk:
    """Which variables come after a layer, which lead to one, and which are an activation of another variable."""

    def __init__(self, products: set[int]):
        self.products = products
        self.used: set[int] = set()
        self.gates: set[int] = set()
        self.names: dict[int, tuple[str, int]] = {}
        self.partial: set[int] = set()
        self.fixed: dict[int, Any] = {}

    def forward(self, program: Program, known: set[int]) -> set[int]:
        """Mark what depends on a layer's output; return the variables of this program that do."""
        known, roots, values = set(known), {}, {}
        through: dict[int, set[int]] = {}  # the activations that a variable was made with
        for op in program.ops:
            given = [isinstance(a, int) and a in known for a in op.inputs]
            if isinstance(op, Loop | Remat):
                inner, out = {v for v, g in zip(op.body.inputs, given, strict=True) if g}, []
                for _ in range(2):  # a carry that depends on a layer does so from the second turn on
                    inside = self.forward(op.body, inner)
                    out = [isinstance(a, int) and a in inside for a in op.body.outputs]
                    carries = op.body.inputs[op.consts :][: op.carries] if isinstance(op, Loop) else []
                    inner |= {v for v, o in zip(carries, out, strict=False) if o}
                known |= {v for v, o in zip(op.outputs, out, strict=True) if o}
                continue
            if not (any(given) or self.products & set(op.outputs)):
                self._fix(program, op)
                continue
            known.update(op.outputs)
            data = [a for a, g in zip(op.inputs, given, strict=True) if g and isinstance(a, int)]
            origins = {roots.get(a, a) for a in data}
            root = origins.pop() if len(origins) == 1 else None
            if root is not None and self._evaluate(program, op, root, values):
                roots[op.outputs[0]] = root
                parts = {part for a in data for part in through.get(a, ()) if part in self.names}
                name = named(values[op.outputs[0]], values[root])
                if name is not None and not any(self.names[part][0] == name for part in parts):  # relu(relu(x))
                    for part in parts:  # what comes later in the chain is the whole activation
                        del self.names[part]
                    self.names[op.outputs[0]] = name, root
                    parts = {op.outputs[0]}
                elif not _affine(op, data):
                    carriers = parts | {a for a in data if through.get(a)}  # else it is used as it is too, as by a norm
                    alone = all(sum(a in other.inputs for other in program.ops) == 1 for a in carriers)
                    self.partial |= parts if alone else set()
                through[op.outputs[0]] = parts
            elif op.name in PRODUCTS and len(data) > 1:
                for a in data:
                    self.gates.update(through.get(a, ()))
        return known

    def _evaluate(self, program: Program, op: Op, root: int, values: dict[int, Any]) -> bool:
        """Run an operation on points, if it is a function of each number of `root` by itself, as far as shapes show."""
        spec, out = program.spec(root), program.spec(op.outputs[0])
        free = {a for a in op.inputs if isinstance(a, int)}
        if len(op.outputs) != 1 or op.effects or spec.shape != out.shape or op.name in places.PRODUCTS:
            return False
        if not jnp.issubdtype(spec.dtype, jnp.floating) or int(np.prod(spec.shape)) < FEWEST:
            return False
        if root not in values:
            values[root] = points(int(np.prod(spec.shape))).reshape(spec.shape).astype(spec.dtype)
        found = values | self.fixed
        if all(a in found for a in free) and (got := _run(op, found)) is not None:
            values[op.outputs[0]] = got
            return True
        return False

    def _fix(self, program: Program, op: Op) -> None:
        """Remember what a program makes of constants alone."""
        known = all(not isinstance(a, int) or a in self.fixed for a in op.inputs)
        if known and len(op.outputs) == 1 and not op.effects and (got := _run(op, self.fixed)) is not None:
            self.fixed[op.outputs[0]] = got

    def backward(self, program: Program, wanted: set[int]) -> set[int]:
        """Mark what leads to a layer's product; return the variables of this program that do."""
        wanted = set(wanted)
        for op in reversed(program.ops):
            if isinstance(op, Loop | Remat):
                ins: set[int] = set()
                inner = {
                    a for a, v in zip(op.body.outputs, op.outputs, strict=True) if v in wanted and isinstance(a, int)
                }
                for _ in range(2):
                    ins = self.backward(op.body, inner)
                    if isinstance(op, Loop):
                        carries = op.body.inputs[op.consts :][: op.carries]
                        more = zip(op.body.outputs[: op.carries], carries, strict=True)
                        inner |= {a for a, v in more if v in ins and isinstance(a, int)}
                wanted |= {a for a, v in zip(op.inputs, op.body.inputs, strict=True) if v in ins and isinstance(a, int)}
            elif wanted & set(op.outputs) or self.products & set(op.outputs):
                wanted.update(a for a in op.inputs if isinstance(a, int))
        self.used |= wanted
        return wanted


def _run(op: Op, values: Mapping[int, Any]) -> np.ndarray | None:
    """Run an operation on known values; None for one that does not run by itself, such as a collective."""
    with contextlib.suppress(Exception):
        inputs = [jnp.asarray(values[a]) if isinstance(a, int) else a.value for a in op.inputs]
        return np.asarray(op.call(*inputs)[0])
    return None


def _affine(op: Op, data: list[int]) -> bool:
    """Whether an operation only scales and shifts what it takes, or adds two branches."""
    return op.name in ("add", "add_any") or (len(data) == 1 and op.name in LINEAR | PRODUCTS)


def bare(program: Program, parameters: int) -> set[int]:
    """List what a layer takes from another one without an activation between: biases, shapes and casts alone.

    In the outermost program only, not in its loops; a lookup of rows is no layer here.
    """
    layers = [p for p in places.find(program, parameters).places if p.op.name in places.PRODUCTS]
    inputs, after, found = {p.input for p in layers}, {p.product for p in layers}, set()
    for op in program.ops:
        data = [a for a in op.inputs if isinstance(a, int) and a in after]
        if op.name in LINEAR and len(data) == 1:
            after.update(op.outputs)
        found.update(a for a in data if a in inputs)
    return found


class Listed(NamedTuple):
    """What a diagnosis wants to know of a loss's program."""

    activations: list[Activation]
    stops: int
    """How many `stop_gradient`s there are."""
    bare: int
    """How often a layer takes the output of another one as it is; see `bare`."""
    over_time: tuple[int, ...]
    """Which arrays of the parameters a loop multiplies by in each turn."""
    again: bool
    """Whether any array is multiplied by more than once, in a loop or without one, or where nobody can look."""


def listed(function: Callable[..., Any], *args: Any) -> Listed:
    """Look through a function whose first argument are the parameters. Errors: `Unreadable`."""
    program, count = traced(function, args)[0], len(jax.tree.leaves(args[0]))
    searched = places.find(program, count)
    found = searched.places
    over_time = {place.parameter for place in found if any(not turn.depth for turn in place.turns)}
    stops = sum(name == STOP for name, _ in equations(program))
    again = bool(over_time or searched.unread) or len({place.parameter for place in found}) < len(found)
    return Listed(activations(program, count), stops, len(bare(program, count)), tuple(sorted(over_time)), again)


def traced(function: Callable[..., Any], args: Any) -> tuple[Program, Any]:
    """Give a function's program, whose inputs are the leaves of `args`, and its outputs' shapes. Errors: `Unreadable`."""
    leaves, structure = jax.tree.flatten(args)
    closed, shape = trace(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)), *leaves)
    return read(closed, forward=True), shape


def swapped(loss: Callable[..., Any], chosen: Mapping[str, str]) -> Callable[..., Any]:
    """Return the loss with other activations: `{"hidden": "relu"}` replaces those between layers, "last" those behind them.

    "bare" puts one where a layer takes the output of another one as it is.
    `{"stop": "identity"}` lets gradients through every `stop_gradient`. Gates, and what the loss itself computes with the
    outputs, stay as they are. The new loss takes the same arguments, and works under `jit`, `grad` and `vmap`.
    Errors: `Unreadable`.
    """

    def new(*args):
        program, shape = traced(loss, args)
        count, leaves = len(jax.tree.leaves(args[0])), jax.tree.leaves(args)
        found = {a.output: (a.input, KNOWN[chosen[a.role]]) for a in activations(program, count) if a.role in chosen}
        between = dict.fromkeys(bare(program, count), KNOWN[chosen["bare"]]) if "bare" in chosen else {}
        outs = execute(_with(program, found, "stop" in chosen, between), leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return new


def _with(
    program: Program,
    functions: Mapping[int, tuple[int, Callable[[Any], Any]]],
    through: bool,
    between: Mapping[int, Callable[[Any], Any]],
) -> Program:
    ops: list[Op] = []
    for op in program.ops:
        if op.name in places.PRODUCTS and (
            taken := [between.get(a) if isinstance(a, int) else None for a in op.inputs]
        ):
            op = replace(op, call=_on_inputs(op.call, taken)) if any(taken) else op
        if isinstance(op, Loop):
            op = rebuilt(op, _with(op.body, functions, through, between), op.inputs, op.outputs, op.consts, op.carries)
        elif isinstance(op, Remat):
            op = replace(op, body=_with(op.body, functions, through, between))
            op.call = op.run
        elif through and op.name == STOP:
            op = replace(op, call=lambda *values: list(values))
        elif op.outputs and op.outputs[0] in functions:
            source, function = functions[op.outputs[0]]
            op = replace(op, inputs=[source], call=lambda value, f=function: [f(value)])
        ops.append(op)
    return replace(program, ops=ops)


def _on_inputs(call: Callable[..., Any], functions: list[Callable[[Any], Any] | None]) -> Callable[..., Any]:
    return lambda *values: call(*(v if f is None else f(v) for v, f in zip(values, functions, strict=True)))
