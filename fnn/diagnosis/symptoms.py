"""What is abnormal in a net before its first step: each an `Evidence` with what is healthy."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fnn.diagnosis import reads
from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.causes import Evidence
from fnn.diagnosis.start import Start
from fnn.diagnosis.task import least_at
from fnn.diagnosis.weights import LARGE, SMALL
from fnn.layers import activations

DECADES = 1.0
"""How many powers of ten a signal may lose or gain between the first and the last hidden layer."""


KEEPS = 0.6
"""Recurrent weights that leave less of a state forget it: a hundredth is left after nine positions."""
LOGITS = 50.0
"""Attention logits beyond it: each query sees one key alone, and hardly any gradient gets through the softmax."""


HEAVY = 50.0
"""A class whose examples weigh more than those of others may in all weigh so many times as much as they do."""
NOISE = 1.5
"""Of noise in training: its share of the outputs' own spread."""
ROUNDED = 0.3
"""The share of a gradient that rounding may change."""


def start_symptoms(case: Case, plan: Plan, found: Start) -> list[Evidence]:
    """List what is abnormal before the first step."""
    evidence = [*_unit_symptoms(case, plan, found), *_scale_symptoms(case, plan, found)]
    head = case.value(plan, "head")
    if not found.outputs.size and case.task.kind == "regression" and head in ("sigmoid", "tanh", "relu", "softplus"):
        evidence += _outside(case.y, *_bounds(head))
    if found.outputs.size:
        evidence += [*_head_symptoms(case, plan, found), *_loss_symptoms(case, plan, found)]
    if case.value(plan, "head") == "softmax" and case.task.kind == "multi_label" and (case.y.sum(-1) > 1).any():
        evidence.append(Evidence("head", "a softmax, whose outputs add up to 1, where several labels hold at once"))
    if found.unpaired:
        text = "loss and gradient stay as they are when the targets of a batch change places: they are not compared one by one"
        evidence.append(Evidence("loss", text))
    if found.unread:
        which = " and ".join(map(str, found.unread))
        evidence.append(
            Evidence("label_encoding", f"examples with label {which} have no gradient: the loss does not read it")
        )
    evidence += reads.evidence(found.reads, np.asarray(case.y))
    if case.value(plan, "activation") == "softmax":
        text = "a softmax stands between layers: the units of a layer add up to 1"
        evidence.append(Evidence("activation", text))
    if found.linear and case.task.kind != "exact":
        evidence.append(Evidence("activation", "the net is linear in its inputs, however many layers it has"))
    elif "bare" in case.seen and not plan.swap:
        text = (
            f"{case.seen['bare'] + 1} layers follow each other without an activation: together they are one linear map"
        )
        evidence.append(Evidence("activation", text))
    if found.blind:
        text = "outputs are the same when the inputs are read backwards"
        text += ", but depend on an example's place in its batch: positions run along the wrong axis" * found.placed
        evidence.append(Evidence("positions", text))
    if found.noise > NOISE:
        text = f"noise in training changes the outputs by {found.noise:.2g} of what they differ by (healthy up to {NOISE:g})"
        evidence.append(Evidence("regularization", text))
    if found.kept < KEEPS:
        text = f"recurrent weights leave at most {found.kept:.2g} of the state from one position to the next (healthy about 1)"
        evidence.append(Evidence("memory", text))
    if found.attention is not None and found.attention[0] > LOGITS:
        evidence.append(Evidence("init_large", attention(found)))
    if not np.isfinite(found.loss) or found.bad:
        what = f"the loss is {found.loss:.3g}" + (", its gradient not finite" if np.isfinite(found.loss) else "")
        evidence.append(Evidence("numerics", f"{what} before the first step" + (f"; {found.bad}" if found.bad else "")))
    evidence += rounding(case, found, "before the first step")
    if any(e.cause in ("dead_units", "init_symmetric") for e in evidence):
        return evidence
    if found.constant and not any(e.cause == "head" for e in evidence):
        text = "outputs are the same for every example, and no kernel has a gradient: what follows the last layer takes away all that differs"
        evidence.append(Evidence("head", text))
    if found.cut:
        which = ", ".join(found.cut[:3])
        text = f"the gradient of {which} is exactly zero before the first step, though the loss depends on it"
        evidence.append(Evidence("blocked_gradient", text))
    return evidence


def rounding(case: Case, found: Start, when: str) -> list[Evidence]:
    """What the narrow type in which a net computes makes of its gradient."""
    if found.rounded <= ROUNDED:
        return []
    share = f"by {found.rounded:.0%} of its size" if np.isfinite(found.rounded) else "to what is not finite"
    text = f"{when} {case.computes} changes the gradient {share}, against float32 (healthy up to {ROUNDED:.0%})"
    return [Evidence("numerics", text)]


def _unit_symptoms(case: Case, plan: Plan, found: Start) -> list[Evidence]:
    evidence = []
    if found.alike:
        evidence.append(Evidence("init_symmetric", f"all units of {found.alike[0]} have equal weights"))
    dead = found.layers.get("input_dead", np.array([]))[1:]  # the first layer's inputs are data
    if len(dead) and np.nanmax(np.append(dead, 0)) > 0.6:
        where = found.paths[1 + int(np.nanargmax(dead))]
        evidence.append(
            Evidence(
                "dead_units",
                f"{np.nanmax(dead):.0%} of the inputs of {where} are 0 for every example (healthy below 60 %)",
            )
        )
    return evidence


def _span(values: np.ndarray) -> float:
    """Last minus first; 0 where there is nothing to compare."""
    values = values[np.isfinite(values)]
    return float(values[-1] - values[0]) if len(values) > 1 else 0.0


def _scale_symptoms(case: Case, plan: Plan, found: Start) -> list[Evidence]:
    """Weights whose size, multiplied over the depth, loses or blows up signals; and depth that does so by itself."""
    evidence: list[Evidence] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.concatenate([np.log10(g / case.gain(plan)) for _, g in found.gains] or [np.zeros(0)])
        moments = 0.5 * np.log10(found.layers.get("output_second_moment", np.zeros(0))[:-1])
    total = float(np.nansum(np.clip(each, -50, 50)))
    error = -_span(found.layers.get("log10_error", np.zeros(0))[:-1])  # positive: it grows towards the input
    forward = _span(moments)
    alone = not any(e.cause == "init_symmetric" for e in evidence)
    n = len(each)
    if n and alone and total < -DECADES and (error < -0.7 or forward < -0.7 or n == 1):
        evidence.append(
            Evidence("init_small", f"weights are {10 ** (total / n):.2g} of the size that keeps signals over {n} layers: "
                     f"10^{total:.1f} in all (healthy 0.1 to 10)")
        )  # fmt: skip
    for path, size in found.tables.items():
        if not SMALL <= size <= LARGE:
            cause = "init_large" if size > LARGE else "init_small"
            evidence.append(Evidence(cause, f"numbers of {path} have RMS {size:.3g} (healthy {SMALL:g} to {LARGE:g})"))
    big = np.nanmax(np.append(found.layers.get("output_second_moment", np.zeros(0))[:-1], 0)) ** 0.5
    if n and total > DECADES and (forward > 0.7 or error > 0.7 or big > 4):
        evidence.append(
            Evidence("init_large", f"weights are {10 ** (total / n):.2g} times the size that keeps signals over {n} layers: "
                     f"RMS up to {big:.3g} (healthy up to 4)")
        )  # fmt: skip
    bounded = np.nanmax(np.append(found.layers.get("input_saturated", np.zeros(0)), 0))
    if bounded > 0.5 and not evidence:
        evidence.append(
            Evidence("init_large", f"{bounded:.0%} of the inputs of a layer are saturated (healthy below 50 %)")
        )
    if any(e.cause.startswith("init") for e in evidence):
        return evidence
    steep = max(abs(error), abs(forward))
    name = str(case.value(plan, "activation"))
    squashing = name in ("sigmoid", "softplus") or (error < -1 and bool(np.nanmax(np.append(found.layers.get("input_mean", np.zeros(0))[1:], 0)) > 0.3) and name == "None")  # fmt: skip
    if n and error < -DECADES and squashing:
        evidence.append(
            Evidence(
                "activation",
                f"the error signal shrinks by 10^{error:.1f} over {n} layers of {name} (healthy: 0.1 to 10)",
            )
        )
    if steep > (1.5 if n >= 8 else 3.0):
        what = "error signal" if abs(error) >= abs(forward) else "signal"
        grows = error if abs(error) >= abs(forward) else forward
        evidence.append(
            Evidence(
                "depth_norm",
                f"the {what} changes by 10^{grows:+.1f} over {n} layers (healthy: within 10^±{1.5 if n >= 8 else 3:g})",
            )
        )
    flat = found.outputs.reshape(len(found.outputs), -1) if found.outputs.size else found.outputs
    if n >= 8 and flat.size and np.isfinite(flat).all():
        alike = float(flat.var(0).mean() / max(np.mean(flat**2), 1e-300))
        if alike < 1e-3:
            evidence.append(
                Evidence(
                    "depth_norm",
                    f"outputs differ between examples by {alike**0.5:.1e} of their size (healthy above 0.03)",
                )
            )
    return evidence


def _head_symptoms(case: Case, plan: Plan, found: Start) -> list[Evidence]:
    """A last activation that cannot give the targets, or that the loss applies again."""
    name = case.value(plan, "head")
    outputs = found.outputs.reshape(len(found.outputs), -1)
    y = np.asarray(case.y).reshape(len(case.y), -1)
    low, high = _bounds(name)
    if name is None:
        low = 0.0 if outputs.min() >= 0 else low
    evidence = []
    if case.task.kind == "regression":
        return _outside(y, low, high)
    if not np.isfinite(outputs).all() or case.task.kind == "multi_label":
        return evidence
    if outputs.shape[1] == 1 and np.ptp(outputs) == 0 and np.abs(outputs).max() > 0:
        return [Evidence("head", f"the output is {outputs[0, 0]:g} for every example, whatever the weights are")]
    sums = outputs.shape[1] > 1 and np.abs(outputs.sum(1) - 1).max() < 1e-4 and outputs.min() >= 0
    if sums and _takes_logits(case, plan):
        return [Evidence("head", "outputs are probabilities, and the loss takes logits: softmax is applied twice")]
    if name not in (None, "identity", "softmax") and case.task.kind != "binary":
        evidence.append(Evidence("head", f"{name} stands behind the output layer"))
    if case.task.kind == "binary" and name in ("relu", "tanh", "sigmoid") and _takes_logits(case, plan):
        evidence.append(Evidence("head", f"{name} stands before a loss that takes logits"))
    return evidence


def _bounds(name: str | None) -> tuple[float, float]:
    low, high = activations.get(name).bounds if isinstance(name, str) else (-np.inf, np.inf)
    return (0.0 if name == "relu" else low), high


def _outside(y: np.ndarray, low: float, high: float) -> list[Evidence]:
    """Targets that no output can be."""
    outside = float(np.mean((y < low - 1e-6) | (y > high + 1e-6)))
    text = f"{outside:.0%} of the targets lie outside of what the outputs can be, {low:g} to {high:g}"
    return [Evidence("head", text)] if outside > 0.02 else []


def _takes_logits(case: Case, plan: Plan) -> bool:
    """Whether adding a number to all outputs of an example leaves the loss as it is; of one unit: whether 3 is not worse than 1."""
    loss = plan.loss or case.loss
    y = jnp.asarray(case.y[:8])
    if case.task.kind == "binary":
        y = jnp.full_like(y, case.task.positive)
        shape = (len(y), 1) if y.ndim == 1 else y.shape
        with np.errstate(all="ignore"):
            a, b = (np.asarray(loss(jnp.full(shape, v, jnp.float32), y)).mean() for v in (1.0, 3.0))
        return bool(np.isfinite(b) and b < a)
    outputs = jnp.asarray(np.random.default_rng(0).random((len(y), case.task.classes)), jnp.float32)
    a, b = (np.asarray(loss(part, y)) for part in (outputs, outputs + 5))
    return bool(np.isfinite(b).all() and np.allclose(a, b, rtol=1e-3))


def _loss_symptoms(case: Case, plan: Plan, found: Start) -> list[Evidence]:
    """A loss that prefers the wrong outputs, or the commonest answer to the likely one."""
    loss, task = plan.loss or case.loss, case.task
    if task.kind == "regression" and (pairs := least_at(loss, case.y, (1, *found.outputs.shape[1:]))):
        (c, o), (far, there) = pairs[0], pairs[-1]
        text = f"the loss is least at outputs of {o:.3g} for targets of {c:.3g}, and of {there:.3g} for {far:.3g}"
        return [Evidence("loss", text)]
    if task.kind not in ("classes", "one_hot", "binary"):
        return []
    if not _on_outputs(case, plan):
        return []
    if task.kind == "binary":
        return _weighed(loss, np.asarray(case.y[:256]), 1) if _takes_logits(case, plan) else []
    rng = np.random.default_rng(0)
    n = min(256, case.train.size)
    y = jnp.asarray(case.y[:n])
    truth = np.asarray(y).argmax(-1) if task.kind == "one_hot" else np.asarray(y).reshape(n)
    outputs = rng.random((n, task.classes)).astype(np.float32)
    better, worse = outputs.copy(), outputs.copy()
    better[np.arange(n), truth] += 0.1
    worse[np.arange(n), truth] -= 0.1
    with np.errstate(all="ignore"):
        up, down = (float(np.mean(np.asarray(loss(jnp.asarray(o), y)))) for o in (better, worse))
    if np.isfinite(up) and np.isfinite(down) and up >= down:
        return [Evidence("loss", "the loss does not fall when the right output rises")]
    if weighed := _weighed(loss, np.asarray(y), task.classes):
        return weighed
    constant = []
    for value in np.linspace(0, 1, 21):  # one number for all outputs: where is the loss lowest?
        with np.errstate(all="ignore"):
            constant.append(float(np.mean(np.asarray(loss(jnp.full((n, task.classes), value, jnp.float32), y)))))
    if np.isfinite(constant).all() and np.ptp(constant) > 1e-3 * abs(np.mean(constant)) and np.argmin(constant) == 0:
        return [
            Evidence(
                "loss",
                "without knowledge the loss is lowest at the answer 0 for every class, not at the classes' shares",
            )
        ]
    return []


def _weighed(loss: Any, y: np.ndarray, units: int) -> list[Evidence]:
    """Weights of the classes, the loss of each at outputs of 0, that favour the commonest one, or leave the others nothing."""
    truth = y.argmax(-1) if y.ndim == 2 and y.shape[1] == units > 1 else y.reshape(len(y))
    labels, counts = np.unique(truth, return_counts=True)
    outputs = jnp.zeros((len(y), units) if y.ndim == 1 or units > 1 else y.shape, jnp.float32)
    with np.errstate(all="ignore"):
        even = np.asarray(loss(outputs, jnp.asarray(y)), np.float64).reshape(len(y), -1).mean(1)
    weights = np.array([even[truth == label].mean() for label in labels])
    if not np.isfinite(weights).all() or weights.min() < 0:
        return []
    common, rare = int(np.argmax(counts)), int(np.argmin(counts))
    if 3 * weights[rare] < weights[common] and counts[common] > 3 * counts[rare]:
        times = weights[common] / max(weights[rare], 1e-30)
        text = f"an example of the commonest class weighs {times:.3g} times as much as one of the rarest (healthy: at most as much)"
        return [Evidence("loss", text)]
    whole = weights * counts
    top = int(np.argmax(whole))
    others = np.delete(weights, top)
    if whole[top] > HEAVY * (whole.sum() - whole[top]) and weights[top] > 3 * others.max(initial=0) and others.size:
        times = whole[top] / max(whole.sum() - whole[top], 1e-30)
        text = f"all examples of class {labels[top]:g} weigh {times:.3g} times as much as the others (healthy up to {HEAVY:g})"
        return [Evidence("loss", text)]
    return []


def _on_outputs(case: Case, plan: Plan) -> bool:
    """Whether outputs are free numbers, to which anything may be added."""
    return case.value(plan, "head") in (None, "identity")


def attention(found: Start) -> str:
    largest, entropy = found.attention or (0.0, 0.0)
    return (
        f"attention logits reach {largest:.3g} (healthy up to {LOGITS:g}); the lowest mean entropy of a head is "
        f"{entropy:.2g} nats"
    )
