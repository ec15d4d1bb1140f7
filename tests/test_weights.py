"""Weights of other libraries: which module is which layer, what has no partner, what is refused, dtypes and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same

import fnn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def drawn(*shape):
    return np.float32(RNG.normal(size=shape))


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-5)


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


def test_a_file_that_is_sorted_says_nothing_of_the_order():
    """Alike modules without a bias: another module's bias before its weight, or all names in order, show the sorting."""
    net, x = fnn.serial(fnn.dense(4, bias=False), fnn.dense(4, bias=False), fnn.dense(3)), drawn(2, 4)
    entries = {"up.weight": drawn(4, 4), "down.weight": drawn(4, 4), "head.weight": drawn(3, 4), "head.bias": drawn(3)}
    assert [row[2] for row in fnn.weights.from_torch(entries, net, x).report] == ["up", "down", "head"]
    bias_first = {name: entries[name] for name in ("up.weight", "down.weight", "head.bias", "head.weight")}
    for given in (bias_first, dict(sorted(entries.items()))):
        with pytest.raises(ValueError, match="must be in a known order, got down and up"):
            fnn.weights.from_torch(given, net, x)
    del entries["head.bias"]
    bare = fnn.serial(*[fnn.dense(4, bias=False)] * 2, fnn.dense(3, bias=False))
    with pytest.raises(ValueError, match="must be in a known order, got down and up"):
        fnn.weights.from_torch(dict(sorted(entries.items())), bare, x)
    params, state = bare.init(KEY, x)
    assert list(fnn.weights.to_torch(params, state)) == ["0.weight", "1.weight", "2.weight"]
    heads = fnn.parallel({"b": fnn.dense(4, bias=False), "a": fnn.dense(4, bias=False)})
    assert list(fnn.weights.to_torch(*heads.init(KEY, x))) == ["a.weight", "b.weight"]


def test_rows_behind_a_convolution_are_reordered_or_refused():
    x = drawn(2, 3, 3, 2)
    entries = {"0.weight": drawn(4, 2, 1, 1), "0.bias": drawn(4), "1.weight": drawn(5, 36), "1.bias": drawn(5)}
    own = fnn.serial(fnn.conv(4, 1), fnn.activation(lambda x: x.reshape(len(x), -1)), fnn.dense(5))
    with pytest.raises(
        ValueError, match=r"got 2 with kernel \[36, 5\] .* pass flattened={'2': \(height, width, channels\)}"
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
    with pytest.raises(ValueError, match=r"got 4 with kernel \[72, 5\]"):
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
