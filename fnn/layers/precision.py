"""The dtype in which a net computes: `compute_in`, used by training, evaluation and every measurement."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fnn import tree
from fnn.core import Layer, as_arrays


def compute_in(net: Layer, dtype: jax.typing.DTypeLike | None) -> Layer:
    """Make a net compute in another floating dtype: `compute_in(net, jnp.bfloat16)`; None returns the net as it is.

    Parameters, gradients and state keep their dtypes, so that optimisers, checkpoints and a `TrainState` see the same
    net. Floating inputs are cast, and so are kernels and embeddings, so that nets that start from tokens compute in that
    dtype too. Each layer casts its vectors (biases, scales of norms) itself. Statistics are in at least float32, and so is
    the output, which is what a loss gets.

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

    return Layer(net.init, apply, f"compute_in({net!r}, {dtype})")
