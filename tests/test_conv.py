"""Convolutions and pools: the same weights in Flax and PyTorch, sums by hand, and refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, assert_same, started

import fnn
from fnn import lowering, models

CASES = [
    # rank, window, stride, dilation, groups, padding, Flax's padding
    (1, 3, 1, 2, 1, "same", "SAME"),
    (2, (3, 2), (2, 1), 1, 2, "same", "SAME"),
    (2, 3, 2, 1, 4, ((0, 1), (2, 0)), ((0, 1), (2, 0))),
    (2, 4, 1, 1, 1, "circular", "CIRCULAR"),
    (3, 2, 2, 1, 1, "valid", "VALID"),
    (3, 3, 1, 1, 2, 1, 1),
]
SIZES = (7, 6, 5)


def image(rank, channels=4, batch=2, seed=0):
    return as_jax(np.random.default_rng(seed).normal(size=(batch, *SIZES[:rank], channels)))


def each(value, rank):
    return (value,) * rank if isinstance(value, int) else value


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)], ids=["f32", "f64"])
def test_conv_equals_flax(case, dtype, tolerance):
    rank, window, stride, dilation, groups, padding, their_padding = case
    with jax.enable_x64(dtype == jnp.float64):
        x = image(rank).astype(dtype)
        options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
        layer = fnn.conv(8, window, **options)
        params = started(layer.init, x)[0]
        theirs = nn.Conv(
            8,
            each(window, rank),
            each(stride, rank),
            their_padding,
            kernel_dilation=each(dilation, rank),
            feature_group_count=groups,
            dtype=dtype,
        )

        @jax.jit
        def every(params, x):
            kinds = ("patches", "turned", "xla")
            ours = [fnn.conv(8, window, **options, implementation=kind).apply(params, (), x)[0] for kind in kinds]
            return theirs.apply({"params": params}, x), ours

        expected, ours = every(params, x)
        for y in ours:
            assert y.dtype == dtype and y.shape == expected.shape
            np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_implementations_have_the_same_derivatives(case, x64):
    """Forward, backward, and forward over backward; a transposed convolution too."""
    rank, window, stride, dilation, groups, padding, _ = case
    x = image(rank)
    for make in (
        lambda kind: fnn.conv(
            8, window, stride=stride, dilation=dilation, groups=groups, padding=padding, implementation=kind
        ),
        lambda kind: fnn.conv_transpose(3, window, stride=3, implementation=kind),
    ):
        params = started(make("xla").init, x)[0]

        def derivatives(kind, params, x, make=make):
            def loss(params, x):
                return jnp.sum(jnp.sin(make(kind).apply(params, (), x)[0]))

            gradient = jax.grad(loss, (0, 1))
            return jax.jvp(gradient, (params, x), jax.tree.map(jnp.cos, (params, x)))

        def every(params, x, derivatives=derivatives):
            return [derivatives(kind, params, x) for kind in ("xla", "patches", "turned")]

        theirs, *others = jax.jit(every)(params, x)
        for ours in others:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), ours, theirs)


@pytest.mark.skipif(lowering.platform() != "cpu", reason="elsewhere convolutions are XLA's")
def test_on_a_cpu_no_convolution_lies_otherwise_than_in_a_forward_pass(monkeypatch):
    """XLA's own gradients take 10 to 100 times as long inside a loop. Patches are made again in the backward pass."""

    def compiled(channels, stride=1, groups=1, layer=fnn.conv):
        options = {} if groups == 1 else {"groups": groups}
        net, x = layer(channels, 3, stride=stride, **options), jnp.ones((4, 8, 8, channels))
        if stride == groups == 1:
            net = fnn.repeat(fnn.serial(net, fnn.activation("tanh")), 20)
        params, state = net.init(jax.random.key(0), x)
        gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(net.apply(params, state, x)[0]), (0, 1)))
        return gradient.lower(params, x), x

    def layouts(*args, **kwargs):
        found = compiled(*args, **kwargs)[0].as_text().split("dim_numbers = ")[1:]
        return {text.split("{")[0].strip().split(", window")[0] for text in found}

    forward = {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    for channels in 16, 3:
        lowered, x = compiled(channels)
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 20 * 5 * x.nbytes
    assert layouts(16) == forward and not layouts(3)
    large = ({"channels": 16, "stride": 2}, {"channels": 16, "layer": fnn.conv_transpose, "stride": 2})
    grouped = {"channels": 16, "groups": 4}
    assert not any(layouts(**options) for options in (*large, grouped))
    monkeypatch.setattr(lowering, "PATCHES", 1000)
    assert all(layouts(**options) == forward for options in (*large, {"channels": 3}, {"channels": 16, "groups": 16}))
    assert not layouts(**grouped)  # patches of some examples at a time


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_patches_of_some_examples_at_a_time(case, monkeypatch):
    rank, window, stride, dilation, groups, padding, _ = case
    layer = fnn.conv(8, window, stride=stride, dilation=dilation, groups=groups, padding=padding)
    x = image(rank, batch=5)
    params = started(layer.init, x)[0]

    def gradient(params, x):  # a new program each time
        return jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(layer.apply(params, (), x)[0])), (0, 1)))(params, x)

    whole = gradient(params, x)
    monkeypatch.setattr(lowering, "PATCHES", 2100)
    assert "scan" in str(jax.make_jaxpr(layer.apply)(params, (), x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradient(params, x), whole)


@pytest.mark.parametrize(
    ("window", "stride", "padding", "their_padding"),
    [(3, 2, "same", "SAME"), ((2, 3), (3, 1), "valid", "VALID"), (3, 2, 1, ((1, 1), (1, 1)))],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)], ids=["f32", "f64"])
def test_conv_transpose_equals_flax(window, stride, padding, their_padding, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        x = image(2).astype(dtype)
        layer = fnn.conv_transpose(3, window, stride=stride, padding=padding)
        params = started(layer.init, x)[0]
        theirs = nn.ConvTranspose(3, each(window, 2), each(stride, 2), their_padding, dtype=dtype)
        both = jax.jit(lambda p, x: (layer.apply(p, (), x)[0], theirs.apply({"params": p}, x)))
        y, expected = both(params, x)
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)
        if padding == "same":
            assert y.shape == (2, 14, 12, 3)


@pytest.mark.parametrize(
    ("window", "stride", "padding", "their_padding"),
    [(2, None, "valid", "VALID"), (3, 2, "same", "SAME"), ((3, 2), (1, 2), ((1, 1), (0, 1)), ((1, 1), (0, 1)))],
)
def test_pools_equal_flax(window, stride, padding, their_padding):
    x = image(2)
    strides = each(window if stride is None else stride, 2)
    largest, _ = fnn.max_pool(window, stride=stride, padding=padding).apply((), (), x)
    mean, _ = fnn.avg_pool(window, stride=stride, padding=padding).apply((), (), x)
    np.testing.assert_array_equal(largest, nn.max_pool(x, each(window, 2), strides, their_padding))
    expected = nn.avg_pool(x, each(window, 2), strides, their_padding, count_include_pad=False)
    np.testing.assert_allclose(mean, expected, atol=1e-6)


@pytest.mark.parametrize("window", [2, (1, 3), (3, 2), 5])
def test_the_largest_number_of_windows_side_by_side(window):
    """As a window's reduction has it: the first of equals takes the gradient, NaN wins, what does not fill a window is cut."""
    x = as_jax(np.random.default_rng(0).integers(-2, 2, (3, 11, 7, 2)), jnp.float32)  # three in four windows tie
    shape = tuple(n // w for n, w in zip(x.shape[1:3], each(window, 2), strict=True))
    dy = as_jax(np.random.default_rng(1).normal(size=(3, *shape, 2)), jnp.float32)
    pools = [lambda x: fnn.max_pool(window).apply((), (), x)[0], lambda x: nn.max_pool(x, *[each(window, 2)] * 2)]

    @jax.jit
    def both(x):
        values, pulls = zip(*(jax.vjp(pool, x) for pool in pools), strict=True)
        return values, [pull(dy) for pull in pulls]

    values, slopes = both(x)
    np.testing.assert_array_equal(*values)
    np.testing.assert_array_equal(*slopes)
    broken = np.array(x)
    broken[0, 0, 0, 0] = broken[1, 1, 0, 1] = np.nan
    values, _ = both(broken)
    assert np.isnan(values[0]).any()
    np.testing.assert_array_equal(*values)


def test_conv_and_transpose_by_hand():
    x = jnp.arange(1.0, 6)[None, :, None]
    kernel = jnp.array([1.0, 10, 100])[:, None, None]
    y, _ = fnn.conv(1, 3, bias=False).apply({"kernel": kernel}, (), x)
    # A cross-correlation: the kernel's first number meets the position before.
    assert_same(y[0, :, 0], np.float32([210, 321, 432, 543, 54]))
    up, _ = fnn.conv_transpose(1, 2, stride=2, bias=False).apply({"kernel": kernel[:2]}, (), x[:, :2])
    assert_same(up[0, :, 0], np.float32([10, 1, 20, 2]))  # of what lies before, at 1; of itself, at 10


def test_conv_equals_pytorch():
    torch = pytest.importorskip("torch")
    x = image(2).astype(jnp.float32)
    layer = fnn.conv(6, 3, stride=2, groups=2, padding=1, dilation=2)
    params = started(layer.init, x)[0]
    y, _ = layer.apply(params, (), x)
    weight = torch.tensor(np.array(params["kernel"]).transpose(3, 2, 0, 1))
    theirs = torch.nn.functional.conv2d(
        torch.tensor(np.array(x).transpose(0, 3, 1, 2)),
        weight,
        torch.tensor(np.array(params["bias"])),
        stride=2,
        padding=1,
        dilation=2,
        groups=2,
    )
    np.testing.assert_allclose(y, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_global_average_counts_real_positions_alone():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    y, _ = fnn.global_avg_pool().apply((), (), fnn.Masked.of_lengths(x, jnp.array([2, 3])))
    np.testing.assert_allclose(y, [[1, 2], [8, 9]])
    empty, _ = fnn.global_avg_pool().apply((), (), fnn.Masked(x, jnp.zeros((2, 3), bool)))
    np.testing.assert_array_equal(empty, 0)
    np.testing.assert_array_equal(fnn.global_avg_pool().apply((), (), jnp.zeros((2, 3, 0, 4)))[0], np.zeros((2, 4)))


@pytest.mark.parametrize("padding", ["same", "circular", "valid"])
def test_a_window_does_not_fit_into_inputs_of_length_0(padding):
    layer, kernel = fnn.conv(2, 3, padding=padding, bias=False), {"kernel": jnp.ones((3, 4, 2))}
    with pytest.raises(ValueError, match="^conv: the window must fit into the padded input"):
        layer.apply(kernel, (), jnp.zeros((2, 0, 4)))


def test_nets_of_delta_orthogonal_convolutions_have_an_orthogonal_last_layer():
    nets = [
        fnn.models.convnet([4, 8], 10, init="delta_orthogonal(2)"),
        fnn.models.resnet([1, 1], 10, width=4, init="delta_orthogonal(2)"),
    ]
    for net in nets:
        params, _ = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))
        assert any(a.shape == (8, 10) or a.shape[1:] == (10,) for a in jax.tree.leaves(params))
    kernel = models._of_dense("delta_orthogonal(2)")(jax.random.key(0), (12, 10))
    np.testing.assert_allclose(kernel.T @ kernel, 4 * np.eye(10), atol=1e-5)


def test_delta_orthogonal_conv_keeps_norms_under_circular_padding():
    x = image(2, channels=8)
    layer = fnn.conv(8, 3, padding="circular", kernel_init="delta_orthogonal")
    y, _ = layer.apply(layer.init(jax.random.key(0), x)[0], (), x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape", "sentence"),
    [
        (lambda: fnn.conv(4, 3, groups=3), (2, 8, 8, 3), "groups must divide the output channels, got 3 groups and 4"),
        (lambda: fnn.conv(4, 3, groups=2), (2, 8, 8, 3), r"groups must divide the input channels, got 2 .*8,3\]"),
        (
            lambda: fnn.conv(4, 5, padding="valid"),
            (2, 4, 4, 3),
            r"must fit into the padded input, got \(5, 5\).*\(4, 4\)",
        ),
        (lambda: fnn.conv(4, 3, padding="smae"), (2, 8, 8, 3), "unknown padding 'smae'; did you mean 'same'?"),
        (lambda: fnn.conv(4, (3, 3)), (2, 8, 3), "window must have one number for each of 1 axes"),
        (lambda: fnn.conv(4, 0), (2, 8, 3), "window must be a positive integer, got 0"),
        (lambda: fnn.conv(4, 3, padding=-1), (2, 8, 3), "padding must be an integer of at least 0, got -1"),
        (lambda: fnn.conv(4, 3), (2, 3), "one to three axes of positions"),
        (lambda: fnn.max_pool(4), (2, 3, 3, 1), "must fit into the padded input"),
        (lambda: fnn.avg_pool(2, padding=2), (2, 3, 3, 1), "padding must be smaller than the window"),
        (lambda: fnn.conv_transpose(4, 9, padding=0), (2, 3, 1), "must fit into the padded input"),
    ],
)
def test_refusals(make, shape, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")):
        make().init(jax.random.key(0), jnp.zeros(shape))
        layer = make()
        layer.apply(layer.init(jax.random.key(0), jnp.zeros(shape))[0], (), jnp.zeros(shape))


def test_refusals_of_other_inputs():
    layer = fnn.serial(fnn.dense(3), fnn.conv(4, 3))
    with pytest.raises(TypeError, match="conv: the input must be one floating point array") as refusal:
        layer.init(jax.random.key(0), fnn.Masked(jnp.zeros((2, 5, 3)), jnp.ones((2, 5), bool)))
    assert "in layer 1, input" in refusal.value.__notes__[0]
    params, state = fnn.conv(4, 3).init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match="must have 3 channels, as at init"):
        fnn.conv(4, 3).apply(params, state, jnp.zeros((2, 8, 8, 2)))
    with pytest.raises(TypeError, match="floating point"):
        fnn.conv(4, 3).apply(params, state, jnp.zeros((2, 8, 8, 3), int))
