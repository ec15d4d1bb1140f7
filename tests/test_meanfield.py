"""Mean field: published numbers, closed forms, then edges and errors. Simulations have fixed seeds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn.layers import activations
from fnn.theory import gaussian, meanfield

NAMES = [name for name, phi in activations.TABLE.items() if phi.elementwise]
SMOOTH = ["sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softplus", "erf"]


def k1(c):
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


def k0(c):
    return (math.pi - math.acos(c)) / math.pi


@functools.cache
def jitted(name):
    phi = activations.get(name)
    return jax.jit(lambda h: (phi(h), phi.derivative(h)))


def numpy_phi(name, h):
    """phi and phi' in float64, independent of the tables of meanfield.py."""
    with jax.enable_x64(True):
        return tuple(map(np.asarray, jitted(name)(jnp.asarray(h))))


# Values: fixed points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variance_w, variance_b, q, chi",
    [
        (1.76095464, 0.05, 0.57004788, 1.0),
        (1.0, 0.05, 0.193593, 0.759032),
        (2.5, 0.05, 1.063958, 1.133516),
        (4.0, 0.05, 2.195494, 1.342402),
    ],
)
def test_tanh_table(variance_w, variance_b, q, chi):
    point = meanfield.fixed_point("tanh", math.sqrt(variance_w), math.sqrt(variance_b))
    assert point.q == pytest.approx(q, rel=5e-6) and point.chi == pytest.approx(chi, rel=1e-6)
    if chi != 1:
        assert point.xi_grad == pytest.approx(1 / abs(math.log(chi)), rel=1e-4)
    assert (point.c == 1) if chi <= 1.0 else (0 < point.c < 1)


@pytest.mark.parametrize("sigma_w, sigma_b", [(1.0, 0.3), (0.5, 2.0), (1.3, 0.1), (0.0, 0.4)])
def test_relu_fixed_point_closed_form(sigma_w, sigma_b):
    point = meanfield.fixed_point("relu", sigma_w, sigma_b)
    assert point.q == pytest.approx(sigma_b**2 / (1 - sigma_w**2 / 2), rel=1e-12)
    assert point.chi == pytest.approx(sigma_w**2 / 2, rel=1e-12) and point.c == 1


@pytest.mark.parametrize("sigma_w, sigma_b", [(1.5, 0.3), (3.0, 0.5), (20.0, 1.0), (0.6, 0.2)])
def test_erf_fixed_point_closed_form(sigma_w, sigma_b):
    """E[erf(u1) erf(u2)] = (2/pi) asin(2cq/(1+2q)), E[erf'²] = (4/pi)/sqrt(1+4q); q* is 400 at sigma_w = 20."""
    q, c = 1.0, 0.5
    for _ in range(2000):
        q = sigma_w**2 * 2 / math.pi * math.asin(2 * q / (1 + 2 * q)) + sigma_b**2
    for _ in range(2000):
        c = (sigma_w**2 * 2 / math.pi * math.asin(2 * c * q / (1 + 2 * q)) + sigma_b**2) / q
    point = meanfield.fixed_point("erf", sigma_w, sigma_b)
    assert point.q == pytest.approx(q, rel=1e-10)
    assert point.chi == pytest.approx(sigma_w**2 * 4 / math.pi / math.sqrt(1 + 4 * q), rel=1e-10)
    assert point.c == pytest.approx(c, rel=1e-8)
    slopes = [sigma_w**2 * 4 / math.pi / math.sqrt((1 + 2 * q) ** 2 - (2 * q * c) ** 2)]
    slopes += [sigma_w**2 * 4 / math.pi / ((1 + 2 * q) * math.sqrt(1 + 4 * q))]
    scales = meanfield.depth_scales("erf", sigma_w, sigma_b)
    assert scales.c == pytest.approx(1 / abs(math.log(slopes[0])), rel=1e-6)
    assert scales.q == pytest.approx(1 / abs(math.log(slopes[1])), rel=1e-6)
    assert scales.grad == point.xi_grad


@pytest.mark.parametrize("name", NAMES)
def test_fixed_point_is_the_limit_of_the_maps(name):
    for sigma_w, sigma_b in [(0.9, 0.4), (1.8, 0.4)]:
        point = meanfield.fixed_point(name, sigma_w, sigma_b)
        q = 1.0
        for _ in range(600):
            q = meanfield.length_map(name, q, sigma_w, sigma_b)
            if q > 1e25:
                break
        assert (q == pytest.approx(point.q, rel=1e-9)) if math.isfinite(point.q) else (q > 1e20)
        if point.c < 1:  # the map is convex: above c* it falls, below it rises
            c, above, below = (
                meanfield.correlation_map(name, v, point.q, sigma_w, sigma_b)
                for v in (point.c, (1 + point.c) / 2, point.c / 2)
            )
            assert c == pytest.approx(point.c, abs=1e-10)
            assert above < (1 + point.c) / 2 and below > point.c / 2


# Values: the maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1e-6, 0.5, 200.0])
@pytest.mark.parametrize("c", [-1.0, -0.6, 0.0, 0.3, 0.99, 1 - 1e-6, 1.0])
def test_correlation_map_closed_forms(q, c):
    relu = meanfield.correlation_map("relu", c, q, math.sqrt(2), 0.0)
    assert relu == pytest.approx(k1(c), abs=1e-12)
    leaky = meanfield.correlation_map(activations.leaky_relu.bind(slope=0.2), c, q, 1.0, 0.0)
    # phi = 0.2 x + 0.8 relu(x), and E[x1 relu(x2)] = qc/2.
    assert leaky == pytest.approx((0.04 * c + 0.16 * c + 0.64 * k1(c) / 2) / 0.52, abs=1e-12)
    angle = math.asin(2 * c * q / (1 + 2 * q)) / math.asin(2 * q / (1 + 2 * q))
    assert meanfield.correlation_map("erf", c, q, 1.0, 0.0) == pytest.approx(angle, abs=1e-10)


def test_correlation_map_keeps_the_small_gap_near_one():
    gap, q = 1e-9, 3.0
    got = 1 - meanfield.correlation_map("erf", 1 - gap, q, 1.0, 0.0)
    slope = 4 / math.pi / math.sqrt(1 + 4 * q) * q / (2 / math.pi * math.asin(2 * q / (1 + 2 * q)))
    assert got == pytest.approx(slope * gap, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_correlation_map_agrees_with_a_grid(name):
    """A 2-D trapezoid rule: exact for smooth functions, good to its step squared at a kink."""
    z = np.linspace(-8, 8, 321)
    x, y = np.meshgrid(z, z)
    weights = np.exp(-(x**2 + y**2) / 2) * (z[1] - z[0]) ** 2 / (2 * math.pi)
    q, c = 1.7, 0.4
    first, _ = numpy_phi(name, math.sqrt(q) * x)
    second, _ = numpy_phi(name, math.sqrt(q) * (c * x + math.sqrt(1 - c**2) * y))
    expected = (np.sum(weights * first * second) + 0.09) / (np.sum(weights * first**2) + 0.09)
    tolerance = 1e-8 if name in SMOOTH else 1e-3
    assert meanfield.correlation_map(name, c, q, 1.0, 0.3) == pytest.approx(expected, rel=tolerance)


def test_lengths_of_residual_sums_have_the_product_of_the_means():
    """ReLU by hand: E[phi²] = q/2, E[phi] = sqrt(q/2pi), and x and phi(W x + b) are independent in an infinite net."""
    sw, sb, a, q1 = 1.2, 0.3, 0.5, 0.8
    q2 = sw**2 * q1 / 2 + sb**2
    mean = math.sqrt(q1 / (2 * math.pi)), math.sqrt(q2 / (2 * math.pi))
    q3 = sw**2 * (q1 / 2 + 2 * a * mean[0] * mean[1] + a**2 * q2 / 2) + sb**2
    p = meanfield.predict(3, activation="relu", sigma_w=sw, sigma_b=sb, residual=a, q0=q1)
    np.testing.assert_allclose(p.q, [q1, q2, q3], rtol=1e-10)


@pytest.mark.parametrize("name, a", [("relu", 0.5), ("sigmoid", 1.0), ("gelu", 0.7)])
def test_lengths_of_residual_sums_are_those_of_a_net(name, a):
    """One net of width 500,000: given x, the units of W x + b are independent normals of variance sw² mean(x²) + sb².

    So no W is drawn. Over seeds a length has a standard deviation of at most 0.45 %; the bound is 6 of them, and the seed
    is fixed. Without the product of the means the last length would be off by 30 % and more.
    """
    sw, sb, q1, n, rng = 1.1, 0.2, 1.0, 500_000, np.random.default_rng(0)
    x, lengths = numpy_phi(name, math.sqrt(q1) * rng.normal(size=n))[0], [q1]
    for _ in range(4):
        lengths.append(sw**2 * np.mean(x**2) + sb**2)
        x = x + a * numpy_phi(name, math.sqrt(lengths[-1]) * rng.normal(size=n))[0]
    p = meanfield.predict(5, activation=name, sigma_w=sw, sigma_b=sb, residual=a, q0=q1)
    np.testing.assert_allclose(lengths, p.q, rtol=0.027)


@pytest.mark.parametrize("batch", [4, 5, 32])
@pytest.mark.parametrize("name", ["identity", "relu"])
def test_batch_norm_divides_the_first_layer_by_its_own_variance(name, batch):
    """Its rate is that of the others times their variance over the batch, and by `q0`, its own.

    Theirs is sigma_w² E[variance of phi(y) over the batch], y being uniform on the sphere of vectors of mean 0 and mean
    square 1: for a linear net sigma_w². 400,000 normals: for ReLU a standard error of 0.17 %, and a bound of 6 of them. (1 - 1/B) is 0.75 to 0.97.
    """
    y = np.random.default_rng(0).normal(size=(400_000 // batch, batch))
    y -= y.mean(axis=1, keepdims=True)
    y /= np.sqrt(np.mean(y**2, axis=1, keepdims=True))
    variance = np.mean(np.var(np.maximum(y, 0) if name == "relu" else y, axis=1))
    p = meanfield.predict(3, activation=name, sigma_w=1.7, sigma_b=0.3, norm="batch_norm", batch=batch, q0=2.5)
    assert p.chi[0] / p.chi[1] == pytest.approx(1.7**2 * variance / 2.5, rel=1e-9 if name == "identity" else 0.0102)
    if name == "identity":
        assert p.chi[0] == pytest.approx((batch - 2) / (batch - 3) * 1.7**2 / 2.5, rel=1e-9)


# Values: the critical line --------------------------------------------------------------------------------------------


def test_critical_tanh_and_relu():
    assert meanfield.critical("tanh", math.sqrt(0.05)) ** 2 == pytest.approx(1.76095464, rel=1e-8)
    assert meanfield.critical("tanh", 0.0) == 1.0
    assert meanfield.critical("relu", 0.0) == pytest.approx(math.sqrt(2), rel=1e-14)
    assert meanfield.critical("erf", 0.0) == pytest.approx(math.sqrt(math.pi) / 2, rel=1e-12)


@pytest.mark.parametrize(
    "name, sigma_b",
    [
        *[("sigmoid", 0.0), ("sigmoid", 1.0), ("tanh", 1e-3), ("tanh", 20.0), ("erf", 0.5), ("elu", 0.2)],
        *[("selu", 0.3), ("gelu", 1.0), ("silu", 1.0), ("leaky_relu", 0.0), ("identity", 0.0)],
    ],
)
def test_chi_is_one_on_the_critical_line_and_crosses_there(name, sigma_b):
    sigma_w = meanfield.critical(name, sigma_b)
    point = meanfield.fixed_point(name, sigma_w, sigma_b)
    assert point.chi == pytest.approx(1, abs=1e-9) and math.isfinite(point.q)
    assert meanfield.fixed_point(name, 0.999 * sigma_w, sigma_b).chi < 1
    assert meanfield.fixed_point(name, 1.001 * sigma_w, sigma_b).chi > 1


@pytest.mark.parametrize("name, sigma_b", [("gelu", 0.4158), ("gelu", 0.3), ("silu", 0.4)])
def test_a_critical_length_that_the_start_does_not_lead_to_is_named_and_found_from_another(name, sigma_b):
    with pytest.raises(
        ValueError, match=rf"chi = 1; for {name} .* from q0 = 1.0 the map goes to .*; pass q0="
    ) as error:
        meanfield.critical(name, sigma_b)
    root = float(str(error.value).rpartition("q0=")[2])
    assert f"goes to {meanfield.fixed_point(name, meanfield.critical(name, sigma_b, q0=root), sigma_b).q:.6g}" in str(
        error.value
    )
    sigma_w = meanfield.critical(name, sigma_b, q0=1.0003 * root)
    assert meanfield.length_map(name, root, sigma_w, sigma_b) == pytest.approx(root, rel=1e-9)
    point = meanfield.fixed_point(name, sigma_w, sigma_b, q0=root)
    assert point.q == pytest.approx(root, rel=1e-9) and point.chi == pytest.approx(1, abs=1e-9)
    # E[phi'²] by a plain sum, independent of the library's quadrature.
    z = np.linspace(-12, 12, 20001)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    assert sigma_w**2 * weights @ numpy_phi(name, math.sqrt(root) * z)[1] ** 2 == pytest.approx(1, rel=1e-8)
    if (name, sigma_b) == ("gelu", 0.4158):
        assert root == pytest.approx(3.5616, abs=2e-3)


def test_a_start_chooses_among_fixed_points():
    """GELU at sigma_w = 1.40822, sigma_b = 0.4158: the map's gain q' - q is +, 0, -, 0, + 0, - as q grows."""
    sigma_w = meanfield.critical("gelu", 0.4158, q0=3.5616)
    ends = [meanfield.fixed_point("gelu", sigma_w, 0.4158, q0=start).q for start in (0.0, 1.0, 3.5, 3.57, 20.0)]
    for end in ends:
        assert meanfield.length_map("gelu", end, sigma_w, 0.4158) == pytest.approx(end, rel=1e-10)
    assert ends[0] == pytest.approx(ends[1]) and ends[1] == pytest.approx(ends[2], rel=1e-6)
    assert ends[3] == pytest.approx(ends[4], rel=1e-6) and ends[2] < 3.56 < ends[3]
    relu = meanfield.fixed_point("relu", math.sqrt(2), 0.0, q0=7.0)
    assert relu.q == 7 and relu.chi == pytest.approx(1) and meanfield.critical("relu", 0.0, q0=7.0) == math.sqrt(2)
    near = meanfield.depth_scales("gelu", sigma_w, 0.4158, q0=20.0)
    assert near.grad == meanfield.fixed_point("gelu", sigma_w, 0.4158, q0=20.0).xi_grad


def test_sigmoid_critical_by_a_fine_grid():
    """Saturating, q* = 45: a 100-node Gauss-Hermite rule puts sigma_w² 11 % off."""
    sigma_w = meanfield.critical("sigmoid", 0.0)
    z = np.linspace(-10, 10, 8001)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    q = 1.0
    for _ in range(100):
        q = sigma_w**2 * weights @ numpy_phi("sigmoid", math.sqrt(q) * z)[0] ** 2
    assert sigma_w**2 * weights @ numpy_phi("sigmoid", math.sqrt(q) * z)[1] ** 2 == pytest.approx(1, rel=1e-8)


# Values: batch norm ---------------------------------------------------------------------------------------------------


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


# Values: residual nets, finite width ----------------------------------------------------------------------------------


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


# Edges ----------------------------------------------------------------------------------------------------------------


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
    gaussian.moments.cache_clear()
    gaussian._table.cache_clear()
    assert jax.jit(lambda x: x * meanfield.fixed_point("tanh", 1.5, 0.3).chi)(1.0) == pytest.approx(chi, rel=1e-6)


# Errors ---------------------------------------------------------------------------------------------------------------


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
            "kink away from 0",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
