"""Does the tangent kernel of a deep tanh net keep a condition number with which all of its data can be learnt?

Where signals die out (chi < 1) all examples look alike to the net, and the condition number grows exponentially with depth;
where they decorrelate (chi > 1) it falls to 1; on the critical line it tends to a constant, which for ReLU and m examples is
(m + 3)/3 (Xiao, Pennington and Schoenholz 2020). In wide nets the kernel is that of theory.
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np

import fnn
from fnn.theory import kernels

PHASES = {"ordered": 1.0, "critical": 1.76095464, "chaotic": 2.5}
"""sigma_w²."""
SIGMA_B = math.sqrt(0.05)


def run(options: common.Options) -> common.Result:
    width, seeds, depths, examples = options.pick((256, 12, (1, 2, 4, 8, 16), 10), (128, 6, (4,), 6))
    figure, axes = common.panels(2)
    checks = []
    found = {}
    for depth in depths:
        net = mlp(depth, width, 1.0)  # one program for all phases
        for phase, square in PHASES.items():
            x = inputs(examples, square)
            draw = mlp(depth, width, math.sqrt(square))
            each = []
            for key in jax.random.split(jax.random.key(depth), seeds):
                state = draw.init(key, x)
                each.append(np.asarray(fnn.kernel(net)(state, x).matrix, np.float64))
            found[phase, depth] = np.array(each)
    for i, (phase, square) in enumerate(PHASES.items()):
        for depth in (depths[0], depths[-1]) if len(depths) > 1 else depths:
            mean, error = jackknife(found[phase, depth])
            checks.append(
                common.close(
                    f"{phase}, sigma_w² = {square:.3g}, depth {depth}: log10 condition number of the mean kernel",
                    math.log10(condition(theory(square, depth, width, x_of(examples, square)))),
                    mean,
                    4 * error + depth / width,
                )
            )
        measured = np.log10([[condition(one) for one in found[phase, depth]] for depth in depths]).T
        common.measured(axes[0, 0], depths, measured, i, phase)
        curve = [math.log10(condition(theory(square, depth, width, x_of(examples, square)))) for depth in depths]
        common.predicted(axes[0, 0], depths, curve, "infinite width")
    far, near = options.pick((4000, 0.02), (400, 0.15))
    values = []
    counts = options.pick((4, 8, 16, 32), (6,))
    for count in counts:
        at = kernels.mlp("relu", far, math.sqrt(2))(kernels.inputs(np.asarray(x_of(count, 2.0), np.float64)))
        values.append(condition(at.ntk))
        name = f"relu, critical, infinite width, depth {far}, {count} examples: (m + 3)/3"
        checks.append(common.close(name, (count + 3) / 3, values[-1], near, relative=True))
    axes[0, 1].plot(counts, values, "o", color=common.COLOURS[0], markersize=4, label=f"depth {far}")
    common.predicted(axes[0, 1], counts, (np.array(counts) + 3) / 3, "(m + 3)/3")
    axes[0, 0].set_xscale("log", base=2)
    common.finish(axes[0, 0], f"tanh, {examples} digits", "hidden layers", "log10 condition number")
    common.finish(axes[0, 1], "relu, critical, infinite width", "examples m", "condition number")
    common.caption(figure, common.median_of(seeds))
    remarks = [
        f"{examples} digits, centred and of one length (the fixed point's), width {width}, {seeds} seeds, 10 outputs, sigma_b² = "
        "0.05. Checked is the kernel that is averaged over seeds and outputs: kernels of single nets scatter by the root of "
        "depth/width, and that makes their condition numbers larger (left, lines above the dashed ones).",
        "Noise of that mean is taken out by the jackknife over seeds. Tolerance: four of its standard errors, and depth/width for "
        "what a finite width changes.",
    ]
    return common.Result(checks, figure, remarks)


def mlp(depth, width, sigma):
    weights, biases = fnn.initializers.scaled(sigma), fnn.initializers.normal(SIGMA_B)
    return fnn.models.mlp(depth, width, 10, activation="tanh", init=weights, bias_init=biases, unroll=1)


def x_of(count: int, square: float) -> np.ndarray:
    """The first digits, centred, with the mean square that lets variances start at their fixed point (1 for ReLU)."""
    train, _ = fnn.data.digits(key=jax.random.key(0))
    x = np.asarray(train.x[:count], np.float64).reshape(count, -1)
    x = x - x.mean(0)
    q = 1.0
    if square in PHASES.values():
        q = (fnn.meanfield.fixed_point("tanh", math.sqrt(square), SIGMA_B).q - SIGMA_B**2) / square
    return x * np.sqrt(q * x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True)


def inputs(count: int, square: float) -> jax.Array:
    return jnp.asarray(x_of(count, square), jnp.float32)


def theory(square: float, depth: int, width: int, x: np.ndarray) -> np.ndarray:
    """The tangent kernel at infinite width, each layer's own part as in a net of this width."""
    sigma = math.sqrt(square)
    hidden = [kernels.activation("tanh"), kernels.dense(sigma, SIGMA_B, fan_in=width)] * depth
    return kernels.serial(kernels.dense(sigma, SIGMA_B, fan_in=x.shape[1]), *hidden)(kernels.inputs(x)).ntk


def jackknife(each: np.ndarray) -> tuple[float, float]:
    """log10 of the condition number of a mean of kernels, less what its noise adds, and the standard error."""
    n, whole = len(each), math.log10(condition(each.mean(0)))
    logs = np.array([math.log10(condition(np.delete(each, k, axis=0).mean(0))) for k in range(n)])
    return n * whole - (n - 1) * float(logs.mean()), math.sqrt((n - 1) / n * np.sum((logs - logs.mean()) ** 2))


def condition(matrix: np.ndarray) -> float:
    values = np.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0])


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
