"""Verbs on pytrees against NumPy in float64; `Stacked` keeps the depth axis apart from the arrays' own axes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnn import lowering, tree
from fnn.tree import Stacked

pytestmark = pytest.mark.usefixtures("optimised")

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


EXAMPLE = (
    {"kernel": normal(4, 3), "bias": normal(3)},
    {"trunk": Stacked({"kernel": normal(8, 3, 2), "bias": normal(8, 3)})},
    Stacked(({"scale": normal(2)}, Stacked({"kernel": normal(2, 3, 4, 4)}), ())),
)
PATHS = ["0/bias", "0/kernel", "1/trunk/[:]/bias", "1/trunk/[:]/kernel", "2/[:]/0/scale", "2/[:]/1/[:]/kernel"]
DEPTHS = [0, 0, 1, 1, 1, 2]
LEAVES = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(EXAMPLE)]


def axis_norms(a, k):
    return np.sqrt((a**2).sum(axis=tuple(range(k, a.ndim))))


def test_paths_and_depths():
    assert tree.paths(EXAMPLE) == PATHS
    counted = tree.map_depth(lambda k, leaf: k, EXAMPLE)
    assert jax.tree.structure(counted) == jax.tree.structure(EXAMPLE)
    assert jax.tree.leaves(counted) == DEPTHS
    three = Stacked([Stacked((Stacked(np.zeros((2, 3, 4))), np.zeros((2, 3))))])
    assert tree.paths(three) == ["[:]/0/[:]/0/[:]", "[:]/0/[:]/1"]
    assert jax.tree.leaves(tree.map_depth(lambda k, leaf: k, three)) == [3, 2]
    assert tree.path(()) == ""


def test_map_depth_takes_further_trees():
    got = tree.map_depth(lambda k, a, b, c: a + k * b - c.sum(), EXAMPLE, EXAMPLE, EXAMPLE)
    for a, k, b in zip(jax.tree.leaves(got), DEPTHS, LEAVES, strict=True):
        np.testing.assert_allclose(a, (1 + k) * b - b.sum(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError):
        tree.map_depth(lambda k, a, b: a, EXAMPLE, EXAMPLE[:2])


def test_rows_write_every_depth_out():
    rows = dict(tree.rows(EXAMPLE))
    names = [
        *("0/bias", "0/kernel"),
        *(f"1/trunk/[{i}]/{name}" for i in range(8) for name in ("bias", "kernel")),
        *(name for i in range(2) for name in (f"2/[{i}]/0/scale", *(f"2/[{i}]/1/[{j}]/kernel" for j in range(3)))),
    ]
    assert list(rows) == names
    np.testing.assert_array_equal(rows["1/trunk/[7]/kernel"], EXAMPLE[1]["trunk"].blocks["kernel"][7])
    np.testing.assert_array_equal(rows["2/[1]/1/[2]/kernel"], EXAMPLE[2].blocks[1].blocks["kernel"][1, 2])
    assert rows["2/[1]/0/scale"] == EXAMPLE[2].blocks[0]["scale"][1]
    np.testing.assert_array_equal(rows["0/bias"], EXAMPLE[0]["bias"])


def test_rows_stop_at_leaves_of_ones_own():
    pair = [{"a": np.arange(3), "b": np.arange(3)}, Stacked({"x": {"a": np.arange(2), "b": 10 + np.arange(2)}})]
    got = list(tree.rows(pair, is_leaf=lambda node: isinstance(node, dict) and "a" in node))
    assert [name for name, _ in got] == ["0", "1/[0]/x", "1/[1]/x"]
    assert got[2][1] == {"a": 1, "b": 11}
    # a mark without arrays has no depth, and rows none
    assert list(tree.rows({"a": Stacked(()), "b": 1.0})) == [("b", 1.0)]
    assert [name for name, _ in tree.rows(Stacked(np.zeros(2)))] == ["[0]", "[1]"]


def test_size_norm_and_dot():
    assert tree.size(EXAMPLE) == sum(leaf.size for leaf in LEAVES) == 12 + 3 + 48 + 24 + 2 + 96
    assert tree.size({"a": np.zeros((0, 3)), "b": 1.0}) == 1 and tree.size(()) == 0
    other = jax.tree.map(lambda a: a[..., ::-1] + np.float32(0.5), EXAMPLE)
    others = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(other)]
    norm, dot = jax.jit(lambda a, b: (tree.norm(a), tree.dot(a, b)))(EXAMPLE, other)
    total = sum((leaf**2).sum() for leaf in LEAVES)
    np.testing.assert_allclose(norm, math.sqrt(total), rtol=1e-6)
    np.testing.assert_allclose(dot, sum((a * b).sum() for a, b in zip(LEAVES, others, strict=True)), rtol=1e-5)


def test_sums_are_taken_in_at_least_float32():
    # bfloat16 would stop counting at 256
    a = jnp.full((4096,), 1.0, jnp.bfloat16)
    run = jax.jit(lambda a: (tree.norm(a), tree.dot(a, a), tree.norms([a])[0], tree.log_norm(a)))
    norm, dot, norms, log = run(a)
    assert (norm, dot, norms) == (64, 4096, 64) and log == pytest.approx(math.log(64), rel=1e-6)
    assert {v.dtype for v in (norm, dot, norms, log)} == {jnp.dtype("float32")}
    assert tree.norm([np.array([3, 4])]) == 5
    assert tree.statistics_dtype(jnp.bfloat16) == tree.statistics_dtype(jnp.int32) == jnp.float32


def test_float64_stays_float64(x64):
    a = {"a": 1e-200 * np.arange(4.0), "b": np.array(2e-200)}
    norm, log, grad = jax.jit(lambda a: (tree.norm(a), tree.log_norms(a), jax.grad(tree.norm)(a)))(a)
    assert norm.dtype == log["a"].dtype == jnp.float64
    np.testing.assert_allclose(norm, 1e-200 * math.sqrt(18), rtol=1e-14)
    np.testing.assert_allclose(log["a"], math.log(1e-200) + 0.5 * math.log(14), rtol=1e-14)
    np.testing.assert_allclose(grad["a"], np.arange(4) / math.sqrt(18), rtol=1e-12)


def test_norms_of_every_parameter_array():
    norms, logs = jax.jit(lambda a: (tree.norms(a), tree.log_norms(a)))(EXAMPLE)
    for got, log, leaf, k in zip(jax.tree.leaves(norms), jax.tree.leaves(logs), LEAVES, DEPTHS, strict=True):
        wanted = axis_norms(leaf, k)
        assert got.shape == log.shape == leaf.shape[:k]
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
        np.testing.assert_allclose(log, np.log(wanted), rtol=1e-5, atol=1e-6)
    assert tree.paths(norms) == PATHS
    assert tree.norms({"a": -3.0}) == {"a": 3.0}


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def measure(request):
    """Measure as on a CPU, which may look at a sum before it goes on, and as on a GPU, which may not."""

    def norm(a):
        return tree.norm_of_all(jax.tree.leaves(a))

    def run(a):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lowering, "platform", lambda: request.param)
            return norm(a), jnp.stack(jax.tree.leaves(tree.log_norms(a))), jax.grad(norm)(a)

    return jax.jit(run)


numbers = st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3)


# Below 2^-126 (1.2e-38) numbers are subnormal, which XLA may take for zero: hence the absolute tolerance.
@settings(max_examples=25, deadline=None)
@given(a=numbers, b=numbers, scale_a=st.integers(-36, 37), scale_b=st.integers(-36, 37))
def test_norms_are_right_over_the_range_of_float32(measure, a, b, scale_a, scale_b):
    leaves = [np.float32(np.array(v) * 10.0**scale) for v, scale in ((a, scale_a), (b, scale_b))]
    wide = [leaf.astype(np.float64) for leaf in leaves]
    norm, logs, _ = measure({"a": leaves[0], "b": leaves[1]})
    np.testing.assert_allclose(norm, np.linalg.norm(np.concatenate(wide)), rtol=1e-6, atol=2e-37)
    for log, leaf in zip(logs, wide, strict=True):
        if np.linalg.norm(leaf) > 1e-35:
            np.testing.assert_allclose(log, np.log(np.linalg.norm(leaf)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-20, 1.0, 1e19, 1e25, 1.1e38, 3e38])
def test_exploded_and_vanished_norms(measure, size):
    """8.5e37 and more have a subnormal reciprocal, which XLA flushes to zero: log_norm once said -inf there."""
    a = {"a": np.float32(size) * np.array([0.6, 0, 0.8], np.float32), "b": np.zeros(3, np.float32)}
    exact = np.linalg.norm(a["a"].astype(np.float64))
    norm, logs, gradient = measure(a)
    np.testing.assert_allclose(norm, exact, rtol=1e-6)
    np.testing.assert_allclose(logs, [np.log(exact), -np.inf], rtol=1e-6, atol=1e-6)
    if size > 1e-36:
        np.testing.assert_allclose(gradient["a"], [0.6, 0, 0.8], rtol=1e-6)
        np.testing.assert_array_equal(gradient["b"], np.zeros(3))


def test_a_norm_may_leave_the_range_but_its_logarithm_does_not():
    a = np.full(10_000, 3e38, np.float32)
    norm, log = jax.jit(lambda a: (tree.norm(a), tree.log_norm(a)))(a)
    assert norm == np.inf and log == pytest.approx(math.log(3e38) + math.log(100), rel=1e-6)


def test_zero_infinite_and_nan(measure):
    zeros = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    norm, logs, gradient = measure(zeros)
    assert norm == 0 and (logs == -np.inf).all()
    np.testing.assert_array_equal(gradient["a"], np.zeros(3))
    for bad in (np.inf, -np.inf, np.nan):
        norm, logs, _ = measure(zeros | {"b": np.array([1, bad, 0], np.float32)})
        wanted = np.nan if np.isnan(bad) else np.inf
        np.testing.assert_array_equal([norm, *logs], [wanted, -np.inf, wanted])


def test_log_norm_over_some_axes():
    a = normal(3, 4, 5) * 10.0 ** np.array([-25, 0, 25]).reshape(3, 1, 1)
    a = a.astype(np.float32)
    exact = 0.5 * np.log((a.astype(np.float64) ** 2).sum(axis=(1, 2)))
    np.testing.assert_allclose(tree.log_norm(a, axis=(1, 2)), exact, rtol=1e-6, atol=1e-6)
    assert tree.log_norm(np.zeros((0, 3), np.float32)) == -np.inf
    assert tree.log_norm(np.float32(-2.0)) == pytest.approx(math.log(2), rel=1e-6)


def test_norm_under_vmap_equals_a_loop():
    a = np.array([[3e-30, 4e-30], [0, 0], [3, 4], [3e30, 4e30]], np.float32)
    got = jax.jit(jax.vmap(lambda row: (tree.norm(row), jax.grad(tree.norm)(row))))(a)
    np.testing.assert_allclose(got[0], [5e-30, 0, 5, 5e30], rtol=1e-6)
    np.testing.assert_allclose(got[1], [[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


def test_the_empty_tree():
    assert tree.norm(()) == tree.dot((), ()) == 0
    assert tree.norm([np.zeros((0,), np.float32)]) == 0
    assert tree.paths(()) == [] and tree.norms(()) == ()


def test_safe_sqrt():
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(tree.safe_sqrt)))(jnp.array([0.0, 4.0, 2.25]))
    np.testing.assert_array_equal(value, [0, 2, 1.5])
    np.testing.assert_allclose(slope, [0, 0.25, 1 / 3], rtol=1e-6)


def test_stack_and_unstack_are_inverses():
    blocks = [{"kernel": normal(3, 2), "inner": Stacked(normal(4, 2))} for _ in range(3)]
    stacked = tree.stack(blocks)
    assert isinstance(stacked, Stacked) and tree.paths(stacked) == ["[:]/inner/[:]", "[:]/kernel"]
    for i, block in enumerate(blocks):
        np.testing.assert_array_equal(stacked.blocks["kernel"][i], block["kernel"])
    back = tree.unstack(stacked)
    assert len(back) == 3
    for got, block in zip(back, blocks, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(block)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(block), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(tree.stack(iter(blocks)).blocks["kernel"], stacked.blocks["kernel"])
    with pytest.raises(ValueError, match=r"tree\.unstack: the tree must have a leaf, got none"):
        tree.unstack(Stacked(()))


def test_a_slice_of_blocks():
    trunk = EXAMPLE[1]["trunk"]
    np.testing.assert_array_equal(trunk[2]["kernel"], trunk.blocks["kernel"][2])
    np.testing.assert_array_equal(trunk[-3:]["bias"], trunk.blocks["bias"][5:])
    assert isinstance(EXAMPLE[2][0][1], Stacked)  # one depth axis is taken, the inner one stays
    assert repr(Stacked((1, 2))) == "Stacked((1, 2))"


def test_the_mark_survives_transformations():
    doubled = jax.jit(lambda a: jax.tree.map(lambda leaf: 2 * leaf, a))(EXAMPLE)
    assert jax.tree.structure(doubled) == jax.tree.structure(EXAMPLE) and tree.paths(doubled) == PATHS
    gradient = jax.jit(jax.grad(lambda a: tree.norm(a) ** 2))(EXAMPLE)
    for got, leaf in zip(jax.tree.leaves(gradient), LEAVES, strict=True):
        np.testing.assert_allclose(got, 2 * leaf, rtol=1e-6)
    assert tree.paths(gradient) == PATHS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_norms_have_the_statistics_dtype_of_their_arrays_under_x64_too(dtype, x64):
    arrays = {"a": jnp.arange(1.0, 4, dtype=dtype), "b": jnp.ones((2, 2), dtype)}
    for function in (tree.norm, jax.jit(tree.norm), lambda a: tree.dot(a, a) ** 0.5):
        found = function(arrays)
        assert found.dtype == tree.statistics_dtype(dtype)
        np.testing.assert_allclose(found, np.sqrt(18.0), rtol=1e-6)


CONSTANTS = (6.0, 1e-30, 1e-10, 1e10, 1e20, 1e30)


def test_norms_of_what_a_constant_multiplies_have_zeros_where_all_is_zero():
    """XLA may write (c a)/peak as a (c/peak), which must be a number for a peak of zero too."""
    a = np.float32([[0.5, 0, 1], [-2, 0, 0], [1, 0, 0]])
    found = jax.jit(
        lambda a: [(tree.length(c * a, 0), tree.log_norm(c * a, 0), tree.norm(c * a[:, 1])) for c in CONSTANTS]
    )(a)
    for c, (length, log_norm, zero) in zip(CONSTANTS, found, strict=True):
        want = np.float32(c) * np.linalg.norm(a.astype(np.float64), axis=0)
        np.testing.assert_allclose(length, want, rtol=1e-6, err_msg=str(c))
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(log_norm, np.log(want), rtol=1e-6, err_msg=str(c))
        assert zero == 0


def test_sums_by_ranges_are_one_reduction_and_cross_devices(monkeypatch):
    """Accelerators read each array once for a norm, inside `shard_map` and below `vmap` too."""
    monkeypatch.setattr(lowering, "conditionals", lambda: False)
    a = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) * np.float32(
        [[1e-25], [1], [1e25], [1e-40]]
    )
    made = jax.make_jaxpr(lambda a: tree._lengths_by_ranges([a], None)[0])(a)
    assert [e.primitive.name for e in made.eqns if e.primitive.name.startswith("reduce")] == ["reduce"]
    wanted = np.linalg.norm(a.astype(np.float64), axis=1)[:3]  # the last is below the smallest number that CPUs keep
    np.testing.assert_allclose(jax.vmap(lambda a: tree._lengths_by_ranges([a], None)[0])(a)[:3], wanted, rtol=1e-6)
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("devices")
    over = jax.jit(
        jax.shard_map(lambda a: tree._lengths_by_ranges([a], ((1,),))[0], mesh=mesh, in_specs=spec, out_specs=spec)
    )
    np.testing.assert_allclose(over(a)[:3], wanted, rtol=1e-6)
    np.testing.assert_allclose(tree.length(a, -1, keepdims=True)[:3], wanted[:, None], rtol=1e-6)
    whole, slope = jax.value_and_grad(tree.length)(a)
    np.testing.assert_allclose([whole, tree.norm(slope)], [wanted[2], 1], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(tree.length)(jnp.zeros((2, 3))), 0)


def test_sums_by_ranges_of_what_a_constant_multiplies():
    """As accelerators take them: constants that follow one another may become one that is infinite."""
    numbers = np.float32([0.0, 1e-25, 1e-5, 1e6, np.inf])
    a = np.broadcast_to(numbers[:, None], (5, 24))
    found = jax.jit(lambda a: [tree._lengths_by_ranges([c * a], ((1,),))[0] for c in CONSTANTS])(a)
    for c, norms in zip(CONSTANTS, found, strict=True):
        wanted = np.float32(c) * numbers.astype(np.float64) * np.sqrt(24)
        wanted = np.where(wanted < 3e38, wanted, np.inf)
        np.testing.assert_allclose(norms, wanted, rtol=1e-5, atol=1e-37, err_msg=str(c))
