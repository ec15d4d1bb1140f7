"""Gaussian integrals of an activation and its derivative, over one normal variable or two correlated ones.

In float64 on the host, outside of any trace, and refined until stable: a fixed Gauss-Hermite rule misses a function that
saturates within a fraction of a standard deviation. `phi` is an `Activation`; q is a variance.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import lowering
from fnn.layers import activations
from fnn.layers.activations import Activation

TINY, HUGE = 1e-250, 1e250  # smaller variances count as 0, larger ones as infinite
_CHUNK = 4096  # phi is always evaluated on this many points, so that it compiles once
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
# Maps values at a panel's nodes to those of the polynomial through them at the nodes of the panel's two halves.
_TO_HALVES = np.linalg.solve(
    np.polynomial.legendre.legvander(_NODES, 15).T,
    np.polynomial.legendre.legvander(np.concatenate([_NODES - 1, _NODES + 1]) / 2, 15).T,
)


def elementwise(who: str, activation: str | Callable[..., jax.Array]) -> Activation:
    """Look up an activation that has Gaussian integrals; ValueError for softmax and for unknown names."""
    phi = activations.get(activation)
    if not phi.elementwise:
        raise ValueError(f"{who}: mean-field theory needs an elementwise activation, got {phi.name!r}; choose another")
    return phi


class Moments(NamedTuple):
    """Means over h ~ N(0, q), in float64."""

    mean: float
    """E[phi(h)]"""
    second: float
    """E[phi(h)²]"""
    derivative: float
    """E[phi'(h)²]"""
    slope: float
    """dE[phi²]/dq = E[h phi phi']/q, or E[phi² (h²/q - 1)]/(2q) for a phi with jumps, which have no derivative"""


def moments(phi: Activation, q: float) -> Moments:
    """Compute the Gaussian moments at variance q. phi is tabulated once, so that many q take little time."""
    return _moments(phi, q)[0]


@functools.lru_cache(maxsize=1 << 16)
@np.errstate(all="ignore")
def _moments(phi: Activation, q: float) -> tuple[Moments, bool]:
    """Compute the Gaussian moments at variance q, and whether phi has no jump where that reaches."""
    if not TINY < q < HUGE:
        edge = math.sqrt(TINY if q < 1 else HUGE)
        values, slopes = evaluate(phi, np.array([edge, -edge]))
        square = float(np.mean(slopes**2))
        at_zero = float(evaluate(phi, np.zeros(1))[0, 0]) if q < 1 else math.nan
        rest = at_zero**2 if q < 1 else 0.0 if square else float(np.mean(values**2))
        return Moments(at_zero, rest + (q * square if square else 0.0), square, square), True
    h, w, _, _, table = _table(phi, math.floor(math.log2(q) / 2))
    density = w * np.exp(-(h**2) / (2 * q)) / math.sqrt(2 * math.pi * q)
    first, second, derivative, slope = table @ density
    whole = (table[1] * (h**2 / q - 1)) @ density / 2
    if not math.isfinite(second):  # phi grows faster than float64 holds
        return Moments(math.nan, math.inf, math.inf, math.inf), True
    continuous = not abs(whole - slope) > 1e-6 * (second + abs(slope))
    slope = (slope if continuous else whole) / q
    return Moments(float(first), float(second), float(derivative), float(slope)), bool(continuous)


def check_continuous(what: str, phi: Activation, q: float) -> None:
    """Refuse a phi with a jump. Errors: ArithmeticError."""
    if not _moments(phi, q)[1]:
        raise ArithmeticError(
            f"meanfield: {what} needs a continuous activation, got a jump of {phi.name} at variance {q:.3g}; "
            "chi and the lengths of `predict` hold for it too"
        )


@functools.lru_cache(maxsize=2048)
@np.errstate(all="ignore")
def _table(phi: Activation, octave: int) -> tuple[np.ndarray, ...]:
    """Tabulate nodes, weights, phi, phi', (phi, phi², phi'², h phi phi') for deviations in [2^octave, 2^(octave+1)).

    Panels of half an octave of h resolve both the Gaussian, whatever its width, and a phi that saturates within a tiny part
    of it. Panels are halved until polynomials fit phi and phi': a 16-point rule on each half. Panels that never fit (at
    kinks and jumps) must contribute next to nothing to every integral.
    """
    ends = np.append(0.0, 2.0 ** np.arange(min(octave, 0) - 5, octave + 5.5, 0.5))
    left, right, done = np.append(ends[:-1], -ends[1:]), np.append(ends[1:], -ends[:-1]), []
    steepest = 0.0
    for _ in range(50):  # enough to close in on a kink to rounding
        middle = (left + right) / 2
        half = np.stack([middle - left, right - middle], axis=1)[..., None] / 2
        nodes = (np.stack([left, middle], axis=1)[..., None] + half * (1 + _NODES)).reshape(-1, 32)
        coarse = left[:, None] + (middle - left)[:, None] * (1 + _NODES)
        both = evaluate(phi, np.concatenate([nodes, coarse], axis=1))
        values = both[..., :32]
        error = np.max(np.abs(both[..., 32:] @ _TO_HALVES - values), axis=-1)
        steepest = max(steepest, np.max(np.abs(values[1])))
        # The floor is the rounding of, say, gelu_tanh's far tail, a difference of two numbers near one.
        floor = 1e-14 * steepest * np.stack([np.max(np.abs(nodes), axis=-1), np.ones(len(left))])
        rough = np.any(error > 1e-11 * np.max(np.abs(values), axis=-1) + floor, axis=0)
        weights = (half * _WEIGHTS).reshape(-1, 32)
        panels = np.stack([nodes, weights, *values])
        done.append(panels[:, ~rough].reshape(4, -1))
        left, right = np.append(left[rough], middle[rough]), np.append(middle[rough], right[rough])
        if not len(left):
            break
        if len(left) > 1 << 13:
            raise ArithmeticError(
                f"meanfield: {phi.name} must be smooth enough to integrate at the variance that was reached, {4.0**octave:.3g}, "
                "but oscillates too fast there; ask for smaller variances (sigma_w, sigma_b)"
            )
    rest = panels[:, rough].reshape(4, -1)
    h, w, f, d = np.concatenate([*done, rest], axis=1)
    table = np.stack([f, f**2, d**2, h * f * d])
    parts = np.abs(table) * (w * np.exp(-(h**2) / 2 / 4.0 ** (octave + 1)))
    if np.any(np.sum(parts[:, h.size - rest.shape[1] :], axis=1) > 1e-9 * np.sum(parts, axis=1)):
        raise ArithmeticError(f"meanfield: E[phi²] and E[phi'²] must be finite, got a singularity of {phi.name}")
    return h, w, f, d, table


def mean(phi: Activation, q: float, function: Callable[..., np.ndarray]) -> np.ndarray:
    """Compute E[function(h, phi(h), phi'(h))], function: float64[n] three times -> float64[k, n]; TINY < q < HUGE."""
    h, w, f, d, _ = _table(phi, math.floor(math.log2(q) / 2))
    return function(h, f, d) @ (w * np.exp(-(h**2) / (2 * q))) / math.sqrt(2 * math.pi * q)


def one_sided_slopes(phi: Activation) -> np.ndarray | None:
    """Return the slopes of phi above and below 0 if it is linear on either side, else None."""
    probes = np.outer([1.0, -1.0], [1e-3, 1.0, 1e3])
    values, slopes = evaluate(phi, probes)
    linear = np.all(np.abs(values - slopes[:, 1:2] * probes) <= 1e-12 * np.abs(probes))
    return slopes[:, 1] if linear else None


@functools.lru_cache(maxsize=4096)
@np.errstate(all="ignore")
def pair(phi: Activation, q: float, gap: float) -> tuple[float, float]:
    """Compute E[(phi(u1) - phi(u2))²]/2 and E[phi'(u1) phi'(u2)] at variance q, correlation 1 - gap, to 1e-8 relative."""
    if gap == 0:
        return 0.0, moments(phi, q).derivative
    alpha, deviation = 2 * math.asin(math.sqrt(gap / 2)), math.sqrt(q)

    def rule(order):
        r, w = legendre(np.append(_graded(1.0, deviation, order), range(2, 11)), order)
        u1, u2, t = rays(alpha, r, w * r * np.exp(-(r**2) / 2), deviation, order)
        (p1, p2), (d1, d2) = evaluate(phi, np.stack([u1, u2]))
        return np.array([np.sum(t * (p1 - p2) ** 2) / 2, np.sum(t * d1 * d2)])

    distance, product = refine(rule)
    return float(distance), float(product)


def rays(alpha: float, r: np.ndarray, w: np.ndarray, scale: float, order: int) -> tuple[np.ndarray, ...]:
    """Return u1 = scale r cos(theta), u2 = scale r cos(theta - alpha) and weights, over half a circle of theta.

    The other half is the mirror image, with u1 and u2 exchanged. In polar coordinates a kink of phi at 0 is a ray at any
    correlation, so that panels can end there; they halve towards it down to phi's unit scale.
    """

    (x, wx), (y, wy) = (
        legendre(_graded(length, 10 * scale, order), order) for length in ((math.pi - alpha) / 2, alpha / 2)
    )
    first = np.concatenate([np.sin(x), -np.sin(y), -np.sin(alpha - y), -np.sin(alpha + x)])
    second = np.concatenate([np.sin(alpha + x), np.sin(alpha - y), np.sin(y), -np.sin(x)])
    weights = np.concatenate([wx, wy, wy, wx]) / math.pi
    return scale * np.outer(r, first), scale * np.outer(r, second), np.outer(w, weights)


def refine(rule: Callable[[int], np.ndarray]) -> np.ndarray:
    """Raise the order of a rule until two results agree to 1e-8."""
    last = rule(10)
    for order in (16, 24, 36, 54):
        result = rule(order)
        if np.all(np.abs(result - last) <= 1e-8 * np.abs(result)):
            return result
        last = result
    raise ArithmeticError(
        "meanfield: a double integral must settle at order 54, got one that does not: the activation must be smooth but for 0, "
        "and hardtanh or relu6 are not; take a smooth one, or measure wide nets (`fnn.Study`)"
    )


def _graded(length: float, scale: float, order: int) -> np.ndarray:
    """Return edges from 0 to a length that halve towards 0, down to the unit of phi, 1/scale; further at higher order."""
    count = math.ceil(math.log2(max(1.0, scale * length * (order / 10) ** 2)))
    return length * np.append(0.0, 2.0 ** np.arange(-min(count, 60), 1))


def legendre(edges: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of Gauss-Legendre rules on the panels between edges."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + nodes)).reshape(-1), (half * weights).reshape(-1)


@functools.lru_cache(maxsize=64)
def compiled(phi: Activation) -> Callable[[jax.Array | np.ndarray], tuple[jax.Array, jax.Array]]:
    """Compile phi and phi', evaluated together."""
    return jax.jit(lambda h: (phi(h), phi.derivative(h)))


def evaluate(phi: Activation, h: np.ndarray) -> np.ndarray:
    """Evaluate phi and phi', float64[...] -> float64[2, ...], whatever the default dtype is.

    On the host, or on the default device where JAX runs without a CPU (`JAX_PLATFORMS=cuda`).
    """
    padded = np.zeros(-(-h.size // _CHUNK) * _CHUNK)
    padded[: h.size] = h.reshape(-1)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(lowering.host()):
        parts = [np.stack(compiled(phi)(jnp.asarray(part))) for part in padded.reshape(-1, _CHUNK)]
    return np.concatenate(parts, axis=-1)[:, : h.size].reshape(2, *h.shape)
