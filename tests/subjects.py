"""Losses of one example, with parameters and a batch: every kind of function that `per_example` factors or not."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started
from flax import nnx

import fnn

B = 6


class Subject(NamedTuple):
    loss: Any
    params: Any
    batch: Any
    axis_name: Any = None
    routes: tuple[str, ...] = ()
    """Routes that must occur in the table; the rest is `stored, small`."""


def draw(*shape, seed=0):
    """Draw in NumPy, which compiles nothing."""
    return as_jax(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def whole(n, *shape):
    return as_jax(np.random.default_rng(5).integers(0, n, shape))


def labels(n=3):
    return whole(n, B)


def net(layer, *routes, shape=(5,), norm=False):
    """Make a subject of an fnn net on vectors."""
    x = draw(B, *shape)
    params, state = started(layer.init, x)
    axis_name = "batch" if norm else None
    loss = fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy, axis_name=axis_name)
    return Subject(loss, params, (x, labels()), axis_name, routes)


def mlp(*routes, depth=4, **options):
    return net(fnn.models.mlp(depth, 8, 3, activation="tanh", **options), *routes, norm="norm" in options)


def nested():
    inner = fnn.repeat(fnn.serial(fnn.dense(4), fnn.activation("tanh")), 2)
    return net(
        fnn.serial(fnn.dense(4), fnn.repeat(fnn.serial(inner, fnn.dense(4)), 3), fnn.dense(3)), "product, by depth"
    )


def recurrent():
    def loss(p, example):
        xs, target = example

        def cell(h, x):
            h = jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"])
            return h, h

        hs = jax.lax.scan(cell, jnp.zeros(4), xs)[1]
        return jnp.sum(jnp.square(hs @ p["out"] - target)) + jnp.sum(jnp.sin(hs @ p["w"]))

    params = {"w": draw(4, 4), "u": draw(3, 4), "b": draw(4), "out": draw(4, 2)}
    return Subject(
        loss,
        params,
        (draw(B, 7, 3), draw(B, 7, 2)),
        None,
        ("product over time",),
    )


def layers_inside_time():
    """A loop over depth inside a loop over time: every layer's weights are used in every turn."""

    def loss(p, xs):
        def step(h, x):
            h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + x), None), h, p)[0]
            return h, None

        return jnp.sum(jnp.square(jax.lax.scan(step, jnp.zeros(4), xs)[0]))

    return Subject(loss, draw(3, 4, 4), draw(B, 5, 4), None, ("product over time, by depth",))


def tied():
    def loss(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.sum(jnp.square(h @ p["w"].T - x)) / 3 - 0.5 * jnp.sum(jnp.cos(x @ (2 * p["w"])))

    params = {"w": draw(5, 4), "unused": draw(2)}
    return Subject(loss, params, draw(B, 5), None, ("product, used 3 times", "zero"))


def embedding(take):
    def loss(p, ids):
        h = take(p["table"], ids)
        return jnp.sum(jnp.tanh(h @ p["w"]) ** 2) + jnp.sum(jnp.sin(take(p["table"], ids[::2])))

    ids = whole(5, B, 8)  # repeated within an example
    return Subject(loss, {"table": draw(9, 4), "w": draw(4, 3)}, ids, None, ("rows, used 2 times", "product"))


def conv(groups=1, strides=(1, 1), padding: Any = "SAME", dilation=(1, 1), input_dilation=(1, 1)):
    def loss(p, x):
        h = jax.lax.conv_general_dilated(
            x[None],
            p["kernel"],
            strides,
            padding,
            input_dilation,
            dilation,
            ("NHWC", "HWIO", "NHWC"),
            groups,
        )
        return jnp.sum(jnp.tanh(h + p["bias"]) ** 2)

    params = {"kernel": draw(3, 2, 4 // groups, 8), "bias": draw(8)}
    return Subject(loss, params, draw(B, 9, 8, 4), None, ("convolution",))


def parts():
    def loss(p, x):
        a, b = jnp.split(p["w"], [3], axis=1)
        both = jnp.concatenate([p["u"], p["v"]], axis=1)
        used_again = jnp.sum((x[1:] @ p["w"][1:, 2:4]) ** 3)
        return jnp.sum(jnp.tanh(x @ a)) + jnp.sum(jnp.cos(x @ b)) + used_again + jnp.sum(jnp.sin(x @ both))

    params = {"w": draw(4, 8), "u": draw(4, 2, seed=1), "v": draw(4, 3, seed=2)}
    return Subject(loss, params, draw(B, 4), None, ("product, used 3 times", "product"))


def unknown():
    """Masks, sorting, a matrix power, a branch: whatever is not recognised must be right all the same."""

    def loss(p, x):
        h = jnp.tanh(x @ (p["masked"] * jnp.tri(4)))
        h = jax.lax.cond(x[0] > 0, lambda h: h @ p["branch"], lambda h: 2 * h, h)
        return jnp.sum(jnp.sort(h @ p["squared"] @ p["squared"])[:2]) + jnp.sum(jnp.square(p["squared"]))

    params = {name: draw(4, 4, seed=i) for i, name in enumerate(("masked", "branch", "squared"))}
    return Subject(loss, params, draw(B, 4), None, ("stored in full",))


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.LayerNorm()(nn.Embed(11, 8)(ids))
            x = nn.RNN(nn.SimpleCell(4))(x[None])[0]
            return nn.Dense(3)(x[-1])

    ids = whole(11, B, 5)
    module = Net()
    params = jax.jit(module.init)(jax.random.key(0), ids[0])

    def loss(p, example):
        return fnn.losses.cross_entropy(module.apply(p, example[0])[None], example[1][None])[0]

    return Subject(loss, params, (ids, labels()), None, ("rows", "product", "product over time"))


def linen_batch_norm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), strides=2, feature_group_count=2)(x)
            x = nn.BatchNorm(use_running_average=False, axis_name="batch")(x)
            return nn.Dense(3)(nn.relu(x).mean((0, 1)))

    module = Net()
    x = draw(B, 6, 6, 2)
    init = jax.vmap(lambda x: module.init(jax.random.key(0), x), axis_name="batch", out_axes=None)
    variables = jax.jit(init)(x)

    def loss(p, example):
        outputs, _ = module.apply(variables | {"params": p}, example[0], mutable=["batch_stats"])
        return fnn.losses.cross_entropy(outputs[None], example[1][None])[0]

    return Subject(loss, variables["params"], (x, labels()), "batch", ("convolution", "product"))


def modules():
    model = nnx.Sequential(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model, nnx.Param)

    def loss(p, example):
        return fnn.losses.cross_entropy(nnx.merge(graph, p)(example[0])[None], example[1][None])[0]

    return Subject(loss, params, (draw(B, 5), labels()), None, ("product",))


def equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(p, example):
        outputs = jax.vmap(eqx.combine(p, static))(example[0])  # three positions
        return jnp.mean(fnn.losses.cross_entropy(outputs, example[1][None].repeat(3)))

    return Subject(loss, params, (draw(B, 3, 5), labels()), None, ("product",))


SUBJECTS = {
    "mlp": lambda: mlp("product", depth=2),
    "depth": lambda: mlp("product", "product, by depth", norm="layer_norm", unroll=1),
    "depth_batch_norm": lambda: mlp("product", "product, by depth", norm="batch_norm", unroll=1),
    "depth_in_groups": lambda: mlp("product, by depth", depth=5, unroll=1, checkpoint=2),
    "depth_in_uneven_groups": lambda: mlp("product", "stored in full", depth=4, unroll=1, checkpoint=2),
    "nested": nested,
    "sequences": lambda: net(
        fnn.serial(fnn.dense(40), fnn.activation("tanh"), fnn.dense(30), fnn.flatten(), fnn.dense(3)),
        "product",
        shape=(4, 9),
    ),
    "recurrent": recurrent,
    "layers_inside_time": layers_inside_time,
    "tied": tied,
    "embedding": lambda: embedding(lambda table, ids: table[ids]),
    "embedding_take": lambda: embedding(lambda table, ids: jnp.take(table, ids, axis=0)),
    "embedding_clip": lambda: embedding(lambda table, ids: table.at[ids * 3].get(mode="clip")),
    "embedding_drop": lambda: embedding(lambda table, ids: table.at[ids * 3].get(mode="fill", fill_value=0)),
    "conv": conv,
    "conv_groups": lambda: conv(2, (2, 1), "VALID", (1, 2)),
    "conv_depthwise": lambda: conv(4, (2, 2), "SAME", (2, 1)),
    "conv_padding": lambda: conv(1, (3, 2), [(2, 0), (-1, 3)], (1, 1), (2, 1)),
    "parts": parts,
    "unknown": unknown,
    "linen": linen,
    "linen_batch_norm": linen_batch_norm,
    "nnx": modules,
    "equinox": equinox,
}


def flat(grads):
    return np.concatenate([np.asarray(g, np.float64).reshape(B, -1) for g in jax.tree.leaves(grads)], axis=1)
