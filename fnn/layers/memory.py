"""Caches for sequences that come in pieces (`init_cache`), and greedy decoding with them (`generate`).

Attention caches the keys and values of earlier positions, a recurrent layer its hidden state. The cache is part of the
layer's state, like batch norm's statistics: `apply` reads the old one and returns the new one. It starts empty, and then
every call of `apply` is on its own, as in training. `init_cache` fills in arrays for it, inside `repeat`, `residual` and
branches too.

`position` counts the positions seen in each example; the next one is written there. It is a float, like every leaf of a
state: whole numbers are exact up to 2^24 in float32, far beyond the length of any cache.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, compiled, mapped
from fnn.core import Layer, as_arrays
from fnn.description import described
from fnn.layers.inputs import Masked, check_names, parts
from fnn.tree import PyTree

NAMES = ("source", "target")
"""Names of the two inputs of an encoder-decoder."""


@flax.struct.dataclass
class Memory:
    """The state of a layer with a cache: `cache` is () until `init_cache` makes it a dict of arrays, batch axis first."""

    position: jax.Array
    """Number of real positions seen: float[], or float[batch] with a cache."""
    cache: PyTree = ()
    last: PyTree = ()
    """Index of the last real position in the newest piece, -1 if it has none: float[batch], or () without a cache."""
    shapes: tuple[tuple[str, tuple[int | str, ...]], ...] = flax.struct.field(pytree_node=False, default=())
    """Names and shapes of the cached arrays, without the batch axis; "length" and "source" are the lengths that
    `init_cache` is given."""
    limit: int | None = flax.struct.field(pytree_node=False, default=None)
    """The longest sequence that the layer has positions for."""
    refusal: str = flax.struct.field(pytree_node=False, default="")
    """Why this layer cannot take a sequence in pieces; "" if it can."""
    full_sequence: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether the layer always gets its whole sequence, so that `init_cache` skips it."""

    @property
    def started(self) -> bool:
        """Whether `init_cache` has made a cache."""
        return isinstance(self.cache, dict)


@flax.struct.dataclass
class Whole:
    """The state of a layer without a cache that mixes the positions of a sequence: no array, but `init_cache` refuses it."""

    refusal: str = flax.struct.field(pytree_node=False, default="")
    """Why this layer cannot take a sequence in pieces; "" for an image, or inside of `full_sequence`."""


def whole_sequence(who: str, layer: Layer, kind: type[Whole] = Whole) -> Layer:
    """Give a stateless layer that mixes positions the state `kind`, if its input is float[batch, time, d]."""
    refusal = f"{who}: it mixes positions and has no cache, so a sequence cannot come in pieces"

    def init(key, spec):
        params, _ = layer.init(key, spec)
        sequence = jnp.ndim(jax.tree.leaves(spec)[0]) == 3
        return params, kind(refusal if sequence else "") if sequence or kind is not Whole else ()

    return Layer(init, layer.apply, layer.description)


def empty(
    shapes: Iterable[tuple[str, tuple[int | str, ...]]] = (), *, limit: int | None = None, refusal: str = ""
) -> Memory:
    """Make the state of a layer without a cache, for `init`; the arguments are fields of `Memory`."""
    return Memory(jnp.zeros((), jnp.float32), shapes=tuple(shapes), limit=limit, refusal=refusal)


@described
def full_sequence(layer: Layer) -> Layer:
    """Mark a layer that always gets its whole sequence, such as an encoder: `init_cache` makes no cache for it."""

    def mark(node):
        if isinstance(node, Whole):
            return dataclasses.replace(node, refusal="")
        return dataclasses.replace(node, full_sequence=True) if isinstance(node, Memory) else node

    def init(key, spec):
        params, state = layer.init(key, spec)
        return params, jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, Memory | Whole))

    return Layer(init, layer.apply)


def init_cache(
    state: PyTree,
    batch: int,
    length: int,
    *,
    source_length: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> PyTree:
    """Return a net's state with empty caches for sequences of up to `length` positions, in the dtype of the activations.

    From then on every call of `apply` in eval mode continues the sequence of the last one: the outputs are those of one
    call with the whole sequence, to rounding. Positions beyond `length` give NaN if a cache would have to hold them.

    A net with `cross_attention` also needs `source_length`. Its first call must bring the whole source, whose keys and
    values are then cached; later calls bring an empty source, an array [batch, 0].

    Errors: ValueError if no layer has a cache, if a layer cannot take its sequence in pieces (it runs backwards in time, its
    attention looks ahead, or it mixes positions without a cache: convolutions, pools, group_norm), if one has positions
    for fewer than `length`, or if `source_length` is missing.
    """
    check.positive("memory.init_cache", batch=batch, length=length)
    sizes: dict[Any, Any] = {"length": length, "source": source_length}
    found = []

    def fill(node):
        if isinstance(node, Memory | Whole) and node.refusal and not getattr(node, "full_sequence", False):
            raise ValueError(f"memory.init_cache: {node.refusal}")
        if not isinstance(node, Memory) or node.full_sequence:
            return node
        if node.limit is not None and length > node.limit:
            raise ValueError(
                f"memory.init_cache: length must be at most the net's {node.limit} positions, got {length}"
            )
        if source_length is None and _of_source(node):
            raise ValueError("memory.init_cache: cross_attention needs the source's length, got source_length=None")
        found.append(node)
        depth = node.position.shape[: node.position.ndim - node.started]
        cache = {
            name: jnp.zeros((*depth, batch, *(sizes.get(n, n) for n in shape)), dtype) for name, shape in node.shapes
        }
        zeros = jnp.zeros((*depth, batch), jnp.float32)
        return dataclasses.replace(node, position=zeros, cache=cache, last=zeros - 1)

    state = jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, Memory | Whole))
    if not found:
        raise ValueError(
            "memory.init_cache: the net must have a layer with a cache (attention, rnn, gru, lstm), got none"
        )
    return state


def advance(memory: Memory, cache: dict[str, jax.Array], time: int, mask: jax.Array | None = None) -> Memory:
    """Return the memory with a new cache, after `time` more positions; those that the mask calls padding do not count."""
    if mask is None:
        count, last = time, jnp.full_like(memory.last, time - 1)
    else:
        count, last = jnp.sum(mask, axis=1), _last_real(mask)
    return dataclasses.replace(
        memory, position=memory.position + count, cache=cache, last=last.astype(memory.last.dtype)
    )


def number_positions(memory: Memory, batch: int, time: int, mask: jax.Array | None = None) -> jax.Array:
    """Count, for each new position, the real positions before it: int32[batch, time].

    So the same tokens get the same numbers wherever the padding is, and whether they come at once or in pieces.
    """
    if mask is None:
        new = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    else:
        new = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return new + memory.position.astype(jnp.int32)[:, None] if memory.started else new


def generate(
    net: Layer,
    params: PyTree,
    state: PyTree,
    prompt: PyTree,
    max_new_tokens: int,
    *,
    eos: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Decode greedily: y_t = argmax net(prompt, y_1, ..., y_{t-1}), one new token at a time: int32[batch, max_new_tokens].

    `net` maps tokens int[batch, time] to logits float[batch, time, vocabulary] (`models.decoder`, or a recurrent net
    that ends in a `dense`). `prompt` is int[batch, time] or `Masked`, padded on either side or with holes. Each example is
    continued after its last real token; what is real, the net's own mask says (`Masked`, `padding=`). If the net predicts
    a padding token, more padding follows. For an encoder-decoder the prompt is {"source": ..., "target": ...}: the target,
    at least a start token, is continued, and the source is read once. After `eos` an example repeats `eos`.

    `state` needs no cache, and is not changed; `dtype` is that of the caches. Compiled once for each shape. Seven
    arguments: the four of any call of the net, and three options.
    Errors: ValueError for an example without a real token (not under an outer jit, where values cannot be seen).
    """
    check.positive("generate", max_new_tokens=max_new_tokens)
    prompt = arrays.arrays("generate", "the prompt", prompt)
    for part in check_names("generate", NAMES, prompt).values() if isinstance(prompt, Mapping) else [prompt]:
        tokens = part.values if isinstance(part, Masked) else part
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"generate: the prompt must be int[batch, time] with time > 0, got {check.describe(part)}")
    statics = (net, max_new_tokens, eos, jnp.dtype(dtype))
    answers, last = compiled.call(_decode, statics, params, state, as_arrays(prompt))
    try:
        empty = np.flatnonzero(np.asarray(last) < 0)
    except jax.errors.TracerArrayConversionError:
        return answers
    if empty.size:
        raise ValueError(f"generate: each prompt must have a real token, got none in example {empty[0]}")
    return answers


def _decode(net: Layer, length: int, eos: int | None, dtype: Any, params: Any, state: Any, prompt: Any) -> Any:
    """Return (tokens, index of each prompt's last real token, -1 if it has none); the arguments are those of `generate`."""
    source, target = (prompt["source"], prompt["target"]) if isinstance(prompt, Mapping) else (None, prompt)
    tokens, mask = target if isinstance(target, Masked) else (target, None)
    batch, time = tokens.shape
    span = None if source is None else parts("generate", source)[0].shape[1]
    memory = init_cache(state, batch, time + length, source_length=span, dtype=dtype)
    known = jax.tree.map(lambda a: a[:, :0], source)

    def read(memory, piece, mask):
        """Return (the likeliest token after the last real position of a piece, that position's index, memory)."""
        logits, memory = net.apply(params, memory, piece)
        logits = logits.values if isinstance(logits, Masked) else logits
        last = _last(memory, mask, logits.shape[:2])
        row = jnp.take_along_axis(logits, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
        return jnp.argmax(row, axis=-1).astype(jnp.int32), last, memory

    first, last, memory = read(memory, prompt, mask)

    def body(carry, _):
        token, memory = carry
        piece = token[:, None] if source is None else {"source": known, "target": token[:, None]}
        new, real, memory = read(memory, piece, None)
        new = jnp.where(real < 0, token, new)  # the net takes its own token as padding
        new = new if eos is None else jnp.where(token == eos, eos, new)
        return (new, memory), token

    carry = mapped.varying((first, memory), like=(first, memory, params))
    (final, _), ys = jax.lax.scan(body, carry, length=length - 1)
    return jnp.concatenate([ys.T, final[:, None]], axis=1), last


def _last(memory: Any, mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return the index of the newest piece's last real position: int32[batch].

    The net's own layers say it, because they may know of more padding than the prompt's mask shows. Without a cache of the
    target, the mask says it.
    """
    nodes = jax.tree.leaves(memory, is_leaf=lambda node: isinstance(node, Memory))
    nodes = [node for node in nodes if isinstance(node, Memory) and node.started and not _of_source(node)]
    if nodes:
        return nodes[-1].last.reshape(-1, shape[0])[-1].astype(jnp.int32)
    return _last_real(jnp.ones(shape, bool) if mask is None else mask)


def _last_real(mask: jax.Array) -> jax.Array:
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), -1), axis=1)


def _of_source(node: Memory) -> bool:
    return any("source" in shape for _, shape in node.shapes)
