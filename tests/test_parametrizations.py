"""Parametrisations: the tables of the papers, and repeat against serial under their rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import parametrizations
from fnn.parametrizations import Parametrization

KEY, X = jax.random.key(0), jnp.ones((4, 20))


@pytest.mark.parametrize(
    ("name", "adaptive", "expected"),
    [
        # input, hidden, output kernels; biases of each. m = 256/64 = 4, d = 12/4 = 3.
        ("standard", True, [1, 1, 1, 1, 1, 1]),
        ("mup", True, [1, 1 / 4, 1 / 4, 1, 1, 1]),
        ("mup", False, [4, 1, 1 / 4, 4, 4, 1]),
        ("completep", True, [1, 1 / 4, 1 / 4, 1, 1, 1]),
        ("completep", False, [4, 3, 1 / 4, 4, 12, 1]),
    ],
)
def test_rates_of_the_papers(name, adaptive, expected):
    chosen = Parametrization(name)
    shapes = {"input": (20, 256), "hidden": (256, 256), "output": (256, 10)}
    kernels = [chosen.rate(role, shape, adaptive=adaptive, depth=12) for role, shape in shapes.items()]
    biases = [chosen.rate(role, shape[-1:], adaptive=adaptive, depth=12) for role, shape in shapes.items()]
    assert kernels + biases == expected


def test_at_the_base_sizes_all_agree():
    for name in parametrizations.NAMES:
        chosen = Parametrization(name, base_width=32, base_depth=6)
        for adaptive in (True, False):
            for role, shape in {"input": (5, 32), "hidden": (32, 32), "output": (32, 3), "hidden ": (32,)}.items():
                assert chosen.rate(role.strip(), shape, adaptive=adaptive, depth=6) == 1
        nets = [fnn.models.mlp(6, 32, 3, residual=True, parametrization=p) for p in ("standard", chosen)]
        outputs = [net.apply(*net.init(KEY, X), X)[0] for net in nets]
        np.testing.assert_allclose(*outputs, rtol=1e-6)


def test_the_net_has_the_output_kernel_and_the_branches_of_its_parametrisation():
    plain, mup = (fnn.models.mlp(3, 256, 5, parametrization=name).init(KEY, X)[0] for name in ("standard", "mup"))
    kernels = [[a for a in jax.tree.leaves(params) if a.ndim > 1] for params in (plain, mup)]
    for a, b in zip(*(k[:-1] for k in kernels), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(kernels[1][-1], kernels[0][-1] / 2, rtol=1e-6)  # sqrt(64/256)
    # completep is a net whose branches are 4/8 as large, and whose output kernel is that of mup
    net = fnn.models.mlp(8, 64, 5, residual=True, parametrization="completep")
    same = fnn.models.mlp(8, 64, 5, residual=True, residual_scale=0.5)
    params, state = net.init(KEY, X)
    np.testing.assert_allclose(net.apply(params, state, X)[0], same.apply(params, state, X)[0], rtol=1e-6)
    with pytest.raises(ValueError, match="completep is about residual nets"):
        fnn.models.mlp(3, 8, 2, parametrization="completep")
    with pytest.raises(ValueError, match="did you mean 'mup'"):
        fnn.models.mlp(3, 8, 2, parametrization="mub")


def test_updates_are_multiplied_by_layer_and_blocks_are_alike():
    """Plain gradients of ones: the update is -rate times the factor; in `repeat` and in `serial`, with patterns or without."""
    chosen = Parametrization("mup", base_width=16)
    tx = fnn.optimizers.parametrized(optax.sgd(1.0), chosen, adaptive=True)
    net = fnn.models.mlp(4, 64, 3, unroll=1)
    params, _ = net.init(KEY, X)
    for one in (tx, fnn.optimizers.per_depth(tx)):
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = one.update(ones, one.init(params), params)
        found = {
            path: float(np.unique(a).item())
            for path, a in zip(fnn.tree.paths(params), jax.tree.leaves(updates), strict=True)
        }
        kernels = [v for path, v in found.items() if path.endswith("kernel")]
        assert (
            kernels[0] == -1
            and set(kernels[1:]) == {-0.25}
            and {v for p, v in found.items() if p.endswith("bias")} == {-1}
        )
    flat = {
        "a": jnp.ones((64, 64)),
        "first": {"k": jnp.ones((5, 64))},
        "last": {"k": jnp.ones((64, 3))},
        "z": jnp.ones(3),
    }
    tx = fnn.optimizers.parametrized(optax.sgd(1.0), chosen, adaptive=False, input="first/*", output="last/*")
    updates, _ = tx.update(flat, tx.init(flat), flat)
    assert [float(a.reshape(-1)[0]) for a in jax.tree.leaves(updates)] == [-1, -4, -0.25, -3 / 16]
    with pytest.raises(ValueError, match="must hold a kernel"):
        tx = fnn.optimizers.parametrized(optax.sgd(1.0), "mup")
        tx.update({"a": jnp.ones(3)}, tx.init({"a": jnp.ones(3)}))
    assert fnn.optimizers.parametrized(tx, "standard") is tx


def test_tables_belong_to_the_input():
    """With Adam a table has the base's rate, whatever the vocabulary, and the first kernel behind it is a hidden one."""
    tokens, width = np.zeros((2, 5), np.int32), 4 * 64
    untied = fnn.serial(fnn.embed(11, width), fnn.take_last(), fnn.dense(width), fnn.dense(3))
    for net in (fnn.models.decoder(11, 1, width), untied):
        params = jax.eval_shape(net.init, KEY, tokens)[0]
        for adaptive in (True, False):
            tx = fnn.optimizers.parametrized(optax.sgd(1.0), "mup", adaptive=adaptive)
            ones = jax.tree.map(lambda a: np.ones(a.shape, np.float32), params)
            found = tx.update(ones, tx.init(ones))[0]
            rates = {
                path: -float(a.reshape(-1)[0])
                for path, a in zip(fnn.tree.paths(params), jax.tree.leaves(found), strict=True)
            }
            tables = {rate for path, rate in rates.items() if path.endswith("embedding")}
            assert tables == ({1.0} if adaptive else {4.0})
            kernels = [rate for path, rate in rates.items() if path.endswith("kernel")]
            hidden = 0.25 if adaptive else 1.0
            assert kernels == ([hidden] * 5 + [hidden / 4 if adaptive else 1] if net is not untied else [hidden, 0.25])


def test_a_kernel_before_the_table_of_positions_is_the_input():
    net = fnn.serial(fnn.dense(128), fnn.positions(16), fnn.dense(128), fnn.take_last(), fnn.dense(3))
    ones = jax.tree.map(lambda a: np.ones(a.shape, np.float32), jax.eval_shape(net.init, KEY, np.zeros((2, 5, 8)))[0])
    for adaptive, wanted in ((True, [1, 0.5, 0.5]), (False, [2, 1, 0.5])):
        tx = fnn.optimizers.parametrized(optax.sgd(1.0), "mup", adaptive=adaptive)
        found = zip(fnn.tree.paths(ones), jax.tree.leaves(tx.update(ones, tx.init(ones))[0]), strict=True)
        assert [-float(a[0, 0]) for path, a in found if path.endswith("kernel")] == wanted


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_repeat_equals_serial_under_the_rates(name):
    """Ten steps of Adam from the same weights: the same parameters."""
    chosen = Parametrization(name, base_width=8, base_depth=2)
    tx = fnn.optimizers.parametrized(optax.adam(1e-2), chosen)
    y = jnp.array([0, 1, 2, 0])
    x = jax.random.normal(KEY, (4, 6))
    block = fnn.serial(fnn.dense(16), fnn.activation("tanh"))
    stacked = fnn.serial(fnn.dense(16), fnn.repeat(block, 3), fnn.dense(3))
    written = fnn.serial(fnn.dense(16), fnn.serial(*[block] * 3), fnn.dense(3))
    params, _ = stacked.init(KEY, x)
    blocks = [jax.tree.map(lambda a, i=i: a[i], params[1].blocks) for i in range(3)]
    like = jax.tree.structure(written.init(KEY, x)[0])
    ends = []
    for net, start in ((stacked, params), (written, like.unflatten(jax.tree.leaves([params[0], blocks, params[2]])))):
        at = fnn.TrainState.create(net, tx, KEY, x).replace(params=jax.tree.map(jnp.copy, start))
        step = fnn.train_step(net, fnn.losses.cross_entropy, tx)
        for _ in range(10):
            at, _ = step(at, (x, y))
        ends.append(at.params)
    blocks = [jax.tree.map(lambda a, i=i: a[i], ends[0][1].blocks) for i in range(3)]
    for a, b in zip(jax.tree.leaves([ends[0][0], blocks, ends[0][2]]), jax.tree.leaves(ends[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
