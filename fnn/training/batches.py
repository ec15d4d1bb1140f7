"""Batches from outside, fed to a run stretch by stretch, and found again when a run goes on."""

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fnn import arrays
from fnn.core import same_spec
from fnn.training.hooks import steps_left
from fnn.training.run import Run
from fnn.training.step import TrainStep
from fnn.training.stretches import jitted_finite

READ = 32
"""Batches from outside that go to the device at a time."""


class FromBatches:
    """Feed batches from outside, read from the start in every epoch.

    `tracked`: each position is kept, so that a checkpoint can find it again.
    """

    def __init__(self, step: TrainStep, data: Any, epochs: int, scan: bool, tracked: bool):
        if isinstance(data, Iterator) and epochs > 1:
            raise ValueError(
                f"fit: an iterator can be read once, got epochs={epochs}; pass an object whose iter() starts anew"
            )
        self.step, self.data, self.scan, self.tracked = step, data, scan, tracked
        self.group: list[Any] = []
        self._next: _Reading | None = None
        self._last: Any = None
        self._token: Any = None

    def stretches(self, run: Run, epoch: int, periods: Sequence[int]) -> Iterator[None]:
        """Advance the run to the end of an epoch, and yield after every stretch; these end where a period does."""
        for chunk in self._chunks(run, periods):
            if not run.lengths[-1]:
                self.step.admit(run.state, chunk[0])
            self.group = chunk
            self.run(run, chunk)
            run.flag(run.step, jitted_finite(run.state.params))
            yield
        if not run.lengths[-1]:
            raise ValueError(f"fit: the iterable of batches must not be empty, got none in epoch {epoch}")

    def run(self, run: Run, group: list[Any]) -> None:
        """Train on batches of one shape, in one call if there are as many as are read at a time."""
        if self.scan and len(group) == READ:
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *group)
            run.advance(lambda state: self.step.stretch(state, stacked), READ)
        else:
            for batch in group:
                run.advance(lambda state, batch=batch: self.step.jitted(state, batch))

    def example(self, run: Run) -> Any:
        """Look at the first batch."""
        self._next = self._reading()
        return self.step.check(run.state, self._next.peek())

    def checksum(self) -> str:
        """Say that only the batches that were read can be compared: see `resume`."""
        return "batches"

    def position(self) -> dict[str, Any]:
        """Say, as JSON, where the last stretch ended: the state of an iterator that has one, and a checksum."""
        if self._last is None:
            return {}
        return {"batch": checksum(self._last)} | ({} if self._token is None else {"iterator": _as_json(self._token)})

    def resume(self, run: Run, position: dict[str, Any]) -> None:
        """Find the position again: set an iterator that can be set, else read what was read before.

        Errors: ValueError for data that end before it, or hold another batch there.
        """
        if "iterator" in position:
            if run.within:
                self._next = self._reading()
                self._next.set(_from_json(position["iterator"]))
            return
        batch = None
        for epoch, steps in enumerate(run.lengths):
            reading, n = self._reading(), 0
            unfinished = run.within and epoch == len(run.lengths) - 1
            while not (unfinished and n == steps):
                try:
                    batch = next(reading)
                except StopIteration:
                    break
                n += 1
            if n != steps:
                raise ValueError(
                    f"fit: the data must be those that the run in the checkpoint has read, got {n} batches in epoch {epoch}, "
                    f"not {steps}; pass the same, or choose another folder"
                )
            if unfinished:
                self._next = reading
        if batch is not None and checksum(self.step.check(run.state, batch)) != position.get("batch"):
            raise ValueError(
                "fit: the data must be those that the run in the checkpoint has read, got another batch where it was; pass the "
                "same, in the same order, or choose another folder"
            )

    def _reading(self) -> "_Reading":
        reading, self._next = self._next or _Reading(self.data), None
        return reading

    def _chunks(self, run: Run, periods: Sequence[int]) -> Iterator[list[Any]]:
        """Check batches and group those of one shape; the end of a period, or a change of shape, ends a group."""
        chunk: list[Any] = []
        reading = self._reading()
        for batch in reading:
            batch = self.step.check(run.state, batch)
            if chunk and not same_spec(batch, chunk[0]):
                yield chunk
                chunk = []
            chunk.append(batch)
            if self.tracked:
                self._last, self._token = batch, reading.token()
            if len(chunk) == min(READ if self.scan else 1, steps_left(run.step, periods)):
                yield chunk
                chunk = []
        if chunk:
            yield chunk


class _Reading:
    """One pass through the batches, whose first may be looked at before it is read."""

    def __init__(self, data: Any):
        self.iterator = iter(data)
        self.ahead: list[Any] = []
        self.settable = all(callable(getattr(self.iterator, name, None)) for name in ("get_state", "set_state"))

    def __iter__(self) -> "_Reading":
        return self

    def __next__(self) -> Any:
        return self.ahead.pop() if self.ahead else next(self.iterator)

    def peek(self) -> Any:
        try:
            self.ahead.append(next(self.iterator))
        except StopIteration:
            raise ValueError("fit: the iterable of batches must not be empty, got none in epoch 0") from None
        return self.ahead[0]

    def token(self) -> Any:
        return self.iterator.get_state() if self.settable else None  # type: ignore[attr-defined]

    def set(self, token: Any) -> None:
        self.ahead.clear()
        self.iterator.set_state(token)  # type: ignore[attr-defined]


def checksum(tree: Any) -> str:
    """Name a tree of arrays by its shapes, dtypes and the CRC-32 of its values."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return f"{arrays.brief(tree)} {total:08x}"


def _as_json(token: Any) -> Any:
    if isinstance(token, bytes):
        return {"bytes": base64.b64encode(token).decode()}
    try:
        if json.loads(json.dumps(token)) == token:
            return {"json": token}
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"fit: get_state() of the data's iterator must return bytes or what JSON can hold, got {arrays.brief(token)}; wrap the "
        "iterator in one whose state is such"
    )


def _from_json(kept: dict[str, Any]) -> Any:
    return base64.b64decode(kept["bytes"]) if "bytes" in kept else kept["json"]
