"""Healthy trainings, most of which look ill: no obvious remedy raises the held-out score."""

from dataclasses import dataclass

import numpy as np

import fnn

from . import recipes
from .recipes import DEFAULT, SGD, SPIRALS, Case, Recipe


@dataclass(frozen=True)
class Control:
    """A healthy training: on nine seeds every run reaches `bar` on held-out data.

    "Healthy" also means that no obvious remedy raises the score by more than .03 or two standard deviations of the seeds'
    scores, whichever is larger.
    """

    name: str
    well: Recipe
    bar: float
    looks_like: str = ""
    """causes that a hasty reader would name"""
    budget: float = 60.0

    def make(self, seed: int = 0) -> Case:
        return self.well.case(seed)


def noisy(share: float, classes: int = 10):
    """Replace this share of the training labels by labels drawn uniformly."""

    def replace(x, y, rng):
        return x, np.where(rng.random(len(y)) < share, rng.integers(0, classes, len(y)), y).astype(np.int32)

    return recipes.changed(replace, "train")


def thinned(ratio: int):
    """Keep one in `ratio` examples of class 1."""

    def thin(x, y, rng):
        kept = (y != 1) | (np.cumsum(y == 1) % ratio == 0)
        return x[kept], y[kept]

    return recipes.changed(thin)


SIGMOID_SHALLOW = DEFAULT.but(depth=1, activation="sigmoid", init="glorot_normal", rate=3e-3)
SLOW_SPIRALS = SPIRALS.but(
    data=recipes.made(fnn.data.spirals, examples=2500, turns=1.5, noise=0.05), rate=1e-3, steps=4000
)
IMBALANCE = DEFAULT.but(
    data=thinned(20)(recipes.made(fnn.data.clusters, examples=4000, classes=2, spread=0.7)), outputs=2
)

PUBLIC = (
    Control("digits_adam", DEFAULT, 0.9),
    Control("digits_sgd", SGD, 0.9),
    Control("raw_pixels", DEFAULT.but(data=recipes.pixels, rate=3e-3), 0.9, "input_scale"),
    Control("slow_spirals", SLOW_SPIRALS, 0.9, "lr_low steps"),
    Control("noisy_labels_30", DEFAULT.but(data=[noisy(0.3)], steps=200), 0.85, "labels"),
    Control("imbalance_20_to_1", IMBALANCE, 0.9, "labels loss"),
    Control("sigmoid_shallow", SIGMOID_SHALLOW, 0.9, "activation"),
)
