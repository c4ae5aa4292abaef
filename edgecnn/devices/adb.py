"""Android devices over adb, through the platform tools of this machine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from edgecnn.devices.profile import Device
from edgecnn.devices.transport import (
    Completed,
    push_timeout_s,
    remote_command,
    run_process,
    split_exit_code,
    transfer_failure,
)
from edgecnn.errors import DeviceError, MissingDependencyError, TransportError

START_TIMEOUT_S = 30.0

STATES = (
    (
        "unauthorized",
        "it has not authorized this computer",
        "unlock it and accept the question about USB debugging",
    ),
    (
        "offline",
        "it is offline",
        "plug it in again, or adb reconnect",
    ),
    (
        "more than one device",
        "several devices are connected",
        "set host in the profile to one of the serials that `adb devices` lists",
    ),
    (
        "no permissions",
        "this user may not use its USB port",
        "add the udev rule for the device's vendor, then plug it in again",
    ),
    (
        "no devices",
        "no device is connected",
        "plug it in and switch USB debugging on; `adb devices` must list it",
    ),
    (
        "not found",
        "no device of that serial is connected",
        "`adb devices` lists those that are",
    ),
)
"""(what adb says, what it means, what to do)"""


class AdbTransport:
    """An Android device behind adb.

    Args:
        device: its `host` is the serial; empty takes the only device, or the one ANDROID_SERIAL names.

    Raises:
        MissingDependencyError: if this machine has no adb.
    """

    def __init__(self, device: Device) -> None:
        program = shutil.which("adb")
        if program is None:
            raise MissingDependencyError(
                f"adb is needed to reach {device.name} and not installed",
                hint="install Android's platform tools (Debian: apt install adb)",
            )
        self.name = device.name
        self._base = [program, *(["-s", device.host] if device.host else [])]
        self._what = f"adb {device.host}".strip()
        self._connected = False

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Completed:
        """Run a command there, as `Transport.run` says."""
        found = run_process([*self._base, "shell", remote_command(argv)], timeout_s, self._what, stdin)
        exit_code, stderr = split_exit_code(found.stderr)
        stdout = found.stdout
        if exit_code is None:  # before Android 7, stderr arrives on stdout
            exit_code, stdout = split_exit_code(found.stdout)
        if exit_code is None:
            raise self._failure(found)
        self._connected = True
        return Completed(exit_code, stdout, stderr)

    def push(self, local: Path, remote: str) -> None:
        """Send a file, as `Transport.push` says."""
        self._transfer(["push", str(local), f"{remote}.part"], local.stat().st_size, remote)
        moved = self.run(["mv", f"{remote}.part", remote], timeout_s=START_TIMEOUT_S)
        if moved.exit_code != 0:
            raise transfer_failure(self.name, remote, moved)

    def pull(self, remote: str, local: Path) -> None:
        """Fetch a file, as `Transport.pull` says."""
        size = self.run(["wc", "-c", remote], timeout_s=START_TIMEOUT_S)
        if size.exit_code != 0:
            raise transfer_failure(self.name, remote, size)
        self._transfer(["pull", remote, str(local)], int(size.text.split()[0]), remote)

    def close(self) -> None:
        """Do nothing: adb's server is shared with the user's other tools."""

    def _transfer(self, words: list[str], num_bytes: int, remote: str) -> None:
        found = run_process([*self._base, *words], push_timeout_s(num_bytes), self._what)
        if found.exit_code == 0:
            return
        failure = self._failure(found)
        if type(failure) is DeviceError and self._connected:  # adb reached it, the file was refused
            with contextlib.suppress(DeviceError):
                self.run(["rm", "-f", f"{remote}.part"], timeout_s=START_TIMEOUT_S)
            raise transfer_failure(self.name, remote, found)
        raise failure

    def _failure(self, found: Completed) -> DeviceError:
        """Return the error for adb's own failure."""
        said = (found.stderr + found.stdout).decode("utf-8", "replace")
        where = f"{self.name} ({self._what})"
        gone = ("error: closed", "disconnected", "protocol fault", "connection reset", "device offline")
        lost = self._connected and (not said.strip() or any(phrase in said for phrase in gone))
        if lost or (self._connected and "error: device" in said and "not found" in said):
            return TransportError(
                f"{where}: the connection was lost: {found.tail or 'adb ended without a word'}",
                hint="check the cable, and that the device stays awake",
            )
        if "No such file" not in said:
            for phrase, meaning, hint in STATES:
                if phrase in said:
                    return DeviceError(f"{where} cannot be used: {meaning}", hint=hint)
        return DeviceError(
            f"{where}: adb failed (exit code {found.exit_code}): {found.tail or 'no message'}",
            hint="`adb devices` must list it as device",
        )
