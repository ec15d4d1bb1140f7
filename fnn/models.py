"""The nets that studies and benchmarks use."""

from collections.abc import Callable, Sequence
from typing import Any

from fnn import check, core
from fnn.core import Layer
from fnn.layers import activations, attention, conv, initializers, inputs, memory, norm, recurrent, tokens
from fnn.layers import dense as layers
from fnn.layers.taps import tap

NORMS: dict[str, Callable[[], Layer]] = {
    "batch_norm": norm.batch_norm,
    "layer_norm": norm.layer_norm,
    "rms_norm": norm.rms_norm,
}


def mlp(
    depth: int,
    width: int,
    classes: int,
    *,
    activation: str | Callable[..., Any] = "relu",
    norm: str | Layer | None = None,
    init: str | Callable[..., Any] = "he_normal",
    bias_init: str | Callable[..., Any] = "zeros",
    residual: bool = False,
    residual_scale: float = 1.0,
    dropout: float = 0.0,
    taps: bool = False,
    unroll: int | bool | None = None,
    checkpoint: int | None = None,
) -> Layer:
    """Build a multilayer perceptron: an input layer, `depth` hidden layers through `repeat`, an output layer.

    x: float[batch, ...] -> logits float[batch, classes]. Input and hidden layers are dense(width), norm, activation,
    dropout, in this order; with `residual` each hidden one is x + residual_scale·f(x). `norm` is a name of `NORMS`, a
    layer, or None ("none").

    `taps=True` puts taps behind every kernel ("preactivation", where dL/dh is measured), every activation
    ("activation") and every residual sum ("sum"), for `gradient_flow` and per-layer metrics.

    `unroll` is `repeat`'s; by default up to 16 hidden layers are unrolled, which is faster to run, and more are
    scanned, which compiles in constant time.
    """
    check.positive("mlp", depth=depth, width=width, classes=classes)
    check.fraction("mlp", dropout=dropout)
    _check_norm("mlp", norm)
    phi = activations.get(activation)
    bounds = phi.bounds if all(map(_finite, phi.bounds)) else None
    kernel_init, bias_init = initializers.get(init), initializers.get(bias_init)

    def dense(n: int) -> list[Layer]:
        kernel = layers.dense(n, kernel_init=kernel_init, bias_init=bias_init)
        return [kernel, *_tap(taps, "preactivation")]

    hidden = [*dense(width), *_norm(norm), layers.activation(phi)]
    if taps:
        hidden.append(core.named("activation", tap(bounds=bounds, role="activation")))
    if dropout:
        hidden.append(layers.dropout(dropout))
    block = core.serial(*hidden)
    if residual:
        block = core.residual(block, scale=residual_scale)
        block = core.serial(block, *_tap(taps, "sum"))
    if unroll is None:
        unroll = True if depth <= 16 else 1
    trunk = core.repeat(block, depth, unroll=unroll, checkpoint=checkpoint)
    return core.serial(layers.flatten(), *hidden, core.named("trunk", trunk), *dense(classes))


def convnet(
    channels: Sequence[int],
    classes: int,
    *,
    window: int = 3,
    convs: int = 2,
    activation: str | Callable[..., Any] = "relu",
    norm: str | Layer | None = "batch_norm",
    init: str | Callable[..., Any] = "he_normal",
    dropout: float = 0.0,
    taps: bool = False,
    checkpoint: int | None = None,
) -> Layer:
    """Build a convolutional classifier: a stage for each entry of `channels`, halved in size from stage to stage.

    x: float[batch, *positions, c] with one to three axes of positions -> logits float[batch, classes]. A stage is
    `convs` times conv(channels, window), norm, activation; between stages max_pool(2); then flatten, dropout, dense.
    `taps=True` as in `mlp`. Source: Simonyan and Zisserman 2015 (the scheme); Ioffe and Szegedy 2015.
    """
    check.positive("convnet", classes=classes, window=window, convs=convs, stages=len(channels))
    check.fraction("convnet", dropout=dropout)
    _check_norm("convnet", norm)
    phi, kernel_init = activations.get(activation), initializers.get(init)

    def block(n: int) -> Layer:
        layer = conv.conv(n, window, kernel_init=kernel_init, bias=not _norm(norm))
        return core.serial(layer, *_tap(taps, "preactivation"), *_norm(norm), *_activation(phi, taps))

    stages = []
    for i, n in enumerate(channels):
        stages.append(block(n))
        if convs > 1:
            unroll = True if convs <= 16 else 1
            stages.append(core.repeat(block(n), convs - 1, unroll=unroll, checkpoint=checkpoint))
        if i + 1 < len(channels):
            stages.append(conv.max_pool(2, padding="same"))
    head = [layers.flatten(), *([layers.dropout(dropout)] if dropout else []), _dense(classes, kernel_init)]
    return core.serial(*stages, *head, *_tap(taps, "preactivation"))


def resnet(
    depths: Sequence[int],
    classes: int,
    *,
    width: int = 16,
    block: str = "basic",
    activation: str | Callable[..., Any] = "relu",
    norm: str | Layer | None = "batch_norm",
    scaling: str | None = None,
    init: str | Callable[..., Any] = "he_normal",
    taps: bool = False,
    unroll: int | bool | None = None,
) -> Layer:
    """Build a pre-activation residual net: stages of `depths` blocks, twice the channels and half the size each.

    x: float[batch, *positions, c] -> logits float[batch, classes]. A "basic" branch is twice (norm, activation, conv 3);
    a "bottleneck" one has convs 1, 3, 1, the last four times as wide. Where the shape changes, the shortcut is a conv 1
    of the activated input. After the stages norm, activation, global_avg_pool, dense.

    Without norm the branches need a `scaling`: "skip_init" multiplies each by a learned number that starts at 0 (De and
    Smith 2020); "fixup" starts each branch's last conv and the output layer at zero, multiplies the std of its other
    convs by L^(-1/(2m-2)), L branches of m convs, and adds the scalar biases and multiplier of Zhang et al. 2019.
    Source: He et al. 2016b. `unroll` is `repeat`'s, for the equal blocks of a stage; up to 16 are unrolled by default.
    """
    check.positive("resnet", classes=classes, width=width, stages=len(depths))
    check.choice("resnet", ("basic", "bottleneck"), block=block)
    _check_norm("resnet", norm)
    plain = not _norm(norm)
    if scaling is not None:
        check.choice("resnet", ("skip_init", "fixup"), scaling=scaling)
    if plain == (scaling is None):
        got = f"norm={norm!r}, scaling={scaling!r}"
        raise ValueError(f"resnet: branches need either a norm, or scaling='skip_init' or 'fixup', got {got}")
    phi, kernel_init = activations.get(activation), initializers.get(init)
    windows, fixup = ((3, 3) if block == "basic" else (1, 3, 1)), scaling == "fixup"
    shrink = sum(depths) ** (-1 / (2 * len(windows) - 2)) if fixup else 1.0

    def shrunk(key, shape, dtype):
        return shrink * kernel_init(key, shape, dtype)

    def biased() -> list[Layer]:
        return [layers.scalar_affine(None, 0.0)] if fixup else []

    def activated() -> list[Layer]:
        return [*biased(), *_norm(norm), *_activation(phi, taps)]

    def branch(n: int, stride: int) -> list[Layer]:
        parts: list[Layer] = []
        for i, window in enumerate(windows):
            end = i + 1 == len(windows)
            wide = 4 * n if end and block == "bottleneck" else n
            draw = initializers.zeros if end and fixup else shrunk
            step = stride if window == 3 and 3 not in windows[:i] else 1
            layer = conv.conv(wide, window, stride=step, kernel_init=draw, bias=scaling == "skip_init")
            parts += [*(activated() if i else []), *biased(), layer, *_tap(taps, "preactivation")]
        if scaling is not None:
            parts.append(layers.scalar_affine(0.0 if scaling == "skip_init" else 1.0, 0.0 if fixup else None))
        return parts

    def changing(n: int, stride: int) -> Layer:
        wide = 4 * n if block == "bottleneck" else n
        shortcut = conv.conv(wide, 1, stride=stride, kernel_init=kernel_init, bias=False)
        paths = core.parallel(shortcut, core.serial(*branch(n, stride)))
        return core.serial(*activated(), paths, inputs.sum_inputs(), *_tap(taps, "sum"))

    def keeping(n: int) -> Layer:
        return core.serial(core.residual(core.serial(*activated(), *branch(n, 1))), *_tap(taps, "sum"))

    stages = []
    for i, depth in enumerate(depths):
        check.positive("resnet", depth=depth)
        n, stride = width * 2**i, 1 if i == 0 else 2
        first = keeping(n) if i == 0 and block == "basic" else changing(n, stride)
        stages.append(first)
        if depth > 1:
            times = unroll if unroll is not None else True if depth <= 16 else 1
            stages.append(core.repeat(keeping(n), depth - 1, unroll=times))
    stem = conv.conv(width, 3, kernel_init=kernel_init, bias=False)
    head = _dense(classes, initializers.zeros if fixup else kernel_init)
    named = [core.named(f"stages_{i}", stage) for i, stage in enumerate(stages)]
    ends = [*activated(), conv.global_avg_pool(), *biased(), head, *_tap(taps, "preactivation")]
    return core.serial(stem, *_tap(taps, "preactivation"), *named, *ends)


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
    recurrent_init: str | Callable[..., Any] = "orthogonal",
    dropout: float = 0.0,
    taps: bool = False,
    unroll: int = 1,
) -> Layer:
    """Build a recurrent net: `depth` recurrent layers and an output layer on what they have read, or on every position.

    x: float[batch, time, d] (or with `vocabulary` int[batch, time], embedded), alone or in `Masked` -> float[batch,
    outputs], or float[batch, time, outputs] with `every_step`. `cell` is "rnn", "gru" or "lstm" (`forget_bias` is the
    lstm's); `bidirectional` reads both ways, half the width each. The output layer sees the last real position, of the
    half that runs backwards the first one: where it has read everything (`ends`). `taps=True` puts a tap behind every
    layer. Layers behind the first run through `repeat`.
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
        rest = [layers.dropout(dropout)] if dropout else []
        return core.serial(both or one_way(width, False), *_tap(taps, "hidden"), *rest)

    first = [] if vocabulary is None else [tokens.embed(vocabulary, width, padding=padding)]
    trunk = [core.repeat(layer(), depth - 1)] if depth > 1 else []
    end = inputs.drop_mask() if every_step else inputs.take_ends() if bidirectional else inputs.take_last()
    return core.serial(*first, layer(), *trunk, end, _dense(outputs, initializers.lecun_normal))


def transformer(
    vocabulary: int | None,
    depth: int,
    width: int,
    heads: int,
    *,
    outputs: int | None = None,
    hidden: int | None = None,
    causal: bool = True,
    positions: str = "rotary",
    longest: int | None = None,
    padding: int | None = None,
    norm: str | Layer = "layer_norm",
    norm_position: str = "pre",
    activation: str | Callable[..., Any] = "gelu",
    dropout: float = 0.0,
    encoder: int | None = None,
    taps: bool = False,
    unroll: int | bool | None = None,
    checkpoint: int | None = None,
) -> Layer:
    """Build a transformer: `depth` blocks of attention and a feed-forward net of `hidden` units (4·width by default).

    A decoder (`causal`, for `generate`) maps tokens int[batch, time] to logits float[batch, time, vocabulary] through the
    transposed embedding (tied). With `outputs` it ends in a dense layer of its own on the mean over positions:
    float[batch, outputs], an encoder with `causal=False`. `vocabulary=None` takes float[batch, time, d] through a dense
    layer. Tokens `padding` are masked; so are the False positions of a `Masked` input.

    With `encoder`, a number of blocks, it is an encoder-decoder on {"source": int[batch, s], "target": int[batch, time]}, one
    vocabulary and embedding for both: each of its decoder's blocks attends to the encoded source (`cross_attention`)
    between its two other parts. -> float[batch, time, vocabulary], position t from the target up to t.

    `norm_position`: "pre" x + f(norm x) with a last norm, or "post" norm(x + f(x)) (Xiong et al. 2020, figure 1).
    `positions`: "rotary", "learned" (up to `longest`), "none". Dropout acts on each branch. `taps=True` puts taps
    behind each sum, attention and feed-forward alike, and behind tied logits: the one tap that rescales there, since the
    paths in front of it meet again in the embedding. `unroll` as in `mlp`. Source: Vaswani et al. 2017.
    """
    who = "transformer"
    hidden = 4 * width if hidden is None else hidden
    check.positive(who, depth=depth, width=width, heads=heads, hidden=hidden)
    check.fraction(who, dropout=dropout)
    check.choice(who, ("pre", "post"), norm_position=norm_position)
    check.choice(who, ("rotary", "learned", "none"), positions=positions)
    if (positions == "learned") != (longest is not None):
        raise ValueError(f"{who}: learned positions, and only they, need longest=, got {positions!r} and {longest!r}")
    if vocabulary is None and (outputs is None or padding is not None):
        raise ValueError(f"{who}: without a vocabulary it needs outputs= and no padding=, got {outputs!r}, {padding!r}")
    _check_norm(who, norm)
    if not _norm(norm):
        raise ValueError(f"{who}: blocks need a norm, got {norm!r}")
    if encoder is not None:
        check.positive(who, encoder=encoder)
        if vocabulary is None or outputs is not None or not causal:
            got = f"vocabulary={vocabulary!r}, outputs={outputs!r}, causal={causal!r}"
            raise ValueError(f"{who}: with an encoder it needs a vocabulary, no outputs=, and causal=True, got {got}")
    phi, pre = activations.get(activation), norm_position == "pre"
    rest = [layers.dropout(dropout)] if dropout else []

    def block_part(name: str, *inner: Layer) -> list[Layer]:
        branch = core.residual(core.serial(*(_norm(norm) if pre else []), core.named(name, core.serial(*inner)), *rest))
        return [branch, *_tap(taps, "sum"), *([] if pre else _norm(norm))]

    def trunk(name: str, block: list[Layer], n: int) -> Layer:
        times = unroll if unroll is not None else True if n <= 16 else 1
        return core.named(name, core.repeat(core.serial(*block), n, unroll=times, checkpoint=checkpoint))

    def see(causal: bool) -> list[Layer]:
        return block_part("attention", attention.attention(heads, causal=causal, rotary=positions == "rotary"))

    forward = [
        _dense(hidden, initializers.lecun_normal),
        layers.activation(phi),
        _dense(width, initializers.lecun_normal),
    ]
    forward = block_part("feed_forward", *forward)
    place = [] if longest is None else [attention.positions(longest)]
    end = _norm(norm) if pre else []
    if encoder is None:
        body = [*place, trunk("trunk", [*see(causal), *forward], depth), *end]
    else:

        def target(*inner: Layer) -> Layer:
            return inputs.branches({"source": core.serial(), "target": core.serial(*inner)})

        encode = core.serial(*place, trunk("encoder", [*see(False), *forward], encoder), *end)
        cross = [*([target(*_norm(norm))] if pre else []), core.named("cross", attention.cross_attention(heads)), *rest]
        behind = [*_tap(taps, "sum"), *([] if pre else _norm(norm)), *forward]
        block = [target(*see(True)), core.residual(core.serial(*cross), of="target"), target(*behind)]
        first = inputs.branches({"source": memory.full_sequence(encode), "target": core.serial(*place)})
        body = [first, trunk("trunk", block, depth), core.function(lambda x: x["target"]), *end]
    if outputs is None:
        assert vocabulary is not None
        net = tokens.tied(vocabulary, width, core.serial(*body, inputs.drop_mask()), padding=padding)
        return core.serial(net, *_tap(taps, "logits")) if taps else net
    check.positive(who, outputs=outputs)
    draw = initializers.lecun_normal
    first = _dense(width, draw) if vocabulary is None else tokens.embed(vocabulary, width, padding=padding)
    return core.serial(first, *body, conv.global_avg_pool(), _dense(outputs, draw))


def _dense(n: int, kernel_init: Any) -> Layer:
    return layers.dense(n, kernel_init=kernel_init)


def _tap(taps: bool, name: str) -> list[Layer]:
    return [core.named(name, tap(role=name))] if taps else []


def _activation(phi: activations.Activation, taps: bool) -> list[Layer]:
    bounds = phi.bounds if all(map(_finite, phi.bounds)) else None
    return [
        layers.activation(phi),
        *([core.named("activation", tap(bounds=bounds, role="activation"))] if taps else []),
    ]


def _check_norm(who: str, kind: str | Layer | None) -> None:
    if kind is not None and not isinstance(kind, Layer):
        check.choice(who, [*NORMS, "none"], norm=kind)


def _norm(kind: str | Layer | None) -> list[Layer]:
    if kind is None or kind == "none":
        return []
    if isinstance(kind, Layer):
        return [kind]
    return [NORMS[kind]()]


def _finite(bound: float) -> bool:
    return abs(bound) < float("inf")
