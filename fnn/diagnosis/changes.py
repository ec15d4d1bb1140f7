"""The changes that a diagnosis tries: each names the cause that it repairs, and the code that does so."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax

from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.data_changes import finite, matched, renumbered, standard_targets, standardized, tamed, unit_targets
from fnn.diagnosis.data_symptoms import input_symptoms, outlying

KNOBS = ("activation", "norm", "residual", "depth", "width", "head")
"""Arguments of `build` that are varied. `dropout`, `cell`, `forget_bias` and `positions` are, where there are any."""
REMEMBERS = 3.0
"""A forget gate's bias with which it keeps 0.95 of its memory from one position to the next."""
ENOUGH = 32
"""A net that is tried with more units has at least so many."""


@dataclass(frozen=True)
class Change:
    """One thing changed."""

    name: str
    """As the report says it: "standardise x"."""
    causes: tuple[str, ...]
    """What it repairs."""
    apply: Callable[[Plan], Plan]
    code: str
    """What to write to do it for good."""
    own_program: bool = False
    """Whether the net, the loss, the optimiser or a shape differs, so that a program must be compiled."""
    costs: float = 1.0
    """How many times a step's work it takes, about."""
    on_suspicion: bool = False
    """Whether it is tried only if something that it repairs was measured."""


def changes(case: Case) -> list[Change]:
    """List what can be tried on a case, cheap ones first."""
    found = [*_of_data(case), *_of_weights(case), *_of_rate(case), *_of_net(case), *_of_loss(case), *_of_budget(case)]
    return sorted(found, key=lambda change: (change.own_program, change.costs))


def unreached(case: Case) -> dict[str, str]:
    """List what cannot be varied of a case, and why."""
    found = {}
    if case.task.name:
        found["width, depth, norm, dropout, another loss"] = "inside the loss"
    elif not case.knobs:
        found["width, depth, norm, dropout"] = "the net is given as it is"
    elif missing := [knob for knob in KNOBS if knob not in case.knobs]:
        found[", ".join(missing)] = "build does not take it" if len(missing) == 1 else "build does not take them"
    if not case.knobs and "activation" not in case.seen:
        found["activation"] = "none was found in the program"
    if case.clip is None and case.fixed:
        found["no clipping"] = "the optimizer is no function of clip"
    return found


def _data(*steps: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, data=(*plan.data, *steps))


def _with(**values: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, **values)


def _of_data(case: Case) -> list[Change]:
    found = []
    if case.x is not None:
        code = "train, test = fnn.data.standardize(train, test)"
        found.append(Change("standardise x", ("input_scale",), _data(standardized), code))
        x = np.asarray(case.x, np.float64).reshape(len(case.x), -1)
        if np.isfinite(x).all() and (far := outlying(x, x)).any():
            name, steps, code = "replace far-out x by medians", (tamed,), _without_codes(x, far)
            if input_symptoms(tamed(case)):  # what they have squashed, when all were standardised together
                name, steps = f"{name}, standardise", (tamed, standardized)
                code += "\ntrain, test = fnn.data.standardize(train, test)"
            found.append(Change(name, ("input_scale",), _data(*steps), code))
        if not all(np.isfinite(np.asarray(part.x)).all() for part in (case.train, case.chooses, case.checks)):
            found.append(
                Change(
                    "leave out examples with NaN",
                    ("numerics", "split_mismatch"),
                    _data(finite),
                    "keep = np.isfinite(x).all(-1); x, y = x[keep], y[keep]",
                )
            )
        if case.held_out:
            found.append(
                Change("scale held-out x like training x", ("split_mismatch",), _data(matched),
                       "# prepare x_test as x_train was; here: x_test = (x_test - x_test.mean(0)) / x_test.std(0) * x_train.std(0) + x_train.mean(0)")
            )  # fmt: skip
    if case.task.kind == "regression":
        code = "y = (y - y_train.mean(0)) / y_train.std(0)"
        found.append(Change("standardise y", ("target_scale",), _data(standard_targets), code))
    if case.task.target == "linear" and (case.y.min() < 0 or case.y.max() > 1):
        found.append(
            Change(
                "targets from 0 to 1",
                ("label_encoding",),
                _data(unit_targets),
                f"y = (y - {case.y.min():g}) / {np.ptp(case.y):g}  # 0 to 1, as the loss reads them; in the score too",
                on_suspicion=True,
            )
        )
    if case.task.kind in ("classes", "binary"):
        values = np.unique(case.y)
        if not np.array_equal(values, np.arange(len(values))):
            found.append(
                Change(
                    "renumber labels",
                    ("label_encoding",),
                    _data(renumbered),
                    "y = np.searchsorted(np.unique(y_train), y)",
                )
            )
    if case.held_out:
        found.append(
            Change("learn half of the held-out data alone", ("labels", "label_encoding", "split_mismatch"), _with(learn="held out"),
                   "# look at single examples: training labels are wrong, or the two parts were not prepared alike")
        )  # fmt: skip
        found.append(
            Change(
                "learn half of the held-out data as well",
                ("too_little_data",),
                _with(learn="both"),
                "# collect more training examples, or augment them",
            )
        )
    if not case.shuffle:
        found.append(
            Change(
                "shuffle",
                ("order",),
                _with(shuffle=True),
                "fnn.fit(..., key=key)  # shuffles each epoch; or shuffle before batching",
            )
        )
    return found


def _without_codes(x: np.ndarray, far: np.ndarray) -> str:
    """Write what takes the marked numbers out: by one bound, where the nearest of them is farther than all others."""
    away = np.abs(x - np.median(x, axis=0))
    nearest, others = float(away[far].min()), float(away[~far].max())
    if nearest <= others:
        return (
            "# some numbers, far from all others of their feature, are codes or errors: put the feature's median there"
        )
    bound = (nearest * max(others, nearest / 100)) ** 0.5
    return f"median = np.median(x_train, axis=0); x = np.where(np.abs(x - median) > {bound:.3g}, median, x)"


def _of_weights(case: Case) -> list[Change]:
    causes = ("init_symmetric", "dead_units", "init_small", "init_large")
    causes += ("memory",) * ("cell" in case.knobs)  # the biases of its gates
    gain = case.gain(Plan())
    code = _initialised(gain)
    wide = Change(
        "parameters in float32", ("numerics",), _with(wide=True), "params in float32, compute_dtype=jnp.bfloat16", True
    )
    all_wide = Change(
        "compute in float32",
        ("numerics",),
        _with(wide=True, float32=True),
        f"# parameters, inputs and all between them in float32, no {case.computes}",
        True,
    )
    found = [Change("redraw weights", causes, _with(gain=gain), code), *([wide] if case.narrow else [])]
    if not case.knobs and case.kernels > 2:  # whether there are residual sums cannot be seen from outside
        small = case.gain(Plan(), case.kernels)
        name = "redraw weights, small enough for residual sums"
        found.append(Change(name, ("init_large",), _with(gain=small), _initialised(small)))
    if case.gated and "forget_bias" not in case.knobs:
        steps = np.shape(jax.tree.leaves(case.train.x)[0])[1:2]
        bias = float(np.round(max(REMEMBERS, np.log(max(1, *steps))), 1))
        code = f"forget_bias={bias}  # the initial bias of the gate that keeps: f of an LSTM, z of a GRU"
        found.append(Change(f"gates that keep, bias {bias}", ("memory",), _with(keep=bias), code))
    return [*found, *([all_wide] if case.computes else [])]


def _initialised(gain: float) -> str:
    name = {2**0.5: "he_normal", 1.0: "scaled(1.0)"}.get(gain, f"scaled({gain:.2g})")
    return f'init="{name}", bias_init="zeros"  # N(0, {gain**2:.2g}/fan_in)'


def _of_rate(case: Case) -> list[Change]:
    found = []
    for factor in (0.1, 0.01, 0.3, 10.0, 100.0, 3.0, 1000.0):
        cause = ("lr_high",) if factor < 1 else ("lr_low",)
        code = f"learning_rate={case.rate * factor:.3g}" if case.rate is not None else f"learning_rate *= {factor:g}"
        found.append(
            Change(
                f"rate × {factor:g}", cause, lambda plan, factor=factor: replace(plan, rate=plan.rate * factor), code
            )
        )
    found.append(
        Change("clip at norm 1", ("lr_high",), _with(clip=1.0), "optax.chain(fnn.clip.by_global_norm(1.0), optimizer)")
    )
    found.append(
        Change(
            "warm-up over a fifth of the steps",
            ("lr_high",),
            _with(warm=0.2),
            f"optax.warmup_constant_schedule(0.0, {'rate' if case.rate is None else f'{case.rate:.3g}'}, {case.steps // 5})",
        )
    )
    if case.clip is not None:
        found.append(Change("no clipping", ("clip",), _with(unclipped=True), "clip=None", own_program=True))
    adam = Change(
        "Adam, rate 1e-3",
        ("optimizer", "regularization"),
        _with(optimizer=_adam),
        "optimizer = optax.adam(1e-3)  # its own β and ε, no weight decay",
        own_program=True,
    )
    return [*found, adam]


def _adam() -> optax.GradientTransformation:
    return optax.adam(1e-3)


def _of_net(case: Case) -> list[Change]:
    found = []

    def add(name, causes, code, costs=1.0, **knobs):
        found.append(Change(name, causes, lambda plan: plan.knob(**knobs), code, True, costs))

    knobs = case.knobs
    if not knobs:
        return _of_program(case)
    if isinstance(knobs.get("activation"), str) or callable(knobs.get("activation")):
        for name in ("tanh", "relu"):
            if knobs["activation"] != name:
                add(f"activation {name}", ("activation", "blocked_gradient"), f'activation="{name}"', activation=name)
    if isinstance(knobs.get("dropout"), int | float) and knobs["dropout"] > 0:
        add("no dropout", ("regularization",), "dropout=0.0", dropout=0.0)
    if "norm" in knobs:
        if knobs["norm"] in (None, "none"):
            add("layer norm", ("depth_norm",), 'norm="layer_norm"', 1.3, norm="layer_norm")
        else:
            add("no norm", ("depth_norm",), 'norm="none"', 0.9, norm="none")
    if knobs.get("residual") is False and knobs.get("depth", 2) > 1:
        add("residual sums", ("depth_norm",), "residual=True", residual=True)
    depth = knobs.get("depth")
    if isinstance(depth, int) and depth >= 6:
        add("depth 2", ("depth_norm",), "depth=2", 0.4, depth=2)
    if isinstance(knobs.get("width"), int):
        times = max(4, -(-ENOUGH // max(1, knobs["width"])))
        wide = times * knobs["width"]
        add(f"width × {times}", ("capacity",), f"width={wide}", 8.0, width=wide)
    if isinstance(depth, int) and depth <= 1:
        add("depth + 2", ("capacity",), f"depth={depth + 2}", 2.0, depth=depth + 2)
    if knobs.get("cell") in ("rnn", "gru"):
        add("cell lstm", ("memory",), 'cell="lstm"', 4.0, cell="lstm")
    if isinstance(bias := knobs.get("forget_bias"), int | float) and bias < REMEMBERS:
        add(f"forget_bias {REMEMBERS:g}", ("memory",), f"forget_bias={REMEMBERS}", forget_bias=REMEMBERS)
    if "positions" in knobs and knobs["positions"] in (None, False, "none"):
        value = "rotary" if knobs["positions"] is not False else True
        add("positions", ("positions",), f"positions={value!r}", positions=value)
    head = knobs.get("head")
    if head is not None and head != "identity":
        add("no head", ("head", "blocked_gradient"), 'head="identity"', head="identity")
        if (loss := case.task.loss) is not None and loss is not case.loss:
            name = getattr(loss, "name", "cross_entropy")
            found.append(
                Change(f"no head, and {name} on its logits", ("head", "blocked_gradient"), lambda plan: replace(plan.knob(head="identity"), loss=loss),
                       f'head="identity", loss=fnn.losses.{name}', True)
            )  # fmt: skip
    return found


def _of_program(case: Case) -> list[Change]:
    """Of a net without knobs: swap what was found in its program."""
    found = []

    def add(name, cause, code, role, by):
        swap = _swap(role, by)
        found.append(Change(name, (cause,), swap, code, True))

    if (name := case.seen.get("activation")) is not None:
        for other in ("tanh", "relu"):
            if name != other:
                add(f"activation {other}", "activation", f"jax.nn.{other}  # instead of {name}", "hidden", other)
    if (name := case.seen.get("head")) is not None:
        add("no head", "head", f"# leave out the {name} behind the last layer", "last", "identity")
        if name == "softmax" and case.task.kind == "multi_label":
            add(
                "head sigmoid",
                "head",
                "jax.nn.sigmoid  # instead of softmax: several labels may hold at once",
                "last",
                "sigmoid",
            )
    if case.task.name == "score":
        code = "# minimise -loss: as it is, the loss falls where the score does"
        found.append(Change("the loss with the other sign", ("loss",), _with(sign=-1.0), code, True, on_suspicion=True))
    if case.penalized:
        code = "# leave out the penalty, the term of the loss that depends on the parameters alone, or make it smaller"
        found.append(Change("no weight penalty", ("regularization",), _with(bare=True), code, True))
    if case.seen.get("stop"):
        add("no stop_gradient", "blocked_gradient", "# leave out jax.lax.stop_gradient", "stop", "identity")
    return found


def _swap(role: str, by: str) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, swap=(*plan.swap, (role, by)))


def _of_loss(case: Case) -> list[Change]:
    loss = case.task.loss
    if case.task.name:  # a loss of which no outputs are known
        return []
    if loss is None or loss is case.loss or (case.task.kind == "regression" and case.held_out is False):
        return []
    name = getattr(loss, "name", "one-hot cross-entropy")
    code = (
        f"loss = fnn.losses.{loss.name}"
        if hasattr(loss, "name")
        else "loss = lambda outputs, y: -(y * jax.nn.log_softmax(outputs)).sum(-1)"
    )
    return [Change(f"loss {name}", ("loss", "numerics", "blocked_gradient"), _with(loss=loss), code, True)]


def _of_budget(case: Case) -> list[Change]:
    found = []
    if case.batch_size < 32:
        found.append(
            Change(
                "batch × 8",
                ("batch_size",),
                _with(batch_size=min(8 * case.batch_size, case.train.size)),
                f"batch_size={8 * case.batch_size}",
                True,
                8.0,
            )
        )
    if case.batch_size > 128 or case.batch_size > case.train.size / 4:
        size = max(1, case.batch_size // 8)
        found.append(Change("batch ÷ 8", ("batch_size",), _with(batch_size=size), f"batch_size={size}", True, 0.3))
    found.append(Change("5 × steps", ("steps",), _with(steps=5 * case.steps), f"steps={5 * case.steps}", True, 5.0))
    return found
