"""Cut a program that computes a gradient before its last products.

From each weight gradient the search goes backwards: through reshapes, transposes, casts, scalar factors and sums over
several uses, out of loops over depth (which stack gradients) and over time (which sum them up), to the product that made
it. The product's operands become outputs, and the norm is taken inside the loop that would stack them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.gradients.factors import Convolution, Lookup, Move, Product, Term, recognise
from fnn.gradients.products import Full, Pair, Rows, Zero
from fnn.gradients.program import Atom, Const, Loop, Op, Program
from fnn.gradients.squares import Examples, norm, norm_of_whole

REINDEXING = {"reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "broadcast_in_dim"}


@dataclass
class Cut:
    """Where a gradient comes from: the sum of `terms`, which `moves` reindex into the gradient."""

    terms: tuple[Term, ...] = ()
    moves: tuple[Move, ...] = ()
    norm: int | None = None
    """Its norm, taken inside the loops over depth: float[levels]."""
    levels: int = 0
    """How many loops over depth lie around it."""
    turn: tuple[int, ...] = ()
    """Shape of the gradient in one turn of the innermost of them."""
    aligned: bool = True
    """Whether the leading axes still count the turns, in order."""


class Plan(NamedTuple):
    """Which values of one example to compute for a parameter array, and how to hold those of all."""

    atoms: tuple[Any, ...]
    route: str
    build: Callable[[Sequence[jax.Array]], Any]
    """Of the values, each with a leading axis of examples."""


def plan(program: Program, atom: Atom, spec: Any, depth: int, examples: Examples) -> Plan:
    """Plan for one gradient of a program; spec is its shape and dtype, of which `depth` axes count blocks."""
    cut = find(program, atom, examples)
    if cut is not None and not cut.terms:
        return Plan((), "zero", lambda _: Zero(tuple(spec.shape), examples.count, depth))
    blocks = math.prod(spec.shape[:depth])
    per_block = (
        cut is not None
        and cut.aligned
        and cut.levels
        and cut.turn == tuple(spec.shape[depth:])
        and math.prod(spec.shape) == blocks * math.prod(cut.turn)
    )
    if cut is None or (depth and not per_block) or not jnp.issubdtype(spec.dtype, jnp.floating):
        known = full_norm(program, atom, examples)
        kept = () if known is None or known[1] != depth else (known[0],)
        return whole((atom, *kept), _unfactored(program, atom, spec.shape[depth:]), depth)
    return factored(cut)


def whole(atoms: tuple[Any, ...], route: str, depth: int) -> Plan:
    """Hold gradients as they are: atoms are the gradient and, if a loop has taken it, its norm."""

    def build(values):
        known = jnp.moveaxis(values[1], 0, depth) if len(values) == 2 else None
        return Full(jnp.moveaxis(values[0], 0, depth), known, depth)

    return Plan(atoms, route, build)


def factored(cut: Cut) -> Plan:
    """Hold gradients as factors."""
    atoms = tuple(atom for term in cut.terms for atom in term.atoms)
    known = () if cut.norm is None else (cut.norm,)
    terms = tuple(replace(term, atoms=(), levels=("time",) * term.times) for term in cut.terms)

    def laid_out(value, levels):
        """[batch, levels..., array] -> [depth..., batch, time..., array]."""
        depth, time = ([i + 1 for i, level in enumerate(levels) if level == name] for name in ("depth", "time"))
        return value.transpose(*depth, 0, *time, *range(len(levels) + 1, value.ndim))

    def build(values):
        arrays = [
            tuple(laid_out(v, term.levels) for v in values[2 * i : 2 * i + 2]) for i, term in enumerate(cut.terms)
        ]
        kept = jnp.moveaxis(values[-1], 0, cut.levels) if known else None
        form = Rows if isinstance(terms[0].kind, Lookup) else Pair
        return form(tuple(arrays), kept, cut.levels, terms, cut.moves)

    return Plan((*atoms, *known), _route(cut), build)


def _unfactored(program: Program, atom: Atom, shape: tuple[int, ...]) -> str:
    """Tell a bias or a scale, whose gradient is no larger than its error signal, from what was not recognised."""
    op = program.makers.get(atom, (None,))[0] if isinstance(atom, int) else None
    while op is not None and op.name in REINDEXING and isinstance(op.inputs[0], int):
        op = program.makers.get(op.inputs[0], (None,))[0]
    summed = op is not None and op.name == "reduce_sum"
    return "as it is" if summed or math.prod(shape) <= max([1, *shape]) else "materialized"


def _route(cut: Cut) -> str:
    names = {Product: "product", Convolution: "convolution", Lookup: "rows"}
    parts = [names[type(term.kind)] + " over time" * bool(term.times) for term in cut.terms]
    text = " + ".join(dict.fromkeys(parts))
    uses = f", used {len(parts)} times" if len(parts) > 1 else ""
    return text + uses + (", by depth" if cut.levels else "")


def find(program: Program, atom: Atom, examples: Examples) -> Cut | None:
    """Search a gradient's last products; None if it is made in some other way. Gives new outputs to loops on the way."""
    if isinstance(atom, Const) or atom not in program.makers:
        return Cut() if _is_zero(program, atom) else None
    op, index = program.makers[atom]
    shape = program.spec(atom).shape
    if isinstance(op, Loop):
        return _out_of_loop(program, op, index, examples)
    if op.name in ("add_any", "add"):
        return _joined([find(program, a, examples) for a in op.inputs])
    if op.name in ("mul", "div", "neg"):
        return _scaled(program, op, shape, examples)
    if _is_zero(program, atom):
        return Cut()
    if op.name in REINDEXING:
        cut = find(program, op.inputs[0], examples)
        return None if cut is None else _moved(cut, op, program.spec(op.inputs[0]).shape, shape)
    if op.name in ("slice", "split", "pad", "concatenate"):
        return _part(program, op, index, shape, examples)
    term = recognise(op.name, op.params, [program.spec(a) for a in op.inputs], program.spec(atom))
    if term is None or (len(op.inputs) == 3 and not _is_zero(program, op.inputs[0])):
        return None
    return Cut((replace(term, atoms=tuple(op.inputs[-2:])),), term.kind.moves, turn=shape)


def full_norm(program: Program, atom: Atom, examples: Examples) -> tuple[int, int] | None:
    """Take the norm of a gradient inside the loop over depth that stacks it: (atom, how many loops)."""
    if isinstance(atom, Const) or not isinstance((op := program.makers.get(atom, (None,))[0]), Loop):
        return None
    index = program.makers[atom][1]
    if index < op.carries:
        return None
    own = op.body.outputs[index]
    inner = full_norm(op.body, own, examples) or (op.body.compute(lambda a: norm_of_whole(a, examples), own), 0)
    return _lift(program, op, inner[0]), inner[1] + 1


def _out_of_loop(program: Program, loop: Loop, index: int, examples: Examples) -> Cut | None:
    """Bring the factors of a gradient out of the loop that makes it."""
    body, atom = loop.body, loop.body.outputs[index]
    if index >= loop.carries:
        cut = find(body, atom, examples)
        if cut is None or not cut.terms:
            return None
        known = cut.norm if cut.levels else _norm(body, cut.terms, examples)
        return Cut(
            tuple(_lifted(program, loop, term, "depth") for term in cut.terms),
            tuple(replace(move, lead=move.lead + 1) for move in cut.moves),
            None if known is None else _lift(program, loop, known),
            cut.levels + 1,
            cut.turn,
            cut.aligned,
        )
    own = body.inputs[loop.consts + index]
    addends = _addends(body, atom)
    reads = [a for op in body.ops for a in op.inputs].count(own) + body.outputs.count(own)
    if addends.count(own) != 1 or reads != 1:
        return None  # not a sum over the turns: the carry is used for something else as well
    cuts = [find(body, a, examples) for a in addends if a != own]
    total = _joined(cuts)
    if total is None:
        return None
    terms = tuple(_lifted(program, loop, term, "time") for term in total.terms)
    return _joined([find(program, loop.inputs[loop.consts + index], examples), replace(total, terms=terms, norm=None)])


def _addends(program: Program, atom: Atom) -> list[Atom]:
    op = None if isinstance(atom, Const) else program.makers.get(atom, (None,))[0]
    if op is None or op.name not in ("add_any", "add"):
        return [atom]
    return [a for part in op.inputs for a in _addends(program, part)]


def _lifted(program: Program, loop: Loop, term: Term, level: str) -> Term:
    return replace(term, atoms=tuple(_lift(program, loop, a) for a in term.atoms), levels=(level, *term.levels))


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
    spec = body.spec(atom)
    output = program.variable(jax.ShapeDtypeStruct((loop.params["length"], *spec.shape), spec.dtype))
    body.outputs.append(atom)
    loop.outputs.append(output)
    program.makers[output] = (loop, len(loop.outputs) - 1)
    return output


def _norm(body: Program, terms: tuple[Term, ...], examples: Examples) -> int:
    def taken(*values):
        return norm(terms, list(zip(values[::2], values[1::2], strict=True)), examples)

    return body.compute(taken, *(atom for term in terms for atom in term.atoms))


def _joined(cuts: Sequence[Cut | None]) -> Cut | None:
    """Add gradients: terms of one form are one term with more positions."""
    present = [cut for cut in cuts if cut is not None and cut.terms]
    if None in cuts:
        return None
    if len(present) <= 1:
        return present[0] if present else Cut()
    first, *rest = present
    for cut in rest:
        same = (cut.moves, cut.levels, cut.turn, cut.aligned) == (first.moves, first.levels, first.turn, first.aligned)
        a, b = first.terms[0].kind, cut.terms[0].kind
        if not same or a.shape != b.shape or isinstance(a, Lookup) != isinstance(b, Lookup):
            return None
    return replace(first, terms=tuple(term for cut in present for term in cut.terms), norm=None)


def _scaled(program: Program, op: Op, shape: tuple[int, ...], examples: Examples) -> Cut | None:
    """Let a scalar factor act on the error signals."""
    if op.name == "neg":
        gradient, by = op.inputs[0], Const(np.float32(-1))
    else:
        left, right = (_scalar(program, a) for a in op.inputs)
        gradient, by = (op.inputs[0], right) if right is not None else (op.inputs[1], left)
        if by is None or (op.name == "div" and right is None):
            return None
    if program.spec(by).shape or not shape:
        return None
    cut = find(program, gradient, examples)
    if cut is None:
        return None

    def scale(d, by):
        return (d / by if op.name == "div" else d * by).astype(d.dtype)

    def scale_norm(norm, by):
        return scale(norm, jnp.abs(by))

    known = None if cut.norm is None else program.compute(scale_norm, cut.norm, by)
    terms = (replace(t, atoms=(t.atoms[0], program.compute(scale, t.atoms[1], by))) for t in cut.terms)
    return replace(cut, terms=tuple(terms), norm=known)


def _part(program: Program, op: Op, index: int, shape: tuple[int, ...], examples: Examples) -> Cut | None:
    """Crop or fill up the factors, where a parameter is one part of a larger array or is used in parts."""
    params, before = op.params, program.spec(op.inputs[0]).shape
    if op.name == "concatenate":
        cuts, start, axis = [], 0, params["dimension"]
        for a in op.inputs:
            size = program.spec(a).shape[axis]
            change = {axis: (start, shape[axis] - start - size)}
            cuts.append(_resized(program, find(program, a, examples), program.spec(a).shape, change))
            start += size
        return _joined(cuts)
    if op.name == "pad":
        if any(inner for *_, inner in params["padding_config"]) or not _is_zero(program, op.inputs[1]):
            return None
        change = {i: (low, high) for i, (low, high, _) in enumerate(params["padding_config"]) if low or high}
    elif op.name == "split":
        start = sum(params["sizes"][:index])
        axis = params["axis"]
        change = {axis: (-start, start + shape[axis] - before[axis])}
    else:
        if any(stride != 1 for stride in params["strides"] or ()):
            return None
        ends = zip(before, params["start_indices"], params["limit_indices"], strict=True)
        change = {i: (-start, stop - size) for i, (size, start, stop) in enumerate(ends) if start or stop != size}
    return _resized(program, find(program, op.inputs[0], examples), before, change)


def _resized(program: Program, cut: Cut | None, before: tuple[int, ...], change: dict[int, Any]) -> Cut | None:
    """Add rows and columns of zeros to a product, or (negative numbers) take some away."""
    if cut is None or not cut.terms or not change:
        return cut
    if len(cut.moves) != 1 or cut.moves[0].arg != before[cut.levels :] or min(change) < cut.levels:
        return None
    shape = [size + sum(change.get(i, (0, 0))) for i, size in enumerate(before)]
    terms = []
    for term in cut.terms:
        kind, atoms, levels = term.kind, list(term.atoms), len(term.levels)
        if not isinstance(kind, Product):
            return None
        shapes = [list(kind.left), list(kind.right)]
        for axis, (low, high) in change.items():
            side = kind.side(axis - cut.levels)
            if side is None:
                return None
            operand, place = side
            shapes[operand][place] += low + high

            def resize(x, place=place + levels, low=low, high=high):
                return jax.lax.pad(
                    x, jnp.zeros((), x.dtype), [(low * (i == place), high * (i == place), 0) for i in range(x.ndim)]
                )

            atoms[operand] = program.compute(resize, atoms[operand])
        terms.append(
            replace(term, kind=replace(kind, left=tuple(shapes[0]), right=tuple(shapes[1])), atoms=tuple(atoms))
        )
    moves = (replace(cut.moves[0], arg=tuple(shape[cut.levels :])),)
    return replace(cut, terms=tuple(terms), moves=moves, norm=None, turn=tuple(shape[cut.levels :]))


def _scalar(program: Program, atom: Atom) -> Atom | None:
    """Trace an array back to the one number that fills it."""
    while program.spec(atom).shape:
        if isinstance(atom, Const) or program.makers.get(atom, (None,))[0] is None:
            return None
        op = program.makers[atom][0]
        if op.name not in ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze"):
            return None
        atom = op.inputs[0]
    return atom


def _is_zero(program: Program, atom: Atom) -> bool:
    scalar = _scalar(program, atom)
    if not isinstance(scalar, Const) or not isinstance(scalar.value, np.ndarray | np.generic | int | float):
        return False
    return not np.any(scalar.value)


def _moved(cut: Cut, op: Op, before: tuple[int, ...], shape: tuple[int, ...]) -> Cut | None:
    """Add a reindexing; a transpose that swaps a kernel's two sides becomes a swap of the factors."""
    if not cut.terms or (before == shape and op.name != "transpose"):
        return cut
    if op.name == "transpose":
        permutation = tuple(op.params["permutation"])
        if cut.levels == 0 and (swapped := _swapped(cut, permutation, shape)) is not None:
            return swapped
        aligned = cut.aligned and permutation[: cut.levels] == tuple(range(cut.levels))
        return replace(cut, moves=(*cut.moves, Move("transpose", permutation)), aligned=aligned, turn=_turn(cut, shape))
    if op.name == "broadcast_in_dim" and math.prod(before) != math.prod(shape):
        return None
    moves = (*cut.moves, Move("reshape", shape))
    if cut.levels == 0:
        if len(cut.moves) and cut.moves[-1].kind == "reshape":
            moves = (*cut.moves[:-1], Move("reshape", shape))
        return replace(cut, moves=moves, turn=shape)
    kept = shape[len(shape) - len(cut.turn) :] == cut.turn
    return replace(cut, moves=moves, aligned=cut.aligned and kept)


def _turn(cut: Cut, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[cut.levels :]


def _swapped(cut: Cut, permutation: tuple[int, ...], shape: tuple[int, ...]) -> Cut | None:
    pairs = [(term, term.kind) for term in cut.terms if isinstance(term.kind, Product) and term.kind.shape[0] == 1]
    if len(pairs) != len(cut.terms) or len(cut.moves) != 1:
        return None
    _, m, n = pairs[0][1].shape
    before = cut.moves[0].arg
    for split in range(1, len(before)):
        rolled = (*range(split, len(before)), *range(split)) == permutation
        if rolled and math.prod(before[:split]) == m and math.prod(before[split:]) == n:
            terms = tuple(replace(term, kind=replace(kind, swapped=not kind.swapped)) for term, kind in pairs)
            return replace(cut, terms=terms, moves=(Move("reshape", shape),), turn=shape)
    return None
