"""A run on several devices is the run on one: on four in a process of its own (the table is `placed`), and in two processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest
from conftest import failures_of

import fnn

HERE = Path(__file__).parent
TABLE = HERE / "placed.py"
SECTIONS = ("fit", "ways", "programs", "watched", "refusals")
pytestmark = pytest.mark.xdist_group("placement")


@pytest.mark.parametrize("section", SECTIONS)
def test_four_devices_equal_one(section):
    assert not {row: error for row, error in failures_of(TABLE, SECTIONS).items() if row.startswith(f"{section}/")}


@pytest.mark.slow
def test_four_devices_equal_one_in_more_cases():
    assert not failures_of(TABLE, ("--slow",))


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


TWO = """
import sys
import jax, fnn
from test_placement import trained

number, count = map(int, sys.argv[1:])
jax.distributed.initialize("localhost:12345", count, number)
mesh = jax.make_mesh((count,), ("data",))
for loss in trained(slice(number, None, count), mesh=mesh):
    print("loss", loss)
for keys in ((0, number, 0), (number, 0, 0), (0, 0, number)):
    try:
        trained(slice(None), *keys, mesh=mesh)
        print("loss 1")
    except ValueError as error:
        print("loss 0" if "must be the same in every process" in str(error) else error)
"""


def trained(own, data=0, state=0, key=0, **options):
    """Losses of three steps on each batch's share, or on data in memory."""
    train = fnn.data.clusters(key=jax.random.key(data), examples=40, classes=4)[0]
    net, optimizer = fnn.dense(4), optax.sgd(0.1)
    state = fnn.TrainState.create(net, optimizer, jax.random.key(state), train.x[:4])
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
    if own == slice(None):
        options |= {"batch_size": 4, "key": jax.random.key(key)}
    else:
        train = [(train.x[i : i + 8][own], train.y[i : i + 8][own]) for i in (0, 8, 16)]
    return fnn.fit(step, state, train, epochs=1, progress=False, **options)[1].train["loss"]


def start(folder, port, *arguments):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join((str(HERE.parent), str(HERE)))
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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes says."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    (folder / "two.py").write_text(TWO)
    both = [start(folder, port, str(i), "2") for i in range(2)]
    return [numbers(process) for process in both]


def test_two_processes_that_share_batches_equal_one(two):
    """Each gives its share of every batch; both have the losses of one process with whole batches."""
    alone = trained(slice(None, 8))
    assert len(alone) == 3 and alone[0] != alone[2]
    assert two[0][:3] == two[1][:3] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
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


def test_processes_that_hold_other_keys_states_or_data_are_refused(two):
    assert [found[3:] for found in two] == [[0, 0, 0]] * 2
