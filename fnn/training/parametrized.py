"""`parametrized`: learning rates by layer, as a parametrisation asks for."""

from typing import Any

import jax
import optax

from fnn import parametrizations, tree
from fnn.parametrizations import Parametrization
from fnn.training.chosen import where
from fnn.training.depth import per_depth, stacked


def parametrized(
    transformation: optax.GradientTransformation,
    parametrization: str | Parametrization,
    *,
    adaptive: bool = True,
    depth: int = 1,
    input: str | None = None,
    output: str | None = None,
) -> optax.GradientTransformationExtraArgs | optax.GradientTransformation:
    """Multiply the updates of each array by `Parametrization.rate` of its layer: the optimiser that belongs to the net.

    `fnn.models.mlp(..., parametrization="mup")` goes with `optimizers.parametrized(optax.adam(1e-2), "mup")`. `adaptive`
    is whether the transformation divides by the size of gradients: True for Adam, RMSProp and the like, False for SGD with
    or without momentum. `depth`, the number of hidden layers, is needed for completep without `adaptive`. `input` and `output` are
    patterns of `optimizers.where` for the arrays of the first and the last layer; by default these are the first and the
    last kernel in the order of the tree, and the arrays beside them. Arrays with one axis are biases or scales. A table
    (`embedding`: of tokens or of positions) always belongs to the input; if one comes first, no kernel does. A table that
    comes last, as in `fnn.tied`, stands for both ends, and no kernel does.

    The width of a kernel is the number of its inputs, over all axes but the last: of a 3x3 convolution nine times its
    channels, of a feed-forward's second kernel four times the net's width. Such factors stay the same at all widths.

    Adam's eps must stay far below the gradients of the widest and deepest net. Decoupled weight decay is multiplied too.
    Errors: ValueError for an unknown name, for a tree without kernels, and a pattern that no path matches.
    """
    chosen = parametrizations.get(parametrization)
    if chosen.name == "standard":
        return transformation

    def rescaled(updates, params):
        depths = tree.map_depth(lambda k, _: k, updates)
        roles = _roles(updates, depths, input, output)

        def one(u, k, role):
            return u * chosen.rate(role, u.shape[k:], adaptive=adaptive, depth=depth)

        return jax.tree.map(one, updates, depths, roles)

    # Blocks of a stack have one rate, so that the multiplication sees stacks as they are, and compiles once.
    return stacked(optax.chain(per_depth(transformation), optax.stateless(rescaled)))


def _roles(updates: Any, depths: Any, first: str | None, last: str | None) -> Any:
    """Say for each array of which layer it is: input, hidden or output."""
    known = jax.tree_util.tree_leaves_with_path(updates)
    homes = [str(path[:-1]) for path, _ in known]
    tables = [getattr(path[-1], "key", None) == "embedding" if path else False for path, _ in known]
    matrices = [
        (home, table)
        for home, table, (_, a), k in zip(homes, tables, known, jax.tree.leaves(depths), strict=True)
        if a.ndim - k > 1
    ]
    kernels = [home for home, table in matrices if not table]
    if not kernels:
        raise ValueError("parametrized: the parameters must hold a kernel, an array of two axes or more, got none")
    start = None if matrices[0][1] or matrices[-1][1] else kernels[0]
    end = None if matrices[-1][1] else kernels[-1]

    def marked(pattern, home):
        if pattern is not None:
            return jax.tree.leaves(where(pattern)(updates))
        return [other == home for other in homes]

    def role(table, at_start, at_end):
        if at_end and (last is not None or not table):
            return "output"
        return "input" if table or at_start else "hidden"

    roles = list(map(role, tables, marked(first, start), marked(last, end)))
    return jax.tree.unflatten(jax.tree.structure(updates), roles)
