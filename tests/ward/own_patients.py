"""Patients that nothing was tuned on: they were written, and kept, before the first diagnosis was run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn.layers import initializers

from . import recipes, sequences
from .controls import noisy
from .patients import DEEP_8, MOMENTUM, ONE_HOT, Patient, by_class, patient, permuted, useless_feature
from .recipes import BINARY, DEEP, DEFAULT, SGD, SPIRALS, TEACHER, Recipe, affine, changed, targets

# Data.


def first(n: int):
    """Keep the first n training examples."""
    return changed(lambda x, y, rng: (x[:n], y[:n]), "train")


def first_of_each_class(n: int):
    def keep(x, y, rng):
        rows = np.concatenate([np.nonzero(y == c)[0][:n] for c in np.unique(y)])
        return x[rows], y[rows]

    return changed(keep, "train")


@functools.cache
def crossed(seed: int) -> Any:
    """Four clusters at the corners of a square, with the class of the corner across: no line separates them."""
    rng = np.random.default_rng([seed, 37])
    corner = rng.integers(0, 2, (1500, 2))
    x = (2.0 * corner - 1 + 0.3 * rng.standard_normal((1500, 2))).astype(np.float32)
    x, y = jnp.asarray(x), jnp.asarray((corner[:, 0] ^ corner[:, 1]).astype(np.int32))
    return (x[300:], y[300:]), (x[:300], y[:300])


# Losses.


def one_logit(outputs: Any, y: Any) -> jax.Array:
    """Evaluate log(1 + e^z) - y z, which is the cross-entropy for y in 0..1 and has no lower bound beyond."""
    z = outputs.reshape(-1)
    return jax.nn.softplus(z) - y * z


def cold(outputs: Any, y: Any) -> jax.Array:
    """Evaluate the cross-entropy at temperature 0.02."""
    return fnn.losses.cross_entropy(outputs / 0.02, y)


def cold_by_hand(outputs: Any, y: Any) -> jax.Array:
    """Evaluate the same with exponentials that overflow."""
    logits = outputs / 0.02
    return jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def entropy_by_hand(outputs: Any, y: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Evaluate log sum exp(z) - z_y of outputs that may reach 20; float16 ends at e^11."""
    z = 2 * outputs.astype(dtype)
    return (jnp.log(jnp.sum(jnp.exp(z), axis=-1)) - jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]).astype(float)


def in_kelvin(outputs: Any, y: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Evaluate (2000 + output - (2000 + y))² of numbers that bfloat16 rounds to multiples of 16."""
    given, wanted = ((2000 + a.reshape(-1)).astype(dtype) for a in (outputs, y))
    return jnp.square(given - wanted).astype(float)


def with_entropy(outputs: Any, y: Any, by_hand: bool = False) -> jax.Array:
    """Add 0.01 sum p log p over the classes and one that is masked, whose probability is 0."""
    masked = jnp.concatenate([outputs, jnp.full((len(outputs), 1), -jnp.inf)], axis=-1)
    p = jax.nn.softmax(masked, axis=-1)
    terms = jnp.where(p > 0, p * jnp.log(p), 0) if by_hand else jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0)
    return fnn.losses.cross_entropy(outputs, y) + 0.01 * jnp.sum(terms, axis=-1)


def rounded_mse(outputs: Any, y: Any) -> jax.Array:
    return fnn.losses.mse(jnp.round(outputs, 1), y)


def seven_classes(outputs: Any, y: Any) -> jax.Array:
    """Evaluate the cross-entropy with weight 0 for classes 7, 8 and 9."""
    return fnn.losses.cross_entropy(outputs, y) * (y < 7)


# Activations, initialisers, optimisers.


def stopped_relu(x: Any) -> jax.Array:
    return jax.lax.stop_gradient(jax.nn.relu(x))


def steps_of_half(x: Any) -> jax.Array:
    return jnp.round(2 * jnp.tanh(x)) / 2


def squared(x: Any) -> jax.Array:
    return x * x


def half_precision(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return initializers.he_normal(key, shape, jnp.bfloat16)


def decayed(rate: Any, decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


def eps_1(rate: Any) -> optax.GradientTransformation:
    return optax.adam(rate, eps=1.0)


def fading(rate: Any) -> optax.GradientTransformation:
    """Multiply the rate by 0.8 after every step."""
    return optax.chain(optax.sgd(rate), optax.scale_by_schedule(lambda step: 0.8**step))


# Recipes.

STEADY = MOMENTUM.but(rate=0.03)
BATCH_16 = STEADY.but(batch_size=16)
NARROW = DEFAULT.but(width=12, steps=800)
PIXELS = DEFAULT.but(data=recipes.pixels, rate=3e-3)
RESIDUAL = DEFAULT.but(depth=20, residual=True, init="scaled(0.3)", method=optax.sgd, rate=0.03)
NORMED_6 = DEFAULT.but(depth=6, norm="batch_norm")
NORMED_40 = DEFAULT.but(depth=40, residual=True, norm="layer_norm", steps=300)
CROSSED = DEFAULT.but(data=crossed, outputs=2, depth=2, width=16, activation="tanh", init="scaled(1.5)", rate=1e-2)
COLD = DEFAULT.but(loss=cold, rate=3e-3)
SLOW = DEFAULT.but(method=optax.sgd, rate=0.003, steps=1500)
ONE_LOGIT = BINARY.but(loss=one_logit)
TANH = DEFAULT.but(activation="tanh", init="scaled(1.0)", method=recipes.momentum, rate=0.03)
TEACHER_SMALL = TEACHER.but(batch_size=8)
LONG_RECALL = sequences.RECALL.but(data=sequences.recall(40), forget_bias=4.0)

PATIENTS = (
    # the data
    patient("inputs_zero", "input_empty", SGD, 0.85, data=[affine(0.0)]),
    patient("inputs_noise", "input_empty labels", DEFAULT, 0.85, data=[changed(lambda x, y, r: (r.permutation(x), y))]),
    patient("inputs_1e-4", "input_scale", SGD, 0.85, data=[affine(1e-4)]),
    patient("inputs_plus_100", "input_scale", SGD, 0.85, data=[affine(1.0, 100.0)]),
    patient("useless_3e3", "input_scale", CROSSED, 0.9, data=[useless_feature(3e3)]),
    patient("targets_1e-4", "target_scale", TEACHER, 0.7, data=[targets(lambda y: y * 1e-4)]),
    patient("targets_plus_1000", "target_scale", TEACHER, 0.7, data=[targets(lambda y: y + 1000)]),
    patient("labels_rolled", "labels", SGD, 0.85, data=[targets(lambda y: np.roll(y, 1), "train")]),
    patient("labels_95_percent_noise", "labels", DEFAULT, 0.85, data=[noisy(0.95)]),
    patient("labels_1_and_2", "label_encoding labels loss", ONE_LOGIT, 0.85, data=[targets(lambda y: y + 1)]),
    patient(
        "labels_from_1_in_training",
        "label_encoding labels split_mismatch",
        DEFAULT.but(outputs=11),
        0.85,
        data=[targets(lambda y: y + 1, "train")],
    ),
    patient("test_inverted", "split_mismatch", PIXELS, 0.85, data=[affine(-1.0, 1.0, "validation")]),
    patient(
        "test_columns_reversed",
        "split_mismatch",
        PIXELS,
        0.85,
        data=[changed(lambda x, y, rng: (x[:, ::-1], y), "validation")],
    ),
    patient("digits_20", "too_little_data", DEFAULT.but(batch_size=16), 0.85, data=[first_of_each_class(2)]),
    patient("teacher_12", "too_little_data", TEACHER_SMALL, 0.7, data=[first(12)]),
    patient("sorted_batch_16", "order", BATCH_16, 0.85, data=[changed(by_class, "train")], shuffle=False),
    # the net
    patient(
        "init_0.001_relu_6", "init_small", SGD.but(depth=6), 0.85, init="normal(0.001)", output_init="normal(0.001)"
    ),
    patient("init_2_residual_20", "init_large", RESIDUAL, 0.85, init="scaled(2.0)"),
    patient("init_constant", "init_symmetric", SGD, 0.85, init="constant(0.05)", output_init="constant(0.05)"),
    patient("bias_20_tanh", "dead_units init_large activation", TANH, 0.85, bias=20.0),
    patient("bias_minus_8", "dead_units", SGD, 0.85, bias=-8.0),
    patient("width_1", "capacity", DEFAULT, 0.85, width=1),
    patient("width_1_spirals", "capacity", SPIRALS, 0.9, width=1),
    patient("linear_crossed", "activation", CROSSED, 0.9, activation="identity"),
    patient("sigmoid_12", "activation init_small", DEEP_8.but(depth=12), 0.8, activation="sigmoid"),
    patient("squared_6", "activation", DEEP.but(depth=6), 0.8, activation=squared),
    patient("sigmoid_head_regression", "head", TEACHER, 0.7, head="sigmoid"),
    patient("softmax_twice", "head loss", SGD.but(rate=0.03), 0.85, head="softmax"),
    patient("layer_norm_40", "depth_norm init_large", NORMED_40, 0.85, budget=180.0, norm=None),
    patient("stopped_relu", "blocked_gradient activation", NARROW, 0.85, activation=stopped_relu),
    patient(
        "steps_of_half", "blocked_gradient activation", NARROW.but(activation="tanh"), 0.85, activation=steps_of_half
    ),
    patient("stopped_head", "blocked_gradient head", SGD, 0.85, head=jax.lax.stop_gradient),
    patient("rnn_forgets", "memory activation", LONG_RECALL, 0.8, 120.0, cell="rnn"),
    patient("forget_bias_minus_5", "memory", sequences.RECALL, 0.8, 120.0, forget_bias=-5.0),
    patient("encoder_without_positions", "positions", sequences.BEFORE, 0.85, 120.0, positions="none"),
    patient("bag_without_positions", "positions", sequences.BAG, 0.85, 120.0, positions=False),
    # loss and optimiser
    patient("rounded_mse", "blocked_gradient loss", TEACHER, 0.7, loss=rounded_mse),
    patient("seven_classes", "loss labels", DEFAULT, 0.85, loss=seven_classes),
    patient("mae_one_hot_spread", "loss", ONE_HOT.but(depth=5), 0.8, loss=recipes.mae),
    patient("exp_overflows", "numerics loss", COLD, 0.8, loss=cold_by_hand),
    patient(
        "log_of_0",
        "numerics loss",
        DEFAULT.but(loss=with_entropy),
        0.85,
        loss=functools.partial(with_entropy, by_hand=True),
    ),
    patient(
        "entropy_in_float16",
        "numerics loss",
        DEFAULT.but(loss=entropy_by_hand),
        0.85,
        loss=functools.partial(entropy_by_hand, dtype=jnp.float16),
    ),
    patient(
        "kelvin_in_bfloat16",
        "numerics loss",
        TEACHER.but(loss=in_kelvin),
        0.7,
        loss=functools.partial(in_kelvin, dtype=jnp.bfloat16),
    ),
    patient("updates_lost", "numerics", SLOW, 0.85, init=half_precision),
    patient("adam_rate_1", "lr_high", DEFAULT, 0.85, rate=1.0),
    patient("spirals_rate_3", "lr_high", SPIRALS, 0.9, rate=3.0),
    patient("adam_rate_1e-6", "lr_low steps", DEFAULT, 0.85, rate=1e-6),
    patient("clip_1e-5_momentum", "clip lr_low", STEADY.but(clip=1.0), 0.85, clip=1e-5),
    patient(
        "momentum_0.999", "optimizer lr_high", STEADY, 0.85, method=functools.partial(recipes.momentum, decay=0.999)
    ),
    patient("adam_eps_1", "optimizer lr_low", DEFAULT, 0.85, method=eps_1),
    patient("fading_rate", "optimizer lr_low steps", SGD, 0.85, method=fading),
    patient("weight_decay_1", "regularization optimizer", SGD, 0.85, method=functools.partial(decayed, decay=1.0)),
    patient("dropout_0.93_narrow", "regularization capacity", DEFAULT.but(width=32), 0.85, dropout=0.93),
    patient("batch_norm_batch_2", "batch_size depth_norm", NORMED_6, 0.85, batch_size=2),
    patient("momentum_batch_1", "batch_size lr_high", STEADY, 0.85, batch_size=1),
    patient("steps_8", "steps lr_low", SGD, 0.85, steps=8),
    patient("deep_20_steps", "steps lr_low", DEEP, 0.8, steps=20),
)


def two(name: str, causes: tuple[str, str], well: Recipe, bar: float, one: Any, other: Any) -> Patient:
    """Make a patient with two faults, each of which is enough to keep it below the bar."""
    named = [set_of.split() for set_of in causes]
    both = well.but(**{k: v for k, v in {**one, **other}.items() if k != "data"})
    both = both.but(data=[*one.get("data", []), *other.get("data", [])])
    sets = frozenset(named[0]), frozenset(named[1])
    return Patient(name, sets, (named[0][0], named[1][0]), both, well, bar, 90.0, (well.but(**one), well.but(**other)))


TWO_FAULTS = (
    two(
        "labels_and_rate", ("labels", "lr_low steps"), SGD, 0.85, {"data": [changed(permuted, "train")]}, {"rate": 1e-5}
    ),
    two("dropout_and_rate", ("regularization", "lr_low steps"), DEFAULT, 0.85, {"dropout": 0.97}, {"rate": 1e-6}),
    two(
        "dead_and_sorted",
        ("dead_units", "order"),
        BATCH_16,
        0.85,
        {"bias": -20.0},
        {"data": [changed(by_class, "train")], "shuffle": False},
    ),
    two(
        "linear_and_useless_feature",
        ("activation", "input_scale"),
        SPIRALS,
        0.9,
        {"activation": "identity"},
        {"data": [useless_feature(1e4)]},
    ),
    two(
        "sigmoid_head_and_targets",
        ("head", "target_scale"),
        TEACHER,
        0.7,
        {"head": "sigmoid"},
        {"data": [targets(lambda y: y + 1000)]},
    ),
    two(
        "zeros_and_clip",
        ("init_symmetric dead_units", "clip lr_low"),
        SGD.but(clip=1.0),
        0.85,
        {"init": "zeros", "output_init": "zeros"},
        {"clip": 1e-4},
    ),
    two("narrow_and_tiny_inputs", ("capacity", "input_scale"), SGD, 0.85, {"width": 1}, {"data": [affine(1e-4)]}),
    two(
        "inverted_test_and_labels",
        ("split_mismatch", "labels"),
        PIXELS,
        0.85,
        {"data": [affine(-1.0, 1.0, "validation")]},
        {"data": [changed(permuted, "train")]},
    ),
    two(
        "sigmoid_and_clip",
        ("activation init_small", "clip lr_low"),
        DEEP_8,
        0.8,
        {"activation": "sigmoid"},
        {"clip": 1e-5},
    ),
)

OWN = (*PATIENTS, *TWO_FAULTS)
