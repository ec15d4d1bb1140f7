"""Pure-functional neural networks on JAX, made to see how gradients flow."""

from fnn import activations, clip, data, initializers, losses, meanfield, models, plot, study, taps, tree
from fnn.clip import packed, per_depth
from fnn.conv import avg_pool, conv, conv_transpose, global_avg_pool, max_pool
from fnn.core import Layer, function, named, parallel, repeat, residual, serial, stateless
from fnn.flow import GradientFlow, gradient_flow
from fnn.inputs import Masked, add, branches, concatenate, last, positionwise, unmasked
from fnn.layers import activation, dense, dropout, flatten
from fnn.norm import batch_norm, group_norm, layer_norm, rms_norm
from fnn.taps import tap
from fnn.train import History, TrainState, TrainStep, evaluate, fit, train_step

__version__ = "0.1.0"

__all__ = [
    "GradientFlow",
    "History",
    "Layer",
    "Masked",
    "TrainState",
    "TrainStep",
    "activation",
    "activations",
    "add",
    "avg_pool",
    "batch_norm",
    "branches",
    "clip",
    "concatenate",
    "conv",
    "conv_transpose",
    "data",
    "dense",
    "dropout",
    "evaluate",
    "fit",
    "flatten",
    "function",
    "global_avg_pool",
    "gradient_flow",
    "group_norm",
    "initializers",
    "last",
    "layer_norm",
    "losses",
    "max_pool",
    "meanfield",
    "models",
    "named",
    "packed",
    "parallel",
    "per_depth",
    "plot",
    "positionwise",
    "repeat",
    "residual",
    "rms_norm",
    "serial",
    "stateless",
    "study",
    "tap",
    "taps",
    "train_step",
    "tree",
    "unmasked",
]
