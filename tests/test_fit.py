"""`fit` when things go wrong: interrupts and errors lose nothing, and what does not belong together is refused."""

import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same

import fnn

NET = fnn.models.mlp(2, 4, 3, norm="batch_norm")
OPTIMIZER = optax.adam(1e-2)
STEP = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER)
RNG = np.random.default_rng(0)
Y = np.arange(48, dtype=np.int32) % 3
X = np.asarray(RNG.normal(size=(48, 4)) + 3 * np.eye(4)[Y], np.float32)
KEY = jax.random.key(0)
STATE = fnn.TrainState.create(NET, OPTIMIZER, KEY, X)
OPTIONS = {"epochs": 2, "batch_size": 16, "key": KEY}
BATCHES = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 48, 4)]


def copy(state=STATE):
    return jax.tree.map(jnp.copy, state)


def same(a, b):
    assert_same(*({"p": s.params, "s": s.net_state, "o": s.opt_state} for s in (a, b)))


def stepwise(batches, state=STATE):
    """The same steps, one by one."""
    state, losses = copy(state), []
    for batch in batches:
        state, metrics = STEP(state, batch)
        losses.append(metrics["loss"])
    return state, np.array(losses)


def order_of_epoch(epoch, key=KEY):
    """The examples' order: a key of the shuffles, folded with the epoch's number."""
    return np.asarray(fnn.data.shuffled(jax.random.fold_in(jax.random.fold_in(key, 0xF5F5F5F5), epoch), 48))


class Failing:
    """Batches that can be read anew, and fail at one of all that are ever read."""

    def __init__(self, error, at, batches=BATCHES):
        self.error, self.at, self.batches, self.read = error, at, batches, 0

    def __iter__(self):
        for batch in self.batches:
            if self.read == self.at:
                raise self.error
            self.read += 1
            yield batch


# --- interrupts and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone"), StopAsyncIteration()])
def test_an_error_in_the_second_epochs_data_keeps_all_finished_steps(error):
    data = Failing(error, at=len(BATCHES) + 5)
    with pytest.raises(type(error)) as raised:
        fnn.fit(STEP, STATE, data, epochs=3, validation=(X, Y))
    state, history = STEP.unfinished
    assert raised.value is error and error.state is state and error.history is history
    assert any(
        note.startswith("fit: 12 steps were finished; state, history = step.unfinished") for note in error.__notes__
    )
    expected, losses = stepwise(BATCHES)
    same(state, expected)
    assert_same(history.train["loss"], losses)
    assert history.steps_per_epoch == (12,) and int(state.step) == 12 and not history.stopped_early
    assert history.validation["loss"].shape == (1,)
    # The state is a good one to go on with, and ends where an uninterrupted run does.
    again, _ = fnn.fit(STEP, state, BATCHES, epochs=1)
    whole, _ = fnn.fit(STEP, STATE, BATCHES, epochs=2)
    same(again, whole)
    assert STEP.unfinished is None


def test_stretches_that_were_finished_within_an_epoch_count():
    """32 batches go to the device at a time: those are kept, and the ones read after them were not trained on yet."""
    batches = BATCHES * 4
    with pytest.raises(KeyboardInterrupt):
        fnn.fit(STEP, STATE, Failing(KeyboardInterrupt(), at=40, batches=batches), epochs=1)
    state, history = STEP.unfinished
    expected, losses = stepwise(batches[:32])
    np.testing.assert_allclose(history.train["loss"], losses, rtol=1e-4)
    assert history.steps_per_epoch == (32,) and int(state.step) == 32
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_an_error_before_the_first_step_leaves_the_state_as_it_was():
    with pytest.raises(OSError):
        fnn.fit(STEP, STATE, Failing(OSError(), at=0), epochs=1)
    state, history = STEP.unfinished
    same(state, STATE)
    assert history.train == {} and history.validation == {} and history.steps_per_epoch == ()
    fnn.fit(STEP, state, BATCHES, epochs=1)


def test_a_validation_that_fails_keeps_the_epoch_before_it(monkeypatch):
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room to evaluate")
        return {"loss": 1.0}

    monkeypatch.setattr("fnn.training.fit.averages", failing)
    with pytest.raises(MemoryError) as raised:
        fnn.fit(STEP, STATE, (X, Y), validation=(X, Y), **OPTIONS | {"epochs": 5})
    state, history = raised.value.state, raised.value.history
    assert history.steps_per_epoch == (3, 3) and history.train["loss"].shape == (6,)
    assert history.validation["loss"].tolist() == [1.0] and history.best_epoch == 0
    loop = STATE
    for epoch in range(2):
        loop, _ = stepwise([(X[i], Y[i]) for i in order_of_epoch(epoch).reshape(3, 16)], loop)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(loop.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history.by_epoch("loss"), history.train["loss"].reshape(2, 3).mean(1), rtol=1e-6)
    lines = str(history).splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"epoch 1: train loss {history.by_epoch('loss')[0]:.4g}")


def told(act, at):
    """A step whose loss calls back to the host, which acts at one of its calls."""
    calls = []

    def loss(outputs, y):
        def note(_):
            calls.append(1)
            if len(calls) == at:
                act()

        jax.debug.callback(note, outputs[0, 0])
        return fnn.losses.cross_entropy(outputs, y)

    return fnn.train_step(NET, loss, OPTIMIZER)


def test_ctrl_c_while_the_device_computes_waits_for_the_stretch():
    """The state that a step was given is gone before the new one is there: an interrupt in between would lose both."""
    step = told(lambda: os.kill(os.getpid(), signal.SIGINT), at=4)  # the first step of the second epoch
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fnn.fit(step, STATE, (X, Y), **OPTIONS | {"epochs": 5})
    state, history = step.unfinished
    assert int(state.step) == history.train["loss"].size == sum(history.steps_per_epoch) in (3, 6)
    expected, _ = fnn.fit(STEP, STATE, (X, Y), **OPTIONS | {"epochs": 5})
    assert np.all(np.isfinite(jax.tree.leaves(state.params)[0])) and int(expected.step) == 15
    assert signal.getsignal(signal.SIGINT) is before


def test_a_step_that_fails_takes_its_state_along_and_says_so():
    def fail():
        raise RuntimeError("in the callback")

    with pytest.raises(Exception) as raised:
        step = told(fail, at=5)
        fnn.fit(step, STATE, (X, Y), **OPTIONS | {"epochs": 3})
    state, history = raised.value.state, raised.value.history
    assert "destroyed its own" in raised.value.__notes__[-1] and history.steps_per_epoch == (3,)
    same(state, STATE)


# --- data that are none ----------------------------------------------------------------------------------------------

TRAIN, TEST = fnn.data.split(X, Y, key=KEY)
LOOSE = {"epochs": 1}
NOT_DATA = {
    "train and test": ((TRAIN, TEST), OPTIONS, TypeError, "fit: data must be one pair of arrays (x, y), got 2 pairs"),
    "their pairs": (((X, Y), (X[:9], Y[:9])), OPTIONS, TypeError, "fit: data must be one pair of arrays (x, y), got 2"),
    "without key": ((TRAIN, TEST), LOOSE, TypeError, "fit: data must be one pair of arrays (x, y), got 2 pairs"),
    "in a list": ([TRAIN, TEST], LOOSE, TypeError, "fit: data must be one pair of arrays (x, y), got 2 pairs"),
    "three": ((TRAIN, TEST, TEST), OPTIONS, TypeError, "fit: data must be one pair of arrays (x, y), got 3 pairs"),
    "a list": ([X, Y], LOOSE, TypeError, "fit: data in memory must be a tuple (x, y), got the list [float32[48,4], in"),
    "batches with a key": (
        BATCHES,
        LOOSE | {"key": KEY},
        TypeError,
        "got key with batches, which are cut and shuffled",
    ),
    "batches with a size": (BATCHES, LOOSE | {"batch_size": 4}, TypeError, "got batch_size with batches"),
    "batches with both": (BATCHES, OPTIONS, TypeError, "got key and batch_size with batches"),
    "batches and a fraction": (
        BATCHES,
        LOOSE | {"validation": 0.2},
        TypeError,
        "a fraction can be split off data in mem",
    ),
    "one array": (
        X,
        LOOSE,
        TypeError,
        "fit: data must be a pair (x, y) or an iterable of batches (x, y), got float32[48,4]",
    ),
    "a dict": ({"x": X, "y": Y}, LOOSE, TypeError, "fit: data must be a pair (x, y) or an iterable of batches (x, y)"),
    "a name": ("digits", LOOSE, TypeError, "fit: data must be a pair (x, y) or an iterable of batches (x, y), got str"),
    "nothing": (None, LOOSE, TypeError, "fit: data must be a pair (x, y) or an iterable of batches (x, y), got None"),
    "a triple": (
        (X, Y, Y),
        OPTIONS,
        TypeError,
        "weights, the third of (x, y, weights), must be floating or bool, got int32[48]; use weights.astype(float)",
    ),
    "no example": (
        (X[:0], Y[:0]),
        OPTIONS,
        ValueError,
        "fit: a data set must hold at least one example, got float32[0,4]",
    ),
    "a batch of a dict": ([{"x": X}], LOOSE, TypeError, "train_step: the batch must be a pair (x, y), got {x: float32"),
    "a batch of no example": ([(X[:0], Y[:0])], LOOSE, ValueError, "a batch must hold at least one example, got none"),
    "y shorter": ([(X, Y[:3])], LOOSE, ValueError, "x and y must hold the same number of examples on their first axes"),
    "targets by name": (
        [(X, {"a": Y})],
        LOOSE,
        TypeError,
        "cross_entropy: targets must be one array, got {a: int32[48]}",
    ),
}


@pytest.mark.parametrize("name", NOT_DATA)
def test_what_is_not_data_is_refused_in_a_sentence(name):
    data, options, kind, sentence = NOT_DATA[name]
    with pytest.raises(kind, match=re.escape(sentence)) as error:
        fnn.fit(STEP, STATE, data, **options)
    assert "\n" not in str(error.value)
    if name not in ("batches with a key", "batches with a size", "batches with both", "batches and a fraction"):
        with pytest.raises(kind):
            fnn.evaluate(NET, STATE, data)


def test_batches_of_pairs_are_batches_wherever_they_lie():
    two = BATCHES[:2]
    expected, _ = stepwise(two)
    for data in (two, [list(batch) for batch in two], map(tuple, two), (batch for batch in two)):
        same(fnn.fit(STEP, STATE, data, epochs=1)[0], expected)
    score = fnn.evaluate(NET, STATE, (X, Y))
    assert fnn.evaluate(NET, STATE, BATCHES) == score and fnn.evaluate(NET, STATE, iter(BATCHES)) == score


def test_a_fraction_is_split_off_stratified_and_by_the_key():
    options = OPTIONS | {"epochs": 1, "batch_size": 12}
    y = np.where(np.arange(48) < 40, 0, Y)  # few of classes 1 and 2
    states = {}
    for seed in (0, 0, 1):
        state, history = fnn.fit(STEP, STATE, (X, y), validation=0.25, **options | {"key": jax.random.key(seed)})
        assert history.steps_per_epoch == (3,) and history.validation["loss"].shape == (1,)  # 36 examples left
        if seed in states:
            same(states[seed], state)
        states[seed] = state
    assert not np.array_equal(states[0].params[1]["kernel"], states[1].params[1]["kernel"])
    rng = fnn.datasets.dataset.generator("me", KEY, 0x5EED)
    train, held = fnn.datasets.dataset.split_index("me", y, rng, validation=0.25)
    assert sorted([*train, *held]) == list(range(48)) and set(y[held]) == set(y[train]) == {0, 1, 2}
    _, history = fnn.fit(STEP, STATE, (X, y), validation=0.25, **options)
    by_hand, _ = fnn.fit(STEP, STATE, (X[train], y[train]), validation=(X[held], y[held]), **options)
    same(by_hand, states[0])
    for bad, kind in (
        (0.0, ValueError),
        (1.0, ValueError),
        (-0.5, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
    ):
        with pytest.raises(kind, match="fit: validation must"):
            fnn.fit(STEP, STATE, (X, y), validation=bad, **options)
    with pytest.raises(
        ValueError, match=r"at least 2 examples of every class, got class 2 with 1; or pass validation=\(x, y\)"
    ):
        fnn.fit(STEP, STATE, (X, np.where(np.arange(48) == 5, 2, 0)), validation=0.25, **options)


@pytest.mark.parametrize("key", [0, 1.5, "a", np.zeros(2), np.zeros((2, 2), np.uint32), np.uint32(3)], ids=repr)
def test_a_key_is_one_key(key):
    got = "must be one PRNG key, got .*; pass jax.random.key"
    for call in (
        lambda: fnn.fit(STEP, STATE, (X, Y), **OPTIONS | {"key": key}),
        lambda: fnn.TrainState.create(NET, OPTIMIZER, key, X),
        lambda: fnn.gradient_flow(NET, STATE, (X, Y), key=key),
        lambda: fnn.per_example(lambda p, example, k: jnp.sum(p))(jnp.ones(4), X, key=key),
        lambda: fnn.data.split(X, Y, key=key),
    ):
        with pytest.raises(TypeError, match=got):
            call()


def test_keys_of_both_kinds_and_numpys_integers_are_taken():
    options = {"epochs": np.int64(1), "batch_size": np.int32(16), "patience": np.int16(1), "validation": (X, Y)}
    one, _ = fnn.fit(STEP, STATE, (X, Y), key=jax.random.PRNGKey(0), **options)
    two, _ = fnn.fit(STEP, STATE, (X, Y), key=jax.random.key(0), **options)
    same(one, two)
    for name in ("epochs", "batch_size", "patience"):
        for bad in (1.5, True, "1"):
            with pytest.raises(TypeError, match=f"fit: {name} must be a positive integer, got {bad!r}"):
                fnn.fit(STEP, STATE, (X, Y), key=KEY, **options | {name: bad})


# --- what does not belong together -----------------------------------------------------------------------------------


# --- models of other libraries ---------------------------------------------------------------------------------------


def test_norms_of_batches_that_differ_in_size_are_filled_up(tmp_path):
    """A smaller batch first, so that a checkpoint cannot know the width from the first one."""
    step = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER, per_example="norms")
    batches = [(X[:5], Y[:5]), (X[:16], Y[:16]), (X[16:20], Y[16:20])]
    _, history = fnn.fit(step, STATE, batches, epochs=1, checkpoint=tmp_path)
    norms = history.train["per_example_norms"]
    np.testing.assert_allclose(history.by_epoch("per_example_norms"), [np.nanmean(norms)], rtol=1e-6)
    assert norms.shape == (3, 16) and np.isfinite(norms).sum(1).tolist() == [5, 16, 4]
    state, again = fnn.fit(step, STATE, batches, epochs=2, checkpoint=tmp_path)
    np.testing.assert_array_equal(again.train["per_example_norms"][:3], norms)
    assert int(state.step) == 6
