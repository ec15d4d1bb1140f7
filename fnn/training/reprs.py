"""What a state of training prints as."""

from typing import Any

import jax
import jax.numpy as jnp

from fnn import check, compiled, tree


def of_state(state: Any) -> str:
    """Write a `TrainState` in one line: its step, how much it holds of which dtypes, and the optimiser's kind of state."""
    kinds = ", ".join(dict.fromkeys(_kinds(state.opt_state))) or "no state"
    parts = {
        "step": _number(state.step),
        "params": check.contents(state.params),
        "net_state": check.contents(state.net_state),
        "opt_state": f"{kinds:.150}, {check.contents(state.opt_state)}",
        "key": check.describe(state.key),
    }
    return f"TrainState({'; '.join(f'{name} {text}' for name, text in parts.items())})"


def _kinds(state: Any) -> list[str]:
    """Name the kinds of states that an optimiser's state is made of."""
    if isinstance(state, tree.Stacked) or jax.tree_util.all_leaves([state]):
        return []
    name = type(state).__name__
    own = [name] if hasattr(state, "_fields") or hasattr(state, "__dataclass_fields__") else []
    inner = state if isinstance(state, tuple | list) else {**state}.values() if isinstance(state, dict) else ()
    inner = vars(state).values() if own and not isinstance(state, tuple) else inner
    return [kind for kind in own if kind != "EmptyState"] + [kind for part in inner for kind in _kinds(part)]


def _number(a: Any) -> str:
    """Write a whole number where it can be read, and otherwise its type."""
    if not isinstance(a, jax.Array) or compiled.traced(a):
        return check.describe(a)
    if a.is_deleted():
        return "donated"
    return str(int(a)) if not a.shape and jnp.issubdtype(a.dtype, jnp.integer) else check.describe(a)
