"""Parameters chosen by their paths: masks for optax (`where`), and training all but some of them (`freeze`)."""

import fnmatch
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fnn import tree
from fnn.training.blocks import Blocks, note_order
from fnn.tree import PyTree, Stacked


def where(*patterns: str) -> Callable[[PyTree], PyTree]:
    """Make a mask for optax, params -> tree of bools: True where a path matches one of the patterns.

    Patterns are those of `fnmatch` for paths as `fnn.tree.paths` prints them: "*/kernel", "1/trunk/*". A block of `repeat`
    is written as `[3]` or, as in `serial`, as `3`; `[:]` is every block. A mask chooses the same arrays of `repeat` and of
    `serial`: `optax.adamw(1e-3, mask=fnn.optimizers.where("*/kernel"))`. Labels for `optax.partition` are
    `lambda params: jax.tree.map(lambda chosen: "slow" if chosen else "fast", where("1/*")(params))`.

    Errors: ValueError for a pattern that no path matches; for one that tells the blocks of a stack apart where the
    optimiser is used without `per_depth`.
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f'optimizers.where: patterns must be strings, got {patterns!r}; pass where("*/kernel")')
    known = [(pattern, _compiled(pattern)) for pattern in patterns]

    def mask(params):
        used: set[str] = set()
        found = _marked(params, (), known, used)
        partly = any(map(hidden, jax.tree.leaves(params, is_leaf=hidden)))
        if (missed := [pattern for pattern in patterns if pattern not in used]) and not partly:
            names = sorted({path.replace("[:]", "*") for path in tree.paths(params)})[:8]
            raise ValueError(
                f"optimizers.where: each pattern must match the path of a parameter, got {missed[0]!r}, which matches none; "
                f"paths are such as {', '.join(names)}"
            )
        return found

    return mask


def freeze(transformation: optax.GradientTransformation, *patterns: str) -> optax.GradientTransformationExtraArgs:
    """Train all parameters except those whose paths match a pattern of `where`.

    The transformation sees only the others: it keeps no state for frozen arrays, and its global norms leave them out, as
    if the net had no such parameters. What is frozen stays the same, bit for bit. A step's metrics (`grad_norm`) are
    still those of all parameters.
    """
    inner, frozen = optax.with_extra_args_support(transformation), where(*patterns)

    def init(params):
        return inner.init(_hide(params, frozen(params)))

    def update(updates, state, params=None, **extra):
        mask, structure = frozen(updates), jax.tree.structure(updates)

        def hide(node):
            return _hide(node, mask) if jax.tree.structure(node) == structure else node

        def of_trained(function):
            def call(trained, *args, **options):
                return hide(function(filled(trained, params), *args, **options))

            return functools.wraps(function)(call)

        given = {name: of_trained(v) if callable(v) else hide(v) for name, v in extra.items()}
        new, state = inner.update(hide(updates), state, None if params is None else hide(params), **given)
        return filled(new, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Turn a pattern into a regular expression for paths with plain numbers for blocks."""
    pieces = re.split(r"\[(:|\d+)\]", pattern)
    # fnmatch.translate anchors what it returns: (?s:...)\Z, which joins with others once the end is taken off.
    plain = [re.sub(r"\\[zZ]$", "", fnmatch.translate(piece)) for piece in pieces[::2]]
    blocks = [r"\d+" if piece == ":" else piece for piece in pieces[1::2]]
    return re.compile("".join(a + b for a, b in zip(plain, [*blocks, ""], strict=True)))


def _marked(node: Any, start: tuple[str, ...], known: Any, used: set[str]) -> Any:
    """Say for each array whether its path matches; note those patterns that do."""

    def matches(*parts):
        name = "/".join(filter(None, (*start, *parts)))
        found = [pattern for pattern, compiled in known if compiled.fullmatch(name)]
        used.update(found)
        return bool(found)

    def one(entries, inner):
        path = tree.path(entries)
        if isinstance(inner, Stacked):
            depth = len(jax.tree.leaves(inner)[0]) if jax.tree.leaves(inner) else 0
            every = [_marked(inner.blocks, (*start, path, str(i)), known, used) for i in range(depth)]
            if any(each != every[0] for each in every):
                raise ValueError(
                    "optimizers.where: the blocks of repeat can be told apart only one by one, got them stacked; wrap the "
                    "optimiser in fnn.optimizers.per_depth, as train_step does"
                )
            return Stacked(every[0] if every else inner.blocks, inner.depth)
        if not isinstance(inner, Blocks):
            return matches(path)
        blocks = list(tuple.__iter__(inner))
        if not inner.complete:  # some blocks stand in for all
            every = [_marked(blocks[0], (*start, path, str(i)), known, used) for i in range(inner.depth)]
            if any(each != every[0] for each in every):
                note_order()
        each = [_marked(b, (*start, path, str(i)), known, used) for i, b in zip(inner.places, blocks, strict=True)]
        return Blocks(each, inner.depth, inner.places)

    stops = (Blocks, Stacked)
    return jax.tree_util.tree_map_with_path(one, node, is_leaf=lambda inner: isinstance(inner, stops))


def hidden(node: Any) -> bool:
    """Whether a mask has taken an array away here."""
    return isinstance(node, optax.MaskedNode)


def _hide(node: Any, mask: Any) -> Any:
    return jax.tree.map(lambda hidden, a: optax.MaskedNode() if hidden else a, mask, node)


def filled(part: Any, whole: Any) -> Any:
    """Put what is hidden back from a whole tree."""
    return jax.tree.map(lambda a, b: b if hidden(a) else a, part, whole, is_leaf=hidden)
