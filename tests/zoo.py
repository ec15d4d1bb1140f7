"""The zoo: every layer is one line here, and gets every law of `test_laws.py`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fnn


class Case(NamedTuple):
    name: str
    layer: fnn.Layer
    shape: tuple[int, ...] = (6, 8)
    noisy: bool = False
    """Draws random numbers in train mode."""
    keeps_shape: bool = True
    """Can stand in `repeat`."""
    mixes: bool = False
    """Examples of a batch depend on one another in train mode."""


def _block() -> fnn.Layer:
    return fnn.serial(fnn.dense(8), fnn.batch_norm(), fnn.activation("tanh"), fnn.tap(bounds=(-1, 1)))


CASES = [
    Case("dense", fnn.dense(8, bias_init="normal(0.3)")),
    Case("dense_wider", fnn.dense(5), keeps_shape=False),
    Case("dense_without_bias", fnn.dense(8, bias=False)),
    Case("dense_on_sequences", fnn.dense(8, kernel_init="orthogonal"), (4, 3, 8)),
    *(
        Case(f"activation_{name}", fnn.activation(name))
        for name in fnn.activations.TABLE
        if name not in ("identity", "gelu_tanh", "leaky_relu")
    ),
    Case("activation_with_option", fnn.activation("leaky_relu", slope=0.3)),
    Case("activation_of_function", fnn.activation(lambda x: jnp.sin(x))),
    Case("flatten", fnn.flatten(), (4, 2, 3), keeps_shape=False),
    Case("dropout", fnn.dropout(0.4), noisy=True),
    Case("batch_norm", fnn.batch_norm(), mixes=True),
    Case("batch_norm_plain", fnn.batch_norm(scale=False, bias=False, decay=0.5), (5, 3, 8), mixes=True),
    Case("layer_norm", fnn.layer_norm()),
    Case("rms_norm", fnn.rms_norm()),
    Case("group_norm", fnn.group_norm(2), (4, 3, 8)),
    Case("tap", fnn.tap()),
    Case("tap_with_bounds", fnn.tap(bounds=(-1.0, 1.0))),
    Case("serial", fnn.serial(fnn.dense(4), fnn.activation("tanh"), fnn.dense(8))),
    Case("serial_empty", fnn.serial()),
    Case("parallel", fnn.parallel(fnn.dense(3), fnn.serial(fnn.dense(2), fnn.tap())), keeps_shape=False),
    Case("residual", fnn.residual(fnn.serial(fnn.layer_norm(), fnn.dense(8), fnn.tap()), scale=0.5)),
    Case("named", fnn.named("inner", fnn.dense(8))),
    Case("repeat", fnn.repeat(_block(), 3), mixes=True),
    Case("repeat_in_groups", fnn.repeat(_block(), 5, checkpoint=2), mixes=True),
    Case("repeat_unrolled", fnn.repeat(_block(), 3, unroll=True, checkpoint=2), mixes=True),
    Case("repeat_of_repeat", fnn.repeat(fnn.serial(fnn.repeat(_block(), 2), fnn.activation("erf")), 3), mixes=True),
    Case("block_with_dropout", fnn.serial(fnn.dense(8), fnn.dropout(0.3), fnn.activation("relu")), noisy=True),
    Case(
        "mlp", fnn.models.mlp(2, 8, 3, activation="silu", norm="batch_norm", taps=True), keeps_shape=False, mixes=True
    ),
    Case(
        "mlp_residual_scanned",
        fnn.models.mlp(3, 8, 3, norm="layer_norm", activation="tanh", residual=True, taps=True, unroll=2),
        keeps_shape=False,
    ),
]


def sample(case: Case, key: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Draw an input without zeros, where kinks lie."""
    x = jax.random.normal(key, case.shape, dtype)
    return x + jnp.sign(x).astype(dtype) * 0.05
