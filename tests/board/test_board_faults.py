"""What goes wrong on a board, injected into an emulated one: a clear error in time, nothing left behind."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import command, environment

from board import boards
from board.networks import Network
from edgecnn.devices.deploy import open_executor
from edgecnn.devices.profile import Device, load_device
from edgecnn.errors import DeviceError, RunnerError, TransportError

pytestmark = pytest.mark.board

TIMEOUT_S = 120.0
RUNNING = f"ls {boards.HOME}/edgecnn.*/pid 2>/dev/null; true"
KILL_RUNNER = f"kill -9 $(cat {boards.HOME}/edgecnn.*/pid)"
DROP_CONNECTIONS = """
for p in /proc/[0-9]*; do
  n=${p##*/}
  if [ "$n" != $PPID ] && [ -O "$p" ] && grep -qa 'sshd_config.[-]R' "$p/cmdline"; then kill -9 "$n"; fi
done 2>/dev/null; true
"""
"""Ends every ssh session of ours except the one it comes in."""


@pytest.fixture
def device(pi4: Path) -> Iterator[Device]:
    yield load_device(pi4)
    assert boards.leftovers(pi4) == []


def attempt(
    device: Device, request: dict[str, Any] | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Reach a board; run a request there, or ask for its description."""
    with open_executor(device) as executor:
        return executor.environment() if request is None else executor.run_request(request, timeout_s)


def latency(network: Network, seconds: float, *keys: str) -> dict[str, Any]:
    return {
        "task": "latency",
        "artifacts": network.artifacts(*(keys or ("onnx",))),
        "min_runs": 3,
        "min_seconds": seconds,
        "max_seconds": seconds,
    }


@contextmanager
def once_running(profile: Path, action: Callable[[], object]) -> Iterator[None]:
    """Do something from another thread as soon as the runner has started on a board."""
    failures: list[Exception] = []

    def wait_and_act() -> None:
        try:
            deadline = time.monotonic() + 60
            while not boards.shell(profile, RUNNING) and time.monotonic() < deadline:
                time.sleep(0.1)
            action()
        except Exception as error:  # noqa: BLE001 - it is raised again in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert failures == []


def changed_ssh_config(profile: Path, folder: Path, key: str, value: Path) -> str:
    """Return an ssh_config that differs from the board's in one line."""
    lines = profile.with_name("ssh_config").read_text().splitlines()
    path = folder / "ssh_config"
    path.write_text("".join(f"  {key} {value}\n" if key in line.split() else f"{line}\n" for line in lines))
    return str(path)


def test_a_throttled_processor_taints_the_run(device: Device, pi4: Path, lenet5: Network) -> None:
    boards.shell(pi4, "echo 0x5 >/etc/board/throttled; echo 84500 >/sys/class/thermal/thermal_zone0/temp")
    try:
        result = attempt(device, latency(lenet5, 0.5))
    finally:
        boards.shell(pi4, "echo 0x0 >/etc/board/throttled; echo 48300 >/sys/class/thermal/thermal_zone0/temp")
    entry = result["artifacts"]["onnx"]
    assert "throttled: under-voltage, throttled" in entry["taints"]
    assert {sample["temperature_c"] for sample in entry["trace"]} == {84.5}
    assert {sample["throttled"] for sample in entry["trace"]} == {"0x5"}


def test_a_full_disk(device: Device, pi4: Path, lenet5: Network) -> None:
    small = dataclasses.replace(device, workdir=boards.SMALL_DISK)
    with pytest.raises(DeviceError, match=r"test-faults has no space left for .*model\.onnx"):
        attempt(small, latency(lenet5, 0.5, "float_onnx"))
    assert boards.shell(pi4, f"ls -A {boards.SMALL_DISK}") == ""


def test_a_board_too_slow_for_the_time_given(device: Device, lenet5: Network) -> None:
    started = time.monotonic()
    with pytest.raises(RunnerError, match="took longer than 3 s on test-faults and was stopped"):
        attempt(device, latency(lenet5, 60.0), 3.0)
    assert time.monotonic() - started < 30


def test_a_runner_killed_for_its_memory(device: Device, pi4: Path, lenet5: Network) -> None:
    killed = "test-faults: the runner was killed by SIGKILL"
    killing = once_running(pi4, lambda: boards.shell(pi4, KILL_RUNNER))
    with killing, pytest.raises(RunnerError, match=killed) as caught:
        attempt(device, latency(lenet5, 60.0))
    assert caught.value.hint is not None
    assert "out of memory" in caught.value.hint


def test_a_dropped_connection_is_tried_once_more_and_said(device: Device, pi4: Path, lenet5: Network) -> None:
    with once_running(pi4, lambda: boards.shell(pi4, DROP_CONNECTIONS)):
        result = attempt(device, latency(lenet5, 5.0))
    assert any("the connection was lost" in line and "tried once more" in line for line in result["warnings"])
    assert result["artifacts"]["onnx"]["num_samples"] >= 3


def test_a_board_that_goes_away_in_mid_run(lenet5: Network) -> None:
    profile = boards.start("test-doomed", "arm64", boards.CPUS["pi4"])
    started = time.monotonic()
    try:
        leaving = once_running(profile, lambda: boards.stop("test-doomed"))
        with leaving, pytest.raises(DeviceError, match="test-doomed") as caught:
            attempt(load_device(profile), latency(lenet5, 60.0))
    finally:
        boards.stop("test-doomed")
    assert time.monotonic() - started < 60
    assert isinstance(caught.value, TransportError) or "cannot be reached" in caught.value.message
    with pytest.raises(DeviceError, match="cannot be reached: it refused the connection"):
        attempt(load_device(profile))


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_nothing(times: int, device: Device, pi4: Path, lenet5: Network) -> None:
    """Nor does pressing it again while the board is being cleaned up."""

    def press() -> None:
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)

    words = command("bench", lenet5.files["onnx"], "--device", pi4, "--seconds", 60)
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        with once_running(pi4, press):
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (stdout, "Traceback" in stderr) == ("", False)


def test_two_at_once(device: Device) -> None:
    with open_executor(device), pytest.raises(DeviceError, match="test-faults is in use by"):
        attempt(device)


def test_a_host_key_that_is_not_known(device: Device, pi4: Path, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.touch()
    config = changed_ssh_config(pi4, tmp_path, "UserKnownHostsFile", known_hosts)
    with pytest.raises(DeviceError, match="host key is not known here"):
        attempt(dataclasses.replace(device, ssh_config=config))
    assert known_hosts.read_text() == ""


def test_a_key_that_the_board_does_not_accept(device: Device, pi4: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    shutil.copy(pi4.with_name("hostkey"), key)
    key.chmod(0o600)
    config = changed_ssh_config(pi4, tmp_path, "IdentityFile", key)
    with pytest.raises(DeviceError, match=r"does not accept our key: .*Permission denied"):
        attempt(dataclasses.replace(device, ssh_config=config))


BROKEN_PYTHONS = {
    "runtime missing": (
        "onnxruntime/__init__.py",
        "raise ModuleNotFoundError('no', name='onnxruntime')",
        "runtime onnxruntime is not installed",
    ),
    "runtime for a newer processor": (
        "onnxruntime/__init__.py",
        "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
        "the runner was killed by SIGILL",
    ),
    "numpy missing": (
        "numpy/__init__.py",
        "raise ModuleNotFoundError('no numpy', name='numpy')",
        "numpy cannot be imported by /usr/bin/python3: no numpy",
    ),
}
"""By name: a module that hides the real one, what it does, what the error says."""


def python_with(profile: Path, module: str, source: str) -> str:
    """Write a Python onto a board that finds a module of ours first, and return its path."""
    folder = f"{boards.HOME}/hidden"
    boards.shell(
        profile,
        f"mkdir -p {folder}/{Path(module).parent} && echo {shlex.quote(source)} >{folder}/{module} && "
        f"printf '#!/bin/sh\\nPYTHONPATH={folder} exec python3 \"$@\"\\n' >{folder}/python && "
        f"chmod +x {folder}/python",
    )
    return f"{folder}/python"


@pytest.mark.parametrize("fault", list(BROKEN_PYTHONS))
def test_a_python_without_what_it_needs(fault: str, device: Device, pi4: Path, lenet5: Network) -> None:
    module, source, message = BROKEN_PYTHONS[fault]
    broken = dataclasses.replace(device, python=python_with(pi4, module, source))
    try:
        with pytest.raises(RunnerError, match=f"test-faults: {message}") as caught:
            attempt(broken, latency(lenet5, 0.1))
        assert caught.value.hint is not None
    finally:
        boards.shell(pi4, f"rm -r {boards.HOME}/hidden")


def test_a_clock_that_moves_on_its_own_taints_the_run(device: Device, pi4: Path, lenet5: Network) -> None:
    jump = "import time; t, m = time.time, time.monotonic; time.time = lambda: t() + m()"  # twice as fast
    python = python_with(pi4, "sitecustomize.py", jump)
    try:
        result = attempt(dataclasses.replace(device, python=python), latency(lenet5, 5.0))
    finally:
        boards.shell(pi4, f"rm -r {boards.HOME}/hidden")
    assert any("clock jumped" in taint for taint in result["artifacts"]["onnx"]["taints"])


def test_no_python(device: Device) -> None:
    with pytest.raises(DeviceError, match="test-faults has no Python: /opt/python is not there"):
        attempt(dataclasses.replace(device, python="/opt/python"))


def test_words_that_a_shell_would_read(device: Device, pi4: Path) -> None:
    workdir = f"{boards.HOME}/a b; touch $(id -u)"
    with open_executor(dataclasses.replace(device, workdir=workdir)) as executor:
        assert executor.environment()["emulated"] is True
    assert boards.leftovers(pi4) == [workdir]
    boards.shell(pi4, f"rmdir '{workdir}'")
