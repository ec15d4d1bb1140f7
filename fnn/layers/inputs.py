"""What x may be besides one array: a padded sequence with its mask, several inputs by name.

A sequence is float[batch, time, d], every position of which is real, or `Masked(values, mask)` (in `masks`). It is a
pytree and travels as any x does: through `serial`, `repeat`, `residual`, `parallel` and `vmap`, without another argument to
`apply`. Layers that act on each position alone (dense, activation, dropout, layer_norm, rms_norm, embed) see the values,
and the mask passes by; layers that mix positions (recurrent ones, attention, pooling over time) and those that take
statistics over them (batch_norm, tap) read it; all others refuse it. Whoever takes one apart takes the padding out
(`parts`). Several inputs are a dict of them, for `branches`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check
from fnn.core import Branch, Layer, as_arrays, located, refuse_rescaling, stateless
from fnn.masks import Masked, check_mask, filled, harmless


def parts(who: str, x: Any, fill: Callable[[Any], Any] = lambda values: 0) -> tuple[Any, Any]:
    """Take apart what may be masked: (values, mask or None), with `fill(values)` at padded positions, 0 by default.

    This is where padding ends: what stood there reaches no product, no sum and no gradient. Specs stay as they are.
    """
    if not isinstance(x, Masked):
        return x, None
    check_mask(who, x)
    if isinstance(x.values, jax.ShapeDtypeStruct):
        return x
    return filled(x.values, x.mask, fill(x.values)), x.mask


def sequence(who: str, x: Any) -> tuple[Any, Any]:
    """Take a sequence apart: (values float[batch, time, d], mask or None), 0 at padding. Anything else is refused."""
    values, mask = parts(who, x)
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, jnp.floating) or len(values.shape) != 3:
        raise ValueError(
            f"{who}: the input must be a sequence float[batch, time, d], alone or in Masked, got {check.describe(x)}"
        )
    return values, mask


def like(x: Any, values: Any) -> Any:
    """Put new values beside the mask of x, if x has one."""
    return Masked(values, x.mask) if isinstance(x, Masked) else values


def positionwise(layer: Layer) -> Layer:
    """Let a layer that acts on each position alone take `Masked` sequences: it sees the values, the mask passes by.

    In the place of padding the layer sees numbers between 0 and 1, so that what it returns there is finite. Anything but
    `Masked` reaches the layer unchanged, so that the wrapper costs nothing elsewhere.
    """

    def init(key, spec):
        return layer.init(key, parts("Masked", spec)[0])

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        values, _ = parts("Masked", x, harmless)
        y, state = layer.apply(params, state, values, key=key, train=train, axis_name=axis_name)
        return like(x, y), state

    return Layer(init, apply)


def drop_mask() -> Layer:
    """Drop the mask: y = values, zero at padded positions; an input without a mask passes unchanged."""
    return stateless(lambda key, spec: (), lambda params, x: parts("drop_mask", x)[0])


def take_last() -> Layer:
    """Take the last real position of a sequence: float[batch, time, d] -> float[batch, d].

    There a layer that runs forward in time has read everything, and one that runs backwards (`reverse=True`) a single
    position: take `take_first` behind that, and `take_ends` behind `bidirectional`. An example without a real position gives 0.
    """
    return _at("take_last", lambda values, mask: _place(values, mask, -1))


def take_first() -> Layer:
    """Take the first real position of a sequence: float[batch, time, d] -> float[batch, d].

    There a layer with `reverse=True` has read everything. An example without a real position gives 0.
    """
    return _at("take_first", lambda values, mask: _place(values, mask, 0))


def take_ends(forward: int | None = None) -> Layer:
    """Take what `bidirectional` has read in full: its forward units at the last real position, the rest at the first.

    float[batch, time, d] -> float[batch, d]. `forward` is the number of units that run forward, half of d by default.
    An example without a real position gives 0.
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
    return stateless(lambda key, spec: (), lambda params, x: read(*sequence(who, x)))


def _place(values: Any, mask: Any, end: int) -> Any:
    """The real position nearest to an end of the sequence, 0 or -1."""
    if mask is None:
        return values[:, end]
    index = jnp.argmax(mask, axis=1) if end == 0 else mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(values, index[:, None, None], axis=1)[:, 0]


def branches(layers: Mapping[str, Layer]) -> Layer:
    """Give every input its own layer: a dict {name: x} becomes {name: layer(x)}.

    Params and state are dicts by name, keys `jax.random.split` over the sorted names. The layers lie beside the trunk:
    taps in them measure, but do not rescale. Errors: ValueError if the names of the input are others.
    """
    layers = dict(layers)
    names = sorted(layers)
    for name, layer in layers.items():
        if not isinstance(name, str) or not isinstance(layer, Layer):
            raise TypeError(f"branches: needs a dict of names and Layers, got {name!r}: {layer!r}")
    if not layers:
        raise ValueError("branches: needs at least one layer, got none")

    def check_names(x):
        if not isinstance(x, Mapping) or sorted(x) != names:
            got = sorted(x) if isinstance(x, Mapping) else check.describe(x)
            raise ValueError(f"branches: the input must be a dict with the names {names}, got {got}")

    def init(key, spec):
        check_names(spec)
        params, states = {}, {}
        for k, name in zip(jax.random.split(key, len(names)), names, strict=True):
            with located(name, spec[name]):
                params[name], states[name] = layers[name].init(k, spec[name])
        return params, Branch(states)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        check_names(x)
        refuse_rescaling("branches", state)
        keys = [None] * len(names) if key is None else jax.random.split(key, len(names))
        ys, states = {}, {}
        for k, name in zip(keys, names, strict=True):
            with located(name, x[name]):
                ys[name], states[name] = layers[name].apply(
                    params[name], state.inner[name], x[name], key=k, train=train, axis_name=axis_name
                )
        return ys, Branch(states)

    return Layer(init, apply)


def concatenate() -> Layer:
    """Join a tuple (of `parallel`) or a dict (of `branches`, in the order of its sorted names) along the last axis.

    Masked sequences must come with equal masks, which is the caller's to keep: the first one's is returned.
    Errors: ValueError if the other axes differ.
    """
    return _joining("concatenate", lambda arrays: jnp.concatenate(arrays, axis=-1), slice(0, -1))


def sum_inputs() -> Layer:
    """Sum a tuple (of `parallel`) or a dict (of `branches`): y = x_1 + ... + x_n. Masks as in `concatenate`.

    Errors: ValueError if the shapes differ.
    """
    return _joining("sum_inputs", lambda arrays: sum(arrays[1:], start=arrays[0]), slice(None))


def _joining(who: str, join: Callable[[list[Any]], Any], common: slice) -> Layer:
    def apply(params, x):
        given = None
        if isinstance(x, Mapping):
            given = [x[name] for name in sorted(x)]
        elif isinstance(x, tuple) and not isinstance(x, Masked):
            given = list(x)
        if not given:
            raise ValueError(f"{who}: the input must be a tuple or a dict of arrays, got {check.describe(x)}")
        arrays = [parts(who, part)[0] for part in given]
        if any(not hasattr(a, "shape") or a.shape[common] != arrays[0].shape[common] for a in arrays):
            rule = "one shape" if common == slice(None) else "one shape but for the last axis"
            raise ValueError(f"{who}: the inputs must have {rule}, got {check.describe(tuple(arrays))}")
        return like(next((part for part in given if isinstance(part, Masked)), None), join(as_arrays(arrays)))

    return stateless(lambda key, spec: (), apply)
