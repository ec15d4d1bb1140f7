"""Curvature and kernels on 1, 4 and 8 devices; the numbers themselves are in `spectra_sharded.py`."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@functools.cache
def found():
    script = Path(__file__).with_name("spectra_sharded.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow  # test_sharding has curvature and kernels on four devices
@pytest.mark.xdist_group("sharding")
@pytest.mark.parametrize("case", ["dense", "batch/4", "parameters/8"])
def test_four_and_eight_devices_have_the_spectra_of_one(case):
    assert found()[case] is None, found()[case]
