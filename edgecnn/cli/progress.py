"""Progress on stderr: bars with an estimate on a terminal; anywhere else one line per step, and for a long
step now and then another with the time left.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

LINE_SECONDS = 30.0
"""Between two lines about one step, where there are no bars."""


class CountColumn(MofNCompleteColumn):
    """How many of how many; nothing for a step of one piece or of unknown length."""

    def render(self, task: Task) -> Text:
        """Return "64/512"."""
        return super().render(task) if (task.total or 1) > 1 else Text()


class TerminalProgress:
    """Shows steps as they run; follows `edgecnn.pipeline.Progress`. Use it as a context manager.

    Args:
        stream: where to write, stderr by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr)
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]done[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            CountColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._total: int | None = None
        self._done = 0
        self._started = self._said = 0.0

    def __enter__(self) -> TerminalProgress:
        """Start showing."""
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back, whatever happened."""
        if kind is None:
            self.finish()
        if self._console.is_terminal:
            self._bars.stop()

    def start(self, title: str, total: int | None) -> None:
        """Begin a step of `total` units, or of unknown length, and end the one before."""
        self.finish()
        if self._console.is_terminal:
            self._task = self._bars.add_task(title, total=total)
        else:
            self._total, self._done = total, 0
            self._started = self._said = time.monotonic()
            self._say(title if total is None else f"{title} ({total})")

    def advance(self, n: int = 1) -> None:
        """Say that `n` more units are done."""
        if self._task is not None:
            self._bars.advance(self._task, n)
        elif self._total is not None:
            self._done += n
            now = time.monotonic()
            if self._done < self._total and now - self._said >= LINE_SECONDS:
                left = (now - self._started) / self._done * (self._total - self._done)
                self._say(f"  {self._done}/{self._total}, {duration_text(left)} left")
                self._said = now

    def finish(self) -> None:
        """End the step."""
        if self._task is not None:
            total = self._bars.tasks[self._bars.task_ids.index(self._task)].total
            self._bars.update(self._task, total=total or 1, completed=total or 1)
            self._task = None
        self._total = None

    def _say(self, text: str) -> None:
        """Print a line as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration_text(seconds: float) -> str:
    """Return a time in the two largest units.

    Example:
        >>> duration_text(42.4), duration_text(200), duration_text(7500)
        ('42 s', '3 min 20 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
