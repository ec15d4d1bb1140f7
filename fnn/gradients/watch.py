"""`watch`: gradients, activations and error signals of any JAX loss, layer by layer, with nothing added to the model.

`measured` says how.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, compiled, mapped, tree
from fnn.gradients.bad import FirstBad, first_bad
from fnn.gradients.forward_range import Ranges
from fnn.gradients.labels import DEFAULT, GROUPS, Options
from fnn.gradients.measured import explained, in_float64, measured
from fnn.gradients.operations import Unreadable
from fnn.gradients.price import Price, priced
from fnn.gradients.readings import Flow, empty, noted
from fnn.tasks import ScalarLoss
from fnn.tree import PyTree


@dataclass(frozen=True)
class Watch:
    """A loss to be watched, made by `watch(loss)`: call it, or use `value_and_grad`, `first_bad`, `explain`, `price`.

    All take what the loss takes, `(params, *batch)`, by position. Errors: TypeError for params that are no floating arrays;
    ValueError for a loss that is not one float, an `only` that matches no parameter, and arrays behind `params` whose
    leading axes differ.
    """

    loss: ScalarLoss
    options: Options
    every: int
    batch_size: int | None

    def __call__(self, params: PyTree, *rest: PyTree) -> Flow:
        """Measure the loss and its gradient at `params`; `rest`, the batch, goes to the loss as it is.

        Where activations leave float32's range on the way forward, the same program runs in float64, and the flow's notes
        say so; inside `jit`, `vmap` or `scan`, or where that does not suffice, what depends on them is NaN.

        Compiled once for each shape; `every` plays no part. Equal losses share what is compiled; a loss that closes over
        arrays is known by its identity: make it, and the watch, once.
        """
        flow, ranges = self._run(False, params, rest)
        if compiled.traced((flow, ranges)):
            return flow
        return ranged(self, flow, ranges, *self._admitted(params, rest))

    def value_and_grad(
        self, params: PyTree, *rest: PyTree, step: jax.Array | int = 0, exact: bool = False
    ) -> tuple[tuple[PyTree, PyTree], Flow]:
        """Return `(jax.value_and_grad(loss)(params, *rest), flow)`, by one backward pass.

        The gradients are those of `jax.value_and_grad` to rounding, in the dtypes of params; with `has_aux` the value is a
        pair (value, aux). At every `every`-th step, `step % every == 0`, the flow is measured; in between the plain gradient
        runs, and all numbers of the flow are NaN. `step` is a number, for which one of two compiled programs runs, or a
        traced one inside `jit` or `scan`, where `jax.lax.cond` chooses: there both branches take memory.

        With `axis_name` value and gradients are averaged over that axis at every step; aux is the lane's own.

        The backward pass is a plain one, so that log norms end where float32 does: those below 1e-28, and zeros that follow
        such numbers, are NaN. `exact=True` measures them too; that took a transformer 13 % and an mlp 20 % more time.
        Errors: TypeError for a step that is not one integer.

            (value, grads), flow = watch.value_and_grad(params, batch, step=i)
        """
        params, rest = self._admitted(params, rest)
        watched = self if exact else self._inexact
        if self.every == 1:
            return watched._run(True, params, rest)
        if isinstance(step, int | np.integer):
            return watched._run(True, params, rest) if step % self.every == 0 else watched._between(params, rest)
        if not jnp.issubdtype(jnp.result_type(step), jnp.integer) or jnp.ndim(step):
            raise TypeError(f"watch: step must be one integer, got {check.describe(jnp.asarray(step))}")
        return jax.lax.cond(
            step % self.every == 0, lambda p, r: watched._run(True, p, r), watched._between, params, rest
        )

    def _between(self, params: Any, rest: Any) -> tuple[tuple[Any, Any], Flow]:
        if compiled.traced((params, rest)):
            return _plain(*self._statics, params, rest), self._nothing(params, rest)
        return compiled.program(_plain, self._statics)(params, rest), self._nothing(params, rest)

    @property
    def _statics(self) -> tuple[Any, bool, Any]:
        return self.loss, self.options.has_aux, self.options.axis_name

    def _nothing(self, params: Any, rest: Any) -> Flow:
        known = tree_key((params, rest))
        forms = self._forms
        if known not in forms:
            forms[known] = jax.eval_shape(lambda p, r: self._run(True, p, r)[1], params, rest)
        flow = empty(forms[known])
        return jax.tree.map(jnp.asarray, flow) if compiled.traced((params, rest)) else flow

    @functools.cached_property
    def _inexact(self) -> "Watch":
        return replace(self, options=replace(self.options, exact=False))

    @functools.cached_property
    def _forms(self) -> dict[Any, Any]:
        return {}

    @functools.cached_property
    def _checked(self) -> Callable[..., Any]:
        return functools.partial(_one_float, self.loss, self.options.has_aux)

    def _admitted(self, params: Any, rest: Any) -> tuple[Any, Any]:
        check.parameters("watch", params)
        check.alive("watch", params)
        if self.options.only != "*":
            names = [name.removesuffix("/value") for name in tree.paths(params)]
            if not any(map(self.options.wants, names)):
                raise ValueError(
                    f"watch: only must match a parameter's path, got {self.options.only!r}; paths are like "
                    f"{', '.join(names[:3])}"
                )
        return params, arrays.arguments("watch", rest)

    def size(self, rest: PyTree) -> int:
        """Count the examples; 0 for a loss that is no mean over them."""
        return self.batch_size or (0 if self.options.weighted else batch_size(rest))

    def _run(self, grads: bool, params: Any, rest: Any) -> Any:
        params, rest = self._admitted(params, rest)
        statics = (self._checked, self.options, grads, self.size(rest))
        run = compiled.program(measured, statics, keep=not compiled.traced((params, rest)))
        return run(params, rest)

    def explain(self, params: PyTree, *rest: PyTree) -> str:
        """Say what was recognised in the loss: its layers in forward order, softmaxes, and what could not be read.

        A line for each layer: the parameter, JAX's operation, shapes of input and output, the loops around it, the module.
        Nothing is computed; only traced.
        """
        params, rest = self._admitted(params, rest)
        return explained(self._checked, self.options, params, rest)

    def first_bad(self, params: PyTree, *rest: PyTree) -> FirstBad | None:
        """Name the first operation, forward or backward, that makes a NaN or an infinity; None if loss and gradient are finite.

        For the host. See `FirstBad` for what it says, and `fnn.gradients.bad` for how it is found.

            print(fnn.watch(loss).first_bad(params, batch))
        """
        return first_bad(self.loss, params, *rest, has_aux=self.options.has_aux, axis_name=self.options.axis_name)

    def price(self, params: PyTree, *rest: PyTree, rounds: int = 11) -> Price:
        """Measure here what each group of quantities adds to `jax.value_and_grad(loss)`, in time and temporary memory.

        Each row is one program that gives loss, gradient and flow, as `value_and_grad` does: the plain gradient, the exact
        one with nothing measured, each group alone, the default groups and all of them. `only` is kept; `every` is not: a
        step in between is the plain one. All are compiled anew, some seconds each, and timed in turn for `rounds` rounds.
        With `axis_name` the whole batch is one shard.
        Errors: TypeError for traced arrays.

            print(fnn.watch(loss).price(params, batch))
        """
        params, rest = self._admitted(params, rest)
        sets = {"exact gradient alone": (), **{f"group {group}": (group,) for group in GROUPS}}
        sets |= {"default groups": DEFAULT, "all groups": GROUPS}
        if self.options.groups not in sets.values():
            sets["these groups"] = self.options.groups
        size = self.size(rest)
        functions = {"plain gradient": functools.partial(_plain, *self._statics)}
        for name, groups in sets.items():
            options = replace(self.options, groups=groups)
            functions[name] = functools.partial(measured, self._checked, options, True, size)
        if self.options.axis_name is not None:
            lane = functools.partial(jax.vmap, in_axes=None, axis_size=1, axis_name=self.options.axis_name)
            functions = {name: lane(function) for name, function in functions.items()}
        return priced("watch.price", functions, (params, rest), rounds)


def watch(
    loss: ScalarLoss,
    *,
    has_aux: bool = False,
    axis_name: mapped.AxisName = None,
    only: str = "*",
    every: int = 1,
    groups: Sequence[str] = DEFAULT,
    batch_size: int | None = None,
    weighted: bool = False,
) -> Watch:
    """Make `(params, *batch) -> Flow`: |dL/dW|, |dL/dh| and statistics of each layer's input and output, for any JAX loss L.

    `loss(params, *batch) -> float[]`, or `(float[], aux)` with `has_aux`, is what one gives to `jax.value_and_grad`: a mean
    over the batch. `params` is a pytree of floating arrays, of a model in Flax, Equinox, Haiku or plain JAX. Nothing is added
    to the model. A layer is a product of data with a parameter (dense, convolution, lookup of an embedding); layers are found
    in the traced loss, inside `scan` and `checkpoint` too, and numbered from the input. h is the layer's output.
    What lies inside `cond`, `while` and custom rules is no layer; `.explain` names it. Gradients are complete all the
    same. A weight that is made of several parameters counts under the largest.

    | option | what |
    |---|---|
    | has_aux | the loss returns (value, aux) |
    | axis_name | the mapped axis that shards the batch; numbers are those of the whole batch |
    | only | a pattern of `fnmatch` for parameter paths, such as "*/mlp/*": nothing else is measured |
    | every | for `value_and_grad`: measure at each such step alone |
    | groups | what is measured: of "gradient", "error", "activation" (these are the default), "kurtosis", "saturated", "rank", "cosine", "attention"; "all" is all. `Flow` lists their quantities, `.price` says what they cost |
    | batch_size | the number of examples B; without it the leading axis of the arrays behind `params` |
    | weighted | L is no plain mean over examples (token-weighted): |dL/dh| itself is reported, as `log10_error_norm` |

    The error signal is the RMS over examples of |d l_i/dh|, which is √B·|dL/dh| for a mean L of B losses l_i.

    Log norms are exact at any depth: they do not underflow (`fnn.gradients.exact`); where the forward pass itself leaves the
    range of its dtype they cannot help. Where arrays above 1e29 (in float32) meet a gradient, a call measures in float64 and
    notes it; inside `jit`, and in `value_and_grad(exact=True)`, such a norm is NaN. Works under
    `jit`, `scan`, `vmap` and `shard_map`.
    Errors: TypeError for a loss that is no function; ValueError for an unknown group; more in `Watch`.

        watch = fnn.watch(loss)
        flow = watch(params, batch)
        print(flow); flow.table(); flow.worst(3)
    """
    if not callable(loss):
        raise TypeError(f"watch: loss must be a function (params, batch) -> float[], got {type(loss).__name__}")
    if not isinstance(only, str):
        raise TypeError(f"watch: only must be a pattern of paths, such as '*/mlp/*', got {type(only).__name__}")
    groups = GROUPS if groups == "all" else (groups,) if isinstance(groups, str) else tuple(groups)
    for group in groups:
        check.choice("watch", GROUPS, groups=group)
    check.positive("watch", every=every, batch_size=1 if batch_size is None else batch_size)
    return Watch(loss, Options(has_aux, axis_name, only, groups, weighted), every, batch_size)


def ranged(watch: Watch, flow: Flow, ranges: Ranges, params: Any, rest: Any) -> Flow:
    """Return the flow, or one measured in float64 where activations left the range of their own float type.

    The same where a number of the way back is not finite: there a factor of float32's upper end met a gradient.
    """
    finite = flow.backward_is_finite()
    if finite and not ranges.strained(float(flow.loss)):
        return flow
    zero = [not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(params)]
    where, left = ranges.first(zero, flow.labels), ranges.spots[0].dtype if ranges.spots else "float32"
    says = f"activations left the range of {left}{where}" if ranges.lost else f"gradients left the range of {left}"

    def kept(reason):
        what = says if ranges.lost else "gradients are not finite"
        return flow if finite and not ranges.lost else noted(flow, what + reason)

    try:
        again, wide, holds = jax.device_get(_in_float64(watch, params, rest))
    except (Unreadable, TypeError, ValueError, NotImplementedError) as error:
        return kept(f", which cannot be measured in float64 ({arrays.first_line(error)})")
    if not holds:
        return kept(", and this platform has no float64")
    if ranges.same(wide):
        return flow if finite or not again.backward_is_finite() else noted(again, f"measured in float64: {says}")
    where = (wide if wide.lost else ranges).first(zero, flow.labels)
    if wide.lost:
        return noted(again, f"activations left the range of float64 too{where}: what depends on them is NaN")
    return noted(again, f"measured in float64: activations left the range of {left}{where}")


def _in_float64(watch: Watch, params: Any, rest: Any) -> Any:
    params, rest = jax.tree.map(jnp.asarray, (params, rest))
    statics = (watch._checked, watch.options, watch.size(rest), bool(jax.config.read("jax_enable_x64")))
    with jax.enable_x64(True):
        return compiled.program(in_float64, statics)(params, rest)


def batch_size(rest: Any) -> int:
    """Find the leading axis that all arrays share; keys and numbers do not count. Errors: ValueError if they differ, or are 0."""
    leaves = [leaf for leaf in jax.tree.leaves(rest) if jnp.ndim(leaf) and not _key(leaf)]
    sizes = sorted({jnp.shape(leaf)[0] for leaf in leaves})
    if sizes == [0]:
        raise ValueError("watch: the batch must hold at least one example, got none; skip an empty batch")
    if len(sizes) != 1:
        raise ValueError(
            "watch: the arrays behind params must share their leading axis, the examples, got "
            f"{', '.join(map(str, sizes)) or 'none'}; pass batch_size="
        )
    return sizes[0]


def tree_key(values: Any) -> Any:
    """Give structure, shapes and dtypes of some arrays as a key."""
    leaves, treedef = jax.tree.flatten(values)
    return treedef, tuple((jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)


def _key(leaf: Any) -> bool:
    typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return typed or (leaf.dtype == jnp.uint32 and jnp.shape(leaf) == (2,))


def _one_float(loss: Any, has_aux: bool, params: PyTree, *rest: PyTree) -> Any:
    return check.scalar_loss("watch", loss(params, *rest), has_aux)


def _plain(loss: Any, has_aux: bool, axis_name: Any, params: Any, rest: Any) -> Any:
    params = mapped.varying(params, axis_name, like=rest)
    out, grads = jax.value_and_grad(loss, has_aux=has_aux)(params, *rest)
    value, *aux = out if has_aux else (out,)
    value, grads = mapped.mean((value, grads), axis_name)
    return ((value, *aux) if has_aux else value), grads
