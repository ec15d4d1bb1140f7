"""What attention sees: windows and masks against a loop in NumPy in float64, in pieces and at once, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, begun, started

import fnn

BATCH, TIME, D, HEADS = 3, 7, 8, 4
KEY = jax.random.key(0)
REAL = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0]], bool)
RNG = np.random.default_rng(0)
TABLE = RNG.random((9, 9)) < 0.4
PAIRS = RNG.random((BATCH, TIME, TIME)) < 0.4
PAIRS[0, 3] = False


def rule(t, s):
    return (t // 3 == s // 3) | (s == 0)


def apart(t, s):
    return (t + s) % 3 == 1


VIEWS = {
    "window": {"window": 2},
    "causal_window": {"causal": True, "window": 2},
    "itself": {"window": 0},
    "rule": {"mask": rule},
    "causal_rule": {"causal": True, "window": 3, "mask": apart},
    "table": {"mask": TABLE},
    "pairs": {},
    "causal_pairs": {"causal": True},
}


def drawn(*shape):
    return RNG.normal(size=shape)


def prepared(layer, x):
    return started(layer.init, x)


def sees(options, pairs, i, t, s, t_place, s_place):
    """Whether example i's position t sees s, of which `t_place` and `s_place` count the real positions before."""
    mask = options.get("mask")
    known = True if mask is None else mask[t_place, s_place] if isinstance(mask, np.ndarray) else mask(t_place, s_place)
    return (
        (not options.get("causal") or s_place <= t_place)
        and abs(t_place - s_place) <= options.get("window", 100)
        and known
        and (pairs is None or pairs[i, t, s])
    )


def reference(params, target, source, real_target, real_source, options, pairs, kv):
    """Attention, position by position, in float64; a position that sees nothing gets the bias of out."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def heads(name, x, n):
        return (x @ p[name]["kernel"] + p[name]["bias"]).reshape(*x.shape[:2], n, -1)

    q = heads("query", target, HEADS)
    k, v = (np.repeat(heads(name, source, kv), HEADS // kv, axis=2) for name in ("key", "value"))
    y = np.zeros_like(q)
    places = [np.cumsum(real, axis=1) - 1 for real in (real_target, real_source)]
    for i, t in np.argwhere(real_target):
        seen = [
            s for s in np.flatnonzero(real_source[i]) if sees(options, pairs, i, t, s, places[0][i, t], places[1][i, s])
        ]
        if not seen:
            continue
        for h in range(HEADS):
            scores = k[i, seen, h] @ q[i, t, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            y[i, t, h] = weights @ v[i, seen, h] / weights.sum()
    y = y.reshape(target.shape) @ p["out"]["kernel"] + p["out"]["bias"]
    return np.where(real_target[..., None], y, 0)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", VIEWS)
def test_what_is_seen_equals_a_loop_in_float64(name, padded):
    """Groups of heads in float32 take the other way through JAX (`lowering.attention`)."""
    x, options = drawn(BATCH, TIME, D), VIEWS[name]
    real = REAL if padded else np.ones_like(REAL)
    pairs = PAIRS if "pairs" in name else None
    for kv, dtype, atol in ((HEADS, jnp.float32, 1e-5), (2, jnp.float32, 1e-5), (HEADS, jnp.bfloat16, 0.04)):
        layer = fnn.attention(HEADS, kv_heads=kv, **options)
        given = as_jax(x, dtype)
        given = fnn.Masked(given.at[~real].set(jnp.nan), as_jax(real)) if padded else given
        given = given if pairs is None else {"target": given, "mask": as_jax(pairs)}
        params, state = prepared(layer, given)

        @jax.jit
        def run(params, x, layer=layer, state=state):
            def value(params):
                y, _ = layer.apply(params, state, x)
                return jnp.sum(jnp.sin(y.values if isinstance(y, fnn.Masked) else y).astype(jnp.float32)), y

            return jax.value_and_grad(value, has_aux=True)(params)

        (_, y), slopes = run(params, given)
        y = y.values if padded else y
        exact = np.asarray(as_jax(x, dtype), np.float64)
        expected = reference(params, exact, exact, real, real, options, pairs, kv)
        assert y.dtype == dtype and all(np.isfinite(a).all() for a in jax.tree.leaves(slopes))
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=atol)
        blind = [
            (i, t)
            for i, t in np.argwhere(real)
            if not any(
                sees(options, pairs, i, t, s, *(np.cumsum(real, 1) - 1)[i, [t, s]]) for s in np.flatnonzero(real[i])
            )
        ]
        assert bool(blind) == (name in ("causal_rule", "pairs", "causal_pairs") or (name == "table" and padded)), blind
        for place in blind:
            np.testing.assert_array_equal(y[place], params["out"]["bias"].astype(dtype))


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": apart}, {"mask": TABLE}, {"mask": TABLE, "pairs": True}],
    ids=("plain", "function", "table", "pairs"),
)
def test_cross_attention_sees_by_the_positions_of_both(options):
    target, source = drawn(BATCH, TIME, D), drawn(BATCH, 5, 6)
    layer = fnn.cross_attention(HEADS, mask=options.get("mask"))
    pairs = PAIRS[:, :, :5] if "pairs" in options else None
    real = REAL[::-1, 2:]
    x = {
        "source": fnn.Masked(np.float32(source), real),
        "target": fnn.Masked(np.float32(target), REAL),
    }
    x |= {} if pairs is None else {"mask": pairs}
    params, state = prepared(layer, x)
    apply = jax.jit(layer.apply)
    y, _ = apply(params, state, x)
    options = {"mask": options["mask"]} if "mask" in options else {}
    expected = reference(params, target, source, REAL, real, options, pairs, HEADS)
    np.testing.assert_allclose(y.values, expected, rtol=0, atol=1e-5)
    # In pieces: the source at once, the target in two, its padding too.
    memory, parts = fnn.memory.init_cache(state, BATCH, TIME, source_length=5), []
    for a, b in ((0, 3), (3, TIME)):
        piece = {"source": x["source"], "target": fnn.Masked(*(part[:, a:b] for part in x["target"]))}
        if a:
            piece["source"] = np.zeros((BATCH, 0, 6), np.float32)
        piece |= {} if pairs is None else {"mask": x["mask"][:, a:b]}
        part, memory = apply(params, memory, piece)
        parts.append(part.values)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"window": 2}, {"mask": apart}, {"mask": TABLE, "window": 3}], ids=("window", "function", "table")
)
def test_pieces_equal_the_whole(options):
    layer = fnn.serial(
        fnn.residual(fnn.attention(HEADS, causal=True, rotary=True, **options)),
        fnn.attention(2, causal=True, **options),
    )
    x = jnp.float32(drawn(BATCH, TIME, D))
    params, state = prepared(layer, x)
    apply = jax.jit(layer.apply)
    for given in (x, fnn.Masked(x, as_jax(REAL))):
        whole, _ = apply(params, state, given)
        memory, parts = fnn.memory.init_cache(state, BATCH, TIME), []
        for a, b in ((0, 3), (3, 4), (4, TIME)):
            piece, memory = apply(params, memory, jax.tree.map(lambda leaf, a=a, b=b: leaf[:, a:b], given))
            parts.append(piece)
        parts = jax.tree.map(lambda *a: np.concatenate(a, 1), *parts)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_decoding_sees_as_far_as_the_window():
    """Of tokens that no window reaches any more, what is generated does not depend."""
    net = fnn.serial(
        fnn.embed(9, D, padding=0), fnn.attention(HEADS, causal=True, window=2), fnn.drop_mask(), fnn.dense(9)
    )
    prompt = RNG.integers(1, 9, (BATCH, TIME))
    params, state = prepared(net, prompt)
    params = jax.tree.map(lambda a: 3 * np.asarray(a), params)
    params[3]["bias"][0] = -1e3  # padding is never predicted
    ours = fnn.generate(net, params, state, prompt, 3)
    np.testing.assert_array_equal(fnn.generate(net, params, state, prompt[:, -3:], 3), ours)
    left = np.concatenate([np.zeros((BATCH, 2), int), prompt], 1)
    np.testing.assert_array_equal(fnn.generate(net, params, state, left, 3), ours)
    tokens, apply = prompt, jax.jit(net.apply)
    for t in range(3):
        logits, _ = apply(params, state, tokens)
        tokens = np.concatenate([tokens, np.argmax(logits[:, -1:], -1)], 1)
        np.testing.assert_array_equal(tokens[:, -1], ours[:, t])


def test_a_net_trains_on_masks_that_come_with_the_data_and_is_watched():
    """Through `repeat`, `fit`'s batches, and single examples' gradients; `watch` reads the softmax of each layer."""
    same = {"mask": fnn.serial()}
    block = fnn.serial(
        fnn.residual(fnn.serial(fnn.branches({"target": fnn.layer_norm(), **same}), fnn.attention(2)), add_to="target"),
        fnn.branches({"target": fnn.residual(fnn.dense(D)), **same}),
    )
    head = fnn.branches({"target": fnn.serial(fnn.global_avg_pool(), fnn.dense(2)), **same})
    net = fnn.serial(fnn.repeat(block, 2), head, fnn.activation(lambda x: x["target"]))
    x = {"target": np.float32(drawn(12, TIME, D)), "mask": RNG.random((12, TIME, TIME)) < 0.7}
    y = RNG.integers(0, 2, 12)
    optimizer = optax.adam(1e-2)
    state = begun(net, optimizer, x)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
    state, history = fnn.fit(step, state, (x, y), epochs=2, batch_size=4, key=KEY)
    assert np.isfinite(history.train["loss"]).all()

    def loss(params, batch):
        logits, _ = net.apply(params, state.net_state, batch[0])
        return fnn.losses.cross_entropy(logits, batch[1]).mean()

    flow = fnn.watch(loss, groups="attention")(state.params, (x, y))
    found = {name: value for name, value in flow.flat().items() if "entropy" in name}
    assert len(found) == 4 and all(0 < value < np.log(TIME) for value in found.values()), found


def test_refusals():
    x = jnp.float32(drawn(BATCH, TIME, D))
    both = {"target": x, "mask": as_jax(PAIRS)}
    layer = fnn.attention(HEADS, causal=True)
    params, state = prepared(layer, both)
    for bad in (both | {"mask": PAIRS[:, :3]}, both | {"mask": np.float32(PAIRS)}, both | {"mask": PAIRS[0]}):
        with pytest.raises(
            ValueError, match=r"attention: the mask must be bool\[3, 7, 7\], True where .*, got (bool|float32)\["
        ):
            jax.eval_shape(layer.apply, params, state, bad)
    with pytest.raises(ValueError, match=r"dict with the names \['mask', 'target'\], got \['source', 'target'\]"):
        jax.eval_shape(layer.apply, params, state, {"source": x, "target": x})
    with pytest.raises(ValueError, match="a mask for each example needs the whole sequence at once, got a cache"):
        jax.eval_shape(layer.apply, params, fnn.memory.init_cache(state, BATCH, TIME), both)
    for mask in (TABLE.astype(int), TABLE[0], 3):
        with pytest.raises(
            TypeError, match=r"mask must be a function \(t, s\) -> bool of positions, or its table bool\[time, s\]"
        ):
            fnn.attention(HEADS, mask=mask)
    for window in (-1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="attention: window must be an integer of at least 0"):
            fnn.attention(HEADS, window=window)
    short = fnn.attention(HEADS, causal=True, mask=TABLE[:5, :6])
    params, state = prepared(short, x[:, :5])
    with pytest.raises(
        ValueError, match="the mask's table is for at most 5 by 6 positions, got 7 by 7; pass a larger one"
    ):
        jax.eval_shape(short.apply, params, state, x)
    with pytest.raises(ValueError, match="length must be at most the net's 5 positions, got 6"):
        fnn.memory.init_cache(state, BATCH, 6)
    for f, got in (
        (lambda t, s: t - s, r"int32\[1,7,7\]"),
        (lambda t, s: (t < 3)[..., None], r"bool\[1,7,1,1\]"),
        (lambda t, s: True, "bool"),
    ):
        with pytest.raises(
            ValueError, match=rf"attention: mask must return bool\[1, 7, 7\] for positions .*, got {got}"
        ):
            jax.eval_shape(fnn.attention(HEADS, mask=f).apply, params, state, x)
    cross = fnn.cross_attention(HEADS, mask=TABLE[:, :4])
    params, state = prepared(cross, {"source": x[:, :4], "target": x})
    with pytest.raises(
        ValueError, match="cross_attention: the mask's table is for at most 9 by 4 positions, got 7 by 5"
    ):
        jax.eval_shape(cross.apply, params, state, {"source": x[:, :5], "target": x})
    with pytest.raises(ValueError, match=r"cross_attention: the mask must be bool\[3, 7, 4\]"):
        jax.eval_shape(cross.apply, params, state, {"source": x[:, :4], "target": x, "mask": as_jax(PAIRS)})


@pytest.mark.parametrize(
    "mixing",
    [fnn.conv(8, 3, padding=((2, 0),)), fnn.conv_transpose(8, 3), fnn.max_pool(3, stride=1), fnn.group_norm(2)],
)
def test_a_layer_that_mixes_positions_without_a_cache_takes_no_pieces(mixing):
    """Position by position it would be another function, without a word."""
    x, key = jax.ShapeDtypeStruct((2, 6, 8), np.float32), jax.random.key(0)
    net = fnn.serial(mixing, fnn.repeat(fnn.attention(2, causal=True), 2))
    rule = "it mixes positions and has no cache, so a sequence cannot come in pieces"
    with pytest.raises(ValueError, match=rf"^memory.init_cache: [a-z_]*: {rule}"):
        fnn.memory.init_cache(jax.eval_shape(net.init, key, x)[1], 2, 4)
    for before in (fnn.memory.full_sequence(mixing), fnn.conv(8, 1)):
        allowed = fnn.serial(before, fnn.layer_norm(), fnn.attention(2, causal=True))
        fnn.memory.init_cache(jax.eval_shape(allowed.init, key, x)[1], 2, 4)
