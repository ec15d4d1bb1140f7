"""Pure-functional neural networks on JAX, made to see how gradients flow."""

from fnn import losses, models, parametrizations, plot, tree
from fnn.core import Layer, named, repeat, residual, serial, stateless
from fnn.datasets import data
from fnn.diagnosis.diagnose import diagnose, diagnose_loss
from fnn.diagnosis.replay import Replay, replay
from fnn.diagnosis.report import Diagnosis
from fnn.gradients import noise
from fnn.gradients.diff import diff
from fnn.gradients.example_gradients import PerExampleGradients
from fnn.gradients.flow import GradientFlow, gradient_flow
from fnn.gradients.per_example import example_loss, per_example
from fnn.gradients.readings import Flow
from fnn.gradients.watch import Watch, watch
from fnn.layers import activations, initializers, memory, taps
from fnn.layers.attention import attention, cross_attention, positions
from fnn.layers.conv import avg_pool, conv, conv_transpose, global_avg_pool, max_pool
from fnn.layers.dense import activation, dense, dropout, flatten, scalar_affine
from fnn.layers.inputs import (
    Masked,
    branches,
    concatenate,
    drop_mask,
    parallel,
    positionwise,
    sum_inputs,
    take_ends,
    take_first,
    take_last,
)
from fnn.layers.memory import generate
from fnn.layers.norm import batch_norm, group_norm, layer_norm, rms_norm
from fnn.layers.precision import compute_in
from fnn.layers.recurrent import bidirectional, gru, lstm, rnn
from fnn.layers.shared import shared
from fnn.layers.taps import tap
from fnn.layers.tokens import embed, tied
from fnn.spectra.curvature import Curvature, curvature
from fnn.spectra.jacobian import Jacobian, jacobian
from fnn.spectra.kernel import Kernel, kernel
from fnn.study import grid, report, results
from fnn.study.compare import compare
from fnn.study.coordinates import coordinate_check
from fnn.study.study import Study
from fnn.theory import meanfield
from fnn.training import clip, log, optimizers, weights
from fnn.training.fit import fit
from fnn.training.history import History
from fnn.training.placement import shard
from fnn.training.saving import load, save
from fnn.training.step import TrainState, TrainStep, evaluate, train_step
from fnn.training.summary import Summary, summary

__version__ = "0.1.0"

__all__ = [
    "Curvature",
    "Diagnosis",
    "Flow",
    "GradientFlow",
    "History",
    "Jacobian",
    "Kernel",
    "Layer",
    "Masked",
    "PerExampleGradients",
    "Replay",
    "Study",
    "Summary",
    "TrainState",
    "TrainStep",
    "Watch",
    "activation",
    "activations",
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
    "coordinate_check",
    "cross_attention",
    "curvature",
    "data",
    "dense",
    "diagnose",
    "diagnose_loss",
    "diff",
    "drop_mask",
    "dropout",
    "embed",
    "evaluate",
    "example_loss",
    "fit",
    "flatten",
    "generate",
    "global_avg_pool",
    "gradient_flow",
    "grid",
    "group_norm",
    "gru",
    "initializers",
    "jacobian",
    "kernel",
    "layer_norm",
    "load",
    "log",
    "losses",
    "lstm",
    "max_pool",
    "meanfield",
    "memory",
    "models",
    "named",
    "noise",
    "optimizers",
    "parallel",
    "parametrizations",
    "per_example",
    "plot",
    "positions",
    "positionwise",
    "repeat",
    "replay",
    "report",
    "residual",
    "results",
    "rms_norm",
    "rnn",
    "save",
    "scalar_affine",
    "serial",
    "shard",
    "shared",
    "stateless",
    "sum_inputs",
    "summary",
    "take_ends",
    "take_first",
    "take_last",
    "tap",
    "taps",
    "tied",
    "train_step",
    "tree",
    "watch",
    "weights",
]


def __dir__() -> list[str]:
    """The public names alone; folders and dunders are found by those who look for them."""
    return list(__all__)
