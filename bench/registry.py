"""The table of peers. A new peer is one function `Problem -> Run` with `@peer` on it."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from bench.problem import Problem
from bench.timing import Run


class Skip(Exception):
    """Raised by a peer that cannot run here; the message says why."""


class Peer(NamedTuple):
    """How to build a peer, and when it takes part."""

    about: str
    build: Callable[[Problem], Run]
    needs: str
    max_depth: int | None
    default: bool
    own_process: bool

    def refusal(self, depth: int, lift_limits: bool) -> str | None:
        """Say why this peer sits out, or None."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.max_depth is not None and depth > self.max_depth and not lift_limits:
            return f"compiles for too long beyond depth {self.max_depth}; --all lifts the limit"
        return None


PEERS: dict[str, Peer] = {}


def peer(
    name: str,
    about: str,
    *,
    needs: str = "",
    max_depth: int | None = None,
    default: bool = True,
    own_process: bool = False,
):
    """Enter a function `Problem -> Run` into the table of peers."""

    def enter(build):
        PEERS[name] = Peer(about, build, needs, max_depth, default, own_process)
        return build

    return enter
