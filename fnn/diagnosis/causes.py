"""The causes that a diagnosis can name, in the order in which a training meets them, and what it finds out about each."""

from dataclasses import dataclass

CAUSES = {
    "input_empty": "the inputs hold nothing that differs between examples",
    "input_scale": "inputs, or some of them, are far too large or too small",
    "target_scale": "targets are far too large or too small, or far from zero",
    "label_encoding": "labels are not written in the way that the loss reads them",
    "labels": "training labels do not belong to their inputs",
    "split_mismatch": "held-out data differ from the training data",
    "too_little_data": "there are too few training examples",
    "order": "batches follow the order of the data, so that each is of one kind",
    "numerics": "a formula or a dtype loses the numbers: overflow, NaN, rounding",
    "init_symmetric": "all units of a layer start equal, and stay so",
    "dead_units": "units give 0 for every example",
    "init_small": "initial weights are too small for this depth",
    "init_large": "initial weights are too large for this depth",
    "blocked_gradient": "no gradient reaches some of the weights",
    "head": "the last activation does not go with the loss or the targets",
    "loss": "the loss does not lead to the right answer",
    "activation": "the activation does not carry signals, or adds nothing to a linear net",
    "memory": "the recurrent net forgets",
    "positions": "the net cannot see the order of its inputs, and the task needs it",
    "depth_norm": "at this depth, signals or gradients do not get through the layers and their norm",
    "lr_high": "the learning rate is too high",
    "clip": "clipping leaves too little of the gradient",
    "lr_low": "the learning rate is too low for this number of steps",
    "regularization": "regularisation takes too much",
    "optimizer": "a setting of the optimiser other than its rate",
    "batch_size": "the batch size",
    "capacity": "the net is too small for the task",
    "steps": "the training is too short",
}
"""Name and meaning, in the order of stages: data, scale, numerics, initial weights, head, activation, norm and depth, rate,
regularisation, optimiser, budget. The earliest cause that is measured, and whose repair works, is the one that is named."""
STAGE = {name: i for i, name in enumerate(CAUSES)}

LEAST = 0.03
"""A smaller rise of a score is none."""
WEAK = {"optimizer", "capacity", "steps", "memory", "batch_size", "too_little_data"}
"""Suspected of almost every net; not repaired together with others."""


@dataclass(frozen=True)
class Evidence:
    """A measured abnormality."""

    cause: str
    text: str
    """What was measured, with its healthy range."""
    partial: bool = False
    """Of some of the examples alone."""


@dataclass(frozen=True)
class Trial:
    """One changed training, as the report shows it."""

    change: str
    """What was changed: "standardise x"."""
    cause: str
    """The cause that the change repairs, if it works."""
    scores: tuple[float, ...]
    """Held-out score of each seed, on the half of the held-out data that chooses."""
    checked: tuple[float, ...] = ()
    """Of fresh seeds, on the other half, where it was checked."""
    seconds: float = 0.0
    together: tuple[str, ...] = ()
    """Of several changes at once the name of each."""

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Cause:
    """A cause, with what was measured and the run that proves it."""

    name: str
    evidence: tuple[Evidence, ...]
    repair: Trial | None
    """The training that was repaired by removing this cause alone (of two causes: together with the other); None for a second
    cause that was measured, but that the repair of the first one hides."""
    remedy: str
    """Code to paste."""
    confidence: float
    """Share of fresh seeds that the repair lifted over the sick ones."""

    @property
    def meaning(self) -> str:
        return CAUSES[self.name]


def shown(score: float) -> str:
    """Write a score; those of R² and of losses end at -1, below which no difference says anything."""
    return "≤-1.00" if score <= -1 else f"{score:.2f}"
