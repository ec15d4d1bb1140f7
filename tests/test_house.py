"""The rules of the house: rooms import downwards, importing is light, public names are documented, README runs."""

import ast
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fnn
from fnn.study import table, words

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (\d) \| `(fnn/[a-z]*/?)` \| (.*) \|$", re.M)
LISTED = [
    (int(floor), folder, re.findall(r"(?:^|· )`([a-z_]+)`", files))
    for floor, folder, files in ROW.findall((ROOT / "README.md").read_text())
]
"""The README's table: (floor, folder, files in the order of their imports)."""
PLACE = {
    (folder + name).replace("/", "."): (floor, row, column)
    for row, (floor, folder, files) in enumerate(LISTED)
    for column, name in enumerate(files)
}
FREE = {
    *(
        "options",
        "description",
        "session",
        "sessions",
        "complete",
        "note",
        "there",
        "here",
        "fixed",
        "grid.words",
    ),  # of JSON, or named
    *("static", "runs"),  # values of axes
    "run",  # of a file above
    "structure",  # JAX's PyTreeDef is no type for pyright
    *("Study.describe", "report.contents", "Results.description"),  # JSON
}
"""Public parameters, fields and returns that are no arrays, and may be anything."""
ALLOWED = {"jax", "jaxlib", "optax", "flax", "numpy", "fnn"} | set(sys.stdlib_module_names)


def imports(path):
    """(module, names, at module level) of every import of a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names], node in tree.body


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = sorted(path for path in (ROOT / "fnn").rglob("*.py") if not path.stem.startswith("__"))


def definitions(body, prefix):
    """(full name, node) of every function, class and method."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{prefix}.{node.name}", node
            yield from definitions(node.body if isinstance(node, ast.ClassDef) else (), f"{prefix}.{node.name}")


def names_in(annotation):
    """All names in an annotation, within strings too."""
    for node in ast.walk(annotation) if annotation else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from names_in(ast.parse(node.value))
        elif isinstance(node, ast.Name):
            yield node.id


def annotations(name, node):
    """(name of a parameter, a field, or what is returned; annotation)."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        for arg in (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg):
            yield from [(arg.arg, arg.annotation)] if arg else []
        yield ".".join(name.split(".")[-2:]), node.returns
    else:
        fields = (field for field in node.body if isinstance(field, ast.AnnAssign))
        yield from ((field.target.id, field.annotation) for field in fields if field.target.id[0] != "_")


def public():
    """{full name: node} of all functions, classes and methods that `dir(fnn)` leads to, with the classes that they return."""
    nodes = dict(pair for path in FILES for pair in definitions(ast.parse(path.read_text()).body, module_of(path)))
    todo, found = [getattr(fnn, name) for name in dir(fnn)], {}
    todo += [
        value for thing in todo if inspect.ismodule(thing) for name, value in vars(thing).items() if name[0] != "_"
    ]
    while todo:
        thing = inspect.unwrap(todo.pop())
        thing = thing if hasattr(thing, "__qualname__") else type(thing)
        name = f"{thing.__module__}.{thing.__qualname__}"
        if name in nodes and name not in found:
            for own, node in definitions([nodes[name]], thing.__module__):
                if not node.name.startswith("_") or node.name in ("__init__", "__new__", "__call__", "__getitem__"):
                    found[own], returned = node, names_in(getattr(node, "returns", None))
                    space = vars(sys.modules[thing.__module__])
                    todo += [space[part] for part in returned if inspect.isclass(space.get(part))]
    return found


def test_readme_lists_every_file_once():
    listed = [folder + name for _, folder, files in LISTED for name in files]
    assert sorted(listed) == sorted(module_of(path).replace(".", "/") for path in FILES)


def test_folders_say_what_they_are_for_and_export_nothing():
    for path in (ROOT / "fnn").glob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, path


def test_dir_shows_the_public_names_alone_and_none_hides_a_module():
    assert sorted(dir(fnn)) == sorted(fnn.__all__)
    for path in (ROOT / "fnn").rglob("*.py"):
        name = module_of(path).removesuffix(".__init__")
        if name != "fnn.__main__":
            assert importlib.import_module(name) is functools.reduce(getattr, name.split(".")[1:], fnn), name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down_and_stay_public(path):
    assert module_of(path) in PLACE, f"{path.relative_to(ROOT)} is not in the table of README.md"
    floor, row, column = PLACE[module_of(path)]
    for module, names, top in imports(path):
        assert "jax._src" not in module and not module.startswith(("jax.core", "jax.interpreters")), module
        assert not top or module.split(".")[0] in ALLOWED, f"{module} must not be imported at module level"
        for name in [module] if module in PLACE else [f"{module}.{name}" for name in names]:
            if name in PLACE:
                there = PLACE[name]
                below = there[0] < floor or (there[1] == row and there[2] < column)
                assert below, f"{module_of(path)} imports {name}"
            elif module.split(".")[0] == "fnn":
                assert name in ("fnn.__version__", "fnn.__all__") or (module == "fnn" and not names), name


def test_every_quantity_of_a_study_has_a_word():
    # What diverged is called so; a root mean square is derived from its norm.
    named = {*words._KNOWN, *(f"{name}_rms" for name in words._KNOWN), "diverged"}
    assert [name for name in table.QUANTITIES if name not in named] == []


def test_one_file_knows_platforms():
    for path in FILES:
        found = re.search(r"default_backend|platform_dependent|\.platform\s*[!=]=|\.platform in ", path.read_text())
        assert module_of(path) == "fnn.lowering" or not found, path


def test_every_public_name_has_a_docstring():
    for name in fnn.__all__:
        thing = getattr(fnn, name)
        assert inspect.getdoc(thing), name
        if inspect.ismodule(thing):
            for inner, value in vars(thing).items():
                if not inner.startswith("_") and inspect.isfunction(value) and value.__module__ == thing.__name__:
                    assert inspect.getdoc(value), f"{name}.{inner}"


def test_what_holds_arrays_is_typed():
    """Arrays, trees of arrays, keys, axis names, dtypes, tables, figures, paths: no public annotation says `Any` for them."""
    checked = [(name, *pair) for name, node in public().items() for pair in annotations(name, node)]
    seen = {part for _, part, _ in checked}
    assert seen >= {*("key", "mask", "axis_name", "mesh", "path"), *("Flow.table", "PerExampleGradients.mean")}
    assert not [(name, part) for name, part, said in checked if "Any" in names_in(said) and part not in FREE]


def test_functions_of_more_than_six_parameters_say_why():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in ("apply", "layer_apply"):
                names = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg not in ("self", "cls")]
                said = re.search("argument|keyword|option|parameter", ast.get_docstring(node) or "", re.I)
                assert len(names) <= 6 or said, f"{path.name}: {node.name}"


def test_no_file_is_longer_than_350_lines():
    paths = [path for folder in ("fnn", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert not [path.name for path in paths if len(path.read_text().splitlines()) > 350]


def test_import_is_light_and_touches_no_backend():
    """fnn brings nothing beyond what it depends on and the standard library."""
    code = """if True:
        import sys, jax, jaxlib, flax.struct, optax, numpy
        before = {name.split(".")[0] for name in sys.modules}
        import fnn, fnn.datasets.data
        print(*{name.split(".")[0] for name in sys.modules} - before)"""
    # A platform that does not exist: whatever initialises a backend fails.
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    more = set(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split())
    assert "fnn" in more and more <= {"fnn", *sys.stdlib_module_names}


SMALLER = {
    "Net(12, ": "Net(3, ",
    "range(12)": "range(3)",
    '("tanh")), 50),': '("tanh")), 20),',
    "epochs=3, batch_size=64": "epochs=1, batch_size=256",
    '{"width": [16, 32], ': '{"width": [16], ',
}
"""What a quick run changes in the README's code: fewer layers, epochs and programs."""


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["smaller", "whole"])
def test_readme_code_runs_and_its_flows_hold_the_gradients_of_jax(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    assert all(readme.count(words) == 1 for words in SMALLER)
    smaller = functools.reduce(lambda text, pair: text.replace(*pair), SMALLER.items(), readme)
    blocks = re.findall(r"```python\n(.*?)```", readme if whole else smaller, re.S)
    assert blocks
    space, watched = {}, 0
    for block in blocks:
        if not whole and (
            "fnn.curvature" in block or '"run/state"' in block
        ):  # a third of all time; test_script runs it
            continue
        before = space.get("params")
        exec(compile(block, "README.md", "exec"), space)
        if "fnn.watch(loss" in block:
            loop = "logged" in block  # it trains: its first entry is that of the parameters before
            params, batch = before if loop else space["params"], space["batch"]
            aux = "has_aux" in block
            grads = jax.jit(jax.grad(space["loss"], has_aux=aux))(params, batch)
            names = [name.removesuffix("/value") for name in fnn.tree.paths(params)]
            expected = [np.log10(np.linalg.norm(g)) for g in jax.tree.leaves(grads[0] if aux else grads)]
            found = space["logged"][0] if loop else space["flow"].flat()
            found = [found[f"{name}/log10_gradient"] for name in names]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            watched += 1
        if "difference = " in block:
            assert space["difference"].first_forward == (13 if whole else 4) and sorted(space["logged"]) == [0, 50]
    printed = capsys.readouterr().out.splitlines()
    shown = re.findall(r"```text\n(.*?)```", readme, re.S)
    begins = [text.splitlines()[0][: 10 if whole else 5] for text in shown]  # "loss 2.415" is that of the whole net
    assert all(any(line.startswith(begin) for line in printed) for begin in begins) and len(shown) == 2
    assert watched == 6
    assert space["flow"].log10_error.shape[0] >= (50 if whole else 20)
