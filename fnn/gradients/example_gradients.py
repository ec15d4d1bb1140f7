"""The gradients of all examples of a batch as one object: norms, sums, clipped sums, inner products, variances."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnn import check, compiled, lowering, mapped, tree
from fnn.tree import PyTree


class Clipped(NamedTuple):
    """What `clipped_mean` returns."""

    mean: PyTree
    """Mean of the clipped gradients, like params."""
    fraction: jax.Array
    """Share of the examples (with per_layer: of examples and layers) that were clipped; float[]."""
    bias: jax.Array
    """|clipped mean - mean|: clipping single examples changes the expectation; float[]."""
    nonfinite: jax.Array
    """How many examples have no finite norm: NaN or inf in the gradient, or a norm beyond the range; float[]."""
    zero: jax.Array
    """How many examples have norm 0: no gradient at all, or one that vanished below the range; float[]."""


class Moments(NamedTuple):
    """Unbiased estimates from one batch; trees like params, of float[] or below `repeat` float[depth]."""

    trace: PyTree
    """trace cov(g_i), of single examples."""
    signal: PyTree
    """|E g|²; may come out below zero where noise prevails."""


class Estimates(NamedTuple):
    """Moments in units of `unit`², which are 1 unless squares would leave the range: then powers of two near the norms."""

    trace: PyTree
    signal: PyTree
    unit: PyTree

    def moments(self, unit: ArrayLike = 1) -> Moments:
        """Write them in units of one's own; what lies outside the range of floats is 0 or inf."""

        def converted(a, own):
            ratio = own / unit
            return a * ratio * ratio

        return Moments(*(jax.tree.map(converted, a, self.unit) for a in (self.trace, self.signal)))

    def ratio(self) -> PyTree:
        """Divide signal by trace, which needs no unit."""
        return jax.tree.map(jnp.divide, self.signal, self.trace)


class Route(NamedTuple):
    """How the gradients of one parameter array are kept."""

    path: str
    route: str
    """`product`, `convolution` or `rows`, which are kept as factors; `zero`; `stored, small` for biases and scales, whose
    gradients are as small as the error signals; `stored in full` where none of these was recognised."""
    bytes: int
    """What is kept of all examples."""
    materialized: int
    """What `vmap(grad)` would keep."""


@flax.struct.dataclass
class PerExampleGradients:
    """The gradients g_i of all examples of a batch, kept as factors; a pytree. Made by `per_example`.

    A method computes when it is called. Within one `jit` nothing is computed that is not asked for, and what several
    methods share is computed once. Norms, sums and products are in at least float32.
    """

    leaves: list[PyTree]
    batch: int = flax.struct.field(pytree_node=False)
    share: int = flax.struct.field(pytree_node=False)
    """Leaves hold g_i / share. With a share of `batch` the mean is one product of the factors, without weights."""
    structure: Any = flax.struct.field(pytree_node=False)
    specs: tuple[tuple[jax.ShapeDtypeStruct, int], ...] = flax.struct.field(pytree_node=False)
    """Shape and dtype of every parameter array, and how many depth axes it has."""
    routes: tuple[Route, ...] = flax.struct.field(pytree_node=False)

    @functools.partial(compiled.limited, static_argnames="per_leaf")
    def squared_norms(self, per_leaf: bool = False) -> PyTree:
        """Take |g_i|² over all parameters: float[batch]; `per_leaf` of each: float[batch], below `repeat` [depth, batch].

        A square outside float32's range is 0 or inf: that of a norm below 1e-19 or above 1e19. `norms` holds there too.
        """
        return jax.tree.map(jnp.square, self.norms(per_leaf))

    @functools.partial(compiled.limited, static_argnames="per_leaf")
    def norms(self, per_leaf: bool = False) -> PyTree:
        """Take |g_i|, shapes as in `squared_norms`; right wherever the norm itself is a float."""
        norms = self._norms()
        return self._unflatten(norms) if per_leaf else self._total(norms)

    @compiled.limited
    def mean(self) -> PyTree:
        """Average: sum_i g_i / batch, like params. It is the gradient of the mean loss."""
        return self._cast(self._mean())

    def _mean(self) -> PyTree:
        """Average without rounding to the parameters' types: differences of means, and of norms, are left of it."""
        wide = jnp.result_type(jnp.float32, *(spec.dtype for spec, _ in self.specs))
        w = None if self.share == self.batch else jnp.full(self.batch, self.share / self.batch, wide)
        return self._sum([w] * len(self.leaves))

    @compiled.limited
    def weighted_sum(self, w: ArrayLike) -> PyTree:
        """Take sum_i w_i g_i, like params; w: float[batch]."""
        w = _wide(w)
        if w.shape != (self.batch,):
            raise ValueError(f"per_example: weights must be float[{self.batch}], one each, got {check.describe(w)}")
        w = self.share * w
        # Far from 1, a weight could take a factor out of the range where their product is inside.
        near = jnp.all(((jnp.abs(w) > 2.0**-12) & (jnp.abs(w) < 2.0**12)) | (w == 0))
        every = [w] * len(self.leaves)
        if not lowering.conditionals():
            return self._cast(self._sum(every, "balanced"))
        return self._cast(jax.lax.cond(near, lambda: self._sum(every), lambda: self._sum(every, "balanced")))

    @compiled.limited
    def weighted_mean(self, w: ArrayLike) -> PyTree:
        """Take sum_i w_i g_i / sum_i w_i, like params; w: float[batch]."""
        w = _wide(w)
        return self.weighted_sum(w / jnp.sum(w))

    def clipped_mean(self, max_norm: ArrayLike, per_layer: bool = False, skip_nonfinite: bool = False) -> Clipped:
        """Clip every example's gradient, then average: sum_i g_i·min(1, max_norm/|g_i|) / batch.

        With `per_layer` every parameter array of every layer is clipped on its own, below `repeat` every depth. An
        example whose norm is not finite (or beyond 1e38·max_norm) makes the mean NaN, so that it stays visible, and is
        counted in `nonfinite`; with `skip_nonfinite` it counts as zero, and the sum is still divided by the whole batch.
        Source: Abadi et al. 2016, algorithm 1 (without its noise).
        """
        check.above_zero("clipped_mean", max_norm=max_norm)
        return self._clipped_mean(max_norm, per_layer, skip_nonfinite)

    @functools.partial(compiled.limited, static_argnames=("per_layer", "skip_nonfinite"))
    def _clipped_mean(self, max_norm: ArrayLike, per_layer: bool, skip_nonfinite: bool) -> Clipped:
        found = self._clipped(max_norm, per_layer, skip_nonfinite)
        return found._replace(mean=self._cast(found.mean))

    def _clipped(self, max_norm: ArrayLike, per_layer: bool, skip_nonfinite: bool) -> Clipped:
        each = self._norms()
        whole = self._total(each)
        norms = each if per_layer else [whole]
        factors = [tree.clip_factor(norm, max_norm) for norm in norms]
        # A factor of zero or below the range would make zeros of an exploded gradient.
        factors = [jnp.where(f >= jnp.finfo(f.dtype).tiny, f, jnp.nan) for f in factors]
        finite = jnp.isfinite(whole) & functools.reduce(jnp.logical_and, [_every(jnp.isfinite(f)) for f in factors])
        kept = self
        if skip_nonfinite:
            factors, kept = [jnp.where(finite, f, 0) for f in factors], self._kept(finite)
        clipped = sum(jnp.sum(norm > max_norm) for norm in norms) / max(1, sum(norm.size for norm in norms))
        weights = [self.share / self.batch * factor for factor in factors]
        mean = kept._sum(weights if per_layer else weights * len(self.leaves))
        bias = tree.norm(jax.tree.map(jnp.subtract, mean, kept._mean()))
        counts = [jnp.sum(n, dtype=jnp.float32) for n in (~finite, whole == 0)]
        return Clipped(mean, jnp.asarray(clipped, jnp.float32), bias, *counts)

    @compiled.limited
    def gram(self) -> jax.Array:
        """Take all inner products <g_i, g_j>: float[batch, batch]. One outside float32's range is 0 or inf.

        Its eigenvalues over the batch are the non-zero spectrum of the empirical Fisher matrix.
        """
        gram, scale = self._gram()
        return gram * (self.share * scale)[:, None] * (self.share * scale)

    @compiled.limited
    def cosines(self) -> jax.Array:
        """Take <g_i, g_j>/(|g_i||g_j|): float[batch, batch]; 0 where a gradient is zero."""
        gram, _ = self._gram()
        norms = jnp.sqrt(jnp.diagonal(gram))
        inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), norms)
        return gram * inverse[:, None] * inverse

    @compiled.limited
    def moments(self, unit: ArrayLike = 1) -> Moments:
        """Estimate trace cov(g_i) and |E g|² of every parameter array; see `variance` and `signal_to_noise`.

        Both in units of `unit`²: with a unit near the norms they fit float32 where the squares do not.
        """
        return self.estimates().moments(unit)

    @functools.partial(compiled.limited, static_argnames="per_leaf")
    def variance(self, per_leaf: bool = False) -> PyTree:
        """Estimate the trace of the covariance of g_i: sum_i |g_i - mean|² / (batch - 1), unbiased.

        float[]; `per_leaf`: a tree like params of float[], below `repeat` float[depth]. From sum |g_i|² - batch·|mean|²,
        so that rounding leaves an error of about 1e-7·|mean|²·batch/(batch - 1). Outside float32's range it is 0 or inf.
        """
        found = self.estimates()
        return (found if per_leaf else total(found)).moments().trace

    @functools.partial(compiled.limited, static_argnames="per_leaf")
    def signal_to_noise(self, per_leaf: bool = False) -> PyTree:
        """Estimate |E g|² / trace cov(g): its inverse is the batch size at which noise and signal are equal.

        |E g|² is estimated without bias, |mean|² - variance/batch, and so may come out below zero; shapes as in
        `variance`. One batch says little: `noise.scale` averages over steps. Source: McCandlish et al. 2018.
        """
        found = self.estimates()
        return (found if per_leaf else total(found)).ratio()

    @compiled.limited
    def materialize(self) -> PyTree:
        """Store all gradients, as `vmap(grad(loss))` does: a tree like params, each leaf with a leading axis of batch."""
        found = [self.share * leaf.materialize() for leaf in self.leaves]
        return self._unflatten(
            [g.reshape(self.batch, *spec.shape).astype(spec.dtype) for g, (spec, _) in self._with_specs(found)]
        )

    def __getitem__(self, key: Hashable) -> "PerExampleGradients":
        """Take the gradients of one child of params: `gradients["trunk"].norms()`."""
        child = jax.tree.unflatten(self.structure, range(len(self.leaves)))[key]
        chosen = jax.tree.leaves(child)
        parts = {name: tuple(getattr(self, name)[i] for i in chosen) for name in ("specs", "routes")}
        return dataclasses.replace(
            self, leaves=[self.leaves[i] for i in chosen], structure=jax.tree.structure(child), **parts
        )

    def explain(self) -> None:
        """Print a table: for each parameter array how its gradients are kept (see `Route`), and the memory that takes."""
        print(self)

    def __str__(self) -> str:
        rows = [("parameter", "kept as", "kept", "in full")]
        rows += [(r.path, r.route, _size(r.bytes), _size(r.materialized)) for r in self.routes]
        kept, whole = (_size(sum(getattr(r, name) for r in self.routes)) for name in ("bytes", "materialized"))
        rows.append(("total", f"{self.batch} examples", kept, whole))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)

    __repr__ = __str__

    def _norms(self) -> list[jax.Array]:
        """Norms of every leaf: float[batch], or float[depth..., batch]."""
        return [
            n.reshape(*spec.shape[:depth], self.batch) if depth else tree.length(n, tuple(range(n.ndim - 1)))
            for n, (spec, depth) in self._with_specs([self.share * leaf.norms() for leaf in self.leaves])
        ]

    def _total(self, norms: list[jax.Array]) -> jax.Array:
        rows = [jnp.zeros((1, self.batch), jnp.float32), *(n.reshape(-1, self.batch) for n in norms)]
        return tree.length(jnp.concatenate(rows), 0)

    def estimates(self) -> Estimates:
        """Estimate the moments of every parameter array in units of their own."""
        if self.batch < 2:
            raise ValueError(f"per_example: a variance needs at least two examples, got a batch of {self.batch}")
        with jax.default_matmul_precision("highest"):  # squares are subtracted: TF32 would leave few digits
            means = jax.tree.leaves(tree.norms(self._mean()))
            found = [estimate(n, m, self.batch) for n, m in zip(self._norms(), means, strict=True)]
        return Estimates(*(self._unflatten(list(part)) for part in zip(*found, strict=True)))

    def _gram(self) -> tuple[jax.Array, jax.Array]:
        """Take all <g_i, g_j>/(scale_i scale_j)/share², and the scales, which bound the numbers of g_i/share."""
        none = jnp.zeros((1, self.batch), jnp.float32)
        bounds = jnp.concatenate([none, *(leaf.bounds().reshape(-1, self.batch) for leaf in self.leaves)])
        # Once: a GPU would compute it again in each product's kernel, and take minutes to compile.
        scale = jax.lax.optimization_barrier(tree.divisor(jnp.max(bounds, axis=0)))
        return sum((leaf.gram(scale) for leaf in self.leaves), start=none[0] * none.T), scale

    def _sum(self, weights: list[Any], how: str = "weighted") -> Any:
        """Take the weighted sum of each leaf, at least in float32; weights of one: None, float[batch], or float[depth..., batch]."""
        sums = []
        for leaf, w, (spec, _) in zip(self.leaves, weights, self.specs, strict=True):
            if w is not None:
                w = w.reshape(*leaf.levels, -1) if w.ndim > 1 else jnp.broadcast_to(w, (*leaf.levels, *w.shape))
            sums.append(getattr(leaf, how)(w).reshape(spec.shape).astype(tree.statistics_dtype(spec.dtype)))
        return self._unflatten(sums)

    def _cast(self, sums: PyTree) -> PyTree:
        """Give sums the types of the parameters."""
        return self._unflatten([a.astype(spec.dtype) for a, (spec, _) in self._with_specs(jax.tree.leaves(sums))])

    def _kept(self, wanted: jax.Array) -> "PerExampleGradients":
        """Replace some examples' gradients by zeros, also where these are NaN."""

        def kept(leaf, x):
            return jnp.where(wanted.reshape(-1, *(1,) * (x.ndim - leaf.lead - 1)), x, jnp.zeros((), x.dtype))

        leaves = [jax.tree.map(functools.partial(kept, leaf), leaf) for leaf in self.leaves]
        return dataclasses.replace(self, leaves=leaves)

    def _with_specs(self, values: list[Any]) -> Any:
        return zip(values, self.specs, strict=True)

    def _unflatten(self, values: list[Any]) -> Any:
        return jax.tree.unflatten(self.structure, values)


def estimate(norms: jax.Array, mean: jax.Array, n: int, axis_name: mapped.AxisName = ()) -> Estimates:
    """Estimate the moments of one array's n gradients from their norms, float[..., batch], and the norm of their mean.

    With `axis_name` the norms are those of one device, the mean and n those of all.
    """
    largest = jnp.max(norms, axis=-1)
    if axis_name:
        largest = mapped.reduce(jax.lax.pmax, jax.lax.stop_gradient(largest), axis_name)
    unit = _unit(jnp.maximum(largest, mean))
    of_squares, of_mean = jnp.mean(jnp.square(norms / unit[..., None]), axis=-1), jnp.square(mean / unit)
    if axis_name:
        of_squares = mapped.mean(of_squares, axis_name)
    trace = jnp.maximum(of_squares - of_mean, 0) * (n / (n - 1) if n > 1 else jnp.nan)
    return Estimates(trace, of_mean - trace / n, unit)


def total(found: Estimates) -> Estimates:
    """Add up the estimates of all arrays, in one unit: float[] each."""
    parts = list(zip(*map(jax.tree.leaves, found), strict=True))
    sizes = [jnp.max(unit * tree.safe_sqrt(trace + jnp.abs(signal)), initial=0) for trace, signal, unit in parts]
    unit = _unit(jnp.max(jnp.stack([jnp.zeros((), jnp.float32), *sizes])))
    moments = [Estimates(*part).moments(unit) for part in parts]
    traces, signals = ([jnp.sum(moment[i]) for moment in moments] for i in range(2))
    return Estimates(
        sum(traces, start=jnp.zeros((), jnp.float32)), sum(signals, start=jnp.zeros((), jnp.float32)), unit
    )


def _wide(w: ArrayLike) -> jax.Array:
    """Take weights as floats of at least 32 bits: whole numbers of few bits would wrap around when they are scaled."""
    return jnp.asarray(w, jnp.promote_types(jnp.asarray(w).dtype, jnp.float32))


def _unit(norm: jax.Array) -> jax.Array:
    """Choose the unit of squares: 1, or a power of two near norms whose squares leave the range."""
    norm = jax.lax.stop_gradient(norm)
    power = jnp.exp2(jnp.clip(jnp.frexp(norm)[1], -125, 125).astype(norm.dtype))
    return jnp.where((norm > 2.0**60) | ((norm > 0) & (norm < 2.0**-50)), power, 1)


def _every(holds: jax.Array) -> jax.Array:
    """Whether it holds at all depths: bool[depth..., batch] -> bool[batch]."""
    return jnp.all(holds, axis=tuple(range(holds.ndim - 1)))


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"
