"""Every test starts from JAX's defaults: float32, one device; on a GPU with products in float32, not in TF32.

Most of the tests' time is compiling. So on a CPU XLA optimises little, unless a test asks for `optimised`, and what one
process has compiled is kept for the others until the run ends; in a folder that JAX_COMPILATION_CACHE_DIR names, for the
next run too. Before JAX 0.11 XLA can also make its kernels without "fusion emitters", which take most of the time of a
compile. On an accelerator programs are compiled as users compile them. NumPy multiplies and factors on one thread: a second
one waits for work most of the time, and burns a core while it waits.
"""

import atexit
import functools
import gc
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported, so no plugin may import it before

import accelerator
import chromium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow


def may_have_accelerator():
    """Whether JAX may find one. Asking JAX would start the backend, which reads XLA_FLAGS only once."""
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    return named != "cpu" if named else bool(importlib.metadata.entry_points(group="jax_plugins"))


if may_have_accelerator():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share one card
else:
    FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):  # newer ones do not know this flag, and would stop here
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    else:  # an eighth less to compile
        FLAGS.append("--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE")
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *(flag for flag in FLAGS if flag.split("=")[0] not in given)])
ON_CPU = not may_have_accelerator() or jax.default_backend() == "cpu"
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
} | ({"jax_disable_most_optimizations": True} if ON_CPU else {"jax_default_matmul_precision": "highest"})
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    SETTINGS["jax_compilation_cache_dir"] = tempfile.mkdtemp(prefix="fnn-tests-")
    atexit.register(shutil.rmtree, SETTINGS["jax_compilation_cache_dir"], ignore_errors=True)
for name, value in SETTINGS.items():
    if name.upper() not in os.environ:
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # child processes compile as this one, or would differ in the last bits


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --slow; a faster test covers the same law")
    config.addinivalue_line("markers", "accelerator: runs on a GPU or TPU too; tests/accelerator.py lists them")
    if not ON_CPU:  # drivers, plugins and other versions of libraries warn there: shown, not failures; fnn's are
        for line in ("default", r"error:::fnn(\..*)?$"):
            config.addinivalue_line("filterwarnings", line)


def pytest_ignore_collect(collection_path: Path, config):
    """Import no other files: some need packages that a machine with an accelerator may not have."""
    if config.option.markexpr == "accelerator" and not accelerator.file_is_chosen(collection_path.name):
        return True


FIRST = ("sharding", "placement", "lowering", "per_example", "compiled")
"""Files that begin: the longest, and those that clear JAX's caches, which takes seconds once they are full."""


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(config, items):
    used = set()
    names = [f"test_{name}" for name in FIRST]
    items.sort(key=lambda item: names.index(item.module.__name__) if item.module.__name__ in names else len(names))
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 9)) <= 4:
        for item in items:  # a file's tests share what their worker has traced and compiled
            if item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    for item in items:
        if slow.covering(item.module.__name__, item.name):
            item.add_marker(pytest.mark.slow)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: needs --slow"))
        elif entry := accelerator.chosen(item.module.__name__, item.name):
            item.add_marker(pytest.mark.accelerator)
            used.add((item.module.__name__, entry))
    for module in {item.module.__name__ for item in items} if all("::" not in arg for arg in config.args) else ():
        for entry in accelerator.TESTS.get(module.removeprefix("test_"), ()):
            if (module, entry) not in used:
                raise pytest.UsageError(
                    f"tests/accelerator.py: {module} has no quick test whose name starts with test_{entry}"
                )
        if wrong := slow.missing(module, [item.name for item in items if item.module.__name__ == module]):
            raise pytest.UsageError(f"tests/slow.py: {module} has no test, or no quick one, of these names: {wrong}")


def pytest_collection_finish():
    """Look for garbage less often: 2.6 of 22 s of some tests went into it, now 0.1."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Let the last line of the run say if the report's page could not be opened in a browser."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if chromium.find() is None and reporter and not hasattr(session.config, "workerinput"):
        reporter.write_line("THE REPORT'S PAGE WENT UNTESTED: no Chromium here (on Debian: apt-get install chromium)")
    return result


@pytest.fixture(autouse=True)
def reseeded(request):
    """Let a test draw the same numbers from its file's generators whichever tests this process has run before it."""
    name, _, _ = request.node.nodeid.partition("@")  # behind it follows a group, where workers share the tests
    seed = zlib.crc32(name.encode())
    for generator in vars(request.module).values():
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = np.random.default_rng(seed).bit_generator.state


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


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    if chromium.find() is None:
        pytest.skip("no Chromium is installed")
    with chromium.Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def as_jax(numbers, dtype=None):
    """Return numbers as a JAX array, of float32 if they are float64. `jnp.asarray` compiles a program for every shape."""
    numbers = np.asarray(numbers)
    return jax.device_put(numbers.astype(dtype or jax.dtypes.canonicalize_dtype(numbers.dtype)))


def randomized(tree, seed=0):
    """Move every floating leaf off its initial value, so that zeros and ones hide nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: as_jax(np.asarray(a) + 0.1 * rng.normal(size=a.shape), a.dtype), tree)


def started(init, *args, key=None, seed=0):
    """Return (params, state) of a layer's `init`, with parameters of about the sizes it would draw, off zero and one.

    NumPy draws them: to compile `init` takes as long as to compile a step, and few tests ask what it draws.
    """
    key, rng = jax.random.key(0) if key is None else key, np.random.default_rng(seed)
    params, state = jax.eval_shape(init, key, *args)

    def draw(path, spec):
        numbers = rng.normal(size=spec.shape)
        if spec.ndim > 1:
            numbers = numbers / np.sqrt(max(1, np.prod(spec.shape[:-1])))
        else:
            numbers = 0.1 * numbers + ("scale" in jax.tree_util.keystr(path[-1:]))
        return as_jax(numbers, spec.dtype)

    if jax.tree.leaves(state):
        state = jax.jit(lambda *args: init(*args)[1])(key, *args)
    return jax.tree_util.tree_map_with_path(draw, params), state


def begun(net, optimizer, x, seed=0):
    """Return the TrainState of a net with `started` parameters: `create` compiles a program for each shape it draws."""
    import fnn

    params, state = started(net.init, x, seed=seed)
    opt_state = jax.jit(fnn.optimizers.per_depth(optimizer).init)(params)
    return fnn.TrainState(params, state, opt_state, jax.random.key(1), as_jax(np.int32(0)))


def assert_same(a, b):
    """Assert that two trees hold the same bits; on an accelerator the same numbers to 2e-6 of the largest of an array.

    There XLA may choose another kernel for an equal product in another program, and adds up scattered numbers in any order.
    """
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        u, v = np.asarray(u), np.asarray(v)
        if ON_CPU or not jnp.issubdtype(v.dtype, jnp.floating):
            np.testing.assert_array_equal(u, v)
        else:
            u, v = u.astype(np.float64), v.astype(np.float64)
            largest = np.max(np.abs(v), initial=0, where=np.isfinite(v))
            np.testing.assert_allclose(u, v, rtol=0, atol=2e-6 * largest)


def by_layer(rows):
    """Group pairs of path and array by layer, in order: [{"kernel": ...}, {"scale": ..., "bias": ...}, ...]."""
    found = []
    for path, leaf in rows:
        parent, _, name = path.rpartition("/")
        if not found or found[-1][0] != parent:
            found.append((parent, {}))
        found[-1][1][name] = leaf
    return [arrays for _, arrays in found]


@functools.cache
def failures_of(table, sections):
    """Run sections of a table in a process of its own, which has several devices; {"section/case": error} of what failed."""
    run = subprocess.run([sys.executable, str(table), *sections], capture_output=True, text=True, env=os.environ)
    if run.returncode:
        return {f"{section}/crash": run.stderr[-3000:] for section in sections}
    return json.loads(run.stdout.splitlines()[-1])
