"""`Masked`, a padded sequence with its mask, and the one place where padding is taken out of the numbers.

A value that is not finite cannot be multiplied away: 0·NaN is NaN, forward and backward alike. So every layer that takes
a `Masked` puts known numbers in the place of padding *before* it computes, by `where`, whose gradient there is zero
whatever comes back.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check


class Masked(NamedTuple):
    """A sequence `values: [batch, time, ...]` and `mask: bool[batch, time]`, True where a position is real.

    A mask may have holes, and either side may be padded. Values at padded positions are arbitrary, NaN and infinity
    included: no layer lets them reach a real position, a gradient or a statistic, and what it returns there is finite.
    """

    values: Any
    mask: Any

    @classmethod
    def of_lengths(cls, values: Any, lengths: Any) -> "Masked":
        """Mask all but the first `lengths: int[batch]` positions of each example. Lengths above time mask nothing."""
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
        raise ValueError(f"{who}: a mask must be bool[batch, time] of the values' first two axes, got {got}")


def filled(values: Any, mask: Any, fill: Any = 0) -> Any:
    """Put `fill` at padded positions: 0, or numbers that broadcast against values[batch, time, ...]."""
    values = jnp.asarray(values)
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    return jnp.where(mask, values, jnp.asarray(fill, values.dtype))


def cleared(tree: Any) -> Any:
    """Put 0 at the padded positions of every `Masked` in a tree; the rest is returned as it is."""

    def one(node):
        return node._replace(values=filled(node.values, node.mask)) if isinstance(node, Masked) else node

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Masked))


def harmless(values: Any) -> Any:
    """Numbers for padding on which a function of each position is finite: a ramp between 0 and 1, [...] of a position.

    Zeros are not: a layer norm without eps divides by their deviation, a logarithm has no value there.
    """
    shape = values.shape[2:]
    size = math.prod(shape)
    return np.reshape((np.arange(size) + 1) / (size + 1), shape)
