"""The one file that reads jaxprs: write a traced function out as a `Program` that can be searched, cut and run.

Calls are inlined. Loops are read by the shapes of their arguments, since versions of JAX name these differently; a loop
that reads otherwise stays one operation. A jaxpr that reads otherwise raises `Unreadable`. Only public names of JAX are
used.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from fnn.gradients.operations import Atom, Const, Loop, Op, Program, Remat, reading, rebuilt

COLLECTIVES = {"psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter"}
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "linear_call": "callee"}
CALLS |= dict.fromkeys(
    ("closed_call", "eval_jaxpr", "core_call"), "call_jaxpr"
)  # the second is the first, from JAX 0.12 on
REMATS = {"checkpoint", "remat", "remat2"}


@dataclass(frozen=True)
class Reading:
    """How `read` goes about it."""

    open_up: bool
    keep: frozenset[str]
    forward: bool


def trace(function: Callable[..., Any], *args: Any, axes: Sequence[tuple[Any, int]] = ()) -> tuple[Any, Any]:
    """Trace `function(*args)` to a closed jaxpr, to be read by `read` or run by `call`; and the specs of its results.

    `axes` are the (name, size) of mapped axes over which the function may average.
    """
    return jax.make_jaxpr(function, return_shape=True, axis_env=axes)(*args)


def call(closed: Any, values: Sequence[Any]) -> list[Any]:
    """Run a traced function on flat arguments."""
    return list(jaxpr_as_fun(closed)(*values))


def read(closed: Any, open_up: bool = False, keep: frozenset[str] = frozenset(), forward: bool = False) -> Program:
    """Write a traced function out; with `open_up` also what has a derivative rule and a collective in it, without the rule.

    Jitted functions whose name is in `keep` stay one operation. With `forward` the program is to be differentiated: what
    `jax.checkpoint` marks stays marked, and what has a derivative rule stays one operation. Errors: Unreadable.
    """
    return _read(closed, Reading(open_up, keep, forward))


def _read(closed: Any, how: Reading) -> Program:
    jaxpr, program, env = _opened(closed), Program(), {}
    with reading("a traced function"):
        env.update(zip(jaxpr.constvars, map(Const, getattr(closed, "consts", ())), strict=True))
    for var in jaxpr.invars:
        env[var] = program.variable(var.aval)
        program.inputs.append(env[var])
    _inline(jaxpr, env, program, how)
    program.outputs = [_atom(env, var) for var in jaxpr.outvars]
    return program


def equations(part: Any, closed: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Go through all equations of a program, an operation or a jaxpr, those inside loops, branches and calls too: (name, params).

    Operations with the name `closed` are not looked into.
    """
    if isinstance(part, Program):
        for op in part.ops:
            yield from equations(op, closed)
    elif isinstance(part, Op):
        yield part.name, part.params
        for inner in [part.body] if isinstance(part, Loop) else _inner(part.params):
            yield from equations(inner, closed) if part.name != closed else ()
    else:
        for eqn in _opened(part).eqns:
            yield eqn.primitive.name, eqn.params
            for inner in _inner(eqn.params):
                yield from equations(inner, closed) if eqn.primitive.name != closed else ()


def dtypes(part: Any) -> set[Any]:
    """List the dtypes of all values of a program or a jaxpr, those inside loops, branches and calls too; of an operation those inside."""
    found: set[Any] = set()
    if isinstance(part, Program):
        inner: list[Any] = part.ops
        found.update(aval.dtype for aval in part.avals.values() if hasattr(aval, "dtype"))
    elif isinstance(part, Op):
        inner = [part.body] if isinstance(part, Loop | Remat) else _inner(part.params)
    else:
        eqns = _opened(part).eqns
        inner = [jaxpr for eqn in eqns for jaxpr in _inner(eqn.params)]
        found.update(var.aval.dtype for eqn in eqns for var in eqn.outvars if hasattr(var.aval, "dtype"))
    return found.union(*map(dtypes, inner))


def flops(part: Any, at: str = "", times: float = 1) -> Iterator[tuple[str, float]]:
    """Count what the products of a traced function cost, two for each multiply-add: (name stack, number) of each product.

    Those in a loop count once for each turn, in branches those of the branch that costs most; in a loop whose turns are
    not known they are NaN.
    """
    for eqn in _opened(part).eqns:
        name, where = eqn.primitive.name, _where(eqn, at)["where"]
        if name in ("dot_general", "conv_general_dilated"):
            yield where, times * _multiply_adds(eqn) * 2
        inner = [eqn.params[CALLS[name]]] if name in CALLS else _inner(eqn.params)
        turns = eqn.params["length"] if name == "scan" else np.nan if name == "while" else 1
        counts = [list(flops(jaxpr, where, times * turns)) for jaxpr in inner]
        for found in (
            [max(counts, key=lambda one: np.nan_to_num(sum(n for _, n in one), nan=np.inf))]
            if name == "cond"
            else counts
        ):
            yield from found


def _multiply_adds(eqn: Any) -> float:
    (left, right), (out,) = ([var.aval.shape for var in side] for side in (eqn.invars[:2], eqn.outvars))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return float(np.prod(out)) * float(np.prod([left[axis] for axis in contracted]))
    features = right[eqn.params["dimension_numbers"].rhs_spec[0]]
    return float(np.prod(out)) * float(np.prod(right)) / features


def _inline(jaxpr: Any, env: dict[Any, Atom], program: Program, how: Reading, at: str = "") -> None:
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [_atom(env, var) for var in eqn.invars]
        inner = eqn.params.get("jaxpr" if name in REMATS else CALLS.get(name, ""))
        again = name in REMATS and eqn.params.get("differentiated", True)
        if name in CALLS and eqn.params.get("name") in how.keep:
            inner = None
        elif inner is None and name.startswith("custom_") and not how.forward:
            # What JAX cannot map over, `linear_call`, is opened up too; its rule has been used by then.
            wanted = COLLECTIVES | {"linear_call"} if how.open_up else {"linear_call"}
            inner = next((i for i in _inner(eqn.params) if any(name in wanted for name, _ in equations(i))), None)
        if inner is None or (name in REMATS and how.forward and not again):
            outputs = [program.variable(var.aval) for var in eqn.outvars]
            env.update(zip(eqn.outvars, outputs, strict=True))
            special = _read_loop if name == "scan" else _read_remat if inner is not None else None
            op = special(eqn, inputs, outputs, how) if special else None
            program.append(replace(op or _op(jaxpr, eqn, inputs, outputs), **_where(eqn, at)))
            continue
        if again and np.any(eqn.params.get("prevent_cse", True)):
            # What JAX itself does there: without it the forward pass would be kept instead of computed anew.
            inputs = _barrier(program, inputs)
        opened, local = _opened(inner), {}
        with reading(f"the arguments of {name}"):
            local.update(zip(opened.constvars, map(Const, getattr(inner, "consts", ())), strict=True))
            local.update(zip(opened.invars, inputs, strict=True))
        _inline(opened, local, program, how, _where(eqn, at)["where"])
        with reading(f"the results of {name}"):
            env.update({var: _atom(local, out) for var, out in zip(eqn.outvars, opened.outvars, strict=True)})


def _read_remat(eqn: Any, inputs: list[Atom], outputs: list[int], how: Reading) -> Remat:
    body = _read(eqn.params["jaxpr"], how)
    op = Remat(eqn.primitive.name, {**eqn.params}, inputs, outputs, list, _effects(eqn), body=body)
    op.call = op.run
    return op


def _op(jaxpr: Any, eqn: Any, inputs: list[Atom], outputs: list[int]) -> Op:
    """Run one equation as JAX would run it, in its context."""
    free = [i for i, var in enumerate(eqn.invars) if not isinstance(var, Literal)]
    fresh = dict.fromkeys(eqn.invars[i] for i in free)  # an argument that comes twice is one variable
    first = [next(i for i in free if eqn.invars[i] is var) for var in fresh]
    params = {name: eqn.params[name] for name in eqn.params}

    def call(*values):
        return list(run(*(values[i] for i in first)))

    with reading(eqn.primitive.name):
        single = jaxpr.replace(constvars=[], invars=list(fresh), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
        run = jaxpr_as_fun(ClosedJaxpr(single, ()))
    return Op(eqn.primitive.name, params, inputs, outputs, call, _effects(eqn), bind=eqn.primitive.bind)


def _where(eqn: Any, around: str) -> dict[str, Any]:
    info = getattr(eqn, "source_info", None)
    stack = "/".join(filter(None, (around, str(getattr(info, "name_stack", "")))))
    return {"where": stack, "line": getattr(info, "traceback", None)}


def _effects(eqn: Any) -> bool:
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def _read_loop(eqn: Any, inputs: list[Atom], outputs: list[int], how: Reading) -> Loop | None:
    """Understand a scan by its shapes: what it maps over has one axis more outside than inside."""
    closed = eqn.params.get("jaxpr")
    if closed is None or not all(isinstance(eqn.params.get(n), int | bool) for n in ("length", "reverse", "unroll")):
        return warn(f"a scan with parameters {', '.join(eqn.params)}")
    jaxpr = _opened(closed)
    pairs = [list(zip(a, b, strict=True)) for a, b in ((eqn.invars, jaxpr.invars), (eqn.outvars, jaxpr.outvars))]
    mapped = [[_rank(outer) - _rank(inner) for outer, inner in side] for side in pairs]
    carries, sequences = mapped[1].count(0), mapped[0].count(1)
    consts = len(inputs) - carries - sequences
    wrong = (
        consts < 0
        or mapped[1] != [0] * carries + [1] * (len(outputs) - carries)
        or mapped[0] != [0] * (consts + carries) + [1] * sequences
        or any(
            (a.aval.shape, a.aval.dtype) != (b.aval.shape, b.aval.dtype)
            for a, b in zip(jaxpr.invars[consts : consts + carries], jaxpr.outvars[:carries], strict=True)
        )
    )
    if wrong:
        return warn("a scan with arguments in another order")
    template = Loop("scan", {**eqn.params}, inputs, outputs, list, _effects(eqn))
    return rebuilt(template, _read(closed, how), inputs, outputs, consts, carries)


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _atom(env: dict[Any, Atom], var: Any) -> Atom:
    if not isinstance(var, Literal):
        with reading("a variable"):
            return env[var]
    aval: Any = var.aval
    return Const(np.asarray(var.val, aval.dtype))


def _rank(var: Any) -> int:
    return len(getattr(var.aval, "shape", ()))


def _barrier(program: Program, inputs: list[Atom]) -> list[Atom]:
    free = [a for a in inputs if not isinstance(a, Const)]
    outputs = [program.variable(program.avals[a]) for a in free]
    program.append(Op("barrier", {}, list(free), outputs, lambda *values: list(jax.lax.optimization_barrier(values))))
    new = iter(outputs)
    return [a if isinstance(a, Const) else next(new) for a in inputs]


def _inner(params: dict[str, Any]) -> list[Any]:
    """List the jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        parts = value if isinstance(value, tuple | list) else [value]
        found += [opened for part in parts if hasattr(opened := _opened(part), "eqns")]
    return found


@functools.cache
def warn(reason: str) -> None:
    """Say, once for each reason, that gradients are stored in full."""
    warnings.warn(
        f"per_example: JAX writes a gradient's program in a way that fnn does not know ({reason}), so that gradients are "
        "stored in full: right, but as slow and large as vmap(grad)",
        stacklevel=2,
    )
