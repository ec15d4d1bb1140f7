"""`Masked`, a padded sequence with its mask, and the functions that take padding out.

Multiplying padding by zero is not enough, because 0·NaN is NaN, in the gradient too. So every layer that takes a `Masked`
first replaces the values at padded positions, by `jnp.where`, whose gradient there is zero whatever the cotangent is.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnn import check


class Masked(NamedTuple):
    """A sequence `values: [batch, time, ...]` and `mask: bool[batch, time]`, True where a position is real.

    Padding may be on either side or in between. Values at padded positions may be anything, NaN and infinity included:
    no layer lets them reach a real position, a gradient or a statistic, and what it returns there is finite.
    """

    values: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray

    @classmethod
    def of_lengths(cls, values: jax.Array | np.ndarray, lengths: ArrayLike) -> "Masked":
        """Make the first `lengths: int[batch]` positions of each example real and the rest padding.

        A length above time makes all positions real.
        """
        lengths = jnp.asarray(lengths)
        if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != jnp.shape(values)[:1]:
            got = f"{check.describe(values)} and {check.describe(lengths)}"
            raise ValueError(f"Masked.of_lengths: lengths must be int[batch], one for each example, got {got}")
        return cls(values, jnp.arange(jnp.shape(values)[1]) < check.as_int32(lengths)[:, None])


def check_mask(who: str, x: Masked) -> None:
    """Refuse a mask that is not bool[batch, time] for values [batch, time, ...]."""
    if x.mask.dtype != bool:
        raise TypeError(f"{who}: a mask must be bool, True where a position is real, got {check.describe(x.mask)}")
    if len(x.values.shape) < 2 or x.mask.shape != x.values.shape[:2]:
        got = f"values {check.describe(x.values)} and mask {check.describe(x.mask)}"
        raise ValueError(f"{who}: a mask must be bool[batch, time], the values' first two axes, got {got}")


def filled(values: ArrayLike, mask: jax.Array | np.ndarray, fill: ArrayLike = 0) -> jax.Array:
    """Replace the values at padded positions by `fill`: a number, or an array that broadcasts to the values."""
    values = jnp.asarray(values)
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    return jnp.where(mask, values, jnp.asarray(fill, values.dtype))


def cleared(tree: Any) -> Any:
    """Replace padding by 0 in every `Masked` of a tree; all other leaves stay as they are."""

    def one(node):
        return node._replace(values=filled(node.values, node.mask)) if isinstance(node, Masked) else node

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Masked))


def harmless(values: jax.Array | np.ndarray) -> np.ndarray:
    """Make numbers for padding at which functions of one position are finite: a ramp from 0 to 1, the shape of a position.

    Zeros would not do: a layer norm with eps = 0 divides by their standard deviation, and a logarithm is infinite.
    """
    shape = values.shape[2:]
    size = math.prod(shape)
    return np.reshape((np.arange(size) + 1) / (size + 1), shape)
