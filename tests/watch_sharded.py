"""Run by test_watch_exact in a process of its own with eight devices: `watch` has the same rows as on one.

Prints, as its last line, a JSON object of failures by case.
"""

import contextlib
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


@case
def on_the_host():
    """`first_bad` and `diff`. XLA on a CPU has no collective for every way to join flags."""

    def small(p, x):
        return jnp.mean(jnp.tanh(x @ p) ** 2)

    def bad(p, x):
        return small(p, x) + jnp.sum(jnp.log(x * 0))

    wanted = str(fnn.watch(bad).first_bad(PARAMS["out"], X))
    for mesh in (AUTO, EXPLICIT):
        given = placed(mesh, PARAMS["out"]), placed(mesh, X, "d")
        for in_force in (contextlib.nullcontext(), jax.set_mesh(mesh)):
            with in_force:
                assert fnn.watch(small).first_bad(*given) is None
                assert str(fnn.watch(bad).first_bad(*given)) == wanted
    with jax.set_mesh(EXPLICIT):
        assert fnn.diff(small, small)(given[0], *given).verdict == "equal to rounding"


@case
def a_loss_with_a_shard_map_of_its_own():
    def small(p, x):
        return jnp.mean(jnp.tanh(x @ p) ** 2)

    (want,) = [row.value for row in fnn.watch(small)(PARAMS["out"], X).rows() if row.quantity == "log10_gradient"]
    for mesh in (AUTO, EXPLICIT):

        def mine(p, x, mesh=mesh):
            def mean(p, x):
                return jax.lax.pmean(small(p, x), "d")

            return jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())(p, x)

        given = placed(mesh, PARAMS["out"]), placed(mesh, X, "d")
        if mesh is EXPLICIT:
            for call in (fnn.watch(mine), lambda p, x, f=mine: fnn.curvature(f)(p, x).hessian.product(p)):
                try:
                    call(*given)
                    raise AssertionError("an explicit mesh was taken")
                except ValueError as error:
                    assert "must do so on a mesh with automatic axes here" in str(error), error
            continue
        flow = fnn.watch(mine)(*given)
        (found,) = [row.value for row in flow.rows() if row.quantity == "log10_gradient"]
        np.testing.assert_allclose(found, want, rtol=1e-5)
        product = fnn.curvature(mine)(*given).hessian.product(given[0])
        exact = jax.jvp(jax.grad(lambda p: small(p, X)), (PARAMS["out"],), (PARAMS["out"],))[1]
        np.testing.assert_allclose(product, exact, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    failures = {}
    for name, function in CASES.items():
        try:
            function()
        except Exception:
            failures[name] = traceback.format_exc()[-3000:]
    print(json.dumps(failures))
