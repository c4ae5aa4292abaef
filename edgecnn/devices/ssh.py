"""Boards over ssh, through the OpenSSH client of this machine.

The user's configuration, agents, jump hosts and known_hosts all count. Nothing is asked (BatchMode), no host
key is trusted that the user has not accepted, and one connection carries all commands (ControlMaster).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from edgecnn.devices.profile import Device
from edgecnn.devices.transport import (
    Completed,
    last_words,
    push_timeout_s,
    remote_command,
    run_process,
    split_exit_code,
    transfer_failure,
)
from edgecnn.errors import DeviceError, MissingDependencyError, TransportError

CONNECT_TIMEOUT_S = 10
ALIVE_INTERVAL_S = 15
ALIVE_COUNT = 3
PERSIST_S = 60
CLOSE_TIMEOUT_S = 5.0

MAX_FOLDER_CHARACTERS = 70
"""The path of a socket may have about 100, and ssh appends some."""

UNREACHABLE = (
    ("Could not resolve hostname", "its name is not known", "check host in the profile, and the network"),
    ("Connection refused", "it refused the connection", "is sshd running there, on that port?"),
    ("timed out", "it did not answer", "is it switched on, and in the same network?"),
    ("No route to host", "there is no route to it", "is it switched on, and in the same network?"),
    ("Network is unreachable", "the network is unreachable", "is this machine in the board's network?"),
)
"""(what ssh says, what it means, what to do)"""


class SshTransport:
    """A board behind ssh.

    Args:
        device: its `host` is an alias or user@host; `ssh_config` replaces the user's configuration file.

    Raises:
        DeviceError: if the profile has no host, or its ssh_config does not exist.
        MissingDependencyError: if this machine has no ssh.
    """

    def __init__(self, device: Device) -> None:
        if not device.host:
            raise DeviceError(
                f"device {device.name} has no host, expected an ssh alias or user@host",
                hint=f"edgecnn devices add {device.name} --host user@address",
            )
        program = shutil.which("ssh")
        if program is None:
            raise MissingDependencyError(
                f"ssh is needed to reach {device.name} and not installed",
                hint="install OpenSSH's client (Debian: apt install openssh-client)",
            )
        if device.ssh_config and not Path(device.ssh_config).is_file():
            raise DeviceError(
                f"device {device.name}: ssh_config {device.ssh_config} does not exist",
                hint="give the path of a file, or leave the key out to use ~/.ssh/config",
            )
        self.name = device.name
        self.host = device.host
        self._base = [program, *(["-F", device.ssh_config] if device.ssh_config else [])]
        self._folder = _control_folder()
        self._connected = False

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Completed:
        """Run a command there, as `Transport.run` says."""
        return self._run(argv, timeout_s, stdin)

    def push(self, local: Path, remote: str) -> None:
        """Send a file, as `Transport.push` says."""
        size = local.stat().st_size
        script = 'cat > "$1.part" && [ "$(($(wc -c < "$1.part")))" = "$2" ] && mv "$1.part" "$1"'
        argv = ["sh", "-c", script, "sh", remote, str(size)]
        with local.open("rb") as source:
            completed = self._run(argv, push_timeout_s(size), source)
        if completed.exit_code != 0:
            with contextlib.suppress(DeviceError):
                self._run(["rm", "-f", f"{remote}.part"], CLOSE_TIMEOUT_S, None)
            raise transfer_failure(self.name, remote, completed)

    def pull(self, remote: str, local: Path) -> None:
        """Fetch a file, as `Transport.pull` says."""
        size = self._run(["wc", "-c", remote], push_timeout_s(0), None)
        if size.exit_code != 0:
            raise transfer_failure(self.name, remote, size)
        completed = self._run(["cat", remote], push_timeout_s(int(size.text.split()[0])), None)
        if completed.exit_code != 0:
            raise transfer_failure(self.name, remote, completed)
        local.write_bytes(completed.stdout)

    def close(self) -> None:
        """End the connection."""
        if self._folder is None:
            return
        if (self._folder / "c").exists():
            with contextlib.suppress(DeviceError):
                control = ["-o", f"ControlPath={self._folder}/c"]
                command = [*self._base, *control, "-O", "exit", "--", self.host]
                run_process(command, CLOSE_TIMEOUT_S, f"ssh {self.host}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, argv: Sequence[str], timeout_s: float, stdin: bytes | BinaryIO | None) -> Completed:
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_TIMEOUT_S,
            "ConnectionAttempts": 1,
            "ServerAliveInterval": ALIVE_INTERVAL_S,
            "ServerAliveCountMax": ALIVE_COUNT,
            **self._sharing(),
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "RequestTTY": "no",
        }
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        command = [*self._base, *words, "--", self.host, remote_command(argv)]
        found = run_process(command, timeout_s, f"ssh {self.host}", stdin)
        exit_code, stderr = split_exit_code(found.stderr)
        if exit_code is None:
            raise self._failure(found)
        self._connected = True
        return Completed(exit_code, found.stdout, stderr)

    def _sharing(self) -> dict[str, object]:
        """Return the options that let all commands share a connection, if there is room for its socket.

        A folder that is gone, as when /tmp is cleaned, is replaced by a new one: ssh fails without.
        """
        if self._folder is None or not _is_ours(self._folder):
            self._folder = _control_folder()
        if self._folder is None:
            return {"ControlMaster": "no", "ControlPath": "none"}
        path = f"{self._folder}/c"
        return {"ControlMaster": "auto", "ControlPersist": PERSIST_S, "ControlPath": path}

    def _failure(self, found: Completed) -> DeviceError:
        """Return the error for a command that ended without its exit code."""
        said = found.stderr.decode("utf-8", "replace")
        where = f"{self.name} (ssh {self.host})"
        if "HOST IDENTIFICATION HAS CHANGED" in said:
            host, port, known_hosts = self._address()
            entry = shlex.quote(host if port == "22" else f"[{host}]:{port}")
            return DeviceError(
                f"{where}: its host key is not the one in known_hosts",
                hint="another machine answers, or it was installed anew; when you know why, remove the old "
                f"key: ssh-keygen -f {known_hosts} -R {entry}",
            )
        if "Host key verification failed" in said or "host key is known" in said:
            host, port, known_hosts = self._address()
            return DeviceError(
                f"{where}: its host key is not known here, and edgecnn trusts no key on its own",
                hint=f"connect once by hand and compare the fingerprint: {self._by_hand()}; "
                f"or ssh-keyscan -p {port} {shlex.quote(host)} >> {known_hosts}",
            )
        if "Permission denied" in said or "Too many authentication failures" in said:
            copy_key = shlex.join(["ssh-copy-id", *self._base[1:], self.host])
            return DeviceError(
                f"{where}: it does not accept our key: {last_words(found.stderr)}",
                hint=f"{copy_key}, or load your key with ssh-add; "
                f"then {self._by_hand()} must work without a password",
            )
        if self._connected:
            return TransportError(
                f"{where}: the connection was lost: {last_words(found.stderr) or 'ssh ended without a word'}",
                hint="is the board still running? look at its power supply and network",
            )
        for phrase, meaning, hint in UNREACHABLE:
            if phrase in said:
                return DeviceError(f"{where} cannot be reached: {meaning}", hint=hint)
        return DeviceError(
            f"{where}: no command can be run there (exit code {found.exit_code}): "
            f"{found.tail or 'no message'}",
            hint=f"{self._by_hand()} true must work without a question",
        )

    def _by_hand(self) -> str:
        return shlex.join(["ssh", *self._base[1:], self.host])

    def _address(self) -> tuple[str, str, str]:
        """Return (host name, port, file of known hosts) as ssh resolves the alias."""
        values = {
            "hostname": self.host.rpartition("@")[2],
            "port": "22",
            "userknownhostsfile": "~/.ssh/known_hosts",
        }
        with contextlib.suppress(DeviceError):
            found = run_process([*self._base, "-G", "--", self.host], CLOSE_TIMEOUT_S, "ssh -G")
            for line in found.text.splitlines():
                key, _, value = line.partition(" ")
                if key in values and value:
                    values[key] = value
        return values["hostname"], values["port"], values["userknownhostsfile"].split()[0]


def _control_folder() -> Path | None:
    """Make a folder of mode 0700 for a connection's socket; None where none can be made."""
    parent = tempfile.gettempdir()
    if len(parent) > MAX_FOLDER_CHARACTERS and Path("/tmp").is_dir():
        parent = "/tmp"
    try:
        return Path(tempfile.mkdtemp(prefix="ecs", dir=parent))
    except OSError:
        return None


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is there and still the one that was made: no link, and nobody else's."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and found.st_mode & 0o777 == 0o700
