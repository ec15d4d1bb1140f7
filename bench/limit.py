"""What the device could do: its matrix-product rate and memory bandwidth, and what a step asks of them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench.problem import CLASSES, FEATURES, Row


class Limits(NamedTuple):
    """The device, measured."""

    flops: float
    """Floating-point operations per second in a large square matrix product."""
    bandwidth: float
    """Bytes per second read and written by `x + 1`, in place, on an array larger than the caches."""
    product: int
    """Side of the matrices."""


class Floor(NamedTuple):
    """The least time that a step can take, in milliseconds, by either limit alone."""

    matmul: float
    memory: float


def measure(quick: bool = False, dtype: str = "float32") -> Limits:
    """Measure both limits in about a second on a CPU, the products in `dtype`; the best of several tries."""
    on_cpu = jax.devices()[0].platform == "cpu"
    n, numbers = (1024, 2**26) if on_cpu else (8192, 2**29)
    tries = 5 if quick else 20
    a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    product = _best(lambda _: multiply(a, b), None, tries)
    # In place, since a fresh array would have the system hand out and clear new pages each time.
    moved = _best(jax.jit(lambda x: x + 1, donate_argnums=0), jnp.zeros(numbers), tries)
    return Limits(2 * n**3 / product, 2 * 4 * numbers / moved, n)


def step_flops(row: Row) -> int:
    """Count the operations of a step's matrix products from their shapes.

    The forward pass has one product per layer, the backward pass two, but none for the gradient of the data.
    """
    first = row.batch * FEATURES * row.width
    rest = row.batch * ((row.depth - 1) * row.width**2 + row.width * CLASSES)
    return 2 * (2 * first + 3 * rest)


def step_bytes(row: Row) -> int:
    """Count the bytes that clipping and Adam move: parameter and two moments in and out, gradient out and in."""
    hidden = (FEATURES + (row.depth - 1) * row.width) * row.width + 3 * row.depth * row.width
    return 8 * 4 * (hidden + row.width * CLASSES + CLASSES)


def floor(row: Row, limits: Limits) -> Floor:
    """Divide what a step asks by what the device can do.

    The memory floor takes every parameter from memory each time; a net that fits into the caches can be faster.
    """
    return Floor(step_flops(row) / limits.flops * 1e3, step_bytes(row) / limits.bandwidth * 1e3)


def _best(f: Callable[[Any], Any], x: Any, tries: int) -> float:
    """Take the shortest time of `x = f(x)`."""
    x, seconds = jax.block_until_ready(f(x)), []
    for _ in range(tries):
        start = time.perf_counter()
        x = jax.block_until_ready(f(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
