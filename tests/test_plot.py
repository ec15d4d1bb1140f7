"""`plot.flow`: the lines' data against the measured numbers, and theory on the layers that it speaks of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
Y = jnp.arange(16) % 3


def readme(depth=5):
    """The net of the README: taps at layers 2..depth + 1 of depth + 2."""
    block = fnn.serial(fnn.dense(8), fnn.tap(), fnn.batch_norm(), fnn.activation("tanh"))
    return fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.repeat(block, depth), fnn.dense(3))


def some():
    """Taps at layers 2 and 4 of 5."""
    parts = [fnn.dense(8), fnn.activation("tanh")]
    return fnn.serial(
        *parts, fnn.dense(8), fnn.tap(), *parts, fnn.dense(8), fnn.tap(), fnn.activation("tanh"), fnn.dense(3)
    )


def measure(net):
    return fnn.gradient_flow(net, net.init(KEY, X), (X, Y))


def theory(depth, **options):
    options = {"activation": "tanh", "sigma_w": 1.2, "sigma_b": 0.3, "q0": 0.5} | options
    return fnn.meanfield.predict(depth, **options)


def lines(figure):
    return {line.get_label(): line.get_xydata().T for line in figure.axes[0].get_lines()}


@pytest.mark.parametrize(
    ("net", "taps", "depth", "anchor"),
    [
        (readme(), range(2, 7), 6, 6),
        (readme(), range(2, 7), 5, 5),
        (readme(), range(2, 7), 7, 6),
        (readme(), range(2, 7), 2, 2),
        (fnn.models.mlp(4, 8, 3, activation="tanh", taps=True), range(1, 6), 4, 4),
        (fnn.models.mlp(4, 8, 3, activation="tanh", taps=True), range(1, 6), 5, 5),
        (some(), (2, 4), 5, 4),
        (some(), (2, 4), 3, 2),
    ],
)
def test_theory_stands_at_its_layers_and_goes_through_the_last_measured_one(net, taps, depth, anchor):
    measured, predicted = measure(net), theory(depth)
    drawn = lines(fnn.plot.flow(measured, theory=predicted))
    errors = {row.layer: row.value for row in reversed(measured.rows) if row.quantity == "log10_error"}
    np.testing.assert_allclose(drawn["error signal"], [list(taps), [errors[layer] for layer in taps]])
    layers, values = drawn["mean-field theory"]
    np.testing.assert_array_equal(layers, np.arange(1, depth + 1))
    assert values[anchor - 1] == pytest.approx(errors[anchor], abs=1e-12)
    # Towards the input log10 |delta|² grows by log10 of sigma_w² E[phi'(h)²], which is predict's chi.
    np.testing.assert_allclose(-2 * np.diff(values), np.log10(predicted.chi[:-1]), atol=1e-12)
    kernels = [row.value for row in measured.rows if row.quantity == "log10_kernel"]
    np.testing.assert_allclose(drawn["weight gradient"], [np.arange(1, len(kernels) + 1), kernels])


def test_theory_that_does_not_fit_is_refused(tmp_path):
    measured = measure(readme())
    for depth in (8, 60):
        with pytest.raises(
            ValueError, match=rf"plot.flow: theory must speak of layers that the net has, got {depth} of"
        ):
            fnn.plot.flow(measured, theory=theory(depth))
    with pytest.raises(ValueError, match=r"got layers 1 to 1 of theory and \[2, 3, 4, 5, 6\] measured; put a tap"):
        fnn.plot.flow(measured, theory=theory(1))
    with pytest.raises(TypeError, match="theory must be what meanfield.predict returns, got ndarray"):
        fnn.plot.flow(measured, theory=np.zeros(6))
    fnn.plot.flow(measured, path=tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes()[:4] == b"\x89PNG"


def test_density_draws_the_values_with_their_errors(tmp_path):
    pytest.importorskip("matfree")
    matrix = jnp.diag(jnp.arange(1.0, 31.0))
    found = fnn.curvature(lambda p: 0.5 * p @ matrix @ p)(jnp.ones(30)).hessian.density(steps=30, max_probes=4)
    figure = fnn.plot.density(found, path=tmp_path / "density.png")
    (axis,) = figure.axes
    drawn = axis.lines[0].get_ydata()
    np.testing.assert_allclose(drawn, np.maximum(found.values, 1e-6 * found.values.max()))
    assert axis.get_yscale() == "log" and (tmp_path / "density.png").stat().st_size > 5000
    with pytest.raises(TypeError, match=r"plot.density: needs what hessian.density\(\) returns, got list"):
        fnn.plot.density([1.0])
