"""A traced function written out as operations, which can be searched, cut, hooked and run. `program` reads it off a jaxpr."""

import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

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
    line: Any = None
    """The traceback that JAX keeps of the line that wrote it."""
    bind: Callable[..., Any] | None = None
    """`(*values, **params) -> outputs`, for values of another dtype: JAX's own, for one equation."""

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


def execute(
    program: Program, values: Sequence[Any], hooks: Hooks | None = None, found: dict[str, Any] | None = None
) -> list[Any]:
    """Run a program; under `vmap`, `jit` and `grad` like any function.

    `hooks` are called with the values of the variables that are their keys, inside loops too; what they return goes into
    `found`, stacked over the turns of the loops around. Not traced, it runs one operation after the other, and lets go of
    values that nobody needs any more.
    """
    known = dict(zip(program.inputs, values, strict=True))
    hooks, found = hooks or {}, {} if found is None else found
    last = {atom: number for number, op in enumerate(program.ops) for atom in op.inputs if isinstance(atom, int)}
    last |= {atom: len(program.ops) for atom in program.outputs if isinstance(atom, int)}

    def value(atom):
        return atom.value if isinstance(atom, Const) else known[atom]

    def hooked(variables):
        for variable in hooks and variables:
            if variable in hooks:
                known[variable], numbers = hooks[variable](known[variable])
                found.update(numbers)

    hooked(program.inputs)
    for number, op in enumerate(program.ops):
        inputs = map(value, op.inputs)
        if hooks and isinstance(op, Loop | Remat):
            outputs, numbers = op.run(*inputs, hooks=hooks)
            found.update(numbers)
        else:
            outputs = op.call(*inputs)
        known.update(zip(op.outputs, outputs, strict=True))
        del outputs
        hooked(op.outputs)
        for atom in op.inputs:
            if isinstance(atom, int) and last[atom] == number:
                known.pop(atom, None)
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


def rebuilt(old: Loop, body: Program, inputs: list[Atom], outputs: list[int], consts: int, carries: int) -> Loop:
    """Make a loop of the same kind with another body."""
    new = replace(old, inputs=inputs, outputs=outputs, body=body, consts=consts, carries=carries)
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


def reached(program: Program, start: Sequence[int], closed: bool = True, derivatives: bool = False) -> set[int]:
    """List the variables that depend on some others or, with `closed`, on arrays that the loss closes over, inside loops too.

    With `derivatives` those whose derivative may depend on them: not through integers, nor through `stop_gradient`.
    """
    known = set(start)

    def depends(atom):
        if isinstance(atom, Const):
            return jnp.ndim(atom.value) > 0 and closed
        return atom in known and not (derivatives and not jnp.issubdtype(program.spec(atom).dtype, jnp.inexact))

    for op in program.ops:
        if derivatives and op.name == "stop_gradient":
            continue
        given = [depends(atom) for atom in op.inputs]
        if isinstance(op, Loop | Remat):
            inner = {var for var, g in zip(op.body.inputs, given, strict=True) if g}
            while True:
                known |= reached(op.body, list(inner), closed, derivatives)
                results = [not isinstance(a, Const) and a in known for a in op.body.outputs]
                carries = op.body.inputs[op.consts :][: op.carries] if isinstance(op, Loop) else []
                more = {var for var, r in zip(carries, results, strict=False) if r} - inner
                if not more:
                    break
                inner |= more
            known.update(var for var, r in zip(op.outputs, results, strict=True) if r)
        elif any(given):
            known.update(op.outputs)
    return known
