"""The adb transport and benchmark_model, with an `adb` on PATH that answers as the real one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgecnn.devices import benchmark_model, board
from edgecnn.devices.adb import AdbTransport
from edgecnn.devices.benchmark_model import parse_benchmark_model
from edgecnn.devices.deploy import open_executor
from edgecnn.devices.probe import probe
from edgecnn.devices.profile import Device
from edgecnn.errors import DeviceError, MissingDependencyError, RunnerError, TransportError

PHONE = Device(
    name="phone", transport="adb", runtime="litert", isa="aarch64-dotprod", host="SERIAL1", python=""
)

ADB = f"""#!{sys.executable}
import os, pathlib, shutil, subprocess, sys
home = pathlib.Path(os.environ["FAKE_ADB"])
with (home / "calls").open("a") as calls:
    calls.write("\\t".join(sys.argv[1:]) + "\\n")
for name in ("state", "once"):
    path = home / name
    if path.exists():
        said = path.read_text()
        if name == "once":
            path.unlink()
        sys.stderr.write(said)
        sys.exit(1)
words = sys.argv[1:]
if words[:1] == ["-s"]:
    words = words[2:]
if words[0] == "shell":
    environment = dict(os.environ, TMPDIR=str(home / "tmp"))
    merge = subprocess.STDOUT if (home / "old").exists() else None
    done = subprocess.run(["sh", "-c", " ".join(words[1:])], env=environment, stderr=merge, cwd=home)
    sys.exit(0 if merge else done.returncode)
if words[0] == "push" and (home / "full").exists():
    sys.stderr.write("adb: error: failed to copy 'x' to 'y': No space left on device\\n")
    sys.exit(1)
try:
    shutil.copyfile(words[1], words[2])
except OSError as error:
    sys.stderr.write("adb: error: failed to copy: remote " + error.strerror + "\\n")
    sys.exit(1)
print(words[1] + ": 1 file pushed. 0 skipped.")
"""

NEW_OUTPUT = """STARTING!
Log parameter values verbosely: [0]
Graph: [/data/local/tmp/m.tflite]
#threads used for CPU inference: [4]
Loaded model /data/local/tmp/m.tflite
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: Replacing 65 out of 66 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 2 partitions.
The input model file size (MB): 3.5734
Initialized session in 11.281ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=72 first=9853 curr=6875 min=6571 max=9853 avg=6973.69 std=420 p5=6603 median=6861 p95=7501

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=147 first=6831 curr=6723 min=6563 max=8112 avg=6801.5 std=170 p5=6610 median=6779 p95=7010

Inference timings in us: Init: 11281, First inference: 9853, Warmup (avg): 6973.69, Inference (avg): 6801.5
Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual.
Memory footprint delta from the start of the tool (MB): init=10.4219 overall=13.5469
"""

OLD_OUTPUT = """STARTING!
Min num runs: [50]
Loaded model m.tflite
resolved reporter
Initialized session in 1.204ms
Running benchmark for at least 1 iterations and at least 0.5 seconds
count=1 curr=1313760

Running benchmark for at least 50 iterations and at least 1 seconds
count=50 first=1292045 curr=1287754 min=1283112 max=1301774 avg=1.29e+06 std=4066

Average inference timings in us: Warmup: 1.31376e+06, Init: 1204, no stats: 1.29e+06
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a phone; files in it say how adb behaves."""
    home, programs = tmp_path / "phone", tmp_path / "bin"
    (home / "tmp").mkdir(parents=True)
    programs.mkdir()
    (programs / "adb").write_text(ADB)
    (programs / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_ADB", str(home))
    return home


@pytest.mark.parametrize("old", [False, True], ids=["shell_v2", "before Android 7"])
def test_words_and_exit_codes_arrive_as_they_are(phone: Path, old: bool) -> None:
    if old:
        (phone / "old").touch()
    transport = AdbTransport(PHONE)
    assert transport.run(["sh", "-c", "exit 7"], timeout_s=10).exit_code == 7
    assert transport.run(["no-such-command"], timeout_s=10).exit_code == 127
    found = transport.run(["printf", "%s", "it's a;$(touch x)"], timeout_s=10)
    assert (found.exit_code, found.text) == (0, "it's a;$(touch x)")
    assert (phone / "calls").read_text().startswith("-s\tSERIAL1\tshell\t")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set",
            "not authorized this computer",
        ),
        ("error: device offline", "it is offline"),
        ("error: device 'SERIAL1' not found", "no device of that serial"),
        ("error: no devices/emulators found", "no device is connected"),
        ("error: more than one device/emulator", "several devices are connected"),
        (
            "error: insufficient permissions: no permissions (user in plugdev group)",
            "may not use its USB port",
        ),
        ("* cannot start server", "adb failed .exit code 1.: . cannot start server"),
    ],
)
def test_states_of_a_device_are_said_with_what_to_do(phone: Path, said: str, message: str) -> None:
    (phone / "state").write_text(said)
    with pytest.raises(DeviceError, match=message) as caught:
        AdbTransport(PHONE).run(["true"], timeout_s=10)
    assert type(caught.value) is DeviceError
    assert caught.value.hint


def test_a_cable_pulled_in_mid_run_is_a_lost_connection(phone: Path) -> None:
    transport = AdbTransport(PHONE)
    transport.run(["true"], timeout_s=10)
    for said in ("error: closed", "error: device 'SERIAL1' not found", ""):
        (phone / "once").write_text(said)
        with pytest.raises(TransportError, match=r"the connection was lost"):
            transport.run(["true"], timeout_s=10)


def test_files_go_there_and_back(phone: Path, tmp_path: Path) -> None:
    transport = AdbTransport(PHONE)
    (tmp_path / "file").write_bytes(b"\0\r\n" * 100)
    transport.push(tmp_path / "file", f"{phone}/there")
    transport.pull(f"{phone}/there", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"\0\r\n" * 100
    with pytest.raises(DeviceError, match=r"No such file"):
        transport.pull(f"{phone}/missing", tmp_path / "back")
    (phone / "full").touch()
    with pytest.raises(DeviceError, match=r"phone has no space left for"):
        transport.push(tmp_path / "file", f"{phone}/again")


def test_adb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"adb is needed to reach phone"):
        AdbTransport(PHONE)


def test_the_text_of_new_builds() -> None:
    found = parse_benchmark_model(NEW_OUTPUT)
    assert (found.count, found.median_us, found.avg_us, found.p95_us) == (147, 6779.0, 6801.5, 7010.0)
    assert (found.min_us, found.max_us, found.first_us, found.warmup_us) == (6563.0, 8112.0, 9853.0, 6973.69)
    assert found.init_ms == 11.281
    assert found.typical_us == 6779.0
    assert found.delegate == {"partitions": 2, "delegated_ops": 65, "total_ops": 66}


def test_the_text_of_old_builds() -> None:
    found = parse_benchmark_model(OLD_OUTPUT)
    assert (found.count, found.median_us, found.avg_us, found.p95_us) == (50, None, 1.29e6, None)
    assert (found.typical_us, found.init_ms, found.delegate) == (1.29e6, 1.204, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Aborted",
        NEW_OUTPUT.partition("\n\nRunning benchmark for at least 50")[0]
        + "\nRunning benchmark for at least 50",
    ],
)
def test_a_run_without_its_timed_phase_has_no_number(text: str) -> None:
    with pytest.raises(RunnerError, match=r"printed no latencies"):
        parse_benchmark_model(text)


def tool(folder: Path, script: str) -> Device:
    path = folder / "benchmark_model"
    path.write_text(f"#!/bin/sh\n{script}\n")
    return replace(PHONE, benchmark_model=str(path), workdir=str(folder / "phone" / "tmp"))


def latency(*paths: Path) -> dict[str, object]:
    artifacts = [{"key": path.stem, "path": str(path)} for path in paths]
    return {"task": "latency", "artifacts": artifacts, "threads": 4}


def test_latency_without_python(phone: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text(NEW_OUTPUT)
    (tmp_path / "old.txt").write_text(OLD_OUTPUT)
    script = (
        f'echo "$*" >> "{tmp_path}/words"\n'
        f'for w; do case $w in --graph=*) cat "{tmp_path}/$(cat "${{w#--graph=}}").txt";; esac; done'
    )
    for name in ("new", "old"):
        (tmp_path / f"{name}.tflite").write_text(name)
    with open_executor(tool(tmp_path, script)) as executor:
        result = executor.run_request(latency(tmp_path / "old.tflite", tmp_path / "new.tflite"), 60)
    entry = result["artifacts"]["new"]
    assert entry["samples_ns"] == [6_779_000] * benchmark_model.NUM_ROUNDS
    assert (entry["median_ms"], entry["p90_ms"], entry["num_runs"]) == (6.779, None, 147 * 8)
    phases = {"import_ms": None, "load_ms": 11.281, "first_ms": 9.853, "warmup_ms": pytest.approx(6.97369)}
    assert entry["phases"] == phases
    assert entry["warnings"] == [
        "benchmark_model keeps no raw samples: each sample is the median of one process"
    ]
    assert result["comparisons"]["new"]["verdict"] == "faster"
    assert result["comparisons"]["new"]["speedup"] == pytest.approx(1.29e6 / 6779)
    assert "--num_threads=4" in (tmp_path / "words").read_text()
    assert list((phone / "tmp").iterdir()) == []


def test_a_cable_pulled_in_mid_run_is_tried_once_more_and_said(
    phone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "RETRY_AFTER_S", 0.0)
    (tmp_path / "new.txt").write_text(NEW_OUTPUT)
    (tmp_path / "m.tflite").write_text("m")
    with open_executor(tool(tmp_path, f'cat "{tmp_path}/new.txt"')) as executor:
        (phone / "once").write_text("error: closed")
        result = executor.run_request(latency(tmp_path / "m.tflite"), 60)
    assert result["warnings"] == [
        "phone (adb SERIAL1): the connection was lost: error: closed; tried once more"
    ]
    assert list((phone / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'ERROR: failed to load' >&2; exit 1",
            "phone: benchmark_model ended with exit code 1: ERROR: failed",
        ),
        ("kill -9 $$", "exit code 137.*out of memory"),
        ("echo STARTING!", "printed no latencies; its last line: STARTING!"),
    ],
)
def test_a_tool_that_fails(phone: Path, tmp_path: Path, script: str, message: str) -> None:
    (tmp_path / "m.tflite").write_text("m")
    with pytest.raises(RunnerError, match=message), open_executor(tool(tmp_path, script)) as executor:
        executor.run_request(latency(tmp_path / "m.tflite"), 60)
    assert list((phone / "tmp").iterdir()) == []


def test_what_cannot_run_without_python(phone: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("m")
    predictions = {"task": "predictions", "artifacts": [{"key": "m", "path": "m.tflite"}], "inputs": "x.npy"}
    with open_executor(tool(tmp_path, "true")) as executor:
        with pytest.raises(RunnerError, match=r"benchmark_model takes .tflite files, not m.onnx"):
            executor.run_request(latency(tmp_path / "m.onnx"), 60)
        with pytest.raises(RunnerError, match=r"phone has no Python, so predictions cannot be run there"):
            executor.run_request(predictions, 60)
        with pytest.raises(DeviceError, match=r"none.tflite does not exist"):
            executor.run_request(latency(tmp_path / "none.tflite"), 60)
    device = replace(PHONE, workdir=str(phone / "tmp"))
    with pytest.raises(DeviceError, match=r"no Python and no benchmark_model"), open_executor(device):
        pytest.fail("opened")
    missing = replace(device, benchmark_model="/no/tool")
    with pytest.raises(DeviceError, match=r"benchmark_model /no/tool does not exist"), open_executor(missing):
        pytest.fail("opened")


def test_a_phone_with_python_runs_the_runner(phone: Path) -> None:
    device = replace(PHONE, python=sys.executable, workdir=str(phone / "tmp"))
    with open_executor(device) as executor:
        assert executor.environment()["python"].startswith("3.")
    assert list((phone / "tmp").iterdir()) == []


def test_probing_a_phone(phone: Path, tmp_path: Path) -> None:
    found = probe(tool(tmp_path, "true"))
    assert found.runs == (".tflite with benchmark_model, latency only",)
    assert found.python == ""
    found = probe(PHONE)
    assert found.runs == ()
    assert found.advice == ("there is no Python: set benchmark_model in the profile to the tool's binary",)
