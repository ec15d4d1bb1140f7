"""`loss_scaled`: training in float16, whose gradients underflow unless the loss is scaled up before the backward pass."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fnn import check
from fnn.tree import PyTree, statistics_dtype

LARGEST = 2.0**24
"""The scale grows no further, as in NVIDIA's Apex: a run without gradients would take it to infinity, from where none comes back."""


class LossScaleState(NamedTuple):
    """State of `loss_scaled`: that of the optimiser, the scale float32[], and the finite steps since it changed."""

    inner: PyTree
    scale: jax.Array
    steps: jax.Array


def loss_scaled(
    transformation: optax.GradientTransformation, initial: float = 2.0**15, period: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """Scale the loss by a power of two that follows what float16 can hold; skip steps whose gradient is not finite.

    `train_step` multiplies the loss by the scale before the backward pass, and divides the gradient by it in its own
    dtype: metrics, clips and the optimiser see the gradient itself. A gradient that is not finite halves the scale (down to
    1), changes no parameter, no statistic and not the optimiser's own state; after `period` finite steps in a row the scale doubles,
    up to 2^24 (or `initial`).
    For `train_step(..., compute_dtype=jnp.float16)`; in float32 it changes nothing. `scale_of(state.opt_state)` is the
    scale. Source: Micikevicius et al. 2018, section 3.2.
    """
    if not isinstance(initial, int | float) or initial < 1 or math.frexp(initial)[0] != 0.5:
        raise ValueError(f"optimizers.loss_scaled: initial must be a power of two, at least 1, got {initial!r}")
    check.positive("optimizers.loss_scaled", period=period)
    inner = optax.with_extra_args_support(transformation)

    def init(params):
        return LossScaleState(inner.init(params), jnp.asarray(initial, jnp.float32), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        finite = jnp.array(True)
        for g in jax.tree.leaves(updates):
            finite = finite & jnp.all(jnp.isfinite(g))
        new, own = inner.update(updates, state.inner, params, **extra)
        new = jax.tree.map(lambda u: jnp.where(finite, u, 0).astype(u.dtype), new)
        own = jax.tree.map(lambda a, b: jnp.where(finite, a, b), own, state.inner)
        steps = jnp.where(finite, state.steps + 1, 0)
        grown = jnp.where(steps == period, jnp.minimum(2 * state.scale, max(LARGEST, initial)), state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale / 2, 1))
        return new, LossScaleState(own, scale, jnp.where(steps == period, 0, steps))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_of(opt_state: PyTree) -> jax.Array | None:
    """Return the scale of the loss that an optimiser's state asks for, float32[]; None if it asks for none.

    Errors: ValueError for several.
    """
    found = [node.scale for node in _nodes(opt_state, LossScaleState)]
    if len(found) > 1:
        raise ValueError(
            f"optimizers.loss_scaled: an optimiser must hold one of it, got {len(found)}; put it around all the others"
        )
    return found[0] if found else None


def asked_scale(opt_state: PyTree, per_example: str | None) -> jax.Array | None:
    """Return the scale for a step; refuse one that its gradients of single examples, or its `MultiSteps`, cannot have."""
    _check_accumulation(opt_state)
    scale = scale_of(opt_state)
    if scale is not None and per_example is not None:
        raise ValueError(
            f"train_step: per_example must be None with optimizers.loss_scaled, got {per_example!r}; compute in bfloat16, "
            "which needs no scale"
        )
    return scale


def _check_accumulation(opt_state: PyTree) -> None:
    """Refuse what skips bad gradients inside of `MultiSteps`, whose sum keeps them: it empties it by a product with 0."""
    for outer in _nodes(opt_state, optax.MultiStepsState):
        skips = {"loss_scaled": LossScaleState} | (
            {} if outer.skip_state else {"apply_if_finite": optax.ApplyIfFiniteState}
        )
        for name, kind in skips.items():
            if _nodes(outer.inner_opt_state, kind):
                raise ValueError(
                    f"train_step: {name} must be around optax.MultiSteps, got it inside: its sum of gradients would stay NaN "
                    f"after the first that is not finite; write {name}(MultiSteps(...).gradient_transformation(), ...)"
                )


def _nodes(state: PyTree, kind: type) -> list[Any]:
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def scaled(objective: Callable[..., Any], scale: jax.Array | None) -> Callable[..., Any]:
    """Multiply the value of a function (value, rest) by a scale."""
    if scale is None:
        return objective

    def run(*args):
        value, rest = objective(*args)
        return value * scale.astype(value.dtype), rest

    return run


def unscaled(grads: Any, scale: jax.Array | None) -> Any:
    """Divide gradients by a scale."""
    if scale is None:
        return grads
    return jax.tree.map(lambda g: (g.astype(statistics_dtype(g.dtype)) / scale).astype(g.dtype), grads)
