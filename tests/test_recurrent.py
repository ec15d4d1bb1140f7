"""Recurrent layers: the same weights in Flax and PyTorch, masks, pieces of a sequence, taps over time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, assert_same, started

import fnn

WIDTH, D, BATCH, TIME = 5, 3, 4, 6
LENGTHS = jnp.array([6, 1, 4, 3])
LAYERS = {"rnn": fnn.rnn, "gru": fnn.gru, "lstm": fnn.lstm}


def drawn(dtype=jnp.float32):
    return as_jax(np.random.default_rng(0).normal(size=(BATCH, TIME, D)), dtype)


def prepared(kind, dtype=jnp.float32, **options):
    layer = LAYERS[kind](WIDTH, **options)
    x = drawn(dtype)
    return layer, *started(layer.init, x), x


def flax_cell(kind, params, dtype):
    """Flax's cell, and our weights under its names."""
    options = {"dtype": dtype, "param_dtype": dtype}
    w, u, b = params["kernel"], params["recurrent_kernel"], params["bias"]
    if kind == "rnn":
        return nn.SimpleCell(WIDTH, **options), {"i": {"kernel": w, "bias": b}, "h": {"kernel": u}}
    parts = [jnp.split(a, {"gru": 3, "lstm": 4}[kind], axis=-1) for a in (w, u, b)]
    if kind == "gru":
        named = {f"i{n}": {"kernel": w, "bias": b} for n, w, _, b in zip("rzn", *parts, strict=True)}
        named |= {f"h{n}": {"kernel": u} for n, u in zip("rzn", parts[1], strict=True)}
        named["hn"]["bias"] = params["recurrent_bias"]
        return nn.GRUCell(WIDTH, **options), named
    named = {f"i{n}": {"kernel": w} for n, w in zip("ifgo", parts[0], strict=True)}
    named |= {f"h{n}": {"kernel": u, "bias": b} for n, u, b in zip("ifgo", *parts[1:], strict=True)}
    return nn.LSTMCell(WIDTH, **options), named


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance", "reverse"),
    [*((kind, jnp.float64, 1e-10, True) for kind in LAYERS), ("lstm", jnp.float32, 1e-5, False)],
    ids=[*(f"{kind}-reverse_f64" for kind in LAYERS), "lstm-forward_f32"],
)
def test_values_and_gradients_equal_flax_with_lengths(kind, dtype, tolerance, reverse):
    with jax.enable_x64(dtype == jnp.float64):
        layer, params, state, x = prepared(kind, dtype, reverse=reverse)
        cell, _ = flax_cell(kind, params, dtype)
        real = jnp.arange(TIME) < LENGTHS[:, None]

        def ours(params, x):
            (y, mask), _ = layer.apply(params, state, fnn.Masked.of_lengths(x, LENGTHS))
            return jnp.sum(jnp.sin(y)), (y, mask)

        def reference(params, x):
            _, named = flax_cell(kind, params, dtype)
            module = nn.RNN(cell, reverse=reverse, keep_order=True)
            y = module.apply({"params": {"cell": named}}, x, seq_lengths=LENGTHS)
            y = jnp.where(real[..., None], y, 0)
            return jnp.sum(jnp.sin(y)), y

        (_, (y, mask)), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(params, x)
        (_, expected), their_gradients = jax.jit(jax.value_and_grad(reference, argnums=(0, 1), has_aux=True))(params, x)
        np.testing.assert_array_equal(mask, real)
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(y[~real], 0)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=10 * tolerance), gradients, their_gradients
        )


@pytest.mark.parametrize("kind", LAYERS)
def test_gate_order_is_pytorchs(kind):
    torch = pytest.importorskip("torch")
    layer, params, state, x = prepared(kind)
    y, _ = layer.apply(params, state, fnn.Masked.of_lengths(x, LENGTHS))
    module = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](D, WIDTH, batch_first=True)
    second = torch.zeros(module.bias_hh_l0.shape)
    if kind == "gru":
        second[-WIDTH:] = torch.tensor(np.array(params["recurrent_bias"]))
    weights = {
        "weight_ih_l0": torch.tensor(np.array(params["kernel"]).T),
        "weight_hh_l0": torch.tensor(np.array(params["recurrent_kernel"]).T),
        "bias_ih_l0": torch.tensor(np.array(params["bias"])),
        "bias_hh_l0": second,
    }
    module.load_state_dict(weights)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.tensor(np.array(x)), torch.tensor(np.array(LENGTHS)), batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        theirs, _ = torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0], batch_first=True)
    np.testing.assert_allclose(y.values, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_padding_changes_nothing_wherever_it_stands(kind):
    layer, params, state, x = prepared(kind)
    keep = np.array([1, 2, 4, 5, 7, 8])  # holes at 0, 3 and 6
    padded, mask = np.full((BATCH, 9, D), 1e3, np.float32), np.zeros((BATCH, 9), bool)
    padded[:, keep], mask[:, keep] = x, True

    def total(values):
        y = layer.apply(params, state, fnn.Masked(values, mask))[0].values
        return jnp.sum(y), y

    @jax.jit
    def every(x, padded):
        whole, _ = layer.apply(params, state, x)
        none, _ = layer.apply(params, state, fnn.Masked(x, jnp.ones((BATCH, TIME), bool)))
        return whole, none.values, *jax.grad(total, has_aux=True)(padded)

    whole, none, slope, holed = every(x, padded)
    np.testing.assert_allclose(holed[:, keep], whole, atol=1e-6)
    np.testing.assert_array_equal(slope[~mask], 0)
    np.testing.assert_allclose(none, whole, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_pieces_equal_the_whole(kind):
    layer, params, state, x = prepared(kind, initial="learned")
    apply = jax.jit(layer.apply)
    y, same = apply(params, state, x)
    assert fnn.core.same_spec(same, state)
    memory, parts = fnn.memory.init_cache(state, BATCH, TIME), []
    for piece in np.split(np.asarray(x), [1, 2], axis=1):
        part, memory = apply(params, memory, piece)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), y, atol=1e-6)
    np.testing.assert_array_equal(memory.position, TIME)


def test_pieces_of_different_lengths_through_repeat_and_branches():
    net = fnn.serial(
        fnn.dense(WIDTH), fnn.repeat(fnn.residual(fnn.lstm(WIDTH)), 2), fnn.parallel(fnn.gru(2)), fnn.concatenate()
    )
    x, apply = drawn(), jax.jit(net.apply)
    params, state = jax.jit(net.init)(jax.random.key(0), x)
    whole, _ = apply(params, state, x)
    first, second = np.array([4, 1, 2, 3]), np.array([2, 5, 4, 3])
    memory = fnn.memory.init_cache(state, BATCH, TIME)
    rest = np.stack([np.roll(x[i], -n, axis=0) for i, n in enumerate(first)])
    a, memory = apply(params, memory, fnn.Masked.of_lengths(x, first))
    b, memory = apply(params, memory, fnn.Masked.of_lengths(as_jax(rest), second))
    for i, n in enumerate(first):
        joined = np.concatenate([np.asarray(a.values)[i, :n], np.asarray(b.values)[i, : second[i]]])
        np.testing.assert_allclose(joined, whole[i], atol=1e-6)


def test_tap_over_time_measures_the_error_signal_of_every_step():
    layer = fnn.rnn(WIDTH, tap=fnn.tap())
    x = drawn()
    params, state = layer.init(jax.random.key(0), x)

    def loss(state):
        y, new = layer.apply(params, state, x)
        return jnp.mean(jnp.sum(jnp.square(y[:, -1]), axis=1)), new

    gradient, new = jax.jit(jax.grad(loss, has_aux=True))(state)
    rows = [row for row in fnn.taps.read(new, gradient) if row.quantity == "log10_error"]
    assert [row.path for row in rows] == [f"tap/[{t}]" for t in range(TIME)]
    # By hand: backwards through h_t = tanh(a_t), dL/dh_{t-1} = (dL/dh_t (1 - h_t²)) Uᵀ.
    y, _ = layer.apply(params, state, x)
    y, u = np.asarray(y, np.float64), np.asarray(params["recurrent_kernel"], np.float64)
    error, expected = 2 * y[:, -1], []
    for t in reversed(range(TIME)):
        expected.append(0.5 * np.log10(np.mean(np.sum(error**2, axis=1))))
        error = (error * (1 - y[:, t] ** 2)) @ u.T
    np.testing.assert_allclose([row.value for row in rows], expected[::-1], atol=1e-5)
    plain = fnn.rnn(WIDTH)
    values, _ = plain.apply(params, plain.init(jax.random.key(0), x)[1], x)
    assert_same(values, layer.apply(params, state, x)[0])
    with pytest.raises(ValueError, match="taps were built for 6 steps"):
        layer.apply(params, state, x[:, :4])


def test_forget_bias_is_an_initial_value():
    layer, x = fnn.lstm(WIDTH, forget_bias=5.0), drawn()
    bias = layer.init(jax.random.key(0), x)[0]["bias"]
    np.testing.assert_array_equal(bias, [0] * 5 + [5] * 5 + [0] * 10)
    # Without input or recurrence the cell forgets by sigmoid(5) a step: h_t = sigmoid(0)·tanh(c_0 sigmoid(5)^t).
    params = {"kernel": jnp.zeros((D, 20)), "recurrent_kernel": jnp.zeros((5, 20)), "bias": bias}
    params["initial"] = {"hidden": jnp.zeros(5), "cell": jnp.ones(5)}
    layer = fnn.lstm(WIDTH, initial="learned")
    y, _ = layer.apply(params, layer.init(jax.random.key(0), x)[1], x)
    keep = 1 / (1 + np.exp(-5.0))
    np.testing.assert_allclose(y[0, :, 0], 0.5 * np.tanh(keep ** np.arange(1, TIME + 1)), rtol=1e-6)


def test_recurrent_kernels_are_drawn_gate_by_gate():
    params, _ = fnn.lstm(8).init(jax.random.key(0), jnp.zeros((1, 2, 3)))
    for gate in jnp.split(params["recurrent_kernel"], 4, axis=1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(8), atol=1e-5)


def test_compile_time_does_not_depend_on_the_length():
    layer = fnn.serial(fnn.lstm(4), fnn.take_last())

    def size(time):
        spec = jax.ShapeDtypeStruct((2, time, 3), jnp.float32)
        params, state = jax.eval_shape(lambda k: layer.init(k, spec), jax.random.key(0))
        step = jax.jit(jax.grad(lambda p, s, x: jnp.sum(layer.apply(p, s, x)[0])))
        return len(step.lower(params, state, spec).as_text().splitlines())

    assert size(10) == size(1000)


def test_bfloat16_keeps_the_cell_in_float32():
    # Each step adds 2^-9 to the content, which bfloat16 would round away beside 1.
    steps = 256
    params = {
        "kernel": jnp.zeros((1, 4)),
        "recurrent_kernel": jnp.zeros((1, 4)),
        "bias": jnp.array([20, 20, np.arctanh(2**-9), 20]),
    }
    params["initial"] = {"hidden": jnp.zeros(1), "cell": jnp.ones(1)}
    layer = fnn.lstm(1, initial="learned")
    x = jnp.zeros((1, steps, 1), jnp.bfloat16)
    y, _ = layer.apply(params, layer.init(jax.random.key(0), x)[1], x)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, -1, 0]) == pytest.approx(np.tanh(1.5), rel=0.01)


def test_refusals():
    layer, params, state, x = prepared("lstm")
    cases = [
        (ValueError, r"lstm: the input must be a sequence float\[batch, time, d\].*got float32\[4,3\]", x[:, 0]),
        (ValueError, "must be 3, as at init", jnp.zeros((2, 4, 2))),
        (TypeError, "a mask must be bool", fnn.Masked(x, jnp.ones((BATCH, TIME)))),
        (ValueError, r"bool\[batch, time\], the values' first two axes", fnn.Masked(x, jnp.ones((BATCH, 2), bool))),
        (ValueError, "must be a sequence", (x, jnp.ones((BATCH, TIME), bool))),
    ]
    for kind, sentence, bad in cases:
        with pytest.raises(kind, match=sentence):
            jax.eval_shape(layer.apply, params, state, bad)
    with pytest.raises(ValueError, match="lengths must be int"):
        fnn.Masked.of_lengths(x, jnp.ones(BATCH))
    with pytest.raises(ValueError, match="reverse=True needs the whole sequence"):
        fnn.memory.init_cache(prepared("gru", reverse=True)[2], BATCH, 3)
    with pytest.raises(ValueError, match="must have a layer with a cache"):
        fnn.memory.init_cache(((), ()), 2, 3)
    with pytest.raises(ValueError, match="memory was started for a batch of 2"):
        jax.eval_shape(layer.apply, params, fnn.memory.init_cache(state, 2, 3), x)
    with pytest.raises(ValueError, match="unknown initial 'zero'; did you mean 'zeros'"):
        fnn.gru(3, initial="zero")
    with pytest.raises(ValueError, match="must have no parameters"):
        fnn.rnn(3, tap=fnn.dense(3)).init(jax.random.key(0), x)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_written_derivative_is_that_of_the_loop(kind):
    """A layer inside makes JAX derive the loop step by step: forward, backward and twice, in float64."""
    with jax.enable_x64(True):
        layer, params, state, x = prepared(kind, jnp.float64, reverse=True, initial="learned")
        stepwise = LAYERS[kind](WIDTH, reverse=True, initial="learned", tap=fnn.activation("identity"))
        tapped = stepwise.init(jax.random.key(0), x)[1]
        x = fnn.Masked.of_lengths(x, LENGTHS)
        along = jax.tree.map(jnp.cos, params)

        def loss(params, layer, state):
            return jnp.sum(jnp.sin(layer.apply(params, state, x)[0].values))

        def derivatives(layer, state):
            def gradient(params):
                return jax.grad(loss)(params, layer, state)

            def of_gradient(params):
                return sum(jnp.vdot(a, jnp.sin(a)) for a in jax.tree.leaves(gradient(params)))

            first = jax.jvp(lambda p: loss(p, layer, state), (params,), (along,))
            return first, gradient(params), jax.grad(of_gradient)(params)

        ours, theirs = jax.jit(lambda: (derivatives(layer, state), derivatives(stepwise, tapped)))()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-11, 1e-12), ours, theirs)


def test_the_loop_keeps_the_slopes_and_no_product_adds_up_the_kernels_gradient():
    """6 arrays of slopes and h for an lstm's backward pass, and one product for U outside of the loop."""
    layer, params, state, x = prepared("lstm")
    gradient = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(layer.apply(p, state, x)[0])))(params)
    forward, backward = [e for e in gradient.eqns if e.primitive.name == "scan"]
    assert sum(v.aval.shape[:1] == (TIME,) for v in forward.outvars) == 8  # and the outputs
    inside = [e.outvars[0].aval.shape for e in backward.params["jaxpr"].eqns if e.primitive.name == "dot_general"]
    assert inside == [(BATCH, WIDTH)]


@pytest.mark.parametrize("phi", ["softmax", jax.nn.softmax], ids=["by_name", "a_function"])
def test_an_activation_that_mixes_numbers_is_derived_by_jax(phi):
    layer, params, state, x = prepared("rnn", activation=phi)

    def by_hand(params):
        h = jnp.zeros((BATCH, WIDTH))
        for t in range(TIME):
            h = jax.nn.softmax(x[:, t] @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"])
        return jnp.sum(jnp.sin(5 * h))

    def of_layer(params):
        return jnp.sum(jnp.sin(5 * layer.apply(params, state, x)[0][:, -1]))

    ours, theirs = jax.jit(lambda params: (jax.grad(of_layer)(params), jax.grad(by_hand)(params)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), ours, theirs)


@pytest.mark.parametrize(("cell", "form"), [("rnn", "whole"), ("gru", "padded"), ("lstm", "holes")])
def test_a_bidirectional_net_reads_each_half_where_it_has_seen_everything(cell, form):
    """By hand: each half alone on the real positions of each example, its last output in its own direction."""
    net = fnn.models.rnn(2, 2 * WIDTH, 3, cell=cell, bidirectional=True)
    x = drawn()
    params, state = started(net.init, x)
    mask = np.ones((BATCH, TIME), bool)
    if form == "padded":
        mask = np.arange(TIME) >= np.array([0, 3, 3, 0])[:, None]
        mask[1] = mask[1, ::-1]
    if form == "holes":
        mask[:, 2] = mask[1, 0] = mask[2, -1] = False
    logits, _ = jax.jit(net.apply)(params, state, x if form == "whole" else fnn.Masked(x, as_jax(mask)))
    one = LAYERS[cell](WIDTH)

    @jax.jit
    def run(weights, sequence):
        return one.apply(weights, one.init(jax.random.key(0), sequence)[1], sequence)[0]

    for i in range(BATCH):
        h = np.asarray(x)[i : i + 1, mask[i]]
        for block in (params[0], params[1][0]):  # the second one lies in a stack of one
            forward, backward = block[0][0]
            ahead, behind = np.asarray(run(forward, h)), np.asarray(run(backward, h[:, ::-1]))
            h = np.concatenate([ahead, behind[:, ::-1]], axis=-1)
        read = np.concatenate([ahead[0, -1], behind[0, -1]])
        np.testing.assert_allclose(logits[i], read @ params[-1]["kernel"] + params[-1]["bias"], atol=1e-5)


def test_the_half_that_runs_backwards_sees_all_inputs():
    """With a head that is blind to the forward half, every real position still changes the logits."""
    net, x = fnn.models.rnn(1, 2 * WIDTH, 3, bidirectional=True), drawn()
    params, state = jax.jit(net.init)(jax.random.key(0), x)
    head = params[-1] | {"kernel": np.asarray(params[-1]["kernel"]) * (np.arange(2 * WIDTH) >= WIDTH)[:, None]}
    mask = np.ones((BATCH, TIME), bool)
    mask[1, 3:] = mask[2, :2] = False
    slope = jax.jit(jax.grad(lambda x: jnp.sum(net.apply((*params[:-1], head), state, fnn.Masked(x, mask))[0] ** 2)))(x)
    np.testing.assert_array_equal(np.any(slope != 0, axis=-1), mask)
