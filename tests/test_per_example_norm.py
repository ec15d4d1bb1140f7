"""Gradients of single examples where batch norm makes them depend on one another: four semantics by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started
from subjects import B, draw, flat, labels

import fnn


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("float64", 1e-14)])
def test_path_and_loss_sum_to_the_batch_gradient(dtype, rounding):
    """Relative to the gradient's norm: in float32 the batch gradient itself is 3e-7 off its value in float64.

    In float64 also: what `loss` and `running` stand for, example by example.
    """
    with jax.enable_x64(dtype == "float64"):
        layer = fnn.models.mlp(3, 8, 3, activation="tanh", norm="batch_norm", unroll=1)
        params, state = started(layer.init, draw(B, 5))
        x, y, params, state = jax.tree.map(
            lambda a: as_jax(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            (draw(B, 5), labels(), params, state),
        )
        loss = fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy, axis_name="batch")
        evaluated = fnn.example_loss(layer, (params, state), loss=fnn.losses.cross_entropy, train=False)

        def batch_losses(p):
            return fnn.losses.cross_entropy(layer.apply(p, state, x, train=True)[0], y)

        @jax.jit
        def compute(p):
            exact = dtype == "float64"
            every = {
                name: fnn.per_example(loss, axis_name="batch", batch_norm=name, eval_loss=evaluated)(p, (x, y))
                for name in ("path", "loss", *["running"] * exact)
            }
            wanted = {}
            if exact:
                running = jax.vmap(jax.grad(evaluated), in_axes=(None, 0))(p, (x, y))
                wanted = {"loss": jax.jacrev(batch_losses)(p), "running": running}
            whole = jax.grad(lambda p: jnp.mean(batch_losses(p)))(p)
            misses = [jax.tree.map(jnp.subtract, every[name].mean(), whole) for name in ("path", "loss")]
            stored = {name: every[name].materialize() for name in wanted}
            return [fnn.tree.norm(miss) / fnn.tree.norm(whole) for miss in misses], stored, wanted

        misses, stored, wanted = compute(params)
    assert max(map(float, misses)) < rounding, misses
    for name, want in wanted.items():
        np.testing.assert_allclose(flat(stored[name]), flat(want), rtol=1e-10, atol=1e-12)


def test_frozen_statistics_against_a_norm_with_constants():
    def apply(p, x, stop):
        h = x @ p["w"]
        mean = stop(jax.lax.pmean(h, "batch"))
        var = stop(jax.lax.pmean(jnp.square(h - mean), "batch"))
        h = jnp.tanh(p["scale"] * (h - mean) / jnp.sqrt(var + 1e-3))
        return jnp.sum(jnp.square(h @ p["out"]))

    params = {"w": draw(5, 4), "scale": draw(4), "out": draw(4, 2)}
    x = draw(B, 5, seed=2)
    one = jax.grad(lambda p, x: apply(p, x, jax.lax.stop_gradient))
    want = jax.jit(jax.vmap(one, in_axes=(None, 0), axis_name="batch"))
    frozen = fnn.per_example(lambda p, x: apply(p, x, lambda a: a), axis_name="batch", batch_norm="frozen")
    np.testing.assert_allclose(flat(frozen(params, x).materialize()), flat(want(params, x)), rtol=1e-4, atol=1e-5)
    # fnn's own batch norm, whose derivative is written out.
    layer = fnn.serial(fnn.dense(4), fnn.repeat(fnn.batch_norm(eps=1e-3), 1), fnn.activation("tanh"))
    p, state = jax.jit(layer.init)(jax.random.key(0), x)
    p[0]["kernel"] = params["w"]
    p[1].blocks["scale"] = params["scale"][None]

    def loss(p, x):
        return jnp.sum(jnp.square(layer.apply(p, state, x[None], train=True, axis_name="batch")[0] @ params["out"]))

    g = fnn.per_example(loss, axis_name="batch", batch_norm="frozen")(p, x)
    np.testing.assert_allclose(g.materialize()[0]["kernel"], want(params, x)["w"], rtol=1e-4, atol=1e-5)

    def in_branch(p, x):
        return jax.lax.cond(jnp.sum(p) > 0, lambda: jax.lax.pmean(jnp.sum(x * p), "batch"), lambda: jnp.sum(x * p))

    with pytest.raises(NotImplementedError, match="frozen"):
        fnn.per_example(in_branch, axis_name="batch", batch_norm="frozen")(p[0]["bias"], draw(B, 4))


def test_a_batch_of_one_below_a_batch_norm_is_refused():
    def loss(p, x):
        h = x @ p
        return jnp.sum(jnp.square(h - jax.lax.pmean(h, "batch"))), jax.lax.pmean(h, "batch")

    every = fnn.per_example(loss, has_aux=True, axis_name="batch")
    assert every(draw(4, 3), draw(2, 4))[0].norms().shape == (2,)
    with pytest.raises(ValueError, match="batch norm takes a lone example to its bias"):
        every(draw(4, 3), draw(1, 4))
    # A statistic that the gradient does not pass is no obstacle.
    outside = fnn.per_example(lambda p, x: (jnp.sum(x @ p), jax.lax.pmean(x, "batch")), has_aux=True, axis_name="batch")
    assert outside(draw(4, 3), draw(1, 4))[0].norms().shape == (1,)


def test_batch_norm_of_one_example_is_said(recwarn):
    """A foreign batch norm in training that averages over one example warns; with the axis, or in eval mode, it does not."""
    import flax.linen as nn
    from flax import nnx

    class Net(nn.Module):
        axis_name: str | None = None
        trained: bool = False

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3,))(x)
            x = nn.BatchNorm(use_running_average=self.trained, axis_name=self.axis_name)(x)
            return nn.Dense(3)(nn.tanh(x).mean(-2))

    x, y = draw(B, 4, 2), labels()
    specs = jax.eval_shape(Net(trained=True).init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: draw(*a.shape) ** 2, specs)

    def linen(p, example, **options):
        outputs, _ = Net(**options).apply(variables | {"params": p}, example[0][None], mutable=["batch_stats"])
        return fnn.losses.cross_entropy(outputs, example[1][None])[0]

    class Module(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense, self.norm = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    graph, weights, rest = nnx.split(Module(), nnx.Param, ...)

    def module(p, example, train=True, batched=True):
        model = nnx.merge(graph, p, rest, copy=True)
        model.train() if train else model.eval()
        outputs = model(example[0][:1] if batched else example[0][0])
        return fnn.losses.cross_entropy(outputs.reshape(1, 3), example[1][None])[0]

    p = variables["params"]
    with pytest.warns(
        UserWarning, match="per_example: the loss takes a statistic over a batch axis of size one"
    ) as seen:
        fnn.per_example(linen)(p, (x, y))
        fnn.per_example(module)(weights, (x, y))
        fnn.per_example(lambda p, e: module(p, e, batched=False))(weights, (x, y))
    assert len([w for w in seen if "per_example" in str(w.message)]) == 3
    recwarn.clear()
    fnn.per_example(lambda p, e: linen(p, e, axis_name="batch"), axis_name="batch")(p, (x, y))
    fnn.per_example(lambda p, e: linen(p, e, trained=True))(p, (x, y))
    fnn.per_example(lambda p, e: module(p, e, train=False))(weights, (x, y))
    for width, norm in ((1, "layer_norm"), (8, "rms_norm"), (8, None)):
        net = fnn.models.mlp(3, width, 1, norm=norm, unroll=1)
        params, state = started(net.init, x)
        fnn.per_example(fnn.example_loss(net, (params, state), loss=fnn.losses.cross_entropy))(params, (x, 0 * y))
    assert not [w for w in recwarn if "per_example" in str(w.message)]
