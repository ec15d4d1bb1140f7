"""`fnn compare`."""

from dataclasses import dataclass
from typing import Annotated

from fnn import check
from fnn.cli.terminal import console, plain_warnings, printable, told


@dataclass(frozen=True)
class Compare:
    """Compare two studies: list where they differ by more than the spread over seeds."""

    a: Annotated[str, told("folder of the first study", "A")]
    b: Annotated[str, told("folder of the second study", "B")]
    rows: int = 20
    """how many of the largest differences to list, shared among the quantities"""


def run(options: Compare) -> int:
    """Do `fnn compare`."""
    import polars as pl
    from rich.table import Table
    from rich.text import Text

    from fnn.study import results, words
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
    if not beyond.height:
        return 0
    counts = joined.group_by("quantity").agg(pl.len(), pl.col("beyond").sum()).filter(pl.col("beyond") > 0)
    ranked = counts.sort(["beyond", "quantity"], descending=[True, False]).rows()
    for quantity, total, number in ranked:
        print(printable(f"  {quantity}: {number:,} of {total:,}"))
    axes = joined.columns[: joined.columns.index("step")]
    shown = [name for name in axes if joined[name].n_unique() > 1] + ["step", "layer", "path"]
    table = Table(
        title=Text(printable(f"the largest differences b - a of each quantity: a is {options.a}, b is {options.b}"))
    )
    for name in ("quantity", "unit", *shown, "a [10%, 90%]", "b [10%, 90%]", "b - a"):
        table.add_column(Text(words.axis(name)))
    each = max(1, options.rows // len(ranked))
    for quantity, _, _ in ranked[: options.rows]:
        told = words.quantity(quantity)
        for i, row in enumerate(beyond.filter(quantity=quantity).head(each).iter_rows(named=True)):
            bands = [
                "{:.4g} [{:.4g}, {:.4g}]".format(*(row[n + end] for end in ("", "_low", "_high"))) for n in ("a", "b")
            ]
            name, unit = quantity if i == 0 else "", "log10" if told.log else ""
            cells = (name, unit, *(words.value(row[n]) for n in shown), *bands, f"{row['difference']:+.4g}")
            table.add_row(*(Text(printable(word)) for word in cells), end_section=i + 1 == each)
    console().print(table)
    return 0
