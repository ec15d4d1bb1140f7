"""`fit`: epochs of training steps, each epoch one `lax.scan`, and the curves of a run."""

import contextlib
import numbers
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import admission, check, losses, mapped
from fnn.core import as_arrays, check_values, output_shape, same_spec
from fnn.datasets.dataset import (
    Dataset,
    check_dataset,
    generator,
    in_memory,
    iterable,
    refuse_several,
    shuffled,
    split_index,
)
from fnn.progress import Progress
from fnn.training.averages import check_evaluated
from fnn.training.step import CLIPPING, TrainState, TrainStep, averages, check_state


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

    def __str__(self) -> str:
        rows = []
        for epoch in range(len(self.steps_per_epoch)):
            train = {f"train {name}": self.by_epoch(name)[epoch] for name in ("loss", "accuracy") if name in self.train}
            held_out = {f"validation {name}": v[epoch] for name, v in self.validation.items() if epoch < len(v)}
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in (train | held_out).items())
            rows.append(f"epoch {epoch + 1}: {numbers}{' (best)' * (epoch == self.best_epoch)}")
        rows = rows if len(rows) <= 24 else [*rows[:12], f"... {len(rows) - 24} more", *rows[-12:]]
        return "\n".join([*rows, *(["stopped early"] if self.stopped_early else [])])

    def by_epoch(self, name: str) -> np.ndarray:
        """Average a metric of the training steps over each epoch, to lay beside `validation`.

        Reports of clips are averaged over the steps that have one (not those that only accumulate, or are skipped).
        """
        ends = np.cumsum(self.steps_per_epoch)
        parts = np.split(np.asarray(self.train[name]), ends[:-1])
        if name in CLIPPING:
            parts = [part[~np.isnan(part)] for part in parts]
        return np.array([np.mean(part) if len(part) else np.nan for part in parts])


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
    scan: bool = True,
    evaluate_with: Callable[[TrainState], Any] | None = None,
) -> tuple[TrainState, History]:
    """Train for some epochs, each one `lax.scan` on the device; return the new state and the curves.

    `train` is a tuple (x, y), such as a `data.Dataset`: it is moved to the device once and shuffled anew each epoch by
    `key`; a last partial batch is dropped. Or it is an iterable of batches (x, y) on the host, for data larger than
    memory (a DataLoader, a list of batches): it is read again each epoch, 32 batches at a time, and takes no `key` and
    no `batch_size`. Arrays may be any that NumPy reads: tensors, frames of pandas and polars, lists of numbers.

    `validation` is a pair too, or batches that are joined in memory, evaluated after each epoch; or a fraction of the
    training data in memory, split off by `key` as in `data.split`. With `patience=k` training stops once the validation
    loss has not fallen for k epochs, and the best epoch's state is returned.

    `evaluate_with(state)` returns the parameters to validate at, instead of those that are trained: an optimiser's averages
    with `evaluate_with=fnn.optimizers.eval_params`. The state that is returned holds both.

    `progress` shows a bar with loss and validation accuracy (plain lines where the output is no terminal); by default
    only on a terminal. The state passed in stays usable.

    `scan=False` calls the compiled step once for every batch, with the same result to rounding. It is slower for small
    nets, and faster for operations that XLA runs slowly inside a loop: on a CPU the gradients of convolutions that do not
    come from `fnn.conv`, such as Flax's.

    The keywords are many because each can be left out by itself, and a call reads better with them than with an object
    of options.

    Ctrl-C, or an error in the data, loses nothing: the exception has two attributes, `state` and `history` of all finished
    steps, and `step.unfinished` is the pair of them: in a notebook go on with `state, history = step.unfinished`. An
    unfinished epoch is the last of `history.steps_per_epoch`, and has no validation. Only an error inside a compiled step
    destroys the state that it was given: then `state` is the best epoch's (with patience), or the first.

    Guarantee: same key, same data, same state: same result, on one CPU bit for bit (on a GPU: see `train_step`). Errors:
    ValueError for NaN in the data, labels out of range, a batch larger than the data, an iterator that cannot be read
    again, a state of another net or optimiser; TypeError for what is no data, and for arguments that do not apply to it.
    """
    check.positive("fit", epochs=epochs)
    if patience is not None:
        check.positive("fit", patience=patience)
        if validation is None:
            raise ValueError("fit: patience needs validation data, got validation=None; pass a pair (x, y)")
    if not isinstance(step, TrainStep):
        raise TypeError(f"fit: step must be what train_step returns, got {type(step).__name__}")
    check_state("fit", state)
    check.alive("fit", state)
    if key is not None:
        check.prng_key("fit", key)
    train, held = _data(step, state, train, key, batch_size, validation)
    if isinstance(train, Dataset) and key is not None and batch_size is not None:
        run_epoch = _in_memory(step, state, train, jax.random.split(key, epochs), int(batch_size), scan)
    else:
        run_epoch = _from_batches(step, train, epochs, scan)
    if held is not None and evaluate_with is None:
        check_evaluated("fit", state.opt_state, "evaluate_with=fnn.optimizers.eval_params")
    step.unfinished = None
    run = _Run(jax.tree.map(jnp.copy, state))  # the steps donate their state, and the caller's stays usable
    best, best_loss, stopped = state, np.inf, False
    try:
        with Progress("epoch", epochs, progress) as bar:
            for epoch in range(epochs):
                run.lengths.append(0)
                run_epoch(run, epoch)
                shown = {"loss": run.fetch()}
                if held is not None:
                    params = evaluate_with(run.state) if evaluate_with else run.state.params
                    scores = averages(step.net, params, run.state.net_state, held, step.loss)
                    run.curves.append(scores)
                    shown |= {f"validation {name}": value for name, value in scores.items()}
                    if scores["loss"] < best_loss:
                        best_loss, run.best_epoch = scores["loss"], epoch
                        if patience is not None:
                            best = jax.tree.map(jnp.copy, run.state)
                bar.finish("  ".join(f"{name} {value:.4f}" for name, value in shown.items()), keep=False)
                if patience is not None and epoch - (-1 if run.best_epoch is None else run.best_epoch) >= patience:
                    stopped = True
                    break
    except BaseException as error:
        kept = run.keeps_state()
        step.unfinished = (run.state if kept else best), run.history()
        n = sum(run.lengths)
        where = "after them" if kept else "before them all, or the best epoch's: the step that failed destroyed its own"
        with contextlib.suppress(Exception):  # an exception that takes no attributes
            error.state, error.history = step.unfinished  # type: ignore[attr-defined]
            error.add_note(f"fit: {n} steps were finished; state, history = step.unfinished holds the state {where}")
        raise
    return (best if patience is not None and run.best_epoch is not None else run.state), run.history(stopped)


class _Run:
    """Keep what a run has finished: its state, the metrics of its steps, its curves."""

    def __init__(self, state: TrainState):
        self.state, self.lengths, self.curves = state, [], []
        self.best_epoch: int | None = None
        self._records: list[Any] = []
        self._fetched = 0

    def advance(self, function: Callable[..., Any], *args: Any, steps: int | None = None) -> None:
        """Run a stretch of steps (a single one without `steps`): replace the state, and keep the metrics.

        Ctrl-C waits until the call returns: meanwhile the old state is gone and the new one not yet there.
        """
        with _uninterrupted():
            self.state, metrics = function(self.state, *args)
            self._records.append((metrics, steps))
            self.lengths[-1] += 1 if steps is None else steps

    def fetch(self) -> float:
        """Bring the metrics of the epoch to the host; return its mean loss."""
        for i in range(self._fetched, len(self._records)):
            metrics, steps = self._records[i]
            metrics = jax.device_get(metrics)
            self._records[i] = metrics if steps is not None else jax.tree.map(lambda m: np.asarray(m)[None], metrics), 0
        fetched, self._fetched = self._records[self._fetched :], len(self._records)
        return float(np.mean(np.concatenate([metrics["loss"] for metrics, _ in fetched])))

    def history(self, stopped: bool = False) -> History:
        records = [metrics for metrics, _ in self._records]
        return History(
            jax.tree.map(lambda *parts: np.concatenate(parts), *records) if records else {},
            {name: np.array([c[name] for c in self.curves]) for name in self.curves[0]} if self.curves else {},
            tuple(n for n in self.lengths if n),
            self.best_epoch,
            stopped,
        )

    def keeps_state(self) -> bool:
        """Say, after an error, whether the state is still there, and keep the metrics that are."""
        try:
            jax.block_until_ready(self.state)
            check.alive("fit", self.state)
            if self._fetched < len(self._records):
                self.fetch()
        except Exception:
            if self.lengths:
                self.lengths[-1] = 0
            del self._records[self._fetched :]
            return False
        return True


def _data(
    step: TrainStep, state: TrainState, train: Any, key: Any, batch_size: Any, validation: Any
) -> tuple[Any, Dataset | None]:
    """Take training data, a `Dataset` in memory or an iterable of batches, and those held out, whole."""
    fraction = validation if isinstance(validation, numbers.Real) else None
    held = None
    if isinstance(train, tuple):
        refuse_several("fit", train)
        if key is None or batch_size is None:
            raise ValueError("fit: data in memory needs key= and batch_size=, to be shuffled and cut into batches")
        check.positive("fit", batch_size=batch_size)
        train = _dataset("fit", step, state, train)
        if fraction is not None:
            train, held = _split_off(train, fraction, key)
    else:
        train = iterable("fit", train)
        if given := [name for name, value in (("key", key), ("batch_size", batch_size)) if value is not None]:
            raise TypeError(
                f"fit: key and batch_size are for data in memory, a tuple (x, y), got {' and '.join(given)} with "
                "batches, which are cut and shuffled already; leave them out"
            )
        if fraction is not None:
            raise TypeError(
                f"fit: a fraction can be split off data in memory alone, got validation={fraction!r} with batches; pass "
                "a pair (x, y)"
            )
    if validation is not None and fraction is None:
        held = _dataset("fit: validation", step, state, validation)
    return train, held


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back."""
    if threading.current_thread() is not threading.main_thread() or not callable(
        before := signal.getsignal(signal.SIGINT)
    ):
        yield
        return
    pending: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        before(*pending[0])


def _in_memory(
    step: TrainStep, state: TrainState, data: Dataset, keys: Any, batch_size: int, scan: bool
) -> Callable[[_Run, int], None]:
    """Return `(run, epoch)`, which advances the run by an epoch, shuffled by the epoch's key."""
    n = data.size
    if batch_size > n:
        raise ValueError(f"fit: batch_size must be at most the {n} examples of the data, got {batch_size}")
    step.admit(state, _rows(data, jnp.arange(batch_size)))
    if scan:
        return lambda run, epoch: run.advance(step.epoch, data, keys[epoch], batch_size, steps=n // batch_size)

    def one_by_one(run, epoch):
        order = shuffled(keys[epoch], n)
        for start in range(0, n - batch_size + 1, batch_size):
            run.advance(step.jitted, _rows(data, order[start : start + batch_size]))

    return one_by_one


def _from_batches(step: TrainStep, data: Any, epochs: int, scan: bool) -> Callable[[_Run, int], None]:
    """Return `(run, epoch)`, which advances the run by all batches of an iterable."""
    if isinstance(data, Iterator) and epochs > 1:
        raise ValueError(
            f"fit: an iterator can be read once, got epochs={epochs}; pass an object whose iter() starts anew"
        )
    most = 32 if scan else 1

    def batches(run, epoch):
        chunk = None
        for chunk in _chunks(step, run, data, most):
            if not run.lengths[-1]:
                step.admit(run.state, chunk[0])
            if len(chunk) == most > 1:
                run.advance(step.stretch, jax.tree.map(lambda *leaves: np.stack(leaves), *chunk), steps=most)
            else:
                for batch in chunk:
                    run.advance(step.jitted, batch)
        if chunk is None:
            raise ValueError(f"fit: the iterable of batches must not be empty, got none in epoch {epoch}")

    return batches


@jax.jit
def _rows(data: Dataset, index: jax.Array) -> tuple[Any, Any]:
    return mapped.auto(lambda data, index: jax.tree.map(lambda a: a[index], tuple(data)))(data, index)


def _chunks(step: TrainStep, run: _Run, batches: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Check batches and group those of one shape, `most` at a time; a change of shape ends a group."""
    chunk: list[Any] = []
    for batch in batches:
        batch = step.check(run.state, batch)
        if chunk and (len(chunk) == most or not same_spec(batch, chunk[0])):
            yield chunk
            chunk = []
        chunk.append(batch)
    if chunk:
        yield chunk


def _dataset(who: str, step: TrainStep, state: TrainState, data: Any) -> Dataset:
    data = Dataset(*as_arrays(tuple(in_memory(who, data))))
    check_dataset(who, data.x, data.y)
    admission.state(who, step.net, state.params, state.net_state, data.x)
    check_values(step.net, state.params, state.net_state, data.x)
    shape = output_shape(step.net, state.params, state.net_state, data.x)
    try:
        losses.check_targets(step.loss, shape, data.y)
    except (TypeError, ValueError) as error:
        if who == "fit":
            raise
        raise type(error)(f"{who}: {error}") from None
    return data


def _split_off(data: Dataset, validation: Any, key: Any) -> tuple[Dataset, Dataset]:
    """Split a fraction off for validation, as `data.split` does, by a key of its own."""
    rng = generator("fit", key, 0x5EED)
    instead = "validation=(x, y)"
    train, held = split_index("fit", np.asarray(data.y), rng, instead=instead, validation=validation)
    return data.take(train), data.take(held)
