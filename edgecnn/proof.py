"""The proof: every file opened in its real runtime, against the integer reference and against float.

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

from edgecnn.data import Dataset
from edgecnn.data.dataset import SkippingDataset
from edgecnn.devices.local import Run, run_local
from edgecnn.errors import OutputError, ParityError, RunnerError
from edgecnn.export.parity import (
    Comparison,
    compare,
    first_difference,
    output_scales,
    sqnr_db,
    traced_outputs,
    worst_images,
)
from edgecnn.export.trace import trace_onnx, trace_tflite
from edgecnn.graph.program import Array, Program
from edgecnn.pipeline import Progress
from edgecnn.quantize.reference import run_op, run_program
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
        environment: of the runner.
    """

    num_samples: int = 0
    top1: dict[str, float | None] = field(default_factory=dict)
    top5: dict[str, float | None] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


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


def run_reference(program: Program, inputs: Array, progress: Progress) -> dict[str, Array]:
    """Return the outputs of the NumPy integer reference, as float32.

    Args:
        program: quantized, with one input.
        inputs: float32 (n, c, h, w).
        progress: told about every few images.
    """
    pieces: list[dict[str, Array]] = []
    batch = max(1, min(16, (1 << 20) // max(int(np.prod(inputs.shape[1:])), 1)))
    progress.start("integer reference", len(inputs))
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        pieces.append(run_program(program, {program.inputs[0]: chunk}))
        progress.advance(len(chunk))
    progress.finish()
    return {name: np.concatenate([p[name] for p in pieces]) for name, _ in program.outputs}


@dataclass(frozen=True)
class Parity:
    """What `prove_parity` found.

    Attributes:
        comparisons: "onnx_vs_reference", "tflite_vs_reference", "onnx_vs_tflite", as far as files were made.
        sqnr_db: by file, against float.
        warnings: rounding that added up, in words.
    """

    comparisons: dict[str, Comparison]
    sqnr_db: dict[str, float | None]
    warnings: tuple[str, ...]


def prove_parity(
    program: Program,
    candidates: Sequence[Candidate],
    inputs: Array,
    activation_dtype: str,
    progress: Progress,
) -> Parity:
    """Run the files and the reference on the same images and compare their integers.

    Args:
        program: what the compressed files were made from.
        candidates: compressed files, and the float ones for the SQNR.
        inputs: float32 (n, c, h, w), held out from calibration where possible.
        activation_dtype: of the ONNX file.
        progress: told how far it is.

    Raises:
        ParityError: naming the first operator that computes something else.
        RunnerError: if a runtime cannot load or run a file.
    """
    progress.start("run the files in their runtimes", None)
    outputs = run_outputs(candidates, inputs)
    progress.finish()
    reference = run_reference(program, inputs, progress)
    scales = output_scales(program)
    files = [c.key for c in candidates if not c.key.startswith("float_")]
    comparisons = {f"{key}_vs_reference": compare(reference, outputs[key], scales) for key in files}
    if len(files) == 2:
        comparisons["onnx_vs_tflite"] = compare(outputs["onnx"], outputs["tflite"], scales)
    warnings = []
    for key in files:
        found = comparisons[f"{key}_vs_reference"]
        if not found.holds:
            worst = worst_images(reference, outputs[key], scales, 2)
            given = {name: values[worst] for name, values in outputs[key].items()}
            warnings.append(_examine(program, key, inputs[worst], given, activation_dtype, found))
    floats = next((outputs[c.key] for c in candidates if c.key.startswith("float_")), None)
    main = program.outputs[0][0]
    sqnr = {key: None if floats is None else sqnr_db(floats[main], outputs[key][main]) for key in files}
    return Parity(comparisons, sqnr, tuple(warnings))


def _examine(
    program: Program,
    key: str,
    inputs: Array,
    given: Mapping[str, Array],
    activation_dtype: str,
    found: Comparison,
) -> str:
    """Find the operator that differs, or return the warning that rounding added up.

    `given` are the file's outputs for `inputs`; a trace that leads elsewhere explains nothing.
    """
    feeds = {program.inputs[0]: inputs}
    onnx = key == "onnx"
    traced = trace_onnx(program, feeds, activation_dtype) if onnx else trace_tflite(program, feeds)
    difference = first_difference(program, traced, feeds, run_op)
    runtime = "onnxruntime" if onnx else "LiteRT"
    figures = f"up to {found.max_lsb} LSB, {100 * found.fraction_within_1_lsb:.2f} % within 1 LSB"
    if difference is not None:
        op = difference.op
        raise ParityError(
            f"the {key} file does not compute the contract's integers in {runtime} ({figures}); the first "
            f"operator that differs is {op.layer}, {op.kind}: {difference.max_lsb} LSB off",
            hint=f"nothing was written; please report this with the version of {runtime}",
        )
    again = traced_outputs(program, traced)
    scales = {name: scale for name, scale in output_scales(program).items() if name in again}
    if scales and not compare(again, given, scales).holds:
        raise ParityError(
            f"the {key} file does not compute in {runtime} what its operators compute one by one ({figures})",
            hint=f"nothing was written; please report this with the version of {runtime}",
        )
    return (
        f"{key}: every operator is within 1 LSB of the reference, but differences of one step add up along "
        f"the network ({figures})"
    )


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
