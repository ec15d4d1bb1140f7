"""Metrics: the names that a step knows, those of one's own, and their values over a batch or a data set."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import compiled, mapped, measures, tasks
from fnn.check import choice
from fnn.core import Layer
from fnn.measures import Metric, Sums

CLIPPING = ("grad_norm_clipped", "clip_fraction", "clip_removed")
METRICS = ("loss", "accuracy", "grad_norm", *CLIPPING, "update_ratio")


class Measured(NamedTuple):
    """What is measured of outputs and targets: a loss, with its accuracy, and metrics of one's own by name."""

    loss: Any
    own: tuple[tuple[str, Any], ...] = ()
    accuracy: bool = True

    def totals(self, who: str, outputs: Any, targets: Any, keep: Any = None) -> dict[str, Any]:
        """Sum over a batch what there is beside the loss: `Sums` for means, a tree for a `Metric`.

        `keep: bool[batch]` leaves examples out.
        """
        outputs, found = jax.lax.stop_gradient(outputs), {}
        batch = measures.batch_of(outputs, targets)
        for part in tasks.parts(self.loss, outputs, targets) if self.accuracy else ():
            if (correct := tasks.correct(part.loss)) is not None:
                hits = measures.called(who, "loss.correct", correct, part.outputs, part.targets, batch)
                found["/".join(["accuracy", part.name] if part.name else ["accuracy"])] = measures.summed(
                    who, hits, part.weights, keep
                )
        targets, weights = tasks.unwrapped(targets)
        for name, function in self.own:
            if isinstance(function, Metric):
                found[name] = function.sums(who, outputs, targets, weights, keep)
            else:
                values = measures.called(who, f"the metric {name!r}", function, outputs, targets, batch)
                found[name] = measures.summed(who, values, weights, keep)
        return found

    def computed(self, totals: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Make each total a number."""
        own = dict(self.own)
        return {
            name: total.value() if isinstance(total, Sums) else jnp.asarray(own[name].compute(total))
            for name, total in totals.items()
        }

    def values(
        self, who: str, outputs: Any, targets: Any, axis_name: Any, beside: Iterable[str]
    ) -> dict[str, jax.Array]:
        """Measure a batch, the same numbers on all devices; refuse names that other metrics, `beside` them, have."""
        for name in dict(self.own).keys() & set(beside):
            raise ValueError(f"{who}: a metric needs a name that no other has, got {name!r}; choose another")
        totals = self.totals(who, outputs, targets)
        if mapped.names(axis_name):
            totals = mapped.reduce(jax.lax.psum, jax.tree.map(jnp.asarray, totals), axis_name)
        return self.computed(totals)


def chosen(who: str, metrics: Any) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]:
    """Split `metrics=` into names of the step's own and functions by name.

    A dict of functions comes beside all names, a list holds those that are wanted, and may hold dicts too.
    """
    entries = (*METRICS, metrics) if isinstance(metrics, Mapping) else metrics
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(f"{who}: metrics must be a list of names or a dict of functions, got {metrics!r}")
    names, own = [], []
    for entry in entries:
        if isinstance(entry, Mapping):
            own += functions(who, entry)
        else:
            choice(who, METRICS, metrics=entry)
            names.append(entry)
    return tuple(names), tuple(own)


def functions(who: str, own: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Refuse metrics of one's own that are no functions, and names that are taken."""
    if not isinstance(own, Mapping):
        raise TypeError(f"{who}: metrics must be a dict of functions by name, got {own!r}")
    for name, function in own.items():
        if not (callable(function) or isinstance(function, Metric)):
            raise TypeError(
                f"{who}: a metric must be a function (outputs, y) -> float[batch] or a losses.Metric, got {function!r} for "
                f"{name!r}"
            )
        if not isinstance(name, str) or name in METRICS or name.startswith(("loss/", "accuracy/")):
            instead = (
                "give it to the loss, losses.Loss(name, loss, correct=f)" if name == "accuracy" else "choose another"
            )
            raise ValueError(f"{who}: a metric needs a name that no other has, got {name!r}; {instead}")
    return tuple(own.items())


def averages(
    net: Layer, params: Any, state: Any, data: Any, measured: Measured, batch_size: int = 1024
) -> dict[str, float]:
    """Do `evaluate` for data that were checked before."""
    x, y = data
    n = jax.tree.leaves(x)[0].shape[0]
    totals = compiled.call(means, (net, measured, min(int(batch_size), n)), params, state, x, y)
    return {name: float(value) for name, value in totals.items()}


def means(net: Layer, measured: Measured, size: int, params: Any, state: Any, x: Any, y: Any) -> dict[str, jax.Array]:
    """Do the part of `evaluate` that runs on the device, `size` examples at a time; works under `vmap`, and so takes
    each array as an argument."""
    n = jax.tree.leaves(x)[0].shape[0]

    def totals(xs, ys, keep=None):
        outputs, _ = net.apply(params, state, xs)
        losses = measures.totals("evaluate", measured.loss, outputs, ys, keep)
        return losses, measured.totals("evaluate", outputs, ys, keep)

    def window(start):
        # The last window starts early enough to be full; what it shares with the one before counts once.
        begin = jnp.minimum(start, n - size)
        xs, ys = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size), (x, y))
        return totals(xs, ys, begin + jnp.arange(size) >= start)

    if n <= size:
        losses, found = totals(x, y)
    else:
        windows = jax.lax.map(window, jnp.arange(0, n, size))
        losses, found = jax.tree.map(lambda a: jnp.sum(a, axis=0), windows)
    return measures.combined(measured.loss, {name: sums.value() for name, sums in losses.items()}) | measured.computed(
        found
    )
