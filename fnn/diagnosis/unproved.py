"""Causes that no trained repair proves, since only the code of the net, the loss or the data can remove them.

Each rule gives a cause with what was measured, or None; the first one that gives a cause is reported. `EARLY` come before a
repair where nothing abnormal was measured (which may merely avoid the fault), `LATE` after it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fnn.diagnosis import data_symptoms, run_symptoms
from fnn.diagnosis.causes import Cause, Evidence
from fnn.diagnosis.inquiry import Inquiry

Rule = Callable[[Inquiry, bool], Cause | None]
"""Of what was found, and whether the training is ill."""


def named(inquiry: Inquiry, ill: bool, rules: Sequence[Rule]) -> list[Cause]:
    """Give the cause of the first rule that has one, or nothing."""
    return next(([cause] for rule in rules if (cause := rule(inquiry, ill)) is not None), [])


def low(chance: float) -> float:
    """Give the highest score that is no better than chance."""
    return chance + max(0.05, 0.1 * (1 - chance))


def evidence_of(inquiry: Inquiry, cause: str) -> tuple[Evidence, ...]:
    """List what was measured of a cause."""
    return tuple(e for e in inquiry.evidence if e.cause == cause)


def empty_inputs(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name inputs that are equal for all examples: no training can tell these apart, so that none is a proof."""
    empty = tuple(e for e in evidence_of(inquiry, "input_empty") if not e.partial)
    remedy = "# look at how x is read: it is the same for every example"
    return Cause("input_empty", empty, None, remedy, 0.0) if empty else None


def _nothing_told(inquiry: Inquiry) -> str:
    """Say how little the inputs tell of the targets; "" where a training, or nearest neighbours, are above chance."""
    chance, others = inquiry.case.task.chance, max(t.mean for t in inquiry.tried.values())
    near = data_symptoms.information(inquiry.case)
    if not near or others > low(chance):
        return ""
    if any(share - by_chance >= max(4 * noise, 0.1) for share, by_chance, noise in near.values()):
        return ""
    share, by_chance, _ = near["held out"]
    return (
        f"{others:.2f} on others, whatever is changed; {data_symptoms.NEIGHBOURS} nearest neighbours agree on {share:.2f} "
        f"of the targets (chance {by_chance:.2f})"
    )


def empty_features(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name inputs most of which are constant, where the rest of them tells nothing of the targets."""
    empty = tuple(e for e in evidence_of(inquiry, "input_empty") if e.partial)
    if not ill or not empty or not (near := _nothing_told(inquiry)):
        return None
    evidence = (*empty, Evidence("input_empty", f"score {near}"))
    remedy = "# look at how x is made: jax.nn.one_hot of numbers out of its range, for example, gives zeros"
    return Cause("input_empty", evidence, None, remedy, 0.0)


def unrelated_targets(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name inputs that tell nothing of the targets: what is learnt by heart is of no use elsewhere, whatever is changed."""
    if not ill:
        return None
    chance, tried = inquiry.case.task.chance, inquiry.tried.values()
    by_heart = max(float(np.mean(t.outcome.train)) for t in tried)
    if by_heart < chance + 0.5 * (1 - chance) or not (near := _nothing_told(inquiry)):
        return None
    text = f"score up to {by_heart:.2f} on examples that were learnt, {near}"
    remedy = "# compare single examples with their targets: the two do not belong together"
    return Cause("labels", (Evidence("labels", text),), None, remedy, 0.0)


def _lost_numbers(inquiry: Inquiry, ill: bool, trained: bool) -> Cause | None:
    if not ill or not (bad := inquiry.broken(trained=trained)):
        return None
    evidence = evidence_of(inquiry, "numerics") or (Evidence("numerics", f"the loss is not finite: {bad}"),)
    return Cause("numerics", evidence, None, f"# {bad}", 0.0)


def numbers_lost_at_the_start(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name an operation that loses the numbers with the first parameters."""
    return _lost_numbers(inquiry, ill, trained=False)


def numbers_lost_in_training(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name an operation that loses the numbers with the trained parameters."""
    return _lost_numbers(inquiry, ill, trained=True)


def one_output(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name a last layer whose output cannot differ between examples."""
    evidence = evidence_of(inquiry, "head")
    remedy = "# leave out what follows the last layer: a norm, or a softmax, over one unit gives one number"
    return Cause("head", evidence, None, remedy, 0.0) if ill and inquiry.begun.constant and evidence else None


def unread_labels(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name labels that the loss cannot read; a score that reads them as the loss does shows no repair."""
    remedy = "y = np.searchsorted(np.unique(y_train), y)  # and in the score"
    evidence = evidence_of(inquiry, "label_encoding")
    return Cause("label_encoding", evidence, None, remedy, 0.0) if inquiry.begun.unread else None


def labels_without_a_minimum(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name labels for which the loss falls for ever."""
    evidence = evidence_of(inquiry, "label_encoding")
    endless = run_symptoms.endless(inquiry.base.outcome.losses)
    remedy = "y = (y - y.min()) / (y.max() - y.min())  # and in the score"
    return Cause("label_encoding", evidence, None, remedy, 0.0) if endless and evidence else None


def one_label_alone(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name a loss that reads one label and no other."""
    remedy = "# the loss reads one label alone: look at its mask, or at its weights"
    ignored = inquiry.begun.reads.ignored
    return Cause("loss", evidence_of(inquiry, "loss"), None, remedy, 0.0) if ignored else None


def every_pair(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name a loss that compares each output with the targets of all examples."""
    remedy = (
        "# outputs and targets of one shape, or each is compared with all: y.reshape(outputs.shape); the loss of each "
        "example first, the mean over examples last"
    )
    return Cause("loss", evidence_of(inquiry, "loss"), None, remedy, 0.0) if ill and inquiry.begun.unpaired else None


def loss_against_the_score(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name a loss that falls while the score does, where the other sign is no cure: it may have no least value."""
    evidence = tuple(e for e in evidence_of(inquiry, "loss") if run_symptoms.useless(inquiry.base.outcome))
    remedy = "# the loss falls where the score does: look for a sign, or for what is subtracted from what"
    return Cause("loss", evidence, None, remedy, 0.0) if ill and evidence else None


def weights_without_use(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name kernels that do not reach the loss, of a net that learns little: no score shows what they would have given."""
    if not inquiry.idle or not (ill or (short(inquiry) and inquiry.idle_share >= 0.5)):
        return None
    remedy = (
        f"# {', '.join(inquiry.idle[:3])}: find where the result is lost, in a factor of 0 or a value that nobody reads"
    )
    return Cause("blocked_gradient", evidence_of(inquiry, "blocked_gradient"), None, remedy, 0.0)


def short(inquiry: Inquiry) -> bool:
    """Whether even the best training learns less than half of what there is."""
    chance = inquiry.case.task.chance
    return inquiry.best() < chance + 0.5 * (1 - chance)


def no_gradient(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name what cuts the gradient where no change put it back."""
    evidence = evidence_of(inquiry, "blocked_gradient")
    remedy = (
        "# round, sign, floor, argmax and integers have no gradient: replace it, or x + stop_gradient(round(x) - x)"
    )
    return Cause("blocked_gradient", evidence, None, remedy, 0.0) if ill and evidence else None


def no_positions(inquiry: Inquiry, ill: bool) -> Cause | None:
    """Name a net that cannot see the order of its inputs, where no change from outside can give it."""
    begun = inquiry.begun
    given = any("positions" in t.change.causes for t in inquiry.tried.values())
    if given or not begun.blind or not (ill or begun.placed or (short(inquiry) and inquiry.idle)):
        return None
    remedy = "# add to the inputs of the first block a vector that differs from position to position"
    remedy += ": encoding[None, :, :], not encoding[:, None, :]" * begun.placed
    return Cause("positions", evidence_of(inquiry, "positions"), None, remedy, 0.0)


EARLY: tuple[Rule, ...] = (empty_features, unrelated_targets, numbers_lost_at_the_start, one_output)
LATE: tuple[Rule, ...] = (
    unread_labels,
    labels_without_a_minimum,
    one_label_alone,
    every_pair,
    loss_against_the_score,
    no_positions,  # a table of positions that is not used is a net without positions
    weights_without_use,
    no_gradient,
    numbers_lost_in_training,
)
