"""Peers that are libraries: Flax Linen and NNX, Equinox, Haiku, PyTorch. Imported where they are built, if installed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.problem import CLASSES, DECAY, EPS, FEATURES, MAX_NORM, RATE, Problem, on_device, rename, stack
from bench.registry import Skip, peer
from bench.timing import Run

# Libraries on JAX -----------------------------------------------------------------------------------------------------


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(RATE))


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


DENSE = {"kernel": "kernel", "bias": "bias"}
NORM = {"scale": "scale", "bias": "shift"}


def linen_run(net: Any, params: Any, batches: list[tuple[jax.Array, jax.Array]]) -> Run:
    """Train a Linen net from given starting params, by one jitted step in a Python loop."""
    optimizer, variables = _optimizer(), jax.jit(net.init)(jax.random.key(0), batches[0][0])
    params = on_device(params)
    same = jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    assert same, "the starting weights do not have the shape of Linen's own"
    state = (params, variables.get("batch_stats", {}), optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        (params, stats, opt_state), (x, y) = state, batch

        def loss(params):
            logits, new = net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return _cross_entropy(logits, y), new.get("batch_stats", {})

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    return Run(step, state, batches)


def _linen_block(width: int) -> Any:
    from flax import linen

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            x = linen.Dense(width, name="dense")(x)
            x = linen.BatchNorm(use_running_average=False, momentum=DECAY, epsilon=EPS, name="norm")(x)
            return linen.relu(x), None

    return Block


def _linen_weights(block: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"dense": rename(block, DENSE), "norm": rename(block, NORM)}


@peer("linen", "Flax Linen, one jitted step", needs="flax", max_depth=64)
def linen_plain(problem: Problem) -> Run:
    from flax import linen

    row, block = problem.row, _linen_block(problem.row.width)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i in range(row.depth):
                x, _ = block(name=f"block_{i}")(x)
            return linen.Dense(CLASSES, name="output")(x)

    hidden = {f"block_{i}": _linen_weights(weights) for i, weights in enumerate(problem.weights.hidden)}
    return linen_run(Net(), hidden | {"output": problem.weights.output}, problem.batches)


@peer("linen-scan", "Flax Linen, nn.scan over depth, one jitted step", needs="flax")
def linen_scan(problem: Problem) -> Run:
    from flax import linen

    row, block = problem.row, _linen_block(problem.row.width)
    axes, split = {"params": 0, "batch_stats": 0}, {"params": True}

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x, _ = block(name="input")(x)
            x, _ = linen.scan(block, variable_axes=axes, split_rngs=split, length=row.depth - 1)(name="hidden")(x, None)
            return linen.Dense(CLASSES, name="output")(x)

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
            self.linear = nnx.Linear(inputs, row.width, rngs=rngs)
            self.norm = nnx.BatchNorm(row.width, momentum=DECAY, epsilon=EPS, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.linear(x)))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(row.width if i else FEATURES, rngs) for i in range(row.depth)])
            self.output = nnx.Linear(row.width, CLASSES, rngs=rngs)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.output(x)

    def fill(module, weights):
        for name, value in weights.items():
            getattr(module, name)[...] = jnp.array(value)

    net = Net(nnx.Rngs(0))
    for block, weights in zip(net.blocks, problem.weights.hidden, strict=True):
        fill(block.linear, rename(weights, DENSE))
        fill(block.norm, rename(weights, NORM))
    fill(net.output, problem.weights.output)
    graph, state = nnx.split((net, nnx.Optimizer(net, _optimizer(), wrt=nnx.Param)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        net, optimizer = nnx.merge(graph, state)
        value, grads = nnx.value_and_grad(lambda net: _cross_entropy(net(batch[0]), batch[1]))(net)
        optimizer.update(net, grads)
        return nnx.state((net, optimizer)), value

    return Run(step, state, problem.batches)


@peer(
    "equinox", "Equinox, filter_jit with donation and the documented low-overhead loop", needs="equinox", max_depth=64
)
def equinox(problem: Problem) -> Run:
    import equinox as eqx

    row, optimizer = problem.row, _optimizer()

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
                x, state = norm(linear(x), state)
                x = jax.nn.relu(x)
            return self.output(x), state

    def filled(module, weights, names):
        wheres = [lambda m, name=name: getattr(m, name) for name in names]
        for where, ours in zip(wheres, names.values(), strict=True):
            # Weights are (out, in); .T leaves vectors alone.
            module = eqx.tree_at(where, module, jnp.array(weights[ours].T, copy=True))
        return module

    dense, norm = {"weight": "kernel", "bias": "bias"}, {"weight": "scale", "bias": "shift"}
    net, bn_state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    hidden = problem.weights.hidden
    linears = [filled(m, w, dense) for m, w in zip(net.linears, hidden, strict=True)]
    norms = [filled(m, w, norm) for m, w in zip(net.norms, hidden, strict=True)]
    output = filled(net.output, problem.weights.output, dense)
    net = eqx.tree_at(lambda n: (n.linears, n.norms, n.output), net, (linears, norms, output))
    leaves, treedef = jax.tree.flatten((net, bn_state, optimizer.init(eqx.filter(net, eqx.is_inexact_array))))

    def loss(net, bn_state, x, y):
        logits, bn_state = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, bn_state)
        return _cross_entropy(logits, y), bn_state

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, leaves):
        net, bn_state, opt_state = jax.tree.unflatten(treedef, leaves)
        (value, bn_state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(net, bn_state, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(net, eqx.is_inexact_array))
        return jax.tree.leaves((eqx.apply_updates(net, updates), bn_state, opt_state)), value

    return Run(lambda leaves, batch: step(batch, leaves), leaves, problem.batches)


@peer("haiku", "Haiku, transform_with_state, one jitted step", needs="haiku", max_depth=64)
def haiku(problem: Problem) -> Run:
    import haiku as hk

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


# PyTorch --------------------------------------------------------------------------------------------------------------


def _torch_device() -> Any:
    import torch

    platform = jax.devices()[0].platform
    if platform != "cpu" and not (platform == "gpu" and torch.cuda.is_available()):
        raise Skip(f"PyTorch does not see the {platform} that JAX runs on")
    high = jax.config.jax_default_matmul_precision in (None, "default")  # JAX's default on a GPU is TF32
    torch.set_float32_matmul_precision("high" if high else "highest")
    torch.set_flush_denormal(True)  # as XLA does
    return torch.device("cuda" if platform == "gpu" else "cpu")


def _torch_net(problem: Problem) -> Any:
    from torch import nn

    from bench.torch_nets import filled, linear

    layers = []
    for weights in problem.weights.hidden:
        norm = nn.BatchNorm1d(problem.row.width, EPS, 1 - DECAY)
        layers += [linear(weights), filled(norm, weight=weights["scale"], bias=weights["shift"]), nn.ReLU()]
    return nn.Sequential(*layers, linear(problem.weights.output))


def torch_run(net: Any, xs: Any, ys: Any, compile_net: Callable[[Any], Any] = lambda net: net) -> Run:
    """Make a Python loop of steps of a net whose weights are set; xs, ys: data with a leading axis of steps."""
    import torch
    from torch.nn import functional, utils

    device = _torch_device()
    net = net.to(device).train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=RATE, fused=True)
    forward = compile_net(net)

    def moved(a):
        a = torch.tensor(np.asarray(a), device=device)
        return a if a.is_floating_point() else a.long()

    xs, ys = jax.tree.map(moved, (xs, ys))
    batches = [(jax.tree.map(lambda a, i=i: a[i], xs), y) for i, y in enumerate(ys)]

    def step(state, batch):
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(forward(batch[0]).flatten(0, -2), batch[1].flatten())
        loss.backward()
        utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        return state, loss.detach()

    def wait(_):
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Run(step, None, batches, lambda loss: loss.item(), wait)


def _torch(problem: Problem, compile_net: Callable[[Any], Any]) -> Run:
    return torch_run(_torch_net(problem), problem.xs, problem.ys, compile_net)


@peer("torch", "PyTorch eager, fused Adam", needs="torch")
def torch_eager(problem: Problem) -> Run:
    return _torch(problem, lambda net: net)


@peer(
    "torch-compile",
    "PyTorch with torch.compile, fused Adam, in a process of its own",
    needs="torch",
    max_depth=64,
    default=False,
    own_process=True,
)
def torch_compile(problem: Problem) -> Run:
    import torch

    options = {"mode": "reduce-overhead"} if torch.cuda.is_available() else {}  # CUDA graphs
    return _torch(problem, lambda net: torch.compile(net, **options))
