"""What a diagnosis asks a loss about its targets, and the data about inputs that repeat."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosed import TEST, TRAIN, case, sgd

import fnn
from fnn.diagnosis import changes, reads, repeats, start, symptoms, trial, weights
from fnn.diagnosis.case import Plan
from fnn.diagnosis.loss_case import _parts, loss_case_of
from fnn.diagnosis.reads import Reads

pytest.importorskip("sklearn")
RNG = np.random.default_rng(0)
Z = np.float32(np.random.default_rng(1).normal(size=(60, 4)))
Y = np.arange(60, dtype=np.int32) % 4


@pytest.mark.parametrize(
    "y, want",
    [
        ([0, 1, 2, 255], [255]),
        ([0, 1, 2, -1, -100], [-100, -1]),
        ([0, 1, 2, 3, 5], []),
        ([1, 2, 900], []),  # not numbered from 0: the ids of something
        ([0, 3, 900, 41], []),
        ([0, 1, 2, 40, 50, 60], []),  # words with gaps
        (np.arange(0, 200_000, 2), []),
        ([0.0, 1.0, 255.0], []),
        ([], []),
    ],
)
def test_labels_that_are_no_classes(y, want):
    assert reads.strange(np.array(y)) == want


def test_the_commonest_class_stands_in_for_what_is_none():
    y = np.array([[0, 2, 2], [255, 1, -1]], np.int32)
    np.testing.assert_array_equal(reads.plain(y), [[0, 2, 2], [2, 1, 2]])
    assert reads.plain(y).dtype == np.int32 and reads.plain(Y) is Y


def mean(weights, y, z=Z):
    """Cross entropy by optax: NaN for a label beyond the classes, the last class for -1."""
    each = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(z), jnp.asarray(y))
    return jnp.sum(weights * each) / jnp.maximum(1, jnp.sum(weights))


def asked(loss, y, every=None):
    """Ask a loss (y, z) of a net whose gradient is that of its outputs."""

    def numbers(y):
        value, slope = jax.value_and_grad(loss, 1)(y, jnp.asarray(Z))
        size = np.linalg.norm(slope)
        return np.array([np.float64(value), *([np.log10(size)] if size else [])])

    def moves(rows):
        return bool(np.any(jax.grad(loss, 1)(np.asarray(y if every is None else every)[rows], jnp.asarray(Z))))

    return reads.reads(numbers, moves, y, y if every is None else every)


def with_some(value):
    return np.where(np.arange(60) % 10 == 0, value, Y).astype(np.int32)


def hinge(y, z):
    return jnp.mean(jax.nn.relu(1 - y * z[:, 0]))


@pytest.mark.parametrize(
    "loss, y, want",
    [
        (lambda y, z: mean(1.0, y, z), Y, Reads()),
        (lambda y, z: mean(1.0, y, z), with_some(255), Reads(strange=(255,))),
        (lambda y, z: mean(1.0, y, z), with_some(-1), Reads(strange=(-1,))),
        (lambda y, z: mean(y >= 0, jnp.maximum(y, 0), z), with_some(-1), Reads()),  # it leaves them out
        (lambda y, z: mean(y != 255, jnp.where(y == 255, 0, y), z), with_some(255), Reads()),
        (lambda y, z: mean(y != 2, y, z), Y, Reads(silent=(2,))),
        (hinge, np.float32(Y % 2), Reads(silent=(0,))),
        (hinge, np.float32(2 * (Y % 2) - 1), Reads()),  # no labels 0 and 1: nothing is asked
        (lambda y, z: jnp.mean(jnp.square(z[:, 0] - y)), Z[:, 1], Reads()),
    ],
)
def test_what_a_loss_reads(loss, y, want):
    assert asked(loss, y) == want


def test_tokens_are_asked_as_labels_are():
    """With a mask that is upside down only the padding counts, whose label is 0."""
    y = np.stack([Y, np.where(Y == 0, 0, Y)], 1)
    every = y.copy()

    def loss(y, z):
        each = optax.softmax_cross_entropy_with_integer_labels(jnp.stack([z, z], 1), jnp.asarray(y))
        return jnp.sum((every == 0) * each)

    found = asked(loss, y)
    assert found.ignored == (1, 2, 3) and found.silent == ()
    (said,) = reads.evidence(found, y)
    assert said.cause == "loss" and "labels 1, 2, 3, 75% of all" in said.text


def test_each_has_its_sentence():
    found = reads.evidence(Reads((255,), (0,)), with_some(255))
    assert [e.cause for e in found] == ["label_encoding"] * 2
    assert found[0].text.startswith("10.00% of the labels are 255") and "label 0 have no gradient" in found[1].text


def blank(part, share, rows=True):
    x = np.array(part.x)
    x[: int(share * len(x))] = -0.0 * x[: int(share * len(x))] if rows else x[0]
    return part._replace(x=x)


@pytest.mark.parametrize(
    "share, want", [(0.6, "60% of the examples have the same inputs, all 0"), (0.2, None), (1.0, None)]
)
def test_inputs_that_are_empty_for_many_examples(share, want):
    made = case(blank(TRAIN, share), blank(TEST, share))
    found = repeats.repeat_symptoms(made)
    assert [e.text.split(", and")[0] for e in found] == ([want] if want else [])
    if want:
        kept = repeats.distinct(made)
        for part, old in ((kept.train, made.train), (kept.chooses, made.chooses)):
            assert np.abs(part.x).max(1).min() > 0 and part.size == old.size
        assert not repeats.repeat_symptoms(kept)


def test_equal_inputs_with_equal_targets_are_no_fault():
    """As of a table with few different rows."""
    x, y = np.float32(np.arange(60)[:, None] % 3), np.arange(60) % 3
    assert not repeats.repeat_symptoms(SimpleNamespace(train=SimpleNamespace(x=x), y=y))
    assert repeats.repeat_symptoms(SimpleNamespace(train=SimpleNamespace(x={"a": x}), y=RNG.integers(0, 3, 60)))


def test_a_batch_of_more_entries_has_targets_by_name():
    batch = {"x": np.ones((2, 3)), "mask": np.ones(2), "tags": np.zeros(2)}
    take, join = _parts(batch)
    x, y = take(batch)
    assert set(x) == {"x", "mask"} and y is batch["tags"] and join(x, y).keys() == batch.keys()
    assert _parts({"tokens": 1, "tags": 2})[0]({"tokens": 1, "tags": 2}) == (1, 2)


def test_positions_along_the_wrong_axis():
    """Outputs that depend on an example's place in the batch, and not on the order in which an example is read."""
    x, y = RNG.integers(0, 7, (40, 5)), np.arange(40) % 3
    params = {"table": jnp.float32(RNG.normal(size=(7, 8))), "out": jnp.float32(RNG.normal(size=(8, 3)))}

    def made(axis):
        def loss(p, batch):
            places = jnp.sin(jnp.arange(batch[0].shape[axis]))
            h = p["table"][batch[0]] * jnp.expand_dims(places, (1 - axis, 2))
            return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(h).mean(1) @ p["out"], batch[1]).mean()

        batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
        options = {"steps": 3, "seeds": 1, "shuffle": False}
        return loss_case_of(loss, params, batches, sgd(), batches[-1], None, **options)

    with ThreadPoolExecutor(1) as thread:
        along, across = (start.start(trial.Runner(made(axis), thread), Plan()) for axis in (1, 0))
    assert not along.blind and not along.placed and across.blind and across.placed
    (said,) = [e for e in symptoms.start_symptoms(made(0), Plan(), across) if e.cause == "positions"]
    assert "wrong axis" in said.text


def test_layers_without_an_activation_are_named_and_mended():
    """Labels that no linear map tells apart."""
    x = RNG.normal(size=(240, 2)).astype(np.float32)
    y = np.int32(x[:, 0] * x[:, 1] > 0)
    params = [jnp.float32(RNG.normal(size=s) / s[0] ** 0.5) for s in ((2, 16), (16, 16), (16, 2))]

    def loss(p, batch):
        return optax.softmax_cross_entropy_with_integer_labels(batch[0] @ p[0] @ p[1] @ p[2], batch[1]).mean()

    batches = [(x[i : i + 40], y[i : i + 40]) for i in range(0, 160, 40)]
    optimizer = optax.adam(1e-2)

    def score(p, batch):  # the net that was trained is scored, not the one without activations
        return jnp.mean((batch[0] @ p[0] @ p[1] @ p[2]).argmax(1) == batch[1])

    found = fnn.diagnose_loss(
        loss, params, batches, optimizer, (x[160:], y[160:]), score=score, steps=200, seeds=2, budget=600.0
    )
    assert found.causes[0].name == "activation" and min(found.causes[0].repair.checked) > 0.85, found
    assert "3 layers follow each other without an activation" in repr(found)


@pytest.mark.parametrize("size, want", [(0.02, True), (1.0, False)])
def test_a_recurrent_kernel_that_forgets_is_measured_and_drawn_orthogonal(size, want):
    x, y = RNG.normal(size=(24, 6, 3)).astype(np.float32), np.arange(24) % 3
    shapes = {"inputs": (3, 8), "state": (8, 8), "out": (8, 3)}
    params = {k: jnp.float32(RNG.normal(size=s) / s[0] ** 0.5) for k, s in shapes.items()}
    params["state"] = size * jnp.eye(8)

    def loss(p, batch):
        def turn(h, x):
            return jnp.tanh(x @ p["inputs"] + h @ p["state"]), None

        h, _ = jax.lax.scan(turn, jnp.zeros((len(batch[0]), 8)), jnp.swapaxes(batch[0], 0, 1))
        return optax.softmax_cross_entropy_with_integer_labels(h @ p["out"], batch[1]).mean()

    made = loss_case_of(loss, params, [(x, y)], sgd(), (x, y), None, steps=3, seeds=1, shuffle=False)
    assert made.seen["recurrent"] == (2,)
    with ThreadPoolExecutor(1) as thread:
        runner = trial.Runner(made, thread)
        found = start.start(runner, Plan())
        new, _ = runner.draw(Plan(gain=1.0), 0)
    np.testing.assert_allclose(found.kept, size, rtol=1e-6)
    assert any(e.cause == "memory" and "0.02 of the state" in e.text for e in symptoms.start_symptoms(made, Plan(), found)) == want  # fmt: skip
    np.testing.assert_allclose(new["state"].T @ new["state"], np.eye(8), atol=1e-5)
    assert abs(np.std(new["inputs"]) * 3**0.5 - 1) < 0.6
    (code,) = {c.code for c in changes.changes(made) if c.name == "redraw weights" and "memory" in c.causes}
    assert code.splitlines()[0] == "jax.nn.initializers.orthogonal()  # for recurrent kernels"


def test_a_weight_that_is_not_finite_says_nothing_of_what_is_kept():
    assert np.isnan(weights.kept({"w": jnp.full((3, 3), jnp.nan)}, (0,)))
    kernels = {"a": jnp.stack([jnp.eye(2), 4 * jnp.eye(2)]), "b": jnp.bfloat16(0.5) * jnp.eye(2, dtype=jnp.bfloat16)}
    assert weights.kept(kernels, (0, 1)) == 0.5 and weights.kept(kernels, (0,)) == 4.0


@pytest.mark.parametrize("dtype, offered", [("float32", True), ("int32", True), ("uint8", False), ("bool", False)])
def test_targets_of_a_type_without_minus_one_are_not_mapped_to_it(dtype, offered):
    labels = [part._replace(y=(np.asarray(part.y) > 4).astype(dtype)[:, None]) for part in (TRAIN, TEST)]
    made = case(*labels, lambda z, y: jax.nn.relu(1 - y * z), lambda: fnn.models.mlp(1, 8, 1))
    assert ("targets -1 and 1" in {c.name for c in changes.changes(made)}) is offered


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_seen_of_the_outputs_does_not_depend_on_the_dtype(dtype):
    """Probabilities in bfloat16 sum to 1 only to a per cent, and a linear net is linear only to as much."""
    for options in ({"head": "softmax"}, {"activation": "identity"}):
        made = case(net=lambda options=options: fnn.compute_in(fnn.models.mlp(2, 16, 10, **options), dtype))
        with ThreadPoolExecutor(1) as thread:
            found = start.start(trial.Runner(made, thread), Plan())
        texts = " ".join(e.text for e in symptoms.start_symptoms(made, Plan(), found))
        assert ("softmax is applied twice" in texts) is ("head" in options)
        assert found.linear is ("activation" in options)
