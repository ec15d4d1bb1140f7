"""The ward holds together: its patients differ from their twins as they say, and its scores are right."""

import dataclasses
import inspect
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, r2_score
from ward import CONTROLS, PATIENTS, autotrainer, check, controls, frameworks, patients

import fnn
from bench import report
from bench import ward as suite

NAMES = {case.name: case for case in (*PATIENTS, *CONTROLS)}


def test_names_are_unique_and_causes_from_the_list():
    assert len(NAMES) == len(PATIENTS) + len(CONTROLS)
    assert len(patients.PUBLIC) == 20 and len(controls.PUBLIC) == 7 and len(patients.CAUSES) == 28
    for patient in PATIENTS:
        faults = patient.causes if isinstance(patient.causes, tuple) else (patient.causes,)
        assert len(faults) == len(patient.main)
        for main, right in zip(patient.main, faults, strict=True):
            assert main in right and right <= patients.CAUSES, patient.name


@pytest.mark.parametrize("name", ["init_zeros", "softmax_one_unit"])
def test_a_case_is_what_a_training_needs(name):
    case = NAMES[name].make(1)
    x, y = (a[: case.batch_size] for a in case.train)
    net, tx = case.build(), case.optimizer()

    @jax.jit
    def step(key, x, y):
        params, state = net.init(key, x)
        value, grads = jax.value_and_grad(lambda p: jnp.mean(case.loss(net.apply(p, state, x)[0], y)))(params)
        return value, tx.update(grads, tx.init(params), params)

    assert np.isfinite(step(jax.random.key(0), x, y)[0])
    knobs = inspect.signature(case.build).parameters
    assert [knobs[knob].default for knob in ("depth", "width")] == [3, 64] and "head" in knobs
    params = jax.eval_shape(case.build(width=7, depth=2).init, jax.random.key(0), x)[0]
    outputs = NAMES[name].sick.knobs["outputs"]
    assert [leaf.shape[-1] for leaf in jax.tree.leaves(params)] == [7, 7, 7, 7, outputs, outputs]
    assert {"rate", "clip"} == set(inspect.signature(case.optimizer).parameters)


def test_patient_and_twin_differ_in_what_was_changed():
    sick, well = NAMES["sgd_rate_10"].sick, NAMES["sgd_rate_10"].well
    assert dataclasses.replace(sick, rate=0.1) == well and sick.rate == 10
    sick, well = NAMES["pixels_255"].make(3), NAMES["pixels_255"].twin(3)
    np.testing.assert_allclose(sick.train[0], 255 * np.asarray(well.train[0]), rtol=1e-6)
    sick = NAMES["sorted_no_shuffle"].make(3)
    assert np.all(np.diff(sick.train[1]) >= 0) and not sick.shuffle
    (bias,) = {leaf.mean().item() for leaf in jax.tree.leaves(init("bias_minus_20")) if leaf.shape == (64,)}
    assert bias == -20
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(init("init_zeros")))


def init(name):
    case = NAMES[name].make()
    return jax.jit(case.build().init)(jax.random.key(0), case.train[0][:1])[0]


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(50, 3)), rng.choice(3, 50, p=[0.7, 0.2, 0.1]).astype(np.int32)
    right = balanced_accuracy_score(y, logits.argmax(1))
    assert check.score(fnn.losses.cross_entropy, logits, y) == pytest.approx(right)
    assert check.score(fnn.losses.mse, logits, np.eye(3)[y]) == pytest.approx(right)
    z, t = rng.normal(size=(50, 1)), (y > 0).astype(np.int32)
    right = balanced_accuracy_score(t, z[:, 0] > 0)
    assert check.score(fnn.losses.binary_cross_entropy, z, t) == pytest.approx(right)
    assert check.score(lambda o, y: 0, z, t) == pytest.approx(right)
    right = balanced_accuracy_score(t, z[:, 0] > 0.5)
    assert check.score(patients.recipes.probability_loss, z, t) == pytest.approx(right)
    targets = rng.normal(size=(50, 2))
    right = r2_score(targets, targets + z, multioutput="variance_weighted")
    assert check.score(fnn.losses.mse, targets + z, targets) == pytest.approx(right)
    assert check.score(fnn.losses.mse, targets * np.nan, targets) == -np.inf
    assert check.score(fnn.losses.cross_entropy, logits * np.nan, y) == 0


def test_batches_cover_an_epoch_once():
    case = dataclasses.replace(NAMES["digits_sgd"].make(), batch_size=10, steps=7)
    rows = check.batches(35, case, 0, shuffle=True)
    assert rows.shape == (7, 10) and len(set(rows[:3].ravel())) == 30 == len(set(rows[3:6].ravel()))
    assert np.array_equal(check.batches(35, case, 0, shuffle=False)[3:6], np.arange(30).reshape(3, 10))


@pytest.mark.slow  # test_diagnosis diagnoses another fault as a whole, and sees these two in the data
@pytest.mark.parametrize("name", ["labels_permuted", "test_not_scaled", "steps_8"])
def test_diagnosis_names_the_cause(name):
    found = NAMES[name].make(0).diagnose(seeds=2, budget=600.0)
    assert found.causes[0].name in NAMES[name].causes, found


def course(**changes):
    quiet = {"loss": [1.0] * 9, "train": [0.5, 0.8, 0.9] * 3, "test": [0.5, 0.8, 0.9] * 3}
    quiet |= {"ratio": [1.0] * 9, "first": [1.0] * 9, "zeros": [0.1] * 9}
    return autotrainer.Course(**quiet | changes)


@pytest.mark.parametrize(
    "changes, want",
    [
        ({"train": [0.9] * 9, "test": [0.9] * 9}, "slow convergence"),
        ({"loss": [float("nan")] * 9}, "exploding gradient"),
        ({"train": [0.1] * 9, "test": [0.1] * 9, "zeros": [0.7] * 9}, "dying ReLU"),
        ({"train": [0.1] * 9, "test": [0.1] * 9, "ratio": [71.0] * 9}, "exploding gradient"),
        ({"train": [0.1] * 9, "test": [0.1] * 9, "ratio": [9e-4] * 9, "first": [9e-5] * 9}, "vanishing gradient"),
        ({"train": [0.1] * 9, "test": [0.1] * 9, "ratio": [9e-4] * 9}, "slow convergence"),
        ({}, "oscillating loss"),
        ({"train": [0.1 * i for i in range(1, 10)]}, None),
    ],
)
def test_rules_of_autotrainer(changes, want):
    assert autotrainer.problem(course(**changes), 9) == want


@pytest.mark.parametrize("framework", frameworks.NETS)
@pytest.mark.parametrize("name", ["relu_head_regression", "sigmoid_8"])
def test_a_patient_in_another_framework_has_the_same_loss(name, framework):
    pytest.importorskip("equinox")
    person = frameworks.REACHED[name]
    found, case = frameworks.written(person, framework), person.make(0)
    net, batch = case.build(), found.batches[0]
    params, state = net.init(jax.random.key(1000), case.train[0][: case.batch_size])
    want = jnp.mean(case.loss(net.apply(params, state, batch[0])[0], batch[1]))
    np.testing.assert_allclose(found.loss(found.params, batch), want, rtol=1e-5)
    assert set(frameworks.NAMES) == set(frameworks.REACHED)


def record(name, right, causes, **more):
    given = {"group": "own", "healthy": not causes, "two_faults": False, "seconds": 1.0, "base": [0.1], "repaired": []}
    return suite.Record(name, right=right, causes=causes, **given | more)


def test_the_suite_counts_and_takes_up_where_it_stopped(tmp_path, monkeypatch):
    """Two right of three patients, one false alarm of two controls; what a file holds is not run again."""
    records = [
        record("a", [["lr_high"]], ["lr_high", "clip"], holds=True),
        record("b", [["clip", "lr_low"]], ["lr_low"], holds=False),
        record("c", [["head"]], []),
        record("d", None, []),
        record("e", None, ["labels"]),
        record("f", [["head"], ["clip", "lr_low"]], ["lr_low", "head"], two_faults=True),
    ]
    assert [r.ok for r in records] == [True, True, False, True, False, True]
    each, rules, more = suite.sections(records, 9, True)
    assert each.notes == ["6 of 9 were run"] and [row[1] for row in each.cells][-1] == "lr_low + head"
    assert [cell[:6] for cell in rules.cells[0][2:]] == ["2 of 3", "2 of 3", "1 of 2", "1 of 4"]
    assert {row[0]: row[1] for row in more.cells}["remedies that hold on three fresh seeds"] == "1 of 2"
    (path, _) = report.write(tmp_path, "ward", "ward", "", {}, [each, rules, more])
    assert suite.earlier(path) == records
    names = {p.name for p in PATIENTS[:2]}
    monkeypatch.setattr(suite, "earlier", lambda path: [record(PATIENTS[0].name, [["a"]], ["a"])])
    monkeypatch.setattr(suite, "diagnosed", lambda person, slack: record(person.name, [["a"]], ["b"]))
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # which takes seconds here, and what other tests have traced
    options = Namespace(peers=list(names), quick=False, resume=path, seconds=None, slack=1.0)
    said: list[str] = []
    last = list(suite.run(options, said.append))[-3]
    assert len(last.cells) == 2 and last.done and len(said) == 1 and said[0].endswith("wrong")
