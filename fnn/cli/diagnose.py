"""`fnn diagnose`."""

import contextlib
import importlib.util
import inspect
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from fnn.cli.recipes import M, Model, Training
from fnn.cli.terminal import printable

HEALTHY, CAUSE, NONE = 0, 1, 3
"""Exit codes; bad input is 2."""
USAGE = """

A training of your own: fnn diagnose script.py:make [--budget FLOAT] [--html STR], where make() returns the arguments of
fnn.diagnose or fnn.diagnose_loss; see fnn diagnose script.py:make --help.

Exit code 0: healthy, 1: a cause was found, 2: bad input, 3: no cause was found."""
"""What `fnn diagnose --help` says besides the models."""


@dataclass(frozen=True)
class Diagnose(Training[M]):
    """Find out why a network does not train: change one thing, train again, and see what cures it.

    Exit code 0: healthy, 1: a cause was found, 2: bad input, 3: no cause was found.
    """

    seeds: int = 3
    """train each change with this many seeds"""
    budget: float = 60.0
    """seconds that the search may take"""
    target: float = 0.0
    """held-out score that counts as healthy; 0: automatic"""
    html: str = ""
    """write a page with figures to this file, for example why.html"""


@dataclass(frozen=True)
class Script:
    """Diagnose a training of your own: `script.py:make`, where make() returns the arguments of `fnn.diagnose`.

    That is a tuple or a dict, (net or build, loss, optimizer, train, validation, {"batch_size": 64, "steps": 400}); or those
    of `fnn.diagnose_loss`, (loss, params, batches, optimizer, validation).

    Exit code 0: healthy, 1: a cause was found, 2: bad input, 3: no cause was found.
    """

    script: str
    """script.py:make"""
    budget: float = 60.0
    """seconds that the search may take"""
    html: str = ""
    """write a page with figures to this file, for example why.html"""


def run(options: Diagnose[Model]) -> int:
    """Do `fnn diagnose` for a model of `fnn train`."""
    import jax
    import optax

    from fnn import check
    from fnn.cli import recipes
    from fnn.diagnosis.diagnose import diagnose
    from fnn.training.clip import by_global_norm

    check.positive("diagnose", epochs=options.epochs, batch_size=options.batch_size, seeds=options.seeds)
    check.above_zero("diagnose", learning_rate=options.learning_rate, budget=options.budget)
    if options.clip < 0:
        raise ValueError(f"diagnose: clip must be at least 0, got {options.clip}; 0 switches clipping off")
    _check_page(options.html)
    train, test = jax.device_get(recipes.load(options.data, options.model, key=jax.random.key(options.seed)))
    loss = recipes.recipe(options.model, train, test).loss
    steps = options.epochs * max(1, train.size // options.batch_size)
    build = _builder(options.model, train, test)

    def optimizer(rate=options.learning_rate, clip=options.clip or None):
        clips = [by_global_norm(clip)] if clip else []
        return optax.chain(*clips, optax.adam(optax.cosine_decay_schedule(rate, steps)))

    found = diagnose(
        build,
        loss,
        optimizer,
        tuple(train),
        tuple(test),
        batch_size=min(options.batch_size, train.size),
        steps=steps,
        seeds=options.seeds,
        budget=options.budget,
        target=options.target or None,
        progress=True,
    )
    return _told(found, options.html)


def _builder(model: Any, train: Any, test: Any) -> Any:
    """Make a function of the model's options, with its present ones as defaults."""
    from fnn.cli import recipes

    def build(**knobs):
        return recipes.recipe(replace(model, **knobs), train, test).net

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind, default=value) for name, value in vars(model).items()]
    build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return build


def run_script(options: Script) -> int:
    """Do `fnn diagnose script.py:make`."""
    from fnn.diagnosis.diagnose import diagnose, diagnose_loss

    _check_page(options.html)
    given = _made(options.script)
    args, more = (given[:-1], given[-1]) if isinstance(given[-1], dict) else (given, {})
    second = args[1] if len(args) > 1 else more.get("loss")  # a loss, or the parameters, which Equinox makes callable
    model = any(hasattr(a, "shape") for a in jax.tree.leaves(second))
    function = diagnose if args and callable(second) and not model else diagnose_loss
    return _told(function(*args, **{"budget": options.budget, "progress": True, **more}), options.html)


def _made(script: str) -> tuple[Any, ...]:
    """Import a script and call its function; return its arguments, the last one being a dict of keywords."""
    path, _, name = script.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"diagnose: {script!r} must name a script and a function, script.py:make; no file {path!r}"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"diagnose: the script must be a Python file, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    with _beside(file.parent):
        spec.loader.exec_module(module)
        if not callable(make := getattr(module, name, None)):
            raise ValueError(f"diagnose: {path} must have a function {name}, got none; write def {name}(): return ...")
        given = make()
    if isinstance(given, dict):
        return (given,)
    if not isinstance(given, tuple) or not given:
        raise TypeError(f"diagnose: {name}() must return a tuple or a dict of arguments, got {type(given).__name__}")
    return given if isinstance(given[-1], dict) and not _holds_arrays(given[-1]) else (*given, {})


def _holds_arrays(given: dict[Any, Any]) -> bool:
    """Whether a dict is data, not keywords."""
    return bool(given) and all(hasattr(value, "shape") for value in given.values())


@contextlib.contextmanager
def _beside(folder: Path):
    """Let a script import what lies beside it."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def command(model: Any, options: Any) -> str:
    """Write the command that diagnoses a training of `fnn train`."""
    words = ["fnn diagnose", type(model).__name__.lower()]
    shared = {f.name for f in fields(Diagnose)} - {"model", "seeds"}
    for holder in (model, options):
        for f in fields(holder):
            value = getattr(holder, f.name)
            if (holder is model or f.name in shared) and value != f.default:
                name = f.name.replace("_", "-")
                flag = "" if value else "no-"
                words.append(f"--{flag}{name}" if isinstance(value, bool) else f"--{name} {shlex.quote(str(value))}")
    return " ".join(words)


def _check_page(html: str) -> None:
    """Refuse a page that could not be written, before the search ends in it."""
    if html and (Path(html).is_dir() or not Path(html).parent.is_dir()):
        raise FileNotFoundError(
            f"diagnose: --html must name a file in a folder that exists, got {html!r}; choose another"
        )


def _told(found: Any, html: str) -> int:
    print("\n".join(map(printable, repr(found).splitlines())))
    if html:
        found.html(html)
        print(f"page: {html}")
    return HEALTHY if found.healthy else CAUSE if found.causes else NONE
