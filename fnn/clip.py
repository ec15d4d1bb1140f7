"""Gradient clipping as optax transformations, each right on stacked parameters too.

All keep their report in the optimiser's state (`ClipState`), from which a train step takes its metrics; all leave a
zero gradient zero and let NaN through, so that a divergence stays visible.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fnn import check, tree


class ClipState(NamedTuple):
    """Report on the last step; all float32[]."""

    fraction: Any
    """Which share was clipped: of all numbers, units or blocks, or 0 or 1 for the global norm."""
    before: Any
    """Global norm of the gradient before clipping."""
    after: Any
    """Global norm after it."""


def by_value(limit: Any) -> optax.GradientTransformation:
    """Clip every number to [-limit, limit]."""
    check.above_zero("clip.by_value", limit=limit)
    return _elementwise(lambda g: jnp.clip(g, -limit, limit))


def from_above(limit: Any) -> optax.GradientTransformation:
    """Clip every number to min(limit, g), one-sided as some textbooks print it: negative gradients stay unbounded."""
    check.above_zero("clip.from_above", limit=limit)
    return _elementwise(lambda g: jnp.minimum(g, limit))


def by_global_norm(max_norm: Any) -> optax.GradientTransformation:
    """Scale the whole gradient by min(1, max_norm/|g|). Right for norms beyond the range of float32's squares too.

    Source: Pascanu et al. 2013, algorithm 1.
    """
    check.above_zero("clip.by_global_norm", max_norm=max_norm)

    def clip(updates, params):
        before = tree.norm(updates)
        scale = max_norm / jnp.maximum(before, max_norm)
        updates = jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates)
        return updates, ClipState((before > max_norm).astype(jnp.float32), before, jnp.minimum(before, max_norm))

    return _transformation(clip)


def by_block_norm(max_norm: Any) -> optax.GradientTransformation:
    """Scale each block of the gradient by min(1, max_norm/|g_block|); a block is one parameter array of one layer.

    Below `repeat` every depth is a block of its own.
    """
    check.above_zero("clip.by_block_norm", max_norm=max_norm)

    def factor(k, g, _):
        norm = _norm(g, tuple(range(k, g.ndim)))
        return max_norm / jnp.maximum(norm, max_norm)

    return _scaling(factor)


def adaptive(clipping: Any, eps: float = 1e-3) -> optax.GradientTransformation:
    """Scale each unit's gradient by min(1, clipping·max(|W_i|, eps)/|G_i|).

    A unit is one output of a kernel: a column of (in, out), one channel of (..., in, out). Vectors and scalars (biases,
    scales) are one unit as a whole. Equal to `optax.adaptive_grad_clip` for dense kernels on `serial`; needs params.
    Source: Brock et al. 2021, equation 3.
    """
    check.above_zero("clip.adaptive", clipping=clipping, eps=eps)

    def factor(k, g, w):
        axes = tuple(range(k, g.ndim - 1)) if g.ndim - k >= 2 else tuple(range(k, g.ndim))
        limit = clipping * jnp.maximum(_norm(w, axes), eps)
        return limit / jnp.maximum(_norm(g, axes), limit)

    return _scaling(factor, needs_params="clip.adaptive")


def reports(opt_state: Any) -> list[ClipState]:
    """Find the reports of all of fnn's clips in an optimiser's state, in the order of the chain."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ClipState))
    return [node for node in nodes if isinstance(node, ClipState)]


def _transformation(clip: Callable[[Any, Any], tuple[Any, ClipState]]) -> optax.GradientTransformation:
    def init(params):
        zero = jnp.zeros((), jnp.float32)
        return ClipState(zero, zero, zero)

    def update(updates, state, params=None):
        updates, report = clip(updates, params)
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), report, state)

    return optax.GradientTransformation(init, update)


def _elementwise(function: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    def clip(updates, params):
        clipped = jax.tree.map(lambda g: function(g).astype(g.dtype), updates)  # a traced limit may be wider than g
        changed = jax.tree.map(lambda a, b: jnp.sum((a > b) | (a < b), dtype=jnp.float32), updates, clipped)
        fraction = sum(jax.tree.leaves(changed), start=jnp.zeros(())) / max(1, tree.size(updates))
        return clipped, ClipState(fraction, tree.norm(updates), tree.norm(clipped))

    return _transformation(clip)


def _scaling(factor: Callable[..., jax.Array], needs_params: str | None = None) -> optax.GradientTransformation:
    """Clip by `factor(k, g, w)`, one number for each unit, broadcast against g; k counts g's depth axes."""

    def clip(updates, params):
        if needs_params and params is None:
            raise ValueError(f"{needs_params}: needs the parameters, got None; call update(grads, state, params)")
        factors = tree.map_depth(factor, updates, updates if params is None else params)
        clipped = jax.tree.map(lambda g, f: (g * f).astype(g.dtype), updates, factors)
        counts = [(jnp.sum(f < 1, dtype=jnp.float32), f.size) for f in jax.tree.leaves(factors)]
        fraction = sum((c for c, _ in counts), start=jnp.zeros(())) / max(1, sum(n for _, n in counts))
        return clipped, ClipState(fraction, tree.norm(updates), tree.norm(clipped))

    return _transformation(clip)


def _norm(a: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Take a norm over some axes, kept with size 1, relative to the largest number: no square leaves the range."""
    wide = a.astype(tree.statistics_dtype(a.dtype))
    peak = tree.divisor(jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0))
    return peak * jnp.sqrt(jnp.sum(jnp.square(wide / peak), axis=axes, keepdims=True))
