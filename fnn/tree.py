"""Short verbs on pytrees, and `Stacked`, the node that knows its depth axis.

All sums are taken in at least float32.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from fnn import compiled, lowering, mapped, vectors
from fnn.check import contents, describe

PyTree = Any
"""One array, or a tree of arrays (dicts, tuples, dataclasses), or such a tree of what stands in their place: specs, shapes."""
Axes = int | tuple[int, ...] | None
DEPTH = jax.tree_util.GetAttrKey("[:]")
"""The key of a depth axis."""


@jax.tree_util.register_pytree_with_keys_class
class Stacked:
    """Mark a tree whose every leaf carries a leading depth axis: `leaf[i]` belongs to block i.

    `repeat` keeps parameters and state in it, so that norms, clipping, paths and layer-wise optimisers treat
    `leaf[i]` as the array that `serial` would hold for block i. Nodes nest: the outer depth axis comes first. `depth` is
    given only where no leaf tells it: in the state of an optimiser that keeps nothing of these blocks.
    """

    __slots__ = ("blocks", "depth")

    def __init__(self, blocks: PyTree, depth: int | None = None):
        self.blocks, self.depth = blocks, depth

    def tree_flatten_with_keys(self):
        return ((DEPTH, self.blocks),), self.depth

    def tree_flatten(self):
        return (self.blocks,), self.depth

    @classmethod
    def tree_unflatten(cls, depth, children):
        return cls(*children, depth=depth)

    def __getitem__(self, i: ArrayLike | slice) -> PyTree:
        """Take block i (or a slice of blocks, still stacked, without its mark)."""
        return jax.tree.map(lambda a: a[i], self.blocks)

    def __repr__(self) -> str:
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(self)):
            return f"Stacked({self.blocks!r})"  # a tree of something else in the place of arrays
        depth = next((jnp.shape(leaf)[0] for leaf in jax.tree.leaves(self) if jnp.ndim(leaf)), self.depth)
        return f"Stacked({'no' if depth is None else depth} blocks of {contents(self.blocks, depth)})"

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        """In notebooks: a node that opens."""
        from treescope.repr_lib import render_object_constructor

        return render_object_constructor(type(self), {"blocks": self.blocks}, path, subtree_renderer)


def path(entries: jax.tree_util.KeyPath) -> str:
    """Write a key path as `1/trunk/[:]/kernel`; `[:]` stands for the depth axis."""
    return jax.tree_util.keystr(tuple(entries), simple=True, separator="/")


def paths(tree: PyTree) -> list[str]:
    """List the path of every leaf, in the order of `jax.tree.leaves`."""
    return [path(entries) for entries, _ in jax.tree_util.tree_leaves_with_path(tree)]


def rows(tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None) -> Iterator[tuple[str, PyTree]]:
    """Yield (path, leaf) block after block, every depth axis written out: `1/[7]/kernel` and its slice.

    Meant for reading results: bring the tree to the host first (`jax.device_get`).
    """

    def stop(node):
        return isinstance(node, Stacked) or (is_leaf is not None and is_leaf(node))

    for entries, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        if not isinstance(node, Stacked):
            yield path(entries), node
            continue
        leaves, treedef = jax.tree.flatten(node.blocks)
        for i in range(leaves[0].shape[0] if leaves else 0):
            for inner, leaf in rows(treedef.unflatten(leaf[i] for leaf in leaves), is_leaf):
                yield "/".join(part for part in (path(entries), f"[{i}]", inner) if part), leaf


def map_depth(function: Callable[..., PyTree], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map `function(k, leaf, *rest)` over the leaves, where k counts the leaf's leading depth axes."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    others = [treedef.flatten_up_to(other) for other in rest]
    return treedef.unflatten(
        function(sum(key == DEPTH for key in entries), leaf, *args)
        for (entries, leaf), *args in zip(leaves, *others, strict=True)
    )


def size(tree: PyTree) -> int:
    """Count the numbers in a tree."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Sum a_i b_i over all leaves: float[]. A product that leaves float32's range is 0 or inf."""
    products = jax.tree.map(lambda u, v: jnp.sum(_wide(u) * _wide(v)), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))


def norm(tree: PyTree) -> jax.Array:
    """Take sqrt(sum |a_i|²) over all leaves: float[]. Its gradient at the zero tree is zero, not NaN.

    Right wherever the norm itself is a float: this and all norms below take squares that leave float32's range again,
    relative to the largest number. Errors: TypeError for complex numbers, here and below.
    """
    leaves = [native(a) for a in jax.tree.leaves(tree)]
    return _JITTED[norm_of_all](leaves) if leaves else jnp.zeros(())


def count(tree: PyTree) -> jax.Array:
    """Count the numbers in a tree, as `size` does, but as a float32[] that programs compute: see `WHOLE`."""
    return _JITTED[count_of_all](jax.tree.leaves(tree))


def norm_of_all(leaves: Sequence[ArrayLike]) -> jax.Array:
    """`norm` of a list of arrays."""
    return _lengths(vectors.pack([_wide(a) for a in leaves]), None)[0]


def count_of_all(leaves: Sequence[ArrayLike]) -> jax.Array:
    """`count` of a list of arrays."""
    return jnp.asarray(sum(jnp.size(a) for a in leaves), jnp.float32)


for _function in (norm_of_all, count_of_all):  # names that no function of a user's has
    _function.__name__ = f"fnn.tree.{_function.__name__}"
_JITTED = {function: compiled.limited(function) for function in (norm_of_all, count_of_all)}
WHOLE: dict[str, Callable[[Sequence[ArrayLike]], jax.Array]] = {function.__name__: function for function in _JITTED}
"""Functions of all arrays of a tree at once, the same however these are cut or stacked. Each is one operation of that name
in a program, by which `lift` knows it."""


def norms(tree: PyTree) -> PyTree:
    """Take the norm of every parameter array: a tree of float[], float[depth] below a `Stacked` node."""
    leaves, treedef = jax.tree.flatten(tree)
    depths = jax.tree.leaves(map_depth(lambda k, _: k, tree))
    axes = tuple(tuple(range(k, jnp.ndim(a))) for a, k in zip(leaves, depths, strict=True))
    return treedef.unflatten(_lengths_jitted([_wide(a) for a in leaves], axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _lengths(leaves: list[jax.Array], axes: Any) -> list[jax.Array]:
    """Take |a| of each array over its axes or, without axes, of all arrays together."""

    def plain(leaves):
        squares = [jnp.sum(jnp.square(a), axis=i) for a, i in _with_axes(leaves, axes)]
        squares = squares if axes is not None else [sum(squares, start=jnp.zeros((), jnp.float32))]
        return [safe_sqrt(s) for s in squares], [safe(s) for s in squares]

    if not lowering.conditionals():
        return _lengths_by_ranges(leaves, axes)
    return guarded(plain, functools.partial(_relative_lengths, axes=axes), leaves)


@_lengths.defjvp
def _lengths_jvp(axes, primals, tangents):
    # Through plain squares the derivative would be 0·inf where they leave the range.
    return jax.jvp(functools.partial(_relative_lengths, axes=axes), primals, tangents)


_lengths_jitted = compiled.limited(_lengths, static_argnums=1)


def _relative_lengths(leaves: list[jax.Array], axes: Any) -> list[jax.Array]:
    found = [_relative_length(a, i) for a, i in _with_axes(leaves, axes)]
    return found if axes is not None else [_relative_length(jnp.stack(found))]


def _lengths_by_ranges(leaves: list[jax.Array], axes: Any) -> list[jax.Array]:
    """Take norms in one pass: squares of small, medium and large numbers are summed side by side, and one sum is right.

    On an accelerator a second pass over all gradients costs more. One reduction: of three XLA may make three kernels.
    """

    def square(a, scale):
        if scale == 1:
            return jnp.square(a)
        # The bound is never reached where the sum counts. Without it XLA may write (a·s)² as a²·s², and without `abs` before the
        # product (c·a)·s as a·(c·s): constants that are infinite, and NaN for a = 0.
        most = jnp.finfo(a.dtype).max if scale < 1 else 2.0 ** (jnp.finfo(a.dtype).maxexp // 2 - 2)
        return jnp.square(jnp.minimum(jnp.abs(a) * scale, most))

    def three(a, axis):
        return vectors.summed([square(a, scale) for scale in _scales(a.dtype)], range(a.ndim) if axis is None else axis)

    sums = [three(a, axis) for a, axis in _with_axes(leaves, axes)]
    if axes is None:
        dtype = functools.reduce(jnp.promote_types, [a.dtype for a in leaves], jnp.float32)
        sums = [[sum((part[n].astype(dtype) for part in sums), start=jnp.zeros((), dtype)) for n in range(3)]]
    found = []
    for large, medium, small in sums:
        (down, _, up), info = _scales(medium.dtype), jnp.finfo(medium.dtype)
        in_range = jnp.where(medium > info.max, jnp.sqrt(large) / down, jnp.sqrt(medium))
        # Where the medium sum is not above this bound, it may have lost numbers that count; NaN stays NaN.
        found.append(jnp.where(medium <= info.tiny / info.eps**2, safe_sqrt(small) / up, in_range))
    return found


def _scales(dtype: DTypeLike) -> tuple[float, float, float]:
    """Powers of two that bring large, medium and small numbers to where their squares are floats: 2^-100, 1, 2^100."""
    power = 2.0 ** (jnp.finfo(dtype).maxexp * 25 // 32)
    return 1 / power, 1.0, power


def _with_axes(leaves: list[jax.Array], axes: Any) -> Iterator[tuple[jax.Array, Any]]:
    return zip(leaves, [None] * len(leaves) if axes is None else axes, strict=True)


def length(a: jax.Array, axis: Axes = None, keepdims: bool = False) -> jax.Array:
    """Take |a| over some axes (all of them by default), at any scale, and each for itself under `vmap`."""
    if lowering.conditionals():
        return _relative_length(a, axis, keepdims)
    axes = tuple(range(a.ndim) if axis is None else (int(i) % a.ndim for i in np.atleast_1d(axis)))
    found = _lengths([_wide(a)], (axes,))[0]
    return jnp.expand_dims(found, axes) if keepdims else found


def _relative_length(a: jax.Array, axis: Axes = None, keepdims: bool = False) -> jax.Array:
    peak, total = relative_square(a, axis, keepdims)
    return peak * safe_sqrt(total)


def log_norms(tree: PyTree) -> PyTree:
    """Take log |a| of every parameter array without leaving the exponent range: shapes as in `norms`.

    log |a| = log m + ½ log sum (a/m)², m = max |a|. A zero array gives -inf, a non-finite one NaN or inf.
    """
    return map_depth(lambda k, a: log_norm(a, axis=tuple(range(k, jnp.ndim(a)))), tree)


def log_norm(a: jax.Array, axis: Axes = None) -> jax.Array:
    """Take log |a| over some axes (all of them by default); see `log_norms`."""
    peak, total = relative_square(a, axis)
    return jnp.log(peak) + 0.5 * jnp.log(total)


def relative_square(a: ArrayLike, axis: Axes = None, keepdims: bool = False) -> tuple[jax.Array, jax.Array]:
    """Write sum |a|² over some axes (all of them by default) as peak²·total, where no square leaves the range."""
    a = _wide(a)
    some = keepdims or (axis is not None and len(np.atleast_1d(axis)) < a.ndim)  # XLA copies for sums to axes of size 1
    peak = divisor(jnp.max(jnp.abs(a), axis=axis, keepdims=some, initial=0))
    # Not times 1/peak: of constants XLA would make a² times 1/peak², which may be inf.
    total = jnp.sum(jnp.square(a / peak), axis=axis, keepdims=keepdims)
    return (peak if keepdims or not some else jnp.squeeze(peak, axis)), total


def safe(square: jax.Array, bound: ArrayLike = 1) -> jax.Array:
    """Whether a sum of squares lost nothing to float32's range: no part overflowed, and none that counts underflowed.

    `bound` is the largest number that a part lost may have been multiplied with.
    """
    info = jnp.finfo(square.dtype)
    return (square > bound * (info.tiny / info.eps**2)) & (square < info.max)


def guarded(
    plain: Callable[..., PyTree], relative: Callable[..., PyTree], *args: PyTree, axis_name: mapped.AxisName = None
) -> PyTree:
    """Return the value of `plain(*args) -> (value, inside)` if all are inside, else `relative(*args)`, right at any scale.

    With `axis_name` all of a mapped axis decide together, since `vmap` would compute both for each. Where a conditional is
    expensive (`lowering.conditionals`), `relative` is always taken.
    """
    if not lowering.conditionals():
        return relative(*args)
    value, inside = plain(*args)
    inside = functools.reduce(jnp.logical_and, map(jnp.all, jax.tree.leaves(inside)), jnp.array(True))
    if axis_name is not None:
        inside = mapped.reduce(jax.lax.pmin, inside.astype(jnp.int32), mapped.lanes(axis_name)) > 0
    return jax.lax.cond(inside, lambda value, args: value, lambda value, args: relative(*args), value, args)


def stack(trees: Iterable[PyTree]) -> Stacked:
    """Stack the trees of n blocks into one `Stacked` tree."""
    return Stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))


def unstack(stacked: Stacked) -> tuple[PyTree, ...]:
    """Split a `Stacked` tree into the trees of its blocks, the inverse of `stack`."""
    leaves = jax.tree.leaves(stacked)
    if not leaves:
        raise ValueError("tree.unstack: the tree must have a leaf, got none, so its depth is unknown")
    return tuple(stacked[i] for i in range(leaves[0].shape[0]))


def safe_sqrt(a: jax.Array) -> jax.Array:
    """Take sqrt(a) for a >= 0, with gradient zero at a = 0."""
    zero = a == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, a)))


def clip_factor(norm: jax.Array, limit: ArrayLike) -> jax.Array:
    """Compute min(1, limit/norm): NaN for NaN, and exactly 1 up to the limit, where limit/limit on a GPU may be below 1."""
    return jnp.where(norm <= limit, jnp.ones_like(norm), limit / jnp.maximum(norm, limit))


def divisor(peak: jax.Array) -> jax.Array:
    """Return what to divide an array by whose largest number is `peak`: no 0/0 and no inf/inf, and 1 where all is zero.

    The divisor and its reciprocal are normal numbers, since XLA may multiply by the reciprocal and takes subnormal numbers for
    zero. It is not small where all is zero: XLA may also write (c·a)/peak as a·(c/peak), and 0·inf is NaN.
    """
    tiny = jnp.finfo(peak.dtype).tiny
    return jax.lax.stop_gradient(jnp.where(peak < tiny, jnp.ones_like(peak), jnp.minimum(peak, 1 / tiny)))


def bound(peak: jax.Array) -> jax.Array:
    """Keep the largest number of an array between the smallest normal number and its reciprocal."""
    tiny = jnp.finfo(peak.dtype).tiny
    return jax.lax.stop_gradient(jnp.clip(peak, tiny, 1 / tiny))


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """Say in which dtype statistics of such data are kept: at least float32."""
    return jnp.promote_types(jnp.float32, dtype)


def native(a: PyTree) -> PyTree:
    """Give an array of NumPy this machine's byte order; anything else as it is.

    JAX refuses other orders, but a program that it has compiled already reads their bytes as if they were its own.
    """
    if isinstance(a, np.ndarray | np.generic) and not a.dtype.isnative:
        return a.astype(a.dtype.newbyteorder("="))
    return a


def _wide(a: ArrayLike) -> jax.Array:
    a = jnp.asarray(native(a))
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        raise TypeError(f"tree: arrays must be real, got {describe(a)}; keep real and imaginary parts as two arrays")
    return a.astype(statistics_dtype(a.dtype))
