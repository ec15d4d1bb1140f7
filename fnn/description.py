"""What a net prints as: the calls that made it, `serial(dense(64), tanh, repeat(serial(...), 50), dense(10))`.

A constructor marked `described` writes its own call into the layer, without the arguments that have their default.
"""

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, Self, TypeVar

import numpy as np

from fnn import check

MOST = 500
"""How many characters a repr has at most."""


class _Describable(Protocol):
    def described(self, text: str) -> Self: ...


P = ParamSpec("P")
L = TypeVar("L", bound=_Describable)


def described(constructor: Callable[P, L]) -> Callable[P, L]:
    """Let a constructor of layers write its name and arguments into the layers that it makes."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def make(*args: P.args, **kwargs: P.kwargs) -> L:
        layer = constructor(*args, **kwargs)
        return layer.described(call(constructor.__name__, signature.bind(*args, **kwargs)))

    return make


def call(name: str, bound: inspect.BoundArguments) -> str:
    """Write a call, without the arguments that have their default: `dense(64, bias=False)`; `tap` without any."""
    shown: list[str] = []
    for parameter in bound.signature.parameters.values():
        value = bound.arguments.get(parameter.name, parameter.default)
        if parameter.kind is parameter.VAR_POSITIONAL:
            shown += _row(list(map(text, () if value is parameter.empty else value)))
        elif parameter.default is parameter.empty:
            shown.append(text(value))
        elif text(value) != text(parameter.default):
            shown.append(f"{parameter.name}={text(value)}")
    return f"{name}({', '.join(shown)})" if shown else name


def text(value: Any) -> str:
    """Write an argument: a layer by its description, a function by its name, arrays by their shapes."""
    if hasattr(value, "described"):
        return value.description or name_of(value.apply)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        inner = ", ".join(map(text, value)) + "," * (isinstance(value, tuple) and len(value) == 1)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic):
        return repr(value.item() if isinstance(value, np.generic) else value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return check.describe(value)
    if isinstance(value, np.dtype):
        return str(value)
    return name_of(value)


def name_of(function: Any) -> str:
    """Name a function: one that was made inside another one by that other one."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    known = getattr(function, "name", None)
    if isinstance(known, str) and not isinstance(function, types.FunctionType):
        return known  # an activation
    parts = str(getattr(function, "__qualname__", type(function).__name__)).split(".<locals>.")
    return parts[-2] if len(parts) > 1 else parts[0].rpartition(".")[2]


def shortened(whole: str, most: int = MOST) -> str:
    """Leave out what stands in the innermost brackets, `repeat(…, 50)`, until the text is short enough."""
    depths = list(itertools.accumulate((c in "([{") - (c in ")]}") for c in whole))
    for deepest in range(max(depths, default=0), 0, -1):
        if len(whole) <= most:
            break
        whole = _without(whole, deepest)
    return whole if len(whole) <= most else f"{whole[: most // 2 - 2]} … {whole[2 - most // 2 :]}"


def _without(whole: str, deepest: int) -> str:
    """Replace what is in brackets at some depth or deeper by one sign each, unless it is short."""
    shown, inner = "", ""
    depth = 0
    for c in whole:
        depth -= c in ")]}"
        if depth < deepest:
            shown += ("…" if len(inner) > 6 else inner) + c
            inner = ""
        else:
            inner += c
        depth += c in "([{"
    return shown


def _row(texts: list[str]) -> list[str]:
    """Write three or more equal ones in a row as `*[block] * n`."""
    runs = [(one, len(list(run))) for one, run in itertools.groupby(texts)]
    return [part for one, n in runs for part in ([f"*[{one}] * {n}"] if n > 2 else [one] * n)]
