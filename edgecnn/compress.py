"""The sentence `edgecnn compress`: load -> passes -> both files -> proof -> report.

No result is written before all of it has succeeded; then every file of the run appears at once. A run that
trains keeps checkpoints in its output directory meanwhile, from which it can be resumed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.artifact import Artifact, check_output_directory, publish_files
from edgecnn.devices.capability import activation_dtype_for, weight_bits_for
from edgecnn.devices.kernels import kernels_for
from edgecnn.devices.profile import Device, load_device
from edgecnn.errors import BudgetError, EdgeCNNError, ExportError, RecipeError
from edgecnn.export.dynamic import float_layers
from edgecnn.export.files import FileOptions, ModelFile, write_model
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.cost import LayerCost, layer_costs
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.images import Images, Sources, check_preprocess, choose_images, is_trained
from edgecnn.judgement import Made, Timing, judge, make_artifact
from edgecnn.load import LoadOptions, load_model, save_pt2
from edgecnn.model import Model
from edgecnn.options import CompressOptions
from edgecnn.pipeline import Need, Pass, PassContext, Progress, SilentProgress, run_passes
from edgecnn.preflight import keep_inputs, refuse_quantized, require_packages, suspect_channels
from edgecnn.proof import temporary_folder
from edgecnn.recipe import Recipe
from edgecnn.report import Report
from edgecnn.report.build import ReportParts, budget_misses, build_report
from edgecnn.report.html import render_compress_html
from edgecnn.resume import Resumable

__all__ = ["CompressOptions", "CompressResult", "compress"]

CHANGING = ("edgecnn.prune", "edgecnn.train", "edgecnn.distill")
"""Packages whose passes change what the network computes in float; the others only rewrite or quantize it."""


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
        out: directory; gets model.onnx, model.tflite, their sidecars, model.pt2, report.json and report.html,
            and while a recipe trains the directory checkpoints.
        options: everything else.
        progress: told how far the work is.

    Returns:
        The artifacts, the report and the compressed model.

    Raises:
        BudgetError: the files are written, but one of the budgets is missed.
        EdgeCNNError: anything else that went wrong; no result is written.
    """
    options = options or CompressOptions()
    options.check()
    require_packages(options.formats)
    progress = progress or SilentProgress()
    folder = Path(out)
    keep_inputs((model, options.load.weights, options.teacher), folder)
    device = load_device(options.target)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe = recipe if options.seed is None else dataclasses.replace(recipe, seed=options.seed)
    _check_io(recipe, options.io)
    check_output_directory(folder, options.force)
    with Resumable(folder, recipe, resume=options.resume, force=options.force) as resumable:
        result = _run(_Work(recipe, device, options, resumable, progress), model, data, folder)
    _check_budgets(result, options, folder)
    return result


def _run(work: _Work, model: Any, data: Any, folder: Path) -> CompressResult:
    """Do the work, prove it and write the results."""
    recipe, options, progress = work.recipe, work.options, work.progress
    started = time.perf_counter()
    made, records = work.make(model, data)
    artifacts = {
        name: make_artifact(file, folder, made.compressed, recipe.name) for name, file in made.files.items()
    }
    pt2 = _pt2_bytes(made.compressed)
    progress.finish()

    parts = ReportParts(made.loaded, made.compressed, recipe.name, recipe.seed, work.device.name)
    parts.work_seconds = time.perf_counter() - started
    parts.is_local = work.device.transport == "local"
    parts.costs = layer_costs(made.float_program)
    if made.trained is not None:
        parts.params_after = sum(p.numel() for p in set(made.trained.graph.parameters()))
        parts.costs_after = _costs(made.trained)
    parts.artifacts = artifacts
    parts.details = (*_kernels(recipe, work.device), *records)
    parts.recipe_toml = recipe.to_toml()
    parts.float_islands = float_islands(made.program) if _quantizes(recipe) else []
    judge(parts, made, Timing(options.threads, options.measure), progress)
    if not any(Need.CALIBRATION in step.needs for step in recipe.passes):
        parts.num_calibration = 0
    report = build_report(parts)
    _publish(folder, artifacts, made.files, pt2, report, options.force)
    return CompressResult(artifacts, report, made.compressed)


@dataclass(frozen=True)
class _Work:
    """From the network to the files in memory."""

    recipe: Recipe
    device: Device
    options: CompressOptions
    resumable: Resumable
    progress: Progress

    def make(self, model: Any, data: Any) -> tuple[Made, list[dict[str, Any]]]:
        """Load the network, run the passes, write the files into memory; return the passes' details too."""
        progress, options = self.progress, self.options
        progress.start("load and export the graph", None)
        loaded = load_model(model, options.load)
        progress.finish()
        refuse_quantized(loaded)
        passes = _fit_to_target(self.recipe.passes, self.device, options.num_samples)
        sources = Sources(data, options.train_data)
        images = choose_images(loaded, sources, passes, self.recipe.seed, progress)
        narrowed = _narrowed(self.recipe.passes, self.device)
        loaded = loaded.with_warning(
            *suspect_channels(loaded), *check_preprocess(loaded, images), *narrowed, *_unrecovered(passes)
        )
        context = self._context(loaded, images, passes)
        kept = _Kept(passes)
        compressed = run_passes(loaded, passes, context, kept.summarize)

        progress.start("write the files", None)
        program = build_program(compressed)
        compressed = compressed.with_warning(*float_layers(program, options.formats))
        float_program = build_program(FoldBatchNorm().run(loaded, context))
        dtype = activation_dtype_for(self.device.isa)
        chosen = FileOptions(options.io, dtype)
        files = {f: write_model(program, f, loaded.spec, chosen) for f in options.formats}
        made = Made(
            loaded, compressed, kept.trained, images, program, float_program, files, dtype, self.device
        )
        return made, context.records

    def _context(self, loaded: Model, images: Images, passes: Sequence[Pass]) -> PassContext:
        """Return what the passes are given."""
        teacher = self._teacher(loaded, passes)
        stages = self.resumable.open(loaded, images, passes, teacher)
        train = images.train
        return PassContext(
            images.dataset,
            images.split.calibration,
            self.recipe.seed,
            self.progress,
            train=train.dataset if train else None,
            train_indices=train.indices if train else (),
            validation_indices=train.validation if train else (),
            teacher=teacher,
            checkpoints=stages,
        )

    def _teacher(self, loaded: Model, passes: Sequence[Pass]) -> Model | None:
        """Return the network to learn from: another one, or the one that was given, as it was given."""
        options = self.options
        if not any(Need.TEACHER in step.needs for step in passes):
            if options.teacher is not None:
                raise RecipeError(
                    "a teacher is given, but no pass of the recipe learns from one",
                    hint="add --distill, or leave --teacher out",
                )
            return None
        if options.teacher is None:
            return loaded
        self.progress.start("load the teacher", None)
        _, *shape = loaded.spec.inputs[0].shape
        load = LoadOptions(
            arch=options.teacher_arch,
            input_shape=tuple(shape),  # type: ignore[arg-type]  # images, whose sizes are known
            trust=options.load.trust,
        )
        try:
            teacher = load_model(options.teacher, load)
        except EdgeCNNError as error:
            # Changed in place, so that the subclass and the traceback stay as they are.
            error.message = f"the teacher {options.teacher}: {error.message}"
            error.args = (error.message,)
            raise
        self.progress.finish()
        from edgecnn.distill.teacher import check_teacher

        check_teacher(loaded, teacher)  # said now, not after the pruning
        return teacher


class _Kept:
    """Sees the network after every pass, and keeps the last one that a pass has pruned or trained."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        changing = [i for i, step in enumerate(passes) if type(step).__module__.startswith(CHANGING)]
        self._last = max(changing, default=-1)
        self._index = -2
        self.trained: Model | None = None

    def summarize(self, model: Model) -> dict[str, Any]:
        """Return the figures recorded before and after each pass."""
        self._index += 1
        if self._index == self._last >= 0:
            self.trained = model
        tensors = {id(t): t for t in (*model.graph.parameters(), *model.graph.buffers())}.values()
        return {
            "nodes": len(model.graph.graph.nodes),
            "values": sum(t.numel() for t in tensors),
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
        }


def _costs(model: Model) -> list[LayerCost]:
    """Return what a network in float costs, layer by layer."""
    return layer_costs(build_program(FoldBatchNorm().run(model, PassContext())))


def _quantizes(recipe: Recipe) -> bool:
    return any(step.name.startswith("quantize") for step in recipe.passes)


def _check_io(recipe: Recipe, io: str) -> None:
    """Raise if the files cannot have integer inputs."""
    if io != "float32" and any(step.name == "quantize_dynamic" for step in recipe.passes):
        raise ExportError(
            f"io is {io!r}, but the recipe {recipe.name} takes scales from each image when it runs, so that its "
            "inputs and outputs have none, expected 'float32'",
            hint="--int8 makes files with scales of their own, or leave --io out",
        )
    if io != "float32" and not _quantizes(recipe):
        raise ExportError(
            f"io is {io!r}, but the recipe {recipe.name} does not quantize, expected 'float32'",
            hint="add --int8, or leave --io out",
        )


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


def _kernels(recipe: Recipe, device: Device) -> list[dict[str, Any]]:
    """Say which int8 kernels the target will use, for a recipe that quantizes."""
    return (
        [{"pass": "target", "kind": "kernels", **kernels_for(device.isa).to_dict()}]
        if _quantizes(recipe)
        else []
    )


def _narrowed(passes: Sequence[Pass], device: Device) -> list[str]:
    """Say that weights are narrower than the recipe asks for, where the target makes them so."""
    bits = weight_bits_for(device.isa)
    if all(getattr(step, "weight_bits", bits) <= bits for step in passes):
        return []
    why = f"{device.name} is {device.isa}, whose uint8 * int8 products saturate in pairs"
    return [f"{why}: weights have {bits} bits (a little less accuracy; ARM and x86 with VNNI take 8)"]


def _unrecovered(passes: Sequence[Pass]) -> list[str]:
    """Say that nothing wins the accuracy back that pruning costs, where nothing does."""
    pruned = [index for index, step in enumerate(passes) if step.name == "prune_channels"]
    if not pruned or any(is_trained(step) for step in passes[pruned[-1] :]):
        return []
    lost = "pruned without training: the accuracy that this costs is not won back"
    return [f"{lost}; give labelled images with --data, or --distill with unlabelled ones"]


def _pt2_bytes(model: Model) -> bytes:
    """Return the compressed graph as a .pt2 file."""
    with temporary_folder() as folder:
        path = folder / "model.pt2"
        save_pt2(model, path)
        return path.read_bytes()


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
