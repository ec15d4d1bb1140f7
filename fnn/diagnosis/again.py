"""Recorded steps taken again, each time with one thing changed: what `replay` tries."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import arrays, tree
from fnn.training.depth import DepthAware, per_depth
from fnn.training.recorder import SPREADS, Recording, level, spread
from fnn.training.step import TrainState, TrainStep, train_step

LEADS = (1, 3, 10)
"""Steps before the spike at which the second moment is reset."""
STANDS_OUT = 10.0
"""An example is a suspect if its gradient's norm exceeds the median of its batch by so many MADs."""
BETA2 = 0.95
NUDGE = 1.0001
"""A factor of the updates that is no cure. Where it is one, chance decides."""


@dataclass(frozen=True)
class Change:
    """One thing that was changed, and the losses with it."""

    name: str
    detail: str
    losses: np.ndarray
    """From the first step that was replayed; those before the change are the control's."""
    peak: float
    """The highest loss from the spike on, NaN if one of them is not finite."""
    relative: float
    """Rise of the peak above the median before the spike, as a share of the control's rise; NaN where one is not finite."""
    removes: bool


class Suspect(NamedTuple):
    """An example whose gradient stands out."""

    step: int
    index: int
    """Place in the batch."""
    row: int | None
    """Row of the training data, if they are in memory."""
    norm: float
    """Norm of its gradient."""
    times: float
    """How many times the median norm of its batch."""


class Trial:
    """The steps from `first` to `end`, run with changes; `at` is where the spike begins."""

    def __init__(self, recording: Recording, first: int, end: int, at: int, state: TrainState):
        self.recording, self.step = recording, recording.step
        self.first, self.end, self.at = first, end, at
        self.marks: dict[int, TrainState] = {first: state}
        self.suspects: list[Suspect] = []
        self._step = _compiled(self.step)
        keep = {step for lead in (0, *LEADS) if (step := at - lead) > first}
        self.control, self.norms = self._run(first, keep=keep)
        known = recording.before(at)
        self.before, size = spread(known)
        known = known[np.isfinite(known)]
        usual = max(SPREADS * size, float(np.max(known)) - self.before) if known.size else np.inf
        self.peak_of_control = self.peak(self.control)
        rise = self.peak_of_control - self.before
        self.limit = self.before + (min(2 * usual, max(rise / 2, SPREADS * size)) if np.isfinite(rise) else 2 * usual)
        self.limit = np.inf if np.isnan(self.limit) else self.limit
        nudged = self.peak(self._run(first, rate=NUDGE)[0]) if first < at else self.peak_of_control
        self.reproduced = all(not (peak - self.before <= SPREADS * size) for peak in (self.peak_of_control, nudged))
        self.reproduced = self.reproduced and not nudged <= self.limit

    def peak(self, losses: np.ndarray) -> float:
        """Return the highest loss from the spike on, NaN if one is not finite."""
        window = losses[self.at - self.first :]
        return float(np.max(window)) if np.isfinite(window).all() else np.nan

    def changes(self) -> tuple[list[Change], dict[str, str]]:
        """Try each change that can be tried; say of the others why not."""
        found, missing = [], {}
        tries: dict[str, Callable[[], list[Change]]] = {
            "suspects weighted 0": self._without_suspects,
            "second moment reset": self._reset,
            "gradient clipped": self._clipped,
            "rate halved": lambda: self._slower("rate halved", 0.5),
            "rate × 0.1": lambda: self._slower("rate × 0.1", 0.1, tried=found[-1]),
            "β₂ = 0.95": self._beta2,
            "float32": self._float32,
        }
        for name, attempt in tries.items():
            try:
                candidates = attempt()
                found.append(min(candidates, key=lambda c: (not c.removes, np.inf if np.isnan(c.peak) else c.peak)))
            except _NotTried as why:
                missing[name] = str(why)
        return found, missing

    def _change(
        self, name: str, detail: str, begin: int | None = None, edit: Any = None, step: Any = None, **options: Any
    ) -> Change:
        """Run from a step whose state was kept on; `edit` changes that state. The arguments are what can be changed."""
        begin = self.first if begin is None else begin
        state = self.marks[begin] if edit is None else edit(self.marks[begin])
        losses, _ = self._run(begin, state, step=step, **options)
        losses = np.concatenate([self.control[: begin - self.first], losses])
        peak = self.peak(losses)
        rise = self.peak_of_control - self.before
        removes = self.reproduced and bool(peak <= self.limit)
        return Change(name, detail, losses, peak, float((peak - self.before) / rise), removes)

    def _run(
        self,
        begin: int,
        state: TrainState | None = None,
        *,
        rate: float = 1.0,
        limit: float = np.inf,
        drop: Any = (),
        keep: Any = (),
        step: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take the steps from `begin` on; return losses and gradient norms.

        Options: updates times `rate`, gradients clipped at `limit`, `drop` the suspects that get weight 0, `keep` steps whose
        states are kept before they are taken, `step` the compiled step.
        """
        now = self.marks[begin] if state is None else state
        losses, norms = [], []
        for number in range(begin, self.end):
            if number in keep:
                self.marks[number] = now
            batch = _weighted(self.recording.batch(number), [s.index for s in drop if s.step == number])
            now, metrics = (step or self._step)(now, batch, rate, limit)
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
        return np.asarray(jax.device_get(losses)), np.asarray(jax.device_get(norms))

    def _without_suspects(self) -> list[Change]:
        groups = [g for number in (self.at, self.at - 1) if number in self.marks for g in [self._suspects(number)] if g]
        self.suspects = [suspect for group in groups for suspect in group]
        if not groups:
            raise _NotTried("no few examples' gradients stand out in its batch or the one before")
        if len(groups) > 1:
            groups.append(self.suspects)
        found = []
        for group in groups:
            said = ", ".join(_name(suspect) for suspect in group[:3]) + (f", {len(group) - 3} more" * (len(group) > 3))
            begin = min(suspect.step for suspect in group)
            found.append(self._change("suspects weighted 0", said, begin, drop=group))
        return found

    @functools.cached_property
    def _of_examples(self) -> Callable[..., Any]:
        return _compiled_norms(self.step)

    def _suspects(self, number: int) -> list[Suspect]:
        """Find the examples of a batch whose gradients stand out."""
        try:
            norms = np.asarray(self._of_examples(self.marks[number], self.recording.batch(number)), np.float64)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise _NotTried(f"gradients of single examples are not to be had: {arrays.first_line(error)}") from None
        median, mad = level(norms)
        bad = ~(norms <= median + STANDS_OUT * mad)
        if bad.sum() > max(2, len(norms) // 16) or bad.all():
            return []
        order = sorted(np.nonzero(bad)[0], key=lambda i: -norms[i] if np.isfinite(norms[i]) else -np.inf)
        times = norms / median if median > 0 else np.full(len(norms), np.inf)
        row = self.recording.row
        return [Suspect(number, int(i), row(number, int(i)), float(norms[i]), float(times[i])) for i in order]

    def _reset(self) -> list[Change]:
        fresh = self.step.optimizer.init(self.marks[self.first].params)
        if not any(map(_has_moment, jax.tree.leaves(fresh, is_leaf=_has_moment))):
            raise _NotTried("the optimizer keeps none that can be reset (one with the name nu)")

        def edit(state):
            def one(old, new):
                return new if _has_moment(old) else old

            return state.replace(opt_state=jax.tree.map(one, state.opt_state, fresh, is_leaf=_has_moment))

        begins = sorted({max(self.first, self.at - lead) for lead in LEADS} | {self.first}, reverse=True)
        return [
            self._change("second moment reset", f"before step {begin}", begin, edit)
            for begin in begins
            if begin < self.at
        ] or [self._change("second moment reset", f"before step {self.at}", self.first, edit)]

    def _clipped(self) -> list[Change]:
        before = self.norms[: self.at - self.first]
        before = before[np.isfinite(before) & (before > 0)]
        if not before.size:
            raise _NotTried("no step before the spike was replayed that has a gradient to take the norm from")
        limit = float(np.median(before))
        return [self._change("gradient clipped", f"at norm {limit:.3g} from step {self.first} on", limit=limit)]

    def _slower(self, name: str, rate: float, tried: Change | None = None) -> list[Change]:
        if tried is not None and tried.removes:
            raise _NotTried("half of it was enough")
        return [self._change(name, f"from step {self.first} on", rate=rate)]

    def _beta2(self) -> list[Change]:
        hyper = optax.tree.get_all_with_path(self.marks[self.first].opt_state, "b2")
        if not hyper:
            raise _NotTried(
                "it is not in the optimizer's state; optax.inject_hyperparams(optax.adam)(1e-3) keeps it there"
            )

        if not all(isinstance(value, jax.Array | np.ndarray) for _, value in hyper):
            raise _NotTried("a schedule sets it at every step")

        def edit(state):
            return state.replace(opt_state=optax.tree.set(state.opt_state, b2=jnp.full_like(hyper[0][1], BETA2)))

        was = float(np.ravel(hyper[0][1])[0])
        return [self._change("β₂ = 0.95", f"{was:g} before; from step {self.first} on", edit=edit)]

    def _float32(self) -> list[Change]:
        dtype = self.step.given["compute_dtype"]
        if dtype is None or jnp.dtype(dtype).itemsize >= 4:
            raise _NotTried("no compute_dtype below it was given")
        step = _compiled(self.step, compute_dtype=None)
        return [self._change("float32", f"instead of {jnp.dtype(dtype)} from step {self.first} on", step=step)]


class _NotTried(Exception):
    """Why a change was not tried."""


def _compiled(step: TrainStep, **changes: Any) -> Callable[..., Any]:
    """Compile `(state, batch, rate, limit) -> (state, metrics)`: the step with its updates scaled and its gradient clipped."""
    given: dict[str, Any] = {**step.given, "metrics": ("loss", "grad_norm"), **changes}

    @jax.jit
    def run(state, batch, rate, limit):
        own = {**given, "optimizer": _changed(given["optimizer"], rate, limit)}
        return train_step(**own).pure(state, batch)

    return run


def _compiled_norms(step: TrainStep) -> Callable[..., Any]:
    """Compile `(state, batch) -> float[batch]`: norms of the single examples' gradients."""
    given: dict[str, Any] = {**step.given, "per_example": "norms", "max_norm": None, "skip_nonfinite": False}
    made = train_step(**given | {"per_layer": False, "metrics": ("loss",)})
    return jax.jit(lambda state, batch: made.pure(state, batch)[1]["per_example_norms"])


def _changed(optimizer: Any, rate: jax.Array, limit: jax.Array) -> DepthAware:
    """Clip what an optimiser gets to a norm, and scale what it returns; `rate` 1 and `limit` inf change no bit."""
    inner = per_depth(optimizer)

    def update(updates, state, params=None, **extra) -> Any:
        norm = tree.norm(updates)
        factor = jnp.where(norm > limit, limit / norm, 1)
        updates = jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)
        updates, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda u: (u * rate).astype(u.dtype), updates), state

    return DepthAware(inner.init, update)


def _weighted(batch: tuple[Any, Any], drop: list[int]) -> tuple[Any, Any]:
    """Give every example a weight, 0 for some, which become copies of one that is kept: else NaN times 0 would be NaN."""
    x, y = batch
    n = jax.tree.leaves(x)[0].shape[0]
    weights, index = np.ones(n, np.float32), np.arange(n)
    weights[drop] = 0
    if drop:
        index[drop] = np.setdiff1d(index, drop)[0]
        x, y = jax.tree.map(lambda a: a[index], (x, y))
    return x, arrays.Weighted(y, weights)


def _has_moment(node: Any) -> bool:
    return hasattr(node, "nu") and hasattr(node, "_fields")


def _name(suspect: Suspect) -> str:
    place = "" if suspect.row is None else f", row {suspect.row} of the data"
    size = (
        f"{suspect.times:.3g} times the median" if np.isfinite(suspect.times) else f"{suspect.norm:.3g}, the median 0"
    )
    size = f"gradient {size}" if np.isfinite(suspect.norm) else "gradient not finite"
    return f"example {suspect.index} of step {suspect.step}{place}, {size}"
