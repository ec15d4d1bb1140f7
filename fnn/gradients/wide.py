"""Run a traced function in a wider float type than it was traced in: the same net, the same draws, a larger range.

Float64 spreads: an operation with one operand in float64 runs in float64, with the others cast up; the rest runs as it was
traced. So a program whose arguments are float64 runs in float64 altogether, even where it asks for float32 itself, while
what it draws from random keys stays the same. With the seed of a backward pass alone in float64, only that pass is.
Float32 takes the place of all that is narrower: bfloat16, float16.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.gradients.operations import Const, Loop, Op, Program, Remat, Unreadable
from fnn.gradients.program import dtypes, read, trace

Special = Mapping[str, Callable[..., Any]]
"""Functions that run in the place of jitted ones of this name."""
DTYPES = ("new_dtype", "preferred_element_type", "dtype", "out_dtype")
"""Parameters that name the float type of a result."""
PLAIN = {"precision": None, "accuracy": None}
"""Parameters that are about one float type alone."""
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


@dataclass(frozen=True)
class Wider:
    """What takes the place of which floats."""

    dtype: Any = jnp.float64
    special: Special = field(default_factory=dict)

    @property
    def every(self) -> bool:
        """Whether it takes the place of all narrower floats, not of those alone that meet one of it."""
        return self.dtype == jnp.float32

    def up(self, x: Any) -> Any:
        """Cast a narrower float."""
        kind = jnp.result_type(x)
        if jnp.issubdtype(kind, jnp.floating):
            return jnp.asarray(x, self.dtype) if self.narrower(kind) else x
        wide = jnp.issubdtype(kind, jnp.complexfloating) and self.dtype == jnp.float64
        return jnp.asarray(x, jnp.complex128) if wide else x

    def narrower(self, dtype: Any) -> bool:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < jnp.dtype(self.dtype).itemsize

    def is_wide(self, x: Any) -> bool:
        kinds = (self.dtype, jnp.complex128) if self.dtype == jnp.float64 else (self.dtype,)
        return jnp.result_type(x) in kinds

    def changes(self, program: Program, op: Op, inputs: Sequence[Any]) -> bool:
        """Whether an operation is not to run as it was traced."""
        if not self.every:
            return any(map(self.is_wide, inputs))
        own = {program.spec(atom).dtype for atom in (*op.inputs, *op.outputs)}
        return any(map(self.narrower, own | dtypes(op)))


FLOAT32 = Wider(jnp.float32)


def spread(program: Program, values: Sequence[Any], special: Special | None = None) -> list[Any]:
    """Run a program; where float64 comes in, float64 goes on. For `jax.enable_x64` alone. Errors: Unreadable.

    `special` are functions for the jitted ones of these names, which `read` has kept as one operation.
    """
    return _spread(program, values, Wider(special=special or {}))


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function computed in float32 wherever it computes in bfloat16 or float16, with the same rules of its own.

    It takes the same arguments, returns float32 for narrower results, and works under `jit`, `grad` and `vmap`. Arguments
    of less are cast up; float32 and float64 stay as they are. Errors: Unreadable.
    """

    def new(*args):
        leaves, structure = jax.tree.flatten(args)
        closed, shape = trace(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)), *leaves)
        outputs = _spread(read(closed, forward=True), leaves, FLOAT32)
        return jax.tree.unflatten(jax.tree.structure(shape), map(FLOAT32.up, outputs))

    return new


def narrowest(function: Callable[..., Any], *args: Any) -> str:
    """Name the float type of less than 32 bits in which a function computes; "" for none, or where it cannot be read."""
    closed, _ = trace(function, *args)
    try:
        found = [dtype for dtype in dtypes(read(closed)) if FLOAT32.narrower(dtype)]
    except Unreadable:
        return ""
    return str(min(found, key=lambda dtype: float(jnp.finfo(dtype).max))) if found else ""


def _spread(program: Program, values: Sequence[Any], how: Wider) -> list[Any]:
    known = dict(zip(program.inputs, map(how.up, values) if how.every else values, strict=True))

    def value(atom):
        return atom.value if isinstance(atom, Const) else known[atom]

    for op in program.ops:
        inputs = [value(atom) for atom in op.inputs]
        known.update(zip(op.outputs, _run(program, op, inputs, how), strict=True))
    return [value(atom) for atom in program.outputs]


def up(x: Any) -> Any:
    """Cast floats to float64, complex numbers to complex128."""
    return Wider().up(x)


def holds(x: jax.Array) -> jax.Array:
    """Whether the device that computed x[] has float64's range, which some platforms lack: bool[]."""
    return 1e-200 * (jnp.where(jnp.isfinite(x), jnp.sign(x), 0).astype(jnp.float64) + 2) > 0


def _run(program: Program, op: Op, inputs: list[Any], how: Wider) -> Sequence[Any]:
    if op.name in ("jit", "pjit") and op.params.get("name") in how.special:
        outputs = jax.tree.leaves(how.special[op.params["name"]](*inputs)) if op.outputs else []
        if len(outputs) != len(op.outputs):
            raise Unreadable(f"{op.params['name']} with some of its results")
        return outputs
    if isinstance(op, Loop):
        return _scanned(op, inputs, how)
    if not how.changes(program, op, inputs):
        return op.call(*inputs)
    if isinstance(op, Remat):
        options = {name: op.params[name] for name in ("policy", "prevent_cse") if name in op.params}
        return jax.checkpoint(lambda *values: _spread(op.body, values, how), **options)(*inputs)
    if op.name == "cond":
        branches = [read(branch) for branch in op["branches"]]
        operands = [how.up(x) for x in inputs[1:]]
        return jax.lax.switch(inputs[0], [_branch(branch, how) for branch in branches], *operands)
    if op.name == "while":
        return _repeated(op, inputs, how)
    if op.name.startswith("custom_") or op.name == "composite":
        inner = next((op.params[name] for name in ("call_jaxpr", "fun_jaxpr", "jaxpr") if name in op.params), None)
        if not (hasattr(inner, "jaxpr") or hasattr(inner, "eqns")):
            raise Unreadable(f"{op.name} in {jnp.dtype(how.dtype)}")
        own = RULES.get(op.name) if how.every else None
        return own(program, op, inputs, how) if own else _spread(_split(read(inner)), inputs, how)
    return _bound(program, op, inputs, how)


def _by_jvp(program: Program, op: Op, inputs: list[Any], how: Wider) -> Sequence[Any]:
    """Run what has a rule for its tangents, with that rule: read off as it was traced, and run as the function itself is."""
    specs, floats = _differentiable(program, op)

    def both(primals, tangents):
        def of_floats(*values):
            return op.call(*_put(primals, floats, values))

        return jax.jvp(of_floats, [primals[i] for i in floats], tangents)

    rule = read(
        trace(
            lambda *leaves: both(leaves[: len(specs)], list(leaves[len(specs) :])), *specs, *[specs[i] for i in floats]
        )[0]
    )
    function = jax.custom_jvp(lambda *values: _opened(op, values, how))

    @function.defjvp
    def pushed(primals, tangents):
        found = [*map(how.up, _spread(rule, [*primals, *(tangents[i] for i in floats)], how))]
        return found[: len(op.outputs)], found[len(op.outputs) :]

    return function(*map(how.up, inputs))


def _by_vjp(program: Program, op: Op, inputs: list[Any], how: Wider) -> Sequence[Any]:
    """Run what has a rule for its cotangents, with that rule."""
    specs, floats = _differentiable(program, op)

    def pulled(primals, cotangents):
        def of_floats(*values):
            return op.call(*_put(primals, floats, values))

        return jax.vjp(of_floats, *(primals[i] for i in floats))[1](cotangents)

    outs = [program.spec(v) for v in op.outputs]
    rule = read(trace(lambda *leaves: pulled(leaves[: len(specs)], list(leaves[len(specs) :])), *specs, *outs)[0])
    function = jax.custom_vjp(lambda *values: _opened(op, values, how))

    def back(primals, cotangents):
        found = map(how.up, _spread(rule, [*primals, *cotangents], how))
        return tuple(_put([None] * len(specs), floats, found))

    function.defvjp(lambda *values: (_opened(op, values, how), values), back)
    return function(*map(how.up, inputs))


RULES = {"custom_jvp_call": _by_jvp, "custom_vjp_call": _by_vjp}
"""What has a derivative rule of its own. The rule was written for the narrow type, and is traced with it."""


def _differentiable(program: Program, op: Op) -> tuple[list[Any], list[int]]:
    specs = [program.spec(atom) for atom in op.inputs]
    if not all(_float(program.spec(v).dtype) for v in op.outputs):
        raise Unreadable(f"{op.name} with results that are no floats")
    return specs, [i for i, spec in enumerate(specs) if _float(spec.dtype)]


def _put(values: Sequence[Any], places: Sequence[int], new: Any) -> list[Any]:
    """Put new values in some places."""
    found = list(values)
    for i, value in zip(places, new, strict=True):
        found[i] = value
    return found


def _opened(op: Op, values: Sequence[Any], how: Wider) -> list[Any]:
    inner = next(op.params[name] for name in ("call_jaxpr", "fun_jaxpr", "jaxpr") if name in op.params)
    return [*map(how.up, _spread(read(inner, forward=True), values, how))]


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


def _branch(program: Program, how: Wider) -> Callable[..., Any]:
    return lambda *values: tuple(map(how.up, _spread(program, values, how)))


def _bound(program: Program, op: Op, inputs: list[Any], how: Wider) -> Sequence[Any]:
    if op.name in ("barrier", "optimization_barrier", "leading_bits"):
        return op.call(*inputs)
    same = all(jnp.result_type(x) == program.spec(a).dtype for x, a in zip(inputs, op.inputs, strict=True))
    if op.name == "bitcast_convert_type" and same:  # random bits that become a number
        return [how.up(x) for x in op.call(*inputs)]
    if op.name == "bitcast_convert_type" or op.bind is None:
        raise Unreadable(f"{op.name} in {jnp.dtype(how.dtype)}")
    if op.name == "reduce_precision":
        return inputs
    params: dict[str, Any] = {name: PLAIN.get(name, value) for name, value in op.params.items()}
    for name in DTYPES:
        if params.get(name) is not None and _float(params[name]):
            params[name] = np.dtype(how.up(np.zeros((), params[name])).dtype)
    inputs = [how.up(x) for x in inputs]
    if op.name in SCATTERS:
        names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
        return [SCATTERS[op.name](*inputs, **{name: op[name] for name in names})]
    if any(hasattr(p, "jaxpr") or hasattr(p, "eqns") for p in params.values()):
        raise Unreadable(f"{op.name} in {jnp.dtype(how.dtype)}")
    outputs = op.bind(*inputs, **params)
    return outputs if isinstance(outputs, list | tuple) else [outputs]


def _float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _scanned(op: Loop, inputs: list[Any], how: Wider) -> Sequence[Any]:
    first, last = op.consts, op.consts + op.carries
    inputs = [how.up(x) for x in inputs] if how.every else inputs
    consts, carry, xs = inputs[:first], inputs[first:last], inputs[last:]

    def turn(carry, xs):
        outputs = _spread(op.body, [*consts, *carry, *xs], how)
        return outputs[: op.carries], outputs[op.carries :]

    one = [jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)) for x in xs]
    while True:  # a carry that is wide after a turn is wide from the start
        after = jax.eval_shape(turn, carry, one)[0]
        wider = [how.up(x) if how.is_wide(y) else x for x, y in zip(carry, after, strict=True)]
        if all(how.is_wide(a) == how.is_wide(b) for a, b in zip(wider, carry, strict=True)):
            break
        carry = wider

    def settled(carry, xs):
        after, ys = turn(carry, xs)
        return [how.up(x) if how.is_wide(y) else x for x, y in zip(after, carry, strict=True)], ys

    options = {name: op.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(settled, list(carry), list(xs), **options)
    return [*carry, *ys]


def _repeated(op: Op, inputs: list[Any], how: Wider) -> Sequence[Any]:
    a, b = op["cond_nconsts"], op["body_nconsts"]
    test, body = read(op["cond_jaxpr"]), read(op["body_jaxpr"])
    of_test, of_body, carry = inputs[:a], inputs[a : a + b], [how.up(x) for x in inputs[a + b :]]
    return jax.lax.while_loop(
        lambda carry: _spread(test, [*of_test, *carry], how)[0],
        lambda carry: [how.up(x) for x in _spread(body, [*of_body, *carry], how)],
        carry,
    )
