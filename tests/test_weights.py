"""Weights from Flax, Equinox and Haiku, and back: outputs on the same weights; and what is refused."""

import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, randomized
from flax import nnx

import fnn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def drawn(*shape):
    return np.float32(RNG.normal(size=shape))


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-5)


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(3, (3, 3))(x))
        x = nn.ConvTranspose(3, (2, 2), strides=(2, 2))(nn.relu(x))
        x = nn.GroupNorm(3)(x)
        for _ in range(11):
            x = nn.Conv(3, (1, 1))(x)
        return nn.Dense(4)(x.reshape(len(x), -1))


def images():
    net = fnn.serial(
        fnn.conv(3, 3),
        fnn.batch_norm(),
        fnn.activation("relu"),
        fnn.conv_transpose(3, 2, stride=2),
        fnn.group_norm(3),
        fnn.repeat(fnn.conv(3, 1), 11),
        fnn.flatten(),
        fnn.dense(4),
    )
    return net, Images(), drawn(2, 3, 4, 2)


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Embed(7, 6)(x)
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        h = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(4)), nn.RNN(nn.OptimizedLSTMCell(4)))(h)
        h = nn.RNN(nn.GRUCell(5))(h)
        h = nn.RNN(nn.SimpleCell(5))(h)
        h = nn.RNN(nn.LSTMCell(4))(nn.RMSNorm()(h))
        return nn.Dense(7, use_bias=False)(h)


def words():
    net = fnn.serial(
        fnn.embed(7, 6),
        fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(2))),
        fnn.bidirectional(fnn.lstm(4), fnn.lstm(4, reverse=True)),
        fnn.gru(5),
        fnn.rnn(5),
        fnn.rms_norm(),
        fnn.lstm(4),
        fnn.dense(7, bias=False),
    )
    return net, Words(), RNG.integers(0, 7, (2, 5))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(h), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(8)(blocks()(x, None)[0])


def scanned():
    block = fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(2), fnn.dense(8)))
    names = {f"0/[{i}]/2": f"ScanBlock_0/Dense_0/[{i}]" for i in range(3)}  # as wide as the last layer
    return fnn.serial(fnn.repeat(block, 3), fnn.dense(8)), Scanned(), drawn(2, 4, 8), names


@pytest.mark.parametrize("make", [images, words, scanned], ids=lambda make: make.__name__)
def test_linen(make):
    net, module, x, *names = make()
    variables = randomized(jax.jit(module.init)(KEY, x))
    names = names[0] if names else None
    params, state, report = fnn.weights.from_flax(variables, net, x, names=names)
    close(jax.jit(net.apply)(params, state, x)[0], jax.jit(module.apply)(variables, x))
    back = fnn.weights.to_flax(params, state, like=jax.eval_shape(module.init, KEY, x), names=names)
    again, same, _ = fnn.weights.from_flax(back, net, x, names=names)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert_same((again, same), (params, state))
    assert_same(back, variables)
    assert len(report) > 3 and all(row[0] in repr(report) and row[2] in repr(report) for row in report)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(7, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 6, rngs=rngs, decode=False)
        cells = nnx.OptimizedLSTMCell(6, 6, rngs=rngs), nnx.LSTMCell(6, 6, rngs=rngs)
        cells = *cells, nnx.GRUCell(6, 5, rngs=rngs), nnx.SimpleCell(5, 4, rngs=rngs)
        self.recurrent = nnx.List([nnx.RNN(cell, rngs=rngs) for cell in cells])
        self.batch_norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
        self.hidden = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x)
        h = h + self.attention(self.norm(h))
        for layer in self.recurrent:
            h = layer(h)
        h = self.batch_norm(h)
        for layer in self.hidden:
            h = layer(h)
        return h


def test_nnx():
    net = fnn.serial(
        fnn.embed(7, 6),
        fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(3))),
        *(fnn.lstm(6), fnn.lstm(6), fnn.gru(5), fnn.rnn(4), fnn.batch_norm()),
        fnn.repeat(fnn.dense(4), 12),
    )
    module, x = Nnx(nnx.Rngs(0)), RNG.integers(0, 7, (2, 5))
    graph, weights, rest = nnx.split(module, (nnx.Param, nnx.BatchStat), ...)
    module = nnx.merge(graph, randomized(weights), rest)
    module.eval()
    params, state, _ = fnn.weights.from_flax(module, net, x)
    close(jax.jit(net.apply)(params, state, x)[0], module(x))
    other = Nnx(nnx.Rngs(1))
    nnx.update(other, fnn.weights.to_flax(params, state, like=nnx.state(other)))
    other.eval()
    np.testing.assert_array_equal(other(x), module(x))
    # NNX's GRU has no second bias of n, so that one which is not zero fits nowhere.
    moved = fnn.tree.rows(params)
    path = next(path for path, _ in moved if path.endswith("recurrent_bias"))
    params = jax.tree_util.tree_map_with_path(lambda p, a: a + (fnn.tree.path(p) == path), params)
    with pytest.raises(
        ValueError, match=r"a module must have a place for all weights .*, got 4 \(.*recurrent_bias \[5\]"
    ):
        fnn.weights.to_flax(params, state, like=nnx.state(other))
    with pytest.raises(
        ValueError, match="heads must have the same size on both sides, got 3 at 1/1 and 2 in attention"
    ):
        other = fnn.serial(fnn.embed(7, 6), fnn.residual(fnn.serial(fnn.layer_norm(), fnn.attention(2))))
        fnn.weights.from_flax(
            {n: nnx.to_pure_dict(nnx.state(module))[n] for n in ("embed", "norm", "attention")}, other, x
        )


def test_the_recipes_for_equinox_and_haiku():
    keys, x = jax.random.split(KEY, 6), drawn(2, 4, 6)
    model = [
        *(eqx.nn.Linear(6, 8, key=keys[0]), eqx.nn.LayerNorm(8), eqx.nn.MultiheadAttention(2, 8, key=keys[1])),
        *(eqx.nn.LSTMCell(8, 5, key=keys[2]), eqx.nn.GRUCell(5, 4, key=keys[3]), eqx.nn.Conv1d(4, 3, 2, key=keys[4])),
    ]
    dynamic, static = eqx.partition(model, eqx.is_array)
    model = eqx.combine(randomized(dynamic), static)
    net = fnn.serial(
        *(fnn.dense(8), fnn.layer_norm(eps=1e-5), fnn.attention(2, bias=False), fnn.lstm(5), fnn.gru(4)),
        fnn.conv(3, 2, padding="valid"),
    )

    def one(x):
        linear, norm, attention, lstm, gru, conv = model
        h = jax.vmap(norm)(jax.vmap(linear)(x))
        h = attention(h, h, h)
        cell, ys = (jnp.zeros(5), jnp.zeros(5)), []
        for row in h:
            cell = lstm(row, cell)
            ys.append(cell[0])
        h, state = jnp.stack(ys), jnp.zeros(4)
        ys = []
        for row in h:
            state = gru(row, state)
            ys.append(state)
        return conv(jnp.stack(ys).T).T

    namespace = {"jax": jax, "equinox": eqx, "model": model}
    exec(recipe("Equinox"), namespace)
    params, state, _ = fnn.weights.from_torch(namespace["state_dict"], net, x)
    close(net.apply(params, state, x)[0], jax.jit(jax.vmap(one))(x))

    def forward(x):
        h = hk.Conv1D(5, 2, padding="VALID")(x)
        h = hk.LayerNorm(-1, True, True)(h)
        return hk.Linear(3)(h)

    transformed = hk.without_apply_rng(hk.transform(forward))
    given = randomized(transformed.init(KEY, x))
    net = fnn.serial(fnn.conv(5, 2, padding="valid"), fnn.layer_norm(eps=1e-5), fnn.dense(3))
    namespace = {"params": given}
    exec(recipe("Haiku"), namespace)
    params, state, _ = fnn.weights.from_flax(namespace["variables"], net, x)
    close(net.apply(params, state, x)[0], transformed.apply(given, x))


def recipe(library):
    """The indented lines behind a library's name in the docstring."""
    text = fnn.weights.__doc__.partition(f"{library}:")[2]
    return "\n".join(re.findall(r"^    (\S.*)$", text.partition("\n\n")[2], re.M)[:2])


def linears(*names):
    return {
        f"{name}.{suffix}": drawn(*shape) for name in names for suffix, shape in (("weight", (4, 4)), ("bias", (4,)))
    }


def test_the_order_of_alike_modules_is_known_or_refused():
    net, x = fnn.serial(*[fnn.dense(4)] * 3), drawn(2, 4)

    def first(entries):
        return [row[2] for row in fnn.weights.from_torch(entries, net, x).report]

    def by_name(entries):
        return {name: entries[name] for name in sorted(entries)}

    # Registered in this order; and sorted by name, as a file may be: then numbers decide.
    assert first(linears("enter", "again", "leave")) == ["enter", "again", "leave"]
    assert first(by_name(linears("body.2", "body.9", "body.10"))) == ["body.2", "body.9", "body.10"]
    assert first(by_name(linears("fc1", "fc2", "fc10"))) == ["fc1", "fc2", "fc10"]
    for entries in (by_name(linears("enter", "again", "leave")), linears("up.3", "up.1", "up.2")):
        with pytest.raises(
            ValueError, match="modules of one kind and shape must be in a known order, got .* names={path"
        ):
            first(entries)
    names = {"0": "up.3", "1": "up.1", "2": "up.2"}
    loaded = fnn.weights.from_torch(entries, net, x, names=names)
    assert [row[::2] for row in loaded.report] == list(names.items())
    np.testing.assert_array_equal(loaded.params[0]["kernel"], entries["up.3.weight"].T)
    flax = {name: {"kernel": drawn(4, 4), "bias": drawn(4)} for name in ("Dense_1", "Dense_10", "Dense_2")}
    found = fnn.weights.from_flax({"params": flax}, net, x)
    assert [row[2] for row in found.report] == ["Dense_1", "Dense_2", "Dense_10"]
    flax["head"] = flax.pop("Dense_10")
    with pytest.raises(ValueError, match="known order, got Dense_2 and head, whose names do not tell"):
        fnn.weights.from_flax({"params": flax}, net, x)


def test_what_has_no_partner_is_named():
    net, x = fnn.serial(fnn.dense(4), fnn.activation("tanh"), fnn.dense(4), fnn.dense(3)), drawn(2, 4)
    entries = linears("a.0", "a.1") | {"head.weight": drawn(5, 4), "head.bias": drawn(5)}
    sentence = r"got layers 3 \(bias \[3\], kernel \[4,3\]\), and modules head \(weight \[5,4\], bias \[5\]\)"
    with pytest.raises(ValueError, match=sentence):
        fnn.weights.from_torch(entries, net, x)
    # Another head: the layer stays as it is drawn.
    body = {name: a for name, a in entries.items() if "head" not in name}
    loaded = fnn.weights.from_torch(body, net, x, names={"3": None}, key=jax.random.key(3))
    assert_same(loaded.params[3], net.init(jax.random.key(3), x)[0][3])
    np.testing.assert_array_equal(loaded.params[2]["kernel"], entries["a.1.weight"].T)
    with pytest.raises(ValueError, match="got layers none, and modules extra "):
        fnn.weights.from_torch(body | {"extra": drawn(2, 2)}, net, x, names={"3": None})
    with pytest.raises(
        ValueError, match="names= must hold each entry once and as the report writes it, got 'b'; left: a.0"
    ):
        fnn.weights.from_torch(body, net, x, names={"3": "b"})
    with pytest.raises(ValueError, match="3, dense with .* does not fit a.0, weight"):
        fnn.weights.from_torch(body, net, x, names={"3": "a.0"})
    with pytest.raises(TypeError, match="weights must be floating point, got int8 in a.0.weight"):
        fnn.weights.from_torch(body | {"a.0.weight": np.ones((4, 4), np.int8)}, net, x)
    with pytest.raises(TypeError, match="state_dict must map names to arrays, got list; pass module.state_dict"):
        fnn.weights.from_torch([1], net, x)
    with pytest.raises(ValueError, match=r"must be params and batch_stats alone, got \['cache'\] too"):
        fnn.weights.from_flax({"params": {}, "cache": {}}, net, x)
    with pytest.raises(TypeError, match="variables must be a dict of Linen, or a module or state of NNX, got float"):
        fnn.weights.from_flax(1.0, net, x)


def test_rows_behind_a_convolution_are_reordered_or_refused():
    x = drawn(2, 3, 3, 2)
    entries = {"0.weight": drawn(4, 2, 1, 1), "0.bias": drawn(4), "1.weight": drawn(5, 36), "1.bias": drawn(5)}
    own = fnn.serial(fnn.conv(4, 1), fnn.activation(lambda x: x.reshape(len(x), -1)), fnn.dense(5))
    with pytest.raises(
        ValueError, match=r"got 2 with kernel \[36,5\]; pass flattened={'2': \(height, width, channels\)}"
    ):
        fnn.weights.from_torch(entries, own, x)
    known = fnn.serial(fnn.conv(4, 1), fnn.flatten(), fnn.dense(5))
    told = fnn.weights.from_torch(entries, own, x, flattened={"2": (3, 3, 4)})
    assert_same(told.params, fnn.weights.from_torch(entries, known, x).params)
    assert_same(fnn.weights.to_torch(*told[:2], flattened={"2": (3, 3, 4)})["2.weight"], entries["1.weight"])
    kept = fnn.weights.from_torch(entries, own, x, flattened={"2": None})
    np.testing.assert_array_equal(kept.params[2]["kernel"], entries["1.weight"].T)
    with pytest.raises(ValueError, match=r"flattened= must hold paths of layers, got \['7'\]"):
        fnn.weights.from_torch(entries, known, x, flattened={"7": None})
    # Behind a recurrent layer nothing is flattened.
    sequence = fnn.serial(fnn.conv(4, 1), fnn.lstm(3), fnn.take_last(), fnn.dense(5))
    drawn_here = sequence.init(KEY, x[:, 0])
    again = fnn.weights.from_torch(fnn.weights.to_torch(*drawn_here), sequence, x[:, 0])
    assert_same(again[:2], drawn_here)
    # What is joined behind flatten has rows of which nothing is known.
    joined = fnn.serial(
        fnn.conv(4, 1), fnn.flatten(), fnn.parallel(fnn.serial(), fnn.serial()), fnn.concatenate(), fnn.dense(5)
    )
    with pytest.raises(ValueError, match=r"got 4 with kernel \[72,5\]"):
        fnn.weights.from_torch(entries | {"1.weight": drawn(5, 72)}, joined, x)


def test_single_parameters_own_layers_and_separate_projections():
    net = fnn.serial(fnn.positions(5), fnn.scalar_affine(1.0), fnn.attention(2, kv_heads=1), fnn.dense(4))
    x = drawn(2, 5, 4)
    entries = {"pos": drawn(1, 5, 4), "gain": drawn(1)}
    for name, width in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2), ("out_proj", 4)):
        entries |= {f"att.{name}.weight": drawn(width, 4), f"att.{name}.bias": drawn(width)}
    del entries["att.k_proj.bias"]  # as if it were zero
    entries |= {"last.weight": drawn(4, 4), "last.bias": drawn(4)}
    params, state, report = fnn.weights.from_torch(entries, net, x)
    assert [row[2] for row in report] == ["pos", "gain", "att", "last"]
    np.testing.assert_array_equal(params[0]["embedding"], entries["pos"][0])
    np.testing.assert_array_equal(params[1]["scale"], entries["gain"][0])
    for name, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
        np.testing.assert_array_equal(params[2][name]["kernel"], entries[f"att.{theirs}.weight"].T)
    assert not np.any(params[2]["key"]["bias"])
    back = fnn.weights.to_torch(params, state, like=entries)
    for name, a in entries.items():
        np.testing.assert_array_equal(back[name], a)
    params[2]["key"]["bias"] += 1
    with pytest.raises(ValueError, match="to_torch: a module must have a place for all weights of its layer, got 2 "):
        fnn.weights.to_torch(params, state, like=entries)


def test_statistics_of_a_norm_that_has_seen_three_steps_are_those_of_eval_mode():
    net, x = fnn.serial(fnn.dense(4), fnn.batch_norm(decay=0.5)), drawn(8, 3)
    params, state = net.init(KEY, x)
    for _ in range(3):
        _, state = net.apply(params, state, x, train=True)
    entries = fnn.weights.to_torch(params, state)
    h = x @ entries["0.weight"].T + entries["0.bias"]
    mean, var = entries["1.running_mean"], entries["1.running_var"]
    close((h - mean) / np.sqrt(var + 1e-5), net.apply(params, state, x)[0])
    loaded = fnn.weights.from_torch(entries, net, x)
    close(net.apply(loaded.params, loaded.state, x)[0], net.apply(params, state, x)[0])
    assert loaded.state[1]["weight"] == 1


def test_dtypes_are_those_of_the_net_and_of_the_template():
    net, x = fnn.dense(3), drawn(2, 4)
    entries = {"weight": jnp.asarray(drawn(3, 4), jnp.bfloat16), "bias": drawn(3).astype(np.float16)}
    params, state, _ = fnn.weights.from_torch(entries, net, x)
    assert {a.dtype for a in params.values()} == {jnp.dtype(jnp.float32)}
    back = fnn.weights.to_torch(params, state, like=entries)
    assert back["weight"].dtype == jnp.bfloat16 and back["bias"].dtype == np.float16
    assert_same(list(back.values()), list(entries.values()))
    with pytest.raises(
        ValueError, match="to_torch: weights must fit in float16, got 1e.05 in the root; use a wider dtype"
    ):
        fnn.weights.to_torch({"kernel": params["kernel"], "bias": np.float32([0, 1e5, 0])}, state, like=entries)
    with pytest.raises(
        ValueError, match="from_torch: weights must fit in float32, got 1e.100 in the root; use a wider"
    ):
        fnn.weights.from_torch(entries | {"bias": np.full(3, 1e100)}, net, x)
