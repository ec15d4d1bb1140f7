"""Moments of the singular values of a wide random net's Jacobian: how far the net is from dynamical isometry."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fnn import check
from fnn.theory import gaussian


class SingularMoments(NamedTuple):
    """Means over the min(inputs, outputs) singular values of dy/dx, in wide nets."""

    first: float
    """mean of s²: chi to the power of depth where all widths are equal and variances have settled"""
    second: float
    """mean of s⁴"""

    @property
    def isometry(self) -> float:
        """first²/second: 1 if all singular values are equal, near 0 if few carry everything."""
        return self.first**2 / self.second


def singular_moments(
    activation: str | Callable[..., jax.Array],
    sizes: Sequence[int],
    *,
    sigma_w: float = 1.0,
    sigma_b: float = 0.0,
    q: float = 1.0,
    orthogonal: bool = False,
) -> SingularMoments:
    """Predict the means of s² and s⁴ over the singular values s of dy/dx of an mlp, from layer to layer.

    `sizes` are (inputs, hidden ..., outputs), of which the last layer has no activation; q is the mean square of the inputs.
    Weights are N(0, sigma_w²/fan_in), or sigma_w times orthonormal rows or columns; biases N(0, sigma_b²). With D = phi'(h),
    m_k = E[phi'(h)^2k], and tr/n for the mean of a diagonal, (a, b) = (tr A/n, tr A²/n) of A = J Jᵀ moves like this:

    | step | a | b |
    |---|---|---|
    | D A D | m_1 a | m_1² (b - a²) + m_2 a² |
    | W A Wᵀ, normal, n_out/n_in = r | sigma_w² a | sigma_w⁴ (r b + a²) |
    | orthogonal, r <= 1 | sigma_w² a | sigma_w⁴ (r b + (1 - r) a²) |
    | orthogonal, r > 1 | sigma_w² a/r | sigma_w⁴ b/r |

    With equal widths and chi = 1 the variance of s² is L (m_2/m_1² - 1 + 1), for L layers of normal weights, and L (m_2/m_1²
    - 1) for orthogonal ones. Exact as the widths grow at fixed depth. Source: Pennington et al. 2017.
    Its six options describe one net. Errors: ValueError for fewer than two sizes, and activations without integrals.

        fnn.meanfield.singular_moments("tanh", [64] * 17, sigma_w=1.2, orthogonal=True).isometry
    """
    phi = gaussian.elementwise("singular_moments", activation)
    check.at_least_zero("singular_moments", sigma_w=sigma_w, sigma_b=sigma_b)
    check.above_zero("singular_moments", q=q)
    if len(sizes) < 2:
        raise ValueError(f"singular_moments: sizes must be at least (inputs, outputs), got {tuple(sizes)}")
    check.positive("singular_moments", **{f"size_{i}": n for i, n in enumerate(sizes)})
    a = b = 1.0
    for layer, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        if layer:
            q = gaussian.moments(phi, q).second
        r, square = n_out / n_in, sigma_w**2
        if not orthogonal:
            a, b = square * a, square**2 * (r * b + a**2)
        elif r <= 1:
            a, b = square * a, square**2 * (r * b + (1 - r) * a**2)
        else:
            a, b, square = square * a / r, square**2 * b / r, square / r
        q = square * q + sigma_b**2
        if layer < len(sizes) - 2:
            first, second = gaussian.mean(phi, q, lambda h, f, d: np.stack([d**2, d**4]))
            a, b = first * a, first**2 * (b - a**2) + second * a**2
    share = sizes[-1] / min(sizes[0], sizes[-1])
    return SingularMoments(float(share * a), float(share * b))
