"""`watch(loss).price` measures what it says: times and memory of the programs named, beside the plain gradient's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from fnn.gradients import price

PARAMS = {"a": np.ones((8, 16), np.float32)}
X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def loss(p, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ p["a"])))


def test_each_group_has_a_row_beside_the_plain_gradient():
    found = fnn.watch(loss, groups=("error", "rank")).price(PARAMS, X, rounds=2)
    rows = {row.name: row for row in found.rows}
    groups = ["gradient", "error", "activation", "kurtosis", "saturated", "rank", "cosine", "attention"]
    names = ["plain gradient", "exact gradient alone", *(f"group {group}" for group in groups)]
    assert list(rows) == [*names, "default groups", "all groups", "these groups"]
    memory = jax.jit(jax.value_and_grad(loss)).lower(PARAMS, X).compile().memory_analysis().temp_size_in_bytes
    assert rows["plain gradient"].megabytes == memory / 1e6
    assert rows["plain gradient"].ratio == (1, 1, 1)
    assert rows["all groups"].megabytes > rows["plain gradient"].megabytes
    assert all(row.milliseconds.median > 0 and row.compile_seconds > 0 for row in found.rows)
    assert len(str(found).splitlines()) == len(rows) + 2 and "medians of 2 interleaved rounds" in str(found)


def test_time_and_memory_are_those_of_the_programs():
    def sums(turns):
        body = lambda _, y: jnp.sin(y) @ y  # noqa: E731
        return lambda x: jnp.sum(jax.lax.fori_loop(0, turns, body, x))

    x = jnp.ones((64, 64)) / 64
    little, much = price.priced("test", {"little": sums(4), "much": sums(400)}, (x,), 3).rows
    assert 5 < much.ratio.median < 500  # 100 times the work; other processes slow down what is short
    np.testing.assert_allclose(much.megabytes, little.megabytes, rtol=0.1)
    assert little.megabytes >= 64 * 64 * 4 / 1e6
    assert much.milliseconds.low <= much.milliseconds.median <= much.milliseconds.high


def test_what_the_cache_on_disk_saves_counts():
    with price.clock() as taken:
        jax.monitoring.record_event_duration_secs(price.SAVED, 50.0)
    jax.monitoring.record_event_duration_secs(price.SAVED, 50.0)
    assert 50 <= sum(taken) < 60


def test_a_named_axis_is_one_shard_and_aux_goes_through():
    def averaged(p, x):
        return jax.lax.pmean(loss(p, x), "i"), x

    found = fnn.watch(averaged, has_aux=True, axis_name="i").price(PARAMS, X, rounds=1)
    assert found.rows[0].megabytes <= found.rows[-1].megabytes


def test_gradients_of_single_examples_have_a_price_too():
    def example_loss(p, x, key):
        return jnp.sum(jnp.square(x @ p["a"] + jax.random.normal(key)))

    every = fnn.per_example(example_loss)
    key = jax.random.key(1)
    found = every.price(PARAMS, X, key=key, rounds=1)
    names = ["plain gradient", "norms", "mean and norms", "clipped mean", "variance", "gram"]
    assert [row.name for row in found.rows] == names
    mean = every(PARAMS, X, key=key).mean()
    plain = jax.jit(jax.grad(every._mean))(PARAMS, X, key)  # what stands beside it is the gradient of the same mean
    np.testing.assert_allclose(mean["a"], plain["a"], rtol=1e-5)
    with pytest.raises(TypeError, match=r"per_example.price: it times programs"):
        jax.jit(lambda p: every.price(p, X, key=key).rounds)(PARAMS)


def test_gradient_flow_has_a_price():
    net = fnn.models.mlp(2, 8, 3, taps=True)
    params, state = net.init(jax.random.key(0), X)
    y = jnp.arange(len(X)) % 3
    found = fnn.gradient_flow.price(net, (params, state), (X, y), rounds=1)
    assert [row.name for row in found.rows] == ["plain gradient", "gradient_flow"]
    plain, flow = found.rows
    assert plain.ratio.median == 1 and flow.milliseconds.median > 0 and flow.compile_seconds > 0
    with pytest.raises(ValueError, match="must hold a tap"):
        fnn.gradient_flow.price(fnn.dense(3), fnn.dense(3).init(jax.random.key(0), X), (X, y))
    with pytest.raises(TypeError, match=r"gradient_flow.price: it times programs"):
        jax.jit(lambda p: fnn.gradient_flow.price(net, (p, state), (X, y)).rounds)(params)


def test_bad_input():
    watch = fnn.watch(loss)
    with pytest.raises(TypeError, match=r"watch.price: it times programs, got traced arrays"):
        jax.jit(lambda p: watch.price(p, X).rows[0].ratio)(PARAMS)
    with pytest.raises(ValueError, match="rounds"):
        watch.price(PARAMS, X, rounds=0)
