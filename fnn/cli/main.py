"""The command line: `fnn train`, `fnn diagnose`, `fnn study`, `fnn compare`, `fnn report`; also `python -m fnn`."""

import difflib
import inspect
import sys
from dataclasses import Field, fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from fnn import __version__, check
from fnn.cli import compare, coordinates, diagnose, recipes, report, study, train

SENTENCES = (ValueError, TypeError, OSError, ImportError, ArithmeticError)
COMMANDS = {
    "train": (train.Train[recipes.Mlp], train.run),
    "diagnose": (diagnose.Diagnose[recipes.Mlp], diagnose.run),
    "study": (study.Study, study.run),
    "compare": (compare.Compare, compare.run),
    "report": (report.Report, report.run),
}
MODEL = "The model may be left out: fnn {0} --depth 50 uses an mlp. All options are listed by fnn {0} mlp --help, and so on."
WITH_MODEL = {
    "train": (train.Train, "Train a network and print its test accuracy. ", ""),
    "diagnose": (diagnose.Diagnose, "Find out why a network does not train. ", diagnose.USAGE),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input gives one sentence on standard error and exit code 2."""
    try:
        import tyro
    except ImportError:
        print("fnn: the command line needs tyro; install fnn[study]", file=sys.stderr)
        return 2
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        print(f"fnn {__version__}")
        return 0
    prog, about = "fnn", "See how gradients flow through a network. fnn --version prints the version."
    kinds: dict[str, Any] = {name: kind for name, (kind, _) in COMMANDS.items()}
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    try:
        if given[:1] == ["diagnose"] and ".py:" in "".join(given[1:2]):
            command = tyro.cli(diagnose.Script, prog="fnn diagnose", args=given[1:], config=config)
            return diagnose.run_script(command)
        if given[:1] == ["study"] and any(word.partition("=")[0] == "--check" for word in given):
            _check_options("fnn", {"study": coordinates.Check}, given)
            words = ["--help"] if {"--help", "-h"} & set(given) else given[1:]  # --check alone lacks its two values
            command = tyro.cli(coordinates.Check, prog="fnn study", args=words, config=config[1:])
            return coordinates.run(command)
        if given and given[0] in WITH_MODEL:
            generic, first, last = WITH_MODEL[given[0]]
            prog, about, given = (
                f"fnn {given[0]}",
                first + MODEL.format(given[0]) + last,
                _with_model(given[0], given[1:]),
            )
            kinds = {name: generic[model] for name, model in recipes.MODELS.items()}
        if given and given[0] in kinds:
            _check_options(prog, kinds, given)
        alone = bool(given) and given[0] in kinds  # else one line of each is listed
        union: Any = Union[*(_subcommand(name, kind, alone) for name, kind in kinds.items())]
        command = tyro.cli(union, prog=prog, args=given, description=about, config=config)
        if isinstance(command, study.Study):
            named = {word[2:].partition("=")[0].replace("-", "_") for word in given if word.startswith("--")}
            object.__setattr__(command, "typed", frozenset(named))
        return next(run for kind, run in COMMANDS.values() if isinstance(command, get_origin(kind) or kind))(command)
    except SENTENCES as error:
        places = [note for note in getattr(error, "__notes__", []) if note.startswith("in layer ")]
        print("; ".join([str(error), *places]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfnn: stopped", file=sys.stderr)
        return 130


def _subcommand(name: str, kind: Any, whole: bool) -> Any:
    """Describe a command by its docstring, or the first line of it: `fnn train MODEL` by that of the model."""
    import tyro

    described = next(iter(get_args(kind)), kind) if name in recipes.MODELS else get_origin(kind) or kind
    about = inspect.getdoc(described) or ""
    return Annotated[kind, tyro.conf.subcommand(name, description=about if whole else about.partition("\n")[0])]


def _with_model(command: str, given: list[str]) -> list[str]:
    """Put `mlp` first where no model is named; refuse the names of none."""
    for i, word in enumerate(given):
        if word.partition("=")[0] == "--model":
            name = word.partition("=")[2] or next(iter(given[i + 1 :]), "MODEL")
            raise ValueError(f"{command}: the model comes first, without --model; write fnn {command} {name}")
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        return ["mlp", *given]
    if not given[0].startswith("-"):
        check.choice(command, recipes.MODELS, model=given[0])
    return given


def _check_options(prog: str, kinds: dict[str, Any], given: list[str]) -> None:
    """Refuse the first option that a command does not have, and suggest what was meant: by initials, start, or letters."""
    command = " ".join([prog, given[0]])
    options = _options(kinds[given[0]])
    known = {*options, "help", *(f"no-{name}" for name, field in options.items() if isinstance(field.default, bool))}
    for word in given[1:]:
        option = word[2:].partition("=")[0].replace("_", "-")
        if not word.startswith("--") or option in known or not option or option.startswith("tyro-"):
            continue
        others = [f"{prog} {name}" for name, kind in kinds.items() if option in _options(kind)]
        initials = [name for name in options if "".join(part[0] for part in name.split("-")) == option]
        starts = [name for name in options if name.startswith(option)]
        near = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
        meant = next(iter((*initials, *starts, *near)), None)
        hint = f"{command} --help lists all options"
        if others:
            hint = f"it belongs to {' and '.join(others)}"
        elif meant:
            hint = f"did you mean --{meant}?"
        raise ValueError(f"{command.removeprefix('fnn ')}: unknown option --{option}; {hint}")


def _options(kind: Any) -> dict[str, Field[Any]]:
    """List the options of a command by name, for `fnn train MODEL` with those of the model."""
    own = [field for field in fields(get_origin(kind) or kind) if field.name != "model" and field.init]
    model = [field for inner in get_args(kind) for field in fields(inner)]
    flat = [f for field in (*model, *own) for f in (fields(field.type) if is_dataclass(field.type) else (field,))]
    return {field.name.replace("_", "-"): field for field in flat}
