"""A study's options, data and functions: checked, and brought into one form, before anything runs."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import admission, check, losses, measures
from fnn.datasets import data
from fnn.datasets.dataset import as_pair
from fnn.description import name_of
from fnn.study import axes, cell, grid, nets, program, spectral, table
from fnn.study.workers import Shared
from fnn.tree import PyTree

Source = str | os.PathLike[str] | Iterable[PyTree] | Shared
"""Data: a name or path for `data.load`, a pair (x, y), or two such pairs."""


def check_options(study: Any) -> None:
    """Check the options that can be checked without data; write whole numbers as int, lists as tuples."""

    def put(name, value):
        object.__setattr__(study, name, value)

    for name in ("epochs", "chunk", "seeds", "steps"):
        value = getattr(study, name)
        if value is None:
            continue
        whole = axes.whole_numbers(name, value)
        if isinstance(value, Iterable) and getattr(value, "shape", None) != ():
            if name in ("epochs", "chunk"):
                raise TypeError(f"study: {name} must be an integer, got {value!r}")
            put(name, tuple(whole))
        else:
            put(name, whole[0])
    if isinstance(study.seeds, int):
        check.positive("study", seeds=study.seeds)
        grid.listed("seeds", range(study.seeds))
    if study.chunk is not None:
        check.positive("study", chunk=study.chunk)
    if study.epochs > grid.MOST:
        raise ValueError(f"study: epochs must be at most {grid.MOST:,}, got {study.epochs:,}; choose fewer")
    for name in ("quantities", "traced"):
        value = getattr(study, name)
        value = (value,) if isinstance(value, str) else value
        if value is not None and (not isinstance(value, Iterable) or isinstance(value, Mapping | bytes)):
            raise TypeError(f"study: {name} must be a list of names, got {value!r}")
        put(name, None if value is None else tuple(value))
    if study.quantities == ():
        raise ValueError("study: quantities must name at least one, got none; leave it out to keep all")
    if not isinstance(study.measure, Mapping):
        raise TypeError(f"study: measure must be a dict of functions by name, got {study.measure!r}")
    for name, function in study.measure.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"study: a measurement's name must be a string, got {name!r}")
        if name in (*table.QUANTITIES, *nets.WATCHED, *spectral.QUANTITIES):
            raise ValueError(f"study: a measurement needs a name that no quantity has, got {name!r}; choose another")
        _takes(f"measure {name}", function, "params", "state", "batch")
    admission.loss("study", study.loss)
    _takes("loss", study.loss, "outputs", "targets")


def check_functions(study: Any, setup: program.Setup, cells: Sequence[program.Cell]) -> None:
    """Trace loss and measurements in the first cell; check what they return, the labels, and the names of quantities."""
    first = cells[0]
    net = program.network(setup, first.static, first.runs[0])
    pair = isinstance(net, nets.OfPair)
    if isinstance(net, nets.OfPair):
        _takes("the init that build returned", net.pair.init, "key", "x")
        _takes("the loss that build returned", net.pair.loss, "params", "batch")
    params, state, outputs, probe = cell.traced(setup, first)
    if not pair:
        if not hasattr(outputs, "shape"):
            raise ValueError(f"study: the net must return one array, got {check.describe(outputs)}")
        for part in (setup.train, setup.test):
            losses.check_targets(setup.loss, (part.size, *outputs.shape[1:]), part.y)
        jax.eval_shape(lambda a, b: measures.shares("study", setup.loss, a, b), outputs, probe[1])
    for name, function in setup.measure.items():
        jax.eval_shape(lambda *args, n=name, f=function: _numbers(n, f(*args)), params, state, probe)
    optimizers = list(dict.fromkeys(one.static["optimizer"] for one in cells))
    spectral.check_quantities(study.quantities, pair, optimizers, probe[0], outputs)
    known = {*(table.OF_PAIRS if pair else table.QUANTITIES), *nets.WATCHED, *spectral.QUANTITIES, *study.measure}
    if not (set(study.quantities or ()) - known) and not any(name.startswith("log10_") for name in study.measure):
        return
    names = set() if pair else cell.parameter_names(setup, first)  # the net may have parameters of other names
    logs = {pattern.format(name) for name in names for pattern in ("log10_{}", "log10_{}_rms")}
    if taken := logs.intersection(study.measure):
        raise ValueError(f"study: a measurement needs a name that no quantity has, got {min(taken)!r}; choose another")
    for quantity in study.quantities or ():
        check.choice("study", sorted(known | logs), quantity=quantity)


def check_cell(study: Any, static: dict[str, Any], runs: Sequence[dict[str, Any]], loaded: Any) -> None:
    """Check the values of a cell's axes, and that its net and optimiser can be built."""
    train = loaded[0]
    check.positive("study", batch_size=static["batch_size"])
    if static["batch_size"] > train.size:
        got = static["batch_size"]
        raise ValueError(f"study: batch_size must be at most the {train.size} training examples, got {got}")
    for run in runs:
        check.non_negative("study", seed=run["seed"])
        check.above_zero("study", learning_rate=run["learning_rate"], clip_threshold=run["clip_threshold"])
        check.at_least_zero("study", **{name: run[name] for name in ("sigma_w", "sigma_b") if name in run})
    setup = program.Setup(study.build, study.loss, {}, *loaded)
    program.network(setup, static, runs[0])
    program.optimizer(static, runs[0])


def arrays(source: Source) -> tuple[data.Dataset, data.Dataset]:
    """Return training and held-out examples as NumPy arrays; a single pair (x, y) is used for both.

    Floats keep their precision, except float64 without x64; labels become int32, as do other integers without x64.
    Errors: TypeError and ValueError for what is not a pair of arrays, frames or lists of real numbers.
    """
    if isinstance(source, Shared):
        return source.load()
    if isinstance(source, str | os.PathLike):
        return _named(os.fspath(source), _files(os.fspath(source)))
    try:
        first, second = source
    except (TypeError, ValueError):
        raise _no_data(source) from None
    pairs = ((first, second),)
    if _is_pair(first):
        if not _is_pair(second):
            raise _no_data(source)
        pairs = (first, second)
    who = ("study", "study: held-out examples")
    parts: list[Any] = [data.Dataset(*_pair(*named)) for named in zip(who, pairs, strict=False)]
    if len(parts) > 1 and any(a.shape[1:] != b.shape[1:] for a, b in zip(*parts, strict=True)):
        got = " and ".join(f"({check.describe(x)}, {check.describe(y)})" for x, y in parts)
        raise ValueError(f"study: training and held-out examples must have one shape, got {got}; reshape one of them")
    return parts[0], parts[-1]


def in_files(source: Any) -> bool:
    """Whether data are named by the path of their files, not by the name of a data set that fnn makes."""
    return isinstance(source, str | os.PathLike) and bool(_files(os.fspath(source)))


def _files(name: str) -> tuple[tuple[str, int, int], ...]:
    """List the files that a name stands for, each with its time and size; none of a data set that fnn makes."""
    if name in data.NAMES:
        return ()
    path = Path(name).expanduser().absolute()
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((str(a), a.stat().st_mtime_ns, a.stat().st_size) for a in found if a.is_file())


@functools.lru_cache(maxsize=4)
def _named(name: str, files: tuple[Any, ...]) -> tuple[data.Dataset, data.Dataset]:
    """Load data once, as long as the `files` are those that they were."""
    first, second = data.load(name, key=jax.random.key(0))
    return arrays((tuple(first), tuple(second)))


def about_data(source: Source) -> dict[str, Any]:
    """Say what a session notes of its data: their name, and the share of the commonest held-out label, which is chance."""
    y = np.asarray(arrays(source)[1].y)
    found: dict[str, Any] = {"data": source} if isinstance(source, str) else {}
    if np.issubdtype(y.dtype, np.integer) and y.ndim == 1 and len(y):
        found["chance"] = float(np.unique(y, return_counts=True)[1].max() / len(y))
    return found


def _is_pair(part: Any) -> bool:
    """Whether something is a pair (x, y), not examples: a tuple of two, or a list of two arrays."""
    if isinstance(part, data.Dataset):
        return True
    if type(part) not in (tuple, list) or len(part) != 2:
        return False
    return type(part) is tuple or any(hasattr(a, "shape") and np.ndim(a) > 0 for a in part)


def _pair(who: str, pair: Any) -> Any:
    for name, a in zip("xy", pair, strict=True):
        whole = type(a) in (list, tuple) or jax.tree.structure(a) == jax.tree.structure(0)
        if isinstance(a, Mapping | str | bytes) or not whole:
            got = type(a).__name__
            raise TypeError(f"{who}: {name} must be one array, got {got}; a study takes no trees of arrays")
    return as_pair(who, *pair, negative=True)


def _no_data(source: Any) -> TypeError:
    return TypeError(f"study: data must be a name, a pair (x, y), or ((x, y), (x, y)), got {type(source).__name__}")


def _takes(name: str, function: Callable[..., Any], *arguments: str) -> None:
    """Refuse what is not a function that can be called with these arguments."""
    if not callable(function):
        raise TypeError(f"study: {name} must be a function of ({', '.join(arguments)}), got {function!r}")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        got = f"{getattr(function, '__name__', function)!s}{inspect.signature(function)}"
        raise TypeError(f"study: {name} must be a function of ({', '.join(arguments)}), got {got}") from None
    except ValueError:
        return  # a builtin that does not say what it takes


def _numbers(name: str, result: Any) -> Any:
    leaves = jax.tree.leaves(result)
    for leaf in leaves or [None]:
        try:
            dtype = jnp.asarray(leaf).dtype
            real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
        except (TypeError, ValueError, OverflowError):
            real = False
        if not real:
            got = check.describe(leaf) if leaves else "none"
            raise TypeError(f"study: measure {name} must return real numbers, one or a tree of them, got {got}")
    return jax.tree.map(jnp.asarray, result)


def one_line(study: Any) -> str:
    """Describe a study in one line."""
    given = study.data if isinstance(study.data, str | os.PathLike) else check.describe(study.data)
    length = f"{study.epochs} epochs" if study.steps is None else f"steps {study.steps!s:.40}"
    seeds = study.seeds if isinstance(study.seeds, int) else len(study.seeds)
    points = f"{len(study.grid)} points of {', '.join(study.grid.axes):.200}"
    return f"Study({points}; {seeds} seeds, {length}, data {given!s:.80}, build {name_of(study.build):.80})"
