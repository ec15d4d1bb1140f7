"""Clipping against NumPy and optax; on stacked parameters every transformation does what it does on `serial`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax

import fnn
from fnn import tree
from fnn.training import clip
from fnn.tree import Stacked

DEPTH = 5


def clipped(transformation, updates, params=None):
    """One update, compiled: the new updates and the report."""
    state = transformation.init(updates if params is None else params)
    return jax.jit(transformation.update)(updates, state, params)


def block_layer():
    return fnn.serial(fnn.dense(8), fnn.activation("tanh"))


def nets():
    """The same net twice: its trunk as a loop and unrolled."""
    looped = fnn.serial(fnn.dense(8), fnn.repeat(block_layer(), DEPTH), fnn.dense(3))
    return looped, fnn.serial(fnn.dense(8), fnn.serial(*[block_layer()] * DEPTH), fnn.dense(3))


def stack(blocks):
    return Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *blocks))


def looped_form(params):
    """Bring a tree of the unrolled net into the form of the looped one."""
    head, trunk, tail = params
    return head, stack(trunk), tail


def random_like(shapes, seed, spread=1.0):
    """Draw every leaf from a normal of its own scale, e^±spread, so that depths differ as they do in deep nets."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: (np.exp(rng.uniform(-spread, spread)) * rng.normal(size=s.shape)).astype(np.float32), shapes
    )


LOOPED, FLAT = nets()
SPEC = jax.ShapeDtypeStruct((2, 8), jnp.float32)
SHAPES = jax.eval_shape(lambda key: FLAT.init(key, SPEC)[0], jax.random.key(0))
PARAMS, GRADS = random_like(SHAPES, 0), random_like(SHAPES, 1, spread=2.0)
NESTED_SHAPES = tuple(tuple(SHAPES[1][:2]) for _ in range(2))
NESTED_PARAMS, NESTED_GRADS = random_like(NESTED_SHAPES, 2), random_like(NESTED_SHAPES, 3, spread=2.0)


def nested_form(params):
    """Bring the tree of a `serial` of `serial`s into the form of a `repeat` of `repeat`s."""
    return stack([stack(inner) for inner in params])


CLIPS = {
    "by_value": clip.by_value(0.5),
    "from_above": clip.from_above(0.5),
    "by_global_norm": clip.by_global_norm(3.0),
    "by_block_norm": clip.by_block_norm(4.0),
    "adaptive": clip.adaptive(0.8),
}
each = pytest.mark.parametrize("name", CLIPS)


def norm64(tree):
    return math.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(tree)))


def close(a, b, rtol=1e-6, atol=1e-7):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(u, np.float64), np.asarray(v, np.float64), rtol=rtol, atol=atol)


def furthest(a, b):
    """The largest difference between two trees."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return max(np.max(np.abs(u - v)) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# Each in NumPy: gradient, weight, global norm of the gradient -> clipped gradient
def numpy_adaptive(g, w, _):
    axes = tuple(range(g.ndim - 1)) if g.ndim >= 2 else None
    limit = 0.8 * np.maximum(np.sqrt((w**2).sum(axis=axes, keepdims=True)), 1e-3)
    return g * np.minimum(1, limit / np.sqrt((g**2).sum(axis=axes, keepdims=True)))


NUMPY = {
    "by_value": lambda g, w, total: np.clip(g, -0.5, 0.5),
    "from_above": lambda g, w, total: np.minimum(g, 0.5),
    "by_global_norm": lambda g, w, total: g * min(1, 3.0 / total),
    "by_block_norm": lambda g, w, total: g * min(1, 4.0 / np.sqrt((g**2).sum())),
    "adaptive": numpy_adaptive,
}


# One form for this test and the extremes below, so that each clip compiles once for them.
FORM = {"dense": (6, 4), "conv": (3, 3, 2, 5), "bias": (7,), "scale": ()}
FORM = jax.tree.map(lambda shape: np.zeros(shape, np.float32), FORM, is_leaf=lambda node: isinstance(node, tuple))


@each
def test_equals_numpy_on_kernels_convolutions_vectors_and_scalars(name):
    w, g = random_like(FORM, 4), random_like(FORM, 5, spread=2.0)
    updates, report = clipped(CLIPS[name], g, w)
    total = norm64(g)
    wanted = jax.tree.map(lambda g, w: NUMPY[name](g.astype(float), w.astype(float), total), g, w)
    close(updates, wanted)
    np.testing.assert_allclose([report.before, report.after], [total, norm64(wanted)], rtol=1e-6)
    assert 0 < report.fraction <= 1  # something was clipped, so that the comparison says something
    if name != "by_global_norm":
        assert report.fraction < 1


def test_equals_optax():
    pairs = [
        (clip.by_global_norm(3.0), optax.clip_by_global_norm(3.0)),
        (clip.by_value(0.5), optax.clip(0.5)),
        (clip.adaptive(0.8), optax.adaptive_grad_clip(0.8)),
        (clip.adaptive(0.8, eps=2.0), optax.adaptive_grad_clip(0.8, eps=2.0)),
    ]

    @jax.jit
    def run(grads, params):
        return [[tx.update(grads, tx.init(params), params)[0] for tx in pair] for pair in pairs]

    for ours, theirs in run(GRADS[2], PARAMS[2]):
        close(ours, theirs)


@each
def test_stacked_equals_serial(name):
    transformation = CLIPS[name]
    silent = jax.tree.map(np.zeros_like, GRADS[1][3])  # one depth without gradient
    grads = (GRADS[0], (*GRADS[1][:3], silent, GRADS[1][4]), GRADS[2])
    # two depth axes, where a clip must tell depths apart
    nested = name in ("by_block_norm", "adaptive")

    @jax.jit
    def run(*pairs):
        return [transformation.update(g, transformation.init(p), p) for p, g in pairs]

    pairs = [(PARAMS, grads), (NESTED_PARAMS, NESTED_GRADS)][: 1 + nested]
    forms = [looped_form, nested_form][: 1 + nested]
    done = run(*pairs, *(tuple(map(form, pair)) for form, pair in zip(forms, pairs, strict=True)))
    for form, (flat, report), (stacked, stacked_report) in zip(
        forms, done[: len(forms)], done[len(forms) :], strict=True
    ):
        close(stacked, form(flat))
        close(stacked_report[:3], report[:3])
        assert report.fraction > 0


def test_the_trees_of_these_tests_are_those_of_the_nets():
    shapes = jax.eval_shape(lambda key: LOOPED.init(key, SPEC)[0], jax.random.key(0))
    assert tree.paths(shapes) == tree.paths(looped_form(PARAMS))
    assert jax.tree.structure(shapes) == jax.tree.structure(looped_form(PARAMS))
    assert [s.shape for s in jax.tree.leaves(shapes)] == [a.shape for a in jax.tree.leaves(looped_form(PARAMS))]
    nested = fnn.repeat(fnn.repeat(block_layer(), 2), 2)
    shapes = jax.eval_shape(lambda key: nested.init(key, SPEC)[0], jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(nested_form(NESTED_PARAMS))
    # and one norm over all depths would be another number: the blocks differ in scale
    norms = [norm64(block["kernel"]) for block, _ in GRADS[1]]
    assert max(norms) > 3 * min(norms)


@pytest.mark.usefixtures("optimised")
@each
def test_zero_stays_zero(name):
    updates, report = clipped(CLIPS[name], FORM, FORM)
    close(updates, FORM, atol=0)
    np.testing.assert_array_equal(report[:3], [0, 0, 0])


@pytest.mark.usefixtures("optimised")
@each
def test_nan_passes_through_and_is_not_counted_as_clipped(name):
    bad = jax.tree.map(lambda a: a + np.float32(0.1), FORM)
    bad["dense"][0, 0] = np.nan
    updates, report = clipped(CLIPS[name], bad, jax.tree.map(lambda a: a + np.float32(1), FORM))
    hit = np.zeros((6, 4), bool)
    hit[{"by_block_norm": ..., "by_global_norm": ..., "adaptive": (slice(None), 0)}.get(name, (0, 0))] = True
    np.testing.assert_array_equal(np.isnan(updates["dense"]), hit)
    np.testing.assert_array_equal(updates["dense"][~hit], bad["dense"][~hit])
    for other in ("conv", "bias", "scale"):
        assert np.isnan(updates[other]).all() == np.isnan(updates[other]).any() == (name == "by_global_norm")
    assert np.isnan(report.before) and np.isnan(report.after) and report.fraction == 0


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["by_global_norm", "by_block_norm", "adaptive"])
@pytest.mark.parametrize("size", [1e-30, 1e25, 2e38])
def test_norms_whose_squares_leave_float32(name, size):
    """2e38 has a subnormal reciprocal, which XLA flushes to zero: by_block_norm once let it through unclipped."""
    direction, weight = np.zeros((6, 4), np.float32), np.zeros((6, 4), np.float32)
    direction[0, 0], direction[5, 1] = 0.6, 0.8
    weight[2, 0], weight[3, 1] = 20, 15
    g, w = FORM | {"dense": np.float32(size) * direction}, FORM | {"dense": weight}
    updates, report = clipped(CLIPS[name], g, w)
    if size < 1:
        close(updates, g, rtol=0, atol=0)
        np.testing.assert_allclose(report[:3], [0, size, size], rtol=1e-6)
        return
    wanted, fraction = {
        "by_global_norm": (direction * 3, 1),
        "by_block_norm": (direction * 4, 1 / 4),  # blocks
        "adaptive": (np.sign(direction) * [20, 15, 0, 0] * 0.8, 2 / (4 + 5 + 1 + 1)),  # units
    }[name]
    close(updates, FORM | {"dense": wanted})
    np.testing.assert_allclose(report[:3], [fraction, size, np.linalg.norm(wanted)], rtol=1e-6)


def test_infinity_is_clipped_by_value_and_shown_by_norms():
    g = {"a": np.array([np.inf, -np.inf, 0.25], np.float32)}
    makers = [clip.by_value, clip.from_above, clip.by_global_norm]
    run = jax.jit(lambda g: [tx.update(g, tx.init(g)) for tx in (make(0.5) for make in makers)])
    both, above, (scaled, report) = run(g)
    np.testing.assert_array_equal(both[0]["a"], [0.5, -0.5, 0.25])
    np.testing.assert_array_equal(above[0]["a"], [0.5, -np.inf, 0.25])
    np.testing.assert_array_equal(scaled["a"], [np.nan, np.nan, 0])
    assert report.before == np.inf and report.fraction == 1
    assert np.isnan(report.after)  # as the update is


def test_traced_thresholds_under_jit_and_vmap_equal_constants():
    makers = [clip.by_value, clip.from_above, clip.by_global_norm, clip.by_block_norm, clip.adaptive]
    g = {"k": Stacked(GRADS[0]["kernel"]), "h": GRADS[0]["bias"].astype(jnp.bfloat16)}

    def run(limit):
        txs = [make(limit) for make in makers]
        return [tx.update(g, tx.init(g), g) for tx in txs]

    mapped = jax.jit(jax.vmap(run))(jnp.array([0.3, 1e6]))
    constant = jax.jit(lambda: [run(limit) for limit in (0.3, 1e6)])()
    for i, wanted in enumerate(constant):
        for (updates, report), (other, other_report) in zip(mapped, wanted, strict=True):
            assert updates["h"].dtype == other["h"].dtype == jnp.bfloat16
            # 1/256: a limit of 0.3 is rounded to bfloat16 before or after the comparison
            for name, rtol in (("k", 1e-6), ("h", 1 / 256)):
                a, b = jax.tree.leaves((updates[name], other[name]))
                np.testing.assert_allclose(np.asarray(a[i], np.float32), np.asarray(b, np.float32), rtol=rtol)
            np.testing.assert_allclose([r[i] for r in report[:3]], other_report[:3], rtol=1 / 256)


def test_what_is_not_clipped_keeps_every_bit():
    """Norms up to the limit, equal to it too: no number changes and nothing counts as clipped, on any device."""
    norms = as_jax(np.random.default_rng(0).uniform(0.1, 10, 1000), jnp.float32)
    factors = jax.jit(jax.vmap(tree.clip_factor))(norms, norms)
    np.testing.assert_array_equal(factors, 1)
    np.testing.assert_array_equal(jax.jit(tree.clip_factor)(jnp.array([jnp.nan, jnp.inf, 0.0]), 2.0), [np.nan, 0, 1])


def test_thresholds_may_be_hyperparameters_and_schedules():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    transformation = optax.inject_hyperparams(clip.by_global_norm)(max_norm=schedule)
    g = {"a": np.array([3.0, 4.0], np.float32)}
    state = transformation.init(g)
    step = jax.jit(transformation.update)
    for limit in (1.0, 0.5, 0.5):
        updates, state = step(g, state)
        np.testing.assert_allclose(updates["a"], np.array([0.6, 0.8]) * limit, rtol=1e-6)
    assert clip.reports(state)[0].after == 0.5


def test_dtypes_are_kept_and_norms_taken_in_float32():
    g = {"a": jnp.full((300, 8), 100.0, jnp.bfloat16), "b": jnp.full((300, 8), 100.0, jnp.float16)}
    run = jax.jit(lambda g: [tx.update(g, tx.init(g), g) for tx in CLIPS.values()])
    for updates, report in run(g):
        assert updates["a"].dtype == jnp.bfloat16 and updates["b"].dtype == jnp.float16
        assert report.before == pytest.approx(100 * math.sqrt(4800), rel=1e-6)  # the square is beyond float16
        assert report.after == pytest.approx(norm64(jax.tree.map(lambda u: u.astype(np.float32), updates)), rel=0.01)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize(
    "limit, kind",
    [(0.0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)],
)
def test_a_limit_must_be_a_finite_number_above_zero(name, limit, kind):
    with pytest.raises(kind, match=rf"clip\.{name}: \w+ must be a finite number above 0, got") as error:
        getattr(clip, name)(limit)
    assert str(error.value).endswith(repr(limit))


def test_adaptive_needs_an_eps_above_zero_and_the_parameters():
    with pytest.raises(ValueError, match=r"clip\.adaptive: eps must be a finite number above 0, got 0"):
        clip.adaptive(0.1, eps=0.0)
    transformation = clip.adaptive(0.1)
    with pytest.raises(
        ValueError, match=r"clip\.adaptive: needs the parameters, got None; call update\(grads, state, p"
    ):
        transformation.update(PARAMS, transformation.init(PARAMS))


def test_the_empty_tree():
    for transformation in CLIPS.values():
        updates, report = transformation.update((), transformation.init(()), ())
        assert updates == ()
        np.testing.assert_array_equal(report[:3], [0, 0, 0])
