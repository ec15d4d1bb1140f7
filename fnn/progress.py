"""Progress on standard error: a bar on a terminal that has rich, else plain lines, else nothing."""

import sys
import time
from typing import Any


class Progress:
    """Count finished pieces of work (`unit`: epoch, cell) up to `total`; use it as a context manager.

    `show` None shows progress on a terminal only. `done` pieces were finished before.
    """

    def __init__(self, unit: str, total: int, show: bool | None = None, done: int = 0):
        terminal = sys.stderr.isatty()
        self.unit, self.total, self.before, self.done = unit, total, done, done
        self.show = terminal if show is None else show
        self.started, self.running = time.perf_counter(), 0
        self.bar: Any = None
        if self.show and terminal:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            except ImportError:
                return
            columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("", total=total, completed=done)

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

    def set_running(self, count: int) -> None:
        """Show how many pieces are being worked on."""
        self.running = count
        self._move(self._left())

    def finish(self, text: str, *, keep: bool = True) -> None:
        """Count one more piece and print a line about it; without `keep` the line is shown beside the bar instead."""
        self.done += 1
        if keep or self.bar is None:
            elapsed = time.perf_counter() - self.started
            self.say(f"[{elapsed:6.1f} s] {self.unit} {self.done}/{self.total}: {text}; {self._left()}")
        self._move(self._left() if keep else f"{text}; {self._left()}")

    def _left(self) -> str:
        left = self.total - self.done
        if not left:
            return "all done"
        running = f"{min(self.running, left)} running, {left} left" if self.running else f"{left} left"
        seconds = (time.perf_counter() - self.started) / max(1, self.done - self.before) * left
        return f"{running}, about {seconds:.0f} s" if self.done > self.before else running

    def _move(self, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
