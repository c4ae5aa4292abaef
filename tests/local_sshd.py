"""An sshd on the loopback, with keys and known_hosts of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgecnn.devices.profile import Device

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)


@dataclass
class LocalSshd:
    """A running sshd, and aliases for it: board, stranger, impostor, intruder, closed."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

    def device(self, host: str = "board", python: str = "python3", workdir: str = "") -> Device:
        return Device(
            name="board",
            transport="ssh",
            runtime="onnxruntime",
            isa="x86-64",
            host=host,
            ssh_config=str(self.config),
            python=python,
            workdir=workdir,
        )

    def sessions(self) -> list[int]:
        """Processes of open connections."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]

    def drop_connections(self) -> None:
        """Kill the server's side of every open connection, and the processes right under it."""
        for pid in self.sessions():
            os.kill(pid, signal.SIGKILL)


@contextmanager
def local_sshd(folder: Path) -> Iterator[LocalSshd]:
    """Start an sshd that only this user's key opens, and stop it with everything it started."""
    for name in ("host", "user", "other"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    (folder / "authorized_keys").chmod(0o600)
    address = f"[127.0.0.1]:{port}"
    (folder / "known_hosts").write_text(f"{address} {(folder / 'host.pub').read_text()}")
    (folder / "wrong_hosts").write_text(f"{address} {(folder / 'other.pub').read_text()}")
    (folder / "no_hosts").write_text("")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile {folder}/pid\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nAcceptEnv TMPDIR\n"
    )
    hosts = {
        "board": ("user", "known_hosts", port),
        "stranger": ("user", "no_hosts", port),
        "impostor": ("user", "wrong_hosts", port),
        "intruder": ("other", "known_hosts", port),
        "closed": ("user", "known_hosts", closed_port),
    }
    (folder / "ssh_config").write_text(
        "".join(
            f"Host {alias}\n  HostName 127.0.0.1\n  Port {number}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {folder}/{key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {folder}/{known}\n  GlobalKnownHostsFile /dev/null\n"
            for alias, (key, known, number) in hosts.items()
        )
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    server = LocalSshd(folder, port, process)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield server
    finally:
        server.drop_connections()
        process.kill()
        process.wait()
