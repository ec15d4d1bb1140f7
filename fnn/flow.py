"""`gradient_flow`: true log norms of error signals and gradients, layer by layer, finite at any depth."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import losses, mapped, taps, tree
from fnn.core import Layer, as_arrays, output_shape
from fnn.taps import Row, TapState
from fnn.tree import Stacked

Order = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` measured: `rows` in long form, the usual profiles as arrays over layers. Logs are natural.

    Layers are counted by their kernels, 1 being the first. Quantities: `log_error`, the root mean over examples of
    |d l_i/dh|, at every tap; `log_kernel`, `log_bias`, ..., the Frobenius norm of the mean loss's gradient, and the
    same with `_rms`, per number; `mean`, `second_moment`, `dead`, `saturated` of what a tap saw on the way forward.
    """

    rows: list[Row]
    loss: float

    def profile(self, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (layers, values); where a layer has several rows of the quantity, the first in forward order."""
        first: dict[int, float] = {}
        for row in self.rows:
            if row.quantity == quantity:
                first.setdefault(row.layer, row.value)
        return np.array(sorted(first)), np.array([first[layer] for layer in sorted(first)])

    @property
    def error(self) -> np.ndarray:
        """log_error by layer: at the first tap behind each kernel."""
        return self.profile("log_error")[1]

    @property
    def kernel(self) -> np.ndarray:
        """log_kernel by layer."""
        return self.profile("log_kernel")[1]

    @property
    def bias(self) -> np.ndarray:
        """log_bias by layer (the first bias of the layer: that of the kernel)."""
        return self.profile("log_bias")[1]

    def __str__(self) -> str:
        names = ["log_error", "log_kernel", "log_bias", "second_moment", "dead", "saturated"]
        columns = {name: dict(zip(*self.profile(name), strict=True)) for name in names}
        columns = {name: column for name, column in columns.items() if column}
        layers = sorted({row.layer for row in self.rows})
        shown = layers if len(layers) <= 24 else [*layers[:12], None, *layers[-12:]]
        lines = [f"loss {self.loss:.6g}", "layer  " + "  ".join(f"{name:>13}" for name in columns)]
        for layer in shown:
            if layer is None:
                lines.append(f"  ... {len(layers) - 24} more")
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
) -> GradientFlow:
    """Measure log |dL/dh| at every tap and log |dL/dW| of every parameter, L being the mean loss of a batch.

    `state` is a `TrainState` or a pair (params, state). With `train=True` (what training sees) batch norm uses the
    batch's statistics and dropout needs a key. The cotangent is rescaled at every tap of the trunk, so that norms of
    1e-10000 come out as finite logs in float32; put a tap into every block (`models.mlp(..., taps=True)`). A zero
    gradient reports -inf, a non-finite one NaN or inf.

    Errors: ValueError if no tap lies on the trunk, or if a tap is passed more than once (a weight is used on both sides
    of it), where one scale cannot be undone.
    """
    params, net_state = (state.params, state.state) if hasattr(state, "params") else state
    x, y = batch
    x = as_arrays(x)
    if not any(node.rescale for _, node in _marks(taps.rescaling(params, net_state))):
        raise ValueError(
            "gradient_flow: the trunk must hold a tap, got none (taps inside residual and parallel branches cannot "
            "rescale); put fnn.tap() between the blocks, or build the model with taps=True"
        )
    losses.check_targets(loss, output_shape(net, params, net_state, x), y)
    return tabulate(jax.device_get(measure(net, loss, train, params, net_state, x, y, key)), params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def measure(net: Layer, loss: Any, train: bool, params: Any, state: Any, x: Any, y: Any, key: Any) -> dict[str, Any]:
    """Do the device's part of `gradient_flow`; may be mapped over params, state and key by `vmap`.

    Returns logs of the rescaled norms in `logs` (like params) and in the taps' cotangents, `taps`; the exponents by
    which each is to be multiplied stand in `exponents` and in `taps`' own. They are added on the host, in float64:
    a log of -30,000 has no digit to spare in float32.
    """
    run = mapped.auto(lambda *arrays: differentiate(net, loss, train, *arrays)[0])
    return run(params, state, x, y, key)


def differentiate(
    net: Layer, loss: Any, train: bool, params: Any, state: Any, x: Any, y: Any, key: Any
) -> tuple[dict[str, Any], Any]:
    """Do `measure`, and return the gradient too, as the taps rescaled it: to be multiplied by 2^exponents."""

    def objective(params, state):
        outputs, new = net.apply(params, state, x, key=key, train=train)
        return jnp.mean(loss(outputs, y)), new

    marked = taps.rescaling(params, state)
    (value, new), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, marked)
    zero = jnp.zeros((), jnp.float32)
    exponents, news, _ = _accumulate(gradients[0], gradients[1], zero)
    logs = tree.log_norms(gradients[0])
    return {"loss": value, "logs": logs, "exponents": exponents, "taps": news, "state": new}, gradients[0]


def tabulate(measured: dict[str, Any], params: Any) -> GradientFlow:
    """Do the host's part: undo the scales in float64 and label every number."""
    numbers = resolve(measured, params)
    values = flat(numbers)
    rows = [Row(layer, path, quantity, float(values[i])) for layer, path, quantity, i in label(numbers)]
    return GradientFlow(rows, float(measured["loss"]))


class Numbers(NamedTuple):
    """Measured numbers as trees of float64[lead..., depth...]; the leading axes are those of `vmap`."""

    params: dict[str, Any]
    """Trees like params, by the pattern of their quantity: `log_{}` becomes `log_kernel`."""
    taps: Any
    """Like the net's state; for every tap a dict of quantities."""


def resolve(measured: dict[str, Any], params: Any) -> Numbers:
    """Undo the scales in float64; `measured` may carry leading axes, `params` (or their specs) must not."""
    logs = jax.tree.map(_unscale, measured["logs"], measured["exponents"])
    sizes = tree.map_depth(lambda k, a: 0.5 * np.log(max(1, np.prod(a.shape[k:]))), params)

    def one(entries, new, old):
        if not isinstance(new, TapState):
            return ()
        if new.rescale and np.any(old.backward.uses > 1):
            raise ValueError(
                f"gradient_flow: tap {tree.path(entries)} was passed {int(np.max(old.backward.uses))} times on the way "
                "back, so a weight is used on both sides of it and one scale cannot be undone; move the tap out of the "
                "part that is reused"
            )
        log = _unscale(taps.log_error(old.backward), old.backward.exponent)
        return {"log_error": log} | {name: np.asarray(value, np.float64) for name, value in new.forward.items()}

    state, gradients = measured["state"], measured["taps"]
    news = jax.tree_util.tree_map_with_path(one, state, gradients, is_leaf=lambda node: isinstance(node, TapState))
    return Numbers({"log_{}": logs, "log_{}_rms": jax.tree.map(np.subtract, logs, sizes)}, news)


def flat(numbers: Numbers, lead: int = 0) -> np.ndarray:
    """Lay all numbers in a row: float64[lead..., n], to be indexed by the positions of `label`."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(numbers)]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], axis=-1)


def label(numbers: Numbers, lead: int = 0) -> list[tuple[int, str, str, int]]:
    """List (layer, path, quantity, position in `flat`) in forward order."""
    leaves, treedef = jax.tree.flatten(numbers)
    shapes = [np.shape(leaf)[lead:] for leaf in leaves]
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    places = [np.arange(int(np.prod(s))).reshape(s) + start for s, start in zip(shapes, starts, strict=False)]
    numbered = treedef.unflatten(places)
    kernels: list[Order] = []
    rows: list[tuple[Order, tuple[int, str, str, int]]] = []
    every = zip(*(tree.rows(t) for t in numbered.params.values()), strict=True)
    for parent, group in itertools.groupby(every, key=lambda row: row[0][0].rpartition("/")[0]):
        leaves = list(group)
        if any(found[0][0].rpartition("/")[2] == "kernel" for found in leaves):
            kernels.append(_order(parent))
        for found in leaves:
            path = found[0][0]
            name, order = path.rpartition("/")[2], _order(path)
            for pattern, (_, place) in zip(numbered.params, found, strict=True):
                rows.append((order, (len(kernels), path, pattern.format(name), int(place))))
    for full, place in tree.rows(numbered.taps):
        path, _, quantity = full.rpartition("/")
        order = _order(path)
        rows.append((order, (bisect.bisect(kernels, order), path, quantity, int(place))))
    rows.sort(key=lambda row: row[0])
    return [row for _, row in rows]


def _marks(state: Any) -> list[tuple[str, TapState]]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TapState))
    return [("", leaf) for leaf in leaves if isinstance(leaf, TapState)]


def _unscale(log: Any, exponent: Any) -> np.ndarray:
    return np.asarray(log, np.float64) + np.log(2) * np.asarray(exponent, np.float64)


def _order(path: str) -> Order:
    """Order paths by their place in the net: numbers count; names, which only branches have beside others, by letter."""
    parts = (part.strip("[]") for part in path.split("/"))
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


def _accumulate(params: Any, state: Any, above: jax.Array) -> tuple[Any, Any, jax.Array]:
    """Sum, for every array, the exponents of all taps between it and the loss.

    `params` and `state` are gradients, `above` the sum of what lies behind this node, with the depth axes of the node.
    Returns (sums like params, state with each tap's exponent replaced by its sum, the sum in front of this node).
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
