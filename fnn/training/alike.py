"""Read a traced function of several blocks: does it treat all of them alike, and what does it do to one of them?

Each block's arrays are inputs of the program. `Reading` computes the first block's values only: an operation on another's
must be one that the first went through too. Several may only meet in a sum (a product, ...) that each enters alike.
"""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import tree
from fnn.gradients.operations import Const
from fnn.gradients.program import CALLS, read, trace
from fnn.training.blocks import Blocks, order_noted, specs, split
from fnn.tree import Stacked

SUMS = {"add": jnp.add, "add_any": jnp.add, "mul": jnp.multiply, "max": jnp.maximum, "min": jnp.minimum}
SUMS |= {"and": jnp.logical_and, "or": jnp.logical_or}
REDUCTIONS = {"reduce_sum": "add", "reduce_prod": "mul"} | {f"reduce_{op}": op for op in ("max", "min", "and", "or")}
JOINS = {"concatenate": "dimension", "stack": "axis"}
"""Operations that lay arrays side by side, and what they call the axis."""


class Unlike(Exception):
    """Blocks are treated differently, or meet in something other than a sum over all of them."""

    def __init__(self, why: str = "it does something else to some of them"):
        super().__init__(why)


class Names(dict[Any, int]):
    """Number expressions: equal ones get equal numbers."""

    def __call__(self, *key: Any) -> int:
        return self.setdefault(key, len(self))


@dataclass(slots=True, eq=False)
class Value:
    """A value of the program: of no block (`depth` 0), or of block `rep` of the stacks of some depth."""

    name: int
    array: Any = None
    depth: int = 0
    rep: int = 0
    made: Any = None
    """(operation, inputs) of a sum or of arrays laid side by side, so that it can be taken apart again."""

    @property
    def place(self) -> tuple[int, int]:
        return self.depth, self.rep


@dataclass(slots=True, eq=False)
class Meeting:
    """Values of several blocks on their way into one sum: `op` joins the terms, whose number and order do not count."""

    op: str
    terms: list[Value]
    axis: int | None = None
    """Set for arrays laid side by side (`JOINS`), which a reduction over that axis turns into a sum."""


class Reading:
    """One traced program of f on stand-ins, and what is known of its values."""

    ignored: frozenset[str] | set[str] = frozenset()
    """Parameters of the operations in `shapeless` that make no difference."""
    shapeless: frozenset[str] | set[str] = frozenset()

    level = 0
    """How many levels of blocks, shown already, lie around those of this reading."""

    def __init__(self, f: Callable[..., Any], args: Any, inputs: list[Value], reps: dict[int, int], table: Names):
        self.inputs, self.reps, self.table = inputs, reps, table
        leaves, structure = jax.tree.flatten(args)
        traced = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

        def flat(*values):
            given = iter(values)
            return f(*structure.unflatten(next(given) if t else a for a, t in zip(leaves, traced, strict=True)))

        with order_noted() as noted:
            closed, self.out = trace(flat, *itertools.compress(leaves, traced))
        (self.order_read,) = noted
        self.program = read(closed, keep=frozenset(tree.WHOLE))
        self.known: dict[int, dict[int, Value]] = {}
        self.avals: dict[Any, Any] = {}

    def names(self) -> list[Any]:
        """Number each output, the blocks of a stack as one. Two programs with equal lists do the same."""
        return [value.name for value in self._outputs(dry=True)[0]]

    def run(self) -> Any:
        """Compute the outputs, stacks as `Stacked` nodes."""
        values, nodes, rebuild = self._outputs(dry=False)
        arrays = iter(values)

        def filled(node):
            if not isinstance(node, Blocks):
                return next(arrays).array
            one = jax.tree.structure(tuple.__getitem__(node, 0))
            blocks = one.unflatten(self._stacked(next(arrays), node.depth) for _ in range(one.num_leaves))
            return Stacked(blocks, None if one.num_leaves else node.depth)

        return rebuild([filled(node) for node in nodes])

    def _stacked(self, value: Value, depth: int) -> Any:
        return value.array if value.depth else jnp.broadcast_to(value.array, (depth, *jnp.shape(value.array)))

    def _outputs(self, dry: bool) -> tuple[list[Value], list[Any], Any]:
        self.known = {}
        found = self._execute(self.program, [self._noted(value) for value in self.inputs], dry)
        values = iter([self._settled(value, dry) for value in found])
        nodes, rebuild = split(self.out, self.level)
        outputs = []
        for node in nodes:
            if not isinstance(node, Blocks):
                value = next(values)
                if value.depth:
                    raise Unlike("a value of one block leaves it without a stack around it")
                outputs.append(value)
                continue
            children = list(tuple.__iter__(node))
            if any(specs(child) != specs(children[0]) for child in children):
                raise Unlike("it keeps other arrays for some of them")
            rows = [[next(values) for _ in jax.tree.leaves(child)] for child in children]
            for rep, row in enumerate(rows):
                for one, other in zip(rows[0], row, strict=True):
                    if one.name != other.name or (other.depth, other.rep) not in ((0, 0), (node.depth, rep)):
                        raise Unlike()
            outputs += rows[0]
        return outputs, nodes, rebuild

    def _execute(self, program: Any, inputs: Sequence[Any], dry: bool) -> list[Any]:
        env: dict[Any, Any] = dict(zip(program.inputs, inputs, strict=True))
        self.avals |= program.avals

        def value(atom):
            if not isinstance(atom, Const):
                return env[atom]
            return Value(self.table(*self._constant(atom.value)), atom.value)

        for op in program.ops:
            env.update(zip(op.outputs, self._apply(op, [value(atom) for atom in op.inputs], dry), strict=True))
        return [value(atom) for atom in program.outputs]

    def _constant(self, value: Any) -> tuple[Any, ...]:
        return constant(value)

    def _apply(self, op: Any, inputs: list[Any], dry: bool) -> list[Any]:
        """Apply one operation to values, of which those of later blocks are only compared with the first's."""
        if op.name in REDUCTIONS and isinstance(inputs[0], Meeting) and inputs[0].axis is not None:
            return [self._reduced(op, inputs[0], dry)]
        if op.name not in SUMS and op.name not in JOINS:
            inputs = [self._settled(v, dry) for v in inputs]
        places = {v.place for v in inputs if isinstance(v, Value) and v.depth}
        if len(places) > 1 or any(isinstance(v, Meeting) for v in inputs):
            if op.name in CALLS:
                return [self._whole(op.params["name"], inputs, dry)]
            return self._meet(op, inputs, dry)
        depth, rep = next(iter(places), (0, 0))
        ignored = self.ignored if op.name in self.shapeless else ()
        text = _canon(op.name, {name: value for name, value in op.params.items() if name not in ignored})
        names = [self.table(op.name, text, *(v.name for v in inputs), i) for i in range(len(op.outputs))]
        known = self.known.setdefault(depth, {})
        if rep:
            if any(name not in known for name in names):
                if op.name in SUMS or op.name in JOINS:  # a part of a sum that the first block's does not have
                    return self._meet(op, inputs, dry)
                raise Unlike()
            return [Value(name, None, depth, rep, known[name].made) for name in names]
        if not all(name in known for name in names):
            arrays = [None] * len(names) if dry else self._computed(op, inputs, depth)
            made = (op.name, inputs) if op.name in SUMS or op.name in JOINS else None
            for name, array in zip(names, arrays, strict=True):
                known.setdefault(name, Value(name, array, depth, 0, made))
        return [known[name] for name in names]

    def _noted(self, value: Value) -> Value:
        if not value.rep:
            self.known.setdefault(value.depth, {})[value.name] = value
        return value

    def _computed(self, op: Any, inputs: list[Value], depth: int) -> list[Any]:
        arrays = [v.array for v in inputs]
        if not depth:
            return list(op.call(*arrays))
        axes = [0 if v.depth else None for v in inputs]
        return list(jax.vmap(lambda *values: tuple(op.call(*values)), in_axes=axes, axis_size=depth)(*arrays))

    def _opened(self, value: Value) -> list[Value]:
        """The terms that a sum of one block's values, or a concatenation of them, was made of."""
        return [Value(v.name, None, v.depth, value.rep, v.made) if v.depth and value.rep else v for v in value.made[1]]

    def _meet(self, op: Any, inputs: list[Any], dry: bool) -> list[Any]:
        if op.name in SUMS:
            parts = [v.terms if isinstance(v, Meeting) and v.op == op.name else [self._settled(v, dry)] for v in inputs]
            return [Meeting(op.name, [term for part in parts for term in part])]
        if op.name in JOINS:
            axis = op.params[JOINS[op.name]]
            terms: list[Value] = []
            for v in inputs:
                if isinstance(v, Meeting) and (v.op, v.axis) == (op.name, axis):
                    terms += v.terms
                elif isinstance(v, Value) and v.depth and v.made is not None and v.made[0] == op.name:
                    terms += self._opened(v)
                else:
                    terms.append(self._settled(v, dry))
            return [Meeting(op.name, terms, axis)]
        if op.name == "cond" and not inputs[0].depth:
            return self._branched(op, inputs, dry)
        inner = op.params.get("call_jaxpr", op.params.get("fun_jaxpr"))
        if inner is None or not op.name.startswith("custom_"):
            raise Unlike(f"blocks meet in an operation {op.name!r}")
        return self._execute(read(inner, keep=frozenset(tree.WHOLE)), inputs, dry)

    def _branched(self, op: Any, inputs: list[Value], dry: bool) -> list[Any]:
        """A conditional on a value of no block, around values of several."""
        programs, known = [read(branch, keep=frozenset(tree.WHOLE)) for branch in op.params["branches"]], self.known

        def outputs(program, dry):
            self.known = {depth: dict(values) for depth, values in known.items()}
            return [self._settled(v, dry) for v in self._execute(program, inputs[1:], dry)]

        sides = [outputs(program, True) for program in programs]
        places = []
        for values in zip(*sides, strict=True):
            places.append(max(v.place for v in values))
            if any(v.depth and v.place != places[-1] for v in values):
                raise Unlike("a conditional exchanges blocks")
        names = [self.table("cond", inputs[0].name, *(v.name for v in values)) for values in zip(*sides, strict=True)]
        first = [i for i, (_, rep) in enumerate(places) if not rep]
        arrays: list[Any] = [None] * len(first)
        if not dry:

            def branch(program):
                def run():
                    values = outputs(program, False)
                    return [self._stacked(values[i], d) if (d := places[i][0]) else values[i].array for i in first]

                return run

            arrays = jax.lax.switch(inputs[0].array, [branch(program) for program in programs])
        self.known = known
        found = {i: self._noted(Value(names[i], a, places[i][0])) for i, a in zip(first, arrays, strict=True)}
        for i, (depth, rep) in enumerate(places):
            if rep and names[i] not in known.get(depth, {}):
                raise Unlike()
        return [found.get(i) or Value(names[i], None, *place) for i, place in enumerate(places)]

    def _reduced(self, op: Any, meeting: Meeting, dry: bool) -> Meeting:
        if tuple(op.params["axes"]) != (meeting.axis,):
            raise Unlike(f"blocks meet in an operation {op.name!r} of another axis")
        terms = meeting.terms
        if meeting.op == "concatenate":
            terms = [self._apply(op, [term], dry)[0] for term in terms]
        return Meeting(REDUCTIONS[op.name], terms)

    def _settled(self, value: Any, dry: bool) -> Value:
        """Turn a finished meeting into one value of no block: a sum over all blocks."""
        if isinstance(value, Value):
            return value
        if value.axis is not None:
            raise Unlike(f"blocks meet in an operation {value.op!r}")
        terms, own = self._balanced(value.terms, value.op)
        name = self.table("sum", value.op, *sorted(v.name for v in terms), *sorted((v.depth, v.name) for v in own))
        if name in self.known.setdefault(0, {}):
            return self.known[0][name]
        array = None
        if not dry:
            if value.op in ("and", "or") and any(v.array.dtype != bool for v in own):
                raise Unlike(f"blocks meet in an operation {value.op!r} on bits")
            join = SUMS[value.op]
            array = functools.reduce(join, [v.array for v in terms] + [join.reduce(v.array, axis=0) for v in own])
        return self._noted(Value(name, array))

    def _whole(self, name: str, inputs: list[Value], dry: bool) -> Value:
        """A function of all arrays at once that does not see how they are cut into blocks: see `tree.WHOLE`."""
        terms, own = self._balanced(inputs, None)
        number = self.table("whole", name, *sorted(v.name for v in terms), *sorted((v.depth, v.name) for v in own))
        array = None if dry else tree.WHOLE[name]([v.array for v in (*terms, *own)])
        return self._noted(Value(number, array))

    def _balanced(self, values: list[Value], op: str | None) -> tuple[list[Value], list[Value]]:
        """Split values into those of no block and those of the first block, each of which every other block has too.

        A running sum ((0 + a_0) + a_1) + ... holds the first terms already added up: it is opened where that is needed.
        """
        values = list(values)
        while True:
            by_place: dict[tuple[int, int], Counter[int]] = {}
            for v in values:
                if v.depth:
                    by_place.setdefault(v.place, Counter())[v.name] += 1
            wrong = []
            for depth in {depth for depth, _ in by_place}:
                counts = [by_place.get((depth, rep), Counter()) for rep in range(self.reps[depth])]
                least = Counter(counts[0])
                for count in counts[1:]:
                    least &= count
                wrong += [(depth, rep, name) for rep, count in enumerate(counts) for name in count - least]
            if not wrong:
                shared = [v for v in values if not v.depth]
                return shared, [v for v in values if v.depth and not v.rep]
            for i, v in enumerate(values):
                if (*v.place, v.name) in wrong and v.made is not None and v.made[0] == op:
                    values[i : i + 1] = self._opened(v)
                    break
            else:
                raise Unlike()


def constant(value: Any) -> tuple[Any, ...]:
    """Name a constant by its numbers where they are to be had, else by the object that it is."""
    with contextlib.suppress(jax.errors.TracerArrayConversionError):
        a = np.asarray(value if np.size(value) <= 2**16 else None)
        if a.dtype != object:
            return "constant", str(a.dtype), a.shape, a.tobytes()
    return "object", id(value)


def _constants(value: Any) -> list[Any]:
    """List the arrays that a traced function holds, and those inside of it do."""
    if isinstance(value, tuple | list):
        return [c for part in value for c in _constants(part)]
    equations = getattr(getattr(value, "jaxpr", value), "eqns", ())
    inner = [c for equation in equations for part in equation.params.values() for c in _constants(part)]
    return [*getattr(value, "consts", ()), *inner]


def _canon(name: str, params: dict[str, Any]) -> str:
    """Write an operation's parameters. Of its functions only those that give derivatives do not count."""

    def text(value):
        if callable(value):
            return "" if name.startswith("custom_") else str(id(value))
        if isinstance(value, tuple | list):
            return ",".join(map(text, value))
        return f"{value}{[constant(c) for c in _constants(value)]}"

    return ";".join(f"{key}={text(value)}" for key, value in sorted(params.items()))
