"""Coordinate checks: the slopes that the papers expect, a net of one's own, and update·x against the product itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

import fnn
from fnn.cli import coordinates as command
from fnn.cli.main import main
from fnn.study import coordinates


def slopes(found):
    return {(s.parametrization, s.role, s.quantity): s for s in found.slopes()}


pytestmark = pytest.mark.xdist_group("coordinates")  # they share what is measured once


@pytest.fixture(scope="module")
def width():
    return fnn.coordinate_check("width", [32, 512], parametrization=["standard", "mup"], options={"depth": 3}, seeds=3)


def test_mup_is_flat_against_width_and_standard_is_not(width):
    """|slope| < 0.1 for every layer under mup; under standard that of the hidden layers is above 0.3."""
    found = slopes(width)
    for role in ("input", "hidden", "output"):
        assert abs(found["mup", role, "log10_activation"].slope) < 0.1
        assert abs(found["mup", role, "log10_update"].slope) < 0.15
    assert found["standard", "hidden", "log10_activation"].low > 0.3
    assert found["standard", "hidden", "log10_update"].low > 0.5
    for slope in found.values():
        assert slope.low < slope.slope < slope.high


def test_completep_is_flat_against_depth_and_mup_is_not():
    """|slope| < 0.1 from 4 to 64 hidden layers under completep; under mup activations and updates grow.

    At width 32 the updates of the output layer shrink at first: -0.16 here, -0.08 for width 64 and up to 256 layers.
    """
    options = {"width": 32, "residual": True}
    chosen = [fnn.parametrizations.Parametrization(name, base_width=32) for name in ("mup", "completep")]
    found = slopes(fnn.coordinate_check("depth", [4, 64], parametrization=chosen, options=options, seeds=3))
    for role in ("input", "hidden", "output"):
        for quantity in coordinates.QUANTITIES:
            bound = 0.25 if (role, quantity) == ("output", "log10_update") else 0.1
            assert abs(found["completep", role, quantity].slope) < bound, (role, quantity)
    assert found["mup", "hidden", "log10_activation"].low > 0.3
    assert found["mup", "hidden", "log10_update"].low > 0.3


def test_what_is_measured_against_plain_jax():
    """A pair (init, loss) of one's own, one step of gradient descent: |h| and |(W' - W) x| of both layers, by hand."""

    def build(width):
        def init(key, x):
            a, b = jax.random.split(key)
            return {"a": jax.random.normal(a, (x.shape[1], width)) / 2, "b": jax.random.normal(b, (width, 3)) / width}

        def loss(params, batch):
            x, y = batch
            logits = jnp.tanh(x @ params["a"]) @ params["b"]
            return jnp.mean(fnn.losses.cross_entropy(logits, y))

        return init, loss

    rng = np.random.default_rng(0)
    data = (rng.normal(size=(20, 5)).astype(np.float32), rng.integers(0, 3, 20).astype(np.int32))
    given = {"steps": 1, "seeds": 2, "optimizer": "sgd", "learning_rate": 0.5, "batch_size": 8, "data": (data, data)}
    table = fnn.coordinate_check("width", [4, 6], parametrization=["standard"], build=build, **given).table
    init, loss = build(6)
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(20)
        first, second = ((data[0][i], data[1][i]) for i in (order[:8], order[8:16]))
        old = jax.jit(init)(jax.random.key(seed), first[0])
        new = jax.tree.map(lambda w, g: w - 0.5 * g, old, jax.jit(jax.grad(loss))(old, second))
        old, new = jax.device_get((old, new))
        x = {"a": first[0], "b": np.tanh(first[0] @ new["a"])}
        rows = table.filter((pl.col("seed") == seed) & (pl.col("width") == 6))
        for layer, name in enumerate("ab", 1):
            for quantity, a in (
                ("log10_activation", x[name] @ new[name]),
                ("log10_update", x[name] @ (new[name] - old[name])),
            ):
                row = rows.filter((pl.col("layer") == layer) & (pl.col("quantity") == quantity)).row(0, named=True)
                assert row["path"] == name and row["role"] == ("input", "output")[layer - 1]
                assert row["value"] == pytest.approx(np.log10(np.mean(a**2)) / 2, abs=2e-5)


@pytest.mark.parametrize(
    "y, options, want",
    [(np.zeros((20, 3), np.float32), {}, 3), (np.arange(20) % 4, {}, 4), (np.arange(20) % 4, {"classes": 7}, 7)],
)
def test_a_net_gets_as_many_outputs_as_its_targets_ask_for(y, options, want):
    def build(width, classes):
        raise ZeroDivisionError(f"{classes} outputs")

    with pytest.raises(ZeroDivisionError, match=f"{want} outputs"):
        fnn.coordinate_check(
            "width", [4, 6], build=build, options=options, data=(np.ones((20, 5), np.float32), y), seeds=1
        )


def test_slopes_and_intervals_of_a_known_line(width):
    """Seeds with slopes 0.4, 0.5 and 0.6: mean 0.5, and t(0.975, 2) · 0.1/sqrt(3) = 0.2484 to each side."""
    rows = [
        ("mup", 2**k, seed, 1, "w", "input", "log10_update", 1 + slope * np.log10(2.0**k))
        for k in (3, 4, 6)
        for seed, slope in enumerate((0.4, 0.5, 0.6))
    ]
    found = coordinates.Check("width", 1, pl.DataFrame(rows, schema=width.table.columns, orient="row")).slopes()
    assert found[0][:3] == ("mup", "input", "log10_update")
    np.testing.assert_allclose(found[0][3:], [0.5, 0.5 - 0.24841, 0.5 + 0.24841], atol=1e-4)


def test_the_figure_says_what_it_shows(width):
    figure = width.figure()
    assert [axis.get_title() for axis in figure.axes] == ["standard", "mup", "", ""]
    texts = [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    slope = slopes(width)["mup", "hidden", "log10_update"]
    assert f"hidden: {slope.slope:+.2f} [{slope.low:+.2f}, {slope.high:+.2f}]" in texts
    assert "after 3 steps; medians of 3 seeds" in figure.get_suptitle()


def test_the_command(tmp_path, capsys):
    words = "study --check width 8:16 --parametrization mup --depth 2 --seeds 2 --steps 1 --batch-size 8 --out"
    assert main([*words.split(), str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "mup" in out and "hidden" in out and (tmp_path / "check.png").stat().st_size > 10_000
    table = pl.read_parquet(tmp_path / "check.parquet")
    assert sorted(table["width"].unique()) == [8, 16] and table["value"].is_finite().all()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("height 1:2", "unknown check 'height'"),
        ("width 64:8", "must be a list of whole numbers, or first:last, got '64:8'"),
        ("width a,b", "must be a list of whole numbers"),
        ("width 64", "width must have at least two values"),
        ("width 8,16 --parametrization mub", "did you mean 'mup'"),
        ("width 8,16 --parametrization completep --residual false", "completep is about residual nets"),
        ("width 8,16 --widht 3", "unknown option --widht"),
    ],
)
def test_bad_checks_are_refused(words, sentence, capsys):
    assert main(["study", "--check", *words.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_ranges_double():
    assert command.doubled("width", "64:1024") == [64, 128, 256, 512, 1024]
    assert command.doubled("depth", "4:20") == [4, 8, 16] and command.doubled("depth", "3,5") == [3, 5]
    with pytest.raises(ValueError, match="build must have the argument depth"):
        fnn.coordinate_check("depth", [1, 2], build=lambda width: None)
    assert isinstance(fnn.optimizers.parametrized(optax.adam(1e-3), "mup"), optax.GradientTransformation)
