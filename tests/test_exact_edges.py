"""Exact gradients at the edges: zeros, parts that lie far apart, rules that are not linear, operations that are not known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_exact import SMALL, W, X, drawn, leaves, values, with_rule

from fnn.gradients import exact, powers
from fnn.gradients.operations import Loop, prune
from fnn.gradients.program import equations, read, trace


def test_the_gradient_of_what_is_zero_is_minus_infinity_and_never_nan():
    def loss(p):
        dead = jax.nn.relu(-1.0 - p["dead"] ** 2)
        return jnp.sum(dead * p["behind"]) + jnp.sum(p["unused"] * 0.0) + jnp.sum(p["alive"] ** 2)

    found = jax.jit(exact.gradient(loss))(dict.fromkeys(("dead", "behind", "unused", "alive"), W))[1]
    assert {name: float(x.log_norm()) for name, x in found.items() if name != "alive"} == dict.fromkeys(
        ("dead", "behind", "unused"), -np.inf
    )
    np.testing.assert_allclose(found["alive"].log_norm(), np.log(np.linalg.norm(2 * W)), rtol=1e-6)
    assert not any(jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(values(found)))


# The identity forward; 2**-210 backward, in steps that float32 holds.
shrinking = with_rule(lambda x, g: functools.reduce(lambda g, _: g * jnp.float32(2.0**-30), range(7), g))


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_sum_whose_parts_lie_far_apart(gate):
    """Next to a part that is larger by 2**210 the other one rounds away; next to zeros it does not."""

    def loss(p):
        h = p["first"] * 1.0
        near = h * p["gate"]
        return jnp.sum(near) + jnp.sum(shrinking(h * p["far"]))

    params = {"first": jnp.ones(4), "far": jnp.ones(4), "gate": jnp.full(4, gate)}
    found = jax.jit(exact.gradient(loss))(params)[1]
    want = {"first": 0.0 if gate else -210.0, "far": -210.0, "gate": 0.0}
    for name, exponent in want.items():
        np.testing.assert_allclose(found[name].log_norm(), np.log(2) + exponent * np.log(2), rtol=1e-6, err_msg=name)


def test_rows_of_an_array_lie_far_apart():
    def loss(p):
        return jnp.sum(p[0]) + jnp.sum(shrinking(p[1])) + 0 * jnp.sum(p[2])

    (found,) = leaves(jax.jit(exact.gradient(loss))(jnp.ones((3, 4)))[1])
    np.testing.assert_allclose(found.log_norm(1), [np.log(2), -209 * np.log(2), -np.inf], rtol=1e-6)
    np.testing.assert_allclose(found.log_norm(), np.log(2), rtol=1e-6)


def test_layers_that_are_not_used_are_minus_infinity():
    """Layers by index become one concatenation, with zeros where nothing was taken."""

    def loss(p):
        return jnp.sum(p[1] * p[4]) + jnp.sum(shrinking(p[2]))

    found = jax.jit(exact.gradient(loss))(jnp.full((6, 4), 3.0))[1]
    far = np.log(2) - 210 * np.log(2)
    np.testing.assert_allclose(found.log_norm(1), [-np.inf, np.log(6), far, -np.inf, np.log(6), -np.inf], rtol=1e-6)


def test_how_often_arrays_are_normalised():
    """One pass over an array for each of these: the price of the whole."""

    def passes(function):
        def loss(p):
            return jnp.mean(functools.reduce(lambda x, w: function(x @ w), jnp.unstack(p), X))

        counts = []
        for depth in (3, 4):
            jaxpr = jax.make_jaxpr(lambda p: exact.gradient(loss)(p)[1].exponent)(jnp.zeros((depth, 4, 4)))
            counts.append(sum(name == "shift_right_arithmetic" for name, _ in equations(jaxpr)))
        return counts[1] - counts[0]

    # The last of each is that of the weight's gradient, where layers are put side by side.
    assert passes(jax.nn.relu) == 2
    assert passes(jax.nn.sigmoid) <= 3
    assert passes(jnp.tanh) <= 4
    assert passes(jax.nn.gelu) <= 6


def test_factors_that_are_tiny_everywhere():
    """Saturated units one behind the other: no such product goes unseen."""

    def loss(p, x):
        return jnp.sum(p * x * x * x * x * x) / 3

    compiled = jax.jit(exact.gradient(loss))
    for order in (-126, -63, 63):
        found = compiled(jnp.ones(4), jnp.full(4, 2.0**order))[1]
        np.testing.assert_allclose(found.log_norm(), np.log(2 / 3) + 5 * order * np.log(2), rtol=1e-6)


clipped = with_rule(lambda x, g: jnp.exp(jnp.clip(g, -1e-3, 1e-3)) - 1)


def test_a_rule_that_is_not_linear_is_undone_and_what_leaves_the_range_is_nan_with_its_place():
    def loss(p, scale):
        with jax.named_scope("clipping"):
            h = clipped(p)
        return jnp.sum(h) * scale * scale

    compiled = jax.jit(exact.gradient(loss, places=True))
    _, found, lost = compiled(W, jnp.float32(2.0**-6))
    np.testing.assert_allclose(values(found), jnp.full((4, 4), np.expm1(2.0**-12)), rtol=1e-3)
    assert lost and not any(lost.values())
    _, found, lost = compiled(W, SMALL)
    assert jnp.isnan(found.log_norm())
    (place,) = (name for name, left in lost.items() if left)
    assert place.startswith("exp in ") and "clipping" in place and "test_exact_edges.py:" in place


def test_a_lost_number_in_a_loop_and_a_branch_is_reported_outside():
    def loss(p, scale):
        def turn(x, i):
            return jax.lax.cond(i == 2, lambda x: clipped(x), lambda x: 1.0 * x, x), None

        return jnp.sum(jax.lax.scan(turn, p, jnp.arange(4))[0]) * scale * scale

    compiled = jax.jit(exact.gradient(loss, places=True))
    for scale, left in ((1.0, False), (SMALL, True)):
        _, found, lost = compiled(W, jnp.float32(scale))
        assert list(map(bool, lost.values())) == [left]
        assert bool(jnp.isnan(found.log_norm())) == left


unknown = with_rule(lambda x, g: jax.lax.igamma(jnp.ones_like(g), jnp.abs(g)))


def test_an_operation_that_is_not_known_warns_once_and_names_itself_and_its_place():
    def loss(p):
        return jnp.sum(unknown(unknown(p)))

    with pytest.warns(UserWarning) as seen:
        found = jax.jit(exact.gradient(loss))(W)[1]
    (message,) = {str(w.message) for w in seen if "exact gradients" in str(w.message)}
    assert "the operation igamma (" in message and "test_exact_edges.py:" in message
    np.testing.assert_allclose(values(found), jax.grad(loss)(W), rtol=1e-5)


def test_aux_and_lanes():
    def loss(p, x):
        y = jnp.tanh(x @ p)
        return jnp.mean(y**2), y

    (value, aux), found = exact.gradient(loss, has_aux=True)(W, X)
    (want, want_aux), plain = jax.jit(jax.value_and_grad(loss, has_aux=True))(W, X)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(aux, want_aux, rtol=1e-6)
    np.testing.assert_allclose(values(found), plain, rtol=1e-5)
    scales = jnp.array([1.0, 1e-30, 1e-37])
    logs = jax.jit(jax.vmap(lambda s: exact.gradient(lambda p: loss(p, X)[0] * s * s)(W)[1].log_norm()))(scales)
    np.testing.assert_allclose(logs, np.log(np.linalg.norm(plain)) + 2 * np.log(np.asarray(scales)), rtol=1e-5)


def test_notes_are_taken_where_values_are_made_and_stacked_over_the_turns_of_loops():
    params = 0.1 * drawn(3, 5, 4, 4)

    def loss(p):
        def outer(x, ws):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], None

        return jnp.sum(jax.lax.scan(outer, X, p)[0])

    closed, _ = trace(lambda seed, p: jax.vjp(loss, p)[1](seed)[0], jnp.float32(1), params)
    program = prune(read(closed))

    def loops(program):
        for op in program.ops:
            if isinstance(op, Loop):
                yield op
                yield from loops(op.body)

    _, first, backward, last = loops(program)
    assert backward.params["reverse"] and last.params["reverse"]
    (tanh,) = (op.outputs[0] for op in first.body.ops if op.name == "tanh")
    weight, error = last.outputs[-1], [op.outputs[0] for op in last.body.ops if op.name == "dot_general"]
    norm = {
        variable: (lambda known, name=name, variable=variable: {name: powers.scaled(known[variable]).log_norm()})
        for name, variable in {"activation": tanh, "a": error[0], "b": error[1], "result": program.outputs[0]}.items()
    }

    @jax.jit
    def run(seed, p):
        this = exact.run(norm)
        (gradient,) = this.execute(program, [exact.seed(jnp.float32), p])
        return gradient.log_norm(2), this.noted

    gradient, noted = run(jnp.float32(1), params)
    assert {name: x.shape for name, x in noted.items()} == {
        "activation": (3, 5),
        "a": (3, 5),
        "b": (3, 5),
        "result": (),
    }
    assert weight
    # One of the two products makes the weight's gradient: turn by turn the same numbers, in the order of the weights.
    assert any(np.allclose(noted[name], gradient, rtol=1e-5) for name in ("a", "b"))
    x, norms = X, []
    for w in params.reshape(15, 4, 4):
        x = jnp.tanh(x @ w)
        norms.append(np.log(np.linalg.norm(x)))
    np.testing.assert_allclose(noted["activation"].reshape(-1), norms, rtol=1e-5)
    np.testing.assert_allclose(noted["result"], jax.nn.logsumexp(2 * gradient) / 2, rtol=1e-5)
