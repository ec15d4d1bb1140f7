"""first_bad names the operation that was planted, its layer, and why; it stays silent where nothing is wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fnn.gradients.bad import first_bad
from fnn.gradients.watch import watch


def source(found):
    """What made the infinity, if one is behind it."""
    return found.origin or found


X = jax.random.normal(jax.random.key(1), (3, 4))
W = jax.random.normal(jax.random.key(0), (5, 4, 4)) / 2
B = jnp.zeros((5, 4))


def stacked(f=jnp.tanh, end=jnp.square):
    """A net of five layers in a scan, computed anew on the way back."""

    def loss(p, x):
        def body(h, wb):
            return f(h @ wb[0] + wb[1]), None

        h, _ = jax.lax.scan(jax.checkpoint(body), x, (p["w"], p["b"]))
        return jnp.mean(end(h))

    return loss


def test_a_healthy_net_gives_none():
    assert first_bad(stacked(), {"w": W, "b": B}, X) is None
    assert watch(stacked()).first_bad({"w": W, "b": B}, X) is None


@pytest.mark.parametrize(("row", "value", "what"), [(3, jnp.nan, "3 NaN"), (2, jnp.inf, "3 +inf")])
def test_bad_numbers_in_a_parameter_are_named_as_such(row, value, what):
    found = first_bad(stacked(), {"w": W.at[row, 0, :3].set(value), "b": B}, X)
    assert found.operation == "parameter" and found.layer == "w" and f"params: w has {what}" in found.cause


def test_an_infinite_batch_is_named_as_such():
    found = first_bad(stacked(jnp.sin), {"w": W, "b": B}, X.at[1, 2].set(jnp.inf))
    assert found.operation == "input" and "1 +inf" in found.cause and "params" in str(found)


def test_log_of_a_negative_number_in_the_fourth_turn_of_a_scan():
    bias = B + 5.0
    found = first_bad(stacked(lambda h: jnp.log(h)), {"w": W * 0.1, "b": bias.at[3].set(-1.0)}, X)
    assert (found.operation, found.backward, found.turns, found.lengths) == ("log", False, (3,), (5,))
    assert found.layer in ("w[3]", "b[3]") and "log of a negative number" in found.cause
    assert found.inputs[0].high < 0 and found.inputs[0].nans == 0


def test_exp_overflow_in_a_loop():
    found = first_bad(stacked(jnp.exp, jnp.sum), {"w": W * 0, "b": B.at[4].set(100.0)}, X)
    assert (found.what, found.operation, found.layer) == ("infinity", "exp", "w[4]")
    assert "88.72" in found.cause and found.inputs[0].high == 100 and 5 <= len(str(found).split("\n")) + 1 <= 10


def test_the_same_in_nested_scans():
    def loss(p, x):
        def inner(h, w):
            return jnp.log(h @ w), None

        def outer(h, w):
            return jax.lax.scan(inner, h, w)[0], None

        return jnp.mean(jax.lax.scan(jax.checkpoint(outer), x, p["w"])[0])

    eyes = jnp.broadcast_to(3.0 * jnp.eye(4), (3, 2, 4, 4)).at[1, 1].set(-3.0 * jnp.eye(4))
    found = first_bad(loss, {"w": eyes}, jnp.full((3, 4), 5.0))
    assert (found.operation, found.layer, found.turns, found.lengths) == ("log", "w[1][1]", (1, 1), (3, 2))


def test_a_loop_that_runs_backwards_and_one_that_takes_layers_by_number():
    def reverse(p, x):
        return jnp.mean(jax.lax.scan(lambda h, w: (jnp.log(h @ w), None), x, p["w"], reverse=True)[0])

    def numbered(p, x):
        return jnp.mean(jax.lax.scan(lambda h, i: (jnp.log(h @ p["w"][4 - i]), None), x, jnp.arange(5))[0])

    eyes = jnp.broadcast_to(3.0 * jnp.eye(4), (5, 4, 4)).at[3].set(-3.0 * jnp.eye(4)).at[0].set(-3.0 * jnp.eye(4))
    for loss, turn in ((reverse, 3), (numbered, 1)):
        found = first_bad(loss, {"w": eyes}, jnp.full((3, 4), 5.0))
        assert (found.operation, found.layer, found.turns) == ("log", "w[3]", (turn,))


def test_masks_are_fine_until_a_row_is_masked_entirely():
    def loss(p, x, mask):
        return jnp.mean(jax.nn.softmax(jnp.where(mask, x @ p["w"], -jnp.inf)) ** 2)

    mask = jnp.tril(jnp.ones((3, 4), bool))
    params = {"w": W[0]}
    assert first_bad(loss, params, X, mask) is None
    found = first_bad(loss, params, X, mask.at[1].set(False))
    assert (found.operation, found.what, found.layer, found.backward) == ("sub", "NaN", "w", False)
    assert "masked entirely" in found.cause and found.origin is None


def test_a_mask_in_the_batch_is_like_one_in_the_program():
    def loss(p, x, mask):
        return jnp.mean(jax.nn.softmax(x @ p["w"] + mask) ** 2)

    mask = jnp.where(jnp.tril(jnp.ones((3, 4), bool)), 0.0, -jnp.inf)
    assert first_bad(loss, {"w": W[0]}, X, mask) is None
    found = first_bad(loss, {"w": W[0]}, X, mask.at[2].set(-jnp.inf))
    assert found.operation == "sub" and "masked entirely" in found.cause and found.origin.operation == "input"


def test_the_norm_of_a_zero_vector():
    found = first_bad(lambda p, x: jnp.mean(jnp.linalg.norm(x @ p["w"], axis=-1)), {"w": W[0] * 0}, X)
    assert (found.operation, found.what, found.backward, found.layer) == ("mul", "NaN", True, "w")
    assert found.origin.operation == "div" and "norm of a zero vector" in found.origin.cause
    assert "0 times infinity" in found.cause


def test_sqrt_of_zero_has_an_infinite_derivative():
    found = first_bad(lambda p, x: jnp.sum(jnp.sqrt(p["b"])), {"b": jnp.zeros(3)}, X)
    assert found.backward and "derivative of sqrt at 0" in str(found) and found.layer == "b"


def test_a_gradient_through_the_other_branch_of_where():
    def loss(p, x):
        h = jnp.maximum(x @ p["w"], 0)
        return jnp.mean(jnp.where(h > 0, jnp.log(h), 0))

    found = first_bad(loss, {"w": W[0]}, X)
    assert found.what == "NaN" and found.backward and "where" in found.cause

    def negative(p, x):
        h = x @ p["w"]
        return jnp.mean(jnp.where(h > 0, jnp.sqrt(h), 0))

    found = first_bad(negative, {"w": W[0]}, X)
    assert found.operation == "sqrt" and "where" in found.cause and found.inputs[0].low < 0

    def guarded(p, x):
        h = x @ p["w"]
        return jnp.mean(jnp.where(h > 0, jnp.sqrt(jnp.where(h > 0, h, 1)), 0))

    assert first_bad(guarded, {"w": W[0]}, X) is None


@pytest.mark.parametrize(
    ("function", "operation", "words"),
    [
        (lambda h: 1 / (h * 0), "div", "division by 0"),
        (lambda h: jax.lax.rsqrt(h * 0), "rsqrt", "rsqrt of 0"),
        (lambda h: -jnp.log(h * 0), "log", "log of 0"),
        (lambda h: jnp.exp(h * h * 1000), "exp", "overflows"),
        (lambda h: (h * 1e30) * 1e30, "mul", "overflows"),
        (lambda h: jnp.power(-jnp.abs(h) - 1, 0.5), "pow", "power"),
        (lambda h: (h * 0) / (h * 0), "div", "0 divided by 0"),
        (lambda h: jnp.arccos(h * 0 + 2), "acos", "outside"),
        (lambda h: jnp.sin(h * jnp.inf), "sin", "written in the program"),
        (lambda h: jnp.linalg.cholesky(-jnp.eye(4) - h.T @ h), "cholesky", "positive definite"),
    ],
)
def test_single_operations(function, operation, words):
    found = first_bad(lambda p, x: jnp.mean(function(x @ p["a"]["kernel"])), {"a": {"kernel": W[0]}}, X)
    made = source(found)
    assert (made.operation, made.layer, made.backward) == (operation, "a/kernel", False)
    assert words in made.cause and words in found.cause, found.cause


def test_infinity_minus_infinity_and_where_they_come_from():
    found = first_bad(lambda p, x: jnp.mean(jnp.exp(x @ p["w"] + 100) - jnp.exp(x @ p["w"] + 101)), {"w": W[0]}, X)
    assert (found.operation, found.what, found.origin.operation) == ("sub", "NaN", "exp")
    assert "infinity minus infinity" in found.cause and "the largest input is" in found.origin.cause


def test_what_runs_as_one_operation_is_named():
    def branch(p, x):
        return jnp.mean(jax.lax.cond(x[0, 0] > -9, jnp.log, jnp.sin, x @ p["w"]))

    assert first_bad(branch, {"w": W[0]}, X).operation == "cond"

    def loop(p, x):
        h = jax.lax.stop_gradient(x @ p["w"])
        h, _ = jax.lax.while_loop(lambda s: s[1] < 3, lambda s: (jnp.log(s[0] - 5), s[1] + 1), (h, 0))
        return jnp.mean(p["w"]) + jnp.mean(h)

    found = first_bad(loop, {"w": W[0]}, X)
    assert (found.operation, found.layer) == ("while", "w")

    def sharded(p, x):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
        run = jax.shard_map(lambda h: jnp.log(h), mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
        return jnp.mean(run(x @ p["w"]))

    assert first_bad(sharded, {"w": W[0]}, X).operation == "shard_map"


def test_the_branch_that_where_does_not_take_is_no_cause():
    def loss(p, x):
        h = x @ p["w"]
        return jnp.mean(jnp.where(h > 0, jnp.log(h), jnp.arccos(2 - h)))

    found = first_bad(loss, {"w": W[0]}, X)
    assert (found.operation, found.what, found.backward) == ("acos", "NaN", False)


def test_float16_ends_at_65504():
    params = {"w": W[0].astype(jnp.float16)}
    found = first_bad(
        lambda p, x: jnp.mean((x @ p["w"]) * jnp.float16(300) * jnp.float16(300)), params, X.astype(jnp.float16)
    )
    assert source(found).operation == "mul" and "65504" in found.cause

    def cast(p, x):
        return jnp.mean(((x @ p["w"]) * 1e6).astype(jnp.float16))

    found = first_bad(cast, {"w": W[0]}, X)
    assert source(found).operation == "convert_element_type" and "65504" in found.cause


def test_a_gradient_that_overflows_though_the_loss_does_not():
    found = first_bad(lambda p, x: jnp.mean(jnp.tanh(x @ p["w"] * 1e30) * 1e30), {"w": W[0] * 1e-30}, X * 1.0)
    assert found.backward and found.layer == "w" and "overflows" in found.cause


class Linen(nn.Module):
    depth: int = 3

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, h, _):
                return jnp.log(nn.Dense(4)(h)), None

        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        h, _ = scanned(name="blocks")(x, None)
        return nn.Dense(1)(h)


def test_linen_inside_scan():
    model = Linen()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    params["blocks"]["Dense_0"]["kernel"] *= 0.01
    params["blocks"]["Dense_0"]["bias"] = jnp.full((3, 4), 4.0).at[2].set(-4.0)
    found = watch(lambda p, x: jnp.mean(model.apply({"params": p}, x))).first_bad(params, X)
    assert (found.operation, found.layer, found.turns) == ("log", "blocks/Dense_0/kernel[2]", (2,))
    assert "blocks" in found.where


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            h = self.b(jnp.tanh(self.a(x)))
            return h / jnp.linalg.norm(h * 0, axis=-1, keepdims=True)

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    found = first_bad(lambda p, x: jnp.mean(nnx.merge(graph, p)(x)), params, X)
    assert (source(found).operation, source(found).layer) == ("div", "b/kernel")
    assert "division by 0" in found.cause and "zero vector" in found.cause


def test_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(4, 1, 8, 2, activation=lambda x: jnp.exp(x * x), key=jax.random.key(0))
    net = eqx.tree_at(lambda n: n.layers[1].weight, net, net.layers[1].weight * 100)
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    found = first_bad(lambda p, x: jnp.mean(jax.vmap(eqx.combine(p, rest))(x)), params, X)
    assert source(found).operation == "exp" and source(found).layer == "layers/1/weight"


def test_batch_norm_over_a_mapped_axis_and_auxiliary_results():
    def loss(p, x):
        h = x @ p["w"]
        h = (h - jax.lax.pmean(h, "batch")) * jax.lax.rsqrt(jax.lax.pmean(jnp.var(h * 0, 0), "batch"))
        return jnp.mean(h), h

    found = watch(loss, has_aux=True, axis_name="batch").first_bad({"w": W[0]}, X)
    assert found.operation == "rsqrt" or found.origin.operation == "rsqrt"


def test_only_the_host_can_decide():
    with pytest.raises(TypeError, match="first_bad: it decides on the host"):
        jax.jit(lambda p: first_bad(stacked(), p, X))({"w": W, "b": B})
    with pytest.raises(ValueError, match="first_bad: the loss must be one float"):
        first_bad(lambda p, x: x @ p["w"], {"w": W[0]}, X)


def test_ranges_are_those_of_the_inputs():
    found = first_bad(lambda p, x: jnp.sum(jnp.log(p["w"])), {"w": jnp.array([1.0, -2.0, 0.5, 0.0])}, X)
    (values,) = found.inputs
    assert (values.low, values.high, values.smallest, values.zeros) == (-2, 1, 0.5, 1)
    np.testing.assert_equal((values.shape, values.dtype, values.infs), ((4,), "float32", 0))


def test_a_token_outside_of_the_embedding():
    table = {"embedding": jnp.ones((5, 4))}
    found = first_bad(lambda p, t: jnp.mean(jnp.take(p["embedding"], t, axis=0)), table, jnp.array([[1, 2], [7, 0]]))
    assert (found.operation, found.layer) == ("gather", "embedding")
    assert "0 to 7, of an array [5, 4]" in found.cause


def test_keys_are_passed_on_and_nan_that_is_written_is_named():
    def loss(p, x, key):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.mean(jnp.where(keep, x, 0) @ p["w"])

    assert first_bad(loss, {"w": W[0]}, X, jax.random.key(0)) is None
    found = first_bad(lambda p, x: loss(p, x, jax.random.key(0)) * jnp.nan, {"w": W[0]}, X)
    assert (found.operation, found.layer) == ("mul", "w") and "written in the program" in found.cause
