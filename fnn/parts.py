"""What the models share: norms by name, and lists of layers that are empty where an option is off."""

from collections.abc import Callable
from math import isfinite

import jax

from fnn import check, core, lowering
from fnn.core import Layer
from fnn.layers import activations, norm
from fnn.layers import dense as layers
from fnn.layers.taps import tap

NORMS: dict[str, Callable[[], Layer]] = {
    "batch_norm": norm.batch_norm,
    "layer_norm": norm.layer_norm,
    "rms_norm": norm.rms_norm,
}
Named = str | Callable[..., jax.Array]
"""An activation or an initialiser: its name, or a function."""


def normed(who: str, kind: str | Layer | None) -> list[Layer]:
    """List the norm, if there is one; refuse a name that none has."""
    if isinstance(kind, Layer):
        return [kind]
    if kind is None:
        return []
    check.choice(who, [*NORMS, "none"], norm=kind)
    return [] if kind == "none" else [NORMS[kind]()]


def tapped(taps: bool, name: str) -> list[Layer]:
    """List a tap with this name, if taps are wanted."""
    return [core.named(name, tap(role=name))] if taps else []


def activated(phi: activations.Activation, taps: bool) -> list[Layer]:
    """List the activation and its tap, which counts saturated units where phi is bounded."""
    bounds = phi.bounds if all(isinstance(end, jax.Array) or isfinite(end) for end in phi.bounds) else None
    return [
        layers.activation(phi),
        *([core.named("activation", tap(bounds=bounds, role="activation"))] if taps else []),
    ]


def dropped(rate: float) -> list[Layer]:
    """List dropout, if its rate is above zero."""
    return [layers.dropout(rate)] if rate else []


def repeated(block: Layer, n: int, unroll: int | bool | None = None, checkpoint: int | None = None) -> list[Layer]:
    """List `repeat(block, n)`, if n is above zero.

    By default up to 16 blocks are unrolled, which runs faster; more are scanned, which compiles in constant time.
    """
    times = unroll if unroll is not None else True if n <= lowering.UNROLLED else 1
    return [core.repeat(block, n, unroll=times, checkpoint=checkpoint)] if n else []
