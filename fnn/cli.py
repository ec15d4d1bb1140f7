"""The command line: `fnn train`, `fnn study`, `fnn compare`, `fnn report`; also `python -m fnn`."""

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, Union

SENTENCES = (ValueError, TypeError, OSError, ImportError, ArithmeticError)


@dataclass(frozen=True)
class Train:
    """Train a multilayer perceptron (scikit-learn's handwritten digits by default) and print its test accuracy."""

    data: str = "digits"
    """digits, clusters, spirals, a folder of IDX files (MNIST and its kin), or a .npz file"""
    depth: int = 2
    """hidden layers behind the input layer"""
    width: int = 256
    """units of a hidden layer"""
    activation: str = "relu"
    """sigmoid, tanh, relu, leaky_relu, elu, selu, gelu, gelu_tanh, silu, softplus, erf, identity"""
    norm: str = "batch_norm"
    """none, batch_norm, layer_norm, rms_norm"""
    init: str = "he_normal"
    """weight initialiser: he_normal, glorot_uniform, "normal(0.01)", "scaled(1.5)", orthogonal, ..."""
    residual: bool = False
    """add each hidden layer to its input"""
    dropout: float = 0.1
    """probability of dropping a unit"""
    epochs: int = 30
    """passes over the training data"""
    batch_size: int = 64
    """examples of a step"""
    learning_rate: float = 3e-3
    """Adam's peak rate, decayed to zero along a cosine"""
    clip: float = 1.0
    """largest global norm of the gradient; 0 switches clipping off"""
    seed: int = 0
    """of the split, the weights and the shuffling; the same seed gives the same result"""
    seeds: int = 1
    """train with this many seeds in turn and print the mean"""
    flow: bool = False
    """print gradient norms by layer after training"""
    plot: str = ""
    """write the training curves to this PNG"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input gives one sentence on standard error and exit code 2."""
    try:
        import tyro
    except ImportError:
        print("fnn: the command line needs tyro; install fnn[study]", file=sys.stderr)
        return 2
    from fnn import cli_study

    commands = {
        Train: ("train", run_train),
        cli_study.Study: ("study", cli_study.run_study),
        cli_study.Compare: ("compare", cli_study.run_compare),
        cli_study.Report: ("report", cli_study.run_report),
    }
    Command: Any = Union[*(Annotated[kind, tyro.conf.subcommand(name)] for kind, (name, _) in commands.items())]
    positional = (tyro.conf.PositionalRequiredArgs,)
    command = tyro.cli(Command, prog="fnn", args=arguments, description="See how gradients flow.", config=positional)
    try:
        return commands[type(command)][1](command)
    except SENTENCES as error:
        places = [note for note in getattr(error, "__notes__", []) if note.startswith("in layer ")]
        print("; ".join([str(error), *places]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfnn: stopped", file=sys.stderr)
        return 130


def run_train(options: Train) -> int:
    """Do `fnn train`."""
    import jax
    import numpy as np
    import optax

    import fnn
    from fnn import check

    check.positive("train", seeds=options.seeds, epochs=options.epochs, batch_size=options.batch_size)
    check.above_zero("train", learning_rate=options.learning_rate)
    if options.clip < 0:
        raise ValueError(f"train: clip must be at least 0, got {options.clip}; 0 switches clipping off")
    accuracies = []
    started = time.perf_counter()
    for seed in range(options.seed, options.seed + options.seeds):
        split_key, init_key, fit_key = jax.random.split(jax.random.key(seed), 3)
        train, test = fnn.data.load(options.data, key=split_key)
        if not np.issubdtype(train.y.dtype, np.integer):
            raise ValueError(f"train: needs labelled classes, got targets {check.describe(train.y)}")
        classes = int(max(train.y.max(), test.y.max())) + 1
        net = fnn.models.mlp(
            options.depth,
            options.width,
            classes,
            activation=options.activation,
            norm=options.norm,
            init=options.init,
            residual=options.residual,
            dropout=options.dropout,
            taps=options.flow,
        )
        steps = options.epochs * (train.size // options.batch_size)
        rate = optax.cosine_decay_schedule(options.learning_rate, max(1, steps))
        clips = [fnn.clip.by_global_norm(options.clip)] if options.clip else []
        optimizer = optax.chain(*clips, optax.adam(rate))
        state = fnn.TrainState.create(net, optimizer, init_key, train.x[:1])
        step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
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
        result = fnn.evaluate(net, state, test)
        accuracies.append(result["accuracy"])
        print(
            f"seed {seed}: test accuracy {result['accuracy']:.4f}, test loss {result['loss']:.4f} "
            f"({train.size} training and {test.size} test examples of {options.data})"
        )
        if "clip_fraction" in history.train:
            clipped, removed = (float(np.mean(history.train[n])) for n in ("clip_fraction", "clip_removed"))
            print(f"  {clipped:.1%} of the steps were clipped; on average {removed:.1%} of the gradient was removed")
        if options.flow:
            print(fnn.gradient_flow(net, state, (test.x, test.y), train=options.dropout == 0))
        if options.plot:
            fnn.plot.curves(history, path=options.plot)
    seconds = time.perf_counter() - started
    if options.seeds > 1:
        mean, spread = float(np.mean(accuracies)), float(np.std(accuracies))
        print(f"mean of {options.seeds} seeds: test accuracy {mean:.4f} ± {spread:.4f} (standard deviation)")
    print(f"{seconds:.1f} s on {jax.devices()[0].platform}")
    return 0
