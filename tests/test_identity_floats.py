"""Studies in float32 and under x64: told apart by their names, and with the same draws and data."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from test_identity import tiny

import fnn
from fnn.datasets import data
from fnn.datasets.dataset import shuffled
from fnn.study import results

pytestmark = pytest.mark.xdist_group("identity")


def test_float64_and_float32_never_share_a_folder(tmp_path):
    tiny().run(tmp_path)
    with jax.enable_x64(True), pytest.raises(ValueError, match="another study: x64 is False there, True here;"):
        tiny().run(tmp_path)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match="matmul_precision is None there, highest"),
    ):
        tiny().run(tmp_path)
    session = results.read(tmp_path).sessions[0]
    assert session["x64"] is False and session["matmul_precision"] is None
    assert session["device_kind"] == "cpu" and isinstance(session["xla_flags"], str)
    old = json.loads((tmp_path / "study.json").read_text()) | {"format": 2}
    (tmp_path / "study.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="must have format 6, got 2; choose another folder"):
        tiny().run(tmp_path)


def test_under_x64_a_study_measures_the_same_net_in_float64():
    axes = {"depth": 2, "sigma_w": [1.0, 1.5], "sigma_b": 0.1, "optimizer": "sgd"}
    seen = []

    def dtypes(params, state, batch):
        seen.append({str(leaf.dtype) for leaf in jax.tree.leaves((params, batch[0]))})
        return jax.tree.leaves(params)[0]

    options = {"axes": axes, "steps": [0, 2], "measure": {"first": dtypes}}
    single = tiny(**options).table()
    assert seen[-1] == {"float32"}
    # A thread of its own does not know of this setting: the task carries it.
    with jax.enable_x64(True), ThreadPoolExecutor(1) as executor:
        double = tiny(**options).run(executor=executor).table()
    assert seen[-1] == {"float64"}
    keys = ["layer", "path", "quantity", "step", "sigma_w"]
    assert single.select(keys).equals(double.select(keys))
    # The draws are the same numbers; what is computed from them agrees to float32's rounding, and is not rounded to it.
    first = pl.col("quantity") == "first"
    single, double = (
        table.filter(pl.col("float64") == wide).drop("float64") for wide, table in enumerate((single, double))
    )
    assert single.filter(first & (pl.col("step") == 0)).equals(double.filter(first & (pl.col("step") == 0)))
    np.testing.assert_allclose(single["value"], double["value"], rtol=1e-3, atol=1e-3)
    for quantity in ("loss", "log10_error", "log10_kernel", "train_loss", "grad_norm", "second_moment"):
        values = double.filter(pl.col("quantity") == quantity)["value"].to_numpy()
        assert (values != values.astype(np.float32)).mean() > 0.9, quantity


def test_draws_and_data_do_not_depend_on_x64():
    key, x = jax.random.key(3), jnp.ones((50, 4), jnp.float32)
    net = fnn.dropout(0.5)

    def drawn():
        names = ("orthogonal", "scaled", "he_truncated_normal")
        yield from (fnn.initializers.get(name)(key, (3, 4)) for name in names)
        yield shuffled(key, 1000)
        yield net.apply((), (), x, key=key, train=True)[0]
        for name in ("clusters", "adding"):
            yield from (a for part in data.load(name, key=key) for a in part)

    here = [np.asarray(a) for a in drawn()]
    with jax.enable_x64(True):
        there = [np.asarray(a) for a in drawn()]
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)
