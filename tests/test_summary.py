"""`summary`: parameters, bytes and FLOPs against formulas, and sums against the net's own parameters, for every layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import CASES

import fnn
from fnn import check, tree

X = jnp.ones((32, 64))


def numbers(net, x):
    return {row.path: (row.parameters, row.bytes, row.flops) for row in fnn.summary(net, x).rows}


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_scan_of_blocks_counts_each_block():
    block = fnn.serial(fnn.dense(64), fnn.tap(), fnn.batch_norm(), fnn.activation("tanh"))
    n = 10_000
    net = fnn.serial(fnn.dense(64), fnn.activation("tanh"), fnn.repeat(block, n), fnn.dense(10, bias=False))
    found = fnn.summary(net, X)
    assert {row.path: (row.parameters, row.flops, row.times) for row in found.rows} == {
        "0": (64 * 64 + 64, 2 * 32 * 64 * 64, 1),
        "1": (0, 0, 1),
        "2/[:]/0": (n * (64 * 64 + 64), n * 2 * 32 * 64 * 64, n),
        "2/[:]/1": (0, 0, n),
        "2/[:]/2": (n * 128, 0, n),
        "2/[:]/3": (0, 0, n),
        "3": (640, 2 * 32 * 64 * 10, 1),
    }
    assert found.parameters == 64 * 65 + n * (64 * 65 + 128) + 640 and found.bytes == 4 * found.parameters
    assert found.flops == (n + 1) * 2 * 32 * 64 * 64 + 2 * 32 * 64 * 10
    assert found.state == n * (9 + 129)  # taps and running moments


MODELS = [case for case in CASES if case.model and case.name not in ("convnet", "transformer_decoder")]
"""Made of layers that are cases too."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case in MODELS)) for case in CASES]
)
def test_rows_add_up_to_the_net(case):
    x = case.make(np.ones(case.shape, np.float32))
    x = jax.tree.map(jnp.asarray, x)
    found = fnn.summary(case.layer, x)
    params, state = jax.eval_shape(lambda key: case.layer.init(key, x), jax.random.key(0))
    y = jax.eval_shape(lambda p, s, x: case.layer.apply(p, s, x)[0], params, state, x)
    assert found.parameters == tree.size(params) == sum(row.parameters for row in found.rows)
    assert found.bytes == sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params))
    assert found.bytes == sum(row.bytes for row in found.rows)
    assert found.flops == pytest.approx(sum(row.flops for row in found.rows), rel=1e-12)
    assert found.output == check.describe(y) or " masked" in found.output or "Masked" in found.output
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) >= len(found.rows) + 5
    assert len(repr(found)) < 500 and len(found.table()) == len(found.rows)
    assert repr(fnn.summary(case.layer, jax.tree.map(lambda a: spec(*a.shape, dtype=a.dtype), x))) == repr(found)


def test_flops_are_those_of_formulas_and_of_xla():
    assert numbers(fnn.conv(5, 3), spec(2, 8, 9, 4))[""] == (3 * 3 * 4 * 5 + 5, 740, 2 * 2 * 8 * 9 * 5 * 9 * 4)
    batch, time, d, width = 3, 7, 4, 5
    both = 2 * batch * time * (d * 3 * width + width * 3 * width)
    assert numbers(fnn.gru(width), spec(batch, time, d))[""][2] == both
    d = 8
    attention = 4 * 2 * batch * time * d * d + 2 * 2 * batch * time * time * d
    assert numbers(fnn.attention(2), spec(batch, time, d))[""][2] == attention
    parts = numbers(fnn.tied(11, d, fnn.attention(2)), spec(batch, time, dtype=jnp.int32))
    assert parts == {
        "": (11 * d, 44 * d, 2 * batch * time * d * 11),
        "body": (4 * (d * d + d), 16 * (d * d + d), attention),
    }
    net = fnn.serial(fnn.dense(24, bias=False), fnn.dense(16, bias=False))
    params, state = net.init(jax.random.key(0), X)
    cost = jax.jit(lambda p, x: net.apply(p, state, x)[0]).lower(params, X).compile().cost_analysis()
    assert fnn.summary(net, X).flops == cost["flops"] == 2 * 32 * (64 * 24 + 24 * 16)


def test_loops_and_branches_inside_a_layer():
    w = jnp.ones((64, 64))

    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda i, x: x @ w, x)

    def branch(x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    def unknown(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ w, x)

    one = 2 * 32 * 64 * 64
    net = fnn.serial(*map(fnn.activation, (loop, branch, jax.checkpoint(lambda x: x @ w), jax.jit(lambda x: x @ w))))
    assert [row.flops for row in fnn.summary(net, X).rows] == [5 * one, 2 * one, one, one]
    found = fnn.summary(fnn.serial(fnn.dense(64), fnn.activation(unknown)), X)
    assert found.rows[0].flops == one and math.isnan(found.rows[1].flops) and math.isnan(found.flops)
    assert str(found).splitlines()[-3].endswith("?")


def test_groups_of_recomputed_blocks_and_unrolled_ones_count_alike():
    block = fnn.serial(fnn.dense(64), fnn.activation("tanh"))
    every = [
        fnn.summary(fnn.repeat(block, 7, **how), X) for how in ({}, {"checkpoint": 3}, {"unroll": 2}, {"unroll": True})
    ]
    assert {(found.parameters, found.flops) for found in every} == {(7 * 64 * 65, 7 * 2 * 32 * 64 * 64)}


def test_a_combinator_of_ones_own_that_uses_weights_twice():
    inner = fnn.serial(fnn.dense(64), fnn.activation("tanh"))

    def apply(params, state, x, **options):
        y, state = inner.apply(params, state, x, **options)
        return inner.apply(params, state, y, **options)

    rows = numbers(fnn.serial(fnn.Layer(inner.init, apply), fnn.dense(3)), X)
    assert rows["0/0"] == (64 * 65, 4 * 64 * 65, 2 * 2 * 32 * 64 * 64)


def test_nothing_is_drawn_or_computed():
    def draw(key, shape, dtype):
        assert isinstance(key, jax.core.Tracer)
        return jnp.zeros(shape, dtype)

    net = fnn.serial(
        fnn.dense(10**6, kernel_init=draw), fnn.activation("relu"), fnn.repeat(fnn.dense(10**6, kernel_init=draw), 1000)
    )
    found = fnn.summary(net, spec(2**20, 10**6))
    assert found.parameters == 1001 * (10**12 + 10**6)
    assert found.flops == 1001 * 2.0 * 2**20 * 10**12


@pytest.mark.parametrize("x", [np.ones((4, 64)), spec(4, 64), np.ones((4, 64)).tolist()], ids=["array", "spec", "list"])
def test_inputs_may_be_arrays_specs_and_lists(x):
    assert fnn.summary(fnn.dense(3), x).flops == 2 * 4 * 64 * 3


def test_several_inputs_and_masked_ones():
    net = fnn.serial(
        fnn.branches(
            {"image": fnn.serial(fnn.flatten(), fnn.dense(3)), "text": fnn.serial(fnn.embed(9, 3), fnn.take_last())}
        ),
        fnn.concatenate(),
    )
    x = {"image": spec(4, 2, 5), "text": fnn.Masked(spec(4, 6, dtype=jnp.int32), spec(4, 6, dtype=bool))}
    found = fnn.summary(net, x)
    assert [row.path for row in found.rows] == ["0/image/0", "0/image/1", "0/text/0", "0/text/1", "1"]
    assert [row.parameters for row in found.rows] == [0, 33, 27, 0, 0]
    assert found.rows[2].output == "float32[4,6,3] masked" and found.output == "float32[4,6]"
    assert "0/text/0   embed(9, 3)  [4,6,3] masked" in str(found)


def test_a_layer_object_in_two_places_is_marked():
    layer, tail = fnn.dense(8), fnn.serial(fnn.dense(8), fnn.activation("tanh"))
    found = fnn.summary(fnn.serial(*[layer] * 3, fnn.activation("relu"), layer, tail, fnn.dense(8), tail), spec(2, 8))
    assert found.again == [("dense(8)", ["0", "4"]), ("serial(dense(8), tanh)", ["5", "7"])]
    assert [row.path for row in found.rows if row.again] == ["0", "4"]
    assert "* dense(8): one object, parameters of its own in each place\n  0, 4; see fnn.shared" in str(found)
    nets = [
        fnn.serial(*[fnn.serial(fnn.dense(8), tail)] * 3),
        fnn.repeat(fnn.serial(fnn.dense(8), fnn.batch_norm()), 3, unroll=True),
        fnn.serial(fnn.activation("relu"), fnn.dense(8), fnn.activation("relu")),
        fnn.shared(layer, lambda use: fnn.serial(use(), fnn.activation("relu"), use())),
        fnn.models.mlp(4, 8, 8, norm="batch_norm", residual=True, unroll=True),
        fnn.models.convnet([4, 8], 3),
        fnn.models.resnet([2, 3], 3, width=4),
        fnn.models.encoder(None, 2, 8, outputs=3),
    ]
    shapes = [(2, 8)] * 5 + [(2, 8, 8, 1)] * 2 + [(2, 5, 8)]
    assert all(fnn.summary(net, spec(*shape)).again == [] for net, shape in zip(nets, shapes, strict=True))


def test_shared_parameters_count_once_and_uses_are_rows():
    net = fnn.shared(fnn.dense(64), lambda use: fnn.serial(use(), fnn.repeat(use(), 3), fnn.dense(3)))
    assert numbers(net, X) == {
        "": (64 * 65, 4 * 64 * 65, 0),
        "rest/0": (0, 0, 2 * 32 * 64 * 64),
        "rest/1/[:]": (0, 0, 3 * 2 * 32 * 64 * 64),
        "rest/2": (195, 780, 2 * 32 * 64 * 3),
    }


def test_bad_input_is_refused_with_its_place():
    with pytest.raises(TypeError, match="summary: net must be a Layer"):
        fnn.summary(lambda x: x, X)
    with pytest.raises(TypeError, match="summary: spec must be an example batch"):
        fnn.summary(fnn.dense(3), (32, 64))
    with pytest.raises(TypeError, match="the input must be floating point") as error:
        fnn.summary(fnn.serial(fnn.flatten(), fnn.dense(3)), jnp.ones((2, 3), int))
    assert "in layer 1, input int32[2,3]" in error.value.__notes__[0]
