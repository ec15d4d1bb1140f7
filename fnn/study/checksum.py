"""Parquet files that hold a digest of their own bytes: what is damaged is found before any of it is parsed.

The digest stands in the file's metadata, in the note `{"sha256": "...", "study": ..., "cell": ..., "seconds": ...}`; it
is that of all bytes, its own taken as "0". So one file is whole or not at all, plain Parquet for every reader, and may be
copied and renamed; whose cell it is it says itself.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fnn import files

_NOTE = {"study": str, "cell": int, "seconds": {"compile": float, "run": float}}
_MARK = b'{"sha256": "'
_HOLE = b"0" * 64


def pack(table: Any, note: dict[str, Any]) -> bytes:
    """Write the table of a cell as the bytes of a Parquet file, with a note and their digest in its metadata.

    `note` is {"study": key of its description, "cell": its number, "seconds": {"compile": ..., "run": ...}}.
    """
    buffer = io.BytesIO()
    table.write_parquet(buffer, metadata={"fnn": json.dumps({"sha256": _HOLE.decode(), **note})})
    content = buffer.getvalue()
    at = content.rfind(_MARK) + len(_MARK)
    return content[:at] + _digest(content, at) + content[at + len(_HOLE) :]


def check(content: bytes, name: str) -> dict[str, Any]:
    """Return the note of a file whose bytes are those of its digest; `name` begins the sentence of an error.

    Errors: ValueError.
    """
    at = content.rfind(_MARK) + len(_MARK)  # the note is behind all data and their statistics
    if at < len(_MARK):
        raise ValueError(f"{name} is damaged or foreign (it holds no digest)")
    if _digest(content, at) != content[at : at + len(_HOLE)]:
        raise ValueError(f"{name} is damaged (its bytes are not those of its digest)")
    with foreign(name):
        note, _ = json.JSONDecoder().raw_decode(content[at - len(_MARK) :].decode(errors="replace"))
        if wrong := files.misfit(note, _NOTE):
            raise ValueError(wrong)
    return note


@contextmanager
def foreign(name: str) -> Iterator[None]:
    """Say in a sentence what is wrong with a file that another program gave a digest; a panic in Rust is no Exception."""
    import polars as pl

    try:
        yield
    except (Exception, pl.exceptions.PanicException) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{name} is foreign ({first:.200})") from None


def _digest(content: bytes, at: int) -> bytes:
    total = hashlib.sha256(memoryview(content)[:at])
    total.update(_HOLE)
    total.update(memoryview(content)[at + len(_HOLE) :])
    return total.hexdigest().encode()
