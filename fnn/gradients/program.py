"""The one file that reads jaxprs: write a traced function out as a `Program` that can be searched, cut and run.

Calls are inlined. Loops are read by the shapes of their arguments, since versions of JAX name these differently; a loop
that reads otherwise stays one operation. A jaxpr that reads otherwise raises `Unreadable`. Only public names of JAX are
used.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

COLLECTIVES = {"psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter"}
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",  # what `closed_call` is from JAX 0.12 on
    "core_call": "call_jaxpr",
    "linear_call": "callee",
}
REMATS = {"checkpoint", "remat", "remat2"}
_numbers = itertools.count()


class Unreadable(Exception):
    """A jaxpr is written in another way than this file knows."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn the error of a part that is missing or has another form into `Unreadable`. For parts of jaxprs alone."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"{what}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, eq=False)
class Const:
    """A value that is known where the program is written: a literal, or an array (a tracer) that a loss closes over."""

    value: Any


Atom = int | Const


@dataclass(eq=False)
class Op:
    """One equation: `call(*values) -> list of values`."""

    name: str
    params: dict[str, Any]
    inputs: list[Atom]
    outputs: list[int]
    call: Callable[..., Sequence[Any]]
    effects: bool = False
    """It must run even if nobody reads its results."""
    where: str = ""
    """The names of the modules and functions around it, as JAX knows them (`jax.named_scope`; Linen and Haiku set it)."""

    def __getitem__(self, name: str) -> Any:
        """Look up a parameter. Errors: Unreadable if there is none of this name."""
        with reading(self.name):
            return self.params[name]


@dataclass(eq=False)
class Loop(Op):
    """A scan; its inputs are constants, carries and sequences, its outputs carries and sequences, in this order."""

    body: "Program" = None  # type: ignore[assignment]
    consts: int = 0
    carries: int = 0

    def run(self, *values: Any, hooks: "Hooks | None" = None) -> Any:
        """Scan over the body; with hooks return (outputs, what the hooks found, stacked over the turns)."""
        consts, carry = values[: self.consts], values[self.consts : self.consts + self.carries]

        def body(carry, xs):
            found: dict[str, Any] = {}
            outs = execute(self.body, [*consts, *carry, *xs], hooks, found)
            return tuple(outs[: self.carries]), (tuple(outs[self.carries :]), found)

        xs = values[self.consts + self.carries :]
        options = {name: self.params[name] for name in ("length", "reverse", "unroll")}
        carry, (ys, found) = jax.lax.scan(body, tuple(carry), tuple(xs), **options)
        return [*carry, *ys] if hooks is None else ([*carry, *ys], found)


@dataclass(eq=False)
class Remat(Op):
    """What `jax.checkpoint` marks: computed anew in the backward pass of whatever runs this program."""

    body: "Program" = None  # type: ignore[assignment]

    def run(self, *values: Any, hooks: "Hooks | None" = None) -> Any:
        """Run the body; with hooks return (outputs, what the hooks found)."""

        def body(*values):
            found: dict[str, Any] = {}
            return execute(self.body, values, hooks, found), found

        options = {name: self.params[name] for name in ("policy", "prevent_cse") if name in self.params}
        outs, found = jax.checkpoint(body, **options)(*values)
        return outs if hooks is None else (outs, found)


Hook = Callable[[Any], tuple[Any, dict[str, Any]]]
"""Sees a value where it is made; returns what goes on in its place, and named numbers."""
Hooks = dict[int, Hook]


@dataclass(eq=False)
class Program:
    """A jaxpr written out: `inputs`, then `ops` in order, then `outputs`."""

    inputs: list[int] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    outputs: list[Atom] = field(default_factory=list)
    avals: dict[int, Any] = field(default_factory=dict)
    makers: dict[int, tuple[Op, int]] = field(default_factory=dict)

    def variable(self, aval: Any) -> int:
        number = next(_numbers)
        self.avals[number] = aval
        return number

    def append(self, op: Op) -> None:
        self.ops.append(op)
        self.makers.update({output: (op, i) for i, output in enumerate(op.outputs)})

    def compute(self, function: Callable[..., Any], *inputs: Atom, like: Callable[..., Any] | None = None) -> int:
        """Append a function of some atoms, with one result; its shape is that of `like`, where a mapped axis is needed."""
        output = self.variable(jax.eval_shape(like or function, *map(self.spec, inputs)))
        self.append(Op("function", {}, list(inputs), [output], lambda *values: [function(*values)]))
        return output

    def spec(self, atom: Atom) -> Any:
        aval: Any = atom.value if isinstance(atom, Const) else self.avals[atom]
        return jax.ShapeDtypeStruct(jnp.shape(aval), aval.dtype)


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


def equations(part: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Go through all equations of a program, an operation or a jaxpr, those inside loops, branches and calls too: (name, params)."""
    if isinstance(part, Program):
        for op in part.ops:
            yield from equations(op)
    elif isinstance(part, Op):
        yield part.name, part.params
        for inner in [part.body] if isinstance(part, Loop) else _inner(part.params):
            yield from equations(inner)
    else:
        for eqn in _opened(part).eqns:
            yield eqn.primitive.name, eqn.params
            for inner in _inner(eqn.params):
                yield from equations(inner)


def execute(
    program: Program, values: Sequence[Any], hooks: Hooks | None = None, found: dict[str, Any] | None = None
) -> list[Any]:
    """Run a program; under `vmap`, `jit` and `grad` like any function.

    `hooks` are called with the values of the variables that are their keys, inside loops too; what they return goes into
    `found`, stacked over the turns of the loops around.
    """
    known = dict(zip(program.inputs, values, strict=True))

    def value(atom):
        return atom.value if isinstance(atom, Const) else known[atom]

    def hooked(variables):
        for variable in variables if hooks else ():
            if variable in hooks:
                known[variable], numbers = hooks[variable](known[variable])
                found.update(numbers)

    hooked(program.inputs)
    for op in program.ops:
        inputs = map(value, op.inputs)
        if hooks and isinstance(op, Loop | Remat):
            outputs, numbers = op.run(*inputs, hooks=hooks)
            found.update(numbers)
        else:
            outputs = op.call(*inputs)
        known.update(zip(op.outputs, outputs, strict=True))
        hooked(op.outputs)
    return [value(atom) for atom in program.outputs]


def prune(program: Program, keep: Set[int] = frozenset()) -> Program:
    """Drop what neither an output needs nor a variable of `keep`, inside loops too."""
    live = {atom for atom in program.outputs if not isinstance(atom, Const)} | keep
    kept = Program(program.inputs, [], program.outputs, program.avals)
    ops = []
    for op in reversed(program.ops):
        wanted = [output in live for output in op.outputs]
        if not (op.effects or any(wanted) or (keep and holds(op, keep))):
            continue
        if isinstance(op, Loop) and not op.effects:
            op = _pruned_loop(op, wanted, keep)
        live.update(atom for atom in op.inputs if not isinstance(atom, Const))
        ops.append(op)
    for op in reversed(ops):
        kept.append(op)
    return kept


def holds(op: Op, variables: Set[int]) -> bool:
    """Whether an operation makes one of some variables, or what runs inside it does."""
    if not variables.isdisjoint(op.outputs):
        return True
    if not isinstance(op, Loop | Remat):
        return False
    return not variables.isdisjoint(op.body.inputs) or any(holds(inner, variables) for inner in op.body.ops)


def _inline(jaxpr: Any, env: dict[Any, Atom], program: Program, how: Reading) -> None:
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
            program.append(op or _op(jaxpr, eqn, inputs, outputs))
            continue
        if again and np.any(eqn.params.get("prevent_cse", True)):
            # What JAX itself does there: without it the forward pass would be kept instead of computed anew.
            inputs = _barrier(program, inputs)
        opened, local = _opened(inner), {}
        with reading(f"the arguments of {name}"):
            local.update(zip(opened.constvars, map(Const, getattr(inner, "consts", ())), strict=True))
            local.update(zip(opened.invars, inputs, strict=True))
        _inline(opened, local, program, how)
        with reading(f"the results of {name}"):
            env.update({var: _atom(local, out) for var, out in zip(eqn.outvars, opened.outvars, strict=True)})


def _read_remat(eqn: Any, inputs: list[Atom], outputs: list[int], how: Reading) -> Remat:
    body = _read(eqn.params["jaxpr"], how)
    op = Remat(eqn.primitive.name, {**eqn.params}, inputs, outputs, list, _effects(eqn), where(eqn), body)
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
    return Op(eqn.primitive.name, params, inputs, outputs, call, _effects(eqn), where(eqn))


def where(eqn: Any) -> str:
    """Read an equation's name stack; "" where JAX keeps it in another way."""
    return str(getattr(getattr(eqn, "source_info", None), "name_stack", ""))


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
    template = Loop("scan", {**eqn.params}, inputs, outputs, list, _effects(eqn), where(eqn))
    return rebuilt(template, _read(closed, how), inputs, outputs, consts, carries)


def rebuilt(old: Loop, body: Program, inputs: list[Atom], outputs: list[int], consts: int, carries: int) -> Loop:
    """Make a loop of the same kind with another body."""
    new = Loop(old.name, old.params, inputs, outputs, old.call, old.effects, old.where, body, consts, carries)
    new.call = new.run
    return new


def _pruned_loop(loop: Loop, wanted: list[bool], kept: Set[int]) -> Loop:
    """Drop outputs that nobody reads, the carries that only they needed, and what these were computed from."""
    first, last = loop.consts, loop.consts + loop.carries
    carried = wanted[: loop.carries]
    while True:
        keep = [*carried, *wanted[loop.carries :]]
        outputs = [atom for atom, k in zip(loop.body.outputs, keep, strict=True) if k]
        body = prune(replace(loop.body, outputs=outputs), kept)
        used = set(kept)
        used |= {atom for op in body.ops for atom in op.inputs if not isinstance(atom, Const)}
        used |= {atom for atom in outputs if not isinstance(atom, Const)}
        needed = [k or var in used for k, var in zip(carried, loop.body.inputs[first:last], strict=True)]
        if needed == carried:
            break
        carried = needed
    stay = [var in used for var in loop.body.inputs]
    stay[first:last] = carried
    body.inputs = [var for var, s in zip(loop.body.inputs, stay, strict=True) if s]
    inputs = [atom for atom, s in zip(loop.inputs, stay, strict=True) if s]
    names = [var for var, k in zip(loop.outputs, keep, strict=True) if k]
    return rebuilt(loop, body, inputs, names, sum(stay[:first]), sum(carried))


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
