"""Traced losses, rewritten: with another activation, or in float32, they equal losses that were written so."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, started

import fnn
from fnn.gradients import by_values, swap, wide

X = jax.random.normal(jax.random.key(0), (8, 5))
Y = jnp.arange(8) % 3
RNG = np.random.default_rng(0)
NAMES = ("sigmoid", "tanh", "relu", "gelu", "gelu_tanh", "silu", "elu", "selu", "softplus", "leaky_relu")


def loss_of(activation, **options):
    net = fnn.models.mlp(4, 16, 3, activation=activation, **options)
    params, state = net.init(jax.random.key(1), X)

    def loss(params, batch):
        return fnn.losses.cross_entropy(net.apply(params, state, batch[0], train=True)[0], batch[1]).mean()

    return loss, params


@pytest.mark.parametrize(
    ("name", "unroll"),
    [
        *((name, 1) for name in NAMES),
        *(pytest.param(name, True, marks=[pytest.mark.slow] * (name != "gelu")) for name in NAMES),
    ],
)
def test_a_swapped_net_has_the_loss_and_gradient_of_the_net_built_so(name, unroll):
    (loss, params), (built, _) = loss_of(name, unroll=unroll), loss_of("tanh", unroll=unroll)
    got = jax.jit(jax.value_and_grad(swap.swapped(loss, {"hidden": "tanh"})))(params, (X, Y))
    want = jax.jit(jax.value_and_grad(built))(params, (X, Y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


class Net(nn.Module):
    hidden: object
    last: object = None

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = self.hidden(nn.Dense(16)(x))
        x = nn.Dense(3)(x)
        return x if self.last is None else self.last(x)


def linen_loss(*functions):
    def loss(params, batch):
        outputs = Net(*functions).apply(params, batch[0])
        return jnp.mean((outputs - jax.nn.one_hot(batch[1], 3)) ** 2)

    return loss


@pytest.mark.parametrize("name", ["relu", "sigmoid", "gelu", "silu", "elu"])
def test_linen_under_vmap_and_grad(name):
    params = Net(jnp.tanh).init(jax.random.key(0), X)
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    new = swap.swapped(linen_loss(getattr(jax.nn, name)), {"hidden": "tanh"})
    got, want = (
        jax.jit(jax.vmap(jax.grad(f), in_axes=(0, None)))(several, (X, Y)) for f in (new, linen_loss(jnp.tanh))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


def test_the_last_activation_is_told_from_those_between_layers():
    params = Net(jnp.tanh).init(jax.random.key(0), X)
    loss = linen_loss(jnp.tanh, jax.nn.relu)
    found, stops, bare, over_time, again = swap.listed(loss, params, (X, Y))
    assert (
        [(a.name, a.role) for a in found] == [("tanh", "hidden")] * 2 + [("relu", "last")]
        and stops == bare == 0
        and over_time == ()
        and not again
    )
    without = swap.swapped(loss, {"last": "identity"})
    np.testing.assert_allclose(without(params, (X, Y)), linen_loss(jnp.tanh)(params, (X, Y)), rtol=1e-6)


def test_a_softmax_between_layers_is_told_from_that_of_attention():
    def loss(w, x):
        logits = x @ w["a"]
        attention = jax.nn.softmax(logits @ logits.T) @ x
        return jnp.mean((jax.nn.softmax(attention @ w["b"]) @ w["c"]) ** 2)

    w = {name: jax.random.normal(jax.random.key(i), (5, 5)) for i, name in enumerate("abc")}
    (found,) = swap.listed(loss, w, X)[0]
    assert (found.name, found.role) == ("softmax", "hidden")
    attention = jax.nn.softmax(X @ w["a"] @ (X @ w["a"]).T) @ X
    want = jnp.mean((jnp.tanh(attention @ w["b"]) @ w["c"]) ** 2)
    np.testing.assert_allclose(swap.swapped(loss, {"hidden": "tanh"})(w, X), want, rtol=1e-5)


def test_gates_and_what_the_loss_does_stay_as_they_are():
    def gated(w, x):
        h = jax.nn.sigmoid(x @ w["a"]) * jnp.tanh(x @ w["b"])
        return jnp.mean(jax.nn.log_sigmoid((h @ w["c"])[:, 0]))

    w = {name: jax.random.normal(jax.random.key(i), (5, 5)) for i, name in enumerate("abc")}
    found, *_ = swap.listed(gated, w, X)
    assert {a.role for a in found if a.name in ("sigmoid", "tanh")} == {"gate"}
    for chosen in ({"hidden": "relu"}, {"last": "relu"}):
        if not any(a.role in chosen for a in found):
            np.testing.assert_array_equal(swap.swapped(gated, chosen)(w, X), gated(w, X))


def test_an_lstm_keeps_its_gates():
    net = fnn.serial(fnn.lstm(6), fnn.take_last(), fnn.dense(3))
    x = as_jax(np.float32(RNG.normal(size=(8, 7, 4))))
    params, state = started(net.init, x)

    def outputs(params, x):
        return net.apply(params, state, x)[0]

    found, kept = (jax.jit(f)(params, x) for f in (swap.swapped(outputs, {"hidden": "relu"}), outputs))
    np.testing.assert_array_equal(found, kept)


def test_stopped_gradients_are_let_through():
    def loss(w, x):
        return jnp.sum(jax.lax.stop_gradient(jnp.tanh(x @ w[0])) @ w[1])

    w = [jnp.eye(5), jnp.eye(5)]
    assert swap.listed(loss, w, X)[1] == 1
    assert not np.any(jax.grad(loss)(w, X)[0])
    got = jax.grad(swap.swapped(loss, {"stop": "identity"}))(w, X)
    want = jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w[0]) @ w[1]))(w, X)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_an_activation_is_put_between_layers_that_follow_each_other_without_one(name):
    w = {name: RNG.normal(size=shape) / 2 for name, shape in (("a", (5, 6)), ("b", (6,)), ("c", (6, 6)), ("d", (6, 2)))}

    def loss(phi):
        def of(w, x):
            h = phi((x @ w["a"] + w["b"]).reshape(-1, 2, 3)).reshape(-1, 6)
            return jnp.sum(jnp.square(phi(jnp.asarray(h @ w["c"], jnp.float32)) @ w["d"]))

        return of

    bare = loss(lambda x: x)
    assert swap.listed(bare, w, X)[2] == 2 and swap.listed(loss(jnp.sin), w, X)[2] == 0
    got, want = swap.swapped(bare, {"bare": name}), loss(by_values.KNOWN[name])
    for one, other in zip(*(jax.tree.leaves(jax.jit(jax.value_and_grad(f))(w, X)) for f in (got, want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_lookup_and_gates_are_no_layers_that_lack_an_activation():
    w = {"table": jnp.ones((7, 5)), "q": jnp.eye(5), "v": jnp.eye(5), "out": jnp.eye(5)}

    def loss(w, ids):
        h = w["table"][ids]
        return jnp.sum(jax.nn.softmax((h @ w["q"]) @ h.T) @ (h @ w["v"]) @ w["out"])

    assert swap.listed(loss, w, jnp.arange(4))[2] == 0


@pytest.mark.parametrize(
    "function",
    [
        jnp.sin,
        jax.nn.mish,
        lambda x: jax.nn.relu(x) ** 2,
        lambda x: x * jnp.tanh(x),
        lambda x: x - jnp.tanh(x),
        jax.nn.relu6,
        lambda x: jnp.where(x > 0, 1.0, 0.0),
    ],
)
def test_a_function_that_is_none_of_the_known_ones_is_left_alone(function):
    """Whatever known ones are in it: mish is x tanh(softplus(x))."""

    def loss(w, x):
        return jnp.sum(function(x @ w) @ w)

    for x in (X, X[:1]):  # few numbers too
        assert swap.listed(loss, jnp.eye(5), x)[0] == []


def test_an_activation_before_a_norm_is_one():
    """RMS norm squares it, and uses it as it is; in half precision both read its cast."""

    def loss(w, x):
        h = jax.nn.relu(x @ w).astype(jnp.float32)
        return jnp.sum((h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)) @ w)

    assert [a.name for a in swap.listed(loss, jnp.eye(5), X)[0]] == ["relu"]
    half = jnp.eye(5, dtype=jnp.float16), jnp.asarray(X, jnp.float16)
    assert [a.name for a in swap.listed(loss, *half)[0]] == ["relu"]


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "silu", "softplus"])
def test_scaled_known_ones_and_those_of_a_branch_are_found(name):
    def loss(w, x):
        h = x @ w
        h = 1.3 * by_values.KNOWN[name](h)
        h = h @ w
        return jnp.sum((h + by_values.KNOWN[name](h)) @ w)  # what is added to a branch is one

    for x in (X, X[:1]):
        assert [(a.name, a.role) for a in swap.listed(loss, jnp.eye(5), x)[0]] == [(name, "hidden")] * 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", sorted(by_values.KNOWN.keys() - {"identity"}))
def test_known_ones_are_found_in_half_precision(name, dtype):
    """One unit in the last place of bfloat16 is 0.004 at 1: more than float32's tolerance. The two gelus are one there."""

    def loss(w, x):
        return jnp.sum(by_values.KNOWN[name](x @ w) @ w)

    (found,) = swap.listed(loss, jnp.eye(5, dtype=dtype), jnp.asarray(X, dtype))[0]
    assert found.name == name or {found.name, name} == {"gelu", "gelu_tanh"}


# Float32 in the place of less.


@jax.custom_vjp
def rounded(x):
    return jnp.sign(x)


rounded.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) < 1).astype(x.dtype),))


def looped(x, w):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), jnp.sum(h)), x, jnp.stack([w, w]))[0]


def branched(x, w):
    return jax.lax.cond(jnp.sum(w) > 0, lambda x: x @ w, lambda x: -x @ w, x)


BODIES = {
    "relu, whose rule gives 0 at 0": lambda x, w: jax.nn.relu((x @ w).at[:, 0].set(0)),
    "a rule of its own": lambda x, w: rounded(x @ w),
    "a scan": looped,
    "a branch": branched,
    "a while loop": lambda x, w: jax.lax.fori_loop(0, 2, lambda i, h: jnp.sin(h @ w), x),
    "a checkpoint": jax.checkpoint(lambda x, w: jax.nn.silu(x @ w)),
    "a softmax": lambda x, w: jax.nn.softmax(x @ w) * x,
    "a draw": lambda x, w: jnp.where(jax.random.bernoulli(jax.random.key(3), 0.8, x.shape), x @ w, 0),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.bfloat16) for name in BODIES),
        *(pytest.param(name, jnp.float16, marks=[pytest.mark.slow] * (name != "a scan")) for name in BODIES),
    ],
)
def test_a_program_in_float32_is_the_one_written_in_float32(name, dtype):
    def loss_in(dtype):
        def loss(w, x):
            return jnp.mean(jnp.square(BODIES[name](x.astype(dtype), w.astype(dtype))).astype(jnp.float32))

        return loss

    w = jax.random.normal(jax.random.key(1), (5, 5)) / 2
    assert wide.narrowest(loss_in(dtype), w, X) == jnp.dtype(dtype).name and not wide.narrowest(
        loss_in(jnp.float32), w, X
    )
    got = jax.jit(jax.value_and_grad(wide.in_float32(loss_in(dtype))))(w, X)
    want = jax.jit(jax.value_and_grad(loss_in(jnp.float32)))(w, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    several = jnp.stack([w, -w])
    got, want = (
        jax.jit(jax.vmap(jax.grad(f), (0, None)))(several, X)
        for f in (wide.in_float32(loss_in(dtype)), loss_in(jnp.float32))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_program_in_float32_already_stays_as_it_is():
    loss, params = loss_of("relu")
    got, want = (jax.jit(jax.value_and_grad(f))(params, (X, Y)) for f in (wide.in_float32(loss), loss))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def bce(z, y):
    return jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z)))


@pytest.mark.parametrize(
    "of_outputs, role",
    [
        (lambda z, y: optax.sigmoid_binary_cross_entropy(z, y), None),
        (lambda z, y: jax.nn.softplus(z) - y * z, None),
        (lambda z, y: jax.nn.softplus((1 - 2 * y) * z), None),
        (bce, None),
        (lambda z, y: optax.sigmoid_focal_loss(z, y), None),
        (lambda z, y: (jax.nn.softplus(z) - y) ** 2, "softplus"),
        (
            lambda z, y: -(y * jnp.log(jax.nn.sigmoid(z) + 1e-6) + (1 - y) * jnp.log(1 - jax.nn.sigmoid(z) + 1e-6)),
            "sigmoid",
        ),
        (lambda z, y: bce(jax.nn.relu(z), y), "relu"),
        (lambda z, y: -y * jnp.log(jax.nn.softmax(z) + 1e-6), "softmax"),
        (lambda z, y: optax.softmax_cross_entropy(jax.nn.softmax(z), y), "softmax"),
        (lambda z, y: optax.softmax_cross_entropy(z, y), None),
        (lambda z, y: jnp.exp(z) / jnp.sum(jnp.exp(z), -1, keepdims=True) * y, None),  # not shifted: it may overflow
    ],
)
def test_what_a_loss_computes_with_outputs_is_no_last_activation(of_outputs, role):
    params = {"a": RNG.normal(size=(5, 4)), "b": RNG.normal(size=(4, 2))}

    def loss(p, batch):
        return jnp.mean(of_outputs(jax.nn.relu(batch[0] @ p["a"]) @ p["b"], batch[1]))

    found, *_ = swap.listed(loss, params, (X, RNG.uniform(size=(8, 2))))
    assert {a.name for a in found if a.role == "last"} == ({role} if role else set())
    assert {a.name for a in found if a.role == "hidden"} == {"relu"}


def test_a_softmax_behind_the_last_layer_is_replaced():
    params = {"b": RNG.normal(size=(5, 3))}

    def loss(head):
        return lambda p, batch: jnp.mean((head(batch[0] @ p["b"]) - batch[1]) ** 2)

    y = RNG.uniform(size=(8, 3))
    for by, head in (("sigmoid", jax.nn.sigmoid), ("identity", lambda z: z)):
        got = jax.grad(swap.swapped(loss(jax.nn.softmax), {"last": by}))(params, (X, y))
        np.testing.assert_allclose(got["b"], jax.grad(loss(head))(params, (X, y))["b"], rtol=1e-5, atol=1e-7)
