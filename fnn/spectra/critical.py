"""The rate at which a step no longer lowers the loss, found by forward passes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MOST = 24
"""Forward passes at most; a quadratic loss takes five."""


class Critical(NamedTuple):
    """The critical rate of a step direction; NaN where the step does not lower the loss at any rate that was tried."""

    rate: jax.Array
    """eta_c: at smaller rates the step lowers the loss; float[]."""
    sharpness: jax.Array
    """lambda_c = 2/eta_c, the critical sharpness; float[]."""
    low: jax.Array
    """The largest rate tried at which the loss fell; float[]."""
    high: jax.Array
    """The smallest rate tried at which it rose, or was not finite; float[]."""
    passes: jax.Array
    """Forward passes; int32[]."""


class _Search(NamedTuple):
    low: Any
    below: Any
    """(L(x - low·step) - L(x))/low, which is linear in the rate where the loss is quadratic; at most 0."""
    high: Any
    above: Any
    last: Any
    last_slope: Any
    now: Any
    """The rate to be tried next."""
    passes: Any
    done: Any


def critical(loss: Callable[[Any], Any], start: Any, near: Any, tolerance: float) -> Critical:
    """Find the smallest rate > 0 with loss(rate) > loss(0), to a relative tolerance, from a first guess `near`.

    By secants through loss differences over rates, kept inside a bracket (Illinois) once there is one.
    """
    near = jnp.asarray(near, jnp.result_type(start))
    nan = jnp.full_like(near, jnp.nan)

    def between(s, rose):
        # Illinois: where the same side moved twice in a row, half of the other's value keeps the secant moving.
        straight = s.low - s.below * (s.high - s.low) / (s.above - s.below)
        middle = jnp.sqrt(s.low * s.high)
        inside = jnp.isfinite(straight) & (straight >= s.low) & (straight <= s.high)
        return jnp.where(inside, straight, middle)

    def beyond(s, now, slope):
        secant = now - slope * (now - s.last) / (slope - s.last_slope)
        usable = jnp.isfinite(secant) & (secant > 0)
        up = jnp.where(usable & (secant > now), jnp.clip(secant, 1.02 * now, 100 * now), 2 * now)
        down = jnp.where(usable & (secant < now), jnp.clip(secant, now / 100, now / 1.02), now / 4)
        return jnp.where(slope <= 0, up, down)

    def body(s):
        now = s.now
        slope = (loss(now) - start) / now
        rose = ~(slope <= 0)
        both = jnp.isfinite(s.low) & jnp.isfinite(s.high)
        below = jnp.where(rose, jnp.where(both & (s.last == s.high), s.below / 2, s.below), slope)
        above = jnp.where(rose, slope, jnp.where(both & (s.last == s.low), s.above / 2, s.above))
        s = s._replace(
            low=jnp.where(rose, s.low, now),
            below=below,
            high=jnp.where(rose, now, s.high),
            above=above,
        )
        both = jnp.isfinite(s.low) & jnp.isfinite(s.high)
        after = jnp.where(both, between(s, rose), beyond(s, now, slope))
        near_enough = both & ((jnp.abs(after / now - 1) < tolerance) | (s.high < s.low * (1 + tolerance)))
        return s._replace(last=now, last_slope=slope, now=after, passes=s.passes + 1, done=near_enough)

    first = _Search(nan, nan, nan, nan, nan, nan, near, jnp.int32(1), jnp.array(False))
    found = jax.lax.while_loop(lambda s: ~s.done & (s.passes < MOST), body, first)
    rate = jnp.where(found.done, found.now, jnp.nan)
    return Critical(rate, 2 / rate, found.low, found.high, found.passes)
