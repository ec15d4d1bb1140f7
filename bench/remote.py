"""A process for the peers on PyTorch: what they import, compile, spin and reserve on the card does not meet the others.

One process serves all of them, one after another; one that died or hung is replaced for the next peer. JAX draws weights
and data on the CPU there, so that two libraries need not share one set of CUDA libraries.
"""

import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench import problem
from bench.problem import Row
from bench.timing import Run

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share the card
LIMIT = 240.0
"""Seconds that a first call, or a round, may take."""


class Remote:
    """Stand for a `timing.Run` whose work is done, and timed, by another process; it sleeps in between.

    `build(*arguments)`, a function of a module, makes the run there. It begins at once: `first_round` waits for it.
    """

    items: tuple[None, ...] = ()

    def __init__(self, build: Callable[..., Run], *arguments: Any):
        self._server = _server()
        self._name = self._server.ask("build", (jax.config.jax_default_matmul_precision, build, arguments))
        self._first = self._server.ask("first_round", self._name)

    def first_round(self) -> tuple[float, np.ndarray]:
        """As `Run.first_round`."""
        self.items = (None,) * self._server.answer(self._name)
        return self._server.answer(self._first)

    def advance(self, items: Any) -> tuple[float, list[Any]]:
        """As `Run.advance`, over the process's own items."""
        return self._server.answer(self._server.ask("advance", self._name)), []

    def last_losses(self) -> np.ndarray:
        """As `Run.last_losses`."""
        return self._server.answer(self._server.ask("last_losses", self._name))

    def close(self) -> None:
        """Let the process forget the run and free its memory, when it has done what it does."""
        self._server.ask("close", self._name)


def step_run(name: str, row: Row, steps: int) -> Run:
    """Build a peer of the suite `step`."""
    from bench.peers import PEERS

    return PEERS[name].build(_problem(row, steps))


@functools.lru_cache(maxsize=1)
def _problem(row: Row, steps: int) -> problem.Problem:
    return problem.make(row, steps)  # one for all peers of a row: to draw the largest takes many seconds on a CPU


class _Server:
    """The process, and the answers that nobody asked for yet."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        platform = jax.devices()[0].platform
        self._process = context.Process(target=_serve, args=(theirs, platform), daemon=True)
        self._process.start()
        theirs.close()
        self._tickets, self._answers = itertools.count(), {}
        self.alive = True

    def ask(self, what: str, argument: Any) -> int:
        """Send a request; return the ticket for its answer."""
        ticket = next(self._tickets)
        with contextlib.suppress(OSError):  # `answer` says so
            self._pipe.send((ticket, what, argument))
        return ticket

    def answer(self, ticket: int) -> Any:
        """Wait for an answer; raise it if it is an exception."""
        end = time.monotonic() + LIMIT
        while ticket not in self._answers:
            try:
                if not self._pipe.poll(max(0.0, end - time.monotonic())):
                    self._process.terminate()
                    raise RuntimeError(f"no answer within {LIMIT:.0f} s")
                number, result = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join(10)
                self.alive = False
                raise RuntimeError(f"the process ended with exit code {self._process.exitcode}") from None
            except RuntimeError:
                self.alive = False
                raise
            self._answers[number] = result
        result = self._answers.pop(ticket)
        if isinstance(result, BaseException):
            raise result
        return result


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers or not _servers[-1].alive:
        _servers.append(_Server())
    return _servers[-1]


platform: str = ""
"""In the process for PyTorch: the platform that the others run on."""


def _serve(pipe: Any, others: str) -> None:
    from bench.registry import Skip
    from bench.report import describe_error

    global platform
    platform = others
    jax.config.update("jax_platforms", "cpu")

    runs: dict[int, Run] = {}

    def act(ticket, what, argument):
        if what == "build":
            precision, build, arguments = argument
            jax.config.update("jax_default_matmul_precision", precision)
            runs[ticket] = build(*arguments)
            return len(runs[ticket].items)
        if what == "close":
            runs.pop(argument, None)
            gc.collect()
            if torch := sys.modules.get("torch"):
                if not runs:
                    torch.compiler.reset()
                torch.cuda.empty_cache()
            return None
        run = runs[argument]
        return run.advance(run.items)[0] if what == "advance" else getattr(run, what)()

    while True:
        try:
            ticket, what, argument = pipe.recv()
        except EOFError:  # the parent ended
            return
        try:
            answer = act(ticket, what, argument)
        except Skip as skip:
            answer = skip
        except Exception as error:
            answer = RuntimeError(describe_error(error))
        pipe.send((ticket, answer))
