"""Depth studies: gradient norms by layer over depths, activations and norms, many seeds at once, beside the theory."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnn import check, data, flow, initializers, losses, meanfield, models


class Cell(NamedTuple):
    """One network of a study."""

    depth: int
    activation: str
    norm: str


QUANTITIES = ("log_error", "log_kernel", "log_kernel_rms", "log_bias", "mean", "second_moment", "dead", "saturated")


def cells(depths: Sequence[int], activations: Sequence[str], norms: Sequence[str]) -> list[Cell]:
    """Lay out the grid depths × activations × norms; refuse an empty axis and unknown names before anything runs."""
    from fnn.activations import TABLE

    for name, axis in (("depths", depths), ("activations", activations), ("norms", norms)):
        if not axis:
            raise ValueError(f"study: {name} must name at least one value, got none")
    for depth in depths:
        check.positive("study", depth=depth)
    for activation in activations:
        check.choice("study", [name for name, a in TABLE.items() if a.elementwise], activation=activation)
    for norm in norms:
        check.choice("study", ["none", *models.NORMS], norm=norm)
    return [Cell(d, a, n) for a, n, d in itertools.product(activations, norms, depths)]


def run(
    grid: Sequence[Cell],
    *,
    width: int = 64,
    seeds: int = 8,
    sigma_w: float = 1.0,
    sigma_b: float = 0.0,
    batch_size: int = 256,
    source: str = "digits",
    on_cell: Callable[[int, Cell], None] | None = None,
) -> Any:
    """Measure every cell at initialisation on one batch; return a tidy polars table.

    Weights are drawn from N(0, sigma_w²/fan_in), biases from N(0, sigma_b²); all seeds of a cell run under `vmap` in
    one compiled program. One row for each (cell, seed, layer, quantity), quantities as in `GradientFlow`, logs natural;
    `predicted` is mean-field theory's log_error at the same layer, set to the measured one at the last hidden layer,
    and null where there is no theory (other norms).
    """
    import polars as pl

    check.positive("study", width=width, seeds=seeds, batch_size=batch_size)
    check.above_zero("study", sigma_w=sigma_w)
    if not 0 <= sigma_b < np.inf:
        raise ValueError(f"study: sigma_b must be finite and at least 0, got {sigma_b}")
    train, _ = data.load(source, key=jax.random.key(0))
    if batch_size > train.size:
        raise ValueError(f"study: batch_size must be at most the {train.size} training examples, got {batch_size}")
    if not np.issubdtype(train.y.dtype, np.integer):
        raise ValueError(f"study: needs labelled classes, got targets {check.describe(train.y)}")
    batch = train.x[:batch_size], train.y[:batch_size]
    classes = int(train.y.max()) + 1
    tables, drawn = [], {}
    for number, cell in enumerate(grid):
        if on_cell is not None:
            on_cell(number, cell)
        flows = list(_flows(cell, width, classes, sigma_w, sigma_b, batch, seeds, drawn))
        predicted = _predict(cell, width, sigma_w, sigma_b, batch_size, flows)
        for seed, measured in enumerate(flows):
            rows = [row for row in measured.rows if row.quantity in QUANTITIES and row.layer > 0]
            tables.append(
                pl.DataFrame(
                    {
                        "layer": [row.layer for row in rows],
                        "path": [row.path for row in rows],
                        "quantity": [row.quantity for row in rows],
                        "value": [row.value for row in rows],
                        "predicted": [
                            predicted.get(row.layer)
                            if row.quantity == "log_error" and row.path.endswith("preactivation")
                            else None
                            for row in rows
                        ],
                    },
                    schema_overrides={"layer": pl.Int32, "predicted": pl.Float64},
                ).with_columns(
                    pl.lit(cell.depth).cast(pl.Int32).alias("depth"),
                    pl.lit(cell.activation).alias("activation"),
                    pl.lit(cell.norm).alias("norm"),
                    pl.lit(width).cast(pl.Int32).alias("width"),
                    pl.lit(float(sigma_w)).alias("sigma_w"),
                    pl.lit(float(sigma_b)).alias("sigma_b"),
                    pl.lit(seed).cast(pl.Int32).alias("seed"),
                )
            )
    columns = ["activation", "norm", "depth", "width", "sigma_w", "sigma_b", "seed"]
    return pl.concat(tables).select(*columns, "layer", "path", "quantity", "value", "predicted")


def summarize(table: Any) -> Any:
    """Reduce a study to a row a cell: medians over seeds of log |delta| at both ends, the measured and predicted slope.

    `slope` is the change of log |delta_l| for one layer towards the input, over the hidden layers.
    """
    import polars as pl

    errors = table.filter((pl.col("quantity") == "log_error") & pl.col("path").str.ends_with("preactivation"))
    hidden = errors.filter(pl.col("layer") <= pl.col("depth") + 1)
    cell = ["activation", "norm", "depth"]

    def end(column, layer):
        return pl.col(column).filter(pl.col("layer") == layer).first()

    ends = hidden.group_by([*cell, "seed"], maintain_order=True).agg(
        first=end("value", pl.col("layer").min()),
        last=end("value", pl.col("layer").max()),
        predicted=(end("predicted", pl.col("layer").min()) - end("predicted", pl.col("layer").max())),
        steps=pl.col("layer").max() - pl.col("layer").min(),
    )
    slope = (pl.col("first") - pl.col("last")) / pl.col("steps")
    return ends.group_by(cell, maintain_order=True).agg(
        first=pl.col("first").median(),
        last=pl.col("last").median(),
        slope=slope.median(),
        slope_low=slope.quantile(0.1),
        slope_high=slope.quantile(0.9),
        predicted_slope=(pl.col("predicted") / pl.col("steps")).median(),
    )


def save(table: Any, path: str | os.PathLike[str]) -> None:
    """Write a table as Parquet under a temporary name and rename it, so that no half-written file is ever seen."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            table.write_parquet(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"study: cannot write {path}: {reason}; choose another folder with --out") from None


def _flows(
    cell: Cell, width: int, classes: int, sigma_w: float, sigma_b: float, batch: Any, seeds: int, drawn: dict[Any, Any]
) -> Iterator[flow.GradientFlow]:
    net = models.mlp(
        cell.depth,
        width,
        classes,
        activation=cell.activation,
        norm=cell.norm,
        init=initializers.scaled(sigma_w),
        bias_init=initializers.normal(sigma_b) if sigma_b else "zeros",
        taps=True,
        unroll=1,  # one small program whatever the depth: a study pays more for compiling than for running
    )

    @jax.jit
    @jax.vmap
    def measure(params, state):
        return flow.measure(net, losses.cross_entropy, True, params, state, *batch, None)

    # The draws take as long to compile as the gradient does, and do not depend on the activation: cells share them.
    # A loop over seeds, since the generator compiles three times as fast for one key as under vmap.
    keys = jax.random.split(jax.random.key(1), seeds)
    kind = cell.depth, cell.norm
    if kind not in drawn:
        drawn[kind] = jax.jit(lambda keys: jax.lax.map(lambda key: net.init(key, batch[0])[0], keys))(keys)
    state = jax.jit(jax.vmap(lambda key: net.init(key, batch[0])[1]))(keys)
    measured = jax.device_get(measure(drawn[kind], state))
    for seed in range(seeds):
        yield flow.tabulate(jax.tree.map(lambda a, seed=seed: a[seed], measured))


def _predict(
    cell: Cell, width: int, sigma_w: float, sigma_b: float, batch_size: int, flows: Sequence[flow.GradientFlow]
) -> dict[int, float]:
    """Predict log_error for the hidden layers 1..depth+1, relative to the measured median at the last of them."""
    if cell.norm not in ("none", "batch_norm"):
        return {}
    hidden = cell.depth + 1
    if cell.norm == "batch_norm":
        theory = meanfield.predict(
            hidden, activation=cell.activation, sigma_w=sigma_w, sigma_b=sigma_b, norm="batch_norm", batch=batch_size
        )
    else:
        q0 = float(np.median([f.profile("second_moment")[1][0] for f in flows]))
        theory = meanfield.predict(hidden, activation=cell.activation, sigma_w=sigma_w, sigma_b=sigma_b, q0=q0)
    anchor = float(np.median([f.error[hidden - 1] for f in flows]))
    return {layer: anchor + float(log) for layer, log in enumerate(theory.log_error, 1)}
