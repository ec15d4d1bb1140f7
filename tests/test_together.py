"""Parts of training that meet in one call: checkpoints, loggers, weights, meshes, averages, penalties, metrics, accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars
import pytest
from conftest import assert_same

import fnn
from fnn import tree
from fnn.training import feed

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Y = np.arange(96, dtype=np.int32) % 3
X = np.asarray(RNG.normal(size=(96, 4)) + np.eye(4)[Y], np.float32)
W = np.asarray(1 + np.arange(96) % 4, np.float32)
LOSS = fnn.losses.cross_entropy
NET = fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.repeat(fnn.residual(fnn.dense(8)), 2), fnn.dense(3))
averages = fnn.optimizers.eval_params


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(feed, "LONGEST", 4)


def begun(net, optimizer, x=X):
    return fnn.TrainState.create(net, optimizer, KEY, x)


def plain(state):
    """A state's arrays."""
    return state.replace(key=jax.random.key_data(state.key))


def near(a, b, tolerance=1e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


def interrupted_at(*steps):
    def look(report):
        if report.step in steps:
            raise KeyboardInterrupt

    return {"on_step_every": (1, look)}


# --- several devices, checkpoints, loggers, weights ------------------------------------------------------------------


def mesh_with_everything(folder):
    """On two devices, cut, weighted, with averages: interrupted and run again it is the run left alone."""
    optimizer = optax.MultiSteps(fnn.optimizers.averaged(optax.adam(1e-2), 0.9), 2)
    net = fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.dense(3))
    step, state = fnn.train_step(net, LOSS, optimizer), begun(net, optimizer)
    options = {"epochs": 5, "batch_size": 16, "validation": (X, Y, W[::-1]), "patience": 4, "evaluate_with": averages}
    one, history = fnn.fit(step, state, (X, Y, W), **options)
    mesh = jax.make_mesh((2,), ("data",))
    for shard in ("largest",):  # `placed` has whole ones
        ways = options | {"mesh": mesh, "shard": shard}
        want, curves = fnn.fit(step, state, (X, Y, W), **ways)
        near((want.params, averages(want)), (one.params, averages(one)), 1e-4)
        near((curves.train["loss"], curves.validation), (history.train["loss"], history.validation), 1e-4)
        run, file = folder / str(shard), folder / f"{shard}.csv"
        saved = {"checkpoint": run, "save_every": (3, "steps"), "log": fnn.log.csv(file), "log_every": 2}
        for at in (7, 20):
            with pytest.raises(KeyboardInterrupt):
                fnn.fit(step, state, (X, Y, W), **ways, **saved, **interrupted_at(at))
        got, again = fnn.fit(step, state, (X, Y, W), **ways, **saved)
        assert_same(plain(got), plain(want))
        assert_same((again.train, again.validation), (curves.train, curves.validation))
        rows = polars.read_csv(file)
        found = rows.filter(polars.col("name") == "loss").sort("step")
        assert found["step"].to_list() == list(range(2, 31, 2))
        near(found["value"].to_numpy(), curves.train["loss"][1::2], 1e-6)
        assert len(rows.filter(polars.col("name") == "validation/loss")) == 5


def test_a_mesh_with_checkpoint_log_weights_and_averages(tmp_path):
    code = "import pathlib, sys, test_together; test_together.mesh_with_everything(pathlib.Path(sys.argv[1]))"
    here = Path(__file__).parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    own = {"XLA_FLAGS": flags, "NPROC": "16", "JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu"}
    own["PYTHONPATH"] = os.pathsep.join((str(here.parent), str(here)))
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# --- a penalty and an optimiser that takes the loss again ------------------------------------------------------------


def test_lbfgs_searches_along_the_loss_with_its_penalty_as_by_hand():
    def penalty(params):
        return 0.05 * sum(jnp.sum(a**2) for a in jax.tree.leaves(params))

    optimizer = optax.lbfgs()
    net = fnn.serial(fnn.dense(6), fnn.activation("tanh"), fnn.dense(3))
    step = fnn.train_step(net, LOSS, optimizer, penalty=penalty)
    state = begun(net, optimizer)
    params = jax.tree.map(jnp.copy, state.params)  # the step reuses the state's memory
    kept = optimizer.init(params)

    def objective(p):
        hidden = jnp.tanh(X @ p[0]["kernel"] + p[0]["bias"])
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ p[2]["kernel"] + p[2]["bias"], Y)
        return jnp.sum(W * losses) / jnp.sum(W) + penalty(p)

    @jax.jit
    def update(params, kept):
        value, grads = jax.value_and_grad(objective)(params)
        updates, kept = optimizer.update(grads, kept, params, value=value, grad=grads, value_fn=objective)
        return optax.apply_updates(params, updates), kept, value

    totals = []
    for _ in range(6):
        state, metrics = step(state, (X, Y, W))
        params, kept, value = update(params, kept)
        np.testing.assert_allclose(metrics["loss"] + metrics["penalty"], value, rtol=1e-4)
        totals.append(float(value))
    near(state.params, params, 1e-3)
    near(optax.tree.get(state.opt_state, "value"), jax.jit(objective)(state.params))  # what the search itself has found
    assert totals == sorted(totals, reverse=True)


# --- averages, patience, checkpoints ---------------------------------------------------------------------------------


def test_patience_judges_the_averages_and_a_resumed_run_returns_the_same_best_state(tmp_path):
    optimizer = fnn.optimizers.averaged(optax.sgd(0.5), 0.8)
    step, state, seen = fnn.train_step(NET, LOSS, optimizer), begun(NET, optimizer), []
    options = {"epochs": 40, "batch_size": 16, "validation": (X[:48], Y[:48]), "patience": 3}
    options["evaluate_with"] = averages

    def look(report):
        seen.append(jax.tree.map(jnp.copy, report.state))

    best, history = fnn.fit(step, state, (X, Y), **options, on_epoch=look)
    scores = [fnn.evaluate(NET, (averages(s), s.net_state), (X[:48], Y[:48]))["loss"] for s in seen]
    near(history.validation["loss"], np.array(scores), 1e-6)
    assert history.stopped_early and len(scores) < 40 and history.best_epoch == np.argmin(scores) == len(scores) - 4
    assert_same(plain(best), plain(seen[history.best_epoch]))
    saved = {"checkpoint": tmp_path / "run", "save_every": (5, "steps")}
    for at in (8, 6 * len(scores) - 2):  # the second is after the best epoch
        with pytest.raises(KeyboardInterrupt):
            fnn.fit(step, state, (X, Y), **options, **saved, **interrupted_at(at))
    for epochs in (40, 40, 60):  # a finished run returns the same; asked for more, it is still out of patience
        again, curves = fnn.fit(step, state, (X, Y), **options | {"epochs": epochs}, **saved)
        assert_same(plain(again), plain(best))
        assert_same(curves.validation, history.validation)
        assert (curves.best_epoch, curves.stopped_early) == (history.best_epoch, True)


# --- hooks and metrics of one's own ----------------------------------------------------------------------------------


def test_hooks_see_metrics_of_one_s_own_weighted():
    def sums(outputs, y):
        hit = (outputs.argmax(1) == 0) * 1.0
        return hit, hit * (y == 0)

    precision = fnn.losses.Metric(sums, lambda s: s[1] / s[0])
    own = {"margin": lambda outputs, y: outputs.max(1) - outputs.min(1), "precision": precision}
    optimizer, seen = optax.sgd(0.1), []
    step = fnn.train_step(NET, LOSS, optimizer, metrics=["loss", own], penalty=lambda p: 1e-3 * tree.norm(p) ** 2)

    def look(report):
        logits = NET.apply(report.state.params, report.state.net_state, X)[0]
        seen.append((report, np.asarray(logits, np.float64)))

    _, history = fnn.fit(
        step, begun(NET, optimizer), (X, Y, W), epochs=2, batch_size=32, validation=(X, Y, W), on_epoch=look
    )
    for epoch, (report, logits) in enumerate(seen):
        assert report.metrics.keys() == {"loss", "penalty", "margin", "precision"}
        assert all(np.shape(rows) == (3,) for rows in report.metrics.values())
        chosen = W * (logits.argmax(1) == 0)
        margin = np.average(np.ptp(logits, axis=1), weights=W)
        expected = {"margin": margin, "precision": np.sum(chosen * (Y == 0)) / np.sum(chosen)}
        assert {name: report.validation[name] for name in own} == pytest.approx(expected, rel=1e-4)
        assert report.validation == {name: curve[epoch] for name, curve in history.validation.items()}


# --- shared layers with weights --------------------------------------------------------------------------------------


def test_a_shared_layer_trains_on_weighted_examples_as_by_hand():
    net = fnn.shared(
        fnn.dense(4), lambda use: fnn.serial(use(), fnn.activation("tanh"), fnn.flatten(), use(), fnn.dense(3))
    )
    optimizer = optax.sgd(0.5)
    step, state = fnn.train_step(net, LOSS, optimizer), begun(net, optimizer)

    def objective(p):
        w, b, out = p["shared"]["kernel"], p["shared"]["bias"], p["rest"][4]
        logits = (jnp.tanh(X @ w + b) @ w + b) @ out["kernel"] + out["bias"]
        return jnp.average(optax.softmax_cross_entropy_with_integer_labels(logits, Y), weights=W)

    params, gradient = jax.device_get(state.params), jax.jit(jax.value_and_grad(objective))
    for _ in range(3):
        value, grads = jax.device_get(gradient(params))
        params = jax.tree.map(lambda a, g: a - 0.5 * g, params, grads)
        state, metrics = step(state, (X, Y, W))
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    near(state.params, params)


# --- what holds no array, and several inputs -------------------------------------------------------------------------


def test_summary_of_attention_with_masks_as_data_and_its_run_in_a_folder(tmp_path):
    batch, time, d = 6, 5, 8
    x = {
        "target": RNG.normal(size=(batch, time, d)).astype(np.float32),
        "mask": RNG.random((batch, time, time)) < 0.7,
    }
    y = np.arange(batch) % 3
    net = fnn.serial(fnn.attention(2, window=3), fnn.flatten(), fnn.dense(3))
    optimizer = optax.adam(1e-2)
    state, step = begun(net, optimizer, x), fnn.train_step(net, LOSS, optimizer)
    found = fnn.summary(net, x)
    attention = 4 * (d * d + d)
    assert [row.parameters for row in found.rows] == [attention, 0, time * d * 3 + 3]
    assert found.parameters == tree.size(state.params) and found.output == "float32[6,3]"
    assert found.flops >= 2 * batch * time * (4 * d * d + 2 * time * d) + 2 * batch * time * d * 3
    options = {"epochs": 3, "batch_size": 2, "validation": (x, y)}
    want, curves = fnn.fit(step, state, (x, y), **options)
    with pytest.raises(KeyboardInterrupt):
        fnn.fit(step, state, (x, y), **options, checkpoint=tmp_path / "run", **interrupted_at(5))
    got, again = fnn.fit(step, state, (x, y), **options, checkpoint=tmp_path / "run")
    assert_same(plain(got), plain(want))
    assert_same(again.validation, curves.validation)


def test_states_without_arrays_come_back(tmp_path):
    image = RNG.normal(size=(6, 4, 4, 2)).astype(np.float32)
    net = fnn.serial(fnn.conv(3, 3), fnn.conv_transpose(2, 2), fnn.batch_norm(), fnn.flatten(), fnn.dense(3))
    optimizer = optax.adam(1e-2)
    state, _ = fnn.train_step(net, LOSS, optimizer)(begun(net, optimizer, image), (image, np.arange(6) % 3))
    fnn.save(tmp_path / "state.npz", state)
    back = fnn.load(tmp_path / "state.npz", begun(net, optimizer, image))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_same(plain(back), plain(state))
    abstract = fnn.load(tmp_path / "state.npz", jax.eval_shape(lambda: begun(net, optimizer, image)))
    assert jax.tree.structure(abstract.net_state) == jax.tree.structure(state.net_state)


# --- accumulation over the end of an epoch ---------------------------------------------------------------------------


def test_two_epochs_and_two_more_are_four_while_gradients_accumulate():
    """Four steps to an epoch and three to an update: the second call begins within an accumulation."""
    optimizer = optax.MultiSteps(fnn.optimizers.averaged(optax.adam(1e-2), 0.9), 3)
    step, state = fnn.train_step(NET, LOSS, optimizer), begun(NET, optimizer)
    options = {"batch_size": 24, "validation": (X, Y), "evaluate_with": averages}
    four, history = fnn.fit(step, state, (X, Y), epochs=4, **options)
    two, first = fnn.fit(step, state, (X, Y), epochs=2, **options)
    assert int(two.opt_state.mini_step) == 2
    more, second = fnn.fit(step, two, (X, Y), epochs=2, **options)
    assert_same(plain(more), plain(four))
    for name, rows in history.train.items():
        assert_same(np.concatenate([first.train[name], second.train[name]]), rows)
    assert_same(np.concatenate([first.validation["loss"], second.validation["loss"]]), history.validation["loss"])
    assert np.flatnonzero(history.train["update_ratio"]).tolist() == [2, 5, 8, 11, 14]


def test_a_step_fits_into_other_programs():
    """`scan` and `vmap` of a step are its steps one by one; labels that could not be read there are read afterwards."""
    optimizer, batch = optax.adam(0.1), (jnp.asarray(X[:16]), jnp.asarray(Y[:16]))
    step = fnn.train_step(NET, LOSS, optimizer)

    def fresh():
        return fnn.TrainState.create(NET, optimizer, KEY, X[:16])

    scanned, found = jax.lax.scan(step, fresh(), jax.tree.map(lambda a: jnp.stack([a, a]), batch))
    with pytest.raises(ValueError, match="labels"):
        step(fresh(), (batch[0], batch[1] + 3))
    seeds = jax.tree.map(lambda a: jnp.stack([a, a]), fresh())
    lanes, across = jax.vmap(step, (0, None))(seeds, batch)
    assert not seeds.step.is_deleted()
    state, first = step(fresh(), batch)
    np.testing.assert_allclose(across["loss"], [first["loss"]] * 2, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(lanes.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-6)
    state, second = step(state, batch)
    np.testing.assert_allclose(found["loss"], [first["loss"], second["loss"]], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(scanned.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
