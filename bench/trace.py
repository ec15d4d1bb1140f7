"""Profiles: record a round with JAX's profiler, and add up where the time went."""

import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def record(work: Callable[[], Any], folder: Path, steps: int, most: int = 12) -> list[str]:
    """Write a profiler trace of `work()` to a folder; return the kernels that took longest, one line each.

    The folder can be opened with TensorBoard's profile plugin or XProf, or its `.xplane.pb` read by
    `jax.profiler.ProfileData`. Times are added up over all threads and kernels of one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(str(folder)):
        work()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    taken: dict[str, list[float]] = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                # Python's frames start with $, the runtime's own spans have :: or spaces; kernels look like dot.12.
                if re.fullmatch(r"[\w\-]+(\.\d+)*", event.name) and event.duration_ns > 0:
                    taken[re.sub(r"(\.\d+)+$", "", event.name)].append(event.duration_ns / 1e3)
    total = sum(map(sum, taken.values()))
    longest = sorted(taken.items(), key=lambda item: -sum(item[1]))[:most]
    return [
        f"{sum(us) / steps:10.1f} us a step  {100 * sum(us) / total:4.0f} %  {len(us) / steps:6.1f} calls  {name}"
        for name, us in longest
    ]
