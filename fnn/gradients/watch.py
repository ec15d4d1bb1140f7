"""`watch`: gradients, activations and error signals of any JAX loss, layer by layer, with nothing added to the model.

`measured` says how.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, compiled
from fnn.gradients.bad import FirstBad, first_bad
from fnn.gradients.forward_range import Ranges
from fnn.gradients.labels import DEFAULT, GROUPS, Options
from fnn.gradients.measured import explained, in_float64, measured
from fnn.gradients.operations import Unreadable
from fnn.gradients.readings import Flow, empty, noted


@dataclass(frozen=True)
class Watch:
    """A loss to be watched: see `watch`."""

    loss: Callable[..., Any]
    options: Options
    every: int
    batch_size: int | None

    def __call__(self, params: Any, *rest: Any) -> Flow:
        """Measure the loss and its gradient at some parameters; `rest` goes to the loss as it is.

        Where activations leave float32's range on the way forward, the same program runs in float64, and the flow's notes
        say so; inside `jit`, `vmap` or `scan`, or where that does not suffice, what depends on them is NaN.
        """
        flow, ranges = self._run(False, params, rest)
        if compiled.traced((flow, ranges)):
            return flow
        return ranged(self, flow, ranges, *self._admitted(params, rest))

    def value_and_grad(self, params: Any, *rest: Any, step: Any = 0) -> tuple[tuple[Any, Any], Flow]:
        """Return `(jax.value_and_grad(loss)(params, *rest), flow)`, by one backward pass.

        Only at every `every`-th step is the flow measured; in between its numbers are NaN. `step` is a number, for which
        one of two compiled programs runs, or a traced one inside `jit` or `scan`, where `jax.lax.cond` chooses: there both
        branches take memory.
        """
        params, rest = self._admitted(params, rest)
        if self.every == 1:
            return self._run(True, params, rest)
        if isinstance(step, int | np.integer):
            return self._run(True, params, rest) if step % self.every == 0 else self._between(params, rest)
        if not jnp.issubdtype(jnp.result_type(step), jnp.integer) or jnp.ndim(step):
            raise TypeError(f"watch: step must be one integer, got {check.describe(jnp.asarray(step))}")
        return jax.lax.cond(step % self.every == 0, lambda p, r: self._run(True, p, r), self._between, params, rest)

    def _between(self, params: Any, rest: Any) -> tuple[tuple[Any, Any], Flow]:
        if compiled.traced((params, rest)):
            return _plain(self.loss, self.options.has_aux, params, rest), self._nothing(params, rest)
        run = compiled.program(_plain, (self.loss, self.options.has_aux))
        return run(params, rest), self._nothing(params, rest)

    def _nothing(self, params: Any, rest: Any) -> Flow:
        known = tree_key((params, rest))
        forms = self._forms
        if known not in forms:
            forms[known] = jax.eval_shape(lambda p, r: self._run(True, p, r)[1], params, rest)
        flow = empty(forms[known])
        return jax.tree.map(jnp.asarray, flow) if compiled.traced((params, rest)) else flow

    @functools.cached_property
    def _forms(self) -> dict[Any, Any]:
        return {}

    def _admitted(self, params: Any, rest: Any) -> tuple[Any, Any]:
        check.parameters("watch", params)
        check.alive("watch", params)
        return params, arrays.arguments("watch", rest)

    def size(self, rest: Any) -> int:
        """Count the examples; 0 for a loss that is no mean over them."""
        return self.batch_size or (0 if self.options.weighted else batch_size(rest))

    def _run(self, grads: bool, params: Any, rest: Any) -> Any:
        params, rest = self._admitted(params, rest)
        size = self.size(rest)
        statics = (self.loss, self.options, grads, size)
        run = compiled.program(measured, statics, keep=not compiled.traced((params, rest)))
        return run(params, rest)

    def explain(self, params: Any, *rest: Any) -> str:
        """Say what was recognised in the loss: its layers in forward order, softmaxes, and what could not be read."""
        params, rest = self._admitted(params, rest)
        return explained(self.loss, self.options, params, rest)

    def first_bad(self, params: Any, *rest: Any) -> FirstBad | None:
        """Name the first operation, forward or backward, that makes a NaN or an infinity; None if all is finite. See `FirstBad`."""
        return first_bad(self.loss, params, *rest, has_aux=self.options.has_aux, axis_name=self.options.axis_name)


def watch(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: Any = None,
    only: str = "*",
    every: int = 1,
    groups: Sequence[str] = DEFAULT,
    batch_size: int | None = None,
    weighted: bool = False,
) -> Watch:
    """Make `(params, batch, ...) -> Flow`: gradients, activations and error signals of a loss, layer by layer.

    `loss(params, batch, *rest) -> float[]` is any JAX function, a mean over the batch as for `jax.value_and_grad`; params
    are the arrays of a model in Flax, Equinox, Haiku or plain JAX. Nothing is added to the model: its layers are found in
    the traced loss, inside `scan` and `checkpoint` too. Log norms are exact at any depth; see `fnn.gradients.exact`.
    `.explain(params, batch)` says what was found, `.value_and_grad(params, batch, step=i)` serves a training loop,
    `.first_bad(params, batch)` names what makes a NaN or an infinity.

    `only` is a pattern of `fnmatch` for parameter paths: nothing else is measured. `groups` names what is measured, of
    "gradient", "error", "activation" (the default), "kurtosis", "saturated", "rank", "cosine", "attention"; "all" is all:
    see `Flow`. `axis_name` names a mapped axis that shards the batch.

    The error signal of a layer with output h is the RMS over examples of |d l_i/dh|, which is sqrt(B)·|dL/dh| for a mean L
    of B losses. B is the leading axis of the arrays behind `params`; `batch_size` overrides it. Where L is no plain mean
    over examples (token-weighted losses), pass `weighted=True`: then |dL/dh| itself is reported, as `log10_error_norm`.

    Works under `jit`, `scan`, `vmap` and `shard_map`. Its eight options are those of a measurement.
    Errors: TypeError for a loss that is no function; ValueError for an unknown group, and where the leading axes of the
    arrays behind `params` differ.

        flow = fnn.watch(loss)(params, x, y)
        print(flow); flow.table(); flow.worst(3)
    """
    if not callable(loss):
        raise TypeError(f"watch: loss must be a function (params, batch) -> float[], got {type(loss).__name__}")
    groups = GROUPS if groups == "all" else (groups,) if isinstance(groups, str) else tuple(groups)
    for group in groups:
        check.choice("watch", GROUPS, groups=group)
    check.positive("watch", every=every, batch_size=1 if batch_size is None else batch_size)
    return Watch(loss, Options(has_aux, axis_name, only, groups, weighted), every, batch_size)


def ranged(watch: Watch, flow: Flow, ranges: Ranges, params: Any, rest: Any) -> Flow:
    """Return the flow, or one measured in float64 where activations left the range of their own float type."""
    if not ranges.strained(float(flow.loss)):
        return flow
    zero = [not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(params)]
    where, left = ranges.first(zero, flow.labels), ranges.spots[0].dtype if ranges.spots else "float32"
    try:
        again, wide, holds = jax.device_get(_in_float64(watch, params, rest))
    except (Unreadable, TypeError, ValueError, NotImplementedError) as error:
        if not ranges.lost:
            return flow
        reason = arrays.first_line(error)
        return noted(
            flow, f"activations left the range of {left}{where}, which cannot be measured in float64 ({reason})"
        )
    if not holds:
        return (
            noted(flow, f"activations left the range of {left}{where}, and this platform has no float64")
            if ranges.lost
            else flow
        )
    if ranges.same(wide):
        return flow
    if wide.lost:
        where = wide.first(zero, flow.labels)
        return noted(again, f"activations left the range of float64 too{where}: what depends on them is NaN")
    return noted(again, f"measured in float64: activations left the range of {left}{where}")


def _in_float64(watch: Watch, params: Any, rest: Any) -> Any:
    params, rest = jax.tree.map(jnp.asarray, (params, rest))
    statics = (watch.loss, watch.options, watch.size(rest), bool(jax.config.read("jax_enable_x64")))
    with jax.enable_x64(True):
        return compiled.program(in_float64, statics)(params, rest)


def batch_size(rest: Any) -> int:
    """Find the leading axis that all arrays share; keys and numbers do not count. Errors: ValueError if they differ."""
    leaves = [leaf for leaf in jax.tree.leaves(rest) if jnp.ndim(leaf) and not _key(leaf)]
    sizes = sorted({jnp.shape(leaf)[0] for leaf in leaves})
    if len(sizes) != 1 or sizes == [0]:
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


def _plain(loss: Any, has_aux: bool, params: Any, rest: Any) -> Any:
    return jax.value_and_grad(loss, has_aux=has_aux)(params, *rest)
