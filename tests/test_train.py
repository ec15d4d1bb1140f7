"""The train step, `fit` and `evaluate`: against arithmetic by hand, then what users rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, assert_same

import fnn

NET = fnn.models.mlp(1, 8, 3, norm="batch_norm", activation="tanh", taps=True)
OPTIMIZER = optax.chain(fnn.clip.by_global_norm(0.5), optax.sgd(0.1))
STEP = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER, per_layer=True)


def clusters(n=96):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    x = rng.normal(size=(n, 4)) + 3 * np.eye(4)[y]
    return as_jax(x, jnp.float32), as_jax(y, jnp.int32)


def fresh(net=NET, optimizer=OPTIMIZER):
    return fnn.TrainState.create(net, optimizer, jax.random.key(0), clusters()[0])


def test_a_step_equals_gradient_clip_and_update_by_hand_and_traces_once():
    traces = []

    def loss(outputs, y):
        traces.append(1)
        return fnn.losses.cross_entropy(outputs, y)

    step, batch = fnn.train_step(NET, loss, OPTIMIZER, per_layer=True), clusters()
    state = fresh()
    old = jax.device_get(state.params)
    key = jax.random.fold_in(state.key, 0)
    value, grads = jax.jit(
        jax.value_and_grad(
            lambda p: fnn.losses.cross_entropy(
                NET.apply(p, state.net_state, batch[0], key=key, train=True)[0], batch[1]
            ).mean()
        )
    )(state.params)
    grads = jax.device_get(grads)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    assert norm > 0.5
    new, metrics = step(state, batch)
    for p, g, q in zip(*map(jax.tree.leaves, (old, grads, new.params)), strict=True):
        np.testing.assert_allclose(q, p - 0.1 * g * 0.5 / norm, rtol=1e-4, atol=1e-6)
    size = np.sqrt(sum(np.sum(np.square(p)) for p in jax.tree.leaves(old)))
    expected = {
        "loss": float(value),
        "grad_norm": norm,
        "grad_norm_clipped": 0.5,
        "clip_fraction": 1.0,
        "clip_removed": 1 - 0.5 / norm,
        "update_ratio": 0.05 / size,
    }
    for name, number in expected.items():
        assert float(metrics[name]) == pytest.approx(number, rel=1e-4), name
    for a, b in zip(jax.tree.leaves(metrics["grad_norms"]), jax.tree.leaves(grads), strict=True):
        assert float(a) == pytest.approx(float(np.linalg.norm(b)), rel=1e-4, abs=1e-6)
    rows = fnn.taps.read(*metrics["taps"])
    assert [row.path for row in rows if row.quantity == "log10_error"][:2] == ["2/preactivation", "5/activation"]
    assert int(new.step) == 1
    once = len(traces)
    new, _ = step(new, batch)
    step(new, batch)
    assert len(traces) == once  # the second and third call reuse the first one's program


def test_metrics_by_choice_are_the_same_numbers_and_what_is_left_out_is_not_computed():
    batch, state = clusters(), fresh()
    lean = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER, metrics=("grad_norm",))
    work = [step.lower(state, batch).compile().cost_analysis()["flops"] for step in (STEP, lean)]
    assert work[1] < work[0]
    all_of_them = STEP(jax.tree.map(jnp.copy, state), batch)[1]
    metrics = lean(state, batch)[1]
    assert metrics.keys() == {"loss", "grad_norm"}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, all_of_them[name], rtol=1e-6)
    with pytest.raises(ValueError, match="unknown metrics 'grad_nrom'; did you mean 'grad_norm'"):
        fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER, metrics=("grad_nrom",))


@pytest.mark.parametrize("rate", [1e25, 1e-25])
def test_the_update_ratio_is_right_where_squares_leave_the_range(rate):
    net, optimizer = fnn.serial(fnn.dense(2)), optax.sgd(rate)
    x, y = jnp.ones((2, 3)), jnp.array([0, 1])
    state = fnn.TrainState.create(net, optimizer, jax.random.key(0), x)
    size = fnn.tree.norm(state.params)
    _, metrics = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)(state, (x, y))
    assert float(metrics["update_ratio"]) == pytest.approx(float(rate * metrics["grad_norm"] / size), rel=1e-5)


def test_buffers_are_donated():
    state, batch = fresh(), clusters()
    new, _ = STEP(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_bfloat16_keeps_float32_masters_and_statistics():
    step, batch = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER, compute_dtype=jnp.bfloat16), clusters()
    state = fresh()
    spec = fnn.core.as_spec(state)
    hlo = step.lower(state, batch).as_text()
    assert "dot_general" in hlo and "bf16" in hlo
    exact, _ = STEP(fresh(), batch)
    new, metrics = step(state, batch)
    assert fnn.core.same_spec(new, spec)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((new.params, new.net_state)))
    for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(exact.params), strict=True):
        np.testing.assert_allclose(a, b, atol=0.01)
    assert metrics["loss"].dtype == jnp.float32


def test_fit_equals_a_loop_of_steps_and_repeats_bit_for_bit():
    data = clusters()
    state = fresh()
    one, history = fnn.fit(STEP, state, data, epochs=2, batch_size=32, key=jax.random.key(5))
    two, again = fnn.fit(STEP, state, data, epochs=2, batch_size=32, key=jax.random.key(5))
    assert_same((one.params, history.train), (two.params, again.train))
    other, _ = fnn.fit(STEP, state, data, epochs=2, batch_size=32, key=jax.random.key(6))
    assert not np.array_equal(jax.tree.leaves(one.params)[0], jax.tree.leaves(other.params)[0])
    loop = state
    shuffles = jax.random.fold_in(jax.random.key(5), 0xF5F5F5F5)
    for epoch in range(2):
        order = fnn.data.shuffled(jax.random.fold_in(shuffles, epoch), 96).reshape(3, 32)
        for index in order:
            loop, _ = STEP(
                loop if loop is not state else jax.tree.map(jnp.copy, state), (data[0][index], data[1][index])
            )
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(loop.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert history.train["loss"].shape == (6,) and history.steps_per_epoch == (3, 3)
    np.testing.assert_allclose(history.by_epoch("loss"), history.train["loss"].reshape(2, 3).mean(1), rtol=1e-6)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # the caller's state stays usable


class Batches:
    """A host-side source of 40 batches that can be read again; the last has another shape."""

    def __iter__(self):
        x, y = map(np.asarray, clusters())
        for i in range(40):
            n = 32 if i < 39 else 16
            yield x[i : i + n], y[i : i + n]


def test_fit_takes_an_iterable_of_batches_and_equals_the_loop():
    state = fresh()
    fitted, history = fnn.fit(STEP, state, Batches(), epochs=2)
    loop = jax.tree.map(jnp.copy, state)
    for _ in range(2):
        for batch in Batches():
            loop, metrics = STEP(loop, batch)
    for a, b in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(loop.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert history.train["loss"].shape == (80,)
    assert history.train["loss"][-1] == pytest.approx(float(metrics["loss"]), rel=1e-3)
    with pytest.raises(ValueError, match="an iterator can be read once, got epochs=2"):
        fnn.fit(STEP, state, iter(Batches()), epochs=2)
    with pytest.raises(ValueError, match="must not be empty"):
        fnn.fit(STEP, state, [], epochs=1)


def test_evaluate_counts_every_example_once_whatever_the_batch_size():
    state, (x, y) = fresh(), clusters()
    outputs = np.asarray(jax.jit(NET.apply)(state.params, state.net_state, x)[0])
    right = outputs[np.arange(96), np.asarray(y)]
    expected = float(np.mean(np.log(np.sum(np.exp(outputs), 1)) - right))
    accuracy = float(np.mean(np.argmax(outputs, 1) == np.asarray(y)))
    for size in (7, 32, 96, 1000):
        result = fnn.evaluate(NET, state, (x, y), batch_size=size)
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        assert result["accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_early_stopping_returns_the_best_state(capsys):
    data, state = clusters(), fresh()
    x, y = data
    wrong = x, (y + 1) % 3  # validation gets worse as training goes on
    best, history = fnn.fit(
        STEP, state, data, epochs=50, batch_size=32, key=jax.random.key(0), validation=wrong, patience=2, progress=True
    )
    curve = history.validation["loss"]
    assert (
        history.stopped_early and history.best_epoch == int(np.argmin(curve)) and len(curve) == history.best_epoch + 3
    )
    assert fnn.evaluate(NET, best, wrong)["loss"] == pytest.approx(curve.min(), rel=1e-5)
    assert "validation accuracy" in capsys.readouterr().err


def test_a_validation_loss_that_is_no_number_is_no_best_epoch():
    calls = []

    def first_one_lost(state):
        calls.append(1)
        return jax.tree.map(lambda a: a * np.nan, state.params) if len(calls) == 1 else state.params

    options = {"batch_size": 32, "key": jax.random.key(0), "validation": clusters(), "evaluate_with": first_one_lost}
    _, history = fnn.fit(STEP, fresh(), clusters(), epochs=4, patience=2, **options)
    curve = history.validation["loss"]
    assert np.isnan(curve[0]) and len(curve) == 4 and history.best_epoch == np.nanargmin(curve) == 3


def test_gradients_average_over_a_mapped_batch_axis():
    """Two lanes of a batch under vmap, batch norm over both, equal the whole batch."""
    step = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER, axis_name="batch")
    state, (x, y) = fresh(), clusters()
    lanes = x.reshape(2, 48, 4), y.reshape(2, 48)
    mapped, metrics = jax.jit(jax.vmap(step.pure, in_axes=(None, 0), axis_name="batch"))(state, lanes)
    whole, expected = STEP(state, (x, y))
    for a, b in zip(jax.tree.leaves(jax.device_get(mapped.params)), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(a[0], a[1])
    assert float(metrics["loss"][0]) == pytest.approx(float(expected["loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda x, y, o: (x, y.at[0].set(3), o), ValueError, r"labels must lie in 0..2, got 0..3"),
        (lambda x, y, o: (x, y.at[0].set(-1), o), ValueError, r"labels must lie in 0..2, got -1..2"),
        (lambda x, y, o: (x, y.astype(jnp.float32), o), TypeError, "labels must be integers"),
        (lambda x, y, o: (x.at[5, 0].set(jnp.nan), y, o), ValueError, "fit: x must be finite"),
        (lambda x, y, o: (x, y, o | {"batch_size": 97}), ValueError, "at most the 96 examples of the data, got 97"),
        (lambda x, y, o: (x, y, o | {"batch_size": 0}), ValueError, "batch_size must be a positive integer, got 0"),
        (lambda x, y, o: (x, y, o | {"epochs": -1}), ValueError, "epochs must be a positive integer, got -1"),
        (lambda x, y, o: (x, y, o | {"batch_size": None}), ValueError, "needs batch_size="),
        (lambda x, y, o: (x, y, o | {"patience": 3}), ValueError, "patience needs validation data"),
        (lambda x, y, o: (x[:5], y, o), ValueError, "fit"),
        (
            lambda x, y, o: (x[:, :3], y, o),
            ValueError,
            r"dense: the input must be float32\[batch, ..., 4\], as at init",
        ),
    ],
)
def test_bad_data_is_refused_before_training(change, error, sentence):
    x, y, options = change(*clusters(), {"epochs": 1, "batch_size": 32, "key": jax.random.key(0)})
    with pytest.raises(error, match=sentence):
        fnn.fit(STEP, fresh(), (x, y), **options)


def test_bad_labels_and_batches_are_refused_by_the_step_itself():
    x, y = map(np.asarray, clusters())
    state = fresh()
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, got 1..7"):
        STEP(state, (x, np.where(y == 0, 7, y)))
    with pytest.raises(TypeError, match=r"the batch must be a pair \(x, y\)"):
        STEP(state, x)
    with pytest.raises(TypeError, match="optimizer must be an optax transformation, got 'adam'"):
        fnn.TrainState.create(NET, "adam", jax.random.key(0), x)
    _, metrics = STEP.jitted(state, (x, np.where(y == 0, 7, y)))
    assert np.isnan(metrics["loss"])  # inside jit a bad label is NaN, never a neighbour's loss


def test_digits_reach_97_percent():
    """`fnn train`'s net and schedule with one seed; five seeds average 0.98 (README)."""
    split, init, shuffle = jax.random.split(jax.random.key(0), 3)
    train, test = fnn.data.digits(key=split)
    net = fnn.models.mlp(3, 128, 10, norm="batch_norm")
    optimizer = optax.chain(fnn.clip.by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, 20 * 22)))
    state = fnn.TrainState.create(net, optimizer, init, train.x[:1])
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
    state, history = fnn.fit(step, state, train, epochs=20, batch_size=64, key=shuffle)
    assert fnn.evaluate(net, state, test)["accuracy"] >= 0.955
    assert history.by_epoch("loss")[-1] < 0.05


def test_steps_called_one_by_one_are_those_of_the_scan():
    data = clusters()
    state, history = fnn.fit(STEP, fresh(), data, epochs=2, batch_size=40, key=jax.random.key(3))
    single, steps = fnn.fit(STEP, fresh(), data, epochs=2, batch_size=40, key=jax.random.key(3), scan=False)
    np.testing.assert_allclose(steps.train["loss"], history.train["loss"], rtol=1e-5)
    batches = list(Batches())
    ends = [fnn.fit(STEP, fresh(), batches, epochs=1, scan=scan)[0] for scan in (True, False)]
    for one, other in ((state, single), ends):
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mapped", [False, True], ids=["batch", "axis_name"])
@pytest.mark.parametrize(
    ("optimizer", "skips"),
    [
        (optax.apply_if_finite(optax.adam(1e-2), 5), True),
        (optax.chain(optax.zero_nans(), optax.sgd(1e-2)), True),
        (optax.sgd(1e-2), False),
    ],
    ids=["apply_if_finite", "zero_nans", "sgd"],
)
def test_a_bad_batch_stays_out_of_the_nets_state(optimizer, skips, mapped):
    """The state after good, bad and good batches is that after the good ones alone, taps and running moments alike.

    Without skipping the parameters are NaN from the bad batch on, and the state stays that of the first good one.
    """
    net = fnn.models.mlp(1, 4, 3, norm="batch_norm", taps=True)
    x, y = clusters()
    x, y = x[:16], y[:16]
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, axis_name="d" if mapped else None, metrics=())
    start = fnn.TrainState.create(net, optimizer, jax.random.key(0), x)

    @jax.jit
    def run(state, x):
        if not mapped:
            return step.pure(state, (x, y))[0]
        lanes = jax.vmap(step.pure, (None, 0), axis_name="d")(state, (x.reshape(2, 8, 4), y.reshape(2, 8)))
        return jax.tree.map(lambda a: a[0], lanes[0])

    bad = x.at[3, 0].set(jnp.nan)  # in one lane of two
    with_bad = run(run(run(start, x), bad), 2 * x)
    without = run(run(start, x), 2 * x) if skips else run(start, x)
    for a, b in zip(jax.tree.leaves(with_bad.net_state), jax.tree.leaves(without.net_state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert skips == all(np.all(np.isfinite(a)) for a in jax.tree.leaves(with_bad.params))


@pytest.mark.parametrize("options", [{}, {"per_example": "norms"}, {"per_example": "clip", "max_norm": 1.0}])
def test_a_float32_net_trains_in_float32_under_x64(options, x64):
    net = fnn.serial(fnn.dense(4), fnn.repeat(fnn.serial(fnn.dense(4), fnn.activation("tanh")), 3), fnn.dense(3))
    clips = [getattr(fnn.clip, kind)(0.5) for kind in ("by_global_norm", "by_value", "by_block_norm")]
    tx = optax.chain(*clips, optax.adam(1e-2))
    x, y = jnp.ones((4, 5), jnp.float32), jnp.array([0, 1, 2, 0])
    state = fnn.TrainState.create(net, tx, jax.random.key(0), x)
    before = [a.dtype for a in jax.tree.leaves((state.params, state.opt_state))]
    step = fnn.train_step(net, fnn.losses.cross_entropy, tx, **options)
    state, metrics = jax.lax.scan(step.pure, state, jax.tree.map(lambda a: jnp.stack([a, a]), (x, y)))
    assert [a.dtype for a in jax.tree.leaves((state.params, state.opt_state))] == before
    assert {metrics[name].dtype for name in ("loss", "grad_norm", "clip_fraction", "update_ratio")} == {
        jnp.dtype("float32")
    }
