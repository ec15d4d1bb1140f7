"""How a diagnosis trains what it tries: programs, lanes, budget, what is left out; and small whole diagnoses."""

import dataclasses
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax
from diagnosed import TEST, TRAIN, build, case, sgd

import fnn
from fnn import lowering
from fnn.diagnosis import changes, data_changes, inquiry, trial, verdict
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import STAGE
from fnn.diagnosis.change import Change
from fnn.diagnosis.task import Task

pytest.importorskip("sklearn")
RNG = np.random.default_rng(0)


def test_a_rate_that_is_too_high_and_its_report(tmp_path):
    found = fnn.diagnose(
        fnn.models.mlp(2, 16, 10), fnn.losses.cross_entropy, lambda rate=30.0: optax.sgd(rate), TRAIN, TEST,
        batch_size=64, steps=60, seeds=2, budget=600.0,
    )  # fmt: skip
    assert found.causes[0].name == "lr_high" and not found.healthy and "learning_rate" in found.remedies[0]
    said = repr(found)
    assert said.startswith("DOES NOT TRAIN") and "CAUSE 1" in said and "RULED OUT" in said
    assert max(map(len, said.splitlines())) <= 100
    removing = {t.change for t in found.trials if t.cause == "lr_high" and t.change in found.working}
    assert (
        set(found.others) == removing - {found.causes[0].repair.change} and "treats the symptom: rate × 0" not in said
    )
    table = found.table()
    assert table.columns == ["change", "cause", "seed", "score", "checked"]
    assert table.height == 2 * (len(found.trials) + 1)
    found.html(tmp_path / "why.html")
    page = (tmp_path / "why.html").read_text()
    assert (
        page.count("<svg") >= 2
        and set(re.findall(r"https?://[^/\"]*", page)) <= {"http://www.w3.org"}
        and "lr_high" in page
    )


def test_any_loss():
    x, y = np.asarray(TRAIN.x), np.asarray(TRAIN.y)
    params = {
        "w": jax.random.normal(jax.random.key(0), (64, 32)) / 6,
        "v": jax.random.normal(jax.random.key(1), (32, 10)) / 6,
    }

    def loss(params, batch):
        logits = jax.nn.relu(batch["x"] @ params["w"]) @ params["v"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    batches = [{"x": 100 * x[i : i + 64], "y": y[i : i + 64]} for i in range(0, 1400, 64)]
    held = {"x": 100 * np.asarray(TEST.x), "y": np.asarray(TEST.y)}
    found = fnn.diagnose_loss(loss, params, batches, optax.sgd(0.1), held, steps=60, seeds=2, budget=600.0)
    assert found.causes[0].name == "input_scale" and found.score == "1 - loss / guess"


def test_a_loss_that_bfloat16_rounds_away():
    """Of numbers near 2000, which it rounds to multiples of 16, nothing is left of differences of 1; nor of their gradient."""
    x = RNG.normal(size=(240, 4)).astype(np.float32)
    y = (x @ np.array([0.5, -0.5, 0.5, 0.5], np.float32)).astype(np.float32)

    def loss(w, batch, dtype=jnp.bfloat16):
        given, wanted = ((2000 + part).astype(dtype) for part in (batch[0] @ w["kernel"][:, 0], batch[1]))
        return jnp.mean(jnp.square(given - wanted)).astype(jnp.float32)

    batches = [(x[i : i + 40], y[i : i + 40]) for i in range(0, 160, 40)]
    params = {"kernel": as_jax(RNG.normal(size=(4, 1)) / 9, jnp.float32)}
    found = fnn.diagnose_loss(
        loss, params, batches, lambda rate=0.05: optax.sgd(rate), (x[160:], y[160:]), steps=60, seeds=2, budget=600.0,
        score=lambda w, batch: 1 - loss(w, batch, jnp.float32) / jnp.var(batch[1]),
    )  # fmt: skip
    assert found.causes[0].name == "numerics" and found.causes[0].repair.change == "compute in float32", found
    assert "bfloat16 changes the gradient by 100% of its size" in repr(found)
    assert min(found.causes[0].repair.checked) > 0.9


def test_a_plan_is_compiled_once_for_all_numbers():
    with ThreadPoolExecutor(1) as thread:
        runner = trial.Runner(case(steps=3), thread)
        plain, changed = (
            Plan(),
            dataclasses.replace(Plan(), rate=0.5, gain=1.0, data=(data_changes.standardized,), clip=1.0),
        )
        assert runner.key(plain) == runner.key(changed) != runner.key(Plan(steps=4))
        first = runner.run(plain, [0, 1])
        again = runner.run(plain, [0, 1])
        other = runner.run(dataclasses.replace(plain, rate=0.5), [0, 1])
    np.testing.assert_array_equal(first.losses, again.losses)
    assert first.losses[0, 0] == other.losses[0, 0] and (first.losses[:, 2] != other.losses[:, 2]).all()


def test_lanes_are_no_more_than_memory_holds(monkeypatch):
    """One seed at a time gives what all give at once, and its program takes far less memory. On a CPU it is always one."""
    found = []
    if jax.default_backend() == "cpu":
        with ThreadPoolExecutor(1) as thread:
            assert trial.Runner(case(steps=3, seeds=3), thread).lanes(Plan()) == 1
    monkeypatch.setattr(lowering, "side_by_side", lambda: True)
    for memory in (trial.MEMORY, 1):
        monkeypatch.setattr(trial, "MEMORY", memory)
        with ThreadPoolExecutor(1) as thread:
            runner = trial.Runner(case(steps=3, seeds=3, net=lambda: fnn.models.mlp(2, 256, 10)), thread)
            run = runner.run(Plan(), range(3))
            memories = runner.prepare(Plan()).result().memory_analysis()
            found.append((runner.lanes(Plan()), run, memories.temp_size_in_bytes))
    (many, whole, large), (one, parts, small) = found
    assert (many, one) == (3, 1) and small < 0.6 * large
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    np.testing.assert_allclose(parts.checks, whole.checks, atol=0.02)


def test_the_middle_of_a_run_is_that_of_half_of_the_steps():
    """The parameters after 3 of 6 steps by hand; warm-up takes the rates 1/5, 2/5, ... of the first five."""
    made = dataclasses.replace(case(steps=6, seeds=1), optimizer=lambda clip=None: optax.sgd(0.1))
    with ThreadPoolExecutor(1) as thread:
        runner = trial.Runner(made, thread)
        run, warm = runner.run(Plan(), range(1)), runner.run(Plan(warm=5 / 6), range(1))
        params, state = runner.draw(Plan(), 0)
        rows = runner.order(Plan(), 0)
    net, first = build(), params
    for step in range(3):
        batch = np.asarray(TRAIN.x)[rows[step]], np.asarray(TRAIN.y)[rows[step]]

        def loss(p, batch=batch):
            return fnn.losses.cross_entropy(net.apply(p, state, batch[0])[0], batch[1]).mean()

        grads = jax.jit(jax.grad(loss))(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        if step == 0:
            moved = fnn.tree.norm(jax.tree.map(lambda g: 0.02 * g, grads)) / fnn.tree.norm(first)
    for got, want in zip(jax.tree.leaves(run.middle[0]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got[0], want, atol=1e-5)
    np.testing.assert_allclose(warm.ratios[0, 0], moved, rtol=1e-4)
    assert warm.middle is None


def test_a_budget_too_short_for_a_verdict_is_not_called_healthy():
    found = fnn.diagnose(
        build, fnn.losses.cross_entropy, sgd, TRAIN, TEST, batch_size=64, steps=200, seeds=2, budget=0.1
    )
    assert not found.healthy and not found.causes and len(found.not_tried) > 10
    assert repr(found).startswith("UNDECIDED") and "NO CAUSE FOUND in this budget" in repr(found)


def test_a_change_that_the_net_refuses_is_listed_as_not_tried():
    """Whatever it raises. An optimiser may also be what only has the functions of a transformation."""

    def fixed(width=16, norm="layer_norm"):
        if width != 16:
            raise ValueError("fixed: width must be 16")
        return fnn.models.mlp(1, width, 10, norm={"layer_norm": "layer_norm", None: "none"}[norm])

    every = optax.MultiSteps(optax.sgd(0.1), 2)
    found = fnn.diagnose(
        fixed, fnn.losses.cross_entropy, every, TRAIN, TEST, batch_size=64, steps=20, seeds=1, budget=600.0
    )
    assert found.not_tried["width × 4"] == "refused: fixed: width must be 16"
    (bare,) = [t for t in found.trials if t.change == "no norm"]
    assert bare.mean > 0.1
    made = case(net=fixed)
    (change,) = [c for c in changes.changes(made) if c.name == "no norm"]
    assert change.code == "norm=None"
    with pytest.raises(ValueError, match="KeyError: 'other'"):
        made.built(Plan().knob(norm="other"))


def test_updates_lost_to_rounding_are_found_and_mended():
    def low():
        net = fnn.models.mlp(1, 16, 10)

        def init(key, spec):
            params, state = net.init(key, spec)
            return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), state

        return fnn.Layer(init, net.apply)

    found = fnn.diagnose(
        low,
        fnn.losses.cross_entropy,
        lambda rate=3e-4: optax.adam(rate),
        TRAIN,
        TEST,
        batch_size=64,
        steps=200,
        seeds=1,
        budget=600.0,
    )
    assert "numerics" in {e.cause for e in found.evidence}, found
    mended = {t.change: t.mean for t in found.trials}["parameters in float32"]
    assert mended > np.mean(found.base.scores) + 0.03


def test_settings_of_this_thread_hold_in_the_others():
    def wide(outputs, y):
        return fnn.losses.cross_entropy(outputs.astype(float), y)  # float32, unless x64 is on

    with jax.enable_x64(True), ThreadPoolExecutor(1) as thread:
        run = trial.Runner(case(loss=wide, steps=3, seeds=1), thread).run(Plan(), range(1))
    assert run.losses.dtype == np.float64


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_cannot_alter_the_verdict_is_not_trained_unless_the_proof_fails(fails, monkeypatch):
    """Adam and width have programs of their own, and come behind the inputs' scale, whose repair leaves nothing to gain."""
    given = [part._replace(x=300 * part.x) for part in (TRAIN, TEST)]
    two = functools.partial(build, depth=2)  # one layer fewer, and the loss leaves float32, which is a cause of its own

    def diagnosed():
        return fnn.diagnose(two, fnn.losses.cross_entropy, sgd, *given, batch_size=64, steps=300, seeds=2, budget=600.0)

    found = diagnosed()
    skipped = {name for name, why in found.not_tried.items() if why == inquiry.SETTLED}
    assert found.causes[0].name == "input_scale" and {"Adam, rate 1e-3", "width × 4", "layer norm"} <= skipped
    assert found.causes[0].repair.mean > 0.9 and "standardise x" not in found.not_tried
    if not fails:
        return
    monkeypatch.setattr(verdict, "proof", lambda *_: None)
    every = diagnosed()
    assert not every.causes and inquiry.SETTLED not in every.not_tried.values()
    assert skipped <= {t.change for t in every.trials}


def test_settled_is_the_stage_of_the_earliest_suspect_that_is_repaired():
    def one(mean, *causes):
        return SimpleNamespace(mean=mean, change=Change("", causes, lambda plan: plan, ""))

    def settled(base, suspects, *tried):
        found = SimpleNamespace(
            case=SimpleNamespace(task=Task("classes", 10)), base=one(base), tried=dict(enumerate(tried))
        )
        return inquiry.Inquiry.settled(found, suspects)

    rate, act, steps = one(0.97, "lr_high"), one(0.96, "activation", "blocked_gradient"), one(0.99, "steps")
    assert settled(0.1, {"lr_high", "activation"}, rate, act) == STAGE["activation"]
    assert settled(0.1, {"lr_high"}, rate, act) == STAGE["lr_high"]
    assert settled(0.1, {"steps"}, steps) == settled(0.1, {"head"}, rate) == len(STAGE)
    assert settled(0.1, {"lr_high"}, one(0.94, "lr_high")) == len(STAGE)  # 0.955 is 95 % of the way
    assert settled(0.85, {"lr_high"}, rate) == len(STAGE)  # it was not far from there
