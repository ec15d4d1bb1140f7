"""Figures, by matplotlib; each function returns the figure, or writes it if given a path."""

import os
from typing import Any

import numpy as np

from fnn import files
from fnn.gradients.flow import GradientFlow
from fnn.layers.taps import PREACTIVATION
from fnn.theory.meanfield import Prediction

# Okabe and Ito's palette, distinct to the colour-blind; with markers, so that print in grey keeps the lines apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LABEL = r"$\log_{10}\,|\partial L/\partial h_l|$"


def flow(measured: GradientFlow, *, theory: Any = None, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw log10 of the error signal and of the weight gradients against the layer; `theory` is dashed.

    `theory` is a `meanfield.Prediction` for layers 1..n of the net, n its depth; it speaks of the error signal at a
    layer's pre-activation, so taps belong right behind the weights. It says how the signal changes from layer to layer, so
    it is laid through the measured one at the last of its layers that has a tap. Errors: TypeError for anything else,
    ValueError where the net has fewer than n layers, or none of the n has a tap.
    """
    figure, axes = _figure(1, 1)
    axis = axes[0, 0]
    for i, (name, quantities) in enumerate((("error signal", ("log_error",)), ("weight gradient", measured.weights))):
        layers, values = measured.profile(*quantities)
        axis.plot(layers, values / np.log(10), color=COLOURS[i], marker=MARKERS[i], markersize=3, label=name)
    if theory is not None:
        axis.plot(*_theory(measured, theory), "k--", linewidth=1, label="mean field")
    axis.set_xlabel("layer $l$ (1 is next to the input)")
    axis.set_ylabel(r"$\log_{10}$ norm")
    axis.legend(frameon=False)
    return _done(figure, path)


def _theory(measured: GradientFlow, theory: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lay theory's curve through the last measured error signal of its layers: (layers, log10)."""
    if not isinstance(theory, Prediction):
        raise TypeError(f"plot.flow: theory must be what meanfield.predict returns, got {type(theory).__name__}")
    n, depth = len(theory.layer), max((row.layer for row in measured.rows), default=0)
    if n > depth:
        raise ValueError(
            f"plot.flow: theory must speak of layers that the net has, got {n} of theory for a net of {depth}; call "
            f"meanfield.predict({depth}, ...) or less"
        )
    layers, values = measured.profile("log_error")
    usable = (layers <= n) & np.isfinite(values) & np.isin(layers, theory.layer[np.isfinite(theory.log_error)])
    if not usable.any():
        raise ValueError(
            f"plot.flow: theory must share a layer with a finite measured error signal, got layers 1 to {n} of theory and "
            f"{layers.tolist()} measured; put a tap behind the weights of one of them"
        )
    last, value = layers[usable][-1], values[usable][-1]
    return theory.layer, (value + theory.log_error - theory.log_error[last - 1]) / np.log(10)


def curves(history: Any, *, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw training and validation loss (and accuracy) by epoch: where the two part, the net overfits."""
    names = [name for name in ("loss", "accuracy") if name in history.train]
    figure, axes = _figure(1, len(names))
    for axis, name in zip(axes[0], names, strict=True):
        epochs = np.arange(1, len(history.steps_per_epoch) + 1)
        axis.plot(epochs, history.by_epoch(name), color=COLOURS[0], marker="o", markersize=3, label="training")
        if name in history.validation:
            done = history.validation[name]  # an interrupted epoch has none
            axis.plot(epochs[: len(done)], done, color=COLOURS[3], marker="s", markersize=3, label="validation")
        axis.set_xlabel("epoch")
        axis.set_ylabel("cross entropy / nats" if name == "loss" else name)
        if name == "loss":
            axis.set_yscale("log")
        axis.legend(frameon=False)
    return _done(figure, path)


def study(table: Any, *, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw a study: error signal against layer, a panel for each activation and norm, a line for each depth.

    Lines are medians over seeds, bands reach from the 10th to the 90th percentile, dashed is mean-field theory.
    """
    import polars as pl

    hidden = table.filter(
        (pl.col("quantity") == "log_error")
        & (pl.col("role") == PREACTIVATION)
        & (pl.col("layer") <= pl.col("depth") + 1)
        & (pl.col("step") == 0)
    )
    activations = hidden["activation"].unique(maintain_order=True).to_list()
    norms = hidden["norm"].unique(maintain_order=True).to_list()
    depths = hidden["depth"].unique().sort().to_list()
    figure, axes = _figure(len(norms), len(activations))
    for (i, norm), (j, activation) in ((a, b) for a in enumerate(norms) for b in enumerate(activations)):
        axis = axes[i, j]
        part = hidden.filter((pl.col("norm") == norm) & (pl.col("activation") == activation))
        for k, depth in enumerate(depths):
            line = (
                part.filter(pl.col("depth") == depth)
                .group_by("layer")
                .agg(
                    middle=pl.col("value").drop_nans().median(),
                    low=pl.col("value").drop_nans().quantile(0.1),
                    high=pl.col("value").drop_nans().quantile(0.9),
                    predicted=pl.col("predicted").median(),
                )
                .sort("layer")
            )
            if line.is_empty():
                continue
            layers = line["layer"].to_numpy()
            middle, low, high, predicted = (
                line[name].cast(pl.Float64).to_numpy() / np.log(10) for name in ("middle", "low", "high", "predicted")
            )
            style = {"color": COLOURS[k % 7], "marker": MARKERS[k % 7], "markevery": max(1, len(layers) // 8)}
            axis.fill_between(layers, low, high, color=style["color"], alpha=0.2, linewidth=0)
            axis.plot(layers, middle, markersize=3.5, linewidth=1.2, label=f"{depth} layers", **style)
            if np.isfinite(predicted).any():
                axis.plot(layers, predicted, "k--", linewidth=0.9, label="mean field" if k == len(depths) - 1 else None)
        axis.set_title(words(activation if norm == "none" else f"{activation}, {norm.replace('_', ' ')}"), fontsize=10)
        if i == len(norms) - 1:
            axis.set_xlabel("layer $l$ (1 is next to the input)")
        if j == 0:
            axis.set_ylabel(_LABEL)
        axis.margins(x=0.03)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return _done(figure, path)


def words(text: str) -> str:
    """Make matplotlib show a text as it stands: dollars, a leading _ (a label that it would hide), unprintable letters.

    What is longer than 60 letters is cut, or it would leave no room for the figure.
    """
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    text = text if len(text) <= 60 else text[:59] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns + 0.6, 2.6 * rows + 0.4), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _done(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is not None:
        files.save_figure(figure, path, 130)
    return figure
