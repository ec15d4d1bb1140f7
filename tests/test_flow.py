"""`gradient_flow` at the ends of the float range, with combinators of one's own, and how it counts layers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started
from test_taps import float64_flow, problem

import fnn

pl = pytest.importorskip("polars")

KEY = jax.random.key(0)


def deep(depth, activation, gain, width=12):
    """Hidden layers 1..depth + 1 with taps, and the output layer."""

    def dense(n):
        return fnn.dense(n, kernel_init=f"scaled({gain})")

    block = fnn.serial(dense(width), fnn.tap(), fnn.activation(activation))
    return fnn.serial(block, fnn.repeat(block, depth), dense(3), fnn.tap())


def sparse(depth, activation="sigmoid", gain=1.0):
    """Taps at both ends only."""
    block = fnn.serial(fnn.dense(6, kernel_init=f"scaled({gain})"), fnn.activation(activation))
    return fnn.serial(fnn.tap(), fnn.repeat(block, depth), fnn.dense(3, bias_init="normal(1.0)"), fnn.tap())


def normed():
    """A norm takes squares, which leave the range long before the signal does."""
    return fnn.serial(fnn.dense(6), fnn.tap(), fnn.batch_norm(), fnn.activation("relu"), fnn.dense(3), fnn.tap())


SEQUENCE = as_jax(np.random.default_rng(0).normal(size=(8, 4, 6)), jnp.float32)
TOKENS = as_jax(np.random.default_rng(0).integers(0, 5, (8, 4)))
TAIL = [fnn.tap(), fnn.take_last(), fnn.dense(3), fnn.tap()]


def errors_of(measured):
    return [row.value for row in measured.rows if row.quantity == "log10_error"]


def equals_float64(measured, net, params, state, batch, atol=1e-4, factor=1.0):
    errors, norms = float64_flow(net, params, state, batch, factor)
    np.testing.assert_allclose(errors_of(measured), errors, atol=atol, rtol=0)
    names = {f"log10_{path.rpartition('/')[2]}" for path, _ in norms}
    logs = {row.path: row.value for row in measured.rows if row.quantity in names}
    for path, value in norms:
        if path.endswith("kernel"):  # below batch norm a bias has a gradient of rounding errors
            assert logs[path] == pytest.approx(value, abs=atol), path


@pytest.mark.parametrize(
    ("net", "scale"),
    [
        (deep(300, "leaky_relu", 0.3), 1),
        (deep(50, "relu", 14.14), 1),
        (sparse(20, "relu", 1e-3), 1),
        (normed(), 1e25),
        (normed(), 1e-30),
    ],
    ids=["leaky_relu", "exploding", "lost_between_taps", "huge_inputs", "tiny_inputs"],
)
def test_a_signal_that_leaves_float32_is_measured_in_float64(net, scale):
    x, y = problem(n=8)
    x = x * scale
    params, state = net.init(KEY, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = fnn.gradient_flow(net, (params, state), (x, y))
    assert measured.precision == "float64" and "measured in float64: the signal" in str(measured)
    equals_float64(measured, net, params, state, (x, y))
    peaks = measured.profile("peak")[1]
    assert np.all(peaks > 0) and np.all(np.isfinite(peaks))


def test_a_signal_of_normal_size_stays_in_float32_and_a_dead_layer_is_zero_not_lost():
    x, y = problem(n=8)
    net = deep(4, "relu", 1.4)
    params, state = net.init(KEY, x)
    measured = fnn.gradient_flow(net, (params, state), (x, y))
    assert (measured.precision, measured.note) == ("float32", "")
    first, *rest = params
    dead = ((first[0] | {"bias": jnp.full_like(first[0]["bias"], -100)}, *first[1:]), *rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = fnn.gradient_flow(net, (dead, state), (x, y))
    assert measured.log10_error[0] == measured.log10_kernel[0] == -np.inf  # below the dead layer
    assert np.isfinite(measured.log10_error[-1]) and not np.isnan([row.value for row in measured.rows]).any()


@pytest.mark.parametrize(("gain", "low", "high"), [(1e-3, 80, 105), (1e4, 36, 46)])
def test_what_leaves_float64_too_is_nan_and_the_layer_is_named(gain, low, high):
    """A layer is a factor gain/sqrt(2), within what a width of 12 scatters.

    A signal is lost below 2e-308/2e-16, so behind layer 292/3.15 = 93, and above 1e154, behind layer 154/3.85 = 40.
    """
    x, y = problem(n=8)
    net = deep(150, "relu", gain)
    params, state = net.init(KEY, x)
    with pytest.warns(UserWarning, match=r"left the range of float64 at layer \d+ \(1/\[\d+\]/1\)") as record:
        measured = fnn.gradient_flow(net, (params, state), (x, y))
    assert len(record) == 1 and measured.note in str(record[0].message)
    assert np.isnan([row.value for row in measured.rows if row.quantity.startswith("log10_")]).all()
    layers, peaks = measured.profile("peak")
    first = layers[np.isnan(peaks)][0]
    assert low < first < high and f"layer {first} " in measured.note
    assert np.all(np.isfinite(peaks[layers < first])) and np.all(np.isnan(peaks[layers > first]))


def test_a_net_that_casts_to_float32_itself_is_nan_and_says_so():
    x, y = problem(n=8)
    net = fnn.serial(deep(100, "relu", 0.3), fnn.activation(lambda h: h.astype(jnp.float32)))
    with pytest.warns(
        UserWarning, match=r"range of float32 at layer \d+ \(.*in float64 it cannot be measured \(it casts"
    ):
        measured = fnn.gradient_flow(net, net.init(KEY, x), (x, y))
    assert np.isnan(measured.log10_error).all() and measured.precision == "float32"


def test_under_x64_the_way_that_the_sentence_names_gives_float64s_numbers():
    x, y = problem(n=8)
    net = deep(100, "leaky_relu", 0.3)
    params, state = net.init(KEY, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, state))
        measured = fnn.gradient_flow(net, wide, (x.astype(jnp.float64), y))
        assert (measured.precision, measured.note) == ("float64", "")
    equals_float64(measured, net, params, state, (x, y), 1e-9)


# Combinators of one's own ---------------------------------------------------------------------------------------------


def own(apply_both, *layers):
    """Make a combinator whose parameters and state look like those of `serial`."""

    def init(key, spec):
        made = [layer.init(key, spec) for layer in layers]
        params, states = (tuple(part) for part in zip(*made, strict=True))
        return params, states

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        news = [None] * len(layers)

        def run(i, x):
            y, news[i] = layers[i].apply(params[i], state[i], x, train=train)
            return y

        y = apply_both(run, x)
        return y, tuple(news)

    return fnn.Layer(init, apply)


def block(gain=1.0):
    return fnn.serial(fnn.dense(6, kernel_init=f"scaled({gain})"), fnn.tap(), fnn.activation("tanh"))


def quiet():
    return fnn.serial(fnn.dense(6), fnn.activation("tanh"))


def around(middle):
    return fnn.serial(fnn.dense(6), fnn.tap(), middle, fnn.dense(6), fnn.tap(), fnn.dense(3))


MEETING = {
    "sum": around(own(lambda run, x: run(0, x) + run(1, x), block(), block(1e-3))),
    "product": around(own(lambda run, x: run(0, x) * run(1, x), block(), block())),
    "skip": around(own(lambda run, x: x + run(0, x), block())),
    "one_tap": around(own(lambda run, x: run(0, x) + run(1, x), quiet(), block())),
    "no_tap_outside": fnn.serial(own(lambda run, x: run(0, x) + run(1, x), block(), block(0.1)), fnn.dense(3)),
    "three": around(own(lambda run, x: run(0, x) + run(1, x) + run(2, x), quiet(), block(), block(3.0))),
    "repeated": around(fnn.repeat(own(lambda run, x: run(0, x) + 0.1 * run(1, x), block(), block()), 3)),
    "backwards": around(own(lambda run, x: run(0, run(1, x)), block(), block(0.2))),
    "inside_serial": around(
        fnn.serial(quiet(), own(lambda run, x: run(1, x) - 0.5 * run(0, x), block(), quiet()), block())
    ),
    "one_behind_the_other": around(fnn.repeat(own(lambda run, x: run(1, run(0, x)), block(), block(1e-6)), 30)),
    "deep": around(fnn.repeat(own(lambda run, x: run(0, x) - 0.3 * run(1, x), block(0.1), block(0.1)), 60)),
    "clipped": around(fnn.serial(fnn.tap(), fnn.activation(lambda x: clipped(x)))),
}


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.clip(cotangent, -0.01, 0.01),))


ALIKE = ("three", "inside_serial", "deep")
"""Sums of two, around others and in shorter loops say the same."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in MEETING])
def test_combinators_of_ones_own_whose_paths_meet_equal_float64(name):
    x, y = problem(n=8)
    net = MEETING[name]
    params, state = started(net.init, x)
    equals_float64(fnn.gradient_flow(net, (params, state), (x, y)), net, params, state, (x, y))


def test_a_gradient_that_vanishes_between_two_taps_is_exact_in_float32():
    x, y = problem(n=8)
    net = sparse(150)
    params, state = net.init(KEY, x)
    measured = fnn.gradient_flow(net, (params, state), (x, y))
    assert measured.precision == "float32" and errors_of(measured)[0] < -87
    equals_float64(measured, net, params, state, (x, y))


@pytest.mark.parametrize("options", [{"checkpoint": 9}, {"unroll": 4}], ids=str)
def test_blocks_in_groups_have_the_same_norms(options):
    """A sigmoid block is a factor 0.24, so that layers of one group differ by more than float32's range."""
    x, y = problem(n=8)
    inner = fnn.serial(fnn.dense(6, kernel_init="scaled(1.0)"), fnn.tap(), fnn.activation("sigmoid"))
    net = fnn.serial(fnn.repeat(inner, 100, **options), fnn.dense(3))
    params, state = net.init(KEY, x)
    measured = fnn.gradient_flow(net, (params, state), (x, y))
    assert measured.precision == "float32" and errors_of(measured)[0] < -56
    equals_float64(measured, net, params, state, (x, y))


BLOCK = fnn.transformers.Block(heads=2, taps=True, unroll=1)
FACTOR = 2.0**-115
"""Most gradients of a loss so small are zero in float32, and no error signal has a square there."""


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (fnn.models.mlp(20, 6, 3, norm="batch_norm", residual=True, taps=True, unroll=1), None),
        # test_cross_attention measures a transformer of both kinds
        pytest.param(fnn.transformers.decoder(7, 3, 4, BLOCK), "tokens", marks=pytest.mark.slow),
        (fnn.serial(fnn.repeat(fnn.residual(fnn.serial(fnn.conv(6, 3), fnn.tap(), fnn.activation("relu"))), 3), *TAIL), "x"),
        (fnn.serial(fnn.lstm(6, tap=fnn.tap()), *TAIL), "x"),
    ],
    ids=["residual", "tied_decoder", "conv", "lstm"],
)  # fmt: skip
def test_residual_nets_transformers_and_recurrences_have_float64s_log_norms_at_every_tap(net, x):
    features, y = problem(n=8)
    x = {None: features, "tokens": TOKENS, "x": SEQUENCE}[x]
    params, state = started(net.init, x)
    y = TOKENS if fnn.core.output_shape(net, params, state, x) == (8, 4, 7) else y
    measured = fnn.gradient_flow(
        net, (params, state), (x, y), loss=lambda outputs, y: FACTOR * fnn.losses.cross_entropy(outputs, y)
    )
    assert measured.precision == "float32" and len(errors_of(measured)) >= 4
    equals_float64(measured, net, params, state, (x, y), factor=FACTOR)


# Layers ---------------------------------------------------------------------------------------------------------------


def weight(width, *, bare=False, name="w"):
    """Make a dense layer under other names, or with a bare array for its parameters."""

    def init(key, spec):
        w = jax.random.normal(key, (spec.shape[-1], width)) / spec.shape[-1] ** 0.5
        return w if bare else {name: w, "offset": jnp.zeros(width)}

    def apply(params, x):
        return x @ params if bare else x @ params[name] + params["offset"]

    return fnn.core.stateless(init, apply)


def gained(width):
    """Scale by an array of three axes, which is no layer."""
    return fnn.core.stateless(
        lambda key, spec: {"scale": jnp.ones((1, 1, width))}, lambda params, x: x * params["scale"][0]
    )


def taps_of(measured):
    return [row.layer for row in measured.rows if row.quantity == "log10_error"]


@pytest.mark.parametrize(
    ("net", "x", "layers"),
    [
        (fnn.models.mlp(3, 6, 3, taps=True), None, [1, 1, 2, 2, 3, 3, 4]),
        (fnn.serial(weight(6), fnn.tap(), fnn.activation("tanh"), weight(3), fnn.tap()), None, [1, 2]),
        (fnn.serial(fnn.repeat(fnn.serial(weight(6), fnn.tap()), 3), weight(3), fnn.tap()), None, [1, 2, 3, 4]),
        (fnn.serial(weight(6, bare=True), weight(5, bare=True), fnn.tap(), weight(3), fnn.tap()), None, [2, 3]),
        (fnn.serial(fnn.repeat(weight(6, bare=True), 3), fnn.tap(), fnn.dense(3)), None, [3]),
        (fnn.serial(fnn.dense(6), fnn.tap(), fnn.batch_norm(), fnn.tap(), fnn.scalar_affine(), fnn.tap(), fnn.dense(3)), None, [1, 1, 1]),
        (fnn.serial(fnn.scalar_affine(), fnn.tap(), fnn.dense(6), gained(6), fnn.tap(), fnn.dense(3)), None, [0, 1]),
        (fnn.serial(fnn.dense(1), fnn.tap(), fnn.dense(3, bias=False), fnn.tap()), None, [1, 2]),
        (fnn.serial(fnn.embed(5, 6), fnn.tap(), fnn.lstm(6, initial="learned"), *TAIL), TOKENS, [1, 2, 3]),
        (fnn.serial(fnn.gru(6), fnn.repeat(fnn.rnn(6), 2), *TAIL), SEQUENCE, [3, 4]),
        (fnn.serial(fnn.attention(2), *TAIL), SEQUENCE, [4, 5]),
        (fnn.serial(fnn.conv(4, 3), fnn.tap(), fnn.group_norm(2), fnn.conv(2, 3), *TAIL), SEQUENCE, [1, 2, 3]),
    ],
    ids=["mlp", "w", "stacked_w", "bare", "stacked_bare", "norms", "gains", "one_unit", "lstm", "cells", "attention", "conv"],
)  # fmt: skip
def test_layers_are_counted_by_their_weights(net, x, layers):
    features, y = problem(n=8)
    x = features if x is None else x
    measured = fnn.gradient_flow(net, started(net.init, x), (x, y))
    assert taps_of(measured) == layers
    weights = [row for row in measured.rows if row.quantity in measured.weights]
    assert sorted({row.layer for row in weights}) == list(range(1, len(measured.log10_kernel) + 1))
    assert len(measured.log10_kernel) >= max(layers) and np.isfinite(measured.log10_kernel).all()


def test_the_weights_gradient_of_a_net_with_other_names_is_there():
    x, y = problem(n=8)
    net = fnn.serial(weight(6), fnn.tap(), weight(3, name="matrix"))
    params, state = net.init(KEY, x)
    measured = fnn.gradient_flow(net, (params, state), (x, y))

    def objective(params):
        return jnp.mean(fnn.losses.cross_entropy(net.apply(params, state, x)[0], y))

    grads = jax.jit(jax.grad(objective))(params)
    expected = [np.log10(np.linalg.norm(grads[0]["w"])), np.log10(np.linalg.norm(grads[2]["matrix"]))]
    np.testing.assert_allclose(measured.log10_kernel, expected, atol=1e-5)
    assert measured.weights == ("log10_w", "log10_matrix") and "log10_kernel" in str(measured)
