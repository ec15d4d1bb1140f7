"""Name functions and values by their content: two get the same name only if they do the same.

A function's content is its module and name, its compiled code, and everything that the code reaches: the values that it
closes over, its defaults, its attributes, the global names that it reads, and their content in turn. fnn and installed
packages count by name and version; those whose versions `sessions.json` records, by name alone. Something without
readable content (an open file, a lock, a traced value) is a doubt. Not seen: files, environment variables, and names that
a program looks up while it runs.
"""

import copyreg
import functools
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import compiled, losses
from fnn.core import Layer

MOST = 200_000
"""Values that are looked at; a function that reaches more is in doubt."""
RECORDED = ("fnn", "jax", "jaxlib", "optax", "flax", "numpy", "polars")
"""Packages whose versions each session records."""
LINEN = ("flax.linen.module", "Module")
RUNNING = {"_id", "_state", "_parent_ref"}
"""What Flax counts while a process runs, and no part of what a module is."""
HEAP_TYPE = 1 << 9
"""Python's flag of classes that a `class` statement has made."""
_HOME = Path(__file__).parent.parent
_MEMBERS = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
)
_WRAPPERS = {
    types.MethodType: ("__func__", "__self__"),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    functools.cached_property: ("func",),
}
"""What holds functions, and the attributes in which it holds them."""
_DESCRIPTORS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)


class Identity(NamedTuple):
    """The name of a function or value."""

    name: str
    """Module, name, and 12 digits of the SHA-256 of everything reached."""
    doubts: tuple[str, ...]
    """What was reached and could not be read: `log, a TextIOWrapper`."""


def identify(value: Any) -> Identity:
    """Name a function, or any value, by its content. Never raises."""
    walk = _Walk()
    try:
        digest = walk.digest(value, "")
    except RecursionError:
        digest, walk.doubts = b"", {"values nested too deeply": None}
    label = repr(value) if isinstance(value, losses.Loss) else _label(value)
    if _is_ours(value):
        return Identity(f"{label} {_version('fnn')}", ())
    version = f" (Python {sys.version_info.major}.{sys.version_info.minor})" if walk.code else ""
    return Identity(f"{label}{version} {digest.hex()[:12]}", tuple(walk.doubts))


def canonical(value: object) -> object:
    """Write equal numbers alike in a tree of JSON: 1.0 becomes 1; true stays true."""
    if isinstance(value, dict):
        return {name: canonical(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Walk:
    """One pass over everything that a value reaches. The digest of each is made of its type and of its parts' digests."""

    def __init__(self):
        self.doubts: dict[str, None] = {}
        self.code = False
        """Whether compiled code was read, which another Python writes in another way."""
        self._known: dict[int, bytes] = {}
        self._open: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is given twice

    def digest(self, value: Any, where: str) -> bytes:
        if value is None or value is ... or isinstance(value, bool | str | bytes):
            return _hash(type(value).__name__, repr(value))
        if isinstance(value, int | float | complex | np.number) and type(value).__module__ in ("builtins", "numpy"):
            return _hash("number", _number(value))
        if id(value) in self._known:
            return self._known[id(value)]
        if id(value) in self._open:  # a cycle: how far up it closes
            return _hash("above", str(len(self._open) - self._open[id(value)]))
        if len(self._kept) >= MOST:
            return self._doubt(f"more than {MOST:,} values")
        self._kept.append(value)
        self._open[id(value)] = len(self._open)
        try:
            self._known[id(value)] = result = self._parts(value, where)
        finally:
            del self._open[id(value)]
        return result

    def _parts(self, value: Any, where: str) -> bytes:
        kind = type(value)
        if kind in (tuple, list, Layer):  # of a layer its two functions: what it prints as does nothing
            return self._all(kind.__name__, value, where)
        if kind in (dict, types.MappingProxyType):
            pairs = (self._all("", (k, v), str(k) if isinstance(k, str) else where) for k, v in value.items())
            return _hash("dict", *sorted(pairs))
        if kind in (set, frozenset):
            return _hash("set", *sorted(self.digest(v, where) for v in value))
        if isinstance(value, np.ndarray | jax.Array):
            return self._array(value, where)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._compiled(value, where)
        if isinstance(value, type):
            return self._class(value, where)
        if isinstance(value, types.ModuleType):
            return _hash("module", value.__name__)
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            owner = value.__self__
            return _hash(
                "builtin", _label(value), *([] if isinstance(owner, types.ModuleType) else [self.digest(owner, where)])
            )
        if isinstance(value, _MEMBERS):
            return _hash("member", value.__objclass__.__qualname__, value.__name__)
        for wrapper, names in _WRAPPERS.items():
            if isinstance(value, wrapper):
                return self._all(wrapper.__name__, [getattr(value, name) for name in names], where)
        if hasattr(value, "__wrapped__") and kind.__module__.split(".")[0] in ("functools", "jaxlib"):
            return self._all(_label(kind), (value.__wrapped__,), where)  # a cache or `jit` around a function
        return self._object(value, where)

    def _all(self, tag: str, parts: Iterable[Any], where: str) -> bytes:
        return _hash(tag, *(self.digest(part, where) for part in parts))

    def _doubt(self, what: str) -> bytes:
        self.doubts[what] = None
        return _hash("doubt", what)

    def _array(self, value: Any, where: str) -> bytes:
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return _hash("objects", str(value.shape), self._all("", value.ravel().tolist(), where))
        try:
            if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                return _hash("key", str(jax.random.key_impl(value)), np.asarray(jax.random.key_data(value)).tobytes())
            a = np.asarray(value)
        except jax.errors.TracerArrayConversionError:
            return self._doubt(f"{where}, a traced value")
        return _hash("array", str(a.dtype), str(a.shape), np.ascontiguousarray(a).tobytes())

    def _object(self, value: Any, where: str) -> bytes:
        """Read an object as pickle would: what makes it, and from what."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
            parts = (parts,) if isinstance(parts, str) else (*parts[:3], *(list(p or ()) for p in parts[3:5]))
            if any((t.__module__, t.__name__) == LINEN for t in type(value).__mro__) and len(parts) > 2:
                content = {name: a for name, a in vars(value).items() if name not in RUNNING}
                parts = (*parts[:2], content, *parts[3:])
        except RecursionError:
            raise
        except Exception:  # __reduce__ may be anybody's code
            return self._doubt(f"{where or 'itself'}, a {type(value).__name__}")
        return self._all("object", (type(value), *parts), where)

    def _function(self, value: types.FunctionType) -> bytes:
        code, label = value.__code__, _label(value)
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        parts = [self._cell(cell, name) for name, cell in cells]
        parts += [self.digest(part, value.__name__) for part in (value.__defaults__, value.__kwdefaults__)]
        if _package(code.co_filename) is not None:  # a library's: by name, and by what was given to it
            return _hash("function", label, _version(_package(code.co_filename)), *parts)
        attributes = {name: v for name, v in vars(value).items() if name != "__wrapped__"}
        reads, attrs, modules = compiled.reads(code)
        for name in sorted(reads & value.__globals__.keys()):
            parts += [name.encode(), self._global(value.__globals__[name], attrs, name)]
        for name in sorted(modules):
            parts += [name.encode(), self._imported(name, attrs)]
        return _hash("function", label, self.digest(code, label), self.digest(attributes, label), *parts)

    def _cell(self, cell: Any, name: str) -> bytes:
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            return _hash("cell", name)
        return _hash("cell", name, self.digest(content, name))

    def _global(self, value: Any, attrs: frozenset[str], name: str) -> bytes:
        """A module of the user's counts as far as its names are used."""
        if (
            not isinstance(value, types.ModuleType)
            or _package(getattr(value, "__file__", None) or "<frozen>") is not None
        ):
            return self.digest(value, name)
        used = sorted(attrs & vars(value).keys())
        if id(value) in self._open:
            return _hash("module", value.__name__)
        self._open[id(value)] = len(self._open)
        try:
            return _hash("module", value.__name__, *(self._global(vars(value)[n], attrs, n) for n in used))
        finally:
            del self._open[id(value)]

    def _imported(self, name: str, attrs: frozenset[str]) -> bytes:
        """A module that a function imports when it is called."""
        try:
            spec = importlib.util.find_spec(name.partition(".")[0])
            if spec is None or _package(spec.origin or "<frozen>") is not None:
                return _hash("module", name)
            return self._global(importlib.import_module(name), attrs, name)
        except Exception:  # importing runs anybody's code
            return self._doubt(f"{name}, a module that cannot be imported")

    def _compiled(self, code: types.CodeType, where: str) -> bytes:
        self.code = True
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        # Constants as they are written: x ** 2 and x ** 2.0 are two programs.
        constants = [
            self.digest(c, where) if isinstance(c, types.CodeType | frozenset | tuple) else _hash(repr(c))
            for c in code.co_consts
        ]
        names = repr((shape, arguments, code.co_names, code.co_freevars, code.co_cellvars))
        return _hash("code", names, code.co_code, code.co_exceptiontable, *constants)

    def _class(self, cls: type, where: str) -> bytes:
        module = sys.modules.get(cls.__module__)
        # Without a file: a builtin, which its module holds or C has made, or a class of a notebook or of `exec`.
        held = cls.__module__ != "__main__" and getattr(module, cls.__qualname__, None) is cls
        builtin = held or not cls.__flags__ & HEAP_TYPE
        package = _package(getattr(module, "__file__", None) or ("<frozen>" if builtin else "?"))
        if package is not None:
            return _hash("class", _label(cls), _version(package))
        members = {
            name: member
            for name, member in vars(cls).items()
            if isinstance(member, _DESCRIPTORS) or not (name.startswith("__") or name == "_abc_impl")
        }
        return _hash("class", _label(cls), self.digest(cls.__bases__, where), self.digest(members, where))


def _hash(*parts: str | bytes) -> bytes:
    total = hashlib.sha256()
    for part in parts:
        part = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(len(part).to_bytes(8, "big") + part)
    return total.digest()


def _number(value: Any) -> str:
    if isinstance(value, complex | np.complexfloating):
        return f"{_number(value.real)} {_number(value.imag)}"
    if isinstance(value, int | np.integer):
        return hex(int(value))
    value = float(value)
    return hex(int(value)) if value.is_integer() else value.hex()


def _label(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    value = value if isinstance(getattr(value, "__qualname__", None), str) else type(value)
    module, name = getattr(value, "__module__", None), value.__qualname__
    return f"{module}.{name}" if module else name


def _is_ours(value: Any) -> bool:
    """Whether a value is one of fnn's own: its name and fnn's version identify it."""
    if isinstance(value, losses.Loss):
        return any(value is own for own in vars(losses).values())
    if not isinstance(value, types.FunctionType) or value.__closure__ or not str(value.__module__).startswith("fnn."):
        return False
    module = sys.modules.get(value.__module__)
    return getattr(module, value.__name__, None) is value and _package(value.__code__.co_filename) == "fnn"


@functools.cache
def _package(filename: str) -> str | None:
    """Name the installed package that a file belongs to; None for the user's own files."""
    if filename.startswith("<frozen"):
        return "python"
    path = Path(filename)
    if path.is_relative_to(_HOME):
        return "fnn"
    for place in ("site-packages", "dist-packages"):
        if place in path.parts:
            return path.parts[path.parts.index(place) + 1].removesuffix(".py")
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    return "python" if any(path.is_relative_to(root) for root in roots if root) else None


@functools.cache
def _version(package: str | None) -> str:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    if package == "fnn":
        import fnn

        return fnn.__version__
    if package is None or package == "python" or package in RECORDED:
        return ""
    try:
        return version(packages_distributions().get(package, [package])[0])
    except PackageNotFoundError:
        return "of no known version"
