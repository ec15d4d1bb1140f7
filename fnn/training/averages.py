"""Optimisers that keep other parameters to evaluate at: `averaged`, `lookahead`, optax's schedule-free ones; `eval_params`."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fnn import check, tree
from fnn.training.blocks import Blocks
from fnn.training.chosen import filled, hidden
from fnn.tree import PyTree, Stacked
from fnn.vectors import pack, unpack


class AveragedState(NamedTuple):
    """State of `averaged`: that of the optimiser, the running mean of the parameters, the weight of it."""

    inner: PyTree
    mean: PyTree
    weight: jax.Array


class SlowState(NamedTuple):
    """State of `lookahead`: that of the fast optimiser, the slow parameters, the steps since both were equal."""

    fast: PyTree
    slow: PyTree
    steps: jax.Array


def averaged(transformation: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """Keep m <- decay m + (1 - decay) params of the parameters after each step; training itself is unchanged.

    `eval_params` returns m/(1 - decay^steps), in the parameters' dtype: after one step the parameters themselves. Make it
    the outermost, or put it inside of `MultiSteps`, so that it sees the updates that are applied. Running statistics
    (batch norm) stay those of the parameters that are trained.
    """
    check.fraction("optimizers.averaged", decay=decay)
    inner = optax.with_extra_args_support(transformation)

    def init(params):
        mean = jax.tree.map(lambda a: jnp.zeros(a.shape, tree.statistics_dtype(a.dtype)), params)
        return AveragedState(inner.init(params), mean, jnp.zeros((), jnp.float32))

    def update(updates, state, params: Any = None, **extra):
        updates, own = inner.update(updates, state.inner, params, **extra)
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda m, a: decay * m + (1 - decay) * a.astype(m.dtype), state.mean, new)
        return updates, AveragedState(own, mean, decay * state.weight + (1 - decay))

    return optax.GradientTransformationExtraArgs(init, update)


def lookahead(
    transformation: optax.GradientTransformation, sync_period: int, slow_step_size: float, reset_state: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Every `sync_period` steps slow <- slow + slow_step_size (params - slow), params <- slow; else let params run ahead.

    The same as `optax.lookahead`, which needs both as one tree of parameters; here the slow ones are in the state, and
    `eval_params` returns them. `reset_state` starts the fast optimiser anew each time. Make it the outermost.
    Source: Zhang et al. 2019, algorithm 1.
    """
    check.positive("optimizers.lookahead", sync_period=sync_period)
    inner = optax.with_extra_args_support(transformation)

    def init(params):
        return SlowState(inner.init(params), params, jnp.zeros((), jnp.int32))

    def update(updates, state, params: Any = None, **extra):
        updates, fast = inner.update(updates, state.fast, params, **extra)
        sync = state.steps == sync_period - 1
        ahead = jax.tree.map(lambda a, u, s: a + u - s, params, updates, state.slow)
        slow = jax.tree.map(lambda s, d: jnp.where(sync, s + slow_step_size * d, s), state.slow, ahead)
        updates = jax.tree.map(lambda u, d: jnp.where(sync, u - (1 - slow_step_size) * d, u), updates, ahead)
        if reset_state:
            fast = jax.tree.map(lambda a, b: jnp.where(sync, a, b), inner.init(params), fast)
        return updates, SlowState(fast, slow, (state.steps + 1) % sync_period)

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(state: PyTree) -> PyTree:
    """Return the parameters of a `TrainState` to evaluate at: those that its optimiser keeps besides the trained ones.

    For `averaged`, `lookahead` and `optax.contrib.schedule_free`, anywhere in the optimiser, inside of `packed` too; the
    outermost counts, and parameters that it does not see stay as they are. `evaluate` takes
    `(fnn.optimizers.eval_params(state), state.net_state)`, and `fit(..., evaluate_with=fnn.optimizers.eval_params)`
    validates at them.
    Errors: ValueError if the optimiser keeps none, or keeps them in another form than params (`optax.flatten`).
    """
    found = _every(state.opt_state)
    if not found:
        raise ValueError(
            "optimizers.eval_params: the optimiser must keep parameters to evaluate at, got one that keeps none; use "
            "state.params, or train with optimizers.averaged(optimizer, decay)"
        )
    params = state.params
    for node in found:
        # Copied, or a step could not donate a state that holds them twice.
        kept = (
            jax.tree.map(jnp.copy, node.slow)
            if isinstance(node, SlowState)
            else node.mean
            if isinstance(node, AveragedState)
            else node.z
        )
        kept = _unpacked(_as_params(kept), params)
        try:
            own = jax.tree.map(lambda k, a: k if hidden(k) else a, kept, params, is_leaf=hidden)
            if isinstance(node, AveragedState):
                begun, weight = node.weight > 0, jnp.where(node.weight > 0, node.weight, 1)
                mean = functools.partial(_mean, begun, weight)
                kept = jax.tree.map(mean, kept, own)
            elif not isinstance(node, SlowState):
                kept = optax.contrib.schedule_free_eval_params(node._replace(z=kept), own)
            params = filled(kept, params)
        except (TypeError, ValueError) as error:
            if _in_blocks(kept):
                raise ValueError(
                    "optimizers.eval_params: the optimiser must keep whole stacks, got one that keeps some blocks of repeat "
                    "alone; use serial, or choose the same arrays of all blocks"
                ) from error
            raise ValueError(
                "optimizers.eval_params: the optimiser must keep a tree like params, got one that keeps "
                f"{check.describe(kept)}; put averaged or lookahead around what changes the form of the parameters"
            ) from error
    return params


def check_evaluated(who: str, opt_state: Any, instead: str) -> None:
    """Warn where an optimiser keeps parameters to evaluate at, and nothing says whether they are wanted."""
    if _every(opt_state):
        warnings.warn(
            f"{who}: the optimiser keeps other parameters to evaluate at than those that it trains, which are used here; "
            f"pass {instead}",
            stacklevel=3,
        )


def check_whole(who: str, opt_state: Any, params: Any) -> None:
    """Refuse to join arrays of some parameters alone where `eval_params` will have to tell which they were."""
    if _every(opt_state) and any(map(hidden, jax.tree.leaves(params, is_leaf=hidden))):
        raise ValueError(
            f"{who}: an optimiser that keeps other parameters to evaluate at must see all of them, got some alone (freeze, "
            "masked, partition), whose joined arrays eval_params cannot tell apart; put averaged or lookahead around "
            "packed, or leave out packed"
        )


def _unpacked(kept: Any, params: Any) -> Any:
    """Give what an optimiser inside of `packed` keeps the form of params; anything else stays as it is."""
    leaves, treedef = jax.tree.flatten(params)
    joined = jax.eval_shape(pack, leaves)
    alike = jax.tree.structure(kept) == jax.tree.structure(joined)
    # Params that are a list of these shapes themselves come back as they are.
    if alike and all(jnp.shape(a) == b.shape for a, b in zip(kept, joined, strict=True)):
        return treedef.unflatten(unpack(kept, leaves))
    return kept


def _in_blocks(kept: Any) -> bool:
    def known(node):
        return isinstance(node, Blocks | Stacked)

    return any(map(known, jax.tree.leaves(kept, is_leaf=known)))


def _mean(begun: Any, weight: Any, m: Any, a: Any) -> jax.Array:
    return jnp.where(begun, m / weight, a).astype(a.dtype)


def _every(opt_state: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_known) if _known(node)]


def _known(node: Any) -> bool:
    return isinstance(node, AveragedState | SlowState | optax.contrib.ScheduleFreeState)


def _as_params(kept: Any) -> Any:
    """Leave out the depths that a state's stacks without arrays carry: parameters carry none."""

    def one(node):
        return Stacked(_as_params(node.blocks)) if isinstance(node, Stacked) else node

    return jax.tree.map(one, kept, is_leaf=lambda node: isinstance(node, Stacked) or hidden(node))
