"""What a train step offers an optimiser beyond the gradient: the loss's value, and functions that take the loss again."""

import functools
import re
from collections.abc import Callable
from typing import Any


def offered(
    value: Any, grad: Any, value_fn: Callable[[Any], Any], grad_fn: Callable[[Any], Any], *, clipped: bool = False
) -> dict[str, Any]:
    """Name the extra arguments of optax: value, grad, value_fn (line searches), obj_fn (sophia), grad_fn (SAM).

    `value_fn(params) -> float[]` is the loss of this batch, `grad_fn(params)` its gradient as the step takes it. Neither
    costs anything unless the optimiser calls it. Errors: ValueError from value_fn and obj_fn where the gradient is
    `clipped` example by example: it is not that of the loss.
    """

    def loss(params):
        if clipped:
            raise ValueError(
                "train_step: per_example must not be 'clip' with an optimiser that takes the loss again (line searches, "
                "lbfgs, sophia), since its gradient is then another; clip inside the optimiser, or not at all"
            )
        return value_fn(params)

    # A line search refuses what is offered to others, unless its value_fn takes it.
    def value_of(params, obj_fn=None, grad_fn=None):
        return loss(params)

    # SAM also says which of its inner steps it takes; all see the same batch.
    def gradient_of(params, step=0):
        return grad_fn(params)

    return {"value": value, "grad": grad, "value_fn": value_of, "obj_fn": loss, "grad_fn": gradient_of}


def accepted(update: Callable[..., Any]) -> Callable[..., Any]:
    """Let a transformation's update be called with more extra arguments than it takes: those it refuses are left out."""

    @functools.wraps(update)
    def call(updates, state, params=None, **extra):
        while True:
            try:
                return update(updates, state, params, **extra)
            except TypeError as error:
                refused = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
                if refused is None or refused[1] not in extra:
                    raise
                del extra[refused[1]]

    return call
