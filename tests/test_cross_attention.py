"""Cross-attention and the encoder-decoder: Flax and PyTorch on the same weights, masks, decoding, gradient flow."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, assert_same, by_layer, started

import fnn

BATCH, TIME, SPAN, D, E, HEADS, VOCABULARY = 3, 5, 6, 8, 4, 2, 11
KEY = jax.random.key(0)
PRECISIONS = pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)], ids=["f32", "f64"])


def drawn(dtype=jnp.float32, source_width=E):
    """A source with padding in front and a hole, a target with padding behind."""
    rng = np.random.default_rng(0)
    source, target = (as_jax(rng.normal(size=s), dtype) for s in ((BATCH, SPAN, source_width), (BATCH, TIME, D)))
    real, mask = np.arange(SPAN) >= np.array([[0], [3], [1]]), np.arange(TIME) < np.array([[5], [2], [4]])
    real[2, 3] = False
    return {"source": fnn.Masked(source, as_jax(real)), "target": fnn.Masked(target, as_jax(mask))}


def prepared(layer, x):
    return started(layer.init, x)


def in_flax(params):
    """Split the last axis into heads."""
    named = jax.tree.map(lambda a: a.reshape(*a.shape[:-1], HEADS, D // HEADS), params)
    named["out"] = {"kernel": params["out"]["kernel"].reshape(HEADS, D // HEADS, D), "bias": params["out"]["bias"]}
    return {"params": named}


@PRECISIONS
def test_cross_attention_equals_flax_with_masks(dtype, atol):
    with jax.enable_x64(dtype == jnp.float64):
        x, layer = drawn(dtype), fnn.cross_attention(HEADS)
        params, state = prepared(layer, x)
        (source, real), (target, mask) = x["source"], x["target"]
        module = nn.MultiHeadDotProductAttention(HEADS, dtype=dtype, param_dtype=dtype)

        def ours(params, source, target):
            y, _ = layer.apply(params, state, {"source": fnn.Masked(source, real), "target": fnn.Masked(target, mask)})
            return jnp.sum(jnp.sin(y.values)), y.values

        def reference(params, source, target):
            seen = nn.make_attention_mask(jnp.ones_like(mask), real)
            y = module.apply(in_flax(params), target, source, source, mask=seen)
            y = jnp.where(mask[..., None], y, 0)
            return jnp.sum(jnp.sin(y)), y

        both = [jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True)) for f in (ours, reference)]
        ((_, y), slopes), ((_, expected), theirs) = (f(params, source, target) for f in both)
        np.testing.assert_allclose(y, expected, rtol=0, atol=atol)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=10 * atol), slopes, theirs)
        assert not np.any(np.asarray(slopes[1])[~np.asarray(real)])
        assert not np.any(np.asarray(slopes[2])[~np.asarray(mask)])


def test_cross_attention_equals_pytorch():
    torch = pytest.importorskip("torch")
    x, layer = drawn(), fnn.cross_attention(HEADS)
    params, state = prepared(layer, x)
    module = torch.nn.MultiheadAttention(D, HEADS, kdim=E, vdim=E, batch_first=True)
    names = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
    weights = {theirs: torch.tensor(np.array(params[ours]["kernel"]).T) for theirs, ours in names.items()}
    weights["in_proj_bias"] = torch.tensor(np.concatenate([params[n]["bias"] for n in names.values()]))
    weights["out_proj.weight"] = torch.tensor(np.array(params["out"]["kernel"]).T)
    weights["out_proj.bias"] = torch.tensor(np.array(params["out"]["bias"]))
    module.load_state_dict(weights)
    source, target = (torch.tensor(np.array(x[name].values)) for name in ("source", "target"))
    padding = torch.tensor(~np.array(x["source"].mask))
    with torch.no_grad():
        theirs, _ = module(target, source, source, key_padding_mask=padding, need_weights=False)
    y, _ = layer.apply(params, state, x)
    np.testing.assert_allclose(y.values[y.mask], theirs.numpy()[np.array(y.mask)], atol=1e-5)


def test_padding_never_matters_and_a_source_without_real_positions_adds_the_bias():
    x, layer = drawn(), fnn.cross_attention(HEADS)
    params, state = prepared(layer, x)
    apply = jax.jit(layer.apply)
    y, _ = apply(params, state, x)
    other, x, y = jax.tree.map(lambda a: a, x), *jax.device_get((x, y))
    for name, a in x.items():
        other[name] = a._replace(values=as_jax(np.where(a.mask[..., None], a.values, np.float32(1e3))))
    assert_same(apply(params, state, other)[0].values, y.values)
    assert not np.any(y.values[~y.mask])
    # Alone, and without padding: what each example gives does not depend on the others, nor on where its padding stands.
    source, target = x["source"].values[2][x["source"].mask[2]], x["target"].values[2][x["target"].mask[2]]
    alone, _ = jax.jit(layer.apply)(params, state, {"source": source[None], "target": target[None]})
    np.testing.assert_allclose(alone[0], y.values[2][y.mask[2]], atol=1e-6)
    empty = x["source"]._replace(mask=x["source"].mask & (np.arange(BATCH) != 1)[:, None])

    def total(params, source):
        y, _ = layer.apply(params, state, {"source": empty._replace(values=source), "target": target_alone})
        return jnp.sum(jnp.sin(y)), y

    target_alone = x["target"].values
    (_, y), slopes = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x["source"].values)
    np.testing.assert_allclose(y[1], np.broadcast_to(params["out"]["bias"], (TIME, D)), atol=1e-7)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(slopes)) and not np.any(slopes[1][1])


def translation(dtype=jnp.float32, encoder=2, **options):
    """An encoder-decoder of two and one blocks, its parameters, sources and targets padded with token 0."""
    block = fnn.models.Block(HEADS, activation="relu", **options)
    net = fnn.models.translator(VOCABULARY, 1, D, block, encoder_depth=encoder, padding=0)
    rng = np.random.default_rng(0)
    source, target = (rng.integers(1, VOCABULARY, size=(BATCH, n), dtype=np.int32) for n in (SPAN, TIME))
    x = {
        "source": as_jax(np.where(np.arange(SPAN) < np.array([6, 2, 4])[:, None], source, 0)),
        "target": as_jax(np.where(np.arange(TIME) < np.array([3, 5, 1])[:, None], target, 0)),
    }
    params, state = prepared(net, x)
    return net, jax.tree.map(lambda a: as_jax(np.asarray(a, dtype)), params), state, x


class Weights:
    """Hand out our arrays in the order in which the textbook's model needs them: encoder blocks, then the decoder's."""

    def __init__(self, params, pre):
        layers = by_layer(fnn.tree.rows(params["body"]))
        norms = [a for a in layers if "scale" in a]
        affine = [a for a in layers if "kernel" in a]
        self.norms, self.affine, self.pre = norms, affine, pre

    def attention(self):
        out_first = {name: self.affine.pop(0) for name in ("key", "out", "query", "value")}
        return {name: out_first[name] for name in ("query", "key", "value", "out")}

    def norm(self, h):
        p = self.norms.pop(0)
        return nn.LayerNorm(1e-6, dtype=h.dtype, use_fast_variance=False).apply({"params": p}, h)

    def part(self, h, f):
        return h + f(self.norm(h)) if self.pre else self.norm(h + f(h))

    def attend(self, h, source, mask):
        module = nn.MultiHeadDotProductAttention(HEADS, dtype=h.dtype)
        return module.apply(in_flax(self.attention()), h, source, source, mask=mask)

    def forward(self, h):
        a, b = self.affine.pop(0), self.affine.pop(0)
        return jax.nn.relu(h @ a["kernel"] + a["bias"]) @ b["kernel"] + b["bias"]


@pytest.mark.parametrize(
    ("norm_position", "dtype", "atol"),
    [("pre", jnp.float32, 1e-5), ("pre", jnp.float64, 1e-10), ("post", jnp.float64, 1e-10)],
    ids=["pre_f32", "pre_f64", "post_f64"],
)
def test_encoder_decoder_equals_flax(norm_position, dtype, atol):
    with jax.enable_x64(dtype == jnp.float64):
        net, params, state, x = translation(dtype, norm_position=norm_position, positions="none")
        logits, _ = jax.jit(net.apply)(params, state, x)
        real, mask = x["source"] != 0, x["target"] != 0

        @jax.jit
        def textbook(params):
            w, table = Weights(params, norm_position == "pre"), params["embedding"]
            h = table[x["source"]]
            for _ in range(2):
                h = w.part(h, lambda a: w.attend(a, a, real[:, None, None, :]))
                h = w.part(h, w.forward)
            source = w.norm(h) if w.pre else h
            h = table[x["target"]]
            h = w.part(h, lambda a: w.attend(a, a, nn.make_causal_mask(mask, dtype=bool) & mask[:, None, None, :]))
            h = w.part(h, lambda a: w.attend(a, source, real[:, None, None, :]))
            h = w.part(h, w.forward)
            h = w.norm(h) if w.pre else h
            assert not w.norms and not w.affine
            return jnp.where(mask[..., None], h @ table.T, 0)

        expected = textbook(params)
        assert logits.shape == (BATCH, TIME, VOCABULARY) and logits.dtype == dtype
        np.testing.assert_allclose(logits, expected, rtol=0, atol=3 * atol)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_decoder_block_equals_pytorch(norm_position):
    torch = pytest.importorskip("torch")
    x = drawn(source_width=D)
    norm, pre = fnn.layer_norm(eps=1e-5), norm_position == "pre"

    def part(name, *inner, add_to=None):
        first = fnn.branches({"source": fnn.serial(), "target": norm}) if add_to else norm
        branch = fnn.residual(fnn.serial(*([first] if pre else []), *inner), add_to=add_to)
        last = first if add_to else norm
        return [branch] if pre else [branch, last]

    def target(*layers):
        return fnn.branches({"source": fnn.serial(), "target": fnn.serial(*layers)})

    see, forward = (
        fnn.attention(HEADS, causal=True),
        fnn.serial(fnn.dense(16), fnn.activation("relu"), fnn.dense(D)),
    )
    block = fnn.serial(
        target(*part("see", see)),
        *part("cross", fnn.cross_attention(HEADS), add_to="target"),
        target(*part("forward", forward)),
    )
    params, state = prepared(block, x)
    module = torch.nn.TransformerDecoderLayer(
        D, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_position == "pre"
    )
    layers = by_layer(fnn.tree.rows(params))
    norms, affine = ([a for a in layers if name in a] for name in ("scale", "kernel"))
    weights = {}
    for name in ("self_attn", "multihead_attn"):
        found = dict(zip(("key", "out", "query", "value"), (affine.pop(0) for _ in range(4)), strict=True))
        projections = [found[n] for n in ("query", "key", "value")]
        weights[f"{name}.in_proj_weight"] = np.concatenate([p["kernel"].T for p in projections])
        weights[f"{name}.in_proj_bias"] = np.concatenate([p["bias"] for p in projections])
        weights[f"{name}.out_proj.weight"] = found["out"]["kernel"].T
        weights[f"{name}.out_proj.bias"] = found["out"]["bias"]
    for name, p in zip(("linear1", "linear2"), affine, strict=True):
        weights |= {f"{name}.weight": p["kernel"].T, f"{name}.bias": p["bias"]}
    for name, p in zip(("norm1", "norm2", "norm3"), norms, strict=True):
        weights |= {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}
    module.load_state_dict({name: torch.tensor(np.array(a)) for name, a in weights.items()})
    masks = {name: torch.tensor(~np.array(a.mask)) for name, a in x.items()}
    with torch.no_grad():
        theirs = module(
            *(torch.tensor(np.array(x[name].values)) for name in ("target", "source")),
            tgt_mask=torch.triu(torch.ones(TIME, TIME, dtype=torch.bool), 1),
            tgt_key_padding_mask=masks["target"],
            memory_key_padding_mask=masks["source"],
        )
    y, _ = block.apply(params, state, x)
    real = np.array(y["target"].mask)
    np.testing.assert_allclose(y["target"].values[real], theirs.numpy()[real], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "rotary", "encoder": 1},
        {"positions": "learned", "longest": 10, "norm_position": "post", "unroll": 1},
    ],
    ids=["rotary_pre", "learned_post_scanned"],
)
def test_decoding_equals_the_forward_pass_token_by_token(options):
    net, params, state, x = translation(**options)
    # So that padding is never the likeliest token.
    params["embedding"] = params["embedding"] * (np.arange(VOCABULARY) > 0)[:, None]
    apply = jax.jit(net.apply)
    whole, _ = apply(params, state, x)
    memory, parts = fnn.memory.init_cache(state, BATCH, TIME, source_length=SPAN), []
    for i in range(TIME):
        source = x["source"] if i == 0 else x["source"][:, :0]  # read once, and held from then on
        part, memory = apply(params, memory, {"source": source, "target": x["target"][:, i : i + 1]})
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    steps, rows, target = 4, np.arange(BATCH), np.asarray(x["target"])
    lengths = np.sum(target != 0, axis=1)
    ours = fnn.generate(net, params, state, x | {"target": fnn.Masked(target, target != 0)}, steps)
    tokens, answers = np.pad(target, ((0, 0), (0, steps))), []
    for t in range(steps):
        logits, _ = apply(params, state, {"source": x["source"], "target": tokens})
        answers.append(np.argmax(np.asarray(logits)[rows, lengths + t - 1], axis=-1))
        tokens[rows, lengths + t] = answers[-1]
        assert np.all(answers[-1] != 0)
    np.testing.assert_array_equal(ours, np.stack(answers, axis=1))
    # The net itself takes token 0 as padding: the mask of the prompt need not say so, nor stand on one side.
    left = np.stack([np.roll(row, TIME - n) for row, n in zip(target, lengths, strict=True)])
    for padded in (np.pad(target, ((0, 0), (0, 1))), np.pad(left, ((0, 0), (1, 0))), np.insert(left, 1, 0, axis=1)):
        np.testing.assert_array_equal(fnn.generate(net, params, state, x | {"target": padded}, steps), ours)


def test_gradient_flow_of_an_encoder_decoder_equals_float64():
    net, params, state, x = translation(encoder=1, taps=True)
    y = np.where(x["target"] == 0, -1, x["target"])
    loss = fnn.losses.sequence_cross_entropy
    flow = fnn.gradient_flow(net, (params, state), (x, y), loss=loss)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: as_jax(np.asarray(a, np.float64)), (params, state))

        def total(params, state):
            outputs, new = net.apply(params, state, x, train=True)
            return jnp.mean(loss(outputs, y)), new

        (grads, news), new = jax.jit(jax.grad(total, (0, 1), has_aux=True))(*wide)
        errors = {row.path: row.value for row in fnn.taps.read(new, news) if row.quantity == "log10_error"}
        logs = {path: np.log10(np.linalg.norm(leaf)) for path, leaf in fnn.tree.rows(grads)}
    got = {row.path: row.value for row in flow.rows if row.quantity == "log10_error"}
    assert len(got) == 2 + 3 + 1 and got == pytest.approx(errors, abs=1e-4)
    by_path = {row.path: row.value for row in flow.rows if row.quantity in ("log10_kernel", "log10_embedding")}
    assert len(by_path) == 6 + 10 + 1
    for path, value in by_path.items():
        assert value == pytest.approx(logs[path], abs=1e-4), path


def test_refusals():
    x, layer = drawn(), fnn.cross_attention(HEADS)
    params, state = prepared(layer, x)
    source, target = x["source"], x["target"]
    cases = [
        (
            {"memory": source, "target": target},
            r"dict with the names \['source', 'target'\], got \['memory', 'target'\]",
        ),
        (target.values, r"dict with the names \['source', 'target'\], got float32\[3,5,8\]"),
        (
            {"source": source.values[..., :3], "target": target},
            r"the source must be float32\[batch, ..., 4\], as at init, got",
        ),
        (
            {"source": source, "target": target.values[..., :6]},
            r"the target must be float32\[batch, ..., 8\], as at init, got",
        ),
        ({"source": source.values[:2], "target": target}, "source and target must have the same batch size"),
        (
            {"source": source._replace(mask=target.mask), "target": target},
            r"cross_attention: a mask must be bool\[batch",
        ),
    ]
    for bad, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            jax.eval_shape(layer.apply, params, state, bad)
    with pytest.raises(ValueError, match="heads must divide the width, got 3 heads"):
        fnn.cross_attention(3).init(KEY, x)
    with pytest.raises(ValueError, match="cross_attention needs the source's length, got source_length=None"):
        fnn.memory.init_cache(state, BATCH, TIME)
    with pytest.raises(ValueError, match="the cache is for 3 sources of 7, which must come whole .*, got 3 of 6"):
        jax.eval_shape(layer.apply, params, fnn.memory.init_cache(state, BATCH, TIME, source_length=7), x)
    with pytest.raises(
        ValueError, match=r"residual: the input must be a dict with the name 'target', got float32\[3,5,8\]"
    ):
        fnn.residual(layer, add_to="target").init(KEY, target.values)
    net, params, state, x = translation()
    with pytest.raises(ValueError, match=r"branches: the input must be a dict with the names \['source', 'target'\]"):
        jax.eval_shape(net.apply, params, state, {"words": x["source"], "target": x["target"]})
    with pytest.raises(
        ValueError, match=r"generate: the input must be a dict with the names \['source', 'target'\], got \['source'\]"
    ):
        fnn.generate(net, params, state, {"source": x["source"]}, 3)
    with pytest.raises(ValueError, match=r"tied: the body's output: the input must be a sequence"):
        fnn.tied(5, D, fnn.serial()).init(KEY, x)
        given = {"embedding": np.ones((11, D)), "body": ()}, {"body": ()}, x
        jax.eval_shape(fnn.tied(5, D, fnn.serial()).apply, *given)
