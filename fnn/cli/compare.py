"""`fnn compare`."""

from dataclasses import dataclass

from fnn import check
from fnn.cli.terminal import console, plain_warnings, printable


@dataclass(frozen=True)
class Compare:
    """Compare two studies: list where they differ by more than the spread over seeds."""

    a: str
    """folder of the first study"""
    b: str
    """folder of the second study"""
    rows: int = 20
    """how many of the largest differences to list"""


def run(options: Compare) -> int:
    """Do `fnn compare`."""
    import polars as pl
    from rich.table import Table
    from rich.text import Text

    from fnn.study import results
    from fnn.study.compare import compare, different_axes

    check.positive("compare", rows=options.rows)
    with plain_warnings():
        left, right = (results.read(folder).table() for folder in (options.a, options.b))
    for name, (ours, theirs) in different_axes(left, right).items():
        print(printable(f"{name} is {ours} in {options.a}, {theirs} in {options.b}"))
    joined = compare(left, right)
    beyond = joined.filter(pl.col("beyond"))
    print(
        f"{beyond.height:,} of the {joined.height:,} rows that both studies have differ by more than the spread over "
        "seeds (10th to 90th percentile)"
    )
    counts = joined.group_by("quantity").agg(pl.len(), pl.col("beyond").sum()).filter(pl.col("beyond") > 0)
    for quantity, total, number in counts.sort("beyond", descending=True).iter_rows():
        print(printable(f"  {quantity}: {number:,} of {total:,}"))
    axes = joined.columns[: joined.columns.index("step")]
    shown = [name for name in axes if joined[name].n_unique() > 1] + ["step", "layer", "path", "quantity"]
    table = Table(title=Text(printable(f"the largest differences b - a: a is {options.a}, b is {options.b}")))
    for name in (*shown, "a [10 %, 90 %]", "b [10 %, 90 %]", "b - a"):
        table.add_column(Text(name))
    for row in beyond.head(options.rows).iter_rows(named=True):
        bands = [f"{row[n]:.4g} [{row[f'{n}_low']:.4g}, {row[f'{n}_high']:.4g}]" for n in ("a", "b")]
        words = (*(str(row[name]) for name in shown), *bands, f"{row['difference']:+.4g}")
        table.add_row(*(Text(printable(word)) for word in words))
    if beyond.height:
        console().print(table)
    return 0
