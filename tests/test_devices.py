"""Device profiles, what a target allows, and running requests in a fresh process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.devices import local
from edgecnn.devices.capability import (
    activation_dtype_for,
    max_ir_version_for,
    max_opset_for,
    weight_bits_for,
)
from edgecnn.devices.local import absolute_paths, run_local
from edgecnn.devices.profile import KnownBad, list_devices, load_device
from edgecnn.errors import DeviceError, RunnerError
from edgecnn.runner.environment import local_isa

SHIPPED = [
    "android",
    "coral_dev_board_mini",
    "jetson_orin_nano",
    "local_cpu",
    "local_gpu",
    "raspberrypi3",
    "raspberrypi4",
    "raspberrypi5",
    "raspberrypi_zero2w",
]

MINIMAL = 'name = "board"\ntransport = "ssh"\nruntime = "litert"\nisa = "aarch64"\n'


def test_every_shipped_profile_loads_under_its_own_name() -> None:
    assert set(SHIPPED) <= set(list_devices())
    for name in SHIPPED:
        device = load_device(name)
        assert device.name == name
        assert device.description
        assert activation_dtype_for(device.isa) in ("int8", "uint8")


def test_local_cpu_knows_this_machine() -> None:
    device = load_device("local_cpu")
    assert (device.transport, device.isa) == ("local", local_isa())


def test_raspberry_pi_profiles_know_their_limits() -> None:
    assert load_device("raspberrypi4").isa == "aarch64"
    assert load_device("raspberrypi5").isa == "aarch64-dotprod"
    device = load_device("raspberrypi_zero2w")
    assert device.ram_mb == 512
    assert device.max_opset == 26
    assert [bad.package for bad in device.known_bad] == ["tflite-runtime"]
    assert load_device("jetson_orin_nano").max_opset == 21
    assert load_device("coral_dev_board_mini").max_ir_version == 10
    assert load_device("android").max_opset is None


def test_own_profiles_by_path_and_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "devices").mkdir()
    text = (
        MINIMAL
        + 'host = "pi@10.0.0.7"\nthreads = 2\n[[known_bad]]\npackage = "x"\nversions = "any"\nreason = "y"\n'
    )
    (tmp_path / "devices" / "board.toml").write_text(text)
    (tmp_path / "devices" / "raspberrypi4.toml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    device = load_device("board")
    assert (device.host, device.threads, device.python, device.runtimes) == ("pi@10.0.0.7", 2, "python3", {})
    assert device.known_bad == (KnownBad("x", "any", "y"),)
    assert load_device(tmp_path / "devices" / "board.toml") == device
    assert load_device("raspberrypi4").name == "board"
    assert "board" in list_devices()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (MINIMAL + "thread = 2\n", "unknown key 'thread'", "did you mean 'threads'?"),
        (MINIMAL + 'threads = "2"\n', "threads is '2', expected a whole number of 1 or more", None),
        (MINIMAL + "threads = true\n", "threads is True", None),
        (MINIMAL + "host = 3\n", "host is 3, expected text", None),
        (
            MINIMAL.replace("ssh", "shh"),
            "transport is 'shh', expected one of local, ssh, adb",
            "did you mean 'ssh'?",
        ),
        (MINIMAL.replace("aarch64", "auto"), "isa is 'auto' and transport 'ssh'", None),
        (MINIMAL.replace("isa", "#"), "has no 'isa'", None),
        (MINIMAL + "[runtimes]\nlitert = 2\n", "expected a table of package = 'version'", None),
        (MINIMAL + '[runtimes]\nonnxruntime = "new"\n', "onnxruntime version is 'new'", None),
        (MINIMAL + '[[known_bad]]\npackage = "x"\n', "expected the texts package, reason, versions", None),
        ("name = ", "is not TOML", None),
    ],
)
def test_bad_profiles_say_what_and_where(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(DeviceError, match=message) as caught:
        load_device(path)
    if hint is not None:
        assert caught.value.hint == hint


def test_missing_profiles() -> None:
    with pytest.raises(DeviceError, match="no device profile is named 'raspberrypi44'") as caught:
        load_device("raspberrypi44")
    assert caught.value.hint == "did you mean 'raspberrypi4'?"
    with pytest.raises(DeviceError, match=r"none/board\.toml does not exist"):
        load_device("none/board.toml")


def test_capabilities_by_instruction_set() -> None:
    isas = ["x86-64", "x86-64-vnni", "aarch64", "aarch64-dotprod", "armv7l"]
    assert [activation_dtype_for(isa) for isa in isas] == ["uint8", "uint8", "int8", "int8", "int8"]
    assert [weight_bits_for(isa) for isa in isas] == [7, 8, 8, 8, 8]
    with pytest.raises(DeviceError, match="isa is 'sparc'"):
        weight_bits_for("sparc")


def test_opset_limits_take_the_last_row_not_newer() -> None:
    expected = {"1.10.0": 15, "1.16.3": 19, "1.18.0": 21, "1.25.0": 21, "1.31.1": 26, "2.0": 26}
    assert {version: max_opset_for(version) for version in expected} == expected
    assert max_ir_version_for("1.31.1") == 13
    with pytest.raises(DeviceError, match=r"older than 1\.10"):
        max_opset_for("1.9.0")


def test_the_installed_onnxruntime_reads_the_opset_the_table_says() -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    float_type = onnx.TensorProto.FLOAT
    infos = [onnx.helper.make_tensor_value_info(name, float_type, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", infos[:1], infos[1:])
    model = onnx.helper.make_model(graph)
    model.opset_import[0].version = max_opset_for(ort.__version__)
    model.ir_version = max_ir_version_for(ort.__version__)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["x"]


def write_relu(folder: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")
    ]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", infos[:1], infos[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    (folder / "relu.onnx").write_bytes(model.SerializeToString())
    return folder / "relu.onnx"


def test_run_local_runs_with_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    write_relu(tmp_path)
    np.save(tmp_path / "x.npy", np.array([[-1, 2, 1], [3, 0, 0]], np.float32))
    monkeypatch.chdir(tmp_path)
    request = {"task": "predictions", "artifacts": [{"key": "a", "path": "relu.onnx"}], "inputs": "x.npy"}
    result = run_local(request, timeout_s=60)
    assert result["artifacts"]["a"]["predictions"] == [1, 0]
    assert result["environment"]["isa"] == local_isa()


def test_run_local_passes_on_the_runners_message_and_hint(tmp_path: Path) -> None:
    request: dict[str, Any] = {
        "task": "latency",
        "artifacts": [{"key": "a", "path": str(tmp_path / "no.onnx")}],
    }
    with pytest.raises(RunnerError, match=r"model file .*no\.onnx does not exist"):
        run_local(request, timeout_s=60)
    with pytest.raises(RunnerError) as caught:
        run_local({**request, "thread": 1}, timeout_s=60)
    assert caught.value.hint == "did you mean 'threads'?"


def fake_runner(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a shell script in the interpreter's place; $4 is the result's path."""
    script = folder / "python"
    script.write_text("#!/bin/sh\n" + body)
    script.chmod(0o755)
    monkeypatch.setattr(local.sys, "executable", str(script))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("kill -KILL $$", "killed by SIGKILL"),
        ("echo boom >&2; exit 3", "exit code 3 and no result; its last line: boom"),
        ("echo '{\"ok\": tr' > $4", "is not JSON"),
        ("echo '[]' > $4", "is not one of schema_version 1"),
        ('echo \'{"schema_version": 1, "ok": true}\' > $4; exit 4', "exit code 4 after its result"),
        ('echo \'{"schema_version": 1, "ok": false}\' > $4; exit 1', "the runner failed"),
    ],
)
def test_a_runner_that_dies_is_a_runner_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    fake_runner(tmp_path, monkeypatch, body)
    with pytest.raises(RunnerError, match=message):
        run_local({"task": "latency"}, timeout_s=20)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_runner_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runner(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 30")
    start = time.perf_counter()
    with pytest.raises(RunnerError, match=r"longer than 0\.5 s and was stopped"):
        run_local({"task": "latency"}, timeout_s=0.5)
    assert time.perf_counter() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_the_runner_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runner(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 30")

    def interrupt() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not (tmp_path / "pid").is_file():
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_local({"task": "latency"}, timeout_s=25)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_absolute_paths_leaves_what_is_no_path() -> None:
    assert absolute_paths({"task": 1, "inputs": None, "artifacts": "x"}) == {
        "task": 1,
        "inputs": None,
        "artifacts": "x",
    }
    changed = absolute_paths({"artifacts": [{"key": "a", "path": "m.onnx"}, 3]})
    assert changed["artifacts"] == [{"key": "a", "path": str(Path("m.onnx").absolute())}, 3]
