"""Error signals and gradients of a study, where float32 ends and where paths meet, against float64."""

import jax
import numpy as np
import pytest
from test_flow import block, own
from test_taps import float64_flow

import fnn
from fnn.study import cell, study
from fnn.study.summary import summarize

pl = pytest.importorskip("polars")


def test_a_study_marks_what_left_float32_and_keeps_what_is_right():
    points = fnn.grid.product(
        depth=40, width=8, activation=["leaky_relu", "tanh"], norm="none", sigma_w=[0.1, 1.0], batch_size=8
    )
    points *= fnn.grid.product(learning_rate=1e-30, optimizer="sgd")  # the net of step 1 is that of step 0
    described = study.Study(points, seeds=1, steps=1, data="clusters")
    with pytest.warns(UserWarning, match=r"2 runs of cells 0, 1 left the range of float32 at step 1.*JAX_ENABLE_X64=1"):
        table = described.table()
    assert table.filter(pl.col("sigma_w") == 1.0)["value"].is_finite().all()
    assert not table["value"].is_infinite().any() and "peak" not in table["quantity"]
    lost = table.filter((pl.col("sigma_w") == 0.1) & (pl.col("step") == 1))
    logs = lost.filter(pl.col("quantity").str.starts_with("log10_") & (pl.col("activation") == "leaky_relu"))
    assert logs["value"].is_nan().all() and lost.filter(pl.col("value").is_nan())["outside"].null_count() > 0
    # tanh is smooth at 0: its error signals are right, whether or not the signal is there; gradients need the signal.
    setup, (_, smooth) = described._setup(), described.cells()
    net = cell.network(setup, smooth.static, smooth.runs[0] | {"sigma_w": 0.1}).net
    x, y = setup.train.x[:8], setup.train.y[:8]
    params, state = net.init(jax.random.key(0), x)
    errors, norms = float64_flow(net, params, state, (x, y))
    mine = lost.filter((pl.col("activation") == "tanh") & (pl.col("quantity") == "log10_error"))
    np.testing.assert_allclose(mine["value"], errors, atol=1e-3)
    kernels = lost.filter((pl.col("activation") == "tanh") & (pl.col("quantity") == "log10_kernel"))["value"].to_numpy()
    expected = np.array([value for path, value in norms if path.endswith("kernel")])
    # At initialisation the same run is measured in float64.
    first = table.filter((pl.col("sigma_w") == 0.1) & (pl.col("step") == 0) & (pl.col("layer") > 0))
    first = first.filter(pl.col("quantity") != "update_ratio")
    assert first["value"].is_finite().all() and first["float64"].all() and not lost["float64"].any()
    again = first.filter((pl.col("activation") == "tanh") & (pl.col("quantity") == "log10_kernel"))["value"]
    np.testing.assert_allclose(again, expected, atol=1e-6)
    known = ~np.isnan(kernels)
    assert 0 < known.sum() < len(known)
    np.testing.assert_allclose(kernels[known], expected[known], atol=1e-3)
    assert summarize(table).networks["log10_first"].is_finite().all()


def meeting(gain):
    both = own(lambda run, x: run(0, x) + run(1, x), block(), block(gain))
    return fnn.serial(fnn.flatten(), fnn.dense(6), both, fnn.tap(), fnn.dense(4))


def test_a_study_of_a_net_whose_paths_meet_equals_float64():
    points = fnn.grid.product(gain=0.1, batch_size=8, optimizer="sgd", clip="none")
    described = study.Study(points, seeds=1, steps=0, data="clusters", build=meeting)
    setup, (only,) = described._setup(), described.cells()
    (params, state), net = cell.draw(setup, only.static, only.runs[0]), meeting(0.1)
    errors, _ = float64_flow(net, params, state, (setup.train.x[:8], setup.train.y[:8]))
    table = described.table().filter(pl.col("quantity") == "log10_error")
    np.testing.assert_allclose(table["value"], errors, atol=1e-4)
