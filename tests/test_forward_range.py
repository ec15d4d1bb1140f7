"""Where activations leave float32's range on the way forward: measured again in float64, or NaN, and said so."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from test_watch_exact import drawn, in_float64, log_norms, on_the_same_residuals, rows

import fnn
from fnn.gradients import forward_range, program, wide

X = drawn(8, 16)
KERNELS = drawn(256, 16, 16) / 4
"""N(0, 1/fan_in): each ReLU layer halves the second moment, down to 2^-256 and below."""


def relu_net(p, x):
    return jnp.mean(jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, p)[0] ** 2)


def by_hand(kernels, x):
    """log10 of gradients and error signals, second moments of the inputs, and the loss."""
    inputs, products = [np.asarray(x, np.float64)], []
    kernels = np.asarray(kernels, np.float64)
    for w in kernels:
        products.append(inputs[-1] @ w)
        inputs.append(np.maximum(products[-1], 0))
    loss, d, logs = np.mean(inputs[-1] ** 2), 2 * inputs[-1] / inputs[-1].size, []
    for w, x, h in zip(kernels[::-1], inputs[-2::-1], products[::-1], strict=True):
        d = d * (h > 0)
        logs.append([np.linalg.norm(x.T @ d), math.sqrt(len(x)) * np.linalg.norm(d)])
        d = d @ w.T
    with np.errstate(divide="ignore"):
        logs = np.log10(logs[::-1]).T
    return *logs, np.array([np.mean(x**2) for x in inputs[:-1]]), loss


def column(flow, quantity):
    return np.array([row.value for row in flow.rows() if row.quantity == quantity])


@pytest.fixture(scope="module")
def deep():
    return fnn.watch(relu_net)(KERNELS, X)


def test_a_relu_net_of_256_layers(deep):
    gradients, errors, moments, loss = by_hand(KERNELS, X)
    assert moments[-1] < 2.0**-230 and loss < 1e-70
    np.testing.assert_allclose(column(deep, "log10_gradient"), gradients, atol=1e-6)
    np.testing.assert_allclose(column(deep, "log10_error"), errors, atol=1e-6)
    np.testing.assert_allclose(column(deep, "input_second_moment"), moments, rtol=1e-6)
    np.testing.assert_allclose(float(deep.loss), loss, rtol=1e-12)
    (note,) = deep.labels.notes
    layer = int(np.argmax(column(deep, "output_second_moment") < 2.0**-200)) + 1
    assert note == f"measured in float64: activations left the range of float32 at layer {layer} ([{layer - 1}])"
    assert note in str(deep)


def test_the_same_in_repeat():
    net = fnn.repeat(fnn.serial(fnn.dense(16), fnn.activation("relu")), 256)
    params, state = jax.eval_shape(net.init, jax.random.key(0), X)
    biases, _ = jax.tree.leaves(params)
    params = jax.tree.unflatten(jax.tree.structure(params), [jnp.zeros(biases.shape), KERNELS])
    flow = fnn.watch(lambda p, x: jnp.mean(net.apply(p, state, x)[0] ** 2), groups="gradient")(params, X)
    (found,) = (logs for path, logs in rows(flow).items() if path.endswith("kernel"))
    want, *_ = by_hand(KERNELS, X)
    np.testing.assert_allclose(found / math.log(10), want, atol=1e-6)
    assert flow.labels.notes[0].startswith("measured in float64")


def test_a_training_loop_keeps_its_program():
    """Numbers that depend on what is lost are NaN there, not zero; the loss and the gradient are those of float32."""
    watch = fnn.watch(relu_net)
    ((_, gradient), flow), inside = watch.value_and_grad(KERNELS, X), jax.jit(watch)(KERNELS, X)
    for found in (flow, inside):
        moments = column(found, "input_second_moment")
        assert np.isnan(column(found, "log10_gradient")).all() and np.isnan(column(found, "log10_error")).all()
        assert np.isfinite(moments[:100]).all() and np.isnan(moments[-1]) and not (moments == 0).any()
    np.testing.assert_array_equal(gradient, jax.jit(jax.grad(relu_net))(KERNELS, X))


def test_dead_units_are_no_lost_signal():
    """A layer that is dead for all examples is zero in float64 as well: no note, and no NaN."""
    kernels = KERNELS[:8].at[4].set(-jnp.abs(KERNELS[4]))
    flow = fnn.watch(relu_net)(kernels, X)
    assert not flow.labels.notes and (column(flow, "log10_gradient") == -np.inf).all()
    assert (column(flow, "input_dead")[5:] == 1).all() and (column(flow, "input_second_moment")[5:] == 0).all()


def test_what_leaves_float64_too_is_nan():
    kernels = KERNELS[:64] * 1e-6
    flow = fnn.watch(relu_net)(kernels, X)
    (note,) = flow.labels.notes
    assert note.startswith("activations left the range of float64 too at layer ")
    assert np.isnan(column(flow, "log10_gradient")).all() and np.isnan(column(flow, "input_second_moment")[-1])
    moments = column(flow, "input_second_moment")[:20]
    np.testing.assert_allclose(moments, by_hand(kernels, X)[2][:20], rtol=1e-6)  # down to 1e-250


def test_activations_that_overflow():
    kernels = KERNELS[:48] * 20
    flow = fnn.watch(relu_net)(kernels, X)
    gradients, errors, moments, _ = by_hand(kernels, X)
    assert moments[-1] > 1e80 and "measured in float64" in flow.labels.notes[0]
    np.testing.assert_allclose(column(flow, "log10_gradient"), gradients, atol=1e-6)
    np.testing.assert_allclose(column(flow, "log10_error"), errors, atol=1e-6)
    assert np.isnan(column(jax.jit(fnn.watch(relu_net))(kernels, X), "log10_gradient")).all()


def test_a_model_that_asks_for_float32_itself_and_draws():
    """Casts, dropout masks and noise are those of float32. ReLU nets scale: every log moves by a known number."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(2):
                x = linen.relu(linen.Dense(8, dtype=jnp.float32, use_bias=False)(x.astype(jnp.float32)))
                x = linen.Dropout(0.5, deterministic=False)(x)
            return linen.Dense(1, dtype=jnp.float32, use_bias=False)(x)

    net, key = Net(), jax.random.key(1)
    params = net.init({"params": jax.random.key(0), "dropout": key}, X)["params"]
    watch = fnn.watch(lambda p, x, key: jnp.mean(jnp.abs(net.apply({"params": p}, x, rngs={"dropout": key}))))
    near = watch(params, X, key)
    far = watch(jax.tree.map(lambda a: a * 2.0**-90, params), X, key)
    assert not near.labels.notes and "measured in float64" in far.labels.notes[0]
    shift = -90 * math.log10(2)
    np.testing.assert_allclose(column(far, "log10_gradient"), column(near, "log10_gradient") + 2 * shift, atol=1e-6)
    np.testing.assert_allclose(
        column(far, "log10_error"), column(near, "log10_error") + np.array([2, 1, 0]) * shift, atol=1e-6
    )


def test_a_zero_kernel_loses_nothing():
    """What a kernel of zeros makes is zero at any precision: nothing is measured twice."""
    params = {"a": KERNELS[0], "b": jnp.zeros((16, 2))}

    def loss(p, x):
        return 1 + jnp.mean(x @ p["a"] @ p["b"])

    flow, ranges = fnn.watch(loss)._run(False, params, (X,))
    assert ranges.first([False, True], flow.labels) == ""
    assert not fnn.watch(loss)(params, X).labels.notes


def test_where_it_cannot_be_measured_in_float64():
    mesh = jax.make_mesh((1,), ("d",))
    spec = jax.sharding.PartitionSpec()
    halves = jax.shard_map(lambda x: x * 2.0**-60, mesh=mesh, in_specs=spec, out_specs=spec)

    def loss(p, x):
        for w in p:
            x = halves(jax.nn.relu(x @ w))
        return jnp.mean(x)

    flow = fnn.watch(loss)(KERNELS[:4], X)
    (note,) = flow.labels.notes
    assert "at layer 3 ([2]), which cannot be measured in float64 (shard_map" in note
    assert np.isnan(column(flow, "log10_gradient")).all()


# Operation by operation: the float64 run of a float32 program ------------------------------------------------------------


def cases():
    table, w = drawn(5, 4), drawn(4, 4)
    image, kernel = drawn(2, 6, 6, 4), drawn(3, 3, 4, 4)
    index = jnp.array([0, 3, 1, 3])

    @jax.custom_vjp
    def rule(x):
        return jnp.sin(x)

    rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, d: (d * jnp.cos(x),))
    return {
        "lookup and scatter": (lambda p: jnp.sum(jnp.sin(p[index]) ** 2), table),
        "conv and pools": (
            lambda p: jnp.sum(
                linen.avg_pool(linen.max_pool(linen.Conv(4, (3, 3)).apply({"params": p}, image), (2, 2)), (2, 2)) ** 2
            ),
            {"kernel": kernel, "bias": jnp.ones(4)},
        ),
        "while and cond": (
            lambda p: jnp.sum(
                jax.lax.cond(
                    p[0, 0] > 9, jnp.cos, lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w) + i, x), p
                )
            ),
            w,
        ),
        "a rule of its own": (lambda p: jnp.sum(rule(p) ** 2) + jnp.sum(jax.nn.relu(p) ** 2), w),
        "sorted": (lambda p: jnp.sum(jnp.cumsum(jnp.sort(p, -1), -1)[:, ::-1] ** 3) + jnp.max(p) + jnp.prod(p[0]), w),
        "softmax and erf": (lambda p: jnp.sum(jax.nn.log_softmax(jax.nn.gelu(p, approximate=False)) ** 2), w),
        "cast down": (lambda p, dtype=jnp.float32: jnp.sum(jnp.tanh(p.astype(dtype) @ w.astype(dtype)) ** 2), w),
        "norms": (lambda p: jnp.linalg.norm(p) + jnp.sum(jnp.linalg.solve(p + 9 * jnp.eye(4), w)), w),
    }


@pytest.mark.parametrize("name", cases())
def test_a_float32_program_in_float64(name):
    loss, params = cases()[name]
    traced = program.read(program.trace(jax.grad(loss), params)[0])
    if name == "norms":
        with jax.enable_x64(True), pytest.raises(Exception, match="in float64"):
            jax.eval_shape(lambda p: wide.spread(traced, [wide.up(p)]), params)
        return
    want = in_float64(
        jax.grad(functools.partial(loss, **({"dtype": jnp.float64} if name == "cast down" else {}))), params
    )
    with jax.enable_x64(True):
        found = jax.jit(lambda *p: wide.spread(traced, [wide.up(a) for a in p]))(*jax.tree.leaves(params))
        for ours, exact in zip(found, jax.tree.leaves(want), strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, exact, rtol=3e-7, atol=1e-7)  # of literals, which are float32's
    alone = on_the_same_residuals(loss, params)
    for path, exact in log_norms(want).items():
        np.testing.assert_allclose(log_norms(alone)[path], exact, atol=1e-5)


def test_limits_by_float_type():
    assert forward_range.Limits.of(jnp.float32) == forward_range.Limits(-200, -214, 200)
    assert forward_range.Limits.of(jnp.bfloat16).low == -200
    assert forward_range.Limits.of(jnp.float64).low < -1900 and forward_range.Limits.of(jnp.float16).low == -28


@pytest.mark.parametrize("scale", [1e30, 1e36])
def test_factors_of_the_upper_end_meet_gradients(scale):
    """The gradient fits float32, but not beside a power of two that leaves room below: inf would be said in silence."""
    a, c = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in ((0, (6, 5)), (1, (5, 3))))
    x = np.float32(scale) * np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32)
    watch = fnn.watch(lambda p, x: jnp.mean((x @ p["a"]) @ p["c"]))
    wide = np.float64(x).mean(0)
    want = [np.outer(wide, np.float64(c).sum(1)) / 3, np.outer(wide @ np.float64(a), np.ones(3)) / 3]
    flow = watch({"a": a, "c": c}, x)
    np.testing.assert_allclose(column(flow, "log10_gradient"), [np.log10(np.linalg.norm(g)) for g in want], atol=1e-5)
    assert flow.labels.notes == ("measured in float64: gradients left the range of float32",)
    traced = column(jax.jit(watch)({"a": a, "c": c}, x), "log10_gradient")
    assert np.isnan(traced[0]) and not np.isinf(traced).any()


@pytest.mark.parametrize("number", [1e30, 1e37, 1e-30])
def test_written_numbers_of_any_size_meet_gradients(number):
    a = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)

    def loss(p, x):
        return jnp.mean(number * jnp.tanh((x @ p) / number))

    flow = jax.jit(fnn.watch(loss, groups="gradient"))(a, X[:, :6])
    exact = np.tile(np.float64(X[:, :6]).sum(0)[:, None], 5) / X.shape[0] / 5
    if number > 1:  # for the small one tanh is 1, and has no slope
        np.testing.assert_allclose(column(flow, "log10_gradient"), np.log10(np.linalg.norm(exact)), atol=1e-5)
    else:
        assert np.isneginf(column(flow, "log10_gradient"))


def test_a_weight_of_zero_is_no_reason_for_float64():
    """|g|/|w| is infinite there, in truth."""
    flow = fnn.watch(lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) + p["b"]), groups=("gradient", "cosine"))(
        {"w": X[:4].T, "b": np.zeros(4, np.float32)}, X
    )
    assert not flow.labels.notes and np.isposinf(flow.flat()["b/log10_gradient_to_weight"])
    assert np.isfinite(column(flow, "log10_gradient")).all()
