"""Run a traced function in float64, as it was traced in float32: the same net, the same draws, a larger range.

Float64 spreads: an operation with one operand in float64 runs in float64, with the others cast up; the rest runs as it was
traced. So a program whose arguments are float64 runs in float64 altogether, even where it asks for float32 itself, while
what it draws from random keys stays the same. With the seed of a backward pass alone in float64, only that pass is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.gradients.operations import Const, Loop, Op, Program, Unreadable
from fnn.gradients.program import read

Special = Mapping[str, Callable[..., Any]]
"""Functions that run in the place of jitted ones of this name."""
DTYPES = ("new_dtype", "preferred_element_type", "dtype", "out_dtype")
"""Parameters that name the float type of a result."""
PLAIN = {"precision": None, "accuracy": None}
"""Parameters that are about float32 alone."""
SCATTERS = {
    "scatter-add": jax.lax.scatter_add,
    "scatter_add": jax.lax.scatter_add,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter_mul": jax.lax.scatter_mul,
    "scatter-min": jax.lax.scatter_min,
    "scatter_min": jax.lax.scatter_min,
    "scatter-max": jax.lax.scatter_max,
    "scatter_max": jax.lax.scatter_max,
    "scatter": jax.lax.scatter,
}


def spread(program: Program, values: Sequence[Any], special: Special | None = None) -> list[Any]:
    """Run a program; where float64 comes in, float64 goes on. For `jax.enable_x64` alone. Errors: Unreadable.

    `special` are functions for the jitted ones of these names, which `read` has kept as one operation.
    """
    known = dict(zip(program.inputs, values, strict=True))

    def value(atom):
        return atom.value if isinstance(atom, Const) else known[atom]

    for op in program.ops:
        outputs = _run(op, [value(atom) for atom in op.inputs], special or {})
        known.update(zip(op.outputs, outputs, strict=True))
    return [value(atom) for atom in program.outputs]


def up(x: Any) -> Any:
    """Cast floats to float64, complex numbers to complex128."""
    kind = jnp.result_type(x)
    if jnp.issubdtype(kind, jnp.floating):
        return jnp.asarray(x, jnp.float64)
    return jnp.asarray(x, jnp.complex128) if jnp.issubdtype(kind, jnp.complexfloating) else x


def holds(x: jax.Array) -> jax.Array:
    """Whether the device that computed x[] has float64's range, which some platforms lack: bool[]."""
    return 1e-200 * (jnp.where(jnp.isfinite(x), jnp.sign(x), 0).astype(jnp.float64) + 2) > 0


def _is_wide(x: Any) -> bool:
    return jnp.result_type(x) in (jnp.float64, jnp.complex128)


def _run(op: Op, inputs: list[Any], special: Special) -> Sequence[Any]:
    if op.name in ("jit", "pjit") and op.params.get("name") in special:
        outputs = jax.tree.leaves(special[op.params["name"]](*inputs)) if op.outputs else []
        if len(outputs) != len(op.outputs):
            raise Unreadable(f"{op.params['name']} with some of its results")
        return outputs
    if isinstance(op, Loop):
        return _scanned(op, inputs, special)
    if not any(map(_is_wide, inputs)):
        return op.call(*inputs)
    if op.name == "cond":
        branches = [read(branch) for branch in op["branches"]]
        operands = [up(x) for x in inputs[1:]]
        return jax.lax.switch(inputs[0], [_branch(branch, special) for branch in branches], *operands)
    if op.name == "while":
        return _repeated(op, inputs, special)
    if op.name.startswith("custom_") or op.name == "composite":
        inner = next((op.params[name] for name in ("call_jaxpr", "fun_jaxpr", "jaxpr") if name in op.params), None)
        if not (hasattr(inner, "jaxpr") or hasattr(inner, "eqns")):
            raise Unreadable(f"{op.name} in float64")
        return spread(_split(read(inner)), inputs, special)
    return _bound(op, inputs)


def _split(program: Program) -> Program:
    """Let a rule of JAX's own take the leading bits of a number: those of float32, as it was written for.

    It computes exp(-x²) from the parts of x = high + low, which may be cut anywhere.
    """

    def cut(op):
        if op.name != "bitcast_convert_type" or not _float(program.spec(op.inputs[0]).dtype):
            return op
        narrow, call = program.spec(op.inputs[0]).dtype, op.call
        return replace(op, name="leading_bits", call=lambda x: call(x.astype(narrow)))

    ops = [cut(op) for op in program.ops]
    return replace(program, ops=ops)


def _branch(program: Program, special: Special) -> Callable[..., Any]:
    return lambda *values: tuple(map(up, spread(program, values, special)))


def _bound(op: Op, inputs: list[Any]) -> Sequence[Any]:
    if op.name in ("barrier", "optimization_barrier", "leading_bits"):
        return op.call(*inputs)
    if op.name == "bitcast_convert_type" or op.bind is None:
        raise Unreadable(f"{op.name} in float64")
    if op.name == "reduce_precision":
        return inputs
    params: dict[str, Any] = {name: PLAIN.get(name, value) for name, value in op.params.items()}
    for name in DTYPES:
        if params.get(name) is not None and _float(params[name]):
            wide = jnp.complex128 if jnp.issubdtype(params[name], jnp.complexfloating) else jnp.float64
            params[name] = np.dtype(wide)
    inputs = [up(x) for x in inputs]
    if op.name in SCATTERS:
        names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
        return [SCATTERS[op.name](*inputs, **{name: op[name] for name in names})]
    if any(hasattr(p, "jaxpr") or hasattr(p, "eqns") for p in params.values()):
        raise Unreadable(f"{op.name} in float64")
    outputs = op.bind(*inputs, **params)
    return outputs if isinstance(outputs, list | tuple) else [outputs]


def _float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _scanned(op: Loop, inputs: list[Any], special: Special) -> Sequence[Any]:
    first, last = op.consts, op.consts + op.carries
    consts, carry, xs = inputs[:first], inputs[first:last], inputs[last:]

    def turn(carry, xs):
        outputs = spread(op.body, [*consts, *carry, *xs], special)
        return outputs[: op.carries], outputs[op.carries :]

    one = [jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)) for x in xs]
    while True:  # a carry that is wide after a turn is wide from the start
        after = jax.eval_shape(turn, carry, one)[0]
        wider = [up(x) if _is_wide(y) else x for x, y in zip(carry, after, strict=True)]
        if all(_is_wide(a) == _is_wide(b) for a, b in zip(wider, carry, strict=True)):
            break
        carry = wider

    def settled(carry, xs):
        after, ys = turn(carry, xs)
        return [up(x) if _is_wide(y) else x for x, y in zip(after, carry, strict=True)], ys

    options = {name: op.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(settled, list(carry), list(xs), **options)
    return [*carry, *ys]


def _repeated(op: Op, inputs: list[Any], special: Special) -> Sequence[Any]:
    a, b = op["cond_nconsts"], op["body_nconsts"]
    test, body = read(op["cond_jaxpr"]), read(op["body_jaxpr"])
    of_test, of_body, carry = inputs[:a], inputs[a : a + b], [up(x) for x in inputs[a + b :]]
    return jax.lax.while_loop(
        lambda carry: spread(test, [*of_test, *carry], special)[0],
        lambda carry: [up(x) for x in spread(body, [*of_body, *carry], special)],
        carry,
    )
