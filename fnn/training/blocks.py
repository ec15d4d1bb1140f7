"""The blocks of a stack one by one, as an optimiser sees them, with a note of whether it asks which block is which."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.tree_util import keystr

from fnn import tree
from fnn.tree import PyTree

_order_read: list[bool] = [False]


@contextmanager
def order_noted() -> Iterator[list[bool]]:
    """Yield a list of one entry, which says at the end whether anybody asked which block is which."""
    before, _order_read[0], noted = _order_read[0], False, [False]
    try:
        yield noted
    finally:
        noted[0] = _order_read[0]
        _order_read[0] |= before


LIBRARIES = ("jax", "optax", "flax", "fnn")
"""What these do with trees depends on the place of an array among the others only as a program shows."""


def _note(by_path: bool) -> None:
    """Note that somebody asks for the place of a block: in a path, or in the list of a tree's arrays.

    JAX writes paths to name what it traces, and everybody maps over trees; neither counts.
    """
    frame, entry = sys._getframe(2), ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        inside = frame.f_code.co_filename in (__file__, keystr.__code__.co_filename) or module == "functools"
        if not (inside or (module.startswith("jax.") and not by_path)):
            break
        frame, entry = frame.f_back, frame.f_code.co_name
    library = frame is not None and module.partition(".")[0] in (LIBRARIES[:1] if by_path else LIBRARIES)
    _order_read[0] |= not library and (by_path or "map" not in entry)


def note_order() -> None:
    """Note that what is done depends on which block is which."""
    _order_read[0] = True


class _Number(jax.tree_util.SequenceKey):
    """The place of a block in a path, as in a tuple. Notes that it is read."""

    @property
    def idx(self) -> int:
        _note(by_path=True)
        return super().idx

    def __str__(self) -> str:
        return f"[{self.idx}]"

    def __repr__(self) -> str:
        return f"SequenceKey(idx={self.idx})"

    def __eq__(self, other: object) -> bool:
        _note(by_path=False)
        return super().__eq__(other)

    def __hash__(self) -> int:
        _note(by_path=False)
        return super().__hash__()


def paths(shown: PyTree) -> frozenset[str]:
    """Name the arrays of a tree as `tree.paths` does, with `[:]` for all blocks, shown one by one or stacked.

    An array that only some blocks have is named by their places: `trunk/[3]/kernel`.
    """
    found = set()
    for entries, node in jax.tree_util.tree_leaves_with_path(shown, is_leaf=lambda node: isinstance(node, Blocks)):
        if not isinstance(node, Blocks):
            found.add(tree.path(entries))
            continue
        each = [paths(block) for block in tuple.__iter__(node)]
        everywhere = frozenset.intersection(*each)
        named = {("[:]", inner) for inner in everywhere}
        named |= {(f"[{i}]", inner) for i, one in zip(node.places, each, strict=True) for inner in one - everywhere}
        found |= {"/".join(filter(None, (tree.path(entries), *parts))) for parts in named}
    return frozenset(found)


@jax.tree_util.register_pytree_with_keys_class
class Blocks(tuple):
    """The blocks of a stack as an optimiser sees them: the tuple that `serial` would hold, or some of it (a stand-in).

    Notes when somebody asks which block is which, or how many there are.
    """

    depth: int
    places: tuple[int, ...]

    def __new__(cls, blocks: Any, depth: int | None = None, places: Sequence[int] | None = None) -> "Blocks":
        new = super().__new__(cls, blocks)
        count = tuple.__len__(new)  # of a tuple that somebody rebuilds: as many as there are
        new.depth, new.places = count if depth is None else depth, tuple(range(count) if places is None else places)
        return new

    @property
    def complete(self) -> bool:
        """Whether all blocks are there."""
        return len(self.places) == self.depth

    def tree_flatten_with_keys(self):
        _note(by_path=False)
        children = list(super().__iter__())
        return [(_Number(i), child) for i, child in zip(self.places, children, strict=True)], (self.depth, self.places)

    def tree_flatten(self):
        _note(by_path=False)
        return list(super().__iter__()), (self.depth, self.places)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(children, *aux)

    def __iter__(self) -> Iterator[Any]:
        _order_read[0] = True
        return super().__iter__()

    def __getitem__(self, i: Any) -> Any:
        _order_read[0] = True
        return super().__getitem__(i)

    def __len__(self) -> int:
        _order_read[0] = True
        return super().__len__()


def split(shown: Any, level: int) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Flatten a tree down to the `Blocks` that lie inside of `level` others; return its nodes, and what puts them back."""
    nodes, structure = jax.tree.flatten(shown, is_leaf=lambda node: isinstance(node, Blocks))
    if not level:
        return nodes, structure.unflatten
    inner = [split(tuple(tuple.__iter__(node)), level - 1) if isinstance(node, Blocks) else None for node in nodes]

    def rebuild(flat):
        flat, built = iter(flat), []
        for node, part in zip(nodes, inner, strict=True):
            if part is None:
                built.append(next(flat))
            else:
                built.append(Blocks(part[1]([next(flat) for _ in part[0]]), node.depth, node.places))
        return structure.unflatten(built)

    return [n for node, part in zip(nodes, inner, strict=True) for n in ([node] if part is None else part[0])], rebuild


def specs(node: Any) -> tuple[Any, ...]:
    """Structure, shapes and dtypes of a tree, to be compared."""
    return jax.tree.structure(node), *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(node))
