"""Optimisers meet depth: a loop over blocks, blocks written out, small arrays packed, reports of clips."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import fnn
from fnn import tree
from fnn.training import clip
from fnn.tree import Stacked

DEPTH, STEPS = 4, 10


def masked(choose):
    return optax.adamw(1e-2, weight_decay=0.5, mask=lambda params: jax.tree.map(choose, params))


def by_path(word):
    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda k, _: word in jax.tree_util.keystr(k), params)

    return optax.adamw(1e-2, weight_decay=0.5, mask=mask)


def by_order(params):
    """Freeze the first 16 arrays, however they are grouped."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten("frozen" if i < 16 else "trained" for i in range(len(leaves)))


def labelled(labels):
    return optax.multi_transform({"trained": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels)


def freeze_block(params):
    def label(path, _):
        return "frozen" if path[0].idx == 1 and path[1].idx == 3 else "trained"

    return jax.tree_util.tree_map_with_path(label, params)


def below_mean_norm():
    """An optimiser of one's own: no array takes more than the mean over all arrays of their norms."""

    def update(updates, state, params=None):
        norms = jax.tree.map(jnp.linalg.norm, updates)
        mean = sum(jax.tree.leaves(norms)) / len(jax.tree.leaves(norms))
        return jax.tree.map(lambda u, n: -0.1 * u / jnp.maximum(1, n / mean), updates, norms), state

    return optax.GradientTransformation(lambda params: (), update)


def by_equal_path(params):
    wanted = jax.tree_util.SequenceKey(3)
    return jax.tree_util.tree_map_with_path(lambda path, _: wanted in path, params)


def rates_in_a_conditional():
    """An optimiser of one's own: a rate for each array, held by a jitted function inside of a conditional."""

    def update(updates, state, params=None):
        def one(path, u):
            rate = jnp.float32(0.1 * 0.9 ** sum(getattr(key, "idx", 0) for key in path))
            return jax.lax.cond(state > 0, jax.jit(lambda u: -rate * u), lambda u: u, u)

        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(lambda params: jnp.ones(()), update)


OPTIMIZERS = {
    "adamw_by_equal_path": optax.adamw(1e-2, weight_decay=0.5, mask=by_equal_path),
    "rates_in_a_conditional": rates_in_a_conditional(),
    "adam_on_the_head": optax.masked(
        optax.adam(1e-2), lambda params: (True, jax.tree.map(lambda _: False, params[1]), True)
    ),
    "joined": optax.flatten(optax.adam(1e-2)),
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(1e-2),
    "adamw_by_shape": masked(lambda a: a.ndim > 1),
    "adamw_by_path": by_path("kernel"),
    "adamw_in_one_block": by_path("[3]"),
    "labels_by_shape": labelled(lambda p: jax.tree.map(lambda a: "trained" if a.ndim > 1 else "frozen", p)),
    "labels_of_one_block": labelled(freeze_block),
    "labels_by_order": labelled(by_order),
    "muon": contrib.muon(0.01),
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
    "lars": optax.lars(0.1, trust_coefficient=0.5),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "galore": contrib.galore(1e-2, 2),
    "sm3": optax.sm3(0.1),
    "novograd": optax.novograd(1e-2),
    "global_norms": optax.chain(optax.clip_by_global_norm(0.3), clip.by_global_norm(0.2), optax.adam(1e-2)),
    "block_norms": optax.chain(clip.by_block_norm(0.2), clip.adaptive(0.1), optax.sgd(0.1)),
    "values": optax.chain(clip.by_value(0.05), optax.clip_by_block_rms(0.04), optax.sgd(0.1)),
    "prodigy": contrib.prodigy(1.0),
    "schedule_free": contrib.schedule_free_adamw(1e-2),
    "polyak": optax.polyak_sgd(),
    "multi_steps": optax.MultiSteps(optax.chain(clip.by_global_norm(0.1), optax.lamb(1e-2)), 2),
    "apply_if_finite": optax.apply_if_finite(optax.chain(clip.by_global_norm(0.1), optax.adam(1e-2)), 3),
    "hyperparameters": optax.inject_hyperparams(optax.lamb)(1e-2),
    "mean_of_norms": below_mean_norm(),
}


def block():
    return fnn.serial(fnn.dense(6), fnn.layer_norm(), fnn.activation("tanh"))


def nets():
    """One net twice: as a loop and written out."""
    looped = fnn.serial(fnn.dense(6), fnn.repeat(block(), DEPTH), fnn.dense(3))
    return looped, fnn.serial(fnn.dense(6), fnn.serial(*[block()] * DEPTH), fnn.dense(3))


LOOPED, WRITTEN_OUT = nets()
SPEC = jax.ShapeDtypeStruct((2, 6), jnp.float32)
SHAPES = jax.eval_shape(lambda key: WRITTEN_OUT.init(key, SPEC)[0], jax.random.key(0))


def random_like(shapes, seed):
    """Draw every array from a normal of its own scale, so that blocks differ as they do in deep nets."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: (np.exp(rng.uniform(-2, 2)) * 0.1 * rng.normal(size=s.shape)).astype(np.float32), shapes
    )


def looped_form(params):
    head, trunk, tail = params
    return head, Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *trunk)), tail


PARAMS = random_like(SHAPES, 0)
GRADS = jax.tree.map(lambda *leaves: np.stack(leaves), *[random_like(SHAPES, seed) for seed in range(1, STEPS + 1)])
STACKED_GRADS = (*GRADS[:1], jax.tree.map(lambda a: a.swapaxes(0, 1), looped_form(GRADS)[1]), *GRADS[2:])


def trained(tx, params, grads):
    """Parameters after a step with each of the gradients, which lie on a leading axis."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params, grads):
        def step(carry, grad):
            params, state = carry
            updates, state = tx.update(grad, state, params, value=jnp.float32(2.0), grad=grad)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    return jax.device_get(run(params, grads))


def furthest(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return max(np.max(np.abs(u - v)) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_depth_as_a_loop_trains_as_depth_written_out(name):
    wanted = looped_form(trained(OPTIMIZERS[name], PARAMS, GRADS))
    found = trained(fnn.optimizers.per_depth(OPTIMIZERS[name]), looped_form(PARAMS), STACKED_GRADS)
    size = max(np.max(np.abs(a)) for a in jax.tree.leaves(wanted))
    assert furthest(found, wanted) < 5e-6 * max(1, size)
    moved = furthest(wanted, looped_form(PARAMS))
    assert moved > 1e-6 if name == "prodigy" else moved > 1e-3


def test_the_trees_of_these_tests_are_those_of_the_nets():
    shapes = jax.eval_shape(lambda key: LOOPED.init(key, SPEC)[0], jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(looped_form(PARAMS))
    assert [s.shape for s in jax.tree.leaves(shapes)] == [a.shape for a in jax.tree.leaves(looped_form(PARAMS))]


@pytest.mark.usefixtures("x64")  # Adam turns rounding of the smallest gradients into steps
@pytest.mark.parametrize("tx", [masked(lambda a: a.ndim > 1), contrib.muon(0.01)], ids=["decay", "muon"])
def test_a_loop_and_layers_written_out_train_alike_by_the_train_step(tx):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)))
    batch = x, jnp.arange(8) % 3
    ends = []
    for unroll in (True, 1):
        net = fnn.models.mlp(DEPTH + 1, 6, 3, activation="tanh", norm="layer_norm", unroll=unroll)
        state = fnn.TrainState.create(net, tx, jax.random.key(0), x)
        step = fnn.train_step(net, fnn.losses.cross_entropy, tx)
        for _ in range(10):
            state, _ = step(state, batch)
        rows = tree.rows(jax.device_get(state.params))
        ends.append({path.replace("[", "").replace("]", ""): a for path, a in rows})
    assert ends[0].keys() == ends[1].keys()
    for path, a in ends[0].items():
        np.testing.assert_allclose(ends[1][path], a, atol=1e-10)


def test_nested_stacks():
    shapes = tuple(tuple(SHAPES[1][:2]) for _ in range(3))

    def form(params):
        inner = [Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)) for blocks in params]
        return Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *inner))

    params, grads = random_like(shapes, 0), random_like(shapes, 1)
    for name in ("lars", "global_norms"):
        tx = OPTIMIZERS[name]
        run = jax.jit(lambda p, g, tx=tx: tx.update(g, tx.init(p), p)[0])
        stacked = jax.jit(
            lambda p, g, tx=tx: fnn.optimizers.per_depth(tx).update(g, fnn.optimizers.per_depth(tx).init(p), p)[0]
        )
        wanted, found = form(jax.device_get(run(params, grads))), stacked(form(params), form(grads))
        assert furthest(jax.device_get(found), wanted) < 1e-6


def test_a_state_that_differs_from_block_to_block_is_kept_apart_and_stays_so():
    tx = fnn.optimizers.per_depth(OPTIMIZERS["labels_of_one_block"])
    params = looped_form(PARAMS)
    state, (_, after) = jax.eval_shape(lambda p: (tx.init(p), tx.update(p, tx.init(p), p)), params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    mu = state.inner_states["trained"].inner_state[0].mu
    assert len(jax.tree.leaves(mu)) == len(jax.tree.leaves(PARAMS)) - 4
    alike = jax.eval_shape(fnn.optimizers.per_depth(OPTIMIZERS["adam"]).init, params)[0].mu
    assert jax.tree.structure(alike) == jax.tree.structure(params)


def test_a_program_of_any_depth_is_that_of_one_block():
    """Elementwise, by arrays, by global norm: no operation per block."""
    for name in ("adamw_by_shape", "muon", "lamb", "global_norms", "block_norms", "apply_if_finite"):
        tx, counts = fnn.optimizers.per_depth(OPTIMIZERS[name]), []
        for depth in (70, 300):
            params = {"trunk": Stacked({"kernel": jnp.ones((depth, 4, 4)), "bias": jnp.ones((depth, 4))})}
            traced = jax.make_jaxpr(lambda p, tx=tx: tx.update(p, tx.init(p), p))(params)
            counts.append(len(traced.jaxpr.eqns))
        assert counts[0] == counts[1]


def test_what_goes_block_by_block_says_so_above_64():
    params = Stacked({"kernel": np.ones((70, 2, 2), np.float32)})
    tx = fnn.optimizers.per_depth(by_path("[3]"))
    update = lambda params: jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)  # noqa: E731
    with pytest.warns(UserWarning, match="per_depth: the optimiser (asks which|runs block by block)"):
        update(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(jax.tree.map(lambda a: a[:20], params))


def test_per_depth_twice_is_once_and_without_stacks_nothing():
    tx = fnn.optimizers.per_depth(optax.lamb(0.1))
    assert fnn.optimizers.per_depth(tx) is tx
    head = PARAMS[0]
    text = [jax.jit(t.update).lower(head, t.init(head), head).as_text() for t in (optax.lamb(0.1), tx)]
    assert text[0].splitlines()[3:] == text[1].splitlines()[3:]


def test_extra_arguments_and_missing_params_pass_through():
    def update(updates, state, params=None, *, value, **extra):
        assert params is None and not extra
        return jax.tree.map(lambda u: value * u, updates), jax.tree.map(lambda s: s + 1, state)

    tx = fnn.optimizers.per_depth(optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update))
    grads = looped_form(PARAMS)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), value=3.0)
    assert state == 1
    assert furthest(jax.device_get(updates), jax.tree.map(lambda g: 3 * g, grads)) < 1e-6
    # a stack without arrays (a block of activations) stays what it is
    empty = ({"a": np.ones(2, np.float32)}, Stacked(()))
    updates, _ = tx.update(empty, tx.init(empty), value=2.0)
    assert furthest(jax.device_get(updates), ({"a": np.full(2, 2.0)}, Stacked(()))) == 0


def test_a_mask_given_as_a_tree_is_refused():
    params = looped_form(PARAMS)
    tx = fnn.optimizers.per_depth(optax.adamw(1e-2, mask=jax.tree.map(lambda a: a.ndim > 1, params)))
    with pytest.raises(ValueError, match="per_depth: masks and labels must be functions of the parameters"):
        tx.init(params)


MIXED = {
    "wide": np.linspace(-1, 1, 200 * 100, dtype=np.float32).reshape(200, 100),
    "stack": Stacked(np.linspace(0.5, 2, 12, dtype=np.float32).reshape(3, 4)),
    "half": np.linspace(-2, 1, 10).astype(jnp.bfloat16),
    "one": np.float32(3),
}
"""One large array among small ones, of two dtypes."""


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(clip.by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)),
        optax.chain(clip.by_value(0.3), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)), 2),
    ],
    ids=["adamw", "momentum", "multi_steps"],
)
def test_packed_changes_no_number_and_packs_all_small_arrays(tx):
    params = (
        MIXED if isinstance(tx, optax.GradientTransformationExtraArgs) else {**MIXED, "half": np.ones(10, np.float32)}
    )
    grads = jax.tree.map(lambda w: np.stack([np.asarray(c * w + 0.2, w.dtype) for c in (1, -0.5, 2)]), params)
    plain, packed = (trained(t, params, grads) for t in (tx, fnn.optimizers.packed(tx)))
    assert jax.tree.structure(plain) == jax.tree.structure(packed)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(packed), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(b, np.float64), np.asarray(a, np.float64), rtol=tolerance, atol=1e-7)
    shapes = {leaf.shape for leaf in jax.tree.leaves(fnn.optimizers.packed(tx).init(MIXED)) if jnp.ndim(leaf)}
    assert shapes == {(200, 100), (13,), (10,)}  # the large array; float32 numbers; bfloat16 numbers


def test_packed_passes_extra_arguments_and_works_without_params():
    seen = {}

    def update(updates, state, params=None, *, value, grad):
        seen.update(params=params, value=value, grad=grad)
        return updates, state

    tx = fnn.optimizers.packed(optax.GradientTransformationExtraArgs(lambda params: (), update))
    g = {"a": jnp.ones((2, 2)), "b": jnp.zeros(3)}
    updates, _ = tx.update(g, tx.init(g), value=jnp.float32(7), grad=g)
    assert jax.tree.map(jnp.shape, updates) == {"a": (2, 2), "b": (3,)}
    assert seen["params"] is None and seen["value"] == 7
    np.testing.assert_array_equal(seen["grad"][0], [1, 1, 1, 1, 0, 0, 0])


APART = ["adamw_by_shape", "adamw_by_path", "labels_by_shape", "labels_of_one_block", "labels_by_order", "muon", "lamb"]
APART += ["lars", "adafactor", "sm3", "block_norms", "values", "mean_of_norms", "adam_on_the_head"]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("form", [lambda p: p, looped_form], ids=["written_out", "looped"])
def test_packed_refuses_what_tells_arrays_apart(name, form):
    tx, params = fnn.optimizers.packed(OPTIMIZERS[name]), form(PARAMS)
    with pytest.raises(ValueError, match="packed: the optimiser must treat all arrays alike, got"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def test_packed_refuses_a_mask_that_takes_all_arrays_until_they_are_packed():
    kernels = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 5))}
    tx = fnn.optimizers.packed(masked(lambda a: a.ndim > 1))
    with pytest.raises(ValueError, match="tells them apart by their shapes"):
        tx.update(kernels, tx.init(kernels), kernels)


def noise():
    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u + jax.random.normal(jax.random.key(0), u.shape), updates), state

    return optax.GradientTransformation(lambda params: (), update)


def sizes_in_the_state():
    def init(params):
        return jax.tree.map(lambda a: jnp.float32(a.size), params)

    return optax.GradientTransformation(init, lambda u, s, p=None: (jax.tree.map(lambda u, s: u / s, u, s), s))


@pytest.mark.parametrize(
    "tx", [noise(), sizes_in_the_state(), masked(lambda a: a.ndim > 0)], ids=["noise", "init", "scalars"]
)
def test_packed_refuses_what_depends_on_the_shapes_of_arrays(tx):
    params = {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(())}
    with pytest.raises(ValueError, match="packed: the optimiser must treat all arrays alike"):
        fnn.optimizers.packed(tx).update(params, fnn.optimizers.packed(tx).init(params), params)


def test_packed_inside_of_a_chain_is_right_on_stacks():
    tx = optax.chain(clip.by_block_norm(0.2), fnn.optimizers.packed(optax.adam(1e-2)))
    wanted = looped_form(trained(optax.chain(clip.by_block_norm(0.2), optax.adam(1e-2)), PARAMS, GRADS))
    assert furthest(trained(fnn.optimizers.per_depth(tx), looped_form(PARAMS), STACKED_GRADS), wanted) < 1e-5


def steps_of(tx, targets, batch=8):
    """Metrics of steps of a linear net on targets of several sizes; a NaN target makes the gradient NaN."""
    net = fnn.serial(fnn.dense(5), fnn.dense(2))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, 4)), jnp.float32)
    state = fnn.TrainState.create(net, tx, jax.random.key(0), x)
    step = fnn.train_step(net, lambda y, t: jnp.sum((y - t) ** 2, axis=1), tx)
    found, grads = [], []

    @jax.jit
    @jax.grad
    def gradient(p, t, s=state.net_state):
        return jnp.mean(jnp.sum((net.apply(p, s, x)[0] - t) ** 2, axis=1))

    for target in targets:
        t = np.full((batch, 2), target, np.float32)
        grads.append(jax.device_get(gradient(state.params, t)))
        state, metrics = step(state, (x, t))
        found.append(jax.device_get(metrics))
    return found, grads


def norm64(tree):
    return math.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(tree)))


def scaled(node, limit):
    norm = norm64(node)
    return jax.tree.map(lambda a: a * min(1, limit / norm), node)


def test_clip_reports_of_parts_are_over_all_arrays():
    """masked, multi_transform, and both in a row, against the arrays clipped by hand."""

    def kernels(params):
        return jax.tree.map(lambda a: a.ndim > 1, params)

    def labels(params):
        return jax.tree.map(lambda a: "k" if a.ndim > 1 else "b", params)

    def parts(g):
        return [g[0]["kernel"], g[1]["kernel"]], [g[0]["bias"], g[1]["bias"]]

    one, other = clip.by_global_norm(0.01), clip.by_global_norm(0.3)
    cases = {
        "masked": (optax.masked(one, kernels), lambda k, b: (scaled(k, 0.01), b)),
        "multi": (
            optax.multi_transform({"k": one, "b": other}, labels),
            lambda k, b: (scaled(k, 0.01), scaled(b, 0.3)),
        ),
        "part_then_all": (
            optax.chain(optax.masked(one, kernels), other),
            lambda k, b: scaled((scaled(k, 0.01), b), 0.3),
        ),
        "all_then_part": (
            optax.chain(other, optax.masked(one, kernels)),
            lambda k, b: (lambda both: (scaled(both[0], 0.01), both[1]))(scaled((k, b), 0.3)),
        ),
        "packed": (fnn.optimizers.packed(one), lambda k, b: scaled((k, b), 0.01)),
    }
    for tx, by_hand in cases.values():
        (metrics,), (g,) = steps_of(optax.chain(tx, optax.sgd(0.1)), [3.0])
        before, after = norm64(g), norm64(by_hand(*parts(g)))
        np.testing.assert_allclose(metrics["grad_norm"], before, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm_clipped"], after, rtol=1e-4)
        np.testing.assert_allclose(metrics["clip_removed"], 1 - after / before, rtol=1e-4)
        assert 0 < metrics["clip_fraction"] <= 1


def test_a_zero_gradient_has_nothing_removed():
    net = fnn.dense(2)
    x = jnp.ones((4, 3))
    tx = optax.chain(clip.by_global_norm(1.0), optax.sgd(0.1))
    state = fnn.TrainState.create(net, tx, jax.random.key(0), x)
    _, metrics = fnn.train_step(net, lambda y, t: 0 * y[:, 0], tx)(state, (x, jnp.zeros(4)))
    assert metrics["clip_removed"] == 0 and metrics["grad_norm_clipped"] == 0


@pytest.mark.parametrize("stacked", [False, True])
def test_skipped_and_accumulating_steps_report_nan(stacked):
    inner = optax.chain(clip.by_global_norm(0.5), optax.sgd(0.01))
    wrap = fnn.optimizers.per_depth if stacked else (lambda tx: tx)
    found, _ = steps_of(wrap(optax.MultiSteps(inner, 3)), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert [bool(np.isnan(m["clip_removed"])) for m in found] == [True, True, False] * 2
    assert [bool(np.isnan(m["grad_norm_clipped"])) for m in found] == [True, True, False] * 2
    found, _ = steps_of(wrap(optax.apply_if_finite(inner, 5)), [1.0, np.nan, 2.0])
    assert [bool(np.isnan(m["clip_removed"])) for m in found] == [False, True, False]
    assert found[2]["grad_norm_clipped"] == pytest.approx(0.5)


def test_history_averages_over_the_reports_that_there_are():
    train = {"clip_removed": np.array([np.nan, 0.5, np.nan, 0.7]), "loss": np.array([1.0, np.nan, 2.0, 4.0])}
    history = fnn.History(train, {}, (2, 2), None, False)
    np.testing.assert_array_equal(history.by_epoch("clip_removed"), [0.5, 0.7])
    np.testing.assert_array_equal(history.by_epoch("loss"), [np.nan, 3.0])  # a loss that is NaN stays visible


def test_an_infinite_gradient_has_no_norm_after_clipping():
    g = {"a": jnp.array([jnp.inf, 1.0])}
    tx = clip.by_global_norm(1.0)
    updates, report = tx.update(g, tx.init(g))
    assert jnp.isnan(updates["a"][0]) and jnp.isnan(report.after) and report.before == jnp.inf
