"""The work that every peer does: one net, one set of starting weights, one sequence of batches.

Net: `depth` hidden layers, each dense(width), batch norm, ReLU, of which the first takes 64 features; dense(10). Mean
cross entropy, global-norm clipping at 1, Adam at 1e-3, running statistics with decay 0.9. A row computes in float32 or
in bfloat16; parameters, gradients, Adam and the statistics of batch norm are float32 in both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

FEATURES, CLASSES = 64, 10
MAX_NORM, RATE, DECAY, EPS = 1.0, 1e-3, 0.9, 1e-5
PLAIN_LAYERS, OPEN_BIAS = 4, 4.0
UNROLLED = 64
"""Up to this depth fnn's trunk is unrolled, as one would who trains for long: 10 % faster at 128x64, 3 s to compile."""


ORTHOGONAL = 2048
"""From this width on, kernels start from he_normal: the orthogonal ones of 4096x8 take longer than the row's steps."""


class Row(NamedTuple):
    """One line of the table; prints as `256x8`, or `256x8/bf16`."""

    width: int
    depth: int
    batch: int
    dtype: str = "float32"
    """In which the net computes."""

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}" + ("/bf16" if self.dtype == "bfloat16" else "")


ROWS = {
    str(row): row
    for row in (
        Row(64, 3, 32),
        Row(256, 8, 128),
        Row(128, 64, 128),
        Row(64, 256, 64),
        Row(64, 1000, 64),
        Row(1024, 4, 512),
        Row(4096, 8, 8192, "bfloat16"),
    )
}


class Weights(NamedTuple):
    """Starting weights as NumPy arrays, in no library's layout."""

    hidden: list[dict[str, np.ndarray]]
    """For each of the `depth` hidden layers: kernel (in, out), bias, and batch norm's scale and shift."""
    output: dict[str, np.ndarray]
    """kernel and bias."""


@dataclass(frozen=True)
class Problem:
    """A row with its data: `xs: float[steps, batch, 64]`, `ys: int[steps, batch]`, on the device."""

    row: Row
    steps: int
    weights: Weights
    xs: jax.Array
    ys: jax.Array
    key: jax.Array
    """Of the starting weights."""

    @property
    def batches(self) -> list[tuple[jax.Array, jax.Array]]:
        """The same data cut into batches, so that a Python loop pays for no slicing."""
        return list(zip(self.xs, self.ys, strict=True))


def make(row: Row, steps: int, *, key: Any = None, unroll: int | bool | None = None) -> Problem:
    """Draw random data on the device and copy the starting weights out of fnn's parameters."""
    key = jax.random.key(0) if key is None else key
    x_key, y_key = jax.random.split(jax.random.key(1))
    xs = jax.random.normal(x_key, (steps, row.batch, FEATURES))
    ys = jax.random.randint(y_key, (steps, row.batch), 0, CLASSES)
    return Problem(row, steps, _weights(fnn_start(row, key=key, unroll=unroll)[2].params, row.depth), xs, ys, key)


def fnn_start(
    row: Row, *, key: Any = None, unroll: int | bool | None = None, checkpoint: int | None = None
) -> tuple[fnn.Layer, optax.GradientTransformation, fnn.TrainState]:
    """Build fnn's net, optimiser and state as a user would, and set the starting weights.

    Kernels are orthogonal (up to a width of 2,048), and from the fifth hidden layer on batch norm's bias is 4, where almost all ReLUs are open.
    With he_normal and a bias of 0 everywhere batch norm multiplies gradients by 1.2 per layer (Yang et al. 2019): 1e22 at
    depth 256, NaN at 1,000, where there is nothing to compare; and rounding errors grow at the same rate, so that no two
    programs agree from depth 64 on. The first layers keep their bias of 0, so that a wrong ReLU shows in the loss.
    """
    net = fnn.models.mlp(
        depth=row.depth,
        width=row.width,
        classes=CLASSES,
        activation="relu",
        norm="batch_norm",
        init="orthogonal" if row.width < ORTHOGONAL else "he_normal",
        unroll=row.depth <= UNROLLED or 1 if unroll is None else unroll,
        checkpoint=checkpoint,
    )
    optimizer = fnn.optimizers.packed(optax.chain(fnn.clip.by_global_norm(MAX_NORM), optax.adam(RATE)))
    return net, optimizer, _drawn(row, unroll, checkpoint, net, optimizer)(jax.random.key(0) if key is None else key)


_starts: dict[Any, Callable[[Any], fnn.TrainState]] = {}


def _drawn(row: Row, unroll: Any, checkpoint: Any, net: Any, optimizer: Any) -> Callable[[Any], fnn.TrainState]:
    """Compile the drawing of a row's state, once for all seeds: an accelerator takes a second for it, call by call."""

    def draw(key):
        spec = jax.ShapeDtypeStruct((row.batch, FEATURES), jnp.float32)
        state = fnn.TrainState.create(net, optimizer, key, spec)
        return state.replace(params=_open_relus(state.params))

    return _starts.setdefault((row, unroll, checkpoint), jax.jit(draw))


def stack(blocks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack the weights of blocks on a leading depth axis."""
    return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}


def on_device(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Copy to the device. A real copy: a donated buffer must not be NumPy's own memory."""
    return jax.tree.map(lambda a: jnp.array(a, dtype, copy=True), tree)


def rename(block: dict[str, Any], names: dict[str, str], change: Callable[[Any], Any] = lambda a: a) -> dict[str, Any]:
    """Take some weights of a block under a library's own names: `{theirs: ours}`."""
    return {theirs: change(block[ours]) for theirs, ours in names.items()}


def _open_relus(params: Any) -> Any:
    """Set batch norm's bias in all but the first hidden layers, be they stacked or a tuple."""
    *before, trunk, output = params
    plain, blocks = PLAIN_LAYERS - 1, trunk["trunk"]
    if isinstance(blocks, fnn.tree.Stacked):
        dense, norm, relu = blocks.blocks
        norm = {**norm, "bias": norm["bias"].at[plain:].set(OPEN_BIAS)}
        blocks = fnn.tree.Stacked((dense, norm, relu))
    else:
        opened = [(d, {**n, "bias": jnp.full_like(n["bias"], OPEN_BIAS)}, r) for d, n, r in blocks[plain:]]
        blocks = (*blocks[:plain], *opened)
    return (*before, {"trunk": blocks}, output)


def _weights(params: Any, depth: int) -> Weights:
    _flatten, dense, norm, _relu, trunk, output = jax.device_get(params)
    blocks = [trunk["trunk"][i] for i in range(depth - 1)]  # a tuple of blocks, or `Stacked`; both count by depth
    hidden = [
        {"kernel": d["kernel"], "bias": d["bias"], "scale": n["scale"], "shift": n["bias"]}
        for d, n in [(dense, norm), *[block[:2] for block in blocks]]
    ]
    return Weights(hidden, output)
