"""Losses of single examples: `loss(outputs, targets) -> float[batch]`. The caller takes the mean over the batch.

Sums over classes or units are taken in at least float32.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import check, lowering
from fnn.arrays import Weighted
from fnn.measures import Counted, Metric, each, mean
from fnn.tasks import ExampleFunction, Loss, Sum, check_targets, correct, finite
from fnn.tree import PyTree, statistics_dtype

__all__ = [
    "Counted",
    "Loss",
    "Metric",
    "Weighted",
    "binary_cross_entropy",
    "check_targets",
    "correct",
    "cross_entropy",
    "focal",
    "huber",
    "mean",
    "mse",
    "sequence_cross_entropy",
    "smooth_cross_entropy",
    "sum_of",
    "token_cross_entropy",
]


Task = ExampleFunction | tuple[ExampleFunction, float]
"""A loss, or a pair of a loss and its factor."""


def sum_of(tasks: Mapping[str, Task] | Sequence[Task]) -> Sum:
    """Combine the losses of several tasks: sum over tasks of factor times mean loss.

    `sum_of({"digit": cross_entropy, "angle": (mse, 0.5)})` is for a net whose outputs, and data whose targets, are dicts
    with these names; a list of losses is for tuples. An entry is a loss or a pair (loss, factor). Metrics are the whole
    `loss`, and `loss/digit`, `accuracy/digit`, `loss/angle`. Each task's mean is its own: one may be over tokens
    (`Counted`), one over weighted examples (`Weighted` targets) and one over all.

    Outputs without a loss are left alone. Among targets by name one may be missing: its loss gets None, as is right for a
    net's own penalty, `"kl": (lambda kl, _: kl, 0.1)`.
    Errors: ValueError for outputs without an entry for a loss, and for targets that no loss has.
    """
    entries = dict(tasks.items() if isinstance(tasks, Mapping) else enumerate(tasks))
    found = {}
    for name, entry in entries.items():
        loss, factor = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, 1.0)
        if not callable(loss):
            raise TypeError(f"sum_of: each task must have a loss, or (loss, factor), got {entry!r} for {name!r}")
        found[name] = check.number("sum_of", low=-1e99, **{f"the factor of {name}": factor}), loss
    if not found:
        raise ValueError("sum_of: needs at least one task, got none; pass {name: loss}")
    return Sum(found, functools.partial(each, "sum_of"))


def _classified(
    who: str, outputs: PyTree, targets: PyTree, of: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Average `of(logits, labels)` over the positions of each example; NaN where a label is out of range."""
    outputs, targets = _wide(outputs), _labels(who, targets)
    if outputs.ndim < 2 or outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"{who}: needs logits float[batch, ..., classes] and labels int[batch, ...], "
            f"got {check.describe(outputs)} and {check.describe(targets)}"
        )
    classes = outputs.shape[-1]
    loss = of(outputs, jnp.clip(targets, 0, classes - 1))
    return _examples(_judged(loss, (targets >= 0) & (targets < classes)))


def _entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if lowering.scatters():
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - _of_label(shifted, labels)


@jax.custom_jvp
def _of_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


@_of_label.defjvp
def _of_label_jvp(primals, tangents):
    values, labels = primals
    chosen = jnp.arange(values.shape[-1], dtype=labels.dtype) == labels[..., None]
    return _of_label(values, labels), jnp.sum(jnp.where(chosen, tangents[0], 0), axis=-1)


def _cross_entropy(outputs: PyTree, targets: PyTree) -> jax.Array:
    """Evaluate -log softmax(outputs)[target] per example.

    outputs (logits): float[batch, ..., classes], targets: int[batch, ...] -> float[batch], the mean over further axes.
    Labels may have any integer dtype. One outside 0..classes-1 is a ValueError on the host; inside jit it makes this
    example's loss and gradient NaN, and no other example's.
    """
    return _classified("cross_entropy", outputs, targets, _entropy)


def smooth_cross_entropy(alpha: float) -> Loss[jax.Array]:
    """Make cross entropy with smoothed labels, (1 - alpha) one_hot + alpha / classes.

    Shapes and labels are as in `cross_entropy`; accuracy is that of the labels. Source: Szegedy et al. 2016, section 7.
    """
    alpha = check.number("smooth_cross_entropy", high=1, alpha=alpha)

    def of(logits, labels):
        smooth = optax.losses.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), alpha)
        return optax.losses.softmax_cross_entropy(logits, smooth)

    return _of_classes(f"smooth_cross_entropy({alpha:g})", of)


def focal(gamma: float) -> Loss[jax.Array]:
    """Make (1 - p)^gamma times cross entropy, p being the target's probability; shapes and labels as in `cross_entropy`.

    Examples that are right already count for less. gamma = 0 is cross entropy. Source: Lin et al. 2017, equation 4.
    """
    gamma = check.number("focal", gamma=gamma)

    def of(logits, labels):
        loss = _entropy(logits, labels)
        wrong = -jnp.expm1(-loss)  # 1 - p
        # 0^gamma has no finite slope for gamma < 1; the product's is 0 there. NaN is not right: it stays.
        right = wrong <= 0
        return jnp.where(right, 0, jnp.where(right, 1, wrong) ** gamma * loss)

    return _of_classes(f"focal({gamma:g})", of)


def _of_classes(name: str, of: Callable[[jax.Array, jax.Array], jax.Array]) -> Loss[jax.Array]:
    return Loss(
        name,
        lambda outputs, targets: _classified(name, outputs, targets, of),
        _class_correct,
        functools.partial(_check_labels, name),
    )


def _check_labels(who: str, shape: tuple[int, ...], targets: PyTree, skip: tuple[int, ...] = ()) -> None:
    targets = _on_host(who, shape, targets)
    _label_type(who, targets)
    targets, last = targets[~np.isin(targets, skip)], shape[-1] - 1
    if targets.size and (targets.min() < 0 or targets.max() > last):
        got = f"{targets.min()}..{targets.max()}"
        raise ValueError(f"{who}: labels must lie in 0..{last}, got {got}; renumber them or widen the last layer")


def _binary_cross_entropy(outputs: PyTree, targets: PyTree) -> jax.Array:
    """Evaluate -t log p - (1 - t) log(1 - p) with p = sigmoid(output), per example.

    outputs (logits): float[batch] or float[batch, 1], targets: 0 to 1, of any real type, [batch] or [batch, 1].
    A target outside 0..1 is a ValueError on the host; inside jit it makes the example's loss and gradient NaN.
    """
    z, t = _one_unit(outputs, targets)
    return _judged(optax.losses.sigmoid_binary_cross_entropy(z, t), (t >= 0) & (t <= 1))


def _one_unit(outputs: PyTree, targets: PyTree) -> tuple[jax.Array, jax.Array]:
    z, t = _wide(outputs), _array(targets)
    t = jnp.asarray(check.as_int32(t) if jnp.issubdtype(t.dtype, jnp.integer) else t)
    if z.ndim == 0 or any(a.shape not in (z.shape[:1], (*z.shape[:1], 1)) for a in (z, t)):
        raise ValueError(
            f"binary_cross_entropy: needs one logit and one target for each example, "
            f"got {check.describe(z)} and {check.describe(t)}"
        )
    return z.reshape(-1), t.reshape(-1).astype(z.dtype)


def _check_binary(shape: tuple[int, ...], targets: PyTree) -> None:
    targets = _on_host("binary_cross_entropy", shape, targets)
    if targets.size and (bad := (targets < 0) | (targets > 1) | np.isnan(targets.astype(float))).any():
        raise ValueError(f"binary_cross_entropy: targets must lie in 0..1, got {targets[bad].reshape(-1)[0]}; rescale")


def _mse(outputs: PyTree, targets: PyTree) -> jax.Array:
    """Evaluate the mean over units of (output - target)², per example: float[batch, ...] twice -> float[batch]."""
    outputs, targets = _alike("mse", outputs, targets)
    return _examples(jnp.square(outputs - targets))


def huber(delta: float = 1.0) -> Loss[jax.Array]:
    """Make the mean over units of e²/2 for |e| <= delta and delta |e| - delta²/2 beyond it, e = output - target.

    float[batch, ...] twice -> float[batch]. The gradient is that of e²/2, clipped to ±delta. Source: Huber 1964.
    """
    delta, name = check.number("huber", low=1e-30, delta=delta), f"huber({delta:g})"

    def per_example(outputs, targets):
        return _examples(optax.losses.huber_loss(*_alike(name, outputs, targets), delta=delta))

    return Loss(name, per_example, None, functools.partial(_check_values, name))


def _alike(who: str, outputs: PyTree, targets: PyTree) -> tuple[jax.Array, jax.Array]:
    outputs, targets = _wide(outputs), _array(targets)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{who}: outputs and targets must have the same shape, got {check.describe(outputs)} and "
            f"{check.describe(targets)}; reshape the targets or the last layer"
        )
    return outputs, jnp.asarray(targets.astype(outputs.dtype))


def _check_values(who: str, shape: tuple[int, ...], targets: PyTree) -> None:
    finite(who, _on_host(who, shape, targets))


def _sequence_cross_entropy(outputs: PyTree, targets: PyTree) -> jax.Array:
    """Evaluate the mean of -log softmax(outputs)[target] over the positions of each example that have a target.

    outputs (logits): float[batch, time, classes], targets: int[batch, time] -> float[batch]. A target of -1 means that
    nothing is predicted there (padding, a prompt): the outputs at that position do not matter, NaN included. An example
    without targets has loss 0. An example is right if every target has the largest logit (exact match). Labels may have
    any integer dtype. One beyond the classes is a ValueError on the host; inside jit the example's loss is NaN, and so is
    its gradient. Every example counts once, however long; `token_cross_entropy` counts every token once.
    """
    sums, counts = _tokens("sequence_cross_entropy", outputs, targets)
    return sums / jnp.maximum(1, counts)


def _token_cross_entropy(outputs: PyTree, targets: PyTree) -> Counted:
    """Sum -log softmax(outputs)[target] over the positions that have a target, and count them: `Counted`.

    Arguments are those of `sequence_cross_entropy`. The mean of a batch, of a data set, or of all devices is that over
    their tokens, NaN where there are none, and so is the accuracy. It is the logarithm of the perplexity.
    """
    return Counted(*_tokens("token_cross_entropy", outputs, targets))


def _tokens(who: str, outputs: PyTree, targets: PyTree) -> tuple[jax.Array, jax.Array]:
    outputs, targets = _wide(outputs), _labels(who, targets)
    if outputs.ndim != 3 or outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"{who}: needs logits float[batch, time, classes] and labels int[batch, time], "
            f"got {check.describe(outputs)} and {check.describe(targets)}"
        )
    classes, real = outputs.shape[-1], targets != -1
    loss = _entropy(jnp.where(real[..., None], outputs, 0), jnp.clip(targets, 0, classes - 1))
    good = jnp.all((targets >= -1) & (targets < classes), axis=1)
    return _judged(jnp.sum(jnp.where(real, loss, 0), axis=1), good), jnp.sum(real, axis=1)


def _top(outputs: PyTree) -> jax.Array:
    """Return the class with the largest logit; -2, which no target is, where a logit is NaN (argmax would say class 0)."""
    return jnp.where(jnp.isnan(jnp.max(outputs, axis=-1)), -2, jnp.argmax(outputs, axis=-1))


def _sequence_correct(outputs: PyTree, targets: PyTree) -> jax.Array:
    targets = _labels("sequence_cross_entropy", targets)
    return jnp.all((targets == -1) | (_top(outputs) == targets), axis=1).astype(jnp.float32)


def _token_correct(outputs: PyTree, targets: PyTree) -> Counted:
    targets = _labels("token_cross_entropy", targets)
    hits = jnp.sum(_top(outputs) == targets, axis=1)
    return Counted(hits.astype(jnp.float32), jnp.sum(targets != -1, axis=1))


def _class_correct(outputs: PyTree, targets: PyTree) -> jax.Array:
    targets = _labels("cross_entropy", targets)
    return _examples((_top(outputs) == targets).astype(jnp.float32))


def _binary_correct(outputs: PyTree, targets: PyTree) -> jax.Array:
    z, t = _one_unit(outputs, targets)
    return (((z > 0) == (t > 0.5)) & ~jnp.isnan(z)).astype(jnp.float32)


cross_entropy = Loss("cross_entropy", _cross_entropy, _class_correct, functools.partial(_check_labels, "cross_entropy"))
sequence_cross_entropy = Loss(
    "sequence_cross_entropy",
    _sequence_cross_entropy,
    _sequence_correct,
    functools.partial(_check_labels, "sequence_cross_entropy", skip=(-1,)),
)
token_cross_entropy = Loss(
    "token_cross_entropy",
    _token_cross_entropy,
    _token_correct,
    functools.partial(_check_labels, "token_cross_entropy", skip=(-1,)),
)
binary_cross_entropy = Loss("binary_cross_entropy", _binary_cross_entropy, _binary_correct, _check_binary)
mse = Loss("mse", _mse, None, functools.partial(_check_values, "mse"))


def _on_host(who: str, shape: Any, targets: Any) -> np.ndarray:
    """Return targets in NumPy; refuse outputs and targets that are trees of arrays."""
    if not isinstance(shape, tuple) or not all(isinstance(n, int) for n in shape):
        raise ValueError(
            f"net: a loss needs one array, got {shape}; end in drop_mask(), take_last() or sum_inputs(), or pass a loss of "
            f"several tasks, losses.sum_of, or one of your own in the place of {who}"
        )
    if not hasattr(targets, "dtype"):
        raise TypeError(f"{who}: targets must be one array, got {check.describe(targets)}")
    return np.asarray(targets)


def _wide(a: Any) -> jax.Array:
    if isinstance(a, Mapping) or hasattr(a, "_fields"):
        raise ValueError(f"net: a loss needs one array, got {check.describe(a)}; see losses.sum_of and drop_mask()")
    a = jnp.asarray(a)
    return a.astype(statistics_dtype(a.dtype))


def _examples(a: jax.Array) -> jax.Array:
    return jnp.mean(a, axis=tuple(range(1, a.ndim)))


def _judged(loss: jax.Array, good: jax.Array) -> jax.Array:
    """Make the loss NaN where a target is bad. A factor: with jnp.where the gradient would be zero there, not NaN."""
    return loss * jnp.where(good, 1, jnp.nan).astype(loss.dtype)


def _labels(who: str, targets: Any) -> jax.Array:
    """Cast labels of any integer dtype to int32: see `check.as_int32`."""
    targets = _array(targets)
    _label_type(who, targets)
    return jnp.asarray(check.as_int32(targets))


def _array(a: Any) -> Any:
    """Make an array of NumPy, not JAX: JAX would let integers beyond int32 wrap around unless x64 is on."""
    return a if hasattr(a, "dtype") else np.asarray(a)


def _label_type(who: str, targets: Any) -> None:
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"{who}: labels must be integers, got {check.describe(targets)}; use labels.astype(int)")
