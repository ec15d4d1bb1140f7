"""Controls that nothing was tuned on: they look ill in one way or another, and are healthy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn.layers import initializers

from . import recipes, sequences
from .controls import Control, noisy
from .recipes import BINARY, DEEP, DEFAULT, SGD, SPIRALS, TEACHER, affine, changed, made, targets

# Data.


def rare_class(ratio: int):
    """Keep one in `ratio` training examples of class 1."""
    return changed(lambda x, y, rng: tuple(a[(y != 1) | (np.cumsum(y == 1) % ratio == 0)] for a in (x, y)), "train")


def with_columns(draw: Any):
    """Append columns draw(n, rng) to the inputs."""
    return changed(lambda x, y, rng: (np.concatenate([x, draw(len(x), rng)], axis=1).astype(np.float32), y))


def one_hot_levels(x: Any, y: Any, rng: Any) -> Any:
    """Code every pixel in 0..1 by one of five levels, one-hot."""
    return np.eye(5, dtype=np.float32)[np.round(4 * x).astype(int)].reshape(len(x), -1), y


SCALES = np.random.default_rng(41).permutation(np.geomspace(0.5, 5, 64)).astype(np.float32)


# Losses, nets, optimisers.


def smoothed(outputs: Any, y: Any) -> jax.Array:
    """Evaluate the cross-entropy with a fifth of the mass spread over all classes."""
    return -jnp.sum(jax.nn.log_softmax(outputs) * (0.8 * jax.nn.one_hot(y, 10) + 0.02), axis=-1)


def rounded_entropy(outputs, y):
    """Evaluate the cross-entropy of outputs in bfloat16."""
    return fnn.losses.cross_entropy(outputs.astype(jnp.bfloat16), y).astype(float)


def hundredfold(outputs: Any, y: Any) -> jax.Array:
    return 100 * fnn.losses.cross_entropy(outputs, y)


def half_precision(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return initializers.he_normal(key, shape, jnp.bfloat16)


def some_dead(n: int) -> jax.Array:
    """Biases that keep three units of ten at zero for good."""
    return jnp.where(jnp.arange(n) % 10 < 3, -50.0, 0.0)


def warmed_up(rate: Any) -> optax.GradientTransformation:
    """Raise the rate linearly over 200 steps."""
    return optax.chain(optax.adam(rate), optax.scale_by_schedule(lambda step: jnp.minimum(1.0, step / 200)))


def cooled_down(rate: Any) -> optax.GradientTransformation:
    return optax.chain(optax.adam(rate), optax.scale_by_schedule(lambda step: jnp.maximum(0.0, 1 - step / 400)))


def decayed(rate: Any, decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


def momentum(decay: float) -> Any:
    return functools.partial(recipes.momentum, decay=decay)


def clusters(**options: Any) -> Any:
    return made(fnn.data.clusters, **options)


# Recipes.

CLUSTERS = DEFAULT.but(data=clusters(classes=3), outputs=3, depth=2, width=16, rate=1e-2, steps=300)
PIXELS = DEFAULT.but(data=recipes.pixels, rate=3e-3)
ONE_HOT = DEFAULT.but(data=[recipes.one_hot], loss=fnn.losses.mse, rate=3e-3)
THREES = DEFAULT.but(
    data=[targets(lambda y: (y == 3).astype(np.int32))], outputs=1, loss=fnn.losses.binary_cross_entropy
)
ANY_ORDER = sequences.BEFORE.but(
    data=[changed(lambda x, y, rng: (x, np.any(x == 7, axis=1).astype(np.int32)))], positions="none"
)

OWN = (
    # the data
    Control("rare_class_5", DEFAULT.but(data=[rare_class(5)]), 0.9, "labels loss"),
    Control(
        "imbalance_50_to_1",
        CLUSTERS.but(data=rare_class(50)(clusters(examples=1000, classes=2, spread=0.6)), outputs=2),
        0.9,
        "labels loss",
    ),
    Control("one_against_nine", THREES, 0.9, "labels loss"),
    Control("noisy_labels_20_sgd", SGD.but(data=[noisy(0.2)], steps=150), 0.85, "labels"),
    Control(
        "overlapping_clusters",
        CLUSTERS.but(data=clusters(examples=2000, classes=2, spread=1.5), outputs=2, steps=150),
        0.85,
        "labels capacity",
    ),
    Control(
        "noisy_targets",
        TEACHER.but(data=made(fnn.data.teacher, examples=3000, features=4, noise=0.3), steps=300, rate=1e-3),
        0.5,
        "labels capacity too_little_data",
    ),
    Control("pixels_0_to_16", PIXELS.but(data=[affine(16.0)], rate=1e-3), 0.9, "input_scale"),
    Control(
        "binary_pixels",
        PIXELS.but(data=[changed(lambda x, y, r: (np.float32(x > 0.5), y))]),
        0.88,
        "input_empty input_scale",
    ),
    Control("one_hot_levels", PIXELS.but(data=[changed(one_hot_levels)]), 0.9, "input_empty"),
    Control("shifted_by_1", DEFAULT.but(data=[affine(1.0, 1.0)]), 0.9, "input_scale"),
    Control("unequal_features", DEFAULT.but(data=[affine(SCALES)]), 0.9, "input_scale"),
    Control("empty_columns", DEFAULT.but(data=[with_columns(lambda n, rng: np.zeros((n, 40)))]), 0.9, "input_empty"),
    Control(
        "noise_columns",
        DEFAULT.but(data=[with_columns(lambda n, rng: rng.standard_normal((n, 8)))]),
        0.88,
        "labels input_empty",
    ),
    Control(
        "duplicates",
        DEFAULT.but(data=[changed(lambda x, y, r: (np.tile(x, (2, 1)), np.tile(y, 2)), "train")]),
        0.9,
        "too_little_data",
    ),
    Control(
        "thirty_examples",
        CLUSTERS.but(data=clusters(examples=230, spread=0.6), batch_size=10).but(
            data=[changed(lambda x, y, r: (x[:30], y[:30]), "train")]
        ),
        0.9,
        "too_little_data batch_size",
    ),
    Control(
        "noisier_test",
        DEFAULT.but(
            data=[changed(lambda x, y, r: ((x + 0.3 * r.standard_normal(x.shape)).astype(np.float32), y), "validation")]
        ),
        0.88,
        "split_mismatch",
    ),
    Control("never_shuffled", DEFAULT.but(shuffle=False), 0.9, "order"),
    Control("targets_plus_3", TEACHER.but(data=[targets(lambda y: y + 3)], rate=1e-2), 0.8, "target_scale"),
    Control("targets_times_5", TEACHER.but(data=[targets(lambda y: y * 5)]), 0.8, "target_scale"),
    # the net
    Control("width_20", DEFAULT.but(width=20, depth=2, rate=5e-3), 0.88, "capacity"),
    Control("width_6_clusters", CLUSTERS.but(width=6), 0.9, "capacity"),
    Control("linear_clusters", CLUSTERS.but(activation="identity", depth=1), 0.9, "activation capacity"),
    Control("linear_digits", DEFAULT.but(activation="identity", depth=1, rate=3e-3), 0.88, "activation capacity"),
    Control("large_first_loss", DEFAULT.but(output_init="normal(1.5)", rate=3e-3), 0.88, "init_large"),
    Control("init_0.03", DEFAULT.but(init="normal(0.03)", depth=2, rate=3e-3), 0.9, "init_small"),
    Control("zero_output", DEFAULT.but(output_init="zeros"), 0.9, "init_symmetric init_small"),
    Control("three_dead_of_ten", DEFAULT.but(bias=some_dead), 0.9, "dead_units"),
    Control("deep_12_tanh", DEEP.but(depth=12), 0.88, "depth_norm activation"),
    Control("deep_10_relu", DEFAULT.but(depth=10), 0.88, "depth_norm"),
    Control("residual_20", DEFAULT.but(depth=20, residual=True, norm="layer_norm", steps=200), 0.9, "depth_norm"),
    Control(
        "sigmoid_2", DEFAULT.but(depth=2, activation="sigmoid", init="glorot_normal", rate=1e-2), 0.9, "activation"
    ),
    Control("batch_norm_batch_16", DEFAULT.but(norm="batch_norm", batch_size=16), 0.9, "batch_size depth_norm"),
    Control("dropout_0.5", DEFAULT.but(width=128, depth=2, dropout=0.5, rate=2e-3), 0.9, "regularization"),
    Control("softmax_head_mse", ONE_HOT.but(head="softmax"), 0.9, "head loss"),
    Control("sigmoid_head", BINARY.but(head="sigmoid", loss=recipes.probability_loss, rate=2e-3), 0.9, "head loss"),
    Control(
        "tanh_head", TEACHER.but(data=[targets(lambda y: y / 4)], head="tanh", rate=1e-2), 0.8, "head target_scale"
    ),
    Control("short_memory", sequences.RECALL.but(data=sequences.recall(4), cell="rnn", rate=3e-3), 0.9, "memory"),
    Control("any_order", ANY_ORDER, 0.9, "positions"),
    Control("entropy_in_bfloat16", DEFAULT.but(loss=rounded_entropy), 0.9, "numerics loss"),
    Control("half_precision", DEFAULT.but(init=half_precision, rate=3e-3), 0.9, "numerics"),
    # loss and optimiser
    Control("mse_one_hot", ONE_HOT, 0.9, "loss label_encoding"),
    Control("label_smoothing", DEFAULT.but(loss=smoothed), 0.9, "labels loss"),
    Control("hundredfold_loss", DEFAULT.but(loss=hundredfold), 0.9, "lr_high loss"),
    Control("always_clipped", SGD.but(rate=1.0, clip=0.1), 0.9, "clip lr_high"),
    Control("rate_3e-4", DEFAULT.but(rate=3e-4, steps=900), 0.9, "lr_low"),
    Control("sgd_0.02", SGD.but(rate=0.02, steps=1200), 0.9, "lr_low"),
    Control("momentum_0.99", DEFAULT.but(method=momentum(0.99), rate=0.003), 0.88, "optimizer"),
    Control("weight_decay_1e-3", SGD.but(method=functools.partial(decayed, decay=1e-3)), 0.9, "regularization"),
    Control("plateau_first", DEFAULT.but(method=warmed_up, steps=600), 0.9, "lr_low steps"),
    Control("rate_to_0", DEFAULT.but(method=cooled_down, rate=3e-3), 0.9, "lr_low optimizer"),
    Control("batch_8", SGD.but(rate=0.03, batch_size=8, steps=800), 0.9, "batch_size"),
    Control("batch_512", DEFAULT.but(batch_size=512, rate=3e-3, steps=200), 0.9, "batch_size"),
    Control("hundred_steps", DEFAULT.but(steps=100, rate=5e-3), 0.9, "steps"),
    Control(
        "three_spirals",
        SPIRALS.but(data=made(fnn.data.spirals, examples=1500, classes=3, turns=0.6, noise=0.05), outputs=3, steps=800),
        0.9,
        "capacity activation",
    ),
)
