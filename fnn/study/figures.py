"""Figures of a study, by matplotlib: each draws one `Summary` and returns the figure, or None if there is nothing to show.

Lines are medians over seeds, shaded from the 10th to the 90th percentile; theory is dashed, its band for one seed dotted;
logs are decimal. Every figure says so, and how many seeds there are, in the line at its top.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fnn.plot import COLOURS, MARKERS, log_scale
from fnn.plot import words as shown
from fnn.study import summary, verdict, words
from fnn.study.summary import ERROR, WATCHED_ERROR, Summary

MOST_PANELS = 24
COLUMNS = ("low", "middle", "high", "predicted", "predicted_low", "predicted_high")
OF_TRAINING = ("optimizer", "learning_rate", "clip", "clip_threshold")
ALIKE = 6.0
"""Panels share a scale where the longest range is at most this many times the shortest."""


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
        ("hidden layer (1: next to the input)", shown(told.axis).replace("log10", r"$\log_{10}$")),
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
    last = pl.col("layer").max().over("network")
    return part.filter(~pl.col("series").is_in([ERROR, WATCHED_ERROR]) | (pl.col("layer") < last))


def training(s: Summary, series: str = "train_loss") -> Any:
    """Draw a quantity of whole runs against the step, panels and lines as in `gradient`."""
    import polars as pl

    part = s.runs.filter(pl.col("series") == series)
    if part.is_empty() or part["step"].max() == 0:
        return None
    return _lines(s, part, "step", ("step", shown(words.quantity(series).about)), logarithmic=True)


def heat(s: Summary) -> Any:
    """Draw the growth of log10 |dL/dh| per layer over depth and sigma_w, the critical line of mean-field theory dashed.

    Purple grows towards the input (explodes), orange shrinks (vanishes); all panels share one scale of colours.
    """
    if not ({"depth", "sigma_w"} <= set(s.axes) and _numeric(s, "depth") and _numeric(s, "sigma_w")):
        return None
    s = at_start(s)
    rest = [name for name in s.axes if name not in ("depth", "sigma_w")]
    critical = summary.critical_lines(s)
    groups = s.networks.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): s.networks}
    groups = {k: g for k, g in groups.items() if g["depth"].n_unique() > 1 and g["sigma_w"].n_unique() > 1}
    if not groups:
        return None  # a map needs both
    rates = {row["network"]: row["log10_growth"] for row in s.networks.iter_rows(named=True)}
    finite = np.abs([rate for rate in rates.values() if rate is not None])
    reach = max(0.002, float(np.quantile(finite, 0.95))) if len(finite) else 1.0
    figure, axes = _grid(len(groups))
    image, dashed = None, False
    for axis, (key, group) in zip(axes, groups.items(), strict=False):
        depths, sigmas = (sorted(group[name].unique().to_list()) for name in ("depth", "sigma_w"))
        values = {(r["depth"], r["sigma_w"]): rates[r["network"]] for r in group.iter_rows(named=True)}
        z = np.array([[values.get((depth, sigma)) for sigma in sigmas] for depth in depths], float)
        edges = _edges(np.array(sigmas, float))
        image = axis.pcolormesh(edges, np.arange(len(depths) + 1), z, cmap="PuOr", vmin=-reach, vmax=reach)
        axis.set_yticks(np.arange(len(depths)) + 0.5, [str(n) for n in depths])
        row = s.fixed | group.row(0, named=True)
        line = critical.get(summary.line_of(row))
        if line is not None and row.get("norm", "none") == "none" and edges[0] <= line <= edges[-1]:
            axis.axvline(line, color="k", linestyle="--", linewidth=1.2)
            dashed = True
        axis.set_title(_title(dict(zip(rest, key, strict=True))), fontsize=9)
    _labels(figure, axes, r"$\sigma_w$", "depth (hidden layers)")
    label = r"growth of $\log_{10}$ |dL/dh| per layer towards the input"
    bar = figure.colorbar(image, ax=axes.tolist(), label=label, shrink=0.9, extend="both" if len(finite) else "neither")
    bar.ax.axhline(0, color="k", linewidth=0.6)
    theory = "; dashed: critical line of mean-field theory" * dashed
    _note(figure, f"at initialisation, median of {_seeds(s)}{theory}", len(groups))
    return figure


def accuracy(s: Summary, chance: float | None = None) -> Any:
    """Draw the last recorded accuracy against depth, a line for each combination of the other axes; chance is dotted."""
    if s.finals.is_empty() or "depth" not in s.axes or not _numeric(s, "depth"):
        return None
    rest = [name for name in s.axes if name != "depth"]
    rows = s.finals.join(s.networks.select("network", *s.axes), on="network").sort("depth")
    figure, axes = _grid(1, (5.2, 3.4))
    groups = rows.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): rows}
    order = [k for k in (dict.fromkeys(s.networks.select(rest).rows()) if rest else [()]) if k in groups]
    styles = _styles(len(order), ordered=False)
    for style, key in zip(styles, order, strict=True):
        _line(axes[0], groups[key], "depth", style, _title(dict(zip(rest, key, strict=True))), bars=True)
    if chance is not None:
        axes[0].axhline(chance, color="0.3", linestyle=":", linewidth=1.1, label=f"chance ({chance:.2f})")
    if rows["depth"].min() > 0:
        axes[0].set_xscale("log", base=2)
    depths = rows["depth"].unique().sort().to_list()
    axes[0].set_xticks(depths, [str(n) for n in depths])
    axes[0].set_xticks([], minor=True)
    axes[0].set_ylim(0, 1.02)
    if found := _one_of_each(axes):
        _outside(figure, found, "", 2 if max(map(len, found)) < 30 else 1)
    _labels(figure, axes, "depth (hidden layers)", "accuracy on held-out examples")
    last = s.runs.filter(s.runs["series"] == "accuracy")["step"].max()
    _note(figure, f"last record, step {last} or before: median of {_seeds(s)}, bars from 10th to 90th percentile", 1)
    return figure


def _lines(s: Summary, part: Any, x: str, labels: tuple[str, str], when: str = "", *, logarithmic: bool = False) -> Any:
    """Draw every network of a table against its column `x`, in panels that share one legend."""
    import polars as pl
    from matplotlib.ticker import MaxNLocator

    by, panels = _panels(s, part["network"].unique().to_list())
    rest = [name for name in s.axes if name != by]
    known = dict.fromkeys(value for members in panels.values() for value, _ in members)
    values = sorted(known) if by and _numeric(s, by) else list(known)
    styles = dict(zip(values, _styles(len(values), ordered=bool(by) and _numeric(s, by)), strict=True))
    figure, axes = _grid(len(panels), columns=s.networks[rest[-1]].n_unique() if len(rest) == 2 else 0)
    theory = False
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for value, network in members:
            name = _typeset(words.value(value)) if by else ""
            theory |= _line(axis, part.filter(pl.col("network") == network).sort(x), x, styles[value], name)
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.03)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=2))
        # A user's own loss may be nowhere above 0.
        if logarithmic and part.filter((pl.col("middle") > 0) & pl.col("middle").is_finite()).height:
            log_scale(axis)
    handles = _one_of_each(axes)
    if theory:
        from matplotlib.lines import Line2D

        handles["theory at this width"] = Line2D([], [], color="k", linestyle="--", linewidth=0.9)
    if any(handles):
        _outside(figure, handles, words.axis(by), min(len(handles), max(3, 3 * _columns(axes))))
    _labels(figure, axes, *labels)
    alike = _share(axes)
    band = f"median of {_seeds(s)}, shaded from 10th to 90th percentile"
    more = "; theory goes through the last hidden layer" * theory + "; scales differ between panels" * (not alike)
    _note(figure, ": ".join(filter(None, [when, band])) + more, len(panels))
    return figure


def _panels(s: Summary, networks: Sequence[int]) -> tuple[str, dict[str, list[tuple[Any, int]]]]:
    """Sort networks into panels, by all axes but the one that makes the lines: depth, or the first."""
    by = "depth" if "depth" in s.axes or not s.axes else s.axes[0]
    panels: dict[str, list[tuple[Any, int]]] = {}
    for row in s.networks.iter_rows(named=True):
        if row["network"] in networks:
            title = _title({name: row[name] for name in s.axes if name != by})
            panels.setdefault(title, []).append((row[by] if by in row else s.fixed.get(by), row["network"]))
    known = bool(s.axes) or by in s.fixed
    return by if known else "", panels


def _numeric(s: Summary, axis: str) -> bool:
    """Whether an axis holds numbers; in a user's own net `depth` may be anything."""
    if axis not in s.axes:
        return isinstance(s.fixed.get(axis), int | float)
    return s.networks[axis].dtype.is_numeric()


def _title(values: dict[str, Any]) -> str:
    """Name a panel, in two lines where one would run into the next panel."""
    parts = [verdict.label(name, value) for name, value in values.items()]
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= 44 or not lines[-1] else [*lines[:-1], lines[-1] + ",", part]
    return "\n".join(_typeset(line) for line in lines[:6])


def _typeset(text: str) -> str:
    return shown(text).replace("σ_w", r"$\sigma_w$").replace("σ_b", r"$\sigma_b$")


def _seeds(s: Summary) -> str:
    least, most = s.networks["seeds"].min(), s.networks["seeds"].max()
    return words.count(int(most), "seed") if least == most else f"{least} to {most} seeds"


def _styles(n: int, ordered: bool) -> list[dict[str, Any]]:
    """Give n lines looks of their own: seven colours that the colour-blind can tell apart, or, of many numbers, a scale."""
    if n > len(COLOURS) and ordered:
        from matplotlib import colormaps

        scale = colormaps["viridis"](np.linspace(0, 0.93, n))
        return [{"color": tuple(scale[i]), "marker": MARKERS[i % len(MARKERS)]} for i in range(n)]
    kinds = ("-", "-.", ":")
    looks = [(COLOURS[i % 7], MARKERS[(i + i // 7) % 7], kinds[i // 7 % 3]) for i in range(n)]
    return [{"color": colour, "marker": marker, "linestyle": kind} for colour, marker, kind in looks]


def _grid(n: int, size: tuple[float, float] = (3.3, 2.5), columns: int = 0) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    n = min(n, MOST_PANELS)
    if not (2 <= columns <= 4 and n % columns == 0):
        columns = min(n, 3 if n in (3, 5, 6, 9) else 4)
    rows = -(-n // columns)
    figure = Figure(figsize=(max(4.6, size[0] * columns + 0.6), size[1] * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[n:]:
        axis.remove()
    return figure, axes[:n]


def _columns(axes: Any) -> int:
    return int(axes[0].get_gridspec().ncols)


def _line(axis: Any, rows: Any, x: str, style: dict[str, Any], name: str, *, bars: bool = False) -> bool:
    """Draw one line: its median with the band over seeds, and what theory predicts; return whether there is a theory."""
    at = rows[x].to_numpy()
    low, middle, high = (rows[n].cast(float).to_numpy() for n in ("low", "middle", "high"))
    if bars:
        axis.vlines(at, low, high, color=style["color"], linewidth=1.0)
    else:
        axis.fill_between(at, low, high, color=style["color"], alpha=0.2, linewidth=0)
    every = max(1, len(at) // 8)
    axis.plot(at, middle, markersize=3.5, linewidth=1.2, markevery=every, label=name, **style)
    if "predicted" in rows.columns and np.isfinite(theory := rows["predicted"].cast(float).to_numpy()).any():
        axis.plot(at, theory, "k--", linewidth=0.9)
        ends = [rows[f"predicted_{end}"].cast(float).to_numpy() for end in ("low", "high")]
        axis.fill_between(at, *ends, facecolor="none", edgecolor="0.4", linewidth=0.6, linestyle=":")
        return True
    return False


def _share(axes: Any) -> bool:
    """Give all panels one vertical scale where their ranges are alike; return whether they have one."""
    limits = np.array([axis.get_ylim() for axis in axes])
    if axes[0].get_yscale() == "log":
        if any(axis.get_yscale() != "log" for axis in axes) or (limits <= 0).any():
            return len(axes) == 1
        lengths = np.log(limits[:, 1] / limits[:, 0])
        whole = math.log(limits[:, 1].max() / limits[:, 0].min())
    else:
        lengths, whole = limits[:, 1] - limits[:, 0], limits[:, 1].max() - limits[:, 0].min()
    if whole > ALIKE * lengths.min():
        return False
    for axis in axes:
        axis.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    return True


def _one_of_each(axes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def _outside(figure: Any, handles: dict[str, Any], title: str, columns: int) -> None:
    """Put one legend below the panels, off the data."""
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
        title=_typeset(title),
        title_fontsize=8,
    )


def _note(figure: Any, text: str, panels: int) -> None:
    if panels > MOST_PANELS:
        text += f"\nthe first {MOST_PANELS} of {panels} panels"
    width = int(figure.get_size_inches()[0] * 15)
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, word]
    figure.suptitle("\n".join(lines), fontsize=8, color="0.25")


def _edges(x: np.ndarray) -> np.ndarray:
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _labels(figure: Any, axes: Any, x: str, y: str) -> None:
    """Write x below the lowest panel of each column (a legend may stand below it), y once."""
    lowest = {axis.get_subplotspec().colspan.start: axis for axis in axes}
    for axis in lowest.values():
        axis.set_xlabel(x, fontsize=10 if len(lowest) < 3 else 9)
    figure.supylabel(y, fontsize=10)
