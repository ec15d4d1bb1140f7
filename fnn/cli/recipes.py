"""What `fnn train` trains: data in the shape that a model takes, the model, and the loss that fits the targets."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, losses, models, parts
from fnn.cli.terminal import told
from fnn.core import Layer
from fnn.datasets import data, synthetic
from fnn.datasets.dataset import Dataset, Parts
from fnn.layers import activations, memory

ACTIVATIONS = ", ".join(name for name, phi in activations.TABLE.items() if phi.elementwise)
NORMS = ", ".join(parts.NORMS)
Activation = Annotated[str, told(ACTIVATIONS)]
Norm = Annotated[str, told(f"none, {NORMS}")]
"""Options whose help lists what there is."""


class Task(NamedTuple):
    """What the data and the user ask of a model."""

    outputs: int
    """number of classes, of numbers to predict, or of tokens"""
    tokens: bool
    """whether it predicts a token at each position of a sequence of tokens"""
    taps: bool


class Model:
    """Options of a model; their defaults are those of `fnn train`."""

    reads: ClassVar[str] = "vectors"
    """"vectors", "images", or "sequences" """

    def net(self, task: Task) -> Layer:
        """Build the net; options are called as in `fnn.models`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mlp(Model):
    """A multilayer perceptron: dense hidden layers, each followed by a norm, an activation and dropout."""

    depth: int = 3
    """number of hidden layers"""
    width: int = 256
    """units in each hidden layer"""
    activation: Activation = "relu"
    norm: Norm = "batch_norm"
    init: str = "he_normal"
    """initial weights: he_normal, glorot_uniform, "normal(0.01)", "scaled(1.5)", orthogonal, ..."""
    residual: bool = False
    """add each hidden layer's input to its output, from the second layer on"""
    dropout: float = 0.1
    """probability of dropping a unit"""

    def net(self, task: Task) -> Layer:
        return models.mlp(classes=task.outputs, taps=task.taps, **vars(self))


@dataclass(frozen=True)
class Convnet(Model):
    """A convolutional net: two stages of convolutions, the second at half the size with twice the channels."""

    reads: ClassVar[str] = "images"
    convs: int = 2
    """convolutions in each stage"""
    width: int = 32
    """channels of the first stage"""
    activation: Activation = "relu"
    norm: Norm = "batch_norm"
    init: str = "he_normal"
    """initial weights: he_normal, glorot_uniform, "normal(0.01)", "scaled(1.5)", delta_orthogonal, ..."""
    dropout: float = 0.3
    """probability of dropping a number before the output layer"""

    def net(self, task: Task) -> Layer:
        options = {name: value for name, value in vars(self).items() if name != "width"}
        return models.convnet([self.width, 2 * self.width], task.outputs, taps=task.taps, **options)


@dataclass(frozen=True)
class Resnet(Model):
    """A residual convolutional net: three stages of blocks, each with twice the channels at half the size."""

    reads: ClassVar[str] = "images"
    blocks: int = 2
    """residual blocks in each stage"""
    width: int = 16
    """channels of the first stage"""
    activation: Activation = "relu"
    norm: Annotated[str, told(f"{NORMS}; with none, each branch starts at zero (SkipInit)")] = "batch_norm"
    init: str = "he_normal"
    """initial weights: he_normal, glorot_uniform, "normal(0.01)", "scaled(1.5)", delta_orthogonal, ..."""

    def net(self, task: Task) -> Layer:
        options = {name: value for name, value in vars(self).items() if name != "blocks"}
        scaling = "skip_init" if self.norm == "none" else None
        return models.resnet([self.blocks] * 3, task.outputs, scaling=scaling, taps=task.taps, **options)


@dataclass(frozen=True)
class Rnn(Model):
    """A recurrent net; it reads images pixel by pixel."""

    reads: ClassVar[str] = "sequences"
    depth: int = 1
    """number of recurrent layers"""
    width: int = 128
    """units in each layer"""
    cell: str = "lstm"
    """rnn, gru, lstm"""
    forget_bias: float = 1.0
    """initial bias of the forget gate, for the lstm cell"""
    recurrent_init: str = "orthogonal"
    """initial recurrent weights; "scaled(1.0)" draws them from N(0, 1/width)"""
    dropout: float = 0.0
    """probability of dropping a unit"""

    def net(self, task: Task) -> Layer:
        tokens = {"vocabulary": task.outputs, "padding": synthetic.PAD, "every_step": True} if task.tokens else {}
        return models.rnn(outputs=task.outputs, taps=task.taps, **tokens, **vars(self))


@dataclass(frozen=True)
class Transformer(Model):
    """A transformer: a decoder for tokens; for classes and numbers an encoder, which reads images pixel by pixel."""

    reads: ClassVar[str] = "sequences"
    depth: int = 2
    """number of blocks"""
    width: int = 64
    """units at each position"""
    heads: int = 4
    """attention heads of each block; they must divide the width"""
    activation: Activation = "relu"
    norm: Annotated[str, told(NORMS)] = "layer_norm"
    norm_position: str = "pre"
    """pre: norm before attention and feed-forward net; post: after their sums"""
    encoder: int = 0
    """blocks of an encoder that reads the source (number_words only); 0: the decoder reads the source itself"""
    dropout: float = 0.0
    """probability of dropping a unit"""

    def net(self, task: Task) -> Layer:
        own = ("depth", "width", "encoder")
        block = models.Block(**{name: value for name, value in vars(self).items() if name not in own}, taps=task.taps)
        size, padding = (task.outputs, self.depth, self.width, block), synthetic.PAD
        if self.encoder:
            return models.translator(*size, encoder_depth=self.encoder, padding=padding)
        if task.tokens:
            return models.decoder(*size, padding=padding)
        return models.encoder(None, self.depth, self.width, block, outputs=task.outputs)


MODELS = {kind.__name__.lower(): kind for kind in (Mlp, Convnet, Resnet, Rnn, Transformer)}


M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Training(Generic[M]):
    """What `fnn train` and `fnn diagnose` both take."""

    model: M
    data: str = "digits"
    """digits, clusters, spirals, adding, number_words, a folder of IDX files (the format of MNIST), or a .npz file"""
    epochs: int = 30
    """passes over the training data"""
    batch_size: int = 64
    """examples in a training step"""
    learning_rate: float = 3e-3
    """Adam's highest learning rate; it falls to zero along a cosine"""
    clip: float = 1.0
    """clip the gradient to this global norm; 0: no clipping"""
    seed: int = 0
    """seed of the split, the weights and the shuffling; the same seed gives the same result"""


class Recipe(NamedTuple):
    """A net for a data set."""

    net: Layer
    loss: losses.Loss
    measure: str
    """What the loss's `correct` counts, in words; the loss's own name where it counts nothing."""


def load(name: str, model: Model, *, key: Any) -> Parts:
    """Load data by name or path; images as they are for convolutions, pixel by pixel for sequence models.

    For a transformer with an encoder, x of `data.number_words` is {"source": ..., "target": ...}: what it translates, and
    what follows.
    """
    encoder = getattr(model, "encoder", 0)
    check.non_negative("train", encoder=encoder)
    if encoder and name != "number_words":
        raise ValueError(f"train: an encoder needs the data number_words, got {name!r}; leave --encoder out")
    train, test = data.load(name, key=key, image=model.reads != "vectors")
    if model.reads == "sequences" and train.x.ndim == 4:
        return _pixels(train), _pixels(test)
    return (_two_sided(train), _two_sided(test)) if encoder else (train, test)


def recipe(model: Model, train: Dataset, test: Dataset | None = None, *, taps: bool = False) -> Recipe:
    """Choose the loss by the targets (labels, labels at every position, numbers), and build the model around it.

    The test part must hold no classes or tokens beyond those of the training part, for which the net has no outputs.
    """
    who, sequences = type(model).__name__.lower(), model.reads == "sequences"
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
        raise ValueError(f"train: {who} needs labelled classes, numbers, or token sequences, got {got}")
    ranks = {"images": (3, 4, 5), "sequences": (3,)}.get(model.reads)
    if ranks and not (sequences and tokens) and train.x.ndim not in ranks:
        rule = "sequences float[n, time, d]" if sequences else "images float[n, *positions, c]"
        raise ValueError(f"train: {who} needs {rule}, got {check.describe(train.x)}; choose other data")
    return Recipe(model.net(Task(outputs, loss is losses.sequence_cross_entropy, taps)), loss, measure)


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
