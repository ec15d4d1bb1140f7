"""Attention, positions, embeddings and decoding: Flax and PyTorch on the same weights, masks, the cache."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started

import fnn
from fnn import lowering
from fnn.layers.attention import rotate

BATCH, TIME, D, HEADS = 3, 6, 8, 2
LENGTHS = jnp.array([6, 2, 4])
KEY = jax.random.key(0)


def drawn(dtype=jnp.float32, time=TIME):
    return as_jax(np.random.default_rng(0).normal(size=(BATCH, time, D)), dtype)


def prepared(layer, x):
    return started(layer.init, x)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)], ids=["f32", "f64"])
def test_attention_equals_flax_with_masks(causal, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        x, layer = drawn(dtype), fnn.attention(HEADS, causal=causal)
        params, state = prepared(layer, x)
        real = jnp.arange(TIME) < LENGTHS[:, None]
        module = nn.MultiHeadDotProductAttention(HEADS, dtype=dtype, param_dtype=dtype)

        def ours(params, x):
            y, _ = layer.apply(params, state, fnn.Masked(x, real))
            return jnp.sum(jnp.sin(y.values)), y.values

        def reference(params, x):
            named = jax.tree.map(lambda a: a.reshape(*a.shape[:-1], HEADS, D // HEADS), params)
            named["out"] = {
                "kernel": params["out"]["kernel"].reshape(HEADS, D // HEADS, D),
                "bias": params["out"]["bias"],
            }
            mask = nn.make_attention_mask(jnp.ones_like(real), real)
            if causal:
                mask = nn.combine_masks(mask, nn.make_causal_mask(real))
            y = module.apply({"params": named}, x, mask=mask)
            y = jnp.where(real[..., None], y, 0)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(params, x)
        (_, expected), theirs = jax.jit(jax.value_and_grad(reference, argnums=(0, 1), has_aux=True))(params, x)
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=10 * tolerance), gradients, theirs)


def test_attention_equals_pytorch():
    torch = pytest.importorskip("torch")
    x, layer = drawn(), fnn.attention(HEADS)
    params, state = prepared(layer, x)
    y, _ = layer.apply(params, state, fnn.Masked.of_lengths(x, LENGTHS))
    module = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)
    names = ("query", "key", "value")
    module.load_state_dict(
        {
            "in_proj_weight": torch.tensor(np.concatenate([np.array(params[n]["kernel"]).T for n in names])),
            "in_proj_bias": torch.tensor(np.concatenate([np.array(params[n]["bias"]) for n in names])),
            "out_proj.weight": torch.tensor(np.array(params["out"]["kernel"]).T),
            "out_proj.bias": torch.tensor(np.array(params["out"]["bias"])),
        }
    )
    padding = np.arange(TIME) >= np.array(LENGTHS)[:, None]
    inputs = torch.tensor(np.array(x))
    with torch.no_grad():
        theirs, _ = module(inputs, inputs, inputs, key_padding_mask=torch.tensor(padding), need_weights=False)
    np.testing.assert_allclose(y.values[~padding], theirs.numpy()[~padding], atol=1e-5)


def test_grouped_heads_share_keys_and_values():
    x = drawn()
    shared, full = fnn.attention(4, kv_heads=2), fnn.attention(4)
    params, state = prepared(shared, x)

    def spread(a):
        return np.repeat(np.reshape(a, (*a.shape[:-1], 2, D // 4)), 2, axis=-2).reshape(*a.shape[:-1], D)

    wide = params | {name: jax.tree.map(spread, params[name]) for name in ("key", "value")}
    ours, expected = (jax.jit(net.apply)(p, state, x)[0] for net, p in ((shared, params), (full, wide)))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_rotary_positions_turn_complex_pairs_and_see_differences_alone():
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 6)).astype(np.float32)
    places = np.arange(10).reshape(2, 5)
    pairs = x[..., :3] + 1j * x[..., 3:]
    turned = pairs * np.exp(1j * places[:, :, None, None] * 10_000.0 ** (-np.arange(3) / 3))
    ours = jax.jit(rotate)(x, places)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
    q, k = as_jax(x[:1, :1]), as_jax(x[1:, :1])

    @jax.jit
    def product(p, q_place):
        return jnp.sum(rotate(q, jnp.array([[q_place]])) * rotate(k, jnp.array([[p]])))

    np.testing.assert_allclose(product(3, 7), product(103, 107), rtol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_padding_changes_nothing_wherever_it_stands(positions):
    learned = [fnn.positions(9)] if positions == "learned" else []
    net = fnn.serial(*learned, fnn.residual(fnn.attention(HEADS, causal=True, rotary=not learned)))
    x = drawn()
    params, state = prepared(net, x)
    apply = jax.jit(net.apply)
    y, _ = apply(params, state, x)
    keep = np.array([1, 2, 4, 5, 7, 8])
    padded, mask = np.full((BATCH, 9, D), 1e2, np.float32), np.zeros((BATCH, 9), bool)
    padded[:, keep], mask[:, keep] = x, True
    holed, _ = apply(params, state, fnn.Masked(padded, mask))
    np.testing.assert_allclose(np.asarray(holed.values)[:, keep], y, atol=2e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_pieces_equal_the_whole_and_decoding_equals_recomputing(positions):
    longest = 12 if positions == "learned" else None
    net = fnn.models.decoder(11, 1, D, fnn.models.Block(HEADS, positions=positions, longest=longest), padding=0)
    tokens = as_jax(np.random.default_rng(0).integers(1, 11, size=(BATCH, TIME)))
    params, state = prepared(net, tokens)
    apply = jax.jit(net.apply)
    whole, _ = apply(params, state, tokens)
    memory, parts = fnn.memory.init_cache(state, BATCH, TIME), []
    for piece in np.split(np.asarray(tokens), [1], axis=1):
        part, memory = apply(params, memory, piece)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    # Prompts of different lengths: each example goes on behind its own last token, as if it stood alone.
    prompt = jnp.where(jnp.arange(TIME) < LENGTHS[:, None], tokens, 0)
    ours = fnn.generate(net, params, state, fnn.Masked.of_lengths(prompt, LENGTHS), 5)
    np.testing.assert_array_equal(ours, recomputed(apply, params, state, prompt, LENGTHS, 5))
    end = int(ours[0, 1])
    stopped = fnn.generate(net, params, state, tokens[:1], 5, eos=end)
    np.testing.assert_array_equal(stopped[0, 1:] if int(ours[0, 0]) != end else stopped[0], end)


def test_generate_with_a_recurrent_net():
    net = fnn.serial(fnn.embed(7, 4), fnn.lstm(5), fnn.dense(7))
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    params, state = prepared(net, tokens)
    ours = fnn.generate(net, params, state, tokens, 4)
    np.testing.assert_array_equal(ours, recomputed(jax.jit(net.apply), params, state, tokens, jnp.array([3, 3]), 4))


def decoders():
    """Nets that make the mask themselves, of token 0: inside `tied`, and before layers of either kind."""
    return {
        "tied": fnn.models.decoder(11, 1, D, fnn.models.Block(HEADS), padding=0),
        "learned_scanned": fnn.models.decoder(
            11,
            2,
            D,
            fnn.models.Block(HEADS, positions="learned", longest=13, unroll=1, norm_position="post"),
            padding=0,
        ),
        "recurrent": fnn.models.rnn(1, D, 11, cell="gru", vocabulary=11, padding=0, every_step=True),
        "masked_logits": fnn.serial(fnn.embed(11, D, padding=0), fnn.repeat(fnn.lstm(D), 2), fnn.dense(11)),
    }


@pytest.mark.parametrize("name", decoders())
def test_generate_continues_behind_the_last_real_token_wherever_padding_stands(name):
    net = decoders()[name]
    tokens = np.random.default_rng(0).integers(1, 11, size=(BATCH, TIME))
    params, state = jax.jit(net.init)(KEY, tokens)
    params = jax.tree.map(lambda a: 3 * np.asarray(a), params)  # so that what is predicted depends on what was read
    lengths, rows = np.array([6, 2, 2]), [tokens[:1], tokens[1:, :2]]
    alone = np.concatenate([fnn.generate(net, params, state, row, 4) for row in rows])
    assert len(set(map(tuple, alone))) > 1
    right, left, holes = (np.zeros((BATCH, 9), int) for _ in range(3))
    for i, n in enumerate(lengths):
        right[i, :n] = left[i, 9 - n :] = tokens[i, :n]
        holes[i, np.sort(np.random.default_rng(i).permutation(9)[:n])] = tokens[i, :n]
    every = fnn.generate(net, params, state, np.concatenate([right, left, holes]), 4)
    np.testing.assert_array_equal(every, np.concatenate([alone] * 3))
    noise = fnn.Masked(np.where(holes == 0, 7, holes), holes != 0)  # the prompt's mask is heard too
    np.testing.assert_array_equal(fnn.generate(net, params, state, noise, 4), alone)
    with pytest.raises(ValueError, match="each prompt must have a real token, got none in example 3"):
        fnn.generate(net, params, state, np.concatenate([right, left * 0, holes]), 4)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_net_that_predicts_padding_goes_on_with_padding(padding):
    """The last real token stays the same, and so does what follows it."""
    net, other = fnn.serial(fnn.embed(5, 2, padding=padding), fnn.rnn(1), fnn.drop_mask(), fnn.dense(5)), 1
    prompt = np.array([[1, 2, padding], [4, 1, 2]])
    params, state = prepared(net, prompt)
    eye = np.eye(5, dtype=np.float32)
    # 1 where real, 0 at padding
    recurrent = jax.tree.map(np.zeros_like, jax.device_get(params[1])) | {"bias": np.float32([5])}
    head = {"kernel": 9 * eye[None, padding], "bias": eye[other]}
    ours = fnn.generate(net, (params[0], recurrent, (), head), state, prompt, 3)
    np.testing.assert_array_equal(ours, np.full((2, 3), padding))


def recomputed(apply, params, state, prompt, lengths, steps):
    """Decode without a memory: the whole sequence anew for every token."""
    tokens, answers = np.pad(prompt, ((0, 0), (0, steps))), []
    rows, lengths = np.arange(len(lengths)), np.asarray(lengths)
    for t in range(steps):
        logits, _ = apply(params, state, fnn.Masked(tokens, np.arange(tokens.shape[1]) < lengths[:, None] + t))
        logits = np.asarray(logits.values if isinstance(logits, fnn.Masked) else logits)
        answers.append(np.argmax(logits[rows, lengths + t - 1], axis=-1))
        tokens[rows, lengths + t] = answers[-1]
    return np.stack(answers, axis=1)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_transformer_by_hand(norm_position):
    block = fnn.models.Block(HEADS, norm_position=norm_position, positions="learned", longest=TIME, unroll=1)
    net = fnn.models.decoder(9, 1, D, block)
    tokens = as_jax(np.random.default_rng(0).integers(0, 9, size=(BATCH, TIME)))
    params, state = prepared(net, tokens)
    logits, _ = jax.jit(net.apply)(params, state, tokens)
    params, tokens = jax.device_get((params, tokens))
    table = params["embedding"]

    def norm(h, p):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        return h * p["scale"] + p["bias"]

    h = table[tokens] + params["body"][0]["embedding"]
    attend = fnn.attention(HEADS, causal=True)
    weights = next(w for w in _subtrees(params) if isinstance(w, dict) and {"query", "out"} <= w.keys())
    weights = jax.tree.map(lambda a: a[0], weights)
    norms, denses = _found(params, {"scale", "bias"}), _found(params, {"kernel", "bias"}, within="feed_forward")

    def forward(x):
        a, b = denses
        return np.asarray(jax.nn.gelu(x @ a["kernel"] + a["bias"], approximate=False)) @ b["kernel"] + b["bias"]

    def see(x):
        return np.asarray(jax.jit(attend.apply)(weights, prepared(attend, x)[1], x)[0])

    if norm_position == "pre":
        h = h + see(norm(h, norms[0]))
        h = h + forward(norm(h, norms[1]))
        h = norm(h, norms[2])
    else:
        h = norm(h + see(h), norms[0])
        h = norm(h + forward(h), norms[1])
    np.testing.assert_allclose(logits, h @ table.T, atol=2e-5)


def _subtrees(tree):
    yield tree
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else []
    inner = [tree.blocks] if isinstance(tree, fnn.tree.Stacked) else inner
    for node in inner:
        yield from _subtrees(node)


def _found(tree, names, within=None):
    """List all dicts of exactly these arrays, in order, the depth axis of stacked ones taken off."""
    found = []
    for path, leaf in zip(fnn.tree.paths(tree), jax.tree.leaves(tree), strict=True):
        parent, _, name = path.rpartition("/")
        if within and within not in path:
            continue
        if not found or found[-1][0] != parent:
            found.append((parent, {}))
        found[-1][1][name] = leaf[0] if "[:]" in path else leaf
    return [arrays for _, arrays in found if arrays.keys() == names]


def test_refusals():
    x, layer = drawn(), fnn.attention(HEADS, causal=True)
    params, state = prepared(layer, x)
    with pytest.raises(ValueError, match=r"heads must divide the width, got 3 heads and float32\[3,6,8\]"):
        fnn.attention(3).init(KEY, x)
    with pytest.raises(ValueError, match="kv_heads must divide heads, got 3 and 4"):
        fnn.attention(4, kv_heads=3)
    with pytest.raises(ValueError, match="even quotient"):
        fnn.attention(8, rotary=True).init(KEY, x)
    with pytest.raises(ValueError, match=r"bool\[batch, time\]"):
        jax.eval_shape(layer.apply, params, state, fnn.Masked(x, np.ones((BATCH, TIME, TIME), bool)))
    with pytest.raises(ValueError, match="looks ahead"):
        fnn.memory.init_cache(fnn.attention(HEADS).init(KEY, x)[1], BATCH, 4)
    with pytest.raises(ValueError, match="the cache is for 3 sequences of 4 positions, got 3 of 6"):
        jax.eval_shape(layer.apply, params, fnn.memory.init_cache(state, BATCH, 4), x)
    # Beyond the memory's end, position by position, the values are NaN and never those of another position.
    memory = fnn.memory.init_cache(state, BATCH, 4)
    apply = jax.jit(layer.apply)
    _, memory = apply(params, memory, x[:, :3])
    y, _ = apply(params, memory, x[:, 3:])
    np.testing.assert_array_equal(np.isnan(y).all(-1), [[False, True, True]] * BATCH)
    with pytest.raises(ValueError, match=r"positions: a sequence must have at most 4 positions, got float32\[3,6,8\]"):
        fnn.positions(4).init(KEY, x)
    net = fnn.serial(fnn.embed(5, D), fnn.positions(8), fnn.attention(HEADS, causal=True))
    tokens = np.ones((2, 4), int)
    params, state = prepared(net, tokens)
    with pytest.raises(ValueError, match="length must be at most the net's 8 positions, got 9"):
        fnn.generate(net, params, state, tokens, 5)
    with pytest.raises(TypeError, match="must be tokens, int"):
        fnn.embed(4, D).init(KEY, x)
    for make in (lambda: fnn.embed(4, D, padding=4), lambda: fnn.tied(4, D, fnn.serial(), padding=4)):
        with pytest.raises(ValueError, match=r"(embed|tied): padding must lie in 0..3, got 4"):
            make()
    with pytest.raises(ValueError, match="prompt must be int"):
        fnn.generate(net, params, state, jnp.ones((2, 4)), 3)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"kv_heads": 1}, {"causal": True, "window": 9}],
    ids=["causal", "grouped", "window"],
)
def test_half_precision_is_near_float32_in_values_gradients_and_single_examples(options):
    """On a GPU this is cuDNN's kernel: heads of 16, lengths of 64, no mask."""
    layer, rng = fnn.attention(2, **options), np.random.default_rng(0)
    x, weights = (as_jax(rng.normal(size=(3, 64, 32)), jnp.float32) for _ in range(2))
    params, state = started(layer.init, x)

    def loss(params, x, weights, dtype):
        y, _ = layer.apply(params, state, x.astype(dtype))
        return jnp.mean(y.astype(jnp.float32) * weights), y

    @functools.partial(jax.jit, static_argnames="dtype")
    def measured(params, x, weights, dtype):
        (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, weights, dtype)
        one = functools.partial(loss, dtype=dtype)
        single = fnn.per_example(lambda p, example: one(p, *(a[None] for a in example))[0])(params, (x, weights))
        return y, grads[1], grads[0], single.norms()

    exact, narrow = (measured(params, x, weights, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    if lowering.platform() == "gpu":
        assert "cudnn" in measured.lower(params, x, weights, jnp.bfloat16).as_text()
    assert narrow[0].dtype == jnp.bfloat16
    for part, wanted in zip(narrow, exact, strict=True):  # the keys' bias has a gradient of rounding errors
        largest = max(float(jnp.max(jnp.abs(a))) for a in jax.tree.leaves(wanted))
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=0, atol=0.03 * largest)
