"""What the device could do: its matrix-product rate and memory bandwidth, and what a step asks of them."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    """Measure both limits in about a second on a CPU, the products in `dtype`; the best of several tries.

    Each dtype and precision is measured once in a process.
    """
    return _measured(quick, dtype, jax.config.jax_default_matmul_precision)


@functools.cache
def _measured(quick: bool, dtype: str, precision: str | None) -> Limits:
    n = 1024 if on_cpu() else 8192
    tries = 5 if quick else 20
    product = product_seconds((n, n, n), dtype, precision, tries, pick=min)
    return Limits(2 * n**3 / product, bandwidth(tries, pick=min), n)


def on_cpu() -> bool:
    """Whether JAX computes on the processor itself, not on an accelerator."""
    return jax.devices()[0].platform == "cpu"


def exact_products() -> bool:
    """Whether matrix products are true float32; accelerators by default round the factors to 11 bits or 8."""
    return on_cpu() or jax.config.jax_default_matmul_precision == "highest"


def product_seconds(
    shape: tuple[int, int, int],
    dtype: Any = jnp.float32,
    precision: str | None = None,
    tries: int = 20,
    queued: int = 1,
    pick: Callable[[list[float]], Any] = np.median,
) -> float:
    """Time (m, k) @ (k, n) of random numbers, shape: (m, k, n); the middle of several tries.

    A try queues several calls before it waits, so that an accelerator does not stand still between them. All six
    arguments say what is measured and how.
    """
    m, k, n = shape
    a = jax.random.normal(jax.random.key(0), (m, k), dtype)
    b = jax.random.normal(jax.random.key(1), (k, n), dtype)
    multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
    return float(pick(_times(lambda _: multiply(a, b), None, tries, queued)))


def bandwidth(tries: int = 20, queued: int = 1, pick: Callable[[list[float]], Any] = np.median) -> float:
    """Measure the bytes a second that `x + 1` reads and writes, in place, on float32."""
    numbers = 2**26 if on_cpu() else 2**29
    x = jnp.arange(numbers, dtype=jnp.float32)
    # In place, since a fresh array would have the system hand out and clear new pages each time.
    return 2 * 4 * numbers / float(pick(_times(jax.jit(lambda x: x + 1, donate_argnums=0), x, tries, queued)))


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


def _times(f: Callable[[Any], Any], x: Any, tries: int, queued: int) -> list[float]:
    """Take the seconds of one call of `x = f(x)`, several times."""
    x, seconds = jax.block_until_ready(f(x)), []
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(queued):
            x = f(x)
        jax.block_until_ready(x)
        seconds.append((time.perf_counter() - start) / queued)
    return seconds
