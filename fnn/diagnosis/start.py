"""What is measured of a plan before its first step, and in the middle: the net layer by layer, its weights, its outputs."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from fnn import tree
from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.data_symptoms import encoding_symptoms
from fnn.diagnosis.reads import Reads, reads
from fnn.diagnosis.trial import Runner
from fnn.diagnosis.weights import gains, kept, tables
from fnn.gradients.bad import first_bad
from fnn.gradients.labels import DEFAULT
from fnn.gradients.operations import Unreadable
from fnn.gradients.watch import watch
from fnn.gradients.wide import in_float32


@dataclass(frozen=True)
class Start:
    """What was measured before the first step of a plan, or with the parameters of another moment."""

    layers: dict[str, np.ndarray]
    """By quantity of `watch`, in forward order of the layers; NaN where a layer has no such number."""
    paths: list[str]
    gains: list[tuple[str, np.ndarray]]
    """Of each kernel but the last: sqrt(fan_in) times its std."""
    alike: list[str]
    """Kernels, except the last, of which all units are equal."""
    outputs: np.ndarray
    loss: float
    linear: bool
    blind: bool
    """Whether the order along the first axis behind the batch changes nothing."""
    placed: bool
    """Whether the loss changes when the examples of a batch change places together with their targets."""
    unread: list[int]
    """The first and the last label, where labels are numbered strangely, if their examples have no gradient."""
    constant: bool
    """Whether no kernel has a gradient, and outputs are the same for every example."""
    cut: list[str]
    """Kernels without a gradient on which the loss depends."""
    reads: Reads
    unpaired: bool
    """Whether loss and gradient stay as they are when the targets of a batch change places."""
    gradient: dict[str, float]
    """log10 of each parameter's gradient."""
    rounding: float
    """Of the narrowest dtype of the parameters: the distance from 1 to the next number."""
    rounded: float
    """Norm of what rounding changes of the gradient over the gradient's in float32; 0 where all is computed in float32."""
    bad: str
    """The first operation that makes a NaN or an infinity, and its cause; "" where loss and gradient are finite."""
    kept: float
    """Largest singular value of the recurrent kernel that has the smallest one; NaN where there is none."""
    tables: dict[str, float]
    """RMS of each embedding and table of positions."""
    attention: tuple[float, float] | None
    """Largest logit of all heads, and lowest mean entropy of a head in nats; None without attention."""
    noise: float = 0.0
    """RMS of what noise in training changes of the outputs, over the RMS by which these differ between examples."""
    idle: tuple[str, ...] = ()
    """Kernels without a gradient on which the loss does not depend."""


def start(runner: Runner, plan: Plan) -> Start:
    """Measure a plan at its first seed before the first step."""
    return measured(runner, plan, *runner.draw(plan, 0), ask=True)


def measured(runner: Runner, plan: Plan, params: Any, state: Any, ask: bool = False) -> Start:
    """Measure a plan with some parameters and state, on its first batch; with `ask` also which targets its loss reads."""
    case = runner.changed(plan)
    index = runner.order(plan, 0)[0]
    pool = jax.tree.map(lambda a, b: np.concatenate([a, b]), tuple(case.train), tuple(case.chooses))
    x, y = jax.tree.map(lambda a: a[index], pool)
    watched, outputs, compare = runner.instruments(plan, lambda: _instruments(case, plan, len(index)))
    flow = watched(params, (x, y), state)
    paths, columns = _layers(flow)
    rows = _rows(flow)
    gradient = {row.path: row.value for row in rows if row.quantity == "log10_gradient"}
    logits, entropies = ([r.value for r in rows if r.quantity == q] for q in ("largest_logit", "attention_entropy"))
    attention = (max(logits), min(entropies)) if logits else None
    plain, linear, blind, placed = np.zeros(0), False, False, False
    if outputs is not None:

        def output(x):
            return np.asarray(outputs(params, state, x), np.float64)

        plain = output(x)
        linear, blind = _linear(output, x), _blind(output, x, plain, 1e-4)
    elif _has_order(x):  # of a loss alone: equal for inputs read backwards, but not for those of other examples

        def value(x):
            return np.array([float(watched(params, (x, y), state).loss)])

        same, others = np.array([float(flow.loss)]), value(np.roll(x, 1, axis=0))
        blind = bool(np.abs(others - same) > 1e-4 * np.abs(same)) and _blind(value, x, same, 1e-5)
        turned = jax.tree.map(lambda a: np.roll(a, 1, axis=0), (x, y))
        placed = blind and bool(np.abs(float(watched(params, turned, state).loss) - same) > 1e-4 * np.abs(same))
    kernels = {path.removesuffix("/value") for path, _ in gains(params)}
    learns = any(row.path.removesuffix("/value") in kernels for row in _moving(flow))  # biases alone are of no example
    unpaired = learns and case.task.kind != "exact" and _unpaired(lambda y: watched(params, (x, y), state), flow, y)
    dead = [name for name in kernels if gradient.get(name, gradient.get(f"{name}/value")) == -np.inf]
    constant = bool(dead) and not learns and _constant(lambda x: watched(params, (x, y), state), flow, x, plain)
    matter = {name: _matters(lambda p: watched(p, (x, y), state), flow, params, name) for name in dead[:8]}
    cut, idle = ([name for name, holds in matter.items() if holds is which] for which in (True, False))
    unread = [
        int(label)
        for label, rows in (_ends(case, len(index)) if learns else [])
        if not _moving(watched(params, jax.tree.map(lambda a, rows=rows: a[rows], tuple(case.train)), state))
    ]
    asked = Reads()
    if ask and learns and not unpaired and not unread:

        def moves(rows):
            return bool(_moving(watched(params, jax.tree.map(lambda a: a[rows], tuple(case.train)), state)))

        asked = reads(lambda y: _numbers(watched(params, (x, y), state)), moves, y, np.asarray(case.train.y))
    names = [path.removesuffix("/value") for path in tree.paths(params)]
    last = names[final] if (final := case.last(params)) is not None else (paths or [""])[-1]
    every = [(path.removesuffix("/value"), g) for path, g in gains(params)]
    hidden = [pair for pair in every if pair[0] != last] if last in dict(every) else every[:-1]
    layers = {path.removesuffix("/value") for path in paths}
    alike = [path for path in _alike(params, last) if path in layers or not layers]  # thresholds may well be equal
    rounding = max(float(jax.numpy.finfo(a.dtype).eps) for a in jax.tree.leaves(params))
    rounded = float(compare(params, (x, y), state)) if compare is not None else 0.0
    recurrent = case.seen.get("recurrent", ())
    keeps = kept(params, recurrent) if recurrent else float("nan")
    noise = _noise(case, plan, params, state, x, plain) if ask and case.noisy and not plan.quiet else 0.0
    bad = ""
    if not (np.isfinite(flow.loss) and all(value < np.inf for value in gradient.values())):  # not of NaN either
        bad = _bad(case, plan, params, (x, y), state)
    return Start(
        columns, paths, hidden, alike, plain, float(flow.loss), linear, blind, placed, unread, constant, cut, asked, unpaired, gradient, rounding, rounded, bad, keeps, tables(params), attention, noise, tuple(idle)
    )  # fmt: skip


def _instruments(case: Case, plan: Plan, size: int) -> tuple[Any, Any, Any]:
    """Make what measures a net: `watch`, its outputs, and what rounding changes of its gradient, if it computes in less."""
    key, model = jax.random.key(0), case.model(plan)

    def loss(params, batch, state):
        return model.objective(params, state, batch, key)[0]

    # In float32, so that rounding hides nothing: probabilities of bfloat16 sum to 1 only to a per cent.
    outputs = jax.jit(_exact(case, plan, model.outputs)) if model.outputs is not None else None

    def compare(params, batch, state):
        rough = jax.grad(loss)(params, batch, state)
        wide = jax.tree.map(lambda a: a.astype(tree.statistics_dtype(a.dtype)), params)
        exact = jax.grad(in_float32(loss))(wide, batch, state)
        return tree.norm(jax.tree.map(lambda a, b: a.astype(b.dtype) - b, rough, exact)) / tree.norm(exact)

    compared = jax.jit(compare) if case.computes and not plan.float32 else None
    return watch(loss, groups=(*DEFAULT, "saturated", "attention"), batch_size=size), outputs, compared


def _exact(case: Case, plan: Plan, function: Any) -> Any:
    """Return a function of the net in float32, if the net computes in less."""
    return in_float32(function) if case.computes and not plan.float32 else function


def _noise(case: Case, plan: Plan, params: Any, state: Any, x: Any, plain: np.ndarray) -> float:
    trained = jax.jit(
        _exact(case, plan, lambda params, key: case.built(plan).apply(params, state, x, key=key, train=True)[0])
    )
    apart = np.asarray(trained(params, jax.random.key(0)), np.float64) - plain
    spread = np.sqrt(np.mean((plain - plain.mean(0)) ** 2))
    return float(np.sqrt(np.mean(apart**2)) / spread) if spread > 0 else 0.0


def breaks(runner: Runner, losses: np.ndarray, trained: bool) -> str:
    """Say which operation makes the first NaN or infinity of a training whose losses, float[seeds, steps], are not all finite.

    The batches of that step are tried with the first parameters; or, with `trained`, with those from before the step, for
    which it trains again. "" where no operation is found.
    """
    seed = int(np.argmax(~np.isfinite(losses).all(1)))
    at, plan = int(np.argmax(~np.isfinite(losses[seed]))), Plan()
    case, order = runner.case, runner.order(plan, seed)
    pool = jax.tree.map(lambda a, b: np.concatenate([a, b]), tuple(case.train), tuple(case.chooses))

    def found(step, params, state):
        text = _bad(case, plan, params, jax.tree.map(lambda a: a[order[step]], pool), state)
        return f"at step {step}: {text}" if text else ""

    for step in (at, at - 1):  # its loss; or the gradient of the step before, which made the parameters NaN
        if step < 0 or (trained and step < 1):
            continue
        given = runner.draw(plan, seed)
        if trained:
            before = runner.run(replace(plan, steps=2 * step), [seed], middle=True).middle
            given = jax.tree.map(lambda a: a[0], before)
        lost = any(not np.isfinite(np.asarray(a, np.float64)).all() for a in jax.tree.leaves(given[0]))
        if not lost and (text := found(step, *given)):
            return text
    return ""


def _bad(case: Case, plan: Plan, params: Any, batch: Any, state: Any) -> str:
    """Say what makes the first NaN or infinity of a plan's loss or gradient."""
    model = case.model(plan)
    try:
        found = first_bad(lambda params: model.objective(params, state, batch, jax.random.key(0))[0], params)
    except (Unreadable, TypeError, ValueError, NotImplementedError):
        return ""
    if found is None:
        return ""
    at = f" at {found.layer}" if found.layer else ""
    return f"{found.operation}{at}, {'backward' if found.backward else 'forward'}: {found.cause}"


def _ends(case: Case, size: int) -> list[tuple[Any, np.ndarray]]:
    """List the first and the last label, where labels are numbered strangely, each with `size` of its examples."""
    if not encoding_symptoms(case):
        return []
    labels = np.unique(case.y)
    if len(labels) > 2 and labels[0] < 0 == labels[1]:  # by custom a negative one marks what is to be left out
        labels = labels[1:]
    column = case.y.reshape(len(case.y), -1)[:, 0]
    return [(label, np.resize(np.flatnonzero(column == label), size)) for label in labels[[0, -1]]]


def _moving(flow: Any) -> list["_Row"]:
    """List the gradients that are not zero; NaN is none."""
    return [row for row in _rows(flow) if row.quantity == "log10_gradient" and row.value != -np.inf]


def _constant(watched: Any, flow: Any, x: Any, plain: np.ndarray) -> bool:
    """Whether the net gives the same outputs for every example; of a loss alone, the same loss for other inputs."""
    if plain.size:
        return bool(np.ptp(plain, axis=0).max() == 0)
    other = float(watched(jax.tree.map(lambda a: np.roll(a, 1, axis=0), x)).loss)
    return bool(abs(other - float(flow.loss)) <= 1e-6 * abs(float(flow.loss)))


def _matters(watched: Any, flow: Any, params: Any, name: str) -> bool:
    """Whether the loss is another one with the other sign of a kernel."""
    paths = [path.removesuffix("/value") for path in tree.paths(params)]
    leaves, structure = jax.tree.flatten(params)
    turned = structure.unflatten([-a if path == name else a for path, a in zip(paths, leaves, strict=True)])
    return bool(abs(float(watched(turned).loss) - float(flow.loss)) > 1e-5 * abs(float(flow.loss)))


def _unpaired(watched: Any, flow: Any, y: Any) -> bool:
    """Whether loss and gradient are the same for targets that have changed places, though not for others."""
    if not isinstance(y, np.ndarray) or (y == y[::-1]).all():
        return False

    def same(y):
        after = _numbers(watched(np.ascontiguousarray(y)))
        return len(after) == len(before) and np.allclose(before, after, rtol=1e-5, atol=1e-5)

    before = _numbers(flow)
    return bool(np.isfinite(before).all() and same(y[::-1]) and not same(np.repeat(y[:1], len(y), axis=0)))


def _numbers(flow: Any) -> np.ndarray:
    """Give the loss, and log10 of the gradients that are not zero."""
    return np.array([np.float64(flow.loss), *(row.value for row in _moving(flow))])


def _rows(flow: Any) -> list["_Row"]:
    numbers = flow.numbers()
    return [_Row(row[0], row[1], row[2], float(numbers[i])) for i, row in enumerate(flow.labels.rows)]


@dataclass(frozen=True)
class _Row:
    layer: int
    path: str
    quantity: str
    value: float


def _layers(flow: Any) -> tuple[list[str], dict[str, np.ndarray]]:
    starts = flow.labels.starts
    rows = {(row.layer, row.path, row.quantity): row.value for row in _rows(flow)}
    names = {row.quantity for row in _rows(flow)}
    columns = {
        name: np.array([rows.get((layer, path, name), np.nan) for layer, path in starts], np.float64) for name in names
    }
    return [path for _, path in starts], columns


def _alike(params: Any, last: str) -> list[str]:
    found = []
    for path, a in tree.rows(params):
        a, path = np.asarray(a, np.float64), path.removesuffix("/value")
        if (
            path != last
            and a.ndim >= 2
            and a.shape[-1] > 1
            and np.ptp(a, axis=-1).max() <= 1e-7 * max(np.abs(a).max(), 1e-30)
        ):
            found.append(path)
    return found


def _linear(output: Any, x: Any) -> bool:
    """Whether the net is affine in its inputs, as far as a batch shows."""
    if not (isinstance(x, np.ndarray) and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)):
        return False
    other = np.roll(x, 1, axis=0)
    a, b, middle = (output(part) for part in (x, other, ((x + other) / 2).astype(x.dtype)))
    size, most = np.abs(a - b).max(), max(np.abs(a).max(), np.abs(b).max())
    if not np.isfinite(size) or size < 1e-2 * most:  # all outputs are about equal, and rounding hides the rest
        return False
    return bool(size > 0 and np.abs((a + b) / 2 - middle).max() < 1e-4 * size)


def _has_order(x: Any) -> bool:
    """Whether inputs may be sequences: numbers of tokens, or arrays of more than one axis an example."""
    floats = isinstance(x, np.ndarray) and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    return isinstance(x, np.ndarray) and x.ndim >= 2 + floats and x.shape[1] > 1


def _blind(output: Any, x: Any, plain: np.ndarray, rounding: float) -> bool:
    if not _has_order(x):
        return False
    turned = output(np.ascontiguousarray(x[:, ::-1]))
    return turned.shape == plain.shape and bool(
        np.abs(turned - plain).max() <= rounding * max(np.abs(plain).max(), 1e-30)
    )
