"""Causes that no repair proves: each rule names its own on what was measured, and nothing otherwise. Nothing is trained."""

from types import SimpleNamespace

import numpy as np
import pytest

from fnn.diagnosis import unproved
from fnn.diagnosis.causes import CAUSES, Evidence
from fnn.diagnosis.reads import Reads

FLAT, FALLING = np.ones((2, 20)), -(2.0 ** np.arange(20)) * np.ones((2, 1))
LEARNT = np.linspace(1, 0.1, 20) * np.ones((2, 1))
HEALTHY = {"unread": [], "reads": Reads(), "unpaired": False, "blind": False, "placed": False, "constant": False}
CASES = {  # rule: what is not healthy, the cause, and whether the scores must be bad besides
    "one_output": ({"constant": True}, "head", True),
    "unread_labels": ({"unread": [3]}, "label_encoding", False),
    "labels_without_a_minimum": ({"losses": FALLING}, "label_encoding", False),
    "one_label_alone": ({"reads": Reads(ignored=(7,))}, "loss", False),
    "every_pair": ({"unpaired": True}, "loss", True),
    "loss_against_the_score": ({"scores": (0.5, 0.1), "losses": LEARNT}, "loss", True),
    "weights_without_use": ({"idle": ["w"]}, "blocked_gradient", True),
    "no_gradient": ({}, "blocked_gradient", True),
    "no_positions": ({"blind": True}, "positions", True),
    "numbers_lost_at_the_start": ({"bad": "log gives nan"}, "numerics", True),
    "numbers_lost_in_training": ({"bad": "exp gives inf"}, "numerics", True),
}


def measured(evidence=(), losses=FLAT, bad="", tried=(), idle=(), best=0.8, share=0.6, scores=(0.5, 0.9), **begun):
    """What a diagnosis found before its verdict."""
    return SimpleNamespace(
        evidence=[Evidence(cause, "measured") for cause in evidence],
        begun=SimpleNamespace(**(HEALTHY | begun)),
        base=SimpleNamespace(
            outcome=SimpleNamespace(losses=losses, began=scores[0], chooses=scores[1], train=scores[-1])
        ),
        broken=lambda trained: bad,
        idle=list(idle),
        idle_share=share,
        best=lambda: best,
        case=SimpleNamespace(task=SimpleNamespace(chance=0.5)),
        tried={str(n): SimpleNamespace(change=SimpleNamespace(causes=causes)) for n, causes in enumerate(tried)},
    )


@pytest.mark.parametrize("rule", CASES)
def test_each_names_its_own_cause(rule):
    found, name, only_ill = CASES[rule]
    given = getattr(unproved, rule)
    cause = given(measured([name], **found), True)
    assert (cause.name, cause.repair) == (name, None) and cause.name in CAUSES and cause.remedy
    assert [e.text for e in cause.evidence] == ["measured"]
    assert (given(measured([name], **found), False) is None) == only_ill
    assert given(measured(), True) is None  # nothing was measured


@pytest.mark.parametrize("rule", ["weights_without_use", "no_positions"])
def test_a_net_that_learns_less_than_half_of_what_there_is_is_no_proof_of_health(rule):
    found, name, _ = CASES[rule]
    found = {"idle": ["w"]} | found  # what is blind alone may have no order to see
    for best, want in ((0.7, name), (0.8, None)):
        cause = getattr(unproved, rule)(measured([name], best=best, **found), False)
        assert (cause and cause.name) == want


def test_a_net_that_learns_by_heart_has_no_wrong_loss():
    overfit = measured(["loss"], losses=LEARNT, scores=(0.5, 0.3, 0.9))  # at the start, held out, of training examples
    assert unproved.loss_against_the_score(overfit, True) is None


def test_an_operation_that_loses_numbers_is_its_own_evidence():
    (cause,) = unproved.named(measured(bad="log gives nan"), True, [unproved.numbers_lost_at_the_start])
    assert "log gives nan" in cause.evidence[0].text and "log gives nan" in cause.remedy


def test_positions_that_a_change_can_give_are_left_to_that_change():
    assert unproved.no_positions(measured(["positions"], blind=True, tried=[("positions",)]), True) is None
    along_the_batch = unproved.no_positions(measured(["positions"], blind=True, placed=True), False)
    assert "encoding[None, :, :]" in along_the_batch.remedy


def test_the_first_rule_that_has_a_cause_is_heard():
    both = measured(["label_encoding", "loss"], unread=[3], unpaired=True)
    assert [c.name for c in unproved.named(both, True, unproved.LATE)] == ["label_encoding"]
    assert unproved.named(measured(), True, (unproved.empty_features, *unproved.EARLY[2:], *unproved.LATE)) == []
    rules = {*unproved.EARLY, *unproved.LATE}
    assert {rule.__name__ for rule in rules} == CASES.keys() | {"unrelated_targets", "empty_features"}
