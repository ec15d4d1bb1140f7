"""The nets that studies and benchmarks use."""

from collections.abc import Sequence
from typing import Any

from fnn import check, core, parametrizations
from fnn.core import Layer
from fnn.layers import activations, conv, initializers, inputs, recurrent, tokens
from fnn.layers import dense as layers
from fnn.parametrizations import Parametrization
from fnn.parts import Named, activated, dropped, normed, repeated, tapped
from fnn.transformers import Block as Block
from fnn.transformers import decoder as decoder
from fnn.transformers import encoder as encoder
from fnn.transformers import translator as translator


def mlp(
    depth: int,
    width: int,
    classes: int,
    *,
    activation: Named = "relu",
    norm: str | Layer | None = None,
    init: Named = "he_normal",
    bias_init: Named = "zeros",
    residual: bool = False,
    residual_scale: float = 1.0,
    parametrization: str | Parametrization = "standard",
    dropout: float = 0.0,
    head: Named = "identity",
    taps: bool = False,
    unroll: int | bool | None = None,
    checkpoint: int | None = None,
) -> Layer:
    """Build a multilayer perceptron: `depth` hidden layers of `width` units, then an output layer.

    x: float[batch, ...] -> logits float[batch, classes]. A hidden layer is dense(width), norm, activation, dropout, in
    this order. The first one maps the input to `width`. The other depth - 1 are a `repeat`, named "trunk" (at depth 1
    there is none); with `residual` each of them is x + residual_scale·f(x). `norm` is "batch_norm", "layer_norm",
    "rms_norm", a layer, or None ("none"). `head` is an activation behind the output layer; losses that take logits need
    none.

    `parametrization` is "standard", "mup" or "completep", or a `parametrizations.Parametrization` with base sizes of your
    own; it sets the output layer's std and multiplies `residual_scale`. "completep" is about residual nets alone. The
    optimiser that goes with it is `optimizers.parametrized`.

    `taps=True` puts a tap after every kernel ("preactivation", where dL/dh is measured), every activation
    ("activation") and every residual sum ("sum"), for `gradient_flow` and per-layer metrics. Each option is a keyword of
    its own, since each may be an axis of a study; so it is in all models.

    `unroll` and `checkpoint` are `repeat`'s. By default a trunk of up to 16 layers is unrolled, which runs faster, and a
    longer one is scanned, which compiles in constant time.
    """
    check.positive("mlp", depth=depth, width=width, classes=classes)
    check.fraction("mlp", dropout=dropout)
    phi, kernel_init, bias_init = activations.get(activation), initializers.get(init), initializers.get(bias_init)
    chosen = parametrizations.get(parametrization)
    if chosen.name == "completep" and not residual:
        raise ValueError("mlp: completep is about residual nets, got residual=False; pass residual=True, or 'mup'")

    def dense(n: int, kernel_init: Any = kernel_init) -> list[Layer]:
        return [layers.dense(n, kernel_init=kernel_init, bias_init=bias_init), *tapped(taps, "preactivation")]

    def hidden() -> list[Layer]:
        return [*dense(width), *normed("mlp", norm), *activated(phi, taps), *dropped(dropout)]

    block = core.serial(*hidden())
    if residual:
        block = core.serial(core.residual(block, scale=residual_scale * chosen.branch(depth)), *tapped(taps, "sum"))
    trunk = [core.named("trunk", part) for part in repeated(block, depth - 1, unroll, checkpoint)]
    last = activations.get(head)
    end = [] if last is activations.identity else activated(last, taps)
    return core.serial(layers.flatten(), *hidden(), *trunk, *dense(classes, chosen.output(kernel_init)), *end)


def convnet(
    channels: Sequence[int],
    classes: int,
    *,
    window: int = 3,
    convs: int = 2,
    activation: Named = "relu",
    norm: str | Layer | None = "batch_norm",
    init: Named = "he_normal",
    dropout: float = 0.0,
    taps: bool = False,
    checkpoint: int | None = None,
) -> Layer:
    """Build a convolutional classifier with one stage for each entry of `channels`; each stage halves the image.

    x: float[batch, *positions, c] with one to three axes of positions -> logits float[batch, classes]. A stage is
    `convs` times conv(channels, window), norm, activation. Between stages stands max_pool(2), at the end flatten,
    dropout and dense. Options are keywords as in `mlp`; with `init="delta_orthogonal"` dense is `orthogonal`.
    Source: Simonyan and Zisserman 2015 (the scheme); Ioffe and Szegedy 2015.
    """
    check.positive("convnet", classes=classes, window=window, convs=convs, stages=len(channels))
    check.fraction("convnet", dropout=dropout)
    phi, kernel_init = activations.get(activation), initializers.get(init)

    def block(n: int) -> Layer:
        norms = normed("convnet", norm)
        layer = conv.conv(n, window, kernel_init=kernel_init, bias=not norms)
        return core.serial(layer, *tapped(taps, "preactivation"), *norms, *activated(phi, taps))

    stages: list[Layer] = []
    for i, n in enumerate(channels):
        stages += [block(n), *repeated(block(n), convs - 1, checkpoint=checkpoint)]
        if i + 1 < len(channels):
            stages.append(conv.max_pool(2, padding="same"))
    head = [layers.flatten(), *dropped(dropout), layers.dense(classes, kernel_init=_of_dense(init))]
    return core.serial(*stages, *head, *tapped(taps, "preactivation"))


def _of_dense(init: Named) -> Any:
    """Find the initialiser of the last layer: what draws the convolutions may have no meaning for a matrix."""
    return initializers.get(init.replace("delta_orthogonal", "orthogonal") if isinstance(init, str) else init)


def resnet(
    depths: Sequence[int],
    classes: int,
    *,
    width: int = 16,
    block: str = "basic",
    activation: Named = "relu",
    norm: str | Layer | None = "batch_norm",
    scaling: str | None = None,
    init: Named = "he_normal",
    taps: bool = False,
    unroll: int | bool | None = None,
) -> Layer:
    """Build a pre-activation residual net: stages of `depths` blocks, each with twice the channels at half the size.

    x: float[batch, *positions, c] -> logits float[batch, classes]. The branch of a "basic" block is norm, activation,
    conv 3, twice; a "bottleneck" branch has convs 1, 3, 1, the last one four times as wide. Where the shape changes, the
    shortcut is a conv 1 of the activated input. The stages are followed by norm, activation, global_avg_pool, dense.

    Without norm the branches need a `scaling`: "skip_init" multiplies each by a learned number that starts at 0 (De and
    Smith 2020); "fixup" starts each branch's last conv and the output layer at zero, multiplies the std of its other
    convs by L^(-1/(2m-2)), L branches of m convs, and adds the scalar biases and multiplier of Zhang et al. 2019.
    `unroll` is `repeat`'s, for the equal blocks of a stage; up to 16 are unrolled by default. Options are keywords as in
    `mlp`, `init` as in `convnet`. Source: He et al. 2016b.
    """
    check.positive("resnet", classes=classes, width=width, stages=len(depths))
    check.choice("resnet", ("basic", "bottleneck"), block=block)
    if scaling is not None:
        check.choice("resnet", ("skip_init", "fixup"), scaling=scaling)
    if bool(normed("resnet", norm)) != (scaling is None):
        got = f"norm={norm!r}, scaling={scaling!r}"
        raise ValueError(f"resnet: branches need either a norm, or scaling='skip_init' or 'fixup', got {got}")
    phi, kernel_init = activations.get(activation), initializers.get(init)
    windows, fixup = ((3, 3) if block == "basic" else (1, 3, 1)), scaling == "fixup"
    shrink = sum(depths) ** (-1 / (2 * len(windows) - 2)) if fixup else 1.0

    def shrunk(key, shape, dtype):
        return shrink * kernel_init(key, shape, dtype)

    def biased() -> list[Layer]:
        return [layers.scalar_affine(None, 0.0)] if fixup else []

    def before() -> list[Layer]:
        return [*biased(), *normed("resnet", norm), *activated(phi, taps)]

    def branch(n: int, stride: int) -> list[Layer]:
        parts: list[Layer] = []
        for i, window in enumerate(windows):
            end = i + 1 == len(windows)
            wide = 4 * n if end and block == "bottleneck" else n
            draw = initializers.zeros if end and fixup else shrunk
            step = stride if window == 3 and 3 not in windows[:i] else 1
            layer = conv.conv(wide, window, stride=step, kernel_init=draw, bias=scaling == "skip_init")
            parts += [*(before() if i else []), *biased(), layer, *tapped(taps, "preactivation")]
        if scaling is not None:
            parts.append(layers.scalar_affine(0.0 if scaling == "skip_init" else 1.0, 0.0 if fixup else None))
        return parts

    def changing(n: int, stride: int) -> Layer:
        wide = 4 * n if block == "bottleneck" else n
        shortcut = conv.conv(wide, 1, stride=stride, kernel_init=kernel_init, bias=False)
        paths = inputs.parallel(shortcut, core.serial(*branch(n, stride)))
        return core.serial(*before(), paths, inputs.sum_inputs(), *tapped(taps, "sum"))

    def keeping(n: int) -> Layer:
        return core.serial(core.residual(core.serial(*before(), *branch(n, 1))), *tapped(taps, "sum"))

    stages: list[Layer] = []
    for i, depth in enumerate(depths):
        check.positive("resnet", depth=depth)
        n, stride = width * 2**i, 1 if i == 0 else 2
        first = keeping(n) if i == 0 and block == "basic" else changing(n, stride)
        stages += [first, *repeated(keeping(n), depth - 1, unroll)]
    stem = conv.conv(width, 3, kernel_init=kernel_init, bias=False)
    head = layers.dense(classes, kernel_init=initializers.zeros if fixup else _of_dense(init))
    named = [core.named(f"stages_{i}", stage) for i, stage in enumerate(stages)]
    ends = [*before(), conv.global_avg_pool(), *biased(), head, *tapped(taps, "preactivation")]
    return core.serial(stem, *tapped(taps, "preactivation"), *named, *ends)


def rnn(
    depth: int,
    width: int,
    outputs: int,
    *,
    cell: str = "lstm",
    vocabulary: int | None = None,
    padding: int | None = None,
    bidirectional: bool = False,
    every_step: bool = False,
    forget_bias: float = 1.0,
    recurrent_init: Named = "orthogonal",
    dropout: float = 0.0,
    taps: bool = False,
    unroll: int = 1,
) -> Layer:
    """Build a recurrent net: `depth` recurrent layers, then an output layer at the last position or at every one.

    x: float[batch, time, d], or with `vocabulary` int[batch, time], which is embedded; alone or in `Masked`. -> float[batch,
    outputs], or float[batch, time, outputs] with `every_step`. `cell` is "rnn", "gru" or "lstm" (which alone reads
    `forget_bias`). `bidirectional` reads both ways, with half the width each. The output layer sees the position at which
    a layer has read everything: the last real one, or the first one of a layer that runs backwards. `taps=True` puts a
    tap after every layer. The layers after the first are a `repeat`. Options are keywords as in `mlp`.
    """
    check.positive("models.rnn", depth=depth, width=width, outputs=outputs)
    check.choice("models.rnn", ("rnn", "gru", "lstm"), cell=cell)
    check.fraction("models.rnn", dropout=dropout)
    if bidirectional and width % 2:
        raise ValueError(f"models.rnn: a bidirectional net needs an even width, got {width}")

    def one_way(n: int, reverse: bool) -> Layer:
        if cell == "lstm":
            options = {"forget_bias": forget_bias, "recurrent_init": recurrent_init}
            return recurrent.lstm(n, reverse=reverse, unroll=unroll, **options)
        kind = recurrent.rnn if cell == "rnn" else recurrent.gru
        return kind(n, reverse=reverse, unroll=unroll, recurrent_init=recurrent_init)

    def layer() -> Layer:
        both = bidirectional and recurrent.bidirectional(one_way(width // 2, False), one_way(width // 2, True))
        return core.serial(both or one_way(width, False), *tapped(taps, "hidden"), *dropped(dropout))

    first = [] if vocabulary is None else [tokens.embed(vocabulary, width, padding=padding)]
    trunk = repeated(layer(), depth - 1, unroll=1)
    end = inputs.drop_mask() if every_step else inputs.take_ends() if bidirectional else inputs.take_last()
    return core.serial(*first, layer(), *trunk, end, layers.dense(outputs))
