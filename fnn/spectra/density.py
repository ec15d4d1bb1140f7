"""Spectral densities by stochastic Lanczos quadrature; the Lanczos iterations are those of `matfree`."""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Density(NamedTuple):
    """The density of eigenvalues, as shares of all of them: it integrates to 1."""

    grid: np.ndarray
    """Where it is evaluated, float64[points]."""
    values: np.ndarray
    errors: np.ndarray
    """Standard errors over probes, float64[points]."""
    width: float
    """Standard deviation of the Gaussians that smooth it."""
    nodes: np.ndarray
    """Of the quadrature, float64[probes, steps]."""
    weights: np.ndarray
    """Of the quadrature: each probe's sum to 1."""
    relative_error: float
    """RMS of the errors over RMS of the values."""

    @property
    def probes(self) -> int:
        """How many random vectors were used."""
        return len(self.nodes)

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """Estimate the mean of a function over all eigenvalues, with its standard error over probes."""
        each = np.sum(self.weights * function(self.nodes), axis=1)
        return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def matfree(who: str, module: str) -> Any:
    """Import a module of matfree. Errors: ImportError that says what to install."""
    try:
        return importlib.import_module(f"matfree.{module}")
    except ImportError as error:
        raise ImportError(f"{who}: needs matfree, which is not installed; pip install 'fnn[spectra]'") from error


def quadrature(matvec: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Turn a start vector into nodes and weights, float[steps] each; the weights sum to 1.

    Where the matrix has fewer distinct eigenvalues than steps, the rest of the nodes have weight 0.
    """
    algorithm = matfree("density", "decomp").tridiag_sym(steps, materialize=False, reortho="full", custom_vjp=False)
    diagonal, beside = algorithm(matvec, start).J_small
    # After an exactly invariant space matfree divides 0 by 0: all entries from there on are cut off, with their coupling.
    good = jnp.cumprod(jnp.isfinite(diagonal)).astype(bool)
    broken = ~jnp.isfinite(diagonal[0])  # a product of the matrix itself is not finite
    diagonal, beside = jnp.where(good, diagonal, 0), jnp.where(good[1:], beside, 0)
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1))
    return jnp.where(broken, jnp.nan, values), jnp.square(vectors[0])


def density(who: str, probe: Callable[[Any], Any], key: Any, options: tuple[float, int, Any]) -> Density:
    """Run probes until the smoothed density is known to a relative error; see `Operator.density`.

    `probe(keys)` gives nodes and weights for each key; `options` are (error, most probes, width).
    """
    matfree(who, "decomp")
    error, most, width = options
    first = max(2, min(4, most))
    nodes, weights = _probed(probe, key, 0, first)
    if not np.all(np.isfinite(nodes)):
        raise ValueError(f"{who}: the matrix must be finite, got NaN or infinity in its products; see watch.first_bad")
    extent = float(nodes.max() - nodes.min())
    if width is None:
        width = extent / 50 or 0.02 * max(abs(float(nodes.max())), 1e-30)
    grid = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, 512)
    found = _smooth(grid, nodes, weights, width)
    wanted = math.ceil(first * (found.relative_error / error) ** 2)
    if wanted > first and most > first:
        more = _probed(probe, key, first, min(wanted, most) - first)
        nodes, weights = (np.concatenate(pair) for pair in zip((nodes, weights), more, strict=True))
        found = _smooth(grid, nodes, weights, width)
    return found


def _probed(probe: Callable[[Any], Any], key: Any, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Run probes in fours, so that one program serves any number."""
    found = []
    for start in range(first, first + count, 4):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(start, start + 4))
        found.append([np.asarray(a, np.float64) for a in probe(keys)])
    nodes, weights = (np.concatenate(parts)[:count] for parts in zip(*found, strict=True))
    return nodes, weights


def _smooth(grid: np.ndarray, nodes: np.ndarray, weights: np.ndarray, width: float) -> Density:
    bumps = np.exp(-0.5 * ((grid[:, None, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    each = np.sum(bumps * weights, axis=2)
    errors = each.std(axis=1, ddof=1) / math.sqrt(len(nodes))
    values = each.mean(axis=1)
    relative = float(np.sqrt(np.mean(errors**2) / np.mean(values**2)))
    return Density(grid, values, errors, width, nodes, weights, relative)
