"""In which dtype a net computes: `compute_in`, which training, evaluation and every measurement share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fnn import tree
from fnn.core import Layer, as_arrays


def compute_in(net: Layer, dtype: Any) -> Layer:
    """Let a net compute in another floating dtype: `compute_in(net, jnp.bfloat16)`; None leaves it as it is.

    Parameters, their gradients and state keep the dtypes they have, so that this is the same net for an optimiser, a
    checkpoint or a `TrainState`. Floating inputs are cast, and so are matrices and tables, which makes nets that start
    from token numbers compute in that dtype too; vectors (biases, scales of norms) each layer casts where it needs them.
    Statistics are in at least float32, and so is what comes out: a loss, built in or your own, sees no narrower numbers.

    `train_step`, `evaluate`, `gradient_flow` and `example_loss` do this for their `compute_dtype`. The same net and dtype
    give the same layer, so that nothing compiles twice. Errors: TypeError for a dtype that is not floating.
    """
    if dtype is None:
        return net
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or not jnp.issubdtype(wanted, jnp.floating):
        raise TypeError(f"compute_in: the dtype must be floating, got {dtype!r}; pass jnp.bfloat16")
    return _compute_in(net, wanted)


@functools.lru_cache(maxsize=64)
def _compute_in(net: Layer, dtype: Any) -> Layer:
    wide = tree.statistics_dtype(dtype)

    def cast(a, to=dtype):
        return a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        params = tree.map_depth(lambda k, a: cast(a) if a.ndim - k >= 2 else a, params)
        x = jax.tree.map(cast, as_arrays(x))
        y, state = net.apply(params, state, x, key=key, train=train, axis_name=axis_name)
        return jax.tree.map(lambda a: cast(a, wide), y), state

    return Layer(net.init, apply)
