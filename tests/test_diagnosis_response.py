"""What bounds an optimiser's steps: a clip or a large ε inside of any optax chain; and training without it."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosed import case

import fnn
from fnn.diagnosis import changes, run_symptoms, trial, verdict
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import Evidence
from fnn.diagnosis.change import Change, setting
from fnn.diagnosis.inquiry import Tried
from fnn.diagnosis.response import BOUNDLESS, USUAL, Response, prepared
from fnn.training.depth import per_depth

RNG = np.random.default_rng(3)
PARAMS = {"kernel": RNG.normal(size=(9, 4)).astype(np.float32), "bias": np.zeros(4, np.float32)}
WARM = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)


def clipped(tx, norm=0.003):
    return optax.chain(optax.clip_by_global_norm(norm), tx)


def measured(tx, params=PARAMS):
    return prepared(per_depth(tx), params, 40)()


OTHERS = {
    "momentum": lambda: clipped(optax.sgd(0.1, 0.9)),
    "fnn's": lambda: optax.chain(fnn.clip.by_global_norm(0.003), optax.sgd(0.1)),
    "averaged": lambda: optax.chain(clipped(optax.sgd(0.1)), optax.ema(0.9)),
    "behind NaN": lambda: optax.apply_if_finite(clipped(optax.sgd(0.1)), 3),
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: clipped(optax.sgd(0.1)),
        lambda: clipped(optax.sgd(WARM)),  # whose first step is zero
        lambda: optax.MultiSteps(clipped(optax.sgd(0.1)), 2).gradient_transformation(),
        lambda: optax.chain(optax.clip_by_global_norm(0.003), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
        *(pytest.param(make, marks=pytest.mark.slow, id=name) for name, make in OTHERS.items()),
    ],
)
def test_a_clip_of_the_norm_is_found_in_any_chain(make):
    found = measured(make())
    assert (found.entries, found.eps) == (False, 0) and abs(found.norm / 0.003 - 1) < 1e-4


def test_a_clip_of_entries_is_told_from_one_of_the_norm():
    found = measured(optax.chain(optax.clip(0.02), optax.sgd(0.1, 0.9)))
    assert found.entries and abs(found.limit / 0.02 - 1) < 1e-4 and abs(found.norm / 0.02 / math.sqrt(40) - 1) < 1e-4


@pytest.mark.parametrize(
    "make, eps",
    [
        (lambda: optax.adamw(1e-3, eps=0.05, weight_decay=0.1), 0.05),
        (lambda: clipped(optax.adam(WARM, eps=2e-3), 1e4), 2e-3),
        pytest.param(lambda: optax.amsgrad(1e-3, eps=3.0), 3.0, marks=pytest.mark.slow),
    ],
)
def test_epsilon_is_found(make, eps):
    found = measured(make())
    assert found.limit == math.inf and abs(found.eps / eps - 1) < 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(0.1, 0.9),
        lambda: optax.adam(1e-3),
        lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),  # by unit: neither one clip nor an ε
        lambda: optax.lbfgs(),  # asks for the loss
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (
                lambda: optax.lion(1e-3),
                lambda: optax.lars(0.1),
                lambda: optax.lamb(1e-3),
                lambda: clipped(optax.adam(1e-3), 1.0),  # which divides the clip out again
            )
        ),
    ],
)
def test_others_are_not_bounded(make):
    found = measured(make())
    assert found.limit == math.inf and found.eps <= USUAL


@pytest.mark.parametrize(
    "make, ends, known",
    [
        (lambda: optax.adam(optax.cosine_decay_schedule(1e-3, 8)), 8, True),
        (
            lambda: optax.MultiSteps(optax.sgd(optax.linear_schedule(0.1, 0.0, 3)), 4).gradient_transformation(),
            12,
            False,
        ),
        (lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 40)), None, False),
        pytest.param(lambda: optax.noisy_sgd(0.1, key=3), None, False, marks=pytest.mark.slow),  # a key in its state
        pytest.param(lambda: optax.adagrad(0.1), None, False, marks=pytest.mark.slow),
    ],
)
def test_where_a_schedule_ends(make, ends, known):
    found = measured(make())
    assert found.ends == ends and bool(found.counts) == known


def test_steps_that_go_up():
    assert measured(optax.scale_by_adam()).uphill and not measured(optax.adam(1e-3)).uphill


def test_a_plan_with_another_optimiser_leaves_that_one_as_it_is():
    """What scales gradients, or slows counters down, is for the optimiser that was given; pairs may hold both."""
    sick = clipped(optax.sgd(optax.linear_schedule(0.3, 0.0, 3)), 1e-3)
    other = {"optimizer": lambda: optax.adam(1e-2)}
    got = ran(sick, gradients=Response(1e-3).unclipped, pace=0.25, **other)
    np.testing.assert_array_equal(got.losses, ran(sick, **other).losses)


def test_stacked_parameters_and_float64(x64):
    net = fnn.serial(fnn.dense(4), fnn.repeat(fnn.dense(4), 3))
    params = net.init(jax.random.key(0), jnp.zeros((2, 5)))[0]
    assert abs(measured(clipped(optax.sgd(0.1)), params).norm / 0.003 - 1) < 1e-4
    assert (
        abs(measured(optax.adam(1e-3, eps=0.05), jax.tree.map(lambda a: a.astype(float), params)).eps / 0.05 - 1) < 0.01
    )
    assert measured(clipped(optax.sgd(0.1)), {"none": np.zeros((0, 3))}) == BOUNDLESS


def test_low_precision():
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), PARAMS)
    assert abs(measured(clipped(optax.sgd(0.1)), narrow).norm / 0.003 - 1) < 0.02
    assert measured(clipped(optax.sgd(0.1)), jax.tree.map(lambda a: a.astype(jnp.float16), narrow)) == BOUNDLESS


def ran(tx, **plan):
    made = replace(case(steps=12, seeds=1, net=lambda: fnn.dense(10)), optimizer=lambda **_: tx, clip=None)
    with ThreadPoolExecutor(1) as thread:
        runner = trial.Runner(made, thread)
        if plan:
            runner.listen()
        return runner.run(Plan(**plan), [0])


@pytest.mark.parametrize(
    "sick, factor, twin",
    [
        (
            optax.chain(optax.clip_by_global_norm(1e-3), optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
            Response(1e-3).unclipped,
            optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
        ),
        (optax.adamw(1e-3, eps=1.0), Response(eps=1.0).sensitive, optax.adamw(1e-3, eps=2.0**-27)),
    ],
    ids=["clip", "eps"],
)
def test_scaled_gradients_train_as_without_the_bound(sick, factor, twin):
    """Against the optimiser without it. Scales are powers of two: only what rounds below float32's range differs."""
    got, want, as_it_is = ran(sick, gradients=factor), ran(twin), ran(sick)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-4)
    assert abs(as_it_is.losses - want.losses).max() > 0.1


def test_a_schedule_over_all_steps_trains_as_one_that_was_made_for_them():
    """The schedule of 3 steps over 12: its rate is that of one over 12 at every fourth step, and stays for four."""
    rates = np.repeat([0.3, 0.2, 0.1], 4)
    sick, twin = (
        optax.sgd(optax.linear_schedule(0.3, 0.0, 3)),
        optax.sgd(lambda count: jnp.asarray(rates, jnp.float32)[count]),
    )
    got, want, as_it_is = ran(sick, pace=3 / 12), ran(twin), ran(sick)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    assert np.ptp(as_it_is.norms[:, 4:]) > 0 and abs(as_it_is.losses - want.losses).max() > 0.05


def outcome(norms):
    lines = np.ones((2, 20))
    return trial.Outcome(*np.ones((3, 2)), lines, norms * lines, 1e-3 * lines, np.ones((2, 3)), np.ones(2), 0.0)


@pytest.mark.parametrize(
    "response, norms, cause",
    [
        (Response(0.01, size=100), 1.0, "clip"),
        (Response(0.01, size=100), 0.02, ""),  # half is left
        (Response(1e-4, entries=True, size=100), 1.0, "clip"),  # the norm at which entries of 1e-4 begin is 1e-3
        (Response(eps=1.0, size=100), 1.0, "optimizer"),  # entries of 0.1
        (Response(eps=0.1, size=100), 1.0, ""),
        (Response(eps=5e-6, size=100), 1e-9, ""),  # as sold
        (BOUNDLESS, 1e9, ""),
        (Response(uphill=True), 1.0, "optimizer"),
        (Response(ends=4, counts=(0,)), 1.0, "lr_low"),
    ],
)
def test_a_bound_is_abnormal_where_gradients_are_beyond_it(response, norms, cause):
    made = case()
    begun = type("Begun", (), {"rounding": 1e-7})
    plain = {e.cause for e in run_symptoms.run_symptoms(made, Plan(), begun, outcome(norms))}
    found = [
        e for e in run_symptoms.run_symptoms(made, Plan(), begun, outcome(norms), response) if e != run_symptoms.NO_RATE
    ]
    assert {e.cause for e in found} - (plain - {"optimizer"}) == {cause} - {""}
    offered = {c.name for c in changes.changes(made, response)} - {c.name for c in changes.changes(made)}
    assert bool(offered) == (response != BOUNDLESS and (response.eps == 0 or response.eps > USUAL))


@pytest.mark.parametrize("seen", [True, False])
def test_what_a_large_epsilon_takes_from_the_steps_is_not_blamed_on_the_rate(seen):
    """Only where it was measured: without that, a rate that does as well as Adam is the simpler answer."""
    said = Evidence("optimizer", "ε is about 1") if seen else run_symptoms.NO_RATE
    every = (
        Change("rate × 100", ("lr_low",), setting(rate=100.0), ""),
        Change("Adam, rate 1e-3", ("optimizer",), setting(), ""),
    )
    tried = {c.name: Tried(c, c.apply(Plan()), outcome(1.0), (0.9, 0.9)) for c in every}
    evidence = [said, Evidence("lr_low", "slow"), Evidence("clip", "much")]
    inquiry = SimpleNamespace(evidence=evidence, tried=tried)
    assert verdict.suspects(inquiry) == ["clip", *["optimizer"] * seen, "lr_low"]
