"""Say in a sentence why an operation made a NaN or an infinity: a table by primitive and by the ranges of its inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.gradients.history import History, Node
from fnn.gradients.operations import Const, Op

SUMS = {"add", "sub", "add_any", "reduce_sum", "cumsum", "scatter-add", "psum", "psum_invariant", "reduce_window_sum"}
PRODUCTS = {"mul", "dot_general", "conv_general_dilated"}
DOMAINS = {
    "sqrt": ("square root of a negative number", lambda v: v.low < 0),
    "rsqrt": ("rsqrt of a negative number: a variance that rounding made negative?", lambda v: v.low < 0),
    "log": ("log of a negative number", lambda v: v.low < 0),
    "log1p": ("log1p of a number below -1", lambda v: v.low < -1),
    "asin": ("asin outside [-1, 1]", lambda v: max(-v.low, v.high) > 1),
    "acos": ("acos outside [-1, 1]", lambda v: max(-v.low, v.high) > 1),
    "acosh": ("acosh below 1", lambda v: v.low < 1),
    "atanh": ("atanh outside [-1, 1]", lambda v: max(-v.low, v.high) > 1),
    "erf_inv": ("erf_inv outside [-1, 1]", lambda v: max(-v.low, v.high) > 1),
    "pow": ("a negative number to a power that is not an integer", lambda v: v.low < 0),
    "cholesky": ("the matrix is not positive definite: add a multiple of the identity", lambda v: True),
}
"""Operations of one number that have a domain: what to say outside of it."""
POLES = {
    "log": ("log of 0: add a small number, or use log_softmax, logsumexp or xlogy", lambda v: v.zeros),
    "log1p": ("log1p of -1", lambda v: v.low <= -1),
    "rsqrt": ("rsqrt of 0: a variance or a norm of 0 without an epsilon", lambda v: v.zeros),
    "atanh": ("atanh of 1 or -1", lambda v: max(-v.low, v.high) >= 1),
    "erf_inv": ("erf_inv of 1 or -1", lambda v: max(-v.low, v.high) >= 1),
    "pow": ("0 to a negative power: the derivative of x^p at 0, for p below 1?", lambda v: v.zeros),
    "integer_pow": ("0 to a negative power", lambda v: v.zeros),
    "lgamma": ("lgamma of 0 or of a negative integer", lambda v: v.low <= 0),
    "digamma": ("digamma of 0 or of a negative integer", lambda v: v.low <= 0),
}
GUARD = "guard the argument too, where(ok, f(where(ok, x, 1)), 0)"
EXPONENTIALS = {"exp": 1.0, "exp2": math.log(2), "expm1": 1.0, "sinh": 1.0, "cosh": 1.0}


@dataclass(frozen=True)
class Values:
    """What an array holds; `low`, `high` and `smallest` (of magnitudes above 0) are those of its finite numbers."""

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    smallest: float
    zeros: int
    nans: int
    plus: int
    minus: int

    @property
    def infs(self) -> int:
        """How many numbers are +inf or -inf."""
        return self.plus + self.minus

    def __str__(self) -> str:
        kind = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        parts = [f"{self.low + 0.0:.4g} to {self.high + 0.0:.4g}"] if self.low <= self.high else []
        counts = ((self.zeros, "zero"), (self.nans, "NaN"), (self.plus, "+inf"), (self.minus, "-inf"))
        return f"{kind} " + ", ".join(parts + [f"{n} {word}" for n, word in counts if n])


def countable(dtype: Any) -> bool:
    """Whether an array of this type has a smallest and a largest number."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


@jax.jit
def detailed(x: jax.Array) -> jax.Array:
    """Take smallest and largest finite number, smallest magnitude above 0, and counts of 0, NaN, +inf, -inf."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    finite = jnp.isfinite(x)
    low, high = jnp.min(x, initial=jnp.inf, where=finite), jnp.max(x, initial=-jnp.inf, where=finite)
    smallest = jnp.min(jnp.abs(x), initial=jnp.inf, where=finite & (x != 0))
    counts = [jnp.sum(c).astype(x.dtype) for c in (x == 0, jnp.isnan(x), x == math.inf, x == -math.inf)]
    return jnp.stack([low, high, smallest, *counts])


def values(numbers: np.ndarray, spec: Any) -> Values:
    """Read what `detailed` took."""
    low, high, smallest, *counts = (float(number) for number in numbers)
    return Values(tuple(spec.shape), str(spec.dtype), low, high, smallest, *map(int, counts))


def bad(values: Values) -> str:
    """Count what is not finite: "3 NaN and 1 +inf"."""
    counts = ((values.nans, "NaN"), (values.plus, "+inf"), (values.minus, "-inf"))
    return " and ".join(f"{n} {word}" for n, word in counts if n)


def reason(history: History, node: Node, what: str, inputs: Sequence[Values], signals: Sequence[bool] | None) -> str:
    """Say why the operation that makes `node` makes a NaN or an infinity of its inputs.

    `signals` says of each input whether it is an error signal; None where the loss needs the operation.
    """
    op = history.maker(node.atom)
    assert op is not None
    if what != "NaN":
        return _infinity(history, op, inputs, signals is not None)
    found = _nan(history, op, inputs)
    if signals is not None and op.name in PRODUCTS | {"div"} and len(inputs) == len(signals) == 2:
        (a, b), (back, other) = inputs, signals
        zero = (back and not other and a.zeros and (b.infs or b.zeros)) or (other and not back and b.zeros and a.infs)
        if zero and _selected(history, node):
            found += "; behind a `where`, whose other branch has a gradient of 0 times infinity: " + GUARD
    return found


def _nan(history: History, op: Op, inputs: Sequence[Values]) -> str:
    name, first = op.name, inputs[0]
    if any(v.nans for v in inputs):
        return "NaN is written in the program"
    if name == "gather" and len(inputs) == 2:
        rows = f"{inputs[1].low:.0f} to {inputs[1].high:.0f}, of an array {list(first.shape)}"
        return f"an index lies outside, which jnp.take answers with NaN: indices are {rows}"
    if name in DOMAINS and DOMAINS[name][1](first):
        return f"{DOMAINS[name][0]} (the smallest is {first.low:.4g})" if first.low < 0 else DOMAINS[name][0]
    if name == "div" and len(inputs) == 2:
        if first.zeros and inputs[1].zeros:
            return f"0 divided by 0{_norm(history, op)}"
        return "infinity divided by infinity"
    if name in PRODUCTS and any(v.infs for v in inputs):
        if any(a.infs and b.zeros for a, b in ((inputs[0], inputs[-1]), (inputs[-1], inputs[0]))):
            return "0 times infinity"
        return "infinity minus infinity in the sum of a product"
    if name == "sub" and all(v.minus for v in inputs) and "max" in history.made_by(op.inputs[1]):
        return (
            "-inf minus -inf in a softmax: all entries of a row are -inf, so the row is masked entirely; let each row see "
            "one entry, or mask with a large negative number"
        )
    if name in SUMS and any(v.infs for v in inputs):
        return "infinity minus infinity"
    if name in PRODUCTS | SUMS | {"integer_pow"}:
        return "a sum inside overflows with both signs"
    if any(v.infs for v in inputs):
        return f"{name} of infinity"
    return f"{name} is not defined for all of its inputs, or makes a NaN inside"


def _infinity(history: History, op: Op, inputs: Sequence[Values], derivative: bool) -> str:
    name, first = op.name, inputs[0]
    finite = jnp.finfo(first.dtype) if jnp.issubdtype(np.dtype(jnp.dtype(first.dtype)), jnp.inexact) else None
    largest = float(finite.max) if finite is not None else math.inf
    if name == "div" and len(inputs) == 2 and inputs[1].zeros:
        if derivative and history.made_by(op.inputs[1]) == "sqrt":
            return f"the derivative of sqrt at 0 is infinite{_norm(history, op)}"
        return f"division by 0{_norm(history, op)}"
    if name in EXPONENTIALS:
        limit = math.log(largest) / EXPONENTIALS[name]
        if max(first.high, -first.low if name in ("sinh", "cosh") else first.high) >= limit * 0.999:
            return (
                f"{name} overflows above {limit:.4g}, and the largest input is {first.high:.4g}: subtract the maximum "
                "first, as softmax and logsumexp do"
            )
    if name in POLES and POLES[name][1](first):
        return POLES[name][0]
    if name == "convert_element_type":
        dtype = jnp.dtype(op.params["new_dtype"])
        peak = max(abs(first.low), abs(first.high))
        return f"{dtype} ends at {float(jnp.finfo(dtype).max):.5g}, and the largest number is {peak:.4g}"
    if any(isinstance(a, Const) and not np.all(np.isfinite(np.asarray(a.value, np.float64))) for a in op.inputs):
        return "the infinity is written in the program"
    if first.dtype == "float16":
        return f"{name} overflows: float16 ends at 65504; scale the loss, or use bfloat16 or float32"
    if finite is not None:
        return f"{name} overflows: {first.dtype} ends at {largest:.3g}"
    return f"{name} makes infinity inside"


def _norm(history: History, op: Op) -> str:
    """Recognise what an operation divides by: the root of a sum of squares, or of their mean."""
    root = history.maker(history.source(op.inputs[-1]))
    inner = history.maker(history.source(root.inputs[0])) if root is not None and root.name == "sqrt" else None
    while inner is not None and inner.name in ("div", "mul", "select_n"):
        below = [history.maker(history.source(a)) for a in inner.inputs]
        inner = next((o for o in below if o is not None and o.name in ("div", "mul", "select_n", "reduce_sum")), None)
    if inner is None or inner.name not in ("reduce_sum", "dot_general"):
        return ""
    what = "a norm of a zero vector or a standard deviation of equal numbers"
    return f": {what}; add an epsilon under the root, or guard it with `where` twice"


def _selected(history: History, node: Node) -> bool:
    """Whether the error signal that came to an operation passed through a `where` shortly before."""
    waiting = [(source, 0) for source in history.sources(node)]
    while waiting:
        source, steps = waiting.pop(0)
        op = history.maker(source.atom)
        if op is not None and op.name == "select_n":
            return True
        if op is not None and steps < 4 and len(waiting) < 50:
            waiting += [(before, steps + 1) for before in history.sources(source)]
    return False
