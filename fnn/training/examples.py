"""A train step's gradients, made of the gradients of single examples: their norms, noise, and clipping before the mean."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check, mapped, measures, tree
from fnn.core import Layer
from fnn.gradients.example_gradients import Estimates, estimate, total
from fnn.gradients.per_example import batch_size, per_example


def check_step(per_example: Any, max_norm: Any, skip_nonfinite: bool) -> None:
    """Refuse options of a train step that do not go together."""
    if skip_nonfinite and per_example != "clip":
        raise ValueError(
            f"train_step: skip_nonfinite belongs to per_example='clip', got per_example={per_example!r}; pass both"
        )
    if per_example is not None:
        check.choice("train_step", ("norms", "clip"), per_example=per_example)
    if (per_example == "clip") != (max_norm is not None):
        raise ValueError(
            f"train_step: max_norm belongs to per_example='clip', got per_example={per_example!r} and "
            f"max_norm={max_norm!r}; pass both or neither"
        )
    if max_norm is not None:
        check.above_zero("train_step", max_norm=max_norm)


def step_gradients(
    net: Layer,
    loss: Callable[[Any, Any], Any],
    batch: tuple[Any, Any],
    *,
    key: Any,
    axis_name: Any,
    max_norm: Any,
    skip_nonfinite: bool,
    per_layer: bool,
) -> Callable[..., tuple[Any, Any, tuple[dict[str, Any], Any], dict[str, Any]]]:
    """Make `(params, state) -> (gradient, new state, (mean losses, outputs), of examples)`, from single examples' gradients.

    An example's gradient is that of its own share, w l / mean(w) or sum / mean(count), so that their mean is the step's
    gradient. The keywords are those of `train_step` that matter here, hence eight. With a state of None
    `params` is a pair (params, state), and both are differentiated; norms and clips are those of params.
    """
    outer = mapped.names(axis_name)
    # In this order an example has the same number, and so the same dropout mask, on one device and on many.
    every_axis = (*outer, "examples") if outer else "examples"

    def average(a):
        return mapped.mean(a, outer)

    def counted(holds):
        count = jnp.sum(holds, dtype=jnp.float32)
        return mapped.reduce(jax.lax.psum, count, outer)

    def of_example(diff, example, state):
        params, state = (diff, state) if state is not None else diff
        (x, y), number = jax.tree.map(lambda a: a[None], example[0]), example[1]
        axes = mapped.lanes(every_axis, number)
        with check.foreign("train_step"):
            outputs, new = net.apply(params, state, x, key=key, train=True, axis_name=axes)
            shares = measures.shares("train_step", loss, outputs, y, axes)
        return shares["loss"], (new, shares, outputs)

    def gradients(diff, state):
        function = functools.partial(of_example, state=state)
        numbers = jnp.arange(batch_size(batch)) if mapped.checked() else None
        every, (new, values, outputs) = per_example(function, has_aux=True, axis_name="examples")(
            diff, (batch, numbers)
        )
        n = every.batch * mapped.size(outer)
        if n == 1 and max_norm is None:
            raise ValueError(
                "train_step: per_example='norms' estimates noise from at least two examples, got a batch of one; use a "
                "larger batch, or fnn.per_example(...)(params, batch).norms()"
            )
        own = every if state is not None else every[0]
        news = None if state is not None else average(every[1].mean())
        new = jax.tree.map(lambda a: a[0], new)  # averaged over the axis by the net, and so the same for all
        values = jax.tree.map(lambda a: average(jnp.mean(a)), values)
        outputs = jax.tree.map(lambda a: a[:, 0] if a.ndim > 1 else jnp.mean(a), outputs)  # those of one example each
        norms, mean = own.norms(), average(own._mean())
        each = own.norms(per_leaf=True)
        pairs = zip(*map(jax.tree.leaves, (each, tree.norms(mean))), strict=True)
        estimates = [estimate(norms, m, n, outer) for norms, m in pairs]
        layers = Estimates(*(jax.tree.unflatten(jax.tree.structure(mean), p) for p in zip(*estimates, strict=True)))
        whole = total(layers)
        sums = whole.moments()
        found = {
            "per_example_norms": norms,
            "per_example_quantiles": jnp.quantile(_of_all(norms, outer), jnp.linspace(0, 1, 5)),
            "noise_trace": sums.trace,
            "noise_signal": sums.signal,
            "signal_to_noise": whole.ratio(),
            "examples_nonfinite": counted(~jnp.isfinite(norms)),
            "examples_zero": counted(norms == 0),
        }
        if per_layer:
            sums = layers.moments()
            found |= {"per_example_norms_by_layer": each, "noise_traces": sums.trace, "noise_signals": sums.signal}
        if max_norm is not None:
            clipped = own._clipped(max_norm, False, skip_nonfinite)
            kept = own._kept(jnp.isfinite(norms)) if skip_nonfinite else own
            unclipped, mean = average(kept._mean()), average(clipped.mean)
            bias = tree.norm(jax.tree.map(jnp.subtract, mean, unclipped))
            found |= {"examples_clipped": average(clipped.fraction), "clip_bias": bias}
            found["examples_nonfinite"] = counted(clipped.nonfinite)
        mean = own._cast(mean)
        return (mean if news is None else (mean, news)), new, (values, outputs), found

    return gradients


def _of_all(a: jax.Array, outer: tuple[Any, ...]) -> jax.Array:
    """Gather the numbers of all devices, the same on each: as a sum, since `all_gather` leaves the type of a varying one."""
    for name in outer:
        mine = jnp.arange(jax.lax.axis_size(name)) == jax.lax.axis_index(name)
        a = mapped.reduce(jax.lax.psum, jnp.where(mine[:, None], a, 0), name).reshape(-1)
    return a
