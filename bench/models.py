"""The suite `models`: milliseconds per training step of a conv net, a transformer and an LSTM, against Flax Linen."""

import functools
import gc
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from bench import timing
from bench.libraries import linen_run
from bench.problem import MAX_NORM, RATE, on_device
from bench.report import Section
from bench.timing import Run

ABOUT = """\
Milliseconds per training step of three models, with cross entropy, clipping by the global norm at 1 and Adam, float32.
Flax Linen's nets are the same nets from the same weights; before timing, the losses of steps 1 and 3 agreed (1e-4, and
1e-3 relative). Rounds are interleaved; the median round, with the fastest and the slowest. `fnn-stretch` and
`linen-steps` scan over the steps inside one program; the others are loops of jitted steps in Python."""

COLUMNS = ("peer", "ms/step", "[min..max]", "first call, s", "x best")
NAMES = {
    "fnn-loop": "fnn.train_step in a Python loop",
    "fnn-stretch": "what fnn.fit runs: steps inside lax.scan",
    "linen": "Flax Linen, one jitted step in a Python loop",
    "linen-steps": "Flax Linen, the same step inside lax.scan",
}


@dataclass(frozen=True)
class Model:
    """One row: fnn's net, Linen's, and how weights go from the one to the other."""

    about: str
    net: Callable[[], fnn.Layer]
    x: tuple[int, ...]
    y: tuple[int, ...]
    classes: int
    linen: Callable[[], Any]
    weights: Callable[[Any], dict[str, Any]]
    steps: int
    tokens: bool = False

    def batches(self) -> tuple[jax.Array, jax.Array]:
        """Draw random data: (xs, ys), each with a leading axis of steps."""
        x_key, y_key = jax.random.split(jax.random.key(1))
        shape = (self.steps, *self.x)
        xs = jax.random.randint(x_key, shape, 0, self.classes) if self.tokens else jax.random.normal(x_key, shape)
        return xs, jax.random.randint(y_key, (self.steps, *self.y), 0, self.classes)


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the models; yield each one's section as soon as it is done."""
    for name, model in MODELS.items():
        say(f"\n{name}: {model.about}")
        runs = {peer: build(model) for peer, build in BUILDERS.items() if peer in (options.peers or NAMES)}
        first, losses = {}, {}
        for peer, ready in runs.items():
            first[peer], losses[peer] = ready.first_round()
            say(f"  {peer}: first call {first[peer]:.1f} s")
        reference = next(iter(losses.values()))
        for peer, ours in losses.items():
            off = np.abs(ours[:3] - reference[:3])
            if not (off[0] <= 1e-4 and off[2] <= 1e-3 * reference[2]):
                raise ValueError(f"models: {peer} has losses {ours[:3]} on {name}, not {reference[:3]}")
        rounds = options.rounds or (3 if options.quick else 11)
        times = timing.interleave(runs, rounds, model.steps, lambda i: say(f"  round {i}") if i % 5 == 0 else None)
        best = min(times.values(), key=lambda t: t.median)
        cells, records = [], []
        for peer, t in times.items():
            ratio = timing.ratio(t, best)
            shown = f"{'~' if ratio.unsure and t is not best else ''}{ratio.median:.2f}"
            seconds = max(0.0, first[peer] - t.median / 1e3 * model.steps / len(runs[peer].items))
            cells.append((peer, f"{t.median:.3f}", f"[{t.low:.3f}..{t.high:.3f}]", f"{seconds:.2f}", shown))
            records.append({"name": peer, "ms": t.rounds, "ratio": ratio._asdict(), "first_s": seconds})
        notes = [model.about, *(f"{peer}: {NAMES[peer]}" for peer in times)]
        yield Section(name, COLUMNS, cells, notes, {"model": name, "peers": records})
        gc.collect()
        jax.clear_caches()


def _start(model: Model) -> tuple[fnn.Layer, Any, fnn.TrainState]:
    net = model.net()
    optimizer = fnn.packed(optax.chain(fnn.clip.by_global_norm(MAX_NORM), optax.adam(RATE)))
    spec = jax.ShapeDtypeStruct(model.x, jnp.int32 if model.tokens else jnp.float32)
    return net, optimizer, fnn.TrainState.create(net, optimizer, jax.random.key(0), spec)


def _fnn(model: Model, loop: bool) -> Run:
    net, optimizer, state = _start(model)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
    xs, ys = model.batches()
    items, call = (list(zip(xs, ys, strict=True)), step) if loop else ([(xs, ys)], step.stretch)
    return Run(call, state, items, lambda metrics: metrics["loss"])


def _linen(model: Model, loop: bool) -> Run:
    params = on_device(model.weights(jax.device_get(_start(model)[2].params)))
    xs, ys = model.batches()
    ready = linen_run(model.linen(), params, list(zip(xs, ys, strict=True)))
    if not loop:
        scan = jax.jit(functools.partial(jax.lax.scan, ready.call), donate_argnums=0)
        ready = Run(scan, ready.state, [(xs, ys)])
    return ready


BUILDERS = {
    "fnn-loop": lambda model: _fnn(model, True),
    "fnn-stretch": lambda model: _fnn(model, False),
    "linen": lambda model: _linen(model, True),
    "linen-steps": lambda model: _linen(model, False),
}


def _convnet_linen() -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i, channels in enumerate((32, 32, 64, 64)):
                x = linen.Conv(channels, (3, 3), use_bias=False, name=f"conv_{i}")(x)
                x = linen.relu(linen.BatchNorm(False, momentum=0.9, epsilon=1e-5, name=f"norm_{i}")(x))
                if i == 1:
                    x = linen.max_pool(x, (2, 2), (2, 2), "SAME")
            return linen.Dense(10, name="output")(x.reshape(len(x), -1))

    return Net()


def _convnet_weights(params: Any) -> dict[str, Any]:
    first, (second,), _pool, third, (fourth,), *_rest, output = params
    named: dict[str, Any] = {"output": output}
    for i, (conv, norm, _relu) in enumerate((first, second, third, fourth)):
        named |= {f"conv_{i}": conv, f"norm_{i}": norm}
    return named


VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 64, 64, 128, 4, 4


def _transformer_linen() -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            table = linen.Embed(VOCABULARY, WIDTH, name="table")
            h = table(x) + self.param("places", linen.initializers.zeros, (LENGTH, WIDTH))
            mask = linen.make_causal_mask(x)
            for i in range(LAYERS):
                a = linen.LayerNorm(name=f"norm_a{i}")(h)
                h = h + linen.MultiHeadDotProductAttention(HEADS, name=f"attention_{i}")(a, mask=mask)
                a = linen.LayerNorm(name=f"norm_b{i}")(h)
                a = linen.gelu(linen.Dense(4 * WIDTH, name=f"in_{i}")(a), approximate=False)
                h = h + linen.Dense(WIDTH, name=f"out_{i}")(a)
            return table.attend(linen.LayerNorm(name="norm")(h))

    return Net()


def _transformer_weights(params: Any) -> dict[str, Any]:
    places, trunk, norm, *_ = params["body"]
    (place,) = jax.tree.leaves(places)
    named: dict[str, Any] = {"table": {"embedding": params["embedding"]}, "places": place, "norm": norm}
    size = WIDTH // HEADS
    for i, (attention, forward) in enumerate(trunk["trunk"]):
        (norm_a, inner), (norm_b, feed) = attention, forward
        (heads,), (first, _gelu, second) = inner["attention"], feed["feed_forward"]
        split = {
            name: {"kernel": p["kernel"].reshape(WIDTH, HEADS, size), "bias": p["bias"].reshape(HEADS, size)}
            for name, p in heads.items()
            if name != "out"
        }
        split["out"] = {"kernel": heads["out"]["kernel"].reshape(HEADS, size, WIDTH), "bias": heads["out"]["bias"]}
        named |= {f"norm_a{i}": norm_a, f"norm_b{i}": norm_b, f"attention_{i}": split}
        named |= {f"in_{i}": first, f"out_{i}": second}
    return named


def _lstm_linen() -> Any:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.RNN(linen.OptimizedLSTMCell(WIDTH, name="cell"))(x)
            return linen.Dense(10, name="output")(h[:, -1])

    return Net()


def _lstm_weights(params: Any) -> dict[str, Any]:
    cell, *_middle, output = params
    (cell,) = cell
    parts = [np.split(cell[name], 4, axis=-1) for name in ("kernel", "recurrent_kernel", "bias")]
    named = {f"i{gate}": {"kernel": w} for gate, w in zip("ifgo", parts[0], strict=True)}
    named |= {f"h{gate}": {"kernel": u, "bias": b} for gate, u, b in zip("ifgo", *parts[1:], strict=True)}
    return {"cell": named, "output": output}


MODELS = {
    "convnet": Model(
        "2 x conv 3x3 of 32 channels, max pool, 2 x of 64, batch norm and ReLU behind each; 8x8 images, batch 64",
        lambda: fnn.models.convnet((32, 64), 10),
        (64, 8, 8, 1),
        (64,),
        10,
        _convnet_linen,
        _convnet_weights,
        12,
    ),
    "transformer": Model(
        f"decoder of {LAYERS} layers, width {WIDTH}, {HEADS} heads, learned positions, tied; {LENGTH} tokens, batch 16",
        lambda: fnn.models.transformer(
            VOCABULARY, LAYERS, WIDTH, HEADS, positions="learned", longest=LENGTH, unroll=True
        ),
        (16, LENGTH),
        (16, LENGTH),
        VOCABULARY,
        _transformer_linen,
        _transformer_weights,
        6,
        tokens=True,
    ),
    "lstm": Model(
        f"one LSTM of width {WIDTH}, output layer on the last of {LENGTH} positions of 8 numbers, batch 32",
        lambda: fnn.models.rnn(1, WIDTH, 10, cell="lstm"),
        (32, LENGTH, 8),
        (32,),
        10,
        _lstm_linen,
        _lstm_weights,
        12,
    ),
}
