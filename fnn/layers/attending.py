"""What attention computes: which positions see which, and the weighted sums over those that are seen."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, lowering
from fnn.tree import statistics_dtype

Rule = Callable[[jax.Array, jax.Array], jax.Array] | np.ndarray | jax.Array
"""Which pairs of positions see one another: a function (t, s) -> bool of query and key positions, or its table."""


@dataclass(frozen=True)
class Sight:
    """What a query's position t sees of a key's position s, both counted over real positions."""

    who: str
    causal: bool = False
    window: int | None = None
    rule: Any = None
    """A function (t, s) -> bool, or None."""
    known: tuple[int, int] | None = None
    """How many positions of queries and of keys the rule knows; None if it knows all."""

    @property
    def plain(self) -> bool:
        """Whether the places of queries and keys need not be known."""
        return self.window is None and self.rule is None

    def check_lengths(self, queries: int, keys: int) -> None:
        """Refuse more positions than the table of a mask has."""
        if self.known is not None and (queries > self.known[0] or keys > self.known[1]):
            rule = f"the mask's table is for at most {self.known[0]} by {self.known[1]} positions"
            raise ValueError(
                f"{self.who}: {rule}, got {queries} by {keys}; pass a larger one, or a function (t, s) -> bool"
            )

    def pairs(self, t: jax.Array, s: jax.Array, causal: bool) -> jax.Array | None:
        """Say which pairs see one another: bool that broadcasts to [batch, time, s], or None if all do.

        t: int[batch or 1, time, 1], s: int[batch or 1, 1, s]; `causal` says whether to look after that here.
        """
        found = []
        if causal:
            found.append(s <= t)
        if self.window is not None:
            found.append(jnp.abs(t - s) <= self.window)
        if self.rule is not None:
            seen = self.rule(t, s)
            shape = jnp.broadcast_shapes(t.shape, s.shape)
            fits = hasattr(seen, "dtype") and seen.dtype == np.bool_
            try:
                fits = fits and np.broadcast_shapes(seen.shape, shape) == shape
            except ValueError:
                fits = False
            if not fits:
                rule = f"mask must return bool{list(shape)} for positions {check.describe(t)} and {check.describe(s)}"
                raise ValueError(f"{self.who}: {rule}, got {check.describe(seen)}")
            found.append(seen)
        return every(*found)


def sight(who: str, causal: bool, window: int | None, mask: Rule | None) -> Sight:
    """Check the options of a layer, and make a table into a function."""
    if window is not None:
        check.non_negative(who, window=window)
    if mask is None or (callable(mask) and not hasattr(mask, "dtype")):
        return Sight(who, causal, window, mask)
    shape, dtype = getattr(mask, "shape", ()), getattr(mask, "dtype", None)
    if dtype != np.bool_ or len(shape) != 2 or 0 in shape:
        rule = "mask must be a function (t, s) -> bool of positions, or its table bool[time, s]"
        raise TypeError(f"{who}: {rule}, got {check.describe(mask)}; a mask for each example comes with the data")
    table = np.asarray(mask).tobytes()  # not as an array, so that equal nets are known as equal (`compiled`)

    def look_up(t, s):
        return jnp.asarray(np.frombuffer(table, bool).reshape(shape)).at[t, s].get(mode="fill", fill_value=False)

    return Sight(who, causal, window, look_up, tuple(shape))


def rotate(x: jax.Array, places: jax.Array) -> jax.Array:
    """Turn the pair (x_i, x_{i+size/2}) of every head by the angle p·10000^(-2i/size), p the position.

    x: float[batch, time, heads, size], places: int[batch or 1, time] -> the same as x. Angles are in at least float32.
    """
    half, dtype = x.shape[-1] // 2, statistics_dtype(x.dtype)
    angle = places[..., None].astype(dtype) * 10_000.0 ** (-jnp.arange(half, dtype=dtype) / half)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Any, k: Any, v: Any, *, causal: bool = False, window: int | None = None, seen: Any = None, blind: bool = False
) -> jax.Array:
    """Compute softmax(q kᵀ/sqrt(size)) v over the pairs that see one another: float[batch, time, heads, size].

    q: float[batch, time, heads, size], k and v the same or with fewer heads; `causal` and `window` count places in the
    arrays, and `seen: bool[batch, time, s]`, whose axes may be 1, holds all else. With `blind` there may be queries
    that see no key: they get 0. Seven arguments: the three arrays, and the four ways to say what is seen.
    """
    if 0 in (q.shape[1], k.shape[1]):
        return jnp.zeros_like(q)
    lengths, seen = (q.shape[1], k.shape[1]), None if seen is None else seen[:, None]
    masked = seen is not None or (window is not None and not causal)
    how = lowering.attention(q.dtype, q.shape[2] != k.shape[2], masked, q.shape[-1], lengths)
    if how == "cudnn":
        local = None if window is None else (window, 0)
        try:
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=causal, local_window_size=local, implementation="cudnn"
            )
        except (NotImplementedError, RuntimeError):  # no cuDNN here, or too old a card: JAX says so while it traces
            pass
    if window is not None:
        t, s = np.arange(lengths[0])[:, None], np.arange(lengths[1])
        seen = every(jnp.asarray(np.abs(t - s) <= window)[None, None], seen)
    if how == "xla":
        y = jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=causal)
    else:
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
        logits = _scores(q, k)
        unseen, logits = 0.7 * jnp.finfo(logits.dtype).min, logits / q.shape[-1] ** 0.5
        if causal:
            logits = jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, unseen)
        weights = jax.nn.softmax(logits if seen is None else jnp.where(seen, logits, unseen), axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
    if not blind or seen is None:
        return y
    sees = jnp.tril(jnp.ones(lengths, bool)) & seen if causal else seen
    return jnp.where(jnp.swapaxes(jnp.any(sees, axis=-1, keepdims=True), 1, 2), y, 0)


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


def every(*masks: Any) -> jax.Array | None:
    """Join masks of pairs: bool[batch, time, s], whose axes may be 1; None stands for all pairs."""
    found = [mask for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, found) if found else None


def check_pairs(who: str, mask: Any, batch: int, queries: int, keys: int) -> None:
    """Refuse a mask that comes with the data and is not bool[batch, time, s]."""
    wanted = (batch, queries, keys)
    if getattr(mask, "dtype", None) != np.bool_ or tuple(mask.shape) != wanted:
        raise ValueError(
            f"{who}: the mask must be bool{list(wanted)}, True where a position sees another, got {check.describe(mask)}"
        )
