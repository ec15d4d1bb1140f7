"""Layers inside other layers: where they are, for errors and for `summary`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from fnn import check

WATCHER: ContextVar[Callable[..., AbstractContextManager[Callable[[Any], None]]] | None] = ContextVar(
    "fnn", default=None
)
"""What sees every layer inside another one as it is applied: `summary`."""


def apply_at(name: str, layer: Any, params: Any, state: Any, x: Any, *, times: int = 1, **options: Any) -> Any:
    """Apply a layer inside another one, at a place with a name; `times` is the number of blocks that it stands for.

    An error gets a note of the place, and a watcher sees what passes. The arguments are those of `apply` and three more.
    """
    watcher = WATCHER.get()
    with located(name, x):
        if watcher is None:
            return layer.apply(params, state, x, **options)
        with watcher(name, layer, params, x, times) as seen:
            y, state = layer.apply(params, state, x, **options)
            seen(y)
        return y, state


@contextmanager
def located(name: str, x: Any) -> Iterator[None]:
    """Add to an error a note of where it arose: `in layer 1/trunk/0, input float32[2,4]` (PEP 678)."""
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        place = next((i for i, note in enumerate(notes) if note.startswith("in layer ")), None)
        if place is None:
            error.add_note(f"in layer {name}, input {check.describe(x)}")
        else:
            notes[place] = f"in layer {name}/{notes[place].removeprefix('in layer ')}"
        raise
