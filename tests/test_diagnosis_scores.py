"""Scores of a diagnosis: what a task is, and what counts as right."""

from types import SimpleNamespace

import diagnosed
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax

import fnn
from fnn.diagnosis import symptoms
from fnn.diagnosis.case import Plan
from fnn.diagnosis.task import Task, least_at, task_of

RNG = np.random.default_rng(0)


def test_balanced_accuracy_is_the_mean_of_the_classes_recalls():
    outputs, y = as_jax(RNG.normal(size=(50, 4)), jnp.float32), RNG.integers(0, 3, 50)
    answer = np.asarray(outputs).argmax(1)
    want = np.mean([(answer[y == c] == c).mean() for c in range(3)])  # class 3 does not occur
    np.testing.assert_allclose(Task("classes", 4)(outputs, as_jax(y)), want, rtol=1e-6)
    np.testing.assert_allclose(Task("one_hot", 4)(outputs, jax.nn.one_hot(y, 4)), want, rtol=1e-6)
    assert Task("classes", 4)(outputs * jnp.nan, as_jax(y)) == 0  # not class 0


def test_r2_at_any_scale():
    y = RNG.normal(size=(60, 2))
    outputs = y + 0.3 * RNG.normal(size=y.shape)
    want = np.mean(1 - ((outputs - y) ** 2).mean(0) / y.var(0))
    for scale in (1.0, 1e-25, 1e25):
        got = Task("regression")(as_jax(outputs * scale, jnp.float32), as_jax(y * scale, jnp.float32))
        np.testing.assert_allclose(got, want, rtol=1e-4)
    scales = jnp.array([1e-20, 1e20], jnp.float32)
    got = Task("regression")(as_jax(outputs, jnp.float32) * scales, as_jax(y, jnp.float32) * scales)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert Task("regression")(jnp.full((60, 2), jnp.nan), as_jax(y)) == -1


def test_r2_leaves_out_a_target_that_is_the_same_for_all():
    y = np.float32(RNG.normal(size=(60, 2)) * [1, 0] + [0, 0.1])
    outputs = y + np.float32(0.3 * RNG.normal(size=y.shape))
    want = np.mean(1 - ((outputs - y) ** 2).mean(0)[0] / y.var(0)[0])
    np.testing.assert_allclose(Task("regression")(as_jax(outputs), as_jax(y)), want, rtol=1e-4)


def probability_loss(outputs, y):
    p = jnp.clip(outputs.reshape(-1), 1e-7, 1 - 1e-7)
    return -y * jnp.log(p) - (1 - y) * jnp.log(1 - p)


@pytest.mark.parametrize(
    "loss, want",
    [(fnn.losses.binary_cross_entropy, 0.0), (probability_loss, 0.5), (lambda o, y: (o.reshape(-1) - y) ** 2, 0.5)],
)
def test_the_threshold_of_a_binary_task_is_where_both_labels_cost_the_same(loss, want):
    task = task_of(loss, np.array([0, 1, 1, 0]), (4, 1))
    assert task.kind == "binary" and abs(task.threshold - want) < 0.02
    outputs = as_jax([[want - 1], [want + 1], [want - 1], [want - 1]], jnp.float32)
    assert task(outputs, jnp.array([0, 1, 1, 0])) == 0.75


def test_tasks_are_told_by_their_targets():
    kinds = {
        "classes": (np.arange(6) % 3, (6, 3), fnn.losses.cross_entropy),
        "one_hot": (np.eye(3, dtype=np.float32)[np.arange(6) % 3], (6, 3), fnn.losses.mse),
        "regression": (RNG.normal(size=(6, 1)).astype(np.float32), (6, 1), fnn.losses.mse),
        "regression ": (RNG.normal(size=(6, 3)).astype(np.float32), (2, 3), fnn.losses.mse),
        "multi_label": (np.float32([[0, 1, 1], [1, 1, 0], [0, 0, 0]]), (2, 3), optax.sigmoid_binary_cross_entropy),
        "exact": (np.zeros((6, 5), np.int32), (6, 5, 7), fnn.losses.sequence_cross_entropy),
    }
    for kind, (y, shape, loss) in kinds.items():
        assert task_of(loss, y, shape).kind == kind.strip()
    with pytest.raises(ValueError, match="diagnose: targets must be labels, one-hot rows or numbers"):
        task_of(lambda o, y: o, np.zeros((6, 2)), (6, 3))


@pytest.mark.parametrize("threshold, head", [(0.0, lambda z: z), (0.5, jax.nn.sigmoid)])
def test_several_labels_are_scored_by_their_balanced_accuracy(threshold, head):
    def loss(o, y):
        if threshold == 0:
            return optax.sigmoid_binary_cross_entropy(o, y).sum(-1)
        return -(y * jnp.log(o + 1e-6) + (1 - y) * jnp.log(1 - o + 1e-6)).mean(-1)

    y = np.float32(RNG.uniform(size=(200, 3)) < [0.5, 0.1, 0.0])
    z = as_jax(2 * y - 1 + 1.5 * RNG.normal(size=y.shape), jnp.float32)
    right = (np.asarray(z) > 0) == (y > 0.5)
    want = np.mean([[right[y[:, j] == v, j].mean() for v in (0, 1)] for j in (0, 1)])
    task = task_of(loss, y, (2, 3))
    assert task.kind == "multi_label" and task.chance == 0.5
    np.testing.assert_allclose(task(head(z), as_jax(y)), want, atol=0.01)


COUNTS = RNG.poisson(3.0, size=(200, 1)).astype(np.float32)


def test_outputs_that_are_no_predictions_of_the_targets_ask_for_a_score():
    """Of a Poisson loss they are logarithms: R² would call a healthy training ill."""

    def poisson(outputs, y):
        return jnp.mean(jnp.exp(outputs) - y * outputs, 1)

    with pytest.raises(ValueError, match=r"least at outputs of 0.6\d+ for targets of 2, .* pass score=, a function"):
        task_of(poisson, COUNTS, (200, 1))
    predictions = jnp.log(as_jax(COUNTS + 1))
    for score in (lambda o, y: -jnp.mean((jnp.exp(o) - 1 - y) ** 2), lambda o, y: 0.5 + 0 * o[:, 0]):
        task = task_of(poisson, COUNTS, (200, 1), score)
        assert task.score == "score" and task.kind == "exact"
        assert abs(float(task(predictions, COUNTS)) - float(jnp.mean(score(predictions, COUNTS)))) < 1e-6
        assert task(predictions.at[3].set(jnp.nan), COUNTS) == 0
    with pytest.raises(ValueError, match="score must return one number, or one for each example, .* got "):
        task_of(poisson, COUNTS, (200, 1), lambda o, y: o)(predictions, COUNTS)


PREDICT = {
    "mse": fnn.losses.mse,
    "huber": fnn.losses.huber(1.0),
    "mae": lambda o, y: jnp.abs(o - y).mean(1),
    "quantile": lambda o, y: jnp.maximum(0.9 * (y - o), 0.1 * (o - y)).mean(1),
    "small": lambda o, y: 1e-20 * ((o - y) ** 2).mean(1),
}


@pytest.mark.parametrize("name", PREDICT)
def test_a_loss_that_is_least_at_the_targets_is_a_regression(name):
    loss = PREDICT[name]
    assert task_of(loss, COUNTS, (200, 1)) == Task("regression") and least_at(loss, COUNTS, (200, 1)) == []
    found = least_at(lambda o, y: loss(o, y / 2 + 5), COUNTS, (200, 1))
    assert len(found) >= 3 and all(abs(output - target / 2 - 5) < 0.2 for target, output in found)


def test_a_loss_of_directions_is_left_alone():
    assert least_at(lambda o, y: 1 - optax.cosine_similarity(o, y), np.hstack([COUNTS, COUNTS + 1]), (200, 2)) == []


def test_a_loss_that_is_least_at_half_of_the_targets_is_measured():
    data = np.float32(RNG.normal(size=(200, 3))), COUNTS
    case = diagnosed.case(data, data, lambda o, y: ((2 * o - y) ** 2).mean(1), fnn.dense(1))
    found = symptoms._loss_symptoms(case, Plan(), SimpleNamespace(outputs=COUNTS))
    assert [e.cause for e in found] == ["loss"]
    assert "least at outputs of 0.496 for targets of 1, and of 2.5 for 5" in found[0].text


def test_a_loss_that_compares_examples_is_asked_of_one_alone():
    """With itself an output has no difference: the loss says nothing of it, and it is no other function of the targets."""

    def pairs(outputs, y):
        return jnp.mean(((outputs - outputs.T) - (y - y.T)) ** 2, 1)

    assert least_at(pairs, COUNTS, (200, 1)) == []


def test_a_score_that_jax_cannot_trace_is_one_sentence():
    data = np.float32(RNG.normal(size=(40, 3))), COUNTS[:40]
    options = {"batch_size": 8, "steps": 2, "seeds": 1, "progress": False}
    for score, sentence in (
        (0.5, "score must be a function"),
        (lambda o, y: np.asarray(o).mean(), "computed by jax.numpy"),
    ):
        with pytest.raises(TypeError, match=sentence):
            fnn.diagnose(fnn.dense(1), fnn.losses.mse, optax.sgd(0.1), data, score=score, **options)
