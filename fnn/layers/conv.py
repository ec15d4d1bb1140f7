"""Images, volumes and signals, channels last: convolutions and pools in one, two and three dimensions."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, lowering
from fnn.core import Layer, described, stateless
from fnn.layers import initializers
from fnn.layers.dense import Mirrored, product
from fnn.layers.inputs import Masked, sequence
from fnn.layers.memory import whole_sequence
from fnn.tree import statistics_dtype

Window = int | Sequence[int]
Padding = str | int | Sequence[int | tuple[int, int]]
IMPLEMENTATIONS = ("patches", "turned", "xla")
_LAYOUT = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@described
def conv(
    channels: int,
    window: Window,
    *,
    stride: Window = 1,
    dilation: Window = 1,
    groups: int = 1,
    padding: Padding = "same",
    kernel_init: str | initializers.Initializer = "lecun_normal",
    bias_init: str | initializers.Initializer = "zeros",
    bias: bool = True,
    implementation: str | None = None,
) -> Layer:
    """Slide a window over the positions: y[p] = sum_q x[stride·p + dilation·q - pad] W[q] + b (a cross-correlation).

    x: float[batch, *positions, c], one to three axes of positions -> float[batch, *positions, channels]; params: kernel
    float[*window, c/groups, channels], bias float[channels]. `window`, `stride` and `dilation` are one number for all
    axes, or one for each. Many parameters: each is a property of the layer by itself.

    `padding`: "same" (zeros; positions/stride, rounded up), "valid" (none), "circular" (wraps around; sizes as "same"),
    a number of zeros on either side, or one number or pair (before, after) for each axis. With groups, output channels
    g·channels/groups and on see input channels g·c/groups and on; depthwise is groups = c.

    `implementation` chooses between ways that compute the same: "xla" is XLA's own convolution, whose gradient takes 10
    to 100 times as long inside a loop (`repeat`, `fit`, a study) as outside on a CPU; "turned" the same with a gradient
    that does not; "patches" one product of the window's patches with the kernel (Chellapilla et al. 2006), made anew in
    the backward pass. None takes the fastest for the platform and the shapes: `lowering.convolution`.

    Errors: ValueError for channels that groups do not divide, and for a window larger than the padded input.
    """
    who = "conv"
    check.positive(who, channels=channels, groups=groups)
    _check(who, padding, ("same", "valid", "circular"), implementation, window=window, stride=stride, dilation=dilation)
    if channels % groups:
        raise ValueError(f"{who}: groups must divide the output channels, got {groups} groups and {channels} channels")

    def slide(x, kernel):
        sizes = x.shape[1:-1]
        strides, dilations = _each(who, stride, sizes, "stride"), _each(who, dilation, sizes, "dilation")
        reach = [(w - 1) * d + 1 for w, d in zip(kernel.shape, dilations, strict=False)]
        pads = _pads(who, padding, sizes, reach, strides)
        if padding == "circular" and 0 not in sizes:
            x, pads = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="wrap"), [(0, 0)] * len(sizes)
        _fits(who, x.shape[1:-1], reach, pads)
        return _correlate(x, kernel, _How(strides, pads, dilations, (1,) * len(sizes), groups), implementation)

    layer = _with_kernel(who, slide, (channels, window, groups), (kernel_init, bias_init if bias else None))
    return layer if {*np.ravel(window), *np.ravel(stride)} == {1} else whole_sequence(who, layer)


@described
def conv_transpose(
    channels: int,
    window: Window,
    *,
    stride: Window = 1,
    padding: Padding = "same",
    kernel_init: str | initializers.Initializer = "lecun_normal",
    bias_init: str | initializers.Initializer = "zeros",
    bias: bool = True,
    implementation: str | None = None,
) -> Layer:
    """Slide a window over positions that stand `stride` apart, zeros between them: sizes grow by the stride.

    x: float[batch, *positions, c] -> float[batch, *positions, channels]; params as of `conv`. With "same" sizes become
    positions·stride, with "valid" positions·stride + max(window - stride, 0); a number pads the spread-out input by
    that many zeros on either side: (positions - 1)·stride + 2·padding + 2 - window. The kernel is not mirrored, as in Flax.
    All other parameters are those of `conv`. Source: Dumoulin and Visin 2016, section 4.
    """
    check.positive(who := "conv_transpose", channels=channels)
    _check(who, padding, ("same", "valid"), implementation, window=window, stride=stride)

    def slide(x, kernel):
        sizes, window = x.shape[1:-1], kernel.shape[:-2]
        strides, ones = _each(who, stride, sizes, "stride"), (1,) * len(sizes)
        if isinstance(padding, str):
            pads = [_transpose_pads(padding, w, s) for w, s in zip(window, strides, strict=True)]
        else:
            pads = _pads(who, padding, sizes, window, strides)
            _fits(who, [(n - 1) * s + 1 for n, s in zip(sizes, strides, strict=True)], window, pads)
        return _correlate(x, kernel, _How(ones, pads, ones, strides), implementation)

    inner = _with_kernel(who, slide, (channels, window, 1), (kernel_init, bias_init if bias else None))
    return whole_sequence(who, inner, Mirrored)


@described
def max_pool(window: Window, *, stride: Window | None = None, padding: Padding = "valid") -> Layer:
    """Take the largest number under each window: float[batch, *positions, c] -> the same with fewer positions.

    `stride` is the window by default; padding as in `conv` (no "circular"), with -inf, which never wins. The gradient
    goes to the first of equals.
    """
    return _pool("max_pool", window, stride, padding, _largest)


@described
def avg_pool(window: Window, *, stride: Window | None = None, padding: Padding = "valid") -> Layer:
    """Average the numbers under each window: float[batch, *positions, c] -> the same with fewer positions.

    Padding does not count: at the border only the numbers of the input are averaged (Flax's count_include_pad=False).
    """

    def average(x, *args):
        ones = jnp.ones((1, *x.shape[1:-1], 1), x.dtype)
        return _reduce(x, 0.0, jax.lax.add, *args) / _reduce(ones, 0.0, jax.lax.add, *args)

    return _pool("avg_pool", window, stride, padding, average)


@described
def global_avg_pool() -> Layer:
    """Average over all positions: float[batch, *positions, c] -> float[batch, c].

    Of a `Masked` sequence only real positions count; an example without any position gives 0.
    """

    def apply(params, x):
        if not isinstance(x, Masked):
            axes = tuple(range(1, 1 + len(_image("global_avg_pool", x))))
            return jnp.mean(x, axis=axes) if x.size else jnp.zeros((x.shape[0], x.shape[-1]), x.dtype)
        values, mask = sequence("global_avg_pool", x)
        wide = values.astype(statistics_dtype(values.dtype))
        count = jnp.maximum(1, jnp.sum(mask, axis=1, keepdims=True))
        return (jnp.sum(wide, axis=1) / count.astype(wide.dtype)).astype(values.dtype)

    return whole_sequence("global_avg_pool", stateless(lambda key, spec: (), apply))


def _with_kernel(who: str, slide: Callable[..., Any], sizes: Any, inits: Any) -> Layer:
    """Make a layer of `slide(x, kernel)`; sizes are (channels, window, groups), inits of the kernel and of a bias or None."""
    channels, window, groups = sizes
    kernel_init, bias_init = initializers.get(inits[0]), None if inits[1] is None else initializers.get(inits[1])

    def init(key, spec):
        full, c = _each(who, window, _image(who, spec), "window"), spec.shape[-1]
        if c % groups:
            raise ValueError(f"{who}: groups must divide the input channels, got {groups} and {check.describe(spec)}")
        (kernel_key, bias_key), dtype = jax.random.split(key), statistics_dtype(spec.dtype)
        params = {"kernel": kernel_init(kernel_key, (*full, c // groups, channels), dtype)}
        return params if bias_init is None else params | {"bias": bias_init(bias_key, (channels,), dtype)}

    def apply(params, x):
        kernel = params["kernel"]
        _image(who, x, kernel.ndim - 2)
        if x.shape[-1] != kernel.shape[-2] * groups:
            c = kernel.shape[-2] * groups
            raise ValueError(f"{who}: the input must have {c} channels, as at init, got {check.describe(x)}")
        y = slide(x, kernel.astype(x.dtype))
        return y + params["bias"].astype(x.dtype) if "bias" in params else y

    return stateless(init, apply)


@dataclass(frozen=True)
class _How:
    """How a window slides over the positions: one entry for each of their axes."""

    strides: Sequence[int]
    pads: Sequence[tuple[int, int]]
    dilations: Sequence[int]
    spread: Sequence[int]
    """How far apart the positions of the input are put, zeros between them."""
    groups: int = 1


def _correlate(x: jax.Array, kernel: jax.Array, how: _How, implementation: str | None) -> jax.Array:
    """Correlate float[batch, *positions, c] with float[*window, c/groups, channels]."""
    window = kernel.shape[:-2]
    padded = [(n - 1) * far + 1 + sum(pad) for n, far, pad in zip(x.shape[1:-1], how.spread, how.pads, strict=True)]
    reach = [(w - 1) * d + 1 for w, d in zip(window, how.dilations, strict=True)]
    sizes = [(n - r) // s + 1 for n, r, s in zip(padded, reach, how.strides, strict=True)]
    patch = math.prod(window) * x.shape[-1]
    size = math.prod(sizes) * patch * x.dtype.itemsize
    if implementation is None:
        strided = {*how.strides, *how.spread} != {1}
        shapes = kernel.shape[-2], len(window), patch, len(x) * size
        implementation = lowering.convolution(strided, how.groups, *shapes)
    if implementation != "patches":
        options = {"lhs_dilation": how.spread, "rhs_dilation": how.dilations, "feature_group_count": how.groups}
        xla = functools.partial(jax.lax.conv_general_dilated, window_strides=how.strides, padding=how.pads, **options)
        turned, layout = _turned(xla, len(window)), _LAYOUT[len(window)]
        return turned(x, kernel) if implementation == "turned" else xla(x, kernel, dimension_numbers=layout)

    # A loop's backward pass keeps x and makes its patches again; outside of loops XLA may find the two alike.
    of_patches = jax.checkpoint(functools.partial(_of_patches, how, sizes), prevent_cse=False)
    at_a_time = max(1, lowering.PATCHES // max(1, size))
    if len(x) <= at_a_time:
        return of_patches(x, kernel)
    return jax.lax.map(lambda example: of_patches(example[None], kernel)[0], x, batch_size=at_a_time)


def _of_patches(how: _How, sizes: Sequence[int], x: jax.Array, kernel: jax.Array) -> jax.Array:
    edges = [(*pad, far - 1) for pad, far in zip(how.pads, how.spread, strict=True)]
    x, shifted = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)]), []
    for place in itertools.product(*map(range, kernel.shape[:-2])):
        first = [i * d for i, d in zip(place, how.dilations, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, sizes, how.strides, strict=True)]
        shifted.append(jax.lax.slice(x, (0, *first, 0), (len(x), *last, x.shape[-1]), (1, *how.strides, 1)))
    (c, channels), groups = kernel.shape[-2:], how.groups
    if groups == 1:
        return product(jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, channels))
    patches = jnp.concatenate([piece.reshape(*piece.shape[:-1], groups, c) for piece in shifted], axis=-1)
    y = jnp.einsum("...gi,igo->...go", patches, kernel.reshape(-1, groups, channels // groups))
    return y.reshape(*y.shape[:-2], channels)


def _turned(xla: Any, axes: int) -> Any:
    """Give a convolution a derivative whose convolutions have the layout that XLA runs fast inside loops.

    The backward pass convolves dy with the kernel, and x with dy with examples in the place of channels. JAX's own leaves
    the arrays in place and renames their axes; XLA on a CPU transposes them outside of loops only.
    """
    space, last = "DHW"[-axes:], axes + 1
    layouts = (f"N{space}C", f"{space}OI", f"N{space}C"), (f"C{space}N", f"I{space}O", f"{space}NC")
    run = jax.custom_jvp(functools.partial(xla, dimension_numbers=_LAYOUT[axes]))

    @run.defjvp
    def tangents(primals, tangents):
        (x, kernel), (dx, d_kernel) = primals, tangents
        by_x = xla(dx, jnp.swapaxes(kernel, axes, last), dimension_numbers=layouts[0])
        by_kernel = xla(jnp.swapaxes(x, 0, last), jnp.moveaxis(d_kernel, axes, 0), dimension_numbers=layouts[1])
        return run(x, kernel), by_x + jnp.moveaxis(by_kernel, axes, 0)

    return run


def _pool(who: str, window: Window, stride: Window | None, padding: Padding, pool: Callable[..., Any]) -> Layer:
    _check(who, padding, ("same", "valid"), window=window, stride=window if stride is None else stride)

    def apply(params, x):
        sizes = _image(who, x)
        window_ = _each(who, window, sizes, "window")
        strides = window_ if stride is None else _each(who, stride, sizes, "stride")
        pads = _pads(who, padding, sizes, window_, strides)
        for (low, high), w in zip(pads, window_, strict=True):
            if max(low, high) >= w:
                raise ValueError(f"{who}: padding must be smaller than the window, got {(low, high)} and {w}")
        _fits(who, sizes, window_, pads)
        return pool(x, window_, strides, pads)

    return whole_sequence(who, stateless(lambda key, spec: (), apply))


def _largest(x: jax.Array, window: Any, strides: Any, pads: Any) -> jax.Array:
    """Take the largest number under each window. Small windows side by side are compared number by number, which XLA fuses."""
    if tuple(window) != tuple(strides) or any(map(any, pads)) or math.prod(window) > lowering.COMPARED:
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


def _image(who: str, x: Any, rank: int | None = None) -> tuple[int, ...]:
    """Return the sizes of the axes of positions."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{who}: the input must be one floating point array, got {check.describe(x)}; cast it first")
    if len(x.shape) not in ((3, 4, 5) if rank is None else (rank + 2,)):
        rule = "one to three axes of positions" if rank is None else f"{rank} axes of positions, as at init"
        raise ValueError(f"{who}: the input must be float[batch, *positions, c] with {rule}, got {check.describe(x)}")
    return tuple(x.shape[1:-1])


def _each(who: str, value: Window, sizes: Sequence[int], name: str) -> tuple[int, ...]:
    """Write one number out for every axis of positions."""
    values = tuple(value) if isinstance(value, Sequence) else (int(value),) * len(sizes)
    if len(values) != len(sizes):
        raise ValueError(f"{who}: {name} must have one number for each of {len(sizes)} axes of positions, got {values}")
    return values


def _pads(who: str, padding: Any, sizes: Any, reach: Any, strides: Any) -> list[tuple[int, int]]:
    """Return (before, after) for every axis of positions, "same" and "circular" with the odd one after."""
    if isinstance(padding, str):
        return jax.lax.padtype_to_pads(sizes, reach[: len(sizes)], strides, "VALID" if padding == "valid" else "SAME")
    values = list(padding) if isinstance(padding, Sequence) else [padding] * len(sizes)
    if len(values) != len(sizes):
        raise ValueError(f"{who}: padding must have one entry for each of {len(sizes)} axes of positions, got {values}")
    return [(int(v[0]), int(v[1])) if isinstance(v, Sequence) else (int(v), int(v)) for v in values]


def _transpose_pads(padding: str, window: int, stride: int) -> tuple[int, int]:
    """Return the zeros around the spread-out input: those that undo a `conv` of the same name and stride."""
    total = window + stride - 2 + (max(window - stride, 0) if padding == "valid" else 0)
    before = window - 1 if padding == "valid" or stride > window - 1 else math.ceil(total / 2)
    return before, total - before


def _fits(who: str, sizes: Sequence[int], reach: Sequence[int], pads: Sequence[tuple[int, int]]) -> None:
    padded = [n + low + high for n, (low, high) in zip(sizes, pads, strict=True)]
    if any(r > n for r, n in zip(reach, padded, strict=True)):
        raise ValueError(
            f"{who}: the window must fit into the padded input, got {tuple(reach)} (with its dilation) and {tuple(padded)}"
            "; pad more, or pool less before"
        )


def _check(who: str, padding: Any, names: Sequence[str], implementation: str | None = None, **windows: Window) -> None:
    for name, value in windows.items():
        for number in value if isinstance(value, tuple | list) else (value,):
            check.positive(who, **{name: number})
    if implementation is not None:
        check.choice(who, IMPLEMENTATIONS, implementation=implementation)
    if isinstance(padding, str):
        check.choice(who, names, padding=padding)
    for entry in () if isinstance(padding, str) else padding if isinstance(padding, tuple | list) else (padding,):
        pair = entry if isinstance(entry, tuple | list) else (entry, entry)
        if len(pair) != 2:
            raise ValueError(f"{who}: padding must be a name, a number, or numbers or pairs, got {padding!r}")
        for number in pair:
            check.non_negative(who, padding=number)
