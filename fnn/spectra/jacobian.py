"""Singular values of input-output and layer-to-layer Jacobians, through a thousand layers too."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnn import admission, arrays, check, compiled, tree
from fnn.core import Layer, as_arrays
from fnn.spectra import products
from fnn.spectra.density import matfree
from fnn.spectra.operator import Estimate
from fnn.spectra.through import Through, through
from fnn.tree import PyTree

DENSE = 2048
"""Up to this many rows or columns, whichever are fewer, `singular_values` stores the Jacobian."""


class Extremes(NamedTuple):
    """The ends of a spectrum of singular values, by Lanczos bidiagonalisation."""

    largest: jax.Array
    """float[k], the largest first."""
    smallest: jax.Array
    """float[k], the smallest first; an upper bound on it where the residual is large."""
    largest_residuals: jax.Array
    """|Jᵀu - σ v| with |Jv - σ u| = 0, or rounding: a singular value lies within this distance; float[k]."""
    smallest_residuals: jax.Array


class Moments(NamedTuple):
    """Traces tr (JJᵀ)^k for k = 1 ... count; float[count] each."""

    value: jax.Array
    """0 or inf where it leaves the dtype's range."""
    error: jax.Array
    """Standard errors; 0 where they were computed exactly."""
    log10: jax.Array
    """log10 of the values, at any scale."""


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian J = dy/dx, float[outputs, inputs], of a function at a point, made by `jacobian(f)(x)`.

    Inputs and outputs are counted over all their axes. All methods work under `jit` and `vmap`.
    """

    _function: Callable[..., jax.Array]
    _rest: PyTree
    _x: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        y = jax.eval_shape(functools.partial(self._function, self._rest), self._x)
        return math.prod(y.shape), math.prod(self._x.shape)

    def product(self, v: jax.Array) -> jax.Array:
        """Multiply: J v, of the output's shape. Where there is no forward mode it is the transpose of u -> Jᵀ u."""
        return self._run(_push, (), v)

    def singular_values(self) -> jax.Array:
        """All singular values, the largest first: float[min(outputs, inputs)].

        J is stored, from products with unit vectors of its shorter side. Errors: ValueError for Jacobians with more than 2048
        rows and columns: use `extremes` and `moments`.
        """
        if min(self.shape) > DENSE:
            raise ValueError(
                f"jacobian: all singular values need at most {DENSE} inputs or outputs, got {self.shape}; use extremes() or "
                "moments()"
            )
        return self._run(_singular, (self.shape[0] <= self.shape[1],))

    def extremes(self, k: int = 1, *, steps: int = 60, key: jax.Array | None = None) -> Extremes:
        """Find the k largest and smallest singular values, with residuals, by `steps` products with J and Jᵀ each.

        Golub-Kahan bidiagonalisation with full reorthogonalisation. The largest converge in few steps, the smallest may not:
        look at the residuals. A value is seen once, however often it occurs. Needs `pip install 'fnn[spectra]'`.
        Source: Golub and Kahan 1965. Errors: ValueError for k beyond the steps.
        """
        steps = min(steps, *self.shape)
        check.positive("jacobian.extremes", k=k, steps=steps)
        if k > steps:
            raise ValueError(f"jacobian.extremes: k must be at most {steps}, the steps or a side of J, got {k}")
        matfree("jacobian.extremes", "decomp")
        return self._run(_extremes, (k, steps), _key(key))

    def moments(self, count: int = 2, *, probes: int = 32, key: jax.Array | None = None) -> Moments:
        """Estimate tr (JJᵀ)^k for k = 1 ... count, with standard errors: float[count] each.

        Exact, from all singular values, where J has no more than `probes` rows or columns; else from random signs v:
        E vᵀ(JJᵀ)^k v. Errors: ValueError for fewer than two probes.
        """
        relative, unit = self._relative(count, probes, key)
        k = 2 * jnp.arange(1, count + 1)
        log10 = jnp.log10(relative.value) + k * jnp.log10(unit)
        return Moments(relative.value * unit**k, relative.error * unit**k, log10)

    def _relative(self, count: int, probes: int, key: jax.Array | None) -> tuple[Estimate, jax.Array]:
        """Take the moments of J/unit, whose singular values are about 1, and the unit."""
        check.positive("jacobian.moments", count=count, probes=probes)
        if min(self.shape) <= probes:
            values = self.singular_values()
            unit = tree.divisor(jnp.max(values))
            squares = jnp.square(values / unit)
            return Estimate(jnp.stack([jnp.sum(squares**k) for k in range(1, count + 1)]), jnp.zeros(count)), unit
        if probes < 2:
            raise ValueError(f"jacobian.moments: a standard error needs at least two probes, got {probes}")
        value, error, unit = self._run(_moments, (count, probes), _key(key))
        return Estimate(value, error), unit

    def isometry(self, *, probes: int = 32, key: jax.Array | None = None) -> jax.Array:
        """Measure dynamical isometry: (tr JJᵀ/n)²/(tr (JJᵀ)²/n), n = min(outputs, inputs): float[].

        1 if all singular values are equal, near 0 if few carry everything. Wide Gaussian linear nets of L layers have
        1/(L + 1). Exact as `moments`. Source: Pennington et al. 2017 (its σ² of the spectrum is 1/isometry - 1).
        """
        first, second = self._relative(2, probes, key)[0].value
        return jnp.square(first) / second / min(self.shape)

    def _run(self, function: Callable[..., Any], options: tuple[Any, ...], *more: Any) -> Any:
        return compiled.call(function, (self._function, options), self._rest, self._x, *more)


@dataclass(frozen=True)
class JacobianOf:
    """What `jacobian(f)` returns: call it for the Jacobian at a point, or follow a product of Jacobians `through` depth."""

    _function: Callable[..., jax.Array] | Layer

    def __call__(self, *arguments: PyTree) -> Jacobian:
        """Take the Jacobian at a point: `(x)` for a function, `(state, example)` for a net."""
        function = self._function
        net = isinstance(function, Layer)
        if len(arguments) != 1 + net:
            rule = "(state, x), x one example without a batch axis" if net else "(x)"
            raise TypeError(
                f"jacobian: the call takes {rule}, got {len(arguments)} arguments; put the rest into the function"
            )
        x = _real(arguments[-1])
        if not net:
            return Jacobian(functools.partial(_plain, function), (), x)
        state = admission.parts("jacobian", arguments[0])
        admission.state("jacobian", function, *state, x[None])
        return Jacobian(functools.partial(_of_example, function), state, x)

    def through(
        self, slices: PyTree, x: ArrayLike, *, k: int | None = None, sweeps: int = 8, key: jax.Array | None = None
    ) -> Through:
        """Follow k directions through h_t+1 = f(h_t, slice_t), or the blocks of `repeat(block, n)`, with logs.

        `slices` are arrays with a leading axis of depth or time (weights, inputs); for a block of fnn the (params, state) of
        `repeat(block, n)`. x is h_0, one example: float[...]. The first sweep multiplies the Jacobians onto k orthonormal
        vectors, made orthonormal again by QR at each step: its logs are the Lyapunov exponents of a long product. Each further
        sweep goes back with Jᵀ and forth again, and converges to the singular values of the product; at equal values
        neighbours only share their sum. Nothing underflows, at any depth. Source: Benettin et al. 1980; Engelken et al. 2023.

            found = fnn.jacobian(lambda h, w: jnp.tanh(w @ h)).through(weights, h0)
            found.log10_singular, found.lyapunov
        """
        check.positive("jacobian.through", sweeps=sweeps)
        x = _real(x)
        n = math.prod(x.shape)
        k = n if k is None else k
        check.positive("jacobian.through", k=k)
        if k > n:
            raise ValueError(f"jacobian.through: k must be at most the {n} numbers of x, got {k}")
        function = self._function
        if isinstance(function, Layer):
            params, state = admission.parts("jacobian.through", slices)
            if not (hasattr(params, "blocks") and hasattr(state, "blocks")):
                raise ValueError(
                    "jacobian.through: needs (params, state) of repeat(block, n), got "
                    f"{arrays.brief((params, state))}; pass those of the repeat alone, such as params[1], state[1]"
                )
            slices, function = (params.blocks, state.blocks), functools.partial(_of_block, function)
        else:
            function = functools.partial(_of_slice, function)
        slices = jax.tree.map(jnp.asarray, slices)
        depths = {jnp.shape(a)[:1] for a in jax.tree.leaves(slices)}
        if len(depths) != 1 or () in depths:
            got = check.describe(slices)
            raise ValueError(f"jacobian.through: slices must share a leading axis of depth, got {got}; stack them")
        after = jax.eval_shape(lambda s, h: function(jax.tree.map(lambda a: a[0], s), h), slices, x)
        if depths != {(0,)} and (after.shape, after.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"jacobian.through: the function must keep the shape and dtype of h, got {check.describe(after)} for "
                f"{check.describe(x)}; take layers of one width"
            )
        return compiled.call(through, (function, k, sweeps), slices, x, _key(key))


def jacobian(function: Callable[..., jax.Array] | Layer) -> JacobianOf:
    """Make `(x) -> Jacobian`: singular values, moments and isometry of J = dy/dx, for a function or a net.

    `function(x) -> y`, arrays of any shape: input to output, or from one layer's output to another's. For a net of fnn the
    call is `(state, x)`, x one example without a batch axis; the net is in eval mode: batch norm uses its running
    statistics, there is no dropout. ReLU at 0 has slope 0. Map over examples with `jax.vmap`.
    Errors: TypeError for what is no function.

        J = fnn.jacobian(net)(state, x[0])
        J.singular_values(), J.isometry(), J.moments(2)
        fnn.jacobian(block).through((params[1], state[1]), h0)  # the blocks of repeat(block, 1000)
    """
    if not callable(function) and not isinstance(function, Layer):
        raise TypeError(f"jacobian: needs a function x -> y or a net, got {type(function).__name__}")
    return JacobianOf(function)


def _real(x: ArrayLike) -> jax.Array:
    x = as_arrays(x)
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"jacobian: x must be one floating array, got {check.describe(x)}; for tokens take the function that follows "
            "the embedding"
        )
    return x


def _key(key: jax.Array | None) -> jax.Array:
    if key is None:
        return jax.random.key(0)
    check.prng_key("jacobian", key)
    return key


def _plain(function: Any, rest: Any, x: Any) -> Any:
    return _one_array(function(x))


def _of_example(net: Any, rest: Any, x: Any) -> Any:
    return _one_array(net.apply(*rest, x[None])[0])[0]


def _of_block(block: Any, part: Any, h: Any) -> Any:
    return _one_array(block.apply(*part, h[None])[0])[0]


def _of_slice(function: Any, part: Any, h: Any) -> Any:
    return _one_array(function(h, part))


def _one_array(y: Any) -> Any:
    if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"jacobian: the function must return one floating array, got {check.describe(y)}; choose one")
    return y


def _push(function: Any, options: Any, rest: Any, x: Any, v: Any) -> Any:
    value, push, _ = products.vectors(function, rest, x)
    return push(v).reshape(value.shape)


def _singular(function: Any, options: Any, rest: Any, x: Any) -> Any:
    value, push, pull = products.vectors(function, rest, x)
    if options[0]:
        matrix = jax.vmap(pull)(jnp.eye(value.size, dtype=value.dtype))
    else:
        matrix = jax.vmap(push)(jnp.eye(x.size, dtype=x.dtype))
    return jnp.linalg.svd(matrix.astype(jnp.result_type(matrix, jnp.float32)), compute_uv=False)


def _moments(function: Any, options: Any, rest: Any, x: Any, key: Any) -> Any:
    count, probes = options
    value, push, pull = products.vectors(function, rest, x)
    unit = _size(pull, value.size, value.dtype)

    def one(key):
        v, found = jax.random.rademacher(key, (value.size,), value.dtype), []
        for i in range(count):  # vᵀ(JJᵀ)^k v is the square of the k-th of Jᵀv, JJᵀv, JᵀJJᵀv, ...
            v = (push(v) if i % 2 else pull(v)) / unit
            found.append(jnp.sum(jnp.square(v)))
        return jnp.stack(found)

    each = jax.lax.map(one, jax.random.split(key, probes))
    return jnp.mean(each, axis=0), jnp.std(each, axis=0, ddof=1) / math.sqrt(probes), unit


def _size(times: Callable[[jax.Array], jax.Array], n: int, dtype: Any) -> jax.Array:
    """Give the RMS of the singular values, about, from one product: in units of it squares stay in range."""
    return tree.divisor(tree.length(times(jax.random.rademacher(jax.random.key(1), (n,), dtype))) / math.sqrt(n))


def _extremes(function: Any, options: Any, rest: Any, x: Any, key: Any) -> Extremes:
    k, steps = options
    value, push, pull = products.vectors(function, rest, x)
    # From the shorter side: the other has a null space, whose zeros are no singular values.
    times, size = (push, x.size) if x.size <= value.size else (pull, value.size)
    dtype = jnp.zeros(()).dtype  # matfree keeps its numbers in JAX's default dtype
    bidiag = matfree("jacobian", "decomp").bidiag(steps, materialize=False, reortho="full")
    unit = _size(times, size, x.dtype).astype(dtype)
    found = bidiag(lambda v: (times(v) / unit).astype(dtype), jax.random.normal(key, (size,), dtype))
    diagonal, beside = found.J_small
    # After an exactly invariant space matfree divides 0 by 0; what comes then is cut off.
    good = jnp.cumprod(jnp.isfinite(diagonal)).astype(bool)
    diagonal, beside = jnp.where(good, diagonal, 0), jnp.where(good[1:], beside, 0)
    left, values, _ = jnp.linalg.svd(jnp.diag(diagonal) + jnp.diag(beside, 1))
    length = jnp.sqrt(jnp.sum(jnp.square(jnp.where(jnp.isfinite(found.residual), found.residual, 0))))
    rounding = 4 * max(float(jnp.finfo(dtype).eps), products.rounding(times, jnp.zeros(size, x.dtype))) * values[0]
    residuals = jnp.maximum(length * jnp.abs(left[-1]), rounding) * unit
    values = values * unit
    return Extremes(values[:k], values[::-1][:k], residuals[:k], residuals[::-1][:k])
