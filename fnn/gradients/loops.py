"""What loops, branches and `shard_map` do to arrays with exponents: they run their own programs, once for all turns.

A loop's carries keep one form over all turns: which of them have exponents, and how many leading axes have exponents of
their own, is found first. What a loop stacks gets one exponent for each turn.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fnn import mapped
from fnn.gradients.execution import Rule, Run
from fnn.gradients.operations import Const, Loop, Op, Program
from fnn.gradients.powers import Scaled, is_float, merged, normal, rows, scaled, shift, tidy
from fnn.gradients.program import read

APART = {"pad", "dynamic_update_slice", "scatter-add", "scatter_add", "concatenate", "stack", "scan", "cond", "while"}
"""What gives the entries of an array's first axis exponents of their own."""


def scan(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Carry exponents along; sequences have one for each turn."""
    if not isinstance(op, Loop):
        return run.undone(op, inputs)
    consts = [normal(merged(x)) if isinstance(x, Scaled) else x for x in inputs[: op.consts]]
    carry, xs = inputs[op.consts : op.consts + op.carries], inputs[op.consts + op.carries :]
    xs = tuple(tidy(rows(x, max(1, x.exponent.ndim))) if isinstance(x, Scaled) else x for x in xs)
    moved = _reached(op, [isinstance(x, Scaled) for x in (*consts, *carry, *xs)])
    length = op["length"]

    def settled(values, axes):
        """One form for all turns: so many leading axes with exponents of their own."""
        pairs = zip(values, moved, axes, strict=True)
        return tuple(tidy(rows(x, k)) if m else x for x, m, k in pairs)

    def body(carry, xs, axes):
        outputs = run.execute(op.body, [*consts, *carry, *xs], op.where)
        ys = tuple(tidy(x) if isinstance(x, Scaled) else x for x in outputs[op.carries :])
        return settled(outputs[: op.carries], axes), ys

    def seen(axes):
        """How many leading axes have exponents after one turn more."""

        def turn(carry, xs):
            return run.execute(op.body, [*consts, *carry, *xs], op.where)[: op.carries]

        first = jax.tree.map(lambda a: a[0], xs)
        outputs = jax.eval_shape(run.apart(turn), settled(carry, axes), first)[0] if length else carry
        return [max(k, x.exponent.ndim) if isinstance(x, Scaled) else k for x, k in zip(outputs, axes, strict=True)]

    axes = [x.exponent.ndim if isinstance(x, Scaled) else 0 for x in carry]
    while any(moved) and any(inner.name in APART for inner in op.body.ops) and (more := seen(axes)) != axes:
        axes = more

    def turn(carry, xs):
        (carry, ys), found = run.apart(lambda: body(carry, xs, axes))()
        return carry, (ys, found)

    options = {name: op.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, found) = jax.lax.scan(turn, settled(carry, axes), xs, **options)
    run.add(found, turns=True)
    return [*carry, *ys]


def branches(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """cond and switch: all branches return exponents."""
    programs = [read(branch) for branch in op["branches"]]

    def branch(program):
        def call(*values):
            outputs = run.execute(program, values, op.where)
            return [normal(merged(scaled(x))) if is_float(x) else x for x in outputs]

        return run.apart(call)

    calls = [branch(program) for program in programs]
    specs = [jax.eval_shape(call, *inputs[1:])[1] for call in calls]
    missing = {name: spec for found in specs for name, spec in found.items()}

    def full(call):
        def complete(*values):
            outputs, found = call(*values)
            return outputs, {name: found[name] if name in found else jnp.zeros((), bool) for name in missing}

        return complete

    outputs, found = jax.lax.switch(inputs[0], [full(call) for call in calls], *inputs[1:])
    run.add(found)
    return outputs


def while_loop(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Every carry that the seed reaches has one exponent."""
    a, b = op["cond_nconsts"], op["body_nconsts"]
    test, turn = read(op["cond_jaxpr"]), read(op["body_jaxpr"])
    of_test, of_turn, carry = inputs[:a], inputs[a : a + b], inputs[a + b :]
    loop = Loop("while", {}, [], [], list, body=turn, consts=b, carries=len(carry))
    reached = _reached(loop, [isinstance(x, Scaled) for x in (*of_turn, *carry)])

    def settled(values):
        return [normal(merged(scaled(x))) if r else x for x, r in zip(values, reached, strict=True)]

    body = run.apart(lambda carry: settled(run.execute(turn, [*of_turn, *carry], op.where)))
    start = settled(carry)
    lost = {name: jnp.zeros((), bool) for name in jax.eval_shape(body, start)[1]}

    def next_turn(state):
        carry, lost = state
        carry, found = body(carry)
        return carry, {name: lost[name] | found[name] for name in lost}

    def go_on(state):
        return run.apart(lambda: run.execute(test, [*of_test, *state[0]], op.where)[0])()[0]

    carry, found = jax.lax.while_loop(go_on, next_turn, (start, lost))
    run.add(found)
    return carry


def sharded(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """`shard_map`: what leaves it has the same exponent on all devices."""
    params = op.params
    if not {"mesh", "in_specs", "out_specs", "check_vma", "jaxpr"} <= set(params):
        return run.undone(op, inputs)
    axes = tuple(params.get("newly_manual_axes", params.get("manual_axes", params["mesh"].axis_names)))
    program, alone = read(params["jaxpr"]), jax.sharding.PartitionSpec()

    def whole(spec):
        """How many leading axes lie whole on every device, so that exponents may keep them."""
        return next((i for i, name in enumerate(spec) if name is not None), 99)

    inputs = [
        tidy(merged(x, whole(s))) if isinstance(x, Scaled) else x
        for x, s in zip(inputs, params["in_specs"], strict=True)
    ]
    given = [isinstance(x, Scaled) for x in inputs]
    moved = [m and _float_spec(program, a) for m, a in zip(_moved(program, given), program.outputs, strict=True)]

    def everywhere(x):
        return mapped.reduce(jax.lax.pmax, mapped.varying(x, axes), axes)

    def shared(x, spec):
        x = tidy(merged(scaled(x), whole(spec)))
        top = everywhere(x.exponent)
        return shift(x.value, x.exponent - top), top

    def body(*values):
        parts = [Scaled(v[0], v[1]) if g else v for v, g in zip(values, given, strict=True)]
        outputs, found = run.apart(lambda: run.execute(program, parts, op.where))()
        outputs = [shared(x, s) if m else x for x, m, s in zip(outputs, moved, params["out_specs"], strict=True)]
        return outputs, {name: everywhere(flag.astype(jnp.int32)) for name, flag in found.items()}

    outputs, found = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple((s, alone) if g else s for s, g in zip(params["in_specs"], given, strict=True)),
        out_specs=([(s, alone) if m else s for s, m in zip(params["out_specs"], moved, strict=True)], alone),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(*((x.value, x.exponent) if isinstance(x, Scaled) else x for x in inputs))
    run.add({name: flag > 0 for name, flag in found.items()})
    return [Scaled(out[0], out[1]) if m else out for out, m in zip(outputs, moved, strict=True)]


def _reached(op: Loop, given: Sequence[bool]) -> list[bool]:
    """Which carries of a loop depend on its `Scaled` inputs, after any number of turns."""
    first, last = op.consts, op.consts + op.carries
    while True:
        moved = _moved(op.body, given)
        carried = [
            old or (new and _float_spec(op.body, atom))
            for old, new, atom in zip(given[first:last], moved, op.body.inputs[first:last], strict=False)
        ]
        if carried == list(given[first:last]):
            return carried
        given = [*given[:first], *carried, *given[last:]]


def _float_spec(program: Program, atom: Any) -> bool:
    return jnp.issubdtype(program.spec(atom).dtype, jnp.inexact)


def _moved(program: Program, given: Sequence[bool]) -> list[bool]:
    """Which outputs of a program depend on the inputs that are given as moving."""
    moved = {atom for atom, g in zip(program.inputs, given, strict=True) if g}
    for op in program.ops:
        if any(not isinstance(atom, Const) and atom in moved for atom in op.inputs):
            moved.update(op.outputs)
    return [not isinstance(atom, Const) and atom in moved for atom in program.outputs]


LOOPS: dict[str, Rule] = {"cond": branches, "scan": scan, "shard_map": sharded, "while": while_loop}
