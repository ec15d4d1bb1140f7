"""One device and four give the same numbers: the table behind `test_sharding.py`, run in a process with four devices.

Each section compares what a batch of 8 gives on one device with what it gives cut in four. It prints, as its last line, a
JSON object of failures by section and row.
"""

import functools
import json
import os
import sys
import traceback

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import randomized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import CASES, sample

import fnn

KEY = jax.random.key(3)
AUTO = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
SGD = optax.sgd(0.1)
SECTIONS = {}


def section(function):
    SECTIONS[function.__name__] = function
    return function


def differences(got, want, rtol=3e-5):
    """Say where two trees differ by more than rounding, relative to the largest number of the whole tree."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = [
        (fnn.tree.path(path), np.asarray(a, np.float64), np.asarray(b, np.float64))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    ]
    scale = max(float(np.max(np.abs(b), initial=0, where=np.isfinite(b))) for _, _, b in pairs)
    for path, a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=path)


def sums(outputs, targets):
    """A loss of any output: float[batch]."""
    floating = [a for a in jax.tree.leaves(outputs) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(3 * a) / a[0].size, axis=tuple(range(1, a.ndim))) for a in floating)


def together(names, optimizer=SGD):
    """One net of many layers side by side, each with an input of its own: as many programs as for a single layer."""
    cases = [case._replace(shape=(8, *case.shape[1:])) for case in CASES if names(case)]
    net = fnn.branches({case.name: case.layer for case in cases})
    x = {case.name: sample(case, jax.random.key(i)) for i, case in enumerate(cases)}
    params, state = net.init(jax.random.key(1), x)
    return net, *begun(randomized(params), state, x, optimizer)


def begun(params, state, x, optimizer=SGD):
    zero = jnp.zeros((), jnp.int32)
    return fnn.TrainState(params, state, optimizer.init(params), KEY, zero), (x, jnp.arange(8) % 3)


def out_specs(want):
    """Replicated, except what belongs to single examples, whose axis comes last."""
    state, metrics = want
    own = ("per_example_norms", "per_example_norms_by_layer")
    last = lambda a: P(*[None] * (a.ndim - 1), "d")  # noqa: E731
    return P(), {name: jax.tree.map(last, v) if name in own else P() for name, v in metrics.items()}


def compare(net, loss, optimizer, state, batch, settings=(True, False), **options):
    want = jax.jit(fnn.train_step(net, loss, optimizer, **options).pure)(state, batch)
    step = fnn.train_step(net, loss, optimizer, axis_name="d", **options).pure
    for checked in settings:
        if checked == "vmap":
            lanes = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), batch)
            got = jax.jit(jax.vmap(step, (None, 0), axis_name="d"))(state, lanes)
            got = jax.tree.map(lambda a, s: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1) if "d" in s else a[1], got, spread(want))
        else:
            mapped = jax.shard_map(step, mesh=AUTO, in_specs=(P(), P("d")), out_specs=out_specs(want), check_vma=checked)
            got = jax.jit(mapped)(state, batch)
        try:
            differences(got, want)
        except AssertionError as error:
            raise AssertionError(f"check_vma={checked}: {error}") from None


def spread(want):
    state, metrics = out_specs(want)
    return jax.tree.map(lambda _: state, want[0]), {n: jax.tree.map(lambda _, s=s: s, want[1][n]) if isinstance(s, P) else s for n, s in metrics.items()}


@section
def layers():
    net, state, batch = together(lambda case: not case.noisy)
    yield "all", functools.partial(compare, net, sums, SGD, state, batch, (True, False), per_layer=True)


@section
def per_example():
    net, state, batch = together(lambda case: jax.tree.leaves(jax.eval_shape(case.layer.init, KEY, sample(case, KEY))[0]))
    options = {"per_example": "clip", "max_norm": 3.0, "per_layer": True}
    yield "all", functools.partial(compare, net, sums, SGD, state, batch, (True, False), **options)


if __name__ == "__main__":
    import time

    found = {}
    for name in sys.argv[1:] or SECTIONS:
        start = time.time()
        for row, check in SECTIONS[name]():
            try:
                check()
            except Exception as error:
                found[f"{name}/{row}"] = f"{type(error).__name__}: {str(error)[:600]}"
                if "-v" in os.environ.get("SHARDED", ""):
                    traceback.print_exc()
        print(name, f"{time.time() - start:.1f} s", flush=True)
    print(json.dumps(found))
