"""Run a program on arrays of which some have exponents: operation by operation, each by its rule."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.gradients import powers
from fnn.gradients.known import NOTHING, Known, learned
from fnn.gradients.operations import Const, Loop, Op, Program, Unreadable
from fnn.gradients.powers import Scaled

Note = Callable[[Mapping[int, Any]], dict[str, Any]]
"""Sees the values made so far, by their variables, some of them `Scaled`; returns small arrays by name."""
Rule = Callable[["Run", Op, list[Any]], list[Any]]
"""`(run, op, inputs) -> outputs`, where some input is `Scaled`: what the operation gives on the numbers themselves, with
whatever exponents are convenient. It may assume that the seed enters the values linearly, or raise `Unreadable`."""
NONLINEAR = {
    *("exp", "exp2", "expm1", "log1p", "pow", "cbrt", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
    *("round", "floor", "ceil", "rem", "nextafter", "cumprod", "cumlogsumexp", "one_minus_square", "polynomial"),
}
"""Where exponents are undone without a warning: known not to be linear."""


@dataclass
class Frame:
    """What a run knows in one body of a loop, whose values must not leave it."""

    normal: dict[int, tuple[Any, Scaled]] = field(default_factory=dict)
    """Values, by their identity, and what they are once normalised."""
    known: dict[int, tuple[Any, Known]] = field(default_factory=dict)
    """Plain arrays, by their identity, of which something is known."""
    found: dict[str, Any] = field(default_factory=dict)
    """What leaves it, by name: notes, and under the names of places whether numbers were lost."""


class Run:
    """Execute a program on values of which some are `Scaled`.

    `notes` are called with the values made so far, where the variables that are their keys are made: those of the program
    and of the bodies of its scans, which `read` gives one number each. Prune a program before you choose variables.
    """

    def __init__(self, rules: Mapping[str, Rule], notes: Mapping[int, Note] | None = None):
        self.rules, self.notes = rules, notes or {}
        self.undone_at: dict[tuple[str, str], None] = {}
        self.frame = Frame()
        self.around = ""

    @property
    def places(self) -> list[tuple[str, str]]:
        """Where exponents were undone: (operation, name stack and line)."""
        return list(self.undone_at)

    @property
    def lost(self) -> dict[str, jax.Array]:
        """Whether numbers left the range of the dtype where an exponent was undone, by place: bool[]."""
        return {name: self.frame.found[name] for name in map(_at, self.undone_at) if name in self.frame.found}

    @property
    def noted(self) -> dict[str, Any]:
        """What the notes returned, by name, with one leading axis for each scan around."""
        places = set(map(_at, self.undone_at))
        return {name: value for name, value in self.frame.found.items() if name not in places}

    def execute(self, program: Program, values: Sequence[Any], where: str = "") -> list[Any]:
        """Return the outputs, `Scaled` where they depend on a `Scaled` input through something linear.

        `where` is the name stack around the program.
        """
        known = dict(zip(program.inputs, values, strict=True))
        outer, self.around = self.around, "/".join(filter(None, (self.around, where)))

        def value(atom):
            x = atom.value if isinstance(atom, Const) else known[atom]
            return self.frame.normal[id(x)][1] if id(x) in self.frame.normal else x

        def note(variables):
            for variable in variables if self.notes else ():
                if variable in self.notes:
                    self.frame.found.update(self.notes[variable](known))

        note(program.inputs)
        for op in program.ops:
            inputs = [value(atom) for atom in op.inputs]
            if any(isinstance(x, Scaled) for x in inputs):
                outputs = self._by_rule(op, inputs)
            elif self.notes and isinstance(op, Loop) and _holds(op.body, self.notes):
                outputs = self.rules["scan"](self, op, inputs)
            else:
                outputs = op.call(*inputs)
                self._learn(op, inputs, outputs)
            known.update(zip(op.outputs, outputs, strict=True))
            note(op.outputs)
        self.around = outer
        return [value(atom) for atom in program.outputs]

    def _by_rule(self, op: Op, inputs: list[Any]) -> Sequence[Any]:
        try:
            return self.rules.get(op.name, Run.undone)(self, op, inputs)
        except Unreadable:  # its parameters have other names in this version of JAX
            return self.undone(op, inputs)

    def undone(self, op: Op, inputs: Sequence[Any]) -> list[Any]:
        """An operation that is not linear, or not known: on the numbers themselves, NaN where they leave the range."""
        place = op.name, "/".join(filter(None, (self.around, op.where))) + line_of(op)
        if op.name not in NONLINEAR and place not in self.undone_at:
            warnings.warn(
                f"exact gradients: the operation {op.name} ({place[1]}) is not known to be linear, so that its inputs lose "
                "their exponents: what leaves the range of the dtype there is NaN",
                stacklevel=2,
            )
        self.undone_at[place] = None
        values, lost = zip(*map(powers.plain, inputs), strict=True)
        some = [flags for x, flags in zip(inputs, lost, strict=True) if isinstance(x, Scaled)]
        self.add({_at(place): functools.reduce(jnp.logical_or, map(jnp.any, some))})
        # The NaN of an operand need not arrive: on a CPU XLA bounds the operand of exp by minima that leave NaN out.
        return [functools.reduce(_nan_where, some, out) for out in op.call(*values)]

    def about(self, x: Any) -> Known:
        """What is known of a plain value while the program is traced."""
        if isinstance(x, np.ndarray | np.generic | int | float) and not np.ndim(x):
            return Known.of(abs(complex(x)) if np.iscomplexobj(x) else float(x))
        return self.frame.known[id(x)][1] if id(x) in self.frame.known else NOTHING

    def _learn(self, op: Op, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        if outputs and inputs:
            found = learned(op, list(map(self.about, inputs)), outputs[0].dtype, not np.ndim(inputs[0]))
            if found is not NOTHING:
                self.frame.known[id(outputs[0])] = (outputs[0], found)

    def tidy(self, x: Scaled) -> Scaled:
        """Normalise what may have moved, once for all who ask."""
        if not x.slack:
            return x
        if id(x) not in self.frame.normal:
            self.frame.normal[id(x)] = (x, powers.normal(x))
        return self.frame.normal[id(x)][1]

    def aligned(self, inputs: Sequence[Any], axes: int | None = None) -> tuple[list[Any], jax.Array, float]:
        """Give all floating inputs one exponent: (values, exponent, slack). Zero and infinities need none."""

        def scale_free(x):
            number = self.about(x).number
            return number is not None and (number == 0 or not np.isfinite(number))

        return powers.aligned(inputs, axes, scale_free, self.tidy)

    def apart(self, function: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """Run a function in a frame of its own: (what it returns, what leaves the frame)."""

        def inside(*args):
            outer, self.frame = self.frame, Frame()
            around = self.around
            try:
                return function(*args), self.frame.found
            finally:
                self.frame, self.around = outer, around

        return inside

    def add(self, found: dict[str, Any], turns: bool = False) -> None:
        """Take what left an inner frame: notes as they are, and whether numbers were lost in any of the turns."""
        places = set(map(_at, self.undone_at))
        for name, value in found.items():
            if name in places:
                value = jnp.any(value) if turns else value
                value |= self.frame.found.get(name, False)
            self.frame.found[name] = value


def _holds(program: Program, variables: Mapping[int, Any]) -> bool:
    """Whether a program or the loops in it make one of some variables."""
    made = {*program.inputs, *(output for op in program.ops for output in op.outputs)}
    return not made.isdisjoint(variables) or any(
        _holds(op.body, variables) for op in program.ops if isinstance(op, Loop)
    )


def _nan_where(out: Any, lost: jax.Array) -> Any:
    """Put NaN where a number of an operand was lost; everywhere, where the shapes do not say which entry it went into."""
    if not jnp.issubdtype(out.dtype, jnp.inexact):
        return out
    return jnp.where(lost if lost.shape == out.shape else jnp.any(lost), jnp.nan, out).astype(out.dtype)


def _at(place: tuple[str, str]) -> str:
    return f"{place[0]} in {place[1]}"


def line_of(op: Op) -> str:
    """The innermost line of the traceback that is neither JAX's nor fnn's: " at net.py:12"."""
    inner = tuple(os.path.dirname(module.__file__ or "") for module in (jax, sys.modules["fnn"]))
    for frame in getattr(op.line, "frames", ()):
        line = getattr(frame, "start_line", getattr(frame, "line_num", None))
        if line and not frame.file_name.startswith(inner):
            return f" at {os.path.basename(frame.file_name)}:{line}"
    return ""
