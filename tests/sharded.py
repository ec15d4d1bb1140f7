"""One device and four give the same numbers: the table behind `test_sharding.py`, run in a process with four devices.

Each section compares what a batch of 8 gives on one device with what it gives cut in four.
"""

import functools

import devices  # first: it asks for four devices
from devices import AUTO, EXPLICIT, KEY, differences, section, slow

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sharded_spectra  # noqa: F401  (enters its sections)
from accelerator import words
from conftest import started
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import CASES, sample

import fnn

SGD = optax.sgd(0.1)


def sums(outputs, targets):
    """A loss of any output: float[batch]."""
    floating = [a for a in jax.tree.leaves(outputs) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(3 * a) / a[0].size, axis=tuple(range(1, a.ndim))) for a in floating)


def together(names, optimizer=SGD, concrete=True):
    """One net of many layers side by side, each with an input of its own: as many programs as for a single layer."""
    cases = [case._replace(shape=(8, *case.shape[1:])) for case in CASES if names(case)]
    net = fnn.branches({case.name: case.layer for case in cases})
    x = {case.name: sample(case, i) for i, case in enumerate(cases)}
    params, state = init(net, x) if concrete else jax.eval_shape(net.init, KEY, x)
    return net, *begun(params, state, x, optimizer)


def init(net, x):
    return started(net.init, x)


def begun(params, state, x, optimizer=SGD):
    return fnn.TrainState(params, state, optimizer.init(params), KEY, jnp.int32(0)), (x, jnp.arange(8) % 3)


def out_specs(want):
    """Replicated, except what belongs to single examples, whose axis comes last."""
    _, metrics = want
    own = ("per_example_norms", "per_example_norms_by_layer")
    last = lambda a: P(*[None] * (a.ndim - 1), "d")  # noqa: E731
    return P(), {name: jax.tree.map(last, v) if name in own else P() for name, v in metrics.items()}


def mapped(step, specs, checked=True):
    return jax.shard_map(step, mesh=AUTO, in_specs=(P(), P("d")), out_specs=specs, check_vma=checked)


def compare(net, loss, optimizer, state, batch, settings=(True, False), **options):
    want = jax.jit(fnn.train_step(net, loss, optimizer, **options).pure)(state, batch)
    step = fnn.train_step(net, loss, optimizer, axis_name="d", **options).pure
    for checked in settings:
        try:
            differences(jax.jit(mapped(step, out_specs(want), checked))(state, batch), want)
        except AssertionError as error:
            raise AssertionError(f"check_vma={checked}: {error}") from None


def types(net, state, batch):
    """Trace alone: the types hold, and what must be replicated is."""
    step = fnn.train_step(net, sums, SGD, axis_name="d", metrics=("loss",)).pure
    assert fnn.core.same_spec(jax.eval_shape(mapped(step, P()), state, batch)[0], state)


@section
def every_layer_s_types():
    yield "step", functools.partial(types, *together(lambda case: not case.model, concrete=False))


KINDS = "conv_2d_by_xla rnn_masked tied cross_attention batch_norm_masked tap_masked"
MADE_OF_THOSE = """dense_on_sequences branches rnn bidirectional attention_masked attention_own_mask batch_norm group_norm
    repeat_in_groups"""


@section
def layers():
    """One of each kind: every derivative rule, loop, collective and mask."""
    yield "checked", functools.partial(together_as_alone, KINDS, True)
    yield "unchecked", functools.partial(together_as_alone, "batch_norm_masked tap_masked", False)
    yield slow("checked"), functools.partial(together_as_alone, MADE_OF_THOSE, True)
    yield (
        slow("unchecked"),
        functools.partial(together_as_alone, "bidirectional tied cross_attention repeat_in_groups", False),
    )


def together_as_alone(kinds, setting, **options):
    net, state, batch = together(lambda case: case.name in words(kinds))
    compare(net, sums, SGD, state, batch, (setting,), per_layer=True, **options)


@section
def per_example():
    row = functools.partial(together_as_alone, per_example="clip", max_norm=3.0)
    yield "checked", functools.partial(row, "batch_norm_masked block_with_dropout", True)
    yield slow("checked"), functools.partial(row, "rnn attention_masked repeat tied", True)
    yield slow("unchecked"), functools.partial(row, "batch_norm_masked block_with_dropout", False)
    yield "direct", direct


def direct():
    """`per_example` itself inside `shard_map`, of a loss without and of one with statistics over the device's examples."""
    _, _, (x, y) = small()
    for axis in (None, "batch"):
        net = fnn.models.mlp(1, 4, 3, norm="batch_norm" if axis else "layer_norm")
        params, net_state = init(net, x)
        loss = fnn.example_loss(net, (params, net_state), loss=fnn.losses.cross_entropy, axis_name=axis)

        def norms(params, batch, loss=loss, axis=axis):
            return fnn.per_example(loss, axis_name=axis)(params, batch).norms()

        part = jax.jit(norms)
        parts = [part(params, (x[i : i + 2], y[i : i + 2])) for i in range(0, 8, 2)]
        got = jax.jit(mapped(norms, P("d")))(params, (x, y))
        differences(got, np.concatenate(parts))


def small(optimizer=SGD, depth=3, **options):
    net = fnn.models.mlp(depth, 4, 3, **options)
    x = jax.random.normal(jax.random.key(5), (8, 5))
    return net, *begun(*init(net, x), x, optimizer)


@section
def losses():
    """Each loss on a head of its own, in one program: a number of each is among the metrics."""
    x = jax.random.normal(jax.random.key(5), (8, 2, 5))
    targets = {
        "cross_entropy": (x[:, 0], jnp.arange(8) % 3),
        "sequence_cross_entropy": (x, jnp.arange(16).reshape(8, 2) % 4 - 1),
        "mse": (x, jnp.ones((8, 2, 3))),
        "binary_cross_entropy": (x[:, 0], jnp.arange(8) % 2),
    }
    net = fnn.branches({name: fnn.dense(1 if name.startswith("binary") else 3) for name in targets})
    x, y = ({name: pair[i] for name, pair in targets.items()} for i in (0, 1))
    state, _ = begun(*init(net, x), x)
    loss = fnn.losses.sum_of({name: getattr(fnn.losses, name) for name in targets})
    yield "all", functools.partial(compare, net, loss, SGD, state, (x, y), (True,))


@section
def outputs():
    """Tasks, of weighted examples and of tokens, that the devices have different numbers of; metrics, and a penalty."""
    heads = fnn.parallel({"label": fnn.serial(fnn.global_avg_pool(), fnn.dense(3)), "words": fnn.dense(4)})
    net, x = fnn.serial(fnn.dense(6), heads), jax.random.normal(KEY, (8, 5, 3))
    state, _ = begun(*init(net, x), x)
    real = np.arange(5) < np.array([5, 4, 1, 0, 1, 2, 3, 1])[:, None]
    tokens = np.where(real, np.arange(40).reshape(8, 5) % 4, -1)
    y, weights = {"label": jnp.arange(8) % 3, "words": tokens}, jnp.array([1.0, 3, 0, 2, 0, 0, 0.5, 1])
    loss = fnn.losses.sum_of({"label": fnn.losses.cross_entropy, "words": (fnn.losses.token_cross_entropy, 0.5)})
    options = {
        "metrics": {
            "size": lambda o, y: jnp.sum(o["label"] ** 2, -1),
            "spread": fnn.losses.Metric(
                lambda o, y: (o["label"], o["label"] ** 2), lambda s: jnp.sum(s[1]) - jnp.sum(s[0] ** 2)
            ),
        },
        "penalty": lambda params: fnn.tree.norm(params) ** 2,
    }
    clip = {"per_example": "clip", "max_norm": 0.5}
    for name, batch, more, settings in (
        (slow("plain"), (x, y), options, (True,)),
        ("weighted", (x, y, weights), options, (True,)),
        (slow("weighted"), (x, y, weights), options, (False,)),
        ("clip", (x, y, weights), clip | {"penalty": options["penalty"]}, (False,)),
        (slow("clip"), (x, y, weights), clip | options, (True,)),
    ):
        yield name, functools.partial(compare, net, loss, SGD, state, batch, settings, **more)
    yield "jit", functools.partial(by_jit, net, loss, state, (x, y, weights), options)


def by_jit(net, loss, state, batch, options):
    def everything(batch):
        step = fnn.train_step(net, loss, SGD, **options)
        scores = fnn.evaluate(net, state, batch, loss=loss, metrics=options["metrics"], batch_size=3)
        return step(jax.tree.map(jnp.copy, state), batch), scores

    want = everything(batch)
    for mesh in (AUTO, EXPLICIT):
        same(everything(jax.device_put(batch, NamedSharding(mesh, P("d")))), want)


@section
def clips():
    clip = fnn.clip
    found = {
        "values": optax.chain(clip.by_value(0.01), clip.from_above(0.005)),
        "norms": optax.chain(clip.adaptive(0.1), clip.by_block_norm(0.05), clip.by_global_norm(0.02)),
        "per_depth": fnn.optimizers.per_depth(optax.adaptive_grad_clip(0.01)),
        "packed": fnn.optimizers.packed(optax.sgd(0.1)),
    }
    for name, transformation in found.items():
        optimizer = optax.chain(transformation, SGD)
        net, state, batch = small(optimizer)
        row = slow(name) if name == "values" else name  # number by number: no device needs another
        yield row, functools.partial(compare, net, fnn.losses.cross_entropy, optimizer, state, batch, (True,))


@section
def losses_taken_again():
    """By optimisers that ask for the loss as a function: its value and derivatives are those of all devices' examples."""
    found = {
        "line_search": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)),
        "lbfgs": optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(3)),
        "sam": optax.contrib.sam(SGD, optax.sgd(0.5), opaque_mode=True),
        "sophia": optax.contrib.sophia(0.1, update_interval=1),
    }
    for name, optimizer in found.items():
        norm = "layer_norm" if name == "sophia" else "batch_norm"  # it enlarges rounding where a gradient is zero
        net, state, batch = small(optimizer, 1, norm=norm)
        settings = (name != "sam",)
        yield (
            slow(name) if name == "lbfgs" else name,
            functools.partial(compare, net, fnn.losses.cross_entropy, optimizer, state, batch, settings),
        )


@section
def placed():
    """Plain calls with a batch sharded over a mesh with explicit axes, as `jax.make_mesh` makes them."""
    net = fnn.serial(fnn.embed(7, 4), fnn.gru(4, tap=None), fnn.tap(), fnn.dense(3), fnn.global_avg_pool())
    x = jax.random.randint(KEY, (8, 3), 0, 7)
    state, batch = begun(*init(net, x), x)
    step = fnn.train_step(net, fnn.losses.cross_entropy, SGD)
    tokens = fnn.models.decoder(7, 1, 4, fnn.models.Block(heads=2))
    words = init(tokens, x)

    def gradients(batch):
        loss = fnn.example_loss(net, state, loss=fnn.losses.cross_entropy)
        return fnn.per_example(loss)(state.params, batch)

    def fit(batch):
        options = {"epochs": 2, "batch_size": 4, "key": KEY, "progress": False}
        trained, history = fnn.fit(step, state, batch, validation=batch, **options)
        return trained, history.train, history.validation

    def made(batch):
        found = gradients(batch)
        return found.clipped_mean(0.1), found.gram(), found.materialize()

    found = {
        "step": lambda batch: step(jax.tree.map(jnp.copy, state), batch),
        "fit": fit,
        "evaluate": lambda batch: fnn.evaluate(net, state, batch, batch_size=3),
        "norms": lambda batch: gradients(batch).norms(),
        slow("made"): made,
        "flow": lambda batch: [np.float64(row.value) for row in fnn.gradient_flow(net, state, batch).rows],
        "generate": lambda batch: fnn.generate(tokens, *words, batch[0], 3),
    }
    spread = jax.device_put(batch, NamedSharding(EXPLICIT, P("d")))
    for name, call in found.items():
        yield name, lambda call=call: same(call(spread), call(batch))


def same(got, want):
    arrays = lambda t: jax.tree.map(lambda a: a if hasattr(a, "dtype") else np.asarray(a), t)  # noqa: E731
    differences(arrays(got), arrays(want))


@section
def refusals():
    net, state, batch = small()
    for name, step in (
        ("step", fnn.train_step(net, sums, SGD)),
        ("norms", fnn.train_step(net, sums, SGD, per_example="norms")),
    ):
        yield name, functools.partial(refused, step.pure, state, batch)


def refused(step, state, batch):
    try:
        jax.eval_shape(mapped(step, P()), state, batch)
    except ValueError as error:
        assert "axis_name must name every mesh axis" in str(error), error
    else:
        raise AssertionError("nothing was refused")


if __name__ == "__main__":
    devices.run()
