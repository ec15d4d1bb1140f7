"""Cut a program that computes gradients before their last products, at the paths that `search` found.

The operands of these products become outputs of the program, stacked where they stand inside loops. Norms are taken
inside the loops over depth, so that as much is held as for a single layer. `search` has an example.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.gradients.factors import Convolution, Lookup, Product, Term
from fnn.gradients.operations import Atom, Const, Loop, Program
from fnn.gradients.products import Full, Pair, Rows, zero
from fnn.gradients.search import REINDEXING, Out, Path, Resized, Scaled, maker
from fnn.gradients.squares import Examples, norm, norm_of_whole

STORED = "stored in full"


class Plan(NamedTuple):
    """Which values of one example to compute for a parameter array, and how to hold those of all."""

    atoms: tuple[Any, ...]
    route: str
    build: Callable[[Sequence[jax.Array]], Any]
    """Of the values, each with a leading axis of examples."""


def plan(program: Program, atom: Atom, path: Path | None, spec: Any, depth: int, examples: Examples) -> Plan:
    """Plan for one gradient of a program, found at `path`; spec is its shape and dtype, of which `depth` axes count blocks.

    Gives the program's loops new outputs.
    """
    if path is not None and not path.sources:
        return Plan((), "zero", lambda _: zero(tuple(spec.shape), examples.count, depth))
    blocks = math.prod(spec.shape[:depth])
    per_block = (
        path is not None
        and path.aligned
        and path.levels
        and path.turn == tuple(spec.shape[depth:])
        and math.prod(spec.shape) == blocks * math.prod(path.turn)
    )
    if path is None or (depth and not per_block) or not jnp.issubdtype(spec.dtype, jnp.floating):
        known = _norm_of_whole(program, atom, examples)
        kept = () if known is None or known[1] != depth else (known[0],)
        return whole((atom, *kept), _unfactored(program, atom, spec.shape[depth:]), depth)
    return factored(path, examples)


def whole(atoms: tuple[Any, ...], route: str, depth: int) -> Plan:
    """Store gradients: atoms are the gradient and, if a loop has taken it, its norm."""

    def build(values):
        known = jnp.moveaxis(values[1], 0, depth) if len(values) == 2 else None
        return Full(jnp.moveaxis(values[0], 0, depth), known, depth)

    return Plan(atoms, route, build)


def factored(path: Path, examples: Examples) -> Plan:
    """Keep the factors of gradients."""
    atoms, known = emit(path, examples)
    levels = [[step.level for step in reversed(s.steps) if isinstance(step, Out)] for s in path.sources]
    terms = tuple(Term(s.kind, names.count("time")) for s, names in zip(path.sources, levels, strict=True))

    def laid_out(value, levels):
        """[batch, levels..., array] -> [depth..., batch, time..., array]."""
        depth, time = ([i + 1 for i, level in enumerate(levels) if level == name] for name in ("depth", "time"))
        return value.transpose(*depth, 0, *time, *range(len(levels) + 1, value.ndim))

    def build(values):
        arrays = [tuple(laid_out(v, names) for v in values[2 * i : 2 * i + 2]) for i, names in enumerate(levels)]
        kept = jnp.moveaxis(values[-1], 0, path.levels) if known else None
        form = Rows if isinstance(terms[0].kind, Lookup) else Pair
        return form(tuple(arrays), kept, path.levels, terms, path.moves)

    return Plan((*atoms, *known), _route(terms, path.levels), build)


def emit(path: Path, examples: Examples) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    """Carry the factors of all sources, and the norm if it can be, out to the gradient's program: their names there.

    Gives loops on the way new outputs: what they hold in every turn, stacked.
    """
    pairs, parts, steps = [], [], list[Any]()
    for source in path.sources:
        # The norm is taken right before the first step out of a loop over depth; from there on all sources go together.
        depths = [i for i, step in enumerate(source.steps) if isinstance(step, Out) and step.level == "depth"]
        first = depths[0] if depths else len(source.steps)
        pair, steps = source.atoms, list(source.steps[first:])
        pair, levels = _carried(pair, source.steps[:first], 0)
        parts.append((Term(source.kind, levels), pair))
        pairs.append(_carried(pair, steps, levels)[0])
    factors = tuple(atom for pair in pairs for atom in pair)
    if not path.normed:
        return factors, ()
    assert isinstance(steps[0], Out)
    return factors, (_carried_norm(_norm(parts, steps[0].loop.body, examples), steps),)


def _carried(pair: tuple[Atom, Atom], steps: Sequence[Any], levels: int) -> tuple[tuple[Atom, Atom], int]:
    """Carry two factors along some steps; with the number of loops that they have left."""
    a, d = pair
    for step in steps:
        if isinstance(step, Out):
            a, d, levels = _lift(step.program, step.loop, a), _lift(step.program, step.loop, d), levels + 1
        elif isinstance(step, Scaled):
            d = step.program.compute(_scale(step), d, step.by)
        else:
            x = step.program.compute(_resize(step, levels), (a, d)[step.side])
            a, d = (x, d) if step.side == 0 else (a, x)
    return (a, d), levels


def _carried_norm(atom: Atom, steps: Sequence[Any]) -> Atom:
    for step in steps:
        if isinstance(step, Out):
            atom = _lift(step.program, step.loop, atom)
        else:
            atom = step.program.compute(_scale(step, jnp.abs), atom, step.by)
    return atom


def _scale(step: Scaled, of: Callable[..., Any] = jnp.asarray) -> Callable[..., Any]:
    return lambda d, by: (d / of(by) if step.divide else d * of(by)).astype(d.dtype)


def _resize(step: Resized, levels: int) -> Callable[..., Any]:
    def resize(x):
        edges = [(step.low, step.high, 0) if i == step.axis + levels else (0, 0, 0) for i in range(x.ndim)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)

    return resize


def _norm(parts: Sequence[tuple[Term, tuple[Atom, Atom]]], body: Program, examples: Examples) -> Atom:
    def taken(examples, *values):
        return norm([term for term, _ in parts], list(zip(values[::2], values[1::2], strict=True)), examples)

    return _of_examples(body, taken, [atom for _, pair in parts for atom in pair], examples)


def _of_examples(body: Program, function: Callable[..., Any], atoms: Sequence[Atom], examples: Examples) -> Atom:
    """Compute a function of one example that asks all the others."""
    one, alone = (functools.partial(function, e) for e in (examples, examples._replace(axis_name=None)))
    return body.compute(one, *atoms, like=alone)


def _norm_of_whole(program: Program, atom: Atom, examples: Examples) -> tuple[int, int] | None:
    """Take the norm of a gradient inside the loop over depth that stacks it: (its name, how many loops)."""
    op, index = maker(program, atom)
    if not isinstance(op, Loop) or index < op.carries:
        return None
    own = op.body.outputs[index]
    inner = _norm_of_whole(op.body, own, examples)
    if inner is None:
        inner = _of_examples(op.body, lambda examples, a: norm_of_whole(a, examples), [own], examples), 0
    return _lift(program, op, inner[0]), inner[1] + 1


def _lift(program: Program, loop: Loop, atom: Atom) -> int:
    """Give the values that an atom of a loop's body takes in all turns, stacked, a name outside."""
    body = loop.body
    if not isinstance(atom, Const) and atom in body.inputs:
        place = body.inputs.index(atom)
        outside = loop.inputs[place]
        if place >= loop.consts + loop.carries and not isinstance(outside, Const):
            return outside  # the loop reads it from a stack that exists already
    if isinstance(atom, Const):
        atom = body.compute(lambda value=atom.value: jnp.asarray(value))
    if atom in body.outputs[loop.carries :]:
        return loop.outputs[body.outputs.index(atom, loop.carries)]
    spec = body.spec(atom)
    output = program.variable(jax.ShapeDtypeStruct((loop.params["length"], *spec.shape), spec.dtype))
    body.outputs.append(atom)
    loop.outputs.append(output)
    program.makers[output] = (loop, len(loop.outputs) - 1)
    return output


def _unfactored(program: Program, atom: Atom, shape: tuple[int, ...]) -> str:
    """Tell a bias or a scale, whose gradient is no larger than its error signal, from what was not recognised."""
    op, _ = maker(program, atom)
    while op is not None and op.name in REINDEXING and isinstance(op.inputs[0], int):
        op, _ = maker(program, op.inputs[0])
    summed = op is not None and op.name == "reduce_sum"
    return "stored, small" if summed or math.prod(shape) <= max([1, *shape]) else STORED


def _route(terms: Sequence[Term], levels: int) -> str:
    names = {Product: "product", Convolution: "convolution", Lookup: "rows"}
    parts = [names[type(term.kind)] + " over time" * bool(term.times) for term in terms]
    uses = f", used {len(parts)} times" if len(parts) > 1 else ""
    return " + ".join(dict.fromkeys(parts)) + uses + (", by depth" if levels else "")
