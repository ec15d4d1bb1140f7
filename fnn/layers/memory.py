"""Layers that remember earlier positions, so that a sequence may come in pieces: `init_cache`, and greedy decoding.

What is remembered (attention's keys and values, a recurrent layer's hidden state) is state, as batch norm's statistics
are: `apply` reads the old and returns the new. Training never sees it: a layer's state starts empty, and each call stands
alone, until `init_cache` puts arrays in. It holds for every batch, through `repeat`, `residual` and branches alike.

The number of positions seen, which is a cache's next free place, is kept for each example as a float, as every leaf of
a state is: whole numbers are exact up to 2^24 in float32, far beyond any cache.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, compiled, mapped
from fnn.core import Layer, as_arrays
from fnn.layers.inputs import Masked, parts


@flax.struct.dataclass
class Memory:
    """State of a layer that can remember. `cache` is () until `init_cache` makes it a dict of arrays, batch first."""

    position: Any
    """Real positions seen so far: float[], or float[batch] once started."""
    cache: Any = ()
    last: Any = ()
    """Place of the last real position in the newest piece, -1 where it has none: float[batch], () until started."""
    shapes: tuple[tuple[str, tuple[int | str, ...]], ...] = flax.struct.field(pytree_node=False, default=())
    """Name and shape of what is held, behind the batch axis; "length" stands for the longest sequence, "source" for
    that of the source."""
    limit: int | None = flax.struct.field(pytree_node=False, default=None)
    """The longest sequence that the layer has positions for."""
    refusal: str = flax.struct.field(pytree_node=False, default="")
    """Why this layer cannot take a sequence in pieces, if so."""
    full_sequence: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether its sequence never comes in pieces, so that `init_cache` leaves it alone."""

    @property
    def started(self) -> bool:
        """Whether `init_cache` has put arrays in."""
        return isinstance(self.cache, dict)


def empty(shapes: Any = (), *, limit: int | None = None, refusal: str = "") -> Memory:
    """Make the state of a layer that remembers nothing yet."""
    return Memory(jnp.zeros((), jnp.float32), shapes=tuple(shapes), limit=limit, refusal=refusal)


def full_sequence(layer: Layer) -> Layer:
    """Let a layer see its whole sequence at once, while another comes in pieces: an encoder. `init_cache` leaves it alone."""

    def mark(node):
        return dataclasses.replace(node, full_sequence=True) if isinstance(node, Memory) else node

    def init(key, spec):
        params, state = layer.init(key, spec)
        return params, jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, Memory))

    return Layer(init, layer.apply)


def init_cache(state: Any, batch: int, length: int, *, source: int | None = None, dtype: Any = jnp.float32) -> Any:
    """Make room in a net's state for sequences of up to `length` positions; `dtype` is that of the activations.

    The next calls of `apply` in eval mode then continue where the last one stopped: the outputs are those of one call
    with the whole sequence, to rounding. Positions beyond `length` give NaN where they would need a place.

    A net that attends to a source (`cross_attention`) needs its length, `source`. The first call brings it whole; its keys
    and values are then held, and later calls bring none of it: an array without positions, [batch, 0].

    Errors: ValueError if no layer can remember, if one cannot take its sequence in pieces (backwards in time, or
    attention that looks ahead), if one has positions for fewer than `length`, or if the length of the source is missing.
    """
    check.positive("memory.start", batch=batch, length=length)
    sizes: dict[Any, Any] = {"length": length, "source": source}
    found = []

    def fill(node):
        if not isinstance(node, Memory) or node.full_sequence:
            return node
        if node.refusal:
            raise ValueError(f"memory.init_cache: {node.refusal}")
        if node.limit is not None and length > node.limit:
            raise ValueError(f"memory.init_cache: the net has positions for {node.limit}, got length={length}")
        if source is None and any("source" in shape for _, shape in node.shapes):
            raise ValueError("memory.init_cache: the net attends to a source, got source=None; pass its length")
        found.append(node)
        depth = node.position.shape[: node.position.ndim - node.started]
        cache = {
            name: jnp.zeros((*depth, batch, *(sizes.get(n, n) for n in shape)), dtype) for name, shape in node.shapes
        }
        zeros = jnp.zeros((*depth, batch), jnp.float32)
        return dataclasses.replace(node, position=zeros, cache=cache, last=zeros - 1)

    state = jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, Memory))
    if not found:
        raise ValueError(
            "memory.init_cache: the net must hold a layer that remembers (attention, rnn, gru, lstm), got none"
        )
    return state


def advance(memory: Memory, cache: dict[str, Any], time: int, mask: Any = None) -> Memory:
    """Return the memory after `time` more positions, of which those count that the mask calls real."""
    if mask is None:
        count, last = time, jnp.full_like(memory.last, time - 1)
    else:
        count, last = jnp.sum(mask, axis=1), jnp.max(jnp.where(mask, jnp.arange(time), -1), axis=1)
    return dataclasses.replace(
        memory, position=memory.position + count, cache=cache, last=last.astype(memory.last.dtype)
    )


def number_positions(memory: Memory, batch: int, time: int, mask: Any = None) -> jax.Array:
    """Number new positions by the real ones before them: int32[batch, time]; padding takes no number.

    So the same tokens get the same numbers wherever the padding stands, and whether they come at once or in pieces.
    """
    if mask is None:
        new = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    else:
        new = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return new + memory.position.astype(jnp.int32)[:, None] if memory.started else new


def generate(
    net: Layer,
    params: Any,
    state: Any,
    prompt: Any,
    max_new_tokens: int,
    *,
    eos: int | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Decode greedily: y_t = argmax net(prompt, y_1, ..., y_{t-1}), one new position a step: int32[batch, max_new_tokens].

    `net` maps tokens int[batch, time] to logits float[batch, time, vocabulary] (`models.transformer`, or a recurrent
    net with a `dense` on top). `prompt` is int[batch, time] or `Masked`, padded on either side or with holes: each example
    continues behind its last real token, real being what the net itself takes as such (`Masked`, `padding=`). A padding
    token that the net predicts is followed by padding. For an encoder-decoder the prompt is {"source": ..., "target": ...},
    of which the target, with at least a start token, is continued; the source is read once. After `eos` an example
    repeats `eos`. The state that comes in stays as it is; compiled once for each shape.

    Errors: ValueError for an example without a real token (where values can be seen: not under an outer jit).
    """
    check.positive("generate", max_new_tokens=max_new_tokens)
    prompt = arrays.arrays("generate", "the prompt", prompt)
    if isinstance(prompt, Mapping) and sorted(prompt) != ["source", "target"]:
        raise ValueError(f"generate: the names of the prompt must be 'source' and 'target', got {sorted(prompt)}")
    for part in prompt.values() if isinstance(prompt, Mapping) else [prompt]:
        tokens = part.values if isinstance(part, Masked) else part
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"generate: the prompt must be int[batch, time], time > 0, got {check.describe(part)}")
    statics = (net, max_new_tokens, eos, jnp.dtype(dtype))
    answers, last = compiled.call(_decode, statics, params, state, as_arrays(prompt))
    try:
        empty = np.flatnonzero(np.asarray(last) < 0)
    except jax.errors.TracerArrayConversionError:
        return answers
    if empty.size:
        raise ValueError(f"generate: each example of the prompt needs a real token, got none in example {empty[0]}")
    return answers


def _decode(net: Layer, length: int, eos: int | None, dtype: Any, params: Any, state: Any, prompt: Any) -> Any:
    """Return (tokens, place of each prompt's last real token, -1 where it has none)."""
    source, target = (prompt["source"], prompt["target"]) if isinstance(prompt, Mapping) else (None, prompt)
    tokens, mask = target if isinstance(target, Masked) else (target, None)
    batch, time = tokens.shape
    span = None if source is None else parts("generate", source)[0].shape[1]
    memory = init_cache(state, batch, time + length, source=span, dtype=dtype)
    known = jax.tree.map(lambda a: a[:, :0], source)

    def read(memory, piece, mask):
        """Give (the likeliest token behind the last real position of a piece, its place, memory)."""
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


def _last(memory: Any, mask: Any, shape: tuple[int, int]) -> jax.Array:
    """Place of the newest piece's last real position, int32[batch]: as the net's own layers saw it, who may know more of
    padding than the mask of the prompt; that of the prompt where none of them remembers the target."""
    nodes = jax.tree.leaves(memory, is_leaf=lambda node: isinstance(node, Memory))
    nodes = [node for node in nodes if isinstance(node, Memory) and node.started]
    nodes = [node for node in nodes if not any("source" in shape for _, shape in node.shapes)]
    if nodes:
        return nodes[-1].last.reshape(-1, shape[0])[-1].astype(jnp.int32)
    mask = jnp.ones(shape, bool) if mask is None else mask
    return jnp.max(jnp.where(mask, jnp.arange(shape[1]), -1), axis=1)
