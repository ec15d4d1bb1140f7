"""`watch` under transformations and in training loops; its options, tables and errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from watch_models import MODELS, X, Y, measured, same, taken

import fnn


def test_under_jit_vmap_and_scan():
    loss, params, batch = MODELS["linen_mlp"]()
    watch = fnn.watch(loss)
    alone = watch(params, *batch)
    same(jax.jit(watch)(params, *batch), alone)
    other = jax.tree.map(lambda a: a * 1.1, params)
    lanes = jax.vmap(watch, in_axes=(0, None, None))(jax.tree.map(lambda *a: jnp.stack(a), params, other), *batch)
    same(jax.tree.map(lambda a: a[0], lanes), alone)
    same(jax.tree.map(lambda a: a[1], lanes), watch(other, *batch))
    assert lanes.table().columns == ["lane", "layer", "path", "quantity", "value"]
    assert len(lanes.table()) == 2 * len(alone.table())
    _, turns = jax.lax.scan(
        lambda c, s: (c, watch(jax.tree.map(lambda a: a * s, params), *batch)), 0, jnp.array([1, 1.1])
    )
    same(jax.tree.map(lambda a: a[0], turns), alone)


def test_a_batch_cut_over_a_named_axis():
    loss, params, (x, y) = MODELS["plain_mlp"]()
    whole = fnn.watch(loss, groups="all")(params, x, y)
    cut = fnn.watch(loss, groups=[g for g in module_groups() if g != "rank"], axis_name="i")
    parts = jax.vmap(cut, in_axes=(None, 0, 0), axis_name="i")(params, x.reshape(2, 3, 8), y.reshape(2, 3))
    rows = {(row.path, row.quantity): row.value for row in whole.rows()}
    for i in range(2):
        for row in jax.tree.map(lambda a, i=i: a[i], parts).rows():
            np.testing.assert_allclose(row.value, rows[row.path, row.quantity], rtol=2e-4, atol=2e-5, err_msg=str(row))


def module_groups():
    from fnn.gradients.labels import GROUPS

    return GROUPS


def test_every_on_the_host_and_inside_scan():
    loss, params, batch = MODELS["plain_mlp"]()
    watch = fnn.watch(loss, every=2)
    plain = jax.jit(jax.value_and_grad(loss))(params, *batch)
    for step in (0, 1, 2):
        (value, gradient), flow = watch.value_and_grad(params, *batch, step=step)
        np.testing.assert_allclose(value, plain[0], rtol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain[1]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
        assert np.isfinite(flow.numbers()).all() == (step % 2 == 0)

    def body(params, step):
        (_, gradient), flow = watch.value_and_grad(params, *batch, step=step)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), flow

    _, flows = jax.jit(lambda p: jax.lax.scan(body, p, jnp.arange(4)))(params)
    assert [bool(np.isfinite(row).all()) for row in flows.numbers()] == [True, False, True, False]


def test_steps_in_between_average_over_a_named_axis_too():
    loss, params, (x, y) = MODELS["plain_mlp"]()
    watch = fnn.watch(loss, axis_name="i", every=2)
    whole = jax.jit(jax.value_and_grad(loss))(params, x, y)
    for step in (0, 1):

        def lane(x, y, step=step):
            return watch.value_and_grad(params, x, y, step=step)[0]

        found = jax.jit(jax.vmap(lane, axis_name="i"))(x.reshape(2, 3, 8), y.reshape(2, 3))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, np.stack([theirs, theirs]), rtol=1e-4, atol=1e-6)


def test_a_step_in_between_is_the_plain_step():
    """The same optimised program, to the letter but for its name."""
    loss, params, batch = MODELS["plain_mlp"]()

    def text(function):
        names: dict[str, str] = {}
        lines = jax.jit(function).lower(params, batch).compile().as_text().splitlines()
        lines = [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines if " = " in line]
        return [re.sub(r"%[\w.-]+", lambda m: names.setdefault(m[0], str(len(names))), line) for line in lines]

    between = fnn.watch(loss, every=2)
    assert text(lambda p, b: between.value_and_grad(p, *b, step=1)[0]) == text(
        lambda p, b: jax.value_and_grad(loss)(p, *b)
    )


def test_aux_goes_through():
    loss, params, batch = MODELS["plain_mlp"]()
    watch = fnn.watch(lambda p, x, y: (loss(p, x, y), {"x": x + 1}), has_aux=True)
    ((value, aux), _), flow = watch.value_and_grad(params, *batch)
    np.testing.assert_allclose(value, flow.loss)
    np.testing.assert_allclose(aux["x"], batch[0] + 1)


def test_only_what_is_asked_for():
    flow, *_ = taken("linen_mlp", "gradient", only="Dense_1/*")
    assert {row.path for row in flow.rows()} == {"Dense_1/kernel", "Dense_1/bias"}
    assert {row.quantity for row in flow.rows()} == {"log10_gradient", "log10_gradient_rms"}
    # What is not asked for is not computed: no more than a plain gradient's products.
    loss, params, batch = MODELS["linen_mlp"]()
    program = str(jax.make_jaxpr(fnn.watch(loss, groups="activation"))(params, *batch))
    assert program.count("dot_general[") == 4


def test_error_of_a_weighted_loss_has_another_name():
    loss, params, batch = MODELS["plain_mlp"]()
    plain, weighted = fnn.watch(loss)(params, *batch), fnn.watch(loss, weighted=True)(params, *batch)
    np.testing.assert_allclose(
        measured(plain, "log10_error")["w1"],
        measured(weighted, "log10_error_norm")["w1"] + 0.5 * np.log10(6),
        rtol=1e-5,
    )
    assert not measured(weighted, "log10_error")


def test_what_the_loss_does_not_reach_is_minus_infinity():
    params = {"a": jnp.ones((8, 3)), "b": jnp.ones((8, 3)), "c": jnp.ones(3)}
    flow = fnn.watch(lambda p, x: jnp.mean(x @ p["a"]) + 0 * jnp.sum(jax.lax.stop_gradient(x @ p["b"])))(params, X)
    assert measured(flow)["b"] == measured(flow)["c"] == measured(flow, "log10_error")["b"] == -np.inf
    assert np.isfinite(measured(flow)["a"])


def test_bad_input():
    loss, params, _ = MODELS["plain_mlp"]()
    with pytest.raises(TypeError, match="watch: loss must be a function"):
        fnn.watch(params)
    with pytest.raises(ValueError, match="groups"):
        fnn.watch(loss, groups="gradients")
    with pytest.raises(ValueError, match="share their leading axis.*got 6, 8"):
        fnn.watch(lambda p, x: jnp.mean(x["a"] @ p) + jnp.mean(x["b"]))(jnp.ones((8, 3)), {"a": X, "b": jnp.ones(8)})
    with pytest.raises(ValueError, match="at least one example, got none"):
        fnn.watch(lambda p, x: jnp.mean(x @ p))(jnp.ones((8, 3)), X[:0])
    with pytest.raises(ValueError, match="the loss must be one float"):
        fnn.watch(lambda p, x: x @ p)(jnp.ones((8, 3)), X)
    with pytest.raises(ValueError, match="several lanes"):
        jax.vmap(fnn.watch(loss), in_axes=(None, 0, 0))(params, X[:, None], Y[:, None]).rows()


def test_explain_says_what_was_found():
    loss, params, batch = MODELS["equinox_recurrent"]()
    text = fnn.watch(loss).explain(params, *batch)
    assert "cell/weight_hh: dot_general float32[6,8] -> float32[24,6], 7 steps" in text
    assert "gradients alone, no product with data: cell/bias" in text


def test_tables_flat_names_and_print():
    flow, *_ = taken("linen_mlp")
    assert flow.table().columns == ["layer", "path", "quantity", "value"]
    flat = flow.flat()
    assert flat["Dense_0/kernel/log10_gradient"] == measured(flow)["Dense_0/kernel"]
    assert "Dense_3/kernel" in str(flow)
    assert flow.worst(1)[0].path in measured(flow)
    assert {row.path for row in flow.select("*/bias", "log10_*")} == {f"Dense_{i}/bias" for i in range(4)}


def test_layers_are_counted_whatever_is_measured():
    loss, params, batch = MODELS["linen_mlp"]()
    every = {(row.path, row.quantity): row.layer for row in fnn.watch(loss)(params, *batch).rows()}
    for group in ("gradient", "error", "cosine"):
        flow = fnn.watch(loss, groups=group)(params, *batch)
        assert all(row.layer == every.get((row.path, row.quantity), row.layer) for row in flow.rows())
        assert [layer for layer, _ in flow.labels.starts] == [1, 2, 3, 4]
        assert {row.layer for row in flow.rows()} == {1, 2, 3, 4}


def test_prints_say_what_is_missing():
    loss, params, (x, y) = MODELS["linen_mlp"]()
    assert "in table() too: input_mean, output_dead" in str(fnn.watch(loss)(params, x, y))
    assert "first_bad(params, batch)" in str(fnn.watch(loss)(params, x * jnp.nan, y))
    between = fnn.watch(loss, every=2).value_and_grad(params, x, y, step=1)[1]
    assert str(between).endswith("not measured at this step")
    assert "no layers among these parameters" in str(fnn.watch(loss, only="*/bias")(params, x, y))
    assert "Dense_3/kernel" in str(fnn.watch(loss, groups="gradient")(params, x, y))
    assert repr(between) == "Flow(loss=nan, 44 numbers of 4 layers)"
    seen = []
    jax.jit(lambda p: seen.append(str(fnn.watch(loss)(p, x, y))))(params)
    assert "traced" in seen[0]


def test_a_figure_leaves_out_what_is_zero_and_says_so(tmp_path):
    flow = fnn.watch(lambda p, x: jnp.mean(jax.nn.relu(x @ p["a"] - 1e9) @ p["b"]))(
        {"a": jnp.ones((8, 3)), "b": jnp.ones((3, 2))}, X
    )
    above, below = flow.plot(tmp_path / "flow.png").axes
    assert (tmp_path / "flow.png").stat().st_size > 1000
    labels = [line.get_label() for line in (*above.lines, *below.lines)]
    assert labels[1:3] == ["weight gradient (0 in 2 of 2 layers)", "input (0 in 1 of 2 layers)"]
    np.testing.assert_allclose(below.lines[0].get_ydata()[0], 0.5 * np.log10(np.mean(np.square(X))), atol=1e-6)
    assert np.isnan(below.lines[0].get_ydata()[1])
    with pytest.raises(ValueError, match=r"flow.plot: it draws"):
        fnn.watch(lambda p, x: jnp.mean(x @ p), groups="cosine")(jnp.ones((8, 3)), X).plot()


def test_traps_end_in_one_sentence():
    loss, params, batch = MODELS["plain_mlp"]()
    flow = fnn.watch(loss)(params, *batch)
    with pytest.raises(ValueError, match="one float, got .*pass has_aux=True if"):
        fnn.watch(lambda p, *b: (loss(p, *b), {"x": 1}))(params, *batch)
    with pytest.raises(ValueError, match=r"with has_aux=True the loss must return \(value, aux\), got float32"):
        fnn.watch(loss, has_aux=True).explain(params, *batch)
    with pytest.raises(
        ValueError, match="only must match a parameter's path, got 'kernel'; paths are like b1, scale, w1"
    ):
        fnn.watch(loss, only="kernel")(params, *batch)
    with pytest.raises(TypeError, match="only must be a pattern"):
        fnn.watch(loss, only=["w1"])
    with pytest.raises(ValueError, match="did you mean 'log10_gradient'"):
        flow.worst(3, "log10_grad")
    with pytest.raises(ValueError, match="k must be a positive integer"):
        flow.worst(0)
    with pytest.raises(TypeError, match="made on the host, got a flow of traced arrays"):
        jax.jit(lambda p: fnn.watch(loss)(p, *batch).rows())(params)
