"""Gradients of single examples in the train step and in `fit`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import begun
from subjects import B, draw, flat, labels

import fnn
from fnn.gradients import noise


def test_train_step_with_norms_and_clip():
    x, y = draw(B, 5), labels()
    layer = fnn.models.mlp(3, 8, 3, activation="tanh", norm="batch_norm", taps=True, unroll=1)
    optimizer = optax.sgd(0.1)
    state = begun(layer, optimizer, x)
    loss = fnn.example_loss(layer, state, loss=fnn.losses.cross_entropy, axis_name="batch")

    # By hand from the gradients of all examples, in NumPy.
    oracle = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0), axis_name="batch"))(state.params, (x, y))
    vectors = flat(oracle)
    norms = np.linalg.norm(vectors, axis=1)
    max_norm = float(np.median(norms))
    want = np.mean(vectors * np.minimum(1, max_norm / norms)[:, None], axis=0)
    variance = np.sum(np.var(vectors, axis=0, ddof=1))
    signal_to_noise = (np.sum(np.square(vectors.mean(0))) - variance / B) / variance
    state = jax.device_get(state)  # a step takes no array of NumPy's away

    def run(**options):
        step = fnn.train_step(layer, fnn.losses.cross_entropy, optimizer, per_layer=True, **options)
        return step(state.replace(key=jax.random.key(1)), (x, y))

    plain, with_norms = run(), run(per_example="norms")
    for a, b in zip(jax.tree.leaves(plain[0].params), jax.tree.leaves(with_norms[0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for a, b in zip(jax.tree.leaves(plain[0].net_state), jax.tree.leaves(with_norms[0].net_state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    rows = [fnn.taps.read(*metrics["taps"]) for _, metrics in (plain, with_norms)]
    for a, b in zip(*rows, strict=True):
        if a.quantity != "dead":  # of a batch of one, then averaged
            np.testing.assert_allclose(a.value, b.value, atol=1e-5)
    metrics = with_norms[1]
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], plain[1][name], rtol=1e-5)
    np.testing.assert_allclose(metrics["per_example_norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(metrics["per_example_quantiles"], np.quantile(norms, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-5)
    np.testing.assert_allclose(metrics["noise_trace"], variance, rtol=1e-4)
    trace = sum(np.sum(a) for a in jax.tree.leaves(metrics["noise_traces"]))
    np.testing.assert_allclose(trace, metrics["noise_trace"], rtol=1e-5)
    np.testing.assert_allclose(metrics["noise_signal"] / metrics["noise_trace"], signal_to_noise, rtol=1e-3)
    clipped, metrics = run(per_example="clip", max_norm=max_norm)
    leaves = zip(*map(jax.tree.leaves, (state.params, clipped.params)), strict=True)
    moved = np.concatenate([np.ravel(old - np.asarray(new)) / 0.1 for old, new in leaves])
    np.testing.assert_allclose(moved, want, atol=2e-5)
    np.testing.assert_allclose(metrics["examples_clipped"], 0.5)
    np.testing.assert_allclose(metrics["clip_bias"], np.linalg.norm(want - vectors.mean(0)), rtol=1e-4)
    lone = fnn.serial(fnn.dense(3))
    state = begun(lone, optimizer, x)
    step = fnn.train_step(lone, fnn.losses.cross_entropy, optimizer, per_example="norms")
    with pytest.raises(ValueError, match="train_step: per_example='norms' .* got a batch of one"):
        step(state, (x[:1], y[:1]))
    step = fnn.train_step(lone, fnn.losses.cross_entropy, optimizer, per_example="clip", max_norm=1.0)
    assert np.isnan(step(state, (x[:1], y[:1]))[1]["noise_trace"])
    state = begun(layer, optimizer, x)
    for options in ({"per_example": "clip"}, {"max_norm": 1.0}, {"per_example": "norm"}):
        with pytest.raises(ValueError, match="train_step"):
            run(**options)


def test_fit_carries_noise_and_the_scale_follows():
    train = draw(64, 5), jnp.arange(64) % 3
    layer = fnn.models.mlp(2, 8, 3)
    optimizer = optax.sgd(0.01)
    state = begun(layer, optimizer, train[0][:8])
    step = fnn.train_step(layer, fnn.losses.cross_entropy, optimizer, per_example="norms")
    _, history = fnn.fit(step, state, train, epochs=2, batch_size=16, key=jax.random.key(1))
    assert history.train["per_example_norms"].shape == (8, 16)
    found = noise.scale(history.train["noise_trace"], history.train["noise_signal"])
    ratio = history.train["noise_trace"].mean() / history.train["noise_signal"].mean()
    np.testing.assert_allclose(found.value, ratio, rtol=1e-6)
