"""PyTorch's peers: eager and compiled, each built and timed in the process that `bench.remote` keeps for them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench import remote
from bench.problem import DECAY, EPS, MAX_NORM, RATE, Problem
from bench.registry import Skip, peer
from bench.timing import Run


def torch_device() -> Any:
    """Take the device that the other peers run on, and their precision of products."""
    import torch

    platform = remote.platform or jax.devices()[0].platform
    if platform != "cpu" and not (platform == "gpu" and torch.cuda.is_available()):
        raise Skip(f"PyTorch does not see the {platform} that the other peers run on")
    high = jax.config.jax_default_matmul_precision in (None, "default")  # JAX's default on a GPU is TF32
    torch.set_float32_matmul_precision("high" if high else "highest")
    torch.backends.cudnn.allow_tf32 = high  # convolutions and recurrent layers, for which PyTorch's default is TF32
    torch.backends.cudnn.benchmark = True
    torch.set_flush_denormal(True)  # as XLA does
    return torch.device("cuda" if platform == "gpu" else "cpu")


def torch_run(net: Any, xs: Any, ys: Any, compiled: bool = False, dtype: str = "float32") -> Run:
    """Make a Python loop of steps of a net whose weights are set; xs, ys: data with a leading axis of steps.

    bfloat16 is autocast: parameters and Adam stay float32. Compiled are the net and the cross entropy, as one function.
    """
    import torch
    from torch.nn import functional, utils

    device = torch_device()
    net = net.to(device).train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=RATE, fused=True)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def moved(a):
        a = torch.tensor(np.asarray(a), device=device)
        return a if a.is_floating_point() else a.long()

    xs, ys = jax.tree.map(moved, (xs, ys))
    batches = [(jax.tree.map(lambda a, i=i: a[i], xs), y) for i, y in enumerate(ys)]

    def cross_entropy(x, y):
        return functional.cross_entropy(net(x).flatten(0, -2).float(), y.flatten())

    compute = torch.compile(cross_entropy, mode="default") if compiled else cross_entropy

    def step(state, batch):
        optimizer.zero_grad(set_to_none=True)
        with cast:
            loss = compute(*batch)
        loss.backward()
        utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        return state, loss.detach()

    def wait(_):
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Run(step, None, batches, lambda loss: loss.item(), wait)


def _net(problem: Problem) -> Any:
    from torch import nn

    from bench.torch_nets import filled, linear

    layers = []
    for weights in problem.weights.hidden:
        norm = nn.BatchNorm1d(problem.row.width, EPS, 1 - DECAY)
        layers += [linear(weights), filled(norm, weight=weights["scale"], bias=weights["shift"]), nn.ReLU()]
    return nn.Sequential(*layers, linear(problem.weights.output))


def _enter(name: str, about: str, compiled: bool, max_depth: int | None) -> Callable[[Problem], Run]:
    @peer(name, f"{about}, in a process of its own", needs="torch", max_depth=max_depth, own_process=True)
    def build(problem: Problem) -> Run:
        return torch_run(_net(problem), problem.xs, problem.ys, compiled, problem.row.dtype)

    return build


torch_eager = _enter("torch", "PyTorch eager, fused Adam", False, None)
torch_compiled = _enter("torch-compile", "PyTorch with torch.compile, fused Adam", True, 64)
