"""Why do large rates first throw the loss up, and then train: do they move the net to where it is flat enough for them?

Two linear layers, one example: f = u·v/sqrt(n), L = f²/2, tangent kernel lambda = (|u|² + |v|²)/n. Gradient descent follows two
numbers exactly: f' = f (1 - eta lambda + eta² f²/n), lambda' = lambda + eta f²/n (eta lambda - 4). Below eta lambda = 2 the loss
falls; up to 4 it rises until f²/n has pulled lambda down; beyond that it diverges (Lewkowycz et al. 2020).
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np

import fnn

WIDTH, START, KERNEL = 1000, 3.0, 1.0
"""n, f and lambda at the start."""
RATES = {1.5: 1.0, 2.5: 3.7, 3.0: 9.7, 3.8: 24.0}
"""eta·lambda at the start, and by which factor the loss rises at most, as published numbers say."""
DIVERGES = 4.2


def run(options: common.Options) -> common.Result:
    steps = options.pick(60, 40)
    figure, axes = common.panels(2)
    checks = []
    for i, (rate, rise) in enumerate(RATES.items()):
        losses, kernels = train(rate / KERNEL, steps)
        f, lam = recurrence(rate / KERNEL, steps)
        rises = float(losses.max() / losses[0]), float(np.max(f**2) / f[0] ** 2)
        checks += [
            common.close(f"eta·lambda = {rate}: the loss rises by", rises[1], rises[0], 0.01, relative=True),
            common.close(f"eta·lambda = {rate}: the same, in two digits", rise, rises[0], 0.02, relative=True),
            common.close(
                f"eta·lambda = {rate}: eta·lambda at the end",
                rate / KERNEL * lam[-1],
                rate * kernels[-1],
                0.01,
                relative=True,
            ),
            common.at_most(f"eta·lambda = {rate}: eta·lambda at the end", 2.0, rate * kernels[-1]),
            common.at_most(
                f"eta·lambda = {rate}: loss at the end over loss at the start", 1e-3, float(losses[-1] / losses[0])
            ),
        ]
        shown = np.arange(min(steps, 24) + 1)
        style = {"color": common.COLOURS[i], "marker": common.MARKERS[i], "markersize": 3, "linewidth": 1}
        axes[0, 0].semilogy(shown, np.maximum(losses[shown], 1e-12), label=f"eta·lambda = {rate}", **style)
        axes[0, 1].plot(shown, rate * kernels[shown], label=f"eta·lambda = {rate}", **style)
        common.predicted(axes[0, 0], shown, np.maximum(f[shown] ** 2 / 2, 1e-12), "recurrence")
        common.predicted(axes[0, 1], shown, rate * lam[shown], "recurrence")
    losses, _ = train(DIVERGES / KERNEL, steps)
    checks.append(common.at_least(f"eta·lambda = {DIVERGES}: log10 of the largest loss", 6.0, _log10(losses)))
    axes[0, 1].axhline(2, color="0.4", linestyle=":", linewidth=1)
    axes[0, 0].set_ylim(1e-10, 1e3)
    common.finish(axes[0, 0], "loss", "step", "")
    common.finish(axes[0, 1], "eta·lambda (dotted: 2)", "step", "")
    remarks = [
        f"Width {WIDTH}, f = {START:g} and lambda = {KERNEL:g} at the start, {steps} steps; lambda is measured by fnn.kernel after each "
        "step. Legend: at the start. Tolerance 1 % of the recurrence.",
    ]
    return common.Result(checks, figure, remarks)


def outputs(params, x):
    return jnp.sum(params["u"] * params["v"]) * x / math.sqrt(WIDTH)


def start() -> dict[str, jax.Array]:
    """Random weights with exactly the wanted f and lambda: those of u + v and u - v have the lengths that this asks for."""
    plus, minus = (jax.random.normal(key, (WIDTH,)) for key in jax.random.split(jax.random.key(0)))
    minus = minus - plus * jnp.dot(plus, minus) / jnp.dot(plus, plus)
    both, difference = WIDTH * KERNEL, 2 * math.sqrt(WIDTH) * START
    plus = plus / jnp.linalg.norm(plus) * math.sqrt((both + difference) / 2)
    minus = minus / jnp.linalg.norm(minus) * math.sqrt((both - difference) / 2)
    return {"u": (plus + minus) / math.sqrt(2), "v": (plus - minus) / math.sqrt(2)}


def train(rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and tangent kernels before each step and after the last, until the loss overflows."""
    x, params, kernel = jnp.ones(1), start(), fnn.kernel(outputs)
    step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - rate * g, p, jax.grad(loss)(p)))
    losses, kernels = [], []
    for _ in range(steps + 1):
        losses.append(float(loss(params)))
        kernels.append(float(kernel(params, x).matrix[0, 0]))
        if not math.isfinite(losses[-1]):
            break
        params = step(params)
    return np.array(losses), np.array(kernels)


def loss(params):
    return jnp.square(outputs(params, 1.0)) / 2


def recurrence(rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    f, lam = [START], [KERNEL]
    for _ in range(steps):
        now, k = f[-1], lam[-1]
        f.append(now * (1 - rate * k + rate**2 * now**2 / WIDTH))
        lam.append(k + rate * now**2 / WIDTH * (rate * k - 4))
    return np.array(f), np.array(lam)


def _log10(losses: np.ndarray) -> float:
    finite = losses[np.isfinite(losses)]
    return math.log10(finite.max()) if len(finite) == len(losses) else 38.0


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
