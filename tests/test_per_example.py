"""Gradients of single examples: every method against `vmap(grad)`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subjects import SUBJECTS, B, draw, flat

import fnn
from fnn import compiled, lowering
from fnn.gradients import cuts, operations, search, squares
from fnn.gradients import program as jaxprs

THOROUGH = {"depth_in_groups", "recurrent"}


REPEATS = ("embedding_take", "equinox")
"""`table[ids]` is a take, and Equinox's layers are products as NNX's are."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in REPEATS)) for n in SUBJECTS])
def test_every_method_equals_vmap_of_grad(name):
    subject = SUBJECTS[name]()

    def loss(params, example):
        example, counts = example
        return counts * subject.loss(params, example)

    # The gradient of one example is zero: of its factors one is, the other is not.
    counts = np.ones(B, np.float32) if name in THOROUGH else np.float32(np.arange(B) != 2)
    every = fnn.per_example(loss, axis_name=subject.axis_name)
    w = np.linspace(0.5, 2, B, dtype=np.float32)

    @jax.jit
    def both(params, batch, max_norm):
        g = every(params, batch)
        results = {
            "materialize": g.materialize(),
            "squared_norms": g.squared_norms(),
            "per_leaf": g.norms(per_leaf=True),
            "mean": g.mean(),
            "gram": g.gram(),
            "clipped_per_layer": g.clipped_mean(max_norm / 2, per_layer=True).mean,
        }
        if name in THOROUGH:
            results |= {
                "weighted_mean": g.weighted_mean(w),
                "cosines": g.cosines(),
                "clipped": g.clipped_mean(max_norm),
                "variance": g.variance(),
                "variances": g.variance(per_leaf=True),
                "signal_to_noise": g.signal_to_noise(),
            }
        oracle = jax.vmap(jax.grad(loss), in_axes=(None, 0), axis_name=subject.axis_name)
        return results, oracle(params, batch), g

    max_norm = jnp.float32(1.0)
    got, want, g = both(subject.params, (subject.batch, counts), max_norm)
    got, want = jax.device_get((got, want))
    vectors = flat(want)
    norms = np.linalg.norm(vectors, axis=1)
    size = norms.max()

    def check(tree, expected, scale=size):
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            assert a.shape == np.shape(b)
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * scale)

    def squares(k, a):
        return np.moveaxis(np.sum(np.square(a), axis=tuple(range(1 + k, a.ndim))), 0, -1)

    def weighted(tree, w):
        return jax.tree.map(lambda a: np.tensordot(w, np.asarray(a, np.float64), 1), tree)

    check(got["materialize"], want)
    assert [a.dtype for a in jax.tree.leaves(got["materialize"])] == [a.dtype for a in jax.tree.leaves(want)]
    check(got["squared_norms"], norms**2, size**2)
    layer_norms = fnn.tree.map_depth(lambda k, a: np.sqrt(squares(k, np.asarray(a, np.float64))), want)
    check(got["per_leaf"], layer_norms)
    mean = weighted(want, np.full(B, 1 / B))
    check(got["mean"], mean)
    check(got["gram"], vectors @ vectors.T, size**2)

    def clip(k, a, norms):
        factors = np.minimum(1, 0.5 / np.maximum(np.moveaxis(norms, -1, 0), 1e-30))
        return np.mean(a * factors.reshape(factors.shape + (1,) * (a.ndim - factors.ndim)), axis=0)

    check(got["clipped_per_layer"], fnn.tree.map_depth(clip, want, layer_norms))
    assert set(subject.routes) <= {r.route for r in g.routes}
    if name not in THOROUGH:
        return
    check(got["weighted_mean"], weighted(want, np.asarray(w / w.sum())))
    check(got["cosines"], vectors @ vectors.T / np.outer(norms, norms), 10.0)
    clipped = weighted(want, np.minimum(1, 1 / norms) / B)
    check(got["clipped"].mean, clipped)
    np.testing.assert_allclose(got["clipped"].fraction, np.mean(norms > 1))
    bias = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (clipped, mean)), strict=True)))
    check(got["clipped"].bias, bias)
    trace = np.sum(np.var(vectors, axis=0, ddof=1))
    check(got["variance"], trace, size**2)
    check(sum(np.sum(a) for a in jax.tree.leaves(got["variances"])), trace, size**2)
    signal = np.sum(np.square(vectors.mean(0))) - trace / B
    np.testing.assert_allclose(got["signal_to_noise"], signal / trace, atol=1e-4)


def test_explain_prints_what_is_kept(capsys):
    subject = SUBJECTS["depth"]()
    g = fnn.per_example(subject.loss)(subject.params, subject.batch)
    g.explain()
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "trunk/[:]/0/kernel" in line)
    # 3 blocks, 6 examples, 8 + 8 numbers, and 8·8 of them whole.
    assert "product, by depth" in row and "1.15 kB" in row and "4.61 kB" in row, row
    assert lines[-1].startswith("total") and "6 examples" in lines[-1]


def test_a_child_and_the_tree_of_the_object():
    subject = SUBJECTS["mlp"]()
    g = fnn.per_example(subject.loss)(subject.params, subject.batch)
    last = jax.tree.map(lambda a: np.sum(np.square(a), axis=tuple(range(1, a.ndim))), g.materialize()[-1])
    np.testing.assert_allclose(g[-1].squared_norms(), sum(last.values()), rtol=1e-6)
    again = jax.tree.map(lambda a: a, g)
    np.testing.assert_array_equal(again.norms(), g.norms())


def test_over_seeds_and_closed_over_values_and_aux():
    subject = SUBJECTS["mlp"]()
    stacked = jax.tree.map(lambda a: np.stack([a, 2 * a, -a]), jax.device_get(subject.params))
    mapped = jax.jit(jax.vmap(lambda p: fnn.per_example(subject.loss)(p, subject.batch).norms()))(stacked)
    one = fnn.per_example(subject.loss)
    alone = [one(jax.tree.map(lambda a, i=i: a[i], stacked), subject.batch).norms() for i in range(3)]
    np.testing.assert_allclose(mapped, np.stack(alone), rtol=1e-5)

    @jax.jit
    def scaled(factor):  # the loss closes over a traced value, and returns something besides
        g, aux = fnn.per_example(lambda p, e: (factor * subject.loss(p, e), e[1]), has_aux=True)(
            subject.params, subject.batch
        )
        return g.norms(), aux

    norms, aux = scaled(2.0)
    np.testing.assert_allclose(norms, 2 * alone[0], rtol=1e-5)
    np.testing.assert_array_equal(aux, subject.batch[1])


def test_nonlinear_derivative_rules_see_the_loss_itself():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def loss(p, x):
        return jnp.sum(jnp.square(clipped(x @ p)))

    p, x = draw(4, 3), draw(B, 4, seed=1)
    want = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(p, x)
    g = fnn.per_example(loss)(p, x)
    np.testing.assert_allclose(g.materialize(), want, rtol=1e-6)
    np.testing.assert_allclose(g.mean(), want.mean(0), rtol=1e-5, atol=1e-7)


def test_bfloat16_factors_with_float32_sums():
    p, x = draw(16, 8), draw(B, 5, 16, seed=1)

    def loss(p, x, dtype):
        return jnp.sum(jnp.square((x.astype(dtype) @ p.astype(dtype)).astype(jnp.float32)))

    exact = fnn.per_example(lambda p, x: loss(p, x, jnp.float32))(p, x)
    g = fnn.per_example(lambda p, x: loss(p, x, jnp.bfloat16))(p, x)
    assert {a.dtype for a in jax.tree.leaves(g.leaves)} == {jnp.dtype(jnp.bfloat16)}
    a, d = (np.asarray(v, np.float64).reshape(B, 5, -1) for v in g.leaves[0].arrays[0])
    rounded = np.einsum("btm,btn->bmn", a, d) * g.share
    rounded = rounded if rounded.shape[1:] == (16, 8) else rounded.swapaxes(1, 2)
    assert g.norms().dtype == g.mean().dtype == jnp.float32
    # The factors are rounded, their sums are not.
    np.testing.assert_allclose(g.squared_norms(), np.sum(rounded**2, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(g.mean(), rounded.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(g.norms(), exact.norms(), rtol=0.02)


def test_bad_input_is_one_sentence():
    def loss(p, x):
        return jnp.sum(jnp.square(x @ p))

    p, x = draw(4, 3), draw(B, 4)
    for batch in ((x, x[:2]), x[:0], (), jnp.float32(1)):
        with pytest.raises(ValueError, match="per_example: every array of the batch must have the same leading axis"):
            fnn.per_example(loss)(p, batch)
    with pytest.raises(ValueError, match="the loss of one example must be a scalar, got float32\\[3\\]"):
        fnn.per_example(lambda p, x: x @ p)(p, x)
    with pytest.raises(TypeError, match=r"the call takes \(params, batch\), got 3 arguments; put all parts"):
        fnn.per_example(loss)(p, x, x)
    with pytest.raises(TypeError, match="params must be real floating arrays, got complex64\\[4,3\\] at w"):
        fnn.per_example(lambda p, x: jnp.sum(jnp.abs(x @ p["w"])))({"w": p.astype(jnp.complex64)}, x)
    with pytest.raises(ValueError, match="did you mean 'frozen'"):
        fnn.per_example(loss, batch_norm="frozn")
    with pytest.raises(ValueError, match="got axis_name=None"):
        fnn.per_example(loss, batch_norm="loss")
    with pytest.raises(ValueError, match="differentiates eval_loss"):
        fnn.per_example(loss, batch_norm="running")
    g = fnn.per_example(loss)(p, x)
    small = np.uint8([250, 3, 0, 1, 2, 9])  # times the batch it would wrap around
    np.testing.assert_allclose(g.weighted_sum(small), g.weighted_sum(np.float32(small)), rtol=1e-6)
    with pytest.raises(ValueError, match="weights must be float\\[6\\]"):
        g.weighted_sum(jnp.ones(3))
    with pytest.raises(ValueError, match="max_norm must be a finite number above 0"):
        g.clipped_mean(-1.0)
    lone = fnn.per_example(loss)(p, x[:1])
    np.testing.assert_allclose(lone.norms(), jnp.linalg.norm(jax.grad(loss)(p, x[0]))[None], rtol=1e-6)
    with pytest.raises(ValueError, match="at least two examples"):
        lone.variance()


def refuse(*_):
    raise operations.Unreadable("renamed")


@pytest.mark.parametrize("what", ["scan", "all"])
def test_a_trace_that_reads_otherwise_is_stored_in_full_with_one_warning(monkeypatch, what):
    subject = SUBJECTS["depth"]()
    right = fnn.per_example(subject.loss)(subject.params, subject.batch)
    jaxprs.warn.cache_clear()
    compiled._shared.cache_clear()
    if what == "all":
        monkeypatch.setattr(jaxprs, "_atom", refuse)
    else:
        monkeypatch.setattr(jaxprs, "_rank", lambda var: 0)
    with pytest.warns(UserWarning, match="in a way that fnn does not know") as caught:
        g = fnn.per_example(subject.loss)(subject.params, subject.batch)
    assert len(caught) == 1
    assert "stored in full" in {r.route for r in g.routes}
    np.testing.assert_allclose(g.norms(), right.norms(), rtol=1e-6)
    np.testing.assert_allclose(flat(g.materialize()), flat(right.materialize()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("file", [jaxprs, search, cuts])
def test_a_bug_shows_itself(monkeypatch, file):
    subject = SUBJECTS["depth"]()
    compiled._shared.cache_clear()
    name = {jaxprs: "_inline", search: "recognise", cuts: "norm"}[file]
    monkeypatch.setattr(file, name, lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        fnn.per_example(subject.loss)(subject.params, subject.batch).norms()


def test_the_example_of_the_search():
    """That of the text at the top of `search`."""

    def loss(w, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)
        return jnp.sum(h)

    program = jaxprs.read(jaxprs.trace(jax.grad(loss), draw(3, 4, 4), draw(4))[0])
    (gradient,) = program.outputs
    before = [len(op.outputs) for op in program.ops]
    path = search.search(program, gradient)
    (source,) = path.sources
    (step,) = source.steps
    assert (path.levels, path.turn, path.normed, step.level) == (1, (4, 4), True, "depth")
    assert source.kind.swapped and [step.loop.body.spec(a).shape for a in source.atoms] == [(4,), (4,)]
    assert [len(op.outputs) for op in program.ops] == before
    factors, norms = cuts.emit(path, squares.Examples(1, None))
    assert [program.spec(a).shape for a in (*factors, *norms)] == [(3, 4), (3, 4), (3,)]
    cut = operations.prune(dataclasses.replace(program, outputs=[*factors, *norms]))
    d, h, sizes = operations.execute(cut, (w := draw(3, 4, 4), x := draw(4)))
    want = jax.grad(loss)(w, x)
    np.testing.assert_allclose(h[:, :, None] * d[:, None], want, rtol=1e-5)
    np.testing.assert_allclose(sizes, jnp.linalg.norm(want, axis=(1, 2)), rtol=1e-5)
    loop = next(op for op in cut.ops if op.name == "scan" and len(op.outputs) == 3)
    assert all(loop.body.spec(out).shape != (4, 4) for op in loop.body.ops for out in op.outputs)


def test_gradients_made_in_parts_are_the_same(monkeypatch):
    subjects = {name: SUBJECTS[name]() for name in ("conv_groups", "sequences")}

    @jax.jit
    def sums(params, batches):
        found = {}
        for name, subject in subjects.items():
            g = fnn.per_example(subject.loss)(params[name], batches[name])
            found[name] = g.norms(), g.mean(), g.clipped_mean(jnp.median(g.norms())).mean
        return found

    given = [{name: getattr(subject, part) for name, subject in subjects.items()} for part in ("params", "batch")]
    whole = sums(*given)
    jax.clear_caches()
    monkeypatch.setattr(lowering, "chunk", lambda: 1500)
    for name, found in sums(*given).items():
        for a, b in zip(*map(jax.tree.leaves, (found, whole[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    jax.clear_caches()


def test_every_example_draws_a_dropout_mask_of_its_own():
    """With one mask for all, equal examples have equal gradients, and a noise of zero."""
    layer = fnn.serial(fnn.dense(16), fnn.activation("tanh"), fnn.dropout(0.5), fnn.dense(3))
    batch = jnp.ones((6, 4)), jnp.ones(6, jnp.int32)
    params, state = jax.jit(layer.init)(jax.random.key(0), batch[0])
    key = jax.random.key(1)
    for axis_name in (None, "batch"):
        loss = fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy, axis_name=axis_name)

        @jax.jit
        def both(key, loss=loss, axis_name=axis_name):
            every = fnn.per_example(loss, axis_name=axis_name)(params, batch, key=key)
            oracle = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0), axis_name=axis_name)
            return every.norms(), every.materialize(), oracle(params, batch, jax.random.split(key, 6))

        norms, *gradients = both(key)
        for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert len(np.unique(np.round(np.asarray(norms), 5))) > 3
    with pytest.raises(TypeError, match=r"loss\(params, example, key\)"):
        fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy, key=key)


def test_a_bare_state_of_two_layers_is_not_taken_for_parameters_and_state():
    net, x = fnn.serial(fnn.batch_norm(), fnn.batch_norm()), draw(4, 3)
    params, state = net.init(jax.random.key(0), x)
    loss = fnn.example_loss(net, state, axis_name="batch")
    with pytest.raises(ValueError, match="example_loss: the state must be this net's"):
        fnn.per_example(loss, axis_name="batch")(params, (x, jnp.zeros(4, int)))


@pytest.mark.parametrize("batch_norm", ["loss", "frozen", "running"])
def test_keys_reach_every_meaning_of_batch_norm(batch_norm):
    layer = fnn.serial(fnn.dense(8), fnn.dropout(0.5), fnn.dense(1))
    x = jnp.ones((5, 4))
    params, state = jax.jit(layer.init)(jax.random.key(0), x)

    def loss(params, example, key):
        return jnp.sum(jnp.square(layer.apply(params, state, example[None], key=key, train=True)[0]))

    @jax.jit
    def both(key):
        every = fnn.per_example(loss, axis_name="batch", batch_norm=batch_norm, eval_loss=loss)(params, x, key=key)
        oracle = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))
        return every.materialize(), oracle(params, x, jax.random.split(key, 5))

    for a, b in zip(*map(jax.tree.leaves, both(jax.random.key(1))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
