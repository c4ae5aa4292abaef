"""Waiting for a process in a thread that Ctrl-C does not reach.

with stopped_by(event):          # in a thread of its own
bench(...)                   # ends soon after event.set(), and cleans up behind itself
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

POLL_S = 0.2
CLEAN_UP_S = 10.0
"""Allowed for each process of the cleaning up after a stop: the board may be what hangs."""


class Stopped(KeyboardInterrupt):
    """The work of this thread was stopped; it cleans up as after a Ctrl-C of its own."""


@dataclass
class _Stop:
    """What may end this thread's work, and whether it has."""

    event: threading.Event
    happened: bool = False


_STOP: ContextVar[_Stop | None] = ContextVar("_STOP", default=None)


@contextlib.contextmanager
def stopped_by(event: threading.Event) -> Iterator[None]:
    """Let an event end the first process that this thread waits for after it is set."""
    token = _STOP.set(_Stop(event))
    try:
        yield
    finally:
        _STOP.reset(token)


def wait_for(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for a process and return its exit code.

    Raises:
        subprocess.TimeoutExpired: if it takes longer.
        Stopped: if `stopped_by` says so; what runs after that, to clean up, is not stopped again.
    """
    stop = _STOP.get()
    if stop is None:
        return process.wait(timeout_s)
    if stop.happened:
        return process.wait(min(timeout_s, CLEAN_UP_S))
    deadline = time.monotonic() + timeout_s
    while True:
        if stop.event.is_set():
            stop.happened = True
            raise Stopped("stopped before it was done")
        left = deadline - time.monotonic()
        try:
            return process.wait(max(0.0, min(left, POLL_S)))
        except subprocess.TimeoutExpired:
            if left <= POLL_S:
                raise
