"""What a study refuses before anything runs, and what it understands: options, data, functions, axes, scripts."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

import fnn
from fnn.study import axes, options, study
from fnn.study.summary import summarize
from fnn.study.table import facts

# One worker: the tests share the compilations.
pytestmark = pytest.mark.xdist_group("asked")
X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.arange(12) % 2


def tiny(grid=None, **options):
    points = {"depth": 1, "width": 2, "activation": "tanh", "norm": "none", "batch_size": 4} | (grid or {})
    return study.Study(points, **({"seeds": 1, "steps": 0, "data": (X, Y)} | options))


def one(params, state, batch):
    return 1


@pytest.mark.parametrize(
    "value", [2, np.int64(2), np.uint8(2), jnp.int32(2), [0, 1], (1, 0), range(2), np.arange(2), jnp.arange(2)]
)
def test_whole_numbers_of_all_kinds_are_seeds_and_steps(value):
    described = tiny(seeds=value, steps=value).describe()
    seeds = {run["seed"] for run in described["cells"][0]["runs"]}
    assert seeds == {0, 1} and described["steps"] == ([0, 2] if np.ndim(value) == 0 else [0, 1])


@pytest.mark.parametrize("option", ["seeds", "steps", "epochs", "chunk"])
@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        (1.5, TypeError, "must be an integer"),
        ([0, 1.5], TypeError, "must be an integer"),
        (True, TypeError, "must be an integer"),
        ("3", TypeError, "must be an integer"),
        ({0: 1}, TypeError, "must be integers|must be an integer"),
        (2**32, ValueError, "must be at most 2,147,483,647, got 4,294,967,296"),
        (-1, ValueError, "must be"),
        (np.int64(-1), ValueError, "must be"),
        ([-1], ValueError, "must be"),
        (range(10**9), ValueError, "must have at most 1,000,000 values, got 1,000,000,000"),
        (iter(int, 1), ValueError, "must have at most 1,000,000 values"),
    ],
)
def test_what_is_no_whole_number_is_refused_by_name(option, value, error, sentence):
    with pytest.raises(error, match=f"study: {option} {sentence}"):
        tiny(**{option: value})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": 2_000_000_000}, "at most 1,000,000 values"),
        ({"seeds": 1000, "grid": {"sigma_w": np.linspace(1, 2, 2000)}}, "at most 1,000,000 points, got 2,000,000"),
        ({"steps": 2**31 - 1}, "steps times batch_size must be at most 268,435,456"),
        ({"steps": None, "epochs": 1_000_000_000}, "epochs must be at most 1,000,000"),
        ({"steps": None, "epochs": 999_999, "grid": {"batch_size": [12]}, "data": (np.tile(X, (100, 1)), np.tile(Y, 100))}, "steps times batch_size"),
    ],
)  # fmt: skip
def test_what_would_fill_the_memory_is_refused_from_the_counts(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(**options).describe()


def frames():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(X), pandas.Series(Y)


class Exchanged:
    """An array that knows of `__dlpack__` alone."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X.tolist(), Y.tolist()),
        lambda: [X.tolist(), Y.tolist()],
        lambda: (pl.DataFrame(X), pl.Series(Y)),
        frames,
        lambda: (jnp.asarray(X), jnp.asarray(Y)),
        lambda: (Exchanged(X), Exchanged(Y)),
        lambda: (X, Y.astype(np.uint8)),
        lambda: (X, Y.astype(np.uint64)),
        lambda: ((X, Y), (X, Y)),
        lambda: ([X, Y], [X, Y]),
        lambda: (fnn.data.Dataset(X, Y), fnn.data.Dataset(X, Y)),
        lambda: ((X.tolist(), Y.tolist()), (X.tolist(), Y.tolist())),
    ],
)
def test_arrays_frames_and_lists_are_the_same_data(make):
    described = tiny(data=make()).describe()
    assert described["data"] == tiny().describe()["data"] == ["float32[12,3]"] * 2 + described["data"][2:]
    (x, y), _ = options.arrays(make())
    assert (x == X).all() and (y == Y).all() and y.dtype == np.int32


def test_two_examples_are_no_pair_of_pairs():
    (x, _), (held_out, _) = options.arrays(([[1.0, 2.0], [3.0, 4.0]], [0, 1]))
    assert x.shape == held_out.shape == (2, 2)


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        (3, TypeError, "data must be a name, a pair"),
        ((X, Y, X), TypeError, "data must be a name, a pair"),
        (((X, Y), X), TypeError, "data must be a name, a pair"),
        ((X * 1j, Y), TypeError, "x must be real, got complex"),
        ((X, np.array(["a"] * 12)), TypeError, "y must hold numbers, got <U1"),
        (([[1, 2], [3]], [0, 1]), TypeError, "x must be an array that NumPy can read, got list"),
        (({"a": X}, Y), TypeError, "x must be one array, got dict"),
        ((fnn.Masked(jnp.ones((12, 2, 1)), jnp.ones((12, 2), bool)), Y), TypeError, "x must be one array, got Masked"),
        ((X, Y + 2**32), ValueError, "y must fit in int32"),
        ((X, Y[:5]), ValueError, "same number of examples"),
        (((X, Y), (X[:, :2], Y)), ValueError, "training and held-out examples must have one shape"),
        (((X, Y), (X, Y + 1)), ValueError, r"labels must lie in 0..1, got 1..2"),
        (((X, Y), (np.full_like(X, np.nan), Y)), ValueError, "x must be finite"),
        ((X, Y - 1), ValueError, "labels must lie in"),
        ((X, X[:, :1]), TypeError, "labels must be integers"),
    ],
)
def test_bad_data_is_one_sentence(source, error, sentence):
    with pytest.raises(error, match=sentence):
        tiny(data=source).describe()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"loss": "cross_entropy"}, TypeError, "loss must be a function .*, got 'cross_entropy'; pass fnn.losses.cross_entropy"),
        ({"loss": "cross_entrpy"}, TypeError, "loss must be a function .*, got 'cross_entrpy'; pass fnn.losses.cross_entropy"),
        ({"loss": None}, TypeError, "loss must be a function .*, got None"),
        ({"loss": lambda outputs: 0}, TypeError, "loss must be a function of .outputs, targets., got <lambda>.outputs."),
        ({"loss": lambda outputs, targets: jnp.mean(outputs)}, ValueError, r"must return float\[batch\].*got float32\[\]"),
        ({"loss": lambda outputs, targets: targets}, ValueError, r"must return float\[batch\].*got int32"),
        ({"measure": one}, TypeError, "measure must be a dict of functions by name"),
        ({"measure": {"a": 3}}, TypeError, "measure a must be a function of .params, state, batch., got 3"),
        ({"measure": {"a": lambda params: 1}}, TypeError, "measure a must be a function of .params, state, batch."),
        ({"measure": {"a": lambda p, s, b: "x"}}, TypeError, "measure a must return real numbers.*got str"),
        ({"measure": {"a": lambda p, s, b: None}}, TypeError, "measure a must return real numbers.*got none"),
        ({"measure": {"a": lambda p, s, b: 1j}}, TypeError, "measure a must return real numbers.*got complex"),
        ({"measure": {"a": lambda p, s, b: {"b": [1, object()]}}}, TypeError, "measure a must return real numbers.*got object"),
        ({"measure": {3: one}}, TypeError, "name must be a string, got 3"),
        ({"measure": {"cosine": one}}, ValueError, "a name that no quantity has, got 'cosine'"),
        ({"measure": {"log10_gain_rms": one}, "build": lambda depth, classes: fnn.serial(fnn.dense(classes), named())}, ValueError, "a name that no quantity has, got 'log10_gain_rms'"),
        ({"quantities": []}, ValueError, "quantities must name at least one, got none"),
        ({"quantities": 3}, TypeError, "quantities must be a list of names, got 3"),
        ({"quantities": [3]}, ValueError, "unknown quantity 3"),
        ({"traced": 3}, TypeError, "traced must be a list of names, got 3"),
        ({"build": 3}, TypeError, "build must be a function"),
        ({"grid": {"classes": [2]}}, ValueError, "classes is not an axis"),
    ],
)  # fmt: skip
def test_bad_functions_and_names_are_one_sentence(options, error, sentence):
    with pytest.raises(error, match=sentence):
        if "build" in options and "measure" in options:
            study.Study({"depth": 1, "batch_size": 4}, data=(X, Y), steps=0, **options).describe()
        else:
            tiny(**options).describe()


def named():
    return fnn.Layer(lambda key, spec: ({"gain": jnp.ones(())}, ()), lambda p, s, x, **_: (p["gain"] * x, s))


def test_measurements_may_be_plain_numbers():
    results = {
        "whole": one,
        "decimal": lambda p, s, b: 2.5,
        "flag": lambda p, s, b: True,
        "tree": lambda p, s, b: {"a": 1, "b": np.arange(2)},
    }
    table = tiny(measure=results, steps=[0, 1], quantities=list(results)).table()
    assert table.filter(pl.col("step") == 0).select("quantity", "path", "value").sort("quantity", "path").rows() == [
        ("decimal", "", 2.5), ("flag", "", 1), ("tree", "a", 1), ("tree", "b[0]", 0), ("tree", "b[1]", 1), ("whole", "", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("name", axes.RESERVED)
def test_an_argument_named_like_a_column_is_refused(name):
    scope: dict = {"fnn": fnn}
    exec(f"def build({name}=1.0, classes=2):\n    return fnn.dense(classes)", scope)
    for points in ({name: [4.0, 8.0]}, {"batch_size": 4}):
        with pytest.raises(ValueError, match=f"must not be named like a column of the tables, got '{name}'; rename it"):
            study.Study(points, build=scope["build"], data=(X, Y), steps=0).describe()


def test_axes_stand_apart_from_the_columns_of_every_other_table():
    """Whatever columns are made from the table: an argument of that name comes through unharmed."""
    plain = tiny(grid={"sigma_w": [1.0, 1.5]}, seeds=2).table()
    own = set(plain.columns)
    found = summarize(plain)
    made = [fnn.compare(plain, plain), found.networks, found.layers, found.runs, found.finals]
    names = sorted({name for table in made for name in table.columns} - own - set(axes.RESERVED))
    assert {"a", "log10_growth", "seeds", "middle", "log10_first"} <= set(names)
    assert set(plain.columns[plain.columns.index("step") :]) | {"cell"} <= set(axes.RESERVED)
    for name in [*names, "size", "len", "run", "lost", "theory_low"]:
        table = plain.rename({"sigma_w": name})
        assert facts(table) == facts(plain), name
        assert fnn.compare(table, table)["difference"].abs().max() == 0, name
        other = summarize(table)
        assert other.networks.height == 2 and other.networks["seeds"].to_list() == [2, 2], name
        assert other.networks["log10_growth"].equals(found.networks["log10_growth"]) and other.layers.equals(
            found.layers
        ), name


def test_arguments_that_are_no_plain_values_keep_their_defaults():
    half = np.float32(0.5)

    def build(depth=1, wave=jnp.sin, none=None, scale=half, run=1, on=False, classes=2):
        assert (
            wave is jnp.sin and none is None and jnp.asarray(on).dtype == bool and jnp.asarray(run).dtype == jnp.int32
        )
        return fnn.serial(*[fnn.dense(2)] * depth, fnn.activation(wave), fnn.dense(classes))

    axes = {"batch_size": 4, "run": [0, 1], "on": [False, True]}
    described = study.Study(axes, build=build, data=(X, Y), steps=0, seeds=1, traced=["run", "on"])
    static = described.describe()["cells"][0]["static"]
    assert "wave" not in static and static["none"] is None and static["scale"] == 0.5
    table = described.table()
    assert table["none"].null_count() == table.height
    assert set(table["run"]) == {0, 1} and set(table["on"]) == {False, True}
    zero = study.Study(axes | {"run": 0, "on": False}, build=build, data=(X, Y), steps=0, seeds=1, traced=["run", "on"])
    kept = zero.cells()[0].settled().static  # 0 in all runs: build gets a number of the same type
    assert (type(kept["run"]), type(kept["on"])) == (int, bool)


def test_data_of_a_file_are_those_that_it_holds_now(tmp_path, monkeypatch):
    found = {}
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        x = np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32)
        np.savez(tmp_path / folder / "set.npz", x_train=x, y_train=np.arange(8), x_test=x, y_test=np.arange(8))
        monkeypatch.chdir(tmp_path / folder)
        found[folder] = options.arrays("set.npz")
        assert options.arrays("set.npz") is found[folder] and options.in_files("set.npz")
    assert not np.array_equal(found["a"][0].x, found["b"][0].x) and not options.in_files("digits")
    (tmp_path / "a" / "set.npz").replace(tmp_path / "b" / "set.npz")
    assert np.array_equal(options.arrays("set.npz")[0].x, found["a"][0].x)


def test_an_axis_of_one_study_alone_is_no_seed():
    plain = tiny(grid={"sigma_w": [1.0, 1.5]}, seeds=2).table()
    for pair in ((plain, plain.drop("sigma_w")), (plain.drop("sigma_w"), plain)):
        with pytest.raises(ValueError, match="sigma_w with 2 values in .*; compare tables filtered to one of them"):
            fnn.compare(*pair)
    zipped = plain.with_columns(shift=pl.col("sigma_w") + 1).select("cell", "shift", *plain.columns[1:])
    assert fnn.compare(zipped, plain)["difference"].abs().max() == 0  # sigma_w tells it
    with pytest.raises(TypeError, match="compare: a study must be a folder, Results, or a table, got int; pass what"):
        fnn.compare(plain, 3)
    one = plain.filter(sigma_w=1.5)
    assert fnn.compare(one, one.drop("sigma_w"))["difference"].abs().max() == 0


def test_functions_that_workers_cannot_import_are_refused_before_anything_runs(tmp_path):
    two = {"activation": ["tanh", "relu"]}
    options = [
        {"measure": {"a": lambda p, s, b: 1}},
        {"loss": lambda o, t: o[:, 0]},
        {"loss": fnn.losses.Loss("m", lambda o, t: o[:, 0], None, lambda shape, targets: None)},
    ]
    for option in options:
        with pytest.raises(
            ValueError, match=r"(measure a|loss) must be a function at the top of a file.*use workers=1"
        ):
            tiny(grid=two, **option).run(tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    tiny(measure={"a": lambda p, s, b: 1}).run(workers=2)  # one cell runs here


STUDY = """
import fnn
grid = fnn.grid.product(activation=["tanh", "relu"], depth=1, width=2, norm="none", batch_size=4)
study = fnn.Study(grid, seeds=1, steps=0, data="clusters")
"""


@pytest.mark.parametrize("before", ["", 'if __name__ == "__main__":\n    print("hello")\n'])
def test_a_script_without_a_guard_is_told_so(tmp_path, before):
    """Before anything runs where the script shows it; else by the workers, which import the script and find out."""
    script = tmp_path / "script.py"
    script.write_text(f"{STUDY}{before}study.run({str(tmp_path / 'out')!r}, workers=2)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and 'under if __name__ == "__main__":' in done.stderr
    assert "bootstrapping" not in done.stderr and done.stderr.count("Traceback") == 1  # the script's own
    assert (tmp_path / "out").exists() == bool(before)
