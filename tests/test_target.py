"""`compress --target`: latency and outputs on the target where it can be reached, here where it cannot."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("sklearn")

import running
import small_networks

import edgecnn
from edgecnn.compress import CompressOptions, CompressResult
from edgecnn.devices.local import run_local
from edgecnn.devices.profile import Device, load_device
from edgecnn.errors import DeviceError, RunnerError
from edgecnn.export.output_step import output_steps
from edgecnn.pipeline import SilentProgress
from edgecnn.proof import Candidate
from edgecnn.report.bench_results import EMULATED
from edgecnn.target import OnTarget, measure_on_target

PI = Device("pi", "ssh", "onnxruntime", "x86-64-vnni", host="board")


class NearExecutor:
    """This machine in the place of a board; adds to the outputs, fails where it is told to."""

    def __init__(self, device: Device, added: float, error: Exception | None) -> None:
        self.device, self.added, self.error = device, added, error

    def run_request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        result = run_local(request, timeout_s)
        for entry in result["artifacts"].values():
            path = Path(request["outputs"]) / entry["outputs"][0]["array"]
            np.save(path, np.load(path) + np.float32(self.added))
        return result


def place(monkeypatch: pytest.MonkeyPatch, added: float = 0.0, error: Exception | None = None) -> None:
    """Let every device be this machine."""

    @contextlib.contextmanager
    def open_executor(device: Device) -> Iterator[NearExecutor]:
        yield NearExecutor(device, added, error)

    def latency(candidates: Any, inputs: Any, threads: int, progress: Any, run: Any) -> dict[str, Any]:
        environment = {"emulated": True, "runtimes": {"litert": "2.3.0"}, "board": "Pi"}
        return {**running.latency(candidates, inputs, threads, progress), "environment": environment}

    monkeypatch.setattr("edgecnn.devices.deploy.open_executor", open_executor)
    monkeypatch.setattr("edgecnn.target.measure_latency", latency)


def measure(result: CompressResult, device: Device = PI) -> OnTarget:
    candidates = [Candidate(key, artifact.path) for key, artifact in result.artifacts.items()]
    candidates += [Candidate(f"float_{c.key}", c.path) for c in candidates]
    inputs = np.random.default_rng(0).random((40, 1, 32, 32), dtype=np.float32)
    artifact = result.artifacts["tflite"]
    scales = {artifact.outputs[0].name: output_steps(artifact.path)[0] or 0.0}
    return measure_on_target(device, candidates, inputs, scales, 1, SilentProgress())


def test_a_target_that_computes_the_same(
    lenet_result: CompressResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch)
    found = measure(lenet_result)
    assert found.latency is not None
    assert {key: (c.max_lsb, c.num_samples) for key, c in found.comparisons.items()} == {
        "onnx_on_target": (0, 32),
        "tflite_on_target": (0, 32),
    }
    assert found.warnings == (EMULATED,)


def test_a_target_that_computes_something_else(
    lenet_result: CompressResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = output_steps(lenet_result.artifacts["tflite"].path)[0]
    assert step is not None
    place(monkeypatch, added=3 * step)
    found = measure(lenet_result)
    assert [c.max_lsb for c in found.comparisons.values()] == [3, 3]
    assert found.warnings[1:] == (  # the classes are the same, so that onnxruntime's file is as it may be
        "the tflite file gives other outputs on pi (litert 2.3.0) than here: up to 3 LSB",
    )


@pytest.mark.parametrize("error", [DeviceError("pi does not answer"), RunnerError("killed by SIGILL")])
def test_a_target_that_fails_is_a_warning(
    lenet_result: CompressResult, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    place(monkeypatch, error=error)
    found = measure(lenet_result)
    assert (found.latency, found.comparisons) == (None, {})
    assert found.warnings == (f"nothing was measured on pi: {error.args[0]}",)


def test_a_target_without_a_host_is_not_tried(
    lenet_result: CompressResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, error=DeviceError("tried"))
    nothing = OnTarget(None, {}, ())
    assert measure(lenet_result, replace(PI, host="")) == nothing
    assert measure(lenet_result, load_device("local_cpu")) == nothing


@pytest.mark.parametrize("reached", [True, False])
def test_compress_for_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: bool) -> None:
    place(monkeypatch, error=None if reached else DeviceError("pi does not answer"))
    monkeypatch.setattr(importlib.import_module("edgecnn.judgement"), "measure_latency", running.latency)
    profile = tmp_path / "pi.toml"
    profile.write_text(
        'name = "pi"\ntransport = "ssh"\nruntime = "litert"\nisa = "aarch64"\nhost = "board"\n'
    )
    report = edgecnn.compress(
        "small_networks:classifier",
        out=tmp_path / "out",
        options=CompressOptions(
            load=edgecnn.LoadOptions(input_shape=small_networks.SIZE, preprocess="unit"),
            target=str(profile),
            num_samples=16,
        ),
    ).report
    here = "latency was measured on this machine, not on pi, for which the files are made"
    assert report.target == "pi"
    assert ("tflite_on_target" in report.parity) is reached
    assert (EMULATED in report.warnings) is reached
    assert (here in report.warnings) is not reached
    assert ("nothing was measured on pi: pi does not answer" in report.warnings) is not reached
