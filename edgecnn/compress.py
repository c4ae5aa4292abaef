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
from typing import Any, NoReturn

from edgecnn.artifact import Artifact, check_output_directory, publish_files
from edgecnn.devices.kernels import kernels_for
from edgecnn.devices.profile import Device, load_device
from edgecnn.errors import BudgetError, EdgeCNNError, ExportError
from edgecnn.export.files import ModelFile
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.cost import LayerCost, float_cost, layer_costs
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.program import Program
from edgecnn.images import is_trained
from edgecnn.judgement import Made, Timing, judge, make_artifact
from edgecnn.load import save_pt2
from edgecnn.making import Maker, Plan, Prepared, widens
from edgecnn.model import Model
from edgecnn.options import CompressOptions
from edgecnn.pipeline import Need, PassContext, Progress, SilentProgress
from edgecnn.preflight import keep_inputs, require_packages
from edgecnn.proof import temporary_folder
from edgecnn.quantize.islands import FLOAT_ISLANDS, FLOAT_LAYERS
from edgecnn.recipe import Recipe
from edgecnn.report import Report
from edgecnn.report.build import ReportParts, build_report
from edgecnn.report.html import render_compress_html
from edgecnn.report.misses import budget_misses, held_without_labels, largest_drop
from edgecnn.resume import Resumable
from edgecnn.train.distributed import launched, leave_team

__all__ = ["CompressOptions", "CompressResult", "compress"]


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

    Of several processes that torchrun started, all train together; the first alone returns, and the others
    end with SystemExit once nothing is left to train.

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
    leads = launched().leads
    progress = progress if progress is not None and leads else SilentProgress()
    folder = Path(out)
    keep_inputs((model, options.load.weights, options.teacher), folder)
    device = load_device(options.target)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe = recipe if options.seed is None else dataclasses.replace(recipe, seed=options.seed)
    _check_io(recipe, options.io)
    if leads:
        check_output_directory(folder, options.force)
    with Resumable(folder, recipe, resume=options.resume, force=options.force, leads=leads) as resumable:
        maker = Maker(recipe, device, options, resumable, progress)
        if not leads:
            _help_training(maker, model, data)
        result = _run(maker, model, data, folder)
    _check_budgets(result, options, folder)
    return result


def _help_training(maker: Maker, model: Any, data: Any) -> NoReturn:
    """Take part in the training that another process leads, and end."""
    prepared = maker.prepare(model, data)
    if any(is_trained(step) for step in prepared.plan.passes[prepared.num_done :]):
        maker.make(prepared, prepared.plan)
    leave_team()
    raise SystemExit(0)


@dataclass(frozen=True)
class _Attempt:
    """The files of one plan, judged, before anything is written."""

    plan: Plan
    made: Made
    artifacts: dict[str, Artifact]
    report: Report


def _run(maker: Maker, model: Any, data: Any, folder: Path) -> CompressResult:
    """Do the work, prove it, look for something better where that is called for, and write the results."""
    started = time.perf_counter()
    prepared = maker.prepare(model, data)
    prepare_seconds = time.perf_counter() - started
    attempt = _attempt(maker, prepared, prepared.plan, folder, prepare_seconds)
    if maker.options.search:
        attempt = _improved(maker, prepared, attempt, folder, prepare_seconds)
    report = _with_budget(attempt.report, maker.options.max_drop)
    pt2 = _pt2_bytes(attempt.made.compressed)
    maker.progress.finish()
    _publish(folder, attempt.artifacts, attempt.made.files, pt2, report, maker.options.force)
    return CompressResult(attempt.artifacts, report, attempt.made.compressed)


def _with_budget(report: Report, max_drop: float | None) -> Report:
    """Return a report that says what an accuracy budget was held against, where that was not accuracy."""
    words = "" if max_drop is None else held_without_labels(report, max_drop)
    return dataclasses.replace(report, warnings=(*report.warnings, words)) if words else report


def _attempt(maker: Maker, prepared: Prepared, plan: Plan, folder: Path, prepare_seconds: float) -> _Attempt:
    """Make the files of a plan and judge them."""
    options, progress = maker.options, maker.progress
    recipe = _recipe_of(maker.recipe, prepared, plan)
    started = time.perf_counter()
    made, records = maker.make(prepared, plan)
    leave_team()  # the processes that helped are done: what a search trains is trained here alone
    records = [_with_cost(record, made.program) for record in records]
    artifacts = {
        name: make_artifact(file, folder, made.compressed, recipe.name) for name, file in made.files.items()
    }
    parts = ReportParts(made.loaded, made.compressed, recipe.name, recipe.seed, maker.device.name)
    parts.work_seconds = prepare_seconds + time.perf_counter() - started
    parts.is_local = maker.device.transport == "local"
    parts.costs = layer_costs(made.float_program)
    if made.trained is not None:
        parts.params_after = sum(p.numel() for p in set(made.trained.graph.parameters()))
        parts.costs_after = _costs(made.trained)
    parts.artifacts = artifacts
    parts.details = (*_kernels(recipe, maker.device), *records)
    parts.recipe_toml = recipe.to_toml()
    parts.float_islands = _islands(made.program, records) if _quantizes(recipe) else []
    judge(parts, made, Timing(options.threads, options.measure), progress)
    if not any(Need.CALIBRATION in step.needs for step in recipe.passes):
        parts.num_calibration = 0
    return _Attempt(plan, made, artifacts, build_report(parts))


def _improved(
    maker: Maker, prepared: Prepared, attempt: _Attempt, folder: Path, prepare_seconds: float
) -> _Attempt:
    """Search where the files miss the accuracy budget, and where one is slower than float."""
    from edgecnn.search.improve import Found, avoid_slower, guard_accuracy, is_slower, may_miss_accuracy

    details: list[dict[str, Any]] = []
    max_drop = maker.options.max_drop

    def take(attempt: _Attempt, found: Found) -> _Attempt:
        details.extend(found.details)
        if found.plan == attempt.plan:
            return attempt
        try:
            better = _attempt(maker, prepared, found.plan, folder, prepare_seconds)
        except EdgeCNNError as error:  # what is there already is made and proven, so it stays
            details[-1].update(_not_taken(attempt, details[-1], max_drop, f"fails: {error.message}"))
            return attempt
        worse = _why_worse(attempt, better, details[-1], max_drop)
        if worse:
            details[-1].update(_not_taken(attempt, details[-1], max_drop, worse))
            return attempt
        return better

    started = time.perf_counter()
    if max_drop is not None and may_miss_accuracy(attempt.report, attempt.plan, max_drop):
        attempt = take(attempt, guard_accuracy(maker, prepared, attempt.plan, max_drop))
    if is_slower(attempt.report, maker.device, must_be_faster=maker.options.must_be_faster):
        found = avoid_slower(maker, prepared, attempt.plan, attempt.made, attempt.report)
        attempt = take(attempt, found)
    if not details:
        return attempt
    report = dataclasses.replace(
        attempt.report,
        details=(*attempt.report.details, *details),
        timings={**attempt.report.timings, "search_seconds": time.perf_counter() - started},
    )
    return dataclasses.replace(attempt, report=report)


def _why_worse(attempt: _Attempt, better: _Attempt, detail: dict[str, Any], max_drop: float | None) -> str:
    """Return why the files that a search found are not to be taken, "" if they are."""
    from edgecnn.search.improve import misses_accuracy

    if misses_accuracy(better.report, max_drop) and not misses_accuracy(attempt.report, max_drop):
        return "misses the accuracy budget"
    before, after = largest_drop(attempt.report), largest_drop(better.report)
    is_worse = before is not None and after is not None and after > before + 1e-9
    return "loses more in all its files" if detail["goal"] == "accuracy" and is_worse else ""


def _not_taken(attempt: _Attempt, detail: dict[str, Any], max_drop: float | None, why: str) -> dict[str, Any]:
    """Return what changes in a detail when the files stay as they were."""
    from edgecnn.search.improve import misses_accuracy

    is_met = detail["goal"] == "accuracy" and not misses_accuracy(attempt.report, max_drop)
    words = f"what was found {why}"
    return {
        "is_met": is_met,
        "changes": [],
        "advice": "" if is_met else words,
        "note": words if is_met else "",
    }


def _recipe_of(recipe: Recipe, prepared: Prepared, plan: Plan) -> Recipe:
    """Return the recipe that makes these files: the run's own, or with the passes that were found."""
    return recipe if plan.passes == prepared.plan.passes else dataclasses.replace(recipe, passes=plan.passes)


def _costs(model: Model) -> list[LayerCost]:
    """Return what a network in float costs, layer by layer."""
    return layer_costs(build_program(FoldBatchNorm().run(model, PassContext())))


def _quantizes(recipe: Recipe) -> bool:
    return any(step.name.startswith("quantize") for step in recipe.passes)


def _with_cost(record: dict[str, Any], program: Program) -> dict[str, Any]:
    """Return a detail, with what it costs where it is about operators left in float."""
    return (
        {**record, **dataclasses.asdict(float_cost(program))}
        if record.get("kind") == FLOAT_ISLANDS
        else record
    )


def _islands(program: Program, records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the operators that compute in float for no reason that a pass has recorded."""
    wished = {name for record in records if record.get("kind") == FLOAT_LAYERS for name in record["layers"]}
    wished |= {
        operator["layer"]
        for record in records
        if record.get("kind") == FLOAT_ISLANDS
        for operator in record["operators"]
    }
    return [layer for layer in float_islands(program) if layer not in wished]


def _check_io(recipe: Recipe, io: str) -> None:
    """Raise if the files cannot have integer inputs."""
    if io != "float32" and any(step.name == "quantize_dynamic" for step in recipe.passes):
        raise ExportError(
            f"io is {io!r}, but the recipe {recipe.name} takes scales from each image when it runs, "
            "so inputs and outputs have none, expected 'float32'",
            hint="--int8 makes files with scales of their own, or leave --io out",
        )
    if io != "float32" and widens(recipe.passes):
        raise ExportError(
            f"io is {io!r}, but the recipe {recipe.name} has int16 activations, expected 'float32'",
            hint="--int8 makes files with int8 inputs, or leave --io out",
        )
    if io != "float32" and not _quantizes(recipe):
        raise ExportError(
            f"io is {io!r}, but the recipe {recipe.name} does not quantize, expected 'float32'",
            hint="add --int8, or leave --io out",
        )


def _check_budgets(result: CompressResult, options: CompressOptions, folder: Path) -> None:
    """Raise BudgetError if a budget is missed."""
    report = result.report
    misses = budget_misses(
        report,
        options.max_drop,
        options.max_latency_ms,
        options.max_size_mb,
        must_be_faster=options.must_be_faster,
    )
    if not misses:
        return
    unmeasured = report.accuracy is None and options.max_drop is not None
    raise BudgetError(
        f"budget missed: {'; '.join(misses)} (the files are in {folder} all the same)",
        hint="give labelled images with --data" if unmeasured else "relax it, or try another recipe",
        result=result,
    )


def _kernels(recipe: Recipe, device: Device) -> list[dict[str, Any]]:
    """Say which int8 kernels the target will use, for a recipe that quantizes."""
    return (
        [{"pass": "target", "kind": "kernels", **kernels_for(device.isa).to_dict()}]
        if _quantizes(recipe) and not widens(recipe.passes)
        else []
    )


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
