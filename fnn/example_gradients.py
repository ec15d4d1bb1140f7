"""The gradients of all examples of a batch as one object: norms, sums, clipped sums, inner products, variances."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from fnn import check, tree


class Clipped(NamedTuple):
    """What `clipped_mean` returns."""

    mean: Any
    """Mean of the clipped gradients, like params."""
    fraction: Any
    """Share of the examples (with per_layer: of examples and layers) that were clipped; float[]."""
    bias: Any
    """|clipped mean - mean|: clipping single examples changes the expectation; float[]."""


class Moments(NamedTuple):
    """Unbiased estimates from one batch; trees like params, of float[] or below `repeat` float[depth]."""

    trace: Any
    """trace cov(g_i), of single examples."""
    signal: Any
    """|E g|²; may come out below zero where noise prevails."""


class Route(NamedTuple):
    """How the gradients of one parameter array are held."""

    path: str
    route: str
    bytes: int
    """What is kept of all examples."""
    materialized: int
    """What `vmap(grad)` would keep."""


@flax.struct.dataclass
class PerExampleGradients:
    """The gradients g_i of all examples of a batch, held as factors; a pytree. Made by `per_example`.

    Every method is computed when it is called; what is not asked for within one `jit` is not computed at all, and
    what several methods share is computed once. Norms, sums and products are in at least float32.
    """

    leaves: list[Any]
    batch: int = flax.struct.field(pytree_node=False)
    share: int = flax.struct.field(pytree_node=False)
    """Leaves hold g_i / share. A share of `batch` makes the mean one product of the factors as they are."""
    structure: Any = flax.struct.field(pytree_node=False)
    specs: tuple[Any, ...] = flax.struct.field(pytree_node=False)
    """Shape and dtype of every parameter array, and how many depth axes it has."""
    routes: tuple[Route, ...] = flax.struct.field(pytree_node=False)

    @functools.partial(jax.jit, static_argnames="per_leaf")
    def squared_norms(self, per_leaf: bool = False) -> Any:
        """Take |g_i|² over all parameters: float[batch]; `per_leaf` of each: float[batch], below `repeat` [depth, batch].

        A square outside float32's range is 0 or inf.
        """
        squares = self._squares()
        return self._unflatten(squares) if per_leaf else self._total(squares)

    @functools.partial(jax.jit, static_argnames="per_leaf")
    def norms(self, per_leaf: bool = False) -> Any:
        """Take |g_i|, shapes as in `squared_norms`."""
        return jax.tree.map(tree.safe_sqrt, self.squared_norms(per_leaf))

    @jax.jit
    def mean(self) -> Any:
        """Average: sum_i g_i / batch, like params. It is the gradient of the mean loss."""
        w = None if self.share == self.batch else jnp.full(self.batch, self.share / self.batch)
        return self._sum([w] * len(self.leaves))

    @jax.jit
    def weighted_sum(self, w: Any) -> Any:
        """Take sum_i w_i g_i, like params; w: float[batch]."""
        w = jnp.asarray(w)
        if w.shape != (self.batch,):
            raise ValueError(f"per_example: weights must be float[{self.batch}], one each, got {check.describe(w)}")
        return self._sum([self.share * w] * len(self.leaves))

    @jax.jit
    def weighted_mean(self, w: Any) -> Any:
        """Take sum_i w_i g_i / sum_i w_i, like params; w: float[batch]."""
        w = jnp.asarray(w)
        return self.weighted_sum(w / jnp.sum(w))

    def clipped_mean(self, max_norm: Any, per_layer: bool = False) -> Clipped:
        """Clip every example's gradient, then average: sum_i g_i·min(1, max_norm/|g_i|) / batch.

        With `per_layer` every parameter array of every layer is clipped on its own, below `repeat` every depth.
        Source: Abadi et al. 2016, algorithm 1 (without its noise).
        """
        check.above_zero("clipped_mean", max_norm=max_norm)
        return self._clipped_mean(max_norm, per_layer)

    @functools.partial(jax.jit, static_argnames="per_layer")
    def _clipped_mean(self, max_norm: Any, per_layer: bool) -> Clipped:
        squares = self._squares()
        norms = [tree.safe_sqrt(s) for s in (squares if per_layer else [self._total(squares)])]
        factors = [max_norm / jnp.maximum(norm, max_norm) for norm in norms]
        clipped = sum(jnp.sum(norm > max_norm) for norm in norms) / max(1, sum(norm.size for norm in norms))
        weights = [self.share / self.batch * factor for factor in factors]
        mean = self._sum(weights if per_layer else weights * len(self.leaves))
        bias = tree.norm(jax.tree.map(jnp.subtract, mean, self.mean()))
        return Clipped(mean, jnp.asarray(clipped, jnp.float32), bias)

    @jax.jit
    def gram(self) -> jax.Array:
        """Take all inner products <g_i, g_j>: float[batch, batch].

        Its eigenvalues over the batch are the non-zero spectrum of the empirical Fisher matrix.
        """
        total = sum((leaf.gram() for leaf in self.leaves), start=jnp.zeros((self.batch, self.batch)))
        return self.share**2 * total

    @jax.jit
    def cosines(self) -> jax.Array:
        """Take <g_i, g_j>/(|g_i||g_j|): float[batch, batch]; 0 where a gradient is zero."""
        gram = self.gram()
        norms = jnp.sqrt(jnp.diagonal(gram))
        inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), norms)
        return gram * inverse[:, None] * inverse

    @jax.jit
    def moments(self) -> Moments:
        """Estimate trace cov(g_i) and |E g|² of every parameter array; see `variance` and `signal_to_noise`."""
        if self.batch < 2:
            raise ValueError(f"per_example: a variance needs at least two examples, got a batch of {self.batch}")
        squares = [jnp.mean(s, axis=-1) for s in self._squares()]
        means = jax.tree.map(lambda n: n**2, jax.tree.leaves(tree.norms(self.mean())))
        pairs = [unbiased(a, b, self.batch) for a, b in zip(squares, means, strict=True)]
        return Moments(*(self._unflatten(list(part)) for part in zip(*pairs, strict=True)))

    @functools.partial(jax.jit, static_argnames="per_leaf")
    def variance(self, per_leaf: bool = False) -> Any:
        """Estimate the trace of the covariance of g_i: sum_i |g_i - mean|² / (batch - 1), unbiased.

        float[]; `per_leaf`: a tree like params of float[], below `repeat` float[depth]. From sum |g_i|² - batch·|mean|²,
        so that rounding leaves an error of about 1e-7·|mean|²·batch/(batch - 1).
        """
        trace = self.moments().trace
        return trace if per_leaf else total(trace)

    @functools.partial(jax.jit, static_argnames="per_leaf")
    def signal_to_noise(self, per_leaf: bool = False) -> Any:
        """Estimate |E g|² / trace cov(g): its inverse is the batch size at which noise and signal are equal.

        |E g|² is estimated without bias, |mean|² - variance/batch, and so may come out below zero; shapes as in
        `variance`. One batch says little: `noise.scale` averages over steps. Source: McCandlish et al. 2018.
        """
        trace, signal = self.moments()
        return jax.tree.map(jnp.divide, signal, trace) if per_leaf else total(signal) / total(trace)

    @jax.jit
    def materialize(self) -> Any:
        """Store all gradients, as `vmap(grad(loss))` does: a tree like params, each leaf with a leading axis of batch."""
        found = [self.share * leaf.materialize() for leaf in self.leaves]
        return self._unflatten(
            [g.reshape(-1, *spec.shape).astype(spec.dtype) for g, (spec, _) in self._with_specs(found)]
        )

    def __getitem__(self, key: Any) -> "PerExampleGradients":
        """Take the gradients of one child of params: `gradients["trunk"].norms()`."""
        child = jax.tree.unflatten(self.structure, range(len(self.leaves)))[key]
        chosen = jax.tree.leaves(child)
        parts = {name: tuple(getattr(self, name)[i] for i in chosen) for name in ("specs", "routes")}
        return dataclasses.replace(
            self, leaves=[self.leaves[i] for i in chosen], structure=jax.tree.structure(child), **parts
        )

    def explain(self) -> None:
        """Print a table: parameter array, how its gradients are held, and what that takes for the batch."""
        print(self)

    def __str__(self) -> str:
        rows = [("parameter", "route", "kept", "materialized")]
        rows += [(r.path, r.route, _size(r.bytes), _size(r.materialized)) for r in self.routes]
        kept, whole = (_size(sum(getattr(r, name) for r in self.routes)) for name in ("bytes", "materialized"))
        rows.append(("total", f"{self.batch} examples", kept, whole))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)

    __repr__ = __str__

    def _squares(self) -> list[jax.Array]:
        """Squared norms of every leaf: float[batch], or float[depth..., batch]."""
        squares = [self.share**2 * leaf.squares() for leaf in self.leaves]
        return [
            s.reshape(*spec.shape[:depth], -1) if depth else jnp.sum(s, axis=tuple(range(s.ndim - 1)))
            for s, (spec, depth) in self._with_specs(squares)
        ]

    def _total(self, squares: list[jax.Array]) -> jax.Array:
        return sum((jnp.sum(s, axis=tuple(range(s.ndim - 1))) for s in squares), start=jnp.zeros(self.batch))

    def _sum(self, weights: list[Any]) -> Any:
        """Take the weighted sum of each leaf; weights of one: None, float[batch], or float[depth..., batch]."""
        sums = []
        for leaf, w, (spec, _) in zip(self.leaves, weights, self.specs, strict=True):
            if w is not None:
                w = w.reshape(*leaf.levels, -1) if w.ndim > 1 else jnp.broadcast_to(w, (*leaf.levels, *w.shape))
            sums.append(leaf.weighted(w).reshape(spec.shape).astype(spec.dtype))
        return self._unflatten(sums)

    def _with_specs(self, values: list[Any]) -> Any:
        return zip(values, self.specs, strict=True)

    def _unflatten(self, values: list[Any]) -> Any:
        return jax.tree.unflatten(self.structure, values)


def unbiased(mean_square: jax.Array, square_of_mean: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Estimate (trace cov(g), |E g|²) of the mean of |g_i|² and the square of the mean of n gradients."""
    trace = jnp.maximum(mean_square - square_of_mean, 0) * (n / (n - 1))
    return trace, square_of_mean - trace / n


def total(values: Any) -> jax.Array:
    """Sum all numbers of a tree: float[]."""
    return sum(map(jnp.sum, jax.tree.leaves(values)), start=jnp.zeros(()))


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"
