"""Report on a study: figures as PNG, SVG and PDF, and one HTML page with everything in it, which works offline."""

import base64
import gzip
import html
import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fnn import files
from fnn.plot import COLOURS
from fnn.study import figures, methods, results, spectral_figures, summary, table, verdict, words
from fnn.study.summary import ERROR, WATCHED_ERROR, Summary

if TYPE_CHECKING:
    import polars
    from matplotlib.figure import Figure

MOST_LAYERS = 64  # points of a curve on the page; deeper nets are thinned evenly
FORMATS = (".png", ".svg", ".pdf")
WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a table with the columns of a study and contents of another kind may raise while it is drawn."""


class Story(NamedTuple):
    """The words of a page."""

    name: str
    """Of the study's folder."""
    heading: str
    verdicts: list[str]
    """What came out; the first is the page's first sentence."""
    facts: list[str]
    methods: str
    """A paragraph for a paper."""
    again: str
    """The command that measures all this again."""
    load: str
    """One line of Python."""
    drawn: list[str]
    """Figures that lie beside the page."""
    chance: float | None
    """Accuracy of always guessing the commonest label."""


def report(folder: str | os.PathLike[str]) -> list[Path]:
    """Write a study's figures and `report.html` into its folder; return the paths of what was written, the page last.

    The figures are `gradient` and `weights` (log10 of norms against the layer, a line for each depth, theory dashed),
    `heat` (the gradient's growth over depth and sigma_w, with the critical line), `training`, `accuracy`, and, where spectra
    were measured, those of `spectral_figures`, each as PNG, SVG and PDF; one that would have nothing to show is not written. The page begins with what the study found, holds all
    finished cells, with at most 64 layers of each curve, and lets the reader choose networks, quantity and step. It loads
    nothing from the internet. Lines are medians over seeds, bands reach from the 10th to the 90th percentile. Of a study
    that is still running, the finished cells are reported.

    A cell's file that is damaged, or belongs to another study, is left out and named in a warning and on the page.

    Errors: FileNotFoundError for a folder without a study or finished cells, ValueError for a damaged description,
    OSError for a folder that cannot be written, ImportError without matplotlib, polars and plotly (`fnn[study]`).
    """
    import polars as pl

    study = results.read(folder)
    folder = Path(folder)
    rows = study.table()
    chance = methods.chance(study)
    draws = {
        "gradient": figures.gradient,
        "weights": lambda s: figures.gradient(s, "log10_kernel"),
        "heat": figures.heat,
        "training": figures.training,
        "accuracy": lambda s: figures.accuracy(s, chance),
        **spectral_figures.DRAWN,
    }
    files.sweep(folder)
    try:
        s = summary.summarize(rows)
        drawn = {name: figure for name, draw in draws.items() if (figure := draw(s)) is not None}
        for name, figure in drawn.items():
            for end in FORMATS:
                files.save_figure(figure, folder / (name + end), 110, "report")
        facts = [fact.removeprefix("study: ") for fact in table.facts(rows)]
        told = [f"{fact[:1].upper()}{fact[1:]}." for fact in facts]
        text = page(s, story(study, s, told, list(drawn)))
    except (*WRONG, pl.exceptions.PolarsError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"report: {folder} must hold a study that can be drawn, got {first:.200}") from error
    files.write(folder / "report.html", text.encode(), "report")
    return [*(folder / (name + end) for name in drawn for end in FORMATS), folder / "report.html"]


def gradient(table: "polars.DataFrame", *, path: str | os.PathLike[str] | None = None) -> "Figure | None":
    """Draw a study's error signal at initialisation against the layer, from its table; save the figure if given a path.

    A panel for each combination of the other axes, a line for each depth: medians over seeds, shaded from the 10th to the
    90th percentile, theory at the width of the nets dashed. Returns the figure, or None where the table has no error signal.
    """
    import polars as pl

    errors = table.filter((pl.col("quantity") == "log10_error") & (pl.col("step") == 0))
    figure = figures.gradient(summary.summarize(errors))
    if figure is not None and path is not None:
        files.save_figure(figure, path, 110, "report")
    return figure


def story(study: results.Results, s: Summary, told: list[str], drawn: list[str]) -> Story:
    """Put a study into words; `told` are more facts about its numbers."""
    chance, last = methods.chance(study), int(study.description["steps"][-1])
    found, name = verdict.sentences(s, chance, last), _name(study.folder or Path("study"))
    facts = [*methods.facts(study, s), *told]
    return Story(
        name,
        verdict.heading(s),
        found,
        facts,
        methods.sentence(study, s),
        methods.again(study),
        methods.load(study),
        drawn,
        chance,
    )


def _name(folder: Path) -> str:
    """Name a folder in letters that a page can hold, whatever bytes its name has."""
    return folder.resolve().name.encode(errors="replace").decode()


def page(s: Summary, told: Story) -> str:
    """Fill the page: one string of HTML with data, plotly and program inside."""
    from plotly.offline import get_plotlyjs

    template, program = (resources.files("fnn.study").joinpath(f"page.{end}").read_text() for end in ("html", "js"))

    def safe(text: str) -> str:
        return html.escape(text, quote=False)

    links = "".join(
        f"<li>{name}: " + ", ".join(f'<a href="{name}{end}">{end[1:].upper()}</a>' for end in FORMATS) + "</li>"
        for name in told.drawn
    )
    parts = {
        "TITLE": safe(f"{told.name}: {told.heading}"),
        "HEADING": safe(told.heading),
        "VERDICTS": "".join(f"<p>{safe(text)}</p>" for text in told.verdicts),
        "FACTS": "".join(f"<p>{safe(text)}</p>" for text in told.facts),
        "METHODS": safe(told.methods),
        "AGAIN": safe(told.again),
        "LOAD": safe(told.load),
        "LINKS": links or "<li>none: there was nothing to draw</li>",
        "PROGRAM": program,
        "DATA": _packed(json.dumps(contents(s, told.chance), separators=(",", ":"), allow_nan=False)),
        "PLOTLY": _packed(get_plotlyjs()),
    }
    head, *rest = template.split("{{")
    return head + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


def _packed(text: str) -> str:
    """Compress a text into letters that mean nothing to HTML; the browser unpacks it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def contents(s: Summary, chance: float | None = None) -> dict[str, Any]:
    """Collect what the page draws, as JSON holds it: numbers to 4 digits, null for what is not finite."""
    import polars as pl

    axes = [_axis(s, name) for name in s.axes]
    layers: dict[str, Any] = {}
    for (series, step, network), rows in figures.hidden(s, s.layers).group_by(
        "series", "step", "network", maintain_order=True
    ):
        rows = rows.sort("layer")
        chosen = np.unique(np.linspace(0, rows.height - 1, min(MOST_LAYERS, rows.height)).round().astype(int))
        curve = _curve(rows[chosen.tolist()], "layer")
        layers.setdefault(series, {}).setdefault(str(step), {})[str(network)] = curve
    runs: dict[str, Any] = {}
    moving = s.runs.filter(pl.col("step").n_unique().over("series", "network") > 1)
    for (series, network), rows in moving.group_by("series", "network", maintain_order=True):
        runs.setdefault(series, {})[str(network)] = _curve(rows.sort("step"), "step")
    finals = {
        str(r["network"]): [_number(r[k]) for k in ("low", "middle", "high")] for r in s.finals.iter_rows(named=True)
    }
    first = [name for name in (ERROR, WATCHED_ERROR, "log10_kernel") if name in layers]
    order = [*first, *sorted(set(layers) - set(first), key=lambda n: words.quantity(n).about)]
    return {
        "axes": [{"word": words.axis(name), **axis} for name, axis in zip(s.axes, axes, strict=True)],
        "networks": _networks(s, axes, chance),
        "steps": sorted({int(step) for steps in layers.values() for step in steps}) or [0],
        "series": [_told(name) for name in order],
        "layers": layers,
        "runs": runs,
        "runSeries": [_told(name) for name in sorted(runs, key=lambda n: (n != "train_loss", words.quantity(n).about))],
        "finals": finals,
        "last": _most(s.runs.filter(pl.col("series") == "accuracy")["step"]) if finals else 0,
        "chance": _number(chance),
        "map": [s.axes.index(n) for n in ("depth", "sigma_w") if n in s.axes and s.networks[n].dtype.is_numeric()],
        "thinned": _most(s.layers["layer"]) > MOST_LAYERS,
        "colours": COLOURS[:6],  # the seventh is black, which a dark page hides
    }


def _networks(s: Summary, axes: list[dict[str, Any]], chance: float | None) -> list[dict[str, Any]]:
    critical, found = summary.critical_lines(s), []
    trained = _most(s.runs["step"]) > 0
    for row in s.networks.iter_rows(named=True):
        whole = s.fixed | row
        plain = whole.get("norm", "none") == "none" and not whole.get("residual")
        found.append(
            {
                "name": verdict.name_of(s, row),
                "at": [axis["raw"].index(row[name]) for name, axis in zip(s.axes, axes, strict=True)],
                "seeds": row["seeds"],
                "gradient": verdict.gradient(row),
                "change": _number(verdict.change(row)),
                **{
                    f"growth{end}": _number(row[f"log10_growth{end}"], digits=9)
                    for end in ("", "_low", "_high", "_predicted")
                },
                "outside": _number(row["outside"], digits=9),
                "percent": verdict.percent(row),  # a browser rounds 12.5 up, Python to the even number
                "accuracy": _number(row["accuracy"], digits=9),
                "training": verdict.training(row, chance) if trained else None,
                "diverged": row["diverged"],
                "critical": _number(critical.get(summary.line_of(whole))) if plain else None,
            }
        )
    for axis in axes:
        del axis["raw"]
    return found


def _axis(s: Summary, name: str) -> dict[str, Any]:
    """List an axis's values, in order if they are numbers, as texts that differ from each other."""
    raw = s.networks[name].unique(maintain_order=True).to_list()
    numeric = s.networks[name].dtype.is_numeric() and None not in raw
    raw = sorted(raw) if numeric else raw
    texts = [words.value(value) for value in raw]
    texts = texts if len(set(texts)) == len(texts) else list(map(repr, raw))
    labels = [verdict.label(name, value) for value in raw]
    labels = labels if len(set(labels)) == len(labels) else [f"{words.axis(name)} {text}" for text in texts]
    return {"values": texts, "labels": labels, "numbers": raw if numeric else None, "raw": raw}


def _told(series: str) -> dict[str, Any]:
    told = words.quantity(series)
    return {
        "id": series,
        "axis": told.axis,
        "about": told.about,
        "log": told.log,
        "loss": told.axis in ("loss", "gradient norm"),
    }


def _curve(rows: Any, x: str) -> dict[str, Any]:
    columns = [name for name in ("low", "middle", "high", "predicted") if name in rows.columns]
    curve = {"x": rows[x].to_list()}
    curve |= {name: [_number(v) for v in rows[name].to_list()] for name in columns}
    if all(v is None for v in curve.get("predicted", [])):
        curve.pop("predicted", None)
    return curve


def _most(column: Any) -> int:
    return int(column.max() or 0)


def _number(value: Any, digits: int = 4) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int | bool) else float(f"{value:.{digits}g}")
