"""Does batch norm keep gradients from vanishing only by making them explode, at any scale of the weights?

Dense, batch norm, activation, in train mode: |dL/dh|² grows towards the input by (B-2)/(B-3) a layer in linear nets, by
pi/(pi-1) = 1.467 under ReLU with a large batch, and never less than 1 (Yang et al. 2019, theorem 7). The weights' scale
cancels. In eval mode with fresh statistics batch norm is the identity.
"""

import math
import sys

import common
import jax
import numpy as np

import fnn

CASES = (("identity", 8), ("identity", 32), ("relu", 8), ("relu", 32), ("relu", 256), ("tanh", 32))
SCALES = (1.0, 0.3, 3.0)  # sigma_w


def run(options: common.Options) -> common.Result:
    depth, width, seeds, tolerance = options.pick((12, 512, 10, 0.015), (9, 128, 4, 0.08))
    cases = options.pick(CASES, CASES[3:4])
    figure, axes = common.panels(2)
    checks = []
    for i, (activation, batch) in enumerate(cases):
        # More seeds for a small batch, where few numbers are averaged.
        error, *others = measure(activation, depth, width, batch, seeds * max(1, 32 // batch))
        predicted = fnn.meanfield.batch_norm_rate(activation, batch)
        name = f"{activation}, batch {batch}"
        checks.append(common.close(name, predicted, rate(error), tolerance, relative=True))
        layers = np.arange(1, depth + 1)
        common.measured(axes[0, 0], layers, (error - error[:, -1:]) / math.log(10), i, name)
        # The input is normal, so that the first layer's variance over the batch is not that of phi's outputs.
        setting = {"activation": activation, "sigma_w": 1.0, "sigma_b": 0.0, "norm": "batch_norm", "batch": batch}
        theory = fnn.meanfield.predict(depth, **setting, q0=1 - 1 / batch)
        common.predicted(axes[0, 0], layers, theory.log_error / math.log(10))
        if (activation, batch) == ("relu", 32):
            for j, (sigma_w, other) in enumerate(zip(SCALES[1:], others, strict=True)):
                name = f"relu, batch 32, sigma_w = {sigma_w}"
                checks.append(common.close(name, predicted, rate(other), tolerance, relative=True))
                label = f"train, sigma_w = {sigma_w}"
                common.measured(axes[0, 1], layers, (other - other[:, -1:]) / math.log(10), j, label)
    error, *_ = measure("relu", depth, width, 32, seeds, train=False)
    expected = fnn.meanfield.fixed_point("relu", 1.0, 0.0).chi
    checks.append(common.close("relu, eval mode, sigma_w = 1", expected, rate(error), 2 * tolerance, relative=True))
    common.measured(axes[0, 1], layers, (error - error[:, -1:]) / math.log(10), 2, "eval, sigma_w = 1")
    common.finish(axes[0, 0], "train mode", "layer (1 is next to the input)", "log10 |dL/dh|, last layer 0")
    common.finish(axes[0, 1], "relu, batch 32", "layer (1 is next to the input)", "")
    common.caption(figure, f"{common.median_of(seeds)}; of batch 8, {4 * seeds} seeds", axes[0])
    remarks = [
        f"Factor of |dL/dh|² for one layer towards the input, from the mean log norm: width {width}, {depth} layers, "
        f"{seeds} seeds (four times as many for a batch of 8), without the first 3 layers and the last.",
        "Norms grow by the root of these factors: 1.21 a layer under ReLU, a million-fold in 72 layers.",
    ]
    return common.Result(checks, figure, remarks)


def measure(activation: str, depth: int, width: int, batch: int, seeds: int, train: bool = True) -> list[np.ndarray]:
    """log |dL/dh| of the hidden layers for each of SCALES, float[seeds, depth], for normal inputs."""
    norm = fnn.batch_norm(eps=0.0, scale=False, bias=False)
    net = fnn.models.mlp(depth, width, 10, activation=activation, norm=norm, init="scaled(1)", taps=True, unroll=1)
    x = jax.random.normal(jax.random.key(0), (batch, width))
    every = common.signals(net, (x, np.arange(batch) % 10), seeds, scales=SCALES, train=train, chunk=2)
    return [measured["log_error"][:, :-1] for measured in every]


def rate(error: np.ndarray) -> float:
    return common.rate(2 * np.mean(error, axis=0)[:-1])


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
