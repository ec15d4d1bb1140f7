"""Run a function of trees with `Stacked` nodes as if every block had arrays of its own, at the cost of one block.

An optimiser is a function from trees to trees that does not know `repeat`. It sees n small arrays from
`serial(*[block] * n)` and one array with a leading axis from `repeat(block, n)`. So an optimiser that looks at shapes,
paths or single arrays (a mask `ndim > 1`, LAMB's norms, Muon's products) would treat the two differently.
`lifted(f)(*args)` calls f on the first form:

1. f is traced on stand-ins in which each stack is a tuple of two of its blocks, and once more of three.
2. The program is read: does every block go through the same operations, and do blocks meet only in sums (products,
   maxima, ...) over all of them? Do both programs agree, so that nothing depends on how many blocks there are?
3. If so, the operations of the first block run under `vmap` over the stack, and sums over blocks become sums over its
   leading axis: one small program at any depth.
4. If f asks which block is which (its place in a path, or in the list of all arrays), it is traced on all blocks. If
   they differ, it runs written out, block by block, which is always right.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn.training.alike import Names, Reading, Unlike, Value
from fnn.training.blocks import Blocks, specs, split
from fnn.tree import Stacked

MANY = 64
"""Above this depth, a function that must be traced or run block by block gets a warning."""
FEW = 16
"""The same for one that takes the loss again: each time all blocks meet."""


class Again(Unlike):
    """The function takes the loss again, which needs all blocks at once."""

    def __init__(self):
        super().__init__("it takes the loss again")


def lifted(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make `f(*args)` see each block of every `Stacked` node as arrays of its own; trees in, trees out.

    Nodes of the result in which all blocks look alike come back as `Stacked`, others as `Blocks`, which the next call
    takes. Values are those of f on the written-out trees, to rounding.
    """

    def call(*args: Any) -> Any:
        level = _level(args)
        if level is None:
            return f(*args)
        nodes, treedef = jax.tree.flatten(args, is_leaf=_is_stack)
        deepest = max(_depth(node) for node in nodes if isinstance(node, Stacked))
        inner = lifted(f)  # for stacks inside of stacks
        reason, most = "its state differs from block to block", MANY
        if not any(isinstance(node, Blocks) for node in split(args, level)[0]):
            try:
                return _as_one(inner, nodes, treedef, level)
            except Unlike as error:
                reason, most = str(error), FEW if isinstance(error, Again) else MANY
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                reason = "it does not work on some of them alone"  # if not on all either, it says so itself
        if deepest > most:
            instead = "one that treats all blocks alike"
            if most == FEW:
                instead = "fnn.optimizers.stacked(...), if it treats all numbers alike"
            warnings.warn(
                f"per_depth: the optimiser runs block by block on {deepest} blocks, since {reason}: right, but slow to "
                f"compile; use {instead}",
                stacklevel=2,
            )
        shown = [
            Blocks([node[i] for i in range(_depth(node))]) if isinstance(node, Stacked) else node for node in nodes
        ]
        return _restacked(inner(*treedef.unflatten(shown)), level)

    return call


def _as_one(f: Callable[..., Any], nodes: list[Any], treedef: Any, level: int) -> Any:
    """Run the first block's part of f under `vmap`; see the module's text. Errors: Unlike."""
    table, depth = Names(), max(_depth(node) for node in nodes if isinstance(node, Stacked))
    first = _stood_in(f, nodes, treedef, 2, table)
    if first.order_read and depth > 2:
        if depth > MANY:
            warnings.warn(
                f"per_depth: the optimiser asks which of {depth} blocks is which, so that each is looked at: right, but "
                "slow to compile; choose parameters by shape where that will do",
                stacklevel=3,
            )
        first = _stood_in(f, nodes, treedef, depth, table)
    elif depth > 2 and first.names() != _stood_in(f, nodes, treedef, 3, table).names():
        raise Unlike("what it does depends on how many blocks there are")
    first.level = level
    return first.run()


def _stood_in(f: Callable[..., Any], nodes: list[Any], treedef: Any, count: int, table: Names) -> Reading:
    """Trace f on stand-ins of `count` blocks."""
    inputs: list[Value] = []
    for number, node in enumerate(nodes):
        if not isinstance(node, Stacked):
            inputs += [Value(table("input", number, 0), node)] if _is_array(node) else []
            continue
        depth = _depth(node)
        for rep in range(min(count, depth)):
            for i, leaf in enumerate(jax.tree.leaves(node)):
                # A stack of one block is no stack: its block is there like any other array.
                inputs.append(Value(table("input", number, i), *((leaf, depth, rep) if depth > 1 else (leaf[0],))))
    reps = {value.depth: min(count, value.depth) for value in inputs if value.depth}
    return Reading(f, stand_ins(treedef.unflatten(nodes), count, inner=False), inputs, reps, table)


def stand_ins(args: Any, count: int | None, inner: bool = True) -> Any:
    """Replace arrays by their specs, and stacks by `count` of their blocks (None: all), with `inner` those inside too."""

    def one(node):
        if not _is_stack(node):
            return _spec(node, 0) if _is_array(node) else node
        depth = _depth(node)
        places = range(depth if count is None else min(count, depth))
        block = jax.tree.map(lambda a: _spec(a, 1), node.blocks)
        return Blocks([stand_ins(block, count) if inner else block for _ in places], depth, places)

    return jax.tree.map(one, args, is_leaf=_is_stack)


def again_stacked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of the net's own trees (a loss, its gradient) take and return trees with blocks shown one by one."""

    @functools.wraps(function)  # line searches read a loss's signature
    def call(*args: Any, **options: Any) -> Any:
        given: Any = (args, options)
        for level in reversed(range(_levels(given))):
            if any(isinstance(node, Blocks) and not node.complete for node in split(given, level)[0]):
                raise Again()
            given = _restacked(given, level)
        return _blocks_of(function(*given[0], **given[1]))

    return call


def _blocks_of(result: Any) -> Any:
    """Show all blocks of all stacks."""

    def one(node):
        return Blocks([_blocks_of(node[i]) for i in range(_depth(node))]) if _is_stack(node) else node

    return jax.tree.map(one, result, is_leaf=_is_stack)


def _level(args: Any) -> int | None:
    """How many levels of blocks, shown already, lie around the next stacks; None if there are none."""
    nodes = jax.tree.leaves(args, is_leaf=lambda node: _is_stack(node) or isinstance(node, Blocks))
    if any(isinstance(node, Stacked) for node in nodes):
        return 0
    levels = [_level(tuple(tuple.__iter__(node))) for node in nodes if isinstance(node, Blocks)]
    return min((1 + level for level in levels if level is not None), default=None)


def _levels(args: Any) -> int:
    nodes = jax.tree.leaves(args, is_leaf=lambda node: isinstance(node, Blocks))
    return max((1 + _levels(tuple(tuple.__iter__(node))) for node in nodes if isinstance(node, Blocks)), default=0)


def _is_stack(node: Any) -> bool:
    return isinstance(node, Stacked) and (node.depth is not None or bool(jax.tree.leaves(node)))


def _depth(node: Stacked) -> int:
    return node.depth if node.depth is not None else jax.tree.leaves(node)[0].shape[0]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _spec(leaf: Any, drop: int) -> jax.ShapeDtypeStruct:
    aval: Any = jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf
    options = {name: getattr(aval, name) for name in ("weak_type",) if hasattr(aval, name)}
    if getattr(aval, "vma", None):
        options["vma"] = aval.vma
    return jax.ShapeDtypeStruct(leaf.shape[drop:], leaf.dtype, **options)


def _restacked(result: Any, level: int) -> Any:
    def one(node):
        if not isinstance(node, Blocks):
            return node
        children = list(tuple.__iter__(node))
        if any(specs(child) != specs(children[0]) for child in children):
            return node
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *children)
        return Stacked(blocks, None if jax.tree.leaves(blocks) else node.depth)

    nodes, rebuild = split(result, level)
    return rebuild([one(node) for node in nodes])
