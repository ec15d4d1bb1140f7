"""The layers of a net that have weights, one by one, and the way back into its parameters and state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.layers.dense import Flattened, Mirrored
from fnn.layers.memory import Memory
from fnn.training import weights_layout as layout
from fnn.training.weights_layout import Arrivals
from fnn.tree import PyTree, Stacked

Arrays = dict[str, np.ndarray]
ATTENTION = ("query", "key", "value", "out")


@dataclass(frozen=True)
class Slot:
    """A layer of a net."""

    path: str
    kind: str
    arrays: Arrays
    size: int | None = None
    """Units of a head of attention."""
    rows: np.ndarray | None = None
    """Where each number of a flattened image stands if channels come first: `ours = theirs[rows]`; None if they agree,
    `weights_layout.UNKNOWN` if that is not known."""


def slots(params: PyTree, state: PyTree) -> list[Slot]:
    """List the layers of a net that have weights, in its order, with the blocks of a stack one by one."""
    found: list[Slot] = []
    _walk(jax.device_get(params), jax.device_get(state), "", found, layout.START)
    return found


def _walk(params: Any, state: Any, path: str, found: list[Slot], arrivals: Arrivals) -> Arrivals:
    """List the layers of a part of the net; return what leaves it."""
    if isinstance(params, Stacked):
        leaves, now = jax.tree.leaves((params, state)), arrivals
        for i in range(leaves[0].shape[0] if leaves else 0):
            inner = state[i] if isinstance(state, Stacked) else state
            now = _walk(params[i], inner, f"{path}[{i}]/", found, now)
    elif isinstance(state, Flattened):
        return layout.flattened(arrivals, state.shape)
    elif isinstance(params, tuple | list):
        states = state if isinstance(state, tuple | list) and len(state) == len(params) else [()] * len(params)
        beside = len(params) > 1 and layout.side_by_side(params, states)
        now, all_of_them = arrivals, []
        for i, (p, s) in enumerate(zip(params, states, strict=True)):
            now = _walk(p, s, f"{path}{i}/", found, now | arrivals if beside else now)
            all_of_them.append(now)
        now = now | layout.joined(all_of_them) if beside else now
    elif isinstance(params, Mapping):
        now = _layer(params, state, path, found, arrivals)
    else:
        return arrivals
    return layout.around(arrivals, now)


def _layer(params: Mapping[str, Any], state: Any, path: str, found: list[Slot], arrivals: Arrivals) -> Arrivals:
    now = arrivals

    def add(kind, arrays, path=path, size=None):
        nonlocal now
        n = next((len(a) for a in (arrays.get("kernel"), *arrays.values()) if a is not None and a.ndim), 0)
        found.append(Slot(path.removesuffix("/"), kind, arrays, size, layout.rows_for(now, kind, n)))
        now = layout.behind(now, kind, arrays, n)

    if set(ATTENTION) <= params.keys():
        size = dict(state.shapes)["key"][-1] if isinstance(state, Memory) else None
        add("attention", {f"{a}/{b}": array for a in ATTENTION for b, array in params[a].items()}, size=size)
        return now
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
    states = state if isinstance(state, Mapping) else {}
    shared = layout.images(states.get("rest")) if params.keys() == {"shared", "rest"} else frozenset()
    parts = [
        _walk(inner, states.get(name, ()), f"{path}{name}/", found, now | shared if name == "shared" else now)
        for name, inner in params.items()
        if name not in arrays
    ]
    return parts[0] if len(parts) == 1 else layout.joined(parts) if parts else now


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
