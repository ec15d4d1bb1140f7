"""Layers that act on each number or vector alone: dense, activation, dropout, scalar_affine, flatten."""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fnn import check, lowering, mapped
from fnn.core import Layer, as_arrays, function, stateless
from fnn.description import described, name_of, text
from fnn.layers import activations, initializers
from fnn.layers.initializers import Initializer
from fnn.layers.inputs import check_array, check_floating, check_units, positionwise
from fnn.layers.memory import Whole
from fnn.tree import statistics_dtype


@described
def dense(
    width: int,
    *,
    kernel_init: str | Initializer = "lecun_normal",
    bias_init: str | Initializer = "zeros",
    bias: bool = True,
) -> Layer:
    """Compute y = x W + b over the last axis.

    x: float[batch, ..., d] -> float[batch, ..., width]; params: kernel float[d, width], bias float[width], in float32
    or x's dtype if that is wider. An initialiser is a name (`initializers.NAMES`) or a function (key, shape, dtype).
    """
    check.positive("dense", width=width)
    kernel_init, bias_init = initializers.get(kernel_init), initializers.get(bias_init)

    def init(key, spec):
        check_units("dense", spec)
        kernel_key, bias_key = jax.random.split(key)
        dtype = statistics_dtype(spec.dtype)
        params = {"kernel": kernel_init(kernel_key, (spec.shape[-1], width), dtype)}
        return params | {"bias": bias_init(bias_key, (width,), dtype)} if bias else params

    def apply(params, x):
        check_units("dense", x, params["kernel"].shape[0])
        return affine(params, x)

    return positionwise(stateless(init, apply))


def affine(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Compute x W + b over the last axis, in x's dtype; without b if params have no bias."""
    y = product(x, params["kernel"].astype(x.dtype))
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute x W over the last axis, as a product of two matrices.

    So the gradient of W is a plain product xᵀ dy. With more axes JAX writes it as (dyᵀ x)ᵀ. For that XLA on a CPU copies
    dy, and recomputes inside the copy all sums that lead to it, which grow longer towards the input of a residual net.
    Other platforms keep the axes, which may be sharded (`lowering.flat_products`).
    """
    if x.ndim <= 2 or not lowering.flat_products():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def activation(f: str | Callable[..., jax.Array], **options: Any) -> Layer:
    """Make a layer y = f(x) from an activation's name or any function: `activation("relu", grad_at_zero=1.0)`.

    `options` go to the named activation; one that it does not have is a TypeError.
    """
    if callable(f) and not isinstance(f, activations.Activation):
        if options:
            raise TypeError(
                "activation: only a named activation takes options, got a function; bind them with functools.partial"
            )
        return positionwise(function(f)).described(name_of(f))
    phi = activations.get(f).bind(**options)
    given = ", ".join(f"{name}={text(value)}" for name, value in options.items())
    return positionwise(function(phi)).described(f"{phi.name}({given})" if given else phi.name)


@described
def dropout(rate: float) -> Layer:
    """Set each number to zero with probability `rate` and multiply the rest by 1/(1 - rate); in eval mode y = x.

    Train mode needs a `key`. Under `axis_name` the mapped index is folded into it, so that no two examples share a mask.
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


@described
def scalar_affine(scale: float | None = 1.0, bias: float | None = None) -> Layer:
    """Multiply by one learned number and add another: y = scale·x + bias; None leaves one of them out.

    Params: scale, bias float[], which start at the numbers given. With a scale of 0 at the end of its branch, a residual
    block starts as the identity. Source: De and Smith 2020 (SkipInit); Zhang et al. 2019 (Fixup's scalars).
    """
    if scale is None and bias is None:
        raise ValueError("scalar_affine: needs a scale or a bias, got None for both")
    start = {name: value for name, value in (("scale", scale), ("bias", bias)) if value is not None}

    def init(key, spec):
        check_floating("scalar_affine", spec)
        return {name: jnp.asarray(value, statistics_dtype(spec.dtype)) for name, value in start.items()}

    def apply(params, x):
        y = x * params["scale"].astype(x.dtype) if "scale" in params else x
        return y + params["bias"].astype(x.dtype) if "bias" in params else y

    return positionwise(stateless(init, apply))


@described
def flatten() -> Layer:
    """Reshape float[batch, ...] to float[batch, d]. Its state has no array, and says what shape it has flattened."""

    def init(key, spec):
        check_array("flatten", spec)
        return (), Flattened(tuple(spec.shape[1:]))

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        check_array("flatten", x)
        x = as_arrays(x)
        return x.reshape(x.shape[0], math.prod(x.shape[1:])), state

    return Layer(init, apply)


@flax.struct.dataclass
class Flattened:
    """The state of `flatten`: where the units of the next layer stand in an image, for weights from libraries that have
    channels first."""

    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Mirrored(Whole):
    """The state of `conv_transpose`: no array, but it tells the kernel from that of a `conv`, which may have its shape."""
