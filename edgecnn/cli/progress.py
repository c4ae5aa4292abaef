"""Progress on stderr: bars with an estimate on a terminal, one line per step anywhere else."""

from __future__ import annotations

import sys
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
            self._console.print(
                title if total is None else f"{title} ({total})",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def advance(self, n: int = 1) -> None:
        """Say that `n` more units are done."""
        if self._task is not None:
            self._bars.advance(self._task, n)

    def finish(self) -> None:
        """End the step."""
        if self._task is not None:
            total = self._bars.tasks[self._bars.task_ids.index(self._task)].total
            self._bars.update(self._task, total=total or 1, completed=total or 1)
            self._task = None
