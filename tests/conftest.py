"""Every test starts from JAX's defaults: float32, one CPU device."""

import chromium
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Let the last line of the run say if the report's page could not be opened in a browser."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if chromium.find() is None and reporter and not hasattr(session.config, "workerinput"):
        reporter.write_line("THE REPORT'S PAGE WENT UNTESTED: no Chromium here (on Debian: apt-get install chromium)")
    return result


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request):
    """Where most of a module's time is compiling, XLA need not optimise: `COMPILED_QUICKLY = True` in the module."""
    if getattr(request.module, "COMPILED_QUICKLY", False):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
    else:
        yield


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
    return jax.tree.map(lambda a: jnp.asarray(a + 0.1 * rng.normal(size=a.shape), a.dtype), tree)


def by_layer(rows):
    """Group pairs of path and array by layer, in order: [{"kernel": ...}, {"scale": ..., "bias": ...}, ...]."""
    found = []
    for path, leaf in rows:
        parent, _, name = path.rpartition("/")
        if not found or found[-1][0] != parent:
            found.append((parent, {}))
        found[-1][1][name] = leaf
    return [arrays for _, arrays in found]
