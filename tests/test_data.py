"""Data: values first (files written by hand, closed forms), then every refusal with its message."""

import gzip
import math
import re
import struct
import sys
import tracemalloc
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn.datasets import data, synthetic

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

LITERAL = [  # bytes written by hand, so that no shared encoder can hide a mistake
    (b"\0\0\x08\x01\0\0\0\x03\x00\x7f\xff", np.array([0, 127, 255], np.uint8)),
    (b"\0\0\x09\x01\0\0\0\x02\xff\x80", np.array([-1, -128], np.int8)),
    (b"\0\0\x0b\x02\0\0\0\x02\0\0\0\x01\x01\x02\xff\xfe", np.array([[258], [-2]], np.int16)),
    (b"\0\0\x0c\x01\0\0\0\x01\x00\x01\x00\x02", np.array([65538], np.int32)),
    (b"\0\0\x0d\x01\0\0\0\x02\x3f\x80\0\0\xc0\x20\0\0", np.array([1.0, -2.5], np.float32)),
    (b"\0\0\x0e\x03\0\0\0\x01\0\0\0\x01\0\0\0\x01\x3f\xe0\0\0\0\0\0\0", np.array([[[0.5]]], np.float64)),
    (b"\0\0\x08\x00\x2a", np.array(42, np.uint8)),
    (b"\0\0\x0c\x02\0\0\0\x00\0\0\0\x05", np.zeros((0, 5), np.int32)),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("raw, want", LITERAL, ids=lambda v: v.dtype.name if isinstance(v, np.ndarray) else "")
def test_read_idx_literal_bytes(tmp_path, raw, want, zipped):
    path = tmp_path / "plain.gz"  # the name lies on purpose in half of the cases
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    got = data.read_idx(path)
    assert got.dtype == want.dtype and got.dtype.isnative and got.flags.writeable
    np.testing.assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize("dtype", CODES)
def test_read_idx_rank_four_of_every_type(tmp_path, dtype):
    want = np.arange(2 * 3 * 1 * 5).reshape(2, 3, 1, 5).astype(dtype)
    (tmp_path / "a").write_bytes(idx_bytes(want))
    np.testing.assert_array_equal(data.read_idx(str(tmp_path / "a")), want, strict=True)


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


@pytest.mark.parametrize("end, dot", [("", False), (".gz", False), ("", True), (".gz", True)])
def test_idx_folder(tmp_path, end, dot):
    (x, y), (tx, ty) = write_mnist(tmp_path, end, dot)
    train, test = data.idx(tmp_path, standardized=False)
    np.testing.assert_array_equal(train.x, x[..., None] / np.float32(255), strict=True)
    np.testing.assert_array_equal(test.x, tx[..., None] / np.float32(255), strict=True)
    np.testing.assert_array_equal(train.y, y.astype(np.int32), strict=True)
    np.testing.assert_array_equal(test.y, ty.astype(np.int32), strict=True)
    # One scalar mean and std, of the training part, for both parts.
    mean, std = (x / 255).mean(), (x / 255).std()
    for part, raw in zip(data.idx(tmp_path), (x, tx), strict=True):
        assert part.x.dtype == jnp.float32 and part.x.shape == (*raw.shape, 1)
        np.testing.assert_allclose(np.asarray(part.x)[..., 0], (raw / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_idx_test_fraction_splits_the_train_files_only(tmp_path):
    (x, y), _ = write_mnist(tmp_path)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).unlink()
    train, test = data.idx(tmp_path, key=KEY, test=0.25, standardized=False)
    assert (train.size, test.size) == (9, 3) and sorted(np.asarray(test.y)) == [0, 1, 2]
    np.testing.assert_allclose(whole(train, test), whole((x / 255, y)), rtol=1e-6)


BAD_IDX = {
    "no bytes": (b"", "a file must start with 00 00, type code and rank, got nothing in "),
    "magic": (b"\x89PNG\r\n", "a file must start with 00 00, type code and rank, got 89 50 4e 47 in "),
    "short magic": (b"\0\0\x08", "a file must start with 00 00, type code and rank, got 00 00 08 in "),
    "type": (b"\0\0\x0a\x01\0\0\0\0", "the type code must be one of 0x08, 0x09, 0x0b, 0x0c, 0x0d, 0x0e, got 0x0a in "),
    "header": (b"\0\0\x08\x03\0\0\0\x01\0", "a file must be as long as its header says, 16 bytes, got 9 in "),
    "truncated": (b"\0\0\x0b\x01\0\0\0\x02\1\2\3", "a file must be as long as its header says, 12 bytes, got 11 in "),
    "extra": (b"\0\0\x08\x01\0\0\0\x01\1\2", "a file must be as long as its header says, 9 bytes, got 10 in "),
    "rank 65": (b"\0\0\x08\x41" + b"\0\0\0\x01" * 65 + b"\7", "sizes must fit in a NumPy array, got [1, 1, 1"),
    "huge sizes": (b"\0\0\x08\x04\0\0\0\0" + b"\xff" * 12, "sizes must fit in a NumPy array, got [0, 4294967295, "),
    "gz truncated": (gzip.compress(bytes(1000))[:-9], "a gzip file must be whole, got "),
    "gz corrupt": (gzip.compress(bytes(1000))[:12] + b"\xff" * 20, "a gzip file must be whole, got "),
    "gz trailing": (gzip.compress(b"\0\0\x08\0\1") + b"junk", "a gzip file must be whole, got "),
}


@pytest.mark.parametrize("name", BAD_IDX)
def test_read_idx_refuses(tmp_path, name):
    raw, text = BAD_IDX[name]
    (tmp_path / "bad").write_bytes(raw)
    with says(ValueError, "data.read_idx: " + text) as info:
        data.read_idx(tmp_path / "bad")
    assert str(tmp_path / "bad") in str(info.value) and "\n" not in str(info.value)
    word = {"header": "truncated", "truncated": "truncated", "extra": "extra bytes"}.get(name, "")
    assert word in str(info.value)


def test_every_cut_of_an_idx_file_is_refused_in_one_sentence(tmp_path):
    plain = idx_bytes(np.arange(6, dtype="i2").reshape(2, 3))
    for raw in (plain, gzip.compress(plain)):
        for cut in range(len(raw)):
            (tmp_path / "cut").write_bytes(raw[:cut])
            with says(ValueError, "data.read_idx: "):
                data.read_idx(tmp_path / "cut")


def zipped(path, head, zeros):
    """Gzip of a header and so many zeros, written without holding them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with open(path, "wb") as file:
        file.write(packer.compress(head))
        for _ in range(zeros // 2**20):
            file.write(packer.compress(bytes(2**20)))
        file.write(packer.flush())
    return path


def peak(call):
    """The most memory that Python and NumPy held during a call, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_from_their_headers_in_bounded_memory(tmp_path):
    room = data.ROOM
    honest = zipped(tmp_path / "honest", b"\0\0\x08\x01" + struct.pack(">I", room + 2**20), room + 2**20)
    lying = zipped(tmp_path / "lying", b"\0\0\x08\x01" + struct.pack(">I", 100), room)
    huge = zipped(tmp_path / "huge", b"\0\0\x0e\x03" + b"\xff" * 12, 0)
    short = tmp_path / "short"
    short.write_bytes(b"\0\0\x0e\x02" + struct.pack(">2I", 2**20, 2**20))
    cases = [
        (honest, "a gzip file must not inflate to more than 67108864 bytes, got 68157448 bytes"),
        (lying, "a file must be as long as its header says, 108 bytes, got more than 108 in"),
        (huge, "a gzip file must not inflate to more than 67108864 bytes, got"),
        (short, "a file must be as long as its header says, 8796093022220 bytes, got 12 in"),
    ]
    for path, sentence in cases:

        def refused(path=path, sentence=sentence):
            with says(ValueError, "data.read_idx: " + sentence):
                data.read_idx(path)

        assert peak(refused) < 2**22
    fine = zipped(tmp_path / "fine", b"\0\0\x08\x02" + struct.pack(">2I", 4, 2**20), 4 * 2**20)
    assert data.read_idx(fine).shape == (4, 2**20)  # a thousandfold, and yet small


def npy(shape, dtype="<f8", payload=b"", version=1):
    head = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(head).to_bytes(2 if version == 1 else 4, "little") + head + payload


@pytest.mark.parametrize(
    "shape",
    [(2**40,), (2**70,), (2**70, 0), (2**33, 2**33), (-3,), (10,), (2**62, 4)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("version", [1, 2])
def test_npz_headers_that_claim_what_is_not_there(tmp_path, shape, version):
    path = tmp_path / "a.npz"
    for members in (
        {"x.npy": npy(shape, version=version), "y.npy": npy((1,), payload=bytes(8))},
        {"x": npy(shape), "y.npy": npy(shape)},
    ):
        with zipfile.ZipFile(path, "w") as file:
            for name, raw in members.items():
                file.writestr(name, raw)

        def refused():
            with says(ValueError, "data.npz: arrays must be whole and numeric, got ") as error:
                data.npz(path, key=KEY)
            assert "\n" not in str(error.value)

        assert peak(refused) < 2**22


def test_npz_that_inflates_out_of_proportion(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((9, 2**20)), y=np.zeros(9))

    def refused():
        with says(ValueError, "data.npz: arrays must be whole and numeric, got ") as error:
            data.npz(tmp_path / "a.npz", key=KEY)
        assert re.search(r"\(75\d{6} bytes when unpacked, of at most 67108864\)", str(error.value))

    assert peak(refused) < 2**22


def test_idx_refuses(tmp_path):
    with says(FileNotFoundError, f"data.idx: the folder must exist, got '{tmp_path / 'no'}'"):
        data.idx(tmp_path / "no")
    with says(FileNotFoundError, f"data.read_idx: the path must name a file, got '{tmp_path}'"):
        data.read_idx(tmp_path)
    looked = ", ".join(f"train-images{s}idx3-ubyte{end}" for s in "-." for end in ("", ".gz"))
    with says(FileNotFoundError, f"data.idx: the folder must hold train images, got none of {looked} in '{tmp_path}'"):
        data.idx(tmp_path)
    write_mnist(tmp_path)
    with says(ValueError, "data.idx: test=0.5 splits the train files by key, got key=None"):
        data.idx(tmp_path, test=0.5)
    labels, images = tmp_path / "t10k-labels-idx1-ubyte", tmp_path / "t10k-images-idx3-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    want = "got uint8[6,4,3] in t10k-images-idx3-ubyte and uint8[5] in t10k-labels-idx1-ubyte"
    with says(ValueError, f"data.idx: every image must have one integer label, {want}"):
        data.idx(tmp_path)
    labels.unlink()
    with says(FileNotFoundError, "data.idx: the folder must hold t10k labels, got none of t10k-labels-idx1-ubyte, "):
        data.idx(tmp_path)
    labels.write_bytes(idx_bytes(np.full(6, -1, np.int8)))
    with says(ValueError, "data.idx: integer labels must be at least 0, got -1"):
        data.idx(tmp_path)
    labels.write_bytes(idx_bytes(np.zeros(6, np.uint8)))
    images.write_bytes(idx_bytes(np.zeros((6, 5, 5), np.uint8)))
    with says(
        ValueError, "data.idx: all parts must have the features of the training part, got float32[12,4,3,1] and "
    ):
        data.idx(tmp_path)
    for bad in (np.zeros((6, 4, 3), "f4"), np.zeros((6, 4), np.uint8), np.zeros((6, 0, 0), np.uint8)):
        images.write_bytes(idx_bytes(bad))
        with says(ValueError, f"data.idx: images must be uint8[n,rows,cols], got {data.describe(bad)} in {images}"):
            data.idx(tmp_path)


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


def upper_tail(z):
    return math.erfc(z / math.sqrt(2)) / 2


def centroids(d):
    return np.stack([np.asarray(d.x)[np.asarray(d.y) == c].mean(0) for c in range(int(d.y.max()) + 1)])


@pytest.mark.parametrize("classes, features", [(2, 2), (5, 7)])
def test_clusters_stand_four_apart_on_a_circle(classes, features):
    # Means of 200 examples with spread 0.01 are off by 0.0007 (sd) per axis; 0.005 is 7 sd: p < 1e-9.
    train, _ = data.clusters(key=KEY, classes=classes, features=features, examples=250 * classes, spread=0.01)
    centres = centroids(train)
    np.testing.assert_allclose(np.linalg.norm(centres - np.roll(centres, 1, 0), axis=1), 4, atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 2 / math.sin(math.pi / classes), atol=0.01)
    residual = np.asarray(train.x) - centres[np.asarray(train.y)]
    # n = 200 * classes * features >= 800 values: relative sd of the std at most 1/sqrt(2 * 800) = 2.5 %; 15 % is 6 sd.
    np.testing.assert_allclose(residual.std(), 0.01, rtol=0.15)


def test_nearest_centroid_reaches_the_known_error_of_two_clusters():
    # n = 20000, error Q(2) = 0.02275, sd 0.00106; 0.0055 is 5.2 sd: p < 3e-7. The estimated centres cost about 1e-5.
    train, test = data.clusters(key=KEY, classes=2, features=3, examples=40000, test=0.5)
    distance = np.linalg.norm(np.asarray(test.x)[:, None] - centroids(train), axis=-1)
    error = np.mean(distance.argmin(1) != np.asarray(test.y))
    assert abs(error - upper_tail(2.0)) < 0.0055


@pytest.mark.parametrize("classes, turns", [(2, 1.5), (3, 0.5), (1, 2.0)])
def test_spirals_without_noise_lie_on_their_arms(classes, turns):
    train, test = data.spirals(key=KEY, classes=classes, turns=turns, noise=0.0, examples=500)
    x, y = (np.concatenate([a, b]) for a, b in zip(train, test, strict=True))
    r = np.linalg.norm(x, axis=1)
    off = np.arctan2(x[:, 1], x[:, 0]) - 2 * np.pi * (r + y) / classes
    np.testing.assert_allclose(r * np.exp(1j * off), r, atol=1e-5)  # equal modulo whole turns
    # The square of r/(turns*classes) is uniform: its mean of 500 is 1/2 with sd 0.013; 0.07 is 5.4 sd, p < 1e-7.
    assert abs(np.mean((r / (turns * classes)) ** 2) - 0.5) < 0.07 and r.max() <= turns * classes * (1 + 1e-6)
    np.testing.assert_allclose(np.bincount(y), 500 / classes, atol=1)


def noise_of(loader, field, **options):
    quiet, loud = (loader(key=KEY, noise=s, examples=5000, **options) for s in (0.0, 0.3))
    other = "y" if field == "x" else "x"
    assert same([getattr(d, other) for d in quiet], [getattr(d, other) for d in loud])
    return np.concatenate([getattr(b, field) - getattr(a, field) for a, b in zip(quiet, loud, strict=True)])


@pytest.mark.parametrize("loader, field, options", [(data.spirals, "x", {}), (data.teacher, "y", {"outputs": 2})])
def test_noise_has_its_standard_deviation(loader, field, options):
    # n = 10000 normal values: the std has relative sd 1/sqrt(2n) = 0.7 %, the mean sd 0.003; 5 sd each, p < 2e-6.
    noise = noise_of(loader, field, **options)
    assert noise.size == 10000
    assert abs(noise.std() / 0.3 - 1) < 0.036 and abs(noise.mean()) < 0.015


def test_teacher_of_width_one_is_one_tanh():
    train, test = data.teacher(key=KEY, features=3, width=1, examples=200)
    x, y = np.asarray(train.x, np.float64), np.asarray(train.y, np.float64)[:, 0]

    grid = abs(y).max() * (1 + np.geomspace(1e-4, 10, 1000))
    # If y = v tanh(x w) for one of these v, then arctanh(y / v) is linear in x, without an intercept.
    w = np.linalg.lstsq(x, np.arctanh(y[:, None] / grid), rcond=None)[0]
    best = np.argmin(np.std(grid * np.tanh(x @ w) - y[:, None], axis=0))
    error = grid[best] * np.tanh(np.asarray(test.x) @ w[:, best]) - np.asarray(test.y)[:, 0]
    line = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.std(error) < 5e-3 * np.std(y) and np.std(x @ line - y) > 5e-2 * np.std(y)


def test_teacher_moments():
    # x: 400000 standard normals, std within 1 % (9 sd). Mean square of y: E tanh(N(0,1))^2 = 0.394, up to the draw of W
    # and V (relative sd about 9 % per output at 200 features, so 1.3 % for 50 outputs) and of x; 10 % is over 5 sd.
    train, _ = data.teacher(key=KEY, features=200, width=400, outputs=50, examples=2500)
    assert train.x.shape == (2000, 200) and train.y.shape == (2000, 50) and train.y.dtype == jnp.float32
    assert abs(np.std(train.x) - 1) < 0.01
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    expected = np.sum(weights * np.tanh(nodes) ** 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(np.mean(np.square(train.y)), expected, rtol=0.1)


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

X, Y = np.ones((6, 2)), np.array([0, 1, 0, 1, 0, 1])
NAN = np.where(np.arange(12).reshape(6, 2) % 7 == 5, np.nan, 1.0)  # in example 2 alone
D = data.Dataset(jnp.asarray(X), jnp.asarray(Y))
REFUSALS = {
    "mismatch": (
        lambda: data.check_dataset("me", X, Y[:5]),
        ValueError,
        "me: x and y must hold the same number of examples, got float64[6,2] and int64[5]",
    ),
    "empty": (
        lambda: data.check_dataset("me", X[:0], Y[:0]),
        ValueError,
        "me: a data set must hold at least one example",
    ),
    "scalar": (
        lambda: data.check_dataset("me", 3.0, Y),
        ValueError,
        "me: x and y must have the examples on their first",
    ),
    "object": (lambda: data.check_dataset("me", X.astype(object), Y), TypeError, "me: x must hold numbers, got object"),
    "nan": (
        lambda: data.check_dataset("me", NAN, Y),
        ValueError,
        "me: x must be finite, got 1 non-finite values, first at example 2; drop or impute them",
    ),
    "inf on device": (
        lambda: data.check_dataset("me", jnp.full((3, 2, 2), jnp.inf, jnp.bfloat16), Y[:3]),
        ValueError,
        "me: x must be finite, got 12 non-finite values, first at example 0; drop or impute them",
    ),
    "nan target": (lambda: data.split(X, NAN, key=KEY), ValueError, "data.split: y must be finite, got 1 non-finite"),
    "overflow": (
        lambda: data.split(X * 1e300, Y, key=KEY),
        ValueError,
        "data.split: x must be finite, got 12 non-finite values, first at example 0",
    ),
    "wrap x": (
        lambda: data.split(np.array([0, 2**40] * 3), Y, key=KEY),
        ValueError,
        "data.split: x must fit in int32, got values from 0 to 1099511627776",
    ),
    "wrap y": (
        lambda: data.split(X, np.array([0, 2**63] * 3, np.uint64), key=KEY),
        ValueError,
        "data.split: y must fit in int32, got values from 0 to 9223372036854775808",
    ),
    "negative": (
        lambda: data.split(X, Y - 1, key=KEY),
        ValueError,
        "data.split: integer labels must be at least 0, got -1",
    ),
    "test 0": (
        lambda: data.split(X, Y, key=KEY, test=0.0),
        ValueError,
        "data.split: test must be a finite number above 0",
    ),
    "test 1": (lambda: data.digits(key=KEY, test=1.0), ValueError, "data.digits: test must lie in [0, 1), got 1.0"),
    "test text": (lambda: data.clusters(key=KEY, test="a"), TypeError, "data.clusters: test must be a finite number"),
    "one example": (
        lambda: data.split(X[:1], X[:1], key=KEY),
        ValueError,
        "data.split: a split must leave an example in both parts, got 1 example",
    ),
    "rare class": (
        lambda: data.split(X, np.array([0, 0, 0, 7, 1, 1]), key=KEY),
        ValueError,
        "data.split: stratify needs at least 2 examples of every class, got class 7 with 1; or pass stratify=False",
    ),
    "key": (
        lambda: data.digits(key=0),
        TypeError,
        "data.digits: key must be one PRNG key, got 0; pass jax.random.key(0)",
    ),
    "keys": (
        lambda: data.clusters(key=jax.random.split(KEY, 3)),
        TypeError,
        "data.clusters: key must be one PRNG key, got key<fry>[3]",
    ),
    "no key": (lambda: data.batches(D, 2, key=None), TypeError, "data.batches: key must be one PRNG key, got None"),
    "features": (
        lambda: data.standardize(D, data.Dataset(D.x[:, :1], D.y)),
        ValueError,
        "data.standardize: all parts must have the features of the training part, got float32[6,2] and float32[6,1]",
    ),
    "nan part": (
        lambda: data.standardize(D, data.Dataset(jnp.asarray(NAN), D.y)),
        ValueError,
        "data.standardize: x must be finite, got 1 non-finite values, first at example 2",
    ),
    "eps": (
        lambda: data.standardize(D, eps=-1.0),
        ValueError,
        "data.standardize: eps must be finite and at least 0, got -1.0",
    ),
    "classes": (
        lambda: data.clusters(key=KEY, classes=1),
        ValueError,
        "data.clusters: features and classes must be at least 2, got features=2, classes=1",
    ),
    "few": (
        lambda: data.clusters(key=KEY, examples=4),
        ValueError,
        "data.clusters: stratify needs at least 2 examples of",
    ),
    "spread": (
        lambda: data.clusters(key=KEY, spread=0),
        ValueError,
        "data.clusters: spread must be a finite number above",
    ),
    "turns": (
        lambda: data.spirals(key=KEY, turns=-1),
        ValueError,
        "data.spirals: turns must be a finite number above 0",
    ),
    "noise": (
        lambda: data.spirals(key=KEY, noise=math.nan),
        ValueError,
        "data.spirals: noise must be finite and at least 0, got nan",
    ),
    "width": (
        lambda: data.teacher(key=KEY, width=0),
        ValueError,
        "data.teacher: width must be a positive integer, got 0",
    ),
    "batch": (
        lambda: data.batches(D, 7, key=KEY),
        ValueError,
        "data.batches: batch_size must not exceed the 6 examples, got 7; make it smaller",
    ),
    "batch 0": (lambda: data.batches(D, 0, key=KEY), ValueError, "data.batches: batch_size must be a positive integer"),
    "epochs": (lambda: data.batches(D, 2, key=KEY, epochs=0), ValueError, "data.batches: epochs must be a positive"),
    "pair": (
        lambda: data.batches((X, Y[:3]), 2, key=KEY),
        ValueError,
        "data.batches: x and y must hold the same number",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    call, kind, text = REFUSALS[name]
    with says(kind, text) as info:
        call()
    assert "\n" not in str(info.value)


def test_adding_marks_one_number_in_each_half():
    train, test = data.adding(key=KEY, examples=4000, length=11, test=0.25)
    assert train.x.shape == (3000, 11, 2) and test.y.shape == (1000, 1)
    x, y = np.asarray(train.x), np.asarray(train.y)
    np.testing.assert_array_equal(x[:, :5, 1].sum(1), 1)
    np.testing.assert_array_equal(x[:, 5:, 1].sum(1), 1)
    np.testing.assert_allclose((x[..., 0] * x[..., 1]).sum(1), y[:, 0], rtol=1e-6)
    # Var = 1/6; its standard error is 1/6·sqrt((kurtosis - 1)/n) = 0.0036, kurtosis 2.4: six of them, 2e-9 by chance.
    assert np.var(y) == pytest.approx(1 / 6, abs=0.022)
    assert (x[:, :, 1].sum(0) > 0).all()
    with says(ValueError, "data.adding: length must be at least 2, one marked number in each half, got 1"):
        data.adding(key=KEY, length=1)


def test_numbers_are_spelled_and_told_apart():
    spelled = {n: " ".join(synthetic.spell(n)) for n in (0, 7, 13, 20, 42, 100, 310, 999, 1000, 2017, 8040, 9999)}
    assert spelled == {
        0: "zero",
        7: "seven",
        13: "thirteen",
        20: "twenty",
        42: "forty two",
        100: "one hundred",
        310: "three hundred ten",
        999: "nine hundred ninety nine",
        1000: "one thousand",
        2017: "two thousand seventeen",
        8040: "eight thousand forty",
        9999: "nine thousand nine hundred ninety nine",
    }
    assert len({" ".join(synthetic.spell(n)) for n in range(10_000)}) == 10_000
    with says(ValueError, "spell: the number must lie in 0..9999, got 10000"):
        synthetic.spell(10_000)


def test_number_words_hold_questions_answers_and_unseen_numbers():
    train, test = data.number_words(key=KEY)
    assert train.x.shape == train.y.shape == (16_000, 13) and test.size == 4000
    text, parts = synthetic.NUMBER_TOKENS, []
    for part in (train, test):
        x, y = np.asarray(part.x), np.asarray(part.y)
        np.testing.assert_array_equal(y[:, : synthetic.PROMPT - 1], -1)
        # Each target is the token that follows, up to <end>; nothing behind it is asked for.
        np.testing.assert_array_equal(np.where(y[:, :-1] >= 0, y[:, :-1], 0)[:, 6:], x[:, 7:])
        numbers = set()
        for row, targets in zip(x, y, strict=True):
            source = [text[t] for t in row[:6] if t != synthetic.PAD]
            answer = [text[t] for t in targets if t >= 0]
            assert answer.pop() == "<end>"
            figures, words = (answer, source) if text[row[6]] == "<to figures>" else (source, answer)
            assert synthetic.spell(int("".join(figures))) == words
            numbers.add(int("".join(figures)))
        assert len(numbers) == part.size // 2
        parts.append(numbers)
    assert parts[0] | parts[1] == set(range(10_000)) and not parts[0] & parts[1]
