"""`per_depth`: an optimiser sees the blocks of `repeat` one by one, as it does with `serial`.

`TrainState.create` and `train_step` wrap every optimiser in it, so that `repeat` and `serial` train alike.
"""

import jax
import optax

from fnn.admission import Optimizer
from fnn.training.extra import accepted
from fnn.training.lift import again_stacked, lifted


class DepthAware(optax.GradientTransformationExtraArgs):
    """A transformation that takes `Stacked` parameters as they are."""


def per_depth(transformation: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Let a transformation see every block of `repeat` as arrays of its own, as it does with `serial`.

    Guarantee: from the same weights `repeat(block, n)` and `serial(*[block] * n)` have equal parameters, to rounding,
    after any number of steps of any deterministic transformation. Masks and labels see the shapes and paths that `serial`
    has; norms of single arrays are taken block by block, global norms over all. A transformation that treats all blocks
    alike compiles as one block, at any depth; others run block by block, with a warning above 64 blocks. States are
    `Stacked` where all blocks keep the same arrays.

    A transformation must not do two things, which cannot be seen here: have side effects while it maps over arrays, and
    behave differently above some number of arrays or parameters (an average over them is fine).

    `TrainState.create` and `train_step` call this by themselves; to call it twice changes nothing.
    Errors: ValueError for a mask or labels given as a tree, which can only fit one of the two forms.
    """
    if isinstance(transformation, DepthAware):
        return transformation
    inner = optax.with_extra_args_support(transformation)  # pyright: ignore[reportArgumentType] # has `init` and `update`

    def init(params):
        try:
            return lifted(inner.init)(params)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            try:
                jax.eval_shape(inner.init, params)
            except Exception:
                raise error from None
            raise ValueError(
                "per_depth: masks and labels must be functions of the parameters, which then see each block of repeat; "
                "got an optimiser that fits the stacked arrays alone; pass mask=lambda params: jax.tree.map(...)"
            ) from error

    def update(updates, state, params=None, **extra):
        def one(updates, state, params, extra):
            given = {name: again_stacked(value) if callable(value) else value for name, value in extra.items()}
            return accepted(inner.update)(updates, state, params, **given)

        return lifted(one)(updates, state, params, extra)

    return DepthAware(init, update)


def stacked(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let a transformation see the arrays of `repeat` as they are, all blocks in one: your promise that it cannot tell.

    True of what treats all numbers alike or takes norms over all of them: `lbfgs`, line searches, SAM and sophia (which
    draws other signs). `per_depth` must take these apart block by block, since they take the loss again, and a deep net
    then compiles for minutes: `train_step(net, loss, optimizers.stacked(optax.lbfgs()))` compiles as one block. Make it
    the outermost. The promise is not checked: masks, labels and norms of single arrays would be those of whole stacks.
    """
    inner = optax.with_extra_args_support(transformation)
    return DepthAware(inner.init, accepted(inner.update))
