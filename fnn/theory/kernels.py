"""Kernels of infinitely wide nets: NNGP, the covariance of a layer's units, and NTK, the tangent kernel at initialisation.

A net is written by the same words as in fnn, each a map of `Kernels`: `serial(dense(1.5), activation("tanh"), dense(1.0))`.
Everything runs in float64 on the host. Sources: Cho and Saul 2009; Lee et al. 2018; Jacot et al. 2018.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fnn import check
from fnn.layers.activations import Activation
from fnn.theory import gaussian

TERMS = 1000
"""Hermite polynomials in the expansion of a smooth phi."""
TOLERANCE = 1e-6
"""What the terms left out may contribute, relative to E[phi²]: known exactly, from E[phi²] minus the squares of all terms."""


class Kernels(NamedTuple):
    """Two kernels over a batch, float64[batch, batch] each."""

    nngp: np.ndarray
    """E over weights of z_i z_j, z one unit of the layer."""
    ntk: np.ndarray
    """Sum over parameters of dz_i/dw dz_j/dw, for one unit z."""


Map = Callable[[Kernels], Kernels]


def inputs(x: np.ndarray | jax.Array) -> Kernels:
    """Start from data: K_ij = x_i·x_j/d, float[batch, ...] -> Kernels."""
    rows = np.asarray(jax.device_get(x), np.float64)
    rows = rows.reshape(len(rows), -1)
    return Kernels(rows @ rows.T / rows.shape[1], np.zeros((len(rows), len(rows))))


def dense(sigma_w: float = 1.0, sigma_b: float = 0.0, *, fan_in: int | None = None) -> Map:
    """Take a layer of weights N(0, sigma_w²/fan_in) and biases N(0, sigma_b²): K' = σ_w²K + σ_b², Θ' = σ_w²Θ + own.

    Its own parameters add K' to the NTK in the NTK parametrisation, where weights are sigma_w/√fan_in times what is trained.
    In the standard one, that of fnn's nets, they add fan_in·K + 1, and the NTK grows with width: pass `fan_in`.
    """
    check.at_least_zero("kernels.dense", sigma_w=sigma_w, sigma_b=sigma_b)

    def run(given):
        nngp = sigma_w**2 * given.nngp + sigma_b**2
        own = nngp if fan_in is None else fan_in * given.nngp + 1
        return Kernels(nngp, sigma_w**2 * given.ntk + own)

    return run


def activation(phi: str | Callable[..., jax.Array]) -> Map:
    """Take phi of each unit: K' = E[phi(u)phi(v)], Θ' = Θ·E[phi'(u)phi'(v)], (u, v) ~ N(0, K).

    Exact where phi is linear on either side of 0 (ReLU, leaky ReLU, abs), to 1e-6 where it is smooth.
    Errors: ValueError for softmax; ArithmeticError for other kinks, and variances at which phi is almost a step.
    """
    function = gaussian.elementwise("kernels.activation", phi)

    def run(given):
        values, slopes = expectations(function, given.nngp)
        return Kernels(values, given.ntk * slopes)

    return run


def residual(branch: Map, scale: float = 1.0) -> Map:
    """Add a branch to its input: K' = K + scale²·K_f, Θ' = Θ + scale²·Θ_f. The branch must end in a dense layer."""

    def run(given):
        of_branch = branch(given)
        return Kernels(*(a + scale**2 * f for a, f in zip(given, of_branch, strict=True)))

    return run


def norm() -> Map:
    """Take layer norm or RMS norm over the units, right after a dense layer: K'_ij = K_ij/√(K_ii K_jj), Θ' likewise."""

    def run(given):
        size = np.sqrt(np.diagonal(given.nngp))
        if np.any(size == 0):
            raise ValueError("kernels.norm: variances must be above 0, got an input of zeros; leave it out")
        return Kernels(*(a / np.outer(size, size) for a in given))

    return run


def serial(*maps: Map) -> Map:
    """Compose maps, the first one first."""

    def run(given):
        for one in maps:
            given = one(given)
        return given

    return run


def mlp(phi: str | Callable[..., jax.Array], depth: int, sigma_w: float = 1.0, sigma_b: float = 0.0) -> Map:
    """Take `depth` hidden layers dense + phi, and a dense output, in the NTK parametrisation."""
    check.non_negative("kernels.mlp", depth=depth)
    return serial(*[dense(sigma_w, sigma_b), activation(phi)] * depth, dense(sigma_w, sigma_b))


def expectations(phi: Activation, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute E[phi(u)phi(v)] and E[phi'(u)phi'(v)] for all pairs of a covariance matrix float64[n, n]."""
    variances = np.diagonal(covariance)
    size = np.sqrt(np.outer(variances, variances))
    correlation = np.clip(np.divide(covariance, size, out=np.zeros_like(size), where=size > 0), -1, 1)
    np.fill_diagonal(correlation, 1)
    slopes = gaussian.one_sided_slopes(phi)
    if slopes is not None:
        # phi(x) = a x + b |x|, and E|u||v| and E sgn(u)sgn(v) are known: Cho and Saul 2009.
        a, b = (slopes[0] + slopes[1]) / 2, (slopes[0] - slopes[1]) / 2
        angle = np.arcsin(correlation)
        absolute = 2 / np.pi * size * (np.sqrt(1 - correlation**2) + correlation * angle)
        return a**2 * covariance + b**2 * absolute, a**2 + b**2 * 2 / np.pi * angle
    terms, seconds = _hermite(phi, np.sqrt(variances))
    left = 1 - np.sum(terms**2, axis=2) / np.maximum(seconds, 1e-300)
    if np.any(left > TOLERANCE):
        raise ArithmeticError(
            f"kernels.activation: phi must be smooth, or linear on either side of 0, got {phi.name}, of which {np.max(left):.1g} "
            f"is beyond {TERMS} Hermite polynomials; it has a kink elsewhere, or the variance is too large"
        )
    found = np.zeros((2, *covariance.shape))
    for k in range(TERMS - 1, -1, -1):  # Horner's rule: sum over k of a_k(i) a_k(j) c_ij^k (Mehler)
        found = found * correlation + terms[:, :, k, None] * terms[:, None, :, k]
    return found[0], found[1]


def _hermite(phi: Activation, deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expand phi(s x) and phi'(s x) in normalised Hermite polynomials of x ~ N(0, 1), for each deviation s.

    float64[2, n, TERMS], and the second moments float64[2, n].
    """
    x, step = np.linspace(-12, 12, 4096, retstep=True)
    values = gaussian.evaluate(phi, deviations[:, None] * x)
    # Polynomials times the root of the density, which neither overflow nor underflow.
    root = np.exp(-(x**2) / 4) / (2 * np.pi) ** 0.25
    weighted = values * root * step
    before, now, terms = np.zeros_like(x), root, []
    for k in range(TERMS):
        terms.append(weighted @ now)
        before, now = now, (x * now - np.sqrt(k) * before) / np.sqrt(k + 1)
    return np.stack(terms, axis=-1), np.sum(values**2 * root**2, axis=-1) * step
