"""Normalisation layers. Statistics are two-pass and in at least float32; the last axis holds the units.

Each `eps` defaults to Flax's: 1e-5 for `batch_norm`, 1e-6 for the others. Parameters have Flax's names too, so that a
trained Flax model gives the same numbers here. PyTorch has 1e-5 for `BatchNorm`, `LayerNorm` and `GroupNorm`, and the
dtype's own epsilon for `RMSNorm`: pass that where weights come from there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check, mapped
from fnn.core import Layer, as_arrays, as_spec, stateless
from fnn.description import described
from fnn.layers.inputs import Masked, check_units, like, positionwise, sequence
from fnn.layers.memory import whole_sequence
from fnn.masks import cleared
from fnn.tree import statistics_dtype


@described
def batch_norm(*, decay: float = 0.9, eps: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise each unit over the batch: y = scale·(x - mean)/sqrt(var + eps) + bias.

    x: float[batch, ..., d], or a sequence in `Masked` -> the same; params: scale, bias float[d]; state: mean, var
    float[d], weight float[].

    In train mode, mean and biased variance are those of the batch (with `axis_name`, over the mapped axis too), and the
    running moments are updated: m <- decay·m + (1 - decay)·m_batch, weight <- decay·weight + (1 - decay). They start at
    zero. Eval mode divides them by their accumulated weight, so that it is right after any number of steps; before the
    first it is the identity, up to scale and bias. eps is Flax's and PyTorch's.

    In a masked sequence only real positions count, as if they were the rows of one array [n, d]; padded ones give zero. A
    batch with fewer than two real positions leaves the running moments as they are (a single one is normalised to zero).

    Errors: ValueError in train mode for a single value per unit, whose normalised value and gradient would be zero.
    Source: Ioffe and Szegedy 2015; debiasing as in Kingma and Ba 2015, section 3.
    """
    check.fraction("batch_norm", decay=decay)
    check.at_least_zero("batch_norm", eps=eps)

    def init(key, spec):
        spec, _ = _maybe_masked(as_spec(spec))
        check_units("batch_norm", spec)
        d, dtype = spec.shape[-1], statistics_dtype(spec.dtype)
        state = {"mean": jnp.zeros(d, dtype), "var": jnp.zeros(d, dtype), "weight": jnp.zeros((), dtype)}
        return _affine(d, dtype, scale, bias), state

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        given = as_arrays(x)
        x, mask = _maybe_masked(given)
        check_units("batch_norm", x, state["mean"].shape[0])
        wide, real, keep = x.astype(statistics_dtype(x.dtype)), None, jnp.asarray(decay, state["weight"].dtype)
        if mask is not None:
            real = _real(mask, axis_name)
            keep = jnp.where(real[1] < 2, 1, keep)
        if train:
            over = tuple(range(x.ndim - 1))
            count = x.size // x.shape[-1] * mapped.size(axis_name)
            if count < 2:
                raise ValueError(
                    f"batch_norm: train mode needs at least two values per unit, got {check.describe(x)}, which would be "
                    "normalised to zero, with a gradient of zero; use a larger batch or pass axis_name"
                )
            y, mean, var = _standardised(wide, params.get("scale"), params.get("bias"), real, eps, over, axis_name)
            state = {
                "mean": keep * state["mean"] + (1 - keep) * mean.astype(keep.dtype),
                "var": keep * state["var"] + (1 - keep) * var.astype(keep.dtype),
                "weight": keep * state["weight"] + (1 - keep),
            }
            return cleared(like(given, y.astype(x.dtype))), state
        seen = state["weight"] > 0
        weight = jnp.where(seen, state["weight"], 1)
        mean = (state["mean"] / weight).astype(wide.dtype)
        var = jnp.where(seen, state["var"] / weight, 1 - eps).astype(wide.dtype)
        y = (wide - mean) * jax.lax.rsqrt(var + eps)
        return cleared(like(given, _scaled(y, params.get("scale"), params.get("bias"), x.dtype))), state

    return Layer(init, apply)


@described
def layer_norm(*, eps: float = 1e-6, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise each vector over its units: y = scale·(x - mean)/sqrt(var + eps) + bias, over the last axis.

    x: float[batch, ..., d] -> the same; params: scale, bias float[d]. eps is Flax's (PyTorch: 1e-5). Source: Ba et al. 2016.
    """
    check.at_least_zero("layer_norm", eps=eps)

    def normalise(x):
        return _divided(x - jnp.mean(x, axis=-1, keepdims=True), eps, -1)

    return positionwise(_per_example("layer_norm", normalise, scale, bias))


@described
def rms_norm(*, eps: float = 1e-6, scale: bool = True) -> Layer:
    """Divide each vector by its root mean square: y = scale·x/sqrt(mean(x²) + eps), over the last axis.

    x: float[batch, ..., d] -> the same; params: scale float[d]. eps is Flax's (PyTorch: that of the dtype).
    Source: Zhang and Sennrich 2019.
    """
    check.at_least_zero("rms_norm", eps=eps)

    return positionwise(_per_example("rms_norm", lambda x: _divided(x, eps, -1), scale, False))


@described
def group_norm(groups: int, *, eps: float = 1e-6, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise each example over groups of units and all positions: y = scale·(x - mean)/sqrt(var + eps) + bias.

    x: float[batch, ..., d] -> the same, d divisible by `groups`; group g holds units g·d/groups up to (g + 1)·d/groups.
    Params: scale, bias float[d]. eps is Flax's (PyTorch: 1e-5).
    Errors: ValueError if d is not divisible. Source: Wu and He 2018.
    """
    check.positive("group_norm", groups=groups)
    check.at_least_zero("group_norm", eps=eps)

    def normalise(x):
        if x.shape[-1] % groups:
            raise ValueError(f"group_norm: the number of units must be divisible by {groups}, got {check.describe(x)}")
        parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
        return _divided(parts - jnp.mean(parts, axis=(1, 3), keepdims=True), eps, (1, 3)).reshape(x.shape)

    return whole_sequence("group_norm", _per_example("group_norm", normalise, scale, bias))


def _divided(x: jax.Array, eps: float, over: int | tuple[int, ...]) -> jax.Array:
    """Divide by the root mean square over some axes."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=over, keepdims=True) + eps)


def _per_example(who: str, normalise: Callable[[jax.Array], jax.Array], scale: bool, bias: bool) -> Layer:
    def init(key, spec):
        check_units(who, spec)
        return _affine(spec.shape[-1], statistics_dtype(spec.dtype), scale, bias)

    def apply(params, x):
        check_units(who, x, next((leaf.shape[0] for leaf in params.values()), None))
        y = normalise(x.astype(statistics_dtype(x.dtype)))
        return _scaled(y, params.get("scale"), params.get("bias"), x.dtype)

    return stateless(init, apply)


def _affine(d: int, dtype: Any, scale: bool, bias: bool) -> dict[str, jax.Array]:
    return ({"scale": jnp.ones(d, dtype)} if scale else {}) | ({"bias": jnp.zeros(d, dtype)} if bias else {})


def _scaled(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None, dtype: Any) -> jax.Array:
    if scale is not None:
        y = y * scale.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(dtype)


def _maybe_masked(x: Any) -> tuple[Any, Any]:
    return sequence("batch_norm", x) if isinstance(x, Masked) else (x, None)


def _real(mask: jax.Array, axis_name: Any) -> tuple[jax.Array, jax.Array]:
    """Return the mask, with an axis for the units, and the number of real positions, over the mapped axis too."""
    count = jnp.sum(mask)
    return mask[..., None], mapped.reduce(jax.lax.psum, count, axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _standardised(x: Any, scale: Any, bias: Any, real: Any, eps: float, over: tuple[int, ...], axis_name: Any) -> Any:
    """Return (scale·xhat + bias, mean, var), xhat = (x - mean)/sqrt(var + eps).

    The derivative of xhat is written out, `root·(t - E[t] - xhat E[xhat t])`: autodiff would also send a cotangent
    through the mean inside the variance, which is zero. Forward and reverse mode both follow from it. `real` is None, or
    the mask and number of real positions, and E is then over these. Seven arguments: a custom derivative takes no object.
    """
    return _standardise(x, scale, bias, real, eps, over, axis_name)[0]


def _standardise(x, scale, bias, real, eps, over, axis_name):
    """Compute the result of `_standardised`, whose seven arguments it takes, and what the derivative needs of it."""
    mean = _average(x, real, over, axis_name)
    centred = x - mean
    var = _average(jnp.square(centred), real, over, axis_name)
    root = jax.lax.rsqrt(var + eps)
    xhat = centred * root
    return (_scaled(xhat, scale, bias, x.dtype), mean, var), xhat, root


@_standardised.defjvp
def _standardised_jvp(eps, over, axis_name, primals, tangents):
    x, scale, bias, real = primals
    t, scale_t, bias_t, _ = tangents
    out, xhat, root = _standardise(x, scale, bias, real, eps, over, axis_name)
    # The factor first, and the signs on the averages: so the backward pass sums over the batch exactly what the gradients
    # of bias and scale sum, and XLA computes these sums once.
    u = t * (root if scale is None else root * scale.astype(x.dtype))
    y_t = u + -_average(u, real, over, axis_name) + xhat * -_average(u * xhat, real, over, axis_name)
    if scale is not None:
        y_t = y_t + scale_t.astype(x.dtype) * xhat
    if bias is not None:
        y_t = y_t + bias_t.astype(x.dtype)
    mean_t = _average(t, real, over, axis_name)
    return out, (y_t, mean_t, 2 * _average(t * (xhat / root), real, over, axis_name))


def _average(x: jax.Array, real: Any, over: tuple[int, ...], axis_name: Any) -> jax.Array:
    if real is None:
        return mapped.mean(jnp.mean(x, axis=over), axis_name)
    total = mapped.reduce(jax.lax.psum, jnp.sum(jnp.where(real[0], x, 0), axis=over), axis_name)
    return total / jnp.maximum(1, real[1]).astype(x.dtype)
