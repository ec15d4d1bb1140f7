"""Parquet files that hold a SHA-256 of their own bytes, so that damage is found before any of it is parsed.

The file's metadata hold a note, `{"sha256": "...", "study": ..., "cell": ..., "seconds": ...}`. The SHA-256 is that of all
bytes of the file, with its own digits taken as "0". So one file is whole or not at all, is plain Parquet for every reader,
and may be copied and renamed: the note says whose cell it is.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fnn import files

if TYPE_CHECKING:
    import polars

_NOTE = {"study": str, "cell": int, "seconds": {"compile": float, "run": float}}
_WRONG = (LookupError, OSError, RecursionError, TypeError, ValueError)
_MARK = b'{"sha256": "'
_HOLE = b"0" * 64


def pack(table: "polars.DataFrame", note: dict[str, Any]) -> bytes:
    """Write the table of a cell as the bytes of a Parquet file, with a note and a SHA-256 in its metadata.

    `note` is {"study": key of its description, "cell": its number, "seconds": {"compile": ..., "run": ...}}.
    """
    buffer = io.BytesIO()
    table.write_parquet(buffer, metadata={"fnn": json.dumps({"sha256": _HOLE.decode(), **note})})
    content = buffer.getvalue()
    at = content.rfind(_MARK) + len(_MARK)
    return content[:at] + _digest(content, at) + content[at + len(_HOLE) :]


def check(content: bytes, name: str) -> dict[str, Any]:
    """Return the note of a file whose bytes match its SHA-256. Errors: ValueError, whose sentence begins with `name`."""
    at = content.rfind(_MARK) + len(_MARK)  # the note comes after all data and their statistics
    if at < len(_MARK):
        raise ValueError(f"{name} is damaged or foreign (it holds no SHA-256)")
    if _digest(content, at) != content[at : at + len(_HOLE)]:
        raise ValueError(f"{name} is damaged (its bytes do not match its SHA-256)")
    with foreign(name):
        note, _ = json.JSONDecoder().raw_decode(content[at - len(_MARK) :].decode(errors="replace"))
        if wrong := files.misfit(note, _NOTE):
            raise ValueError(wrong)
    return note


@contextmanager
def foreign(name: str) -> Iterator[None]:
    """Say in a sentence what is wrong with a file that another program wrote and gave a matching SHA-256."""
    import polars as pl

    try:
        yield
    except (*_WRONG, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # a panic is no Exception
        first = str(error).partition("\n")[0]
        raise ValueError(f"{name} is foreign ({first:.200})") from None


def _digest(content: bytes, at: int) -> bytes:
    total = hashlib.sha256(memoryview(content)[:at])
    total.update(_HOLE)
    total.update(memoryview(content)[at + len(_HOLE) :])
    return total.hexdigest().encode()
