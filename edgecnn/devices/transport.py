"""How a board is reached: run a command there, send a file, fetch a file.

Every remote command goes through a shell, whatever the transport. `remote_command` quotes each word, and lets
the shell report the exit code as the last line of stderr, so that a code of the command is never mistaken for
one of the connection: ssh answers 255 both when it fails itself and when the command dies by a signal.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from edgecnn.devices.waiting import wait_for
from edgecnn.errors import DeviceError, DeviceTimeoutError
from edgecnn.errors import TransportError as TransportError

MARKER = "edgecnn-exit:"
WRAPPER = f'"$@"; printf "\\n{MARKER}%s\\n" "$?" >&2'
_MARKER_LINE = re.compile(rb"(?:^|\n)" + MARKER.encode() + rb"(\d+)\r?\n?\s*$")

TAIL_CHARACTERS = 300


@dataclass(frozen=True)
class Completed:
    """A command that ended.

    Attributes:
        exit_code: of the remote command; 128 + n when signal n killed it.
        stdout: all of it.
        stderr: all of it.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Stdout as text, without the white space around it."""
        return self.stdout.decode("utf-8", "replace").strip()

    @property
    def tail(self) -> str:
        """The last words of stderr, or of stdout when there are none."""
        return last_words(self.stderr) or last_words(self.stdout)


@runtime_checkable
class Transport(Protocol):
    """A way to a board.

    Each method raises DeviceError for a board that cannot be reached or does not let us in, and
    TransportError when a connection that worked is lost.
    """

    name: str

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Completed:
        """Run a command there.

        Args:
            argv: its words; each arrives as it is, whatever it holds.
            timeout_s: seconds after which this side gives up; the command may still be running there.
            stdin: its input.

        Raises:
            DeviceTimeoutError: if it takes too long.
        """
        ...

    def push(self, local: Path, remote: str) -> None:
        """Send a file; it gets its name when all of it is there.

        Raises:
            DeviceError: if it cannot be written there, as when the disk is full.
        """
        ...

    def pull(self, remote: str, local: Path) -> None:
        """Fetch a file.

        Raises:
            DeviceError: if it cannot be read there.
        """
        ...

    def close(self) -> None:
        """End the connection."""
        ...


def remote_command(argv: Sequence[str]) -> str:
    """Return one line for a remote shell that runs `argv` word by word and reports its exit code on stderr.

    Example:
        >>> remote_command(["echo", "a b", "$(touch x)"]).endswith("sh echo 'a b' '$(touch x)'")
        True
    """
    return "exec " + shlex.join(["sh", "-c", WRAPPER, "sh", *argv])


def split_exit_code(stderr: bytes) -> tuple[int | None, bytes]:
    r"""Take the exit code that `remote_command` reports off stderr.

    Returns:
        (exit code, or None when the command did not live to report one; the rest of stderr).

    Example:
        >>> split_exit_code(b"oh no\nedgecnn-exit:7\n")
        (7, b'oh no')
        >>> split_exit_code(b"Connection reset")
        (None, b'Connection reset')
    """
    match = _MARKER_LINE.search(stderr)
    return (None, stderr) if match is None else (int(match.group(1)), stderr[: match.start()])


def last_words(output: bytes, limit: int = TAIL_CHARACTERS) -> str:
    r"""Return the last line that says something.

    Example:
        >>> last_words(b"Traceback:\n  ...\nMemoryError\n\n")
        'MemoryError'
    """
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][-limit:] if lines else ""


def run_process(
    command: Sequence[str],
    timeout_s: float,
    what: str,
    stdin: bytes | BinaryIO | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Run a program on this machine, in a session of its own so that Ctrl-C does not reach it.

    stdout and stderr go to files: a connection that stays open in the background would hold pipes open.

    Args:
        command: program and arguments.
        timeout_s: seconds after which it is killed.
        what: for the error, "ssh pi4" for instance.
        stdin: bytes or an open file; nothing by default.
        environment: None for this process's own.
        cwd: folder to run in.

    Raises:
        DeviceTimeoutError: if it took too long.
        DeviceError: if it cannot be started.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, _input(stdin) as source:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=source,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise DeviceError(f"{what}: {command[0]} cannot be started: {error.strerror}") from error
        try:
            exit_code = wait_for(process, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise DeviceTimeoutError(
                f"{what} took longer than {timeout_s:g} s and was stopped", hint="a longer time limit"
            ) from error
        finally:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        return Completed(exit_code, out.read(), err.read())


@contextlib.contextmanager
def _input(stdin: bytes | BinaryIO | None) -> Iterator[BinaryIO | int]:
    if stdin is None:
        yield subprocess.DEVNULL
    elif isinstance(stdin, bytes):
        with tempfile.TemporaryFile() as source:
            source.write(stdin)
            source.seek(0)
            yield source
    else:
        yield stdin


def transfer_failure(name: str, remote: str, completed: Completed) -> DeviceError:
    """Return the error for a file that could not be written to or read from a board.

    Example:
        >>> found = Completed(1, b"", b"cat: write error: No space left on device")
        >>> transfer_failure("pi4", "/tmp/x/model.onnx", found).message
        'pi4 has no space left for /tmp/x/model.onnx'
    """
    tail = completed.tail
    if "No space left" in tail or "ENOSPC" in tail or "quota exceeded" in tail:
        return DeviceError(
            f"{name} has no space left for {remote}",
            hint="free some space there, or set workdir in its profile to a folder that has more",
        )
    if "Read-only file system" in tail or "Permission denied" in tail:
        return DeviceError(
            f"{name} does not let us write or read {remote}: {tail}",
            hint="set workdir in its profile to a folder that you may write to",
        )
    return DeviceError(
        f"{remote} on {name} could not be transferred (exit code {completed.exit_code}): "
        f"{tail or 'no message'}"
    )


def push_timeout_s(num_bytes: int) -> float:
    """Return the seconds a transfer may take: a minute, and 1 s for each 100 kB.

    Example:
        >>> push_timeout_s(5_000_000)
        110.0
    """
    return 60.0 + num_bytes / 1e5
