"""Where a study's numbers come from: hashes of its data, JAX's settings, versions, devices, commit."""

import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnn import lowering
from fnn.study.identity import RECORDED

SETTINGS = {
    "x64": ("jax_enable_x64", jax.enable_x64),
    "matmul_precision": ("jax_default_matmul_precision", jax.default_matmul_precision),
    "prng": ("jax_default_prng_impl", jax.default_prng_impl),
    "threefry_partitionable": ("jax_threefry_partitionable", jax.threefry_partitionable),
}
"""Names in `study.json`: the option of `jax.config`, and the context manager that sets it."""
USUAL = {"x64": False, "matmul_precision": None, "prng": "threefry2x32", "threefry_partitionable": True}
"""What JAX sets where nobody says otherwise."""


@contextmanager
def configured(settings: Mapping[str, Any]) -> Iterator[None]:
    """Compute under the settings in a study's description, in whatever process or thread this is."""
    with ExitStack() as stack:
        for name, (_, context) in SETTINGS.items():
            stack.enter_context(context(settings[name]))
        yield


def settings() -> dict[str, Any]:
    """Read JAX's settings that change numbers; they are part of a study's description."""
    return {name: getattr(jax.config, option) for name, (option, _) in SETTINGS.items()}


def variables(settings: Mapping[str, Any]) -> str:
    """Write settings that are not the usual ones as a shell takes them: "JAX_ENABLE_X64=1"."""
    other = {name: settings[name] for name in SETTINGS if name in settings and settings[name] != USUAL[name]}
    texts = {name: str(int(value) if isinstance(value, bool) else value) for name, value in other.items()}
    return " ".join(f"{SETTINGS[name][0].upper()}={shlex.quote(text)}" for name, text in texts.items())


def hash_arrays(parts: Iterable[Iterable[Any]]) -> str:
    """Give a short name that two data sets share only if their numbers are the same."""
    total = hashlib.sha256()
    for a in (array for part in parts for array in part):
        a = np.ascontiguousarray(a)
        total.update(f"{a.dtype}{a.shape}".encode() + a.tobytes())
    return total.hexdigest()[:16]


def session(executor: str | None) -> dict[str, Any]:
    """Record when, with which versions, on which devices and from which commit a study is run."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    devices = lowering.devices()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in RECORDED}},
        "devices": [f"{device.platform} {device.device_kind}" for device in devices],
        "device_kind": ", ".join(sorted({device.device_kind for device in devices})),
        **settings(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _commit(),
        "executor": executor or "this process",
    }


def _commit() -> str | None:
    """Name the commit of the working directory, -dirty if tracked files differ; None outside a repository.

    The repository may be anybody's, and its configuration may name programs for git to run: monitors, filters, hooks.
    Resolving HEAD runs none of them. To ask whether files differ, git is given an empty repository with the index, objects
    and files of this one, and no configuration; files that differ only by a filter then count as different.
    Where that fails the mark is -unchecked.
    """

    def git(*command: str, **environment: str) -> str:
        settings = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1"} | environment
        options: Any = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", *command], env=settings, stdin=subprocess.DEVNULL, **options).stdout

    failures = (OSError, ValueError, subprocess.SubprocessError)
    places = ("--show-toplevel", "--git-path", "index", "--git-path", "objects")
    try:
        commit, top, index, objects = git("-c", "core.fsmonitor=false", "rev-parse", "HEAD", *places).splitlines()
    except failures:
        return None
    try:
        with tempfile.TemporaryDirectory() as empty:
            bare = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_COUNT": "0"}
            git("init", "--quiet", "--bare", "--template=", empty, **bare)
            (Path(empty) / "HEAD").write_text(commit)
            bare |= {"GIT_DIR": empty, "GIT_WORK_TREE": top, "GIT_INDEX_FILE": os.path.abspath(index)}
            bare |= {"GIT_OBJECT_DIRECTORY": os.path.abspath(objects)}
            changed = git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all", **bare)
    except failures:
        return f"{commit}-unchecked"
    return f"{commit}-dirty" if changed else commit
