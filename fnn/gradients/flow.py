"""`gradient_flow`: true log10 norms of error signals and gradients, layer by layer, finite at any depth."""

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fnn import admission, arrays, check, compiled, losses, measures, tree
from fnn.core import Layer, as_arrays, output_shape, output_spec
from fnn.gradients import exact, powers
from fnn.gradients.numbers import Label, Numbers, Verdict, resolve, settle
from fnn.gradients.powers import Scaled
from fnn.gradients.price import Price, priced, with_price
from fnn.layers import taps
from fnn.layers.precision import compute_in
from fnn.layers.taps import Row
from fnn.tasks import ExampleFunction
from fnn.tree import PyTree

__all__ = ["GradientFlow", "Label", "Numbers", "gradient_flow", "resolve", "settle"]


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` measured: `rows`, one number each, and the usual profiles as arrays over layers.

    Layers are counted from the input, 1 being the first. A layer is a group of arrays side by side (of one dict) that
    holds a weight, an array of two axes or more that is not called bias or scale: a dense or convolutional layer, an
    embedding, a recurrent cell with its two kernels. Norms and gains belong to the layer before them.

    Quantities: `log10_error` at every tap, log10 of the root mean square over examples of |d l_i/dh|; `log10_kernel`,
    `log10_bias`, ..., of the Frobenius norm of the mean loss's gradient, and `log10_kernel_rms`, ..., of its root mean
    square; `mean`, `second_moment`, `peak`, `dead`, `saturated` of the values that pass a tap on the way forward.
    """

    rows: list[Row]
    loss: float
    weights: tuple[str, ...] = ("log10_kernel",)
    """The quantities that belong to the layers' weights."""
    precision: str = "float32"
    """The float type of the measurement: float64 where the net's own would have been left."""
    note: str = ""
    """Why it was measured in float64, or which numbers are NaN because not even that reached; "" for neither."""

    def __repr__(self) -> str:
        layers = len({row.layer for row in self.rows})
        return f"GradientFlow(loss={self.loss:.6g}, {len(self.rows):,} numbers of {layers} layers, {self.precision})"

    def profile(self, *quantities: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (layers, values); where a layer has several rows of the quantities, the first in forward order."""
        first: dict[int, float] = {}
        for row in self.rows:
            if row.quantity in quantities:
                first.setdefault(row.layer, row.value)
        return np.array(sorted(first), int), np.array([first[layer] for layer in sorted(first)])

    @property
    def log10_error(self) -> np.ndarray:
        """Of the error signal by layer, at the first tap after each layer's weights."""
        return self.profile("log10_error")[1]

    @property
    def log10_kernel(self) -> np.ndarray:
        """Of the gradient of each layer's weights, which other nets may call by another name than kernel."""
        return self.profile(*self.weights)[1]

    @property
    def log10_bias(self) -> np.ndarray:
        """Of the gradient of each layer's bias: the first, which is that of the kernel."""
        return self.profile("log10_bias")[1]

    def __str__(self) -> str:
        names = ("log10_error", "log10_kernel", "log10_bias", "second_moment", "dead", "saturated")
        profiles = {name: self.profile(*(self.weights if name == "log10_kernel" else [name])) for name in names}
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


def price(
    net: Layer,
    state: PyTree,
    batch: arrays.Batch,
    *,
    loss: ExampleFunction = losses.cross_entropy,
    train: bool = True,
    key: jax.Array | None = None,
    compute_dtype: DTypeLike | None = None,
    rounds: int = 11,
) -> Price:
    """Measure here what `gradient_flow`, with the same arguments, takes beside the mean loss's plain gradient.

    Both are programs of their own, compiled anew and timed in turn for `rounds` rounds; see `Price`. A second measurement in
    float64, where one is due, is not in it. Errors: TypeError for traced arrays.

        print(fnn.gradient_flow.price(net, state, batch))
    """
    net, *arguments = _admitted(net, state, batch, loss, key, compute_dtype)

    def gradient(params, net_state, x, y, key):
        def mean(params):
            return measures.mean(loss, net.apply(params, net_state, x, key=key, train=train)[0], y)

        return jax.value_and_grad(mean)(params)

    functions = {"plain gradient": gradient, "gradient_flow": functools.partial(_measure, net, loss, train)}
    return priced("gradient_flow.price", functions, (*arguments, key), rounds)


@with_price(price)
def gradient_flow(
    net: Layer,
    state: PyTree,
    batch: arrays.Batch,
    *,
    loss: ExampleFunction = losses.cross_entropy,
    train: bool = True,
    key: jax.Array | None = None,
    compute_dtype: DTypeLike | None = None,
) -> GradientFlow:
    """Measure log10 |dL/dh| at every tap and log10 |dL/dW| of every parameter, L being the mean loss of a batch.

    Its seven arguments are those of `evaluate`, and two more for a net in training mode.

    `state` is a `TrainState` or a pair (params, state). With `train=True` (what training sees) batch norm uses the
    batch's statistics and dropout needs a key; `compute_dtype` is that of `train_step`. The backward pass runs with a power
    of two beside every array, so that norms of 1e-10000 come out as finite logs in float32, through branches and shared
    weights too. The log of a zero gradient is -inf, of a non-finite one NaN or inf.

    If a signal comes near an end of the range of the net's float type on its way forward, or a gradient is zero, everything is
    measured again with parameters, state and batch in float64; `precision` and `note` of the result say so. Taps see where
    that happens: put one into every block (`models.mlp(..., taps=True)`). What leaves float64 too is NaN, with a warning that
    names the layer; a `second_moment` of which only the squares leave it is NaN without a warning. Equal nets share one
    compiled program. `gradient_flow.price` measures what it costs.

    Errors: ValueError if the net holds no tap.
    """
    plain, (net, params, net_state, x, y) = net, _admitted(net, state, batch, loss, key, compute_dtype)
    dtype, note = _narrowest((x, params)) if compute_dtype is None else jnp.dtype(compute_dtype), ""
    measured = jax.device_get(measure(net, loss, train, params, net_state, x, y, key))
    numbers, verdict = settle(measured, params, dtype=dtype)
    hint = "use fewer layers, or weights nearer to their critical scale"
    if verdict.strained and dtype != jnp.float64:
        try:
            with jax.enable_x64(True):
                wide: Any = (plain, loss, train, *_cast(as_arrays((params, net_state, x, y)), jnp.float64), key)
                spec = jax.tree.leaves(output_spec(plain, *wide[3:6]))
                if any(a.dtype != jnp.float64 for a in spec if jnp.issubdtype(a.dtype, jnp.floating)):
                    raise TypeError("it casts to another type itself")
                again = jax.device_get(measure(*wide))
        except (TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            hint = f"let the net compute in the dtype of its input, for in float64 it cannot be measured ({reason})"
        else:
            what = "left" if verdict.first else "came near an end of"
            note = f"measured in float64: the signal {what} the range of {dtype}{_place(verdict)}"
            measured, dtype = again, jnp.dtype(jnp.float64)
            numbers, verdict = settle(measured, params)
    if verdict.left:
        note = f"the signal left the range of {dtype}{_place(verdict)}, and what depends on it is NaN; {hint}"
        warnings.warn(f"gradient_flow: {note}", stacklevel=2)
    rows = [
        Row(label.layer, label.path, label.quantity, float(value), label.role)
        for label, value in zip(numbers.labels, numbers.values, strict=True)
    ]
    return GradientFlow(rows, float(measured["loss"]), numbers.weights, str(dtype), note)


def _admitted(
    net: Layer, state: PyTree, batch: arrays.Batch, loss: Any, key: Any, compute_dtype: DTypeLike | None
) -> tuple[Layer, PyTree, PyTree, PyTree, PyTree]:
    """Check the arguments of `gradient_flow`; return the net that computes in the dtype, params, state, x and y."""
    admission.net("gradient_flow", net)
    admission.loss("gradient_flow", loss)
    params, net_state = admission.parts("gradient_flow", state)
    check.parameters("gradient_flow", params)
    if key is not None:
        check.prng_key("gradient_flow", key)
    x, y = as_arrays(arrays.pair("gradient_flow: the batch", batch))
    admission.examples("gradient_flow", (x, y))
    admission.state("gradient_flow", net, params, net_state, x)
    net = compute_in(net, compute_dtype)
    if not taps.listed(net_state):
        raise ValueError(
            "gradient_flow: the net must hold a tap, got none; put fnn.tap() between the blocks, or build the model with "
            "taps=True"
        )
    losses.check_targets(loss, output_shape(net, params, net_state, x), y)
    return net, params, net_state, x, y


def measure(net: Layer, loss: Any, train: bool, params: Any, state: Any, x: Any, y: Any, key: Any) -> dict[str, Any]:
    """Do the device's part of `gradient_flow`; may be mapped over params, state and key by `vmap`.

    Each array is an argument of its own, and so eight, since `vmap` maps over some and not over others.

    Returns `logs` and `exponents` (like params), and `errors`, a pair of them for each tap, as `taps.listed` lists these: the
    norm is exp(log) * 2^exponent. They are added on the host, in float64: in float32 a log of -30,000 has no digit to spare.
    `state` is the new state, which holds the statistics of the forward pass.
    """
    return compiled.call(_measure, (net, loss, train), params, state, x, y, key)


def _measure(*arguments: Any) -> dict[str, Any]:
    return differentiate(*arguments)[0]


def differentiate(
    net: Layer, loss: Any, train: bool, params: Any, state: Any, x: Any, y: Any, key: Any
) -> tuple[dict[str, Any], Any]:
    """Do `measure`, with its arguments, and return the gradient too: a `Scaled` for each array, with one exponent a block."""
    state = taps.exact(state)
    marks = [tap for _, tap in taps.listed(state)]

    def objective(parts):
        params, squares = parts
        filled = [replace(t, backward=t.backward._replace(square=s)) for t, s in zip(marks, squares, strict=True)]
        with check.foreign("gradient_flow"):
            outputs, new = net.apply(params, taps.put(state, filled), x, key=key, train=train)
            return measures.shares("gradient_flow", loss, outputs, y)["loss"], new

    wanted = params, [tap.backward.square for tap in marks]
    (value, new), (gradient, squares) = exact.gradient(objective, has_aux=True)(wanted)
    gradient = tree.map_depth(lambda k, _, g: _blocks(g, k), params, gradient)
    logs, exponents = (jax.tree.map(lambda _, g, f=f: f(g), params, gradient) for f in (_log, lambda g: g.exponent))
    errors = [_root(_blocks(square, square.value.ndim)) for square in squares]
    return {"loss": value, "logs": logs, "exponents": exponents, "errors": errors, "state": new}, gradient


def _blocks(g: Scaled, axes: int) -> Scaled:
    """Give each block of a stack an exponent of its own, with its largest number near one size."""
    return powers.tidy(powers.rows(powers.merged(g, axes, apart=False), axes))


def _log(g: Scaled) -> jax.Array:
    """Log of the norm of each block, apart from its exponent."""
    wide = g.value.astype(tree.statistics_dtype(g.value.dtype))
    return 0.5 * jnp.log(jnp.sum(jnp.square(wide), axis=range(g.exponent.ndim, wide.ndim)))


def _root(square: Scaled) -> tuple[jax.Array, jax.Array]:
    """(log, exponent) of the root of each number."""
    odd = (square.exponent & 1).astype(square.value.dtype)
    return 0.5 * (jnp.log(square.value) + odd * np.log(2)), square.exponent >> 1


def _narrowest(values: Any) -> Any:
    """Find the float type whose range ends first."""
    kinds = {leaf.dtype for leaf in jax.tree.leaves(values) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return max(kinds, key=lambda kind: float(jnp.finfo(kind).tiny) / float(jnp.finfo(kind).eps), default=np.dtype("f4"))


def _place(verdict: Verdict) -> str:
    return f" at layer {verdict.first.layer} ({verdict.first.path})" if verdict.first else ""


def _cast(values: Any, dtype: Any) -> Any:
    """Cast the floating leaves; numbers of tokens and masks stay."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, values)
