"""From what a run measured to its Report."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from edgecnn import __version__
from edgecnn.artifact import Artifact
from edgecnn.graph.cost import LayerCost
from edgecnn.model import Model
from edgecnn.report.islands import FLOAT_ISLANDS, float_islands_text
from edgecnn.report.results import (
    AccuracyFigures,
    ArtifactFigures,
    DataFigures,
    LatencyFigures,
    LatencyReport,
    ModelFigures,
    ParityFigures,
    Report,
    SizeFigures,
    SpeedupFigures,
)
from edgecnn.report.sampling import drop_error
from edgecnn.report.schema import to_values
from edgecnn.runner.environment import describe_environment

MIN_JUDGED, CHANCE_FACTOR = 50, 2.0
"""Fewer images say nothing about guessing; a network worth compressing is more than twice as good."""

FILES = ("float_onnx", "onnx", "float_tflite", "tflite")


@dataclass
class ReportParts:
    """Everything a report is made from, filled in as the run goes.

    Attributes:
        float_model: the network as it was loaded.
        compressed: the network after the passes.
        recipe: name.
        seed: of the run.
        target: device profile.
        parity: `edgecnn.proof.Parity`.
        predictions: `edgecnn.proof.Predictions`, None for a network that does not classify.
        latency: what `edgecnn.proof.measure_latency` gave, None if it was not asked for.
        files, float_files: bytes by format.
        is_local: whether latency is of the target: it is this machine, or it was reached.
        costs, costs_after: of the network as it was loaded, and after the passes that prune and train.
        details: what passes recorded for the report.
    """

    float_model: Model
    compressed: Model
    recipe: str
    seed: int
    target: str
    costs: list[LayerCost] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    float_files: dict[str, bytes] = field(default_factory=dict)
    float_islands: list[str] = field(default_factory=list)
    parity: Any = None
    predictions: Any = None
    latency: dict[str, Any] | None = None
    threads: int = 1
    data_source: str = ""
    synthetic: bool = False
    num_calibration: int = 0
    num_proof: int = 0
    held_out: bool = False
    is_local: bool = True
    costs_after: list[LayerCost] = field(default_factory=list)
    params_after: int | None = None
    train_source: str | None = None
    num_train: int = 0
    num_validation: int = 0
    details: tuple[dict[str, Any], ...] = ()
    recipe_toml: str = ""
    data_warnings: tuple[str, ...] = ()
    work_seconds: float = 0.0
    proof_seconds: float = 0.0


def build_report(parts: ReportParts) -> Report:
    """Return the report of a run."""
    latency = _latency(parts)
    return Report(
        model=_model(parts),
        recipe=parts.recipe,
        seed=parts.seed,
        target=parts.target,
        environment=_environment(parts),
        passes=parts.compressed.history,
        artifacts={
            n: ArtifactFigures(str(a.path), a.sha256, a.size_bytes) for n, a in parts.artifacts.items()
        },
        sizes={n: _sizes(parts.float_files[n], parts.files[n]) for n in parts.files},
        data=DataFigures(
            parts.data_source,
            parts.synthetic,
            parts.num_calibration,
            parts.num_proof,
            parts.held_out,
            to_values(parts.float_model.spec.preprocess),
            parts.train_source,
            parts.num_train,
            parts.num_validation,
        ),
        parity={
            name: ParityFigures(
                c.max_lsb, c.fraction_within_1_lsb, c.top1_agreement, c.num_samples, c.max_relative_error
            )
            for name, c in parts.parity.comparisons.items()
        },
        agreement={n: parts.predictions.agreement[n] if parts.predictions else None for n in parts.files},
        sqnr_db=dict(parts.parity.sqnr_db),
        accuracy=_accuracy(parts),
        latency=latency,
        timings={"work_seconds": parts.work_seconds, "proof_seconds": parts.proof_seconds},
        warnings=_warnings(parts, latency),
        details=tuple(_finite(detail) for detail in parts.details),
        recipe_toml=parts.recipe_toml,
    )


def _model(parts: ReportParts) -> ModelFigures:
    """Return what the network costs as it was given, and after the passes that prune it."""
    given = parts.float_model
    parameters = _parameters(given)
    return ModelFigures(
        name=given.spec.name,
        params=sum(p.numel() for p in parameters),
        macs=sum(cost.macs for cost in parts.costs),
        size_bytes=sum(p.numel() * p.element_size() for p in parameters),
        task=given.spec.task,
        params_after=parts.params_after,
        macs_after=sum(cost.macs for cost in parts.costs_after) if parts.costs_after else None,
    )


def _parameters(model: Model) -> list[torch.nn.Parameter]:
    """Return every parameter once."""
    return list({id(p): p for p in model.graph.parameters()}.values())


def _finite(value: Any) -> Any:
    """Return a detail with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment(parts: ReportParts) -> dict[str, Any]:
    """Return the newest description the runner gave, with the version of every runtime and of the makers."""
    found: dict[str, Any] = {}
    for source in (
        parts.predictions and parts.predictions.environment,
        (parts.latency or {}).get("environment"),
    ):
        if source:
            runtimes = {**found.get("runtimes", {}), **source.get("runtimes", {})}
            found = {**source, "runtimes": runtimes}
    return {"edgecnn": __version__, "torch": torch.__version__, **(found or describe_environment())}


def _sizes(float_bytes: bytes, data: bytes) -> SizeFigures:
    return SizeFigures(
        len(float_bytes),
        len(data),
        len(gzip.compress(float_bytes, compresslevel=1)),
        len(gzip.compress(data, compresslevel=1)),
    )


def _accuracy(parts: ReportParts) -> AccuracyFigures | None:
    """Return top-1 figures; None without labels."""
    if parts.predictions is None:
        return None
    top1 = parts.predictions.top1
    floats = [top1.get(f"float_{n}") for n in parts.files]
    found = [top1.get(n) for n in parts.files]
    if not floats or floats[0] is None or any(value is None for value in found):
        return None
    worst = min(parts.files, key=lambda name: top1[name])
    drop, total = 100.0 * (floats[0] - top1[worst]), parts.predictions.num_samples
    changed = parts.predictions.changed.get(worst)
    error = None if changed is None else drop_error(changed[0], changed[1], total)
    return AccuracyFigures(floats[0], top1.get("onnx"), top1.get("tflite"), drop, total, error)


def _latency(parts: ReportParts) -> LatencyReport | None:
    if parts.latency is None:
        return None
    entries = parts.latency["artifacts"]
    figures = {
        key: LatencyFigures(e["median_ms"], e["p90_ms"], e["p99_ms"], parts.threads, e["num_samples"])
        for key, e in entries.items()
    }
    speedup = speedup_figures(parts.latency)
    return LatencyReport(**{name: figures.get(name) for name in FILES}, speedup=speedup)


def speedup_figures(latency: dict[str, Any]) -> dict[str, SpeedupFigures]:
    """Return each file's comparison with float, out of what `edgecnn.proof.measure_latency` gave."""
    return {
        name: SpeedupFigures(comparison["speedup"], *comparison["interval"])
        for name, comparison in latency["speedup"].items()
        if comparison["interval"] is not None
    }


def _warnings(parts: ReportParts, latency: LatencyReport | None) -> tuple[str, ...]:
    """Return all that the user should know, each once, in the order it came up."""
    found = [*parts.compressed.warnings, *parts.data_warnings, *parts.parity.warnings]
    found += chance_warnings(_accuracy(parts), parts.float_model.spec.outputs[0].shape[1:2])
    found += [
        f"{float_islands_text(detail)}; they compute in float, which int8 does not speed up"
        for detail in parts.details
        if detail.get("kind") == FLOAT_ISLANDS
    ]
    if parts.float_islands:
        first = ", ".join(parts.float_islands[:3])
        found.append(f"{len(parts.float_islands)} operators are left in float, first {first}")
    if latency is not None:
        on_target = parts.is_local and any(key.endswith("_on_target") for key in parts.parity.comparisons)
        where = parts.target if on_target else "this machine"
        if not parts.is_local:
            found.append(
                f"latency was measured on this machine, not on {parts.target}, for which the files are made"
            )
        found += [
            f"the {name} file is slower than float on {where}, {1 / figures.ratio:.2f} times its latency"
            for name, figures in latency.speedup.items()
            if figures.verdict == "slower" and not (parts.latency or {})["environment"].get("emulated")
        ]
        found += _timing_warnings(parts.latency or {})
    return tuple(dict.fromkeys(found))


def chance_warnings(accuracy: AccuracyFigures | None, shape: tuple[int | None, ...]) -> list[str]:
    """Return a warning where the float network itself hardly beats guessing, which nothing here can cause.

    Args:
        accuracy: of the run, or None.
        shape: (classes,) of the network's output.

    Example:
        >>> found = chance_warnings(AccuracyFigures(0.002, 0.002, None, 0.0, 400), (1000,))
        >>> found[0][:44]
        'float itself has a top-1 of 0.20 %, about as'
    """
    classes = shape[0] if shape else None
    if accuracy is None or not classes or accuracy.num_samples < MIN_JUDGED:
        return []
    if accuracy.float_top1 > CHANCE_FACTOR / classes:
        return []
    guessing = f"float itself has a top-1 of {100 * accuracy.float_top1:.2f} %, about as good as guessing"
    check = "check --mean, --std and --channel-order against the network's training, and the order of labels"
    return [f"{guessing} among {classes} classes: {check}"]


def _timing_warnings(latency: dict[str, Any]) -> list[str]:
    """Return what disturbed the timing; other work on the CPU is said once for all files."""
    found = list(latency.get("warnings", []))
    shared = [text for text in found if "shared CPU" in text]
    rest = [text for text in found if text not in shared]
    if shared:
        first = shared[0].split("shared CPU: ", 1)[-1]
        rest.append(f"other work shared the CPU during the timing ({first}): trust the ratios, not the times")
    return rest
