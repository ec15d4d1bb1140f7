"""Label what was seen of a loss: each number gets a quantity, a path and a place in forward order."""

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from fnn.gradients import reductions
from fnn.gradients.forward_range import Spot
from fnn.gradients.operations import Program, reached
from fnn.gradients.places import Found, Place
from fnn.gradients.readings import Flow, Labels, Series
from fnn.gradients.softmax import Softmax, Turns

GROUPS = ("gradient", "error", "activation", "kurtosis", "saturated", "rank", "cosine", "attention")
DEFAULT = GROUPS[:3]
MOMENTS = ("mean", "second_moment", "dead")
QUANTITIES = {
    "gradient": ("log10_gradient", "log10_gradient_rms"),
    "error": ("log10_error", "log10_error_norm"),
    "activation": tuple(f"{side}_{name}" for side in ("input", "output") for name in MOMENTS),
    "kurtosis": ("input_kurtosis", "output_kurtosis"),
    "saturated": ("input_saturated",),
    "rank": ("input_rank", "output_rank"),
    "cosine": ("cosine", "log10_gradient_to_weight"),
    "attention": ("largest_logit", "attention_entropy"),
}
"""What each group measures; `Flow` says what these are."""
MARK = "fnn.error."


@dataclass(frozen=True)
class Options:
    """What `watch` measures; see there."""

    has_aux: bool
    axis_name: Any
    only: str
    groups: tuple[str, ...]
    weighted: bool
    exact: bool = True
    """Whether the gradient runs with exponents; else its numbers are those of a plain one, and what is too small is NaN."""

    def wants(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.only)


@dataclass(frozen=True)
class Subject:
    """A traced loss with its layers."""

    forward: Program
    value: Any
    """Specs of (loss, aux)."""
    found: Found
    names: list[str]
    """Paths of the parameters."""
    axes: list[int]
    """How many leading axes of each parameter count layers."""
    every: list[Place]
    """All places, also those that are not wanted: what they lose, gradients lack."""


class _Numbers:
    """Numbers and their labels, one after the other; NaN where they depend on activations that are `lost`.

    They are joined before anything is done to them: XLA would repeat for each number what all of them depend on.
    """

    def __init__(self, lost: jax.Array) -> None:
        self.all_lost = lost
        self.series: list[Series] = []
        self.mantissas: list[jax.Array] = []
        self.exponents: list[jax.Array] = []
        self.lost: list[jax.Array] = []

    def add(self, label: Series, value: Any, lost: jax.Array | None = None) -> None:
        m, e = value if isinstance(value, tuple) else (value, jnp.zeros((), jnp.int32))
        shape, lost = jnp.shape(m), self.all_lost if lost is None else lost
        self.series.append(label)
        for part, kept in ((m, self.mantissas), (e, self.exponents), (lost, self.lost)):
            kept.append(jnp.broadcast_to(part, shape).reshape(label.size))

    def mark(self, label: Series) -> None:
        """Say where a layer stands, whatever is measured of it."""
        self.series.append(label)

    def flow(self, loss: jax.Array, notes: Sequence[str], exact: bool) -> Flow:
        m = jnp.concatenate([jnp.zeros(0), *self.mantissas])
        e = jnp.concatenate([jnp.zeros(0, jnp.int32), *self.exponents])
        m = jnp.where(jnp.concatenate([jnp.zeros(0, bool), *self.lost]), jnp.nan, m)
        if m.dtype == jnp.float64:  # float32 may not hold it
            m, more = jnp.frexp(m)
            e = e + more
        return Flow(loss, m.astype(jnp.float32), e, Labels(tuple(self.series), tuple(notes), exact))


def assembled(
    options: Options, subject: Subject, wanted: Sequence[int], size: int, seen: dict[str, Any], params: Any, loss: Any
) -> Flow:
    """Label everything that was seen; its seven arguments are what labels are made of."""
    numbers, found = _Numbers(seen["lost"]), subject.found
    leaves = jax.tree.leaves(params)
    moved = reached(subject.forward, subject.forward.inputs[: len(leaves)], closed=False, derivatives=True)
    for i, place in enumerate(found.places):
        label = _label(place, subject.names[place.parameter])
        numbers.mark(label)
        time = tuple(k for k, turn in enumerate(place.turns) if not turn.depth)
        if "error" in options.groups and place.product in moved:  # else JAX computes none: all before it is frozen
            none = (jnp.zeros(label.lengths), jnp.full(label.lengths, reductions.LOWEST))
            error = seen.get(f"{MARK}{i}")
            error = none if error is None else reductions.joined(error, time, 2)
            name, shift = ("log10_error", 0.5 * math.log10(size)) if size else ("log10_error_norm", 0.0)
            numbers.add(replace(label, quantity=name, shift=shift), error)
        for side, variable in (("input", place.input), ("output", place.output)):
            for name, value in _of_side(side, variable, place, seen, time):
                known = f"lost.{variable}" in seen
                lost = jnp.any(seen[f"lost.{variable}"], axis=time) if known else jnp.zeros((), bool)
                numbers.add(replace(label, quantity=f"{side}_{name}"), value, lost)
    for i in wanted:
        for label, row in _labels_of(found, i, subject.names[i], leaves[i], subject.axes[i]):

            def add(quantity, value, shift=0.0, label=label, row=row):
                value = value if row is None else jax.tree.map(lambda a: a[row], value)
                numbers.add(replace(label, quantity=quantity, shift=shift), value)

            if "gradient" in options.groups:
                count = math.prod(leaves[i].shape[subject.axes[i] :])
                add("log10_gradient", seen[f"gradient.{i}"])
                add("log10_gradient_rms", seen[f"gradient.{i}"], -0.5 * math.log10(max(1, count)))
            if "cosine" in options.groups:
                add("cosine", seen[f"cosine.{i}"])
                add("log10_gradient_to_weight", seen[f"ratio.{i}"])
    for i, softmax in enumerate(found.softmaxes if "attention" in options.groups else []):
        label = _label_of_softmax(found, softmax, subject.names, seen[f"attention.{i}"]["largest"])
        for name, quantity in (("largest", "largest_logit"), ("entropy", "attention_entropy")):
            time = [k for k, turn in enumerate(softmax.turns) if not turn.depth]
            value = seen[f"attention.{i}"][name]
            value = jnp.max(value, axis=time) if name == "largest" else jnp.mean(value, axis=time)
            numbers.add(replace(label, quantity=quantity), value)
    return numbers.flow(loss, [], options.exact)


def spots(subject: Subject, dtypes: dict[int, Any]) -> Iterator[tuple[int, Spot]]:
    """Label every value whose range is watched: (variable, its place)."""
    for place in subject.every:
        depth, label = tuple(turn.depth for turn in place.turns), _label(place, subject.names[place.parameter])
        for variable in (place.input, place.output):
            if variable in dtypes:
                yield variable, Spot(label, place.parameter, variable == place.output, depth, str(dtypes[variable]))


def _of_side(side: str, variable: Any, place: Place, seen: Any, time: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if f"moments.{variable}" in seen:
        for name, value in seen[f"moments.{variable}"].items():
            dead = name == "dead"
            yield name, jnp.mean(jnp.min(value, axis=time), axis=-1) if dead else reductions.joined(value, time)
    if f"central.{variable}" in seen:
        parts, k = seen[f"central.{variable}"]
        yield "kurtosis", reductions.kurtosis(parts, k, time)
    if f"rank.{variable}" in seen:
        yield "rank", jnp.mean(seen[f"rank.{variable}"], axis=time)
    if side == "input" and f"saturated.{variable}" in seen and any(place.bounds):
        value, (first, others) = seen[f"saturated.{variable}"], place.bounds
        if first != others:  # the first turn's input comes from elsewhere
            axis, turn = len(place.turns) - 1, place.turns[-1]
            index = turn.length - 1 if turn.backwards else 0
            which = jnp.arange(turn.length) == index
            value = jnp.where(which.reshape((-1,) + (1,) * (value.ndim - 1 - axis)), jnp.nan, value)
        yield "saturated", jnp.nanmean(value, axis=time) if time else value


def _label(place: Place, path: str) -> Series:
    for row in place.rows:
        path = _row_of(path, row)
    recurrent = any(not turn.depth for turn in place.turns)
    return Series("", path, *_turns(place.turns, place.order), starts=True, recurrent=recurrent)


def _labels_of(found: Found, i: int, path: str, leaf: jax.Array, axes: int) -> Iterator[tuple[Series, int | None]]:
    """Label the gradient of a parameter by where it is first used; in parts, if its entries are used one by one."""
    lengths, use = leaf.shape[:axes], found.uses.get(i)
    if use is None:
        yield Series("", path, lengths, (2**30, *[None] * axes), tuple((k, False) for k in range(axes)), False), None
    elif axes == 1 and set(use.rows) == {(row,) for row in range(leaf.shape[0])}:
        for (row,), order in use.rows.items():
            yield Series("", _row_of(path, row), *_turns(use.turns, order), starts=False), row
    else:
        lengths_of, order, turns = _turns(use.turns, use.order)
        if lengths_of != lengths:
            order = tuple(0 if number is None else number for number in use.order)
            order, turns = (*order, *[None] * axes), tuple((k, False) for k in range(axes))
        yield Series("", path, lengths, order, turns, False), None


def _row_of(path: str, row: int) -> str:
    return path.replace("[:]", f"[{row}]", 1) if "[:]" in path else f"{path}[{row}]"


def _label_of_softmax(found: Found, softmax: Softmax, names: Sequence[str], value: jax.Array) -> Series:
    near = [names[i].split("/") for i in softmax.near]
    shared = [a for a, *others in zip(*near, strict=False) if all(a == b for b in others)] if near else []
    path, heads = "/".join(shared) or "softmax", value.shape[-1]
    lengths, order, turns = _turns(softmax.turns, softmax.order)
    return Series("", path, lengths, order, turns, starts=False, heads=heads)


def _turns(turns: Sequence[Turns], order: Sequence[Any]) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Give lengths of the loops over layers, the order, and which loop each None in it is."""
    lengths = tuple(turn.length for turn in turns if turn.depth)
    number = iter(range(len(lengths)))
    marks = tuple((next(number) if turn.depth else None, turn.backwards) for turn in turns)
    return lengths, tuple(order), marks
