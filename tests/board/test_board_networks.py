"""int8 and float networks on emulated ARM boards, in onnxruntime and LiteRT, against this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import run

from board import boards
from board.networks import Network
from edgecnn.devices.deploy import Executor, open_executor
from edgecnn.devices.local import run_local
from edgecnn.devices.profile import load_device

pytestmark = pytest.mark.board

TIMEOUT_S = 300.0
Outputs = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="session")
def executor(board: Path) -> Iterator[Executor]:
    with open_executor(load_device(board)) as opened:
        yield opened
    assert boards.leftovers(board) == []


def outputs(executor: Executor | None, network: Network, folder: Path, *keys: str, **options: Any) -> Outputs:
    """Return the first output of each file, run on a board or, without one, here."""
    request = {
        "task": "outputs",
        "artifacts": network.artifacts(*keys),
        "inputs": str(network.few),
        "outputs": str(folder),
        **options,
    }
    folder.mkdir()
    run = run_local if executor is None else executor.run_request
    result = run(request, TIMEOUT_S)
    return {key: np.load(folder / entry["outputs"][0]["array"]) for key, entry in result["artifacts"].items()}


def smallest_cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def test_the_board_says_what_it_is(executor: Executor) -> None:
    found = executor.environment()
    assert (found["machine"], found["isa"]) == ("aarch64", executor.device.isa)
    assert found["emulated"] is True
    assert "Emulated ARM board" in found["cpu"]
    assert (found["governor"], found["temperature_c"], found["throttled"]) == ("ondemand", 48.3, "0x0")


def test_probe_names_what_runs(board: Path) -> None:
    found = run("devices", "probe", board)
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert ["runs", ".onnx", "with", "onnxruntime"] in [line[:4] for line in lines]
    assert ["runs", ".tflite", "with", "ai-edge-litert"] in [line[:4] for line in lines]
    assert ["isa", load_device(board).isa] in lines


def test_outputs_with_the_runtimes_optimizations(
    executor: Executor, network: Network, tmp_path: Path
) -> None:
    """onnxruntime fuses a graph differently on x86 and on ARM; on ARM it computes LiteRT's integers."""
    here = outputs(None, network, tmp_path / "here")
    there = outputs(executor, network, tmp_path / "there")
    np.testing.assert_array_equal(there["tflite"], here["tflite"])
    np.testing.assert_array_equal(there["onnx"], there["tflite"])
    for key in here:
        assert smallest_cosine(there[key], here[key]) > (0.999_999 if "float" in key else 0.999), key
        np.testing.assert_array_equal(there[key].argmax(axis=1), here[key].argmax(axis=1), err_msg=key)


def test_onnxruntime_without_optimizations_is_the_same_to_the_bit(
    executor: Executor, network: Network, tmp_path: Path
) -> None:
    here = outputs(None, network, tmp_path / "here", "onnx", optimize=False)
    there = outputs(executor, network, tmp_path / "there", "onnx", optimize=False)
    np.testing.assert_array_equal(there["onnx"], here["onnx"])


def test_accuracy_is_the_hosts(executor: Executor, network: Network) -> None:
    request = {
        "task": "predictions",
        "artifacts": network.artifacts("onnx", "tflite"),
        "inputs": str(network.images),
        "labels": str(network.labels),
    }
    here, there = run_local(request, TIMEOUT_S), executor.run_request(request, TIMEOUT_S)
    assert there["num_samples"] == 50
    assert there["environment"]["emulated"] is True
    for key in ("onnx", "tflite"):
        assert there["artifacts"][key]["predictions"] == here["artifacts"][key]["predictions"]
        assert there["artifacts"][key]["top1"] == here["artifacts"][key]["top1"] > 0.85


def test_latency_is_marked_as_emulated(executor: Executor, lenet5: Network) -> None:
    request = {
        "task": "latency",
        "artifacts": lenet5.artifacts("onnx", "float_onnx"),
        "min_runs": 3,
        "min_seconds": 0.1,
        "max_seconds": 5.0,
    }
    result = executor.run_request(request, TIMEOUT_S)
    assert result["environment"]["emulated"] is True
    for entry in result["artifacts"].values():
        assert entry["num_samples"] >= 3
        assert entry["median_ms"] > 0


def test_bench_of_resnet20(pi4: Path, data_dir: Path, resnet20: Network, tmp_path: Path) -> None:
    """Float and int8 in both runtimes, 20 images: the report says it is emulated, and what was right."""
    import edgecnn
    from edgecnn.bench import BenchOptions

    with np.load(data_dir / "cifar10" / "test1000.npz") as source:
        np.savez(tmp_path / "few.npz", **{name: source[name][:20] for name in source.files})
    options = BenchOptions(num_runs=3, seconds=0.1, num_blocks=1)
    report = edgecnn.bench(
        *resnet20.files.values(), device=str(pi4), data=tmp_path / "few.npz", options=options
    )
    assert report.emulated
    assert any("emulated" in warning for warning in report.warnings)
    assert len(report.runs) == len(report.accuracy) == 4
    for entry in report.accuracy:
        assert entry.num_samples == 20
        assert entry.top1 is not None
        assert entry.top1 >= 0.8
        assert entry.agreement_with_host == 1.0
    assert boards.leftovers(pi4) == []
