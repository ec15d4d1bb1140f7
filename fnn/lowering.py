"""Choose the fastest of several ways to compute the same numbers: the one file that knows platforms and measurements.

Every choice is made while JAX traces, from the device that it uses by default (`jax.default_device`, else the default
backend), and changes speed and memory, and values only by rounding. A program that is lowered for another platform
(`jax.export`) is therefore right there too, and may be slower than one traced there; only attention by cuDNN, traced on a
GPU, runs nowhere else.

"CPU" at a constant means: measured on two cores of an Intel Xeon or AMD EPYC server, with JAX 0.10. No constant was tuned
on an accelerator; each says whether it counts there.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp

SMALL = 2**14
"""Numbers in an array up to which `tree.pack` joins it with others: starting a kernel for it costs more than copying it.
CPU; used on all platforms."""
UNROLLED = 16
"""Layers up to which the nets of `models` write their depth out: faster to run (10 % at 64 layers of width 128), slower to
compile. CPU; used on all platforms."""
FEW = 32
"""Numbers in a patch up to which a product of patches is faster than a convolution. CPU; others use XLA's convolutions."""
PATCHES = 1 << 28
"""Bytes of patches that a convolution makes at a time; beyond it takes the examples in turn. CPU, so that memory is enough
there; elsewhere only where `implementation="patches"` asks for them."""
COMPARED = 16
"""Numbers in a window up to which a max pool compares them one by one, which XLA fuses: it saved an eighth of a conv net's
step. CPU; used on all platforms."""
GRAM_SHARE = 0.25
"""One example's |G|² comes from Gram matrices over positions below this share of the operations that G itself takes. At
equal cost G is better: Gram matrices cancel badly in float32. CPU; used on all platforms."""
STORED_SHARE = 0.5
"""From this share on, at which G is at most twice as large as its factors, sums over examples use the G that |G|² has made
already. CPU; used on all platforms."""
CHUNK = 2**21
"""Numbers of all examples' G that are held at a time where only norms are asked for: 8 MiB of float32, about a core's cache.
CPU; see `chunk`."""
HELD = 2**28
"""The same elsewhere: 1 GiB of float32, so that memory is enough. Larger parts are larger products; not measured."""
LANES = 12 << 20
"""Bytes that the lanes of one `vmap` of a study may touch: about a core's cache. At depth 256 one lane after the other was
twice as fast as eight at once, at depth 4 half as fast. CPU; elsewhere half of the device's memory."""
ONE_BY_ONE = 4 << 30
"""Bytes that all runs of a study's cell may touch in all their steps, up to which they run one after the other: a program over
lanes takes 2 to 4 seconds longer to compile. CPU; elsewhere lanes always share a program."""
TILE = 64
"""Attention over whole tiles of so many positions is left to cuDNN, where it can compute it. Not measured: shorter sequences
are small products anyway, and cuDNN has not all lengths."""
FEW_CELLS = 4
"""Cells of a study from which on the command line starts worker processes, which takes seconds. CPU; elsewhere one process
always holds the device."""


def platform() -> str:
    """Name the platform of the device that JAX uses by default: "cpu", "gpu", "tpu", ..."""
    config: Any = jax.config
    device = config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def conditionals() -> bool:
    """Whether the program may wait for a number before it chooses what to compute next.

    On a CPU that costs nothing. An accelerator stands still meanwhile: there it is cheaper to compute what is right in
    both cases.
    """
    return platform() == "cpu"


def scatters() -> bool:
    """Whether the gradient of a label's logit is scattered into zeros, or each class is compared with the label.

    A CPU scatters in place: at 512 examples of 32,768 classes the loss and its gradient take two thirds of the time. For a
    GPU XLA makes three kernels of it that write an array as large as the logits in float32; a comparison is part of the
    softmax's own: 4 GiB a step less at 8,192 tokens and 32,768 classes in bfloat16, by XLA's program for an H200.
    """
    return platform() == "cpu"


def folds() -> bool:
    """Whether a sum over an axis takes a few entries at a time, of several arrays; see `gradients.reductions`.

    That is for a CPU. A GPU would start a kernel for each round: 393 for a step of `watch` on 8 layers, instead of 260.
    """
    return platform() == "cpu"


def devices() -> list[Any]:
    """List the devices that programs of this process run on: those of this host, or the one that JAX was told to use.

    That is `jax_default_device` (`jax.default_device`): a device, or the name of a platform, which means its first one.
    """
    config: Any = jax.config
    device = config.jax_default_device
    if device is None:
        return jax.local_devices()
    return jax.local_devices(backend=device)[:1] if isinstance(device, str) else [device]


def compiler_options(hasty: bool = False) -> dict[str, Any]:
    """Return compiler options for a program of an instrument, which compiles about as long as it runs; `hasty`: far longer.

    CPU: LLVM's level 1 takes a twentieth to a seventh off the compiling of a study's cells, a half off that of drawing
    weights. Seven kinds of nets ran in 0.87 to 1.02 of the time; drawn weights are the same to the bit. Level 0, for
    `hasty`: a training of 400 steps of an mlp compiles in 1.5 s instead of 2.6 s, and runs 1.7 times as long. Others: none.
    """
    if platform() != "cpu" or jax.config.read("jax_disable_most_optimizations"):  # level 0 was asked for already
        return {}
    return {"xla_backend_optimization_level": 0 if hasty else 1}


def worker_settings() -> tuple[dict[str, str], int | None]:
    """Say how a worker process comes to the same device: JAX settings, and the number of `jax_default_device`, if it is one.

    A worker for a CPU starts no other platform: on a GPU it would take most of the memory and not use it.
    """
    config: Any = jax.config
    device = config.jax_default_device
    number = (
        None if device is None or isinstance(device, str) else jax.local_devices(backend=device.platform).index(device)
    )
    return {"jax_platforms": "cpu"} if platform() == "cpu" else {}, number


def host() -> Any:
    """Return the CPU beside an accelerator; None, which stands for the default device, where JAX was started without one.

    `JAX_PLATFORMS=cuda` starts no CPU, and asking for it is an error.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def chunk() -> int:
    """Return how many numbers of all examples' G are held at a time; see `CHUNK`."""
    return CHUNK if platform() == "cpu" else HELD


def flat_products() -> bool:
    """Whether a layer's product over many axes is written as a product of two matrices; see `layers.dense.product`.

    That is for XLA on a CPU. Elsewhere the axes stay apart, so that a sequence may be sharded over batch and time.
    """
    return platform() == "cpu"


def convolution(strided: bool, groups: int, per_group: int, rank: int, patch: int, size: int) -> str:
    """Choose how to convolve: "patches", "turned" or "xla"; see `conv`.

    `per_group` is the input channels that an output channel sees, `rank` the axes of positions, `patch` the numbers in a
    patch, `size` the bytes of all patches. On a CPU XLA's own gradient takes 10 to 100 times as long inside a loop as
    outside, so that it is never used. Gradients by patches are faster than "turned" for strides (1.2 to 2 times, in three
    dimensions 20 times) and for groups of several channels (5 to 8 times); large ones are made in pieces, which takes 1.3
    times as long, more than "turned" for strides in one and two dimensions and for one channel a group.
    """
    if platform() != "cpu":
        return "xla"
    large = size > PATCHES
    if groups > 1:
        turned = large and per_group == 1 and not strided
    elif strided:
        turned = large and rank < 3
    else:
        turned = large or patch > FEW
    return "turned" if turned else "patches"


def attention(dtype: Any, grouped: bool, masked: bool, size: int, lengths: tuple[int, int]) -> str:
    """Choose how to attend: "cudnn", "written out" (four lines of `jax.numpy`) or "xla"; see `layers.attention`.

    `size` is that of a head, `lengths` those of queries and keys; `masked` means by anything but order, or order and a
    window. The two others are `jax.nn.dot_product_attention`, which
    has a kernel of its own only as "cudnn": for float16 and bfloat16, heads of up to 128 in steps of 8, and without a mask
    (it adds a mask to the scores, and computes a gradient for it). Its "xla" is the same products as written out, but maps
    over groups of heads, which is slower, and takes the gradient of numbers narrower than float32 in float32.
    """
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    whole = size % 8 == 0 and size <= 128 and not any(length % TILE for length in lengths)
    if platform() == "gpu" and narrow and whole and not masked:
        return "cudnn"
    return "xla" if grouped and dtype == jnp.float32 else "written out"


def lanes_budget(device: Any) -> int:
    """Return the bytes that the lanes of one `vmap` may touch on a device; see `LANES`."""
    if device.platform == "cpu":
        return LANES
    return ((device.memory_stats() or {}).get("bytes_limit", 8 << 30)) // 2


def side_by_side() -> bool:
    """Whether a few short trainings are lanes of one `vmap`, or use a program for one of them in turn.

    CPU: three trainings of a digits mlp took 0.121 s as lanes and 0.090 s in turn, with 0.5 s less of tracing and
    compiling; with ten layers 0.59 and 0.48 s; three of two spirals 0.31 and 0.32 s. Others: lanes, not measured.
    """
    return platform() != "cpu"


def one_by_one(device: Any, touched: int) -> bool:
    """Whether runs that touch so many bytes in all run one after the other; see `ONE_BY_ONE`."""
    return device.platform == "cpu" and touched < ONE_BY_ONE


def one_process(cells: int) -> bool:
    """Whether a study of so many cells runs in one process by default; see `FEW_CELLS`."""
    return platform() != "cpu" or cells < FEW_CELLS


def holds_the_device() -> bool:
    """Whether a process takes most of a device's memory when it starts, so that no second one finds enough.

    JAX does so on a GPU, unless one of two variables says otherwise: `XLA_PYTHON_CLIENT_PREALLOCATE=false` (take what is
    needed) or `XLA_PYTHON_CLIENT_MEM_FRACTION=.3`. A TPU belongs to one process in any case.
    """
    if platform() == "cpu":
        return False
    shared = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("0", "false")
    return platform() != "gpu" or not (shared or "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ)
