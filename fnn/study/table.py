"""Turn what a cell measured into rows of the study's table, with theory beside it; `results` lists the columns."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fnn import tree
from fnn.gradients import flow
from fnn.layers.taps import PREACTIVATION, STATISTICS
from fnn.study import cell, expected, nets, spectral
from fnn.study.axes import FLOATS

TRACED = ("seed", *FLOATS)
"""Axes that do not change a program."""
_TRACES = {"loss": "train_loss", "accuracy": "train_accuracy"}
MOST_TRACED = 256
PLACE = ("layer", "path", "role", "quantity")
NUMBERS = ("value", "predicted", "low", "high")
OF_PAIRS = (
    *("update_ratio", "cosine", "loss", "accuracy", "train_loss", "train_accuracy", "grad_norm", "clip_fraction"),
    *("clip_removed", "diverged"),
)
"""Quantities that nets of any framework have, besides those of `watch`."""
QUANTITIES = (
    *(
        "log10_error",
        "log10_kernel",
        "log10_kernel_rms",
        "log10_bias",
        "log10_bias_rms",
        "log10_scale",
        "log10_scale_rms",
    ),
    *(*STATISTICS, *OF_PAIRS),
)


def schema(axes: Mapping[str, str]) -> dict[str, Any]:
    """Give the columns and their types; `axes` names each axis's type: int, float, bool or str."""
    import polars as pl

    types = {"int": pl.Int32, "float": pl.Float64, "bool": pl.Boolean, "str": pl.String}
    place = {"step": pl.Int32, "layer": pl.Int32, "path": pl.String, "role": pl.String, "quantity": pl.String}
    numbers = dict.fromkeys(NUMBERS, pl.Float64)
    columns = {name: types[kind] for name, kind in axes.items()}
    return {"cell": pl.Int32, **columns, **place, **numbers, "outside": pl.Boolean, "float64": pl.Boolean}


def build(
    number: int,
    task: cell.Cell,
    measured: cell.Measured,
    *,
    axes: Mapping[str, str],
    quantities: Sequence[str] | None,
    theory: expected.Theory | None,
) -> Any:
    """Make the table of one cell: polars, columns as in `schema`, runs in order, then steps, then the net's order.

    `theory` is `expected.of` the study; None for nets that it does not cover.
    """
    import polars as pl

    steps = task.steps
    labels, of_layers = measured.labels, len(measured.labels)
    extra = _extra_labels(measured.extra, {label.path: label.layer for label in labels})
    labels = labels + [label for label, _ in extra] + [_label(0, "", name) for name in sorted(measured.losses)]
    columns = [
        measured.values,
        *(v[..., None] for _, v in extra),
        *(measured.losses[n][..., None] for n in sorted(measured.losses)),
    ]
    values = np.concatenate([np.asarray(column, np.float64) for column in columns], axis=-1)
    names = [label.quantity for label in labels]
    keep = [i for i, name in enumerate(names) if (name != "peak" if quantities is None else name in quantities)]
    labels, names, values = [labels[i] for i in keep], [names[i] for i in keep], values[..., keep]
    finite = np.isfinite(measured.probe)
    predicted = (
        _predictions(task, labels, values, theory, finite[:, 0], finite[:, 0] | measured.wide)
        if theory is not None
        else np.full((3, *values.shape), np.nan)
    )
    predicted[:, :, 1:] = np.nan  # theory speaks of the initialisation
    columns = schema(axes)
    ends, diverged = _ends(measured, steps)
    within = (np.array(steps) <= np.array(ends)[:, None])[..., None]
    wide = (measured.wide[:, None] & (np.arange(len(steps)) == 0))[..., None] & (np.array(keep) < of_layers)
    shown = within & (finite[..., None] | wide)
    # The first record has no gradient before it, and a zero weight no ratio: no row, rather than a NaN.
    cosine, ratio = np.isin(names, ["cosine"]), np.isin(names, ["update_ratio"])
    first = (np.arange(len(steps)) == 0)[:, None]
    # Adam and RMSProp precondition nothing before their first step.
    unmade = np.isin(names, ["preconditioned_sharpness"]) & first & np.isnan(values)
    missing = (ratio | cosine) & np.isnan(values) | (cosine & first) | unmade
    places = pl.DataFrame(
        {name: [getattr(label, name) for label in labels] for name in PLACE},
        schema={name: columns[name] for name in PLACE},
    )
    r, k, i = np.nonzero(shown & ~missing)
    numbers = zip(NUMBERS, (values, *predicted), strict=True)
    inner = places[i].with_columns(
        pl.Series(" run", r, pl.Int32),
        pl.Series("step", np.array(steps, np.int32)[k], pl.Int32),
        *(pl.Series(name, a[r, k, i], pl.Float64, nan_to_null=name != "value") for name, a in numbers),
        pl.Series("float64", wide[r, k, i] | (measured.probe.dtype == np.float64), pl.Boolean),
    )
    runs = pl.DataFrame(task.runs, schema={name: columns[name] for name in task.runs[0]}).with_row_index(" run")
    traces = [
        (r, *row, measured.probe.dtype == np.float64)
        for r, end in enumerate(ends)
        for row in _traces(measured, r, end, diverged[r], quantities)
    ]
    kept = {" run": pl.Int32, **{n: columns[n] for n in ("step", *PLACE, *NUMBERS, "float64")}}
    whole = pl.DataFrame(traces, schema=kept, orient="row")
    table = pl.concat([inner.select(list(kept)), whole]).sort(" run", maintain_order=True)
    table = table.join(runs.cast({" run": pl.Int32}), on=" run", maintain_order="left").with_columns(
        *(pl.lit(value, columns[name]).alias(name) for name, value in task.static.items()),
        pl.lit(number, pl.Int32).alias("cell"),
        pl.when(pl.col("value").is_not_nan())
        .then((pl.col("value") < pl.col("low")) | (pl.col("value") > pl.col("high")))
        .alias("outside"),
    )
    return table.select(list(columns))


def left_range(frame: Any) -> str | None:
    """Say which cells hold NaN because their signal left the range of the float type; None if there are none."""
    import polars as pl

    forward = pl.col("quantity").is_in([*STATISTICS, *nets.GROUPS["activation"]])
    others = ["log10_gradient_to_weight", *spectral.QUANTITIES]  # NaN for reasons of their own
    backward = pl.col("quantity").str.starts_with("log10_") & ~pl.col("quantity").is_in(others)
    own = (pl.col("layer") == 0) & (pl.col("path") == "")  # numbers of the user's that are called log10_...
    rows = frame.filter((forward | (backward & ~own)) & pl.col("value").is_nan())
    if rows.is_empty():
        return None
    runs, first = _runs_of(rows), next(filter(len, (rows.filter(forward), rows))).row(0, named=True)
    wide = rows["float64"].all()
    hint = "use fewer layers" if wide else "JAX_ENABLE_X64=1 measures them in float64"
    steps = rows["step"].unique().sort().to_list()
    when = "" if steps[0] == 0 else f" at step {', '.join(map(str, steps[:3]))}{', ...' * (len(steps) > 3)}"
    return (
        f"study: {runs} left the range of {'float64' if wide else 'float32'}{when}, first at layer {first['layer']} "
        f"({first['path']}), and what depends on it is NaN; {hint}"
    )


def widened(frame: Any) -> str | None:
    """Say which cells were measured in float64 at initialisation, and are otherwise of float32; None if there are none."""
    import polars as pl

    rows = frame.filter("float64")
    if rows.is_empty() or frame.filter(pl.col("quantity") == "diverged")["float64"].any() or frame["float64"].all():
        return None
    return (
        f"study: {_runs_of(rows)} were measured in float64 at step 0, because their signal leaves the range of float32; loss, "
        "accuracy and training are those of float32"
    )


def rounded(frame: Any) -> str | None:
    """Say in which cells rounding grows to the size of the signal, so that their numbers are those of one rounding.

    A small relative change of h_1 grows in h_l, in the root mean over directions, by `g = |dL/dh_1| |h_1|/(|dL/dh_l| |h_l|)`,
    |h| the root mean square per unit. Named are runs where g times the float type's eps exceeds a hundredth at
    initialisation: deep nets with batch norm, or tanh with a large sigma_w. What was not measured in float64 is taken for
    float32. None if there are none.
    """
    import polars as pl

    run = _run_columns(frame)
    log = pl.when(pl.col("quantity") == "log10_error").then("value").otherwise(pl.col("value").log10() / 2)
    first = frame.filter(
        pl.col("step") == 0, pl.col("role") == PREACTIVATION, pl.col("quantity").is_in(["log10_error", "second_moment"])
    )
    sizes = first.group_by(*run, "layer", "path").agg(
        log.sum().alias(" size"), pl.len().alias(" len"), pl.col("float64").first()
    )
    sizes = sizes.filter(pl.col(" len") == 2, pl.col(" size").is_finite()).sort("layer")
    digits = [-np.log10(np.finfo(dtype).eps) for dtype in (np.float64, np.float32)]
    least = pl.when(pl.col("float64").first()).then(digits[0] - 2).otherwise(digits[1] - 2)
    rows = (
        sizes.group_by(run)
        .agg((pl.col(" size").first() - pl.col(" size").min() > least).alias(" lost"))
        .filter(" lost")
    )
    if rows.is_empty():
        return None
    return (
        f"study: in {_runs_of(rows)} rounding grows from layer to layer beyond a hundredth of the signal: another machine or "
        "version of JAX changes their numbers as other seeds would"
    )


def facts(frame: Any) -> list[str]:
    """List what a reader of the table has to know about its numbers: `widened`, `left_range` and `rounded`."""
    return [sentence for sentence in (widened(frame), left_range(frame), rounded(frame)) if sentence]


def _run_columns(rows: Any) -> list[str]:
    """Name the columns that tell a run: its cell, and the values of all axes."""
    return list(itertools.takewhile(lambda name: name not in ("step", " lost"), rows.columns))


def _runs_of(rows: Any) -> str:
    """Count the runs of some rows, and name their cells: `8 runs of cells 24, 29`."""
    run, numbers = _run_columns(rows), rows["cell"].unique().sort().to_list()
    cells = f"cell{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
    return f"{rows.select(run).n_unique()} runs of {cells}"


def _ends(measured: cell.Measured, steps: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Give each run's last step, and whether it ends there because loss or gradient was not finite."""
    ends, diverged = [], []
    for r in range(measured.probe.shape[0]):
        bad = [step for step, loss in zip(steps, measured.probe[r], strict=True) if not np.isfinite(loss)]
        for name in ("loss", "grad_norm"):
            if name in measured.traces:
                bad += np.nonzero(~np.isfinite(measured.traces[name][r]))[0][:1].tolist()
        ends.append(min(bad, default=steps[-1]))
        diverged.append(bool(bad))
    return ends, diverged


def _traces(
    measured: cell.Measured, r: int, end: int, diverged: bool, quantities: Sequence[str] | None
) -> list[tuple[Any, ...]]:
    """List the rows of a whole run: step, layer, path, role, quantity, value, and no prediction."""
    rows: list[tuple[Any, ...]] = []
    for name, trace in measured.traces.items():
        quantity = _TRACES.get(name, name)
        if quantities is None or quantity in quantities:
            shown = np.unique(np.linspace(0, len(trace[r]) - 1, min(MOST_TRACED, len(trace[r]))).round().astype(int))
            times = (int(t) for t in shown if t < end or (t == end and not diverged))
            rows += [(t, 0, "", "", quantity, float(trace[r][t]), None, None, None) for t in times]
    if quantities is None or "diverged" in quantities:
        rows.append((end, 0, "", "", "diverged", float(diverged), None, None, None))
    return rows


def _label(layer: int, path: str, quantity: str) -> flow.Label:
    return flow.Label(layer, path, quantity, "", ())


def _extra_labels(extra: dict[str, Any], layers: dict[str, int]) -> list[tuple[flow.Label, np.ndarray]]:
    """Label measurements beside those of `flow`: the layer is that of the parameter or tap of the same path, else 0."""
    parents = {path.rpartition("/")[0]: layer for path, layer in layers.items() if "/" in path}
    found = []
    for name, measurement in extra.items():
        leaves, treedef = jax.tree.flatten(measurement)
        shapes = [np.shape(leaf)[2:] for leaf in leaves]
        starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        places = [np.arange(int(np.prod(s))).reshape(s) + start for s, start in zip(shapes, starts, strict=False)]
        values = [np.asarray(leaf, np.float64).reshape(*np.shape(leaf)[:2], -1) for leaf in leaves]
        values = np.concatenate(values, axis=-1) if values else np.zeros((0, 0, 0))
        for path, place in tree.rows(treedef.unflatten(places)):
            layer = layers.get(path, parents.get(path, 0))
            for index in np.ndindex(np.shape(place)):
                full = f"{path}[{','.join(map(str, index))}]" if index else path
                found.append((_label(layer, full, name), values[..., place[index]]))
    return found


def _predictions(
    task: cell.Cell, labels: Sequence[flow.Label], values: np.ndarray, theory: expected.Theory, good: Any, known: Any
) -> np.ndarray:
    """Predict log10_error of the hidden layers and the singular values' moments of every run, nan where not known.

    float64[3, runs, records, labels]. The three are the typical curve and the band of 19 seeds in 20, each through the run's
    own measured error signal at the last hidden layer: theory says how it changes from layer to layer. What it starts from
    is said by the runs that are `good`, if there are any among those that are `known`.
    """
    hidden = int(task.static["depth"])
    places = [(label.quantity, label.role, label.layer) for label in labels]
    found = {place: i for i, place in enumerate(places) if place[2] <= hidden}
    result = np.full((3, *values.shape), np.nan)
    groups: dict[tuple[float, float], list[int]] = {}
    for r, run in enumerate(task.runs):
        groups.setdefault((run.get("sigma_w", 1.0), run.get("sigma_b", 0.0)), []).append(r)
    for sigmas, members in groups.items():
        for quantity, (which, root) in spectral.MOMENTS.items():
            index = found.get((quantity, "", 0))
            if index is not None and (moments := theory.singular(task.static, *sigmas)) is not None:
                result[0, members, 0, index] = np.log10(max(moments[which], 1e-300)) / root
        members = [r for r in members if known[r]]
        if not any(quantity == "log10_error" for quantity, *_ in found):
            continue
        moment = found.get(("second_moment", PREACTIVATION, 1))
        sayers = [r for r in members if good[r]] or members
        squares = np.ones(len(sayers)) if moment is None else values[sayers, 0, moment]
        squares = squares[np.isfinite(squares)]
        if not squares.size:
            continue
        q0 = None if moment is None else float(np.median(squares))
        for role, curves in (theory.curves(task.static, *sigmas, len(members), q0) or {}).items():
            layers = [n for n in range(1, hidden + 1) if ("log10_error", role, n) in found]
            if hidden not in layers:
                continue
            index = [found["log10_error", role, n] for n in layers]
            anchors, curves = values[members, 0, index[-1]], curves[:, [n - 1 for n in layers]] / np.log(10)
            result[np.ix_(range(3), members, [0], index)] = (anchors[:, None] + curves[:, None])[:, :, None]
    return result
