"""The README's script, in which all parts of training come together: killed and run again, it ends as if left alone."""

import inspect
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import assert_same
from test_log import records

import fnn

HERE = Path(__file__).parent
(SCRIPT,) = [
    block
    for block in re.findall(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), re.S)
    if '"run/state"' in block
]


def finished(space):
    """What a script left behind, without its key, as arrays."""
    state, history = space["state"], space["history"]
    rest = [history.best_epoch, history.stopped_early, *history.steps_per_epoch]
    key = jax.random.key_data(state.key)
    return {"state": state.replace(key=key), "train": history.train, "curves": history.validation, "rest": rest}


CHILD = f"""
import functools, time
import jax
import fnn

{inspect.getsource(finished)}

def look(report):
    print(report.epoch, flush=True)
    time.sleep(0.02)

fnn.fit = functools.partial(fnn.fit, on_epoch=look)
space = {{}}
exec(open("train.py").read(), space)
fnn.save("result.npz", finished(space))
"""
"""It imports no test: that would take as long as its training."""


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_script_of_the_readme_killed_and_run_again_ends_with_the_same_bits(kills, tmp_path, monkeypatch):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir(), killed.mkdir()
    (killed / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(alone)
    space = {}
    exec(compile(SCRIPT, "train.py", "exec"), space)
    want, history = finished(space), space["history"]
    last = len(history.steps_per_epoch) - 1
    assert 12 < last < 59 and history.stopped_early and history.best_epoch == last - 5
    assert history.validation["accuracy"][-1] > 0.9 > history.validation["accuracy"][0]
    # The loss by hand; the running mean is what was validated, and every second step updates it.
    both = space["averages"](space["state"]), space["state"].net_state
    logits, _ = space["net"].apply(*both, space["x"])
    entropy = np.asarray(fnn.losses.cross_entropy(logits, space["y"]))
    scores = fnn.evaluate(space["net"], both, (space["x"], space["y"]), loss=space["loss"])
    np.testing.assert_allclose(scores["loss"], np.mean(entropy + 1 - np.exp(-entropy)), rtol=1e-5)
    assert_same(history.train["update_ratio"][::2], np.zeros_like(history.train["update_ratio"][::2]))
    assert np.all(history.train["update_ratio"][1::2] > 0)

    draw, first = random.Random(0), []
    command = {
        "args": [sys.executable, "-c", CHILD],
        "cwd": killed,
        "env": os.environ | {"PYTHONPATH": str(HERE.parent)},
    }
    for _ in range(kills):
        with subprocess.Popen(**command, stdout=subprocess.PIPE, text=True) as child:
            first += [int(line) for line in itertools.islice(child.stdout, 4)][:1]
            time.sleep(draw.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL and not (killed / "result.npz").exists()
    done = subprocess.run(**command, check=True, stdout=subprocess.PIPE, text=True)
    assert first[0] == 0 < int(done.stdout.split()[0])  # it did go on
    assert_same(fnn.load(killed / "result.npz", want), want)
    rows = records("run/events")
    assert rows == records(killed / "run" / "events") and len(rows) > 4 * last
