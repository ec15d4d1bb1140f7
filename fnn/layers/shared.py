"""One set of parameters for several places of a net: `shared`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

from fnn import check
from fnn.core import Layer, as_arrays, as_spec
from fnn.description import text
from fnn.inside import apply_at, located


class _Mark:
    """Stands for one call of `shared`."""


_BOUND: ContextVar[Mapping[_Mark, Any]] = ContextVar("fnn.shared", default={})  # noqa: B039 (it is never written to)
"""The parameters of shared layers, while the nets that use them are traced."""


def shared(layer: Layer, build: Callable[[Callable[..., Layer]], Layer]) -> Layer:
    """Build a net in which a layer stands in several places with one set of parameters: `build(use) -> net`.

        fnn.shared(fnn.dense(64), lambda use: fnn.serial(use(), fnn.activation("tanh"), use(), fnn.dense(10)))

    Each `use()` is that layer; `use(apply)` is another function `apply(params, x) -> y` of the same parameters, such as
    the transposed `lambda params, x: x @ params["kernel"].T` of an autoencoder. Uses may stand inside `repeat`, `residual`,
    branches and other shared layers. Params: {"shared": the layer's, "rest": the net's}, so that a gradient is the sum
    over all uses, and clips and optimisers see the shared arrays once. Each use has a state of its own, at its place in
    state["rest"]: batch norms share scale and bias, and each counts its own statistics.

    A use reads the parameters while the whole net is applied: compile the net, never `use().apply` alone (`jax.jit` would
    keep the parameters of its first call). The layer is drawn for the input of its first `use()`. An embedding that is also the output layer: `fnn.tied`.
    Errors: ValueError if build has no `use()`, or if a use stands outside the net that build returns.
    """
    if not isinstance(layer, Layer) or not callable(build):
        got = f"{check.describe(layer)} and {check.describe(build)}"
        raise TypeError(
            f"shared: needs a Layer and a function use -> net, got {got}; pass lambda use: serial(use(), ...)"
        )
    mark = _Mark()

    def use(apply: Callable[[Any, Any], Any] | None = None) -> Layer:
        return _use(mark, layer, apply)

    net = build(use)
    if not isinstance(net, Layer):
        raise TypeError(f"shared: build must return a Layer, got {check.describe(net)}; return fnn.serial(...)")

    def init(key, spec):
        spec = as_spec(spec)
        own, rest = jax.random.split(key)
        seen: list[Any] = []
        with _bound(mark, seen), located("rest", spec):
            jax.eval_shape(lambda key: net.init(key, spec), rest)  # not net.init itself, whose trace JAX would keep
        if not seen:
            raise ValueError("shared: the net must use the layer, got no use() in it; put use() where it belongs")
        params = layer.init(own, seen[0])[0]
        with _bound(mark, params), located("rest", spec):
            inner, state = net.init(rest, spec)
        return {"shared": params, "rest": inner}, {"shared": (), "rest": state}

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        given = params["rest"], state["rest"], as_arrays(x)
        with _bound(mark, params["shared"]):
            y, inner = apply_at("rest", net, *given, key=key, train=train, axis_name=axis_name)
        return y, {"shared": (), "rest": inner}

    return Layer(init, apply, f"shared({text(layer)}, {text(net)})")


def _use(mark: _Mark, layer: Layer, other: Callable[[Any, Any], Any] | None) -> Layer:
    def init(key, spec):
        found, spec = _parameters(mark), as_spec(spec)
        if isinstance(found, list) and other is None:
            found.append(spec)
        if other is not None or not jax.tree.leaves(state := jax.eval_shape(lambda k: layer.init(k, spec)[1], key)):
            return (), () if other is not None else state
        return (), layer.init(key, spec)[1]

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        found = _parameters(mark)
        if isinstance(found, list):  # `init` looks for the first use: its parameters are not drawn yet
            if not found:
                raise ValueError(
                    "shared: the first use must be use(), got use(apply), whose input does not tell the shapes"
                )
            found = layer.init(jax.random.key(0), found[0])[0]
        if other is not None:
            return other(found, as_arrays(x)), state
        return layer.apply(found, state, x, key=key, train=train, axis_name=axis_name)

    return Layer(init, apply, "use" if other is None else f"use({text(other)})")


@contextmanager
def _bound(mark: _Mark, value: Any) -> Iterator[None]:
    token = _BOUND.set({**_BOUND.get(), mark: value})
    try:
        yield
    finally:
        _BOUND.reset(token)


def _parameters(mark: _Mark) -> Any:
    try:
        return _BOUND.get()[mark]
    except KeyError:
        raise ValueError(
            "shared: a use() must stand inside the net that build returns, got one outside; call fnn.shared around both"
        ) from None
