"""Can the step at which Adam's loss spikes be told beforehand, from the preconditioned sharpness?

While gradients shrink, Adam's second moment forgets the large ones, and its steps grow: at a rate that was small the
preconditioned sharpness passes what the optimiser stands, and from there on the distance to the minimum grows (Bai et al.
2025, arXiv 2506.04805).
On x²/2 with beta1 = 0 the condition is rate/sqrt(v) > 2, and every number is a recurrence of two lines.
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

RATE, START = 0.15, 1.0
SPIKES = {0.99: (191, 211), 0.9: (42, 48)}
"""beta2: the step at which rate/sqrt(v) passes 2, and that at which |x| has grown tenfold from there."""


def run(options: common.Options) -> common.Result:
    figure, axes = common.panels(2)
    checks = []
    for i, beta2 in enumerate(options.pick((0.99, 0.9), (0.9,))):
        passes, grows = SPIKES[beta2]
        steps = grows + 12
        x, ratio = train(beta2, steps)
        expected_x, expected_ratio = recurrence(beta2, steps)
        first = int(np.argmax(ratio > 1)) + 1
        tenfold = first + int(np.argmax(np.abs(x[first:]) > 10 * abs(x[first - 1]))) + 1
        error = np.max(np.abs(ratio / expected_ratio - 1))
        checks += [
            common.close(f"beta2 = {beta2}: step at which the sharpness passes the threshold", passes, first, 0.0),
            common.close(f"beta2 = {beta2}: step at which |x| has grown tenfold", grows, tenfold, 0.0),
            common.at_most(
                f"beta2 = {beta2}: sharpness/threshold against rate/(2 sqrt(v)), worst of all steps", 1e-3, error
            ),
            common.at_least(
                f"beta2 = {beta2}: how often |x| shrank tenfold before", 3.0, -math.log10(abs(x[first - 1]))
            ),
        ]
        at = np.arange(1, steps + 1)
        axes[0, 0].plot(at, np.log10(np.abs(x)), color=common.COLOURS[i], linewidth=1.2, label=f"beta2 = {beta2}")
        axes[0, 1].plot(at, ratio, color=common.COLOURS[i], linewidth=1.2, label=f"beta2 = {beta2}")
        common.predicted(axes[0, 0], at, np.log10(np.abs(expected_x)), "recurrence")
        common.predicted(axes[0, 1], at, expected_ratio, "recurrence")
        axes[0, 0].axvline(passes, color=common.COLOURS[i], linestyle=":", linewidth=0.9)
    axes[0, 1].axhline(1, color="0.4", linestyle=":", linewidth=0.9)
    common.finish(axes[0, 0], "log10 |x| (dotted: the step predicted)", "step", "")
    common.finish(axes[0, 1], "preconditioned sharpness over threshold", "step", "")
    remarks = [
        f"x²/2 from x = {START:g}, optax.adam({RATE}, b1=0), float64; sharpness by fnn.curvature(...).preconditioned after each step."
    ]
    return common.Result(checks, figure, remarks)


def loss(x):
    return jnp.square(x) / 2


def train(beta2: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """x after each step, and the preconditioned sharpness over the threshold as it stood for that step."""
    with jax.enable_x64(True):
        optimizer = optax.adam(RATE, b1=0.0, b2=beta2)
        x = jnp.asarray(START, jnp.float64)
        state, xs, ratios = optimizer.init(x), [], []
        step = jax.jit(lambda x, state: optimizer.update(x, state, x))  # the gradient of x²/2 is x
        for _ in range(steps):
            before = x
            update, state = step(x, state)
            x = optax.apply_updates(x, update)
            xs.append(float(x))
            ratios.append(fnn.curvature(loss)(before).preconditioned(optimizer, state).ratio)
    return np.array(xs), np.array(ratios)


def recurrence(beta2: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    x, v, xs, ratios = START, 0.0, [], []
    for t in range(1, steps + 1):
        v = beta2 * v + (1 - beta2) * x**2
        root = math.sqrt(v / (1 - beta2**t))
        x -= RATE * x / root
        xs.append(x)
        ratios.append(RATE / root / 2)
    return np.array(xs), np.array(ratios)


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
