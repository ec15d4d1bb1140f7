"""Hooks of `fit`: when they are called, what they are told, what they may return; and runs whose numbers leave the floats."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same

import fnn
from fnn.training import batches, feed

NET = fnn.models.mlp(1, 4, 3)
OPTIMIZER = optax.sgd(0.1)
STEP = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER)
RNG = np.random.default_rng(0)
Y = np.arange(40, dtype=np.int32) % 3
X = np.asarray(RNG.normal(size=(40, 4)) + np.eye(4)[Y], np.float32)
KEY = jax.random.key(0)
STATE = fnn.TrainState.create(NET, OPTIMIZER, KEY, X)
MEMORY = {"epochs": 3, "batch_size": 4, "key": KEY}
BATCHES = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)]
WAYS = {
    "memory": ((X, Y), MEMORY),
    "one by one": ((X, Y), MEMORY | {"scan": False}),
    "batches": (BATCHES, {"epochs": 3}),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(feed, "LONGEST", 4)
    monkeypatch.setattr(batches, "READ", 4)
    return WAYS[request.param]


def test_hooks_are_told_what_a_run_without_them_records(way):
    data, options = way
    state, history = fnn.fit(STEP, STATE, data, **options, validation=(X, Y))
    epochs, steps = [], []

    def on_epoch(report):
        epochs.append(report)
        assert_same(fnn.evaluate(NET, report.state, (X, Y))["loss"], report.validation["loss"])

    def on_step(report):
        steps.append(report)
        assert int(report.state.step) == report.step

    looked, again = fnn.fit(
        STEP, STATE, data, **options, validation=(X, Y), on_epoch=on_epoch, on_step_every=(7, on_step)
    )
    assert_same((looked.params, again.train), (state.params, history.train))  # looking on changes nothing
    assert [(r.step, r.epoch) for r in epochs] == [(10, 0), (20, 1), (30, 2)]
    assert [(r.step, r.epoch) for r in steps] == [(7, 0), (14, 1), (21, 2), (28, 2)]
    for i, report in enumerate(epochs):
        assert_same(report.metrics["loss"], history.train["loss"][10 * i : 10 * i + 10])
        assert report.validation == {name: values[i] for name, values in history.validation.items()}
    for i, report in enumerate(steps):
        assert_same(report.metrics["loss"], history.train["loss"][7 * i : 7 * i + 7])
        assert report.validation == {} and isinstance(report.metrics["loss"], np.ndarray)


def test_a_state_that_was_kept_without_a_copy_says_so():
    kept = []
    fnn.fit(STEP, STATE, (X, Y), **MEMORY, on_epoch=lambda report: kept.append(report.state))
    with pytest.raises(ValueError, match="the state must still have its arrays, got one that was donated"):
        fnn.evaluate(NET, kept[0], (X, Y))


@pytest.mark.parametrize("answer", [True, np.bool_(True)], ids=repr)
def test_a_hook_that_returns_true_ends_the_run(answer):
    state, history = fnn.fit(
        STEP, STATE, (X, Y), **MEMORY, on_epoch=lambda report: answer if report.step >= 20 else False
    )
    assert int(state.step) == 20 and history.steps_per_epoch == (10, 10) and history.stopped_early
    state, history = fnn.fit(STEP, STATE, (X, Y), **MEMORY, on_step_every=(3, lambda report: report.step >= 14))
    assert int(state.step) == 15 and history.steps_per_epoch == (10, 5) and history.stopped_early
    assert history.train["loss"].shape == (15,) and history.nonfinite_step is None


@pytest.mark.parametrize("answer", [0.1, 1, "stop", {"rate": 0.1}, np.float32(1)], ids=repr)
def test_what_a_hook_must_not_return(answer):
    with pytest.raises(
        TypeError, match="^fit: on_epoch must return True to stop, or False or nothing, got .*"
    ) as error:
        fnn.fit(STEP, STATE, (X, Y), **MEMORY, on_epoch=lambda report: answer)
    assert "\n" not in str(error.value) and int(error.value.state.step) == 10


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"on_epoch": 3}, "fit: on_epoch must be a function of a report, got"),
        ({"on_step_every": print}, "fit: on_step_every must be a pair (k, function of a report), got"),
        ({"on_step_every": (print, 3)}, "fit: on_step_every must be a pair (k, function of a report), got"),
        ({"on_step_every": (0, print)}, "fit: on_step_every[0] must be a positive integer, got 0"),
        ({"on_step_every": (1.5, print)}, "fit: on_step_every must be a pair (k, function of a report), got"),
    ],
)
def test_what_is_no_hook(options, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        fnn.fit(STEP, STATE, (X, Y), **MEMORY, **options)


def test_an_error_in_a_hook_keeps_state_and_history(way):
    data, options = way

    def fail(report):
        if report.step == 14:
            raise RuntimeError("the logger is gone")

    with pytest.raises(RuntimeError) as error:
        fnn.fit(STEP, STATE, data, **options, on_step_every=(7, fail))
    state, history = STEP.unfinished
    assert error.value.state is state and error.value.history is history
    rest, _ = fnn.fit(STEP, state, data, **options | {"epochs": 2})
    whole, curves = fnn.fit(STEP, STATE, data, **options)
    assert int(state.step) == 14 and history.steps_per_epoch == (10, 4)
    assert_same(history.train["loss"], curves.train["loss"][:14])
    if data is not BATCHES:  # which are read from the start
        assert_same(rest.params, whole.params)


# --- numbers that leave the floats -----------------------------------------------------------------------------------


def poisoned(at, count=1):
    """A step whose loss is NaN in some steps: their batches hold the number 1e6."""
    bad = [(np.where(at <= i < at + count, 1e6, 1.0).astype(np.float32) * x, y) for i, (x, y) in enumerate(BATCHES * 3)]

    def loss(outputs, y):
        return fnn.losses.cross_entropy(outputs, y) * jnp.where(jnp.max(jnp.abs(outputs)) > 1e3, jnp.nan, 1.0)

    return loss, bad


@pytest.mark.parametrize("at", [0, 5, 15, 29])
def test_parameters_that_are_not_finite_end_the_run_and_the_step_is_named(at):
    loss, data = poisoned(at)
    step = fnn.train_step(NET, loss, OPTIMIZER)
    rule = f"^fit: stopped because the parameters are no longer finite; the loss of step {at} is nan; .*first_bad"
    with pytest.warns(RuntimeWarning, match=rule):
        state, history = fnn.fit(step, STATE, data, epochs=2)
    assert history.nonfinite_step == at and history.stopped_early
    assert np.isfinite(history.train["loss"][:at]).all() and not np.isfinite(history.train["loss"][at:]).any()
    assert int(state.step) <= 30  # it did not begin another epoch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, history = fnn.fit(step, STATE, data, epochs=2, stop_nonfinite=False)
    assert int(state.step) == 60 and history.nonfinite_step == at and not history.stopped_early


def test_a_run_stops_within_two_stretches(monkeypatch):
    monkeypatch.setattr(feed, "LONGEST", 4)
    step = fnn.train_step(NET, fnn.losses.mse, optax.sgd(lambda count: jnp.where(count == 9, jnp.inf, 0.01)))
    state = fnn.TrainState.create(NET, step.optimizer, KEY, X)
    y = np.eye(3, dtype=np.float32)[Y]
    with pytest.warns(RuntimeWarning, match="the loss of step 10 is nan"):  # its update at step 9 was infinite
        state, history = fnn.fit(step, state, (X, y), **MEMORY | {"batch_size": 2})
    assert history.nonfinite_step == 10 and int(state.step) == 16
    with pytest.warns(RuntimeWarning, match="the loss of step 9 is [0-9.e+-]+;"):  # the last step of the data
        state, history = fnn.fit(
            step, fnn.TrainState.create(NET, step.optimizer, KEY, X), (X, y), **MEMORY | {"epochs": 1}
        )
    assert history.nonfinite_step == 9


def test_a_step_that_the_optimizer_skips_does_not_count():
    loss, data = poisoned(5, count=2)
    optimizer = optax.apply_if_finite(OPTIMIZER, max_consecutive_errors=2)
    step = fnn.train_step(NET, loss, optimizer)
    state, history = fnn.fit(step, fnn.TrainState.create(NET, optimizer, KEY, X), data, epochs=1)
    assert np.isnan(history.train["loss"]).nonzero()[0].tolist() == [5, 6] and history.nonfinite_step is None
    assert not history.stopped_early and int(state.step) == 30


def test_with_patience_the_best_state_comes_back_and_a_checkpoint_keeps_finite_ones(tmp_path):
    loss, data = poisoned(15)
    step = fnn.train_step(NET, loss, OPTIMIZER)
    options = {"epochs": 2, "validation": (X, Y), "checkpoint": tmp_path, "save_every": (10, "steps")}
    for _ in range(2):  # the second time it goes on from the folder, and ends in the same way
        with pytest.warns(RuntimeWarning, match="the loss of step 15 is nan"):
            fnn.fit(step, STATE, data, **options)
        kept = fnn.load(tmp_path, STATE)
        assert int(kept.step) == 10 and np.isfinite(fnn.tree.norm(kept.params))
    with pytest.warns(RuntimeWarning):
        state, history = fnn.fit(step, STATE, data[10:], epochs=3, validation=(X, Y), patience=1)
    assert history.best_epoch is None and not np.isfinite(fnn.tree.norm(state.params))
