"""Files run in their real runtimes: outputs, predictions and latency.

Everything runs in fresh processes through the runner, so that the figures are those of the runtimes alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.data import Dataset
from edgecnn.data.dataset import SkippingDataset
from edgecnn.devices.local import Run, run_local
from edgecnn.errors import OutputError, RunnerError
from edgecnn.graph.program import Array
from edgecnn.pipeline import Progress
from edgecnn.runner.outputs import NpyWriter

CHUNK_BYTES = 256 * 2**20
"""Inputs written to disk at once for the runner."""

BATCH_SIZE = 16

TIMEOUT_S = 3600.0

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Candidate:
    """A file to be run.

    Attributes:
        key: "onnx", "tflite", "float_onnx" or "float_tflite".
        path: of the file, its sidecar beside it.
    """

    key: str
    path: Path

    def to_request(self) -> dict[str, str]:
        """Return the runner's form."""
        return {"key": self.key, "path": str(self.path)}


@dataclass
class Predictions:
    """Counts over a labelled or unlabelled set.

    Attributes:
        num_samples: images run.
        top1, top5: fraction right by key; None without labels.
        agreement: fraction of images (or pixels) with the same class as the reference file, by key.
        changed: (lost, gained) by key: images that the reference has right and the file wrong, and the
            reverse; none without labels of images.
        environment: of the runner.
    """

    num_samples: int = 0
    top1: dict[str, float | None] = field(default_factory=dict)
    top5: dict[str, float | None] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count_changed(self, right: Mapping[str, npt.NDArray[np.bool_]], reference: str) -> None:
        """Add what files have right, bool (n,) by key, to `changed`."""
        for key, own in right.items():
            lost, gained = self.changed.get(key, (0, 0))
            before = right[reference]
            self.changed[key] = (lost + int((before & ~own).sum()), gained + int((own & ~before).sum()))


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is deleted afterwards, also on Ctrl-C.

    Raises:
        OutputError: if there is no room for temporary files; it says where they go.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="edgecnn-") as name:
            yield Path(name)
    except (OSError, OutputError, RunnerError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, RunnerError) and os.strerror(errno.ENOSPC) in error.message:
            reason = os.strerror(errno.ENOSPC)  # the runner writes its results into such a folder
        elif isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            reason = cause.strerror or str(cause)
        else:
            raise
        raise OutputError(
            f"cannot write temporary files in {tempfile.gettempdir()}: {reason}",
            hint="free some space there, or set TMPDIR to a directory that has more",
        ) from error


def read_images(dataset: Dataset, indices: Sequence[int]) -> tuple[Array, list[int]]:
    """Return (float32 (m, c, h, w), the m <= n indices of the images that can be read).

    Raises:
        DataError: if too many of them cannot.
    """
    if isinstance(dataset, SkippingDataset):
        return dataset.readable_inputs(indices)
    return dataset.inputs(indices), list(indices)


def _save(path: Path, array: Array) -> None:
    """Write an array as .npy, all of it or an OSError that says why (np.save's does not)."""
    writer = NpyWriter(path, len(array))
    try:
        writer.append(array)
        writer.close()
    finally:
        writer.discard()


def run_outputs(
    candidates: Sequence[Candidate], inputs: Array, threads: int = 1, run: Run = run_local
) -> dict[str, dict[str, Array]]:
    """Return every output of every file.

    Args:
        candidates: the files.
        inputs: float32 (n, c, h, w).
        threads: inside an operator.
        run: where they run.

    Returns:
        key -> output name -> float32, batch first, 4-D ones in NCHW order.

    Raises:
        RunnerError: if a runtime cannot load or run a file.
    """
    with temporary_folder() as folder:
        path = folder / "inputs.npy"
        _save(path, np.asarray(inputs, np.float32))
        request = {
            "task": "outputs",
            "artifacts": [c.to_request() for c in candidates],
            "inputs": str(path),
            "outputs": str(folder / "outputs"),
            "threads": threads,
        }
        result = run(request, TIMEOUT_S)
        return {
            key: {o["name"]: np.load(folder / "outputs" / o["array"]) for o in entry["outputs"]}
            for key, entry in result["artifacts"].items()
        }


def predict(
    candidates: Sequence[Candidate],
    dataset: Dataset,
    indices: Sequence[int],
    reference: str,
    progress: Progress,
    threads: int = 1,
    per_pixel: bool = False,
) -> Predictions:
    """Run every file over a data set and count right answers and agreement with the reference file.

    Args:
        candidates: the files.
        dataset: labels are used where it has them.
        indices: which images.
        reference: key of the file whose answers the others are compared with.
        progress: told about every chunk.
        threads: inside an operator.
        per_pixel: the network classifies pixels, for which labels of images say nothing.
    """
    total = Predictions()
    labels = None if per_pixel else dataset.labels
    sums: dict[str, dict[str, list[tuple[float, int]]]] = {"top1": {}, "top5": {}, "agreement": {}}
    progress.start("agreement with float" if labels is None else "accuracy", len(indices))
    for chunk in _chunks(dataset, indices):
        with temporary_folder() as folder:
            kept = write_inputs(folder / "inputs.npy", dataset, chunk)
            request: dict[str, Any] = {
                "task": "predictions",
                "artifacts": [c.to_request() for c in candidates],
                "inputs": str(folder / "inputs.npy"),
                "reference": reference,
                "threads": threads,
            }
            if labels is not None:
                _save(folder / "labels.npy", labels[kept])
                request["labels"] = str(folder / "labels.npy")
            result = run_local(request, TIMEOUT_S)
        total.num_samples += len(kept)
        total.environment = result["environment"]
        if labels is not None:
            classes = {key: entry["predictions"] for key, entry in result["artifacts"].items()}
            if all(found is not None for found in classes.values()):
                right = {key: np.asarray(found) == labels[kept] for key, found in classes.items()}
                total.count_changed(right, reference)
        for key, entry in result["artifacts"].items():
            for figure, values in sums.items():
                if entry[figure] is not None:
                    values.setdefault(key, []).append((entry[figure], len(kept)))
        progress.advance(len(chunk))
    progress.finish()
    keys = [c.key for c in candidates]
    total.top1, total.top5, total.agreement = (
        {key: _weighted(sums[figure].get(key, [])) for key in keys}
        for figure in ("top1", "top5", "agreement")
    )
    return total


def _weighted(parts: list[tuple[float, int]]) -> float | None:
    count = sum(n for _, n in parts)
    return sum(value * n for value, n in parts) / count if count else None


def _chunks(dataset: Dataset, indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield indices whose inputs fit into CHUNK_BYTES."""
    size = int(read_images(dataset, indices[:1])[0].nbytes)
    step = max(1, CHUNK_BYTES // max(size, 1))
    for start in range(0, len(indices), step):
        yield indices[start : start + step]


def write_inputs(path: Path, dataset: Dataset, indices: Sequence[int]) -> list[int]:
    """Write images as one .npy of float32 (n, c, h, w), a batch at a time; return which could be read."""
    writer = NpyWriter(path, len(indices))
    kept: list[int] = []
    try:
        for start in range(0, len(indices), BATCH_SIZE):
            batch, read = read_images(dataset, indices[start : start + BATCH_SIZE])
            kept += read
            writer.append(batch)
        if len(kept) == len(indices):
            writer.close()
    finally:
        writer.discard()
    return kept if len(kept) == len(indices) else write_inputs(path, dataset, kept)


def measure_latency(
    candidates: Sequence[Candidate], inputs: Array, threads: int, progress: Progress, run: Run = run_local
) -> dict[str, Any]:
    """Time float and compressed files interleaved, one process per runtime, batch 1; `run` says where.

    Returns:
        "artifacts": key -> the runner's summary; "speedup": file -> the runner's comparison with float;
        "environment" of the last process; "warnings".
    """
    merged: dict[str, Any] = {"artifacts": {}, "speedup": {}, "environment": {}, "warnings": []}
    pairs = [("float_onnx", "onnx"), ("float_tflite", "tflite")]
    by_key: Mapping[str, Candidate] = {c.key: c for c in candidates}
    with temporary_folder() as folder:
        path = folder / "inputs.npy"
        _save(path, np.asarray(inputs[:1], np.float32))
        for pair in pairs:
            if any(key not in by_key for key in pair):
                continue
            progress.start(f"latency of {pair[1]} against float", None)
            request = {
                "task": "latency",
                "artifacts": [by_key[key].to_request() for key in pair],
                "inputs": str(path),
                "threads": threads,
                "min_runs": 64,
                "min_seconds": 1.0,
                "max_seconds": 20.0,
                "baseline": pair[0],
            }
            result = run(request, TIMEOUT_S)
            progress.finish()
            merged["artifacts"].update(result["artifacts"])
            merged["speedup"][pair[1]] = result["comparisons"][pair[1]]
            merged["environment"] = result["environment"]
            merged["warnings"] += [
                f"{key}: {warning}"
                for key, entry in result["artifacts"].items()
                for warning in [*entry.get("warnings", []), *entry.get("taints", [])]
            ]
    return merged
