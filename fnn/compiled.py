"""Compiled programs that equal nets share, and of which a limited number is kept.

`jax.jit` with a net as a static argument tells nets apart by the identity of their functions: it compiles anew for a net
that is built a second time, and keeps the programs of nets that are gone. Here two functions are equal if their code is,
and by value what they close over, their defaults, and the global names that they read. Functions of JAX, NumPy and fnn
count as fixed. If any part cannot be read for sure (an array, an object with a state of its own, a module of the
user's), the net is known by its identity, as `jax.jit` knows it, and its programs go when it goes.

What stays is JAX's own: it keeps a program of 1 to 3 MB for each new shape that an operation outside of `jit` sees, such as
the draws of `init`, thousands of them. A loop over very many sizes of nets frees these with `jax.clear_caches()`.
"""

import builtins
import contextlib
import dis
import functools
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from fnn import mapped

SHARED, OWN = 64, 16
"""How many compiled functions are kept: of nets that could be read, and of those known by identity, which may hold arrays."""
SHAPES = 32
"""For how many shapes of its arrays each is kept."""
LIBRARIES = {"fnn", "jax", "jaxlib", "numpy", "optax", "flax", "math", "functools", "operator", "itertools", "builtins"}


def call(function: Callable[..., Any], statics: tuple[Any, ...], *arrays: Any) -> Any:
    """Run `function(*statics, *arrays)` compiled, as equal statics have run before; arrays may lie on a mesh."""
    return program(function, statics, keep=not traced(arrays))(*arrays)


def program(function: Callable[..., Any], statics: tuple[Any, ...], keep: bool = True) -> Callable[..., Any]:
    """Give the compiled `(*arrays) -> function(*statics, *arrays)`; `function` itself is known by identity.

    With `keep=False` a program of statics that cannot be read lives only as long as its caller holds it.
    """
    try:
        jitted = _shared(function, key(statics))
    except Unreadable:
        jitted = _kept(function, statics) if keep else _compile(function, statics)

    def run(*arrays):
        static = _Static(statics)
        try:
            return jitted(static, *arrays)
        finally:
            static.values = ()  # JAX keeps static arguments long after the program is gone

    return run


def limited(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Do `jax.jit(function, **options)`, and forget its programs once there are more than `SHAPES`.

    For functions of a module that see arrays of ever new shapes, those of each net: `jax.jit` would keep thousands.
    """
    programs = 0

    @functools.wraps(function)
    def counted(*args, **kwargs):  # runs when it is traced
        nonlocal programs
        programs += 1
        return function(*args, **kwargs)

    jitted: Any = jax.jit(counted, **options)

    @functools.wraps(function)
    def run(*args, **kwargs):
        nonlocal programs
        out = jitted(*args, **kwargs)
        if programs > SHAPES:
            programs = 0
            jitted.clear_cache()
        return out

    return run


_TRACER: type = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue]


def traced(arrays: Any) -> bool:
    """Whether arrays are being traced, by `jit`, `vmap` or `grad`."""
    return any(isinstance(leaf, _TRACER) for leaf in jax.tree.leaves(arrays))


def key(value: Any) -> tuple[Any, ...]:
    """Write a value as a tuple that is equal for equal values. Errors: `Unreadable`."""
    reader = _Reader()
    reader.read(value)
    return tuple(reader.tokens)


class Unreadable(Exception):
    """What a value does cannot be told from what it holds."""


class _Static:
    """Statics on their way into a trace. All are alike to `jit`, which has one program for equal ones: what is traced
    are those of the caller, as they are now, not as they were when the program was first compiled. After the call they
    are taken out."""

    def __init__(self, values: tuple[Any, ...]):
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static)

    def __hash__(self) -> int:
        return 0


def _compile(function: Callable[..., Any], _: Any) -> Any:
    def run(static, *arrays):
        return mapped.auto(functools.partial(function, *static.values))(*arrays)

    run.__name__ = function.__name__
    return limited(run, static_argnums=0)


_shared = functools.lru_cache(SHARED)(_compile)
_own: OrderedDict[Any, Any] = OrderedDict()
"""Programs by function and statics, the newest last."""


def _kept(function: Callable[..., Any], statics: tuple[Any, ...]) -> Any:
    """Compile for statics that are known by identity: once any of them is gone, nobody can ask for the program again."""
    own = _own  # at the interpreter's end no module has its names any more

    def gone(_):
        own.pop(key, None)

    key = function, _weakly(statics, gone)
    own[key] = jitted = own.pop(key, None) or _compile(function, statics)
    if len(own) > OWN:
        own.popitem(last=False)
    return jitted


def _weakly(value: Any, gone: Callable[[Any], None]) -> Any:
    """Replace what is equal to itself alone by a weak reference to it, in tuples too."""
    if isinstance(value, tuple):
        return type(value), *(_weakly(part, gone) for part in value)
    if type(value).__hash__ is object.__hash__:
        with contextlib.suppress(TypeError):  # it takes none, like `None`
            return weakref.ref(value, gone)
    return value


class _Reader:
    """One walk over everything that a value holds, written down as tokens."""

    def __init__(self):
        self.tokens: list[Any] = []
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id is given twice

    def read(self, value: Any) -> None:
        kind = type(value)
        if value is None or value is ... or kind in (bool, int, str, bytes):
            self.tokens += (kind, value)
        elif kind in (float, complex):
            self.tokens += (kind, repr(value))
        elif isinstance(value, np.dtype):
            self.tokens.append(value)
        elif isinstance(value, np.generic):
            self.tokens += (value.dtype, value.tobytes())
        elif id(value) in self.seen:
            self.tokens += ("seen", self.seen[id(value)])
        else:
            self.seen[id(value)] = len(self.seen)
            self.kept.append(value)
            self._parts(value, kind)

    def _parts(self, value: Any, kind: type) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, tuple) or kind is list:
            self._all((kind, len(value)), value)
        elif kind is dict:
            self._all((kind, len(value)), (part for pair in value.items() for part in pair))
        elif isinstance(value, functools.partial):
            self._all((kind,), (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._all((kind,), (value.__func__, value.__self__))
        elif kind is slice:
            self._all((kind,), (value.start, value.stop, value.step))
        elif _of_a_library(value):
            self.tokens.append(value)
        elif kind in (jax.custom_jvp, jax.custom_vjp) or (kind.__module__.startswith("fnn.") and _of_a_library(kind)):
            self._all((kind,), [vars(value)] if hasattr(value, "__dict__") else self._unreadable(value))
        else:
            self._unreadable(value)

    def _all(self, tokens: Iterable[Any], parts: Iterable[Any]) -> None:
        self.tokens += tokens
        for part in parts:
            self.read(part)

    def _function(self, value: types.FunctionType) -> None:
        code, module = value.__code__, value.__globals__.get("__name__")
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # a name that is not bound yet
            self._unreadable(value)
        library = _is_library(module)
        self._all((code, module if library else None), (cells, value.__defaults__, value.__kwdefaults__))
        if library:
            return
        if value.__dict__:
            self._unreadable(value)
        names, attributes, modules = reads(code)
        for name in sorted(names):
            if name in value.__globals__:
                self._global(name, value.__globals__[name], attributes)
            elif not hasattr(builtins, name):
                self._unreadable(value)
        for name in sorted(modules):
            self._global(name, sys.modules.get(name), attributes)

    def _global(self, name: str, value: Any, attributes: frozenset[str]) -> None:
        if not isinstance(value, types.ModuleType):
            self._all((name,), (value,))
        elif _is_library(value.__name__) and not (value is np and "random" in attributes):
            self.tokens += (name, value.__name__)
        else:
            self._unreadable(value)

    def _unreadable(self, value: Any) -> Any:
        raise Unreadable(type(value).__name__)


def _is_library(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in LIBRARIES and not module.startswith("numpy.random")


def _of_a_library(value: Any) -> bool:
    """Whether a function or class is what a library's module holds under its name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return _is_library(module) and isinstance(name, str) and getattr(sys.modules.get(str(module)), name, None) is value


@functools.lru_cache(1 << 12)
def reads(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """List the global names, the attributes and the modules that a function and those inside it ask for."""
    names: set[str] = set()
    attributes: set[str] = set()
    modules: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            attributes.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME" and instruction.argval:
            modules.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            for mine, more in zip((names, attributes, modules), reads(inner), strict=True):
                mine |= more
    return frozenset(names), frozenset(attributes), frozenset(modules)
