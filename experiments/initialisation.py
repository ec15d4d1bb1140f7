"""Which initialisation lets a deep ReLU net train: He's, Glorot's, or small normal weights?

Nets of equal widths n. He: variance 2/n, chi = 1. Glorot: variance 1/n, chi = 1/2, so that |dL/dh|² and the signal halve
every layer. N(0, 0.01²): chi = n/2·1e-4. Gradients of *weights* are another matter: without biases their norms are in
expectation the same for all hidden layers behind the first, at any scale: the whole set shrinks with depth.
"""

import math
import sys

import common
import jax
import numpy as np
import optax

import fnn

WIDTH = 128
CHI = {"he_normal": 1.0, "glorot_normal": 0.5, "normal(0.01)": WIDTH / 2 * 1e-4}


def run(options: common.Options) -> common.Result:
    depth, seeds, epochs = options.pick((30, 40, 30), (16, 6, 6))
    train, test = fnn.data.digits(key=jax.random.key(0))
    batch = train.x[:16], train.y[:16]
    figure, axes = common.panels(3)
    cases = options.pick(CHI, {"he_normal": 1.0, "glorot_normal": 0.5})
    checks, layers = [], np.arange(1, depth + 1)
    slack = options.pick(1.0, 2.0)
    for i, (init, chi) in enumerate(cases.items()):
        net = fnn.models.mlp(depth, WIDTH, 10, activation="relu", init=init, taps=True, unroll=1)
        (measured,) = common.signals(net, batch, seeds)
        error, kernel = measured["log_error"][:, :-1], measured["log_kernel"][:, 1:-1]
        factor = common.rate(common.log_mean_square(error))
        checks.append(common.close(f"{init}: factor of |dL/dh|²", chi, factor, 0.06 * slack, relative=True))
        flat = common.rate(common.log_mean_square(kernel), skip=0)
        checks.append(common.close(f"{init}: factor of |dL/dW|²", 1.0, flat, 0.06 * slack, relative=True))
        common.measured(axes[0, 0], layers, error / math.log(10), i, init)
        common.measured(axes[0, 1], layers[1:], kernel / math.log(10), i, init)
        curve = (depth - layers) * math.log10(chi) / 2 + np.median(error[:, -1]) / math.log(10)
        common.predicted(axes[0, 0], layers, curve, r"$\chi$ a layer")
    for i, init in enumerate(cases):
        net = fnn.models.mlp(depth, WIDTH, 10, activation="relu", init=init, unroll=1)
        optimizer = optax.sgd(0.005, momentum=0.9)
        state = fnn.TrainState.create(net, optimizer, jax.random.key(1), train.x[:1])
        step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
        state, history = fnn.fit(step, state, train, epochs=epochs, batch_size=64, key=jax.random.key(2))
        accuracy = fnn.evaluate(net, state, test)["accuracy"]
        if init == "he_normal":
            checks.append(common.at_least(f"{init}: test accuracy", options.pick(0.9, 0.5), accuracy))
        else:
            checks.append(common.at_most(f"{init}: test accuracy", 0.3, accuracy))
        losses = history.by_epoch("loss")
        common.measured(axes[0, 2], np.arange(1, epochs + 1), losses[None], i, init)
    common.chance(axes[0, 2], math.log(10))
    common.finish(axes[0, 0], "error signal", "layer (1 is next to the input)", "log10 |dL/dh|")
    common.finish(axes[0, 1], "weight gradient", "layer (1 is next to the input)", "log10 |dL/dW|")
    common.finish(axes[0, 2], "training", "epoch", "cross entropy / nats", log_y=True)
    common.caption(figure, f"left and middle: {common.median_of(seeds)}; right: one seed", axes[0, :2])
    remarks = [
        f"{depth} layers of width {WIDTH}. Factors for one layer towards the input of the mean square over {seeds} seeds, "
        "16 digits, fitted without the first 3 layers (weights: without the first one).",
        f"Training: {epochs} epochs of gradient descent (rate 0.005, momentum 0.9) on the digits, one seed.",
    ]
    return common.Result(checks, figure, remarks)


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
