"""`fit`: whole stretches of training steps inside one `lax.scan`, and the curves that they leave."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, losses, mapped
from fnn.core import as_arrays, check_values, output_shape, same_spec
from fnn.dataset import Dataset, check_dataset, shuffled
from fnn.inputs import Masked
from fnn.train import TrainState, TrainStep, evaluate


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
        if not step.loops(state, _rows(data, jnp.arange(batch_size))):
            return lambda state, epoch: step.epoch(state, data, keys[epoch], batch_size)

        def one_by_one(state, epoch):
            order, records = shuffled(keys[epoch], n), []
            for start in range(0, n - batch_size + 1, batch_size):
                state, metrics = step.jitted(state, _rows(data, order[start : start + batch_size]))
                records.append(metrics)
            return state, jax.tree.map(lambda *values: np.stack(values), *jax.device_get(records))

        return one_by_one
    if not isinstance(train, Iterable):
        raise TypeError(f"fit: data must be a pair (x, y) or an iterable of batches, got {type(train).__name__}")
    if isinstance(train, Iterator) and epochs > 1:
        raise ValueError(
            f"fit: an iterator can be read once, got epochs={epochs}; pass an object whose iter() starts anew"
        )

    def run(state, epoch):
        records, scanned = [], None
        for chunk in _chunks(train, 32):
            for batch in chunk:
                step.check(state, batch)
            scanned = not step.loops(state, chunk[0]) if scanned is None else scanned
            if len(chunk) == 32 and scanned:
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


@jax.jit
def _rows(data: Dataset, index: jax.Array) -> tuple[Any, Any]:
    return mapped.auto(lambda data, index: jax.tree.map(lambda a: a[index], tuple(data)))(data, index)


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
