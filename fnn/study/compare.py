"""Compare two studies: where is the difference between them larger than the differences between seeds?"""

import os
from typing import TYPE_CHECKING, Any

from fnn.study import results
from fnn.study.axes import apart
from fnn.study.quantiles import quantile

if TYPE_CHECKING:
    import polars

ADDED = ("a", "b", "a_low", "a_high", "b_low", "b_high", "seeds_a", "seeds_b", "difference", "beyond")
OWN = ("cell", "seed", "value", "predicted", "low", "high", "outside", "float64")


def compare(
    a: "str | os.PathLike[str] | results.Results | polars.DataFrame",
    b: "str | os.PathLike[str] | results.Results | polars.DataFrame",
    *,
    level: float = 0.1,
) -> "polars.DataFrame":
    """Join two studies and mark where their bands over seeds, the [level, 1 - level] quantiles, do not overlap.

    `a` and `b` are folders, `Results`, or tables. The result has a row for each (axes, step, layer, path, quantity) that
    both hold: `a`, `b` (medians over seeds), `a_low`, `a_high`, `b_low`, `b_high`, `seeds_a`, `seeds_b`, `difference` = b - a,
    and `beyond`, whether one band ends before the other begins. Rows with `beyond` come first, the largest differences at
    the top. An axis with one value in a and another one in b is what is being compared, so rows are not matched by it.
    With one seed in each the bands are points, and every difference is beyond them. An axis with the name of a column of
    the result is renamed to `a (axis)`.

    Errors: ValueError for studies that share no row, an axis of two types, an axis with several values that one study alone
    has, a table that is not a study's, or a level outside [0, 0.5); TypeError for what is no study.
    """
    import polars as pl

    if not 0 <= level < 0.5:
        raise ValueError(f"compare: level must lie in [0, 0.5), got {level}; 0.1 gives bands of four seeds in five")
    left, right = (
        apart(table, table.columns[1 : table.columns.index("step")], ADDED)[0] for table in (_table(a), _table(b))
    )
    # Where a run ended is no step to match it by.
    start = pl.when(pl.col("quantity") == "diverged").then(pl.lit(0, pl.Int64)).otherwise(pl.col("step"))
    left, right = (table.with_columns(start.cast(table.schema["step"]).alias("step")) for table in (left, right))
    for here, there, names in (("a", "b", (left, right)), ("b", "a", (right, left))):
        _check_alone(here, there, *names)
    varied = different_axes(left, right)
    keys = [name for name in left.columns if name in right.columns and name not in (*OWN, *varied)]
    for name in keys:
        kinds = left.schema[name], right.schema[name]
        if kinds[0] != kinds[1]:
            if not all(kind.is_numeric() for kind in kinds):
                raise ValueError(
                    f"compare: {name} must have one type in both studies, got {kinds[0]} in a and {kinds[1]} in b; "
                    "give the axis another name in one of them"
                )
            left, right = (table.with_columns(pl.col(name).cast(pl.Float64)) for table in (left, right))

    def bands(table, name):
        value = pl.col("value")
        groups = table.filter(value.is_not_nan()).group_by(keys, maintain_order=True)
        return groups.agg(
            quantile(value, 0.5).alias(name),
            quantile(value, level).alias(f"{name}_low"),
            quantile(value, 1 - level).alias(f"{name}_high"),
            value.len().alias(f"seeds_{name}"),
        )

    joined = bands(left, "a").join(bands(right, "b"), on=keys, how="inner", maintain_order="left", nulls_equal=True)
    if joined.is_empty():
        axes = ", ".join(keys[: keys.index("step")]) or "axes"
        raise ValueError(
            f"compare: the studies must share a row, got none with the same {axes}; compare studies whose grids overlap"
        )
    # Where both are -inf (a gradient that is zero) the difference is NaN, and nothing differs.
    difference = (pl.col("b") - pl.col("a")).fill_nan(0.0)
    joined = joined.with_columns(
        difference.alias("difference"),
        ((pl.col("a_high") < pl.col("b_low")) | (pl.col("b_high") < pl.col("a_low"))).alias("beyond"),
    )
    return joined.sort(["beyond", pl.col("difference").abs()], descending=[True, True], maintain_order=True)


def different_axes(left: "polars.DataFrame", right: "polars.DataFrame") -> dict[str, tuple[Any, Any]]:
    """Find the axes that have one value in each table, but not the same: {axis: (value in left, value in right)}."""
    found = {}
    for name in left.columns[1 : left.columns.index("step")]:
        if name == "seed" or name not in right.columns:
            continue
        ours, theirs = left[name].unique(), right[name].unique()
        if len(ours) == len(theirs) == 1 and ours[0] != theirs[0]:
            found[name] = (ours[0], theirs[0])
    return found


def _check_alone(here: str, there: str, table: "polars.DataFrame", other: "polars.DataFrame") -> None:
    """Refuse an axis of one study alone with several values that no other axis tells: they would count as seeds."""
    axes = [name for name in table.columns[: table.columns.index("step")] if name != "cell"]
    common = [name for name in axes if name in other.columns]
    for name in axes:
        runs = table.select({*common, name}).unique()
        if name not in (*OWN, *other.columns) and runs.height > runs.select(common).n_unique():
            raise ValueError(
                f"compare: an axis with several values must be in both studies, got {name} with {table[name].n_unique()} values "
                f"in {here}, and not in {there}; compare tables filtered to one of them"
            )


def _table(source: Any) -> "polars.DataFrame":
    if not hasattr(source, "columns"):
        if not isinstance(source, str | os.PathLike | results.Results):
            raise TypeError(
                f"compare: a study must be a folder, Results, or a table, got {type(source).__name__}; pass what run() returns"
            )
        return (source if isinstance(source, results.Results) else results.read(source)).table()
    needed = ("cell", "step", "layer", "path", "quantity", "value")
    if missing := [name for name in needed if name not in source.columns]:
        raise ValueError(f"compare: a table must be that of a study, got one without the column {missing[0]}")
    return source
