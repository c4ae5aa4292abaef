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

from edgecnn.errors import DeviceError

POLL_S = 0.2

_EVENT: ContextVar[threading.Event | None] = ContextVar("_EVENT", default=None)


@contextlib.contextmanager
def stopped_by(event: threading.Event) -> Iterator[None]:
    """Let an event end the first process that this thread waits for after it is set."""
    token = _EVENT.set(event)
    try:
        yield
    finally:
        _EVENT.reset(token)


def wait_for(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for a process and return its exit code.

    Raises:
        subprocess.TimeoutExpired: if it takes longer.
        DeviceError: if `stopped_by` says so; what runs after that, to clean up, is not stopped again.
    """
    event = _EVENT.get()
    if event is None:
        return process.wait(timeout_s)
    deadline = time.monotonic() + timeout_s
    while True:
        if event.is_set():
            _EVENT.set(None)
            raise DeviceError("stopped before it was done")
        left = deadline - time.monotonic()
        try:
            return process.wait(max(0.0, min(left, POLL_S)))
        except subprocess.TimeoutExpired:
            if left <= POLL_S:
                raise
