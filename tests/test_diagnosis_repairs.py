"""Repairs from outside, and what is named where no repair can be tried."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosed import case
from flax import nnx

import fnn
from fnn.datasets.dataset import Dataset
from fnn.diagnosis import changes, data_symptoms, start, symptoms, trial, verdict
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import Evidence, Trial
from fnn.diagnosis.inquiry import NOTHING
from fnn.diagnosis.loss_case import loss_case_of
from fnn.diagnosis.task import Task
from fnn.diagnosis.weights import keepers, keeping, redrawn

pytest.importorskip("sklearn")
RNG = np.random.default_rng(0)


def loss_case(loss, params, x, y, rate=0.1, score=None, steps=6):
    return loss_case_of(loss, params, [(x, y)], optax.sgd(rate), None, score, steps=steps, seeds=1, shuffle=False)


# Recurrent cells.

X, KEPT = np.float32(RNG.normal(size=(2, 3))), np.float32(RNG.normal(size=(2, 4)))


def of_equinox(make):
    params, static = eqx.partition(make(3, 4, key=jax.random.key(0)), eqx.is_array)
    return params, lambda p, h: jax.vmap(lambda x, h: eqx.combine(p, static)(x, h))(X, h)


def of_nnx(make):
    graph, params = nnx.split(make(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    return params, lambda p, h: nnx.merge(graph, p)(h, X)[0]


@pytest.mark.parametrize(
    "params, step",
    [of_equinox(eqx.nn.GRUCell), of_nnx(nnx.GRUCell)],
    ids=["equinox", "nnx"],
)
def test_a_gru_keeps_its_state(params, step):
    np.testing.assert_allclose(step(keeping(params, 30.0), KEPT), KEPT, atol=1e-5)
    assert np.abs(step(params, KEPT) - KEPT).max() > 0.1


@pytest.mark.parametrize(
    "params, step, cell",
    [(*of_equinox(eqx.nn.LSTMCell), 1), (*of_nnx(nnx.LSTMCell), 0), (*of_nnx(nnx.OptimizedLSTMCell), 0)],
    ids=["equinox", "nnx", "nnx optimized"],
)
def test_a_lstm_keeps_its_content(params, step, cell):
    """c' = f c + i g: of two contents that differ by KEPT, the difference stays."""

    def after(params, content):
        state = (content, jnp.zeros_like(KEPT)) if cell == 0 else (jnp.zeros_like(KEPT), content)
        return jax.tree.leaves(step(params, state))[cell]

    for bias, kept in ((30.0, 1.0), (-30.0, 0.0)):
        new = keeping(params, bias)
        np.testing.assert_allclose(after(new, 2 * KEPT) - after(new, KEPT), kept * KEPT, atol=1e-5)


@pytest.mark.parametrize("make, gates", [(fnn.lstm, 4), (fnn.gru, 3)])
def test_keepers_of_fnn(make, gates):
    params, _ = make(4).init(jax.random.key(0), jnp.ones((2, 1, 3)))
    (found,) = keepers(params)
    assert found[1] == slice(4, 8) and jax.tree.leaves(params)[found[0]].shape == (gates * 4,)


@pytest.mark.parametrize(
    "net, x",
    [
        (fnn.models.mlp(2, 16, 64), X),
        (fnn.models.encoder(8, 2, 16, fnn.models.Block(heads=2), outputs=3), np.zeros((2, 5), np.int32)),
        (fnn.rnn(4), X[:, None]),
        (fnn.serial(fnn.dense(4), fnn.dense(16), fnn.dense(4)), X),
    ],
    ids=["mlp", "transformer", "rnn", "feed-forward"],
)
def test_nets_without_gates_have_no_keepers(net, x):
    assert keepers(net.init(jax.random.key(0), x)[0]) == []


def test_a_lstm_without_knobs_is_tried_with_gates_that_keep():
    data = Dataset(np.zeros((40, 60, 3), np.float32), np.arange(40) % 2)
    made = case(
        data, data, net=lambda width=4: fnn.models.rnn(1, width, 2, cell="lstm", forget_bias=-5.0), batch_size=8
    )
    (change,) = [c for c in changes.changes(made) if "gates" in c.name]
    assert change.causes == ("memory",) and change.apply(Plan()).keep == pytest.approx(np.log(60), abs=0.05)


# Weight penalties.


def test_a_penalty_does_not_count_in_the_score():
    x, y = np.float32(RNG.normal(size=(40, 3))), np.float32(RNG.normal(size=(40, 1)))
    params = {"w": jnp.ones((3, 1)), "b": jnp.zeros(1)}

    def plain(p, batch):
        return jnp.mean((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2)

    def loss(p, batch):
        return plain(p, batch) + 0.5 * jnp.sum(p["w"] ** 2)

    with ThreadPoolExecutor(1) as thread:
        found = [
            trial.Runner(made, thread).run(plan, range(1)).chooses
            for made, plan in (
                (loss_case(plain, params, x, y), Plan()),
                (loss_case(loss, params, x, y), Plan(bare=True)),
                (loss_case(loss, params, x, y, rate=0.0), Plan()),
                (loss_case(plain, params, x, y, rate=0.0), Plan()),
            )
        ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[3], rtol=1e-5)
    assert any("penalty" in c.name for c in changes.changes(loss_case(loss, params, x, y)))
    assert not any("penalty" in c.name for c in changes.changes(loss_case(plain, params, x, y)))


# Labels that the loss does not read, and numbers that are lost on the way.


@pytest.mark.parametrize("labels, want", [((1, 2, 3), [3]), ((0, 1, 2), []), ((-1, 0, 1, 2), []), ((-1, 1), [-1])])
def test_labels_without_a_gradient(labels, want):
    """-1 beside 0, 1, ... is the custom for examples that are to be left out."""
    x, y = np.float32(RNG.normal(size=(30, 4))), np.resize(labels, 30)

    def loss(p, batch):
        return optax.softmax_cross_entropy(batch[0] @ p["w"], jax.nn.one_hot(batch[1], 3)).mean()

    made = loss_case(loss, {"w": jnp.ones((4, 3))}, x, y)
    with ThreadPoolExecutor(1) as thread:
        assert start.start(trial.Runner(made, thread), Plan()).unread == want


@pytest.mark.parametrize("late", [False, True])
def test_the_operation_that_loses_the_numbers_of_a_later_step(late):
    """A square root at 0 in the batch of step 4; or a logarithm of what training has brought below 0."""
    x = np.float32(np.abs(RNG.normal(size=(60, 1))) + 1)
    if not late:
        x[45] = 0

    def loss(p, batch):
        if late:
            return jnp.mean(jnp.log(p["w"])) + 0 * jnp.sum(batch[0])
        return jnp.mean(jnp.sqrt(jnp.sum((batch[0] * p["w"]) ** 2, -1)) - batch[1])

    batches = [(x[i : i + 10], np.float32(np.zeros(10))) for i in range(0, 60, 10)]
    params = {"w": jnp.full((1, 1), 0.5)}
    made = loss_case_of(loss, params, batches, optax.sgd(0.1), None, None, steps=6, seeds=1, shuffle=False)
    with ThreadPoolExecutor(1) as thread:
        runner = trial.Runner(made, thread)
        losses = runner.run(Plan(), range(1)).losses
        assert not np.isfinite(losses).all()
        said = start.breaks(runner, losses, late)
    assert said.startswith("at step ") and ("log" in said if late else "sqrt" in said and "at step 4" in said)


# What counts as a repair.


def a_trial(name, scores):
    return SimpleNamespace(change=SimpleNamespace(name=name), scores=scores, mean=float(np.mean(scores)), single=True)


@pytest.mark.parametrize(
    "base, best, began, counts",
    [
        (-0.9, -0.1, None, 0),
        (-0.9, 0.5, 0.0, 1),
        (0.0, 0.09, 0.0, 0),
        (0.5, 0.9, 0.6, 1),
        (0.1, 0.4, 0.5, 0),
        (0.1, 0.49, 0.5, 1),
    ],
)
def test_a_repair_ends_above_chance_and_above_the_start(base, best, began, counts):
    as_it_is, other = a_trial(NOTHING.name, (base, base)), a_trial("rate × 0.1", (best, best))
    as_it_is.change = NOTHING
    as_it_is.outcome = SimpleNamespace(began=None if began is None else np.full(2, began), chooses=np.full(2, base))
    inquiry = SimpleNamespace(
        base=as_it_is,
        best=lambda: best,
        tried={NOTHING.name: as_it_is, "rate × 0.1": other},
        case=SimpleNamespace(task=Task("regression")),
    )
    assert bool(verdict.works(inquiry)) == counts


@pytest.mark.parametrize("measured", [True, False])
def test_luck_of_one_seed_proves_nothing_that_was_not_measured(measured):
    lucky = a_trial("rate × 1000", (1.0, 0.36, 0.36))
    lucky.change.code, lucky.plan = "", "changed"
    lucky.trial = lambda cause, checked: Trial("rate × 1000", cause, lucky.scores, tuple(checked))
    again = {
        "as it is": SimpleNamespace(checks=np.full(3, 0.36)),
        "changed": SimpleNamespace(checks=np.array([1, 1, 0.9])),
    }
    inquiry = SimpleNamespace(
        base=SimpleNamespace(plan="as it is", mean=0.36),
        again=again.get,
        evidence=[Evidence("lr_low", "the weights hardly move")] * measured,
        shows=lambda *_: False,
    )
    assert (verdict.proof(inquiry, "lr_low", lucky) is not None) == measured


# Embeddings, and labels of which several hold.


@pytest.mark.parametrize("size, cause", [(30.0, "init_large"), (1e-5, "init_small"), (1.0, None)])
def test_an_embedding_far_too_large_is_measured_and_redrawn(size, cause):
    x, y = RNG.integers(0, 9, (24, 5)), np.arange(24) % 3
    params = {
        "embedding": jnp.float32(size * RNG.normal(size=(9, 16))),
        "out": jnp.float32(RNG.normal(size=(16, 3)) / 4),
    }

    def loss(p, batch):
        return optax.softmax_cross_entropy_with_integer_labels(
            p["embedding"][batch[0]].mean(1) @ p["out"], batch[1]
        ).mean()

    made = loss_case(loss, params, x, y)
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    named = [e.cause for e in symptoms.start_symptoms(made, Plan(), begun) if "embedding" in e.text]
    assert named == ([cause] if cause else [])
    new, old = (np.std(tree["embedding"]) for tree in (redrawn(params, 1.0, 0), params))
    assert abs(new / (0.25 if cause else old) - 1) < 0.3  # 144 numbers: five standard errors


def test_a_softmax_over_labels_of_which_several_hold():
    x, y = np.float32(RNG.normal(size=(40, 4))), np.float32(RNG.uniform(size=(40, 3)) < 0.6)

    def loss(p, batch):
        q = jnp.clip(jax.nn.softmax(batch[0] @ p["w"]), 1e-6, 1 - 1e-6)
        return -jnp.mean(batch[1] * jnp.log(q) + (1 - batch[1]) * jnp.log(1 - q))

    made = loss_case(loss, {"w": jnp.float32(RNG.normal(size=(4, 3)))}, x, y, score=lambda p, b: -loss(p, b))
    assert made.task.kind == "multi_label"
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    assert "head" in {e.cause for e in symptoms.start_symptoms(made, Plan(), begun)}
    names = {c.name for c in changes.changes(made)}
    assert "head sigmoid" in names and "standardise y" not in names


# Losses that do not ask for the targets.


@pytest.mark.parametrize("shape, zero, want", [((24, 1), False, True), ((24,), False, False), ((24,), True, False)])
def test_targets_that_are_compared_with_all_outputs(shape, zero, want):
    """float[n] - float[n, 1] is float[n, n]. A net whose outputs are all equal at first is no such loss."""
    x, y = np.float32(RNG.normal(size=(24, 3))), np.float32(RNG.normal(size=shape))
    params = {"a": jnp.float32(RNG.normal(size=(3, 5))), "b": jnp.float32(RNG.normal(size=5)) * (not zero)}

    def loss(p, batch):
        return jnp.mean((jnp.tanh(batch[0] @ p["a"]) @ p["b"] - batch[1]) ** 2)

    made = loss_case(loss, params, x, y)
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    assert begun.unpaired == want
    if not zero:
        blind = loss_case(lambda p, batch: loss(p, (batch[0], 0)), params, x, y)  # it reads no targets
        with ThreadPoolExecutor(1) as thread:
            assert not start.start(trial.Runner(blind, thread), Plan()).unpaired
    assert want == ("loss" in {e.cause for e in symptoms.start_symptoms(made, Plan(), begun)})


def test_a_loss_of_the_wrong_sign_is_found():
    x = np.float32(RNG.normal(size=(200, 4)))
    y = (x[:, 0] > 0).astype(np.int32)
    params = {"w": jnp.float32(RNG.normal(size=(4, 2)) / 2)}

    def likelihood(p, batch):
        return jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(batch[0] @ p["w"]), batch[1][:, None], 1))

    def score(p, batch):
        return jnp.mean(jnp.argmax(batch[0] @ p["w"], -1) == batch[1])

    batches = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 160, 20)]
    found = fnn.diagnose_loss(
        likelihood, params, batches, optax.sgd(0.5), (x[160:], y[160:]), score=score, steps=40, seeds=1, budget=600.0
    )
    assert found.causes[0].name == "loss" and "-loss" in found.remedies[0]


@pytest.mark.parametrize("weights, ill", [((1, 1), False), ((1, 10), False), ((10, 1), True), ((2, 1), False)])
def test_class_weights_upside_down(weights, ill):
    """Label 1 has one example in ten."""
    x, y = np.float32(RNG.normal(size=(200, 8))), np.int32(np.arange(200) % 10 == 0)
    weights = jnp.float32(weights)

    def loss(outputs, y):
        return weights[y] * fnn.losses.cross_entropy(outputs, y)

    made = case(Dataset(x, y), Dataset(x, y), loss=loss, net=lambda width=8: fnn.models.mlp(1, width, 2))
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    found = [e for e in symptoms.start_symptoms(made, Plan(), begun) if e.cause == "loss"]
    assert bool(found) == ill and (not ill or "10 times" in found[0].text)


@pytest.mark.parametrize("held, ill", [(0.0, False), (5.0, True)])
def test_a_feature_that_lives_in_held_out_data_alone(held, ill):
    x, y = np.float32(RNG.normal(size=(100, 4))), np.arange(100) % 3
    x[:, 2] = 1
    other = x.copy()
    other[:, 2] += held * RNG.normal(size=100)
    other[:3, 2] += 9  # rare values do not count
    made = case(Dataset(x, y), Dataset(other, y), net=lambda width=8: fnn.models.mlp(1, width, 3))
    assert bool([e for e in data_symptoms.split_symptoms(made) if e.cause == "split_mismatch"]) == ill


@pytest.mark.parametrize("weights", [0.0, np.nan], ids=["zeros", "NaN"])
def test_nets_that_cannot_move_say_nothing_of_their_loss(weights):
    """Where no kernel has a gradient, or all gradients are NaN, labels are not unread and targets not unpaired."""
    x, y = np.float32(RNG.normal(size=(30, 4))), np.arange(30) % 3 + 1
    params = {"a": jnp.full((4, 5), weights), "b": jnp.full((5, 4), weights), "bias": jnp.zeros(4)}

    def loss(p, batch):
        outputs = jnp.tanh(batch[0] @ p["a"]) @ p["b"] + p["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch[1]).mean()

    made = loss_case(loss, params, x, y)
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    assert begun.unread == [] and not begun.unpaired
