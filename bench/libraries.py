"""Peers that are libraries on JAX: Flax Linen and NNX, Equinox, Haiku. Imported where they are built, if installed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.problem import CLASSES, DECAY, EPS, FEATURES, MAX_NORM, RATE, Problem, on_device, rename, stack
from bench.registry import Skip, peer
from bench.timing import Run


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(RATE))


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()


DENSE = {"kernel": "kernel", "bias": "bias"}
NORM = {"scale": "scale", "bias": "shift"}


def linen_run(net: Any, params: Any, batches: list[tuple[jax.Array, jax.Array]], metrics: bool = False) -> Run:
    """Train a Linen net from given starting params, by one jitted step in a Python loop; with fnn's metrics if asked."""
    optimizer, variables = _optimizer(), jax.eval_shape(net.init, jax.random.key(0), batches[0][0])
    params = on_device(params)
    same = jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    assert same, "the starting weights do not have the shape of Linen's own"
    stats = jax.tree_util.tree_map_with_path(_statistic, variables.get("batch_stats", {}))
    state = (params, stats, optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        (params, stats, opt_state), (x, y) = state, batch

        def loss(params):
            logits, new = net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return _cross_entropy(logits, y), (new.get("batch_stats", {}), logits)

        (value, (stats, logits)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        out = {"loss": value} | _measured(logits, y, grads, updates, params) if metrics else value
        return (optax.apply_updates(params, updates), stats, opt_state), out

    return Run(step, state, batches, (lambda out: out["loss"]) if metrics else (lambda out: out))


def _measured(logits: Any, y: Any, grads: Any, updates: Any, params: Any) -> dict[str, jax.Array]:
    """What `fnn.train_step` reports by default of a step whose gradient is clipped by its global norm."""
    norm = optax.tree.norm(grads)
    clipped = jnp.minimum(norm, MAX_NORM)
    return {
        "accuracy": jnp.mean(logits.argmax(-1) == y),
        "grad_norm": norm,
        "grad_norm_clipped": clipped,
        "clip_fraction": (norm > MAX_NORM).astype(jnp.float32),
        "clip_removed": 1 - clipped / norm,
        "update_ratio": optax.tree.norm(updates) / optax.tree.norm(params),
    }


def _statistic(path: tuple[Any, ...], spec: jax.ShapeDtypeStruct) -> jax.Array:
    """Start a running mean at 0 and a variance at 1, as Linen does; its own `init` would compile for seconds."""
    return jnp.full(spec.shape, float(path[-1].key == "var"), spec.dtype)


def _linen_block(width: int, dtype: str) -> Any:
    from flax import linen

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            x = linen.Dense(width, dtype=dtype, name="dense")(x)
            norm = linen.BatchNorm(False, momentum=DECAY, epsilon=EPS, dtype=dtype, name="norm")
            return linen.relu(norm(x)), None

    return Block


def _linen_weights(block: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"dense": rename(block, DENSE), "norm": rename(block, NORM)}


@peer("linen", "Flax Linen, one jitted step", needs="flax", max_depth=64)
def linen_plain(problem: Problem, metrics: bool = False) -> Run:
    from flax import linen

    row, block = problem.row, _linen_block(problem.row.width, problem.row.dtype)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i in range(row.depth):
                x, _ = block(name=f"block_{i}")(x)
            return linen.Dense(CLASSES, dtype=row.dtype, name="output")(x)

    hidden = {f"block_{i}": _linen_weights(weights) for i, weights in enumerate(problem.weights.hidden)}
    return linen_run(Net(), hidden | {"output": problem.weights.output}, problem.batches, metrics)


@peer("linen-metrics", "the same with all of fnn's metrics", needs="flax", max_depth=64, default=False)
def linen_metrics(problem: Problem) -> Run:
    return linen_plain(problem, metrics=True)


@peer("linen-scan", "Flax Linen, nn.scan over depth, one jitted step", needs="flax")
def linen_scan(problem: Problem) -> Run:
    from flax import linen

    row, block = problem.row, _linen_block(problem.row.width, problem.row.dtype)
    axes, split = {"params": 0, "batch_stats": 0}, {"params": True}

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x, _ = block(name="input")(x)
            x, _ = linen.scan(block, variable_axes=axes, split_rngs=split, length=row.depth - 1)(name="hidden")(x, None)
            return linen.Dense(CLASSES, dtype=row.dtype, name="output")(x)

    first, *rest = problem.weights.hidden
    params = {"input": _linen_weights(first), "hidden": _linen_weights(stack(rest)), "output": problem.weights.output}
    return linen_run(Net(), params, problem.batches)


@peer("nnx", "Flax NNX, the documented functional training loop: split once, merge inside", needs="flax", max_depth=64)
def nnx_functional(problem: Problem) -> Run:
    # Measured at 64x3: nnx.jit 6.0 ms, nnx.cached_partial 1.4 to 1.8, functional 1.0. The last is in its guide as well.
    from flax import nnx

    row = problem.row

    class Block(nnx.Module):
        def __init__(self, inputs, rngs):
            self.linear = nnx.Linear(inputs, row.width, dtype=row.dtype, rngs=rngs)
            self.norm = nnx.BatchNorm(row.width, momentum=DECAY, epsilon=EPS, dtype=row.dtype, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.linear(x)))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(row.width if i else FEATURES, rngs) for i in range(row.depth)])
            self.output = nnx.Linear(row.width, CLASSES, dtype=row.dtype, rngs=rngs)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.output(x)

    net = Net(nnx.Rngs(0))
    for block, weights in zip(net.blocks, problem.weights.hidden, strict=True):
        nnx_fill(block, {"linear": rename(weights, DENSE), "norm": rename(weights, NORM)})
    nnx_fill(net.output, problem.weights.output)
    return nnx_run(net, problem.batches)


def nnx_fill(module: Any, weights: dict[str, Any]) -> None:
    """Set parameters by the names of their attributes."""
    for name, value in weights.items():
        if isinstance(value, dict):
            nnx_fill(getattr(module, name), value)
        else:
            parameter = getattr(module, name)
            assert parameter[...].shape == value.shape, (name, parameter[...].shape, value.shape)
            parameter[...] = jnp.array(value)


def nnx_run(net: Any, batches: list[tuple[jax.Array, jax.Array]]) -> Run:
    """Train an NNX net whose weights are set, by one jitted step in a Python loop."""
    from flax import nnx

    graph, state = nnx.split((net, nnx.Optimizer(net, _optimizer(), wrt=nnx.Param)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        net, optimizer = nnx.merge(graph, state)
        value, grads = nnx.value_and_grad(lambda net: _cross_entropy(net(batch[0]), batch[1]))(net)
        optimizer.update(net, grads)
        return nnx.state((net, optimizer)), value

    return Run(step, state, batches)


@peer(
    "equinox", "Equinox, filter_jit with donation and the documented low-overhead loop", needs="equinox", max_depth=64
)
def equinox(problem: Problem) -> Run:
    import equinox as eqx

    row = problem.row

    class Net(eqx.Module):
        linears: list
        norms: list
        output: Any

        def __init__(self, key):
            keys = jax.random.split(key, row.depth + 1)
            widths = [FEATURES] + [row.width] * row.depth
            self.linears = [eqx.nn.Linear(w, row.width, key=k) for w, k in zip(widths[:-1], keys[:-1], strict=True)]
            self.norms = [
                eqx.nn.BatchNorm(row.width, "batch", eps=EPS, momentum=DECAY, mode="batch") for _ in self.linears
            ]
            self.output = eqx.nn.Linear(row.width, CLASSES, key=keys[-1])

        def __call__(self, x, state):
            for linear, norm in zip(self.linears, self.norms, strict=True):
                x, state = norm(linear(x).astype(jnp.float32), state)
                x = jax.nn.relu(x).astype(row.dtype)
            return self.output(x), state

    dense, norm = {"weight": "kernel", "bias": "bias"}, {"weight": "scale", "bias": "shift"}
    net, bn_state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    hidden = problem.weights.hidden
    linears = [eqx_fill(m, w, dense) for m, w in zip(net.linears, hidden, strict=True)]
    norms = [eqx_fill(m, w, norm) for m, w in zip(net.norms, hidden, strict=True)]
    output = eqx_fill(net.output, problem.weights.output, dense)
    net = eqx.tree_at(lambda n: (n.linears, n.norms, n.output), net, (linears, norms, output))
    return eqx_run(net, bn_state, problem.batches, row.dtype)


def eqx_fill(module: Any, weights: dict[str, np.ndarray], names: dict[str, str]) -> Any:
    """Set a module's arrays: `{theirs: ours}`. Weights are (out, in); .T leaves vectors alone."""
    import equinox as eqx

    for theirs, ours in names.items():
        where = functools.partial(lambda name, m: getattr(m, name), theirs)
        assert where(module).shape == weights[ours].T.shape, (theirs, where(module).shape, weights[ours].T.shape)
        module = eqx.tree_at(where, module, jnp.array(weights[ours].T, copy=True))
    return module


def eqx_run(net: Any, net_state: Any, batches: list[tuple[jax.Array, jax.Array]], dtype: str = "float32") -> Run:
    """Train `net(x, state) -> (logits, state)` of one example, whose weights are set, computing in `dtype` except for the norms."""
    import equinox as eqx

    optimizer = _optimizer()
    leaves, treedef = jax.tree.flatten((net, net_state, optimizer.init(eqx.filter(net, eqx.is_inexact_array))))

    def is_norm(module):
        return isinstance(module, (eqx.nn.BatchNorm, eqx.nn.LayerNorm))

    def lowered(a):
        return a.astype(dtype) if eqx.is_inexact_array(a) else a

    def one(net, x, state):
        return net(x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def loss(net, net_state, x, y):
        net = jax.tree.map(lowered, net, is_leaf=is_norm)
        mapped = jax.vmap(one, axis_name="batch", in_axes=(None, 0, None), out_axes=(0, None))
        logits, net_state = mapped(net, x, net_state)
        return _cross_entropy(logits, y), net_state

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, leaves):
        net, net_state, opt_state = jax.tree.unflatten(treedef, leaves)
        (value, net_state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(net, net_state, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(net, eqx.is_inexact_array))
        return jax.tree.leaves((eqx.apply_updates(net, updates), net_state, opt_state)), value

    return Run(lambda leaves, batch: step(batch, leaves), leaves, batches)


@peer("haiku", "Haiku, transform_with_state, one jitted step", needs="haiku", max_depth=64)
def haiku(problem: Problem) -> Run:
    import haiku as hk

    if problem.row.dtype != "float32":
        raise Skip("written for float32 only")
    row, optimizer = problem.row, _optimizer()

    def forward(x):
        for i in range(row.depth):
            x = hk.Linear(row.width, name=f"dense_{i}")(x)
            x = jax.nn.relu(hk.BatchNorm(True, True, decay_rate=DECAY, eps=EPS, name=f"norm_{i}")(x, is_training=True))
        return hk.Linear(CLASSES, name="output")(x)

    net = hk.transform_with_state(forward)
    _, bn_state = jax.jit(net.init)(jax.random.key(0), problem.xs[0])
    dense, norm = {"w": "kernel", "b": "bias"}, {"scale": "scale", "offset": "shift"}
    params = {"output": rename(problem.weights.output, dense)}
    for i, weights in enumerate(problem.weights.hidden):
        params[f"dense_{i}"] = rename(weights, dense)
        params[f"norm_{i}"] = rename(weights, norm, lambda a: a[None])
    params = on_device(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        (params, bn_state, opt_state), (x, y) = state, batch

        def loss(params):
            logits, new = net.apply(params, bn_state, None, x)
            return _cross_entropy(logits, y), new

        (value, bn_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), bn_state, opt_state), value

    return Run(step, (params, bn_state, optimizer.init(params)), problem.batches)
