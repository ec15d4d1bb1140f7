"""The table that `fnn study` prints: a row for each network, as many columns as the terminal is wide."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fnn.cli.terminal import console, printable
from fnn.study import verdict, words
from fnn.study.summary import Summary

MOST_ROWS = 60
"""Networks in the printed table."""


class Column(NamedTuple):
    """A column of numbers or verdicts, in the order in which columns are given up where the terminal is narrow."""

    title: str
    text: Callable[[dict[str, Any]], str]


def print_networks(s: Summary, chance: float | None, trained: bool) -> None:
    """Print one row for each network: its axes, and the growth of log10 |dL/dh| per layer towards the input.

    Where the terminal is too narrow, whole columns are left out and named below; no number is cut.
    """
    from rich.table import Table
    from rich.text import Text

    rows = [s.fixed | row for row in s.networks.head(MOST_ROWS).iter_rows(named=True)]
    names = s.shown()
    left = [[words.value(row[name]) for row in rows] for name in names]
    columns = [column for column in _columns(chance, trained) if any(column.text(row) for row in rows)]
    screen = console()
    room = screen.width - 1 - sum(_width(words.axis(n), c) for n, c in zip(names, left, strict=True))
    kept = []
    for column in sorted(columns, key=lambda c: ORDER.index(c.title)):
        wide = _width(column.title, map(column.text, rows))
        if wide <= room:
            kept.append(column.title)
            room -= wide
    table = Table(title="log10 |dL/dh| at initialisation, medians over seeds", header_style="bold")
    for name, texts in zip(names, left, strict=True):
        numeric = all(text[:1] in "-0123456789" for text in texts)
        table.add_column(Text(printable(words.axis(name)).replace(" ", "\n")), justify="right" if numeric else "left")
    shown = [column for column in columns if column.title in kept]
    for column in shown:
        table.add_column(column.title.replace(" ", "\n"), justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        texts = [*(Text(printable(texts[i])) for texts in left), *(Text(c.text(row)) for c in shown)]
        table.add_row(*texts)
    screen.print(table)
    missing = [column.title for column in columns if column.title not in kept]
    print("growth: change of log10 |dL/dh| per layer towards the input; band: 10th to 90th percentile over seeds")
    if missing:
        print(f"not shown, for lack of width: {', '.join(missing)}")
    if (more := s.networks.height - MOST_ROWS) > 0:
        print(f"and {words.count(more, 'more network')}, which fnn report shows")


ORDER = (
    *("growth", "gradient", "theory", "outside", "training", "accuracy", "band", "not finite", "at layer 1", "at last"),
)
"""Columns from the most to the least important."""


def _width(title: str, texts: Iterable[str]) -> int:
    """Give the width of a column whose title stands one word a line, with its border."""
    return max(map(len, (*title.split(), *texts))) + 3


def _columns(chance: float | None, trained: bool) -> list[Column]:
    def number(name: str, digits: int = 4) -> Callable[[dict[str, Any]], str]:
        return lambda row: _number(row[name], digits)

    def band(row: dict[str, Any]) -> str:
        low, high = number("log10_growth_low")(row), number("log10_growth_high")(row)
        return f"{low} {high}" if low else ""

    return [
        Column("gradient", lambda row: verdict.gradient(row) or ""),
        Column("growth", number("log10_growth")),
        Column("band", band),
        Column("theory", number("log10_growth_predicted")),
        Column("outside", verdict.percent),
        Column("at layer 1", number("log10_first", 2)),
        Column("at last", number("log10_last", 2)),
        Column("accuracy", lambda row: f"{row['accuracy']:.3f}" if trained and row["accuracy"] is not None else ""),
        Column("training", lambda row: (trained and verdict.training(row, chance)) or ""),
        Column("not finite", lambda row: f"{row['diverged']} of {row['seeds']}" if row.get("diverged") else ""),
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}f}"
