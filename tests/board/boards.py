"""Starting and stopping emulated boards by board.sh, and commands on them with nothing of edgecnn."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("board.sh")
BUILD_SECONDS = 900
UNAVAILABLE = 69
HOME = "/home/pi"
SMALL_DISK = f"{HOME}/small"
"""A file system of 256 KiB on every board."""

CPUS = {"pi4": "cortex-a72", "pi5": "cortex-a76"}


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EDGECNN_BOARD_PYTHON": sys.executable}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        env=environment,
        check=False,
    )


def obstacle() -> str | None:
    """Return why this machine cannot run a board, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "an emulated board needs Linux and root"
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    if match is None or (int(match[1]), int(match[2])) < (6, 7):
        return f"an emulated board needs Linux 6.7 or newer, this is {platform.release()}"
    tried = subprocess.run(
        ["unshare", "--user", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else "an emulated board needs user namespaces, which are not allowed"


def start(name: str, arch: str, cpu: str) -> Path:
    """Start a board and return its profile; skip the test where that cannot be done."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    found = script("start", "--name", name, "--arch", arch, "--cpu", cpu)
    if found.returncode == UNAVAILABLE:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    assert found.returncode == 0, found.stderr
    return Path(found.stdout.strip())


def stop(name: str) -> None:
    found = script("stop", "--name", name)
    assert found.returncode == 0, found.stderr


def shell(profile: Path, command: str) -> str:
    """Run a command on a board and return what it prints."""
    found = subprocess.run(
        ["ssh", "-F", str(profile.with_name("ssh_config")), "-o", "BatchMode=yes", "board", command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return found.stdout


def leftovers(profile: Path) -> list[str]:
    """Return the files and the Python processes that somebody left on a board."""
    listed = shell(
        profile,
        f"find {HOME} /tmp -mindepth 1 ! -path {SMALL_DISK}; "
        "for p in /proc/[0-9]*; do "
        "tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -ao 'edgecnn_runner[.]pyz'; done; true",
    )
    return listed.splitlines()
