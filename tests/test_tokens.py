"""Tokens: embeddings, their dtypes and range, and losses over sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax
from test_attention import KEY, D

import fnn


def test_embed_equals_indexing_and_ties_the_output():
    tokens = jnp.array([[3, 0, 2], [1, 1, 0]])
    layer = fnn.embed(4, D, padding=0)
    params, _ = layer.init(KEY, tokens)
    (y, mask), _ = layer.apply(params, (), tokens)
    real = np.asarray(tokens != 0)
    np.testing.assert_array_equal(y, np.asarray(params["embedding"])[np.asarray(tokens)] * real[..., None])
    np.testing.assert_array_equal(mask, real)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply(p, (), tokens)[0].values[..., 0])))(params)["embedding"]
    np.testing.assert_array_equal(slope[:, 0], [0, 2, 1, 1])
    net = fnn.tied(4, D, fnn.serial())
    params, state = net.init(KEY, tokens)
    table = np.asarray(params["embedding"])
    np.testing.assert_allclose(net.apply(params, state, tokens)[0], table[np.asarray(tokens)] @ table.T, atol=1e-6)


def test_tokens_out_of_range_are_refused_on_the_host_and_nan_inside_jit():
    layer = fnn.serial(fnn.embed(4, D), fnn.global_avg_pool(), fnn.dense(2))
    good, bad = jnp.array([[3, 0, 2], [1, 1, 0]]), jnp.array([[3, 0, 4], [1, -1, 0]])
    params, state = layer.init(KEY, good)
    with pytest.raises(ValueError, match=r"embed: tokens must lie in 0..3, got -1..4") as refusal:
        layer.apply(params, state, bad)
    assert "in layer 0, input int32[2,3]" in refusal.value.__notes__[0]
    values = jax.jit(lambda x: layer.apply(params, state, x)[0])(bad)
    assert np.isnan(values).all()
    labels = jnp.array([0, 1])

    def loss(params, x, y):
        return fnn.losses.cross_entropy(layer.apply(params, state, x[None])[0], y[None])[0]

    # Of each example alone: one good, one with a token beyond the table, one with a negative one in every place.
    rows = jnp.stack([good[0], bad[0], jnp.full(3, -1)])
    slopes = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)))(params, rows, labels[0])
    for leaf in jax.tree.leaves(slopes):
        np.testing.assert_array_equal(np.isnan(leaf).any(tuple(range(1, leaf.ndim))), [False, True, True])
    state = fnn.TrainState.create(layer, optax.sgd(0.1), KEY, good)
    step = fnn.train_step(layer, fnn.losses.cross_entropy, optax.sgd(0.1))
    for call in (
        lambda: fnn.fit(step, state, (bad, labels), epochs=1, batch_size=2, key=KEY),
        lambda: fnn.evaluate(layer, state, (bad, labels)),
        lambda: step(state, (bad, labels)),
        lambda: fnn.fit(step, state, [(np.asarray(bad), np.asarray(labels))], epochs=1),
    ):
        with pytest.raises(ValueError, match="tokens must lie in 0..3"):
            call()


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "padding"), [("int8", 200, None), ("int8", 128, 127), ("uint8", 256, 255), ("uint16", 9, 0)]
)
def test_tokens_may_be_of_any_integer_dtype(dtype, vocabulary, padding):
    """Neither the vocabulary nor -1 need fit into the dtype of the tokens."""
    info = np.iinfo(dtype)
    numbers = [0, 1, min(info.max, vocabulary - 1), 8, max(info.min, -1)]
    real = np.array([n != padding for n in numbers])
    layer = fnn.embed(vocabulary, 3, padding=padding)
    tokens = jnp.array([numbers], dtype)
    params, _ = layer.init(KEY, tokens)
    y = jax.jit(lambda x: layer.apply(params, (), x)[0])(tokens)
    values, mask = (y, np.ones((1, 5), bool)) if padding is None else y
    expected = np.asarray(params["embedding"])[np.maximum(numbers, 0)] * real[:, None]
    expected[np.array(numbers) < 0] = np.nan
    np.testing.assert_array_equal(values[0], expected)
    np.testing.assert_array_equal(mask[0], real)


def test_sequence_cross_entropy_averages_over_targets_and_counts_exact_matches():
    logits = as_jax(np.random.default_rng(0).normal(size=(2, 3, 4)))
    targets = jnp.array([[-1, 2, 0], [-1, -1, -1]])
    loss = fnn.losses.sequence_cross_entropy(logits, targets)
    log = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(loss, [-(log[0, 1, 2] + log[0, 2, 0]) / 2, 0], rtol=1e-6)
    best = jnp.argmax(logits, -1)
    right = fnn.losses.sequence_cross_entropy.correct
    np.testing.assert_array_equal(right(logits, best.at[0, 0].set(-1)), [1, 1])
    np.testing.assert_array_equal(right(logits, best.at[1, 2].set((best[1, 2] + 1) % 4)), [1, 0])
    assert np.isnan(fnn.losses.sequence_cross_entropy(logits, targets.at[0, 1].set(4))[0])
    with pytest.raises(ValueError, match=r"labels must lie in 0..3, got 0..4"):
        fnn.losses.sequence_cross_entropy.check((2, 3, 4), np.array([[0, 4, -1]]))
