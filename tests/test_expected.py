"""What theory says beside a study: the sentence on the band, against nets that follow theory, and other norms."""

import math

import numpy as np
import polars as pl
import pytest

import fnn
from fnn.study import expected


@pytest.mark.parametrize(
    "axes",
    [
        {"norm": ["batch_norm", "layer_norm"], "activation": "tanh", "residual": True},
        # test_drawn has nets without a residual
        pytest.param(
            {"norm": ["none", "batch_norm"], "activation": "relu", "sigma_w": 1.4, "sigma_b": 0.2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_study_follows_its_theory(axes):
    """Width 32, batch 16, depth 12, 12 seeds: the mean over seeds of log |dL/dh_1|/|dL/dh_12| within 4.5 standard errors.

    Theory's own mean comes from 48 draws: its error is half of that of 12 seeds. The band is about that of the seeds.
    """
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(16, 8)).astype(np.float32) + 0.5, rng.integers(0, 3, 16))
    grid = fnn.grid.product(depth=12, width=32, batch_size=16, **axes)
    table = fnn.Study(grid, seeds=12, steps=0, data=(data, data), quantities=("log10_error",)).run().table()
    known = table.filter(pl.col("predicted").is_not_null())
    roles = {"preactivation", "sum"} if "residual" in axes else {"preactivation"}
    assert set(known["role"]) == roles
    for (_, role, residual), rows in known.group_by("cell", "role", "residual"):
        assert role == "preactivation" or residual
        assert set(rows["layer"]) == set(range(1 if role == "preactivation" else 2, 13))
        first = rows.filter(pl.col("layer") == pl.col("layer").min())
        error = (first["value"] - first["predicted"]).to_numpy()
        spread = ((first["high"] - first["low"]) / (2 * 2.03)).to_numpy()[0]
        assert abs(error.mean()) < 4.5 * spread * math.sqrt(1 / 12 + 1 / 48), (role, residual)
        assert 0.4 < error.std(ddof=1) / spread < 2.0
    cells = known.filter(pl.col("low") < pl.col("high"))
    assert cells["outside"].mean() < 0.15


def test_a_very_wide_net_has_the_expansion(monkeypatch):
    """Beyond the work that is worth while, the curve is that of `meanfield.predict`."""
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8))
    grid = fnn.grid.product(depth=4, width=16, batch_size=8, activation="tanh", norm="none")
    monkeypatch.setattr(expected, "MOST_WORK", 1.0)
    table = fnn.Study(grid, seeds=2, steps=0, data=(data, data)).run().table()
    known = table.filter(pl.col("predicted").is_not_null() & (pl.col("seed") == 0)).sort("layer")
    q0 = table.filter(
        (pl.col("quantity") == "second_moment") & (pl.col("layer") == 1) & (pl.col("role") == "preactivation")
    )
    curve = fnn.meanfield.predict(
        4, activation="tanh", sigma_w=1.0, sigma_b=0.0, width=16, q0=float(q0["value"].median())
    )
    np.testing.assert_allclose(
        known["predicted"] - known["predicted"][-1], curve.mean_log_error / math.log(10), rtol=1e-9, atol=1e-12
    )
