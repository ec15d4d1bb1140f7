"""Pure-functional neural networks on JAX, made to see how gradients flow."""

from fnn import (
    activations,
    clip,
    data,
    grid,
    initializers,
    losses,
    meanfield,
    memory,
    models,
    noise,
    plot,
    report,
    results,
    study,
    taps,
    tree,
)
from fnn.attention import attention, cross_attention, positions
from fnn.compare import compare
from fnn.conv import avg_pool, conv, conv_transpose, global_avg_pool, max_pool
from fnn.core import Layer, function, named, parallel, repeat, residual, serial, stateless
from fnn.example_gradients import PerExampleGradients
from fnn.fitting import History, fit
from fnn.flow import GradientFlow, gradient_flow
from fnn.inputs import Masked, add, branches, concatenate, ends, first, last, positionwise, unmasked
from fnn.layers import activation, dense, dropout, flatten, gain
from fnn.memory import generate
from fnn.norm import batch_norm, group_norm, layer_norm, rms_norm
from fnn.optimizers import packed, per_depth
from fnn.per_example import example_loss, per_example
from fnn.precision import compute_in
from fnn.recurrent import bidirectional, gru, lstm, rnn
from fnn.study import Study
from fnn.taps import tap
from fnn.tokens import embed, tied
from fnn.train import TrainState, TrainStep, evaluate, train_step

__version__ = "0.1.0"

__all__ = [
    "GradientFlow",
    "History",
    "Layer",
    "Masked",
    "PerExampleGradients",
    "Study",
    "TrainState",
    "TrainStep",
    "activation",
    "activations",
    "add",
    "attention",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "branches",
    "clip",
    "compare",
    "compute_in",
    "concatenate",
    "conv",
    "conv_transpose",
    "cross_attention",
    "data",
    "dense",
    "dropout",
    "embed",
    "ends",
    "evaluate",
    "example_loss",
    "first",
    "fit",
    "flatten",
    "function",
    "gain",
    "generate",
    "global_avg_pool",
    "gradient_flow",
    "grid",
    "group_norm",
    "gru",
    "initializers",
    "last",
    "layer_norm",
    "losses",
    "lstm",
    "max_pool",
    "meanfield",
    "memory",
    "models",
    "named",
    "noise",
    "packed",
    "parallel",
    "per_depth",
    "per_example",
    "plot",
    "positions",
    "positionwise",
    "repeat",
    "report",
    "residual",
    "results",
    "rms_norm",
    "rnn",
    "serial",
    "stateless",
    "study",
    "tap",
    "taps",
    "tied",
    "train_step",
    "tree",
    "unmasked",
]
