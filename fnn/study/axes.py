"""Axes of a study: which names they may have, and the one type of each; and options that are whole numbers."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fnn import check
from fnn.study import grid

FLOATS = ("sigma_w", "sigma_b", "learning_rate", "clip_threshold")
RESERVED = (
    *("cell", "step", "layer", "path", "role", "quantity", "value", "predicted", "low", "high", "outside"),
    "float64",
    "network",  # of the report
)
"""Columns of the table beside the axes: no argument of `build` may have such a name."""
LARGEST = 2**31 - 1
TYPES = {"int": int, "float": float, "bool": bool, "str": str}


def arguments(build: Callable[..., Any], given: Iterable[str]) -> dict[str, Any]:
    """List the arguments of a build function that are axes, with their defaults (`Parameter.empty` where there is none).

    `classes` is not an axis: the data say how many there are. An argument whose default is not a plain value (a function,
    an array) keeps its default, unless the grid has `given` it values.
    """
    found, empty = {}, inspect.Parameter.empty
    for name, parameter in parameters(build).items():
        if name in RESERVED:
            raise ValueError(
                f"study: an argument of build must not be named like a column of the tables, got {name!r}; rename it"
            )
        default: Any = parameter.default
        if name != "classes" and (default is empty or _is_plain(default) or name in given):
            one: dict[str, Any] = {name: default}
            found[name] = grid.product(**one).points[0][name] if _is_plain(default) else empty
    if "classes" in given:
        raise ValueError(
            "study: classes is not an axis, got it in the grid; take it out (the data say how many there are)"
        )
    return found


def hints(build: Callable[..., Any]) -> dict[str, type]:
    """Say which arguments are whole or real numbers, from their defaults or annotations: {name: int or float}."""
    found = {}
    for name, parameter in parameters(build).items():
        annotated = {"int": int, "float": float}.get(parameter.annotation, parameter.annotation)  # they may be strings
        kind = type(parameter.default) if type(parameter.default) in (int, float) else annotated
        if kind in (int, float):
            found[name] = kind
    return found


def kind_of(name: str, values: Iterable[Any], hint: type | None = None, traced: bool = False) -> str:
    """Name the one type of an axis's values: int, float, bool or str. Values may also be None.

    Whole numbers and decimals together are float; a traced axis is float unless its argument has the `hint` int; the seed
    is int. Errors: TypeError for a mix of other types, or a traced axis with values that are not numbers; ValueError for
    an integer outside int32, or a traced decimal outside float32's range.
    """
    values = list(values)
    kinds = {type(value) for value in values if value is not None}
    numeric = bool(kinds) and kinds <= {int, float}
    if (traced or name in FLOATS) and not (
        numeric or ((kinds == {bool} and name not in FLOATS) and None not in values)
    ):
        got = next(value for value in values if type(value) not in (int, float))
        raise TypeError(f"study: {name} must be a number, got {got!r}")
    if traced and None in values:
        raise TypeError(f"study: {name} must be a number, got None")
    if not numeric:
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"study: values of {name} must have one type, got {names}")
        return next(iter(kinds)).__name__ if kinds else "str"
    whole = all(not isinstance(value, float) or value.is_integer() for value in values)
    real = name in FLOATS or hint is float or not whole or (hint is not int and (float in kinds or traced))
    kind = "float" if real and name != "seed" else "int"
    for value in values:
        if value is not None:
            _check_range(name, value, kind, traced)
    return kind


def apart(frame: Any, names: Sequence[str], taken: Iterable[str]) -> tuple[Any, list[str]]:
    """Rename axes whose names are `taken` by columns of a new table: `rate` becomes `rate (axis)`."""
    renamed = {name: f"{name} (axis)" for name in names if name in set(taken)}
    return frame.rename(renamed), [renamed.get(name, name) for name in names]


def convert(kind: str, value: Any) -> Any:
    """Convert a value to the type of its axis: 1 to 1.0."""
    return value if value is None or type(value) is TYPES[kind] else TYPES[kind](value)


def whole_numbers(name: str, values: Any) -> list[int]:
    """List an option's whole numbers, one or several; they may be NumPy's or JAX's.

    Errors: TypeError for what is not an integer, ValueError for a negative one, one above int32, or more than `grid.MOST`.
    """
    if isinstance(values, str) or getattr(values, "shape", None) == () or not isinstance(values, Iterable):
        values = [values]
    if isinstance(values, Mapping):
        raise TypeError(f"study: {name} must be integers, got {type(values).__name__}; pass a list")
    found = [value.item() if getattr(value, "shape", None) == () else value for value in grid.listed(name, values)]
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"study: {name} must be an integer, or a list of them, got {value!r}")
        check.non_negative("study", **{name: value})
        if value > LARGEST:
            raise ValueError(f"study: {name} must be at most {LARGEST:,}, got {value:,}; choose a smaller one")
    return [int(value) for value in found]


def _check_range(name: str, value: float, kind: str, traced: bool) -> None:
    if kind == "int" and (abs(value) > LARGEST or (isinstance(value, float) and not value.is_integer())):
        raise ValueError(f"study: {name} must be an integer that fits in int32, got {value!r}; choose another value")
    dtype = jax.dtypes.canonicalize_dtype(np.float64) if traced else np.dtype(np.float64)
    info = np.finfo(dtype)
    if kind == "float" and value and not float(info.tiny) <= abs(value) <= float(info.max):
        raise ValueError(f"study: {name} must lie in {dtype}'s range, got {value!r}; choose another value")


def parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """List the parameters of a build function. Errors: TypeError for what is not a function, and for *, ** and /."""
    try:
        found = inspect.signature(build).parameters
    except (TypeError, ValueError):
        raise TypeError(f"study: build must be a function whose arguments are axes, got {build!r}") from None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in found.values()):
        raise TypeError("study: build must name each axis as an argument, got one with *, ** or /; write them out")
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float | np.generic)
