"""Singular values of a product of many Jacobians, by QR factors and logs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import mapped
from fnn.spectra import products


class Through(NamedTuple):
    """Singular values of a product of many Jacobians, as logs."""

    log10_singular: jax.Array
    """log10 of the singular values of the whole product, the largest first: float[k]."""
    log10_stretch: jax.Array
    """log10 of the stretch of each direction in each layer: sums over layers give `log10_singular`; float[depth, k]."""
    change: jax.Array
    """By how much the last sweep changed `log10_singular`, at most; inf after a single sweep. float[]"""

    @property
    def lyapunov(self) -> jax.Array:
        """Lyapunov exponents in log10 a layer: the mean stretch; float[k]."""
        return jnp.mean(self.log10_stretch, axis=0)


def through(function: Any, k: int, sweeps: int, slices: Any, x: Any, key: Any) -> Through:
    """Follow k directions through h_t+1 = function(slice_t, h_t); see `JacobianOf.through`."""

    def forward(h, part):
        return function(part, h), h

    _, path = jax.lax.scan(forward, x, slices)

    def orthonormal(rows):
        """QR of k vectors: (orthonormal ones, log10 of each one's length beyond those before it)."""
        q, r = jnp.linalg.qr(rows.T)
        return q.T, jnp.log10(jnp.abs(jnp.diagonal(r)))

    def forth(rows, at):
        part, h = at
        _, push, _ = products.vectors(function, part, h)
        return orthonormal(jax.vmap(push)(rows).astype(dtype))

    def back(rows, at):
        part, h = at
        _, _, pull = products.vectors(function, part, h)
        return orthonormal(jax.vmap(pull)(rows).astype(dtype))

    dtype = jnp.result_type(x.dtype, jnp.float32)
    start, _ = orthonormal(jax.random.normal(key, (k, x.size), dtype))

    def sweep(carry, _):
        rows, before, _, _ = carry
        rows, logs = jax.lax.scan(forth, rows, (slices, path))
        total = jnp.sum(logs, axis=0)
        rows, _ = jax.lax.scan(back, rows, (slices, path), reverse=True)
        change = jnp.where(total == before, 0, jnp.abs(total - before))  # a product of zeros stays at -inf
        return (rows, total, logs, jnp.max(change)), None

    depth = jax.tree.leaves(path)[0].shape[0]
    nothing = jnp.full(k, jnp.inf, dtype)
    carry = mapped.varying(
        (start, nothing, jnp.zeros((depth, k), dtype), jnp.full((), jnp.inf, dtype)), like=(slices, x)
    )
    (_, total, logs, change), _ = jax.lax.scan(sweep, carry, None, sweeps)
    order = jnp.argsort(-total)
    return Through(total[order], logs[:, order], change)
