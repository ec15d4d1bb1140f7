"""The contract of a layer, and the combinators that fold layers into networks.

A layer is a named pair of pure functions:

    init(key, spec) -> (params, state)
    apply(params, state, x, *, key=None, train=False, axis_name=None) -> (y, state)

`spec` is an array or a `jax.ShapeDtypeStruct`, batch axis first; `axis_name` names a mapped batch axis. An empty
state is `()`; every leaf of a state is floating point, so that a loss can be differentiated with respect to it.

A combinator gives its parameters and its state the same outer structure: tuples for `serial` and `parallel`, a dict
of one entry for `named`, a `tree.Stacked` for `repeat`, the inner layer's own for `residual`. States that lie beside
the trunk, where paths meet again, are wrapped in `Branch`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import check, mapped
from fnn.arrays import narrow
from fnn.masks import cleared
from fnn.tree import UNNAMED, Stacked


class Layer(NamedTuple):
    """Pair `init(key, spec) -> (params, state)` with `apply(params, state, x, *, key, train, axis_name) -> (y, state)`.

    Guarantees of every layer in fnn: `apply` is pure; the state keeps its structure, shapes and dtypes; parameters are
    cast to x's dtype, which y keeps; with `train=False` the result is deterministic and no key is needed.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]


@jax.tree_util.register_pytree_with_keys_class
class Branch:
    """Mark the state of layers that lie beside the trunk: other paths lead around them."""

    __slots__ = ("inner",)

    def __init__(self, inner: Any):
        self.inner = inner

    def tree_flatten_with_keys(self):
        return ((UNNAMED, self.inner),), None

    def tree_flatten(self):
        return (self.inner,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __repr__(self) -> str:
        return f"Branch({self.inner!r})"


def stateless(init: Callable[[Any, Any], Any], apply: Callable[[Any, Any], Any]) -> Layer:
    """Make a layer without state or noise of `init(key, spec) -> params` and `apply(params, x) -> y`."""

    def layer_init(key, spec):
        return init(key, as_spec(spec)), ()

    def layer_apply(params, state, x, *, key=None, train=False, axis_name=None):
        return apply(params, as_arrays(x)), state

    return Layer(layer_init, layer_apply)


def function(f: Callable[[Any], Any]) -> Layer:
    """Make a layer without parameters of any function `x -> y`."""
    return stateless(lambda key, spec: (), lambda params, x: f(x))


def serial(*layers: Layer) -> Layer:
    """Compose layers: y = f_n(... f_2(f_1(x))). Parameters and state are tuples, keys `jax.random.split(key, n)`."""
    _check_layers("serial", layers)

    def init(key, spec):
        keys, spec = _split(key, len(layers)), as_spec(spec)
        params, states = [], []
        for i, layer in enumerate(layers):
            with located(str(i), spec):
                p, s = layer.init(keys[i], spec)
                spec = output_spec(layer, p, s, spec)
            params.append(p)
            states.append(s)
        return tuple(params), tuple(states)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        _check_length("serial", len(layers), params, state)
        keys, states = _split(key, len(layers)), []
        for i, layer in enumerate(layers):
            with located(str(i), x):
                x, s = layer.apply(params[i], state[i], x, key=keys[i], train=train, axis_name=axis_name)
            states.append(s)
        return x, tuple(states)

    return Layer(init, apply)


def parallel(*layers: Layer) -> Layer:
    """Give one input to every branch: y = (f_1(x), ..., f_n(x)). Parameters and state are tuples."""
    _check_layers("parallel", layers)

    def init(key, spec):
        keys = _split(key, len(layers))
        params, states = [], []
        for i, layer in enumerate(layers):
            with located(str(i), spec):
                p, s = layer.init(keys[i], spec)
            params.append(p)
            states.append(s)
        return tuple(params), Branch(tuple(states))

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        _check_length("parallel", len(layers), params, state.inner)
        refuse_rescaling("parallel", state)
        keys, ys, states = _split(key, len(layers)), [], []
        for i, layer in enumerate(layers):
            with located(str(i), x):
                y, s = layer.apply(params[i], state.inner[i], x, key=keys[i], train=train, axis_name=axis_name)
            ys.append(y)
            states.append(s)
        return tuple(ys), Branch(tuple(states))

    return Layer(init, apply)


def residual(layer: Layer, *, scale: float = 1.0, of: str | None = None) -> Layer:
    """Add a branch to its input: y = x + scale·f(x). Parameters are the branch's own.

    Of a tree, every floating leaf is added; the others (a mask) are x's. `of` names one of several inputs, which alone is
    replaced, by x[of] + scale·f(x): the branch sees all. Errors: ValueError if f changes the shape.
    """
    _check_layers("residual", (layer,))

    def own(x):
        if of is not None and (not isinstance(x, Mapping) or of not in x):
            raise ValueError(f"residual: the input must be a dict with the name {of!r}, got {check.describe(x)}")
        return x if of is None else x[of]

    def init(key, spec):
        spec_of = own(spec)
        params, state = layer.init(key, spec)
        _same_shape("residual: the branch", spec_of, output_spec(layer, params, state, spec))
        return params, Branch(state)

    def plus(x, y):
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return x + jnp.asarray(scale, x.dtype) * y if floating else x

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        refuse_rescaling("residual", state)
        x = cleared(x)  # what is passed on is no branch's output, which would have no padding in it
        x_of = own(x)
        y, inner = layer.apply(params, state.inner, x, key=key, train=train, axis_name=axis_name)
        _same_shape("residual: the branch", x_of, y)
        y = jax.tree.map(plus, x_of, y)
        return y if of is None else {**x, of: y}, Branch(inner)

    return Layer(init, apply)


def named(name: str, layer: Layer) -> Layer:
    """Give a layer a name, which paths and tables then show: its params and state become `{name: ...}`."""
    _check_layers("named", (layer,))
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"named: the name must be a non-empty string without '/', got {name!r}")

    def init(key, spec):
        with located(name, spec):
            params, state = layer.init(key, spec)
        return {name: params}, {name: state}

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        with located(name, x):
            y, s = layer.apply(params[name], state[name], x, key=key, train=train, axis_name=axis_name)
        return y, {name: s}

    return Layer(init, apply)


def repeat(block: Layer, n: int, *, unroll: int | bool = 1, checkpoint: int | None = None) -> Layer:
    """Apply n blocks of one kind in a row by `lax.scan`, so that 1,000 layers compile as fast as 10.

    Params and state are `tree.Stacked`: every leaf has a leading axis of n. The same parameters and dropout masks as
    `serial(*[block] * n)` (keys are `jax.random.split(key, n)` in both; default PRNG), values to rounding.

    `unroll=k` puts k blocks into one turn of the loop. `unroll=True` is `serial(*[block] * n)` itself: separate arrays,
    no loop; faster for few or wide blocks, since slices of stacked weights are copied, and slower to compile.
    `checkpoint=g` keeps only the input of every g-th block for the backward pass and recomputes the rest, group by
    group: memory falls from n to about n/g + g blocks.

    Errors: ValueError if the block changes shape or dtype.
    """
    _check_layers("repeat", (block,))
    check.positive("repeat", n=n)
    if unroll is not True:
        check.positive("repeat", unroll=unroll)
    if checkpoint is not None:
        check.positive("repeat", checkpoint=checkpoint)
    if unroll is True:
        return _unrolled(block, n, checkpoint)

    def init(key, spec):
        with located("[:]", spec):
            # A loop, not vmap: the same numbers, and the generator compiles three times as fast for one key.
            params, state = jax.lax.map(lambda k: block.init(k, spec), jax.random.split(key, n))
            one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (params, state))
            _keeps(spec, output_spec(block, one[0], one[1], spec))
        return Stacked(params), Stacked(state)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        keys = None if key is None else jax.random.split(key, n)

        def body(x, block_slice):
            p, s, k = block_slice
            with located("[:]", x):
                y, s = block.apply(p, s, x, key=k, train=train, axis_name=axis_name)
                _keeps(x, y)
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


def output_spec(layer: Layer, params: Any, state: Any, spec: Any) -> Any:
    """Trace the shape and dtype of a layer's output in eval mode, without computing anything."""
    params, state, spec = as_spec((params, state, spec))
    with check.foreign("net"):
        return jax.eval_shape(lambda p, s, x: layer.apply(p, s, x)[0], params, state, spec)


def output_shape(layer: Layer, params: Any, state: Any, spec: Any) -> tuple[int, ...]:
    """Return the shape of a net's output, which losses need to be one array."""
    output = output_spec(layer, params, state, spec)
    if not hasattr(output, "shape"):
        got = check.describe(output)
        raise ValueError(f"net: a loss needs one array, got {got}; end in unmasked(), last(), concatenate() or add()")
    return output.shape


def check_values(layer: Layer, params: Any, state: Any, x: Any) -> None:
    """Trace a layer with whole numbers as constants, so that layers which look at values on the host (embed) see them."""
    if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(x)):
        x = mapped.placed(as_arrays(x))
        jax.eval_shape(lambda p, s: layer.apply(p, s, x)[0], *as_spec((params, state)))


def as_spec(tree: Any) -> Any:
    """Replace every array by its `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)


def same_spec(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""
    a, b = as_spec((a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.leaves(a) == jax.tree.leaves(b)


def as_arrays(tree: Any) -> Any:
    """Make every leaf a JAX array, NumPy's float64 becoming float32 unless x64 is on; integers must fit."""
    return jax.tree.map(lambda a: jnp.asarray(narrow("net", "x", a)), tree)


def _unrolled(block: Layer, n: int, group: int | None) -> Layer:
    if group is None:
        return serial(*[block] * n)
    inner = serial(*[block] * n)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        keys, states = _split(key, n), []
        for start in range(0, n, group):
            part = slice(start, min(start + group, n))

            def run(p, s, x, ks, start=start):
                new = []
                for i, (pi, si, ki) in enumerate(zip(p, s, ks, strict=True), start):
                    with located(str(i), x):
                        x, si = block.apply(pi, si, x, key=ki, train=train, axis_name=axis_name)
                    new.append(si)
                return x, tuple(new)

            x, s = jax.checkpoint(run)(params[part], state[part], x, list(keys[part]))
            states.extend(s)
        return x, tuple(states)

    return Layer(inner.init, apply)


def _grouped_scan(body: Any, x: Any, slices: Any, n: int, group: int, unroll: int) -> tuple[Any, Any]:
    """Scan over groups of blocks, each recomputed in the backward pass; a shorter last group takes the remainder."""

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


@contextmanager
def located(name: str, x: Any) -> Iterator[None]:
    """Note on a passing error where it arose: `in layer 1/trunk/0, input float32[2,4]` (PEP 678)."""
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        place = next((i for i, note in enumerate(notes) if note.startswith("in layer ")), None)
        if place is None:
            error.add_note(f"in layer {name}, input {check.describe(x)}")
        else:
            notes[place] = f"in layer {name}/{notes[place].removeprefix('in layer ')}"
        raise


def _split(key: Any, n: int) -> Any:
    return [None] * n if key is None or n == 0 else jax.random.split(key, n)


def refuse_rescaling(who: str, state: Any) -> None:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: getattr(node, "rescale", False))
    if any(getattr(node, "rescale", False) for node in nodes):
        raise ValueError(
            f"{who}: a tap inside a branch must not rescale, since the cotangents of paths that meet again would carry "
            "different scales; put a tap between the blocks of the trunk instead"
        )


def _check_layers(who: str, layers: tuple[Any, ...]) -> None:
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            got = getattr(layer, "__name__", repr(layer))
            hint = f"; use activation({got})" if callable(layer) else ""
            raise TypeError(f"{who}: argument {i} must be a Layer, got {got}{hint}")


def _check_length(who: str, n: int, params: Any, state: Any) -> None:
    for what, tree in (("params", params), ("state", state)):
        if not isinstance(tree, tuple) or len(tree) != n:
            got = f"{len(tree)} of them" if isinstance(tree, tuple) else type(tree).__name__
            raise ValueError(f"{who}: {what} must be a tuple, one entry for each of {n} layers, got {got}")


def _check_depth(n: int, params: Any, state: Any) -> None:
    for what, tree in (("params", params), ("state", state)):
        if not isinstance(tree, Stacked):
            raise ValueError(f"repeat: {what} must be tree.Stacked, got {type(tree).__name__}; use this net's init")
        for leaf in jax.tree.leaves(tree):
            if jnp.ndim(leaf) == 0 or leaf.shape[0] != n:
                raise ValueError(
                    f"repeat: {what} must have a leading axis of {n} blocks, got {check.describe(leaf)}; "
                    "was the net built with another depth?"
                )


def _same_shape(who: str, x: Any, y: Any) -> None:
    if jax.tree.map(jnp.shape, x) != jax.tree.map(jnp.shape, y):
        raise ValueError(
            f"{who} must keep its input's shape, got {check.describe(x)} -> {check.describe(y)}; "
            "put a layer that changes the shape outside"
        )


def _keeps(x: Any, y: Any) -> None:
    if not same_spec(x, y):
        raise ValueError(
            f"repeat: the block must keep its input's shape, got {check.describe(x)} -> {check.describe(y)}; "
            "use serial(...)"
        )
