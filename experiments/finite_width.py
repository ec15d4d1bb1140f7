"""How far do single nets of finite width lie from the mean over nets, even at the right initialisation?

He-initialised ReLU nets with a scalar output: E|dL/dh_l|² is the same for all layers at any width, but the log spreads.
The variance of log |dL/dW_l|² is about 5 sum(1/n_k) over all hidden layers, for every l; that of log |dL/dh_l|² has the
same sum over layers l to L only (Hanin 2018; Hanin and Rolnick 2018; Hanin and Nica 2018).
"""

import math
import sys

import common
import jax
import numpy as np

import fnn

LN10 = math.log(10)


def run(options: common.Options) -> common.Result:
    seeds, depth = options.pick((2000, 10), (300, 6))
    figure, axes = common.panels(2)
    checks = []
    layers = np.arange(1, depth + 1)
    for i, width in enumerate(options.pick((25, 100, 200), (100,))):
        error, kernel = measure("relu", math.sqrt(2), width, depth, seeds)
        moments = fnn.meanfield.he_relu_log_moments(width)
        mean, variance = moments[0] * (depth - layers + 1), moments[1] * (depth - layers + 1)
        ratios = np.exp(2 * error[:, 0])  # the output's error signal is 1
        half = 4 * float(np.std(ratios)) / math.sqrt(seeds)
        checks.append(common.close(f"E|dL/dh_1|², width {width}", 1.0, float(np.mean(ratios)), half))
        spread = 4 * math.sqrt(3 / seeds)  # four standard errors of a variance; logs have a kurtosis of about 4
        for what, logs, expected in (
            (f"Var log |dL/dh_1|², width {width}", 2 * error[:, 0], variance[0]),
            (f"Var log |dL/dW_1|², width {width}", 2 * kernel[:, 0], variance[0]),
            (f"Var log |dL/dW_{depth}|², width {width}", 2 * kernel[:, -1], variance[0]),
        ):
            checks.append(common.close(what, float(expected), float(np.var(logs)), spread, relative=True))
        half = 4 * float(np.std(error[:, 0])) / math.sqrt(seeds)
        name = f"E log |dL/dh_1|, width {width}"
        checks.append(common.close(name, float(mean[0] / 2), float(np.mean(error[:, 0])), half))
        common.measured(axes[0, 0], layers, np.var(error, axis=0)[None] / LN10**2, i, f"width {width}")
        common.measured(axes[0, 1], layers, np.var(kernel, axis=0)[None] / LN10**2, i, f"width {width}")
        common.predicted(axes[0, 0], layers, variance / (2 * LN10) ** 2)
        common.predicted(axes[0, 1], layers, np.full(depth, variance[0] / (2 * LN10) ** 2))
        if width != 25:
            rough = fnn.meanfield.he_relu_log_variance([width] * depth)
            checks.append(
                common.close(f"5 sum(1/n), width {width}", rough, float(np.var(2 * error[:, 0])), 0.25, relative=True)
            )
    common.finish(axes[0, 0], "error signal", "layer (1 is next to the input)", "variance of log10 of the norm")
    common.finish(axes[0, 1], "weight gradient", "layer (1 is next to the input)", "")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_ylim(bottom=0)
    common.caption(figure, f"variance over {seeds:,} seeds", axes[0])
    remarks = [
        f"{depth} hidden layers, {seeds} seeds, true normal weights, no biases, one example. Tolerances: four standard "
        "errors (a check leaves them by chance in 6 cases of 100,000); 25 % for the rule 5 sum(1/n).",
        "Predictions are exact for each width (log of a chi² with a binomial number of degrees of freedom, summed).",
    ]
    return common.Result(checks, figure, remarks)


def measure(activation: str, sigma_w: float, width: int, depth: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """log |dL/dh| and log |dL/dW| of the hidden layers for L the net's output, each float64[seeds, depth]."""
    init = fnn.initializers.scaled(sigma_w)
    net = fnn.models.mlp(depth, width, 1, activation=activation, init=init, taps=True, unroll=1)
    x = jax.random.rademacher(jax.random.key(0), (1, 64), np.float32)
    (measured,) = common.signals(net, (x, np.zeros(1)), seeds, loss=lambda y, _: y[:, 0], chunk=50)
    return measured["log_error"][:, :-1], measured["log_kernel"][:, :-1]


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
