"""Platforms: choices are made from the default device, and change no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from fnn import lowering, tree


def test_the_platform_is_that_of_the_default_device():
    assert lowering.platform() == jax.default_backend()
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert lowering.platform() == "cpu"


def computed(x):
    """Norms, attention, convolutions, a pool, and their gradients."""
    images, words = x
    layers = fnn.conv(4, 3), fnn.conv(4, 3, stride=2, groups=2), fnn.max_pool(2)
    net = fnn.serial(*layers, fnn.flatten(), fnn.dense(3))
    params, state = net.init(jax.random.key(0), images)
    attend = fnn.attention(2)
    weights, started = attend.init(jax.random.key(1), words)

    def loss(params, weights):
        size = jnp.sum(jnp.sin(net.apply(params, state, images)[0]))
        return size + jnp.sum(jnp.cos(attend.apply(weights, started, words)[0]))

    grads = jax.grad(loss, (0, 1))(params, weights)
    return loss(params, weights), grads, tree.norm(grads), tree.norms(grads)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 8, 8, 2), (2, 5, 4)))


def test_other_platforms_choices_have_the_same_values(inputs, monkeypatch):
    here = jax.jit(computed)(inputs)
    jax.clear_caches()
    monkeypatch.setattr(lowering, "platform", lambda: "gpu")
    there = jax.jit(computed)(inputs)
    jax.clear_caches()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), there, here)


def test_a_program_for_another_platform_holds_no_question():
    """Exported for two platforms it is one program, and runs here with the same values."""
    x = jnp.linspace(-1, 1, 12).reshape(3, 4)
    both = jax.export.export(jax.jit(tree.norm), platforms=("cpu", "cuda"))(x)
    assert float(both.call(x)) == pytest.approx(float(tree.norm(x)), rel=1e-6)
    assert "platform_index" not in str(jax.make_jaxpr(tree.norm)(x))
