"""Recurrent layers over time by `lax.scan`: compile time does not depend on the length.

All take a sequence float[batch, time, d], alone or in `Masked`, and return float[batch, time, width] likewise. At a
padded position the hidden state is held and the output is zero, so that padding on either side, or holes, change
nothing at the real positions. The product with the inputs is one matrix product over all times, outside the loop.

The hidden state starts at zero, at a learned value (`initial="learned"`), or where the last piece of the sequence left
it (see `memory`). `reverse=True` runs backwards in time, outputs in their places; `bidirectional` joins both. They stack
with `repeat` where d = width. A `tap` inside the loop sees every h_t and the error signal dL/dh_t that arrives at it: at
a padded step with real ones behind it, that which passes through the held state, which the forward statistics leave out.

Kernels of several gates stand side by side on the last axis, in PyTorch's order. Recurrent kernels are drawn gate by
gate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import activations, check, initializers, memory
from fnn.core import Branch, Layer, as_arrays, as_spec, parallel, serial
from fnn.inputs import Masked, concatenate, like, sequence
from fnn.tree import Stacked, statistics_dtype

Init = str | Callable[..., Any]


class _Cell(NamedTuple):
    who: str
    gates: int
    step: Callable[[Any, Any, Any], Any]
    """(params in x's dtype, carry, x W + b at one time) -> carry"""
    carried: tuple[str, ...] = ("hidden",)
    """The carry's arrays, float[batch, width] each; the first is the output."""
    biases: Callable[[Any, Any, int, Any], dict[str, Any]] = lambda key, init, n, dtype: {
        "bias": init(key, (n,), dtype)
    }


def rnn(
    width: int,
    *,
    activation: str | Callable[..., Any] = "tanh",
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
    gradient must vanish. `recurrent_init="scaled(1.0)"` draws U from N(0, 1/width). Source: Elman 1990; Pascanu et al. 2013.
    """
    phi = activations.get(activation)

    def step(params, carry, fed):
        return (phi(fed + carry[0] @ params["recurrent_kernel"]),)

    cell = _Cell("rnn", 1, step)
    return _over_time(cell, width, kernel_init, recurrent_init, bias_init, initial, reverse, tap, unroll)


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
    float[width]: PyTorch's weights, with its two biases of r and z summed. Source: Cho et al. 2014, in cuDNN's form.
    """

    def step(params, carry, fed):
        (h,) = carry
        back = h @ params["recurrent_kernel"]
        r, z, _ = jnp.split(jax.nn.sigmoid(fed + back), 3, axis=-1)
        n = jnp.tanh(fed[..., -h.shape[-1] :] + r * (back[..., -h.shape[-1] :] + params["recurrent_bias"]))
        return ((1 - z) * n + z * h,)

    def biases(key, init, n, dtype):
        first, second = jax.random.split(key)
        return {"bias": init(first, (n,), dtype), "recurrent_bias": init(second, (n // 3,), dtype)}

    cell = _Cell("gru", 3, step, biases=biases)
    return _over_time(cell, width, kernel_init, recurrent_init, bias_init, initial, reverse, tap, unroll)


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
    with its two biases summed. c is kept in at least float32.

    `forget_bias` is added to the *initial* bias of the forget gate, a parameter like any other, which training moves; it
    is no constant added at every step. At 1 a fresh cell keeps sigmoid(1) = 73 % of its content in a step, at 0 (PyTorch
    and Flax) 50 %, at 5 99.3 %: it sets the time over which gradients survive at the start.
    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000; Jozefowicz et al. 2015 for the bias.
    """

    def step(params, carry, fed):
        h, c = carry
        i, f, g, o = jnp.split(fed + h @ params["recurrent_kernel"], 4, axis=-1)
        c = jax.nn.sigmoid(f).astype(c.dtype) * c + (jax.nn.sigmoid(i) * jnp.tanh(g)).astype(c.dtype)
        return jax.nn.sigmoid(o) * jnp.tanh(c).astype(h.dtype), c

    def biases(key, init, n, dtype):
        bias = init(key, (n,), dtype)
        return {"bias": bias.at[n // 4 : n // 2].add(jnp.asarray(forget_bias, dtype))}

    cell = _Cell("lstm", 4, step, ("hidden", "cell"), biases)
    return _over_time(cell, width, kernel_init, recurrent_init, bias_init, initial, reverse, tap, unroll)


def bidirectional(forward: Layer, backward: Layer) -> Layer:
    """Read a sequence both ways and join the outputs: `bidirectional(lstm(32), lstm(32, reverse=True))`."""
    return serial(parallel(forward, backward), concatenate())


def _over_time(
    cell: _Cell,
    width: int,
    kernel_init: Init,
    recurrent_init: Init,
    bias_init: Init,
    initial: str,
    reverse: bool,
    tap: Layer | None,
    unroll: int,
) -> Layer:
    who = cell.who
    check.positive(who, width=width, unroll=unroll)
    check.choice(who, ("zeros", "learned"), initial=initial)
    kernel_init, recurrent_init, bias_init = map(initializers.get, (kernel_init, recurrent_init, bias_init))
    refusal = f"{who}: reverse=True needs the whole sequence at once; decode with forward layers" if reverse else ""

    def init(key, spec):
        values, _ = sequence(who, as_spec(spec))
        kernel_key, bias_key, *keys = jax.random.split(key, 2 + cell.gates)
        dtype = statistics_dtype(values.dtype)
        params = {
            "kernel": kernel_init(kernel_key, (values.shape[-1], cell.gates * width), dtype),
            "recurrent_kernel": jnp.concatenate([recurrent_init(k, (width, width), dtype) for k in keys], axis=1),
            **cell.biases(bias_key, bias_init, cell.gates * width, dtype),
        }
        if initial == "learned":
            params["initial"] = {name: jnp.zeros(width, dtype) for name in cell.carried}
        state = memory.empty([(name, (width,)) for name in cell.carried], refusal=refusal)
        if tap is None:
            return params, state
        hidden = jax.ShapeDtypeStruct((values.shape[0], width), values.dtype)
        tap_params, taps = jax.vmap(tap.init, (0, None))(jax.random.split(key, values.shape[1]), hidden)
        if jax.tree.leaves(tap_params):
            raise ValueError(
                f"{who}: what taps the hidden state must have no parameters, got {check.describe(tap_params)}"
            )
        return params, {"memory": state, "tap": Branch(Stacked(taps))}

    def apply(params, state, x, *, key=None, train=False, axis_name=None):
        x = as_arrays(x)
        values, mask = sequence(who, x)
        d = params["kernel"].shape[0]
        if values.shape[-1] != d:
            raise ValueError(f"{who}: the input's last axis must be {d}, as at init, got {check.describe(values)}")
        remembered, taps = (state, None) if tap is None else (state["memory"], state["tap"].inner.blocks)
        narrow = jax.tree.map(lambda p: p.astype(values.dtype), params)
        carry = _first(cell, remembered, narrow, values, width)
        fed = jnp.swapaxes(values @ narrow["kernel"] + narrow["bias"], 0, 1)

        def body(carry, now):
            fed, real, tapped = now
            new = cell.step(narrow, carry, fed)
            if real is not None:
                new = tuple(jnp.where(real[:, None], a, b) for a, b in zip(new, carry, strict=True))
            if tap is not None:
                # Of a padded sequence the tap sees one of length 1, so that held states do not count.
                seen = new[0] if real is None else Masked(new[0][:, None], real[:, None])
                h, tapped = tap.apply((), tapped, seen, key=key, train=train, axis_name=axis_name)
                new = (h.values[:, 0] if isinstance(h, Masked) else h, *new[1:])
            return new, (new[0] if real is None else jnp.where(real[:, None], new[0], 0), tapped)

        if tap is not None and (steps := jax.tree.leaves(taps)[0].shape[0]) != values.shape[1]:
            raise ValueError(f"{who}: its taps were built for {steps} steps, got {check.describe(values)}")
        real = None if mask is None else mask.T
        carry, (ys, taps) = jax.lax.scan(
            body, carry, (fed, real, taps), reverse=reverse, unroll=max(1, min(unroll, values.shape[1]))
        )
        if remembered.started:
            held = {n: a.astype(remembered.held[n].dtype) for n, a in zip(cell.carried, carry, strict=True)}
            remembered = memory.advance(remembered, held, values.shape[1], mask)
        y = like(x, jnp.swapaxes(ys, 0, 1))
        return y, remembered if tap is None else {"memory": remembered, "tap": Branch(Stacked(taps))}

    return Layer(init, apply)


def _first(cell: _Cell, remembered: Any, params: Any, values: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """The carry before the first step: where the last piece left it, the learned value, or zero."""
    shape, start = (values.shape[0], width), params.get("initial", {})
    zero = jnp.zeros((), values.dtype)
    carry = [jnp.broadcast_to(start.get(name, zero), shape) for name in cell.carried]
    if remembered.started:
        if (batch := remembered.seen.shape[0]) != shape[0]:
            raise ValueError(f"{cell.who}: memory was started for a batch of {batch}, got {check.describe(values)}")
        fresh = (remembered.seen == 0)[:, None]
        carry = [jnp.where(fresh, a, remembered.held[n]) for n, a in zip(cell.carried, carry, strict=True)]
    # The cell's content is a sum over time: it keeps float32 under bfloat16 inputs.
    dtypes = [values.dtype, statistics_dtype(values.dtype)]
    return tuple(a.astype(dtype) for a, dtype in zip(carry, dtypes, strict=False))
