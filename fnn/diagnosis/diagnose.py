"""`diagnose`: measure, change one thing, train again; name the earliest measured cause whose repair works."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from jax.typing import ArrayLike

from fnn import check
from fnn.admission import Optimizer
from fnn.core import Layer
from fnn.datasets.dataset import Data
from fnn.diagnosis import parts, verdict
from fnn.diagnosis.case import Case, case_of
from fnn.diagnosis.causes import Cause
from fnn.diagnosis.inquiry import SETTLED, Inquiry
from fnn.diagnosis.loss_case import loss_case_of
from fnn.diagnosis.report import Diagnosis, Verdict, diagnosis_of
from fnn.diagnosis.trial import Runner
from fnn.progress import Progress
from fnn.tasks import ExampleFunction
from fnn.tree import PyTree


def diagnose(
    net: Layer | Callable[..., Layer],
    loss: ExampleFunction,
    optimizer: Optimizer | Callable[..., Optimizer],
    train: Data,
    validation: Data | None = None,
    *,
    batch_size: int,
    steps: int,
    score: ExampleFunction | None = None,
    seeds: int = 3,
    budget: float = 60.0,
    target: float | None = None,
    shuffle: bool = True,
    progress: bool | None = None,
) -> Diagnosis:
    """Find out why a training fails: change one thing, train again, and see what cures it.

    `net` is a function `build(depth=..., activation=..., ...) -> Layer` whose defaults are the net that does not train;
    knobs with the names of `models.mlp`'s arguments (depth, width, activation, norm, residual, dropout, head) are varied,
    others are left as they are. A plain Layer is varied from outside only: data, weights, rate, loss, batch, steps.
    `optimizer` is a function `(rate=..., clip=None) -> optax transformation`, with the present values as defaults, or a
    transformation, whose updates are scaled instead; a clip in it, or a large ε, is found by how its steps answer to
    gradients of other sizes, and left out by scaling these. `train` and `validation` are pairs (x, y); `loss(outputs, y)` returns
    float[batch]. `shuffle=False` says that the training takes its batches in the order of the data.

    First the data, the net before its first step, and its run are measured: that gives suspects. Then each change is
    trained with `seeds` seeds. The cause is the earliest one, from data through weights, head, activation, norm, rate to
    budget, that was measured and whose repair works: the score rises by more than max(0.03, two standard deviations of
    the seeds) and by at least 70 % of the best rise of all, fresh seeds and data that did not choose it confirm that, and
    the abnormality is gone. If no single repair is enough, all suspects are repaired, and one after the other is put back.
    Once a suspect's repair leaves nothing to gain, no program is compiled any more for changes that could not be named first.

    The score is balanced accuracy, or R², of held-out data; without them of the training data, and the report says so. Or it
    is `score(outputs, y)`, one number or float[batch], higher is better, 0 no better than a guess, 1 perfect: where outputs
    are no predictions of y, as of a Poisson loss that takes logarithms of rates.
    `healthy` means: above chance, higher than before the first step (or near 1), not 0.2 below what the nearest training
    examples give, seeds agree, and no change that was tried raises the score by more than that; with `target`, that the score
    reaches it. Where only the loss is known, nobody can say how low it could be: a low score may be healthy; with weights that
    are not used, or a net that sees no order, it is undecided.
    `budget` in seconds ends the search; what was not tried is listed.

    Errors: ValueError for a knob without a default, a batch larger than the data, targets that are no labels and no
    numbers, or, without a `score`, a loss whose best outputs are another function of the targets; TypeError for what is no
    net, loss, optimizer or score. The keywords are many because each can be left out.

        d = fnn.diagnose(build, fnn.losses.cross_entropy, optimizer, train, test, batch_size=64, steps=400)
        print(d); d.causes[0].name; d.html("why.html")
    """
    check.above_zero("diagnose", budget=budget)
    case = case_of(
        net,
        loss,
        optimizer,
        train,
        validation,
        batch_size=batch_size,
        steps=steps,
        seeds=seeds,
        shuffle=shuffle,
        score=score,
    )
    return _found(case, budget, target, progress)


def diagnose_loss(
    loss: Callable[[PyTree, PyTree], ArrayLike],
    params: PyTree,
    batches: Iterable[PyTree],
    optimizer: Optimizer | Callable[..., Optimizer],
    validation: Iterable[PyTree] | None = None,
    *,
    score: Callable[[PyTree, PyTree], ArrayLike] | None = None,
    steps: int | None = None,
    seeds: int = 3,
    budget: float = 60.0,
    target: float | None = None,
    shuffle: bool = False,
    progress: bool | None = None,
) -> Diagnosis:
    """Do `diagnose` for any JAX loss `(params, batch) -> float[]`, a mean over the batch; of a model in any framework.

    `batches` is a list of batches, trees of arrays with examples first, and is gone through in its order, again and again
    until `steps` steps are done (default: once). `validation` is a list too, or one batch. Of a pair the first part is taken
    for the inputs, the second for the targets; of a dict the entries called x, inputs, image, ... and y, targets, label,
    ...; of two entries one such name tells both, of more one name tells the targets, and all others are inputs.

    From outside these are varied: inputs and targets (standardised), order, weights (redrawn to N(0, gain²/fan_in): of an
    array named `weight` outputs come first, of all others last; recurrent ones orthogonal), rate, clipping, steps, and in
    the traced program the activations between layers (put there where there are none), those behind the last one,
    stop_gradient, and float32 for what is computed in bfloat16 or float16; weight penalties in the loss are left out, and
    with a `score` its other terms one by one. Gates and the rest of the loss stay as they are.
    The first seed starts from `params`, others from the same arrays in another order along each axis.

    The score is `score(params, batch)`, higher is better, or 1 - loss/guess, where a guess is the lowest loss of a last layer
    that gives the same outputs for every example: 0 means no better than a guess; of a squared error the score is R². A loss
    that can be negative (a likelihood of numbers) needs a `score`. Weight penalties do not count. The keywords, and all
    else, are those of `diagnose`.
    Errors: ValueError for a loss below 0 without a `score`; TypeError for a loss that is no function, params
    that are no floating arrays; ValueError for batches that share no leading axis, or a loss that is not one float.
    """
    check.above_zero("diagnose_loss", budget=budget)
    case = loss_case_of(loss, params, batches, optimizer, validation, score, steps=steps, seeds=seeds, shuffle=shuffle)
    return _found(case, budget, target, progress)


def _found(case: Case, budget: float, target: float | None, progress: bool | None) -> Diagnosis:
    with Progress("change", 0, progress) as bar, ThreadPoolExecutor(1) as thread:
        inquiry = Inquiry(Runner(case, thread), float(budget), bar.say)
        try:
            inquiry.measure()
            inquiry.search()
            if not inquiry.helped():  # two faults may hide each other, and are sooner tried than more steps
                verdict.both(inquiry)
            inquiry.lengthen()
            found, ill = _causes(inquiry, target)
            if SETTLED in inquiry.skipped.values() and not (found and found[0].evidence):  # it was not settled, then
                inquiry.search(all_of_them=True)
                found, ill = _causes(inquiry, target)
            working = verdict.works(inquiry)
            adds = verdict.adds(inquiry, found, working)
            if found and found[0].repair is not None:
                inquiry.begin(inquiry.tried[found[0].repair.change].plan)  # for the report
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
    return diagnosis_of(inquiry, Verdict(found, working, adds, ill), target)


def _causes(inquiry: Inquiry, target: float | None) -> tuple[list[Cause], bool]:
    """Give the causes, and whether the scores themselves show a fault."""
    inquiry.evidence = parts.judged(inquiry)
    inquiry.evidence = [e for e in inquiry.evidence if e.cause in verdict.suspects(inquiry)]
    ill = verdict.sick(inquiry, target)
    return ([] if target is not None and not ill else verdict.causes(inquiry, ill)), ill
