"""The zoo: every layer is one line here, and gets every law of `test_laws.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    make: Callable[[np.ndarray], Any] = lambda x: x
    """Turns numbers of that shape into the layer's input: a masked sequence, token ids, several inputs."""
    model: bool = False
    """Is a whole net of layers that are lines here themselves: the laws that compile most need `--slow`."""


def masked(x: np.ndarray) -> fnn.Masked:
    """Mask a sequence: lengths from 1 to all, and a hole in the second example."""
    batch, time = x.shape[:2]
    lengths = 1 + np.arange(batch) * (time - 1) // (batch - 1)
    mask = np.arange(time) < lengths[::-1, None]
    mask[1, 0] = False
    return fnn.Masked(x, mask)


def tokens(x: np.ndarray) -> np.ndarray:
    """Turn numbers into token numbers from 0 to 6."""
    return np.clip(np.round(3 + 2 * x), 0, 6).astype(np.int32)


def masked_tokens(x: np.ndarray) -> fnn.Masked:
    """Mask token numbers, so that the mask and `padding=0` both say what is real."""
    return masked(tokens(x))


def pair(x: np.ndarray) -> dict[str, Any]:
    """Make a source and a target of other length and width, both masked, the last example's source without a real one."""
    source = masked(x[:, 1:, 2:])
    source.mask[-1] = False
    return {"source": source, "target": masked(x[::-1])}


def with_mask(x: np.ndarray) -> dict[str, Any]:
    """Make a masked sequence and a mask of its pairs, in which one position sees nothing."""
    sees = np.arange(x.size).reshape(x.shape)[..., :1] % 3 != np.arange(x.shape[1]) % 3
    sees[0, 2] = False
    return {"target": masked(x), "mask": sees}


def pair_with_mask(x: np.ndarray) -> dict[str, Any]:
    """Make a source and a target, and a mask of their pairs."""
    return pair(x) | {"mask": with_mask(x)["mask"][..., 1:]}


def _block() -> fnn.Layer:
    return fnn.serial(fnn.dense(8), fnn.batch_norm(), fnn.activation("tanh"), fnn.tap(bounds=(-1, 1)))


def _masked_block() -> fnn.Layer:
    inner = fnn.serial(fnn.layer_norm(), fnn.dense(8), fnn.activation("silu"), fnn.tap())
    return fnn.residual(inner, scale=0.7)


def _masked_block4() -> fnn.Layer:
    return fnn.residual(fnn.serial(fnn.gru(4), fnn.attention(2, causal=True), fnn.dense(4)))


def _both_ways() -> fnn.Layer:
    return fnn.bidirectional(fnn.lstm(2, forget_bias=3.0), fnn.gru(3, reverse=True))


def _each_position() -> fnn.Layer:
    """Every layer that acts on each position alone, also where zeros or large numbers have no finite value or slope."""
    layers = [
        *(fnn.dense(4), fnn.scalar_affine(0.5, 0.1), fnn.layer_norm(), fnn.rms_norm(), fnn.batch_norm(), fnn.tap()),
        *(fnn.positions(5), fnn.dropout(0.3), fnn.residual(fnn.serial())),
        *(fnn.activation(f) for f in ("relu", "gelu", "softplus", jnp.exp, lambda x: jnp.log(jnp.abs(x)))),
    ]
    ends = fnn.parallel(
        fnn.take_last(), fnn.take_first(), fnn.take_ends(), fnn.take_ends(3), fnn.global_avg_pool(), fnn.drop_mask()
    )
    return fnn.serial(
        fnn.parallel(*layers, fnn.serial(fnn.parallel(fnn.layer_norm(), fnn.tap()), fnn.sum_inputs(), ends))
    )


def _no_eps() -> fnn.Layer:
    return fnn.serial(fnn.parallel(fnn.layer_norm(eps=0.0), fnn.rms_norm(eps=0.0)), fnn.concatenate())


def _two_inputs() -> fnn.Layer:
    image = fnn.serial(fnn.conv(3, 2), fnn.activation("tanh"), fnn.global_avg_pool())
    audio = fnn.serial(fnn.dense(3), fnn.tap(), fnn.take_last())
    return fnn.serial(
        fnn.branches({"image": image, "audio": audio}),
        fnn.parallel(fnn.concatenate(), fnn.sum_inputs()),
        fnn.concatenate(),
    )


def _shared() -> fnn.Layer:
    """Two uses in a scan, each with statistics of its own, one outside, and the transposed weights."""

    def build(use):
        block = fnn.serial(use(), fnn.batch_norm(), fnn.activation("tanh"), use(), fnn.tap())
        back = use(lambda params, x: x @ params["kernel"].T.astype(x.dtype))
        return fnn.serial(use(), fnn.repeat(block, 2), back)

    return fnn.shared(fnn.dense(8), build)


CASES = [
    Case("dense", fnn.dense(8, bias_init="normal(0.3)")),
    Case("dense_wider", fnn.dense(5), keeps_shape=False),
    Case("dense_without_bias", fnn.dense(8, bias=False)),
    Case("dense_on_sequences", fnn.dense(8, kernel_init="orthogonal"), (4, 3, 8)),
    Case("activations", fnn.parallel(*map(fnn.activation, fnn.activations.TABLE)), keeps_shape=False),
    Case("activation_with_option", fnn.activation("leaky_relu", slope=0.3)),
    Case("activation_of_function", fnn.activation(lambda x: jnp.sin(x))),
    Case("shared", _shared(), mixes=True),
    Case("flatten", fnn.flatten(), (4, 2, 3), keeps_shape=False),
    Case("dropout", fnn.dropout(0.4), noisy=True),
    Case("conv_1d", fnn.conv(4, 3, dilation=2, groups=2), (3, 6, 4)),
    Case("conv_2d", fnn.conv(4, (3, 2), stride=(2, 1), padding=((1, 0), (1, 1))), (3, 6, 5, 2), keeps_shape=False),
    Case("conv_2d_circular", fnn.conv(3, 3, padding="circular", kernel_init="delta_orthogonal"), (2, 5, 4, 3)),
    Case("conv_2d_by_xla", fnn.conv(3, 3, stride=2, implementation="xla"), (2, 5, 4, 3), keeps_shape=False),
    Case("conv_3d", fnn.conv(2, 2, stride=2, padding="valid"), (2, 4, 4, 5, 3), keeps_shape=False),
    Case("conv_transpose", fnn.conv_transpose(2, 3, stride=2), (2, 3, 4, 3), keeps_shape=False),
    Case("max_pool", fnn.max_pool(2, padding="same"), (3, 5, 4, 2), keeps_shape=False),
    Case("avg_pool", fnn.avg_pool(3, stride=2, padding=1), (3, 5, 4, 2), keeps_shape=False),
    Case("global_avg_pool", fnn.global_avg_pool(), (3, 5, 4, 2), keeps_shape=False),
    Case("global_avg_pool_masked", fnn.global_avg_pool(), (4, 5, 2), keeps_shape=False, make=masked),
    Case("last", fnn.take_last(), (4, 5, 2), keeps_shape=False, make=masked),
    Case("unmasked", fnn.drop_mask(), (4, 5, 2), keeps_shape=False, make=masked),
    Case("block_on_masked", _masked_block(), (4, 5, 8), make=masked),
    Case("first", fnn.take_first(), (4, 5, 2), keeps_shape=False, make=masked),
    Case("ends", fnn.take_ends(), (4, 5, 2), keeps_shape=False, make=masked),
    Case("branches", _two_inputs(), (4, 5, 2), keeps_shape=False, make=lambda x: {"image": x, "audio": masked(x)}),
    Case("rnn", fnn.rnn(3, activation="sigmoid", initial="learned"), (4, 5, 3)),
    Case("rnn_masked", fnn.rnn(3, tap=fnn.tap(bounds=(-1, 1))), (4, 5, 3), make=masked),
    Case("gru", fnn.gru(3), (4, 5, 3), make=masked),
    Case("lstm", fnn.lstm(3, initial="learned", unroll=2), (4, 5, 3), make=masked),
    Case("bidirectional", _both_ways(), (4, 5, 3), keeps_shape=False, make=masked),
    Case("embed", fnn.embed(7, 3, padding=0), (4, 5), keeps_shape=False, make=tokens),
    Case("tied", fnn.tied(7, 4, fnn.serial(fnn.dense(4), fnn.tap())), (4, 5), keeps_shape=False, make=tokens),
    Case("positions", fnn.positions(6), (4, 5, 3), make=masked),
    Case("attention", fnn.attention(2, kv_heads=1, bias=False), (4, 5, 6)),
    Case("attention_masked", fnn.attention(2, causal=True, rotary=True), (4, 5, 8), make=masked),
    Case("attention_window", fnn.attention(2, causal=True, window=1, rotary=True), (4, 5, 8), make=masked),
    Case(
        "attention_own_mask",
        fnn.residual(fnn.attention(2, mask=lambda t, s: (t + s) % 4 != 1), add_to="target"),
        (4, 5, 6),
        make=with_mask,
    ),
    Case(
        "cross_attention_own_mask",
        fnn.cross_attention(2, mask=np.arange(25).reshape(5, 5) % 3 > 0),
        (4, 5, 6),
        keeps_shape=False,
        make=pair_with_mask,
    ),
    Case("cross_attention", fnn.cross_attention(2, kv_heads=1), (4, 5, 6), keeps_shape=False, make=pair),
    Case(
        "residual_of_one_input", fnn.residual(fnn.cross_attention(2), scale=0.5, add_to="target"), (4, 5, 6), make=pair
    ),
    Case("batch_norm", fnn.batch_norm(), mixes=True),
    Case("batch_norm_plain", fnn.batch_norm(scale=False, bias=False, decay=0.5), (5, 3, 8), mixes=True),
    Case("batch_norm_masked", fnn.batch_norm(), (4, 5, 3), mixes=True, make=masked),
    Case("layer_norm", fnn.layer_norm()),
    Case("rms_norm", fnn.rms_norm()),
    Case("group_norm", fnn.group_norm(2), (4, 3, 8)),
    Case("tap", fnn.tap()),
    Case("tap_with_bounds", fnn.tap(bounds=(-1.0, 1.0))),
    Case("tap_masked", fnn.tap(bounds=(-1.0, 1.0)), (4, 5, 3), make=masked),
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
        "mlp", fnn.models.mlp(3, 8, 3, activation="silu", norm="batch_norm", taps=True), keeps_shape=False, mixes=True
    ),
    Case("gain", fnn.scalar_affine(0.5, 0.1), (4, 3, 8)),
    Case(
        "convnet",
        fnn.models.convnet([2, 3], 4, convs=1, activation="tanh", dropout=0.2, taps=True),
        (3, 4, 4, 2),
        noisy=True,
        keeps_shape=False,
        mixes=True,
        model=True,
    ),
    Case(
        "resnet",
        fnn.models.resnet([1, 1], 3, width=2, activation="silu", taps=True),
        (3, 4, 3, 2),
        keeps_shape=False,
        mixes=True,
        model=True,
    ),
    Case(
        "resnet_bottleneck_fixup",
        fnn.models.resnet([1], 3, width=2, block="bottleneck", activation="erf", norm=None, scaling="fixup"),
        (3, 4, 3, 2),
        keeps_shape=False,
        model=True,
    ),
    Case(
        "rnn_model",
        fnn.models.rnn(1, 4, 3, cell="gru", vocabulary=7, padding=0, bidirectional=True, every_step=True, taps=True),
        (4, 5),
        keeps_shape=False,
        model=True,
        make=tokens,
    ),
    Case(
        "transformer_decoder",
        fnn.models.decoder(7, 1, 4, fnn.models.Block(2, positions="learned", longest=5, taps=True), padding=0),
        (4, 5),
        keeps_shape=False,
        model=True,
        make=tokens,
    ),
    Case(
        "transformer_encoder",
        fnn.models.encoder(None, 1, 4, fnn.models.Block(2, norm_position="post", dropout=0.2), outputs=3),
        (4, 5, 3),
        noisy=True,
        keeps_shape=False,
        model=True,
        make=masked,
    ),
    Case(
        "transformer_encoder_decoder",
        fnn.models.translator(7, 1, 4, fnn.models.Block(2, norm_position="post", taps=True), padding=0),
        (4, 5),
        keeps_shape=False,
        model=True,
        make=lambda x: {"source": tokens(x[:, :4]), "target": tokens(x)},
    ),
    Case(
        "mlp_residual_scanned",
        fnn.models.mlp(4, 8, 3, norm="layer_norm", activation="tanh", residual=True, taps=True, unroll=2),
        keeps_shape=False,
    ),
]


PADDED = [
    *(case for case in CASES if case.make in (masked, pair, with_mask, pair_with_mask)),
    Case("each_position", _each_position(), (4, 5, 4), make=masked),
    Case("without_eps", _no_eps(), (4, 5, 4), make=masked),
    Case("backwards", fnn.serial(fnn.rnn(4, reverse=True), fnn.repeat(_masked_block4(), 2)), (4, 5, 4), make=masked),
    Case("embed_masked", fnn.embed(7, 3, padding=0), (4, 5), make=masked_tokens),
    Case("tied_masked", fnn.tied(7, 4, fnn.attention(2), padding=0), (4, 5), make=masked_tokens),
]
"""What the law of padding also holds for."""


def sample(case: Case, seed: int = 0) -> Any:
    """Draw an input without zeros, where kinks lie: in NumPy, which compiles nothing."""
    x = np.random.default_rng(seed).normal(size=case.shape)
    return jax.tree.map(jax.device_put, case.make(np.float32(x + 0.05 * np.sign(x))))


def floating(function: Callable[[Any], Any], tree: Any) -> Any:
    """Map over the floating leaves, and leave masks and ids as they are."""
    return jax.tree.map(lambda a: function(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
