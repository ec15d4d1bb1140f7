"""A peer in a process of its own: what it imports, compiles and spins does not meet the others."""

import multiprocessing
from typing import Any

import numpy as np

from bench.problem import Row


class Remote:
    """Stand for a `timing.Run` whose work is done, and timed, by a process of its own; it sleeps in between."""

    items: tuple[None, ...] = ()

    def __init__(self, name: str, row: Row, steps: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, row, steps), daemon=True)
        self._process.start()
        theirs.close()
        self.items = (None,) * self._receive()

    def first_round(self) -> tuple[float, np.ndarray]:
        """As `Run.first_round`."""
        return self._ask("first_round")

    def advance(self, items: Any) -> tuple[float, list[Any]]:
        """As `Run.advance`, over the process's own items."""
        return self._ask("advance"), []

    def last_losses(self) -> np.ndarray:
        """As `Run.last_losses`."""
        return self._ask("last_losses")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Any, name: str, row: Row, steps: int) -> None:
    from bench import problem
    from bench.peers import PEERS, Skip
    from bench.report import describe_error

    def attempt(function):
        try:
            pipe.send(function())
            return True
        except Skip as skip:
            pipe.send(skip)
        except Exception as error:
            pipe.send(RuntimeError(describe_error(error)))
        return False

    run = None

    def build():
        nonlocal run
        run = PEERS[name].build(problem.make(row, steps))
        return len(run.items)

    if not attempt(build):
        return
    actions = {
        "first_round": lambda: run.first_round(),
        "advance": lambda: run.advance(run.items)[0],
        "last_losses": lambda: run.last_losses(),
    }
    while True:
        try:
            what = pipe.recv()
        except EOFError:  # the parent closed its end, or ended
            return
        attempt(actions[what])
