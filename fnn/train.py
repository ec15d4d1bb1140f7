"""Training: one compiled step, and `fit`, which runs whole stretches of steps inside one `lax.scan`."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import check, clip, losses, tree
from fnn.core import Layer, as_arrays, as_spec, check_values, output_shape, same_spec
from fnn.dataset import Dataset, check_dataset, shuffled
from fnn.inputs import Masked
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
        self._check(state, batch)
        return self.jitted(state, batch)

    def lower(self, state: TrainState, batch: Any) -> Any:
        """Lower without running, to look at the HLO and `memory_analysis()`."""
        return self.jitted.lower(state, batch)

    def _check(self, state: TrainState, batch: Any) -> None:
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
        order = shuffled(key, n)[: steps * batch_size].reshape(steps, batch_size)

        def body(state, index):
            batch = jax.tree.map(lambda a: a.at[index].get(mode="promise_in_bounds"), tuple(data))
            return self.pure(state, batch)

        return jax.lax.scan(body, state, order)


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
    With `axis_name` (under `vmap` or `shard_map`) gradients and metrics are averaged over the mapped batch axis.

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
        if per_example is None:
            value_and_grad = jax.value_and_grad(objective, argnums=(0, 1) if tapped else 0, has_aux=True)
            (_, (net_state, values)), grads = value_and_grad(state.params, state.state)
            if axis_name is not None:
                grads, values = jax.lax.pmean((grads, values), axis_name)
        else:
            gradients = step_gradients(
                net, loss, correct, (x, y), key=key, axis_name=axis_name, max_norm=max_norm, per_layer=per_layer
            )
            both = (state.params, state.state)
            grads, net_state, values, of_examples = gradients(*((both, None) if tapped else both))
        grads, news = grads if tapped else (grads, None)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=values["loss"], grad=grads)
        params = optax.apply_updates(state.params, updates)
        # No care for squares out of range: an update below 1e-19 changes no parameter.
        ratio = jnp.sqrt(tree.squared_norm(updates)) / jnp.sqrt(tree.squared_norm(state.params))
        values |= {"grad_norm": tree.norm(grads), "update_ratio": ratio}
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
            values |= {"grad_norms": tree.norms(grads)} | ({"taps": (net_state, news)} if tapped else {})
        return TrainState(params, net_state, opt_state, state.key, state.step + 1), values

    return TrainStep(step, net, loss)


@dataclass(frozen=True)
class History:
    """What `fit` recorded, as NumPy arrays."""

    train: dict[str, Any]
    """Metrics of every step, each with a leading axis of steps."""
    validation: dict[str, np.ndarray]
    """`loss` (and `accuracy`) after every epoch, float[epochs]; empty without validation data."""
    steps_per_epoch: tuple[int, ...]
    best_epoch: int | None
    """Index of the epoch with the lowest validation loss."""
    stopped_early: bool

    def by_epoch(self, name: str) -> np.ndarray:
        """Average a metric of the training steps over each epoch, to lay beside `validation`."""
        ends = np.cumsum(self.steps_per_epoch)
        return np.array([np.mean(part) for part in np.split(np.asarray(self.train[name]), ends[:-1])])


def fit(
    step: TrainStep,
    state: TrainState,
    train: Any,
    *,
    epochs: int,
    key: Any = None,
    batch_size: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    progress: bool | None = None,
) -> tuple[TrainState, History]:
    """Train for some epochs, each one `lax.scan` on the device; return the new state and the curves.

    `train` is a pair (x, y), such as a `data.Dataset`: it is moved to the device once and reshuffled each epoch by
    `key`; a last partial batch is dropped. Or it is an iterable of batches (x, y) on the host, for data larger than
    memory: it is read anew each epoch, 32 batches at a time. `validation` is a pair too, evaluated after each epoch;
    with `patience=k` training stops once its loss has not fallen for k epochs, and the best epoch's state is returned.

    `progress` shows a bar with loss and validation accuracy (plain lines where the output is no terminal); by default
    it does so on a terminal alone. The state passed in stays usable.

    Errors: ValueError for NaN in the data, labels out of range, a batch larger than the data, an iterator that cannot
    be read again. Same key, same data, same state: same result, bit for bit, on one device.
    """
    check.positive("fit", epochs=epochs)
    if patience is not None:
        check.positive("fit", patience=patience)
        if validation is None:
            raise ValueError("fit: patience needs validation data, got validation=None; pass a pair (x, y)")
    run_epoch = _epochs(step, state, train, key, batch_size, epochs)
    if validation is not None:
        validation = _dataset("fit: validation", step, state, validation)
    state = jax.tree.map(jnp.copy, state)  # the steps donate their state; the caller's is not ours to give away
    records, curves, lengths = [], [], []
    best, best_loss, best_epoch, stopped = state, np.inf, None, False
    with _Progress(epochs, progress) as bar:
        for epoch in range(epochs):
            state, metrics = run_epoch(state, epoch)
            metrics = jax.device_get(metrics)
            records.append(metrics)
            lengths.append(len(metrics["loss"]))
            shown = {"loss": float(np.mean(metrics["loss"]))}
            if validation is not None:
                curves.append(evaluate(step.net, state, validation, loss=step.loss))
                shown |= {f"validation {name}": value for name, value in curves[-1].items()}
                if curves[-1]["loss"] < best_loss:
                    best_loss, best_epoch = curves[-1]["loss"], epoch
                    if patience is not None:
                        best = jax.tree.map(jnp.copy, state)
            bar.update(epoch + 1, shown)
            if patience is not None and epoch - (-1 if best_epoch is None else best_epoch) >= patience:
                stopped = True
                break
    history = History(
        jax.tree.map(lambda *parts: np.concatenate(parts), *records),
        {name: np.array([c[name] for c in curves]) for name in curves[0]} if curves else {},
        tuple(lengths),
        best_epoch,
        stopped,
    )
    return (best if patience is not None and best_epoch is not None else state), history


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


_means = jax.jit(means, static_argnums=(0, 1, 2))


def _epochs(
    step: TrainStep, state: TrainState, train: Any, key: Any, batch_size: int | None, epochs: int
) -> Callable[[TrainState, int], tuple[TrainState, Any]]:
    """Return `(state, epoch) -> (state, metrics of its steps)` for data in memory or for an iterable of batches."""
    if (
        isinstance(train, tuple)
        and len(train) == 2
        and (hasattr(train[0], "shape") or isinstance(train[0], Masked | dict))
    ):
        if key is None or batch_size is None:
            raise ValueError("fit: data in memory needs key= and batch_size=, to be shuffled and cut into batches")
        data = _dataset("fit", step, state, train)
        check.positive("fit", batch_size=batch_size)
        n = data.size
        if batch_size > n:
            raise ValueError(f"fit: batch_size must be at most the {n} examples of the data, got {batch_size}")
        keys = jax.random.split(key, epochs)
        return lambda state, epoch: step.epoch(state, data, keys[epoch], batch_size)
    if not isinstance(train, Iterable):
        raise TypeError(f"fit: data must be a pair (x, y) or an iterable of batches, got {type(train).__name__}")
    if isinstance(train, Iterator) and epochs > 1:
        raise ValueError(
            f"fit: an iterator can be read once, got epochs={epochs}; pass an object whose iter() starts anew"
        )

    def run(state, epoch):
        records = []
        for chunk in _chunks(train, 32):
            for batch in chunk:
                step._check(state, batch)
            if len(chunk) == 32:
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chunk)
                state, metrics = step.stretch(state, stacked)
                records.append(metrics)
            else:
                for batch in chunk:
                    state, metrics = step.jitted(state, batch)
                    records.append(jax.tree.map(lambda m: m[None], metrics))
        if not records:
            raise ValueError(f"fit: the iterable of batches must not be empty, got none in epoch {epoch}")
        return state, jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(records))

    return run


def _chunks(batches: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Group batches of one shape, `most` at a time; a change of shape ends a group."""
    chunk: list[Any] = []
    for batch in batches:
        if chunk and (len(chunk) == most or not same_spec(batch, chunk[0])):
            yield chunk
            chunk = []
        chunk.append(batch)
    if chunk:
        yield chunk


def _dataset(who: str, step: TrainStep, state: TrainState, pair: Any) -> Dataset:
    data = Dataset(*as_arrays(tuple(pair)))
    check_dataset(who, data.x, data.y)
    check_values(step.net, state.params, state.state, data.x)
    losses.check_targets(step.loss, output_shape(step.net, state.params, state.state, data.x), data.y)
    return data


def _has_taps(state: Any) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TapState))
    return any(isinstance(node, TapState) for node in nodes)


class _Progress:
    """A bar of epochs: rich's on a terminal where it is installed, else plain lines, else nothing."""

    def __init__(self, total: int, show: bool | None):
        self.total, self.bar = total, None
        terminal = sys.stderr.isatty()
        self.show = terminal if show is None else show
        if self.show and terminal:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(TextColumn("epoch"), *columns, console=Console(stderr=True))
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "_Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def update(self, done: int, values: dict[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=text)
        elif self.show:
            print(f"epoch {done}/{self.total}  {text}", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
