"""Transformers: decoders, encoders and translators, all made of one kind of block."""

from dataclasses import dataclass
from typing import Any

from fnn import check, core
from fnn.core import Layer
from fnn.layers import activations, attention, conv, inputs, memory, tokens
from fnn.layers import dense as layers
from fnn.parts import Named, dropped, normed, repeated, tapped


@dataclass(frozen=True)
class Block:
    """Options of a transformer's blocks: attention, then a feed-forward net, each added to its input."""

    heads: int = 4
    """attention heads, which share the width evenly"""
    hidden: int | None = None
    """units of the feed-forward net; 4·width by default"""
    activation: Named = "gelu"
    norm: str | Layer = "layer_norm"
    norm_position: str = "pre"
    """"pre": x + f(norm x), and a norm after the last block; "post": norm(x + f(x)) (Xiong et al. 2020, figure 1)"""
    positions: str = "rotary"
    """"rotary", "learned", or "none" """
    longest: int | None = None
    """length of the longest sequence, for learned positions only"""
    dropout: float = 0.0
    """of each branch, before the sum"""
    taps: bool = False
    """put a tap after each sum, and one after tied logits, where the paths have not yet met in the embedding"""
    unroll: int | bool | None = None
    """`repeat`'s, as is `checkpoint`; by default up to 16 blocks are unrolled"""
    checkpoint: int | None = None


BLOCK = Block()


def decoder(
    vocabulary: int | None,
    depth: int,
    width: int,
    block: Block = BLOCK,
    *,
    outputs: int | None = None,
    padding: int | None = None,
) -> Layer:
    """Build a decoder: `depth` blocks in which each position sees those up to itself (causal attention).

    x: int[batch, time] -> logits float[batch, time, vocabulary] through the transposed embedding (tied), as `generate`
    needs them. With `outputs` it ends in the mean over positions and a dense layer: float[batch, outputs].
    `vocabulary=None`, which needs `outputs`, takes float[batch, time, d] through a dense layer. Tokens `padding` are
    masked, and so are the False positions of a `Masked` input. Source: Vaswani et al. 2017.
    """
    _check("decoder", width, block, depth=depth)
    body = _stack("trunk", depth, width, block, causal=True)
    return _whole("decoder", body, width, vocabulary, outputs, padding, block.taps)


def encoder(
    vocabulary: int | None,
    depth: int,
    width: int,
    block: Block = BLOCK,
    *,
    outputs: int | None = None,
    padding: int | None = None,
) -> Layer:
    """Build an encoder: `depth` blocks in which each position sees all others.

    Inputs and outputs are those of `decoder`: float[batch, outputs] for one answer about the whole sequence, or, without
    `outputs`, logits at each position, to predict masked tokens. Source: Vaswani et al. 2017; Devlin et al. 2019.
    """
    _check("encoder", width, block, depth=depth)
    body = _stack("trunk", depth, width, block, causal=False)
    return _whole("encoder", body, width, vocabulary, outputs, padding, block.taps)


def translator(
    vocabulary: int,
    depth: int,
    width: int,
    block: Block = BLOCK,
    *,
    encoder_depth: int | None = None,
    padding: int | None = None,
) -> Layer:
    """Build an encoder-decoder: `encoder_depth` blocks read a source, and `depth` blocks write the target.

    x: {"source": int[batch, s], "target": int[batch, time]} -> logits float[batch, time, vocabulary]; position t sees the
    source and the target up to t. Both share one vocabulary and embedding. In each block of the decoder,
    `cross_attention` to the encoded source stands between attention and feed-forward net. `encoder_depth` is `depth` by
    default. Padding as in `decoder`. Source: Vaswani et al. 2017.
    """
    encoder_depth = depth if encoder_depth is None else encoder_depth
    _check("translator", width, block, depth=depth, encoder_depth=encoder_depth, vocabulary=vocabulary)

    def target(*inner: Layer) -> Layer:
        return inputs.branches({"source": core.serial(), "target": core.serial(*inner)})

    before, after = _norms(block)
    encode = core.serial(*_stack("encoder", encoder_depth, width, block, causal=False))
    cross = core.serial(
        *([target(*before)] if before else []),
        core.named("cross", attention.cross_attention(block.heads)),
        *dropped(block.dropout),
    )
    rest = [*tapped(block.taps, "sum"), *after, *_feed_forward(width, block)]
    parts = [target(*_attention(block, causal=True)), core.residual(cross, add_to="target"), target(*rest)]
    first = inputs.branches({"source": memory.full_sequence(encode), "target": core.serial(*_places(block))})
    out = core.function(lambda x: x["target"]).described("x['target']")
    body = [first, _trunk("trunk", depth, parts, block), out, *_norms(block)[0]]
    return _whole("translator", body, width, vocabulary, None, padding, block.taps)


def _check(who: str, width: int, block: Block, **sizes: Any) -> None:
    hidden = {} if block.hidden is None else {"hidden": block.hidden}
    check.positive(who, **sizes, width=width, heads=block.heads, **hidden)
    check.fraction(who, dropout=block.dropout)
    check.choice(who, ("pre", "post"), norm_position=block.norm_position)
    check.choice(who, ("rotary", "learned", "none"), positions=block.positions)
    if (block.positions == "learned") != (block.longest is not None):
        got = f"{block.positions!r} and {block.longest!r}"
        raise ValueError(f"{who}: learned positions, and only they, need longest=, got {got}")
    if not normed(who, block.norm):
        raise ValueError(f"{who}: blocks need a norm, got {block.norm!r}")


def _norms(block: Block) -> tuple[list[Layer], list[Layer]]:
    """The norms before a branch (and at the end of the stack) and after its sum."""
    norms = normed("block", block.norm)
    return (norms, []) if block.norm_position == "pre" else ([], norms)


def _part(name: str, block: Block, *inner: Layer) -> list[Layer]:
    before, after = _norms(block)
    branch = core.serial(*before, core.named(name, core.serial(*inner)), *dropped(block.dropout))
    return [core.residual(branch), *tapped(block.taps, "sum"), *after]


def _attention(block: Block, causal: bool) -> list[Layer]:
    rotary = block.positions == "rotary"
    return _part("attention", block, attention.attention(block.heads, causal=causal, rotary=rotary))


def _feed_forward(width: int, block: Block) -> list[Layer]:
    hidden = 4 * width if block.hidden is None else block.hidden
    phi = layers.activation(activations.get(block.activation))
    return _part("feed_forward", block, layers.dense(hidden), phi, layers.dense(width))


def _places(block: Block) -> list[Layer]:
    return [] if block.longest is None else [attention.positions(block.longest)]


def _trunk(name: str, depth: int, parts: list[Layer], block: Block) -> Layer:
    (trunk,) = repeated(core.serial(*parts), depth, block.unroll, block.checkpoint)
    return core.named(name, trunk)


def _stack(name: str, depth: int, width: int, block: Block, causal: bool) -> list[Layer]:
    parts = [*_attention(block, causal), *_feed_forward(width, block)]
    return [*_places(block), _trunk(name, depth, parts, block), *_norms(block)[0]]


def _whole(
    who: str,
    body: list[Layer],
    width: int,
    vocabulary: int | None,
    outputs: int | None,
    padding: int | None,
    taps: bool,
) -> Layer:
    """Put the two ends to a body; one argument for each thing that the ends depend on."""
    if vocabulary is None and (outputs is None or padding is not None):
        raise ValueError(f"{who}: without a vocabulary it needs outputs= and no padding=, got {outputs!r}, {padding!r}")
    if outputs is None:
        assert vocabulary is not None
        net = tokens.tied(vocabulary, width, core.serial(*body, inputs.drop_mask()), padding=padding)
        return core.serial(net, *tapped(taps, "logits")) if taps else net
    check.positive(who, outputs=outputs)
    first = layers.dense(width) if vocabulary is None else tokens.embed(vocabulary, width, padding=padding)
    return core.serial(first, *body, conv.global_avg_pool(), layers.dense(outputs))
