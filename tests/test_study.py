"""Studies: every number against the plain way to it, runs that diverge alone, nets and measurements of one's own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn.study import budget, cell, expected, study
from fnn.study import table as table_of

pl = pytest.importorskip("polars")

# One worker: the tests share the fixtures, and those the compilations.
pytestmark = pytest.mark.xdist_group("study")
STEPS = (0, 2, 5)


def small(norms=("none", "batch_norm"), **options):
    """A cell of six runs for each norm: three seeds that train, and the same three at a rate at which they diverge."""
    grid = fnn.grid.product(depth=3, width=16, activation="tanh", norm=list(norms), batch_size=16, optimizer="momentum")
    options = {"seeds": 3, "steps": STEPS, "data": "clusters", "measure": {"largest": largest}} | options
    return study.Study(grid * fnn.grid.product(learning_rate=[0.3, 1e38]), **options)


def largest(params, state, batch):
    return jax.tree.map(lambda a: jnp.max(jnp.abs(a)), params[-2]) | {"batch": batch[0].shape[0] * jnp.ones(2)}


@pytest.fixture(scope="module")
def measured():
    described = small()
    return described, described.run().table()


def plain_run(described, static, seed, rate):
    """Train one run by a Python loop of `train_step`, measuring with `gradient_flow` and `evaluate`."""
    setup = described._setup()
    train, test = setup.train, setup.test
    run = {"seed": seed, "sigma_w": 1.0, "sigma_b": 0.0, "learning_rate": rate, "clip_threshold": 1.0}
    task = cell.Cell(static, (run,), STEPS)
    net = cell.network(setup, static, run).net
    params, state = jax.jit(net.init)(jax.random.key(2 * seed), train.x[:16])
    optimizer = optax.chain(fnn.clip.by_global_norm(1.0), optax.sgd(rate, momentum=0.9))
    at = fnn.TrainState(params, state, optimizer.init(params), jax.random.key(2 * seed + 1), jnp.zeros((), jnp.int32))
    step, order, records, metrics = (
        fnn.train_step(net, fnn.losses.cross_entropy, optimizer),
        cell._orders(setup, task),
        [],
        [],
    )
    before = None
    probe = train.x[:16], train.y[:16]

    @jax.jit
    def gradient_and_update(at):
        def objective(p):
            return jnp.mean(fnn.losses.cross_entropy(net.apply(p, at.net_state, probe[0], train=True)[0], probe[1]))

        gradient = jax.grad(objective)(at.params)
        return gradient, optimizer.update(gradient, at.opt_state, at.params)[0]

    for t in range(STEPS[-1] + 1):
        if t in STEPS:
            measured = fnn.gradient_flow(net, at, probe)
            gradient, updates = gradient_and_update(at)
            ratio = jnp.linalg.norm(updates[-2]["kernel"]) / jnp.linalg.norm(at.params[-2]["kernel"])
            now = np.asarray(gradient[-2]["kernel"], np.float64)
            cosine = None if before is None else np.sum(now * before) / np.linalg.norm(now) / np.linalg.norm(before)
            before = now
            heldout = fnn.evaluate(net, at, test)
            records.append((measured, heldout, float(ratio), cosine, float(jnp.max(jnp.abs(at.params[-2]["kernel"])))))
        if t < STEPS[-1]:
            index = order[0, t]
            at, one = step(jax.tree.map(jnp.copy, at), (train.x[index], train.y[index]))
            metrics.append(jax.device_get(one))
    return records, metrics


@pytest.mark.parametrize("number", [0, 1])
def test_every_number_is_that_of_a_plain_loop(measured, number):
    described, table = measured
    static = described.cells()[number].static
    records, metrics = plain_run(described, static, seed=1, rate=0.3)
    rows = table.filter((pl.col("cell") == number) & (pl.col("seed") == 1) & (pl.col("learning_rate") == 0.3))
    head = [p for p in rows["path"].unique() if p.endswith("/kernel") and "trunk" not in p]
    head = max(head, key=lambda path: int(path.split("/")[0]))  # the output layer's kernel
    for (flow, heldout, ratio, cosine, peak), step in zip(records, STEPS, strict=True):
        at = rows.filter(pl.col("step") == step)
        values = {(r["quantity"], r["layer"], r["path"]): r["value"] for r in at.iter_rows(named=True)}
        # Relative to the largest of its kind: under batch norm a bias has a gradient of rounding errors.
        for row in flow.rows:
            if (row.quantity.startswith("log10_bias") and number == 1 and row.layer < 4) or row.quantity == "peak":
                continue
            assert values[row.quantity, row.layer, row.path] == pytest.approx(row.value, rel=1e-3, abs=2e-3), (
                row,
                step,
            )
        assert values["loss", 0, ""] == pytest.approx(heldout["loss"], rel=1e-4)
        assert values["accuracy", 0, ""] == pytest.approx(heldout["accuracy"], abs=1e-6)
        assert values["update_ratio", 4, head] == pytest.approx(ratio, rel=1e-3)
        assert (values["cosine", 4, head] if step else None) == (cosine and pytest.approx(cosine, abs=1e-3))
        mine = at.filter((pl.col("quantity") == "largest") & (pl.col("path") == "kernel"))["value"].item()
        assert mine == pytest.approx(peak, rel=1e-4)
    shares = at.filter((pl.col("quantity") == "largest") & pl.col("path").str.starts_with("batch"))
    assert shares["path"].to_list() == ["batch[0]", "batch[1]"] and shares["value"].to_list() == [16, 16]
    names = {"train_loss": "loss", "train_accuracy": "accuracy"} | {
        n: n for n in ("grad_norm", "clip_fraction", "clip_removed")
    }
    for quantity, name in names.items():
        trace = rows.filter((pl.col("quantity") == quantity) & (pl.col("layer") == 0)).sort("step")["value"]
        np.testing.assert_allclose(trace, [m[name] for m in metrics], rtol=1e-3, atol=1e-4)


def test_every_epoch_has_an_order_of_its_own():
    """No example comes twice in an epoch; each epoch and each seed has another order, and all rates of a seed have one."""
    described = small(norms=["none"], seeds=2, steps=(0, 12), data=(np.zeros((50, 2)), np.arange(50) % 2), measure={})
    setup, (task,) = described._setup(), described.cells()
    orders = cell._orders(setup, task)
    assert orders.shape == (4, 12, 16)  # 2 seeds at 2 rates; 4 epochs of 3 batches, which leave 2 of 50 examples out
    epochs = {}
    for run, order in zip(task.runs, orders.reshape(4, 4, 48).tolist(), strict=True):
        assert all(len(set(epoch)) == 48 and set(epoch) <= set(range(50)) for epoch in order)
        assert epochs.setdefault(run["seed"], order) == order
    assert len({tuple(epoch) for order in epochs.values() for epoch in order}) == 2 * 4


def test_a_run_that_diverges_ends_its_own_record_and_harms_no_neighbour(measured):
    _, table = measured
    ends = table.filter(pl.col("quantity") == "diverged")
    assert ends.height == 12  # one for each run
    good, bad = ends.filter(pl.col("learning_rate") < 1), ends.filter(pl.col("learning_rate") > 1)
    assert good["value"].to_list() == [0] * 6 and good["step"].to_list() == [5] * 6
    # A rate of 1e38 throws the weights out of float32's range in the first or second step.
    assert bad["value"].to_list() == [1] * 6 and set(bad["step"]) <= {1, 2}
    joined = table.join(bad.select("cell", "seed", "learning_rate", end="step"), on=["cell", "seed", "learning_rate"])
    assert joined.filter(pl.col("quantity") != "diverged").filter(pl.col("step") > pl.col("end")).is_empty()
    assert table.filter(pl.col("learning_rate") < 1)["value"].is_finite().all()


def test_the_table_is_tidy_and_predictions_stand_at_initialisation(measured):
    _, table = measured
    keys = [c for c in table.columns if c not in ("value", "predicted", "low", "high", "outside")]
    assert table.select(keys).is_unique().all()
    assert table.schema["seed"] == pl.Int32 and table.schema["learning_rate"] == pl.Float64
    predicted = table.filter(pl.col("predicted").is_not_null())
    assert set(predicted["quantity"]) == {"log10_error"} and set(predicted["step"]) == {0}
    assert set(predicted["layer"]) == {1, 2, 3}
    last = predicted.filter(pl.col("layer") == 3)
    np.testing.assert_allclose(last["predicted"], last["value"], rtol=1e-12)


def test_neither_neighbours_nor_chunks_change_a_number_and_padding_stays_out_of_the_table(measured):
    """The runs that train, without the others and in chunks of two, the last of which is padded."""
    described, table = measured
    whole = described.cells()[0]
    alone = whole._replace(runs=tuple(run for run in whole.runs if run["learning_rate"] < 1), chunk=2)
    result = cell.run_cell(described._setup(), alone)
    rows = table_of.build(0, alone, result, axes=dict(described.describe()["types"]), quantities=None, theory=None)
    with_others = table.filter((pl.col("cell") == 0) & (pl.col("learning_rate") < 1))
    assert rows["path"].to_list() == with_others["path"].to_list()
    np.testing.assert_allclose(rows["value"], with_others["value"], rtol=1e-4, atol=1e-4)


def test_chunk_size_follows_the_bytes_that_a_run_touches():
    described = study.Study(fnn.grid.product(depth=[2, 64], width=64, norm="none"), seeds=8, epochs=60)
    shallow, deep = (budget.chunk_size(described._setup(), c) for c in described.cells())
    assert (shallow, deep) == (8, 1)


def sine(slope, scale, width=8, classes=2):
    """Build a net of one's own: `slope` is traced, `scale` static."""
    wave = fnn.activation(lambda x: jnp.sin(slope * x))
    block = fnn.serial(fnn.dense(width, kernel_init=fnn.initializers.scaled(scale)), fnn.tap(), wave)
    return fnn.serial(block, fnn.repeat(block, 2), fnn.dense(classes))


def test_any_net_any_data_any_loss():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    y = (x[:, :1] - x[:, 1:2]).astype(np.float32)
    described = study.Study(
        fnn.grid.product(scale=1.5, slope=[0.5, 1.0], batch_size=8, optimizer="sgd", clip="none"),
        seeds=[3, 7], epochs=2, data=(x, y), build=sine, loss=fnn.losses.mse, traced=["slope"], quantities=["log10_error", "loss"],
    )  # fmt: skip
    (only,) = described.cells()
    assert only.static["scale"] == 1.5 and len(only.runs) == 4 and only.steps == (0, 5, 10)
    table = described.table()
    assert set(table["quantity"]) == {"log10_error", "loss"} and table["predicted"].null_count() == table.height
    assert set(table["seed"]) == {3, 7} and table.schema["slope"] == pl.Float64
    losses = (
        table.filter(pl.col("quantity") == "loss").group_by("step").agg(pl.col("value").mean()).sort("step")["value"]
    )
    assert losses[2] < losses[0]
    # The traced slope reaches the forward pass: one run, measured outside.
    net = sine(0.5, 1.5, classes=1)
    params, state = jax.jit(net.init)(jax.random.key(6), x[:8])
    flow = fnn.gradient_flow(net, (params, state), (x[:8], y[:8]), loss=fnn.losses.mse)
    mine = table.filter(
        (pl.col("seed") == 3) & (pl.col("slope") == 0.5) & (pl.col("step") == 0) & (pl.col("layer") > 0)
    )
    np.testing.assert_allclose(mine["value"], flow.log10_error, atol=1e-4)


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
from test_study import small
assert len(jax.devices()) == 2
small(["none"], chunk=4, quantities=["loss", "train_loss", "log10_error", "cosine"]).run(sys.argv[2])
"""


def test_runs_sharded_over_devices_agree_with_one(measured, tmp_path):
    """Two runs on each of two devices, the second chunk padded."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, os.path.dirname(__file__), str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    found = fnn.results.read(tmp_path)
    assert len(found.sessions[0]["devices"]) == 2
    good = pl.col("learning_rate") < 1
    many, one = found.table().filter(good), measured[1].filter(good & (pl.col("cell") == 0))
    assert set(many["quantity"]) == {"loss", "train_loss", "log10_error", "cosine"}
    one = one.filter(pl.col("quantity").is_in(many["quantity"].unique().implode()))
    assert many.drop("value", "predicted", "low", "high", "outside").equals(
        one.drop("value", "predicted", "low", "high", "outside")
    )
    np.testing.assert_allclose(many["value"], one["value"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"grid": fnn.grid.Grid(())}, ValueError, "at least one point"),
        ({"grid": {"depth": []}}, ValueError, "depth must name at least one value"),
        ({"grid": {"dpeth": [3]}}, ValueError, "did you mean 'depth'"),
        ({"grid": {"depth": [0]}}, ValueError, "depth must be a positive integer"),
        ({"grid": {"activation": ["tahn"]}}, ValueError, "did you mean 'tanh'"),
        ({"grid": {"optimizer": ["adma"]}}, ValueError, "did you mean 'adam'"),
        ({"grid": {"clip": ["norm"]}}, ValueError, "unknown clip 'norm'"),
        ({"grid": {"learning_rate": [-1.0]}}, ValueError, "learning_rate must be a finite number above 0"),
        ({"grid": {"sigma_w": [-1.0]}}, ValueError, "sigma_w must be finite and at least 0"),
        ({"grid": {"batch_size": [5000]}}, ValueError, "at most the 1438 training examples"),
        ({"grid": {"seed": [-1]}}, ValueError, "seed must be an integer of at least 0"),
        ({"grid": 3}, TypeError, "must be a Grid"),
        ({"quantities": ["loggerror"]}, ValueError, "unknown quantity 'loggerror'; did you mean 'log10_error'"),
        ({"seeds": 0}, ValueError, "seeds must be a positive integer"),
        ({"steps": [-1]}, ValueError, "steps must be an integer of at least 0"),
        ({"chunk": 0}, ValueError, "chunk must be a positive integer"),
        ({"measure": {"loss": largest}}, ValueError, "a name that no quantity has"),
        ({"build": lambda **axes: None}, TypeError, "must name each axis"),
        ({"build": lambda depth: None, "grid": {"depth": [1]}}, TypeError, "must return a Layer"),
        ({"build": lambda depth, extra: None, "grid": {"depth": [1]}}, ValueError, "build needs extra"),
        ({"traced": ["nothing"]}, ValueError, "traced must name arguments of build"),
        ({"data": 3}, TypeError, "data must be a name"),
    ],
)
def test_bad_studies_are_refused_before_anything_runs(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        study.Study(**arguments).describe()


def test_the_variance_that_batch_norm_divides_the_first_layer_by():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 5)) * [3, 2, 1, 1, 0.5]
    # 400,000 draws of 1/v, whose fourth moment is infinite at rank 5: within 2 % (three standard errors are 0.9 %).
    w = 1.3 / np.sqrt(5) * rng.normal(size=(5, 400_000))
    drawn = 1 / np.mean(1 / np.var(x @ w, axis=0))
    assert expected.first_variance(x, 1.3) == pytest.approx(drawn, rel=0.02)
    assert expected.first_variance(x[:, :2], 1.0) is None


def test_cells_that_share_a_program_have_the_numbers_of_their_own():
    """Alone, an activation has a program of its own; beside others, one that chooses among them by number.

    By SGD: Adam makes whole steps of the gradients of biases before batch norm, which are rounding errors.
    """
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(32, 8)).astype(np.float32), rng.integers(0, 3, 32))
    axes = {"depth": 1, "width": 8, "norm": "batch_norm", "batch_size": 8, "optimizer": "sgd"}

    def measured(activations):
        grid = fnn.grid.product(activation=activations, **axes)
        return fnn.Study(grid, seeds=2, steps=4, data=(data, data)).run().table()

    together = measured(["tanh", "relu", "gelu"])
    keys = ["activation", "norm", "seed", "step", "layer", "path", "quantity"]
    for name in ("relu",):  # another number would be another
        alone, beside = measured([name]), together.filter(activation=name)
        assert alone.height == beside.height and set(alone["quantity"]) == set(beside["quantity"])
        pairs = beside.join(alone, on=keys, suffix=" alone").filter(~pl.col("path").str.ends_with("bias"))
        close = pairs.filter(pl.col("quantity") != "cosine")
        np.testing.assert_allclose(close["value"], close["value alone"], rtol=2e-4, atol=2e-5, equal_nan=True)
