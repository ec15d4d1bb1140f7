"""Train a case on several seeds, one lane each of one program, and score every lane on held-out data."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import losses

from .recipes import Case


def train(make: Callable[[int], Case], seeds: int = 9, factor: float = 1.0) -> np.ndarray:
    """Score the runs of seeds 0, 1, ..., at `factor` times the rate: float[seeds].

    A seed draws data, initial weights, order and noise.
    """
    cases = [make(seed) for seed in range(seeds)]
    case, shuffle = cases[0], cases[0].shuffle
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(c.train, c.validation) for c in cases])
    n = len(jax.tree.leaves(case.train)[0])
    rows = jnp.asarray(np.stack([batches(n, case, seed, shuffle) for seed in range(seeds)]))
    net = case.build()

    # Initial weights, rate and data are arguments, so that many patients share a compiled program.
    def run(start, key, data, rows, rate):
        (x, y), held_out = data
        tx = case.optimizer(rate)

        def step(carry, now):
            params, state, opt = carry
            index, i = now

            def value(params):
                out, news = net.apply(params, state, x[index], key=jax.random.fold_in(key, i), train=True)
                return jnp.mean(case.loss(out, y[index])), news

            grads, news = jax.grad(value, has_aux=True)(params)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), news, opt), None

        carry, _ = jax.lax.scan(step, (*start, tx.init(start[0])), (rows, jnp.arange(case.steps)))
        return net.apply(*carry[:2], held_out[0])[0]

    keys, noise = (jax.random.split(jax.random.key(i), seeds) for i in (7, 8))
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct((case.batch_size, *a.shape[1:]), a.dtype), case.train[0])
    start = jax.jit(jax.vmap(lambda key: net.init(key, spec)))(keys)
    rate = inspect.signature(case.optimizer).parameters["rate"].default
    outputs = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, 0, None)))(start, noise, data, rows, factor * rate)
    return np.array([score(case.loss, o, c.validation[1]) for o, c in zip(outputs, cases, strict=True)])


def remedies(make: Callable[[int], Case], seeds: int = 9) -> dict[str, np.ndarray]:
    """Score what one would try first: the rate times 3 and over 3, and standardised inputs."""

    def standardized(seed):
        case = make(seed)
        train, validation = fnn.data.standardize(fnn.data.Dataset(*case.train), fnn.data.Dataset(*case.validation))
        return replace(case, train=tuple(train), validation=tuple(validation))

    found = {"rate × 3": train(make, seeds, 3.0), "rate / 3": train(make, seeds, 1 / 3)}
    inputs = make(0).train[0]
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        found["standardised"] = train(standardized, seeds)
    return found


def batches(n: int, case: Case, seed: int, shuffle: bool) -> np.ndarray:
    """Rows of every step's batch, int[steps, batch]: epochs without a last partial batch, each shuffled anew or not."""
    size, rng = min(case.batch_size, n), np.random.default_rng([seed, 3])
    per_epoch = n // size
    epochs = -(-case.steps // per_epoch)
    order = [(rng.permutation(n) if shuffle else np.arange(n))[: per_epoch * size] for _ in range(epochs)]
    return np.concatenate(order).reshape(-1, size)[: case.steps].astype(np.int32)


def score(loss: Any, outputs: Any, y: Any) -> float:
    """Balanced accuracy for classes (also one-hot ones), R² for numbers; 0 and -inf for outputs that are not finite."""
    outputs, y = np.asarray(outputs, np.float64), np.asarray(y)
    classes = np.issubdtype(y.dtype, np.integer)
    one_hot = y.ndim == 2 and y.shape[1] > 1 and bool(np.all((y == 0) | (y == 1)))
    if not np.all(np.isfinite(outputs)):
        return 0.0 if classes or one_hot else -np.inf
    if one_hot:
        y = np.argmax(y, axis=-1)
        return balanced_accuracy(np.argmax(outputs, axis=-1) == y, y)
    if not classes:
        return r_squared(outputs, y)
    correct = losses.correct(loss)
    if correct is not None:
        return balanced_accuracy(np.asarray(correct(jnp.asarray(outputs, jnp.float32), y)), y)
    predicted = np.argmax(outputs, axis=-1) if outputs.ndim > 1 and outputs.shape[-1] > 1 else outputs.reshape(-1) > 0
    return balanced_accuracy(predicted == y.reshape(-1), y)


def balanced_accuracy(right: Any, y: Any) -> float:
    """Average over the classes that occur in y the share of right answers."""
    y = np.asarray(y).reshape(-1)
    return float(np.mean([np.mean(np.asarray(right)[y == c]) for c in np.unique(y)]))


def r_squared(outputs: Any, y: Any) -> float:
    """Evaluate 1 - sum (y - output)² / sum (y - mean y)²."""
    outputs, y = (np.asarray(a, np.float64).reshape(len(y), -1) for a in (outputs, y))
    return float(1 - np.sum((y - outputs) ** 2) / np.sum((y - y.mean(0)) ** 2))
