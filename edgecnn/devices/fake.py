"""A board for tests: commands run on this machine in a folder of their own, and what fails is asked for.

    transport = FakeTransport(folder, faults=[Fault("drop", on="push", after=2)])

The words go through the same shell quoting as over ssh. `calls` holds every call, so that a test can see what
a board was asked to do, and `folder` what is left there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecnn.devices.transport import (
    Completed,
    remote_command,
    run_process,
    split_exit_code,
    transfer_failure,
)
from edgecnn.errors import DeviceError, DeviceTimeoutError, TransportError

KINDS = ("drop", "gone", "exit_255", "disk_full", "slow", "killed", "garbage", "unreachable", "no_python")

NO_SPACE = b"cat: write error: No space left on device"


@dataclass
class Fault:
    """What goes wrong, and when.

    Attributes:
        kind: "drop" (the connection is lost, for `times` calls), "gone" (lost for good), "exit_255",
            "disk_full", "slow" (a command takes longer than it was given), "killed" (exit code 137),
            "garbage" (stdout is not what it should be), "unreachable" or "no_python".
        on: "run", "push", "pull" or "any".
        matching: text that the call must hold, "edgecnn_runner.pyz" for instance.
        after: matching calls that still work.
        times: calls that fail.
    """

    kind: str
    on: str = "any"
    matching: str = ""
    after: int = 0
    times: int = 1

    def strikes(self, method: str, text: str) -> bool:
        """Return whether this call is one that fails, and count it."""
        if self.on not in ("any", method) or self.matching not in text:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.kind in ("gone", "unreachable"):
            self.on, self.matching = "any", ""
            return True
        self.times -= 1
        return self.times >= 0


class FakeTransport:
    """A board in a folder.

    Args:
        folder: its home; temporary files go to `folder/tmp`.
        faults: what fails.
        name: of the board.

    Raises:
        DeviceError: for a kind of fault that there is not.
    """

    def __init__(self, folder: Path, faults: Iterable[Fault] = (), name: str = "fake") -> None:
        self.name = name
        self.folder = folder.absolute()
        self.faults = list(faults)
        self.calls: list[tuple[str, str]] = []
        self.closed = False
        for fault in self.faults:
            if fault.kind not in KINDS:
                raise DeviceError(f"fault is {fault.kind!r}, expected one of {', '.join(KINDS)}")
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Completed:
        """Run a command in the folder.

        Raises:
            DeviceError: as the faults say.
        """
        kind = self._strike("run", " ".join(argv), timeout_s)
        if kind == "killed":
            return Completed(137, b"", b"Killed")
        if kind == "exit_255":
            return Completed(255, b"", b"")
        if kind == "disk_full":
            return Completed(1, b"", NO_SPACE)
        if kind == "no_python":
            return Completed(127, b"", f"sh: 1: {argv[0]}: not found".encode())
        python_folder = str(Path(sys.executable).parent)
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "PATH": os.pathsep.join([python_folder, os.environ.get("PATH", os.defpath)]),
        }
        command = ["sh", "-c", remote_command(argv)]
        found = run_process(command, timeout_s, self.name, stdin, environment, self.folder)
        exit_code, stderr = split_exit_code(found.stderr)
        if exit_code is None:
            raise TransportError(f"{self.name}: the connection was lost: {found.tail}")
        return Completed(exit_code, b'{"schema_ver' if kind == "garbage" else found.stdout, stderr)

    def push(self, local: Path, remote: str) -> None:
        """Copy a file into the folder.

        Raises:
            DeviceError: as the faults say, or if it cannot be written.
        """
        if self._strike("push", remote, 0.0) == "disk_full":
            raise transfer_failure(self.name, remote, Completed(1, b"", NO_SPACE))
        try:
            (self.folder / remote).write_bytes(local.read_bytes())
        except OSError as error:
            raise transfer_failure(self.name, remote, Completed(1, b"", str(error).encode())) from error

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file out of the folder.

        Raises:
            DeviceError: as the faults say, or if it is not there.
        """
        kind = self._strike("pull", remote, 0.0)
        try:
            data = (self.folder / remote).read_bytes()
        except OSError as error:
            raise transfer_failure(self.name, remote, Completed(1, b"", str(error).encode())) from error
        local.write_bytes(b"garbage" if kind == "garbage" else data)

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True

    def left_over(self) -> list[str]:
        """Return what is in the board's temporary folder."""
        return sorted(entry.name for entry in (self.folder / "tmp").iterdir())

    def _strike(self, method: str, text: str, timeout_s: float) -> str:
        """Note the call and return the kind of fault that meets it, empty for none."""
        self.calls.append((method, text))
        for fault in self.faults:
            if not fault.strikes(method, text):
                continue
            if fault.kind in ("drop", "gone"):
                raise TransportError(
                    f"{self.name}: the connection was lost: Broken pipe", hint="is the board still running?"
                )
            if fault.kind == "unreachable":
                raise DeviceError(f"{self.name} cannot be reached: it did not answer")
            if fault.kind == "slow":
                time.sleep(min(timeout_s, 0.1))
                raise DeviceTimeoutError(f"{self.name} took longer than {timeout_s:g} s and was stopped")
            return fault.kind
        return ""
