"""Finite width without expansion: error signals of random nets, drawn layer by layer, most of their weights never.

Setting and names as in `meanfield`. Two facts make this exact and cheap. W acts forward on the examples' few activations
X alone, so W X is normal given X. And what W does on the way back, given W X, is known along X and fresh across it:
`W^T delta = Q (W Q)^T delta + (1 - Q Q^T) g` with Q an orthonormal basis of X and g normal (Hanin and Nica 2018 have the
case of ReLU). A layer of width n costs n·B normal numbers for B examples, instead of n².
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fnn import check, lowering
from fnn.layers import activations
from fnn.layers.activations import Activation
from fnn.theory import gaussian, maps

EPS = {"none": 0.0, "batch_norm": 1e-5, "layer_norm": 1e-6, "rms_norm": 1e-6}
"""What fnn's norms add to the variance that they divide by."""
MOST_NUMBERS = 2**16, 2**24
"""Numbers in one array, and in all that a chunk of nets keeps for its backward pass."""
Norm = Literal["none", "batch_norm", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class Net:
    """A net of `depth` hidden layers and an output layer; with `residual=a` layers 2..depth are `x + a phi(norm(W x + b))`.

    Errors: ValueError for an activation without Gaussian integrals and an unknown norm.
    """

    activation: str | Callable[..., jax.Array]
    depth: int
    width: int
    _: KW_ONLY
    outputs: int = 1
    sigma_w: float = 1.0
    sigma_b: float = 0.0
    norm: Norm = "none"
    residual: float | None = None

    def __post_init__(self):
        check.positive("meanfield.Net", depth=self.depth, width=self.width, outputs=self.outputs)
        check.at_least_zero("meanfield.Net", sigma_w=self.sigma_w, sigma_b=self.sigma_b)
        check.choice("meanfield.Net", EPS, norm=self.norm)
        object.__setattr__(self, "activation", gaussian.elementwise("meanfield.Net", self.activation))

    @property
    def phi(self) -> Activation:
        """The activation itself."""
        return activations.get(self.activation)


class Drawn(NamedTuple):
    """Logs (natural) of the root mean over examples of |delta_l|, each float64[draws, depth]."""

    error: np.ndarray
    """of dL/dh_l, at the pre-activations"""
    trunk: np.ndarray
    """of dL/dx_l, at the output of layer l, which in a residual net is the sum"""


def draw(
    net: Net,
    covariance: np.ndarray,
    error: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    draws: int = 64,
    seed: int = 0,
) -> Drawn:
    """Draw `draws` random nets and return the logs of their error signals.

    `covariance`: float[B, B] is that of the examples' h_1, over its units: sigma_w² x·x'/d + sigma_b². `error` maps the
    output layer's values, float[draws, B, outputs], to the gradient of each example's own loss by them; by default the
    loss is the output itself. The same seed gives the same numbers.

    Guarantees: exact in distribution for true normal weights, at any width, depth and number of examples, with the norms'
    own eps. In float32 where the forward pass stays far inside its range, otherwise in float64; a net that leaves that
    too has NaN or infinite logs. Errors: ValueError for batch norm of one example.
    """
    check.positive("meanfield.draw", draws=draws)
    covariance = np.asarray(covariance, np.float64)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"meanfield.draw: covariance must be float[B, B], got {check.describe(covariance)}")
    examples, depth, width = len(covariance), net.depth, net.width
    if net.norm == "batch_norm" and examples < 2:
        raise ValueError("meanfield.draw: batch norm needs at least two examples, got one; pass their joint covariance")
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))  # covariance = root root^T
    rank = min(examples, width)
    kept = depth * width * (3 * examples + (width if _whole(examples, width) else rank))
    size = min(draws, max(1, MOST_NUMBERS[0] // (examples * width)), max(1, MOST_NUMBERS[1] // kept))
    dtype, rng, parts = _dtype(net, covariance), np.random.Generator(np.random.SFC64(seed)), []
    with np.errstate(all="ignore"):
        for _ in range(-(-draws // size)):  # the last chunk is whole too: phi compiles once for each shape
            first = _normal(rng, (size, width, examples), dtype) @ root.T.astype(dtype)
            h, tape = np.ascontiguousarray(first.swapaxes(1, 2)), []
            parts.append(_backward(net, *_forward(net, rng, h, tape), tape, error))
    return Drawn(*(np.concatenate(logs)[:draws] for logs in zip(*parts, strict=True)))


def interval(logs: np.ndarray, share: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the mean over draws, and the interval in which one more net lies with probability `share`.

    logs: float64[draws, ...]. Student's prediction interval, `mean ± t s sqrt(1 + 1/draws)`: exact for normal logs,
    whatever the number of draws. Nets without a gradient (-inf) are left out.
    """
    from scipy.special import stdtrit

    finite = np.isfinite(logs)
    count = finite.sum(axis=0)
    with np.errstate(all="ignore"):
        mean = np.where(finite, logs, 0.0).sum(axis=0) / count
        spread = np.sqrt((np.where(finite, logs - mean, 0.0) ** 2).sum(axis=0) / (count - 1))
        reach = stdtrit(count - 1.0, 0.5 + share / 2) * spread * np.sqrt(1 + 1 / count)
    return mean, mean - reach, mean + reach


class _Weights(NamedTuple):
    """A layer's W as far as the forward pass has seen it: `W = Q G` and what is fresh across Q; Q = None is all of R^n."""

    basis: np.ndarray | None
    """Q: [draws, n, rank]"""
    seen: np.ndarray
    """G: [draws, rank, outputs]; both W and G are in units of `scale`"""
    scale: float

    def back(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Compute W delta for each example: [draws, B, outputs] -> [draws, B, n]."""
        delta = delta * np.asarray(self.scale, delta.dtype)
        along = delta @ self.seen.swapaxes(1, 2)
        if self.basis is None:
            return along
        _, factor = _orthonormal(delta)
        n = self.basis.shape[1]
        fresh = factor @ _normal(rng, (len(delta), factor.shape[2], n), delta.dtype)
        return fresh + (along - fresh @ self.basis) @ self.basis.swapaxes(1, 2)


def _weights(rng: np.random.Generator, x: np.ndarray, outputs: int, sigma_w: float) -> tuple[np.ndarray, _Weights]:
    """Draw what a layer does to its inputs x: [draws, B, n]; return x W and the weights so far."""
    draws, examples, n = x.shape
    scale = sigma_w / math.sqrt(n)
    x = x * np.asarray(scale, x.dtype)
    if _whole(examples, n):
        seen = _normal(rng, (draws, n, outputs), x.dtype)
        return x @ seen, _Weights(None, seen, scale)
    basis, factor = _orthonormal(x)
    seen = _normal(rng, (draws, basis.shape[2], outputs), x.dtype)
    return factor @ seen, _Weights(basis, seen, scale)


def _whole(examples: int, n: int) -> bool:
    """Whether the whole W is drawn: it costs no more than its parts."""
    return 2 * examples >= n


def _orthonormal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write x: [draws, B, n] as factor: [draws, B, rank] times the transpose of an orthonormal basis: [draws, n, rank]."""
    if x.shape[1] == 1:
        largest = np.max(np.abs(x), axis=2, keepdims=True)  # the square of a small x would underflow
        size = largest * np.sqrt(np.sum((x / np.where(largest > 0, largest, 1)) ** 2, axis=2, keepdims=True))
        return (x / np.where(size > 0, size, 1)).swapaxes(1, 2), size
    basis, factor = np.linalg.qr(x.swapaxes(1, 2))
    return basis, factor.swapaxes(1, 2)


def _forward(
    net: Net, rng: np.random.Generator, h: np.ndarray, tape: list[Any]
) -> tuple[np.ndarray, _Weights, np.random.Generator]:
    """Run the layers from h_1 on, note them on the tape, and return the outputs and their weights."""
    sides = gaussian.one_sided_slopes(net.phi)
    free = sides is not None and net.norm == "none" and not net.sigma_b  # then the scale of x does not matter
    x: Any = None
    size: Any = 1.0
    for layer in range(net.depth):
        weights = None
        if layer:
            h, weights = _weights(rng, x, h.shape[2], net.sigma_w)
            if net.sigma_b:
                h = h + net.sigma_b * _normal(rng, (len(h), 1, h.shape[2]), h.dtype)
        z, divisor = _normed(net.norm, h)
        value, slope = _evaluate(net.phi, z)
        if layer and net.residual is not None:
            value, slope = x + net.residual * value, net.residual * slope
        x = value
        if free:
            scale = np.sqrt(np.mean(x**2, axis=(1, 2), keepdims=True))
            x, size = x / np.where(scale > 0, scale, 1), size * scale
        tape.append((weights, slope, None if divisor is None else z, divisor))
    out, weights = _weights(rng, x, net.outputs, net.sigma_w)
    if net.sigma_b:
        out = out + net.sigma_b * _normal(rng, (len(out), 1, net.outputs), out.dtype)
    return out * size, weights, rng


def _backward(
    net: Net,
    out: np.ndarray,
    weights: _Weights,
    rng: np.random.Generator,
    tape: list[Any],
    error: Callable[[np.ndarray], np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Follow the error signals down the tape; |.| is taken out at each layer, so that nothing leaves the range."""
    delta = np.ones_like(out) if error is None else np.asarray(error(out), out.dtype)
    depth, draws = len(tape), len(out)
    logs, trunk, total = np.empty((draws, depth)), np.empty((draws, depth)), np.zeros(draws)
    back: Any = 0.0

    def rms(a):
        return np.sqrt(np.einsum("rbn,rbn->r", a, a) / a.shape[1])

    for layer in reversed(range(depth)):
        above, (weights_below, slope, z, divisor) = weights.back(delta, rng), tape[layer]
        back = above + (back if net.residual is not None else 0.0)
        size = rms(back)
        total += np.log(size)
        trunk[:, layer] = total
        back = back / np.where(size > 0, size, 1).astype(back.dtype)[:, None, None]
        delta = slope * back
        if z is not None:
            delta = _normed_back(net.norm, delta, z, divisor)
        logs[:, layer] = total + np.log(rms(delta))
        weights = weights_below
    return logs, trunk


def _normed(norm: str, h: np.ndarray) -> tuple[np.ndarray, Any]:
    """Normalise, and return what h was divided by; None without norm."""
    if norm == "none":
        return h, None
    axis = 1 if norm == "batch_norm" else 2
    if norm != "rms_norm":
        h = h - h.mean(axis=axis, keepdims=True)
    divisor = np.sqrt(np.mean(h**2, axis=axis, keepdims=True) + EPS[norm])
    return h / divisor, divisor


def _normed_back(norm: str, g: np.ndarray, z: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """Take a gradient through a norm: (g - mean(g) - z mean(g z))/divisor; rms_norm takes no mean away."""
    axis = 1 if norm == "batch_norm" else 2
    g = (
        g
        - z * np.mean(g * z, axis=axis, keepdims=True)
        - (0.0 if norm == "rms_norm" else np.mean(g, axis=axis, keepdims=True))
    )
    return g / divisor


def _dtype(net: Net, covariance: np.ndarray) -> Any:
    """Choose float32 where all variances, here and at infinite width, keep well inside of its range."""
    q = np.diag(covariance)
    if net.norm == "none" and gaussian.one_sided_slopes(net.phi) is None:
        start = float(np.mean(q))
        q = np.append(q, maps.trajectory(net.phi, net.sigma_w, net.sigma_b, net.depth, start, net.residual))
    return np.float32 if np.all((q > 1e-20) & (q < 1e20)) else np.float64


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype, copy=False)


def _evaluate(phi: Activation, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate phi and phi' in the dtype of h, on the host."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(lowering.host()):
        value, slope = gaussian.compiled(phi)(h)
        return np.asarray(value), np.asarray(slope)
