"""`packed`: an optimiser sees all small arrays as one vector, if it treats all numbers alike."""

from collections import Counter
from typing import Any

import jax
import numpy as np
import optax

from fnn.gradients.program import read, trace
from fnn.training import clip
from fnn.training.alike import JOINS, REDUCTIONS, SUMS, Meeting, Names, Reading, Unlike, Value, constant
from fnn.training.averages import check_whole
from fnn.training.blocks import Blocks
from fnn.training.depth import DepthAware
from fnn.training.extra import accepted
from fnn.training.lift import stand_ins
from fnn.vectors import pack, unpack


def packed(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let a transformation see all small arrays as one vector: the same update from far fewer kernels.

    For transformations that treat every number alike (SGD, Adam, weight decay, `by_value`) or take a norm over all of
    them (`by_global_norm`), alone or chained. Small nets spend most of a step on starting kernels, and train faster so.
    The state holds packed arrays.

    Errors: ValueError, at the first update, for a transformation that tells arrays apart (a mask that takes some, labels,
    LAMB, `adaptive`): it would treat the packed vector as one array. ValueError, at init, for `averaged` and its like inside,
    where `freeze` or a mask outside hides some arrays.
    """
    inner = optax.with_extra_args_support(transformation)

    def init(params):
        if _shown(params):
            return inner.init(params)
        small = pack(jax.tree.leaves(params))
        try:
            state = inner.init(small)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise _refusal("one that needs the parameters' own tree") from error
        check_whole("packed", state, params)
        _check_packable(lambda params: inner.init(params), (params,), (small,))
        return clip.retold(state, params)

    def update(updates, state, params=None, **extra):
        if _shown(updates):
            return accepted(inner.update)(updates, state, params, **extra)
        leaves, treedef = jax.tree.flatten(updates)
        extra = {name: _not_again if callable(value) else value for name, value in extra.items()}

        def packed_if_alike(node):
            return pack(treedef.flatten_up_to(node)) if jax.tree.structure(node) == treedef else node

        small, others = pack(leaves), {name: packed_if_alike(value) for name, value in extra.items()}
        packed_params = None if params is None else packed_if_alike(params)

        def one(updates, params, extra, state):
            return accepted(inner.update)(updates, state, params, **extra)

        _check_packable(one, (updates, params, extra), (small, packed_params, others), inner.init)
        new: Any
        new, state = accepted(inner.update)(small, state, packed_params, **others)
        return treedef.unflatten(unpack(new, leaves)), state

    return DepthAware(init, update)


def _shown(params: Any) -> bool:
    """Whether blocks are shown one by one already: then there is nothing to pack."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Blocks))
    return any(isinstance(node, Blocks) for node in nodes)


def _not_again(params: Any, obj_fn: Any = None, grad_fn: Any = None) -> Any:
    """Stand for a function of the parameters, with the names that line searches hand on to it."""
    raise Unlike("it evaluates the loss again")


def _refusal(got: str) -> ValueError:
    return ValueError(
        f"packed: the optimiser must treat all arrays alike, got {got}; use it without packed, or put what tells arrays "
        "apart outside: optax.chain(fnn.optimizers.packed(...), optax.masked(...))"
    )


def _check_packable(f: Any, plain: tuple[Any, ...], small: tuple[Any, ...], init: Any = None) -> None:
    """Refuse a function of (arrays, ...) that does something else to packed arrays than to the arrays themselves.

    With `init`, f is a function of (updates, params, extra, state), and `init` makes the state.
    """
    table = Names()

    def reading(args, count):
        return _Each.of(f, stand_ins(args, count), table, init)

    try:
        read = reading(plain, 2)
        if read.order_read:
            read = reading(plain, None)
        if read.names() == reading(small, 2).names():
            return
        got = "one that tells them apart by their shapes or paths"
    except Unlike as error:
        got = f"one that does not ({error})"
    raise _refusal(got)


def _operations(f: Any, args: tuple[Any, ...]) -> Counter[str]:
    """Count the operations of a function, except those that sums need."""
    program = read(trace(f, *args)[0])
    return Counter(op.name for op in program.ops if op.name not in (*PASSED, *REDUCTIONS))


def _groups(args: Any, structure: Any) -> list[Any]:
    """List what the arguments hold: trees with an entry for each array of the updates, and single leaves."""
    return jax.tree.leaves(args, is_leaf=lambda node: jax.tree.structure(node) == structure)


SHAPES = {"shape", "broadcast_dimensions", "sharding", "out_sharding", "axes", "dtype", "new_dtype", "weak_type"}
_ELEMENTWISE = """
abs add add_any and broadcast_in_dim cbrt ceil clamp convert_element_type copy cos div eq erf erf_inv exp exp2
expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow real
rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh pvary pcast
"""
ELEMENTWISE = set(_ELEMENTWISE.split())
PASSED = {"broadcast_in_dim", "convert_element_type", "expand_dims", "reshape", "squeeze", *JOINS}
"""What the sum over one array may go through on its way into a sum over all."""


class _Each(Reading):
    """Read an update as one function of every number: the arrays are the blocks, whatever their shapes.

    Allowed are operations on each number by itself, and sums over a whole array that go into a sum over all arrays.
    """

    @classmethod
    def of(cls, f: Any, args: tuple[Any, ...], table: Names, init: Any = None) -> "_Each":
        structure = jax.tree.structure(args[0])

        def complete(args):
            return args if init is None else (*args, jax.eval_shape(init, args[0] if args[1] is None else args[1]))

        def with_axes(node):  # a lone number is its own sum, without an operation that says so
            if jax.tree.structure(node) != structure:
                return node
            return jax.tree.map(lambda a: a if a.shape else jax.ShapeDtypeStruct((1,), a.dtype), node)

        def grouped(tree_):
            return jax.tree.map(with_axes, tree_, is_leaf=lambda node: jax.tree.structure(node) == structure)

        dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(args[0])]
        # Packed by dtype: arrays of one dtype are the blocks of one stack.
        groups = sorted(set(dtypes))
        places = [(1 + groups.index(dtype), dtypes[:i].count(dtype)) for i, dtype in enumerate(dtypes)]
        shown = complete(grouped(args))
        inputs: list[Value] = []
        for number, node in enumerate(_groups(shown, structure)):
            whole = jax.tree.structure(node) == structure
            for leaf, place in zip(jax.tree.leaves(node), places if whole else [(0, 0)], strict=True):
                if isinstance(leaf, jax.ShapeDtypeStruct):
                    inputs.append(Value(table("input", number), None, *place))
        reading = cls(lambda *args: f(*args), shown, inputs, dict(Counter(group for group, _ in places)), table)
        lone = any(not leaf.shape for leaf in jax.tree.leaves(args[0]))
        if lone and _operations(f, complete(args)) != _operations(f, shown):
            raise Unlike("it tells numbers from vectors")
        reading.structure, reading.places = structure, places
        return reading

    structure: Any
    places: list[tuple[int, int]]
    sums: dict[int, str]
    ignored = SHAPES
    shapeless = ELEMENTWISE | PASSED | SUMS.keys() | REDUCTIONS.keys()

    def names(self) -> list[Any]:
        """Number what is done to each number of the updates and of what the state keeps of it."""
        self.known, self.sums = {}, {}
        found = self._execute(self.program, [self._noted(value) for value in self.inputs], True)
        values = iter(found)
        names = []
        for node in _groups(self.out, self.structure):
            places = self.places if jax.tree.structure(node) == self.structure else [(0, 0)]
            first: dict[int, int] = {}
            for place in places:
                value = self._complete(next(values), dry=True)
                if value.name != first.setdefault(place[0], value.name) or value.place not in ((0, 0), place):
                    raise Unlike("it tells them apart")
            names += sorted(first.items())
        return names

    def _apply(self, op: Any, inputs: list[Any], dry: bool) -> list[Any]:
        kinds = {self._kind(v) for v in inputs if isinstance(v, Value) and v.depth}
        same = {op.name, REDUCTIONS.get(op.name)}
        if len(kinds) != 1 or not (op.name in PASSED or kinds <= same):
            inputs = [self._complete(v, dry) if self._kind(v) else v for v in inputs]
            kinds = {None}
        kind = next(iter(kinds))
        own = any(isinstance(v, Meeting) or v.depth for v in inputs)
        if op.name in ("jit", "pjit") and own:
            return [self._whole(op.params["name"], [self._settled(v, dry) for v in inputs], dry)]
        if own and (op.name.startswith("custom_") or op.name == "cond"):
            return self._meet(op, inputs, dry)
        if op.name in SUMS and kind:
            return [Meeting(op.name, [t for v in inputs for t in (v.terms if isinstance(v, Meeting) else [v])])]
        known = op.name in ELEMENTWISE or op.name in SUMS or op.name in REDUCTIONS or op.name in JOINS
        if own and not kind and not known:
            raise Unlike(f"it passes arrays through an operation {op.name!r}")
        results = super()._apply(op, inputs, dry)
        if op.name in REDUCTIONS and own and isinstance(inputs[0], Value):
            kind = REDUCTIONS[op.name]
            if self.avals[op.outputs[0]].shape:
                raise Unlike("it looks at rows or columns of arrays")
        if kind:
            self.sums.update({v.name: kind for v in results if isinstance(v, Value)})
        return results

    def _constant(self, value: Any) -> tuple[Any, ...]:
        name = constant(value)
        if name[0] == "constant" and np.size(value) and (np.asarray(value) == np.ravel(value)[0]).all():
            return constant(np.ravel(value)[0])  # zeros are zeros, whatever their shape
        return name

    def _complete(self, value: Any, dry: bool) -> Value:
        """Settle a value, and take the sum over one array for that over all: right if there is but one, else Unlike."""
        kind = self._kind(value)
        return self._settled(Meeting(kind, [value]) if kind else value, dry)

    def _kind(self, value: Any) -> str | None:
        """Which sum over one array's numbers a value is, on its way into a sum over all arrays."""
        return self.sums.get(value.name) if isinstance(value, Value) and value.depth else None
