"""The command line: `fnn train`, `fnn study`, `fnn compare`, `fnn report`; also `python -m fnn`."""

import dataclasses
import difflib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

SENTENCES = (ValueError, TypeError, OSError, ImportError, ArithmeticError)


@dataclass(frozen=True)
class Train:
    """Train a network (on scikit-learn's handwritten digits by default) and print its test accuracy."""

    model: str = "mlp"
    """mlp, convnet, resnet, rnn, transformer; the last two read images pixel by pixel"""
    data: str = "digits"
    """digits, clusters, spirals, adding, number_words, a folder of IDX files (MNIST and its kin), or a .npz file"""
    depth: int | None = None
    """layers: hidden ones (mlp, 2), convolutions (convnet, 2) or blocks (resnet, 2) of a stage, recurrent ones (rnn, 1),
    blocks (transformer, 2)"""
    width: int | None = None
    """units (mlp 256, rnn 128, transformer 64), channels of the first stage (convnet 32, resnet 16)"""
    activation: str = "relu"
    """sigmoid, tanh, relu, leaky_relu, elu, selu, gelu, gelu_tanh, silu, softplus, erf, identity"""
    norm: str | None = None
    """none, batch_norm, layer_norm, rms_norm; batch_norm by default, layer_norm in a transformer"""
    init: str = "he_normal"
    """weight initialiser: he_normal, glorot_uniform, "normal(0.01)", "scaled(1.5)", orthogonal, ..."""
    residual: bool = False
    """of an mlp: add each hidden layer to its input"""
    cell: str = "lstm"
    """of an rnn: rnn, gru, lstm"""
    forget_bias: float = 1.0
    """of an lstm: the forget gate's bias at the start"""
    recurrent_init: str = "orthogonal"
    """of an rnn: initialiser of the recurrent weights; "scaled(1.0)" is N(0, 1/width)"""
    heads: int = 4
    """of a transformer"""
    norm_position: str = "pre"
    """of a transformer: pre or post"""
    encoder: int | None = None
    """of a transformer on number_words: so many more blocks that read the source, to which all others attend"""
    dropout: float | None = None
    """probability of dropping a unit; 0.1 by default for mlp, 0.3 for convnet, else 0"""
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
    from fnn.cli import study as cli_study

    commands = {
        Train: ("train", run_train),
        cli_study.Study: ("study", cli_study.run_study),
        cli_study.Compare: ("compare", cli_study.run_compare),
        cli_study.Report: ("report", cli_study.run_report),
    }
    given = sys.argv[1:] if arguments is None else arguments
    for kind, (name, _) in commands.items():
        if given[:1] == [name] and (sentence := _unknown_option(name, kind, given[1:])):
            print(sentence, file=sys.stderr)
            raise SystemExit(2)
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


def _unknown_option(command: str, kind: type, given: list[str]) -> str | None:
    """Name the first option that a command does not have, and the one that was meant: by letters, start, or initials."""
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(kind)}
    known = {*fields, "help", *(f"no-{name}" for name, field in fields.items() if isinstance(field.default, bool))}
    for word in given:
        option = word[2:].partition("=")[0].replace("_", "-")
        if not word.startswith("--") or option in known or not option or option.startswith("tyro-"):
            continue
        initials = [name for name in fields if "".join(part[0] for part in name.split("-")) == option]
        starts = [name for name in fields if name.startswith(option)]
        near = difflib.get_close_matches(option, fields, n=1, cutoff=0.5)
        meant = next(iter((*initials, *starts, *near)), None)
        hint = f"did you mean --{meant}?" if meant else f"fnn {command} --help lists what there is"
        return f"{command}: unknown option --{option}; {hint}"
    return None


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


def run_train(options: Train) -> int:
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
        train, test = recipes.load(options.data, options.model, key=split_key, encoder=options.encoder)
        net, loss, measure, dropout = recipes.recipe(options, train, test)
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
            print(f"  decoded greedily with the cache: {exact:.4f} of {test.size} held-out translations exactly right")
        if options.flow:
            print(fnn.gradient_flow(net, state, (test.x, test.y), loss=loss, train=dropout == 0))
        if options.plot:
            fnn.plot.curves(history, path=options.plot)
    seconds = time.perf_counter() - started
    if options.seeds > 1:
        mean, spread = float(np.mean(results)), float(np.std(results))
        print(f"mean of {options.seeds} seeds: test {measure} {mean:.4f} ± {spread:.4f} (standard deviation)")
    print(f"{seconds:.1f} s on {jax.devices()[0].platform}")
    return 0
