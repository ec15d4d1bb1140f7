"""Sharpness, traces, singular values and tangent kernels as quantities of a study, measured on the cell's batch.

They are measured at the recorded steps if `quantities` names them, and have layer 0. Each is NaN where it is not known.

| quantity | what it is |
|---|---|
| sharpness | largest eigenvalue of the Hessian of the mean loss, to 1 % by its residual; NaN where 60 products do not suffice |
| preconditioned_sharpness | that of P⁻¹H, P the optimiser's preconditioner (see `Curvature.preconditioned`): SGD, momentum, Adam(W), RMSProp; the last two from the second record on |
| lambda_c | critical sharpness: 2/η, η the rate at which the optimiser's next step stops lowering the loss on this batch; NaN where that step does not lower it, or no rate was found at which it rises |
| hessian_trace, hessian_trace_error | trace of the Hessian by 32 probes, and the standard error |
| log10_singular | log10 of all singular values of d outputs/d inputs, input to output, at the first example of the batch; a row each, path [0], [1], ... from the largest on. NaN where rounding hides it. Beyond 2048 inputs and outputs the largest eight (needs matfree) |
| log10_singular_max, _min, _rms, _fourth | of the largest, the smallest, root mean square, fourth root of the mean fourth power; theory beside the last two, for wide nets, at step 0 |
| ntk_condition | largest over smallest eigenvalue of the tangent kernel of the batch (mean over outputs), in eval mode: batch norm has its running statistics, which at step 0 are the identity; inf where rounding hides the smallest |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import check
from fnn.spectra import critical, density, products, stability
from fnn.spectra.curvature import curvature
from fnn.spectra.jacobian import DENSE, jacobian
from fnn.spectra.kernel import kernel
from fnn.study.words import count

OF_LOSS = ("sharpness", "preconditioned_sharpness", "lambda_c", "hessian_trace", "hessian_trace_error")
OF_OUTPUTS = (
    *("log10_singular", "log10_singular_max", "log10_singular_min", "log10_singular_rms", "log10_singular_fourth"),
    "ntk_condition",
)
"""They need the net's outputs, which a pair (init, loss) does not show."""
QUANTITIES = (*OF_LOSS, *OF_OUTPUTS)
MOMENTS = {"log10_singular_rms": (0, 2), "log10_singular_fourth": (1, 4)}
"""Which moment of `meanfield.singular_moments`, and its root."""
PRODUCTS = 60
"""Hessian products at most for a largest eigenvalue."""
PROBES = 32
LARGEST = 8
"""Singular values where a Jacobian is too large to be stored."""
PRECONDITIONED = ("sgd", "momentum", "adam", "adamw", "rmsprop")
"""Optimisers whose stability is known."""
FORWARD, PRODUCT = 0.4, 2.0
"""Price in gradients of a forward pass and of a Hessian product: rough, for `cost`; `Study.price` measures them."""
SMALLEST = 1e-30
"""Jacobians whose largest singular value is below this may have lost part of it to underflow."""


class Step(NamedTuple):
    """What the optimiser is about to do."""

    updates: Any
    rate: Any
    optimizer: Any
    """Without its clip."""
    state: Any


def asked(quantities: Sequence[str] | None) -> tuple[str, ...]:
    """List those of a study's quantities that are measured here."""
    return tuple(name for name in QUANTITIES if name in (quantities or ()))


def check_quantities(quantities: Sequence[str] | None, pair: bool, optimizers: Sequence[str], x: Any, y: Any) -> None:
    """Refuse what a study's nets or optimisers do not have; x and y are the specs of inputs and outputs.

    Errors: ValueError; ImportError where matfree is needed.
    """
    names = asked(quantities)
    if pair and (wrong := [name for name in names if name in OF_OUTPUTS]):
        raise ValueError(
            f"study: {wrong[0]} needs a net's outputs, got a build that returns (init, loss); return a Layer, or leave it out"
        )
    unknown = sorted(set(optimizers) - set(PRECONDITIONED))
    if "preconditioned_sharpness" in names and unknown:
        raise ValueError(
            f"study: preconditioned_sharpness is known for {', '.join(PRECONDITIONED)}, got {unknown[0]}; use sharpness"
        )
    if any(name.startswith("log10_singular") for name in names):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"study: log10_singular needs floating inputs to differentiate by, got {check.describe(x)}; leave it out"
            )
        if min(math.prod(a.shape[1:]) for a in (x, y)) > DENSE:
            density.matfree("study: log10_singular", "decomp")


def measure(names: Sequence[str], net: Any, at: Any, batch: Any, key: Any, step: Step) -> dict[str, Any]:
    """Measure some quantities of one net: {name: float[] or, of log10_singular, float[k]}.

    `net` is one of `nets`, `at` holds params, net_state and the count of steps. What an iteration does not find to 1 % in
    `PRODUCTS` products is NaN, and so is what rounding hides.
    """
    found: dict[str, Any] = {}
    probes = jax.random.fold_in(key, at.step)

    def loss(params):
        return net.value(params, at.net_state, batch, key)  # one draw of the noise, that of the measured gradient

    if set(names) & {"sharpness", "preconditioned_sharpness", "hessian_trace", "hessian_trace_error"}:
        c = curvature(loss)(at.params)
        if "sharpness" in names:
            found["sharpness"] = _largest(c.hessian, probes)
        if "preconditioned_sharpness" in names:
            inverse = stability.preconditioner("study", step.optimizer, step.state, at.params)
            root = jax.tree.map(jnp.sqrt, inverse)
            found["preconditioned_sharpness"] = _largest(c._operator(c.hessian._multiply, root), probes)
        if {"hessian_trace", "hessian_trace_error"} & set(names):
            trace = c.hessian.trace(PROBES, key=probes).trace
            found |= {"hessian_trace": trace.value, "hessian_trace_error": trace.error}
    if "lambda_c" in names:
        direction = jax.tree.map(lambda u: -u / step.rate, step.updates)

        def moved(rate):
            return loss(jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), at.params, direction))

        found["lambda_c"] = critical.critical(
            moved, loss(at.params), step.rate, 1e-3, products.rounding(loss, at.params)
        ).sharpness
    if any(name.startswith("log10_singular") for name in names):
        found |= _singular(net.net, at, batch[0], key)
    if "ntk_condition" in names:
        found["ntk_condition"] = kernel(net.net)((at.params, at.net_state), batch[0]).condition()
    return {name: found[name] for name in names}


def _largest(operator: Any, key: Any) -> jax.Array:
    pairs = operator.eigenvalues(max_products=PRODUCTS, key=key)
    return jnp.where(pairs.converged, pairs.values[0], jnp.nan)


def _singular(net: Any, at: Any, x: Any, key: Any) -> dict[str, jax.Array]:
    """Take log10 of the singular values of d outputs/d inputs at the first example, the others held as they are."""

    def outputs(one):
        return net.apply(at.params, at.net_state, x.at[0].set(one), key=key, train=True)[0][0]

    j = jacobian(outputs)(x[0])
    if min(j.shape) <= DENSE:
        values = j.singular_values()
        top, bottom = values[0], values[-1]
        second, fourth = (top * jnp.mean((values / top) ** k) ** (1 / k) for k in (2, 4))
    else:
        values = j.extremes(LARGEST, key=key).largest
        (a, b), n = j.moments(2, probes=PROBES, key=key).value, min(j.shape)
        top, bottom, second, fourth = values[0], jnp.nan, jnp.sqrt(a / n), (b / n) ** 0.25
    least = max(j.shape) * jnp.finfo(values.dtype).eps * top

    def log10(a):
        return jnp.where((a > least) & (top > SMALLEST), jnp.log10(a), jnp.nan)

    ends = {"max": top, "min": bottom, "rms": second, "fourth": fourth}
    return {"log10_singular": log10(values)} | {f"log10_singular_{name}": log10(a) for name, a in ends.items()}


def vectors(quantities: Sequence[str] | None) -> int:
    """Say how many vectors of the size of the parameters the largest eigenvalues keep."""
    return 2 * PRODUCTS + 50 if {"sharpness", "preconditioned_sharpness"} & set(quantities or ()) else 0


def cost(names: Sequence[str], inputs: int, outputs: int) -> dict[str, float]:
    """Say about how many gradients of the measured batch a record of each quantity takes, at most."""
    price = {
        "sharpness": PRODUCTS * PRODUCT,
        "preconditioned_sharpness": PRODUCTS * PRODUCT,
        "lambda_c": critical.MOST * FORWARD,
        "hessian_trace": PROBES * PRODUCT,
        "log10_singular": min(inputs, outputs) if min(inputs, outputs) <= DENSE else 2 * (60 + 2 * PROBES),
        "ntk_condition": outputs,
    }
    return {name: float(value) for name, value in price.items() if any(kind(asked) == name for asked in names)}


def kind(name: str) -> str:
    """Name the quantity with which one is measured."""
    return "log10_singular" if name.startswith("log10_singular") else name.removesuffix("_error")


def sentence(prices: Sequence[tuple[Mapping[str, float], int]]) -> str | None:
    """Say what these quantities cost, from each cell's `cost` and its number of records; None where none is asked for."""
    if not any(price for price, _ in prices):
        return None
    total = sum(sum(price.values()) * records for price, records in prices)
    names = list(dict.fromkeys(name for price, _ in prices for name in price))
    most = {name: max(price.get(name, 0) for price, _ in prices) for name in names}
    parts = ", ".join(f"{name} {most[name]:.0f}" for name in names)
    records = count(sum(records for _, records in prices), "record")
    return (
        f"study: a record takes up to so many gradients: {parts}; {total:,.0f} for {records} in all (fnn.Study.price() measures "
        "what they take here)"
    )
