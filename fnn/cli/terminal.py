"""What the commands share when they write to a terminal."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def printable(text: str) -> str:
    """Write a text of unknown origin so that it cannot steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def told(text: str, metavar: str | None = None) -> Any:
    """Make what tyro shows as an option's help, in `Annotated[str, told("...")]`: for texts that tables know.

    `metavar` stands for the value in the usage, instead of its type.
    """
    try:
        from tyro.conf import arg
    except ImportError:  # `main` says so
        return text
    return arg(help=text, metavar=metavar)


WIDTH = 140
"""Of what is printed where the output is no terminal."""


def console() -> Any:
    """Open rich's console; `WIDTH` columns wide where the output is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print a warning about a cell that is left out as a sentence, without the line of the program that raised it."""
    from fnn.study.results import LeftOut

    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, LeftOut):
                print(message, file=sys.stderr, flush=True)
            else:
                before(message, category, *rest, **more)

        warnings.simplefilter("always", LeftOut)
        warnings.showwarning = show
        yield
