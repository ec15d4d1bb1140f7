"""A symmetric matrix that is known by its products with vectors: extreme eigenvalues, trace, spectral density."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, compiled, mapped, tree
from fnn.spectra import krylov, parts
from fnn.spectra.density import Density, density, quadrature
from fnn.spectra.krylov import Pairs
from fnn.spectra.parts import Part
from fnn.tree import PyTree


class Estimate(NamedTuple):
    """A mean over random probes."""

    value: jax.Array
    error: jax.Array
    """Its standard error; 0 where it was computed exactly."""


class Traces(NamedTuple):
    """What `Operator.trace` returns."""

    trace: Estimate
    square: Estimate
    """The trace of the matrix squared: the sum of the squared eigenvalues; 0 or inf where it leaves the dtype's range."""
    norm: Estimate
    """Its root, the Frobenius norm, in range wherever the matrix is; the error is that of first order."""
    products: int


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix A over (some of) the parameters, made by `curvature`; its vectors are trees like params.

    Programs are compiled once for each shape and shared by equal losses. All methods work under `jit`, `vmap` and
    `shard_map(check_vma=True)`, and with a sharded batch or sharded parameters. Numbers are in the dtype of the parameters,
    at least float32; a product runs in the dtypes of the loss. In float32 a product is within 2e-6 of float64's, relative to
    its norm (measured: 2e-7 on small nets), and an eigenvalue likewise; in bfloat16 expect percents: residuals say so. A
    product takes about as long as a gradient or two, and about twice a gradient's memory; eigenvalues keep some
    2 `max_products` + 50 vectors besides.
    """

    who: str
    _multiply: Callable[..., Any]
    """`(*statics, arrays) -> (tree -> tree)`"""
    _statics: tuple[Any, ...]
    _arrays: PyTree
    _params: PyTree
    _part: Part
    _blocks: jax.Array | np.ndarray
    _scale: PyTree | None = None
    """With s, the matrix is diag(s) A diag(s): a tree like params."""

    @property
    def size(self) -> int:
        """How many rows the matrix has."""
        return self._part.size(self._params)

    def at(self, pattern: str) -> "Operator":
        """Take the block of the matrix that belongs to some parameters: paths as in `fnmatch`, "1/*/kernel", "1/[3]/*".

        A block of `repeat` is written as `[3]` or `3`; `[:]` is every block. Errors: ValueError where none matches.
        """
        part, blocks = parts.choose(self.who, self._params, pattern)
        return replace(self, _part=part, _blocks=blocks)

    def layers(self) -> dict[str, "Operator"]:
        """Take the diagonal block of each layer, every block of `repeat` on its own: {"1/3/0": Operator, ...}.

        Blocks of one stack share a compiled program.
        """
        found = {name: parts.chosen(rows, self._params) for name, rows in parts.layers(self._params).items()}
        return {name: replace(self, _part=part, _blocks=blocks) for name, (part, blocks) in found.items()}

    def product(self, v: PyTree) -> PyTree:
        """Multiply: A v, for a tree v like params; entries outside the chosen parameters are taken as zero."""
        if jax.tree.structure(v) != jax.tree.structure(self._params):
            raise ValueError(f"{self.who}: a vector must be a tree like params, got {check.describe(v)}")
        return self._run(_product, (), v)

    def eigenvalues(
        self,
        k: int = 1,
        *,
        end: str = "top",
        tolerance: float = 0.01,
        missed: float = 0.02,
        max_products: int | None = None,
        start: Pairs | None = None,
        key: jax.Array | None = None,
    ) -> Pairs:
        """Find k eigenvalues at the "top" (largest first) or "bottom" (smallest first) of the spectrum, with residuals.

        Lanczos with full reorthogonalisation grows until each residual |A v - λ v| is within `tolerance` of |λ|: an eigenvalue
        lies within the residual of each value, surely. That none is larger is known from a random vector: the result's
        `missed` is the chance that the k-th eigenvalue lies beyond `limit`, at most, which is the last value and the tolerance
        (never nearer than some thousand roundings: 1e-4 to 4e-4 in float32). Where `max_products` (default 40 + 10k) do not suffice
        it warns, and says `converged=False`. Eigenvalues are seen up to k times each.

        `missed` is the largest chance allowed; a search that has to work for it goes on to a quarter. Leave it where a number
        is to be relied on, or records lie far apart. With 1 residuals alone count: for tracking from step to step, where
        eigenvectors overlap by .85 or more, with a certain search now and then, since an eigenvalue that has overtaken the
        tracked one from outside of its space stays unseen.

        `start`, the result of a similar matrix (of the last step), starts from its vectors, and from what proved that none is
        larger. Products, measured on tanh nets of 13,000 to 217,000 parameters, by the overlap of eigenvectors with the last:

            overlap        .99 and more    .85 to .99    .73       from nothing
            missed=0.02    2 to 15         10 to 18      21, 25    8 to 27
            missed=1       1 to 4          4 to 6        8, 12     5 to 19

        `key` draws the first vectors (default `jax.random.key(0)`). `eigenvector(pairs, i)` is a tree like params.
        Source: Parlett 1980, theorem 4.5.1 for the residual; Davidson 1975 with `start`.
        Its seven options are all about one search. Errors: ValueError for k beyond the matrix, or a chance outside (0, 1].

            found = fnn.curvature(loss)(params, batch).hessian.eigenvalues(3)
        """
        check.choice(self.who, ("top", "bottom"), end=end)
        check.positive(self.who, k=k)
        if k > self.size:
            raise ValueError(f"{self.who}: k must be at most the {self.size} parameters, got {k}")
        most = 40 + 10 * k if max_products is None else max_products
        check.positive(self.who, max_products=most)
        tolerance = check.number(self.who, tolerance=tolerance)
        missed = check.number(self.who, low=1e-6, high=1, missed=missed)
        dtype = self._part.dtype(self._params)
        draw, go = jax.random.split(_key(self.who, key))
        if start is None:
            vectors = jax.random.normal(draw, (k, self.size), dtype)
            known = krylov.unknown(vectors)
        elif start.vectors.shape[-1] != self.size:
            raise ValueError(
                f"{self.who}: start must be pairs of a matrix of this size, got vectors of {start.vectors.shape[-1]} numbers "
                f"for {self.size}"
            )
        else:
            vectors, known = jnp.asarray(start.vectors, dtype), start.known
        sign, limits = (1 if end == "top" else -1), jnp.array([tolerance, missed], dtype)
        found = self._run(_eigenpairs, (k, most, sign), (vectors, known, go, limits))
        if not compiled.traced(found) and not np.all(found.converged):
            what = "the matrix has NaN" if np.any(np.isnan(found.values)) else f"{np.max(found.products)} products"
            warnings.warn(
                f"{self.who}: the eigenvalues are not known to {tolerance:g}, after {what}; see their `residuals` and the chance "
                "that one was `missed`, or allow more: max_products=",
                stacklevel=2,
            )
        return found

    def eigenvector(self, pairs: Pairs, i: int = 0) -> PyTree:
        """Write the i-th eigenvector as a tree like params."""
        return self._part.unflatten(jnp.asarray(self._blocks), pairs.vectors[i], self._params)

    def trace(self, probes: int = 32, *, key: jax.Array | None = None) -> Traces:
        """Estimate trace A = E vᵀA v and trace A² = E |A v|², v of random signs, with standard errors.

        With at least as many probes as the matrix has rows it is exact, from unit vectors. The probes run one after the
        other: the memory is that of one product. Source: Hutchinson 1989. Errors: ValueError for fewer than two probes.
        """
        check.positive(self.who, probes=probes)
        exact = probes >= self.size
        if probes < 2 and not exact:
            raise ValueError(f"{self.who}: a standard error needs at least two probes, got {probes}")
        count = self.size if exact else probes
        found = self._run(_traces, (count, exact), _key(self.who, key))
        trace, square, norm = (Estimate(*part) for part in found)
        return Traces(trace, square, norm, count)

    def density(
        self,
        *,
        error: float = 0.05,
        steps: int = 60,
        max_probes: int = 64,
        width: float | None = None,
        key: jax.Array | None = None,
    ) -> Density:
        """Estimate the density of eigenvalues by stochastic Lanczos quadrature, smoothed by Gaussians of one width.

        Each probe gives `steps` nodes and weights. The number of probes is the one after which the standard error is
        at most `error` of the density, both as RMS over the grid, as the spread of the first four says; at least four, at
        most `max_probes`. `width` is the Gaussian's standard deviation, by default 1/50 of the spectrum's extent. Needs
        `pip install 'fnn[spectra]'`. For the host. Source: Ghorbani et al. 2019, Lin et al. 2016.
        """
        check.positive(self.who, steps=steps, max_probes=max_probes)
        check.above_zero(self.who, error=error)
        if self.size == 0:
            raise ValueError(f"{self.who}: a density needs at least one parameter, got none; choose others by at()")
        steps = min(steps, self.size)

        def probe(keys):
            return jax.device_get(self._run(_quadratures, (steps,), keys))

        return density(self.who, probe, _key(self.who, key), (error, max_probes, width))

    def _matvec(self, arrays: Any) -> Callable[[jax.Array], jax.Array]:
        """Make `float[n] -> float[n]` of other arrays, inside a program."""
        return _Matrix(self._multiply, self._statics, self._part).matvec(
            (arrays, self._params, jnp.asarray(self._blocks), self._scale)
        )

    def _run(self, function: Callable[..., Any], options: tuple[Any, ...], values: Any) -> Any:
        given = (self._arrays, self._params, jnp.asarray(self._blocks), self._scale)
        matrix = _Matrix(self._multiply, self._statics, self._part)
        return compiled.call(function, (matrix, *options), given, values)


class _Matrix(NamedTuple):
    """What of an operator is static; its arrays are (those of the loss, params, block numbers, scale)."""

    multiply: Callable[..., Any]
    statics: tuple[Any, ...]
    part: Part

    def matvec(self, given: Any) -> Callable[[jax.Array], jax.Array]:
        """Make `float[n] -> float[n]`.

        Each product goes through the loss anew: what a linearised loss keeps for all products is several times what a
        gradient needs.
        """
        arrays, params, blocks, scale = given
        part = self.part
        diagonal = None if scale is None else part.flatten(blocks, scale)

        def run(v):
            v, own = _together(v if diagonal is None else v * diagonal, arrays)
            v = part.flatten(blocks, self.multiply(*self.statics, own)(part.unflatten(blocks, v, params)))
            return v if diagonal is None else v * diagonal

        return run

    def kind(self, given: Any) -> tuple[int, Any]:
        """Size and dtype of its vectors."""
        return self.part.size(given[1]), self.part.dtype(given[1])


def _together(v: jax.Array, arrays: Any) -> tuple[jax.Array, Any]:
    """Tie arrays to v, so that XLA does not take what they alone determine out of a loop over v, and hold all of it.

    Those that vary over devices where v does not are left alone, or v would too.
    """
    leaves, treedef = jax.tree.flatten(arrays)
    tied = [
        i
        for i, leaf in enumerate(leaves)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not mapped.over(leaf) - mapped.over(v)
    ]
    v, found = jax.lax.optimization_barrier((v, [leaves[i] for i in tied]))
    for i, leaf in zip(tied, found, strict=True):
        leaves[i] = leaf
    return v, treedef.unflatten(leaves)


def _product(matrix: _Matrix, given: Any, v: Any) -> Any:
    flat = matrix.part.flatten(given[2], v)
    return matrix.part.unflatten(given[2], matrix.matvec(given)(flat), given[1])


def _eigenpairs(matrix: _Matrix, k: int, most: int, sign: int, given: Any, values: Any) -> Pairs:
    start, known, key, (tolerance, missed) = values
    return krylov.eigenpairs(matrix.matvec(given), start, known, key, k, (most, sign, tolerance, missed))


def _traces(matrix: _Matrix, count: int, exact: bool, given: Any, key: Any) -> list[Any]:
    matvec, (n, dtype) = matrix.matvec(given), matrix.kind(given)

    def one(i):
        if exact:
            v = (jnp.arange(n) == i).astype(dtype)
        else:
            v = jax.random.rademacher(jax.random.fold_in(key, i), (n,), dtype)
        w = matvec(v)
        return jnp.sum(v * w), tree.length(w)

    traces, lengths = jax.lax.map(one, jnp.arange(count))
    # In units of the largest, or squares would leave the range.
    unit = tree.divisor(jnp.maximum(jnp.max(lengths, initial=0), jnp.max(jnp.abs(traces), initial=0)))

    def estimate(a):
        if exact:
            return jnp.sum(a), jnp.zeros((), dtype)
        return jnp.mean(a), jnp.std(a, ddof=1) / math.sqrt(count)

    trace, square = estimate(traces / unit), estimate(jnp.square(lengths / unit))
    root = jnp.sqrt(square[0])
    norm = root, jnp.where(root > 0, square[1] / jnp.where(root > 0, 2 * root, 1), 0)
    return [tuple(a * unit for a in trace), tuple(a * unit * unit for a in square), tuple(a * unit for a in norm)]


def _quadratures(matrix: _Matrix, steps: int, given: Any, keys: Any) -> tuple[jax.Array, jax.Array]:
    matvec, (n, dtype) = matrix.matvec(given), matrix.kind(given)

    def one(key):
        probe = jax.random.rademacher(key, (n,), dtype)
        # In units of the matrix's own size, or squares of its products would leave the range.
        unit = tree.divisor(tree.length(matvec(probe)) / math.sqrt(n))
        nodes, weights = quadrature(lambda v: matvec(v) / unit, probe, steps)
        return nodes * unit, weights

    return jax.lax.map(one, keys)


def _key(who: str, key: jax.Array | None) -> jax.Array:
    if key is None:
        return jax.random.key(0)
    check.prng_key(who, key)
    return key
