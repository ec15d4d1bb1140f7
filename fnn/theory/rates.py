"""Rates per layer that batch norm and residual sums give the gradient; setting as in `meanfield`."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from fnn import check
from fnn.layers.activations import Activation
from fnn.theory import gaussian


def batch_norm_rate(activation: str | Callable[..., jax.Array], batch: float) -> float:
    """Compute `E|delta_l|²/E|delta_{l+1}|²` for layers of dense, batch norm, phi (Yang et al. 2019, theorem 7).

    For train mode, biased variance, eps 0, scale 1, bias 0 and infinite width; sigma_w does not matter. With y the normalised
    pre-activations of two examples of the batch B,
    `E[(B-1-y1²) phi'(y1)² + (1 + y1 y2) phi'(y1) phi'(y2)] / ((B-3) E[(phi(y1) - phi(y2))²]/2)`,
    and `E[phi'²]/Var[phi]` under N(0, 1) for `batch = inf`. It holds for a phi with kinks too (ReLU: the closed form
    with arc-cosine kernels). Linear: (B-2)/(B-3). Errors: ValueError for batch < 4, an unknown name, and softmax.
    """
    phi = gaussian.elementwise("batch_norm_rate", activation)
    size = check.number("batch_norm_rate", batch=batch, low=4, high=math.inf)
    if size < math.inf and size != int(size):
        raise ValueError(f"batch_norm_rate: batch must be a whole number or inf, got {batch!r}")
    if size == math.inf:
        m = gaussian.moments(phi, 1.0)
        return m.derivative / (m.second - m.mean**2)
    above, below = batch_normed(phi, size)
    return above / below / (size - 3)


@functools.lru_cache(maxsize=256)
def batch_normed(phi: Activation, size: float) -> tuple[float, float]:
    """Compute the numerator of theorem 7 and E[(phi(y1) - phi(y2))²]/2."""
    if size == math.inf:
        m = gaussian.moments(phi, 1.0)
        return math.nan, m.second - m.mean**2
    alpha, length = math.acos(-1 / (size - 1)), math.sqrt(size - 1)

    def rule(order):
        # y1 = r cos(theta), y2 = r cos(theta - alpha); r = sqrt(B-1) sin(x) turns the density Z^((B-5)/2), singular
        # for B = 4, into cos(x)^(B-4) sin(x).
        edges = np.append(np.arange(0, min(length, 12)), min(length, 12))
        x, w = gaussian.legendre(np.arcsin(edges / length), order)
        w = w * np.sin(x) * np.exp((size - 4) / 2 * np.log1p(-(np.sin(x) ** 2)))
        y1, y2, t = gaussian.rays(alpha, length * np.sin(x), w / w.sum(), 1.0, order)
        (p1, p2), (d1, d2) = gaussian.evaluate(phi, np.stack([y1, y2]))
        own = ((size - 1 - y1**2) * d1**2 + (size - 1 - y2**2) * d2**2) / 2
        return np.array([np.sum(t * (own + (1 + y1 * y2) * d1 * d2)), np.sum(t * (p1 - p2) ** 2) / 2])

    above, below = gaussian.refine(rule)
    return float(above), float(below)


def residual_rate(a: float, sigma_v: float, sigma_w: float, depth: int) -> float:
    """Compute `(1 + a² sigma_v² sigma_w²/2)^depth`, the growth of |x|² and of |delta|² over `x + a V relu(W x)`.

    Exact in the mean at any width, without biases. With a = 1/sqrt(depth) it stays bounded. Errors: ValueError for a
    negative sigma or depth.
    """
    check.non_negative("residual_rate", depth=depth)
    sv = check.number("residual_rate", sigma_v=sigma_v)
    sw = check.number("residual_rate", sigma_w=sigma_w)
    return math.exp(depth * math.log1p((float(a) * sv * sw) ** 2 / 2))
