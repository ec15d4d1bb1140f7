"""Runs that leave float32 at initialisation or in training: recorded as diverged, and no neighbour and no file is harmed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from fnn.study import cell, results, study
from fnn.study.summary import summarize

pl = pytest.importorskip("polars")

# One worker: the tests share the compilations.
pytestmark = pytest.mark.xdist_group("overflow")


def linear(**options):
    """31 linear layers: at sigma_w = 16 two of four seeds leave float32, at 1 none, at 1e12 all leave float64 too."""
    axes = {"depth": 31, "width": 4, "norm": "none", "activation": "identity", "batch_size": 8}
    axes |= {"sigma_w": options.pop("sigma_w", [1.0, 16.0])}
    return study.Study(fnn.grid.product(**axes), **({"seeds": 4, "steps": 0, "data": "clusters", "chunk": 1} | options))


@pytest.fixture(scope="module")
def mixed():
    return linear().run().table()


def ends(table):
    rows = table.filter(pl.col("quantity") == "diverged").sort("sigma_w", "seed")
    return list(zip(rows["step"], rows["value"], strict=True))


def test_a_run_that_overflows_at_initialisation_is_diverged_at_step_0(mixed):
    assert ends(mixed) == [(0, 0.0)] * 4 + [(0, 0.0), (0, 0.0), (0, 1.0), (0, 1.0)]
    left = (pl.col("sigma_w") == 16) & (pl.col("seed") >= 2)
    assert summarize(mixed).networks.height == 2
    # Its layers are measured in float64; what float32 makes of the loss is no number.
    again, rest = mixed.filter(left & pl.col("float64")), mixed.filter(left & ~pl.col("float64"))
    assert rest["quantity"].to_list() == ["diverged"] * 2
    assert not mixed.filter(sigma_w=1)["float64"].any()
    others = mixed.filter((pl.col("sigma_w") == 16) & (pl.col("seed") == 0) & (pl.col("layer") > 0))
    for seed in (2, 3):
        mine = again.filter(pl.col("seed") == seed)
        assert mine["path"].to_list() == others["path"].to_list() and mine["value"].is_finite().all()


def test_a_study_says_which_runs_were_measured_in_float64(mixed):
    assert study.widened(mixed) == (
        "study: 4 runs of cell 0 were measured in float64 at step 0, because their signal leaves the range of float32; loss, "
        "accuracy and training are those of float32"
    )
    assert study.widened(mixed.filter(~pl.col("float64"))) is None and study.left_range(mixed) is None


def test_relu_at_depth_256_has_its_line():
    """Its signal is 2^-128 of its size at the end, its loss that of equal logits: all by NumPy in float64, and theory."""
    points = fnn.grid.product(depth=256, width=64, norm="none", activation="relu", batch_size=8, learning_rate=1e-30)
    described = study.Study(points, seeds=2, steps=1, data="clusters", quantities=("log10_error", "second_moment"))
    table = described.run().table()
    setup, (task,) = described._setup(), described.cells()
    params, _ = cell.draw(setup, task.static, task.runs[0])
    first, trunk, last = (
        np.asarray(a, np.float64) for a in jax.tree.leaves(params)[1::2]
    )  # behind each bias its kernel
    x, y = (a[:8] for a in setup.train)
    h = [np.asarray(x, np.float64) @ first]
    for w in trunk:
        h.append(np.maximum(h[-1], 0) @ w)
    d = (1 / 3 - np.eye(3)[y]) @ last.T * (h[-1] > 0)
    errors = [np.sqrt(np.mean(np.sum(d**2, axis=1)))]
    for w, before in zip(trunk[::-1], h[-2::-1], strict=True):
        d = (d @ w.T) * (before > 0)
        errors.append(np.sqrt(np.mean(np.sum(d**2, axis=1))))
    rows = table.filter((pl.col("seed") == 0) & (pl.col("role") == "preactivation") & (pl.col("layer") <= 256))
    mine, later = (rows.filter((pl.col("quantity") == "log10_error") & (pl.col("step") == step)) for step in (0, 1))
    assert mine["float64"].all() and later["value"].is_nan().all() and not later["float64"].any()
    np.testing.assert_allclose(mine["value"], np.log10(errors[::-1]), atol=1e-6)
    moments = rows.filter((pl.col("quantity") == "second_moment") & (pl.col("step") == 0))["value"]
    np.testing.assert_allclose(moments, [np.mean(a**2) for a in h], rtol=1e-6)
    assert moments[255] < 2.0**-230
    # 0.1505 = log10(2)/2 in an infinitely wide net; at width 64 the typical net is a little steeper, and theory says so.
    network = summarize(table).networks.row(0, named=True)
    assert network["log10_growth"] == pytest.approx(-0.1505, abs=0.02)
    assert (
        network["log10_growth"] == pytest.approx(network["log10_growth_predicted"], abs=0.01)
        and network["outside"] < 0.5  # of two seeds, one is there for a part of its layers
    )
    assert study.left_range(table).startswith(
        "study: 2 runs of cell 0 left the range of float32 at step 1, first at layer"
    )
    mine = table.filter(pl.col("layer") == 0).head(1)  # a number of one's own may be NaN for any reason
    assert study.left_range(mine.with_columns(quantity=pl.lit("log10_mine"), value=pl.lit(np.nan))) is None


def test_a_study_says_where_rounding_grows_to_the_size_of_the_signal():
    """Against float64: what is not named agrees, what is named does not."""
    points = fnn.grid.product(depth=48, width=32, norm="none", activation="tanh", batch_size=8, sigma_w=[1.0, 2.0, 4.0])
    described = study.Study(points, seeds=2, steps=0, data="clusters", quantities=["log10_error", "second_moment"])
    with pytest.warns(UserWarning, match="rounding grows"):
        tables = [described.table()]
    with jax.enable_x64(True):
        tables.append(described.run().table())
    single, double = (table.filter(role="preactivation", quantity="log10_error") for table in tables)
    off = (
        single.with_columns(off=(single["value"] - double["value"]).abs()).group_by("sigma_w").agg(pl.col("off").max())
    )
    off = dict(off.iter_rows())
    assert off[1.0] < 1e-5 and off[2.0] < 1e-2 < off[4.0], off
    assert study.facts(tables[1]) == []
    assert study.facts(tables[0]) == [
        "study: in 2 runs of cell 0 rounding grows from layer to layer beyond a hundredth of the signal: another machine or "
        "version of JAX changes their numbers as other seeds would"
    ]
    renamed = tables[0].rename({"sigma_w": "gain"})  # an axis of the user's own tells runs apart as well
    assert study.facts(renamed) == study.facts(tables[0])


def narrow(depth=20, classes=3):
    """A net that computes in float32 whatever it is given."""
    down = fnn.activation(lambda x: (x * 1e-3).astype(jnp.float32))
    return fnn.serial(fnn.dense(8), fnn.repeat(fnn.serial(down, fnn.tap()), depth, unroll=True), fnn.dense(classes))


def test_a_net_that_cannot_be_measured_in_float64_stays_nan():
    points = fnn.grid.product(depth=20, batch_size=8, clip="none")
    table = study.Study(points, seeds=1, steps=0, data="clusters", build=narrow).run().table()
    logs = table.filter(pl.col("quantity") == "log10_error")["value"]
    assert logs.is_nan().all() and not table["float64"].any() and "left the range" in (study.left_range(table) or "")


@pytest.mark.parametrize("others", [{"sigma_w": [1.0]}, {"sigma_w": [16.0], "seeds": [0, 1]}])
def test_its_neighbours_are_those_of_a_study_without_it(mixed, others):
    """Bit for bit, predictions too: theory starts from what the finite seeds measure."""
    alone = linear(**others).run().table()
    mine = mixed.filter(
        pl.col("sigma_w").is_in(others["sigma_w"]) & pl.col("seed").is_in(others.get("seeds", [0, 1, 2, 3]))
    )
    assert alone["predicted"].drop_nulls().len() and alone.equals(mine)


def test_its_neighbours_in_one_vmap_are_the_same_bits_whatever_it_does():
    tables = [linear(sigma_w=[1.0, other], chunk=8).run().table() for other in (16.0, 1.5)]
    assert tables[0].filter(pl.col("sigma_w") == 1).equals(tables[1].filter(pl.col("sigma_w") == 1))


@pytest.mark.parametrize(
    "options",
    [
        {"sigma_w": [1e12], "quantities": ["log10_error"]},  # all overflow, and leave no row at all
        {"quantities": ["log10_error"]},  # some runs leave no row
        {"quantities": ["loss", "diverged"]},
        {"sigma_w": [1e12], "measure": {"one": lambda params, state, batch: 1}},
    ],
)
def test_the_schema_of_a_cell_does_not_depend_on_its_numbers(mixed, options, tmp_path):
    found = linear(**options).run(tmp_path)
    table = found.table()
    assert table.schema == mixed.schema
    kept = options.get("quantities") or table["quantity"].unique().to_list()
    assert set(table["quantity"]) <= set(kept)
    if options.get("sigma_w") == [1e12]:
        assert table.height == (0 if options.get("quantities") else 4)
    # The folder takes up such a cell, and measures it again where it is lost.
    assert linear(**options).run(tmp_path).table().equals(table)
    if table.is_empty():
        (tmp_path / "cells" / "00000.parquet").unlink()
        assert linear(**options).run(tmp_path).table().equals(results.read(tmp_path).table())


def late(width=4, bound=0.0, classes=2):
    """A net whose loss is infinite from the step on at which a weight, which grows by one a step, exceeds `bound`."""

    def init(key, spec):
        return {"count": jnp.zeros(())}, ()

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        count = params["count"] + 0 * x
        return jnp.where(params["count"] > bound, jnp.inf, 1.0) * jnp.concatenate([count, -count], axis=-1)[
            :, :2
        ], state

    return fnn.Layer(init, apply)


def falling(outputs, labels):
    return -jnp.sum(outputs, axis=-1) if outputs.ndim == 1 else -outputs[:, 0]


def test_runs_that_overflow_at_different_steps_end_each_at_its_own():
    axes = {"bound": [-1.0, 0.5, 1.5, 9.0], "optimizer": "sgd", "learning_rate": 1.0, "clip": "none", "batch_size": 8}
    described = study.Study(
        fnn.grid.product(**axes),
        seeds=1,
        steps=[0, 1, 2, 3],
        data="clusters",
        build=late,
        loss=falling,
        traced=["bound"],
    )
    table = described.run().table()
    rows = table.filter(pl.col("quantity") == "diverged").sort("bound")
    # Below zero the count of 0 times inf is NaN at once: a loss that is NaN at initialisation.
    assert rows["value"].to_list() == [1, 1, 1, 0] and rows["step"].to_list() == [0, 1, 2, 3]
    for bound, end in zip(rows["bound"], rows["step"], strict=True):
        steps = table.filter((pl.col("bound") == bound) & (pl.col("quantity") == "loss"))["step"].to_list()
        assert steps == list(range(end + (bound == 9))), bound
    assert table.filter((pl.col("bound") == 9) & (pl.col("quantity") == "loss"))["value"].to_list() == [0, -1, -2, -3]
