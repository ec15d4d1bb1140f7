"""Losses without their weight penalties, or without one of their terms, equal losses that were written so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn.gradients.penalty import penalized, removable, unpenalized, without_term

RNG = np.random.default_rng(0)
X, Y = np.float32(RNG.normal(size=(12, 4))), np.float32(RNG.normal(size=(12, 1)))
PARAMS = jax.tree.map(
    np.float32,
    {"w": RNG.normal(size=(4, 6)), "b": RNG.normal(size=6), "v": RNG.normal(size=(6, 1)), "c": RNG.normal(size=1)},
)


def outputs(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


def plain(p, batch):
    return jnp.mean((outputs(p, batch[0]) - batch[1]) ** 2)


def squares(p):
    return sum(jnp.sum(a**2) for a in jax.tree.leaves(p))


def of_one(p, batch):
    return jnp.mean(jax.vmap(lambda x, y: jnp.sum((outputs(p, x) - y) ** 2) + 0.1 * squares(p))(*batch))


PENALIZED = {
    "l2": lambda p, batch: plain(p, batch) + 0.1 * squares(p),
    "first": lambda p, batch: 0.1 * squares(p) + plain(p, batch),
    "l1 and l2": lambda p, batch: plain(p, batch) + 0.1 * squares(p) + 0.01 * jnp.sum(jnp.abs(p["w"])),
    "scaled": lambda p, batch: (2 * plain(p, batch) + 0.1 * squares(p)) / 2,
    "less": lambda p, batch: plain(p, batch) - -0.1 * squares(p),
    "of each example": of_one,
    "jitted": jax.jit(lambda p, batch: plain(p, batch) + 0.5 * jnp.sqrt(squares(p))),
    "scan": lambda p, batch: plain(p, batch) + jax.lax.scan(lambda c, a: (c + jnp.sum(a**2), None), 0.0, p["w"])[0],
}


@pytest.mark.parametrize("name", PENALIZED)
def test_a_loss_without_its_penalty(name):
    got = jax.value_and_grad(unpenalized(PENALIZED[name]))(PARAMS, (X, Y))
    want = jax.value_and_grad(plain)(PARAMS, (X, Y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    assert penalized(PENALIZED[name], PARAMS, (X, Y))


@pytest.mark.parametrize(
    "loss",
    [
        plain,
        lambda p, batch: jnp.mean(outputs(p, batch[0])),  # biases are no penalties
        lambda p, batch: jnp.mean(outputs(p, batch[0]) * squares(p)),  # nor is a factor
        lambda p, batch: jnp.log(plain(p, batch) + squares(p)),  # nor what is inside of a function
        lambda p, batch: plain(p, batch) + 3.0,
    ],
)
def test_what_is_no_penalty_stays(loss):
    assert not penalized(loss, PARAMS, (X, Y))
    np.testing.assert_allclose(unpenalized(loss)(PARAMS, (X, Y)), loss(PARAMS, (X, Y)), rtol=1e-6)


W = {"a": np.float32(RNG.normal(size=(4, 3))), "b": np.float32(RNG.normal(size=(3, 4)))}
BATCH = np.float32(RNG.normal(size=(6, 4))), np.float32(RNG.normal(size=(6, 4)))


def error(w, x, y):
    return jnp.square(jnp.tanh(x @ w["a"]) @ w["b"] - y).mean(-1)


def code(w, x):
    return jnp.abs(jnp.tanh(x @ w["a"])).sum(-1)


LOSSES = {  # the loss, which terms can be left out, the loss without the first of these
    "of numbers": (
        lambda w, x, y: error(w, x, y).mean() + 0.3 * code(w, x).mean(),
        [1],
        lambda w, x, y: error(w, x, y).mean(),
    ),
    "within the mean": (
        lambda w, x, y: jnp.mean(2 * code(w, x) + error(w, x, y)) / 2,
        [0],
        lambda w, x, y: jnp.mean(error(w, x, y)) / 2,
    ),
    "of three": (
        lambda w, x, y: error(w, x, y).mean() + code(w, x).mean() + 0.1 * jnp.sum(jnp.exp(x @ w["a"])),
        [1, 2],
        lambda w, x, y: error(w, x, y).mean() + 0.1 * jnp.sum(jnp.exp(x @ w["a"])),
    ),
    "of two that read the targets": (
        lambda w, x, y: error(w, x, y).mean() + error(w, -x, y).sum(),
        [],
        None,
    ),
    "no sum": (lambda w, x, y: error(w, x, y).mean(), [], None),
    "a difference": (lambda w, x, y: error(w, x, y).mean() - code(w, x).mean(), [], None),
    "a number more": (lambda w, x, y: error(w, x, y).mean() + 1.0, [], None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_terms_of_a_loss_can_be_left_out_one_by_one(name):
    loss, want, rest = LOSSES[name]
    found = removable(loss, 1, W, *BATCH)
    assert found == want
    if want:
        new = without_term(loss, want[0])
        for got, right in zip(*(jax.tree.leaves(jax.value_and_grad(f)(W, *BATCH)) for f in (new, rest)), strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-7)
