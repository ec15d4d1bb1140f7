"""Does a layer norm before the branch tame the gradients of the last transformer block, as depth grows?

Feed-forward blocks of width d with weights N(0, 1/d). Pre-LN x + f(norm x) adds half a unit of variance a block, so that a
last norm divides what comes back by sqrt(1 + L/2): the gradient of the last block falls with depth. Post-LN norm(x + f(x))
starts every block anew: it does not, and needs a warm-up (Xiong et al. 2020, theorem 1).
"""

import sys

import common
import jax
import jax.numpy as jnp
import numpy as np

import fnn

WIDTH, TOKENS = 128, 32


def run(options: common.Options) -> common.Result:
    depths = np.array(options.pick((1, 2, 4, 8, 16, 32, 64), (1, 16)))
    seeds = options.pick(12, 4)
    figure, axes = common.panels(1, size=(4.5, 3.5))
    checks = []
    cases = (
        ("Pre-LN with its last norm", True, True, -0.5),
        ("Pre-LN without", True, False, 0.0),
        ("Post-LN", False, False, 0.0),
    )
    for i, (label, pre, end, predicted) in enumerate(cases):
        logs = np.array([last_gradient(int(depth), pre, end, seeds) for depth in depths]).T
        place = np.log(1 + depths / 2)
        slope = np.polyfit(place, logs.mean(axis=0), 1)[0]
        checks.append(common.close(f"{label}: slope of log |dL/dW_2| against log(1 + L/2)", predicted, slope, 0.1))
        common.measured(axes[0, 0], 1 + depths / 2, logs / np.log(10), i, label)
        common.predicted(axes[0, 0], 1 + depths / 2, (logs.mean() + predicted * (place - place.mean())) / np.log(10))
    common.finish(axes[0, 0], "second weight of the last block", "1 + L/2 (L blocks)", "log10 |dL/dW|", log_x=True)
    common.caption(figure, common.median_of(seeds))
    axes[0, 0].set_xticks(1 + depths / 2, [f"{1 + depth / 2:g}" for depth in depths])
    axes[0, 0].minorticks_off()
    remarks = [
        f"Width {WIDTH}, {TOKENS} tokens, {seeds} seeds; Frobenius norms, L the mean of a random linear readout."
    ]
    return common.Result(checks, figure, remarks)


def last_gradient(depth: int, pre: bool, end: bool, seeds: int) -> np.ndarray:
    """log |dL/dW_2| of the last block, float64[seeds]."""
    draw = {"kernel_init": "scaled(1.0)"}
    forward = [fnn.dense(WIDTH, **draw), fnn.activation("relu"), fnn.dense(WIDTH, **draw)]
    norm = fnn.layer_norm()
    block = fnn.residual(fnn.serial(norm, *forward)) if pre else fnn.serial(fnn.residual(fnn.serial(*forward)), norm)
    net = fnn.serial(fnn.repeat(block, depth), *([norm] if end else []))
    x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
    ends = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))

    @jax.jit
    def one(key):
        params, state = net.init(key, x)
        slopes = jax.grad(lambda p: jnp.sum(net.apply(p, state, x)[0] * ends) / TOKENS)(params)
        kernels = [p for p in jax.tree.leaves(slopes) if p.ndim == 3]  # [depth, in, out], first and second
        return fnn.tree.log_norm(kernels[1][-1])

    return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(2), seeds)), np.float64)


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
