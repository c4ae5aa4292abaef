"""What is said about a machine: its name, its memory, whether it is emulated, and what it can run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.runner import environment, probe
from edgecnn.runner.environment import (
    board_name,
    describe_environment,
    is_emulated,
    package_version,
    peak_rss_bytes,
    reset_peak_rss,
    rss_bytes,
)
from edgecnn.runner.failure import RequestFailure
from edgecnn.runner.probe import describe_exit, probe_modules, run_probe
from edgecnn.runner.request import parse_request
from edgecnn.runner.runtimes import numpy_mismatch

ROOT = Path(__file__).parent.parent


def test_the_environment_has_what_a_board_is_judged_by() -> None:
    values = describe_environment({})
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    keys = ("emulated", "board", "temperature_c", "governor", "frequencies_mhz", "throttled")
    assert set(keys) <= set(values)
    assert values["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("cpuinfo", "variable", "file", "expected"),
    [
        ("model name : AMD EPYC", None, False, False),
        ("model name : QEMU Virtual CPU version 2.5+", None, False, True),
        ("", "1", False, True),
        ("", "0", False, False),
        ("", None, True, True),
        ("", "0", True, True),  # the variable cannot make an emulated board a real one
    ],
)
def test_emulation_is_noticed(
    cpuinfo: str,
    variable: str | None,
    file: bool,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "EMULATED_FILE", tmp_path / "emulated")
    monkeypatch.delenv("EDGECNN_EMULATED", raising=False)
    if variable is not None:
        monkeypatch.setenv("EDGECNN_EMULATED", variable)
    if file:
        (tmp_path / "emulated").write_text("emulated=1\n")
    assert is_emulated(cpuinfo) is expected


def test_a_boards_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DEVICE_TREE_MODEL", tmp_path / "model")
    assert board_name("model name\t: AMD EPYC\nmodel\t\t: 17\n") is None
    assert board_name("Model\t\t: Raspberry Pi 4 Model B Rev 1.4\n") == "Raspberry Pi 4 Model B Rev 1.4"
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    assert board_name("") == "NVIDIA Jetson Orin Nano"


def test_versions_without_importing() -> None:
    code = (
        "import sys; from edgecnn.runner.environment import package_version as v; "
        "print(v('numpy'), v('no_such_package'), 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [np.__version__, "None", "False"]
    assert package_version("numpy") == np.__version__


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_is_set_back_and_grows_by_what_is_used() -> None:
    if not reset_peak_rss():
        pytest.skip("the kernel does not let /proc/self/clear_refs be written")
    before, now = peak_rss_bytes(), rss_bytes()
    assert before is not None
    assert now is not None
    assert abs(before - now) < 2**20
    block = np.ones(32 * 2**20, np.uint8)
    used = (peak_rss_bytes() or 0) - before
    assert 31 * 2**20 < used < 40 * 2**20
    del block
    reset_peak_rss()
    assert (peak_rss_bytes() or 0) - before < 8 * 2**20


def test_a_kernel_without_clear_refs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(environment, "STATUS", tmp_path / "none")
    assert reset_peak_rss() is False
    assert peak_rss_bytes() is None


def test_the_probe_finds_what_is_here() -> None:
    pytest.importorskip("onnxruntime")
    result = run_probe(parse_request({"task": "probe", "runtimes": ["onnxruntime"]}))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    found = result["runtimes"]["onnxruntime"]
    assert found["available"] is True
    assert found["version"] == result["environment"]["runtimes"]["onnxruntime"]
    assert "CPUExecutionProvider" in found["providers"]
    assert result["numpy"]["version"] == np.__version__
    assert result["disk_free_bytes"]["temporary"] > 0


@pytest.fixture
def fake_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "dies with SIGILL while it is imported"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "dies with SIGSEGV while it is imported"),
        (
            "raise ImportError('libstdc++.so.6: version not found')",
            "ImportError: libstdc++.so.6: version not",
        ),
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("import sys; sys.exit(7)", "cannot be imported: exit code 7"),
        ("import time; time.sleep(60)", "was not imported within 0.5 s"),
    ],
)
def test_a_package_that_cannot_be_imported_is_reported(
    source: str, error: str, fake_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in source:
        monkeypatch.setattr(probe, "IMPORT_TIMEOUT_S", 0.5)
    (fake_packages / "edgecnn_broken.py").write_text(source)
    metadata = fake_packages / "edgecnn_broken-1.21.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: edgecnn-broken\nVersion: 1.21.0\n")
    found = probe_modules(("edgecnn_broken",), "pip install another")
    assert (found["available"], found["broken"], found["version"]) == (False, True, "1.21.0")
    assert found["error"].startswith("edgecnn_broken 1.21.0 ")
    assert error in found["error"]
    assert found["hint"] == "pip install another"


def test_the_next_package_is_tried_and_the_broken_one_is_said(fake_packages: Path) -> None:
    (fake_packages / "edgecnn_broken.py").write_text("raise ImportError('broken')")
    (fake_packages / "edgecnn_whole.py").write_text("print('noise on stdout')")
    found = probe_modules(("edgecnn_none", "edgecnn_broken", "edgecnn_whole"), "hint")
    assert (found["available"], found["package"], found["broken"]) == (True, "edgecnn_whole", True)
    assert "broken" in found["error"]
    missing = probe_modules(("edgecnn_none",), "hint")
    assert missing["error"] == "not installed: tried edgecnn_none"
    assert (missing["broken"], missing["hint"]) == (False, "hint")


def test_how_an_import_ended() -> None:
    assert describe_exit(132, "") == "dies with SIGILL while it is imported"  # through a shell
    assert describe_exit(-99, "") == "dies with signal 99 while it is imported"
    assert describe_exit(1, "") == "cannot be imported: exit code 1"


@pytest.mark.parametrize(
    ("package", "numpy", "said"),
    [
        ("tflite_runtime", "2.1.0", True),
        ("tflite_runtime", "1.24.2", False),
        ("ai_edge_litert", "2.1.0", False),
        ("tflite_runtime", None, False),
    ],
)
def test_numpy_2_beside_tflite_runtime(package: str, numpy: str | None, said: bool) -> None:
    expected = "numpy 2.1.0 stands beside tflite-runtime 2.14.0, which was built for numpy 1"
    assert numpy_mismatch(package, "2.14.0", numpy) == (expected if said else None)


def test_the_probe_does_not_call_such_a_pair_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(modules: tuple[str, ...], hint: str) -> dict[str, Any]:
        package, version = ("numpy", "2.1.0") if modules == ("numpy",) else ("tflite_runtime", "2.14.0")
        entry = {"package": package, "version": version, "providers": None, "error": None, "hint": None}
        return {"available": True, "broken": False, **entry}

    monkeypatch.setattr(probe, "probe_modules", found)
    result = run_probe(parse_request({"task": "probe", "runtimes": ["litert"]}))
    assert result["runtimes"]["litert"]["available"] is False
    assert "numpy<2" in result["runtimes"]["litert"]["hint"]
    assert result["warnings"] == [
        "numpy 2.1.0 stands beside tflite-runtime 2.14.0, which was built for numpy 1"
    ]
    assert result["environment"]["runtimes"] == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"task": "probe", "runtimes": ["caffe"]},
            "runtimes is .*expected some of onnxruntime, litert, torch",
        ),
        ({"task": "probe", "runtimes": []}, "runtimes is"),
        ({"task": "probe", "artifacts": []}, "unknown key 'artifacts'"),
    ],
)
def test_a_bad_probe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestFailure, match=message):
        parse_request(values)


def without_numpy(tmp_path: Path, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Run a request where numpy cannot be imported."""
    (tmp_path / "numpy.py").write_text("raise ImportError('Original error was: libopenblas.so.0 is missing')")
    (tmp_path / "request.json").write_text(json.dumps(request))
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
        "from edgecnn.runner.__main__ import main; sys.exit(main(['request.json', 'result.json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    return done.returncode, json.loads((tmp_path / "result.json").read_text())


def test_a_machine_without_numpy_is_probed_and_told(tmp_path: Path) -> None:
    code, result = without_numpy(tmp_path, {"task": "probe", "runtimes": ["onnxruntime"]})
    assert (code, result["ok"], result["numpy"]["available"]) == (0, True, False)
    assert any("libopenblas.so.0 is missing" in warning for warning in result["warnings"])
    code, result = without_numpy(tmp_path, {"task": "latency", "artifacts": [{"key": "a", "path": "a.onnx"}]})
    assert (code, result["error"]["type"]) == (1, "MissingRuntimeFailure")
    assert result["error"]["message"].startswith("numpy cannot be imported by ")
    assert result["error"]["hint"] == "pip install numpy"
