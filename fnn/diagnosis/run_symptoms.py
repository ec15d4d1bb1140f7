"""What is abnormal in the course of a training, and in the net in the middle of it."""

import numpy as np

from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.causes import LEAST, Evidence, shown
from fnn.diagnosis.response import BOUNDLESS, USUAL, Response
from fnn.diagnosis.start import Start
from fnn.diagnosis.symptoms import LOGITS, ROUNDED, attention, rounding
from fnn.diagnosis.trial import Outcome

NO_RATE = Evidence("optimizer", "no other rate does as well")
"""Said of every training: the least that speaks for the optimiser."""


def middle_symptoms(case: Case, begun: Start, found: Start) -> list[Evidence]:
    """List what half of the steps made abnormal; what was so before the first step is not said again."""

    def highest(name: str, of: Start) -> float:
        return float(np.nanmax(np.append(of.layers.get(name, np.zeros(0))[1:], 0)))

    evidence = [] if begun.rounded > ROUNDED else rounding(case, found, "after half of the steps")
    for name, word, most in (("input_dead", "0 for every example", 0.6), ("input_saturated", "saturated", 0.8)):
        before, now = highest(name, begun), highest(name, found)
        if before <= most < now:
            text = f"after half of the steps {now:.0%} of the inputs of a layer are {word}, at first {before:.0%}"
            evidence.append(Evidence("lr_high", f"{text} (healthy up to {most:.0%})"))
    if found.attention is not None and found.attention[0] > 2 * LOGITS >= LOGITS >= (begun.attention or (0.0,))[0]:
        evidence.append(Evidence("lr_high", f"after half of the steps {attention(found)}"))
    if idle := never_used(begun, found):
        text = f"the loss does not depend on {', '.join(idle[:3])}, neither at first nor after half of the steps"
        evidence.append(Evidence("blocked_gradient", text))
    alive = [path for path, value in begun.gradient.items() if value > -np.inf]
    gone = [path for path in alive if found.gradient.get(path) == -np.inf]
    if gone and not evidence:
        text = f"after half of the steps the gradient of {', '.join(gone[:3])} is exactly zero, at first it was not"
        evidence.append(Evidence("lr_high", text))
    return evidence


def never_used(begun: Start, middle: Start) -> list[str]:
    """List the kernels on which the loss depends neither at first nor after half of the steps, when gates have opened.

    None where it depends on nothing: then the fault lies behind them all.
    """
    if begun.constant or not any(value > -np.inf for value in begun.gradient.values()):
        return []
    return [path for path in begun.idle if path in middle.idle]


def endless(losses: np.ndarray) -> bool:
    """Whether a loss, float[seeds, steps], falls below zero without end."""
    half, last = losses.shape[1] // 2, max(1, losses.shape[1] // 5)
    first, middle, last = (
        float(np.median(part)) for part in (losses[:, 0], losses[:, half : half + last], losses[:, -last:])
    )
    return last < -10 * max(1.0, abs(first)) and last < middle < 0


def useless(outcome: Outcome) -> bool:
    """Whether the loss falls by a tenth or more while the score falls too, that of training examples as well."""
    losses = outcome.losses
    first, last = (float(np.median(part)) for part in (losses[:, 0], losses[:, -max(1, losses.shape[1] // 5) :]))
    falls = bool(np.isfinite(last) and first - last > 0.1 * abs(first))
    return falls and _below(outcome, outcome.chooses) and _below(outcome, outcome.train)


def spoilt(outcome: Outcome) -> bool:
    """Whether the trained net scores lower than the one that began."""
    return _below(outcome, outcome.chooses)


def _below(outcome: Outcome, scores: np.ndarray) -> bool:
    return outcome.began is not None and float(np.mean(scores)) < float(np.mean(outcome.began)) - LEAST


def _insensitive(outcome: Outcome, response: Response) -> Evidence | None:
    """Whether steps are small since ε is far above the gradient."""
    entries = float(np.median(outcome.norms)) / max(1, response.size) ** 0.5
    left = entries / (entries + response.eps) if response.eps > USUAL else 1.0
    text = (
        f"steps are {left:.2g} of those of an ε of 1e-8: it is about {response.eps:.1g}, the gradient's entries "
        f"about {entries:.1g}"
    )
    return Evidence("optimizer", text) if left < 0.25 else None


def run_symptoms(
    case: Case, plan: Plan, found: Start, outcome: Outcome, response: Response = BOUNDLESS
) -> list[Evidence]:
    """List what is abnormal in the course of a training."""
    evidence = []
    losses, steps = outcome.losses, outcome.losses.shape[1]
    head, tail = losses[:, : max(1, steps // 20)].mean(1), losses[:, -max(1, steps // 5) :]
    ratios = outcome.ratios
    early = float(np.median(ratios[:, : max(1, steps // 10)]))
    moved = float(np.median(np.where(np.isfinite(outcome.moved), outcome.moved, 0).max(1)))
    if endless(losses):
        y = case.y
        what = f"the loss falls without end, to {np.median(tail):.3g}"
        if case.task.target == "linear" and (y.min() < 0 or y.max() > 1):
            text = f"{what}, with targets from {y.min():g} to {y.max():g}: an entropy takes targets from 0 to 1"
            evidence.append(Evidence("label_encoding", text))
        else:
            evidence.append(Evidence("loss", f"{what}: no answer is the best one"))
    elif case.task.users and outcome.began is not None and useless(outcome):
        text = (
            f"the loss falls from {np.median(losses[:, 0]):.3g} to {np.median(tail):.3g}, and the score falls too: "
            f"{shown(float(np.mean(outcome.began)))} at the start, {shown(float(np.mean(outcome.chooses)))} at the end"
        )
        evidence.append(Evidence("loss", text))
    elif case.task.users and case.task.kind in ("classes", "multi_label") and np.median(tail) < 0:
        text = (
            f"the loss becomes {np.median(tail):.3g}, less than that of right answers that are sure (for most losses 0)"
        )
        evidence.append(Evidence("loss", text))
    if not np.isfinite(losses).all():
        first = int(np.argmax(~np.isfinite(losses).all(0)))
        if first > 0:  # no rate can change the first loss
            evidence.append(Evidence("lr_high", f"the loss is not finite from step {first} on"))
        if not np.isfinite(losses[:, :2]).all():
            evidence.append(
                Evidence("numerics", f"the loss is not finite after {first} {'step' if first == 1 else 'steps'}")
            )
    else:
        if early > 0.05:
            evidence.append(
                Evidence(
                    "lr_high", f"a step moves the weights by {early:.2g} of their size at first (healthy up to 0.05)"
                )
            )
        # Noise of the loss, with weights that hardly move, is no sign of the rate.
        unsettled = (tail.mean(1) > 0.98 * head) | (tail.std(1) > 0.5 * np.abs(tail.mean(1)))
        if moved > 0.01 and unsettled.any():
            evidence.append(
                Evidence(
                    "lr_high",
                    f"the loss does not settle: {np.mean(head):.3g} at first, {np.mean(tail):.3g} ± {np.mean(tail.std(1)):.2g} "
                    "at the end",
                )
            )
    half = losses[:, steps // 2 : steps // 2 + max(1, steps // 5)].mean(1)
    falling = float(np.median((half - tail.mean(1)) / np.maximum(np.abs(half), 1e-30)))
    if np.isfinite(losses).all() and moved < 0.15:
        evidence.append(
            Evidence("lr_low", f"the weights moved by {moved:.2g} of their size in all (healthy above 0.15)")
        )
    if np.isfinite(losses).all() and falling > 0.05:
        evidence.append(
            Evidence("lr_low", f"the loss still falls at the end, by {falling:.0%} over the last part of the run")
        )
    clip = case.clip if isinstance(case.clip, int | float) else response.norm
    if clip < np.inf and not plan.unclipped:
        share = float(np.mean(outcome.norms > clip))
        left = float(np.median(clip / np.maximum(outcome.norms, clip)))
        if share > 0.8 and left < 0.3:
            evidence.append(Evidence("clip", f"{share:.0%} of the steps are clipped, to {left:.2g} of their gradient"))
    if case.held_out and float(np.mean(outcome.train) - np.mean(outcome.chooses)) > 0.1:
        evidence.append(
            Evidence("too_little_data", f"{case.train.size} examples: score {np.mean(outcome.train):.2f} on them, "
                     f"{np.mean(outcome.chooses):.2f} on held-out ones")
        )  # fmt: skip
    if found.rounding > 1e-6 and (typical := float(np.median(ratios))) < found.rounding:
        evidence.append(
            Evidence(
                "numerics",
                f"a step is {typical:.1e} of the weights, less than their dtype's rounding, {found.rounding:.1e}: it is lost",
            )
        )
    dropped = case.value(plan, "dropout")
    if isinstance(dropped, int | float) and dropped > 0.6:
        evidence.append(
            Evidence("regularization", f"dropout switches off {dropped:.0%} of the units (healthy up to 60 %)")
        )
    if float(np.median(outcome.shrunk)) < 0.5:
        evidence.append(
            Evidence(
                "regularization",
                f"the weights shrink to {np.median(outcome.shrunk):.2g} of their size (healthy above 0.5)",
            )
        )
    if float(np.mean(outcome.train)) < 0.95:
        evidence.append(Evidence("capacity", f"score {np.mean(outcome.train):.2f} on the training examples themselves"))
    if response.ends is not None:
        text = f"from step {response.ends} of {steps} on the optimiser takes steps of next to nothing: its schedule ends there"
        evidence.append(Evidence("lr_low", text))
    if response.uphill:
        evidence.append(
            Evidence("optimizer", "the optimiser's steps go along the gradient, up the loss: a minus is missing")
        )
    elif (text := _insensitive(outcome, response)) is not None:
        evidence.append(text)
    else:
        evidence.append(NO_RATE)
    if case.batch_size < 8 or case.batch_size > case.train.size / 4:
        evidence.append(Evidence("batch_size", f"{case.batch_size} of {case.train.size} examples in a batch"))
    if case.value(plan, "cell") is not None:
        evidence.append(Evidence("memory", f"a {case.value(plan, 'cell')} carries what it has read over all positions"))
    elif case.gated:
        evidence.append(Evidence("memory", "a recurrent cell with gates carries what it has read over all positions"))
    seen = steps * case.batch_size / case.train.size
    if seen < 2:
        evidence.append(Evidence("steps", f"each training example is seen {seen:.2g} times"))
    elif falling > 0.02:
        evidence.append(
            Evidence("steps", f"the loss still falls at the end ({falling:.0%} over the last part of the run)")
        )
    return evidence
