"""The suite `per_example`: what norms, sums and clipped sums of single examples' gradients cost."""

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fnn
from bench import limit, timing
from bench.report import Section, describe_error
from bench.timing import Run

ABOUT = """\
Milliseconds and XLA's temporary memory of single examples' gradients (`fnn.per_example`), beside the plain gradient of
the mean loss of the same batch and `vmap(grad)`. Norms of all variants agreed before anything was timed. Rounds are
interleaved; the median round, with the fastest and the slowest; `x plain` are medians of ratios within a round, and
`x vmap` those to `vmap(grad)` doing the same work. `bar` is the most that `x plain` and `x memory` may be; `x vmap` may be
1 at most. The peers' norms are compared with their own plain gradient."""

COLUMNS = ("variant", "ms", "[min..max]", "x plain", "bar", "x vmap", "temporary MB", "x memory", "bar ")
NAMES = {
    "mlp": "9 hidden layers of 512, batch 256",
    "depth": "256 blocks of width 64 in `repeat`, batch 64",
    "conv": "four convolutions, 16x16 images, batch 64",
    "sequence": "two transformer blocks of width 128, 64 positions, batch 32",
    "lstm": "LSTM of 128 units, 32 steps, batch 64",
    "opacus": "ghost norms of Opacus on the mlp",
    "backpack": "BatchL2Grad of BackPACK on the mlp",
    "jax-privacy": "clipped_grad of jax_privacy on the mlp: one vmap(grad), its default, and one example at a time",
}
WORK = ("mlp", "depth", "conv", "sequence", "lstm")
NORMS, SUMS, CLIPPED = "norms", "mean and norms", "clipped mean"
STORED = {work: f"vmap(grad), {work}" for work in (NORMS, SUMS, CLIPPED)}
BARS = {
    "mlp": {NORMS: (0.8, 1.05), SUMS: (1.1, 1.05), CLIPPED: (1.15, 2)},
    "depth": {NORMS: (1.2, 1.5), CLIPPED: (1.5, 4)},
    **dict.fromkeys(("conv", "sequence", "lstm"), dict.fromkeys((NORMS, SUMS, CLIPPED), (1.5, None))),
}


class Problem(NamedTuple):
    """A loss of one example, the mean loss of a batch as one would write it, parameters and a batch."""

    loss: Callable[[Any, Any], Any]
    plain: Callable[[Any, Any], Any]
    params: Any
    batch: Any


class Conv(nn.Module):
    """Four convolutions, the mean over positions, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2)):
            x = nn.relu(nn.Conv(width, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.mean((-3, -2)))


class Transformer(nn.Module):
    """Embedding, pre-norm blocks, and logits for every position."""

    blocks: int = 2

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(256, 128)(ids)
        for _ in range(self.blocks):
            x = x + nn.SelfAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))))
        return nn.Dense(256)(nn.LayerNorm()(x))


class Lstm(nn.Module):
    """The last state of an LSTM, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(128))(x)[..., -1, :])


def problem(name: str) -> Problem:
    """Draw a problem's batch and parameters."""
    x_key, y_key, key = jax.random.split(jax.random.key(0), 3)
    cross_entropy = fnn.losses.cross_entropy
    if name in ("mlp", "depth"):
        depth, width, count = (9, 512, 256) if name == "mlp" else (257, 64, 64)
        net = fnn.models.mlp(depth, width, 10, activation="relu" if name == "mlp" else "tanh")
        batch = jax.random.normal(x_key, (count, 64)), jax.random.randint(y_key, (count,), 0, 10)
        params, state = net.init(key, batch[0])

        def plain(p, b):
            return jnp.mean(cross_entropy(net.apply(p, state, b[0])[0], b[1]))

        return Problem(fnn.example_loss(net, (params, state), loss=cross_entropy), plain, params, batch)
    if name == "sequence":
        module, x = Transformer(), jax.random.randint(x_key, (32, 64), 0, 256)
        y = x
    else:
        module, shape = (Conv(), (64, 16, 16, 3)) if name == "conv" else (Lstm(), (64, 32, 16))
        x, y = jax.random.normal(x_key, shape), jax.random.randint(y_key, (64,), 0, 10)

    def plain(p, b):
        return jnp.mean(cross_entropy(module.apply(p, b[0]), b[1]))

    def loss(p, example):
        return plain(p, jax.tree.map(lambda a: a[None], example))

    return Problem(loss, plain, module.init(key, x[:1]), (x, y))


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the problems, then the peers; yield each section as soon as it is done."""
    names = options.peers or NAMES
    for name in (n for n in WORK if n in names):
        yield _section(name, problem(name), options, say)
        gc.collect()
        jax.clear_caches()
    if peers := [n for n in names if n not in WORK]:
        yield _peers(peers, problem("mlp"), options, say)


def variants(p: Problem) -> dict[str, Callable[[Any, Any], Any]]:
    """Write each question as a function of parameters and batch."""
    every = fnn.per_example(p.loss)

    def sums(params, batch):
        gradients = every(params, batch)
        return gradients.norms(), gradients.mean()

    def stored(params, batch):
        gradients = jax.vmap(jax.grad(p.loss), in_axes=(None, 0))(params, batch)
        squares = [jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients)]
        return gradients, jnp.sqrt(sum(squares))

    def weighted(gradients, w):  # a product: XLA for CPUs takes many times as long for a sum over the leading axis
        return jax.tree.map(lambda g: jnp.tensordot(w / w.size, g, 1), gradients)

    def stored_sums(params, batch):
        gradients, norms = stored(params, batch)
        return norms, weighted(gradients, jnp.ones_like(norms))

    def stored_clipped(params, batch):
        gradients, norms = stored(params, batch)
        return weighted(gradients, 1 / jnp.maximum(norms, 1))

    return {
        "plain gradient": jax.grad(p.plain),
        NORMS: lambda params, batch: every(params, batch).norms(),
        SUMS: sums,
        CLIPPED: lambda params, batch: every(params, batch).clipped_mean(1.0).mean,
        STORED[NORMS]: lambda params, batch: stored(params, batch)[1],
        STORED[SUMS]: stored_sums,
        STORED[CLIPPED]: stored_clipped,
    }


def _section(name: str, p: Problem, options: Namespace, say: Callable[[str], None]) -> Section:
    say(f"\n{name}: {NAMES[name]}")
    runs, memory = {}, {}
    for variant, function in variants(p).items():
        compiled = jax.jit(function).lower(p.params, p.batch).compile()
        analysis = compiled.memory_analysis()
        memory[variant] = analysis.temp_size_in_bytes / 1e6 if analysis else float("nan")
        runs[variant] = _run(compiled, p)
    rtol = 1e-3 if limit.exact_products() else 0.1
    for ours, theirs in STORED.items():
        pair = [jax.tree.leaves(runs[v].call(p.params, p.batch)[1]) for v in (ours, theirs)]
        for a, b in zip(*pair, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10 * float(jnp.max(jnp.abs(b))))
    base = "plain gradient"
    calls = _calls(runs[base])
    for run in runs.values():
        run.items = [p.batch] * calls
    times = _interleave(runs, options, calls)
    cells, records = [], []
    for variant, t in times.items():
        ratio, more = timing.ratio(t, times[base]), memory[variant] / memory[base]
        bars = BARS[name].get(variant, (None, None))
        cells.append(
            (
                variant,
                f"{t.median:.2f}",
                f"[{t.low:.2f}..{t.high:.2f}]",
                f"{ratio.median:.2f}",
                _bar(bars[0]),
                f"{timing.ratio(t, times[STORED[variant]]).median:.2f}" if variant in STORED else "",
                f"{memory[variant]:.1f}",
                f"{more:.2f}",
                _bar(bars[1]),
            )
        )
        records.append({"name": variant, "ms": t.rounds, "ratio": ratio._asdict(), "memory_mb": memory[variant]})
    return Section(f"{name}: {NAMES[name]}", COLUMNS, cells, [], {"row": name, "variants": records})


def _peers(names: list[str], p: Problem, options: Namespace, say: Callable[[str], None]) -> Section:
    say("\npeers on the mlp")
    ours = variants(p)
    runs = {f"fnn, {v}": _run(jax.jit(ours[v]), p) for v in ("plain gradient", NORMS, SUMS, CLIPPED)}
    bases, skipped = dict.fromkeys(runs, "fnn, plain gradient"), []
    for name in names:
        try:
            built = PEERS[name](p)
            expected = np.asarray(runs[f"fnn, {NORMS}"].call(p.params, p.batch)[1])
            base = next(iter(built))
            got = np.asarray(built[f"{name}, norms"].call(None, None)[1]) if f"{name}, norms" in built else None
            if got is not None:
                np.testing.assert_allclose(got, expected, rtol=2e-3)
        except Exception as error:
            skipped.append(f"{name}: skipped, {describe_error(error)}")
            continue
        runs |= built
        bases |= dict.fromkeys(built, base)
    times = _interleave(runs, options)
    cells, records = [], []
    for variant, t in times.items():
        ratio = timing.ratio(t, times[bases[variant]])
        cells.append(
            (variant, f"{t.median:.2f}", f"[{t.low:.2f}..{t.high:.2f}]", f"{ratio.median:.2f}", bases[variant])
        )
        records.append({"name": variant, "ms": t.rounds, "base": bases[variant], "ratio": ratio._asdict()})
    columns = ("variant", "ms", "[min..max]", "x its plain", "its plain")
    return Section("peers on the mlp", columns, cells, skipped, {"row": "peers", "variants": records})


def torch_mlp(p: Any) -> tuple[Any, Any, Any]:
    """Make PyTorch's mlp from a problem's dense layers, and its batch."""
    import torch

    dense = list(_dense(p.params))
    layers: list[Any] = []
    for i, (kernel, bias) in enumerate(dense):
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data = torch.tensor(np.asarray(kernel).T.copy())
        linear.bias.data = torch.tensor(np.asarray(bias).copy())
        layers += [linear, torch.nn.ReLU()] if i + 1 < len(dense) else [linear]
    x, y = (torch.tensor(np.asarray(a)) for a in p.batch)
    return torch.nn.Sequential(*layers), x, y.long()


def _dense(params: Any) -> list[tuple[Any, Any]]:
    """List (kernel, bias) of the dense layers in forward order."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, dict) and "kernel" in node)
    return [(node["kernel"], node["bias"]) for node in nodes]


def _torch_run(step: Callable[[], Any]) -> Run:
    return Run(lambda state, item: (state, step()), None, [None] * 4, wait=lambda out: out)


def _torch_plain(p: Problem) -> Run:
    import torch

    model, x, y = torch_mlp(p)

    def step():
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()

    return _torch_run(step)


def _opacus(p: Problem) -> dict[str, Run]:
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, x, y = torch_mlp(p)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)

    def step():
        wrapped.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(x), y).backward()
        return wrapped.get_norm_sample().detach().numpy()

    return {"opacus, plain gradient": _torch_plain(p), "opacus, norms": _torch_run(step)}


def _backpack(p: Problem) -> dict[str, Run]:
    import torch
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, x, y = torch_mlp(p)
    model, loss = extend(model), extend(torch.nn.CrossEntropyLoss())

    def step():
        model.zero_grad()
        with backpack(BatchL2Grad()):
            loss(model(x), y).backward()
        squares = sum(parameter.batch_l2 for parameter in model.parameters())
        return torch.sqrt(squares).numpy() * len(x)  # its gradients are those of the mean's terms

    return {"backpack, plain gradient": _torch_plain(p), "backpack, norms": _torch_run(step)}


def _jax_privacy(p: Problem) -> dict[str, Run]:
    from jax_privacy import clipping

    def clipped(size):
        options = {"l2_clip_norm": 1.0, "batch_argnums": 1, "keep_batch_dim": False, "normalize_by": len(p.batch[0])}
        return _run(jax.jit(clipping.clipped_grad(p.loss, microbatch_size=size, **options)), p)

    # It stores the gradients of a microbatch and adds them up; of the sizes 1, 2, 4, ..., 64 the fastest by far was 1.
    runs = {"jax-privacy, clipped mean": clipped(None), "jax-privacy, clipped mean, microbatches of 1": clipped(1)}
    want = jax.tree.leaves(jax.jit(variants(p)[CLIPPED])(p.params, p.batch))
    for run in runs.values():
        for a, b in zip(jax.tree.leaves(run.call(p.params, p.batch)[1]), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(b))))
    return {"jax-privacy, plain gradient": _run(jax.jit(jax.grad(p.plain)), p)} | runs


PEERS = {"opacus": _opacus, "backpack": _backpack, "jax-privacy": _jax_privacy}


def _run(function: Callable[[Any, Any], Any], p: Problem) -> Run:
    return Run(lambda params, batch: (params, function(params, batch)), p.params, [p.batch] * 4)


def _calls(plain: Run) -> int:
    """Choose how many calls make a round: 4, or more where 4 plain gradients take less than 20 ms."""
    plain.advance(plain.items)
    return int(np.clip(0.02 / (plain.advance(plain.items)[0] / 4), 4, 64))


def _interleave(runs: dict[str, Run], options: Namespace, calls: int = 4) -> dict[str, timing.Times]:
    return timing.interleave(runs, options.rounds or (3 if options.quick else 15), calls, lambda _: None)


def _bar(bar: float | None) -> str:
    return "" if bar is None else f"{bar:g}"
