"""Progress on standard error: a bar on a terminal that has rich, else plain lines, else nothing."""

import math
import sys
import time
from typing import Any


class Progress:
    """Count finished pieces of work (`unit`: epoch, cell) up to `total`; use it as a context manager.

    `show` None shows progress on a terminal only. `done` pieces were finished before. Until the first piece is finished the
    running ones are said to be in their `first` state. Time since the beginning is always shown; how much is left is
    said once a piece is finished, and never rises.
    """

    def __init__(self, unit: str, total: int, show: bool | None = None, done: int = 0, first: str = "running"):
        terminal = sys.stderr.isatty()
        self.unit, self.total, self.before, self.done, self.first = unit, total, done, done, first
        self.show = terminal if show is None else show
        self.started, self.running, self.most, self.seconds = time.perf_counter(), 0, 1, math.inf
        self.bar: Any = None
        if self.show and terminal:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            except ImportError:
                return
            columns = (TextColumn(unit), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self.task = self.bar.add_task("preparing", total=total, completed=done)

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False)
        elif self.show:
            print(line, file=sys.stderr, flush=True)

    def resume(self, done: int) -> None:
        """Say that so many pieces were finished before."""
        self.before = self.done = done
        self._move(self._left())

    def set_running(self, count: int) -> None:
        """Show how many pieces are being worked on; the others are queued."""
        begins = count and not self.running and self.done == self.before
        self.running, self.most = count, max(self.most, count)
        if begins and self.bar is None:
            self.say(f"[{self._elapsed():6.1f} s] {self.unit} {self.done}/{self.total}: {self._left()}")
        self._move(self._left())

    def finish(self, text: str, *, keep: bool = True) -> None:
        """Count one more piece and print a line about it; without `keep` the line is shown beside the bar instead."""
        self.done += 1
        left, new = self.total - self.done, self.done - self.before
        each = self._elapsed() / new * left if new >= self.most else self._elapsed() * math.ceil(left / self.most)
        self.seconds = min(self.seconds, each)
        if keep or self.bar is None:
            self.say(f"[{self._elapsed():6.1f} s] {self.unit} {self.done}/{self.total}: {text}; {self._left()}")
        self._move(self._left() if keep else f"{text}; {self._left()}")

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _left(self) -> str:
        left = self.total - self.done
        if not left:
            return "all done"
        running = min(self.running, left)
        state = self.first if self.done == self.before else "running"
        rest = f"{left - running} queued" if running else f"{left} left"
        counts = [f"{running} {state}"] * bool(running) + [rest] * bool(left - running)
        known = self.done > self.before and math.isfinite(self.seconds)
        return ", ".join(counts + [f"about {self.seconds:.0f} s left"] * known)

    def _move(self, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
