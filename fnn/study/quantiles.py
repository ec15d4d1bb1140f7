"""Quantiles over seeds, of which some may be infinite: the log of a gradient that is zero is -inf."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars


def quantile(values: "polars.Expr", q: float) -> "polars.Expr":
    """Interpolate linearly between two seeds; beside an infinite one take that, where polars has NaN. For groups without NaN."""
    import polars as pl

    low, linear, high = (values.quantile(q, how) for how in ("lower", "linear", "higher"))
    exact = pl.when(low.is_infinite() | (low == high)).then(low)
    return exact.when(high.is_infinite()).then(high).otherwise(linear)
