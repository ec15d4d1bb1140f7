"""Every test starts from JAX's defaults: float32, one CPU device.

Most of the tests' time is compiling. So XLA optimises little, unless a test asks for `optimised`, and what one process has
compiled is kept for the others until the run ends; in a folder that JAX_COMPILATION_CACHE_DIR names, for the next run too.
Before JAX 0.11 XLA can also make its kernels without "fusion emitters", which take most of the time of a compile.
"""

import atexit
import os
import shutil
import tempfile

import chromium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

SETTINGS = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    SETTINGS["jax_compilation_cache_dir"] = tempfile.mkdtemp(prefix="fnn-tests-")
    atexit.register(shutil.rmtree, SETTINGS["jax_compilation_cache_dir"], ignore_errors=True)
for name, value in SETTINGS.items():
    if name.upper() not in os.environ:
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # child processes compile as this one, or would differ in the last bits
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # newer ones do not know this flag, and would stop here
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(flag for flag in FLAGS if flag.split("=")[0] not in given)])


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --slow; a faster test covers the same law")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: needs --slow"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Let the last line of the run say if the report's page could not be opened in a browser."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if chromium.find() is None and reporter and not hasattr(session.config, "workerinput"):
        reporter.write_line("THE REPORT'S PAGE WENT UNTESTED: no Chromium here (on Debian: apt-get install chromium)")
    return result


@pytest.fixture
def optimised():
    """Compile as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64():
    """Compute in float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


def randomized(tree, seed=0):
    """Move every floating leaf off its initial value, so that zeros and ones hide nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a) + 0.1 * rng.normal(size=a.shape), a.dtype), tree)


def by_layer(rows):
    """Group pairs of path and array by layer, in order: [{"kernel": ...}, {"scale": ..., "bias": ...}, ...]."""
    found = []
    for path, leaf in rows:
        parent, _, name = path.rpartition("/")
        if not found or found[-1][0] != parent:
            found.append((parent, {}))
        found[-1][1][name] = leaf
    return [arrays for _, arrays in found]
