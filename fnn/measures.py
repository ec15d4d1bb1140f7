"""What a loss or a metric says of each example, and its mean: of weighted examples, of tokens, of several tasks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnn import check, mapped
from fnn.arrays import first_line
from fnn.tasks import ExampleFunction, factors, parts, weight
from fnn.tree import PyTree, statistics_dtype


class Counted(NamedTuple):
    """What a loss or metric returns to be averaged over tokens: the mean of a batch is sum(sums) / sum(counts).

    `sums: float[batch]` is each example's sum over its tokens, `counts: [batch]` their number. An example with more tokens
    then counts for more. No gradient flows through `counts`.
    """

    sums: jax.Array
    counts: jax.Array | None


class Metric:
    """A number of many examples that is no mean over them: `compute(sums)` of sums over the examples.

    `of_examples(outputs, y)` returns a tree of arrays with the examples on their first axis, `compute` makes float[] of the
    tree of their sums. The sums are those of all windows and devices, and so the number is that of the whole data set:
    R², F1, a correlation, the area under a curve of thresholds. An example of weight w adds w times its share.

        sums = lambda o, y: (jnp.ones_like(y), y, y**2, (o - y) ** 2)
        r2 = fnn.losses.Metric(sums, lambda s: 1 - s[3] / (s[2] - s[1] ** 2 / s[0]))
    """

    def __init__(self, of_examples: Callable[[PyTree, PyTree], PyTree], compute: Callable[[PyTree], ArrayLike]):
        self.of_examples, self.compute = of_examples, compute

    def sums(
        self, who: str, outputs: PyTree, targets: PyTree, weights: Sequence[ArrayLike], keep: jax.Array | None = None
    ) -> PyTree:
        """Sum over the examples of a batch; `keep: bool[batch]` leaves some out."""
        batch = batch_of(outputs, targets)

        def one(a):
            if jnp.shape(a)[:1] != batch:
                raise ValueError(
                    f"{who}: a Metric's of_examples must return arrays with the examples on their first axis, got "
                    f"{check.describe(a)} for outputs {check.describe(outputs)}"
                )
            a = _wide(a)
            for w in weights:
                a = a * _against(weight(who, w, a), a)
            return jnp.sum(a if keep is None else jnp.where(_against(keep, a), a, 0), axis=0)

        return jax.tree.map(one, self.of_examples(outputs, targets))


OwnMetrics = Mapping[str, ExampleFunction | Metric]
"""Metrics of one's own, by name."""


def called(who: str, what: str, function: Any, outputs: Any, targets: Any, batch: tuple[int, ...]) -> Counted:
    """Call a loss or a metric; refuse anything but one number for each example, or `Counted`, where counts may be None."""
    try:
        found = function(outputs, targets)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            f"{who}: {what} must be one that jit can trace, got one that looks at values ({first_line(error)}); write it in "
            "jax.numpy, without float(), if, or NumPy on its arguments"
        ) from error
    sums, counts = found if isinstance(found, Counted) else (found, None)
    numbers = [sums] if counts is None else [sums, counts]
    fits = all(hasattr(a, "dtype") and a.shape == batch for a in numbers)
    if not fits or not (jnp.issubdtype(sums.dtype, jnp.floating) or what != "the loss"):
        pair = isinstance(found, tuple | list) and not isinstance(found, Counted) and len(found) == 2
        hint = "average over the other axes, not over the examples"
        hint = "sums and counts go into fnn.losses.Counted" if pair else hint
        raise ValueError(
            f"{who}: {what} must return float[batch], one number for each example, got {check.describe(found)} for "
            f"outputs {check.describe(outputs)}; {hint}"
        )
    return Counted(_wide(sums), counts)


def batch_of(outputs: Any, targets: Any) -> tuple[int, ...]:
    """Return (batch,), from the first array that has axes: of the targets, or, without any, of the outputs."""
    shapes = [jnp.shape(leaf) for leaf in (*jax.tree.leaves(targets), *jax.tree.leaves(outputs))]
    return next((shape[:1] for shape in shapes if shape), ())


class Sums(NamedTuple):
    """A sum over examples and what it is divided by, a Python number if that is known while tracing."""

    total: Any
    count: Any

    def value(self) -> jax.Array:
        """Divide: the mean, NaN where nothing is counted."""
        return self.total / self.count


def summed(who: str, found: Counted, weights: Sequence[Any], keep: Any = None) -> Sums:
    """Sum what a function says of each example, and how often each counts; `keep: bool[batch]` leaves examples out."""
    total, count = found
    for w in weights:
        w = weight(who, w, total)
        total, count = total * w, w if count is None else count * w
    if keep is not None:
        total, count = (jnp.where(keep, a, 0) for a in (total, 1 if count is None else count))
    if count is None:
        return Sums(jnp.sum(total), total.size)
    return Sums(jnp.sum(total), jax.lax.stop_gradient(jnp.sum(count.astype(total.dtype))))


def totals(who: str, loss: Any, outputs: Any, targets: Any, keep: Any = None) -> dict[str, Sums]:
    """Sum each task's loss over a batch; the name of a loss that is no `Sum` is empty. `keep` leaves examples out."""
    batch = batch_of(outputs, targets)
    return {
        part.name: summed(
            who, called(who, "the loss", part.loss, part.outputs, part.targets, batch), part.weights, keep
        )
        for part in parts(loss, outputs, targets)
    }


def combined(loss: Any, means: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Make of the mean of each task the `loss`, and `loss/task`."""
    if list(means) == [""]:
        return {"loss": means[""]}
    whole = sum(factor * means[name] for name, factor in factors(loss).items())
    return {"loss": jnp.asarray(whole)} | {f"loss/{name}": value for name, value in means.items()}


def shares(who: str, loss: Any, outputs: Any, targets: Any, axis_name: Any = None) -> dict[str, jax.Array]:
    """Return the mean `loss` of a batch, and with several tasks the mean of each as `loss/task`.

    With `axis_name` these are shares: their means over the mapped axes are the means over all examples, and so are those
    of their gradients. A share is the local sum over the *mean* of the counts.
    """

    def share(sums):
        return sums.total / (sums.count if isinstance(sums.count, int) else mapped.mean(sums.count, axis_name))

    return combined(loss, {name: share(sums) for name, sums in totals(who, loss, outputs, targets).items()})


def mean(loss: ExampleFunction, outputs: PyTree, targets: PyTree) -> jax.Array:
    """Average a loss over a batch, as `train_step` does: float[]. Weights, counts and tasks are taken into account.

    It is what `fnn.watch` needs of a net of fnn:
    `lambda params, x, y: fnn.losses.mean(loss, net.apply(params, state, x)[0], y)`.
    """
    return shares("losses.mean", loss, outputs, targets)["loss"]


def each(who: str, loss: ExampleFunction, outputs: PyTree, targets: PyTree) -> jax.Array:
    """Return a loss's float[batch]; refuse weights and counts, with which an example's share depends on the others."""
    batch, values, factor = batch_of(outputs, targets), [], factors(loss)
    for part in parts(loss, outputs, targets):
        found = called(who, "the loss", part.loss, part.outputs, part.targets, batch)
        if found.counts is not None or part.weights:
            raise ValueError(
                f"{who}: the loss of one example must not depend on the others, got "
                f"{'weights' if part.weights else 'sums and counts'}, with which its share of the mean does; use "
                "train_step(per_example=...), or a loss that returns float[batch] and no weights"
            )
        values.append(found.sums if factor[part.name] == 1 else factor[part.name] * found.sums)
    return sum(values[1:], start=values[0])


def _against(per_example: jax.Array, a: jax.Array) -> jax.Array:
    return per_example.reshape(per_example.shape + (1,) * (a.ndim - 1))


def _wide(a: ArrayLike) -> jax.Array:
    a = jnp.asarray(a)
    return a.astype(statistics_dtype(a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else jnp.float32)
