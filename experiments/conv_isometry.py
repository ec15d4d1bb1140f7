"""Does an orthogonal start let a plain convolutional net train at a depth where a random one fails?

Kernels that are zero but for an orthogonal matrix at their centre keep every norm, forward and back, at any depth, and
tanh at sigma_w = 1 is on the edge of chaos: signals neither die out nor forget their input. Independent normal weights of
the same variance keep norms in the mean alone: their singular values spread with depth (Xiao et al. 2018).
"""

import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

CHANNELS = 16
INITS = (
    ("delta-orthogonal", "delta_orthogonal"),
    ("uniform, ±1/sqrt(fan_in)", "third"),
    ("N(0, 1/fan_in)", "lecun_normal"),
)


def third(key, shape, dtype=jnp.float32):
    """Draw uniformly from ±1/sqrt(fan_in), variance 1/(3 fan_in): the default of some libraries."""
    limit = np.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def run(options: common.Options) -> common.Result:
    depth, epochs, seeds = options.pick((100, 5, 2), (24, 2, 1))
    figure, axes = common.panels(2)
    checks, reached = [], {}
    for i, (label, init) in enumerate(options.pick(INITS, INITS[:2])):
        kernel_init = third if init == "third" else init
        logs = np.array([error_signals(network(depth, kernel_init, "identity"), seed) for seed in range(seeds)])
        if init == "delta_orthogonal":
            worst = np.max(np.abs(logs))
            checks.append(
                common.close(f"{label}, linear, depth {depth}: largest |log |dL/dh_l|/|dL/dh_L||", 0.0, worst, 1e-3)
            )
        elif init == "third":
            slope = (logs[:, 0].mean() - logs[:, -1].mean()) / (logs.shape[1] - 1)
            # Seeds and channels are few: the mean of the log scatters around half the log of the mean factor.
            rate = np.log(1 / 3) / 2
            checks.append(common.close(f"{label}, linear: change of log |dL/dh| a layer", rate, slope, 0.02))
        common.measured(axes[0, 0], np.arange(logs.shape[1]), logs / np.log(10), i, label)
        curves = np.array([train(network(depth, kernel_init, "tanh"), epochs, seed) for seed in range(seeds)])
        reached[label] = curves[:, -1].mean()
        common.measured(axes[0, 1], np.arange(1, epochs + 1), curves, i, label)
    first, second = reached["delta-orthogonal"], reached["uniform, ±1/sqrt(fan_in)"]
    after = f"test accuracy after {epochs} epochs"
    checks.append(common.at_least(f"delta-orthogonal: {after}", options.pick(0.9, 0.7), first))
    checks.append(common.at_most(f"uniform, ±1/sqrt(fan_in): {after}", 0.5, second))
    if not options.tiny:
        ahead = first - reached["N(0, 1/fan_in)"]
        checks.append(common.at_least(f"delta-orthogonal ahead of N(0, 1/fan_in): {after}", 0.05, ahead))
    common.chance(axes[0, 1], 0.1)
    axes[0, 1].set_ylim(0, 1)
    common.finish(axes[0, 0], f"linear, {depth} layers", "layer", "log10 |dL/dh|, last layer 0")
    common.finish(axes[0, 1], f"tanh, {depth} layers", "epoch", "test accuracy")
    common.caption(figure, common.median_of(seeds))
    remarks = [
        f"Digits, stratified split, {CHANNELS} channels at 4×4 positions, {seeds} seeds; Adam, one rate for all.",
    ]
    return common.Result(checks, figure, remarks)


def network(depth: int, kernel_init, activation: str) -> fnn.Layer:
    """A stem, `depth` equal convolutions, and a linear readout of the mean over positions."""
    block = fnn.serial(
        fnn.conv(CHANNELS, 3, padding="circular", kernel_init=kernel_init), fnn.tap(), fnn.activation(activation)
    )
    stem = fnn.conv(CHANNELS, 3, stride=2, kernel_init="lecun_normal")
    return fnn.serial(stem, fnn.activation(activation), fnn.repeat(block, depth), fnn.flatten(), fnn.dense(10))


def error_signals(net: fnn.Layer, seed: int) -> np.ndarray:
    """Natural log of |dL/dh_l| / |dL/dh_L|, float64[depth]."""
    data, _ = fnn.data.digits(key=jax.random.key(seed), image=True)
    state = net.init(jax.random.key(seed), data.x[:32])
    errors = np.log(10) * fnn.gradient_flow(net, state, (data.x[:32], data.y[:32])).log10_error
    return errors - errors[-1]


def train(net: fnn.Layer, epochs: int, seed: int) -> np.ndarray:
    """Test accuracy after each epoch."""
    split, init, shuffle = jax.random.split(jax.random.key(seed), 3)
    data, test = fnn.data.digits(key=split, image=True)
    optimizer = optax.chain(fnn.clip.by_global_norm(1.0), optax.adam(5e-4))
    state = fnn.TrainState.create(net, optimizer, init, data.x[:1])
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
    _, history = fnn.fit(step, state, data, epochs=epochs, batch_size=64, validation=test, key=shuffle)
    return history.validation["accuracy"]


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
