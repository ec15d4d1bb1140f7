"""Timing: the first call apart from steady steps, and interleaved rounds, so that a slow spell hits everybody."""

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

PAUSE = 0.02
"""Seconds between two peers, in which the idle threads of the one stop spinning before the other starts."""


@dataclass
class Run:
    """A peer ready to train: `call(state, item) -> (state, out)`, over the items that make up one round.

    A Python loop has one item per batch; a peer that scans over the steps has one item, the whole stretch.
    """

    call: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    items: Sequence[Any]
    loss: Callable[[Any], Any] = lambda out: out
    """Read the loss, or the losses, off one `out`; never within the time measured."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    last: Sequence[Any] = ()
    """What came out of the latest items."""

    def advance(self, items: Sequence[Any]) -> tuple[float, list[Any]]:
        """Train on some items and wait for the result; return the seconds taken and what came out."""
        call, state, outs = self.call, self.state, []
        start = time.perf_counter()
        for item in items:
            state, out = call(state, item)
            outs.append(out)
        self.wait((state, outs))
        seconds = time.perf_counter() - start
        self.state, self.last = state, outs
        return seconds, outs

    def first_round(self) -> tuple[float, np.ndarray]:
        """Make the first call, which traces and compiles, and the rest of its round: its seconds, and all losses."""
        seconds, outs = self.advance(self.items[:1])
        outs += self.advance(self.items[1:])[1] if len(self.items) > 1 else []
        return seconds, self.losses(outs)

    def last_losses(self) -> np.ndarray:
        """Bring the latest losses to the host."""
        return self.losses(self.last)

    def losses(self, outs: Sequence[Any]) -> np.ndarray:
        """Bring the losses of some outputs to the host: float[steps]."""
        return np.concatenate([np.atleast_1d(np.asarray(self.loss(out))) for out in outs])


class Times(NamedTuple):
    """Milliseconds per step, one number for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return float(np.median(self.rounds))

    @property
    def low(self) -> float:
        """The fastest round."""
        return min(self.rounds)

    @property
    def high(self) -> float:
        """The slowest round."""
        return max(self.rounds)


class Ratio(NamedTuple):
    """How much slower one peer is than another, from the ratios within each round."""

    median: float
    low: float
    high: float
    """The quartiles."""

    @property
    def unsure(self) -> bool:
        """Whether the spread swallows the difference: 1 lies between the quartiles."""
        return self.low <= 1 <= self.high


def interleave(
    runs: dict[str, Run],
    rounds: int,
    steps: int,
    on_round: Callable[[int], None],
    failed: dict[str, Exception] | None = None,
    end: float = math.inf,
) -> dict[str, Times]:
    """Time all peers in turn, round after round, each round in another order, after one round that does not count.

    A peer that raises is left out and entered in `failed`, if that is given. After the time `end`, as
    `time.monotonic` counts, there is no further round, but there always is one. The six arguments are what to time, how
    long, and whom to tell.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # collection stays on, as for users, but one peer's need not walk through the others
    for i in range(rounds + 1):
        if i > 1 and time.monotonic() > end:
            break
        for name in list(order):
            time.sleep(PAUSE)
            try:
                seconds, _ = runs[name].advance(runs[name].items)
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = error
                order.remove(name)
                del taken[name]
                continue
            if i:
                taken[name].append(seconds / steps * 1e3)
        on_round(i)
        shuffle(order)  # so that nobody always runs in the wake of the same neighbour
    gc.unfreeze()
    return {name: Times(tuple(ms)) for name, ms in taken.items()}


def ratio(times: Times, base: Times) -> Ratio:
    """Divide round by round, since what slows a round down slows both."""
    paired = np.asarray(times.rounds) / np.asarray(base.rounds)
    low, median, high = np.percentile(paired, [25, 50, 75])
    return Ratio(float(median), float(low), float(high))
