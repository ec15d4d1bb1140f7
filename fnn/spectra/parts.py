"""Chosen parameters as one flat vector: all of them, those of some paths, or one block of `repeat`."""

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import tree


@dataclass(frozen=True)
class Part:
    """Which arrays of a tree, in the order of the vector: (number of the leaf, how many block numbers choose from it).

    The block numbers themselves are data, int32[arrays, ...], so that all blocks of a stack share one program.
    """

    arrays: tuple[tuple[int, int], ...]

    def flatten(self, blocks: jax.Array | np.ndarray, values: Any) -> jax.Array:
        """Write the chosen arrays as one vector of at least float32."""
        leaves = jax.tree.leaves(values)
        chosen = [leaves[n][tuple(blocks[i, :k])] for i, (n, k) in enumerate(self.arrays)]
        dtype = self.dtype(leaves)
        return jnp.concatenate([jnp.ravel(a).astype(dtype) for a in chosen])

    def unflatten(self, blocks: jax.Array | np.ndarray, vector: jax.Array, like: Any) -> Any:
        """Write a vector as a tree like params, in its dtypes, with zeros where nothing was chosen."""
        leaves, treedef = jax.tree.flatten(like)
        found: list[Any] = [None] * len(leaves)
        start = 0
        for i, (n, k) in enumerate(self.arrays):
            shape = leaves[n].shape[k:]
            size = math.prod(shape)
            a = vector[start : start + size].reshape(shape).astype(leaves[n].dtype)
            if k:
                a = (jnp.zeros_like(leaves[n]) if found[n] is None else found[n]).at[tuple(blocks[i, :k])].set(a)
            found[n] = a
            start += size
        return treedef.unflatten(jnp.zeros_like(a) if f is None else f for a, f in zip(leaves, found, strict=True))

    def size(self, values: Any) -> int:
        """Count the numbers in the vector."""
        leaves = jax.tree.leaves(values)
        return sum(math.prod(leaves[n].shape[k:]) for n, k in self.arrays)

    def dtype(self, values: Any) -> Any:
        """Say in which dtype the vector is kept."""
        leaves = jax.tree.leaves(values)
        return jnp.result_type(jnp.float32, *(leaves[n].dtype for n, _ in self.arrays))


Row = tuple[str, int, tuple[int, ...]]
"""One array of one block: its path with plain numbers for blocks, the number of its leaf, its block numbers."""


def rows(params: Any) -> list[Row]:
    """List the arrays of a tree, every block of `repeat` on its own: `1/3/0/kernel` as `serial` would call it."""
    found: list[Row] = []
    depths = jax.tree.leaves(tree.map_depth(lambda k, _: k, params))
    for n, (name, leaf, k) in enumerate(zip(tree.paths(params), jax.tree.leaves(params), depths, strict=True)):
        for blocks in np.ndindex(jnp.shape(leaf)[:k]):
            numbers = iter(blocks)
            found.append((re.sub(r"\[:\]", lambda _, i=numbers: str(next(i)), name), n, blocks))
    return found


def choose(who: str, params: Any, pattern: str) -> tuple[Part, np.ndarray]:
    """Choose the arrays whose paths match a pattern of `fnmatch`. Errors: ValueError if none does.

    A block of `repeat` is written as `[3]` or `3`, `[:]` is every block: "1/[3]/*".
    """
    plain = re.sub(r"\[(\d+)\]", r"\1", pattern).replace("[:]", "*")
    every = rows(params)
    found = [row for row in every if fnmatch.fnmatchcase(row[0], plain)]
    if not found:
        names = ", ".join(row[0] for row in every[:4])
        raise ValueError(f"{who}: only must match a parameter's path, got {pattern!r}; paths are like {names}")
    return chosen(found, params)


def chosen(found: Sequence[Row], params: Any) -> tuple[Part, np.ndarray]:
    """Make a part of some rows; a stack of which all blocks are chosen counts as one array."""
    leaves = jax.tree.leaves(params)
    depths = jax.tree.leaves(tree.map_depth(lambda k, _: k, params))
    arrays, blocks = [], []
    for n in dict.fromkeys(row[1] for row in found):
        mine = [row[2] for row in found if row[1] == n]
        whole = len(mine) == math.prod(jnp.shape(leaves[n])[: depths[n]])
        for block in [()] if whole else mine:
            arrays.append((n, len(block)))
            blocks.append(block)
    widest = max((len(block) for block in blocks), default=0)
    return Part(tuple(arrays)), np.array([[*b, *[0] * (widest - len(b))] for b in blocks], np.int32).reshape(
        len(blocks), widest
    )


def layers(params: Any) -> dict[str, list[Row]]:
    """Group the arrays by the layer that they belong to, every block of `repeat` on its own."""
    found: dict[str, list[Row]] = {}
    for row in rows(params):
        found.setdefault(row[0].rpartition("/")[0] or row[0], []).append(row)
    return found
