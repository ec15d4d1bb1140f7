"""Readings of an Equinox model, taken by a derivative rule that is written into it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import fnn
from bench.watching import Problem, readings_of, statistics


@eqx.filter_custom_vjp
def _probe(pair: Any) -> Any:
    """Return the first of two; the gradient of the second, a number, is the sum of squares of the error signal."""
    return pair[0]


_probe.def_fwd(lambda perturbed, pair: (pair[0], None))
_probe.def_bwd(lambda residuals, d, perturbed, pair: (d, jnp.sum(jnp.square(d))))


class _Equinox(eqx.Module):
    layers: list[Any]

    def __init__(self, params: Any):
        self.layers = []
        for weights in params:
            fan_in, fan_out = weights["kernel"].shape
            linear = eqx.nn.Linear(fan_in, fan_out, key=jax.random.key(0))
            new = (weights["kernel"].T, weights["bias"])
            self.layers.append(eqx.tree_at(lambda m: (m.weight, m.bias), linear, new))

    def __call__(self, x: jax.Array, squares: Any = None) -> tuple[jax.Array, list[Any]]:
        seen = []
        for i, layer in enumerate(self.layers):
            taken = jax.nn.relu(x) if i else x
            x = jax.vmap(layer)(taken)
            if squares is not None:
                x = _probe((x, squares[i]))
                seen.append((statistics(taken), statistics(x)))
        return x, seen


def pair(p: Problem) -> tuple[Any, Any]:
    """Equinox: a `filter_custom_vjp` written into the model, which hands the square of the error signal out as a gradient."""
    model = _Equinox(p.params)

    def plain(_, batch, model=model):
        return eqx.filter_value_and_grad(lambda m: jnp.mean(fnn.losses.cross_entropy(m(batch[0])[0], batch[1])))(model)

    def watched(_, batch, model=model):
        def loss(pair):
            logits, seen = pair[0](batch[0], pair[1])
            return jnp.mean(fnn.losses.cross_entropy(logits, batch[1])), seen

        zeros = jnp.zeros(len(model.layers))
        (value, seen), (grads, squares) = eqx.filter_value_and_grad(loss, has_aux=True)((model, zeros))
        found = readings_of([zeros], [layer.weight for layer in grads.layers], seen, 1)
        return (value, grads), found._replace(error=jnp.sqrt(len(batch[0]) * squares))

    return plain, watched
