"""What a train step offers an optimiser beyond the gradient, and what accumulation reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import fnn
from fnn.training import extra

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
Y = np.arange(8) % 3
NET = fnn.models.mlp(2, 4, 3, norm="batch_norm", unroll=True)
LOSS = fnn.losses.cross_entropy


@pytest.mark.parametrize(
    "options", [{}, {"per_example": "clip", "max_norm": 0.1}, {"compute_dtype": jnp.bfloat16}], ids=str
)
def test_functions_are_those_of_the_step(options):
    net = fnn.serial(fnn.dense(4), fnn.dropout(0.5), fnn.layer_norm(), fnn.dense(3))
    state = fnn.TrainState.create(net, optax.sgd(0.1), jax.random.key(0), X)

    def offered_at(params):
        found = {}

        def update(updates, opt_state, params=None, *, value, grad, grad_fn, **rest):
            found.update(
                value=value, grad=grad, here=grad_fn(params), there=grad_fn(jax.tree.map(lambda a: 2 * a, params))
            )
            if "per_example" not in options:
                found.update(
                    again=rest["value_fn"](params), objective=rest["obj_fn"](jax.tree.map(lambda a: 2 * a, params))
                )
            return updates, opt_state

        tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
        step = fnn.train_step(net, LOSS, tx, **options)

        def run(params):
            _, metrics = step.pure(state.__class__(params, state.net_state, (), state.key, state.step), (X, Y))
            return found, metrics["loss"]

        return jax.jit(run)(params)

    seen, loss = offered_at(state.params)
    doubled, loss_there = offered_at(jax.tree.map(lambda a: 2 * a, state.params))
    assert seen["value"] == loss and doubled["value"] == loss_there != loss
    pairs = [(seen["here"], seen["grad"]), (seen["there"], doubled["grad"])]
    if "per_example" not in options:
        pairs += [(seen["again"], loss), (seen["objective"], loss_there)]
    for got, wanted in pairs:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


def test_a_clipped_gradient_is_not_searched_along():
    options = {"per_example": "clip", "max_norm": 0.1}
    for tx, fails in ((optax.lbfgs(), True), (contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True), False)):
        state, step = fnn.TrainState.create(NET, tx, jax.random.key(0), X), fnn.train_step(NET, LOSS, tx, **options)
        if fails:
            with pytest.raises(
                ValueError, match="train_step: per_example must not be 'clip' with an optimiser that takes the"
            ):
                step(state, (X, Y))
        else:
            jax.eval_shape(step.pure, state, (X, Y))


def test_what_is_not_asked_for_costs_nothing():
    calls = []

    def counted(params):
        calls.append(1)
        return jnp.zeros(())

    given = extra.offered(jnp.zeros(()), {}, counted, counted)
    tx, params = optax.chain(optax.polyak_sgd(), optax.adam(0.1)), {"a": jnp.ones(2)}
    extra.accepted(tx.update)(params, tx.init(params), params, **given)
    assert not calls


def test_names_that_an_optimiser_refuses_are_left_out_and_its_own_errors_are_not():
    def update(updates, state, params=None, *, grad_fn):
        if updates is None:
            raise TypeError("f() got an unexpected keyword argument 'width'")
        return grad_fn, state

    assert extra.accepted(update)(0, 1, grad_fn=2, value=3, obj_fn=4) == (2, 1)
    with pytest.raises(TypeError, match="width"):
        extra.accepted(update)(None, 1, grad_fn=2, value=3)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'grad_fn'"):
        extra.accepted(update)(0, 1, value=3)


def test_accumulated_steps_are_those_of_the_large_batch_and_so_are_their_reports():
    """Four steps of two examples against one of eight."""
    net = fnn.models.mlp(2, 4, 3, norm="layer_norm")
    clip = fnn.clip.by_global_norm(0.05)
    ends = {}
    for k in (1, 4):
        tx = optax.MultiSteps(optax.chain(clip, optax.adam(0.1)), k)
        state, step, rows = fnn.TrainState.create(net, tx, jax.random.key(0), X), fnn.train_step(net, LOSS, tx), []
        for i in range(0, 8, 8 // k):
            state, metrics = step(state, (X[i : i + 8 // k], Y[i : i + 8 // k]))
            rows.append(jax.device_get(metrics))
        ends[k] = state.params, {name: np.array([row[name] for row in rows]) for name in rows[0]}
    (large, one), (small, four) = ends[1], ends[4]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), small, large)
    for name in ("loss", "accuracy"):
        assert four[name].mean() == pytest.approx(one[name][0], rel=1e-5)
    for name in ("clip_fraction", "clip_removed", "grad_norm_clipped"):
        assert np.isnan(four[name][:3]).all()
    assert four["grad_norm_clipped"][3] == pytest.approx(0.05, rel=1e-4)
    assert (four["update_ratio"][:3] == 0).all() and four["update_ratio"][3] == pytest.approx(
        one["update_ratio"][0], rel=1e-3
    )
