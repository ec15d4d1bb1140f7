"""What a study's table is summarized to: every axis that varies tells networks apart, and growth is log10 everywhere."""

import itertools
import math
import re

import numpy as np
import polars as pl
import pytest

from fnn.cli import main
from fnn.study import figures, report, results, table, verdict
from fnn.study.quantiles import quantile
from fnn.study.summary import ERROR, summarize

AXES = {
    "depth": ("int", [2, 3]),
    "activation": ("str", ["tanh", "relu"]),
    "residual": ("bool", [False, True]),
    "batch_size": ("int", [8]),
    "sigma_w": ("float", [0.5, 1.5, 2.5]),
    "learning_rate": ("float", [0.1, 0.2]),
    "own": ("float", [None, 1.0]),
    "seed": ("int", [0, 1, 2, 3, 4]),
}


def made():
    """A table as six axes and five seeds give it, with log10 |dL/dh| = value(axes, seed) times the layer."""
    rows, rng = [], np.random.default_rng(0)
    for number, values in enumerate(itertools.product(*(values for _, values in AXES.values()))):
        slope = rng.normal()
        for layer in range(1, values[0] + 2):
            row = dict(zip(AXES, values, strict=True), cell=number // 5, step=0, layer=layer, path=f"{layer}/tap")
            row |= {"role": "preactivation", "quantity": "log10_error", "value": slope * layer}
            rows.append(row | {"predicted": 0.5 * slope * layer, "outside": number % 10 == 0})
    return pl.DataFrame(rows, schema=table.schema({name: kind for name, (kind, _) in AXES.items()}))


def test_every_axis_that_varies_tells_networks_apart_and_quantiles_are_over_seeds_alone():
    frame = made()
    found = summarize(frame)
    varying = [name for name, (_, values) in AXES.items() if len(values) > 1 and name != "seed"]
    assert found.axes == varying and found.fixed == {"batch_size": 8}
    assert found.networks.height == 2 * 2 * 2 * 3 * 2 * 2 and (found.networks["seeds"] == 5).all()
    first = found.networks.select(varying).unique().height
    assert first == found.networks.height  # no two rows share their values
    for row in found.networks.sample(12, seed=1).iter_rows(named=True):
        own = frame.filter(*(pl.col(name).eq_missing(pl.lit(row[name])) for name in varying), layer=1)
        slopes = own["value"].to_numpy()  # of one layer away from the input
        assert len(slopes) == 5
        growth = -slopes
        np.testing.assert_allclose(row["log10_growth"], np.median(growth), rtol=1e-12)
        np.testing.assert_allclose(row["log10_growth_low"], np.quantile(growth, 0.1), rtol=1e-12)
        np.testing.assert_allclose(row["log10_growth_high"], np.quantile(growth, 0.9), rtol=1e-12)
        np.testing.assert_allclose(row["log10_growth_predicted"], np.median(growth) / 2, rtol=1e-12)
        np.testing.assert_allclose(row["log10_last"], np.median(slopes) * row["depth"], rtol=1e-12)
        curve = found.layers.filter(network=row["network"], series=ERROR, layer=1).row(0, named=True)
        assert curve["middle"] == np.median(slopes) and curve["low"] == np.quantile(slopes, 0.1)


def test_a_swept_sigma_is_an_axis_and_terminal_figure_and_page_show_one_number(tmp_path, capsys):
    command = "study --depth 2,3 --width 8 --activation tanh --norm none --sigma-w 0.5:2.5:3 --seeds 3 --epochs 0 --out"
    assert main.main([*command.split(), str(tmp_path / "study")]) == 0
    printed = capsys.readouterr().out
    found = summarize(results.read(tmp_path / "study").table())
    assert found.axes == ["depth", "sigma_w"] and found.networks.height == 6
    growth = found.networks["log10_growth"].to_list()
    digits = [f"{value:+.4f}" for value in growth]
    assert all(text in printed for text in digits) and len(set(digits)) == 6
    assert all(re.search(rf"{row['sigma_w']:g}(\.0)? ", printed) for row in found.networks.iter_rows(named=True))
    drawn = figures.heat(found)
    (mesh,) = [part for axis in drawn.axes for part in axis.collections if np.size(part.get_array()) == 6]
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).ravel(), growth)
    shown = [f"{row['growth']:+.4f}" for row in report.contents(found)["networks"]]
    assert shown == digits


def test_seeds_whose_signal_is_zero_count():
    """Their logs are -inf, where polars interpolates to NaN; a growth of few survivors is none."""
    dead, alive = -math.inf, 1.0
    for values, want in (
        ([dead] * 4 + [alive] * 4, (dead, dead, alive)),
        ([dead] * 7 + [alive], (dead, dead, dead)),
        ([0.0, 1.0, 2.0, math.inf], (0.3, 1.5, math.inf)),
        ([0.0, 1.0, 2.0], (0.2, 1.0, 1.8)),
        ([dead], (dead,) * 3),
    ):
        frame = pl.DataFrame({"x": values})
        found = frame.select(*(quantile(pl.col("x"), q).alias(str(q)) for q in (0.1, 0.5, 0.9))).row(0)
        assert found == pytest.approx(want)


@pytest.mark.parametrize(("dead", "said"), [(0, "vanishes"), (2, "vanishes"), (3, "is zero"), (5, "is zero")])
def test_a_growth_is_that_of_most_seeds(dead, said):
    rows = [
        {
            "depth": 2,
            "seed": seed,
            "cell": 0,
            "step": 0,
            "layer": layer,
            "path": f"{layer}/tap",
            "role": "preactivation",
        }
        | {"quantity": "log10_error", "value": -math.inf if seed < dead else 2.0 * layer}
        for seed in range(5)
        for layer in range(1, 4)
    ]
    frame = pl.DataFrame(rows, schema=table.schema({"depth": "int", "seed": "int"}))
    (row,) = summarize(frame).networks.iter_rows(named=True)
    assert verdict.gradient(row) == said
    assert row["log10_growth"] == (-2.0 if dead < 3 else None)


@pytest.mark.parametrize("tap", [False, True])
def test_the_last_hidden_layer_counts_whether_or_not_the_output_has_a_tap(tap):
    rows = [
        {"width": 8, "seed": seed, "cell": 0, "step": 0, "layer": layer, "path": f"{layer}/x", "role": role}
        | {"quantity": quantity, "value": value * layer}
        for seed in range(3)
        for layer in range(1, 4)
        for role, quantity, value in (("preactivation", "log10_error", 2.0), ("", "log10_kernel", 1.0))
        if quantity == "log10_kernel" or layer < 3 or tap
    ]
    found = summarize(pl.DataFrame(rows, schema=table.schema({"width": "int", "seed": "int"})))
    (row,) = found.networks.iter_rows(named=True)
    assert (row["log10_first"], row["log10_last"], row["log10_growth"]) == (2.0, 4.0, -2.0)
    assert figures.hidden(found, found.layers.filter(series=ERROR))["layer"].to_list() == [1, 2]


def test_arrays_of_ones_own_measurement_are_series_of_their_own():
    rows = [
        {
            "depth": 2,
            "seed": seed,
            "cell": 0,
            "step": 0,
            "layer": 0,
            "path": path,
            "role": "",
            "quantity": "own",
            "value": value,
        }
        for seed in range(3)
        for path, value in (("a/x", 1.0), ("b/x", 100.0))
    ]
    runs = summarize(pl.DataFrame(rows, schema=table.schema({"depth": "int", "seed": "int"}))).runs
    found = {row["series"]: (row["low"], row["middle"], row["high"]) for row in runs.iter_rows(named=True)}
    assert found == {"own at a/x": (1.0,) * 3, "own at b/x": (100.0,) * 3}
