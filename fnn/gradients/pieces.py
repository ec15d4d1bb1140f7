"""A program's sums of padded arrays that do not overlap, written as one concatenation.

The gradient of `w[0]`, `w[1]`, ... in `w` is a sum of arrays as large as w, each zero but for one layer: a sum of n arrays of
n layers. Side by side the layers cost nothing, and each keeps its exponent.
"""

import itertools
from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from fnn.gradients.operations import Atom, Const, Op, Program, prune

Piece = tuple[int, int, Atom]
"""The first row, the row behind the last, and what lies there."""


def joined(program: Program) -> Program:
    """Write sums of disjoint padded arrays as operations `join_rows`; all that is still needed keeps its variable."""
    used = Counter(atom for op in program.ops for atom in op.inputs if not isinstance(atom, Const))
    used.update(atom for atom in program.outputs if not isinstance(atom, Const))
    pieces: dict[Atom, list[Piece]] = {}
    ops = []
    for op in program.ops:
        found = _padded(program, op) or _added(op, pieces, used)
        if found:
            pieces[op.outputs[0]] = found
        ops.append(_join(program, op, found) if len(found) > 1 else op)
    return prune(replace(program, ops=ops))


def _padded(program: Program, op: Op) -> list[Piece]:
    """The one piece of an array that is padded with rows of zeros, or none."""
    if op.name != "pad" or not op.params["padding_config"] or not isinstance(op.inputs[1], Const):
        return []
    (low, high, between), *others = op.params["padding_config"]
    if np.any(op.inputs[1].value) or min(low, high) < 0 or between or np.any(others):
        return []
    return [(int(low), program.spec(op.outputs[0]).shape[0] - int(high), op.inputs[0])]


def _added(op: Op, pieces: dict[Atom, list[Piece]], used: Counter) -> list[Piece]:
    """The pieces of a sum of two such arrays that nobody else reads, if they do not overlap, or none."""
    if op.name not in ("add", "add_any") or any(isinstance(a, Const) or used[a] > 1 for a in op.inputs):
        return []
    a, b = (pieces.get(atom, []) for atom in op.inputs)
    both = sorted([*a, *b], key=lambda piece: piece[0])
    apart = all(stop <= start for (_, stop, _), (start, _, _) in itertools.pairwise(both))
    return both if a and b and apart else []


def _join(program: Program, op: Op, pieces: list[Piece]) -> Op:
    spec = program.spec(op.outputs[0])
    stops = [0, *(stop for _, stop, _ in pieces)]
    starts = [*(start for start, _, _ in pieces), spec.shape[0]]
    gaps = [start - stop for start, stop in zip(starts, stops, strict=True)]

    def call(*values):
        empty = [jnp.zeros((gap, *spec.shape[1:]), spec.dtype) for gap in gaps]
        return [jnp.concatenate([x for pair in zip(empty, [*values, empty[-1][:0]], strict=True) for x in pair])]

    return replace(op, name="join_rows", params={"gaps": gaps}, inputs=[x for *_, x in pieces], call=call)
