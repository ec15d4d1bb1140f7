"""Run by test_watch_exact in a process of its own with eight devices: `watch` has the same rows as on one.

Prints, as its last line, a JSON object of failures by case.
"""

import functools
import json
import os
import traceback

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Programs for several CPU devices that JAX reads back from its cache abort the process. It looks once, at the first compile.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fnn

AUTO = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
RNG = np.random.default_rng(0)
DEPTH, WIDTH, BATCH = 40, 8, 16
CASES = {}


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"blocks": {"b": drawn(DEPTH, WIDTH), "w": drawn(DEPTH, WIDTH, WIDTH) / 2}, "out": drawn(WIDTH, WIDTH)}
X, Y = drawn(BATCH, WIDTH), jnp.asarray(RNG.integers(0, WIDTH, BATCH))


def loss(p, x, y):
    x, _ = jax.lax.scan(lambda x, p: (jax.nn.sigmoid(x @ p["w"] + p["b"]), None), x, p["blocks"])
    logits = jax.nn.log_softmax(x @ p["out"])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))


@functools.cache
def alone():
    return fnn.watch(loss).value_and_grad(PARAMS, X, Y)


def same(flow):
    want = alone()[1]
    assert flow.labels.series == want.labels.series
    np.testing.assert_allclose(flow.numbers(), want.numbers(), rtol=1e-5, atol=1e-5)


def close(gradient):
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(alone()[0][1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def case(function):
    CASES[function.__name__] = function
    return function


def placed(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


@case
def batch_sharded():
    for mesh in (AUTO, EXPLICIT):
        batch = placed(mesh, (X, Y), "d")
        (_, gradient), flow = fnn.watch(loss).value_and_grad(placed(mesh, PARAMS), *batch)
        same(flow)
        close(gradient)


@case
def batch_sharded_under_jit():
    for mesh in (AUTO, EXPLICIT):
        same(jax.jit(fnn.watch(loss))(placed(mesh, PARAMS), *placed(mesh, (X, Y), "d")))


@case
def parameters_sharded():
    for mesh in (AUTO, EXPLICIT):
        blocks = {"b": placed(mesh, PARAMS["blocks"]["b"], None, "d"), "w": placed(mesh, PARAMS["blocks"]["w"], "d")}
        params = {"blocks": blocks, "out": placed(mesh, PARAMS["out"], None, "d")}
        (_, gradient), flow = jax.jit(fnn.watch(loss).value_and_grad)(params, *placed(mesh, (X, Y)))
        same(flow)
        close(gradient)


@case
def under_shard_map():
    cut = fnn.watch(loss, axis_name="d")
    for check_vma in (True, False):

        def run(params, x, y):
            (_, gradient), flow = cut.value_and_grad(params, x, y)
            return flow, gradient

        mapped = jax.shard_map(
            run, mesh=AUTO, in_specs=(P(), P("d"), P("d")), out_specs=(P(), P()), check_vma=check_vma
        )
        flow, gradient = jax.jit(mapped)(PARAMS, X, Y)
        numbers, want = ({row[1:3]: row[3] for row in f.rows()} for f in (flow, alone()[1]))
        for name, value in numbers.items():
            np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-5, err_msg=str(name))
        close(gradient)
        np.testing.assert_allclose(flow.loss, alone()[1].loss, rtol=1e-5)


@case
def in_float64():
    def relu_net(p, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, p)[0] ** 2)

    kernels = jnp.asarray(np.random.default_rng(1).normal(size=(40, WIDTH, WIDTH)) / 100, jnp.float32)
    want = fnn.watch(relu_net)(kernels, X)
    assert "measured in float64" in want.labels.notes[0]
    for mesh in (AUTO, EXPLICIT):
        flow = fnn.watch(relu_net)(placed(mesh, kernels), placed(mesh, X, "d"))
        assert flow.labels.series == want.labels.series
        np.testing.assert_allclose(flow.numbers(), want.numbers(), rtol=1e-6)


if __name__ == "__main__":
    failures = {}
    for name, function in CASES.items():
        try:
            function()
        except Exception:
            failures[name] = traceback.format_exc()[-3000:]
    print(json.dumps(failures))
