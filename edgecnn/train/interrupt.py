"""Ctrl-C and SIGTERM while training: the step is finished and the state saved before they take effect."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the user wants to stop.

    Attributes:
        number: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def take_effect(self) -> None:
        """Do what the signal would have done at once."""
        if self.number is not None:
            signal.raise_signal(self.number)


@contextlib.contextmanager
def held_back() -> Iterator[Interruption]:
    """Hold the first Ctrl-C or SIGTERM back, so that a step is not cut in two; a second one acts at once.

    Outside the main thread signals are not ours to hold, and nothing is done.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    earlier: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signature of a handler)
        interruption.number = number
        restore()

    for number in _SIGNALS:
        earlier[number] = signal.signal(number, note)
    try:
        yield interruption
    finally:
        restore()
