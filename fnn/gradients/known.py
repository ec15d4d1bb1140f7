"""What is known about plain arrays while a program is traced, without a look at their numbers.

A factor whose entries are not far from 1, such as 1 - tanh(x), cannot push a value out of range, so that nothing need be
normalised for its sake; an array of zeros needs no exponent in a sum.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from fnn.gradients.operations import Op


@dataclass(frozen=True)
class Known:
    """What is known about a plain array."""

    number: float | None = None
    """The one number that all entries are."""
    orders: float = math.inf
    """Entries that are not zero lie between 2**-orders and 2**orders."""
    unit: bool = False
    """No entry is larger than 1."""
    repeated: bool = False
    """All entries are one number, known or not."""

    @classmethod
    def of(cls, number: float) -> "Known":
        """Make what is known of an array of one number."""
        orders = abs(math.log2(abs(number))) if number and math.isfinite(number) else math.inf
        return cls(number, orders, abs(number) <= 1, True)


NOTHING = Known()
UNIT = {"tanh", "logistic", "sin", "cos", "erf"}
SAME = {"broadcast_in_dim", "copy", "reshape", "squeeze", "transpose", "expand_dims", "stop_gradient"}


def learned(op: Op, inputs: list[Known], dtype: Any, scalar: bool) -> Known:
    """Say what is known of the result of a plain operation, from what is known of its inputs.

    `dtype` is that of the result, `scalar` says that the first input is a single number.
    """
    if op.name in UNIT:
        return Known(unit=True)
    if op.name in SAME:
        return replace(inputs[0], repeated=True) if op.name == "broadcast_in_dim" and scalar else inputs[0]
    if op.name == "neg":
        return replace(inputs[0], number=None)
    if op.name == "convert_element_type" and jnp.issubdtype(dtype, jnp.inexact):
        return inputs[0] if inputs[0].orders < 8 or inputs[0].number == 0 else NOTHING
    floating = jnp.issubdtype(dtype, jnp.inexact)
    one = op.name == "one_minus_square" or any(abs(x.number or 0) == 1 for x in inputs)
    if op.name in ("add", "sub", "one_minus_square") and one and floating and all(x.unit for x in inputs):
        # 1 - y with |y| <= 1 is zero, or at least the last digit of 1.
        return Known(orders=int(jnp.finfo(dtype).nmant) + 2.0)
    if op.name in ("mul", "div") and any(x.number for x in inputs):
        return Known(orders=sum(x.orders for x in inputs))
    return NOTHING
