"""`watch`: every number against NumPy, `jax.grad` and float64, for models of four frameworks; then the laws."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import fnn
from fnn import tree

X = jax.random.normal(jax.random.key(3), (6, 8))
Y = jax.random.randint(jax.random.key(4), (6,), 0, 3)
TOKENS = jax.random.randint(jax.random.key(5), (6, 7), 0, 11)
IMAGES = jax.random.normal(jax.random.key(7), (6, 8, 8, 1))


def entropy(logits, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))


def wide(values):
    """Cast to float64."""

    def cast(a):
        return jnp.asarray(a, jnp.float64) if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating) else a

    return jax.tree.map(cast, values)


def logs(gradients, params=None):
    """The log10 of the norm of each array, in float64: {path: number}."""
    names = [name.removesuffix("/value") for name in tree.paths(gradients)]
    with np.errstate(divide="ignore"):
        return {
            name: float(np.log10(np.linalg.norm(np.asarray(leaf, np.float64))))
            for name, leaf in zip(names, jax.tree.leaves(gradients), strict=True)
        }


def measured(flow, quantity="log10_gradient"):
    return {row.path: row.value for row in flow.rows() if row.quantity == quantity}


# Models of four frameworks: name -> (loss, params, batch) --------------------------------------------------------------


def plain_mlp():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (8, 5)),
        "b1": jnp.ones(5),
        "w2": jax.random.normal(keys[1], (5, 3)),
        "scale": jnp.full((), 0.5),
    }
    return (
        lambda p, x, y: entropy(jnp.tanh(x @ p["w1"] + p["b1"]) @ (p["w2"] * p["scale"]), y),
        params,
        (X, Y),
    )


class _Mlp(linen.Module):
    depth: int = 3
    activation: str = "sigmoid"

    @linen.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = getattr(linen, self.activation)(linen.Dense(8)(x))
        return linen.Dense(3)(x)


def linen_mlp(depth=3):
    net = _Mlp(depth)
    params = net.init(jax.random.key(0), X)["params"]
    return lambda p, x, y: entropy(net.apply({"params": p}, x), y), params, (X, Y)


class _Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        h = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(2)(h, h, mask=linen.make_causal_mask(x[..., 0]))
        return x + linen.Dense(8)(linen.gelu(linen.Dense(16)(linen.LayerNorm()(x)))), None


class _Transformer(linen.Module):
    @linen.compact
    def __call__(self, x):
        table = linen.Embed(11, 8, name="table")
        axes, split = {"params": 0}, {"params": True}
        blocks = linen.scan(linen.remat(_Block), variable_axes=axes, split_rngs=split, length=3)
        h, _ = blocks(name="blocks")(table(x), None)
        return table.attend(linen.LayerNorm()(h))


def linen_transformer():
    net = _Transformer()
    params = net.init(jax.random.key(0), TOKENS)["params"]

    def loss(p, x):
        logits = jax.nn.log_softmax(net.apply({"params": p}, x[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logits, x[:, 1:, None], -1))

    return loss, params, (TOKENS,)


class _Conv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.output = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.output(x.mean((1, 2)))


def nnx_conv():
    graph, params, rest = nnx.split(_Conv(nnx.Rngs(0)), nnx.Param, ...)
    return lambda p, x, y: entropy(nnx.merge(graph, p, rest, copy=True)(x), y), params, (IMAGES, Y)


def equinox_recurrent():
    eqx = pytest.importorskip("equinox")

    class _Recurrent(eqx.Module):
        embedding: eqx.nn.Embedding
        cell: eqx.nn.GRUCell
        output: eqx.nn.MLP

        def __init__(self, key):
            a, b, c = jax.random.split(key, 3)
            self.embedding, self.cell = eqx.nn.Embedding(11, 8, key=a), eqx.nn.GRUCell(8, 8, key=b)
            self.output = eqx.nn.MLP(8, 3, 5, 1, key=c)

        def __call__(self, x):
            h, _ = jax.lax.scan(
                lambda h, x: (self.cell(x, h), None), jnp.zeros(8, self.cell.bias.dtype), jax.vmap(self.embedding)(x)
            )
            return self.output(h)

    params, static = eqx.partition(_Recurrent(jax.random.key(0)), eqx.is_inexact_array)
    return lambda p, x, y: entropy(jax.vmap(eqx.combine(p, static))(x), y), params, (TOKENS, Y)


def haiku_mlp():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, 4, 3], activation=jnp.tanh)(x)))
    return lambda p, x, y: entropy(net.apply(p, x), y), net.init(jax.random.key(0), X), (X, Y)


def by_index():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"e": jax.random.normal(keys[0], (11, 6)), "w": jax.random.normal(keys[1], (4, 6, 6)) / 3}

    def loss(p, x):
        h = p["e"][x]
        for i in range(4):
            h = jnp.tanh(h @ p["w"][i])
        return jnp.mean(jax.nn.logsumexp(h @ p["e"].T, -1))

    return loss, params, (TOKENS,)


def fnn_residual():
    net = fnn.models.mlp(20, 8, 3, norm="batch_norm", residual=True)
    params, state = net.init(jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype))

    def loss(p, x, y):
        return jnp.mean(fnn.losses.cross_entropy(net.apply(p, state, x, train=True)[0], y))

    return loss, params, (X, Y)


MODELS = {
    f.__name__: f
    for f in (
        *(plain_mlp, linen_mlp, linen_transformer, nnx_conv, equinox_recurrent),
        *(haiku_mlp, by_index, fnn_residual),
    )
}


@functools.cache
def watched(name):
    loss, params, batch = MODELS[name]()
    return fnn.watch(loss).value_and_grad(params, *batch)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_jax(name):
    loss, params, batch = MODELS[name]()
    (value, gradient), flow = watched(name)
    want, wanted = jax.jit(jax.value_and_grad(loss))(params, *batch)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * largest)
    # All rows together are the norm of the whole gradient.
    total = sum(10 ** (2 * row) for row in measured(flow).values())
    np.testing.assert_allclose(total, sum(float(jnp.sum(a**2)) for a in jax.tree.leaves(wanted)), rtol=1e-4)


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


def taken(name, groups="all", **options):
    loss, params, batch = MODELS[name]()
    return fnn.watch(loss, groups=groups, **options)(params, *batch), params, batch


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

    flow = fnn.watch(lambda p, x: loss(p, x)[0], groups="all")(params, x)
    d = jax.grad(lambda out: loss(params, x, out)[0])(jnp.zeros((6, 5, 4)))
    np.testing.assert_allclose(measured(flow, "log10_error")["u"], np.log10(np.sqrt(5) * np.linalg.norm(d)), atol=1e-5)
    h = np.asarray(loss(params, x)[1], np.float64)
    c = h - h.mean()
    np.testing.assert_allclose(measured(flow, "input_second_moment")["u"], np.mean(h**2), rtol=1e-5)
    np.testing.assert_allclose(measured(flow, "input_kurtosis")["u"], (c**4).mean() / (c**2).mean() ** 2, rtol=1e-4)
    # One recurrent cell is one layer.
    assert {row.layer for row in flow.rows()} == {1}


def test_a_product_with_the_transposed_table_is_a_layer_of_its_own():
    flow, *_ = taken("by_index")
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


def same(a, b, rtol=1e-5):
    assert a.labels == b.labels
    np.testing.assert_allclose(a.numbers(), b.numbers(), rtol=rtol, atol=1e-5)


def test_under_jit_vmap_and_scan():
    loss, params, batch = MODELS["linen_mlp"]()
    watch = fnn.watch(loss)
    alone = watch(params, *batch)
    same(jax.jit(watch)(params, *batch), alone)
    other = jax.tree.map(lambda a: a * 1.1, params)
    lanes = jax.vmap(watch, in_axes=(0, None, None))(jax.tree.map(lambda *a: jnp.stack(a), params, other), *batch)
    same(jax.tree.map(lambda a: a[0], lanes), alone)
    same(jax.tree.map(lambda a: a[1], lanes), watch(other, *batch))
    assert lanes.table().columns == ["lane", "layer", "path", "quantity", "value"]
    assert len(lanes.table()) == 2 * len(alone.table())
    _, turns = jax.lax.scan(
        lambda c, s: (c, watch(jax.tree.map(lambda a: a * s, params), *batch)), 0, jnp.array([1, 1.1])
    )
    same(jax.tree.map(lambda a: a[0], turns), alone)


def test_a_batch_cut_over_a_named_axis():
    loss, params, (x, y) = MODELS["linen_mlp"]()
    whole = fnn.watch(loss, groups="all")(params, x, y)
    cut = fnn.watch(loss, groups=[g for g in module_groups() if g != "rank"], axis_name="i")
    parts = jax.vmap(cut, in_axes=(None, 0, 0), axis_name="i")(params, x.reshape(2, 3, 8), y.reshape(2, 3))
    rows = {(row.path, row.quantity): row.value for row in whole.rows()}
    for i in range(2):
        for row in jax.tree.map(lambda a, i=i: a[i], parts).rows():
            np.testing.assert_allclose(row.value, rows[row.path, row.quantity], rtol=2e-4, atol=2e-5, err_msg=str(row))


def module_groups():
    from fnn.gradients.labels import GROUPS

    return GROUPS


def test_every_on_the_host_and_inside_scan():
    loss, params, batch = MODELS["plain_mlp"]()
    watch = fnn.watch(loss, every=2)
    plain = jax.jit(jax.value_and_grad(loss))(params, *batch)
    for step in (0, 1, 2):
        (value, gradient), flow = watch.value_and_grad(params, *batch, step=step)
        np.testing.assert_allclose(value, plain[0], rtol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain[1]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
        assert np.isfinite(flow.numbers()).all() == (step % 2 == 0)

    def body(params, step):
        (_, gradient), flow = watch.value_and_grad(params, *batch, step=step)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), flow

    _, flows = jax.jit(lambda p: jax.lax.scan(body, p, jnp.arange(4)))(params)
    assert [bool(np.isfinite(row).all()) for row in flows.numbers()] == [True, False, True, False]


def test_steps_in_between_average_over_a_named_axis_too():
    loss, params, (x, y) = MODELS["plain_mlp"]()
    watch = fnn.watch(loss, axis_name="i", every=2)
    whole = jax.jit(jax.value_and_grad(loss))(params, x, y)
    for step in (0, 1):

        def lane(x, y, step=step):
            return watch.value_and_grad(params, x, y, step=step)[0]

        found = jax.vmap(lane, axis_name="i")(x.reshape(2, 3, 8), y.reshape(2, 3))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, jnp.stack([theirs, theirs]), rtol=1e-4, atol=1e-6)


def test_a_step_in_between_is_the_plain_step():
    """The same optimised program, to the letter but for its name."""
    loss, params, batch = MODELS["plain_mlp"]()

    def text(function):
        names: dict[str, str] = {}
        lines = jax.jit(function).lower(params, batch).compile().as_text().splitlines()
        lines = [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines if " = " in line]
        return [re.sub(r"%[\w.-]+", lambda m: names.setdefault(m[0], str(len(names))), line) for line in lines]

    between = fnn.watch(loss, every=2)
    assert text(lambda p, b: between.value_and_grad(p, *b, step=1)[0]) == text(
        lambda p, b: jax.value_and_grad(loss)(p, *b)
    )


def test_aux_goes_through():
    loss, params, batch = MODELS["plain_mlp"]()
    watch = fnn.watch(lambda p, x, y: (loss(p, x, y), {"x": x + 1}), has_aux=True)
    ((value, aux), _), flow = watch.value_and_grad(params, *batch)
    np.testing.assert_allclose(value, flow.loss)
    np.testing.assert_allclose(aux["x"], batch[0] + 1)


def test_only_what_is_asked_for():
    flow, *_ = taken("linen_mlp", "gradient", only="Dense_1/*")
    assert {row.path for row in flow.rows()} == {"Dense_1/kernel", "Dense_1/bias"}
    assert {row.quantity for row in flow.rows()} == {"log10_gradient", "log10_gradient_rms"}
    # What is not asked for is not computed: no more than a plain gradient's products.
    loss, params, batch = MODELS["linen_mlp"]()
    program = str(jax.make_jaxpr(fnn.watch(loss, groups="activation"))(params, *batch))
    assert program.count("dot_general[") == 4


def test_error_of_a_weighted_loss_has_another_name():
    loss, params, batch = MODELS["plain_mlp"]()
    plain, weighted = fnn.watch(loss)(params, *batch), fnn.watch(loss, weighted=True)(params, *batch)
    np.testing.assert_allclose(
        measured(plain, "log10_error")["w1"],
        measured(weighted, "log10_error_norm")["w1"] + 0.5 * np.log10(6),
        rtol=1e-5,
    )
    assert not measured(weighted, "log10_error")


def test_what_the_loss_does_not_reach_is_minus_infinity():
    params = {"a": jnp.ones((8, 3)), "b": jnp.ones((8, 3)), "c": jnp.ones(3)}
    flow = fnn.watch(lambda p, x: jnp.mean(x @ p["a"]) + 0 * jnp.sum(jax.lax.stop_gradient(x @ p["b"])))(params, X)
    assert measured(flow)["b"] == measured(flow)["c"] == measured(flow, "log10_error")["b"] == -np.inf
    assert np.isfinite(measured(flow)["a"])


def test_bad_input():
    loss, params, _ = MODELS["plain_mlp"]()
    with pytest.raises(TypeError, match="watch: loss must be a function"):
        fnn.watch(params)
    with pytest.raises(ValueError, match="groups"):
        fnn.watch(loss, groups="gradients")
    with pytest.raises(ValueError, match="share their leading axis.*got 6, 8"):
        fnn.watch(lambda p, x: jnp.mean(x["a"] @ p) + jnp.mean(x["b"]))(jnp.ones((8, 3)), {"a": X, "b": jnp.ones(8)})
    with pytest.raises(ValueError, match="at least one example, got none"):
        fnn.watch(lambda p, x: jnp.mean(x @ p))(jnp.ones((8, 3)), X[:0])
    with pytest.raises(ValueError, match="the loss must be one float"):
        fnn.watch(lambda p, x: x @ p)(jnp.ones((8, 3)), X)
    with pytest.raises(ValueError, match="several lanes"):
        jax.vmap(fnn.watch(loss), in_axes=(None, 0, 0))(params, X[:, None], Y[:, None]).rows()


def test_explain_says_what_was_found():
    loss, params, batch = MODELS["equinox_recurrent"]()
    text = fnn.watch(loss).explain(params, *batch)
    assert "cell/weight_hh: dot_general float32[6,8] -> float32[24,6], 7 steps" in text
    assert "gradients alone, no product with data: cell/bias" in text


def test_tables_flat_names_and_print():
    flow, *_ = taken("linen_mlp")
    assert flow.table().columns == ["layer", "path", "quantity", "value"]
    flat = flow.flat()
    assert flat["Dense_0/kernel/log10_gradient"] == measured(flow)["Dense_0/kernel"]
    assert "Dense_3/kernel" in str(flow)
    assert flow.worst(1)[0].path in measured(flow)
    assert {row.path for row in flow.select("*/bias", "log10_*")} == {f"Dense_{i}/bias" for i in range(4)}


def test_layers_are_counted_whatever_is_measured():
    loss, params, batch = MODELS["linen_mlp"]()
    every = {(row.path, row.quantity): row.layer for row in fnn.watch(loss)(params, *batch).rows()}
    for group in ("gradient", "error", "cosine"):
        flow = fnn.watch(loss, groups=group)(params, *batch)
        assert all(row.layer == every.get((row.path, row.quantity), row.layer) for row in flow.rows())
        assert [layer for layer, _ in flow.labels.starts] == [1, 2, 3, 4]
        assert {row.layer for row in flow.rows()} == {1, 2, 3, 4}


def test_prints_say_what_is_missing():
    loss, params, (x, y) = MODELS["linen_mlp"]()
    assert "in table() too: input_mean, output_dead" in str(fnn.watch(loss)(params, x, y))
    assert "first_bad(params, batch)" in str(fnn.watch(loss)(params, x * jnp.nan, y))
    between = fnn.watch(loss, every=2).value_and_grad(params, x, y, step=1)[1]
    assert str(between).endswith("not measured at this step")
    assert "no layers among these parameters" in str(fnn.watch(loss, only="*/bias")(params, x, y))
    assert "Dense_3/kernel" in str(fnn.watch(loss, groups="gradient")(params, x, y))
    assert repr(between) == "Flow(loss=nan, 44 numbers of 4 layers)"
    seen = []
    jax.jit(lambda p: seen.append(str(fnn.watch(loss)(p, x, y))))(params)
    assert "traced" in seen[0]


def test_a_figure_leaves_out_what_is_zero_and_says_so(tmp_path):
    flow = fnn.watch(lambda p, x: jnp.mean(jax.nn.relu(x @ p["a"] - 1e9) @ p["b"]))(
        {"a": jnp.ones((8, 3)), "b": jnp.ones((3, 2))}, X
    )
    above, below = flow.plot(tmp_path / "flow.png").axes
    assert (tmp_path / "flow.png").stat().st_size > 1000
    labels = [line.get_label() for line in (*above.lines, *below.lines)]
    assert labels[1:3] == ["weight gradient (0 in 2 of 2 layers)", "input (0 in 1 of 2 layers)"]
    np.testing.assert_allclose(below.lines[0].get_ydata()[0], 0.5 * np.log10(np.mean(np.square(X))), atol=1e-6)
    assert np.isnan(below.lines[0].get_ydata()[1])
    with pytest.raises(ValueError, match=r"flow.plot: it draws"):
        fnn.watch(lambda p, x: jnp.mean(x @ p), groups="cosine")(jnp.ones((8, 3)), X).plot()


def test_traps_end_in_one_sentence():
    loss, params, batch = MODELS["plain_mlp"]()
    flow = fnn.watch(loss)(params, *batch)
    with pytest.raises(ValueError, match="one float, got .*pass has_aux=True if"):
        fnn.watch(lambda p, *b: (loss(p, *b), {"x": 1}))(params, *batch)
    with pytest.raises(ValueError, match=r"with has_aux=True the loss must return \(value, aux\), got float32"):
        fnn.watch(loss, has_aux=True).explain(params, *batch)
    with pytest.raises(
        ValueError, match="only must match a parameter's path, got 'kernel'; paths are like b1, scale, w1"
    ):
        fnn.watch(loss, only="kernel")(params, *batch)
    with pytest.raises(TypeError, match="only must be a pattern"):
        fnn.watch(loss, only=["w1"])
    with pytest.raises(ValueError, match="did you mean 'log10_gradient'"):
        flow.worst(3, "log10_grad")
    with pytest.raises(ValueError, match="k must be a positive integer"):
        flow.worst(0)
    with pytest.raises(TypeError, match="made on the host, got a flow of traced arrays"):
        jax.jit(lambda p: fnn.watch(loss)(p, *batch).rows())(params)
