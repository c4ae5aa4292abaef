"""`edgecnn devices probe` and `add`: what runs on a device, what to install, and the profile written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgecnn.cli.main import main
from edgecnn.devices import probe as probe_module
from edgecnn.devices import registration
from edgecnn.devices.fake import FakeTransport, Fault
from edgecnn.devices.probe import DeviceProbe, Package, probe
from edgecnn.devices.profile import Device, KnownBad, load_device
from edgecnn.devices.wheels import install_command, wheel_version
from edgecnn.errors import DeviceError
from edgecnn.runner.environment import local_isa

BOARD = Device(name="pi", transport="ssh", runtime="litert", isa="aarch64", host="pi")

WORKS = {"version": "1.0", "error": None}

SAID: dict[str, Any] = {
    "python": "3.11.2",
    "machine": "aarch64",
    "system": "Linux",
    "bits": 64,
    "glibc": "2.36",
    "cpuinfo": "processor : 0\nFeatures : fp asimd\nModel : Raspberry Pi 4\n",
    "os": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    "board": "Raspberry Pi 4 Model B",
    "ram_bytes": 4 * 2**30,
    "disk_free_bytes": 10 * 2**30,
    "folder": "/tmp",
    "emulated": False,
    "providers": [],
    "gpu": None,
    "packages": {"numpy": WORKS, "onnxruntime": WORKS, "ai-edge-litert": WORKS},
    "externally_managed": False,
}


def board_that_says(
    folder: Path, said: dict[str, Any], version: str | None = None
) -> tuple[Device, FakeTransport]:
    """A board whose Python answers the probe with `said`."""
    script = folder / "python"
    (folder / "said.json").write_text(json.dumps(said))
    major_minor = version or ".".join(str(said.get("python", "3.11")).split(".")[:2])
    script.write_text(f'#!/bin/sh\ncase $1 in -c) echo {major_minor};; *) cat "{folder}/said.json";; esac\n')
    script.chmod(0o755)
    return replace(BOARD, python=str(script)), FakeTransport(folder / "home", name="pi")


def ask(folder: Path, **changes: Any) -> DeviceProbe:
    device, transport = board_that_says(folder, {**SAID, **changes})
    return probe(device, transport)


def test_this_machine_is_asked_for_real() -> None:
    for package in ("onnxruntime", "ai_edge_litert"):
        pytest.importorskip(package)
    found = probe(load_device("local_cpu"))
    assert found.isa == local_isa()
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.packages["numpy"].error is None
    assert [run.partition(" ")[0] for run in found.runs] == [".onnx", ".tflite"]
    assert found.ram_bytes is not None
    assert found.ram_bytes > 2**28


def test_a_board_with_everything_has_nothing_to_do(tmp_path: Path) -> None:
    found = ask(tmp_path)
    assert (found.board, found.cpu, found.system) == (
        "Raspberry Pi 4 Model B",
        "Raspberry Pi 4",
        "Debian GNU/Linux 12 (bookworm)",
    )
    assert found.runs == (".onnx with onnxruntime 1.0", ".tflite with ai-edge-litert 1.0")
    assert found.advice == ()


def test_tflite_runtime_beside_numpy_2_does_not_count(tmp_path: Path) -> None:
    """It imports there, and no file can be opened with it."""
    packages = {
        "numpy": {"version": "2.4.6", "error": None},
        "tflite-runtime": {"version": "2.14.0", "error": None},
    }
    found = ask(tmp_path, packages=packages)
    assert found.runs == ()
    assert any("it needs numpy 1 and finds 2.4.6: pip install 'numpy<2'" in line for line in found.advice)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"packages": {}},
            "-m pip install numpy 'onnxruntime==1.31.1' 'ai-edge-litert==2.3.0'",
        ),
        (
            {"packages": {"numpy": WORKS}, "python": "3.13.5"},
            "-m pip install 'onnxruntime==1.31.1' 'ai-edge-litert==2.3.0'",
        ),
        (
            {"packages": {"numpy": WORKS}, "python": "3.10.1"},
            "-m pip install 'onnxruntime==1.23.2' 'ai-edge-litert==2.3.0'",
        ),
        (
            {"packages": {"numpy": WORKS}, "externally_managed": True},
            "python3 -m venv ~/edgecnn && ~/edgecnn/bin/pip install 'onnxruntime==1.31.1'",
        ),
        (
            {"packages": {"numpy": WORKS}, "bits": 32},
            "-m pip install 'tflite-runtime==2.14.0' 'numpy<2'",
        ),
        (
            {"packages": {"numpy": WORKS}, "bits": 32},
            ".onnx files will not run: no wheel of onnxruntime for Python 3.11 on armv7l with glibc 2.36",
        ),
        (
            {"packages": {}, "machine": "armv7l", "bits": 32},
            "numpy has no wheel for 32-bit ARM on PyPI: sudo apt install python3-numpy",
        ),
        ({"packages": {"numpy": WORKS}, "python": "3.13.1", "bits": 32}, ".tflite files will not run"),
        ({"packages": {"numpy": WORKS}, "glibc": "2.19"}, ".tflite files will not run"),
        (
            {
                "packages": {
                    **SAID["packages"],
                    "onnxruntime": {"version": None, "error": "killed by signal 4"},
                }
            },
            "onnxruntime is installed and does not work: illegal instruction",
        ),
        (
            {
                "packages": {
                    "numpy": {"version": "2.4.6", "error": None},
                    "onnxruntime": WORKS,
                    "tflite-runtime": {"version": None, "error": "ImportError: numpy.core.multiarray"},
                }
            },
            "tflite-runtime is installed and does not work: it needs numpy 1 and finds 2.4.6",
        ),
        (
            {"cpuinfo": "Features : asimd asimddp\n"},
            "the profile says isa aarch64, the device is aarch64-dotprod",
        ),
        ({"disk_free_bytes": 50 * 2**20}, "50 MiB are free where files go: set workdir"),
        ({"python": "3.7.3"}, "Python 3.7.3 is too old"),
    ],
)
def test_what_is_missing_is_said_with_the_command(
    tmp_path: Path, changes: dict[str, Any], advice: str
) -> None:
    assert advice in "\n".join(ask(tmp_path, **changes).advice)


def test_a_broken_runtime_does_not_run(tmp_path: Path) -> None:
    broken = {"version": None, "error": "killed by signal 4"}
    assert ask(tmp_path, packages={"numpy": WORKS, "onnxruntime": broken}).runs == ()
    assert ask(tmp_path, packages={"onnxruntime": WORKS}).runs == ()  # the runner needs numpy
    assert ask(tmp_path, python="3.7.3").runs == ()


def test_versions_known_to_fail_are_said(tmp_path: Path) -> None:
    packages = {**SAID["packages"], "tflite-runtime": WORKS}
    device, transport = board_that_says(tmp_path, {**SAID, "packages": packages})
    device = replace(device, known_bad=(KnownBad("tflite-runtime", ">=2.14", "built against numpy 1"),))
    assert probe(device, transport).advice == (
        "tflite-runtime >=2.14 is known not to work: built against numpy 1",
    )


def test_the_script_sees_a_package_that_dies_at_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.kill(os.getpid(), 4)\n")
    (tmp_path / "ai_edge_litert").mkdir()
    (tmp_path / "ai_edge_litert" / "__init__.py").write_text("")
    (tmp_path / "ai_edge_litert" / "interpreter.py").write_text(
        "raise ImportError('libm.so.6: no GLIBC_2.38')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = probe(load_device("local_cpu"))
    assert found.packages["onnxruntime"] == Package(None, "killed by signal 4")
    assert found.packages["ai-edge-litert"] == Package(None, "ImportError: libm.so.6: no GLIBC_2.38")
    assert "illegal instruction" in "\n".join(found.advice)


def test_a_provider_that_is_not_there_is_said(tmp_path: Path) -> None:
    device, transport = board_that_says(tmp_path, {**SAID, "providers": ["CPUExecutionProvider"]})
    advice = probe(replace(device, provider="cuda"), transport).advice
    assert [line.partition(":")[0] for line in advice] == [
        "its onnxruntime has no provider cuda",
        "its PyTorch sees no GPU",
    ]
    said = {**SAID, "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "gpu": "NVIDIA H200"}
    device, transport = board_that_says(tmp_path, said)
    found = probe(replace(device, provider="cuda"), transport)
    assert found.advice == ()
    assert found.runs[-1] == ".pt2 with torch on NVIDIA H200"


def test_boards_that_cannot_be_asked(tmp_path: Path) -> None:
    device, _ = board_that_says(tmp_path, {"python": "3.11.0"})
    with pytest.raises(DeviceError, match=r"pi does not answer the probe"):
        probe(device, FakeTransport(tmp_path / "home", name="pi"))
    with pytest.raises(DeviceError, match=r"pi cannot be reached"):
        probe(device, FakeTransport(tmp_path / "home", [Fault("unreachable")], name="pi"))
    with pytest.raises(DeviceError, match=r"pi has no Python: /no/python"):
        probe(replace(device, python="/no/python"), FakeTransport(tmp_path / "home", name="pi"))


def test_wheels() -> None:
    assert wheel_version("ai-edge-litert", "aarch64", (3, 9)) == "2.1.0"
    assert wheel_version("tflite-runtime", "aarch64", (3, 13)) is None
    assert wheel_version("onnxruntime", "x86_64", (3, 12)) == ""
    assert install_command("onnxruntime", "armv7l", (3, 11)) is None
    with pytest.raises(DeviceError, match=r"package is 'torch'"):
        wheel_version("torch", "aarch64", (3, 11))


def test_probe_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = DeviceProbe(
        name="local_cpu",
        board=None,
        cpu="EPYC",
        isa="x86-64",
        machine="x86_64",
        system="Debian",
        python="3.11.2",
        glibc="2.36",
        ram_bytes=2**31,
        disk_free_bytes=2**30,
        packages={"numpy": Package("2.4.6", None), "onnxruntime": Package(None, "ImportError: x")},
        advice=("pip install x",),
    )
    monkeypatch.setattr(probe_module, "probe", lambda device: found)
    assert main(["devices", "probe", "local_cpu"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "ram 2,048 MiB",
        "numpy 2.4.6",
        "onnxruntime broken",
        "runs nothing yet",
        "to do pip install x",
    ):
        assert line in lines
    assert main(["devices", "probe", "local_cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["numpy"] == {"version": "2.4.6", "error": None}


def test_add_like_another_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["devices", "add", "kitchen", "--host", "pi@10.0.0.7", "--like", "raspberrypi4", "--threads", "2"]
    assert main(words) == 0
    device, base = load_device("kitchen"), load_device("raspberrypi4")
    assert device == replace(base, name="kitchen", host="pi@10.0.0.7", threads=2)
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


def test_add_asks_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def said(device: Device) -> DeviceProbe:
        assert (device.host, device.python) == ("pi@10.0.0.7", "/opt/python")
        return DeviceProbe(
            "hall",
            None,
            "A76",
            "aarch64-dotprod",
            "aarch64",
            "",
            "3.13.5",
            "",
            2**33,
            None,
            runs=(".onnx x",),
        )

    monkeypatch.setattr(registration, "probe", said)
    assert main(["devices", "add", "hall", "--host", "pi@10.0.0.7", "--python", "/opt/python"]) == 0
    device = load_device("hall")
    assert (device.isa, device.ram_mb, device.runtime) == ("aarch64-dotprod", 8192, "onnxruntime")
    assert list((tmp_path / "devices").iterdir()) == [tmp_path / "devices" / "hall.toml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a b", "--host", "pi"], "name is 'a b'"),
        (["../x", "--host", "pi"], "name is '../x'"),
        (["pi", "--host", "-oProxyCommand=x"], "host is '-oProxyCommand=x'"),
        (["pi", "--host", "pi;reboot"], "host is 'pi;reboot'"),
        (["pi", "--host", "pi", "--python", "python3 -c 'x'"], "python is"),
        (["pi", "--host", "pi", "--workdir", "$(reboot)"], "workdir is"),
    ],
)
def test_add_refuses_what_a_shell_would_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["devices", "add", "--isa", "aarch64", *words]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
