"""`packed`: an optimiser sees all small arrays as one vector, or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optimizers import GRADS, OPTIMIZERS, PARAMS, STACKED_GRADS, furthest, looped_form, masked, trained

import fnn
from fnn.training import clip
from fnn.tree import Stacked

MIXED = {
    "wide": np.linspace(-1, 1, 200 * 100, dtype=np.float32).reshape(200, 100),
    "stack": Stacked(np.linspace(0.5, 2, 12, dtype=np.float32).reshape(3, 4)),
    "half": np.linspace(-2, 1, 10).astype(jnp.bfloat16),
    "one": np.float32(3),
}
"""One large array among small ones, of two dtypes."""


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(clip.by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)),
        optax.chain(clip.by_value(0.3), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)), 2),
    ],
    ids=["adamw", "momentum", "multi_steps"],
)
def test_packed_changes_no_number_and_packs_all_small_arrays(tx):
    params = (
        MIXED if isinstance(tx, optax.GradientTransformationExtraArgs) else {**MIXED, "half": np.ones(10, np.float32)}
    )
    grads = jax.tree.map(lambda w: np.stack([np.asarray(c * w + 0.2, w.dtype) for c in (1, -0.5, 2)]), params)
    plain, packed = (trained(t, params, grads) for t in (tx, fnn.optimizers.packed(tx)))
    assert jax.tree.structure(plain) == jax.tree.structure(packed)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(packed), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(b, np.float64), np.asarray(a, np.float64), rtol=tolerance, atol=1e-7)
    shapes = {leaf.shape for leaf in jax.tree.leaves(fnn.optimizers.packed(tx).init(MIXED)) if jnp.ndim(leaf)}
    assert shapes == {(200, 100), (13,), (10,)}  # the large array; float32 numbers; bfloat16 numbers


def test_packed_passes_extra_arguments_and_works_without_params():
    seen = {}

    def update(updates, state, params=None, *, value, grad):
        seen.update(params=params, value=value, grad=grad)
        return updates, state

    tx = fnn.optimizers.packed(optax.GradientTransformationExtraArgs(lambda params: (), update))
    g = {"a": jnp.ones((2, 2)), "b": jnp.zeros(3)}
    updates, _ = tx.update(g, tx.init(g), value=jnp.float32(7), grad=g)
    assert jax.tree.map(jnp.shape, updates) == {"a": (2, 2), "b": (3,)}
    assert seen["params"] is None and seen["value"] == 7
    np.testing.assert_array_equal(seen["grad"][0], [1, 1, 1, 1, 0, 0, 0])


APART = ["adamw_by_shape", "adamw_by_path", "labels_by_shape", "labels_of_one_block", "labels_by_order", "muon", "lamb"]
APART += ["lars", "adafactor", "sm3", "block_norms", "values", "mean_of_norms", "adam_on_the_head"]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("form", [lambda p: p, looped_form], ids=["written_out", "looped"])
def test_packed_refuses_what_tells_arrays_apart(name, form):
    tx, params = fnn.optimizers.packed(OPTIMIZERS[name]), form(PARAMS)
    with pytest.raises(ValueError, match="packed: the optimiser must treat all arrays alike, got"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def test_packed_refuses_a_mask_that_takes_all_arrays_until_they_are_packed():
    kernels = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 5))}
    tx = fnn.optimizers.packed(masked(lambda a: a.ndim > 1))
    with pytest.raises(ValueError, match="tells them apart by their shapes"):
        tx.update(kernels, tx.init(kernels), kernels)


def noise():
    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u + jax.random.normal(jax.random.key(0), u.shape), updates), state

    return optax.GradientTransformation(lambda params: (), update)


def sizes_in_the_state():
    def init(params):
        return jax.tree.map(lambda a: jnp.float32(a.size), params)

    return optax.GradientTransformation(init, lambda u, s, p=None: (jax.tree.map(lambda u, s: u / s, u, s), s))


@pytest.mark.parametrize(
    "tx", [noise(), sizes_in_the_state(), masked(lambda a: a.ndim > 0)], ids=["noise", "init", "scalars"]
)
def test_packed_refuses_what_depends_on_the_shapes_of_arrays(tx):
    params = {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(())}
    with pytest.raises(ValueError, match="packed: the optimiser must treat all arrays alike"):
        fnn.optimizers.packed(tx).update(params, fnn.optimizers.packed(tx).init(params), params)


def test_packed_inside_of_a_chain_is_right_on_stacks():
    tx = optax.chain(clip.by_block_norm(0.2), fnn.optimizers.packed(optax.adam(1e-2)))
    wanted = looped_form(trained(optax.chain(clip.by_block_norm(0.2), optax.adam(1e-2)), PARAMS, GRADS))
    assert furthest(trained(fnn.optimizers.per_depth(tx), looped_form(PARAMS), STACKED_GRADS), wanted) < 1e-5


def test_packed_refuses_what_takes_the_loss_again():
    net, x = fnn.dense(3), jnp.ones((2, 6))
    for tx in (optax.lbfgs(), optax.contrib.sophia(0.1)):
        state = fnn.TrainState.create(net, fnn.optimizers.packed(tx), jax.random.key(0), x)
        with pytest.raises(
            ValueError, match="packed: the optimiser must treat all arrays alike, got one that does not"
        ):
            fnn.train_step(net, fnn.losses.cross_entropy, fnn.optimizers.packed(tx))(state, (x, jnp.arange(2)))
