"""Spectra as quantities of a study, against dense Hessians, Jacobians and kernels of the same nets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import fnn
from fnn.spectra import stability
from fnn.study import cell, spectral, spectral_figures, table
from fnn.study.summary import summarize

pl = pytest.importorskip("polars")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.xdist_group("spectral")
CLASSES = 3
NET = {"depth": 2, "width": 6, "activation": "tanh", "clip": "none", "batch_size": 12}
SHAPE = {"depth": 2, "width": 6, "activation": "tanh", "classes": CLASSES}


def dense(params, state, batch):
    """The same numbers from stored matrices, in a few lines of plain JAX."""
    net = cell.mlp(**SHAPE)
    flat, unflatten = ravel_pytree(params)

    def outputs(flat, x):
        return net.apply(unflatten(flat), state, x, train=True)[0]

    def loss(flat):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs(flat, batch[0]), batch[1]))

    def batched(x):
        return outputs(flat, batch[0].at[0].set(x))[0]

    # Reverse over reverse: the taps' rule has no forward mode.
    h = jax.jacrev(jax.grad(loss))(flat)
    s = jnp.linalg.svd(jax.jacrev(batched)(batch[0][0]), compute_uv=False)
    j = jax.jacrev(outputs)(flat, batch[0])
    ntk = jnp.linalg.eigvalsh(jnp.einsum("iop,jop->ij", j, j))
    return {
        "sharpness": jnp.linalg.eigvalsh(h)[-1],
        "hessian_trace": jnp.trace(h),
        "hessian_trace_error": jnp.sqrt(2 * (jnp.sum(h**2) - jnp.sum(jnp.diag(h) ** 2)) / spectral.PROBES),
        "log10_singular_max": jnp.log10(s[0]),
        "log10_singular_min": jnp.log10(s[-1]),
        "log10_singular_rms": jnp.log10(jnp.mean(s**2)) / 2,
        "log10_singular_fourth": jnp.log10(jnp.mean(s**4)) / 4,
        "ntk_condition": ntk[-1] / ntk[0],
    }


def first_rise(params, state, batch):
    """The critical sharpness of the gradient's direction, from the loss at 4000 rates."""
    net = cell.mlp(**SHAPE)

    def loss(params):
        outputs = net.apply(params, state, batch[0], train=True)[0]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, batch[1]))

    rates, gradient = jnp.geomspace(0.1, 1e3, 4000), jax.grad(loss)(params)
    moved = jax.vmap(lambda r: loss(jax.tree.map(lambda p, g: p - r * g, params, gradient)))(rates)
    return {"lambda_c": 2 / rates[jnp.argmax(moved > loss(params))]}


@pytest.fixture(scope="module")
def measured():
    """All quantities but one of a net that trains by Adam. A second study, by SGD, would take as long to compile."""
    grid = fnn.grid.product(**NET, optimizer="adam", learning_rate=0.3)
    names = [name for name in spectral.QUANTITIES if name != "lambda_c"]
    options = {"seeds": 2, "steps": [0, 4], "data": "clusters", "measure": {"dense": dense}}
    return fnn.Study(grid, quantities=(*names, "dense"), **options).run().table()


def both(frame, quantity):
    """What was measured and the dense number, [runs · steps]."""
    keys = ["cell", "seed", "step"]
    rows = frame.filter(pl.col("quantity") == quantity).select(*keys, "value")
    others = frame.filter((pl.col("quantity") == "dense") & (pl.col("path") == quantity)).select(*keys, dense="value")
    joined = rows.join(others, on=keys)
    assert joined.height == rows.height > 0
    return joined["value"].to_numpy(), joined["dense"].to_numpy()


@pytest.mark.parametrize(
    ("quantity", "tolerance"),
    [
        *(("sharpness", 0.01), ("log10_singular_max", 1e-5), ("log10_singular_min", 1e-4)),
        *(("log10_singular_rms", 1e-5), ("log10_singular_fourth", 1e-5), ("ntk_condition", 1e-2)),
    ],
)
def test_a_study_measures_what_stored_matrices_say(measured, quantity, tolerance):
    found, expected = both(measured, quantity)
    assert len(found) == 4
    hidden = np.isinf(found)  # where rounding hides the smallest eigenvalue, also of the stored kernel
    assert np.all(np.abs(expected[hidden]) > 1e6) and hidden.sum() < 3
    found, expected = found[~hidden], expected[~hidden]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance if "log10" in quantity else 0)


def test_the_trace_is_within_its_errors(measured):
    found, expected = both(measured, "hessian_trace")
    # The variance of vᵀHv over signs v is twice the sum of the squared entries off the diagonal.
    errors, true = both(measured, "hessian_trace_error")
    assert np.all(np.abs(found - expected) < 4 * errors)
    assert np.all(errors < 1.6 * true) and np.all(errors > 0.6 * true)


def test_singular_values_have_a_row_each_and_theory_stands_beside_their_moments(measured):
    frame = measured
    each = frame.filter((pl.col("quantity") == "log10_singular") & (pl.col("cell") == 0) & (pl.col("seed") == 0))
    assert each.filter(pl.col("step") == 0)["path"].to_list() == ["[0]", "[1]"]  # clusters have two inputs
    assert each["layer"].unique().to_list() == [0]
    rms = frame.filter(pl.col("quantity") == "log10_singular_rms")
    assert rms.filter(pl.col("step") == 0)["predicted"].is_not_null().all()
    assert rms.filter(pl.col("step") == 4)["predicted"].is_null().all()


def test_adam_is_preconditioned_from_its_first_step_on(measured):
    rows = measured.filter(pl.col("quantity") == "preconditioned_sharpness", pl.col("value").is_not_nan())
    assert rows["step"].to_list() == [4, 4]
    plain = measured.filter(pl.col("quantity") == "sharpness", pl.col("step") == 4)
    assert (rows.sort("seed")["value"] > 2 * plain.sort("seed")["value"]).all()


OPTIMIZERS = optax.adam(0.1), optax.adamw(0.1), optax.rmsprop(0.1), optax.sgd(0.1, 0.9), optax.sgd(0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_preconditioner_is_that_of_the_stability_report(optimizer):
    params = {"a": jnp.arange(1.0, 4.0), "b": jnp.ones((2, 2))}
    state = optimizer.init(params)
    for scale in (1.0, 0.3):
        state = optimizer.update(jax.tree.map(lambda p, s=scale: s * p, params), state, params)[1]
    found = jax.jit(lambda s, p: stability.preconditioner("test", optimizer, s, p))(state, params)
    expected = stability.respond("test", optimizer, state, params).inverse
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_thresholds_are_those_of_the_optimisers():
    values = [spectral_figures.threshold(name, 0.25) for name in ("sgd", "momentum", "rmsprop", "adam")]
    np.testing.assert_allclose(values, [8, 2 * 1.9 / 0.25, 8, 38 / 0.25], rtol=1e-3)


def test_figures_draw_the_threshold_and_the_moments_of_theory(measured):
    plain = measured.filter(pl.col("quantity").is_in(["sharpness", "preconditioned_sharpness"]))
    plain = plain.with_columns(optimizer=pl.lit("sgd", measured.schema["optimizer"]))
    adam = measured.with_columns(cell=pl.lit(1, measured.schema["cell"]))
    s = summarize(pl.concat([plain, adam]))
    figure = spectral_figures.sharpness(s)
    dashed = [line for axis in figure.axes for line in axis.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1  # of SGD alone: Adam's holds for the preconditioned sharpness
    np.testing.assert_allclose(dashed[0].get_ydata(), 2 / 0.3, rtol=1e-5)
    both = spectral_figures.DRAWN["preconditioned_sharpness"](s)
    dashed = [line.get_ydata()[0] for axis in both.axes for line in axis.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed, [2 / 0.3, 38 / 0.3], rtol=1e-3)
    assert spectral_figures.singular(s) is None  # one depth
    deep = fnn.Study(
        fnn.grid.product(**(NET | {"depth": [1, 3], "width": 8})),
        seeds=2,
        steps=0,
        data="clusters",
        quantities=[
            "log10_singular_max",
            "log10_singular_min",
            "log10_singular_rms",
            "log10_singular_fourth",
            "log10_singular",
        ],
    )
    s = summarize(deep.table())
    (axis,) = spectral_figures.singular(s).axes
    told = [line for line in axis.lines if line.get_linestyle() in ("--", ":") and line.get_color() == "k"]
    rms = fnn.meanfield.singular_moments("tanh", [2, 8, CLASSES], q=_mean_square(deep)).first
    assert len(told) == 2
    np.testing.assert_allclose(told[0].get_ydata()[0], np.log10(rms) / 2, rtol=1e-6)
    assert spectral_figures.density(s) is not None


def _mean_square(described):
    return float(np.mean(np.asarray(described._setup().train.x[0], np.float64) ** 2))


def test_theory_of_moments_holds_for_wide_nets():
    grid = fnn.grid.product(depth=3, width=300, activation="tanh", sigma_w=1.3, sigma_b=0.1)
    names = ["log10_singular_rms", "log10_singular_fourth"]
    rows = fnn.Study(grid, seeds=8, steps=0, quantities=names).table()
    for name in names:
        part = rows.filter(pl.col("quantity") == name)
        spread = part["value"].std() / np.sqrt(8)
        assert abs(part["value"].mean() - part["predicted"][0]) < 3 * spread + 0.01


def test_what_rounding_hides_is_nan_and_no_loss_of_range():
    grid = fnn.grid.product(**(NET | {"depth": 60, "width": 6, "sigma_w": 0.02}))
    rows = fnn.Study(
        grid, seeds=1, steps=0, data="clusters", quantities=["log10_singular_max", "log10_singular_min"]
    ).table()
    assert rows.filter(pl.col("quantity") != "diverged")["value"].is_nan().all()  # 10^-102
    assert table.left_range(rows) is None


def test_critical_sharpness_is_that_of_the_next_step_and_its_price_is_shown_before_a_run(capsys):
    grid = fnn.grid.product(**NET, optimizer="sgd", learning_rate=0.3)
    options = {"seeds": 2, "steps": [0, 4], "data": "clusters", "measure": {"dense": first_rise}}
    described = fnn.Study(grid, quantities=["lambda_c", "dense"], **options)
    assert described.cost().startswith("study: a record takes up to so many gradients: lambda_c 16; 64 for 4 records")
    rows = described.run(progress=True).table()
    assert "lambda_c 16" in capsys.readouterr().err.partition("compiling")[0]
    found, expected = both(rows, "lambda_c")
    assert len(found) == 4
    np.testing.assert_allclose(found, expected, rtol=4e-3)
    price = described.price(rounds=2)
    assert [row.name for row in price.rows] == ["plain gradient", "lambda_c"]
    assert fnn.Study(fnn.grid.product(**NET), data="clusters").cost() is None
    with pytest.raises(ValueError, match="quantities must name one that has a price"):
        fnn.Study(fnn.grid.product(**NET), data="clusters").price()


def pair(classes=2):
    return lambda key, x: {"w": jnp.zeros((2, CLASSES))}, lambda p, batch: jnp.mean((batch[0] @ p["w"]) ** 2)


def test_a_pair_has_the_quantities_of_its_loss_alone():
    grid = {"batch_size": [8], "clip": ["none"], "optimizer": ["sgd"]}
    rows = fnn.Study(
        grid, seeds=1, steps=0, data="clusters", build=pair, quantities=["sharpness", "hessian_trace"]
    ).table()
    found = dict(rows.filter(pl.col("step") == 0).select("quantity", "value").iter_rows())
    x = np.asarray(fnn.Study(grid, data="clusters")._setup().train.x[:8], np.float64)
    values = 2 * np.linalg.eigvalsh(x.T @ x / 8) / CLASSES
    assert found["sharpness"] == pytest.approx(values[-1], rel=1e-4)
    assert found["hessian_trace"] == pytest.approx(CLASSES * values.sum(), rel=1e-4)
    assert set(rows["layer"]) == {0}
    with pytest.raises(ValueError, match="ntk_condition needs a net's outputs"):
        fnn.Study(grid, data="clusters", build=pair, quantities=["ntk_condition"]).cells()


def test_what_cannot_be_measured_is_refused_before_a_run(monkeypatch):
    with pytest.raises(
        ValueError, match="preconditioned_sharpness is known for sgd, momentum, adam, adamw, rmsprop, got lamb"
    ):
        fnn.Study(NET | {"optimizer": ["lamb"]}, data="clusters", quantities=["preconditioned_sharpness"]).cells()
    with pytest.raises(ValueError, match="a measurement needs a name that no quantity has, got 'sharpness'"):
        fnn.Study(NET, data="clusters", measure={"sharpness": dense})
    monkeypatch.setattr(spectral, "DENSE", 1)
    monkeypatch.setitem(__import__("sys").modules, "matfree", None)
    monkeypatch.setitem(__import__("sys").modules, "matfree.decomp", None)
    with pytest.raises(ImportError, match=r"study: log10_singular: needs matfree.*fnn\[spectra\]"):
        fnn.Study(NET, data="clusters", quantities=["log10_singular"]).cells()
