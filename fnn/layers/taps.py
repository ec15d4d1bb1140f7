"""Taps: layers that are the identity on their input and report what passes, forward and backward.

State carries news forward: the new state that a tap returns holds statistics of its input. The state's cotangent
carries news back: the gradient of the loss with respect to the *old* state holds statistics of the error signal dL/dh.
Parameters, optimiser and the signature of `apply` know nothing of it, and inside `repeat` both have a leading depth axis.

`gradient_flow` runs the backward pass with a power of two beside every array (`gradients/exact`). There a tap hands back
the plain mean of squares (`exact`), which holds at any depth; a train step, whose squares would leave the range, keeps
the statistics of `Backward`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, mapped, tree
from fnn.core import Layer, as_arrays, as_spec
from fnn.description import described
from fnn.layers.inputs import like, parts
from fnn.tree import PyTree, statistics_dtype

PREACTIVATION, ACTIVATION, SUM = "preactivation", "activation", "sum"
"""Roles of taps: after a layer's weights, after an activation, after a residual sum."""
STATISTICS = ("mean", "second_moment", "peak", "dead", "saturated")
"""What a tap records on the way forward; the last one only with `bounds`. Studies have a row for each."""


class Backward(NamedTuple):
    """What the cotangent of a tap's state holds; all float[], and added up if a tap is used several times."""

    small: jax.Array
    """Mean over examples of (2^60 |d l_i/dh|)², summed over uses; for error signals below 1, larger ones count as 8."""
    large: jax.Array
    """Mean over examples of (2^-60 |d l_i/dh|)², summed over uses; for error signals from 1 on."""
    log: jax.Array
    """Natural log of the root mean over examples of |d l_i/dh|, as it arrived: -inf for a zero cotangent. Not additive:
    it holds for a tap that is used once."""
    square: jax.Array
    """Mean over examples of |d l_i/dh|², summed over uses; 0 unless `exact` is on, and then the only one that counts."""
    uses: jax.Array
    """How often the tap was passed on the way back."""


@flax.struct.dataclass
class TapState:
    """State of a tap: `forward` statistics by name, and zeros in the place where `backward` statistics will arrive."""

    forward: dict[str, jax.Array]
    backward: Backward
    exact: bool = flax.struct.field(pytree_node=False, default=False)
    role: str = flax.struct.field(pytree_node=False, default="")

    short_repr = True

    def __repr__(self) -> str:
        one = check.describe(self.forward.get("mean"))
        return f"TapState({', '.join(self.forward)}: each {one}, role={self.role!r})"


@described
def tap(*, bounds: tuple[float, float] | None = None, role: str = "") -> Layer:
    """Return x unchanged (0 at padded positions) and report its statistics; the module's text says how.

    Forward, over batch and units, float[]: `mean`; `second_moment` E[x²]; `peak`, the largest |x|, which stays in range
    where squares do not; `dead`, the fraction of units that are zero for the whole batch; with `bounds` (the asymptotes of
    an activation, both finite) `saturated`, the fraction of numbers within 1 % of their distance to one of them. With
    `axis_name` all are taken over the whole mapped axis, so that the state is unbatched. Of a `Masked` sequence only real
    positions count (`dead` counts a unit at each position that is real in at least one example). Without any, all are 0,
    as of an input of length 0.

    Backward: see `Backward`. The loss must be the mean of per-example losses over the batch of `x` (with `axis_name`:
    over the local batch, and gradients are averaged over the axis afterwards). Padded positions add nothing: no layer
    lets them reach the loss, so their cotangents are zero.

    `role` says what the tap looks at. Rows and tables carry it; the nets of `models` use `PREACTIVATION`, `ACTIVATION`
    and `SUM`, and mean-field theory is compared with the error signals at `PREACTIVATION`.
    """
    traced = any(isinstance(end, jax.Array) for end in bounds or ())  # those of `activations.chosen`
    if bounds is not None and not traced and not (np.all(np.isfinite(bounds)) and bounds[0] < bounds[1]):
        raise ValueError(f"tap: bounds must be finite and (low, high), got {bounds}; leave them out for open functions")

    def init(key, spec):
        values, _ = parts("tap", as_spec(spec))
        zero = jnp.zeros((), statistics_dtype(values.dtype))
        names = STATISTICS if bounds else STATISTICS[:-1]
        return (), TapState(dict.fromkeys(names, zero), Backward(*[zero] * len(Backward._fields)), role=role)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        values, mask = parts("tap", x)
        y, dtype = _pass(state.exact, axis_name, values, state.backward), state.backward.log.dtype
        forward = _forward(jax.lax.stop_gradient(values), mask, bounds, axis_name)
        return like(x, y), dataclasses.replace(state, forward=jax.tree.map(lambda a: a.astype(dtype), forward))

    return Layer(init, apply)


def _forward(
    x: jax.Array, mask: Any, bounds: tuple[float, float] | None, axis_name: mapped.AxisName
) -> dict[str, jax.Array]:
    wide = x.astype(statistics_dtype(x.dtype))
    dead = jnp.all(x == 0, axis=0).astype(wide.dtype)
    each = {"mean": wide, "second_moment": jnp.square(wide)}
    if bounds is not None:
        margin = 0.01 * (bounds[1] - bounds[0])
        outside = (wide < bounds[0] + margin) | (wide > bounds[1] - margin)
        each["saturated"] = outside.astype(wide.dtype)
    if mask is not None:
        return _masked(x, mask, each, axis_name)
    if not x.size:
        return dict.fromkeys((*each, "peak", "dead"), jnp.zeros((), wide.dtype))
    means, peak = {name: jnp.mean(a) for name, a in each.items()}, _peak(wide)
    if axis_name is not None:
        means, dead = mapped.mean(means, axis_name), mapped.reduce(jax.lax.pmin, dead, axis_name)
        peak = mapped.reduce(jax.lax.pmax, peak, axis_name)
    return means | {"peak": peak, "dead": jnp.mean(dead)}


def _masked(
    x: jax.Array, mask: jax.Array, each: dict[str, jax.Array], axis_name: mapped.AxisName
) -> dict[str, jax.Array]:
    """Average over real positions alone."""
    real = mask.reshape(mask.shape + (1,) * (x.ndim - 2))
    sums = {name: jnp.sum(jnp.where(real, a, 0)) for name, a in each.items()}
    dtype, units = sums["mean"].dtype, max(1, math.prod(x.shape[2:]))
    count, idle, seen = jnp.sum(mask), jnp.all((x == 0) | ~real, axis=0), jnp.any(real, axis=0)
    idle, seen, peak = idle.astype(dtype), seen.astype(dtype), _peak(jnp.where(real, each["mean"], 0))
    if axis_name is not None:
        sums, count = mapped.reduce(jax.lax.psum, (sums, count), axis_name)
        idle, (seen, peak) = (
            mapped.reduce(jax.lax.pmin, idle, axis_name),
            mapped.reduce(jax.lax.pmax, (seen, peak), axis_name),
        )
    sums["dead"] = jnp.sum(idle * seen)
    counts = dict.fromkeys(sums, count.astype(dtype)) | {"dead": jnp.sum(seen)}
    return {name: total / (units * jnp.maximum(1, counts[name])) for name, total in sums.items()} | {"peak": peak}


def _peak(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pass(exact: bool, axis_name: mapped.AxisName, x: jax.Array, backward: Backward) -> jax.Array:
    return x


def _pass_forward(exact, axis_name, x, backward):
    return x, backward


def _pass_backward(exact, axis_name, backward, cotangent):
    news = _square(axis_name, cotangent) if exact else _statistics(axis_name, cotangent)
    if own := mapped.over(news) - mapped.over(backward):
        raise ValueError(
            f"tap: on a sharded batch its state's gradient is a mean over devices, got axis_name={axis_name!r} and an "
            f"error signal that varies over {sorted(map(str, own))}; pass axis_name to apply"
        )
    return cotangent, mapped.varying(jax.tree.map(lambda n, b: n.astype(b.dtype), news, backward), like=backward)


_pass.defvjp(_pass_forward, _pass_backward)


def _square(axis_name: mapped.AxisName, cotangent: jax.Array) -> Backward:
    wide = cotangent.astype(statistics_dtype(cotangent.dtype))
    square = cotangent.shape[0] * jnp.sum(jnp.square(wide))
    if axis_name is not None:
        square = mapped.mean(square, axis_name)
    zero = jnp.zeros_like(square)
    return Backward(zero, zero, zero, square, zero + 1)


def _statistics(axis_name: mapped.AxisName, cotangent: jax.Array) -> Backward:
    # The loss is a mean over the batch, so that d l_i/dh is the batch size times example i's share of the cotangent.
    batch = cotangent.shape[0]
    log = tree.log_norm(cotangent) + 0.5 * jnp.log(batch)
    size = tree.length(cotangent) * batch**0.5
    # With a barrier, or XLA would make size² times a constant of them.
    scaled = jax.lax.optimization_barrier((2.0**60 * jnp.minimum(size, 8), 2.0**-60 * size))
    small, large = map(jnp.square, scaled)
    if axis_name is not None:
        try:
            small, large = mapped.mean((small, large), axis_name)
        except NameError:  # JAX runs this rule outside of the map
            raise ValueError(
                f"tap: the gradient must be taken inside the function that is mapped over {axis_name!r} (vmap(grad(f)), "
                "not grad(vmap(f))), for the tap averages over that axis; or build the net without taps"
            ) from None
        peak = mapped.reduce(jax.lax.pmax, log, axis_name)
        usable = jnp.isfinite(peak)
        mean = mapped.mean(jnp.exp(2 * jnp.where(usable, log - peak, 0)), axis_name)
        log = jnp.where(usable, peak + 0.5 * jnp.log(mean), peak)
    return Backward(small, large, log, jnp.zeros_like(log), jnp.ones_like(log))


def exact(state: PyTree) -> PyTree:
    """Let every tap of a net hand back `Backward.square` alone, for a backward pass with exponents."""
    return put(state, [dataclasses.replace(tap, exact=True) for _, tap in listed(state)])


def listed(state: PyTree) -> list[tuple[jax.tree_util.KeyPath, TapState]]:
    """List (key path, state) of every tap in the order of the state's leaves, those of a stack as one."""
    every = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_tap)
    return [(keys, node) for keys, node in every if _is_tap(node)]


def put(state: PyTree, new: Sequence[TapState]) -> PyTree:
    """Replace the taps of a state, in the order of `listed`."""
    rest = iter(new)
    return jax.tree.map(lambda node: next(rest) if _is_tap(node) else node, state, is_leaf=_is_tap)


def _is_tap(node: Any) -> bool:
    return isinstance(node, TapState)


class Row(NamedTuple):
    """One measured number of one layer."""

    layer: int
    """Counted from the input, 1 being the first."""
    path: str
    quantity: str
    value: float
    role: str = ""
    """Of the tap: see `tap`."""


def read(state: PyTree, state_gradients: PyTree) -> list[Row]:
    """Turn a new state, and the gradient of the loss with respect to the old one, into labelled rows.

    Rows come in forward order: the forward statistics of every tap (`mean`, `second_moment`, `peak`, ...), then
    `log10_error`, log10 of the root mean square over examples of |d l_i/dh|, as it arrived at the tap. `layer`
    counts taps here. A tap used k times reports the root of the summed squares; one that the loss does not reach reports
    -inf.
    """
    rows = []
    news = zip(find(jax.device_get(state)), find(jax.device_get(state_gradients)), strict=True)
    for number, ((path, new), (_, old)) in enumerate(news, 1):
        values = new.forward | {"log10_error": log10_error(old.backward)}
        rows += [Row(number, path, name, float(value), new.role) for name, value in values.items()]
    return rows


def find(state: PyTree) -> list[tuple[str, TapState]]:
    """List (path, state) of every tap in forward order, depth axes written out."""
    every = tree.rows(state, is_leaf=lambda node: isinstance(node, TapState))
    return [(path, node) for path, node in every if isinstance(node, TapState)]


def log10_error(backward: Backward) -> np.ndarray:
    """Read log10 of the norm that arrived at a tap, or at many, in float64: float64[...]. Of several uses, the root of the sum."""
    small, large, log = (np.asarray(a, np.float64) for a in (backward.small, backward.large, backward.log))
    with np.errstate(divide="ignore"):  # log 0 = -inf is the right answer
        logs = [0.5 * np.log10(small) - 60 * np.log10(2), 0.5 * np.log10(large) + 60 * np.log10(2)]
    return np.where(np.asarray(backward.uses) == 1, log / np.log(10), np.where(small < 2.0**120, *logs))
