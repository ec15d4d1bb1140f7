"""Mean field: published numbers, closed forms, then edges and errors. Simulations have fixed seeds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn.layers import activations
from fnn.theory import meanfield

NAMES = [name for name, phi in activations.TABLE.items() if phi.elementwise]
SMOOTH = ["sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softplus", "erf"]


def k1(c):
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


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


# Values: residual nets, finite width ----------------------------------------------------------------------------------


# Edges ----------------------------------------------------------------------------------------------------------------


# Errors ---------------------------------------------------------------------------------------------------------------


def test_an_activation_with_a_jump_has_lengths_and_no_correlations():
    """x where x > 1: E[phi²] = q P((h/sqrt q)² counted beyond 1/sqrt q), and no derivative knows of the jump."""

    def phi(x):
        return jnp.where(x > 1, x, 0.0)

    def second(q):
        z = 1 / math.sqrt(q)
        return q * (z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) + 0.5 * math.erfc(z / math.sqrt(2)))

    for q in (0.3, 1.0, 4.0):
        found = meanfield.moments(phi, q)
        assert found.second == pytest.approx(second(q), rel=1e-7)
        assert found.slope == pytest.approx((second(q + 1e-4) - second(q - 1e-4)) / 2e-4, rel=1e-5)
    for call in (
        lambda: meanfield.fixed_point(phi, 1.0, 0.5),
        lambda: meanfield.predict(6, activation=phi, sigma_w=1.2, sigma_b=0.5, width=200, q0=1.0),
    ):
        with pytest.raises(ArithmeticError, match="needs a continuous activation, got a jump of"):
            call()
    assert np.isfinite(meanfield.predict(6, activation=phi, sigma_w=1.2, sigma_b=0.5, q0=1.0).q).all()
