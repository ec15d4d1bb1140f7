"""Weights from PyTorch and back: outputs equal PyTorch's formulas in NumPy, and PyTorch itself where it is installed."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import assert_same
from torch_formulas import attention, batch_norm, conv2d, conv_transpose2d, layer_norm, linear, recurrent

import fnn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def drawn(*shape):
    return np.float32(RNG.normal(size=shape) * 0.5)


class Case(NamedTuple):
    net: fnn.Layer
    entries: dict[str, np.ndarray]
    x: Any
    """fnn's input, channels last."""
    forward: Callable[[dict[str, np.ndarray], Any], Any]
    """PyTorch's formulas in NumPy, of an input channels first; what comes back is channels first too."""
    module: Callable[[Any], Any]
    """Makes the module from `torch.nn`."""


def first(x):
    """Put channels first."""
    return np.moveaxis(x, -1, 1) if np.asarray(x).ndim > 3 else x


def image_net():
    """Conv, batch norm, a transposed conv with as many channels in as out, flatten, a norm of flat units, linear."""
    net = fnn.serial(
        fnn.conv(3, (3, 2), padding="valid"),
        fnn.batch_norm(),
        fnn.activation("relu"),
        fnn.conv_transpose(3, 2, stride=2, padding="valid"),
        fnn.flatten(),
        fnn.layer_norm(eps=1e-5),
        fnn.dense(4),
    )
    size = 3 * 6 * 6
    entries = {
        "0.weight": drawn(3, 2, 3, 2),
        "0.bias": drawn(3),
        "1.weight": drawn(3),
        "1.bias": drawn(3),
        "1.running_mean": drawn(3),
        "1.running_var": 0.5 + drawn(3) ** 2,
        "1.num_batches_tracked": np.array(7),
        "3.weight": drawn(3, 3, 2, 2),
        "3.bias": drawn(3),
        "5.weight": drawn(size),
        "5.bias": drawn(size),
        "6.weight": drawn(4, size),
        "6.bias": drawn(4),
    }

    def forward(w, x):
        h = np.maximum(batch_norm(w, "1", conv2d(w, "0", x)), 0)
        return linear(w, "6", layer_norm(w, "5", conv_transpose2d(w, "3", h, 2).reshape(len(x), -1)))

    def module(nn):
        return nn.Sequential(
            *(nn.Conv2d(2, 3, (3, 2)), nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 3, 2, stride=2)),
            *(nn.Flatten(), nn.LayerNorm(size), nn.Linear(size, 4)),
        )

    return Case(net, entries, drawn(2, 5, 4, 2), forward, module)


def plain_convs():
    """Twelve equal convs in a stack, whose names sort as 0, 1, 10, 11, 2, ..., and a bottleneck with groups."""
    net = fnn.serial(fnn.conv(4, 3, groups=2), fnn.repeat(fnn.conv(4, 1, bias=False), 12), fnn.global_avg_pool())
    names = ["stem", *(f"body.{i}" for i in range(12))]
    entries = {"stem.weight": drawn(4, 1, 3, 3), "stem.bias": drawn(4)} | {
        f"{name}.weight": drawn(4, 4, 1, 1) + np.float32(np.eye(4)[..., None, None]) for name in names[1:]
    }

    def forward(w, x):
        halves = [{"a.weight": w["stem.weight"][i : i + 2]} for i in (0, 2)]
        h = np.concatenate([conv2d(half, "a", x[:, i : i + 1], 1) for i, half in enumerate(halves)], 1)
        h = h + w["stem.bias"][:, None, None]
        for name in names[1:]:
            h = conv2d(w, name, h)
        return h.mean((2, 3))

    def module(nn):
        import collections

        body = nn.Sequential(*(nn.Conv2d(4, 4, 1, bias=False) for _ in range(12)))
        parts = [("stem", nn.Conv2d(2, 4, 3, padding=1, groups=2)), ("body", body)]
        return nn.Sequential(
            collections.OrderedDict([*parts, ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())])
        )

    return Case(net, entries, drawn(2, 4, 4, 2), forward, module)


def recurrent_net(kind, bias):
    """Two layers, both ways: l0, l0_reverse, l1, l1_reverse."""
    make = {"rnn": fnn.rnn, "gru": fnn.gru, "lstm": fnn.lstm}[kind]
    net = fnn.serial(*[fnn.bidirectional(make(3), make(3, reverse=True)) for _ in range(2)])
    gates, entries = {"rnn": 1, "gru": 3, "lstm": 4}[kind], {}
    for layer, direction in itertools.product((0, 1), ("", "_reverse")):
        tag = f"l{layer}{direction}"
        entries |= {f"weight_ih_{tag}": drawn(3 * gates, 6 if layer else 5), f"weight_hh_{tag}": drawn(3 * gates, 3)}
        entries |= {f"bias_{side}_{tag}": drawn(3 * gates) for side in ("ih", "hh") if bias}

    def forward(w, x):
        w = {f".{name}": a for name, a in w.items()}
        for layer in ("l0", "l1"):
            x = np.concatenate([recurrent(w, "", x, kind, layer, reverse) for reverse in (False, True)], -1)
        return x

    def module(nn):
        one = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind]
        return one(5, 3, num_layers=2, bidirectional=True, batch_first=True, bias=bias)

    return Case(net, entries, drawn(2, 4, 5), forward, module)


def attention_net():
    net = fnn.attention(2)
    entries = {"in_proj_weight": drawn(24, 8), "in_proj_bias": drawn(24)}
    entries |= {"out_proj.weight": drawn(8, 8), "out_proj.bias": drawn(8)}

    def module(nn):
        inner = nn.MultiheadAttention(8, 2, batch_first=True)
        inner.forward_ = lambda x: inner(x, x, x)[0]
        return inner

    return Case(net, entries, drawn(2, 5, 8), lambda w, x: attention(w, "", x, x, 2), module)


def cross_net():
    x = {"source": drawn(2, 4, 6), "target": drawn(2, 3, 8)}
    entries = {"q_proj_weight": drawn(8, 8), "k_proj_weight": drawn(8, 6), "v_proj_weight": drawn(8, 6)}
    entries |= {"in_proj_bias": drawn(24), "out_proj.weight": drawn(8, 8), "out_proj.bias": drawn(8)}

    def module(nn):
        inner = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        inner.forward_ = lambda x: inner(x["target"], x["source"], x["source"])[0]
        return inner

    return Case(fnn.cross_attention(2), entries, x, lambda w, x: attention(w, "", x["target"], x["source"], 2), module)


def encoder_layer():
    """TransformerEncoderLayer, which registers its norms behind both products: by their kind they are paired all the same."""
    norm = fnn.layer_norm(eps=1e-5)
    feed = fnn.serial(fnn.dense(16), fnn.activation("relu"), fnn.dense(8))
    block = fnn.serial(fnn.residual(fnn.attention(2)), norm, fnn.residual(feed), norm)
    entries = {}
    for i in range(2):
        entries |= {
            f"layers.{i}.{name}": drawn(*shape)
            for name, shape in {
                "self_attn.in_proj_weight": (24, 8),
                "self_attn.in_proj_bias": (24,),
                "self_attn.out_proj.weight": (8, 8),
                "self_attn.out_proj.bias": (8,),
                "linear1.weight": (16, 8),
                "linear1.bias": (16,),
                "linear2.weight": (8, 16),
                "linear2.bias": (8,),
                "norm1.weight": (8,),
                "norm1.bias": (8,),
                "norm2.weight": (8,),
                "norm2.bias": (8,),
            }.items()
        }

    def forward(w, x):
        for i in range(2):
            at = f"layers.{i}."
            x = layer_norm(w, f"{at}norm1", x + attention(w, f"{at}self_attn.", x, x, 2))
            x = layer_norm(w, f"{at}norm2", x + linear(w, f"{at}linear2", np.maximum(linear(w, f"{at}linear1", x), 0)))
        return x

    def module(nn):
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )

    return Case(fnn.repeat(block, 2), entries, drawn(2, 5, 8), forward, module)


def words_net():
    """An embedding and an output layer without bias: two entries of one shape, of which only one is transposed."""
    net = fnn.serial(
        fnn.embed(5, 5), fnn.lstm(5), fnn.take_last(), fnn.group_norm(1, eps=1e-5), fnn.dense(5, bias=False)
    )
    entries = {"embedding.weight": drawn(5, 5), "lstm.weight_ih_l0": drawn(20, 5), "lstm.weight_hh_l0": drawn(20, 5)}
    entries |= {"lstm.bias_ih_l0": drawn(20), "lstm.bias_hh_l0": drawn(20)}
    entries |= {"norm.weight": drawn(5), "norm.bias": drawn(5), "head.weight": drawn(5, 5)}

    def forward(w, x):
        h = recurrent(w, "lstm", w["embedding.weight"][x], "lstm")[:, -1]
        return linear(w, "head", layer_norm(w, "norm", h))

    def module(nn):
        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.lstm = nn.Embedding(5, 5), nn.LSTM(5, 5, batch_first=True)
                self.norm, self.head = nn.GroupNorm(1, 5), nn.Linear(5, 5, bias=False)

            def forward(self, x):
                return self.head(self.norm(self.lstm(self.embedding(x))[0][:, -1]))

        return Words()

    return Case(net, entries, RNG.integers(0, 5, (3, 4)), forward, module)


CASES = {
    "images": image_net(),
    "stack": plain_convs(),
    **{
        f"{kind}{'' if bias else '_without_bias'}": recurrent_net(kind, bias)
        for kind in ("rnn", "gru", "lstm")
        for bias in (True, False)
    },
    "attention": attention_net(),
    "cross_attention": cross_net(),
    "encoder": encoder_layer(),
    "words": words_net(),
}
every = pytest.mark.parametrize("name", CASES)


def ours(case, entries):
    params, state, report = fnn.weights.from_torch(entries, case.net, case.x)
    y, _ = jax.jit(case.net.apply)(params, state, case.x)
    return np.asarray(y), params, state, report


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("gru_without_bias", "lstm_without_bias"))) for n in CASES],
)
def test_outputs_equal_the_formulas_of_pytorch(name):
    case = CASES[name]
    y, params, state, report = ours(case, case.entries)
    wide = {n: a.astype(np.float64) for n, a in case.entries.items()}
    expected = case.forward(wide, jax.tree.map(first, case.x))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    assert len(report) == len({path for path, *_ in report})
    # And back, into the same names: what was summed comes back as one.
    back = fnn.weights.to_torch(params, state, like=case.entries)
    assert list(back) == list(case.entries)
    np.testing.assert_allclose(case.forward(back, jax.tree.map(first, case.x)), expected, rtol=0, atol=1e-5)
    again, *_ = fnn.weights.from_torch(back, case.net, case.x)
    assert_same(again, params)
    for entry, a in back.items():
        if "bias" not in entry:
            np.testing.assert_array_equal(a, case.entries[entry])
    # Names of fnn's own, of which PyTorch's modules know the last parts.
    plain = fnn.weights.to_torch(params, state)
    once_more, same, _ = fnn.weights.from_torch(plain, case.net, case.x)
    assert_same((once_more, same), (params, state))


@every
def test_outputs_equal_pytorch(name):
    torch = pytest.importorskip("torch")
    case = CASES[name]

    def run(entries):
        module = case.module(torch.nn).eval()
        module.load_state_dict({n: torch.tensor(np.asarray(a)) for n, a in entries.items()})
        given = jax.tree.map(lambda a: torch.tensor(np.ascontiguousarray(first(a))), case.x)
        with torch.no_grad():
            y = getattr(module, "forward_", module)(given)
        return (y[0] if isinstance(y, tuple) else y).numpy(), module.state_dict()

    expected, state_dict = run(case.entries)
    y, params, state, _ = ours(case, state_dict)
    print(f"largest difference {np.max(np.abs(y - expected)):.1e}")
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        run(fnn.weights.to_torch(params, state, like=state_dict))[0], expected, rtol=0, atol=1e-6
    )
