"""Gradients of single examples at about the cost of one backward pass, for any JAX loss.

They equal `vmap(grad(loss))`, and are computed from what each gradient is a product of: see `search`, `cuts`, `products`.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import DTypeLike

from fnn import admission, arrays, check, compiled, losses, mapped, measures, tree
from fnn.core import Layer
from fnn.gradients import batch_axis, cuts, operations
from fnn.gradients import program as jaxprs
from fnn.gradients.example_gradients import PerExampleGradients, Route
from fnn.gradients.operations import Program
from fnn.gradients.price import Price, priced
from fnn.gradients.products import Full, Pair
from fnn.gradients.search import search
from fnn.gradients.squares import AXIS, Examples
from fnn.layers.precision import compute_in
from fnn.tasks import ExampleFunction, ScalarLoss
from fnn.tree import PyTree

SEMANTICS = ("path", "loss", "frozen", "running")
PRICED: dict[str, Callable[[PerExampleGradients], Any]] = {
    "norms": lambda g: g.norms(),
    "mean and norms": lambda g: (g.mean(), g.norms()),
    "clipped mean": lambda g: g.clipped_mean(1.0).mean,
    "variance": lambda g: g.variance(),
    "gram": lambda g: g.gram(),
}


@dataclass(frozen=True)
class PerExample:
    """Gradients of single examples of a loss, made by `per_example`: call it as `(params, batch, key=None)`, or ask its price."""

    _gradients: Callable[..., Any]
    _mean: Callable[..., Any]
    """The mean loss of a batch."""
    _has_aux: bool

    def __call__(self, params: PyTree, batch: PyTree, *more: PyTree, key: jax.Array | None = None) -> PyTree:
        """Return `PerExampleGradients`, with `has_aux` a pair (gradients, aux). See `per_example`."""
        return self._gradients(params, batch, *more, key=key)

    def price(self, params: PyTree, batch: PyTree, *, key: jax.Array | None = None, rounds: int = 11) -> Price:
        """Measure here what norms, means, clipped means, variances and Gram matrices cost beside the mean loss's plain gradient.

        Each row is a program of its own, compiled anew; see `Price`. Errors: TypeError for traced arrays.

            print(fnn.per_example(loss).price(params, batch))
        """

        def asked(method):
            def run(params, batch, key):
                found = self(params, batch, key=key)
                return method(found[0] if self._has_aux else found)

            return run

        functions = {"plain gradient": jax.value_and_grad(self._mean)}
        functions |= {name: asked(method) for name, method in PRICED.items()}
        (batch,) = arrays.arguments("per_example.price", (batch,))
        return priced("per_example.price", functions, (params, batch, key), rounds)


def per_example(
    loss: ScalarLoss,
    *,
    has_aux: bool = False,
    axis_name: mapped.AxisName = None,
    batch_norm: str = "path",
    eval_loss: ScalarLoss | None = None,
) -> PerExample:
    """Make `(params, batch) -> PerExampleGradients` of `loss(params, example) -> float[]`, at about the cost of one gradient.

    An example is any pytree, and a batch is the same with a leading axis. The gradients are those of
    `vmap(grad(loss), in_axes=(None, 0))`, and every method of the result gives the values that these have. They are not
    stored: of most weights the two factors of each gradient are kept, and `explain()` prints what is kept of which.

    A loss with noise (dropout) takes the key as an argument, `loss(params, example, key)`: called as
    `(params, batch, key=key)`, example i gets `jax.random.split(key, batch)[i]`. If the loss closes over a key instead, all
    examples share one mask. With `has_aux` the loss returns (value, aux), and the call (gradients, aux of all examples).
    `axis_name` names the batch axis, for averages over it in the loss (batch norm):
    `net.apply(..., x[None], train=True, axis_name=axis_name)`.

    Where examples depend on one another, `batch_norm` says what an example's gradient is:

    | name | statistics | sums to the batch gradient |
    |---|---|---|
    | path | of the batch; example i has its own copy of the weights: `vmap(grad(loss), axis_name=...)` | yes |
    | loss | of the batch; the gradient of example i's loss through them; costs `batch` backward passes | yes |
    | frozen | of the batch, but held constant: no gradient passes through them | no |
    | running | those of training: differentiates `eval_loss(params, example)` instead of `loss` | no |

    The batch may be sharded: under plain `jit` (on a mesh with explicit axes what is kept is replicated), and inside
    `shard_map`, where the gradients are those of the device's own examples.

    Compiled once for each shape, and equal losses share what is compiled: those that `example_loss` makes of equal nets,
    and functions that close over plain values only. One that closes over arrays is known by its identity, so make it once,
    outside of the loop.

    Errors: ValueError for leaves without a common batch axis, a loss that is no scalar, and a batch of one whose
    gradient passes a statistic over the batch (batch norm makes it zero); TypeError for complex parameters. Warns if the
    loss takes a statistic over a batch axis of its own, of size one (batch norm without `axis_name`): these are then
    gradients of batches of one.
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

    function, kept = (loss.func, (loss.args, loss.keywords)) if isinstance(loss, Partial) else (loss, ((), {}))
    run = None

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
        (batch,) = arrays.arguments("per_example", (batch,))
        size = batch_size(batch)
        keys = None if key is None else jax.random.split(key, size)
        nonlocal run
        if run is None:
            statics = function, has_aux, axis_name, batch_norm
            run = compiled.program(_gradients, statics, keep=not compiled.traced((params, batch, kept)))
        # Each example has parameters of its own: else, inside `shard_map`, autodiff would sum over the devices' examples.
        found, aux = run(kept, mapped.varying(params, like=batch), (batch, keys))
        return (found, aux) if has_aux else found

    def mean(params, batch, key=None):
        keys = () if key is None else (jax.random.split(key, batch_size(batch)),)
        over = jax.vmap(loss, in_axes=(None, 0, *[0] * len(keys)), axis_name=axis_name)
        out: Any = over(params, batch, *keys)
        return jnp.mean(out[0] if has_aux else out)

    return PerExample(gradients, mean, has_aux)


def example_loss(
    net: Layer,
    state: PyTree,
    *,
    loss: ExampleFunction = losses.cross_entropy,
    key: None = None,
    train: bool = True,
    axis_name: mapped.AxisName = None,
    compute_dtype: DTypeLike | None = None,
) -> Callable[..., jax.Array]:
    """Make `(params, (x, y), key=None) -> float[]`, the loss of a net on one example, for `per_example`.

    `state` is a `TrainState` or a pair (params, net_state), of which only the net's state is used: the parameters are
    those of the call. `loss(outputs, targets) -> float[batch]` and `compute_dtype` are as in `train_step`; pass the same
    `axis_name` to `per_example`. A net that draws random numbers gets a key for each example:
    `per_example(example_loss(...))(params, batch, key=key)`.

    Its seven arguments are those of `evaluate`, and those of a net's `apply`.
    Errors: TypeError for a key given here, with which all examples would share one dropout mask; ValueError for weights and
    for a loss that returns `losses.Counted`: one example's share of the mean then depends on the others.
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

    def of_example(net_state, params, example, key=None):
        x, y = arrays.weighted(jax.tree.map(lambda a: jnp.asarray(a)[None], example))
        admission.state("example_loss", net, params, net_state, x)
        outputs, _ = net.apply(params, net_state, x, key=key, train=train, axis_name=mapped.lanes(axis_name))
        return measures.each("example_loss", loss, outputs, y)[0]

    # The state is an argument of the program, so that the losses of equal nets with other states share one.
    return Partial(of_example, net_state)


def _gradients(
    loss: Any, has_aux: bool, axis_name: Any, batch_norm: str, kept: Any, params: Any, batch: Any
) -> tuple[Any, Any]:
    """Do the device's part of `per_example`; what is static comes first, as one argument each.

    `kept` are the arguments that a `Partial` loss holds, `batch` is (batch, keys).
    """
    args, keywords = kept

    def value_and_aux(params, example_and_key):
        example, key = example_and_key
        keys = () if key is None else (key,)
        with check.foreign("per_example"):
            out = loss(*args, params, example, *keys, **keywords)
        value, aux = out if has_aux else (out, ())
        if jnp.shape(value) != ():
            raise ValueError(
                f"per_example: the loss of one example must be a scalar, got {check.describe(jnp.asarray(value))}; "
                "average over what is left, or index the batch axis of one: loss(...)[0]"
            )
        return value, aux

    if batch_norm == "loss":
        return _by_loss(value_and_aux, axis_name, params, batch)
    return _by_path(value_and_aux, AXIS if axis_name is None else axis_name, batch_norm == "frozen", params, batch)


def _by_path(function: Any, axis_name: Any, frozen: bool, params: Any, batch: Any) -> tuple[Any, Any]:
    size = batch_size(batch)
    # Of the right shape and type; its values are not used.
    example = jax.tree.map(lambda a: jax.lax.index_in_dim(a, 0, keepdims=False), batch)
    trace = functools.partial(jaxprs.trace, axes=[(axis_name, size)])
    if frozen:
        function = _frozen(*trace(function, params, example))
    # A derivative rule of the loss's own need not be linear: it must see the loss itself, not its share of the mean. And a
    # share of it would fall among float16's subnormals.
    traced = trace(function, params, example)[0]
    own = any(name.startswith("custom_vjp") for name, _ in jaxprs.equations(traced))
    share = 1 if own or jnp.dtype(jnp.float16) in jaxprs.dtypes(traced) else size

    def shared(params, example):
        value, aux = function(params, example)
        return value / share, aux

    closed, specs = trace(jax.grad(shared, has_aux=True), params, example)
    depths = jax.tree.leaves(tree.map_depth(lambda k, _: k, specs[0]))
    found = list(zip(jax.tree.leaves(specs[0]), depths, strict=True))
    try:
        program, leaves = _plan(jaxprs.read(closed), found, Examples(size, axis_name), params)
        run = functools.partial(operations.execute, program)
    except operations.Unreadable as error:
        jaxprs.warn(str(error))
        leaves = [cuts.whole((atom,), cuts.STORED, k) for atom, (_, k) in enumerate(found)]
        run = functools.partial(jaxprs.call, closed)
    outputs = iter(jax.vmap(lambda example: run(jax.tree.leaves((params, example))), axis_name=axis_name)(batch))
    built = [leaf.build(list(itertools.islice(outputs, len(leaf.atoms)))) for leaf in leaves]
    aux = jax.tree.unflatten(jax.tree.structure(specs[1]), outputs)
    return _assembled(params, built, [leaf.route for leaf in leaves], found, size, share), aux


def _plan(program: Program, found: list[Any], examples: Examples, params: Any) -> tuple[Program, list[cuts.Plan]]:
    """Cut the gradients' program: what each array's gradient is made of comes first among its outputs, then aux.

    Errors: ValueError for one example whose gradient passes a statistic over the batch. Unreadable.
    """
    gradients, aux = program.outputs[: len(found)], program.outputs[len(found) :]
    paths = [search(program, atom) for atom in gradients]
    leaves = [
        cuts.plan(program, atom, path, spec, depth, examples)
        if math.prod(spec.shape)
        else cuts.whole((atom,), cuts.STORED, depth)  # there is nothing to split
        for atom, path, (spec, depth) in zip(gradients, paths, found, strict=True)
    ]
    wanted = [atom for leaf in leaves for atom in leaf.atoms]
    gradient = operations.prune(replace(program, outputs=wanted))
    if batch_axis.lone_statistic(gradient, [i < len(found) for i in range(len(program.inputs))]):
        batch_axis.warn_of_lone_statistic()
    if examples.count == 1 and batch_axis.collectives(gradient, examples.axis_name):
        raise ValueError(
            "per_example: the gradient passes a statistic over the batch axis, which must hold at least two examples, got "
            "one: batch norm takes a lone example to its bias, and the gradient below it is zero; use a larger batch, or "
            "batch_norm='running'"
        )
    return operations.prune(replace(program, outputs=[*wanted, *aux])), leaves


def _by_loss(value_and_aux: Any, axis_name: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    size = batch_size(batch)
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
        kept = jax.tree.leaves(leaf.arrays if isinstance(leaf, Pair) else leaf)
        whole = size * math.prod(spec.shape) * spec.dtype.itemsize
        rows.append(Route(path, route, sum(a.size * a.dtype.itemsize for a in kept), whole))
    specs = tuple((jax.ShapeDtypeStruct(spec.shape, spec.dtype), k) for spec, k in found)
    return PerExampleGradients(leaves, size, share, jax.tree.structure(params), specs, tuple(rows))


def _frozen(closed: Any, specs: Any) -> Any:
    program = batch_axis.freeze(jaxprs.read(closed, open_up=True))

    def function(params, example):
        outputs = operations.execute(program, jax.tree.leaves((params, example)))
        return jax.tree.unflatten(jax.tree.structure(specs), outputs)

    return function


def batch_size(batch: Any) -> int:
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
