"""Training: one compiled step, its state, and the average over a data set."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import admission, arrays, check, compiled, losses, mapped, tree
from fnn.core import Layer, as_arrays, check_values, output_shape
from fnn.datasets.dataset import Dataset, check_dataset, in_memory, shuffled
from fnn.layers.precision import compute_in
from fnn.layers.taps import TapState
from fnn.training import clip
from fnn.training.averages import check_evaluated
from fnn.training.examples import check_step, step_gradients
from fnn.training.extra import offered
from fnn.training.loss_scale import scale_of, scaled, unscaled
from fnn.training.optimizers import per_depth


@flax.struct.dataclass
class TrainState:
    """Hold all that a step carries: parameters, the states of net and optimiser, the key, the number of steps."""

    params: Any
    net_state: Any
    opt_state: Any
    key: Any
    step: Any

    @classmethod
    def create(cls, net: Layer, optimizer: optax.GradientTransformation, key: Any, spec: Any) -> "TrainState":
        """Initialise a net and its optimiser; `spec` is an example batch, or its `jax.ShapeDtypeStruct`."""
        who = "TrainState.create"
        admission.net(who, net)
        admission.optimizer(who, optimizer)
        check.prng_key(who, key)
        spec = admission.example(who, spec)
        # Not under jit: one program for all the draws takes longer to compile than each of them does, and the draws
        # are kept for the next net with arrays of the same shapes.
        init_key, train_key = jax.random.split(key)
        params, state = net.init(init_key, spec)
        check.parameters(who, params)
        admission.made(net, params, state)
        opt_state = per_depth(optimizer).init(params)
        admission.optimizer_state(who, opt_state)
        created = cls(params, state, opt_state, train_key, jnp.zeros((), jnp.int32))
        return jax.tree.map(jnp.copy, created)  # an array that two leaves share could not be donated


class TrainStep:
    """Call `step(state, batch) -> (state, metrics)`: one jitted function that owns and reuses the state's buffers.

    Made by `train_step`. `step.pure` is the same function before `jit`; it fits `lax.scan`. `step.stretch(state, batches)`
    is that scan, compiled; `step.epoch` also shuffles and cuts the data.
    """

    def __init__(self, pure: Callable[..., Any], net: Layer, loss: Callable[..., Any], optimizer: Any):
        self.pure, self.net, self.loss, self.optimizer = pure, net, loss, optimizer

        @functools.wraps(pure)
        def admitted(state, batch):  # traced for every new structure of states, and nothing afterwards
            self.admit(state, batch)
            return pure(state, batch)

        self.jitted = jax.jit(admitted, donate_argnums=0)
        self.epoch = jax.jit(self._epoch, donate_argnums=0, static_argnums=3)
        self.stretch = jax.jit(functools.partial(jax.lax.scan, pure), donate_argnums=0)
        self._output_shapes: dict[Any, tuple[int, ...]] = {}
        self.unfinished: tuple[TrainState, Any] | None = None
        """After a `fit` that was interrupted or failed: (state, history) of what it had finished."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        return self.jitted(state, self.check(state, batch))

    def admit(self, state: Any, batch: Any) -> None:
        """Refuse a state of another net or optimiser, and batches without examples. Reads no values."""
        admission.examples("train_step", batch)
        check.parameters("train_step", state.params)
        admission.state("train_step", self.net, state.params, state.net_state, batch[0])
        admission.optimizer_state_of("train_step", self.optimizer, state.params, state.opt_state)

    def lower(self, state: TrainState, batch: Any) -> Any:
        """Lower without running, to look at the HLO and `memory_analysis()`."""
        return self.jitted.lower(state, batch)

    def check(self, state: TrainState, batch: Any) -> tuple[Any, Any]:
        """Turn a batch into arrays, and refuse one that does not fit while its values can still be read.

        Targets on the host are checked each time. Reading targets on a device would wait for it: of these only the first
        batch of each shape is checked, and a bad label that comes later makes the loss NaN.
        """
        check_state("train_step", state)
        x, y = batch = arrays.pair("train_step: the batch", batch)
        kind = tuple(map(np.shape, jax.tree.leaves(batch)))
        if new := kind not in self._output_shapes:
            self.admit(state, batch)  # before anything is traced with this state, which may be another net's
            check_values(self.net, state.params, state.net_state, x)
            self._output_shapes[kind] = output_shape(self.net, state.params, state.net_state, x)
        if new or isinstance(y, np.ndarray):
            losses.check_targets(self.loss, self._output_shapes[kind], y)
        return batch

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


CLIPPING = ("grad_norm_clipped", "clip_fraction", "clip_removed")
METRICS = ("loss", "accuracy", "grad_norm", *CLIPPING, "update_ratio")


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
    skip_nonfinite: bool = False,
    axis_name: Any = None,
) -> TrainStep:
    """Compile `(state, batch) -> (state, metrics)`: gradient of the mean loss, clipping and update through optax.

    `batch` is a pair (x, y); `loss(outputs, y) -> float[batch]`. The keywords are many because each adds one thing to the
    step by itself, and all have a default.

    Metrics, float32[] (float64 where the net computes in it): `loss`; `accuracy` where the loss has one; `grad_norm`, the
    global norm before clipping; `update_ratio` = |update|/|params|. Norms are right at any scale. With a clip of
    `fnn.clip` in the optimiser also `grad_norm_clipped`, `clip_fraction` (share of numbers, units or blocks; 0 or 1 for
    the global norm) and `clip_removed` = 1 - after/before (0 for a zero gradient), NaN in a step that the optimiser skips
    or only accumulates (`apply_if_finite`, `MultiSteps`); several clips are reported as one (`clip.summary`).
    `metrics` names those to keep (`loss` always is): the others are not computed; `update_ratio` and `accuracy` take a
    few per cent of a step. With `per_layer=True` also `grad_norms`, a tree like params (float[depth] below `repeat`) and,
    if the net has taps, `taps`: the new state and the gradient with respect to the old one, for `fnn.taps.read`.

    `per_example="norms"` adds, from the same backward pass, the norms of single examples' gradients:
    `per_example_norms` float[batch], their five quartiles `per_example_quantiles`, and the unbiased `noise_trace` and
    `noise_signal` of this batch for `noise.scale`, with `per_layer` each by layer too. These two are squares: 0 or inf
    for norms outside 1e±19; their ratio `signal_to_noise` is right there too. `examples_nonfinite` counts gradients
    without a finite norm, `examples_zero` those that are zero. `per_example="clip"` also clips every example's gradient to
    `max_norm` before they are averaged, and reports `examples_clipped` and `clip_bias`, by how much that moved the mean.
    An example without a finite norm makes the gradient NaN; with `skip_nonfinite=True` it counts as zero. Under batch norm
    an example's gradient is that of its own path (`fnn.per_example`), and the noise scale takes groups (`noise.groups`).
    Under an outer `axis_name` norms are those of the local batch.

    The optimiser sees each block of `repeat` as arrays of its own (`per_depth`): depth as a loop and depth written out
    train alike. It is offered the loss again (`extra.offered`), with the same batch, dropout and state: line searches,
    `lbfgs`, sophia, and SAM with `opaque_mode=True` work. With `MultiSteps` a step's metrics are those of its own batch.

    `compute_dtype=jnp.bfloat16` lets all layers compute in it (`compute_in`), also those after an embedding; parameters,
    optimiser, statistics and loss stay float32. float16 needs `optimizers.loss_scaled`. `step.net` is that net: `fit`
    validates as it trains.

    With `axis_name` (under `vmap`, or `shard_map` with `check_vma` on or off) gradients and metrics are averaged over the
    mapped batch axis. Every number is that of the whole batch on one device, except that dropout draws other masks, and
    equal on all devices, except `per_example_norms` (and by layer), which are each device's own.
    Plain `jit` of a sharded batch needs no `axis_name`, on a mesh with automatic or explicit axes (`jax.make_mesh`).

    A batch that is not finite stays out of the running statistics if the optimiser skips the step: the net's state is
    kept where the gradient's norm is not finite and all updates are (`optax.apply_if_finite`, `zero_nans`). Where NaN
    reaches the parameters, it reaches the state too.

    Guarantees: traced once for each batch shape; the same state and batch give the same result, on one CPU bit for bit.
    On a GPU XLA adds up embeddings' gradients in any order and chooses kernels by timing them, so that last bits differ
    between calls or processes; `XLA_FLAGS=--xla_gpu_deterministic_ops=true` forbids both. The state's buffers are donated: do not
    use the old state again.
    """
    admission.net("train_step", net)
    admission.loss("train_step", loss)
    admission.optimizer("train_step", optimizer)
    net = compute_in(net, compute_dtype)
    optimizer = per_depth(optimizer)
    for name in metrics:
        check.choice("train_step", METRICS, metrics=name)
    correct = losses.correct(loss) if "accuracy" in metrics else None
    check_step(per_example, max_norm, skip_nonfinite)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        x, y = batch
        x = as_arrays(x)
        key = jax.random.fold_in(state.key, state.step)

        def objective(params, net_state):
            with check.foreign("train_step"):
                outputs, new = net.apply(params, net_state, x, key=key, train=True, axis_name=axis_name)
                per_example = admission.values("train_step", loss, outputs, y)
            hits = {} if correct is None else {"accuracy": jnp.mean(correct(outputs, y))}
            mean = jnp.mean(per_example)
            return mean, (new, {"loss": mean} | hits)

        tapped, of_examples = per_layer and _has_taps(state.net_state), {}
        params = mapped.varying(state.params, axis_name)
        old = mapped.varying(state.net_state, axis_name) if tapped else state.net_state
        _check_sharding(axis_name, params, batch)
        scale = scale_of(state.opt_state, per_example)
        if per_example is None:
            value_and_grad = jax.value_and_grad(scaled(objective, scale), argnums=(0, 1) if tapped else 0, has_aux=True)
            (_, (new, values)), grads = value_and_grad(params, old)
            grads, values = mapped.mean((unscaled(grads, scale), values), axis_name)
        else:
            gradients = step_gradients(
                net,
                loss,
                correct,
                (x, y),
                key=key,
                axis_name=axis_name,
                max_norm=max_norm,
                skip_nonfinite=skip_nonfinite,
                per_layer=per_layer,
            )
            grads, new, values, of_examples = gradients(*(((params, old), None) if tapped else (params, old)))
        grads, news = grads if tapped else (grads, None)
        new = mapped.replicated(new, state.net_state, axis_name) if tapped else new
        value_fn = mapped.averaged(lambda params: objective(params, state.net_state)[0], axis_name)

        def grad_fn(params):
            params = mapped.varying(params, axis_name)
            if per_example == "clip":
                return gradients(params, state.net_state)[0]
            found, _ = jax.grad(scaled(objective, scale), has_aux=True)(params, state.net_state)
            return mapped.mean(unscaled(found, scale), axis_name)

        before = clip.unreported(state.opt_state)
        extra = offered(values["loss"], grads, value_fn, grad_fn, clipped=per_example == "clip")
        updates, opt_state = admission.update("train_step", optimizer, grads, before, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        size, grad_norm = tree.norm(updates), tree.norm(grads)
        values |= {"grad_norm": grad_norm, "update_ratio": size / tree.norm(state.params)}
        if (report := clip.summary(opt_state, grads)) is not None:
            removed = 1 - report.after / jnp.where(report.before == 0, 1, report.before)
            values |= {
                "grad_norm_clipped": report.after,
                "clip_fraction": report.fraction,
                "clip_removed": jnp.where(report.before == 0, 0, removed),
            }
        kept = {name: v for name, v in values.items() if name == "loss" or name in metrics}
        values = {name: v.astype(tree.statistics_dtype(v.dtype)) for name, v in kept.items()}
        values |= of_examples
        if per_layer:
            values |= {"grad_norms": tree.norms(grads)} | ({"taps": (new, news)} if tapped else {})
        if jax.tree.leaves(new):
            skipped = ~jnp.isfinite(grad_norm) & jnp.isfinite(size)
            new = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), state.net_state, new)
        return TrainState(params, new, opt_state, state.key, state.step + 1), values

    return TrainStep(mapped.auto(step, keep=True), net, loss, optimizer)


def evaluate(
    net: Layer,
    state: Any,
    data: Any,
    *,
    loss: Callable[[Any, Any], Any] = losses.cross_entropy,
    batch_size: int = 1024,
    compute_dtype: Any = None,
) -> dict[str, float]:
    """Average the loss, and the accuracy where the loss has one, over all examples in eval mode.

    `state` is a `TrainState` or a pair (params, state). `data` is a pair (x, y), or an iterable of such batches (a
    DataLoader), which are joined in memory. Every example counts once, whatever the batch size. `compute_dtype` is that
    of `train_step`: pass the same for the same computation. Equal nets share one compiled program (`fnn/compiled.py`).
    """
    check.positive("evaluate", batch_size=batch_size)
    admission.net("evaluate", net)
    admission.loss("evaluate", loss)
    net = compute_in(net, compute_dtype)
    params, net_state = admission.parts("evaluate", state)
    check_evaluated("evaluate", getattr(state, "opt_state", ()), "(fnn.optimizers.eval_params(state), state.net_state)")
    x, y = as_arrays(tuple(in_memory("evaluate", data)))
    check_dataset("evaluate", x, y)
    check.parameters("evaluate", params, trained=False)
    admission.state("evaluate", net, params, net_state, x)
    check_values(net, params, net_state, x)
    losses.check_targets(loss, output_shape(net, params, net_state, x), y)
    return averages(net, params, net_state, (x, y), loss, batch_size)


def averages(net: Layer, params: Any, state: Any, data: Any, loss: Any, batch_size: int = 1024) -> dict[str, float]:
    """Do `evaluate` for data that were checked before."""
    x, y = data
    totals = compiled.call(means, (net, loss, min(int(batch_size), y.shape[0])), params, state, x, y)
    return {name: float(value) for name, value in totals.items()}


def means(net: Layer, loss: Any, size: int, params: Any, state: Any, x: Any, y: Any) -> dict[str, jax.Array]:
    """Do the part of `evaluate` that runs on the device, `size` examples at a time; works under `vmap`, and so takes
    each array as an argument."""
    n, correct = y.shape[0], losses.correct(loss)

    def values(xs, ys):
        outputs, _ = net.apply(params, state, xs)
        return {"loss": admission.values("evaluate", loss, outputs, ys)} | (
            {} if correct is None else {"accuracy": correct(outputs, ys)}
        )

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


def check_state(who: str, state: Any) -> None:
    """Refuse what is no `TrainState`, and one whose buffers a step has reused: its counter shows it for all arrays."""
    if not isinstance(state, TrainState):
        got = arrays.brief(state)
        raise TypeError(f"{who}: state must be a TrainState, got {got}; make one with TrainState.create")
    if isinstance(state.step, jax.Array) and state.step.is_deleted():
        check.alive(who, state.step)


def _check_sharding(axis_name: Any, params: Any, batch: Any) -> None:
    if jax.tree.leaves(params) and (loose := mapped.over(batch) - mapped.over(params)):
        raise ValueError(
            "train_step: axis_name must name every mesh axis over which the batch is sharded, or the devices' gradients "
            f"would be summed; got axis_name={axis_name!r} and a batch sharded over {sorted(map(str, loose))}"
        )


def _has_taps(state: Any) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TapState))
    return any(isinstance(node, TapState) for node in nodes)
