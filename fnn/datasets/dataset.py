"""Data sets: pairs (x, y) of arrays or of trees of arrays; splits, standardised features, batches.

Everything here runs on the host in NumPy and returns finished arrays. The same key gives the same bits on every device,
because it seeds a NumPy generator (`jax.random` would compile a new program for every size).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnn.arrays import array, brief, is_numbers, pair
from fnn.check import above_zero, at_least_zero, describe, fraction, positive, prng_key
from fnn.masks import Masked
from fnn.tree import PyTree


class Dataset(NamedTuple):
    """Examples `x: [n, ...]` and their labels or targets `y: [n, ...]`; it unpacks as `x, y`.

    Both may be trees of arrays (`fnn.Masked`, several inputs or targets by name), each with n examples on its first axis;
    y may be `losses.Weighted(targets, weights)`. `size` is the number of examples; `len` is 2, as for any pair.
    """

    x: PyTree
    y: PyTree

    short_repr = True

    def __repr__(self) -> str:
        return f"Dataset({self.size:,} examples, x {brief(self.x)}, y {brief(self.y)})"

    @property
    def size(self) -> int:
        """Number of examples."""
        return jax.tree.leaves(self.x)[0].shape[0]

    def take(self, index: ArrayLike | slice) -> "Dataset":
        """Take some examples: of every array those at `index`."""
        return jax.tree.map(lambda a: a[index], self)


Parts = tuple[Dataset, Dataset]
Data = Iterable[PyTree]
"""In memory a tuple (x, y) or (x, y, weights), such as a `Dataset`; from outside an iterable of such batches."""


def check_dataset(who: str, x: PyTree, y: PyTree) -> None:
    """Refuse data that no net can learn from; it reads the values, on the host.

    x and y must be numbers, with the same number of examples (at least one) on their first axes, and finite: a single NaN
    makes the whole net NaN, and nothing then says where it came from. In a tree this holds for every array, in a `Masked`
    sequence for the real positions.
    """
    xs, ys = ([np.asarray(array(who, name, a)) for a in _leaves(tree)] for name, tree in (("x", x), ("y", y)))
    for a, b in [(a, ys[0]) for a in xs] + [(xs[0], b) for b in ys[1:]]:
        got = f"{describe(a)} and {describe(b)}"
        if 0 in (a.ndim, b.ndim):
            raise ValueError(f"{who}: x and y must have the examples on their first axes, got {got}; add the axis")
        if len(a) != len(b):
            raise ValueError(f"{who}: x and y must hold the same number of examples, got {got}; pair them first")
        if len(a) == 0:
            raise ValueError(f"{who}: a data set must hold at least one example, got {got}; add some")
    for name, a in [("x", a) for a in xs] + [("y", b) for b in ys]:
        if jnp.issubdtype(a.dtype, np.inexact) and not (finite := np.isfinite(a)).all():
            got = f"{np.sum(~finite)} non-finite values, first at example {np.nonzero(~finite)[0][0]}"
            raise ValueError(f"{who}: {name} must be finite, got {got}; drop or impute them")


def _leaves(tree: Any) -> list[Any]:
    """List the arrays of a tree, or the one array that it is."""
    if hasattr(tree, "dtype") or is_numbers(tree):
        return [tree]
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Masked))
    return [leaf for node in nodes for leaf in _real(node)] or [tree]


def _real(node: Any) -> list[Any]:
    """Return the arrays of a leaf; for a `Masked`, its values with zeros at padded positions, and its mask."""
    if not isinstance(node, Masked):
        return [node]
    values, mask = np.asarray(node.values), np.asarray(node.mask, bool)
    if mask.shape == values.shape[:2]:
        values = np.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 2)), values, 0)
    return [values, mask]


def in_memory(who: str, data: Data) -> Dataset:
    """Return data as one pair of arrays, from a tuple (x, y) or from an iterable of such batches, joined on the host.

    A tuple is always one data set, and anything else is batches, so that (train, test) and [x, y] can be refused.
    """
    if isinstance(data, tuple):
        refuse_several(who, data)
        return Dataset(*pair(f"{who}: data", data))
    batches = [pair(f"{who}: every batch", batch) for batch in iterable(who, data)]
    if not batches:
        raise ValueError(f"{who}: the iterable of batches must not be empty, got {brief(data)}; give it one")
    try:
        return Dataset(*jax.tree.map(lambda *parts: np.concatenate(parts), *batches))
    except ValueError as error:
        raise ValueError(
            f"{who}: all batches must hold the same arrays, except for the number of examples ({error})"
        ) from error


def refuse_several(who: str, data: Any) -> None:
    """Refuse several data sets, such as (train, test), where one is expected."""
    parts = list(data) if type(data) in (tuple, list) else []
    sets = all(isinstance(part, Dataset) for part in parts)
    pairs = all(type(part) in (tuple, list) and len(part) == 2 and not is_numbers(part) for part in parts)
    if parts and (sets or (pairs and isinstance(data, tuple))):
        raise TypeError(
            f"{who}: data must be one pair of arrays (x, y), got {len(parts)} pairs; pass the training part, and to fit "
            "the test part as validation=test; batches, pairs (x, y), go into a list"
        )


def iterable(who: str, data: Any) -> Iterable[Any]:
    """Return data as an iterable of batches; refuse one array, a dict, text, and a pair written as a list."""
    if isinstance(data, list) and len(data) == 2 and not any(isinstance(part, tuple | list) for part in data):
        raise TypeError(f"{who}: data in memory must be a tuple (x, y), got the list {brief(data)}; write (x, y)")
    refuse_several(who, data)
    single = hasattr(data, "__array__") or isinstance(data, dict | str | bytes)
    if single or not isinstance(data, Iterable):
        raise TypeError(f"{who}: data must be a pair (x, y) or an iterable of batches (x, y), got {brief(data)}")
    return data


def shuffled(key: jax.Array, n: int) -> jax.Array:
    """Draw a permutation of 0..n-1: int[n], by sorting n numbers of 32 random bits.

    This is half the work of `jax.random.permutation`, which sorts twice because equal numbers keep their order. Here about
    n²/2^33 pairs do.
    """
    return jnp.argsort(jax.random.bits(key, (n,), jnp.uint32))  # by default 64 bits under x64: another order


def split(x: ArrayLike, y: ArrayLike, *, key: jax.Array, test: float = 0.2, stratify: bool = True) -> Parts:
    """Split at random into train and test; `round(test * n)` examples go to test (at least 1, at most n - 1).

    `x: [n, ...], y: [n, ...] -> (train, test)`, both shuffled. If y is an integer vector and `stratify` is on, every class
    is in both parts, and has less than one example more or fewer than `test * count` in the test part (largest remainders;
    the total can differ if a tiny class needs its one example). Other y are split without looking at their values.
    `key` decides which examples go where, not how many. Integer y become int32.
    """
    return random_split("data.split", x, y, generator("data.split", key), test, stratify)


def standardize(train: Dataset, *others: Dataset, eps: float = 1e-8) -> tuple[Dataset, ...]:
    """Standardise every feature, (x - mean) / (std + eps), by the mean and std of the training part alone.

    `x: [n, *features] -> float[n, *features]`; integers become float32. The moments are two-pass in float64. A feature that
    is constant in train is only centred, not divided by eps: it is exactly 0 there. (In the digits one pixel is lit in one
    image of 1797; divided by eps it would be 1e8.)
    """
    parts = [Dataset(*pair("data.standardize: every part", part)) for part in (train, *others)]
    at_least_zero("data.standardize", eps=eps)
    same_features("data.standardize", *parts)
    for part in parts:
        check_dataset("data.standardize", *part)
    x = np.asarray(parts[0].x, np.float64)
    constant = x.min(0) == x.max(0)
    mean = np.where(constant, x[0], x.mean(0))  # the mean of n equal numbers can miss them by a rounding error
    scale = np.where(constant, 1.0, x.std(0) + eps)
    scaled = []
    for x, y in parts:
        dtype = x.dtype if jnp.issubdtype(x.dtype, np.inexact) else np.float32
        scaled.append(Dataset(jnp.asarray(((np.asarray(x, np.float64) - mean) / scale).astype(dtype)), y))
    return tuple(scaled)


def batches(
    dataset: tuple[ArrayLike, ArrayLike], batch_size: int, *, key: jax.Array, epochs: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over batches `x: [batch_size, ...], y: [batch_size, ...]` in NumPy, shuffled anew in every epoch.

    Within an epoch no example comes twice. A last batch that is not full is dropped, so that all have the same shape. The
    order of an epoch depends on `key` and the epoch's number only, not on `epochs`.
    """
    who = "data.batches"
    positive(who, batch_size=batch_size, epochs=epochs)
    data = Dataset(*jax.tree.map(np.asarray, pair(f"{who}: the data set", dataset)))
    check_dataset(who, *data)
    n = data.size
    if batch_size > n:
        raise ValueError(f"{who}: batch_size must not exceed the {n} examples, got {batch_size}; make it smaller")
    generator(who, key)

    def iterate():  # a function of its own, so that the refusals above come at the call and not at the first batch
        for epoch in range(epochs):
            order = generator(who, key, 1 + epoch).permutation(n)
            for i in range(0, n - batch_size + 1, batch_size):
                yield tuple(data.take(order[i : i + batch_size]))

    return iterate()


def as_pair(who: str, x: ArrayLike, y: ArrayLike, *, negative: bool = False) -> list[np.ndarray]:
    """Check the pair and cast it as JAX would, but never let an integer wrap or a float overflow in silence.

    Integer y are labels of at least 0; with `negative` they may be below (-1: nothing to predict).
    """
    both = [np.asarray(array(who, name, a)) for name, a in (("x", x), ("y", y))]
    check_dataset(who, *both)
    for i, (name, a) in enumerate(zip("xy", both, strict=True)):
        label = name == "y" and a.dtype.kind in "biu"
        dtype = np.dtype(np.int32) if label else jax.dtypes.canonicalize_dtype(a.dtype)
        if label and not negative and a.size and a.min() < 0:
            raise ValueError(f"{who}: integer labels must be at least 0, got {a.min()}; map them to 0, 1, 2, ...")
        if jnp.issubdtype(a.dtype, np.integer) and a.size and not (a.astype(dtype) == a).all():
            raise ValueError(f"{who}: {name} must fit in {dtype}, got values from {a.min()} to {a.max()}; map them")
        with np.errstate(over="ignore"):  # the infinities are refused below, with their place in the data
            both[i] = a.astype(dtype, copy=False)
    check_dataset(who, *both)
    return both


def random_split(
    who: str, x: ArrayLike, y: ArrayLike, rng: np.random.Generator, test: float, stratify: bool = True
) -> Parts:
    """`split` with a generator in the place of a key."""
    x, y = as_pair(who, x, y)
    train, test_part = (
        Dataset(jnp.asarray(x[i]), jnp.asarray(y[i])) for i in split_index(who, y, rng, test=test, stratify=stratify)
    )
    return train, test_part


def split_index(
    who: str,
    y: np.ndarray,
    rng: np.random.Generator,
    *,
    stratify: bool = True,
    instead: str = "stratify=False",
    **test: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the indices of the two parts, as `split` says; `instead` is what the error message suggests."""
    above_zero(who, **test)
    fraction(who, **test)
    (share_of_test,) = test.values()
    n = len(y)
    if n < 2:
        raise ValueError(f"{who}: a split must leave an example in both parts, got {n} example; give at least 2")
    strata = y if stratify and y.ndim == 1 and y.dtype.kind in "biu" else np.zeros(n, int)
    classes, stratum, counts = np.unique(strata, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        got = f"class {classes[counts.argmin()]} with {counts.min()}"
        raise ValueError(f"{who}: stratify needs at least 2 examples of every class, got {got}; or pass {instead}")
    # Largest remainders: round down, then give the rest to the classes that lost most, keeping one in either part.
    share = float(share_of_test) * counts
    take = np.clip(np.floor(share), 1, counts - 1).astype(int)
    spare = max(0, round(float(share_of_test) * n) - take.sum())
    order = np.argsort(take - share, kind="stable")
    order = order[(take < np.minimum(share, counts - 1))[order]][:spare]
    take[order] += 1
    # Shuffle all, number the examples of each class in that order, and the first `take` of each are the test part.
    order = rng.permutation(n)
    by_class = np.argsort(stratum[order], kind="stable")
    rank = np.empty(n, int)
    rank[by_class] = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = rank < take[stratum[order]]
    return order[~chosen], order[chosen]


def same_features(who: str, train: Sequence[np.ndarray], *others: Sequence[np.ndarray]) -> None:
    """Refuse parts whose examples have other shapes than those of the training part."""
    for other in others:
        if train[0].shape[1:] != other[0].shape[1:]:
            got = f"{describe(train[0])} and {describe(other[0])}"
            raise ValueError(f"{who}: all parts must have the features of the training part, got {got}; reshape them")


def generator(who: str, key: jax.Array, *more: int) -> np.random.Generator:
    """Seed a host generator with all bits of the key, and with `more` to get another stream from the same key."""
    prng_key(who, key)
    bits = np.asarray(jax.random.key_data(key))
    return np.random.default_rng([*map(int, bits), *more])
