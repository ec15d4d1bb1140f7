"""Mapped axes: collectives over axes of `vmap` and `shard_map`, and computing with arrays on an explicit mesh.

Inside `jax.shard_map` (with `check_vma=True`, its default) the type of a value says over which mesh axes it varies. The
gradient of a value that does not vary, such as a replicated parameter, is summed over all devices by autodiff. fnn averages
gradients itself, as it must under `vmap` and with `check_vma=False`, so it first makes parameters vary (`varying`). Outside
of `shard_map` none of this changes anything.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AxisName = Hashable | tuple[Hashable, ...] | None
"""The name of a mapped axis, the names of several, or None for none."""


def names(axis_name: AxisName) -> tuple[Hashable, ...]:
    """Return the axes in `axis_name` (None, one name, or several) as a tuple."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def over(tree: Any) -> frozenset[Hashable]:
    """Return the mesh axes over which the leaves vary by their types: none outside of `shard_map(check_vma=True)`."""
    return frozenset().union(*map(_over, jax.tree.leaves(tree)))


def varying(tree: Any, axis_name: AxisName = None, *, like: Any = ()) -> Any:
    """Mark the leaves as varying over the mapped axes and over the axes of `like`.

    Three things need it: parameters before they are differentiated, a loop's carry that starts as a constant, and the
    cotangents of a custom rule. Values stay the same; under `vmap` and with `check_vma=False` the types do too.
    """
    wanted = over(like).union(_meshed(axis_name))
    if not wanted:
        return tree

    def cast(leaf):
        missing = tuple(sorted(wanted - _over(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def reduce(operation: Callable[[Any, Any], Any], tree: Any, axis_name: AxisName) -> Any:
    """Apply `jax.lax.psum`, `pmean`, `pmax` or `pmin` over the mapped axes; without any, return the tree.

    JAX refuses one call for axes of both `vmap` and `shard_map`, and a value that varies over only some of the axes.
    Errors: ValueError for an axis of `vmap` inside `shard_map(check_vma=True)`: JAX has no collectives over those.
    """
    every = names(axis_name)
    if not every:
        return tree
    if not checked():
        return operation(tree, axis_name)
    meshed = _meshed(axis_name)
    for name in (name for name in every if name not in meshed):
        if not isinstance(name, Lanes):
            raise ValueError(
                f"axis_name: JAX cannot average over an axis of vmap inside shard_map with check_vma=True, got {name!r}; "
                "use fnn.example_loss, or pass check_vma=False to shard_map"
            )
        tree = jax.tree.map(functools.partial(name.reduce, operation), tree)
    return operation(varying(tree, axis_name), meshed) if meshed else tree


def mean(tree: Any, axis_name: AxisName) -> Any:
    """Average over the mapped axes; without any, return the tree."""
    return reduce(jax.lax.pmean, tree, axis_name)


def averaged(function: Callable[[Any], Any], axis_name: AxisName) -> Callable[[Any], Any]:
    """Average a function of replicated parameters over the mapped axes: its value, and its derivatives of any order.

    Where types do not say what varies, the transpose of a mean is a mean. So one mean of the parameters, which changes no
    value, averages the gradient.
    """
    if not names(axis_name):
        return function

    def same(p):
        q = mean(p, axis_name)
        return jax.lax.stop_gradient(p) + (q - jax.lax.stop_gradient(q))

    def run(params):
        ready = varying(params, axis_name) if checked() else jax.tree.map(same, params)
        return mean(function(ready), axis_name)

    return run


def replicated(tree: Any, like: Any, axis_name: AxisName) -> Any:
    """Average the leaves that vary over more axes than those of `like`, from which they were computed."""

    def back(leaf, old):
        return mean(leaf, axis_name) if _over(leaf) - _over(old) else leaf

    return jax.tree.map(back, tree, like)


def auto(function: Callable[..., Any], keep: bool = False) -> Callable[..., Any]:
    """Let XLA shard the arrays inside a function if they are on a mesh with explicit axes (`jax.make_mesh`).

    Explicit axes are part of an array's type, and JAX refuses a product of two arrays that sums over a sharded axis, as
    every weight's gradient does. Results are replicated; with `keep` the first of two is sharded like the first argument.
    """

    @functools.wraps(function)
    def run(*args):
        mesh = explicit(args)
        if mesh is None:
            return function(*args)
        everywhere = NamedSharding(mesh, PartitionSpec())

        def own(leaf):
            spec = jax.typeof(leaf).sharding.spec
            return NamedSharding(mesh, spec) if any(spec) else everywhere

        out = (jax.tree.map(own, args[0]), everywhere) if keep else everywhere
        try:
            return jax.sharding.auto_axes(function, out_sharding=out)(*args)
        except ValueError as error:
            if "should match the mesh passed to shard_map" not in str(error):
                raise
            raise ValueError(
                "a function that calls shard_map itself must do so on a mesh with automatic axes here, got explicit ones; make it "
                "with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,)), one for each axis"
            ) from error

    return run


def explicit(tree: Any) -> Any:
    """Return the mesh with explicit axes that an array of the tree is on; None if there is none."""
    meshes = [getattr(getattr(_type(leaf), "sharding", None), "mesh", None) for leaf in jax.tree.leaves(tree)]
    for mesh in (jax.sharding.get_abstract_mesh(), *meshes):
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def placed(tree: Any) -> Any:
    """Return concrete arrays on a mesh with explicit axes as arrays on the same mesh with automatic axes, without a copy."""

    def relabel(leaf):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        return relabelled(leaf, automatic(sharding.mesh))

    return jax.tree.map(relabel, tree)


@contextlib.contextmanager
def on_automatic() -> Iterator[None]:
    """Let a mesh with explicit axes that is in force have automatic ones: arrays that are `placed` go with no other."""
    mesh = jax.sharding.get_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.set_mesh(automatic(mesh)):
        yield


def automatic(mesh: Any) -> Mesh:
    """Return a mesh over the same devices, with automatic axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def relabelled(leaf: Any, mesh: Mesh) -> Any:
    """Return an array that lies on a mesh as an array on another of the same devices, without a copy."""
    parts = [part.data for part in leaf.addressable_shards]  # `device_put` refuses what other processes hold
    return jax.make_array_from_single_device_arrays(leaf.shape, NamedSharding(mesh, leaf.sharding.spec), parts)


def checked() -> bool:
    """Whether this is inside `shard_map(check_vma=True)`, where types show over which axes values vary."""
    manual = _manual()
    return bool(manual and _over(jax.lax.axis_index(manual[0])))


def size(axis_name: AxisName) -> int:
    """Multiply the sizes of the mapped axes."""
    every = (name.size if isinstance(name, Lanes) else jax.lax.axis_size(name) for name in names(axis_name))
    return math.prod(every)


def index(axis_name: AxisName) -> jax.Array | int:
    """Return the index along the mapped axes, like `jax.lax.axis_index`; the first axis is the slowest."""
    total = 0
    for name in names(axis_name):
        if not isinstance(name, Lanes):
            total = total * jax.lax.axis_size(name) + jax.lax.axis_index(name)
        elif name.number is not None:
            total = total * name.size + name.number
    return total


def lanes(axis_name: AxisName, number: jax.Array | None = None) -> AxisName:
    """Return the axes, with `Lanes` for those of `vmap` if JAX has no collectives over them."""
    if axis_name is None or not checked():
        return axis_name
    meshed = _meshed(axis_name)
    return tuple(
        name if name in meshed or isinstance(name, Lanes) else Lanes(jax.lax.axis_size(name), number)
        for name in names(axis_name)
    )


class Lanes:
    """Stand-in for the name of the innermost `vmap`'s axis inside `shard_map(check_vma=True)`.

    `number` is the index of the lane, if known; only `index` reads it.
    """

    def __init__(self, size: int, number: jax.Array | None = None):
        self.size, self.number = size, number

    def reduce(self, operation: Any, x: Any) -> Any:
        """Reduce over the lanes. Sums and means are linear, and their transpose is the same function."""
        over = _over_lanes(operation, self.size)
        if operation in (jax.lax.pmax, jax.lax.pmin):
            return over(x)
        try:
            return jax.custom_derivatives.linear_call(lambda _, x: over(x), lambda _, x: over(x), (), x)
        except NotImplementedError as error:  # JAX cannot map over a linear call
            raise ValueError(
                f"axis_name: an average over {self.size} examples must be taken outside of any vmap of your own, got one "
                "inside; pass check_vma=False to shard_map"
            ) from error


@functools.cache
def _over_lanes(operation: Any, size: int) -> Any:
    whole = {jax.lax.psum: jnp.sum, jax.lax.pmean: jnp.mean, jax.lax.pmax: jnp.max, jax.lax.pmin: jnp.min}[operation]

    @jax.custom_batching.custom_vmap
    def over(x):  # runs like this for a value that is the same in all lanes
        return size * x if operation is jax.lax.psum else x

    @over.def_vmap
    def rule(axis_size, batched, x):
        if axis_size != size:
            raise ValueError(
                f"axis_name: an average over {size} examples must be taken outside of any vmap of their own, got one of "
                f"size {axis_size}; pass check_vma=False to shard_map"
            )
        return whole(x, axis=0).astype(x.dtype), False

    return over


def _meshed(axis_name: AxisName) -> tuple[Hashable, ...]:
    """Return the named axes that types mention: axes of a mesh, inside `shard_map(check_vma=True)`."""
    return tuple(name for name in names(axis_name) if name in _manual()) if checked() else ()


def _manual() -> list[Hashable]:
    mesh = jax.sharding.get_abstract_mesh()
    return [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual]


def _over(leaf: Any) -> frozenset[Hashable]:
    kind = _type(leaf)
    kind = getattr(kind, "manual_axis_type", kind)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))


def _type(leaf: Any) -> Any:
    return jax.typeof(leaf) if isinstance(leaf, jax.Array) else None
