"""Mean-field theory of nets: batch norm, residual nets, predictions at finite width; edges and errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_meanfield import NAMES, k1, numpy_phi

from fnn.layers import activations
from fnn.theory import gaussian, meanfield


def k0(c):
    return (math.pi - math.acos(c)) / math.pi


@pytest.mark.parametrize("batch", [4, 5, 8, 32, 256, 10**6])
def test_batch_norm_closed_forms(batch):
    c = -1 / (batch - 1)
    relu = (k0(c) + batch - 1) / ((batch - 3) * (1 - k1(c))) - 1 / (batch - 3)
    assert meanfield.batch_norm_rate("relu", batch) == pytest.approx(relu, rel=1e-9)
    assert meanfield.batch_norm_rate("identity", batch) == pytest.approx((batch - 2) / (batch - 3), rel=1e-9)


def test_batch_norm_printed_numbers():
    assert meanfield.batch_norm_rate("relu", math.inf) == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)
    assert round(meanfield.batch_norm_rate("relu", 256), 4) == 1.4732
    assert meanfield.batch_norm_rate("identity", 8) == pytest.approx(1.2, rel=1e-12)
    # E[erf'²]/E[erf²] at q = 1
    erf = 4 / math.pi / math.sqrt(5) / (2 / math.pi * math.asin(2 / 3))
    assert meanfield.batch_norm_rate("erf", math.inf) == pytest.approx(erf, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_batch_norm_rate_tends_to_its_limit_and_explodes(name):
    limit = meanfield.batch_norm_rate(name, math.inf)
    assert meanfield.batch_norm_rate(name, 1e9) == pytest.approx(limit, rel=1e-7)
    assert limit == pytest.approx(1, abs=1e-12) if name == "identity" else limit > 1
    assert meanfield.batch_norm_rate(name, 8) > limit


@pytest.mark.parametrize("name", ["tanh", "leaky_relu"])
def test_batch_norm_rate_against_a_wide_net(name):
    """Width 400, B = 8, 7 layers, 5 seeds: their mean spreads by about 1 %, the width biases by as much; bound 5 %."""
    rng = np.random.default_rng(0)
    batch, width, depth, rates = 8, 400, 7, []
    for _ in range(5):
        x, tape = rng.normal(size=(batch, width)), []
        for _ in range(depth):
            kernel = rng.normal(size=(width, width)) / math.sqrt(width)
            h = x @ kernel
            y = (h - h.mean(0)) / h.std(0)
            x, slope = numpy_phi(name, y)
            tape.append((kernel, y, h.std(0), slope))
        g, logs = rng.normal(size=(batch, width)), []
        for kernel, y, std, slope in reversed(tape):
            g = g * slope
            g = (g - g.mean(0) - y * (g * y).mean(0)) / std
            logs.append(math.log(np.sum(g**2)))
            g = g @ kernel.T
        rates.append((logs[-2] - logs[1]) / (depth - 3))  # not the first layer, whose input is not phi's output
    assert math.exp(np.mean(rates)) == pytest.approx(meanfield.batch_norm_rate(name, batch), rel=0.05)


def test_residual_rate():
    assert meanfield.residual_rate(20**-0.5, math.sqrt(2), 1.0, 20) == pytest.approx(2.6533, abs=5e-5)
    assert meanfield.residual_rate(0.5, 1.2, 0.7, 3) == pytest.approx((1 + 0.25 * 1.44 * 0.49 / 2) ** 3, rel=1e-12)
    assert meanfield.residual_rate(1e-4, math.sqrt(2), 1.0, 10**8) == pytest.approx(math.e, rel=1e-6)
    assert meanfield.residual_rate(1.0, 1.0, 1.0, 0) == 1


def test_he_relu_moments():
    """n = 200,000 draws of the layer's law; bounds of 5 standard errors, failing by chance once in a million."""
    width, n, rng = 12, 200_000, np.random.default_rng(0)
    active = rng.binomial(width, 0.5, size=n)
    logs = np.log(2 / width * rng.chisquare(active[active > 0]))
    mean, variance = meanfield.he_relu_log_moments(width)
    assert logs.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    kurtosis = np.mean((logs - logs.mean()) ** 4) / logs.var() ** 2
    assert logs.var() == pytest.approx(variance, rel=5 * math.sqrt(kurtosis / n))
    mean, variance = meanfield.he_relu_log_moments(10_000)
    assert mean == pytest.approx(-5 / 20_000, rel=1e-3) and variance == pytest.approx(5 / 10_000, rel=1e-3)
    assert meanfield.he_relu_log_variance([100, 200]) == pytest.approx(0.075)


def test_prediction_of_he_relu_over_seeds():
    """3,000 nets of width 40, depth 4, scalar output. Bounds of 5 standard errors: fails by chance below 1e-5."""
    seeds, width, depth, rng = 3000, 40, 4, np.random.default_rng(1)
    x = np.broadcast_to(rng.normal(size=(1, 1, width)), (seeds, 1, width))
    tape = []
    for _ in range(depth):
        kernel = rng.normal(size=(seeds, width, width)) * math.sqrt(2 / width)
        h = x @ kernel
        x = np.maximum(h, 0)
        tape.append((kernel, h > 0))
    delta, logs = rng.normal(size=(seeds, 1, width)) * math.sqrt(2 / width), []
    for kernel, slope in reversed(tape):
        delta = delta * slope
        logs.insert(0, np.log(np.sum(delta**2, axis=(1, 2))) / 2)
        delta = delta @ kernel.transpose(0, 2, 1)
    logs = np.array(logs)
    predicted = meanfield.predict(depth, activation="relu", sigma_w=math.sqrt(2), sigma_b=0.0, width=width)
    assert np.allclose(predicted.log_error, 0, atol=1e-12)
    spread = logs.std(axis=1)
    assert np.all(np.abs(spread / predicted.band - 1) < 5 * math.sqrt(0.6 / seeds))
    error = (logs - logs[-1]).mean(axis=1) - predicted.mean_log_error
    assert np.all(np.abs(error) < 5 * spread / math.sqrt(seeds))
    assert predicted.mean_log_error[0] == pytest.approx(-3 * 5 / (4 * width), rel=0.1)


def test_prediction_of_other_homogeneous_nets():
    linear = meanfield.predict(4, activation="identity", sigma_w=1.0, sigma_b=0.0, width=[100, 200, 300, 400])
    assert linear.band[2] == pytest.approx(math.sqrt(2 / 300 + 2 / 400) / 2, rel=1e-12)
    assert linear.mean_log_error[2] == pytest.approx(-1 / 600, rel=1e-12)
    leaky = meanfield.predict(
        3, activation=activations.leaky_relu.bind(slope=0.0), sigma_w=1.0, sigma_b=0.0, width=10**4
    )
    assert leaky.band[-1] == pytest.approx(math.sqrt(5e-4) / 2, rel=1e-3)


def error_signal(rng, name, sigma_w, sigma_b, q0, depth, width):
    """½ log |delta_l|² of one net whose first pre-activations have variance q0."""
    h, tape = rng.normal(size=width) * math.sqrt(q0), []
    for _ in range(depth):
        x, slope = numpy_phi(name, h)
        kernel = rng.normal(size=(width, width)) * (sigma_w / math.sqrt(width))
        h = x @ kernel + rng.normal(size=width) * sigma_b
        tape.append((kernel, slope))
    delta, logs = rng.normal(size=width), []
    for kernel, slope in reversed(tape):
        delta = slope * (kernel @ delta)
        logs.insert(0, math.log(np.sum(delta**2)) / 2)
    return logs


def test_prediction_slope_at_the_fixed_point():
    """Width 400, 30 layers, 10 seeds, the first 3 layers dropped: within 0.03 of log chi (squared norms)."""
    rng, sigma_w, sigma_b = np.random.default_rng(2), math.sqrt(2.5), math.sqrt(0.05)
    predicted = meanfield.predict(30, activation="tanh", sigma_w=sigma_w, sigma_b=sigma_b)
    q0 = meanfield.fixed_point("tanh", sigma_w, sigma_b).q
    curves = [error_signal(rng, "tanh", sigma_w, sigma_b, q0, 30, 400) for _ in range(10)]
    measured = -np.polyfit(predicted.layer[3:], 2 * np.mean(curves, axis=0)[3:], 1)[0]
    assert measured == pytest.approx(math.log(1.133516), abs=0.03)
    assert (
        np.allclose(-2 * np.diff(predicted.log_error), math.log(1.133516), atol=1e-6) and predicted.log_error[-1] == 0
    )


def test_prediction_follows_the_trajectory_from_q0():
    """Width 400, 8 layers, 10 seeds; a curve of logs spreads by 0.02, the bound 0.1 is five times that."""
    rng = np.random.default_rng(3)
    predicted = meanfield.predict(8, activation="tanh", sigma_w=1.2, sigma_b=0.1, q0=20.0)
    curves = np.mean([error_signal(rng, "tanh", 1.2, 0.1, 20.0, 8, 400) for _ in range(10)], axis=0)
    assert np.max(np.abs(curves - curves[-1] - predicted.log_error)) < 0.1
    assert predicted.log_error[0] < -0.3  # the first layer saturates: chi(q = 20) is far below chi(q*)
    assert predicted.q[0] == 20 and predicted.q[1] == pytest.approx(meanfield.length_map("tanh", 20.0, 1.2, 0.1))


def test_prediction_of_batch_norm_and_of_great_depth():
    normed = meanfield.predict(5, activation="relu", sigma_w=0.3, sigma_b=0.0, norm="batch_norm", batch=256, width=100)
    assert normed.log_error[0] == pytest.approx(4 * math.log(1.47323) / 2, rel=1e-4)
    assert np.all(normed.q == 1) and normed.low[0] < normed.log_error[0] < normed.high[0]
    deep = meanfield.predict(2000, activation="sigmoid", sigma_w=0.5, sigma_b=0.0)
    assert deep.log_error[0] == pytest.approx(1999 * math.log(deep.chi[-1]) / 2, rel=1e-9) and deep.log_error[0] < -2000
    small = meanfield.predict(100, activation="tanh", sigma_w=0.16, sigma_b=0.0, q0=1.0)
    assert small.chi[-1] == pytest.approx(0.0256, rel=1e-9) and 0 < small.q[-1] < 1e-150


@pytest.mark.parametrize(
    "name, sigma_w, q, chi",
    [
        ("tanh", 1.0, 0.0, 1.0),  # the iteration itself gets there as 1/(2l)
        ("tanh", 0.9, 0.0, 0.81),
        ("erf", 0.5, 0.0, 1 / math.pi),
        ("gelu", 1.0, 0.0, 0.25),
        ("silu", 1.2, 0.0, 0.36),
        ("relu", 1.0, 0.0, 0.5),
        ("identity", 0.0, 0.0, 0.0),
        ("relu", math.sqrt(2), 1.0, 1.0),
        ("relu", 2.0, math.inf, 2.0),
        ("gelu", 2.0, math.inf, 2.0),
        ("identity", 1.0, 1.0, 1.0),
        ("identity", 3.0, math.inf, 9.0),
    ],
)
def test_edges_without_bias(name, sigma_w, q, chi):
    point = meanfield.fixed_point(name, sigma_w, 0.0)
    assert point.q == q and point.chi == pytest.approx(chi, rel=1e-12)
    assert math.isnan(point.c) == (q == 0 or name == "identity")
    assert math.isinf(point.xi_grad) == (chi == 1)


def test_edges_with_bias():
    assert meanfield.fixed_point("relu", math.sqrt(2), 1e-3).q == math.inf
    assert meanfield.fixed_point("softplus", 1.5, 0.1).q == math.inf
    assert meanfield.fixed_point("tanh", 0.0, 0.3) == pytest.approx((0.09, 0.0, 1.0, 0.0))
    near = meanfield.fixed_point("tanh", 1 + 1e-5, 0.0)  # sigma_w² (q - 2q²) = q
    assert near.q == pytest.approx(1e-5, rel=1e-3) and near.c == 0
    assert meanfield.fixed_point("relu", 1.4142, 1e-2).q == pytest.approx(1e-4 / (1 - 1.4142**2 / 2), rel=1e-6)


def test_options_and_plain_functions():
    steep = meanfield.fixed_point(activations.leaky_relu.bind(slope=0.5), 1.0, 1.0)
    assert steep.chi == pytest.approx(1.25 / 2, rel=1e-12)
    sine = meanfield.fixed_point(jnp.sin, 1.5, 0.2)  # E[sin²] = (1 - e^-2q)/2, E[cos²] = (1 + e^-2q)/2
    assert sine.chi == pytest.approx(2.25 * (1 + math.exp(-2 * sine.q)) / 2, rel=1e-9)
    hard = meanfield.predict(3, activation=lambda x: jnp.clip(x, -1, 1), sigma_w=1.0, sigma_b=0.0, q0=1.0)
    assert hard.chi[0] == pytest.approx(math.erf(math.sqrt(0.5)), rel=1e-9)  # P(|Z| < 1), kinks at ±1


def test_inside_a_trace_and_in_float32():
    chi = meanfield.fixed_point("tanh", 1.5, 0.3).chi
    gaussian._moments.cache_clear()
    gaussian._table.cache_clear()
    assert jax.jit(lambda x: x * meanfield.fixed_point("tanh", 1.5, 0.3).chi)(1.0) == pytest.approx(chi, rel=1e-6)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: meanfield.fixed_point("tanh", -1.0, 0.0), ValueError, "fixed_point: sigma_w must be at least 0"),
        (lambda: meanfield.fixed_point("tanh", 1.0, math.nan), ValueError, "sigma_b must be at least 0"),
        (lambda: meanfield.fixed_point("tanh", math.inf, 0.0), ValueError, "finite"),
        (lambda: meanfield.fixed_point("tanh", "big", 0.0), TypeError, "sigma_w must be a number, got 'big'"),
        (lambda: meanfield.fixed_point("tahn", 1.0, 0.0), ValueError, "did you mean 'tanh'"),
        (lambda: meanfield.fixed_point("softmax", 1.0, 0.0), ValueError, "needs an elementwise activation"),
        (lambda: meanfield.length_map("tanh", -1.0, 1.0, 0.0), ValueError, "q must be at least 0"),
        (lambda: meanfield.correlation_map("tanh", 1.5, 1.0, 1.0, 0.0), ValueError, "c must be between -1 and 1"),
        (lambda: meanfield.correlation_map("tanh", 0.5, 0.0, 1.0, 0.0), ValueError, "q must be a finite number above"),
        (lambda: meanfield.critical("relu", 0.1), ValueError, "chi crosses 1 at no finite length for relu"),
        (lambda: meanfield.critical("softplus", 0.0), ValueError, "no finite length"),
        (lambda: meanfield.critical("tanh", -0.1), ValueError, "sigma_b must be at least 0"),
        (lambda: meanfield.critical("tanh", 0.1, q0=-1.0), ValueError, "critical: q0 must be at least 0"),
        (
            lambda: meanfield.fixed_point("tanh", 1.0, 0.1, q0=math.nan),
            ValueError,
            "fixed_point: q0 must be at least 0",
        ),
        (lambda: meanfield.batch_norm_rate("relu", 3), ValueError, "batch must be at least 4, got 3"),
        (lambda: meanfield.batch_norm_rate("relu", math.nan), ValueError, "batch must be at least 4"),
        (lambda: meanfield.batch_norm_rate("relu", 8.5), ValueError, "whole number"),
        (lambda: meanfield.batch_norm_rate("softmax", 8), ValueError, "elementwise"),
        (lambda: meanfield.residual_rate(1.0, -1.0, 1.0, 3), ValueError, "residual_rate: sigma_v"),
        (lambda: meanfield.he_relu_log_variance([100, 0]), ValueError, "width must be a positive integer, got 0"),
        (lambda: meanfield.predict(0, activation="relu", sigma_w=1, sigma_b=0), ValueError, "depth"),
        (lambda: meanfield.predict(2, activation="relu", sigma_w=1, sigma_b=0, batch=8), ValueError, "go together"),
        (
            lambda: meanfield.predict(2, activation="relu", sigma_w=1, sigma_b=0, norm="batchnorm", batch=8),
            ValueError,
            "did you mean 'batch_norm'",
        ),
        (
            lambda: meanfield.predict(2, activation="relu", sigma_w=1, sigma_b=0, width=[8, 8, 8]),
            ValueError,
            "one per layer",
        ),
        (
            lambda: meanfield.fixed_point(lambda x: jnp.clip(x, -1, 1), 4.0, 0.2),
            ArithmeticError,
            "smooth but for 0",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
