"""What a study is: functions are named by their content, equal numbers are equal, float32 and float64 are two."""

import enum
import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

import fnn
from fnn.study import results, study
from fnn.study.identity import identify

# One worker: the tests share the compilations.
pytestmark = pytest.mark.xdist_group("identity")
SCALE = 1.0


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, outputs, targets):
        return self.scale * fnn.losses.cross_entropy(outputs, targets)

    def method(self, outputs, targets):
        return self(outputs, targets)


class Kind(enum.Enum):
    A, B = 1, 2


def closed(value):
    def loss(outputs, targets):
        return jnp.mean(outputs, axis=-1) + 0 * hash(value)

    return loss


def default(value):
    def loss(outputs, targets, scale=value):
        return scale * outputs[:, 0]

    return loss


def keyword(value):
    def loss(outputs, targets, *, scale=value):
        return scale * outputs[:, 0]

    return loss


def attribute(value):
    def loss(outputs, targets):
        return loss.scale * outputs[:, 0]

    loss.scale = value
    return loss


def scaled(outputs, targets, scale=1.0):
    return scale * outputs[:, 0]


def reads_a_global(outputs, targets):
    return SCALE * outputs[:, 0]


def calls_it(outputs, targets):
    return reads_a_global(outputs, targets)


def same(f):
    return f


WAYS = {
    "closure": closed,
    "default": default,
    "keyword": keyword,
    "attribute": attribute,
    "partial, by keyword": lambda v: functools.partial(scaled, scale=v),
    "partial, by position": lambda v: functools.partial(scaled, v),
    "object": Scaled,
    "method": lambda v: Scaled(v).method,
    "nested closures": lambda v: closed(closed(closed(v))),
    "jit": lambda v: jax.jit(closed(v)),
    "vmap": lambda v: jax.vmap(closed(v)),
    "custom_vjp": lambda v: jax.custom_vjp(closed(v)),
    "wraps": lambda v: functools.wraps(scaled)(closed(v)),
    "cache": lambda v: functools.lru_cache(closed(v)),
    "partial of partial of object": lambda v: functools.partial(functools.partial(Scaled(v), 1), 2),
    "initialiser of fnn": lambda v: closed(fnn.initializers.constant(v)),
    "layer of fnn": lambda v: closed(fnn.scalar_affine(v)),
}
PAIRS = [
    (1.0, 100.0),
    (1, True),
    ("a", b"a"),
    ((1, 2), (2, 1)),
    ((1, 2), [1, 2]),
    ({"a": 1}, {"a": 2}),
    ({1, 2}, {1, 3}),
    (np.arange(3), np.arange(4)),
    (np.zeros(2, np.float32), np.zeros(2)),
    (np.arange(2), jnp.arange(1, 3)),
    (Kind.A, Kind.B),
    (jnp.tanh, jnp.sin),
    (int, float),
    (re.compile("a"), re.compile("b")),
    (None, 0),
]


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_function_reaches_is_part_of_its_name(way):
    make = WAYS[way]
    one, other, again = (identify(make(v)) for v in (1.0, 100.0, 1.0))
    assert not one.doubts and one.name != other.name and one == again
    # Equal numbers are equal, and true is no number.
    assert identify(make(1)) == one == identify(make(np.float32(1)))
    assert identify(make(True)) != one


@pytest.mark.parametrize("pair", PAIRS, ids=[str(i) for i in range(len(PAIRS))])
def test_values_are_told_apart_by_content(pair):
    a, b = (identify(closed(value)) for value in pair)
    assert not a.doubts and not b.doubts and a.name != b.name


def test_names_do_not_depend_on_order_or_place():
    assert identify(closed({"a": 1, "b": 2})) == identify(closed({"b": 2, "a": 1}))
    assert identify(closed([1.5] * 2)) == identify(closed([1.5, float("1.5")]))
    cyclic: list = [1]
    cyclic.append(cyclic)
    assert identify(closed(cyclic)) == identify(closed(cyclic)) != identify(closed([1, [1]]))


def test_code_that_differs_under_one_name_is_told_apart(monkeypatch):
    one, two = [lambda x: x, lambda x: 2 * x]  # one line of source
    assert identify(one) != identify(two)
    before = identify(calls_it)
    monkeypatch.setitem(globals(), "SCALE", 2.0)  # two calls away
    assert identify(calls_it) != before
    monkeypatch.setitem(globals(), "SCALE", 1)
    assert identify(calls_it) == before
    monkeypatch.setattr(Scaled, "__call__", lambda self, outputs, targets: 0)
    assert identify(Scaled(1.0)) != identify(type("Scaled", (), {})())


def test_what_cannot_be_read_is_a_doubt(tmp_path):
    with open(tmp_path / "log", "w") as file:
        assert identify(closed(file)).doubts == ("value, a TextIOWrapper",)
    assert identify(closed(threading.Lock())).doubts and identify(closed(iter(lambda: 1, 1))).doubts == ()
    assert identify(closed(i for i in range(3))).doubts == ("value, a generator",)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert identify(closed(deep)).doubts
    assert jax.jit(lambda x: 0 * x + bool(identify(closed(x)).doubts))(1.0) == 1  # a tracer


def test_functions_without_a_module_or_a_file_have_names_too():
    """As a notebook or `exec` makes them."""
    scopes: list[dict] = [{}, {}, {}]
    for scope, scale in zip(scopes, (1, 2, 1), strict=True):
        exec(f"def loss(outputs, targets):\n    return {scale} * outputs", scope)
    one, two, again = (identify(scope["loss"]) for scope in scopes)
    assert one == again != two and not one.doubts
    for scope, scale in zip(scopes, (1, 2, 1), strict=True):
        exec(f"class Loss:\n    def __call__(self, outputs, targets):\n        return {scale} * outputs", scope)
    one, two, again = (identify(scope["Loss"]()) for scope in scopes)
    assert one == again != two and not one.doubts


def test_fnn_and_installed_packages_go_by_name():
    assert identify(fnn.losses.mse).name == f"Loss(mse) {fnn.__version__}"
    assert identify(study.cell.mlp).name == f"fnn.study.cell.mlp {fnn.__version__}"
    mine = fnn.losses.Loss("mse", scaled, None, lambda shape, targets: None)
    assert identify(mine).name != identify(fnn.losses.mse).name
    assert identify(jnp.tanh).doubts == () == identify(np.tanh).doubts


def tiny(**options):
    axes = {"depth": 1, "width": 2, "activation": "tanh", "norm": "none", "batch_size": 4} | options.pop("axes", {})
    return study.Study(fnn.grid.product(**axes), **({"seeds": 1, "steps": 0, "data": "clusters"} | options))


def build(k):
    def net(depth, classes):
        return fnn.serial(*[fnn.dense(2)] * depth, fnn.activation(lambda x: k * x), fnn.dense(classes))

    return net


def own(k, **options):
    return study.Study(
        {"depth": 1, "batch_size": 4}, build=build(k), **({"seeds": 1, "steps": 0, "data": "clusters"} | options)
    )


def test_a_folder_is_taken_up_by_the_same_functions_alone(tmp_path):
    own(3).run(tmp_path)
    own(3.0).run(tmp_path)
    assert len(results.read(tmp_path).sessions) == 1  # taken up, and nothing left to do
    with pytest.raises(ValueError, match="holds another study: build is .* there, .* here"):
        own(500).run(tmp_path)
    with pytest.raises(ValueError, match="holds another study: loss is"):
        own(3, loss=functools.partial(scaled, scale=100.0)).run(tmp_path)
    with pytest.raises(ValueError, match="holds another study: measure is"):
        own(3, measure={"one": lambda params, state, batch: 1}).run(tmp_path)


def test_a_study_that_cannot_be_named_runs_but_is_not_resumed(tmp_path):
    lock = threading.Lock()

    def one(params, state, batch):
        return 1 if lock else 2

    found = own(3, measure={"one": one}).run(tmp_path)
    assert found.description["unpromised"] == ["measure one reaches lock, a lock"]
    assert found.table().filter(pl.col("quantity") == "one")["value"].to_list() == [1]
    with pytest.raises(
        ValueError, match="got some whose content cannot be read: .*lock, a lock; pass functions without it"
    ):
        own(3, measure={"one": one}).run(tmp_path)
    assert results.read(tmp_path).table().equals(found.table())


def test_equal_numbers_make_one_study_and_true_is_not_one(tmp_path):
    def described(**axes):
        return tiny(axes=axes).describe()

    def name(**axes):
        return results.key(described(**axes))

    assert name(sigma_w=1) == name(sigma_w=1.0) == name(sigma_w=np.float32(1)) == name(sigma_w=[1, 1.0])
    assert name(depth=1) == name(depth=1.0) and name(learning_rate=1) == name(learning_rate=1.0)
    assert name(sigma_w=[1.4, 3]) == name(sigma_w=[1.4, 3.0])
    assert not results.difference(described(sigma_w=1), described(sigma_w=1.0))
    assert [type(run["sigma_w"]) for run in described(sigma_w=[1.4, 3])["cells"][0]["runs"]] == [float] * 2

    def flagged(flag=False, classes=2):
        return fnn.dense(classes)

    true, one = (
        study.Study({"flag": value}, build=flagged, data="clusters", steps=0).describe() for value in (True, 1)
    )
    assert results.key(true) != results.key(one) and results.difference(true, one)


def test_a_whole_number_beside_a_decimal_on_a_traced_axis():
    """One program for 1.4 and 3, the same numbers as for 3.0; on any traced axis."""
    table = tiny(axes={"sigma_w": [1.4, 3]}).table()
    assert table.equals(tiny(axes={"sigma_w": [1.4, 3.0]}).table()) and table.schema["sigma_w"] == pl.Float64
    assert tiny(axes={"sigma_b": [0, 0.5]}).describe()["types"]["sigma_b"] == "float"

    def net(gain, shift: int, classes):
        assert (jnp.result_type(gain), jnp.result_type(shift)) == (jnp.float32, jnp.int32)
        return fnn.serial(fnn.dense(classes), fnn.activation(lambda x: gain * x + shift))

    axes = {"gain": [1, 2.5], "shift": [0, 1.0]}
    described = study.Study(axes, build=net, traced=["gain", "shift"], seeds=1, steps=0, data="clusters").describe()
    assert (described["types"]["gain"], described["types"]["shift"]) == ("float", "int")


@pytest.mark.parametrize(
    ("axes", "error", "sentence"),
    [
        ({"sigma_w": [True]}, TypeError, "sigma_w must be a number, got True"),
        ({"learning_rate": ["fast"]}, TypeError, "learning_rate must be a number, got 'fast'"),
        ({"sigma_w": [None, 1.0]}, TypeError, "sigma_w must be a number, got None"),
        ({"learning_rate": [1e39]}, ValueError, "learning_rate must lie in float32's range"),
        ({"sigma_w": [1e-46]}, ValueError, "sigma_w must lie in float32's range"),
        ({"depth": [1, "2"]}, TypeError, "values of depth must have one type, got int, str"),
        ({"seed": [2**31]}, ValueError, "seed must be an integer that fits in int32"),
        ({"seed": [1.5]}, ValueError, "seed must be an integer that fits in int32"),
        ({"width": [2**40]}, ValueError, "width must be an integer that fits in int32"),
    ],
)
def test_axes_that_have_no_one_type_are_refused(axes, error, sentence):
    with pytest.raises(error, match=sentence):
        tiny(axes=axes).describe()


def test_a_linen_module_is_what_it_holds_not_when_it_was_made():
    from flax import linen

    def made(width):
        net = linen.Sequential([linen.Dense(width), linen.tanh])
        return lambda: net

    first, again, other = (identify(made(width)).name for width in (2, 2, 3))
    assert first == again != other
