"""A run of `fit` that is interrupted anywhere and run again ends with the same bits as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same

import fnn
from fnn.training import batches, checkpoint, feed

NET = fnn.serial(fnn.dense(8), fnn.batch_norm(), fnn.activation("relu"), fnn.dropout(0.2), fnn.dense(3))
OPTIMIZER = optax.adam(3e-2)
STEP = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER)
RNG = np.random.default_rng(0)
Y = np.arange(96, dtype=np.int32) % 3
X = np.asarray(RNG.normal(size=(96, 4)) + np.eye(4)[Y], np.float32)
KEY = jax.random.key(0)
STATE = fnn.TrainState.create(NET, OPTIMIZER, KEY, X)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 96, 8)]


class Shuffling:
    """Batches whose order is drawn anew by a generator of their own in every pass."""

    def __init__(self):
        self.rng = np.random.default_rng(5)

    def __iter__(self):
        return (BATCHES[i] for i in self.rng.permutation(len(BATCHES)))


class Settable:
    """Batches whose iterator can be set to where it was; a pass counts how many it reads."""

    read = 0

    def __init__(self, kind=dict):
        self.kind = kind

    def __iter__(self):
        return SettableIterator(self.kind)


class SettableIterator:
    def __init__(self, kind):
        self.kind, self.at = kind, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(BATCHES):
            raise StopIteration
        self.at += 1
        Settable.read += 1
        return BATCHES[self.at - 1]

    def get_state(self):
        return {dict: {"at": self.at}, bytes: bytes([self.at]), set: {self.at}}[self.kind]

    def set_state(self, state):
        self.at = state["at"] if self.kind is dict else state[0]


MEMORY = {"epochs": 4, "batch_size": 8, "key": jax.random.key(3)}
CASES = {
    "in memory": lambda: ((X, Y), MEMORY | {"validation": 0.25, "patience": 3}),
    "by steps": lambda: ((X, Y), MEMORY | {"save_every": (5, "steps"), "validation": (X, Y)}),
    "the state's key": lambda: ((X, Y), MEMORY | {"key": None, "save_every": 2}),
    "one by one": lambda: ((X, Y), MEMORY | {"scan": False, "save_every": (5, "steps")}),
    "a list": lambda: (BATCHES, {"epochs": 4, "save_every": (5, "steps"), "validation": BATCHES}),
    "shuffling": lambda: (Shuffling(), {"epochs": 4, "save_every": (5, "steps")}),
    "settable": lambda: (Settable(), {"epochs": 4, "save_every": (5, "steps")}),
    "an iterator": lambda: (iter(BATCHES), {"epochs": 1, "save_every": (5, "steps")}),
}


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    """Several stretches to an epoch."""
    monkeypatch.setattr(feed, "LONGEST", 4)
    monkeypatch.setattr(batches, "READ", 3)


def raise_at(*steps):
    def look(report):
        if report.step in steps:
            raise KeyboardInterrupt

    return {"on_step_every": (1, look)}


def assert_same_run(got, want):
    (a, one), (b, two) = got, want
    assert_same(
        {"p": a.params, "s": a.net_state, "o": a.opt_state}, {"p": b.params, "s": b.net_state, "o": b.opt_state}
    )
    assert int(a.step) == int(b.step)
    assert_same(jax.random.key_data(a.key), jax.random.key_data(b.key))
    assert one.train.keys() == two.train.keys() and one.validation.keys() == two.validation.keys()
    assert_same((one.train, one.validation), (two.train, two.validation))
    rest = [(h.steps_per_epoch, h.best_epoch, h.stopped_early, h.nonfinite_step) for h in (one, two)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_interrupted_again_and_again_ends_with_the_same_bits(name, tmp_path):
    data, options = CASES[name]()
    want = fnn.fit(STEP, STATE, data, **options | {"save_every": None})
    total = sum(want[1].steps_per_epoch)
    for step in (1, 6, 7, 12, 24, 31, 47):
        data, options = CASES[name]()
        if step < total:
            with pytest.raises(KeyboardInterrupt):
                fnn.fit(STEP, STATE, data, checkpoint=tmp_path / "run", **options, **raise_at(step))
    data, options = CASES[name]()
    got = fnn.fit(STEP, STATE, data, checkpoint=tmp_path / "run", **options)
    assert_same_run(got, want)
    assert os.listdir(tmp_path / "run") == ["checkpoint.npz"]
    data, options = CASES[name]()
    before = Settable.read
    assert_same_run(fnn.fit(STEP, STATE, data, checkpoint=tmp_path / "run", **options, **raise_at(*range(99))), want)
    assert Settable.read - before <= 1  # it looks at the first batch and reads no further
    like = fnn.TrainState.create(NET, OPTIMIZER, KEY, X)
    if "patience" not in options:
        assert_same(fnn.load(tmp_path / "run", like).params, want[0].params)


class Immediate:
    """An executor that waits for each call."""

    def __init__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self):
        pass


@pytest.fixture
def immediately(monkeypatch):
    """Every save that is due is written."""
    monkeypatch.setattr(checkpoint, "ThreadPoolExecutor", Immediate)


@pytest.mark.parametrize("kind", [dict, bytes])
def test_an_iterator_that_can_be_set_reads_nothing_again(kind, tmp_path, immediately):
    options = {"epochs": 3, "checkpoint": tmp_path, "save_every": (5, "steps")}
    with pytest.raises(KeyboardInterrupt):
        fnn.fit(STEP, STATE, Settable(kind), **options, **raise_at(32))
    before = Settable.read
    state, _ = fnn.fit(STEP, STATE, Settable(kind), **options)
    assert Settable.read - before == 36 - 30 + 1  # from step 30 on, after a look at the first batch
    assert_same(state.params, fnn.fit(STEP, STATE, BATCHES, epochs=3)[0].params)


def test_an_iterator_s_state_that_json_cannot_hold(tmp_path):
    with pytest.raises(
        TypeError, match=r"^fit: get_state\(\) of the data's iterator must return bytes or what JSON can hold"
    ):
        fnn.fit(STEP, STATE, Settable(set), epochs=1, checkpoint=tmp_path)


def test_two_epochs_and_two_more_are_four(tmp_path):
    for key in (jax.random.key(3), None):
        options = MEMORY | {"key": key, "validation": 0.25}
        four, history = fnn.fit(STEP, STATE, (X, Y), **options)
        two, first = fnn.fit(STEP, STATE, (X, Y), **options | {"epochs": 2})
        again, second = fnn.fit(STEP, two, (X, Y), **options | {"epochs": 2})
        assert_same((again.params, again.opt_state, again.net_state), (four.params, four.opt_state, four.net_state))
        assert_same(np.concatenate([first.train["loss"], second.train["loss"]]), history.train["loss"])
        assert_same(np.concatenate([first.validation["loss"], second.validation["loss"]]), history.validation["loss"])
        assert not np.array_equal(history.train["loss"][:9], history.train["loss"][9:18])
    # From the middle of an epoch on: it is finished first, and counts as one.
    with pytest.raises(KeyboardInterrupt) as interrupted:
        fnn.fit(STEP, STATE, (X, Y), **options, **raise_at(14))
    middle = interrupted.value.state
    again, rest = fnn.fit(STEP, middle, (X, Y), **options | {"epochs": 3})
    with pytest.warns(
        UserWarning, match="^fit: the state is 5 steps into an epoch of 9, of which the first epoch has only"
    ):
        other, _ = fnn.fit(STEP, jax.tree.map(jnp.copy, middle), (X, Y), **options | {"epochs": 3})
    assert_same(other.params, again.params)
    assert_same((again.params, again.opt_state, again.net_state), (four.params, four.opt_state, four.net_state))
    assert rest.steps_per_epoch == (4, 9, 9)
    # So it is in a folder, asked for more.
    folder = {"checkpoint": tmp_path / "run"}
    fnn.fit(STEP, STATE, (X, Y), **options | {"epochs": 2}, **folder)
    assert_same_run(fnn.fit(STEP, STATE, (X, Y), **options, **folder), (four, history))
    with pytest.raises(ValueError, match=r"^fit: the run in .* has 4 epochs, got epochs=3; ask for as many"):
        fnn.fit(STEP, STATE, (X, Y), **options | {"epochs": 3}, **folder)


def test_metrics_by_layer_and_bfloat16_come_back(tmp_path):
    net = fnn.serial(fnn.tap(), fnn.repeat(fnn.residual(fnn.dense(4)), 3), fnn.dense(3))
    step = fnn.train_step(net, fnn.losses.cross_entropy, OPTIMIZER, per_layer=True)
    state = fnn.TrainState.create(net, OPTIMIZER, KEY, X)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (state.params, state.opt_state[0].mu))
    state = state.replace(params=low[0], opt_state=OPTIMIZER.init(low[0]))
    want = fnn.fit(step, state, (X, Y), **MEMORY)
    with pytest.raises(KeyboardInterrupt):
        fnn.fit(step, state, (X, Y), **MEMORY, checkpoint=tmp_path, **raise_at(30))
    got = fnn.fit(step, state, (X, Y), **MEMORY, checkpoint=tmp_path)
    assert_same_run(got, want)
    assert jax.tree.structure(got[1].train) == jax.tree.structure(want[1].train)
    assert jax.tree.leaves(got[0].params)[0].dtype == jnp.bfloat16


# --- kill -9 ---------------------------------------------------------------------------------------------------------

CHILD = """if True:
    import sys, time
    import test_checkpoint as t
    import fnn

    def look(report):
        print(report.step, flush=True)
        time.sleep(0.02)

    options = t.MEMORY | {"epochs": int(sys.argv[3]), "validation": 0.25, "patience": 10**6}
    state, history = fnn.fit(t.STEP, t.STATE, (t.X, t.Y), checkpoint=sys.argv[1], on_epoch=look, **options)
    fnn.save(sys.argv[2], {"state": state, "train": history.train, "validation": history.validation,
                           "rest": [history.best_epoch, *history.steps_per_epoch]})
"""


def run_with_kills(folder, kills, epochs):
    """Run a child process, kill it so often at random moments, and return what it saved when it was let be."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    result = folder / "result.npz"
    command = [sys.executable, "-c", CHILD, str(folder / "run"), str(result), str(epochs)]
    draw, begun = random.Random(kills), []
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            begun.append(int(child.stdout.readline()))
            for _ in range(4 * (kills == 1)):  # a single kill comes when something was saved
                child.stdout.readline()
            time.sleep(draw.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL and not result.exists()
    last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return result, [*begun, int(last.stdout.split()[0])]


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_bits(kills, tmp_path):
    options = MEMORY | {"epochs": 12 * (kills + 1), "validation": 0.25, "patience": 10**6}
    state, history = fnn.fit(STEP, STATE, (X, Y), **options)
    rest = [history.best_epoch, *history.steps_per_epoch]
    want = {"state": state, "train": history.train, "validation": history.validation, "rest": rest}
    result, begun = run_with_kills(tmp_path, kills, options["epochs"])
    got = fnn.load(result, want)
    assert begun == sorted(begun) and begun[-1] > begun[0]  # it did go on from where it was
    assert_same(jax.random.key_data(got["state"].key), jax.random.key_data(state.key))
    got["state"], want["state"] = (tree["state"].replace(key=0) for tree in (got, want))
    assert_same(got, want)
