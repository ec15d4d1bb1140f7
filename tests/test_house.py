"""The rules of the house: rooms import downwards, importing is light, public names are documented, README runs."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fnn

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        *("check", "files", "arrays", "tree", "masks", "grid", "activations", "initializers", "_jaxpr", "factors"),
        *("spawning", "mapped", "blocks"),
    },
    {"core", "losses", "gaussian", "squares", "alike", "sealed", "axes"},
    {"inputs", "dataset", "lift", "identity", "precision", "admission", "products"},
    {"memory", "layers"},
    {
        *("norm", "conv", "recurrent", "attention", "tokens", "taps", "synthetic"),
        *("finite_width", "rates", "cuts", "example_gradients"),
    },
    {"models", "clip", "numbers", "meanfield", "data", "per_example", "noise"},
    {"flow", "optimizers"},
    {"train"},
    {"fitting"},
    {"cell", "workers", "provenance"},
    {"table"},
    {"results", "asked"},
    {"study", "plot", "digest", "recipes", "compare"},
    {"figures"},
    {"report"},
    {"cli_study"},
    {"cli"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
ALLOWED = {"jax", "jaxlib", "optax", "flax", "numpy", "fnn"} | set(sys.stdlib_module_names)


def imports(path):
    """(module, names, at module level) of every import of a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names], node in tree.body


@pytest.mark.parametrize("path", sorted((ROOT / "fnn").glob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down_and_stay_public(path):
    for module, names, top in imports(path):
        assert "jax._src" not in module and not module.startswith(("jax.core", "jax.interpreters")), module
        assert not top or module.split(".")[0] in ALLOWED, f"{module} must not be imported at module level"
        if path.stem in FLOOR:
            rooms = names if module == "fnn" else [module.removeprefix("fnn.")] if module.startswith("fnn.") else []
            for room in rooms:
                ground = FLOOR.get(room, -1)
                assert ground < FLOOR[path.stem] or ground == FLOOR[path.stem] == 0, f"{path.stem} imports {room}"
    assert path.stem in FLOOR or path.stem.startswith("__"), "a new room needs a floor"


def test_every_public_name_has_a_docstring():
    for name in fnn.__all__:
        thing = getattr(fnn, name)
        assert inspect.getdoc(thing), name
        if inspect.ismodule(thing):
            for inner, value in vars(thing).items():
                if not inner.startswith("_") and inspect.isfunction(value) and value.__module__ == thing.__name__:
                    assert inspect.getdoc(value), f"{name}.{inner}"


def test_import_is_light_and_touches_no_backend():
    code = "import sys, {}; print(*{{name.split('.')[0] for name in sys.modules}})"
    # A platform that does not exist: whatever initialises a backend fails.
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}

    def loaded(modules):
        command = [sys.executable, "-W", "ignore", "-c", code.format(modules)]
        return set(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split())

    assert loaded("fnn") - loaded("jax, jaxlib, flax.struct, optax, numpy") <= {"fnn", *sys.stdlib_module_names}


def test_readme_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["flow"].error.shape[0] >= 50
