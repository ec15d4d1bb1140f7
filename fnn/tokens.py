"""Layers that take token numbers: embeddings, and embeddings tied to the output."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, initializers
from fnn.core import Layer, as_arrays, as_spec, stateless
from fnn.inputs import Masked, check_mask, like, sequence
from fnn.layers import product


def embed(
    vocabulary: int, width: int, *, padding: int | None = None, kernel_init: str | Callable[..., Any] | None = None
) -> Layer:
    """Look up y = E[x]: int[batch, ...] -> float32[batch, ..., width]; params: embedding float32[vocabulary, width].

    With `padding`, tokens of that number are padding: int[batch, time] becomes `Masked` (a mask that comes in is kept
    too). E is drawn from N(0, 1/width), or by `kernel_init`.

    Numbers outside 0..vocabulary-1 are a ValueError where their values can be seen: outside jit, and where data enters
    (`fit`, `evaluate`, the first batch of a `train_step`). Inside jit they give NaN, never another token's vector.
    """
    draw = _table("embed", vocabulary, width, kernel_init)
    if padding is not None and not 0 <= padding < vocabulary:
        raise ValueError(f"embed: padding must lie in 0..{vocabulary - 1}, got {padding!r}")

    def init(key, spec):
        _tokens("embed", spec)
        return {"embedding": draw(key)}

    def apply(params, x):
        return _look_up("embed", params["embedding"], x, padding)

    return stateless(init, apply)


def tied(vocabulary: int, width: int, body: Layer, *, padding: int | None = None) -> Layer:
    """Embed, apply, and read out with the same matrix: y = body(E[x]) Eᵀ: int[batch, time] -> float[batch, time, vocabulary].

    Of several inputs, a dict, each is embedded; the body makes one sequence of them. Params: embedding and the body's.
    Taps inside measure, but do not rescale: E is used on both sides of them. Source: Press and Wolf 2017.
    """
    draw = _table("tied", vocabulary, width, None)

    def init(key, spec):
        spec = as_spec(spec)
        embed_key, body_key = jax.random.split(key)
        embedding = draw(embed_key)
        inner = jax.eval_shape(lambda e, x: _each("tied", e, x, padding), embedding, spec)
        params, state = body.init(body_key, inner)
        return {"embedding": embedding, "body": params}, {"body": state}

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        h = _each("tied", params["embedding"], as_arrays(x), padding)
        h, inner = body.apply(params["body"], state["body"], h, key=key, train=train, axis_name=axis_name)
        values, _ = sequence("tied: the body's output", h)
        return like(h, product(values, params["embedding"].T.astype(values.dtype))), {"body": inner}

    return Layer(init, apply)


def _table(who: str, vocabulary: int, width: int, kernel_init: Any) -> Callable[[Any], jax.Array]:
    check.positive(who, vocabulary=vocabulary, width=width)
    draw = initializers.normal(width**-0.5) if kernel_init is None else initializers.get(kernel_init)
    return lambda key: draw(key, (vocabulary, width), jnp.float32)


def _tokens(who: str, x: Any) -> Any:
    if isinstance(x, Masked):
        check_mask(who, x)
    tokens = x.values if isinstance(x, Masked) else x
    if not hasattr(tokens, "dtype") or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{who}: the input must be token numbers, int[batch, ...], got {check.describe(x)}")
    return tokens


def _each(who: str, embedding: jax.Array, x: Any, padding: int | None) -> Any:
    if isinstance(x, Mapping):
        return {name: _look_up(who, embedding, a, padding) for name, a in x.items()}
    return _look_up(who, embedding, x, padding)


def _look_up(who: str, embedding: jax.Array, x: Any, padding: int | None) -> Any:
    tokens, n = _tokens(who, x), embedding.shape[0]
    try:
        seen = np.asarray(tokens)
    except jax.errors.TracerArrayConversionError:
        seen = np.zeros(0, int)  # traced: no values to see yet
    if seen.size and (seen.min() < 0 or seen.max() >= n):
        raise ValueError(f"{who}: token numbers must lie in 0..{n - 1}, got {seen.min()}..{seen.max()}")
    # `take` counts negative numbers from the end, and fills with NaN what is beyond.
    y = jnp.take(embedding, jnp.where(tokens < 0, n, tokens), axis=0, mode="fill", fill_value=jnp.nan)
    if padding is None:
        return like(x, y)
    if tokens.ndim != 2:
        raise ValueError(f"{who}: padding needs tokens int[batch, time], got {check.describe(x)}")
    real = tokens != padding
    return Masked(y, real & x.mask if isinstance(x, Masked) else real)
