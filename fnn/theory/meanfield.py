"""Mean-field theory: how signals and gradients grow with depth in wide random nets, to draw beside a measurement.

Setting: `h_l = W_l x_{l-1} + b_l`, `x_l = phi(h_l)`, `W ~ N(0, sigma_w²/fan_in)`, `b ~ N(0, sigma_b²)`,
`delta_l = dL/dh_l`; sigmas are standard deviations, logs natural. chi and the batch-norm rate are rates of the
*squared* norm. Everything here runs in float64 on the host, outside of any trace. `activation` is a name, an
`Activation` or an elementwise function; softmax is refused.

Sources: Poole et al. 2016; Schoenholz et al. 2017; Hanin 2018; Hanin and Rolnick 2018; Hanin and Nica 2018;
Yang et al. 2019.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from fnn import check
from fnn.layers import activations
from fnn.theory import finite_width, gaussian, kernels, maps, rates
from fnn.theory.drawn import Drawn, Net, draw, interval
from fnn.theory.finite_width import he_relu_log_moments, he_relu_log_variance, tail
from fnn.theory.gaussian import Moments
from fnn.theory.isometry import SingularMoments, singular_moments
from fnn.theory.rates import batch_norm_rate, residual_rate

__all__ = [
    "DepthScales",
    "Drawn",
    "FixedPoint",
    "Moments",
    "Net",
    "Prediction",
    "SingularMoments",
    "batch_norm_rate",
    "correlation_map",
    "critical",
    "depth_scales",
    "draw",
    "fixed_point",
    "he_relu_log_moments",
    "he_relu_log_variance",
    "interval",
    "kernels",
    "length_map",
    "moments",
    "predict",
    "residual_rate",
    "singular_moments",
]


class FixedPoint(NamedTuple):
    """Limits of the length map and the correlation map, and the growth of gradients there."""

    q: float
    """limit of the length map from q = q0; inf if it diverges, nan if it ends in a cycle"""
    chi: float
    """factor of E|delta|² per layer, towards the input"""
    c: float
    """limit of the correlation map from any 0 <= c < 1; nan if there is none, as at q = 0"""
    xi_grad: float
    """1/|log chi| in layers; inf on the critical line"""


class DepthScales(NamedTuple):
    """Layers after which a deviation has shrunk (or grown) by e, near the fixed point."""

    q: float
    """of the variance: 1/|log dq'/dq|"""
    c: float
    """of the correlation: 1/|log dc'/dc|"""
    grad: float
    """of E|delta|²: 1/|log chi|"""


class Prediction(NamedTuple):
    """Curves over the layers l = 1..depth, each float64[depth]."""

    layer: np.ndarray
    q: np.ndarray
    """variance of phi's input"""
    chi: np.ndarray
    """E|delta_l|²/E|delta_{l+1}|²; no curve uses the last entry, which has no layer after it"""
    log_error: np.ndarray
    """½ log(E|delta_l|²/E|delta_depth|²): the log of the root *mean square* over seeds, 0 at l = depth"""
    mean_log_error: np.ndarray
    """E log(|delta_l|/|delta_depth|): the *mean of the log* over seeds; nan where theory has no formula"""
    band: np.ndarray
    """standard deviation over seeds of log |delta_l| (scalar output, one example); nan where theory has no formula"""
    low: np.ndarray
    """For 19 seeds in 20, log(|delta_l|/|delta_depth|) lies between `low` and `high`. This holds for one example and for
    the RMS over a batch, whose log lies between `mean_log_error` and `log_error`. nan where theory has no formula"""
    high: np.ndarray


def moments(activation: str | Callable[..., jax.Array], q: float) -> Moments:
    """Compute E[phi(h)], E[phi(h)²], E[phi'(h)²] and dE[phi(h)²]/dq for h ~ N(0, q), to 1e-9 relative.

    At q = 0 these are the limits q -> 0: at a kink of phi, E[phi'²] is the mean of the two one-sided squares (ReLU 1/2).
    Errors: ValueError for q < 0 and for softmax; ArithmeticError for a function that has no such means.
    """
    return gaussian.moments(gaussian.elementwise("moments", activation), check.number("moments", q=q))


def length_map(activation: str | Callable[..., jax.Array], q: float, sigma_w: float, sigma_b: float) -> float:
    """Map a layer's variance to the next: `q' = sigma_w² E[phi(sqrt(q) Z)²] + sigma_b²` (Poole et al. 2016, eq. 3).

    Relative error below 1e-9 for every activation of the library and any q >= 0. Errors: ValueError for a negative
    argument and for softmax.
    """
    phi = gaussian.elementwise("length_map", activation)
    q = check.number("length_map", q=q)
    sw, sb = check.number("length_map", sigma_w=sigma_w), check.number("length_map", sigma_b=sigma_b)
    return maps.length(phi, q, sw, sb)


def correlation_map(
    activation: str | Callable[..., jax.Array], c: float, q: float, sigma_w: float, sigma_b: float
) -> float:
    """Map the correlation of two inputs of variance q: `c' = (sigma_w² E[phi(u1) phi(u2)] + sigma_b²)/q'`.

    (u1, u2) is normal with variances q and correlation c in [-1, 1] (Poole et al. 2016, eq. 5); q' is q at the fixed
    point, where this is the textbook's form, and keeps c' a correlation elsewhere. 1 - c' is accurate to 1e-8
    relative, also near c = 1. At q' = 0: nan. Errors: ValueError for |c| > 1, q <= 0, a negative sigma, and softmax.
    """
    phi = gaussian.elementwise("correlation_map", activation)
    c, q = check.number("correlation_map", c=c, low=-1, high=1), float(q)
    check.above_zero("correlation_map", q=q)
    sw, sb = check.number("correlation_map", sigma_w=sigma_w), check.number("correlation_map", sigma_b=sigma_b)
    after = maps.length(phi, q, sw, sb)
    return 1 - sw**2 * gaussian.pair(phi, q, 1 - c)[0] / after if after else math.nan


def fixed_point(
    activation: str | Callable[..., jax.Array], sigma_w: float, sigma_b: float, *, q0: float = 1.0
) -> FixedPoint:
    """Find q*, `chi = sigma_w² E[phi'(sqrt(q*) Z)²]`, c* and `xi_grad = 1/|log chi|` (Schoenholz et al. 2017).

    q* is the limit of the length map from q = `q0`. It is found by bracketing, so it is right even where iterating the
    map would take for ever: tanh at (1, 0) gives 0, ReLU at (sqrt 2, 0) keeps q0. Where the map has several fixed points
    (GELU), another q0 may lead to another one. The correlation map is a power series with positive coefficients, hence
    convex: c* = 1 if chi <= 1, and otherwise its one fixed point below 1.

    Edges: at q* = 0, chi is sigma_w² phi'(0)² (at a kink of phi the mean of the two one-sided squares, the limit
    q -> 0: ReLU sigma_w²/2) and c is nan. No finite q* gives q = inf with chi its limit and c = 1. c is nan for
    linear nets whose correlation never changes. |chi - 1| < 1e-10 counts as critical: xi_grad = inf.
    Errors: ValueError for a negative or infinite sigma or q0, an unknown name, and softmax; ArithmeticError for a function
    of your own with a kink away from 0, for which c* cannot be integrated accurately, or with a jump (`predict` without
    a width does not need c*).
    """
    phi = gaussian.elementwise("fixed_point", activation)
    sw, sb = check.number("fixed_point", sigma_w=sigma_w), check.number("fixed_point", sigma_b=sigma_b)
    q = maps.length_limit(phi, sw, sb, check.number("fixed_point", q0=q0))
    if math.isnan(q):
        return FixedPoint(q, q, q, q)
    chi = sw**2 * gaussian.moments(phi, q).derivative
    return FixedPoint(q, chi, maps.correlation_limit(phi, q, chi, sw, sb), maps.depth_scale(chi))


def depth_scales(
    activation: str | Callable[..., jax.Array], sigma_w: float, sigma_b: float, *, q0: float = 1.0
) -> DepthScales:
    """Compute the depth scales xi_q, xi_c and xi_grad at the fixed point, in layers (Schoenholz et al. 2017, eq. 7-9).

    `1/|log r|` with r the slope of the length map at q*, of the correlation map at c*, and chi; xi_c = xi_grad in
    the ordered phase, where c* = 1. nan where q* or c* is 0/0 or infinite. Errors: as in `fixed_point`.
    """
    point = fixed_point(activation, sigma_w, sigma_b, q0=q0)
    q, c, chi = point.q, point.c, point.chi
    if not 0 < q < math.inf:
        return DepthScales(math.nan, math.nan, point.xi_grad)
    phi = activations.get(activation)
    slope = chi if c == 1 else math.nan if math.isnan(c) else float(sigma_w) ** 2 * gaussian.pair(phi, q, 1 - c)[1]
    return DepthScales(
        maps.depth_scale(float(sigma_w) ** 2 * gaussian.moments(phi, q).slope), maps.depth_scale(slope), point.xi_grad
    )


def critical(activation: str | Callable[..., jax.Array], sigma_b: float, *, q0: float = 1.0) -> float:
    """Find the smallest sigma_w with chi = 1 at a finite q*, the edge of chaos (Poole et al. 2016).

    At such a point `sigma_w² = 1/E[phi'²]`, so q* solves `q - E[phi²]/E[phi'²] = sigma_b²`. All solutions with
    1e-18 < q < 1e18 are found, and q = 0 if sigma_b = 0. A solution counts if the length map leads to it from q = `q0`, or
    if q0 is that solution to 1e-3: some are unstable, and only a net that starts there is critical.
    Errors: ValueError if there is no solution, as for ReLU and softplus with sigma_b > 0, and if the map leads to none of
    them from q0, as for GELU with sigma_b = 0.4158 from q0 = 1; the message gives the q0 to pass.
    """
    phi = gaussian.elementwise("critical", activation)
    sb, start = check.number("critical", sigma_b=sigma_b), check.number("critical", q0=q0)

    def excess(q):
        return q - gaussian.moments(phi, q).second / gaussian.moments(phi, q).derivative - sb**2

    found = []
    if sb == 0 and gaussian.moments(phi, 0.0).second == 0 and gaussian.moments(phi, 0.0).derivative > 0:
        found.append((0.0, gaussian.moments(phi, 0.0).derivative ** -0.5))
    last = None
    for q in 2.0 ** np.arange(-60, 60.25, 0.25):
        value = excess(q) if gaussian.moments(phi, q).derivative > 0 else 0.0
        if abs(value) <= 1e-12 * q:
            continue
        if last is not None and (value > 0) != (last[1] > 0):
            root = maps.solve(excess, last[0], q)
            found.append((root, gaussian.moments(phi, root).derivative ** -0.5))
        last = q, value
    ends = []
    for root, sw in sorted(found, key=lambda pair: pair[1]):
        ends.append(maps.length_limit(phi, sw, sb, start))
        # A homogeneous phi keeps every q on its critical line, so for the root 0 any q0 is right.
        near = abs(ends[-1] - root) <= 1e-4 * root or abs(start - root) <= 1e-3 * root
        if near or (root == 0 and ends[-1] == start):
            return sw
    if found:
        (root, sw), end = min(found, key=lambda pair: pair[1]), ends[0]
        raise ValueError(
            f"critical: the length map must go to the length where chi = 1; for {phi.name} with sigma_b = {sb!r} that "
            f"is q = {root!r} (at sigma_w = {sw:.6g}), and from q0 = {start!r} the map goes to {end:.6g}; pass q0={root!r}"
        )
    raise ValueError(
        f"critical: chi crosses 1 at no finite length for {phi.name} with sigma_b = {sb!r}; "
        "choose another sigma_b (0 for ReLU) or a saturating activation"
    )


def predict(
    depth: int,
    *,
    activation: str | Callable[..., jax.Array],
    sigma_w: float,
    sigma_b: float,
    width: int | Sequence[int] | None = None,
    norm: Literal["batch_norm", "layer_norm", "rms_norm"] | None = None,
    batch: float | None = None,
    residual: float | None = None,
    q0: float | None = None,
) -> Prediction:
    """Predict the error signal of a net with `depth` layers: `|delta_l|²/|delta_{l+1}|² = sigma_w² E[phi'(h_l)²]`.

    The variance q_l of h_l follows the length map from q_1 = `q0`, the variance of the first layer's pre-activations
    (default: q*, or 1 where q* is 0 or infinite). With `residual=a` layers 2..depth are `x + a phi(norm(W x + b))`, and the
    error signal is the one inside the branch: `|dL/dx_l|² = (1 + a² chi_l) |dL/dx_{l+1}|²` (Yang and Schoenholz 2017,
    eq. 3-5). With a norm, q is 1 in all layers, and chi is divided by the variance v_l of h_l, in residual nets that of a
    sum that grows with l. `"layer_norm"` and `"rms_norm"`: `chi_l = sigma_w² E[phi'²]/v_l`, without biases and sums
    `E[phi'²]/E[phi²]` under N(0, 1). `"batch_norm"`: `batch_norm_rate(activation, batch)` times the variance over the batch
    of phi over that of x. The default of `q0`, the variance by which the first layer's norm divides, is that of the second.

    `width` (one, or one per layer) adds the curves over seeds, to order 1/width: for every activation (see
    `finite_width.plain`; exact for ReLU, for others while depth is below width²), and under batch norm of 6 examples or
    more (`finite_width.batch_normed`; the order 1/width of its mean is unknown, so `low` and `high` allow 4/width a layer
    in log |delta|²). For residual nets and other norms they are nan: `draw` has these. The output layer must be initialised like the others.

    It takes nine arguments because each one is a column of a study's table.
    Errors: ValueError for a depth or width below 1, batch norm without batch, and batch without batch norm.
    """
    check.positive("predict", depth=depth)
    if norm is not None:
        check.choice("predict", ["batch_norm", "layer_norm", "rms_norm"], norm=norm)
    phi = gaussian.elementwise("predict", activation)
    sw, sb = check.number("predict", sigma_w=sigma_w), check.number("predict", sigma_b=sigma_b)
    if (norm == "batch_norm") != (batch is not None):
        raise ValueError(f"predict: norm='batch_norm' and batch go together, got norm={norm!r}, batch={batch!r}")
    a = None if residual is None else float(residual)
    if a is not None:
        check.above_zero("predict", residual=a)
    widths = [] if width is None else list(np.atleast_1d(width))
    widths = widths * depth if len(widths) == 1 else widths
    for n in widths:
        check.positive("predict", width=n)
    if width is not None and len(widths) != depth:
        raise ValueError(f"predict: width must be one number or one per layer, got {len(widths)} for depth {depth}")
    start = None if q0 is None else check.number("predict", q0=q0)

    spread, drift = None, 0.0
    if norm is not None:
        q, chi = np.ones(depth), _normed(phi, sw, sb, depth, batch, a, start)
        if batch is not None and widths and a is None:
            spread, drift = finite_width.batch_normed(phi, batch, widths), 4.0
    else:
        q = maps.trajectory(phi, sw, sb, depth, start, a)
        chi = sw**2 * np.array([gaussian.moments(phi, float(v)).derivative for v in q])
        if widths and a is None:
            spread = finite_width.plain(phi, sw, sb, q, widths)
    if a is not None:
        branch = np.append(1.0, np.full(depth - 1, a**2))  # the first layer is not a sum
        # |delta_l|² = a² chi_l/sigma_w² |dL/dx_l|², and each sum after l multiplies by 1 + a² chi.
        chi = chi[:-1] * branch[:-1] / (chi[1:] * branch[1:]) * (1 + a**2 * chi[1:]) if depth > 1 else chi[:0]
        chi = np.append(chi, math.nan)
    with np.errstate(divide="ignore"):
        log_error = _below(np.log(chi) / 2)
    mean = band = low = high = np.full(depth, math.nan)
    if spread is not None:
        mean, band = log_error + _below(spread.offset / 2), np.sqrt(spread.variance) / 2
        reach = 1.96 * np.sqrt(spread.variance_from_last) / 2
        bias = _below(np.full(depth, drift / 2) / np.array(widths))
        low, high = np.minimum(mean, log_error) - reach - bias, np.maximum(mean, log_error) + reach + bias
    return Prediction(np.arange(1, depth + 1), q, chi, log_error, mean, band, low, high)


def _normed(
    phi: gaussian.Activation,
    sw: float,
    sb: float,
    depth: int,
    batch: float | None,
    a: float | None,
    start: float | None,
) -> np.ndarray:
    """Give chi of each layer under a norm, batch norm if there is a `batch`. The seven arguments are those of `predict`."""
    m = gaussian.moments(phi, 1.0)
    own, mean, gain = m.second, m.mean, sw**2 * m.derivative
    if batch is not None:  # of what varies over the batch; biases and means over it do not
        own, mean, sb = rates.batch_normed(phi, batch)[1], 0.0, 0.0
        gain = sw**2 * batch_norm_rate(phi, batch) * own
    layer = np.arange(depth - 1)  # before the second layer, the third, ...
    a = a or 0.0  # without sums the length stays
    lengths = own + a**2 * own * layer + mean**2 * (2 * a * layer + a**2 * layer * (layer - 1))
    variance = sw**2 * np.append(own, lengths) + sb**2
    if start is not None:
        variance[0] = start if batch is None else start / (1 - 1 / batch)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 0, gain / variance, math.inf if start == 0 else math.nan)


def _below(x: np.ndarray) -> np.ndarray:
    """sum_{k = l..depth-1} x_k."""
    return tail(np.append(x[:-1], 0.0))
