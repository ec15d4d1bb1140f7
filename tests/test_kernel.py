"""Tangent kernels against stored Jacobians, and infinite width against closed forms and wide nets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax

import fnn
from fnn.theory import kernels

RNG = np.random.default_rng(0)


def stored(net, state, x):
    """J Jᵀ from Jacobians stored in full: float64[batch, outputs, batch, outputs]."""
    J = jax.jit(jax.jacrev(lambda p: net.apply(p, state[1], x)[0]))(state[0])
    J = np.concatenate([np.asarray(a).reshape(*a.shape[:2], -1) for a in jax.tree.leaves(J)], axis=2)
    return np.einsum("iap,jbp->iajb", J, J)


@pytest.mark.parametrize("name", ["mlp", "conv", "repeat"])
def test_the_kernel_is_that_of_stored_jacobians(name):
    nets = {
        "mlp": (fnn.serial(fnn.dense(7), fnn.batch_norm(), fnn.activation("tanh"), fnn.dense(3)), (5, 4)),
        "conv": (fnn.serial(fnn.conv(3, 3), fnn.activation("relu"), fnn.global_avg_pool(), fnn.dense(3)), (4, 5, 5, 2)),
        "repeat": (fnn.serial(fnn.repeat(fnn.serial(fnn.dense(4), fnn.activation("tanh")), 3), fnn.dense(3)), (5, 4)),
    }
    net, shape = nets[name]
    x = as_jax(RNG.normal(size=shape), jnp.float32)
    state = net.init(jax.random.key(0), x)
    found, wanted = fnn.kernel(net)(state, x), stored(net, state, x)
    size = np.abs(wanted).max()
    np.testing.assert_allclose(found.each, np.einsum("iaja->aij", wanted), atol=3e-6 * size)
    np.testing.assert_allclose(found.full(), wanted, atol=3e-6 * size)
    matrix = np.einsum("iaja->ij", wanted) / 3
    np.testing.assert_allclose(found.matrix, matrix, atol=3e-6 * size)
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(found.eigenvalues(), values[::-1], atol=1e-5 * size)
    np.testing.assert_allclose(found.condition(), values[-1] / values[0], rtol=1e-2)
    share = values / values.sum()
    np.testing.assert_allclose(found.effective_rank(), np.exp(-np.sum(share * np.log(share))), rtol=1e-3)


def test_a_function_of_any_framework_and_alignment():
    x, y = as_jax(RNG.normal(size=(6, 4)), jnp.float32), jnp.array([0, 1, 0, 1, 1, 0])
    found = fnn.kernel(lambda p, x: p["w"].T @ x)({"w": jnp.ones((4, 2))}, x)
    np.testing.assert_allclose(found.matrix, np.asarray(x) @ np.asarray(x).T, rtol=1e-5, atol=1e-6)
    one_hot = np.eye(2)[np.asarray(y)]
    for centered in (False, True):
        H = np.eye(6) - centered / 6
        K, Y = H @ (np.asarray(x) @ np.asarray(x).T) @ H, H @ one_hot @ one_hot.T @ H
        wanted = np.sum(K * Y) / np.linalg.norm(K) / np.linalg.norm(Y)
        for targets in (y, as_jax(one_hot, jnp.float32)):
            np.testing.assert_allclose(found.alignment(targets, centered=centered), wanted, rtol=1e-4)
    rank_one = fnn.kernel(lambda p, x: p["w"] * x)({"w": jnp.ones(())}, jnp.arange(1.0, 5))
    assert np.isinf(rank_one.condition())
    np.testing.assert_allclose(rank_one.effective_rank(), 1, rtol=1e-3)


def test_gaussian_integrals_have_their_closed_forms():
    x = RNG.normal(size=(5, 3)) * np.array([[0.3], [1], [1.2], [0.7], [1.5]])
    x[4] = 1.5 * x[1]  # correlation 1, another length
    K = x @ x.T
    size = np.sqrt(np.outer(np.diag(K), np.diag(K)))
    angle = np.arccos(np.clip(K / size, -1, 1))
    start = kernels.Kernels(K, K)
    relu = kernels.activation("relu")(start)
    np.testing.assert_allclose(
        relu.nngp, size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / 2 / np.pi, atol=1e-7
    )
    np.testing.assert_allclose(relu.ntk, K * (np.pi - angle) / 2 / np.pi, atol=1e-7)
    erf = kernels.activation(jax.scipy.special.erf)(start)
    scale = np.outer(1 + 2 * np.diag(K), 1 + 2 * np.diag(K))
    np.testing.assert_allclose(erf.nngp, 2 / np.pi * np.arcsin(2 * K / np.sqrt(scale)), atol=1e-6)
    np.testing.assert_allclose(erf.ntk, K * 4 / np.pi / np.sqrt(scale - 4 * K**2), atol=1e-5)
    tanh = kernels.activation("tanh")(start).nngp
    moments = [fnn.meanfield.moments("tanh", q).second for q in np.diag(K)]
    np.testing.assert_allclose(np.diag(tanh), moments, rtol=1e-6)
    u = np.random.default_rng(1).multivariate_normal(np.zeros(2), K[:2, :2], 400_000)
    np.testing.assert_allclose(tanh[0, 1], np.mean(np.tanh(u[:, 0]) * np.tanh(u[:, 1])), atol=3e-3)
    with pytest.raises(
        ArithmeticError, match="kernels.activation: phi must be smooth, or linear on either side of 0, got relu6"
    ):
        kernels.activation(jax.nn.relu6)(kernels.Kernels(9 * K, K))


def test_recursions_of_residuals_norms_and_parametrisations():
    given = kernels.inputs(RNG.normal(size=(4, 3)))
    K = given.nngp
    np.testing.assert_allclose(kernels.dense(2.0, 0.5)(given).ntk, 4 * K + 0.25)
    np.testing.assert_allclose(kernels.residual(kernels.dense(2.0), 0.5)(given).nngp, 2 * K)
    np.testing.assert_allclose(np.diag(kernels.norm()(given).nngp), 1)
    deep = kernels.mlp("relu", 3, np.sqrt(2))(given)
    np.testing.assert_allclose(np.diag(deep.nngp), 2 * np.diag(K), rtol=1e-10)  # He: the length stays
    np.testing.assert_allclose(np.diag(deep.ntk), 4 * 2 * np.diag(K), rtol=1e-10)  # one share a layer


@pytest.mark.parametrize("phi", ["relu", "tanh"])
def test_wide_nets_come_near(phi):
    width, x = 1024, RNG.normal(size=(4, 8)).astype(np.float32)
    net = fnn.serial(fnn.dense(width), fnn.activation(phi), fnn.dense(width), fnn.activation(phi), fnn.dense(1))
    found = np.mean([fnn.kernel(net)(net.init(jax.random.key(i), x), x).matrix for i in range(3)], axis=0)
    layers = [kernels.dense(fan_in=8), kernels.activation(phi), kernels.dense(fan_in=width), kernels.activation(phi)]
    wanted = kernels.serial(*layers, kernels.dense(fan_in=width))(kernels.inputs(x)).ntk
    np.testing.assert_allclose(found, wanted, atol=0.08 * np.abs(wanted).max())


def test_bad_arguments_are_refused():
    for call, words in (
        (lambda: fnn.kernel(3), "kernel: needs a function"),
        (lambda: fnn.kernel(lambda p, x: (x, x))({"w": jnp.ones(2)}, jnp.ones((2, 2))), "must be one floating array"),
        (lambda: kernels.norm()(kernels.inputs(np.zeros((2, 2)))), "got an input of zeros"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()
