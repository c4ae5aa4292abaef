"""Quoting, exit codes and the words of errors, and what a profile may hold."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgecnn.devices.deploy import open_transport
from edgecnn.devices.fake import FakeTransport
from edgecnn.devices.profile import load_device
from edgecnn.devices.transport import (
    Completed,
    Transport,
    push_timeout_s,
    remote_command,
    run_process,
    split_exit_code,
    transfer_failure,
)
from edgecnn.devices.waiting import Stopped, stopped_by
from edgecnn.devices.workspace import open_workspace
from edgecnn.errors import DeviceError, DeviceTimeoutError

MINIMAL = 'name = "board"\ntransport = "ssh"\nruntime = "litert"\nisa = "aarch64"\n'


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("host", "pi;reboot"),
        ("host", "pi reboot"),
        ("host", "-oProxyCommand=reboot"),
        ("host", "$(reboot)"),
        ("host", "pi`x`"),
        ("python", "python3;reboot"),
        ("python", "python3 | tee"),
        ("python", "-c"),
        ("python", "$PYTHON"),
        ("workdir", "/tmp/$(reboot)"),
        ("workdir", "~/work"),
        ("workdir", "/tmp/*"),
        ("workdir", "/tmp/'x'"),
        ("workdir", "/tmp/x\\ny"),
        ("name", "a/b"),
    ],
)
def test_words_for_a_shell_are_refused(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "board.toml"
    text = MINIMAL.replace('name = "board"\n', "") if key == "name" else MINIMAL
    path.write_text(f'{text}{key} = "{value}"\n')
    with pytest.raises(DeviceError, match=rf"board.toml: {key} is .*expected"):
        load_device(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("host", "pi@[fe80::1%eth0]"),
        ("host", "raspberrypi.local"),
        ("host", "192.168.1.5:5555"),
        ("host", "build-farm_3"),
        ("python", "/home/pi/my env/bin/python3.11"),
        ("workdir", "/mnt/usb disk/é"),
        ("workdir", "work"),
    ],
)
def test_usual_names_and_paths_are_taken(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(f'{MINIMAL}{key} = "{value}"\n')
    assert getattr(load_device(path), key) == value


def test_paths_of_this_machine_start_at_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(f'{MINIMAL}ssh_config = "conf/ssh"\nbenchmark_model = "/opt/tool"\n')
    device = load_device(path)
    assert device.ssh_config == str(tmp_path / "conf" / "ssh")
    assert device.benchmark_model == "/opt/tool"
    path.write_text(f'{MINIMAL}ssh_config = "~/x"\n')
    assert load_device(path).ssh_config == str(Path.home() / "x")


@pytest.mark.parametrize(
    "words", [["printf", "%s|", "a b", "it's", "$(touch x)", "", "*"], ["sh", "-c", "exit 3"]]
)
def test_a_remote_command_survives_a_shell(tmp_path: Path, words: list[str]) -> None:
    found = subprocess.run(
        ["sh", "-c", remote_command(words)], capture_output=True, cwd=tmp_path, check=False
    )
    exit_code, stderr = split_exit_code(found.stderr)
    assert (exit_code, stderr) == (3 if words[0] == "sh" else 0, b"")
    if words[0] == "printf":
        assert found.stdout == b"a b|it's|$(touch x)||*|"
    assert list(tmp_path.iterdir()) == []


def test_output_that_looks_like_an_exit_code_is_output() -> None:
    assert split_exit_code(b"edgecnn-exit:9\nedgecnn-exit:0\n") == (0, b"edgecnn-exit:9")
    assert split_exit_code(b"edgecnn-exit:9 and more\n") == (None, b"edgecnn-exit:9 and more\n")


def test_a_process_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    script = "import subprocess; subprocess.run(['sh', '-c', 'sleep 5; touch late'])"
    start = time.monotonic()
    with pytest.raises(DeviceTimeoutError, match=r"x took longer than 1 s"):
        run_process([sys.executable, "-c", script], 1, "x", cwd=tmp_path)
    assert time.monotonic() - start < 4
    with pytest.raises(DeviceError, match=r"x: /no/program cannot be started"):
        run_process(["/no/program"], 1, "x")


def test_an_event_ends_what_another_thread_waits_for() -> None:
    event, said, times = threading.Event(), [], []

    def work() -> None:
        with stopped_by(event):
            try:
                run_process(["sleep", "20"], 30, "x")
            except Stopped as error:
                said.append(str(error))
            times.append(time.monotonic() - start)
            said.append(run_process(["echo", "cleaned up"], 10, "x").text)

    start = time.monotonic()
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    event.set()
    thread.join(10)
    assert said == ["stopped before it was done", "cleaned up"]
    assert times[0] < 5
    with stopped_by(threading.Event()), pytest.raises(DeviceTimeoutError, match=r"x took longer than 0.5 s"):
        run_process(["sleep", "20"], 0.5, "x")


def test_after_a_stop_a_board_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecnn.devices.waiting.CLEAN_UP_S", 0.3)
    event = threading.Event()
    event.set()
    start = time.monotonic()
    with stopped_by(event):
        with pytest.raises(Stopped):
            run_process(["sleep", "20"], 30, "x")
        with pytest.raises(DeviceTimeoutError):
            run_process(["sleep", "20"], 30, "x")
    assert time.monotonic() - start < 5


def test_a_stop_while_the_folder_is_made_leaves_no_folder_and_no_lock(tmp_path: Path) -> None:
    event = threading.Event()
    inner = FakeTransport(tmp_path / "board")

    class Stopping:
        """Ends the first command after the board has done it."""

        name = "board"

        def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Completed:
            found = inner.run(argv, timeout_s=timeout_s, stdin=stdin)
            event.set()
            run_process(["true"], 5, "x")
            return found

    with stopped_by(event), pytest.raises(Stopped):
        open_workspace(Stopping(), str(tmp_path / "work"))  # type: ignore[arg-type]
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "message", "hint"),
    [
        (b"cat: write error: No space left on device", "pi has no space left for /x", "set workdir"),
        (
            b"sh: 1: cannot create /x.part: Permission denied",
            "does not let us write or read /x",
            "set workdir",
        ),
        (
            b"cat: /x: No such file or directory",
            "could not be transferred .exit code 1.: cat: /x: No such",
            None,
        ),
        (b"", "no message", None),
    ],
)
def test_failed_transfers(stderr: bytes, message: str, hint: str | None) -> None:
    error = transfer_failure("pi", "/x", Completed(1, b"", stderr))
    assert re.search(message, error.message)
    assert hint is None or (error.hint is not None and hint in error.hint)


def test_small_things(tmp_path: Path) -> None:
    assert Completed(1, b"last of out\n", b"").tail == "last of out"
    assert push_timeout_s(0) == 60
    assert isinstance(FakeTransport(tmp_path), Transport)
    with pytest.raises(DeviceError, match=r"device local_cpu is local and has no transport"):
        open_transport(load_device("local_cpu"))
