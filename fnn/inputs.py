"""What x may be besides one array: a padded sequence with its mask, several inputs by name.

A sequence is float[batch, time, d], every position of which is real, or `Masked(values, mask)`. It is a pytree and
travels as any x does: through `serial`, `repeat`, `residual`, `parallel` and `vmap`, without another argument to `apply`.
Layers that act on each position alone (dense, activation, dropout, layer_norm, rms_norm, embed) see the values, and the
mask passes by; layers that mix positions (recurrent ones, attention, pooling over time) and those that take statistics
over them (batch_norm, tap) read it; all others refuse it. Several inputs are a dict of them, for `branches`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import check
from fnn.core import Branch, Layer, as_arrays, located, refuse_rescaling, stateless


class Masked(NamedTuple):
    """A sequence `values: [batch, time, ...]` and `mask: bool[batch, time]`, True where a position is real.

    A mask may have holes, and either side may be padded. Values at padded positions are arbitrary: no layer lets them
    reach a real position.
    """

    values: Any
    mask: Any

    @classmethod
    def of_lengths(cls, values: Any, lengths: Any) -> "Masked":
        """Mask all but the first `lengths: int[batch]` positions of each example. Lengths above time mask nothing."""
        lengths = jnp.asarray(lengths)
        if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != jnp.shape(values)[:1]:
            got = f"{check.describe(values)} and {check.describe(lengths)}"
            raise ValueError(f"Masked.of_lengths: lengths must be int[batch], one for each example, got {got}")
        return cls(values, jnp.arange(jnp.shape(values)[1]) < lengths[:, None])


def check_mask(who: str, x: Masked) -> None:
    """Refuse a mask that is not bool[batch, time] for values [batch, time, ...]."""
    if x.mask.dtype != bool:
        raise TypeError(f"{who}: a mask must be bool, True where a position is real, got {check.describe(x.mask)}")
    if len(x.values.shape) < 2 or x.mask.shape != x.values.shape[:2]:
        got = f"values {check.describe(x.values)} and mask {check.describe(x.mask)}"
        raise ValueError(f"{who}: a mask must be bool[batch, time] of the values' first two axes, got {got}")


def parts(who: str, x: Any) -> tuple[Any, Any]:
    """Take apart what may be masked: (values, mask or None)."""
    if isinstance(x, Masked):
        check_mask(who, x)
        return x.values, x.mask
    return x, None


def sequence(who: str, x: Any) -> tuple[Any, Any]:
    """Take a sequence apart: (values float[batch, time, d], mask or None). Anything else is refused."""
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

    Anything but `Masked` reaches the layer unchanged, so that the wrapper costs nothing elsewhere.
    """

    def init(key, spec):
        return layer.init(key, _values(spec))

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        y, state = layer.apply(params, state, _values(x), key=key, train=train, axis_name=axis_name)
        return like(x, y), state

    return Layer(init, apply)


def unmasked() -> Layer:
    """Drop the mask: y = values, zero at padded positions; an input without a mask passes unchanged."""

    def apply(params, x):
        if not isinstance(x, Masked):
            return x
        check_mask("unmasked", x)
        mask = x.mask.reshape(x.mask.shape + (1,) * (x.values.ndim - 2))
        return jnp.where(mask, x.values, jnp.zeros((), x.values.dtype))

    return stateless(lambda key, spec: (), apply)


def last() -> Layer:
    """Take the last real position of a sequence: float[batch, time, d] -> float[batch, d].

    An example without a real position gives its first one.
    """

    def apply(params, x):
        values, mask = sequence("last", x)
        if mask is None:
            return values[:, -1]
        time = values.shape[1]
        index = jnp.max(jnp.where(mask, jnp.arange(time), 0), axis=1)
        return jnp.take_along_axis(values, index[:, None, None], axis=1)[:, 0]

    return stateless(lambda key, spec: (), apply)


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


def add() -> Layer:
    """Sum a tuple (of `parallel`) or a dict (of `branches`): y = x_1 + ... + x_n. Masks as in `concatenate`.

    Errors: ValueError if the shapes differ.
    """
    return _joining("add", lambda arrays: sum(arrays[1:], start=arrays[0]), slice(None))


def _joining(who: str, join: Callable[[list[Any]], Any], common: slice) -> Layer:
    def apply(params, x):
        parts = None
        if isinstance(x, Mapping):
            parts = [x[name] for name in sorted(x)]
        elif isinstance(x, tuple) and not isinstance(x, Masked):
            parts = list(x)
        if not parts:
            raise ValueError(f"{who}: the input must be a tuple or a dict of arrays, got {check.describe(x)}")
        arrays = [_values(part) for part in parts]
        if any(not hasattr(a, "shape") or a.shape[common] != arrays[0].shape[common] for a in arrays):
            rule = "one shape" if common == slice(None) else "one shape but for the last axis"
            raise ValueError(f"{who}: the inputs must have {rule}, got {check.describe(tuple(arrays))}")
        return like(next((part for part in parts if isinstance(part, Masked)), None), join(as_arrays(arrays)))

    return stateless(lambda key, spec: (), apply)


def _values(x: Any) -> Any:
    return parts("Masked", x)[0]
