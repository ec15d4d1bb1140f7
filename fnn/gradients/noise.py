"""The gradient noise scale: how large a batch must be for its gradient to be more signal than noise.

With g_i the gradient of example i and G its expectation, B_simple = trace cov(g_i) / |G|² is the batch size at which the
noise of the mean gradient is as large as the gradient. Both quantities are estimated without bias in every step and
averaged over steps *before* they are divided. Source: McCandlish et al. 2018, sections 2.2 and A.1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnn import check
from fnn.gradients.example_gradients import Moments, PerExampleGradients, total
from fnn.tree import PyTree


class NoiseScale(NamedTuple):
    """A ratio of means over steps, in float64."""

    value: np.ndarray | np.float64
    """B_simple; negative or huge where the signal cannot be told from zero: see `error`."""
    error: np.ndarray | np.float64
    """Its standard error by the jackknife; NaN for a single block of steps."""
    trace: np.ndarray | np.float64
    """Mean over steps of trace cov(g_i)."""
    signal: np.ndarray | np.float64
    """Mean over steps of |G|²."""


def moments(gradients: PerExampleGradients, *, group: int = 1, per_leaf: bool = False, unit: ArrayLike = 1) -> Moments:
    """Estimate S = sum |g_i - g|²/(B - 1) and |g|² - S/B from one batch: float[] each, or trees like params.

    In units of `unit`²: gradients beyond 1e±19, whose squares leave float32's range (0 or inf), need a unit near their
    norms, the same in all steps; the noise scale does not depend on it.

    Where examples depend on one another (batch norm), let an "example" be a group of `group` examples with statistics of
    its own (see `groups`), and its loss their mean: the trace of groups is multiplied by their size.
    """
    check.positive("noise.moments", group=group)
    estimates = gradients.estimates()
    found = (estimates if per_leaf else total(estimates)).moments(unit)
    return found._replace(trace=jax.tree.map(lambda s: group * s, found.trace))


def groups(batch: PyTree, size: int) -> PyTree:
    """Cut a batch into groups: float[batch, ...] -> float[batch/size, size, ...] for every leaf.

    Errors: ValueError if the size does not divide the batch.
    """
    check.positive("noise.groups", size=size)

    def cut(a):
        if jnp.ndim(a) == 0 or a.shape[0] % size:
            raise ValueError(f"noise.groups: size must divide the batch, got size={size} and {check.describe(a)}")
        return a.reshape(a.shape[0] // size, size, *a.shape[1:])

    return jax.tree.map(cut, batch)


def scale(trace: ArrayLike | Sequence[float], signal: ArrayLike | Sequence[float], *, block: int = 1) -> NoiseScale:
    """Divide the mean trace by the mean signal, with the jackknife's error: float[steps, ...] twice -> float[...].

    `trace` and `signal` are the estimates of many steps (`history.train["noise_trace"]`, `["noise_signal"]`). The
    jackknife leaves out one block of `block` consecutive steps at a time: take it longer than steps stay correlated. A
    last partial block is dropped. For trees: `jax.tree.map(noise.scale, traces, signals)`.

    Errors: ValueError for shapes that differ, or fewer steps than one block. Steps with NaN or inf make the result NaN.
    """
    check.positive("noise.scale", block=block)
    trace, signal = (np.asarray(jax.device_get(a), np.float64) for a in (trace, signal))
    if trace.shape != signal.shape or trace.ndim == 0 or len(trace) < block:
        raise ValueError(
            f"noise.scale: needs trace and signal float[steps, ...] of at least {block} steps, got "
            f"{check.describe(trace)} and {check.describe(signal)}"
        )
    count = len(trace) // block
    sums = [a[: count * block].reshape(count, block, *a.shape[1:]).mean(1) for a in (trace, signal)]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sums[0].mean(0) / sums[1].mean(0)
        if count == 1:
            return NoiseScale(value, np.full_like(value, np.nan), sums[0].mean(0), sums[1].mean(0))
        without = [a.sum(0) - a for a in sums]
        ratios = without[0] / without[1]
        error = np.sqrt((count - 1) * np.mean(np.square(ratios - ratios.mean(0)), axis=0))
    return NoiseScale(value, error, sums[0].mean(0), sums[1].mean(0))
