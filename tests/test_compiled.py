"""Compiled programs: equal nets share one, different nets never do, and those of nets that are gone are not kept."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import CASES

import fnn
from fnn import compiled

SCALE = 1.0


def scaled(factor, kind=float):
    return fnn.activation(lambda x: jnp.tanh(kind(factor) * x))


def by_global():
    def f(x):
        return SCALE * x

    return fnn.activation(f)


def by_default(factor):
    def f(x, by=factor):
        return by * x

    return fnn.activation(f)


def by_default_and_global(p, x, by=1.0):
    return jnp.sum(p * SCALE * by * x)


def by_list(values):
    return fnn.activation(lambda x: x * values[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_can_be_read(case):
    assert compiled.key(case.layer) == compiled.key(case.layer)


def test_nets_of_equal_calls_are_equal_and_others_differ():
    makers = {
        "mlp": lambda **options: fnn.models.mlp(3, 8, 2, **options),
        "convnet": lambda **options: fnn.models.convnet([4], 2, **options),
    }
    keys = [
        compiled.key(make(**options))
        for _ in range(2)
        for make in makers.values()
        for options in ({}, {"taps": True}, {"norm": "layer_norm"}, {"activation": "elu"}, {"activation": jnp.sin})
    ]
    assert keys[: len(keys) // 2] == keys[len(keys) // 2 :] and len(set(keys)) == len(keys) // 2
    different = [
        scaled(1.0),
        scaled(2.0),
        scaled(1),
        scaled(1.0, int),
        by_default(1.0),
        by_default(-0.0),
        by_default(0.0),
    ]
    different += [by_default(True), by_default(1), by_list([1.0]), by_list([2.0]), fnn.dropout(0.5), fnn.dropout(0.25)]
    different += [fnn.activation("leaky_relu", slope=0.1), fnn.activation("leaky_relu", slope=0.2), by_global()]
    assert len(set(map(compiled.key, different))) == len(different)


def test_what_may_change_unseen_is_not_read():
    class Box:
        scale = 1.0

    box = Box()
    array = np.ones(2)
    unreadable = [lambda x: x * box.scale, lambda x: x * array, jax.jit(lambda x: x), lambda x: pytest.scale * x]
    unreadable += [lambda x: np.random.default_rng().normal() * x, functools.lru_cache(lambda x: x)]
    for f in unreadable:
        with pytest.raises(compiled.Unreadable):
            compiled.key(fnn.activation(f))


def test_a_changed_global_value_or_list_gives_another_program():
    global SCALE
    x, values = jnp.ones((2, 3)), [1.0]

    def mean(net):
        return fnn.evaluate(net, ((), ()), (x, x), loss=lambda outputs, _: jnp.mean(outputs, -1))["loss"]

    try:
        for value in (1.0, 2.0, 3.0):
            SCALE = values[0] = value
            assert mean(by_global()) == mean(by_list(values)) == value
            np.testing.assert_allclose(
                fnn.per_example(by_default_and_global)(jnp.ones(()), jnp.ones((2, 1))).norms(), value
            )
    finally:
        SCALE = 1.0


@pytest.fixture
def traces(monkeypatch):
    """Count how often a net's `apply` is traced inside a compiled program."""
    count = []
    monkeypatch.setattr(compiled, "_shared", functools.lru_cache(4)(compiled._compile))
    monkeypatch.setattr(compiled, "_own", type(compiled._own)())
    monkeypatch.setattr(compiled, "OWN", 2)
    monkeypatch.setattr(compiled.mapped, "auto", lambda f, auto=compiled.mapped.auto: count.append(f) or auto(f))
    return count


def test_equal_nets_share_programs_and_a_loop_compiles_once(traces):
    tokens = jnp.ones((2, 3), jnp.int32)

    def measured(turn):
        net = fnn.serial(fnn.dense(4), fnn.tap(), fnn.activation("tanh"), fnn.dense(3))
        x, y = jnp.full((4, 5), 1.0 + turn), jnp.arange(4) % 3
        params, state = net.init(jax.random.key(turn), x)
        fnn.evaluate(net, (params, state), (x, y))
        fnn.gradient_flow(net, (params, state), (x, y))
        fnn.per_example(fnn.example_loss(net, (params, state)))(params, (x, y))
        decoder = fnn.serial(fnn.embed(7, 4), fnn.gru(4), fnn.dense(7))
        fnn.generate(decoder, *decoder.init(jax.random.key(turn), tokens), tokens, 2)

    measured(0)
    first = len(traces)
    assert first >= 4
    for turn in (1, 2):
        measured(turn)
    assert len(traces) == first


def test_programs_of_nets_that_are_gone_are_not_kept(traces, monkeypatch):
    """Each net is different, each is measured; as many executables are alive at the end as after a few."""
    monkeypatch.setattr(compiled, "SHAPES", 4)
    device = jax.devices()[0]

    def alive(rounds):
        for i in rounds:
            x = jax.device_put(np.ones((2, 3 + i), np.float32))  # without a program, which `jnp.ones` would leave
            p = jax.device_put(np.ones(3 + i, np.float32))
            factor = jnp.float32(i) if i % 2 else float(i)  # an array cannot be read: such a net goes by its identity
            net = fnn.activation(lambda x, factor=factor: factor * x)
            fnn.evaluate(net, ((), ()), (x, x), loss=fnn.losses.mse)
            fnn.per_example(lambda p, x, factor=factor: jnp.sum(factor * p * x))(p, x).norms()
            fnn.tree.norm(p)
        gc.collect()
        return len(device.client.live_executables())

    few = alive(range(8))
    assert alive(range(8, 24)) <= few + 8
    assert len(traces) == 48


def test_nets_that_are_gone_leave_no_arrays_behind():
    """A net that holds an array is known by its identity: it goes, with its programs, when the caller lets it go."""
    x, tokens, nets = np.ones((2, 3), np.float32), np.ones((1, 2), np.int32), []

    def measured(i):
        factor = jax.device_put(np.full(3, 1.0 + i, np.float32))
        net = fnn.serial(fnn.activation(lambda x: factor * x), fnn.tap())
        state = net.init(jax.random.key(0), x)
        fnn.evaluate(net, state, (x, x), loss=fnn.losses.mse)
        fnn.gradient_flow(net, state, (x, x), loss=fnn.losses.mse)
        fnn.per_example(lambda p, x: jnp.sum(factor * p * x))(x[0], x)
        fnn.watch(lambda p, x: jnp.sum(factor * p * x))(x[0], x)
        decoder = fnn.serial(fnn.embed(3, 3), fnn.activation(lambda x: factor * x), fnn.gru(3))
        fnn.generate(decoder, *decoder.init(jax.random.key(0), tokens), tokens, 2)
        nets.extend(map(weakref.ref, (net.apply, decoder.apply, factor)))

    measured(0)
    gc.collect()
    before = len(jax.live_arrays())
    measured(1)
    gc.collect()
    assert not [net for net in nets if net() is not None] and len(jax.live_arrays()) <= before
