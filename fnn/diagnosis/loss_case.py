"""A training of any JAX loss as a case: only what can be reached from outside is varied."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, tree
from fnn.datasets.dataset import Dataset, generator
from fnn.diagnosis.case import MOST, Case, Model, Plan, _optimizing, found_in
from fnn.diagnosis.task import Task, in_targets
from fnn.diagnosis.weights import count, is_kernel, is_narrow, keepers
from fnn.gradients.operations import Unreadable
from fnn.gradients.penalty import penalized, removable, unpenalized, without_term
from fnn.gradients.swap import swapped
from fnn.gradients.watch import watch
from fnn.gradients.wide import in_float32, narrowest
from fnn.tasks import ScalarLoss
from fnn.tree import PyTree

INPUTS = (
    "x", "inputs", "input", "image", "images", "features", "data", "tokens", "input_ids", "ids", "text", "sequence",
)  # fmt: skip
TARGETS = ("y", "targets", "target", "label", "labels", "tags", "class", "classes", "category")


@dataclass(frozen=True)
class LossCase(Case):
    """A case of a loss `(params, batch) -> float[]`, of which no outputs are known."""

    params: Any = None
    join: Callable[[Any, Any], Any] = field(default=lambda x, y: (x, y))
    """(inputs, the rest) -> a batch as the loss takes it."""
    score: Callable[[Any, Any], Any] | None = None
    reference: float = 1.0
    """Loss of a guess that does not look at the inputs."""
    final: int | None = None
    """Which array of the parameters is the last layer's kernel."""
    slope: Any = None
    """Compiled: (parameters, batch) -> loss without its penalties, and its gradient."""
    other_targets: bool = False
    """Whether the targets were changed, so that the loss may have lost its lower bound."""

    def model(self, plan: Plan) -> Model:
        def of_batch(params, batch):
            return check.scalar_loss("diagnose_loss", self.loss(params, self.join(*batch)), False)

        loss = swapped(of_batch, dict(plan.swap)) if plan.swap else of_batch
        loss = in_float32(loss) if plan.float32 else loss
        given, whole = self.score, loss
        score = unpenalized(loss) if self.penalized else None  # a penalty is no merit, and leaving it out is none
        if given is not None:

            def of_user(params, batch):
                return jnp.asarray(given(params, self.join(*batch)))

            # The score runs the net too: as it was trained.
            of_user = swapped(of_user, dict(plan.swap)) if plan.swap else of_user
            of_user = in_float32(of_user) if plan.float32 else of_user

            def judged(params, batch):  # of parameters that are lost it says nothing, whatever number it gives
                return jnp.where(jnp.isfinite(whole(params, batch)), of_user(params, batch), jnp.nan)

            score = judged

        loss = unpenalized(whole) if plan.bare else whole
        loss = without_term(loss, plan.without) if plan.without is not None else loss

        def draw(seed):
            if seed == 0:
                return self.params, ()
            return _redrawn_alike(self.params, 1000 + seed), ()

        return Model(draw, lambda params, state, batch, key: (plan.sign * loss(params, batch), ()), score=score)

    def scored(self, values: np.ndarray) -> np.ndarray:
        """Turn losses into scores: 1 - loss/guess, within -1 and 1."""
        if self.score is not None:
            return np.where(np.isfinite(values), values, 0.0)
        if (below := values < -1e-3 * self.reference).any():
            if not self.other_targets:
                raise _no_share(float(np.min(values[below])))
            values = np.where(below, np.inf, values)
        with np.errstate(all="ignore"):
            return np.where(
                np.isfinite(values), np.clip(1 - np.asarray(values, np.float64) / self.reference, -1, 1), -1.0
            )

    def last(self, params: Any) -> int | None:
        return self.final

    def with_x(self, f: Any) -> "Case":
        return _referred(super().with_x(f))

    def with_y(self, f: Any) -> "Case":
        return _referred(replace(super().with_y(f), other_targets=True))


def _redrawn_alike(params: Any, seed: int) -> Any:
    """Draw other weights of the same kind: each array in another order along each axis.

    That keeps sizes, means and singular values, and what is a fault or a virtue: equal units, orthogonal weights.
    """
    rng = np.random.default_rng(seed)

    def shuffle(a):
        return jnp.asarray(np.asarray(a)[np.ix_(*map(rng.permutation, a.shape))] if a.ndim else a)

    return jax.tree.map(shuffle, params)


def _referred(case: Any) -> Any:
    """Find the loss of a guess: with a last layer that gives the same outputs for every example, the best ones it can.

    Its kernel is zero, and what is added behind it is fitted; without a bias its outputs are zero. Where the last layer is not
    known, the weights as they are guess.
    """
    if case.score is not None:
        return case
    batch = tuple(case.chooses)
    leaves, structure = jax.tree.flatten(case.params)
    if case.final is not None:
        leaves[case.final] = jnp.zeros_like(leaves[case.final])
    blank = jax.tree.unflatten(structure, leaves)
    values = [float(case.slope(blank, case.join(*batch))[0])]
    if case.final is not None:
        values.append(_fitted(case, leaves, structure, batch))
    good = [v for v in values if np.isfinite(v) and v != 0]
    if min(good, default=1.0) < 0:
        if not case.other_targets:
            raise _no_share(min(good))
        good = [v for v in good if v > 0]
    return replace(case, reference=min(good, default=1.0))


def _no_share(loss: float) -> ValueError:
    return ValueError(
        f"diagnose_loss: the loss must be at least 0, so that 1 - loss/guess can be the score, got {loss:.3g}; pass score=, a "
        "function (params, batch) that is higher for better predictions"
    )


def _fitted(case: Any, leaves: list[Any], structure: Any, batch: Any) -> float:
    """Minimise the loss over the vectors that still have a gradient when the last kernel is zero: its biases."""
    from scipy.optimize import minimize

    found: list[float] = []

    def slopes(leaves):
        value, slope = case.slope(jax.tree.unflatten(structure, leaves), case.join(*batch))
        found.append(float(value))
        return [np.asarray(g, np.float64) for g in jax.tree.leaves(slope)]

    first = slopes(leaves)
    free = [i for i, g in enumerate(first) if g.ndim <= 1 and np.isfinite(g).all() and g.any()]
    if not free:
        return np.nan
    sizes = np.cumsum([first[i].size for i in free])[:-1]

    def both(vector):
        parts = dict(zip(free, np.split(vector, sizes), strict=True))
        now = [jnp.asarray(parts[i].reshape(a.shape), a.dtype) if i in parts else a for i, a in enumerate(leaves)]
        slope = slopes(now)
        return found[-1], np.concatenate([slope[i].ravel() for i in free])

    start = np.concatenate([np.asarray(leaves[i], np.float64).ravel() for i in free])
    with np.errstate(all="ignore"):  # a loss that is not finite ends the search; each evaluation costs a gradient
        minimize(both, start, jac=True, method="L-BFGS-B", options={"maxfun": 30})
    return min((v for v in found if np.isfinite(v)), default=np.nan)


def loss_case_of(
    loss: ScalarLoss,
    params: PyTree,
    batches: Any,
    optimizer: Any,
    validation: Any,
    score: Any,
    *,
    steps: Any,
    seeds: Any,
    shuffle: bool,
) -> LossCase:
    """Check what was given, and make a case of it. The keywords are those of `diagnose_loss`, hence nine arguments."""
    if not callable(loss):
        raise TypeError(f"diagnose_loss: loss must be a function (params, batch) -> float[], got {type(loss).__name__}")
    check.parameters("diagnose_loss", params)
    check.positive("diagnose_loss", seeds=seeds)
    given = _batches("batches", batches)
    held = given if validation is None else _batches("validation", validation)
    size, n = len(jax.tree.leaves(given[0])[0]), len(given)
    steps = n if steps is None else steps
    check.positive("diagnose_loss", steps=steps)
    take, join = _parts(given[0])
    train, out = (Dataset(*take(jax.tree.map(lambda *a: np.concatenate(a), *part))) for part in (given, held))
    if len(out.y) > 2 * MOST:
        out = out.take(np.arange(2 * MOST))
    order = generator("diagnose_loss", jax.random.key(0)).permutation(len(out.y))
    first, second = (
        (out, out) if validation is None else (out.take(np.sort(order[::2])), out.take(np.sort(order[1::2])))
    )
    make, rate, clip = _optimizing(optimizer)
    case = LossCase(
        loss, {}, loss, make, rate, clip, train, first, second, validation is not None, size, int(steps), int(seeds),
        bool(shuffle), _task(np.asarray(train.y), score), params=params, join=join, score=score,
    )  # fmt: skip
    batch = jax.tree.map(lambda a: a[:size], tuple(train))
    flow = watch(lambda params, batch: loss(params, join(*batch)), groups="gradient", batch_size=size)(params, batch)
    names = [name.removesuffix("/value") for name in tree.paths(params)]
    depths = jax.tree.leaves(tree.map_depth(lambda k, a: k, params))
    kernels = [name for name, a, k in zip(names, jax.tree.leaves(params), depths, strict=True) if is_kernel(name, a, k)]
    forward = [path for _, path in flow.labels.starts if path in kernels]
    final = names.index(forward[-1]) if forward else None
    seen = found_in(lambda params, batch: loss(params, join(*batch)), params, batch)
    penalty = _penalized(loss, params, join(*batch))
    judged = unpenalized(loss) if penalty else loss
    case = replace(case, final=final, penalized=penalty, slope=jax.jit(jax.value_and_grad(judged)))
    computes = narrowest(lambda params, batch: loss(params, join(*batch)), params, batch)
    if score is not None and not penalty:  # without a score of its own a loss is lower for each term that it lacks
        case = replace(case, terms=_terms(loss, params, join(*batch), batch[1]))
    narrow, kernels = is_narrow(params), count(params)
    gated = bool(seen.get("again", True) and keepers(params))  # a cell is used at each position
    case = replace(case, seen=seen, narrow=narrow, computes=computes, kernels=kernels, gated=gated)
    target = in_targets(lambda y: float(case.slope(params, join(batch[0], y))[0]), np.asarray(batch[1]))
    return _referred(replace(case, task=replace(case.task, target=target)))


def _penalized(loss: Any, *args: Any) -> bool:
    try:
        return penalized(loss, *args)
    except Unreadable:
        return False


def _terms(loss: Any, params: Any, batch: Any, y: Any) -> tuple[int, ...]:
    """Number the terms of a loss that it may be learnt without. A batch without targets asks all of them."""
    leaves, structure = jax.tree.flatten(batch)
    order = sorted(range(len(leaves)), key=lambda i: leaves[i] is y)  # targets last

    def ordered(params, *given):
        return loss(params, structure.unflatten([given[order.index(i)] for i in range(len(order))]))

    try:
        return tuple(removable(ordered, sum(a is y for a in leaves), params, *(leaves[i] for i in order)))
    except Unreadable:
        return ()


def _batches(name: str, given: Any) -> list[Any]:
    who = f"diagnose_loss: {name}"
    if isinstance(given, tuple | dict) or not isinstance(given, Iterable):
        given = [given]

    def host(a):  # raw random keys have all 32 bits
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"{who} must hold numbers, got random keys; give jax.random.key_data(keys), and take "
                "jax.random.wrap_key_data of it in the loss"
            )
        return np.asarray(a if getattr(a, "dtype", None) == np.uint32 else arrays.narrow(who, "values", a))

    found = [jax.tree.map(host, batch) for batch in given]
    if not found or not jax.tree.leaves(found[0]):
        raise ValueError(f"{who} must be a list of batches, got none; give at least one")
    sizes = {len(a) if a.ndim else 0 for batch in found for a in jax.tree.leaves(batch)}
    full = [batch for batch in found if len(jax.tree.leaves(batch)[0]) == max(sizes)]
    if 0 in sizes or any(len({len(a) for a in jax.tree.leaves(batch)}) > 1 for batch in found):
        raise ValueError(
            f"{who}: the arrays of a batch must share their leading axis, the examples, got {sorted(sizes)}"
        )
    return full  # a last batch that is smaller is dropped


def _parts(batch: Any) -> tuple[Callable[[Any], tuple[Any, Any]], Callable[[Any, Any], Any]]:
    """Tell inputs from targets: the two of a pair, or the entries of a dict by their names.

    Of a dict of more than two entries one name tells the targets, and all others are inputs. Else all are inputs.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(hasattr(a, "shape") for a in batch):
        kind = type(batch)
        return (lambda b: (b[0], b[1])), (lambda x, y: kind((x, y)))
    if isinstance(batch, dict) and len(batch) == 2:
        x, y = ([k for k in batch if str(k).lower() in names] for names in (INPUTS, TARGETS))
        x, y = x or [k for k in batch if k not in y], y or [k for k in batch if k not in x]  # one known name tells both
        if len(x) == len(y) == 1:
            return (lambda b: (b[x[0]], b[y[0]])), (lambda a, b: {x[0]: a, y[0]: b})
    if isinstance(batch, dict) and len(batch) > 2:
        names = [k for k in batch if str(k).lower() in TARGETS]
        if len(names) == 1:
            (name,) = names
            others = [k for k in batch if k != name]
            return (lambda b: ({k: b[k] for k in others}, b[name])), (lambda x, y: {**x, name: y})
    return (lambda b: (b, np.zeros(len(jax.tree.leaves(b)[0]), np.float32))), (lambda x, y: x)


def _task(y: np.ndarray, score: Any) -> Task:
    name = "score" if score is not None else "1 - loss / guess"
    column = y.size == len(y)
    if np.issubdtype(y.dtype, np.integer) and column:
        values = np.unique(y)
        return Task(
            "classes", int(values.max(initial=0)) + 1, chance=1 / max(2, len(values)) if score else 0.0, name=name
        )
    if y.ndim <= 2 and set(np.unique(y)) == {0, 1}:
        return Task("multi_label", y.size // len(y), chance=0.5 if score else 0.0, name=name)
    if np.issubdtype(y.dtype, np.floating) and np.ptp(y) > 0:
        return Task("regression", name=name)
    return Task("exact", name=name)
