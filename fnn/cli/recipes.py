"""What `fnn train` trains: data in the shape that a model takes, the model, and the loss that fits the targets."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, losses, models
from fnn.core import Layer
from fnn.datasets import data, synthetic
from fnn.datasets.dataset import Dataset, Parts
from fnn.layers import memory

STAGES = {"convnet": 2, "resnet": 3}


class Defaults(NamedTuple):
    """What a model takes where the command line says nothing."""

    depth: int
    width: int
    norm: str = "batch_norm"
    dropout: float = 0.0


DEFAULTS = {
    "mlp": Defaults(2, 256, dropout=0.1),
    "convnet": Defaults(2, 32, dropout=0.3),
    "resnet": Defaults(2, 16),
    "rnn": Defaults(1, 128, "none"),
    "transformer": Defaults(2, 64, "layer_norm"),
}


class Recipe(NamedTuple):
    """A model for a data set."""

    net: Layer
    loss: losses.Loss
    measure: str
    """What the loss's `correct` counts, in words; the loss's own name where it counts nothing."""
    dropout: float


def load(name: str, model: str, *, key: Any, encoder: int | None = None) -> Parts:
    """Load data by name or path; images as they are for convolutions, pixel by pixel for sequence models.

    With an `encoder`, x of `data.number_words` is {"source": ..., "target": ...}: what it translates, and what follows.
    """
    check.choice("train", DEFAULTS, model=model)
    if encoder is not None and (name, model) != ("number_words", "transformer"):
        got = f"model {model!r} and data {name!r}"
        raise ValueError(f"train: an encoder belongs to a transformer on number_words, got {got}; leave it out")
    train, test = data.load(name, key=key, image=model != "mlp")
    if model in ("rnn", "transformer") and train.x.ndim == 4:
        return _pixels(train), _pixels(test)
    return (train, test) if encoder is None else (_two_sided(train), _two_sided(test))


def recipe(options: Any, train: Dataset, test: Dataset | None = None) -> Recipe:
    """Choose the loss by the targets (labels, labels at every position, numbers), and build the model around it.

    `options` are the command line's, `cli.Train`; None stands for the model's default. The test part must hold no
    classes or tokens beyond those of the training part, for which the net has no outputs.
    """
    sequences = options.model in ("rnn", "transformer")
    integer, y = np.issubdtype(train.y.dtype, np.integer), train.y
    xs = jax.tree.leaves(train.x)
    tokens = all(np.issubdtype(x.dtype, np.integer) for x in xs)
    if test is not None:
        _check_held_out(train, test, tokens)
    if integer and y.ndim == 2 and sequences and tokens:
        outputs = 1 + max(int(a.max()) for a in (*xs, y))
        loss, measure = losses.sequence_cross_entropy, "exact match"
    elif integer and y.ndim == 1:
        loss, measure, outputs = losses.cross_entropy, "accuracy", int(y.max()) + 1
    elif not integer and y.ndim == 2:
        loss, measure, outputs = losses.mse, "mean squared error", y.shape[1]
    else:
        got = f"targets {check.describe(y)} for {check.describe(train.x)}"
        raise ValueError(f"train: {options.model} needs labelled classes, numbers, or token sequences, got {got}")
    wanted = {"convnet": (3, 4, 5), "resnet": (3, 4, 5), "rnn": (3,), "transformer": (3,)}.get(options.model)
    if wanted and not (sequences and tokens) and train.x.ndim not in wanted:
        rule = "sequences float[n, time, d]" if sequences else "images float[n, *positions, c]"
        raise ValueError(f"train: {options.model} needs {rule}, got {check.describe(train.x)}; choose other data")
    default = DEFAULTS[options.model]
    given = {name: getattr(options, name) for name in Defaults._fields}
    size = default._replace(**{name: value for name, value in given.items() if value is not None})
    net = _model(options, size, outputs, loss is losses.sequence_cross_entropy)
    return Recipe(net, loss, measure, size.dropout)


def _check_held_out(train: Dataset, test: Dataset, tokens: bool) -> None:
    for what, have, new in (("labels", train.y, test.y), ("tokens", train.x, test.x)):
        if not np.issubdtype(jax.tree.leaves(have)[0].dtype, np.integer) or (what == "tokens" and not tokens):
            continue
        most, most_new = (max(int(a.max()) for a in jax.tree.leaves(part)) for part in (have, new))
        both = max(most, int(train.y.max())) if tokens else most  # tokens and labels share one vocabulary
        if most_new > both:
            raise ValueError(
                f"train: {what} of the test part must occur in the training part, 0..{both}, got {most_new}; split the "
                "data anew, or leave those examples out"
            )


def decoded_exactly(net: Layer, state: Any, test: Dataset, *, batch_size: int = 1000) -> float:
    """Translate the prompts of `data.number_words` greedily, with the cache, and return the fraction exactly right."""
    right = 0.0
    prompt, steps = synthetic.PROMPT, synthetic.ANSWER
    for i in range(0, test.size, batch_size):
        x, y = test.take(slice(i, i + batch_size))
        question = {**x, "target": x["target"][:, :1]} if isinstance(x, dict) else x[:, :prompt]
        answers = memory.generate(net, state.params, state.net_state, question, steps, eos=synthetic.END)
        targets = y[:, -steps:]
        right += float(jnp.sum(jnp.all((answers == targets) | (targets == -1), axis=1)))
    return right / test.size


def _pixels(part: Dataset) -> Dataset:
    return Dataset(part.x.reshape(part.size, -1, part.x.shape[-1]), part.y)


def _two_sided(part: Dataset) -> Dataset:
    """The target starts with the direction, from which the answer follows."""
    start = synthetic.PROMPT - 1
    return Dataset({"source": part.x[:, :start], "target": part.x[:, start:]}, part.y[:, start:])


def _model(options: Any, size: Defaults, outputs: int, every: bool) -> Layer:
    kind, taps = options.model, options.flow
    depth, width, norm, dropout = size
    if kind == "mlp":
        return models.mlp(
            depth,
            width,
            outputs,
            activation=options.activation,
            norm=norm,
            init=options.init,
            residual=options.residual,
            dropout=dropout,
            taps=taps,
        )
    if kind == "convnet":
        channels = [width * 2**i for i in range(STAGES[kind])]
        common = {"activation": options.activation, "norm": norm, "init": options.init, "taps": taps}
        return models.convnet(channels, outputs, convs=depth, dropout=dropout, **common)
    if kind == "resnet":
        scaling = "skip_init" if norm == "none" else None
        common = {"activation": options.activation, "norm": norm, "init": options.init, "taps": taps}
        return models.resnet([depth] * STAGES[kind], outputs, width=width, scaling=scaling, **common)
    vocabulary, padding = (outputs, synthetic.PAD) if every else (None, None)
    if kind == "rnn":
        return models.rnn(
            depth,
            width,
            outputs,
            cell=options.cell,
            vocabulary=vocabulary,
            padding=padding,
            every_step=every,
            forget_bias=options.forget_bias,
            recurrent_init=options.recurrent_init,
            dropout=dropout,
            taps=taps,
        )
    return models.transformer(
        vocabulary,
        depth,
        width,
        options.heads,
        outputs=None if every else outputs,
        causal=every,
        padding=padding,
        norm=norm,
        norm_position=options.norm_position,
        encoder=options.encoder,
        activation=options.activation,
        dropout=dropout,
        taps=taps,
    )
