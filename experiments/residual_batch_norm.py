"""Do residual sums turn the explosion under batch norm into a power of depth?

Without shortcuts a batch norm net of ReLUs multiplies |dL/dh|² by pi/(pi - 1) a layer (Yang et al. 2019). In
x + W relu(batch norm x), W ~ N(0, 2/n), a branch adds 1 - 1/pi to the variance v of every unit over the batch, and what
comes back through it is divided by v: |dL/dx|² grows by 1 + 1/v_l, v_l = v_0 + (1 - 1/pi) l, in all like L^(pi/(pi - 1)):
the same number, now as an exponent (De and Smith 2020 for the forward half).
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np

import fnn
from fnn.gradients import flow

WIDTH, BATCH = 256, 256
STEP = 1 - 1 / math.pi


def run(options: common.Options) -> common.Result:
    depth, seeds = options.pick(200, 40), options.pick(8, 2)
    figure, axes = common.panels(2)
    block = fnn.serial(fnn.batch_norm(eps=0.0), fnn.activation("relu"), fnn.dense(WIDTH, kernel_init="he_normal"))
    logs = measure(fnn.residual(block), depth, seeds)
    blocks = np.arange(depth + 1)
    factors = np.log1p(1 / (1 + STEP * blocks[:-1]))
    predicted = np.append(np.cumsum(factors[::-1])[::-1], 0)
    checks = []
    for at in (0, depth // 10, depth // 2):
        name = f"log |dL/dx_{at}|²/|dL/dx_L|², residual, L = {depth}"
        checks.append(common.close(name, predicted[at], np.mean(logs[:, at]), 0.05, relative=True))
    early = slice(depth // 20, depth // 2)
    place = np.log(1 / STEP + blocks[early])
    exponent = -np.polyfit(place, np.mean(logs, axis=0)[early], 1)[0]
    checks.append(common.close("exponent of the power of depth", 1 / STEP, exponent, 0.1))
    few = options.pick(20, 12)
    plain = measure(block, few, seeds)
    rate = -np.polyfit(np.arange(few + 1)[:-2], np.mean(plain, axis=0)[:-2], 1)[0]
    checks.append(common.close("without shortcuts: log of the factor a layer", math.log(1 / STEP), rate, 0.03))
    common.measured(axes[0, 0], 1 / STEP + blocks, logs / math.log(100), 0, "residual")
    common.predicted(axes[0, 0], 1 / STEP + blocks, predicted / math.log(100))
    common.finish(axes[0, 0], "with shortcuts: a power", "block + 1.47", "log10 |dL/dx|, last 0", log_x=True)
    common.measured(axes[0, 1], np.arange(few + 1), plain / math.log(100), 1, "without shortcuts")
    common.predicted(axes[0, 1], np.arange(few + 1), (few - np.arange(few + 1)) * math.log10(1 / STEP) / 2)
    common.finish(axes[0, 1], "without: an exponential", "layer", "")
    common.caption(figure, common.median_of(seeds), axes[0])
    remarks = [
        f"Width {WIDTH}, batch {BATCH}, {seeds} seeds, means of logs; the prediction is for wide nets and large batches "
        f"(at batch {BATCH} the factor a layer is 1.473, not 1.467)."
    ]
    return common.Result(checks, figure, remarks)


def measure(block: fnn.Layer, depth: int, seeds: int) -> np.ndarray:
    """log |dL/dx_l|²/|dL/dx_L|², float64[seeds, depth + 1]."""
    net = fnn.serial(fnn.tap(), fnn.repeat(fnn.serial(block, fnn.tap()), depth))
    x = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    ends = jax.random.normal(jax.random.key(3), (BATCH, WIDTH))

    @jax.jit
    def run(keys):
        def one(key):
            params, state = net.init(key, x)
            return flow.measure(net, lambda y, _: jnp.sum(y * ends, 1), True, params, state, x, jnp.zeros(BATCH), None)

        return jax.lax.map(one, keys)

    labels, values = common.labelled(net, x, run(jax.random.split(jax.random.key(1), seeds)))
    logs = 2 * math.log(10) * values[:, [quantity == "log10_error" for *_, quantity in labels]]
    return logs - logs[:, -1:]


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
