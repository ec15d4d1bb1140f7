"""Initialisers for weights and biases: functions `(key, shape, dtype=float32) -> array`.

The last axis of a kernel is its output, the one before it the input, and further axes are a receptive field:
fan_in = prod(shape[:-1]), fan_out = prod(shape[:-2]) * shape[-1].

The names say the distribution: `he_normal` is a true normal (kurtosis 3, which theory assumes), `he_truncated_normal` is
cut at two standard deviations and rescaled to the same variance (kurtosis 2.3655). Flax's `he_normal` is the latter.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fnn import check

Initializer = Callable[..., jax.Array]


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Fill with 0."""
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Fill with 1."""
    return jnp.ones(shape, dtype)


def constant(value: ArrayLike = 0.0) -> Initializer:
    """Fill with one value, which may be traced."""
    return lambda key, shape, dtype=jnp.float32: jnp.full(shape, value, dtype)


def normal(std: ArrayLike = 0.01) -> Initializer:
    """Draw from N(0, std²) for any shape, so also for biases; std may be traced."""
    check.at_least_zero("normal", std=std)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jnp.asarray(std, dtype) * jax.random.normal(key, shape, dtype)

    return init


def scaled(sigma_w: ArrayLike = 1.0) -> Initializer:
    """Draw from N(0, sigma_w²/fan_in), a true normal, as mean-field theory does; sigma_w may be traced.

    Source: Poole et al. 2016, section 2.
    """
    check.at_least_zero("scaled", sigma_w=sigma_w)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        _check_axes("scaled", shape)
        std = jnp.asarray(sigma_w, dtype) / math.sqrt(math.prod(shape[:-1]))
        return std * jax.random.normal(key, shape, dtype)

    return init


def _variance(scale: float, mode: Any, distribution: Any, doc: str) -> Initializer:
    inner = jax.nn.initializers.variance_scaling(scale, mode, distribution)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        _check_axes(f"{mode} initialiser", shape)
        return inner(key, shape, dtype)

    init.__doc__ = doc
    return init


_HE = "variance 2/fan_in (He et al. 2015, equation 10)"
_GLOROT = "variance 2/(fan_in + fan_out) (Glorot and Bengio 2010, equation 16)"
_LECUN = "variance 1/fan_in (LeCun et al. 1998, equation 16)"
he_normal = _variance(2.0, "fan_in", "normal", f"Draw from a true normal of {_HE}.")
he_truncated_normal = _variance(2.0, "fan_in", "truncated_normal", f"Draw from a truncated normal of {_HE}.")
he_uniform = _variance(2.0, "fan_in", "uniform", f"Draw uniformly with {_HE}.")
glorot_normal = _variance(1.0, "fan_avg", "normal", f"Draw from a true normal of {_GLOROT}.")
glorot_truncated_normal = _variance(1.0, "fan_avg", "truncated_normal", f"Draw from a truncated normal of {_GLOROT}.")
glorot_uniform = _variance(1.0, "fan_avg", "uniform", f"Draw uniformly with {_GLOROT}.")
lecun_normal = _variance(1.0, "fan_in", "normal", f"Draw from a true normal of {_LECUN}.")
lecun_truncated_normal = _variance(1.0, "fan_in", "truncated_normal", f"Draw from a truncated normal of {_LECUN}.")
lecun_uniform = _variance(1.0, "fan_in", "uniform", f"Draw uniformly with {_LECUN}.")


def orthogonal(scale: ArrayLike = 1.0) -> Initializer:
    """Draw `scale` times a uniformly random orthogonal matrix; a non-square one has orthonormal rows or columns.

    All axes except the last count as input. Source: Saxe et al. 2014; sign fix of Mezzadri 2007.
    """
    check.at_least_zero("orthogonal", scale=scale)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        _check_axes("orthogonal", shape)
        wide = jnp.promote_types(dtype, jnp.float32)  # there is no QR in bfloat16
        return jax.nn.initializers.orthogonal(scale)(key, shape, wide).astype(dtype)

    return init


def delta_orthogonal(scale: ArrayLike = 1.0) -> Initializer:
    """Draw a convolution kernel with an orthogonal matrix at its centre and zeros elsewhere, for out >= in channels.

    Source: Xiao et al. 2018, algorithm 1.
    """
    check.at_least_zero("delta_orthogonal", scale=scale)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        if len(shape) not in (3, 4, 5) or shape[-1] < shape[-2]:
            raise ValueError(
                f"delta_orthogonal: needs a kernel (..., in, out) of 3 to 5 axes with out >= in, got {shape}"
            )
        wide = jnp.promote_types(dtype, jnp.float32)
        return jax.nn.initializers.delta_orthogonal(scale)(key, shape, wide).astype(dtype)

    return init


_FAMILIES = ("he", "glorot", "lecun")
_KINDS = ("normal", "truncated_normal", "uniform")
_PLAIN = {name: globals()[name] for name in ("zeros", "ones", *(f"{a}_{b}" for a in _FAMILIES for b in _KINDS))}
for _name, _function in _PLAIN.items():  # what they print as
    _function.__name__ = _function.__qualname__ = _name
_WITH_ARGUMENT = {make.__name__: make for make in (constant, normal, scaled, orthogonal, delta_orthogonal)}
NAMES = (*_PLAIN, *_WITH_ARGUMENT)


def get(initializer: str | Initializer) -> Initializer:
    """Find an initialiser by name, `"he_normal"`, or with an argument, `"normal(0.1)"`; return a function as it is.

    Errors: an unknown name is a ValueError that suggests the nearest one.
    """
    if callable(initializer):
        return initializer
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([^()]*?)\s*\))?\s*", str(initializer))
    name, argument = match.groups() if match else (str(initializer), None)
    check.choice("initializers", NAMES, initializer=name)
    if argument in (None, ""):
        return _PLAIN.get(name) or _WITH_ARGUMENT[name]()
    if name in _PLAIN:
        raise ValueError(f"initializers: {name} takes no argument, got {initializer!r}")
    try:
        value = float(argument)
    except ValueError:
        raise ValueError(f"initializers: the argument of {name} must be a number, got {initializer!r}") from None
    return _WITH_ARGUMENT[name](value)


def _check_axes(who: str, shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ValueError(f"{who}: the shape must have an input and an output axis, got {shape}; use normal(std)")
