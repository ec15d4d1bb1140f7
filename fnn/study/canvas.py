"""What the figures of a study share: panels, lines with their bands, legends off the data, and the note at the top."""

import math
from typing import Any

import numpy as np

from fnn.plot import COLOURS, MARKERS
from fnn.plot import words as shown
from fnn.study import verdict, words
from fnn.study.summary import Summary

MOST_PANELS = 24
ALIKE = 6.0
"""Panels share a scale where the longest range is at most this many times the shortest."""


def is_numeric(s: Summary, axis: str) -> bool:
    """Whether an axis holds numbers; in a user's own net `depth` may be anything."""
    if axis not in s.axes:
        return isinstance(s.fixed.get(axis), int | float)
    return s.networks[axis].dtype.is_numeric()


def title(values: dict[str, Any]) -> str:
    """Name a panel, in two lines where one would run into the next panel."""
    parts = [verdict.label(name, value) for name, value in values.items()]
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= 44 or not lines[-1] else [*lines[:-1], lines[-1] + ",", part]
    return "\n".join(typeset(line) for line in lines[:6])


def typeset(text: str) -> str:
    return shown(text).replace("σ_w", r"$\sigma_w$").replace("σ_b", r"$\sigma_b$")


def seeds(s: Summary) -> str:
    seeds: Any = s.networks["seeds"]
    least, most = seeds.min(), seeds.max()
    return words.count(int(most), "seed") if least == most else f"{least} to {most} seeds"


def styles(n: int, ordered: bool) -> list[dict[str, Any]]:
    """Give n lines looks of their own: seven colours that the colour-blind can tell apart, or, of many numbers, a scale."""
    if n > len(COLOURS) and ordered:
        from matplotlib import colormaps

        scale = colormaps["viridis"](np.linspace(0, 0.93, n))
        return [{"color": tuple(scale[i]), "marker": MARKERS[i % len(MARKERS)]} for i in range(n)]
    kinds = ("-", "-.", ":")
    looks = [(COLOURS[i % 7], MARKERS[(i + i // 7) % 7], kinds[i // 7 % 3]) for i in range(n)]
    return [{"color": colour, "marker": marker, "linestyle": kind} for colour, marker, kind in looks]


def grid(n: int, size: tuple[float, float] = (3.3, 2.5), columns: int = 0) -> tuple[Any, np.ndarray]:
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


def columns(axes: Any) -> int:
    return int(axes[0].get_gridspec().ncols)


def line(axis: Any, rows: Any, x: str, style: dict[str, Any], name: str, *, bars: bool = False) -> bool:
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
        if "predicted_low" in rows.columns:
            ends = [rows[f"predicted_{end}"].cast(float).to_numpy() for end in ("low", "high")]
            axis.fill_between(at, *ends, facecolor="none", edgecolor="0.4", linewidth=0.6, linestyle=":")
        return True
    return False


def share(axes: Any) -> bool:
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


def one_of_each(axes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def legend(figure: Any, handles: dict[str, Any], title: str, columns: int) -> None:
    """Put one legend below the panels, off the data."""
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
        title=typeset(title),
        title_fontsize=8,
    )


def note(figure: Any, text: str, panels: int) -> None:
    if panels > MOST_PANELS:
        text += f"\nthe first {MOST_PANELS} of {panels} panels"
    width = int(figure.get_size_inches()[0] * 15)
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, word]
    figure.suptitle("\n".join(lines), fontsize=8, color="0.25")


def edges(x: np.ndarray) -> np.ndarray:
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def labels(figure: Any, axes: Any, x: str, y: str) -> None:
    """Write x below the lowest panel of each column (a legend may stand below it), y once."""
    lowest = {axis.get_subplotspec().colspan.start: axis for axis in axes}
    for axis in lowest.values():
        axis.set_xlabel(x, fontsize=10 if len(lowest) < 3 else 9)
    figure.supylabel(y, fontsize=10)
