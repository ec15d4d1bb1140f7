"""What `build` returned, a Layer or a pair (init, loss), as the functions that the program of a cell is made of.

Both kinds have the same methods, so that the rest of a study need not tell them apart: `init`; `value`, the mean loss of a
batch; `metrics`, the names of what a step reports; `step`; `measure`; `wide`, the same in float64; and `heldout`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import check, losses, measures, tree
from fnn.core import Layer, as_spec, output_spec
from fnn.gradients import flow, labels, measured, wide
from fnn.gradients.labels import Options
from fnn.layers import taps
from fnn.tasks import ExampleFunction, ScalarLoss
from fnn.training import clip
from fnn.training import step as stepping
from fnn.training.metrics import Measured, means
from fnn.tree import PyTree

RENAMED = {"cosine": "cosine_to_weight"}
"""Quantities of `watch` whose name means something else in a study."""
GROUPS = {group: tuple(RENAMED.get(name, name) for name in names) for group, names in labels.QUANTITIES.items()}
WATCHED = tuple(name for names in GROUPS.values() for name in names if name != "log10_error_norm")
"""What `watch` measures, by the names that it has in a study."""
EVALUATED = 1024
"""Held-out examples that are evaluated at once."""


class Pair(NamedTuple):
    """A model of any framework."""

    init: Callable[[jax.Array, PyTree], PyTree]
    """(key, x) -> params, any tree of floating arrays; x is the measured batch's."""
    loss: ScalarLoss
    """(params, (x, y)) -> float[], the mean over the batch, or a pair of it and a dict, in which `accuracy` is known."""


Built = Layer | tuple[Callable[[jax.Array, PyTree], PyTree], ScalarLoss]
"""What `build` returns: a net of fnn, or the two functions of a `Pair`."""


class Read(NamedTuple):
    """What `measure` returned, on the host: the leading axes are [runs, records]."""

    labels: list[flow.Label]
    values: np.ndarray
    lost: np.ndarray
    """Whether the forward pass left the range of the float type: bool[runs, records]."""
    left: np.ndarray
    """Whether some number is NaN because of that, or because gradients left it: bool[runs, records]."""


@dataclass(frozen=True)
class OfLayer:
    """A net of fnn, and a loss of single examples; `groups` are those of `watch` that are measured besides."""

    net: Layer
    loss: ExampleFunction
    groups: tuple[str, ...]

    def init(self, key: Any, x: Any) -> tuple[Any, Any]:
        return self.net.init(key, as_spec(x))

    def value(self, params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
        outputs, _ = self.net.apply(params, state, batch[0], key=key, train=True)
        return measures.mean(self.loss, outputs, batch[1])

    def metrics(self, params: Any, batch: Any) -> list[str]:
        return ["loss", *(["accuracy"] if losses.correct(self.loss) else [])]

    def step(self, tx: Any, metrics: Sequence[str]) -> Callable[..., Any]:
        whole = stepping.train_step(self.net, self.loss, tx, metrics=metrics).pure

        def step(at: stepping.TrainState, batch: Any) -> tuple[stepping.TrainState, dict[str, Any]]:
            new, found = whole(at, batch)
            # What taps see in training nobody reads. Carried along, it would be half of the work of a step.
            before = [tap for _, tap in taps.listed(at.net_state)]
            return replace(new, net_state=taps.put(new.net_state, before)), found

        return step

    def measure(self, params: Any, state: Any, batch: Any, key: Any) -> tuple[dict[str, Any], Any]:
        x, y = batch
        numbers, gradient = flow.differentiate(self.net, self.loss, True, params, state, x, y, key)
        found: dict[str, Any] = {"flow": numbers}
        if groups := self._asked(state):
            loss, size = self._watched(state, key), len(batch[1])
            found["watch"], _ = measured.measured(loss, _options(groups, False), False, size, params, batch)
        return found, gradient

    def wide(self, params: Any, state: Any, batch: Any, key: Any) -> tuple[dict[str, Any], jax.Array]:
        up = functools.partial(jax.tree.map, lambda a: wide.up(jnp.asarray(a)))
        (x, y), given = up(batch), (up(params), up(state))
        if output_spec(self.net, *given, x).dtype != jnp.float64:
            raise TypeError("study: the net casts to another type itself")
        numbers, _ = flow.differentiate(self.net, self.loss, True, *given, x, y, key)
        found: dict[str, Any] = {"flow": numbers}
        if groups := self._asked(state):
            loss, size = self._watched(state, key), len(batch[1])
            found["watch"] = measured.in_float64(loss, _options(groups, False), size, False, params, batch)[0]
        return found, wide.holds(numbers["loss"])

    def heldout(self, params: Any, state: Any, x: Any, y: Any) -> dict[str, jax.Array]:
        return means(self.net, Measured(self.loss), min(EVALUATED, x.shape[0]), params, state, x, y)

    def _asked(self, state: Any) -> tuple[str, ...]:
        """List the groups of `watch` that are needed: taps say the error signal already."""
        return beside_taps(self.groups) if taps.listed(state) else self.groups

    def _watched(self, state: Any, key: Any) -> Callable[..., Any]:
        return lambda params, x, y: self.value(params, state, (x, y), key)


@dataclass(frozen=True)
class OfPair:
    """A model of any framework with its loss; it has no state."""

    pair: Pair
    groups: tuple[str, ...]

    def init(self, key: Any, x: Any) -> tuple[Any, Any]:
        with jax.enable_x64(False):  # whatever the framework's own float type, the same draws with x64 and without
            params = self.pair.init(key, jnp.asarray(x))
        check.parameters("study", params)
        return jax.tree.map(jnp.asarray, params), ()

    def judged(self, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the mean loss and, where the loss gives it, the accuracy."""
        with check.foreign("study"):
            out = self.pair.loss(params, batch)
        value, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        value = check.scalar_loss("study", value, None, "the loss that build returned")
        right = aux.get("accuracy") if isinstance(aux, Mapping) else None
        if right is not None and jnp.shape(right) != ():
            raise ValueError(
                f"study: accuracy must be one number, got {check.describe(right)}; average it over the batch"
            )
        return jnp.asarray(value), {} if right is None else {"accuracy": jnp.asarray(right, jnp.result_type(value))}

    def value(self, params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
        return self.judged(params, batch)[0]

    def metrics(self, params: Any, batch: Any) -> list[str]:
        return ["loss", *jax.eval_shape(self.judged, params, batch)[1]]

    def step(self, tx: Any, metrics: Sequence[str]) -> Callable[..., Any]:
        def step(at: stepping.TrainState, batch: Any) -> tuple[stepping.TrainState, dict[str, Any]]:
            (value, more), grads = jax.value_and_grad(self.judged, has_aux=True)(at.params, batch)
            updates, opt_state = tx.update(grads, clip.unreported(at.opt_state), at.params)
            found = {"loss": value, "grad_norm": tree.norm(grads)} | more | stepping.clipped(opt_state, grads)
            new = optax.apply_updates(at.params, updates), at.net_state, opt_state, at.key, at.step + 1
            return stepping.TrainState(*new), {name: found[name] for name in metrics}

        return step

    def measure(self, params: Any, state: Any, batch: Any, key: Any) -> tuple[dict[str, Any], Any]:
        options, size = _options(self.groups, True), len(batch[1])
        (_, gradient), found = measured.measured(self.judged, options, True, size, params, (batch,))
        return {"watch": found}, gradient

    def wide(self, params: Any, state: Any, batch: Any, key: Any) -> tuple[dict[str, Any], jax.Array]:
        options, size = _options(self.groups, True), len(batch[1])
        found, _, holds = measured.in_float64(self.judged, options, size, False, params, (batch,))
        return {"watch": found}, holds

    def heldout(self, params: Any, state: Any, x: Any, y: Any) -> dict[str, jax.Array]:
        n, size = len(y), min(EVALUATED, len(y))
        whole = n // size

        def means(batch):
            value, more = self.judged(params, batch)
            return {"loss": value} | more

        parts = jax.tree.map(lambda a: a[: whole * size].reshape(whole, size, *a.shape[1:]), (x, y))
        found = jax.tree.map(lambda a: jnp.mean(a, axis=0), jax.lax.map(means, parts))
        if n > whole * size:
            rest = means((x[whole * size :], y[whole * size :]))
            found = jax.tree.map(lambda a, b: (whole * size * a + (n - whole * size) * b) / n, found, rest)
        return found


Net = OfLayer | OfPair


def made(built: Any, loss: ExampleFunction, quantities: Sequence[str] | None) -> Net:
    """Say what `build` returned. Errors: TypeError for something else, ValueError for a pair and a `loss` besides."""
    if isinstance(built, Layer):
        return OfLayer(built, loss, watched(quantities))
    if not (isinstance(built, tuple) and len(built) == 2 and all(map(callable, built))):
        raise TypeError(
            f"study: build must return a Layer, or a pair of functions (init, loss), got {type(built).__name__}; return "
            "fnn.serial(...)"
        )
    if loss is not losses.cross_entropy:
        raise ValueError(
            f"study: loss must be left out where build returns a pair (init, loss), got {loss!r}; the pair's own is used"
        )
    return OfPair(Pair(*built), labels.DEFAULT if quantities is None else watched(quantities))


def read(found: Mapping[str, Any], params: Any, **kind: bool) -> Read:
    """Label what `measure` returned, and say where numbers are NaN since a float type's range was left; see `flow.settle`."""
    parts: list[Read] = []
    if "flow" in found:
        numbers, verdict = flow.settle(found["flow"], params, **kind)
        left = verdict.left | np.any(np.isnan(numbers.values), axis=-1)
        parts.append(Read(numbers.labels, numbers.values, verdict.lost, left))
    if "watch" in found:
        rows, values = found["watch"].labels.rows, found["watch"].numbers()
        names = [RENAMED[row[2]] if row[2] in RENAMED else row[2] for row in rows]
        logs = np.array([name in (*GROUPS["gradient"], *GROUPS["error"]) for name in names], bool)
        nothing = np.any(np.isnan(values[..., logs]), axis=-1) | ~np.isfinite(np.asarray(found["watch"].loss))
        own = [flow.Label(row[0], row[1], name, "", ()) for row, name in zip(rows, names, strict=True)]
        parts.append(Read(own, values, nothing, nothing))
    return Read(
        [label for part in parts for label in part.labels],
        np.concatenate([part.values for part in parts], axis=-1),
        parts[0].lost,
        np.any([part.left for part in parts], axis=0),
    )


def loss_of(found: Mapping[str, Any]) -> Any:
    """Return the loss of the measured batch."""
    return found["flow"]["loss"] if "flow" in found else found["watch"].loss


def _options(groups: tuple[str, ...], has_aux: bool) -> Options:
    return Options(has_aux, None, "*", groups, weighted=False)


def watched(quantities: Sequence[str] | None) -> tuple[str, ...]:
    """List the groups of `watch` that hold some of the quantities."""
    quantities = quantities or ()
    return tuple(group for group, names in GROUPS.items() if set(names) & set(quantities))


def beside_taps(groups: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out what taps measure."""
    return tuple(group for group in groups if group != "error")
