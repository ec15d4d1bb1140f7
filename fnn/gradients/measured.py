"""Measure a loss: find its layers, differentiate it with marks, run the gradient's program exactly, label what was seen.

1. The loss is traced, and `places` finds its layers: products of data with parameters.
2. The traced loss is differentiated with marks: each layer's output passes through an identity whose derivative names the
   error signal that comes back, and statistics of the forward pass are taken where values are made.
3. The program of the gradient runs with a power of two beside every value (`exact`), so that no depth is too much for it;
   norms are taken where gradients and error signals are made, inside loops over layers too. So nothing is stored that a
   plain gradient does not store.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from fnn import check, mapped, tree
from fnn.gradients import exact, forward_range, marks, operations, places, program, reductions, wide
from fnn.gradients.labels import MARK, Options, Subject, assembled, spots
from fnn.gradients.operations import Atom, Hook, Hooks, Loop, Program, Remat
from fnn.gradients.places import Found


def searched(loss: Callable[..., Any], options: Options, params: Any, rest: Any) -> Subject:
    """Trace the loss and find its layers, those alone that are wanted."""

    def call(params, *rest):
        with check.foreign("watch"):
            out = loss(params, *rest)
        return out if options.has_aux else (out, ())

    names = [name.removesuffix("/value") for name in tree.paths(params)]
    closed, specs = program.trace(call, params, *rest)
    forward = program.read(closed, forward=True)
    found = places.find(forward, len(names))
    every, found.places = found.places, [p for p in found.places if options.wants(names[p.parameter])]
    depths = jax.tree.leaves(tree.map_depth(lambda k, _: k, params))
    axes = [_axes(found, i, leaf, k) for i, (leaf, k) in enumerate(zip(jax.tree.leaves(params), depths, strict=True))]
    return Subject(forward, specs, found, names, axes, every)


def measured(loss: Any, options: Options, grads: bool, size: int, params: Any, rest: Any) -> Any:
    """Do the device's part of `watch`; what is static comes first, one argument each.

    Returns a `Flow` and its `Ranges`; with `grads` what `jax.value_and_grad` returns, and the flow.
    """
    params = mapped.varying(params, options.axis_name, like=rest)
    traced = _traced(loss, options, params, rest, None)
    return _executed(traced, options, grads, size, params, rest)


def in_float64(loss: Any, options: Options, size: int, was_wide: bool, params: Any, rest: Any) -> tuple[Any, Any, Any]:
    """Do `measured` for the same program in float64, which must be switched on around it: the same draws, a larger range.

    Params and batch come as they are; `was_wide` says whether x64 was on when they did. Returns the flow, its ranges, and
    whether the platform has float64's range. Errors: operations.Unreadable.
    """
    special: dict[str, Any] = {}
    specs = jax.tree.map(_spec_of, (params, rest))
    with jax.enable_x64(was_wide):
        traced = _traced(loss, options, specs[0], specs[1], special)
    narrow = program.read(traced.closed, keep=frozenset(special))
    params, rest = jax.tree.map(lambda a: wide.up(a) if jnp.issubdtype(a.dtype, jnp.inexact) else a, (params, rest))
    one = jnp.ones((), jnp.float64)

    def run(seed, *leaves):
        outputs = wide.spread(narrow, [seed, *leaves], special)
        return jax.tree.unflatten(jax.tree.structure(traced.specs), outputs)

    closed, specs = program.trace(run, one, *jax.tree.leaves((params, rest)))
    flow, ranges = _executed(replace(traced, closed=closed, specs=specs), options, False, size, params, rest)
    return flow, ranges, wide.holds(flow.loss)


@dataclass(frozen=True)
class _Traced:
    """The program of (loss, aux, what was seen) and gradients, of (seed, params, rest)."""

    subject: Subject
    closed: Any
    specs: Any
    dtypes: dict[int, Any]
    """Of the values whose range is watched, by variable."""


def _spec_of(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _traced(loss: Any, options: Options, params: Any, rest: Any, special: dict[str, Any] | None) -> _Traced:
    """Trace the loss with marks and statistics, and its gradient; statistics also go, by name, into `special`, if any."""
    subject = searched(loss, options, params, rest)
    dtypes: dict[int, Any] = {}
    hooks = marks.statistics(options, subject, dtypes, special)

    def marked(params, rest):
        seen: dict[str, Any] = {}
        value, *aux = operations.execute(subject.forward, jax.tree.leaves((params, rest)), hooks, seen)
        return value, (aux, seen)

    def seeded(seed, params, rest):
        value, pull, more = jax.vjp(lambda p: marked(p, rest), params, has_aux=True)
        return (value, more), pull(mapped.varying(seed.astype(value.dtype), like=value))[0]

    one = jax.ShapeDtypeStruct((), subject.value[0].dtype)
    closed, specs = program.trace(seeded, one, params, rest)
    return _Traced(subject, closed, specs, dtypes)


def _executed(traced: _Traced, options: Options, grads: bool, size: int, params: Any, rest: Any) -> Any:
    subject, specs = traced.subject, traced.specs
    count, dtype = len(subject.names), specs[0][0].dtype
    backward = program.read(traced.closed)
    wanted = [i for i in range(count) if options.wants(subject.names[i])]
    noted: Hooks = {}
    for variable, name in _marked(backward):
        noted[variable] = functools.partial(_error, name, options.axis_name)
    asked = "gradient" in options.groups
    inside = asked and options.axis_name is None
    outputs = backward.outputs[-count:] if count else []
    for i in wanted if inside else []:
        variable, below = _seat(backward, outputs[i], subject.axes[i])
        if isinstance(variable, int):
            name, axes = f"gradient.{i}", subject.axes[i] - below
            noted[variable] = marks.both(noted.get(variable), functools.partial(_norm, name, axes))
    full = grads or asked != inside or "cosine" in options.groups
    kept = backward.outputs if full else backward.outputs[:-count]
    backward = operations.prune(replace(backward, outputs=kept), frozenset(noted))
    values = jax.tree.leaves((params, rest))
    if options.exact:
        run = exact.run({variable: functools.partial(_note, hook, variable) for variable, hook in noted.items()})
        results, seen = run.execute(backward, [exact.seed(dtype), *values]), run.noted
    else:
        seen: dict[str, Any] = {}
        seed = mapped.varying(jnp.ones((), dtype), like=specs[0][0])
        results = operations.execute(backward, [seed, *values], noted, seen)
    first, gradients = (results[:-count], results[-count:]) if full and count else (results, [])
    value, (aux, statistics) = jax.tree.unflatten(jax.tree.structure(specs[0]), first)
    seen = seen | statistics
    if options.axis_name is not None:  # each lane has seen its share of the batch
        value = mapped.mean(value, options.axis_name)
        gradients = [reductions.mean_of(g, options.axis_name) for g in gradients]
    if asked != inside:
        for i in wanted:
            seen |= _norm(f"gradient.{i}", subject.axes[i], gradients[i])[1]
    if "cosine" in options.groups:
        for i in wanted:
            seen |= _alignment(str(i), subject.axes[i], gradients[i], jax.tree.leaves(params)[i])
    dtypes = dict.fromkeys(traced.dtypes, jnp.dtype(dtype)) if dtype == jnp.float64 else traced.dtypes
    orders = {v: forward_range.taken(v, seen) for v in dtypes}
    seen |= forward_range.lost(orders, dtypes, value)
    flow = assembled(options, subject, wanted, size, seen, params, value)
    if not grads:
        known = list(spots(subject, dtypes))
        return flow, forward_range.Ranges([orders[v] for v, _ in known], seen["lost"], tuple(s for _, s in known))
    leaves = [reductions.rounded(g).astype(p.dtype) for g, p in zip(gradients, jax.tree.leaves(params), strict=True)]
    gradient = jax.tree.unflatten(jax.tree.structure(params), leaves)
    aux = jax.tree.unflatten(jax.tree.structure(subject.value[1]), aux)
    return ((value, aux) if options.has_aux else value, gradient), flow


# Backward --------------------------------------------------------------------------------------------------------------


def _marked(part: Program) -> Iterator[tuple[int, str]]:
    """Find the named error signals of a program, inside its loops too."""
    for op in part.ops:
        name = op.params.get("name", "") if op.name == "name" else ""
        if name.startswith(MARK):
            yield op.outputs[0], name
        elif isinstance(op, Loop | Remat):
            yield from _marked(op.body)


def _note(hook: Hook, variable: int, known: Any) -> dict[str, Any]:
    return hook(known[variable])[1]


def _error(name: str, axis_name: Any, d: Any) -> tuple[Any, dict[str, Any]]:
    m, e = reductions.norm(d)
    if axis_name is not None:
        m, e = reductions.root_mean((m, e), axis_name)
    return d, {name: (m, e)}


def _norm(name: str, axes: int, g: Any) -> tuple[Any, dict[str, Any]]:
    return g, {name: reductions.norm(g, axes)}


def _alignment(name: str, axes: int, g: Any, w: jax.Array) -> dict[str, Any]:
    """Take cosine and ratio of norms of a gradient and its array, by layer."""
    (gm, ge), (wm, we) = reductions.norm(g, axes), reductions.norm(w, axes)
    dm, de = reductions.dot(g, w, axes)
    scale = jnp.exp2((de - ge - we).astype(dm.dtype))
    return {f"cosine.{name}": dm * scale / (gm * wm), f"ratio.{name}": (gm / wm, ge - we)}


def _seat(part: Program, atom: Atom, axes: int) -> tuple[Atom, int]:
    """Follow a gradient into the loops over layers that stack it: (its name there, how many loops)."""
    below = 0
    while isinstance(atom, int):
        op, index = part.makers.get(atom, (None, 0))
        if op is not None and op.name == "convert_element_type":
            if not jnp.issubdtype(part.spec(op.inputs[0]).dtype, jnp.floating):
                break  # the real part of a complex gradient, which is another number
            atom = op.inputs[0]
        elif isinstance(op, Loop) and index >= op.carries and below < axes and isinstance(op.body.outputs[index], int):
            part, atom, below = op.body, op.body.outputs[index], below + 1
        else:
            break
    return atom, below


def _axes(found: Found, i: int, leaf: jax.Array, depth: int) -> int:
    """Count the leading axes of a parameter that count layers."""
    use = found.uses.get(i)
    if depth or use is None:
        return depth
    loops = [turn for turn in use.turns if turn.depth]
    if use.axes or not leaf.ndim:
        return use.axes
    by_index = bool(loops) and leaf.ndim > 1 and leaf.shape[0] == loops[0].length
    by_rows = leaf.ndim > 1 and set(use.rows) == {(row,) for row in range(leaf.shape[0])}
    return int(by_index or by_rows)


def explained(loss: Callable[..., Any], options: Options, params: Any, rest: Any) -> str:
    """Say what was recognised: a line for each layer in forward order, then what was not."""
    subject = searched(loss, options, params, rest)
    found, lines = subject.found, []
    for place in found.places:
        loops = "".join(f", {turn.length} {'layers' if turn.depth else 'steps'}" for turn in place.turns)
        shapes = " -> ".join(
            check.describe(marks.made(subject.forward, place, v)) for v in (place.input, place.product) if v is not None
        )
        where = f" in {place.op.where}" if place.op.where else ""
        lines.append(f"{subject.names[place.parameter]}: {place.op.name} {shapes}{loops}{where}")
    used = {place.parameter for place in found.places}
    alone = [n for i, n in enumerate(subject.names) if i not in used and options.wants(n)]
    if alone:
        lines.append("gradients alone, no product with data: " + ", ".join(alone))
    if found.softmaxes:
        lines.append(f"softmaxes of attention: {len(found.softmaxes)}")
    for text, parameters in found.unread:
        lines.append(f"not looked into: {text}, which takes {', '.join(subject.names[i] for i in parameters)}")
    return "\n".join(lines)
