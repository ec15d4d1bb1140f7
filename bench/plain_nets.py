"""The nets of the suite `models` written by hand in plain JAX, from the weights that `bench.nets` names for Linen.

Each function returns `(step, state)` as `bench.handwritten` does: no layers, no optimiser library. Where the dtype is
bfloat16, matrices and what passes between layers are; parameters, statistics and Adam are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.handwritten import State, batch_norm_relu, dense, make_step, start
from bench.nets import BLOCKS, Size

Weights = dict[str, Any]
Step = tuple[Callable[..., Any], State]


def convnet(w: Weights, size: Size, dtype: str) -> Step:
    def forward(params, running, x):
        x, news = x.astype(dtype), {}
        for i in range(4):
            x, news[f"norm_{i}"] = _activated(_conv(params, f"conv_{i}", x), params[f"norm_{i}"], running[f"norm_{i}"])
            if i == 1:
                x = _max_pool(x)
        return dense(params["output"], x.reshape(len(x), -1)), news

    return make_step(forward), start(w, _running(w))


def resnet(w: Weights, size: Size, dtype: str) -> Step:
    def forward(params, running, x):
        news = {}

        def activated(x, name):
            y, news[name] = _activated(x, params[name], running[name])
            return y

        x = _conv(params, "stem", x.astype(dtype))
        for i, (_, stride) in enumerate(BLOCKS):
            h = activated(x, f"norm_{i}a")
            if stride > 1:
                x = _conv(params, f"shortcut_{i}", h, stride)
            h = activated(_conv(params, f"conv_{i}a", h, stride), f"norm_{i}b")
            x = x + _conv(params, f"conv_{i}b", h)
        return dense(params["output"], activated(x, "norm").mean((1, 2))), news

    return make_step(forward), start(w, _running(w))


def transformer(w: Weights, size: Size, dtype: str) -> Step:
    """Decoder with one product for query, key and value, and the fused attention of the card where there is one."""
    attend, params = _attention(size, dtype), dict(w)
    for i in range(size.layers):
        p = params.pop(f"attend_self{i}")
        parts = [p[name] for name in ("query", "key", "value")]
        params[f"qkv{i}"] = {
            "kernel": np.concatenate([part["kernel"].reshape(size.width, -1) for part in parts], 1),
            "bias": np.concatenate([part["bias"].reshape(-1) for part in parts]),
        }
        params[f"out{i}"] = {"kernel": p["out"]["kernel"].reshape(-1, size.width), "bias": p["out"]["bias"]}

    def forward(p, running, tokens):
        table = p["table"]["embedding"].astype(dtype)
        h = table[tokens] + p["places"].astype(dtype)
        for i in range(size.layers):
            qkv = dense(p[f"qkv{i}"], _layer_norm(p[f"norm_self{i}"], h))
            q, k, v = (a.reshape(*h.shape[:2], size.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
            h = h + dense(p[f"out{i}"], attend(q, k, v).reshape(h.shape))
            a = jax.nn.gelu(dense(p[f"in_feed{i}"], _layer_norm(p[f"norm_feed{i}"], h)), approximate=False)
            h = h + dense(p[f"out_feed{i}"], a)
        return _layer_norm(p["norm"], h) @ table.T, running

    return make_step(forward), start(params, ())


def lstm(w: Weights, size: Size, dtype: str) -> Step:
    """One LSTM whose products with the inputs are one product for all positions."""
    cell, gates = w["cell"], "ifgo"
    params = {
        "inputs": np.concatenate([cell[f"i{g}"]["kernel"] for g in gates], 1),
        "recurrent": np.concatenate([cell[f"h{g}"]["kernel"] for g in gates], 1),
        "bias": np.concatenate([cell[f"h{g}"]["bias"] for g in gates]),
        "output": w["output"],
    }

    def forward(p, running, x):
        x, zero = x.astype(dtype), jnp.zeros((len(x), size.width), dtype)
        recurrent = p["recurrent"].astype(dtype)
        along = x.swapaxes(0, 1) @ p["inputs"].astype(dtype) + p["bias"].astype(dtype)

        def body(carry, now):
            h, c = carry
            i, f, g, o = jnp.split(now + h @ recurrent, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        (h, _), _ = jax.lax.scan(body, (zero, zero), along)
        return dense(p["output"], h), running

    return make_step(forward), start(params, ())


NETS: dict[str, Callable[[Weights, Size, str], Step]] = {
    "convnet": convnet,
    "resnet": resnet,
    "transformer": transformer,
    "lstm": lstm,
}


def _running(w: Weights) -> dict[str, Any]:
    norms = {name: p["bias"] for name, p in w.items() if name.startswith("norm")}
    return {name: (np.zeros_like(bias), np.ones_like(bias)) for name, bias in norms.items()}


def _conv(params: Weights, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    kernel = params[name]["kernel"].astype(x.dtype)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)


def _activated(x: jax.Array, p: Weights, running: Any) -> tuple[jax.Array, Any]:
    y, new = batch_norm_relu(x.reshape(-1, x.shape[-1]), p["scale"], p["bias"], running)
    return y.reshape(x.shape), new


def _max_pool(x: jax.Array) -> jax.Array:
    n, height, width, c = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, c).max((2, 4))


def _layer_norm(p: Weights, x: jax.Array) -> jax.Array:
    wide = x.astype(p["scale"].dtype)
    centred = wide - wide.mean(-1, keepdims=True)
    var = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(var + 1e-6) * p["scale"] + p["bias"]).astype(x.dtype)


def _attention(size: Size, dtype: str) -> Callable[..., jax.Array]:
    """Causal attention: cuDNN's where the card and the dtype have it, which one small call finds out."""

    def attend(q, k, v, implementation=None):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    def fused(q, k, v):
        return attend(q, k, v, "cudnn")

    if dtype == "float32" or jax.devices()[0].platform != "gpu":
        return attend
    q = jnp.ones((1, size.length, size.heads, size.width // size.heads), dtype)
    try:
        jax.block_until_ready(jax.jit(jax.grad(lambda q: fused(q, q, q).astype(jnp.float32).sum()))(q))
    except Exception:
        return attend
    return fused
