"""Layers that take tokens: embeddings, and embeddings shared with the output."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check
from fnn.core import Layer, as_arrays, as_spec, stateless
from fnn.description import described
from fnn.inside import apply_at
from fnn.layers import initializers
from fnn.layers.dense import product
from fnn.layers.initializers import Initializer
from fnn.layers.inputs import like, sequence
from fnn.masks import Masked, check_mask, cleared, filled
from fnn.tree import statistics_dtype


@described
def embed(
    vocabulary: int, width: int, *, padding: int | None = None, kernel_init: str | Initializer | None = None
) -> Layer:
    """Look up y = E[x]: int[batch, ...] -> float32[batch, ..., width]; params: embedding float32[vocabulary, width].

    With `padding`, that token means padding: int[batch, time] becomes `Masked` (with a mask in the input, both apply). At
    padded positions y is zero whatever the token there, and E gets no gradient. Tokens may have any integer dtype. E is
    drawn from N(0, 1/width), or by `kernel_init`; its gradient is summed in at least float32.

    A token outside 0..vocabulary-1 is a ValueError wherever its value can be seen: outside jit, and where data enters
    (`fit`, `evaluate`, the first batch of a `train_step`). Inside jit, y and the gradient are NaN, never those of another
    token.
    """
    draw = _table("embed", vocabulary, width, padding, kernel_init)

    def init(key, spec):
        _tokens("embed", spec)
        return {"embedding": draw(key)}

    def apply(params, x):
        return _look_up("embed", params["embedding"], x, padding)

    return stateless(init, apply)


@described
def tied(vocabulary: int, width: int, body: Layer, *, padding: int | None = None) -> Layer:
    """Share one matrix between embedding and output: y = body(E[x]) Eᵀ, int[batch, time] -> float[batch, time, vocabulary].

    If x is a dict of several inputs, each is embedded, and the body must return one sequence. Params: embedding, body.
    Source: Press and Wolf 2017.
    """
    draw = _table("tied", vocabulary, width, padding, None)

    def init(key, spec):
        spec = as_spec(spec)
        embed_key, body_key = jax.random.split(key)
        embedding = draw(embed_key)
        inner = jax.eval_shape(lambda e, x: _each("tied", e, x, padding), embedding, spec)
        params, state = body.init(body_key, inner)
        return {"embedding": embedding, "body": params}, {"body": state}

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        h = _each("tied", params["embedding"], as_arrays(x), padding)
        inner = params["body"], state["body"]
        h, inner = apply_at("body", body, *inner, h, key=key, train=train, axis_name=axis_name)
        values, _ = sequence("tied: the body's output", h)
        return like(h, product(values, params["embedding"].T.astype(values.dtype))), {"body": inner}

    return Layer(init, apply)


def _table(who: str, vocabulary: int, width: int, padding: Any, kernel_init: Any) -> Callable[[Any], jax.Array]:
    check.positive(who, vocabulary=vocabulary, width=width)
    if padding is not None:
        check.non_negative(who, padding=padding)
        if padding >= vocabulary:
            raise ValueError(f"{who}: padding must lie in 0..{vocabulary - 1}, got {padding!r}")
    draw = initializers.normal(width**-0.5) if kernel_init is None else initializers.get(kernel_init)
    return lambda key: draw(key, (vocabulary, width), jnp.float32)


def _tokens(who: str, x: Any) -> tuple[Any, Any]:
    """Split x into (tokens, mask or None), the padding left as it is."""
    if isinstance(x, Masked):
        check_mask(who, x)
    tokens, mask = x if isinstance(x, Masked) else (x, None)
    if not hasattr(tokens, "dtype") or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{who}: the input must be tokens, int[batch, ...], got {check.describe(x)}")
    return tokens, mask


def _each(who: str, embedding: jax.Array, x: Any, padding: int | None) -> Any:
    if isinstance(x, Mapping):
        return {name: _look_up(who, embedding, a, padding) for name, a in x.items()}
    return _look_up(who, embedding, x, padding)


def _look_up(who: str, embedding: jax.Array, x: Any, padding: int | None) -> Any:
    (given, real), n = _tokens(who, x), embedding.shape[0]
    if padding is not None and given.ndim != 2:
        raise ValueError(f"{who}: padding needs tokens int[batch, time], got {check.describe(x)}")
    _check_range(who, n, given, real, padding)
    tokens = check.as_int32(given)
    if padding is not None:
        real = tokens != padding if real is None else (tokens != padding) & real
    if real is not None:
        tokens = filled(tokens, real)
    # A token's gradient is a sum over all its positions. In bfloat16 a sum of ones stops at 256.
    y = jnp.take(embedding.astype(statistics_dtype(embedding.dtype)), tokens, axis=0, mode="clip")
    # A factor, not jnp.where, so that the gradient is NaN too.
    y = y * jnp.where((tokens >= 0) & (tokens < n), 1, jnp.nan).astype(y.dtype)[..., None]
    y = y.astype(embedding.dtype)
    return y if real is None else cleared(Masked(y, real))


def _check_range(who: str, n: int, tokens: Any, mask: Any, padding: int | None) -> None:
    """Refuse real tokens outside the vocabulary, if their values can be seen. In NumPy, so that nothing is traced."""
    try:
        seen = np.asarray(tokens)
        seen = seen if mask is None else seen[np.asarray(mask)]
    except jax.errors.TracerArrayConversionError:
        return
    seen = seen if padding is None else seen[seen != padding]
    if seen.size and (seen.min() < 0 or seen.max() >= n):
        raise ValueError(f"{who}: tokens must lie in 0..{n - 1}, got {seen.min()}..{seen.max()}")
