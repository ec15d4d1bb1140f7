"""The changes that a diagnosis tries: each names the cause that it repairs, and the code that does so."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from fnn.diagnosis.case import Case, Plan
from fnn.diagnosis.change import Change, setting
from fnn.diagnosis.data_changes import of_data
from fnn.diagnosis.response import BOUNDLESS, USUAL, Response

KNOBS = ("activation", "norm", "residual", "depth", "width", "head")
"""Arguments of `build` that are varied. `dropout`, `cell`, `forget_bias` and `positions` are, where there are any."""
REMEMBERS = 3.0
"""A forget gate's bias with which it keeps 0.95 of its memory from one position to the next."""
LONGER = (5, 25)
"""How many times as many steps are tried; the second one where the first is not enough, and there is time."""
ENOUGH = 32
"""A net that is tried with more units has at least so many."""


def changes(case: Case, response: Response = BOUNDLESS) -> list[Change]:
    """List what can be tried on a case whose optimiser answers so to the size of gradients, cheap ones first."""
    found = [*of_data(case), *_of_weights(case), *_of_rate(case), *_of_optimizer(case, response)]
    found += [*_of_net(case), *_of_loss(case), *_of_budget(case)]
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
    if not case.knobs and not {"activation", "bare"} & set(case.seen):
        found["activation"] = "none was found in the program"
    return found


def _of_weights(case: Case) -> list[Change]:
    causes = ("init_symmetric", "dead_units", "init_small", "init_large")
    causes += ("memory",) * ("cell" in case.knobs or "recurrent" in case.seen)  # the biases of its gates, or its kernel
    gain = case.gain(Plan())
    code = _initialised(case, gain)
    wide = Change(
        "parameters in float32",
        ("numerics",),
        setting(wide=True),
        "params in float32, compute_dtype=jnp.bfloat16",
        True,
    )
    all_wide = Change(
        "compute in float32",
        ("numerics",),
        setting(wide=True, float32=True),
        f"# parameters, inputs and all between them in float32, no {case.computes}",
        True,
    )
    found = [Change("redraw weights", causes, setting(gain=gain), code), *([wide] if case.narrow else [])]
    if not case.knobs and case.kernels > 2:  # whether there are residual sums cannot be seen from outside
        small = case.gain(Plan(), case.kernels)
        name = "redraw weights, small enough for residual sums"
        found.append(Change(name, ("init_large",), setting(gain=small), _initialised(case, small)))
    if case.gated and "forget_bias" not in case.knobs:
        steps = np.shape(jax.tree.leaves(case.train.x)[0])[1:2]
        bias = float(np.round(max(REMEMBERS, np.log(max(1, *steps))), 1))
        code = f"forget_bias={bias}  # the initial bias of the gate that keeps: f of an LSTM, z of a GRU"
        found.append(Change(f"gates that keep, bias {bias}", ("memory",), setting(keep=bias), code))
    return [*found, *([all_wide] if case.computes else [])]


def _initialised(case: Case, gain: float) -> str:
    if case.task.name:  # a model of another library
        orthogonal = "jax.nn.initializers.orthogonal()  # for recurrent kernels\n" * ("recurrent" in case.seen)
        drawn = f'jax.nn.initializers.variance_scaling({gain**2:.2g}, "fan_in", "normal")'
        return f"{orthogonal}{drawn}  # for each {'other ' * bool(orthogonal)}kernel; biases 0"
    name = {2**0.5: "he_normal", 1.0: "scaled(1.0)"}.get(gain, f"scaled({gain:.2g})")
    return f'init="{name}", bias_init="zeros"  # N(0, {gain**2:.2g}/fan_in)'


def _of_rate(case: Case) -> list[Change]:
    found = []
    for factor in (0.1, 0.01, 0.3, 10.0, 100.0, 3.0, 1000.0, 10000.0):
        cause = ("lr_high",) if factor < 1 else ("lr_low",)
        code = f"learning_rate={case.rate * factor:.3g}" if case.rate is not None else f"learning_rate *= {factor:g}"
        found.append(
            Change(
                f"rate × {factor:g}", cause, lambda plan, factor=factor: replace(plan, rate=plan.rate * factor), code
            )
        )
    found.append(
        Change(
            "clip at norm 1", ("lr_high",), setting(clip=1.0), "optax.chain(fnn.clip.by_global_norm(1.0), optimizer)"
        )
    )
    found.append(
        Change(
            "warm-up over a fifth of the steps",
            ("lr_high",),
            setting(warm=0.2),
            f"optax.warmup_constant_schedule(0.0, {'rate' if case.rate is None else f'{case.rate:.3g}'}, {case.steps // 5})",
        )
    )
    return found


def _of_optimizer(case: Case, response: Response) -> list[Change]:
    found = []
    if case.clip is not None:
        found.append(Change("no clipping", ("clip",), setting(unclipped=True), "clip=None", own_program=True))
    elif response.limit < math.inf:
        given = setting(gradients=response.unclipped)
        kind = "entries of size" if response.entries else "norm"
        code = f"# leave out the clip, at {kind} {response.limit:.2g}, or clip at what a gradient has in a good run"
        found.append(Change("no clipping", ("clip",), given, code, on_suspicion=True))
    if response.eps > USUAL:
        code = f"eps=1e-8  # of the optimiser; now it acts as if it were {response.eps:.1g}"
        given = setting(gradients=response.sensitive)
        found.append(Change("ε of 1e-8", ("optimizer",), given, code, on_suspicion=True))
    if response.uphill:
        for factor in (-1.0, -1e-3):
            code = f"optax.chain(optimizer, optax.scale({factor:g}))  # its steps go along the gradient, up the loss"
            given = setting(rate=factor)
            found.append(Change(f"steps × {factor:g}", ("optimizer",), given, code, on_suspicion=True))
    if response.ends is not None and response.counts:
        code = f"decay_steps={case.steps}  # not {response.ends}: a schedule counts steps, not epochs"
        given = setting(pace=response.ends / case.steps)
        found.append(Change("a schedule over all steps", ("lr_low",), given, code, own_program=True, on_suspicion=True))
    adam = Change(
        "Adam, rate 1e-3",
        ("optimizer", "regularization"),
        setting(optimizer=_adam),
        "optimizer = optax.adam(1e-3)  # its own β and ε, no weight decay",
        own_program=True,
    )
    return [*found, adam]


def _adam() -> optax.GradientTransformation:
    return optax.adam(1e-3)


def _of_net(case: Case) -> list[Change]:
    found = []
    if case.noisy and "dropout" not in case.knobs:
        code = "# less noise in training, or none: dropout, noise that is added"
        found.append(
            Change("no noise in training", ("regularization",), setting(quiet=True), code, True, on_suspicion=True)
        )

    def add(name, causes, code, costs=1.0, **knobs):
        found.append(Change(name, causes, lambda plan: plan.knob(**knobs), code, True, costs))

    knobs = case.knobs
    if not knobs:
        return [*found, *_of_program(case)]
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
            name = "none" if _builds(case, norm="none") else None
            add("no norm", ("depth_norm",), f"norm={name!r}", 0.9, norm=name)
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


def _builds(case: Case, **knobs: Any) -> bool:
    with contextlib.suppress(ValueError):
        return bool(case.built(Plan().knob(**knobs)))
    return False


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
    elif "bare" in case.seen:
        for other in ("tanh", "relu"):
            add(
                f"{other} between layers",
                "activation",
                f"jax.nn.{other}  # between each layer and the next",
                "bare",
                other,
            )
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
    if case.penalized:
        code = "# leave out the penalty, the term of the loss that depends on the parameters alone, or make it smaller"
        found.append(Change("no weight penalty", ("regularization",), setting(bare=True), code, True))
    for which in case.terms:
        code = f"# term {which + 1} of the loss outweighs the others: leave it out, or make it smaller"
        name = f"the loss without its term {which + 1}"
        found.append(Change(name, ("regularization",), setting(without=which), code, True))
    if case.seen.get("stop"):
        add("no stop_gradient", "blocked_gradient", "# leave out jax.lax.stop_gradient", "stop", "identity")
    return found


def _swap(role: str, by: str) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, swap=(*plan.swap, (role, by)))


def _of_loss(case: Case) -> list[Change]:
    loss = case.task.loss
    if case.task.users:
        code = "# minimise -loss: as it is, the loss falls where the score does"
        return [Change("the loss with the other sign", ("loss",), setting(sign=-1.0), code, True, on_suspicion=True)]
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
    return [Change(f"loss {name}", ("loss", "numerics", "blocked_gradient"), setting(loss=loss), code, True)]


def _of_budget(case: Case) -> list[Change]:
    found = []
    if case.batch_size < 32:
        found.append(
            Change(
                "batch × 8",
                ("batch_size",),
                setting(batch_size=min(8 * case.batch_size, case.train.size)),
                f"batch_size={8 * case.batch_size}",
                True,
                8.0,
            )
        )
    if case.batch_size > 128 or case.batch_size > case.train.size / 4:
        size = max(1, case.batch_size // 8)
        found.append(Change("batch ÷ 8", ("batch_size",), setting(batch_size=size), f"batch_size={size}", True, 0.3))
    for times in LONGER:
        code = f"steps={times * case.steps}"
        given = setting(steps=times * case.steps)
        found.append(Change(f"{times} × steps", ("steps",), given, code, True, float(times)))
    return found
