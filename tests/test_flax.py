"""The same weights in Flax: outputs, gradients, and twenty Adam steps with clipping."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_jax, begun

import fnn

DEPTH, WIDTH, CLASSES = 4, 16, 5


class Mlp(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        for _ in range(DEPTH):
            x = nn.Dense(WIDTH, **options)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False, **options)(x)
            x = nn.tanh(x)
        return nn.Dense(CLASSES, **options)(x)


def to_flax(params):
    """fnn's tuple (flatten, dense, norm, activation, trunk, dense) as Flax's flat dict."""
    _, dense, norm, _, trunk, last = params
    stacked = trunk["trunk"]
    blocks = fnn.tree.unstack(stacked) if isinstance(stacked, fnn.tree.Stacked) else stacked
    layers = [(dense, norm), *((block[0], block[1]) for block in blocks)]
    named = {f"Dense_{i}": d for i, (d, _) in enumerate(layers)} | {
        f"BatchNorm_{i}": n for i, (_, n) in enumerate(layers)
    }
    return named | {f"Dense_{DEPTH}": last}


@pytest.mark.parametrize(
    ("bits", "unroll"), [(32, True), (64, True), (64, 1)], ids=["32-unrolled", "64-unrolled", "64-scanned"]
)
def test_mlp_with_batch_norm_equals_flax(bits, unroll):
    dtype, tolerance = (jnp.float32, 1e-5) if bits == 32 else (jnp.float64, 1e-10)
    with jax.enable_x64(bits == 64):
        rng = np.random.default_rng(0)
        x, y = as_jax(rng.normal(size=(32, 8)), dtype), as_jax(rng.integers(0, CLASSES, 32))
        net = fnn.models.mlp(DEPTH, WIDTH, CLASSES, activation="tanh", norm="batch_norm", unroll=unroll)
        optimizer = optax.chain(fnn.clip.by_global_norm(0.7), optax.adam(1e-2))
        state = begun(net, optimizer, x)
        module = Mlp(dtype)
        theirs = to_flax(state.params)
        stats = {f"BatchNorm_{i}": {"mean": np.zeros(WIDTH, dtype), "var": np.ones(WIDTH, dtype)} for i in range(DEPTH)}

        @jax.jit
        def reference(params, stats):
            def loss(params):
                logits, new = module.apply({"params": params, "batch_stats": stats}, x, True, mutable="batch_stats")
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean(), (logits, new["batch_stats"])

            return jax.value_and_grad(loss, has_aux=True)(params)

        @jax.jit
        def ours(params, net_state):
            def loss(params):
                logits, _ = net.apply(params, net_state, x, train=True)
                return fnn.losses.cross_entropy(logits, y).mean(), logits

            return jax.value_and_grad(loss, has_aux=True)(params)

        (value, (logits, _)), gradients = reference(theirs, stats)
        (our_value, our_logits), our_gradients = ours(state.params, state.net_state)
        np.testing.assert_allclose(our_logits, logits, rtol=tolerance, atol=tolerance)
        assert float(our_value) == pytest.approx(float(value), abs=tolerance)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), to_flax(our_gradients), gradients
        )
        if bits == 32:
            return
        # Twenty steps: their loop with optax's own clip, ours with fnn's.
        their_optimizer = optax.chain(optax.clip_by_global_norm(0.7), optax.adam(1e-2))
        opt_state = their_optimizer.init(theirs)

        @jax.jit
        def their_step(theirs, stats, opt_state):
            (_, (_, stats)), gradients = reference(theirs, stats)
            updates, opt_state = their_optimizer.update(gradients, opt_state, theirs)
            return optax.apply_updates(theirs, updates), stats, opt_state

        step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
        clipped = []
        for _ in range(20):
            theirs, stats, opt_state = their_step(theirs, stats, opt_state)
            state, metrics = step(state, (x, y))
            clipped.append(float(metrics["clip_fraction"]))
        assert 0 < sum(clipped) < 20  # the clip acts on some steps and not on others
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), to_flax(state.params), theirs)
        # Flax's running moments start at (0, 1) and are not debiased: compare them over their own start.
        for i, mine in enumerate([state.net_state[2], *_norm_states(state.net_state[4]["trunk"])]):
            weight = np.asarray(mine["weight"])
            np.testing.assert_allclose(mine["mean"], stats[f"BatchNorm_{i}"]["mean"], atol=1e-8)
            np.testing.assert_allclose(
                np.asarray(mine["var"]) + (1 - weight), stats[f"BatchNorm_{i}"]["var"], atol=1e-8
            )


def _norm_states(trunk):
    blocks = fnn.tree.unstack(trunk) if isinstance(trunk, fnn.tree.Stacked) else trunk
    return [block[1] for block in blocks]
