"""stand-in"""

import jax
import jax.numpy as jnp

from fnn.gradients import program


def run(p, values, dtype, hooks):
    seen = {}
    outs = program.execute(p, [jnp.ones((), dtype), *values], hooks, seen)
    return outs, seen


def norm(g, axes=0):
    m = jnp.sqrt(jnp.sum(g.astype(jnp.float32) ** 2, axis=tuple(range(axes, g.ndim))))
    return m, jnp.zeros(m.shape, jnp.int32)


def rounded(g):
    return g


def mean(g, a):
    return jax.lax.pmean(g, a)


def root_mean(m, e, a):
    return jnp.sqrt(jax.lax.pmean(m * m, a)), e


def dot(g, w, axes):
    d = jnp.sum(g * w, axis=tuple(range(axes, g.ndim)))
    return d, jnp.zeros(d.shape, jnp.int32)
