"""Optimisers meet depth: a loop over blocks, and blocks written out.

Those of optax are in `test_optax_table.py`; here are masks, labels, chains, and optimisers of one's own.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax
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
    """Freeze the first 9 arrays, however they are grouped."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten("frozen" if i < 9 else "trained" for i in range(len(leaves)))


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
    "sm3": optax.sm3(0.1),
    "global_norms": optax.chain(optax.clip_by_global_norm(0.3), clip.by_global_norm(0.2), optax.adam(1e-2)),
    "block_norms": optax.chain(clip.by_block_norm(0.2), clip.adaptive(0.1), optax.sgd(0.1)),
    "values": optax.chain(clip.by_value(0.05), optax.clip_by_block_rms(0.04), optax.sgd(0.1)),
    "multi_steps": optax.MultiSteps(optax.chain(clip.by_global_norm(0.1), optax.lamb(1e-2)), 2),
    "apply_if_finite": optax.apply_if_finite(optax.chain(clip.by_global_norm(0.1), optax.adam(1e-2)), 3),
    "mean_of_norms": below_mean_norm(),
}


def block():
    return fnn.serial(fnn.dense(6), fnn.activation("tanh"))


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


IN_THE_TABLE = ("lamb", "lars", "sm3")
"""Those that test_optax_table has too, on fewer and smaller arrays."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in IN_THE_TABLE)) for n in OPTIMIZERS])
def test_depth_as_a_loop_trains_as_depth_written_out(name):
    wanted = looped_form(trained(OPTIMIZERS[name], PARAMS, GRADS))
    found = trained(fnn.optimizers.per_depth(OPTIMIZERS[name]), looped_form(PARAMS), STACKED_GRADS)
    size = max(np.max(np.abs(a)) for a in jax.tree.leaves(wanted))
    assert furthest(found, wanted) < 5e-6 * max(1, size)
    moved = furthest(wanted, looped_form(PARAMS))
    assert moved > 1e-3


def test_the_trees_of_these_tests_are_those_of_the_nets():
    shapes = jax.eval_shape(lambda key: LOOPED.init(key, SPEC)[0], jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(looped_form(PARAMS))
    assert [s.shape for s in jax.tree.leaves(shapes)] == [a.shape for a in jax.tree.leaves(looped_form(PARAMS))]


@pytest.mark.usefixtures("x64")  # Adam turns rounding of the smallest gradients into steps
@pytest.mark.parametrize("tx", [masked(lambda a: a.ndim > 1), contrib.muon(0.01)], ids=["decay", "muon"])
def test_a_loop_and_layers_written_out_train_alike_by_the_train_step(tx):
    x = as_jax(np.random.default_rng(0).normal(size=(8, 6)))
    batch = x, jnp.arange(8) % 3
    ends = []
    for unroll in (True, 1):
        net = fnn.models.mlp(3, 6, 3, activation="tanh", unroll=unroll)
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
    shapes = tuple(SHAPES[1][:2] for _ in range(3))

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
    assert len(jax.tree.leaves(mu)) == len(jax.tree.leaves(PARAMS)) - 2
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


def test_what_takes_the_loss_again_says_so_above_16_and_stacked_compiles_as_one_block():
    params = Stacked({"kernel": np.ones((20, 2, 2), np.float32)})

    def update(wrap):
        def loss(p):
            return sum(jnp.sum(a**2) for a in jax.tree.leaves(p))

        tx = wrap(optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)))
        extra = {"value": loss(params), "grad": params, "value_fn": loss}
        return jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p, **extra)[0])(params)

    with pytest.warns(
        UserWarning, match="takes the loss again: right, but slow to compile; use fnn.optimizers.stacked"
    ):
        apart = update(fnn.optimizers.per_depth)
    assert len(apart.jaxpr.eqns) > 5 * len(update(fnn.optimizers.stacked).jaxpr.eqns)


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
