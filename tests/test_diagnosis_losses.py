"""Losses of which only the whole is known: how they depend on targets and batches, and weights that no gradient reaches."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn.diagnosis import data_symptoms, page, run_symptoms, start, symptoms, task, trial
from fnn.diagnosis.case import Plan
from fnn.diagnosis.loss_case import loss_case_of

pytest.importorskip("sklearn")
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(64, 3)))
Y = np.float32(X @ [[1.0], [-1.0], [0.5]])
PARAMS = {
    "first": {"kernel": jnp.float32(RNG.normal(size=(3, 8)))},
    "last": {"bias": jnp.zeros(1), "kernel": jnp.float32(RNG.normal(size=(8, 1)))},
    "unused": {"kernel": jnp.float32(RNG.normal(size=(2, 2)))},
}


def forward(params, x, inside=jnp.tanh, behind=lambda z: z):
    return behind(inside(x @ params["first"]["kernel"]) @ params["last"]["kernel"] + params["last"]["bias"])


def squared(params, batch, **options):
    return jnp.mean((forward(params, batch[0], **options) - batch[1]) ** 2)


def made(loss, batch=(X, Y), score=None, rate=0.1):
    return loss_case_of(loss, PARAMS, [batch], optax.sgd(rate), None, score, steps=6, seeds=1, shuffle=False)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-6, 0), (3e3, 4.2e4)])
@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda z, y, s: np.log1p(np.exp(z)) - y * z, "linear"),
        (lambda z, y, s: (s * z - y) ** 2, "square"),
        (lambda z, y, s: np.arange(1, 65)[:, None] * (s * z - y) ** 2, ""),  # of some examples more than of others
        (lambda z, y, s: -((s * z - y) ** 2), ""),
        (lambda z, y, s: np.abs(y - np.median(y)), ""),
        (lambda z, y, s: optax.huber_loss(z, (y - y.mean()) / s), ""),
    ],
    ids=["entropy", "squares", "weighted", "sign", "absolute", "huber"],
)
def test_how_a_loss_depends_on_its_targets(loss, kind, scale, shift):
    z = np.float32(RNG.normal(size=(64, 1)))
    found = task.in_targets(lambda y: float(np.mean(loss(z, np.float64(y), scale))), np.float32(scale * Y + shift))
    assert found == kind


def test_a_squared_error_is_compared_with_neighbours_and_another_score_is_not():
    assert made(squared).task.target == "square"
    assert made(lambda p, b: jnp.mean(jnp.abs(forward(p, b[0]) - b[1]))).task.target == ""


def test_a_loss_without_a_lower_end_is_told_from_one_that_falls():
    steps = np.arange(200.0)
    falling = np.stack([1 - 3.0 * steps, 2 - 2.9 * steps])
    assert run_symptoms.endless(falling) and run_symptoms.endless(100 * falling[:, :12])
    assert not run_symptoms.endless(np.exp(-steps / 50)[None] - 5)  # a density's log may be below zero
    assert not run_symptoms.endless(np.full((1, 4), np.nan)) and not run_symptoms.endless(np.ones((1, 1)))


def test_a_loss_that_averages_before_it_squares_is_not_healthy_below_a_good_score():
    """The score is in the middle, and known to nobody but the user."""

    def loss(params, batch):
        return jnp.mean(forward(params, batch[0]) - batch[1]) ** 2

    for value, named in ((0.6, ["loss"]), (0.9, [])):
        options = {"score": lambda p, b, value=value: jnp.float32(value), "steps": 4, "seeds": 1, "progress": False}
        params = {name: PARAMS[name] for name in ("first", "last")}
        found = fnn.diagnose_loss(loss, params, [(X, Y)], optax.sgd(0.01), [(X, Y)], budget=0.1, **options)
        assert [cause.name for cause in found.causes] == named and not found.healthy


CUTS = {
    "none": ({}, [], False),
    "round": ({"inside": jnp.round}, ["first/kernel"], False),
    "norm of one unit": ({"behind": lambda z: (z - z.mean(-1, keepdims=True)) * 1.0}, [], True),
}


@pytest.mark.parametrize("name", CUTS)
def test_weights_that_no_gradient_reaches(name):
    """Those that are not used at all are none."""
    options, cut, constant = CUTS[name]
    case = made(lambda p, b: squared(p, b, **options))
    with ThreadPoolExecutor(1) as thread:
        found = start.start(trial.Runner(case, thread), Plan())
    assert (found.cut, found.constant) == (cut, constant)
    named = {e.cause for e in symptoms.start_symptoms(case, Plan(), found)} & {"blocked_gradient", "head"}
    assert named == ({"blocked_gradient"} if cut else {"head"} if constant else set())


def test_an_entropy_of_targets_beyond_one_is_not_healthy_and_repaired():
    """Masks of 0 and 255, in a dict of which one name is known."""
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(400, 3)))
    mask = np.float32(255 * ((x[:, :1] > 0.3) ^ (rng.random((400, 1)) < 0.1)))  # nowhere is a 0 certain
    data = [{"image": x[i : i + 40], "mask": mask[i : i + 40]} for i in range(0, 400, 40)]

    def loss(params, batch):
        return jnp.mean(optax.sigmoid_binary_cross_entropy(forward(params, batch["image"]), batch["mask"]))

    def score(params, batch):
        hit, true = (forward(params, batch["image"]) > 0) == (batch["mask"] > 0), batch["mask"] > 0
        return 0.5 * (jnp.sum(hit * true) / jnp.sum(true) + jnp.sum(hit * ~true) / jnp.sum(~true))

    params = jax.tree.map(lambda a: a, {k: v for k, v in PARAMS.items() if k != "unused"})
    options = {"steps": 60, "seeds": 2, "progress": False}
    found = fnn.diagnose_loss(loss, params, data[:8], optax.adam(0.03), data[8:], score=score, budget=15, **options)
    assert not found.healthy and [cause.name for cause in found.causes][:1] == ["label_encoding"]
    assert "targets from 0 to 1" in found.table()["change"].to_list()


@pytest.mark.parametrize(
    "weight, share, said",
    [(5000.0, 0.3, True), (1.0, 0.3, False), (9.0, 0.1, False), (1.0, 0.03, False), (1.0, 0.005, False)],
)
def test_a_class_that_outweighs_all_others(weight, share, said):
    """Its weight over that of the others at outputs of 0 is weight * share / (1 - share); without weights anything is healthy."""
    y = np.int32(np.arange(200) < 200 * share)

    def loss(z, y):
        z = z.reshape(len(z))
        return weight * y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z)

    found = symptoms._weighed(loss, y, 1)
    assert bool(found) is said and all("class 1" in e.text and "2.14e+03 times" in e.text for e in found)


def test_weights_that_are_good_already_are_no_guess():
    """A training that goes on from a checkpoint would be compared with itself."""
    first, slope, trained = made(squared).reference, jax.jit(jax.grad(squared)), PARAMS
    for _ in range(200):
        trained = jax.tree.map(lambda p, g: p - 0.05 * np.asarray(g), trained, slope(trained, (X, Y)))
    assert squared(trained, (X, Y)) < 0.9 * first
    case = loss_case_of(squared, trained, [(X, Y)], optax.sgd(0.1), None, None, steps=6, seeds=1, shuffle=False)
    assert case.reference == pytest.approx(first, rel=0.02)


def test_a_loss_that_can_be_negative_needs_a_score():
    """1 - loss/guess is no share then; of changed targets alone (counts, standardised) such a loss is no success."""

    def shifted(p, b):
        return squared(p, b) - 10.0

    with pytest.raises(ValueError, match="the loss must be at least 0, so that 1 - loss/guess can be the score, got -"):
        made(shifted)
    case = made(squared)
    with pytest.raises(ValueError, match="can be the score, got -3; pass score="):
        case.scored(np.array([0.5, -3.0]))
    assert replace(case, other_targets=True).scored(np.array([0.0, -3.0])).tolist() == [1.0, -1.0]
    assert case.with_y(lambda part, y: y).other_targets


def test_a_score_that_training_does_not_raise_is_no_health():
    """A loss with the wrong sign lowers it; the repair is the other sign."""
    rng = np.random.default_rng(3)
    x = np.float32(rng.normal(size=(96, 3)))
    y = np.int32(x[:, 0] > 0)
    batches = [{"x": x[i : i + 16], "y": y[i : i + 16]} for i in range(0, 64, 16)]
    params = {"w": np.float32([[0.5], [0.5], [-0.4]])}

    def margins(params, batch):
        return (batch["x"] @ params["w"])[:, 0] * (2 * batch["y"] - 1)

    found = fnn.diagnose_loss(
        lambda p, b: jnp.mean(jax.nn.softplus(margins(p, b))),
        params,
        batches,
        optax.sgd(0.5),
        [{"x": x[64:], "y": y[64:]}],
        score=lambda p, b: jnp.mean(margins(p, b) > 0),
        steps=60,
        seeds=2,
        budget=60,
        progress=False,
    )
    assert not found.healthy and found.causes[0].name == "loss"
    assert "the score falls too" in found.causes[0].evidence[0].text


def test_neighbours_are_asked_for_inputs_that_are_a_tree():
    rng = np.random.default_rng(3)
    x = np.float32(rng.normal(size=(80, 2)))
    y = np.int32(x[:, 0] > 0)
    keys = rng.integers(0, 2**32, (80, 2), dtype=np.uint32)  # raw random keys have all 32 bits
    whole = {"image": x, "key": keys, "label": y}
    given = [jax.tree.map(lambda a, i=i: a[i : i + 16], whole) for i in range(0, 80, 16)]

    def loss(params, batch):
        return jnp.mean(fnn.losses.cross_entropy(batch["image"] @ params["w"], batch["label"]))

    made = loss_case_of(
        loss,
        {"w": jnp.zeros((2, 2))},
        given[:3],
        optax.sgd(0.1),
        given[3:],
        lambda p, b: 0.0,
        steps=6,
        seeds=1,
        shuffle=False,
    )
    assert 0.7 < data_symptoms.within_reach(made) < 1
    plain = made.with_x(lambda name, a: a["image"])
    assert data_symptoms.within_reach(made) == data_symptoms.within_reach(plain)


def test_a_cell_is_used_more_than_once():
    """Two encoders of one width have the shapes of a recurrent cell."""
    params = {"a": jnp.ones((6, 8)), "b": jnp.ones((2, 8)), "bias": jnp.zeros(8)}
    x = np.float32(np.random.default_rng(0).normal(size=(32, 8)))

    def encoders(params, batch):
        return jnp.mean((batch[0][:, :6] @ params["a"] + batch[0][:, 6:] @ params["b"] + params["bias"]) ** 2)

    def cell(params, batch):
        def step(h, x):
            return jnp.tanh(x @ params["a"] + h @ params["b"] + params["bias"])[:, :2], None

        return jnp.mean(jax.lax.scan(step, batch[0][:, 6:], jnp.stack([batch[0][:, :6]] * 3))[0] ** 2)

    for loss, want in ((encoders, False), (cell, True)):
        made = loss_case_of(loss, params, [(x, x[:, :1])], optax.sgd(0.1), None, None, steps=6, seeds=1, shuffle=False)
        assert made.gated == want


def test_weights_that_never_reach_the_loss_are_told_from_gates_that_open():
    def state(idle, **gradient):
        return SimpleNamespace(idle=idle, gradient=gradient, constant=False)

    begun = state(("a", "b"), a=-np.inf, b=-np.inf, c=0.5)
    assert run_symptoms.never_used(begun, state(("b",))) == ["b"]
    nothing = state(("a",), a=-np.inf)  # reaches the loss: it is the head's fault, or the loss's
    assert run_symptoms.never_used(nothing, nothing) == []


def test_a_net_that_was_trained_before_and_stays_as_it_is_is_undecided():
    """It may be at its best, or learn nothing."""
    rng = np.random.default_rng(4)
    x = np.float32(0.1 * rng.normal(size=(160, 1)))
    y = np.int32(x[:, 0] + 0.08 * rng.normal(size=160) > 0)
    trained = {"w": np.float32([[-5, 5]]), "b": np.zeros(2, np.float32)}
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 96, 16)]

    def loss(p, b):
        return jnp.mean(fnn.losses.cross_entropy(b[0] @ p["w"] + p["b"], b[1]))

    def accuracy(p, b):
        return jnp.mean(jnp.argmax(b[0] @ p["w"] + p["b"], 1) == b[1])

    options = {"score": accuracy, "steps": 40, "seeds": 2, "budget": 60, "progress": False}
    found = fnn.diagnose_loss(loss, trained, batches, optax.sgd(1e-3), [(x[96:], y[96:])], **options)
    assert not found.healthy and not found.causes and repr(found).startswith("UNDECIDED")
    assert "NOT HEALTHY FOR SURE  training does not raise the score" in repr(found)
    assert "<h1>Undecided: training does not raise the score" in page.text(found)
