"""Products of Hessians, Gauss-Newton matrices and Jacobians with vectors, for any JAX function.

H v is forward over reverse: the gradient's program is linearised once, and each product then runs its linear part alone.
Functions with a derivative rule for the backward pass only (`jax.custom_vjp`) have no forward mode: there J v is the
transpose of u -> Jᵀ u, and H v that of the gradient, which is symmetric. A function that is NaN has products of NaN, though
JAX's derivatives of it may be finite.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arrays, mapped
from fnn.gradients import program as jaxprs
from fnn.gradients.execution import line_of
from fnn.gradients.operations import Loop, Op, Program, Remat, Unreadable

Linear = Callable[[Any], Any]
REFUSED = (TypeError, ValueError, NotImplementedError)
"""What JAX raises where it has no derivative."""
COLLECTIVES = ("psum", "pmean", "all_gather", "reduce_scatter", "all_to_all", "ppermute")
"""How the names of operations begin that pass numbers between mapped lanes or devices, and gradients back."""


def jacobian(who: str, function: Callable[[Any], Any], at: Any) -> tuple[Any, Linear, Linear]:
    """Linearise `function(at)`: (value, v -> J v, u -> Jᵀ u), from one pass. Errors: ValueError as in `hessian`."""
    value, push, pull = _jacobian(who, function, at)
    wrong = jnp.any(jnp.stack([jnp.any(jnp.isnan(a)) for a in jax.tree.leaves(value)]))
    return value, _nan_where(wrong, push), _nan_where(wrong, pull)


def vectors(function: Any, rest: Any, x: jax.Array) -> tuple[Any, Any, Any]:
    """Linearise `function(rest, x)` in x: (value, v -> J v, u -> Jᵀ u) on vectors float[n]."""
    value, push, pull = jacobian("jacobian", lambda x: function(rest, x), x)
    return (
        value,
        lambda v: jnp.ravel(push(v.reshape(x.shape).astype(x.dtype))),
        lambda u: jnp.ravel(pull(u.reshape(value.shape).astype(value.dtype))),
    )


def _jacobian(who: str, function: Callable[[Any], Any], at: Any) -> tuple[Any, Linear, Linear]:
    if not _has_forward_mode(function, at):
        return _backward(who, "J v", function, at)
    try:
        value, push = jax.linearize(function, at)
        transpose = jax.linear_transpose(push, at)
        return value, push, lambda u: transpose(u)[0]
    except REFUSED:
        return _backward(who, "J v", function, at)


def hessian(who: str, loss: Callable[[Any], Any], at: Any) -> tuple[Any, Linear]:
    """Linearise the gradient of `loss(at) -> float[]`: (gradient, v -> H v).

    Errors: ValueError where JAX cannot differentiate twice; it names the operation and its line.
    """

    def gradient(at):
        value, found = jax.value_and_grad(loss)(at)
        if axes := mapped.over(value) - mapped.over(at):
            names = ", ".join(map(repr, sorted(map(str, axes))))
            raise ValueError(
                f"{who}: inside shard_map the loss must be the same on all devices, got one of each device's own examples; "
                f"average it with jax.lax.pmean(loss, {names}), or call {who} outside of shard_map, with a sharded batch"
            )
        return found, ~jnp.isfinite(value)

    if not mapped.checked():
        _without_collectives(who, loss, at)

    if _has_forward_mode(gradient, at):
        try:
            value, push, wrong = jax.linearize(gradient, at, has_aux=True)
            return value, _nan_where(wrong, push)
        except REFUSED:
            pass
    (value, wrong), _, pull = _backward(who, "H v", gradient, at)  # symmetric: Hᵀ = H
    return value, _nan_where(wrong, pull)


def _without_collectives(who: str, loss: Callable[[Any], Any], at: Any) -> None:
    """Refuse collectives where types do not say what varies: their transposes would sum over devices, or not at all.

    Those of a `shard_map` inside the loss are its own affair.
    """
    names = {name for name, _ in jaxprs.equations(jaxprs.trace(loss, at)[0], closed="shard_map")}
    if found := sorted(name for name in names if name.startswith(COLLECTIVES)):
        raise ValueError(
            f"{who}: a loss that averages over a mapped axis needs shard_map with check_vma=True, got {found[0]} without it; "
            f"drop check_vma=False, or call {who} outside of the mapped function, with the whole batch"
        )


def rounding(times: Linear, like: Any) -> float:
    """Say with which precision a linear function computes: the eps of the coarsest dtype that it casts to, or reads."""
    closed = jaxprs.trace(times, like)[0]
    casts = [params["new_dtype"] for name, params in jaxprs.equations(closed) if name == "convert_element_type"]
    found = [*casts, *(leaf.dtype for leaf in jax.tree.leaves(like))]
    return max(float(jnp.finfo(dtype).eps) for dtype in found if jnp.issubdtype(dtype, jnp.floating))


def _nan_where(wrong: Any, times: Linear) -> Linear:
    return lambda v: jax.tree.map(lambda a: jnp.where(wrong, jnp.full_like(a, jnp.nan), a), times(v))


def gauss_newton(who: str, outputs: Callable[[Any], Any], loss: Callable[[Any], Any], at: Any) -> tuple[Any, Linear]:
    """Linearise outputs and loss: (gradient, v -> Jᵀ H_L J v) with J = d outputs/d params, H_L the Hessian over outputs."""
    value, push, pull = jacobian(who, outputs, at)
    gradient, curve = hessian(who, loss, value)
    return pull(gradient), lambda v: pull(curve(push(v)))


def _backward(who: str, product: str, function: Callable[[Any], Any], at: Any) -> tuple[Any, Linear, Linear]:
    """Do `jacobian` without forward mode: J v is the derivative of u -> Jᵀ u, transposed."""
    try:
        if product == "H v":
            value, pull, wrong = jax.vjp(function, at, has_aux=True)
            jax.eval_shape(pull, jax.tree.map(jnp.zeros_like, value))
            return (value, wrong), pull, lambda u: pull(u)[0]
        value, pull = jax.vjp(function, at)
        zeros = jax.tree.map(jnp.zeros_like, value)
        jax.eval_shape(pull, zeros)
        _, transpose = jax.vjp(pull, zeros)
        jax.eval_shape(transpose, (at,))
        return value, lambda v: transpose((v,))[0], lambda u: pull(u)[0]
    except REFUSED as error:
        raise ValueError(
            f"{who}: {product} needs a function whose derivative JAX can differentiate again, got one where it cannot"
            f"{_place(function, at)} ({arrays.first_line(error)}); compute that part in plain JAX"
        ) from error


def _has_forward_mode(function: Callable[[Any], Any], at: Any) -> bool:
    """Whether a function has no rule for its backward pass alone. An error of the function itself is raised here."""
    return not any(name.startswith("custom_vjp") for name, _ in jaxprs.equations(jaxprs.trace(function, at)[0]))


def _place(function: Callable[[Any], Any], at: Any) -> str:
    """Name the first operation of a program that has no derivative: ", custom_call in 1/trunk at net.py:12"."""
    try:
        for op, specs in _operations(jaxprs.read(jaxprs.trace(function, at)[0])):
            if not _differentiable(op.call, specs):
                return f", {op.name}{f' in {op.where}' if op.where else ''}{line_of(op)}"
    except (Unreadable, *REFUSED):
        pass
    return ""


def _operations(program: Program) -> Iterator[tuple[Op, list[Any]]]:
    """Go through the operations, those inside loops too, each with the specs of its inputs."""
    for op in program.ops:
        yield from _operations(op.body) if isinstance(op, Loop | Remat) else [(op, [*map(program.spec, op.inputs)])]


def _differentiable(call: Callable[..., Any], specs: list[Any]) -> bool:
    floating = [i for i, spec in enumerate(specs) if jnp.issubdtype(spec.dtype, jnp.floating)]

    def run(*values):
        given = [jnp.zeros(spec.shape, spec.dtype) if i not in floating else None for i, spec in enumerate(specs)]
        for i, value in zip(floating, values, strict=True):
            given[i] = value
        return [out for out in call(*given) if jnp.issubdtype(out.dtype, jnp.floating)]

    def derivative(*values):
        outs, pull = jax.vjp(run, *values)
        return pull(outs)

    if floating:
        try:
            jax.eval_shape(derivative, *(specs[i] for i in floating))
        except REFUSED:
            return False
    return True
