"""Follow the values of a program back to what they were computed from, through the turns of its loops.

A `Node` is a variable in one turn of each loop around it. What a loop carries comes from the turn before; what it takes
from a sequence comes from that entry of the sequence.
"""

import functools
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.gradients.operations import Atom, Const, Loop, Op, Program, rebuilt
from fnn.gradients.softmax import SAME

SHAPES = SAME | {"broadcast_in_dim", "reshape", "expand_dims", "squeeze", "transpose", "pvary", "pbroadcast"}
"""Operations that change no number."""


class Node(NamedTuple):
    """A value: a variable, which turn of each loop around it, and which entry of its leading axes is meant."""

    atom: Atom
    turns: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Scope:
    """A program, and the loop whose body it is."""

    program: Program
    loop: Loop | None = None
    outer: "Scope | None" = None
    number: int = 0
    """Of the loop among the operations around it."""


class History:
    """Where every value of a program comes from."""

    def __init__(self, program: Program):
        self.program = program
        self.scopes: dict[int, Scope] = {}
        self.numbers: dict[int, int] = {}
        self.number: Callable[[Atom, tuple[int, ...]], int | None] = lambda atom, turns: None
        """The value of an integer in a turn, where it is known; rows that are taken by number are known by it."""
        self._enter(Scope(program))

    def _enter(self, scope: Scope) -> None:
        for i, var in enumerate(scope.program.inputs):
            self.scopes[var], self.numbers[var] = scope, i - len(scope.program.inputs)
        for number, op in enumerate(scope.program.ops):
            for var in op.outputs:
                self.scopes[var], self.numbers[var] = scope, number
            if isinstance(op, Loop):
                self._enter(Scope(op.body, op, scope, number))

    def maker(self, atom: Atom) -> Op | None:
        """Find the operation that makes a variable; None for inputs and constants."""
        return None if isinstance(atom, Const) else self.scopes[atom].program.makers.get(atom, (None, 0))[0]

    def source(self, atom: Atom) -> Atom:
        """Go back through what changes no number, and stay in the same body."""
        while (op := self.maker(atom)) is not None and op.name in SHAPES:
            atom = op.inputs[op.outputs.index(atom) if len(op.outputs) > 1 else 0]  # type: ignore[arg-type]
        return atom

    def made_by(self, atom: Atom) -> str:
        """Name the operation that makes a value, apart from what changes no number; "" for inputs."""
        op = self.maker(self.source(atom))
        return "" if op is None else op.name

    def spec(self, atom: Atom) -> Any:
        return (self.program if isinstance(atom, Const) else self.scopes[atom].program).spec(atom)

    def time(self, node: Node) -> tuple[int, ...]:
        """Give a key that sorts values by when they are made."""
        assert not isinstance(node.atom, Const)
        key, scope, turns = [self.numbers[node.atom]], self.scopes[node.atom], node.turns
        while scope.loop is not None and scope.outer is not None:
            *before, turn = turns
            length = scope.loop.params["length"]
            key += [length - 1 - turn if scope.loop.params["reverse"] else turn, scope.number]
            scope, turns = scope.outer, tuple(before)
        return tuple(key[::-1])

    def lengths(self, atom: int) -> tuple[int, ...]:
        """Give the lengths of the loops around a variable, from the outside in."""
        scope: Scope | None = self.scopes[atom]
        found: list[int] = []
        while scope is not None and scope.loop is not None:
            found.append(scope.loop.params["length"])
            scope = scope.outer
        return tuple(found[::-1])

    def sources(self, node: Node) -> Iterator[Node]:
        """List what a value was computed from directly; nothing for the program's inputs."""
        atom, turns, rows = node
        assert not isinstance(atom, Const)
        scope = self.scopes[atom]
        op, index = scope.program.makers.get(atom, (None, 0))
        if op is None and scope.loop is not None:
            yield self._outside(scope, node)
        elif isinstance(op, Loop):
            length = op.params["length"]
            last = 0 if op.params["reverse"] else length - 1
            if index < op.carries:
                inside = [(last, rows)] if length else []
            else:
                inside = [(rows[0], rows[1:])] if rows else [(turn, ()) for turn in range(length)]
            for turn, rest in inside:
                yield Node(op.body.outputs[index], (*turns, turn), rest)
        elif op is not None:
            shape = self.spec(atom).shape
            barrier = len(op.outputs) == len(op.inputs) > 1 and op.name in SAME
            for other in [op.inputs[index]] if barrier else op.inputs:
                yield Node(other, turns, rows if self.spec(other).shape == shape else self._taken(op, other, node))

    def _outside(self, scope: Scope, node: Node) -> Node:
        """Say where an input of a loop's body comes from."""
        loop, rows = scope.loop, node.rows
        assert loop is not None and not isinstance(node.atom, Const)
        place, (*outer, turn) = self.numbers[node.atom] + len(loop.body.inputs), node.turns
        if loop.consts <= place < loop.consts + loop.carries:
            before = turn + 1 if loop.params["reverse"] else turn - 1
            if 0 <= before < loop.params["length"]:
                return Node(loop.body.outputs[place - loop.consts], (*outer, before), rows)
        stacked = place >= loop.consts + loop.carries
        return Node(loop.inputs[place], tuple(outer), (turn, *rows) if stacked else rows)

    def _taken(self, op: Op, other: Atom, node: Node) -> tuple[int, ...]:
        """Say which row of its operand an operation takes, where it takes one; () where not known."""
        shape = self.spec(other).shape
        if other is not op.inputs[0] or not shape:
            return ()
        if op.name == "slice":
            first, last = op.params["start_indices"][0], op.params["limit_indices"][0]
            return (int(first), *node.rows[1:]) if last - first == 1 < shape[0] else ()
        one = tuple(op.params.get("slice_sizes", ()))[:1] == (1,)
        if op.name == "gather":
            one = one and tuple(op.params["dimension_numbers"].start_index_map) == (0,)
        elif op.name != "dynamic_slice":
            one = False
        row = self.number(op.inputs[1], node.turns) if one else None
        return () if row is None else (min(max(row, 0), shape[0] - 1),)

    @functools.cached_property
    def inputs(self) -> dict[int, int]:
        """Number the program's own inputs."""
        return {var: i for i, var in enumerate(self.program.inputs)}

    def dependent(self, inputs: Iterable[int]) -> set[int]:
        """Find all variables that depend on some of the program's inputs, inside loops too."""
        found = set(inputs)

        def walk(part: Program) -> None:
            for op in part.ops:
                taken = [not isinstance(a, Const) and a in found for a in op.inputs]
                if not isinstance(op, Loop):
                    if any(taken):
                        found.update(op.outputs)
                    continue
                found.update(var for var, t in zip(op.body.inputs, taken, strict=True) if t)
                carried = op.body.inputs[op.consts : op.consts + op.carries]
                while True:
                    walk(op.body)
                    outs = [not isinstance(a, Const) and a in found for a in op.body.outputs]
                    more = {var for var, out in zip(carried, outs, strict=False) if out} - found
                    if not more:
                        break
                    found.update(more)
                carries = [var in found for var in carried]
                outs[: op.carries] = [a or b for a, b in zip(outs, carries, strict=False)]
                found.update(var for var, out in zip(op.outputs, outs, strict=True) if out)

        walk(self.program)
        return found

    def roots(self, starts: Iterable[Node], bad: Callable[[Node], bool]) -> list[Node]:
        """Go back along bad values; return those that were made of good ones, of constants, or are inputs."""
        waiting, seen, found = [node for node in starts if bad(node)], set(), []
        while waiting:
            node = waiting.pop()
            if node in seen or isinstance(node.atom, Const):
                continue
            seen.add(node)
            before = [source for source in self.sources(node) if bad(source)]
            if all(isinstance(source.atom, Const) for source in before):
                found.append(node)
            waiting += before
        return sorted(found, key=self.time)

    def nearest(self, node: Node, wanted: set[int], avoided: set[int], alone: set[int]) -> Node | None:
        """Find the nearest of the program's inputs from which a value was computed.

        `wanted` are the variables that depend on those inputs, `alone` those that depend on nothing else, `avoided` those
        that depend on the seed: error signals, which come from other layers. What is only added (a bias) counts as further
        away than what is multiplied.
        """
        heap, count, seen = [(0, 0, node)], 0, set()
        while heap:
            cost, _, node = heapq.heappop(heap)
            if node in seen or isinstance(node.atom, Const):
                continue
            seen.add(node)
            if node.atom in self.inputs:
                return node
            op = self.maker(node.atom)
            sources = [s for s in self.sources(node) if not isinstance(s.atom, Const) and s.atom in wanted]
            sources = [s for s in sources if s.atom not in avoided] or sources
            for source in sources:
                step = 0 if op is None or isinstance(op, Loop) or op.name in SHAPES else 1
                if step and op is not None and op.name in ("add", "sub") and source.atom in alone:
                    step = 6
                count += 1
                heapq.heappush(heap, (cost + step, count, source))
        return None


def chosen(part: Program) -> Program:
    """Put before each `select_n` what it takes of each case, with 0 elsewhere: what it does not take comes from nowhere."""
    new = Program(part.inputs, [], part.outputs, part.avals)
    for op in part.ops:
        if isinstance(op, Loop):
            op = rebuilt(op, chosen(op.body), op.inputs, op.outputs, op.consts, op.carries)
        elif op.name == "select_n":
            which, *cases = op.inputs
            for k, case in enumerate(cases):
                if not isinstance(case, Const) and jnp.issubdtype(part.spec(case).dtype, jnp.inexact):
                    cases[k] = new.compute(functools.partial(_taken_as, k), which, case)
            op = replace(op, inputs=[which, *cases])
        new.append(op)
    return new


def _taken_as(number: int, which: jax.Array, case: jax.Array) -> jax.Array:
    return jnp.where(which.astype(jnp.int32) == number, case, jnp.zeros_like(case))
