"""The ssh transport against a real sshd on the loopback, with keys and known hosts of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import running
from local_sshd import SSHD, LocalSshd, local_sshd
from test_runner_session import write_onnx

from edgecnn.devices import ssh
from edgecnn.devices.deploy import open_executor
from edgecnn.devices.profile import Device
from edgecnn.devices.ssh import SshTransport
from edgecnn.errors import (
    DeviceError,
    DeviceTimeoutError,
    MissingDependencyError,
    RunnerError,
    TransportError,
)

ROOT = Path(__file__).resolve().parent.parent

BARE = Device(name="pi", transport="ssh", runtime="litert", isa="aarch64")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSshd]:
    if SSHD is None:
        pytest.skip("needs sshd (Debian: apt install openssh-server)")
    with local_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def board(sshd: LocalSshd) -> Iterator[SshTransport]:
    transport = SshTransport(sshd.device())
    yield transport
    transport.close()


def edgecnn_folders(workdir: Path) -> list[str]:
    return [entry.name for entry in workdir.iterdir() if entry.name.startswith("edgecnn.")]


@pytest.mark.parametrize(
    "word",
    ["a b", ";$(touch x)", "`touch x`", "it's", '"', "*", "~", "$HOME", "a\nb", "", "ü", "-n", "!x", "\\"],
)
def test_every_word_arrives_as_it_is(board: SshTransport, word: str) -> None:
    script = "import sys; sys.stdout.buffer.write(sys.argv[1].encode('utf-8', 'surrogateescape'))"
    found = board.run([sys.executable, "-c", script, word], timeout_s=20)
    assert (found.exit_code, found.stdout.decode()) == (0, word)


@pytest.mark.parametrize(
    ("script", "exit_code"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137)]
)
def test_exit_codes_are_those_of_the_command(board: SshTransport, script: str, exit_code: int) -> None:
    assert board.run(["sh", "-c", script], timeout_s=20).exit_code == exit_code


def test_a_missing_command_is_127_and_output_is_kept_apart(board: SshTransport) -> None:
    assert board.run(["no-such-command"], timeout_s=20).exit_code == 127
    found = board.run(["sh", "-c", "echo out; echo err >&2; cat"], timeout_s=20, stdin=b"in")
    assert (found.stdout, found.stderr.strip()) == (b"out\nin", b"err")


def test_files_go_there_and_back_under_names_with_spaces(board: SshTransport, tmp_path: Path) -> None:
    data = os.urandom(300_000) + b"\r\n\0"
    (tmp_path / "local").write_bytes(data)
    remote = f"{tmp_path}/a b;$(touch x)"
    board.push(tmp_path / "local", remote)
    board.pull(remote, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a b;$(touch x)", "back", "local"]
    with pytest.raises(DeviceError, match=r"could not be transferred.*No such file"):
        board.pull(f"{tmp_path}/missing", tmp_path / "back")


def test_a_full_disk_is_named(board: SshTransport, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"x" * 5000)
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "board.part").symlink_to("/dev/full")
    with pytest.raises(DeviceError, match=r"board has no space left for .*board.*set workdir"):
        board.push(tmp_path / "local", f"{tmp_path}/board")
    assert not (tmp_path / "board.part").is_symlink()


@pytest.mark.parametrize(
    ("host", "message", "hint"),
    [
        ("stranger", "host key is not known here", r"ssh-keyscan -p \d+ 127.0.0.1 >> .*no_hosts"),
        (
            "impostor",
            "host key is not the one in known_hosts",
            r"ssh-keygen -f .*wrong_hosts -R '\[127",
        ),
        ("intruder", "does not accept our key", "ssh-copy-id -F .* intruder"),
        ("closed", "cannot be reached: it refused the connection", "is sshd running there"),
    ],
)
def test_what_ssh_refuses_is_said_with_what_to_do(
    sshd: LocalSshd, host: str, message: str, hint: str
) -> None:
    transport = SshTransport(sshd.device(host))
    start = time.monotonic()
    with pytest.raises(DeviceError, match=message) as caught:
        transport.run(["true"], timeout_s=20)
    transport.close()
    assert type(caught.value) is DeviceError
    assert caught.value.hint is not None
    assert re.search(hint, caught.value.hint)
    assert time.monotonic() - start < 15
    assert (sshd.folder / "no_hosts").read_text() == ""  # no key was taken over on the way


def test_names_that_are_not_known(sshd: LocalSshd) -> None:
    transport = SshTransport(sshd.device("no-such-host.invalid"))
    with pytest.raises(DeviceError, match=r"cannot be reached: its name is not known"):
        transport.run(["true"], timeout_s=20)
    transport.close()


def test_a_host_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_TIMEOUT_S", 1)
    config = tmp_path / "ssh_config"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config.write_text(f"Host board\n  HostName 127.0.0.1\n  Port {silent.getsockname()[1]}\n")
        transport = SshTransport(replace(BARE, host="board", ssh_config=str(config)))
        start = time.monotonic()
        with pytest.raises(DeviceError, match=r"cannot be reached: it did not answer"):
            transport.run(["true"], timeout_s=20)
        transport.close()
    assert time.monotonic() - start < 8


def test_a_command_that_takes_too_long_is_given_up(board: SshTransport) -> None:
    board.run(["true"], timeout_s=20)
    start = time.monotonic()
    with pytest.raises(DeviceTimeoutError, match=r"ssh board took longer than 0.5 s"):
        board.run(["sleep", "20"], timeout_s=0.5)
    assert time.monotonic() - start < 5
    assert board.run(["echo", "still there"], timeout_s=20).text == "still there"


def test_a_connection_lost_in_mid_run_is_told_from_an_exit_code(sshd: LocalSshd, board: SshTransport) -> None:
    board.run(["true"], timeout_s=20)
    timer = threading.Timer(0.5, sshd.drop_connections)
    timer.start()
    with pytest.raises(TransportError, match=r"the connection was lost"):
        board.run(["sleep", "20"], timeout_s=20)
    assert board.run(["echo", "back"], timeout_s=20).text == "back"


def test_one_connection_carries_all_commands_and_is_closed(sshd: LocalSshd) -> None:
    transport = SshTransport(sshd.device())
    for _ in range(3):
        transport.run(["true"], timeout_s=20)
    assert len(sshd.sessions()) == 1
    folder = Path(str(transport._folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    transport.close()
    assert not folder.exists()
    for _ in range(50):
        if not sshd.sessions():
            break
        time.sleep(0.1)
    assert sshd.sessions() == []


def test_a_control_folder_that_is_removed_in_mid_session_is_made_anew(sshd: LocalSshd) -> None:
    transport = SshTransport(sshd.device())
    transport.run(["true"], timeout_s=20)
    first = Path(str(transport._folder))
    shutil.rmtree(first)
    for _ in range(2):
        assert transport.run(["echo", "still there"], timeout_s=20).text == "still there"
    second = Path(str(transport._folder))
    assert (second / "c").is_socket()
    assert not first.exists()
    transport.close()
    assert not second.exists()
    sshd.drop_connections()  # the first one, which nobody can talk to any more; it would end by itself later


def test_a_control_folder_that_somebody_else_put_there_is_not_used(sshd: LocalSshd, tmp_path: Path) -> None:
    transport = SshTransport(sshd.device())
    first = Path(str(transport._folder))
    first.rmdir()
    first.symlink_to(tmp_path)
    assert transport.run(["echo", "there"], timeout_s=20).text == "there"
    assert list(tmp_path.iterdir()) == []
    assert transport._folder != first
    transport.close()
    first.unlink()


def test_without_a_place_for_the_socket_each_command_connects_on_its_own(
    sshd: LocalSshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ssh.tempfile, "mkdtemp", refuse)
    transport = SshTransport(sshd.device())
    assert transport.run(["echo", "there"], timeout_s=20).text == "there"
    (tmp_path / "local").write_bytes(b"bytes")
    transport.push(tmp_path / "local", f"{tmp_path}/remote")
    assert (tmp_path / "remote").read_bytes() == b"bytes"
    for _ in range(50):
        if not sshd.sessions():
            break
        time.sleep(0.1)
    assert sshd.sessions() == []
    transport.close()


def test_what_a_profile_lacks_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError, match=r"pi has no host.*devices add pi --host"):
        SshTransport(BARE)
    with pytest.raises(DeviceError, match=r"ssh_config .*none does not exist"):
        SshTransport(replace(BARE, host="pi", ssh_config=f"{tmp_path}/none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        MissingDependencyError, match=r"ssh is needed to reach pi.*apt install openssh-client"
    ):
        SshTransport(replace(BARE, host="pi"))


def test_a_request_runs_over_ssh_and_leaves_nothing(
    sshd: LocalSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "work dir"
    with open_executor(sshd.device(python=sys.executable, workdir=str(workdir))) as executor:
        assert executor.environment()["python"].count(".") == 2
        with pytest.raises(RunnerError, match=r"board: .*nothing.onnx"):
            (tmp_path / "nothing.onnx").write_bytes(b"")
            executor.run_request(latency_of(tmp_path / "nothing.onnx"), 60)
    assert edgecnn_folders(workdir) == []


def latency_of(path: Path) -> dict[str, object]:
    return {"task": "latency", "artifacts": [{"key": "a", "path": str(path)}], "min_runs": 1}


def test_no_python_over_ssh(sshd: LocalSshd, tmp_path: Path) -> None:
    device = sshd.device(python="/no/python", workdir=str(tmp_path))
    with pytest.raises(DeviceError, match=r"board has no Python: /no/python"), open_executor(device):
        pytest.fail("opened")
    assert edgecnn_folders(tmp_path) == []


INTERRUPTED = """
import sys
from edgecnn.devices.board import BoardExecutor
from edgecnn.devices.deploy import open_executor
from edgecnn.devices.profile import load_device
import edgecnn.devices.board as board
board.RUN = board.RUN.replace("runpy.run_path", "import time; print('x'); time.sleep(60); runpy.run_path")
with open_executor(load_device(sys.argv[1])) as executor:
    print("open", flush=True)
    executor.run_request({"task": "latency", "artifacts": []}, 60)
"""


def interrupt(sshd: LocalSshd, folder: Path, number: int) -> tuple[int, bytes]:
    """Start a run of a minute, and send its host a signal once it runs.

    Returns:
        (process of the run there, the host's stderr).
    """
    workdir = folder / "work"
    profile = folder / "board.toml"
    profile.write_text(
        f'name = "board"\ntransport = "ssh"\nruntime = "litert"\nisa = "x86-64"\nhost = "board"\n'
        f'ssh_config = "{sshd.config}"\npython = "{sys.executable}"\nworkdir = "{workdir}"\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(profile)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    pids: list[Path] = []
    while time.monotonic() < deadline and not (pids and pids[0].read_text()):
        time.sleep(0.1)
        pids = list(workdir.glob("edgecnn.*/pid"))
    remote = int(pids[0].read_text())
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    return remote, stderr


def ended(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_ends_the_run_there_and_removes_its_files(sshd: LocalSshd, tmp_path: Path) -> None:
    remote, stderr = interrupt(sshd, tmp_path, signal.SIGINT)
    assert b"KeyboardInterrupt" in stderr
    assert edgecnn_folders(tmp_path / "work") == []
    assert ended(remote)


def test_ctrl_c_stops_two_boards_at_once_and_cleans_both(sshd: LocalSshd, tmp_path: Path) -> None:
    """Each alias has a TMPDIR of its own there, so that this machine plays two boards."""
    pytest.importorskip("onnxruntime")
    arguments = [str(write_onnx(tmp_path / "tiny.onnx")), "--sustained", "60s"]
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        config = tmp_path / f"{name}.config"
        config.write_text(f"Host board\n  SetEnv TMPDIR={tmp_path}/{name}\n" + sshd.config.read_text())
        (tmp_path / f"{name}.toml").write_text(
            f'name = "{name}"\ntransport = "ssh"\nruntime = "onnxruntime"\nisa = "x86-64"\nhost = "board"\n'
            f'ssh_config = "{config}"\npython = "{sys.executable}"\n'
        )
        arguments += ["--device", str(tmp_path / f"{name}.toml")]
    process = subprocess.Popen(
        running.command("bench", *arguments),
        env={**running.environment(), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    pids: list[Path] = []
    while time.monotonic() < deadline and len([pid for pid in pids if pid.read_text()]) < 2:
        time.sleep(0.1)
        pids = [*tmp_path.glob("*/edgecnn.*/pid")]
    remote = [int(pid.read_text()) for pid in pids]
    assert len(remote) == 2
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - start < 10  # of a minute; about 1 s on a quiet machine
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted; no unfinished file is left"
    assert "Traceback" not in stderr
    assert [*tmp_path.glob("left/*"), *tmp_path.glob("right/*")] == []
    assert all(ended(pid) for pid in remote)


def test_what_a_killed_host_left_is_removed_by_the_next(sshd: LocalSshd, tmp_path: Path) -> None:
    workdir = tmp_path / "work"
    remote, _ = interrupt(sshd, tmp_path, signal.SIGKILL)
    assert len(edgecnn_folders(workdir)) == 1
    with open_executor(sshd.device(python=sys.executable, workdir=str(workdir))):
        assert len(edgecnn_folders(workdir)) == 1
        assert ended(remote)
    assert edgecnn_folders(workdir) == []


def test_a_board_that_freezes_is_noticed(sshd: LocalSshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "ALIVE_INTERVAL_S", 1)
    monkeypatch.setattr(ssh, "ALIVE_COUNT", 1)
    transport = SshTransport(sshd.device())
    transport.run(["true"], timeout_s=20)
    frozen = sshd.sessions()
    timer = threading.Timer(0.3, lambda: [os.kill(pid, signal.SIGSTOP) for pid in frozen])
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(TransportError, match="the connection was lost"):
            transport.run(["sleep", "30"], timeout_s=30)
    finally:
        sshd.drop_connections()
        transport.close()
    assert time.monotonic() - start < 10
