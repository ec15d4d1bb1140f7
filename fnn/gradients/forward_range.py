"""Say where activations leave the range of their float type on the way forward, which no backward pass can mend.

On the device: where numbers are lost, and with them what depends on them. On the host: where a measurement in float64 is due.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import mapped
from fnn.gradients.readings import Labels, Series

FEW = 26
"""Binary orders above the smallest normal number, from where on small entries of an array are rounded to zero."""


@dataclass(frozen=True)
class Limits:
    """Of log2 of a second moment, for one float type."""

    low: float
    """Below it numbers come near the end of the range."""
    least: float
    """Below it they are lost."""
    high: float

    @staticmethod
    def of(dtype: Any) -> "Limits":
        info = jnp.finfo(dtype)
        few = FEW if info.maxexp > 100 else 0  # float16 is at home near its ends
        return Limits(2.0 * (info.minexp + few), 2.0 * (info.minexp + few * 3 // 4), 2.0 * (info.maxexp - few - 2))


def order(x: jax.Array, axis_name: Any) -> jax.Array:
    """Take log2 of the largest square: float32[], -inf for zeros."""
    largest = mapped.reduce(jax.lax.pmax, jnp.max(jnp.abs(x), initial=0), axis_name)
    return 2 * jnp.log2(largest.astype(jnp.promote_types(largest.dtype, jnp.float32))).astype(jnp.float32)


def taken(variable: int, seen: Mapping[str, Any]) -> jax.Array:
    """Look up log2 of a value's second moment, or of its largest square where moments were not asked for."""
    if f"order.{variable}" in seen:
        return seen[f"order.{variable}"]
    m, e = seen[f"moments.{variable}"]["second_moment"]
    return (jnp.log2(m) + e.astype(m.dtype)).astype(jnp.float32)


def lost(orders: Mapping[int, jax.Array], dtypes: Mapping[int, Any], loss: jax.Array) -> dict[str, Any]:
    """Say which values are lost, by variable as `lost.{variable}`, and as `lost` whether any is: bool.

    Lost is what is infinite or so near to zero that small entries are rounded to it, and zeros if any value comes near the
    lower end of the range: others are dead units. NaN says so itself, and may stand where a mask hides it; but where the
    loss is not finite, everything that depends on it is lost: the derivative of a ReLU at NaN is 0.
    """
    if not orders:
        return {"lost": ~jnp.isfinite(loss)}
    limits, sizes = [Limits.of(dtypes[v]) for v in orders], [o.size for o in orders.values()]
    low, least = (np.repeat([getattr(one, name) for one in limits], sizes) for name in ("low", "least"))
    # Joined, and not opened again: XLA would repeat for each value what all of them depend on.
    every = jax.lax.optimization_barrier(jnp.concatenate([jnp.ravel(o) for o in orders.values()]))
    small = jnp.any((every < np.float32(low / 2)) & (every > -jnp.inf))
    gone = jnp.isposinf(every) | ((every < np.float32(least)) & (every > -jnp.inf)) | (jnp.isneginf(every) & small)
    gone = jax.lax.optimization_barrier(gone)
    parts = jnp.split(gone, np.cumsum(sizes)[:-1])
    found = {f"lost.{v}": part.reshape(o.shape) for (v, o), part in zip(orders.items(), parts, strict=True)}
    return found | {"lost": ~jnp.isfinite(loss) | jnp.any(gone)}


@dataclass(frozen=True)
class Spot:
    """Where a value is made, as the host needs it."""

    label: Series
    parameter: int
    output: bool
    depth: tuple[bool, ...]
    """Of the loops around: whether they count layers."""
    dtype: str

    def left(self, orders: np.ndarray) -> np.ndarray:
        """Whether values came near an end of the range, or are zero or not finite."""
        limits = Limits.of(self.dtype)
        return ~((orders >= limits.low) & (orders <= limits.high))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["orders", "lost"], meta_fields=["spots"])
@dataclass(frozen=True)
class Ranges:
    """How large values are, and whether any are lost."""

    orders: list[jax.Array]
    """log2 of second moments, with an axis for each loop around."""
    lost: jax.Array
    spots: tuple[Spot, ...]

    def strained(self, loss: float) -> bool:
        """Whether any value, or the loss, may have left the range."""
        alone = not np.isfinite(loss) or abs(loss) < 2.0 ** (Limits.of(np.float32).low / 2)
        return alone or any(s.left(np.asarray(o)).any() for s, o in zip(self.spots, self.orders, strict=True))

    def same(self, wide: "Ranges") -> bool:
        """Whether float64 has no other numbers: units that are zero or infinite in truth."""
        pairs = zip(self.orders, wide.orders, strict=True)
        return all(np.allclose(a, b, rtol=0, atol=0.01, equal_nan=True) for a, b in pairs) and not self.lost

    def first(self, zero_kernels: Sequence[bool], flow: Labels) -> str:
        """Name the first layer, in forward order, where values left the range: " at layer 3 (path)"; "" if there is none.

        Zeros count where something that is not zero comes before them, and no kernel that is zero explains them.
        """
        labels = tuple(replace(s.label, quantity=str(i)) for i, s in enumerate(self.spots))
        table, starts = Labels(labels, ()), np.cumsum([0, *(label.size for label in labels)])
        known = {path: layer for layer, path in flow.starts}
        alive = explained = False
        for layer, path, number, index, *_ in table.rows:
            spot, orders = self.spots[int(number)], np.asarray(self.orders[int(number)])
            axes = [k for k, depth in enumerate(spot.depth) if depth]
            turns = np.moveaxis(orders, axes, range(len(axes))).reshape(labels[int(number)].size, -1)[
                index - starts[int(number)]
            ]
            left, zeros = spot.left(turns), np.isneginf(turns)
            explained = explained or bool(spot.output and zeros.all() and zero_kernels[spot.parameter])
            if (left & ~zeros).any() or (zeros.any() and (alive or not zeros.all()) and not explained):
                return f" at layer {known.get(path, layer)} ({path})"
            alive = alive or not zeros.all()
        return ""
