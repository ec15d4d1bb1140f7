"""Mark a loss where its layers are: statistics of values where they are made, names for the error signals that come back."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fnn.gradients import forward_range, reductions
from fnn.gradients.labels import MARK, Options, Subject
from fnn.gradients.operations import Hook, Hooks, Program, Remat
from fnn.gradients.places import Place
from fnn.gradients.softmax import Softmax


def statistics(options: Options, subject: Subject, dtypes: dict[int, Any], special: dict[str, Any] | None) -> Hooks:
    """Take what is wanted of each layer's input and output, and mark where its error signal comes back.

    `dtypes` gets the types of the values whose range is watched; `special` is as in `_traced`.
    """
    found = subject.found
    hooks: Hooks = {}
    taken: dict[str, Hook] = {}

    def take(known, function, variable):
        if known not in taken:
            taken[known] = functools.partial(_seen, known, function, options.axis_name, special)
            hooks[variable] = both(hooks.get(variable), taken[known])

    for i, place in enumerate(found.places):
        if "error" in options.groups:
            hooks[place.product] = both(functools.partial(_mark_hook, f"{MARK}{i}"), hooks.get(place.product))
    for place in found.places:
        for variable, units, bounds in (
            (place.input, place.units[0], place.bounds),
            (place.output, place.units[1], (None, None)),
        ):
            held = variable == place.input  # what a product takes is in memory
            for name, function in _wanted(options, units, bounds, held) if variable is not None else ():
                take(f"{name}.{variable}", function, variable)
    for place in subject.every:
        for variable in (place.input, place.output):
            if f"moments.{variable}" not in taken and variable == place.output:
                take(f"order.{variable}", forward_range.order, variable)
            if variable is not None and {f"moments.{variable}", f"order.{variable}"} & set(taken):
                dtypes[variable] = made(subject.forward, place, variable).dtype
    for i, softmax in enumerate(found.softmaxes if "attention" in options.groups else []):
        take(f"attention.{i}", functools.partial(_attention, softmax), softmax.logits)
    return hooks


def _wanted(options: Options, units: Any, bounds: Any, held: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    if "activation" in options.groups:
        yield "moments", lambda x, axis_name: reductions.moments(x, units, axis_name, held)
    if "kurtosis" in options.groups:
        yield "central", reductions.central
    if "rank" in options.groups and units is not None:
        yield "rank", lambda x, axis_name: reductions.rank(x, units, axis_name)
    known = next(filter(None, bounds), None)
    if "saturated" in options.groups and known is not None:
        yield "saturated", lambda x, axis_name: reductions.saturated(x, known, axis_name)


def _attention(softmax: Softmax, x: jax.Array, axis_name: Any) -> dict[str, jax.Array]:
    return reductions.attention(x, softmax.axis, softmax.heads, axis_name)


def _seen(
    name: str, function: Callable[..., Any], axis_name: Any, special: dict[str, Any] | None, x: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    def call(x):
        return function(x, axis_name)

    if special is not None:
        special[f"fnn.seen.{name}"] = call
        call = jax.jit(_standing_for(f"fnn.seen.{name}", call))
    return x, {name: call(jax.lax.stop_gradient(x))}


def _standing_for(name: str, call: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Make a function of results of the same form, which all need its argument: JAX takes nothing out of it."""

    def stand_in(x):
        one = jnp.sum(x)
        return jax.tree.map(lambda spec: jnp.broadcast_to(one.astype(spec.dtype), spec.shape), jax.eval_shape(call, x))

    stand_in.__name__ = name
    return stand_in


def both(first: Hook | None, second: Hook | None) -> Hook:
    if first is None or second is None:
        return first or second  # type: ignore[return-value]

    def hook(x):
        x, a = first(x)
        x, b = second(x)
        return x, a | b

    return hook


def _mark_hook(name: str, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    return _mark(name, x), {}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mark(name: str, x: jax.Array) -> jax.Array:
    """Do nothing, and give the cotangent a name in the program of the gradient."""
    return x


_mark.defvjp(lambda name, x: (x, None), lambda name, _, d: (checkpoint_name(d, name),))


def made(part: Program, place: Place, variable: int) -> Any:
    """Look up the shape and dtype of a value where it is made, inside loops too."""
    for turn in place.turns:
        part = turn.loop.body
    waiting = [part]
    while waiting:
        inner = waiting.pop()
        if variable in inner.avals:
            return inner.spec(variable)
        waiting += [op.body for op in inner.ops if isinstance(op, Remat)]
    raise AssertionError(f"marks: {place.op.name} stands in no program that was read")
