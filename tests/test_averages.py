"""Parameters to evaluate at that are not those that are trained: averages, slow weights, schedule-free ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import fnn
from fnn import optimizers

X = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
Y = np.arange(32) % 3
NET = fnn.serial(fnn.dense(4), fnn.repeat(fnn.serial(fnn.dense(4), fnn.activation("tanh")), 3, unroll=1), fnn.dense(3))
LOSS = fnn.losses.cross_entropy


def trained(tx, steps=4, net=NET):
    """The states before and after each of some steps, as arrays of NumPy."""
    state, step = fnn.TrainState.create(net, tx, jax.random.key(0), X), fnn.train_step(net, LOSS, tx, metrics=("loss",))
    states = [jax.device_get(jax.tree.map(jnp.copy, state))]
    for _ in range(steps):
        state, _ = step(state, (X, Y))
        states.append(jax.device_get(jax.tree.map(jnp.copy, state)))
    return states


def close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=rtol, atol=atol)


def test_the_average_is_that_of_the_parameters_and_training_is_unchanged():
    decay = 0.7
    states = trained(optimizers.averaged(optax.adam(0.05), decay))
    plain = trained(optax.adam(0.05))
    for averaged, alone in zip(states, plain, strict=True):
        close(averaged.params, alone.params, rtol=0, atol=0)
    close(optimizers.eval_params(states[0]), states[0].params, rtol=0, atol=0)
    for n in range(1, 5):
        weights = np.array([decay ** (n - k) for k in range(1, n + 1)])
        every = [jax.tree.leaves(state.params) for state in states[1 : n + 1]]
        wanted = [
            np.tensordot(weights / weights.sum(), np.stack(a).astype(np.float64), 1) for a in zip(*every, strict=True)
        ]
        close(jax.tree.leaves(optimizers.eval_params(states[n])), wanted)


@pytest.mark.parametrize("reset", [False, True])
def test_lookahead_is_that_of_optax(reset):
    tx = optax.lookahead(optax.adam(0.05), 3, 0.4, reset)
    states = trained(optimizers.lookahead(optax.adam(0.05), 3, 0.4, reset), steps=7)

    @jax.jit
    def by_hand(both, state):
        grads = jax.jit(jax.grad(lambda p: jnp.mean(LOSS(NET.apply(p, start.net_state, X)[0], Y))))(both.fast)
        updates, state = tx.update(grads, state, both)
        return optax.apply_updates(both, updates), state

    start = states[0]
    both = optax.LookaheadParams.init_synced(start.params)
    state = tx.init(both)
    for found in states[1:]:
        both, state = by_hand(both, state)
        close(found.params, both.fast)
        close(optimizers.eval_params(found), both.slow)


def test_schedule_free_is_evaluated_where_optax_says():
    tx = optax.chain(optax.clip_by_global_norm(1.0), contrib.schedule_free_adamw(0.05))
    state = trained(tx)[-1]
    wanted = contrib.schedule_free_eval_params(state.opt_state[1], state.params)
    close(optimizers.eval_params(state), wanted, rtol=0, atol=0)
    assert max(np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (wanted, state.params)), strict=True)) > 1e-3


def test_fit_validates_at_the_averages_and_keeps_the_best_of_them():
    tx = optimizers.averaged(optax.sgd(0.5), 0.9)
    state, step = fnn.TrainState.create(NET, tx, jax.random.key(0), X), fnn.train_step(NET, LOSS, tx)
    options = {"epochs": 3, "key": jax.random.key(1), "batch_size": 8, "validation": (X, Y), "progress": False}
    end, history = fnn.fit(step, state, (X, Y), evaluate_with=optimizers.eval_params, **options)
    scores = fnn.evaluate(NET, (optimizers.eval_params(end), end.net_state), (X, Y))
    assert history.validation["loss"][-1] == pytest.approx(scores["loss"], rel=1e-6)
    with pytest.warns(UserWarning, match="evaluate: the optimiser keeps other parameters to evaluate at"):
        assert abs(scores["loss"] - fnn.evaluate(NET, end, (X, Y))["loss"]) > 1e-3
    with pytest.warns(UserWarning, match="fit: the optimiser keeps other parameters to evaluate at"):
        fnn.fit(step, state, (X, Y), **options)
    with pytest.raises(ValueError, match=r"optimizers\.eval_params: the optimiser must keep parameters to evaluate at"):
        optimizers.eval_params(fnn.TrainState.create(NET, optax.sgd(0.1), jax.random.key(0), X))


def test_averages_of_a_part_leave_the_rest_as_it_is():
    tx = optimizers.freeze(optimizers.averaged(optax.sgd(0.5), 0.5), "1/*")
    state = trained(tx)[-1]
    found = optimizers.eval_params(state)
    close(found[1], state.params[1], rtol=0, atol=0)
    close(found[0], jax.tree.map(lambda m: m / state.opt_state.weight, state.opt_state.mean[0]))


def test_an_average_inside_of_accumulation_counts_steps_of_the_optimiser():
    every = trained(optax.MultiSteps(optimizers.averaged(optax.sgd(0.5), 0.5), 2), steps=4)
    a, b = (every[i].params for i in (2, 4))
    close(optimizers.eval_params(every[4]), jax.tree.map(lambda a, b: (a + 2 * b) / 3, a, b))


def test_what_optax_does_with_two_sets_of_parameters_is_refused_with_the_way_out():
    for tx, way in (
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), r"LookaheadState.*pass fnn\.optimizers\.lookahead"),
        (contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), "SAMState.*pass opaque_mode=True"),
    ):
        with pytest.raises(ValueError, match=f"the optimizer must keep one set of parameters, got {way}"):
            fnn.TrainState.create(NET, tx, jax.random.key(0), X)


def test_a_step_goes_on_from_the_slow_parameters():
    """`eval_params` returns arrays of its own: a state that held its optimiser's would be donated twice."""
    optimizer = fnn.optimizers.lookahead(optax.adam(1e-2), 3, 0.5)
    net, batch = fnn.dense(3), (np.ones((2, 4), np.float32), np.ones((2, 3), np.float32))
    step = fnn.train_step(net, fnn.losses.mse, optimizer)
    state, _ = step(fnn.TrainState.create(net, optimizer, jax.random.key(0), batch[0]), batch)
    state, _ = step(state.replace(params=fnn.optimizers.eval_params(state)), batch)
    assert int(state.step) == 2
    twice = state.replace(params=state.opt_state.slow)
    with pytest.raises(ValueError, match="^train_step: each array of the state must be in one place, got one in two"):
        step(twice, batch)
    step(jax.tree.map(jnp.copy, twice), batch)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_that_stay_are_their_own_average(dtype):
    """1 - decay times a small number is no number of float16."""
    params = jnp.asarray([0.0003, 0.003, 0.3, 1.0], dtype)
    tx = optimizers.averaged(optax.sgd(0.0), 0.9999)
    _, state = jax.jit(tx.update)(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(state.mean / state.weight, np.asarray(params, np.float64), rtol=1e-4)


@pytest.mark.parametrize(
    "keeping",
    [
        lambda tx: optimizers.averaged(tx, 0.7),
        lambda tx: optimizers.lookahead(tx, 3, 0.4),
        lambda tx: contrib.schedule_free(tx, 0.05, b1=0.9),
    ],
    ids=["averaged", "lookahead", "schedule_free"],
)
@pytest.mark.parametrize(
    "net", [NET, fnn.serial(fnn.dense(200), fnn.dense(100), fnn.dense(3))], ids=["repeat", "large"]
)
def test_what_is_kept_inside_of_packed_is_unpacked(keeping, net):
    """`dense(100)` of 200 units is large and keeps its place before the small ones."""
    inside, outside = optimizers.packed(keeping(optax.sgd(0.05))), keeping(optimizers.packed(optax.sgd(0.05)))
    a, b = (trained(tx, net=net) for tx in (inside, outside))
    for found, wanted in zip(a, b, strict=True):
        close(optimizers.eval_params(found), optimizers.eval_params(wanted))
    moved = zip(*map(jax.tree.leaves, (optimizers.eval_params(a[-1]), a[-1].params)), strict=True)
    assert max(np.max(np.abs(u - v)) for u, v in moved) > 1e-4


def test_packed_averages_of_two_dtypes_are_unpacked():
    """Averages are float32 whatever is averaged; vectors are joined by the parameters' dtypes."""
    params = [jnp.ones(3, jnp.bfloat16), jnp.full((2, 2), 2.0), jnp.full(5, 3, jnp.bfloat16)]
    tx = optimizers.packed(optimizers.averaged(optax.sgd(0.0), 0.5))
    _, state = tx.update(params, tx.init(params), params)
    found = optimizers.eval_params(fnn.TrainState(params, (), state, jnp.int32(1), jax.random.key(0)))
    assert [a.dtype for a in found] == [a.dtype for a in params]
    close(found, params, rtol=0, atol=0)


def test_packed_averages_of_some_parameters_are_refused_before_training():
    tx, net = optimizers.packed(optimizers.averaged(optax.sgd(0.5), 0.5)), fnn.serial(fnn.dense(4), fnn.dense(3))
    with pytest.raises(
        ValueError, match="^packed: an optimiser that keeps other parameters to evaluate at must see all"
    ):
        fnn.TrainState.create(net, optimizers.freeze(tx, "0/*"), jax.random.key(0), X)
    trained(optimizers.freeze(optimizers.packed(optax.sgd(0.5)), "0/*"), steps=1, net=net)
    # Blocks of `repeat` are shown one by one there, and nothing is packed.
    state = trained(optimizers.freeze(tx, "0/*"))[-1]
    close(optimizers.eval_params(state)[0], state.params[0], rtol=0, atol=0)


def test_averages_in_another_form_are_refused_by_what_they_are():
    tx = optax.flatten(optimizers.averaged(optax.sgd(0.5), 0.5))
    state = fnn.TrainState.create(net := fnn.dense(3), tx, jax.random.key(0), X)
    state, _ = fnn.train_step(net, LOSS, tx)(state, (X, Y))
    with pytest.raises(
        ValueError, match=r"eval_params: the optimiser must keep a tree like params, got one that keeps float"
    ):
        optimizers.eval_params(state)
