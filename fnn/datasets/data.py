"""Data sets by name and from files: digits, IDX (MNIST and similar sets), `.npz`; this is `fnn.data`.

Loaders run on the host in NumPy and return finished arrays, always `(train, test)`. The same key gives the same bits on
every device. Labels are int32 from 0 upwards; they are never renumbered.
"""

import gzip
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.check import choice, describe
from fnn.datasets.dataset import (
    Dataset,
    Parts,
    as_pair,
    batches,
    check_dataset,
    generator,
    random_split,
    same_features,
    shuffled,
    split,
    standardize,
)
from fnn.datasets.synthetic import adding, clusters, number_words, spirals, teacher

__all__ = [
    "Dataset",
    "Parts",
    "adding",
    "batches",
    "check_dataset",
    "clusters",
    "digits",
    "idx",
    "load",
    "npz",
    "number_words",
    "read_idx",
    "shuffled",
    "spirals",
    "split",
    "standardize",
    "teacher",
]

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
PathLike = str | os.PathLike

ROOM = 2**26
INFLATION = 64
"""Packed files may inflate to ROOM bytes, or to INFLATION times their size on disk, if that is more. MNIST's files inflate
by a factor of five, zip bombs by a thousand."""


def digits(*, key: jax.Array, test: float = 0.2, standardized: bool = True, image: bool = False) -> Parts:
    """Load scikit-learn's 1797 handwritten digits, 8x8 pixels in [0, 1], and split them by key, stratified.

    `x: float32[n, 64]` or, with `image`, `float32[n, 8, 8, 1]`; `y: int32[n]` in 0..9. Each pixel is standardised as in
    `standardize`, or stays in [0, 1] with `standardized=False`. Source: Alpaydin & Kaynak 1998, UCI, optdigits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data.digits: needs scikit-learn; install fnn[study]") from error
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape((-1, 8, 8, 1) if image else (-1, 64))
    parts = random_split("data.digits", x, y, generator("data.digits", key), test)
    train, test_part = standardize(*parts) if standardized else parts
    return train, test_part


def idx(
    folder: PathLike, *, key: jax.Array | None = None, test: float | None = None, standardized: bool = True
) -> Parts:
    """Load MNIST or a similar set from a folder: `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, plain or gzipped.

    `x: float32[n, rows, cols, 1]`, scaled to [0, 1] and, unless `standardized=False`, standardised by one scalar mean
    and std over all pixels of the training part (pixels share their unit, and borders are constant); `y: int32[n]`.
    The names with a dot, `train-images.idx3-ubyte`, are found too. With a fraction `test`, the train files are split by
    `key`, stratified, and the t10k files stay unused: so you can make choices on that test part.
    Source: LeCun, Cortes & Burges, yann.lecun.com/exdb/mnist.
    """
    who, folder = "data.idx", Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{who}: the folder must exist, got {str(folder)!r}; put the four IDX files there")
    if test is None:
        parts = _as_given(who, _idx_part(folder, "train"), _idx_part(folder, "t10k"))
    elif key is None:
        raise ValueError(f"{who}: test={test!r} splits the train files by key, got key=None; pass jax.random.key(0)")
    else:
        parts = random_split(who, *_idx_part(folder, "train"), generator(who, key), test)
    if not standardized:
        return parts
    x = np.asarray(parts[0].x)
    mean, scale = float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64)) + 1e-8
    train, test_part = (Dataset((x - mean) / scale, y) for x, y in parts)
    return train, test_part


def read_idx(path: PathLike) -> np.ndarray:
    """Read one IDX file: two zero bytes, type code, rank, sizes as big-endian uint32, values big-endian.

    All six types (u1, i1, i2, i4, f4, f8) and any rank; the result has the machine's byte order and is writeable. Gzip is
    recognised by its first two bytes, not by the name. Refused before they take memory: a file that is longer or shorter
    than its header says, and gzip that would inflate too far (see `ROOM`). Source: LeCun, Cortes & Burges, yann.lecun.com/exdb/mnist, "The IDX file format".
    """
    who, path = "data.read_idx", Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{who}: the path must name a file, got {str(path)!r}; check its spelling")
    size = path.stat().st_size
    with path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            return _read_idx(who, path, file, None if zipped else size, max(ROOM, INFLATION * size))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{who}: a gzip file must be whole, got {path} ({error}); fetch it again") from error


def _read_idx(who: str, path: Path, file: Any, size: int | None, most: int) -> np.ndarray:
    """Read the header first, then no more bytes than it says, and never more than `most`."""
    raw = file.read(4)
    if raw[:2] != b"\0\0" or raw[2:3] not in map(bytes, zip(IDX_TYPES, strict=True)):
        file.read(2**20)  # raises for damaged gzip, which is the better error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        got = f"{raw.hex(' ') or 'nothing'} in {path}"
        raise ValueError(f"{who}: a file must start with 00 00, type code and rank, got {got}; is it an IDX file?")
    if raw[2] not in IDX_TYPES:
        codes = ", ".join(f"{code:#04x}" for code in IDX_TYPES)
        raise ValueError(f"{who}: the type code must be one of {codes}, got {raw[2]:#04x} in {path}; fetch it again")
    raw += file.read(4 * raw[3])
    dtype, start = np.dtype(IDX_TYPES[raw[2]]), 4 + 4 * raw[3]
    # A header cut short decodes to wrong sizes, but then `start` alone is more than the file holds.
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    need = start + math.prod(shape) * dtype.itemsize
    if size is None and need > most:
        got = f"{need} bytes in {path}"
        raise ValueError(
            f"{who}: a gzip file must not inflate to more than {most} bytes, got {got}; unpack it yourself"
        )
    if size is None:
        raw += file.read(max(0, need + 1 - len(raw)))
        extra = len(raw) > need
        long, size = f"{'more than ' * extra}{min(need, len(raw))}", len(raw)
    else:
        long = str(size)
    if size != need:
        got = f"{long} in {path} ({'extra bytes' if size > need else 'truncated'})"
        raise ValueError(f"{who}: a file must be as long as its header says, {need} bytes, got {got}; fetch it again")
    raw += file.read(need - len(raw))
    try:
        return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{who}: sizes must fit in a NumPy array, got {list(shape)} in {path} ({error})") from error


def npz(path: PathLike, *, key: jax.Array | None = None, test: float = 0.2, standardized: bool = True) -> Parts:
    """Load an `.npz` file: x_train, y_train, x_test, y_test as they are, or x and y, split by `key`, stratified.

    Each feature is standardised as in `standardize` (integers become float32). Pass `standardized=False` for tokens, which
    must stay integers. `key` and `test` are for the second form only. Pickled objects are never loaded.
    """
    who, path = "data.npz", Path(path).expanduser()
    parted = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise FileNotFoundError(f"{who}: the path must name a file, got {str(path)!r}; check its spelling")
    if not zipfile.is_zipfile(path):  # asked first, because np.load also takes .npy files and tries pickles
        raise ValueError(f"{who}: the file must be a whole zip archive, got {path}; save it again with np.savez")
    damaged = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = list(file.files)
            names = next((names for names in (parted, ("x", "y")) if set(names) <= set(held)), ())
            with zipfile.ZipFile(path) as archive:
                _check_members(path, archive, names)
            arrays = [np.asarray(file[name]) for name in names]
    except (*damaged, OverflowError, MemoryError) as error:
        got = f"{path} ({error})"
        raise ValueError(f"{who}: arrays must be whole and numeric, got {got}; save it with np.savez") from error
    if not names:
        got = f"{', '.join(held) or 'nothing'} in {path}"
        raise ValueError(f"{who}: the file must hold x and y, or {', '.join(parted)}, got {got}; rename them")
    if names == parted:
        parts = _as_given(who, arrays[:2], arrays[2:])
    elif key is None:
        raise ValueError(f"{who}: a file with x and y is split by key, got key=None; pass key=jax.random.key(0)")
    else:
        parts = random_split(who, arrays[0], arrays[1], generator(who, key), test)
    train, test_part = standardize(*parts) if standardized else parts
    return train, test_part


def load(name_or_path: PathLike, *, key: jax.Array, image: bool = False) -> Parts:
    """Load a data set by name, from a folder of IDX files, or from an `.npz` file, with default options.

    Names: "digits" (with `image` as images), "clusters", "spirals", "adding", "number_words". A name comes before a folder
    of the same name; write `./digits` for the folder.
    """
    who = "data.load"
    if name_or_path == "digits":
        return digits(key=key, image=image)
    if isinstance(name_or_path, str) and name_or_path in NAMES:
        return NAMES[name_or_path](key=key)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return idx(path)
    if path.is_file() and path.suffix == ".npz":
        return npz(path, key=key)
    if path.exists():
        raise ValueError(f"{who}: a file must be an .npz archive, got {str(path)!r}; for IDX give its folder")
    if isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix:  # a bare word: a name, misspelt
        choice(who, [*NAMES, "a folder of IDX files", "an .npz file"], name=name_or_path)
    raise FileNotFoundError(f"{who}: the path must be a folder or an .npz file, got {str(path)!r}; check its spelling")


NAMES = {
    "digits": digits,
    "clusters": clusters,
    "spirals": spirals,
    "adding": adding,
    "number_words": number_words,
}
"""The data sets that are made here, and come before files of the same name."""


def _check_members(path: Path, archive: zipfile.ZipFile, names: Any) -> None:
    """Refuse arrays whose headers claim more than the archive has, or whose data would inflate too far."""
    most = max(ROOM, INFLATION * path.stat().st_size)
    infos = [info for info in archive.infolist() if info.filename.removesuffix(".npy") in names]
    if (total := sum(info.file_size for info in infos)) > most:
        raise ValueError(f"{total} bytes when unpacked, of at most {most}")
    for info in infos:
        name = info.filename
        with archive.open(info) as file:
            if file.read(6) != b"\x93NUMPY":
                continue  # np.load gives its bytes, no numbers
            file.seek(0)
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"{name} is written in version {version} of the format, not 1.0 or 2.0")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            claimed, holds = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
            if not dtype.hasobject and claimed != holds:
                raise ValueError(f"{name} claims {claimed} bytes and holds {holds}")


def _as_given(who: str, train: Any, test: Any) -> Parts:
    train, test = (Dataset(*map(jnp.asarray, as_pair(who, *pair))) for pair in (train, test))
    same_features(who, train, test)
    return train, test


def _idx_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    paths = []
    for kind in ("images-idx3", "labels-idx1"):
        looked = [f"{part}-{name}-ubyte{end}" for name in (kind, kind.replace("-", ".")) for end in ("", ".gz")]
        found = [folder / name for name in looked if (folder / name).is_file()]
        if not found:
            got = f"none of {', '.join(looked)} in {str(folder)!r}"
            raise FileNotFoundError(f"data.idx: the folder must hold {part} {kind[:6]}, got {got}; put one there")
        paths.append(found[0])
    images, labels = (read_idx(path) for path in paths)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        got = f"{describe(images)} in {paths[0]}"
        raise ValueError(f"data.idx: images must be uint8[n,rows,cols], got {got}; use read_idx and split")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        got = f"{describe(images)} in {paths[0].name} and {describe(labels)} in {paths[1].name}"
        raise ValueError(f"data.idx: every image must have one integer label, got {got}; fetch both again")
    return np.divide(images if images.ndim == 4 else images[..., None], 255, dtype=np.float32), labels
