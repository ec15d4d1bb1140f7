"""Activations: functions that know their name, derivative and bounds.

Values and derivatives are finite at |x| = 1e4 in float32 and bfloat16.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnn import check


class Activation:
    """A function `phi(x, **options)` with `phi.name`, `phi.derivative(x, **options)` and `phi.bounds`.

    `bounds` are the limits (low, high) of phi as x goes to -inf and inf, infinite if phi grows without end.
    `phi.bind(slope=0.2)` fixes options. An option that the function does not have is a TypeError.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., jax.Array],
        derivative: Callable[..., jax.Array] | None = None,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        elementwise: bool = True,
    ):
        self.name, self.bounds, self.elementwise = name, bounds, elementwise
        self._function, self._derivative = function, derivative
        self.__doc__ = function.__doc__

    def __call__(self, x: ArrayLike, **options: Any) -> jax.Array:
        return self._function(x, **options)

    def derivative(self, x: ArrayLike, **options: Any) -> jax.Array:
        """Evaluate phi'(x), elementwise (softmax: the Jacobian, float[..., d, d])."""
        if self._derivative is not None:
            return self._derivative(x, **options)
        x = jnp.asarray(x)
        slope = jax.vmap(jax.grad(lambda v: jnp.reshape(self._function(v, **options), ())))
        return slope(x.reshape(-1)).reshape(x.shape)

    def bind(self, **options: Any) -> "Activation":
        """Fix options: `relu.bind(grad_at_zero=1.0)`."""
        if not options:
            return self
        function = functools.partial(self._function, **options)
        derivative = self._derivative and functools.partial(self._derivative, **options)
        # alpha moves elu's lower bound, so that only a bound of zero is known to stay.
        bounds = (0.0 if self.bounds[0] == 0 else -math.inf, math.inf) if options.keys() & {"alpha"} else self.bounds
        inspect.signature(self._function).bind(None, **options)  # a misspelt option fails here, not at the first call
        return Activation(self.name, function, derivative, bounds, self.elementwise)

    def __repr__(self) -> str:
        return f"Activation({self.name})"


def _positive_part(x: ArrayLike) -> jax.Array:
    """Evaluate max(x, 0), in half precision through float32, which rounds nothing.

    XLA for a GPU moves a maximum of bfloat16 into each product that reads it, and where cuBLAS takes these, computes it again
    for each: a twentieth of the step of an mlp of width 4096. One of float32 stays with the norm before it.
    """
    x = jnp.asarray(x)
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return jnp.maximum(x.astype(jnp.float32), 0).astype(x.dtype) if narrow else jnp.maximum(x, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _relu(x: ArrayLike, grad_at_zero: float) -> jax.Array:
    return _positive_part(x)


@_relu.defjvp
def _relu_jvp(grad_at_zero, primals, tangents):
    (x,), (t,) = primals, tangents
    y = _positive_part(x)
    # The sign of y, not of x: y is kept for the next layer anyway, so that x need not be kept or recomputed.
    return y, t * _relu_slope(x, grad_at_zero) if grad_at_zero else jnp.where(y > 0, t, jnp.zeros_like(t))


def _relu_slope(x: ArrayLike, grad_at_zero: float = 0.0) -> jax.Array:
    x = jnp.asarray(x)
    return jnp.where(x == 0, grad_at_zero, x > 0).astype(x.dtype)


def _f_identity(x: ArrayLike) -> jax.Array:
    """Return x."""
    return jnp.asarray(x)


def _d_sigmoid(x: ArrayLike) -> jax.Array:
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-jnp.asarray(x))


def _d_tanh(x: ArrayLike) -> jax.Array:
    # sech², because 1 - tanh² cancels for large x.
    e = jnp.exp(-2 * jnp.abs(jnp.asarray(x)))
    return 4 * e / jnp.square(1 + e)


def _f_relu(x: ArrayLike, grad_at_zero: float = 0.0) -> jax.Array:
    """Evaluate max(x, 0). At x = 0 the derivative is `grad_at_zero`: 0 by default, 1 or ½ in some textbooks."""
    return _relu(x, float(grad_at_zero))


def _f_leaky_relu(x: ArrayLike, slope: float = 0.01) -> jax.Array:
    """Evaluate x for x >= 0, slope·x below (Maas et al. 2013)."""
    return jax.nn.leaky_relu(x, slope)


# With derivatives of their own: newer JAX cannot take its own of these two inside `shard_map(check_vma=True)`.
_erf, _erfc = jax.custom_jvp(jax.lax.erf), jax.custom_jvp(jax.lax.erfc)


@_erf.defjvp
def _erf_tangent(primals, tangents):
    (x,), (t,) = primals, tangents
    return _erf(x), 2 / math.sqrt(math.pi) * t * jnp.exp(-jnp.square(x))


@_erfc.defjvp
def _erfc_tangent(primals, tangents):
    (x,), (t,) = primals, tangents
    return _erfc(x), -2 / math.sqrt(math.pi) * t * jnp.exp(-jnp.square(x))


def _f_gelu(x: ArrayLike) -> jax.Array:
    """Evaluate x·Phi(x), Phi the normal distribution function, in its exact form (Hendrycks and Gimpel 2016)."""
    x = jnp.asarray(x)
    return 0.5 * x * _erfc(-x * math.sqrt(0.5))


def _f_gelu_tanh(x: ArrayLike) -> jax.Array:
    """Evaluate ½x(1 + tanh(sqrt(2/pi)(x + 0.044715 x³))), the approximation of gelu."""
    return jax.nn.gelu(x, approximate=True)


def _d_gelu_tanh(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    near = jnp.clip(x, -40, 40)  # beyond, tanh is ±1 to the last bit and its slope 0
    c = math.sqrt(2 / math.pi)
    inner = c * (near + 0.044715 * near**3)
    return 0.5 * (1 + jnp.tanh(inner)) + 0.5 * near * _d_tanh(inner) * c * (1 + 3 * 0.044715 * near**2)


def _f_erf(x: ArrayLike) -> jax.Array:
    """Evaluate erf(x) = 2/sqrt(pi) · integral of e^(-t²) from 0 to x."""
    return _erf(jnp.asarray(x))


def _f_softmax(x: ArrayLike) -> jax.Array:
    """Evaluate e^x_i / sum_j e^x_j over the last axis."""
    return jax.nn.softmax(x, axis=-1)


def _d_softmax(x: ArrayLike) -> jax.Array:
    p = jax.nn.softmax(x, axis=-1)
    return p[..., :, None] * (jnp.eye(p.shape[-1], dtype=p.dtype) - p[..., None, :])


identity = Activation("identity", _f_identity, lambda x: jnp.ones_like(jnp.asarray(x)))
sigmoid = Activation("sigmoid", jax.nn.sigmoid, _d_sigmoid, (0.0, 1.0))
tanh = Activation("tanh", jnp.tanh, _d_tanh, (-1.0, 1.0))
relu = Activation("relu", _f_relu, _relu_slope, (0.0, math.inf))
leaky_relu = Activation("leaky_relu", _f_leaky_relu)
elu = Activation("elu", jax.nn.elu, None, (-1.0, math.inf))
selu = Activation("selu", jax.nn.selu, None, (-1.6732632423543772 * 1.0507009873554805, math.inf))
gelu = Activation("gelu", _f_gelu)
gelu_tanh = Activation("gelu_tanh", _f_gelu_tanh, _d_gelu_tanh)
silu = Activation("silu", jax.nn.silu)
softplus = Activation("softplus", jax.nn.softplus, jax.nn.sigmoid, (0.0, math.inf))
erf = Activation("erf", _f_erf, None, (-1.0, 1.0))
softmax = Activation("softmax", _f_softmax, _d_softmax, (0.0, 1.0), elementwise=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _switched(functions: tuple[Callable[[Any], Any], ...], index: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.switch(index, functions, x)


@_switched.defjvp
def _switched_jvp(functions, primals, tangents):
    # The slope too is chosen on the way forward: what comes back is only multiplied by it.
    def both(function):
        return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))

    y, slope = jax.lax.switch(primals[0], [both(function) for function in functions], primals[1])
    return y, slope * tangents[1]


def chosen(some: Sequence[Activation], index: jax.Array) -> Activation:
    """Make the activation `some[index]` for an index int[] that is traced, so that all of them share one program.

    Elementwise functions only. Bounds are those of some[index] where any of them has two, and else as if there were none.
    """
    functions = tuple(some)
    low, high = (jnp.stack([jnp.float32(phi.bounds[end]) for phi in some])[index] for end in (0, 1))
    name = " or ".join(phi.name for phi in some)
    bounded = any(all(map(math.isfinite, phi.bounds)) for phi in some)
    bounds: Any = (low, high) if bounded else (-math.inf, math.inf)
    return Activation(name, lambda x: _switched(functions, index, jnp.asarray(x)), None, bounds)


TABLE = {phi.name: phi for phi in list(globals().values()) if isinstance(phi, Activation)}
"""All activations by name."""


def get(activation: str | Callable[..., jax.Array]) -> Activation:
    """Find an activation by name, or make one from any elementwise function `x -> y`.

    Errors: an unknown name is a ValueError that suggests the nearest one.
    """
    if isinstance(activation, Activation):
        return activation
    if callable(activation):
        return Activation(getattr(activation, "__name__", type(activation).__name__), activation)
    check.choice("activations", TABLE, activation=activation)
    return TABLE[activation]
