"""The laws that every layer keeps, over the zoo. A layer's laws share their compilations, and so one worker."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accelerator import words
from conftest import as_jax, assert_same, started
from zoo import CASES, PADDED, floating, sample

import fnn


def table(cases, slow=lambda case: False):
    def marks(case):
        return [pytest.mark.xdist_group(case.name), *[pytest.mark.slow] * slow(case)]

    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks(c)) for c in cases])


# What follows runs for all with --slow. Without, these stand for the others, which are made of parts that are cases too.
FEW = ("transformer_decoder",)
MADE_OF_OTHERS = words("""bidirectional block_on_masked cross_attention_own_mask mlp mlp_residual_scanned repeat_in_groups
    repeat_of_repeat repeat_unrolled""")
VARIANTS = words("""attention_own_mask attention_window batch_norm_plain conv_2d_circular dense_without_bias gru
    residual_of_one_input rnn tap_with_bounds""")
# A layer that branches on values would differ under jit: one of each kind of it.
EAGER = words("""activations batch_norm batch_norm_masked conv_2d dense dropout embed layer_norm lstm repeat""")
OF_THE_REST = words("mlp_residual_scanned repeat_of_repeat repeat_unrolled cross_attention_own_mask block_on_masked")
every = table(CASES, slow=lambda case: (case.model and case.name not in FEW) or case.name in OF_THE_REST)
unless_made = table(CASES, slow=lambda case: case.model or case.name in MADE_OF_OTHERS)
# A repeat of `repeat` says all that a repeat of its variants would, and those compile for long.
repeatable = table(
    [case for case in CASES if case.keeps_shape and not case.name.startswith("repeat_")],
    slow=lambda case: case.name in (*VARIANTS, "attention_masked", "block_on_masked", "residual", "serial"),
)
bare = ("activation", "flatten", "dropout", "tap", "serial_empty")
parametric = table(
    [case for case in CASES if not case.name.startswith(bare)],
    slow=lambda case: case.model or case.name in (*MADE_OF_OTHERS, *VARIANTS),  # test_per_example has nested loops
)
BY_NAME = {case.name: case for case in CASES}


class Found(NamedTuple):
    """What a layer makes of an input: in eval mode, in training, of one example at a time, and of bfloat16."""

    without_key: Any
    with_key: Any
    same: Any
    trained: Any
    new: Any
    mapped: Any
    narrow: Any


def keys():
    return jax.random.split(jax.random.key(7))


@functools.cache
def prepared(name):
    """Return an input, parameters off their initial values, a state that has seen two training steps, and `run`.

    One program for what several laws ask: a trace and a compile more for each would take longer than all that they compute.
    """
    layer, noisy = BY_NAME[name].layer, BY_NAME[name].noisy
    init_key, run_key = keys()
    x = sample(BY_NAME[name])
    params, state = started(layer.init, x, key=init_key)

    def run(params, state, x):
        without_key, same = layer.apply(params, state, x)
        with_key, _ = layer.apply(params, state, x, key=run_key)
        trained, new = layer.apply(params, state, x, key=run_key, train=True)

        def one(x):
            x = jax.tree.map(lambda a: a[None], x)
            y, _ = layer.apply(params, state, x, axis_name="batch")
            if noisy:
                return jax.tree.map(lambda a: a[0], (y, y)), state
            t, new = layer.apply(params, state, x, train=True, axis_name="batch")
            return jax.tree.map(lambda a: a[0], (y, t)), new

        # The state that comes out is unbatched: out_axes=None refuses anything else.
        mapped = jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)
        narrow = floating(lambda a: a.astype(jnp.bfloat16), x)
        narrow = layer.apply(params, state, narrow, key=run_key, train=True)
        return Found(without_key, with_key, same, trained, new, mapped, narrow)

    compiled = jax.jit(run)
    moved = floating(lambda a: as_jax(1.5 * np.asarray(a) + 0.5, a.dtype), x)
    for _ in range(2):
        state = compiled(params, state, moved).new
    return x, params, state, compiled


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def floats(tree):
    """List the floating leaves: masks and ids have no gradient."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def close(a, b, rtol=2e-5):
    """Compare trees; the tolerance is relative to the largest number of the whole tree.

    Leaf by leaf there may be nothing to be relative to: biases below a batch norm have gradient zero.
    """
    assert jax.tree.structure(a) == jax.tree.structure(b)
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    scale = max([1e-30, *(float(np.max(np.abs(np.asarray(v, np.float64)), initial=0)) for v in b)])
    for u, v in zip(a, b, strict=True):
        np.testing.assert_allclose(np.asarray(u, np.float64), np.asarray(v, np.float64), rtol=0, atol=rtol * scale)


@table(CASES, slow=lambda case: case.name not in EAGER)
def test_jit_equals_eager(case):
    x, params, state, compiled = prepared(case.name)
    found = compiled(params, state, x)
    close((found.trained, found.new), case.layer.apply(params, state, x, key=keys()[1], train=True))
    if case.noisy or case.mixes:  # all others do in eval mode what they do in training
        close((found.without_key, found.same), case.layer.apply(params, state, x))


@every
def test_eval_needs_no_key_and_state_keeps_its_form(case):
    x, params, state, compiled = prepared(case.name)
    without_key, with_key, same, trained, new, *_ = compiled(params, state, x)
    for a, b in zip(jax.tree.leaves(without_key), jax.tree.leaves(with_key), strict=True):
        np.testing.assert_array_equal(a, b)
    for other in (same, new):
        assert fnn.core.same_spec(other, state)
        assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(other))
    assert fnn.core.same_spec(fnn.core.output_spec(case.layer, params, state, x), trained)


@every
def test_vmap_over_examples_equals_the_batch(case):
    x, params, state, compiled = prepared(case.name)
    found = compiled(params, state, x)
    (y, t), new = found.mapped
    close(y, found.without_key)
    if not case.noisy:
        close((t, new), (found.trained, found.new))


@repeatable
def test_repeat_equals_serial(case):
    x = sample(case)
    nets = fnn.repeat(case.layer, 2), fnn.serial(*[case.layer] * 2)

    @jax.jit
    def both(init_key, x):
        results = []
        for net in nets:
            params, state = net.init(init_key, x)

            def f(params, state, x, net=net):
                y, new = net.apply(params, state, x, key=keys()[1], train=True)
                return sum(jnp.sum(jnp.sin(3 * a)) for a in jax.tree.leaves(y)), (y, new)

            gradient = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True, allow_int=True)
            value, (*gradients, gx) = gradient(params, state, x)
            results.append((params, value, (*gradients, floats(gx))))
        return results

    (stacked, *a), (params, (value, (y, new)), (gp, gs, gx)) = both(keys()[0], x)
    stack = fnn.tree.stack
    assert_same(stacked, stack(params))
    close(tuple(a), ((value, (y, stack(new))), (stack(gp), stack(gs), gx)), rtol=1e-4)


@unless_made
def test_gradients_agree_with_finite_differences_in_float64(case):
    x, params, state, *_ = prepared(case.name)
    with jax.enable_x64(True):
        at, state = floating(lambda a: as_jax(np.float64(a)), ((params, x), state))
        fixed, at = at, floats(at)
        direction = jax.tree.map(lambda a: np.cos(np.arange(a.size)).reshape(a.shape), at)
        step = 1e-5

        def f(inputs):
            leaves, treedef = jax.tree.flatten(fixed)
            moving = iter(inputs)
            params, x = treedef.unflatten(next(moving) if is_float(leaf) else leaf for leaf in leaves)
            y, _ = case.layer.apply(params, state, x, key=keys()[1], train=True)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y))

        @jax.jit
        def both(at):
            moved = [jax.tree.map(lambda a, d, s=s: a + s * step * d, at, direction) for s in (1, -1, 2, -2)]
            near, behind, far, far_behind = jax.lax.map(f, jax.tree.map(lambda *a: jnp.stack(a), *moved))
            difference = (8 * (near - behind) - (far - far_behind)) / (12 * step)
            return fnn.tree.dot(jax.grad(f)(at), direction), difference

        # Five points, since five batch norms on six rows bend sharply: truncation about step⁴, rounding 1e-16/step.
        np.testing.assert_allclose(*both(at), rtol=1e-6, atol=1e-8)


@every
def test_bfloat16_in_and_out_with_float32_statistics(case):
    x, params, state, compiled = prepared(case.name)
    found = compiled(params, state, x)
    y, new = found.narrow
    expected = jnp.bfloat16 if floats(x) else jnp.float32  # of ids an embedding returns its own dtype
    assert all(leaf.dtype == expected for leaf in floats(y))
    assert fnn.core.same_spec(new, state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, new)))
    # bfloat16 has 8 bits: 2^-8 a rounding, and a few layers of them. Masks are the same in either dtype.
    close((y, new), (found.trained, found.new), rtol=0.06)


@table(PADDED)
def test_values_at_padded_positions_change_nothing(case):
    """NaN, infinities and numbers near the end of float32, bit for bit: outputs, state, and every gradient."""
    x = sample(case)
    params, state = started(case.layer.init, x, key=keys()[0])

    def at_each_masked(function, tree, *rest):
        return jax.tree.map(function, tree, *rest, is_leaf=lambda node: isinstance(node, fnn.Masked))

    def real(node):
        return node.mask.reshape(node.mask.shape + (1,) * (node.values.ndim - 2))

    @jax.jit
    def run(fill):
        def padded(node):
            if not isinstance(node, fnn.Masked):
                return node
            # Among token numbers, one that the table does not have.
            number = fill if is_float(node.values) else jnp.where(jnp.isfinite(fill), 99, -5)
            return node._replace(values=jnp.where(real(node), node.values, number).astype(node.values.dtype))

        def at_padding(node, gradient):
            if not isinstance(node, fnn.Masked) or not is_float(node.values):
                return 0
            return jnp.max(jnp.abs(jnp.where(real(node), 0, gradient.values)))

        def objective(params, state, x):
            y, new = case.layer.apply(params, state, x, key=keys()[1], train=True)
            return sum(jnp.sum(jnp.sin(a)) for a in floats(y)), (y, new)

        gradient = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True, allow_int=True)
        (value, aux), (gp, gs, gx) = gradient(params, state, at_each_masked(padded, x))
        return (value, aux, gp, gs, floats(gx)), at_each_masked(at_padding, x, gx)

    expected, sent = run(2.0)
    assert all(np.isfinite(a).all() for a in floats(expected)) and not any(map(np.any, jax.tree.leaves(sent)))
    for fill in (jnp.nan, jnp.inf, -jnp.inf, 3e38, -1e30):
        assert_same(run(fill), (expected, sent))


@pytest.mark.parametrize("name", ["embed", "tied"])  # all models reach tokens through these
def test_the_integer_dtype_of_tokens_does_not_matter(name):
    x, params, state, compiled = prepared(name)
    expected = compiled(params, state, x)
    for dtype in (jnp.int8, jnp.uint8, jnp.uint16, jnp.uint32):
        assert_same(compiled(params, state, np.asarray(x).astype(dtype)), expected)


@parametric
def test_per_example_gradients_equal_vmap_of_grad(case):
    x, params, state, *_ = prepared(case.name)

    def loss(params, x):
        one = jax.tree.map(lambda a: a[None], x)
        y, _ = case.layer.apply(params, state, one, key=keys()[1], train=True, axis_name="batch")
        leaves = (a for a in jax.tree.leaves(y) if jnp.issubdtype(a.dtype, jnp.floating))
        return sum(jnp.sum(jnp.sin(3 * a)) for a in leaves)

    @jax.jit
    def both(params, x):
        gradients = fnn.per_example(loss, axis_name="batch")(params, x)
        want = jax.vmap(jax.grad(loss), in_axes=(None, 0), axis_name="batch")(params, x)
        squares = fnn.tree.map_depth(lambda k, g: jnp.moveaxis(jnp.sum(g**2, tuple(range(k + 1, g.ndim))), 0, k), want)
        got = gradients.squared_norms(per_leaf=True), gradients.mean()
        return got, (squares, jax.tree.map(lambda g: jnp.mean(g, axis=0), want))

    for a, b in zip(*both(params, x), strict=True):
        close(a, b)


@every
def test_unknown_keyword_is_a_type_error(case):
    with pytest.raises(TypeError):
        case.layer.apply((), (), np.zeros(case.shape), mode="train")
