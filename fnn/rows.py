"""The arrays of a net as the rows of a few matrices: what is done to each array is then one operation, not one for each.

A program over a hundred arrays compiles a hundred small kernels; over two matrices it compiles two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fnn import lowering, tree

PADDED = 8
"""Arrays share a matrix if the longest has at most so many times the numbers of the shortest, which is filled up with zeros.
Arrays above `lowering.SMALL` have one of their own: they are not copied."""


@dataclass(frozen=True)
class Rows:
    """Where the arrays of a tree stand: block i of a `Stacked` array is a row of its own."""

    structure: Any
    kinds: tuple[tuple[tuple[int, ...], int, Any], ...]
    """Of each array: its shape, how many leading axes are depth, its dtype."""
    groups: tuple[tuple[int, ...], ...]
    """The arrays of each matrix, by number."""

    @classmethod
    def of(cls, like: Any) -> "Rows":
        """Lay out the arrays of a tree like this one; dtypes are not mixed."""
        leaves, structure = jax.tree.flatten(like)
        depths = jax.tree.leaves(tree.map_depth(lambda k, _: k, like))
        kinds = tuple((jnp.shape(a), k, jnp.result_type(a)) for a, k in zip(leaves, depths, strict=True))
        widths = [math.prod(shape[k:]) for shape, k, _ in kinds]
        groups: list[list[int]] = []
        for i in sorted(range(len(kinds)), key=lambda i: -widths[i]):
            fits = (g for g in groups if kinds[g[0]][2] == kinds[i][2] and widths[g[0]] <= PADDED * widths[i])
            group = next((g for g in fits if widths[g[0]] <= lowering.SMALL), None)
            groups.append([i]) if group is None else group.append(i)
        return cls(structure, kinds, tuple(map(tuple, groups)))

    def join(self, values: Any) -> list[jax.Array]:
        """Write a tree of arrays of these shapes as matrices [rows, width], filled up with zeros."""
        leaves = self.structure.flatten_up_to(values)
        return [self._matrix(group, leaves) for group in self.groups]

    def join_numbers(self, values: Any) -> list[jax.Array]:
        """Write a tree of one number for each array, or each block of one, as vectors [rows]."""
        leaves = self.structure.flatten_up_to(values)
        return [jnp.concatenate([leaves[i].reshape(-1) for i in group]) for group in self.groups]

    def numbers(self, vectors: Sequence[jax.Array]) -> Any:
        """Undo `join_numbers`."""
        found: list[Any] = [None] * len(self.kinds)
        for group, vector in zip(self.groups, vectors, strict=True):
            start = 0
            for i in group:
                shape, k, _ = self.kinds[i]
                count = math.prod(shape[:k])
                found[i] = vector[start : start + count].reshape(shape[:k])
                start += count
        return self.structure.unflatten(found)

    def _matrix(self, group: Sequence[int], leaves: Sequence[Any]) -> jax.Array:
        sizes = [(math.prod(shape[:k]), math.prod(shape[k:])) for shape, k, _ in (self.kinds[i] for i in group)]
        parts = [leaves[i].reshape(size) for i, size in zip(group, sizes, strict=True)]
        return jnp.concatenate([jnp.pad(a, ((0, 0), (0, sizes[0][1] - a.shape[1]))) for a in parts])
