"""Gradients of single examples: every method against `vmap(grad)`, on every kind of function that is factored or not."""

import os
import subprocess
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import randomized
from flax import nnx

import fnn
from fnn import _jaxpr, noise

B = 6


class Subject(NamedTuple):
    loss: Any
    params: Any
    batch: Any
    axis_name: Any = None
    routes: tuple[str, ...] = ()
    """Routes that must occur in the table; the rest is `as it is`."""


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def labels(n=3):
    return jax.random.randint(jax.random.key(5), (B,), 0, n)


def net(layer, *routes, shape=(5,), norm=False):
    """Make a subject of an fnn net on vectors."""
    params, state = layer.init(jax.random.key(1), jax.ShapeDtypeStruct((B, *shape), jnp.float32))
    axis_name = "batch" if norm else None
    loss = fnn.example_loss(layer, fnn.losses.cross_entropy, state, key=jax.random.key(3), axis_name=axis_name)
    return Subject(loss, randomized(params), (draw(B, *shape), labels()), axis_name, routes)


def mlp(*routes, depth=3, **options):
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

    ids = jax.random.randint(jax.random.key(0), (B, 8), 0, 5)  # repeated within an example
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
    return Subject(loss, params, draw(B, 4), None, ("materialized",))


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8)(ids)
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            x = nn.RNN(nn.OptimizedLSTMCell(4))(x[None])[0]
            return nn.Dense(3)(x[-1])

    ids = jax.random.randint(jax.random.key(0), (B, 5), 0, 11)
    module = Net()
    params = module.init(jax.random.key(0), ids[0])

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
    variables = jax.vmap(lambda x: module.init(jax.random.key(0), x), axis_name="batch")(x)
    variables = jax.tree.map(lambda a: a[0], variables)

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
    "mlp": lambda: mlp("product"),
    "depth": lambda: mlp("product", "product, by depth", norm="layer_norm", unroll=1),
    "depth_batch_norm": lambda: mlp("product", "product, by depth", norm="batch_norm", unroll=1),
    "depth_in_groups": lambda: mlp("product, by depth", depth=4, unroll=1, checkpoint=2),
    "depth_in_uneven_groups": lambda: mlp("product", "materialized", depth=3, unroll=1, checkpoint=2),
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


THOROUGH = {"mlp", "nested", "recurrent", "embedding"}


def flat(grads):
    return np.concatenate([np.asarray(g, np.float64).reshape(B, -1) for g in jax.tree.leaves(grads)], axis=1)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_method_equals_vmap_of_grad(name):
    subject = SUBJECTS[name]()
    every = fnn.per_example(subject.loss, axis_name=subject.axis_name)
    w = jnp.linspace(0.5, 2, B)

    @jax.jit
    def both(params, batch, max_norm):
        g = every(params, batch)
        results = {
            "materialize": g.materialize(),
            "squared_norms": g.squared_norms(),
            "per_leaf": g.norms(per_leaf=True),
            "mean": g.mean(),
            "gram": g.gram(),
            "clipped_per_layer": g.clipped_mean(max_norm / 2, per_layer=True).mean,
        }
        if name in THOROUGH:
            results |= {
                "weighted_mean": g.weighted_mean(w),
                "cosines": g.cosines(),
                "clipped": g.clipped_mean(max_norm),
                "variance": g.variance(),
                "variances": g.variance(per_leaf=True),
                "signal_to_noise": g.signal_to_noise(),
            }
        oracle = jax.vmap(jax.grad(subject.loss), in_axes=(None, 0), axis_name=subject.axis_name)
        return results, oracle(params, batch), g

    max_norm = jnp.float32(1.0)
    got, want, g = both(subject.params, subject.batch, max_norm)
    vectors = flat(want)
    norms = np.linalg.norm(vectors, axis=1)
    size = norms.max()

    def check(tree, expected, scale=size):
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            assert a.shape == np.shape(b)
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * scale)

    def squares(k, a):
        return np.moveaxis(np.sum(np.square(a), axis=tuple(range(1 + k, a.ndim))), 0, -1)

    def weighted(tree, w):
        return jax.tree.map(lambda a: np.tensordot(w, np.asarray(a, np.float64), 1), tree)

    check(got["materialize"], want)
    assert [a.dtype for a in jax.tree.leaves(got["materialize"])] == [a.dtype for a in jax.tree.leaves(want)]
    check(got["squared_norms"], norms**2, size**2)
    layer_norms = fnn.tree.map_depth(lambda k, a: np.sqrt(squares(k, np.asarray(a, np.float64))), want)
    check(got["per_leaf"], layer_norms)
    mean = weighted(want, np.full(B, 1 / B))
    check(got["mean"], mean)
    check(got["gram"], vectors @ vectors.T, size**2)

    def clip(k, a, norms):
        factors = np.minimum(1, 0.5 / np.maximum(np.moveaxis(norms, -1, 0), 1e-30))
        return np.mean(a * factors.reshape(factors.shape + (1,) * (a.ndim - factors.ndim)), axis=0)

    check(got["clipped_per_layer"], fnn.tree.map_depth(clip, want, layer_norms))
    assert set(subject.routes) <= {r.route for r in g.routes}
    if name not in THOROUGH:
        return
    check(got["weighted_mean"], weighted(want, np.asarray(w / w.sum())))
    check(got["cosines"], vectors @ vectors.T / np.outer(norms, norms), 10.0)
    clipped = weighted(want, np.minimum(1, 1 / norms) / B)
    check(got["clipped"].mean, clipped)
    np.testing.assert_allclose(got["clipped"].fraction, np.mean(norms > 1))
    bias = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (clipped, mean)), strict=True)))
    check(got["clipped"].bias, bias)
    trace = np.sum(np.var(vectors, axis=0, ddof=1))
    check(got["variance"], trace, size**2)
    check(sum(jnp.sum(a) for a in jax.tree.leaves(got["variances"])), trace, size**2)
    signal = np.sum(np.square(vectors.mean(0))) - trace / B
    np.testing.assert_allclose(got["signal_to_noise"], signal / trace, atol=1e-4)


def test_explain_prints_what_is_kept(capsys):
    subject = SUBJECTS["depth"]()
    g = fnn.per_example(subject.loss)(subject.params, subject.batch)
    g.explain()
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "trunk/[:]/0/kernel" in line)
    # 3 blocks, 6 examples, 8 + 8 numbers, and 8·8 of them whole.
    assert "product, by depth" in row and "1.15 kB" in row and "4.61 kB" in row, row
    assert lines[-1].startswith("total") and "6 examples" in lines[-1]


def test_a_child_and_the_tree_of_the_object():
    subject = SUBJECTS["mlp"]()
    g = fnn.per_example(subject.loss)(subject.params, subject.batch)
    last = jax.tree.map(lambda a: jnp.sum(jnp.square(a), axis=tuple(range(1, a.ndim))), g.materialize()[-1])
    np.testing.assert_allclose(g[-1].squared_norms(), sum(last.values()), rtol=1e-6)
    again = jax.tree.map(lambda a: a, g)
    np.testing.assert_array_equal(again.norms(), g.norms())


def test_over_seeds_and_closed_over_values_and_aux():
    subject = SUBJECTS["mlp"]()
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), subject.params)
    mapped = jax.jit(jax.vmap(lambda p: fnn.per_example(subject.loss)(p, subject.batch).norms()))(stacked)
    one = fnn.per_example(subject.loss)
    alone = [one(jax.tree.map(lambda a, i=i: a[i], stacked), subject.batch).norms() for i in range(3)]
    np.testing.assert_allclose(mapped, jnp.stack(alone), rtol=1e-5)

    @jax.jit
    def scaled(factor):  # the loss closes over a traced value, and returns something besides
        g, aux = fnn.per_example(lambda p, e: (factor * subject.loss(p, e), e[1]), has_aux=True)(
            subject.params, subject.batch
        )
        return g.norms(), aux

    norms, aux = scaled(2.0)
    np.testing.assert_allclose(norms, 2 * alone[0], rtol=1e-5)
    np.testing.assert_array_equal(aux, subject.batch[1])


def test_nonlinear_derivative_rules_see_the_loss_itself():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def loss(p, x):
        return jnp.sum(jnp.square(clipped(x @ p)))

    p, x = draw(4, 3), draw(B, 4, seed=1)
    want = jax.vmap(jax.grad(loss), in_axes=(None, 0))(p, x)
    g = fnn.per_example(loss)(p, x)
    np.testing.assert_allclose(g.materialize(), want, rtol=1e-6)
    np.testing.assert_allclose(g.mean(), want.mean(0), rtol=1e-5, atol=1e-7)


def test_bfloat16_factors_with_float32_sums():
    p, x = draw(16, 8), draw(B, 5, 16, seed=1)

    def loss(p, x, dtype):
        return jnp.sum(jnp.square((x.astype(dtype) @ p.astype(dtype)).astype(jnp.float32)))

    exact = fnn.per_example(lambda p, x: loss(p, x, jnp.float32))(p, x)
    g = fnn.per_example(lambda p, x: loss(p, x, jnp.bfloat16))(p, x)
    assert {a.dtype for a in jax.tree.leaves(g.leaves)} == {jnp.dtype(jnp.bfloat16)}
    a, d = (np.asarray(v, np.float64).reshape(B, 5, -1) for v in g.leaves[0].arrays[0])
    rounded = np.einsum("btm,btn->bmn", a, d) * g.share
    rounded = rounded if rounded.shape[1:] == (16, 8) else rounded.swapaxes(1, 2)
    assert g.norms().dtype == g.mean().dtype == jnp.float32
    # The factors are rounded, their sums are not.
    np.testing.assert_allclose(g.squared_norms(), np.sum(rounded**2, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(g.mean(), rounded.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(g.norms(), exact.norms(), rtol=0.02)


def test_batch_norm_by_four_names():
    layer = fnn.models.mlp(2, 8, 3, activation="tanh", norm="batch_norm", unroll=1)
    x, y = draw(B, 5), labels()
    params, state = layer.init(jax.random.key(1), x)
    params = randomized(params)
    loss = fnn.example_loss(layer, fnn.losses.cross_entropy, state, axis_name="batch")

    def batch_losses(p):
        return fnn.losses.cross_entropy(layer.apply(p, state, x, train=True)[0], y)

    whole = jax.grad(lambda p: jnp.mean(batch_losses(p)))(params)

    def gradients(name, **options):
        return fnn.per_example(loss, axis_name="batch", batch_norm=name, **options)(params, (x, y))

    for name in ("path", "loss"):
        difference = jax.tree.map(jnp.subtract, gradients(name).mean(), whole)
        assert fnn.tree.norm(difference) < 2e-6 * fnn.tree.norm(whole), name
    by_loss = gradients("loss")
    for a, b in zip(
        jax.tree.leaves(by_loss.materialize()), jax.tree.leaves(jax.jacrev(batch_losses)(params)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    evaluated = fnn.example_loss(layer, fnn.losses.cross_entropy, state, train=False)
    g = gradients("running", eval_loss=evaluated)
    want = jax.vmap(jax.grad(evaluated), in_axes=(None, 0))(params, (x, y))
    np.testing.assert_allclose(flat(g.materialize()), flat(want), rtol=1e-4, atol=1e-5)


def test_frozen_statistics_against_a_norm_with_constants():
    def apply(p, x, stop):
        h = x @ p["w"]
        mean = stop(jax.lax.pmean(h, "batch"))
        var = stop(jax.lax.pmean(jnp.square(h - mean), "batch"))
        h = jnp.tanh(p["scale"] * (h - mean) / jnp.sqrt(var + 1e-3))
        return jnp.sum(jnp.square(h @ p["out"]))

    params = {"w": draw(5, 4), "scale": draw(4), "out": draw(4, 2)}
    x = draw(B, 5, seed=2)
    want = jax.vmap(jax.grad(lambda p, x: apply(p, x, jax.lax.stop_gradient)), in_axes=(None, 0), axis_name="batch")
    frozen = fnn.per_example(lambda p, x: apply(p, x, lambda a: a), axis_name="batch", batch_norm="frozen")
    np.testing.assert_allclose(flat(frozen(params, x).materialize()), flat(want(params, x)), rtol=1e-4, atol=1e-5)
    # fnn's own batch norm, whose derivative is written out.
    layer = fnn.serial(fnn.dense(4), fnn.repeat(fnn.batch_norm(eps=1e-3), 1), fnn.activation("tanh"))
    p, state = layer.init(jax.random.key(0), x)
    p[0]["kernel"] = params["w"]
    p[1].blocks["scale"] = params["scale"][None]

    def loss(p, x):
        return jnp.sum(jnp.square(layer.apply(p, state, x[None], train=True, axis_name="batch")[0] @ params["out"]))

    g = fnn.per_example(loss, axis_name="batch", batch_norm="frozen")(p, x)
    np.testing.assert_allclose(g.materialize()[0]["kernel"], want(params, x)["w"], rtol=1e-4, atol=1e-5)

    def in_branch(p, x):
        return jax.lax.cond(jnp.sum(p) > 0, lambda: jax.lax.pmean(jnp.sum(x * p), "batch"), lambda: jnp.sum(x * p))

    with pytest.raises(NotImplementedError, match="frozen"):
        fnn.per_example(in_branch, axis_name="batch", batch_norm="frozen")(p[0]["bias"], draw(B, 4))


def test_bad_input_is_one_sentence():
    def loss(p, x):
        return jnp.sum(jnp.square(x @ p))

    p, x = draw(4, 3), draw(B, 4)
    for batch in ((x, x[:2]), x[:0], (), jnp.float32(1)):
        with pytest.raises(ValueError, match="per_example: every array of the batch must have the same leading axis"):
            fnn.per_example(loss)(p, batch)
    with pytest.raises(ValueError, match="the loss of one example must be a scalar, got float32\\[3\\]"):
        fnn.per_example(lambda p, x: x @ p)(p, x)
    with pytest.raises(ValueError, match="did you mean 'frozen'"):
        fnn.per_example(loss, batch_norm="frozn")
    with pytest.raises(ValueError, match="got axis_name=None"):
        fnn.per_example(loss, batch_norm="loss")
    with pytest.raises(ValueError, match="differentiates eval_loss"):
        fnn.per_example(loss, batch_norm="running")
    g = fnn.per_example(loss)(p, x)
    with pytest.raises(ValueError, match="weights must be float\\[6\\]"):
        g.weighted_sum(jnp.ones(3))
    with pytest.raises(ValueError, match="max_norm must be a finite number above 0"):
        g.clipped_mean(-1.0)
    lone = fnn.per_example(loss)(p, x[:1])
    np.testing.assert_allclose(lone.norms(), jnp.linalg.norm(jax.grad(loss)(p, x[0]))[None], rtol=1e-6)
    with pytest.raises(ValueError, match="at least two examples"):
        lone.variance()


def test_a_batch_of_one_below_a_batch_norm_is_refused():
    def loss(p, x):
        h = x @ p
        return jnp.sum(jnp.square(h - jax.lax.pmean(h, "batch"))), jax.lax.pmean(h, "batch")

    every = fnn.per_example(loss, has_aux=True, axis_name="batch")
    assert every(draw(4, 3), draw(2, 4))[0].norms().shape == (2,)
    with pytest.raises(ValueError, match="batch norm takes a lone example to its bias"):
        every(draw(4, 3), draw(1, 4))
    # A statistic that the gradient does not pass is no obstacle.
    outside = fnn.per_example(lambda p, x: (jnp.sum(x @ p), jax.lax.pmean(x, "batch")), has_aux=True, axis_name="batch")
    assert outside(draw(4, 3), draw(1, 4))[0].norms().shape == (1,)


@pytest.mark.parametrize("what", ["scan", "all"])
def test_a_trace_that_reads_otherwise_is_materialised_with_one_warning(monkeypatch, what):
    subject = SUBJECTS["depth"]()
    right = fnn.per_example(subject.loss)(subject.params, subject.batch)
    _jaxpr.warn.cache_clear()
    if what == "all":
        monkeypatch.setattr(_jaxpr, "_inline", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr(_jaxpr, "_rank", lambda var: 0)
    with pytest.warns(UserWarning, match="reads otherwise than known") as caught:
        g = fnn.per_example(subject.loss)(subject.params, subject.batch)
    assert len(caught) == 1
    assert "materialized" in {r.route for r in g.routes}
    np.testing.assert_allclose(g.norms(), right.norms(), rtol=1e-6)
    np.testing.assert_allclose(flat(g.materialize()), flat(right.materialize()), rtol=1e-5, atol=1e-6)


def test_the_price_of_one_backward_pass():
    depth, width, batch = 24, 32, 64
    layer = fnn.models.mlp(depth, width, 3, activation="tanh")
    x, y = draw(batch, width), jnp.zeros(batch, int)
    params, state = layer.init(jax.random.key(0), x)
    every = fnn.per_example(fnn.example_loss(layer, fnn.losses.cross_entropy, state))

    def plain(p, batch):
        return jax.grad(lambda p: jnp.mean(fnn.losses.cross_entropy(layer.apply(p, state, batch[0])[0], batch[1])))(p)

    def bytes_of(f):
        return jax.jit(f).lower(params, (x, y)).compile().memory_analysis().temp_size_in_bytes

    base = bytes_of(plain)
    whole = batch * depth * width * width * 4
    # The bench has the bars; this keeps gradients from being stored whole, which takes a multiple.
    assert bytes_of(lambda p, b: every(p, b).norms()) < 1.3 * base < whole / 2
    assert bytes_of(lambda p, b: every(p, b).clipped_mean(1.0).mean) < 3 * base


def test_sharded_over_devices_adds_no_large_collective():
    code = r"""
import re, jax, jax.numpy as jnp, numpy as np, fnn
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 8
layer = fnn.models.mlp(18, 32, 3, activation="tanh")
x, y = jax.random.normal(jax.random.key(0), (16, 32)), jnp.arange(16) % 3
params, state = layer.init(jax.random.key(1), x)
every = fnn.per_example(fnn.example_loss(layer, fnn.losses.cross_entropy, state))
def f(p, b):
    g = every(p, b)
    return g.norms(), g.clipped_mean(0.5).mean, g.mean()
alone = jax.jit(f)(params, (x, y))
mesh = Mesh(np.array(jax.devices()), ("data",))
batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))
placed = jax.device_put(params, NamedSharding(mesh, P()))
spread = jax.jit(f)(placed, batch)
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
def collectives(f):
    text = jax.jit(f).lower(placed, batch).compile().as_text()
    return re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
assert not [c for c in collectives(lambda p, b: every(p, b).norms())], collectives(lambda p, b: every(p, b).norms())
assert {kind for _, kind in collectives(lambda p, b: every(p, b).mean())} == {"all-reduce"}
print("same")
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}
    )
    assert run.returncode == 0 and "same" in run.stdout, run.stderr[-3000:]


def test_train_step_with_norms_and_clip():
    x, y = draw(B, 5), labels()
    layer = fnn.models.mlp(2, 8, 3, activation="tanh", norm="batch_norm", taps=True, unroll=1)
    optimizer = optax.sgd(0.1)
    state = fnn.TrainState.create(layer, optimizer, jax.random.key(0), x)
    loss = fnn.example_loss(layer, fnn.losses.cross_entropy, state.state, axis_name="batch")
    every = fnn.per_example(loss, axis_name="batch")(state.params, (x, y))
    norms = every.norms()

    def run(**options):
        step = fnn.train_step(layer, fnn.losses.cross_entropy, optimizer, per_layer=True, **options)
        return step(jax.tree.map(jnp.copy, state), (x, y))

    plain, with_norms = run(), run(per_example="norms")
    for a, b in zip(jax.tree.leaves(plain[0].params), jax.tree.leaves(with_norms[0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for a, b in zip(jax.tree.leaves(plain[0].state), jax.tree.leaves(with_norms[0].state), strict=True):
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
    np.testing.assert_allclose(metrics["noise_trace"], every.variance(), rtol=1e-4)
    trace = sum(jnp.sum(a) for a in jax.tree.leaves(metrics["noise_traces"]))
    np.testing.assert_allclose(trace, metrics["noise_trace"], rtol=1e-5)
    np.testing.assert_allclose(metrics["noise_signal"] / metrics["noise_trace"], every.signal_to_noise(), rtol=1e-3)
    max_norm = float(jnp.median(norms))
    clipped, metrics = run(per_example="clip", max_norm=max_norm)
    want = every.clipped_mean(max_norm)
    moved = jax.tree.map(lambda old, new: (old - new) / 0.1, state.params, clipped.params)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(want.mean), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(metrics["examples_clipped"], 0.5)
    np.testing.assert_allclose(metrics["clip_bias"], want.bias, rtol=1e-4)
    for options in ({"per_example": "clip"}, {"max_norm": 1.0}, {"per_example": "norm"}):
        with pytest.raises(ValueError, match="train_step"):
            run(**options)


def test_fit_carries_noise_and_the_scale_follows():
    train = draw(64, 5), jnp.arange(64) % 3
    layer = fnn.models.mlp(1, 8, 3)
    optimizer = optax.sgd(0.01)
    state = fnn.TrainState.create(layer, optimizer, jax.random.key(0), train[0][:8])
    step = fnn.train_step(layer, fnn.losses.cross_entropy, optimizer, per_example="norms")
    _, history = fnn.fit(step, state, train, epochs=2, batch_size=16, key=jax.random.key(1))
    assert history.train["per_example_norms"].shape == (8, 16)
    found = noise.scale(history.train["noise_trace"], history.train["noise_signal"])
    np.testing.assert_allclose(found.value, history.train["noise_trace"].mean() / history.train["noise_signal"].mean())


def regression(groups=None, steps=400, batch=32, seed=0):
    """Estimate trace and signal on x ~ N(0, I), loss ½(w·x - w*·x - noise)², where both are known exactly."""
    d, distance, sigma = 10, 1.5, 0.7
    w = jnp.zeros(d).at[0].set(distance)

    def one(key):
        x_key, e_key = jax.random.split(key)
        data = (jax.random.normal(x_key, (batch, d)), sigma * jax.random.normal(e_key, (batch,)))

        def loss(w, example):
            x, e = example
            return 0.5 * jnp.mean(jnp.square(x @ w - e))

        if groups is None:
            return noise.moments(fnn.per_example(loss)(w, data))
        return noise.moments(fnn.per_example(loss)(w, noise.groups(data, groups)), group=groups)

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(seed), steps))


@pytest.mark.parametrize("groups", [None, 4])
def test_noise_scale_of_a_regression_is_exact(groups):
    """n = 400 batches of 32; each of three means may miss by 4 standard errors: wrong in one run of 5,000 by chance."""
    trace, signal = (np.asarray(a, np.float64) for a in regression(groups))
    d, squared, sigma = 10, 1.5**2, 0.7
    exact = (d + 1) * squared + d * sigma**2
    assert exact == pytest.approx(29.65)
    for estimates, value in ((trace, exact), (signal, squared)):
        assert abs(estimates.mean() - value) < 4 * estimates.std(ddof=1) / np.sqrt(len(estimates))
    found = noise.scale(trace, signal)
    assert abs(found.value - 13.178) < 4 * found.error
    assert 0.01 < found.error / found.value < 0.2


def test_jackknife_against_its_formula_and_in_blocks():
    rng = np.random.default_rng(0)
    trace, signal = rng.normal(30, 3, 12), rng.normal(2, 0.3, 12)
    without = [np.delete(trace, i).mean() / np.delete(signal, i).mean() for i in range(12)]
    found = noise.scale(trace, signal)
    np.testing.assert_allclose(found.value, trace.mean() / signal.mean())
    np.testing.assert_allclose(found.error, np.sqrt(11 / 12 * np.sum((without - np.mean(without)) ** 2)))
    blocks = noise.scale(trace.reshape(4, 3).mean(1), signal.reshape(4, 3).mean(1))
    np.testing.assert_allclose(noise.scale(trace, signal, block=3), blocks)
    assert np.isnan(noise.scale(trace, signal, block=12).error)
    assert noise.scale(np.ones((5, 3)), np.ones((5, 3))).value.shape == (3,)
    with pytest.raises(ValueError, match="noise.scale: needs trace and signal"):
        noise.scale(trace, signal[:3])
    with pytest.raises(ValueError, match="noise.groups: size must divide the batch"):
        noise.groups(jnp.ones((6, 2)), 4)
