"""Figures of one net or one training run, by matplotlib; each function returns the figure, and saves it if given a path."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fnn import files
from fnn.gradients.drawing import COLOURS, MARKERS
from fnn.gradients.flow import GradientFlow
from fnn.theory.meanfield import Prediction
from fnn.tree import PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Curves(Protocol):
    """The curves of a run, as `fit` returns them: a `History`."""

    @property
    def train(self) -> Mapping[str, PyTree]: ...
    @property
    def validation(self) -> Mapping[str, np.ndarray]: ...
    @property
    def steps_per_epoch(self) -> tuple[int, ...]: ...
    def by_epoch(self, name: str) -> PyTree: ...


class Spectrum(Protocol):
    """A spectral density, as `curvature(...).hessian.density()` returns it."""

    @property
    def grid(self) -> np.ndarray: ...
    @property
    def values(self) -> np.ndarray: ...
    @property
    def errors(self) -> np.ndarray: ...
    @property
    def probes(self) -> int: ...


def flow(
    measured: GradientFlow, *, theory: Prediction | None = None, path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Draw log10 of the error signal and of the weight gradients against the layer; `theory` is dashed.

    `theory` is a `meanfield.Prediction` for layers 1..n of the net, n its depth. It predicts the error signal at a
    layer's pre-activation, so put taps directly after the weights. It predicts only how the signal changes from layer to
    layer, so the curve is shifted to pass through the measured signal at the last of the n layers that has a tap.
    Errors: TypeError for any other theory, ValueError where the net has fewer than n layers, or none of the n has a tap.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axis,) = _figure(1)
    for i, (name, quantities) in enumerate((("error signal", ("log10_error",)), ("weight gradient", measured.weights))):
        layers, values = measured.profile(*quantities)
        axis.plot(layers, values, color=COLOURS[i], marker=MARKERS[i], markersize=3, label=name)
    if theory is not None:
        axis.plot(*_theory(measured, theory), "k--", linewidth=1, label="mean-field theory")
    axis.set_xlabel("layer $l$ (1 is next to the input)")
    axis.set_ylabel(r"$\log_{10}$ norm")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axis)
    return _done(figure, path)


def _theory(measured: GradientFlow, theory: Prediction) -> tuple[np.ndarray, np.ndarray]:
    """Shift theory's curve through the last measured error signal of its layers: (layers, log10)."""
    if not isinstance(theory, Prediction):
        raise TypeError(f"plot.flow: theory must be what meanfield.predict returns, got {type(theory).__name__}")
    n, depth = len(theory.layer), max((row.layer for row in measured.rows), default=0)
    if n > depth:
        raise ValueError(
            f"plot.flow: theory must speak of layers that the net has, got {n} of theory for a net of {depth}; call "
            f"meanfield.predict({depth}, ...) or less"
        )
    layers, values = measured.profile("log10_error")
    usable = (layers <= n) & np.isfinite(values) & np.isin(layers, theory.layer[np.isfinite(theory.log_error)])
    if not usable.any():
        raise ValueError(
            f"plot.flow: theory must share a layer with a finite measured error signal, got layers 1 to {n} of theory and "
            f"{layers.tolist()} measured; put a tap after the weights of one of them"
        )
    last, value = layers[usable][-1], values[usable][-1]
    return theory.layer, value + (theory.log_error - theory.log_error[last - 1]) / np.log(10)


def curves(history: Curves, *, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw training and validation loss (and accuracy) by epoch, from what `fit` returns: where they part, the net overfits."""
    from matplotlib.ticker import MaxNLocator

    names = [name for name in ("loss", "accuracy") if name in history.train]
    figure, axes = _figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        epochs = np.arange(1, len(history.steps_per_epoch) + 1)
        axis.plot(epochs, history.by_epoch(name), color=COLOURS[0], marker="o", markersize=3, label="training")
        if name in history.validation:
            done = history.validation[name]  # an interrupted epoch has none
            axis.plot(epochs[: len(done)], done, color=COLOURS[3], marker="s", markersize=3, label="validation")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(name)
        drawn = np.concatenate([line.get_ydata() for line in axis.lines])
        if name == "loss" and np.all(drawn[np.isfinite(drawn)] > 0):
            log_scale(axis)
    _legend(figure, axes[0])
    return _done(figure, path)


def density(found: Spectrum, *, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw a spectral density as `curvature(...).hessian.density()` returns it, log scale, shaded by two standard errors.

    A logarithmic scale shows single eigenvalues far outside beside the bulk; below a millionth of the peak nothing is drawn.
    Errors: TypeError for anything else.
    """
    if not all(hasattr(found, name) for name in ("grid", "values", "errors", "probes")):
        raise TypeError(f"plot.density: needs what hessian.density() returns, got {type(found).__name__}")
    figure, (axis,) = _figure(1)
    least = 1e-6 * float(np.max(found.values))
    low, high = (np.maximum(found.values + k * found.errors, least) for k in (-2, 2))
    axis.fill_between(found.grid, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axis.plot(
        found.grid, np.maximum(found.values, least), color=COLOURS[0], linewidth=1.2, label=f"{found.probes} probes"
    )
    axis.set_yscale("log")
    axis.set_xlabel("eigenvalue")
    axis.set_ylabel("density")
    _legend(figure, axis)
    return _done(figure, path)


def words(text: str) -> str:
    """Escape what matplotlib would not show as it is: dollars, a leading _ (it hides such labels), unprintable letters.

    A text of more than 60 letters is cut, to leave room for the figure.
    """
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    text = text if len(text) <= 60 else text[:59] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def log_scale(axis: "Axes") -> None:
    """Make an axis logarithmic; over less than a decade and a half its ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 30 * low:
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
        axis.minorticks_off()


def _figure(panels: int) -> "tuple[Figure, np.ndarray]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * panels + 0.6, 3.0), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _legend(figure: "Figure", axis: "Axes") -> None:
    """Name the lines below the panels, off the data."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)


def _done(figure: "Figure", path: str | os.PathLike[str] | None) -> "Figure":
    if path is not None:
        files.save_figure(figure, path, 130)
    return figure
