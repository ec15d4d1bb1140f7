"""Mean-field theory: predicted signal and gradient flow, to draw beside what was measured.

Setting: `h_l = W_l x_{l-1} + b_l`, `x_l = phi(h_l)`, `W ~ N(0, sigma_w²/fan_in)`, `b ~ N(0, sigma_b²)`,
`delta_l = dL/dh_l`; sigmas are standard deviations, logs natural. chi and the batch-norm rate are rates of the
*squared* norm. Everything here runs in float64 on the host, outside of any trace. `activation` is a name, an
`Activation` or an elementwise function; softmax is refused.

Sources: Poole et al. 2016; Schoenholz et al. 2017; Hanin 2018; Hanin and Rolnick 2018; Hanin and Nica 2018;
Yang et al. 2019.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import activations, check
from fnn.activations import Activation

_CHUNK = 4096  # phi is always evaluated on this many points, so that it compiles once
_NOISE = 1e-13  # relative differences below this are rounding, not dynamics
_CRITICAL = 1e-10  # chi this near to 1 is 1
_TINY, _HUGE = 1e-250, 1e250  # variances beyond these are taken for the limits 0 and infinity


class FixedPoint(NamedTuple):
    """Where the length and correlation maps end, and how gradients fare there."""

    q: float
    """limit of the length map from q = 1; inf if it diverges, nan if it ends in a cycle"""
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
    """E|delta_l|²/E|delta_{l+1}|²; the last entry has no partner and enters no curve"""
    log_error: np.ndarray
    """½ log(E|delta_l|²/E|delta_depth|²): the log of the root *mean square* over seeds, 0 at l = depth"""
    mean_log_error: np.ndarray
    """E log(|delta_l|/|delta_depth|): the *mean of the log* over seeds; nan where no formula is known"""
    band: np.ndarray
    """standard deviation over seeds of log |delta_l| (scalar output, one example); nan where none is known"""


def length_map(activation: str | Callable[..., Any], q: float, sigma_w: float, sigma_b: float) -> float:
    """Map a layer's variance to the next: `q' = sigma_w² E[phi(sqrt(q) Z)²] + sigma_b²` (Poole et al. 2016, eq. 3).

    Relative error below 1e-9 for every activation of the library and any q >= 0. Errors: ValueError for a negative
    argument and for softmax.
    """
    phi = _elementwise("length_map", activation)
    q = _number("length_map", "q", q)
    sw, sb = _sigmas("length_map", sigma_w, sigma_b)
    return _length(phi, q, sw, sb)


def correlation_map(activation: str | Callable[..., Any], c: float, q: float, sigma_w: float, sigma_b: float) -> float:
    """Map the correlation of two inputs of variance q: `c' = (sigma_w² E[phi(u1) phi(u2)] + sigma_b²)/q'`.

    (u1, u2) is normal with variances q and correlation c in [-1, 1] (Poole et al. 2016, eq. 5); q' is q at the fixed
    point, where this is the textbook's form, and keeps c' a correlation elsewhere. 1 - c' is accurate to 1e-8
    relative, also near c = 1. At q' = 0: nan. Errors: ValueError for |c| > 1, q <= 0, a negative sigma, and softmax.
    """
    phi = _elementwise("correlation_map", activation)
    c, q = _number("correlation_map", "c", c, low=-1, high=1), float(q)
    check.above_zero("correlation_map", q=q)
    sw, sb = _sigmas("correlation_map", sigma_w, sigma_b)
    after = _length(phi, q, sw, sb)
    return 1 - sw**2 * _pair(phi, q, 1 - c)[0] / after if after else math.nan


def fixed_point(activation: str | Callable[..., Any], sigma_w: float, sigma_b: float) -> FixedPoint:
    """Find q*, `chi = sigma_w² E[phi'(sqrt(q*) Z)²]`, c* and `xi_grad = 1/|log chi|` (Schoenholz et al. 2017).

    q* is the limit of the length map from q = 1, found by bracketing, so that it is right where the iteration
    itself takes for ever: tanh at (1, 0) gives 0, ReLU at (sqrt 2, 0) keeps 1. The correlation map is a power series
    with positive coefficients, hence convex: c* = 1 if chi <= 1, and otherwise its one root below 1.

    Edges: at q* = 0, chi is sigma_w² phi'(0)² (at a kink of phi the mean of the two one-sided squares, the limit
    q -> 0: ReLU sigma_w²/2) and c is nan. No finite q* gives q = inf with chi its limit and c = 1. c is nan for
    linear nets whose correlation never changes. |chi - 1| < 1e-10 counts as critical: xi_grad = inf.
    Errors: ValueError for a negative or infinite sigma, an unknown name, and softmax; ArithmeticError for a function
    of your own with a kink away from 0, for which c* cannot be integrated well (`predict` does not need it).
    """
    phi = _elementwise("fixed_point", activation)
    sw, sb = _sigmas("fixed_point", sigma_w, sigma_b)
    q = _length_limit(phi, sw, sb)
    if math.isnan(q):
        return FixedPoint(q, q, q, q)
    chi = sw**2 * _moments(phi, q).derivative
    return FixedPoint(q, chi, _correlation_limit(phi, q, chi, sw, sb), _depth(chi))


def depth_scales(activation: str | Callable[..., Any], sigma_w: float, sigma_b: float) -> DepthScales:
    """Give the depth scales xi_q, xi_c and xi_grad of the fixed point, in layers (Schoenholz et al. 2017, eq. 7-9).

    `1/|log r|` with r the slope of the length map at q*, of the correlation map at c*, and chi; xi_c = xi_grad in
    the ordered phase, where c* = 1. nan where q* or c* is 0/0 or infinite. Errors: as in `fixed_point`.
    """
    point = fixed_point(activation, sigma_w, sigma_b)
    q, c, chi = point.q, point.c, point.chi
    if not 0 < q < math.inf:
        return DepthScales(math.nan, math.nan, point.xi_grad)
    phi = activations.get(activation)
    slope = chi if c == 1 else math.nan if math.isnan(c) else float(sigma_w) ** 2 * _pair(phi, q, 1 - c)[1]
    return DepthScales(_depth(float(sigma_w) ** 2 * _moments(phi, q).slope), _depth(slope), point.xi_grad)


def critical(activation: str | Callable[..., Any], sigma_b: float) -> float:
    """Find the smallest sigma_w with chi = 1 at a finite q*, the edge of chaos (Poole et al. 2016).

    On the line `sigma_w² = 1/E[phi'²]`, so that q* solves `q - E[phi²]/E[phi'²] = sigma_b²`. That is searched for
    1e-18 < q < 1e18, and for q = 0 where sigma_b = 0; a root counts if the length map really goes there from q = 1.
    Errors: ValueError where nothing crosses, as for ReLU and softplus with sigma_b > 0.
    """
    phi = _elementwise("critical", activation)
    sb = _number("critical", "sigma_b", sigma_b)

    def excess(q):
        return q - _moments(phi, q).second / _moments(phi, q).derivative - sb**2

    found = []
    if sb == 0 and _moments(phi, 0.0).second == 0 and _moments(phi, 0.0).derivative > 0:
        found.append((0.0, _moments(phi, 0.0).derivative ** -0.5))
    last = None
    for q in 2.0 ** np.arange(-60, 60.25, 0.25):
        value = excess(q) if _moments(phi, q).derivative > 0 else 0.0
        if abs(value) <= 1e-12 * q:
            continue
        if last is not None and (value > 0) != (last[1] > 0):
            root = _bisect(excess, last[0], q)
            found.append((root, _moments(phi, root).derivative ** -0.5))
        last = q, value
    for root, sw in sorted(found, key=lambda pair: pair[1]):
        q = _length_limit(phi, sw, sb)
        # A homogeneous phi keeps any q on its critical line, so that q = 1 also stands for the root 0.
        if abs(q - root) <= 1e-4 * root or (root == 0 and q == 1):
            return sw
    raise ValueError(
        f"critical: chi crosses 1 at no finite length for {phi.name} with sigma_b = {sb!r}; "
        "choose another sigma_b (0 for ReLU) or a saturating activation"
    )


def batch_norm_rate(activation: str | Callable[..., Any], batch: float) -> float:
    """Give `E|delta_l|²/E|delta_{l+1}|²` under batch norm: dense, batch norm, phi (Yang et al. 2019, theorem 7).

    Train mode, biased variance, eps 0, scale 1, bias 0, infinite width; whatever sigma_w. With y the normalised
    pre-activations of two examples of the batch B,
    `E[(B-1-y1²) phi'(y1)² + (1 + y1 y2) phi'(y1) phi'(y2)] / ((B-3) E[(phi(y1) - phi(y2))²]/2)`,
    and `E[phi'²]/Var[phi]` under N(0, 1) for `batch = inf`. It holds for a phi with kinks too (ReLU: the closed form
    of section 4 of REFERENCE.md). Linear: (B-2)/(B-3). Errors: ValueError for batch < 4, an unknown name, and softmax.
    """
    phi = _elementwise("batch_norm_rate", activation)
    size = _number("batch_norm_rate", "batch", batch, low=4, high=math.inf)
    if size < math.inf and size != int(size):
        raise ValueError(f"batch_norm_rate: batch must be a whole number or inf, got {batch!r}")
    if size == math.inf:
        m = _moments(phi, 1.0)
        return m.derivative / (m.second - m.mean**2)
    alpha, length = math.acos(-1 / (size - 1)), math.sqrt(size - 1)

    def rule(order):
        # y1 = r cos(theta), y2 = r cos(theta - alpha); r = sqrt(B-1) sin(x) turns the density Z^((B-5)/2), singular
        # for B = 4, into cos(x)^(B-4) sin(x).
        edges = np.append(np.arange(0, min(length, 12)), min(length, 12))
        x, w = _legendre(np.arcsin(edges / length), order)
        w = w * np.sin(x) * np.exp((size - 4) / 2 * np.log1p(-(np.sin(x) ** 2)))
        y1, y2, t = _rays(alpha, length * np.sin(x), w / w.sum(), 1.0, order)
        (p1, p2), (d1, d2) = _evaluate(phi, np.stack([y1, y2]))
        own = ((size - 1 - y1**2) * d1**2 + (size - 1 - y2**2) * d2**2) / 2
        return np.array([np.sum(t * (own + (1 + y1 * y2) * d1 * d2)), np.sum(t * (p1 - p2) ** 2) / 2])

    above, below = _refine(rule)
    return float(above / below / (size - 3))


def residual_rate(a: float, sigma_v: float, sigma_w: float, depth: int) -> float:
    """Give `(1 + a² sigma_v² sigma_w²/2)^depth`, the growth of |x|² and of |delta|² over `x + a V relu(W x)`.

    Exact in the mean at any width, without biases. With a = 1/sqrt(depth) it stays bounded. Errors: ValueError for a
    negative sigma or depth.
    """
    check.non_negative("residual_rate", depth=depth)
    sv = _number("residual_rate", "sigma_v", sigma_v)
    sw = _number("residual_rate", "sigma_w", sigma_w)
    return math.exp(depth * math.log1p((float(a) * sv * sw) ** 2 / 2))


def he_relu_log_moments(width: int) -> tuple[float, float]:
    """Give mean and variance of `log((2/n) chi²_K)`, K ~ Binomial(n, 1/2): one He ReLU layer of width n, exactly.

    |delta_l|² (true normal weights, one example, scalar output, no bias) is a product of independent factors of this
    law, one for each of the layers l..L (Hanin and Nica 2018). K = 0, where the net is dead and the log -inf, is
    left out: it has probability 2^-n. About -5/(2n) and 5/n.
    """
    check.positive("he_relu_log_moments", width=width)
    from scipy.special import digamma, gammaln, polygamma

    k = np.arange(1, width + 1)
    p = np.exp(gammaln(width + 1) - gammaln(k + 1) - gammaln(width - k + 1) - width * math.log(2))
    p, mean = p / p.sum(), digamma(k / 2) + math.log(4 / width)
    return float(p @ mean), float(p @ (polygamma(1, k / 2) + (mean - p @ mean) ** 2))


def he_relu_log_variance(widths: Sequence[int]) -> float:
    """Give `5 sum(1/n_k)`, about the variance over seeds of log |dL/dW_l|² for *every* l (Hanin and Rolnick 2018).

    `widths` are those of *all* hidden layers; for log |delta_l|² pass those of layers l..L only. He-initialised
    ReLU, true normal, scalar output, one example, no bias; leading order, for widths of 100 and more (exactly: sum
    `he_relu_log_moments`). The mean of the log is lower than the log of the mean by half of this.
    """
    for width in widths:
        check.positive("he_relu_log_variance", width=width)
    return 5 * math.fsum(1 / n for n in widths)


def predict(
    depth: int,
    *,
    activation: str | Callable[..., Any],
    sigma_w: float,
    sigma_b: float,
    width: int | Sequence[int] | None = None,
    norm: Literal["batch_norm"] | None = None,
    batch: float | None = None,
    q0: float | None = None,
) -> Prediction:
    """Predict the error signal of a net of `depth` layers: `|delta_l|²/|delta_{l+1}|² = sigma_w² E[phi'(h_l)²]`.

    h_l has the variance q_l of the length map's trajectory from q_1 = `q0`, the variance at the first layer's
    pre-activation (default: q*, or 1 where q* is 0 or infinite). `norm="batch_norm"` has q = 1 and the rate of
    `batch_norm_rate(activation, batch)` throughout.

    With `width` (one, or one per layer) the curves over seeds follow where a formula is known: for phi linear on
    either side of 0, without biases and norm (ReLU exactly, the others to leading order in 1/width). Elsewhere they
    are nan. `band` is that of log |delta_l| itself, layers l..depth; the output layer must be initialised alike.
    Errors: ValueError for a depth below 1, a width below 1, batch norm without a batch, a batch without batch norm.
    """
    check.positive("predict", depth=depth)
    if norm is not None:
        check.choice("predict", ["batch_norm"], norm=norm)
    phi = _elementwise("predict", activation)
    sw, sb = _sigmas("predict", sigma_w, sigma_b)
    if (norm is None) != (batch is None):
        raise ValueError(f"predict: norm='batch_norm' and batch go together, got norm={norm!r}, batch={batch!r}")
    if norm is not None and q0 is not None:
        raise ValueError(f"predict: batch norm sets the variance to 1, got q0={q0!r}; leave q0 out")
    widths = [] if width is None else list(np.atleast_1d(width))
    widths = widths * depth if len(widths) == 1 else widths
    for n in widths:
        check.positive("predict", width=n)
    if width is not None and len(widths) != depth:
        raise ValueError(f"predict: width must be one number or one per layer, got {len(widths)} for depth {depth}")

    if batch is not None:
        q, chi = np.ones(depth), np.full(depth, batch_norm_rate(phi, batch))
    else:
        start = _length_limit(phi, sw, sb) if q0 is None else _number("predict", "q0", q0)
        q = np.full(depth, start if q0 is not None or 0 < start < math.inf else 1.0)
        for i in range(1, depth):
            q[i] = _length(phi, float(q[i - 1]), sw, sb)
        chi = sw**2 * np.array([_moments(phi, float(v)).derivative for v in q])
    with np.errstate(divide="ignore"):
        log_error = _tail_sum(np.log(chi) / 2, inclusive=False)
    mean = variance = np.full(depth, math.nan)
    if widths and norm is None and sb == 0:
        moments = {n: _layer_log_moments(phi, int(n)) for n in set(widths)}
        mean, variance = np.array([moments[n] for n in widths]).T
    return Prediction(
        layer=np.arange(1, depth + 1),
        q=q,
        chi=chi,
        log_error=log_error,
        mean_log_error=log_error + _tail_sum(mean / 2, inclusive=False),
        band=np.sqrt(_tail_sum(variance, inclusive=True)) / 2,
    )


def _length(phi: Activation, q: float, sw: float, sb: float) -> float:
    return sw**2 * _moments(phi, q).second + sb**2 if sw else sb**2


def _length_limit(phi: Activation, sw: float, sb: float) -> float:
    """Limit of the length map from q = 1: some plain steps, then bracket the next root in their direction."""
    q = 1.0
    for _ in range(64):
        after = _length(phi, q, sw, sb)
        if abs(after - q) <= _NOISE * q:
            return q
        q = after
        if not _TINY < q < _HUGE:
            return 0.0 if q < 1 else math.inf
    up = _length(phi, q, sw, sb) > q
    floor = _length(phi, 0.0, sw, sb)
    # An increasing map cannot step over its root, so the next one is the limit. A lattice of 16 points an octave
    # makes the moments found here serve the next call too.
    position, root = round(16 * math.log2(q)), None
    while root is None:
        last, position = q, position + (1 if up else -1)
        q = 2.0 ** (position / 16)
        if q > 1e30 or q < 0.9 * (floor or 1e-30):
            return math.inf if up else floor
        gain = _length(phi, q, sw, sb) - q
        if abs(gain) > _NOISE * q and (gain > 0) != up:
            root = _bisect(lambda v: _length(phi, v, sw, sb) - v, last, q)
    return root if sw**2 * _moments(phi, root).slope >= -1 else math.nan


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    rising = function(high) > 0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (function(middle) > 0) == rising else (middle, high)
    return float((low + high) / 2)


def _correlation_limit(phi: Activation, q: float, chi: float, sw: float, sb: float) -> float:
    if q == 0:
        return math.nan
    if (q == math.inf or abs(chi - 1) < _CRITICAL) and (q < math.inf or chi > 1 + _CRITICAL):
        slopes = _one_sided_slopes(phi)
        if slopes is not None and slopes[0] == slopes[1]:
            return math.nan  # a linear net keeps the correlation that it has
    if q == math.inf or chi <= 1 + _CRITICAL:
        return 1.0
    orthogonal = (sw**2 * _moments(phi, q).mean ** 2 + sb**2) / q  # c' at c = 0
    if orthogonal < 1e-14:
        return 0.0  # an odd phi without biases
    # Newton's method climbs a convex function to its first root and never passes it.
    gap = 1 - orthogonal
    for _ in range(60):
        distance, product = _pair(phi, q, gap)
        step = (sw**2 * distance / q - gap) / (sw**2 * product - 1)
        gap, last = min(1.0, gap - step) if step < gap else gap / 2, gap
        if abs(gap - last) <= 1e-11:
            break
    return 1 - gap


def _one_sided_slopes(phi: Activation) -> np.ndarray | None:
    """Slopes above and below 0 of a phi that is linear on either side, else None."""
    probes = np.outer([1.0, -1.0], [1e-3, 1.0, 1e3])
    values, slopes = _evaluate(phi, probes)
    linear = np.all(np.abs(values - slopes[:, 1:2] * probes) <= 1e-12 * np.abs(probes))
    return slopes[:, 1] if linear else None


def _layer_log_moments(phi: Activation, width: int) -> tuple[float, float]:
    """Mean and variance of the log of one layer's factor of |delta|², over its mean; nan unless phi is homogeneous."""
    slopes = _one_sided_slopes(phi)
    if slopes is None or not slopes.any():
        return math.nan, math.nan
    squares = slopes**2
    if squares.min() == 0:
        return he_relu_log_moments(width)
    excess = float(3 * np.mean(squares**2) / np.mean(squares) ** 2 - 1)  # 2 for linear nets, 5 for ReLU
    return -excess / (2 * width), excess / width


def _tail_sum(x: np.ndarray, inclusive: bool) -> np.ndarray:
    """sum_{k = l..L} x_k, or up to L - 1."""
    x = x if inclusive else np.append(x[:-1], 0.0)
    return np.cumsum(x[::-1])[::-1]


def _depth(rate: float) -> float:
    return math.inf if abs(rate - 1) < _CRITICAL else 0.0 if rate == 0 else 1 / abs(math.log(abs(rate)))


def _elementwise(who: str, activation: str | Callable[..., Any]) -> Activation:
    phi = activations.get(activation)
    if not phi.elementwise:
        raise ValueError(f"{who}: mean-field theory needs an elementwise activation, got {phi.name!r}; choose another")
    return phi


def _sigmas(who: str, sigma_w: float, sigma_b: float) -> tuple[float, float]:
    return _number(who, "sigma_w", sigma_w), _number(who, "sigma_b", sigma_b)


def _number(who: str, name: str, value: Any, low: float = 0, high: float = 1e100) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{who}: {name} must be a number, got {value!r}; pass a float") from None
    if not low <= number <= high:
        rule = f"at least {low}" if high > 1e99 else f"between {low} and {high}"
        raise ValueError(f"{who}: {name} must be {rule}{' and finite' if high == 1e100 else ''}, got {value!r}")
    return number


# Gaussian integrals ---------------------------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
# Takes values at the nodes of a panel to those of the polynomial through them at the nodes of its two halves.
_TO_HALVES = np.linalg.solve(
    np.polynomial.legendre.legvander(_NODES, 15).T,
    np.polynomial.legendre.legvander(np.concatenate([_NODES - 1, _NODES + 1]) / 2, 15).T,
)


class _Moments(NamedTuple):
    mean: float
    second: float  # E[phi²]
    derivative: float  # E[phi'²]
    slope: float  # dE[phi²]/dq = E[h phi phi']/q


@functools.lru_cache(maxsize=1 << 16)
@np.errstate(all="ignore")
def _moments(phi: Activation, q: float) -> _Moments:
    """Gaussian moments at h = sqrt(q) Z. As `Activation.moments`, a hundred times faster: phi is tabulated once."""
    if not _TINY < q < _HUGE:
        edge = math.sqrt(_TINY if q < 1 else _HUGE)
        values, slopes = _evaluate(phi, np.array([edge, -edge]))
        square = float(np.mean(slopes**2))
        at_zero = float(_evaluate(phi, np.zeros(1))[0, 0]) if q < 1 else math.nan
        rest = at_zero**2 if q < 1 else 0.0 if square else float(np.mean(values**2))
        return _Moments(at_zero, rest + (q * square if square else 0.0), square, square)
    h, w, table = _table(phi, math.floor(math.log2(q) / 2))
    mean, second, derivative, slope = table @ (w * np.exp(-(h**2) / (2 * q))) / math.sqrt(2 * math.pi * q)
    if not math.isfinite(second):  # phi grows faster than float64 holds
        return _Moments(math.nan, math.inf, math.inf, math.inf)
    return _Moments(float(mean), float(second), float(derivative), float(slope / q))


@functools.lru_cache(maxsize=2048)
@np.errstate(all="ignore")
def _table(phi: Activation, octave: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights and (phi, phi², phi'², h phi phi') for standard deviations in [2^octave, 2^(octave+1)).

    Octaves of h, in halves, resolve at once the Gaussian, whatever its width, and a phi that saturates within a tiny
    part of it. They are halved further until polynomials fit phi and phi': each is one 16-point rule on both halves.
    """
    ends = np.append(0.0, 2.0 ** np.arange(min(octave, 0) - 5, octave + 5.5, 0.5))
    left, right, done = np.append(ends[:-1], -ends[1:]), np.append(ends[1:], -ends[:-1]), []
    steepest = 0.0
    for _ in range(50):  # enough to close in on a kink to rounding
        middle = (left + right) / 2
        half = np.stack([middle - left, right - middle], axis=1)[..., None] / 2
        nodes = (np.stack([left, middle], axis=1)[..., None] + half * (1 + _NODES)).reshape(-1, 32)
        coarse = left[:, None] + (middle - left)[:, None] * (1 + _NODES)
        both = _evaluate(phi, np.concatenate([nodes, coarse], axis=1))
        values = both[..., :32]
        error = np.max(np.abs(both[..., 32:] @ _TO_HALVES - values), axis=-1)
        steepest = max(steepest, np.max(np.abs(values[1])))
        # The floor is the rounding of, say, gelu_tanh's far tail, a difference of two numbers near one.
        floor = 1e-14 * steepest * np.stack([np.max(np.abs(nodes), axis=-1), np.ones(len(left))])
        rough = np.any(error > 1e-11 * np.max(np.abs(values), axis=-1) + floor, axis=0)
        weights = (half * _WEIGHTS).reshape(-1, 32)
        done.append(np.stack([nodes, weights, *values])[:, ~rough].reshape(4, -1))
        left, right = np.append(left[rough], middle[rough]), np.append(middle[rough], right[rough])
        if not len(left):
            break
        if len(left) > 1 << 13:
            raise ArithmeticError(f"meanfield: {phi.name} oscillates too fast to integrate at variance {4.0**octave}")
    h, w, f, d = np.concatenate(done, axis=1)
    return h, w, np.stack([f, f**2, d**2, h * f * d])


@functools.lru_cache(maxsize=4096)
@np.errstate(all="ignore")
def _pair(phi: Activation, q: float, gap: float) -> tuple[float, float]:
    """E[(phi(u1) - phi(u2))²]/2 and E[phi'(u1) phi'(u2)] at variance q, correlation 1 - gap; to 1e-8 relative."""
    if gap == 0:
        return 0.0, _moments(phi, q).derivative
    alpha, deviation = 2 * math.asin(math.sqrt(gap / 2)), math.sqrt(q)

    def rule(order):
        r, w = _legendre(np.append(_graded(1.0, deviation, order), range(2, 11)), order)
        u1, u2, t = _rays(alpha, r, w * r * np.exp(-(r**2) / 2), deviation, order)
        (p1, p2), (d1, d2) = _evaluate(phi, np.stack([u1, u2]))
        return np.array([np.sum(t * (p1 - p2) ** 2) / 2, np.sum(t * d1 * d2)])

    distance, product = _refine(rule)
    return float(distance), float(product)


def _rays(alpha: float, r: np.ndarray, w: np.ndarray, scale: float, order: int) -> tuple[np.ndarray, ...]:
    """u1 = scale r cos(theta), u2 = scale r cos(theta - alpha) and weights, over half a circle of theta.

    The other half is its mirror image with u1 and u2 exchanged. In polar coordinates a kink of phi at 0 lies on a
    ray, whatever the correlation, so that panels can end there; they halve towards it as far as phi's unit scale.
    """

    (x, wx), (y, wy) = (
        _legendre(_graded(length, 10 * scale, order), order) for length in ((math.pi - alpha) / 2, alpha / 2)
    )
    first = np.concatenate([np.sin(x), -np.sin(y), -np.sin(alpha - y), -np.sin(alpha + x)])
    second = np.concatenate([np.sin(alpha + x), np.sin(alpha - y), np.sin(y), -np.sin(x)])
    weights = np.concatenate([wx, wy, wy, wx]) / math.pi
    return scale * np.outer(r, first), scale * np.outer(r, second), np.outer(w, weights)


def _refine(rule: Callable[[int], np.ndarray]) -> np.ndarray:
    """Raise the order of a rule until two results agree to 1e-8."""
    last = rule(10)
    for order in (16, 24, 36, 54):
        result = rule(order)
        if np.all(np.abs(result - last) <= 1e-8 * np.abs(result)):
            return result
        last = result
    raise ArithmeticError("meanfield: a double integral is not stable at order 54; does phi have a kink away from 0?")


def _graded(length: float, scale: float, order: int) -> np.ndarray:
    """Edges from 0 to a length that halve towards 0 down to the unit of phi, 1/scale; deeper at higher order."""
    count = math.ceil(math.log2(max(1.0, scale * length * (order / 10) ** 2)))
    return length * np.append(0.0, 2.0 ** np.arange(-min(count, 60), 1))


def _legendre(edges: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + nodes)).reshape(-1), (half * weights).reshape(-1)


@functools.lru_cache(maxsize=64)
def _compiled(phi: Activation) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda h: jnp.stack([phi(h), phi.derivative(h)]))


def _evaluate(phi: Activation, h: np.ndarray) -> np.ndarray:
    """float64[...] -> float64[2, ...]: phi and phi', on the host, whatever the default precision and device are."""
    padded = np.zeros(-(-h.size // _CHUNK) * _CHUNK)
    padded[: h.size] = h.reshape(-1)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        parts = [np.asarray(_compiled(phi)(jnp.asarray(part))) for part in padded.reshape(-1, _CHUNK)]
    return np.concatenate(parts, axis=-1)[:, : h.size].reshape(2, *h.shape)
