"""Initialisers: mean, variance, kurtosis and bounds against the distribution that the name promises.

The keys are fixed, so that the tests are deterministic; the chances below are those of a failure with another key.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn.layers import initializers

SHAPES = {"dense": (400, 500), "conv": (3, 3, 96, 192)}
FANS = {"dense": (400, 500), "conv": (9 * 96, 9 * 192)}
VARIANCE = {
    "he": lambda fan_in, fan_out: 2 / fan_in,
    "glorot": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "lecun": lambda fan_in, fan_out: 1 / fan_in,
}
KURTOSIS = {"normal": 3.0, "truncated_normal": 2.365537, "uniform": 1.8}
# A standard normal cut at ±2 has this standard deviation.
CUT_STD = 0.8796256610342398
# Fans do not depend on the distribution: the convolution kernel is drawn for one of them, to compile less.
SAMPLES = [
    *((family, distribution, "dense") for family in VARIANCE for distribution in KURTOSIS),
    *((family, "normal", "conv") for family in VARIANCE),
]
samples = pytest.mark.parametrize("family, distribution, kind", SAMPLES)
# XLA's own generator: it compiles in a third of threefry's time, and the initialisers only pass the key on.
make_key = functools.partial(jax.random.key, impl="rbg")
SHAPE = (3, 2, 4)
"""Of every small draw: each further shape costs a compilation."""


@functools.cache
def drawn():
    """One sample of every named kernel initialiser (eager, so that they share the compiled draws)."""
    return {
        (family, distribution, kind): np.asarray(
            initializers.get(f"{family}_{distribution}")(make_key(seed), SHAPES[kind]), np.float64
        )
        for seed, (family, distribution, kind) in enumerate(SAMPLES, 100)
    }


def assert_moments(sample, variance, kurtosis):
    """Check mean, variance and kurtosis, each within 6 standard errors (two-sided normal tail: 2e-9 each).

    n is at least 100,000, where all three are normal to good approximation. Standard errors: mean sd/sqrt(n), variance
    var·sqrt((kurtosis - 1)/n), kurtosis at most sqrt(24/n), its value for a normal, the largest of the three. At
    n = 165,888 six of the latter are 0.072, an eighth of the smallest distance between two of the distributions.
    """
    n = sample.size
    assert n >= 100_000
    mean, centred = sample.mean(), sample - sample.mean()
    assert abs(mean) < 6 * math.sqrt(variance / n)
    assert abs((centred**2).mean() / variance - 1) < 6 * math.sqrt((kurtosis - 1) / n)
    assert abs((centred**4).mean() / (centred**2).mean() ** 2 - kurtosis) < 6 * math.sqrt(24 / n)


def test_the_kurtosis_of_a_normal_cut_at_two_standard_deviations():
    z = np.linspace(-2, 2, 400_001)
    density = np.exp(-(z**2) / 2)
    second, fourth = ((density * z**k).sum() / density.sum() for k in (2, 4))
    assert math.sqrt(second) == pytest.approx(CUT_STD, abs=1e-5)
    assert fourth / second**2 == pytest.approx(KURTOSIS["truncated_normal"], abs=1e-4)


@samples
def test_mean_variance_and_kurtosis(family, distribution, kind):
    """n = 200,000 (dense), 165,888 (conv); 3 statistics at 6 standard errors: fails by chance in 6e-9 of the keys."""
    sample = drawn()[family, distribution, kind]
    assert sample.shape == SHAPES[kind]
    assert_moments(sample, VARIANCE[family](*FANS[kind]), KURTOSIS[distribution])


@samples
def test_bounds(family, distribution, kind):
    """The range is that of the distribution, and is filled.

    n >= 165,888. The outermost 1 % of the range, on both sides, holds 1 % of a uniform and 0.2 % of a cut normal: that
    it stays empty on a side has chance exp(-166). A normal stays below 3.5 with chance exp(-77).
    """
    sample = drawn()[family, distribution, kind]
    std = math.sqrt(VARIANCE[family](*FANS[kind]))
    bound = {"normal": math.inf, "truncated_normal": 2 / CUT_STD, "uniform": math.sqrt(3)}[distribution]
    reach = {"normal": 3.5, "truncated_normal": 0.99 * bound, "uniform": 0.99 * bound}[distribution]
    assert np.abs(sample).max() <= bound * std * (1 + 1e-5)  # float32
    assert sample.max() > reach * std and sample.min() < -reach * std


def test_scaled_and_normal_are_true_normals_of_the_variance_they_name():
    """n = 165,888 and 200,000, 6 standard errors of 6 statistics: fails by chance in 2e-8 of the keys."""

    a, b, c = (make_key(seed) for seed in (3, 4, 5))
    conv = np.asarray(initializers.scaled(1.5)(a, SHAPES["conv"]), np.float64)
    bias = np.asarray(initializers.normal(0.3)(b, (200_000,)), np.float64)
    dense = np.asarray(initializers.get("scaled(2.0)")(c, SHAPES["dense"]), np.float64)
    assert_moments(conv, 1.5**2 / (9 * 96), 3)
    assert_moments(bias, 0.3**2, 3)
    assert_moments(dense, 4 / 400, 3)


@functools.cache
def orthogonals():
    shapes = {"square": (4, 4), "tall": SHAPE, "wide": (2, 2, 6)}
    return {name: initializers.orthogonal(1.5)(make_key(5), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["square", "tall", "wide"])
def test_orthogonal_has_orthonormal_rows_or_columns(name):
    q = np.asarray(orthogonals()[name], np.float64) / 1.5
    q = q.reshape(-1, q.shape[-1])  # all axes but the last are input
    gram = q.T @ q if q.shape[0] >= q.shape[1] else q @ q.T
    np.testing.assert_allclose(gram, np.eye(min(q.shape)), atol=2e-6)


def test_orthogonal_is_uniform():
    """Without the sign fix the first entry of Q has mean -0.64 for 2×2 matrices.

    n = 4,000 keys; every entry is the cosine of a uniform angle, mean 0, standard deviation sqrt(½); 6 standard errors
    are 0.067: four entries fail by chance in 8e-9 of the keys.
    """
    draw = jax.jit(jax.vmap(lambda key: initializers.orthogonal()(key, (2, 2))))
    q = np.asarray(draw(jax.random.split(make_key(8), 4000)), np.float64)
    assert np.abs(q.mean(axis=0)).max() < 6 * math.sqrt(0.5 / 4000)
    # half of them are reflections: n = 4,000, 6 standard errors
    assert abs((np.linalg.det(q) > 0).mean() - 0.5) < 6 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 5, 4, 4), (3, 1, 3, 3, 4)])
def test_delta_orthogonal_is_an_orthogonal_map_at_the_centre_and_zero_elsewhere(shape):
    kernel = np.array(initializers.delta_orthogonal(2.0)(make_key(1), shape), np.float64)
    centre = tuple(k // 2 for k in shape[:-2])
    matrix = kernel[centre] / 2.0
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(shape[-2]), atol=2e-6)
    kernel[centre] = 0
    assert not kernel.any()


def test_fills():
    key, shape = make_key(0), (2, 3)
    np.testing.assert_array_equal(initializers.zeros(key, shape), np.zeros(shape))
    np.testing.assert_array_equal(initializers.get("ones")(key, shape), np.ones(shape))
    np.testing.assert_array_equal(initializers.constant(-0.25)(key, shape), np.full(shape, -0.25))
    np.testing.assert_array_equal(initializers.get("constant(-0.5)")(key, (4,)), np.full(4, -0.5))
    np.testing.assert_array_equal(initializers.get("constant")(key, (4,)), np.zeros(4))


def test_get_by_name_equals_the_function():
    pairs = [
        ("normal(0.1)", initializers.normal(0.1)),
        (" normal( 1e-1 ) ", initializers.normal(0.1)),
        ("normal", initializers.normal()),
        ("normal()", initializers.normal()),
        ("scaled", initializers.scaled(1.0)),
        ("scaled(1.3)", initializers.scaled(1.3)),
        ("orthogonal", initializers.orthogonal(1.0)),
        ("orthogonal(0.5)", initializers.orthogonal(0.5)),
        ("he_normal", initializers.he_normal),
        ("glorot_uniform()", initializers.glorot_uniform),
        ("lecun_truncated_normal", initializers.lecun_truncated_normal),
    ]
    key = make_key(2)
    for name, f in pairs:
        np.testing.assert_array_equal(initializers.get(name)(key, SHAPE), f(key, SHAPE), err_msg=name)
    # the default standard deviation of normal is 0.01
    z = jax.random.normal(key, SHAPE)
    np.testing.assert_allclose(initializers.get("normal")(key, SHAPE), 0.01 * z, rtol=1e-6)


def test_get_passes_functions_through():
    def mine(key, shape, dtype):
        return jnp.full(shape, 7.0, dtype)

    assert initializers.get(mine) is mine
    assert initializers.get(initializers.he_normal) is initializers.he_normal


@pytest.mark.parametrize("name", initializers.NAMES)
def test_the_same_key_draws_the_same_array_in_the_dtype_asked_for(name):
    init = initializers.get(name)

    key = make_key(4)
    a, again, other = init(key, SHAPE), init(key, SHAPE), init(make_key(5), SHAPE)
    np.testing.assert_array_equal(a, again)
    fixed = name in ("zeros", "ones", "constant")
    assert (np.asarray(a) == np.asarray(other)).all() == fixed
    assert a.shape == SHAPE and a.dtype == jnp.float32
    for dtype in (jnp.bfloat16, jnp.float32) if "orthogonal" not in name else (jnp.float32,):
        assert jax.eval_shape(lambda dtype=dtype: init(make_key(0), SHAPE, dtype)).dtype == dtype


def test_a_traced_scale_under_jit_and_vmap_equals_a_loop():
    names, key, sigmas = (
        ["normal", "scaled", "orthogonal", "delta_orthogonal", "constant"],
        make_key(6),
        [0.5, 2.5],
    )

    def draw(sigma):
        return {name: getattr(initializers, name)(sigma)(key, SHAPE) for name in names}

    mapped = jax.jit(jax.vmap(draw))(jnp.array(sigmas))
    for i, sigma in enumerate(sigmas):
        for name, wanted in draw(sigma).items():
            np.testing.assert_allclose(mapped[name][i], wanted, rtol=1e-6, err_msg=name)
    for name in names:
        np.testing.assert_allclose(mapped[name][1], 5 * mapped[name][0], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda key: initializers.get("he_normall"),
            "initializers: unknown initializer 'he_normall'; did you mean 'he_n",
        ),
        (lambda key: initializers.get("glorot_unifrom"), "did you mean 'glorot_uniform'"),
        (lambda key: initializers.get("qqq"), "choose one of zeros, ones, he_normal"),
        (lambda key: initializers.get("he_normal(3)"), "he_normal takes no argument, got 'he_normal(3)'"),
        (lambda key: initializers.get("normal(x)"), "the argument of normal must be a number, got 'normal(x)'"),
        (lambda key: initializers.get("normal(0.1"), "unknown initializer 'normal(0.1'; did you mean 'normal'"),
        (lambda key: initializers.get("normal(-1)"), "normal: std must be finite and at least 0, got -1.0"),
        (lambda key: initializers.get("scaled(nan)"), "scaled: sigma_w must be finite and at least 0, got nan"),
        (lambda key: initializers.normal(-0.1), "normal: std must be finite and at least 0, got -0.1"),
        (lambda key: initializers.scaled(math.inf), "scaled: sigma_w must be finite and at least 0, got inf"),
        (lambda key: initializers.orthogonal(-1.0), "orthogonal: scale must be finite and at least 0, got -1.0"),
        (lambda key: initializers.delta_orthogonal(-1.0), "delta_orthogonal: scale must be finite"),
        (
            lambda key: initializers.he_normal(key, (3,)),
            "the shape must have an input and an output axis, got (3,); use normal(std)",
        ),
        (
            lambda key: initializers.glorot_uniform(key, ()),
            "the shape must have an input and an output axis, got (); use normal(std)",
        ),
        (
            lambda key: initializers.scaled()(key, (3,)),
            "scaled: the shape must have an input and an output axis, got (3,)",
        ),
        (
            lambda key: initializers.orthogonal()(key, (3,)),
            "orthogonal: the shape must have an input and an output axis, got (3,)",
        ),
        (lambda key: initializers.delta_orthogonal()(key, (3, 4, 2)), "with out >= in, got (3, 4, 2)"),
        (lambda key: initializers.delta_orthogonal()(key, (4, 4)), "of 3 to 5 axes with out >= in, got (4, 4)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call(make_key(0))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["orthogonal(2)", "delta_orthogonal(2)"])
def test_orthogonal_weights_of_half_precision_are_those_of_float32_rounded(name):
    draw, shape = initializers.get(name), (3, 4, 6)
    for dtype in (jnp.bfloat16, jnp.float16):
        got = draw(make_key(0), shape, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, draw(make_key(0), shape).astype(dtype))
