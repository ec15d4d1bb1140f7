"""Pure-functional neural networks on JAX, made to see how gradients flow."""

from fnn import (
    activations,
    clip,
    data,
    grid,
    initializers,
    losses,
    meanfield,
    models,
    noise,
    plot,
    report,
    results,
    study,
    taps,
    tree,
)
from fnn.clip import packed, per_depth
from fnn.compare import compare
from fnn.core import Layer, function, named, parallel, repeat, residual, serial, stateless
from fnn.example_gradients import PerExampleGradients
from fnn.flow import GradientFlow, gradient_flow
from fnn.layers import activation, dense, dropout, flatten
from fnn.norm import batch_norm, group_norm, layer_norm, rms_norm
from fnn.per_example import example_loss, per_example
from fnn.study import Study
from fnn.taps import tap
from fnn.train import History, TrainState, TrainStep, evaluate, fit, train_step

__version__ = "0.1.0"

__all__ = [
    "GradientFlow",
    "History",
    "Layer",
    "PerExampleGradients",
    "Study",
    "TrainState",
    "TrainStep",
    "activation",
    "activations",
    "batch_norm",
    "clip",
    "compare",
    "data",
    "dense",
    "dropout",
    "evaluate",
    "example_loss",
    "fit",
    "flatten",
    "function",
    "gradient_flow",
    "grid",
    "group_norm",
    "initializers",
    "layer_norm",
    "losses",
    "meanfield",
    "models",
    "named",
    "noise",
    "packed",
    "parallel",
    "per_depth",
    "per_example",
    "plot",
    "repeat",
    "report",
    "residual",
    "results",
    "rms_norm",
    "serial",
    "stateless",
    "study",
    "tap",
    "taps",
    "train_step",
    "tree",
]
