"""Exact gradients of nets that others wrote, against float64, and against what theory predicts."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax
from flax import nnx

import fnn
from fnn.gradients import exact, powers

RNG = np.random.default_rng(0)


def drawn(*shape):
    return as_jax(RNG.normal(size=shape), jnp.float32)


def wide(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def scaled_leaves(found):
    return jax.tree.leaves(found, is_leaf=lambda a: isinstance(a, powers.Scaled))


def log_norms(found):
    return np.array(jax.jit(lambda found: [x.log_norm() for x in scaled_leaves(found)])(found))


def log_norm(a):
    """The log norm of a float64 array, whose squares may leave even this range."""
    a, largest = np.asarray(a), np.max(np.abs(a))
    return np.log(largest) + np.log(np.linalg.norm(a / largest)) if largest else -np.inf


def in_float64(loss, params):
    """Log norms of the gradient in float64, of the same weights."""
    with jax.enable_x64(True):
        found = jax.tree.leaves(jax.jit(jax.grad(loss))(wide(params)))
        return np.array([log_norm(a) for a in found])


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(60):
            x = nn.sigmoid(nn.Dense(4)(x))
        return nn.Dense(1)(x)


def test_linen_sigmoid_net_of_60_layers():
    net, x = Mlp(), drawn(8, 4)
    specs = jax.eval_shape(net.init, jax.random.key(0), x)
    params = jax.tree.map(lambda spec: drawn(*spec.shape) / 16, specs)

    def loss(p):
        return jnp.mean(net.apply(p, x) ** 2)

    want, found = in_float64(loss, params), log_norms(jax.jit(exact.gradient(loss))(params)[1])
    assert want.min() < -150 and (want < -104).sum() > 50  # nothing of these is left in float32
    np.testing.assert_allclose(found, want, atol=1.7e-5)


def test_a_scan_of_400_sigmoid_layers():
    params, x = drawn(400, 16, 16) / 4, drawn(8, 16)

    def loss(p):
        x_, _ = jax.lax.scan(lambda x, w: (jax.nn.sigmoid(x @ w), None), x.astype(p.dtype), p)
        return jnp.mean(x_**2)

    with jax.enable_x64(True):
        want = [log_norm(a) for a in jax.jit(jax.grad(loss))(wide(params))]
    found = jax.jit(lambda p: exact.gradient(loss)(p)[1].log_norm(1))(params)
    assert np.isfinite(found).all() and found.min() < -500
    np.testing.assert_allclose(found, want, atol=2e-4)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.attend = nnx.List([nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for norm, attend in zip(self.norms, self.attend, strict=True):
            x = x + attend(norm(x), mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(x)


class Convs(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, use_fast_variance=False)(x))
            x = nn.max_pool(x, (2, 2), (1, 1))
        return nn.avg_pool(x, (2, 2)).mean((1, 2))


def nnx_attention():
    graph, params = nnx.split(Attention(nnx.Rngs(0)))
    tokens = jnp.array([[1, 5, 2, 7, 1], [3, 3, 0, 10, 4]])

    def loss(p):
        logits = nnx.merge(graph, p, copy=True)(tokens[:, :-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))

    return loss, params


def convs_with_batch_norm_and_pools():
    net, x = Convs(), drawn(4, 8, 8, 2)
    variables = jax.jit(net.init)(jax.random.key(0), x)

    def loss(p):
        return jnp.mean(net.apply({"params": p}, x.astype(p["Conv_0"]["kernel"].dtype), mutable="batch_stats")[0] ** 2)

    return loss, variables["params"]


def lstms_over_200_steps_in_a_scan_over_4_layers():
    params = {"x": drawn(4, 6, 24) / 3, "h": drawn(4, 6, 24) / 3}
    sequence = drawn(200, 3, 6)

    def loss(p):
        def layer(xs, w):
            def cell(carry, x):
                h, c = carry
                i, f, o, g = jnp.split(x @ w["x"] + h @ w["h"], 4, axis=-1)
                c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
                h = nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            zeros = jnp.zeros_like(xs[0])
            return jax.lax.scan(jax.checkpoint(cell), (zeros, zeros), xs)[1], None

        return jnp.mean(jax.lax.scan(layer, sequence.astype(p["x"].dtype), p)[0][-1] ** 2)

    return loss, params


@pytest.mark.parametrize(
    "model", [nnx_attention, convs_with_batch_norm_and_pools, lstms_over_200_steps_in_a_scan_over_4_layers]
)
def test_models_of_others_where_float32_holds_the_gradient(model):
    """No further from float64 than twice the plain gradient."""
    loss, params = model()
    want, found = in_float64(loss, params), log_norms(jax.jit(exact.gradient(loss))(params)[1])
    plain = np.array([log_norm(a) for a in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])
    alive = want > -25  # the bias before a batch norm, and that of attention's keys, have none but rounding
    assert alive.sum() > 0.6 * len(want)
    error, limit = np.abs(found - want)[alive], np.abs(plain - want)[alive]
    assert error.max() < 2 * limit.max() + 1e-6, (error, limit)


def test_taps_are_the_identity():
    """In repeat, at a depth where float32 holds nothing of the first layers' gradient; with warnings as errors."""
    x, weights = drawn(4, 8), None
    found = []
    for taps in (False, True):
        net = fnn.models.mlp(300, 8, 1, activation="sigmoid", taps=taps)
        params, state = net.init(jax.random.key(0), x)
        weights = weights or jax.tree.leaves(params)
        params = jax.tree.unflatten(jax.tree.structure(params), weights)

        @jax.jit
        def norms(p, net=net, state=state):
            leaves = scaled_leaves(exact.gradient(lambda p: jnp.mean(net.apply(p, state, x)[0] ** 2))(p)[1])
            return [a.log_norm(int(a.value.shape[0] > 200)) for a in leaves]  # those of a scan have one for each layer

        found.append(norms(params))
    for alone, tapped in zip(*found, strict=True):
        np.testing.assert_allclose(tapped, alone, rtol=1e-6)
        assert not alone.ndim or (np.isfinite(alone).all() and alone.min() < -200)


def test_the_slope_at_depth_2000_is_the_predicted_one():
    """sigmoid, weights N(0, 1/n): half the log of chi is -1.4437 for each layer towards the input."""
    width, depth = 64, 2000
    keys = jax.random.split(jax.random.key(0), depth)

    @jax.jit
    def logs(x):
        params = jax.vmap(lambda key: jax.random.normal(key, (width, width)) / np.sqrt(width))(keys)

        def loss(p):
            return jnp.mean(jax.lax.scan(lambda x, w: (jax.nn.sigmoid(x @ w), None), x, p)[0] ** 2)

        return exact.gradient(loss)(params)[1].log_norm(1)

    found = np.asarray(logs(jax.random.normal(jax.random.key(1), (4, width))))
    slope = (found[1900] - found[100]) / 1800
    assert abs(slope - 1.4437) < 0.01, slope
    assert found[0] < -2800


@pytest.mark.xdist_group("sharding")
def test_four_devices_give_the_same_as_one():
    script = Path(__file__).with_name("exact_sharded.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=os.environ)
    assert run.stdout == "as on one device\n", run.stderr[-3000:]
