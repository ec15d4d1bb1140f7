"""The figure of a `Flow`, and the colours and markers of all figures."""

import os
from typing import Any

import numpy as np

from fnn import files

# Okabe and Ito's palette, distinct to the colour-blind; with markers, so that print in grey keeps the lines apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def profiles(flow: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw log10 of error signal and gradient against the layer, and below them the RMS of each layer's input and output.

    Returns the matplotlib figure, saved as well if given a path. What was not measured is left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    lines = {
        above: (
            ("log10_error", "error signal"),
            ("log10_error_norm", "error signal"),
            ("log10_gradient", "weight gradient"),
        ),
        below: (("input_second_moment", "input"), ("output_second_moment", "output")),
    }
    for axis, quantities in lines.items():
        for i, (quantity, label) in enumerate(quantities):
            layers, values = flow.weights(quantity)
            if len(layers):
                values = values if axis is above else 0.5 * np.log10(np.maximum(values, 1e-300))
                axis.plot(layers, values, color=COLOURS[i], marker=MARKERS[i], markersize=3, linewidth=1, label=label)
        if axis.lines:
            axis.legend(frameon=False)
        axis.grid(alpha=0.25, linewidth=0.5)
    above.set_ylabel(r"$\log_{10}$ norm")
    below.set_ylabel(r"$\log_{10}$ RMS")
    below.set_xlabel("layer (1 is next to the input)")
    if path is not None:
        files.save_figure(figure, path, 130)
    return figure
