"""Does clipping the gradient rescue training at a learning rate where the same net otherwise diverges?

One net, one rate, the same seeds and batches, with and without `clip`: a residual ReLU net without norm, whose gradient
explodes with depth, so that the first steps of plain gradient descent throw it out (Pascanu et al. 2013).
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

RATE = 0.3
CLIPS = {
    "none": optax.identity(),
    "global norm 1": fnn.clip.by_global_norm(1.0),
    "block norm 0.3": fnn.clip.by_block_norm(0.3),
    "value 0.01": fnn.clip.by_value(0.01),
    "adaptive 0.05": fnn.clip.adaptive(0.05),
}


def run(options: common.Options) -> common.Result:
    depth, seeds, steps = options.pick((7, 8, 400), (7, 2, 120))
    train, test = fnn.data.digits(key=jax.random.key(0))
    figure, axes = common.panels(2, size=(4.0, 3.5))
    checks = []
    clips = options.pick(list(CLIPS.items()), list(CLIPS.items())[:2])
    for i, (name, clip) in enumerate(clips):
        loss, norm, after, accuracy = fit(clip, depth, seeds, steps, train, test)
        diverged = ~np.isfinite(loss[:, -1]) | (loss[:, -50:].mean(axis=1) > math.log(10))
        shown = np.where(np.isfinite(loss), loss, 1e4)
        smooth = np.stack([np.convolve(run, np.ones(10) / 10, "valid") for run in np.minimum(shown, 1e4)])
        common.measured(axes[0, 0], np.arange(smooth.shape[1]) + 5, smooth, i, name if i else "none: diverges (at 10⁴)")
        if name == "none":
            checks.append(common.close("seeds that diverge, no clipping", 1.0, float(diverged.mean()), 0.0))
            checks.append(common.at_most("best test accuracy, no clipping", 0.3, float(accuracy.max())))
            continue
        checks.append(common.close(f"seeds that diverge, {name}", 0.0, float(diverged.mean()), 0.0))
        checks.append(common.at_least(f"worst test accuracy, {name}", options.pick(0.9, 0.6), float(accuracy.min())))
        if name == "global norm 1":
            checks.append(common.at_most("largest norm after clipping, global norm 1", 1.0 + 1e-5, float(after.max())))
            common.measured(axes[0, 1], np.arange(steps), np.maximum(norm, 1e-6), 5, "before")
            common.measured(axes[0, 1], np.arange(steps), np.maximum(after, 1e-6), 6, "after")
    common.chance(axes[0, 0], math.log(10))
    common.finish(axes[0, 0], "loss, mean of 10 steps", "step", "cross entropy / nats", log_y=True)
    common.finish(axes[0, 1], "clipped to a global norm of 1", "step", "norm of the gradient", log_y=True)
    common.caption(figure, common.median_of(seeds))
    remarks = [
        f"Residual ReLU net of {depth} hidden layers of width 64, He's initialisation, gradient descent at rate {RATE}, batches "
        f"of 64 digits, {steps} steps, {seeds} seeds. Diverged: the loss is not finite at the end, or above ln 10.",
        "Chance is an accuracy of 0.1.",
    ]
    return common.Result(checks, figure, remarks)


def fit(clip: optax.GradientTransformation, depth: int, seeds: int, steps: int, train: object, test: object) -> tuple:
    """Train all seeds at once; loss, gradient norm before and after, each float[seeds, steps], and test accuracies."""
    net = fnn.models.mlp(depth, 64, 10, activation="relu", init="he_normal", residual=True, unroll=1)
    optimizer = optax.chain(clip, optax.sgd(RATE))
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
    x, y = jnp.asarray(train.x), jnp.asarray(train.y)

    def one(key):
        init_key, data_key = jax.random.split(key)
        state = fnn.TrainState.create(net, optimizer, init_key, x[:1])

        def body(state, index):
            state, metrics = step.pure(state, (x[index], y[index]))
            norm = metrics["grad_norm"]
            return state, (metrics["loss"], norm, metrics.get("grad_norm_clipped", norm))

        state, curves = jax.lax.scan(body, state, jax.random.randint(data_key, (steps, 64), 0, train.size))
        outputs, _ = net.apply(state.params, state.net_state, test.x)
        return *curves, jnp.mean(jnp.argmax(outputs, axis=-1) == test.y)

    return tuple(map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), seeds))))


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
