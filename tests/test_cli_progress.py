"""Progress: bars that end on a terminal, one line per step anywhere else."""

from __future__ import annotations

import io

import pytest

from edgecnn.cli import progress as progress_module
from edgecnn.cli.progress import TerminalProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def run_two_steps(stream: io.StringIO) -> str:
    with TerminalProgress(stream) as progress:
        progress.start("loading", None)
        progress.start("calibrating [512]", 3)
        for _ in range(3):
            progress.advance()
        progress.finish()
    return stream.getvalue()


def test_a_pipe_gets_one_line_per_step() -> None:
    assert run_two_steps(io.StringIO()) == "loading\ncalibrating [512] (3)\n"


def test_a_pipe_hears_now_and_then_how_long_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 5 units, 20 seconds each: there is news after 40 and 80 s, and none at its end."""
    clock = iter([0.0, 20.0, 40.0, 60.0, 80.0, 100.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with TerminalProgress(stream) as progress:
        progress.start("train", 5)
        for _ in range(5):
            progress.advance()
    assert stream.getvalue() == "train (5)\n  2/5, 1 min 0 s left\n  4/5, 20 s left\n"


def test_a_terminal_gets_bars_and_its_cursor_back() -> None:
    shown = run_two_steps(Terminal())
    assert "loading" in shown
    assert "3/3" in shown
    assert "1/1" not in shown
    assert shown.rstrip().endswith("\x1b[?25h")


def test_a_terminal_gets_its_cursor_back_after_an_error() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), TerminalProgress(stream) as progress:
        progress.start("calibrating", 3)
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_finish_without_a_step_says_nothing() -> None:
    stream = io.StringIO()
    with TerminalProgress(stream) as progress:
        progress.finish()
        progress.advance()
    assert stream.getvalue() == ""
