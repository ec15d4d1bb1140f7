"""Trees of arrays in one file, an `.npz` that NumPy opens too: `save` and `load`. Reading one executes nothing."""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, files, tree
from fnn.tree import PyTree

HEADER = "fnn.json"
FOLDER_FILE = "checkpoint.npz"
"""Where a folder of `fit` holds its state."""
NATIVE = "?biufc"
"""Kinds of dtypes that NumPy writes itself; others (bfloat16, float8) are written as integers of their width."""


@dataclass(frozen=True)
class Content:
    """A tree on the host: its arrays by path as NumPy writes them, and what their dtypes are."""

    arrays: dict[str, np.ndarray]
    leaves: dict[str, dict[str, str]]
    """By path: `dtype`, and for random keys `key`, their implementation."""


def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Write a tree of arrays (a `TrainState`, parameters of any library) to one file, whole or not at all.

    Every leaf becomes an array of the .npz under its path (`params/1/kernel`), and a JSON text beside them, `fnn.json`, holds
    their dtypes: bfloat16 and other types that NumPy does not have are written as unsigned integers of the same width, random
    keys as their numbers with the name of their implementation. Sharded arrays are gathered; of several processes that share
    an array all must call `save`, and the first writes.

    Errors: TypeError for a leaf that is no array or number; OSError, naming the file.
    """
    content = encode("save", tree)
    write(Path(path), content, {}, "save")


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read the tree that `save` wrote; `like` is a tree of the same structure, shapes and dtypes.

    Leaves of `like` are arrays, `jax.ShapeDtypeStruct`s (`jax.eval_shape` makes a tree of them without computing) or numbers;
    where they are sharded, the result is too, on any number of devices. `path` may also be a folder that
    `fit(..., checkpoint=folder)` wrote: then the last state is read.

    Errors: ValueError, naming the leaf, for a file of another structure, shape or dtype, and for one that is damaged or that
    `save` did not write; OSError for one that cannot be read.
    """
    path = Path(path)
    folder = path.is_dir()
    content, _ = read(path / FOLDER_FILE if folder else path, "load")
    return decode("load", like, content, "state/" if folder else "")


class HostKey(NamedTuple):
    """Random keys on the host: their numbers, dtype and implementation."""

    data: np.ndarray
    dtype: str
    implementation: str


def to_host(tree: PyTree, copy: bool = False) -> PyTree:
    """Replace every array of JAX by one of NumPy, with `copy` one that shares no memory with it, and keys by `HostKey`s."""
    several = jax.process_count() > 1

    def one(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        if _is_key(leaf):
            return HostKey(one(jax.random.key_data(leaf)), str(leaf.dtype), str(jax.random.key_impl(leaf)))
        if several and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.array(leaf) if copy else np.asarray(leaf)

    return jax.tree.map(one, tree)


def encode(who: str, tree: Any) -> Content:
    """Name the arrays of a tree by their paths, each as NumPy can write it."""
    content = Content({}, {})
    for name, leaf in _named(to_host(tree), is_leaf=lambda node: isinstance(node, HostKey)):
        if isinstance(leaf, HostKey):
            content.leaves[name] = {"dtype": leaf.dtype, "key": leaf.implementation}
            content.arrays[name] = leaf.data
        else:
            content.leaves[name] = {"dtype": _dtype(who, name, leaf)}
            a = np.asarray(leaf)
            content.arrays[name] = a if a.dtype.kind in NATIVE else a.view(f"u{a.dtype.itemsize}")
    return content


def decode(who: str, like: Any, content: Content, prefix: str = "") -> Any:
    """Build the tree `like` from the arrays whose paths start with `prefix`, each where its leaf of `like` is.

    Errors: ValueError, naming the first leaf that differs.
    """
    wanted = dict(_named(like))
    found = {name.removeprefix(prefix): name for name in content.arrays if name.startswith(prefix)}
    rule = f"{who}: the file must hold a tree like the one that is asked for"
    remedy = "pass a tree of the same net, optimizer and settings"
    if missing := next((name for name in wanted if name not in found), None):
        raise ValueError(f"{rule}, got none at {missing!r}; {remedy}")
    if more := next((name for name in found if name not in wanted), None):
        raise ValueError(f"{rule}, got one more leaf, at {more!r}; {remedy}")
    for name, leaf in wanted.items():
        a, dtype = content.arrays[found[name]], content.leaves[found[name]]["dtype"]
        key = "key" in content.leaves[found[name]]
        got, want = (dtype, a.shape[:-1] if key else a.shape), (_dtype(who, name, leaf), np.shape(leaf))
        if got != want:
            (there, at), (here, to) = got, want
            raise ValueError(
                f"{rule}, got {there}[{','.join(map(str, at))}] at {name!r} where {here}[{','.join(map(str, to))}] is asked "
                f"for; {remedy}"
            )
    leaves = [_placed(leaf, content.arrays[found[name]], content.leaves[found[name]]) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def write(path: Path, content: Content, extra: Mapping[str, Any], who: str) -> None:
    """Write a file of arrays and of what else is JSON, in the first of several processes."""
    if jax.process_index():
        return

    def fill(file):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(HEADER, json.dumps({"format": 1, "leaves": content.leaves} | dict(extra)))
            for name, a in content.arrays.items():
                member = zipfile.ZipInfo(f"{name}.npy")
                member.file_size = a.nbytes + 4096  # so that it leaves room for more than 2 GiB where that is needed
                with archive.open(member, "w") as part:
                    a = np.asarray(a, order="C")
                    np.lib.format.write_array_header_1_0(part, np.lib.format.header_data_from_array_1_0(a))
                    part.write(a.reshape(-1).view(np.uint8).data)

    files.write(path, fill, who)


def read(path: Path, who: str) -> tuple[Content, dict[str, Any]]:
    """Read a file that `write` wrote: its arrays and the rest of its header."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            header = json.loads(archive.read(HEADER))
            leaves = header.pop("leaves")
            content = Content({}, leaves)
            for name in leaves:
                with archive.open(f"{name}.npy") as part:
                    content.arrays[name] = np.lib.format.read_array(part, allow_pickle=False)
                    part.read(1)  # the end, where the checksum is compared
    except OSError as error:
        raise type(error)(f"{who}: cannot read {path}: {error.strerror or error}; check the path") from None
    except Exception as error:
        reason = arrays.first_line(error)
        raise ValueError(
            f"{who}: {path} must be a file that fnn.save or fit wrote, got one that is damaged or something else ({reason}); "
            "restore it, or pass another"
        ) from None
    if header.get("format") != 1:
        raise ValueError(
            f"{who}: {path} must have format 1, got {header.get('format')}; read it with the fnn that wrote it"
        )
    return content, header


def _named(of: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
    """List (path, leaf); a path that comes twice gets a number."""
    seen: dict[str, int] = {}
    named = []
    for entries, leaf in jax.tree_util.tree_leaves_with_path(of, is_leaf=is_leaf):
        name = tree.path(entries) or "array"
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name}#{seen[name]}", leaf))
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _dtype(who: str, name: str, leaf: Any) -> str:
    """Name a leaf's dtype; that of a Python number is its type."""
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return type(leaf).__name__
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not (_is_key(leaf) or np.dtype(dtype).kind in NATIVE or jnp.issubdtype(dtype, np.number)):
        raise TypeError(
            f"{who}: every leaf must be an array or a number, got {arrays.brief(leaf)} at {name!r}; leave it out, for example by "
            "equinox.partition(model, equinox.is_array) or nnx.split"
        )
    return str(dtype)


def _placed(like: Any, a: np.ndarray, entry: dict[str, str]) -> Any:
    """Make an array of the file what its leaf of `like` is, and put it where that is."""
    if not hasattr(like, "dtype"):
        return type(like)(a.item())
    if not _is_key(like):
        a = a.view(like.dtype)
    if isinstance(like, np.ndarray | np.generic):
        return a
    sharding = getattr(like, "sharding", None)
    if sharding is None or (isinstance(like, jax.Array) and not like.committed):
        placed = jnp.array(a)
    else:
        placed = jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
    return jax.random.wrap_key_data(placed, impl=entry["key"]) if _is_key(like) else placed
