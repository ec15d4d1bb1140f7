"""What a diagnosis sees in data: codes for missing values, features in other units, few examples, and what a guess costs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosed import TEST, TRAIN, case, sgd

import fnn
from fnn.diagnosis import changes, data_changes, data_symptoms
from fnn.diagnosis.case import Plan
from fnn.diagnosis.loss_case import loss_case_of

pytest.importorskip("sklearn")
RNG = np.random.default_rng(0)


def named(evidence):
    return {e.cause for e in evidence}


@pytest.mark.parametrize("names", [("kernel", "bias"), ("w", "b"), ("weight", "bias"), ("W2", "c2")])
def test_the_guess_of_any_loss_is_its_best_constant(names):
    """Of a squared error the variance of the targets, however far they are from zero; of labels the entropy of their shares."""
    kernel, bias = names
    x, y = RNG.normal(size=(96, 3)).astype(np.float32), RNG.integers(0, 4, 96) // 2 * 2 + RNG.integers(0, 2, 96) // 2
    numbers = (5e5 + 1e5 * RNG.normal(size=96)).astype(np.float32)
    outputs = {"classes": 4, "numbers": 1}

    def guess(kind, with_bias=True):
        last = {kernel: jnp.ones((3, outputs[kind]) if kernel != "weight" else (outputs[kind], 3))}
        last |= {bias: jnp.zeros(outputs[kind])} if with_bias else {}

        def loss(params, batch):
            w = params["last"][kernel]
            out = jnp.tanh(batch[0]) @ (w.T if kernel == "weight" else w) + params["last"].get(bias, 0.0)
            if kind == "numbers":
                return jnp.mean((out[:, 0] - batch[1]) ** 2)
            return fnn.losses.cross_entropy(out, batch[1]).mean()

        targets = y if kind == "classes" else numbers
        made = loss_case_of(loss, {"last": last}, [(x[:48], targets[:48])], sgd(), [(x[48:], targets[48:])], None,
                            steps=1, seeds=1, shuffle=False)  # fmt: skip
        return made.reference, made.chooses.y

    got, held = guess("numbers")
    np.testing.assert_allclose(got, np.var(np.float64(held)), rtol=1e-3)
    got, held = guess("classes")
    shares = np.unique(held, return_counts=True)[1] / len(held)
    np.testing.assert_allclose(got, -(shares * np.log(shares)).sum(), rtol=2e-3)
    got, held = guess("numbers", with_bias=False)
    np.testing.assert_allclose(got, np.mean(np.float64(held) ** 2), rtol=1e-3)


def test_few_examples_are_not_taken_for_wrong_labels():
    """Of two examples of a class no more than one neighbour of five can agree; permuted labels of many examples are found."""
    y = np.asarray(TRAIN.y)
    few = TRAIN.take(np.concatenate([np.flatnonzero(y == c)[:2] for c in range(10)]))
    assert not data_symptoms.label_symptoms(case(few, batch_size=10))
    permuted = TRAIN._replace(y=np.random.default_rng(0).permutation(y))
    assert named(data_symptoms.label_symptoms(case(permuted))) == {"labels"}


@pytest.mark.parametrize("share", [0.002, 0.05])
def test_codes_for_missing_values_are_found_and_replaced(share):
    """-999 among standardised inputs; the rare values of features that are constant else are none, whatever their size."""
    rng = np.random.default_rng(1)
    holes = [
        part._replace(x=np.where(rng.random(part.x.shape) < share, -999, part.x).astype("f4")) for part in (TRAIN, TEST)
    ]
    clean, coded = case(), case(*holes)
    assert not data_symptoms.input_symptoms(clean) and np.abs(np.asarray(clean.x)).max() > 20
    assert "replace far-out x by medians" not in {c.name for c in changes.changes(clean)}
    assert any("such as -999" in e.text for e in data_symptoms.input_symptoms(coded))
    change = next(c for c in changes.changes(coded) if c.name == "replace far-out x by medians")
    (tame,) = change.apply(Plan()).data
    after, median = tame(coded), np.median(holes[0].x, axis=0)
    assert tame is data_changes.tamed and not data_symptoms.input_symptoms(after)
    far = np.asarray(coded.x) == -999
    np.testing.assert_array_equal(np.asarray(after.x), np.where(far, median, coded.x).astype("f4"))
    scope = {"np": np, "x_train": holes[0].x, "x": holes[0].x}
    exec(change.code, scope)  # the printed remedy does what was tried
    np.testing.assert_array_equal(scope["x"], after.x)
    assert (np.asarray(after.chooses.x) > -900).all() and 0.5 * share < far.mean() < 2 * share


def test_what_far_numbers_have_squashed_is_standardised_again():
    x = np.array(TRAIN.x)
    x[::150] *= 1000
    squashed = TRAIN._replace(x=((x - x.mean(0)) / np.maximum(x.std(0), 1e-6)).astype("f4"))
    change = next(c for c in changes.changes(case(squashed)) if c.name.startswith("replace far-out x"))
    assert change.apply(Plan()).data == (data_changes.tamed, data_changes.standardized)
    assert change.name.endswith("standardise") and "standardize(train, test)" in change.code


def test_one_held_out_feature_in_other_units_is_a_mismatch():
    columns = np.ones(64, "f4")
    columns[[20, 36]] = 100
    other = TEST._replace(x=np.asarray(TEST.x) * columns)
    assert not data_symptoms.split_symptoms(case()) and named(data_symptoms.split_symptoms(case(TRAIN, other))) == {
        "split_mismatch"
    }


def test_a_gradient_that_is_not_a_number_is_named_with_what_makes_it():
    """|v| of a vector of zeros, as a penalty: the loss is finite, the derivative of the square root at 0 is not."""
    x = RNG.normal(size=(32, 3)).astype(np.float32)
    y = x[:, 0] - x[:, 1]

    def loss(params, batch):
        error = jnp.mean((batch[0] @ params["w"] + params["v"][0] - batch[1]) ** 2)
        return error + 0.1 * jnp.sqrt(jnp.sum(params["v"] ** 2))

    params = {"w": jnp.asarray(RNG.normal(size=3), jnp.float32), "v": jnp.zeros(2)}
    found = fnn.diagnose_loss(loss, params, [(x, y)] * 3, optax.sgd(0.1), steps=6, seeds=1, budget=600.0)
    assert [c.name for c in found.causes] == ["numerics"] and not found.healthy
    assert "its gradient not finite before the first step" in repr(found) and "sqrt at 0" in found.remedies[0]
