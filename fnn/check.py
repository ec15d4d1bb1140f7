"""Validators: every refusal reads *who: the rule, what it got, what to do*.

The keyword under which a value is passed becomes its name in the message:
`positive("dense", width=-3)` raises `dense: width must be a positive integer, got -3`.
"""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import TraceContextError


def describe(x: object) -> str:
    """Write a tree of arrays as `float32[64,10]`, other leaves by their type; what has a `short_repr` by that."""

    def one(a):
        if hasattr(a, "short_repr"):
            return repr(a)
        if hasattr(a, "shape") and hasattr(a, "dtype"):
            return f"{a.dtype}[{','.join(map(str, a.shape))}]"
        return type(a).__name__

    text = str(jax.tree.map(one, x, is_leaf=lambda a: isinstance(a, Iterator) or hasattr(a, "short_repr")))
    return text.replace("'", "")


def contents(tree: object, blocks: int | None = None) -> str:
    """Say how many numbers a tree holds, in how many arrays of which dtypes: `4,160 numbers in 2 arrays float32`.

    With `blocks`, those of one of so many blocks. What is no array counts as one, by its type.
    """
    leaves = jax.tree.leaves(tree)
    kinds = dict.fromkeys(str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves)
    n = sum(math.prod(getattr(leaf, "shape", ())) for leaf in leaves) // (blocks or 1)
    return f"{n:,} numbers in {len(leaves)} arrays {', '.join(kinds)}" if leaves else "nothing"


def positive(who: str, **values: Any) -> None:
    """Refuse what is not an integer of at least 1."""
    _each(who, values, numbers.Integral, lambda v: v >= 1, "be a positive integer")


def non_negative(who: str, **values: Any) -> None:
    """Refuse what is not an integer of at least 0."""
    _each(who, values, numbers.Integral, lambda v: v >= 0, "be an integer of at least 0")


def fraction(who: str, **values: Any) -> None:
    """Refuse a number outside [0, 1). Traced numbers pass: their range is the caller's responsibility."""
    _each(who, values, numbers.Real, lambda v: 0 <= v < 1, "lie in [0, 1)")


def above_zero(who: str, **values: Any) -> None:
    """Refuse a number that is not finite and greater than zero. Traced numbers pass."""
    _each(who, values, numbers.Real, lambda v: 0 < v < math.inf, "be a finite number above 0")


def at_least_zero(who: str, **values: Any) -> None:
    """Refuse a number that is not finite and zero or greater. Traced numbers pass."""
    _each(who, values, numbers.Real, lambda v: 0 <= v < math.inf, "be finite and at least 0")


def number(who: str, *, low: float = 0, high: float = 1e100, **values: Any) -> float:
    """Return one number as a float on the host; refuse what is no number, or lies outside [low, high] (1e100: finite)."""
    ((name, value),) = values.items()
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{who}: {name} must be a number, got {value!r}; pass a float") from None
    if not low <= result <= high:
        rule = f"at least {low}" if high > 1e99 else f"between {low} and {high}"
        raise ValueError(f"{who}: {name} must be {rule}{' and finite' if high == 1e100 else ''}, got {value!r}")
    return result


def choice(who: str, options: Iterable[str], **values: object) -> None:
    """Refuse a name that is not among the options, and suggest the nearest one."""
    options = list(options)
    for name, value in values.items():
        if value not in options:
            near = difflib.get_close_matches(str(value), [str(o) for o in options], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(map(str, options))}"
            raise ValueError(f"{who}: unknown {name} {value!r}; {hint}")


def as_int32(a: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Cast an array of integers (NumPy's or JAX's) to int32; numbers outside int32 become its smallest or largest.

    Comparing with -1, or with the number of classes, then gives the same answer for every integer dtype. (In uint8, -1
    would be 255.)
    """
    lowest, highest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    info = jnp.iinfo(a.dtype)
    if info.min < lowest or info.max > highest:
        of: Any = np if isinstance(a, np.ndarray | np.generic) else jnp
        a = of.clip(a, max(info.min, lowest), min(info.max, highest))
    return a.astype(jnp.int32)


def prng_key(who: str, key: Any, name: str = "key") -> None:
    """Refuse what is not one PRNG key, from `jax.random.key` or `jax.random.PRNGKey`. Traced keys pass."""
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and shape == ()
    raw = isinstance(key, np.ndarray | jax.Array) and dtype == np.uint32 and shape in ((2,), (4,))
    if not (typed or raw):
        got = describe(key) if shape is not None and dtype is not None else repr(key)
        raise TypeError(f"{who}: {name} must be one PRNG key, got {got}; pass jax.random.key(0)")


def parameters(who: str, params: Any, *, trained: bool = True) -> None:
    """Refuse parameters that are not real arrays; if they are to be `trained`, they must also be floating."""
    for entries, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None) if not isinstance(leaf, float) else np.dtype(np.float32)
        imaginary = isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.complexfloating)
        real = isinstance(dtype, np.dtype) and not imaginary and (not trained or jnp.issubdtype(dtype, jnp.floating))
        if real and np.dtype(dtype).isnative:
            continue
        path = jax.tree_util.keystr(entries, simple=True, separator="/")
        if real:
            raise ValueError(
                f"{who}: params must be in this machine's byte order, got {dtype} at {path or 'the root'}; use "
                'a.astype(a.dtype.newbyteorder("="))'
            )
        if imaginary:
            hint = "keep real and imaginary parts as two arrays"
        else:
            hint = (
                "split the model into its floating arrays and the rest, and join the two in the loss: "
                "equinox.partition(model, equinox.is_inexact_array), or nnx.split(model, nnx.Param, ...)"
            )
        got = describe(leaf) if dtype is not None else getattr(leaf, "__name__", type(leaf).__name__)
        raise TypeError(f"{who}: params must be real floating arrays, got {got} at {path or 'the root'}; {hint}")


def scalar_loss(who: str, out: Any, has_aux: bool | None = False, name: str = "the loss") -> Any:
    """Return what a loss returned, with `has_aux` a pair (value, aux); refuse a value that is not one float.

    `has_aux` is None where there is no such option.
    """
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"{who}: with has_aux=True {name} must return (value, aux), got {describe(out)}")
    value = out[0] if has_aux else out
    if not isinstance(value, float | np.ndarray | np.generic | jax.Array):
        known = "wrap it to return the first alone" if has_aux is None else "pass has_aux=True if the rest is auxiliary"
        hint = known if isinstance(out, tuple) else "return an array"
        raise ValueError(f"{who}: {name} must be one float, got {describe(value)}; {hint}")
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        got = describe(jnp.asarray(value))
        raise ValueError(f"{who}: {name} must be one float, got {got}; average over the batch")
    return out


def alive(who: str, *trees: Any) -> None:
    """Refuse arrays that were donated to an earlier step, so that their memory is gone."""

    def gone(leaf):
        try:
            return isinstance(leaf, jax.Array) and leaf.is_deleted()
        except jax.errors.ConcretizationTypeError:
            return False  # traced

    if any(map(gone, jax.tree.leaves(trees))):
        raise ValueError(
            f"{who}: the state must still have its arrays, got one that was donated to an earlier step; go on with the state "
            "that the step returned, or pass the step a copy: jax.tree.map(jnp.copy, state)"
        )


@contextmanager
def donated_once(who: str) -> Iterator[None]:
    """Explain in a sentence why XLA refuses to donate a state that holds one array in two places."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if "donate the same buffer" not in str(error):
            raise
        raise ValueError(
            f"{who}: each array of the state must be in one place, got one in two; pass a copy: jax.tree.map(jnp.copy, state)"
        ) from error


@contextmanager
def foreign(who: str) -> Iterator[None]:
    """Explain in a sentence why a model of another library (Flax NNX) cannot be traced."""
    try:
        yield
    except TraceContextError as error:
        raise ValueError(
            f"{who}: the function must not change variables that were made outside of it, got an NNX module that does (batch "
            "norm statistics, random counters); merge a copy inside: nnx.merge(graphdef, params, rest, copy=True)"
        ) from error


def _each(who: str, values: dict[str, Any], kind: type, rule: Callable[[Any], Any], words: str) -> None:
    """Refuse values of another type with a TypeError, and those of the right type outside the rule with a ValueError."""
    for name, value in values.items():
        array = isinstance(value, np.ndarray | jax.Array)
        number = isinstance(value, kind) and not isinstance(value, bool)
        try:
            good = (number or (array and value.ndim == 0 and kind is numbers.Real)) and bool(rule(value))
        except jax.errors.ConcretizationTypeError:
            good = True  # traced
        if not good:
            raise (ValueError if number or array else TypeError)(f"{who}: {name} must {words}, got {value!r}")
