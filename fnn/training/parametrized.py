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
    last kernel in the order of the tree, and the arrays beside them. Arrays with one axis are biases or scales.

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
    kernels = [home for home, (_, a), k in zip(homes, known, jax.tree.leaves(depths), strict=True) if a.ndim - k > 1]
    if not kernels:
        raise ValueError("parametrized: the parameters must hold a kernel, an array of two axes or more, got none")

    def marked(pattern, home):
        if pattern is not None:
            return jax.tree.leaves(where(pattern)(updates))
        return [other == home for other in homes]

    ends = zip(marked(first, kernels[0]), marked(last, kernels[-1]), strict=True)
    roles = ["output" if at_end else "input" if at_start else "hidden" for at_start, at_end in ends]
    return jax.tree.unflatten(jax.tree.structure(updates), roles)
