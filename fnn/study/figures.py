"""Figures of a study, by matplotlib: each draws one `Summary` and returns the figure, or None if there is nothing to show.

Lines are medians over seeds, shaded from the 10th to the 90th percentile; theory is dashed, its band for one seed dotted;
logs are decimal. Every figure says so, and how many seeds there are, in the line at its top.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fnn.plot import COLOURS, log_scale
from fnn.plot import words as shown
from fnn.study import canvas, summary, words
from fnn.study.summary import ERROR, WATCHED_ERROR, Summary

COLUMNS = ("low", "middle", "high", "predicted", "predicted_low", "predicted_high")
OF_TRAINING = ("optimizer", "learning_rate", "clip", "clip_threshold")
THEORY = "theory at this width"


def gradient(s: Summary, series: str = ERROR, step: int = 0) -> Any:
    """Draw log10 of a norm against the hidden layer: a panel for each combination of the other axes, a line for each depth.

    Dashed is theory, at the width of the net; dotted are the ends of the band that holds 19 seeds in 20. Of nets without taps, which have no such series, what `watch` measures is drawn instead.
    """
    import polars as pl

    found = s.layers["series"]
    if series not in found:
        others = found.filter(found.str.starts_with("log10_gradient at ")).value_counts(sort=True)["series"]
        series = WATCHED_ERROR if series == ERROR else next(iter(others), series)
    part = hidden(s, s.layers.filter((pl.col("series") == series) & (pl.col("step") == step)))
    if part.is_empty():
        return None
    if step == 0:
        s = at_start(s)
        part = part.filter(pl.col("network").is_in(s.networks["network"].implode()))
    told = words.quantity(series)
    part = part.with_columns(pl.col(n).cast(pl.Float64) for n in COLUMNS)
    when = "at initialisation" if step == 0 else f"after {words.count(step, 'step')}"
    return _lines(
        s,
        part,
        "layer",
        ("hidden layer (1: next to the input)", shown(told.axis).replace("log10", r"$\log_{10}$"), THEORY),
        when,
    )


def at_start(s: Summary) -> Summary:
    """Leave out axes that only training sees, and networks that are the same without them: no panel is drawn twice."""
    rest = [name for name in s.axes if name not in OF_TRAINING]
    if len(rest) == len(s.axes) or not rest:
        return s
    numbers = [name for name in ("log10_first", "log10_last", "log10_growth") if name in s.networks.columns]
    kept = s.networks.unique(rest, keep="first", maintain_order=True)
    if s.networks.select(*rest, *numbers).unique().height > kept.height:
        return s  # a net of one's own that takes these names for something else
    return s._replace(axes=rest, networks=kept)


def hidden(s: Summary, part: Any) -> Any:
    """Keep the hidden layers of a table by layer: `depth` of them, or, of nets that say no depth, all but an error's last."""
    import polars as pl

    if "depth" in s.fixed and isinstance(s.fixed["depth"], int):
        return part.filter(pl.col("layer") <= s.fixed["depth"])
    if "depth" in s.axes and s.networks["depth"].dtype.is_integer():
        depths = s.networks.select("network", _depth="depth")
        return part.join(depths, on="network", maintain_order="left").filter(pl.col("layer") <= pl.col("_depth"))
    # Of all series: the output's layer may have no tap, and no error signal.
    outputs = s.layers.group_by("network").agg(_output=pl.col("layer").max())
    before = pl.col("layer") < pl.col("_output")
    part = part.join(outputs, on="network", maintain_order="left")
    return part.filter(~pl.col("series").is_in([ERROR, WATCHED_ERROR]) | before)


def training(
    s: Summary, series: str = "train_loss", dashed: str = "", predicted: Mapping[int, float] | None = None
) -> Any:
    """Draw a quantity of whole runs against the step, panels and lines as in `gradient`.

    `predicted` is a number for some of the networks, drawn dashed; `dashed` says what it is.
    """
    import polars as pl

    part = s.runs.filter(pl.col("series") == series)
    if part.is_empty() or part["step"].max() == 0:
        return None
    if predicted:
        numbers = pl.col("network").replace_strict(predicted, default=None, return_dtype=pl.Float64)
        part = part.with_columns(predicted=numbers)
    return _lines(s, part, "step", ("step", shown(words.quantity(series).about), dashed), logarithmic=True)


def heat(s: Summary) -> Any:
    """Draw the growth of log10 |dL/dh| per layer over depth and sigma_w, the critical line of mean-field theory dashed.

    Purple grows towards the input (explodes), orange shrinks (vanishes); all panels share one scale of colours.
    """
    if not ({"depth", "sigma_w"} <= set(s.axes) and canvas.is_numeric(s, "depth") and canvas.is_numeric(s, "sigma_w")):
        return None
    s = at_start(s)
    rest = [name for name in s.axes if name not in ("depth", "sigma_w")]
    critical = summary.critical_lines(s)
    groups = s.networks.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): s.networks}
    groups = {k: g for k, g in groups.items() if g["depth"].n_unique() > 1 and g["sigma_w"].n_unique() > 1}
    if not groups:
        return None  # a map needs both
    rates = {row["network"]: row["log10_growth"] for row in s.networks.iter_rows(named=True)}
    finite = np.abs([rate for rate in rates.values() if rate is not None and np.isfinite(rate)])
    reach = max(0.002, float(np.quantile(finite, 0.95))) if len(finite) else 1.0
    figure, axes = canvas.grid(len(groups))
    image, dashed = None, False
    for axis, (key, group) in zip(axes, groups.items(), strict=False):
        depths, sigmas = (sorted(group[name].unique().to_list()) for name in ("depth", "sigma_w"))
        values = {(r["depth"], r["sigma_w"]): rates[r["network"]] for r in group.iter_rows(named=True)}
        z = np.array([[values.get((depth, sigma)) for sigma in sigmas] for depth in depths], float)
        edges = canvas.edges(np.array(sigmas, float))
        image = axis.pcolormesh(edges, np.arange(len(depths) + 1), z, cmap="PuOr", vmin=-reach, vmax=reach)
        axis.set_yticks(np.arange(len(depths)) + 0.5, [str(n) for n in depths])
        row = s.fixed | group.row(0, named=True)
        line = critical.get(summary.line_of(row))
        if line is not None and row.get("norm", "none") == "none" and edges[0] <= line <= edges[-1]:
            axis.axvline(line, color="k", linestyle="--", linewidth=1.2)
            dashed = True
        axis.set_title(canvas.title(dict(zip(rest, key, strict=True))), fontsize=9)
    canvas.labels(figure, axes, r"$\sigma_w$", "depth (hidden layers)")
    label = r"growth of $\log_{10}$ |dL/dh| per layer towards the input"
    bar = figure.colorbar(image, ax=axes.tolist(), label=label, shrink=0.9, extend="both" if len(finite) else "neither")
    bar.ax.axhline(0, color="k", linewidth=0.6)
    theory = "; dashed: critical line of mean-field theory" * dashed
    canvas.note(figure, f"at initialisation, median of {canvas.seeds(s)}{theory}", len(groups))
    return figure


def accuracy(s: Summary, chance: float | None = None) -> Any:
    """Draw the last recorded accuracy against depth, a line for each combination of the other axes; chance is dotted.

    More than seven lines are drawn in panels, each with a line for each value of the axis that has most (seven at most).
    """
    if s.finals.is_empty() or "depth" not in s.axes or not canvas.is_numeric(s, "depth"):
        return None
    rest = [name for name in s.axes if name != "depth"]
    rows = s.finals.join(s.networks.select("network", *s.axes), on="network").sort("depth")
    by = rest
    if s.networks.select(rest).n_unique() > len(COLOURS) if rest else False:
        sizes = {name: s.networks[name].n_unique() for name in rest}
        by = [max(rest, key=lambda name: (sizes[name] <= len(COLOURS), sizes[name]))]
    apart = [name for name in rest if name not in by]
    # In the order of the networks, not in that of the rows, which are sorted by depth.
    panels = {k: g for k in dict.fromkeys(s.networks.select(apart).rows() or [()]) if len(g := _where(rows, apart, k))}
    lines = list(dict.fromkeys(s.networks.select(by).rows() or [()]))
    figure, axes = canvas.grid(len(panels), (5.2, 3.4) if len(panels) == 1 else (3.3, 2.5))
    styles = dict(zip(lines, canvas.styles(len(lines), ordered=False), strict=True))
    depths = rows["depth"].unique().sort().to_list()
    for axis, (key, members) in zip(axes, panels.items(), strict=False):
        for line in lines:
            if len(part := _where(members, by, line)):
                name = canvas.title(dict(zip(by, line, strict=True)))
                canvas.line(axis, part, "depth", styles[line], name, bars=True)
        if chance is not None:
            axis.axhline(chance, color="0.3", linestyle=":", linewidth=1.1, label=f"chance ({chance:.2f})")
        if depths[0] > 0:
            axis.set_xscale("log", base=2)
        axis.set_xticks(depths, [str(n) for n in depths])
        axis.set_xticks([], minor=True)
        axis.set_ylim(0, 1.02)
        axis.set_title(canvas.title(dict(zip(apart, key, strict=True))), fontsize=9)
    if found := canvas.one_of_each(axes):
        short = max(map(len, found)) < 30
        canvas.legend(figure, found, "", min(len(found), (2 if short else 1) * canvas.columns(axes)))
    canvas.labels(figure, axes, "depth (hidden layers)", "accuracy on held-out examples")
    last = s.runs.filter(s.runs["series"] == "accuracy")["step"].max()
    band = f"median of {canvas.seeds(s)}, bars from 10th to 90th percentile"
    canvas.note(figure, f"last record, step {last} or before: {band}", len(panels))
    return figure


def _where(rows: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    import polars as pl

    return rows.filter(
        [pl.col(name).eq_missing(pl.lit(v)) for name, v in zip(names, values, strict=True)] or [pl.lit(True)]
    )


def _lines(
    s: Summary, part: Any, x: str, labels: tuple[str, str, str], when: str = "", *, logarithmic: bool = False
) -> Any:
    """Draw every network of a table against its column `x`, in panels that share one legend.

    `labels` are those of x and y, and of what is dashed.
    """
    import polars as pl
    from matplotlib.ticker import MaxNLocator

    by, panels = panels_of(s, part["network"].unique().to_list())
    rest = [name for name in s.axes if name != by]
    known = dict.fromkeys(value for members in panels.values() for value, _ in members)
    values = sorted(known) if by and canvas.is_numeric(s, by) else list(known)
    styles = dict(zip(values, canvas.styles(len(values), ordered=bool(by) and canvas.is_numeric(s, by)), strict=True))
    figure, axes = canvas.grid(len(panels), columns=s.networks[rest[-1]].n_unique() if len(rest) == 2 else 0)
    theory = False
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for value, network in members:
            name = canvas.typeset(words.value(value)) if by else ""
            theory |= canvas.line(axis, part.filter(pl.col("network") == network).sort(x), x, styles[value], name)
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.03)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=2))
        # A user's own loss may be nowhere above 0.
        if logarithmic and part.filter((pl.col("middle") > 0) & pl.col("middle").is_finite()).height:
            log_scale(axis)
    handles = canvas.one_of_each(axes)
    if theory:
        from matplotlib.lines import Line2D

        handles[labels[2]] = Line2D([], [], color="k", linestyle="--", linewidth=0.9)
    if any(handles):
        canvas.legend(figure, handles, words.axis(by), min(len(handles), max(3, 3 * canvas.columns(axes))))
    canvas.labels(figure, axes, *labels[:2])
    alike = canvas.share(axes)
    for axis in axes:  # once more: the range, on which the ticks depend, may be another one now
        if axis.get_yscale() == "log":
            log_scale(axis)
    band = f"median of {canvas.seeds(s)}, shaded from 10th to 90th percentile"
    more = "; theory goes through the last hidden layer" * (
        theory and labels[2] == THEORY
    ) + "; scales differ between panels" * (not alike)
    canvas.note(figure, ": ".join(filter(None, [when, band])) + more, len(panels))
    return figure


def panels_of(s: Summary, networks: Sequence[int]) -> tuple[str, dict[str, list[tuple[Any, int]]]]:
    """Sort networks into panels, by all axes but the one that makes the lines: depth, or the first."""
    by = "depth" if "depth" in s.axes or not s.axes else s.axes[0]
    panels: dict[str, list[tuple[Any, int]]] = {}
    for row in s.networks.iter_rows(named=True):
        if row["network"] in networks:
            title = canvas.title({name: row[name] for name in s.axes if name != by})
            panels.setdefault(title, []).append((row[by] if by in row else s.fixed.get(by), row["network"]))
    known = bool(s.axes) or by in s.fixed
    return by if known else "", panels
