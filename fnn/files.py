"""Files that are there whole or not at all: written aside and renamed, locked while in use, read with a sentence."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RENAMES_OPEN_FILES = os.name != "nt"
"""Whether the system renames and removes files that are open; one that does not needs no claims on them."""


def write(path: Path, content: Any, who: str = "study", remedy: str = "make room, or choose another folder") -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen.

    `content` is bytes, or a function that writes to the open file.

    Errors: OSError, naming the file; what was there before is then still there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            claim(file)
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if RENAMES_OPEN_FILES:
                os.replace(part, path)  # still claimed, so that `sweep` lets it be
        if not RENAMES_OPEN_FILES:
            os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # or it would hide the reason
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error, who, remedy) from None
        raise


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int, who: str = "plot") -> None:
    """Write a matplotlib figure, in the format that the name ends in (.png where it has no end), whole or not at all."""
    path = Path(path)
    if not path.suffix:
        path = path.with_name(path.name + ".png")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=path.suffix[1:])
    write(path, drawn.getvalue(), who)


def sweep(*folders: Path) -> None:
    """Remove the temporary files that killed processes have left in folders, and none that is still being written."""
    for part in (part for folder in folders for part in folder.glob(".*.part")):
        with suppress(OSError), open(part, "r+b") as file:
            if claim(file):
                part.unlink()
        if not RENAMES_OPEN_FILES:
            with suppress(OSError):  # it is open elsewhere
                part.unlink()


def set_aside(path: Path) -> Path:
    """Rename a file to a free name in the same folder, and return that name.

    Errors: OSError, naming the file.
    """
    names = (path.with_name(f"{path.name}.aside{n or ''}") for n in range(10_000))
    try:
        aside = next(name for name in names if not os.path.lexists(name))
        os.rename(path, aside)
    except OSError as error:
        raise cannot_write(path, error) from None
    return aside


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock (`.lock` in it), which the system gives back however this process ends.

    Errors: OSError for a folder that another run holds, or that cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(f"study: {folder} is in use by another run; wait for it, or choose another folder") from None
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def claim(file: Any) -> bool:
    """Keep an open file from `sweep` until it is closed, or its process ends; False where that cannot be done.

    So it is where another process has it, and where the file system or this installation has no locks.
    """
    if not RENAMES_OPEN_FILES:
        return False
    try:
        from filelock import lock_descriptor

        return lock_descriptor(file.fileno(), blocking=False)
    except (OSError, ImportError):
        return False


def load_json(path: Path, shape: Any) -> Any:
    """Read a JSON file whose content has the `shape` that `misfit` understands.

    Errors: ValueError for one that is damaged or of another shape, OSError for one that cannot be read.
    """
    try:
        content = json.loads(path.read_bytes().decode())
        wrong = misfit(content, shape)
    except OSError as error:
        raise type(error)(f"study: cannot read {path}: {error.strerror or error}; check its permissions") from None
    except RecursionError:
        wrong = "nested too deeply"
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(
            f"study: {path} is damaged ({wrong:.200}); restore it, or choose another folder: the finished cells beside it "
            "are as they were"
        )
    return content


def misfit(value: Any, shape: Any, name: str = "it") -> str | None:
    """Say where a value differs from a shape; None where it does not.

    A shape is a type, or a tuple of types (`object` is any); [shape], a list of such values; {name: shape}, an object
    that has at least these names; {str: shape}, an object with any names and such values.
    """
    kind = type(shape) if isinstance(shape, list | dict) else shape
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds and object not in kinds:
        words = " or ".join({"NoneType": "null"}.get(k.__name__, k.__name__) for k in kinds)
        return f"{name} must be of type {words}, got {type(value).__name__}"
    if isinstance(shape, list):
        parts = ((f"{name}[{i}]", item, shape[0]) for i, item in enumerate(value))
    elif isinstance(shape, dict) and str in shape:
        parts = ((f"{name}[{key!r}]", item, shape[str]) for key, item in value.items())
    elif isinstance(shape, dict):
        if missing := [key for key in shape if key not in value]:
            return f"{name} must have {missing[0]!r}"
        parts = ((f"{name}[{key!r}]", value[key], inner) for key, inner in shape.items())
    else:
        return None
    return next((wrong for n, item, inner in parts if (wrong := misfit(item, inner, n))), None)


def cannot_write(path: Path, error: OSError, who: str = "study", remedy: str = "make room, or choose another folder"):
    """Return the error that says in a sentence which file could not be written, and why; its errno is kept."""
    said = OSError(f"{who}: cannot write {path}: {error.strerror or error}; {remedy}")
    said.errno = error.errno
    return said
