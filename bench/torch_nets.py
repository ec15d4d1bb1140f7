"""PyTorch's nets of the suite `models`, from the weights that `bench.nets` names for Linen. Each as its users would write it:
images channels last in memory, one product for query, key and value, the library's own attention and recurrent layers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench.nets import BLOCKS, SMALL, Size
from bench.problem import DECAY, EPS

Weights = dict[str, Any]


def filled(module: Any, **values: Any) -> Any:
    """Copy arrays into a module's parameters."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(torch.tensor(np.ascontiguousarray(value)))
    return module


def linear(p: Weights) -> Any:
    """Make a Linear of kernel (in, out) and bias."""
    return filled(nn.Linear(*p["kernel"].shape), weight=p["kernel"].T, bias=p["bias"])


def conv(p: Weights, stride: int = 1) -> Any:
    """Make a convolution of a kernel (height, width, in, out), padded as "SAME" where the stride is 1."""
    kernel = p["kernel"].transpose(3, 2, 0, 1)
    padding = kernel.shape[-1] // 2 if stride == 1 else 0
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], stride, padding, bias=False)
    return filled(layer, weight=kernel).to(memory_format=torch.channels_last)


def batch_norm(p: Weights) -> Any:
    return filled(nn.BatchNorm2d(len(p["scale"]), EPS, 1 - DECAY), weight=p["scale"], bias=p["bias"])


def layer_norm(p: Weights) -> Any:
    return filled(nn.LayerNorm(len(p["scale"]), 1e-6), weight=p["scale"], bias=p["bias"])


def images(x: Any) -> Any:
    """View images float[batch, height, width, c] as PyTorch names their axes; in memory they lie as they did."""
    return x.permute(0, 3, 1, 2)


class ConvNet(nn.Module):
    def __init__(self, w: Weights):
        super().__init__()
        block = [[conv(w[f"conv_{i}"]), batch_norm(w[f"norm_{i}"]), nn.ReLU()] for i in range(4)]
        self.body = nn.Sequential(*block[0], *block[1], nn.MaxPool2d(2), *block[2], *block[3])
        self.output = linear(w["output"])

    def forward(self, x):
        return self.output(self.body(images(x)).permute(0, 2, 3, 1).flatten(1))


class Block(nn.Module):
    """One pre-activation block; a stride of 2 pads below and on the right, as "SAME" does."""

    def __init__(self, w: Weights, i: int, stride: int):
        super().__init__()
        self.first, self.second = batch_norm(w[f"norm_{i}a"]), batch_norm(w[f"norm_{i}b"])
        self.a, self.b = conv(w[f"conv_{i}a"], stride), conv(w[f"conv_{i}b"])
        self.shortcut = conv(w[f"shortcut_{i}"], stride) if stride > 1 else None

    def forward(self, x):
        h = functional.relu(self.first(x))
        if self.shortcut is not None:
            x = self.shortcut(h)
            h = functional.pad(h, (0, 1, 0, 1))
        return x + self.b(functional.relu(self.second(self.a(h))))


class ResNet(nn.Module):
    def __init__(self, w: Weights):
        super().__init__()
        self.stem, self.norm, self.output = conv(w["stem"]), batch_norm(w["norm"]), linear(w["output"])
        self.blocks = nn.Sequential(*(Block(w, i, stride) for i, (_, stride) in enumerate(BLOCKS)))

    def forward(self, x):
        x = functional.relu(self.norm(self.blocks(self.stem(images(x)))))
        return self.output(x.mean((2, 3)))


class Attention(nn.Module):
    """x + attention(norm x), or of the normalised x to a source."""

    def __init__(self, w: Weights, name: str, causal: bool = False, cross: bool = False, size: Size = SMALL):
        super().__init__()
        self.norm, self.causal, self.cross = layer_norm(w[f"norm_{name}"]), causal, cross
        self.size, p, width = size, w[f"attend_{name}"], size.width
        flat = {
            n: {"kernel": p[n]["kernel"].reshape(width, width), "bias": p[n]["bias"].reshape(width)}
            for n in ("query", "key", "value", "out")
        }
        self.out = linear(flat["out"])

        def joined(*names):
            kernels, biases = ([flat[n][part] for n in names] for part in ("kernel", "bias"))
            return linear({"kernel": np.concatenate(kernels, 1), "bias": np.concatenate(biases)})

        parts = (("query",), ("key", "value")) if cross else (("query", "key", "value"),)
        self.projections = nn.ModuleList([joined(*names) for names in parts])

    def forward(self, x, source=None):
        inputs = (self.norm(x), source) if self.cross else (self.norm(x),)
        q, k, v = (
            part.unflatten(-1, (self.size.heads, -1)).transpose(1, 2)
            for project, a in zip(self.projections, inputs, strict=True)
            for part in project(a).split(self.size.width, -1)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, w: Weights, name: str):
        super().__init__()
        self.norm = layer_norm(w[f"norm_{name}"])
        self.first, self.second = linear(w[f"in_{name}"]), linear(w[f"out_{name}"])

    def forward(self, x):
        return x + self.second(functional.gelu(self.first(self.norm(x))))


class Tied(nn.Module):
    """An embedding whose table is the output layer too. Under autocast, what passes between blocks is bfloat16."""

    def __init__(self, w: Weights, places: tuple[str, ...], size: Size = SMALL):
        super().__init__()
        self.table = filled(nn.Embedding(size.vocabulary, size.width), weight=w["table"]["embedding"])
        tables = [filled(nn.Embedding(size.length, size.width), weight=w[n]) for n in places]
        self.places = nn.ParameterList([table.weight for table in tables])
        self.norm = layer_norm(w["norm"])

    def embedded(self, tokens, i=0):
        h = self.table(tokens) + self.places[i]
        device = h.device.type
        return h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h

    def logits(self, h):
        return self.norm(h) @ self.table.weight.T


class Transformer(Tied):
    def __init__(self, w: Weights, size: Size = SMALL):
        super().__init__(w, ("places",), size)
        parts = [(Attention(w, f"self{i}", True, size=size), Feed(w, f"feed{i}")) for i in range(size.layers)]
        self.body = nn.Sequential(*(part for pair in parts for part in pair))

    def forward(self, tokens):
        return self.logits(self.body(self.embedded(tokens)))


class Translator(Tied):
    def __init__(self, w: Weights):
        super().__init__(w, ("places_source", "places_target"))
        depth = range(SMALL.layers // 2)
        parts = [(Attention(w, f"read_self{i}"), Feed(w, f"read_feed{i}")) for i in depth]
        self.encoder = nn.Sequential(*(part for pair in parts for part in pair), layer_norm(w["read_norm"]))
        self.own = nn.ModuleList([Attention(w, f"self{i}", causal=True) for i in depth])
        self.cross = nn.ModuleList([Attention(w, f"cross{i}", cross=True) for i in depth])
        self.feed = nn.ModuleList([Feed(w, f"feed{i}") for i in depth])

    def forward(self, tokens):
        source, x = self.encoder(self.embedded(tokens["source"])), self.embedded(tokens["target"], 1)
        for own, cross, feed in zip(self.own, self.cross, self.feed, strict=True):
            x = feed(cross(own(x), source))
        return self.logits(x)


class Recurrent(nn.Module):
    """An LSTM or a GRU and an output layer. PyTorch has two biases where one does: the other stays zero."""

    def __init__(self, w: Weights, kind: Callable[..., Any], gates: str):
        super().__init__()
        self.output, cell = linear(w["output"]), w["cell"]

        def joined(side, part):
            return np.concatenate([cell[side + g].get(part, np.zeros(SMALL.width, np.float32)).T for g in gates])

        self.cell = filled(
            kind(cell["i" + gates[0]]["kernel"].shape[0], SMALL.width, batch_first=True),
            weight_ih_l0=joined("i", "kernel"),
            weight_hh_l0=joined("h", "kernel"),
            bias_ih_l0=joined("i", "bias"),
            bias_hh_l0=joined("h", "bias"),
        )
        biased = {side: [float("bias" in cell[side + g]) for g in gates] for side in "ih"}
        for side, keep in biased.items():
            bias = getattr(self.cell, f"bias_{side}h_l0")
            if not any(keep):
                bias.requires_grad_(False)
            elif not all(keep):
                mask = torch.tensor(keep).repeat_interleave(SMALL.width)
                bias.register_hook(lambda g, mask=mask: g * mask.to(g.device))

    def forward(self, x):
        return self.output(self.cell(x)[0][:, -1])


NETS: dict[str, Callable[[Weights, Size], Any]] = {
    "convnet": lambda w, size: ConvNet(w),
    "resnet": lambda w, size: ResNet(w),
    "transformer": Transformer,
    "encoder-decoder": lambda w, size: Translator(w),
    "gru": lambda w, size: Recurrent(w, nn.GRU, "rzn"),
    "lstm": lambda w, size: Recurrent(w, nn.LSTM, "ifgo"),
}
