"""What a diagnosis sees in data: codes for missing values, features in other units, few examples, and what a guess costs."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax
from diagnosed import TEST, TRAIN, case, sgd

import fnn
from fnn.datasets.dataset import Dataset
from fnn.diagnosis import changes, data_changes, data_symptoms, ids, parts, repeats, split
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import Evidence
from fnn.diagnosis.inquiry import NOTHING, Inquiry
from fnn.diagnosis.loss_case import loss_case_of
from fnn.diagnosis.trial import Runner

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


# Held-out data against training data.

SPARSE = {
    "normal": lambda n, rng: rng.normal(size=(n, 40)),
    "one number in all": lambda n, rng: rng.normal(size=(n, 1)) * np.ones(40),
    "coins": lambda n, rng: rng.integers(0, 2, (n, 40)),
    "mostly zero": lambda n, rng: np.where(rng.random((n, 40)) < 0.26, rng.lognormal(1, 2, (n, 40)), 0),
}


def of_parts(x, held):
    """Make a case of inputs alone."""
    train, test = (Dataset(np.float32(part), np.arange(len(part)) % 3) for part in (x, held))
    return case(train, test, net=lambda width=8: fnn.models.mlp(1, width, 3), batch_size=4)


@pytest.mark.parametrize("kind", SPARSE)
def test_parts_drawn_alike_are_no_mismatch(kind):
    """Of 24 rows a feature may span a tenth of what it spans in others, or be the same in all."""
    rng, draw = np.random.default_rng(3), SPARSE[kind]
    for n, m in ((8, 8), (24, 300), (300, 20)):
        made = of_parts(draw(n, rng), draw(m, rng))
        for _ in range(12):
            x, held = draw(n, rng), draw(m, rng)
            alike = made.with_x(
                lambda part, a, x=x, held=held: np.float32(
                    {"train": x, "chooses": held[::2], "checks": held[1::2]}[part]
                )
            )
            assert not split.split_symptoms(alike)


def test_true_mismatches_are_found_in_few_rows():
    rng = np.random.default_rng(4)
    one, cube = np.where(np.arange(40) == 7, 10, 1), SPARSE["mostly zero"]
    normal = SPARSE["normal"]
    for x, held in (
        (normal(12, rng), 40 * normal(12, rng) + 90),
        (normal(500, rng), one * normal(500, rng)),
        (normal(60, rng), one * normal(60, rng)),
        (cube(300, rng) / 255, cube(300, rng)),
    ):
        assert named(split.split_symptoms(of_parts(x, held))) == {"split_mismatch"}


def test_the_bound_of_a_hypergeometric_tail():
    """It is never below the tail, and above it by less than a half where the tail is small."""
    from scipy.stats import hypergeom

    rows, n = 60, 24
    among, found = (a.ravel() for a in np.meshgrid(np.arange(1, 60), np.arange(24)))
    there = (found <= among) & (n - found <= rows - among)
    among, found = among[there], found[there]
    exact, bound = hypergeom.cdf(found, rows, among, n), split._tail(found, n, among, rows)
    assert (bound >= exact * (1 - 1e-9)).all()
    assert (bound <= 1.5 * exact)[exact < 0.02].all() and (exact < 0.02).sum() > 100


def bags(n, rng, words=12):
    """Bags of 8 words of 2 classes; which class a word belongs to is its parity."""
    y = rng.integers(0, 2, n)
    return rng.integers(0, words // 2, (n, 8)) * 2 + (y[:, None] + (rng.random((n, 8)) < 0.2)) % 2, np.int32(y)


@pytest.mark.parametrize(
    "what, want", [("other ids", "split_mismatch"), ("labels", "labels"), ("alike", "too_little_data")]
)
def test_fewer_held_out_examples_that_teach_more_are_no_lack_of_data(what, want):
    """Held-out ids that are numbered anew, or training labels that are permuted: 80 held-out examples teach more than 400."""
    rng = np.random.default_rng(5)
    (x, y), (held, of_held) = bags(400, rng), bags(160, rng)
    if what == "other ids":
        held = (held + 1) % 12
    y = rng.permutation(y) if what == "labels" else y

    def loss(params, batch):
        return fnn.losses.cross_entropy(params["embedding"][batch[0]].mean(1) @ params["w"], batch[1]).mean()

    params = {"embedding": jnp.float32(rng.normal(size=(12, 8))), "w": jnp.float32(rng.normal(size=(8, 2)))}
    batches = [(np.int32(x[i : i + 40]), y[i : i + 40]) for i in range(0, 400, 40)]
    made = loss_case_of(loss, params, batches, optax.adam(0.03), (np.int32(held), of_held), None,
                        steps=100, seeds=2, shuffle=True)  # fmt: skip
    with ThreadPoolExecutor(1) as thread:
        inquiry = Inquiry(Runner(made, thread), 600.0, lambda text: None)
        inquiry.train(NOTHING, Plan())
        alone = next(c for c in changes.changes(made) if c.name == "learn half of the held-out data alone")
        inquiry.train(alone, alone.apply(Plan()))
        inquiry.evidence = [Evidence("too_little_data", "better on training examples")]
        assert [e.cause for e in parts.judged(inquiry)] == [want]
        inquiry.evidence = [
            Evidence("label_encoding", "measured"),
            *inquiry.evidence,
        ]  # what was measured needs no more
        assert [e.cause for e in parts.judged(inquiry)] == ["label_encoding"] + ["too_little_data"] * (what == "alike")


def test_few_training_examples_as_an_arm():
    made = of_parts(np.arange(20)[:, None], 100 + np.arange(12)[:, None])
    fewer = parts.fewer(made)
    learnt, others = (set(np.ravel(part.x)) for part in (fewer.train, fewer.chooses))
    assert [len(learnt), len(others)] == [6, 6] and not learnt & others and learnt | others < set(range(20))
    assert [p.size for p in (fewer.train, fewer.chooses, fewer.checks)] == [20, 6, 6]
    np.testing.assert_array_equal(fewer.checks.x, made.checks.x)


@pytest.mark.parametrize(
    "across, within, want", [(0.2, 0.8, "split_mismatch"), (0.2, 0.3, "labels"), (0.75, 0.8, None)]
)
def test_a_net_to_which_more_examples_do_harm_is_no_mismatch(across, within, want):
    """Few training examples that teach as much as few held-out ones show that the parts are alike."""
    plans = {Plan(): 0.3, Plan(learn="held out"): 0.8}
    base, alone = (
        SimpleNamespace(plan=plan, scores=(score,) * 2, outcome=SimpleNamespace(checks=np.full(2, score)))
        for plan, score in plans.items()
    )
    same = SimpleNamespace(checks=np.full(2, across), chooses=np.full(2, within))
    inquiry = SimpleNamespace(
        case=case(),
        evidence=[Evidence("too_little_data", "")],
        tried={"as it is": base, "alone": alone},
        base=base,
        runner=SimpleNamespace(run=lambda plan, seeds: same),
    )
    assert named(parts.judged(inquiry)) == {want or "too_little_data"}


# Ids.


def texts(n, rng, padded=True, unknown=True):
    x = np.ones((n, 6), int) if unknown else rng.integers(1, 9, (n, 6))
    return np.where(padded & (np.arange(6) >= rng.integers(3, 7, n)[:, None]), 0, x)


def ids_case(make, label, train_label=None):
    """Make a case of ids and labels; the training labels may be others."""
    rng = np.random.default_rng(6)
    made = []
    for n, label_of in ((400, train_label or label), (120, label)):
        x = make(n, rng)
        made.append(Dataset(np.int32(x), np.int32(label_of(x, rng))))
    return case(*made, net=lambda width=4: fnn.models.rnn(1, width, 3, vocabulary=9), batch_size=8)


def coin(x, rng):
    return rng.integers(0, 3, len(x))


def length(x, rng):
    return (x > 0).sum(1) % 3


@pytest.mark.parametrize("marks", [False, True])
def test_texts_of_which_every_word_is_unknown_are_empty(marks):
    """Alike in all but their padding, behind or before them, with marks of their begin and end or without."""

    def marked(n, rng):
        x = texts(n, rng)
        x[:, 0] = 2
        x[np.arange(n), (x > 0).sum(1) - 1] = 3
        return x[:, ::-1]

    (found,) = ids.id_symptoms(ids_case(marked if marks else texts, coin))
    assert found.cause == "input_empty" and "0 occurs, 0 to 3 times in 6" in found.text
    (found,) = ids.id_symptoms(ids_case(lambda n, rng: np.ones((n, 6)), coin))
    assert found.text == "all inputs are equal"


@pytest.mark.parametrize(
    "make, label, train_label",
    [
        (lambda n, rng: texts(n, rng, unknown=False), coin, None),
        (lambda n, rng: np.arange(99) < rng.integers(0, 100, (n, 1)), coin, None),
        (texts, length, None),
        (texts, length, coin),
        (lambda n, rng: rng.integers(0, 2, (n, 3)), lambda x, rng: x.sum(1) % 2, None),
        (lambda n, rng: rng.integers(0, 2, (n, 6)), lambda x, rng: x.sum(1) % 2, None),
        (lambda n, rng: rng.integers(0, 2, (n, 16)), coin, None),
        (lambda n, rng: rng.integers(0, 2, (n, 1)), lambda x, rng: (x[:, 0] + (rng.random(len(x)) < 0.3)) % 2, None),
    ],
    ids=[
        "words",
        "too many lengths to judge",
        "length decides",
        "training labels permuted",
        "parity of 3",
        "parity of 6",
        "bits",
        "one noisy bit",
    ],
)
def test_ids_that_hold_something_are_not_empty(make, label, train_label):
    assert not ids.id_symptoms(ids_case(make, label, train_label))


def test_a_gradient_that_is_not_a_number_is_named_with_what_makes_it():
    """|v| of a vector of zeros, as a penalty: the loss is finite, the derivative of the square root at 0 is not."""
    x = RNG.normal(size=(32, 3)).astype(np.float32)
    y = x[:, 0] - x[:, 1]

    def loss(params, batch):
        error = jnp.mean((batch[0] @ params["w"] + params["v"][0] - batch[1]) ** 2)
        return error + 0.1 * jnp.sqrt(jnp.sum(params["v"] ** 2))

    params = {"w": as_jax(RNG.normal(size=3), jnp.float32), "v": jnp.zeros(2)}
    found = fnn.diagnose_loss(loss, params, [(x, y)] * 3, optax.sgd(0.1), steps=6, seeds=1, budget=600.0)
    assert [c.name for c in found.causes] == ["numerics"] and not found.healthy
    assert "its gradient not finite before the first step" in repr(found) and "sqrt at 0" in found.remedies[0]


def test_all_columns_of_the_targets_are_asked_of_neighbours():
    """The first one is constant, the second is known to neighbours, the third is noise."""
    rng = np.random.default_rng(5)
    x = np.float32(rng.normal(size=(300, 2)))
    y = np.float32(np.stack([np.ones(300), x[:, 0], rng.normal(size=300)], 1))
    made = case((x[:200], y[:200]), (x[200:], y[200:]), loss=fnn.losses.mse, net=lambda: fnn.dense(3))
    near = data_symptoms._near(x[200:], x[:200])
    left = np.mean((y[:200][near].mean(1) - y[200:]) ** 2, 0)[1:] / y[200:].var(0)[1:]
    assert data_symptoms.within_reach(made) == pytest.approx(np.mean(1 - left), abs=1e-3)
    constant = case((x[:200], y[:200, :1]), (x[200:], y[200:, :1]), loss=fnn.losses.mse, net=lambda: fnn.dense(1))
    assert data_symptoms.within_reach(constant) <= 0


def test_copies_of_examples_are_counted_once():
    x = np.repeat(np.arange(6, dtype=np.float32)[:, None], 5, 0)
    assert repeats.different(x) == 6 and repeats.different({"a": x, "b": np.arange(30)}) == 30
