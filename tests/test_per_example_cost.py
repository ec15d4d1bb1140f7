"""What gradients of single examples cost: memory, products, collectives; and arrays that cost nothing."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subjects import B, draw

import fnn


def test_the_price_of_one_backward_pass():
    depth, width, batch = 24, 32, 64
    layer = fnn.models.mlp(depth, width, 3, activation="tanh")
    x, y = draw(batch, width), jnp.zeros(batch, int)
    params, state = layer.init(jax.random.key(0), x)
    every = fnn.per_example(fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy))

    def plain(p, batch):
        return jax.grad(lambda p: jnp.mean(fnn.losses.cross_entropy(layer.apply(p, state, batch[0])[0], batch[1])))(p)

    def bytes_of(f):
        return jax.jit(f).lower(params, (x, y)).compile().memory_analysis().temp_size_in_bytes

    base = bytes_of(plain)
    whole = batch * depth * width * width * 4
    # The bench has the bars; this keeps gradients from being stored whole, which takes a multiple.
    assert bytes_of(lambda p, b: every(p, b).norms()) < 1.3 * base < whole / 2
    assert bytes_of(lambda p, b: every(p, b).clipped_mean(1.0).mean) < 3 * base


def test_norms_and_sums_of_sequences_share_one_product():
    """16 positions of 24 and 40 numbers: G of one example is smaller than its factors, and so made only once."""

    def loss(p, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ p)))

    every = fnn.per_example(loss)
    p, x = draw(24, 40), draw(32, 16, 24, seed=1)

    def products(f):
        """Count the operations that multiply over positions: those below with results of 24 x 40, or 32 of them."""
        text = jax.jit(f).lower(p, x).compile().as_text()
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
        return sorted(shape for shape in shapes if {"24", "40"} <= set(shape.split(",")))

    assert products(lambda p, x: every(p, x).norms()) == ["32,24,40"]
    for both in (
        lambda p, x: (every(p, x).norms(), every(p, x).mean()),
        lambda p, x: every(p, x).clipped_mean(1.0).mean,
    ):
        assert "24,40" not in products(both) and products(both).count("32,24,40") == 1, products(both)


def test_sharded_over_devices_adds_no_large_collective():
    code = r"""
import re, jax, jax.numpy as jnp, numpy as np, fnn
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 8
layer = fnn.models.mlp(19, 32, 3, activation="tanh")
x, y = jax.random.normal(jax.random.key(0), (16, 32)), jnp.arange(16) % 3
params, state = layer.init(jax.random.key(1), x)
every = fnn.per_example(fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy))
def f(p, b):
    g = every(p, b)
    return g.norms(), g.clipped_mean(0.5).mean, g.mean()
alone = jax.jit(f)(params, (x, y))
mesh = Mesh(np.array(jax.devices()), ("data",))
batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))
placed = jax.device_put(params, NamedSharding(mesh, P()))
spread = jax.jit(f)(placed, batch)
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
def collectives(f):
    text = jax.jit(f).lower(placed, batch).compile().as_text()
    return re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
found = collectives(lambda p, b: every(p, b).norms())
# Whether all squares are in range is one number: all devices decide together.
assert all(kind == "all-reduce" and not re.search(r"\[\d", shape) for shape, kind in found), found
assert {kind for _, kind in collectives(lambda p, b: every(p, b).mean())} == {"all-reduce"}
print("same")
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}
    )
    assert run.returncode == 0 and "same" in run.stdout, run.stderr[-3000:]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_array_without_entries_changes_nothing(shape):
    batch, w = draw(B, 6), draw(6, 3)

    def loss(params, x):
        h = jnp.tanh(x @ params["w"])
        return jnp.sum(h) + (jnp.sum(h @ params["none"]) if shape[1] == 0 else jnp.sum(x[:0] @ params["none"]))

    def found(params, loss):
        g = fnn.per_example(loss)(params, batch)
        weights = jnp.arange(float(B))
        trees = g.mean(), g.weighted_sum(weights), g.weighted_mean(weights), g.clipped_mean(0.1).mean, g.materialize()
        return g.norms(), g.gram(), g.cosines(), g.variance(), [part["w"] for part in trees], trees

    *got, trees = jax.jit(lambda p: found(p, loss))({"w": w, "none": jnp.zeros(shape)})
    *want, _ = jax.jit(lambda p: found(p, lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))))({"w": w})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [part["none"].shape for part in trees] == [shape] * 4 + [(B, *shape)]
