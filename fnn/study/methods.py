"""What a paper says of how a study was done, and how to do it again."""

import math
from collections.abc import Mapping
from typing import Any

from fnn import files
from fnn.study import results, verdict, words
from fnn.study.provenance import variables
from fnn.study.summary import Summary

COMMAND = "command.txt"
"""File in a study's folder: the command line that made it."""
OWN = "fnn.study.cell.mlp"
CLIPS = {
    "value": "each entry clipped to ± {}",
    "global_norm": "gradients clipped to a global norm of {}",
    "block_norm": "gradients clipped to a norm of {} in each layer",
    "adaptive": "gradients clipped adaptively at {}",
    "from_above": "gradients clipped from above at {}",
}
NAMES = {
    "sgd": "SGD",
    "momentum": "SGD with momentum",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "lamb": "LAMB",
}


def facts(study: results.Results, s: Summary) -> list[str]:
    """Say in a few sentences what was measured, how much of it is finished, and where."""
    cells = len(study.description["cells"])
    done = "All" if len(study.finished) == cells else f"{len(study.finished)} of"
    if cells == 1:
        done, finished = "The only", "cell is finished"
    else:
        done, finished = f"{done} {cells}", "cells are finished"
    sentences = [f"{words.count(s.networks.height, 'network')}, {_seeds(s)} each. {done} {finished}."]
    sentences += [f"Left out: {why.removeprefix('study: ')}." for why in study.left_out.values()]
    if s.fixed:
        sentences.append(f"The same for all: {_fixed(s)}.")
    if where := _where(study):
        sentences.append(f"Measured on {where}.")
    return sentences


def sentence(study: results.Results, s: Summary) -> str:
    """Write the paragraph for a paper's methods."""
    ours = str(study.description.get("build", "")).startswith(OWN)
    kind = "multilayer perceptrons" if ours else "networks"
    varied = words.listed([f"{words.axis(n)} ({', '.join(_values(s, n))})" for n in s.axes], 20)
    parts = [
        f"We measured {s.networks.height} {kind}"
        + (f" that differ in {varied}" if varied else "")
        + f", {_seeds(s)} each."
    ]
    whole = {name: s.fixed.get(name) for name in ("init", "sigma_w", "sigma_b", "optimizer", "clip", "clip_threshold")}
    if ours and whole["init"] == "scaled":
        width = f"σ_w = {whole['sigma_w']:g}" if whole["sigma_w"] is not None else "σ_w as said"
        bias = f"σ_b = {whole['sigma_b']:g}" if whole["sigma_b"] is not None else "σ_b as said"
        parts.append(f"Weights were drawn from N(0, σ_w²/fan_in) and biases from N(0, σ_b²), {width}, {bias}.")
    steps = int(study.description["steps"][-1])
    if steps:
        parts.append(_training(s, whole, steps))
    if rest := _fixed(s, {"init", "sigma_w", "sigma_b", "optimizer", "clip", "clip_threshold", "learning_rate"}):
        parts.append(f"The same for all: {rest}.")
    data = study.description.get("data")
    if isinstance(data, list) and len(data) > 2:
        named = f" ({chosen})" if (chosen := _session(study).get("data")) else ""
        parts.append(f"Data{named}: {data[0]} for training, {data[1]} held out.")
    parts.append(
        "Gradients were measured in train mode on the first batch of the training data. The error signal |dL/dh| is the root "
        "mean square over examples of the gradient's norm with respect to a layer's pre-activations; its growth is the change "
        "of log10 |dL/dh| per layer from the last hidden layer to the first. Numbers are medians over seeds, with the 10th to "
        "90th percentile."
    )
    if s.networks["outside"].is_not_null().any():
        norms = s.networks["norm"].to_list() if "norm" in s.axes else [s.fixed.get("norm")]
        more = "; with batch norm Yang et al. 2019" if "batch_norm" in norms else ""
        parts.append(
            "Predictions hold at the width of each network: random networks are drawn for the same inputs and targets without "
            "their weight matrices (of very wide ones: expanded to order 1/width); for infinite width they are those of "
            f"mean-field theory (Schoenholz et al. 2017{more}). The band holds 19 of 20 seeds."
        )
    if where := _where(study):
        parts.append(f"Computed with {where}.")
    return " ".join(parts)


def again(study: results.Results) -> str:
    """Give the command that measures a study again, or what is known of a study that was run from Python."""
    try:
        text = (study.folder / COMMAND).read_text(errors="replace").strip() if study.folder else ""
    except OSError:
        text = ""
    if text:
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    built = str(study.description.get("build", "a function of your own")).rpartition(" ")[0]
    return (
        f"# Run from Python, fnn.Study(grid, build={built}). Every network, seed and step is in\n"
        f"fnn.results.read({str(study.folder)!r}).description"
    )


def load(study: results.Results) -> str:
    """Give the line of Python that loads the table."""
    return f"import fnn; table = fnn.results.read({str(study.folder)!r}).table()"


def remember(folder: Any, command: str) -> None:
    """Write the command that made a study into its folder."""
    files.write(folder / COMMAND, (command + "\n").encode(), "study")


def chance(study: results.Results) -> float | None:
    """Give the accuracy of always guessing the commonest held-out label; None where it was not recorded."""
    found = _session(study).get("chance")
    return float(found) if isinstance(found, int | float) and 0 < found < 1 else None


def _session(study: results.Results) -> Mapping[str, Any]:
    return study.sessions[-1] if study.sessions and isinstance(study.sessions[-1], dict) else {}


def _where(study: results.Results) -> str:
    last = _session(study)
    versions, devices = last.get("versions"), last.get("devices")  # a file that anybody may have written
    versions = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions
    devices = devices if isinstance(devices, list) else [devices] if devices else []
    devices = ", ".join(dict.fromkeys(" ".join(dict.fromkeys(str(d).split(" "))) for d in devices))
    commit = f"commit {last['commit']:.12}" if isinstance(last.get("commit"), str) else ""
    return "; ".join(str(part) for part in (devices, variables(last), versions, commit) if part)


def _seeds(s: Summary) -> str:
    seeds: Any = s.networks["seeds"]
    least, most = seeds.min(), seeds.max()
    return words.count(int(most), "seed") if least == most else f"{least} to {most} seeds"


def _fixed(s: Summary, without: Any = ()) -> str:
    return ", ".join(verdict.label(name, value) for name, value in s.fixed.items() if name not in without)


def _values(s: Summary, name: str) -> list[str]:
    values = s.networks[name].unique(maintain_order=True).to_list()
    return [words.value(value) for value in (sorted(values) if s.networks[name].dtype.is_numeric() else values)]


def _training(s: Summary, whole: Mapping[str, Any], steps: int) -> str:
    optimizer = whole["optimizer"]
    name = NAMES.get(optimizer, "the optimiser") if isinstance(optimizer, str) else "the optimisers named above"
    rate = s.fixed.get("learning_rate")
    rate = f", learning rate {words.value(rate)}" if isinstance(rate, int | float) and math.isfinite(rate) else ""
    clip = CLIPS.get(whole["clip"], "") if isinstance(whole["clip"], str) else ""
    clip = (
        f", {clip.format(words.value(whole['clip_threshold']))}" if clip and whole["clip_threshold"] is not None else ""
    )
    return f"They were trained for {words.count(steps, 'step')} with {name}{rate}{clip}."
