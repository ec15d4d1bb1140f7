"""diff finds nothing between ports of one net, and names what was planted where there is something."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fnn

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 8))
Y = jax.random.normal(jax.random.key(2), (6, 3))
SIZES = (8, 16, 16, 3)
KERNELS = [
    jax.random.normal(jax.random.fold_in(KEY, i), (m, n)) / m**0.5 for i, (m, n) in enumerate(itertools.pairwise(SIZES))
]
BIASES = [0.1 * jax.random.normal(jax.random.fold_in(KEY, 10 + i), (n,)) for i, n in enumerate(SIZES[1:])]
PLAIN = {"kernels": KERNELS, "biases": BIASES}


def plain(params, x, y, activation=jnp.tanh, change=lambda i, h: h):
    h = x
    for i, (kernel, bias) in enumerate(zip(params["kernels"], params["biases"], strict=True)):
        h = change(i, h @ kernel + bias)
        h = activation(h) if i < 2 else h
    return jnp.mean((h - y) ** 2)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(SIZES[1:]):
            x = nn.Dense(width)(x)
            x = jnp.tanh(x) if i < 2 else x
        return x


def linen():
    params = {f"Dense_{i}": {"kernel": k, "bias": b} for i, (k, b) in enumerate(zip(KERNELS, BIASES, strict=True))}
    return lambda p, x, y: jnp.mean((Linen().apply({"params": p}, x) - y) ** 2), params


def equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(8, 3, 16, 2, activation=jnp.tanh, key=KEY)
    weights = [a for k, b in zip(KERNELS, BIASES, strict=True) for a in (k.T, b)]
    net = eqx.tree_at(lambda n: [a for layer in n.layers for a in (layer.weight, layer.bias)], net, weights)
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    return lambda p, x, y: jnp.mean((jax.vmap(eqx.combine(p, rest))(x) - y) ** 2), params


def of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(SIZES)])

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = jnp.tanh(layer(x))
            return self.layers[-1](x)

    net = Net(nnx.Rngs(0))
    for layer, k, b in zip(net.layers, KERNELS, BIASES, strict=True):
        layer.kernel, layer.bias = nnx.Param(k), nnx.Param(b)
    graph, params = nnx.split(net)
    return lambda p, x, y: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2), params


def of_fnn():
    net = fnn.serial(fnn.dense(16), fnn.activation("tanh"), fnn.dense(16), fnn.activation("tanh"), fnn.dense(3))
    params, state = net.init(KEY, X)
    params = tuple(
        {"kernel": KERNELS[i // 2], "bias": BIASES[i // 2]} if i % 2 == 0 else p for i, p in enumerate(params)
    )
    return lambda p, x, y: jnp.mean((net.apply(p, state, x)[0] - y) ** 2), params


@pytest.mark.parametrize("port", [linen, equinox, of_nnx, of_fnn])
def test_ports_of_one_mlp_are_equal(port):
    loss, params = port()
    found = fnn.diff(plain, loss)(PLAIN, params, X, Y)
    assert found.equal and found.verdict == "equal to rounding", str(found)
    assert len(found.rows()) == 12 and max(row.difference for row in found.rows()) < 1e-6
    np.testing.assert_allclose(found.loss.a, found.loss.b, rtol=1e-6)


def rows_of(found):
    return {(row.layer, row.quantity): row for row in found.rows()}


def test_a_missing_bias():
    other = PLAIN | {"biases": [BIASES[0], 0 * BIASES[1], BIASES[2]]}
    found = fnn.diff(plain, plain)(PLAIN, other, X, Y)
    rows = rows_of(found)
    assert (found.first_forward, found.equal) == (2, False)
    assert not rows[2, "weight"].differs and not rows[2, "input"].differs and rows[2, "output"].differs
    h = jnp.tanh(X @ KERNELS[0] + BIASES[0]) @ KERNELS[1]
    expected = jnp.linalg.norm(jnp.broadcast_to(BIASES[1], h.shape)) / max(
        jnp.linalg.norm(h), jnp.linalg.norm(h + BIASES[1])
    )
    np.testing.assert_allclose(rows[2, "output"].difference, expected, rtol=1e-5)
    assert "from layer 2 on" in found.verdict and "bias?" in found.verdict


def test_a_transposed_weight():
    other = PLAIN | {"kernels": [KERNELS[0], KERNELS[1].T, KERNELS[2]]}
    found = fnn.diff(plain, plain)(PLAIN, other, X, Y)
    assert found.first_forward == 2 and "transposed" in found.verdict
    assert "the weight of kernels/1" in found.verdict


def test_gelu_exact_and_its_approximation():
    def gelu(approximate):
        return lambda p, x, y: plain(p, x, y, lambda h: jax.nn.gelu(h, approximate=approximate))

    found = fnn.diff(gelu(True), gelu(False))(PLAIN, PLAIN, X, Y)
    rows = rows_of(found)
    assert found.first_forward == 2 and rows[2, "input"].differs and not rows[1, "output"].differs
    assert "what lies between kernels/0 and it" in found.verdict and "activation?" in found.verdict


def test_dropout_left_on():
    def dropped(p, x, y):
        def change(i, h):
            return jnp.where(jax.random.bernoulli(jax.random.key(i), 0.5, h.shape), 2 * h, 0) if i == 1 else h

        return plain(p, x, y, change=change)

    found = fnn.diff(plain, dropped)(PLAIN, PLAIN, X, Y)
    assert found.first_forward == 3 and "dropout" in found.verdict and "zeros in b" in found.verdict


def test_a_stop_gradient_changes_gradients_alone():
    def stopped(p, x, y):
        return plain(p, x, y, change=lambda i, h: jax.lax.stop_gradient(h) if i == 1 else h)

    found = fnn.diff(plain, stopped)(PLAIN, PLAIN, X, Y)
    assert (found.first_forward, found.first_backward) == (None, 2)
    assert "forward values are equal to rounding" in found.verdict and "stop_gradient?" in found.verdict


def test_swapped_layers():
    shape = (4, 16, 16)
    ws = jax.random.normal(KEY, shape) / 4
    h = jax.random.normal(KEY, (6, 16))

    def loss(p, x):
        return jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0] ** 2)

    found = fnn.diff(loss, loss)(ws, ws[jnp.array([0, 2, 1, 3])], h)
    assert found.first_forward == 2 and "swapped?" in found.verdict, str(found)
    fine = fnn.diff(loss, loss, pairs={"[1]": "[2]", "[2]": "[1]"})(ws, ws[jnp.array([0, 2, 1, 3])], h)
    assert not rows_of(fine)[2, "weight"].differs and rows_of(fine)[2, "input"].differs


def test_layers_without_a_partner_are_listed_and_pairs_override():
    def shallow(p, x, y):
        h = jnp.tanh(x @ p["kernels"][0] + p["biases"][0])
        return jnp.mean((h @ p["kernels"][2] + p["biases"][2] - y) ** 2)

    found = fnn.diff(plain, shallow)(PLAIN, PLAIN, X, Y)
    assert found.unpaired_a == ("kernels/1",) and not found.equal and "1 layer has no partner" in found.verdict
    assert found.alone_a == ("biases/0", "biases/1", "biases/2")
    with pytest.raises(ValueError, match="diff: unknown pairs 'kernel/1'; did you mean 'kernels/1'"):
        fnn.diff(plain, shallow, pairs={"kernel/1": "kernels/0"})(PLAIN, PLAIN, X, Y)
    with pytest.raises(ValueError, match="diff: loss_b must be one float"):
        fnn.diff(plain, lambda p, x, y: x @ p["kernels"][0])(PLAIN, PLAIN, X, Y)


def test_print_and_table():
    found = fnn.diff(plain, plain)(PLAIN, PLAIN | {"biases": [b * 0 for b in BIASES]}, X, Y)
    text = str(found).split("\n")
    assert text[0] == found.verdict and text[2].split() == ["layer", "a", "b", "weight", "input", "output", "gradient"]
    table = found.table()
    assert table.columns[:5] == ["layer", "path_a", "path_b", "quantity", "difference"] and len(table) == 12


# A transformer block, in a scan and written out --------------------------------------------------------------------------

D, HEADS, T = 16, 4, 5
TOKENS = jax.random.normal(jax.random.key(3), (2, T, D))


def transformer_params(depth=2):
    shapes = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, 32), "down": (32, D)}
    keys = iter(jax.random.split(KEY, 20))
    params = {name: jax.random.normal(next(keys), (depth, *shape)) / shape[0] ** 0.5 for name, shape in shapes.items()}
    return params | {"scale": 1 + 0.1 * jax.random.normal(next(keys), (depth, 2, D))}


def norm(x, scale, eps=1e-5):
    return scale * (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + eps)


def block(p, x, split, eps=1e-5):
    h = norm(x, p["scale"][0], eps)
    if split:  # heads as axes of the kernels, and in another order
        k, v, q = (jnp.einsum("btd,dhk->bhtk", h, p[n].reshape(D, HEADS, -1)) for n in ("k", "v", "q"))
        a = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, k) / 2.0)
        x = x + jnp.einsum("bhsk,bhts,hkd->btd", v, a, p["o"].reshape(HEADS, -1, D))
    else:
        q, k, v = ((h @ p[n]).reshape(2, T, HEADS, -1) for n in ("q", "k", "v"))
        a = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2.0)
        x = x + jnp.einsum("bhts,bshk->bthk", a, v).reshape(2, T, D) @ p["o"]
    return x + jax.nn.gelu(norm(x, p["scale"][1]) @ p["up"]) @ p["down"]


def scanned(p, x):
    return jnp.mean(jax.lax.scan(jax.checkpoint(lambda h, q: (block(q, h, False), None)), x, p)[0] ** 2)


def written(p, x, split=True, odd=None):
    for i, q in enumerate(p):
        x = block(q, x, split, 1e-6 if i == odd else 1e-5)
    return jnp.mean(x**2)


def blocks(params):
    return [jax.tree.map(lambda a, i=i: a[i], params) for i in range(2)]


def test_a_scan_over_blocks_is_equal_to_blocks_written_out():
    params = transformer_params()
    found = fnn.diff(scanned, written)(params, blocks(params), TOKENS)
    assert found.equal and len(found.rows()) == 48, str(found)
    assert {(row.path_a, row.path_b) for row in found.rows() if row.layer == 1} in (
        {("q[0]", "0/q")},
        {("k[0]", "0/k")},
    )


def test_another_epsilon_between_layers():
    def normed(p, x, y, eps):
        def change(i, h):
            centred = h - h.mean(-1, keepdims=True)
            return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps) if i == 1 else h

        return plain(p, x, y, change=change)

    found = fnn.diff(*(lambda p, x, y, eps=eps: normed(p, x, y, eps) for eps in (1e-6, 1e-2)))(PLAIN, PLAIN, X, Y)
    rows = rows_of(found)
    assert found.first_forward == 3 and rows[3, "input"].differs and "epsilon" in found.verdict, str(found)


def test_another_epsilon_in_one_norm():
    params = transformer_params()
    found = fnn.diff(scanned, lambda p, x: written(p, x, odd=1))(params, blocks(params), TOKENS)
    rows = rows_of(found)
    assert found.first_forward == 7 and rows[7, "input"].differs and "epsilon" in found.verdict, str(found)


# Images, channels first and last -----------------------------------------------------------------------------------------


def images(first):
    def loss(p, x):
        names = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")
        h = x if first else x.transpose(0, 2, 3, 1)
        for kernel in p["conv"]:
            h = jnp.tanh(jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=names))
        return jnp.mean((h.reshape(len(h), -1) @ p["dense"]) ** 2)

    return loss


def test_channels_first_and_last():
    rng = np.random.default_rng(0)
    conv, dense, x = (np.float32(rng.normal(size=s) / 4) for s in ((4, 3, 3, 3), (4, 5, 4, 10), (2, 3, 5, 4)))
    conv = [conv]
    params_a = {"conv": conv, "dense": dense.reshape(-1, 10)}
    params_b = {
        "conv": [c.transpose(2, 3, 1, 0) for c in conv],
        "dense": dense.transpose(1, 2, 0, 3).reshape(-1, 10),
    }
    found = fnn.diff(images(True), images(False))(params_a, params_b, x)
    assert found.equal and "order of entries" in str(found), str(found)
    wrong = fnn.diff(images(True), images(False))(params_a, params_b | {"dense": params_a["dense"]}, x)
    assert wrong.first_forward == 2 and rows_of(wrong)[2, "output"].differs, str(wrong)


# Other ways to write the same ---------------------------------------------------------------------------------------------


def test_gradients_outside_of_products_count_too():
    def stopped(p, x, y):
        return plain(p | {"biases": jax.lax.stop_gradient(p["biases"])}, x, y)

    found = fnn.diff(plain, stopped)(PLAIN, PLAIN, X, Y)
    assert not found.equal and found.first_backward is None
    assert "the whole gradient of biases/0, biases/1, biases/2 is not" in found.verdict


def test_a_long_print_shows_the_ends_and_where_the_difference_begins():
    def loss(p, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0])

    stack = jax.random.normal(jax.random.key(0), (50, 4, 4)) / 2
    found = fnn.diff(loss, loss)(stack, stack.at[24].mul(1.01), jnp.ones((3, 4)))
    layers = [int(line.split()[0]) for line in str(found).splitlines() if line[:1].isdigit()]
    assert found.first_forward == 25
    assert layers == [*range(1, 7), *range(22, 29), *range(45, 51)]
    assert str(found).count("\n...") == 2


def test_a_loss_with_aux_is_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match=r"diff: loss_b must be one float, got \(float32\[\], int\); wrap it to return the first"
    ):
        fnn.diff(lambda p, x: jnp.mean(x @ p), lambda p, x: (jnp.mean(x @ p), 1))(*[jnp.ones((2, 2))] * 3)
