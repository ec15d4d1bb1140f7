"""What `watch` reads of weights that are made in unusual ways: complex, masked, frozen, taken by number, checkpointed twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(6, 5)))
MASK = np.tril(np.ones((5, 5), bool))


def drawn(*shape):
    return np.float32(RNG.normal(size=shape) / 2)


def rows(loss, params, quantity, **options):
    return [(row.path, row.value) for row in fnn.watch(loss, **options)(params, X).rows() if row.quantity == quantity]


def behind(kernel):
    """A loss of two layers, the first with a kernel made of a parameter."""
    return lambda p, x: jnp.var(jnp.tanh(x @ kernel(p["w"])) @ p["v"])


def test_the_real_part_of_a_complex_weight():
    def loss(p, x):
        h = jnp.abs(x.astype(jnp.complex64) @ (p["real"] + 1j * p["imaginary"]))
        return jnp.sum((h @ p["v"]) ** 2)

    params = {"real": drawn(5, 4), "imaginary": drawn(5, 4), "v": drawn(4, 2)}
    wanted = jax.tree.map(lambda g: np.log10(np.linalg.norm(g)), jax.grad(loss)(params, X))
    assert dict(rows(loss, params, "log10_gradient")) == pytest.approx(wanted, abs=1e-5)
    every = jax.vmap(jax.grad(loss), (None, 0))(params, X[:, None])
    found = fnn.per_example(lambda p, x: loss(p, x[None]))(params, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found.materialize(), every)


@pytest.mark.parametrize(
    "kernel",
    [
        lambda w: jnp.where(MASK, w, 0),
        jnp.tril,
        lambda w: jnp.clip(w, -1, 1),
        lambda w: w * (1 - jnp.eye(5)),
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(0), (5, 5)),
        lambda w: jnp.pad(w[:4], ((0, 1), (0, 0))),
    ],
)
def test_a_kernel_of_a_parameter_and_constants_is_that_parameter(kernel):
    params = {"w": drawn(5, 5), "v": drawn(5, 3)}
    h = X @ np.asarray(kernel(params["w"]))
    wanted = [("w", np.mean(h**2)), ("v", np.mean((np.tanh(h) @ params["v"]) ** 2))]
    found = rows(behind(kernel), params, "output_second_moment", groups=("activation",))
    assert [path for path, _ in found] == ["w", "v"]
    np.testing.assert_allclose([v for _, v in found], [v for _, v in wanted], rtol=1e-5)


@pytest.mark.parametrize("given", ["closed over", "with the batch"])
def test_a_kernel_that_is_divided_by_its_norm_is_the_layer(given):
    """As in Linen's SpectralNorm, whose vectors of the power iteration are no parameters: its products are no layers."""
    start = drawn(1, 5)

    def loss(p, x, start=start):
        left = start
        right = jax.lax.stop_gradient(left @ p["w"] / jnp.linalg.norm(left @ p["w"]))
        left = jax.lax.stop_gradient(right @ p["w"].T / jnp.linalg.norm(right @ p["w"].T))
        return jnp.var(jnp.tanh(x @ (p["w"] / (left @ p["w"] @ right.T)[0, 0])) @ p["v"])

    params, watched = (
        {"w": drawn(5, 5), "v": drawn(5, 3)},
        fnn.watch(loss, groups=("activation", "error"), batch_size=6),
    )
    flow = watched(params, X) if given == "closed over" else watched(params, X, start)
    assert [row.path for row in flow.rows() if row.quantity == "log10_error"] == ["w", "v"]
    found = [row.value for row in flow.rows() if row.quantity == "input_second_moment"]
    assert found[0] == pytest.approx(np.mean(X**2), rel=1e-5)


def test_a_layer_behind_which_nothing_is_trained_has_no_error_signal():
    """JAX computes none there; zero, as of a layer that the loss does not need, would say that the signal vanishes."""

    def lora(p, x):
        h = jnp.tanh(x @ jax.lax.stop_gradient(p["w"]) + (x @ p["a"]) @ p["b"])
        unused = jax.lax.stop_gradient(h @ p["dead"])
        return jnp.var(h @ p["v"]) + jnp.sum(unused)

    params = {"w": drawn(5, 5), "a": drawn(5, 2), "b": drawn(2, 5), "v": drawn(5, 3), "dead": drawn(5, 3)}
    found = dict(rows(lora, params, "log10_error", groups=("error",)))
    assert found.keys() == {"a", "b", "v", "dead"}
    assert found["dead"] == -np.inf and np.isfinite([found[name] for name in "abv"]).all()


@pytest.mark.parametrize(
    ("index", "entries", "paths"),
    [
        (lambda i: i, 4, ["w[0]", "w[1]", "w[2]", "w[3]"]),
        (lambda i: i % 2, 2, ["w"]),
        (lambda i: 3 - i, 4, ["w"]),
        (lambda i: i // 2, 4, ["w"]),
    ],
)
@pytest.mark.parametrize("counted", [False, True])
def test_entries_of_a_stack_have_the_loop_s_numbers_or_one_name(index, entries, paths, counted):
    """By number alone: the entry that a turn takes, if it is the turn's own, else the stack over all turns."""

    def loss(p, x):
        def turn(i, h):
            return jnp.tanh(h @ p["w"][index(i)])

        if counted:
            return jnp.var(jax.lax.fori_loop(0, 4, turn, x) @ p["v"])
        return jnp.var(jax.lax.scan(lambda h, i: (turn(i, h), None), x, jnp.arange(4))[0] @ p["v"])

    params, h, squares = {"w": drawn(entries, 5, 5), "v": drawn(5, 3)}, X, []
    for i in range(4):
        squares.append(np.mean((h @ params["w"][index(i)]) ** 2))
        h = np.tanh(h @ params["w"][index(i)])
    found = rows(loss, params, "output_second_moment", groups=("activation",))[:-1]
    assert [path for path, _ in found] == paths
    np.testing.assert_allclose([v for _, v in found], squares if len(paths) == 4 else [np.mean(squares)], rtol=1e-5)


def test_a_checkpoint_within_a_checkpoint_changes_nothing():
    def block(h, w):
        return jnp.tanh(h @ w)

    def loss(p, x, wrap):
        outer = wrap(lambda h: jax.lax.scan(wrap(lambda h, w: (wrap(block)(h, w), None)), h, p["w"])[0])
        return jnp.var(outer(x) @ p["v"])

    params = {"w": drawn(3, 5, 5), "v": drawn(5, 3)}
    found = [fnn.watch(lambda p, x, w=wrap: loss(p, x, w))(params, X).rows() for wrap in (jax.checkpoint, lambda f: f)]
    names, values = zip(*[([row[:3] for row in part], [row.value for row in part]) for part in found], strict=True)
    assert names[0] == names[1]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_experts_that_share_a_product_are_a_layer():
    """Each row of `ragged_dot` meets the kernel of its group: the numbers are those of a kernel for each row."""
    params, groups = {"w": drawn(3, 5, 4), "v": drawn(4, 3)}, np.array([2, 1, 3], np.int32)

    def rest(p, h):
        return jnp.var(jnp.tanh(h) @ p["v"])

    found = fnn.watch(lambda p, x: rest(p, jax.lax.ragged_dot(x, p["w"], jnp.asarray(groups))))(params, X)
    got = {row.quantity: row.value for row in found.rows() if row.path == "w"}
    h = np.einsum("bi,bio->bo", X, params["w"][np.repeat(np.arange(3), groups)])
    signal = len(X) * np.asarray(jax.grad(rest, 1)(params, h))
    assert got["output_second_moment"] == pytest.approx(np.mean(h**2), rel=1e-5)
    assert got["log10_error"] == pytest.approx(0.5 * np.log10(np.mean(np.sum(signal**2, axis=1))), abs=1e-5)
