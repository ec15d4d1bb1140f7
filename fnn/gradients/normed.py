"""Kernels that are divided by a number made of them, as in spectral normalization: still that parameter, and no layers inside."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fnn.gradients.operations import Atom, Const, Op, Program, reached
from fnn.gradients.softmax import SAME

SHAPES = SAME | {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}


class Normed:
    """The operations of a program that scale a parameter by a number which depends on that parameter."""

    def __init__(self, program: Program):
        self.program = program
        self.ops: list[Op] = []
        self._behind: dict[int, set[int]] = {}

    def scaled(self, part: Program, op: Op, held: Sequence[Any]) -> Any:
        """Return what an operation multiplies by such a number, or divides by it, and note the operation; None if it does not.

        `held` says of each input which parameter it is made of (`.parameter`), or None.
        """
        if op.name not in ("mul", "div") or [own is None for own in held].count(True) != 1:
            return None
        own, by = (held[0], op.inputs[1]) if held[0] is not None else (held[1], op.inputs[0])
        if isinstance(by, Const) or (op.name == "div" and held[0] is None):
            return None
        if self._depends(part, by, own.parameter):
            self.ops.append(op)
            return own
        return None

    def _depends(self, part: Program, by: int, parameter: int) -> bool:
        atom: Atom = by
        while not isinstance(atom, Const) and part.spec(atom).size > 1:
            made, _ = part.makers.get(atom, (None, 0))
            if made is None or made.name not in SHAPES:
                return False
            atom = made.inputs[0]
        if parameter not in self._behind:  # only now: it walks through the whole program
            self._behind[parameter] = reached(self.program, [self.program.inputs[parameter]], closed=False)
        return atom in self._behind[parameter]

    def only_norms(self, product: int) -> bool:
        """Whether the loss depends on a product through such numbers alone, so that it is no layer's output."""
        if not self.ops or product not in self.program.makers:
            return False
        (loss, *_), known = self.program.outputs, {id(op) for op in self.ops}
        without = replace(self.program, ops=[op for op in self.program.ops if id(op) not in known])
        return loss in reached(self.program, [product], closed=False) - reached(without, [product], closed=False)
