"""Flax Linen's nets of the suite `models`, and how fnn's weights go over into them."""

from collections.abc import Callable
from typing import Any

import numpy as np

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 64, 64, 128, 4, 4


def convnet_linen() -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i, channels in enumerate((32, 32, 64, 64)):
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
            for i, (channels, stride) in enumerate(((16, 1), (16, 1), (32, 2), (32, 1))):
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


def _attention(attention: dict[str, Any]) -> dict[str, Any]:
    """Split the width of fnn's kernels into Linen's heads."""
    size = WIDTH // HEADS
    split = {
        name: {"kernel": p["kernel"].reshape(WIDTH, HEADS, size), "bias": p["bias"].reshape(HEADS, size)}
        for name, p in attention.items()
        if name != "out"
    }
    out = attention["out"]
    return split | {"out": {"kernel": out["kernel"].reshape(HEADS, size, WIDTH), "bias": out["bias"]}}


def _part(kind: str, name: str, params: Any) -> dict[str, Any]:
    """Name one of a block's parts, (norm, {kind: what it does})."""
    norm, inner = params
    named = {f"norm_{name}": norm}
    if kind == "feed_forward":
        first, _gelu, second = inner[kind]
        return named | {f"in_{name}": first, f"out_{name}": second}
    return named | {f"attend_{name}": _attention(inner[kind] if kind == "cross" else inner[kind][0])}


def _attend(name: str, x: Any, mask: Any = None, source: Any = None) -> Any:
    from flax import linen

    a = linen.LayerNorm(name=f"norm_{name}")(x)
    return x + linen.MultiHeadDotProductAttention(HEADS, name=f"attend_{name}")(
        a, a if source is None else source, mask=mask
    )


def _feed(name: str, x: Any) -> Any:
    from flax import linen

    a = linen.gelu(
        linen.Dense(4 * WIDTH, name=f"in_{name}")(linen.LayerNorm(name=f"norm_{name}")(x)), approximate=False
    )
    return x + linen.Dense(WIDTH, name=f"out_{name}")(a)


def transformer_linen() -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            table = linen.Embed(VOCABULARY, WIDTH, name="table")
            h = table(x) + self.param("places", linen.initializers.zeros, (LENGTH, WIDTH))
            mask = linen.make_causal_mask(x)
            for i in range(LAYERS):
                h = _feed(f"feed{i}", _attend(f"self{i}", h, mask))
            return table.attend(linen.LayerNorm(name="norm")(h))

    return Net()


def transformer_weights(params: Any) -> dict[str, Any]:
    places, trunk, norm, *_ = params["body"]
    named: dict[str, Any] = {"table": {"embedding": params["embedding"]}, "places": places["embedding"], "norm": norm}
    for i, (attention, forward) in enumerate(trunk["trunk"]):
        named |= _part("attention", f"self{i}", attention) | _part("feed_forward", f"feed{i}", forward)
    return named


def translator_linen() -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            table = linen.Embed(VOCABULARY, WIDTH, name="table")
            source, target = (
                table(x[n]) + self.param(f"places_{n}", linen.initializers.zeros, (LENGTH, WIDTH))
                for n in ("source", "target")
            )
            for i in range(LAYERS // 2):
                source = _feed(f"read_feed{i}", _attend(f"read_self{i}", source))
            source, mask = linen.LayerNorm(name="read_norm")(source), linen.make_causal_mask(x["target"])
            for i in range(LAYERS // 2):
                target = _attend(f"cross{i}", _attend(f"self{i}", target, mask), source=source)
                target = _feed(f"feed{i}", target)
            return table.attend(linen.LayerNorm(name="norm")(target))

    return Net()


def translator_weights(params: Any) -> dict[str, Any]:
    first, trunk, _, norm, *_ = params["body"]
    (places, encoder, read_norm), (target,) = first["source"], first["target"]
    named: dict[str, Any] = {"table": {"embedding": params["embedding"]}, "norm": norm, "read_norm": read_norm}
    named |= {"places_source": places["embedding"], "places_target": target["embedding"]}
    for i, (attention, forward) in enumerate(encoder["encoder"]):
        named |= _part("attention", f"read_self{i}", attention) | _part("feed_forward", f"read_feed{i}", forward)
    for i, (see, (before, cross), feed) in enumerate(trunk["trunk"]):
        (attention,), (norm,), (forward,) = see["target"], before["target"], feed["target"]
        named |= _part("attention", f"self{i}", attention) | _part("feed_forward", f"feed{i}", forward)
        named |= _part("cross", f"cross{i}", (norm, cross))
    return named


def recurrent_linen(cell: str) -> Callable[[], Any]:
    def net() -> Any:
        from flax import linen

        kind = linen.OptimizedLSTMCell if cell == "lstm" else linen.GRUCell

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x):
                h = linen.RNN(kind(WIDTH, name="cell"))(x)
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
