"""The empirical tangent kernel of a net on a batch: Θ_ij = <df(x_i)/dparams, df(x_j)/dparams>, from factors of gradients."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from fnn import admission, arrays, check, compiled, tree
from fnn.core import Layer, as_arrays
from fnn.gradients.per_example import per_example


@dataclass(frozen=True)
class Kernel:
    """The tangent kernel of a batch, made by `kernel(net)(state, x)`."""

    _relative: jax.Array
    _unit: jax.Array
    """About the size of a gradient: squares in units of it stay in range."""
    _full: Callable[[], jax.Array]

    @property
    def each(self) -> jax.Array:
        """For each output o: <df_o(x_i)/dparams, df_o(x_j)/dparams>, float[outputs, batch, batch].

        0 or inf where it leaves the dtype's range. Ratios below (condition, rank, alignment) hold at any scale.
        """
        return self._relative * self._unit * self._unit

    @property
    def matrix(self) -> jax.Array:
        """The mean over outputs: float[batch, batch]."""
        return self._mean * self._unit * self._unit

    @property
    def _mean(self) -> jax.Array:
        return jnp.mean(self._relative, axis=0)

    def full(self) -> jax.Array:
        """All pairs of examples and outputs: float[batch, outputs, batch, outputs]. It holds their factors at once."""
        return self._full()

    def eigenvalues(self) -> jax.Array:
        """Eigenvalues of `matrix`, the largest first: float[batch]. Those below rounding (1e-6 of the largest) are noise."""
        return self._values() * self._unit * self._unit

    def _values(self) -> jax.Array:
        return jnp.linalg.eigvalsh(self._mean)[::-1]

    def condition(self) -> jax.Array:
        """Divide the largest eigenvalue by the smallest: float[].

        inf where rounding hides the smallest, NaN for a kernel of zeros.
        """
        values = self._values()
        floor = len(values) * jnp.finfo(values.dtype).eps * values[0]
        found = jnp.where(values[-1] > floor, values[0] / jnp.maximum(values[-1], floor), jnp.inf)
        return jnp.where(values[0] > 0, found, jnp.nan)

    def effective_rank(self) -> jax.Array:
        """exp(entropy of the eigenvalues as shares of their sum), from 1 to batch: float[]. Source: Roy and Vetterli 2007.

        NaN for a kernel of zeros.
        """
        values = jnp.maximum(self._values(), 0)
        share = values / jnp.sum(values)
        entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0))
        return jnp.where(values[0] > 0, jnp.exp(entropy), jnp.nan)

    def alignment(self, targets: ArrayLike, *, centered: bool = True) -> jax.Array:
        """Measure <Θ, YYᵀ>/(|Θ||YYᵀ|), from 0 to 1: how far the kernel's top directions are those of the targets; float[].

        targets: labels int[batch], made one-hot, or float[batch, ...]. With `centered` the mean over the batch is taken out
        of both, so that a constant kernel scores 0. NaN where kernel or targets are then zero.
        Source: Cristianini et al. 2001; Cortes et al. 2012.
        Errors: ValueError for another number of targets.
        """
        y, theta = jnp.asarray(targets), self._mean
        if y.ndim == 0 or len(y) != len(theta):
            raise ValueError(
                f"kernel.alignment: needs a target for each of {len(theta)} examples, got {check.describe(y)}"
            )
        if jnp.issubdtype(y.dtype, jnp.integer):
            y = jnp.unique(y, size=len(y), fill_value=-1)[None] == y[:, None]
        y = y.reshape(len(y), -1).astype(theta.dtype)
        y = y / tree.divisor(jnp.max(jnp.abs(y), initial=0))
        if centered:
            y = y - jnp.mean(y, axis=0)
            theta = theta - jnp.mean(theta, axis=0)
            theta = theta - jnp.mean(theta, axis=1, keepdims=True)
        wanted = y @ y.T
        return jnp.sum(theta * wanted) / jnp.sqrt(jnp.sum(jnp.square(theta)) * jnp.sum(jnp.square(wanted)))


def kernel(outputs: Callable[..., jax.Array] | Layer) -> Callable[..., Kernel]:
    """Make `(params, batch) -> Kernel`: the empirical neural tangent kernel (NTK) of a net on a batch.

    `outputs(params, example) -> float[...]` is a function of one example; a batch is the same with a leading axis. For a net
    of fnn the call is `(state, x)`; the net is in eval mode: batch norm uses its running statistics, which are constants.
    No Jacobian is stored: each output's Gram matrix comes from the factors that `per_example` keeps, one output after the
    other. For infinite width see `fnn.meanfield.kernels`.
    Source: Jacot et al. 2018. Errors: as `per_example`; ValueError for outputs that are not one floating array.

        ntk = fnn.kernel(net)(state, x)
        ntk.matrix, ntk.eigenvalues(), ntk.condition(), ntk.alignment(y)
    """
    if isinstance(outputs, Layer):
        return functools.partial(_of_net, outputs)
    if not callable(outputs):
        raise TypeError(f"kernel: needs a function (params, example) -> outputs or a net, got {type(outputs).__name__}")
    return functools.partial(_of_function, outputs, ((), {}))


def _of_net(net: Layer, state: Any, x: Any) -> Kernel:
    params, net_state = admission.parts("kernel", state)
    x = as_arrays(x)
    admission.state("kernel", net, params, net_state, x)
    return _kernel(functools.partial(_apply, net), ((net_state,), {}), params, x)


def _of_function(function: Any, kept: Any, params: Any, batch: Any) -> Kernel:
    if isinstance(function, Partial):
        function, kept = function.func, (function.args, function.keywords)
    return _kernel(function, kept, params, batch)


def _kernel(function: Any, kept: Any, params: Any, batch: Any) -> Kernel:
    check.parameters("kernel", params)
    (batch,) = arrays.arguments("kernel", (batch,))
    admission.examples("kernel", (batch, None))
    like, example = _spec((kept, params)), _spec(batch, 1)  # without the arrays' shardings
    with check.foreign("kernel"):
        spec = jax.eval_shape(lambda kept, p, e: function(*kept[0], p, e, **kept[1]), *like, example)
    if not hasattr(spec, "dtype") or not jnp.issubdtype(spec.dtype, jnp.floating):
        raise ValueError(f"kernel: the outputs must be one floating array, got {check.describe(spec)}; choose one")
    arguments = kept, params, batch
    relative, unit = compiled.call(_each, (function, spec.size), *arguments)
    return Kernel(relative, unit, lambda: compiled.call(_full, (function, spec.size), *arguments, unit))


def _spec(values: Any, drop: int = 0) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[drop:], a.dtype) if hasattr(a, "dtype") else a, values)


def _apply(net: Any, net_state: Any, params: Any, example: Any) -> Any:
    return net.apply(params, net_state, jax.tree.map(lambda a: a[None], example))[0][0]


def _one_output(function: Any, kept: Any) -> Callable[[Any, Any], Any]:
    args, keywords = kept

    def of_example(params, example):
        x, weights = example
        return jnp.sum(jnp.ravel(function(*args, params, x, **keywords)) * weights)

    return of_example


def _each(function: Any, outputs: int, kept: Any, params: Any, batch: Any) -> Any:
    size = jax.tree.leaves(batch)[0].shape[0]
    of_example = _one_output(function, kept)
    gradients = per_example(of_example)
    signs = jax.random.rademacher(jax.random.key(0), (outputs,), jnp.float32)
    first = jax.tree.map(lambda a: a[0], batch)
    unit = tree.divisor(tree.norm(jax.grad(of_example)(params, (first, signs))))

    def one(weights):
        return gradients(params, (batch, jnp.broadcast_to(weights, (size, outputs)))).gram()

    return jax.lax.map(one, jnp.eye(outputs) / unit), unit


def _full(function: Any, outputs: int, kept: Any, params: Any, batch: Any, unit: Any) -> Any:
    size = jax.tree.leaves(batch)[0].shape[0]
    pairs = jax.tree.map(lambda a: jnp.repeat(a, outputs, axis=0), batch)
    weights = jnp.tile(jnp.eye(outputs) / unit, (size, 1))
    gram = per_example(_one_output(function, kept))(params, (pairs, weights)).gram()
    return gram.reshape(size, outputs, size, outputs) * unit * unit
