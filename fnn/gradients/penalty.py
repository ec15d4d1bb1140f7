"""The terms of any loss that is a sum, and those of the parameters alone, its weight penalties. Find them, and leave them out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fnn.gradients.operations import Const, Op, Program, execute
from fnn.gradients.swap import traced

SUMS = {"add", "add_any", "sub"}
ALONG = {"neg", "convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "reduce_sum", "copy"}
"""Operations on one array through which a term stays a term."""
MOST = 3
"""A loss of more terms is not taken apart."""
SHAPED = {"broadcast_in_dim", "reshape", "convert_element_type", "copy", "neg"}


def penalties(program: Program, parameters: int) -> list[tuple[Op, int]]:
    """Find the terms of a program's first output that depend on its first inputs, the parameters, and not on the others.

    They are numbers, not arrays, or they would be a layer's bias. Each is an operand of a sum: (operation, which operand).
    """
    of_params, of_batch = set(program.inputs[:parameters]), set(program.inputs[parameters:])
    for op in program.ops:
        inputs = {a for a in op.inputs if isinstance(a, int)}
        if inputs & of_batch:
            of_batch.update(op.outputs)
        elif inputs & of_params:
            of_params.update(op.outputs)
    found: list[tuple[Op, int]] = []

    def number(atom: int) -> bool:
        maker = program.makers.get(atom)
        while program.spec(atom).shape and maker is not None and maker[0].name in SHAPED:
            if not isinstance(maker[0].inputs[0], int):
                return False
            atom = maker[0].inputs[0]
            maker = program.makers.get(atom)
        return program.spec(atom).shape == ()

    def walk(atom: Any) -> None:
        if not isinstance(atom, int) or atom not in of_batch or atom not in program.makers:
            return
        op = program.makers[atom][0]
        if op.name in SUMS:
            for i, term in enumerate(op.inputs):
                if isinstance(term, int) and term in of_params and number(term):
                    found.append((op, i))
                walk(term)
        elif op.name in ALONG:
            walk(op.inputs[0])
        elif op.name in ("mul", "div"):
            terms = [a for a in op.inputs if isinstance(a, int) and (a in of_batch or a in of_params)]
            if len(terms) == 1 and not (op.name == "div" and terms[0] is op.inputs[1]):
                walk(terms[0])

    for output in program.outputs[:1]:
        walk(output)
    return found


def penalized(loss: Callable[..., Any], *args: Any) -> bool:
    """Whether a loss, whose first argument are the parameters, has a penalty. Errors: `Unreadable`."""
    return bool(penalties(traced(loss, args)[0], len(jax.tree.leaves(args[0]))))


def terms(program: Program) -> list[tuple[Op, int]]:
    """List the terms of a program's first output, where that is a sum, or a mean of sums: (operation, which operand).

    They are those of the first sum on the way back from the output, a + b + c. Numbers that are written in the program are none.
    """
    atom = program.outputs[0]
    while isinstance(atom, int) and atom in program.makers:
        op = program.makers[atom][0]
        data = [a for a in op.inputs if isinstance(a, int)]
        if op.name in ("add", "add_any") and len(data) == 2:
            return _summands(program, op)
        if not (op.name in ALONG or op.name in ("mul", "div", *SUMS)) or len(data) != 1:
            break
        atom = data[0]
    return []


def _summands(program: Program, op: Op) -> list[tuple[Op, int]]:
    found: list[tuple[Op, int]] = []
    for i, a in enumerate(op.inputs):
        maker = program.makers[a][0] if isinstance(a, int) and a in program.makers else None
        if maker is not None and maker.name in ("add", "add_any") and all(isinstance(b, int) for b in maker.inputs):
            found += _summands(program, maker)
        else:
            found.append((op, i))
    return found


def removable(function: Callable[..., Any], targets: int, *args: Any) -> list[int]:
    """Number the terms of a loss that can be left out: those that do not read its last arrays, the `targets`.

    Of more than `MOST` terms, or of one, none. Without targets all. Errors: `Unreadable`.
    """
    program, _ = traced(function, args)
    found = terms(program)
    if not 2 <= len(found) <= MOST:
        return []
    read = set(program.inputs[len(program.inputs) - targets :])
    for op in program.ops:
        if read & {a for a in op.inputs if isinstance(a, int)}:
            read.update(op.outputs)
    return [n for n, (op, i) in enumerate(found) if op.inputs[i] not in read]


def without_term(loss: Callable[..., Any], which: int) -> Callable[..., Any]:
    """Return the loss without one of its `terms`. Errors: `Unreadable`."""
    return _without(loss, lambda program, _: [terms(program)[which]])


def unpenalized(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss without its penalties: `mean(errors) + 0.1 * sum(w**2)` becomes `mean(errors)`. Errors: `Unreadable`."""
    return _without(loss, penalties)


def _without(loss: Callable[..., Any], chosen: Callable[[Program, int], list[tuple[Op, int]]]) -> Callable[..., Any]:
    """Put zeros in the place of some operands."""

    def new(*args):
        program, shape = traced(loss, args)
        left: dict[int, list[int]] = {}
        for op, i in chosen(program, len(jax.tree.leaves(args[0]))):
            left.setdefault(id(op), []).append(i)

        def without(op):
            spec = [program.spec(a) if i in left[id(op)] else None for i, a in enumerate(op.inputs)]
            inputs = [
                a if s is None else Const(jnp.zeros(s.shape, s.dtype)) for a, s in zip(op.inputs, spec, strict=True)
            ]
            return replace(op, inputs=inputs)

        ops = [without(op) if id(op) in left else op for op in program.ops]
        return jax.tree.unflatten(jax.tree.structure(shape), execute(replace(program, ops=ops), jax.tree.leaves(args)))

    return new
