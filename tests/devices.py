"""What the tables of cases on four devices share: run in a process of its own, which prints failures by section and row."""

import json
import os
import sys
import time
import traceback

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

# Programs for four CPU devices that JAX reads back from its cache abort the process. It looks once, at the first compile.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import conftest  # noqa: F401  (how the tests compile)
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import fnn

KEY = jax.random.key(3)
AUTO = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
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


def slow(row):
    """Name a row that runs with `--slow` alone; a faster one covers the same law."""
    return f"slow {row}"


def run():
    """Run the quick rows of the sections that the command line names, or of all; with `--slow` the slow rows instead.

    The last line is a JSON object of failures by section and row.
    """
    found = {}
    asked = [name for name in sys.argv[1:] if name != "--slow"]
    for name in asked or SECTIONS:
        start = time.process_time()
        for row, check in SECTIONS[name]():
            if row.startswith("slow ") != ("--slow" in sys.argv):
                continue
            try:
                check()
            except Exception as error:
                found[f"{name}/{row}"] = f"{type(error).__name__}: {str(error)[:600]}"
                if os.environ.get("TRACE"):
                    traceback.print_exc()
            print(name, row, f"{time.process_time() - start:.1f} s", flush=True)
    print(json.dumps(found))
