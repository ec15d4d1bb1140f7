"""The page of a diagnosis: one file with its figures inside, which needs no network."""

import html
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from fnn import files
from fnn.gradients.drawing import COLOURS, MARKERS

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --soft: #666; --line: #ddd; --box: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e8e8e8; --soft: #a0a0a0; --line: #3a3d42; --box: #22252a; }
  figure svg { background: #fff; border-radius: 6px; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1.5rem; background: var(--paper);
  color: var(--ink); }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
pre { background: var(--box); padding: .7rem 1rem; white-space: pre-wrap; border-radius: 6px; }
.text { white-space: pre; overflow-x: auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
td { border-top: 1px solid var(--line); } figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; max-width: 36rem; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
button { font: inherit; font-size: .85rem; padding: .15rem .7rem; }
"""
WIDTH = 5.4
"""Inches of a figure: small, so that its letters can still be read where a phone shrinks it to 340 pixels."""
COPY = "navigator.clipboard.writeText(this.previousElementSibling.textContent); this.textContent = 'copied'"


def write(diagnosis: Any, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    files.write(Path(path), text(diagnosis).encode(), "diagnose", "choose another file")


def text(d: Any) -> str:
    """Give the page as HTML."""
    lines = d._lines()
    title = lines[0]
    if d.causes:
        title = (
            f"Does not train: {d.causes[0].meaning}"
            if not d.two_faults
            else f"Two faults: {'; '.join(c.meaning for c in d.causes[:2])}"
        )
    elif d.healthy:
        title = "Healthy: nothing that was tried makes it better"
    else:
        title = "No cause was found" if d.ill else f"Undecided: {d.doubt or 'too little was tried'}"
    parts = [f"<h1>{_escape(title)}</h1>", f"<p>{_escape(lines[0])}</p>"]
    if d.learnable:
        parts.append(f"<p>{_escape(d.learnable)}</p>")
    for cause in d.causes[: 2 if d.two_faults else 1]:
        measured = "; ".join(e.text for e in cause.evidence) or "nothing abnormal, but the repair works"
        parts.append(f"<h2>{_escape(cause.name)}: {_escape(cause.meaning)}</h2><p>Measured: {_escape(measured)}.</p>")
        parts.append(f'<pre>{_escape(cause.remedy)}</pre><button onclick="{COPY}">copy the remedy</button>')
    captions = [
        (forest(d), f"{d.score[:1].upper()}{d.score[1:]} of each trained change. A dot is a seed; open dots are fresh seeds on data that did not "
         "choose the repair. Grey: the training as it is. Dashed: chance."),
        (losses(d), "Loss of each step's batch, median over seeds; the band goes from the lowest to the highest seed."),
        (profile(d), "Error signal |dL/dh| of each layer before the first step (first seed)"
         + ("; dashed: mean-field theory at this depth and width, through the last hidden layer; shaded: where 19 of 20 seeds lie." if any(p.theory.size for p in d.profiles.values()) else ".")),
    ]  # fmt: skip
    parts += [
        f"<figure>{svg(figure)}<figcaption>{_escape(c)}</figcaption></figure>" for figure, c in captions if figure
    ]
    rows = "".join(f"<tr><td>{_escape(e.cause)}</td><td>{_escape(e.text)}</td></tr>" for e in d.evidence)
    if rows:
        parts.append(f"<h2>All that was measured to be abnormal</h2><table>{rows}</table><p class=soft>Not each is a cause: "
                     "a cause is the earliest one whose repair works.</p>")  # fmt: skip
    left = "".join(f"<tr><td>{_escape(name)}</td><td>{_escape(why)}</td></tr>" for name, why in d.not_tried.items())
    if left:
        parts.append(f"<h2>Not tried</h2><table>{left}</table>")
    parts.append(f"<h2>As text</h2><pre class=text>{_escape(repr(d))}</pre>")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{_escape(title)}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def forest(d: Any) -> Any:
    """Draw a row for each change, best at the top, with a dot for each seed."""
    from matplotlib.figure import Figure

    trials = sorted(d.trials, key=lambda t: t.mean)
    rows = [d.base, *trials]
    figure = Figure(figsize=(WIDTH, 1.0 + 0.22 * len(rows)), layout="constrained")
    axis = figure.subplots()
    named = {cause.repair.change for cause in d.causes[: 2 if d.two_faults else 1] if cause.repair}
    for y, trial in enumerate(rows):
        colour = "0.45" if trial is d.base else COLOURS[0] if trial.change in named else COLOURS[3]
        axis.plot(trial.scores, [y] * len(trial.scores), MARKERS[0], color=colour, markersize=5, alpha=0.8)
        axis.plot(
            trial.checked, [y] * len(trial.checked), MARKERS[0], color=colour, markersize=7, markerfacecolor="none"
        )
    low, high = min(d.base.scores), max(d.base.scores)
    axis.axvspan(low - 0.002, high + 0.002, color="0.85", zorder=0)
    axis.axvline(d.chance, color="0.3", linestyle="--", linewidth=1)
    axis.set_yticks(
        range(len(rows)),
        [("as it is" if t is d.base else t.change) + (" ◀" if t.change in named else "") for t in rows],
    )
    axis.set_xlabel(d.score + (" on held-out data" if d.held_out else " on the training data"))
    axis.set_xlim(min(-0.02, *(s for t in rows for s in t.scores)) - 0.02, 1.03)
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def losses(d: Any) -> Any:
    """Draw the loss of the training as it is, and of the repaired one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axis = figure.subplots()
    drawn = False
    for (name, curves), colour, style in zip(d.curves.items(), ("0.35", COLOURS[0]), ("-", "-"), strict=False):
        curves = np.where(np.isfinite(curves), curves, np.nan)
        if np.isnan(curves).all():
            continue
        width = max(1, curves.shape[1] // 100)  # means of neighbours, or the batches' noise hides the course
        n = curves.shape[1] // width * width
        with np.errstate(all="ignore"):
            smooth = curves[:, :n].reshape(len(curves), -1, width).mean(2)
            middle = np.nanmedian(smooth, axis=0) if np.isfinite(smooth).any() else smooth[0]
        steps = width * (np.arange(smooth.shape[1]) + 0.5)
        axis.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.plot(steps, middle, style, color=colour, label=name)
        drawn = True
    if not drawn:
        return None
    positive = all(
        np.nanmin(np.where(np.isfinite(c), c, np.nan)) > 0 for c in d.curves.values() if np.isfinite(c).any()
    )
    if positive:
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def profile(d: Any) -> Any:
    """Draw log10 of the error signal against the layer, as it is and repaired, with theory dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if all(len(p.log10_error) < 3 or not np.isfinite(p.log10_error).any() for p in d.profiles.values()):
        return None
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axis = figure.subplots()
    for i, (name, p) in enumerate(d.profiles.items()):
        layers, colour = np.arange(1, len(p.log10_error) + 1), ("0.35", COLOURS[0])[i]
        axis.plot(layers, p.log10_error, marker=MARKERS[i], markersize=4, color=colour, label=name)
        if p.theory.size:
            typical, low, high = p.theory
            axis.plot(layers[: len(typical)], typical, "--", color=colour, linewidth=1)
            axis.fill_between(layers[: len(typical)], low, high, color=colour, alpha=0.15, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer (1 is next to the input)")
    axis.set_ylabel(r"$\log_{10}$ |dL/dh|")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def svg(figure: Any) -> str:
    """Give a figure as SVG to put into a page."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    found = target.getvalue()[target.getvalue().index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)


def _escape(text: str) -> str:
    return html.escape(str(text))
