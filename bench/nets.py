"""Flax Linen's nets of the suite `models`, and how fnn's weights go over into them.

The names that Linen's parameters have here are those by which all other libraries get the weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Size(NamedTuple):
    """Sizes of a transformer, or of a recurrent net (length and width)."""

    vocabulary: int = 64
    length: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 4
    batch: int = 16


SMALL, LARGE, TINY = Size(), Size(32_768, 512, 768, 12, 12, 16), Size(64, 16, 32, 4, 2, 4)
CHANNELS, BLOCKS = (32, 32, 64, 64), ((16, 1), (16, 1), (32, 2), (32, 1))
"""Of the conv net; channels and stride of the resnet's blocks."""


def convnet_linen() -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i, channels in enumerate(CHANNELS):
                x = linen.Conv(channels, (3, 3), use_bias=False, name=f"conv_{i}")(x)
                x = linen.relu(linen.BatchNorm(False, momentum=0.9, epsilon=1e-5, name=f"norm_{i}")(x))
                if i == 1:
                    x = linen.max_pool(x, (2, 2), (2, 2), "SAME")
            return linen.Dense(10, name="output")(x.reshape(len(x), -1))

    return Net()


def convnet_weights(params: Any) -> dict[str, Any]:
    first, (second,), _pool, third, (fourth,), *_rest, output = params
    named: dict[str, Any] = {"output": output}
    for i, (conv, norm, _relu) in enumerate((first, second, third, fourth)):
        named |= {f"conv_{i}": conv, f"norm_{i}": norm}
    return named


def resnet_linen() -> Any:
    from flax import linen

    def activated(x, name):
        return linen.relu(linen.BatchNorm(False, momentum=0.9, epsilon=1e-5, name=name)(x))

    def conv(channels, window, stride, name):
        return linen.Conv(channels, (window, window), (stride, stride), use_bias=False, name=name)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = conv(16, 3, 1, "stem")(x)
            for i, (channels, stride) in enumerate(BLOCKS):
                h = activated(x, f"norm_{i}a")
                if stride > 1:
                    x = conv(channels, 1, stride, f"shortcut_{i}")(h)
                h = conv(channels, 3, stride, f"conv_{i}a")(h)
                x = x + conv(channels, 3, 1, f"conv_{i}b")(activated(h, f"norm_{i}b"))
            return linen.Dense(10, name="output")(activated(x, "norm").mean((1, 2)))

    return Net()


def resnet_weights(params: Any) -> dict[str, Any]:
    stem, *stages, norm, _relu, _pool, output = params
    named: dict[str, Any] = {"stem": stem, "norm": norm, "output": output}
    (one,), ((two,),), (norm_a, _relu, (shortcut, branch), _add), ((last,),) = (
        stage[f"stages_{i}"] for i, stage in enumerate(stages)
    )
    named["shortcut_2"] = shortcut
    for i, block in enumerate((one, two, (norm_a, (), *branch), last)):
        named |= dict(zip((f"norm_{i}a", f"conv_{i}a", f"norm_{i}b", f"conv_{i}b"), filter(None, block), strict=True))
    return named


def _attention(attention: dict[str, Any], heads: int) -> dict[str, Any]:
    """Split the width of fnn's kernels into Linen's heads."""
    width = len(attention["out"]["kernel"])
    size = width // heads
    split = {
        name: {"kernel": p["kernel"].reshape(width, heads, size), "bias": p["bias"].reshape(heads, size)}
        for name, p in attention.items()
        if name != "out"
    }
    out = attention["out"]
    return split | {"out": {"kernel": out["kernel"].reshape(heads, size, width), "bias": out["bias"]}}


def _part(kind: str, name: str, params: Any, heads: int) -> dict[str, Any]:
    """Name one of a block's parts, (norm, {kind: what it does})."""
    norm, inner = params
    named = {f"norm_{name}": norm}
    if kind == "feed_forward":
        first, _gelu, second = inner[kind]
        return named | {f"in_{name}": first, f"out_{name}": second}
    return named | {f"attend_{name}": _attention(inner[kind] if kind == "cross" else inner[kind][0], heads)}


def _attend(name: str, size: Size, dtype: str, x: Any, mask: Any = None, source: Any = None) -> Any:
    from flax import linen

    a = linen.LayerNorm(dtype=dtype, name=f"norm_{name}")(x)
    attend = linen.MultiHeadDotProductAttention(size.heads, dtype=dtype, name=f"attend_{name}")
    return x + attend(a, a if source is None else source, mask=mask)


def _feed(name: str, size: Size, dtype: str, x: Any) -> Any:
    from flax import linen

    a = linen.Dense(4 * size.width, dtype=dtype, name=f"in_{name}")(
        linen.LayerNorm(dtype=dtype, name=f"norm_{name}")(x)
    )
    return x + linen.Dense(size.width, dtype=dtype, name=f"out_{name}")(linen.gelu(a, approximate=False))


def transformer_linen(size: Size = SMALL, dtype: str = "float32") -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            table = linen.Embed(size.vocabulary, size.width, dtype=dtype, name="table")
            h = table(x) + self.param("places", linen.initializers.zeros, (size.length, size.width)).astype(dtype)
            mask = linen.make_causal_mask(x)
            for i in range(size.layers):
                h = _feed(f"feed{i}", size, dtype, _attend(f"self{i}", size, dtype, h, mask))
            return table.attend(linen.LayerNorm(dtype=dtype, name="norm")(h))

    return Net()


def transformer_weights(params: Any, heads: int = SMALL.heads) -> dict[str, Any]:
    places, trunk, norm, *_ = params["body"]
    named: dict[str, Any] = {"table": {"embedding": params["embedding"]}, "places": places["embedding"], "norm": norm}
    for i, (attention, forward) in enumerate(trunk["trunk"]):
        named |= _part("attention", f"self{i}", attention, heads) | _part("feed_forward", f"feed{i}", forward, heads)
    return named


def translator_linen() -> Any:
    from flax import linen

    size, dtype = SMALL, "float32"

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            table = linen.Embed(size.vocabulary, size.width, name="table")
            source, target = (
                table(x[n]) + self.param(f"places_{n}", linen.initializers.zeros, (size.length, size.width))
                for n in ("source", "target")
            )
            for i in range(size.layers // 2):
                source = _feed(f"read_feed{i}", size, dtype, _attend(f"read_self{i}", size, dtype, source))
            source, mask = linen.LayerNorm(name="read_norm")(source), linen.make_causal_mask(x["target"])
            for i in range(size.layers // 2):
                target = _attend(f"self{i}", size, dtype, target, mask)
                target = _attend(f"cross{i}", size, dtype, target, source=source)
                target = _feed(f"feed{i}", size, dtype, target)
            return table.attend(linen.LayerNorm(name="norm")(target))

    return Net()


def translator_weights(params: Any) -> dict[str, Any]:
    heads = SMALL.heads
    first, trunk, _, norm, *_ = params["body"]
    (places, encoder, read_norm), (target,) = first["source"], first["target"]
    named: dict[str, Any] = {"table": {"embedding": params["embedding"]}, "norm": norm, "read_norm": read_norm}
    named |= {"places_source": places["embedding"], "places_target": target["embedding"]}
    for i, (attention, forward) in enumerate(encoder["encoder"]):
        named |= _part("attention", f"read_self{i}", attention, heads) | _part(
            "feed_forward", f"read_feed{i}", forward, heads
        )
    for i, (see, (before, cross), feed) in enumerate(trunk["trunk"]):
        (attention,), (norm,), (forward,) = see["target"], before["target"], feed["target"]
        named |= _part("attention", f"self{i}", attention, heads) | _part("feed_forward", f"feed{i}", forward, heads)
        named |= _part("cross", f"cross{i}", (norm, cross), heads)
    return named


def recurrent_linen(cell: str) -> Callable[[], Any]:
    def net() -> Any:
        from flax import linen

        kind = linen.OptimizedLSTMCell if cell == "lstm" else linen.GRUCell

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x):
                h = linen.RNN(kind(SMALL.width, name="cell"))(x)
                return linen.Dense(10, name="output")(h[:, -1])

        return Net()

    return net


def lstm_weights(params: Any) -> dict[str, Any]:
    ((cell,), *_middle, output) = params
    parts = [np.split(cell[name], 4, axis=-1) for name in ("kernel", "recurrent_kernel", "bias")]
    named = {f"i{gate}": {"kernel": w} for gate, w in zip("ifgo", parts[0], strict=True)}
    named |= {f"h{gate}": {"kernel": u, "bias": b} for gate, u, b in zip("ifgo", *parts[1:], strict=True)}
    return {"cell": named, "output": output}


def gru_weights(params: Any) -> dict[str, Any]:
    ((cell,), *_middle, output) = params
    kernels, recurrent, biases = (np.split(cell[n], 3, axis=-1) for n in ("kernel", "recurrent_kernel", "bias"))
    named = {f"i{g}": {"kernel": w, "bias": b} for g, w, b in zip("rzn", kernels, biases, strict=True)}
    named |= {f"h{g}": {"kernel": u} for g, u in zip("rzn", recurrent, strict=True)}
    named["hn"]["bias"] = cell["recurrent_bias"]
    return {"cell": named, "output": output}
