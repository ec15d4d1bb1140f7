"""What a diagnosis measures, and how it comes to a verdict; whole patients stand in test_ward."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosed import TEST, TRAIN, build, case, sgd

import fnn
from fnn.datasets.dataset import Dataset
from fnn.diagnosis import (
    changes,
    data_changes,
    data_symptoms,
    report,
    run_symptoms,
    start,
    symptoms,
    trial,
    unproved,
    verdict,
)
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import Evidence
from fnn.diagnosis.loss_case import loss_case_of
from fnn.diagnosis.reads import Reads
from fnn.diagnosis.weights import gains, redrawn

pytest.importorskip("sklearn")
RNG = np.random.default_rng(0)


def named(evidence):
    return {e.cause for e in evidence}


# Data.


def scaled(part, a=1.0, b=0.0):
    return Dataset(np.asarray(part.x) * np.float32(a) + np.float32(b), np.asarray(part.y))


def spoilt(part):
    return Dataset(
        np.where(np.arange(part.size)[:, None] % 7 == 3, np.nan, part.x).astype(np.float32), np.asarray(part.y)
    )


@pytest.mark.parametrize(
    "train, test, want",
    [
        (TRAIN, TEST, set()),
        (scaled(TRAIN, 255), scaled(TEST, 255), {"input_scale"}),
        (scaled(TRAIN, 1e-4), scaled(TEST, 1e-4), {"input_scale"}),
        (scaled(TRAIN, 0.1, 3), scaled(TEST, 0.1, 3), {"input_scale"}),
        (TRAIN, scaled(TEST, 4, 9), {"split_mismatch"}),
        (scaled(TRAIN, 0, 1), scaled(TEST, 0, 1), {"input_empty"}),
        (Dataset(TRAIN.x, RNG.permutation(np.asarray(TRAIN.y))), TEST, {"labels"}),
        (TRAIN, Dataset(TEST.x, (np.asarray(TEST.y) + 1) % 10), {"label_encoding"}),
        (TRAIN, Dataset(np.asarray(TEST.x)[:, ::-1], TEST.y), {"split_mismatch"}),
        (scaled(TRAIN, 255), scaled(TEST, 30), {"input_scale", "split_mismatch"}),
        (spoilt(TRAIN), TEST, {"numerics"}),
        (TRAIN, spoilt(TEST), {"split_mismatch"}),
    ],
)
def test_symptoms_of_data(train, test, want):
    assert named(data_symptoms.symptoms(case(train, test))) == want


def test_order_and_targets():
    order = np.argsort(np.asarray(TRAIN.y), kind="stable")
    by_class = Dataset(np.asarray(TRAIN.x)[order], np.asarray(TRAIN.y)[order])
    assert named(data_symptoms.symptoms(case(by_class, shuffle=False))) == {"order"}
    assert not data_symptoms.symptoms(case(by_class)) and not data_symptoms.symptoms(case(shuffle=False))
    x, y = RNG.normal(size=(200, 3)).astype(np.float32), RNG.normal(size=(200, 1)).astype(np.float32)
    for a, b, want in ((1, 3, set()), (1e5, 5e5, {"target_scale"}), (1e-3, 0, {"target_scale"})):
        parts = Dataset(x[:150], a * y[:150] + b), Dataset(x[150:], a * y[150:] + b)
        found = case(*parts, loss=fnn.losses.mse, net=lambda: fnn.models.mlp(1, 4, 1))
        assert named(data_symptoms.symptoms(found)) == want


def test_agreement_of_neighbours_is_that_of_a_plain_search():
    x, y = RNG.normal(size=(40, 3)), RNG.integers(0, 2, 40)
    got, chance, _ = data_symptoms.agreement(x, y, x, y, True)
    z = (x - x.mean(0)) / x.std(0)
    far = ((z[:, None] - z[None]) ** 2).sum(-1) + 1e9 * np.eye(40)
    near = np.argsort(far, axis=1)[:, :5]
    np.testing.assert_allclose(got, np.mean(y[near] == y[:, None]))
    assert abs(chance - 0.5) < 0.1


# Changes.


def test_changes_of_data_use_the_training_moments():
    found = data_changes.standardized(case(scaled(TRAIN, 7, 3), scaled(TEST, 7, 3)))
    want, held = fnn.data.standardize(scaled(TRAIN, 7, 3), scaled(TEST, 7, 3))
    np.testing.assert_allclose(found.train.x, want.x, atol=2e-5)
    rows = np.concatenate([found.chooses.y, found.checks.y])
    assert sorted(rows) == sorted(np.asarray(held.y)) and not np.isin(found.checks.x, found.chooses.x).all()
    far = data_changes.matched(case(TRAIN, scaled(TEST, 40, 90)))
    assert not data_symptoms.split_symptoms(far)
    for spoils in ((spoilt(TRAIN), TEST), (TRAIN, spoilt(TEST))):
        made = case(*spoils)
        assert "leave out examples with NaN" in {change.name for change in changes.changes(made)}
        whole = data_changes.finite(made)
        assert (
            np.isfinite(whole.x).all() and whole.checks.size == made.checks.size and not data_symptoms.symptoms(whole)
        )
    odd = case(Dataset(TRAIN.x, np.asarray(TRAIN.y) * 3 + 5), Dataset(TEST.x, np.asarray(TEST.y) * 3 + 5))
    np.testing.assert_array_equal(data_changes.renumbered(odd).y, np.asarray(TRAIN.y))


def test_weights_are_redrawn_to_their_gain_in_stacks_too():
    params, _ = fnn.models.mlp(6, 64, 10, bias_init="ones").init(jax.random.key(0), TRAIN.x[:2])
    new = redrawn(params, 1.7, 0)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    *hidden, (_, last) = gains(new)
    for _, gain in hidden:
        np.testing.assert_allclose(gain, 1.7, rtol=0.06)  # 4096 numbers: std 1.1 %; of 6 arrays one beyond 5.5 std
    np.testing.assert_allclose(last, 1.0, rtol=0.15)  # 640 numbers: std 2.8 %
    assert not any(
        np.any(a) for path, a in zip(fnn.tree.paths(new), jax.tree.leaves(new), strict=True) if "bias" in path
    )


def test_inputs_in_bfloat16_are_measured_too():
    few = [Dataset(jnp.asarray(part.x, jnp.bfloat16) * 255, part.y) for part in (TRAIN, TEST)]
    found = case(*few)
    assert found.computes == "bfloat16" and not case().computes
    assert named(data_symptoms.input_symptoms(found)) == {"input_scale"}
    assert "compute in float32" in {change.name for change in changes.changes(found)}
    assert not data_symptoms.input_symptoms(data_changes.standardized(found))


# Verdicts.


def tried(train, mean):
    return SimpleNamespace(outcome=SimpleNamespace(train=np.array([train])), mean=mean)


@pytest.mark.parametrize(
    "by_heart, others, real, want",
    [(0.9, 0.12, False, True), (0.9, 0.4, False, False), (0.3, 0.1, False, False), (0.9, 0.1, True, False)],
)
def test_inputs_that_tell_nothing_of_the_targets(by_heart, others, real, want):
    """Only where targets are learnt by heart, nothing helps on other examples, and neighbours do not agree."""
    apart = case(*(Dataset(RNG.permutation(np.asarray(part.x)), part.y) for part in (TRAIN, TEST)))
    inquiry = SimpleNamespace(
        case=case() if real else apart, tried={"a": tried(0.2, 0.1), "b": tried(by_heart, others)}
    )
    said = unproved.unrelated_targets(inquiry, True)
    assert (said is not None) == want and (said is None or said.name == "labels")
    assert unproved.unrelated_targets(inquiry, False) is None


@pytest.mark.parametrize(
    "few, kept, others, want",
    [(3, False, 0.12, True), (3, True, 0.12, False), (3, False, 0.4, False), (40, False, 0.12, False)],
)
def test_inputs_most_of_which_are_constant(few, kept, others, want):
    """Only where the rest tells nothing: neighbours do not agree, and no training rises above chance."""

    def part(data):
        x = np.zeros_like(data.x)
        x[:, :few] = data.x[:, 20 : 20 + few] if kept else RNG.normal(size=(len(x), few))
        return Dataset(x, data.y)

    made = case(part(TRAIN), part(TEST))
    inquiry = SimpleNamespace(case=made, tried={"a": tried(0.2, others)}, evidence=data_symptoms.input_symptoms(made))
    said = unproved.empty_features(inquiry, True)
    assert (said is not None) == want and (said is None or "61 of 64" in said.evidence[0].text)
    assert unproved.empty_features(inquiry, False) is None


@pytest.mark.parametrize("init, want", [("scaled(3.0)", "init_large"), ("scaled(0.3)", "init_small")])
def test_what_helps_though_nothing_was_measured_is_named_by_what_it_changes(init, want):
    made = case(net=lambda width=16: fnn.models.mlp(2, width, 10, init=init))
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    every = {change.name: change for change in changes.changes(made)}
    inquiry = SimpleNamespace(case=made, begun=begun)
    for name, cause in (("redraw weights", want), ("Adam, rate 1e-3", "optimizer"), ("rate × 0.1", "lr_high")):
        done = SimpleNamespace(change=every[name], plan=every[name].apply(Plan()))
        assert verdict.main(inquiry, done) == cause


def test_a_recurrent_net_may_forget_for_its_biases():
    def lstm(cell="lstm", forget_bias=-5.0):
        return fnn.models.rnn(1, 4, 2, cell=cell, forget_bias=forget_bias)

    data = Dataset(np.zeros((40, 6, 3), np.float32), np.arange(40) % 2)
    able = {
        change.name for change in changes.changes(case(data, data, net=lstm, batch_size=8)) if "memory" in change.causes
    }
    assert able == {"redraw weights", "forget_bias 3"}


def test_a_net_that_knows_less_than_neighbours_is_not_healthy():
    """They know 0.95 of the labels, averaged over the classes."""
    made = case()
    x, y, held, of_held = (np.asarray(a) for a in (TRAIN.x, TRAIN.y, TEST.x, TEST.y))
    near = np.argsort(((held[:, None] - x[None, :1000]) ** 2).sum(-1), axis=1)[:, :5]
    want = np.mean([(y[:1000][near] == of_held[:, None])[of_held == c].mean() for c in range(10)])
    assert abs(data_symptoms.within_reach(made) - want) < 0.03
    good, lost = np.ones((2, 5)), np.array([[1.0, 1, 1, 1, 1], [1, 1, 1, np.nan, np.nan]])
    for scores, losses, unread, want in (
        ((0.9, 0.92), good, [], False),
        ((0.6, 0.62), good, [], True),
        ((0.9, 0.92), lost, [], True),
        ((0.9, 0.92), good, [3], True),
    ):
        base = SimpleNamespace(scores=scores, outcome=SimpleNamespace(losses=losses, began=None, chooses=np.zeros(2)))
        inquiry = SimpleNamespace(
            case=made, base=base, begun=SimpleNamespace(unread=unread, unpaired=False, reads=Reads())
        )
        assert verdict.sick(inquiry, None) == want
    assert data_symptoms.within_reach(case(test=None)) == -np.inf


def test_equal_inputs_are_named_without_a_proof():
    (found,) = verdict.causes(SimpleNamespace(evidence=[Evidence("input_empty", "all inputs are equal")]), True)
    assert (found.name, found.repair) == ("input_empty", None) and found.name in report.UNTESTED


@pytest.mark.parametrize("width, want", [(1, "width × 32"), (12, "width × 4"), (5, "width × 7")])
def test_a_wider_net_is_wide_enough(width, want):
    made = case(net=lambda width=width: fnn.models.mlp(2, width, 10))
    (wider,) = [change for change in changes.changes(made) if "capacity" in change.causes]
    assert wider.name == want and dict(wider.apply(Plan()).knobs)["width"] >= 32


def test_refusals():
    more = {"batch_size": 64, "steps": 10}
    for net, loss, optimizer, options, sentence in (
        (lambda depth: None, fnn.losses.mse, sgd, more, "each knob of build must have a default"),
        ("mlp", fnn.losses.mse, sgd, more, "the net must be a Layer, or a function that builds one"),
        (build, fnn.losses.mse, "adam", more, "the optimizer must be an optax transformation"),
        (build, fnn.losses.mse, lambda rate: optax.sgd(rate), more, "the optimizer's rate must have a default"),
        (build, fnn.losses.mse, sgd, {**more, "batch_size": 10_000}, "batch_size must be at most the 1438"),
        (build, fnn.losses.mse, sgd, {**more, "budget": 0}, "budget must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            fnn.diagnose(net, loss, optimizer, TRAIN, TEST, **options)
    with pytest.raises(ValueError, match="validation must hold arrays like those of train"):
        fnn.diagnose(build, fnn.losses.mse, sgd, TRAIN, (TEST.x[:, :5], TEST.y), **more)
    two = fnn.parallel({"a": fnn.dense(10), "b": fnn.dense(10)})
    for net, data in ((two, TRAIN), (build, (TRAIN.x, TRAIN.y, jnp.ones(TRAIN.size)))):
        with pytest.raises(ValueError, match="outputs and targets must be one array each, without weights"):
            fnn.diagnose(net, fnn.losses.cross_entropy, sgd, data, None, **more)
    with pytest.raises(ValueError, match="share their leading axis"):
        loss_case_of(lambda p, b: 0.0, {"w": jnp.ones(2)}, [(np.ones((3, 2)), np.ones(4))], sgd(), None, None,
                     steps=1, seeds=1, shuffle=False)  # fmt: skip
    with pytest.raises(TypeError, match="diagnose_loss: loss must be a function"):
        fnn.diagnose_loss(3, {"w": jnp.ones(2)}, [np.ones((3, 2))], sgd())


def test_units_that_die_in_the_run_and_attention_that_sees_one_key():
    made = case()
    quiet = start.Start({"input_dead": np.array([0.0, 0.1, 0.2])}, ["a", "b", "c"], [], [], np.zeros(0), 1.0, False, False, False, [], False, [], Reads(), False,
                        {"a": -1.0}, 1e-7, 0.0, "", 1.0, {}, (3.0, 1.7))  # fmt: skip
    dead = dataclasses.replace(quiet, layers={"input_dead": np.array([0.9, 0.1, 0.95])})
    assert not run_symptoms.middle_symptoms(made, quiet, quiet) and not run_symptoms.middle_symptoms(made, dead, dead)
    (said,) = run_symptoms.middle_symptoms(made, quiet, dead)
    assert said.cause == "lr_high" and "95% of the inputs" in said.text
    assert not run_symptoms.middle_symptoms(
        made, quiet, dataclasses.replace(dead, layers={"input_dead": np.array([0.9, 0.1, 0.2])})
    )
    sharp = dataclasses.replace(quiet, attention=(400.0, 0.01))
    assert "attention logits reach 400" in run_symptoms.middle_symptoms(made, quiet, sharp)[0].text
    gone = dataclasses.replace(quiet, gradient={"a": -np.inf})
    assert "the gradient of a is exactly zero" in run_symptoms.middle_symptoms(made, quiet, gone)[0].text


@pytest.mark.parametrize("gain, want", [(1.0, set()), (30.0, {"init_large"})])
def test_attention_logits_before_the_first_step(gain, want):
    """The largest logit is that of q·k/sqrt(width of a head), by hand."""
    x = RNG.normal(size=(40, 5, 8)).astype(np.float32)
    data = Dataset(x, RNG.integers(0, 2, 40))

    def net():
        block = fnn.attention(2, kernel_init=f"scaled({gain})")
        mean = fnn.stateless(lambda key, spec: (), lambda params, x: jnp.mean(x, axis=1))
        return fnn.serial(block, mean, fnn.dense(2))

    made = case(data, data, net=net, batch_size=20)
    with ThreadPoolExecutor(1) as thread:
        runner = trial.Runner(made, thread)
        begun = start.start(runner, Plan())
        params = runner.draw(Plan(), 0)[0]
        batch = x[runner.order(Plan(), 0)[0]]
    kernels = {
        path.rpartition("/")[0].rpartition("/")[2]: a for path, a in fnn.tree.rows(params) if path.endswith("kernel")
    }
    q, k = (np.tensordot(batch, np.asarray(kernels[name]), 1) for name in ("query", "key"))
    q, k = (a.reshape(20, 5, 2, 4) for a in (q, k))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = np.min(-(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean((0, 2)))
    np.testing.assert_allclose(begun.attention, (logits.max(), entropy), rtol=1e-3)
    assert {e.cause for e in symptoms.start_symptoms(made, Plan(), begun) if "attention" in e.text} == want


@pytest.mark.parametrize("activation, want", [("relu", 2**0.5 / 17), ("tanh", 1 / 17**0.5)])
def test_the_gain_of_residual_sums_keeps_their_size(activation, want):
    """From the first of 17 layers of 256 units to the last the signal grows by less than 2.5; with a plain net's gain by 4 and more."""

    def net(depth=17, residual=True, norm="none", activation=activation):
        return fnn.models.mlp(depth, 256, 10, residual=residual, norm=norm, activation=activation)

    made, plain = case(net=net), Plan().knob(residual=False)
    np.testing.assert_allclose(made.gain(Plan()), want)
    assert made.gain(plain) == made.gain(Plan().knob(norm="layer_norm")) > made.gain(Plan())

    def growth(gain):
        sizes = []
        for depth in (1, 17):
            with ThreadPoolExecutor(1) as thread:
                params, state = trial.Runner(case(net=net), thread).draw(Plan(gain=gain).knob(depth=depth), 0)
            outputs = net(depth).apply(params, state, TRAIN.x[:64])[0]
            sizes.append(float(jnp.std(outputs)))
        return sizes[1] / sizes[0]

    assert 1 < growth(made.gain(Plan())) < 2.5 < 4 < growth(made.gain(plain))


def test_a_net_given_as_it_is_may_have_residual_sums():
    names = {c.name: c for c in changes.changes(case(net=fnn.models.mlp(6, 16, 10)))}
    small = names["redraw weights, small enough for residual sums"]
    assert small.apply(Plan()).gain == 2**0.5 / 7 and 'init="scaled(0.2)"' in small.code  # 7 weight matrices
    assert not any("residual sums" in c.name and "redraw" in c.name for c in changes.changes(case()))
