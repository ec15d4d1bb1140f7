"""The experiments: their tables say what was measured, and each of them runs."""

import importlib
import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
SLOW = {"edge_of_stability", "initialisation", "conv_isometry", "edge_of_chaos", "recurrent"}
SLOW |= {"ntk_condition", "batch_norm_explodes", "jacobian_moments", "finite_width", "residual"}
SLOW |= {"residual_batch_norm", "clipping_rescues", "norm_position"}
"""Those that take longest. What they measure has its tests: curvature, initializers, expected, exact_models; kernel,
meanfield_nets, isometry, finite_width; drawn, clip, flow."""


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("common")


def result(common, measured):
    figure, axes = common.panels()
    common.measured(axes[0, 0], [1, 2, 3], [[1, 2, 3], [2, 3, 4]], 0, "runs")
    common.finish(axes[0, 0], "title", "x", "y")
    return common.Result([common.close("slope", 2.0, measured, 0.1)], figure, ["2 runs"])


def test_verdicts(common):
    assert common.close("a", 2.0, 2.1, 0.11).holds and not common.close("a", 2.0, 2.1, 0.09).holds
    assert common.close("a", -2.0, -2.1, 0.06, relative=True).holds
    assert not common.close("a", -2.0, -2.1, 0.04, relative=True).holds
    assert not common.close("a", 2.0, math.nan, 1e9).holds
    assert common.at_least("a", 0.9, 0.9).holds and not common.at_least("a", 0.9, math.nan).holds
    assert common.at_most("a", 0.9, 0.8).holds and not common.at_most("a", 0.9, 1.0).holds
    assert common.close("a", 2.0, 2.123456, 0.08, relative=True)[1:4] == ("2", "2.123", "8 %")


def test_main_prints_writes_and_tells_by_its_exit_code(common, tmp_path, capsys):
    run = ["--out", str(tmp_path / "new")]
    assert common.main("slope.py", "Is it two?\n\nMore.", lambda options: result(common, 2.05), run) == 0
    shown = capsys.readouterr().out
    assert "| slope    |         2 |     2.05 |     ± 0.1 |   holds |" in shown and "Is it two?\n" in shown
    assert (tmp_path / "new" / "slope.png").read_bytes().startswith(b"\x89PNG")
    assert common.main("another.py", "And now?", lambda options: result(common, 3.0), run) == 1
    assert common.main("slope.py", "Is it two?", lambda options: result(common, 2.5), run) == 1
    verdicts = (tmp_path / "new" / "VERDICTS.md").read_text()
    assert verdicts.count("## ") == 2 and verdicts.index("## another") < verdicts.index("## slope")
    assert "2.5" in verdicts and "2.05" not in verdicts and verdicts.count("**FAILS**") == 2
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert common.main("slope.py", "Is it two?", lambda options: 1 / 0, ["--out", str(tmp_path / "file" / "x")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_each_asks_a_question(common):
    for name in NAMES:
        module = importlib.import_module(name)
        assert module.__doc__.strip().splitlines()[0].endswith("?") and callable(module.run), name


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_tiny_version_holds(name, common, tmp_path, capsys):
    """Each with fixed seeds: the same numbers on the same machine."""
    module = importlib.import_module(name)
    code = common.main(module.__file__, module.__doc__, module.run, ["--tiny", "--out", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size < common.LIMIT
