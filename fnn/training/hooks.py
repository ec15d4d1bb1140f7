"""Functions of the user's that `fit` calls between its steps, and what they are told."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fnn import arrays, check
from fnn.training.step import TrainState
from fnn.tree import PyTree


@dataclass(frozen=True)
class Report:
    """What a hook of `fit` is given."""

    step: int
    """Steps that the state has taken, as `state.step`."""
    epoch: int
    """Number of the epoch, from 0, as in `History`."""
    state: TrainState
    """The state now. The next step reuses its memory: copy what is kept, `jax.tree.map(jnp.copy, report.state)`."""
    metrics: dict[str, PyTree]
    """Metrics of every step of the epoch, or of the k steps of `on_step_every=(k, f)`, as NumPy arrays with a leading axis of
    steps."""
    validation: dict[str, float]
    """What the epoch's validation gave; empty without validation data and between epochs."""


HookFunction = Callable[[Report], bool | np.bool_ | None]


@dataclass(frozen=True)
class Hook:
    """A function to call after every epoch, or after every step whose number `every` divides."""

    name: str
    function: HookFunction
    every: int | None = None

    def __call__(self, report: Report) -> bool:
        """Call it; say whether it wants the run to stop."""
        answer = self.function(report)
        if answer is None or isinstance(answer, bool | np.bool_):
            return bool(answer)
        raise TypeError(
            f"fit: {self.name} must return True to stop, or False or nothing, got {arrays.brief(answer)}; a rate that changes "
            "is a schedule of the optimizer"
        )


def collect(on_epoch: HookFunction | None, on_step_every: tuple[int, HookFunction] | None) -> list[Hook]:
    """Check what was given to `fit` and make it one list."""
    hooks = []
    if on_epoch is not None:
        if not callable(on_epoch):
            raise TypeError(f"fit: on_epoch must be a function of a report, got {arrays.brief(on_epoch)}; pass one")
        hooks.append(Hook("on_epoch", on_epoch))
    if on_step_every is not None:
        pair = isinstance(on_step_every, tuple | list) and len(on_step_every) == 2
        if not pair or not isinstance(on_step_every[0], numbers.Integral) or not callable(on_step_every[1]):
            got = arrays.brief(on_step_every)
            raise TypeError(f"fit: on_step_every must be a pair (k, function of a report), got {got}; pass (100, f)")
        check.positive("fit", **{"on_step_every[0]": on_step_every[0]})
        hooks.append(Hook("on_step_every", on_step_every[1], int(on_step_every[0])))
    return hooks


def steps_left(step: int, periods: Iterable[int]) -> float:
    """Count the steps from `step` to the next multiple of one of the periods; infinity without any."""
    return min((k - step % k for k in periods), default=math.inf)


def after_steps(hooks: Sequence[Hook], run: Any) -> bool:
    """Call the hooks that are due at the run's step; say whether one wants to stop."""
    answers = [hook(_report(run, k, {})) for hook in hooks if (k := hook.every) is not None and run.step % k == 0]
    return any(answers)  # all are called


def after_epoch(hooks: Sequence[Hook], run: Any, validation: dict[str, float]) -> bool:
    """Call the hooks of epochs; say whether one wants to stop."""
    answers = [hook(_report(run, run.lengths[-1], validation)) for hook in hooks if hook.every is None]
    return any(answers)


def _report(run: Any, steps: int, validation: dict[str, float]) -> Report:
    return Report(run.step, len(run.lengths) - 1, run.state, run.metrics(steps), validation)
