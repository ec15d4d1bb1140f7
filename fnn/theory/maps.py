"""The length map and the correlation map of a layer, and where they lead; setting and names as in `meanfield`.

A layer maps the variance of its pre-activations to that of the next layer's: the length map. It maps the correlation of
two inputs likewise: the correlation map. Both are solved for their limits here, not iterated: near a critical point the
iteration takes for ever.
"""

import math
from collections.abc import Callable

import numpy as np

from fnn.layers.activations import Activation
from fnn.theory import gaussian

NOISE = 1e-13
"""Relative differences below this are rounding, not dynamics."""
CRITICAL = 1e-10
"""A chi this near to 1 is 1."""


def length(phi: Activation, q: float, sw: float, sb: float) -> float:
    """Map a variance to the next layer's: sigma_w² E[phi²] + sigma_b²."""
    return sw**2 * gaussian.moments(phi, q).second + sb**2 if sw else sb**2


def trajectory(
    phi: Activation, sw: float, sb: float, depth: int, start: float | None, residual: float | None
) -> np.ndarray:
    """List the variance of phi's input in each layer, from the first one's (default: the fixed point): float64[depth]."""
    if start is None:
        start = length_limit(phi, sw, sb)
        start = start if 0 < start < math.inf else 1.0
    q, second, mean = np.full(depth, start), 0.0, 0.0
    for i in range(1, depth):
        m = gaussian.moments(phi, float(q[i - 1]))
        if residual is None or i == 1:
            second, mean = m.second, m.mean
        else:  # the branch's output adds to x with the mean that both have over units
            second += 2 * residual * mean * m.mean + residual**2 * m.second
            mean += residual * m.mean
        q[i] = sw**2 * second + sb**2
    return q


def length_limit(phi: Activation, sw: float, sb: float, start: float = 1.0) -> float:
    """Find where the length map ends from q = start: take some plain steps, then bracket the next root ahead."""
    q = start
    for _ in range(64):
        after = length(phi, q, sw, sb)
        if abs(after - q) <= NOISE * q:
            return q
        q = after
        if not gaussian.TINY < q < gaussian.HUGE:
            return 0.0 if q < 1 else math.inf
    up = length(phi, q, sw, sb) > q
    floor = length(phi, 0.0, sw, sb)

    # An increasing map cannot step over its root, so the next one is the limit. A lattice of 16 points an octave
    # makes the moments found here serve the next call too; where the gain is least, two roots may lie between its points.
    def ahead(v):
        return (length(phi, v, sw, sb) - v) * (1 if up else -1)

    position, root = round(16 * math.log2(q)), None
    passed = [(q, ahead(q))]
    while root is None:
        position += 1 if up else -1
        q = 2.0 ** (position / 16)
        if q > 1e30 or q < 0.9 * (floor or 1e-30):
            return math.inf if up else floor
        passed = [*passed[-2:], (q, ahead(q))]
        if passed[-1][1] < -NOISE * q:
            root = solve(ahead, passed[-2][0], q)
        elif len(passed) == 3 and passed[1][1] < min(passed[0][1], passed[2][1]):
            least = _least(ahead, passed[0][0], q)
            if ahead(least) < -NOISE * q:
                root = solve(ahead, passed[0][0], least)
    return root if sw**2 * gaussian.moments(phi, root).slope >= -1 else math.nan


def correlation_limit(phi: Activation, q: float, chi: float, sw: float, sb: float) -> float:
    """Find where the correlation map ends at variance q, from any correlation below 1."""
    if q == 0:
        return math.nan
    if (q == math.inf or abs(chi - 1) < CRITICAL) and (q < math.inf or chi > 1 + CRITICAL):
        slopes = gaussian.one_sided_slopes(phi)
        if slopes is not None and slopes[0] == slopes[1]:
            return math.nan  # a linear net keeps the correlation that it has
    if q < math.inf:
        gaussian.check_continuous("c*", phi, q)  # at a jump the correlation map is infinitely steep at 1
    if q == math.inf or chi <= 1 + CRITICAL:
        return 1.0
    orthogonal = (sw**2 * gaussian.moments(phi, q).mean ** 2 + sb**2) / q  # c' at c = 0
    if orthogonal < 1e-14:
        return 0.0  # an odd phi without biases
    # The map is convex, so that Newton's method climbs to its first fixed point and never passes it.
    gap = 1 - orthogonal
    for _ in range(60):
        distance, product = gaussian.pair(phi, q, gap)
        step = (sw**2 * distance / q - gap) / (sw**2 * product - 1)
        gap, last = min(1.0, gap - step) if step < gap else gap / 2, gap
        if abs(gap - last) <= 1e-11:
            break
    return 1 - gap


def depth_scale(rate: float) -> float:
    """Give 1/|log rate|, the layers after which a factor of `rate` a layer has become e or 1/e."""
    return math.inf if abs(rate - 1) < CRITICAL else 0.0 if rate == 0 else 1 / abs(math.log(abs(rate)))


def solve(function: Callable[[float], float], first: float, second: float) -> float:
    """Find a zero between two points, to rounding; the first point where rounding puts the zero beyond it."""
    from scipy.optimize import brentq

    if (function(first) > 0) == (function(second) > 0):
        return first
    return float(brentq(function, first, second, xtol=1e-300, rtol=4 * np.finfo(float).eps))  # pyright: ignore


def _least(function: Callable[[float], float], first: float, second: float) -> float:
    """Find the lowest point between two, of a function with one valley."""
    from scipy.optimize import fminbound

    ends = sorted((first, second))
    return float(fminbound(function, *ends, xtol=1e-9 * ends[1]))  # pyright: ignore
