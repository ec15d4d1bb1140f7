"""How the numbers that reach a layer are laid out, followed through the tree of a net's parameters and state.

PyTorch has channels first, so a layer behind a flattened image needs its rows in another order. The tree does not say how
its layers are connected: a tuple is a chain or layers side by side, and a residual block looks like what is in it. So all
that fits is kept: a set of `Arrival`s. A layer takes those of its width; where these disagree, its rows are `UNKNOWN`, and
the user is asked.

    serial(conv(4), flatten(), parallel(dense(5), dense(6)))     36 inputs of each head: both get the image
    serial(conv(4), flatten(), dense(36), dense(5))              36 inputs, the image or the layer before: UNKNOWN
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import jax
import numpy as np

from fnn.layers.dense import Flattened
from fnn.tree import Stacked

UNKNOWN = np.array([], int)
"""Rows of a layer behind a convolution, of which it is not known how the image came to it."""


@dataclass(frozen=True)
class Arrival:
    """What may reach a layer: `width` units in an order.

    The order is "" if both libraries have the same; the shape of an image that was flattened; "image", or "mapped" behind a
    dense layer on its channels, where the units are channels; "mixed" if a flattened image was joined to something.
    """

    width: int | None = None
    order: tuple[int, ...] | str = ""

    @property
    def matters(self) -> bool:
        """Whether the order differs between the libraries."""
        return isinstance(self.order, tuple) or self.order == "mixed"


Arrivals = frozenset[Arrival]
START: Arrivals = frozenset({Arrival()})


def rows_for(arrivals: Arrivals, kind: str, n: int) -> np.ndarray | None:
    """Say where each of a layer's n inputs stands if channels come first: None if they agree, `UNKNOWN` if that is not known."""
    orders = {a.order for a in arrivals if a.width == n}
    if orders:
        shapes = {order for order in orders if isinstance(order, tuple)}
        if not shapes and "mixed" not in orders:
            return None
        return rows_of(*shapes) if len(orders) == 1 and shapes else UNKNOWN
    if kind != "dense":
        return None
    cut = any(a.matters or a.order == "image" or (a.order == "mapped" and n > (a.width or n)) for a in arrivals)
    return UNKNOWN if cut else None


def behind(arrivals: Arrivals, kind: str, arrays: Mapping[str, Any], n: int) -> Arrivals:
    """Say what leaves a layer with n inputs."""
    if kind == "dense":
        out = arrays["kernel"].shape[-1]
        over = any(a.order in ("image", "mapped") for a in _fitting(arrivals, n))
        return frozenset({Arrival(out, "mapped" if over else "")})
    if kind in ("conv", "conv_transpose"):
        return frozenset({Arrival(arrays["kernel"].shape[-1], "image")})
    if kind == "embedding":
        return frozenset({Arrival(arrays["embedding"].shape[-1])})
    if kind in ("recurrent", "attention"):
        return START  # sequences, which PyTorch has in the same order
    return _fitting(arrivals, n)


def flattened(arrivals: Arrivals, shape: tuple[int, ...]) -> Arrivals:
    """Say what leaves `flatten` of this shape. A sequence is laid out as an image is if it comes from a convolution."""
    *places, channels = shape or (1,)
    image = len(places) > 1 or (len(places) == 1 and any(a.order == "image" for a in arrivals))
    moved = image and channels > 1 and np.prod(places) > 1
    return frozenset({Arrival(int(np.prod(shape)), shape if moved else "")})


def joined(entries: list[Arrivals]) -> Arrivals:
    """Say what leaves layers side by side: their outputs one behind the other, or their sum."""
    orders = {a.order for a in chain(*entries)}
    mixed = any(a.matters for a in chain(*entries))
    order = "mixed" if mixed else "image" if "image" in orders else "mapped" if "mapped" in orders else ""
    widths = [[a.width for a in entry if a.width is not None] for entry in entries]
    if (
        any(len(own) < len(entry) for own, entry in zip(widths, entries, strict=True))
        or math.prod(map(len, widths)) > 64
    ):
        return frozenset({Arrival(None, order)})
    ways = [*product(*widths)]
    return frozenset(Arrival(n, order) for way in ways for n in (sum(way), *([way[0]] if len({*way}) == 1 else [])))


def around(arrivals: Arrivals, departures: Arrivals) -> Arrivals:
    """Add what leaves if this part of the net is a residual block: its input may have been added to its output."""
    widths = {a.width for a in arrivals if a.matters} & {a.width for a in departures - arrivals}
    return departures | {Arrival(width, "mixed") for width in widths}


def side_by_side(params: Any, state: Any) -> bool:
    """Whether the entries of a tuple could all have the same input: whether they take the same number of units."""
    needs = [need for need in (_need(p, s) for p, s in zip(params, state, strict=True)) if need]
    units = {inputs for inputs, outputs in needs if outputs is None}
    return len(units) <= 1 and all(
        unit % inputs == 0 and outputs % (unit // inputs) == 0
        for unit in units
        for inputs, outputs in needs
        if outputs is not None
    )


def images(state: Any) -> Arrivals:
    """List the flattened images of a part of the net: what a layer that is used in several places may meet."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Flattened))
    shapes = [node.shape for node in nodes if isinstance(node, Flattened)]
    return frozenset(Arrival(int(np.prod(shape)), "mixed") for shape in shapes if len(shape) > 1)


def _need(params: Any, state: Any) -> tuple[int, int | None] | None:
    """Return how many units the first layer takes: (units, None), or (units of a group, outputs) of a convolution."""
    if isinstance(state, Flattened):
        return state.shape[-1] if state.shape else 1, None
    if isinstance(params, Stacked):
        return (
            _need(params[0], state[0] if isinstance(state, Stacked) else state)
            if len(jax.tree.leaves(params))
            else None
        )
    if isinstance(params, tuple | list):
        states = state if isinstance(state, tuple | list) and len(state) == len(params) else [()] * len(params)
        return next((need for need in map(_need, params, states) if need), None)
    if not isinstance(params, Mapping):
        return None
    kernel, scale = params.get("kernel"), params.get("scale")
    if kernel is not None and hasattr(kernel, "ndim") and params.keys() <= {"kernel", "bias"}:
        return (kernel.shape[0], None) if kernel.ndim == 2 else (kernel.shape[-2], kernel.shape[-1])
    if scale is not None and hasattr(scale, "ndim") and scale.ndim:
        return len(scale), None
    return None


def _fitting(arrivals: Arrivals, n: int) -> Arrivals:
    return frozenset(a for a in arrivals if a.width == n) or arrivals


def rows_of(shape: tuple[int, ...]) -> np.ndarray:
    """Say where each number of a flattened image, channels last, stands if channels come first."""
    n = int(np.prod(shape))
    return np.moveaxis(np.arange(n).reshape(shape[-1], *shape[:-1]), 0, -1).ravel()
