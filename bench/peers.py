"""The peers of the suite `step`: fnn, and plain JAX; `bench/libraries.py` has the others. Each as its users would write
it, at its best.

A peer takes a `Problem` and returns a `Run`: a step that owns its state, the batches, and how to read the loss. All
start from `problem.weights`, and the suite compares their losses with a float64 reference before it times them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from bench import handwritten
from bench.problem import FEATURES, Problem, fnn_start
from bench.registry import PEERS, Peer, Skip, peer
from bench.timing import Run
from fnn.training.step import METRICS

__all__ = ["PEERS", "Peer", "Skip"]


def _fnn(problem: Problem, metrics: Sequence[str] = ("loss",)) -> tuple[fnn.TrainStep, fnn.TrainState]:
    net, optimizer, state = fnn_start(problem.row)
    state = jax.tree.map(jnp.copy, state)  # as `fit` does: no two leaves may share a buffer that is donated
    dtype = None if problem.row.dtype == "float32" else problem.row.dtype
    return fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=metrics, compute_dtype=dtype), state


@peer("fnn-loop", "fnn.train_step in a Python loop")
def fnn_loop(problem: Problem) -> Run:
    step, state = _fnn(problem)
    return Run(step, state, problem.batches, lambda metrics: metrics["loss"])


@peer("fnn-loop-metrics", "the same with all of fnn's metrics, beside linen-metrics", default=False)
def fnn_loop_metrics(problem: Problem) -> Run:
    step, state = _fnn(problem, METRICS)
    return Run(step, state, problem.batches, lambda metrics: metrics["loss"])


@peer("fnn-fit", "what fnn.fit runs for an epoch: shuffle, gather batches, steps inside lax.scan")
def fnn_fit(problem: Problem) -> Run:
    return _fit(problem, *_fnn(problem))


@peer("fnn-fit-metrics", "the same with all of fnn's metrics: accuracy, gradient norms, clipping, update ratio")
def fnn_fit_metrics(problem: Problem) -> Run:
    return _fit(problem, *_fnn(problem, METRICS))


def _fit(problem: Problem, step: fnn.TrainStep, state: fnn.TrainState) -> Run:
    key, batch = jax.random.key(3), problem.row.batch
    data = fnn.data.Dataset(*_laid_out(problem, fnn.data.shuffled(key, problem.steps * batch)))
    at = np.array([0, problem.steps, 1], np.int32)

    def epoch(state, data):
        carry = state, jnp.zeros(data.size, jnp.int32)
        (state, _), (metrics, _) = step.epoch(carry, data, key, at, batch, problem.steps)
        return state, metrics

    return Run(epoch, state, [data], lambda metrics: metrics["loss"])


def _laid_out(problem: Problem, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lay out data so that an epoch's shuffle brings back everybody's batches; the losses prove that it does."""
    x, y = problem.xs.reshape(-1, FEATURES), problem.ys.reshape(-1)
    return jnp.zeros_like(x).at[order].set(x), jnp.zeros_like(y).at[order].set(y)


@peer("fnn-stretch", "TrainStep.stretch: steps inside lax.scan over batches laid out beforehand")
def fnn_stretch(problem: Problem) -> Run:
    step, state = _fnn(problem)
    return Run(step.stretch, state, [(problem.xs, problem.ys)], lambda metrics: metrics["loss"])


# Plain JAX ------------------------------------------------------------------------------------------------------------


def _loop(problem: Problem, step: Callable[..., Any], state: Any) -> Run:
    return Run(jax.jit(step, donate_argnums=0), state, problem.batches)


def _stretch(problem: Problem, step: Callable[..., Any], state: Any) -> Run:
    scan = jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0)
    return Run(scan, state, [(problem.xs, problem.ys)])


@peer("jax-unrolled", "plain JAX, layers written out, one jitted step in a Python loop", max_depth=256)
def jax_unrolled(problem: Problem) -> Run:
    return _loop(problem, *handwritten.unrolled(problem))


@peer("jax-scanned", "plain JAX, lax.scan over depth, one jitted step in a Python loop")
def jax_scanned(problem: Problem) -> Run:
    return _loop(problem, *handwritten.scanned(problem))


@peer("jax-steps", "plain JAX, lax.scan over depth inside lax.scan over steps")
def jax_steps(problem: Problem) -> Run:
    return _stretch(problem, *handwritten.scanned(problem))


@peer("jax-steps-unrolled", "plain JAX, layers written out inside lax.scan over steps", max_depth=64)
def jax_steps_unrolled(problem: Problem) -> Run:
    return _stretch(problem, *handwritten.unrolled(problem))


@peer(
    "jax-epoch-unrolled", "the same with what fit does besides: shuffle, gather batches inside the scan", max_depth=64
)
def jax_epoch_unrolled(problem: Problem) -> Run:
    step, state = handwritten.unrolled(problem)
    n, batch = problem.steps * problem.row.batch, problem.row.batch

    def order(key):
        return jnp.argsort(jax.random.bits(key, (n,)))

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, data):
        def body(state, index):
            return step(state, jax.tree.map(lambda a: a.at[index].get(mode="promise_in_bounds"), data[1:]))

        return jax.lax.scan(body, state, order(data[0]).reshape(-1, batch))

    key = jax.random.key(3)
    return Run(epoch, state, [(key, *_laid_out(problem, order(key)))])


from bench import libraries as libraries  # noqa: E402  (enters its peers behind these)
from bench import torch_peers as torch_peers  # noqa: E402
