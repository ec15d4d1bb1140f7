"""Figures of a study, by matplotlib: each draws one `Summary` and returns the figure, or None if there is nothing to show.

Lines are medians over seeds, shaded from the 10th to the 90th percentile; theory is dashed, its band for one seed dotted.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fnn.plot import COLOURS, MARKERS, words
from fnn.study import summary
from fnn.study.summary import ERROR, ERROR10, Summary

MOST_PANELS = 24
NORMS = {ERROR: "|dL/dh|", ERROR10: "|dL/dh|", "log_kernel": "|dL/dW|"}


def gradient(s: Summary, series: str = ERROR, step: int = 0) -> Any:
    """Draw log10 of a norm against the layer: a panel for each combination of the other axes, a line for each depth.

    Dashed is theory, at the width of the net; dotted are the ends of the band that holds 19 seeds in 20. Of nets without taps, which have no such series, what `watch` measures is drawn instead.
    """
    import polars as pl

    found = s.layers["series"]
    if series not in found:
        others = found.filter(found.str.starts_with("log10_gradient at ")).value_counts(sort=True)["series"]
        series = ERROR10 if series == ERROR else next(iter(others), series)
    part = s.layers.filter((pl.col("series") == series) & (pl.col("step") == step))
    if series in (ERROR, ERROR10):  # without the output's layer, the last
        part = part.filter(pl.col("layer") < pl.col("layer").max().over("network"))
    if part.is_empty():
        return None
    names, unit = (
        ("low", "middle", "high", "predicted", "predicted_low", "predicted_high"),
        1 if series.startswith("log10_") else math.log(10),
    )
    part = part.with_columns(pl.col(name).cast(pl.Float64) / unit for name in names)
    norm = NORMS.get(series, "|dL/dW|" if series.startswith("log10_gradient at ") else series)
    labels = "layer (1 is next to the input)", rf"$\log_{{10}}$ {norm}"
    return _lines(s, part, "layer", labels)


def training(s: Summary, series: str = "train_loss") -> Any:
    """Draw a quantity of whole runs against the step, panels and lines as in `gradient`."""
    import polars as pl

    part = s.runs.filter(pl.col("series") == series)
    if part.is_empty() or part["step"].max() == 0:
        return None
    return _lines(s, part, "step", ("step", "loss of the step's batch"), logarithmic=True)


def heat(s: Summary) -> Any:
    """Draw the gradient's rate over depth and sigma_w, with the critical line of mean-field theory dashed.

    Purple grows towards the input (explodes), orange shrinks (vanishes).
    """
    if not ({"depth", "sigma_w"} <= set(s.axes) and _numeric(s, "depth") and _numeric(s, "sigma_w")):
        return None
    rest = [name for name in s.axes if name not in ("depth", "sigma_w")]
    critical = summary.critical_lines(s)
    groups = s.networks.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): s.networks}
    finite = s.networks["rate"].drop_nulls().to_numpy()
    reach = max(0.01, float(np.quantile(np.abs(finite), 0.95))) if len(finite) else 1.0
    figure, axes = _grid(len(groups))
    image = None
    for axis, (key, group) in zip(axes, groups.items(), strict=False):
        depths, sigmas = (sorted(group[name].unique().to_list()) for name in ("depth", "sigma_w"))
        values = {(r["depth"], r["sigma_w"]): r["rate"] for r in group.iter_rows(named=True)}
        z = np.array([[values.get((depth, sigma)) for sigma in sigmas] for depth in depths], float)
        edges = _edges(np.array(sigmas, float))
        image = axis.pcolormesh(edges, np.arange(len(depths) + 1), z, cmap="PuOr", vmin=-reach, vmax=reach)
        axis.set_yticks(np.arange(len(depths)) + 0.5, [str(n) for n in depths])
        row = s.fixed | group.row(0, named=True)
        line = critical.get(summary.line_of(row))
        if line is not None and row.get("norm", "none") == "none" and edges[0] <= line <= edges[-1]:
            axis.axvline(line, color="k", linestyle="--", linewidth=1.2)
        axis.set_title(words(summary.label(dict(zip(rest, key, strict=True)))), fontsize=9)
    _labels(figure, r"$\sigma_w$", "depth")
    figure.colorbar(image, ax=axes.tolist(), label="log factor of |dL/dh|² per layer", shrink=0.9)
    return figure


def accuracy(s: Summary) -> Any:
    """Draw the last recorded accuracy against depth, a line for each combination of the other axes."""
    if s.finals.is_empty() or "depth" not in s.axes or not _numeric(s, "depth"):
        return None
    rest = [name for name in s.axes if name != "depth"]
    rows = s.finals.join(s.networks.select("network", *s.axes), on="network").sort("depth")
    figure, axes = _grid(1, (5.5, 3.6))
    groups = rows.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): rows}
    order = list(dict.fromkeys(s.networks.select(rest).rows())) if rest else [()]
    for i, key in enumerate(k for k in order if k in groups):
        _line(axes[0], groups[key], "depth", i, summary.label(dict(zip(rest, key, strict=True))))
    if rows["depth"].min() > 0:
        axes[0].set_xscale("log", base=2)
    depths = rows["depth"].unique().sort().to_list()
    axes[0].set_xticks(depths, [str(n) for n in depths])
    axes[0].set_ylim(0, 1)
    _legend(axes[0], "")
    _labels(figure, "depth (hidden layers)", "accuracy on held-out examples")
    return figure


def _lines(s: Summary, part: Any, x: str, labels: tuple[str, str], *, logarithmic: bool = False) -> Any:
    """Draw every network of a table against its column `x`, in panels."""
    import polars as pl

    by, panels = _panels(s, part["network"].unique().to_list())
    rest = [name for name in s.axes if name != by]
    figure, axes = _grid(len(panels), columns=s.networks[rest[-1]].n_unique() if len(rest) == 2 else 0)
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for i, (name, network) in enumerate(members):
            _line(axis, part.filter(pl.col("network") == network).sort(x), x, i, name)
        axis.set_title(words(title), fontsize=9)
        axis.margins(x=0.03)
        # A user's own loss may be nowhere above 0.
        if logarithmic and part.filter((pl.col("middle") > 0) & pl.col("middle").is_finite()).height:
            axis.set_yscale("log")
        _legend(axis, by)
    _labels(figure, *labels)
    if len(panels) > MOST_PANELS:
        figure.suptitle(f"the first {MOST_PANELS} of {len(panels)} panels", fontsize=9)
    return figure


def _numeric(s: Summary, axis: str) -> bool:
    """Whether an axis holds numbers; in a user's own net `depth` may be anything."""
    return s.networks[axis].dtype.is_numeric()


def _panels(s: Summary, networks: Sequence[int]) -> tuple[str, dict[str, list[tuple[str, int]]]]:
    """Sort networks into panels, by all axes but the one that makes the lines: depth, or the first."""
    by = "depth" if "depth" in s.axes or not s.axes else s.axes[0]
    panels: dict[str, list[tuple[str, int]]] = {}
    for row in s.networks.iter_rows(named=True):
        if row["network"] in networks:
            title = summary.label({name: row[name] for name in s.axes if name != by})
            value = row[by] if by in row else s.fixed.get(by, "")
            panels.setdefault(title, []).append((str(value), row["network"]))
    return by, panels


def _grid(n: int, size: tuple[float, float] = (3.3, 2.6), columns: int = 0) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    n = min(n, MOST_PANELS)
    if not (2 <= columns <= 4 and n % columns == 0):
        columns = min(n, 3 if n in (3, 5, 6, 9) else 4)
    rows = -(-n // columns)
    figure = Figure(figsize=(size[0] * columns + 0.6, size[1] * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[n:]:
        axis.remove()
    return figure, axes[:n]


def _line(axis: Any, rows: Any, x: str, i: int, name: str) -> None:
    """Draw the i-th line of a panel: its median with the band over seeds, and what theory predicts."""
    at = rows[x].to_numpy()
    style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markevery": max(1, len(at) // 8)}
    axis.fill_between(at, rows["low"].to_numpy(), rows["high"].to_numpy(), color=style["color"], alpha=0.2, linewidth=0)
    axis.plot(at, rows["middle"].to_numpy(), markersize=3.5, linewidth=1.2, label=words(name), **style)
    if "predicted" in rows.columns and np.isfinite(theory := rows["predicted"].to_numpy()).any():
        axis.plot(at, theory, "k--", linewidth=0.9)
        ends = [rows[f"predicted_{end}"].to_numpy() for end in ("low", "high")]
        axis.fill_between(at, *ends, facecolor="none", edgecolor="0.4", linewidth=0.6, linestyle=":")


def _legend(axis: Any, title: str) -> None:
    if axis.get_legend_handles_labels()[0]:  # a line without a name needs none
        axis.legend(frameon=False, fontsize=7, title=words(title), title_fontsize=7)


def _edges(x: np.ndarray) -> np.ndarray:
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _labels(figure: Any, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
