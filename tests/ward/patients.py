"""The published patients: sick trainings, each made from a healthy one, its twin, by one change."""

from dataclasses import dataclass
from typing import Any

import numpy as np

import fnn

from . import recipes
from .recipes import BINARY, DEEP, DEFAULT, SGD, SPIRALS, TEACHER, Case, Recipe

CAUSES = frozenset(
    [
        "input_scale",
        "input_empty",
        "target_scale",
        "labels",
        "label_encoding",
        "split_mismatch",
        "too_little_data",
        "order",
        "batch_size",
        "init_small",
        "init_large",
        "init_symmetric",
        "dead_units",
        "activation",
        "depth_norm",
        "capacity",
        "head",
        "loss",
        "numerics",
        "blocked_gradient",
        "lr_high",
        "lr_low",
        "clip",
        "optimizer",
        "regularization",
        "steps",
        "memory",
        "positions",
    ]
)


@dataclass(frozen=True)
class Patient:
    """A sick training and its healthy twin, which differ in one thing; in two, if it has two faults.

    On nine seeds every sick run scores below `bar` on held-out data, and every twin reaches it: balanced accuracy for
    classes, R² for numbers.
    """

    name: str
    causes: frozenset[str] | tuple[frozenset[str], frozenset[str]]
    """names that are right answers; of two faults, those of each"""
    main: tuple[str, ...]
    """the name of each fault"""
    sick: Recipe
    well: Recipe
    bar: float
    budget: float = 60.0
    """seconds that a diagnosis may take"""
    halves: tuple[Recipe, ...] = ()
    """of two faults: the training with the first alone, and with the second alone; both are sick"""

    def make(self, seed: int = 0) -> Case:
        return self.sick.case(seed)

    def twin(self, seed: int = 0) -> Case:
        return self.well.case(seed)


def patient(name: str, causes: str, well: Recipe, bar: float, budget: float = 60.0, **change: Any) -> Patient:
    """Make a patient; `causes` lists the names that are right, the first one best: "lr_low steps"."""
    named = causes.split()
    return Patient(name, frozenset(named), (named[0],), well.but(**change), well, bar, budget)


def by_class(x: Any, y: Any, rng: Any) -> tuple[Any, Any]:
    order = np.argsort(y, kind="stable")
    return x[order], y[order]


def permuted(x: Any, y: Any, rng: Any) -> tuple[Any, Any]:
    return x, rng.permutation(y)


def useless_feature(largest: float):
    """Add a feature that is uniform in 0..largest and says nothing about y."""

    def add(x, y, rng):
        return np.concatenate([x, rng.uniform(0, largest, (len(x), 1))], axis=1).astype(np.float32), y

    return recipes.changed(add)


MOMENTUM = DEFAULT.but(method=recipes.momentum, rate=0.05)
DEEP_8 = DEEP.but(depth=8, init="glorot_normal", rate=0.03)
PROBABILITIES = {"head": "softmax", "loss": recipes.probability_loss}
ONE_HOT = SGD.but(data=[recipes.one_hot], loss=fnn.losses.mse, rate=0.3)
NORMED = DEFAULT.but(depth=60, norm="batch_norm", residual=True, steps=300)

PUBLIC = (
    patient("sgd_rate_10", "lr_high", SGD, 0.85, rate=10.0),
    patient("sgd_rate_1e-4", "lr_low steps", SGD, 0.85, rate=1e-4),
    patient("clip_1e-4", "clip lr_low", SGD.but(clip=1.0), 0.85, clip=1e-4),
    patient("init_0.01_deep_tanh", "init_small", DEEP, 0.8, init="normal(0.01)", output_init="normal(0.01)"),
    patient("init_scaled_8_tanh", "init_large", DEEP.but(depth=4), 0.8, init="scaled(8.0)", output_init="scaled(8.0)"),
    patient("init_zeros", "init_symmetric dead_units", SGD, 0.85, init="zeros", output_init="zeros"),
    patient("bias_minus_20", "dead_units", DEFAULT, 0.85, bias=-20.0),
    patient("sigmoid_8", "activation init_small", DEEP_8, 0.8, activation="sigmoid"),
    patient("linear_spirals", "activation", SPIRALS, 0.9, activation="identity"),
    patient("softmax_one_unit", "head", BINARY, 0.85, **PROBABILITIES),
    patient("relu_head_regression", "head", TEACHER, 0.7, head="relu"),
    patient("mae_one_hot", "loss", ONE_HOT, 0.85, loss=recipes.mae),
    patient("pixels_255", "input_scale", SGD, 0.85, data=[recipes.affine(255.0)]),
    patient("one_feature_1e4", "input_scale", SPIRALS, 0.9, data=[useless_feature(1e4)]),
    patient("targets_5e5", "target_scale", TEACHER, 0.7, data=[recipes.targets(lambda y: y * 1e5 + 5e5)]),
    patient("labels_permuted", "labels", DEFAULT, 0.85, data=[recipes.changed(permuted, "train")]),
    patient("sorted_no_shuffle", "order", MOMENTUM, 0.85, data=[recipes.changed(by_class, "train")], shuffle=False),
    patient("test_not_scaled", "split_mismatch", DEFAULT, 0.85, data=[recipes.affine(40.0, 90.0, "validation")]),
    patient("dropout_0.97", "regularization", DEFAULT, 0.85, dropout=0.97),
    patient("batch_norm_60", "depth_norm", NORMED, 0.7, budget=240.0, residual=False),
)
