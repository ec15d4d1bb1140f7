"""Gradients of single examples at about the price of one backward pass, for any JAX loss.

Defined by `vmap(grad(loss))`, computed from what each gradient is a product of: see `factors`, `cuts` and `products`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fnn import admission, arrays, check, losses, mapped, tree
from fnn.core import Layer
from fnn.gradients import cuts
from fnn.gradients import program as jaxprs
from fnn.gradients.example_gradients import Estimates, PerExampleGradients, Route, estimate, total
from fnn.gradients.products import Full, Pair, Rows
from fnn.gradients.squares import AXIS, Examples
from fnn.layers.precision import compute_in

SEMANTICS = ("path", "loss", "frozen", "running")


def per_example(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: Any = None,
    batch_norm: str = "path",
    eval_loss: Callable[[Any, Any], Any] | None = None,
) -> Callable[..., Any]:
    """Make `(params, batch) -> PerExampleGradients` of `loss(params, example) -> float[]`, at the price of one gradient.

    An example is any pytree, a batch the same with a leading axis. The result stands for `vmap(grad(loss))`, whose
    values all of its methods have; `explain()` tells what is held as factors and what, not recognised, as it is.
    A loss with noise (dropout) takes the key as an argument, `loss(params, example, key)`: with `(params, batch, key=key)`
    example i gets `jax.random.split(key, batch)[i]`. Of a key that the loss closes over all examples share one mask.
    With `has_aux` the loss returns (value, aux) and the call (gradients, aux of all examples). `axis_name` names the
    batch axis, for collectives in the loss (batch norm): `net.apply(..., x[None], train=True, axis_name=axis_name)`.

    Where examples depend on one another, `batch_norm` says what an example's gradient is:

    | name | statistics | sums to the batch gradient |
    |---|---|---|
    | path | of the batch; example i has its own copy of the weights: `vmap(grad(loss), axis_name=...)` | yes |
    | loss | of the batch; the gradient of example i's loss through them; costs `batch` backward passes | yes |
    | frozen | of the batch, but held constant: no gradient through the results of collectives | no |
    | running | those of training: differentiates `eval_loss(params, example)` in the place of `loss` | no |

    The batch may be sharded: under plain `jit` (on a mesh with explicit axes what is kept is replicated), and inside
    `shard_map`, where the gradients are those of the device's own examples.

    Errors: ValueError for leaves without a common batch axis, a loss that is no scalar, and a batch of one whose
    gradient passes a statistic over the batch (batch norm makes it zero); TypeError for complex parameters. Compiled once
    for each shape. A warning where an example's program takes a statistic over a batch axis of its own, of size one (batch
    norm without `axis_name`): those are gradients of batches of one.
    """
    check.choice("per_example", SEMANTICS, batch_norm=batch_norm)
    if not callable(loss):
        got = f"{loss!r}" if isinstance(loss, str) else type(loss).__name__
        raise TypeError(
            f"per_example: loss must be a function (params, example) -> float[], got {got}; see example_loss"
        )
    if batch_norm == "running":
        if eval_loss is None:
            raise ValueError("per_example: batch_norm='running' differentiates eval_loss, got None; pass the eval loss")
        loss, axis_name = eval_loss, None
    elif batch_norm != "path" and axis_name is None:
        raise ValueError(f"per_example: batch_norm={batch_norm!r} is about a named batch axis, got axis_name=None")

    def value_and_aux(params, example_and_key):
        example, key = example_and_key
        with check.foreign("per_example"):
            out = loss(params, example) if key is None else loss(params, example, key)
        value, aux = out if has_aux else (out, ())
        if jnp.shape(value) != ():
            raise ValueError(
                f"per_example: the loss of one example must be a scalar, got {check.describe(jnp.asarray(value))}; "
                "average over what is left, or index the batch axis of one: loss(...)[0]"
            )
        return value, aux

    compute = _by_loss if batch_norm == "loss" else functools.partial(_by_path, frozen=batch_norm == "frozen")
    compiled = jax.jit(mapped.auto(functools.partial(compute, value_and_aux, axis_name)))

    def gradients(params, batch, *more, key=None):
        if more:
            raise TypeError(
                f"per_example: the call takes (params, batch), got {len(more) + 2} arguments; put all parts of an example "
                "into one: per_example(lambda params, example: loss(params, *example))(params, (x, y))"
            )
        check.parameters("per_example", params)
        check.alive("per_example", params)
        if key is not None:
            check.prng_key("per_example", key)
        batch = arrays.arrays("per_example", "the batch", batch)
        size = _batch_size(batch)
        keys = None if key is None else jax.random.split(key, size)
        # Each example has parameters of its own: else, inside `shard_map`, autodiff would sum over the devices' examples.
        found, aux = compiled(mapped.varying(params, like=batch), (batch, keys))
        return (found, aux) if has_aux else found

    return gradients


def example_loss(
    net: Layer,
    state: Any,
    *,
    loss: Callable[[Any, Any], Any] = losses.cross_entropy,
    key: Any = None,
    train: bool = True,
    axis_name: Any = None,
    compute_dtype: Any = None,
) -> Callable[..., Any]:
    """Make `(params, (x, y), key=None) -> float[]`, the loss of a net on one example, for `per_example`.

    `state` is a `TrainState` or a pair (params, net_state), of which the second counts; the parameters are those of the
    call. `loss(outputs, targets) -> float[batch]` and `compute_dtype` as in `train_step`; pass the same `axis_name` to
    `per_example`. A net that draws random numbers gets a key for each example:
    `per_example(example_loss(...))(params, batch, key=key)`.

    Errors: TypeError for a key given here, of which all examples would share one dropout mask.
    """
    admission.net("example_loss", net)
    admission.loss("example_loss", loss)
    if key is not None:
        raise TypeError(
            "example_loss: the key must come with the example, loss(params, example, key), or all examples would share one "
            "dropout mask; got key=...; call per_example(loss)(params, batch, key=key), which splits it"
        )
    net = compute_in(net, compute_dtype)
    _, net_state = admission.parts("example_loss", state)

    def of_example(params, example, key=None):
        x, y = jax.tree.map(lambda a: jnp.asarray(a)[None], example)
        outputs, _ = net.apply(params, net_state, x, key=key, train=train, axis_name=mapped.lanes(axis_name))
        return admission.values("example_loss", loss, outputs, y)[0]

    return of_example


def check_step(per_example: Any, max_norm: Any, skip_nonfinite: bool) -> None:
    """Refuse options of a train step that do not go together."""
    if skip_nonfinite and per_example != "clip":
        raise ValueError(
            f"train_step: skip_nonfinite belongs to per_example='clip', got per_example={per_example!r}; pass both"
        )
    if per_example is not None:
        check.choice("train_step", ("norms", "clip"), per_example=per_example)
    if (per_example == "clip") != (max_norm is not None):
        raise ValueError(
            f"train_step: max_norm belongs to per_example='clip', got per_example={per_example!r} and "
            f"max_norm={max_norm!r}; pass both or neither"
        )
    if max_norm is not None:
        check.above_zero("train_step", max_norm=max_norm)


def step_gradients(
    net: Layer,
    loss: Callable[[Any, Any], Any],
    correct: Callable[[Any, Any], Any] | None,
    batch: tuple[Any, Any],
    *,
    key: Any,
    axis_name: Any,
    max_norm: Any,
    skip_nonfinite: bool,
    per_layer: bool,
) -> Callable[..., tuple[Any, Any, dict[str, Any], dict[str, Any]]]:
    """Make `(params, state) -> (gradient, new state, means, of examples)` for a train step, from single examples' gradients.

    With a state of None `params` is a pair (params, state), and both are differentiated; norms and clips are those of params.
    """
    outer = mapped.names(axis_name)
    # In this order an example has the same number, and so the same dropout mask, on one device and on many.
    every_axis = (*outer, "examples") if outer else "examples"

    def average(a):
        return mapped.mean(a, outer)

    def counted(holds):
        count = jnp.sum(holds, dtype=jnp.float32)
        return mapped.reduce(jax.lax.psum, count, outer)

    def of_example(diff, example, state):
        params, state = (diff, state) if state is not None else diff
        (x, y), number = jax.tree.map(lambda a: a[None], example[0]), example[1]
        axes = mapped.lanes(every_axis, number)
        with check.foreign("train_step"):
            outputs, new = net.apply(params, state, x, key=key, train=True, axis_name=axes)
            values = admission.values("train_step", loss, outputs, y)
        hits = {} if correct is None else {"accuracy": correct(outputs, y)[0]}
        return values[0], (new, {"loss": values[0]} | hits)

    def gradients(diff, state):
        function = functools.partial(of_example, state=state)
        numbers = jnp.arange(_batch_size(batch)) if mapped.checked() else None
        every, (new, values) = per_example(function, has_aux=True, axis_name="examples")(diff, (batch, numbers))
        n = every.batch * mapped.size(outer)
        if n == 1 and max_norm is None:
            raise ValueError(
                "train_step: per_example='norms' estimates noise from at least two examples, got a batch of one; use a "
                "larger batch, or fnn.per_example(...)(params, batch).norms()"
            )
        own = every if state is not None else every[0]
        news = None if state is not None else average(every[1].mean())
        new = jax.tree.map(lambda a: a[0], new)  # averaged over the axis by the net, and so the same for all
        values = jax.tree.map(lambda a: average(jnp.mean(a)), values)
        norms, mean = own.norms(), average(own.mean())
        each = own.norms(per_leaf=True)
        pairs = zip(*map(jax.tree.leaves, (each, tree.norms(mean))), strict=True)
        estimates = [estimate(norms, m, n, outer) for norms, m in pairs]
        layers = Estimates(*(jax.tree.unflatten(jax.tree.structure(mean), p) for p in zip(*estimates, strict=True)))
        whole = total(layers)
        sums = whole.moments()
        found = {
            "per_example_norms": norms,
            "per_example_quantiles": jnp.quantile(_of_all(norms, outer), jnp.linspace(0, 1, 5)),
            "noise_trace": sums.trace,
            "noise_signal": sums.signal,
            "signal_to_noise": whole.ratio(),
            "examples_nonfinite": counted(~jnp.isfinite(norms)),
            "examples_zero": counted(norms == 0),
        }
        if per_layer:
            sums = layers.moments()
            found |= {"per_example_norms_by_layer": each, "noise_traces": sums.trace, "noise_signals": sums.signal}
        if max_norm is not None:
            clipped = own.clipped_mean(max_norm, skip_nonfinite=skip_nonfinite)
            kept = own._kept(jnp.isfinite(norms)) if skip_nonfinite else own
            unclipped, mean = average(kept.mean()), average(clipped.mean)
            bias = tree.norm(jax.tree.map(jnp.subtract, mean, unclipped))
            found |= {"examples_clipped": average(clipped.fraction), "clip_bias": bias}
            found["examples_nonfinite"] = counted(clipped.nonfinite)
        return (mean if news is None else (mean, news)), new, values, found

    return gradients


def _of_all(a: jax.Array, outer: tuple[Any, ...]) -> jax.Array:
    """Gather the numbers of all devices, the same on each: as a sum, since `all_gather` leaves the type of a varying one."""
    for name in outer:
        mine = jnp.arange(jax.lax.axis_size(name)) == jax.lax.axis_index(name)
        a = mapped.reduce(jax.lax.psum, jnp.where(mine[:, None], a, 0), name).reshape(-1)
    return a


def _by_path(value_and_aux: Any, axis_name: Any, params: Any, batch: Any, *, frozen: bool) -> tuple[Any, Any]:
    size = _batch_size(batch)
    axis_name = AXIS if axis_name is None else axis_name
    plans: list[Any] = []

    def one(example):
        function = _frozen(value_and_aux, params, example) if frozen else value_and_aux

        def shared(params, example):
            value, aux = function(params, example)
            return value / share, aux

        share = 1 if jaxprs.has_custom_vjp(function, params, example) else size
        closed, specs = jaxprs.trace(jax.grad(shared, has_aux=True), params, example)
        depths = jax.tree.leaves(tree.map_depth(lambda k, _: k, specs[0]))
        found = list(zip(jax.tree.leaves(specs[0]), depths, strict=True))
        values = jax.tree.leaves((params, example))
        try:
            program = jaxprs.read(closed)
            leaves = [
                cuts.plan(program, atom, *at, Examples(size, axis_name))
                for atom, at in zip(program.outputs, found, strict=False)
            ]
            wanted = [atom for leaf in leaves for atom in leaf.atoms]
            gradient = jaxprs.prune(replace(program, outputs=wanted))
            moving = [i < len(found) for i in range(len(values))]
            if jaxprs.lone_statistic(gradient, moving):
                jaxprs.warn_of_lone_statistic()
            lone = size == 1 and jaxprs.collectives(gradient, axis_name)
            program = jaxprs.prune(replace(program, outputs=[*wanted, *program.outputs[len(found) :]]))
            outputs = None if lone else jaxprs.execute(program, values)
        except Exception as error:  # a jaxpr that reads otherwise than known: never a wrong number
            jaxprs.warn(f"{type(error).__name__}: {error}")
            lone, outputs = False, jaxprs.call(closed, values)
            leaves = [cuts.whole((atom,), "materialized", k) for atom, (_, k) in enumerate(found)]
        if lone:
            raise ValueError(
                "per_example: the gradient passes a statistic over the batch axis, which must hold at least two "
                "examples, got one: batch norm takes a lone example to its bias, and the gradient below it is zero; "
                "use a larger batch, or batch_norm='running'"
            )
        plans[:] = [specs, found, leaves, share]
        return outputs

    outputs: Any = jax.vmap(one, axis_name=axis_name)(batch)
    specs, found, leaves, share = plans
    position, built = 0, []
    for leaf in leaves:
        built.append(leaf.build(outputs[position : position + len(leaf.atoms)]))
        position += len(leaf.atoms)
    aux = jax.tree.unflatten(jax.tree.structure(specs[1]), outputs[position:])
    return _assembled(params, built, [leaf.route for leaf in leaves], found, size, share), aux


def _by_loss(value_and_aux: Any, axis_name: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    size = _batch_size(batch)
    if size == 1:
        raise ValueError(
            "per_example: batch_norm='loss' needs at least two examples, got one; use batch_norm='running'"
        )
    losses, pull, aux = jax.vjp(
        lambda params: jax.vmap(lambda e: value_and_aux(params, e), axis_name=axis_name)(batch), params, has_aux=True
    )

    def one(i):
        (gradients,) = pull(mapped.varying((jnp.arange(size) == i).astype(losses.dtype), like=losses))
        return jax.tree.leaves(gradients), jax.tree.leaves(tree.norms(gradients))

    values, norms = jax.lax.map(one, jnp.arange(size))
    depths = jax.tree.leaves(tree.map_depth(lambda k, _: k, params))
    found = [(jax.ShapeDtypeStruct(v.shape[1:], v.dtype), k) for v, k in zip(values, depths, strict=True)]
    built = [
        Full(jnp.moveaxis(v, 0, k), jnp.moveaxis(n, 0, k), k) for v, n, k in zip(values, norms, depths, strict=True)
    ]
    return _assembled(params, built, ["a backward pass each"] * len(built), found, size, 1), aux


def _assembled(
    params: Any, leaves: list[Any], routes: list[str], found: list[Any], size: int, share: int
) -> PerExampleGradients:
    rows = []
    for path, leaf, route, (spec, _) in zip(tree.paths(params), leaves, routes, found, strict=True):
        kept = jax.tree.leaves(leaf.arrays if isinstance(leaf, Pair | Rows) else leaf)
        whole = size * math.prod(spec.shape) * spec.dtype.itemsize
        rows.append(Route(path, route, sum(a.size * a.dtype.itemsize for a in kept), whole))
    specs = tuple((jax.ShapeDtypeStruct(spec.shape, spec.dtype), k) for spec, k in found)
    return PerExampleGradients(leaves, size, share, jax.tree.structure(params), specs, tuple(rows))


def _frozen(value_and_aux: Any, params: Any, example: Any) -> Any:
    closed, specs = jaxprs.trace(value_and_aux, params, example)
    program = jaxprs.freeze(jaxprs.read(closed, open_up=True))

    def function(params, example):
        return jax.tree.unflatten(
            jax.tree.structure(specs), jaxprs.execute(program, jax.tree.leaves((params, example)))
        )

    return function


def _batch_size(batch: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        empty = sizes == {0} and all(shapes)
        rest = ", and hold at least one, got none: " if empty else ", one entry for each example, got "
        raise ValueError(
            f"per_example: every array of the batch must have the same leading axis{rest}{check.describe(batch)}"
            f"{'; skip an empty batch' * empty}"
        )
    return sizes.pop()
