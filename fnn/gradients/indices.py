"""Numbers that a program computes from nothing but the turns of its loops: which row of a stack a loop takes in which turn."""

import jax
import jax.numpy as jnp
import numpy as np

from fnn import compiled
from fnn.gradients.operations import Atom, Const, Loop, Program, execute, prune


def takes_its_own(program: Program, loop: Loop, constant: int) -> bool:
    """Whether turn k takes entry k of a constant of the loop, and no turn takes another one."""
    found = False
    for op in loop.body.ops:
        if constant not in op.inputs:
            continue
        if op.name not in ("dynamic_slice", "gather") or op.inputs[0] != constant:
            continue
        if tuple(op.params.get("slice_sizes", (0,)))[:1] != (1,):
            return False
        rows = rows_of(program, loop, op.inputs[1])
        if rows is None or not np.array_equal(rows, np.arange(len(rows))):
            return False
        found = True
    return found


def rows_of(program: Program, loop: Loop, atom: Atom) -> np.ndarray | None:
    """Compute a number of a loop's body for each turn; None if it depends on more than the turn."""
    body, first, last = loop.body, loop.consts, loop.consts + loop.carries
    carried: list[int] = []
    while True:
        outputs = [atom, *(body.outputs[i - first] for i in carried)]
        part = prune(Program(body.inputs, body.ops, outputs, body.avals))
        read = {a for op in part.ops for a in op.inputs} | set(outputs)
        places = [i for i, var in enumerate(body.inputs) if var in read]
        more = [i for i in places if first <= i < last and i not in carried]
        if not more:
            break
        carried += more
    if any(op.effects for op in part.ops):
        return None
    given = {i: fixed(program, loop.inputs[i]) for i in {*places, *carried}}
    if any(value is None for value in given.values()):
        return None

    def turn(carry, xs):
        values = given | dict(zip(carried, carry, strict=True)) | xs
        index, *new = execute(part, [values.get(i, 0) for i in range(len(body.inputs))])
        return new, index

    with jax.ensure_compile_time_eval():
        xs = {i: jnp.asarray(value) for i, value in given.items() if i >= last}
        start = [jnp.asarray(given[i]) for i in carried]
        options = {name: loop.params[name] for name in ("length", "reverse")}
        return np.asarray(jax.lax.scan(turn, start, xs, **options)[1]).reshape(loop.params["length"], -1)[:, 0]


def fixed(program: Program, atom: Atom) -> np.ndarray | None:
    """Compute an integer, or an array of them, that depends on no input; None if it does."""
    if not jnp.issubdtype(program.spec(atom).dtype, jnp.integer):
        return None
    if isinstance(atom, Const):
        return None if compiled.traced(atom.value) else np.asarray(atom.value)
    part = prune(Program(program.inputs, program.ops, [atom], program.avals))
    read = {a for op in part.ops for a in op.inputs} | {atom}
    values = [a.value for a in read if isinstance(a, Const)]
    if read & set(program.inputs) or any(op.effects for op in part.ops):
        return None
    if compiled.traced(values):
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(execute(part, [0] * len(program.inputs))[0])
