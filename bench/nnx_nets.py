"""Flax NNX's nets of the suite `models`; attributes are named as Linen's parameters in `bench.nets`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.libraries import nnx_fill
from bench.nets import BLOCKS, CHANNELS, SMALL, Size
from bench.problem import CLASSES, DECAY, EPS

Weights = dict[str, Any]


class ConvNet(nnx.Module):
    def __init__(self, size: Size, dtype: str, rngs: nnx.Rngs):
        before = 1
        for i, channels in enumerate(CHANNELS):
            setattr(self, f"conv_{i}", _conv(before, channels, dtype, rngs))
            setattr(self, f"norm_{i}", _batch_norm(channels, dtype, rngs))
            before = channels
        self.output = nnx.Linear(16 * before, CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        for i in range(len(CHANNELS)):
            x = nnx.relu(getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x)))
            if i == 1:
                x = nnx.max_pool(x, (2, 2), (2, 2), "SAME")
        return self.output(x.reshape(len(x), -1))


class ResNet(nnx.Module):
    def __init__(self, size: Size, dtype: str, rngs: nnx.Rngs):
        self.stem, before = _conv(1, 16, dtype, rngs), 16
        for i, (channels, stride) in enumerate(BLOCKS):
            setattr(self, f"norm_{i}a", _batch_norm(before, dtype, rngs))
            setattr(self, f"conv_{i}a", _conv(before, channels, dtype, rngs, stride))
            setattr(self, f"norm_{i}b", _batch_norm(channels, dtype, rngs))
            setattr(self, f"conv_{i}b", _conv(channels, channels, dtype, rngs))
            if stride > 1:
                setattr(self, f"shortcut_{i}", _conv(before, channels, dtype, rngs, stride, 1))
            before = channels
        self.norm = _batch_norm(before, dtype, rngs)
        self.output = nnx.Linear(before, CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for i, (_, stride) in enumerate(BLOCKS):
            h = nnx.relu(getattr(self, f"norm_{i}a")(x))
            if stride > 1:
                x = getattr(self, f"shortcut_{i}")(h)
            h = nnx.relu(getattr(self, f"norm_{i}b")(getattr(self, f"conv_{i}a")(h)))
            x = x + getattr(self, f"conv_{i}b")(h)
        return self.output(nnx.relu(self.norm(x)).mean((1, 2)))


class Transformer(nnx.Module):
    def __init__(self, size: Size, dtype: str, rngs: nnx.Rngs):
        self.layers, width = size.layers, size.width
        self.table = nnx.Embed(size.vocabulary, width, dtype=dtype, rngs=rngs)
        self.places = nnx.Param(jnp.zeros((size.length, width)))
        for i in range(size.layers):
            setattr(self, f"norm_self{i}", _layer_norm(width, dtype, rngs))
            attend = nnx.MultiHeadAttention(size.heads, width, dtype=dtype, decode=False, rngs=rngs)
            setattr(self, f"attend_self{i}", attend)
            setattr(self, f"norm_feed{i}", _layer_norm(width, dtype, rngs))
            setattr(self, f"in_feed{i}", nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs))
            setattr(self, f"out_feed{i}", nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs))
        self.norm = _layer_norm(width, dtype, rngs)

    def __call__(self, x):
        h = self.table(x)
        h = h + self.places[...].astype(h.dtype)
        mask = nnx.make_causal_mask(x)
        for i in range(self.layers):
            h = h + getattr(self, f"attend_self{i}")(getattr(self, f"norm_self{i}")(h), mask=mask)
            a = getattr(self, f"in_feed{i}")(getattr(self, f"norm_feed{i}")(h))
            h = h + getattr(self, f"out_feed{i}")(jax.nn.gelu(a, approximate=False))
        return self.table.attend(self.norm(h))


class Lstm(nnx.Module):
    def __init__(self, size: Size, dtype: str, rngs: nnx.Rngs):
        self.cell = nnx.OptimizedLSTMCell(8, SMALL.width, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(SMALL.width, CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.RNN(self.cell)(x)[:, -1])


NETS: dict[str, Callable[..., Any]] = {
    "convnet": ConvNet,
    "resnet": ResNet,
    "transformer": Transformer,
    "lstm": Lstm,
}


def net(name: str, weights: Weights, size: Size, dtype: str) -> Any:
    """Build a net and set its weights."""
    made = NETS[name](size, dtype, nnx.Rngs(0))
    if name == "lstm":
        cell = weights["cell"]
        joined = {s: np.concatenate([cell[s + g]["kernel"] for g in "ifgo"], 1) for s in "ih"}
        bias = np.concatenate([cell[f"h{g}"]["bias"] for g in "ifgo"])
        parts = {"dense_i": {"kernel": joined["i"]}, "dense_h": {"kernel": joined["h"], "bias": bias}}
        weights = {**weights, "cell": parts}
    nnx_fill(made, weights)
    return made


def _conv(inputs: int, channels: int, dtype: str, rngs: nnx.Rngs, stride: int = 1, window: int = 3) -> Any:
    return nnx.Conv(inputs, channels, (window, window), (stride, stride), use_bias=False, dtype=dtype, rngs=rngs)


def _batch_norm(width: int, dtype: str, rngs: nnx.Rngs) -> Any:
    return nnx.BatchNorm(width, momentum=DECAY, epsilon=EPS, dtype=dtype, rngs=rngs)


def _layer_norm(width: int, dtype: str, rngs: nnx.Rngs) -> Any:
    return nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
