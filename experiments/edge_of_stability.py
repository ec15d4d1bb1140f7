"""Does full-batch gradient descent train at the edge of stability, where the sharpness is what the optimiser stands?

The largest eigenvalue of the Hessian rises until steps oscillate along its eigenvector, and then stays where they neither
grow nor shrink: at 2/rate for gradient descent, at (2 + 2 beta)/rate with momentum (Cohen et al. 2021).
"""

import functools
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

RUNS = {"gradient descent": (0.2, None), "momentum 0.9": (0.2, 0.9)}
"""Rate and momentum."""
EVERY = 20
"""Steps between two measurements of the sharpness."""


def run(options: common.Options) -> common.Result:
    steps, within = options.pick((6000, 0.045), (2000, 0.1))
    batch, params = digits(), network()
    figure, axes = common.panels(2)
    checks, counts = [], []
    for i, (name, (rate, momentum)) in enumerate(RUNS.items()):
        losses, sharpness, residuals, products, threshold = train(rate, momentum, steps, params, batch)
        ratio = sharpness / threshold
        late = ratio[len(ratio) // 2 :]
        checks += [
            common.close(
                f"{name}: sharpness/threshold, median of the second half", 1.015, float(np.median(late)), within
            ),
            common.at_least(f"{name}: its rise before", 1.5, float(np.median(late) / ratio[0])),
            common.at_most(f"{name}: loss at the end over loss at the start", 0.5, float(losses[-1] / losses[0])),
            common.at_most(
                f"{name}: residual of the eigenvalue, largest", 0.0101, float(np.max(residuals / sharpness))
            ),
        ]
        counts.append(
            f"{name}: {np.median(products):.0f} Hessian products a measurement (median), at most {products.max()}"
        )
        at = EVERY * np.arange(len(ratio))
        axes[0, 0].plot(at, ratio, color=common.COLOURS[i], linewidth=0.9, label=name)
        axes[0, 1].semilogy(at, losses, color=common.COLOURS[i], linewidth=0.9, label=name)
    axes[0, 0].axhline(1, color="k", linestyle="--", linewidth=0.9)
    common.finish(axes[0, 0], "sharpness over threshold", "step", "")
    common.finish(axes[0, 1], "loss", "step", "")
    remarks = [
        f"300 digits, tanh 64-50-50-10, squared error, {steps} steps at rate 0.2; sharpness every {EVERY} steps, from the last "
        "vector; dashed: 1.",
        *counts,
    ]
    return common.Result(checks, figure, remarks)


def digits() -> tuple[jax.Array, jax.Array]:
    """The first 300 of scikit-learn's digits, standardised by pixel and divided by 8, and one-hot targets."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = np.asarray(x)[:300], np.asarray(y)[:300]
    x = (x - x.mean(0)) / (x.std(0) + 1e-8) / 8
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.eye(10)[y], jnp.float32)


def network() -> list[dict[str, jax.Array]]:
    """Weights N(0, 1/fan_in), biases 0."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(64, 50), (50, 50), (50, 10)]
    return [
        {"kernel": jax.random.normal(k, size) / jnp.sqrt(size[0]), "bias": jnp.zeros(size[1])}
        for k, size in zip(keys, sizes, strict=True)
    ]


def loss(params, x, y):
    for i, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return 0.5 * jnp.mean(jnp.sum(jnp.square(x - y), axis=1))


def train(rate, momentum, steps, params, batch):
    """Losses, sharpness, residuals and products at every `EVERY`-th step, and the threshold that fnn reads off the optimiser."""
    optimizer = optax.sgd(rate, momentum=momentum)
    curvature, state = fnn.curvature(loss), optimizer.init(params)
    threshold = curvature(params, *batch).preconditioned(optimizer, state).threshold
    top = curvature(params, *batch).hessian.eigenvalues()

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def measured(carry, _):
        params, state, top = carry
        top = curvature(params, *batch).hessian.eigenvalues(start=top)
        (params, state), values = jax.lax.scan(step, (params, state), None, EVERY)
        return (params, state, top), (values[0], top.values[0], top.residuals[0], top.products)

    run = jax.jit(functools.partial(jax.lax.scan, measured, xs=None, length=steps // EVERY))
    _, found = run((params, state, top))
    return *map(np.asarray, found), threshold


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
