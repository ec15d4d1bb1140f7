"""Name the first operation of a loss or its gradient that makes a NaN or an infinity, its layer, and what causes it.

1. The loss and its gradient are one traced program. It runs once, operation by operation, and of every floating value in
   it, inside loops too, it is noted whether it holds NaN, +inf or -inf.
2. On the host `history` goes back from the bad result along bad values to those that were made of good ones.
3. Of those, the program runs again to see the ranges of their inputs, and `causes` says why.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, compiled, mapped, tree
from fnn.gradients import operations, program
from fnn.gradients.causes import GUARD, Values, bad, countable, detailed, reason, values
from fnn.gradients.history import SHAPES, History, Node, chosen
from fnn.gradients.operations import Const, Hooks, Loop, Program

NAN, PLUS, MINUS = 1, 2, 4
INFINITE = PLUS | MINUS


@dataclass(frozen=True)
class FirstBad:
    """The first operation that makes a NaN or an infinity: what `fnn.watch(loss).first_bad(params, batch)` returns.

    `print` shows the operation, its layer, the ranges of what it takes, and what usually causes it.
    """

    what: str
    """"NaN" or "infinity"."""
    operation: str
    """JAX's name of the primitive; "parameter" or "input" where the number came from outside."""
    backward: bool
    """Whether the gradient alone needs it, not the loss."""
    layer: str
    """Path of the nearest parameter that it was computed from, with its row where a loop takes one a turn; or ""."""
    where: str
    """The names of the modules and functions around it, where there are any."""
    turns: tuple[int, ...]
    """Which turn of each loop around it, from the outside in, counted as the entries of what the loop runs over."""
    lengths: tuple[int, ...]
    """Of these loops."""
    inputs: tuple[Values, ...]
    """What the operation takes: shape, range, and how many zeros, NaN and infinities."""
    cause: str
    """What made it, and what helps."""
    origin: "FirstBad | None" = None
    """For a NaN that is made of infinities: what made the infinity."""

    def __str__(self) -> str:
        if self.operation in ("parameter", "input"):
            return f"first {self.what}: {self.cause}\n  {self.inputs[0]}"
        at = f", at {self.layer}" if self.layer else ""
        lines = [f"first {self.what}: {self.operation}, {'backward' if self.backward else 'forward'}{at}"]
        lines += [f"  in {self.where}"] if self.where else []
        if self.turns:
            turns = ", ".join(f"{t} of 0 to {n - 1}" for t, n in zip(self.turns, self.lengths, strict=True))
            lines.append(f"  turn {turns}")
        lines += [f"  input {i}: {values}" for i, values in enumerate(self.inputs[:4])]
        lines.append(f"  cause: {self.cause}")
        if self.origin is not None:
            first, *rest = str(self.origin).split("\n")
            lines.append(f"  the infinity: {first.removeprefix('first infinity: ')}")
            lines += [line for line in rest if not line.startswith(("  in ", "  cause"))]
        return "\n".join(lines)


def first_bad(
    loss: Callable[..., Any], params: Any, *rest: Any, has_aux: bool = False, axis_name: Any = None
) -> FirstBad | None:
    """Find the first operation that makes a NaN or an infinity in `jax.value_and_grad(loss)(params, *rest)`; None if none does.

    Where the loss is not finite, what made it so; else what made the gradient so. A NaN is followed back to the first
    operation that made it of numbers without NaN, and the infinities that this took to the operation that made them of
    finite numbers: its `origin`. An infinity that is written in the program, as in a mask, is no cause by itself. What does
    not reach the loss or the gradient, such as the other branch of a `where`, does not count. Inside `cond`, `while`,
    `shard_map` and custom calls nothing is looked at: the operation itself is named. float16 and bfloat16 are rounded
    after every operation, which XLA may leave out in the plain step. With `axis_name` the whole batch is one shard.

    The program runs operation by operation, twice where something is bad: slower than a step, but soon compiled. XLA may
    compute a compiled step's numbers in another way, such as exp(x)^p as exp(p·x). For the host.
    Errors: TypeError for traced arrays.
    """
    if compiled.traced((params, rest)):
        raise TypeError(
            "first_bad: it decides on the host, got traced arrays; call it outside of jit, grad, vmap and scan"
        )
    check.parameters("first_bad", params)
    check.alive("first_bad", params)
    params, rest = mapped.placed((params, arrays.arguments("first_bad", rest)))
    if axis_name is not None:
        loss = _one_shard(loss, axis_name)
    with mapped.on_automatic():
        return _Search(loss, params, rest, has_aux).found()


def _one_shard(loss: Callable[..., Any], axis_name: Any) -> Callable[..., Any]:
    def whole(params, *rest):
        run = jax.vmap(loss, in_axes=None, axis_size=1, axis_name=axis_name)
        return jax.tree.map(lambda a: a[0], run(params, *rest))

    return whole


class _Search:
    """One search: the traced program, what was seen in it, and which variables depend on what."""

    def __init__(self, loss: Any, params: Any, rest: Any, has_aux: bool):
        self.names = [name.removesuffix("/value") for name in tree.paths(params)]
        self.names += [name.removesuffix("/value") for name in tree.paths(rest)]
        self.count = len(jax.tree.leaves(params))
        whole, self.values = _traced(loss, params, rest, has_aux)
        outputs = whole.outputs[:1] + (whole.outputs[-self.count :] if self.count else [])
        self.program = chosen(operations.prune(replace(whole, outputs=outputs)))
        self.history = History(self.program)
        variables = list(self.history.scopes)
        forward = History(operations.prune(replace(whole, outputs=whole.outputs[:1])))
        self.forward = set(forward.scopes)
        inputs = self.program.inputs
        self.seeded = self.history.dependent(inputs[:1])
        self.wanted = self.history.dependent(inputs[1 : 1 + self.count])
        self.alone = self.wanted - self.seeded - self.history.dependent(inputs[1 + self.count :])
        functions = {var: _coded for var in variables if self._floating(var)}
        self.codes = self._seen(functions | dict.fromkeys(self._indices(variables), jnp.ravel))
        self.history.number = self._number
        self.written: dict[int, int] = {}
        self.details: dict[int, np.ndarray] = {}

    def _indices(self, variables: Sequence[int]) -> set[int]:
        """Find the numbers by which rows are taken."""
        ops = [op for op in map(self.history.maker, variables) if op and op.name in ("gather", "dynamic_slice")]
        atoms = {op.inputs[1] for op in ops}
        return {a for a in atoms if isinstance(a, int) and math.prod(self.history.spec(a).shape) == 1}

    def _number(self, atom: Any, turns: tuple[int, ...]) -> int | None:
        if isinstance(atom, Const):
            return int(np.ravel(atom.value)[0]) if np.size(atom.value) == 1 else None
        return int(self.codes[atom][turns][0]) if atom in self.codes and not self._floating(atom) else None

    def _floating(self, var: int) -> bool:
        return bool(jnp.issubdtype(self.history.spec(var).dtype, jnp.inexact))

    def _seen(self, functions: dict[int, Any]) -> dict[int, np.ndarray]:
        """Run the program and return functions of some of its variables, stacked over the turns of loops."""

        def hook(var, function):
            def see(x):
                info = jnp.finfo(x.dtype) if self._floating(var) else None
                if info is not None and info.bits <= 16 and x.dtype in (jnp.float16, jnp.bfloat16):
                    x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
                return x, {str(var): function(x)}

            return see

        hooks: Hooks = {var: hook(var, function) for var, function in functions.items()}
        found: dict[str, Any] = {}
        # Operation by operation: as one compiled program it would take ten times a plain gradient's time to compile.
        operations.execute(replace(self.program, outputs=[]), self.values, hooks, found)
        return {int(var): np.asarray(a) for var, a in found.items()}

    def code(self, node: Node) -> int:
        """Say what a value holds: bits of NAN, PLUS and MINUS."""
        if isinstance(node.atom, Const):
            key = id(node.atom)
            if key not in self.written:
                value = jnp.asarray(node.atom.value)
                self.written[key] = int(_coded(value)) if jnp.issubdtype(value.dtype, jnp.inexact) else 0
            return self.written[key]
        known = node.atom in self.codes and self._floating(node.atom)
        return int(self.codes[node.atom][node.turns]) if known else 0

    def roots(self, starts: Sequence[Node], mask: int) -> list[Node]:
        return self.history.roots(starts, lambda node: bool(self.code(node) & mask))

    def found(self) -> FirstBad | None:
        """Look at the loss first, then at the gradients."""
        nodes = [Node(atom) for atom in self.program.outputs]
        for starts in (nodes[:1], nodes[1:]):
            if any(self.code(node) & NAN for node in starts):
                return self._nan(starts)
            if any(self.code(node) for node in starts):
                roots = self.roots(starts, INFINITE)
                return self._described(self._made(roots) or roots[0], "infinity") if roots else _constant("infinity")
        return None

    def _nan(self, starts: Sequence[Node]) -> FirstBad:
        roots = self.roots(starts, NAN)
        if not roots:
            return _constant("NaN")
        first = roots[0]
        if first.atom in self.history.inputs:
            return self._described(first, "NaN")
        behind = self.roots(list(self.history.sources(first)), INFINITE)
        made = self._made(behind)
        if made is not None and made.atom in self.history.inputs:
            # -inf in the batch is a mask; anything else there is the cause itself
            parameter = self.history.inputs[made.atom] <= self.count  # type: ignore[index]
            if parameter or self.code(made) & PLUS:
                return self._described(made, "infinity")
        self._look([first] if made is None else [first, made])
        origin = None if made is None or made == first else self._described(made, "infinity")
        named = self._described(first, "NaN")
        if origin is None:
            constant = behind and made is None and "masked" not in named.cause
            return replace(named, cause=f"{named.cause}; the infinity is written in the program") if constant else named
        cause = f"{named.cause}; the infinity comes from {origin.operation}: {origin.cause}"
        return replace(named, cause=cause, origin=origin)

    def _made(self, roots: Sequence[Node]) -> Node | None:
        """Find the first infinity that was made of finite numbers, not written in the program."""
        for node in roots:
            if node.atom in self.history.inputs or not any(self.code(s) & INFINITE for s in self.history.sources(node)):
                return node
        return None

    def _look(self, nodes: Sequence[Node]) -> None:
        """Take the ranges of what some operations take; each look is a program of its own."""
        ops = [op for op in (self.history.maker(node.atom) for node in nodes) if op is not None]
        atoms = {a for op in ops for a in op.inputs if isinstance(a, int) and a not in self.details}
        known = [a for a in atoms if countable(self.history.spec(a).dtype)]
        self.details |= self._seen(dict.fromkeys(known, detailed)) if known else {}

    def _described(self, node: Node, what: str) -> FirstBad:
        var, history = node.atom, self.history
        assert isinstance(var, int)
        if var in history.inputs:
            return self._outside(var, what)
        op = history.maker(var)
        assert op is not None
        self._look([node])
        inputs = []
        for atom in op.inputs:
            spec = history.spec(atom)
            if isinstance(atom, Const) and countable(spec.dtype):
                inputs.append(values(np.asarray(detailed(jnp.asarray(atom.value))), spec))
            elif isinstance(atom, int) and atom in self.details:
                inputs.append(values(self.details[atom][node.turns], spec))
        backward = not any(out in self.forward for out in op.outputs)
        signals = [a in self.seeded for a in op.inputs] if backward else None
        cause = reason(history, node, what, inputs or [values(np.zeros(7), history.spec(var))], signals)
        if not backward and not self.code(Node(self.program.outputs[0])):
            cause += f"; the loss does not see it (behind a `where`?), its gradient does, as 0 times that: {GUARD}"
        layer, lengths = self._layer(node), history.lengths(var)
        where = op.where if re.sub(r"transpose|jvp|vmap|[()/]", "", op.where) else ""
        return FirstBad(what, op.name, backward, layer, where, node.turns, lengths, tuple(inputs), cause)

    def _outside(self, var: int, what: str) -> FirstBad:
        """Describe a parameter or an input that is not finite itself."""
        i = self.history.inputs[var]
        spec, value = self.history.spec(var), jnp.asarray(self.values[i])
        found, name = values(np.asarray(detailed(value)), spec), self.names[i - 1]
        if i <= self.count:
            kind, text = (
                "parameter",
                f"params: {name or 'the array'} has {bad(found)}, from the start or from an earlier step's update",
            )
        else:
            kind, text = "input", f"inputs: {name} of what follows params has {bad(found)}; look at the data"
        return FirstBad(what, kind, False, name, "", (), (), (found,), text)

    def _layer(self, node: Node) -> str:
        own = self._gradient_of(node)
        if own is not None:
            name, rows = own
        else:
            near = self.history.nearest(node, self.wanted, self.seeded, self.alone)
            if near is None:
                return ""
            name, rows = self.names[self.history.inputs[near.atom] - 1], near.rows  # type: ignore[index]
        for row in rows:
            name = name.replace("[:]", f"[{row}]", 1) if "[:]" in name else f"{name}[{row}]"
        return name

    def _gradient_of(self, node: Node) -> tuple[str, tuple[int, ...]] | None:
        """Say which parameter's gradient a value is, apart from its layout and from sums."""
        follow = SHAPES | {"add_any"}
        for name, output in zip(self.names, self.program.outputs[1:], strict=False):
            waiting: list[tuple[Any, tuple[int, ...]]] = [(output, ())]
            seen = set()
            while waiting:
                atom, places = waiting.pop()
                if isinstance(atom, Const) or atom in seen:
                    continue
                seen.add(atom)
                if atom == node.atom:
                    return (name, tuple(node.turns[k] for k in places)) if atom in self.seeded else None
                op, index = self.history.scopes[atom].program.makers.get(atom, (None, 0))
                if isinstance(op, Loop):
                    more = (len(self.history.lengths(atom)),) if index >= op.carries else ()
                    waiting.append((op.body.outputs[index], (*places, *more)))
                elif op is not None and op.name in follow:
                    waiting += [(a, places) for a in op.inputs]
        return None


def _traced(loss: Any, params: Any, rest: Any, has_aux: bool) -> tuple[Program, list[Any]]:
    """Trace a loss and its gradient; the seed is an input, so that one sees what depends on it."""

    def call(params, *rest):
        with check.foreign("first_bad"):
            out = check.scalar_loss("first_bad", loss(params, *rest), has_aux)
        value, aux = out if has_aux else (out, ())
        return value, aux

    dtype = jax.eval_shape(call, params, *rest)[0].dtype

    def seeded(seed, params, rest):
        value, pull, _ = jax.vjp(lambda p: call(p, *rest), params, has_aux=True)
        return value, pull(seed)[0]

    closed, _ = program.trace(seeded, jnp.ones((), dtype), params, rest)
    return program.read(closed), [jnp.ones((), dtype), *jax.tree.leaves((params, rest))]


@jax.jit
def _coded(x: jax.Array) -> jax.Array:
    """Say in three bits whether an array holds NaN, +inf or -inf."""
    real, infinite = jnp.real(x), jnp.isinf(x)
    # Maxima, since XLA's collectives on a CPU know no `or` of integers; a batch may be sharded.
    found = (jnp.isnan(x), infinite & ~(real < 0), infinite & (real < 0))
    bits = [jnp.max(where.astype(jnp.int32), initial=0) for where in found]
    return bits[0] * NAN + bits[1] * PLUS + bits[2] * MINUS


def _constant(what: str) -> FirstBad:
    return FirstBad(what, "constant", False, "", "", (), (), (), f"{what} is written in the loss: it is a constant")
