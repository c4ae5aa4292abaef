"""What a compressed network is held against: the integer reference, and the float files of the original."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.artifact import Artifact, sha256_hex, write_artifact
from edgecnn.contract import prove_parity
from edgecnn.devices.profile import Device
from edgecnn.export.files import SUFFIXES, FileOptions, ModelFile, write_model
from edgecnn.export.parity import output_scales
from edgecnn.graph.program import Array, Program
from edgecnn.images import Images
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.proof import Candidate, measure_latency, predict, read_images, temporary_folder
from edgecnn.report.build import ReportParts
from edgecnn.saturation import foresee_saturation
from edgecnn.target import OnTarget, measure_on_target


@dataclass(frozen=True)
class Made:
    """What came out of the passes, before any of it is proven.

    Attributes:
        loaded: the network as it was given; "float" in every figure.
        compressed: the network after the passes.
        trained: the network after the last pass that prunes or trains, still float; None if there was none.
        images: what it was made with and is judged on.
        program, float_program: of `compressed` and of `loaded`.
        files: the compressed ones, by format.
        activation_dtype: of the ONNX file.
        device: which the files are made for.
    """

    loaded: Model
    compressed: Model
    trained: Model | None
    images: Images
    program: Program
    float_program: Program
    files: dict[str, ModelFile]
    activation_dtype: str
    device: Device


@dataclass(frozen=True)
class Timing:
    """How latency is measured."""

    threads: int = 1
    measure: bool = True


def make_artifact(file: ModelFile, folder: Path, model: Model, recipe: str) -> Artifact:
    """Return the artifact that a file becomes in a folder."""
    return Artifact(
        path=folder / f"model{SUFFIXES[file.format]}",
        format=file.format,
        spec=model.spec,
        sha256=sha256_hex(file.data),
        size_bytes=len(file.data),
        recipe=recipe,
        history=model.history,
        inputs=file.inputs,
        outputs=file.outputs,
    )


def stage_file(file: ModelFile, folder: Path, model: Model, recipe: str) -> Path:
    """Write a file and its sidecar where the runner can open them, and return the file's path."""
    artifact = make_artifact(file, folder, model, recipe)
    write_artifact(artifact, file.data)
    return artifact.path


def float_file(made: Made, format: str) -> ModelFile:  # noqa: A002
    """Return the uncompressed network as the same target reads it."""
    options = FileOptions(max_opset=made.device.max_opset)
    return write_model(made.float_program, format, made.loaded.spec, options)


def judge(parts: ReportParts, made: Made, timing: Timing, progress: Progress) -> None:
    """Fill in parity, accuracy, agreement, latency and the sizes.

    Raises:
        ParityError: if a file does not compute what it should.
        RunnerError: if a runtime cannot load or run a file.
    """
    started = time.perf_counter()
    dataset, split, spec = made.images.dataset, made.images.split, made.loaded.spec
    _, *image_shape = spec.inputs[0].shape
    num_proof = int(np.clip((1 << 22) // math.prod(size or 1 for size in image_shape), 16, 256))
    inputs, proof_indices = read_images(dataset, split.held_out[:num_proof])
    floats = {f: float_file(made, f) for f in made.files}
    with temporary_folder() as staging:
        candidates = _stage(staging, made, floats, parts.recipe)
        parts.parity = prove_parity(made.program, candidates, inputs, made.activation_dtype, progress)
        if spec.task in ("classification", "segmentation"):
            reference, per_pixel = f"float_{next(iter(made.files))}", spec.task == "segmentation"
            judged = [c for c in candidates if c.key == reference or not c.key.startswith("float_")]
            parts.predictions = predict(
                judged, dataset, split.held_out, reference, progress, per_pixel=per_pixel
            )
        if "onnx" in made.files and made.activation_dtype == "uint8":
            foreseen = foresee_saturation(made.program, inputs)
            parts.details += () if foreseen is None else (foreseen.to_dict(),)
        if timing.measure:
            _time(parts, made, candidates, inputs, timing.threads, progress)
    parts.float_files = {f: file.data for f, file in floats.items()}
    parts.files = {f: file.data for f, file in made.files.items()}
    parts.threads = timing.threads
    _describe_images(parts, made.images)
    parts.num_proof = len(inputs)
    parts.held_out = not set(split.calibration) & set(proof_indices)
    parts.proof_seconds = time.perf_counter() - started


def _describe_images(parts: ReportParts, images: Images) -> None:
    """Fill in where the images come from, and what the user should know about them."""
    dataset, train = images.dataset, images.train
    parts.data_source, parts.synthetic = dataset.name, images.synthetic
    parts.num_calibration = len(images.split.calibration)
    parts.data_warnings = (*dataset.warnings, *images.split.warnings)
    if train is not None:
        parts.train_source, parts.num_train = train.dataset.name, len(train.indices)
        parts.num_validation = len(train.validation)
        parts.data_warnings += tuple(train.dataset.warnings)


def _stage(folder: Path, made: Made, floats: dict[str, ModelFile], recipe: str) -> list[Candidate]:
    """Write compressed and float files where the runner can open them."""
    candidates = []
    for prefix, group in (("", made.files), ("float_", floats)):
        for name, file in group.items():
            path = stage_file(file, folder / (prefix or "compressed"), made.compressed, recipe)
            candidates.append(Candidate(f"{prefix}{name}", path))
    return candidates


def _time(
    parts: ReportParts,
    made: Made,
    candidates: Sequence[Candidate],
    inputs: Array,
    threads: int,
    progress: Progress,
) -> None:
    """Fill in latency, of the target where it can be reached, else of this machine."""
    target, parts.latency = time_files(made, candidates, inputs, threads, progress)
    parts.parity = dataclasses.replace(
        parts.parity,
        comparisons={**parts.parity.comparisons, **target.comparisons},
        warnings=(*parts.parity.warnings, *target.warnings),
    )
    parts.is_local = parts.is_local or target.latency is not None


def time_files(
    made: Made, candidates: Sequence[Candidate], inputs: Array, threads: int, progress: Progress
) -> tuple[OnTarget, dict[str, Any]]:
    """Time float and compressed files, on the target where it can be reached, else on this machine.

    Returns:
        What the target said, and the latency as `edgecnn.proof.measure_latency` gives it.
    """
    scales = output_scales(made.program)
    target = measure_on_target(made.device, candidates, inputs, scales, threads, progress)
    return target, target.latency or measure_latency(candidates, inputs, threads, progress)
