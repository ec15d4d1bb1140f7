"""Run by test_exact_models in a process of its own with four devices: the same exact gradients as on one."""

import functools
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

# Programs for four CPU devices that JAX reads back from its cache abort the process. It looks once, at the first compile.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fnn.gradients import exact

DEPTH, WIDTH, BATCH = 60, 8, 8
MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


def loss(params, x):
    x = jax.lax.scan(lambda x, w: (jax.nn.sigmoid(x @ w), None), x, params)[0]
    return jnp.mean(x**2)


def mapped_inside(check_vma):
    """The loss calls shard_map."""

    @functools.partial(
        jax.shard_map, mesh=MESH, in_specs=(P(), P("d")), out_specs=P(), axis_names={"d"}, check_vma=check_vma
    )
    def mean(params, x):
        return jax.lax.pmean(loss(params, x), "d")

    return lambda params, x: logs(mean)(params, x)


def logs(loss):
    return lambda params, x: exact.gradient(loss)(params, x)[1].log_norm(1)


def mapped_outside(params, x):
    """shard_map calls the exact gradient, and the loss averages over the devices."""

    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d"))
    def run(params, x):
        def mean(params, x):
            return jax.lax.pmean(loss(params, x), "d")

        return logs(mean)(jax.lax.pcast(params, "d", to="varying"), x)[None]

    return run(params, x)


@functools.partial(jax.shard_map, mesh=MESH, in_specs=(P("d"), P("d")), out_specs=P("d"))
def gathered(params, x):
    """Parameters cut in four, gathered by each device: the cotangent is scattered again."""

    def mean(params, x):
        return jax.lax.pmean(loss(jax.lax.all_gather(params, "d", tiled=True), x), "d")

    return logs(mean)(params, x)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(DEPTH, WIDTH, WIDTH)) / np.sqrt(WIDTH), jnp.float32)
    x = jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)
    want = jax.jit(logs(loss))(params, x)
    assert want.min() < -88, "float32 holds these gradients, so that nothing is tested"
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    for check_vma in (True, False):
        close(jax.jit(mapped_inside(check_vma))(params, x), want)
    sharded = jax.device_put(x, jax.NamedSharding(MESH, P("d")))
    close(jax.jit(logs(loss))(params, sharded), want)
    close(jax.jit(gathered)(params, x), want)
    # A device's own part of the mean: together they are the whole.
    parts = jax.jit(mapped_outside)(params, x)
    assert parts.shape == (4, DEPTH) and np.isfinite(parts).all() and parts.min() < -88
    lanes = jax.jit(jax.vmap(logs(loss), (0, None)))(jnp.stack([params, 0.5 * params]), x)
    close(lanes[0], want)
    assert (lanes[1] < lanes[0]).all()
    print("as on one device")
