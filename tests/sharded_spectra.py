"""Curvature, kernels, `watch` and sequences of `sharded`: what is cut over four devices gives the numbers of one."""

import functools

from devices import AUTO, EXPLICIT, KEY, differences, section, slow  # first: it asks for four devices

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from conftest import as_jax, started
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fnn
from fnn import lowering


@section
def spectra():
    """Curvature and kernels of a batch and of parameters that are cut, by `jit`; of a loss that is averaged, by `shard_map`."""
    net = fnn.serial(fnn.dense(4), fnn.batch_norm())
    x, y = jax.random.normal(KEY, (8, 4)), jnp.arange(8) % 4
    state = started(net.init, x)

    def numbers(state, batch):
        c = fnn.curvature(fnn.losses.cross_entropy, outputs=net)(state, batch)
        kernel = fnn.kernel(net)(state, batch[0])
        return c.hessian.eigenvalues(tolerance=1e-3).values, c.critical().sharpness, kernel.matrix

    want = numbers(state, (x, y))
    for mesh in (AUTO, EXPLICIT):
        cut = [NamedSharding(mesh, spec) for spec in (P(), P("d"))]
        given = jax.tree.map(lambda a, cut=cut: jax.device_put(a, cut[a.ndim > 0]), (state, (x, y)))
        run = jax.jit(numbers) if mesh is AUTO else numbers
        row = "placed" if mesh is EXPLICIT else slow("placed under jit")
        yield row, lambda run=run, given=given: differences(run(*given), want, 1e-3)
    for checked, averaged in ((True, True), (True, False), (False, True)):
        yield f"shard_map/{checked}/{averaged}", functools.partial(curvature_inside, checked, averaged)


def curvature_inside(checked, averaged):
    """Inside `shard_map` numbers are right, or refused."""
    A, x = jnp.diag(jnp.arange(1.0, 5)), jax.random.normal(KEY, (8, 4))

    def loss(p, x):
        own = jnp.mean(jnp.square(x @ p)) + p @ A @ p
        return jax.lax.pmean(own, "d") if averaged else own

    def top(p, x):
        return fnn.curvature(loss)(p, x).hessian.eigenvalues(tolerance=1e-3).values

    run = jax.jit(jax.shard_map(top, mesh=AUTO, in_specs=(P(), P("d")), out_specs=P(), check_vma=checked))
    if checked and averaged:
        want = np.linalg.eigvalsh(2 * np.asarray(x.T @ x / 8 + A))[-1:]
        return differences(run(jnp.ones(4), x), want, 1e-3)
    words = "a loss that averages over a mapped axis needs" if averaged else "average it with jax.lax.pmean(loss, 'd')"
    try:
        run(jnp.ones(4), x)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError("nothing was refused")


@section
def watched():
    """`watch` inside `shard_map`, and in float64 of a batch that is cut; test_watch_deep has more, and test_placement."""
    rng = np.random.default_rng(0)
    params = {"out": rng.normal(size=(4, 4)), "w": rng.normal(size=(30, 4, 4)) / 2}
    params = jax.tree.map(as_jax, params)
    x, y = as_jax(rng.normal(size=(8, 4))), as_jax(np.arange(8) % 4)

    def loss(p, x, y):
        x, _ = jax.lax.scan(lambda x, w: (jax.nn.sigmoid(x @ w), None), x, p["w"])
        return jnp.mean(fnn.losses.cross_entropy(x @ p["out"], y))

    def cut():
        groups = ["gradient", "error", "activation", "kurtosis"]
        want_gradient, want = fnn.watch(loss, groups=groups).value_and_grad(params, x, y)
        run = fnn.watch(loss, groups=groups, axis_name="d").value_and_grad
        found, flow = jax.jit(jax.shard_map(run, mesh=AUTO, in_specs=(P(), P("d"), P("d")), out_specs=P()))(
            params, x, y
        )
        differences(found, want_gradient)
        rows = {row[1:3]: row[3] for row in want.rows()}
        assert rows
        for row in flow.rows():
            np.testing.assert_allclose(row[3], rows[row[1:3]], rtol=1e-5, atol=1e-5, err_msg=str(row))

    def wide():
        watch = fnn.watch(lambda p, x: jnp.mean(jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, p)[0] ** 2))
        small = params["w"] / 100
        want = watch(small, x)
        assert "measured in float64" in want.labels.notes[0]
        placed = [jax.device_put(a, NamedSharding(EXPLICIT, s)) for a, s in ((small, P()), (x, P("d")))]
        np.testing.assert_allclose(watch(*placed).numbers(), want.numbers(), rtol=1e-6)

    yield "shard_map", cut
    yield "float64", wide


@section
def sequences():
    """Sharded over batch and time, a dense layer and its gradient move no activations where products keep their axes."""
    layer, x = fnn.dense(8), np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    params, state = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda params, x: jnp.sum(jnp.tanh(layer.apply(params, state, x)[0])))
    want = gradient(params, x)
    for kind in (AxisType.Auto, AxisType.Explicit):
        yield kind.name, functools.partial(stays, gradient, params, x, want, kind)


def stays(gradient, params, x, want, kind):
    mesh = jax.make_mesh((2, 2), ("batch", "time"), axis_types=(kind,) * 2)
    before, lowering.platform = lowering.platform, lambda: "gpu"
    jax.clear_caches()
    try:
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((params, P()), (x, P("batch", "time")))]
            compiled = jax.jit(gradient).lower(*placed).compile()
            differences(compiled(*placed), want)
    finally:
        lowering.platform = before
    moved = [name for name in ("all-gather", "all-to-all", "collective-permute") if f"{name}(" in compiled.as_text()]
    assert not moved, moved
