"""Parameters chosen by their paths: masks, and freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax

import fnn
from fnn import optimizers, tree

DEPTH = 3
X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
Y = np.arange(16) % 3


def block():
    return fnn.serial(fnn.dense(4), fnn.layer_norm(), fnn.activation("tanh"))


LOOPED = fnn.serial(fnn.dense(4), fnn.repeat(block(), DEPTH, unroll=1), fnn.dense(3))
WRITTEN_OUT = fnn.serial(fnn.dense(4), fnn.serial(*[block()] * DEPTH), fnn.dense(3))
PARAMS = WRITTEN_OUT.init(jax.random.key(0), X)[0]


def looped_form(params):
    return params[0], tree.stack(params[1]), params[2]


def paths_chosen(mask):
    return {path for path, chosen in zip(tree.paths(PARAMS), jax.tree.leaves(mask(PARAMS)), strict=True) if chosen}


EVERY = set(tree.paths(PARAMS))
PATTERNS = {
    ("*/kernel",): {path for path in EVERY if path.endswith("kernel")},
    ("1/*",): {path for path in EVERY if path.startswith("1/")},
    ("1/[2]/*",): {path for path in EVERY if path.startswith("1/2/")},
    ("1/2/*",): {path for path in EVERY if path.startswith("1/2/")},
    ("1/[:]/0/*",): {f"1/{i}/0/{name}" for i in range(DEPTH) for name in ("kernel", "bias")},
    ("0/*", "*/scale"): {"0/kernel", "0/bias"} | {f"1/{i}/1/scale" for i in range(DEPTH)},
    ("1/[0-1]/?/bias",): {f"1/{i}/{j}/bias" for i in (0, 1) for j in (0, 1)},
}


@pytest.mark.parametrize("patterns", PATTERNS, ids=" ".join)
def test_a_pattern_chooses_the_same_arrays_written_out_and_in_a_loop(patterns):
    mask = optimizers.where(*patterns)
    assert paths_chosen(mask) == PATTERNS[patterns]
    tx = optax.masked(optax.scale(0.0), mask)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    wanted = looped_form(tx.update(ones, tx.init(PARAMS), PARAMS)[0])
    looped = fnn.optimizers.per_depth(tx)
    found, _ = looped.update(looped_form(ones), looped.init(looped_form(PARAMS)), looped_form(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_block_of_a_deep_stack_is_found_by_its_number():
    """Blocks 0 to 2 stand in for all, and none of them is block 11."""
    params = {"trunk": tree.Stacked({"kernel": jnp.ones((20, 2, 2))})}
    for pattern in ("trunk/[11]/*", "trunk/11/*"):
        tx = fnn.optimizers.per_depth(optax.masked(optax.scale(0.0), optimizers.where(pattern)))
        found, _ = tx.update(params, tx.init(params), params)
        assert jnp.argwhere(found["trunk"].blocks["kernel"][:, 0, 0] == 0).ravel().tolist() == [11]


def test_patterns_that_cannot_work_are_refused():
    with pytest.raises(
        ValueError, match=r"optimizers\.where: each pattern must match the path of a parameter, got '\*/weight'"
    ):
        optimizers.where("*/kernel", "*/weight")(PARAMS)
    with pytest.raises(ValueError, match=r"optimizers\.where: the blocks of repeat can be told apart only one by one"):
        optimizers.where("1/[1]/*")(looped_form(PARAMS))
    assert jax.tree.leaves(optimizers.where("1/[:]/0/kernel")(looped_form(PARAMS))).count(True) == 1
    with pytest.raises(TypeError, match=r"optimizers\.where: patterns must be strings"):
        optimizers.where()
    with pytest.raises(ValueError, match="train_step|optimizers.where: each pattern must match"):
        fnn.TrainState.create(LOOPED, optax.adamw(0.1, mask=optimizers.where("trunk/*")), jax.random.key(0), X)


def test_masked_decay_by_path():
    tx = optax.chain(optax.set_to_zero(), optax.add_decayed_weights(-0.5, optimizers.where("*/kernel")))
    state = fnn.TrainState.create(LOOPED, tx, jax.random.key(0), X)
    before = jax.device_get(jax.tree.map(jnp.copy, state.params))
    after = fnn.train_step(LOOPED, fnn.losses.cross_entropy, tx)(state, (X, Y))[0].params
    for (path, a), (_, b) in zip(tree.rows(before), tree.rows(jax.device_get(after)), strict=True):
        np.testing.assert_allclose(b, a / 2 if path.endswith("kernel") else a, rtol=1e-6)


@pytest.mark.parametrize("pattern", ["1/*", "1/[1]/*", "*/bias"])
def test_what_is_frozen_stays_and_the_rest_trains_as_if_it_were_alone(pattern):
    """Against an optimiser of the others alone, with a global norm over these."""

    def make():
        return optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05))

    frozen = paths_chosen(optimizers.where(pattern))
    rng = np.random.default_rng(1)
    grads = [jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), PARAMS) for _ in range(3)]

    def flat(node):
        return {path: a for path, a in zip(tree.paths(node), jax.tree.leaves(node), strict=True) if path not in frozen}

    alone, tx = flat(PARAMS), make()
    state, update = tx.init(alone), jax.jit(tx.update)
    for g in grads:
        updates, state = update(flat(g), state, alone)
        alone = optax.apply_updates(alone, updates)
    for form in (lambda node: node, looped_form):
        params, tx = form(PARAMS), fnn.optimizers.per_depth(optimizers.freeze(make(), pattern))
        state, update = tx.init(params), jax.jit(tx.update)
        for g in grads:
            updates, state = update(form(g), state, params)
            params = optax.apply_updates(params, updates)
        found = {path.replace("[", "").replace("]", ""): a for path, a in tree.rows(jax.device_get(params))}
        for path, start in zip(tree.paths(PARAMS), jax.tree.leaves(PARAMS), strict=True):
            if path in frozen:
                np.testing.assert_array_equal(found[path], start)
            else:
                np.testing.assert_allclose(found[path], alone[path], rtol=1e-5, atol=1e-6)


def test_a_line_search_over_the_head_alone():
    tx = optimizers.freeze(optax.lbfgs(), "0/*", "1/*")
    state = fnn.TrainState.create(LOOPED, tx, jax.random.key(0), X)
    start, step = jax.device_get(jax.tree.map(jnp.copy, state.params)), fnn.train_step(LOOPED, fnn.losses.mse, tx)
    targets = np.random.default_rng(2).normal(size=(16, 3)).astype(np.float32)
    for _ in range(40):
        state, metrics = step(state, (X, targets))
    jax.tree.map(np.testing.assert_array_equal, state.params[:2], start[:2])
    features = fnn.serial(*[fnn.dense(4), fnn.repeat(block(), DEPTH)]).apply(start[:2], state.net_state[:2], X)[0]
    design = np.concatenate([features, np.ones((16, 1))], axis=1).astype(np.float64)
    best = np.linalg.lstsq(design, targets, rcond=None)[0]
    least = fnn.losses.mse(as_jax(design @ best), targets).mean()
    assert float(metrics["loss"]) == pytest.approx(float(least), rel=1e-4)
