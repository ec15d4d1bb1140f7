"""Gradient clipping as optax transformations, right on stacked parameters too.

Each keeps a report in the optimiser's state (`ClipState`), from which a train step takes its metrics. Each leaves a zero
gradient zero and lets NaN through, so that a divergence stays visible.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fnn import check, tree
from fnn.training.blocks import paths
from fnn.tree import PyTree


@jax.tree_util.register_static
@dataclass(frozen=True)
class Seen:
    """Paths of the arrays that a clip sees: a mask may hide others."""

    paths: frozenset[str] = frozenset()


class ClipState(NamedTuple):
    """Report on the last step: three float32[], 0 before the first."""

    fraction: jax.Array
    """The share that was clipped: of all numbers, units or blocks; 0 or 1 for the global norm."""
    before: jax.Array
    """Global norm of the gradient before clipping."""
    after: jax.Array
    """Global norm after it; NaN where the clipped gradient holds a NaN."""
    seen: Seen = Seen()


def by_value(limit: ArrayLike) -> optax.GradientTransformation:
    """Clip every number to [-limit, limit]."""
    check.above_zero("clip.by_value", limit=limit)
    return _elementwise(lambda g: jnp.clip(g, -limit, limit))  # pyright: ignore[reportOperatorIssue] # it is no bool


def from_above(limit: ArrayLike) -> optax.GradientTransformation:
    """Clip every number to min(limit, g), as some textbooks print it. Negative gradients are not bounded."""
    check.above_zero("clip.from_above", limit=limit)
    return _elementwise(lambda g: jnp.minimum(g, limit))


def by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    """Scale the whole gradient by min(1, max_norm/|g|), right at any scale.

    Source: Pascanu et al. 2013, algorithm 1.
    """
    check.above_zero("clip.by_global_norm", max_norm=max_norm)

    def clip(updates, params):
        before = tree.norm(updates)
        scale = tree.clip_factor(before, max_norm)
        updates = jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates)
        # inf·0 is NaN: of an infinite gradient nothing finite is left.
        after = jnp.where(before < jnp.inf, jnp.minimum(before, max_norm), jnp.nan)
        return updates, ClipState((before > max_norm).astype(jnp.float32), before, after)

    return _transformation(clip)


def by_block_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    """Scale each block of the gradient by min(1, max_norm/|g_block|); a block is one parameter array of one layer.

    Below `repeat` every depth is a block of its own.
    """
    check.above_zero("clip.by_block_norm", max_norm=max_norm)

    def factor(k, g, _):
        return tree.clip_factor(tree.length(g, tuple(range(k, g.ndim)), keepdims=True), max_norm)

    return _scaling(factor)


def adaptive(clipping: ArrayLike, eps: float = 1e-3) -> optax.GradientTransformation:
    """Scale each unit's gradient by min(1, clipping·max(|W_i|, eps)/|G_i|).

    A unit is one output of a kernel: a column of (in, out), one channel of (..., in, out). Vectors and scalars (biases,
    scales) are one unit as a whole. Equal to `optax.adaptive_grad_clip` for dense kernels on `serial`; needs params.
    Source: Brock et al. 2021, equation 3.
    """
    check.above_zero("clip.adaptive", clipping=clipping, eps=eps)

    def factor(k, g, w):
        axes = tuple(range(k, g.ndim - 1)) if g.ndim - k >= 2 else tuple(range(k, g.ndim))
        limit = clipping * jnp.maximum(tree.length(w, axes, keepdims=True), eps)
        return tree.clip_factor(tree.length(g, axes, keepdims=True), limit)

    return _scaling(factor, needs_params="clip.adaptive")


def reports(opt_state: PyTree) -> list[ClipState]:
    """Find the reports of all of fnn's clips in an optimiser's state, in the order of the chain."""
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_is_report) if _is_report(node)]


def unreported(opt_state: PyTree) -> PyTree:
    """Set the reports in an optimiser's state to NaN, so that after an update those of clips that did not run show it."""
    nan = jnp.full((), jnp.nan, jnp.float32)
    return _with_reports(opt_state, fraction=nan, before=nan, after=nan)


def retold(opt_state: PyTree, params: PyTree) -> PyTree:
    """Let the reports in an optimiser's state name the arrays of `params` as those that were seen."""
    return _with_reports(opt_state, seen=Seen(paths(params)))


def summary(opt_state: PyTree, gradient: PyTree) -> ClipState | None:
    """Join the reports of all clips in an optimiser's state to one report on the whole gradient; None without a clip.

    Of clips in a row, `before` is that of the first and `after` that of the last; if an optimiser between them has changed
    the size, `after` is `before` times what each clip has kept. Clips of parts (`masked`,
    `multi_transform`) and what no clip sees are joined by the root of their summed squares, fractions weighted by the
    numbers in each part. NaN where the clips of parts saw another gradient than this one (an average over several steps):
    then the rest is not known.
    """
    found = reports(opt_state)
    if not found:
        return None
    apart = any(re.search(r"\[\d+\]", path) for report in found for path in report.seen.paths)
    arrays = dict(tree.rows(gradient) if apart else zip(tree.paths(gradient), jax.tree.leaves(gradient), strict=True))

    def norm_of(places):
        return tree.norm([arrays[place] for place in sorted(places)])

    parts: list[tuple[frozenset[str], Any, Any, Any]] = []
    for report in found:
        own, (fraction, before, after) = _places(report.seen, arrays), report[:3]
        if earlier := [part for part in parts if part[0] & own]:
            others = frozenset().union(*(part[0] for part in earlier))
            new, left = norm_of(own - others), jnp.zeros(())
            if others - own:  # what this clip does not see of what earlier ones have clipped
                left = _leg(tree.norm([part[2] for part in earlier]), _leg(before, new))
            else:  # an optimiser between two clips changes the size: what the second keeps counts, in units of the first
                reached = tree.norm([new, *(part[2] for part in earlier)])
                same = (jnp.abs(before - reached) <= 1e-3 * reached) | (before == 0)
                after = jnp.where(same, after, reached * (after / jnp.where(same, 1, before)))
            before, after = tree.norm([new, *(part[1] for part in earlier)]), tree.norm([after, left])
            parts, own = [part for part in parts if part not in earlier], own | others
        parts.append((own, before, after, fraction))
    rest = arrays.keys() - frozenset().union(*(part[0] for part in parts))
    if not rest and len(parts) == 1:
        _, before, after, fraction = parts[0]
        return ClipState(fraction, before, after)
    unseen = norm_of(rest)
    before, after = (tree.norm([unseen, *(part[i] for part in parts)]) for i in (1, 2))
    fraction = sum(part[3] * tree.size([arrays[p] for p in part[0]]) for part in parts) / tree.size(gradient)
    if rest:
        known = jnp.abs(before - tree.norm(gradient)) <= 1e-3 * before
        fraction, before, after = (jnp.where(known, a, jnp.nan) for a in (fraction, before, after))
    return ClipState(fraction, before, after)


def _transformation(clip: Callable[[Any, Any], tuple[Any, ClipState]]) -> optax.GradientTransformation:
    def init(params) -> Any:
        zero = jnp.zeros((), jnp.float32)
        return ClipState(zero, zero, zero, Seen(paths(params)))

    def update(updates, state, params=None) -> Any:
        updates, report = clip(updates, params)
        fraction, before, after = (number.astype(jnp.float32) for number in report[:3])
        return updates, ClipState(fraction, before, after, state.seen)

    return optax.GradientTransformation(init, update)


def _elementwise(function: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    def clip(updates, params):
        clipped = jax.tree.map(lambda g: function(g).astype(g.dtype), updates)  # a traced limit may be wider than g
        changed = jax.tree.map(lambda a, b: jnp.sum((a > b) | (a < b), dtype=jnp.float32), updates, clipped)
        fraction = sum(jax.tree.leaves(changed), start=jnp.zeros((), jnp.float32)) / jnp.maximum(1, tree.count(updates))
        return clipped, ClipState(fraction, tree.norm(updates), tree.norm(clipped))

    return _transformation(clip)


def _scaling(factor: Callable[..., jax.Array], needs_params: str | None = None) -> optax.GradientTransformation:
    """Clip by `factor(k, g, w)`, one number for each unit, broadcast against g; k counts g's depth axes."""

    def clip(updates, params):
        if needs_params and params is None:
            raise ValueError(f"{needs_params}: needs the parameters, got None; call update(grads, state, params)")
        factors = tree.map_depth(factor, updates, updates if params is None else params)
        clipped = jax.tree.map(lambda g, f: (g * f).astype(g.dtype), updates, factors)
        counts = [jnp.sum(f < 1, dtype=jnp.float32) for f in jax.tree.leaves(factors)]
        fraction = sum(counts, start=jnp.zeros((), jnp.float32)) / jnp.maximum(1, tree.count(factors))
        return clipped, ClipState(fraction, tree.norm(updates), tree.norm(clipped))

    return _transformation(clip)


def _with_reports(opt_state: PyTree, **fields: Any) -> PyTree:
    def new(node):
        return node._replace(**fields) if _is_report(node) else node

    return jax.tree.map(new, opt_state, is_leaf=_is_report)


def _is_report(node: Any) -> bool:
    return isinstance(node, ClipState)


def _places(seen: Seen, arrays: dict[str, Any]) -> frozenset[str]:
    """Find the arrays that a clip has seen; all of them where it has seen something else (joined arrays)."""
    found: set[str] = set()
    for path in seen.paths:
        pattern = re.compile(re.escape(path).replace(r"\[:\]", r"\[(:|\d+)\]"))
        places = {place for place in arrays if pattern.fullmatch(place)} if "[:]" in path else {path} & arrays.keys()
        if not places:
            return frozenset(arrays)
        found |= places
    return frozenset(found)


def _leg(hypotenuse: jax.Array, leg: jax.Array) -> jax.Array:
    """sqrt(a² - b²) without a square that leaves the range; 0 where rounding takes b above a."""
    ratio = leg / jnp.where(hypotenuse > 0, hypotenuse, 1)
    return hypotenuse * jnp.sqrt(jnp.maximum(0, (1 - ratio) * (1 + ratio)))
