"""`fit(..., recorder=K)` and `replay`: the recorded steps come back, and what was planted is what removes the spike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same

import fnn
from fnn.training import batches, feed, recorder

RNG = np.random.default_rng(0)
X = np.asarray(RNG.normal(size=(320, 8)), np.float32)
Y = np.asarray(X @ RNG.normal(size=(8, 1)) + 0.3 * RNG.normal(size=(320, 1)), np.float32)
LINE = fnn.dense(1)
NET = fnn.serial(fnn.dense(16), fnn.activation("relu"), fnn.dense(1))
KEY = jax.random.key(1)
MEMORY = {"batch_size": 16, "key": KEY}


def cut(x, y):
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, len(x), 16)]


def trained(net, optimizer, data, *, recorder=30, options=None, **fit):
    """Train; return the step, which holds the recording."""
    step = fnn.train_step(net, fnn.losses.mse, optimizer, **(options or {}))
    state = fnn.TrainState.create(net, optimizer, KEY, X[:16])
    fit = {"epochs": 1} | (MEMORY if isinstance(data, tuple) else {}) | fit
    return step, fnn.fit(step, state, data, recorder=recorder, **fit)


def change(found, name):
    return next(c for c in found.changes if c.name == name)


@pytest.mark.parametrize("way", ["memory", "one by one", "batches", "batches one by one"])
def test_the_recorded_steps_come_back_bit_for_bit(way, monkeypatch):
    monkeypatch.setattr(feed, "LONGEST", 6)
    monkeypatch.setattr(batches, "READ", 6)
    net = fnn.serial(fnn.dense(8), fnn.batch_norm(), fnn.dropout(0.2), fnn.activation("tanh"), fnn.dense(1))
    data = cut(X, Y) if "batches" in way else (X, Y)
    step, (state, history) = trained(net, optax.adam(1e-2), data, epochs=3, recorder=9, scan="one by one" not in way)
    kept = step.recording
    assert 9 <= len(kept.losses) <= 2 * 9 + 2 * 6 and kept.end == 60  # two copies in turn, at ends of stretches
    assert_same(kept.losses, history.train["loss"][kept.first :])
    again, losses = kept.rerun(kept.end)
    assert_same((again.params, again.opt_state, losses), (state.params, state.opt_state, kept.losses))
    middle, _ = kept.rerun(kept.first + 8)  # within a stretch
    for number in range(kept.first + 8, kept.end):
        middle, metrics = step(middle, kept.batch(number))
        np.testing.assert_allclose(metrics["loss"], history.train["loss"][number], rtol=1e-4)
    x, _ = kept.batch(45)
    rows = [kept.row(45, i) for i in range(16)]
    assert rows == [None] * 16 if "batches" in way else np.array_equal(X[rows], x)


def test_recording_changes_nothing_and_goes_on_in_the_middle_of_an_epoch():
    step, (state, history) = trained(NET, optax.adam(1e-2), (X, Y), epochs=2)
    plain = fnn.fit(step, fnn.TrainState.create(NET, step.optimizer, KEY, X[:16]), (X, Y), epochs=2, **MEMORY)
    assert_same((plain[0].params, plain[1].train), (state.params, history.train))
    assert step.recording is None  # nothing was recorded by this call
    stop = {"on_step_every": (7, lambda report: report.step == 28)}
    step, (state, _) = trained(NET, optax.adam(1e-2), (X, Y), epochs=2, **stop)
    with pytest.warns(UserWarning, match="steps into an epoch"):
        _, history = fnn.fit(step, state, (X, Y), epochs=2, recorder=50, **MEMORY)
    assert (step.recording.first, step.recording.end) == (28, 60)
    assert_same(step.recording.rerun(60)[1], history.train["loss"])


def test_one_poisoned_label_is_named_and_its_weight_0_removes_the_spike():
    y = Y.copy()
    y[77] *= 1e4
    step, (_, history) = trained(NET, optax.adam(1e-2), (X, y))
    found = fnn.replay(step.recording)
    assert found.exact and found.reproduced and found.spike == history.train["loss"].argmax()
    assert found.removed_by == ("suspects weighted 0",)
    (suspect,) = found.suspects
    assert suspect.row == 77 and suspect.step == found.spike
    np.testing.assert_array_equal(
        found.control[: found.spike], change(found, "suspects weighted 0").losses[: found.spike]
    )
    # By hand: the loss of that step without the example.
    before, _ = step.recording.rerun(found.spike)
    x, t = step.recording.batch(found.spike)
    keep = np.arange(16) != suspect.index
    squares = (np.asarray(NET.apply(before.params, before.net_state, x)[0]) - np.asarray(t))[:, 0] ** 2
    own = change(found, "suspects weighted 0").losses[found.spike]
    np.testing.assert_allclose(own, squares[keep].mean(), rtol=1e-3)
    gradient = jax.grad(lambda p: fnn.losses.mse(NET.apply(p, before.net_state, x)[0], t)[suspect.index])
    np.testing.assert_allclose(suspect.norm, optax.tree.norm(jax.jit(gradient)(before.params)), rtol=1e-3)
    assert "row 77" in str(found) and found.table()["removes"].sum() == 1


def test_one_poisoned_input_that_ends_in_nan():
    x = X.copy()
    x[77] *= 1e4
    with pytest.warns(RuntimeWarning, match="no longer finite"):
        step, _ = trained(NET, optax.sgd(1e-2), (x, Y))
    found = fnn.replay(step.recording)
    assert np.isnan(found.peak) and found.removed_by == ("suspects weighted 0",) and found.suspects[0].row == 77
    assert found.not_tried["second moment reset"] == "the optimizer keeps none that can be reset (one with the name nu)"


def test_a_nan_in_a_batch_from_outside():
    x = X.copy()
    x[165, 2] = np.nan
    with pytest.warns(RuntimeWarning, match="no longer finite"):
        step, _ = trained(LINE, optax.adam(1e-2), cut(x, Y))
    found = fnn.replay(step.recording)
    assert found.spike == 10 and not np.isfinite(found.at) and found.before < 100
    assert found.removed_by == ("suspects weighted 0",) and found.suspects[0][:3] == (10, 5, None)
    assert "not finite" in str(found)


def test_a_nan_in_the_very_first_batch():
    x = X.copy()
    x[3, 2] = np.nan
    with pytest.warns(RuntimeWarning, match="no longer finite"):
        step, _ = trained(LINE, optax.adam(1e-2), cut(x, Y))
    found = fnn.replay(step.recording)
    assert found.spike == found.first == 0 and np.isnan(found.before)
    assert found.removed_by == ("suspects weighted 0",) and found.suspects[0][:2] == (0, 3)
    assert found.not_tried["gradient clipped"].startswith("no step before")


def test_a_rate_that_is_too_high():
    rate = optax.piecewise_constant_schedule(0.05, {60: 12.0})  # 0.6: curvature times it exceeds 2 in some batches
    step, _ = trained(LINE, optax.sgd(rate), (X, Y), epochs=10)
    found = fnn.replay(step.recording)
    assert found.peak > 4 * found.before and "rate halved" in found.removed_by
    assert "suspects weighted 0" not in found.removed_by and found.not_tried["rate × 0.1"] == "half of it was enough"
    halved = fnn.train_step(LINE, fnn.losses.mse, optax.chain(step.given["optimizer"], optax.scale(0.5)))
    state, _ = step.recording.rerun(found.first)
    state = state.replace(opt_state=(state.opt_state, optax.EmptyState()))
    for number in range(found.first, found.spike + 1):
        state, metrics = halved(state, step.recording.batch(number))
    np.testing.assert_allclose(
        metrics["loss"], change(found, "rate halved").losses[found.spike - found.first], rtol=1e-4
    )


def silent(steps=1500, loud=60, size=0.0):
    """Steps whose inputs, and so gradients, are tiny, then some that are not. The targets are noise."""
    rng = np.random.default_rng(1)
    for i in range(steps + loud):
        x = rng.normal(size=(16, 8)) * (size if i < steps else 1)
        yield np.asarray(x, np.float32), np.asarray(rng.normal(size=(16, 1)), np.float32)


def test_a_second_moment_that_a_silent_stretch_left_too_small():
    net = fnn.dense(1, bias=False, kernel_init="zeros")
    step, _ = trained(net, optax.adam(0.3, eps=1e-3), list(silent(size=1e-6)), recorder=40)
    found = fnn.replay(step.recording)
    assert 1500 < found.spike < 1510
    assert {"second moment reset", "gradient clipped"} <= set(found.removed_by)
    assert "suspects weighted 0" not in found.removed_by
    assert change(found, "second moment reset").relative < 0.5 * change(found, "rate halved").relative
    begin = int(change(found, "second moment reset").detail.split()[-1])
    state, _ = step.recording.rerun(begin)
    state = state.replace(opt_state=step.optimizer.init(state.params))  # by hand
    for number in range(begin, found.spike + 10):
        state, metrics = step(state, step.recording.batch(number))
    own = change(found, "second moment reset").losses[number - found.first]
    np.testing.assert_allclose(metrics["loss"], own, rtol=1e-4)


def test_adam_without_a_gradient_before_has_no_norm_to_clip_at():
    step, _ = trained(fnn.dense(1, bias=False), optax.adam(0.2), list(silent(300)), recorder=40)
    found = fnn.replay(step.recording, spike=300)
    assert found.not_tried["gradient clipped"].startswith("no step before the spike")


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        ([1.0] * 20 + [1.04] + [1.0] * 5, None),  # below 5 times 1 %
        ([1.0] * 20 + [1.06] + [1.0] * 5, 20),
        (np.linspace(3, 1, 40), None),
        ([*np.linspace(3, 1, 40), 5.0, np.nan, np.nan], 40),  # the climb to it belongs to it
        ([1.0, 1.1, 9.0, 1.0, 1.1], None),
        ([1.0, 1.1, 12.0, 1.0, 1.1], 2),  # early, but tenfold
        ([np.nan] * 3, 0),
        ([1, 2] * 10 + [9.0, 9.0] + [1, 2] * 10 + [20.0] + [1, 2] * 3, 42),  # the higher of two
        ([1, 2] * 10 + [9.0, 9.0] + [1, 2] * 3 + [20.0] + [1, 2] * 3, 20),  # one, with a pause
        ([0.0] * 20 + [1e-3], 20),
        ([-5.0] * 20 + [-4.0], 20),
    ],
)
def test_where_a_spike_begins(losses, index):
    found = recorder.find(np.array(losses, np.float32))
    assert (None if found is None else found.index) == index


def test_a_limit_by_hand():
    noise = np.random.default_rng(0).normal(size=60)
    found = recorder.find(np.append(noise, 50.0))
    median = np.sort(noise[10:])[24:26].mean()
    mad = np.sort(np.abs(noise[10:] - median))[24:26].mean()
    high = np.sort(noise[10:])[44] + 0.1 * np.diff(np.sort(noise[10:])[44:46])[0]  # of 50, at 0.9 * 49 = 44.1
    size = max(mad, (high - median) / 2)
    np.testing.assert_allclose(
        (found.median, found.limit, found.height), (median, median + 5 * size, (50 - median) / size)
    )


@pytest.mark.parametrize("outside", [False, True], ids=["memory", "batches"])
def test_what_is_kept_of_a_spike_stays_while_the_run_goes_on(outside, monkeypatch):
    monkeypatch.setattr(feed, "LONGEST", 8)
    monkeypatch.setattr(batches, "READ", 8)
    rate = optax.join_schedules([optax.constant_schedule(r) for r in (0.02, 0.7, 0.02)], [130, 145])
    step, (_, history) = trained(LINE, optax.sgd(rate), cut(X, Y) if outside else (X, Y), epochs=15, recorder=16)
    kept, losses = step.recording, history.train["loss"]
    found = fnn.replay(kept)
    assert kept.first + 8 <= found.spike and kept.end <= found.spike + 3 * 16 + 2 * 8 < 300 == len(losses)
    assert_same(kept.losses, losses[kept.first : kept.end])
    assert found.exact and 130 <= found.spike < 140 and "rate halved" in found.removed_by


def test_beta2_and_float32_where_they_can_be_changed():
    optimizer = optax.inject_hyperparams(optax.adam)(1e-2, b2=0.999)
    x = X.copy()
    x[77] *= 1e6  # beyond float16
    step, _ = trained(LINE, optimizer, (x, Y), options={"compute_dtype": jnp.float16}, stop_nonfinite=False, epochs=1)
    found = fnn.replay(step.recording)
    assert np.isnan(found.peak) and found.not_tried == {}
    assert "rate × 0.1" in [c.name for c in found.changes]
    assert np.isfinite(change(found, "float32").losses).all()
    own = fnn.train_step(LINE, fnn.losses.mse, optax.adam(1e-2, b2=0.95), compute_dtype=jnp.float16)
    state = fnn.TrainState.create(LINE, own.optimizer, KEY, X[:16])
    _, by_hand = fnn.fit(own, state, (x, Y), epochs=1, stop_nonfinite=False, **MEMORY)
    np.testing.assert_allclose(change(found, "β₂ = 0.95").losses, by_hand.train["loss"], rtol=1e-3)


@pytest.mark.parametrize("wrap", [fnn.optimizers.packed, lambda tx: tx], ids=["packed", "plain"])
def test_deep_nets_with_clips_and_weights(wrap):
    net = fnn.serial(
        fnn.dense(8), fnn.repeat(fnn.serial(fnn.dense(8), fnn.batch_norm(), fnn.activation("tanh")), 3), fnn.dense(1)
    )
    optimizer = wrap(optax.chain(fnn.clip.by_global_norm(1.0), optax.adamw(1e-2)))
    y, weights = Y.copy(), np.asarray(RNG.uniform(0.5, 1.5, 320), np.float32)
    y[77] *= 1e4
    step, (_, history) = trained(net, optimizer, (X, y, weights))
    found = fnn.replay(step.recording)
    np.testing.assert_allclose(found.control, history.train["loss"], rtol=1e-3)
    assert found.exact and found.removed_by == ("suspects weighted 0",) and found.suspects[0].row == 77
    assert "second moment reset" in [c.name for c in found.changes]


def test_a_run_that_fails_or_goes_on_from_a_checkpoint_has_a_recording(tmp_path):
    def broken():
        yield from cut(X, Y)
        raise OSError("the disk")

    optimizer = optax.adam(1e-2)
    step = fnn.train_step(LINE, fnn.losses.mse, optimizer)
    state = fnn.TrainState.create(LINE, optimizer, KEY, X[:16])
    with pytest.raises(OSError, match="the disk"):
        fnn.fit(step, state, broken(), epochs=1, recorder=4)
    kept = step.recording
    assert kept.end == int(step.unfinished[0].step) and np.array_equal(kept.rerun(kept.end)[1], kept.losses)
    fnn.fit(step, state, (X, Y), epochs=1, checkpoint=tmp_path, recorder=4, **MEMORY)
    _, history = fnn.fit(step, state, (X, Y), epochs=2, checkpoint=tmp_path, recorder=4, **MEMORY)
    kept = step.recording
    assert (kept.first, kept.end) == (20, 40)
    assert_same(kept.rerun(40)[1], history.train["loss"][20:])
    assert str(kept).startswith("Recording(steps 20 to 39; ")


def test_refusals():
    step, _ = trained(LINE, optax.sgd(0.01), (X, Y))
    with pytest.raises(TypeError, match="replay: recording must be step.recording after .* got None;"):
        fnn.replay(None)
    with pytest.raises(ValueError, match="replay: the recording must have a spike, got none in steps 0 to 19; name"):
        fnn.replay(step.recording)
    with pytest.raises(ValueError, match="with one before it, 1 to 19, got 20; choose"):
        fnn.replay(step.recording, spike=20)
    with pytest.raises(ValueError, match="fit: recorder must be a positive integer, got 0"):
        trained(LINE, optax.sgd(0.01), (X, Y), recorder=0)
    with pytest.raises(ValueError, match="fit: recorder= must be left out with mesh=, got recorder=30; train on one"):
        trained(LINE, optax.sgd(0.01), (X, Y), mesh=jax.make_mesh((1,), ("data",)))
    found = fnn.replay(step.recording, spike=12)
    assert not found.reproduced and found.removed_by == () and "no change is judged" in str(found)
