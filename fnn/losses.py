"""Losses: per example first, `loss(outputs, targets) -> float[batch]`; the mean is the caller's, and comes second.

Sums over classes or units are taken in at least float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import check
from fnn.arrays import narrow
from fnn.tree import statistics_dtype


class Loss:
    """Call `loss(outputs, targets) -> float[batch]`; know `loss.correct`, and how to check targets on the host.

    Any function of that form is a loss for fnn; this class adds accuracy and one clear sentence for bad targets.
    `correct(outputs, targets) -> float[batch]` is 1 where the prediction is right, None where that makes no sense.
    """

    def __init__(
        self,
        name: str,
        per_example: Callable[[Any, Any], jax.Array],
        correct: Callable[[Any, Any], jax.Array] | None,
        check_targets: Callable[[tuple[int, ...], Any], None],
    ):
        self.name, self.correct = name, correct
        self._per_example, self._check = per_example, check_targets
        self.__doc__ = per_example.__doc__

    def __call__(self, outputs: Any, targets: Any) -> jax.Array:
        return self._per_example(outputs, narrow(self.name, "targets", targets))

    def check(self, shape: tuple[int, ...], targets: Any) -> None:
        """Refuse targets that do not fit outputs of this shape (batch first). Reads their values: host side only."""
        self._check(shape, targets)

    def __repr__(self) -> str:
        return f"Loss({self.name})"


def correct(loss: Callable[..., Any]) -> Callable[..., Any] | None:
    """Look up which predictions a loss calls right; None for plain functions and regression."""
    return loss.correct if isinstance(loss, Loss) else None


def check_targets(loss: Callable[..., Any], shape: tuple[int, ...], targets: Any) -> None:
    """Let a loss check targets against the shape of the outputs; plain functions check nothing."""
    if isinstance(loss, Loss):
        if not hasattr(targets, "dtype"):
            raise TypeError(f"{loss.name}: targets must be one array, got {check.describe(targets)}")
        try:
            loss.check(shape, targets)
        except jax.errors.TracerArrayConversionError:
            return  # traced targets have no values yet; inside jit bad ones give NaN


def _cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate -log softmax(outputs)[target] per example.

    outputs (logits): float[batch, ..., classes], targets: int[batch, ...] -> float[batch], the mean over further axes.
    Labels may have any integer dtype. Inside jit one outside 0..classes-1 makes the example's loss and gradient NaN,
    never a neighbour's; on the host it is a ValueError.
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


def _check_labels(shape: tuple[int, ...], targets: Any) -> None:
    targets = np.asarray(targets)
    _label_type("cross_entropy", targets)
    _range("cross_entropy", shape[-1], targets)


def _binary_cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate -t log p - (1 - t) log(1 - p) with p = sigmoid(output), per example.

    outputs (logits): float[batch] or float[batch, 1], targets: 0 or 1, of any real type, [batch] or [batch, 1].
    Inside jit a target outside 0..1 makes the example's loss and gradient NaN; on the host it is a ValueError.
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
            f"mse: outputs and targets must have one shape, got {check.describe(outputs)} and "
            f"{check.describe(targets)}; reshape the targets or the last layer"
        )
    return _examples(jnp.square(outputs - jnp.asarray(targets.astype(outputs.dtype))))


def _check_values(shape: tuple[int, ...], targets: Any) -> None:
    if not np.all(np.isfinite(np.asarray(targets, np.float64))):
        raise ValueError("mse: targets must be finite, got NaN or inf; drop or impute them")


def _sequence_cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate the mean of -log softmax(outputs)[target] over the positions of each example that have a target.

    outputs (logits): float[batch, time, classes], targets: int[batch, time], -1 where nothing is to be predicted
    (padding, a prompt), whatever the outputs there, NaN included -> float[batch]; an example without targets has loss 0.
    An example counts as right if all its targets are the largest logits: exact match. Labels may have any integer dtype.
    Inside jit one beyond the classes makes the example's loss and gradient NaN; on the host it is a ValueError.
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


def _check_sequence_labels(shape: tuple[int, ...], targets: Any) -> None:
    targets = np.asarray(targets)
    _label_type("sequence_cross_entropy", targets)
    _range("sequence_cross_entropy", shape[-1], targets[targets != -1])


def _sequence_correct(outputs: Any, targets: Any) -> jax.Array:
    targets = _labels("sequence_cross_entropy", targets)
    return jnp.all((targets == -1) | (jnp.argmax(outputs, axis=-1) == targets), axis=1).astype(jnp.float32)


def _class_correct(outputs: Any, targets: Any) -> jax.Array:
    targets = _labels("cross_entropy", targets)
    return _examples((jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32))


def _binary_correct(outputs: Any, targets: Any) -> jax.Array:
    z, t = _one_unit(outputs, targets)
    return ((z > 0) == (t > 0.5)).astype(jnp.float32)


cross_entropy = Loss("cross_entropy", _cross_entropy, _class_correct, _check_labels)
sequence_cross_entropy = Loss(
    "sequence_cross_entropy", _sequence_cross_entropy, _sequence_correct, _check_sequence_labels
)
binary_cross_entropy = Loss("binary_cross_entropy", _binary_cross_entropy, _binary_correct, _check_binary)
mse = Loss("mse", _mse, None, _check_values)


def _wide(a: Any) -> jax.Array:
    a = jnp.asarray(a)
    return a.astype(statistics_dtype(a.dtype))


def _examples(a: jax.Array) -> jax.Array:
    return jnp.mean(a, axis=tuple(range(1, a.ndim)))


def _judged(loss: jax.Array, good: jax.Array) -> jax.Array:
    """NaN where a target is bad. A factor, not a choice: a choice would let the gradient be zero there."""
    return loss * jnp.where(good, 1, jnp.nan).astype(loss.dtype)


def _labels(who: str, targets: Any) -> jax.Array:
    """Cast labels of any integer dtype to int32: see `check.as_int32`."""
    targets = _array(targets)
    _label_type(who, targets)
    return jnp.asarray(check.as_int32(targets))


def _array(a: Any) -> Any:
    """Keep NumPy's arrays: as JAX's, integers beyond int32 would wrap around unless x64 is on."""
    return a if hasattr(a, "dtype") else np.asarray(a)


def _label_type(who: str, targets: Any) -> None:
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"{who}: labels must be integers, got {check.describe(targets)}; use labels.astype(int)")


def _range(who: str, classes: int, targets: np.ndarray) -> None:
    if targets.size and (targets.min() < 0 or targets.max() >= classes):
        raise ValueError(
            f"{who}: labels must lie in 0..{classes - 1}, got {targets.min()}..{targets.max()}; "
            "renumber them or widen the last layer"
        )
