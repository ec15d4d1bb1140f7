"""Attention, cross-attention, and learned positions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check
from fnn.core import Layer, as_arrays, as_spec
from fnn.description import described
from fnn.layers import initializers, memory
from fnn.layers.attending import Rule, Sight, attend, check_pairs, every, rotate, sight
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
    window: int | None = None,
    mask: Rule | None = None,
    rotary: bool = False,
    kv_heads: int | None = None,
    bias: bool = True,
    kernel_init: str | Initializer = "lecun_normal",
    out_init: str | Initializer | None = None,
) -> Layer:
    """Attend to all positions: y = concat_h(softmax(q_h k_hᵀ/sqrt(d/heads)) v_h) W_out, with q, k, v = x W + b.

    x: float[batch, time, d], alone or in `Masked` -> the same; params: query, key, value, out, each a kernel and bias.
    In a masked sequence, positions attend to real ones only, and padded ones give zero. `kv_heads` (a divisor of heads)
    shares keys and values among groups of heads. `rotary` rotates queries and keys by their positions, counted over real
    ones, so that only differences matter. The softmax is in at least float32.

    A position t sees a real position s if everything that is given allows it: `causal` allows s <= t, `window` allows
    |t - s| <= window, `mask` allows those for which a function `mask(t, s)` is True. The function gets int arrays that
    broadcast to [batch, time, s], and is written in `jax.numpy`; an array bool[time, s] is taken as its table. All of them
    count over real positions, so that padding changes nothing. A mask for each example comes with the data: x =
    {"target": sequence, "mask": bool[batch, time, time]}, in a residual block `residual(attention(4), add_to="target")`;
    its axes are those of the array. Where a position sees nothing, the sum over values is 0, and y is the bias of `out`.

    On an NVIDIA GPU, cuDNN's fused kernel computes it in float16 and bfloat16, for heads of up to 128 (in steps of 8),
    lengths in steps of 64, and nothing masked except by `causal`, alone or with `window`; there JAX has no forward mode and
    no second derivatives. Everywhere else it is two plain products and a softmax, which hold all scores float[batch, heads,
    time, time], those outside a window too.

    With a cache (`memory.init_cache`; causal layers only), a new piece of a sequence also attends to the earlier pieces, as
    far as `window` and `mask` let it; a mask for each example is refused there.
    Nine arguments, all but one optional and independent of each other.
    Errors: ValueError if heads do not divide d, for a piece longer than the cache or a sequence longer than a mask's
    table, and for a mask that is not bool. Source: Vaswani et al. 2017; Su et al. 2021 (rotary, base 10,000, halves
    paired); Ainslie et al. 2023 (kv_heads); Beltagy et al. 2020 (window).
    """
    who = "attention"
    kv, draw = _heads(who, heads, kv_heads, bias, kernel_init, out_init)
    view = sight(who, causal, window, mask)
    refusal = (
        "" if causal else f"{who}: without causal=True a position looks ahead, so a sequence cannot come in pieces"
    )

    def init(key, spec):
        (values, _), _ = _own(who, as_spec(spec))
        params, size = draw(key, values, values, rotary)
        cached = ("length", kv, size)
        limit = None if view.known is None else min(view.known)
        return params, memory.empty([("key", cached), ("value", cached)], limit=limit, refusal=refusal)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        (values, mask), given = _own(who, x)
        d = params["query"]["kernel"].shape[0]
        check_units(who, values, d)
        batch, time, _ = values.shape
        view.check_lengths(time, time)
        q, k, v = (_project(params[name], values, n) for name, n in (("query", heads), ("key", kv), ("value", kv)))
        whole = view.plain or (mask is None and view.rule is None)  # places in the arrays are all that is asked for
        if rotary or state.started or not whole:
            alike = mask is None and not state.started
            places = memory.number_positions(state, 1 if alike else batch, time, mask)
        if rotary:
            q, k = rotate(q, places), rotate(k, places)
        if state.started:
            if given is not None:
                rule = "a mask for each example needs the whole sequence at once"
                raise ValueError(f"{who}: {rule}, got a cache; give the layer mask= as a function of positions instead")
            y, state = _cached(view, state, q, k, v, places, mask)
        else:
            seen = None if whole else view.pairs(places[:, :, None], places[:, None, :], causal=False)
            seen = every(seen, None if mask is None else mask[:, None, :], given)
            blind = view.rule is not None or given is not None
            y = attend(q, k, v, causal=causal, window=window if whole else None, seen=seen, blind=blind)
        target = x["target"] if isinstance(x, Mapping) else x
        return cleared(like(target, affine(params["out"], y.reshape(batch, time, d)))), state

    return Layer(init, apply)


@described
def cross_attention(
    heads: int,
    *,
    mask: Rule | None = None,
    kv_heads: int | None = None,
    bias: bool = True,
    kernel_init: str | Initializer = "lecun_normal",
    out_init: str | Initializer | None = None,
) -> Layer:
    """Attend to another sequence: `attention` with queries from the target, keys and values from the source.

    x: {"source": float[batch, s, e], "target": float[batch, time, d]}, each alone or in `Masked` -> float[batch, time, d],
    in `Masked` if the target is; params as in `attention`, kernels of key and value float[e, ...]. Positions attend to real
    positions of the source only; padded ones of the target give zero. `mask` is that of `attention`, a function of
    positions (t of the target, s of the source) or its table; one for each example is a third input, "mask": bool[batch,
    time, s]. Where nothing is seen, y is the bias of `out`. In a residual block:
    `residual(cross_attention(4), add_to="target")`.

    With a cache the source's keys and values are computed once, in the call that brings the source; later calls bring an
    empty one, float[batch, 0, e]. Errors: ValueError for other names, for other widths than at init, or for a part of a
    source. Source: Vaswani et al. 2017, section 3.2.3.
    """
    who = "cross_attention"
    kv, draw = _heads(who, heads, kv_heads, bias, kernel_init, out_init)
    view = sight(who, False, None, mask)

    def inputs(x):
        names = (*memory.NAMES, "mask") if isinstance(x, Mapping) and "mask" in x else memory.NAMES
        x = check_names(who, names, x)
        (source, real), (target, own) = sequence(who, x["source"]), sequence(who, x["target"])
        if source.shape[0] != target.shape[0]:
            raise ValueError(f"{who}: source and target must have the same batch size, got {check.describe(dict(x))}")
        return source, real, target, own, x.get("mask")

    def init(key, spec):
        source, _, target, *_ = inputs(as_spec(spec))
        params, size = draw(key, target, source, False)
        cached, limit = ("source", kv, size), None if view.known is None else view.known[0]
        return params, memory.empty([("key", cached), ("value", cached), ("real", ("source",))], limit=limit)

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        source, real, target, own, given = inputs(x)
        check_units(who, source, params["key"]["kernel"].shape[0], "source")
        check_units(who, target, params["query"]["kernel"].shape[0], "target")
        q, k, v = _project(params["query"], target, heads), *(_project(params[n], source, kv) for n in ("key", "value"))
        batch, time, _ = target.shape
        if not view.plain:
            alike = own is None and not state.started
            t = memory.number_positions(state, 1 if alike else batch, time, own)
        if state.started:
            k, v, real, state = _kept(state, k, v, real, time, own)
        span = k.shape[1]
        view.check_lengths(time, span)
        if given is not None:
            check_pairs(who, given, batch, time, span)
        seen = every(None if real is None else real[:, None, :], given)
        if not view.plain:
            s = memory.number_positions(memory.empty(), 1 if real is None else batch, span, real)
            seen = every(seen, view.pairs(t[:, :, None], s[:, None, :], causal=False))
        y = attend(q, k, v, seen=seen, blind=True)
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


def _own(who: str, x: Any) -> tuple[tuple[Any, Any], Any]:
    """Split the input of attention into its sequence (values, mask of padding) and the mask of pairs that came with it."""
    if not isinstance(x, Mapping):
        return sequence(who, x), None
    x = check_names(who, ("mask", "target"), x)
    values, real = sequence(who, x["target"])
    check_pairs(who, x["mask"], values.shape[0], values.shape[1], values.shape[1])
    return (values, real), x["mask"]


def _kept(state: Any, k: Any, v: Any, real: Any, time: int, own: Any) -> tuple[Any, Any, Any, Any]:
    """Cache the keys and values of a source; return the cached ones for a source without positions.

    The memory's position is that in the target, which has `time` more, real where its mask `own` says so. Six arguments:
    three arrays of the source, and of the target its length and mask.
    """
    batch, length = state.cache["real"].shape
    if k.shape[0] != batch or k.shape[1] not in (0, length):
        rule = f"the cache is for {batch} sources of {length}, which must come whole or without any position"
        raise ValueError(f"cross_attention: {rule}, got {k.shape[0]} of {k.shape[1]}")
    cache = state.cache
    if k.shape[1]:
        cache = {"key": k, "value": v, "real": jnp.ones((batch, length)) if real is None else real}
        cache = {name: a.astype(state.cache[name].dtype) for name, a in cache.items()}
    state = memory.advance(state, cache, time, own)
    return cache["key"].astype(k.dtype), cache["value"].astype(v.dtype), cache["real"] > 0, state


def _cached(view: Sight, state: Any, q: Any, k: Any, v: Any, places: Any, mask: Any) -> tuple[Any, Any]:
    """Append the new keys and values to the cached ones, and attend to those that each query's position sees.

    Seven arguments: what is seen, what was, and what is new.
    """
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
    seen = view.pairs(places[:, :, None], jnp.arange(length, dtype=places.dtype)[None, None], causal=True)
    assert seen is not None
    keys, values = (cache[name].astype(q.dtype) for name in ("key", "value"))
    y = attend(q, keys, values, seen=seen, blind=view.rule is not None)
    y = jnp.where((places < length)[:, :, None, None], y, jnp.nan)
    return y, memory.advance(state, cache, time, mask)


def _project(params: dict[str, Any], x: jax.Array, heads: int) -> jax.Array:
    y = affine(params, x)
    return y.reshape(*y.shape[:2], heads, y.shape[-1] // heads)
