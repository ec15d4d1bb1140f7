"""Do orthogonal weights keep the singular values of a deep net's Jacobian together, as theory says, and normal ones not?

J = dy/dx of L layers of equal widths, from normal weights N(0, sigma_w²/n) or sigma_w times an orthogonal matrix. The mean of
s² is the product of chi over layers; the mean of s⁴ over its square is 1 + L (m - s1), m = E[phi'⁴]/E[phi'²]² - 1, s1 = -1 for
normal weights, 0 for orthogonal ones (Saxe et al. 2014; Pennington et al. 2017): L + 1 and 1 in linear nets.
"""

import math
import os
import sys

# LAPACK's threads wait for one another longer than matrices of this size take, on a machine with other work 40 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import common
import jax
import jax.numpy as jnp
import numpy as np

import fnn

CASES = {
    "linear, normal": ("identity", False, 1.0, 0.0),
    "linear, orthogonal": ("identity", True, 1.0, 0.0),
    "relu, normal": ("relu", False, math.sqrt(2), 0.0),
    "relu, orthogonal": ("relu", True, math.sqrt(2), 0.0),
    "tanh, normal": ("tanh", False, None, 0.05),
    "tanh, orthogonal": ("tanh", True, None, 0.05),
}
"""Activation, whether weights are orthogonal, sigma_w (None: critical), sigma_b."""


def run(options: common.Options) -> common.Result:
    width, seeds, depths, bound = options.pick((300, 12, (2, 4, 8, 16), 0.05), (60, 12, (6,), 0.2))
    cases = options.pick(list(CASES), ["linear, normal", "tanh, normal", "tanh, orthogonal"])
    figure, axes = common.panels(3)
    checks, densities = [], {}
    for i, name in enumerate(cases):
        phi, orthogonal, sigma_w, sigma_b = CASES[name]
        sigma_w = fnn.meanfield.critical(phi, sigma_b) if sigma_w is None else sigma_w
        q = fnn.meanfield.fixed_point(phi, sigma_w, sigma_b).q if phi == "tanh" else sigma_w**2
        q = (q - sigma_b**2) / sigma_w**2  # of the inputs, so that variances have settled from the first layer on
        options_of = {"sigma_w": sigma_w, "sigma_b": sigma_b, "orthogonal": orthogonal}
        spread, curve = [], []
        for depth in depths:
            values = singular(phi, depth, width, seeds, q, options_of)
            first, second = np.mean(values**2, axis=1), np.mean(values**4, axis=1)
            wide = fnn.meanfield.singular_moments(phi, [width] * (depth + 1), q=q, **options_of)
            error = 4 * np.std(first, ddof=1) / math.sqrt(seeds)
            ratio = second / first**2
            wanted = 4 * np.std(ratio, ddof=1) / math.sqrt(seeds) + bound / wide.isometry
            if depth == depths[-1]:
                checks += [
                    common.close(f"{name}, L = {depth}: mean of s²", wide.first, first.mean(), max(error, 1e-4)),
                    common.close(
                        f"{name}, L = {depth}: mean of s⁴ over its square", 1 / wide.isometry, ratio.mean(), wanted
                    ),
                ]
            spread.append(ratio)
            curve.append(1 / wide.isometry)
        densities[name] = np.log10(np.maximum(values, 1e-12)).ravel()
        common.measured(axes[0, 0], depths, np.array(spread).T, i, name)
        common.predicted(axes[0, 0], depths, curve)
    checks += exact(options.pick(2000, 400)) + lyapunov(*options.pick((32, 1000), (16, 200)))
    for i, name in enumerate(cases):
        axis = axes[0, 1 if "normal" in name else 2]
        heights, edges = np.histogram(densities[name], np.linspace(-3, 1.2, 60), density=True)
        axis.stairs(heights, edges, color=common.COLOURS[i], linewidth=1.2, label=name)
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_yscale("log")
    common.finish(axes[0, 0], "mean of s⁴ over (mean of s²)²", "layers L", "")
    common.finish(axes[0, 1], f"normal weights, L = {depths[-1]}", "log10 s", "density")
    axes[0, 2].set_ylim(0, 2)  # a linear net has all of them at 1
    common.finish(axes[0, 2], f"orthogonal weights, L = {depths[-1]} (linear: all at 0)", "log10 s", "")
    remarks = [
        f"Width {width}, {seeds} seeds; tanh at the critical sigma_w for sigma_b = 0.05. Tolerance: four standard errors, for the "
        f"mean of s⁴ and {100 * bound:.0f} % for finite width. Values of s below 10^-3 (zeros of ReLU) are not drawn.",
        "Finite width: the means of linear nets with normal weights are known exactly, and depart from L + 1.",
        "Lyapunov exponents of products of normal matrices: (log(2/n) + digamma((n - i + 1)/2))/2 (Newman 1986), by QR.",
    ]
    return common.Result(checks, figure, remarks)


def singular(phi, depth, width, seeds, q, options):
    """Singular values of dy/dx at a random x of mean square q: float64[seeds, width]."""
    net = mlp(phi, depth, width, options)

    def one(key):
        draw, at = jax.random.split(key)
        x = jax.random.normal(at, (width,))
        x = x * jnp.sqrt(q * width) / jnp.linalg.norm(x)
        return fnn.jacobian(net)(net.init(draw, x[None]), x).singular_values()

    run = jax.jit(lambda keys: jax.lax.map(one, keys))
    return np.asarray(run(jax.random.split(jax.random.key(depth), seeds)), np.float64)


def mlp(phi, depth, width, options):
    """`depth` layers of weights, an activation between them."""
    sigma = options["sigma_w"]
    init = fnn.initializers.orthogonal(sigma) if options["orthogonal"] else fnn.initializers.scaled(sigma)
    bias = fnn.initializers.normal(options["sigma_b"])
    return fnn.models.mlp(depth - 1, width, width, activation=phi, init=init, bias_init=bias, unroll=1)


def exact(seeds: int) -> list[common.Check]:
    """Compare the mean of s⁴ of small linear nets with the exact one, from E tr A² and E (tr A)² of A = J Jᵀ, W by W."""
    n, depth = 16, 6
    square, both = n, n**2
    for _ in range(depth):
        square, both = ((n**2 + n) * square + n * both) / n**2, both + 2 * square / n
    options = {"sigma_w": 1.0, "sigma_b": 0.0, "orthogonal": False}
    found = np.mean(singular("identity", depth, n, seeds, 1.0, options) ** 4, axis=1)
    error = 4 * np.std(found, ddof=1) / math.sqrt(seeds)
    name = f"linear, normal, width {n}, L = {depth}: mean of s⁴"
    return [common.close(name, square / n, found.mean(), error)]


def lyapunov(n: int, depth: int) -> list[common.Check]:
    """Compare the ends of the Lyapunov spectrum of a product of normal matrices, N(0, 1/n), with the exact exponents."""
    from jax.scipy.special import digamma, polygamma

    weights = jax.random.normal(jax.random.key(5), (depth, n, n)) / math.sqrt(n)
    found = fnn.jacobian(lambda h, w: w @ h).through(weights, jnp.ones(n), sweeps=1)
    exponents = np.sort(np.asarray(found.lyapunov, np.float64))[::-1]
    checks = []
    for i in (1, n // 2, n):
        half = (n - i + 1) / 2
        wanted = (math.log(2 / n) + float(digamma(half))) / 2 / math.log(10)
        error = math.sqrt(float(polygamma(1, half)) / 4 / depth) / math.log(10)
        name = f"product of {depth} matrices, width {n}: Lyapunov exponent {i}, log10"
        checks.append(common.close(name, wanted, exponents[i - 1], 4 * error))
    return checks


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
