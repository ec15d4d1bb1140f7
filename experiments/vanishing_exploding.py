"""Do gradients vanish and explode with depth at the rate that activation and initialisation predict?

Weights are drawn from N(0, s²), as textbooks warn of, in nets of 20 layers of width 256. The factor of |dL/dh|² for one
layer towards the input is, for small s, n s²/2 (ReLU), n s² (tanh) and n s²/16 (sigmoid); for any s it is mean-field
theory's chi at sigma_w = s sqrt(n) (Poole et al. 2016; Schoenholz et al. 2017).
"""

import math
import sys

import common
import jax
import numpy as np

import fnn

WIDTH = 256
FORMULAS = {"relu": ("n s²/2", 0.5, 0.08), "tanh": ("n s²", 1.0, 0.03), "sigmoid": ("n s²/16", 1 / 16, 0.03)}
SCALES = (0.01, 0.03, 0.1, 1.0)


def run(options: common.Options) -> common.Result:
    depth, seeds, slack = options.pick(20, 10), options.pick(30, 6), options.pick(1, 2.5)
    train, _ = fnn.data.digits(key=jax.random.key(0))
    batch = train.x[:8], train.y[:8]
    figure, axes = common.panels(3)
    checks = []
    for axis, (activation, (formula, leading, tolerance)) in zip(axes[0], FORMULAS.items(), strict=True):
        if options.tiny and activation != "sigmoid":
            continue
        net = fnn.models.mlp(depth, WIDTH, 10, activation=activation, init="normal(1.0)", taps=True, unroll=1)
        every = common.signals(net, batch, seeds, scales=SCALES)
        for i, (s, measured) in enumerate(zip(SCALES, every, strict=True)):
            error = measured["log_error"][:, :-1]  # the last is the output's
            squares = common.log_mean_square(error)
            chi = fnn.meanfield.fixed_point(activation, s * math.sqrt(WIDTH), 0.0).chi
            name, expected = f"{activation}, s = {s:g}: chi", chi
            if s == SCALES[0]:
                name, expected = f"{activation}, s = {s:g}: {formula}", WIDTH * s**2 * leading
            factor = common.rate(squares)
            checks.append(common.close(name, expected, factor, tolerance * slack, relative=True))
            layers = np.arange(1, depth + 1)
            common.measured(axis, layers, (error - error[:, -1:]) / math.log(10), i, f"s = {s:g}")
            q0 = float(np.mean(measured["second_moment"][:, 0]))
            theory = fnn.meanfield.predict(
                depth, activation=activation, sigma_w=s * math.sqrt(WIDTH), sigma_b=0.0, q0=q0
            )
            common.predicted(axis, layers, theory.log_error / math.log(10), "mean-field theory")
        common.finish(axis, activation, "layer (1 is next to the input)", "")
    axes[0, 0].set_ylabel("log10 |dL/dh|, last layer 0")
    common.caption(figure, f"{common.median_of(seeds)}; weights N(0, s²)", axes[0])
    remarks = [
        f"Factor of E|dL/dh|² for one layer towards the input, {depth} layers of width {WIDTH}, {seeds} seeds, 8 digits, "
        "fitted without the first 3 layers.",
        "sigmoid shrinks the signal by far more than 1/4 a layer for small weights, and explodes for s = 1: the weights "
        "decide.",
    ]
    return common.Result(checks, figure, remarks)


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
