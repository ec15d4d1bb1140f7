"""Does full-batch training stay at the edge of stability, where the sharpness is what the optimiser stands?

The largest eigenvalue of the Hessian rises until steps oscillate along its eigenvector, and then stays where they neither
grow nor shrink: at 2/rate for gradient descent, at (2 + 2 beta)/rate with momentum (Cohen et al. 2021). With Adam that of
P⁻¹H does, P the preconditioner: at 38/rate for beta1 = 0.9 (Cohen et al. 2022).
"""

import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn


def run(options: common.Options) -> common.Result:
    steps, adam, within, every = options.pick((6000, (1e-3, 4000), 0.045, 20), (2000, (2e-3, 2000), 0.1, 50))
    runs = {
        "gradient descent": (optax.sgd(0.2), 0.2, steps, 2),
        "momentum 0.9": (optax.sgd(0.2, momentum=0.9), 0.2, steps, 2 + 2 * 0.9),
        "Adam": (optax.adam(adam[0]), *adam, (2 + 2 * 0.9) / (1 - 0.9)),
    }
    batch, params = digits(), network()
    figure, axes = common.panels(2)
    checks, counts = [], []
    for i, (name, (optimizer, rate, steps, predicted)) in enumerate(runs.items()):
        losses, measured = train(optimizer, (steps, every), params, batch)
        ratio = np.array([found.ratio for found in measured])
        residuals = [float(found.pairs.residuals[0]) / found.value for found in measured]
        products = [int(found.pairs.products) for found in measured]
        late = ratio[len(ratio) // 2 :]
        checks += [
            common.close(f"{name}: threshold x rate", predicted, measured[-1].threshold * rate, 1e-3, relative=True),
            common.close(
                f"{name}: sharpness/threshold, median of the second half", 1.015, float(np.median(late)), within
            ),
            common.at_least(f"{name}: its rise before", 1.5, float(np.median(late) / ratio[0])),
            common.at_most(f"{name}: loss at the end over loss at the start", 0.5, float(losses[-1] / losses[0])),
            common.at_most(f"{name}: residual of the eigenvalue, largest", 0.0101, max(residuals)),
        ]
        counts.append(
            f"{name}: rate {rate}, {steps} steps, {np.median(products):.0f} Hessian products a measurement (median)"
        )
        at = every * np.arange(1, len(ratio) + 1)
        axes[0, 0].plot(at, ratio, color=common.COLOURS[i], linewidth=0.9, label=name)
        axes[0, 1].semilogy(at, losses, color=common.COLOURS[i], linewidth=0.9, label=name)
    axes[0, 0].axhline(1, color="k", linestyle="--", linewidth=0.9)
    common.finish(axes[0, 0], "(preconditioned) sharpness over threshold", "step", "")
    common.finish(axes[0, 1], "loss", "step", "")
    remarks = [
        f"300 digits, tanh 64-50-50-10, squared error; sharpness every {every} steps, each time from random vectors; dashed: 1.",
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


def train(optimizer, steps, params, batch):
    """Losses and `curvature(...).preconditioned` after every `steps[1]` of `steps[0]` steps."""
    curvature, state = fnn.curvature(loss), optimizer.init(params)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    some = jax.jit(lambda params, state: jax.lax.scan(step, (params, state), None, steps[1]))
    losses, found = [], []
    for _ in range(steps[0] // steps[1]):
        (params, state), values = some(params, state)
        losses.append(float(values[0]))
        found.append(curvature(params, *batch).preconditioned(optimizer, state))
    return np.array(losses), found


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
