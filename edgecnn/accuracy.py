"""Accuracy on a device, and how far its outputs are from this host's of the same file.

    lsb = |y_device - y_host| / scale_y        rounded to whole steps
    cosine = <y_device, y_host> / (|y_device| |y_host|), over all outputs of all images

Images go there in pieces of at most 64 MB, as the stored preprocess makes them, and only outputs come back.
LiteRT computes the same integers on every processor. ONNX Runtime fuses an int8 graph in another way on x86
than on ARM, and float sums depend on the order of the additions, so that there the contract is the same first
class and a cosine above 0.999, never equality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecnn.artifact import Artifact, read_artifact
from edgecnn.data import Dataset, open_dataset
from edgecnn.devices.local import run_local
from edgecnn.errors import DataError, RunnerError
from edgecnn.export.output_step import output_steps
from edgecnn.graph.program import Array
from edgecnn.pipeline import Progress
from edgecnn.proof import read_images, temporary_folder, write_inputs
from edgecnn.report.bench_results import BoardAccuracy
from edgecnn.runner.runtimes import package_label

if TYPE_CHECKING:
    from edgecnn.devices.deploy import Executor

CHUNK_BYTES = 64 * 2**20
TIMEOUT_S = 3600.0
MIN_COSINE = 0.999
MIN_AGREEMENT = 0.99
"""Images whose two best classes are nearly tied may change places between two right executions."""

TOP_K = 5


@dataclass(frozen=True)
class AccuracyTask:
    """A file with the data it is to be run on.

    Attributes:
        artifact: with its sidecar.
        dataset: opened with the sidecar's preprocess.
        step: of the first output, None for a float one.
    """

    artifact: Artifact
    dataset: Dataset
    step: float | None


@dataclass
class Tally:
    """Running sums over the chunks.

    Attributes:
        num_samples: images.
        num_top1: of them right.
        num_top5: of them with the label among the best five.
        num_agreed: of them with the same first class on both sides.
        max_difference: largest absolute difference of an output value.
        product: sum of the products of both sides' outputs.
        squares: of the device's outputs, of the host's.
        num_broken: values that are not finite on the device.
    """

    num_samples: int = 0
    num_top1: int = 0
    num_top5: int = 0
    num_agreed: int = 0
    max_difference: float = 0.0
    product: float = 0.0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    num_broken: int = 0

    def add(self, device: Array, host: Array, labels: Array | None) -> None:
        """Add a chunk.

        Args:
            device: outputs, (n, classes) or (n, ...).
            host: the same from this host.
            labels: (n,) or None.
        """
        self.num_samples += len(device)
        self.num_broken += int(device.size - np.count_nonzero(np.isfinite(device)))
        a, b = device.astype(np.float64), host.astype(np.float64)
        both = np.isfinite(a) & np.isfinite(b)
        a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
        self.max_difference = max(self.max_difference, float(np.abs(a - b).max(initial=0.0)))
        self.product += float((a * b).sum())
        self.squares[0] += float((a * a).sum())
        self.squares[1] += float((b * b).sum())
        if device.ndim != 2:
            return
        classes = device.argmax(axis=1)  # (n,)
        self.num_agreed += int((classes == host.argmax(axis=1)).sum())
        if labels is None:
            return
        self.num_top1 += int((classes == labels).sum())
        best = np.argsort(-device, axis=1, kind="stable")[:, :TOP_K]  # (n, 5)
        self.num_top5 += int((best == labels[:, None]).any(axis=1).sum())

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between all outputs of both sides; None where one side is all zeros."""
        norms = float(np.sqrt(self.squares[0]) * np.sqrt(self.squares[1]))
        return min(1.0, self.product / norms) if norms > 0 else None


def open_task(path: Path, data: Any) -> AccuracyTask:
    """Open the data as a file takes them.

    Args:
        path: .onnx or .tflite file with its sidecar.
        data: whatever `edgecnn.data.open_dataset` takes; labels are used where there are any.

    Raises:
        LoadError: if the sidecar is missing or does not belong to the file.
        DataError: if the data do not fit.
    """
    artifact = read_artifact(path)
    spec = artifact.spec
    shape = spec.outputs[0].shape
    count = shape[1] if spec.task == "classification" and len(shape) > 1 else None
    dataset = open_dataset(data, spec.preprocess, class_count=count, labels=spec.labels)
    if len(dataset) == 0:
        raise DataError(f"data source '{data}' holds no images")
    return AccuracyTask(artifact, dataset, output_steps(path)[0])


def measure_accuracy(executor: Executor, task: AccuracyTask, progress: Progress) -> BoardAccuracy:
    """Run all images of a task on the device and here.

    Args:
        executor: of the device.
        task: the file and its data.
        progress: told about every chunk.

    Raises:
        RunnerError: if the file does not run there or here, or an output is not what it should be.
        DeviceError: if the device fails.
    """
    artifact, dataset = task.artifact, task.dataset
    classifies = artifact.spec.task == "classification"
    labels = dataset.labels if classifies else None
    tally = Tally()
    names = ["", ""]
    file = "/".join(artifact.path.absolute().parts[-2:])
    progress.start(f"accuracy of {file} on {executor.device.name}", len(dataset))
    for indices in _chunks(task):
        with temporary_folder() as folder:
            kept = write_inputs(folder / "inputs.npy", dataset, indices)
            provider = executor.device.provider
            device, names[0] = _outputs(executor.run_request, task, folder, "device", provider)
            host, names[1] = _outputs(run_local, task, folder, "host", "cpu")
            if device.shape != host.shape:
                raise RunnerError(f"outputs have shape {device.shape} there and {host.shape} here")
            tally.add(device, host, None if labels is None else np.asarray(labels)[kept])
        progress.advance(len(indices))
    progress.finish()
    return _judge(task, tally, names, has_labels=labels is not None)


def _outputs(run: Any, task: AccuracyTask, folder: Path, side: str, provider: str) -> tuple[Array, str]:
    """Return the first output, (n, classes) or (n, ...) float32, and "runtime version"."""
    request = {
        "task": "outputs",
        "artifacts": [{"key": "file", "path": str(task.artifact.path)}],
        "inputs": str(folder / "inputs.npy"),
        "outputs": str(folder / side),
        "provider": provider,
    }
    entry = run(request, TIMEOUT_S)["artifacts"]["file"]
    values = np.load(folder / side / entry["outputs"][0]["array"], allow_pickle=False)
    if values.ndim == 4 and values.shape[2:] == (1, 1):
        values = values[:, :, 0, 0]  # (n, classes, 1, 1) -> (n, classes)
    return values, f"{package_label(entry['runtime_package'])} {entry['runtime_version']}"


def _judge(task: AccuracyTask, tally: Tally, names: Sequence[str], *, has_labels: bool) -> BoardAccuracy:
    """Hold the sums against the contract."""
    artifact, total = task.artifact, tally.num_samples
    _, *sizes = artifact.spec.outputs[0].shape
    is_class = artifact.spec.task == "classification"
    agreement = tally.num_agreed / total if is_class else None
    max_lsb = None if task.step is None else round(tally.max_difference / task.step)
    exact = artifact.format == "tflite" and max_lsb is not None
    if exact:
        holds = max_lsb == 0
    else:
        near = tally.cosine is None or tally.cosine > MIN_COSINE
        holds = near and (agreement is None or agreement >= MIN_AGREEMENT)
    holds = holds and tally.num_broken == 0
    return BoardAccuracy(
        key=artifact.path.name,
        path=str(artifact.path),
        runtime=names[0],
        host_runtime=names[1],
        num_samples=total,
        top1=tally.num_top1 / total if has_labels else None,
        top5=tally.num_top5 / total if has_labels and (sizes[0] or 0) > TOP_K else None,
        agreement_with_host=agreement,
        max_lsb=max_lsb,
        max_difference=tally.max_difference,
        cosine=tally.cosine,
        num_compared=total,
        holds=holds,
        note="" if holds else _note(tally, names, max_lsb, agreement, exact=exact),
    )


def _note(
    tally: Tally, names: Sequence[str], max_lsb: int | None, agreement: float | None, *, exact: bool
) -> str:
    """Say what differs, and between which runtimes."""
    found = [f"up to {max_lsb} LSB" if max_lsb is not None else f"up to {tally.max_difference:.3g}"]
    if agreement is not None:
        found.append(f"same first class for {100 * agreement:.2f} % of {tally.num_samples} images")
    if tally.cosine is not None:
        found.append(f"cosine {tally.cosine:.5f}")
    if tally.num_broken:
        found.append(f"{tally.num_broken} values not finite")
    expected = (
        "the same integers" if exact else f"cosine above {MIN_COSINE} and {MIN_AGREEMENT:.0%} agreement"
    )
    return (
        f"outputs of {names[0]} on the device differ from {names[1]} on this host by more than the contract "
        f"({', '.join(found)}; expected {expected})"
    )


def _chunks(task: AccuracyTask) -> Iterator[Sequence[int]]:
    """Yield indices whose inputs, and outputs, fit into CHUNK_BYTES."""
    dataset = task.dataset
    input_bytes = int(read_images(dataset, [0])[0].nbytes)
    output_bytes = 4 * int(np.prod([size or 1 for size in task.artifact.spec.outputs[0].shape[1:]]))
    step = max(1, CHUNK_BYTES // max(input_bytes, output_bytes, 1))
    for start in range(0, len(dataset), step):
        yield range(start, min(start + step, len(dataset)))
