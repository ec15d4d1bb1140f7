"""What each operation does to arrays with exponents, part two: those that move, pick, repeat and add up entries.

Where the leading axes of an array have exponents of their own, so that layers of one array stay apart, a rule says which
leading axes of the result do; where it cannot, the exponents are merged into one.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import mapped
from fnn.gradients.execution import Rule, Run
from fnn.gradients.operations import Op
from fnn.gradients.powers import LOWEST, Scaled, is_float, merged, opaque, place, reach, rows, scaled, shift, tidy
from fnn.gradients.rules import call, together

Lead = Callable[[Op, Scaled], jax.Array | None]
"""The exponents of the result; None where leading axes cannot keep theirs."""


def _linear(lead: Lead | None = None, *, picks: bool = False, adds: bool = False) -> Rule:
    """A linear operation on its first argument, which may pick entries (the largest need not be among them) or add them."""

    def rule(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
        x, *others = inputs
        if not isinstance(x, Scaled) or any(isinstance(other, Scaled) for other in others):
            return run.undone(op, inputs)
        exponent = x.exponent
        if exponent.ndim and (lead is None or (exponent := lead(op, x)) is None):
            x = merged(x, apart=not adds)
            exponent = x.exponent
        slack = x.slack + 8 if adds else max(x.slack, reach(x.value.dtype)) if picks else x.slack
        return call(op, [x.value, *others], exponent, slack)

    return rule


def _same(op: Op, x: Scaled) -> jax.Array:
    return x.exponent


def _repeated(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    (out,) = _linear(_broadcast)(run, op, inputs)
    return [replace(out, value=opaque(out.value)) if inputs[0].value.size == 1 else out]


def _broadcast(op: Op, x: Scaled) -> jax.Array | None:
    k, dims, shape = x.exponent.ndim, op["broadcast_dimensions"], op["shape"]
    return jnp.broadcast_to(x.exponent, shape[:k]) if tuple(dims[:k]) == tuple(range(k)) else None


def _reshape(op: Op, x: Scaled) -> jax.Array | None:
    new, count = op["new_sizes"], x.exponent.size
    if op.params.get("dimensions") is not None:
        return None
    if tuple(new[: x.exponent.ndim]) == x.exponent.shape:
        return x.exponent
    if count == 1:
        return x.exponent.reshape(())
    # So many new leading axes that each of their entries lies within one of the old.
    for axes in range(1, len(new) + 1):
        each, rest = divmod(math.prod(new[:axes]), max(count, 1))
        if each and not rest:
            return jnp.broadcast_to(x.exponent.reshape(count, 1), (count, each)).reshape(new[:axes])
    return None


def _squeeze(op: Op, x: Scaled) -> jax.Array:
    dims = {d % x.value.ndim for d in op["dimensions"]}
    return x.exponent.reshape([n for i, n in enumerate(x.exponent.shape) if i not in dims])


def _transpose(op: Op, x: Scaled) -> jax.Array | None:
    k, order = x.exponent.ndim, op["permutation"]
    return x.exponent.transpose(order[:k]) if set(order[:k]) == set(range(k)) else None


def _reduced(op: Op, x: Scaled) -> jax.Array | None:
    axes = op.params.get("axes")
    return x.exponent if axes is not None and all(axis >= x.exponent.ndim for axis in axes) else None


def _along(op: Op, x: Scaled) -> jax.Array | None:
    return x.exponent if op["axis"] >= x.exponent.ndim else None


def _slice(op: Op, x: Scaled) -> jax.Array:
    k = x.exponent.ndim
    start, limit, strides = op["start_indices"], op["limit_indices"], op["strides"]
    return jax.lax.slice(x.exponent, start[:k], limit[:k], None if strides is None else strides[:k])


def _reversed(op: Op, x: Scaled) -> jax.Array:
    return jax.lax.rev(x.exponent, [d for d in op["dimensions"] if d < x.exponent.ndim])


def _dynamic_slice(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    x, *starts = inputs
    k, sizes = x.exponent.ndim, op["slice_sizes"]
    exponent = jax.lax.dynamic_slice(x.exponent, starts[:k], sizes[:k]) if k else x.exponent
    whole = k and tuple(sizes[k:]) == x.value.shape[k:]
    return call(op, [x.value, *starts], exponent, x.slack if whole else max(x.slack, reach(x.value.dtype)))


def _padded(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """The new rows are zero, with the lowest exponent."""
    (x, fill), config = inputs, op["padding_config"]
    if not isinstance(x, Scaled) or run.about(fill).number != 0:
        return run.undone(op, inputs)
    exponent, slack = x.exponent, x.slack
    if any(low < 0 or high < 0 for low, high, _ in config):
        slack = max(slack, reach(x.value.dtype))
    if k := max(x.exponent.ndim, int(any(config[0])) if config else 0):
        x = rows(run.tidy(x), k)
        exponent = jax.lax.pad(x.exponent, jnp.int32(LOWEST), [(int(a), int(b), int(c)) for a, b, c in config[:k]])
        slack = max(x.slack, slack)
    return call(op, [x.value, fill], exponent, slack)


def _updated(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """dynamic_update_slice: each entry of the first axis has an exponent, so that layers of one array stay apart."""
    old, new, *starts = inputs
    if not np.ndim(getattr(old, "value", old)):
        return together(run, op, inputs)
    old, new = tidy(rows(old, 1)), tidy(rows(new, 1))
    there = jax.lax.dynamic_slice(old.exponent, starts[:1], new.exponent.shape)
    whole = new.value.shape[1:] == old.value.shape[1:]
    most = new.exponent if whole else jnp.maximum(there, new.exponent)
    exponent = jax.lax.dynamic_update_slice(old.exponent, most, starts[:1])
    if not whole:
        old, new = (
            Scaled(shift(old.value, old.exponent - exponent), exponent),
            Scaled(shift(new.value, new.exponent - most), most),
        )
    return call(op, [old.value, new.value, *starts], exponent, 0.0 if whole else reach(old.value.dtype))


def _row_places(numbers: Any, lead: int, rank: int) -> bool:
    """Whether a gather or scatter moves whole entries of the first axis."""
    given = {name: tuple(getattr(numbers, name, ())) for name in dir(numbers) if name.endswith(("dims", "map"))}
    return (
        given.get("scatter_dims_to_operand_dims", given.get("start_index_map")) == (0,)
        and given.get("inserted_window_dims", given.get("collapsed_slice_dims")) == (0,)
        and given.get("update_window_dims", given.get("offset_dims")) == tuple(range(lead, rank))
        and not any(dims for name, dims in given.items() if "batching" in name)
    )


def _scattered(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """scatter-add into entries of the first axis: each has an exponent, as in `_updated`."""
    old, places, new = inputs
    lead, shape = places.ndim - 1, np.shape(getattr(new, "value", new))
    if not _row_places(op["dimension_numbers"], lead, len(shape)):
        return together(run, op, inputs)
    old, new, index = tidy(rows(old, 1)), tidy(rows(new, lead)), places[..., 0]
    # Places outside of the array add nothing, nor may they wrap around.
    most = old.exponent.at[jnp.where(index < 0, old.value.shape[0], index)].max(new.exponent, mode="drop")
    there = most.at[index].get(mode="clip")
    values = [shift(old.value, old.exponent - most), places, shift(new.value, jnp.minimum(new.exponent - there, 0))]
    return call(op, values, most, 8.0)


def _gathered(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    x, places = inputs
    if isinstance(x, Scaled) and not isinstance(places, Scaled) and x.exponent.ndim == 1:
        lead, sizes = places.ndim - 1, op["slice_sizes"]
        rank = lead + x.value.ndim - 1
        if _row_places(op["dimension_numbers"], lead, rank) and tuple(sizes[1:]) == x.value.shape[1:]:
            exponent = x.exponent.at[places[..., 0]].get(mode="clip")
            return call(op, [x.value, places], exponent, x.slack)
    return _linear(picks=True)(run, op, inputs)


def _pieces(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """split and unstack."""
    (x,), axis = inputs, op["axis"]
    if axis == 0:
        x = rows(x, max(1, x.exponent.ndim))
    elif axis >= x.exponent.ndim:
        return call(op, [x.value], x.exponent, max(x.slack, reach(x.value.dtype)))
    parts = jnp.split(x.exponent, np.cumsum(op["sizes"])[:-1], axis) if op.name == "split" else None
    parts = parts or [jax.lax.index_in_dim(x.exponent, i, axis, keepdims=False) for i in range(x.value.shape[axis])]
    return [Scaled(value, part, x.slack) for value, part in zip(op.call(x.value), parts, strict=True)]


def _concatenate(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Along the first axis each entry gets an exponent of its own: so blocks written out and stacked stay apart."""
    if op.params.get("dimension", op.params.get("axis")) != 0:
        return together(run, op, inputs)
    stack = op.name == "stack"
    parts = [rows(run.tidy(scaled(x)), 0 if stack else 1) for x in inputs]
    exponents = jnp.concatenate([x.exponent[None] if stack else x.exponent for x in parts])
    return [Scaled(op.call(*(x.value for x in parts))[0], exponents, max(x.slack for x in parts))]


def _joined(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Rows side by side, with rows of zeros between."""
    parts = [rows(run.tidy(scaled(x)), 1) for x in inputs]
    exponents = [jnp.full(gap, LOWEST, jnp.int32) for gap in op["gaps"]]
    for i, x in enumerate(parts):
        exponents.insert(2 * i + 1, x.exponent)
    slack = max(x.slack for x in parts)
    return call(op, [x.value for x in parts], jnp.concatenate(exponents), slack)


def _sorted(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Every operand keeps one exponent of its own: a sort sees only the order."""
    inputs = [merged(x) if isinstance(x, Scaled) else x for x in inputs]
    outputs = op.call(*(x.value if isinstance(x, Scaled) else x for x in inputs))
    pairs = zip(outputs, [*inputs, *[None] * (len(outputs) - len(inputs))], strict=True)
    return [Scaled(y, x.exponent, max(x.slack, reach(y.dtype))) if isinstance(x, Scaled) else y for y, x in pairs]


def _converted(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """The largest entry goes to its place in the new dtype, which may be narrow."""
    x, new = run.tidy(inputs[0]), op["new_dtype"]
    if not jnp.issubdtype(new, jnp.inexact):
        return run.undone(op, inputs)
    by = jnp.full_like(x.exponent, place(new) - place(x.value.dtype))
    if place(new) > place(x.value.dtype):
        return [Scaled(shift(op.call(x.value)[0], by), x.exponent - by)]
    value = x.value if place(new) == place(x.value.dtype) else shift(x.value, by)
    return [Scaled(op.call(value)[0], x.exponent - by)]


def _rounded(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    if op["exponent_bits"] < 8:  # it cuts the range, too
        return run.undone(op, inputs)
    return _linear(_same)(run, op, inputs)


def _collective(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Sums and exchanges over mapped axes: all devices take the largest exponent among them."""
    axes = op.params.get("axes", op.params.get("axis_name"))
    keep = op.name in ("psum", "psum_invariant", "pmax", "pmin", "ppermute")
    parts = [run.tidy(scaled(x)) if is_float(x) else x for x in inputs]
    parts = [x if keep or not isinstance(x, Scaled) else merged(x) for x in parts]
    tops: list[Any] = [_highest(x.exponent, axes) if isinstance(x, Scaled) else None for x in parts]
    values = [
        shift(x.value, x.exponent - top) if isinstance(x, Scaled) else x for x, top in zip(parts, tops, strict=True)
    ]
    outputs = op.call(*values)
    return [y if top is None else Scaled(y, top, reach(y.dtype)) for y, top in zip(outputs, tops, strict=True)]


def _highest(exponent: jax.Array, axes: Any) -> jax.Array:
    return mapped.reduce(jax.lax.pmax, mapped.varying(exponent, axes), axes)


def _all_gather(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Along the first axis every device's rows bring their exponents."""
    (x,), tiled, axes = inputs, op["tiled"], op["axis_name"]
    if op["all_gather_dimension"] or op.params.get("axis_index_groups"):
        return _collective(run, op, inputs)
    x = rows(x, max(x.exponent.ndim, int(tiled)))
    exponent = jax.lax.all_gather(mapped.varying(x.exponent, axes), axes, axis=0, tiled=tiled)
    return call(op, [x.value], exponent, x.slack)


def _reduce_scatter(run: Run, op: Op, inputs: list[Any]) -> list[Any]:
    """Along the first axis, which is cut into rows, these keep their exponents."""
    (x,), axes = inputs, op["axis_name"]
    if op["scatter_dimension"] or not op["tiled"] or op.params.get("axis_index_groups"):
        return _collective(run, op, inputs)
    x = run.tidy(rows(merged(x, 1), 1))
    top = _highest(x.exponent, axes)
    (out,) = op.call(shift(x.value, x.exponent - top))
    mine = jax.lax.dynamic_slice_in_dim(top, mapped.index(axes) * out.shape[0], out.shape[0])
    return [Scaled(out, mine, reach(out.dtype))]


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("neg", "copy", "copy_p", "name", "abs", "conj", "sharding_constraint", "reshard"), _linear(_same)),
    **dict.fromkeys(("real", "imag"), _linear(_same, picks=True)),
    **dict.fromkeys(("reduce_max", "reduce_min"), _linear(_reduced, picks=True)),
    **dict.fromkeys(("cummax", "cummin"), _linear(_along, picks=True)),
    **dict.fromkeys(("argmax", "argmin"), _linear(_reduced)),
    **dict.fromkeys(("reduce_window_sum", "select_and_scatter_add", "fft"), _linear(adds=True)),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "top_k", "select_and_gather_add"), _linear(picks=True)),
    **dict.fromkeys(("split", "unstack"), _pieces),
    **dict.fromkeys(("concatenate", "stack"), _concatenate),
    **dict.fromkeys(("scatter-add", "scatter_add", "scatter-sub"), _scattered),
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_to_all"), _collective),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), _all_gather),
    "broadcast_in_dim": _repeated,
    "convert_element_type": _converted,
    "cumsum": _linear(_along, adds=True),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _updated,
    "expand_dims": _linear(),
    "gather": _gathered,
    "join_rows": _joined,
    "pad": _padded,
    "reduce_precision": _rounded,
    "reduce_scatter": _reduce_scatter,
    "reduce_sum": _linear(_reduced, adds=True),
    "reshape": _linear(_reshape),
    "rev": _linear(_reversed),
    "scatter": together,
    "slice": _linear(_slice, picks=True),
    "sort": _sorted,
    "squeeze": _linear(_squeeze),
    "tile": _linear(),
    "transpose": _linear(_transpose),
}
