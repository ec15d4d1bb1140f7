"""Activations: values, derivatives and Gaussian moments against closed forms in NumPy and SciPy, in float64."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import special

from fnn.layers import activations
from fnn.theory import meanfield

pytestmark = pytest.mark.usefixtures("optimised")

PHI = special.ndtr
DENSITY = math.sqrt(2 * math.pi)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
GELU_C = math.sqrt(2 / math.pi)


def gelu_tanh_inner(x):
    x = np.clip(x, -100, 100)
    return GELU_C * (x + 0.044715 * x**3), GELU_C * (1 + 3 * 0.044715 * x**2)


def gelu_tanh(x):
    # ½(1 + tanh u) = sigmoid(2u), which does not cancel
    return x * special.expit(2 * gelu_tanh_inner(x)[0])


def gelu_tanh_slope(x):
    u, du = gelu_tanh_inner(x)
    s = special.expit(2 * u)
    return s + np.clip(x, -100, 100) * 2 * s * special.expit(-2 * u) * du


def elu(x, alpha=1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def elu_slope(x, alpha=1.0):
    return np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0)))


def expit_slope(x):
    return special.expit(x) * special.expit(-x)


# name: value and derivative as functions float64[n] -> float64[n]
CLOSED = {
    "identity": (lambda x: x, np.ones_like),
    "sigmoid": (special.expit, expit_slope),
    "tanh": (np.tanh, lambda x: 4 * expit_slope(2 * x)),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float)),
    "leaky_relu": (lambda x: np.where(x >= 0, x, 0.01 * x), lambda x: np.where(x >= 0, 1, 0.01)),
    "elu": (elu, elu_slope),
    "selu": (lambda x: SELU_SCALE * elu(x, SELU_ALPHA), lambda x: SELU_SCALE * elu_slope(x, SELU_ALPHA)),
    "gelu": (lambda x: x * PHI(x), lambda x: PHI(x) + x * np.exp(-(x**2) / 2) / DENSITY),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
    "silu": (lambda x: x * special.expit(x), lambda x: special.expit(x) + x * expit_slope(x)),
    "softplus": (lambda x: np.logaddexp(0, x), special.expit),
    "erf": (special.erf, lambda x: 2 / math.sqrt(math.pi) * np.exp(-(x**2))),
}
each = pytest.mark.parametrize("name", CLOSED)
MODERATE = np.concatenate([np.linspace(-6, 6, 49), [-30.0, -0.3, 1e-3, 30.0]])
EXTREME = np.array([-1e4, -100.0, 0.0, 100.0, 1e4])


@functools.cache
def computed(dtype):
    """Value, .derivative and autodiff of every activation on MODERATE, and on EXTREME: one compilation for a dtype."""
    with jax.enable_x64(dtype == "float64"):

        @jax.jit
        def run(x):
            return {
                name: (phi(x), phi.derivative(x), jax.vmap(jax.grad(phi))(x))
                for name, phi in activations.TABLE.items()
                if phi.elementwise
            }

        both = np.concatenate([MODERATE, EXTREME]).astype(dtype)
        return both, jax.device_get(run(jnp.asarray(both)))


def test_the_table_and_these_closed_forms_cover_one_another():
    assert set(activations.TABLE) == {*CLOSED, "softmax"}
    assert all(activations.get(name) is phi and phi.name == name for name, phi in activations.TABLE.items())


@each
def test_value_and_derivative_equal_closed_forms(name):
    x, results = computed("float64")
    value, slope, autodiff = results[name]
    f, df = CLOSED[name]
    # 1e-14: where a result of order one is a difference (tanh form of gelu), the last bits are relative to the terms
    np.testing.assert_allclose(value, f(x), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(slope, df(x), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(autodiff, slope, rtol=1e-10, atol=1e-14)
    assert value.dtype == slope.dtype == autodiff.dtype == np.float64


@each
@pytest.mark.parametrize("dtype, bound", [("float32", 3e-6), ("bfloat16", 0.03)])
def test_low_precision_stays_right_and_finite_up_to_1e4_and_keeps_the_dtype(name, dtype, bound):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x, results = computed(dtype)
    exact = x.astype(np.float64)  # the numbers that were rounded into this dtype
    extreme = np.isin(np.abs(exact), np.abs(EXTREME.astype(dtype).astype(np.float64)))
    assert extreme.sum() >= 5
    for got, closed in zip(results[name], (CLOSED[name][0], *[CLOSED[name][1]] * 2), strict=True):
        assert got.dtype == dtype
        assert np.all(np.isfinite(got))
        wanted, got = closed(exact), got.astype(np.float64)
        np.testing.assert_allclose(got, wanted, rtol=bound, atol=bound)
        # far out nothing but the asymptote is left: no error of a cancelled term may remain
        np.testing.assert_allclose(
            got[extreme], wanted[extreme], rtol=2 * float(ml_dtypes.finfo(dtype).eps), atol=1e-30
        )


def test_nan_passes_through():
    def values(x):
        return {name: phi(x) for name, phi in activations.TABLE.items()}

    for name, y in jax.jit(values)(jnp.array([jnp.nan, 1.0])).items():
        assert np.isnan(y[0]), name
        # softmax normalises over the axis, so that one NaN reaches every class
        assert np.isnan(y[1]) == (name == "softmax"), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_relu_of_half_precision_goes_through_float32_and_rounds_nothing(dtype):
    """All numbers that CPUs do not take for zero, with infinities and NaN, inside a program."""
    (largest,) = re.findall(r":(\w+)\[8\] = max", str(jax.make_jaxpr(activations.relu)(jnp.zeros(8, dtype))))
    assert largest == "f32"
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    wide = x.astype(np.float32)
    x = x[~(np.abs(wide) < 2.0**-126) | (wide == 0)]
    y, slope = jax.jit(lambda x: jax.jvp(activations.relu, (x,), (jnp.ones_like(x),)))(x)
    assert y.dtype == slope.dtype == x.dtype
    wide = x.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.maximum(wide, 0))
    np.testing.assert_array_equal(np.asarray(slope, np.float32), wide > 0)


@pytest.mark.parametrize("at_zero", [None, 0.5, 1, -3])
def test_relu_has_the_derivative_at_zero_that_it_is_told(at_zero):
    options = {} if at_zero is None else {"grad_at_zero": at_zero}
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    wanted = [0, at_zero or 0, at_zero or 0, 1]
    bound = activations.relu.bind(**options)

    @jax.jit
    def run(x):
        def phi(v):
            return activations.relu(v, **options)

        forward = jax.jvp(phi, (x,), (2 * jnp.ones_like(x),))[1]
        return (
            phi(x),
            jax.vmap(jax.grad(phi))(x),
            forward / 2,
            activations.relu.derivative(x, **options),
            (
                bound(x),
                jax.vmap(jax.grad(bound))(x),
                bound.derivative(x),
            ),
        )

    value, reverse, forward, slope, (bound_value, bound_reverse, bound_slope) = run(x)
    for got in (value, bound_value):
        np.testing.assert_array_equal(got, [0, 0, 0, 3])
    for got in (reverse, forward, slope, bound_reverse, bound_slope):
        np.testing.assert_array_equal(got, wanted)


def test_options_of_leaky_relu_and_elu(x64):
    x = np.linspace(-3, 3, 13)
    leaky, steep = activations.leaky_relu.bind(slope=0.2), activations.elu.bind(alpha=2.5)
    run = jax.jit(lambda x: [f(x) for phi in (leaky, steep) for f in (phi, phi.derivative, jax.vmap(jax.grad(phi)))])
    got = run(jnp.asarray(x))
    slopes = np.where(x >= 0, 1, 0.2), elu_slope(x, 2.5)
    wanted = [np.where(x >= 0, x, 0.2 * x), slopes[0], slopes[0], elu(x, 2.5), slopes[1], slopes[1]]
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert leaky.bind(slope=0.3)(jnp.float64(-1.0)) == -0.3  # the last word wins


def test_softmax_and_its_jacobian(x64):
    x = np.array([[0.3, -1.2, 2.0, 0.0], [5.0, 5.0, -40.0, 1.0]])
    p = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    jacobian = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    phi = activations.softmax
    value, slope, autodiff = jax.jit(lambda x: (phi(x), phi.derivative(x), jax.vmap(jax.jacrev(phi))(x)))(x)
    np.testing.assert_allclose(value, p, rtol=1e-12)
    np.testing.assert_allclose(slope, jacobian, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(autodiff, jacobian, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_is_finite_at_extreme_inputs(dtype):
    phi = activations.softmax
    x = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 100.0, 100.0]], dtype)
    value, slope, autodiff = jax.jit(lambda x: (phi(x), phi.derivative(x), jax.vmap(jax.jacrev(phi))(x)))(x)
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(value.astype("float32"), [[1, 0, 0], [1 / 3] * 3, [0, 0.5, 0.5]], atol=eps)
    half, third = np.array([[0, 0, 0], [0, 1, -1], [0, -1, 1]]) / 4, np.eye(3) / 3 - 1 / 9
    for got in (slope, autodiff):
        np.testing.assert_allclose(got.astype("float32"), [np.zeros((3, 3)), third, half], atol=eps)
    assert value.dtype == slope.dtype == autodiff.dtype == x.dtype


def relu_moments(q, slope=0.0):
    return (1 - slope) * math.sqrt(q / (2 * math.pi)), (1 + slope**2) * q / 2, (1 + slope**2) / 2


def erf_moments(q):
    # Williams 1997: E[erf(u)²] = 2/pi·arcsin(2q/(1 + 2q)) = 4/pi·arctan(sqrt(1 + 4q)) - 1
    second = 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
    assert second == pytest.approx(4 / math.pi * math.atan(math.sqrt(1 + 4 * q)) - 1, rel=1e-10)
    return 0.0, second, 4 / math.pi / math.sqrt(1 + 4 * q)


def elu_moments(q, alpha=1.0, scale=1.0):
    # E[e^(kh); h < 0] = e^(k²q/2) Phi(-k sqrt q) = ½ erfcx(k sqrt(q/2)), the scaled complementary error function
    one, two = (special.erfcx(k * math.sqrt(q / 2)) / 2 for k in (1, 2))
    mean = math.sqrt(q / (2 * math.pi)) + alpha * (one - 0.5)
    second = q / 2 + alpha**2 * (two - 2 * one + 0.5)
    return scale * mean, scale**2 * second, scale**2 * (0.5 + alpha**2 * two)


CLOSED_MOMENTS = {
    "identity": lambda q: (0.0, q, 1.0),
    "relu": relu_moments,
    "leaky_relu": lambda q: relu_moments(q, 0.01),
    "erf": erf_moments,
    "elu": elu_moments,
    "selu": lambda q: elu_moments(q, SELU_ALPHA, SELU_SCALE),
}


@functools.cache
def moments(name, q):
    return meanfield.moments(name, q)


@pytest.mark.parametrize("name", CLOSED_MOMENTS)
@pytest.mark.parametrize("q", [0.01, 1.0, 200.0])
def test_moments_equal_closed_forms(name, q):
    np.testing.assert_allclose(moments(name, q)[:3], CLOSED_MOMENTS[name](q), rtol=1e-9, atol=1e-13)


def test_moments_follow_bound_options():
    leaky, elu = activations.leaky_relu.bind(slope=0.5), activations.elu.bind(alpha=2.0)
    np.testing.assert_allclose(meanfield.moments(leaky, 2.0)[:3], relu_moments(2.0, 0.5), rtol=1e-9)
    np.testing.assert_allclose(meanfield.moments(elu, 0.7)[:3], elu_moments(0.7, 2.0), rtol=1e-9)


def test_moments_of_symmetric_functions_are_known_in_part():
    for q in (0.01, 1.0, 200.0):
        assert moments("sigmoid", q).mean == pytest.approx(0.5, rel=1e-12)
        assert moments("tanh", q).mean == pytest.approx(0, abs=1e-13)
        # Stein's lemma: E[h Phi(h)] = q E[density(h)]
        assert moments("gelu", q).mean == pytest.approx(q / math.sqrt(2 * math.pi * (1 + q)), rel=1e-9)
        assert moments("softplus", q).derivative == pytest.approx(moments("sigmoid", q).second, rel=1e-9)


@each
def test_moments_at_q_zero_are_the_limit(name):
    f, df = (g(np.array([-1e-12, 1e-12])) for g in CLOSED[name])  # from both sides of a kink
    wanted = [np.mean(f), np.mean(f) ** 2, np.mean(df**2)]
    np.testing.assert_allclose(moments(name, 0)[:3], wanted, rtol=1e-9, atol=1e-11)


def test_moments_are_float64_inside_jit_and_whatever_the_default_is():
    def inside(x):
        assert meanfield.moments("tanh", 1.0) == moments("tanh", 1.0)
        return x

    jax.jit(inside)(1.0)
    assert all(type(m) is float for m in moments("tanh", 1.0))


def test_bounds_are_the_asymptotes():
    for phi in activations.TABLE.values():
        if phi.elementwise:
            far = CLOSED[phi.name][0](np.array([-1e6, 1e6]))
            for value, bound in zip(far, phi.bounds, strict=True):
                if math.isfinite(bound):
                    assert value == pytest.approx(bound, abs=1e-12), phi.name
    assert activations.elu.bind(alpha=3.0).bounds == (-math.inf, math.inf)
    assert activations.tanh.bounds == (-1, 1)


def test_a_plain_function_gets_a_name_a_derivative_and_moments(x64):
    def cubic(x, a=1.0):
        return a * x**3

    phi = activations.get(cubic)
    x = jnp.array([[0.5, -2.0], [1.0, 0.0]])
    np.testing.assert_allclose(phi(x), np.asarray(x) ** 3)
    np.testing.assert_allclose(phi.derivative(x), 3 * np.asarray(x) ** 2)
    # E[h^6] = 15 q³, E[9 h^4] = 27 q²
    np.testing.assert_allclose(meanfield.moments(phi, 2.0)[:3], [0, 15 * 8, 27 * 4], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(phi.bind(a=2.0).derivative(x), 6 * np.asarray(x) ** 2)
    assert repr(phi) == "Activation(cubic)"
    assert activations.get(phi) is phi and phi.bind() is phi


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: meanfield.moments("relu", -1.0), "moments: q must be at least 0 and finite, got -1.0"),
        (lambda: meanfield.moments("relu", math.nan), "moments: q must be at least 0 and finite, got nan"),
        (lambda: meanfield.moments("softmax", 1.0), "moments: mean-field theory needs an elementwise activation"),
        (lambda: activations.get("rellu"), "activations: unknown activation 'rellu'; did you mean 'relu'"),
        (lambda: activations.get("sigmiod"), "did you mean 'sigmoid'"),
        (lambda: activations.get("qqq"), "choose one of identity, sigmoid, tanh"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("name", activations.TABLE)
def test_an_unknown_option_is_a_type_error(name):
    phi = activations.TABLE[name]
    for call in (phi, phi.derivative):
        with pytest.raises(TypeError, match="grad_at_zer"):
            call(1.0, grad_at_zerro=1)
    with pytest.raises(TypeError, match="grad_at_zer"):
        phi.bind(grad_at_zerro=1)


@pytest.mark.parametrize(
    "phi", [lambda x: 1 / x**2, lambda x: jnp.abs(x) ** 0.5, jnp.log], ids=["1/x²", "sqrt|x|", "log"]
)
def test_moments_refuse_a_function_whose_means_do_not_exist(phi):
    """Of sqrt|x| the derivative has no mean square; log has no value below 0."""
    with pytest.raises(ArithmeticError, match=r"meanfield: E\[phi²\] and E\[phi'²\] must be finite"):
        meanfield.moments(phi, 1.0)
