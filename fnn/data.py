"""Data sets as pairs of arrays: digits, IDX files (MNIST and its kin), `.npz` files, and three synthetic families.

Loaders work on the host in NumPy and hand over finished arrays; every loader returns `(train, test)`. The same key
gives the same bits on every device, because it seeds a NumPy generator: shuffling by `jax.random` would compile anew
for every size. Labels are int32 from 0 upwards, taken as they are and never renumbered.
"""

import gzip
import math
import numbers
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.check import above_zero, choice, describe, fraction, positive

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
PathLike = str | os.PathLike


class Dataset(NamedTuple):
    """Hold examples `x: [n, ...]` and their labels or targets `y: [n, ...]`; unpacks as `x, y`.

    `len` is 2, as of any pair; the number of examples is `size`.
    """

    x: jax.Array
    y: jax.Array

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.x.shape[0]


Parts = tuple[Dataset, Dataset]


def check_dataset(who: str, x: Any, y: Any) -> None:
    """Refuse a pair of arrays that cannot be learned from; reads the values on the host.

    Both must hold numbers, equally many examples on their first axes and at least one, and be finite where they are
    floating: one NaN among a million pixels turns the whole net into NaN without saying where it came from.
    """
    pair = {"x": np.asarray(x), "y": np.asarray(y)}
    got = f"{describe(pair['x'])} and {describe(pair['y'])}"
    for name, a in pair.items():
        if not (jnp.issubdtype(a.dtype, np.number) or a.dtype == bool):
            raise TypeError(f"{who}: {name} must hold numbers, got {a.dtype}; encode it as numbers first")
    if 0 in (pair["x"].ndim, pair["y"].ndim):
        raise ValueError(f"{who}: x and y must have the examples on their first axes, got {got}; add the axis")
    if len(pair["x"]) != len(pair["y"]):
        raise ValueError(f"{who}: x and y must hold the same number of examples, got {got}; pair them first")
    if len(pair["x"]) == 0:
        raise ValueError(f"{who}: a data set must hold at least one example, got {got}; add some")
    for name, a in pair.items():
        if jnp.issubdtype(a.dtype, np.inexact) and not (finite := np.isfinite(a)).all():
            got = f"{np.sum(~finite)} non-finite values, first at example {np.nonzero(~finite)[0][0]}"
            raise ValueError(f"{who}: {name} must be finite, got {got}; drop or impute them")


def shuffled(key: jax.Array, n: int) -> jax.Array:
    """Draw a permutation of 0..n-1: int[n], the order of one sort of 32 random bits for each place.

    Half the work of `jax.random.permutation`, which sorts again lest equal bits keep their order: n²/2^33 pairs do.
    """
    return jnp.argsort(jax.random.bits(key, (n,)))


def split(x: Any, y: Any, *, key: jax.Array, test: float = 0.2, stratify: bool = True) -> Parts:
    """Split at random into train and test, `round(test * n)` examples in the latter (at least 1, at most n - 1).

    `x: [n, ...], y: [n, ...] -> (train, test)`, both shuffled. Where y is an integer vector and `stratify` holds, every
    class is in both parts, and less than one example away from `test * count` in the test part (largest remainders;
    lifting tiny classes to one example can move the total). Other y are split without regard to their values.
    Which examples go where follows from `key`; how many does not. Integer y become int32.
    """
    return _split("data.split", x, y, _rng("data.split", key), test, stratify)


def standardize(train: Dataset, *others: Dataset, eps: float = 1e-8) -> tuple[Dataset, ...]:
    """Standardise every feature, (x - mean) / (std + eps), by the mean and std of the training part alone.

    `x: [n, *features] -> float[n, *features]`; integers become float32. The moments are two-pass in float64. A feature
    that is constant in train is only centred: it is exactly 0 there, and a test value that differs is not divided by
    eps (in the digits one pixel is lit in one image of 1797 and would become 1e8).
    """
    parts = (train, *others)
    _at_least_zero("data.standardize", "eps", eps)
    _same_features("data.standardize", *parts)
    for part in parts:
        check_dataset("data.standardize", *part)
    x = np.asarray(train.x, np.float64)
    constant = x.min(0) == x.max(0)
    mean = np.where(constant, x[0], x.mean(0))  # the mean of n equal numbers can miss them by a rounding error
    scale = np.where(constant, 1.0, x.std(0) + eps)
    scaled = []
    for x, y in parts:
        dtype = x.dtype if jnp.issubdtype(x.dtype, np.inexact) else np.float32
        scaled.append(Dataset(jnp.asarray(((np.asarray(x, np.float64) - mean) / scale).astype(dtype)), y))
    return tuple(scaled)


def digits(*, key: jax.Array, test: float = 0.2, standardized: bool = True, image: bool = False) -> Parts:
    """Load scikit-learn's 1797 handwritten digits, 8x8 pixels in [0, 1], and split them by key, stratified.

    `x: float32[n, 64]` or, with `image`, `float32[n, 8, 8, 1]`; `y: int32[n]` in 0..9. Each pixel is standardised as in
    `standardize`, or with `standardized=False` left in [0, 1]. Source: Alpaydin & Kaynak 1998, UCI, optdigits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data.digits: needs scikit-learn; install fnn[study]") from error
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape((-1, 8, 8, 1) if image else (-1, 64))
    parts = _split("data.digits", x, y, _rng("data.digits", key), test)
    train, test_part = standardize(*parts) if standardized else parts
    return train, test_part


def idx(
    folder: PathLike, *, key: jax.Array | None = None, test: float | None = None, standardized: bool = True
) -> Parts:
    """Load MNIST or its kin from a folder: `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, plain or gzipped.

    `x: float32[n, rows, cols, 1]`, scaled to [0, 1] and, unless `standardized=False`, standardised by one scalar mean
    and std over all pixels of the training part (pixels share their unit, and borders are constant); `y: int32[n]`.
    The names with a dot, `train-images.idx3-ubyte`, are found too. With a fraction `test`, the train files alone are
    split by `key`, stratified, so that choices made on that test part leave the t10k files untouched.
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
        parts = _split(who, *_idx_part(folder, "train"), _rng(who, key), test)
    if not standardized:
        return parts
    x = np.asarray(parts[0].x)
    mean, scale = float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64)) + 1e-8
    train, test_part = (Dataset((x - mean) / scale, y) for x, y in parts)
    return train, test_part


def read_idx(path: PathLike) -> np.ndarray:
    """Read one IDX file: two zero bytes, type code, rank, sizes as big-endian uint32, values big-endian.

    Any of the six types (u1, i1, i2, i4, f4, f8), any rank; the result has the machine's byte order and is writeable.
    Gzip is told by its first two bytes, not by the name. A file that is longer or shorter than its header says is
    refused. Source: LeCun, Cortes & Burges, yann.lecun.com/exdb/mnist, "The IDX file format".
    """
    who, path = "data.read_idx", Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{who}: the path must name a file, got {str(path)!r}; check its spelling")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{who}: a gzip file must be whole, got {path} ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        got = f"{raw[:4].hex(' ') or 'nothing'} in {path}"
        raise ValueError(f"{who}: a file must start with 00 00, type code and rank, got {got}; is it an IDX file?")
    if raw[2] not in IDX_TYPES:
        codes = ", ".join(f"{code:#04x}" for code in IDX_TYPES)
        raise ValueError(f"{who}: the type code must be one of {codes}, got {raw[2]:#04x} in {path}; fetch it again")
    dtype, start = np.dtype(IDX_TYPES[raw[2]]), 4 + 4 * raw[3]
    # A header cut short decodes to wrong sizes, but then `start` alone is more than the file holds.
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    need = start + math.prod(shape) * dtype.itemsize
    if len(raw) != need:
        got = f"{len(raw)} in {path} ({'extra bytes' if len(raw) > need else 'truncated'})"
        raise ValueError(f"{who}: a file must be as long as its header says, {need} bytes, got {got}; fetch it again")
    try:
        return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:
        raise ValueError(f"{who}: sizes must fit in a NumPy array, got {list(shape)} in {path} ({error})") from error


def npz(path: PathLike, *, key: jax.Array | None = None, test: float = 0.2, standardized: bool = True) -> Parts:
    """Load an `.npz` file: x_train, y_train, x_test, y_test as they are, or x and y, split by `key`, stratified.

    Each feature is standardised as in `standardize` (integers become float32), unless `standardized=False`: token
    numbers must stay integers. `key` and `test` serve the second form only. Pickled objects are never loaded.
    """
    who, path = "data.npz", Path(path).expanduser()
    parted = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise FileNotFoundError(f"{who}: the path must name a file, got {str(path)!r}; check its spelling")
    if not zipfile.is_zipfile(path):  # asked first, because np.load also takes .npy files and tries pickles
        raise ValueError(f"{who}: the file must be a whole zip archive, got {path}; save it again with np.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = list(file.files)
            names = next((names for names in (parted, ("x", "y")) if set(names) <= set(held)), ())
            arrays = [np.asarray(file[name]) for name in names]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
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
        parts = _split(who, arrays[0], arrays[1], _rng(who, key), test)
    train, test_part = standardize(*parts) if standardized else parts
    return train, test_part


def clusters(
    *, key: jax.Array, examples: int = 1000, features: int = 2, classes: int = 3, spread: float = 1.0, test: float = 0.2
) -> Parts:
    """Draw Gaussian clusters, x = centre[y] + spread * N(0, I), with balanced labels.

    `x: float32[n, features], y: int32[n]`. The centres stand evenly on a circle in a random plane through 0, neighbours
    4 apart, so that the best possible error is known: Q(2/spread) for two classes, and between that and twice that
    for more (2.3 % to 4.6 % at spread 1), Q being the upper tail of the normal distribution.
    """
    who = "data.clusters"
    positive(who, examples=examples, features=features, classes=classes)
    above_zero(who, spread=spread)
    if features < 2 or classes < 2:
        got = f"features={features}, classes={classes}"
        raise ValueError(f"{who}: features and classes must be at least 2, got {got}; ask for more")
    rng = _rng(who, key)
    plane = np.linalg.qr(rng.standard_normal((features, 2)))[0]  # an orthonormal pair, uniformly random
    angle = 2 * np.pi * np.arange(classes) / classes
    centres = 2 / np.sin(np.pi / classes) * np.stack([np.cos(angle), np.sin(angle)], -1) @ plane.T
    y = np.arange(examples) % classes
    x = centres[y] + spread * rng.standard_normal((examples, features))
    return _split(who, x.astype(np.float32), y, rng, test)


def spirals(
    *, key: jax.Array, examples: int = 1000, classes: int = 2, noise: float = 0.1, turns: float = 1.5, test: float = 0.2
) -> Parts:
    """Draw interleaved spirals, x = r (cos a, sin a) + noise * N(0, I), a = 2 pi (r + y) / classes.

    `x: float32[n, 2], y: int32[n]`, labels balanced. Radii reach `turns * classes`, about uniform along the arm; on
    every ray neighbouring arms lie 1 apart: `noise` is in units of that gap. Source: Lang & Witbrock 1988.
    """
    who = "data.spirals"
    positive(who, examples=examples, classes=classes)
    above_zero(who, turns=turns)
    _at_least_zero(who, "noise", noise)
    rng = _rng(who, key)
    y = np.arange(examples) % classes
    # The arc grows as r dr, so that the square root of a uniform number spreads examples evenly along it.
    r = turns * classes * np.sqrt(rng.random(examples))
    a = 2 * np.pi * (r + y) / classes
    x = r[:, None] * np.stack([np.cos(a), np.sin(a)], -1) + noise * rng.standard_normal((examples, 2))
    return _split(who, x.astype(np.float32), y, rng, test)


def teacher(
    *,
    key: jax.Array,
    examples: int = 1000,
    features: int = 16,
    width: int = 32,
    outputs: int = 1,
    noise: float = 0.0,
    test: float = 0.2,
) -> Parts:
    """Draw a regression task from a random teacher, y = tanh(x W / sqrt(features)) V / sqrt(width) + noise * N(0, I).

    `x: float32[n, features], y: float32[n, outputs]`; x, W and V are standard normal. For one key, x and the teacher's
    part of y do not depend on `noise`. The least mean squared error of any student on fresh data is noise**2.
    Source: Gardner & Derrida 1989 (the teacher-student setting).
    """
    who = "data.teacher"
    positive(who, examples=examples, features=features, width=width, outputs=outputs)
    _at_least_zero(who, "noise", noise)
    rng = _rng(who, key)
    x, w, v = (rng.standard_normal(shape) for shape in ((examples, features), (features, width), (width, outputs)))
    y = np.tanh(x @ w / math.sqrt(features)) @ v / math.sqrt(width) + noise * rng.standard_normal((examples, outputs))
    return _split(who, x.astype(np.float32), y.astype(np.float32), rng, test)


def load(name_or_path: PathLike, *, key: jax.Array) -> Parts:
    """Load "digits", "clusters" or "spirals", a folder of IDX files, or an `.npz` file, each with its defaults.

    A name wins over a folder of the same name; write `./digits` for the folder.
    """
    who, names = "data.load", {"digits": digits, "clusters": clusters, "spirals": spirals}
    if isinstance(name_or_path, str) and name_or_path in names:
        return names[name_or_path](key=key)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return idx(path)
    if path.is_file() and path.suffix == ".npz":
        return npz(path, key=key)
    if path.exists():
        raise ValueError(f"{who}: a file must be an .npz archive, got {str(path)!r}; for IDX give its folder")
    if isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix:  # a bare word: a name, misspelt
        choice(who, [*names, "a folder of IDX files", "an .npz file"], name=name_or_path)
    raise FileNotFoundError(f"{who}: the path must be a folder or an .npz file, got {str(path)!r}; check its spelling")


def batches(
    dataset: tuple[Any, Any], batch_size: int, *, key: jax.Array, epochs: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over batches `x: [batch_size, ...], y: [batch_size, ...]` in NumPy, reshuffled by key in every epoch.

    Within an epoch no example comes twice; the last, partial batch is dropped, so that every batch has one shape. An
    epoch's order depends on `key` and its number alone, not on `epochs`.
    """
    who = "data.batches"
    positive(who, batch_size=batch_size, epochs=epochs)
    x, y = (np.asarray(a) for a in dataset)
    check_dataset(who, x, y)
    if batch_size > len(x):
        raise ValueError(f"{who}: batch_size must not exceed the {len(x)} examples, got {batch_size}; make it smaller")
    _rng(who, key)

    def iterate():  # a function of its own, so that the refusals above come at the call and not at the first batch
        for epoch in range(epochs):
            order = _rng(who, key, 1 + epoch).permutation(len(x))
            for i in range(0, len(x) - batch_size + 1, batch_size):
                yield x[order[i : i + batch_size]], y[order[i : i + batch_size]]

    return iterate()


def _arrays(who: str, x: Any, y: Any) -> list[np.ndarray]:
    """Check the pair and cast it as JAX would, but never let an integer wrap or a float overflow in silence."""
    pair = [np.asarray(x), np.asarray(y)]
    check_dataset(who, *pair)
    for i, (name, a) in enumerate(zip("xy", pair, strict=True)):
        label = name == "y" and a.dtype.kind in "biu"
        dtype = np.dtype(np.int32) if label else jax.dtypes.canonicalize_dtype(a.dtype)
        if label and a.size and a.min() < 0:
            raise ValueError(f"{who}: integer labels must be at least 0, got {a.min()}; map them to 0, 1, 2, ...")
        if jnp.issubdtype(a.dtype, np.integer) and a.size and not (a.astype(dtype) == a).all():
            raise ValueError(f"{who}: {name} must fit in {dtype}, got values from {a.min()} to {a.max()}; map them")
        with np.errstate(over="ignore"):  # the infinities are refused below, with their place in the data
            pair[i] = a.astype(dtype, copy=False)
    check_dataset(who, *pair)
    return pair


def _split(who: str, x: Any, y: Any, rng: np.random.Generator, test: float, stratify: bool = True) -> Parts:
    above_zero(who, test=test)
    fraction(who, test=test)
    x, y = _arrays(who, x, y)
    n = len(x)
    if n < 2:
        raise ValueError(f"{who}: a split must leave an example in both parts, got {n} example; give at least 2")
    strata = y if stratify and y.ndim == 1 and y.dtype.kind in "biu" else np.zeros(n, int)
    classes, stratum, counts = np.unique(strata, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        got = f"class {classes[counts.argmin()]} with {counts.min()}"
        raise ValueError(f"{who}: stratify needs at least 2 examples of every class, got {got}; or pass stratify=False")
    # Largest remainders: round down, then give the rest to the classes that lost most, keeping one in either part.
    share = float(test) * counts
    take = np.clip(np.floor(share), 1, counts - 1).astype(int)
    spare = max(0, round(float(test) * n) - take.sum())
    order = np.argsort(take - share, kind="stable")
    order = order[(take < np.minimum(share, counts - 1))[order]][:spare]
    take[order] += 1
    # Shuffle all, number the examples of each class in that order, and the first `take` of each are the test part.
    order = rng.permutation(n)
    by_class = np.argsort(stratum[order], kind="stable")
    rank = np.empty(n, int)
    rank[by_class] = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = rank < take[stratum[order]]
    train, test_part = (Dataset(jnp.asarray(x[i]), jnp.asarray(y[i])) for i in (order[~chosen], order[chosen]))
    return train, test_part


def _as_given(who: str, train: Any, test: Any) -> Parts:
    train, test = (Dataset(*map(jnp.asarray, _arrays(who, *pair))) for pair in (train, test))
    _same_features(who, train, test)
    return train, test


def _same_features(who: str, train: Any, *others: Any) -> None:
    for other in others:
        if train[0].shape[1:] != other[0].shape[1:]:
            got = f"{describe(train[0])} and {describe(other[0])}"
            raise ValueError(f"{who}: all parts must have the features of the training part, got {got}; reshape them")


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


def _rng(who: str, key: Any, *more: int) -> np.random.Generator:
    """Seed a host generator with all bits of the key, and with `more` to get another stream from the same key."""
    try:
        bits = np.asarray(jax.random.key_data(key))
    except (TypeError, AttributeError):
        bits = np.zeros(())
    if bits.ndim != 1 or bits.dtype != np.uint32:
        got = describe(key) if hasattr(key, "dtype") else repr(key)
        raise TypeError(f"{who}: key must be one PRNG key, got {got}; pass jax.random.key(0)")
    return np.random.default_rng([*map(int, bits), *more])


def _at_least_zero(who: str, name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{who}: {name} must be a finite number of at least 0, got {value!r}")
