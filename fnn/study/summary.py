"""Summarize a study's table for terminal, figures and page: quantiles over seeds, by network, step, quantity and layer.

Columns are those that `results` lists. A *network* is one value of every axis but `seed`; a *series* is a quantity, with
the tap or parameter that it belongs to where a layer has several.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from fnn.layers.taps import PREACTIVATION
from fnn.study import nets
from fnn.study.axes import apart
from fnn.study.quantiles import quantile

if TYPE_CHECKING:
    import polars

ERROR = f"log10_error at {PREACTIVATION}"
WATCHED_ERROR = "log10_error"
"""The error signal of nets without taps, as `watch` measures it."""
OWN = (
    *("network", "series", "low", "middle", "high", "predicted", "seeds", "outside", "diverged", "accuracy"),
    *("log10_first", "log10_last", "log10_growth", "log10_growth_low", "log10_growth_high", "log10_growth_predicted"),
    *("predicted_low", "predicted_high", "theory_low", "theory_high", "growth"),
)
"""Columns that a summary adds."""
QUANTILES = {"low": 0.1, "middle": 0.5, "high": 0.9}


class Summary(NamedTuple):
    """Tables (polars) of one study; all carry the columns of `axes`, and `network`, the number of a combination."""

    axes: list[str]
    """Axes but the seed that have more than one value; the others are in `fixed`."""
    fixed: dict[str, Any]
    networks: "polars.DataFrame"
    """A row each: network, axes, seeds, outside, diverged, log10_first, log10_last, log10_growth, log10_growth_low,
    log10_growth_high, log10_growth_predicted, accuracy"""
    layers: "polars.DataFrame"
    """network, step, series, layer, low, middle, high; predicted, predicted_low, predicted_high: theory, and its band for
    one seed"""
    runs: "polars.DataFrame"
    """network, step, series, low, middle, high, of quantities of a whole run"""
    singular: "polars.DataFrame"
    """network, step, quantity, value, predicted: log10 of every singular value and of their moments, seeds not summarized"""
    finals: "polars.DataFrame"
    """network, low, middle, high, of the last recorded accuracy of each run; empty where none was recorded"""

    def shown(self) -> list[str]:
        """Name the axes that tell networks apart; the activation and depth of a network that is alone."""
        return self.axes or [name for name in ("activation", "depth") if name in self.fixed]


def summarize(table: "polars.DataFrame") -> Summary:
    """Take medians, 10th and 90th percentiles over seeds.

    Quantiles are over seeds alone: every other axis that varies tells networks apart. `log10_growth` is log10 |dL/dh_1| -
    log10 |dL/dh_L| over L - 1 at initialisation, for L hidden layers: the growth of the error signal for one layer towards
    the input; `log10_first` and `log10_last` are log10 |dL/dh| at layers 1 and L.
    `outside` is the share of predicted numbers whose seed lies outside theory's band, where 1 in 20 is expected; the
    number at the last hidden layer, through which theory is drawn, does not count; null where there is no theory.
    An axis with the name of a column of these tables is there as `seeds (axis)`.
    """
    import polars as pl

    table, axes = apart(table, table.columns[1 : table.columns.index("step")], OWN)
    others = [name for name in axes if name != "seed"]
    many = [name for name in others if table[name].n_unique() > 1]
    fixed = {name: next(iter(table[name]), None) for name in others if name not in many}
    keys = many or others[:1]
    networks = table.select(keys).unique(maintain_order=True).with_row_index("network")
    table = table.join(networks, on=keys, how="left", maintain_order="left", nulls_equal=True)
    tail = pl.when(pl.col("role") != "").then("role").otherwise(pl.col("path").str.split("/").list.last())
    plain = pl.col("quantity").str.replace("_rms$", "").str.replace("^log10_", "") == tail
    # Of a layer `watch` measures most quantities once: they need no place.
    once = [name for name in nets.WATCHED if name not in (*nets.GROUPS["gradient"], *nets.GROUPS["cosine"])]
    # A measurement of one's own may return a tree: each of its arrays is a series.
    whole_run = (pl.col("layer") == 0) & (pl.col("role").fill_null("") == "")
    tail = pl.when(whole_run).then("path").otherwise(tail)
    plain |= (whole_run & (pl.col("path").fill_null("") == "")) | (
        pl.col("quantity").is_in(once) & (pl.col("role") == "")
    )
    table = table.with_columns(series=pl.when(plain).then("quantity").otherwise(pl.col("quantity") + " at " + tail))
    run = ["network", "cell", *(["seed"] if "seed" in table.columns else [])]
    inner = table.filter(pl.col("layer") > 0).unique(
        [*run, "step", "series", "layer"], keep="first", maintain_order=True
    )
    inner = inner.rename({"low": "theory_low", "high": "theory_high"})
    spread = [quantile(pl.col("value").drop_nans(), q).alias(name) for name, q in QUANTILES.items()]
    layers = inner.group_by("network", "step", "series", "layer", maintain_order=True).agg(
        *spread,
        predicted=pl.col("predicted").median(),
        predicted_low=pl.col("theory_low").median(),
        predicted_high=pl.col("theory_high").median(),
    )
    singular = table.filter(pl.col("quantity").str.starts_with("log10_singular")).select(
        "network", "step", "quantity", "value", "predicted"
    )
    # Of all singular values of a net the table has a row each.
    whole = table.filter((pl.col("layer") == 0) & ~pl.col("quantity").is_in(["diverged", "log10_singular"]))
    runs = whole.group_by("network", "step", "series").agg(*spread).sort("network", "series", "step")
    accuracy = whole.filter(pl.col("quantity") == "accuracy").sort("step").group_by(run, maintain_order=True).last()
    finals = accuracy.group_by("network").agg(*spread).sort("network")
    ends = table.filter(pl.col("quantity") == "diverged").group_by("network")
    sizes = table.group_by("network").agg(
        seeds=pl.struct(run).n_unique(),
        outside=pl.col("outside").filter(pl.col("low") < pl.col("high")).cast(pl.Float64).mean(),
    )
    parts = (
        sizes,
        ends.agg(diverged=pl.col("value").sum().cast(pl.Int32)),
        _growth(inner, run),
        finals.select("network", accuracy="middle"),
    )
    for part in parts:
        networks = networks.join(part, on="network", how="left", maintain_order="left")
    return Summary(many, fixed, networks, layers, runs, singular, finals)


def _growth(inner: Any, run: list[str]) -> Any:
    """Growth of log10 of the error signal over the hidden layers: all with a tap before their activation, except the output's."""
    import polars as pl

    series = ERROR if (inner["series"] == ERROR).any() else WATCHED_ERROR
    # The output's layer may have no tap: then its kernel tells that it is there.
    inner = inner.with_columns(_output=pl.col("layer").max().over(run))
    errors = inner.filter((pl.col("series") == series) & (pl.col("step") == 0)).sort("layer")
    hidden = errors.filter(pl.col("layer") < pl.col("_output"))

    def growth(column):
        change = (pl.col(column).first() - pl.col(column).last()) / (pl.len() - 1)
        return pl.when(change.is_not_nan() & change.lt(math.inf)).then(change)  # -inf: it is zero in the first layer

    def known(growth):  # of most seeds, or it would be that of the few whose signal is not zero
        return pl.when(2 * pl.col("growth").is_not_null().sum() > pl.len()).then(growth)

    growths = {f"log10_growth{'' if name == 'middle' else f'_{name}'}": q for name, q in QUANTILES.items()}
    value = pl.col("value")
    each = hidden.group_by(run).agg(
        growth=growth("value"), predicted=growth("predicted"), log10_first=value.first(), log10_last=value.last()
    )
    return each.group_by("network").agg(
        *(quantile(pl.col(name).drop_nans(), 0.5).alias(name) for name in ("log10_first", "log10_last")),
        *(known(quantile(pl.col("growth"), q)).alias(name) for name, q in growths.items()),
        log10_growth_predicted=pl.col("predicted").median(),
    )


def critical_lines(summary: Summary) -> dict[tuple[str, float], float]:
    """Find sigma_w of the critical line for every (activation, sigma_b) of the plain networks, where there is one."""
    from fnn.layers.activations import TABLE
    from fnn.theory import meanfield

    found = {}
    rows = [summary.fixed | row for row in summary.networks.iter_rows(named=True)]
    for row in rows:
        plain = row.get("norm", "none") == "none" and not row.get("residual") and row.get("init", "scaled") == "scaled"
        pair = line_of(row)
        if not plain or pair in found or pair[0] not in TABLE or not TABLE[pair[0]].elementwise:
            continue
        try:
            found[pair] = meanfield.critical(*pair)
        except (ValueError, ArithmeticError):
            continue  # nothing crosses
    return found


def line_of(row: dict[str, Any]) -> tuple[Any, float]:
    """Name the critical line of a network: its activation and sigma_b. A user's own net may use these names for anything."""
    sigma_b = row.get("sigma_b") or 0.0
    return row.get("activation"), float(sigma_b) if isinstance(sigma_b, int | float) else math.nan
