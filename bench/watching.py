"""What the suite `watch` measures: losses in plain JAX and Linen, and the same readings taken with other libraries' means.

A peer is a pair of functions of (params, batch): its plain `value_and_grad`, and the one that also reads, for each of the
mlp's layers, what `fnn.watch` reads by default: mean, second moment and dead fraction of input and output, the RMS over
examples of the error signal, and the norm of the weight's gradient.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fnn
from bench import per_example
from bench.timing import Run

FEATURES, CLASSES = 64, 10


class Problem(NamedTuple):
    """A mean loss, its parameters and a batch."""

    loss: Callable[..., Any]
    params: Any
    batch: Any


class Readings(NamedTuple):
    """What is read of each layer of the mlp: float[layers], and of input and output float[layers, 3]."""

    error: Any
    gradient: Any
    inputs: Any
    outputs: Any


def problem(name: str, quick: bool) -> Problem:
    """Make a net and a batch of random numbers; a small one with `quick`."""
    x_key, y_key, key = jax.random.split(jax.random.key(0), 3)
    if name == "transformer":
        module = per_example.Transformer(blocks=1 if quick else 4)
        tokens = jax.random.randint(x_key, (2, 8) if quick else (32, 64), 0, 256)

        def loss(p, batch):
            return jnp.mean(fnn.losses.cross_entropy(module.apply(p, batch[0]), batch[1]))

        return Problem(loss, module.init(key, tokens[:1]), (tokens, tokens))
    depth, width, count = {("mlp", False): (8, 512, 256), ("scan", False): (64, 128, 128)}.get(
        (name, quick), (3, 16, 8)
    )
    batch = jax.random.normal(x_key, (count, FEATURES)), jax.random.randint(y_key, (count,), 0, CLASSES)
    keys = jax.random.split(key, depth + 1)
    hidden = [_dense(k, FEATURES if i == 0 else width, width) for i, k in enumerate(keys[:depth])]
    params = [*hidden, _dense(keys[depth], width, CLASSES)]
    if name == "mlp":
        return Problem(mlp_loss, params, batch)
    params = {"first": params[0], "stack": jax.tree.map(lambda *a: jnp.stack(a), *params[1:-1]), "output": params[-1]}
    return Problem(scanned_loss, params, batch)


def _dense(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, (fan_in, fan_out)) * np.sqrt(2 / fan_in)
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def mlp_loss(params: Any, batch: Any) -> jax.Array:
    """Mean cross entropy of dense layers with ReLU between them, in plain JAX."""
    x, y = batch
    for i, layer in enumerate(params):
        h = x @ layer["kernel"] + layer["bias"]
        x = h if i + 1 == len(params) else jax.nn.relu(h)
    return jnp.mean(fnn.losses.cross_entropy(x, y))


def scanned_loss(params: Any, batch: Any) -> jax.Array:
    """The same with tanh, and all hidden layers but the first in one scan."""

    def layer(x, p):
        return jnp.tanh(x @ p["kernel"] + p["bias"]), None

    x, _ = layer(batch[0], params["first"])
    x, _ = jax.lax.scan(layer, x, params["stack"])
    logits = x @ params["output"]["kernel"] + params["output"]["bias"]
    return jnp.mean(fnn.losses.cross_entropy(logits, batch[1]))


def of_flow(flow: Any) -> Readings:
    """Pick from a `Flow` what the peers read."""

    def column(quantity):
        return flow.weights(quantity)[1]

    sides = [[column(f"{side}_{name}") for name in ("mean", "second_moment", "dead")] for side in ("input", "output")]
    return Readings(10 ** column("log10_error"), 10 ** column("log10_gradient"), *(np.stack(s, 1) for s in sides))


def statistics(x: jax.Array) -> jax.Array:
    """Take mean, second moment, and the fraction of units that are 0 for the whole batch."""
    return jnp.stack([jnp.mean(x), jnp.mean(jnp.square(x)), jnp.mean(jnp.all(x == 0, axis=0))])


def _norms(kernels: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.linalg.norm(kernel) for kernel in kernels])


# Other means ----------------------------------------------------------------------------------------------------------


def by_hand(p: Problem) -> tuple[Any, Any]:
    """Plain JAX: zeros are added to each output, and the loss is differentiated with respect to them too."""

    def watched(params, batch):
        x, y = batch
        zeros = [jnp.zeros((len(x), layer["bias"].size)) for layer in params]

        def loss(params, zeros):
            h, seen = x, []
            for i, (layer, zero) in enumerate(zip(params, zeros, strict=True)):
                taken = jax.nn.relu(h) if i else h
                h = taken @ layer["kernel"] + layer["bias"] + zero
                seen.append((statistics(taken), statistics(h)))
            return jnp.mean(fnn.losses.cross_entropy(h, y)), seen

        (value, seen), (grads, errors) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, zeros)
        readings = readings_of(errors, [layer["kernel"] for layer in grads], seen, len(x))
        return (value, grads), readings

    return jax.value_and_grad(p.loss), watched


def readings_of(errors: Sequence[Any], kernels: Sequence[Any], seen: Sequence[Any], size: int) -> Readings:
    inputs, outputs = (jnp.stack(part) for part in zip(*seen, strict=True))
    return Readings(jnp.sqrt(size) * _norms(errors), _norms(kernels), inputs, outputs)


class _Nnx(nnx.Module):
    """`sow` and `perturb` in every layer, as NNX has them for this."""

    def __init__(self, params: Any):
        sizes = [layer["kernel"].shape for layer in params]
        self.layers = nnx.List([nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in sizes])
        for layer, weights in zip(self.layers, params, strict=True):
            layer.kernel.set_value(weights["kernel"])
            layer.bias.set_value(weights["bias"])

    def __call__(self, x: jax.Array, watched: bool = False) -> jax.Array:
        for i, layer in enumerate(self.layers):
            taken = jax.nn.relu(x) if i else x
            x = layer(taken)
            if watched:
                x = self.perturb(f"error_{i}", x)
                self.sow(nnx.Intermediate, f"seen_{i}", (statistics(taken), statistics(x)))
        return x


def with_nnx(p: Problem) -> tuple[Any, Any]:
    """Flax NNX: `sow` and `perturb` in the model, `capture` around it."""
    graph, params = nnx.split(_Nnx(p.params))

    def loss(model, batch, watched=False):
        return jnp.mean(fnn.losses.cross_entropy(model(batch[0], watched), batch[1]))

    def plain(_, batch, params=params):
        return jax.value_and_grad(lambda q: loss(nnx.merge(graph, q, copy=True), batch))(params)

    def watched(_, batch, params=params):
        model = nnx.merge(graph, params, copy=True)
        _, zeros = nnx.capture(lambda m: loss(m, batch, True), nnx.Perturbation)(model)

        def captured(model, zeros):
            return nnx.capture(lambda m: loss(m, batch, True), nnx.Intermediate, init=zeros)(model)

        (value, seen), (grads, errors) = nnx.value_and_grad(captured, argnums=(0, 1), has_aux=True)(model, zeros)
        depth = len(p.params)
        kernels = [grads["layers"][i]["kernel"].get_value() for i in range(depth)]
        seen = [seen[f"seen_{i}"].get_value()[0] for i in range(depth)]
        readings = readings_of([errors[f"error_{i}"].get_value() for i in range(depth)], kernels, seen, len(batch[0]))
        return (value, grads), readings

    return plain, watched


def with_equinox(p: Problem) -> tuple[Any, Any]:
    """Equinox: a `filter_custom_vjp` written into the model, which hands the square of the error signal out as a gradient."""
    from bench import watching_equinox  # Equinox is not needed for the other peers

    return watching_equinox.pair(p)


JAX_PEERS = {"jax": by_hand, "nnx": with_nnx}
if importlib.util.find_spec("equinox"):
    JAX_PEERS["equinox"] = with_equinox


def torch_run(watched: bool, quick: bool, calls: int) -> Run:
    """PyTorch, in its own process: a hook on every layer and one on its output's gradient, or the plain gradient."""
    import torch

    from bench.torch_peers import torch_device

    p, device = problem("mlp", quick), torch_device()
    model, x, y = per_example.torch_mlp(p)
    model, x, y = model.to(device), x.to(device), y.to(device)
    linears = [module for module in model if isinstance(module, torch.nn.Linear)]
    seen: dict[Any, Any] = {}

    def read(a):
        return torch.stack([a.mean(), a.square().mean(), (a == 0).all(0).float().mean()])

    def forward(module, inputs, output):
        with torch.no_grad():
            seen[module, "inputs"], seen[module, "outputs"] = read(inputs[0]), read(output)
        output.register_hook(functools.partial(backward, module))

    def backward(module, error):
        seen[module, "error"] = error.norm() * len(x) ** 0.5

    for module in linears if watched else ():
        module.register_forward_hook(forward)

    def step(state, _):
        model.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if not watched:
            return state, loss.detach()
        with torch.no_grad():
            gradient = torch.stack([module.weight.grad.norm() for module in linears])
        names = ("error", "inputs", "outputs")
        return state, (gradient, *(torch.stack([seen[module, name] for module in linears]) for name in names))

    def numbers(out):
        if not watched:
            return float(out)
        gradient, error, inputs, outputs = (a.cpu().numpy() for a in out)
        return flat(Readings(error, gradient, inputs, outputs))

    def wait(_):
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Run(step, None, [None] * calls, numbers, wait)


def flat(readings: Readings) -> np.ndarray:
    """Give all readings as one vector."""
    return np.concatenate([np.ravel(np.asarray(a)) for a in readings])
