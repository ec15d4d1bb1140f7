"""Checkpoints: another run, other data and folders that hold something else are refused, and nothing is lost."""

import os

import jax
import jax.numpy as jnp
import optax
import pytest
from test_checkpoint import (
    BATCHES,
    KEY,
    MEMORY,
    NET,
    OPTIMIZER,
    STATE,
    STEP,
    X,
    Y,
    immediately,  # noqa: F401
    raise_at,
    short_stretches,  # noqa: F401
)

import fnn
from fnn.training import saving


def _state(net=NET, optimizer=OPTIMIZER, key=KEY):
    return fnn.TrainState.create(net, optimizer, key, X)


def _weighted(last):
    """A loss whose weights are values inside of a compiled function."""
    weights = jnp.array([1.0, 2.0, last])
    loss = jax.jit(lambda o, y: optax.softmax_cross_entropy_with_integer_labels(o, y) * weights[y])
    return {"step": fnn.train_step(NET, loss, OPTIMIZER)}


def _injected(rate):
    return _other(optimizer=optax.inject_hyperparams(optax.adam)(learning_rate=rate))


def _other(net=NET, loss=fnn.losses.cross_entropy, optimizer=OPTIMIZER, **options):
    return {"step": fnn.train_step(net, loss, optimizer, **options), "state": _state(net, optimizer)}


WIDER = fnn.serial(fnn.dense(9), fnn.batch_norm(), fnn.activation("relu"), fnn.dropout(0.2), fnn.dense(3))
TANH = fnn.serial(fnn.dense(8), fnn.batch_norm(), fnn.activation("tanh"), fnn.dropout(0.2), fnn.dense(3))
PROGRAM = r"the step \(net, loss or the optimizer's settings\) must be as in the run"
OTHERS = {
    "wider": (lambda: _other(WIDER), "must be as in the run in|at 'params/0/bias'"),
    "another activation": (lambda: _other(TANH), PROGRAM),
    "another rate": (lambda: _other(optimizer=optax.adam(1e-2)), PROGRAM),
    "another optimizer": (lambda: _other(optimizer=optax.sgd(1e-2)), "got one more leaf, at 'opt_state/0/count'"),
    "another loss": (lambda: _other(loss=lambda o, y: 2 * fnn.losses.cross_entropy(o, y)), PROGRAM),
    "another dtype": (lambda: _other(compute_dtype=jnp.bfloat16), PROGRAM),
    "another state's key": (lambda: {"state": _state(key=jax.random.key(1))}, "the state's key must be as in the run"),
    "other first parameters": (
        lambda: {"state": STATE.replace(params=jax.tree.map(lambda a: 2 * a, STATE.params))},
        "the first parameters, at 0/kernel, must be as|first parameters, at 0/kernel",
    ),
    "a state further on": (
        lambda: {"state": STATE.replace(step=jnp.int32(4))},
        r"the state's step must be .*, 0, got 4",
    ),
    "another key": (lambda: {"key": jax.random.key(4)}, r"key must be as in the run in .*, \[0, 3\], got \[0, 4\]"),
    "another size": (lambda: {"batch_size": 12}, "batch_size must be as in the run in .*, 8, got 12"),
    "other data": (lambda: {"data": (X + 1e-6, Y)}, r"training data must be as in the run in .*, \(float32\[96,4\]"),
    "other labels": (lambda: {"data": (X, (Y + 1) % 3)}, "training data must be as"),
    "other validation": (lambda: {"validation": (X[:-1], Y[:-1])}, "validation data must be as in the run"),
    "patience": (lambda: {"patience": 2}, "patience must be as in the run in .*, None, got 2"),
}


PAIRS = {
    "values inside of a compiled loss": (lambda: (_weighted(3.0), _weighted(4.0)), PROGRAM),
    "a rate in the optimizer's state": (
        lambda: (_injected(0.1), _injected(0.01)),
        "first optimizer state, at hyperparams/learning_rate must be as",
    ),
    "other statistics of the net": (
        lambda: ({}, {"state": STATE.replace(net_state=jax.tree.map(lambda a: a + 1, STATE.net_state))}),
        "first statistics of the net, at 1/mean must be as",
    ),
    "first parameters of another sign": (
        lambda: ({}, {"state": STATE.replace(params=jax.tree.map(lambda a: -a, STATE.params))}),
        "first parameters, at 0/kernel must be as",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    call(folder)
    return folder


def call(folder, **options):
    options = MEMORY | {"epochs": 1, "step": STEP, "state": STATE, "data": (X, Y), "validation": (X, Y)} | options
    return fnn.fit(options.pop("step"), options.pop("state"), options.pop("data"), checkpoint=folder, **options)


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_and_the_difference_named(name, finished):
    change, sentence = OTHERS[name]
    before = (finished / "checkpoint.npz").read_bytes()
    with pytest.raises(ValueError, match=f"^fit: checkpoint: .*({sentence})") as error:
        call(finished, **change())
    assert "\n" not in str(error.value)
    assert (finished / "checkpoint.npz").read_bytes() == before


@pytest.mark.parametrize("name", PAIRS)
def test_what_no_program_s_text_shows_is_compared_too(name, tmp_path):
    pair, sentence = PAIRS[name]
    first, second = pair()
    call(tmp_path / "run", **first)
    call(tmp_path / "run", **first)
    with pytest.raises(ValueError, match=f"^fit: checkpoint: .*({sentence})"):
        call(tmp_path / "run", **second)


def test_a_file_that_holds_less_about_its_run_is_taken(tmp_path):
    """As earlier versions wrote: norms of the first parameters alone, nothing of the other parts of the first state."""
    call(tmp_path)
    content, header = saving.read(tmp_path / "checkpoint.npz", "fit")
    about = {name: part for name, part in header["about"].items() if name != "first optimizer state"}
    about["first parameters"] = {name: norm for name, (norm, _) in about["first parameters"].items()}
    saving.write(tmp_path / "checkpoint.npz", content, header | {"about": about}, "fit")
    call(tmp_path)
    with pytest.raises(ValueError, match="first parameters, at 0/kernel must be as"):
        call(tmp_path, state=STATE.replace(params=jax.tree.map(lambda a: 2 * a, STATE.params)))


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="^fit: checkpoint must be a new folder or one that fit wrote, got .*'notes.txt'"
    ):
        call(tmp_path)
    with pytest.raises(ValueError, match="^fit: checkpoint must be a folder, got the file"):
        call(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    saved = tmp_path / "saved"
    saved.mkdir()
    fnn.save(saved / "checkpoint.npz", STATE)
    with pytest.raises(ValueError, match=r"^fit: .*checkpoint.npz must be a file of fit, got one of fnn.save"):
        call(saved)
    (saved / "checkpoint.npz").write_bytes(b"torn")
    with pytest.raises(ValueError, match="must be a file that fnn.save or fit wrote, got one that is damaged"):
        call(saved)
    with pytest.raises(TypeError, match="^fit: save_every needs a folder"):
        fnn.fit(STEP, STATE, (X, Y), **MEMORY, save_every=3)
    for bad in (0, (0, "steps"), 1.5):
        with pytest.raises((ValueError, TypeError), match="^fit: save_every must be a positive integer"):
            call(tmp_path / "new", save_every=bad)


def test_other_batches_are_refused(tmp_path, immediately):  # noqa: F811
    options = {"epochs": 3, "checkpoint": tmp_path, "save_every": (5, "steps")}
    with pytest.raises(KeyboardInterrupt):
        fnn.fit(STEP, STATE, BATCHES, **options, **raise_at(17))  # saved at 15: three batches into the second epoch
    with pytest.raises(ValueError, match="got another batch where it was; pass the same, in the same order"):
        fnn.fit(STEP, STATE, BATCHES[::-1], **options)
    with pytest.raises(ValueError, match="got 6 batches in epoch 0, not 12; pass the same"):
        fnn.fit(STEP, STATE, BATCHES[:6], **options)


def test_a_folder_that_cannot_be_written_ends_the_run_and_loses_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="^fit: cannot write .*checkpoint.npz: No space left on device") as error:
        call(tmp_path / "run", epochs=3)
    assert int(error.value.state.step) in (12, 24, 36)
    assert os.listdir(tmp_path / "run") == []
