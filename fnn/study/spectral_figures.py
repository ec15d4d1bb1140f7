"""Figures of a study's spectra: sharpness beside what the optimiser stands, singular values against depth, their density."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnn.plot import COLOURS, MARKERS
from fnn.spectra import stability
from fnn.study import canvas, figures, program, words
from fnn.study.quantiles import quantile
from fnn.study.spectral import PRECONDITIONED
from fnn.study.summary import Summary

PLAIN = ("sgd", "momentum")
"""Optimisers whose preconditioner is 1: what they stand is compared with the sharpness itself."""
LINES = {"max": "largest", "rms": "root mean square", "min": "smallest"}
BINS = 40


@functools.lru_cache(maxsize=1024)
def threshold(optimizer: str, rate: float) -> float:
    """Give the sharpness of P⁻¹H up to which an optimiser of the study is stable; see `curvature.preconditioned`."""
    tx, params = program.OPTIMIZERS[optimizer](rate), jnp.ones(1)
    state = tx.init(params)
    for _ in range(2):  # so that second moments are there
        state = tx.update(params, state, params)[1]
    return stability.respond("study", tx, state, params).threshold


def thresholds(s: Summary, quantity: str) -> dict[int, float]:
    """List the networks whose optimiser has a threshold for this quantity, and what it is."""
    known, found = PLAIN if quantity == "sharpness" else PRECONDITIONED, {}
    for row in s.networks.iter_rows(named=True):
        whole: Mapping[str, Any] = s.fixed | row
        if whole.get("optimizer") in known and isinstance(whole.get("learning_rate"), float):
            found[row["network"]] = threshold(whole["optimizer"], whole["learning_rate"])
    return found


def sharpness(s: Summary, quantity: str = "sharpness") -> Any:
    """Draw the sharpness, or the preconditioned one, against the step; dashed is what the optimiser stands.

    2/η for SGD, (2 + 2β)/η with momentum; for Adam and RMSProp the threshold holds for the preconditioned sharpness alone,
    and is drawn there. Clipping is not seen: steps that are cut short stand more.
    """
    return figures.training(s, quantity, "what the optimiser stands", thresholds(s, quantity))


def singular(s: Summary) -> Any:
    """Draw log10 of the largest, the root mean square and the smallest singular value of dy/dx against depth, at initialisation.

    Dashed is the wide nets' root mean square, dotted the fourth root of their mean s⁴: they part as isometry is lost.
    """
    import polars as pl
    from matplotlib.lines import Line2D

    part = s.singular.filter(pl.col("step") == 0)
    if part.is_empty() or "depth" not in s.axes or not canvas.is_numeric(s, "depth"):
        return None
    s = figures.at_start(s)
    part = part.join(s.networks.select("network", *s.axes), on="network", maintain_order="left")
    rest = [name for name in s.axes if name != "depth"]
    groups = part.partition_by(rest, as_dict=True, maintain_order=True) if rest else {(): part}
    figure, axes = canvas.grid(len(groups))
    theory = False
    for axis, (key, rows) in zip(axes, groups.items(), strict=False):
        for i, (end, name) in enumerate(LINES.items()):
            style = {"color": COLOURS[i], "marker": MARKERS[i]}
            canvas.line(axis, _over_seeds(rows, f"log10_singular_{end}").drop("predicted"), "depth", style, name)
        for end, kind in (("rms", "--"), ("fourth", ":")):
            told = _over_seeds(rows, f"log10_singular_{end}").drop_nulls("predicted")
            axis.plot(told["depth"], told["predicted"], color="k", linestyle=kind, linewidth=0.9)
            theory |= told.height > 0
        axis.set_title(canvas.title(dict(zip(rest, key, strict=True))), fontsize=9)
        depths = rows["depth"].unique().sort().to_list()
        if depths[0] > 0:
            axis.set_xscale("log", base=2)
        axis.set_xticks(depths, [str(n) for n in depths])
        axis.set_xticks([], minor=True)
    handles = canvas.one_of_each(axes)
    if theory:
        handles["wide nets: root mean square"] = Line2D([], [], color="k", linestyle="--", linewidth=0.9)
        handles["wide nets: fourth root of mean $s^4$"] = Line2D([], [], color="k", linestyle=":", linewidth=0.9)
    canvas.legend(figure, handles, "singular value", min(3, len(handles)))
    canvas.labels(figure, axes, "depth (hidden layers)", r"$\log_{10}$ singular value of $dy/dx$")
    alike = canvas.share(axes)
    note = f"at initialisation, first example: median of {canvas.seeds(s)}, shaded from 10th to 90th percentile"
    canvas.note(figure, note + "; scales differ between panels" * (not alike), len(groups))
    return figure


def density(s: Summary) -> Any:
    """Draw the density of log10 of all singular values of dy/dx at initialisation, all seeds together, a line a depth."""
    import polars as pl

    known = (pl.col("step") == 0) & (pl.col("quantity") == "log10_singular") & pl.col("value").is_finite()
    part = s.singular.filter(known)
    if part.is_empty():
        return None
    s = figures.at_start(s)
    by, panels = figures.panels_of(s, part["network"].unique().to_list())
    if not panels:
        return None
    values = list(dict.fromkeys(value for members in panels.values() for value, _ in members))
    ordered = bool(by) and canvas.is_numeric(s, by)
    styles = dict(zip(values, canvas.styles(len(values), ordered=ordered), strict=True))
    figure, axes = canvas.grid(len(panels))
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for value, network in members:
            logs = part.filter(pl.col("network") == network)["value"].to_numpy()
            heights, edges = np.histogram(logs, min(BINS, max(4, len(logs) // 10)), density=True)
            name = canvas.typeset(words.value(value)) if by else ""
            look = {"color": styles[value]["color"], "linestyle": styles[value].get("linestyle", "-")}
            axis.stairs(heights, edges, linewidth=1.2, label=name, **look)
        axis.set_title(title, fontsize=9)
    if any(handles := canvas.one_of_each(axes)):
        canvas.legend(figure, handles, words.axis(by), min(len(handles), 6))
    canvas.labels(figure, axes, r"$\log_{10}$ singular value of $dy/dx$", "density")
    canvas.note(figure, f"at initialisation, first example, {canvas.seeds(s)} together", len(panels))
    return figure


def _over_seeds(rows: Any, quantity: str) -> Any:
    """Take the median and the band over seeds of one quantity, by depth."""
    import polars as pl

    value = pl.col("value").drop_nans()
    found = (
        rows.filter(pl.col("quantity") == quantity)
        .group_by("depth")
        .agg(
            low=quantile(value, 0.1),
            middle=quantile(value, 0.5),
            high=quantile(value, 0.9),
            predicted=pl.col("predicted").median(),
        )
    )
    return found.sort("depth")


DRAWN = {
    "sharpness": sharpness,
    "preconditioned_sharpness": functools.partial(sharpness, quantity="preconditioned_sharpness"),
    "singular": singular,
    "singular_density": density,
}
"""Those of `fnn report`, by the names of their files."""
