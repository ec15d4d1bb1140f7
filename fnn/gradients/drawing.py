"""The figure of a `Flow`, and the colours and markers of all figures."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct to the colour-blind; with markers, so that print in grey keeps the lines apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


LINES = {
    r"$\log_{10}$ norm": {
        "log10_error": "error signal, RMS over examples",
        "log10_error_norm": "error signal",
        "log10_gradient": "weight gradient",
    },
    r"$\log_{10}$ RMS": {"input_second_moment": "input", "output_second_moment": "output"},
}


def profiles(flow: Any, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw log10 of error signal and gradient against the layer, and below them the RMS of each layer's input and output.

    Returns the matplotlib figure, saved as well if given a path. What was not measured is left out. What is zero or not
    finite has no point: the legend says of how many layers. Errors: ValueError where nothing of all this was measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = {name: {q: flow.weights(q) for q in quantities} for name, quantities in LINES.items()}
    found = {name: part for name, part in found.items() if any(len(layers) for layers, _ in part.values())}
    if not found:
        raise ValueError(
            "flow.plot: it draws error signals, gradients and second moments of layers, got a flow without any; measure "
            "groups 'gradient', 'error' or 'activation'"
        )
    figure = Figure(figsize=(6.0, 1.0 + 2.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, part) in zip(axes, found.items(), strict=True):
        for label, (layers, values) in ((LINES[name][q], pair) for q, pair in part.items() if len(pair[0])):
            with np.errstate(divide="ignore", invalid="ignore"):
                values = values if "norm" in name else 0.5 * np.log10(values)
            zero, odd = np.sum(values == -np.inf), np.sum(np.isnan(values) | (values == np.inf))
            label += f" (0 in {zero} of {len(values)} layers)" if zero else ""
            label += f" (not finite in {odd} of {len(values)} layers)" if odd else ""
            i, few = len(axis.lines), len(layers) <= 60
            style = {
                "color": COLOURS[i],
                "marker": MARKERS[i] if few else "",
                "linestyle": "-" if few or not i else "-.",
            }
            axis.plot(layers, np.where(np.isfinite(values), values, np.nan), label=label, markersize=3, lw=1.2, **style)
        axis.legend(frameon=False, fontsize="small")
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.set_ylabel(name)
        if not any(np.isfinite(line.get_ydata()).any() for line in axis.lines):
            axis.set_yticks([])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max(layers.max() for part in found.values() for layers, _ in part.values() if len(layers))
    axes[-1].set_xlim(1 - 0.04 * last, last + 0.04 * last)
    axes[-1].set_xlabel("layer (1 is next to the input)")
    if path is not None:
        files.save_figure(figure, path, 130)
    return figure
