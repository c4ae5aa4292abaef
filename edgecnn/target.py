"""Latency and outputs on the device that files are made for, where it can be reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecnn.devices.profile import Device
from edgecnn.errors import DeviceError, MissingDependencyError, RunnerError
from edgecnn.export.parity import Comparison, compare
from edgecnn.graph.program import Array
from edgecnn.pipeline import Progress
from edgecnn.proof import Candidate, measure_latency, run_outputs
from edgecnn.report.bench_results import EMULATED

NUM_IMAGES = 32
"""Images whose outputs are compared there and here; the files' own proof has more."""

MIN_AGREEMENT = 0.99


@dataclass(frozen=True)
class OnTarget:
    """What the target said.

    Attributes:
        latency: as `edgecnn.proof.measure_latency` gives it; None if it was not measured there.
        comparisons: "onnx_on_target" and "tflite_on_target": the file there against the same file here.
        warnings: what the user should know.
    """

    latency: dict[str, Any] | None
    comparisons: dict[str, Comparison]
    warnings: tuple[str, ...]


def measure_on_target(
    device: Device,
    candidates: Sequence[Candidate],
    inputs: Array,
    scales: Mapping[str, float],
    threads: int,
    progress: Progress,
) -> OnTarget:
    """Run float and compressed files on a device that is not this machine.

    Args:
        device: with a host; without one nothing is tried.
        candidates: all files.
        inputs: float32 (n, c, h, w).
        scales: step of each output by name, 0 for a float one.
        threads: of the latency measurement.
        progress: told how far it is.

    Returns:
        What it said. A device that cannot be used, or on which a file does not run, is a warning.
    """
    if device.transport == "local" or not device.host:
        return OnTarget(None, {}, ())
    from edgecnn.devices.deploy import open_executor

    files = [candidate for candidate in candidates if not candidate.key.startswith("float_")]
    images = inputs[:NUM_IMAGES]
    try:
        with open_executor(device) as executor:
            progress.start(f"outputs on {device.name}", None)
            there = run_outputs(files, images, run=executor.run_request)
            progress.finish()
            latency = measure_latency(candidates, inputs, threads, progress, run=executor.run_request)
    except (DeviceError, MissingDependencyError, RunnerError) as error:
        return OnTarget(None, {}, (f"nothing was measured on {device.name}: {error.message}",))
    here = run_outputs(files, images)
    found = {file.key: compare(here[file.key], there[file.key], scales) for file in files}
    warnings = [EMULATED] if latency["environment"].get("emulated") else []
    runtimes = ", ".join(f"{n} {v}" for n, v in latency["environment"].get("runtimes", {}).items())
    warnings += [
        f"the {key} file gives other outputs on {device.name} ({runtimes}) than here: up to "
        f"{comparison.max_lsb} LSB"
        for key, comparison in found.items()
        if not _holds(key, comparison)
    ]
    return OnTarget(latency, {f"{key}_on_target": entry for key, entry in found.items()}, tuple(warnings))


def _holds(key: str, found: Comparison) -> bool:
    """LiteRT's integers are the same everywhere; ONNX Runtime fuses differently on each processor."""
    if key == "tflite":
        return found.max_lsb == 0
    return found.top1_agreement is None or found.top1_agreement >= MIN_AGREEMENT
