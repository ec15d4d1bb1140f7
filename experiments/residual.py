"""Do residual sums turn exponential growth into growth by e, if their branches are scaled by 1/sqrt(depth)?

Blocks x + a V relu(W x): |x|² going forward and |dL/dx|² going back grow by (1 + a² sigma_v² sigma_w²/2) a block, in the
mean exactly at any width. With a = 1/sqrt(L) and sigma_v² sigma_w² = 2 that tends to e, however deep the net is.
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np

import fnn
from fnn.gradients import flow

WIDTH = 64


def run(options: common.Options) -> common.Result:
    seeds = options.pick(400, 60)
    cases = options.pick(
        (("1", 4), ("1", 10), ("1", 20), ("1/sqrt(L)", 4), ("1/sqrt(L)", 20), ("1/sqrt(L)", 100)),
        (("1/sqrt(L)", 20),),
    )
    figure, axes = common.panels(2)
    checks = []
    for name, depth in cases:
        a = 1.0 if name == "1" else depth**-0.5
        back, forward = measure(depth, a, seeds)
        growth = fnn.meanfield.residual_rate(a, math.sqrt(2), 1.0, depth)
        for what, logs in (("|x_L|²/|x_0|²", forward), ("|dL/dx_0|²/|dL/dx_L|²", back)):
            ratios = np.exp(logs[:, 0] if what.startswith("|dL") else logs[:, -1])
            mean, error = np.mean(ratios), np.std(ratios) / math.sqrt(seeds)
            checks.append(common.close(f"{what}, a = {name}, L = {depth}", growth, mean, 4 * error))
        blocks = np.arange(depth + 1)
        curve = fnn.meanfield.residual_rate(a, math.sqrt(2), 1.0, 1)
        axis = axes[0, 0 if name == "1" else 1]
        place = (4, 10, 20, 100).index(depth)  # a depth has the same colour in both panels
        common.measured(axis, blocks / depth, back / math.log(100), place, f"L = {depth}")
        common.predicted(axis, blocks / depth, (depth - blocks) * math.log10(curve) / 2, "of the mean square")
    for axis, name in zip(axes[0], ("a = 1", "a = 1/sqrt(L)"), strict=True):
        common.finish(axis, name, "block / L", "log10 |dL/dx|, last 0" if axis is axes[0, 0] else "")
    common.caption(figure, f"{common.median_of(seeds)}; scales differ between panels")
    remarks = [
        f"Means over {seeds} seeds at width {WIDTH}; tolerance: four standard errors, which a check leaves by chance in "
        "6 cases of 100,000 (a few more for L = 20, a = 1, whose ratios are skewed).",
        "Figure: medians and the 10th to 90th percentile over seeds; the predicted curve (dashed) is that of the mean.",
    ]
    return common.Result(checks, figure, remarks)


def measure(depth: int, a: float, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Log of |dL/dx_l|²/|dL/dx_L|² and of |x_l|²/|x_0|², each float64[seeds, depth + 1]."""
    dense = {"bias": False}
    branch = fnn.serial(
        fnn.dense(WIDTH, kernel_init="scaled(1.0)", **dense),
        fnn.activation("relu"),
        fnn.dense(WIDTH, kernel_init=fnn.initializers.scaled(math.sqrt(2)), **dense),
    )
    net = fnn.serial(fnn.tap(), fnn.repeat(fnn.serial(fnn.residual(branch, scale=a), fnn.tap()), depth))
    x = jax.random.normal(jax.random.key(0), (1, WIDTH))
    ends = jax.random.normal(jax.random.key(3), (WIDTH,))  # dL/dx_L

    @jax.jit
    def run(keys):
        def one(key):
            params, state = net.init(key, x)
            return flow.measure(net, lambda y, _: y @ ends, True, params, state, x, jnp.zeros(1), None)

        return jax.lax.map(one, keys, batch_size=50)

    labels, values = common.labelled(net, x, run(jax.random.split(jax.random.key(1), seeds)))
    back, forward = (
        values[:, [i for i, label in enumerate(labels) if label[2] == name]]
        for name in ("log10_error", "second_moment")
    )
    back, forward = 2 * math.log(10) * back, np.log(forward)
    return back - back[:, -1:], forward - forward[:, :1]


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
