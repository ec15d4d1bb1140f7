"""The layers of a net that have weights, one by one, and the way back into its parameters and state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.layers.dense import Flattened, Mirrored
from fnn.layers.memory import Memory
from fnn.tree import PyTree, Stacked

Arrays = dict[str, np.ndarray]
ATTENTION = ("query", "key", "value", "out")
UNKNOWN = np.array([], int)
"""Rows of a layer behind a convolution, of which it is not known how the image came to it."""


@dataclass(frozen=True)
class Slot:
    """A layer of a net."""

    path: str
    kind: str
    arrays: Arrays
    size: int | None = None
    """Units of a head of attention."""
    rows: np.ndarray | None = None
    """Where each number of a flattened image stands if channels come first: `ours = theirs[rows]`; None if they agree, `UNKNOWN` if
    that cannot be told."""


def slots(params: PyTree, state: PyTree) -> list[Slot]:
    """List the layers of a net that have weights, in its order, with the blocks of a stack one by one."""
    found: list[Slot] = []
    _walk(jax.device_get(params), jax.device_get(state), "", found, _Layout())
    return found


class _Layout:
    """What is known on the way through a net about how images are laid out."""

    def __init__(self):
        self.flat: tuple[int, ...] | None = None
        """Shape of what was flattened last, until a dense layer mixes it."""
        self.channels: int | None = None
        """Channels of the last convolution, until a dense layer."""

    @property
    def channels_count(self) -> int:
        """Channels of the image that was flattened; 1 if it is none, or if its numbers stand in one order anyway."""
        *places, channels = self.flat or (1,)
        image = len(places) > 1 or (len(places) == 1 and self.channels is not None)
        return channels if image and np.prod(places) > 1 else 1

    def rows(self, path: str, kind: str, arrays: Arrays) -> np.ndarray | None:
        if kind in ("conv", "conv_transpose"):
            self.channels = arrays["kernel"].shape[-1]
        elif kind in ("recurrent", "attention"):
            self.channels = None  # sequences, which PyTorch has in the same order
        n = next((len(a) for a in (arrays.get("kernel"), *arrays.values()) if a is not None and a.ndim), 0)
        dense = kind == "dense"
        shape = self.flat if self.flat is not None and self.channels_count > 1 else None
        if shape is not None and n == np.prod(shape):
            rows = rows_of(shape)
        elif dense and (shape is not None or (self.flat is None and self.channels not in (None, n))):
            rows = UNKNOWN
        else:
            rows = None
        if dense:
            self.flat = self.channels = None
        return rows


def _walk(params: Any, state: Any, path: str, found: list[Slot], layout: _Layout) -> None:
    if isinstance(params, Stacked):
        leaves = jax.tree.leaves((params, state))
        for i in range(leaves[0].shape[0] if leaves else 0):
            inner = state[i] if isinstance(state, Stacked) else state
            _walk(params[i], inner, f"{path}[{i}]/", found, layout)
    elif isinstance(params, tuple | list):
        if isinstance(state, Flattened):
            layout.flat = state.shape
        states = state if isinstance(state, tuple | list) and len(state) == len(params) else [()] * len(params)
        for i, (p, s) in enumerate(zip(params, states, strict=True)):
            _walk(p, s, f"{path}{i}/", found, layout)
    elif isinstance(params, Mapping):
        _layer(params, state, path, found, layout)


def _layer(params: Mapping[str, Any], state: Any, path: str, found: list[Slot], layout: _Layout) -> None:
    def add(kind, arrays, path=path, size=None):
        name = path.removesuffix("/")
        found.append(Slot(name, kind, arrays, size, layout.rows(name, kind, arrays)))

    if set(ATTENTION) <= params.keys():
        size = dict(state.shapes)["key"][-1] if isinstance(state, Memory) else None
        add("attention", {f"{a}/{b}": array for a in ATTENTION for b, array in params[a].items()}, size=size)
        return
    arrays = {name: a for name, a in params.items() if hasattr(a, "dtype")}
    moments = {"mean", "var", "weight"} <= state.keys() if isinstance(state, Mapping) else False
    if moments:
        add("batch_norm", arrays | _moments(state))
    elif "recurrent_kernel" in arrays:
        add("recurrent", arrays)
    elif "kernel" in arrays and arrays.keys() <= {"kernel", "bias"}:
        kernel = arrays["kernel"]
        add("dense" if kernel.ndim == 2 else "conv_transpose" if isinstance(state, Mirrored) else "conv", arrays)
    elif arrays.keys() in ({"scale"}, {"scale", "bias"}, {"bias"}):
        add("norm", arrays)
    else:
        for name, a in arrays.items():  # what is not known here is one slot for each array, with the array's own path
            known = name == "embedding"
            add(name if known else "other", {name if known else "": a}, path if known else f"{path}{name}")
    for name, inner in params.items():
        if name not in arrays:
            _walk(inner, state.get(name, ()) if isinstance(state, Mapping) else (), f"{path}{name}/", found, layout)


def _moments(state: Mapping[str, Any]) -> Arrays:
    """The running mean and variance that eval mode uses; before the first step 0 and 1."""
    weight = state["weight"]
    return {
        "mean": state["mean"] / (weight or 1),
        "var": state["var"] / weight if weight else np.ones_like(state["var"]),
    }


def rewritten(tree: PyTree, values: dict[str, np.ndarray], path: str = "") -> PyTree:
    """Put arrays into a tree by their paths, blocks of a stack one by one; what has no new array stays as it is."""
    if isinstance(tree, Stacked):
        leaves = jax.tree.leaves(tree)
        blocks = [rewritten(tree[i], values, f"{path}[{i}]/") for i in range(leaves[0].shape[0] if leaves else 0)]
        return Stacked(jax.tree.map(lambda *a: jnp.stack(a), *blocks), tree.depth) if blocks else tree

    def one(entries, leaf):
        name = path + jax.tree_util.keystr(entries, simple=True, separator="/")
        if isinstance(leaf, Stacked):
            return rewritten(leaf, values, f"{name}/" if entries else path)
        return jnp.asarray(values[name], leaf.dtype) if name in values else leaf

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda node: isinstance(node, Stacked))


def leaf(path: str, name: str) -> str:
    """Return the path of an array of a layer."""
    return "/".join(filter(None, (path, name)))


def rows_of(shape: Sequence[int]) -> np.ndarray:
    """Say where each number of a flattened image, channels last, stands if channels come first."""
    n = int(np.prod(shape))
    return np.moveaxis(np.arange(n).reshape(shape[-1], *shape[:-1]), 0, -1).ravel()
