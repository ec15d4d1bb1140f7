"""Weights from Flax, Equinox and Haiku, and back: outputs on the same weights."""

import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, assert_same, randomized
from flax import nnx
from test_weights import KEY, RNG, close, drawn

import fnn


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(3, (3, 3))(x))
        x = nn.ConvTranspose(3, (2, 2), strides=(2, 2))(nn.relu(x))
        x = nn.GroupNorm(3)(x)
        for _ in range(11):
            x = nn.Conv(3, (1, 1))(x)
        return nn.Dense(4)(x.reshape(len(x), -1))


def images():
    net = fnn.serial(
        fnn.conv(3, 3),
        fnn.batch_norm(),
        fnn.activation("relu"),
        fnn.conv_transpose(3, 2, stride=2),
        fnn.group_norm(3),
        fnn.repeat(fnn.conv(3, 1), 11),
        fnn.flatten(),
        fnn.dense(4),
    )
    return net, Images(), drawn(2, 3, 4, 2)


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Embed(7, 6)(x)
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        h = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(4)), nn.RNN(nn.OptimizedLSTMCell(4)))(h)
        h = nn.RNN(nn.GRUCell(5))(h)
        h = nn.RNN(nn.SimpleCell(5))(h)
        h = nn.RNN(nn.LSTMCell(4))(nn.RMSNorm()(h))
        return nn.Dense(7, use_bias=False)(h)


def words():
    net = fnn.serial(
        fnn.embed(7, 6),
        fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(2))),
        fnn.bidirectional(fnn.lstm(4), fnn.lstm(4, reverse=True)),
        fnn.gru(5),
        fnn.rnn(5),
        fnn.rms_norm(),
        fnn.lstm(4),
        fnn.dense(7, bias=False),
    )
    return net, Words(), RNG.integers(0, 7, (2, 5))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(h), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(8)(blocks()(x, None)[0])


def scanned():
    block = fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(2), fnn.dense(8)))
    names = {f"0/[{i}]/2": f"ScanBlock_0/Dense_0/[{i}]" for i in range(3)}  # as wide as the last layer
    return fnn.serial(fnn.repeat(block, 3), fnn.dense(8)), Scanned(), drawn(2, 4, 8), names


def like(specs):
    """Draw what `init` would have the shapes of, since to compile it takes longer than the net."""

    def draw(path, spec):
        positive = path[-1].key in ("scale", "var")
        return jnp.asarray(positive + 0.3 * drawn(*spec.shape) * (0.3 if positive else 1))

    return jax.tree_util.tree_map_with_path(draw, specs)


@pytest.mark.parametrize("make", [images, words, scanned], ids=lambda make: make.__name__)
def test_linen(make):
    net, module, x, *names = make()
    variables = like(jax.eval_shape(module.init, KEY, x))
    names = names[0] if names else None
    params, state, report = fnn.weights.from_flax(variables, net, x, names=names)
    close(jax.jit(net.apply)(params, state, x)[0], jax.jit(module.apply)(variables, x))
    back = fnn.weights.to_flax(params, state, like=jax.eval_shape(module.init, KEY, x), names=names)
    again, same, _ = fnn.weights.from_flax(back, net, x, names=names)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert_same((again, same), (params, state))
    assert_same(back, variables)
    assert len(report) > 3 and all(row[0] in repr(report) and row[2] in repr(report) for row in report)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(7, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 6, rngs=rngs, decode=False)
        cells = nnx.OptimizedLSTMCell(6, 6, rngs=rngs), nnx.LSTMCell(6, 6, rngs=rngs)
        cells = *cells, nnx.GRUCell(6, 5, rngs=rngs), nnx.SimpleCell(5, 4, rngs=rngs)
        self.recurrent = nnx.List([nnx.RNN(cell, rngs=rngs) for cell in cells])
        self.batch_norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
        self.hidden = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x)
        h = h + self.attention(self.norm(h))
        for layer in self.recurrent:
            h = layer(h)
        h = self.batch_norm(h)
        for layer in self.hidden:
            h = layer(h)
        return h


def test_nnx():
    net = fnn.serial(
        fnn.embed(7, 6),
        fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(3))),
        *(fnn.lstm(6), fnn.lstm(6), fnn.gru(5), fnn.rnn(4), fnn.batch_norm()),
        fnn.repeat(fnn.dense(4), 12),
    )
    x = RNG.integers(0, 7, (2, 5))
    graph, weights = nnx.split(
        nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
    )  # to draw them compiles a program for each shape
    rng = np.random.default_rng(0)

    def draw(spec):
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            return jax.tree.map(jnp.zeros_like, spec) if not jnp.issubdtype(spec.dtype, jax.dtypes.prng_key) else KEY
        return as_jax(np.abs(rng.normal(size=spec.shape)) * 0.3, spec.dtype)

    module = nnx.merge(graph, jax.tree.map(draw, weights))
    module.eval()
    params, state, _ = fnn.weights.from_flax(module, net, x)
    run = nnx.jit(lambda module, x: module(x))
    close(jax.jit(net.apply)(params, state, x)[0], run(module, x))
    other = nnx.merge(graph, jax.tree.map(draw, weights))
    nnx.update(other, fnn.weights.to_flax(params, state, like=nnx.state(other)))
    other.eval()
    np.testing.assert_array_equal(run(other, x), run(module, x))
    # NNX's GRU has no second bias of n, so that one which is not zero fits nowhere.
    moved = fnn.tree.rows(params)
    path = next(path for path, _ in moved if path.endswith("recurrent_bias"))
    params = jax.tree_util.tree_map_with_path(lambda p, a: a + (fnn.tree.path(p) == path), params)
    with pytest.raises(
        ValueError, match=r"a module must have a place for all weights .*, got 4 \(.*recurrent_bias \[5\]"
    ):
        fnn.weights.to_flax(params, state, like=nnx.state(other))
    with pytest.raises(
        ValueError, match="heads must have the same size on both sides, got 3 at 1/1 and 2 in attention"
    ):
        other = fnn.serial(fnn.embed(7, 6), fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(2))))
        fnn.weights.from_flax(
            {n: nnx.to_pure_dict(nnx.state(module))[n] for n in ("embed", "norm", "attention")}, other, x
        )


def test_the_recipes_for_equinox_and_haiku():
    keys, x = jax.random.split(KEY, 6), drawn(2, 4, 6)

    @eqx.filter_jit  # one program of all the draws
    def made(keys):
        return [
            *(eqx.nn.Linear(6, 8, key=keys[0]), eqx.nn.LayerNorm(8), eqx.nn.MultiheadAttention(2, 8, key=keys[1])),
            *(eqx.nn.LSTMCell(8, 5, key=keys[2]), eqx.nn.GRUCell(5, 4, key=keys[3])),
            eqx.nn.Conv1d(4, 3, 2, key=keys[4]),
        ]

    model = made(keys)
    dynamic, static = eqx.partition(model, eqx.is_array)
    model = eqx.combine(randomized(dynamic), static)
    net = fnn.serial(
        *(fnn.dense(8), fnn.layer_norm(eps=1e-5), fnn.attention(2, bias=False), fnn.lstm(5), fnn.gru(4)),
        fnn.conv(3, 2, padding="valid"),
    )

    def one(x):
        linear, norm, attention, lstm, gru, conv = model
        h = jax.vmap(norm)(jax.vmap(linear)(x))
        h = attention(h, h, h)
        cell, ys = (jnp.zeros(5), jnp.zeros(5)), []
        for row in h:
            cell = lstm(row, cell)
            ys.append(cell[0])
        h, state = jnp.stack(ys), jnp.zeros(4)
        ys = []
        for row in h:
            state = gru(row, state)
            ys.append(state)
        return conv(jnp.stack(ys).T).T

    namespace = {"jax": jax, "equinox": eqx, "model": model}
    exec(recipe("Equinox"), namespace)
    params, state, _ = fnn.weights.from_torch(namespace["state_dict"], net, x)
    close(jax.jit(net.apply)(params, state, x)[0], jax.jit(jax.vmap(one))(x))

    def forward(x):
        h = hk.Conv1D(5, 2, padding="VALID")(x)
        h = hk.LayerNorm(-1, True, True)(h)
        return hk.Linear(3)(h)

    transformed = hk.without_apply_rng(hk.transform(forward))
    given = randomized(jax.jit(transformed.init)(KEY, x))
    net = fnn.serial(fnn.conv(5, 2, padding="valid"), fnn.layer_norm(eps=1e-5), fnn.dense(3))
    namespace = {"params": given}
    exec(recipe("Haiku"), namespace)
    params, state, _ = fnn.weights.from_flax(namespace["variables"], net, x)
    close(jax.jit(net.apply)(params, state, x)[0], jax.jit(transformed.apply)(given, x))


def recipe(library):
    """The indented lines behind a library's name in the docstring."""
    text = fnn.weights.__doc__.partition(f"{library}:")[2]
    return "\n".join(re.findall(r"^    (\S.*)$", text.partition("\n\n")[2], re.M)[:2])
