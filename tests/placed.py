"""`fit(mesh=)` and `shard` on four devices give what one device gives: the table behind `test_placement.py`.

Run in a process with four devices.
"""

import functools
import os
import re

# Threads of XLA: it runs a loop beside other operations, and with as many threads as devices their collectives block all.
os.environ["NPROC"] = "32"

import devices  # first: it asks for four devices
from devices import KEY, differences, section, slow

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fnn
from fnn import lowering
from fnn.training.placement import layout

lowering.SMALL = 40  # so that a small net has large arrays
RNG = np.random.default_rng(0)
N, FEATURES, CLASSES = 44, 6, 4
DATA = RNG.normal(size=(N, FEATURES)).astype(np.float32), (np.arange(N) % CLASSES).astype(np.int32)
HELD = tuple(a[:20] for a in DATA)
MESHES = {
    f"{kind.name}/{len(shape)}": jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))
    for kind in (AxisType.Auto, AxisType.Explicit)
    for shape in ((4,), (2, 2))
}
PLAIN = jax.make_mesh((4,), ("data",))
RULES = {
    "whole": ("Auto/1", None),
    "largest": ("Auto/1", "largest"),
    "largest and a rule": ("Explicit/1", {"0/kernel": P(None, "data"), "*": "largest"}),
    "model": ("Auto/2", {"*/kernel": P(None, "model"), "*bias": P("model")}),
    "both": ("Explicit/2", {"1/*/kernel": P("model", "data"), "*": "largest"}),
}
QUICK = ("whole", "both")
"""One of each kind of mesh, the state whole on each device, and cut along two axes by rules of both kinds."""
OPTIMIZER = optax.chain(fnn.clip.by_global_norm(0.5), optax.adam(3e-3, eps=1e-3))
ROUNDING = 1e-4
"""Of the largest number in all: Adam divides by small numbers."""
approx = functools.partial(pytest.approx, rel=ROUNDING)


@functools.cache
def net():
    block = fnn.serial(fnn.dense(8), fnn.tap(), fnn.batch_norm(), fnn.activation("tanh"), fnn.dropout(0.2))
    return fnn.serial(fnn.dense(8), fnn.repeat(block, 3), fnn.dense(CLASSES))


@functools.cache
def begun():
    return fnn.TrainState.create(net(), OPTIMIZER, jax.random.key(1), DATA[0][:8])


@functools.cache
def small():
    return fnn.serial(fnn.dense(12), fnn.activation("tanh"), fnn.dropout(0.2), fnn.dense(CLASSES))


@functools.cache
def small_begun():
    return fnn.TrainState.create(small(), OPTIMIZER, jax.random.key(1), DATA[0][:8])


@functools.cache
def step():
    return fnn.train_step(small(), fnn.losses.cross_entropy, OPTIMIZER)


def fitted(trained=None, data=DATA, **options):
    state = small_begun() if trained else begun()
    trained = trained or fnn.train_step(net(), fnn.losses.cross_entropy, OPTIMIZER, per_layer=True)
    own = {"epochs": 2, "validation": HELD, "progress": False}
    own |= {"key": KEY, "batch_size": 8} if isinstance(data, tuple) else {}
    return fnn.fit(trained, state, data, **own | options)


def same(got, want):
    """Compare the states, and each series of the history by itself: a peak of a gradient is not of a loss's size."""
    differences(jax.device_get(got[0]), want[0], ROUNDING)
    assert set(got[1].train) == set(want[1].train) and set(got[1].validation) == set(want[1].validation)
    for name in want[1].train:
        differences(got[1].train[name], want[1].train[name], ROUNDING)
    for name, series in want[1].validation.items():
        differences(got[1].validation[name], series, ROUNDING)
    assert got[1].steps_per_epoch == want[1].steps_per_epoch


@functools.cache
def alone():
    return fitted()


@section
def fit():
    """Ten steps of a net with dropout, batch norm, taps and a stack: state, metrics, what taps saw, validation between."""
    for name, (mesh, rule) in RULES.items():
        yield name if name in QUICK else slow(name), functools.partial(fits, MESHES[mesh], rule)


def lies(state, where):
    """Assert that a state lies where it should: on this mesh with its kinds of axes, cut this way."""
    for path, a, sharding in zip(fnn.tree.paths(state), jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert a.sharding.mesh == sharding.mesh, (path, a.sharding, sharding)
        assert a.sharding.is_equivalent_to(sharding, a.ndim), (path, a.sharding.spec, sharding.spec)


def fits(mesh, rule):
    before = jax.device_get(begun())
    got = fitted(mesh=mesh, shard=rule)
    same(got, alone())
    differences(begun(), before, 0)  # the state that was passed in is still there
    lies(got[0], layout("", begun(), mesh, rule))
    cut = [a for a in jax.tree.leaves(got[0]) if not a.is_fully_replicated]
    assert bool(cut) == (rule is not None)
    assert got[0].params[0]["kernel"].sharding.spec == got[0].opt_state[1][0].mu[0]["kernel"].sharding.spec
    if rule is not None:
        assert got[0].params[0]["kernel"].addressable_shards[0].data.size < begun().params[0]["kernel"].size


@section
def ways():
    yield "examples", examples
    yield "batches", batches
    yield slow("many_batches"), many_batches
    yield "one_by_one", lambda: same(fitted(step(), mesh=PLAIN, scan=False), fitted(step(), scan=False))
    yield "inside_a_mesh", inside
    yield "loop", lambda: loop("Explicit/2", {"3/kernel": P("model", "data"), "*": "largest"})
    yield slow("loops"), lambda: [loop(name, "largest") for name in ("Auto/1", "Explicit/1")]
    yield "evaluate", evaluate
    yield "interrupted", interrupted
    yield "cut_data", cut_data


def examples():
    """Norms of single examples and the clipped mean are those of the whole batch."""
    sgd = optax.sgd(0.1)
    plain = fnn.train_step(small(), fnn.losses.cross_entropy, sgd, per_example="clip", max_norm=0.3)
    state = fnn.TrainState.create(small(), sgd, jax.random.key(1), DATA[0][:8])
    run = functools.partial(fnn.fit, plain, state, DATA, epochs=1, batch_size=8, key=KEY, progress=False)
    got, want = run(mesh=PLAIN, shard="largest"), run()
    same(got, want)
    clipped = want[1].train["examples_clipped"].mean()
    assert got[1].train["per_example_norms"].shape == (5, 8) and 0 < clipped < 8, clipped


def batches():
    """The last batch of an iterable may be of a size that the devices do not divide."""
    cut = [tuple(a[i : i + 8] for a in DATA) for i in (0, 8, 16, 24)] + [tuple(a[32:38] for a in DATA)]
    same(fitted(step(), cut, mesh=PLAIN, shard="largest"), fitted(step(), cut))


def many_batches():
    many = [tuple(a[:8] for a in DATA)] * 34  # two stretches
    same(fitted(step(), many, mesh=PLAIN), fitted(step(), many))


def inside():
    mesh = MESHES["Explicit/1"]
    with jax.set_mesh(mesh):
        got = fitted(step(), mesh=mesh, shard="largest")
        found = fnn.evaluate(small(), got[0], HELD)
    want = fitted(step())
    same(got, want)
    assert found == approx(fnn.evaluate(small(), want[0], HELD))


def loop(name, rule):
    """A loop of one's own on what `shard` returns, and batches cut by `device_put`: the state stays where it is."""
    mesh, want, got = MESHES[name], jax.tree.map(jnp.copy, small_begun()), fnn.shard(small_begun(), MESHES[name], rule)
    where = jax.tree.map(lambda a: a.sharding, got)
    for i in (0, 8, 16):
        batch = tuple(a[i : i + 8] for a in DATA)
        want, expected = step()(want, batch)
        got, metrics = step()(got, jax.device_put(batch, NamedSharding(mesh, P("data"))))
        differences(metrics, expected, ROUNDING)
    differences(jax.device_get(got), want, ROUNDING)
    if name.startswith("Explicit"):  # on automatic axes XLA chooses where a step's results lie
        lies(got, where)


def evaluate():
    """Validation on more examples than a window holds, in a number that the devices do not divide."""
    rows = tuple(np.concatenate([a] * 30)[:1101] for a in DATA)
    got = fitted(step(), mesh=PLAIN, shard="largest", validation=rows)
    same(got, fitted(step(), validation=rows))
    assert fnn.evaluate(small(), got[0], rows) == approx({name: v[-1] for name, v in got[1].validation.items()})


def interrupted():
    def broken():
        for i in (0, 8, 16):
            yield tuple(a[i : i + 8] for a in DATA)
        raise OSError("the disk is gone")

    found = []
    for options in ({}, {"mesh": MESHES["Explicit/1"], "shard": "largest"}):
        trained = fnn.train_step(small(), fnn.losses.cross_entropy, OPTIMIZER)
        try:
            fnn.fit(trained, small_begun(), broken(), epochs=1, progress=False, scan=False, **options)
        except OSError as error:
            found.append((error.state, error.history))
            assert trained.unfinished[0] is error.state and trained.unfinished[1] is error.history, options
    same(found[1], found[0])
    assert int(found[1][0].step) >= 2
    assert found[1][0].step.sharding.mesh == MESHES["Explicit/1"]


def cut_data():
    """Data that are cut over the mesh already stay so; a step fetches its batch, and never all of the data."""
    data = jax.device_put(DATA, NamedSharding(PLAIN, P("data")))
    same(fitted(step(), data, mesh=PLAIN), fitted(step()))


WIDE = 64


@section
def programs():
    """What the devices send each other, and what they hold."""
    one = fnn.serial(fnn.dense(WIDE), fnn.activation("tanh"), fnn.dense(WIDE), fnn.activation("tanh"), fnn.dense(4))
    state = fnn.TrainState.create(one, optax.adam(1e-3), jax.random.key(0), np.zeros((8, WIDE), np.float32))
    trained = fnn.train_step(one, fnn.losses.cross_entropy, optax.adam(1e-3))
    data = RNG.normal(size=(4096, WIDE)).astype(np.float32), np.arange(4096) % 4
    own = {"epochs": 3, "batch_size": 256, "key": KEY, "progress": False, "mesh": PLAIN}
    run = functools.partial(fnn.fit, trained, state, data, **own)
    yield "whole", functools.partial(whole, run, trained, state)
    yield "largest", functools.partial(largest, run, trained, state)


def program(run, trained, **options):
    """Fit, and return the compiled program of a step, what each of its collectives returns, and the state."""
    known = set(trained.placed)
    got, _ = run(**options)
    (key,) = set(trained.placed) - known
    placed = trained.placed[key]
    with jax.set_mesh(placed.mesh):
        where = jax.tree.unflatten(key[1], key[2])
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), got, where)
        cut = NamedSharding(placed.mesh, P("data"))
        batch = (
            jax.ShapeDtypeStruct((256, WIDE), jnp.float32, sharding=cut),
            jax.ShapeDtypeStruct((256,), jnp.int32, sharding=cut),
        )
        compiled = jax.jit(placed.pure, donate_argnums=0).lower(state, batch).compile()
    sent = {}
    for shapes, kind in re.findall(
        r"= (\(?[^=]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
        re.sub(r"/\*.*?\*/", "", compiled.as_text()),
    ):
        sizes = [
            np.prod([int(n) for n in dims.split(",") if n], dtype=int)
            for dims in re.findall(r"f32\[([\d,]*)\]", shapes)
        ]
        sent.setdefault(kind, []).extend(map(int, sizes))
    return compiled, sent, got


def whole(run, trained, state):
    """Each gradient is summed over the devices once, and nothing else is sent but the metrics."""
    compiled, sent, _ = program(run, trained)
    parameters = fnn.tree.size(state.params)
    assert set(sent) == {"all-reduce"}, sent
    assert parameters <= sum(sent["all-reduce"]) <= parameters + 32, (parameters, sent)
    memory = compiled.memory_analysis()
    own = sum(a.nbytes for a in jax.tree.leaves((state.params, state.opt_state)))
    assert memory.alias_size_in_bytes >= own, "the state must be updated in place"


def largest(run, trained, state):
    """Each device holds a quarter of the kernels and of what Adam keeps of them; kernels are gathered, activations not."""
    compiled, sent, got = program(run, trained, shard="largest")
    kernels = sorted(a.size for a in jax.tree.leaves(state.params) if a.size > lowering.SMALL and a.ndim > 1)
    assert set(sent) <= {"all-reduce", "all-gather", "reduce-scatter"}, sent
    assert set(sent["all-gather"]) <= set(kernels), (sent, kernels)
    alias = compiled.memory_analysis().alias_size_in_bytes
    own = sum(a.nbytes for a in jax.tree.leaves((state.params, state.opt_state)))
    assert own / 4 <= alias < own / 3.4, (alias, own)
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves((got.params, got.opt_state)))
    assert held < own / 3.4


@section
def watched():
    """`watch` of a loss whose parameters `shard` has cut: gradients and rows are those of one device."""
    params, net_state = small_begun().params, small_begun().net_state
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(params, batch):
        return entropy(small().apply(params, net_state, batch[0])[0], batch[1]).mean()

    batch = tuple(a[:8] for a in DATA)
    watch = fnn.watch(loss)
    (value, gradient), flow = watch.value_and_grad(params, batch)

    def compare(name):
        mesh = MESHES[name]
        cut = fnn.shard(small_begun(), mesh, "largest").params
        (found, gradients), rows = watch.value_and_grad(cut, jax.device_put(batch, NamedSharding(mesh, P("data"))))
        differences((found, gradients), (value, gradient))
        np.testing.assert_allclose(rows.numbers(), flow.numbers(), rtol=1e-4, atol=1e-5)

    yield "Explicit/1", lambda: compare("Explicit/1")
    yield slow("Auto/1"), lambda: compare("Auto/1")


@section
def refusals():
    run = functools.partial(fitted, step())
    words = "multiple of the 4 devices.*got 6; take 4"
    yield "batch", lambda: refused(ValueError, words, run, batch_size=6, mesh=PLAIN)
    yield "mesh", lambda: refused(TypeError, "mesh must be a jax.sharding.Mesh", run, mesh=4)
    yield "alone", lambda: refused(ValueError, "shard= needs mesh=", run, shard="largest")
    own = functools.partial(fnn.shard, small_begun())
    yield "unused", lambda: refused(ValueError, "every rule must match.*'x'", own, PLAIN, {"x": "largest"})
    yield "word", lambda: refused(TypeError, "got 'big'", own, PLAIN, "big")
    yield "axis", lambda: refused(ValueError, "name axes of the mesh.*'model'", own, PLAIN, {"0/kernel": P("model")})
    yield "divide", lambda: refused(ValueError, "6 numbers for 4 devices", own, PLAIN, {"0/kernel": P("data")})
    yield "long", lambda: refused(ValueError, "an entry for each axis", own, PLAIN, {"0/bias": P(None, None, "data")})


def refused(kind, words, function, *args, **options):
    try:
        function(*args, **options)
    except kind as error:
        assert re.search(words, str(error)), error
    else:
        raise AssertionError("nothing was refused")


if __name__ == "__main__":
    devices.run()
