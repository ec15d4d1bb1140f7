"""Attention, cross-attention, and learned positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check, lowering
from fnn.core import Layer, as_arrays, as_spec
from fnn.description import described
from fnn.layers import initializers, memory
from fnn.layers.dense import affine
from fnn.layers.initializers import Initializer
from fnn.layers.inputs import check_names, check_units, like, sequence
from fnn.masks import cleared
from fnn.tree import statistics_dtype


@described
def attention(
    heads: int,
    *,
    causal: bool = False,
    rotary: bool = False,
    kv_heads: int | None = None,
    bias: bool = True,
    kernel_init: str | Initializer = "lecun_normal",
    out_init: str | Initializer | None = None,
) -> Layer:
    """Attend to all positions: y = concat_h(softmax(q_h k_hᵀ/sqrt(d/heads)) v_h) W_out, with q, k, v = x W + b.

    x: float[batch, time, d], alone or in `Masked` -> the same; params: query, key, value, out, each a kernel and bias.
    With `causal`, a position attends to itself and to earlier ones. In a masked sequence, positions attend to real ones
    only, and padded ones give zero. `kv_heads` (a divisor of heads) shares keys and values among groups of heads. `rotary`
    rotates queries and keys by their positions, counted over real ones, so that only differences matter. The softmax is in
    at least float32.

    On an NVIDIA GPU, cuDNN's fused kernel computes it in float16 and bfloat16, for heads of up to 128 (in steps of 8),
    lengths in steps of 64, and nothing masked except by `causal`; there JAX has no forward mode and no second derivatives.
    Everywhere else it is two plain products and a softmax, which hold all scores float[batch, heads, time, time].

    With a cache (`memory.init_cache`; causal layers only), a new piece of a sequence also attends to the earlier pieces.
    Seven arguments, all but one optional and independent of each other.
    Errors: ValueError if heads do not divide d, or for a piece longer than the cache.
    Source: Vaswani et al. 2017; Su et al. 2021 (rotary, base 10,000, halves paired); Ainslie et al. 2023 (kv_heads).
    """
    who = "attention"
    kv, draw = _heads(who, heads, kv_heads, bias, kernel_init, out_init)
    refusal = (
        "" if causal else f"{who}: without causal=True a position looks ahead, so a sequence cannot come in pieces"
    )

    def init(key, spec):
        values, _ = sequence(who, as_spec(spec))
        params, size = draw(key, values, values, rotary)
        cached = ("length", kv, size)
        return params, memory.empty([("key", cached), ("value", cached)], refusal=refusal)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        values, mask = sequence(who, x)
        d = params["query"]["kernel"].shape[0]
        check_units(who, values, d)
        batch, time, _ = values.shape
        q, k, v = (_project(params[name], values, n) for name, n in (("query", heads), ("key", kv), ("value", kv)))
        if rotary or state.started:
            places = memory.number_positions(state, batch, time, mask)
        if rotary:
            q, k = rotate(q, places), rotate(k, places)
        if state.started:
            y, state = _cached(state, q, k, v, places, mask)
        else:
            seen = None if mask is None else mask[:, None, None, :]
            y = _attend(q, k, v, seen, causal)
        return cleared(like(x, affine(params["out"], y.reshape(batch, time, d)))), state

    return Layer(init, apply)


@described
def cross_attention(
    heads: int,
    *,
    kv_heads: int | None = None,
    bias: bool = True,
    kernel_init: str | Initializer = "lecun_normal",
    out_init: str | Initializer | None = None,
) -> Layer:
    """Attend to another sequence: `attention` with queries from the target, keys and values from the source.

    x: {"source": float[batch, s, e], "target": float[batch, time, d]}, each alone or in `Masked` -> float[batch, time, d],
    in `Masked` if the target is; params as in `attention`, kernels of key and value float[e, ...]. Positions attend to real
    positions of the source only (if there is none, y is the bias of `out`); padded ones of the target give zero. In a
    residual block: `residual(cross_attention(4), add_to="target")`.

    With a cache the source's keys and values are computed once, in the call that brings the source; later calls bring an
    empty one, float[batch, 0, e]. Errors: ValueError for other names, for other widths than at init, or for a part of a
    source. Source: Vaswani et al. 2017, section 3.2.3.
    """
    who = "cross_attention"
    kv, draw = _heads(who, heads, kv_heads, bias, kernel_init, out_init)

    def pair(x):
        x = check_names(who, memory.NAMES, x)
        (source, real), (target, _) = sequence(who, x["source"]), sequence(who, x["target"])
        if source.shape[0] != target.shape[0]:
            raise ValueError(f"{who}: source and target must have the same batch size, got {check.describe(dict(x))}")
        return source, real, target

    def init(key, spec):
        source, _, target = pair(as_spec(spec))
        params, size = draw(key, target, source, False)
        cached = ("source", kv, size)
        return params, memory.empty([("key", cached), ("value", cached), ("real", ("source",))])

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        source, real, target = pair(x)
        check_units(who, source, params["key"]["kernel"].shape[0], "source")
        check_units(who, target, params["query"]["kernel"].shape[0], "target")
        q, k, v = _project(params["query"], target, heads), *(_project(params[n], source, kv) for n in ("key", "value"))
        if state.started:
            k, v, real, state = _kept(state, k, v, real)
        y = _attend(q, k, v, None if real is None else real[:, None, None, :], False)
        if real is not None:
            y = jnp.where(jnp.any(real, axis=1)[:, None, None, None], y, 0)
        return cleared(like(x["target"], affine(params["out"], y.reshape(target.shape)))), state

    return Layer(init, apply)


@described
def positions(max_length: int, *, kernel_init: str | Initializer | None = None) -> Layer:
    """Add a learned vector for each position: y_t = x_t + P_t; params: embedding float[max_length, d].

    x: float[batch, time, d], alone or in `Masked` -> the same. Real positions are numbered from 0. P is drawn from
    N(0, 1/d), or by `kernel_init`. Errors: ValueError for a longer sequence. Source: Gehring et al. 2017.
    """
    check.positive("positions", max_length=max_length)

    def fits(values):
        if values.shape[1] > max_length:
            got = check.describe(values)
            raise ValueError(
                f"positions: a sequence must have at most {max_length} positions, got {got}; raise max_length"
            )

    def init(key, spec):
        values, _ = sequence("positions", as_spec(spec))
        fits(values)
        d = values.shape[-1]
        draw = initializers.normal(d**-0.5) if kernel_init is None else initializers.get(kernel_init)
        params = {"embedding": draw(key, (max_length, d), statistics_dtype(values.dtype))}
        return params, memory.empty(limit=max_length)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        values, mask = sequence("positions", x)
        fits(values)
        table = params["embedding"].astype(values.dtype)
        if mask is None and not state.started:
            return like(x, values + table[: values.shape[1]]), state
        batch, time, _ = values.shape
        places = memory.number_positions(state, batch, time, mask)
        y = values + jnp.take(table, places, axis=0, mode="fill", fill_value=jnp.nan)
        return like(x, y), memory.advance(state, {}, time, mask) if state.started else state

    return Layer(init, apply)


def rotate(x: jax.Array, places: jax.Array) -> jax.Array:
    """Turn the pair (x_i, x_{i+size/2}) of every head by the angle p·10000^(-2i/size), p the position.

    x: float[batch, time, heads, size], places: int[batch, time] -> the same as x. Angles are in at least float32.
    """
    half, dtype = x.shape[-1] // 2, statistics_dtype(x.dtype)
    angle = places[..., None].astype(dtype) * 10_000.0 ** (-jnp.arange(half, dtype=dtype) / half)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _heads(who: str, heads: int, kv_heads: Any, bias: bool, kernel_init: Any, out_init: Any) -> tuple[int, Any]:
    """Return the number of heads of keys and values, and what draws the parameters and tells the size of a head."""
    kv = heads if kv_heads is None else kv_heads
    check.positive(who, heads=heads, kv_heads=kv)
    if heads % kv:
        raise ValueError(f"{who}: kv_heads must divide heads, got {kv} and {heads}")
    kernel_init, zeros = initializers.get(kernel_init), initializers.get("zeros")
    out_init = kernel_init if out_init is None else initializers.get(out_init)
    inits = {"query": kernel_init, "key": kernel_init, "value": kernel_init, "out": out_init}

    def draw(key, target, source, rotary):
        d, dtype = target.shape[-1], statistics_dtype(target.dtype)
        if d % heads or (rotary and d // heads % 2):
            rule = "heads must divide the width" + (", with an even quotient for rotary positions" if rotary else "")
            raise ValueError(f"{who}: {rule}, got {heads} heads and {check.describe(target)}")
        params = {}
        for k, (name, init) in zip(jax.random.split(key, 4), inits.items(), strict=True):
            rows, width = (source.shape[-1], kv * d // heads) if name in ("key", "value") else (d, d)
            params[name] = {"kernel": init(k, (rows, width), dtype)}
            if bias:
                params[name]["bias"] = zeros(k, (width,), dtype)
        return params, d // heads

    return kv, draw


def _kept(state: Any, k: Any, v: Any, real: Any) -> tuple[Any, Any, Any, Any]:
    """Cache the keys and values of a source; return the cached ones for a source without positions."""
    batch, length = state.cache["real"].shape
    if k.shape[0] != batch or k.shape[1] not in (0, length):
        rule = f"the cache is for {batch} sources of {length}, which must come whole or without any position"
        raise ValueError(f"cross_attention: {rule}, got {k.shape[0]} of {k.shape[1]}")
    if k.shape[1]:
        cache = {"key": k, "value": v, "real": jnp.ones((batch, length)) if real is None else real}
        cache = {name: a.astype(state.cache[name].dtype) for name, a in cache.items()}
        state = memory.advance(state, cache, length, real)
    return state.cache["key"].astype(k.dtype), state.cache["value"].astype(v.dtype), state.cache["real"] > 0, state


def _cached(state: Any, q: Any, k: Any, v: Any, places: Any, mask: Any) -> tuple[Any, Any]:
    """Append the new keys and values to the cached ones, and attend to all of them up to each query's position."""
    batch, time = places.shape
    length = state.cache["key"].shape[1]
    if state.cache["key"].shape[0] != batch or time > length:
        rule = f"the cache is for {state.cache['key'].shape[0]} sequences of {length} positions"
        raise ValueError(f"attention: {rule}, got {batch} of {time}")
    slots = places if mask is None else jnp.where(mask, places, length)  # padding is written nowhere
    rows = jnp.arange(batch)[:, None]
    cache = {
        name: old.at[rows, slots].set(new.astype(old.dtype), mode="drop")
        for (name, old), new in zip(sorted(state.cache.items()), (k, v), strict=True)
    }
    seen = (jnp.arange(length) <= places[:, :, None])[:, None]
    y = _attend(q, cache["key"].astype(q.dtype), cache["value"].astype(q.dtype), seen, False)
    y = jnp.where((places < length)[:, :, None, None], y, jnp.nan)
    return y, memory.advance(state, cache, time, mask)


def _attend(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> jax.Array:
    if 0 in (q.shape[1], k.shape[1]):
        return jnp.zeros_like(q)
    lengths = q.shape[1], k.shape[1]
    how = lowering.attention(q.dtype, q.shape[2] != k.shape[2], mask is not None, q.shape[-1], lengths)
    if how == "cudnn":
        try:
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        except (NotImplementedError, RuntimeError):  # no cuDNN here, or too old a card: JAX says so while it traces
            pass
    if how == "xla":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    logits = _scores(q, k)
    unseen, logits = 0.7 * jnp.finfo(logits.dtype).min, logits / q.shape[-1] ** 0.5
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, unseen)
    weights = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, unseen), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q kᵀ in at least float32, of which narrower q and k get gradients by products in their own dtype: JAX would take
    those of float32 with bfloat16."""

    def product(q, k, dtype):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype)

    wide = statistics_dtype(q.dtype)
    if q.dtype == wide:
        return product(q, k, wide)
    scores = jax.custom_jvp(functools.partial(product, dtype=wide))

    @scores.defjvp
    def tangent(primals, tangents):
        (q, k), (dq, dk) = primals, tangents
        return product(q, k, wide), (product(dq, k, q.dtype) + product(q, dk, q.dtype)).astype(wide)

    return scores(q, k)


def _project(params: dict[str, Any], x: jax.Array, heads: int) -> jax.Array:
    y = affine(params, x)
    return y.reshape(*y.shape[:2], heads, y.shape[-1] // heads)
