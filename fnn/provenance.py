"""What a study was made of: names of functions, digests of data, versions, devices, commit."""

import hashlib
import inspect
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnn import losses


def kind_of(name: str, values: Iterable[Any]) -> str:
    """Name the one type that the values of an axis have: int, float, bool or str."""
    kinds = {type(value) for value in values}
    if name in ("sigma_w", "sigma_b", "learning_rate", "clip_threshold") or kinds == {int, float}:
        return "float"
    if len(kinds) > 1:
        raise TypeError(
            f"study: values of {name} must have one type, got {', '.join(sorted(k.__name__ for k in kinds))}"
        )
    return kinds.pop().__name__


def function_name(function: Any) -> str:
    """Name a function, and tell two of one name apart by their source where it is to be had."""
    if isinstance(function, losses.Loss):
        return repr(function)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        source = "" if name.startswith("fnn.") else inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    return f"{name} {hashlib.sha256(source.encode()).hexdigest()[:12]}" if source else name


def digest(parts: Iterable[Iterable[Any]]) -> str:
    """Give a short name that two data sets share only if their numbers are the same."""
    total = hashlib.sha256()
    for a in (array for part in parts for array in part):
        a = np.ascontiguousarray(a)
        total.update(f"{a.dtype}{a.shape}".encode() + a.tobytes())
    return total.hexdigest()[:16]


def session(executor: str | None) -> dict[str, Any]:
    """Say when, with which versions, on which devices, from which commit a study is worked on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("fnn", "jax", "jaxlib", "optax", "flax", "numpy", "polars")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.local_devices()],
        "commit": _commit(),
        "executor": executor or "this process",
    }


def _commit() -> str | None:
    """Name the commit of the working directory, -dirty if tracked files differ; None outside a repository.

    A repository is anybody's, and its configuration may name programs that git is to run: monitors, filters, hooks.
    To resolve HEAD runs none. Whether files differ is asked from an empty repository beside, with the index, objects
    and files of this one and nobody's configuration: where only a filter makes files differ, they are marked.
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
