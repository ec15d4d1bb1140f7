"""Parametrisations: how initial weights, residual branches and learning rates change with width and depth.

| | standard | mup | completep |
|---|---|---|---|
| std of the output kernel, times | 1 | 1/sqrt(m) | 1/sqrt(m) |
| residual branch, times | 1 | 1 | 1/d |
| Adam's rate for hidden and output kernels, times | 1 | 1/m | 1/m |
| plain gradient descent's rate for input kernels and biases, times | 1 | m | m |
| the same for hidden kernels and biases, times | 1 | 1 and m | d and m·d |
| the same for the output kernel, times | 1 | 1/m | 1/m |

m is the width over `base_width`, d the depth over `base_depth`: at the base sizes all three agree, for kernels with
`base_width` inputs (see `optimizers.parametrized`), so that what was tuned there carries over. Initial stds are those of
the net's own initialiser, which must have a variance of order 1/fan_in.
Sources: Yang et al. 2022, table 3 (mup); Dey et al. 2025, table 1 with alpha = 1 (completep).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt

import jax

from fnn import check

NAMES = ("standard", "mup", "completep")


@dataclass(frozen=True)
class Parametrization:
    """One of the three, and the sizes at which it is the standard one."""

    name: str = "standard"
    base_width: int = 64
    base_depth: int = 4

    def __post_init__(self):
        check.choice("parametrization", NAMES, name=self.name)
        check.positive("parametrization", base_width=self.base_width, base_depth=self.base_depth)

    def output(self, initializer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Make the initialiser of the output kernel."""
        if self.name == "standard":
            return initializer

        def init(key, shape, *dtype):
            return initializer(key, shape, *dtype) * sqrt(self.base_width / prod(shape[:-1]))

        return init

    def branch(self, depth: int) -> float:
        """Give the factor of a residual branch in a net of `depth` hidden layers."""
        return self.base_depth / depth if self.name == "completep" else 1.0

    def rate(self, role: str, shape: tuple[int, ...], *, adaptive: bool, depth: int = 1) -> float:
        """Give the factor of the learning rate of one array; `role` is input, hidden or output, that of its layer.

        `adaptive` is whether the optimiser divides by the size of gradients, as Adam does. An array with one axis is a bias
        or a scale. `depth` counts the net's hidden layers; only completep without `adaptive` reads it.
        """
        check.choice("parametrization", ("input", "hidden", "output"), role=role)
        if self.name == "standard":
            return 1.0
        kernel, wide, narrow = len(shape) > 1, shape[-1] / self.base_width, self.base_width / prod(shape[:-1])
        if adaptive:
            return narrow if kernel and role != "input" else 1.0
        deep = depth / self.base_depth if self.name == "completep" and role == "hidden" else 1.0
        if role == "output":
            return narrow if kernel else 1.0
        return deep * (1.0 if kernel and role == "hidden" else wide)


def get(parametrization: str | Parametrization) -> Parametrization:
    """Find a parametrisation by its name, with the default base sizes; return an object as it is."""
    return parametrization if isinstance(parametrization, Parametrization) else Parametrization(parametrization)
