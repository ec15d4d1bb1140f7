"""Other ways to write the same net: fnn.diff finds the same numbers in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_diff import BIASES, KERNELS, KEY, PLAIN, X, Y, plain

import fnn


def test_weights_side_by_side_are_equal_to_single_ones():
    lstm, optimized = nn.RNN(nn.LSTMCell(8)), nn.RNN(nn.OptimizedLSTMCell(8))
    x = jax.random.normal(KEY, (3, 7, 5))
    params = jax.jit(lstm.init)(KEY, x)["params"]
    losses = [lambda p, x, net=net: jnp.mean(net.apply({"params": p}, x) ** 2) for net in (lstm, optimized)]
    found = fnn.diff(*losses)(params, params, x)
    assert found.equal and len(found.rows()) == 8, str(found)
    assert any(" + " in row.path_a for row in found.rows())
    wrong = jax.tree.map(lambda a: a, params)
    wrong["cell"]["hg"]["kernel"] *= 1.01
    assert "weight" in fnn.diff(*losses)(params, wrong, x).verdict


def test_a_recurrent_net_in_a_scan_and_written_out():
    params = {"x": jax.random.normal(KEY, (4, 6)) / 2, "h": jax.random.normal(jax.random.key(5), (6, 6)) / 2.4}
    xs = jax.random.normal(KEY, (3, 7, 4))

    def scanned(p, x):
        def step(h, now):
            h = jnp.tanh(now @ p["x"] + h @ p["h"])
            return h, h

        return jnp.mean(jax.lax.scan(step, jnp.zeros((3, 6)), x.swapaxes(0, 1))[1] ** 2)

    def written(p, x):
        h, seen = jnp.zeros((3, 6)), []
        for t in range(7):
            h = jnp.tanh(x[:, t] @ p["x"] + h @ p["h"])
            seen.append(h)
        return jnp.mean(jnp.stack(seen) ** 2)

    found = fnn.diff(scanned, written)(params, params, xs)
    assert found.equal and len(found.rows()) == 8, str(found)


def test_a_lookup_and_a_product_with_one_hot_vectors():
    table, weight = jax.random.normal(KEY, (11, 6)), jax.random.normal(KEY, (6, 6))
    tokens = jax.random.randint(KEY, (3, 5), 0, 11)

    def loss(p, h):
        return jnp.mean(jax.nn.logsumexp(jnp.tanh(h @ p[1]) @ p[0].T, -1))

    found = fnn.diff(lambda p, t: loss(p, p[0][t]), lambda p, t: loss(p, jax.nn.one_hot(t, 11) @ p[0]))(
        (table, weight), (table, weight), tokens
    )
    assert found.equal and [row.path_a for row in found.rows() if row.quantity == "gradient"] == ["0", "1", "0"]


def test_units_in_another_order_are_a_matter_of_layout():
    order = np.random.default_rng(0).permutation(16)
    other = {
        "kernels": [KERNELS[0][:, order], KERNELS[1][order], KERNELS[2]],
        "biases": [BIASES[0][order], *BIASES[1:]],
    }
    found = fnn.diff(plain, plain)(PLAIN, other, X, Y)
    assert found.equal and "order of entries" in str(found), str(found)


def test_bfloat16_has_its_own_rounding():
    def coarse(p, x, y):
        p, x, y = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (p, x, y))
        return plain(p, x, y).astype(jnp.float32)

    found = fnn.diff(coarse, plain)(PLAIN, PLAIN, X, Y)
    assert found.equal, str(found)
    strict = fnn.diff(coarse, plain, tolerance=1e-4)(PLAIN, PLAIN, X, Y)
    assert strict.first_forward == 1 and not strict.equal


def test_numbers_that_are_not_finite_and_losses_that_differ_alone():
    found = fnn.diff(plain, lambda p, x, y: plain(p, x, y, jnp.log))(PLAIN, PLAIN, X, Y)
    assert found.first_forward == 2 and "not finite in b" in found.verdict
    found = fnn.diff(plain, lambda p, x, y: 1.1 * plain(p, x, y))(PLAIN, PLAIN, X, Y)
    assert "the losses differ too" in found.verdict and "b is 1.1 times a" in found.verdict
    found = fnn.diff(plain, lambda p, x, y: plain(p, x, y) + 1)(PLAIN, PLAIN, X, Y)
    assert "all layers are equal to rounding, the losses are not" in found.verdict


def test_a_relu_that_changes_sides_by_rounding_is_no_difference():
    # twenty units whose arguments are 3e-5, far from 0 as seen by one unit in the last place, near as seen by its root
    x = jnp.ones((8, 2))
    w = jax.random.normal(KEY, (2, 40)).at[:, :20].set(jnp.array([[1.00003], [-1.0]]))

    def loss(bias):
        def run(p, x):
            h = x @ p
            # one of them changes sides, which nobody sees in the output of the layer
            return jnp.mean(jnp.where(h > bias, h, 0)) + jnp.mean(h[:, 20:] ** 2)

        return run

    found = fnn.diff(loss(jnp.zeros(40)), loss(jnp.zeros(40).at[0].set(1e-4)))(w, w, x)
    gradient = next(row for row in found.rows() if row.quantity == "gradient")
    assert found.equal and gradient.difference > 1e-3 and "changes sides" in gradient.note, str(found)


def other_gradient(rule):
    """The identity, with a gradient of another kind."""
    same = jax.custom_vjp(lambda v: v)
    same.defvjp(lambda v: (v, None), lambda _, g: (rule(g),))
    return same


@pytest.mark.parametrize("rule", [lambda g: -g, lambda g: g[::-1]], ids=["sign", "order"])
def test_gradients_outside_of_products_of_the_same_norm(rule):
    def loss(gain):
        return lambda p, x, y: plain({**p, "biases": [gain(b) for b in p["biases"]]}, x, y)

    found = fnn.diff(loss(lambda b: b), loss(other_gradient(rule)))(PLAIN, PLAIN, X, Y)
    assert not found.gradient.differs and not found.equal, str(found)
    assert {row.path_a for row in found.parameters if row.differs} >= {"biases/0", "biases/1"}
    # other names: a port; a sign is seen, an order may be one of layout
    port = fnn.diff(loss(lambda b: b), lambda p, x, y: loss(other_gradient(rule))(p["net"], x, y))
    ported = port(PLAIN, {"net": PLAIN}, X, Y)
    assert ported.equal == (rule(np.array([1, 2]))[0] == 2), str(ported)


def test_a_penalty_on_one_side_is_no_matter_of_the_last_layer():
    def penalised(p, x, y):
        return plain(p, x, y) + 0.01 * jnp.sum(p["kernels"][1] ** 2)

    found = fnn.diff(plain, penalised)(PLAIN, PLAIN, X, Y)
    assert not found.equal and [row.path_a for row in found.parameters if row.differs] == ["kernels/1"]
    assert "kernels/1" in found.verdict and "penalty" in found.verdict and "last layer" not in found.verdict
