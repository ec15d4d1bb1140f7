"""Healthy trainings to start from: data, nets, optimisers, and a recipe that puts them together."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn.layers import initializers

Pair = tuple[Any, Any]
Data = Callable[[int], tuple[Pair, Pair]]
"""A seed -> (training, held out), each (x, y)."""


@dataclass(frozen=True)
class Case:
    """What is asked about: one training, as its author would give it."""

    build: Callable[..., fnn.Layer]
    """keyword knobs, this training's values as defaults -> a layer"""
    loss: Callable[[Any, Any], jax.Array]
    """(outputs, y) -> float[batch]"""
    optimizer: Callable[..., optax.GradientTransformation]
    """(rate=..., clip=...) -> a transformation"""
    train: Pair
    validation: Pair
    batch_size: int
    steps: int
    shuffle: bool

    def diagnose(self, **options: Any) -> fnn.Diagnosis:
        """Ask `fnn.diagnose` about it; the options are seeds, budget, ..."""
        given = {"batch_size": self.batch_size, "steps": self.steps, "shuffle": self.shuffle, **options}
        return fnn.diagnose(self.build, self.loss, self.optimizer, self.train, self.validation, **given)


@dataclass(frozen=True)
class Recipe:
    """A training but for its seed. `but` changes some of it: names that are no fields are knobs of the net."""

    data: Data
    net: Callable[..., Callable[..., fnn.Layer]]
    knobs: Any
    loss: Callable[[Any, Any], jax.Array]
    method: Callable[..., optax.GradientTransformation]
    rate: float
    clip: float | None = None
    batch_size: int = 64
    steps: int = 400
    shuffle: bool = True

    def but(self, **changes: Any) -> "Recipe":
        """Change fields or knobs; `data` may be a list, whose functions are applied to the data in turn."""
        own = {field.name for field in fields(self)}
        given = {name: value for name, value in changes.items() if name in own}
        if isinstance(given.get("data"), list):
            given["data"] = functools.reduce(lambda data, change: change(data), given["data"], self.data)
        knobs = {**self.knobs, **{name: value for name, value in changes.items() if name not in own}}
        return replace(self, **{"knobs": MappingProxyType(knobs), **given})

    def only(self, **knobs: Any) -> "Recipe":
        """Have these knobs and no others, for another kind of net."""
        return replace(self, knobs=MappingProxyType(knobs))

    def case(self, seed: int) -> Case:
        """Draw the data for a seed."""
        method = self.method

        def optimizer(rate=self.rate, clip=self.clip):
            return method(rate) if clip is None else optax.chain(optax.clip_by_global_norm(clip), method(rate))

        train, validation = self.data(seed)
        rest = {name: getattr(self, name) for name in ("loss", "batch_size", "steps", "shuffle")}
        return Case(self.net(**self.knobs), optimizer=optimizer, train=train, validation=validation, **rest)


# Nets.


def mlp(outputs: int, output_init: Any = "lecun_normal", bias: Any = 0.0, **defaults: Any):
    """`models.mlp` by its knobs. The output layer has an initialiser of its own; `bias` fills the hidden biases, or is a
    function n -> float[n]."""

    def draw(key, shape, dtype=jnp.float32):
        return initializers.get(output_init if shape[-1] == outputs else defaults["init"])(key, shape, dtype)

    def draw_bias(key, shape, dtype=jnp.float32):
        value = 0.0 if shape[-1] == outputs else bias(shape[-1]) if callable(bias) else bias
        return jnp.full(shape, value, dtype)

    def build(
        depth=3, width=64, activation="relu", norm=None, init=draw, residual=False, dropout=0.0, head="identity"
    ) -> fnn.Layer:
        knobs = {"activation": activation, "norm": norm, "init": init, "residual": residual, "head": head}
        return fnn.models.mlp(depth, width, outputs, bias_init=draw_bias, dropout=dropout, **knobs)

    return with_defaults(build, {name: value for name, value in defaults.items() if name != "init"})


def with_defaults(build: Callable[..., Any], defaults: dict[str, Any]) -> Callable[..., Any]:
    """Give keywords other defaults, which the signature shows."""
    signature = inspect.signature(build)
    if unknown := defaults.keys() - signature.parameters.keys():
        raise TypeError(f"ward: a net has the knobs {list(signature.parameters)}, got {sorted(unknown)}")

    def built(**knobs):
        return build(**{**defaults, **knobs})

    found = [p.replace(default=defaults.get(n, p.default)) for n, p in signature.parameters.items()]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found]
    built.__signature__ = signature.replace(parameters=keywords)
    return built


# Optimisers: rate -> transformation.


def momentum(rate: Any, decay: float = 0.9) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=decay)


# Losses that fnn does not have.


def _probability_correct(outputs: Any, targets: Any) -> jax.Array:
    return ((jnp.reshape(outputs, -1) > 0.5) == (jnp.reshape(targets, -1) > 0.5)).astype(jnp.float32)


def _probability_loss(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate -t log p - (1 - t) log(1 - p), p held 1e-7 away from 0 and 1."""
    p, t = jnp.clip(jnp.reshape(outputs, -1), 1e-7, 1 - 1e-7), jnp.reshape(targets, -1)
    return -t * jnp.log(p) - (1 - t) * jnp.log(1 - p)


probability_loss = fnn.losses.Loss(
    "probability_loss", _probability_loss, _probability_correct, fnn.losses.binary_cross_entropy.check
)


def mae(outputs: Any, targets: Any) -> jax.Array:
    """Evaluate the mean over units of |output - target|."""
    return jnp.mean(jnp.abs(outputs - targets), axis=-1)


# Data.


@functools.cache
def digits(seed: int) -> tuple[Pair, Pair]:
    return fnn.data.digits(key=jax.random.key(seed))


@functools.cache
def pixels(seed: int) -> tuple[Pair, Pair]:
    return fnn.data.digits(key=jax.random.key(seed), standardized=False)


def made(kind: Callable[..., Any], **options: Any) -> Data:
    """A synthetic data set of fnn's, by seed."""
    return functools.cache(lambda seed: kind(key=jax.random.key(seed), **options))


def changed(f: Callable[..., Pair], where: str = "both") -> Callable[[Data], Data]:
    """Change data by f(x, y, rng) -> (x, y), in NumPy: "train", "validation" or "both"."""

    def change(data: Data) -> Data:
        @functools.cache
        def after(seed):
            parts = []
            for i, (name, part) in enumerate(zip(("train", "validation"), data(seed), strict=True)):
                x, y = map(np.asarray, part)
                if where in (name, "both"):
                    x, y = f(x, y, np.random.default_rng([seed, i, 17]))
                parts.append((jnp.asarray(x), jnp.asarray(y)))
            return tuple(parts)

        return after

    return change


def affine(scale: Any = 1.0, shift: Any = 0.0, where: str = "both") -> Callable[[Data], Data]:
    """Map inputs to scale·x + shift."""
    return changed(lambda x, y, rng: ((x * scale + shift).astype(x.dtype), y), where)


def targets(f: Callable[[Any], Any], where: str = "both") -> Callable[[Data], Data]:
    """Map targets by f(y)."""
    return changed(lambda x, y, rng: (x, f(y)), where)


def unit_targets(data: Data) -> Data:
    """Divide targets by their standard deviation in the training part."""

    @functools.cache
    def after(seed):
        (x, y), (x_held, y_held) = data(seed)
        std = float(np.std(np.asarray(y)))
        return (x, y / std), (x_held, y_held / std)

    return after


at_least_five = targets(lambda y: (y >= 5).astype(np.int32))
one_hot = targets(lambda y: np.eye(10, dtype=np.float32)[y])

# The recipes that the patients are changed from.

DEFAULT = Recipe(
    digits,
    mlp,
    MappingProxyType({"outputs": 10, "depth": 3, "width": 64, "activation": "relu", "init": "he_normal"}),
    fnn.losses.cross_entropy,
    optax.adam,
    1e-3,
)
SGD = DEFAULT.but(method=optax.sgd, rate=0.1)
DEEP = DEFAULT.but(activation="tanh", depth=10, init="scaled(1.0)", method=momentum, rate=0.01, steps=600)
SPIRALS = DEFAULT.but(
    data=made(fnn.data.spirals, examples=1500, turns=1.0, noise=0.05),
    outputs=2,
    activation="tanh",
    init="scaled(1.5)",
    rate=3e-3,
    steps=1500,
)
TEACHER = DEFAULT.but(
    data=unit_targets(made(fnn.data.teacher, features=8)), outputs=1, loss=fnn.losses.mse, rate=3e-3, steps=800
)
BINARY = DEFAULT.but(data=[at_least_five], outputs=1, loss=fnn.losses.binary_cross_entropy)
