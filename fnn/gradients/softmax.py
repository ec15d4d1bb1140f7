"""Recognise the softmax of attention in a program, and say which of its axes count heads."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from fnn.gradients.operations import Atom, Const, Loop, Op, Program
from fnn.gradients.program import equations

SAME = {"convert_element_type", "copy", "reduce_precision", "stop_gradient", "optimization_barrier", "barrier", "name"}
"""Operations that leave the axes of their operands alone."""
Order = tuple[Any, ...]
"""A place in a program: numbers of operations from the outside in; a loop adds its number and None, for the turn."""


@dataclass(frozen=True, eq=False)
class Turns:
    """A loop around a place."""

    loop: Loop
    depth: bool
    """Whether each turn has parameters of its own (layers), rather than the same ones (time)."""

    @property
    def length(self) -> int:
        return self.loop.params["length"]

    @property
    def backwards(self) -> bool:
        return bool(self.loop.params["reverse"])


@dataclass(frozen=True, eq=False)
class Softmax:
    """A softmax over attention logits."""

    logits: int
    order: Order
    turns: tuple[Turns, ...]
    axis: int
    heads: tuple[int, ...]
    near: tuple[int, ...]
    """The parameters whose products it is made of: those of queries and keys."""


def softmax(
    program: Program, op: Op, order: Order, turns: tuple[Turns, ...], products: dict[int, int]
) -> Softmax | None:
    """Recognise a softmax over the logits of attention: written out, or as a function with a derivative of its own.

    `products` says of variables that are products of data with a parameter which parameter that is.
    """
    if (found := normalized(program, op)) is None:
        return None
    logits, axes = found
    made = _made(program, logits) if len(axes) == 1 else None
    if made is None or isinstance(logits, Const):
        return None
    product, heads = made
    return Softmax(logits, order, turns, axes[0], heads, _fed(program, product, products))


def normalized(program: Program, op: Op) -> tuple[Atom, tuple[int, ...]] | None:
    """Recognise a softmax, written out or as a function with a derivative of its own: what it takes, and over which axes."""
    if op.name == "div":
        top, bottom = (source(program, a) for a in op.inputs)
        exp, total = _maker(program, top), _maker(program, bottom)
        if exp is None or total is None or (exp.name, total.name) != ("exp", "reduce_sum"):
            return None
        shifted = _maker(program, exp.inputs[0])
        if source(program, total.inputs[0]) != top or shifted is None or shifted.name != "sub":
            return None
        return shifted.inputs[0], tuple(total.params["axes"])
    if "custom_jvp" in op.name:
        inner = dict(equations(op))
        if not {"exp", "reduce_sum", "div"} <= set(inner) or len(op.outputs) != 1:
            return None
        same = [a for a in op.inputs if program.spec(a).shape == program.spec(op.outputs[0]).shape]
        if len(same) != 1:
            return None
        return same[0], tuple(inner["reduce_sum"]["axes"])
    return None


def _maker(program: Program, atom: Atom) -> Op | None:
    return None if isinstance(atom, Const) else program.makers.get(atom, (None, 0))[0]


def _made(program: Program, atom: Atom) -> tuple[Op, tuple[int, ...]] | None:
    """Find the product that makes logits, and their axes of heads: its batch axes less the first, the examples."""
    op = _maker(program, atom)
    if op is None or op.name in ("reshape", "squeeze", "expand_dims"):
        return None
    products = [name for name, _ in equations(op) if name == "dot_general"]
    if op.name == "dot_general" or ("custom_jvp" in op.name and len(products) == 1):
        params = op.params if op.name == "dot_general" else dict(equations(op))["dot_general"]
        batched = params["dimension_numbers"][1][0]
        return (op, tuple(range(1, len(batched)))) if batched else None
    shape = program.spec(atom).shape
    for a in op.inputs:  # a mask is among them
        alike = op.name == "transpose" or program.spec(a).shape == shape
        floating = jnp.issubdtype(program.spec(a).dtype, jnp.floating)
        if alike and floating and (made := _made(program, a)) is not None:
            order = tuple(op.params["permutation"]) if op.name == "transpose" else tuple(range(len(shape)))
            return made[0], tuple(order.index(axis) for axis in made[1])
    return None


def _fed(program: Program, op: Op, products: dict[int, int]) -> tuple[int, ...]:
    """Go back from the operands of a product to products with parameters."""
    found, waiting, seen = [], list(op.inputs), set()
    while waiting:
        atom = waiting.pop(0)
        if isinstance(atom, Const) or atom in seen:
            continue
        seen.add(atom)
        if atom in products:
            found.append(products[atom])
        elif (maker := program.makers.get(atom, (None, 0))[0]) is not None:
            waiting += maker.inputs
    return tuple(dict.fromkeys(found))


def source(program: Program, atom: Atom) -> Atom:
    """Go back through what changes no number."""
    while not isinstance(atom, Const):
        op, i = program.makers.get(atom, (None, 0))
        if op is None or op.name not in SAME | {"reshape", "transpose", "expand_dims", "squeeze", "broadcast_in_dim"}:
            return atom
        atom = op.inputs[i if len(op.outputs) > 1 else 0]
    return atom
