"""What theory expects of a cell's error signals at initialisation, beside which the table puts what was measured.

Nets like those of the cell are drawn from its own inputs and targets, at its own width (`theory/drawn`). Where that would
take long, as for very wide nets, the expansion to order 1/width stands in (`meanfield.predict`).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fnn import compiled, lowering, measures
from fnn.layers.activations import TABLE
from fnn.study import program
from fnn.theory import drawn, meanfield

DRAWS = 32
"""Nets that are drawn for up to eight seeds; four for each further one."""
MOST_WORK = 6e8
"""Normal numbers and multiplications of them, up to which nets are drawn: about ten seconds of one core."""
GAINS = {"he_normal": math.sqrt(2), "lecun_normal": 1.0}
"""Initialisers, besides "scaled", that draw true normal weights from N(0, gain²/fan_in)."""


class Theory(NamedTuple):
    """What theory says of a study's nets; both are functions of a cell's static axes, sigma_w and sigma_b."""

    curves: Callable[..., dict[str, np.ndarray] | None]
    singular: Callable[..., meanfield.SingularMoments | None]


def of(setup: program.Setup) -> Theory:
    """Bind `curves` and `singular` to a study's data and loss."""
    return Theory(functools.partial(curves, setup), functools.partial(singular, setup))


def singular(
    setup: program.Setup, static: Mapping[str, Any], sigma_w: float, sigma_b: float
) -> meanfield.SingularMoments | None:
    """Expect the moments of the singular values of d outputs/d inputs at the first example, in the limit of wide nets.

    None where theory does not reach: norms, residual sums, and initialisers that are neither normal nor orthogonal.
    """
    phi, init = TABLE.get(static["activation"]), static["init"]
    gains = {"scaled": sigma_w, "orthogonal": 1.0, **GAINS}
    if phi is None or not phi.elementwise or static["norm"] != "none" or static["residual"] or init not in gains:
        return None
    x = np.asarray(setup.train.x[0], np.float64).ravel()
    sizes = (x.size, *[int(static["width"])] * int(static["depth"]), program.classes(setup.train))
    given = {"sigma_w": gains[init], "sigma_b": sigma_b, "q": float(np.mean(x**2)), "orthogonal": init == "orthogonal"}
    try:
        return meanfield.singular_moments(phi, sizes, **given)
    except (ValueError, ArithmeticError):
        return None  # an input of zeros, or an integral that does not converge


def curves(
    setup: program.Setup, static: Mapping[str, Any], sigma_w: float, sigma_b: float, seeds: int, q0: float | None
) -> dict[str, np.ndarray] | None:
    """Expect log |dL/dh_l| less that of the last hidden layer, l = 1..depth, by the role of the tap: float64[3, depth].

    "preactivation" is the error signal before each activation, "sum" that at each residual sum (nan at layer 1, which has
    none). The three are the typical curve, and the ends of the band in which one more seed lies with probability 0.95.
    `q0` is the measured variance of h_1, for the expansion. None where theory does not reach.
    """
    phi, init = TABLE.get(static["activation"]), static["init"]
    if phi is None or not phi.elementwise or static["norm"] not in drawn.EPS:
        return None
    if init != "scaled" and init not in GAINS:
        return None
    net = drawn.Net(
        phi,
        int(static["depth"]),
        int(static["width"]),
        outputs=program.classes(setup.train),
        sigma_w=GAINS.get(init, sigma_w),
        sigma_b=sigma_b,
        norm=static["norm"],
        residual=1.0 if static["residual"] else None,
    )
    size = int(static["batch_size"])
    x, y = (np.asarray(a[:size]) for a in (setup.train.x, setup.train.y))
    found = _drawn(net, x, y, setup.loss, max(DRAWS, 4 * seeds))
    return _expanded(net, x, q0) if found is None else found


def _drawn(
    net: drawn.Net, x: np.ndarray, y: np.ndarray, loss: Callable[[Any, Any], Any], draws: int
) -> dict[str, np.ndarray] | None:
    """Draw nets with the measured batch; None if that would take long, or gives no numbers."""
    draws = min(draws, int(MOST_WORK / (net.depth * net.width * min(net.width, 4 * len(x)))))
    if draws < DRAWS // 2 or (net.norm == "batch_norm" and len(x) < 2):
        return None
    x = x.reshape(len(x), -1).astype(np.float64)
    covariance = net.sigma_w**2 * (x @ x.T) / x.shape[1] + net.sigma_b**2
    logs = drawn.draw(net, covariance, _errors(loss, y), draws=draws)
    by_role = {"preactivation": logs.error, "sum": logs.trunk}
    found = {role: np.stack(drawn.interval(a - a[:, -1:])) for role, a in by_role.items()}
    found["sum"][:, 0] = math.nan
    return found if np.all(np.isfinite(found["preactivation"])) else None


def _errors(loss: Callable[[Any, Any], Any], y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function of the outputs of several nets: the gradient of each example's loss by its outputs."""

    def errors(outputs):
        with jax.ensure_compile_time_eval(), jax.default_device(lowering.host()):
            return np.asarray(compiled.call(_gradients, (loss,), outputs, y))  # all cells share the program

    return errors


def _gradients(loss: Callable[[Any, Any], Any], outputs: Any, y: Any) -> jax.Array:
    return jax.vmap(jax.grad(lambda z: len(y) * measures.mean(loss, z, y)))(outputs)


def _expanded(net: drawn.Net, x: np.ndarray, q0: float | None) -> dict[str, np.ndarray] | None:
    """Expand to order 1/width; None where there is no theory, as for a batch below 4."""
    given: dict[str, Any] = {"q0": q0, "residual": net.residual}
    if net.norm == "batch_norm":
        given |= {"norm": net.norm, "batch": len(x), "q0": first_variance(x, net.sigma_w)}
    elif net.norm != "none":
        return None
    given |= {"activation": net.activation, "sigma_w": net.sigma_w, "sigma_b": net.sigma_b}
    try:
        theory = meanfield.predict(net.depth, width=net.width, **given)
    except (ValueError, ArithmeticError):
        return None  # an integral that does not converge
    typical = np.where(np.isnan(theory.mean_log_error), theory.log_error, theory.mean_log_error)
    return {"preactivation": np.stack([typical, theory.low, theory.high])}


def first_variance(inputs: np.ndarray, sigma_w: float) -> float | None:
    """Find what batch norm divides the first layer's error signal by: 1/E[1/v], v a unit's variance over the batch.

    v is a quadratic form of the unit's weights, sum_i lambda_i z_i² with z ~ N(0, 1) and lambda the eigenvalues of
    sigma_w²/d times the inputs' covariance; E[1/v] is the integral of E[exp(-t v)] = prod_i (1 + 2 t lambda_i)^(-1/2)
    over t > 0. Inputs vary in few directions (the digits in about ten), so that this is well below E[v].
    """
    x = np.asarray(inputs, np.float64).reshape(len(inputs), -1)
    x = x - x.mean(0)
    values = np.linalg.eigvalsh(x @ x.T / len(x)) * sigma_w**2 / x.shape[1]
    values = values[values > 1e-12 * values.max()]
    if len(values) < 3:
        return None  # the mean of 1/v is infinite
    # In log t the trapezium rule converges faster than any power of its step.
    s = np.arange(-40, 80, 0.05) - np.log(values.sum())
    return float(1 / (0.05 * np.sum(np.exp(s - 0.5 * np.sum(np.log1p(2 * np.exp(s)[:, None] * values), axis=1)))))
