"""Curvature of any loss: Hessian and Gauss-Newton matrix by products, sharpness, and what optimisers make of it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fnn import admission, arrays, check, compiled, losses, measures, tree
from fnn.admission import Optimizer
from fnn.core import Layer, as_arrays, output_shape
from fnn.gradients.price import Price, priced
from fnn.spectra import critical, parts, products, stability
from fnn.spectra.critical import Critical
from fnn.spectra.krylov import Pairs
from fnn.spectra.operator import Operator
from fnn.spectra.parts import Part
from fnn.tasks import ExampleFunction, ScalarLoss
from fnn.tree import PyTree


class Sharpness(NamedTuple):
    """The preconditioned sharpness of an optimiser, beside what it stands."""

    value: float
    """The largest eigenvalue of P⁻¹H."""
    threshold: float
    """Above it the optimiser's steps are unstable on the quadratic: 2/η, (2 + 2β)/η, Adam (2 + 2β)/((1 - β)η)."""
    ratio: float
    """value/threshold: 1 at the edge of stability."""
    pairs: Pairs
    """Of P^(-½) H P^(-½), with residuals; `start=` of the next call."""


@dataclass(frozen=True)
class Curvature:
    """The curvature of a loss at some parameters, made by `curvature(loss)(params, batch)`."""

    _statics: tuple[Callable[..., PyTree], Callable[..., PyTree] | None]
    _arrays: PyTree
    _params: PyTree
    _whole: tuple[Part, jax.Array | np.ndarray]

    @property
    def hessian(self) -> Operator:
        """The Hessian of the loss, as an `Operator`."""
        return self._operator(_hessian)

    @property
    def gauss_newton(self) -> Operator:
        """The Gauss-Newton matrix Jᵀ H_L J, J = d outputs/d params, H_L the loss's Hessian over outputs: an `Operator`.

        Errors: ValueError for a bare loss, which does not say what its outputs are.
        """
        if self._statics[1] is None:
            raise ValueError(
                "curvature: a Gauss-Newton matrix needs a loss split in two, got a bare loss, which has a Hessian only; pass "
                "curvature(loss_of_outputs, outputs=f)"
            )
        return self._operator(_gauss_newton)

    def _operator(self, multiply: Callable[..., Any], scale: Any = None) -> Operator:
        return Operator("curvature", multiply, self._statics, self._arrays, self._params, *self._whole, scale)

    def gradient(self) -> PyTree:
        """Take the gradient, a tree like params."""
        return compiled.call(_gradient, self._statics, self._arrays)

    def along_gradient(self) -> jax.Array:
        """Take the sharpness along the gradient, gᵀHg/gᵀg: float[]. It needs one product. NaN at a gradient of zero."""
        return compiled.call(_along_gradient, self._statics, self._arrays)

    def critical(self, step: PyTree | None = None, *, near: float | None = None, tolerance: float = 1e-3) -> Critical:
        """Find the rate η_c at which `params - η step` first has a higher loss than `params`, and λ_c = 2/η_c.

        `step` is a tree like params, by default the gradient; with an optimiser it is minus the update over the rate. On a
        quadratic loss λ_c = stepᵀ H step/gᵀ step. By forward passes alone: six or seven on a quadratic, at most 40, and few
        where `near` is within a factor of 100 of η_c. By default it is 1 or, if smaller, L/|g|²; with a step of your own 1.
        Rates grow from `near` until the loss rises: of several crossings below the first rate tried it may find a later one.
        The loss fell at one end of the bracket that is returned, and rose at the other, within `tolerance`; both ends
        are moved by what the rounding of the loss may hide. NaN where that is more than a tenth of η_c, and where
        the step does not lower the loss. Source: Kalra et al. 2026, arXiv 2601.16979.
        """
        check.above_zero("curvature.critical", tolerance=tolerance, **({} if near is None else {"near": near}))
        near = 1.0 if near is None and step is not None else near
        step = self.gradient() if step is None else step
        if jax.tree.structure(step) != jax.tree.structure(self._params):
            raise ValueError(f"curvature.critical: step must be a tree like params, got {check.describe(step)}")
        return compiled.call(_critical, (*self._statics, tolerance), self._arrays, step, near)

    def preconditioned(self, optimizer: Optimizer, opt_state: PyTree, **options: Any) -> Sharpness:
        """Find the largest eigenvalue of P⁻¹H for an optax optimiser and its state, beside the threshold of stability.

        | optimiser | P | threshold |
        |---|---|---|
        | SGD | 1 | 2/η |
        | momentum (Nesterov's) | 1 | (2 + 2β)/η, ((2 + 2β)/((1 + 2β)η)) |
        | RMSProp | √ν + ε | 2/η |
        | Adam | (1 - β₁ᵗ)(√(ν/(1 - β₂ᵗ)) + ε) | (2 + 2β₁)/((1 - β₁)η) |

        η, β, ε and the bias correction are read from what `optimizer.update` does, so that schedules count (η is that of the
        next step, ν that of the last). Decoupled weight decay counts too. Not seen: clipping, which changes steps that are
        longer than its limit. `options` are those of `Operator.eigenvalues`. For the host.
        The rule is read in float32, also of parameters in half precision.
        Source: Cohen et al. 2021 and 2022. Errors: ValueError for other optimisers, for moments before the first step, and
        for moments coarser than the parameters (`mu_dtype`).
        """
        found = stability.respond("curvature.preconditioned", optimizer, opt_state, self._params)
        root = jax.tree.map(lambda a: jnp.sqrt(jnp.asarray(a)), found.inverse)
        pairs = self._operator(_hessian, root).eigenvalues(**options)
        value = float(pairs.values[0])
        return Sharpness(value, found.threshold, value / found.threshold, pairs)

    def price(self, rounds: int = 11) -> Price:
        """Measure here what a product, ten products in one program and λ_c cost beside a plain gradient; see `Price`.

        The memory of ten is that of one and some vectors. `eigenvalues` keeps 2 `max_products` + 50 vectors besides.
        """
        function, outputs = self._statics
        whole = self.hessian

        def ten(arrays, v):
            matvec = whole._matvec(arrays)
            return jax.lax.fori_loop(0, 10, lambda _, v: matvec(v), whole._part.flatten(whole._blocks, v))

        def one(arrays, v):
            return _hessian(function, outputs, arrays)(v)

        def gradient(arrays, v):
            return _gradient(function, outputs, arrays)

        def rate(arrays, v):
            return _critical(function, outputs, 1e-3, arrays, v, 1.0)

        functions = {"plain gradient": gradient, "one product": one, "ten products": ten, "critical": rate}
        ones = jax.tree.map(jnp.ones_like, self._params)
        return priced("curvature.price", functions, (self._arrays, ones), rounds)


def curvature(
    loss: ScalarLoss | ExampleFunction,
    *,
    outputs: Callable[..., PyTree] | Layer | None = None,
    train: bool = True,
) -> Callable[..., Curvature]:
    """Make `(params, *batch) -> Curvature`: H = d²L/dparams², by products with vectors, for any JAX loss L.

    | loss | outputs | called with |
    |---|---|---|
    | `loss(params, *batch) -> float[]` | None | `(params, *batch)` |
    | `loss(outputs, *batch) -> float[]` | `outputs(params, *batch)` | `(params, *batch)` |
    | one of fnn's, `(outputs, y) -> float[batch]` | a net of fnn | `(state, (x, y), key=None)`; state is a `TrainState` or (params, state) |

    The last two have a Gauss-Newton matrix too. The loss of a net is the mean over the batch, as in `train_step`; with
    `train=True` batch norm uses the batch's statistics, and derivatives pass through them; with `train=False` the running
    ones, which are constants. The key draws one dropout mask, so that all products are of one function. At kinks (ReLU)
    curvature is that of the pieces that the batch lies in: the kinks themselves add nothing.

    Products are forward over reverse, so that `jax.custom_vjp` works; where such a rule is no gradient, its derivative is not
    symmetric, and residuals show it. Where the loss is NaN or infinite, products are NaN. Inside `shard_map` average the loss
    over the devices (`jax.lax.pmean`). Programs are compiled once for each shape and shared by
    equal losses; a loss that closes over arrays is known by its identity: make it once.
    Errors: TypeError for params that are no floating arrays; ValueError for a loss that is not one float, and for one that
    JAX cannot differentiate twice (fused kernels), which names the operation.

        c = fnn.curvature(loss)(params, batch)
        c.hessian.eigenvalues(3).values, c.hessian.trace().trace, c.along_gradient(), c.critical().sharpness
        c.hessian.at("1/[3]/*").eigenvalues(), c.preconditioned(optimizer, opt_state)
    """
    if not callable(loss):
        net = isinstance(loss, Layer)
        hint = "curvature(fnn.losses.cross_entropy, outputs=net)" if net else "the loss that you differentiate"
        got = "a net" if net else type(loss).__name__
        raise TypeError(f"curvature: loss must be a function (params, batch) -> float[], got {got}; pass {hint}")
    if isinstance(outputs, Layer):
        return functools.partial(_of_net, loss, outputs, train)
    if outputs is not None and not callable(outputs):
        raise TypeError(f"curvature: outputs must be a function or a net, got {type(outputs).__name__}")
    return functools.partial(_of_loss, loss, outputs)


def _of_loss(loss: Any, outputs: Any, params: Any, *batch: Any) -> Curvature:
    params, batch = admitted("curvature", params, batch)
    (loss, kept), (outputs, more) = unwrapped(loss), unwrapped(outputs)
    return _at((loss, outputs), (kept, more, params, batch), params)


def _of_net(loss: Any, net: Layer, train: bool, state: Any, batch: Any, key: Any = None) -> Curvature:
    admission.loss("curvature", loss)
    outputs, params, rest = net_outputs("curvature", net, train, state, batch, key)
    losses.check_targets(loss, output_shape(net, params, rest[0], rest[1]), rest[2])
    nothing = ((), {})
    return _at((functools.partial(_mean, loss), outputs), (nothing, nothing, params, rest), params)


def net_outputs(who: str, net: Layer, train: bool, state: Any, batch: Any, key: Any) -> tuple[Any, Any, Any]:
    """Split a net's call into a function of params and the rest: (outputs(params, *rest), params, rest)."""
    params, net_state = admission.parts(who, state)
    check.parameters(who, params)
    if key is not None:
        check.prng_key(who, key)
    x, y = as_arrays(arrays.pair(f"{who}: the batch", batch))
    admission.examples(who, (x, y))
    admission.state(who, net, params, net_state, x)
    return functools.partial(_apply, net, train), params, (net_state, x, y, key)


def admitted(who: str, params: Any, batch: Any) -> tuple[Any, Any]:
    """Check params and turn the batch into arrays."""
    check.parameters(who, params)
    check.alive(who, params)
    if not jax.tree.leaves(params):
        raise ValueError(f"{who}: params must hold at least one array, got none")
    return jax.tree.map(jnp.asarray, params), arrays.arguments(who, batch)


def unwrapped(function: Any) -> tuple[Any, Any]:
    """Take the arrays out of a `jax.tree_util.Partial`, so that they are arguments of the compiled program."""
    return (
        (function.func, (function.args, function.keywords)) if isinstance(function, Partial) else (function, ((), {}))
    )


def _at(statics: Any, given: Any, params: Any) -> Curvature:
    return Curvature(statics, given, params, parts.chosen(parts.rows(params), params))


def _apply(net: Any, train: bool, params: Any, *rest: Any) -> Any:
    net_state, x, _, key = rest
    return net.apply(params, net_state, x, key=key, train=train)[0]


def _mean(loss: Any, outputs: Any, net_state: Any, x: Any, y: Any, key: Any) -> Any:
    return measures.mean(loss, outputs, y)


def _functions(loss: Any, outputs: Any, given: Any) -> tuple[Any, Any, Any]:
    """Bind everything except params: (params -> outputs, outputs -> loss, params -> loss)."""
    (args, keywords), (more, words), _, batch = given

    def of_outputs(value):
        with check.foreign("curvature"):
            out = loss(*args, value, *batch, **keywords)
        return check.scalar_loss("curvature", out, None)

    if outputs is None:
        return None, None, of_outputs

    def output(params):
        with check.foreign("curvature"):
            return outputs(*more, params, *batch, **words)

    return output, of_outputs, lambda params: of_outputs(output(params))


def _hessian(loss: Any, outputs: Any, given: Any) -> Any:
    return products.hessian("curvature", _functions(loss, outputs, given)[2], given[2])[1]


def _gauss_newton(loss: Any, outputs: Any, given: Any) -> Any:
    output, of_outputs, _ = _functions(loss, outputs, given)
    leaves, structure = jax.tree.flatten(output(given[2]))
    floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def moving(params):  # integers (classes, lengths, masks) have no derivative
        return [leaf for leaf, moves in zip(jax.tree.leaves(output(params)), floating, strict=True) if moves]

    def of_moving(found):
        rest = iter(found)
        whole = [next(rest) if moves else leaf for leaf, moves in zip(leaves, floating, strict=True)]
        return of_outputs(jax.tree.unflatten(structure, whole))

    return products.gauss_newton("curvature", moving, of_moving, given[2])[1]


def _gradient(loss: Any, outputs: Any, given: Any) -> Any:
    return jax.grad(_functions(loss, outputs, given)[2])(given[2])


def _along_gradient(loss: Any, outputs: Any, given: Any) -> Any:
    gradient, multiply = products.hessian("curvature", _functions(loss, outputs, given)[2], given[2])
    # Of a unit vector: squares of a small gradient would leave the range.
    norm = tree.norm(gradient)
    unit = jax.tree.map(lambda g: (g / norm).astype(g.dtype), gradient)
    return tree.dot(unit, multiply(unit))


def _critical(loss: Any, outputs: Any, tolerance: float, given: Any, step: Any, near: Any) -> Critical:
    total = _functions(loss, outputs, given)[2]

    def moved(rate):
        return total(jax.tree.map(lambda p, s: (p - rate * s).astype(p.dtype), given[2], step))

    start = total(given[2])
    start = start.astype(jnp.result_type(start, jnp.float32))
    if near is None:
        norm = tree.norm(step).astype(start.dtype)
        near = jnp.abs(start) / norm / norm
        near = jnp.where(near > 0, jnp.minimum(near, 1), 1)
    return critical.critical(moved, start, near, tolerance, products.rounding(total, given[2]))
