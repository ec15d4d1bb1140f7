"""The suite `models`: milliseconds per training step of conv nets, transformers and recurrent nets, against Flax and PyTorch."""

import functools
import gc
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from bench import nets, timing
from bench.libraries import linen_run, torch_run
from bench.nets import HEADS, LAYERS, LENGTH, VOCABULARY, WIDTH
from bench.problem import MAX_NORM, RATE, on_device
from bench.registry import Skip
from bench.report import Section
from bench.timing import Run

ABOUT = """\
Milliseconds per training step of six models, with cross entropy, clipping by the global norm at 1 and Adam, float32.
Flax Linen's and PyTorch's are the same nets from the same weights; before timing, the losses of steps 1 and 3 agreed
(1e-4, and 1e-3 relative). Rounds are interleaved; the median round, with the fastest and the slowest. `fnn-stretch` and
`linen-steps` scan over the steps inside one program; the others are loops of jitted steps in Python."""

COLUMNS = ("peer", "ms/step", "[min..max]", "first call, s", "x best")
NAMES = {
    "fnn-loop": "fnn.train_step in a Python loop",
    "fnn-stretch": "what fnn.fit runs: steps inside lax.scan",
    "linen": "Flax Linen, one jitted step in a Python loop",
    "linen-steps": "Flax Linen, the same step inside lax.scan",
    "torch": "PyTorch eager, fused Adam",
}


@dataclass(frozen=True)
class Model:
    """One row: fnn's net, Linen's, and how weights go from the one to the other."""

    about: str
    net: Callable[[], fnn.Layer]
    x: Any
    """The shape of a batch's inputs, or a dict of shapes."""
    y: tuple[int, ...]
    classes: int
    linen: Callable[[], Any]
    weights: Callable[[Any], dict[str, Any]]
    steps: int
    tokens: bool = False

    def specs(self) -> Any:
        """Shapes and dtypes of a batch's inputs."""
        dtype = jnp.int32 if self.tokens else jnp.float32
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), self.x, is_leaf=lambda s: isinstance(s, tuple))

    def batches(self) -> tuple[Any, jax.Array]:
        """Draw random data: (xs, ys), each with a leading axis of steps."""
        x_key, y_key = jax.random.split(jax.random.key(1))
        leaves, treedef = jax.tree.flatten(self.specs())
        keys = treedef.unflatten(jax.random.split(x_key, len(leaves)))

        def draw(spec, key):
            shape = (self.steps, *spec.shape)
            return jax.random.randint(key, shape, 0, self.classes) if self.tokens else jax.random.normal(key, shape)

        return jax.tree.map(draw, self.specs(), keys), jax.random.randint(y_key, (self.steps, *self.y), 0, self.classes)


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Go through the models; yield each one's section as soon as it is done."""
    for name, model in MODELS.items():
        say(f"\n{name}: {model.about}")
        runs, missing = {}, []
        for peer in (peer for peer in NAMES if peer in (options.peers or NAMES)):
            try:
                runs[peer] = BUILDERS[peer](name, model)
            except Skip as skip:
                missing.append(f"{peer}: skipped, {skip}")
                say(f"  {missing[-1]}")
        if not runs:
            yield Section(name, COLUMNS, [], [model.about, *missing], {"model": name, "peers": []})
            continue
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
        notes = [model.about, *(f"{peer}: {NAMES[peer]}" for peer in times), *missing]
        yield Section(name, COLUMNS, cells, notes, {"model": name, "peers": records})
        gc.collect()
        jax.clear_caches()


def _start(model: Model) -> tuple[fnn.Layer, Any, fnn.TrainState]:
    net = model.net()
    optimizer = fnn.optimizers.packed(optax.chain(fnn.clip.by_global_norm(MAX_NORM), optax.adam(RATE)))
    return net, optimizer, fnn.TrainState.create(net, optimizer, jax.random.key(0), model.specs())


def _fnn(model: Model, loop: bool) -> Run:
    net, optimizer, state = _start(model)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
    xs, ys = model.batches()
    items, call = (_apart(xs, ys), step) if loop else ([(xs, ys)], step.stretch)
    return Run(call, state, items, lambda metrics: metrics["loss"])


def _linen(model: Model, loop: bool) -> Run:
    params = on_device(model.weights(jax.device_get(_start(model)[2].params)))
    xs, ys = model.batches()
    ready = linen_run(model.linen(), params, _apart(xs, ys))
    if not loop:
        scan = jax.jit(functools.partial(jax.lax.scan, ready.call), donate_argnums=0)
        ready = Run(scan, ready.state, [(xs, ys)])
    return ready


def _apart(xs: Any, ys: jax.Array) -> list[tuple[Any, jax.Array]]:
    return [(jax.tree.map(lambda a, i=i: a[i], xs), y) for i, y in enumerate(ys)]


def _torch(name: str, model: Model) -> Run:
    if importlib.util.find_spec("torch") is None:
        raise Skip("torch is not installed")
    from bench.torch_nets import NETS

    return torch_run(NETS[name](model.weights(jax.device_get(_start(model)[2].params))), *model.batches())


BUILDERS = {
    "fnn-loop": lambda name, model: _fnn(model, True),
    "fnn-stretch": lambda name, model: _fnn(model, False),
    "linen": lambda name, model: _linen(model, True),
    "linen-steps": lambda name, model: _linen(model, False),
    "torch": _torch,
}

BLOCK = fnn.models.Block(HEADS, positions="learned", longest=LENGTH, unroll=True)

MODELS = {
    "convnet": Model(
        "2 x conv 3x3 of 32 channels, max pool, 2 x of 64, batch norm and ReLU behind each; 8x8 images, batch 64",
        lambda: fnn.models.convnet((32, 64), 10),
        (64, 8, 8, 1),
        (64,),
        10,
        nets.convnet_linen,
        nets.convnet_weights,
        12,
    ),
    "resnet": Model(
        "pre-activation, 2 basic blocks of 16 channels, 2 of 32 at half the size, batch norm; 8x8 images, batch 64",
        lambda: fnn.models.resnet((2, 2), 10),
        (64, 8, 8, 1),
        (64,),
        10,
        nets.resnet_linen,
        nets.resnet_weights,
        12,
    ),
    "transformer": Model(
        f"decoder of {LAYERS} layers, width {WIDTH}, {HEADS} heads, learned positions, tied; {LENGTH} tokens, batch 16",
        lambda: fnn.models.decoder(VOCABULARY, LAYERS, WIDTH, BLOCK),
        (16, LENGTH),
        (16, LENGTH),
        VOCABULARY,
        nets.transformer_linen,
        nets.transformer_weights,
        6,
        tokens=True,
    ),
    "encoder-decoder": Model(
        f"encoder and decoder of {LAYERS // 2} layers each, else as the transformer; {LENGTH} tokens each, batch 16",
        lambda: fnn.models.translator(VOCABULARY, LAYERS // 2, WIDTH, BLOCK),
        {"source": (16, LENGTH), "target": (16, LENGTH)},
        (16, LENGTH),
        VOCABULARY,
        nets.translator_linen,
        nets.translator_weights,
        6,
        tokens=True,
    ),
    "gru": Model(
        f"one GRU of width {WIDTH}, else as the LSTM",
        lambda: fnn.models.rnn(1, WIDTH, 10, cell="gru"),
        (32, LENGTH, 8),
        (32,),
        10,
        nets.recurrent_linen("gru"),
        nets.gru_weights,
        12,
    ),
    "lstm": Model(
        f"one LSTM of width {WIDTH}, output layer on the last of {LENGTH} positions of 8 numbers, batch 32",
        lambda: fnn.models.rnn(1, WIDTH, 10, cell="lstm"),
        (32, LENGTH, 8),
        (32,),
        10,
        nets.recurrent_linen("lstm"),
        nets.lstm_weights,
        12,
    ),
}
