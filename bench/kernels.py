"""The suite `kernels`: what XLA makes of a training step for an H200, compiled on a machine without one."""

import contextlib
import gc
import importlib.util
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from bench import models, plain_nets, problem, training
from bench.peers import PEERS
from bench.report import Section, describe_error
from bench.timing import Run
from fnn import lowering

ABOUT = """\
XLA's program of one training step for an NVIDIA H200, compiled without the card: nothing is timed. A kernel is an
instruction of the program; a loop's body is counted once, behind a +. "GiB" is what all kernels read and write but matrix
products and convolutions. XLA times kernels on the card before it chooses: here products are either all its own
(`triton`, into which it moves what stands before them) or the library's (`cublas`); a real program mixes the two."""

COLUMNS = ("peer", "products", "kernels", "GiB besides products", "temporary MiB", "compile, s")
NAMES = {
    "fnn": "fnn.train_step",
    "jax": "plain JAX by hand: layers written out, scanned over 256 of them",
    "linen": "Flax Linen",
}
PRODUCTS = {"triton": True, "cublas": False}
TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation" driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
"""The card's data sheet, in the form that XLA reads."""
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "after-all"}
WIDTHS = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


class Kernel(NamedTuple):
    """One instruction of a compiled program."""

    name: str
    kind: str
    """Its opcode; of a call of a library the function's name."""
    moved: int
    """Bytes of its operands and results."""

    @property
    def product(self) -> bool:
        """Whether it is a matrix product or a convolution."""
        return "gemm_fusion" in self.name or self.kind in ("dot", "convolution") or self.kind.startswith("__cu")


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Compile the rows one after the other; yield each one's section as soon as it is done."""
    if not _installed():
        raise SystemExit(
            "kernels: XLA's compiler for a GPU must be installed, a GPU need not; pip install 'jax[cuda12]'"
        )
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for name in options.rows or (training.ORDER[2:] if options.quick else training.ORDER):
        say(f"\n{name}")
        cells, records, notes = [], [], []
        for peer in options.peers or NAMES:
            for products, fused in PRODUCTS.items():
                try:
                    found = _compiled(_build(name, peer), where, fused)
                except Exception as error:
                    notes.append(f"{peer}, {products}: failed: {describe_error(error)[:300]}")
                    continue
                say(f"  {peer}, {products}: {found['seconds']:.1f} s")
                shown = " + ".join(str(len(part)) for part in found["kernels"])
                moved = sum(k.moved for part in found["kernels"] for k in part if not k.product) / 2**30
                record = {"name": peer, "products": products, "kernels": list(map(len, found["kernels"])), "gib": moved}
                records.append(record | {"temporary": found["temporary"], "seconds": found["seconds"]})
                cells.append(
                    (
                        peer,
                        products,
                        shown,
                        f"{moved:.3f}",
                        f"{found['temporary'] / 2**20:.1f}",
                        f"{found['seconds']:.1f}",
                    )
                )
        yield Section(name, COLUMNS, cells, notes, {"row": name, "peers": records})
        gc.collect()
        jax.clear_caches()


def _installed() -> bool:
    """Whether XLA's compiler for NVIDIA's cards is there."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def _build(name: str, peer: str) -> Run:
    """Make a peer's step, its state and a batch, on the CPU."""
    if name in models.MODELS:
        model = models.row(name, False)
        with mock.patch.object(plain_nets, "_attention", _fused):
            return models.BUILDERS["fnn-loop" if peer == "fnn" else peer](model.kind or name, model)
    row = training.works(False)[name].row
    way = {"fnn": "fnn-loop", "jax": "jax-scanned" if row.depth > 64 else "jax-unrolled"}.get(peer)
    return PEERS[way or ("linen-scan" if row.depth > 64 else "linen")].build(problem.make(row, 1))


def _fused(size: Any, dtype: str) -> Callable[..., jax.Array]:
    kind = None if dtype == "float32" else "cudnn"
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kind)


def _compiled(ready: Run, where: Any, fused: bool) -> dict[str, Any]:
    """Compile a peer's step with the choices that fnn makes on a GPU."""
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a), sharding=where), (ready.state, ready.items[0])
    )
    with _as_on_a_gpu():
        lowered = ready.call.lower(*shapes)
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": fused}
    begin = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - begin
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"kernels": kernels(compiled.as_text()), "temporary": temporary, "seconds": seconds}


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    jax.clear_caches()  # what was traced so far has a CPU's choices
    with mock.patch.object(lowering, "platform", lambda: "gpu"):
        yield
    jax.clear_caches()


def kernels(text: str) -> list[list[Kernel]]:
    """Read the kernels of a compiled program: those of its entry, then of each loop's body."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif lines is not None:
            lines.append(line)
    loops = re.findall(r" while\(.*?body=%([\w.\-]+)", text)
    return [_kernels(bodies[name]) for name in (entry, *dict.fromkeys(loops))]


def _kernels(lines: list[str]) -> list[Kernel]:
    sizes: dict[str, int] = {}
    found = []
    for line in lines:
        if not (part := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)", line)):
            continue
        name, shape, opcode, operands = part.groups()
        sizes[name] = _bytes(shape)
        if opcode not in FREE and not opcode.endswith("-done"):  # of a pair the start counts
            target = re.search(r'custom_call_target="([^"]+)"', line)
            moved = sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
            found.append(Kernel(name, target[1] if target else opcode, moved))
    return found


def _bytes(shape: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(WIDTHS.get(kind, 0) * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in arrays)


def select(text: str) -> list[str]:
    """Parse `mlp-bf16,1024x4`; ValueError for others."""
    names = text.split(",")
    if unknown := [name for name in names if name not in training.ORDER]:
        raise ValueError(f"{', '.join(unknown)}: must be one of {', '.join(training.ORDER)}")
    return names
