"""Thresholds of optimisers and the preconditioned sharpness, against their own steps and the numbers of their states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax
from optax import contrib

import fnn
from fnn.spectra import stability


def quadratic(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return as_jax(q * eigenvalues @ q.T), q


def half(params, A):
    return 0.5 * params["x"] @ A @ params["x"]


OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), 2 / 0.1),
    "momentum": (optax.sgd(0.1, momentum=0.9), 3.8 / 0.1),
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), 3.8 / 2.8 / 0.1),
    "schedule": (optax.sgd(optax.constant_schedule(0.05), momentum=0.5), 3 / 0.05),
    "decay": (optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), 2 / 0.1 - 0.5),
    "adam": (optax.adam(0.01), 38 / 0.01),
    "adam, other numbers": (optax.adam(0.01, b1=0.5, b2=0.9, eps=1e-3), 3 / 0.5 / 0.01),
    "rmsprop": (optax.rmsprop(0.01), 2 / 0.01),
    "clipped": (optax.chain(optax.clip_by_global_norm(1e3), optax.adamw(0.01, weight_decay=0.0)), 38 / 0.01),
}


ALIKE = ("schedule", "adam", "clipped")
"""A rate is a number, Adam is there with other numbers, and a clip that does nothing is `decay`'s chain."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in OPTIMIZERS])
def test_thresholds_and_preconditioned_sharpness(name, x64):
    """The ratio says on which side of the edge the optimiser's own steps grow, with its second moment held."""
    optimizer, threshold = OPTIMIZERS[name]
    A, _ = quadratic(np.array([4.0, 1.5, 0.3]))
    params = {"x": jnp.array([1.0, 2.0, -1.0])}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for scale in (1.0, 0.7, 0.4):
        _, state = update({"x": scale * np.asarray(A) @ np.asarray(params["x"])}, state, params)
    c = fnn.curvature(half)(params, A)
    found = c.preconditioned(optimizer, state, tolerance=1e-9)
    np.testing.assert_allclose(found.threshold, threshold, rtol=2e-5)
    if "nu" in str(state):
        b1, b2, eps = (0.5, 0.9, 1e-3) if "other" in name else (0.0 if name == "rmsprop" else 0.9, 0.999, 1e-8)
        b2 = 0.9 if name == "rmsprop" else b2
        nu, t = np.asarray(optax.tree_utils.tree_get(state, "nu")["x"]), 3
        corrected = nu if name == "rmsprop" else nu / (1 - b2**t)
        inverse = 1 / ((1 - b1**t) * (np.sqrt(corrected) + eps))
    else:
        inverse = np.ones(3)
    wanted = np.max(np.linalg.eigvals(inverse[:, None] * np.asarray(A)).real)
    np.testing.assert_allclose(found.value, wanted, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.sgd(1.0, momentum=0.9, nesterov=True), optax.sgd(1.0, momentum=0.8)])
def test_steps_grow_just_above_the_threshold_and_shrink_just_below(optimizer, x64):
    start = {"x": jnp.ones(1)}
    threshold = fnn.curvature(half)(start, jnp.eye(1)).preconditioned(optimizer, optimizer.init(start)).threshold

    @jax.jit
    def moved(A):
        def body(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(half)(params, A), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (start, optimizer.init(start)), None, 2000)[0][0]["x"][0]

    for factor, grows in ((0.99, False), (1.01, True)):
        assert (abs(moved(factor * threshold * jnp.eye(1))) > 1) == grows


def test_other_optimisers_are_refused():
    params = {"x": jnp.ones(3)}
    c = fnn.curvature(half)(params, jnp.eye(3))
    for optimizer, words in (
        (optax.lion(0.1), "got ScaleByLionState"),
        (optax.sign_sgd(0.1), "must scale each gradient by a number of its own"),
        (optax.adam(0.1), "must have taken a step, got second moments of zero"),
        (fnn.optimizers.packed(optax.adam(0.1)), "the moments must be trees like params"),
        (optax.adam(0.1, mu_dtype=jnp.bfloat16), "moments must have the precision of params, float32, got bfloat16"),
    ):
        state = optimizer.init(params)
        if "moments must" in words:
            state = optimizer.update(params, state, params)[1]
        with pytest.raises(ValueError, match=words):
            c.preconditioned(optimizer, state)


@pytest.mark.parametrize("name", [pytest.param("adam", marks=pytest.mark.slow), "adam, with an epsilon", "rmsprop"])
def test_second_moments_of_tiny_gradients(name):
    """Gradients of 1e-17, float32: P is that of float64, by hand, from the moments as they stand."""
    eps = 1e-18 if "epsilon" in name else 0.0
    optimizer = optax.rmsprop(0.01, eps=eps) if name == "rmsprop" else optax.adam(0.01, eps=eps)
    params, A = {"x": jnp.ones(3)}, jnp.diag(jnp.array([4.0, 1.5, 0.3]))
    state = optimizer.init(params)
    for scale in (1e-17, 0.7e-17, 0.4e-17):
        _, state = optimizer.update({"x": scale * jnp.array([1.0, 2.0, -1.0])}, state, params)
    nu = np.asarray(optax.tree_utils.tree_get(state, "nu")["x"], np.float64)
    assert nu.max() < 1e-32
    inverse = 1 / np.sqrt(nu) if name == "rmsprop" else 1 / ((1 - 0.9**3) * (np.sqrt(nu / (1 - 0.999**3)) + eps))
    found = fnn.curvature(half)(params, A).preconditioned(optimizer, state)
    np.testing.assert_allclose(found.value, np.max(inverse * np.diag(A)), rtol=1e-4)
    np.testing.assert_allclose(found.threshold, 2 / 0.01 if name == "rmsprop" else 38 / 0.01, rtol=1e-4)


def test_a_second_moment_of_zero_needs_an_epsilon():
    params = {"x": jnp.ones(3)}
    c = fnn.curvature(half)(params, jnp.eye(3))
    for eps in (1e-8, 0.0):
        optimizer = optax.adam(0.01, eps=eps)
        _, state = jax.jit(optimizer.update)({"x": jnp.array([1.0, 0.0, 1.0])}, optimizer.init(params), params)
        if eps:
            np.testing.assert_allclose(c.preconditioned(optimizer, state).value, 1 / (0.1 * eps), rtol=1e-4)
        else:
            with pytest.raises(ValueError, match="a second moment of zero needs an epsilon, got one without"):
                c.preconditioned(optimizer, state)
            inverse = stability.preconditioner("test", optimizer, state, params)
            assert np.isnan(inverse["x"][1]) and np.all(np.isfinite(np.asarray(inverse["x"])[[0, 2]]))


def test_normalised_steps_are_refused():
    params = {"x": jnp.ones(3)}
    optimizer = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="must scale each gradient by a number of its own"):
        fnn.curvature(half)(params, jnp.eye(3)).preconditioned(optimizer, optimizer.init(params))


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1, momentum=0.9), optax.adam(0.01), optax.rmsprop(0.01)],
    ids=["momentum", "adam", "rmsprop"],
)
def test_parameters_in_half_precision_have_the_rule_of_float32(optimizer):
    A = jnp.diag(jnp.array([4.0, 1.5, 0.3]))

    def loss(params, A):
        return half(jax.tree.map(lambda a: a.astype(jnp.float32), params), A)

    found = {}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = {"x": jnp.array([1.0, 2.0, -1.0], dtype)}
        state = optimizer.init(params)
        for scale in (1.0, 0.7, 0.4):
            grads = {"x": (scale * A @ params["x"].astype(jnp.float32)).astype(dtype)}
            _, state = optimizer.update(grads, state, params)
        found[dtype] = fnn.curvature(loss)(params, A).preconditioned(optimizer, state)
    for dtype in (jnp.bfloat16, jnp.float16):
        np.testing.assert_allclose(found[dtype].threshold, found[jnp.float32].threshold, rtol=1e-6)
        rtol = 2 * float(jnp.finfo(dtype).eps)  # of the Hessian's products, and of the moments
        np.testing.assert_allclose(found[dtype].value, found[jnp.float32].value, rtol=rtol)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.01, mu_dtype=jnp.bfloat16), optax.sgd(0.01, momentum=0.9, accumulator_dtype=jnp.bfloat16)],
)
def test_moments_that_the_optimiser_rounds_itself_are_refused(optimizer):
    params = {"x": jnp.ones(3, jnp.bfloat16)}
    state = optimizer.update(params, optimizer.init(params), params)[1]
    with pytest.raises(
        ValueError, match="must keep moments in the precision that it is given, got one that rounds them"
    ):
        fnn.curvature(half)(params, jnp.eye(3)).preconditioned(optimizer, state)


def test_an_epsilon_that_float16_does_not_hold_is_none():
    params, optimizer = {"x": jnp.ones(3, jnp.float16)}, optax.adam(0.01)
    _, state = jax.jit(optimizer.update)({"x": jnp.array([1, 0, 1], jnp.float16)}, optimizer.init(params), params)
    assert not np.all(np.isfinite(jax.jit(optimizer.update)({"x": 0 * params["x"]}, state, params)[0]["x"]))
    with pytest.raises(ValueError, match="a second moment of zero needs an epsilon, got one without"):
        fnn.curvature(half)(params, jnp.eye(3)).preconditioned(optimizer, state)


@pytest.mark.parametrize("make", [optax.adamax, contrib.adopt, optax.radam, optax.yogi])
def test_second_moments_with_a_rule_of_their_own_are_refused(make):
    """They keep their moments in Adam's state."""
    params, optimizer = {"x": jnp.array([1.0, 2.0, -1.0])}, make(0.01)
    state = optimizer.init(params)
    for scale in (1.0, 0.7, 0.4):
        _, state = optimizer.update({"x": scale * params["x"]}, state, params)
    words = "must scale each gradient" if make is optax.yogi else "must divide by the root of its second moment"
    with pytest.raises(ValueError, match=f"the optimiser {words}"):
        fnn.curvature(half)(params, jnp.eye(3)).preconditioned(optimizer, state)


def test_momentum_behind_rmsprop_is_not_bias_corrected():
    params, optimizer = {"x": jnp.ones(3)}, optax.rmsprop(0.01, momentum=0.9, bias_correction=True)
    state = optimizer.update(params, optimizer.init(params), params)[1]
    found = fnn.curvature(half)(params, jnp.eye(3)).preconditioned(optimizer, state)
    np.testing.assert_allclose(found.threshold, 3.8 / 0.01, rtol=1e-5)
