"""What each operation does to arrays with exponents, part one: sums, products, comparisons, roots."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.gradients.execution import Rule, Run
from fnn.gradients.operations import Const, Op
from fnn.gradients.powers import (
    LOWEST,
    Scaled,
    against,
    is_float,
    merged,
    normal,
    opaque,
    place,
    reach,
    room,
    scaled,
    shift,
    unit,
)
from fnn.gradients.program import read


def call(op: Op, values: Sequence[Any], exponent: jax.Array, slack: float) -> list[Any]:
    """Run an operation on values; its floating outputs get the exponent."""
    old = next(place(v.dtype) for v in values if is_float(v))
    return [
        Scaled(out, exponent, slack + abs(place(out.dtype) - old)) if is_float(out) else out
        for out in plainly(op, values)
    ]


def plainly(op: Op, values: Sequence[Any]) -> list[Any]:
    """Run an operation on values. A literal is part of the equation, so that one that was shifted needs another way."""
    pairs = zip(op.inputs, values, strict=True)
    if not any(isinstance(a, Const) and not np.ndim(a.value) and v is not a.value for a, v in pairs):
        return list(op.call(*values))
    shape = np.broadcast_shapes(*(v.shape for v in values))
    function = getattr(jax.lax, "add" if op.name == "add_any" else op.name)
    return [function(*(jnp.broadcast_to(v, shape) if is_float(v) else v for v in values))]


def together(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """What moves or adds the entries of several arrays: one exponent for all."""
    values, exponent, slack = run.aligned(inputs, 0)
    return call(op, values, exponent, max(slack, reach(values[0].dtype)))


def _elementwise(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Sums: f(c x, c y) = c f(x, y)."""
    values, exponent, slack = run.aligned(inputs)
    return call(op, values, exponent, slack + 1)


def _picked(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """max, min, clamp: a choice, so that one which is far smaller does not round to zero next to the other."""
    if op.name == "clamp":
        low, x, high = inputs
        return [_larger(run, _larger(run, low, x, 1), high, -1)]
    return [_larger(run, inputs[0], inputs[1], 1 if op.name == "max" else -1)]


def _larger(run: Run, a: Any, b: Any, sign: int) -> Scaled:
    (x, y), *_ = run.aligned([a, b])
    return _chosen(run, jnp.isnan(x) | (sign * x > sign * y), [b, a])


def _selected(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    if isinstance(inputs[0], Scaled):
        return run.undone(op, inputs)
    return [_chosen(run, inputs[0], inputs[1:])]


def _chosen(run: Run, which: jax.Array, cases: list[Any]) -> Scaled:
    """Choose between arrays by number, entry by entry: what is not chosen must not count as the largest."""
    some = [x for x in cases if isinstance(x, Scaled)]
    shape = jnp.broadcast_shapes(*(np.shape(getattr(x, "value", x)) for x in cases))
    others = [x for x in cases if run.about(x).number != 0]
    if len(some) < len(others) or any(x.exponent is not some[0].exponent for x in some):
        cases = [_where(which == i, x, shape) if run.about(x).number != 0 else x for i, x in enumerate(cases)]
    values, exponent, slack = run.aligned(cases)
    values = [jnp.broadcast_to(v, shape).astype(some[0].value.dtype) for v in values]
    return Scaled(jax.lax.select_n(which, *values), exponent, max(slack, reach(values[0].dtype)))


def _where(here: jax.Array, x: Any, shape: tuple[int, ...]) -> Scaled:
    x = scaled(x)
    value = jnp.where(here, jnp.broadcast_to(x.value, shape), 0)
    return Scaled(value, x.exponent, max(x.slack, reach(value.dtype)))


def _compared(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    return plainly(op, run.aligned(inputs)[0])


def _times(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """x · y and x / y, elementwise."""
    a, b = inputs
    if isinstance(a, Scaled) and isinstance(b, Scaled):
        return _both(op, run.tidy(a), run.tidy(b))
    if op.name == "div" and isinstance(b, Scaled):
        return _both(op, scaled(a), run.tidy(b))
    x, factor = (a, b) if isinstance(a, Scaled) else (b, a)
    known, most, power = run.about(factor), reach(x.value.dtype), 0
    orders = min(known.orders, most)
    if known.number and math.isfinite(known.number) and orders > 8:  # its power of two needs no room
        power = int(np.clip(math.frexp(known.number)[1], 2 - most, most - 2))
        factor, orders = factor * np.asarray(2.0**-power, jnp.result_type(factor)), max(1.0, orders - abs(power))
    # XLA multiplies known numbers with each other first: their product alone must be in range.
    if x.slack + orders > room(x.value.dtype) or (known.number and x.slack < most <= x.slack + orders):
        x = run.tidy(x)
    factor = opaque(factor) if known.repeated and known.number is None else factor
    exponent = jnp.maximum(x.exponent + (power if op.name == "mul" else -power), LOWEST) if power else x.exponent
    return call(op, [x.value, factor] if isinstance(a, Scaled) else [factor, x.value], exponent, x.slack + orders)


def _both(op: Op, a: Scaled, b: Scaled) -> list[Any]:
    axes = max(a.exponent.ndim, b.exponent.ndim)
    ea, eb = against(a.exponent, axes), against(b.exponent, axes)
    if op.name == "div":
        # Zero divided by something stays zero; the exponent of a zero divisor would make infinities small.
        eb = -jnp.where(eb <= LOWEST // 2, 0, eb)
    return call(op, [a.value, b.value], jnp.maximum(ea + eb, LOWEST), reach(a.value.dtype))


def _product(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Sums of products: matrix products, convolutions."""
    kept: list[jax.Array] = []
    ready: list[Any] = []
    slack = 0.0
    for i, x in enumerate(inputs):
        if isinstance(x, Scaled):
            keep, summed = _axes_of_product(op, i, inputs) if op.name == "dot_general" else (0, 0)
            if x.exponent.ndim > keep:
                x = merged(x, keep, apart=x.exponent.ndim > summed)
            if x.slack + reach(x.value.dtype) > room(x.value.dtype):
                x = run.tidy(x)
            kept.append(x.exponent)
            slack += x.slack
        ready.append(x.value if isinstance(x, Scaled) else x)
    if not kept:
        return run.undone(op, inputs)
    if len(kept) == 2:
        axes = max(e.ndim for e in kept)
        kept = [jnp.maximum(against(kept[0], axes) + against(kept[1], axes), LOWEST)]
    return call(op, ready, kept[0], slack + reach(ready[0].dtype))


def _axes_of_product(op: Op, operand: int, inputs: list[Any]) -> tuple[int, int]:
    """(how many leading axes of an operand lead the result too, how many are summed over)."""
    contracting, batch = (dims[operand] for dims in op["dimension_numbers"])
    summed = next(i for i in itertools.count() if i not in contracting)
    lead = next(i for i in itertools.count() if i >= len(batch) or batch[i] != i)
    both = isinstance(inputs[0], Scaled) and isinstance(inputs[1], Scaled)
    if lead == len(batch) and operand == 0 and not both:
        lead = next(i for i in itertools.count(lead) if i in contracting or i >= inputs[0].value.ndim)
    return lead, summed


def _solved(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """The solution of a linear system, in its right-hand side."""
    consts = len(inputs) - sum(isinstance(x, Scaled) for x in inputs)
    if any(isinstance(x, Scaled) for x in inputs[:consts]):
        return run.undone(op, inputs)
    values, exponent, _ = run.aligned([normal(merged(x)) for x in inputs[consts:]], 0)
    return call(op, [*inputs[:consts], *values], exponent, reach(values[0].dtype))


def _power_of(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    x, n = unit(run.tidy(inputs[0])), int(op.params.get("y", 2))
    if n == 0 or abs(n) > reach(x.value.dtype) / 2:
        return run.undone(op, inputs)
    if n < 0:  # the exponent of a zero would make an infinity small
        return call(op, [x.value], jnp.where(x.exponent <= LOWEST // 2, 0, x.exponent) * n, reach(x.value.dtype))
    return call(op, [x.value], jnp.maximum(x.exponent, LOWEST // n) * n, reach(x.value.dtype))


def _root(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """sqrt and rsqrt: half the exponent, once it is even."""
    x = unit(run.tidy(inputs[0]))
    value, half = shift(x.value, x.exponent & 1), x.exponent >> 1
    half = half if op.name == "sqrt" else -jnp.where(half <= LOWEST // 4, 0, half)
    return call(op, [value], half, reach(x.value.dtype))


def _logarithm(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    x = unit(run.tidy(inputs[0]))
    (out,) = op.call(x.value)
    each = 1.0 if op.name == "log2" else math.log(2)
    return [out + against(x.exponent, out.ndim).astype(out.dtype) * each]


def _sign(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    return list(op.call(inputs[0].value))


def _multiplied(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """reduce_prod: the exponents add, where a product of the values themselves stays in range."""
    x, axes = unit(merged(run.tidy(inputs[0]))), op["axes"]
    count = math.prod(x.value.shape[axis] for axis in axes)
    if not 0 < count <= reach(x.value.dtype) / 8:
        return run.undone(op, inputs)
    return call(op, [x.value], jnp.maximum(x.exponent, LOWEST // count) * count, reach(x.value.dtype))


def _each(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """What takes every input to the output of the same place, by itself."""
    outputs = op.call(*(x.value if isinstance(x, Scaled) else x for x in inputs))
    return [
        Scaled(y, x.exponent, x.slack) if isinstance(x, Scaled) else y for x, y in zip(inputs, outputs, strict=True)
    ]


def _inside(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """A function with a derivative rule of its own, which has been used by now: what it computes."""
    inner = next((op.params[name] for name in ("call_jaxpr", "fun_jaxpr", "jaxpr") if name in op.params), None)
    if not (hasattr(inner, "jaxpr") or hasattr(inner, "eqns")):
        return run.undone(op, inputs)
    return run.execute(read(inner), inputs, op.where)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "add_any", "complex"), _elementwise),
    **dict.fromkeys(("max", "min", "clamp"), _picked),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _compared),
    **dict.fromkeys(("mul", "div"), _times),
    **dict.fromkeys(("dot_general", "conv_general_dilated", "ragged_dot_general"), _product),
    **dict.fromkeys(("sign", "is_finite"), _sign),
    **dict.fromkeys(("log", "log2"), _logarithm),
    **dict.fromkeys(("integer_pow", "square"), _power_of),
    **dict.fromkeys(("custom_linear_solve", "triangular_solve"), _solved),
    **dict.fromkeys(("optimization_barrier", "barrier", "pvary", "pcast", "tie"), _each),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "composite"), _inside),
    "reduce_prod": _multiplied,
    "select_n": _selected,
    **dict.fromkeys(("sqrt", "rsqrt"), _root),
}
