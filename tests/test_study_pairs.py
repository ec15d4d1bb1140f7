"""Studies of pairs (init, loss): models of any framework, their numbers against `watch`, optax and a plain loop."""

import equinox
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import fnn
from fnn.study import cell, nets, report, study
from fnn.study.summary import summarize

pl = pytest.importorskip("polars")

# One worker: the tests share the compilations.
pytestmark = pytest.mark.xdist_group("pairs")


CLASSES = 3  # of the clusters


def judged(logits, y):
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return entropy, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == y)}


def plain(width=8, scale=1.0, classes=2):
    def init(key, x):
        a, b = jax.random.split(key)
        first = scale * jax.random.normal(a, (x.shape[1], width)) / np.sqrt(x.shape[1])
        return {"hidden": first, "output": jax.random.normal(b, (width, classes)) / np.sqrt(width)}

    return init, lambda p, batch: judged(jnp.tanh(batch[0] @ p["hidden"]) @ p["output"], batch[1])


class Net(linen.Module):
    width: int
    classes: int

    @linen.compact
    def __call__(self, x):
        return linen.Dense(self.classes)(jnp.tanh(linen.Dense(self.width)(x)))


def in_linen(width=8, classes=2):
    net = Net(width, classes)
    return net.init, lambda p, batch: judged(net.apply(p, batch[0]), batch[1])


class Mlp(nnx.Module):
    def __init__(self, inputs, width, classes, rngs):
        self.hidden = nnx.Linear(inputs, width, rngs=rngs)
        self.output = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        return self.output(jnp.tanh(self.hidden(x)))


def in_nnx(width=8, classes=2, inputs=2):
    def make(key):
        return nnx.split(Mlp(inputs, width, classes, nnx.Rngs(key)), nnx.Param, ...)

    graph, _, _ = nnx.split(Mlp(inputs, width, classes, nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, batch):
        return judged(nnx.merge(graph, params, nnx.State({}))(batch[0]), batch[1])

    return lambda key, x: make(key)[1], loss


def in_equinox(width=8, classes=2, inputs=2):
    def make(key):
        return equinox.partition(equinox.nn.MLP(inputs, classes, width, 1, jnp.tanh, key=key), equinox.is_inexact_array)

    _, static = make(jax.random.key(0))
    return lambda key, x: make(key)[0], lambda p, batch: judged(
        jax.vmap(equinox.combine(p, static))(batch[0]), batch[1]
    )


def in_haiku(width=8, classes=2):
    net = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([width, classes], activation=jnp.tanh)(x)))
    return net.init, lambda p, batch: judged(net.apply(p, batch[0]), batch[1])


def of(build, axes=None, **options):
    grid = fnn.grid.product(batch_size=16, **({"clip": "none"} | (axes or {})))
    return study.Study(grid, **({"seeds": 2, "steps": 0, "data": "clusters", "build": build} | options))


@pytest.mark.parametrize("build", [plain, in_linen, in_nnx, in_equinox, in_haiku])
def test_a_study_measures_what_watch_does(build):
    described = of(build)
    setup = described._setup()
    init, loss = build(classes=CLASSES)
    batch = setup.train.x[:16], setup.train.y[:16]
    params = jax.jit(init)(jax.random.key(2), batch[0])
    flow = fnn.watch(loss, has_aux=True)(params, batch)  # of seed 1
    table = described.table().filter(pl.col("seed") == 1)
    mine = table.filter(pl.col("layer") > 0)
    columns = ["layer", "path", "quantity"]
    assert mine.select(columns).rows() == flow.table().select(columns).rows() and flow.labels.starts
    np.testing.assert_allclose(mine["value"], flow.table()["value"], atol=1e-5)
    heldout = jax.jit(loss)(params, (setup.test.x, setup.test.y))
    of_run = dict(table.filter(pl.col("layer") == 0).select("quantity", "value").iter_rows())
    assert of_run == {
        "loss": pytest.approx(float(heldout[0]), rel=1e-5),
        "accuracy": pytest.approx(float(heldout[1]["accuracy"]), abs=1e-6),
        "diverged": 0,
    }


def test_training_is_that_of_a_plain_loop():
    axes = {"optimizer": "momentum", "clip": "global_norm", "clip_threshold": 0.5, "learning_rate": [0.1, 0.3]}
    described = of(plain, axes | {"scale": [0.5, 2.0]}, steps=[2, 5], traced=["scale"], seeds=[3])
    setup, (task,) = described._setup(), described.cells()
    assert len(task.runs) == 4
    run = task.runs[1]
    init, loss = plain(scale=run["scale"], classes=CLASSES)
    x, y = setup.train
    params, order = jax.jit(init)(jax.random.key(6), x[:16]), cell._orders(setup, task)[1]
    tx = optax.chain(fnn.clip.by_global_norm(0.5), optax.sgd(run["learning_rate"], momentum=0.9))
    state, values, norms, fractions, cosines, before = tx.init(params), [], [], [], [], None
    grad, update = jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(tx.update)
    for t in range(6):
        if t in (0, 2, 5):
            (_, _), g = grad(params, (x[:16], y[:16]))
            now = np.asarray(g["hidden"], np.float64)
            now = now / np.linalg.norm(now)
            ratio = np.linalg.norm(update(g, state, params)[0]["hidden"]) / np.linalg.norm(params["hidden"])
            cosines.append((float(ratio), None if before is None else float(np.sum(now * before))))
            before = now
        if t < 5:
            (value, _), g = grad(params, (x[order[t]], y[order[t]]))
            updates, state = update(g, state, params)
            params = jax.tree.map(np.add, *jax.device_get((params, updates)))
            values.append(float(value))
            norms.append(np.sqrt(sum(np.sum(np.square(a)) for a in g.values())))
            fractions.append(float(norms[-1] > 0.5))
    table = described.table().filter(
        (pl.col("scale") == run["scale"]) & (pl.col("learning_rate") == run["learning_rate"])
    )

    def column(quantity, path=""):
        return table.filter((pl.col("quantity") == quantity) & (pl.col("path") == path)).sort("step")["value"]

    np.testing.assert_allclose(column("train_loss"), values, rtol=1e-4)
    np.testing.assert_allclose(column("grad_norm"), norms, rtol=1e-4)
    np.testing.assert_allclose(column("clip_fraction"), fractions)
    np.testing.assert_allclose(column("loss")[2], jax.jit(loss)(params, tuple(setup.test))[0], rtol=1e-4)
    np.testing.assert_allclose(column("update_ratio", "hidden"), [ratio for ratio, _ in cosines], rtol=1e-3)
    np.testing.assert_allclose(column("cosine", "hidden"), [c for _, c in cosines[1:]], atol=1e-4)
    assert table.filter(quantity="cosine", path="hidden")["layer"].to_list() == [1, 1]
    flow = fnn.watch(loss, has_aux=True)(params, (x[:16], y[:16]))
    last = table.filter((pl.col("step") == 5) & (pl.col("quantity") == "log10_error"))
    np.testing.assert_allclose(last["value"], [row.value for row in flow.select(quantity="log10_error")], atol=1e-3)


def test_held_out_examples_count_once_each():
    """1,500 of them, of which 1,024 are evaluated at once."""
    init, loss = plain(classes=CLASSES)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1500, 2)).astype(np.float32), rng.integers(CLASSES, size=1500)
    params, of_pair = jax.jit(init)(jax.random.key(0), x), nets.OfPair(nets.Pair(init, loss), ())
    (value, more), found = jax.jit(loss)(params, (x, y)), jax.jit(of_pair.heldout)(params, (), x, y)
    np.testing.assert_allclose([found["loss"], found["accuracy"]], [value, more["accuracy"]], rtol=1e-5)


def deep(depth=256, width=8, classes=2):
    """ReLU and N(0, 1/fan_in): the signal halves its square in each layer, and leaves float32."""

    def init(key, x):
        first = jax.random.normal(jax.random.fold_in(key, 1), (x.shape[1], width)) / np.sqrt(x.shape[1])
        return {"first": first, "trunk": jax.random.normal(key, (depth, width, width)) / np.sqrt(width)}

    def loss(params, batch):
        h, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(h) @ w, None), batch[0] @ params["first"], params["trunk"])
        return jnp.mean(h[:, 0] * (2 * batch[1] - 1))

    return init, loss


@pytest.mark.parametrize("seeds", [[0], [0, 1]])  # one lane is not mapped
def test_a_pair_that_leaves_float32_is_measured_in_float64(seeds):
    described = of(deep, seeds=seeds, quantities=["log10_error", "loss", "accuracy"])
    table, init = described.table(), deep()[0]
    assert study.widened(table).startswith(f"study: {len(seeds)} runs of cell 0 were measured in float64 at step 0")
    x, y = (a[:16] for a in described._setup().train)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), init(jax.random.key(0), x))
    h, d = [np.asarray(x, np.float64) @ params["first"]], np.zeros((16, 8))
    for w in params["trunk"]:
        h.append(np.maximum(h[-1], 0) @ w)
    d[:, 0] = 2 * y - 1  # of single examples
    want = [np.linalg.norm(d)]
    for w, before in zip(params["trunk"][::-1], h[-2::-1], strict=True):
        d = (d @ w.T) * (before > 0)
        want.append(np.linalg.norm(d))
    mine = table.filter((pl.col("seed") == 0) & (pl.col("quantity") == "log10_error"))
    assert mine["float64"].all() and not table.filter(quantity="loss")["float64"].any()
    np.testing.assert_allclose(mine["value"], np.log10(want[::-1]) - 0.5 * np.log10(16), atol=1e-6)
    assert "accuracy" not in table["quantity"]  # the loss does not give it


def test_a_report_draws_pairs_and_says_what_was_measured_in_float64(tmp_path):
    axes = {"depth": [8, 256], "width": 8}
    rows = of(deep, axes, quantities=["log10_error", "log10_gradient"]).run(tmp_path).table()
    names = [path.name for path in fnn.report.report(tmp_path)]
    assert names[::3] == ["gradient.png", "weights.png", "report.html"]
    text = (tmp_path / "report.html").read_text()
    assert "2 runs of cell 1 were measured in float64 at step 0" in text
    found = summarize(rows)
    assert report.contents(found)["series"][0]["id"] == "log10_error"
    errors = rows.filter((pl.col("quantity") == "log10_error") & (pl.col("cell") == 1)).sort("seed", "layer")
    first, *_, last, _ = errors.filter(seed=0)["value"]
    one = summarize(rows.filter(seed=0)).networks["log10_growth"][1]
    assert one == pytest.approx((first - last) / 255, rel=1e-9)
    # Infinitely wide, the square halves in each layer: -0.1505 in log10. Width 8 is far from that.
    assert -0.25 < found.networks["log10_growth"][1] < -0.1505


def test_quantities_choose_what_watch_measures_of_layers_too():
    axes = {"depth": 2, "width": 8, "activation": "tanh", "norm": "none"}
    names = ["log10_kernel", "log10_gradient", "input_rank", "cosine_to_weight"]
    options = {"seeds": 1, "steps": 0, "data": "clusters", "quantities": names}
    described = study.Study(fnn.grid.product(batch_size=16, **axes), **options)
    table = described.table()
    assert set(table["quantity"]) == set(names)
    tapped, watched = (table.filter(pl.col("quantity") == name).sort("path") for name in names[:2])
    watched = watched.filter(pl.col("path").str.ends_with("kernel"))
    assert tapped["path"].equals(watched["path"])
    np.testing.assert_allclose(tapped["value"], watched["value"], atol=1e-5)
    # Taps measure the error signal: asking for it takes no second measurement, and gives no second row.
    error = study.Study(fnn.grid.product(batch_size=16, **axes), **(options | {"quantities": ["log10_error"]})).table()
    assert set(error["role"]) == {"preactivation", "activation"}
    setup, (task,) = described._setup(), described.cells()
    params, state = cell.draw(setup, task.static, task.runs[0])
    net, (x, y) = cell.network(setup, task.static, task.runs[0]).net, setup.train
    kernel = params[1]["kernel"]
    g = jax.jit(jax.grad(lambda p: jnp.mean(fnn.losses.cross_entropy(net.apply(p, state, x[:16])[0], y[:16]))))(params)[
        1
    ]["kernel"]
    cosine = table.filter(pl.col("path") == "1/kernel", pl.col("quantity") == "cosine_to_weight")["value"]
    np.testing.assert_allclose(cosine, [np.sum(g * kernel) / np.linalg.norm(g) / np.linalg.norm(kernel)], atol=1e-5)
    assert of(plain, quantities=["input_kurtosis"]).table()["quantity"].unique().to_list() == ["input_kurtosis"]


def test_the_identity_of_a_pair_is_that_of_its_build_and_draws_do_not_depend_on_x64():
    def other(width=8, classes=2):
        init, loss = plain(width, classes=classes)
        return init, lambda p, batch: 2 * loss(p, batch)[0]

    one, two = (of(build).describe()["build"] for build in (plain, other))
    assert one != two and one == of(plain).describe()["build"]
    described = of(in_equinox)
    setup, (task,) = described._setup(), described.cells()
    narrow = jax.device_get(cell.draw(setup, task.static, task.runs[0]))
    with jax.enable_x64(True):
        wide = jax.device_get(jax.jit(lambda: cell.draw(described._setup(), task.static, task.runs[0]))())
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert b.dtype == np.float64 and np.array_equal(np.asarray(a, np.float64), b)


def broken(loss, init=lambda key, x: {"w": jnp.zeros((2, 2))}):
    return {"build": lambda width=1: (init, loss)}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"build": lambda width=1: (1, 2)}, TypeError, "must return a Layer, or a pair of functions"),
        ({"loss": fnn.losses.mse}, ValueError, "loss must be left out where build returns a pair"),
        ({"quantities": ["log10_kernel"]}, ValueError, "unknown quantity 'log10_kernel'"),
        (broken(lambda p, batch: batch[0] @ p["w"]), ValueError, "must be one float, got float32"),
        (broken(lambda p, batch: (jnp.zeros(()), {"accuracy": batch[1]})), ValueError, "accuracy must be one number"),
        (broken(lambda p, batch: 0.0, lambda key, x: {"n": 3}), TypeError, "params must be real floating arrays"),
        (
            broken(lambda p, x, y: 0.0),
            TypeError,
            r"the loss that build returned must be a function of \(params, batch\)",
        ),
        ({"measure": {"log10_error": lambda p, s, b: 1}}, ValueError, "a name that no quantity has"),
    ],
)
def test_bad_pairs_are_refused_before_anything_runs(options, error, sentence):
    with pytest.raises(error, match=sentence):
        of(plain, **options).describe() if "build" not in options else of(**options).describe()
