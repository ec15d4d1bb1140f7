"""Combinators: values by hand, and one clear sentence, with the layer's path, for what cannot be composed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn

pytestmark = pytest.mark.usefixtures("optimised")

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def scale(factor):
    return fnn.activation(lambda x: factor * x)


def apply(net, x, **options):
    params, state = net.init(jax.random.key(0), x)
    return net.apply(params, state, x, **options)[0]


def test_combinators_by_hand():
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_array_equal(apply(fnn.serial(scale(2), fnn.activation(lambda x: x + 1)), x), [[3, 5]])
    np.testing.assert_array_equal(apply(fnn.residual(scale(2), scale=0.5), x), [[2, 4]])
    two, three = apply(fnn.parallel(scale(2), scale(3)), x)
    np.testing.assert_array_equal(two, 2 * x)
    np.testing.assert_array_equal(three, 3 * x)
    for options in ({}, {"unroll": 3}, {"unroll": True}, {"checkpoint": 2}, {"unroll": True, "checkpoint": 2}):
        np.testing.assert_array_equal(apply(fnn.repeat(scale(2), 5, **options), x), 32 * x)


def test_parameters_have_the_documented_structure_and_paths():
    net = fnn.serial(fnn.dense(4), fnn.named("trunk", fnn.repeat(fnn.serial(fnn.dense(4)), 3)))
    params, state = net.init(jax.random.key(0), X)
    assert fnn.tree.paths(params) == ["0/bias", "0/kernel", "1/trunk/[:]/0/bias", "1/trunk/[:]/0/kernel"]
    assert params[1]["trunk"].blocks[0]["kernel"].shape == (3, 4, 4)
    assert jax.tree.leaves(state) == []
    unrolled, _ = fnn.repeat(fnn.serial(fnn.dense(4)), 3, unroll=True).init(jax.random.key(0), X)
    assert isinstance(unrolled, tuple) and len(unrolled) == 3


def test_dense_equals_numpy():
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    layer = fnn.dense(6, bias_init="normal(1.0)")
    params, state = layer.init(jax.random.key(1), x)
    y, _ = layer.apply(params, state, x)
    expected = x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean_and_gives_each_lane_its_own_mask():
    # n = 200,000 numbers kept with probability 0.7: the fraction is within 6 standard errors (0.0061) of it but for 2 of
    # 10^9 keys.
    layer, n = fnn.dropout(0.3), 200_000
    y, _ = layer.apply((), (), jnp.ones((1, n)), key=jax.random.key(3), train=True)
    assert abs(float(jnp.mean(y != 0)) - 0.7) < 0.0062
    np.testing.assert_allclose(np.unique(np.asarray(y)), [0, 1 / 0.7], rtol=1e-6)

    def lane(x):
        return layer.apply((), (), x, key=jax.random.key(3), train=True, axis_name="batch")[0]

    masks = jax.vmap(lane, axis_name="batch")(jnp.ones((2, 1, 64)))
    assert not np.array_equal(masks[0], masks[1])


def test_dropout_masks_differ_between_the_blocks_of_repeat():
    net = fnn.repeat(fnn.dropout(0.5), 2)
    params, state = net.init(jax.random.key(0), X)
    y, _ = net.apply(params, state, jnp.ones((1, 4000)), key=jax.random.key(1), train=True)
    # Two equal masks would keep 1/2, two independent ones 1/4; 6 standard errors of n = 4000 are 0.041.
    assert abs(float(jnp.mean(y != 0)) - 0.25) < 0.041


def test_masks_differ_between_the_branches_of_parallel():
    net = fnn.parallel(fnn.dropout(0.5), fnn.dropout(0.5), fnn.dropout(0.5))
    params, state = net.init(jax.random.key(0), X)
    masks, _ = net.apply(params, state, jnp.ones((1, 4000)), key=jax.random.key(1), train=True)
    # Independent masks agree in half of 4000 places; 6 standard errors are 0.047.
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(jnp.mean((masks[i] != 0) == (masks[j] != 0))) - 0.5) < 0.048


@pytest.mark.parametrize("checkpoint", [None, 1, 2, 3, 5, 7])
def test_repeat_returns_the_states_of_its_blocks_in_order(checkpoint):
    """Each block remembers its input, and adds 1 to it; 5 blocks in groups of 2 or 3 leave a shorter last group."""

    def remember(params, state, x, *, key=None, train=False, axis_name=None):
        return x + 1, jnp.sum(x)

    net = fnn.repeat(fnn.Layer(lambda key, spec: ((), jnp.zeros(())), remember), 5, checkpoint=checkpoint)
    x = jnp.zeros((1, 1))
    y, state = net.apply(*net.init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(state.blocks, [0, 1, 2, 3, 4])
    assert y == 5


def test_checkpoint_saves_memory():
    """One step of backward through 64 blocks keeps 64 inputs; with groups of 8 about 8 + 8."""

    def temporary(**options):
        net = fnn.repeat(fnn.serial(fnn.dense(32), fnn.activation("tanh")), 64, **options)
        x = jax.ShapeDtypeStruct((256, 32), jnp.float32)
        params, state = jax.eval_shape(lambda k: net.init(k, x), jax.random.key(0))
        loss = jax.jit(jax.grad(lambda p, x: jnp.sum(net.apply(p, state, x)[0])))
        return loss.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(checkpoint=8) < 0.5 * temporary()


def test_depth_does_not_enter_the_program():
    """The jaxpr of 1,000 layers is as long as that of 10."""

    def length(depth):
        net = fnn.models.mlp(depth, 8, 3, norm="batch_norm", unroll=1)
        params, state = jax.eval_shape(lambda k: net.init(k, X), jax.random.key(0))
        return len(
            str(jax.make_jaxpr(lambda p, s, x: net.apply(p, s, x, train=True))(params, state, jnp.zeros(X.shape)))
        )

    assert abs(length(1000) - length(10)) < 200


@pytest.mark.parametrize(
    ("make", "error", "sentence", "place"),
    [
        (lambda: fnn.serial(fnn.dense(3), lambda x: x), TypeError, "argument 1 must be a Layer.*use activation", None),
        (lambda: fnn.dense(-3), ValueError, "dense: width must be a positive integer, got -3", None),
        (lambda: fnn.dense(2.5), TypeError, "dense: width must be a positive integer, got 2.5", None),
        (lambda: fnn.dense(3, kernel_init="he_norml"), ValueError, "did you mean 'he_normal'", None),
        (lambda: fnn.activation("rellu"), ValueError, "did you mean 'relu'", None),
        (lambda: fnn.activation("relu", slope=3), TypeError, "slope", None),
        (lambda: fnn.dropout(1.0), ValueError, r"dropout: rate must lie in \[0, 1\), got 1.0", None),
        (lambda: fnn.dropout(-0.1), ValueError, r"rate must lie in \[0, 1\)", None),
        (lambda: fnn.repeat(fnn.dense(3), 0), ValueError, "repeat: n must be a positive integer, got 0", None),
        (lambda: fnn.repeat(fnn.dense(3), 2, checkpoint=0), ValueError, "checkpoint must be a positive", None),
        (lambda: fnn.named("a/b", fnn.dense(3)), ValueError, "without '/'", None),
        (lambda: fnn.models.mlp(-1, 8, 3), ValueError, "mlp: depth must be a positive integer, got -1", None),
        (lambda: fnn.models.mlp(2, 8, 3, norm="batchnorm"), ValueError, "did you mean 'batch_norm'", None),
        (lambda: fnn.tap(bounds=(0, float("inf"))), ValueError, "tap: bounds must be finite", None),
        (
            lambda: fnn.serial(fnn.repeat(fnn.dense(5), 3)).init(jax.random.key(0), X),
            ValueError,
            r"repeat: the block must keep its input's shape, got float32\[2,4\] -> float32\[2,5\]; use serial",
            r"in layer 0/\[:\]|in layer 0",
        ),
        (
            lambda: fnn.residual(fnn.dense(5)).init(jax.random.key(0), X),
            ValueError,
            r"residual: the layer must keep its input's shape, got float32\[2,4\] -> float32\[2,5\]",
            None,
        ),
        (
            lambda: apply(fnn.serial(fnn.dense(3)), jnp.ones((2, 4), jnp.int32)),
            TypeError,
            r"dense: the input must be floating point, got int32\[2,4\]",
            "in layer 0",
        ),
        (
            lambda: apply(fnn.serial(fnn.named("a", fnn.serial(fnn.dropout(0.5)))), jnp.ones((2, 4)), train=True),
            ValueError,
            "dropout: train mode needs a PRNG key",
            r"in layer 0/a/0, input float32\[2,4\]",
        ),
        (
            lambda: apply(fnn.serial(fnn.group_norm(3)), jnp.ones((2, 4))),
            ValueError,
            r"group_norm: the number of units must be divisible by 3, got float32\[2,4\]",
            "in layer 0",
        ),
    ],
)
def test_bad_input_gets_one_sentence(make, error, sentence, place):
    with pytest.raises(error, match=sentence) as caught:
        make()
    if place is not None:
        notes = getattr(caught.value, "__notes__", [])
        assert any(re.search(place, note) for note in notes), notes


def test_a_wrong_shape_names_the_layer_expected_and_got():
    net = fnn.serial(fnn.dense(3), fnn.named("trunk", fnn.serial(fnn.dense(2))))
    params, state = net.init(jax.random.key(0), X)
    wrong = (params[0] | {"kernel": jnp.zeros((4, 7)), "bias": jnp.zeros(7)}, params[1])
    with pytest.raises(ValueError, match=r"must be float32\[batch, ..., 3\], as at init, got float32\[2,7\]") as caught:
        jax.jit(net.apply)(wrong, state, jnp.zeros((2, 4)))
    assert "in layer 1/trunk/0, input float32[2,7]" in caught.value.__notes__


def test_params_of_another_depth_are_refused():
    params, state = fnn.repeat(fnn.dense(4), 3).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="leading axis of 5 blocks.*another depth"):
        fnn.repeat(fnn.dense(4), 5).apply(params, state, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="serial: params must be a tuple"):
        fnn.serial(fnn.dense(4)).apply(params, state, jnp.zeros((2, 4)))
