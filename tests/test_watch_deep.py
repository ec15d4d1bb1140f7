"""`watch` at depths that float32 cannot follow, on eight devices, and of losses of unusual form."""

import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_watch_exact import X, drawn, in_float64, log_norms, lstms, on_the_same_residuals, rows

import fnn

LN10 = math.log(10)


def deep_sigmoids():
    """400 layers in `repeat`: norms down to e^-580."""
    net = fnn.repeat(fnn.serial(fnn.dense(6), fnn.activation("sigmoid")), 400)
    params, state = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((4, 6)))
    params = jax.tree.map(lambda a: drawn(*a.shape) / math.sqrt(6), params)
    return lambda p, x: jnp.mean(net.apply(p, state, x)[0] ** 2), params, (drawn(4, 6),)


@pytest.mark.parametrize("build, depth", [(deep_sigmoids, 400), (lambda: lstms(1e-25)[:3], 800)])
def test_gradients_that_float32_cannot_hold(build, depth):
    """Against a float64 run of the same backward program on the same float32 residuals."""
    loss, params, batch = build()
    want = on_the_same_residuals(loss, params, *batch)
    found = rows(jax.jit(fnn.watch(loss, groups="gradient"))(params, *batch))
    assert any((found[path] < -110).any() for path in found)  # a float32 gradient is zero
    for path, ours in found.items():
        np.testing.assert_allclose(ours, log_norms(want, 1)[path], atol=1e-5 * math.sqrt(depth))


@functools.cache
def two_thousand(depth=2000, width=128):
    net = fnn.repeat(fnn.serial(fnn.dense(width), fnn.activation("sigmoid")), depth)
    x = jax.random.normal(jax.random.key(1), (4, width))
    params, state = jax.eval_shape(net.init, jax.random.key(0), x)
    biases, kernels = jax.tree.leaves(params)  # alphabetic
    kernels = jax.random.normal(jax.random.key(0), kernels.shape) / math.sqrt(width)
    params = jax.tree.unflatten(jax.tree.structure(params), [jnp.zeros(biases.shape), kernels])
    watched = jax.jit(fnn.watch(lambda p, x: jnp.mean(net.apply(p, state, x)[0] ** 2)))
    start = time.perf_counter()
    compiled = watched.lower(params, x).compile()
    return time.perf_counter() - start, compiled(params, x)


def test_the_slope_at_depth_2000_is_the_predicted_one():
    """sigmoid, weights N(0, 1/n): half the log10 of chi is -0.62699 for each layer towards the input."""
    _, flow = two_thousand()
    for quantity in ("log10_gradient", "log10_error"):
        (logs,) = (logs for path, logs in rows(flow, quantity).items() if path.endswith("kernel"))
        slope = (logs[100] - logs[1900]) / 1800 / LN10
        assert abs(slope + 0.62699) < 0.003, slope
        assert logs[0] < -2800


@pytest.mark.slow
def test_10_000_layers_compile_at_once():
    seconds, flow = two_thousand(10_000, 16)
    (logs,) = (logs for path, logs in rows(flow).items() if path.endswith("kernel"))
    assert len(logs) == 10_000 and np.isfinite(logs).all() and logs[0] < -14_000
    assert seconds < 5, seconds


@functools.cache
def on_eight_devices():
    script = Path(__file__).with_name("watch_sharded.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow  # test_sharding and test_placement watch on four devices
@pytest.mark.xdist_group("sharding")
@pytest.mark.parametrize(
    "case", ["batch_sharded", "batch_sharded_under_jit", "parameters_sharded", "under_shard_map", "in_float64"]
)
def test_eight_devices_have_the_rows_of_one(case):
    assert case not in on_eight_devices(), on_eight_devices()[case]


# Models that others thought of ------------------------------------------------------------------------------------------


def test_what_is_made_of_parameters_alone_is_no_layer():
    """Spectral norm by power iteration, in a scan: the layer is the product with data, and its error signal counts."""
    params = {"out": drawn(5, 2), "w": drawn(5, 5)}

    def loss(p, x, extra=0.0):
        def turn(u, _):
            v = p["w"] @ u
            u = p["w"].T @ (v / jnp.linalg.norm(v))
            return u / jnp.linalg.norm(u), None

        u, _ = jax.lax.scan(turn, jnp.ones(5, x.dtype), None, length=4)
        norm = jnp.linalg.norm(p["w"] @ jax.lax.stop_gradient(u))
        return jnp.mean((jax.nn.relu(x @ (p["w"] / norm) + extra) @ p["out"]) ** 2)

    flow = fnn.watch(loss, groups=["gradient", "error"])(params, X)
    errors = rows(flow, "log10_error")
    assert {path: np.shape(values) for path, values in errors.items()} == {"w": (), "out": ()}
    want = in_float64(jax.grad(loss, argnums=(0, 2)), params, X, jnp.zeros((6, 5)))
    np.testing.assert_allclose(errors["w"], np.log(np.sqrt(6) * np.linalg.norm(want[1])), atol=1e-5)
    for path, exact in log_norms(want[0]).items():
        np.testing.assert_allclose(rows(flow)[path], exact, atol=1e-5)


def test_a_kernel_with_an_addition_of_low_rank():
    """x @ (w + a @ b): one layer, that of the largest array; gradients of all three."""
    params = {"a": drawn(5, 2), "b": jnp.zeros((2, 5)), "out": drawn(5, 2), "w": drawn(5, 5)}

    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ (p["w"] + p["a"] @ p["b"])) @ p["out"]) ** 2)

    flow = fnn.watch(loss)(params, X)
    assert list(rows(flow, "log10_error")) == ["w", "out"] and not flow.labels.notes
    found = rows(flow)
    assert found["a"] == -np.inf
    for path, exact in log_norms(in_float64(jax.grad(loss), params, X)).items():
        np.testing.assert_allclose(found[path], exact, atol=1e-5)


def test_second_moments_of_infinite_activations():
    """No number of float32's has a second moment beyond 2^256: an infinity has none at all."""
    for x in (X.at[0, 0].set(jnp.inf), X.at[0, 0].set(-jnp.inf).at[1, 1].set(jnp.inf)):
        flow = jax.jit(fnn.watch(lambda p, x: jnp.mean(jnp.tanh(x @ p)), groups="activation"))(jnp.ones((5, 1)), x)
        (value,) = (row.value for row in flow.rows() if row.quantity == "input_second_moment")
        assert not np.isfinite(value)


def test_a_loss_that_makes_its_data_itself():
    """No argument meets the weights: the layers are found all the same."""

    def loss(p, scale):
        x = jnp.linspace(-1, 1, 10).reshape(2, 5)
        return jnp.mean(scale * jnp.tanh(x @ p["w"]) ** 2)

    flow = fnn.watch(loss, batch_size=2)({"w": drawn(5, 3)}, jnp.ones(()))
    assert list(rows(flow, "log10_error")) == ["w"]
