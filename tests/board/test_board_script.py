"""board.sh itself: doing it twice changes nothing, and stopping leaves nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from board import boards

pytestmark = pytest.mark.board

NAME = "test-script"


def pid_namespace(profile: Path) -> str | None:
    """Return the process namespace in which all of a board runs."""
    return link(Path("/proc", profile.with_name("pid").read_text().strip(), "ns", "pid_for_children"))


def guests(namespace: str | None) -> list[str]:
    """Return the processes of this machine that run in a namespace."""
    return [entry.name for entry in Path("/proc").glob("[0-9]*") if link(entry / "ns" / "pid") == namespace]


def link(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        return None


def test_start_twice_stop_twice() -> None:
    profile = boards.start(NAME, "arm64", boards.CPUS["pi4"])
    try:
        namespace = pid_namespace(profile)
        assert namespace not in (None, link(Path("/proc/self/ns/pid")))
        started = time.monotonic()
        assert boards.start(NAME, "arm64", boards.CPUS["pi4"]) == profile
        assert time.monotonic() - started < 10
        assert pid_namespace(profile) == namespace
        assert guests(namespace) != []
        assert boards.script("status", "--name", NAME).returncode == 0
        assert boards.shell(profile, "uname -m; echo $QEMU_CPU").split() == ["aarch64", "cortex-a72"]
    finally:
        boards.stop(NAME)
    boards.stop(NAME)
    assert boards.script("status", "--name", NAME).returncode == 3
    assert guests(namespace) == []
    mounts = Path("/proc/self/mounts").read_text()
    assert "edgecnn-board" not in mounts
    assert "qemu-aarch64" not in mounts
    rules = Path("/proc/sys/fs/binfmt_misc")
    assert not rules.is_dir() or not any("qemu-aarch64" in rule.name for rule in rules.iterdir())


def test_a_name_that_a_shell_would_read() -> None:
    found = boards.script("start", "--name", "a;b")
    assert found.returncode == 1
    assert "--name is 'a;b', expected letters" in found.stderr
