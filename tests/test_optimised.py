"""Numbers hold as users compile: with all of XLA's optimisations, which move constants, join operations and bound operands."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent
FILES = (
    *("clip", "clip_reports", "exact", "exact_edges", "losses", "noise", "norm", "per_example", "per_example_parts"),
    *("range", "taps", "watch_laws"),
)


@pytest.mark.slow
def test_laws_of_numbers_hold_with_all_optimisations():
    """The quick tests compile with few of them, which is faster; `test_tree` always with all."""
    flags = "--xla_cpu_use_fusion_emitters=true" if jax.__version_info__ < (0, 11) else ""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/test_{n}.py" for n in FILES)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
