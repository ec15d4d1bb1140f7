"""Several devices: where the arrays of a run lie on a mesh, and a step that keeps them there.

XLA cuts the program for one device into one for each (`jax.sharding`). Nothing is mapped and no axis is named, so that every
number is that of the whole batch. A mesh with explicit axes is used as the same mesh with automatic ones.
"""

import fnmatch
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fnn import check, lowering, mapped, tree
from fnn.arrays import brief
from fnn.core import Layer
from fnn.datasets.dataset import Dataset
from fnn.training.step import TrainState, TrainStep, check_state

F = TypeVar("F", bound=Callable[..., Any])
LARGEST = "largest"
Rule = PartitionSpec | str


def shard(state: TrainState, mesh: Mesh, rules: Rule | Mapping[str, Rule] | None = None) -> TrainState:
    """Lay a copy of a state onto the devices of a mesh: parameters whole on each of them, or cut by rules.

    `rules` is a dict from patterns of parameter paths (`fnmatch`; the first that matches counts) to rules, such as
    `{"*/kernel": PartitionSpec(None, "model"), "*": "largest"}`, or one rule for all. A `PartitionSpec` says along which
    axis of the mesh each axis of an array is cut; below `repeat` it is that of one block's array. "largest" cuts the largest
    axis that the mesh's first axis divides; vectors, and arrays of up to 16,384 numbers, stay whole. Parameters without a
    rule are whole.

    What the optimiser keeps of a parameter is cut as the parameter is: it is known by its path, or by its shape where all
    parameters of that shape are cut alike. All else is whole.

    With several processes (`jax.distributed`) each must hold the same state. Errors: ValueError for a rule that matches no
    parameter, that names no axis of the mesh, or that cuts an axis which its devices do not divide; TypeError for what is
    no mesh.
    """
    own = automatic("shard", mesh)
    check_state("shard", state)
    check.alive("shard", state)
    _agree("shard", state=state)
    with jax.set_mesh(own):
        state = mapped.placed(state)
        return released(_put(state, layout("shard", state, own, rules)), mesh)


def layout(who: str, state: TrainState, mesh: Mesh, rules: Any = None) -> Any:
    """Decide where each array of a state lies: a tree like the state, of `NamedSharding`."""
    rules = {} if rules is None else dict(rules) if isinstance(rules, Mapping) else {"*": rules}
    for pattern, rule in rules.items():
        if not isinstance(rule, PartitionSpec) and rule != LARGEST:
            raise TypeError(
                f"{who}: a rule must be a jax.sharding.PartitionSpec or {LARGEST!r}, got {rule!r} for {pattern!r}; "
                "PartitionSpec() keeps arrays whole"
            )
    paths, used = iter(tree.paths(state.params)), set()

    def spec(depth, leaf):
        path = next(paths)
        found = [pattern for pattern in rules if pattern == path or fnmatch.fnmatchcase(path, pattern)]
        used.update(found)
        if not found:
            return PartitionSpec()
        rule = rules[found[0]]
        own = _largest(leaf.shape[depth:], mesh) if rule == LARGEST and leaf.size > lowering.SMALL else ()
        own = own if rule == LARGEST else _given(f"{who}: the rule for {path}", rule, leaf.shape[depth:], mesh)
        return PartitionSpec(*[None] * depth, *own) if any(own) else PartitionSpec()

    params = tree.map_depth(spec, state.params)
    if unused := [pattern for pattern in rules if pattern not in used]:
        known = ", ".join(tree.paths(state.params)[:4])
        raise ValueError(f"{who}: every rule must match a parameter, got {unused[0]!r} for a net with {known}, ...")
    specs = jax.tree.map(lambda _: PartitionSpec(), state)
    specs = specs.replace(params=params, opt_state=_kept(state.opt_state, state.params, params))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> tuple[Any, ...]:
    """Cut the largest axis that the first axis of the mesh divides, the first of equal ones."""
    cut = [i for i, n in enumerate(shape) if len(shape) > 1 and not n % mesh.devices.shape[0]]
    return (*[None] * max(cut, key=lambda i: shape[i]), mesh.axis_names[0]) if cut else ()


def _given(who: str, rule: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> tuple[Any, ...]:
    if len(rule) > len(shape):
        raise ValueError(
            f"{who} must have at most an entry for each axis, got {rule} for the shape {shape}; shorten it"
        )
    for n, names in zip(shape, rule, strict=False):
        names = names if isinstance(names, tuple) else () if names is None else (names,)
        if missing := [name for name in names if name not in mesh.axis_names]:
            raise ValueError(f"{who} must name axes of the mesh, {mesh.axis_names}, got {missing[0]!r} in {rule}")
        if n % (devices := int(np.prod([mesh.shape[name] for name in names], dtype=int))):
            raise ValueError(
                f"{who} must cut axes into equal parts, got {n} numbers for {devices} devices, shape {shape}; cut another "
                f"axis, or use {LARGEST!r}"
            )
    return tuple(rule)


def _kept(opt_state: Any, params: Any, specs: Any) -> Any:
    """Cut what an optimiser keeps as the parameters that it belongs to."""
    by_path, by_shape = {}, {}
    flat = jax.tree.leaves(specs, is_leaf=_is_spec)
    depths = jax.tree.leaves(tree.map_depth(lambda depth, _: depth, params))
    for path, leaf, spec, depth in zip(tree.paths(params), jax.tree.leaves(params), flat, depths, strict=True):
        by_path[path] = leaf.shape, spec
        by_shape.setdefault(leaf.shape, set()).add(spec)
        by_shape.setdefault(leaf.shape[depth:], set()).add(PartitionSpec(*spec[depth:]))

    def find(entries, leaf):
        for i in range(len(entries) + 1):  # the longest path first
            shape, spec = by_path.get(tree.path(entries[i:]), (None, None))
            if shape == leaf.shape:
                return spec
        alike = by_shape.get(leaf.shape, ())
        return next(iter(alike)) if len(alike) == 1 else PartitionSpec()

    return jax.tree_util.tree_map_with_path(find, opt_state)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


class Placed(TrainStep):
    """A step on a mesh with automatic axes: each batch is cut along the first axis, and the state stays where it lies."""

    def __init__(self, step: TrainStep, mesh: Mesh, where: Any):
        self.step, self.mesh = step, mesh

        def cut(batch):
            return jax.lax.with_sharding_constraint(batch, jax.tree.map(lambda a: _along(mesh, a.shape), batch))

        def pure(state, batch):  # before and after: else XLA may move what its loop carries, and back in every step
            out = step.pure(jax.lax.with_sharding_constraint(state, where), cut(batch))
            return jax.lax.with_sharding_constraint(out, (where, jax.tree.map(lambda _: _along(mesh), out[1])))

        def apply(params, state, x, **options):
            return step.net.apply(params, state, cut(x), **options)

        super().__init__(pure, Layer(step.net.init, apply), step.measured, step.optimizer)
        self.admit, self.check = step.admit, step.check
        self.jitted, self.stretch = self._shared(self.jitted, 0), self._shared(self.stretch, 1)

    @property
    def unfinished(self) -> Any:
        """That of the step itself."""
        return self.step.unfinished

    @unfinished.setter
    def unfinished(self, value: Any) -> None:
        self.step.unfinished = value

    def _shared(self, function: Callable[..., Any], axis: int) -> Callable[..., Any]:
        return lambda state, batch: function(state, shared(batch, self.mesh, axis))


def place(step: TrainStep, state: TrainState, data: Any, held: Any, mesh: Mesh, rules: Any) -> tuple[Any, ...]:
    """Put what `fit` works with on a mesh: the step, a copy of the state, and data in memory, whole on every device."""
    mesh = automatic("fit", mesh)
    where = layout("fit", state, mesh, rules)
    key = mesh, jax.tree.structure(where), tuple(jax.tree.leaves(where))
    if key not in step.placed:  # compiled once for each mesh and layout
        step.placed[key] = Placed(step, mesh, where)
    whole = [jax.tree.map(lambda a: _whole(a, mesh), d) if isinstance(d, Dataset) else d for d in (data, held)]
    return step.placed[key], _put(state, where), *whole


def released(state: Any, mesh: Mesh | None) -> Any:
    """Give arrays back on the caller's mesh, whose axes may be explicit, without a copy."""
    return state if mesh is None else jax.tree.map(lambda a: mapped.relabelled(a, mesh), state)


def within(function: F) -> F:
    """Run a function that takes `mesh=` inside of that mesh, with automatic axes."""

    @functools.wraps(function)
    def run(*args, mesh=None, **options):
        if mesh is None:
            return function(*args, **options)
        own = automatic(who := function.__name__, mesh)
        memory = [part for part in args[2:] if isinstance(part, tuple)]
        _agree(
            who, state=args[1:2], data=memory, **{name: options.get(name) for name in ("key", "validation", "epochs")}
        )
        with jax.set_mesh(own):
            moved = {name: mapped.placed(options[name]) for name in ("key", "validation") if name in options}
            return function(*map(mapped.placed, args), mesh=mesh, **options | moved)

    return cast(F, run)


def _agree(who: str, **parts: Any) -> None:
    """Refuse arrays that differ between processes: each would take its own for everybody's."""
    if jax.process_count() == 1:
        return
    for name, part in parts.items():
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(part):
            if isinstance(leaf, jax.Array):
                if not leaf.is_fully_addressable:
                    continue
                leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            digest.update(np.asarray(leaf).tobytes())
        every = multihost_utils.process_allgather(np.frombuffer(digest.digest()[:4], np.uint32))
        if (every != every[0]).any():
            raise ValueError(f"{who}: {name} must be the same in every process, got others; use the same keys and data")


def automatic(who: str, mesh: Any) -> Mesh:
    """Return a mesh with automatic axes over the same devices; refuse what is no mesh."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f'{who}: mesh must be a jax.sharding.Mesh, got {brief(mesh)}; make one by jax.make_mesh((n,), ("data",))'
        )
    return mapped.automatic(mesh)


def divides(who: str, mesh: Mesh | None, n: int) -> None:
    """Refuse a number of examples that the first axis of the mesh does not divide."""
    if mesh is not None and n % (devices := mesh.devices.shape[0]):
        raise ValueError(
            f"{who}: batch_size must be a multiple of the {devices} devices on the mesh's first axis, got {n}; take "
            f"{max(n // devices, 1) * devices}"
        )


def shared(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Cut arrays of examples along the first axis of the mesh; of several processes each gives its own examples."""

    def put(a):
        if isinstance(a, jax.Array) and not a.is_fully_addressable:
            return a
        if jax.process_count() == 1:
            return jax.device_put(a, _along(mesh, a.shape, axis))
        if a.shape[axis] % (own := mesh.local_mesh.devices.shape[0]):
            raise ValueError(
                f"fit: each process must give a multiple of its {own} devices on the mesh's first axis, got "
                f"{a.shape[axis]} examples; drop some, in every process as many"
            )
        return jax.make_array_from_process_local_data(_along(mesh, None, axis), np.asarray(a))

    return jax.tree.map(put, batch)


def _along(mesh: Mesh, shape: Any = (), axis: int = 0) -> NamedSharding:
    """Cut an axis of examples along the first axis of the mesh, if that divides it; else keep it whole."""
    cut = shape is None or (len(shape) > axis and not shape[axis] % mesh.devices.shape[0])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names[0]) if cut else PartitionSpec())


def _put(state: Any, where: Any) -> Any:
    # Copied first: a shard may share its memory with the array that it comes from, which the first step would destroy.
    return jax.tree.map(lambda a, sharding: jax.device_put(jnp.copy(a), sharding), state, where)


def _whole(a: Any, mesh: Mesh) -> Any:
    """Put a whole array on every device, unless the caller has cut it over this mesh already."""
    sharding = getattr(a, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.device_set == set(mesh.devices.flat):
        return jax.device_put(a, NamedSharding(mesh, sharding.spec))
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec()))
