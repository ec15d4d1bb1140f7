"""The nets that studies and benchmarks use."""

from collections.abc import Callable
from typing import Any

from fnn import activations, check, core, initializers, layers, norm
from fnn.core import Layer
from fnn.taps import tap

NORMS: dict[str, Callable[[], Layer]] = {
    "batch_norm": norm.batch_norm,
    "layer_norm": norm.layer_norm,
    "rms_norm": norm.rms_norm,
}


def mlp(
    depth: int,
    width: int,
    classes: int,
    *,
    activation: str | Callable[..., Any] = "relu",
    norm: str | Layer | None = None,
    init: str | Callable[..., Any] = "he_normal",
    bias_init: str | Callable[..., Any] = "zeros",
    residual: bool = False,
    residual_scale: float = 1.0,
    dropout: float = 0.0,
    taps: bool = False,
    unroll: int | bool | None = None,
    checkpoint: int | None = None,
) -> Layer:
    """Build a multilayer perceptron: an input layer, `depth` hidden layers through `repeat`, an output layer.

    x: float[batch, ...] -> logits float[batch, classes]. Input and hidden layers are dense(width), norm, activation,
    dropout, in this order; with `residual` each hidden one is x + residual_scale·f(x). `norm` is a name of `NORMS`, a
    layer, or None ("none").

    `taps=True` puts taps behind every kernel ("preactivation", where dL/dh is measured), every activation
    ("activation") and every residual sum ("sum"), for `gradient_flow` and per-layer metrics.

    `unroll` is `repeat`'s; by default up to 16 hidden layers are unrolled, which is faster to run, and more are
    scanned, which compiles in constant time.
    """
    check.positive("mlp", depth=depth, width=width, classes=classes)
    check.fraction("mlp", dropout=dropout)
    phi = activations.get(activation)
    bounds = phi.bounds if all(map(_finite, phi.bounds)) else None
    kernel_init, bias_init = initializers.get(init), initializers.get(bias_init)

    def dense(n: int) -> list[Layer]:
        kernel = layers.dense(n, kernel_init=kernel_init, bias_init=bias_init)
        return [kernel, *([core.named("preactivation", tap())] if taps else [])]

    hidden = [*dense(width), *_norm(norm), layers.activation(phi)]
    if taps:
        hidden.append(core.named("activation", tap(bounds=bounds)))
    if dropout:
        hidden.append(layers.dropout(dropout))
    block = core.serial(*hidden)
    if residual:
        block = core.residual(block, scale=residual_scale)
        block = core.serial(block, *([core.named("sum", tap())] if taps else []))
    if unroll is None:
        unroll = True if depth <= 16 else 1
    trunk = core.repeat(block, depth, unroll=unroll, checkpoint=checkpoint)
    return core.serial(layers.flatten(), *hidden, core.named("trunk", trunk), *dense(classes))


def _norm(kind: str | Layer | None) -> list[Layer]:
    if kind is None or kind == "none":
        return []
    if isinstance(kind, Layer):
        return [kind]
    check.choice("mlp", [*NORMS, "none"], norm=kind)
    return [NORMS[kind]()]


def _finite(bound: float) -> bool:
    return abs(bound) < float("inf")
