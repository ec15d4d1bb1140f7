"""Report on a study: figures as PNG, and one HTML page with everything in it, which works offline."""

import html
import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fnn import files
from fnn.plot import COLOURS
from fnn.study import expected, figures, results, summary, table
from fnn.study.summary import ERROR, ERROR10, Summary

MOST_LAYERS = 160  # points of a curve on the page; deeper nets are thinned evenly
WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a table with the columns of a study and contents of another kind may raise while it is drawn."""
ABOUT = {
    ERROR: "error signal |dL/dh| after each kernel: root mean square over examples",
    ERROR10: "error signal |dL/dh| at each layer's output: root mean square over examples",
    "log_kernel": "weight gradient |dL/dW| of the mean loss: Frobenius norm",
    "log_kernel_rms": "weight gradient: root mean square over its entries",
    "log_bias": "bias gradient |dL/db|",
    "second_moment at preactivation": "variance of the pre-activations, E[h²]",
    "dead at activation": "share of units that are zero for the whole batch",
    "saturated at activation": "share of activations within 1 % of a bound",
    "update_ratio at kernel": "update over weight, |ΔW|/|W|",
    "cosine at kernel": "cosine between the weight gradient and the one recorded before",
}


def report(folder: str | os.PathLike[str]) -> list[Path]:
    """Write a study's figures and `report.html` into its folder; return the paths of what was written.

    The PNGs are `gradient.png` and `weights.png` (log norms against the layer, a line for each depth, theory dashed),
    `heat.png` (the gradient's rate over depth and sigma_w, with the critical line), `training.png` and `accuracy.png`; one
    that would have nothing to show is not written. The page holds all finished cells, with at most 160 layers of each
    curve, and lets the reader choose networks, quantity and step. It loads nothing from the internet. Lines are medians
    over seeds, bands reach from the 10th to the 90th percentile. Of a study that is still running, the finished cells are
    reported.

    A cell's file that is damaged, or belongs to another study, is left out and named in a warning and on the page.

    Errors: FileNotFoundError for a folder without a study or finished cells, ValueError for a damaged description,
    OSError for a folder that cannot be written, ImportError without matplotlib, polars and plotly (`fnn[study]`).
    """
    import polars as pl

    study = results.read(folder)
    folder = Path(folder)
    rows = study.table()
    draws = {
        "gradient.png": figures.gradient,
        "weights.png": lambda s: figures.gradient(s, "log_kernel"),
        "heat.png": figures.heat,
        "training.png": figures.training,
        "accuracy.png": figures.accuracy,
    }
    files.sweep(folder)
    try:
        s = summary.summarize(rows)
        drawn = {folder / name: figure for name, draw in draws.items() if (figure := draw(s)) is not None}
        for path, figure in drawn.items():
            files.save_figure(figure, path, 110, "report")
        parts = table.widened(rows), table.left_range(rows), expected.outside(rows)
        told = [f"{part.removeprefix('study: ')}." for part in parts if part]
        text = page(s, [*facts(study, s), *told], _name(folder))
    except (*WRONG, pl.exceptions.PolarsError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"report: {folder} must hold a study that can be drawn, got {first:.200}") from error
    files.write(folder / "report.html", text.encode(), "report")
    return [*drawn, folder / "report.html"]


def gradient(table: Any, *, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw a study's error signal at initialisation against the layer, from its table; save the figure if given a path.

    A panel for each combination of the other axes, a line for each depth: medians over seeds, shaded from the 10th to the
    90th percentile, mean-field theory dashed. Returns the figure, or None where the table has no error signal.
    """
    import polars as pl

    errors = table.filter(pl.col("quantity").is_in(["log_error", ERROR10]) & (pl.col("step") == 0))
    figure = figures.gradient(summary.summarize(errors))
    if figure is not None and path is not None:
        files.save_figure(figure, path, 110, "report")
    return figure


def _name(folder: Path) -> str:
    """Name a folder in letters that a page can hold, whatever bytes its name has."""
    return folder.resolve().name.encode(errors="replace").decode()


def facts(study: results.Results, s: Summary) -> list[str]:
    """Say in a few sentences what was measured, how much of it is finished, and where."""
    cells = len(study.description["cells"])
    seeds = s.networks["seeds"]
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    done = "All" if len(study.finished) == cells else f"{len(study.finished)} of"
    sentences = [f"{s.networks.height} networks, {count} runs each. {done} {cells} cells are finished."]
    sentences += [f"Left out: {why.removeprefix('study: ')}." for why in study.left_out.values()]
    if s.fixed:
        sentences.append("The same for all: " + ", ".join(f"{k} {_plain(v)}" for k, v in s.fixed.items()) + ".")
    if study.sessions:
        last = study.sessions[-1]
        versions, devices = last.get("versions"), last.get("devices")  # a file that anybody may have written
        versions = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions
        devices = ", ".join(map(str, devices)) if isinstance(devices, list) else devices
        where = "; ".join(str(part) for part in (devices, versions, last.get("commit")) if part)
        sentences.append(f"Measured on {where}." if where else "")
    return [sentence for sentence in sentences if sentence]


def page(s: Summary, sentences: list[str], title: str) -> str:
    """Fill the page: one string of HTML with data, plotly and program inside."""
    from plotly.offline import get_plotlyjs

    template = resources.files("fnn.study").joinpath("page.html").read_text()
    data = json.dumps(contents(s, sentences, title), separators=(",", ":"), allow_nan=False)
    # `</script>` inside a string would end the data, and `<!--<script>` hide its end: no string may hold a tag at all.
    parts = {"TITLE": html.escape(title, quote=False), "DATA": data.replace("<", "\\u003c"), "PLOTLY": get_plotlyjs()}
    head, *rest = template.split("{{")
    return head + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


def contents(s: Summary, sentences: list[str], title: str) -> dict[str, Any]:
    """Collect what the page draws, as JSON holds it: numbers to 5 digits, null for what is not finite."""
    import polars as pl

    critical = summary.critical_lines(s)
    networks = []
    for row in s.networks.iter_rows(named=True):
        whole = s.fixed | row
        plain = whole.get("norm", "none") == "none" and not whole.get("residual")
        pair = summary.line_of(whole)
        numbers = {k: _number(row[k]) for k in summary.OWN if k in row and k != "network"}
        axes = {k: _plain(row[k]) for k in s.axes}
        name = summary.label({k: row[k] for k in s.axes}) or "the network"
        networks.append(
            {"name": name, "axes": axes, "critical": _number(critical.get(pair)) if plain else None} | numbers
        )
    layers: dict[str, Any] = {}
    for (series, step, network), rows in s.layers.group_by("series", "step", "network", maintain_order=True):
        rows = rows.sort("layer")
        if series in (ERROR, ERROR10):
            rows = rows.filter(pl.col("layer") < pl.col("layer").max())
        chosen = np.unique(np.linspace(0, rows.height - 1, min(MOST_LAYERS, rows.height)).round().astype(int))
        layers.setdefault(series, {}).setdefault(str(step), {})[str(network)] = _curve(rows[chosen.tolist()], "layer")
    runs: dict[str, Any] = {}
    moving = s.runs.filter(pl.col("step").n_unique().over("series", "network") > 1)
    for (series, network), rows in moving.group_by("series", "network", maintain_order=True):
        runs.setdefault(series, {})[str(network)] = _curve(rows.sort("step"), "step")
    finals = {
        str(r["network"]): [_number(r[k]) for k in ("low", "middle", "high")] for r in s.finals.iter_rows(named=True)
    }
    first = [name for name in (ERROR, ERROR10, "log_kernel") if name in layers]
    return {
        "title": title,
        "facts": sentences,
        "axes": {name: [_plain(v) for v in s.networks[name].unique(maintain_order=True).to_list()] for name in s.axes},
        "networks": networks,
        "steps": sorted({int(step) for steps in layers.values() for step in steps}) or [0],
        "series": [{"id": n, "about": ABOUT.get(n, n)} for n in [*first, *sorted(set(layers) - set(first))]],
        "layers": layers,
        "runs": {n: runs[n] for n in sorted(runs, key=lambda n: (n != "train_loss", n))},
        "finals": finals,
        "colours": COLOURS,
    }


def _curve(rows: Any, x: str) -> dict[str, Any]:
    columns = [name for name in ("low", "middle", "high", "predicted") if name in rows.columns]
    curve = {"x": rows[x].to_list()} | {name: [_number(v) for v in rows[name].to_list()] for name in columns}
    if all(v is None for v in curve.get("predicted", [])):
        curve.pop("predicted", None)
    return curve


def _number(value: Any) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int | bool) else float(f"{value:.5g}")


def _plain(value: Any) -> Any:
    if value is None:
        return "none"
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value:g}"
