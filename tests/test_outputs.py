"""Outputs and targets as trees, weights, tokens, tasks, penalties and metrics: against NumPy, then the laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax
from scipy import special

import fnn
from fnn import losses

RNG = np.random.default_rng(0)
N = 24
X = RNG.normal(size=(N, 4)).astype(np.float32)
DIGIT, ANGLE = np.arange(N) % 3, RNG.normal(size=(N, 2)).astype(np.float32)
Y = {"digit": DIGIT, "angle": ANGLE}
W = RNG.integers(0, 4, N).astype(np.float32)
KEY, SGD = jax.random.key(0), optax.sgd(0.1)
TASKS = losses.sum_of({"digit": losses.cross_entropy, "angle": (losses.mse, 0.5)})


NET = fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.parallel({"digit": fnn.dense(3), "angle": fnn.dense(2)}))
STATE = fnn.TrainState.create(NET, SGD, KEY, X)


def applied(net, state, x):
    return jax.device_get(jax.jit(net.apply)(state.params, state.net_state, x)[0])


def copy(state):
    return jax.tree.map(jnp.copy, state)


def close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def rows(tree, times):
    return jax.tree.map(lambda a: np.repeat(a, times, axis=0), tree)


def stepped(step, batch):
    state, metrics = step(copy(STATE), batch)
    return state.params, metrics


def hits(outputs, y):
    return jnp.argmax(outputs["digit"], -1) == y["digit"]


def auc(of, thresholds=51):
    """The area under the ROC curve of a probability, from counts at thresholds."""
    at = jnp.linspace(0, 1, thresholds)

    def counts(outputs, y):
        p, label = of(outputs, y)
        above = p[:, None] >= at
        return above * label[:, None], above * (1 - label)[:, None]

    return losses.Metric(counts, lambda s: -jnp.trapezoid(s[0] / s[0][0], s[1] / s[1][0]))


OWN = {
    "hits": hits,
    "auc": auc(lambda o, y: (jax.nn.softmax(o["digit"])[:, 1], (y["digit"] == 1).astype(float))),
    "r2": losses.Metric(
        lambda o, y: (
            jnp.ones(len(y["angle"])),
            y["angle"][:, 0],
            y["angle"][:, 0] ** 2,
            (o["angle"] - y["angle"])[:, 0] ** 2,
        ),
        lambda s: 1 - s[3] / (s[2] - s[1] ** 2 / s[0]),
    ),
}


def by_hand(outputs, y, weights):
    """All numbers of the two tasks in NumPy, float64."""
    outputs = jax.tree.map(lambda a: np.asarray(a, np.float64), outputs)
    w, logits = np.asarray(weights, np.float64), outputs["digit"]
    entropy = special.logsumexp(logits, -1) - logits[np.arange(len(w)), y["digit"]]
    square = np.mean((outputs["angle"] - y["angle"]) ** 2, -1)
    mean = functools.partial(np.average, weights=w)
    right, target = logits.argmax(-1) == y["digit"], y["angle"][:, 0].astype(np.float64)
    error = outputs["angle"][:, 0] - target
    above = special.softmax(logits, -1)[:, 1, None].astype(np.float32) >= np.linspace(0, 1, 51, dtype=np.float32)
    rates = [np.sum((w * side)[:, None] * above, 0) / np.sum(w * side) for side in (y["digit"] == 1, y["digit"] != 1)]
    return {
        "loss": mean(entropy) + 0.5 * mean(square),
        "loss/digit": mean(entropy),
        "loss/angle": mean(square),
        "accuracy/digit": mean(right),
        "hits": mean(right),
        "auc": -np.trapezoid(*rates),
        "r2": 1 - np.sum(w * error**2) / np.sum(w * (target - mean(target)) ** 2),
    }


@pytest.mark.parametrize("weights", [None, W], ids=["plain", "weighted"])
def test_two_tasks_and_metrics_in_step_and_evaluate_are_those_of_numpy(weights):
    data = (X, Y) if weights is None else (X, Y, weights)
    want = by_hand(applied(NET, STATE, X), Y, np.ones(N) if weights is None else weights)
    _, metrics = fnn.train_step(NET, TASKS, SGD, metrics=OWN)(copy(STATE), data)
    assert {"grad_norm", "update_ratio"} | set(want) == set(metrics)
    close({name: metrics[name] for name in want}, want)
    for size in (7, 100):  # the last window overlaps the one before, and nothing counts twice
        close(fnn.evaluate(NET, STATE, data, loss=TASKS, metrics=OWN, batch_size=size), want)


def test_an_integer_weight_is_a_repeated_example():
    """In every number of a step: the new parameters, the losses, accuracies and metrics; weight 0 is an example left out."""
    times = W.astype(int)
    step = fnn.train_step(NET, TASKS, SGD, metrics=OWN)
    close(stepped(step, (X, Y, W)), stepped(step, rows((X, Y), times)))
    close(stepped(step, (X, Y, W > 0)), stepped(step, jax.tree.map(lambda a: a[W > 0], (X, Y))))
    some = {"digit": losses.Weighted(DIGIT, W), "angle": ANGLE}  # weights of one task
    own = {
        "hits": lambda o, y: losses.Counted(
            y["digit"].weights * (jnp.argmax(o["digit"], -1) == y["digit"].targets), y["digit"].weights
        )
    }
    step = fnn.train_step(NET, TASKS, SGD, metrics=own)
    _, metrics = step(copy(STATE), (X, some))
    close(metrics["hits"], metrics["accuracy/digit"])
    step = fnn.train_step(NET, TASKS, SGD)
    both = step(copy(STATE), (X, Y))[1], step(copy(STATE), (X, Y, W))[1]
    close(metrics["loss/angle"], both[0]["loss/angle"])
    close((metrics["loss/digit"], metrics["accuracy/digit"]), (both[1]["loss/digit"], both[1]["accuracy/digit"]))
    twice = step(copy(STATE), (X, some, W))[1]["loss/digit"]  # weights multiply
    close(twice, step(copy(STATE), (X, Y, W**2))[1]["loss/digit"])


def test_a_loss_over_a_tree_that_is_a_plain_function_works_everywhere():
    def mine(outputs, y):
        return jnp.sum((outputs["angle"] - y["angle"]) ** 2, -1) + losses.cross_entropy(outputs["digit"], y["digit"])

    net = fnn.serial(NET, fnn.activation(lambda y: y))
    tapped = fnn.serial(fnn.dense(8), fnn.tap(), *[NET])
    for loss, layer in ((mine, net), (TASKS, tapped)):
        state = fnn.TrainState.create(layer, SGD, KEY, X)
        if layer is tapped:
            for data, w in (((X, Y), np.ones(N)), ((X, Y, W), W)):
                outputs = applied(layer, state, X)
                measured = fnn.gradient_flow(layer, state, data, loss=loss)
                close(measured.loss, by_hand(outputs, Y, w)["loss"])
            continue

        def whole(params, batch, loss=loss, layer=layer, state=state):
            return losses.mean(loss, layer.apply(params, state.net_state, batch[0], train=True)[0], batch[1])

        value, grads = jax.jit(jax.value_and_grad(whole))(state.params, (X, Y))
        trained, metrics = fnn.train_step(layer, loss, SGD)(copy(state), (X, Y))
        close(trained.params, jax.tree.map(lambda p, g: p - 0.1 * g, *jax.device_get((state.params, grads))))
        one = fnn.example_loss(layer, state, loss=loss)

        @jax.jit
        def of_each(params, one=one):
            every = fnn.per_example(one)(params, (X, Y))
            return every.mean(), every.materialize(), jax.vmap(jax.grad(one), (None, 0))(params, (X, Y))

        mean, gradients, expected = of_each(state.params)
        close(mean, grads, atol=1e-5)
        close(gradients, expected, atol=1e-5)
        flow = fnn.watch(whole)(state.params, (X, Y))
        found = {name: 10 ** flow.flat()[f"{name}/log10_gradient"] for name in fnn.tree.paths(grads)}
        close(list(found.values()), [np.linalg.norm(g) for g in jax.tree.leaves(grads)], rtol=1e-4)
        close([metrics["loss"], fnn.evaluate(layer, state, (X, Y), loss=loss)["loss"], flow.loss], [value] * 3)


def test_the_flow_of_a_net_with_two_outputs_is_measured_in_float64_where_it_must():
    faint = fnn.activation(lambda x: x * 1e-25)
    net = fnn.serial(
        fnn.dense(8), fnn.tap(), faint, faint, fnn.parallel({"digit": fnn.dense(3), "angle": fnn.dense(2)})
    )
    params, state = net.init(KEY, X)
    flow = fnn.gradient_flow(net, (params, state), (X, Y, W), loss=TASKS)
    assert flow.precision == "float64"
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: as_jax(a, np.float64), (params, X, W))

        def whole(params):
            outputs = net.apply(params, state, wide[1], train=True)[0]
            return losses.mean(TASKS, outputs, losses.Weighted(Y, wide[2]))

        first = np.asarray(jax.jit(jax.grad(whole))(wide[0])[0]["kernel"])
    found = next(row.value for row in flow.rows if row.quantity == "log10_kernel")
    np.testing.assert_allclose(found, np.log10(np.linalg.norm(first / 1e-50)) - 50, rtol=1e-6)


def test_fit_takes_trees_weights_and_metrics():
    step = fnn.train_step(NET, TASKS, SGD, metrics={"hits": hits})
    batches = [(X[i : i + 8], {k: v[i : i + 8] for k, v in Y.items()}, W[i : i + 8]) for i in range(0, N, 8)]
    one, history = fnn.fit(step, STATE, batches, epochs=2, validation=(X, Y, W))
    loop = copy(STATE)
    for batch in batches * 2:
        loop, metrics = step(loop, batch)
    close(one.params, loop.params)
    close({name: curve[-1] for name, curve in history.train.items()}, metrics)
    close(
        {name: curve[-1] for name, curve in history.validation.items()},
        fnn.evaluate(NET, one, batches, loss=TASKS, metrics={"hits": hits}),
    )
    assert "validation accuracy/digit" in str(history) and "train loss/angle" in str(history)
    options = {"epochs": 1, "batch_size": 6, "key": KEY}
    _, history = fnn.fit(step, STATE, (X, Y, W), validation=0.25, **options)
    assert history.train["loss"].shape == (3,) and set(history.validation) >= {"loss", "accuracy/digit", "hits"}
    x, (y, w) = next(fnn.data.batches((X, Y, W), 5, key=KEY))
    index = [int(np.argmax((row == X).all(1))) for row in x]
    close((y, w), ({k: v[index] for k, v in Y.items()}, W[index]))


def test_a_tuple_of_outputs_nested_tasks_and_a_target_that_is_missing():
    """A net's own penalty is an output that has no target."""
    net = fnn.serial(
        fnn.dense(8), fnn.parallel(fnn.parallel({"digit": fnn.dense(3), "kl": fnn.dense(2)}), fnn.dense(2))
    )
    kl = losses.Loss("kl", lambda z, none: jnp.sum(z**2, -1) / 2)
    loss = losses.sum_of([losses.sum_of({"digit": losses.focal(2), "kl": (kl, 0.1)}), (losses.huber(0.5), 2)])
    state = fnn.TrainState.create(net, SGD, KEY, X)
    data = X, ({"digit": DIGIT}, ANGLE)
    found = fnn.evaluate(net, state, data, loss=loss, batch_size=7)
    heads, angle = jax.tree.map(lambda a: np.asarray(a, float), applied(net, state, X))
    assert set(found) == {"loss", "loss/0/digit", "loss/0/kl", "loss/1", "accuracy/0/digit"}
    close(found["loss/0/kl"], np.mean(np.sum(heads["kl"] ** 2, -1)) / 2)
    close(found["loss"], found["loss/0/digit"] + 0.1 * found["loss/0/kl"] + 2 * found["loss/1"])
    error = np.abs(angle - ANGLE)
    close(found["loss/1"], np.mean(np.where(error <= 0.5, error**2 / 2, 0.5 * error - 0.125)))
    _, metrics = fnn.train_step(net, loss, SGD)(state, data)
    close({name: metrics[name] for name in found}, found)


def test_heads_by_name_are_heads_side_by_side():
    one, other = fnn.dense(3), fnn.dense(2)
    named, plain = fnn.parallel({"b": other, "a": one}), fnn.parallel(one, other)
    params, state = named.init(KEY, X)
    close((params["a"], params["b"]), plain.init(KEY, X)[0])
    y, new = named.apply(params, state, X)
    close((y["a"], y["b"]), plain.apply((params["a"], params["b"]), ((), ()), X)[0])
    assert new == state == {"a": (), "b": ()}
    with pytest.raises(TypeError, match="parallel: needs a dict of names and Layers, got 'a': 3"):
        fnn.parallel({"a": 3})


def test_per_example_gradients_are_those_of_shares():
    """Their mean is the step's gradient with weights, tokens and tasks; norms are those of w l / mean(w) by vmap(grad)."""
    mixed = losses.sum_of({"digit": losses.cross_entropy, "angle": (lambda o, y: losses.Counted(o[:, 0] ** 2, y), 0.5)})
    counts = {"digit": DIGIT, "angle": 1 + np.arange(N) % 4}
    for loss, data, clip in ((TASKS, (X, Y, W), False), (mixed, (X, counts, W), True)):
        steps = [
            fnn.train_step(NET, loss, SGD, per_example=kind, metrics={"n": lambda o, y: jnp.ones(N)})
            for kind in (None, "norms")
        ]
        plain, found = (step(copy(STATE), data) for step in steps)
        close(found[0].params, plain[0].params)
        close({name: found[1][name] for name in plain[1]}, plain[1])

        def share(params, x, y, w, loss=loss, data=data):
            outputs = NET.apply(params, STATE.net_state, x[None])[0]
            one = {name: losses.mean(inner, outputs[name], y[name][None]) for name, (_, inner) in loss.tasks.items()}
            n = y["angle"] if loss is mixed else 1
            means = [
                np.mean(data[2] if len(data) > 2 else 1),
                np.mean((data[2] if len(data) > 2 else 1) * (counts["angle"] if loss is mixed else 1)),
            ]
            return w * one["digit"] / means[0] + 0.5 * w * n * one["angle"] / means[1]

        weights = data[2] if len(data) > 2 else np.ones(N, np.float32)
        grads = jax.jit(jax.vmap(jax.grad(share), (None, 0, 0, 0)))(STATE.params, data[0], data[1], weights)
        norms = np.sqrt(sum(np.sum(np.square(g.reshape(N, -1)), 1) for g in jax.tree.leaves(grads)))
        close(found[1]["per_example_norms"], norms, rtol=1e-4)
        if not clip:  # once is enough
            continue
        bound = float(np.median(norms))
        clipped, _ = fnn.train_step(NET, loss, SGD, per_example="clip", max_norm=bound)(copy(STATE), data)
        factor = np.minimum(1, bound / np.maximum(norms, 1e-30))
        mean = jax.tree.map(lambda g, f=factor: np.tensordot(f, g, 1) / N, grads)
        close(clipped.params, jax.tree.map(lambda p, g: p - 0.1 * g, STATE.params, mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"per_example": "clip", "max_norm": 0.05}], ids=["plain", "after the clip"])
def test_a_penalty_adds_its_own_gradient_and_its_own_metric(options):
    seen = []

    def recorded(updates, state, params=None, *, value=None, **more):
        seen.append(value)
        return updates, state

    optimizer = optax.chain(optax.GradientTransformationExtraArgs(lambda params: (), recorded), SGD)
    state = fnn.TrainState.create(NET, optimizer, KEY, X)
    step = fnn.train_step(NET, TASKS, optimizer, penalty=lambda p: 0.5 * optax.tree.norm(p, squared=True), **options)
    bare = fnn.train_step(NET, TASKS, optimizer, **options)
    (new, metrics), (old, without) = step(copy(state), (X, Y)), bare(copy(state), (X, Y))
    close(new.params, jax.tree.map(lambda a, p: a - 0.1 * p, old.params, state.params))
    square = sum(np.sum(np.square(p)) for p in jax.tree.leaves(state.params))
    close((metrics["penalty"], metrics["loss"]), (0.5 * square, without["loss"]))
    assert "penalty" not in without and len(seen) == 2
    assert "penalty" in fnn.train_step(NET, TASKS, SGD, penalty=fnn.tree.norm, metrics=())(copy(STATE), (X, Y))[1]


def test_two_lanes_are_one_batch():
    """Weights and counts differ between lanes: sums of both are taken over them."""
    step = fnn.train_step(NET, TASKS, SGD, axis_name="d", metrics=OWN).pure
    want = jax.jit(fnn.train_step(NET, TASKS, SGD, metrics=OWN).pure)(STATE, (X, Y, W))
    lanes = jax.tree.map(lambda a: a.reshape(2, N // 2, *a.shape[1:]), (X, Y, W))
    state, metrics = jax.jit(jax.vmap(step, (None, 0), axis_name="d"))(STATE, lanes)
    got = jax.device_get((state.params, metrics))
    for lane in (0, 1):
        close(jax.tree.map(lambda a, i=lane: a[i], got), (want[0].params, want[1]))


def test_bfloat16_measures_in_float32():
    step = fnn.train_step(NET, TASKS, SGD, compute_dtype=jnp.bfloat16, metrics=OWN)
    _, metrics = step(copy(STATE), (X, Y, W))
    want = by_hand(applied(NET, STATE, X), Y, W)
    assert all(metrics[name].dtype == jnp.float32 for name in want)
    close(
        {name: metrics[name] for name in want if name.startswith("loss")},
        {k: v for k, v in want.items() if k.startswith("loss")},
        rtol=0.02,
    )


def test_metrics_by_choice_and_a_step_traces_once():
    traces = []

    def traced(outputs, y):
        traces.append(1)
        return hits(outputs, y)

    step = fnn.train_step(NET, TASKS, SGD, metrics=("grad_norm", {"hits": traced}))
    state, metrics = step(copy(STATE), (X, Y, W))
    assert set(metrics) == {"loss", "loss/digit", "loss/angle", "grad_norm", "hits"} and len(traces) == 1
    step(state, (X, Y, W + 1))
    assert len(traces) == 1
    with pytest.raises(TypeError, match="metrics must be a list of names or a dict of functions, got 'loss'"):
        fnn.train_step(NET, TASKS, SGD, metrics="loss")
