"""Find the layers of any loss in its traced program: where a parameter meets data, and in which order.

A *place* is an operation that multiplies data by something made of parameters alone: a `dot_general`, a convolution, a
lookup of rows. The data is the layer's input, the product its output. What is made of parameters and constants alone
(a cast, a slice, a scaled or normalized kernel) is still that parameter. Nothing here depends on how a model was written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnn.gradients.indices import takes_its_own
from fnn.gradients.normed import Normed
from fnn.gradients.operations import Atom, Const, Loop, Op, Program, Remat, reached
from fnn.gradients.program import equations
from fnn.gradients.softmax import SAME, Order, Softmax, Turns, softmax, source

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
ENTRYWISE = SAME | {"add", "add_any", "sub", "mul", "reshape", "broadcast_in_dim", "transpose", "slice", "split"}
BOUNDS = {"tanh": (-1.0, 1.0), "logistic": (0.0, 1.0)}
"""What bounded operations lie between."""


@dataclass(frozen=True, eq=False)
class Held:
    """A value made of one parameter (the largest that takes part)."""

    parameter: int
    size: int
    loops: tuple[Loop, ...] = ()
    """The loops around that give each turn a part of the parameter of its own."""
    axes: int = 0
    """How many leading axes of the parameter they have taken away, from the first on."""
    rows: tuple[int, ...] = ()
    """Which entry of the leading axis this is, where one was taken by a number that is written in the program."""
    whole: bool = True
    """Whether the leading axis is still the parameter's own."""


@dataclass(frozen=True, eq=False)
class Place:
    """One use of a parameter as a factor of a product."""

    parameter: int
    op: Op
    order: Order
    turns: tuple[Turns, ...]
    input: int | None
    """The variable of the data; None for a lookup, whose input is numbers of rows."""
    product: int
    """The variable in which the error signal arrives."""
    output: int
    """The product with the bias added, if one is."""
    units: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    """Axes of input and output that count units; the others are examples and positions. None where not known."""
    rows: tuple[int, ...] = ()
    bounds: tuple[Any, Any] = (None, None)
    """(low, high) of a bounded operation that makes the input: in the first turn of the innermost loop, and in the others."""


@dataclass
class Use:
    """Where a parameter first meets data."""

    order: Order
    turns: tuple[Turns, ...]
    axes: int
    """How many leading axes of the parameter count turns."""
    rows: dict[tuple[int, ...], Order] = field(default_factory=dict)
    """Where each entry of the leading axis is first used, if they are taken one by one."""


@dataclass
class Found:
    """What a search of a program found."""

    places: list[Place] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    uses: dict[int, Use] = field(default_factory=dict)
    unread: list[tuple[str, list[int]]] = field(default_factory=list)
    """Operations with products inside that are not looked into, and the parameters that they take."""


def find(program: Program, parameters: int) -> Found:
    """Search a program whose first inputs are the parameters; where nothing meets them, data is what the loss makes itself."""
    held = {atom: Held(i, int(np.prod(program.spec(atom).shape))) for i, atom in enumerate(program.inputs[:parameters])}
    data = reached(program, program.inputs[parameters:])
    found = Found()
    walk = _Walk(found, data, program)
    walk.walk(program, dict(held), (), ())
    found.places = [place for place in found.places if not walk.normed.only_norms(place.product)]
    if not found.places:
        found = Found()
        _Walk(found, None, program).walk(program, dict(held), (), ())
    found.places.sort(key=lambda place: _sortable(place.order))
    return found


def _sortable(order: Order) -> tuple[int, ...]:
    return tuple(-1 if number is None else number for number in order)


class _Walk:
    """One walk through a program, from its inputs to its outputs."""

    def __init__(self, found: Found, data: set[int] | None, program: Program):
        self.found, self.data, self.normed = found, data, Normed(program)
        self.products: dict[int, int] = {}

    def walk(self, program: Program, held: dict[int, Held], order: Order, turns: tuple[Turns, ...]) -> None:
        for number, op in enumerate(program.ops):
            here, inputs = (*order, number), [held.get(a) if not isinstance(a, Const) else None for a in op.inputs]
            if (own := self._made(program, op, inputs)) is not None:
                held.update(dict.fromkeys(op.outputs, own))
                continue
            if isinstance(op, Loop):
                self._loop(program, op, inputs, here, turns)
            elif isinstance(op, Remat):
                self.walk(op.body, _given(op.body.inputs, inputs), here, turns)
            elif (place := _place(program, op, inputs, held, here, turns)) is not None:
                self.found.places.append(place)
                self.products[place.product] = place.parameter
            elif (own := _own(program, op, inputs, self.data)) is not None:
                held.update(own)
                continue
            elif (own := self.normed.scaled(program, op, inputs)) is not None:
                held[op.outputs[0]] = own
                continue
            elif any(inputs) and PRODUCTS & {name for name, _ in equations(op)}:
                names = sorted({own.parameter for own in inputs if own is not None})
                self.found.unread.append((f"{op.name} {op.where}".strip(), names))
            if (seen := softmax(program, op, here, turns, self.products)) is not None:
                self.found.softmaxes.append(seen)
            if not isinstance(op, Loop | Remat):
                for own in filter(None, inputs):
                    self._use(own, here, turns)

    def _made(self, program: Program, op: Op, inputs: Sequence[Held | None]) -> Held | None:
        """What products and loops make of parameters alone, as a norm found by power iteration, is no layer's output."""
        if self.data is None or not (isinstance(op, Loop) or op.name in PRODUCTS) or not any(inputs):
            return None
        if any(jnp.ndim(a.value) > 0 if isinstance(a, Const) else a in self.data for a in op.inputs):
            return None
        if any(self._joins(program, output) for output in op.outputs):
            return None
        return replace(max(filter(None, inputs), key=lambda own: own.size), rows=(), whole=False)

    def _joins(self, program: Program, atom: int, steps: int = 6) -> bool:
        """Whether a value is added to data or multiplied with it, entry by entry: a recurrent net's first state times a kernel."""
        readers = [op for op in program.ops if atom in op.inputs and op.name in ENTRYWISE] if steps else []
        outputs = [out for op in readers for out in op.outputs]
        return any(out in (self.data or ()) or self._joins(program, out, steps - 1) for out in outputs)

    def _loop(
        self, program: Program, op: Loop, inputs: Sequence[Held | None], order: Order, turns: tuple[Turns, ...]
    ) -> None:
        first, last = op.consts, op.consts + op.carries
        inner: dict[int, Held] = {}
        for i, (own, var) in enumerate(zip(inputs, op.body.inputs, strict=True)):
            if own is None:
                continue
            if i < first or (i < last and op.body.outputs[i - first] == var):
                inner[var] = replace(own, loops=(*own.loops, op)) if takes_its_own(program, op, var) else own
            elif i >= last:
                axes = own.axes + 1 if own.whole and own.axes == len(own.loops) else own.axes
                inner[var] = replace(own, loops=(*own.loops, op), axes=axes)
        depth = any(op in own.loops for own in inner.values())
        self.walk(op.body, inner, (*order, None), (*turns, Turns(op, depth)))

    def _use(self, own: Held, order: Order, turns: tuple[Turns, ...]) -> None:
        known = self.found.uses.setdefault(own.parameter, Use(order, _turns(own, turns), own.axes))
        known.axes = min(known.axes, own.axes)
        known.rows.setdefault(own.rows, order)


def _turns(own: Held, turns: Sequence[Turns]) -> tuple[Turns, ...]:
    """Tell loops over layers from loops over time, as far as one parameter is concerned."""
    return tuple(replace(turn, depth=turn.loop in own.loops) for turn in turns)


def _given(variables: Sequence[int], held: Sequence[Held | None]) -> dict[int, Held]:
    return {var: own for var, own in zip(variables, held, strict=True) if own is not None}


def _own(program: Program, op: Op, inputs: Sequence[Held | None], data: set[int] | None) -> dict[int, Held] | None:
    """Results made of parameters and constants alone still count as the largest of these parameters."""
    held = [own for own in inputs if own is not None]
    if (
        not held
        or op.name in PRODUCTS
        or not all(own is not None or _constant(program, a, data) for own, a in zip(inputs, op.inputs, strict=True))
    ):
        return None
    if op.name == "gather" and np.prod(program.spec(op.inputs[1]).shape) > 1:
        return None
    if op.name in ("optimization_barrier", "barrier"):
        return _given(op.outputs, inputs)
    own = max(held, key=lambda h: h.size)
    rows = own.rows
    if op.name == "slice" and own.whole and not own.rows and program.spec(op.outputs[0]).shape[:1] == (1,):
        if program.spec(op.inputs[0]).shape[0] > 1:
            rows = (int(op.params["start_indices"][0]),)
    elif (
        own.whole
        and op.params.get("axis") == 0
        and (op.name == "unstack" or (op.name == "split" and set(op.params["sizes"]) == {1}))
    ):
        return {var: replace(own, rows=(i,), whole=False) for i, var in enumerate(op.outputs)}
    before, after = program.spec(op.inputs[0]).shape, program.spec(op.outputs[0]).shape
    whole = own.whole and not rows and before[:1] == after[:1] and op.name != "transpose"
    return {var: replace(own, rows=rows, whole=whole) for var in op.outputs}


def _constant(program: Program, atom: Atom, data: set[int] | None) -> bool:
    """Whether a value is written in the program, or an integer (a number of a row), or computed without data, as a mask may be."""
    known = isinstance(atom, Const) or not jnp.issubdtype(program.spec(atom).dtype, jnp.floating)
    return known or (data is not None and atom not in data)


def _place(
    program: Program,
    op: Op,
    inputs: Sequence[Held | None],
    held: dict[int, Held],
    order: Order,
    turns: tuple[Turns, ...],
) -> Place | None:
    """Read an operation that multiplies data by a parameter; its six arguments are where it stands."""
    if op.name == "gather" and inputs[0] and np.prod(program.spec(op.inputs[1]).shape) > 1:
        rank, taken = len(program.spec(op.outputs[0]).shape), op.params["dimension_numbers"].offset_dims
        own, out = inputs[0], op.outputs[0]
        return Place(own.parameter, op, order, _turns(own, turns), None, out, out, (None, tuple(taken)[:rank]))
    if op.name in PRODUCTS:
        inside, params = True, op
    else:
        # A function with a derivative rule of its own around one product, such as a convolution with a faster gradient.
        found = [name for name, _ in equations(op)] if "custom" in op.name else []
        inside, params = False, "scan" not in found and sum(name in PRODUCTS for name in found) == 1
    if not params or len(op.outputs) != 1:
        return None
    data = [
        a
        for a, own in zip(op.inputs, inputs, strict=True)
        if own is None and not isinstance(a, Const) and jnp.issubdtype(program.spec(a).dtype, jnp.inexact)
    ]
    kernels = [own for own in inputs if own is not None]
    if not data or not kernels:
        return None
    own = max(kernels, key=lambda h: h.size)
    spec = program.spec(op.outputs[0])
    if not jnp.issubdtype(spec.dtype, jnp.floating):
        return None
    side = op.inputs.index(data[0]) if inside else 0
    units = _units(op, side, program) if inside else (None, None)
    output, axes = _biased(program, op.outputs[0], units[1], held)
    return Place(
        own.parameter,
        op,
        order,
        _turns(own, turns),
        data[0],
        op.outputs[0],
        output,
        (units[0], axes),
        own.rows,
        _bounds(program, data[0], turns),
    )


def _units(op: Op, side: int, program: Program) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Find the axes of units of a product's data, and of its result."""
    if op.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        return (numbers.lhs_spec[1],), (numbers.out_spec[1],)
    numbers, groups = op.params.get("dimension_numbers"), 0
    if numbers is None:  # of a `ragged_dot`, each of whose rows meets the kernel of its group
        ragged = op.params["ragged_dot_dimension_numbers"]
        numbers, groups = ragged.dot_dimension_numbers, len(ragged.rhs_group_dimensions)
        if side or not groups:
            return None, None
    contracted, batched = numbers
    free = [
        len(program.spec(a).shape) - len(c) - len(b) for a, c, b in zip(op.inputs[:2], contracted, batched, strict=True)
    ]
    free[1] -= groups
    start = len(batched[0]) + (free[0] if side == 0 else 0)
    mine = tuple(range(start, start + free[1 - side]))
    return tuple(contracted[side]), mine


def _biased(
    program: Program, atom: int, units: tuple[int, ...] | None, held: dict[int, Held]
) -> tuple[int, tuple[int, ...] | None]:
    """Follow a product to the sum with its bias; return (variable, axes of units), those of the product where there is none."""
    start = atom, units
    for _ in range(6):
        readers = [op for op in program.ops if atom in op.inputs]
        if len(readers) != 1:
            return start
        (op,) = readers
        if op.name in ("add", "add_any"):
            (other,) = [a for a in op.inputs if a != atom] or [atom]
            return (op.outputs[0], units) if _of_parameters(program, other, held) else start
        if op.name == "transpose":
            order = tuple(op.params["permutation"])
            units = None if units is None else tuple(order.index(axis) for axis in units)
        elif op.name == "reshape":
            units = None
        elif op.name not in SAME:
            return start
        atom = op.outputs[0]
    return start


def _of_parameters(program: Program, atom: Atom, held: dict[int, Held]) -> bool:
    """Whether a value is made of parameters alone; it may stand later in the program than the walk has come."""
    while not isinstance(atom, Const):
        if atom in held:
            return True
        op, _ = program.makers.get(atom, (None, 0))
        if op is None or op.name not in SAME | {"broadcast_in_dim", "reshape", "expand_dims", "squeeze", "transpose"}:
            return False
        atom = op.inputs[0]
    return False


def _bounds(program: Program, atom: Atom, turns: tuple[Turns, ...]) -> tuple[Any, Any]:
    """Find the bounds of the operation that makes a value; of a loop's carry in its first turn, and in the others."""
    own = _bounded(program, atom)
    if own is not None or not turns:
        return own, own
    loop, place = turns[-1].loop, None
    atom = source(program, atom)
    if not isinstance(atom, Const) and atom in loop.body.inputs and loop.body is program:
        place = loop.body.inputs.index(atom) - loop.consts
    if place is None or not 0 <= place < loop.carries:
        return None, None
    return None, _bounded(program, loop.body.outputs[place])


def _bounded(program: Program, atom: Atom) -> Any:
    atom = source(program, atom)
    op, _ = program.makers.get(atom, (None, 0)) if not isinstance(atom, Const) else (None, 0)
    return None if op is None else BOUNDS.get(op.name)
