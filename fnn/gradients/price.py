"""What a measurement costs beside a plain gradient, in time and in memory: measured here and now, not estimated."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import jax
import numpy as np

from fnn import check, compiled, mapped

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
SAVED = "/jax/compilation_cache/compile_time_saved_sec"
"""JAX's name of the seconds that a program from its cache on disk has saved."""


class Spread(NamedTuple):
    """The median of all rounds, and the quartiles."""

    median: float
    low: float
    high: float


class Cost(NamedTuple):
    """What one program costs."""

    name: str
    milliseconds: Spread
    """Of one call."""
    ratio: Spread
    """Time over that of the plain gradient, round by round."""
    megabytes: float
    """XLA's temporary memory, in 10⁶ bytes: without parameters, batch and results. NaN where XLA does not say."""
    memory_ratio: float
    """Over that of the plain gradient; NaN where that needs none."""
    compile_seconds: float
    """To trace and compile; a program from JAX's cache on disk counts as long as it once took."""


@dataclass(frozen=True)
class Price:
    """What the `price` of a measurement returns: a row for each program, the plain gradient first. `print` it."""

    rows: tuple[Cost, ...]
    rounds: int

    def __str__(self) -> str:
        wide = max(len(row.name) for row in self.rows)
        head = f"{'':{wide}}  {'ms':>8}  {'[quartiles]':>18}  {'x plain':>7}  {'[quartiles]':>12}"
        lines = [f"{head}  {'MB':>8}  {'x plain':>7}  {'compile s':>9}"]
        for row in self.rows:
            ms, x = row.milliseconds, row.ratio
            cells = (f"{ms.median:8.3f}", f"{f'[{ms.low:.3f}..{ms.high:.3f}]':>18}", f"{x.median:7.2f}")
            memory = f"{row.megabytes:8.2f}  {row.memory_ratio:7.2f}".replace("nan", "  -")
            spread = f"[{x.low:.2f}..{x.high:.2f}]"
            lines.append(f"{row.name:{wide}}  {'  '.join(cells)}  {spread:>12}  {memory}  {row.compile_seconds:9.2f}")
        return "\n".join([*lines, f"medians of {self.rounds} interleaved rounds; MB: XLA's temporary memory"])


class WithPrice(Protocol[P, R_co]):
    """A function that also has a `.price`."""

    price: Callable[..., Price]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def with_price(price: Callable[..., Price]) -> Callable[[Callable[P, R_co]], WithPrice[P, R_co]]:
    """Give a function a `.price`, which says what a call costs."""

    def give(function: Any) -> Any:
        function.price = price
        return function

    return give


def priced(who: str, functions: Mapping[str, Callable[..., Any]], arguments: Any, rounds: int) -> Price:
    """Compile functions of the same arguments and time them in turn, each round in another order; the first is the plain one.

    Errors: TypeError for traced arguments: the clock stands on the host.
    """
    if compiled.traced(arguments):
        raise TypeError(f"{who}: it times programs, got traced arrays; call it outside of jit, grad, vmap and scan")
    check.positive(who, rounds=rounds)
    arguments = jax.device_put(arguments)
    programs, seconds, memory = {}, {}, {}
    for name, function in functions.items():
        with clock() as taken:
            program = jax.jit(mapped.auto(function)).lower(*arguments).compile()
        analysis = program.memory_analysis()
        programs[name], seconds[name] = program, sum(taken)
        memory[name] = float("nan") if analysis is None else analysis.temp_size_in_bytes / 1e6
    plain, *_ = programs
    _milliseconds(programs[plain], arguments, 1)
    calls = int(np.clip(20 / _milliseconds(programs[plain], arguments, 1), 1, 64))
    times: dict[str, list[float]] = {name: [] for name in programs}
    order, shuffle = list(programs), random.Random(0).shuffle
    for _ in range(rounds + 1):  # the first does not count
        for name in order:
            times[name].append(_milliseconds(programs[name], arguments, calls))
        shuffle(order)  # so that none always runs in the wake of the same neighbour
    rows = []
    for name, found in times.items():
        ms, base = np.array(found[1:]), np.array(times[plain][1:])
        ratio = memory[name] / memory[plain] if memory[plain] else float("nan")
        rows.append(Cost(name, _spread(ms), _spread(ms / base), memory[name], ratio, seconds[name]))
    return Price(tuple(rows), rounds)


def _milliseconds(program: Callable[..., Any], arguments: Any, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = program(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls * 1e3


def _spread(values: np.ndarray) -> Spread:
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(float(median), float(low), float(high))


@contextmanager
def clock() -> Iterator[list[float]]:
    """Take the seconds of what is done inside; what JAX's cache on disk saves is added."""
    taken: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == SAVED:
            taken.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        yield taken
    finally:
        taken.append(time.perf_counter() - start)
        jax.monitoring.unregister_event_duration_listener(listen)
