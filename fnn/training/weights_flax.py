"""Flax's layouts, of Linen and NNX: how variables are grouped into modules, and what each module's arrays are here.

Kernels, biases, scales and embeddings have the same names and shapes; attention splits the heads, and recurrent cells keep
their gates apart. Source: `flax.linen` and `flax.nnx`, the cells' own formulas.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays as door
from fnn.training.weights_layers import ATTENTION, Arrays
from fnn.training.weights_match import Group, Reading, by_number

COLLECTIONS = ("params", "batch_stats")
LSTM, GRU = ([f"{side}{gate}" for side in "ih" for gate in gates] for gates in ("ifgo", "rzn"))
PARTS = (["i", "h"], LSTM, GRU)
"""Names of a cell's parts: of the input and of the hidden state, for all gates at once or for each in fnn's order."""
CELLS = (
    {"dense_i": "i", "dense_h": "h"},  # NNX's GRUCell, OptimizedLSTMCell and SimpleCell
    {"if_" if name == "if" else name: name for name in LSTM},  # NNX's LSTMCell
    *({name: name for name in parts} for parts in PARTS),
)
"""The same as Flax calls them."""


def flat(who: str, variables: Any) -> dict[tuple[str, ...], Any]:
    """List arrays by their path: of Linen's variables, the path in their collection; of an NNX state, without random keys.

    Errors: TypeError for anything but a dict or an NNX state, ValueError for collections without weights.
    """
    if not isinstance(variables, Mapping):
        from flax import nnx  # it takes a while to import

        if isinstance(variables, nnx.Module):
            variables = nnx.state(variables)
    if not isinstance(variables, Mapping):
        got = type(variables).__name__
        raise TypeError(f"{who}: variables must be a dict of Linen, or a module or state of NNX, got {got}")
    if "params" in variables and (more := sorted(set(variables) - set(COLLECTIONS))):
        raise ValueError(f"{who}: variables must be {' and '.join(COLLECTIONS)} alone, got {more} too; leave them out")
    linen = "params" in variables
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {path: a for entries, a in leaves if "rngs" not in (path := _path(entries, linen))}


def filled(variables: Any, values: Mapping[str, Any]) -> Any:
    """Put arrays into variables by their paths; what has no array stays as it is."""
    linen = "params" in variables

    def one(entries, leaf):
        return values.get("/".join(_path(entries, linen)), leaf)

    return jax.tree_util.tree_map_with_path(one, variables)


def _path(entries: Any, linen: bool) -> tuple[str, ...]:
    """Write a key path without the collection and without the attribute of a box or a variable."""
    kept = [e for e in entries if not isinstance(e, jax.tree_util.GetAttrKey)]
    names = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in kept)
    return names[1:] if linen else names


def groups(who: str, variables: Any, recurrent: bool) -> list[Group]:
    """Group arrays by module; with `recurrent`, join those of a cell, whose names are short enough to be others' too."""
    found: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
    arrays = flat(who, variables)
    for path in arrays:
        known = path[-1] in ("kernel", "bias", "scale", "embedding", "mean", "var")
        place, name = (path[:-1], path[-1]) if known else (path, "")
        found.setdefault(place, {})[name] = path
    for parent in {place[:-1] for place in found if place}:
        inside = {place[-1]: place for place in found if place[:-1] == parent and place}
        joint = [cell for cell in CELLS if recurrent and cell.keys() <= inside.keys()]
        if set(ATTENTION) <= inside.keys():
            joint.append({name: name for name in ATTENTION})
        for parts in joint[:1]:
            own = {
                f"{here}/{name}": path for part, here in parts.items() for name, path in found.pop(inside[part]).items()
            }
            found.setdefault(parent, {}).update(own)
    return [
        Group(
            "/".join(place),
            {name: _array(who, path, arrays[path]) for name, path in own.items()},
            {name: "/".join(path) for name, path in own.items()},
            readings,
            stackable=True,
        )
        for place, own in found.items()
    ]


def _array(who: str, path: tuple[str, ...], a: Any) -> np.ndarray:
    if not hasattr(a, "__array__"):  # a spec, of which only the shape counts
        a = np.zeros(a.shape, a.dtype)
    a = np.asarray(door.array(who, "/".join(path), a))
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise TypeError(f"{who}: weights must be floating point, got {a.dtype} in {'/'.join(path)}; leave it out")
    return a


def readings(arrays: Arrays) -> list[Reading]:
    """Say what a module's arrays would be here."""
    names = arrays.keys()
    if any(name.startswith("query/") for name in names):
        return _attention(arrays)
    if any("/" in name for name in names):
        return _recurrent(arrays)
    if "kernel" in names and names <= {"kernel", "bias"}:
        kinds = ("dense",) if arrays["kernel"].ndim == 2 else ("conv", "conv_transpose")
    elif {"mean", "var"} <= names:
        kinds = ("batch_norm",)
    elif "embedding" in names:
        kinds = ("embedding",)
    elif names == {""}:
        a = arrays[""]
        table = a.reshape(a.shape[1:]) if a.ndim == 3 and len(a) == 1 else a
        return [
            Reading("other", dict(arrays), dict),
            Reading("embedding", {"embedding": table}, lambda b: {"": b["embedding"].reshape(a.shape)}),
        ]
    else:
        kinds = ("norm",)
    return [Reading(kind, dict(arrays), dict) for kind in kinds]


def _attention(arrays: Arrays) -> list[Reading]:
    """MultiHeadDotProductAttention: kernels [d, heads, size], of `out` [heads, size, d]."""
    if any(arrays.get(f"{name}/kernel", np.zeros(0)).ndim != 3 for name in ATTENTION):
        return []
    if any(name not in {f"{a}/{b}" for a in ATTENTION for b in ("kernel", "bias")} for name in arrays):
        return []  # norms of queries and keys
    size = arrays["query/kernel"].shape[-1]
    joined = {}
    for name, a in arrays.items():
        out, bias = name.startswith("out/"), name.endswith("bias")
        joined[name] = a.reshape(-1) if bias else a.reshape(-1, a.shape[-1]) if out else a.reshape(len(a), -1)
    return [
        Reading("attention", joined, lambda b: {name: b[name].reshape(a.shape) for name, a in arrays.items()}, size)
    ]


def _recurrent(arrays: Arrays) -> list[Reading]:
    """SimpleCell, LSTMCell, OptimizedLSTMCell and GRUCell, gates apart (Linen) or side by side (NNX's dense_i and dense_h).

    A bias may stand at either product, except at the GRU's n, where r multiplies that of the recurrent one.
    """
    names = {name.partition("/")[0] for name in arrays}
    pieces = next((parts for parts in PARTS if set(parts) == names), None)
    if pieces is None or any(name.partition("/")[2] not in ("kernel", "bias") for name in arrays):
        return []
    sides = {side: [name for name in pieces if name[0] == side] for side in "ih"}
    if any(arrays[f"{name}/kernel"].ndim != 2 for name in pieces):
        return []
    ends = {side: np.cumsum([arrays[f"{name}/kernel"].shape[1] for name in own]) for side, own in sides.items()}

    def joined(side):
        kernels = [arrays[f"{name}/kernel"] for name in sides[side]]
        zeros = [np.zeros(kernel.shape[1], kernel.dtype) for kernel in kernels]
        biases = [arrays.get(f"{name}/bias", zero) for name, zero in zip(sides[side], zeros, strict=True)]
        return np.concatenate(kernels, axis=1), np.concatenate(biases)

    (kernel, first), (recurrent, second) = joined("i"), joined("h")
    n, total = recurrent.shape
    found = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": first + second}
    if gru := total == 3 * n:
        found["bias"] = np.concatenate([found["bias"][: 2 * n], first[2 * n :]])
        found["recurrent_bias"] = second[2 * n :]
    at_input = any(f"{name}/bias" in arrays for name in sides["i"])

    def write(a):
        zeros = np.zeros_like(a["bias"])
        second = np.concatenate([zeros[: 2 * n], a["recurrent_bias"]]) if gru else zeros
        biases = {"i": a["bias"], "h": second} if at_input else {"i": zeros, "h": a["bias"]}
        kernels, back = {"i": a["kernel"], "h": a["recurrent_kernel"]}, {}
        for side, own in sides.items():
            for what, array in (("kernel", kernels[side]), ("bias", biases[side])):
                parts = np.split(array, ends[side][:-1], axis=-1)
                back |= {f"{name}/{what}": part for name, part in zip(own, parts, strict=True)}
        return {name: part for name, part in back.items() if name in arrays}

    return [Reading("recurrent", found, write)]


def order(who: str, groups: list[Group]) -> list[Group]:
    """Sort modules that fit the same layers by the numbers in their names: a dict of Flax may have lost their order."""
    return by_number(who, groups)
