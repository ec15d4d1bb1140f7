"""The weight matrices among a net's parameters: how large their weights are for their inputs, and other ones of a wanted size."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import tree

SMALL, LARGE = 1e-3, 4.0
"""RMS of the numbers of an embedding or a table of positions, between which they are left as they are."""


def is_narrow(params: Any) -> bool:
    """Whether there are parameters of less than 32 bits."""
    return any(a.dtype.itemsize < 4 for a in jax.tree.leaves(params))


def redrawn(params: Any, gain: float, seed: int, last: int | None = None, recurrent: tuple[int, ...] = ()) -> Any:
    """Redraw weights: each kernel from N(0, gain²/fan_in), the last one from N(0, 1/fan_in); biases 0, scales 1.

    Those of a state to the next one, `recurrent`, are orthogonal. An embedding or a table of positions, if it is far too
    large or too small, is drawn from N(0, 1/width).
    """
    rng = np.random.default_rng(seed)
    leaves = list(zip(tree.paths(params), jax.tree.leaves(params), _depths(params), strict=True))
    kernels = [i for i, (path, a, k) in enumerate(leaves) if is_kernel(path, a, k)]
    last = kernels[-1] if last is None and kernels else last
    new = []
    for i, (path, a, k) in enumerate(leaves):
        name = named(path)
        if i in recurrent:
            a = jnp.asarray(np.linalg.qr(rng.standard_normal(a.shape))[0], a.dtype)
        elif i in kernels:
            std = (1.0 if i == last else gain) / np.sqrt(fan_in(path, a, k))
            a = jnp.asarray(rng.standard_normal(a.shape) * std, a.dtype)
        elif is_table(path, a, k):
            if not SMALL <= _rms(a) <= LARGE:
                a = jnp.asarray(rng.standard_normal(a.shape) / np.sqrt(a.shape[-1]), a.dtype)
        elif name in ("bias", "b"):
            a = jnp.zeros_like(a)
        elif name == "scale":
            a = jnp.ones_like(a)
        new.append(a)
    return jax.tree.unflatten(jax.tree.structure(params), new)


def square(params: Any, over_time: tuple[int, ...]) -> tuple[int, ...]:
    """List those of some arrays that are square matrices: of a loop's parameters, the kernels from a state to the next one."""
    leaves = jax.tree.leaves(params)
    return tuple(i for i in over_time if leaves[i].ndim >= 2 and leaves[i].shape[-1] == leaves[i].shape[-2])


def kept(params: Any, recurrent: tuple[int, ...]) -> float:
    """Give the largest singular value of the recurrent kernel that has the smallest one, or NaN where a weight is not finite.

    A linear step keeps no more of the state.
    """
    arrays = [np.asarray(jax.tree.leaves(params)[i], np.float64) for i in recurrent]
    if not all(np.isfinite(a).all() for a in arrays):
        return float("nan")
    return min(float(np.linalg.norm(a, 2, (-2, -1)).max()) for a in arrays)


def named(path: str) -> str:
    """Give the last part of a path, without the `value` of Flax's NNX."""
    return path.removesuffix("/value").rpartition("/")[2]


def fan_in(path: str, a: Any, depths: int) -> int:
    """Count the inputs of a unit: of a `weight` (Equinox, PyTorch) outputs come first, of all others last."""
    shape = a.shape[depths:]
    return int(np.prod(shape[1:] if named(path) == "weight" else shape[:-1]))


def is_kernel(path: str, a: Any, depths: int) -> bool:
    """Whether an array is a weight matrix or a convolution, not an embedding or a table of positions."""
    return a.ndim - depths >= 2 and not _looked_up(path)


def is_table(path: str, a: Any, depths: int) -> bool:
    """Whether an array is an embedding or a table of positions."""
    return a.ndim - depths >= 2 and _looked_up(path)


def _looked_up(path: str) -> bool:
    return "embedding" in path or "position" in path


def _rms(a: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64)))))


def tables(params: Any) -> dict[str, float]:
    """Give the RMS of each embedding and table of positions."""
    leaves = zip(tree.paths(params), jax.tree.leaves(params), _depths(params), strict=True)
    return {path.removesuffix("/value"): _rms(a) for path, a, k in leaves if is_table(path, a, k)}


def count(params: Any) -> int:
    """Count the weight matrices, those of a stack one by one."""
    leaves = zip(tree.paths(params), jax.tree.leaves(params), _depths(params), strict=True)
    return sum(int(np.prod(a.shape[:k])) for path, a, k in leaves if is_kernel(path, a, k))


def _depths(params: Any) -> list[int]:
    """Count, for each array, the leading axes that are layers of `repeat`."""
    return jax.tree.leaves(tree.map_depth(lambda k, a: k, params))


def keepers(params: Any) -> list[tuple[int, slice]]:
    """Find the biases of the gates that keep a recurrent cell's content: which leaf, and which of its last axis.

    A cell is known by its shapes: in one place of the tree two matrices, of the inputs and of the state, lead to the same
    units as one bias, and the state has a quarter of them (an LSTM, in the order i, f, g, o) or a third (a GRU: r, z, n).
    fnn, Equinox, Flax and PyTorch have these orders; Flax's `LSTMCell` has a layer `hf`.
    """
    leaves = list(zip(tree.paths(params), jax.tree.leaves(params), _depths(params), strict=True))
    places: dict[str, list[int]] = {}
    for i, (path, _, _) in enumerate(leaves):
        parent = path.removesuffix("/value").rpartition("/")[0]
        for place in dict.fromkeys((parent, parent.rpartition("/")[0])):
            places.setdefault(place, []).append(i)
    found: dict[int, slice] = {}
    for members in places.values():
        shapes = {i: leaves[i][1].shape[leaves[i][2] :] for i in members}
        for i, shape in shapes.items():
            if len(shape) != 1:
                continue
            (m,) = shape
            matrices = [s for s in shapes.values() if len(s) == 2 and m in s]
            for axis in (0, 1):  # both matrices lead to the units along the same axis
                into = [s[axis] for s in matrices if s[1 - axis] == m]
                gates = [k for k in (3, 4) if len(matrices) == len(into) == 2 and m % k == 0 and m // k in into]
                if gates and sum(s == shape for s in shapes.values()) == 1:
                    found[i] = slice(m // gates[0], 2 * (m // gates[0]))
    found |= {
        i: slice(None) for i, (path, _, _) in enumerate(leaves) if path.removesuffix("/value").endswith("hf/bias")
    }
    return sorted(found.items())


def keeping(params: Any, bias: float) -> Any:
    """Set the biases of `keepers`."""
    leaves = jax.tree.leaves(params)
    for i, part in keepers(params):
        leaves[i] = jnp.asarray(leaves[i]).at[..., part].set(bias)
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def gains(params: Any) -> list[tuple[str, np.ndarray]]:
    """List each kernel's path and sqrt(fan_in) times its std, one for each block of a stack."""
    found = []
    for path, a, k in zip(tree.paths(params), jax.tree.leaves(params), _depths(params), strict=True):
        if is_kernel(path, a, k):
            a = np.asarray(a, np.float64)
            found.append((path, np.atleast_1d(a.std(axis=tuple(range(k, a.ndim))) * np.sqrt(fan_in(path, a, k)))))
    return found
