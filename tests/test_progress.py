"""Progress: lines without a terminal, a bar with one, nothing where nothing is asked for."""

import re
import sys

import pytest

from fnn.progress import Progress


def work(**options):
    with Progress("cell", 3, done=1, **options) as bar:
        bar.set_running(2)
        bar.finish("depth 4")
        bar.finish("loss 0.5", keep=False)


def test_lines_count_from_what_was_done_before(capsys):
    work(show=True)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[ +\d+\.\d s\] cell 2/3: depth 4; 1 running, 1 left, about \d+ s", first)
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
