"""Data: values first (files written by hand, closed forms), then every refusal with its message."""

import gzip
import re
import struct
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn.datasets import data

KEY = jax.random.key(0)
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(a: np.ndarray) -> bytes:
    head = bytes([0, 0, CODES[a.dtype.str[1:]], a.ndim]) + struct.pack(f">{a.ndim}I", *a.shape)
    return head + a.astype(a.dtype.newbyteorder(">")).tobytes()


def whole(*parts):
    """All parts together, rows in lexicographic order of (y, x)."""
    rows = np.concatenate([np.column_stack([p[1], np.reshape(p[0], (len(p[1]), -1))]) for p in parts])
    return rows[np.lexsort(rows.T[::-1])]


def same(a, b):
    return all(np.array_equal(p, q) and p.dtype == q.dtype for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: B905


def says(kind, text):
    return pytest.raises(kind, match="^" + re.escape(text))


# --- IDX -------------------------------------------------------------------------------------------------------------


def write_mnist(folder, end="", dot=False, n=(12, 6), seed=0):
    rng = np.random.default_rng(seed)
    parts = []
    for part, count in zip(("train", "t10k"), n, strict=True):
        x = rng.integers(0, 256, (count, 4, 3)).astype(np.uint8)
        y = (np.arange(count) % 3).astype(np.uint8)
        for kind, a in (("images-idx3", x), ("labels-idx1", y)):
            name = f"{part}-{kind.replace('-', '.') if dot else kind}-ubyte{end}"
            (folder / name).write_bytes(gzip.compress(idx_bytes(a)) if end else idx_bytes(a))
        parts.append((x, y))
    return parts


# --- digits, split, standardize --------------------------------------------------------------------------------------


def test_digits_are_all_there_and_stratified():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    train, test = data.digits(key=KEY, standardized=False)
    assert (train.size, test.size) == (1438, 359) and len(train) == 2  # round(0.2 * 1797) = 359
    assert train.x.dtype == test.x.dtype == jnp.float32 and train.y.dtype == test.y.dtype == jnp.int32
    np.testing.assert_array_equal(whole(train, test), whole((x / 16, y)))
    assert np.all(abs(np.bincount(test.y) - 0.2 * np.bincount(y)) < 1)
    assert np.any(np.diff(np.asarray(test.y)) < 0), "the parts are shuffled, not sorted by class"


def test_digits_standardized_on_train_alone():
    raw, raw_test = data.digits(key=KEY, standardized=False)
    train, test = data.digits(key=KEY)
    x = np.asarray(raw.x, np.float64)
    std = np.where(x.std(0) > 0, x.std(0), 1)
    np.testing.assert_allclose(test.x, (np.asarray(raw_test.x) - x.mean(0)) / std, rtol=1e-4, atol=1e-5)
    lit = x.std(0) > 0
    np.testing.assert_allclose(np.mean(train.x, 0), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(train.x, 0)[lit], 1, atol=1e-5)
    assert 0 < (~lit).sum() < 10 and np.all(np.asarray(train.x)[:, ~lit] == 0)
    assert abs(np.mean(test.x)) > 1e-5, "the test part has its own mean: it was not fitted on"
    # A pixel that is dark in all of train but lit in test must not be divided by eps (1e8). The most that any other can
    # reach is one step of 16 lit once in train: std 1/(16 sqrt(1438)), so 16 sqrt(1438) = 607.
    assert max(abs(np.asarray(data.digits(key=jax.random.key(s))[1].x)).max() for s in range(5)) < 607
    image, _ = data.digits(key=KEY, image=True)
    np.testing.assert_array_equal(image.x, np.reshape(train.x, (-1, 8, 8, 1)), strict=True)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with says(ImportError, "data.digits: needs scikit-learn; install fnn[study]"):
        data.digits(key=KEY)


LOADERS = {
    "digits": data.digits,
    "clusters": data.clusters,
    "spirals": data.spirals,
    "teacher": data.teacher,
    "split": lambda key: data.split(np.arange(40.0), np.arange(40) % 3, key=key),
}


@pytest.mark.parametrize("name", LOADERS)
def test_same_key_same_bits_other_key_other_split(name):
    first, again = LOADERS[name](key=KEY), LOADERS[name](key=jax.random.key(0))
    other = LOADERS[name](key=jax.random.key(1))
    assert same(first, again) and not same(first, other)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, other), "sizes do not depend on the key"
    assert first[0].y.dtype == (jnp.float32 if name == "teacher" else jnp.int32)
    assert (first[0].size, first[1].size) == {"digits": (1438, 359), "split": (32, 8)}.get(name, (800, 200))


@pytest.mark.parametrize("test", [0.001, 0.1, 0.29, 1 / 3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("counts", [[2, 2], [3, 0, 50, 7], [100, 100, 100], [2, 999], [13] * 10])
def test_stratified_split_law(counts, test):
    y = np.repeat(np.arange(len(counts)), counts)
    counts = np.array(counts)
    train, held = data.split(np.arange(len(y)), y, key=KEY, test=test)
    got = np.bincount(held.y, minlength=len(counts))
    assert np.all((abs(got - test * counts) < 1) & ((got > 0) | (counts == 0)) & ((got < counts) | (counts == 0)))
    np.testing.assert_array_equal(y[held.x], held.y)  # x and y stay paired
    np.testing.assert_array_equal(y[train.x], train.y)
    assert sorted([*train.x.tolist(), *held.x.tolist()]) == list(range(len(y)))
    share = test * counts[counts > 0]
    if np.all(share >= 1) and np.all(share <= counts[counts > 0] - 1):  # no class is lifted to one example
        assert held.size == round(test * len(y))


@pytest.mark.parametrize(
    ("counts", "test", "held"),
    [
        ([5, 9, 6], 0.3, [1, 3, 2]),  # shares 1.5, 2.7, 1.8: 2 examples are left when 1, 2, 1 are taken
        ([6, 9, 5], 0.3, [2, 3, 1]),
        ([13, 16, 19], 0.25, [3, 4, 5]),  # 3.25, 4, 4.75: 1 is left
        ([10, 10, 10, 11], 0.5, [5, 5, 5, 5]),  # 5.5 of the last, and none is left: 20.5 rounds to 20
        ([7, 7, 8], 0.5, [4, 3, 4]),  # equal remainders: the first class
    ],
)
def test_what_is_left_of_a_split_goes_to_the_classes_that_lost_most(counts, test, held):
    y = np.repeat(np.arange(len(counts)), counts)
    parts = data.split(np.arange(len(y)), y, key=KEY, test=test)
    np.testing.assert_array_equal(np.bincount(parts[1].y), held)


def test_split_is_uniform_over_examples():
    # 100 keys, 10 examples, half held out: each is held out 50 times, sd 5; a deviation of 28 anywhere has p < 3e-7.
    parts = [data.split(range(10), np.zeros(10), key=jax.random.key(s), test=0.5)[1].x for s in range(100)]
    held = np.bincount(np.concatenate(parts), minlength=10)
    assert held.sum() == 500 and np.all(abs(held - 50) < 28)


def test_split_of_other_targets_is_plain():
    for y in (np.linspace(0, 1, 10), np.eye(10, dtype=int)):
        train, held = data.split(np.arange(10), y, key=KEY, test=0.3)
        assert (train.size, held.size) == (7, 3)
        np.testing.assert_allclose(held.y, y[held.x])
    rare = np.array([0] * 9 + [1])
    assert data.split(np.arange(10), rare, key=KEY, stratify=False)[1].size == 2
    flags = data.split(np.arange(4), np.array([True, False, True, False]), key=KEY, test=0.5)[1]
    assert flags.y.dtype == jnp.int32 and sorted(flags.y.tolist()) == [0, 1]
    assert sorted(np.unique(data.split(np.arange(4), [5, 9, 5, 9], key=KEY)[0].y)) == [5, 9], "never renumbered"


def test_standardize_by_hand():
    train = data.Dataset(jnp.array([[1.0, 0.1, 1000.01], [3.0, 0.1, 1000.03]]), jnp.array([0, 1]))
    other = data.Dataset(jnp.array([[7.0, 2.1, 1000.02]]), jnp.array([5]))
    (a, b), alone = data.standardize(train, other), data.standardize(train)
    np.testing.assert_allclose(a.x, [[-1, 0, -1], [1, 0, 1]], rtol=1e-5)  # two-pass: mean 1000, std 0.01
    assert np.all(np.asarray(a.x)[:, 1] == 0), "a constant feature is exactly 0"
    np.testing.assert_allclose(b.x, [[5, 2, 0]], rtol=1e-5, atol=0.01)
    assert same(alone, (a,)) and same((a.y, b.y), (train.y, other.y))
    (damped,) = data.standardize(train, eps=1.0)
    np.testing.assert_allclose(np.asarray(damped.x)[:, 0], [-0.5, 0.5], rtol=1e-6)  # (x - 2) / (1 + 1)
    (bytes_,) = data.standardize(data.Dataset(jnp.array([[0], [4]], jnp.uint8), jnp.array([0, 1])))
    np.testing.assert_array_equal(bytes_.x, np.array([[-1], [1]], np.float32), strict=True)
    (half,) = data.standardize(data.Dataset(jnp.array([[0], [4]], jnp.bfloat16), jnp.array([0, 1])))
    assert half.x.dtype == jnp.bfloat16
    tenths = data.Dataset(np.full((1437, 2), 0.1), np.zeros(1437, np.int32))  # float64, as with x64 switched on
    assert not np.any(data.standardize(tenths)[0].x), "1437 * 0.1 / 1437 is not 0.1 in floating point"


# --- synthetic -------------------------------------------------------------------------------------------------------


# --- npz, load, batches ----------------------------------------------------------------------------------------------


def test_npz_both_forms(tmp_path):
    x, y = np.random.default_rng(0).normal(3, 2, (20, 2)), np.arange(20) % 2
    np.savez(tmp_path / "xy.npz", x=x, y=y, more=np.zeros(3))
    assert same(data.npz(tmp_path / "xy.npz", key=KEY), data.standardize(*data.split(x, y, key=KEY)))
    raw = data.npz(tmp_path / "xy.npz", key=KEY, test=0.5, standardized=False)
    assert same(raw, data.split(x, y, key=KEY, test=0.5)) and raw[1].size == 10
    np.savez_compressed(tmp_path / "four.npz", x_train=x[:15], y_train=y[:15], x_test=x[15:], y_test=y[15:])
    train, test = data.npz(tmp_path / "four.npz")
    np.testing.assert_allclose(train.x, (x[:15] - x[:15].mean(0)) / x[:15].std(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(test.x, (x[15:] - x[:15].mean(0)) / x[:15].std(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(test.y, y[15:].astype(np.int32), strict=True)
    np.savez(tmp_path / "tokens.npz", x=np.arange(20).reshape(10, 2), y=np.arange(20).reshape(10, 2))
    tokens, _ = data.npz(tmp_path / "tokens.npz", key=KEY, standardized=False)
    assert tokens.x.dtype == tokens.y.dtype == jnp.int32
    np.testing.assert_array_equal(tokens.x, tokens.y)


def test_npz_refuses(tmp_path):
    path = tmp_path / "a.npz"
    with says(FileNotFoundError, f"data.npz: the path must name a file, got '{path}'"):
        data.npz(path)
    np.savez(path, a=np.zeros(2), y=np.zeros(2))
    with says(
        ValueError, f"data.npz: the file must hold x and y, or x_train, y_train, x_test, y_test, got a, y in {path}"
    ):
        data.npz(path, key=KEY)
    np.savez(path, x=np.zeros((4, 1)), y=np.zeros(4))
    with says(ValueError, "data.npz: a file with x and y is split by key, got key=None; pass key="):
        data.npz(path)
    good = path.read_bytes()
    np.savez(path, x=np.array([{}, []], object), y=np.zeros(2))
    with says(ValueError, f"data.npz: arrays must be whole and numeric, got {path} (Object arrays"):
        data.npz(path, key=KEY)
    np.savez(path, x=np.array(["a", "b"]), y=np.zeros(2))
    with says(TypeError, "data.npz: x must hold numbers, got <U1"):
        data.npz(path, key=KEY)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", "text")
        file.writestr("y", "text")
    with says(TypeError, "data.npz: x must hold numbers, got |S4"):
        data.npz(path, key=KEY)
    for bad in (b"", b"text", good[:-40], good[: len(good) // 2]):
        path.write_bytes(bad)
        with says(ValueError, f"data.npz: the file must be a whole zip archive, got {path}"):
            data.npz(path, key=KEY)
    np.save(tmp_path / "b.npy", np.zeros(3))
    with says(ValueError, "data.npz: the file must be a whole zip archive, got "):
        data.npz(tmp_path / "b.npy", key=KEY)
    for at in (100, 150):  # inside the header and inside the values of x
        path.write_bytes(good[:at] + b"\xff\xfe" + good[at + 2 :])
        with says(ValueError, f"data.npz: arrays must be whole and numeric, got {path} ("):
            data.npz(path, key=KEY)
    np.savez(path, x_train=np.zeros((4, 2)), y_train=np.zeros(4), x_test=np.zeros((4, 3)), y_test=np.zeros(4))
    with says(
        ValueError, "data.npz: all parts must have the features of the training part, got float32[4,2] and float32[4,3]"
    ):
        data.npz(path, standardized=False)


def test_load(tmp_path):
    for name in ("digits", "clusters", "spirals"):
        assert same(data.load(name, key=KEY), getattr(data, name)(key=KEY))
    write_mnist(tmp_path)
    assert same(data.load(tmp_path, key=KEY), data.idx(tmp_path))
    np.savez(tmp_path / "a.npz", x=np.arange(8.0).reshape(4, 2), y=np.array([0, 0, 1, 1]))
    assert same(data.load(str(tmp_path / "a.npz"), key=KEY), data.npz(tmp_path / "a.npz", key=KEY))


def test_load_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with says(ValueError, "data.load: unknown name 'digit'; did you mean 'digits'?"):
        data.load("digit", key=KEY)
    choices = "choose one of digits, clusters, spirals, adding, number_words, a folder of IDX files, an .npz file"
    with says(ValueError, f"data.load: unknown name 'qqq'; {choices}"):
        data.load("qqq", key=KEY)
    for missing in ("no.npz", "./digit", str(tmp_path / "no"), tmp_path / "digits"):
        with says(FileNotFoundError, "data.load: the path must be a folder or an .npz file, got "):
            data.load(missing, key=KEY)
    (tmp_path / "a.csv").write_text("1,2")
    with says(ValueError, "data.load: a file must be an .npz archive, got 'a.csv'"):
        data.load("a.csv", key=KEY)


def test_batches():
    d = data.Dataset(jnp.arange(10.0)[:, None] * 2, jnp.arange(10))
    got = list(data.batches(d, 4, key=KEY, epochs=3))
    assert len(got) == 6 and all(isinstance(a, np.ndarray) for pair in got for a in pair)
    for x, y in got:
        assert x.shape == (4, 1) and x.dtype == np.float32 and y.dtype == np.int32
        np.testing.assert_array_equal(x[:, 0], 2 * y)
    epochs = [tuple(np.concatenate([y for _, y in got[i : i + 2]])) for i in (0, 2, 4)]
    assert all(len(set(e)) == 8 for e in epochs), "no example twice in an epoch"
    assert len(set(epochs)) == 3, "every epoch is shuffled anew"
    assert same(got[:2], list(data.batches(d, 4, key=jax.random.key(0))))
    assert not same(got[:2], list(data.batches(d, 4, key=jax.random.key(1))))
    (everything,) = data.batches(d, 10, key=KEY)
    assert sorted(everything[1]) == list(range(10))


# --- refusals --------------------------------------------------------------------------------------------------------
