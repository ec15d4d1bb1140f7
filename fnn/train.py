"""Training: one compiled step, its state, and the average over a data set."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import check, clip, losses, mapped, tree
from fnn.core import Layer, as_arrays, as_spec, check_values, output_shape
from fnn.dataset import Dataset, check_dataset, shuffled
from fnn.per_example import check_step, step_gradients
from fnn.taps import TapState


@flax.struct.dataclass
class TrainState:
    """Everything that a step carries: parameters, the net's state, the optimiser's, the key, the number of steps."""

    params: Any
    state: Any
    opt_state: Any
    key: Any
    step: Any

    @classmethod
    def create(cls, net: Layer, optimizer: optax.GradientTransformation, key: Any, spec: Any) -> "TrainState":
        """Initialise a net and its optimiser; `spec` is an example batch, or its `jax.ShapeDtypeStruct`."""
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise TypeError(f"TrainState.create: optimizer must be an optax transformation, got {optimizer!r}")
        # Not under jit: one program for all the draws takes longer to compile than each of them does, and the draws
        # are kept for the next net with arrays of the same shapes.
        init_key, train_key = jax.random.split(key)
        params, state = net.init(init_key, as_spec(spec))
        created = cls(params, state, optimizer.init(params), train_key, jnp.zeros((), jnp.int32))
        return jax.tree.map(jnp.copy, created)  # an array that two leaves share could not be donated


class TrainStep:
    """Call `step(state, batch) -> (state, metrics)`: one jitted function that owns and reuses the state's buffers.

    `step.pure` is the same function before `jit`; the signature is that of `lax.scan`. Made by `train_step`.
    """

    def __init__(self, pure: Callable[..., Any], net: Layer, loss: Callable[..., Any]):
        self.pure, self.net, self.loss = pure, net, loss
        self.jitted = jax.jit(pure, donate_argnums=0)
        self.epoch = jax.jit(self._epoch, donate_argnums=0, static_argnums=3)
        self.stretch = jax.jit(functools.partial(jax.lax.scan, pure), donate_argnums=0)
        self._output_shapes: dict[Any, tuple[int, ...]] = {}

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        self.check(state, batch)
        return self.jitted(state, batch)

    def lower(self, state: TrainState, batch: Any) -> Any:
        """Lower without running, to look at the HLO and `memory_analysis()`."""
        return self.jitted.lower(state, batch)

    def loops(self, state: TrainState, batch: Any) -> bool:
        """Whether stretches of steps should be called from Python, one by one, instead of scanned over.

        On a CPU XLA computes the gradient of a convolution some 30 times slower inside a loop than outside of it, unless
        its arrays lie in the order of a forward pass (`conv`'s "turned").
        """
        ranks = jax.tree.leaves(tree.map_depth(lambda k, a: a.ndim - k, state.params))
        if jax.default_backend() != "cpu" or max(ranks, default=0) < 3:
            return False
        text = self.jitted.lower(state, batch).as_text()
        return any(not IN_ORDER.match(layout) for layout in text.split("dim_numbers = ")[1:])

    def check(self, state: TrainState, batch: Any) -> None:
        """Refuse targets that do not fit, in one sentence, while their values can be seen.

        Targets on the host are read each time. Reading those on a device waits for them, so that only the first batch
        of each shape is; a bad label that comes later makes the loss NaN.
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"train_step: the batch must be a pair (x, y), got {check.describe(batch)}")
        x, y = batch
        kind = tuple(map(np.shape, jax.tree.leaves(batch)))
        if new := kind not in self._output_shapes:
            check_values(self.net, state.params, state.state, x)
            self._output_shapes[kind] = output_shape(self.net, state.params, state.state, x)
        if new or isinstance(y, np.ndarray):
            losses.check_targets(self.loss, self._output_shapes[kind], y)

    def _epoch(self, state: TrainState, data: Dataset, key: Any, batch_size: int) -> tuple[TrainState, Any]:
        n = data.y.shape[0]
        steps = n // batch_size

        def steps_of(state, data, key):
            order = shuffled(key, n)[: steps * batch_size].reshape(steps, batch_size)

            def body(state, index):
                batch = jax.tree.map(lambda a: a.at[index].get(mode="promise_in_bounds"), tuple(data))
                return self.pure(state, batch)

            return jax.lax.scan(body, state, order)

        return mapped.auto(steps_of, keep=True)(state, data, key)


IN_ORDER = re.compile(r"\[b, [\d, ]+, f\]x\[[\d, ]+, i, o\]->\[b, [\d, ]+, f\]")
METRICS = ("loss", "accuracy", "grad_norm", "grad_norm_clipped", "clip_fraction", "clip_removed", "update_ratio")


def train_step(
    net: Layer,
    loss: Callable[[Any, Any], Any],
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: Any = None,
    metrics: Sequence[str] = METRICS,
    per_layer: bool = False,
    per_example: str | None = None,
    max_norm: Any = None,
    axis_name: Any = None,
) -> TrainStep:
    """Compile `(state, batch) -> (state, metrics)`: gradient of the mean loss, clipping and update through optax.

    `batch` is a pair (x, y); `loss(outputs, y) -> float[batch]`. Metrics, float32[]: `loss`; `accuracy` where the loss
    has one; `grad_norm`, the global norm before clipping, and with a clip of `fnn.clip` in the optimiser
    `grad_norm_clipped`, `clip_fraction` (share of numbers, units or blocks; 0 or 1 for the global norm) and
    `clip_removed` = 1 - after/before; `update_ratio` = |update|/|params|. With `per_layer=True` also
    `grad_norms`, a tree like params (float[depth] below `repeat`) and, if the net has taps, `taps`: the new state and
    the gradient with respect to the old one, for `fnn.taps.read`. `metrics` names those to keep (`loss` always is):
    what is left out is not computed, and a few per cent of a step are spent on `update_ratio` and `accuracy`.

    `per_example="norms"` adds, from the same backward pass, the norms of single examples' gradients:
    `per_example_norms` float[batch], their five quartiles `per_example_quantiles`, and the unbiased `noise_trace` and
    `noise_signal` of this batch for `noise.scale`, with `per_layer` each by layer too. `per_example="clip"` also clips
    every example's gradient to `max_norm` before they are averaged, and reports `examples_clipped` and `clip_bias`, by
    how much that moved the mean. Under batch norm an example's gradient is that of its own path (`fnn.per_example`),
    and the noise scale takes groups (`noise.groups`). Under an outer `axis_name` norms are those of the local batch.

    `compute_dtype=jnp.bfloat16` casts the input, and so all layers; parameters, optimiser and statistics stay float32.

    With `axis_name` (under `vmap`, or `shard_map` with `check_vma` on or off) gradients and metrics are averaged over the
    mapped batch axis, and all that is computed is that of the whole batch on one device; but dropout draws other masks.
    All of it comes out the same on every device, except `per_example_norms` (and by layer), which are each device's own.
    Plain `jit` of a sharded batch needs no `axis_name`, on a mesh with automatic or explicit axes (`jax.make_mesh`).

    A batch that is not finite stays out of the running statistics if the step is skipped: where the gradient's norm is not
    finite and the optimiser's updates all are (`optax.apply_if_finite`, `zero_nans`), the net's state stays as it was.
    Where NaN passes on to the parameters, it does to the state.

    Guarantees: traced once for each batch shape; the state's buffers are donated (do not use the old state again); the
    same state and batch give the same result, bit for bit, on one device.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    for name in metrics:
        check.choice("train_step", METRICS, metrics=name)
    correct = losses.correct(loss) if "accuracy" in metrics else None
    check_step(per_example, max_norm)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        x, y = batch
        x = as_arrays(x)
        if compute_dtype is not None:
            x = jax.tree.map(lambda a: a.astype(compute_dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, x)
        key = jax.random.fold_in(state.key, state.step)

        def objective(params, net_state):
            outputs, new = net.apply(params, net_state, x, key=key, train=True, axis_name=axis_name)
            per_example = loss(outputs, y)
            if jnp.ndim(per_example) != 1:
                raise ValueError(f"train_step: the loss must return float[batch], got {check.describe(per_example)}")
            hits = {} if correct is None else {"accuracy": jnp.mean(correct(outputs, y))}
            mean = jnp.mean(per_example)
            return mean, (new, {"loss": mean} | hits)

        tapped, of_examples = per_layer and _has_taps(state.state), {}
        params = mapped.varying(state.params, axis_name)
        old = mapped.varying(state.state, axis_name) if tapped else state.state
        _check_sharding(axis_name, params, batch)
        if per_example is None:
            value_and_grad = jax.value_and_grad(objective, argnums=(0, 1) if tapped else 0, has_aux=True)
            (_, (new, values)), grads = value_and_grad(params, old)
            grads, values = mapped.mean((grads, values), axis_name)
        else:
            gradients = step_gradients(
                net, loss, correct, (x, y), key=key, axis_name=axis_name, max_norm=max_norm, per_layer=per_layer
            )
            grads, new, values, of_examples = gradients(*(((params, old), None) if tapped else (params, old)))
        grads, news = grads if tapped else (grads, None)
        new = mapped.replicated(new, state.state, axis_name) if tapped else new
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=values["loss"], grad=grads)
        params = optax.apply_updates(state.params, updates)
        # No care for squares out of range: an update below 1e-19 changes no parameter.
        size = tree.squared_norm(updates)
        ratio = jnp.sqrt(size) / jnp.sqrt(tree.squared_norm(state.params))
        grad_norm = tree.norm(grads)
        values |= {"grad_norm": grad_norm, "update_ratio": ratio}
        if clips := clip.reports(opt_state):
            before, after = clips[0].before, clips[-1].after
            values |= {
                "grad_norm_clipped": after,
                "clip_fraction": clips[-1].fraction,
                "clip_removed": 1 - after / jnp.where(before > 0, before, 1),
            }
        values = {name: v.astype(jnp.float32) for name, v in values.items() if name == "loss" or name in metrics}
        values |= of_examples
        if per_layer:
            values |= {"grad_norms": tree.norms(grads)} | ({"taps": (new, news)} if tapped else {})
        if jax.tree.leaves(new):
            skipped = ~jnp.isfinite(grad_norm) & jnp.isfinite(size)
            new = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), state.state, new)
        return TrainState(params, new, opt_state, state.key, state.step + 1), values

    return TrainStep(mapped.auto(step, keep=True), net, loss)


def evaluate(
    net: Layer,
    state: Any,
    data: Any,
    *,
    loss: Callable[[Any, Any], Any] = losses.cross_entropy,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Average the loss, and the accuracy where the loss has one, over all examples in eval mode.

    `state` is a `TrainState` or a pair (params, state). Every example counts once, whatever the batch size.
    """
    check.positive("evaluate", batch_size=batch_size)
    params, net_state = (state.params, state.state) if isinstance(state, TrainState) else state
    x, y = as_arrays(tuple(data))
    check_dataset("evaluate", x, y)
    check_values(net, params, net_state, x)
    losses.check_targets(loss, output_shape(net, params, net_state, x), y)
    totals = _means(net, loss, min(batch_size, y.shape[0]), params, net_state, x, y)
    return {name: float(value) for name, value in totals.items()}


def means(net: Layer, loss: Any, size: int, params: Any, state: Any, x: Any, y: Any) -> dict[str, jax.Array]:
    """Do the device's part of `evaluate`, `size` examples at a time; may be mapped by `vmap`."""
    n, correct = y.shape[0], losses.correct(loss)

    def values(xs, ys):
        outputs, _ = net.apply(params, state, xs)
        return {"loss": loss(outputs, ys)} | ({} if correct is None else {"accuracy": correct(outputs, ys)})

    def sums(start):
        # The last window starts early enough to be full; what it shares with the one before counts once.
        begin = jnp.minimum(start, n - size)
        xs, ys = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size), (x, y))
        fresh = begin + jnp.arange(size) >= start
        return {name: jnp.sum(jnp.where(fresh, value, 0)) for name, value in values(xs, ys).items()}

    if n <= size:
        return jax.tree.map(jnp.mean, values(x, y))
    totals = jax.lax.map(sums, jnp.arange(0, n, size))
    return jax.tree.map(lambda total: jnp.sum(total) / n, totals)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _means(net: Layer, loss: Any, size: int, *arrays: Any) -> dict[str, jax.Array]:
    return mapped.auto(functools.partial(means, net, loss, size))(*arrays)


def _check_sharding(axis_name: Any, params: Any, batch: Any) -> None:
    if jax.tree.leaves(params) and (loose := mapped.over(batch) - mapped.over(params)):
        raise ValueError(
            "train_step: axis_name must name every mesh axis over which the batch is sharded, or the devices' gradients "
            f"would be summed; got axis_name={axis_name!r} and a batch sharded over {sorted(map(str, loose))}"
        )


def _has_taps(state: Any) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TapState))
    return any(isinstance(node, TapState) for node in nodes)
