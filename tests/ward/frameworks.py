"""Patients written in plain JAX, Equinox and Flax NNX, for `fnn.diagnose_loss`: the same weights, data and optimiser.

They are plain mlps whose cause can be reached from outside of a loss: data, weights, activations, rate, clipping, steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

from . import CONTROLS, PATIENTS

NAMES = (
    "sgd_rate_10", "sgd_rate_1e-4", "clip_1e-4", "init_0.01_deep_tanh", "init_scaled_8_tanh", "init_zeros", "bias_minus_20",
    "sigmoid_8", "relu_head_regression", "pixels_255", "one_feature_1e4", "targets_5e5", "labels_permuted",
    "sorted_no_shuffle", "test_not_scaled", "inputs_1e-4", "steps_8", "momentum_batch_1",
    "digits_adam", "digits_sgd", "raw_pixels",
)  # fmt: skip
REACHED = {p.name: p for p in (*PATIENTS, *CONTROLS) if p.name in NAMES}
FUNCTIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "identity": lambda x: x}


@dataclass(frozen=True)
class Written:
    """The arguments of `fnn.diagnose_loss`."""

    loss: Callable[[Any, Any], Any]
    params: Any
    batches: list[Any]
    optimizer: Callable[..., optax.GradientTransformation]
    validation: Any
    steps: int
    shuffle: bool

    def diagnose(self, **options: Any) -> fnn.Diagnosis:
        given = {"steps": self.steps, "shuffle": self.shuffle, **options}
        return fnn.diagnose_loss(self.loss, self.params, self.batches, self.optimizer, self.validation, **given)


def written(person: Any, framework: str, seed: int = 0) -> Written:
    """Write a patient or control of `REACHED` in "jax", "equinox" or "nnx"."""
    recipe, case = getattr(person, "sick", person.well), person.make(seed)
    params, _ = case.build().init(jax.random.key(1000 + seed), case.train[0][: case.batch_size])
    arrays = [a for _, a in fnn.tree.rows(params)]  # bias and kernel of each layer, in forward order
    layers = list(zip(arrays[1::2], arrays[::2], strict=True))
    functions = [FUNCTIONS[recipe.knobs["activation"]]] * (len(layers) - 1)
    functions.append(FUNCTIONS[recipe.knobs.get("head", "identity")])
    made, outputs = NETS[framework](layers, functions)

    def loss(params, batch):
        return jnp.mean(case.loss(outputs(params, batch[0]), batch[1]))

    x, y = map(np.asarray, case.train)
    starts = range(0, len(x) - case.batch_size + 1, case.batch_size)
    batches = [(x[i : i + case.batch_size], y[i : i + case.batch_size]) for i in starts]
    return Written(loss, made, batches, case.optimizer, case.validation, case.steps, case.shuffle)


def plain(layers: Any, functions: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Write the net with arrays alone: kernels are called w and biases b."""

    def outputs(params, x):
        for layer, function in zip(params, functions, strict=True):
            x = function(x @ layer["w"] + layer["b"])
        return x

    return [{"w": kernel, "b": bias} for kernel, bias in layers], outputs


def equinox(layers: Any, functions: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Write the net with `eqx.nn.Linear`, whose weights have outputs first and which takes one example."""
    import equinox as eqx

    def linear(kernel, bias):
        made = eqx.nn.Linear(*kernel.shape, key=jax.random.key(0))
        return eqx.tree_at(lambda m: (m.weight, m.bias), made, (kernel.T, bias))

    params, static = eqx.partition([linear(*layer) for layer in layers], eqx.is_inexact_array)

    def outputs(params, x):
        for layer, function in zip(eqx.combine(params, static), functions, strict=True):
            x = function(jax.vmap(layer)(x))
        return x

    return params, outputs


def nnx(layers: Any, functions: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Write the net as a module of `nnx.Linear`s, split into its graph and its parameters."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self):
            for i, (kernel, bias) in enumerate(layers):
                layer = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0))
                layer.kernel, layer.bias = nnx.Param(kernel), nnx.Param(bias)
                setattr(self, f"layer_{i}", layer)

        def __call__(self, x):
            for i, function in enumerate(functions):
                x = function(getattr(self, f"layer_{i}")(x))
            return x

    graph, params = nnx.split(Net(), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


NETS = {"jax": plain, "equinox": equinox, "nnx": nnx}
