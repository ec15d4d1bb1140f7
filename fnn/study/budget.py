"""What a cell takes: the memory of a run, from which its chunk follows, and the price of spectral quantities."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fnn import lowering
from fnn.gradients.price import Price, priced
from fnn.study import spectral
from fnn.study.cell import probe_spec, traced
from fnn.study.program import (
    Cell,
    Setup,
    draw,
    measured_net,
    network,
    number,
    optimizer,
    shared_data,
    specs,
    unclipped,
)
from fnn.training.step import TrainState

MEASURED = 4
"""How many steps of training take as long as one measurement."""


def chunk_size(setup: Setup, cell: Cell) -> int:
    """Choose how many runs are lanes of one `vmap`, from the device's memory and the bytes that one run touches.

    A run touches its parameters, their gradients (this one, and that of the recorded step before), the optimiser's
    state, and what the forward pass keeps for the backward one. On a CPU the bound is the cache, elsewhere half of the
    memory. The chunks are made equal. On a CPU, short runs of small nets have a chunk of one a device.
    """
    cell = cell.settled()
    params, state, run = specs(setup, cell)

    def kept(params, state, batch, run):
        net = network(setup, cell.static, run)
        return jax.vjp(lambda p: net.value(p, state, batch, jax.random.key(0)), params)[1]

    residuals = jax.eval_shape(kept, params, state, probe_spec(setup, cell), run)
    moments = jax.eval_shape(lambda p, run: optimizer(cell.static, run).init(p), params, run)
    training = 2 if len(cell.steps) > 1 else 1
    vectors = spectral.vectors(setup.quantities)
    touched = (1 + training + vectors) * _bytes(params) + _bytes(residuals) + (_bytes(moments) if training == 2 else 0)
    devices = lowering.devices()
    record = MEASURED + sum(cost(setup, cell).values())
    if lowering.one_by_one(devices[0], int(touched * (max(cell.steps) + record * len(cell.steps)) * len(cell.runs))):
        return min(len(devices), len(cell.runs))
    most = max(1, lowering.lanes_budget(devices[0]) // max(1, touched)) * len(devices)
    return -(-len(cell.runs) // -(-len(cell.runs) // most))


def cost(setup: Setup, cell: Cell) -> dict[str, float]:
    """Say what a record of a cell's spectral quantities takes, in gradients; see `spectral.cost`."""
    names = spectral.asked(setup.quantities)
    return spectral.cost(names, *sides(setup, cell, names)) if names else {}


def sides(setup: Setup, cell: Cell, names: Sequence[str]) -> tuple[int, int]:
    """Count a net's inputs and outputs for one example; those of a pair are not known, and not needed."""
    inputs = math.prod(setup.train.x.shape[1:])
    if not any(name in spectral.OF_OUTPUTS for name in names):
        return inputs, 1
    outputs = traced(setup, cell)[2]
    return inputs, math.prod(outputs.shape[1:])


def price(setup: Setup, cell: Cell, rounds: int) -> Price:
    """Time each spectral quantity of a cell's first run beside the gradient of the measured batch."""
    cell = cell.settled()
    names = spectral.asked(setup.quantities)
    if not names:
        raise ValueError(
            f"study.price: quantities must name one that has a price ({', '.join(spectral.QUANTITIES)}), got none"
        )
    more, size = shared_data(setup, cell)[-1], cell.static["batch_size"]
    run = {name: number(value) for name, value in cell.runs[0].items()} | more
    params, state = draw(setup, cell.static, run)

    def plain(run, params, state, x, y):
        net, probe, key = measured_net(setup, cell, run, x, y)
        return jax.grad(net.value)(params, state, probe, key)

    def only(name, run, params, state, x, y):
        net, probe, key = measured_net(setup, cell, run, x, y)
        tx = optimizer(cell.static, run)
        opt_state: Any
        first: Any = np.zeros((), np.int32)
        updates, opt_state = tx.update(plain(run, params, state, x, y), tx.init(params), params)
        at = TrainState(params, state, opt_state, key, first)
        step = spectral.Step(updates, run["learning_rate"], unclipped(cell.static, run), opt_state[-1])
        return spectral.measure([name], net, at, probe, key, step)

    chosen = {spectral.kind(name): name for name in names}
    timed = {kind: functools.partial(only, name) for kind, name in chosen.items()}
    given = (run, params, state, *(np.asarray(a)[:size] for a in setup.train))
    return priced("study.price", {"plain gradient": plain, **timed}, given, rounds)


def _bytes(values: Any) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(values) if hasattr(a, "dtype"))
