"""The rate at which a step no longer lowers the loss, found by forward passes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import tree

MOST = 40
"""Forward passes at most; a quadratic loss takes six or seven."""


class Critical(NamedTuple):
    """The critical rate of a step direction; NaN where none was found, or where the loss's rounding hides it."""

    rate: jax.Array
    """eta_c: at smaller rates the step lowers the loss; float[]."""
    sharpness: jax.Array
    """lambda_c = 2/eta_c, the critical sharpness; float[]."""
    low: jax.Array
    """A rate at which the loss fell, less what its rounding may hide: eta_c lies above it; float[]."""
    high: jax.Array
    """A rate at which the loss rose, or was not finite, likewise: eta_c lies below it; float[]."""
    passes: jax.Array
    """Forward passes; int32[]."""


class _Search(NamedTuple):
    low: Any
    below: Any
    """(L(x - low·step)/L(x) - 1)/low, which is linear in the rate where the loss is quadratic; at most 0."""
    high: Any
    above: Any
    last: Any
    last_slope: Any
    now: Any
    """The rate to be tried next."""
    leap: Any
    """The factor by which a search without a bracket moves on where secants do not help."""
    slow: Any
    """How often in a row the bracket did not shrink to its half."""
    passes: Any
    done: Any


def critical(loss: Callable[[Any], Any], start: Any, near: Any, tolerance: float, eps: float) -> Critical:
    """Find the smallest rate > 0 with loss(rate) > loss(0), to a relative tolerance, from a first guess `near`.

    By secants through loss differences over rates, kept inside a bracket (Illinois) once there is one. It ends when the
    loss has risen at one end of the bracket, and fallen at the other. `eps` is the relative rounding of the loss.
    """
    dtype = jnp.result_type(start)
    near = jnp.clip(jnp.asarray(near, dtype), jnp.finfo(dtype).tiny, jnp.finfo(dtype).max / 4)
    nan, size, noise = jnp.full_like(near, jnp.nan), tree.bound(jnp.abs(start)), 4 * eps

    def line(s):
        straight = s.low - (s.high - s.low) * (s.below / (s.above - s.below))
        return straight, jnp.isfinite(s.above) & (straight >= s.low) & (straight <= s.high)

    def between(s):
        straight, usable = line(s)
        middle = jnp.sqrt(s.low) * jnp.sqrt(s.high)
        # Not nearer to an end than the tolerance, so that the second of two good guesses closes the bracket.
        apart = jnp.asarray((1 + 0.9 * tolerance) ** (4.0 ** jnp.minimum(s.slow, 6)), dtype)  # under x64 it is float64
        found = jnp.where(usable, straight, middle)
        return jnp.clip(found, jnp.minimum(s.low * apart, middle), jnp.maximum(s.high / apart, middle))

    def beyond(s, now, slope, rose):
        secant = now - (now - s.last) * (slope / (slope - s.last_slope))
        usable = jnp.isfinite(secant) & (secant > 0) & (slope != 0) & (s.last_slope != 0)
        up = jnp.where(usable & (secant > now), jnp.clip(secant, 1.02 * now, 100 * now), s.leap * now)
        down = jnp.where(usable & (secant < now), jnp.clip(secant, now / 100, now / 1.02), now / s.leap)
        return jnp.where(rose, down, up)

    def body(s):
        now = s.now
        change = (loss(now) - start) / size
        change = jnp.where(jnp.abs(change) <= noise, 0, change)
        slope, rose = change / now, ~(change <= 0)
        both, width = jnp.isfinite(s.low) & jnp.isfinite(s.high), jnp.log(s.high / s.low)
        # Illinois: where the same side moved twice in a row, half of the other's value keeps the secant moving.
        below = jnp.where(rose, jnp.where(both & (s.last == s.high), s.below / 2, s.below), slope)
        above = jnp.where(rose, slope, jnp.where(both & (s.last == s.low), s.above / 2, s.above))
        low, high = jnp.where(rose, s.low, now), jnp.where(rose, now, s.high)
        slow = jnp.where(both & (jnp.log(high / low) > width / 2), s.slow + 1, 0)
        s = s._replace(low=low, below=below, high=high, above=above, slow=slow)
        both = jnp.isfinite(low) & jnp.isfinite(high)
        leap = jnp.minimum(jnp.square(s.leap), 2.0**16)
        after = jnp.where(both, between(s), beyond(s, now, slope, rose))
        done = (both & (high <= low * (1 + tolerance))) | ~((after > 0) & jnp.isfinite(after))
        return s._replace(
            last=now, last_slope=slope, now=after, leap=leap, passes=s.passes + 1, done=done | ~jnp.isfinite(start)
        )

    zero = jnp.zeros_like(near)
    count = jnp.int32(0)
    first = _Search(nan, nan, nan, nan, nan, nan, near, zero + 4, count, count, jnp.array(False))
    found = jax.lax.while_loop(lambda s: ~s.done & (s.passes < MOST), body, first)
    straight, usable = line(found)
    rate = jnp.where(usable, straight, jnp.sqrt(found.low) * jnp.sqrt(found.high))
    # A quadratic changes by 4 fall·(rate/eta_c - 1) near eta_c: by so much of the rate its rounding may move eta_c.
    fall = start - loss(rate / 2)
    hidden = jnp.where(fall > 0, noise * jnp.abs(start) / fall, jnp.inf)
    rate = jnp.where((found.high <= found.low * (1 + tolerance)) & (hidden < 0.1), rate, jnp.nan)
    return Critical(rate, 2 / rate, found.low / (1 + hidden), found.high * (1 + hidden), found.passes + 1)
