"""What a program does over the axis of examples: averages over it, and statistics of an example alone."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from fnn import mapped
from fnn.gradients.operations import Atom, Const, Loop, Op, Program, rebuilt
from fnn.gradients.program import COLLECTIVES, equations

SAME = {"convert_element_type", "copy", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "optimization_barrier"}


def collectives(program: Program, axis_name: Any) -> bool:
    """Whether a program averages over a mapped axis and no other besides, in a loop or a branch too."""

    def axes(params):
        return set(mapped.names(params.get("axes", params.get("axis_name", ()))))

    names = set(mapped.names(axis_name))
    return any(name in COLLECTIVES and axes(params) and axes(params) <= names for name, params in equations(program))


def freeze(program: Program) -> Program:
    """Stop gradients at the results of collectives.

    Errors: NotImplementedError for a collective inside a branch, a while loop or a custom derivative.
    """
    frozen = replace(program, ops=[], makers={})
    for op in program.ops:
        if isinstance(op, Loop):
            op = rebuilt(op, freeze(op.body), op.inputs, op.outputs, op.consts, op.carries)
        elif op.name in COLLECTIVES:
            op = replace(op, call=lambda *values, call=op.call: [jax.lax.stop_gradient(out) for out in call(*values)])
        elif any(name in COLLECTIVES for name, _ in equations(op)):
            raise NotImplementedError(
                f"per_example: batch_norm='frozen' cannot reach the collective inside a {op.name}; use 'path' or 'loss'"
            )
        frozen.append(op)
    return frozen


def lone_statistic(program: Program, moving: Sequence[bool]) -> bool:
    """Whether a program centres a value by its mean over a leading axis of size one, as batch norm does with one example.

    Only values that depend on the inputs that are `moving` count. The mean is over the first axis and perhaps others, but
    not over all: layer norm averages over the last axis, softmax takes a maximum, and a sum alone is no statistic.
    """
    moved = {atom for atom, m in zip(program.inputs, moving, strict=True) if m}
    for op in program.ops:
        inputs = [atom in moved for atom in op.inputs]
        if isinstance(op, Loop):
            carried = inputs[op.consts : op.consts + op.carries]
            inside = [*inputs[: op.consts], *(any(inputs) for _ in carried), *inputs[op.consts + op.carries :]]
            if lone_statistic(op.body, inside):
                return True
        elif op.name == "sub" and any(inputs):
            for value, mean in (op.inputs, op.inputs[::-1]):
                reduced, centred = _source(program, mean)[1], _source(program, value)[0]
                if reduced is None or reduced.name != "reduce_sum":
                    continue
                axes, shape = reduced["axes"], program.spec(reduced.inputs[0]).shape
                # Over no axis at all: batch norm on an example without a batch axis.
                alone = not axes or (0 in axes and shape[0] == 1 and len(axes) < len(shape))
                if alone and _source(program, reduced.inputs[0])[0] == centred and centred in moved:
                    return True
        if any(inputs):
            moved.update(op.outputs)
    return False


def _source(program: Program, atom: Atom) -> tuple[Atom, Op | None]:
    """Go back through what changes no numbers, and through factors: to the value and the operation that made it."""
    while not isinstance(atom, Const) and (op := program.makers.get(atom, (None,))[0]) is not None:
        factor = op.name in ("mul", "div") and isinstance(op.inputs[1], Const)
        if op.name not in SAME and not factor:
            return atom, op
        atom = op.inputs[0]
    return atom, None


def warn_of_lone_statistic() -> None:
    """Say that an example's program takes a batch statistic of its own."""
    warnings.warn(
        "per_example: the loss takes a statistic over a batch axis of size one (batch norm in training), so these are "
        "gradients of batches of one, whose mean is not the batch's gradient; give the layer and per_example the same "
        "axis_name, or use batch_norm='running' with a loss in eval mode",
        stacklevel=2,
    )
