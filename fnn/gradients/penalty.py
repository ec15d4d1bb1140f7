"""Weight penalties of any loss: the terms of its sum that depend on the parameters alone. Find them, and leave them out."""

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


def unpenalized(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss without its penalties: `mean(errors) + 0.1 * sum(w**2)` becomes `mean(errors)`. Errors: `Unreadable`."""

    def new(*args):
        program, shape = traced(loss, args)
        left: dict[int, list[int]] = {}
        for op, i in penalties(program, len(jax.tree.leaves(args[0]))):
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
