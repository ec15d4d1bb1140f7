"""The pairing of a net's layers with the modules of another library.

A slot is one layer: its arrays by name, in fnn's layout. Another library's weights come as groups, one a module, each with
one or more readings: the arrays that they would be in a layer of some kind. A slot and a reading fit if their kinds, names
and shapes are equal; among those that fit, order decides, and what order cannot decide is refused.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fnn.training.weights_layers import Arrays, Slot


@dataclass(frozen=True)
class Reading:
    """What a group of arrays would be in a layer of some kind, and how to write such a layer's arrays as the group has them."""

    kind: str
    arrays: Arrays
    write: Callable[[Arrays], Arrays]
    size: int | None = None


@dataclass(frozen=True)
class Group:
    """The arrays of one module, by their names in it; `entries` are their whole names."""

    name: str
    arrays: Arrays
    entries: dict[str, str]
    readings: Callable[[Arrays], list[Reading]] = field(repr=False, default=lambda arrays: [])
    stackable: bool = False
    """Whether it may be many modules of one kind, stacked along a first axis."""
    index: int | None = None
    """Which of such a stack it is."""
    by_name: bool = False
    """Whether its file seems to be sorted by name, so that the order of modules says nothing."""


class Pair(NamedTuple):
    """A layer, and the group that holds its weights."""

    slot: Slot
    group: Group
    reading: Reading


class Report(tuple[tuple[str, str, str], ...]):
    """What went where: rows of (path of a layer, its arrays, name of the module there). Prints as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        widths = [max(map(len, column), default=0) for column in list(zip(*self, strict=True))[:2]]
        return "\n".join("  ".join(f"{a:<{w}}" for a, w in zip(row, [*widths, 0], strict=True)) for row in self)


Signature = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


def signature(kind: str, arrays: Arrays) -> Signature:
    """What must be equal for weights to fit: the kind of a layer, and the names and shapes of its arrays."""
    return kind, tuple(sorted((name, tuple(np.shape(a))) for name, a in arrays.items()))


def shown(arrays: Arrays) -> str:
    """Write names and shapes: `kernel [64,10], bias [10]`."""
    return ", ".join(f"{name} [{','.join(map(str, np.shape(a)))}]" for name, a in arrays.items())


def brief(slot: Slot) -> str:
    """Write names and shapes for a table: of attention those of the kernels."""
    if slot.kind != "attention":
        return shown(slot.arrays)
    return shown({name.removesuffix("/kernel"): a for name, a in slot.arrays.items() if name.endswith("/kernel")})


def pairs(
    who: str,
    ours: Sequence[Slot],
    theirs: Sequence[Group],
    names: Mapping[str, str | None] | None,
    order: Callable[[str, list[Group]], list[Group]],
) -> list[Pair]:
    """Pair each layer with a group; `order` sorts groups among which shapes do not decide, or refuses to.

    Errors: ValueError that names what has no partner, or more than one.
    """
    place = {id(slot): i for i, slot in enumerate(ours)}
    found, ours, theirs = [], list(ours), list(theirs)
    for path, name in (names or {}).items():
        slot = _one(who, "path", path, ours, lambda slot: slot.path)
        ours.remove(slot)
        if name is None:
            continue
        theirs = _opened(theirs, {signature(slot.kind, slot.arrays)})
        group = _one(who, "entry", name, theirs, lambda group: group.name)
        theirs.remove(group)
        found.append(_pair(who, slot, group))
    wanted = {signature(slot.kind, slot.arrays) for slot in ours}
    theirs = _opened(theirs, wanted)
    fits = {id(group): [s for s in _signatures(group) if s in wanted] for group in theirs}
    pools = {s: {s} for s in wanted}
    for group in theirs:
        joined = set().union(*(pools[s] for s in fits[id(group)]))
        pools |= dict.fromkeys(joined, joined)
    left: tuple[list[Slot], list[Group]] = ([], [group for group in theirs if not fits[id(group)]])
    for pool in {id(pool): pool for pool in pools.values()}.values():
        mine = [slot for slot in ours if signature(slot.kind, slot.arrays) in pool]
        others = [group for group in theirs if set(fits[id(group)]) & pool]
        if len(mine) != len(others):
            left[0].extend(mine)
            left[1].extend(others)
            continue
        found += [_pair(who, slot, group) for slot, group in zip(mine, order(who, others), strict=True)]
    if any(left):
        mine, others = ("; ".join(itertools.islice(_texts(part), 8)) or "none" for part in left)
        raise ValueError(
            f"{who}: each layer must have one module of its kind and shapes, got layers {mine}, and modules {others}; build "
            "the net with the same widths and biases, drop what it does not have, or pass names={path: module}"
        )
    return sorted(found, key=lambda pair: place[id(pair.slot)])


def _texts(parts: Sequence[Any]) -> Iterator[str]:
    yield from (f"{getattr(p, 'path', getattr(p, 'name', ''))} ({shown(p.arrays)})" for p in parts)


def _one(who: str, what: str, name: str, among: list[Any], label: Callable[[Any], str]) -> Any:
    found = [part for part in among if label(part) == name]
    if len(found) != 1:
        have = ", ".join(map(label, among[:8]))
        raise ValueError(
            f"{who}: names= must hold each {what} once and as the report writes it, got {name!r}; left: {have}"
        )
    return found[0]


def _signatures(group: Group) -> list[Signature]:
    return [signature(r.kind, r.arrays) for r in group.readings(group.arrays)]


def _opened(groups: list[Group], wanted: set[Signature]) -> list[Group]:
    """Cut groups of stacked modules into single ones, where only these fit."""
    result = []
    for group in groups:
        lengths = {a.shape[:1] for a in group.arrays.values()}
        if group.stackable and len(lengths) == 1 and (length := lengths.pop()):
            blocks = [
                dataclasses.replace(
                    group,
                    name=f"{group.name}/[{i}]",
                    arrays={n: a[i] for n, a in group.arrays.items()},
                    stackable=False,
                    index=i,
                )
                for i in range(*length)
            ]
            if wanted.intersection(_signatures(blocks[0])) and not wanted.intersection(_signatures(group)):
                result += blocks
                continue
        result.append(group)
    return result


def _pair(who: str, slot: Slot, group: Group) -> Pair:
    wanted = signature(slot.kind, slot.arrays)
    reading = next((r for r in group.readings(group.arrays) if signature(r.kind, r.arrays) == wanted), None)
    if reading is None:
        raise ValueError(
            f"{who}: {slot.path}, {slot.kind} with {shown(slot.arrays)}, does not fit {group.name}, {shown(group.arrays)}; "
            "pass names={path: module}"
        )
    if reading.size not in (None, slot.size):
        raise ValueError(
            f"{who}: heads must have the same size on both sides, got {slot.size} at {slot.path} and {reading.size} in "
            f"{group.name}; build the net with as many heads"
        )
    return Pair(slot, group, reading)


def tokens(name: str) -> list[tuple[int, Any]]:
    """Split a name into words and numbers, to be sorted by: layers_2 before layers_10.

    Of Flax's `Bidirectional` the part that runs forward is the first.
    """
    name = name.replace("forward_rnn", "0").replace("backward_rnn", "1")
    return [(i % 2, int(part) if i % 2 else part) for i, part in enumerate(re.split(r"(\d+)", name))]


def by_number(who: str, groups: list[Group]) -> list[Group]:
    """Sort modules by the numbers in their names; refuse those whose names differ in words."""
    ordered = sorted(groups, key=lambda group: tokens(group.name))
    for a, b in itertools.pairwise(ordered):
        if not numbered(a.name, b.name):
            raise ambiguous(who, a, b)
    return ordered


def numbered(a: str, b: str) -> bool:
    """Whether two names differ first in a number."""
    return next((u[0] and v[0] for u, v in zip(tokens(a), tokens(b), strict=False) if u != v), False) == 1


def ambiguous(who: str, a: Group, b: Group) -> ValueError:
    """Make the error of two modules whose order is not known."""
    return ValueError(
        f"{who}: modules of one kind and shape must be in a known order, got {a.name} and {b.name}, whose names do not tell; "
        "pass names={path: module} for them" + ", or a state dict as the module has it" * who.endswith("torch")
    )
