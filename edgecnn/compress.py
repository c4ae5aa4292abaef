"""The sentence `edgecnn compress`: load -> passes -> both files -> proof -> report.

Nothing is written before all of it has succeeded; then every file of the run appears at once.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.artifact import (
    Artifact,
    check_output_directory,
    publish_files,
    sha256_hex,
    write_artifact,
)
from edgecnn.devices.capability import activation_dtype_for, weight_bits_for
from edgecnn.devices.profile import Device, load_device
from edgecnn.errors import (
    BudgetError,
    ExportError,
    RecipeError,
)
from edgecnn.export.files import FORMATS, SUFFIXES, FileOptions, ModelFile, write_model
from edgecnn.export.parity import output_scales
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.cost import layer_costs
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.program import Array, Program
from edgecnn.images import Images, check_preprocess, choose_images
from edgecnn.load import LoadOptions, load_model, save_pt2
from edgecnn.model import Model
from edgecnn.pipeline import Pass, PassContext, Progress, SilentProgress, run_passes
from edgecnn.preflight import keep_inputs, refuse_quantized, require_packages
from edgecnn.proof import (
    Candidate,
    measure_latency,
    predict,
    prove_parity,
    read_images,
    temporary_folder,
)
from edgecnn.recipe import Recipe
from edgecnn.report import Report
from edgecnn.report.build import ReportParts, budget_misses, build_report
from edgecnn.report.html import render_compress_html
from edgecnn.target import measure_on_target

IO_DTYPES = ("float32", "int8", "uint8")


@dataclass(frozen=True)
class CompressOptions:
    """What `compress` can be told besides the model, the recipe and the data.

    Attributes:
        load: how the model is read.
        formats: "onnx", "tflite" or both.
        io: type of the files' inputs and outputs: float32, int8 or uint8.
        target: device profile the files are made for.
        num_samples: calibration images at most; None leaves it to the recipe.
        max_drop: accuracy budget in percentage points of top-1.
        max_latency_ms: budget on the median of each compressed file.
        max_size_mb: budget on each compressed file, 1 MB = 1,000,000 bytes.
        seed: of everything random; None leaves it to the recipe.
        force: overwrite earlier results.
        threads: of the latency measurement.
        measure: False leaves latency out.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    formats: tuple[str, ...] = FORMATS
    io: str = "float32"
    target: str = "local_cpu"
    num_samples: int | None = None
    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    seed: int | None = None
    force: bool = False
    threads: int = 1
    measure: bool = True

    def check(self) -> None:
        """Check the values.

        Raises:
            ExportError: naming the option, what was found and what was expected.
        """
        wrong = [name for name in self.formats if name not in FORMATS]
        if wrong or not self.formats or isinstance(self.formats, str):
            found = repr(self.formats if isinstance(self.formats, str) or not wrong else wrong[0])
            raise ExportError(f"formats: found {found}, expected one or more of {', '.join(FORMATS)}")
        if self.io not in IO_DTYPES:
            raise ExportError(f"io is {self.io!r}, expected one of {', '.join(IO_DTYPES)}")
        for name in ("threads", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExportError(f"{name} is {value}, expected at least 1")
        for name in ("max_drop", "max_latency_ms", "max_size_mb"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ExportError(f"{name} is {value}, expected a finite number, 0 or more")


@dataclass(frozen=True)
class CompressResult:
    """What `compress` made.

    Attributes:
        artifacts: by format.
        report: every figure.
        model: the compressed graph, to train further.
    """

    artifacts: dict[str, Artifact]
    report: Report
    model: Model


@dataclass(frozen=True)
class _Made:
    """What came out of the work, before any of it is proven."""

    loaded: Model
    compressed: Model
    images: Images
    program: Program
    float_program: Program
    files: dict[str, ModelFile]
    activation_dtype: str
    device: Device


def compress(
    model: Any,
    *,
    recipe: str | Path | Recipe = "static_wi8_ai8",
    data: Any = None,
    out: str | Path = "out",
    options: CompressOptions | None = None,
    progress: Progress | None = None,
) -> CompressResult:
    """Compress a trained network, prove the files and write them.

    Args:
        model: a path, torchvision:NAME, timm:NAME, package.module:factory, an nn.Module, an ExportedProgram
            or a Model.
        recipe: name, file or Recipe.
        data: whatever `edgecnn.data.open_dataset` takes; None makes images up.
        out: directory; gets model.onnx, model.tflite, their sidecars, model.pt2, report.json and report.html.
        options: everything else.
        progress: told how far the work is.

    Returns:
        The artifacts, the report and the compressed model.

    Raises:
        BudgetError: the files are written, but one of the budgets is missed.
        EdgeCNNError: anything else that went wrong; nothing is written.
    """
    options = options or CompressOptions()
    options.check()
    require_packages(options.formats)
    progress = progress or SilentProgress()
    folder = Path(out)
    keep_inputs((model, options.load.weights), folder)
    device = load_device(options.target)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe = recipe if options.seed is None else dataclasses.replace(recipe, seed=options.seed)
    check_output_directory(folder, options.force)
    started = time.perf_counter()
    made = _make(model, recipe, data, device, options, progress)
    artifacts = {f: _artifact(file, folder, made.compressed, recipe.name) for f, file in made.files.items()}
    pt2 = _pt2_bytes(made.compressed)
    progress.finish()

    parts = ReportParts(made.loaded, made.compressed, recipe.name, recipe.seed, device.name)
    parts.work_seconds = time.perf_counter() - started
    parts.is_local = device.transport == "local"
    parts.costs = layer_costs(made.float_program)
    parts.artifacts = artifacts
    parts.float_islands = float_islands(made.program)
    _prove(parts, made, options, progress)
    report = build_report(parts)
    _publish(folder, artifacts, made.files, pt2, report, options.force)
    result = CompressResult(artifacts, report, made.compressed)
    _check_budgets(result, options, folder)
    return result


def _make(
    model: Any, recipe: Recipe, data: Any, device: Device, options: CompressOptions, progress: Progress
) -> _Made:
    """Load the network, run the passes and write the files into memory."""
    progress.start("load and export the graph", None)
    loaded = load_model(model, options.load)
    progress.finish()
    refuse_quantized(loaded)
    passes = _fit_to_target(recipe.passes, device, options.num_samples)
    images = choose_images(loaded, data, _num_samples(passes), recipe.seed, progress)
    loaded = loaded.with_warning(*check_preprocess(loaded, images), *_narrowed(recipe.passes, device))
    context = PassContext(images.dataset, images.split.calibration, recipe.seed, progress)
    compressed = run_passes(loaded, passes, context, _summarize)

    progress.start("write the files", None)
    program = build_program(compressed)
    float_program = build_program(FoldBatchNorm().run(loaded, context))
    dtype = activation_dtype_for(device.isa)
    chosen = FileOptions(options.io, dtype)
    files = {f: write_model(program, f, loaded.spec, chosen) for f in options.formats}
    return _Made(loaded, compressed, images, program, float_program, files, dtype, device)


def _check_budgets(result: CompressResult, options: CompressOptions, folder: Path) -> None:
    """Raise BudgetError if a budget is missed."""
    report = result.report
    misses = budget_misses(report, options.max_drop, options.max_latency_ms, options.max_size_mb)
    if not misses:
        return
    unmeasured = report.accuracy is None and options.max_drop is not None
    raise BudgetError(
        f"budget missed: {'; '.join(misses)} (the files are in {folder} all the same)",
        hint="give labelled images with --data" if unmeasured else "relax it, or try another recipe",
        result=result,
    )


def _fit_to_target(passes: Sequence[Pass], device: Device, num_samples: int | None) -> list[Pass]:
    """Return the passes with the calibration size asked for and weights that the target cannot saturate."""
    fitted: list[Pass] = []
    for step in passes:
        changes: dict[str, Any] = {}
        names = {f.name for f in dataclasses.fields(step)}  # type: ignore[arg-type]
        if "weight_bits" in names:
            changes["weight_bits"] = min(step.weight_bits, weight_bits_for(device.isa))  # type: ignore[attr-defined]
        if "num_samples" in names and num_samples is not None:
            changes["num_samples"] = num_samples
        fitted.append(dataclasses.replace(step, **changes) if changes else step)  # type: ignore[type-var]
    if not fitted:
        raise RecipeError("the recipe has no passes", hint="`edgecnn recipes list` names complete ones")
    return fitted


def _narrowed(passes: Sequence[Pass], device: Device) -> list[str]:
    """Say that weights are narrower than the recipe asks for, where the target makes them so."""
    bits = weight_bits_for(device.isa)
    if all(getattr(step, "weight_bits", bits) <= bits for step in passes):
        return []
    why = f"{device.name} is {device.isa}, whose uint8 * int8 products saturate in pairs"
    return [f"{why}: weights have {bits} bits (a little less accuracy; ARM and x86 with VNNI take 8)"]


def _num_samples(passes: Sequence[Pass]) -> int:
    """Return the most calibration images that a pass asks for."""
    return max((getattr(step, "num_samples", 0) for step in passes), default=0) or 1


def _summarize(model: Model) -> dict[str, Any]:
    """Return the figures recorded before and after each pass."""
    tensors = {id(t): t for t in (*model.graph.parameters(), *model.graph.buffers())}.values()
    return {
        "nodes": len(model.graph.graph.nodes),
        "values": sum(t.numel() for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def _artifact(file: ModelFile, folder: Path, model: Model, recipe: str) -> Artifact:
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


def _pt2_bytes(model: Model) -> bytes:
    """Return the compressed graph as a .pt2 file."""
    with temporary_folder() as folder:
        path = folder / "model.pt2"
        save_pt2(model, path)
        return path.read_bytes()


def _stage(
    folder: Path, files: dict[str, ModelFile], floats: dict[str, ModelFile], model: Model, recipe: str
) -> list[Candidate]:
    """Write compressed and float files where the runner can open them."""
    candidates = []
    for prefix, group in (("", files), ("float_", floats)):
        for name, file in group.items():
            path = stage_file(file, folder / (prefix or "int8"), model, recipe)
            candidates.append(Candidate(f"{prefix}{name}", path))
    return candidates


def stage_file(file: ModelFile, folder: Path, model: Model, recipe: str) -> Path:
    """Write a file and its sidecar where the runner can open them, and return the file's path."""
    artifact = _artifact(file, folder, model, recipe)
    write_artifact(artifact, file.data)
    return artifact.path


def _prove(parts: ReportParts, made: _Made, options: CompressOptions, progress: Progress) -> None:
    """Fill in parity, accuracy, agreement, latency and the sizes."""
    started = time.perf_counter()
    dataset, split, spec = made.images.dataset, made.images.split, made.loaded.spec
    _, *image_shape = spec.inputs[0].shape
    num_proof = int(np.clip((1 << 22) // math.prod(size or 1 for size in image_shape), 16, 256))
    inputs, proof_indices = read_images(dataset, split.held_out[:num_proof])
    floats = {f: write_model(made.float_program, f, spec, FileOptions()) for f in options.formats}
    with temporary_folder() as staging:
        candidates = _stage(staging, made.files, floats, made.compressed, parts.recipe)
        parts.parity = prove_parity(made.program, candidates, inputs, made.activation_dtype, progress)
        if spec.task in ("classification", "segmentation"):
            reference, per_pixel = f"float_{options.formats[0]}", spec.task == "segmentation"
            judged = [c for c in candidates if c.key == reference or not c.key.startswith("float_")]
            parts.predictions = predict(
                judged, dataset, split.held_out, reference, progress, per_pixel=per_pixel
            )
        if options.measure:
            _time(parts, made, candidates, inputs, options.threads, progress)
    parts.float_files = {f: file.data for f, file in floats.items()}
    parts.files = {f: file.data for f, file in made.files.items()}
    parts.threads = options.threads
    parts.data_source, parts.synthetic = dataset.name, made.images.synthetic
    parts.num_calibration = len(split.calibration)
    parts.num_proof = len(inputs)
    parts.held_out = not set(split.calibration) & set(proof_indices)
    parts.data_warnings = (*dataset.warnings, *split.warnings)
    parts.proof_seconds = time.perf_counter() - started


def _time(
    parts: ReportParts,
    made: _Made,
    candidates: Sequence[Candidate],
    inputs: Array,
    threads: int,
    progress: Progress,
) -> None:
    """Fill in latency, of the target where it can be reached, else of this machine."""
    scales = output_scales(made.program)
    target = measure_on_target(made.device, candidates, inputs, scales, threads, progress)
    parts.parity = dataclasses.replace(
        parts.parity,
        comparisons={**parts.parity.comparisons, **target.comparisons},
        warnings=(*parts.parity.warnings, *target.warnings),
    )
    parts.is_local = parts.is_local or target.latency is not None
    parts.latency = target.latency or measure_latency(candidates, inputs, threads, progress)


def _publish(
    folder: Path,
    artifacts: dict[str, Artifact],
    files: dict[str, ModelFile],
    pt2: bytes,
    report: Report,
    force: bool,
) -> None:
    """Write everything, all or nothing."""
    contents: dict[Path, bytes] = {}
    for name, artifact in artifacts.items():
        contents[artifact.path] = files[name].data
        contents[artifact.sidecar_path] = artifact.sidecar_bytes()
    contents[folder / "model.pt2"] = pt2
    contents[folder / "report.json"] = report.to_json().encode()
    contents[folder / "report.html"] = render_compress_html(report).encode()
    publish_files(folder, contents, force)
