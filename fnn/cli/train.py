"""`fnn train`."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnn import lowering
from fnn.cli.diagnose import command
from fnn.cli.recipes import M, Model, Training


@dataclass(frozen=True)
class Train(Training[M]):
    """Train a network, by default on scikit-learn's handwritten digits, and print its test accuracy."""

    seeds: int = 1
    """train with this many seeds, one after the other, and print the mean"""
    flow: bool = False
    """after training, print the gradient norms layer by layer"""
    plot: str = ""
    """write the training curves to this file, for example curves.png"""


def run(options: Train[Model]) -> int:
    """Do `fnn train`."""
    import jax
    import numpy as np
    import optax

    import fnn
    from fnn import check
    from fnn.cli import recipes

    check.positive("train", seeds=options.seeds, epochs=options.epochs, batch_size=options.batch_size)
    check.above_zero("train", learning_rate=options.learning_rate)
    if options.clip < 0:
        raise ValueError(f"train: clip must be at least 0, got {options.clip}; 0 switches clipping off")
    if options.plot:
        _check_plot(Path(options.plot))
    results = []
    started = time.perf_counter()
    for seed in range(options.seed, options.seed + options.seeds):
        split_key, init_key, fit_key = jax.random.split(jax.random.key(seed), 3)
        train, test = recipes.load(options.data, options.model, key=split_key)
        net, loss, measure = recipes.recipe(options.model, train, test, taps=options.flow)
        steps = options.epochs * (train.size // options.batch_size)
        rate = optax.cosine_decay_schedule(options.learning_rate, max(1, steps))
        clips = [fnn.clip.by_global_norm(options.clip)] if options.clip else []
        optimizer = optax.chain(*clips, optax.adam(rate))
        state = fnn.TrainState.create(net, optimizer, init_key, train.take(slice(1)).x)
        step = fnn.train_step(net, loss, optimizer)
        state, history = fnn.fit(
            step,
            state,
            train,
            epochs=options.epochs,
            batch_size=options.batch_size,
            validation=test,
            key=fit_key,
            progress=True,
        )
        result = fnn.evaluate(net, state, test, loss=loss)
        results.append(result.get("accuracy", result["loss"]))
        print(
            f"seed {seed}: test {measure} {results[-1]:.4f}, test loss {result['loss']:.4f} "
            f"({train.size} training and {test.size} test examples of {options.data})"
        )
        if "clip_fraction" in history.train:
            clipped, removed = (float(np.mean(history.train[n])) for n in ("clip_fraction", "clip_removed"))
            print(f"  {clipped:.1%} of the steps were clipped; on average {removed:.1%} of the gradient was removed")
        if measure == "exact match" and options.data == "number_words":
            exact = recipes.decoded_exactly(net, state, test)
            print(f"  greedy decoding: {exact:.4f} of the {test.size} held-out translations are exactly right")
        if options.flow:
            noisy = getattr(options.model, "dropout", 0.0) > 0
            print(fnn.gradient_flow(net, state, (test.x, test.y), loss=loss, train=not noisy))
        if options.plot:
            fnn.plot.curves(history, path=options.plot)
    seconds = time.perf_counter() - started
    if not np.isfinite(results).all() or (measure == "accuracy" and max(results) < 0.9 * _chance(test.y) + 0.1):
        print(f"it did not learn; to find out why: {command(options.model, options)}")
    if options.seeds > 1:
        mean, spread = float(np.mean(results)), float(np.std(results))
        print(f"mean of {options.seeds} seeds: test {measure} {mean:.4f} ± {spread:.4f} (standard deviation)")
    print(f"{seconds:.1f} s on {lowering.platform()}")
    return 0


def _chance(y: Any) -> float:
    """Return the share of the commonest label."""
    import numpy as np

    return float(np.unique(np.asarray(y), return_counts=True)[1].max()) / len(y)


def _check_plot(path: Path) -> None:
    """Refuse a figure that could not be written, before hours of training end in it."""
    import importlib.util

    if not importlib.util.find_spec("matplotlib"):
        raise ImportError("train: --plot needs matplotlib; install fnn[study]")
    from matplotlib.figure import Figure

    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise ValueError(f"train: a figure must be one of {', '.join(kinds)}, got {str(path)!r}; write to a .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"train: the folder of --plot must exist, got {str(path)!r}; make {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"train: --plot must name a file that can be written, got {str(path)!r}; choose another")
