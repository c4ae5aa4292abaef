"""Requests run on a device: here in a fresh process, or on a board that the runner and the files are sent to.

    with open_executor(load_device("raspberrypi4")) as executor:
        result = executor.run_request({"task": "latency", "artifacts": [...]}, timeout_s=600)

A board is left as it was found, also after an error and Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

from edgecnn.devices.adb import AdbTransport
from edgecnn.devices.benchmark_model import BenchmarkModelExecutor
from edgecnn.devices.board import RETRY_AFTER_S, BoardExecutor
from edgecnn.devices.local import run_local
from edgecnn.devices.profile import Device
from edgecnn.devices.ssh import SshTransport
from edgecnn.devices.transport import Transport
from edgecnn.devices.workspace import Workspace, close_workspace, open_workspace
from edgecnn.errors import DeviceError, EdgeCNNError, TransportError
from edgecnn.runner.environment import describe_environment


class Executor(Protocol):
    """Where requests run."""

    device: Device

    def run_request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a request whose paths are of this machine, within `timeout_s` seconds; return its result."""
        ...

    def environment(self) -> dict[str, Any]:
        """Describe the device."""
        ...


class LocalExecutor:
    """Requests in fresh processes of this machine.

    Args:
        device: a profile whose transport is local.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def run_request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a request; see `run_local`."""
        return run_local(request, timeout_s)

    def environment(self) -> dict[str, Any]:
        """Describe this machine."""
        return describe_environment()


@contextlib.contextmanager
def open_executor(device: Device, transport: Transport | None = None) -> Iterator[Executor]:
    """Reach a device, and leave it as it was found.

    Args:
        device: its profile.
        transport: used instead of the one the profile names, and closed at the end; for tests.

    Raises:
        DeviceError: if the board cannot be reached or used.
        MissingDependencyError: if ssh or adb is not installed.
    """
    if device.transport == "local" and transport is None:
        yield LocalExecutor(device)
        return
    with contextlib.closing(transport or open_transport(device)) as opened:
        workspace = open_workspace(opened, device.workdir)
        if device.python:
            executor: BoardExecutor | BenchmarkModelExecutor = BoardExecutor(device, opened, workspace)
        else:
            executor = BenchmarkModelExecutor(device, opened, workspace)
        try:
            executor.start()
            yield executor
        except BaseException as error:
            with _before_ctrl_c():
                with contextlib.suppress(DeviceError):
                    executor.stop()
                _clean_up(opened, workspace, error)
            raise
        with _before_ctrl_c():
            _clean_up(opened, workspace, None)


@contextlib.contextmanager
def _before_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C wait until the board is cleaned up, which takes a second; a further one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.getsignal(signal.SIGINT)
    waiting = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting and callable(earlier):
            earlier(number, frame)
        waiting = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if earlier is None else earlier)
    if waiting:
        raise KeyboardInterrupt


def open_transport(device: Device) -> Transport:
    """Return the transport that a profile names.

    Raises:
        DeviceError: if the profile lacks what it needs.
        MissingDependencyError: if ssh or adb is not installed.
    """
    if device.transport == "ssh":
        return SshTransport(device)
    if device.transport == "adb":
        return AdbTransport(device)
    raise DeviceError(f"device {device.name} is local and has no transport")


def _clean_up(transport: Transport, workspace: Workspace, error: BaseException | None) -> None:
    """Remove the folder; when that fails beside another error, that one's hint says what is left."""
    try:
        try:
            close_workspace(transport, workspace)
        except TransportError:
            if isinstance(error, TransportError):  # it was tried often enough
                raise
            time.sleep(RETRY_AFTER_S)
            close_workspace(transport, workspace)
    except DeviceError:
        if error is None:
            raise
        if isinstance(error, EdgeCNNError):
            left = f"{workspace.folder} may be left on {transport.name}"
            error.hint = f"{error.hint}; {left}" if error.hint else left
