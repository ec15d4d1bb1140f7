"""PyTorch's layouts: how the entries of a state dict are grouped into modules, and what each module's arrays are here.

Source: the formulas and shapes in the documentation of `torch.nn` (Linear, Conv1d to Conv3d and their transposes, the norms,
Embedding, RNN, LSTM, GRU and their cells, MultiheadAttention).
"""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnn import arrays as door
from fnn.training.weights_layers import ATTENTION, Arrays, Slot
from fnn.training.weights_match import Group, Reading, ambiguous, by_number, numbered, tokens

RECURRENT = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)(?:_(l\d+(?:_reverse)?))?")
PLAIN = re.compile(r"weight|bias|bias_n|running_mean|running_var|num_batches_tracked|in_proj_\w+|[qkv]_proj_weight")
SEPARATE = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("query_proj", "key_proj", "value_proj", "output_proj"),
    ("query", "key", "value", "out"),
    ("to_q", "to_k", "to_v", "to_out.0"),
    ("to_q", "to_k", "to_v", "to_out"),
)
"""Names of four Linear modules that make up attention."""
PACKED = (("qkv", "proj"), ("c_attn", "c_proj"), ("in_proj", "out_proj"))
"""Names of two, the first with queries, keys and values one after the other."""


def groups(who: str, state_dict: Mapping[str, Any], attention: bool) -> list[Group]:
    """Group entries by module, in their order; with `attention`, join those that make up one layer of it.

    Errors: TypeError for what is no floating array.
    """
    found: dict[str, dict[str, str]] = {}
    for entry in state_dict:
        prefix, _, suffix = entry.rpartition(".")
        match = RECURRENT.fullmatch(suffix)
        if match:
            prefix = ".".join(filter(None, (prefix, match[2])))
        elif not PLAIN.fullmatch(suffix):
            prefix, suffix = entry, ""
        found.setdefault(prefix, {})[match[1] if match else suffix] = entry
    both = [list(entries) for entries in found.values() if {"bias", "weight"} <= entries.keys()]
    by_name = list(state_dict) == sorted(state_dict) or any(n.index("bias") < n.index("weight") for n in both)
    if attention:
        found = _joined(found)
    return [
        Group(name, {n: _array(who, e, state_dict[e]) for n, e in entries.items()}, entries, readings, by_name=by_name)
        for name, entries in found.items()
    ]


def _array(who: str, entry: str, a: Any) -> np.ndarray:
    a = np.asarray(door.array(who, entry, a))
    if not jnp.issubdtype(a.dtype, jnp.floating) and not entry.endswith("num_batches_tracked"):
        raise TypeError(f"{who}: weights must be floating point, got {a.dtype} in {entry}; dequantise them, or drop it")
    return a


def _joined(found: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    for name in list(found):
        if {"in_proj_weight", "q_proj_weight"} & found.get(name, {}).keys():
            inner = found.pop(f"{name}.out_proj" if name else "out_proj", {})
            found[name] |= {f"out_proj.{suffix}": entry for suffix, entry in inner.items()}
    prefixes = dict.fromkeys(name.rpartition(".")[0] for name in found)
    prefixes |= dict.fromkeys(prefix.rpartition(".")[0] for prefix in list(prefixes))
    for prefix, parts in itertools.product(prefixes, SEPARATE + PACKED):
        full = [".".join(filter(None, (prefix, part))) for part in parts]
        if prefix not in found and all(name in found and found[name].keys() <= {"weight", "bias"} for name in full):
            kinds = ("query", "key", "value", "out") if len(parts) == 4 else ("in_proj", "out")
            merged = {
                f"{kind}.{suffix}": entry
                for kind, name in zip(kinds, full, strict=True)
                for suffix, entry in found[name].items()
            }
            place = {name: (prefix, merged) if name == full[0] else None for name in full}
            pairs = [place.get(name, (name, entries)) for name, entries in found.items()]
            found = dict(pair for pair in pairs if pair is not None)
    return found


def readings(arrays: Arrays) -> list[Reading]:
    """Say what a module's arrays would be here."""
    names = arrays.keys() - {"num_batches_tracked"}
    if names == {""}:
        return _alone(arrays[""])
    if "weight_ih" in names:
        return _recurrent(arrays)
    if any("." in name or name.startswith(("in_proj", "q_proj")) for name in names):
        return _attention(arrays)
    own = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
    if {"running_mean", "running_var"} <= names:
        return [_renamed("batch_norm", arrays, own)]
    if not names or not names <= {"weight", "bias"}:
        return []
    weight = arrays.get("weight")
    if weight is None or weight.ndim < 2:
        return [_renamed("norm", arrays, own)]
    if weight.ndim == 2:
        linear = _kernel("dense", arrays, lambda w: w.T, lambda k: k.T)
        return [linear] if "bias" in arrays else [linear, _renamed("embedding", arrays, {"weight": "embedding"})]
    space = tuple(range(2, weight.ndim))
    n = len(space)
    return [
        _kernel("conv", arrays, lambda w: w.transpose(*space, 1, 0), lambda k: k.transpose(n + 1, n, *range(n))),
        # The kernel of a transposed convolution is that of the convolution whose gradient it is: (in, out), mirrored.
        _kernel(
            "conv_transpose",
            arrays,
            lambda w: np.flip(w, space).transpose(*space, 0, 1),
            lambda k: np.flip(k, tuple(range(n))).transpose(n, n + 1, *range(n)),
        ),
    ]


def _renamed(kind: str, arrays: Arrays, names: dict[str, str]) -> Reading:
    there = {names.get(n, n): n for n in arrays if n != "num_batches_tracked"}
    return Reading(kind, {ours: arrays[n] for ours, n in there.items()}, lambda a: {n: a[o] for o, n in there.items()})


def _kernel(kind: str, arrays: Arrays, read: Callable[[Any], Any], write: Callable[[Any], Any]) -> Reading:
    bias = {} if "bias" not in arrays else {"bias": arrays["bias"].reshape(-1)}  # Equinox has [channels, 1, 1]

    def back(a):
        return {"weight": write(a["kernel"])} | {name: a[name].reshape(arrays[name].shape) for name in bias}

    return Reading(kind, {"kernel": read(arrays["weight"]), **bias}, back)


def _alone(a: np.ndarray) -> list[Reading]:
    """A parameter of its own: positions [length, d] or [1, length, d], or a number [] or [1]."""
    found = [Reading("other", {"": a}, lambda b: {"": b[""]})]
    if a.ndim == 2 or (a.ndim == 3 and a.shape[0] == 1):
        table = a.reshape(a.shape[-2:])
        found.append(Reading("embedding", {"embedding": table}, lambda b: {"": b["embedding"].reshape(a.shape)}))
    if a.shape in ((), (1,)):
        for name in ("scale", "bias"):
            number = {name: a.reshape(())}
            found.append(Reading("norm", number, lambda b, name=name: {"": b[name].reshape(a.shape)}))
    return found


def _recurrent(arrays: Arrays) -> list[Reading]:
    """RNN, LSTM (i, f, g, o) and GRU (r, z, n): kernels stand as here, transposed; two biases that are added are summed.

    The GRU's bias of n at the recurrent product stays apart, since r multiplies it. Equinox has one bias, and `bias_n`.
    """
    width, wide = arrays["weight_hh"].shape[::-1], np.zeros(len(arrays["weight_ih"]), arrays["weight_ih"].dtype)
    if width[1] % width[0]:
        return []  # an LSTM with projections
    n, gates = width[0], width[1] // width[0]
    first, second = arrays.get("bias_ih", arrays.get("bias", wide)), arrays.get("bias_hh", wide)
    bias, found = first + second, {"kernel": arrays["weight_ih"].T, "recurrent_kernel": arrays["weight_hh"].T}
    if gates == 3:
        bias = np.concatenate([bias[: 2 * n], first[2 * n :]])
        found["recurrent_bias"] = arrays.get("bias_n", second[2 * n :])

    def write(a):
        back = {"weight_ih": a["kernel"].T, "weight_hh": a["recurrent_kernel"].T}
        if "bias_hh" in arrays:
            apart = a.get("recurrent_bias", np.zeros(0, wide.dtype))
            back |= {
                "bias_ih": a["bias"],
                "bias_hh": np.concatenate([np.zeros(len(wide) - len(apart), wide.dtype), apart]),
            }
        elif "bias" in arrays:
            back |= {"bias": a["bias"]} | ({"bias_n": a["recurrent_bias"]} if gates == 3 else {})
        return back

    return [Reading("recurrent", found | {"bias": bias}, write)]


def _attention(arrays: Arrays) -> list[Reading]:
    """MultiheadAttention, with one array for three kernels or with three; and Linear modules by usual names."""
    out, pieces = {}, {"query": "q", "key": "k", "value": "v"}
    packed = next((n for n in ("in_proj_weight", "in_proj.weight") if n in arrays), None)
    bias = next((n for n in ("in_proj_bias", "in_proj.bias") if n in arrays), None)
    if packed and len(arrays[packed]) % 3:
        return []
    where: dict[str, tuple[str, int | None]] = {}
    for i, (name, letter) in enumerate(pieces.items()):
        if packed:
            where[f"{name}/kernel"] = packed, i
        else:
            where[f"{name}/kernel"] = next(n for n in (f"{letter}_proj_weight", f"{name}.weight") if n in arrays), None
        if bias or f"{name}.bias" in arrays:
            where[f"{name}/bias"] = (bias, i) if bias else (f"{name}.bias", None)
    for suffix in ("weight", "bias"):
        for name in (f"out_proj.{suffix}", f"out.{suffix}"):
            if name in arrays:
                where["out/kernel" if suffix == "weight" else "out/bias"] = name, None
    if {name for name, _ in where.values()} != arrays.keys() or "out/kernel" not in where:
        return []  # bias_k and bias_v, which there is nothing for here
    for name, (theirs, i) in where.items():
        part = arrays[theirs] if i is None else np.split(arrays[theirs], 3)[i]
        out[name] = part.T
    if any(name.endswith("bias") for name in out):  # without some of its biases it is the same function with zeros
        for name in ATTENTION:
            out.setdefault(f"{name}/bias", np.zeros(out[f"{name}/kernel"].shape[-1], out[f"{name}/kernel"].dtype))

    def write(a):
        back: dict[str, list[np.ndarray]] = {}
        for name, (theirs, _) in where.items():
            back.setdefault(theirs, []).append(a[name].T)
        return {theirs: np.concatenate(parts) for theirs, parts in back.items()}

    return [Reading("attention", out, write)]


def order(who: str, groups: list[Group]) -> list[Group]:
    """Sort modules that fit the same layers: as they were registered, if the state dict is in that order.

    It is not if all its names are sorted, or a bias stands before its weight, as in files sorted by name. Then numbers in
    the names decide, or nothing.
    """
    if len(groups) < 2:
        return groups
    names = [group.name for group in groups]
    backwards = [
        (a, b)
        for a, b in itertools.combinations(groups, 2)
        if numbered(a.name, b.name) and tokens(a.name) > tokens(b.name)
    ]
    if groups[0].by_name or (backwards and names == sorted(names)):
        return by_number(who, groups)
    if backwards:
        raise ambiguous(who, *backwards[0])
    return groups


def template(slot: Slot) -> dict[str, np.ndarray]:
    """Make the entries of a module for a layer, by their names in it, as PyTorch's own modules have them."""
    a = slot.arrays
    if slot.kind in ("dense", "conv", "conv_transpose"):
        kernel = a["kernel"]
        n = kernel.ndim - 2
        by = (n + 1, n) if slot.kind != "conv_transpose" else (n, n + 1)
        return {"weight": np.zeros_like(kernel.transpose(*by, *range(n)))} | {n: a[n] for n in ("bias",) if n in a}
    if slot.kind in ("norm", "batch_norm", "embedding"):
        names = {"scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}
        found = {names.get(name, name): array for name, array in a.items()}
        return found | ({"num_batches_tracked": np.zeros((), np.int64)} if slot.kind == "batch_norm" else {})
    if slot.kind == "recurrent":
        kernels = {"weight_ih": a["kernel"].T, "weight_hh": a["recurrent_kernel"].T}
        return {
            f"{n}_l0": b for n, b in (kernels | {"bias_ih": a["bias"], "bias_hh": np.zeros_like(a["bias"])}).items()
        }
    if slot.kind == "attention":
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        found, kernels = {}, [a[f"{name}/kernel"] for name in ATTENTION]
        if len({k.shape for k in kernels}) == 1:
            found["in_proj_weight"] = np.concatenate([k.T for k in kernels[:3]])
            if "query/bias" in a:
                found["in_proj_bias"] = np.concatenate([a[f"{n}/bias"] for n in ATTENTION[:3]])
        for name in ATTENTION[3:] if found else ATTENTION:
            found[f"{names[name]}.weight"] = a[f"{name}/kernel"].T
            if f"{name}/bias" in a:
                found[f"{names[name]}.bias"] = a[f"{name}/bias"]
        return found
    (array,) = a.values()
    return {"": array}
