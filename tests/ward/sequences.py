"""Small tasks on sequences, and nets for them with knobs of their own."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import fnn

from .recipes import DEFAULT, Data, mlp, with_defaults


def _split(x: Any, y: Any, held_out: int) -> Any:
    x, y = jnp.asarray(x), jnp.asarray(y)
    return (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])


def recall(length: int, examples: int = 1500, symbols: int = 4) -> Data:
    """Which symbol stood at the first step? Noise of size 0.3 follows: x: float32[n, length, symbols]."""

    @functools.cache
    def data(seed):
        rng = np.random.default_rng([seed, 29])
        y = rng.integers(0, symbols, examples).astype(np.int32)
        x = 0.3 * rng.standard_normal((examples, length, symbols)).astype(np.float32)
        x[:, 0] = np.eye(symbols)[y]
        return _split(x, y, 300)

    return data


def before(length: int = 8, examples: int = 1500, vocabulary: int = 8) -> Data:
    """Does token 0 stand before token 1? Each occurs once, at random places: x: int32[n, length]."""

    @functools.cache
    def data(seed):
        rng = np.random.default_rng([seed, 31])
        x = rng.integers(2, vocabulary, (examples, length))
        places = np.argsort(rng.random((examples, length)), axis=1)[:, :2]
        np.put_along_axis(x, places, np.array([[0, 1]]), axis=1)
        return _split(x.astype(np.int32), (places[:, 0] < places[:, 1]).astype(np.int32), 300)

    return data


def rnn(outputs: int, **defaults: Any):
    """`models.rnn` by its knobs."""

    def build(depth=1, width=16, cell="lstm", forget_bias=1.0, recurrent_init="orthogonal", dropout=0.0):
        knobs = {"cell": cell, "forget_bias": forget_bias, "recurrent_init": recurrent_init, "dropout": dropout}
        return fnn.models.rnn(depth, width, outputs, **knobs)

    return with_defaults(build, defaults)


def encoder(outputs: int, vocabulary: int, **defaults: Any):
    """`models.encoder` by its knobs."""

    def build(depth=1, width=16, positions="rotary", activation="gelu", norm="layer_norm", dropout=0.0):
        block = fnn.models.Block(2, 32, activation, norm, positions=positions, dropout=dropout)
        return fnn.models.encoder(vocabulary, depth, width, block, outputs=outputs)

    return with_defaults(build, defaults)


def bag(outputs: int, vocabulary: int, length: int, **defaults: Any):
    """Embed the tokens, with or without their positions, apply a hidden layer to each, average, and classify."""

    def build(width=32, positions=True, activation="relu", dropout=0.0):
        where = [fnn.positions(length)] if positions else []
        hidden = [fnn.dense(width), fnn.activation(activation), *([fnn.dropout(dropout)] if dropout else [])]
        mean = fnn.stateless(lambda key, spec: (), lambda params, x: jnp.mean(x, axis=1))
        return fnn.serial(fnn.embed(vocabulary, width), *where, *hidden, mean, fnn.dense(outputs))

    return with_defaults(build, defaults)


def tokens_mlp(outputs: int, vocabulary: int, **defaults: Any):
    """`models.mlp` on one-hot tokens, all positions side by side."""
    inner = mlp(outputs, init="he_normal", **defaults)

    def build(depth=2, width=32, activation="relu", norm=None, dropout=0.0):
        code = fnn.stateless(lambda key, spec: (), lambda params, x: jnp.eye(vocabulary)[x])
        net = inner(depth=depth, width=width, activation=activation, norm=norm, dropout=dropout)
        return fnn.serial(code, net)

    return build


RECALL = DEFAULT.but(data=recall(20), net=rnn, method=optax.adam, rate=1e-2, steps=300)
RECALL = RECALL.but(batch_size=32).only(outputs=4, forget_bias=3.0, recurrent_init="normal(0.05)")
BEFORE = RECALL.but(data=before(), net=encoder, rate=3e-3, steps=400).only(outputs=2, vocabulary=8)
BAG = BEFORE.but(net=bag, rate=1e-2).only(outputs=2, vocabulary=8, length=8)
