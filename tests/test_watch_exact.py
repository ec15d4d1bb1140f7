"""`watch` is exact: log norms of gradients and error signals against float64, for models of four frameworks, in natural logs.

Where float32's forward pass is the limit, which no backward pass can mend, the measure is the plain float32 gradient's own
error, or a float64 run of the same backward program on the same float32 residuals.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax
from flax import linen, nnx

import fnn
from fnn import tree
from fnn.gradients import program, wide

LN10 = math.log(10)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_draws():
    """Let every test draw the same numbers, whichever ran before: some nets saturate, and float32 loses them forward."""
    global RNG
    RNG = np.random.default_rng(1)


def drawn(*shape):
    return as_jax(RNG.normal(size=shape), jnp.float32)


def up(values):
    return jax.tree.map(lambda a: as_jax(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, values)


def log_norms(gradient, axes=0):
    """Natural logs of the norms of all arrays, of each entry of `axes` leading axes: {path: float64[...]}"""

    def log(a):
        a = np.asarray(a, np.float64)
        a = a.reshape(*a.shape[:axes], -1)
        largest = np.maximum(np.abs(a).max(-1, keepdims=True), 1e-320)
        with np.errstate(divide="ignore"):
            return np.log(np.linalg.norm(a / largest, axis=-1)) + np.log(largest[..., 0])

    names = [name.removesuffix("/value") for name in tree.paths(gradient)]
    return {name.replace("[:]", ""): log(a) for name, a in zip(names, jax.tree.leaves(gradient), strict=True)}


def rows(flow, quantity="log10_gradient"):
    """Natural logs of a quantity, those of the layers of a scan in one array: {path: float64[...]}"""
    found: dict[str, list[float]] = {}
    for row in flow.rows():
        if row.quantity == quantity:
            found.setdefault(re.sub(r"\[\d+\]", "", row.path), []).append(row.value * LN10)
    return {path: np.array(values).squeeze() for path, values in found.items()}


def in_float64(function, *arguments):
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(function)(*up(arguments)))


def on_the_same_residuals(loss, params, *batch):
    """The gradient of the float32 program, of which only the backward pass runs in float64."""

    def seeded(seed, params, batch):
        return jax.vjp(lambda p: loss(p, *batch), params)[1](seed)[0]

    traced = program.read(program.trace(seeded, jnp.ones(()), params, batch)[0])
    with jax.enable_x64(True):
        run = jax.jit(lambda *values: wide.spread(traced, values))
        found = jax.device_get(run(jnp.ones((), jnp.float64), *jax.tree.leaves((params, batch))))
    return jax.tree.unflatten(jax.tree.structure(params), found)


# Sigmoid nets of 24 layers in every framework, by hand in NumPy --------------------------------------------------------

DEPTH, WIDTH = 24, 5
X = drawn(6, WIDTH)


def linen_net():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i in range(DEPTH):
                x = linen.sigmoid(linen.Dense(WIDTH, name=f"layer{i:02}")(x))
            return x

    net, k = Net(), [drawn(WIDTH, WIDTH) for _ in range(DEPTH)]
    params = {f"layer{i:02}": {"bias": drawn(WIDTH), "kernel": k[i]} for i in range(DEPTH)}
    return lambda p, x: jnp.mean(net.apply({"params": p}, x) ** 2), params, k, [params[n]["bias"] for n in params]


def nnx_net():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.sigmoid(layer(x))
            return x

    graph, spec = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    params = jax.tree.map(lambda a: drawn(*a.shape), spec)
    leaves = jax.tree.leaves(params)
    return lambda p, x: jnp.mean(nnx.merge(graph, p, copy=True)(x) ** 2), params, leaves[1::2], leaves[::2]


def equinox_net():
    eqx = pytest.importorskip("equinox")
    net = eqx.filter_eval_shape(lambda: [eqx.nn.Linear(WIDTH, WIDTH, key=jax.random.key(0)) for _ in range(DEPTH)])
    params = jax.tree.map(lambda a: drawn(*a.shape), net)

    def loss(p, x):
        for layer in p:
            x = jax.nn.sigmoid(jax.vmap(layer)(x))
        return jnp.mean(x**2)

    return loss, params, [layer.weight.T for layer in params], [layer.bias for layer in params]


def haiku_net():
    hk = pytest.importorskip("haiku")

    def net(x):
        for i in range(DEPTH):
            x = jax.nn.sigmoid(hk.Linear(WIDTH, name=f"layer{i:02}")(x))
        return x

    net = hk.without_apply_rng(hk.transform(net))
    params = {f"layer{i:02}": {"b": drawn(WIDTH), "w": drawn(WIDTH, WIDTH)} for i in range(DEPTH)}
    layers = params.values()
    return lambda p, x: jnp.mean(net.apply(p, x) ** 2), params, [p["w"] for p in layers], [p["b"] for p in layers]


def plain_net():
    params = {"b": drawn(DEPTH, WIDTH), "w": drawn(DEPTH, WIDTH, WIDTH)}

    def loss(p, x):
        layer = jax.checkpoint(lambda x, p: (jax.nn.sigmoid(x @ p["w"] + p["b"]), None))
        return jnp.mean(jax.lax.scan(layer, x, p)[0] ** 2)

    return loss, params, list(params["w"]), list(params["b"])


def by_hand(kernels, biases, x):
    """Natural logs of the gradients of kernels and biases, and of the error signals: float64[layers, 3]."""
    kernels, biases = (np.asarray(jnp.stack(a), np.float64) for a in (kernels, biases))
    inputs = [np.asarray(x, np.float64)]
    for w, b in zip(kernels, biases, strict=True):
        inputs.append(1 / (1 + np.exp(-(inputs[-1] @ w + b))))
    d, found = 2 * inputs[-1] / inputs[-1].size, []
    for w, x, y in zip(kernels[::-1], inputs[-2::-1], inputs[:0:-1], strict=True):
        d = d * y * (1 - y)
        found.append([np.linalg.norm(x.T @ d), np.linalg.norm(d.sum(0)), math.sqrt(len(x)) * np.linalg.norm(d)])
        d = d @ w.T
    return np.log(found[::-1])


@pytest.mark.parametrize("build", [linen_net, nnx_net, equinox_net, haiku_net, plain_net])
def test_smooth_nets_end_to_end(build):
    loss, params, kernels, biases = build()
    want = by_hand(kernels, biases, X)
    flow = fnn.watch(loss, groups=["gradient", "error"])(params, X)
    found = {}
    for row in flow.rows():
        found.setdefault((row.quantity, row.path.rpartition("/")[2][0]), []).append(row.value * LN10)
    kernel = "k" if ("log10_gradient", "k") in found else "w"
    ours = [found["log10_gradient", kernel], found["log10_gradient", "b"], found["log10_error", kernel]]
    assert want.min() < -25 and not flow.labels.notes
    np.testing.assert_allclose(np.transpose(ours), want, atol=1e-5)


# Other nets: no further from float64 than twice the plain gradient ------------------------------------------------------


def attend(x, p):
    """Attention of one head, with a causal mask."""
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), q @ k.swapaxes(1, 2) / math.sqrt(x.shape[2]), -1e9)
    return jax.nn.softmax(logits) @ v @ p["o"]


def normalized(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


TOKENS = as_jax(RNG.integers(0, 7, (3, 6)))


def transformer(post, remat=True):
    params = {
        "blocks": {name: drawn(4, 4, n) / 2 for name, n in (("qkv", 12), ("o", 4), ("up", 8))}
        | {"down": drawn(4, 8, 4)},
        "table": drawn(7, 4),
    }

    def block(x, p, extra):
        def mlp(x):
            return jax.nn.gelu(x @ p["up"] + extra) @ p["down"]

        if post:
            x = normalized(x + attend(x, p))
            return normalized(x + mlp(x))
        x = x + attend(normalized(x), p)
        return x + mlp(normalized(x))

    def loss(p, tokens, extra=None):
        extra = jnp.zeros((4, 3, 5, 8), p["table"].dtype) if extra is None else extra
        turn = (jax.checkpoint if remat else lambda f: f)(lambda x, xs: (block(x, *xs), None))
        x, _ = jax.lax.scan(turn, p["table"][tokens[:, :-1]], (p["blocks"], extra))
        logits = jax.nn.log_softmax((x if post else normalized(x)) @ p["table"].T)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))

    return loss, params, (TOKENS,), 3, {"blocks/up": (4, 3, 5, 8)}


def residual():
    params = {"blocks": {"a": drawn(12, 5, 5) / 2, "b": drawn(12, 5, 5) / 2}, "out": drawn(5, 2)}

    def loss(p, x, extra=None):
        extra = jnp.zeros((12, 6, 5), x.dtype) if extra is None else extra

        def block(x, xs):
            p, extra = xs
            return x + jax.nn.relu(x @ p["a"] + extra) @ p["b"], None

        return jnp.mean((jax.lax.scan(block, x, (p["blocks"], extra))[0] @ p["out"]) ** 2)

    return loss, params, (X,), 6, {"blocks/a": (12, 6, 5)}


def convs():
    params = {"kernel": drawn(3, 3, 3, 4, 4) / 4, "gain": jnp.ones((3, 4)), "out": drawn(4, 2)}

    def loss(p, x, extra=None):
        extra = jnp.zeros((3, 5, 6, 6, 4), x.dtype) if extra is None else extra

        def block(x, xs):
            p, extra = xs
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers) + extra
            x = x - x.mean((0, 1, 2))
            x = jax.nn.relu(x * jax.lax.rsqrt((x**2).mean((0, 1, 2)) + 1e-5) * p["gain"])
            return linen.max_pool(x, (2, 2), padding="SAME"), None

        x, _ = jax.lax.scan(block, x, ({"kernel": p["kernel"], "gain": p["gain"]}, extra))
        return jnp.mean((linen.avg_pool(x, (2, 2)).mean((1, 2)) @ p["out"]) ** 2)

    return loss, params, (drawn(5, 6, 6, 4),), 5, {"kernel": (3, 5, 6, 6, 4)}


def lstms(factor=1.0):
    """Over 200 steps, inside a scan over 4 layers, computed anew in the backward pass."""
    params = {"h": drawn(4, 3, 12) / 3, "x": drawn(4, 3, 12) / 3}

    def loss(p, x, extra=None):
        extra = jnp.zeros((4, 200, 2, 12), x.dtype) if extra is None else extra

        def layer(xs, now):
            p, extra = now

            def cell(carry, now):
                (h, c), (x, extra) = carry, now
                i, f, o, g = jnp.split(x @ p["x"] + (h @ p["h"] + extra), 4, axis=-1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            zeros = jnp.zeros_like(xs[0])
            return jax.lax.scan(jax.checkpoint(cell), (zeros, zeros), (xs, extra))[1], None

        return factor * (factor * jnp.mean(jax.lax.scan(layer, x.swapaxes(0, 1), (p, extra))[0][-1] ** 2))

    return loss, params, (drawn(2, 200, 3),), 2, {"h": (4, 200, 2, 12)}


OTHERS = {
    "pre-norm transformer": lambda: transformer(False),
    "post-norm transformer": lambda: transformer(True),
    "residual": residual,
    "convs": convs,
    "lstms": lstms,
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "post-norm transformer")) for n in OTHERS]
)
def test_other_nets_are_as_near_as_plain_gradients(name):
    """Gradients, and error signals against the gradient of a perturbation."""
    loss, params, batch, size, extras = OTHERS[name]()
    extra = jnp.zeros(next(iter(extras.values())))
    differentiated = jax.grad(loss, argnums=(0, 1 + len(batch)))
    want, want_d = in_float64(differentiated, params, *batch, extra)
    plain, plain_d = jax.jit(differentiated)(params, *batch, extra)
    flow = jax.jit(fnn.watch(loss, groups=["gradient", "error"]))(params, *batch)
    found, errors = rows(flow), rows(flow, "log10_error")
    limits, ours = [], []
    for path in found:
        axes = found[path].ndim
        exact, near = (log_norms(g, axes)[path] for g in (want, plain))
        limits.append(np.abs(near - exact).max())
        ours.append(np.abs(found[path] - exact).max())
    for path in extras:
        exact, near = (log_norms({path: math.sqrt(size) * d}, 1)[path] for d in (want_d, plain_d))
        limits.append(np.abs(near - exact).max())
        ours.append(np.abs(errors[path] - exact).max())
    assert max(ours) < 2 * max(limits) + 1e-6, (ours, limits)
