"""Models of four frameworks for the tests of `watch`, and what these share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started
from flax import linen, nnx

import fnn
from fnn import tree

RNG = np.random.default_rng(3)
X, IMAGES = (as_jax(np.float32(RNG.normal(size=shape))) for shape in ((6, 8), (6, 8, 8, 1)))
Y, TOKENS = as_jax(RNG.integers(0, 3, 6)), as_jax(RNG.integers(0, 11, (6, 7)))


def entropy(logits, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))


def wide(values):
    """Cast to float64."""

    def cast(a):
        return jnp.asarray(a, jnp.float64) if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating) else a

    return jax.tree.map(cast, values)


def logs(gradients, params=None):
    """The log10 of the norm of each array, in float64: {path: number}."""
    names = [name.removesuffix("/value") for name in tree.paths(gradients)]
    with np.errstate(divide="ignore"):
        return {
            name: float(np.log10(np.linalg.norm(np.asarray(leaf, np.float64))))
            for name, leaf in zip(names, jax.tree.leaves(gradients), strict=True)
        }


def measured(flow, quantity="log10_gradient"):
    return {row.path: row.value for row in flow.rows() if row.quantity == quantity}


# Models of four frameworks: name -> (loss, params, batch) --------------------------------------------------------------


def plain_mlp():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (8, 5)),
        "b1": jnp.ones(5),
        "w2": jax.random.normal(keys[1], (5, 3)),
        "scale": jnp.full((), 0.5),
    }
    return (
        lambda p, x, y: entropy(jnp.tanh(x @ p["w1"] + p["b1"]) @ (p["w2"] * p["scale"]), y),
        params,
        (X, Y),
    )


def initial(net, x):
    return started(lambda key, x: (net.init(key, x)["params"], ()), x)[0]


class _Mlp(linen.Module):
    depth: int = 3
    activation: str = "sigmoid"

    @linen.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = getattr(linen, self.activation)(linen.Dense(8)(x))
        return linen.Dense(3)(x)


def linen_mlp(depth=3):
    net = _Mlp(depth)
    params = initial(net, X)
    return lambda p, x, y: entropy(net.apply({"params": p}, x), y), params, (X, Y)


class _Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        h = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(2)(h, h, mask=linen.make_causal_mask(x[..., 0]))
        return x + linen.Dense(8)(linen.gelu(linen.Dense(16)(linen.LayerNorm()(x)))), None


class _Transformer(linen.Module):
    @linen.compact
    def __call__(self, x):
        table = linen.Embed(11, 8, name="table")
        axes, split = {"params": 0}, {"params": True}
        blocks = linen.scan(linen.remat(_Block), variable_axes=axes, split_rngs=split, length=3)
        h, _ = blocks(name="blocks")(table(x), None)
        return table.attend(linen.LayerNorm()(h))


def linen_transformer():
    net = _Transformer()
    params = initial(net, TOKENS)

    def loss(p, x):
        logits = jax.nn.log_softmax(net.apply({"params": p}, x[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logits, x[:, 1:, None], -1))

    return loss, params, (TOKENS,)


class _Conv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.output = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.output(x.mean((1, 2)))


def nnx_conv():
    graph, params, rest = nnx.split(_Conv(nnx.Rngs(0)), nnx.Param, ...)
    return lambda p, x, y: entropy(nnx.merge(graph, p, rest, copy=True)(x), y), params, (IMAGES, Y)


def equinox_recurrent():
    eqx = pytest.importorskip("equinox")

    class _Recurrent(eqx.Module):
        embedding: eqx.nn.Embedding
        cell: eqx.nn.GRUCell
        output: eqx.nn.MLP

        def __init__(self, key):
            a, b, c = jax.random.split(key, 3)
            self.embedding, self.cell = eqx.nn.Embedding(11, 8, key=a), eqx.nn.GRUCell(8, 8, key=b)
            self.output = eqx.nn.MLP(8, 3, 5, 1, key=c)

        def __call__(self, x):
            h, _ = jax.lax.scan(
                lambda h, x: (self.cell(x, h), None), jnp.zeros(8, self.cell.bias.dtype), jax.vmap(self.embedding)(x)
            )
            return self.output(h)

    made = eqx.filter_jit(lambda key: _Recurrent(key))(jax.random.key(0))  # one program of all the draws
    params, static = eqx.partition(made, eqx.is_inexact_array)
    return lambda p, x, y: entropy(jax.vmap(eqx.combine(p, static))(x), y), params, (TOKENS, Y)


def haiku_mlp():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, 4, 3], activation=jnp.tanh)(x)))
    return lambda p, x, y: entropy(net.apply(p, x), y), jax.jit(net.init)(jax.random.key(0), X), (X, Y)


def by_index():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"e": jax.random.normal(keys[0], (11, 6)), "w": jax.random.normal(keys[1], (4, 6, 6)) / 3}

    def loss(p, x):
        h = p["e"][x]
        for i in range(4):
            h = jnp.tanh(h @ p["w"][i])
        return jnp.mean(jax.nn.logsumexp(h @ p["e"].T, -1))

    return loss, params, (TOKENS,)


def fnn_residual():
    net = fnn.models.mlp(20, 8, 3, norm="batch_norm", residual=True)
    params, state = net.init(jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype))

    def loss(p, x, y):
        return jnp.mean(fnn.losses.cross_entropy(net.apply(p, state, x, train=True)[0], y))

    return loss, params, (X, Y)


MODELS = {
    f.__name__: functools.cache(f)
    for f in (
        *(plain_mlp, linen_mlp, linen_transformer, nnx_conv, equinox_recurrent),
        *(haiku_mlp, by_index, fnn_residual),
    )
}


@functools.cache
def watched(name):
    loss, params, batch = MODELS[name]()
    return fnn.watch(loss).value_and_grad(params, *batch)


def taken(name, groups="all", **options):
    loss, params, batch = MODELS[name]()
    return fnn.watch(loss, groups=groups, **options)(params, *batch), params, batch


def same(a, b, rtol=1e-5):
    assert a.labels == b.labels
    np.testing.assert_allclose(a.numbers(), b.numbers(), rtol=rtol, atol=1e-5)
