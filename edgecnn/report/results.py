"""The Report: everything one run found out, as `report.json` (schema_version 1) holds it.

Figures that were not measured are None, never invented: accuracy without labels, a percentile of too few
runs, top-1 agreement of a network that does not classify. Keys of `parity` are "onnx_vs_reference",
"tflite_vs_reference" and "onnx_vs_tflite", and "onnx_on_target" and "tflite_on_target" of a device that was
reached; keys of every other dict by file are "onnx" and "tflite".
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from edgecnn.errors import DataError
from edgecnn.model import PassRecord
from edgecnn.report.schema import from_values, to_values

SCHEMA_VERSION = 1

MIN_DIFFERENCE = 0.01
"""A ratio of latencies nearer to 1 than this helps or harms nobody, however sure it is."""


@dataclass(frozen=True)
class ModelFigures:
    """The float network that was given, and how much of it pruning left.

    Attributes:
        name: of the network.
        params: number of parameters.
        macs: multiply-accumulates of one image (1 MAC = 2 FLOPs).
        size_bytes: of its parameters and buffers in float32.
        task: "classification", "segmentation" or "other".
        params_after, macs_after: after the passes that prune and train, None if there were none.
    """

    name: str
    params: int
    macs: int
    size_bytes: int
    task: str = "classification"
    params_after: int | None = None
    macs_after: int | None = None


@dataclass(frozen=True)
class ArtifactFigures:
    """A file that was written."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class SizeFigures:
    """Bytes of a file and of the float file of the same format, as they are and through gzip."""

    float_size_bytes: int
    size_bytes: int
    float_gzip_bytes: int | None = None
    gzip_bytes: int | None = None


@dataclass(frozen=True)
class DataFigures:
    """What the run calibrated on and proved with.

    Attributes:
        source: as the user named it, or "batch_norm statistics" or "noise".
        synthetic: whether the images were made up, for want of data.
        num_calibration: images the scales come from; 0 where nothing is calibrated.
        num_proof: images of parity, SQNR and agreement.
        held_out: whether the proof's images are none of the calibration's.
        preprocess: how pixels became the network's input, as `Preprocess.to_dict` gives it.
        train_source: where the images to train on come from, or None.
        num_train: images trained on.
        num_validation: images that followed the training.
    """

    source: str
    synthetic: bool
    num_calibration: int
    num_proof: int
    held_out: bool
    preprocess: dict[str, Any] | None = None
    train_source: str | None = None
    num_train: int = 0
    num_validation: int = 0


@dataclass(frozen=True)
class ParityFigures:
    """How far two executions of the same integers are apart.

    Attributes:
        max_lsb: largest difference of an output, in steps of the output's scale.
        fraction_within_1_lsb: of all output values, in [0, 1].
        top1_agreement: fraction of samples with the same first class, or None.
        num_samples: images compared.
        max_relative_error: of files in float, whose steps mean nothing: largest difference of an output as
            a fraction of its largest value; None for integers.
    """

    max_lsb: int
    fraction_within_1_lsb: float
    top1_agreement: float | None
    num_samples: int
    max_relative_error: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_fraction("fraction_within_1_lsb", self.fraction_within_1_lsb)
        _check_fraction("top1_agreement", self.top1_agreement)


@dataclass(frozen=True)
class AccuracyFigures:
    """Top-1 accuracy as fractions in [0, 1]; the JSON keys are "float", "onnx", "tflite".

    Attributes:
        float_top1: of the float network.
        onnx_top1: of the ONNX file, or None if it was not made.
        tflite_top1: of the TFLite file, or None if it was not made.
        drop_points: float minus the worse file, in percentage points.
        num_samples: labelled images.
        drop_error_points: standard error of the drop, from the images on which float and file differ in
            being right; None where that is not known.
    """

    float_top1: float = field(metadata={"key": "float"})
    onnx_top1: float | None = field(metadata={"key": "onnx"})
    tflite_top1: float | None = field(metadata={"key": "tflite"})
    drop_points: float
    num_samples: int
    drop_error_points: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (
            ("float", self.float_top1),
            ("onnx", self.onnx_top1),
            ("tflite", self.tflite_top1),
        ):
            _check_fraction(name, value)

    def top1(self, file: str) -> float | None:
        """Return the accuracy of "onnx" or "tflite"."""
        return self.onnx_top1 if file == "onnx" else self.tflite_top1


@dataclass(frozen=True)
class LatencyFigures:
    """Latency of one image in one runtime; a percentile is None below the samples it needs."""

    median_ms: float
    p90_ms: float | None
    p99_ms: float | None
    threads: int
    num_runs: int | None = None


@dataclass(frozen=True)
class SpeedupFigures:
    """Float's median latency over the file's, with its 95 % confidence interval.

    Example:
        >>> SpeedupFigures(1.84, 1.71, 1.93).verdict, SpeedupFigures(1.01, 0.97, 1.04).verdict
        ('faster', 'no difference')
    """

    ratio: float
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the order."""
        if not 0 < self.low <= self.high:
            raise ValueError(f"the interval is [{self.low}, {self.high}], expected 0 < low <= high")

    @property
    def verdict(self) -> str:
        """One of "faster", "slower" and, when the interval includes 1 or it is under 1 %, "no difference"."""
        if self.low <= 1 <= self.high or abs(self.ratio - 1) < MIN_DIFFERENCE:
            return "no difference"
        return "faster" if self.ratio > 1 else "slower"


@dataclass(frozen=True)
class LatencyReport:
    """Float and compressed files, timed interleaved in one run; None where a file was not made."""

    float_onnx: LatencyFigures | None = None
    onnx: LatencyFigures | None = None
    float_tflite: LatencyFigures | None = None
    tflite: LatencyFigures | None = None
    speedup: dict[str, SpeedupFigures] = field(default_factory=dict)

    def of(self, file: str) -> LatencyFigures | None:
        """Return the figures of "float_onnx", "onnx", "float_tflite" or "tflite"."""
        figures: LatencyFigures | None = getattr(self, file)
        return figures


@dataclass(frozen=True)
class Report:
    """Everything one run found out.

    Attributes:
        model: the float network.
        recipe: name of the recipe.
        seed: of the run.
        target: name of the device profile the files are made for.
        environment: versions and machine, JSON-ready.
        passes: what each pass did.
        artifacts: the files, by format.
        sizes: against float, by format.
        data: what it was calibrated on and proved with.
        parity: the same integers? By pair.
        agreement: fraction of samples with the first class of float, by format; None without classes.
        sqnr_db: signal to quantization noise of the output against float, by format; None if not measured.
        accuracy: None without labels.
        latency: None if not measured.
        timings: "work_seconds" (load, passes, export) and "proof_seconds" (parity, accuracy, latency).
        warnings: what the user should know.
        details: what passes recorded, each with the keys "pass" and "kind": "pruning" (groups, widths),
            "training_curves" (loss and accuracy by epoch), "quantize_aware_training" (how far step sizes
            moved), "kernels" (int8 instructions of the target), "saturation" (what x86 without VNNI would
            make of the ONNX file), "float_layers" (of an int8 network: as asked, and the operators that
            follow from it), "float_islands" (operators without an int8 form and those beside them: why, how
            many pieces, what they cost), "search" (what else was tried).
        recipe_toml: the recipe with every parameter, as `Recipe.from_toml` reads it.
        schema_version: of this format.
    """

    model: ModelFigures
    recipe: str
    seed: int
    target: str
    environment: dict[str, Any]
    passes: tuple[PassRecord, ...]
    artifacts: dict[str, ArtifactFigures]
    sizes: dict[str, SizeFigures]
    data: DataFigures
    parity: dict[str, ParityFigures]
    agreement: dict[str, float | None]
    sqnr_db: dict[str, float | None]
    accuracy: AccuracyFigures | None
    latency: LatencyReport | None
    timings: dict[str, float]
    warnings: tuple[str, ...] = ()
    details: tuple[dict[str, Any], ...] = ()
    recipe_toml: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the text of report.json.

        Raises:
            DataError: if a figure is not finite.
        """
        values = to_values(self)
        ordered = {"schema_version": values.pop("schema_version"), **values}
        return json.dumps(ordered, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report back.

        Raises:
            DataError: if it is not JSON, of another schema, or has a field missing or out of range.
        """
        try:
            values = json.loads(text, parse_constant=_reject_constant)
        except ValueError as error:
            raise DataError(
                f"report: not valid JSON: {error}", hint="it may have been cut short; run again"
            ) from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            message = f"report: schema_version is {version!r}, expected {SCHEMA_VERSION}"
            raise DataError(message, hint="read it with the edgecnn that wrote it, or run again")
        return from_values(cls, values)


def _check_fraction(name: str, value: float | None) -> None:
    """Raise ValueError unless `value` is None or in [0, 1]."""
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, expected 0 <= {name} <= 1")


def _reject_constant(text: str) -> float:
    """Refuse NaN and infinity, which JSON does not have."""
    raise ValueError(f"{text} is no JSON number")
