"""The package as it is shipped: sdist and wheel build without a warning, and the wheel alone is enough."""

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import fnn

ROOT = Path(__file__).parent.parent
SHIPPED = {
    str(path.relative_to(ROOT)) for path in (ROOT / "fnn").rglob("*") if path.suffix in (".py", ".html", ".typed")
}
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
IMPORT_ALL = """
import importlib, pkgutil, sys
import fnn
names = [found.name for found in pkgutil.walk_packages(fnn.__path__, "fnn.") if not found.name.endswith("__main__")]
print(len([importlib.import_module(name) for name in names]), fnn.__file__)
"""
COMMAND = """
from importlib.metadata import entry_points
entry_points(group="console_scripts")["fnn"].load()(["--help"])
"""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel, built from a copy of what git would ship."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *SHIPPED):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-W", "error", "-c", BUILD, cwd=source)
    return source / "dist"


def test_sdist_and_wheel_hold_every_file(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert set(wheel.namelist()) >= SHIPPED
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        assert {name.partition("/")[2] for name in sdist.getnames()} >= SHIPPED


def test_the_wheel_alone_imports_and_answers_from_another_folder(built, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    # The dependencies are those of this environment; its .pth files, fnn's own among them, are not read.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    count, place = run(python, "-I", "-W", "error", "-c", IMPORT_ALL, cwd=tmp_path).split()
    assert int(count) == len([name for name in SHIPPED if name.endswith(".py")]) - 2 and Path(place).is_relative_to(
        site
    )
    assert "study" in run(python, "-I", "-c", COMMAND, cwd=tmp_path)


def test_versions_agree():
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert fnn.__version__ == written == cited[1]
