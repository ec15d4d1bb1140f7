"""Up to which sharpness an optimiser's steps are stable, read from what the optimiser does.

For a loss ½ xᵀHx, an optimiser with one moment m is a linear map of (x, m): U = Q g + P m + d x, m' = C g + β m, with
diagonal Q, P, C. It oscillates, and grows, where an eigenvalue passes -1, which is at
lambda_max(E½ H E½) = (2 + d)(1 + β), E = P C - (1 + β) Q. The numbers are what `optimizer.update` makes of small numbers,
beside the second moment as it stands; so rates, schedules, decays and epsilons are those that the optimiser has. They
are taken in float32 at least: the rounding of half precision is no part of an optimiser's rule.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import admission, check, compiled, tree

PLAIN = {"EmptyState", "ScaleByScheduleState", "InjectHyperparamsState", "InjectStatefulHyperparamsState"}
FIRST = {"ScaleByAdamState": "mu", "TraceState": "trace"}
"""States that hold a first moment, and its name."""
SECOND = {"ScaleByAdamState", "ScaleByRmsState", "ScaleByRmsWithCountState"}
"""States that hold a second moment, `nu`."""
LARGE = 1e12
"""A second moment beside which epsilon does not count."""
STEP = 10.0
"""How many times smaller Adam's update is where its second moment is the square of this times as large."""


class Response(NamedTuple):
    """How an optimiser's next update depends on gradient, first moment and parameters."""

    effective: Any
    """E, like params, as it stands."""
    inverse: Any
    """P⁻¹, like params: E = rate · P⁻¹, and ones for SGD and momentum."""
    threshold: float
    """The sharpness of P⁻¹H above which steps are unstable: 2/η, (2 + 2β)/η, (2 + 2β)/((1 - β)η)."""
    momentum: float
    rate: float
    """η for SGD, momentum and RMSProp, (1 - β)η for Adam."""


def respond(who: str, optimizer: Any, state: Any, params: Any) -> Response:
    """Read an optimiser's response. Errors: TypeError, ValueError for optimisers whose stability is not known here."""
    admission.optimizer(who, optimizer)
    if compiled.traced((state, params)):
        raise TypeError(f"{who}: the optimiser is read on the host, got traced arrays; call it outside of jit")
    first, second = _moments(who, state, params)
    if first:
        _check_precision(who, optimizer, first, state, params)
    if second and not any(np.any(np.asarray(a)) for a in jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))):
        raise ValueError(f"{who}: the optimiser must have taken a step, got second moments of zero; call it after one")
    numbers = jax.device_get(compiled.call(_probe, (optimizer, first, second), state, params))
    flat = {name: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]) for name, tree in numbers.items()}
    beta, decay = flat["moment of moment"], flat["update of params"]
    effective = flat["effective"]
    if second:
        nu = [np.ravel(a) for a in jax.tree.leaves(jax.device_get(optax.tree_utils.tree_get(state, "nu")))]
        if not np.all(np.isfinite([effective, flat["at rest"]])[:, np.concatenate(nu) == 0]):
            raise ValueError(
                f"{who}: a second moment of zero needs an epsilon, got one without (or one that is 0 in the parameters' "
                "dtype), where the optimiser divides by zero; give it a larger eps, or leave out parameters without a gradient"
            )
    same = np.allclose(flat["update of signs"], flat["update of gradient"] * flat["signs"], rtol=1e-3, atol=0)
    coupled = flat["update of moment"] * flat["moment of gradient"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = coupled / flat["update of gradient"]
    if (
        not (np.all(np.isfinite([effective, flat["rate"]])) and np.all(effective > 0) and same)
        or np.ptp(beta) > 1e-3
        or np.ptp(decay) > 0.01
        or np.ptp(ratio) > 1e-3 * (1 + np.max(np.abs(ratio)))
    ):
        raise ValueError(
            f"{who}: the optimiser must scale each gradient by a number of its own, in one way for all parameters, got one "
            "that does not (signs, normalised updates, several groups); its stability has no known threshold here"
        )
    if second and not np.allclose([flat["fall"], flat["kept"]], 1, rtol=0, atol=0.01):
        raise ValueError(
            f"{who}: the optimiser must divide by the root of its second moment, as Adam and RMSProp do, got one that does "
            "not (adamax, adopt, the first steps of radam); use hessian.eigenvalues(), which needs no optimiser"
        )
    momentum = float(np.mean(beta))
    rate = float(np.mean(flat["rate"]))
    inverse = jax.tree.map(lambda e: e / rate, numbers["effective"])
    return Response(numbers["effective"], inverse, (2 + float(np.mean(decay))) * (1 + momentum) / rate, momentum, rate)


def preconditioner(who: str, optimizer: Any, state: Any, params: Any) -> Any:
    """Take P⁻¹ of `respond`, like params, also of traced arrays: its numbers are not checked, and NaN before the first step."""
    first, second = _moments(who, state, params)
    found = _probe(optimizer, first, second, state, params)
    known = jnp.array(True)
    if second:
        known = jnp.any(jnp.stack([jnp.any(a != 0) for a in jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))]))
    rates = jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(found["rate"])])
    rate = jnp.where(known, jnp.mean(rates), jnp.nan)
    return jax.tree.map(lambda e: e / rate, found["effective"])


def _moments(who: str, state: Any, params: Any) -> tuple[str, bool]:
    """Find out which moments a state holds: (name of the first or "", whether there is a second)."""
    names = sorted(set(_classes(state)))
    unknown = [name for name in names if name not in PLAIN | set(FIRST) | SECOND]
    firsts = [name for name in _classes(state) if name in FIRST]
    seconds = [name for name in _classes(state) if name in SECOND]
    if unknown or len(firsts) > 1 or len(seconds) > 1:
        got = ", ".join(unknown or names)
        raise ValueError(
            f"{who}: stability is known for SGD, momentum, Adam and RMSProp of optax, got {got}; use hessian.eigenvalues(), "
            "which needs no optimiser"
        )
    found = [optax.tree_utils.tree_get(state, "nu")] if seconds else []
    found += [optax.tree_utils.tree_get(state, FIRST[firsts[0]])] if firsts else []
    for moment in found:
        if jax.tree.structure(moment) != jax.tree.structure(params):
            raise ValueError(
                f"{who}: the moments must be trees like params, got {check.describe(moment)}; pass the optimiser as optax "
                "made it, without packing, masks or groups"
            )
        for a, p in zip(jax.tree.leaves(moment), jax.tree.leaves(params), strict=True):
            if jnp.finfo(a.dtype).eps > jnp.finfo(p.dtype).eps:  # β would be what it is rounded to: 0.898, not 0.9
                raise ValueError(
                    f"{who}: moments must have the precision of params, {p.dtype}, got {a.dtype}; pass the optimiser without "
                    f"mu_dtype, and the state's moments as {p.dtype}"
                )
    return FIRST[firsts[0]] if firsts else "", bool(seconds)


def _classes(state: Any) -> list[str]:
    if hasattr(state, "_fields"):
        name = type(state).__name__
        inner = () if name in FIRST or name in SECOND else tuple(state)
        return [name, *(found for part in inner for found in _classes(part))]
    return [found for part in state for found in _classes(part)] if isinstance(state, tuple | list) else []


def _check_precision(who: str, optimizer: Any, first: str, state: Any, params: Any) -> None:
    """Refuse an optimiser that rounds its first moment itself, whatever the precision it is given."""
    given = jax.eval_shape(_wide, (state, params))
    new = jax.eval_shape(lambda state, params: optimizer.update(params, state, params)[1], *given)
    for a, p in zip(jax.tree.leaves(optax.tree_utils.tree_get(new, first)), jax.tree.leaves(given[1]), strict=True):
        if jnp.finfo(a.dtype).eps > jnp.finfo(p.dtype).eps:
            raise ValueError(
                f"{who}: the optimiser must keep moments in the precision that it is given, got one that rounds them to "
                f"{a.dtype}; pass it without mu_dtype or accumulator_dtype"
            )


def _wide(node: Any) -> Any:
    """Cast floating arrays to float32 at least."""

    def one(a):
        a = jnp.asarray(a)
        return a.astype(tree.statistics_dtype(a.dtype)) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(one, node)


def _probe(optimizer: Any, first: str, second: bool, state: Any, params: Any) -> dict[str, Any]:
    """Read an update's linear parts in gradient, first moment and parameters, with the second moment as it stands.

    A derivative at zero is 0 · inf where a second moment is tiny: small numbers, which leave it alone, say the same.
    """
    resting = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)[0]  # in the parameters' own dtype
    state, params = _wide((state, params))
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    # Of both signs and unequal size: neither signs of gradients nor normalised ones pass for multiples of them.
    signs = treedef.unflatten(
        jax.random.rademacher(k, a.shape, a.dtype) * jnp.linspace(0.5, 2, a.size, dtype=a.dtype).reshape(a.shape)
        for k, a in zip(keys, leaves, strict=True)
    )

    def moment(state, name):
        return optax.tree_utils.tree_get(state, name)

    def put(state, **values):
        return optax.tree_utils.tree_set(state, **values)

    def decayed():
        new = optimizer.update(zeros, put(state, nu=ones), params)[1]
        return jnp.ravel(jax.tree.leaves(moment(new, "nu"))[0])[0]

    def linear(nu=None, small=None):
        ready = state if nu is None else _set_back(put(state, nu=nu))

        def update(g, m, x):
            updates, new = optimizer.update(g, put(ready, **{first: m}) if first else ready, x)
            return updates, moment(new, first) if first else zeros

        def along(*directions):
            if small is None:
                return jax.jvp(update, (zeros, zeros, zeros), directions)[1]
            given = (jax.tree.map(jnp.multiply, a, small) for a in directions)
            return tuple(jax.tree.map(jnp.divide, a, small) for a in update(*given))

        (q, c), (p, beta), (d, _) = along(ones, zeros, zeros), along(zeros, ones, zeros), along(zeros, zeros, ones)
        beta, p, c = (beta, p, c) if first else (zeros, zeros, zeros)
        effective = jax.tree.map(lambda q, p, c, b: p * c - (1 + b) * q, q, p, c, beta)
        found = {"update of gradient": q, "moment of gradient": c, "update of moment": p, "moment of moment": beta}
        found |= {"update of params": d, "effective": effective, "signs": signs}
        return found | {"update of signs": along(signs, zeros, zeros)[0]}

    if not second:
        found = linear()
        return found | {"rate": found["effective"]}
    decay = decayed()
    # The update multiplies the second moment by its decay before it uses it.
    nu = jax.tree.map(lambda a: a / decay, moment(state, "nu"))
    found = linear(nu, jax.tree.map(_small, moment(state, "nu")))
    large = linear(jax.tree.map(lambda a: jnp.full_like(a, LARGE) / decay, nu))
    larger = linear(jax.tree.map(lambda a: jnp.full_like(a, LARGE * STEP**2) / decay, nu))
    fall = jax.tree.map(lambda a, b: a / (STEP * b), large["effective"], larger["effective"])
    kept = jax.tree.map(jnp.divide, large["moment of gradient"], found["moment of gradient"])
    # Adam's first moment takes gradients as they are, and is corrected; one behind RMSProp takes what that made of them.
    own = first == "mu"
    counts = _count(state)
    correction = 1.0 if counts is None else 1 - decay**counts
    momentum = found["moment of moment"]
    early = jax.tree.map(lambda b: 1.0 if counts is None or not own else 1 - b**counts, momentum)
    rate = jax.tree.map(lambda e, b: e * jnp.sqrt(LARGE / correction) * b, large["effective"], early)
    return found | {"rate": rate, "at rest": resting, "fall": fall, "kept": kept if own else ones}


def _small(nu: jax.Array) -> jax.Array:
    """Choose numbers h whose square is lost beside nu, and is 0 where nu is 0."""
    tiny = float(jnp.finfo(nu.dtype).tiny)
    return jnp.maximum(jnp.minimum(1e-4 * jnp.sqrt(nu), 1e-12), max(1e-8 * tiny**0.5, 4 * tiny)).astype(nu.dtype)


def _is_second(node: Any) -> bool:
    return type(node).__name__ in SECOND


def _set_back(state: Any) -> Any:
    """Set the count of the second moment one back, so that the next update corrects its bias as the last one did."""

    def back(node):
        return node._replace(count=jnp.maximum(node.count - 1, 0)) if "count" in node._fields else node

    return jax.tree.map(lambda node: back(node) if _is_second(node) else node, state, is_leaf=_is_second)


def _count(state: Any) -> Any:
    nodes = [node for node in jax.tree.leaves(state, is_leaf=_is_second) if _is_second(node)]
    return nodes[0].count if "count" in nodes[0]._fields else None
