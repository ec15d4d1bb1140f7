"""How an optimiser's steps answer to the gradient: a clip that stops them, a large ε that makes them shrink, a schedule's end.

An optax transformation does not show its settings. But its steps do: they are measured for gradients of many sizes. Below a
clip they grow in proportion to the gradient, beyond it not at all. Adam's kind, which divide by the gradient's own size, give
steps of one size beyond their ε, and below it steps in proportion to the gradient. With the same gradient again and again
they show how the rate goes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import admission, tree

SCALES = 2.0 ** np.arange(-30, 31, 5)
"""The gradients that are tried have entries of about so much."""
STEPS = 4
"""So many steps are added up: the first one of a warm-up is zero, as are most of those that accumulate gradients."""
SHARP = 0.02
"""A clip's bend is sharp: steps are those of a straight line, or the limit, to this share. ε makes one that is rounder."""
USUAL = 1e-5
"""An ε up to this is that of an optimiser as it is sold."""
OVER = 1e-3
"""A schedule has ended where steps stay below this share of the largest one."""
MOST = 3e8
"""Steps times entries of the parameters up to which the course of the steps is measured."""
FREE = 2.0**-20
"""Without its clip an optimiser is given gradients so small that one of 2^20 limits still passes."""


class Response(NamedTuple):
    """What bounds the steps of an optimiser."""

    limit: float = math.inf
    """Gradients beyond this norm, or with entries beyond this, are clipped."""
    entries: bool = False
    """Whether it is a limit of entries, not of the norm."""
    eps: float = 0.0
    """For gradients with entries far below it steps are in proportion to the gradient, beyond it they are not."""
    size: int = 0
    """How many entries a gradient has."""
    uphill: bool = False
    """Whether steps go along the gradient, not against it."""
    ends: int | None = None
    """The step from which on steps are next to nothing, if there is one in the first half of the training."""
    counts: tuple[int, ...] = ()
    """Which leaves of the optimiser's state count its steps."""

    @property
    def norm(self) -> float:
        """Give the norm of a gradient of equal entries at which the clip begins."""
        return self.limit * math.sqrt(self.size) if self.entries else self.limit

    @property
    def unclipped(self) -> float:
        """Give the factor for gradients, parameters and steps (these divided by it) that leaves out the clip: a power of two."""
        return min(1.0, 2.0 ** math.floor(math.log2(self.limit)) * FREE)

    @property
    def sensitive(self) -> float:
        """Give the factor for gradients that has the effect of an ε of 1e-8: a power of two."""
        return 2.0 ** math.ceil(math.log2(self.eps / 1e-8))


BOUNDLESS = Response()
"""Of an optimiser whose steps nothing bounds, or of which this could not be measured."""


def counted(state: Any, counts: tuple[int, ...], step: jax.Array) -> Any:
    """Let a state say that this is another step."""
    leaves, structure = jax.tree.flatten(state)
    return structure.unflatten([step.astype(a.dtype) if i in counts else a for i, a in enumerate(leaves)])


def prepared(tx: optax.GradientTransformationExtraArgs, params: Any, steps: int) -> Callable[[], Response]:
    """Trace an optimiser on parameters of these shapes; the function that is returned measures its response.

    Gradients are from N(0, scale²), `SCALES` one by one. Those below one are given with parameters that are as small, so that
    weight decay keeps its share. What weight decay adds by itself is subtracted. An optimiser that takes the loss again, or
    bends otherwise, has no response, nor has one of parameters in float16, which holds no such range.
    """
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), params)
    if any(a.dtype == jnp.float16 for a in jax.tree.leaves(params)):
        return lambda: BOUNDLESS
    leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient)]
    size, length = sum(g.size for g in leaves), math.hypot(*map(np.linalg.norm, leaves))
    largest = max((float(np.abs(g).max(initial=0)) for g in leaves), default=0.0)
    some = steps if steps * size <= MOST else 0

    def measured(params, gradient):
        return _sizes(tx, params, gradient), _course(tx, params, gradient, some)

    try:
        lowered = jax.jit(measured).lower(params, gradient)
    except (TypeError, ValueError):
        return lambda: BOUNDLESS

    def found() -> Response:
        sizes, course = jax.device_get(lowered.compile()(params, gradient))
        bounds = _read(np.asarray(sizes, np.float64), size, length, largest)
        return bounds._replace(**_read_course(sizes[SCALES == 1, 2], *course))

    return found


def _read_course(along: np.ndarray, norms: np.ndarray, numbers: np.ndarray) -> dict[str, Any]:
    """Read from the first steps where they go, from all norms of steps where they end, and from the last state who counts."""
    said = {"uphill": bool((along > 0).all())}
    if not len(norms) or not np.isfinite(norms).all():
        return said
    ended = int(np.max(np.flatnonzero(norms > OVER * norms.max()), initial=-1)) + 1
    counts = tuple(map(int, np.flatnonzero(numbers == len(norms))))
    return said | ({"ends": ended, "counts": counts} if 0 < ended <= len(norms) // 2 else {})


def _read(sizes: np.ndarray, size: int, length: float, entry: float) -> Response:
    """Read the bounds from what each scale gave, for a gradient of so many entries, of that norm and that largest entry."""
    sizes = sizes[:, :2]
    if not np.isfinite(sizes).all() or not (sizes > 0).all():
        return BOUNDLESS
    norms, largest = sizes.T
    slope = sizes[0] / SCALES[0]
    if not (_close(norms[1], slope[0] * SCALES[1]) and _close(norms[-1], norms[-2])):
        return BOUNDLESS  # no line at first, or no end of it
    if _sharp(norms, slope[0]):
        return Response(float(length * norms[-1] / slope[0]), size=size)
    bend = float(entry * largest[-1] / slope[1])
    if _sharp(largest, slope[1]):
        return Response(bend, entries=True, size=size)
    alike = _close(norms[-1], largest[-1] * math.sqrt(size))  # steps of one size, as Adam's
    return Response(eps=bend, size=size) if alike else BOUNDLESS


def _close(a: float, b: float) -> bool:
    return bool(abs(a - b) <= SHARP * abs(b))


def _sharp(values: np.ndarray, slope: float) -> bool:
    line = np.minimum(slope * SCALES, values[-1])
    return bool(np.max(np.abs(values / line - 1)) < SHARP)


def _sizes(tx: optax.GradientTransformationExtraArgs, params: Any, gradient: Any) -> jax.Array:
    """Of what each scale's gradient adds to the steps: norm, largest entry, product with the gradient. float[scales, 3]."""

    def moved(given: tuple[jax.Array, jax.Array]) -> Any:
        scale, whole = given
        seen = times(params, whole)

        def step(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, total = carry
            updates, state = admission.update("diagnose", tx, times(gradient, scale), state, seen)
            return state, jax.tree.map(lambda a, u: a + u.astype(a.dtype), total, updates)

        none = jax.tree.map(lambda a: jnp.zeros(a.shape, tree.statistics_dtype(a.dtype)), params)
        return jax.lax.fori_loop(0, STEPS, step, (tx.init(seen), none))[1]

    def size(scale: jax.Array) -> jax.Array:
        whole = jnp.minimum(scale, 1)
        both = jax.lax.map(moved, (jnp.stack([scale, jnp.zeros_like(scale)]), jnp.stack([whole, whole])))
        added = jax.tree.map(lambda a: a[0] - a[1], both)
        largest = [jnp.max(jnp.abs(a), initial=0) for a in jax.tree.leaves(added)]
        along = sum(
            jnp.vdot(a, g.astype(a.dtype)) for a, g in zip(*map(jax.tree.leaves, (added, gradient)), strict=True)
        )
        return jnp.stack([tree.norm(added), functools.reduce(jnp.maximum, largest), along])

    return jax.lax.map(size, jnp.asarray(SCALES, jnp.float32))


def _course(
    tx: optax.GradientTransformationExtraArgs, params: Any, gradient: Any, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Give the norm of each step, float[steps], where the gradient stays the same, and each whole number of the last state.

    int[leaves]; -1 for leaves of the state that are no single integer.
    """

    def step(state: Any, _: None) -> tuple[Any, jax.Array]:
        updates, state = admission.update("diagnose", tx, gradient, state, params)
        return state, tree.norm(updates)

    state, norms = jax.lax.scan(step, tx.init(params), None, length=steps)
    whole = [jnp.issubdtype(a.dtype, jnp.integer) and not a.ndim for a in jax.tree.leaves(state)]
    numbers = [a.astype(jnp.int32) if is_one else -1 for a, is_one in zip(jax.tree.leaves(state), whole, strict=True)]
    return norms, jnp.array(numbers, jnp.int32)


def times(tree_: Any, factor: jax.Array) -> Any:
    """Multiply every array of a tree, in its own dtype."""
    return jax.tree.map(lambda a: jnp.asarray(a) * factor.astype(a.dtype), tree_)
