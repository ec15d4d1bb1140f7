"""Images, volumes and signals, channels last: convolutions and pools in one, two and three dimensions."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check
from fnn.core import Layer, stateless
from fnn.layers import initializers
from fnn.layers.dense import product
from fnn.layers.inputs import Masked, sequence
from fnn.tree import statistics_dtype

Window = int | Sequence[int]
Padding = str | int | Sequence[int | tuple[int, int]]
IMPLEMENTATIONS = ("patches", "turned", "xla")
FEW = 32
"""Numbers in a patch up to which a product of patches was faster than a convolution on a CPU."""
COMPARED = 16
"""Numbers in a window up to which a pool compares them one by one: an eighth of a conv net's step on a CPU."""
PATCHES_LIMIT = 1 << 28
"""Bytes of patches beyond which a convolution is left to XLA unless `implementation` asks for them."""
_LAYOUT = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def conv(
    channels: int,
    window: Window,
    *,
    stride: Window = 1,
    dilation: Window = 1,
    groups: int = 1,
    padding: Padding = "same",
    kernel_init: str | Callable[..., Any] = "lecun_normal",
    bias_init: str | Callable[..., Any] = "zeros",
    bias: bool = True,
    implementation: str | None = None,
) -> Layer:
    """Slide a window over the positions: y[p] = sum_q x[stride·p + dilation·q - pad] W[q] + b (a cross-correlation).

    x: float[batch, *positions, c] with one to three axes of positions -> float[batch, *positions, channels]; params:
    kernel float[*window, c/groups, channels], bias float[channels]. One number stands for all axes.

    `padding`: "same" (zeros; positions/stride, rounded up), "valid" (none), "circular" (wraps around; sizes as "same"),
    a number of zeros on either side, or one number or pair (before, after) for each axis. With groups, output channels
    g·channels/groups and on see input channels g·c/groups and on; depthwise is groups = c.

    `implementation`: "xla" is XLA's own convolution, whose gradients inside a loop (`repeat`, `fit`, a study) take a CPU 10
    to 100 times as long as outside; "turned" the same convolution with gradients that do not; "patches" one product of
    the window's patches with the kernel (Chellapilla et al. 2006), made anew in the backward pass of a loop. On a CPU
    None takes patches where they are small (at most `FEW` numbers), and for strides and groups up to `PATCHES_LIMIT`
    bytes of them; else turned. Elsewhere None is "xla".

    Errors: ValueError for channels that groups do not divide, and for a window larger than the padded input.
    """
    who = "conv"
    check.positive(who, channels=channels, groups=groups)
    _check_windows(who, window=window, stride=stride, dilation=dilation)
    if implementation is not None:
        check.choice(who, IMPLEMENTATIONS, implementation=implementation)
    _check_padding(who, padding, ("same", "valid", "circular"))
    kernel_init, bias_init = initializers.get(kernel_init), initializers.get(bias_init)
    if channels % groups:
        raise ValueError(f"{who}: groups must divide the output channels, got {groups} groups and {channels} channels")

    def init(key, spec):
        sizes = _image(who, spec)
        c = spec.shape[-1]
        if c % groups:
            raise ValueError(f"{who}: groups must divide the input channels, got {groups} and {check.describe(spec)}")
        window_ = _each(who, window, sizes, "window")
        return _params(
            key, (*window_, c // groups, channels), statistics_dtype(spec.dtype), kernel_init, bias_init, bias
        )

    def apply(params, x):
        kernel = params["kernel"]
        sizes = _image(who, x, kernel.ndim - 2)
        _channels(who, x, kernel.shape[-2] * groups)
        strides, dilations = _each(who, stride, sizes, "stride"), _each(who, dilation, sizes, "dilation")
        reach = [(w - 1) * d + 1 for w, d in zip(kernel.shape, dilations, strict=False)]
        pads = _pads(who, padding, sizes, reach, strides)
        if padding == "circular":
            x, pads = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="wrap"), [(0, 0)] * len(sizes)
        _fits(who, x, reach, pads)
        y = _slide(x, kernel.astype(x.dtype), strides, pads, dilations, groups=groups, implementation=implementation)
        return y + params["bias"].astype(x.dtype) if bias else y

    return stateless(init, apply)


def conv_transpose(
    channels: int,
    window: Window,
    *,
    stride: Window = 1,
    padding: Padding = "same",
    kernel_init: str | Callable[..., Any] = "lecun_normal",
    bias_init: str | Callable[..., Any] = "zeros",
    bias: bool = True,
    implementation: str | None = None,
) -> Layer:
    """Slide a window over positions that stand `stride` apart, zeros between them: sizes grow by the stride.

    x: float[batch, *positions, c] -> float[batch, *positions, channels]; params as of `conv`. With "same" sizes become
    positions·stride, with "valid" positions·stride + max(window - stride, 0); a number pads the spread-out input by
    that many zeros on either side: (positions - 1)·stride + 2·padding + 2 - window. The kernel is not mirrored, as in Flax.
    `implementation` as in `conv`. Source: Dumoulin and Visin 2016, section 4.
    """
    who = "conv_transpose"
    check.positive(who, channels=channels)
    _check_windows(who, window=window, stride=stride)
    if implementation is not None:
        check.choice(who, IMPLEMENTATIONS, implementation=implementation)
    _check_padding(who, padding, ("same", "valid"))
    kernel_init, bias_init = initializers.get(kernel_init), initializers.get(bias_init)

    def init(key, spec):
        window_ = _each(who, window, _image(who, spec), "window")
        shape = (*window_, spec.shape[-1], channels)
        return _params(key, shape, statistics_dtype(spec.dtype), kernel_init, bias_init, bias)

    def apply(params, x):
        kernel = params["kernel"]
        sizes = _image(who, x, kernel.ndim - 2)
        _channels(who, x, kernel.shape[-2])
        strides, rank = _each(who, stride, sizes, "stride"), len(sizes)
        if isinstance(padding, str):
            pads = [_transpose_pads(padding, w, s) for w, s in zip(kernel.shape, strides, strict=False)]
        else:
            pads = _pads(who, padding, sizes, kernel.shape, strides)
            spread = [(n - 1) * s + 1 for n, s in zip(sizes, strides, strict=True)]
            _fits(who, jax.ShapeDtypeStruct((x.shape[0], *spread, x.shape[-1]), x.dtype), kernel.shape[:rank], pads)
        ones = (1,) * rank
        y = _slide(x, kernel.astype(x.dtype), ones, pads, ones, spread=strides, implementation=implementation)
        return y + params["bias"].astype(x.dtype) if bias else y

    return stateless(init, apply)


def max_pool(window: Window, *, stride: Window | None = None, padding: Padding = "valid") -> Layer:
    """Take the largest number under each window: float[batch, *positions, c] -> the same with fewer positions.

    `stride` is the window by default; padding as in `conv` (no "circular"), with -inf, which never wins. The gradient
    goes to the first of equals.
    """
    return _pool("max_pool", window, stride, padding, _largest)


def avg_pool(window: Window, *, stride: Window | None = None, padding: Padding = "valid") -> Layer:
    """Average the numbers under each window: float[batch, *positions, c] -> the same with fewer positions.

    Padding does not count: at the border the mean is that of the numbers that are there (Flax's count_include_pad=False).
    """

    def average(x, *args):
        ones = jnp.ones((1, *x.shape[1:-1], 1), x.dtype)
        return _reduce(x, 0.0, jax.lax.add, *args) / _reduce(ones, 0.0, jax.lax.add, *args)

    return _pool("avg_pool", window, stride, padding, average)


def global_avg_pool() -> Layer:
    """Average over all positions: float[batch, *positions, c] -> float[batch, c].

    Of a `Masked` sequence only real positions count; an example without any gives 0.
    """

    def apply(params, x):
        if not isinstance(x, Masked):
            sizes = _image("global_avg_pool", x)
            return jnp.mean(x, axis=tuple(range(1, 1 + len(sizes))))
        values, mask = sequence("global_avg_pool", x)
        wide = values.astype(statistics_dtype(values.dtype))
        count = jnp.maximum(1, jnp.sum(mask, axis=1, keepdims=True))
        return (jnp.sum(wide, axis=1) / count.astype(wide.dtype)).astype(values.dtype)

    return stateless(lambda key, spec: (), apply)


def _slide(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilations: Sequence[int],
    *,
    groups: int = 1,
    spread: Sequence[int] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Correlate float[batch, *positions, c] with float[*window, c/groups, channels]; `spread` puts x that far apart."""
    window, (c, channels) = kernel.shape[:-2], kernel.shape[-2:]
    spread = spread or (1,) * len(window)
    padded = [(n - 1) * far + 1 + sum(pad) for n, far, pad in zip(x.shape[1:-1], spread, pads, strict=True)]
    sizes = [(n - (w - 1) * d - 1) // s + 1 for n, w, d, s in zip(padded, window, dilations, strides, strict=True)]
    if implementation is None:
        patch = math.prod(window) * x.shape[-1]
        small = x.shape[0] * math.prod(sizes) * patch * x.dtype.itemsize <= PATCHES_LIMIT
        plain = groups == 1 and {*strides, *spread} == {1}
        implementation = "turned" if plain and (patch > FEW or not small) else "patches" if small else "xla"
        implementation = implementation if jax.default_backend() == "cpu" else "xla"

    layout = _LAYOUT[len(window)]

    def xla(x, kernel, layout=layout):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            pads,
            lhs_dilation=spread,
            rhs_dilation=dilations,
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    if implementation == "xla":
        return xla(x, kernel)
    if implementation == "turned":
        return _turned(xla, len(window))(x, kernel)

    # The backward pass of a loop keeps x and makes its patches anew; outside of loops XLA may find the two alike.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_patches(x, kernel):
        edges = [(*pad, far - 1) for pad, far in zip(pads, spread, strict=True)]
        x, shifted = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)]), []
        for place in itertools.product(*map(range, window)):
            first = [i * d for i, d in zip(place, dilations, strict=True)]
            last = [f + (n - 1) * s + 1 for f, n, s in zip(first, sizes, strides, strict=True)]
            shifted.append(jax.lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), (1, *strides, 1)))
        if groups == 1:
            return product(jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, channels))
        patches = jnp.concatenate([piece.reshape(*piece.shape[:-1], groups, c) for piece in shifted], axis=-1)
        y = jnp.einsum("...gi,igo->...go", patches, kernel.reshape(-1, groups, channels // groups))
        return y.reshape(*y.shape[:-2], channels)

    return of_patches(x, kernel)


def _turned(xla: Any, axes: int) -> Any:
    """Give a convolution tangents whose transposes are convolutions in the layout that XLA runs fast inside of loops.

    The backward pass convolves dy with the kernel, and x with dy, examples in the place of channels. JAX's own leaves the
    arrays as they lie and names their axes otherwise, which XLA on a CPU puts in order outside of loops alone.
    """
    space = "DHW"[-axes:]
    layouts = (f"N{space}C", f"{space}OI", f"N{space}C"), (f"C{space}N", f"I{space}O", f"{space}NC")
    run = jax.custom_jvp(lambda x, kernel: xla(x, kernel))

    @run.defjvp
    def tangents(primals, tangents):
        (x, kernel), (dx, d_kernel) = primals, tangents
        last = axes + 1
        by_x = xla(dx, jnp.swapaxes(kernel, axes, last), layouts[0])
        by_kernel = xla(jnp.swapaxes(x, 0, last), jnp.moveaxis(d_kernel, axes, 0), layouts[1])
        return xla(*primals), by_x + jnp.moveaxis(by_kernel, axes, 0)

    return run


def _pool(who: str, window: Window, stride: Window | None, padding: Padding, pool: Callable[..., Any]) -> Layer:
    _check_windows(who, window=window, stride=window if stride is None else stride)
    _check_padding(who, padding, ("same", "valid"))

    def apply(params, x):
        sizes = _image(who, x)
        window_ = _each(who, window, sizes, "window")
        strides = window_ if stride is None else _each(who, stride, sizes, "stride")
        pads = _pads(who, padding, sizes, window_, strides)
        for (low, high), w in zip(pads, window_, strict=True):
            if max(low, high) >= w:
                raise ValueError(f"{who}: padding must be smaller than the window, got {(low, high)} and {w}")
        _fits(who, x, window_, pads)
        return pool(x, window_, strides, pads)

    return stateless(lambda key, spec: (), apply)


def _largest(x: jax.Array, window: Any, strides: Any, pads: Any) -> jax.Array:
    """Compare the numbers of small windows that lie side by side one after the other, which XLA fuses; it reduces others."""
    if tuple(window) != tuple(strides) or any(map(any, pads)) or math.prod(window) > COMPARED:
        return _reduce(x, -np.inf, jax.lax.max, window, strides, pads)
    counts = [size // w for size, w in zip(x.shape[1:], window, strict=False)]
    x = x[:, *(slice(n * w) for n, w in zip(counts, window, strict=True))]
    x = x.reshape(len(x), *(a for pair in zip(counts, window, strict=True) for a in pair), x.shape[-1])
    first, *rest = (
        x[:, *(a for i in place for a in (slice(None), i))] for place in itertools.product(*map(range, window))
    )
    for other in rest:  # not `maximum`, whose gradient two equals share
        first = jnp.where((other > first) | jnp.isnan(other), other, first)
    return first


def _reduce(x: jax.Array, start: float, operation: Any, window: Any, strides: Any, pads: Any) -> jax.Array:
    full = (1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0))
    return jax.lax.reduce_window(x, np.asarray(start, x.dtype), operation, *full)


def _params(key: Any, shape: Any, dtype: Any, kernel_init: Any, bias_init: Any, bias: bool) -> dict[str, jax.Array]:
    kernel_key, bias_key = jax.random.split(key)
    params = {"kernel": kernel_init(kernel_key, shape, dtype)}
    return params | {"bias": bias_init(bias_key, shape[-1:], dtype)} if bias else params


def _image(who: str, x: Any, rank: int | None = None) -> tuple[int, ...]:
    """Return the sizes of the axes of positions."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{who}: the input must be one floating point array, got {check.describe(x)}; cast it first")
    if len(x.shape) not in ((3, 4, 5) if rank is None else (rank + 2,)):
        rule = "one to three axes of positions" if rank is None else f"{rank} axes of positions, as at init"
        raise ValueError(f"{who}: the input must be float[batch, *positions, c] with {rule}, got {check.describe(x)}")
    return tuple(x.shape[1:-1])


def _channels(who: str, x: Any, c: int) -> None:
    if x.shape[-1] != c:
        raise ValueError(f"{who}: the input must have {c} channels, as at init, got {check.describe(x)}")


def _each(who: str, value: Window, sizes: Sequence[int], name: str) -> tuple[int, ...]:
    """Write one number out for every axis of positions."""
    values = tuple(value) if isinstance(value, Sequence) else (int(value),) * len(sizes)
    if len(values) != len(sizes):
        raise ValueError(f"{who}: {name} must have one number for each of {len(sizes)} axes of positions, got {values}")
    return values


def _pads(who: str, padding: Any, sizes: Any, reach: Any, strides: Any) -> list[tuple[int, int]]:
    """Return (before, after) for every axis of positions, "same" and "circular" with the odd one after."""
    if padding == "valid":
        return [(0, 0)] * len(sizes)
    if isinstance(padding, str):
        totals = [max(0, (math.ceil(n / s) - 1) * s + r - n) for n, s, r in zip(sizes, strides, reach, strict=False)]
        return [(total // 2, total - total // 2) for total in totals]
    values = list(padding) if isinstance(padding, Sequence) else [padding] * len(sizes)
    if len(values) != len(sizes):
        raise ValueError(f"{who}: padding must have one entry for each of {len(sizes)} axes of positions, got {values}")
    return [(int(v[0]), int(v[1])) if isinstance(v, Sequence) else (int(v), int(v)) for v in values]


def _transpose_pads(padding: str, window: int, stride: int) -> tuple[int, int]:
    """Return the zeros around the spread-out input: those that undo a `conv` of the same name and stride."""
    total = window + stride - 2 + (max(window - stride, 0) if padding == "valid" else 0)
    before = window - 1 if padding == "valid" or stride > window - 1 else math.ceil(total / 2)
    return before, total - before


def _fits(who: str, x: Any, reach: Sequence[int], pads: Sequence[tuple[int, int]]) -> None:
    padded = [n + low + high for n, (low, high) in zip(x.shape[1:-1], pads, strict=True)]
    if any(r > n for r, n in zip(reach, padded, strict=True)):
        raise ValueError(
            f"{who}: the window must fit into the padded input, got {tuple(reach)} (with its dilation) and "
            f"{tuple(padded)}; pad more, or pool less before"
        )


def _check_windows(who: str, **values: Window) -> None:
    for name, value in values.items():
        for number in value if isinstance(value, tuple | list) else (value,):
            check.positive(who, **{name: number})


def _check_padding(who: str, padding: Any, names: Sequence[str]) -> None:
    if isinstance(padding, str):
        check.choice(who, names, padding=padding)
        return
    for entry in padding if isinstance(padding, tuple | list) else (padding,):
        pair = entry if isinstance(entry, tuple | list) else (entry, entry)
        if len(pair) != 2:
            raise ValueError(f"{who}: padding must be a name, a number, or numbers or pairs, got {padding!r}")
        check.non_negative(who, padding=pair[0])
        check.non_negative(who, padding=pair[1])
