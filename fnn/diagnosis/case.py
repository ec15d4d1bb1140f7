"""What is to be diagnosed: a net or how it is built, loss, optimiser, data; and a `Plan`, which changes some of it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import admission, check, measures
from fnn.core import Layer, output_spec
from fnn.datasets.dataset import Dataset, generator, in_memory
from fnn.diagnosis.task import Task, task_of
from fnn.diagnosis.weights import count, is_narrow, keepers, square
from fnn.gradients.operations import Unreadable
from fnn.gradients.swap import listed, swapped
from fnn.gradients.wide import in_float32, narrowest

GAINS = {"relu": 2**0.5, "leaky_relu": 2**0.5, "gelu": 1.5, "gelu_tanh": 1.5, "silu": 1.6, "elu": 1.2, "softplus": 1.2}
"""sqrt(fan_in) times the std of weights that keep signals at their size, about; 1 for all others."""
MOST = 2000
"""How many held-out and how many training examples are scored."""


@dataclass(frozen=True)
class Plan:
    """Changes of a training; by default none."""

    knobs: tuple[tuple[str, Any], ...] = ()
    loss: Callable[[Any, Any], Any] | None = None
    optimizer: Callable[[], optax.GradientTransformation] | None = None
    unclipped: bool = False
    rate: float = 1.0
    """Factor."""
    warm: float = 0.0
    """The share of the steps over which the rate rises linearly from 0."""
    clip: float = float("inf")
    gradients: float = 1.0
    """Factor of the gradients that the optimiser is given. Below 1 it is given parameters times the same factor, and its steps
    are divided by it: what grows in proportion stays as it is, and no clip is reached. Above 1 steps that do not depend on
    the gradient's size stay as they are, and ε counts less."""
    pace: float = 1.0
    """The optimiser is told that it has done this share of its steps, so that its schedule lasts longer."""
    gain: float | None = None
    """Redraw: kernels from N(0, gain²/fan_in), the last one from N(0, 1/fan_in), biases 0."""
    keep: float | None = None
    """Set the biases of the gates with which recurrent cells keep their content."""
    data: tuple[Callable[["Case"], "Case"], ...] = ()
    learn: str = "train"
    """Which examples are learnt: "train", "held out" (half of them), "both"."""
    shuffle: bool | None = None
    batch_size: int | None = None
    steps: int | None = None
    wide: bool = False
    """Whether parameters of less than 32 bits are trained in float32."""
    float32: bool = False
    """Whether what is computed in less than 32 bits is computed in float32; the parameters are `wide` then."""
    sign: float = 1.0
    """Factor of the loss that is learnt."""
    bare: bool = False
    """Whether the loss is learnt without its weight penalties."""
    without: int | None = None
    """Which term of a loss that is known as a whole is not learnt."""
    quiet: bool = False
    """Whether the net is trained without its noise, as it is used."""
    swap: tuple[tuple[str, str], ...] = ()
    """Of a net without knobs: which activations of its program are replaced, ("hidden" or "last", by what)."""

    def knob(self, **values: Any) -> "Plan":
        return replace(self, knobs=tuple(sorted({**dict(self.knobs), **values}.items(), key=lambda kv: kv[0])))


@dataclass(frozen=True)
class Model:
    """What a plan trains: pure functions of parameters and state."""

    draw: Callable[[int], tuple[Any, Any]]
    """Of a seed: (params, state)."""
    objective: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    """(params, state, (x, y), key) -> (mean loss, new state), as in training."""
    outputs: Callable[[Any, Any, Any], Any] | None = None
    """(params, state, x) -> outputs, as in use; None for a loss of which nothing else is known."""
    score: Callable[[Any, Any], Any] | None = None
    """(params, (x, y)) -> a score of the user's, where there are no outputs."""


@dataclass(frozen=True)
class Case:
    """A training as it was given. The held-out data are split in two: one half chooses, the other one checks."""

    build: Callable[..., Any]
    knobs: Mapping[str, Any]
    """What `build` takes, with its present values; empty for a net that was given as it is."""
    loss: Callable[[Any, Any], Any]
    optimizer: Callable[..., optax.GradientTransformation]
    rate: float | None
    clip: float | None
    train: Dataset
    chooses: Dataset
    checks: Dataset
    held_out: bool
    batch_size: int
    steps: int
    seeds: int
    shuffle: bool
    task: Task = field(default_factory=lambda: Task("regression"))
    seen: Mapping[str, Any] = field(default_factory=dict)
    """What was found in the program of a net without knobs: its `activation`, its `head`, whether gradients `stop`; of one
    without activations how many layers take the output of another one as it is, `bare`; which arrays are `recurrent`
    kernels, from a state to the next one; whether an array is used `again`."""
    narrow: bool = False
    """Whether there are parameters of less than 32 bits."""
    computes: str = ""
    """The float type of less than 32 bits in which the net or the loss computes, if any."""
    kernels: int = 1
    """How many weight matrices there are, those of a stack one by one."""
    gated: bool = False
    """Whether there are recurrent cells with gates; see `weights.keepers`."""
    noisy: bool = False
    """Whether the net draws noise in training, and has no state that it would not learn without."""
    terms: tuple[int, ...] = ()
    """Which terms such a loss may be learnt without."""
    penalized: bool = False
    """Whether the loss has terms of the parameters alone; known of a loss as a whole only."""

    @property
    def x(self) -> np.ndarray | None:
        """The training inputs, if they are one array of floats, of which affine maps can be taken."""
        x = self.train.x
        return x if isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating) else None

    @property
    def y(self) -> np.ndarray:
        return np.asarray(self.train.y)

    def with_x(self, f: Callable[[str, np.ndarray], np.ndarray]) -> "Case":
        """Map inputs; f takes the name of the part and its array."""
        old = {name: getattr(self, name) for name in ("train", "chooses", "checks")}
        return replace(self, **{name: part._replace(x=f(name, part.x)) for name, part in old.items()})

    def with_y(self, f: Callable[[str, np.ndarray], np.ndarray]) -> "Case":
        """Map targets; f takes the name of the part and its array."""
        old = {name: getattr(self, name) for name in ("train", "chooses", "checks")}
        return replace(self, **{name: part._replace(y=f(name, np.asarray(part.y))) for name, part in old.items()})

    def model(self, plan: Plan) -> Model:
        """Build what a plan trains."""
        net, loss = self.built(plan), plan.loss or self.loss

        def draw(seed):
            return net.init(jax.random.key(1000 + seed), jax.tree.map(lambda a: a[: self.batch_size], self.train.x))

        def trained(params, state, x, key):
            return net.apply(params, state, x) if plan.quiet else net.apply(params, state, x, key=key, train=True)

        def outputs(params, state, x):
            return net.apply(params, state, x)[0]

        if plan.swap:
            trained, outputs = (swapped(f, dict(plan.swap)) for f in (trained, outputs))

        def objective(params, state, batch, key):
            outputs, new = trained(params, state, batch[0], key)
            return plan.sign * measures.shares("diagnose", loss, outputs, batch[1])["loss"], new

        if plan.float32:
            return Model(draw, in_float32(objective), in_float32(outputs))
        return Model(draw, objective, outputs)

    def scored(self, values: np.ndarray) -> np.ndarray:
        """Turn what a program measured into scores: they are scores already."""
        return values

    def built(self, plan: Plan) -> Layer:
        """Build the net. Errors: ValueError where `build` does not take a knob's value, whatever it raises."""
        try:
            return self.build(**dict(plan.knobs))
        except Exception as error:
            if not plan.knobs or isinstance(error, ValueError | TypeError):
                raise
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def last(self, params: Any) -> int | None:
        """Say which array is the last kernel; None: the last of the tree."""
        return None

    def value(self, plan: Plan, knob: str) -> Any:
        """Give a knob's value; None if the net has no such knob."""
        swap = {{"hidden": "activation", "last": "head"}.get(role, role): name for role, name in plan.swap}
        return {**self.seen, **self.knobs, **dict(plan.knobs), **swap}.get(knob)

    def gain(self, plan: Plan, sums: int | None = None) -> float:
        """Give the gain that keeps signals at their size with this plan's activation, and behind so many residual sums.

        What n sums add is random where phi has a mean of 0, and grows as sqrt(n); else the means add up, as n.
        """
        phi, depth = str(self.value(plan, "activation")), self.value(plan, "depth")
        bare = self.value(plan, "residual") is True and self.value(plan, "norm") in (None, "none")
        n = sums if sums is not None else depth if bare and isinstance(depth, int) else 1
        return GAINS.get(phi, 1.0) / max(n, 1) ** (1.0 if phi in GAINS else 0.5)

    def transformation(self, plan: Plan) -> optax.GradientTransformation:
        """Make the optimiser: clipped as the plan says, updates scaled by the plan's rate."""
        if plan.optimizer is not None:
            return plan.optimizer()
        if plan.unclipped:
            return self.optimizer(clip=None)
        return self.optimizer()


def case_of(
    net: Any,
    loss: Any,
    optimizer: Any,
    train: Any,
    validation: Any,
    *,
    batch_size: Any,
    steps: Any,
    seeds: Any,
    shuffle: bool,
    score: Any = None,
) -> Case:
    """Check what was given, and make a case of it. The keywords are those of `diagnose`, hence ten arguments."""
    check.positive("diagnose", batch_size=batch_size, steps=steps, seeds=seeds)
    admission.loss("diagnose", loss)
    build, knobs = _building(net)
    make, rate, clip = _optimizing(optimizer)
    data = _host(in_memory("diagnose: train", train))
    if batch_size > data.size:
        raise ValueError(f"diagnose: batch_size must be at most the {data.size} training examples, got {batch_size}")
    if validation is None:
        first = second = _some(data, MOST)
    else:
        held = _some(_host(in_memory("diagnose: validation", validation)), 2 * MOST)
        theirs, ours = (jax.tree.map(lambda a: (a.shape[1:], a.dtype.kind), tuple(part)) for part in (held, data))
        if theirs != ours:
            raise ValueError(
                f"diagnose: validation must hold arrays like those of train, except for the number of examples, got "
                f"{check.describe(held)} and {check.describe(data)}; prepare both alike"
            )
        if held.size < 4:
            raise ValueError(f"diagnose: validation must hold at least 4 examples, got {held.size}; hold out more")
        order = generator("diagnose", jax.random.key(0)).permutation(held.size)
        first, second = held.take(np.sort(order[::2])), held.take(np.sort(order[1::2]))
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype), data.x)
    base = build()
    admission.net("diagnose", base)
    params, state = jax.eval_shape(base.init, jax.random.key(0), spec)
    outputs = output_spec(base, params, state, spec)
    if not (hasattr(outputs, "shape") and hasattr(data.y, "dtype")):
        raise ValueError(
            f"diagnose: outputs and targets must be one array each, without weights, got {check.describe(outputs)} and "
            f"{check.describe(data.y)}; diagnose_loss takes a loss of any outputs"
        )
    computes = narrowest(
        lambda params, state, x, y: loss(base.apply(params, state, x)[0], y), params, state, spec, data.y[:2]
    )
    task = task_of(loss, np.asarray(data.y), outputs.shape, score)
    like, seen = keepers(params), {}  # the shapes of recurrent cells
    if like or not knobs:
        seen = found_in(lambda params, state, x: base.apply(params, state, x)[0], params, state, spec)
    gated, seen = bool(like) and seen.get("again", True), {} if knobs else seen  # a cell is used at each position
    return Case(
        build, knobs, loss, make, rate, clip, data, first, second, validation is not None, int(batch_size), int(steps),
        int(seeds), bool(shuffle), task, seen, is_narrow(params), computes, count(params), gated,
        not jax.tree.leaves(state) and _draws(base, params, state, spec),
    )  # fmt: skip


def _draws(net: Layer, params: Any, state: Any, spec: Any) -> bool:
    """Whether the outputs in training depend on the key."""

    def train(key, params, state, x):
        return net.apply(params, state, x, key=key, train=True)[0]

    program = jax.make_jaxpr(train)(jax.eval_shape(lambda: jax.random.key(0)), params, state, spec).jaxpr
    return any(v is program.invars[0] for equation in program.eqns for v in equation.invars)


def found_in(function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Look for activations and stopped gradients in a program; nothing where it cannot be read."""
    try:
        found, stops, bare, over_time, again = listed(function, *args)
    except Unreadable:
        return {}
    hidden, last = ({a.name for a in found if a.role == role} for role in ("hidden", "last"))
    seen: dict[str, Any] = {"again": again} | ({"stop": True} if stops else {})
    if recurrent := square(args[0], over_time):
        seen["recurrent"] = recurrent
    if hidden:
        seen["activation"] = hidden.pop() if len(hidden) == 1 else "several"
    elif bare and not any(a.role == "gate" for a in found):
        seen["bare"] = bare
    return seen | ({"head": last.pop()} if len(last) == 1 else {})


def _host(data: Dataset) -> Dataset:
    def narrow(a):
        a = np.asarray(a)
        return a.astype(np.float32) if a.dtype == np.float64 else a.astype(np.int32) if a.dtype == np.int64 else a

    return Dataset(*jax.tree.map(narrow, tuple(data)))


def _some(data: Dataset, most: int) -> Dataset:
    order = generator("diagnose", jax.random.key(1))
    return data if data.size <= most else data.take(np.sort(order.choice(data.size, most, replace=False)))


def _building(net: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    if isinstance(net, Layer):
        return (lambda: net), {}
    if not callable(net):
        raise TypeError(f"diagnose: the net must be a Layer, or a function that builds one, got {type(net).__name__}")
    knobs = {name: p for name, p in inspect.signature(net).parameters.items() if p.kind not in (p.VAR_KEYWORD,)}
    if missing := [name for name, p in knobs.items() if p.default is p.empty]:
        raise ValueError(
            f"diagnose: each knob of build must have a default, the value that does not train, got none for "
            f"{', '.join(missing)}; write build({missing[0]}=...)"
        )
    return net, {name: p.default for name, p in knobs.items()}


def _optimizing(optimizer: Any) -> tuple[Callable[..., Any], float | None, float | None]:
    """Return a function of clip that makes the optimiser, and rate and clip as they are."""
    if isinstance(optimizer, optax.MultiSteps):  # has the functions of a transformation, but is none
        optimizer = optimizer.gradient_transformation()
    if isinstance(optimizer, optax.GradientTransformation):
        return (lambda **_: optimizer), None, None
    if not callable(optimizer):
        raise TypeError(
            f"diagnose: the optimizer must be an optax transformation or a function (rate=..., clip=None) that makes one, "
            f"got {type(optimizer).__name__}"
        )
    found = inspect.signature(optimizer).parameters
    for name in ("rate", "clip"):
        if name in found and found[name].default is inspect.Parameter.empty:
            raise ValueError(f"diagnose: the optimizer's {name} must have a default, the value that does not train")
    defaults = {name: found[name].default for name in ("rate", "clip") if name in found}

    def make(**changed):
        return optimizer(**{name: value for name, value in changed.items() if name in found})

    admission.optimizer("diagnose", make())
    rate = defaults.get("rate")
    return make, rate if isinstance(rate, int | float) else None, defaults.get("clip")
