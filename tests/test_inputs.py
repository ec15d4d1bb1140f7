"""Several inputs and padded sequences: values, training, gradient flow, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, assert_same

import fnn

KEY = jax.random.key(0)


def drawn(*shape):
    return as_jax(np.random.default_rng(0).normal(size=shape), jnp.float32)


def two_inputs():
    return fnn.serial(
        fnn.branches(
            {
                "image": fnn.serial(fnn.conv(3, 2), fnn.named("seen", fnn.tap()), fnn.global_avg_pool()),
                "audio": fnn.serial(fnn.dense(4), fnn.named("heard", fnn.tap()), fnn.take_last()),
            }
        ),
        fnn.concatenate(),
        fnn.dense(2),
        fnn.named("logits", fnn.tap()),
    )


def inputs(n=6):
    return {"image": drawn(n, 4, 4, 1), "audio": fnn.Masked.of_lengths(drawn(n, 5, 2), jnp.arange(n) % 5 + 1)}


def test_branches_apply_each_layer_to_its_own_input_with_its_own_key():
    layers = {"b": fnn.dense(3), "a": fnn.serial(fnn.dense(2), fnn.activation("tanh"))}
    x = {"a": drawn(4, 5), "b": drawn(4, 6)}
    params, state = fnn.branches(layers).init(KEY, x)
    y, _ = fnn.branches(layers).apply(params, state, x)
    first, second = jax.random.split(KEY, 2)
    for name, key in (("a", first), ("b", second)):
        own, own_state = layers[name].init(key, x[name])
        assert_same(y[name], layers[name].apply(own, own_state, x[name])[0])


def test_concatenate_and_add_by_hand():
    a, b = jnp.array([[1.0, 2]]), jnp.array([[10.0, 20]])
    for joined in ((a, b), {"x": a, "y": b}):
        np.testing.assert_array_equal(fnn.concatenate().apply((), (), joined)[0], [[1, 2, 10, 20]])
        np.testing.assert_array_equal(fnn.sum_inputs().apply((), (), joined)[0], [[11, 22]])
    mask = jnp.array([[True, False]])
    wide = fnn.Masked(a[..., None], mask)
    y, _ = fnn.concatenate().apply((), (), (wide, wide))
    np.testing.assert_array_equal(y.values, [[[1, 1], [0, 0]]])
    np.testing.assert_array_equal(y.mask, mask)


def test_last_first_and_ends_take_real_positions():
    def read(layer, x):
        return np.asarray(jax.jit(layer.apply)((), (), x)[0])

    x = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    mask = np.array([[True, True, False, False], [False, True, False, True], [False] * 4])
    masked, both = fnn.Masked(x, mask), np.concatenate([x, x + 100, x + 200], axis=-1)
    np.testing.assert_array_equal(read(fnn.take_last(), masked), [[1], [7], [0]])
    np.testing.assert_array_equal(read(fnn.take_first(), masked), [[0], [5], [0]])
    np.testing.assert_array_equal(read(fnn.take_last(), x), x[:, -1])
    np.testing.assert_array_equal(read(fnn.take_first(), x), x[:, 0])
    np.testing.assert_array_equal(
        read(fnn.take_ends(2), fnn.Masked(both, mask)), [[1, 101, 200], [7, 107, 205], [0, 0, 0]]
    )
    np.testing.assert_array_equal(read(fnn.take_ends(1), both)[:, 1:], both[:, 0, 1:])
    np.testing.assert_array_equal(read(fnn.take_ends(), both[..., 1:]), both[:, [-1, 0], [1, 2]])
    for layer, got in ((fnn.take_ends(), "forward=None"), (fnn.take_ends(3), "forward=3")):
        with pytest.raises(ValueError, match=rf"ends: needs an even number of units.*float32\[3,4,3\] and {got}"):
            layer.apply((), (), both)


@pytest.mark.parametrize("layer", [fnn.take_last(), fnn.take_first(), fnn.take_ends(), fnn.global_avg_pool()])
@pytest.mark.parametrize("masked", [False, True])
def test_sequences_of_length_0_give_0(layer, masked):
    """As examples without a real position do."""
    x = jnp.zeros((3, 0, 4), jnp.bfloat16)
    y, _ = jax.jit(layer.apply)((), (), fnn.Masked(x, jnp.zeros((3, 0), bool)) if masked else x)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, np.zeros((3, 4)))


def test_trees_of_inputs_train_evaluate_and_report():
    net, x = two_inputs(), inputs(32)
    y = as_jax(np.asarray(x["image"]).mean((1, 2, 3)) > 0, jnp.int32)
    optimizer = optax.adam(0.03)
    state = fnn.TrainState.create(net, optimizer, KEY, x)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, per_layer=True)
    before = fnn.evaluate(net, state, (x, y), batch_size=5)
    whole = fnn.losses.cross_entropy(jax.jit(net.apply)(state.params, state.net_state, x)[0], y)
    assert before["loss"] == pytest.approx(float(whole.mean()), rel=1e-5)
    data = fnn.data.Dataset(x, y)
    assert data.size == 32
    trained, history = fnn.fit(step, state, data, epochs=20, batch_size=8, key=KEY, validation=(x, y))
    assert history.validation["loss"][-1] < 0.7 * before["loss"]
    # One step through fit is one step by hand, on the same examples.
    single, _ = fnn.fit(step, state, [(jax.tree.map(np.asarray, x), np.asarray(y))], epochs=1)
    by_hand, _ = step(jax.tree.map(jnp.copy, state), (x, y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), single.params, by_hand.params)
    flow = fnn.gradient_flow(net, trained, (x, y))
    errors = {row.path: row.layer for row in flow.rows if row.quantity == "log10_error"}
    # Layers are counted by kernels in the order of the sorted names: audio, image, then the last.
    assert errors == {"0/audio/1/heard": 1, "0/image/1/seen": 2, "3/logits": 3}


def test_padding_that_is_not_finite_trains_as_any_other():
    net, x = two_inputs(), inputs(12)
    y, optimizer = jnp.arange(12) % 2, optax.adam(0.03)
    state = fnn.TrainState.create(net, optimizer, KEY, x)
    step, trained = fnn.train_step(net, fnn.losses.cross_entropy, optimizer), []
    for fill in (0.0, jnp.nan):
        values, mask = map(np.asarray, x["audio"])
        audio = fnn.Masked(np.where(mask[..., None], values, np.float32(fill)), mask)
        data = fnn.data.Dataset(x | {"audio": audio}, y)
        trained.append(fnn.fit(step, state, data, epochs=2, batch_size=6, key=KEY, validation=data))
    assert_same(*[(new.params, new.net_state) for new, _ in trained])
    assert_same(*[history.validation["loss"] for _, history in trained])
    with pytest.raises(ValueError, match="x must be finite, got 1 non-finite values, first at example 2"):
        fnn.evaluate(net, state, (x | {"image": x["image"].at[2, 0, 0].set(jnp.nan)}, y))
    real = x["audio"]._replace(values=x["audio"].values.at[2, 0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="x must be finite, got 1 non-finite values, first at example 2"):
        fnn.evaluate(net, state, (x | {"audio": real}, y))


def test_layers_without_a_mask_compute_what_they_did():
    """What takes padding out of the numbers is not there where nothing is padded."""
    layers = [fnn.dense(4), fnn.layer_norm(), fnn.activation("tanh"), fnn.scalar_affine(), fnn.attention(2), fnn.gru(4)]
    x = jnp.ones((2, 3, 4))
    for layer in (
        *layers,
        fnn.residual(fnn.dense(4)),
        fnn.tap(),
        fnn.take_last(),
        fnn.take_ends(),
        fnn.global_avg_pool(),
    ):
        text = jax.jit(layer.apply).lower(*layer.init(KEY, x), x).as_text()
        assert "select" not in text
        masked = fnn.Masked(x, jnp.ones((2, 3), bool))
        assert "select" in jax.jit(layer.apply).lower(*layer.init(KEY, x), masked).as_text()


def test_refusals():
    net, x = two_inputs(), inputs()
    params, state = net.init(KEY, x)
    with pytest.raises(
        ValueError, match=r"branches: the input must be a dict with the names \['audio', 'image'\]"
    ) as e:
        net.apply(params, state, {"image": x["image"], "sound": x["audio"]})
    assert "in layer 0, input" in e.value.__notes__[0]
    with pytest.raises(ValueError, match=r"got float32\[6,4,4,1\]"):
        net.apply(params, state, x["image"])
    with pytest.raises(TypeError, match="branches: needs a dict of names and Layers"):
        fnn.branches({"image": jnp.tanh})
    with pytest.raises(ValueError, match="must have the same shape except for the last axis"):
        fnn.concatenate().init(KEY, ())
        fnn.concatenate().apply((), (), (drawn(2, 3), drawn(3, 3)))
    with pytest.raises(ValueError, match="sum_inputs: the inputs must have the same shape"):
        fnn.sum_inputs().apply((), (), (drawn(2, 3), drawn(2, 4)))
    with pytest.raises(ValueError, match="the input must be a tuple or a dict of arrays"):
        fnn.sum_inputs().apply((), (), drawn(2, 3))
    masked = fnn.Masked(drawn(2, 3, 4), jnp.ones((2, 3), bool))
    for layer in (fnn.flatten(), fnn.group_norm(2)):
        with pytest.raises(TypeError, match=r"got Masked\(values=float32\[2,3,4\], mask=bool\[2,3\]\)"):
            layer.init(KEY, masked)
            layer.apply((), (), masked)
    with pytest.raises(TypeError, match="a mask must be bool"):
        fnn.dense(3).init(KEY, fnn.Masked(drawn(2, 3, 4), jnp.ones((2, 3))))


def test_a_net_that_ends_in_a_mask_is_refused_by_training():
    net = fnn.serial(fnn.embed(5, 3, padding=0), fnn.gru(3), fnn.dense(2))
    x, y = jnp.array([[1, 2, 0], [3, 4, 1]]), jnp.zeros((2, 3), int)
    optimizer = optax.sgd(0.1)
    state = fnn.TrainState.create(net, optimizer, KEY, x)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
    for call in (
        lambda: step(state, (x, y)),
        lambda: fnn.fit(step, state, (x, y), epochs=1, batch_size=2, key=KEY),
        lambda: fnn.evaluate(net, state, (x, y)),
    ):
        with pytest.raises(ValueError, match=r"a loss needs one array, got Masked.*end in drop_mask\(\)"):
            call()
