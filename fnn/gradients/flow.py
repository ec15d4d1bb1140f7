"""`gradient_flow`: true log norms of error signals and gradients, layer by layer, finite at any depth."""

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import admission, arrays, check, compiled, losses, tree
from fnn.core import Layer, as_arrays, output_shape, output_spec
from fnn.gradients.numbers import Label, Numbers, Verdict, disagreement, resolve, settle
from fnn.layers import taps
from fnn.layers.precision import compute_in
from fnn.layers.taps import Row, TapState
from fnn.tree import Stacked

__all__ = ["GradientFlow", "Label", "Numbers", "check_scales", "gradient_flow", "resolve", "settle"]


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` measured: `rows`, one number each, and the usual profiles as arrays over layers.

    Layers are counted from the input, 1 being the first. A layer is a group of arrays side by side (of one dict) that
    holds a weight, an array of two axes or more that is not called bias or scale: a dense or convolutional layer, an
    embedding, a recurrent cell with its two kernels. Norms and gains belong to the layer before them.

    Quantities, logs being natural: `log_error` at every tap, of the root mean over examples of |d l_i/dh|; `log_kernel`,
    `log_bias`, ..., of the Frobenius norm of the mean loss's gradient, and `log_kernel_rms`, ..., of its root mean square;
    `mean`, `second_moment`, `peak`, `dead`, `saturated` of the values that pass a tap on the way forward.
    """

    rows: list[Row]
    loss: float
    weights: tuple[str, ...] = ("log_kernel",)
    """The quantities that belong to the layers' weights."""
    precision: str = "float32"
    """The float type of the measurement: float64 where the net's own would have been left."""
    note: str = ""
    """Why it was measured in float64, or which numbers are NaN because not even that reached; "" for neither."""

    def profile(self, *quantities: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (layers, values); where a layer has several rows of the quantities, the first in forward order."""
        first: dict[int, float] = {}
        for row in self.rows:
            if row.quantity in quantities:
                first.setdefault(row.layer, row.value)
        return np.array(sorted(first), int), np.array([first[layer] for layer in sorted(first)])

    @property
    def error(self) -> np.ndarray:
        """log_error by layer, at the first tap after each layer's weights."""
        return self.profile("log_error")[1]

    @property
    def kernel(self) -> np.ndarray:
        """Log norm of the gradient of each layer's weights, log_kernel in fnn's layers."""
        return self.profile(*self.weights)[1]

    @property
    def bias(self) -> np.ndarray:
        """log_bias by layer (the first bias of the layer: that of the kernel)."""
        return self.profile("log_bias")[1]

    def __str__(self) -> str:
        names = ("log_error", "log_kernel", "log_bias", "second_moment", "dead", "saturated")
        profiles = {name: self.profile(*(self.weights if name == "log_kernel" else [name])) for name in names}
        columns = {name: dict(zip(*profile, strict=True)) for name, profile in profiles.items()}
        columns = {name: column for name, column in columns.items() if column}
        layers: list[int | None] = [*sorted({row.layer for row in self.rows})]
        more = len(layers) - 24
        if more > 0:
            layers = [*layers[:12], None, *layers[-12:]]
        lines = [self.note] if self.note else []
        lines += [f"loss {self.loss:.6g}", "layer  " + "  ".join(f"{name:>13}" for name in columns)]
        for layer in layers:
            if layer is None:
                lines.append(f"  ... {more} more")
                continue
            cells = (f"{c[layer]:13.5g}" if layer in c else " " * 13 for c in columns.values())
            lines.append(f"{layer:5d}  " + "  ".join(cells))
        return "\n".join(lines)


def gradient_flow(
    net: Layer,
    state: Any,
    batch: tuple[Any, Any],
    *,
    loss: Callable[[Any, Any], Any] = losses.cross_entropy,
    train: bool = True,
    key: Any = None,
    compute_dtype: Any = None,
) -> GradientFlow:
    """Measure log |dL/dh| at every tap and log |dL/dW| of every parameter, L being the mean loss of a batch.

    Its seven arguments are those of `evaluate`, and two more for a net in training mode.

    `state` is a `TrainState` or a pair (params, state). With `train=True` (what training sees) batch norm uses the
    batch's statistics and dropout needs a key; `compute_dtype` is that of `train_step`. The cotangent is rescaled at every
    tap of the trunk, so that norms of 1e-10000 come out as finite logs in float32: put a tap into every block
    (`models.mlp(..., taps=True)`). The log of a zero gradient is -inf, of a non-finite one NaN or inf.

    If a signal comes near an end of the range of the net's float type, or a gradient is zero, everything is measured again
    with parameters, state and batch in float64; `precision` and `note` of the result say so. What leaves float64 too is
    NaN, with a warning that names the layer; a `second_moment` of which only the squares leave it is NaN without a warning.
    Every measurement is made a second time with other scales, which must drop out. Equal nets share one compiled program.

    Errors: ValueError if no tap lies on the trunk; if a tap is passed more than once (a weight is used on both sides of
    it), where one scale cannot be undone; if the paths of two taps meet again in a combinator that does not say so by
    `core.Branch`.
    """
    admission.net("gradient_flow", net)
    admission.loss("gradient_flow", loss)
    params, net_state = admission.parts("gradient_flow", state)
    check.parameters("gradient_flow", params)
    if key is not None:
        check.prng_key("gradient_flow", key)
    x, y = as_arrays(arrays.pair("gradient_flow: the batch", batch))
    admission.examples("gradient_flow", (x, y))
    admission.state("gradient_flow", net, params, net_state, x)
    plain, net = net, compute_in(net, compute_dtype)
    if not _rescales(params, net_state):
        raise ValueError(
            "gradient_flow: the trunk must hold a tap, got none (taps inside residual and parallel branches cannot "
            "rescale); put fnn.tap() between the blocks, or build the model with taps=True"
        )
    losses.check_targets(loss, output_shape(net, params, net_state, x), y)
    dtype, note = _narrowest((x, params)) if compute_dtype is None else jnp.dtype(compute_dtype), ""
    arguments: Any = (net, loss, train, params, net_state, x, y, key)
    measured = jax.device_get(measure(*arguments))
    numbers, verdict = settle(measured, params, dtype=dtype)
    wider, hint = nullcontext(), "use fewer layers, or weights nearer to their critical scale"
    if verdict.strained and dtype != jnp.float64:
        try:
            with jax.enable_x64(True):
                wide: Any = (plain, loss, train, *_cast(as_arrays((params, net_state, x, y)), jnp.float64), key)
                if output_spec(plain, *wide[3:6]).dtype != jnp.float64:
                    raise TypeError("it casts to another type itself")
                again = jax.device_get(measure(*wide))
        except (TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            hint = f"let the net compute in the dtype of its input, for in float64 it cannot be measured ({reason})"
        else:
            what = "left" if verdict.first else "came near an end of"
            note = f"measured in float64: the signal {what} the range of {dtype}{_place(verdict)}"
            arguments, measured, dtype, wider = wide, again, jnp.dtype(jnp.float64), jax.enable_x64(True)
            numbers, verdict = settle(measured, params)
    with wider:
        check_scales(*arguments, measured=measured)
    if verdict.left:
        note = f"the signal left the range of {dtype}{_place(verdict)}, and what depends on it is NaN; {hint}"
        warnings.warn(f"gradient_flow: {note}", stacklevel=2)
    rows = [
        Row(label.layer, label.path, label.quantity, float(value), label.role)
        for label, value in zip(numbers.labels, numbers.values, strict=True)
    ]
    return GradientFlow(rows, float(measured["loss"]), numbers.weights, str(dtype), note)


def check_scales(
    net: Layer, loss: Any, train: bool, params: Any, state: Any, x: Any, y: Any, key: Any, *, measured: Any = None
) -> None:
    """Refuse a net in which cotangents of different scales meet: measure again with other scales, and compare.

    The program is the same, the scales are an input of it. Its arguments are those of `measure`. Errors: ValueError that names the first place on the way back
    where they do not drop out.
    """
    if not _rescales(params, state):
        return
    rng, used = np.random.default_rng(0), []

    def shift(node):
        if not isinstance(node, TapState):
            return node
        shape = jnp.shape(node.backward.exponent)
        while len(used) < np.prod(shape):  # numbers of neighbours differ, for those of paths that meet have to
            used.extend(rng.permutation([n for n in range(-8, 9) if n]))
        drawn, used[: int(np.prod(shape))] = np.array(used[: int(np.prod(shape))], float).reshape(shape), []
        exponent = jnp.asarray(drawn, node.backward.exponent.dtype)
        return dataclasses.replace(node, backward=node.backward._replace(exponent=exponent))

    first = jax.device_get(measure(net, loss, train, params, state, x, y, key)) if measured is None else measured
    shifted = jax.tree.map(shift, state, is_leaf=lambda node: isinstance(node, TapState))
    again = jax.device_get(measure(net, loss, train, params, shifted, x, y, key))
    if path := disagreement(resolve(first, params), resolve(again, params), np.asarray(first["loss"]).dtype):
        raise ValueError(
            f"gradient_flow: the taps that rescale must lie one behind the other, got paths of different scales that "
            f"meet again, or a backward pass that is not linear, around {path}; where a combinator of your own splits "
            "a path (y = f(x) + g(x)), let it wrap its state in fnn.core.Branch, or put its taps outside"
        )


def measure(net: Layer, loss: Any, train: bool, params: Any, state: Any, x: Any, y: Any, key: Any) -> dict[str, Any]:
    """Do the device's part of `gradient_flow`; may be mapped over params, state and key by `vmap`.

    Each array is an argument of its own, and so eight, since `vmap` maps over some and not over others.

    Returns the logs of the rescaled norms in `logs` (like params) and in `taps`, the taps' cotangents. The powers of two
    that each must be multiplied with stand in `exponents`, and in `taps` as well. They are added on the host, in float64:
    in float32 a log of -30,000 has no digit to spare.
    """
    return compiled.call(_measure, (net, loss, train), params, state, x, y, key)


def _measure(*arguments: Any) -> dict[str, Any]:
    return differentiate(*arguments)[0]


def differentiate(
    net: Layer, loss: Any, train: bool, params: Any, state: Any, x: Any, y: Any, key: Any
) -> tuple[dict[str, Any], Any]:
    """Do `measure`, with its arguments, and return the gradient too, as the taps rescaled it: to be multiplied by 2^exponents."""

    def objective(params, state):
        with check.foreign("gradient_flow"):
            outputs, new = net.apply(params, state, x, key=key, train=train)
            return jnp.mean(loss(outputs, y)), new

    marked = taps.rescaling(params, state)
    (value, new), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, marked)
    zero = jnp.zeros((), jnp.float32)
    exponents, news, _ = _accumulate(gradients[0], gradients[1], zero)
    logs = tree.log_norms(gradients[0])
    return {"loss": value, "logs": logs, "exponents": exponents, "taps": news, "state": new}, gradients[0]


def _rescales(params: Any, state: Any) -> bool:
    leaves = jax.tree.leaves(taps.rescaling(params, state), is_leaf=lambda node: isinstance(node, TapState))
    return any(isinstance(leaf, TapState) and leaf.rescale for leaf in leaves)


def _narrowest(values: Any) -> Any:
    """Find the float type whose range ends first."""
    kinds = {leaf.dtype for leaf in jax.tree.leaves(values) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return max(kinds, key=lambda kind: float(jnp.finfo(kind).tiny) / float(jnp.finfo(kind).eps), default=np.dtype("f4"))


def _place(verdict: Verdict) -> str:
    return f" at layer {verdict.first.layer} ({verdict.first.path})" if verdict.first else ""


def _cast(values: Any, dtype: Any) -> Any:
    """Cast the floating leaves; numbers of tokens and masks stay."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, values)


def _accumulate(params: Any, state: Any, above: jax.Array) -> tuple[Any, Any, jax.Array]:
    """Sum, for every array, the exponents of all taps between it and the loss.

    `params` and `state` are gradients, `above` the sum over what comes after this node, with the depth axes of the node.
    Returns (sums like params, state with each tap's exponent replaced by its sum, the sum that includes this node).
    """
    if isinstance(state, TapState):
        own = state.backward.exponent
        return params, dataclasses.replace(state, backward=state.backward._replace(exponent=above)), above + own
    if isinstance(state, Stacked) and isinstance(params, Stacked):
        leaves = jax.tree.leaves((params, state))
        if not leaves:
            return params, state, above
        shape = (*above.shape, leaves[0].shape[above.ndim])
        own = jnp.broadcast_to(_accumulate(params.blocks, state.blocks, jnp.zeros(shape))[2], shape)
        behind = jnp.flip(jnp.cumsum(jnp.flip(own, -1), -1), -1) - own
        p, s, _ = _accumulate(params.blocks, state.blocks, above[..., None] + behind)
        return Stacked(p), Stacked(s), above + jnp.sum(own, -1)
    if (children := taps.trunk_children(params, state)) is not None:
        ps, ss = [], []
        for p, s in reversed(children):
            p, s, above = _accumulate(p, s, above)
            ps.append(p)
            ss.append(s)
        ps.reverse()
        ss.reverse()
        if isinstance(state, dict):
            return dict(zip(state, ps, strict=True)), dict(zip(state, ss, strict=True)), above
        return tuple(ps), tuple(ss), above

    def beside(leaf):
        if not isinstance(leaf, TapState):
            return leaf
        log = leaf.backward.log
        total = jnp.broadcast_to(above.reshape(above.shape + (1,) * (log.ndim - above.ndim)), log.shape)
        return dataclasses.replace(leaf, backward=leaf.backward._replace(exponent=total))

    state = jax.tree.map(beside, state, is_leaf=lambda node: isinstance(node, TapState))
    return tree.map_depth(lambda k, _: above.reshape(above.shape + (1,) * k), params), state, above
