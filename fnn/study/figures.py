"""Figures of a study, by matplotlib: each draws one `digest` and writes a PNG, or returns None if it has nothing to show."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fnn import files
from fnn.plot import COLOURS, MARKERS, words
from fnn.study import digest
from fnn.study.digest import ERROR, Digest

MOST_PANELS = 24


def gradient(d: Digest, path: str | os.PathLike[str], series: str = ERROR, step: int = 0) -> str | None:
    """Draw a log norm against the layer: a panel for each combination of the other axes, a line for each depth."""
    import polars as pl

    part = d.layers.filter((pl.col("series") == series) & (pl.col("step") == step))
    if part.is_empty():
        return None
    lines, panels = _panels(d, part["network"].unique().to_list())
    figure, axes = _grid(len(panels))
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for i, (name, network) in enumerate(members):
            rows = part.filter(pl.col("network") == network).sort("layer")
            if series == ERROR:
                rows = rows.filter(pl.col("layer") < pl.col("layer").max())  # the last is the output's
            x = rows["layer"].to_numpy()
            low, middle, high, theory = (
                rows[c].cast(pl.Float64).to_numpy() / math.log(10) for c in ("low", "middle", "high", "predicted")
            )
            _line(axis, x, low, middle, high, i, name)
            if np.isfinite(theory).any():
                axis.plot(x, theory, "k--", linewidth=0.9)
        axis.set_title(words(title), fontsize=9)
        axis.margins(x=0.03)
        _legend(axis, lines)
    _labels(figure, "layer (1 is next to the input)", r"$\log_{10}\,$" + ("|dL/dh|" if series == ERROR else series))
    _save(figure, path)
    more = f" The first {MOST_PANELS} of {len(panels)} panels are shown." if len(panels) > MOST_PANELS else ""
    return (
        f"{_what(series)} against the layer {_when(step)}: medians over seeds, shaded from the 10th to the 90th "
        f"percentile, mean-field theory dashed.{more}"
    )


def heat(d: Digest, path: str | os.PathLike[str]) -> str | None:
    """Draw the gradient's rate over depth and sigma_w, with the critical line."""

    if not ({"depth", "sigma_w"} <= set(d.axes) and _numeric(d, "depth") and _numeric(d, "sigma_w")):
        return None
    rest = [name for name in d.axes if name not in ("depth", "sigma_w")]
    critical = digest.critical_lines(d)
    groups = d.networks.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): d.networks}
    finite = d.networks["rate"].drop_nulls().to_numpy()
    reach = max(0.01, float(np.quantile(np.abs(finite), 0.95))) if len(finite) else 1.0
    figure, axes = _grid(len(groups))
    image = None
    for axis, (key, group) in zip(axes, groups.items(), strict=False):
        depths, sigmas = (sorted(group[name].unique().to_list()) for name in ("depth", "sigma_w"))
        values = {(r["depth"], r["sigma_w"]): r["rate"] for r in group.iter_rows(named=True)}
        z = np.array([[values.get((n, s)) for s in sigmas] for n in depths], float)
        edges = _edges(np.array(sigmas, float))
        image = axis.pcolormesh(edges, np.arange(len(depths) + 1), z, cmap="PuOr", vmin=-reach, vmax=reach)
        axis.set_yticks(np.arange(len(depths)) + 0.5, [str(n) for n in depths])
        row = d.fixed | group.row(0, named=True)
        line = critical.get(digest.line_of(row))
        if line is not None and row.get("norm", "none") == "none" and edges[0] <= line <= edges[-1]:
            axis.axvline(line, color="k", linestyle="--", linewidth=1.2)
        axis.set_title(words(digest.label(dict(zip(rest, key, strict=True)))), fontsize=9)
    _labels(figure, r"$\sigma_w$", "depth")
    figure.colorbar(image, ax=axes.tolist(), label="log factor of |dL/dh|² a layer", shrink=0.9)
    _save(figure, path)
    return (
        "Rate of the gradient by depth and sigma_w, medians over seeds: purple grows towards the input (explodes), orange "
        "shrinks (vanishes); dashed is the critical line of mean-field theory, where it does neither."
    )


def training(d: Digest, path: str | os.PathLike[str], series: str = "train_loss") -> str | None:
    """Draw a quantity of whole runs against the step, panels and lines as in `gradient`."""
    import polars as pl

    part = d.runs.filter(pl.col("series") == series)
    if part.is_empty() or part["step"].max() == 0:
        return None
    lines, panels = _panels(d, part["network"].unique().to_list())
    figure, axes = _grid(len(panels))
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for i, (name, network) in enumerate(members):
            rows = part.filter(pl.col("network") == network).sort("step")
            low, middle, high = (rows[c].to_numpy() for c in ("low", "middle", "high"))
            _line(axis, rows["step"].to_numpy(), low, middle, high, i, name)
        axis.set_title(words(title), fontsize=9)
        if part.filter(
            (pl.col("middle") > 0) & pl.col("middle").is_finite()
        ).height:  # a loss of one's own may be negative
            axis.set_yscale("log")
        _legend(axis, lines)
    _labels(figure, "step", "loss of the step's batch")
    _save(figure, path)
    return "Training loss against the step: medians over seeds, shaded from the 10th to the 90th percentile."


def accuracy(d: Digest, path: str | os.PathLike[str]) -> str | None:
    """Draw the last recorded accuracy against depth, a line for each combination of the other axes."""

    if d.finals.is_empty() or "depth" not in d.axes or not _numeric(d, "depth"):
        return None
    rest = [name for name in d.axes if name != "depth"]
    rows = d.finals.join(d.networks.select("network", *d.axes), on="network").sort("depth")
    figure, axes = _grid(1, (5.5, 3.6))
    groups = rows.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): rows}
    order = list(dict.fromkeys(d.networks.select(rest).rows())) if rest else [()]
    for i, key in enumerate(k for k in order if k in groups):
        part = groups[key]
        low, middle, high = (part[c].to_numpy() for c in ("low", "middle", "high"))
        _line(axes[0], part["depth"].to_numpy(), low, middle, high, i, digest.label(dict(zip(rest, key, strict=True))))
    if rows["depth"].min() > 0:
        axes[0].set_xscale("log", base=2)
    depths = rows["depth"].unique().sort().to_list()
    axes[0].set_xticks(depths, [str(n) for n in depths])
    axes[0].set_ylim(0, 1)
    _legend(axes[0], "")
    _labels(figure, "depth (hidden layers)", "accuracy on held-out examples")
    _save(figure, path)
    return (
        "Accuracy on held-out examples at the last recorded step against depth: medians over seeds, shaded from the 10th "
        "to the 90th percentile."
    )


def _numeric(d: Digest, axis: str) -> bool:
    """Whether an axis is one of numbers; a net of one's own may call anything `depth`."""
    return d.networks[axis].dtype.is_numeric()


def _panels(d: Digest, networks: Sequence[int]) -> tuple[str, dict[str, list[tuple[str, int]]]]:
    """Sort networks into panels, by all axes but the one that makes the lines: depth, or the first."""
    by = "depth" if "depth" in d.axes or not d.axes else d.axes[0]
    panels: dict[str, list[tuple[str, int]]] = {}
    for row in d.networks.iter_rows(named=True):
        if row["network"] in networks:
            title = digest.label({name: row[name] for name in d.axes if name != by})
            value = row[by] if by in row else d.fixed.get(by, "")
            panels.setdefault(title, []).append((str(value), row["network"]))
    return by, panels


def _grid(n: int, size: tuple[float, float] = (3.3, 2.6)) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    n = min(n, MOST_PANELS)
    columns = min(n, 3 if n in (3, 5, 6, 9) else 4)
    rows = -(-n // columns)
    figure = Figure(figsize=(size[0] * columns + 0.6, size[1] * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[n:]:
        axis.remove()
    return figure, axes[:n]


def _line(axis: Any, x: Any, low: Any, middle: Any, high: Any, i: int, name: str) -> None:
    style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markevery": max(1, len(x) // 8)}
    axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axis.plot(x, middle, markersize=3.5, linewidth=1.2, label=words(name), **style)


def _legend(axis: Any, title: str) -> None:
    if axis.get_legend_handles_labels()[0]:  # a lone line has nothing to be told from
        axis.legend(frameon=False, fontsize=7, title=words(title), title_fontsize=7)


def _edges(x: np.ndarray) -> np.ndarray:
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _labels(figure: Any, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    files.save_figure(figure, path, 110, "report")


def _what(series: str) -> str:
    return {ERROR: "Error signal |dL/dh|", "log_kernel": "Norm of the weight gradient |dL/dW|"}.get(series, series)


def _when(step: int) -> str:
    return "at initialisation" if step == 0 else f"after {step} steps"
