"""What a study was made of: digests of data, JAX's settings, versions, devices, commit."""

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np

from fnn.identity import RECORDED

SETTINGS = {
    "x64": ("jax_enable_x64", jax.enable_x64),
    "matmul_precision": ("jax_default_matmul_precision", jax.default_matmul_precision),
    "prng": ("jax_default_prng_impl", jax.default_prng_impl),
    "threefry_partitionable": ("jax_threefry_partitionable", jax.threefry_partitionable),
}
"""By their names in `study.json`: the option of `jax.config`, and the context that sets it."""


@contextmanager
def configured(settings: Mapping[str, Any]) -> Iterator[None]:
    """Compute under the settings that a study's description holds, in whatever process or thread this is."""
    with ExitStack() as stack:
        for name, (_, context) in SETTINGS.items():
            stack.enter_context(context(settings[name]))
        yield


def settings() -> dict[str, Any]:
    """Read JAX's settings that change a study's numbers: they are part of what it is."""
    return {name: getattr(jax.config, option) for name, (option, _) in SETTINGS.items()}


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

    devices = jax.local_devices()
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
    """Name the commit of the working directory, with a mark if it holds changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
