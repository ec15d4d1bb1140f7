"""Run by test_spectra_devices in a process of its own: spectra on 1, 4 and 8 devices are the same numbers.

A batch is cut in four and parameters in eight: two programs of several devices, which take long to compile.

Prints, as its last line, a JSON object by case: null, or what failed.
"""

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

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(8, 8)), "v": RNG.normal(size=(8, 2))}
X, Y = RNG.normal(size=(16, 8)), RNG.normal(size=(16, 2))
PARAMS, X, Y = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (PARAMS, X, Y))


def outputs(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss(params, x, y):
    return jnp.mean(jnp.sum(jnp.square(outputs(params, x) - y), axis=1))


def numbers(params, x, y):
    """What is the same to rounding: eigenvalues to a tight tolerance, a trace of fixed probes, a kernel, a critical rate."""
    c = fnn.curvature(loss)(params, x, y)
    top = c.hessian.eigenvalues(2, tolerance=1e-5)
    again = c.hessian.eigenvalues(2, tolerance=1e-5, start=top)
    kernel = fnn.kernel(outputs)(params, x).matrix
    trace = c.hessian.trace(8).trace
    return top.values, again.values, trace, c.along_gradient(), c.critical().sharpness, kernel


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3 if a.ndim == 0 else 1e-4, atol=1e-4)


def cases():
    want = jax.jit(numbers)(PARAMS, X, Y)
    H = jax.hessian(lambda v, x, y: loss(fill(v), x, y))(flat(PARAMS), X, Y)
    yield "dense", lambda: close(want[0], np.linalg.eigvalsh(np.asarray(H, np.float64))[::-1][:2])
    for name, count, of_params, of_batch in (("batch", 4, P(), P("d")), ("parameters", 8, P("d"), P())):
        mesh = jax.make_mesh((count,), ("d",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,))
        params = jax.device_put(PARAMS, NamedSharding(mesh, of_params))
        batch = jax.device_put((X, Y), NamedSharding(mesh, of_batch))
        yield f"{name}/{count}", lambda p=params, b=batch: close(jax.jit(numbers)(p, *b), want)


def flat(params):
    return jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(params)])


def fill(v):
    return {"v": v[:16].reshape(8, 2), "w": v[16:].reshape(8, 8)}


if __name__ == "__main__":
    found = {}
    for name, run in cases():
        found[name] = None
        try:
            run()
        except Exception:
            found[name] = traceback.format_exc()[-1500:]
    print(json.dumps(found))
