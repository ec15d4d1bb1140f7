"""Training: one compiled step, its state, and the average over a data set."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from fnn import admission, arrays, check, compiled, losses, mapped, measures, tree
from fnn.core import Layer, as_arrays, check_values, output_shape
from fnn.datasets.dataset import Data, check_dataset, in_memory
from fnn.layers.precision import compute_in
from fnn.layers.taps import TapState
from fnn.training import clip, reprs
from fnn.training.averages import check_evaluated
from fnn.training.examples import check_step, step_gradients
from fnn.training.extra import offered
from fnn.training.loss_scale import asked_scale, scaled, unscaled
from fnn.training.metrics import METRICS, Measured, averages, chosen, functions
from fnn.training.optimizers import per_depth
from fnn.training.stretches import over_data


@flax.struct.dataclass
class TrainState:
    """Hold all that a step carries: parameters, the states of net and optimiser, the key, the number of steps."""

    params: tree.PyTree
    net_state: tree.PyTree
    opt_state: tree.PyTree
    key: jax.Array
    step: jax.Array

    @classmethod
    def create(cls, net: Layer, optimizer: admission.Optimizer, key: jax.Array, spec: tree.PyTree) -> "TrainState":
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

    short_repr = True

    def __repr__(self) -> str:
        return reprs.of_state(self)


Pure = Callable[[TrainState, arrays.Batch], tuple[TrainState, dict[str, tree.PyTree]]]


class TrainStep:
    """Call `step(state, batch) -> (state, metrics)`: one jitted function that owns and reuses the state's buffers.

    Made by `train_step`. Under `lax.scan` or `vmap` it is part of that program; `step.pure` is the same without checks.
    `step.stretch(state, batches)` is that scan, compiled; `step.epoch` also shuffles and cuts the data (`stretches.over_data`).
    """

    def __init__(self, pure: Pure, net: Layer, measured: Measured, optimizer: optax.GradientTransformation):
        self.pure, self.net, self.loss, self.optimizer = pure, net, measured.loss, optimizer
        self.measured = Measured(measured.loss, measured.own)
        """The loss and the metrics of one's own: what `fit` validates by."""

        @functools.wraps(pure)
        def admitted(state, batch):  # traced for every new structure of states, and nothing afterwards
            self.admit(state, batch)
            return pure(state, batch)

        self.jitted = jax.jit(admitted, donate_argnums=0)
        self.epoch = over_data(pure)
        self.stretch = jax.jit(functools.partial(jax.lax.scan, pure), donate_argnums=0)
        self._output_shapes: dict[Any, Any] = {}
        self.placed: dict[Any, Any] = {}
        self.unfinished: tuple[TrainState, Any] | None = None
        """After a `fit` that was interrupted or failed: (state, history) of what it had finished."""
        self.recording: Any = None
        """After `fit(..., recorder=K)`: its last steps, or those around its highest spike, for `fnn.replay`."""
        self.given: dict[str, Any] = {}
        """The arguments of `train_step`."""

    def __call__(self, state: TrainState, batch: arrays.Batch) -> tuple[TrainState, dict[str, tree.PyTree]]:
        batch = self.check(state, batch)
        if compiled.traced((state.step, batch)):  # a part of another program, which must not free what it is given
            self.admit(state, batch)
            return self.pure(state, batch)
        with check.donated_once("train_step"):
            return self.jitted(state, batch)

    def admit(self, state: TrainState, batch: arrays.Batch) -> None:
        """Refuse a state of another net or optimiser, and batches without examples. Reads no values."""
        admission.examples("train_step", batch)
        check.parameters("train_step", state.params)
        admission.state("train_step", self.net, state.params, state.net_state, batch[0])
        admission.optimizer_state_of("train_step", self.optimizer, state.params, state.opt_state)

    def lower(self, state: TrainState, batch: arrays.Batch) -> jax.stages.Lowered:
        """Lower without running, to look at the HLO and `memory_analysis()`."""
        return self.jitted.lower(state, batch)

    def check(self, state: TrainState, batch: arrays.Batch) -> tuple[tree.PyTree, tree.PyTree]:
        """Turn a batch into arrays, and refuse one that does not fit while its values can still be read.

        Targets on the host are checked each time. Reading targets on a device would wait for it: of these only the first
        batch of each shape is checked, and a bad label that comes later makes the loss NaN.
        """
        check_state("train_step", state)
        x, y = batch = arrays.pair("train_step: the batch", batch)
        kind = jax.tree.structure(batch), *[leaf.shape for leaf in jax.tree.leaves(batch)]
        shape = self._output_shapes.get(kind)
        if new := shape is None:
            self.admit(state, batch)  # before anything is traced with this state, which may be another net's
            check_values(self.net, state.params, state.net_state, x)
            shape = output_shape(self.net, state.params, state.net_state, x)
            if not compiled.traced(batch):  # whose labels cannot be read, so that the next batch is still the first
                self._output_shapes[kind] = shape
        if new or type(y) is np.ndarray or all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(y)):
            losses.check_targets(self.loss, shape, y)
        return batch


def train_step(
    net: Layer,
    loss: losses.ExampleFunction,
    optimizer: admission.Optimizer,
    *,
    penalty: Callable[[tree.PyTree], ArrayLike] | None = None,
    compute_dtype: DTypeLike | None = None,
    metrics: Sequence[str | measures.OwnMetrics] | measures.OwnMetrics = METRICS,
    per_layer: bool = False,
    per_example: str | None = None,
    max_norm: ArrayLike | None = None,
    skip_nonfinite: bool = False,
    axis_name: mapped.AxisName = None,
) -> TrainStep:
    """Compile `(state, batch) -> (state, metrics)`: gradient of the mean loss, clipping and update through optax.

    `batch` is a pair (x, y), or (x, y, weights) with weights float[batch]; `loss(outputs, y) -> float[batch]`. Outputs and
    targets may be trees. The mean is sum(w l) / sum(w), and sum(sums) / sum(counts) for a loss that returns
    `losses.Counted`; 0/0 is NaN. Accuracy and metrics of your own are averaged alike. Batch norm sees no weights. The
    keywords are many because each adds one thing to the step by itself, and all have a default.

    `penalty(params) -> float[]` is added to the mean loss, its gradient to the mean loss's after any clipping of single
    examples. Metrics then hold `penalty`; `loss` is without it, as in `evaluate`. The optimiser gets their sum as `value`.

    Metrics, float32[] (float64 where the net computes in it): `loss`; `accuracy` where the loss has one; `grad_norm`, the
    global norm before clipping; `update_ratio` = |update|/|params|. Norms are right at any scale. With a clip of
    `fnn.clip` in the optimiser also `grad_norm_clipped`, `clip_fraction` (share of numbers, units or blocks; 0 or 1 for
    the global norm) and `clip_removed` = 1 - after/before (0 for a zero gradient), NaN in a step that the optimiser skips
    or only accumulates (`apply_if_finite`, `MultiSteps`); several clips are reported as one (`clip.summary`).
    `metrics` names those to keep (`loss` always is): the others are not computed; `update_ratio` and `accuracy` take a
    few per cent of a step. Your own come as a dict beside them all, `metrics={"top5": f}`, or inside the list: functions
    `(outputs, y) -> float[batch]` (of one batch's outputs, as they are in training), or a `losses.Metric`. With
    `per_layer=True` also `grad_norms`, a tree like params (float[depth] below `repeat`) and, if the net has taps, `taps`:
    the new state and the gradient with respect to the old one, for `fnn.taps.read`.

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

    A batch whose gradient has no finite norm stays out of the running statistics: the net's state is kept, whether the
    optimiser skips the step (`optax.apply_if_finite`, `zero_nans`) or not.

    Guarantees: traced once for each batch shape; the same state and batch give the same result, on one CPU bit for bit.
    On a GPU XLA adds up embeddings' gradients in any order and chooses kernels by timing them, so that last bits differ
    between calls or processes; `XLA_FLAGS=--xla_gpu_deterministic_ops=true` forbids both. The state's buffers are donated: do not
    use the old state again.
    """
    given = dict(locals())
    admission.net("train_step", net)
    admission.loss("train_step", loss)
    admission.optimizer("train_step", optimizer)
    net = compute_in(net, compute_dtype)
    optimizer = per_depth(optimizer)
    names, own = chosen("train_step", metrics)
    measured = Measured(loss, own, "accuracy" in names)
    check_step(per_example, max_norm, skip_nonfinite)

    def step(state: TrainState, batch: arrays.Batch) -> tuple[TrainState, dict[str, tree.PyTree]]:
        x, y = arrays.weighted(batch)
        x = as_arrays(x)
        key = jax.random.fold_in(state.key, state.step)

        def objective(params, net_state):
            with check.foreign("train_step"):
                outputs, new = net.apply(params, net_state, x, key=key, train=True, axis_name=axis_name)
                shares = measures.shares("train_step", loss, outputs, y, axis_name)
            return shares["loss"], (new, shares, outputs)

        tapped, of_examples = per_layer and _has_taps(state.net_state), {}
        params = mapped.varying(state.params, axis_name)
        old = mapped.varying(state.net_state, axis_name) if tapped else state.net_state
        _check_sharding(axis_name, params, batch)
        scale = asked_scale(state.opt_state, per_example)
        if per_example is None:
            value_and_grad = jax.value_and_grad(scaled(objective, scale), argnums=(0, 1) if tapped else 0, has_aux=True)
            (_, (new, values, outputs)), grads = value_and_grad(params, old)
            grads, values = mapped.mean((unscaled(grads, scale), values), axis_name)
        else:
            options: dict[str, Any] = {"axis_name": axis_name, "max_norm": max_norm, "skip_nonfinite": skip_nonfinite}
            gradients = step_gradients(net, loss, (x, y), key=key, per_layer=per_layer, **options)
            grads, new, (values, outputs), of_examples = gradients(
                *(((params, old), None) if tapped else (params, old))
            )
        grads, news = grads if tapped else (grads, None)
        new = mapped.replicated(new, state.net_state, axis_name) if tapped else new
        others = (*values, *of_examples, "penalty", "grad_norms", "taps")
        values |= measured.values("train_step", outputs, y, axis_name, others)
        objective_value, penalized = values["loss"], None if penalty is None else admission.penalty(penalty)
        if penalized is not None:
            values["penalty"], slope = jax.value_and_grad(penalized)(state.params)
            grads = jax.tree.map(jnp.add, grads, slope)
            objective_value += values["penalty"]
        loss_fn = mapped.averaged(lambda params: objective(params, state.net_state)[0], axis_name)

        def value_fn(params):
            return loss_fn(params) if penalized is None else loss_fn(params) + penalized(params)

        def grad_fn(params):
            own = mapped.varying(params, axis_name)
            if per_example == "clip":
                found = gradients(own, state.net_state)[0]
            else:
                found, _ = jax.grad(scaled(objective, scale), has_aux=True)(own, state.net_state)
                found = mapped.mean(unscaled(found, scale), axis_name)
            return found if penalized is None else jax.tree.map(jnp.add, found, jax.grad(penalized)(params))

        before = clip.unreported(state.opt_state)
        extra = offered(objective_value, grads, value_fn, grad_fn, clipped=per_example == "clip")
        updates, opt_state = admission.update("train_step", optimizer, grads, before, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        grad_norm = tree.norm(grads)
        values |= {"grad_norm": grad_norm, "update_ratio": tree.norm(updates) / tree.norm(state.params)}
        values |= clipped(opt_state, grads)
        kept = {name: v for name, v in values.items() if name not in METRICS or name == "loss" or name in names}
        values = {name: v.astype(tree.statistics_dtype(v.dtype)) for name, v in kept.items()}
        values |= of_examples
        if per_layer:
            values |= {"grad_norms": tree.norms(grads)} | ({"taps": (new, news)} if tapped else {})
        if jax.tree.leaves(new):
            finite = jnp.isfinite(grad_norm)
            new = jax.tree.map(lambda a, b: jnp.where(finite, b, a), state.net_state, new)
        return TrainState(params, new, opt_state, state.key, state.step + 1), values

    made = TrainStep(mapped.auto(step, keep=True), net, measured, optimizer)
    made.given = given
    return made


def clipped(opt_state: tree.PyTree, grads: tree.PyTree) -> dict[str, jax.Array]:
    """Name what the optimiser's clips report of a step; nothing without a clip of `fnn.clip`."""
    report = clip.summary(opt_state, grads)
    if report is None:
        return {}
    removed = 1 - report.after / jnp.where(report.before == 0, 1, report.before)
    return {
        "grad_norm_clipped": report.after,
        "clip_fraction": report.fraction,
        "clip_removed": jnp.where(report.before == 0, 0, removed),
    }


def evaluate(
    net: Layer,
    state: tree.PyTree,
    data: Data,
    *,
    loss: losses.ExampleFunction = losses.cross_entropy,
    batch_size: int = 1024,
    compute_dtype: DTypeLike | None = None,
    metrics: measures.OwnMetrics | None = None,
) -> dict[str, float]:
    """Average the loss, the accuracy where the loss has one, and metrics of your own, over all examples in eval mode.

    `state` is a `TrainState` or a pair (params, state). `data` is a pair (x, y), or (x, y, weights), or an iterable of
    such batches (a DataLoader), which are joined in memory. Every example counts once, whatever the batch size.
    `compute_dtype` is that of `train_step`: pass the same for the same computation. `metrics` are functions by name, as in
    `train_step`; a `losses.Metric` is computed from sums over all examples. The arguments are many because all but three
    have a default. Equal nets share one compiled program (`fnn/compiled.py`).
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
    measured = Measured(loss, functions("evaluate", metrics or {}))
    return averages(net, params, net_state, (x, y), measured, batch_size)


def check_state(who: str, state: Any) -> None:
    """Refuse what is no `TrainState`, and one whose buffers a step has reused: its counter shows it for all arrays."""
    if not isinstance(state, TrainState):
        got = arrays.brief(state)
        raise TypeError(f"{who}: state must be a TrainState, got {got}; make one with TrainState.create")
    check.alive(who, state.step)


def _check_sharding(axis_name: mapped.AxisName, params: tree.PyTree, batch: arrays.Batch) -> None:
    if jax.tree.leaves(params) and (loose := mapped.over(batch) - mapped.over(params)):
        raise ValueError(
            "train_step: axis_name must name every mesh axis over which the batch is sharded, or the devices' gradients "
            f"would be summed; got axis_name={axis_name!r} and a batch sharded over {sorted(map(str, loose))}"
        )


def _has_taps(state: Any) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TapState))
    return any(isinstance(node, TapState) for node in nodes)
