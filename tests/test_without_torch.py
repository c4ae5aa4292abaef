"""What needs no PyTorch: finished files are measured and reports are judged where none is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import running

from edgecnn.compress import CompressResult

HIDDEN = ("torch", "torchvision", "timm", "safetensors")
QUICK = ("--runs", "6", "--seconds", "0.001", "--blocks", "2")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process without PyTorch."""
    return running.hide(tmp_path_factory.mktemp("bare"), *HIDDEN)


def succeed(*arguments: object, changes: dict[str, str]) -> str:
    done = running.run(*arguments, changes=changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_has_no_pytorch(bare: dict[str, str]) -> None:
    command = [sys.executable, "-c", "import torch"]
    done = subprocess.run(
        command, env=running.environment(bare), capture_output=True, text=True, timeout=60, check=False
    )
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("onnx", ("onnx", "ai_edge_litert")), ("tflite", ("onnx", "onnxruntime", "flatbuffers"))],
)
def test_evaluate_needs_the_files_own_runtime_alone(
    lenet_result: CompressResult, tmp_path: Path, name: str, hidden: tuple[str, ...]
) -> None:
    changes = running.hide(tmp_path, *HIDDEN, *hidden)
    path = lenet_result.artifacts[name].path
    found = json.loads(succeed("evaluate", path, "--data", "digits:test", "--json", changes=changes))
    assert found["top1"] > 0.97
    assert found["num_samples"] == 360


def test_evaluate_from_python(lenet_result: CompressResult, bare: dict[str, str]) -> None:
    program = (
        "import edgecnn, sys; print(edgecnn.evaluate(sys.argv[1], data='digits:test')['num_samples'], "
        "'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(lenet_result.artifacts["tflite"].path)],
        env=running.environment(bare),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["360", "False"]


def test_bench_check_and_compare(lenet_result: CompressResult, tmp_path: Path, bare: dict[str, str]) -> None:
    folder = lenet_result.artifacts["onnx"].path.parent
    succeed("bench", folder, *QUICK, "--data", "digits:test", "-o", tmp_path / "b", changes=bare)
    assert (tmp_path / "b" / "bench.html").is_file()
    checked = succeed("check", tmp_path / "b", "--max-latency-ms", "1000", "--max-size-mb", "1", changes=bare)
    assert checked.count("ok ") == 4
    assert "top-1" in succeed("compare", tmp_path / "b", tmp_path / "b", changes=bare)


def test_devices_and_recipes(bare: dict[str, str]) -> None:
    assert "raspberrypi4" in succeed("devices", "list", changes=bare)
    assert "aarch64" in succeed("devices", "show", "raspberrypi4", changes=bare)
    assert "litert" in succeed("devices", "probe", "local_cpu", changes=bare)
    assert "static_wi8_ai8" in succeed("recipes", "list", changes=bare)
    done = running.run("recipes", "show", "static_wi8_ai8", changes=bare)
    assert (done.returncode, 'pass = "quantize_static"' in done.stdout) == (0, True)
    assert "as it is written: without torch it cannot be checked" in done.stderr


def test_a_network_still_needs_pytorch_and_says_so(examples_dir: Path, bare: dict[str, str]) -> None:
    done = running.run("evaluate", examples_dir / "lenet5_digits.pt2", "--data", "digits", changes=bare)
    assert done.returncode == 1
    assert (
        done.stderr == "error: torch is needed here and not installed\nhint: pip install 'edgecnn[torch]'\n"
    )
