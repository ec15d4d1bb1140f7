"""A run on several devices is the run on one: on four in a process of its own (the table is `placed`), and in two processes."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = HERE / "placed.py"
SECTIONS = ("fit", "ways", "programs", "watched", "refusals")
pytestmark = pytest.mark.xdist_group("placement")


@functools.cache
def failures():
    run = subprocess.run([sys.executable, str(TABLE)], capture_output=True, text=True, env=os.environ)
    if run.returncode:
        return {f"{section}/crash": run.stderr[-3000:] for section in SECTIONS}
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("section", SECTIONS)
def test_four_devices_equal_one(section):
    assert not {row: error for row, error in failures().items() if row.startswith(f"{section}/")}


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def start(folder, port, *arguments):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu"}
    script = (folder / "two.py").read_text().replace("12345", port)
    (folder / "two.py").write_text(script)
    command = [sys.executable, "two.py", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def numbers(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return [float(number) for number in re.findall(r"(?:loss|accuracy) ([\d.e-]+)", output)]


def test_two_processes_of_the_readme_equal_one(tmp_path):
    """Each gives its share of every batch; both report the curve of the run on one device."""
    readme = (HERE.parent / "README.md").read_text()
    (script,) = re.findall(r"cat > two.py <<'END'\n(.*?)END\n", readme, re.S)
    (tmp_path / "two.py").write_text(script)
    port = free_port()
    both = [start(tmp_path, port, str(i), "2") for i in range(2)]
    found = [numbers(process) for process in both]
    alone = numbers(start(tmp_path, port, "0", "1"))
    assert len(alone) == 12 and alone[0] > 1 > alone[8]
    assert found[0] == found[1] == pytest.approx(alone, rel=2e-3)
