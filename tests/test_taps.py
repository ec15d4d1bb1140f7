"""Taps and `gradient_flow`: statistics by hand, true log norms against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, started

import fnn


def problem(n=16, features=6, classes=3, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return as_jax(rng.normal(size=(n, features)), dtype), as_jax(rng.integers(0, classes, n))


def run(net, params, state, x, y, key=None, factor=1.0):
    def loss(params, state):
        outputs, new = net.apply(params, state, x, train=True, key=key)
        return factor * jnp.mean(fnn.losses.cross_entropy(outputs, y)), new

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, state)


def test_forward_statistics_by_hand():
    x = jnp.array([[0.0, 0.995, -0.5, 2.0], [0.0, 0.0, 0.5, -1.0]])
    layer = fnn.tap(bounds=(-1.0, 1.0))
    params, state = layer.init(jax.random.key(0), x)
    y, new = layer.apply(params, state, x)
    np.testing.assert_array_equal(y, x)
    wide = np.asarray(x, np.float64)
    assert float(new.forward["mean"]) == pytest.approx(wide.mean())
    assert float(new.forward["second_moment"]) == pytest.approx((wide**2).mean())
    assert float(new.forward["dead"]) == pytest.approx(1 / 4) and float(new.forward["peak"]) == 2
    assert float(new.forward["saturated"]) == pytest.approx(3 / 8)  # 0.995, 2 and -1 lie within 0.02 of ±1 or beyond


@pytest.mark.parametrize("mapped", [False, True], ids=["batch", "axis_name"])
def test_forward_statistics_of_a_masked_sequence_are_those_of_its_real_positions(mapped):
    x = np.array([[[0, 0.995], [0, 2], [3, 4]], [[0, 0], [0, -1], [5, 6]], [[0.5, 0], [0, 0], [0, 0]]], np.float32)
    mask = np.array([[True, True, False], [True, False, False], [False, True, False]])
    wide = x[mask].astype(np.float64)
    layer = fnn.tap(bounds=(-1.0, 1.0))
    _, state = layer.init(jax.random.key(0), fnn.Masked(x, mask))

    def one(padded):
        y, new = layer.apply((), state, padded, axis_name="batch" if mapped else None)
        return y, new.forward

    @jax.jit
    def measure(padded):
        if not mapped:
            return one(padded)
        lane = jax.vmap(lambda a: one(jax.tree.map(lambda b: b[None], a)), axis_name="batch", out_axes=(0, None))
        y, forward = lane(padded)
        return jax.tree.map(lambda a: a[:, 0], y), forward

    for fill in (7.0, np.inf, np.nan):
        y, forward = measure(fnn.Masked(np.where(mask[..., None], x, np.float32(fill)), mask))
        jax.tree.map(np.testing.assert_array_equal, y, fnn.Masked(np.where(mask[..., None], x, 0), mask))
        # Of four units (two features at each of two positions with a real example) both first ones are zero.
        want = {
            "mean": wide.mean(),
            "second_moment": (wide**2).mean(),
            "peak": np.abs(wide).max(),
            "dead": 2 / 4,
            "saturated": 2 / 8,
        }
        assert {name: float(a) for name, a in forward.items()} == pytest.approx(want, rel=1e-6)
    empty = [fnn.Masked(jnp.full(shape, jnp.nan), jnp.zeros(shape[:2], bool)) for shape in ((2, 3, 4), (2, 0, 4))]
    for nothing in (*empty, empty[1].values):
        _, new = layer.apply((), state, nothing)
        assert {name: float(a) for name, a in new.forward.items()} == dict.fromkeys(want, 0)


def test_no_layer_sends_a_cotangent_to_padding_and_a_masked_tap_reports_the_real_ones():
    rng = np.random.default_rng(0)
    x, y = as_jax(rng.normal(size=(4, 5, 6)), jnp.float32), jnp.arange(4) % 3
    mask = np.arange(5) < np.array([[5], [2], [3], [0]])
    mask[0, 1], mask[2] = False, mask[2, ::-1].copy()
    ends = [fnn.take_last(), fnn.global_avg_pool(), fnn.serial(fnn.drop_mask(), fnn.flatten())]
    bodies = [fnn.serial(fnn.dense(6), fnn.batch_norm()), fnn.attention(2), fnn.lstm(6, reverse=True)]
    for end, trunk in zip(ends, (bodies, bodies[:1], bodies[:1]), strict=True):
        net = fnn.serial(fnn.tap(), *map(fnn.residual, trunk), end, fnn.dense(3))
        params, state = started(net.init, fnn.Masked(x, mask))

        def loss(state, x, net=net, params=params):
            outputs, new = net.apply(params, state, fnn.Masked(x, mask), train=True)
            return jnp.mean(fnn.losses.cross_entropy(outputs, y)), new

        (news, slope), new = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)
        assert not np.any(slope[~mask]) and np.any(slope[mask])
        (row,) = (row for row in fnn.taps.read(new, news) if row.quantity == "log10_error")
        wide = np.asarray(slope, np.float64)[np.asarray(mask)] * 4  # d l_i/dh, l_i the loss of one of 4 examples
        assert row.value == pytest.approx(0.5 * np.log10(np.sum(wide**2) / 4), abs=1e-5)


def test_a_tap_inside_a_recurrent_loop_leaves_held_states_out():
    x = as_jax(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)
    mask = jnp.array([[True, True, False, False], [False, True, False, True], [True, False, False, False]])
    net = fnn.rnn(5, tap=fnn.tap())
    params, state = started(net.init, fnn.Masked(x, mask))
    y, new = jax.jit(net.apply)(params, state, fnn.Masked(x, mask))
    moments = [row.value for row in fnn.taps.read(new, state) if row.quantity == "second_moment"]
    squares = np.asarray(y.values, np.float64) ** 2
    want = [squares[:, t][np.asarray(mask[:, t])].mean() if mask[:, t].any() else 0 for t in range(4)]
    np.testing.assert_allclose(moments, want, rtol=1e-6)


def test_error_signal_is_the_root_mean_over_examples_inside_repeat_residual_and_serial():
    """The reference takes dL/dh from the gradient with respect to an offset added in the tap's place."""
    x, y = problem()
    offsets = jnp.zeros((4, 16, 6))

    def forward(params, offsets):
        first, block, last = params
        h = x @ first["kernel"] + first["bias"] + offsets[0]
        for i in range(2):
            h = jnp.tanh(h @ block[i][0]["kernel"] + block[i][0]["bias"] + offsets[1 + i])
        inner = h @ last[0]["kernel"] + last[0]["bias"] + offsets[3]
        h = h + 0.5 * inner
        return jnp.mean(fnn.losses.cross_entropy(h @ last[1]["kernel"] + last[1]["bias"], y))

    block = fnn.serial(fnn.dense(6), fnn.tap(), fnn.activation("tanh"))
    net = fnn.serial(
        fnn.dense(6),
        fnn.tap(),
        fnn.repeat(block, 2),
        fnn.residual(fnn.serial(fnn.dense(6), fnn.tap()), scale=0.5),
        fnn.dense(3),
    )
    params, state = net.init(jax.random.key(0), x)
    (_, news), new = run(net, params, state, x, y)
    rows = [row for row in fnn.taps.read(new, news) if row.quantity == "log10_error"]
    assert [row.path for row in rows] == ["1", "2/[0]/1", "2/[1]/1", "3/1"]
    plain = (params[0], fnn.tree.unstack(params[2]), (params[3][0], params[4]))
    deltas = (
        np.asarray(jax.jit(jax.grad(forward, argnums=1))(plain, offsets), np.float64) * 16
    )  # d l_i/dh, not d mean/dh
    expected = 0.5 * np.log10(np.mean(np.sum(deltas**2, axis=2), axis=1))
    np.testing.assert_allclose([row.value for row in rows], expected, rtol=1e-5, atol=1e-5)


def test_taps_under_vmap_over_seeds_equal_a_loop():
    x, y = problem()
    net = fnn.models.mlp(3, 6, 3, activation="tanh", taps=True, unroll=1)
    keys = jax.random.split(jax.random.key(0), 3)

    def one(key):
        params, state = net.init(key, x)
        (_, news), new = run(net, params, state, x, y)
        return new, news

    mapped, alone = jax.jit(jax.vmap(one))(keys), jax.jit(one)
    for i, key in enumerate(keys):
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone(key)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6)


def test_a_tap_used_twice_reports_the_root_of_the_summed_squares():
    x, y = problem()
    inner = fnn.serial(fnn.tap())

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x, _ = inner.apply(params, state, x)
        return inner.apply(params, state, 2 * x)

    net = fnn.serial(fnn.dense(3), fnn.Layer(inner.init, apply))
    params, state = started(net.init, x)
    (_, news), new = run(net, params, state, x, y)
    (row,) = (row for row in fnn.taps.read(new, news) if row.quantity == "log10_error")

    def offset(a, b):
        h = x @ params[0]["kernel"] + params[0]["bias"] + a
        return jnp.mean(fnn.losses.cross_entropy(2 * h + b, y))

    a, b = jax.jit(jax.grad(offset, argnums=(0, 1)))(np.zeros((16, 3), np.float32), np.zeros((16, 3), np.float32))
    assert row.value == pytest.approx(0.5 * np.log10(16 * (np.sum(np.square(a)) + np.sum(np.square(b)))), abs=1e-5)

    @jax.jit
    @jax.grad
    def scaled(state, scale):
        return scale * jnp.mean(fnn.losses.cross_entropy(net.apply(params, state, x)[0], y))

    for scale in (1e-30, 1e-3, 1e3, 1e30):  # squares that float32 cannot hold, and error signals around 1
        (again,) = (r for r in fnn.taps.read(new, scaled(state, scale)) if r.quantity == "log10_error")
        assert again.value == pytest.approx(row.value + np.log10(scale), abs=1e-4)
    (exact,) = (r for r in fnn.gradient_flow(net, (params, state), (x, y)).rows if r.quantity == "log10_error")
    assert exact.value == pytest.approx(row.value, abs=1e-5)


def log_norm(a):
    """Take log |a|; the squares of 1e-200 are zero in float64."""
    peak = np.abs(a).max()
    return float(np.log10(peak) + np.log10(np.linalg.norm(a / peak))) if peak else -np.inf


def float64_flow(net, params, state, batch, factor=1.0):
    """Plain float64 arithmetic, of the loss times a factor: what `gradient_flow` must equal where float64 does not underflow."""
    with jax.enable_x64(True):
        params, state = jax.tree.map(lambda a: as_jax(a, jnp.float64), (params, state))
        x, y = map(np.asarray, batch)
        x = x.astype(np.float64) if x.dtype == np.float32 else x
        (grads, news), new = run(net, params, state, x, y, factor=factor)
        errors = [row.value for row in fnn.taps.read(new, news) if row.quantity == "log10_error"]
        norms = [(path, log_norm(leaf)) for path, leaf in fnn.tree.rows(jax.device_get(grads))]
    return errors, norms


@pytest.mark.parametrize("trained", [False, True], ids=["at_init", "in_training"])
def test_gradient_flow_equals_float64_within_1e_4(trained):
    """Depth 180: the gradient of a sigmoid net falls by a factor of 10^-113, far below float32's range and inside float64's."""
    batch = problem(n=32)
    net = fnn.models.mlp(180, 32, 3, activation="sigmoid", init="scaled(1.0)", bias_init="normal(0.2)", taps=True)
    optimizer = optax.adam(1e-3)
    state = fnn.TrainState.create(net, optimizer, jax.random.key(0), batch[0])
    if trained:
        step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
        for _ in range(20):
            state, _ = step(state, batch)
    flow = fnn.gradient_flow(net, state, batch)
    errors, norms = float64_flow(net, state.params, state.net_state, batch)
    measured = [row.value for row in flow.rows if row.quantity == "log10_error"]
    assert min(errors) < -100
    np.testing.assert_allclose(measured, errors, atol=4e-5, rtol=0)
    by_path = {row.path: row.value for row in flow.rows if row.quantity in ("log10_kernel", "log10_bias")}
    np.testing.assert_allclose([by_path[p] for p, _ in norms], [v for _, v in norms], atol=4e-5, rtol=0)


def test_gradient_flow_through_batch_norm_residual_and_nested_repeat_equals_float64():
    x, y = problem()
    block = fnn.serial(
        fnn.residual(fnn.serial(fnn.dense(6), fnn.tap(), fnn.batch_norm(), fnn.activation("relu"))), fnn.tap()
    )
    nested = fnn.repeat(fnn.serial(fnn.repeat(block, 3), fnn.tap(), fnn.dense(6)), 2, checkpoint=1)
    net = fnn.serial(
        fnn.named("in", fnn.dense(6)), nested, fnn.parallel(fnn.serial(fnn.dense(3), fnn.tap()), fnn.dense(3))
    )
    total = fnn.serial(net, fnn.activation(lambda pair: pair[0] + pair[1]))
    params, state = started(total.init, x)
    flow = fnn.gradient_flow(total, (params, state), (x, y))
    errors, norms = float64_flow(total, params, state, (x, y))
    np.testing.assert_allclose([r.value for r in flow.rows if r.quantity == "log10_error"], errors, atol=4e-5, rtol=0)
    by_path = {
        row.path: row.value
        for row in flow.rows
        if row.quantity.startswith("log10_") and row.quantity != "log10_error" and row.quantity[-4:] != "_rms"
    }
    for path, value in norms:
        # A bias below batch norm has gradient zero up to rounding: its log means nothing.
        if value > -15:
            assert by_path[path] == pytest.approx(value, abs=1e-4), path
    kernels = [row for row in flow.rows if row.quantity == "log10_kernel"]
    assert [row.layer for row in kernels] == list(range(1, 12))


@pytest.mark.parametrize(
    ("dtype", "depth"),
    [
        ("bfloat16", 400),
        # float32 at depth 2000: test_exact_models and test_watch_deep too
        *(pytest.param(dtype, 2000, marks=pytest.mark.slow) for dtype in ("float32", "bfloat16")),
    ],
)
def test_a_deep_sigmoid_net_is_finite_in_low_precision_with_the_predicted_slope(dtype, depth, optimised):
    x, y = problem(n=32, features=64)
    net = fnn.models.mlp(depth, 64, 3, activation="sigmoid", init="scaled(1.0)", taps=True)
    params, state = jax.jit(lambda k: net.init(k, x))(jax.random.key(1))
    predicted = -0.5 * np.log10(fnn.meanfield.fixed_point("sigmoid", 1.0, 0.0).chi)
    flow = fnn.gradient_flow(net, (params, state), (x.astype(dtype), y))
    assert all(np.isfinite(row.value) for row in flow.rows)
    assert flow.log10_error.shape == (depth + 1,)
    # Width 64 over at least 300 layers: the slope of one net scatters by about 0.2/sqrt(64 * 300) = 0.0014; 0.02 leaves
    # room for the 1/width bias, and bfloat16's rounding averages out.
    assert (flow.log10_error[-52] - flow.log10_error[50]) / (depth - 100) == pytest.approx(predicted, abs=0.02)


def test_the_root_mean_square_of_a_gradient_is_that_of_one_block_of_a_stack():
    """A linear net x W_1 W_2 W_3 V, three of its kernels in a stack: its gradients by hand, in float64."""
    rng = np.random.default_rng(0)
    x, y, stack, last = (rng.normal(size=shape) for shape in ((8, 4), (8, 2), (3, 4, 4), (4, 2)))
    net = fnn.serial(fnn.repeat(fnn.serial(fnn.dense(4, bias=False), fnn.tap()), 3), fnn.dense(2, bias=False))
    params, state = net.init(jax.random.key(0), x)
    leaves = [as_jax(a, jnp.float32) for a in (stack, last)]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    flow = fnn.gradient_flow(net, (params, state), (x, y), loss=lambda outputs, y: jnp.sum((outputs - y) ** 2, -1) / 2)
    inputs = [x]
    for kernel in (*stack, last):
        inputs.append(inputs[-1] @ kernel)
    error, expected = (inputs.pop() - y) / 8, []
    for kernel, given in zip(reversed([*stack, last]), reversed(inputs), strict=True):
        gradient = given.T @ error
        expected.insert(0, np.log10(np.mean(gradient**2)) / 2)
        error = error @ kernel.T
    measured = flow.profile("log10_kernel_rms")
    assert measured[0].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(measured[1], expected, atol=1e-5)


def test_zero_and_non_finite_gradients_say_so():
    x, y = problem()
    net = fnn.serial(fnn.dense(6), fnn.tap(), fnn.activation("tanh"), fnn.dense(3), fnn.tap())
    params, state = net.init(jax.random.key(0), x)
    dead = (*params[:3], jax.tree.map(jnp.zeros_like, params[3]), params[4])
    flow = fnn.gradient_flow(net, (dead, state), (x, y))
    assert flow.log10_error[0] == -np.inf and np.isfinite(flow.log10_error[1])
    assert flow.log10_kernel[0] == -np.inf and np.isfinite(flow.log10_kernel[1])
    broken = (jax.tree.map(lambda a: a * jnp.nan, params[0]), *params[1:])
    with pytest.warns(UserWarning, match=r"left the range of float64 at layer 1 \(1\), and what depends on it is NaN"):
        assert np.isnan(fnn.gradient_flow(net, (broken, state), (x, y)).log10_error).all()


def test_taps_change_no_gradient_of_a_train_step():
    x, y = problem()
    net = fnn.models.mlp(4, 6, 3, activation="sigmoid", taps=True)
    bare = fnn.models.mlp(4, 6, 3, activation="sigmoid")
    params, state = net.init(jax.random.key(0), x)
    bare_params, bare_state = bare.init(jax.random.key(0), x)
    kernels = [a for a in jax.tree.leaves(params) if a.ndim == 2]
    bare_params = jax.tree.unflatten(jax.tree.structure(bare_params), jax.tree.leaves(params))
    assert [a.shape for a in kernels] == [a.shape for a in jax.tree.leaves(bare_params) if a.ndim == 2]
    (grads, _), _ = run(net, params, state, x, y)
    (bare_grads, _), _ = run(bare, bare_params, bare_state, x, y)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(bare_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_a_net_without_taps_and_bad_labels_are_refused():
    x, y = problem()
    net = fnn.serial(fnn.dense(6), fnn.dense(3))
    with pytest.raises(ValueError, match="gradient_flow: the net must hold a tap, got none"):
        fnn.gradient_flow(net, net.init(jax.random.key(0), x), (x, y))
    with pytest.raises(ValueError, match=r"cross_entropy: labels must lie in 0..2, got 0..7"):
        tapped = fnn.serial(fnn.dense(3), fnn.tap())
        fnn.gradient_flow(tapped, tapped.init(jax.random.key(0), x), (x, y.at[0].set(7)))


def test_a_gradient_outside_of_the_mapped_function_is_refused(key):
    net, x = fnn.serial(fnn.dense(4), fnn.tap()), np.ones((3, 2), np.float32)
    params, state = started(net.init, x)

    def loss(params):
        one = lambda x: jnp.sum(net.apply(params, state, x[None], axis_name="b")[0])  # noqa: E731
        return jnp.mean(jax.vmap(one, axis_name="b")(x))

    with pytest.raises(ValueError, match="tap: the gradient must be taken inside the function that is mapped over 'b'"):
        jax.jit(jax.grad(loss))(params)
