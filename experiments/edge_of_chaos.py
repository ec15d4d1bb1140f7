"""Does tanh lose its gradients in the ordered phase, amplify them in chaos, and train deep only on the line between?

Biases of variance 0.05. Away from the critical line E|dL/dh|² changes by chi a layer, and the signal of an input is lost
over the depth scale xi = 1/|log chi|: nets far deeper than 6 xi do not train (Schoenholz et al. 2017, section 5).
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

BIAS, WIDTH = 0.05, 100
VARIANCES = (1.0, 1.76095464, 2.5, 4.0)  # of the weights: ordered, critical, chaotic, more so


def run(options: common.Options) -> common.Result:
    figure, axes = common.panels(2, size=(4.2, 3.6))
    checks = slopes(options, axes[0, 0]) + training(options, axes[0, 1])
    common.caption(figure, f"left: {common.median_of(options.pick(10, 6))}")
    remarks = [
        "Slopes of log E|dL/dh|² over layers, towards the input: width 400, 30 layers, 10 seeds, started at q*, without "
        "the first 3 layers."
        if not options.tiny
        else "Tiny nets: width 100, 15 layers, 6 seeds, three times the tolerance.",
        f"Training: width {WIDTH}, {steps(options)} steps of gradient descent (momentum 0.9) on batches of 32 digits; best of the "
        "rates 0.001, 0.003 and 0.01, one seed, accuracy on the test digits. Chance is 0.1.",
    ]
    return common.Result(checks, figure, remarks)


def slopes(options: common.Options, axis: object) -> list[common.Check]:
    depth, width, seeds, tolerance = options.pick((30, 400, 10, 0.03), (15, 100, 6, 0.09))
    checks = []
    for i, variance in enumerate(options.pick(VARIANCES, VARIANCES[:1])):
        sigma_w, sigma_b = math.sqrt(variance), math.sqrt(BIAS)
        point = fnn.meanfield.fixed_point("tanh", sigma_w, sigma_b)
        # An input of this size puts the first pre-activations at q*.
        x = math.sqrt((point.q - BIAS) / variance) * jax.random.rademacher(jax.random.key(0), (1, width), jnp.float32)
        init = {"init": fnn.initializers.scaled(sigma_w), "bias_init": fnn.initializers.normal(sigma_b)}
        net = fnn.models.mlp(depth, width, 10, activation="tanh", taps=True, unroll=1, **init)
        (measured,) = common.signals(net, (x, np.array([3])), seeds, chunk=2)
        error = measured["log_error"][:, :-1]
        slope = math.log(common.rate(common.log_mean_square(error)))
        checks.append(common.close(f"slope at sigma_w² = {variance:.3g}", math.log(point.chi), slope, tolerance))
        layers = np.arange(1, depth + 1)
        name = rf"$\sigma_w^2$ = {variance:.3g}"
        common.measured(axis, layers, (error - error[:, -1:]) / math.log(10), i, name)
        common.predicted(axis, layers, (depth - layers) * math.log10(point.chi) / 2, r"$\chi$ a layer")
    common.finish(axis, "gradient", "layer (1 is next to the input)", "log10 |dL/dh|, last layer 0")
    return checks


def steps(options: common.Options) -> int:
    return options.pick(400, 80)


def training(options: common.Options, axis: object) -> list[common.Check]:
    depths = options.pick((4, 8, 16, 32, 64), (2, 16))
    variances = options.pick((0.7, 1.0, 1.3, 1.76095464, 2.5, 4.0), (0.5, 1.76095464))
    train, test = fnn.data.digits(key=jax.random.key(0))
    scores = np.array([[accuracy(depth, variances, train, test, steps(options))] for depth in depths])[:, 0]
    image = axis.pcolormesh(np.arange(len(variances) + 1), np.arange(len(depths) + 1), scores, vmin=0, vmax=1)
    axis.set_xticks(np.arange(len(variances)) + 0.5, [f"{v:.3g}" for v in variances])
    axis.set_yticks(np.arange(len(depths)) + 0.5, [str(d) for d in depths])
    axis.figure.colorbar(image, ax=axis, label="test accuracy")
    # 6 xi, in the unit of the axis: the logarithm of the depth.
    grid = np.linspace(variances[0], variances[-1], options.pick(300, 30))
    limits = [6 * fnn.meanfield.fixed_point("tanh", math.sqrt(v), math.sqrt(BIAS)).xi_grad for v in grid]
    x = np.interp(grid, variances, np.arange(len(variances)) + 0.5)
    y = np.interp(np.log(np.minimum(limits, 2 * depths[-1])), np.log(depths), np.arange(len(depths)) + 0.5)
    common.predicted(axis, x, np.where(np.array(limits) < depths[-1], y, np.nan), r"6 $\xi$")
    common.finish(axis, "what trains, one seed", r"$\sigma_w^2$", "depth")
    critical, deep, ordered = variances.index(1.76095464), len(depths) - 1, variances.index(variances[0])
    xi = fnn.meanfield.fixed_point("tanh", math.sqrt(variances[ordered]), math.sqrt(BIAS)).xi_grad
    far = f"ordered (sigma_w² = {variances[ordered]}, 6 xi = {6 * xi:.0f})"
    good = options.pick(0.8, 0.5)
    checks = [
        common.at_least(f"accuracy, critical, depth {depths[deep]}", good, scores[deep, critical]),
        common.at_most(f"accuracy, {far}, depth {depths[deep]}", 0.3, scores[deep, ordered]),
        common.at_least(f"accuracy, {far}, depth {depths[0]}", good, scores[0, ordered]),
    ]
    if not options.tiny:
        checks.append(common.at_most("accuracy, chaotic (sigma_w² = 4), depth 64", 0.3, scores[deep, -1]))
    return checks


def accuracy(depth: int, variances: tuple[float, ...], train: object, test: object, count: int) -> list[float]:
    """Train every variance and rate at once; return for each variance the best test accuracy over the rates."""
    rates = np.array([0.001, 0.003, 0.01], np.float32)
    net = fnn.models.mlp(depth, WIDTH, 10, activation="tanh", init="scaled(1)", bias_init="normal(1)", unroll=1)
    params, state = net.init(jax.random.key(2), train.x[:1])

    def score(variance, rate):
        def scaled(path, p):
            return p * jnp.where(path[-1].key == "bias", math.sqrt(BIAS), jnp.sqrt(variance))

        optimizer = optax.sgd(rate, momentum=0.9)
        first = jax.tree_util.tree_map_with_path(scaled, params)
        step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
        carry = fnn.TrainState(first, state, optimizer.init(first), jax.random.key(3), jnp.zeros((), jnp.int32))
        batches = jax.random.randint(jax.random.key(4), (count, 32), 0, train.size)

        def body(carry, index):
            return step.pure(carry, (jnp.asarray(train.x)[index], jnp.asarray(train.y)[index]))

        carry, _ = jax.lax.scan(body, carry, batches)
        outputs, _ = net.apply(carry.params, carry.net_state, test.x)
        return jnp.mean(jnp.argmax(outputs, axis=-1) == test.y)

    every = jax.jit(jax.vmap(jax.vmap(score, (None, 0)), (0, None)))(np.array(variances, np.float32), rates)
    return np.max(every, axis=1).tolist()


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
