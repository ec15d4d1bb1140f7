"""What the quantities and axes of a study are called where people read them, and the unit of each: log10 throughout."""

import re
from typing import Any, NamedTuple

SYMBOLS = {"sigma_w": "σ_w", "sigma_b": "σ_b", "lr": "learning rate"}
PLACES = {"preactivation": "before the activation", "activation": "after the activation", "sum": "of the residual sum"}


class Quantity(NamedTuple):
    """A quantity in words."""

    axis: str
    """Short, for an axis: `log10 |dL/dh|`"""
    about: str
    """What it is, as part of a sentence."""
    log: bool
    """Whether the numbers shown are decimal logs."""


_NORM = "Frobenius norm of the mean loss's gradient"
_SIGNAL = Quantity("log10 |dL/dh|", "error signal |dL/dh| (root mean square over examples)", True)
_KNOWN = {
    "log10_error": _SIGNAL,
    "log10_error_norm": Quantity("log10 norm of dL/dh", "error signal of the whole batch, norm", True),
    "log10_kernel": Quantity("log10 |dL/dW|", f"weight gradient |dL/dW| ({_NORM})", True),
    "log10_bias": Quantity("log10 |dL/db|", f"bias gradient |dL/db| ({_NORM})", True),
    "log10_gradient": Quantity("log10 |dL/dW|", f"gradient |dL/dW| ({_NORM})", True),
    "second_moment": Quantity("mean square", "mean square of the units", False),
    "mean": Quantity("mean", "mean of the units", False),
    "dead": Quantity("share of units", "units that are zero for the whole batch, as a share", False),
    "saturated": Quantity("share of values", "values within 1% of a bound of the activation, as a share", False),
    "peak": Quantity("largest value", "largest absolute value", False),
    "update_ratio": Quantity("|ΔW| / |W|", "next update over the weights, |ΔW| / |W|", False),
    "cosine": Quantity("cosine", "cosine between the gradient and that of the recorded step before", False),
    "loss": Quantity("loss", "mean loss on held-out examples", False),
    "accuracy": Quantity("accuracy", "accuracy on held-out examples", False),
    "train_loss": Quantity("loss", "loss of the step's batch", False),
    "train_accuracy": Quantity("accuracy", "accuracy on the step's batch", False),
    "grad_norm": Quantity("gradient norm", "norm of the whole gradient, before clipping", False),
    "clip_fraction": Quantity(
        "share clipped", "what was clipped of a step's gradient (of steps, entries, layers or rows), as a share", False
    ),
    "sharpness": Quantity("sharpness", "sharpness (largest eigenvalue of the Hessian)", False),
    "preconditioned_sharpness": Quantity("sharpness", "preconditioned sharpness (largest eigenvalue of P⁻¹H)", False),
    "lambda_c": Quantity(
        "λ_c", "critical sharpness λ_c (2 over the rate at which the next step stops lowering the loss)", False
    ),
    "hessian_trace": Quantity("tr H", "trace of the Hessian", False),
    "hessian_trace_error": Quantity("tr H", "trace of the Hessian, standard error of the estimate", False),
    "log10_singular_max": Quantity("log10 s", "largest singular value of d outputs/d inputs", True),
    "log10_singular_min": Quantity("log10 s", "smallest singular value of d outputs/d inputs", True),
    "log10_singular_rms": Quantity("log10 s", "singular values of d outputs/d inputs, root mean square", True),
    "log10_singular_fourth": Quantity(
        "log10 s", "singular values of d outputs/d inputs, fourth root of the mean of s⁴", True
    ),
    "ntk_condition": Quantity("condition number", "condition number of the tangent kernel on the batch", False),
    "clip_removed": Quantity("share of the norm", "what clipping removed of the gradient, as a share", False),
}
_KNOWN |= {  # parameters of the layers besides kernel and bias
    f"log10_{name.replace(' ', '_')}": Quantity(f"log10 |dL/d {name}|", f"gradient of {name} ({_NORM})", True)
    for name in ("scale", "embedding", "recurrent kernel", "recurrent bias")
}


def quantity(series: str) -> Quantity:
    """Say what a series of a summary is, `log10_kernel` or `second_moment at activation`; an unknown name is its own words."""
    name, _, place = series.partition(" at ")
    where = f" {PLACES.get(place, f'at {place}')}" if place and place != "kernel" and name != "log10_error" else ""
    plain = name.removesuffix("_rms")
    if name in _KNOWN:
        found = _KNOWN[name]
    elif plain in _KNOWN and plain != name:
        found = _KNOWN[plain]
        about = found.about.replace("Frobenius norm", "root mean square over entries")
        found = found._replace(axis=found.axis.replace("|dL/", "RMS of dL/").removesuffix("|"), about=about)
    elif name.startswith("log10_"):
        found = Quantity(f"log10 {_spaced(name[6:])}", _spaced(name[6:]), True)
    else:
        found = Quantity(_spaced(name), _spaced(name), False)
    return found._replace(about=found.about + where)


def axis(name: str) -> str:
    """Write the name of an axis: `learning rate`, `σ_w`."""
    return SYMBOLS.get(name) or (_spaced(name) if re.fullmatch("[a-z]+(_[a-z0-9]+)*", name) else name)


def value(value: Any) -> str:
    """Write the value of an axis: `batch norm`, `1e6`, `none`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return _spaced(value) if re.fullmatch("[a-z]+(_[a-z0-9]+)*", value) else value
    return re.sub(r"e([+-])0*(\d+)", lambda m: f"e{m[1].replace('+', '')}{m[2]}", f"{value:g}")


def listed(words: list[str], most: int = 5) -> str:
    """Join words as a sentence does: `a, b and c`; beyond `most`: `a, b and 7 more`."""
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def count(n: int, word: str) -> str:
    """Count in words: `1 network`, `3 networks`."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _spaced(name: str) -> str:
    return name.replace("_", " ")
