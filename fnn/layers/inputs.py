"""Inputs that are not one array: a padded sequence with its mask, and several inputs by name or in a tuple.

A sequence is float[batch, time, d] if all its positions are real, and otherwise `Masked(values, mask)` (see `masks`).
`Masked` is a pytree and goes through `serial`, `repeat`, `residual`, `parallel` and `vmap` like any other x. Layers that
act on each position alone (dense, activation, dropout, layer_norm, rms_norm, embed) get the values and return the mask
unchanged. Layers that mix positions (recurrent ones, attention, pooling over time) or take statistics over them
(batch_norm, tap) read the mask. All other layers refuse it. A layer that reads the values takes the padding out first
(`parts`). Several inputs are a dict, for `branches`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnn import check
from fnn.core import (
    Layer,
    as_arrays,
    check_layers,
    check_length,
    function,
    split,
)
from fnn.description import described
from fnn.inside import apply_at, located
from fnn.masks import Masked, check_mask, filled, harmless
from fnn.tree import PyTree


def parts(
    who: str, x: PyTree, fill: Callable[[jax.Array | np.ndarray], ArrayLike] = lambda values: 0
) -> tuple[PyTree, PyTree]:
    """Split x into (values, mask), the mask None if x is not `Masked`; padded positions get `fill(values)`, 0 by default.

    So what was at the padded positions reaches no product, no sum and no gradient. Specs stay as they are.
    """
    if not isinstance(x, Masked):
        return x, None
    check_mask(who, x)
    if isinstance(x.values, jax.ShapeDtypeStruct):
        return x
    return filled(x.values, x.mask, fill(x.values)), x.mask


def sequence(who: str, x: PyTree) -> tuple[PyTree, PyTree]:
    """Split a sequence into (values float[batch, time, d], mask or None), 0 at padding; refuse anything else."""
    values, mask = parts(who, x)
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, jnp.floating) or len(values.shape) != 3:
        raise ValueError(
            f"{who}: the input must be a sequence float[batch, time, d], alone or in Masked, got {check.describe(x)}"
        )
    return values, mask


def like(x: PyTree, values: PyTree) -> PyTree:
    """Return new values, with the mask of x if x has one."""
    return Masked(values, x.mask) if isinstance(x, Masked) else values


def check_names(who: str, names: Iterable[str], x: PyTree) -> Mapping[str, PyTree]:
    """Return x, a dict with these names; refuse anything else."""
    if not isinstance(x, Mapping) or sorted(x) != sorted(names):
        got = sorted(x) if isinstance(x, Mapping) else check.describe(x)
        raise ValueError(f"{who}: the input must be a dict with the names {sorted(names)}, got {got}")
    return x


def check_array(who: str, x: Any) -> None:
    """Refuse what is not one array."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"{who}: the input must be one array, got {check.describe(x)}")


def check_floating(who: str, x: Any) -> None:
    """Refuse what is not one floating array."""
    check_array(who, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{who}: the input must be floating point, got {check.describe(x)}; cast it first")


def check_units(who: str, x: Any, units: int | None = None, name: str = "input") -> None:
    """Refuse what is not float[batch, ..., units]; without `units` the last axis may have any size."""
    check_floating(who, x)
    if len(x.shape) < 2 or units not in (None, x.shape[-1]):
        rule = "float[batch, ..., d]" if units is None else f"{x.dtype}[batch, ..., {units}], as at init"
        raise ValueError(f"{who}: the {name} must be {rule}, got {check.describe(x)}")


@described
def positionwise(layer: Layer) -> Layer:
    """Let a layer that acts on each position alone take `Masked` sequences: it maps the values, the mask stays the same.

    At padded positions the layer gets numbers between 0 and 1, so that what it returns there is finite. Any other input
    reaches the layer unchanged, at no cost.
    """

    def init(key, spec):
        return layer.init(key, parts("Masked", spec)[0])

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        values, _ = parts("Masked", x, harmless)
        y, state = layer.apply(params, state, values, key=key, train=train, axis_name=axis_name)
        return like(x, y), state

    return Layer(init, apply)


@described
def drop_mask() -> Layer:
    """Drop the mask: y = values, zero at padded positions. An input without a mask stays as it is."""
    return function(lambda x: parts("drop_mask", x)[0])


@described
def take_last() -> Layer:
    """Take the last real position of a sequence: float[batch, time, d] -> float[batch, d].

    A layer that runs forward in time has read the whole sequence there. One that runs backwards (`reverse=True`) has read
    a single position: use `take_first` after it, and `take_ends` after `bidirectional`. An example without a real
    position gives 0.
    """
    return _at("take_last", lambda values, mask: _place(values, mask, -1))


@described
def take_first() -> Layer:
    """Take the first real position of a sequence: float[batch, time, d] -> float[batch, d].

    A layer with `reverse=True` has read the whole sequence there. An example without a real position gives 0.
    """
    return _at("take_first", lambda values, mask: _place(values, mask, 0))


@described
def take_ends(forward: int | None = None) -> Layer:
    """Take the forward units of `bidirectional` at the last real position, and its backward units at the first.

    float[batch, time, d] -> float[batch, d]: there each has read the whole sequence. `forward` is the number of units
    that run forward, half of d by default. An example without a real position gives 0.
    """
    if forward is not None:
        check.positive("take_ends", forward=forward)

    def read(values, mask):
        d = values.shape[-1]
        n = d // 2 if forward is None else forward
        if n >= d or (forward is None and d % 2):
            rule = "an even number of units, or forward= of fewer units than there are"
            raise ValueError(f"take_ends: needs {rule}, got {check.describe(values)} and forward={forward!r}")
        return jnp.concatenate([_place(values[..., :n], mask, -1), _place(values[..., n:], mask, 0)], axis=-1)

    return _at("take_ends", read)


def _at(who: str, read: Callable[[Any, Any], Any]) -> Layer:
    return function(lambda x: read(*sequence(who, x)))


def _place(values: Any, mask: Any, end: int) -> Any:
    """Take the real position nearest to one end of the sequence, 0 or -1. Without any position: 0."""
    if not values.shape[1]:
        return jnp.zeros((values.shape[0], values.shape[2]), values.dtype)
    if mask is None:
        return values[:, end]
    index = jnp.argmax(mask, axis=1) if end == 0 else mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(values, index[:, None, None], axis=1)[:, 0]


@described
def parallel(*layers: Layer | Mapping[str, Layer]) -> Layer:
    """Give one input to several layers: y = (f_1(x), ..., f_n(x)). Params and state are tuples.

    `parallel({"digit": dense(10), "angle": dense(2)})` makes a dict, of heads by name: y, params and state are dicts. Keys
    are `jax.random.split(key, n)`, in the order of the layers or of the sorted names.
    """
    if len(layers) == 1 and isinstance(layers[0], Mapping):
        return _side_by_side("parallel", _by_name("parallel", layers[0]), dict, lambda x, name: x)
    check_layers("parallel", layers)
    return _side_by_side("parallel", dict(enumerate(layers)), tuple, lambda x, i: x)


@described
def branches(layers: Mapping[str, Layer]) -> Layer:
    """Give every input its own layer: a dict {name: x} becomes {name: layer(x)}. Params and state are dicts by name.

    Keys are `jax.random.split(key, n)`, in the order of the sorted names. Errors: ValueError if the input has other names.
    """
    ordered = _by_name("branches", layers)
    return _side_by_side("branches", ordered, dict, lambda x, name: check_names("branches", ordered, x)[name])


def _by_name(who: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    for name, layer in layers.items():
        if not isinstance(name, str) or not isinstance(layer, Layer):
            raise TypeError(f"{who}: needs a dict of names and Layers, got {name!r}: {layer!r}")
    if not layers:
        raise ValueError(f"{who}: needs at least one layer, got none")
    return {name: layers[name] for name in sorted(layers)}


def _side_by_side(who: str, layers: Mapping[Any, Any], kind: type, own: Callable[[Any, Any], Any]) -> Layer:
    """Apply each layer to `own(x, name)`; params, state and y are of that kind, tuple or dict."""

    def collect(values):
        return tuple(values) if kind is tuple else dict(zip(layers, values, strict=True))

    def init(key, spec):
        params, states = [], []
        for k, (name, layer) in zip(split(key, len(layers)), layers.items(), strict=True):
            given = own(spec, name)
            with located(str(name), given):
                p, s = layer.init(k, given)
            params.append(p)
            states.append(s)
        return collect(params), collect(states)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        if kind is tuple:
            check_length(who, len(layers), params, state)
        ys, states = [], []
        for k, (name, layer) in zip(split(key, len(layers)), layers.items(), strict=True):
            given, p, s = own(x, name), params[name], state[name]
            y, s = apply_at(str(name), layer, p, s, given, key=k, train=train, axis_name=axis_name)
            ys.append(y)
            states.append(s)
        return collect(ys), collect(states)

    return Layer(init, apply)


@described
def concatenate() -> Layer:
    """Join a tuple (from `parallel`) or a dict (from `branches`, in the order of its sorted names) along the last axis.

    Masked sequences must have equal masks: that is up to the caller, and the first one's mask is returned.
    Errors: ValueError if the other axes differ.
    """
    return _joining("concatenate", lambda arrays: jnp.concatenate(arrays, axis=-1), slice(0, -1))


@described
def sum_inputs() -> Layer:
    """Add the entries of a tuple (from `parallel`) or a dict (from `branches`): y = x_1 + ... + x_n.

    Masks as in `concatenate`. Errors: ValueError if the shapes differ.
    """
    return _joining("sum_inputs", lambda arrays: sum(arrays[1:], start=arrays[0]), slice(None))


def _joining(who: str, join: Callable[[list[Any]], Any], common: slice) -> Layer:
    def apply(x):
        given = None
        if isinstance(x, Mapping):
            given = [x[name] for name in sorted(x)]
        elif isinstance(x, tuple) and not isinstance(x, Masked):
            given = list(x)
        if not given:
            raise ValueError(f"{who}: the input must be a tuple or a dict of arrays, got {check.describe(x)}")
        arrays = [parts(who, part)[0] for part in given]
        if any(not hasattr(a, "shape") or a.shape[common] != arrays[0].shape[common] for a in arrays):
            rule = "the same shape" if common == slice(None) else "the same shape except for the last axis"
            raise ValueError(f"{who}: the inputs must have {rule}, got {check.describe(tuple(arrays))}")
        return like(next((part for part in given if isinstance(part, Masked)), None), join(as_arrays(arrays)))

    return function(apply)
