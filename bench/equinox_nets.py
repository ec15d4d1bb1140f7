"""Equinox's nets of the suite `models`, of one example, from the weights that `bench.nets` names for Linen."""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bench.libraries import eqx_fill
from bench.nets import BLOCKS, CHANNELS, SMALL, Size
from bench.problem import CLASSES, DECAY, EPS

Weights = dict[str, Any]
KEY = jax.random.key(0)
DENSE, PLAIN, NORM = {"weight": "kernel", "bias": "bias"}, {"weight": "kernel"}, {"weight": "scale", "bias": "bias"}


class ConvNet(eqx.Module):
    """Channels first, as Equinox has them; the images come channels last."""

    convs: list[Any]
    norms: list[Any]
    pool: Any
    output: Any

    def __init__(self, w: Weights):
        self.convs, self.norms, before = [], [], 1
        for i, channels in enumerate(CHANNELS):
            self.convs.append(_conv(w[f"conv_{i}"]))
            self.norms.append(_batch_norm(w[f"norm_{i}"]))
            before = channels
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.output = eqx_fill(eqx.nn.Linear(16 * before, CLASSES, key=KEY), w["output"], DENSE)

    def __call__(self, x, state):
        x = x.transpose(2, 0, 1)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x, state = _activated(norm, conv(x), state)
            if i == 1:
                x = self.pool(x)
        return self.output(x.transpose(1, 2, 0).reshape(-1)), state


class ResNet(eqx.Module):
    convs: dict[str, Any]
    norms: dict[str, Any]
    output: Any

    def __init__(self, w: Weights):
        self.convs = {
            n: _conv(p, 2 if n in ("conv_2a", "shortcut_2") else 1)
            for n, p in w.items()
            if "kernel" in p and n != "output"
        }
        self.norms = {n: _batch_norm(p) for n, p in w.items() if n.startswith("norm")}
        self.output = eqx_fill(eqx.nn.Linear(*w["output"]["kernel"].shape, key=KEY), w["output"], DENSE)

    def __call__(self, x, state):
        x = self.convs["stem"](x.transpose(2, 0, 1))
        for i, (_, stride) in enumerate(BLOCKS):
            h, state = _activated(self.norms[f"norm_{i}a"], x, state)
            if stride > 1:
                x = self.convs[f"shortcut_{i}"](h)
            h, state = _activated(self.norms[f"norm_{i}b"], self.convs[f"conv_{i}a"](h), state)
            x = x + self.convs[f"conv_{i}b"](h)
        x, state = _activated(self.norms["norm"], x, state)
        return self.output(x.mean((1, 2))), state


class Block(eqx.Module):
    attention: Any
    norms: list[Any]
    first: Any
    second: Any

    def __init__(self, w: Weights, i: int, size: Size):
        width = size.width
        attention = eqx.nn.MultiheadAttention(
            size.heads,
            width,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=KEY,
        )
        for theirs, ours in (("query", "query"), ("key", "key"), ("value", "value"), ("output", "out")):
            p = w[f"attend_self{i}"][ours]
            flat = {"kernel": p["kernel"].reshape(width, width), "bias": p["bias"].reshape(width)}
            where = operator.attrgetter(f"{theirs}_proj")
            attention = eqx.tree_at(where, attention, eqx_fill(where(attention), flat, DENSE))
        self.attention = attention
        self.norms = [_layer_norm(w[f"norm_{name}{i}"]) for name in ("self", "feed")]
        self.first = eqx_fill(eqx.nn.Linear(width, 4 * width, key=KEY), w[f"in_feed{i}"], DENSE)
        self.second = eqx_fill(eqx.nn.Linear(4 * width, width, key=KEY), w[f"out_feed{i}"], DENSE)

    def __call__(self, h, mask):
        a = jax.vmap(self.norms[0])(h).astype(h.dtype)
        h = h + self.attention(a, a, a, mask).astype(h.dtype)
        a = jax.vmap(self.first)(jax.vmap(self.norms[1])(h).astype(h.dtype)).astype(h.dtype)
        return h + jax.vmap(self.second)(jax.nn.gelu(a, approximate=False)).astype(h.dtype)


class Transformer(eqx.Module):
    table: jax.Array
    places: jax.Array
    blocks: list[Block]
    norm: Any

    def __init__(self, w: Weights, size: Size):
        self.table, self.places = jnp.array(w["table"]["embedding"]), jnp.array(w["places"])
        self.blocks, self.norm = [Block(w, i, size) for i in range(size.layers)], _layer_norm(w["norm"])

    def __call__(self, x, state):
        h = self.table[x] + self.places
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        for block in self.blocks:
            h = block(h, mask)
        return jax.vmap(self.norm)(h).astype(h.dtype) @ self.table.T, state


class Lstm(eqx.Module):
    cell: Any
    output: Any

    def __init__(self, w: Weights):
        gates, cell = "ifgo", w["cell"]
        joined = {
            "inputs": np.concatenate([cell[f"i{g}"]["kernel"] for g in gates], 1),
            "recurrent": np.concatenate([cell[f"h{g}"]["kernel"] for g in gates], 1),
            "bias": np.concatenate([cell[f"h{g}"]["bias"] for g in gates]),
        }
        names = {"weight_ih": "inputs", "weight_hh": "recurrent", "bias": "bias"}
        self.cell = eqx_fill(eqx.nn.LSTMCell(8, SMALL.width, key=KEY), joined, names)
        self.output = eqx_fill(eqx.nn.Linear(SMALL.width, CLASSES, key=KEY), w["output"], DENSE)

    def __call__(self, x, state):
        zero = jnp.zeros(SMALL.width, x.dtype)
        (h, _), _ = jax.lax.scan(lambda carry, now: (self.cell(now, carry), None), (zero, zero), x)
        return self.output(h), state


NETS: dict[str, Callable[[Weights, Size], Any]] = {
    "convnet": lambda w, size: ConvNet(w),
    "resnet": lambda w, size: ResNet(w),
    "transformer": Transformer,
    "lstm": lambda w, size: Lstm(w),
}


def _conv(p: Weights, stride: int = 1) -> Any:
    """Make a convolution padded as "SAME"; a stride of 2 pads 3x3 below and on the right only."""
    window, _, before, channels = p["kernel"].shape
    padding = window // 2 if stride == 1 else ((0, window // 2),) * 2
    layer = eqx.nn.Conv2d(before, channels, window, stride, padding, use_bias=False, key=KEY)
    # (width, height, in, out) is (out, in, height, width) transposed
    return eqx_fill(layer, {"kernel": p["kernel"].transpose(1, 0, 2, 3)}, PLAIN)


def _batch_norm(p: Weights) -> Any:
    return eqx_fill(eqx.nn.BatchNorm(len(p["scale"]), "batch", eps=EPS, momentum=DECAY, mode="batch"), p, NORM)


def _activated(norm: Any, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    y, state = norm(x.astype(jnp.float32), state)
    return jax.nn.relu(y).astype(x.dtype), state


def _layer_norm(p: Weights) -> Any:
    return eqx_fill(eqx.nn.LayerNorm(len(p["scale"]), 1e-6), p, NORM)
