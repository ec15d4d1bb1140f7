"""Progress: lines without a terminal, a bar with one, nothing where nothing is asked for."""

import re
import sys

import pytest

from fnn import progress
from fnn.progress import Progress


def work(**options):
    with Progress("cell", 3, done=1, first="compiling", **options) as bar:
        bar.set_running(2)
        bar.finish("depth 4")
        bar.finish("loss 0.5", keep=False)


def test_lines_count_from_what_was_done_before(capsys):
    work(show=True)
    begun, first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[ +\d+\.\d s\] cell 2/3: depth 4; 1 running, about \d+ s left", first)
    assert re.fullmatch(r"\[ +\d+\.\d s\] cell 1/3: 2 compiling", begun)
    assert last.endswith("cell 3/3: loss 0.5; all done")


@pytest.mark.parametrize("terminal", [False, True])
def test_by_default_a_terminal_alone_shows_a_bar(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "120")
    work()
    shown = capsys.readouterr().err
    assert bool(shown) == terminal
    if terminal:
        assert "cell 2/3: depth 4" in shown and "loss 0.5; all done" in shown and "3/3" in shown
        assert "cell 3/3" not in shown  # shown beside the bar alone


def test_estimates_only_fall_and_queued_is_not_running(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    said = []
    with Progress("cell", 8, show=True) as bar:
        bar.set_running(2)
        for seconds in (40, 42, 100, 300, 310):  # the fourth takes long
            now[0] = seconds
            bar.finish("x")
            said.append(bar.seconds)
        bar.set_running(2)
    assert said == sorted(said, reverse=True) and said[0] == 160.0 and said[1] == 126.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("cell 0/8: 2 running, 6 queued") and lines[1].endswith(
        "2 running, 5 queued, about 160 s left"
    )
