"""Data from outside: everything that can become an array becomes one here, and everything else is refused.

Arrays may come from NumPy, JAX, PyTorch, pandas, polars, TensorFlow, or anything else with `__array__` or `__dlpack__`;
lists of numbers are arrays too. No value changes silently: integers that JAX would wrap, complex numbers, masked arrays,
strings and objects are refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnn import check
from fnn.tree import PyTree, native

Batch = Sequence[PyTree]
"""(x, y), or (x, y, weights): arrays, or trees of arrays."""
PLAIN = {np.dtype(kind) for kind in ("?", "b", "B", "h", "H", "i", "e", "f", "d", jnp.bfloat16)}
"""Dtypes that JAX takes without changing a value."""


class Weighted(NamedTuple):
    """Targets, and how much each example counts in the mean: `weights: float[batch]`, at least 0.

    The mean of a loss or metric is sum(w l) / sum(w), NaN where all weights are 0. Data and batches (x, y, weights) become
    (x, Weighted(y, weights)); among targets by name, one task may have weights of its own, which only
    its loss and accuracy take into account: metrics of your own get the targets as you gave them.
    """

    targets: PyTree
    weights: ArrayLike


def array(who: str, name: str, a: Any) -> np.ndarray | jax.Array:
    """Turn a into an array of NumPy or JAX; return it as it is if it is one already.

    Errors: TypeError for anything but real numbers; ValueError for integers beyond int32 (with x64 on, int64) and for
    masked entries.
    """
    given = a
    if type(a) is not np.ndarray and not isinstance(a, jax.Array):
        a = _converted(who, name, a)
    kind = a.dtype
    if kind in PLAIN:
        return a
    if jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(
            f"{who}: {name} must be real, got {check.describe(a)}; pass real and imaginary parts as features of their own"
        )
    if not (jnp.issubdtype(kind, jnp.number) or kind == np.bool_):
        got = check.describe(a) if isinstance(given, np.ndarray | jax.Array) else f"{type(given).__name__} of {kind}"
        hint = "np.unique(labels, return_inverse=True)[1] numbers classes" if name == "y" else "encode it as numbers"
        raise TypeError(f"{who}: {name} must hold numbers, got {got}; {hint}")
    if isinstance(a, jax.Array):
        return a
    a = narrow(who, name, a)
    return a.astype(np.float64) if kind == np.longdouble else a


def narrow(who: str, name: str, a: Any) -> Any:
    """Refuse integers of NumPy that JAX would wrap (2^32 + k would become k); return anything else, as `native`."""
    a = native(a)
    if isinstance(a, np.ndarray | np.generic) and a.dtype.kind in "iu" and a.dtype not in PLAIN:
        widest = jax.dtypes.canonicalize_dtype(np.int64)
        info = np.iinfo(widest)
        if a.size and (a.min() < info.min or a.max() > info.max):
            raise ValueError(f"{who}: {name} must fit in {widest}, got values from {a.min()} to {a.max()}; map them")
    return a


def arrays(who: str, name: str, tree: PyTree) -> PyTree:
    """Turn every leaf of a tree (several inputs, `Masked`) into an array; lists of numbers are one array each."""
    if type(tree) is np.ndarray or isinstance(tree, jax.Array):
        return array(who, name, tree)  # the usual case, made fast for the loop over steps
    return jax.tree.map(lambda a: array(who, name, a), tree, is_leaf=lambda a: is_numbers(a) or isinstance(a, Iterator))


def arguments(who: str, rest: Any) -> tuple[Any, ...]:
    """Turn what follows a loss's parameters into arrays; random keys stay as they are, raw ones have all 32 bits."""

    def key(a):
        raw = isinstance(a, np.ndarray) and a.dtype == np.uint32
        return raw or (isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key))

    def one(a):
        return a if key(a) else array(who, "the batch", a)

    return jax.tree.map(one, tuple(rest), is_leaf=lambda a: is_numbers(a) or isinstance(a, Iterator))


def pair(who: str, batch: Batch) -> tuple[PyTree, PyTree]:
    """Turn (x, y) or (x, y, weights), a tuple or list, into a pair of arrays or of trees of arrays."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise TypeError(f"{who} must be a pair (x, y), got {brief(batch)}; put both into one tuple")
    x, y = weighted(batch)
    return arrays(who, "x", x), arrays(who, "y", y)


def weighted(batch: Batch) -> Batch:
    """Return (x, y) of a batch, y being `Weighted` if the batch is (x, y, weights)."""
    return (batch[0], Weighted(batch[1], batch[2])) if len(batch) == 3 else batch


def brief(x: Any) -> str:
    """Describe x in at most 100 characters."""
    text = check.describe(x)
    return text if len(text) <= 100 else f"{text[:97]}..."


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")


def is_numbers(a: Any) -> bool:
    """Whether x is a list or tuple of numbers, strings or further such lists, which becomes one array."""
    if type(a) not in (list, tuple) or not a:
        return False
    return all(is_numbers(b) or (not isinstance(b, jax.Array) and _is_scalar(b)) for b in a)


def _is_scalar(a: Any) -> bool:
    return isinstance(a, bool | int | float | complex | str | bytes | np.generic)


def _converted(who: str, name: str, a: Any) -> Any:
    if isinstance(a, np.ma.MaskedArray) and np.ma.is_masked(a):
        raise ValueError(f"{who}: {name} must have no masked entries, got {np.ma.count_masked(a)}; fill or drop them")
    if callable(detach := getattr(a, "detach", None)):
        a = detach()  # a PyTorch tensor that requires gradients
    readers = [np.from_dlpack, _from_dlpack] if hasattr(a, "__dlpack__") else []
    if hasattr(a, "__array__") or not readers:
        readers.insert(0, np.asarray)
    reasons = []
    for read in readers:
        try:
            return read(a)
        except Exception as error:
            reasons.append(error)
    got = f"{type(a).__name__} ({first_line(reasons[0])})"
    raise TypeError(f"{who}: {name} must be an array that NumPy can read, got {got}; convert it first") from reasons[0]


def _from_dlpack(a: Any) -> np.ndarray:
    """Read what NumPy cannot: bfloat16, or an array on JAX's own device."""
    with jax.enable_x64(True):  # or JAX would wrap 64-bit integers
        return np.asarray(jnp.from_dlpack(a))
