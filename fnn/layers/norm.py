"""Normalisation layers. Statistics are two-pass and in at least float32; the last axis holds the units."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check, mapped
from fnn.core import Layer, as_arrays, as_spec, stateless
from fnn.layers.inputs import Masked, like, positionwise, sequence
from fnn.tree import statistics_dtype


def batch_norm(*, decay: float = 0.9, eps: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise every unit over the batch: y = scale·(x - mean)/sqrt(var + eps) + bias.

    x: float[batch, ..., d], or a sequence in `Masked` -> the same; params: scale, bias float[d]; state: mean, var
    float[d], weight float[].

    In train mode mean and biased variance are those of the batch (with `axis_name`, over the mapped axis too), and the
    running moments move: m <- decay·m + (1 - decay)·m_batch, weight <- decay·weight + (1 - decay). They start at zero;
    eval mode divides them by their accumulated weight, so that it is right after 1, 10 and 100 steps alike, and is the
    identity (up to scale and bias) before the first.

    Of a masked sequence only real positions count, as if they stood in one array [n, d]; padded ones come out as zero. A
    batch with fewer than two of them leaves the running moments as they are (a lone one is normalised to zero).

    Errors: ValueError in train mode for a single value per unit, whose normalised value and gradient would be zero.
    Source: Ioffe and Szegedy 2015; debiasing as in Kingma and Ba 2015, section 3.
    """
    check.fraction("batch_norm", decay=decay)
    check.at_least_zero("batch_norm", eps=eps)

    def init(key, spec):
        spec, _ = _maybe_masked(as_spec(spec))
        _units("batch_norm", spec)
        d, dtype = spec.shape[-1], statistics_dtype(spec.dtype)
        state = {"mean": jnp.zeros(d, dtype), "var": jnp.zeros(d, dtype), "weight": jnp.zeros((), dtype)}
        return _affine(d, dtype, scale, bias), state

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        given = as_arrays(x)
        x, mask = _maybe_masked(given)
        _width("batch_norm", state["mean"].shape[0], x)
        wide, real, keep = x.astype(statistics_dtype(x.dtype)), None, jnp.asarray(decay, state["weight"].dtype)
        if mask is not None:
            real = _real(mask, axis_name)
            keep = jnp.where(real[1] < 2, 1, keep)
        if train:
            over = tuple(range(x.ndim - 1))
            count = x.size // x.shape[-1] * mapped.size(axis_name)
            if count < 2:
                raise ValueError(
                    f"batch_norm: train mode needs at least two values per unit, got {check.describe(x)}: a batch of "
                    "one is normalised to zero and its gradient vanishes; use a larger batch or pass axis_name"
                )
            y, mean, var = _standardised(wide, params.get("scale"), params.get("bias"), real, eps, over, axis_name)
            state = {
                "mean": keep * state["mean"] + (1 - keep) * mean.astype(keep.dtype),
                "var": keep * state["var"] + (1 - keep) * var.astype(keep.dtype),
                "weight": keep * state["weight"] + (1 - keep),
            }
            return _padded(given, real, y.astype(x.dtype)), state
        seen = state["weight"] > 0
        weight = jnp.where(seen, state["weight"], 1)
        mean = (state["mean"] / weight).astype(wide.dtype)
        var = jnp.where(seen, state["var"] / weight, 1 - eps).astype(wide.dtype)
        y = (wide - mean) * jax.lax.rsqrt(var + eps)
        return _padded(given, real, _scaled(y, params.get("scale"), params.get("bias"), x.dtype)), state

    return Layer(init, apply)


def layer_norm(*, eps: float = 1e-6, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise every example over its units: y = scale·(x - mean)/sqrt(var + eps) + bias, over the last axis.

    Source: Ba et al. 2016.
    """
    check.at_least_zero("layer_norm", eps=eps)

    def normalise(x):
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)

    return positionwise(_per_example("layer_norm", normalise, scale, bias))


def rms_norm(*, eps: float = 1e-6, scale: bool = True) -> Layer:
    """Divide every example by its root mean square: y = scale·x/sqrt(mean(x²) + eps), over the last axis.

    Source: Zhang and Sennrich 2019.
    """
    check.at_least_zero("rms_norm", eps=eps)

    def normalise(x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)

    return positionwise(_per_example("rms_norm", normalise, scale, False))


def group_norm(groups: int, *, eps: float = 1e-6, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise every example over groups of units and all positions: y = scale·(x - mean)/sqrt(var + eps) + bias.

    x: float[batch, ..., d], d divisible by `groups`; group g holds units g·d/groups up to (g + 1)·d/groups.
    Errors: ValueError if d is not divisible. Source: Wu and He 2018.
    """
    check.positive("group_norm", groups=groups)
    check.at_least_zero("group_norm", eps=eps)

    def normalise(x):
        if x.shape[-1] % groups:
            raise ValueError(f"group_norm: {groups} groups must divide the units, got {check.describe(x)}")
        parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
        centred = parts - jnp.mean(parts, axis=(1, 3), keepdims=True)
        var = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True)
        return (centred * jax.lax.rsqrt(var + eps)).reshape(x.shape)

    return _per_example("group_norm", normalise, scale, bias)


def _per_example(who: str, normalise: Callable[[jax.Array], jax.Array], scale: bool, bias: bool) -> Layer:
    def init(key, spec):
        _units(who, spec)
        return _affine(spec.shape[-1], statistics_dtype(spec.dtype), scale, bias)

    def apply(params, x):
        _units(who, x)
        for leaf in jax.tree.leaves(params):
            _width(who, leaf.shape[0], x)
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
    """Return the mask, to be broadcast over units, and the count of real positions, over the mapped axis too."""
    count = jnp.sum(mask)
    return mask[..., None], mapped.reduce(jax.lax.psum, count, axis_name)


def _padded(given: Any, real: Any, y: jax.Array) -> Any:
    return y if real is None else like(given, jnp.where(real[0], y, 0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _standardised(x: Any, scale: Any, bias: Any, real: Any, eps: float, over: tuple[int, ...], axis_name: Any) -> Any:
    """Return (scale·xhat + bias, mean, var), xhat = (x - mean)/sqrt(var + eps).

    The derivative of xhat is written out, `root·(t - E[t] - xhat E[xhat t])`: autodiff would also send a cotangent
    through the mean inside the variance, which is zero. Forward and reverse mode both follow from it. `real` is None or
    the mask and count of real positions, to which E is then confined.
    """
    return _standardise(x, scale, bias, real, eps, over, axis_name)[0]


def _standardise(x, scale, bias, real, eps, over, axis_name):
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
    # The factor first, and signs on the averages: so the sums over the batch going back are, to the letter, those of
    # the gradients of bias and scale, and XLA takes them once.
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


def _units(who: str, x: Any) -> None:
    if not hasattr(x, "shape") or len(x.shape) < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{who}: the input must be float[batch, ..., d], got {check.describe(x)}")


def _width(who: str, d: int, x: Any) -> None:
    _units(who, x)
    if x.shape[-1] != d:
        raise ValueError(
            f"{who}: the input's last axis must be {d}, as at init, expected {x.dtype}[batch, ..., {d}], "
            f"got {check.describe(x)}"
        )
