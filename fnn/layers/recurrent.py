"""Recurrent layers over time by `lax.scan`: compile time does not depend on the length.

All take a sequence float[batch, time, d], alone or in `Masked`, and return float[batch, time, width] in the same form. At
a padded position the hidden state stays as it is and the output is zero, so padding on either side, or in between, changes
nothing at the real positions. The product with the inputs is one matrix product over all times, outside the loop, and so
is the gradient of the recurrent kernel (see `_loop`).

The hidden state starts at zero, at a learned value (`initial="learned"`), or where the last piece of the sequence left
it (see `memory`). `reverse=True` runs backwards in time and leaves each output at its own position; `bidirectional` joins
both directions. Layers with d = width stack with `repeat`. A layer that runs backwards has read everything at the *first*
real position: follow it by `take_first`, and `bidirectional` by `take_ends`. A `tap` inside the loop sees each h_t of a
real step and the error signal dL/dh_t that arrives at it; the state that is held over a padded step goes around it.

The kernels of several gates stand side by side on the last axis, in PyTorch's order. Recurrent kernels are drawn gate by
gate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import check, mapped
from fnn.core import Layer, as_arrays, as_spec, described, serial
from fnn.layers import activations, initializers, memory
from fnn.layers.dense import product
from fnn.layers.inputs import Masked, concatenate, like, parallel, sequence
from fnn.tree import Stacked, statistics_dtype

Init = str | initializers.Initializer


@dataclass(frozen=True)
class _Options:
    """What all recurrent layers are told, whatever their cell."""

    width: int
    kernel_init: Init
    recurrent_init: Init
    bias_init: Init
    initial: str
    reverse: bool
    tap: Layer | None
    unroll: int


class _Cell(NamedTuple):
    """One step of a recurrent layer, and its derivative."""

    who: str
    gates: int
    step: Callable[[Any, Any, Any], Any]
    """(carry, x_t W + b, h_{t-1} U + c) -> (carry, slopes): the slopes of the new carry, which `tangent` reads"""
    tangent: Callable[..., Any] | None
    """(slopes, d carry, d of the two products' sum) -> d of the new carry, linear; None: JAX derives it step by step."""
    carried: tuple[str, ...] = ("hidden",)
    """The carry's arrays, float[batch, width] each; the first is the output."""
    biases: Callable[[Any, Any, int, Any], dict[str, Any]] = lambda key, init, n, dtype: {
        "bias": init(key, (n,), dtype)
    }
    apart: bool = False
    """`tangent` takes the two products' tangents one by one, not their sum."""


@described
def rnn(
    width: int,
    *,
    activation: str | Callable[..., jax.Array] = "tanh",
    kernel_init: Init = "lecun_normal",
    recurrent_init: Init = "orthogonal",
    bias_init: Init = "zeros",
    initial: str = "zeros",
    reverse: bool = False,
    tap: Layer | None = None,
    unroll: int = 1,
) -> Layer:
    """Run h_t = phi(x_t W + h_{t-1} U + b) over time; params: kernel W, recurrent_kernel U, bias b.

    |dh_T/dh_t| <= (gamma·s_max(U))^(T-t), gamma the largest slope of phi (1 for tanh, ¼ for sigmoid): below 1 the
    gradient must vanish. `recurrent_init="scaled(1.0)"` draws U from N(0, 1/width). All options are keywords, the same in
    `gru` and `lstm`. Source: Elman 1990; Pascanu et al. 2013.
    """
    phi = activations.get(activation)

    def step(carry, fed, back):
        z = fed + back
        h, slope = jax.jvp(phi, (z,), (jnp.ones_like(z),))
        return (h,), slope

    def tangent(slope, carry, z):
        return (slope * z,)

    # These slopes are the whole derivative only if phi acts on each number by itself; of an unknown function we cannot say.
    known = isinstance(activation, str | activations.Activation) and phi.elementwise
    cell = _Cell("rnn", 1, step, tangent if known else None)
    return _over_time(cell, _Options(width, kernel_init, recurrent_init, bias_init, initial, reverse, tap, unroll))


@described
def gru(
    width: int,
    *,
    kernel_init: Init = "lecun_normal",
    recurrent_init: Init = "orthogonal",
    bias_init: Init = "zeros",
    initial: str = "zeros",
    reverse: bool = False,
    tap: Layer | None = None,
    unroll: int = 1,
) -> Layer:
    """Run h_t = (1 - z) n + z h_{t-1}, n = tanh(x W_n + b_n + r (h_{t-1} U_n + c)), r and z sigmoid gates.

    Params: kernel float[d, 3 width] and recurrent_kernel in the order r, z, n; bias float[3 width]; recurrent_bias c
    float[width]: PyTorch's weights, with its two biases of r and z summed. All options are keywords, as in `rnn`. Source:
    Cho et al. 2014, in cuDNN's form.
    """

    def step(carry, fed, back):
        (h,) = carry
        r, z, _ = jnp.split(jax.nn.sigmoid(fed + back), 3, axis=-1)
        b = back[..., -h.shape[-1] :]
        n = jnp.tanh(fed[..., -h.shape[-1] :] + r * b)
        by_n = (1 - z) * (1 - n) * (1 + n)
        return ((1 - z) * n + z * h,), (z, by_n * b * r * (1 - r), (h - n) * z * (1 - z), by_n, by_n * r)

    def tangent(slopes, carry, fed, back):
        by_h, by_r, by_z, by_fed, by_back = slopes
        (r, z, _), fed_n, back_n = jnp.split(fed + back, 3, axis=-1), fed[..., -width:], back[..., -width:]
        return (by_h * carry[0] + by_r * r + by_z * z + by_fed * fed_n + by_back * back_n,)

    def biases(key, init, n, dtype):
        first, second = jax.random.split(key)
        return {"bias": init(first, (n,), dtype), "recurrent_bias": init(second, (n // 3,), dtype)}

    cell = _Cell("gru", 3, step, tangent, biases=biases, apart=True)
    return _over_time(cell, _Options(width, kernel_init, recurrent_init, bias_init, initial, reverse, tap, unroll))


@described
def lstm(
    width: int,
    *,
    forget_bias: float = 1.0,
    kernel_init: Init = "lecun_normal",
    recurrent_init: Init = "orthogonal",
    bias_init: Init = "zeros",
    initial: str = "zeros",
    reverse: bool = False,
    tap: Layer | None = None,
    unroll: int = 1,
) -> Layer:
    """Run c_t = f c_{t-1} + i g, h_t = o tanh c_t, with i, f, o = sigmoid and g = tanh of x_t W + h_{t-1} U + b.

    Params: kernel float[d, 4 width] and recurrent_kernel in the order i, f, g, o; bias float[4 width]: PyTorch's weights,
    with its two biases summed. c is kept in at least float32. All options are keywords, as in `rnn`.

    `forget_bias` is added once, to the *initial* bias of the forget gate, which training then moves like any parameter.
    At 1 a fresh cell keeps sigmoid(1) = 73 % of its content in a step, at 0 (PyTorch and Flax) 50 %, at 5 99.3 %: it sets
    the time over which gradients survive at the start.
    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000; Jozefowicz et al. 2015 for the bias.
    """

    def step(carry, fed, back):
        _, c = carry
        z = fed + back
        # One sigmoid over all gates, then the parts: a sigmoid of each part takes XLA four times as long on a CPU.
        i, f, _, o = jnp.split(jax.nn.sigmoid(z), 4, axis=-1)
        g = jnp.tanh(z[..., 2 * width : 3 * width])
        old, by_c = c, f.astype(c.dtype)
        c = by_c * old + (i * g).astype(c.dtype)
        t = jnp.tanh(c).astype(z.dtype)
        by_f = old.astype(z.dtype) * f * (1 - f)
        by_z = (g * i * (1 - i), by_f, i * (1 - g) * (1 + g))
        return (o * t, c), (by_c, by_z, o * (1 - t) * (1 + t), t * o * (1 - o))

    def tangent(slopes, carry, z):
        by_old, by_z, by_c, by_o = slopes
        by_i, by_f, by_g = by_z
        i, f, g, o = jnp.split(z, 4, axis=-1)
        old = carry[1]
        c = by_old * old + (by_i * i + by_f * f + by_g * g).astype(old.dtype)
        return by_c * c.astype(z.dtype) + by_o * o, c

    def biases(key, init, n, dtype):
        return {"bias": init(key, (n,), dtype).at[n // 4 : n // 2].add(jnp.asarray(forget_bias, dtype))}

    cell = _Cell("lstm", 4, step, tangent, ("hidden", "cell"), biases)
    return _over_time(cell, _Options(width, kernel_init, recurrent_init, bias_init, initial, reverse, tap, unroll))


@described
def bidirectional(forward: Layer, backward: Layer) -> Layer:
    """Read a sequence both ways and join the outputs: `bidirectional(lstm(32), lstm(32, reverse=True))`.

    For one vector of the whole sequence follow it by `take_ends()`, which reads each half where it has seen everything:
    the forward one at the last real position, the other one at the first. With `take_last()` the backward half would have
    read one position only.
    """
    return serial(parallel(forward, backward), concatenate())


def _over_time(cell: _Cell, options: _Options) -> Layer:
    who, width, tap = cell.who, options.width, options.tap
    check.positive(who, width=width, unroll=options.unroll)
    check.choice(who, ("zeros", "learned"), initial=options.initial)
    given = options.kernel_init, options.recurrent_init, options.bias_init
    kernel_init, recurrent_init, bias_init = map(initializers.get, given)
    reason = f"{who}: reverse=True needs the whole sequence at once; decode with forward layers"
    refusal = reason if options.reverse else ""

    def init(key, spec):
        values, _ = sequence(who, as_spec(spec))
        kernel_key, bias_key, *keys = jax.random.split(key, 2 + cell.gates)
        dtype = statistics_dtype(values.dtype)
        params = {
            "kernel": kernel_init(kernel_key, (values.shape[-1], cell.gates * width), dtype),
            "recurrent_kernel": jnp.concatenate([recurrent_init(k, (width, width), dtype) for k in keys], axis=1),
            **cell.biases(bias_key, bias_init, cell.gates * width, dtype),
        }
        if options.initial == "learned":
            params["initial"] = {name: jnp.zeros(width, dtype) for name in cell.carried}
        state = memory.empty([(name, (width,)) for name in cell.carried], refusal=refusal)
        if tap is None:
            return params, state
        hidden = jax.ShapeDtypeStruct((values.shape[0], width), values.dtype)
        tap_params, taps = jax.vmap(tap.init, (0, None))(jax.random.split(key, values.shape[1]), hidden)
        if jax.tree.leaves(tap_params):
            got = check.describe(tap_params)
            raise ValueError(f"{who}: what taps the hidden state must have no parameters, got {got}")
        return params, {"memory": state, "tap": Stacked(taps)}

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        values, mask = sequence(who, x)
        d = params["kernel"].shape[0]
        if values.shape[-1] != d:
            raise ValueError(f"{who}: the input's last axis must be {d}, as at init, got {check.describe(values)}")
        remembered, taps = (state, None) if tap is None else (state["memory"], state["tap"].blocks)
        for steps in {a.shape[0] for a in jax.tree.leaves(taps)} - {values.shape[1]}:
            raise ValueError(f"{who}: its taps were built for {steps} steps, got {check.describe(values)}")
        narrow = jax.tree.map(lambda p: p.astype(values.dtype), params)
        carry = _first(cell, remembered, narrow, values, width)
        fed = product(jnp.swapaxes(values, 0, 1), narrow["kernel"]) + narrow["bias"]
        real = None if mask is None else mask.T
        back = narrow["recurrent_kernel"], None
        if (bias := narrow.get("recurrent_bias")) is not None:
            back = back[0], jnp.pad(bias, (back[0].shape[1] - width, 0))
        carry = mapped.varying(carry, axis_name, like=(fed, real, back))
        how = {"reverse": options.reverse, "unroll": max(1, min(options.unroll, values.shape[1]))}
        if tap is None and cell.tangent is not None:
            carry, ys = _loop(cell, how, back, carry, fed, real)
        else:

            def body(carry, now):
                fed, real, tapped = now
                new = _held(real, cell.step(carry, fed, _product(back, carry[0]))[0], carry)
                if tap is not None:
                    # In a padded sequence the tap sees sequences of length 1, so that held states do not count: they
                    # go around it, forward and backward.
                    seen = new[0] if real is None else Masked(new[0][:, None], real[:, None])
                    h, tapped = tap.apply((), tapped, seen, key=key, train=train, axis_name=axis_name)
                    new = _held(real, (h.values[:, 0] if isinstance(h, Masked) else h, *new[1:]), new)
                return new, (_shown(real, new[0]), tapped)

            carry, (ys, taps) = jax.lax.scan(body, carry, (fed, real, taps), **how)
        if remembered.started:
            held = {n: a.astype(remembered.cache[n].dtype) for n, a in zip(cell.carried, carry, strict=True)}
            remembered = memory.advance(remembered, held, values.shape[1], mask)
        y = like(x, jnp.swapaxes(ys, 0, 1))
        return y, remembered if tap is None else {"memory": remembered, "tap": Stacked(taps)}

    return Layer(init, apply)


def _loop(cell: _Cell, how: dict[str, Any], back: Any, carry: Any, fed: jax.Array, real: Any) -> tuple[Any, jax.Array]:
    """Run a cell over time: (last carry, outputs float[time, batch, width]); back is (U, None or a bias).

    The derivative is the one that JAX would find, with two differences. The loop keeps only the cell's slopes, half of
    what it would keep for their factors. And h_{t-1} dU is one product over all times, before the loop of the tangents, so
    that the gradient of U is one product after the backward loop, instead of a sum over its turns.
    """

    tangent = cell.tangent
    assert tangent is not None

    def forward(back, carry, fed, real):
        def body(carry, now):
            fed, real = now
            new, slopes = cell.step(carry, fed, _product(back, carry[0]))
            new = _held(real, new, carry)
            return new, (_shown(real, new[0]), carry[0], slopes)

        return jax.lax.scan(body, carry, (fed, real), **how)

    @jax.custom_jvp
    def run(back, carry, fed, real):
        carry, (ys, *_) = forward(back, carry, fed, real)
        return carry, ys

    @run.defjvp
    def tangents(primals, tangents):
        (kernel, _), *_, real = primals
        d_back, d_carry, d_fed, _ = tangents
        carry, (ys, before, slopes) = forward(*primals)
        d_products = _product(d_back, before)
        turned = kernel.T  # once, or XLA would transpose it in every turn of the backward pass
        ahead = (d_fed, d_products) if cell.apart else (d_fed + d_products,)

        def body(d_carry, now):
            slopes, (*fed, last), real = now
            new = tangent(
                slopes, d_carry, *fed, last + jax.lax.dot_general(d_carry[0], turned, (((1,), (1,)), ((), ())))
            )
            new = _held(real, new, d_carry)
            return new, _shown(real, new[0])

        return (carry, ys), jax.lax.scan(body, d_carry, (slopes, ahead, real), **how)

    return run(back, carry, fed, real)


def _product(back: Any, h: jax.Array) -> jax.Array:
    kernel, bias = back
    return product(h, kernel) if bias is None else product(h, kernel) + bias


def _held(real: jax.Array | None, new: Any, old: Any) -> Any:
    return new if real is None else tuple(jnp.where(real[:, None], a, b) for a, b in zip(new, old, strict=True))


def _shown(real: jax.Array | None, h: jax.Array) -> jax.Array:
    return h if real is None else jnp.where(real[:, None], h, 0)


def _first(cell: _Cell, remembered: Any, params: Any, values: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """The carry before the first step: where the last piece left it, the learned value, or zero."""
    shape, start = (values.shape[0], width), params.get("initial", {})
    zero = jnp.zeros((), values.dtype)
    carry = [jnp.broadcast_to(start.get(name, zero), shape) for name in cell.carried]
    if remembered.started:
        if (batch := remembered.position.shape[0]) != shape[0]:
            raise ValueError(f"{cell.who}: memory was started for a batch of {batch}, got {check.describe(values)}")
        fresh = (remembered.position == 0)[:, None]
        carry = [jnp.where(fresh, a, remembered.cache[n]) for n, a in zip(cell.carried, carry, strict=True)]
    # The cell's content is a sum over time: it keeps float32 under bfloat16 inputs.
    dtypes = [values.dtype, statistics_dtype(values.dtype)]
    return tuple(a.astype(dtype) for a, dtype in zip(carry, dtypes, strict=False))
