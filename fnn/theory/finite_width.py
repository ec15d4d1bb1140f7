"""Finite width: how log |delta_l|² varies over random initialisations, to leading order in 1/width.

Setting and names as in `meanfield`. At width n each layer's factor of |delta|² has a standard deviation of order
1/sqrt(n), and the mean of its log an offset of order 1/n. Both add up over layers, so that depth/width says how far a deep
net is from the infinitely wide one (Hanin 2018; Hanin and Rolnick 2018; Hanin and Nica 2018).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fnn import check
from fnn.layers.activations import Activation
from fnn.theory import gaussian

_LINEAR, _FAR = 1e-60, 1e60  # between these variances fourth powers of phi fit in float64; beyond, ratios are limits


class Spread(NamedTuple):
    """Mean and variance over seeds of log |delta_l|² in each layer; each float64[depth]."""

    offset: np.ndarray
    """Mean of log(|delta_l|²/|delta_{l+1}|²) minus its value at infinite width; for the last layer, l+1 is the output"""
    variance: np.ndarray
    """Variance of log |delta_l|² itself, scalar output"""
    variance_from_last: np.ndarray
    """Variance of log(|delta_l|²/|delta_depth|²)"""


def he_relu_log_moments(width: int) -> tuple[float, float]:
    """Compute mean and variance of `log((2/n) chi²_K)`, K ~ Binomial(n, 1/2): one He ReLU layer of width n, exactly.

    |delta_l|² (true normal weights, one example, scalar output, no bias) is a product of independent factors with this
    distribution, one for each of the layers l..L (Hanin and Nica 2018). K = 0, where the net is dead and the log is
    -inf, is left out: it has probability 2^-n. The results are about -5/(2n) and 5/n.
    """
    check.positive("he_relu_log_moments", width=width)
    from scipy.special import digamma, gammaln, polygamma

    k = np.arange(1, width + 1)
    p = np.exp(gammaln(width + 1) - gammaln(k + 1) - gammaln(width - k + 1) - width * math.log(2))
    p, mean = p / p.sum(), digamma(k / 2) + math.log(4 / width)
    return float(p @ mean), float(p @ (polygamma(1, k / 2) + (mean - p @ mean) ** 2))


def he_relu_log_variance(widths: Sequence[int]) -> float:
    """Compute `5 sum(1/n_k)`, about the variance over seeds of log |dL/dW_l|² for *every* l (Hanin and Rolnick 2018).

    `widths` are those of *all* hidden layers; for log |delta_l|² pass those of layers l..L only. It holds for ReLU with
    He's true normal weights, a scalar output, one example and no bias, to leading order (widths of 100 and more; for the
    exact value, sum `he_relu_log_moments`). The mean of the log is lower than the log of the mean by half of this.
    """
    for width in widths:
        check.positive("he_relu_log_variance", width=width)
    return 5 * math.fsum(1 / n for n in widths)


def plain(phi: Activation, sigma_w: float, sigma_b: float, q: np.ndarray, widths: Sequence[int]) -> Spread:
    """Expand log |delta_l|² of a net without norm to order 1/n, for variances q of its layers.

    For one example and true normal weights. Let q^ be the relative deviation of q from infinite width. Given layer l,
    `q^_{l+1} = G q^_l + eta` and `log r_l = log chi_l + A q^_l + A2 q^_l²/2 + eps`, with r_l = |delta_l|²/|delta_{l+1}|².
    G and A are logarithmic derivatives of the length map and of chi by q; eps and eta are means over n units of
    `phi'² z²` (z normal) and of `phi²`. They are correlated, because they are over the same units. So
    `var eps = (3 E[phi'^4]/E[phi'²]² - 1)/n`: 5/n for ReLU, 2/n for linear nets. W_{l+1} acts both forward and backward:
    given h_{l+1}, one of its n directions is known, the one along phi(h_l). That offsets log r_l by
    `E[phi² phi'²]/(E[phi²] E[phi'²]) (R_{l+1} - 1)/n`, where R = E[(h·delta)²]/(var h |delta|²) follows by recursion.
    ReLU's factors are independent and known exactly (`he_relu_log_moments`), with any biases. Otherwise the error is of
    order depth/n². `offset` is useless where R, which can grow with depth (gelu and silu with biases), comes near n.
    Source: this expansion; ReLU: Hanin and Nica 2018.
    """
    depth, n = len(q), np.asarray(widths, float)
    for v in q:
        gaussian.check_continuous("a finite width", phi, float(v))
    slopes = gaussian.one_sided_slopes(phi)
    if slopes is not None and np.min(slopes**2) == 0 < np.max(slopes**2):
        moments = {width: he_relu_log_moments(width) for width in set(widths)}
        offset, variance = np.array([moments[width] for width in widths]).T
        return Spread(offset, tail(variance), tail(variance) - variance[-1])
    # The share of the next layer's variance that comes from the weights; the rest comes from the biases.
    through = sigma_w**2 * np.array([gaussian.moments(phi, float(v)).second for v in q])
    share = through / (through + sigma_b**2) if sigma_b else np.ones(depth)
    grow, bend, lean, curve, own, kick, joint, turn = np.array([_ratios(phi, float(v)) for v in q]).T
    grow, bend, kick, cross = grow * share, bend * share, kick * share**2 / n, joint * share / n

    mean, variance = np.zeros(depth), np.zeros(depth)  # of q^; the first layer's is given by the input
    for i in range(depth - 1):
        mean[i + 1] = grow[i] * mean[i] + bend[i] * variance[i] / 2
        variance[i + 1] = grow[i] ** 2 * variance[i] + kick[i]
    offset = lean * mean + (curve - lean**2) * variance / 2 - own / (2 * n)
    alignment = 1.0  # R, at the output
    for i in reversed(range(depth)):
        offset[i] += (1 + joint[i]) / n[i] * (alignment - 1)
        before = share[i - 1]
        alignment = before * (turn[i] * (alignment - 1) + 1 + 2 * lean[i]) + 1 - before

    def accumulate(lean, own):
        total, noise, response = np.zeros(depth), 0.0, 0.0
        for i in reversed(range(depth)):
            noise += own[i] / n[i] + 2 * response * cross[i] + response**2 * kick[i]
            response = lean[i] + response * grow[i]
            total[i] = response**2 * variance[i] + noise
        return total

    below = np.arange(depth) < depth - 1
    return Spread(offset, accumulate(lean, own), accumulate(lean * below, own * below))


def batch_normed(phi: Activation, batch: float, widths: Sequence[int]) -> Spread:
    """Expand log |delta_l|² under batch norm to order 1/n, with |delta|² summed over the batch.

    One unit adds `|P (phi'(y) g)|²/s²` to |delta|². P removes the mean and y, g is normal with mean 0 over the batch, and s²
    is the variance over the batch by which y was divided. Layers are independent at this order: all examples are alike, so
    a layer can pass on only the scale of its outputs' Gram matrix, and batch norm removes that. The relative variance of
    the sum over n units, `((B-3)/(B-5) E[|.|^4]/E[|.|²]² - 1)/n`, is averaged over fixed draws of y and g, to a few
    percent. For batch < 6 it is infinite, and the result nan. The order 1/n of the *mean* is not known: `offset` only has
    the part that comes from taking the log.
    """
    n = np.asarray(widths, float)
    variance = _batch_norm_variance(phi, min(batch, 1024.0)) * min(1.0, 1024 / batch) / n
    return Spread(-variance / 2, tail(variance), tail(variance) - variance[-1])


@functools.lru_cache(maxsize=256)
def _batch_norm_variance(phi: Activation, batch: float) -> float:
    if batch < 6:
        return math.nan
    size, rng = int(batch), np.random.default_rng(0)
    y, g = rng.normal(size=(2, max(1024, (1 << 19) // size), size))
    y, g = (v - v.mean(axis=1, keepdims=True) for v in (y, g))
    y /= np.sqrt(np.mean(y**2, axis=1, keepdims=True))
    back = gaussian.evaluate(phi, y)[1] * g
    back -= back.mean(axis=1, keepdims=True)
    square = np.sum(back**2, axis=1) - np.sum(back * y, axis=1) ** 2 / size
    return float((size - 3) / (size - 5) * np.mean(square**2) / np.mean(square) ** 2 - 1)


@functools.lru_cache(maxsize=4096)
@np.errstate(all="ignore")
def _ratios(phi: Activation, q: float) -> tuple[float, ...]:
    """Compute the logarithmic derivatives by q and the relative (co)variances of phi² and phi'² that `plain` needs."""
    q = min(max(q, _LINEAR), _FAR)

    def integrands(h, f, d):
        u, f, d = h**2 / q, f**2, d**2
        # dE[F]/dq = E[F (u - 1)]/(2q) and d²E[F]/dq² = E[F (u² - 6u + 3)]/(4q²), so that a kink of phi does no harm.
        first, second = (u - 1) / 2, (u**2 - 6 * u + 3) / 4
        return np.stack([f, d, f * first, f * second, d * first, d * second, d * d, f * f, f * d])

    f, d, f1, f2, d1, d2, dd, ff, fd = gaussian.mean(phi, q, integrands)
    return (
        f1 / f,
        f2 / f,
        d1 / d,
        d2 / d,
        3 * dd / d**2 - 1,
        ff / f**2 - 1,
        fd / (f * d) - 1,
        (f1 / f) ** 2 * f / (q * d),
    )


def tail(x: np.ndarray) -> np.ndarray:
    """Sum over each layer and those after it: sum_{k = l..L} x_k."""
    return np.cumsum(x[::-1])[::-1]
