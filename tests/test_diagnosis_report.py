"""The report of a diagnosis: its numbers, and the theory beside them."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosed import build, case

import fnn
from fnn.diagnosis import report, start, trial
from fnn.diagnosis.case import Plan
from fnn.diagnosis.causes import shown
from fnn.diagnosis.loss_case import loss_case_of

pytest.importorskip("sklearn")


def test_scores_at_their_end_are_not_written_as_numbers():
    assert [shown(s) for s in (-1.0, -0.994, 0.5)] == ["≤-1.00", "-0.99", "0.50"]


@pytest.mark.parametrize("norm", ["none", "batch_norm"])
def test_theory_of_a_report_is_that_of_this_width(norm):
    """Measured errors lie in the band of 19 seeds of 20."""
    options = {"depth": 24, "width": 32, "activation": "tanh", "init": fnn.initializers.scaled(0.8), "norm": norm}

    def net(**changed):
        return build(**{**options, **changed})

    net.__signature__ = inspect.Signature(
        [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in options.items()]
    )
    made = case(net=net)
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    error = begun.layers["log10_error"]
    typical, low, high = report._theory(made, Plan(), begun, error)
    assert len(typical) == 24 and np.mean((low <= error[:24] + 1e-6) & (error[:24] <= high + 1e-6)) > 0.9
    assert np.all(high[:20] - low[:20] > 0.01) and np.all((low <= typical + 1e-9) & (typical <= high + 1e-9))


@pytest.mark.parametrize("positions, blind", [(False, True), (True, False)])
def test_a_loss_alone_shows_that_the_net_cannot_see_the_order(positions, blind):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (24, 7)), rng.integers(0, 3, 24)
    params = {"table": rng.normal(size=(5, 8)), "place": rng.normal(size=(7, 8)), "out": rng.normal(size=(8, 3))}
    params = jax.tree.map(jnp.float32, params)

    def loss(params, batch):
        h = params["table"][batch[0]] + positions * params["place"]
        h = jax.nn.softmax(h @ h.swapaxes(1, 2) / 3) @ h
        logits = jnp.tanh(h).mean(1) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    made = loss_case_of(loss, params, [(x, y)], optax.sgd(0.1), None, None, steps=3, seeds=1, shuffle=True)
    with ThreadPoolExecutor(1) as thread:
        begun = start.start(trial.Runner(made, thread), Plan())
    assert begun.blind is blind
