"""What a layer is, and the combinators that build networks from layers.

A layer is a named pair of pure functions:

    init(key, spec) -> (params, state)
    apply(params, state, x, *, key=None, train=False, axis_name=None) -> (y, state)

`spec` is an array or a `jax.ShapeDtypeStruct`, batch axis first; `axis_name` names a mapped batch axis. An empty
state is `()`; every leaf of a state is floating point, so that a loss can be differentiated with respect to it.

A combinator gives its parameters and its state the same outer structure: a tuple for `serial`, a dict of one entry
for `named`, a `tree.Stacked` for `repeat`, the inner layer's own structure for `residual`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import check, mapped
from fnn.arrays import narrow
from fnn.description import described, name_of, shortened
from fnn.inside import apply_at, located
from fnn.masks import cleared
from fnn.tree import PyTree, Stacked


class _Pair(NamedTuple):
    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree]]


class Layer(_Pair):
    """A pair of functions: `init(key, spec) -> (params, state)` and `apply(params, state, x, ...) -> (y, state)`.

    `apply` also takes the keywords `key=None, train=False, axis_name=None`. Every layer of fnn guarantees: `apply` is
    pure; the state keeps its structure, shapes and dtypes; parameters are cast to x's dtype, and y has that dtype; with
    `train=False` the result is deterministic and no key is needed.

    A layer prints as the call that made it, or as its function's name. That `description` is no part of the pair: layers
    of the same functions are equal.
    """

    description: str = ""
    short_repr = True

    def __new__(
        cls,
        init: Callable[..., tuple[PyTree, PyTree]],
        apply: Callable[..., tuple[PyTree, PyTree]],
        description: str = "",
    ) -> "Layer":
        layer = super().__new__(cls, init, apply)
        layer.description = description
        return layer

    def described(self, text: str) -> "Layer":
        """Return the same pair with another description."""
        return Layer(self.init, self.apply, text)

    def __repr__(self) -> str:
        return shortened(self.description or name_of(self.apply))

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        """In notebooks: the whole description."""
        from treescope import rendering_parts

        return rendering_parts.text(self.description or name_of(self.apply))


def stateless(init: Callable[[jax.Array, PyTree], PyTree], apply: Callable[[PyTree, PyTree], PyTree]) -> Layer:
    """Make a layer without state or noise from `init(key, spec) -> params` and `apply(params, x) -> y`."""

    def layer_init(key, spec):
        return init(key, as_spec(spec)), ()

    def layer_apply(params, state, x, *, key=None, train=False, axis_name=None):
        return apply(params, as_arrays(x)), state

    return Layer(layer_init, layer_apply, name_of(apply))


def function(f: Callable[[PyTree], PyTree]) -> Layer:
    """Make a layer without parameters from any function `x -> y`."""
    return stateless(lambda key, spec: (), lambda params, x: f(x)).described(name_of(f))


@described
def serial(*layers: Layer) -> Layer:
    """Compose layers: y = f_n(... f_2(f_1(x))). Parameters and state are tuples, keys `jax.random.split(key, n)`."""
    check_layers("serial", layers)
    return _serial(layers)


def _serial(layers: Sequence[Layer], group: int | None = None) -> Layer:
    """`serial`; with `group`, the backward pass recomputes so many layers at a time from their input."""

    def init(key, spec):
        spec = as_spec(spec)
        params, states = [], []
        for i, (layer, k) in enumerate(zip(layers, split(key, len(layers)), strict=True)):
            with located(str(i), spec):
                p, s = layer.init(k, spec)
                spec = output_spec(layer, p, s, spec)
            params.append(p)
            states.append(s)
        return tuple(params), tuple(states)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        check_length("serial", len(layers), params, state)
        slices = list(zip(params, state, split(key, len(layers)), strict=True))

        def apply_some(x, slices, first):
            states = []
            for i, (p, s, k) in enumerate(slices, first):
                x, s = apply_at(str(i), layers[i], p, s, x, key=k, train=train, axis_name=axis_name)
                states.append(s)
            return x, states

        run = apply_some if group is None else jax.checkpoint(apply_some, static_argnums=2)
        step, states = group or len(layers) or 1, []
        for first in range(0, len(layers), step):
            x, new = run(x, slices[first : first + step], first)
            states += new
        return x, tuple(states)

    return Layer(init, apply)


@described
def residual(layer: Layer, *, scale: float = 1.0, add_to: str | None = None) -> Layer:
    """Add a layer's output to its input: y = x + scale·f(x). Parameters are those of the layer.

    If x is a tree, every floating leaf is added to, and the others (a mask) stay as they are. If x is a dict of several
    inputs, `add_to` names the one that changes, to x[add_to] + scale·f(x); f sees all of them.
    Errors: ValueError if f changes the shape.
    """
    check_layers("residual", (layer,))

    def own(x):
        if add_to is not None and (not isinstance(x, Mapping) or add_to not in x):
            raise ValueError(f"residual: the input must be a dict with the name {add_to!r}, got {check.describe(x)}")
        return x if add_to is None else x[add_to]

    def init(key, spec):
        spec_of = own(spec)
        params, state = layer.init(key, spec)
        _keeps("residual: the layer", spec_of, output_spec(layer, params, state, spec), dtypes=False)
        return params, state

    def plus(x, y):
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return x + jnp.asarray(scale, x.dtype) * y if floating else x

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = cleared(x)  # x itself reaches the output, and may have anything at its padded positions
        x_of = own(x)
        y, state = layer.apply(params, state, x, key=key, train=train, axis_name=axis_name)
        _keeps("residual: the layer", x_of, y, dtypes=False)
        y = jax.tree.map(plus, x_of, y)
        return y if add_to is None else {**x, add_to: y}, state

    return Layer(init, apply)


@described
def named(name: str, layer: Layer) -> Layer:
    """Give a layer a name, which paths and tables show: its params and state become `{name: ...}`."""
    check_layers("named", (layer,))
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"named: the name must be a non-empty string without '/', got {name!r}")

    def init(key, spec):
        with located(name, spec):
            params, state = layer.init(key, spec)
        return {name: params}, {name: state}

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        y, s = apply_at(name, layer, params[name], state[name], x, key=key, train=train, axis_name=axis_name)
        return y, {name: s}

    return Layer(init, apply)


@described
def repeat(block: Layer, n: int, *, unroll: int | bool = 1, checkpoint: int | None = None) -> Layer:
    """Apply n blocks of one kind in a row by `lax.scan`, so that 1,000 layers compile as fast as 10.

    Params and state are `tree.Stacked`: every leaf has a leading axis of n. Parameters and dropout masks are those of
    `serial(*[block] * n)` (both take their keys from `jax.random.split(key, n)`; default PRNG), values equal to rounding.

    `unroll=k` puts k blocks into one turn of the loop. `unroll=True` is `serial(*[block] * n)` itself: separate arrays and
    no loop. That is faster for few or wide blocks, because a scan copies its slice of the stacked weights, and slower to
    compile. `checkpoint=g` stores only the input of every g-th block for the backward pass and recomputes the rest, one
    group at a time: memory falls from n to about n/g + g blocks.

    Errors: ValueError if the block changes shape or dtype.
    """
    check_layers("repeat", (block,))
    check.positive("repeat", n=n, checkpoint=1 if checkpoint is None else checkpoint)
    if unroll is True:
        return _serial([block] * n, checkpoint)
    check.positive("repeat", unroll=unroll)

    def init(key, spec):
        with located("[:]", spec):
            # A loop, not vmap: the same numbers, and the generator compiles three times as fast for one key.
            params, state = jax.lax.map(lambda k: block.init(k, spec), jax.random.split(key, n))
            one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (params, state))
            _keeps("repeat: the block", spec, output_spec(block, one[0], one[1], spec))
        return Stacked(params), Stacked(state)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        keys = None if key is None else jax.random.split(key, n)

        def body(x, block_slice):
            p, s, k = block_slice
            y, s = apply_at("[:]", block, p, s, x, key=k, train=train, axis_name=axis_name, times=n)
            with located("[:]", x):
                _keeps("repeat: the block", x, y)
            return mapped.varying(y, like=x), s

        _check_depth(n, params, state)
        slices = (params.blocks, state.blocks, keys)
        x = mapped.varying(as_arrays(x), axis_name, like=slices)
        if checkpoint is None:
            x, states = jax.lax.scan(body, x, slices, length=n, unroll=min(unroll, n))
        else:
            x, states = _grouped_scan(body, x, slices, n, min(checkpoint, n), unroll)
        return x, Stacked(states)

    return Layer(init, apply)


def output_spec(layer: Layer, params: PyTree, state: PyTree, spec: PyTree) -> PyTree:
    """Find the shape and dtype of a layer's output in eval mode, without computing anything."""
    params, state, spec = as_spec((params, state, spec))
    with check.foreign("net"):
        return jax.eval_shape(lambda p, s, x: layer.apply(p, s, x)[0], params, state, spec)


def output_shape(layer: Layer, params: PyTree, state: PyTree, spec: PyTree) -> PyTree:
    """Find the shape of a net's output; a tree of shapes for a tree of outputs."""
    return jax.tree.map(lambda output: output.shape, output_spec(layer, params, state, spec))


def check_values(layer: Layer, params: PyTree, state: PyTree, x: PyTree) -> None:
    """Trace a layer with integer inputs as constants, so that layers that check values on the host (embed) can do so."""
    if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(x)):
        x = mapped.placed(as_arrays(x))
        jax.eval_shape(lambda p, s: layer.apply(p, s, x)[0], *as_spec((params, state)))


def as_spec(tree: PyTree) -> PyTree:
    """Replace every array by its `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)


def same_spec(a: PyTree, b: PyTree, dtypes: bool = True) -> bool:
    """Whether two trees have the same structure and shapes, and the same dtypes."""

    def spec(tree):
        leaves, treedef = jax.tree.flatten(tree)
        return treedef, [(jnp.shape(leaf), dtypes and jnp.result_type(leaf)) for leaf in leaves]

    return spec(a) == spec(b)


def as_arrays(tree: PyTree) -> PyTree:
    """Make every leaf a JAX array (float64 becomes float32 unless x64 is on); refuse integers that do not fit."""
    return jax.tree.map(lambda a: jnp.asarray(narrow("net", "x", a)), tree)


def _grouped_scan(body: Any, x: Any, slices: Any, n: int, group: int, unroll: int) -> tuple[Any, Any]:
    """Scan over groups of blocks, each recomputed in the backward pass; the last group may be shorter."""

    def runner(length):
        return jax.checkpoint(lambda x, part: jax.lax.scan(body, x, part, length, unroll=min(unroll, length)))

    whole = n // group * group
    head = jax.tree.map(lambda a: a[:whole].reshape(whole // group, group, *a.shape[1:]), slices)
    x, states = jax.lax.scan(runner(group), x, head, whole // group)
    states = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), states)
    if whole < n:
        x, rest = runner(n - whole)(x, jax.tree.map(lambda a: a[whole:], slices))
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), states, rest)
    return x, states


def split(key: jax.Array | None, n: int) -> list[Any]:
    """Split a key into a list of n; without a key, a list of n times None."""
    if key is None or n == 0:
        return [None] * n
    keys = jax.random.split(key, n)
    return [keys[i] for i in range(n)]


def check_layers(who: str, layers: Sequence[Any]) -> None:
    """Refuse arguments that are not layers."""
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            got = getattr(layer, "__name__", repr(layer))
            hint = f"; use activation({got})" if callable(layer) else ""
            raise TypeError(f"{who}: argument {i} must be a Layer, got {got}{hint}")


def check_length(who: str, n: int, params: PyTree, state: PyTree) -> None:
    """Refuse params or state that are not tuples with one entry for each of n layers."""
    for what, tree in (("params", params), ("state", state)):
        if not isinstance(tree, tuple) or len(tree) != n:
            got = f"{len(tree)} of them" if isinstance(tree, tuple) else type(tree).__name__
            raise ValueError(f"{who}: {what} must be a tuple, one entry for each of {n} layers, got {got}")


def _check_depth(n: int, params: PyTree, state: PyTree) -> None:
    for what, tree in (("params", params), ("state", state)):
        if not isinstance(tree, Stacked):
            raise ValueError(f"repeat: {what} must be tree.Stacked, got {type(tree).__name__}; use this net's init")
        for leaf in jax.tree.leaves(tree):
            if jnp.shape(leaf)[:1] != (n,):
                got = f"{check.describe(leaf)}; was the net built with another depth?"
                raise ValueError(f"repeat: {what} must have a leading axis of {n} blocks, got {got}")


def _keeps(who: str, x: PyTree, y: PyTree, dtypes: bool = True) -> None:
    if not same_spec(x, y, dtypes):
        got = f"{check.describe(x)} -> {check.describe(y)}"
        raise ValueError(f"{who} must keep its input's shape, got {got}; use serial(...) for what changes it")
