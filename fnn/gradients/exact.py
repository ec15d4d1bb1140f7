"""Exact gradients of any JAX function: arrays with a power of two beside each, which no depth can push out of range.

The backward pass of any function is linear in its seed, the cotangent of the result. So `jax.vjp` is traced with the seed
as an input, and the program is run with an exponent beside every value that depends on it. What does not depend on the
seed, the forward pass, runs as it is.

`powers` says what an array with an exponent is, `rules` and `moves` what each operation does to it, `loops` what scans,
branches and `shard_map` do; `execution` goes through the program. Where an operation is neither linear nor homogeneous, or is
not known, the exponent is undone: what leaves the range of the dtype there is NaN, and the run knows the place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fnn.gradients.execution import Note, Run
from fnn.gradients.loops import LOOPS
from fnn.gradients.moves import MOVES
from fnn.gradients.operations import prune
from fnn.gradients.pieces import joined
from fnn.gradients.powers import Scaled, scaled
from fnn.gradients.program import read, trace
from fnn.gradients.rules import RULES


def gradient(loss: Callable[..., Any], *, has_aux: bool = False, places: bool = False) -> Callable[..., Any]:
    """Make `(params, *rest) -> (loss, gradient)`, as `jax.value_and_grad`, with a `Scaled` for each array of params.

    With `has_aux` the loss returns (value, aux), and the call ((value, aux), gradient). With `places` a third result says,
    for each place where an exponent had to be undone, whether the numbers left the range of the dtype there: bool by name.
    """

    def call(params: Any, *rest: Any) -> tuple[Any, ...]:
        def seeded(seed, params, rest):
            out, pull, *aux = jax.vjp(lambda p: loss(p, *rest), params, has_aux=has_aux)
            return (out, *aux), pull(seed.astype(out.dtype))[0]

        closed, specs = trace(seeded, jnp.ones((), jnp.float32), params, rest)
        this = run()
        outputs = this.execute(joined(prune(read(closed))), [seed(jnp.float32), *jax.tree.leaves((params, rest))])
        (out, *aux), found = jax.tree.unflatten(jax.tree.structure(specs), outputs)
        found = jax.tree.map(scaled, found, is_leaf=lambda node: isinstance(node, Scaled))
        return ((out, *aux) if has_aux else out), found, *([this.lost] if places else [])

    return call


def run(notes: Mapping[int, Note] | None = None) -> Run:
    """Make ready to execute a program with all rules; `notes` as in `Run`."""
    return Run({**RULES, **MOVES, **LOOPS}, notes)


def seed(dtype: Any) -> Scaled:
    """The cotangent 1 of a loss."""
    return scaled(jnp.ones((), dtype))
