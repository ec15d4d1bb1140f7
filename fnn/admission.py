"""Checks that a net, a loss, an optimiser and a state fit together, made once, while a train step is traced."""

import contextlib
import re
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fnn import check, losses, tree
from fnn.arrays import Batch, array, brief, first_line, is_numbers
from fnn.core import Layer, as_spec

Optimizer = optax.GradientTransformation | optax.MultiSteps
UNSUPPORTED = {
    "SAMState": "it moves the parameters away from where they are measured, every second step; pass opaque_mode=True",
    "LookaheadState": "it needs two sets of parameters; pass fnn.optimizers.lookahead(...), which keeps the slow ones",
}
"""Optimisers that would run here but not do what they promise, by the class of their state."""

_MADE: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The shapes that each net's `init` makes: tracing a deep net's `init` again takes long."""


def net(who: str, layer: Any) -> None:
    """Refuse what is not a `Layer`."""
    if not isinstance(layer, Layer):
        got = getattr(layer, "__name__", None) or f"an object of {type(layer).__module__}.{type(layer).__name__}"
        raise TypeError(
            f"{who}: net must be a Layer, a pair of init(key, spec) and apply(params, state, x, ...), got {got}; wrap a "
            "function of x in fnn.activation, one with parameters in fnn.stateless(init, apply)"
        )


def loss(who: str, function: Any) -> None:
    """Refuse what is not a function `(outputs, targets) -> float[batch]`."""
    if not callable(function):
        known = isinstance(function, str) and isinstance(getattr(losses, function, None), losses.Loss)
        hint = f"pass fnn.losses.{function if known else 'cross_entropy'}"
        raise TypeError(f"{who}: loss must be a function (outputs, targets) -> float[batch], got {function!r}; {hint}")


def penalty(function: Any) -> Any:
    """Wrap a function of the parameters; refuse results that are not one float."""

    def checked(params):
        value = function(params)
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            got = check.describe(jnp.asarray(value))
            raise ValueError(f"train_step: penalty must return one float, got {got}; sum over the parameters")
        return value

    return checked


def optimizer(who: str, given: Any) -> None:
    """Refuse what is not an optax transformation."""
    if not (hasattr(given, "init") and hasattr(given, "update")) or isinstance(given, type):
        called = f"; call it: {given.__name__}(...)" if callable(given) and hasattr(given, "__name__") else ""
        got = getattr(given, "__name__", None) or repr(given)
        raise TypeError(
            f"{who}: optimizer must be an optax transformation, got {got}{called or '; pass optax.adam(1e-3)'}"
        )


def optimizer_state(who: str, state: Any) -> None:
    """Refuse the states of optimisers in `UNSUPPORTED`."""

    def refused(node):
        return type(node).__name__ in UNSUPPORTED and getattr(node, "cache", node) is not None  # opaque SAM has none

    for node in filter(refused, jax.tree.leaves(state, is_leaf=refused)):
        name = type(node).__name__
        raise ValueError(f"{who}: the optimizer must keep one set of parameters, got {name}: {UNSUPPORTED[name]}")


def update(who: str, tx: Any, grads: Any, state: Any, params: Any, **more: Any) -> tuple[Any, Any]:
    """Call `tx.update`; refuse an optimiser that fails, and say what it asks for in vain."""
    try:
        return tx.update(grads, state, params, **more)
    except Exception as error:
        if re.match(r"[\w.]+: ", str(error)):
            raise  # an error of fnn's own
        asked = re.findall(r"'(\w+)'", str(error)) if "required keyword-only" in str(error) else []
        if not asked:
            raise ValueError(
                f"{who}: the optimizer must turn these gradients into updates, under jit, got {type(error).__name__} "
                f"({first_line(error)}); check its options, and whether it is meant for single examples' gradients"
            ) from error
        raise ValueError(
            f"{who}: the optimizer must need only what it is offered ({', '.join(more)}), got one that asks for "
            f"{', '.join(asked)}; inside of MultiSteps only gradients are averaged, and nothing else is offered"
        ) from error


def made(layer: Layer, params: Any, net_state: Any) -> None:
    """Remember the shapes that a net's `init` made, so that `state` need not trace it."""
    with contextlib.suppress(TypeError):  # an `init` that takes no weak reference
        _MADE[layer.init] = (_shapes(params), _shapes(net_state))


def state(who: str, layer: Layer, params: Any, net_state: Any, x: Any) -> None:
    """Refuse parameters and a state with other names or shapes than the net's own `init` makes for such an x."""
    has = _shapes(params), _shapes(net_state)
    try:
        if _MADE.get(layer.init) == has:
            return
        spec = as_spec(x)
        expected = jax.eval_shape(lambda key: layer.init(key, spec), jax.random.key(0))
    except Exception:
        return  # the net does not take this x, and its own error is clearer
    for what, mine, theirs in zip(("parameters", "state"), has, map(_shapes, expected), strict=True):
        if found := _difference(mine, theirs):
            raise ValueError(
                f"{who}: the {what} must be this net's, got {found}; make the state with TrainState.create of this net"
            )
    made(layer, params, net_state)


def optimizer_state_of(who: str, tx: Any, params: Any, opt_state: Any) -> None:
    """Refuse the state of another optimiser, or of this one for other parameters."""
    try:
        expected = jax.eval_shape(tx.init, as_spec(params))
    except Exception:
        return  # it looks at values
    optimizer_state(who, expected)
    found = _difference(_shapes(opt_state), _shapes(expected))
    if found or jax.tree.structure(opt_state) != jax.tree.structure(expected):
        raise ValueError(
            f"{who}: the optimizer's state must be that of the step's optimizer, got {found or 'another one'}; make the "
            "state with TrainState.create of the optimizer that train_step was given"
        )


def examples(who: str, batch: Batch) -> None:
    """Refuse batches without an example, or whose arrays disagree on how many there are."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{who}: x and y must hold the same number of examples on their first axes, got {check.describe(batch)}"
        )
    if shapes[0][0] == 0:
        raise ValueError(f"{who}: a batch must hold at least one example, got none, {check.describe(batch)}; skip it")


def parts(who: str, state: Any) -> tuple[Any, Any]:
    """Return (params, state) from a `TrainState` or a pair; refuse anything else, and arrays that a step was donated."""
    if hasattr(state, "params"):
        params, net_state = state.params, state.net_state
    elif isinstance(state, tuple | list) and len(state) == 2:
        params, net_state = state
    else:
        raise TypeError(f"{who}: state must be a TrainState or a pair (params, state), got {brief(state)}")
    check.alive(who, params, net_state)
    return params, net_state


def example(who: str, spec: Any) -> Any:
    """Return the specs of an example batch, or specs as they are."""
    if not is_numbers(spec) or not any(map(is_numbers, spec)):  # a flat list of numbers is probably a shape
        leaves = jax.tree.leaves(spec)
    else:
        leaves = [spec := array(who, "spec", spec)]
    if not leaves or any(isinstance(leaf, int) for leaf in leaves):
        got = brief(spec)
        raise TypeError(
            f"{who}: spec must be an example batch or its jax.ShapeDtypeStruct, got {got}; pass x[:1] of the data"
        )
    return as_spec(jax.tree.map(lambda a: a if isinstance(a, jax.ShapeDtypeStruct) else array(who, "spec", a), spec))


def _shapes(tree_: Any) -> dict[str, tuple[int, ...]]:
    return {path: jnp.shape(leaf) for path, leaf in zip(tree.paths(tree_), jax.tree.leaves(tree_), strict=True)}


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Describe the first array in which two trees differ."""
    for path, shape in theirs.items():
        if path not in mine:
            return f"none at {path}, where {list(shape)} should be"
        if mine[path] != shape:
            return f"{list(mine[path])} at {path}, where {list(shape)} should be"
    extra = next((path for path in mine if path not in theirs), None)
    return None if extra is None else f"one too many at {extra}, {list(mine[extra])}"
