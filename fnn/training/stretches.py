"""Many training steps in one compiled call: the stretches in which `fit` goes through data in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import compiled, mapped
from fnn.datasets.dataset import Dataset, shuffled

LONGEST = 128
"""Steps of a stretch, at most. A shorter one would cost small nets time, and Ctrl-C waits for the end of one."""


def over_data(pure: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `((state, order), data, key, at, batch_size, most) -> ((state, order), (metrics, finite))`: some steps.

    `at` = (start, count, fresh), int32[3]: the steps start, ..., start + count - 1 of the epoch whose examples `key`
    shuffles. `order: int32[n]` is that shuffle: drawn if `fresh`, else the one returned before. Metrics have a leading
    axis of `most` steps, of which the first `count` are filled; `finite` says whether the parameters are in the end. One
    program serves every count, so that no number depends on where an epoch is cut. State and order are donated.
    """
    step = jax.jit(pure, inline=True)  # traced once, though both its shapes and its program are asked for

    def run(carry, data: Dataset, key, at, batch_size: int, most: int):
        n = data.size

        def stretch(carry, data, key, at):
            state, order = carry
            start, count, fresh = at
            order = jax.lax.cond(fresh > 0, lambda: shuffled(key, n).astype(jnp.int32), lambda: order)

            def batch(i):
                index = jax.lax.dynamic_slice_in_dim(order, (start + i) * batch_size, batch_size)
                return jax.tree.map(lambda a: a[index], tuple(data))

            def advance(i, held):
                state, kept = held
                state, metrics = step(state, batch(i))
                put = jax.lax.dynamic_update_index_in_dim
                return state, jax.tree.map(lambda rows, row: put(rows, row, i, 0), kept, metrics)

            _, metrics = jax.eval_shape(step, state, jax.eval_shape(batch, count))
            empty = jax.tree.map(lambda a: jnp.zeros((most, *a.shape), a.dtype), metrics)
            state, kept = jax.lax.fori_loop(0, count, advance, (state, empty))
            return (state, order), (kept, finite(state.params))

        return mapped.auto(stretch, keep=True)(carry, data, key, at)

    return jax.jit(run, donate_argnums=0, static_argnums=(4, 5))


def finite(params: Any) -> jax.Array:
    """Say whether all parameters are finite: bool[]."""
    leaves = [jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


jitted_finite = compiled.limited(mapped.auto(finite))
