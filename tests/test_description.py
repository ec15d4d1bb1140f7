"""What things print as: nets as the calls that made them, states and results in one line."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import treescope
from zoo import CASES

import fnn
from fnn import check, compiled
from fnn.description import shortened

X = np.linspace(-1, 1, 4 * 8, dtype=np.float32).reshape(4, 8)


def block(width=8):
    return fnn.serial(fnn.dense(width), fnn.tap(), fnn.batch_norm(), fnn.activation("tanh"))


NET = fnn.serial(fnn.dense(8), fnn.activation("tanh"), fnn.repeat(block(), 50), fnn.dense(10))


def scale_shift():
    return fnn.stateless(lambda key, spec: {"a": jnp.ones(())}, lambda params, x: params["a"] * x)


def swish(x):
    return x * jax.nn.sigmoid(x)


PRINTED = [
    (NET, "serial(dense(8), tanh, repeat(serial(dense(8), tap, batch_norm, tanh), 50), dense(10))"),
    (scale_shift(), "scale_shift"),
    (fnn.serial(fnn.dense(3), scale_shift()), "serial(dense(3), scale_shift)"),
    (fnn.Layer(lambda key, spec: ((), ()), swish), "swish"),
    (fnn.activation(swish), "swish"),
    (fnn.activation(jnp.sin), "sin"),
    (fnn.activation("relu", grad_at_zero=1.0), "relu(grad_at_zero=1.0)"),
    (fnn.dense(3, kernel_init="he_normal", bias=False), "dense(3, kernel_init='he_normal', bias=False)"),
    (fnn.dense(3, kernel_init=fnn.initializers.he_normal), "dense(3, kernel_init=he_normal)"),
    (fnn.dense(3, kernel_init="lecun_normal"), "dense(3)"),
    (fnn.conv(3, (3, 2), stride=2), "conv(3, (3, 2), stride=2)"),
    (fnn.bidirectional(fnn.lstm(2), fnn.gru(3, reverse=True)), "bidirectional(lstm(2), gru(3, reverse=True))"),
    (fnn.branches({"a": fnn.dense(2), "b": fnn.serial()}), "branches({'a': dense(2), 'b': serial})"),
    (fnn.named("head", fnn.dense(2)), "named('head', dense(2))"),
    (fnn.residual(fnn.dense(8), scale=0.5), "residual(dense(8), scale=0.5)"),
    (fnn.repeat(fnn.dense(8), 3, unroll=True), "repeat(dense(8), 3, unroll=True)"),
    (fnn.serial(*[fnn.dense(8)] * 3, fnn.dense(2)), "serial(*[dense(8)] * 3, dense(2))"),
    (fnn.compute_in(fnn.dense(8), jnp.bfloat16), "compute_in(dense(8), bfloat16)"),
    (fnn.shared(fnn.dense(8), lambda use: fnn.serial(use(), use())), "shared(dense(8), serial(use, use))"),
    (fnn.scalar_affine(jnp.ones(())), "scalar_affine(scale=float32[])"),  # an array by its shape
]


@pytest.mark.parametrize("layer, text", PRINTED, ids=[text[:40] for _, text in PRINTED])
def test_a_net_prints_as_the_calls_that_made_it(layer, text):
    assert repr(layer) == text


@pytest.mark.parametrize(
    "net", [NET, fnn.models.mlp(3, 8, 5, norm="layer_norm", residual=True)], ids=["plain", "model"]
)
def test_what_is_printed_makes_the_same_net(net):
    text = re.sub(r"\b(?!True|None|False)[a-z_]\w*\b(?=[,)])", r"\g<0>()", repr(net))
    text = re.sub(r"init=(\w+)\(\)", r"init='\1'", text)
    names = {name: lambda name=name, **options: fnn.activation(name, **options) for name in fnn.activations.TABLE}
    again = eval(text, {name: getattr(fnn, name) for name in fnn.__all__} | names)
    assert "init" in repr(net) or repr(again) == repr(net)
    (params, state), (others, _) = (n.init(jax.random.key(0), X) for n in (net, again))
    jax.tree.map(np.testing.assert_array_equal, params, others)
    np.testing.assert_array_equal(net.apply(params, state, X)[0], again.apply(params, state, X)[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reprs_are_short(case):
    assert 2 < len(repr(case.layer)) <= 500 and "\n" not in repr(case.layer) and " at 0x" not in repr(case.layer)


def test_a_long_net_leaves_out_what_is_inside():
    net = fnn.serial(*(fnn.serial(fnn.dense(n), fnn.residual(fnn.serial(fnn.dense(n)))) for n in range(1, 16)))
    assert len(net.description) > 500 and repr(net).startswith(
        "serial(serial(dense(1), residual(…)), serial(dense(2), "
    )
    assert shortened("f(g(h(1), 2), [3])", 12) == "f(g(…), [3])" and shortened("abc" * 9, 11) == "abc … abc"


def test_descriptions_are_no_part_of_the_pair():
    layer = fnn.dense(3)
    other = layer.described("something else")
    assert layer == other and hash(layer) == hash(other) and len(layer) == 2
    init, apply = layer
    assert fnn.Layer(init, apply) == layer
    assert compiled.key((layer,)) == compiled.key((other,)) == compiled.key((fnn.dense(3, kernel_init="lecun_normal"),))


def state_of(net=NET, optimizer=None):
    return fnn.TrainState.create(net, optimizer or optax.adam(1e-3), jax.random.key(0), X)


def test_a_state_prints_its_step_its_sizes_and_its_optimizer():
    optimizer = fnn.optimizers.packed(optax.chain(fnn.clip.by_global_norm(1.0), optax.adam(1e-3)))
    state = state_of(optimizer=optimizer)
    text = repr(state)
    size = 8 * 8 + 8 + 50 * (8 * 8 + 8 + 16) + 8 * 10 + 10
    assert text.startswith(f"TrainState(step 0; params {size:,} numbers in 8 arrays float32; net_state ")
    assert "ScaleByAdamState" in text and "ClipState" in text and "EmptyState" not in text and len(text) < 300
    assert repr(state.params[2]) == "Stacked(50 blocks of 88 numbers in 4 arrays float32)"
    (tapped,) = (node for _, node in fnn.taps.listed(state.net_state))
    assert repr(tapped) == "TapState(dead, mean, peak, second_moment: each float32[50], role='')"
    traced = []
    jax.eval_shape(lambda s: traced.append((repr(s), repr(s.params[2]), repr(s.net_state))), state)
    assert traced[0][0].startswith("TrainState(step int32[]; params ") and traced[0][1] == repr(state.params[2])
    jax.tree.map(lambda a: a.delete(), state)
    assert repr(state).startswith(f"TrainState(step donated; params {size:,} numbers")
    plain = state_of(fnn.dense(2), optax.sgd(0.1))
    assert "net_state nothing; opt_state no state, nothing; key key<fry>[]" in repr(plain)


def test_errors_still_tell_shapes():
    """`check.describe` puts texts in the place of arrays."""
    params = fnn.repeat(fnn.dense(8), 2).init(jax.random.key(0), X)[0]
    assert check.describe(params) == "Stacked({bias: float32[2,8], kernel: float32[2,8,8]})"
    assert check.describe((NET, 1)) == f"({NET!r}, int)"
    assert check.describe({"state": state_of()}).startswith("{state: TrainState(step 0; ")


def test_data_flows_studies_and_results_print_in_one_line():
    train, test = fnn.data.digits(key=jax.random.key(0))
    assert repr(train) == "Dataset(1,438 examples, x float32[1438,64], y int32[1438])"
    net = fnn.serial(fnn.dense(4), fnn.tap(), fnn.dense(10))
    flow = fnn.gradient_flow(net, net.init(jax.random.key(0), test.x), (test.x[:8], test.y[:8]))
    assert re.fullmatch(r"GradientFlow\(loss=[\d.]+, \d+ numbers of \d+ layers, float32\)", repr(flow))
    grid = fnn.grid.product(depth=[1, 2], width=[2], norm="none", batch_size=4)
    study = fnn.Study(grid, seeds=1, steps=(0,), data=(train, test))
    assert len(repr(study)) < 500
    assert repr(study).startswith(
        "Study(2 points of depth, width, norm, batch_size; 1 seeds, steps (0,), data (Dataset(1,438 "
    )
    found = study.run()
    assert repr(found).startswith("Results(2 of 2 cells, axes depth, width, ") and len(repr(found)) < 500


def test_a_history_prints_what_it_has():
    curves = {"loss": np.array([0.5, 0.25]), "accuracy": np.array([0.5, 0.75])}
    history = fnn.History({"loss": np.ones(6), "accuracy": np.ones(6)}, curves, (3, 3), 1, False)
    expected = "History(2 epochs, 6 steps; train loss, accuracy; validation loss 0.25, accuracy 0.75; best_epoch=1, "
    assert repr(history) == expected + "stopped_early=False)"
    assert "validation none;" in repr(fnn.History({}, {}, (), None, True))


@pytest.mark.filterwarnings("ignore:The chararray class")  # treescope reads all of NumPy
def test_treescope_shows_what_a_net_and_a_state_are():
    state = state_of()
    assert treescope.render_to_text(NET) == NET.description
    text = treescope.render_to_text(state)
    assert "Stacked(\n" in text or "Stacked(blocks=" in text
    assert "ScaleByAdamState(" in text and "float32(50, 8, 8)" in text and "TapState(" in text
    for thing in (NET, state, state.params[2]):
        assert "</" in treescope.render_to_html(thing)
