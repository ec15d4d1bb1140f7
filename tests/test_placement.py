"""A run on several devices is the run on one: on four in a process of its own (the table is `placed`), and in two processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import failures_of

HERE = Path(__file__).parent
TABLE = HERE / "placed.py"
SECTIONS = ("fit", "ways", "programs", "watched", "refusals")
pytestmark = pytest.mark.xdist_group("placement")


@pytest.mark.parametrize("section", SECTIONS)
def test_four_devices_equal_one(section):
    assert not {row: error for row, error in failures_of(TABLE, SECTIONS).items() if row.startswith(f"{section}/")}


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


DIFFERENT = """
import sys
import jax, numpy, optax, fnn

number, count = map(int, sys.argv[1:])
jax.distributed.initialize("localhost:12345", count, number)
mesh = jax.make_mesh((count,), ("data",))
same, other = (fnn.data.clusters(key=jax.random.key(k), examples=40, classes=4)[0] for k in (0, number))
net, optimizer = fnn.dense(4), optax.sgd(0.1)
states = [fnn.TrainState.create(net, optimizer, jax.random.key(k), same.x[:4]) for k in (0, number)]
step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
for state, data, key in ((0, same, number), (1, same, 0), (0, other, 0)):
    try:
        fnn.fit(step, states[state], data, epochs=1, batch_size=4, key=jax.random.key(key), mesh=mesh)
        print("loss 1")
    except ValueError as error:
        print("loss 0" if "must be the same in every process" in str(error) else error)
"""


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


def test_processes_that_hold_other_keys_states_or_data_are_refused(tmp_path):
    (tmp_path / "two.py").write_text(DIFFERENT)
    port = free_port()
    both = [start(tmp_path, port, str(i), "2") for i in range(2)]
    assert [numbers(process) for process in both] == [[0, 0, 0]] * 2
