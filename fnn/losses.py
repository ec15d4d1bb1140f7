"""Losses of single examples: `loss(outputs, targets) -> float[batch]`. The caller takes the mean over the batch.

Sums over classes or units are taken in at least float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from fnn import check
from fnn.arrays import narrow
from fnn.tree import statistics_dtype


class Loss:
    """A function `loss(outputs, targets) -> float[batch]` that also knows which predictions and targets are right.

    Any function of that form is a loss for fnn; this class adds accuracy, and a clear error for bad targets.
    `loss.correct(outputs, targets) -> float[batch]` is 1 for right predictions and 0 for wrong ones; it is None for losses
    without right and wrong, such as `mse`.
    """

    def __init__(
        self,
        name: str,
        per_example: Callable[[ArrayLike, ArrayLike], jax.Array],
        correct: Callable[[ArrayLike, ArrayLike], jax.Array] | None,
        check_targets: Callable[[tuple[int, ...], ArrayLike], None],
    ):
        self.name, self.correct = name, correct
        self._per_example, self._check = per_example, check_targets
        self.__doc__ = per_example.__doc__

    def __call__(self, outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        return self._per_example(outputs, narrow(self.name, "targets", targets))

    def check(self, shape: tuple[int, ...], targets: ArrayLike) -> None:
        """Refuse targets that do not fit outputs of this shape, batch axis first. It reads values: not under jit."""
        self._check(shape, targets)

    def __repr__(self) -> str:
        return f"Loss({self.name})"


def correct(loss: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return `loss.correct`, None for plain functions."""
    return loss.correct if isinstance(loss, Loss) else None


def check_targets(loss: Callable[..., Any], shape: tuple[int, ...], targets: ArrayLike) -> None:
    """Call `loss.check` for outputs of this shape; a plain function checks nothing."""
    if isinstance(loss, Loss):
        if not hasattr(targets, "dtype"):
            raise TypeError(f"{loss.name}: targets must be one array, got {check.describe(targets)}")
        try:
            loss.check(shape, targets)
        except jax.errors.TracerArrayConversionError:
            return  # traced targets have no values; bad ones give NaN inside jit


def _cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate -log softmax(outputs)[target] per example.

    outputs (logits): float[batch, ..., classes], targets: int[batch, ...] -> float[batch], the mean over further axes.
    Labels may have any integer dtype. One outside 0..classes-1 is a ValueError on the host; inside jit it makes this
    example's loss and gradient NaN, and no other example's.
    """
    outputs, targets = _wide(outputs), _labels("cross_entropy", targets)
    if outputs.ndim < 2 or outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"cross_entropy: needs logits float[batch, ..., classes] and labels int[batch, ...], "
            f"got {check.describe(outputs)} and {check.describe(targets)}"
        )
    classes = outputs.shape[-1]
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, jnp.clip(targets, 0, classes - 1))
    return _examples(_judged(loss, (targets >= 0) & (targets < classes)))


def _check_labels(who: str, shape: tuple[int, ...], targets: Any, skip: tuple[int, ...] = ()) -> None:
    targets = np.asarray(targets)
    _label_type(who, targets)
    targets, last = targets[~np.isin(targets, skip)], shape[-1] - 1
    if targets.size and (targets.min() < 0 or targets.max() > last):
        got = f"{targets.min()}..{targets.max()}"
        raise ValueError(f"{who}: labels must lie in 0..{last}, got {got}; renumber them or widen the last layer")


def _binary_cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate -t log p - (1 - t) log(1 - p) with p = sigmoid(output), per example.

    outputs (logits): float[batch] or float[batch, 1], targets: 0 to 1, of any real type, [batch] or [batch, 1].
    A target outside 0..1 is a ValueError on the host; inside jit it makes the example's loss and gradient NaN.
    """
    z, t = _one_unit(outputs, targets)
    return _judged(optax.losses.sigmoid_binary_cross_entropy(z, t), (t >= 0) & (t <= 1))


def _one_unit(outputs: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    z, t = _wide(outputs), _array(targets)
    t = jnp.asarray(check.as_int32(t) if jnp.issubdtype(t.dtype, jnp.integer) else t)
    if z.ndim == 0 or any(a.shape not in (z.shape[:1], (*z.shape[:1], 1)) for a in (z, t)):
        raise ValueError(
            f"binary_cross_entropy: needs one logit and one target for each example, "
            f"got {check.describe(z)} and {check.describe(t)}"
        )
    return z.reshape(-1), t.reshape(-1).astype(z.dtype)


def _check_binary(shape: tuple[int, ...], targets: Any) -> None:
    targets = np.asarray(targets)
    if targets.size and (bad := (targets < 0) | (targets > 1) | np.isnan(targets.astype(float))).any():
        raise ValueError(f"binary_cross_entropy: targets must lie in 0..1, got {targets[bad].reshape(-1)[0]}; rescale")


def _mse(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate the mean over units of (output - target)², per example: float[batch, ...] twice -> float[batch]."""
    outputs, targets = _wide(outputs), _array(targets)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"mse: outputs and targets must have the same shape, got {check.describe(outputs)} and "
            f"{check.describe(targets)}; reshape the targets or the last layer"
        )
    return _examples(jnp.square(outputs - jnp.asarray(targets.astype(outputs.dtype))))


def _check_values(shape: tuple[int, ...], targets: Any) -> None:
    if not np.all(np.isfinite(np.asarray(targets, np.float64))):
        raise ValueError("mse: targets must be finite, got NaN or inf; drop or impute them")


def _sequence_cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate the mean of -log softmax(outputs)[target] over the positions of each example that have a target.

    outputs (logits): float[batch, time, classes], targets: int[batch, time] -> float[batch]. A target of -1 means that
    nothing is predicted there (padding, a prompt): the outputs at that position do not matter, NaN included. An example
    without targets has loss 0. An example is right if every target has the largest logit (exact match). Labels may have
    any integer dtype. One beyond the classes is a ValueError on the host; inside jit the example's loss is NaN, and so is
    its gradient.
    """
    outputs, targets = _wide(outputs), _labels("sequence_cross_entropy", targets)
    if outputs.ndim != 3 or outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"sequence_cross_entropy: needs logits float[batch, time, classes] and labels int[batch, time], "
            f"got {check.describe(outputs)} and {check.describe(targets)}"
        )
    classes, real = outputs.shape[-1], targets != -1
    outputs = jnp.where(real[..., None], outputs, 0)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, jnp.clip(targets, 0, classes - 1))
    total = jnp.sum(jnp.where(real, loss, 0), axis=1) / jnp.maximum(1, jnp.sum(real, axis=1))
    return _judged(total, jnp.all((targets >= -1) & (targets < classes), axis=1))


def _sequence_correct(outputs: Any, targets: Any) -> jax.Array:
    targets = _labels("sequence_cross_entropy", targets)
    return jnp.all((targets == -1) | (jnp.argmax(outputs, axis=-1) == targets), axis=1).astype(jnp.float32)


def _class_correct(outputs: Any, targets: Any) -> jax.Array:
    targets = _labels("cross_entropy", targets)
    return _examples((jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32))


def _binary_correct(outputs: Any, targets: Any) -> jax.Array:
    z, t = _one_unit(outputs, targets)
    return ((z > 0) == (t > 0.5)).astype(jnp.float32)


cross_entropy = Loss("cross_entropy", _cross_entropy, _class_correct, functools.partial(_check_labels, "cross_entropy"))
sequence_cross_entropy = Loss(
    "sequence_cross_entropy",
    _sequence_cross_entropy,
    _sequence_correct,
    functools.partial(_check_labels, "sequence_cross_entropy", skip=(-1,)),
)
binary_cross_entropy = Loss("binary_cross_entropy", _binary_cross_entropy, _binary_correct, _check_binary)
mse = Loss("mse", _mse, None, _check_values)


def _wide(a: Any) -> jax.Array:
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
