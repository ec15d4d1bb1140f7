"""What a study was made of: names of functions, digests of data, versions, devices, commit."""

import hashlib
import inspect
import platform
import subprocess
import time
from collections.abc import Iterable
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
    """Name the commit of the working directory, with a mark if it holds changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
