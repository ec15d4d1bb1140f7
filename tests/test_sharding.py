"""One device equals four: under `shard_map` with either setting, and under `jit` of sharded arrays. The table is `sharded`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import failures_of

import fnn

TABLE = Path(__file__).with_name("sharded.py")
SECTIONS = (
    "every_layer_s_types",
    "layers",
    "per_example",
    "losses",
    "outputs",
    "clips",
    "losses_taken_again",
    "placed",
    "spectra",
    "watched",
    "sequences",
    "refusals",
)
pytestmark = pytest.mark.xdist_group("sharding")


@pytest.mark.parametrize("section", SECTIONS)
def test_one_device_equals_four(section):
    assert not {row: error for row, error in failures_of(TABLE, SECTIONS).items() if row.startswith(f"{section}/")}


@pytest.mark.slow
def test_one_device_equals_four_in_more_cases():
    assert not failures_of(TABLE, ("--slow",))


def test_a_mapped_axis_keeps_every_metric():
    """Two lanes of `vmap` are one batch: norms of single examples, their quartiles and the clip too."""
    net = fnn.models.mlp(1, 4, 3, norm="batch_norm", taps=True)
    x, y = jax.random.normal(jax.random.key(0), (8, 5)), jnp.arange(8) % 3
    state = fnn.TrainState.create(net, optax.sgd(0.1), jax.random.key(1), x)
    options = {"per_example": "clip", "max_norm": 0.5, "per_layer": True}
    steps = [
        fnn.train_step(net, fnn.losses.cross_entropy, optax.sgd(0.1), axis_name=axis, **options).pure
        for axis in (None, "d")
    ]
    want = jax.jit(steps[0])(state, (x, y))
    lanes = x.reshape(2, 4, 5), y.reshape(2, 4)
    got, metrics = jax.jit(jax.vmap(steps[1], (None, 0), axis_name="d"))(state, lanes)
    np.testing.assert_allclose(
        metrics.pop("per_example_norms").reshape(-1), want[1].pop("per_example_norms"), rtol=1e-4
    )
    for found in (metrics, want[1]):
        del found["per_example_norms_by_layer"]
    both = (
        jax.tree.leaves((got.params, got.net_state, metrics)),
        jax.tree.leaves((want[0].params, want[0].net_state, want[1])),
    )
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(a[0], a[1])
