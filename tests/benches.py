"""A device that says what a test lets it say, and files for it to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgecnn.devices.profile import Device
from edgecnn.report.bench_results import BenchReport, BenchRun, BoardAccuracy, Comparison

MS = 1_000_000
DEVICE = Device("fake", "local", "onnxruntime", "aarch64", threads=2)

Answer = Callable[[Mapping[str, Any], int], dict[str, Any]]


def entry(*samples_ms: float, **changes: Any) -> dict[str, Any]:
    """The runner's entry of one file."""
    samples = [round(value * MS) for value in samples_ms]
    return {
        "runtime": "onnxruntime",
        "runtime_version": "1.31.1",
        "samples_ns": samples,
        "block_lengths": [len(samples)],
        "phases": {"import_ms": 20.0, "load_ms": 4.0, "first_ms": 1.0, "warmup_ms": 200.0},
        "peak_rss_bytes": 50_000_000,
        "baseline_rss_bytes": 30_000_000,
        "device_memory_bytes": None,
        "profile": None,
        "delegate": None,
        "trace": [{"t_s": 0.0, "temperature_c": 50.0, "frequency_mhz": 1500.0, "throttled": None}],
        "taints": [],
        "warnings": [],
        **changes,
    }


def result(file: dict[str, Any], **environment: Any) -> dict[str, Any]:
    found = {"cpu": "Cortex-A72", "isa": "aarch64", "num_cores": 4, "emulated": False, **environment}
    runtimes = {file["runtime"]: file["runtime_version"]} if "runtime" in file else {}
    return {"artifacts": {"file": file}, "environment": {"runtimes": runtimes, **found}}


class FakeExecutor:
    """Answers requests, and keeps them."""

    def __init__(self, device: Device, answer: Answer) -> None:
        self.device = device
        self.answer = answer
        self.requests: list[Mapping[str, Any]] = []

    def run_request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        self.requests.append(request)
        return self.answer(request, len(self.requests) - 1)

    def environment(self) -> dict[str, Any]:
        return {}

    @property
    def files(self) -> list[str]:
        return [Path(request["artifacts"][0]["path"]).name for request in self.requests]


def install(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[FakeExecutor]:
    """Let every device be a fake one; the executors that are opened appear in the list."""
    opened: list[FakeExecutor] = []

    @contextlib.contextmanager
    def open_executor(device: Device) -> Iterator[FakeExecutor]:
        opened.append(FakeExecutor(device, answer))
        yield opened[-1]

    monkeypatch.setattr("edgecnn.devices.deploy.open_executor", open_executor)
    return opened


def two_files(folder: Path) -> tuple[Path, Path]:
    paths = folder / "a.onnx", folder / "b.tflite"
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def name_of(request: Mapping[str, Any]) -> str:
    return Path(request["artifacts"][0]["path"]).name


def broken_run(key: str, error: str = "no memory") -> BenchRun:
    return BenchRun(key, f"out/{key}", "a" * 64, 70_000, "", "", 1, error=error)


def run_of(key: str, median_ms: float = 2.0, **changes: Any) -> BenchRun:
    sample = round(median_ms * MS)
    values: dict[str, Any] = {
        "key": key,
        "path": f"out/{key.partition('@')[0]}",
        "sha256": "a" * 64,
        "size_bytes": 70_000,
        "runtime": "onnxruntime",
        "runtime_version": "1.31.1",
        "threads": 1,
        "samples_ns": (sample,) * 6,
        "block_lengths": (3, 3),
        "median_ms": median_ms,
        "median_interval_ms": (0.99 * median_ms, 1.02 * median_ms),
        "iqr_ms": 0.1,
        "min_ms": median_ms,
        "phases": {"import_ms": 20.0, "load_ms": 4.5, "first_ms": 3.0, "warmup_ms": 200.0},
        "peak_rss_bytes": 18_000_000,
    }
    return BenchRun(**{**values, **changes})


def accuracy_of(key: str, top1: float | None = 0.9, **changes: Any) -> BoardAccuracy:
    values: dict[str, Any] = {
        "key": key,
        "path": f"out/{key}",
        "runtime": "onnxruntime 1.31.1",
        "host_runtime": "onnxruntime 1.31.1",
        "num_samples": 1000,
        "top1": top1,
        "top5": 0.99,
        "agreement_with_host": 1.0,
        "max_lsb": 0,
        "max_difference": 0.0,
        "cosine": 1.0,
        "num_compared": 1000,
        "holds": True,
    }
    return BoardAccuracy(**{**values, **changes})


def report_of(**changes: Any) -> BenchReport:
    """A report of two files, the second 2.5 times as fast."""
    values: dict[str, Any] = {
        "device": "pi4",
        "environment": {"board": "Raspberry Pi 4", "isa": "aarch64", "num_cores": 4},
        "runs": (run_of("model.onnx", 5.0), run_of("model.tflite", 2.0)),
        "comparisons": (Comparison("model.onnx", "model.tflite", 2.5, 2.4, 2.6, "faster", 12),),
    }
    return BenchReport(**{**values, **changes})
