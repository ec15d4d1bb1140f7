"""What a loss is, the tasks that it has, and the checks of targets and weights."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnn import check
from fnn.arrays import Weighted, narrow
from fnn.tree import PyTree

Scores = TypeVar("Scores")
ExampleFunction = Callable[[PyTree, PyTree], jax.Array | tuple[jax.Array, jax.Array | None]]
"""A loss or a metric: `(outputs, targets) -> float[batch]`, one number for each example, or -> `losses.Counted`."""
ScalarLoss = Callable[..., ArrayLike | tuple[ArrayLike, PyTree]]
"""A loss of a model in any framework: `(params, *batch) -> float[]`, or -> (float[], aux)."""


class Loss(Generic[Scores]):
    """A function `loss(outputs, targets) -> float[batch]` that also knows which predictions and targets are right.

    Any function of that form is a loss for fnn, of trees of outputs and targets too; this class adds accuracy, and a clear
    error for bad targets. `loss.correct(outputs, targets) -> float[batch]` is 1 for right predictions and 0 for wrong ones;
    it is None for losses without right and wrong, such as `mse`. `check_targets(shape, targets)` refuses targets that do
    not fit outputs of this shape, batch axis first; it may read values. By default targets must be finite.

        mae = Loss("mae", lambda o, y: abs(o - y).mean(-1), correct=lambda o, y: (abs(o - y) < 0.1).all(-1))
    """

    def __init__(
        self,
        name: str,
        per_example: Callable[[PyTree, PyTree], Scores],
        correct: ExampleFunction | None = None,
        check_targets: Callable[[PyTree, PyTree], None] | None = None,
    ):
        self.name, self.correct = name, correct
        self._per_example, self._check = per_example, check_targets
        self.__doc__ = per_example.__doc__

    def __call__(self, outputs: PyTree, targets: PyTree) -> Scores:
        return self._per_example(outputs, jax.tree.map(lambda a: narrow(self.name, "targets", a), targets))

    def check(self, shape: PyTree, targets: PyTree) -> None:
        """Refuse targets that do not fit outputs of this shape, batch axis first. It reads values: not under jit."""
        if self._check is not None:
            self._check(shape, targets)
        else:
            finite(self.name, targets)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In another process a loss that its module holds by name is that one, as a function would be; others are copies."""
        home = sys.modules.get(getattr(self._per_example, "__module__", ""))
        if home is not None and getattr(home, self.name, None) is self:
            return _held, (home.__name__, self.name)
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"Loss({self.name})"


def _held(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


class Sum(Loss[jax.Array]):
    """A loss of several tasks, made by `losses.sum_of`: the sum of factor times the mean of each task's loss."""

    def __init__(
        self,
        tasks: Mapping[str | int, tuple[float, ExampleFunction]],
        call: Callable[["Sum", PyTree, PyTree], jax.Array],
    ):
        self.tasks = dict(tasks)
        said = [f"{key}: {factor:g} {label(f)}" for key, (factor, f) in self.tasks.items()]
        super().__init__(f"sum_of({', '.join(said)})", functools.partial(call, self))

    def check(self, shape: PyTree, targets: PyTree) -> None:
        """Check each task's targets."""
        check_targets(self, shape, targets)


class Part(NamedTuple):
    """One task: what its loss gets."""

    name: str
    loss: ExampleFunction
    outputs: PyTree
    targets: PyTree
    weights: tuple[ArrayLike, ...]


def parts(
    loss: ExampleFunction, outputs: PyTree, targets: PyTree, name: str = "", weights: tuple[ArrayLike, ...] = ()
) -> Iterator[Part]:
    """List the tasks of a loss, of a `Sum` within a `Sum` too; any other loss is one task without a name."""
    targets, own = unwrapped(targets)
    weights = (*weights, *own)
    if not isinstance(loss, Sum):
        inner = jax.tree.leaves(targets, is_leaf=lambda node: isinstance(node, Weighted))
        if any(isinstance(node, Weighted) for node in inner):
            raise ValueError(
                f"{label(loss)}: weights inside of a tree of targets must be those of a task, got {check.describe(targets)}; "
                "combine losses by losses.sum_of, or weigh whole examples: (x, y, weights)"
            )
        yield Part(name, loss, outputs, targets, weights)
        return
    for key, (_, inner) in loss.tasks.items():
        pair = _entry(loss, outputs, key), _target(loss, targets, key)
        yield from parts(inner, *pair, f"{name}/{key}" if name else str(key), weights)


def _entry(loss: Sum, outputs: Any, key: Any) -> Any:
    several = isinstance(outputs, tuple | list) and not all(isinstance(n, int) for n in outputs)  # no array's shape
    if key not in (outputs if isinstance(outputs, Mapping) else range(len(outputs)) if several else ()):
        raise ValueError(
            f"{loss.name}: the net's outputs must hold an entry for each loss, got {check.describe(outputs)} and none for "
            f"{key!r}; build the net with parallel or branches, or rename the losses"
        )
    return outputs[key]


def _target(loss: Sum, targets: Any, key: Any) -> Any:
    """Return a task's target; in a dict a task may have none, and gets None."""
    if isinstance(targets, Mapping) and set(targets) <= set(loss.tasks):
        return targets.get(key)
    if isinstance(targets, tuple | list) and set(range(len(targets))) == set(loss.tasks):
        return targets[key]
    raise ValueError(
        f"{loss.name}: the targets must be named or numbered like the losses, got {check.describe(targets)}; rename them, "
        "or leave out what no loss sees"
    )


def unwrapped(targets: PyTree) -> tuple[PyTree, tuple[ArrayLike, ...]]:
    """Return targets without the weights of whole examples, and these."""
    weights = ()
    while isinstance(targets, Weighted):
        targets, weights = targets.targets, (*weights, targets.weights)
    return targets, weights


def correct(loss: ExampleFunction) -> ExampleFunction | None:
    """Return `loss.correct`, None for plain functions."""
    return loss.correct if isinstance(loss, Loss) else None


def check_targets(loss: ExampleFunction, shape: PyTree, targets: PyTree) -> None:
    """Call `loss.check` for outputs of this shape (a tree of shapes if they are a tree), for each task, and check weights.

    A plain function checks nothing.
    """
    try:
        for part in parts(loss, shape, targets):
            for weights in part.weights:
                check_weights(label(loss), weights)
            if isinstance(part.loss, Loss):
                part.loss.check(part.outputs, part.targets)
    except jax.errors.TracerArrayConversionError:
        return  # traced targets have no values; bad ones give NaN inside jit


def check_weights(who: str, weights: Any) -> None:
    """Refuse weights that are negative, not finite, or all zero. It reads values: not under jit."""
    _weight_type(who, weights)
    w = np.asarray(weights, np.float64)
    if (bad := ~((w >= 0) & (w < np.inf))).any():
        raise ValueError(f"{who}: weights must be finite and at least 0, got {w[bad][0]}; leave such examples out")
    if w.size and not w.any():
        raise ValueError(f"{who}: some weight must be above 0, got {w.size} times 0; skip such a batch")


def _weight_type(who: str, weights: Any) -> None:
    if not hasattr(weights, "dtype") or not (weights.dtype == bool or jnp.issubdtype(weights.dtype, jnp.floating)):
        raise TypeError(
            f"{who}: weights, the third of (x, y, weights), must be floating or bool, got {check.describe(weights)}; use "
            "weights.astype(float), or leave out what is no weight"
        )


def label(loss: Any) -> str:
    """Name a loss for a message."""
    return getattr(loss, "name", None) or getattr(loss, "__name__", type(loss).__name__)


def finite(who: str, targets: PyTree) -> None:
    """Refuse NaN and infinity in a tree of targets; it reads values."""
    for leaf in jax.tree.leaves(targets):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise ValueError(f"{who}: targets must be finite, got NaN or inf; drop or impute them")


def weight(who: str, weights: Any, like: jax.Array) -> jax.Array:
    """Return weights float[batch]; those below zero become NaN. Refuse any other shape."""
    _weight_type(who, weights)
    if weights.shape != like.shape[:1]:
        raise ValueError(
            f"{who}: weights must be float[batch], one for each example, got {check.describe(weights)}; weigh tokens in a "
            "loss that returns fnn.losses.Counted(sums, counts)"
        )
    w = jnp.asarray(weights).astype(like.dtype)
    return jnp.where(w >= 0, w, jnp.nan)


def factors(loss: Any) -> dict[str, float]:
    """Return how much each task counts, by the names of `totals`."""
    if not isinstance(loss, Sum):
        return {"": 1.0}
    return {
        f"{key}/{name}" if name else str(key): factor * more
        for key, (factor, inner) in loss.tasks.items()
        for name, more in factors(inner).items()
    }
