"""IDX files, and archives whose headers lie: bytes written by hand, and what is refused in one sentence."""

import gzip
import re
import struct
import tracemalloc
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from test_data import CODES, KEY, idx_bytes, says, whole, write_mnist

from fnn.datasets import data

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
