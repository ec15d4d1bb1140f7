"""`watch`: every number against NumPy, `jax.grad` and float64, for models of four frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from watch_models import MODELS, X, logs, measured, same, taken, watched, wide

import fnn


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_jax(name):
    loss, params, batch = MODELS[name]()
    (value, gradient), flow = watched(name)
    want, wanted = jax.jit(jax.value_and_grad(loss))(params, *batch)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(wanted))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * largest)
    # All rows together are the norm of the whole gradient.
    total = sum(10 ** (2 * row) for row in measured(flow).values())
    np.testing.assert_allclose(total, sum(np.sum(np.square(a)) for a in jax.tree.leaves(wanted)), rtol=1e-4)


@pytest.mark.parametrize("name", ["plain_mlp", "linen_mlp", "haiku_mlp", "equinox_recurrent"])
def test_log_norms_of_each_array_against_float64(name):
    loss, params, batch = MODELS[name]()
    with jax.enable_x64(True):
        wanted = logs(jax.jit(jax.grad(loss))(wide(params), *wide(batch)))
    found = measured(watched(name)[1])
    largest = max(wanted.values())
    for path, value in wanted.items():  # a sum that cancels keeps the rounding of its terms
        assert abs(found[path] - value) < 1e-4 or value < largest - 6, path


def test_a_scan_has_a_row_for_each_layer():
    loss, params, batch = MODELS["linen_transformer"]()
    found, gradient = measured(watched("linen_transformer")[1]), jax.jit(jax.grad(loss))(params, *batch)
    kernels = gradient["blocks"]["Dense_0"]["kernel"]
    for i in range(3):
        np.testing.assert_allclose(
            found[f"blocks/Dense_0/kernel[{i}]"], np.log10(np.linalg.norm(kernels[i])), atol=1e-5
        )


# Values by NumPy ------------------------------------------------------------------------------------------------------


def test_statistics_of_a_plain_net():
    flow, params, (x, y) = taken("plain_mlp")
    x = np.asarray(x, np.float64)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    h1 = x @ p["w1"] + p["b1"]
    a1 = np.tanh(h1)
    h2 = a1 @ (p["w2"] * p["scale"])
    q = np.exp(h2) / np.exp(h2).sum(1, keepdims=True)
    d2 = q - np.eye(3)[np.asarray(y)]  # of single examples
    d1 = d2 @ (p["w2"] * p["scale"]).T * (1 - a1**2)
    rows = {(row.path, row.quantity): row for row in flow.rows()}

    def expect(path, quantity, value, rtol=1e-5):
        np.testing.assert_allclose(
            rows[path, quantity].value, value, rtol=rtol, atol=1e-6, err_msg=f"{path} {quantity}"
        )

    for path, inputs, outputs, d in (("w1", x, h1, d1), ("w2", a1, h2, d2)):
        expect(path, "log10_error", np.log10(np.sqrt(np.mean(np.sum(d**2, 1)))))
        for side, a in (("input", inputs), ("output", outputs)):
            expect(path, f"{side}_mean", a.mean())
            expect(path, f"{side}_second_moment", (a**2).mean())
            expect(path, f"{side}_dead", 0)
            c = a - a.mean()
            expect(path, f"{side}_kurtosis", (c**4).mean() / (c**2).mean() ** 2)
            s = np.linalg.svd(a, compute_uv=False) ** 2
            expect(path, f"{side}_rank", s.sum() ** 2 / (s**2).sum(), 1e-4)
    expect("w2", "input_saturated", np.mean(np.abs(a1) > 0.98))
    assert ("w1", "input_saturated") not in rows  # its input is not bounded: absent, not 0
    g2 = a1.T @ d2 / 6 * p["scale"]
    expect("w2", "log10_gradient", np.log10(np.linalg.norm(g2)))
    expect("w2", "log10_gradient_rms", np.log10(np.sqrt(np.mean(g2**2))))
    expect("w2", "cosine", (g2 * p["w2"]).sum() / np.linalg.norm(g2) / np.linalg.norm(p["w2"]), 1e-4)
    expect("w2", "log10_gradient_to_weight", np.log10(np.linalg.norm(g2) / np.linalg.norm(p["w2"])))
    assert [rows[path, "log10_gradient"].layer for path in ("w1", "b1", "w2", "scale")] == [1, 1, 2, 2]


def test_dead_units_are_counted_by_channel_and_at_all_positions():
    w = jnp.array([[1.0, -1.0, 1.0], [1.0, -1.0, 0.0]])
    x = jnp.abs(jax.random.normal(jax.random.key(0), (5, 4, 2)))

    def loss(p, x):
        return jnp.mean((jax.nn.relu(x @ p["a"]) @ p["b"]) ** 2)

    flow = fnn.watch(loss)({"a": w, "b": jnp.ones((3, 2))}, x)
    assert measured(flow, "input_dead") == {"a": 0, "b": pytest.approx(1 / 3)}
    # Dead in one half of the time steps only is not dead.
    gate = jnp.array([1.0, -1.0, 1.0, -1.0])[:, None]
    flow = fnn.watch(lambda p, x: loss(p, x * gate))({"a": w, "b": jnp.ones((3, 2))}, x)
    assert measured(flow, "input_dead")["b"] == 0


def test_statistics_at_any_scale():
    """Squares leave float32 long before the numbers do."""
    for scale in (1e-30, 1e25):
        x = X * scale
        flow = fnn.watch(lambda p, x: jnp.mean(x @ p))(jnp.ones((8, 3)), x)
        want = np.mean(np.asarray(x, np.float64) ** 2)
        np.testing.assert_allclose(measured(flow, "input_second_moment")[""], want, rtol=1e-5)


def test_attention_by_head():
    q, k = jax.random.split(jax.random.key(0))
    params = {"q": jax.random.normal(q, (8, 2, 4)), "k": jax.random.normal(k, (8, 2, 4))}
    x = jax.random.normal(jax.random.key(1), (3, 5, 8))

    def loss(p, x):
        a, b = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qk")
        logits = jnp.where(jnp.tri(5, dtype=bool), jnp.einsum("bthe,bshe->bhts", a, b) / 2, -jnp.inf)
        return jnp.mean(jnp.einsum("bhts,bsd->bthd", jax.nn.softmax(logits), x) ** 2)

    flow = fnn.watch(loss, groups="attention")(params, x)
    a, b = (np.einsum("btd,dhe->bthe", x, params[n]) for n in "qk")
    logits = np.where(np.tri(5), np.einsum("bthe,bshe->bhts", a, b) / 2, -np.inf)
    weights = np.asarray(jax.nn.softmax(logits), np.float64)
    terms = weights * np.log(np.where(weights > 0, weights, 1))
    largest, entropies = measured(flow, "largest_logit"), measured(flow, "attention_entropy")
    for head in range(2):
        name = f"softmax[head {head}]"
        np.testing.assert_allclose(largest[name], logits[:, head].max(), rtol=1e-5)
        np.testing.assert_allclose(entropies[name], -terms.sum(-1)[:, head].mean(), rtol=1e-4)


def test_a_weight_used_over_time_counts_all_steps():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"u": jax.random.normal(keys[0], (4, 4)) / 2, "w": jax.random.normal(keys[1], (3, 4))}
    x = jax.random.normal(keys[2], (5, 6, 3))

    def loss(p, x, out=None):
        out = jnp.zeros((6, 5, 4)) if out is None else out

        def body(h, now):
            x, extra = now
            return jnp.tanh(x @ p["w"] + (h @ p["u"] + extra)), h

        h, before = jax.lax.scan(body, jnp.zeros((5, 4)), (x.swapaxes(0, 1), out))
        return jnp.mean(jnp.sum(h**2, -1)), before

    flow = fnn.watch(lambda p, x: loss(p, x)[0], groups=("error", "activation", "kurtosis"))(params, x)
    d = jax.jit(jax.grad(lambda out: loss(params, x, out)[0]))(jnp.zeros((6, 5, 4)))
    np.testing.assert_allclose(measured(flow, "log10_error")["u"], np.log10(np.sqrt(5) * np.linalg.norm(d)), atol=1e-5)
    h = np.asarray(loss(params, x)[1], np.float64)
    c = h - h.mean()
    np.testing.assert_allclose(measured(flow, "input_second_moment")["u"], np.mean(h**2), rtol=1e-5)
    np.testing.assert_allclose(measured(flow, "input_kurtosis")["u"], (c**4).mean() / (c**2).mean() ** 2, rtol=1e-4)
    # One recurrent cell is one layer.
    assert {row.layer for row in flow.rows()} == {1}


def test_a_product_with_the_transposed_table_is_a_layer_of_its_own():
    flow = watched("by_index")[1]
    rows = [(row.layer, row.path) for row in flow.rows() if row.quantity == "log10_error"]
    assert rows == [(1, "e"), (2, "w[0]"), (3, "w[1]"), (4, "w[2]"), (5, "w[3]"), (6, "e")]
    gradients = [(row.layer, row.path) for row in flow.rows() if row.quantity == "log10_gradient"]
    assert gradients == rows[:-1]  # one gradient for all uses


def test_a_plain_backward_pass_says_where_it_ends():
    """Without exponents what float32 loses is NaN, never a number or a zero."""
    depth = 30
    params = {"w": jnp.stack([jnp.eye(8)] * depth) * 0.05}

    def loss(p, x):
        return jnp.mean(jax.lax.scan(lambda h, w: (h @ w + jax.lax.stop_gradient(h - h @ w), None), x, p["w"])[0])

    watch = fnn.watch(loss)
    exact = measured(watch(params, X))
    (_, gradient), flow = watch.value_and_grad(params, X)
    plain = measured(flow)
    assert all(np.isfinite(list(exact.values()))) and min(exact.values()) < -36
    for path, value in exact.items():
        assert np.isnan(plain[path]) if value < -28.5 else value < -27.5 or abs(plain[path] - value) < 1e-5
    assert np.isnan(list(plain.values())).sum() >= 5
    same(watch.value_and_grad(params, X, exact=True)[1], watch(params, X))
    for ours, theirs in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(jax.jit(jax.grad(loss))(params, X)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# Laws -----------------------------------------------------------------------------------------------------------------
