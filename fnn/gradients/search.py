"""Find what a gradient is a product of: the path from an output of a program back to its last products.

The search changes nothing. It goes back through reshapes, transposes, casts, scalar factors and sums over several uses,
out of loops over depth (which stack gradients) and over time (which sum them up). `cuts` then makes the operands that it
found outputs of the program. An example, three layers in a scan:

    def loss(w, x):                                      # w: float[3, 4, 4], one example x: float[4]
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)
        return jnp.sum(h)

The program of jax.grad(loss) ends in the loop of the backward pass, whose body, for one layer, ends in

    p = dot_general(d, h)                                # float[4, 4] from the error signal and the layer's input
    g = transpose(p)                                     # stacked by the loop: the gradient of w, float[3, 4, 4]

`search` finds, from the last to the first:

    Path(levels=1, turn=(4, 4), normed=True)             # out of one loop over depth, each turn makes float[4, 4]
      Source(Product(swapped=True), atoms=(d, h), steps=(Out(loop, "depth"),))

and `cuts.emit` gives the loop three more outputs: d and h stacked, float[3, 4] each, and the norms, float[3], which it
takes inside. The loop's own output g is then not needed, and `prune` drops it together with its products.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fnn.gradients.factors import Kind, Lookup, Move, Product, recognise
from fnn.gradients.operations import Atom, Const, Loop, Op, Program

REINDEXING = {"reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "broadcast_in_dim"}


@dataclass(frozen=True, eq=False)
class Out:
    """Factors leave a loop, stacked: over `depth`, where each turn has parameters of its own, or over `time`."""

    program: Program
    """That in which the loop stands."""
    loop: Loop
    level: str


@dataclass(frozen=True, eq=False)
class Scaled:
    """A scalar multiplies the error signals, or divides them."""

    program: Program
    by: Atom
    divide: bool


@dataclass(frozen=True, eq=False)
class Resized:
    """One axis of the first or the second factor gets zeros at its ends, or (negative numbers) loses its ends."""

    program: Program
    side: int
    axis: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Source:
    """One product: what made it, the names of its two factors, and the steps from there to the gradient."""

    kind: Kind
    atoms: tuple[Atom, Atom]
    steps: tuple[Out | Scaled | Resized, ...] = ()


@dataclass(frozen=True, eq=False)
class Path:
    """Where a gradient comes from: the sum of `sources`, which `moves` reindex into the gradient. No source means zero."""

    sources: tuple[Source, ...] = ()
    moves: tuple[Move, ...] = ()
    normed: bool = False
    """Whether the innermost loop over depth can take its norm."""
    levels: int = 0
    """How many loops over depth lie around it."""
    turn: tuple[int, ...] = ()
    """Shape of the gradient in one turn of the innermost of them."""
    aligned: bool = True
    """Whether the leading axes still count the turns, in order."""

    def then(self, step: Any, **changes: Any) -> "Path":
        """Add a step to every source."""
        return replace(self, sources=tuple(replace(s, steps=(*s.steps, step)) for s in self.sources), **changes)


def search(program: Program, atom: Atom) -> Path | None:
    """Search a gradient's last products; None if it is made in some other way. Errors: Unreadable."""
    op, index = maker(program, atom)
    if op is None or is_zero(program, atom):
        return Path() if is_zero(program, atom) else None
    shape = program.spec(atom).shape
    if isinstance(op, Loop):
        return _out_of_loop(program, op, index)
    if op.name in ("add_any", "add"):
        return _joined([search(program, a) for a in op.inputs])
    if op.name in ("mul", "div", "neg"):
        return _scaled(program, op, shape)
    if op.name in REINDEXING:
        if np.issubdtype(program.spec(op.inputs[0]).dtype, np.complexfloating):
            return None  # the real part of a complex product is no product of real parts
        path = search(program, op.inputs[0])
        return None if path is None else _moved(path, op, program.spec(op.inputs[0]).shape, shape)
    if op.name in ("slice", "split", "pad", "concatenate"):
        return _part(program, op, index, shape)
    kind = recognise(op.name, op.params, [program.spec(a) for a in op.inputs], program.spec(atom))
    if kind is None or (len(op.inputs) == 3 and not is_zero(program, op.inputs[0])):
        return None
    a, d = op.inputs[-2:]
    return Path((Source(kind, (a, d)),), kind.moves, turn=shape)


def maker(program: Program, atom: Atom) -> tuple[Op | None, int]:
    """Give the operation that makes a value, and which of its results that is; None for inputs and constants."""
    return (None, 0) if isinstance(atom, Const) else program.makers.get(atom, (None, 0))


def is_zero(program: Program, atom: Atom) -> bool:
    """Whether a value is an array of zeros that is written as such."""
    scalar = _scalar(program, atom)
    if not isinstance(scalar, Const) or not isinstance(scalar.value, np.ndarray | np.generic | int | float):
        return False
    return not np.any(scalar.value)


def _out_of_loop(program: Program, loop: Loop, index: int) -> Path | None:
    body, atom = loop.body, loop.body.outputs[index]
    if index >= loop.carries:
        path = search(body, atom)
        if path is None or not path.sources:
            return None
        moves = tuple(replace(move, lead=move.lead + 1) for move in path.moves)
        normed = path.normed if path.levels else True
        return path.then(Out(program, loop, "depth"), moves=moves, normed=normed, levels=path.levels + 1)
    own = body.inputs[loop.consts + index]
    addends = _addends(body, atom)
    reads = [a for op in body.ops for a in op.inputs].count(own) + body.outputs.count(own)
    if addends.count(own) != 1 or reads != 1:
        return None  # not a sum over the turns: the carry is used for something else as well
    turn = _joined([search(body, a) for a in addends if a != own])
    if turn is None:
        return None
    start = search(program, loop.inputs[loop.consts + index])
    return _joined([start, turn.then(Out(program, loop, "time"), normed=False)])


def _addends(program: Program, atom: Atom) -> list[Atom]:
    op, _ = maker(program, atom)
    if op is None or op.name not in ("add_any", "add"):
        return [atom]
    return [a for part in op.inputs for a in _addends(program, part)]


def _joined(paths: Sequence[Path | None]) -> Path | None:
    """Add gradients: products of one form are one product with more positions."""
    present = [path for path in paths if path is not None and path.sources]
    if None in paths:
        return None
    if len(present) <= 1:
        return present[0] if present else Path()
    first = present[0]
    a = first.sources[0].kind
    for path in present[1:]:
        b = path.sources[0].kind
        same = all(getattr(path, name) == getattr(first, name) for name in ("moves", "levels", "turn", "aligned"))
        if not same or a.shape != b.shape or isinstance(a, Lookup) != isinstance(b, Lookup):
            return None
    return replace(first, sources=tuple(source for path in present for source in path.sources), normed=False)


def _scaled(program: Program, op: Op, shape: tuple[int, ...]) -> Path | None:
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
    path = search(program, gradient)
    return None if path is None else path.then(Scaled(program, by, op.name == "div"))


def _part(program: Program, op: Op, index: int, shape: tuple[int, ...]) -> Path | None:
    """Crop or fill up the factors, where a parameter is one part of a larger array or is used in parts."""
    before = program.spec(op.inputs[0]).shape
    if op.name == "concatenate":
        paths, start, axis = [], 0, op["dimension"]
        for a in op.inputs:
            part = program.spec(a).shape
            change = {axis: (start, shape[axis] - start - part[axis])}
            paths.append(_resized(program, search(program, a), part, change))
            start += part[axis]
        return _joined(paths)
    if op.name == "pad":
        if any(inner for *_, inner in op["padding_config"]) or not is_zero(program, op.inputs[1]):
            return None
        change = {i: (low, high) for i, (low, high, _) in enumerate(op["padding_config"]) if low or high}
    elif op.name == "split":
        start = sum(op["sizes"][:index])
        axis = op["axis"]
        change = {axis: (-start, start + shape[axis] - before[axis])}
    else:
        if any(stride != 1 for stride in op["strides"] or ()):
            return None
        ends = zip(before, op["start_indices"], op["limit_indices"], strict=True)
        change = {i: (-start, stop - size) for i, (size, start, stop) in enumerate(ends) if start or stop != size}
    return _resized(program, search(program, op.inputs[0]), before, change)


def _resized(program: Program, path: Path | None, before: tuple[int, ...], change: dict[int, Any]) -> Path | None:
    """Add rows and columns of zeros to a product, or (negative numbers) take some away."""
    if path is None or not path.sources or not change:
        return path
    if len(path.moves) != 1 or path.moves[0].arg != before[path.levels :] or min(change) < path.levels:
        return None
    shape = tuple(size + sum(change.get(i, (0, 0))) for i, size in enumerate(before))[path.levels :]
    sources = []
    for source in path.sources:
        kind, steps = source.kind, list(source.steps)
        if not isinstance(kind, Product) or kind.result != before[path.levels :]:
            return None  # behind a reshape an axis is no longer one axis of an operand
        shapes = [list(kind.left), list(kind.right)]
        for axis, (low, high) in change.items():
            found = kind.side(axis - path.levels)
            if found is None:
                return None
            side, place = found
            shapes[side][place] += low + high
            steps.append(Resized(program, side, place, low, high))
        kind = replace(kind, left=tuple(shapes[0]), right=tuple(shapes[1]))
        sources.append(replace(source, kind=kind, steps=tuple(steps)))
    moves = (replace(path.moves[0], arg=shape),)
    return replace(path, sources=tuple(sources), moves=moves, normed=False, turn=shape)


def _scalar(program: Program, atom: Atom) -> Atom | None:
    """Trace an array back to the one number that fills it."""
    while program.spec(atom).shape:
        op, _ = maker(program, atom)
        if op is None or op.name not in ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze"):
            return None
        atom = op.inputs[0]
    return atom


def _moved(path: Path, op: Op, before: tuple[int, ...], shape: tuple[int, ...]) -> Path | None:
    """Add a reindexing; a transpose that swaps a kernel's two sides becomes a swap of the factors."""
    if not path.sources or (before == shape and op.name != "transpose"):
        return path
    if op.name == "transpose":
        permutation = tuple(op["permutation"])
        if path.levels == 0 and (swapped := _swapped(path, permutation, shape)) is not None:
            return swapped
        aligned = path.aligned and permutation[: path.levels] == tuple(range(path.levels))
        moves = (*path.moves, Move("transpose", permutation))
        return replace(path, moves=moves, aligned=aligned, turn=shape[path.levels :])
    if op.name == "broadcast_in_dim" and math.prod(before) != math.prod(shape):
        return None
    moves = (*path.moves, Move("reshape", shape))
    if path.levels == 0:
        if path.moves and path.moves[-1].kind == "reshape":
            moves = (*path.moves[:-1], Move("reshape", shape))
        return replace(path, moves=moves, turn=shape)
    kept = shape[len(shape) - len(path.turn) :] == path.turn
    return replace(path, moves=moves, aligned=path.aligned and kept)


def _swapped(path: Path, permutation: tuple[int, ...], shape: tuple[int, ...]) -> Path | None:
    kinds = [s.kind for s in path.sources if isinstance(s.kind, Product) and s.kind.shape[0] == 1]
    if len(kinds) != len(path.sources) or len(path.moves) != 1:
        return None
    _, m, n = kinds[0].shape
    before = path.moves[0].arg
    for split in range(1, len(before)):
        rolled = (*range(split, len(before)), *range(split)) == permutation
        if rolled and math.prod(before[:split]) == m and math.prod(before[split:]) == n:
            pairs = zip(path.sources, kinds, strict=True)
            sources = tuple(replace(s, kind=replace(kind, swapped=not kind.swapped)) for s, kind in pairs)
            return replace(path, sources=sources, moves=(Move("reshape", shape),), turn=shape)
    return None
