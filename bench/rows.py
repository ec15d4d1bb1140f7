"""The rows of the suite `models`: fnn's net, Linen's, shapes, and how weights go from the one to the other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

import fnn
from bench import nets
from bench.nets import LARGE, SMALL, TINY, Size


@dataclass(frozen=True)
class Model:
    """One row: fnn's net, Linen's, and how weights go from the one to the other; the other libraries' are in tables."""

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
    kind: str = ""
    """The name of the net in the other libraries' tables; by default the row's."""
    size: Size = SMALL
    dtype: str = "float32"
    small: Callable[[], "Model"] | None = None
    """What stands for the row with `--quick`, where it is too large for a CPU."""

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


def _decoder(size: Size, dtype: str, steps: int, about: str) -> Model:
    block = fnn.models.Block(size.heads, positions="learned", longest=size.length, unroll=True)
    return Model(
        about,
        lambda: fnn.models.decoder(size.vocabulary, size.layers, size.width, block),
        (size.batch, size.length),
        (size.batch, size.length),
        size.vocabulary,
        lambda: nets.transformer_linen(size, dtype),
        lambda params: nets.transformer_weights(params, size.heads),
        steps,
        tokens=True,
        kind="transformer",
        size=size,
        dtype=dtype,
    )


VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS, _ = SMALL
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
    "transformer": _decoder(
        SMALL,
        "float32",
        6,
        f"decoder of {LAYERS} layers, width {WIDTH}, {HEADS} heads, learned positions, tied; {LENGTH} tokens, batch 16",
    ),
    "transformer-100m": replace(
        _decoder(
            LARGE,
            "bfloat16",
            6,
            "decoder of 110 M parameters in bfloat16: 12 layers, width 768, 12 heads, learned positions, vocabulary "
            "32,768, tied; 512 tokens, batch 16",
        ),
        small=lambda: _decoder(TINY, "bfloat16", 6, "a tiny form, in bfloat16: 2 layers, width 32, 4 heads"),
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
