"""Losses that are made, losses over tokens, and targets that do not fit them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special
from test_outputs import ANGLE, DIGIT, KEY, NET, RNG, SGD, STATE, TASKS, W, X, Y, close, copy, hits

import fnn
from fnn import losses

TOKENS = fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.dense(5))
SEQUENCES = RNG.normal(size=(8, 6, 3)).astype(np.float32)
TARGETS = np.where(np.arange(6) < RNG.integers(1, 7, (8, 1)), RNG.integers(0, 5, (8, 6)), -1)


def test_the_mean_over_tokens_counts_every_token_once(x64):
    """Loss, gradient and accuracy, in one batch, in windows, weighted, as a plain function, and NaN at padded positions."""
    params, net_state = jax.jit(TOKENS.init)(KEY, SEQUENCES.astype(float))
    real = TARGETS != -1
    bad = np.where(real[..., None], SEQUENCES, np.float64(0))

    def mine(outputs, y):
        there = y != -1
        each = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(there, y, 0))
        return losses.Counted(jnp.sum(each * there, 1), jnp.sum(there, 1))

    w = np.arange(1.0, 9)
    for weights in (None, w):
        data = (bad, TARGETS) if weights is None else (bad, TARGETS, weights)

        def flat(params, weights=weights):
            logits = TOKENS.apply(params, net_state, bad)[0][real]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS[real])
            counts = np.broadcast_to((np.ones(8) if weights is None else weights)[:, None], real.shape)[real]
            right = jnp.argmax(logits, -1) == TARGETS[real]
            return jnp.average(each, weights=counts), jnp.average(right, weights=counts)

        (value, accuracy), grads = jax.jit(jax.value_and_grad(flat, has_aux=True))(params)
        for loss in (losses.token_cross_entropy, mine):
            state = fnn.TrainState(params, net_state, SGD.init(params), KEY, jnp.int32(0))
            new, metrics = fnn.train_step(TOKENS, loss, SGD)(copy(state), data)
            want = jax.tree.map(lambda p, g: p - 0.1 * g, *jax.device_get((params, grads)))
            close(new.params, want, rtol=1e-12, atol=1e-14)
            for found in (metrics, fnn.evaluate(TOKENS, state, data, loss=loss, batch_size=3)):
                np.testing.assert_allclose(found["loss"], value, rtol=1e-12)
                assert loss is mine or found["accuracy"] == pytest.approx(float(accuracy), rel=1e-6)
    filled = np.where(real[..., None], np.zeros((8, 6, 5)), np.nan)
    whole = jax.value_and_grad(lambda o: losses.mean(losses.token_cross_entropy, o, TARGETS))
    value, gradient = jax.jit(whole)(filled)
    assert np.isfinite(value) and not gradient[~real].any()


def test_weights_without_a_mean_are_refused_on_the_host_and_nan_inside_jit():
    step = fnn.train_step(NET, TASKS, SGD, metrics={"hits": hits})
    for w, sentence in (
        (0 * W, "some weight must be above 0, got 24 times 0"),
        (W - 1, "weights must be finite and at least 0, got -1.0"),
        (np.where(W == 0, np.nan, W), "weights must be finite|y must be finite"),
    ):
        for call in (
            lambda w=w: step(copy(STATE), (X, Y, w)),
            lambda w=w: fnn.evaluate(NET, STATE, (X, Y, w), loss=TASKS),
            lambda w=w: fnn.fit(step, STATE, (X, Y, w), epochs=1, batch_size=4, key=KEY),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()
        new, metrics = step.jitted(copy(STATE), (X, Y, w.astype(np.float32)))
        assert all(np.isnan(metrics[name]) for name in ("loss", "loss/digit", "accuracy/digit", "hits"))
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(new.params))
    empty = np.full((2, 3), -1)
    assert np.isnan(jax.jit(lambda o: losses.mean(losses.token_cross_entropy, o, empty))(np.zeros((2, 3, 4))))


LOGITS = RNG.normal(size=(5, 4)) * 3
CLASSES = np.array([0, 3, 1, 2, 2])


def entropies(logits):
    return special.logsumexp(logits, -1)[:, None] - logits


MADE = {
    "smooth": (losses.smooth_cross_entropy(0.1), CLASSES, lambda e, p: 0.9 * p + 0.1 * e.mean(-1)),
    "smooth by 0": (losses.smooth_cross_entropy(0), CLASSES, lambda e, p: p),
    "focal": (losses.focal(2), CLASSES, lambda e, p: (1 - np.exp(-p)) ** 2 * p),
    "focal 0.5": (losses.focal(0.5), CLASSES, lambda e, p: np.sqrt(1 - np.exp(-p)) * p),
    "focal 0": (losses.focal(0), CLASSES, lambda e, p: p),
}


@pytest.mark.parametrize("name", MADE)
def test_losses_that_are_made(name, x64):
    """Values, gradients against differences, right answers, labels out of range, and certainty."""
    loss, labels, formula = MADE[name]

    def value(logits):
        e = entropies(logits)
        return formula(e, e[np.arange(5), labels])

    @jax.jit
    def measured(logits, labels):
        gradient = jax.grad(lambda o: jnp.sum(loss(o, labels)))(logits)
        return loss(logits, labels), gradient, loss.correct(logits, labels)

    values, gradient, right = map(np.asarray, measured(LOGITS, labels))
    np.testing.assert_allclose(values, value(LOGITS), rtol=1e-12)
    for i in range(4):
        h = 1e-6 * np.eye(4)[i]
        np.testing.assert_allclose(gradient[:, i], (value(LOGITS + h) - value(LOGITS - h)) / 2e-6, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(right, LOGITS.argmax(-1) == labels)
    bad = measured(LOGITS, np.array([0, 4, 1, -1, 2]))[0]
    np.testing.assert_array_equal(np.isnan(bad), [False, True, False, True, False])
    sure = 1e4 * np.eye(4)[labels]
    assert np.isfinite(measured(sure, labels)[1]).all()
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3, got 0\.\.4"):
        losses.check_targets(loss, (5, 4), np.array([0, 4]))


def test_huber_and_a_loss_of_ones_own(x64):
    outputs, targets = RNG.normal(size=(6, 3)) * 3, RNG.normal(size=(6, 3))
    e = outputs - targets
    loss = losses.huber(1.5)
    value = np.where(abs(e) <= 1.5, e**2 / 2, 1.5 * abs(e) - 1.125).mean(-1)
    np.testing.assert_allclose(loss(outputs, targets), value, rtol=1e-12)
    gradient = jax.jit(jax.grad(lambda o: jnp.sum(loss(o, targets))))(outputs)
    np.testing.assert_allclose(gradient, np.clip(e, -1.5, 1.5) / 3, rtol=1e-12)
    mae = losses.Loss("mae", lambda o, y: abs(o - y).mean(-1), lambda o, y: (abs(o - y) < 1).all(-1))
    net = fnn.dense(2)
    state = fnn.TrainState.create(net, SGD, KEY, X.astype(float))
    found = fnn.evaluate(net, state, (X, ANGLE), loss=mae, batch_size=5)
    error = abs(np.asarray(net.apply(state.params, state.net_state, X)[0]) - ANGLE)
    close(found, {"loss": error.mean(), "accuracy": (error < 1).all(-1).mean()})
    with pytest.raises(ValueError, match="mae: targets must be finite, got NaN or inf"):
        losses.check_targets(mae, (2,), np.array([0.5, np.nan]))


def run(loss=TASKS, y=Y, net=NET, state=STATE, **options):
    return fnn.train_step(net, loss, SGD, **options)(copy(state), (X, y))


REFUSED = {
    "no such output": (
        lambda: run(losses.sum_of({"digits": losses.mse})),
        "must hold an entry for each loss, got .* and none for 'digits'",
    ),
    "one output": (
        lambda: run(
            losses.sum_of([losses.mse]), (ANGLE,), fnn.dense(2), fnn.TrainState.create(fnn.dense(2), SGD, KEY, X)
        ),
        "sum_of.*must hold an entry",
    ),
    "a target too many": (lambda: run(y=Y | {"age": DIGIT}), "targets must be named or numbered like the losses"),
    "one target": (lambda: run(y=DIGIT), "targets must be named or numbered like the losses"),
    "a missing target": (lambda: run(y={"digit": DIGIT}), "mse: targets must be one array, got None"),
    "no task": (lambda: losses.sum_of({}), "needs at least one task"),
    "no loss": (lambda: losses.sum_of({"a": ("mse", 1)}), r"must have a loss, or \(loss, factor\)"),
    "no factor": (lambda: losses.sum_of({"a": (losses.mse, "1e")}), "the factor of a must be a number"),
    "trees for one loss": (lambda: run(losses.cross_entropy), "a loss needs one array, got {'angle'.*losses.sum_of"),
    "a plain pair": (
        lambda: run(lambda o, y: (o["angle"][:, 0], y["digit"])),
        "sums and counts go into fnn.losses.Counted",
    ),
    "counts of another shape": (
        lambda: run(lambda o, y: losses.Counted(o["angle"][:, 0], 3.0)),
        r"must return float\[batch\]",
    ),
    "weights of tokens": (lambda: run(y=losses.Weighted(Y, ANGLE**2)), r"weights must be float\[batch\].*Counted"),
    "weights inside": (
        lambda: run(lambda o, y: o["angle"][:, 0], {"a": losses.Weighted(DIGIT, W)}),
        "must be those of a task",
    ),
    "integers": (
        lambda: run(y=losses.Weighted(Y, DIGIT)),
        r"weights, the third of .* must be floating or bool, got int64\[24\]",
    ),
    "weights in example_loss": (
        lambda: fnn.per_example(fnn.example_loss(NET, STATE, loss=TASKS))(STATE.params, (X, Y, W)),
        "must not depend on the others, got weights",
    ),
    "tokens in example_loss": (
        lambda: fnn.per_example(
            fnn.example_loss(NET, STATE, loss=lambda o, y: losses.Counted(o["angle"][:, 0], y["digit"]))
        )(STATE.params, (X, Y)),
        "got sums and counts",
    ),
    "a taken name": (
        lambda: run(metrics={"accuracy": hits}),
        "a metric needs a name that no other has, got 'accuracy'; give it to the loss",
    ),
    "another's name": (
        lambda: run(metrics={"per_example_norms": hits}, per_example="norms"),
        "a metric needs a name that no other has, got 'per_example_norms'",
    ),
    "no metric": (lambda: run(metrics={"a": "hits"}), "a metric must be a function"),
    "a metric's shape": (
        lambda: run(metrics={"a": lambda o, y: jnp.mean(o["angle"])}),
        r"the metric 'a' must return float\[batch\]",
    ),
    "sums of a batch": (
        lambda: run(metrics={"a": losses.Metric(lambda o, y: jnp.zeros(3), jnp.sum)}),
        "examples on their first axis, got float32",
    ),
    "a penalty's shape": (
        lambda: run(penalty=lambda p: jnp.zeros(3)),
        r"penalty must return one float, got float32\[3\]; sum",
    ),
    "alpha": (lambda: losses.smooth_cross_entropy(1.5), "alpha must be between 0 and 1"),
    "gamma": (lambda: losses.focal(-1), "gamma must be at least 0"),
    "delta": (lambda: losses.huber(0), "delta must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(name):
    call, sentence = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


PLAIN_LOSSES = {
    "cross_entropy": (losses.cross_entropy, CLASSES, (4,)),
    "smooth": (losses.smooth_cross_entropy(0.1), CLASSES, (4,)),
    **{f"focal {gamma}": (losses.focal(gamma), CLASSES, (4,)) for gamma in (0, 0.5, 2)},
    "token": (losses.token_cross_entropy, np.tile(CLASSES[:, None], 2), (2, 4)),
    "sequence": (losses.sequence_cross_entropy, np.tile(CLASSES[:, None], 2), (2, 4)),
    "mse": (losses.mse, np.ones((5, 4)), (4,)),
    "huber": (losses.huber(0.5), np.ones((5, 4)), (4,)),
    "binary": (losses.binary_cross_entropy, np.array([0, 1, 0.5, 1, 0]), ()),
}


def test_an_output_that_is_not_a_number_has_a_loss_that_is_none():
    """A comparison with NaN is false: a loss that asks whether anything is wrong would find the example right."""

    @jax.jit
    def every(number):
        found = {}
        for name, (loss, labels, size) in PLAIN_LOSSES.items():
            outputs = jnp.full((5, *size), 0.3)
            found[name] = losses.mean(loss, outputs.at[1].set(number), labels)
        return found

    assert all(np.isnan(value) for value in every(np.nan).values())
    assert all(np.isfinite(value) for value in every(0.3).values())
