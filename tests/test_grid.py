"""Grids: product, zip and chain from Python, from a command line's words, and from a TOML file."""

import itertools
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from fnn.study import grid


def test_product_zip_and_chain_are_what_itertools_would_give():
    product = grid.product(depth=[4, 16], activation=["tanh", "relu"])
    assert [tuple(p.values()) for p in product] == [(4, "tanh"), (4, "relu"), (16, "tanh"), (16, "relu")]
    zipped = grid.zip(depth=[4, 16], width=[64, 32])
    assert list(zipped) == [{"depth": 4, "width": 64}, {"depth": 16, "width": 32}]
    both = grid.chain(zipped, grid.product(depth=4, width=64), grid.product(depth=8, width=8))
    assert len(both) == 3  # a point that comes twice counts once
    times = zipped * grid.product(norm=["none", "batch_norm"])
    assert list(times)[1] == {"depth": 4, "width": 64, "norm": "batch_norm"} and len(times) == 4
    assert pickle.loads(pickle.dumps(times)) == times and hash(times) == hash(
        zipped * grid.product(norm=["none", "batch_norm"])
    )


def test_equal_numbers_are_one_point_and_true_is_another():
    assert list(grid.product(gain=[1, 1.0, np.float32(1), True])) == [{"gain": 1}, {"gain": True}]
    assert grid.product(gain=1) == grid.product(gain=1.0) != grid.product(gain=True)
    assert list(grid.product(depth=np.int64(4), gain=jnp.float32(0.5))) == [{"depth": 4, "gain": 0.5}]
    assert [p["depth"] for p in grid.product(depth=np.array([4, 16]))] == [4, 16]


def test_span_reads_lists_ranges_and_words():
    assert grid.span("4,16,64") == [4, 16, 64]
    assert grid.span("tanh, relu") == ["tanh", "relu"]
    assert grid.span("0.5:2.5:9") == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5]
    assert grid.span("0.9:1.2:4") == [0.9, 1.0, 1.1, 1.2]  # not 1.0999999999999999
    assert grid.span("2:10:5,true") == [2, 4, 6, 8, 10, True]
    assert grid.span("1e-4:1e-1:4:log") == [1e-4, 1e-3, 1e-2, 1e-1]


def test_toml_chains_tables_and_zips_axes(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(
        'seeds = 3\nsteps = "0,100"\nquantities = "loss, log10_error"\n[[grid]]\ndepth = [4, 16]\nactivation = "tanh,relu"\n'
        '[[grid]]\ndepth = [32, 64]\nwidth = "64,32"\nnorm = "batch_norm"\nzip = ["depth", "width"]\n'
    )
    read = grid.from_toml(path)
    assert read.options == {"seeds": 3, "steps": [0, 100], "quantities": ("loss", "log10_error")}
    assert read.grid == grid.product(depth=[4, 16], activation=["tanh", "relu"]) + grid.product(
        norm="batch_norm"
    ) * grid.zip(depth=[32, 64], width=[64, 32])


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda _: grid.product(depth=[]), ValueError, "depth must name at least one value"),
        (lambda _: grid.product(depth=[len]), TypeError, "must be a string, number or bool"),
        (lambda _: grid.product(sigma_w=[float("nan")]), ValueError, "sigma_w must be finite"),
        (lambda _: grid.zip(depth=[1, 2], width=[3]), ValueError, "depth 2, width 1"),
        (lambda _: grid.product(depth=1) * grid.product(depth=2), ValueError, "got depth twice"),
        (lambda _: grid.span("0:1"), ValueError, "low:high:count"),
        (lambda _: grid.span("0:1:3:log"), ValueError, "low:high:count"),
        (lambda _: grid.from_axes({"depth": [1]}, ["width"]), ValueError, "got width"),
        (lambda tmp: grid.from_toml(tmp / "none.toml"), FileNotFoundError, "must exist"),
        (lambda tmp: grid.from_toml(_written(tmp, "seeds = = 3")), ValueError, "must be TOML"),
        (lambda tmp: grid.from_toml(_written(tmp, "grid = 3")), ValueError, r"\[\[grid\]\] tables"),
        (lambda tmp: grid.from_toml(_written(tmp, "a = " + 100_000 * "[")), ValueError, "must be TOML"),
        (lambda tmp: grid.from_toml(_written(tmp, "[grid]\nzip = [['a']]\na = 1")), TypeError, "zip must name axes"),
        (lambda _: grid.product(depth={"a": 1}), TypeError, "must be a string, number or bool, got dict"),
        # More than memory holds: refused from the counts.
        (lambda _: grid.span("0:1:1000000000"), ValueError, "'0:1:1000000000' must have at most 1,000,000 values"),
        (lambda _: grid.span(f"0:1:{10**200}"), ValueError, "at most 1,000,000 values, got far more"),
        (lambda _: grid.span("0:1:900000,0:1:900000"), ValueError, "an axis must have at most 1,000,000 values"),
        (lambda _: grid.product(depth=range(10**9)), ValueError, "depth must have at most 1,000,000 values"),
        (lambda _: grid.product(depth=itertools.count()), ValueError, "depth must have at most 1,000,000 values"),
        (lambda _: grid.zip(depth=range(10**9), width=range(10**9)), ValueError, "depth must have at most"),
        (
            lambda _: grid.product(**{f"a{i}": range(1000) for i in range(3)}),
            ValueError,
            "at most 1,000,000 points, got 1,000,000,000",
        ),
        (lambda _: grid.product(a=range(2000)) * grid.product(b=range(2000)), ValueError, "points, got 4,000,000"),
        (
            lambda tmp: grid.from_toml(_written(tmp, "[[grid]]\n" + "".join(f"a{i} = '0:1:1000'\n" for i in range(3)))),
            ValueError,
            "points, got 1,000,000,000",
        ),
    ],
)
def test_bad_grids_are_refused_with_a_sentence(make, error, sentence, tmp_path):
    with pytest.raises(error, match=sentence):
        make(tmp_path)


def _written(folder, text):
    path = folder / "bad.toml"
    path.write_text(text)
    return path
