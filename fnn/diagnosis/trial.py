"""Train one plan with several seeds, as lanes of one compiled program. Equal programs are compiled once."""

import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import admission, lowering, tree
from fnn.datasets.dataset import Dataset
from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.response import BOUNDLESS, Response, counted, prepared, times
from fnn.diagnosis.weights import keeping, redrawn
from fnn.training.depth import per_depth
from fnn.training.extra import offered


@dataclass(frozen=True)
class Outcome:
    """What a trial measured; every array has a leading axis of seeds."""

    chooses: np.ndarray
    """Score on the half of the held-out data that chooses: float[seeds]."""
    checks: np.ndarray
    """Score on the other half."""
    train: np.ndarray
    """Score on training examples."""
    losses: np.ndarray
    """float[seeds, steps]; `norms` are the gradient's norms, `ratios` |update| / |params|."""
    norms: np.ndarray
    ratios: np.ndarray
    moved: np.ndarray
    """float[seeds, arrays]: norm of the change of each parameter array over its first norm; NaN for one that began as 0."""
    shrunk: np.ndarray
    """float[seeds]: norm of all parameters at the end over that at the start."""
    seconds: float
    began: np.ndarray | None = None
    """Score of the held-out half that chooses, before the first step."""
    middle: Any = None
    """(params, state) after half of the steps, with a leading axis of seeds; of the training as it is, or where asked for."""


MEMORY = 2**30
"""Bytes that the lanes of a program may take for their parameters and what goes with them."""
SHORT = 0.3
"""If a training takes less than this share of the time that its program took to compile, others are compiled in haste."""
COPIES = 7
"""Of the parameters: they themselves, their first values, gradients, updates, two moments, those of the middle."""


class Runner:
    """Run plans of one case; keeps each program that it compiled. A thread beside compiles those that come next."""

    def __init__(self, case: Case, thread: ThreadPoolExecutor):
        self.case, self.thread = case, thread
        self.compiled: list[float] = []
        """Seconds that each program took to compile."""
        self.running = float("inf")
        """Seconds that the training as it is took to run."""
        self._programs: dict[Any, Future[Any]] = {}
        self._drawn: dict[Any, Any] = {}
        self._cases: dict[Any, Case] = {}
        self._instruments: dict[Any, Any] = {}
        self._response: Future[Response] | None = None

    def listen(self) -> None:
        """Begin to measure how the optimiser answers to the size of the gradient; beside what runs in this thread."""
        tx = per_depth(self.case.transformation(Plan()))
        self._response = self.thread.submit(prepared(tx, self.draw(Plan(), 0)[0], self.case.steps))

    @property
    def response(self) -> Response:
        """How the optimiser answers to the size of the gradient; of one that was not measured nothing."""
        return self._response.result() if self._response is not None else BOUNDLESS

    def known(self, plan: Plan) -> bool:
        """Whether the program of this plan is compiled already."""
        found = self._programs.get(self.key(plan))
        return found is not None and found.done()

    @property
    def waiting(self) -> int:
        """How many programs are not compiled yet."""
        return sum(not program.done() for program in self._programs.values())

    def prepare(self, plan: Plan) -> "Future[Any]":
        """Begin to compile the program of a plan, unless that is done or under way."""
        key = self.key(plan)
        if key not in self._programs:
            started = time.perf_counter()
            # Traced here, since settings of JAX such as x64 may hold for this thread alone.
            lowered = jax.jit(self._lanes(plan)).lower(*self._arguments(plan, range(self.lanes(plan))))
            self._programs[key] = self.thread.submit(self._compile, lowered, time.perf_counter() - started)
        return self._programs[key]

    def _lanes(self, plan: Plan) -> Any:
        """Give the function of the seeds that run at once; a single one is not mapped, which is faster on a CPU."""
        one = functools.partial(self._one, plan)
        if self.lanes(plan) > 1:
            return jax.vmap(one, in_axes=(0, 0, 0, 0, None, None, None, None))

        def alone(params, state, key, order, *shared):
            lane = jax.tree.map(lambda a: a[0], (params, state, key, order))
            return jax.tree.map(lambda a: a[None], one(*lane, *shared))

        return alone

    def _compile(self, lowered: Any, seconds: float) -> Any:
        started = time.perf_counter()
        short = bool(self.compiled) and self.running < SHORT * self.compiled[0]
        program = lowered.compile(compiler_options=lowering.compiler_options(hasty=short))
        self.compiled.append(seconds + time.perf_counter() - started)
        return program

    def instruments(self, plan: Plan, make: Any) -> Any:
        """Give what `make` made for the first plan with the same program."""
        key = self.key(replace(plan, steps=None, optimizer=None, unclipped=False))
        if key not in self._instruments:
            self._instruments[key] = make()
        return self._instruments[key]

    def draw(self, plan: Plan, seed: int) -> tuple[Any, Any]:
        """Draw the weights and the state of one seed."""
        key = (plan.knobs, seed)
        if key not in self._drawn:
            self._drawn[key] = self.case.model(plan).draw(seed)
        params, state = self._drawn[key]
        if plan.wide:
            params = jax.tree.map(lambda a: a.astype(tree.statistics_dtype(a.dtype)), params)
        if plan.gain is not None:
            params = redrawn(
                params, plan.gain, 1000 + seed, self.case.last(params), self.case.seen.get("recurrent", ())
            )
        return params if plan.keep is None else keeping(params, plan.keep), state

    def order(self, plan: Plan, seed: int) -> np.ndarray:
        """List which examples each step learns: int32[steps, batch], rows of the training data and then those that choose."""
        case, size, steps = self.case, self._batch(plan), self._steps(plan)
        n, held = case.train.size, case.chooses.size
        rows = {"train": np.arange(n), "held out": n + np.arange(held), "both": np.arange(n + held)}[plan.learn]
        size = min(size, len(rows))
        rng, per = np.random.default_rng((seed, 1)), len(rows) // size
        shuffled = case.shuffle if plan.shuffle is None else plan.shuffle
        epochs = [(rng.permutation(rows) if shuffled else rows)[: per * size] for _ in range(-(-steps // per))]
        order = np.concatenate(epochs).reshape(-1, size)[:steps].astype(np.int32)
        if size < self._batch(plan):  # as many rows as the program takes; some count twice
            order = np.concatenate([order, order[:, np.arange(self._batch(plan) - size) % size]], axis=1)
        return order

    def run(self, plan: Plan, seeds: Any, middle: bool = False) -> Outcome:
        """Train with these seeds; `middle` asks for the outcome's."""
        seeds, lanes = list(seeds), self.lanes(plan)
        program, found, seconds = self.prepare(plan).result(), [], 0.0
        for first in range(0, len(seeds), lanes):
            chunk = seeds[first : first + lanes]
            args = self._arguments(plan, chunk + chunk[-1:] * (lanes - len(chunk)))
            start = time.perf_counter()
            *numbers, halfway = program(*args)
            numbers = [a[: len(chunk)] for a in jax.device_get(numbers)]
            seconds += time.perf_counter() - start
            found.append((numbers, jax.device_get(halfway) if (middle or plan == Plan()) and not found else None))
        numbers = [np.concatenate(parts) for parts in zip(*(numbers for numbers, _ in found), strict=True)]
        scores = [self.changed(plan).scored(values) for values in numbers[:3]]
        began = self.changed(plan).scored(numbers[-1]) if np.isfinite(numbers[-1]).all() else None
        measured: list[Any] = [*scores, *numbers[3:-1], seconds, began, found[0][1]]
        self.running = min(self.running, seconds)
        return Outcome(*measured)

    def lanes(self, plan: Plan) -> int:
        """Say how many seeds run at once: one, or as many as `MEMORY` holds the parameters and what goes with them of."""
        if not lowering.side_by_side():
            return 1
        params, _ = self.draw(replace(plan, gain=None), 0)
        size = COPIES * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
        return max(1, min(self.case.seeds, MEMORY // max(1, size)))

    def _arguments(self, plan: Plan, seeds: Any) -> tuple[Any, ...]:
        """Collect what a program takes, seeds first."""
        case = self.changed(plan)
        drawn = [self.draw(plan, seed) for seed in seeds]
        params, states = jax.tree.map(lambda *parts: np.stack(parts), *drawn)
        orders = np.stack([self.order(plan, seed) for seed in seeds])
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        pool = Dataset(*jax.tree.map(lambda a, b: np.concatenate([a, b]), tuple(case.train), tuple(case.chooses)))
        steps = 1 + np.arange(self._steps(plan))
        rates = np.float32(plan.rate * np.minimum(1.0, steps / max(1.0, plan.warm * len(steps))))
        scale = plan.gradients if plan.optimizer is None else 1.0  # which is for the optimiser that was given
        limits = jnp.float32(plan.clip), jnp.float32(scale)
        return params, states, keys, orders, rates, limits, pool, case.checks

    def changed(self, plan: Plan) -> Case:
        """Give the case with the plan's changes of the data."""
        if plan.data not in self._cases:
            self._cases[plan.data] = functools.reduce(lambda case, change: change(case), plan.data, self.case)
        return self._cases[plan.data]

    def key(self, plan: Plan) -> Any:
        """What a program depends on; what is left out are numbers that it takes as arguments."""
        task = self.changed(plan).task
        return replace(
            plan,
            rate=1.0,
            warm=0.0,
            clip=1.0,
            gradients=1.0,
            gain=None,
            keep=None,
            data=(),
            learn="train",
            shuffle=None,
        ), task

    def _batch(self, plan: Plan) -> int:
        return plan.batch_size or self.case.batch_size

    def _steps(self, plan: Plan) -> int:
        return plan.steps or self.case.steps

    def _one(
        self, plan: Plan, params: Any, state: Any, key: Any, order: Any, rates: Any, limits: Any, pool: Any, last: Any
    ) -> Any:
        """Train one seed; what `Outcome` lists. The arguments are those of a program, hence nine."""
        case = self.changed(plan)
        model, tx = case.model(plan), per_depth(case.transformation(plan))
        (first, fresh), (clip, scale) = (params, state), limits
        own = self.key(plan) == self.key(Plan())
        whole = jnp.minimum(scale, 1)

        def rows(index):
            return jax.tree.map(lambda a: jnp.asarray(a)[index], tuple(pool))

        def step(carry, t):
            params, state, opt_state, middle = carry
            middle = jax.tree.map(lambda a, b: jnp.where(t == len(order) // 2, a, b), (params, state), middle)
            batch = rows(order[t])

            def objective(params):
                return model.objective(params, state, batch, jax.random.fold_in(key, t))

            (value, new), grads = jax.value_and_grad(objective, has_aux=True)(params)
            norm = tree.norm(grads)
            if plan.pace < 1 and plan.optimizer is None:
                opt_state = counted(opt_state, self.response.counts, jnp.floor(t * plan.pace))
            grads = times(grads, jnp.where(norm > clip, clip / norm, 1.0))
            extra = offered(value, grads, lambda p: objective(p)[0], lambda p: jax.grad(objective, has_aux=True)(p)[0])
            updates, opt_state = admission.update(
                "diagnose", tx, times(grads, scale), opt_state, times(params, whole), **extra
            )
            updates = times(updates, rates[t] / whole)
            trained = optax.apply_updates(params, updates)
            moved = tree.norm(jax.tree.map(jnp.subtract, trained, params)) / tree.norm(params)
            return (trained, new, opt_state, middle), (value, norm, moved)

        start = params, state, tx.init(times(params, whole)), (params, state)
        (params, state, _, middle), (values, norms, ratios) = jax.lax.scan(step, start, jnp.arange(order.shape[0]))
        n, held = case.train.size, case.chooses.size
        some = np.unique(np.linspace(0, n - 1, min(n, 512)).astype(int))
        parts = rows(np.arange(n, n + held)), jax.tree.map(jnp.asarray, tuple(last)), rows(some)
        if model.outputs is None:
            score = model.score or (lambda params, batch: model.objective(params, state, batch, key)[0])
            chooses, checks, train = (score(params, part) for part in parts)
            began = score(first, parts[0]) if own else jnp.nan
        else:
            outputs = model.outputs(params, state, jax.tree.map(lambda *a: jnp.concatenate(a), *(x for x, _ in parts)))
            ends = np.cumsum([held, len(last.y)])
            split = jax.tree.map(lambda a: jnp.split(a, ends), outputs)
            chooses, checks, train = (case.task(o, y) for o, (_, y) in zip(split, parts, strict=True))
            began = case.task(model.outputs(first, fresh, parts[0][0]), parts[0][1]) if own else jnp.nan
        whole, before = (tree.norms(a) for a in (jax.tree.map(jnp.subtract, params, first), first))
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(before), strict=True)
        changes = [jnp.ravel(jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.nan)) for a, b in pairs]
        shrunk = tree.norm(params) / tree.norm(first)
        return (
            chooses,
            checks,
            train,
            values,
            norms,
            ratios,
            jnp.concatenate(changes),
            shrunk,
            jnp.float32(began),
            middle,
        )
