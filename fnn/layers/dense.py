"""The dense vocabulary: dense, activation, dropout, flatten."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check, mapped
from fnn.core import Layer, function, stateless
from fnn.layers import activations, initializers
from fnn.layers.inputs import positionwise
from fnn.tree import statistics_dtype


def dense(
    width: int,
    *,
    kernel_init: str | Callable[..., Any] = "lecun_normal",
    bias_init: str | Callable[..., Any] = "zeros",
    bias: bool = True,
) -> Layer:
    """Map y = x W + b over the last axis.

    x: float[batch, ..., d] -> float[batch, ..., width]; params: kernel float[d, width], bias float[width], in float32
    or x's wider dtype. Initialisers go by name (`initializers.NAMES`) or are functions (key, shape, dtype) -> array.
    """
    check.positive("dense", width=width)
    kernel_init, bias_init = initializers.get(kernel_init), initializers.get(bias_init)

    def init(key, spec):
        _floating("dense", spec)
        _axes("dense", spec, 2)
        kernel_key, bias_key = jax.random.split(key)
        dtype = statistics_dtype(spec.dtype)
        params = {"kernel": kernel_init(kernel_key, (spec.shape[-1], width), dtype)}
        return params | {"bias": bias_init(bias_key, (width,), dtype)} if bias else params

    def apply(params, x):
        _floating("dense", x)
        kernel = params["kernel"]
        if x.ndim < 2 or x.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"dense: the input's last axis must be {kernel.shape[0]}, as at init, "
                f"expected {x.dtype}[batch, ..., {kernel.shape[0]}], got {check.describe(x)}"
            )
        return affine(params, x)

    return positionwise(stateless(init, apply))


def affine(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """x W + b over the last axis, in x's dtype; b only where params have a bias."""
    y = product(x, params["kernel"].astype(x.dtype))
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x W over the last axis, as a product of two matrices.

    The gradient of W is then xᵀ dy of two matrices as they lie. With more axes JAX writes it as (dyᵀ x)ᵀ, for which XLA on
    a CPU copies dy, and computes anew, in the copy, all sums that lead to it: down a residual net ever longer ones.
    """
    if x.ndim <= 2:
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def activation(f: str | Callable[..., Any], **options: Any) -> Layer:
    """Apply an activation by name, or any plain function x -> y, as a layer: `activation("relu", grad_at_zero=1.0)`.

    `options` are the function's own; one that it does not have is a TypeError.
    """
    if callable(f) and not isinstance(f, activations.Activation):
        if options:
            raise TypeError("activation: options belong to named activations, got a function; bind them to it instead")
        return positionwise(function(f))
    return positionwise(function(activations.get(f).bind(**options)))


def dropout(rate: float) -> Layer:
    """Zero each number with probability `rate` in train mode and scale the rest by 1/(1 - rate); else the identity.

    Needs `key` in train mode. Under `axis_name` the mapped index is folded into the key: no two examples share a mask.
    Source: Srivastava et al. 2014 (in the inverted form).
    """
    check.fraction("dropout", rate=rate)

    def init(key, spec):
        return (), ()

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        if not train or rate == 0:
            return x, state
        if key is None:
            raise ValueError(
                "dropout: train mode needs a PRNG key, got key=None; pass key=jax.random.key(...) to apply"
            )
        if axis_name is not None:
            key = jax.random.fold_in(key, mapped.index(axis_name))
        keep = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)  # the same mask with x64 and without
        return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype)), state

    return positionwise(Layer(init, apply))


def scalar_affine(scale: float | None = 1.0, bias: float | None = None) -> Layer:
    """Multiply by one learned number and add another: y = scale·x + bias; what is None is left out.

    Params: scale, bias float[], starting at the numbers given. A scale of 0 at a branch's end makes a residual block the
    identity at the start. Source: De and Smith 2020 (SkipInit); Zhang et al. 2019 (Fixup's scalars).
    """
    if scale is None and bias is None:
        raise ValueError("scalar_affine: needs a scale or a bias, got None for both")
    start = {name: value for name, value in (("scale", scale), ("bias", bias)) if value is not None}

    def init(key, spec):
        _floating("scalar_affine", spec)
        return {name: jnp.asarray(value, statistics_dtype(spec.dtype)) for name, value in start.items()}

    def apply(params, x):
        y = x * params["scale"].astype(x.dtype) if "scale" in params else x
        return y + params["bias"].astype(x.dtype) if "bias" in params else y

    return positionwise(stateless(init, apply))


def flatten() -> Layer:
    """Reshape float[batch, ...] to float[batch, d]."""

    def apply(x):
        if not hasattr(x, "shape"):
            raise TypeError(f"flatten: the input must be one array, got {check.describe(x)}")
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    return function(apply)


def _floating(who: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{who}: the input must be floating point, got {check.describe(x)}; cast it first")


def _axes(who: str, x: Any, least: int) -> None:
    if len(x.shape) < least:
        raise ValueError(f"{who}: the input must have {least} axes or more, batch first, got {check.describe(x)}")
