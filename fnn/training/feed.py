"""What `fit` trains on, checked; data in memory, fed to a run stretch by stretch."""

import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import admission, check, losses, mapped, tasks
from fnn.core import as_arrays, check_values, output_shape
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
from fnn.training import placement
from fnn.training.batches import checksum
from fnn.training.hooks import steps_left
from fnn.training.run import Run
from fnn.training.step import TrainState, TrainStep
from fnn.training.stretches import LONGEST, jitted_finite

SHUFFLES = 0xF5F5F5F5
"""Sets the keys of shuffles apart from those of dropout: no step has so large a number."""


class InMemory:
    """Feed data in memory: epoch e, which begins at step e * steps, is shuffled by `fold_in(fold_in(key, SHUFFLES), e)`."""

    def __init__(self, step: TrainStep, state: TrainState, data: Dataset, key: Any, batch_size: int, scan: bool):
        n = data.size
        if batch_size > n:
            raise ValueError(f"fit: batch_size must be at most the {n} examples of the data, got {batch_size}")
        placement.divides("fit", getattr(step, "mesh", None), batch_size)
        step.admit(state, _rows(data, jnp.arange(batch_size)))
        self.step, self.data, self.batch_size, self.scan = step, data, batch_size, scan
        self.key = jax.random.fold_in(state.key if key is None else key, SHUFFLES)
        self.steps = n // batch_size
        self.order = jnp.zeros(n, jnp.int32)

    def warn_of_middle(self, step: int) -> None:
        """Say that the first epoch will be short if a state is in the middle of one."""
        if done := step % self.steps:
            warnings.warn(
                f"fit: the state is {done} steps into an epoch of {self.steps}, of which the first epoch has only the rest; with "
                "other data than before, pass state.replace(step=0 * state.step)",
                UserWarning,
                stacklevel=3,
            )

    def stretches(self, run: Run, epoch: int, periods: Sequence[int]) -> Iterator[None]:
        """Advance the run to the end of an epoch, and yield after every stretch; these end where a period does."""
        number = run.first // self.steps + epoch
        key, end = jax.random.fold_in(self.key, number), (number + 1) * self.steps
        advance = self._scanned(key) if self.scan else self._one_by_one(key)
        while run.step < end:
            count = int(min(end - run.step, LONGEST, steps_left(run.step, periods)))
            advance(run, run.step - number * self.steps, count)
            yield

    def example(self, run: Run) -> Any:
        """Return a batch."""
        return self.rows(jnp.arange(self.batch_size))

    def rows(self, index: Any) -> tuple[Any, Any]:
        """Return the batch of these rows."""
        return _rows(self.data, jnp.asarray(index))

    def checksum(self) -> str:
        """Name the data by their content."""
        return checksum(tuple(self.data))

    def position(self) -> dict[str, Any]:
        """Return nothing: the state's number of steps says it all."""
        return {}

    def resume(self, run: Run, position: dict[str, Any]) -> None:
        """Do nothing, for the same reason."""

    def _scanned(self, key: Any) -> Callable[[Run, int, int], None]:
        most, fresh = min(LONGEST, self.steps), True

        def advance(run, start, count):
            def stretch(state):
                nonlocal fresh
                at, fresh = np.array([start, count, fresh], np.int32), False
                carry = state, self.order
                (state, self.order), (metrics, finite) = self.step.epoch(
                    carry, self.data, key, at, self.batch_size, most
                )
                run.flag(run.step + count, finite)
                return state, metrics

            run.advance(stretch, count)

        return advance

    def _one_by_one(self, key: Any) -> Callable[[Run, int, int], None]:
        order = shuffled(key, self.data.size)

        def advance(run, start, count):
            for i in range(start * self.batch_size, (start + count) * self.batch_size, self.batch_size):
                batch = _rows(self.data, order[i : i + self.batch_size])
                run.advance(lambda state, batch=batch: self.step.jitted(state, batch))
            run.flag(run.step, jitted_finite(run.state.params))

        return advance


def prepare(
    step: TrainStep, state: TrainState, train: Any, key: Any, batch_size: Any, validation: Any
) -> tuple[Any, Dataset | None]:
    """Take training data, a `Dataset` in memory or an iterable of batches, and those held out, whole."""
    fraction = validation if isinstance(validation, numbers.Real) else None
    held = None
    if isinstance(train, tuple):
        refuse_several("fit", train)
        if batch_size is None:
            raise ValueError("fit: data in memory needs batch_size=, to be cut into batches")
        check.positive("fit", batch_size=batch_size)
        train = _dataset("fit", step, state, train)
        if fraction is not None:
            train, held = _split_off(train, fraction, state.key if key is None else key)
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


@jax.jit
def _rows(data: Dataset, index: jax.Array) -> tuple[Any, Any]:
    return mapped.auto(lambda data, index: jax.tree.map(lambda a: a[index], tuple(data)))(data, index)


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
    y, _ = tasks.unwrapped(data.y)
    labels = np.asarray(y) if hasattr(y, "dtype") else np.zeros(data.size)  # a tree is split without looking at it
    train, held = split_index("fit", labels, rng, instead=instead, validation=validation)
    return data.take(train), data.take(held)
