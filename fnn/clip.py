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
from fnn.tree import Stacked


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
        norm = tree.length(g, tuple(range(k, g.ndim)), keepdims=True)
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
        limit = clipping * jnp.maximum(tree.length(w, axes, keepdims=True), eps)
        return limit / jnp.maximum(tree.length(g, axes, keepdims=True), limit)

    return _scaling(factor, needs_params="clip.adaptive")


class PerDepthState(NamedTuple):
    """Optimiser states: of everything outside `repeat`, and of every `repeat`, its leaves with a leading depth axis."""

    outside: Any
    stacks: tuple[Any, ...]


def per_depth(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let an optax transformation see every depth of `repeat` as an array of its own, as on `serial`.

    For transformations that treat parameter arrays one by one (LAMB, LARS, adaptive clipping, Adafactor, ...): on bare
    stacked arrays they would take one norm over all depths. Elementwise ones (Adam, SGD) need no wrapping. What looks
    at several arrays at once (global norm) would see one block at a time: leave it outside, as in
    `optax.chain(fnn.clip.by_global_norm(1.0), fnn.per_depth(optax.lamb(1e-3)))`.
    """
    inner = optax.with_extra_args_support(transformation)

    def split(tree):
        nodes, treedef = jax.tree.flatten(tree, is_leaf=_is_stack)
        outside = treedef.unflatten(_Hole() if _is_stack(node) else node for node in nodes)
        return outside, [node.blocks for node in nodes if _is_stack(node)]

    def init(params):
        outside, stacks = split(params)
        return PerDepthState(inner.init(outside), tuple(jax.vmap(per_depth(inner).init)(s) for s in stacks))

    def update(updates, state, params=None, **extra):
        outside, stacks = split(updates)
        outside_params, stack_params = (None, [None] * len(stacks)) if params is None else split(params)
        outside, outside_state = inner.update(outside, state.outside, outside_params, **extra)

        def one_depth(u, s, p):
            return per_depth(inner).update(u, s, p, **extra)

        done = [jax.vmap(one_depth)(*args) for args in zip(stacks, state.stacks, stack_params, strict=True)]
        blocks = iter(done)
        updates = jax.tree.map(
            lambda node: Stacked(next(blocks)[0]) if isinstance(node, _Hole) else node,
            outside,
            is_leaf=lambda node: isinstance(node, _Hole),
        )
        return updates, PerDepthState(outside_state, tuple(s for _, s in done))

    return optax.GradientTransformationExtraArgs(init, update)


def reports(opt_state: Any) -> list[ClipState]:
    """Find the reports of all of fnn's clips in an optimiser's state, in the order of the chain."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ClipState))
    return [node for node in nodes if isinstance(node, ClipState)]


def packed(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let an optax transformation see all small arrays as one vector: the same update from far fewer kernels.

    For transformations that treat every number alike (SGD, Adam, weight decay, `by_value`) or look at all of them at
    once (`by_global_norm`), alone or chained: small nets spend most of a step on starting kernels. What looks at arrays
    one by one (LAMB, `adaptive`, `by_block_norm`, masks) must stay outside. Its state holds packed arrays.
    """
    inner = optax.with_extra_args_support(transformation)

    def init(params):
        return inner.init(tree.pack(jax.tree.leaves(params)))

    def update(updates, state, params=None, **extra):
        leaves, treedef = jax.tree.flatten(updates)

        def pack(node):
            return tree.pack(treedef.flatten_up_to(node)) if jax.tree.structure(node) == treedef else node

        extra = {name: pack(value) for name, value in extra.items()}
        packed_params = None if params is None else pack(params)
        new: Any
        new, state = inner.update(tree.pack(leaves), state, packed_params, **extra)
        return treedef.unflatten(tree.unpack(new, leaves)), state

    return optax.GradientTransformationExtraArgs(init, update)


class _Hole(NamedTuple):
    """An empty node in the place of a stack, while the transformation sees the rest of the tree."""


def _is_stack(node: Any) -> bool:
    return isinstance(node, Stacked) and bool(jax.tree.leaves(node))


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
