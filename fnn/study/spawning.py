"""Checks before processes are spawned: workers must be able to import the study's functions, and its script again."""

import ast
import inspect
import os
import pickle
import sys
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

from fnn import lowering

GUARD = 'if __name__ == "__main__":'


def check_spawning(executor: Executor | None, workers: int, functions: Mapping[str, Any]) -> None:
    """Refuse what spawned processes cannot import, and an accelerator that they cannot share, before anything runs.

    Errors: ValueError for a lambda, for a function defined inside a function or in a notebook, for a script without a
    guard (`if __name__ == "__main__":`), and where each process takes most of a device's memory. A worker that is
    importing a script without a guard exits with that sentence.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    if not (isinstance(executor, ProcessPoolExecutor) or (executor is None and workers > 1)):
        return
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that imports the script
        raise SystemExit(_unguarded())
    if lowering.holds_the_device():
        raise ValueError(
            "study: worker processes cannot share an accelerator when each takes most of its memory, got "
            f"{f'workers={workers}' if executor is None else type(executor).__name__}; use workers=1, which runs on all "
            "devices of this machine, or on a GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false before JAX starts"
        )
    for name, function in functions.items():
        try:
            content = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
            content = b""
        if not content or (b"__main__" in content and not _main_is_a_file()):
            raise ValueError(
                f"study: with worker processes {name} must be a function at the top of a file, which they can import, "
                f"got {getattr(function, '__qualname__', function)!r}; define it there with def, or use workers=1"
            )
    if _called_without_guard():
        raise ValueError(_unguarded())


def _unguarded() -> str:
    return (
        f"study: with worker processes the script must run the study under {GUARD}, got a call outside of it, which each "
        "worker would repeat when it imports the script; move it there, or use workers=1"
    )


def _main_is_a_file() -> bool:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return not spec.name.endswith("__main__")
    return os.path.isfile(getattr(main, "__file__", None) or "")


def _called_without_guard() -> bool:
    """Whether no `if` on `__name__` stands before or around the line of the script that leads here."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    spec = getattr(main, "__spec__", None)
    if path is None or (spec is not None and spec.name.endswith("__main__")):  # `python -m fnn`: not imported again
        return False
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    if frame is None:
        return False
    try:
        with open(path, encoding="utf-8") as file:
            statements = ast.parse(file.read()).body
    except (OSError, SyntaxError, ValueError):
        return False
    before = [node for node in statements if node.lineno <= frame.f_lineno]
    return not any(isinstance(node, ast.If) and _asks(node.test) for node in before)


def _asks(test: ast.expr) -> bool:
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(test)}
    return bool(names & {"__name__", "parent_process", "current_process"})
