"""How fast do gradients vanish through time, and what does a forget gate's bias change?

|dh_T/dh_t| <= (gamma s_max(U))^(T-t) for h_t = phi(x_t W + h_{t-1} U + b), gamma the largest slope of phi (Pascanu et al.
2013). Of an orthogonal linear net it is an equality. A fresh LSTM whose gates see little forgets by sigmoid(b) a step, b
the bias of its forget gate, and so does the gradient that travels through its cells.
"""

import math
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np

import fnn

WIDTH, BATCH = 64, 16
CASES = (
    # label, activation, recurrent initialiser, gamma
    ("identity, U orthogonal", "identity", "orthogonal", 1.0),
    ("tanh, U orthogonal", "tanh", "orthogonal", 1.0),
    ("tanh, U orthogonal·0.9", "tanh", "orthogonal(0.9)", 1.0),
    ("tanh, U ~ N(0, 1/n)", "tanh", "scaled(1.0)", 1.0),
    ("sigmoid, U orthogonal·2", "sigmoid", "orthogonal(2.0)", 0.25),
)


def run(options: common.Options) -> common.Result:
    with jax.enable_x64(True):  # 100 steps of a sigmoid net leave float32's range
        return measure(options)


def measure(options: common.Options) -> common.Result:
    """Draw both panels and check every line against its bound or its rate."""
    time, seeds = options.pick(100, 20), options.pick(10, 3)
    x = jax.random.normal(jax.random.key(0), (BATCH, time, WIDTH))
    ends = jax.random.normal(jax.random.key(1), (WIDTH,))  # dL/dh_T
    back = np.arange(time)[::-1]  # T - t
    figure, axes = common.panels(2)
    checks = []
    for i, (label, activation, init, gamma) in enumerate(options.pick(CASES, (CASES[0], *CASES[3:]))):
        layer = fnn.rnn(WIDTH, activation=activation, recurrent_init=init, kernel_init="scaled(0.5)", tap=fnn.tap())
        logs, largest = error_signals(layer, x, ends, seeds)
        logs = logs - logs[:, -1:]
        bound = back * np.log(gamma * largest)[:, None]
        checks.append(
            common.at_most(f"{label}: log |dL/dh_t| above its bound, worst of all t", 1e-4, np.max(logs - bound))
        )
        if activation == "identity":
            checks.append(
                common.close(f"{label}: log |dL/dh_1|/|dL/dh_T|", 0.0, logs[np.argmax(abs(logs[:, 0])), 0], 1e-3)
            )
        common.measured(axes[0, 0], back, logs / math.log(10), i, label)
        if init != "orthogonal":
            common.predicted(axes[0, 0], back, np.median(bound, axis=0) / math.log(10), "bounds")
    bottom = axes[0, 0].get_ylim()[0]
    axes[0, 0].set_ylim(max(bottom, -60), 5)
    for i, bias in enumerate(options.pick((0.0, 1.0, 3.0, 5.0), (1.0, 5.0))):
        quiet = fnn.lstm(WIDTH, forget_bias=bias, recurrent_init="zeros", kernel_init="scaled(0.01)")
        slopes = input_gradients(quiet, x, ends, seeds)
        rate = math.log(1 / (1 + math.exp(-bias)))
        slope = np.polyfit(back[:-5], np.mean(slopes, axis=0)[:-5], 1)[0]
        checks.append(
            common.close(f"LSTM, quiet gates, forget bias {bias:g}: slope of log |dL/dx_t|", rate, slope, 0.005)
        )
        live = input_gradients(fnn.lstm(WIDTH, forget_bias=bias), x, ends, seeds)
        common.measured(axes[0, 1], back, (live - live[:, -1:]) / math.log(10), i, f"LSTM, bias {bias:g}")
        common.predicted(axes[0, 1], back, rate * back / math.log(10), "gates at their biases")
    plain = input_gradients(fnn.rnn(WIDTH, recurrent_init="scaled(1.0)"), x, ends, seeds)
    plain = plain - plain[:, -1:]
    common.measured(axes[0, 1], back, plain / math.log(10), 5, "tanh, U ~ N(0, 1/n)")
    gain = np.median(live[:, 0] - live[:, -1]) - np.median(plain[:, 0])
    checks.append(
        common.at_least("LSTM with bias 5 against tanh, N(0, 1/n): log of how much more arrives at t = 1", 5.0, gain)
    )
    common.finish(axes[0, 0], "recurrent nets", "T − t", "log10 |dL/dh_t| / |dL/dh_T|")
    common.finish(axes[0, 1], "long short-term memory", "T − t", "log10 |dL/dx_t| / |dL/dx_T|")
    common.caption(figure, common.median_of(seeds), axes[0])
    remarks = [
        f"Width {WIDTH}, {time} steps of normal inputs, {seeds} seeds, batch {BATCH}. The bound must hold always, not "
        "in the mean: it is a norm's.",
        "Dashed: on the left the bounds (median over seeds), on the right sigmoid(b)^(T-t).",
    ]
    return common.Result(checks, figure, remarks)


def error_signals(layer: fnn.Layer, x: jax.Array, ends: jax.Array, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """log |dL/dh_t| from the taps inside the loop, float64[seeds, time], and s_max(U), float64[seeds]."""

    @jax.jit
    def one(key):
        params, state = layer.init(key, x)
        news = jax.grad(lambda s: jnp.mean(layer.apply(params, s, x)[0][:, -1] @ ends))(state)
        return news["tap"].blocks.backward.log, jnp.linalg.norm(params["recurrent_kernel"], 2)

    logs, largest = jax.lax.map(one, jax.random.split(jax.random.key(2), seeds))
    return np.asarray(logs, np.float64), np.asarray(largest, np.float64)


def input_gradients(layer: fnn.Layer, x: jax.Array, ends: jax.Array, seeds: int) -> np.ndarray:
    """log |dL/dx_t|, root mean square over examples, float64[seeds, time]."""

    @jax.jit
    def one(key):
        params, state = layer.init(key, x)
        slope = jax.grad(lambda x: jnp.sum(layer.apply(params, state, x)[0][:, -1] @ ends))(x)
        return fnn.tree.log_norm(slope, axis=(0, 2))

    return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(2), seeds)), np.float64)


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
